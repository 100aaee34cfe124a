"""Where bundles go: the planner against an exact search on small clusters, and its words."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.scheduling import bundle_names as names
from shoal.scheduling.bundles import STRATEGIES, Assigned, BundleNeed, place_bundles
from shoal.scheduling.policy import Busy, Infeasible, can_ever_run
from shoal.scheduling.resources import add, describe_amount, fits, to_amounts
from shoal.scheduling.views import UNIT, Amounts, NodeView, Strategy

GROUP = bytes(range(18))
HEX = GROUP.hex()


def node(name: str, free: float | None = None, *, gpus: float = 0, cpus: float = 4, **more: Any) -> NodeView:
    total = to_amounts({"CPU": cpus, "GPU": gpus})
    available = {**total, "CPU": round((cpus if free is None else free) * UNIT)}
    return NodeView(name.encode(), total, available, **more)


def need(cpus: float = 1, gpus: float = 0, **labels: str) -> BundleNeed:
    return BundleNeed(to_amounts({"CPU": cpus, "GPU": gpus}), labels)


def place(strategy: str, bundles: list[BundleNeed], nodes: list[NodeView], **more: Any) -> dict[int, str]:
    plan = place_bundles(bundles, strategy, nodes, **more)
    assert isinstance(plan, Assigned), plan
    return {index: where.decode() for index, where in plan.nodes.items()}


def why(strategy: str, bundles: list[BundleNeed], nodes: list[NodeView], **more: Any) -> tuple[type, str]:
    plan = place_bundles(bundles, strategy, nodes, **more)
    assert isinstance(plan, Busy | Infeasible), plan
    return type(plan), plan.reason.text


# ------------------------------------------------------------------------------------------------------- what is chosen


def test_pack_takes_one_node_if_one_will_do() -> None:
    assert set(place("PACK", [need(1)] * 3, [node("a", 2), node("b", 3), node("c")]).values()) == {"b"}


def test_pack_takes_few_nodes_where_one_will_not_do() -> None:
    places = place("PACK", [need(2)] * 4, [node("a", 2), node("b", 2), node("c", 4), node("d", 4)])
    assert set(places.values()) == {"c", "d"}


def test_spread_takes_many_nodes_and_shares_when_there_are_too_few() -> None:
    assert len(set(place("SPREAD", [need(1)] * 3, [node("a"), node("b"), node("c")]).values())) == 3
    assert Counter(place("SPREAD", [need(1)] * 4, [node("a"), node("b")]).values()) == {"a": 2, "b": 2}


def test_strict_pack_prefers_the_fullest_node_or_the_one_that_is_named() -> None:
    nodes = [node("a"), node("b", 2), node("c", 1)]
    assert set(place("STRICT_PACK", [need(1)] * 2, nodes).values()) == {"b"}
    assert set(place("STRICT_PACK", [need(1)] * 2, nodes, soft_target=b"a").values()) == {"a"}
    assert set(place("STRICT_PACK", [need(1)] * 2, nodes, soft_target=b"c").values()) == {"b"}


def test_strict_spread_finds_the_only_matching() -> None:
    nodes = [node("a", 4), node("b", 2), node("c", 1)]
    assert place("STRICT_SPREAD", [need(1), need(2), need(4)], nodes) == {0: "c", 1: "b", 2: "a"}


def test_gpus_are_for_those_who_need_them() -> None:
    nodes = [node("gpu", gpus=2), node("plain")]
    for strategy in STRATEGIES:
        assert set(place(strategy, [need(1)], nodes).values()) == {"plain"}
        assert set(place(strategy, [need(1, 1)], nodes).values()) == {"gpu"}


def test_each_bundle_may_ask_for_labels() -> None:
    nodes = [node("a", labels={"zone": "eu"}), node("b", labels={"zone": "us"})]
    for strategy in ("PACK", "SPREAD", "STRICT_SPREAD"):
        assert place(strategy, [need(1, zone="us"), need(1, zone="eu")], nodes) == {0: "b", 1: "a"}
    assert why("STRICT_PACK", [need(1, zone="us"), need(1, zone="eu")], nodes)[0] is Infeasible


def test_only_lost_bundles_are_placed_again() -> None:
    nodes = [node("a", 3), node("b"), node("c", 1)]
    assert place("STRICT_SPREAD", [need(1)] * 2, nodes, kept={0: b"a"}) in ({1: "b"}, {1: "c"})
    assert place("PACK", [need(1)] * 2, nodes, kept={0: b"a"}) == {1: "a"}
    assert place("STRICT_PACK", [need(1)] * 2, nodes, kept={0: b"a"}) == {1: "a"}
    assert place("SPREAD", [need(1)] * 2, nodes, kept={0: b"b"})[1] != "b"


def test_draining_nodes_get_nothing() -> None:
    assert place("PACK", [need(1)], [node("a", draining=True), node("b")]) == {0: "b"}
    assert why("PACK", [need(1)], [node("a", draining=True)])[0] is Infeasible


# ---------------------------------------------------------------------------------------------------------- its words


@pytest.mark.parametrize(
    ("strategy", "bundles", "words"),
    [
        ("PACK", [need(1), need(8)], "its bundle 1 fits on no node: no node has 8 CPU (the largest has 4)"),
        ("PACK", [need(1, zone="eu")], "its bundle 0 fits on no node: no node has the labels"),
        ("PACK", [need(3)] * 3, "the nodes are too small for all of its bundles (9 CPU)"),
        ("STRICT_PACK", [need(3)] * 2, "all of its bundles must be on one node, and no node has 6 CPU"),
        ("STRICT_SPREAD", [need(1)] * 3, "its 3 bundles must be on as many nodes, and 2 nodes could hold one of them"),
    ],
)
def test_what_can_never_be_says_why(strategy: str, bundles: list[BundleNeed], words: str) -> None:
    kind, text = why(strategy, bundles, [node("a", 0), node("b", 0)])
    assert kind is Infeasible
    assert text.startswith(words)


def test_what_must_wait_says_for_how_much() -> None:
    full = [node("a", 1), node("b", 1)]
    assert why("PACK", [need(2), need(1)], full) == (Busy, "it needs 3 CPU at once, and too little is free")
    assert why("STRICT_PACK", [need(1)] * 2, full)[1] == "it needs 2 CPU at once on one node, and too little is free"
    text = why("STRICT_SPREAD", [need(2)] * 2, full)[1]
    assert text == "it needs 4 CPU at once, each bundle on a node of its own, and too little is free"


# --------------------------------------------------------------------------------------------------------- properties

NODES = st.lists(
    st.builds(
        lambda cpus, free, gpus, zone: (cpus, min(cpus, free), gpus, zone),
        st.integers(0, 4), st.integers(0, 4), st.integers(0, 2), st.sampled_from(["eu", "us"]),
    ),
    min_size=1, max_size=4,
)  # fmt: skip
BUNDLES = st.lists(
    st.builds(
        lambda cpus, gpus, zone: need(cpus, gpus, **({"zone": zone} if zone else {})),
        st.integers(1, 4), st.integers(0, 1), st.sampled_from(["", "", "eu"]),
    ),
    min_size=1, max_size=4,
)  # fmt: skip


def is_right(strategy: str, bundles: list[BundleNeed], nodes: list[NodeView], places: dict[int, bytes]) -> bool:
    """Whether an assignment of all bundles keeps every rule and over-commits no node."""
    views = {view.node_id: view for view in nodes}
    used: dict[bytes, Amounts] = {}
    for index, where in places.items():
        view, bundle = views[where], bundles[index]
        if any(view.labels.get(key) != value for key, value in bundle.labels.items()):
            return False
        used[where] = add(used.get(where, {}), bundle.resources)
    if not all(fits(amounts, views[where].available) for where, amounts in used.items()):
        return False
    if strategy == "STRICT_PACK":
        return len(used) == 1
    return strategy != "STRICT_SPREAD" or len(used) == len(bundles)


def exact(strategy: str, bundles: list[BundleNeed], nodes: list[NodeView]) -> bool:
    return any(
        is_right(strategy, bundles, nodes, dict(enumerate(where)))
        for where in itertools.product([view.node_id for view in nodes], repeat=len(bundles))
    )


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(STRATEGIES), BUNDLES, NODES)
def test_an_assignment_is_right_and_is_found_whenever_there_is_one(
    strategy: str, bundles: list[BundleNeed], rows: list[tuple[int, int, int, str]]
) -> None:
    nodes = [
        node(str(number), free, cpus=cpus, gpus=gpus, labels={"zone": zone})
        for number, (cpus, free, gpus, zone) in enumerate(rows)
    ]
    plan = place_bundles(bundles, strategy, nodes)
    if isinstance(plan, Assigned):
        assert sorted(plan.nodes) == list(range(len(bundles)))
        assert is_right(strategy, bundles, nodes, plan.nodes)
    else:
        assert not exact(strategy, bundles, nodes)
        idle = [NodeView(view.node_id, view.total, view.total, view.labels) for view in nodes]
        assert isinstance(plan, Busy) == exact(strategy, bundles, idle)
        assert plan.reason.text


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(STRATEGIES), BUNDLES, NODES, st.data())
def test_what_is_kept_stays_and_the_rest_keeps_the_rules(
    strategy: str, bundles: list[BundleNeed], rows: list[tuple[int, int, int, str]], data: st.DataObject
) -> None:
    nodes = [
        node(str(number), cpus=cpus, gpus=gpus, labels={"zone": zone})
        for number, (cpus, _, gpus, zone) in enumerate(rows)
    ]
    first = place_bundles(bundles, strategy, nodes)
    if not isinstance(first, Assigned):
        return
    lost = data.draw(st.sampled_from(sorted(set(first.nodes.values()))))
    kept = {index: where for index, where in first.nodes.items() if where != lost}
    left = []
    for view in nodes:
        if view.node_id != lost:
            held: Amounts = {}
            for index, where in kept.items():
                if where == view.node_id:
                    held = add(held, bundles[index].resources)
            free = {name: amount - held.get(name, 0) for name, amount in view.total.items()}
            left.append(NodeView(view.node_id, view.total, free, view.labels))
    again = place_bundles(bundles, strategy, left, kept=kept)
    if isinstance(again, Assigned):
        assert set(again.nodes) == set(range(len(bundles))) - set(kept)
        idle = [NodeView(view.node_id, view.total, view.total, view.labels) for view in nodes if view.node_id != lost]
        assert is_right(strategy, bundles, idle, {**kept, **again.nodes})


def test_a_thousand_nodes_and_bundles_are_placed_in_no_time() -> None:
    nodes = [node(str(number), cpus=32) for number in range(1000)]
    for strategy in ("PACK", "SPREAD", "STRICT_SPREAD"):
        assert len(place(strategy, [need(1)] * 500, nodes)) == 500


# -------------------------------------------------------------------------------------------------------------- names


def test_names_come_apart_as_they_were_joined() -> None:
    assert names.join_name("CPU", GROUP) == f"CPU_group_{HEX}"
    assert names.parse_name(f"CPU_group_{HEX}") == names.BundleName("CPU", -1, HEX)
    assert names.parse_name(names.join_name("a_group_b", GROUP, 12)) == names.BundleName("a_group_b", 12, HEX)
    for plain in ("CPU", "my_group_x", f"_group_{HEX[:-1]}", ""):
        assert names.parse_name(plain) is None
    assert describe_amount(f"CPU_group_1_{HEX}", 2 * UNIT) == f"2 CPU of bundle 1 of placement group {HEX[:12]}"


def test_a_demand_fits_where_one_bundle_is_large_enough() -> None:
    total: Amounts = {"CPU": 8 * UNIT}
    for index, cpus in enumerate((1, 2)):
        total = add(total, names.shown_of(GROUP, index, to_amounts({"CPU": cpus})))

    def possible(cpus: float, index: int = -1) -> bool:
        strategy = Strategy("group", group=GROUP, bundle=index)
        demand = names.demand_on(GROUP, index, to_amounts({"CPU": cpus}))
        return can_ever_run(demand, strategy, NodeView(b"n", total, total))

    assert [possible(cpus) for cpus in (0, 1, 2, 3)] == [True, True, True, False]
    assert [possible(cpus, 0) for cpus in (0, 1, 2)] == [True, True, False]
    assert [possible(cpus, 2) for cpus in (0, 1)] == [False, False]
