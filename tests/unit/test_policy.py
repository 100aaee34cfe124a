from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.scheduling.labels import both, check_selector, matches
from shoal.scheduling.policy import (
    Busy,
    Choice,
    Infeasible,
    Node,
    can_ever_run,
    choose_node,
    rank_nodes,
    utilisation,
)
from shoal.scheduling.resources import fits, to_amounts
from shoal.scheduling.views import Amounts, NodeView, Strategy

SPREAD = Strategy("spread")
DEFAULT = Strategy()


def node(name: str, total: dict[str, float], free: dict[str, float] | None = None, **labels: str) -> NodeView:
    available = to_amounts(total) | to_amounts(free or {})
    for key, value in (free or {}).items():
        if not value:
            available[key] = 0
    return NodeView(name.encode(), to_amounts(total), available, labels)


def draining(view: NodeView) -> NodeView:
    return NodeView(view.node_id, view.total, view.available, view.labels, True)


def choose(
    demand: dict[str, float],
    nodes: list[NodeView],
    strategy: Strategy = DEFAULT,
    local: str | None = None,
    seed: int = 0,
) -> Choice:
    return choose_node(to_amounts(demand), strategy, nodes, local.encode() if local else None, random.Random(seed))


def counts(
    demand: dict[str, float], nodes: list[NodeView], strategy: Strategy = DEFAULT, local: str | None = None
) -> Counter[str]:
    picks = [choose(demand, nodes, strategy, local, seed) for seed in range(200)]
    return Counter(pick.node_id.decode() for pick in picks if isinstance(pick, Node))


# -------------------------------------------------------------------------------------------------------- default


def test_local_first_until_half_used_then_the_least_used() -> None:
    other = node("b", {"CPU": 8}, {"CPU": 7})
    assert choose({"CPU": 1}, [node("a", {"CPU": 8}), other], local="a") == Node(b"a")
    assert choose({"CPU": 1}, [node("a", {"CPU": 8}, {"CPU": 4}), other], local="a") == Node(b"a")
    assert choose({"CPU": 1}, [node("a", {"CPU": 8}, {"CPU": 3}), other], local="a") == Node(b"b")
    full = node("b", {"CPU": 8}, {"CPU": 0})
    assert choose({"CPU": 1}, [node("a", {"CPU": 8}, {"CPU": 1}), full], local="a") == Node(b"a")


def test_the_most_used_resource_counts() -> None:
    local = node("a", {"CPU": 8, "memory": 100}, {"memory": 10})
    assert utilisation({}, local) == pytest.approx(0.9)
    assert choose({"CPU": 1}, [local, node("b", {"CPU": 8, "memory": 100}, {"CPU": 5})], local="a") == Node(b"b")


def test_a_marker_resource_that_is_taken_says_nothing() -> None:
    view = node("a", {"CPU": 8, "license": 1}, {"license": 0})
    assert utilisation(to_amounts({"CPU": 1}), view) == 0.0
    assert utilisation(to_amounts({"license": 1}), view) == 1.0


def test_random_among_the_best_fifth() -> None:
    nodes = [node(f"n{number}", {"CPU": 10}, {"CPU": 10 - number}) for number in range(10)]
    assert counts({"CPU": 1}, nodes).keys() == {"n0", "n1"}
    assert counts({"CPU": 1}, nodes[:4]).keys() == {"n0"}
    assert counts({"CPU": 1}, [node(f"n{number}", {"CPU": 10}) for number in range(3)]).keys() == {"n0", "n1", "n2"}


def test_work_without_gpu_stays_away_from_nodes_with_gpus() -> None:
    gpu, cpu = node("gpu", {"CPU": 8, "GPU": 1}), node("cpu", {"CPU": 8}, {"CPU": 1})
    assert counts({"CPU": 1}, [gpu, cpu]).keys() == {"cpu"}
    assert choose({"CPU": 1}, [gpu, cpu], local="gpu") == Node(b"cpu")
    assert choose({"CPU": 2}, [gpu, cpu]) == Node(b"gpu"), "better there than to wait"
    assert choose({"CPU": 1, "GPU": 1}, [gpu, cpu]) == Node(b"gpu")


def test_draining_nodes_take_nothing() -> None:
    a, b = node("a", {"CPU": 8}), node("b", {"CPU": 8}, {"CPU": 1})
    assert choose({"CPU": 1}, [draining(a), b], local="a") == Node(b"b")
    for strategy in (DEFAULT, SPREAD, Strategy("node", b"a")):
        choice = choose({"CPU": 1}, [draining(a)], strategy)
        assert isinstance(choice, Infeasible)
        assert "draining" in choice.reason.text


# --------------------------------------------------------------------------------------------- spread and affinity


def test_spread_takes_the_least_used_and_breaks_ties_by_chance() -> None:
    nodes = [node("a", {"CPU": 4}, {"CPU": 2}), node("b", {"CPU": 4}), node("c", {"CPU": 4})]
    picked = counts({"CPU": 1}, nodes, SPREAD, local="a")
    assert picked.keys() == {"b", "c"}
    assert min(picked.values()) > 60


