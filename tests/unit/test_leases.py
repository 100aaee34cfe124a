from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle as HypothesisBundle
from hypothesis.stateful import RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from shoal.node import leases as module
from shoal.node.cluster_view import DEDUCT_FOR_S
from shoal.node.lease_decisions import Decision, Grant, Reclaim, Redirect, Wait
from shoal.node.leases import (
    RESERVE_AFTER_S,
    RESERVE_FOR_S,
    REVISIT_S,
    LeaseScheduler,
)
from shoal.node.messages import LeaseSpec
from shoal.node.resource_books import ResourceBooks
from shoal.scheduling.resources import MIN_LIGHT_SLOTS, fits, to_amounts
from shoal.scheduling.views import UNIT, NodeView, Strategy, WaitReason

JOB = b"job0"


def spec(
    depth: int = 0,
    strategy: Strategy = Strategy(),
    name: str = "f",
    job: bytes = JOB,
    priority: int = 0,
    **needs: float,
) -> LeaseSpec:
    return LeaseSpec(job, to_amounts(needs or {"CPU": 1}), name, depth, strategy, priority=priority)


def view(name: str, total: dict[str, float], free: dict[str, float] | None = None, **more: object) -> NodeView:
    available = to_amounts(total) | {key: round(value * UNIT) for key, value in (free or {}).items()}
    return NodeView(name.encode(), to_amounts(total), available, **more)  # type: ignore[arg-type]


class Node:
    """A scheduler with a clock, and its answers sorted by kind; every step checks the books."""

    def __init__(self, **total: float) -> None:
        self.scheduler = LeaseScheduler(b"here", to_amounts(total), random.Random(0))
        self.now = 1000.0
        self.nodes: tuple[NodeView, ...] = ()
        self.limit: Callable[[LeaseSpec], bool] | None = None
        self.grants: list[Grant] = []
        self.redirects: dict[str, int] = {}
        self.waits: list[tuple[bytes, int, str]] = []
        self.reclaims: list[bytes] = []

    def want(self, owner: bytes, wanted: int, demand: LeaseSpec | None = None, class_id: int = 1, **more: bool) -> None:
        self.scheduler.set_demand(owner, class_id, wanted, demand or spec(), self.now, **more)

    def decide(self, after_s: float = 0.0) -> list[Decision]:
        self.now += after_s
        decisions = self.scheduler.decide(self.nodes, self.now, self.limit)
        self.scheduler.check_invariants()
        self.grants = [d for d in decisions if isinstance(d, Grant)]
        self.redirects = {}
        for d in decisions:
            if isinstance(d, Redirect):
                assert d.count > 0
                self.redirects[d.node_id.decode()] = self.redirects.get(d.node_id.decode(), 0) + d.count
        self.waits = [(d.owner, d.class_id, d.reason.text) for d in decisions if isinstance(d, Wait)]
        self.reclaims = [d.owner for d in decisions if isinstance(d, Reclaim)]
        return decisions

    def served(self, after_s: float = 0.0) -> list[bytes]:
        self.decide(after_s)
        return [grant.owner for grant in self.grants]

    def release_one(self, owner: bytes) -> None:
        self.scheduler.release(next(n for n, lease in self.scheduler._leases.items() if lease.owner == owner))


# --------------------------------------------------------------------------------------------------------- levels


def test_a_level_is_granted_as_far_as_it_fits_and_says_why_the_rest_waits() -> None:
    node = Node(CPU=2)
    node.want(b"a", 5)
    node.decide()
    assert [grant.lease_id for grant in node.grants] == [1, 2]
    assert node.waits == [(b"a", 1, "all 2 CPU are busy on the only node that could run it")]
    assert node.scheduler.unmet(b"a", 1) == 3
    assert node.decide() == []


def test_saying_a_level_again_changes_nothing_and_granted_leases_count() -> None:
    node = Node(CPU=4)
    node.want(b"a", 2)
    node.decide()
    node.want(b"a", 2)
    assert node.served() == []
    node.want(b"a", 3)
    assert node.served() == [b"a"]
    node.want(b"a", 1)
    assert node.served() == []
    assert node.scheduler.unmet(b"a", 1) == 0


def test_zero_withdraws_and_leases_stay_until_released() -> None:
    node = Node(CPU=1)
    node.want(b"a", 3)
    node.decide()
    node.want(b"a", 0)
    node.scheduler.check_invariants()
    assert not node.scheduler.is_waiting
    assert node.scheduler.available == {"CPU": 0}
    node.scheduler.release(1)
    node.scheduler.check_invariants()
    assert node.scheduler.available == {"CPU": UNIT}
    assert node.served() == []


def test_a_released_lease_is_replaced_while_the_level_stands() -> None:
    node = Node(CPU=1)
    node.want(b"a", 1)
    node.decide()
    node.scheduler.release(1)
    node.decide()
    assert [grant.lease_id for grant in node.grants] == [2]


def test_the_spec_is_needed_once() -> None:
    node = Node(CPU=1)
    with pytest.raises(KeyError, match="class 7 of owner 61 has no spec"):
        node.scheduler.set_demand(b"a", 7, 1, None, 0.0)
    node.scheduler.set_demand(b"a", 7, 0, None, 0.0)
    for _ in range(2):
        node.scheduler.set_demand(b"a", 7, 1, spec() if not node.grants else None, 0.0)
        node.decide()
        assert [grant.spec for grant in node.grants] == [spec()]
        node.scheduler.set_demand(b"a", 7, 0, None, 0.0)
        node.release_one(b"a")
    node.scheduler.drop_owner(b"a")
    with pytest.raises(KeyError):
        node.scheduler.set_demand(b"a", 7, 1, None, 0.0)


def test_remembered_specs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REMEMBERED_SPECS", 2)
    node = Node(CPU=1)
    for class_id in range(3):
        node.want(b"a", 1, class_id=class_id)
        node.want(b"a", 0, class_id=class_id)
    node.scheduler.set_demand(b"a", 2, 1, None, 0.0)
    with pytest.raises(KeyError):
        node.scheduler.set_demand(b"a", 0, 1, None, 0.0)


def test_a_class_may_change_its_spec() -> None:
    node = Node(CPU=2)
    node.want(b"a", 1, spec(GPU=1))
    node.decide()
    assert node.waits[0][2] == "no node has 1 GPU (none has any)"
    node.want(b"a", 1, spec(CPU=2))
    assert node.served() == [b"a"]


def test_a_class_that_only_gets_another_name_keeps_its_place_in_the_line() -> None:
    node = Node(CPU=1)
    node.want(b"a", 1, spec(name="first"))
    node.decide()
    node.want(b"b", 1, spec(name="f"))
    node.want(b"c", 1, spec(name="g"))
    node.decide()
    node.want(b"b", 1, spec(name="renamed"))
    assert {report.name for report in node.scheduler.demand_reports(node.now)} == {"renamed", "g"}
    node.release_one(b"a")
    node.want(b"a", 0)
    assert node.served() == [b"b"]
    node.scheduler.check_invariants()