def test_affinity() -> None:
    a, b = node("a", {"CPU": 4}, {"CPU": 0}), node("b", {"CPU": 4})
    hard, soft = Strategy("node", b"a"), Strategy("node", b"a", True)
    assert choose({"CPU": 1}, [a, b], Strategy("node", b"b"), local="a") == Node(b"b")
    for strategy in (hard, soft):
        choice = choose({"CPU": 1}, [a, b], strategy)
        assert isinstance(choice, Busy), "it is there: wait for it"
        assert choice.reason.text == "all 4 CPU are busy on the only node that could run it"
    assert choose({"CPU": 1}, [b], soft) == Node(b"b")
    assert choose({"CPU": 5}, [a, node("c", {"CPU": 8})], soft) == Node(b"c")
    gone = choose({"CPU": 1}, [b], hard)
    assert isinstance(gone, Infeasible)
    assert gone.reason.text == "node 61, which it must run on, is not in the cluster"
    small = choose({"CPU": 1, "GPU": 2}, [a, b], hard)
    assert isinstance(small, Infeasible)
    assert small.reason.text == "node 61, which it must run on, has no GPU, and it needs 2 GPU"


# ------------------------------------------------------------------------------------------------- labels, reasons


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [("eu", True), ("us", False), ("!us", True), ("!eu", False), ("in(us, eu)", True), ("in(us)", False),
     ("!in(us,eu)", False), ("!in(us)", True)],
)  # fmt: skip
def test_labels(wanted: str, expected: bool) -> None:
    assert matches(check_selector({"zone": wanted}), {"zone": "eu"}) is expected
    assert matches(check_selector({"zone": wanted}), {}) is wanted.startswith("!")
    assert matches(check_selector({"zone": wanted, "disk": "ssd"}), {"zone": "eu"}) is False


def test_conditions_of_one_key_are_joined_and_own_names_are_the_known_ones() -> None:
    joined = both({"zone": "in(a,b)"}, {"zone": "!b", "disk": "exists()"})
    assert [matches(joined, {"zone": zone, "disk": "ssd"}) for zone in "abc"] == [True, False, False]
    assert not matches(joined, {"zone": "a"})
    assert matches({"disk": "!exists()"}, {})
    assert check_selector({"shoal.io/node-id": "a"}) == {"ray.io/node-id": "a"}


def test_fallbacks_are_tried_in_order_where_there_is_no_room() -> None:
    a, b = node("a", {"CPU": 4}, zone="a"), node("b", {"CPU": 4}, zone="b")
    full = node("a", {"CPU": 4}, {"CPU": 0}, zone="a")
    wants = Strategy(labels={"zone": "a"}, fallbacks=[{"zone": "x"}, {"zone": "b"}])
    assert choose({"CPU": 1}, [a, b], wants, local="b") == Node(b"a")
    assert choose({"CPU": 1}, [full, b], wants) == Node(b"b")
    assert choose({"CPU": 1}, [b], wants) == Node(b"b")
    busy = choose({"CPU": 1}, [full, node("b", {"CPU": 2}, {"CPU": 0}, zone="b"), node("c", {"CPU": 8})], wants)
    assert isinstance(busy, Busy)
    assert busy.reason.text == "all 6 CPU are busy on the 2 nodes that could run it"
    never = choose({"CPU": 1}, [node("c", {"CPU": 8})], wants)
    assert isinstance(never, Infeasible)
    assert never.reason.text == "no node has the labels zone=a, nor zone=x, nor zone=b"


def test_affinity_may_spill_or_fail_when_the_node_is_busy() -> None:
    full, free = node("a", {"CPU": 4}, {"CPU": 0}), node("b", {"CPU": 4})
    spills = Strategy("node", b"a", True, when_busy="spill")
    assert choose({"CPU": 1}, [full, free], spills) == Node(b"b")
    assert choose({"CPU": 1}, [node("a", {"CPU": 4}, {"CPU": 1}), free], spills) == Node(b"a")
    failed = choose({"CPU": 1}, [full, free], Strategy("node", b"a", when_busy="fail"))
    assert isinstance(failed, Infeasible)
    assert failed.reason.code == "unschedulable"
    assert failed.reason.text.endswith("has too little CPU free now, and it was told not to wait")


def test_labels_limit_the_choice() -> None:
    nodes = [node("a", {"CPU": 4}, zone="us"), node("b", {"CPU": 2}, zone="eu")]
    wants = Strategy(labels={"zone": "eu"})
    assert choose({"CPU": 1}, nodes, wants, local="a") == Node(b"b")
    for demand, strategy, text in [
        ({"CPU": 1}, Strategy(labels={"zone": "asia"}), "no node has the labels zone=asia"),
        ({"CPU": 3}, wants, "no node with the labels has 3 CPU (the largest has 2)"),
    ]:
        choice = choose(demand, nodes, strategy)
        assert isinstance(choice, Infeasible)
        assert choice.reason.text == text