def test_mistakes() -> None:
    node = Node(CPU=1)
    with pytest.raises(ValueError, match="-1"):
        node.want(b"a", -1)
    with pytest.raises(KeyError):
        node.scheduler.release(1)
    with pytest.raises(KeyError):
        node.scheduler.set_blocked(1, True)
    with pytest.raises(KeyError):
        node.scheduler.release_actor(b"x")
    assert node.scheduler.drop_owner(b"nobody") == []
    assert node.scheduler.unmet(b"nobody", 1) == 0


# ----------------------------------------------------------------------------------------------------------- order


def test_deeper_first() -> None:
    node = Node(CPU=1)
    node.want(b"root", 1, spec(depth=0))
    node.want(b"leaf", 1, spec(depth=2))
    node.want(b"mid", 1, spec(depth=1))
    order = []
    for _ in range(3):
        (owner,) = node.served()
        order.append(owner)
        node.want(owner, 0)
        node.release_one(owner)
    assert order == [b"leaf", b"mid", b"root"]


def test_owners_take_turns() -> None:
    node = Node(CPU=6)
    node.want(b"a", 100)
    node.want(b"b", 100)
    node.want(b"c", 1)
    assert node.served() == [b"a", b"b", b"c", b"a", b"b", b"a"]
    node.release_one(b"a")
    node.release_one(b"a")
    assert node.served() == [b"b", b"a"], "turns go on where they stopped"


def test_classes_of_one_owner_take_turns() -> None:
    node = Node(CPU=4)
    node.want(b"a", 100, class_id=1)
    node.want(b"a", 100, class_id=2)
    node.decide()
    assert [grant.class_id for grant in node.grants] == [1, 2, 1, 2]


def test_what_does_not_fit_does_not_hold_up_what_does() -> None:
    node = Node(CPU=2)
    node.want(b"big", 1, spec(CPU=3))
    node.want(b"small", 1)
    assert node.served() == [b"small"]


def test_a_worker_limit_is_asked_once_per_grant_and_asked_again_later() -> None:
    node = Node(CPU=8)
    left = 2

    def limit(_: LeaseSpec) -> bool:
        nonlocal left
        left -= 1
        return left < 0

    node.limit = limit
    node.want(b"a", 5)
    assert node.served() == [b"a", b"a"]
    assert node.waits == [(b"a", 1, "the node has as many workers as it may have")]
    left = 1
    assert node.served() == [b"a"]
    assert node.waits == []


# ----------------------------------------------------------------------------------------------- priorities and jobs


def test_higher_priority_first_whoever_it_is_and_however_deep() -> None:
    node = Node(CPU=1)
    node.want(b"low", 1, spec(priority=-1, depth=9))
    node.want(b"deep", 1, spec(depth=3))
    node.want(b"high", 1, spec(priority=5))
    node.want(b"other", 1, spec(priority=5, job=b"job1"))
    order = []
    for _ in range(4):
        (owner,) = node.served()
        order.append(owner)
        node.want(owner, 0)
        node.release_one(owner)
    assert order == [b"high", b"other", b"deep", b"low"]


def test_what_waits_with_less_priority_takes_no_leases_from_more() -> None:
    node = Node(CPU=2)
    node.want(b"a", 9, spec(priority=1))
    node.decide()
    node.want(b"a", 2, spec(priority=1))
    node.want(b"b", 1)
    node.decide()
    assert node.reclaims == []
    node.want(b"c", 1, spec(priority=2))
    (reclaim,) = [decision for decision in node.decide() if isinstance(decision, Reclaim)]
    assert reclaim == Reclaim(b"a", 2)
    node.release_one(b"a")
    assert node.served() == [b"c"]


def test_jobs_take_turns_however_many_owners_and_classes_one_has() -> None:
    node = Node(CPU=4)
    for number in range(20):
        node.want(b"flood%d" % number, 100, class_id=number % 3)
    node.want(b"few", 2, spec(job=b"job1"))
    jobs = Counter(owner == b"few" for owner in node.served())
    assert jobs == {True: 2, False: 2}


def test_a_job_that_holds_little_goes_before_one_that_holds_much() -> None:
    node = Node(CPU=4)
    node.want(b"flood", 100)
    assert node.served() == [b"flood"] * 4
    node.want(b"few", 100, spec(job=b"job1"))
    assert node.served() == []
    assert node.reclaims == [b"flood"]
    for _ in range(2):
        node.release_one(b"flood")
        assert node.served() == [b"few"]
    node.release_one(b"few")
    assert node.served() == [b"few"]
    node.release_one(b"flood")
    assert node.served() == [b"flood"]


def test_a_blocked_lease_is_no_use_of_its_job() -> None:
    node = Node(CPU=2)
    node.want(b"a", 9)
    node.decide()
    node.scheduler.set_blocked(1, True)
    node.scheduler.set_blocked(2, True)
    node.want(b"b", 9, spec(job=b"job1"))
    assert sorted(node.served()) == [b"a", b"b"]


def test_nested_work_of_one_job_does_not_keep_another_from_its_turn() -> None:
    node = Node(CPU=2)
    node.want(b"a", 100, spec(depth=5))
    node.want(b"b", 100, spec(job=b"job1"))
    assert sorted(node.served()) == [b"a", b"b"]


class Jobs(RuleBasedStateMachine):
    """Whatever other jobs do, one that always wants a little of the same gets its turn."""

    @initialize(cpus=st.integers(1, 4))
    def start(self, cpus: int) -> None:
        self.node = Node(CPU=cpus)
        self.cpus = cpus
        self.held: list[Grant] = []
        self.waited = 0  # leases that others got since the patient job had one
        self.node.want(b"patient", 1, spec(job=b"job1"))
        self.look()

    def look(self) -> None:
        self.node.decide()
        self.held += self.node.grants
        for grant in self.node.grants:
            self.waited = 0 if grant.owner == b"patient" else self.waited + 1
        if any(grant.owner == b"patient" for grant in self.held):
            self.waited = 0
        assert self.waited <= 1, "it is the next, unless nobody holds anything and it is another's turn"

    @rule(owner=st.sampled_from([b"o1", b"o2", b"o3"]), class_id=st.integers(0, 2), wanted=st.integers(0, 9),
          depth=st.integers(0, 3), priority=st.integers(-1, 0))  # fmt: skip
    def flood(self, owner: bytes, class_id: int, wanted: int, depth: int, priority: int) -> None:
        self.node.want(owner, wanted, spec(depth=depth, priority=priority), class_id=class_id)
        self.look()

    @rule(index=st.integers(0, 99))
    def end(self, index: int) -> None:
        if self.held:
            grant = self.held.pop(index % len(self.held))
            self.node.scheduler.release(grant.lease_id)
            self.look()


TestJobs = Jobs.TestCase
TestJobs.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------------- the large among small


def hungry_small_ones(node: Node, big: float = 3, **more: float) -> None:
    """4 CPUs in the hands of `small`, which always wants more; `big` waits for several at once."""
    node.want(b"small", 100)
    node.decide()
    node.want(b"big", 1, spec(CPU=big, **more))
    node.release_one(b"small")
    assert node.served() == [b"small"], "it stood before `big` in the line; now `big` is the first"


def test_a_large_demand_is_not_starved_by_small_ones() -> None:
    node = Node(CPU=4)
    hungry_small_ones(node)
    node.release_one(b"small")
    assert node.served() == [b"small"], "not yet"
    node.decide(after_s=RESERVE_AFTER_S)
    node.release_one(b"small")
    assert node.served() == []
    assert node.waits[0] == (b"small", 1, "what is free is kept for older work that needs more at once")
    node.release_one(b"small")
    assert node.served() == []
    node.release_one(b"small")
    assert node.served() == [b"big"]
    node.release_one(b"small")
    assert node.served() == [b"small"], "the hold is over"


def test_a_hold_in_vain_ends_and_the_next_one_comes_later() -> None:
    node = Node(CPU=4)
    hungry_small_ones(node)
    node.now += RESERVE_AFTER_S
    node.release_one(b"small")
    assert node.served() == []
    assert node.served(after_s=RESERVE_FOR_S - 0.1) == []
    assert node.served(after_s=0.2) == [b"small"]
    starts: list[float] = []
    for _ in range(400):
        node.release_one(b"small")
        held = not node.served(after_s=1.0)
        if held:
            starts.append(node.now)
            node.served(after_s=RESERVE_FOR_S)
    gaps = [late - early for early, late in pairwise(starts)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * gaps[0] > 2 * RESERVE_FOR_S


def test_a_hold_does_not_touch_deeper_work_or_other_resources() -> None:
    node = Node(CPU=4, x=1)
    hungry_small_ones(node)
    node.now += RESERVE_AFTER_S
    node.release_one(b"small")
    assert node.served() == []
    node.want(b"other", 1, spec(x=1))
    assert node.served() == [b"other"]
    node.want(b"deep", 1, spec(depth=1))
    assert node.served() == [b"deep"]


def test_nothing_is_held_for_what_an_actor_keeps_from_ever_fitting() -> None:
    node = Node(CPU=4)
    assert node.scheduler.acquire_actor(b"x", {"CPU": 2 * UNIT}, {"CPU": 2 * UNIT}) == {}
    hungry_small_ones(node)
    node.release_one(b"small")
    assert node.served(after_s=100.0) == [b"small"]


def test_a_hold_ends_with_the_demand() -> None:
    node = Node(CPU=4)
    hungry_small_ones(node)
    node.now += RESERVE_AFTER_S
    node.release_one(b"small")
    assert node.served() == []
    node.scheduler.drop_owner(b"big")
    assert node.served() == [b"small"]


# ------------------------------------------------------------------------------------------------ lending, devices


def test_a_blocked_lease_lends_its_cpus_and_takes_them_back_at_once() -> None:
    node = Node(CPU=1, GPU=1, memory=8)
    node.want(b"a", 1, spec(CPU=1, GPU=1, memory=8))
    node.decide()
    node.scheduler.set_blocked(1, True)
    node.scheduler.set_blocked(1, True)
    assert node.scheduler.available == {"CPU": UNIT, "GPU": 0, "memory": 0}
    node.want(b"b", 3)
    assert node.served() == [b"b"]
    node.scheduler.set_blocked(1, False)
    assert node.scheduler.available["CPU"] == -UNIT
    node.scheduler.release(2)
    assert node.served() == []
    node.scheduler.set_blocked(1, True)
    assert node.served() == [b"b"]
    node.scheduler.release(1)
    node.scheduler.check_invariants()
    assert node.scheduler.available["CPU"] == 0, "what was lent is not given back twice"


def test_zero_cpus_fit_even_when_oversubscribed() -> None:
    node = Node(CPU=1)
    node.want(b"a", 1)
    node.decide()
    node.scheduler.set_blocked(1, True)
    node.want(b"b", 1)
    node.decide()
    node.scheduler.set_blocked(1, False)
    node.want(b"c", 2, LeaseSpec(JOB, {"CPU": 0}))
    assert node.served() == [b"c", b"c"]


NOTHING = LeaseSpec(JOB, {"CPU": 0})


def test_light_work_is_bounded_by_slots_and_grows_when_it_blocks_or_runs_long() -> None:
    node = Node(CPU=1)
    node.want(b"a", 1500, NOTHING)
    assert len(node.served()) == MIN_LIGHT_SLOTS
    assert node.waits[0][2].startswith("the node runs enough tasks that need no CPU")
    node.scheduler.set_blocked(1, True)
    assert len(node.served()) == 1
    node.scheduler.set_blocked(1, False)
    node.release_one(b"a")
    assert node.served() == [], "what was lent is taken back"
    sizes = []
    for _ in range(4):
        for number in list(node.scheduler._leases):
            node.scheduler.set_slow(number)
        node.decide()
        sizes.append(len(node.scheduler._leases))
    assert sizes == sorted(sizes)
    assert sizes[-1] > 5 * sizes[0], "it grows as fast as processes can be made, where nothing is short"


def test_light_work_of_one_owner_makes_room_for_that_of_another() -> None:
    node = Node(CPU=1, memory=8)
    node.want(b"a", 4, NOTHING)
    node.decide()
    node.want(b"b", 1, spec(depth=1, memory=1))
    node.decide()
    assert node.reclaims == [b"a"]
    node.want(b"a", 3)
    node.release_one(b"a")
    assert node.served() == [b"b"]


def test_light_work_overflows_to_other_nodes_as_far_as_they_have_slots() -> None:
    node = Node(CPU=1)
    node.nodes = (view("b", {"CPU": 1}), view("c", {"CPU": 16}))
    node.want(b"a", 100, NOTHING)
    assert len(node.served()) == MIN_LIGHT_SLOTS
    assert node.redirects == {"b": MIN_LIGHT_SLOTS, "c": 32}


def nested_pairs(cpus: int) -> tuple[int, int]:
    """1500 parents without CPUs that each wait for a child without: (most leases at a time, children that ran)."""
    node = Node(CPU=cpus)
    left, ran, most = 1500, 0, 0
    node.want(b"driver", left, NOTHING)
    parents: dict[bytes, int] = {}
    while left:
        node.decide()
        most = max(most, len(node.scheduler._leases))
        assert node.grants, "it stands still"
        for grant in node.grants:
            if grant.owner == b"driver":
                owner = b"worker%d" % grant.lease_id
                parents[owner] = grant.lease_id
                node.scheduler.set_demand(owner, 1, 1, LeaseSpec(JOB, {}, depth=1), node.now)
                node.scheduler.set_blocked(grant.lease_id, True)
            else:
                ran, left = ran + 1, left - 1
                node.want(grant.owner, 0)
                node.scheduler.release(grant.lease_id)
                node.scheduler.release(parents.pop(grant.owner))
                node.want(b"driver", left, NOTHING)
    return most, ran


def test_pairs_without_cpus_need_few_workers() -> None:
    most, ran = nested_pairs(2)
    assert ran == 1500
    assert most <= 3 * MIN_LIGHT_SLOTS


def test_devices_are_told_and_fractions_share_one() -> None:
    node = Node(CPU=8, GPU=2)
    node.want(b"a", 3, spec(GPU=0.5))
    node.want(b"b", 1, spec(GPU=1))
    node.decide()
    assert [grant.devices for grant in node.grants] == [{"GPU": [0]}, {"GPU": [1]}, {"GPU": [0]}]
    node.release_one(b"b")
    node.decide()
    assert [grant.devices for grant in node.grants] == [{"GPU": [1]}]


def test_enough_in_all_but_not_on_one_device_has_a_reason_of_its_own() -> None:
    node = Node(GPU=2)
    node.want(b"a", 2, spec(GPU=0.6))
    node.decide()
    node.want(b"b", 1, spec(GPU=0.7))
    node.decide()
    assert node.waits == [(b"b", 1, "enough is free in all, but not on one device")]


def test_actors_hold_through_the_same_books() -> None:
    node = Node(CPU=1, GPU=1)
    cpu, gpu = {"CPU": UNIT}, {"GPU": UNIT}
    assert node.scheduler.acquire_actor(b"x", cpu, {}) == {}, "placed by its CPU, holds none"
    assert node.scheduler.acquire_actor(b"y", cpu | gpu, cpu | gpu) == {"GPU": [0]}
    with pytest.raises(ValueError, match="already"):
        node.scheduler.acquire_actor(b"y", {}, {})
    assert node.scheduler.acquire_actor(b"z", cpu, {}) is None
    node.want(b"a", 1)
    assert node.served() == []
    node.scheduler.set_actor_blocked(b"y", True)
    assert node.served() == [b"a"]
    node.scheduler.release_actor(b"y")
    node.scheduler.release(1)
    node.scheduler.check_invariants()
    assert node.scheduler.available == node.scheduler.total


def test_an_actor_can_wait_in_line_as_its_own_owner() -> None:
    node = Node(CPU=1)
    node.want(b"a", 9)
    node.decide()
    node.want(b"actor", 1, redirected=True)
    node.decide()
    node.release_one(b"a")
    node.decide()
    if node.grants[0].owner == b"a":
        node.release_one(b"a")
        node.decide()
    (grant,) = node.grants
    assert grant.owner == b"actor"
    node.scheduler.drop_owner(b"actor")
    node.scheduler.release(grant.lease_id)
    assert node.scheduler.acquire_actor(b"actor", {"CPU": UNIT}, {}) == {}


# ------------------------------------------------------------------------------------------------- going and ending


def test_drop_owner_forgets_demands_and_names_leases() -> None:
    node = Node(CPU=2)
    node.want(b"a", 5)
    node.want(b"a", 5, spec(GPU=1), class_id=2)
    node.decide()
    assert node.scheduler.drop_owner(b"a") == [1, 2]
    node.scheduler.check_invariants()
    assert not node.scheduler.is_waiting
    node.want(b"b", 1)
    assert node.served() == []
    node.scheduler.release(1)
    assert node.served() == [b"b"]
    assert node.scheduler.drop_owner(b"a") == []


def test_drop_job() -> None:
    node = Node(CPU=2)
    node.want(b"a", 2, spec(job=b"one1"), class_id=1)
    node.want(b"a", 2, spec(job=b"two2"), class_id=2)
    node.decide()
    assert node.scheduler.drop_job(b"one1") == [1]
    assert node.scheduler.unmet(b"a", 1) == 0
    assert node.scheduler.unmet(b"a", 2) == 1
    node.scheduler.release(1)
    node.decide()
    assert [grant.class_id for grant in node.grants] == [2]


# ------------------------------------------------------------------------------------------------------ other nodes


def test_one_node_never_redirects() -> None:
    node = Node(CPU=1)
    node.nodes = (view("here", {"CPU": 64}),)
    node.want(b"a", 5)
    assert node.served() == [b"a"], "its own row in the view is only an echo"
    assert node.redirects == {}


def test_overflow_goes_where_it_fits_now_and_no_further() -> None:
    node = Node(CPU=2)
    node.nodes = (view("b", {"CPU": 4}, {"CPU": 3}), view("c", {"CPU": 4}, {"CPU": 0}), view("d", {"CPU": 1}))
    node.want(b"a", 10)
    assert len(node.served()) == 2
    assert node.redirects == {"b": 3, "d": 1}
    assert node.waits == [(b"a", 1, "all 11 CPU are busy on the 4 nodes that could run it")]
    assert node.scheduler.unmet(b"a", 1) == 4
    node.want(b"e", 1)
    node.decide()
    assert node.redirects == {}, "what was sent is deducted until the view changes"
    node.nodes = (view("b", {"CPU": 4}, {"CPU": 1}), *node.nodes[1:])
    node.decide()
    assert node.redirects == {"b": 1}


def test_little_overflow_is_spread_over_the_nodes_with_room() -> None:
    node = Node(CPU=1)
    node.nodes = tuple(view(name, {"CPU": 8}) for name in "bcd")
    node.want(b"a", 7)
    node.decide()
    assert node.redirects == {"b": 2, "c": 2, "d": 2}


def test_a_deduction_ends_when_nothing_came_of_it() -> None:
    node = Node(CPU=1)
    node.nodes = (view("b", {"CPU": 1}),)
    node.want(b"a", 3)
    node.decide()
    assert node.redirects == {"b": 1}
    node.decide(after_s=DEDUCT_FOR_S / 2)
    assert node.redirects == {}
    node.decide(after_s=DEDUCT_FOR_S)
    assert node.redirects == {"b": 1}


def test_who_was_sent_here_stays_here() -> None:
    node = Node(CPU=1)
    node.nodes = (view("b", {"CPU": 8}),)
    node.want(b"a", 3, redirected=True)
    assert node.served() == [b"a"]
    assert node.redirects == {}
    node.want(b"a", 1, spec(GPU=1), class_id=2, redirected=True)
    node.decide()
    assert node.redirects == {}
    assert [wait[1] for wait in node.waits] == [2]


def test_who_was_sent_here_in_vain_is_sent_on_after_a_while() -> None:
    node = Node(CPU=1)
    node.nodes = (view("b", {"CPU": 8}, {"CPU": 0}), view("c", {"CPU": 2}))
    node.want(b"a", 4, redirected=True)
    assert node.served() == [b"a"]
    node.decide(after_s=REVISIT_S / 2)
    assert node.redirects == {}
    node.decide(after_s=REVISIT_S)
    assert node.redirects == {"c": 2}
    here = spec(strategy=Strategy("node", b"here"))
    node.want(b"actor", 1, here, redirected=True)
    node.decide(after_s=REVISIT_S)
    node.nodes = (view("b", {"CPU": 8}),)
    node.decide(after_s=REVISIT_S)
    assert node.redirects == {"b": 1}, "of a; the actor stays"
    assert node.scheduler.unmet(b"actor", 1) == 1


def test_what_can_never_run_here_leaves_at_once() -> None:
    node = Node(CPU=4)
    gpu = {"CPU": 4, "GPU": 2}
    node.nodes = (view("b", gpu, {"GPU": 0}), view("c", gpu), view("d", {"CPU": 4}))
    node.want(b"a", 1, spec(GPU=1))
    node.decide()
    assert node.redirects == {"c": 1}, "to where it fits now"
    node.want(b"a", 5, spec(GPU=1), class_id=2)
    node.decide()
    assert node.redirects["c"] >= 1
    assert sum(node.redirects.values()) == 5, "the rest to where it will"
    assert "d" not in node.redirects
    assert not node.scheduler.is_waiting


def test_infeasible_waits_with_its_reason_until_a_node_comes() -> None:
    node = Node(CPU=4)
    node.nodes = (view("b", {"CPU": 4, "GPU": 1}),)
    node.want(b"a", 2, spec(GPU=4))
    decisions = node.decide()
    assert decisions == [Wait(b"a", 1, WaitReason("infeasible", "no node has 4 GPU (the largest has 1)"))]
    node.nodes = (*node.nodes, view("c", {"GPU": 2}))
    node.decide()
    assert [wait[2] for wait in node.waits] == ["no node has 4 GPU (the largest has 2)"]
    node.nodes = (*node.nodes, view("d", {"GPU": 4}))
    node.decide()
    assert node.redirects == {"d": 2}
    assert node.waits == []


def test_a_node_that_is_gone_is_not_used() -> None:
    node = Node(CPU=1)
    node.nodes = (view("b", {"CPU": 1, "x": 1}),)
    node.want(b"a", 1, spec(x=1))
    node.decide()
    assert node.redirects == {"b": 1}
    node.nodes = ()
    node.want(b"a", 1, spec(x=1))
    node.decide()
    assert [wait[2] for wait in node.waits] == ["no node has 1 x (none has any)"]


def test_spread_shares_out_even_while_there_is_room_here() -> None:
    node = Node(CPU=8)
    node.nodes = (view("b", {"CPU": 8}), view("c", {"CPU": 8}), view("d", {"CPU": 8}, {"CPU": 1}))
    node.want(b"a", 10, spec(strategy=Strategy("spread")))
    served = node.served()
    assert len(served) + sum(node.redirects.values()) == 10
    assert node.redirects["d"] == 1
    assert all(3 <= count <= 4 for count in (len(served), node.redirects["b"], node.redirects["c"]))


def test_spread_one_at_a_time_goes_round() -> None:
    node = Node(CPU=4)
    node.nodes = (view("b", {"CPU": 4}), view("c", {"CPU": 4}))
    went: Counter[str] = Counter()
    for number in range(9):
        node.want(bytes([number]), 1, spec(strategy=Strategy("spread")))
        went["here"] += len(node.served())
        went.update(node.redirects)
    assert went == {"here": 3, "b": 3, "c": 3}


def test_affinity() -> None:
    node = Node(CPU=4)
    node.nodes = (view("b", {"CPU": 4}, {"CPU": 0}), view("c", {"CPU": 4}))
    node.want(b"a", 2, spec(strategy=Strategy("node", b"b")))
    assert node.served() == []
    assert node.redirects == {"b": 2}, "it waits there"
    node.want(b"a", 6, spec(strategy=Strategy("node", b"here")), class_id=2)
    assert len(node.served()) == 4
    assert node.redirects == {}, "it waits here"
    node.want(b"a", 1, spec(strategy=Strategy("node", b"zz")), class_id=3)
    node.decide()
    assert node.waits == [(b"a", 3, "node 7a7a, which it must run on, is not in the cluster")]
    node.want(b"a", 1, spec(strategy=Strategy("node", b"zz", True)), class_id=4)
    node.decide()
    assert node.redirects == {"c": 1}


def test_hard_affinity_to_a_node_that_is_not_there_is_given_up_a_little_later() -> None:
    node = Node(CPU=4)
    gone = spec(strategy=Strategy("node", b"zz"))
    node.want(b"a", 3, gone)
    (wait,) = node.decide()
    assert isinstance(wait, Wait)
    assert wait.reason.code == "infeasible", "the view may be behind"
    assert node.decide(after_s=REVISIT_S / 2) == []
    (wait,) = node.decide(after_s=REVISIT_S)
    assert isinstance(wait, Wait)
    assert (wait.reason.code, wait.granted) == ("unschedulable", 0)
    node.want(b"a", 0)
    node.want(b"a", 1, gone)
    assert len(node.decide()) == 1
    node.nodes = (view("zz", {"CPU": 1}),)
    node.decide(after_s=REVISIT_S)
    assert node.redirects == {"zz": 1}


def test_affinity_that_shall_not_wait_gets_what_is_free_and_gives_up_the_rest() -> None:
    node = Node(CPU=2)
    node.nodes = (view("b", {"CPU": 4}, {"CPU": 1}),)
    node.want(b"a", 3, spec(strategy=Strategy("node", b"here", when_busy="fail")))
    waits = [decision for decision in node.decide() if isinstance(decision, Wait)]
    assert [(wait.reason.code, wait.granted) for wait in waits] == [("unschedulable", 2)]
    node.want(b"b", 3, spec(strategy=Strategy("node", b"b", when_busy="fail")))
    waits = [decision for decision in node.decide() if isinstance(decision, Wait)]
    assert node.redirects == {"b": 1}
    assert [(wait.reason.code, wait.granted) for wait in waits] == [("unschedulable", 0)]


def test_affinity_that_may_spill_prefers_its_node() -> None:
    node = Node(CPU=2)
    node.nodes = (view("b", {"CPU": 1}), view("c", {"CPU": 1}))
    node.want(b"a", 4, spec(strategy=Strategy("node", b"b", True, when_busy="spill")))
    assert len(node.served()) == 2
    assert node.redirects == {"b": 1, "c": 1}
    node.want(b"a", 1)
    node.release_one(b"a")
    node.want(b"b", 2, spec(strategy=Strategy("node", b"here", True, when_busy="spill")))
    node.nodes = (view("b", {"CPU": 1}), view("c", {"CPU": 2}, {"CPU": 0}))
    assert len(node.served()) == 1
    assert node.redirects == {}, "the view of b has not changed"


def test_fallback_labels_are_for_where_the_first_ones_have_no_room() -> None:
    node = Node(CPU=2)
    node.nodes = (
        view("here", {}, labels={"zone": "eu"}),
        view("b", {"CPU": 1}, labels={"zone": "us"}),
        view("c", {"CPU": 2}, labels={"zone": "asia"}),
        view("d", {"CPU": 9}),
    )
    wants = Strategy(labels={"zone": "us"}, fallbacks=[{"zone": "eu"}, {"zone": "asia"}])
    node.want(b"a", 8, spec(strategy=wants))
    assert len(node.served()) == 2
    assert node.redirects == {"b": 1, "c": 2}
    assert node.scheduler.unmet(b"a", 1) == 3
    assert "on the 3 nodes that could run it" in node.waits[0][2]


def test_labels() -> None:
    node = Node(CPU=4)
    node.nodes = (view("here", {}, labels={"zone": "eu"}), view("b", {"CPU": 4}, labels={"zone": "us"}))
    node.want(b"a", 1, spec(strategy=Strategy(labels={"zone": "us"})))
    assert node.served() == []
    assert node.redirects == {"b": 1}
    node.want(b"a", 5, spec(strategy=Strategy(labels={"zone": "eu"})), class_id=2)
    assert len(node.served()) == 4
    assert node.redirects == {}


def test_a_draining_node_grants_nothing_and_takes_no_actors() -> None:
    node = Node(CPU=4)
    node.nodes = (view("here", {}, draining=True), view("b", {"CPU": 1}))
    node.want(b"a", 3)
    assert node.served() == []
    assert node.redirects == {"b": 3}
    assert node.scheduler.acquire_actor(b"x", {"CPU": UNIT}, {}) is None
    node.nodes = (view("here", {}),)
    node.want(b"b", 1)
    assert node.served() == [b"b"]


# ------------------------------------------------------------------------------------------------- reasons, reclaim


def test_a_reason_is_told_when_it_changes_and_only_then() -> None:
    node = Node(CPU=2, GPU=1)
    node.want(b"gpu", 2, spec(CPU=1, GPU=1))
    node.want(b"cpu", 1)
    node.decide()
    assert node.waits == [(b"gpu", 1, "all 2 CPU are busy on the only node that could run it")]
    node.want(b"gpu", 3, spec(CPU=1, GPU=1))
    assert node.decide() == []
    node.want(b"cpu", 0)
    node.release_one(b"cpu")
    node.decide()
    assert node.waits == [(b"gpu", 1, "all 1 GPU are busy on the only node that could run it")]


def test_owners_of_leases_are_told_once_that_others_starve() -> None:
    node = Node(CPU=2, x=1)
    node.want(b"a", 9)
    node.want(b"x", 1, spec(x=1))
    node.decide()
    assert node.reclaims == [], "its own leases would not help `a`"
    node.want(b"b", 1)
    node.decide()
    assert node.reclaims == [b"a"], "x holds nothing that anybody lacks"
    node.want(b"c", 1)
    assert node.decide()[1:] == []
    node.release_one(b"a")
    assert node.served() == [b"a"], "it stood first in the line"
    assert node.reclaims == [b"a"], "a new lease that may be idle soon"
    node.release_one(b"a")
    assert node.served() == [b"b"]
    assert node.reclaims == [b"b"], "a new holder, and `a` and `c` starve on"
    for owner in (b"a", b"b", b"c"):
        node.want(owner, 0)
    assert node.decide() == []
    node.want(b"d", 1)
    node.decide()
    assert node.reclaims == [b"a", b"b"], "a new starvation"


def test_an_owner_is_told_when_its_own_other_class_starves() -> None:
    node = Node(CPU=1)
    node.want(b"a", 1)
    node.decide()
    node.want(b"a", 1, class_id=2)
    node.decide()
    assert node.reclaims == [b"a"]


def test_demand_reports_sum_what_a_person_would_not_tell_apart() -> None:
    node = Node(CPU=1)
    node.want(b"a", 4)
    node.decide()
    node.now += 10
    node.want(b"b", 5)
    node.want(b"c", 2, spec(name="g", GPU=1))
    node.decide()
    first, second = node.scheduler.demand_reports(node.now + 5)
    assert (first.name, first.count, first.since_unix_s, first.resources) == ("f", 8, 1000.0, {"CPU": UNIT})
    node.scheduler.set_demand(b"c", 1, 2, None, node.now, calls=1000)
    assert node.scheduler.demand_reports(node.now)[1].count == 1000, "calls are what people count"
    assert (second.name, second.count, second.reason.code, second.job_id) == ("g", 2, "infeasible", JOB)


# ------------------------------------------------------------------------------------------------------- recursion


class Recursion:
    """fib(n): a task per call, which submits two calls and blocks until both returned; one worker per task.

    Each worker is an owner; leases are returned as soon as a call is over. `rng` picks which running call goes on.
    """

    def __init__(self, cpus: int, seed: int) -> None:
        self.node = Node(CPU=cpus)
        self.rng = random.Random(seed)
        self.running: list[tuple[int, int, bytes, bytes]] = []  # lease, n, worker, owner
        self.waiting: dict[bytes, tuple[int, int, bytes, int]] = {}  # worker -> lease, n, its owner, children left
        self.unstarted: dict[bytes, list[int]] = {b"driver": []}  # owner -> calls it has still to start
        self.depths = {b"driver": 0}
        self.calls = self.most_live = 0

    def submit(self, owner: bytes, calls: list[int]) -> None:
        self.unstarted.setdefault(owner, []).extend(calls)
        self.node.want(owner, len(self.unstarted[owner]) + self.leased(owner), spec(depth=self.depths[owner]))

    def leased(self, owner: bytes) -> int:
        live = [lease for lease in self.running if lease[3] == owner]
        return len(live) + sum(1 for blocked in self.waiting.values() if blocked[2] == owner)

    def run(self, calls: list[int]) -> None:
        self.submit(b"driver", calls)
        while True:
            self.node.decide()
            for grant in self.node.grants:
                worker = b"w%d" % grant.lease_id
                self.depths[worker] = self.depths[grant.owner] + 1
                self.running.append((grant.lease_id, self.unstarted[grant.owner].pop(), worker, grant.owner))
                self.calls += 1
            self.most_live = max(self.most_live, len(self.running) + len(self.waiting))
            if not self.running:
                assert not self.waiting, "a deadlock"
                return
            lease, n, worker, owner = self.running.pop(self.rng.randrange(len(self.running)))
            if n < 2 or worker in self.unstarted:
                self.finish(lease, worker, owner)
            else:
                self.waiting[worker] = (lease, n, owner, 2)
                self.submit(worker, [n - 1, n - 2])
                self.node.scheduler.set_blocked(lease, True)

    def finish(self, lease: int, worker: bytes, owner: bytes) -> None:
        self.node.scheduler.drop_owner(worker)
        if owner in self.unstarted:
            self.node.want(owner, len(self.unstarted[owner]) + self.leased(owner), spec(depth=self.depths[owner]))
        self.node.scheduler.release(lease)
        if owner == b"driver":
            return
        held, n, its_owner, left = self.waiting[owner]
        self.waiting[owner] = (held, n, its_owner, left - 1)
        if left == 1:
            del self.waiting[owner]
            self.node.scheduler.set_blocked(held, False)
            self.running.append((held, n, owner, its_owner))


@pytest.mark.parametrize("cpus", [1, 2, 8])
@pytest.mark.parametrize("seed", range(5))
def test_recursion_keeps_few_leases_alive(cpus: int, seed: int) -> None:
    tree = Recursion(cpus, seed)
    tree.run([12])
    assert tree.calls == 465
    # A chain of blocked ancestors for every CPU, and not the tree's 465 calls.
    assert tree.most_live <= 12 * cpus + cpus
    assert tree.node.scheduler.available == tree.node.scheduler.total


def test_nested_work_is_finished_before_new_roots_start() -> None:
    tree = Recursion(2, 0)
    tree.run([7] * 50)
    assert tree.calls == 50 * 41
    assert tree.most_live <= 8 * 2


# ---------------------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("classes", [1, 2000])
def test_a_decision_costs_the_same_however_long_the_queue_is(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(CPU=2)
    scheduler = node.scheduler
    for number in range(classes):
        scheduler.set_demand(b"o%d" % number, 1, 10**6, spec(), 0.0)
    node.decide()
    looked: list[object] = []
    has_room = ResourceBooks.has_room
    monkeypatch.setattr(ResourceBooks, "has_room", lambda self, demand: looked.append(0) or has_room(self, demand))
    lease = node.grants[0].lease_id
    for _ in range(10):
        scheduler.release(lease)
        (grant,) = [d for d in scheduler.decide((), 0.0) if isinstance(d, Grant)]
        lease = grant.lease_id
        assert scheduler.decide((), 0.0) == []
    assert len(looked) == 20


GROUPS = [b"g" * 18, b"h" * 18]


def in_group(number: int, bundle: int = -1) -> Strategy:
    return Strategy("group", group=GROUPS[number], bundle=bundle)


OWNERS = [b"o1", b"o2", b"o3"]
SPECS = [
    spec(),
    spec(depth=1),
    spec(CPU=2),
    spec(CPU=0.5, GPU=0.5),
    spec(GPU=1),
    spec(GPU=0.7, depth=2),
    spec(GPU=1.5),
    spec(x=1),
    spec(y=1),
    LeaseSpec(JOB, {"CPU": 0}),
    spec(strategy=Strategy("spread")),
    spec(strategy=Strategy("node", b"b")),
    spec(strategy=Strategy("node", b"here")),
    spec(strategy=Strategy("node", b"gone", True)),
    spec(strategy=in_group(0)),
    spec(strategy=in_group(0, 0), CPU=0.5, GPU=0.5),
    spec(strategy=in_group(1), CPU=2),
    spec(strategy=in_group(1, 1), GPU=1, depth=1),
    spec(strategy=Strategy(labels={"zone": "eu"})),
    spec(job=b"job1"),
    spec(priority=1),
    spec(priority=1, CPU=2, job=b"job1"),
    spec(priority=-1, depth=3),
    spec(strategy=Strategy(labels={"zone": "eu"}, fallbacks=[{"zone": "us"}])),
    spec(strategy=Strategy("node", b"b", True, when_busy="spill")),
]


BUNDLES = [to_amounts({"CPU": 1}), to_amounts({"CPU": 2, "GPU": 1}), to_amounts({"CPU": 0.5, "GPU": 0.5})]


class Books(RuleBasedStateMachine):
    """Any order of inputs, and a model of what may come out."""

    leases = HypothesisBundle("leases")
    actors = HypothesisBundle("actors")

    @initialize()
    def start(self) -> None:
        self.scheduler = LeaseScheduler(b"here", to_amounts({"CPU": 4, "GPU": 2, "x": 1}), random.Random(0))
        self.now = 0.0
        self.nodes: tuple[NodeView, ...] = ()
        self.demands: dict[tuple[bytes, int], tuple[int, LeaseSpec, bool]] = {}
        self.held: dict[int, tuple[bytes, int]] = {}
        self.reasons: dict[tuple[bytes, int], WaitReason] = {}
        self.next_actor = 0
        self.set_aside: dict[tuple[bytes, int], dict[str, int]] = {}
        self.committed: set[bytes] = set()

    def teardown(self) -> None:
        """Whatever happened: when all have left, all is free, and no bundle is left behind."""
        if not hasattr(self, "scheduler"):
            return
        for group in GROUPS:
            self.scheduler.close_bundles(group, [0, 1, 2])
        for lease in self.held:
            self.scheduler.release(lease)
        for actor in list(self.scheduler._actors):
            self.scheduler.release_actor(actor)
        self.scheduler.check_invariants()
        assert self.scheduler.available == self.scheduler.total == to_amounts({"CPU": 4, "GPU": 2, "x": 1})
        assert not list(self.scheduler._bundles)

    @rule(
        owner=st.sampled_from(OWNERS),
        class_id=st.integers(0, 2),
        wanted=st.integers(0, 5),
        demand=st.sampled_from(SPECS),
        redirected=st.booleans(),
    )
    def want(self, owner: bytes, class_id: int, wanted: int, demand: LeaseSpec, redirected: bool) -> None:
        key = (owner, class_id)
        self.scheduler.set_demand(owner, class_id, wanted, demand, self.now, redirected=redirected)
        self.demands[key] = (wanted, demand, redirected)

    @rule(
        free=st.tuples(st.integers(0, 4), st.integers(0, 2)),
        zone=st.sampled_from(["eu", "us"]),
        who=st.sampled_from(["b", "c", "bc", ""]),
        draining=st.booleans(),
    )
    def see(self, free: tuple[int, int], zone: str, who: str, draining: bool) -> None:
        total = {"CPU": 4.0, "GPU": 2.0, "y": 1.0}
        more = {"labels": {"zone": zone}, "draining": draining}
        others = tuple(view(name, total, {"CPU": free[0], "GPU": free[1]}, **more) for name in who)
        self.nodes = (view("here", {}, labels={"zone": "us"}, draining=draining and zone == "us"), *others)

    @rule(target=leases, after_s=st.sampled_from([0.0, 0.5, 3.0, 20.0]), limited=st.booleans())
    def decide(self, after_s: float, limited: bool) -> object:
        self.now += after_s
        views = {node.node_id: node for node in self.nodes}
        before = {key: self.scheduler.unmet(*key) for key in self.demands}
        new = {key for key in self.demands if self.is_new(key)}
        order: dict[bytes, list[tuple[int, int]]] = {}  # by job
        priorities = []
        granted = []
        decisions = self.scheduler.decide(self.nodes, self.now, (lambda _: True) if limited else None)
        for d in decisions:
            match d:
                case Grant():
                    assert not limited
                    assert not (b"here" in views and views[b"here"].draining)
                    wanted, demand, redirected = self.demands[d.owner, d.class_id]
                    assert d.spec == demand
                    assert d.lease_id not in self.held
                    assert demand.strategy.node_id != b"b" or demand.strategy.soft or redirected
                    assert sorted(d.devices) == [name for name in demand.resources if name == "GPU"]
                    before[d.owner, d.class_id] -= 1
                    self.held[d.lease_id] = (d.owner, d.class_id)
                    granted.append(d.lease_id)
                    self.expect_it_is_in_its_bundle(d.lease_id, demand.strategy)
                    priorities.append(demand.priority)
                    order.setdefault(demand.job_id, []).append((demand.priority, demand.depth))
                case Redirect():
                    wanted, demand, redirected = self.demands[d.owner, d.class_id]
                    assert not redirected or (d.owner, d.class_id) not in new
                    assert not views[d.node_id].draining
                    assert fits(demand.resources, views[d.node_id].total)
                    before[d.owner, d.class_id] -= d.count
                    self.demands[d.owner, d.class_id] = (wanted - d.count, demand, redirected)
                case Wait():
                    self.reasons[d.owner, d.class_id] = d.reason
                case Reclaim():
                    assert d.owner in {owner for owner, _ in self.held.values()}
        assert priorities == sorted(priorities, reverse=True)
        assert all(ranks == sorted(ranks, reverse=True) for ranks in order.values())
        for key, unmet in before.items():
            assert self.scheduler.unmet(*key) == unmet >= 0
            if unmet:
                told = self.scheduler._owners[key[0]].classes[key[1]].reason
                assert self.reasons[key] == told is not None, "nothing waits without a reason"
        self.expect_nothing_was_left_that_fits(limited)
        self.expect_nothing_was_kept_that_fits_elsewhere(limited)
        again = self.scheduler.decide(self.nodes, self.now, (lambda _: True) if limited else None)
        assert again == [], "a decision leaves nothing to decide"
        return multiple(*granted)

    def is_new(self, key: tuple[bytes, int]) -> bool:
        """Whether a demand that another agent sent here must stay here for now."""
        record = self.scheduler._owners.get(key[0])
        cls = record.classes.get(key[1]) if record is not None else None
        return cls is not None and cls.shape.pinned and (not cls.queued or self.now - cls.since < REVISIT_S)

    def expect_nothing_was_left_that_fits(self, limited: bool) -> None:
        if limited or self.scheduler._reservation is not None:
            return
        for key in self.demands:
            if self.scheduler.unmet(*key):
                cls = self.scheduler._owners[key[0]].classes[key[1]]
                plan = self.scheduler._plan(cls.shape)
                crowded = cls.shape.light and self.scheduler._usage.free_slots <= 0
                has_room = self.scheduler._has_room(cls.shape) and not crowded
                assert not (plan.here and has_room), "it fits and waits"

    def expect_nothing_was_kept_that_fits_elsewhere(self, limited: bool) -> None:
        if limited:
            return
        for key in self.demands:
            if self.scheduler.unmet(*key) and not self.is_new(key):
                shape = self.scheduler._owners[key[0]].classes[key[1]].shape
                plan = self.scheduler._plan(shape)
                if shape.light:
                    continue  # it fits everywhere and for ever, but is sent only as far as there are slots
                assert not self.scheduler._cluster.with_room(shape.demand, plan.away), "it fits elsewhere and waits"

    @rule(lease=consumes(leases))
    def release(self, lease: int) -> None:
        self.scheduler.release(lease)
        del self.held[lease]

    @rule(lease=leases, blocked=st.booleans())
    def block(self, lease: int, blocked: bool) -> None:
        self.scheduler.set_blocked(lease, blocked)

    @rule(lease=leases)
    def take_long(self, lease: int) -> None:
        self.scheduler.set_slow(lease)

    @rule(owner=st.sampled_from(OWNERS))
    def drop_owner(self, owner: bytes) -> None:
        before = {lease for lease, (holder, _) in self.held.items() if holder == owner}
        assert set(self.scheduler.drop_owner(owner)) <= before
        self.demands = {key: value for key, value in self.demands.items() if key[0] != owner}
        self.reasons = {key: value for key, value in self.reasons.items() if key[0] != owner}

    @rule(job=st.sampled_from([JOB, b"job1"]))
    def drop_job(self, job: bytes) -> None:
        assert set(self.scheduler.drop_job(job)) <= self.held.keys()
        for key, (_, demand, redirected) in list(self.demands.items()):
            if demand.job_id == job:
                self.demands[key] = (0, demand, redirected)

    def expect_it_is_in_its_bundle(self, lease: int, strategy: Strategy) -> None:
        bundle = self.scheduler._leases[lease].holding.bundle
        if strategy.kind != "group":
            assert bundle is None
            return
        key = (bundle.group, bundle.index)
        assert key in self.set_aside
        assert key[0] in self.committed
        assert bundle.group == strategy.group
        assert strategy.bundle in (-1, bundle.index)

    @rule(group=st.sampled_from(GROUPS), index=st.integers(0, 1), resources=st.sampled_from(BUNDLES))
    def prepare(self, group: bytes, index: int, resources: dict[str, int]) -> None:
        wanted = {i: resources for i in (index, 2) if (group, i) not in self.set_aside}
        before = dict(self.scheduler.available)
        if self.scheduler.prepare_bundles(group, wanted):
            self.set_aside |= {(group, i): resources for i in wanted}
        else:
            assert self.scheduler.available == before, "all or nothing"

    @rule(group=st.sampled_from(GROUPS))
    def commit(self, group: bytes) -> None:
        self.scheduler.commit_bundles(group)
        self.committed.add(group)

    @rule(group=st.sampled_from(GROUPS), indices=st.sampled_from([[0], [1], [0, 1, 2]]))
    def close(self, group: bytes, indices: list[int]) -> None:
        ending = self.scheduler.close_bundles(group, indices)
        assert set(ending) <= self.held.keys()
        assert all(self.scheduler.was_closed(lease) for lease in ending)
        for index in indices:
            self.set_aside.pop((group, index), None)
        if not any(key[0] == group for key in self.set_aside):
            self.committed.discard(group)

    @rule(
        target=actors,
        hold=st.sampled_from([{}, {"CPU": UNIT}, {"GPU": 5_000}, {"x": UNIT, "CPU": 0}]),
        strategy=st.sampled_from([Strategy(), Strategy(), in_group(0), in_group(1, 0)]),
    )
    def acquire_actor(self, hold: dict[str, int], strategy: Strategy) -> object:
        self.next_actor += 1
        name = b"actor%d" % self.next_actor
        devices = self.scheduler.acquire_actor(name, {"CPU": UNIT} | hold, hold, strategy)
        if devices is None:
            return multiple()
        assert len(devices.get("GPU", [])) == ("GPU" in hold)
        return name

    @rule(actor=consumes(actors))
    def release_actor(self, actor: bytes) -> None:
        self.scheduler.release_actor(actor)

    @rule(actor=actors, blocked=st.booleans())
    def block_actor(self, actor: bytes, blocked: bool) -> None:
        self.scheduler.set_actor_blocked(actor, blocked)

    @invariant()
    def books_agree(self) -> None:
        self.scheduler.check_invariants()
        here = {(bundle.group, bundle.index) for bundle in self.scheduler._bundles if bundle not in self.closing()}
        assert here == set(self.set_aside)
        assert set(self.scheduler._leases) == set(self.held)
        waiting = sum(self.scheduler.unmet(*key) for key in self.demands)
        assert sum(report.count for report in self.scheduler.demand_reports(self.now)) == waiting
        assert self.scheduler.is_waiting == (waiting > 0)

    def closing(self) -> set[object]:
        return set(self.scheduler._bundles._closing)


TestBooks = Books.TestCase
TestBooks.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