INFEASIBLE: list[tuple[dict[str, float], list[NodeView], str]] = [
    ({"CPU": 1}, [], "the cluster has no nodes"),
    ({"GPU": 4}, [node("a", {"GPU": 1}), node("b", {"CPU": 1})], "no node has 4 GPU (the largest has 1)"),
    ({"x": 1}, [node("a", {"CPU": 1})], "no node has 1 x (none has any)"),
    (
        {"CPU": 4, "GPU": 1},
        [node("a", {"CPU": 8}), node("b", {"CPU": 1, "GPU": 1})],
        "no single node has all of 4 CPU, 1 GPU",
    ),
]
BUSY: list[tuple[dict[str, float], list[NodeView], str]] = [
    (
        {"CPU": 1},
        [node("a", {"CPU": 2}, {"CPU": 0}), node("b", {"CPU": 6}, {"CPU": 0})],
        "all 8 CPU are busy on the 2 nodes that could run it",
    ),
    (
        {"CPU": 3},
        [node("a", {"CPU": 4}, {"CPU": 2}), node("b", {"CPU": 2})],
        "it needs 3 CPU at once, and too little of the 4 CPU is free on the only node that could run it",
    ),
    (
        {"CPU": 1, "GPU": 1},
        [node("a", {"CPU": 2, "GPU": 1}, {"GPU": 0})],
        "all 1 GPU are busy on the only node that could run it",
    ),
]


@pytest.mark.parametrize(
    ("demand", "nodes", "code", "text"),
    [(demand, nodes, "infeasible", text) for demand, nodes, text in INFEASIBLE]
    + [(demand, nodes, "busy", text) for demand, nodes, text in BUSY],
)
def test_reasons(demand: dict[str, float], nodes: list[NodeView], code: str, text: str) -> None:
    choice = choose(demand, nodes)
    assert not isinstance(choice, Node)
    assert (choice.reason.code, choice.reason.text) == (code, text)


# ----------------------------------------------------------------------------------------------------- properties

amounts = st.dictionaries(st.sampled_from(["CPU", "GPU", "x"]), st.integers(0, 4))


@st.composite
def clusters(draw: st.DrawFn) -> list[NodeView]:
    views: list[NodeView] = []
    for number in range(draw(st.integers(0, 6))):
        total = draw(amounts)
        available = {name: draw(st.integers(-1, amount)) for name, amount in total.items()}
        zone = draw(st.sampled_from(["", "eu"]))
        views.append(NodeView(bytes([number]), total, available, {"zone": zone}, draw(st.booleans())))
    return views


@st.composite
def strategies_(draw: st.DrawFn) -> Strategy:
    kind = draw(st.sampled_from(["default", "spread", "node"]))
    labels = draw(st.sampled_from([{}, {"zone": "eu"}]))
    return Strategy(kind, bytes([draw(st.integers(0, 6))]), draw(st.booleans()), labels)


@given(amounts, strategies_(), clusters(), st.integers(-1, 6), st.integers(0, 99))
def test_a_choice_is_always_right(
    demand: Amounts, strategy: Strategy, nodes: list[NodeView], local: int, seed: int
) -> None:
    choice = choose_node(demand, strategy, nodes, bytes([local]) if local >= 0 else None, random.Random(seed))
    possible = [view for view in nodes if can_ever_run(demand, strategy, view)]
    if strategy.kind == "node":
        named = [view for view in possible if view.node_id == strategy.node_id]
        possible = named if named or not strategy.soft else possible
    ready = [view for view in possible if fits(demand, view.available)]
    match choice:
        case Node(node_id):
            assert node_id in {view.node_id for view in ready}
        case Busy(reason):
            assert possible
            assert not ready
            assert reason.code == "busy"
            assert reason.text
        case Infeasible(reason):
            assert not possible
            assert reason.code == ("unschedulable" if strategy.kind == "node" and not strategy.soft else "infeasible")
            assert reason.text


@given(amounts, st.sampled_from([DEFAULT, SPREAD]), clusters(), st.integers(0, 99))
def test_a_ranking_is_by_use_but_for_its_shuffled_head(
    demand: Amounts, strategy: Strategy, nodes: list[NodeView], seed: int
) -> None:
    fitting = [view for view in nodes if can_ever_run(demand, strategy, view) and fits(demand, view.available)]
    ranked = rank_nodes(demand, strategy, fitting, len(nodes), random.Random(seed))
    names = [view.node_id for view in ranked]
    assert len(names) == len(set(names)) > 0 or not fitting
    assert set(names) <= {view.node_id for view in fitting}
    if ranked:
        group = [view for view in fitting if not view.total.get("GPU")] or fitting
        group = fitting if strategy == SPREAD or demand.get("GPU") else group
        assert set(names) == {view.node_id for view in group}
        used = [utilisation(demand, view) for view in ranked]
        top = 1 if strategy == SPREAD else max(len(nodes) // 5, 1)
        assert sorted(used[:top]) + used[top:] == sorted(used)
