"""Where tasks and actors run, and who goes first: on real nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import shoal
from shoal.cluster_utils import Cluster, Node
from shoal.exceptions import ActorUnschedulableError, TaskUnschedulableError
from shoal.runtime import slot
from shoal.util.scheduling_strategies import (
    DoesNotExist,
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
)

MISSING = "ab" * 28


class Trio(NamedTuple):
    cluster: Cluster
    head: Node
    left: Node
    right: Node


@pytest.fixture(scope="module")
def trio() -> Iterator[Trio]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "labels": {"zone": "a"}})
    left = cluster.add_node(num_cpus=2, labels={"zone": "b", "disk": "ssd"}, resources={"left": 1})
    right = cluster.add_node(num_cpus=2, labels={"zone": "c", "disk": "hdd"})
    cluster.connect()
    assert cluster.head_node is not None
    yield Trio(cluster, cluster.head_node, left, right)
    cluster.shutdown()


@shoal.remote(num_cpus=0)
def where() -> str:
    return str(shoal.get_runtime_context().get_node_id())


@shoal.remote
class Place:
    def where(self) -> str:
        return str(shoal.get_runtime_context().get_node_id())


@shoal.remote
def where_after(seconds: float) -> str:
    time.sleep(seconds)
    return str(shoal.get_runtime_context().get_node_id())


def selected(**options: object) -> str:
    return str(shoal.get(where.options(**options).remote(), timeout=20))


# ----------------------------------------------------------------------------------------------------------- labels


def test_label_selectors(trio: Trio) -> None:
    assert selected(label_selector={"zone": "b"}) == trio.left.node_id
    assert selected(label_selector={"disk": "!ssd", "zone": "!a"}) == trio.right.node_id
    assert selected(label_selector={"zone": "in(x, c)"}) == trio.right.node_id
    assert selected(label_selector={"zone": "!in(a,b)"}) == trio.right.node_id
    assert selected(label_selector={"ray.io/node-id": trio.left.node_id}) == trio.left.node_id
    assert selected(label_selector={"shoal.io/node-id": trio.right.node_id}) == trio.right.node_id
    place = Place.options(label_selector={"disk": "in(ssd)"}).remote()
    assert shoal.get(place.where.remote(), timeout=20) == trio.left.node_id


def test_a_label_that_no_node_has_is_waited_for_and_told(trio: Trio) -> None:
    ref = where.options(label_selector={"zone": "nowhere"}).remote()
    with pytest.raises(shoal.exceptions.GetTimeoutError, match="no node has the labels zone=nowhere"):
        shoal.get(ref, timeout=0.5)


def test_fallbacks(trio: Trio) -> None:
    instead = [{"label_selector": {"zone": "x"}}, {"label_selector": {"zone": "c"}}]
    assert selected(label_selector={"zone": "nowhere"}, fallback_strategy=instead) == trio.right.node_id
    place = Place.options(label_selector={"zone": "nowhere"}, fallback_strategy=instead).remote()
    assert shoal.get(place.where.remote(), timeout=20) == trio.right.node_id


def test_a_fallback_is_taken_when_the_first_choice_is_busy(trio: Trio) -> None:
    on_left = Place.options(num_cpus=2, label_selector={"zone": "b"}).remote()
    assert shoal.get(on_left.where.remote(), timeout=20) == trio.left.node_id
    first = {"label_selector": {"zone": "b"}, "fallback_strategy": [{"label_selector": {"zone": "c"}}]}
    place = Place.options(num_cpus=1, **first).remote()
    assert shoal.get(place.where.remote(), timeout=20) == trio.right.node_id
    shoal.kill(on_left)
    shoal.kill(place)


def test_label_strategy(trio: Trio) -> None:
    def strategy(hard: dict[str, object], soft: dict[str, object] | None = None) -> dict[str, object]:
        return {"scheduling_strategy": NodeLabelSchedulingStrategy(hard, soft=soft)}  # type: ignore[arg-type]

    assert selected(**strategy({"zone": In("b", "x")})) == trio.left.node_id
    assert selected(**strategy({"disk": Exists(), "zone": NotIn("b")})) == trio.right.node_id
    assert selected(**strategy({"disk": DoesNotExist()})) == trio.head.node_id
    assert selected(**strategy({}, {"zone": In("c")})) == trio.right.node_id
    assert selected(**strategy({"zone": In("b", "c")}, {"zone": In("a", "c")})) == trio.right.node_id
    assert selected(**strategy({"zone": In("b")}, {"zone": In("nowhere")})) == trio.left.node_id


# --------------------------------------------------------------------------------------------------------- affinity


def test_hard_affinity_to_a_node_that_is_not_there_fails(trio: Trio) -> None:
    hard = NodeAffinitySchedulingStrategy(MISSING, soft=False)
    refs = [where.options(scheduling_strategy=hard).remote() for _ in range(3)]
    for ref in refs:
        with pytest.raises(TaskUnschedulableError, match="abababababab, which it must run on, is not in the cluster"):
            shoal.get(ref, timeout=20)
    place = Place.options(scheduling_strategy=hard).remote()
    with pytest.raises(ActorUnschedulableError, match="is not in the cluster"):
        shoal.get(place.where.remote(), timeout=20)
    assert selected(scheduling_strategy=NodeAffinitySchedulingStrategy(MISSING, soft=True))


def test_hard_affinity_to_what_a_node_can_never_have_fails(trio: Trio) -> None:
    hard = NodeAffinitySchedulingStrategy(trio.left.node_id, soft=False)
    large = where.options(scheduling_strategy=hard, num_cpus=3).remote()
    elsewhere = where.options(scheduling_strategy=hard, label_selector={"zone": "c"}).remote()
    with pytest.raises(TaskUnschedulableError, match="has 2 CPU, and it needs 3 CPU"):
        shoal.get(large, timeout=20)
    with pytest.raises(TaskUnschedulableError, match="does not have the labels"):
        shoal.get(elsewhere, timeout=20)


def test_affinity_when_the_node_is_busy(trio: Trio) -> None:
    holder = Place.options(num_cpus=2, label_selector={"zone": "b"}).remote()
    assert shoal.get(holder.where.remote(), timeout=20) == trio.left.node_id
    spill = NodeAffinitySchedulingStrategy(trio.left.node_id, soft=True, _spill_on_unavailable=True)
    fail = NodeAffinitySchedulingStrategy(trio.left.node_id, soft=False, _fail_on_unavailable=True)
    place = Place.options(num_cpus=1, scheduling_strategy=spill).remote()
    assert shoal.get(place.where.remote(), timeout=20) != trio.left.node_id
    with pytest.raises(ActorUnschedulableError, match="told not to wait"):
        shoal.get(Place.options(num_cpus=1, scheduling_strategy=fail).remote().where.remote(), timeout=20)
    with pytest.raises(TaskUnschedulableError, match="told not to wait"):
        shoal.get(where.options(num_cpus=1, scheduling_strategy=fail).remote(), timeout=20)
    assert selected(num_cpus=1, scheduling_strategy=spill) != trio.left.node_id
    shoal.kill(holder)
    shoal.kill(place)


# -------------------------------------------------------------------------------------------------- who goes first


@shoal.remote(num_cpus=0, resources={"left": 1})
def stamp() -> float:
    return time.monotonic()


@shoal.remote(num_cpus=0)
def parent() -> float:
    return float(shoal.get(stamp.remote()))


def wait_for_demand(name: str, count: int) -> None:
    """Wait until so many leases are wanted for tasks of this name, as control was told."""
    deadline = time.monotonic() + 20
    runtime = slot.current
    assert runtime is not None
    while sum(row.count for row in runtime.status().demands if row.name == name) != count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_higher_priority_goes_first_and_children_inherit_it(trio: Trio) -> None:
    holder = Place.options(num_cpus=0, resources={"left": 1}).remote()
    assert shoal.get(holder.where.remote(), timeout=20) == trio.left.node_id
    low = [stamp.options(priority=-1).remote() for _ in range(3)]
    usual = [stamp.remote() for _ in range(3)]
    high = [stamp.options(priority=2).remote() for _ in range(3)]
    nested = [parent.options(priority=1).remote()]
    wait_for_demand("stamp", 10)
    shoal.kill(holder)
    groups = [shoal.get(refs, timeout=20) for refs in (high, nested, usual, low)]
    assert sorted(time for group in groups for time in group) == [time for group in groups for time in sorted(group)]


FEW = """
import sys, time
import shoal

shoal.init(address=sys.argv[1])

@shoal.remote(num_cpus=0, resources={"left": 1})
def few():
    time.sleep(0.01)

shoal.get([few.remote() for _ in range(5)])
print("done")
"""


def test_the_flood_of_one_driver_does_not_starve_another(trio: Trio) -> None:
    flood = where_after.options(num_cpus=0, resources={"left": 1})
    refs = [flood.remote(0.01) for _ in range(10_000)]
    run = [sys.executable, "-c", FEW, trio.cluster.address]
    done = subprocess.run(run, capture_output=True, text=True, timeout=40, check=False)
    assert done.stdout == "done\n", done.stderr
    _, left = shoal.wait(refs, num_returns=len(refs), timeout=0)
    assert len(left) > 1000, "the flood is far from its end"
    for ref in left:
        shoal.cancel(ref)


# ---------------------------------------------------------------------------------------------------------- locality


@shoal.remote(num_cpus=0)
def make(size: int) -> bytes:
    return bytes(size)


@shoal.remote
def where_is(*values: bytes) -> str:
    return str(shoal.get_runtime_context().get_node_id())


@pytest.mark.timeout(30)
def test_tasks_go_to_their_large_arguments(trio: Trio) -> None:
    at_left = [make.options(label_selector={"zone": "b"}).remote(3 << 20) for _ in range(2)]
    at_right = make.options(label_selector={"zone": "c"}).remote(4 << 20)
    shoal.wait([*at_left, at_right], num_returns=3, timeout=20, fetch_local=False)
    for args, node in (([*at_left, at_right], trio.left), ([at_right, at_left[0], b"x"], trio.right)):
        while shoal.get(where_is.remote(*args), timeout=20) != node.node_id:
            pass  # leases of tests before this one may still hold the node's CPUs
    hard = NodeAffinitySchedulingStrategy(trio.right.node_id, soft=False)
    assert shoal.get(where_is.options(scheduling_strategy=hard).remote(*at_left), timeout=20) == trio.right.node_id


def test_tasks_do_not_wait_for_the_node_of_their_arguments(trio: Trio) -> None:
    at_left = make.options(label_selector={"zone": "b"}).remote(3 << 20)
    holder = Place.options(num_cpus=2, label_selector={"zone": "b"}).remote()
    assert shoal.get(holder.where.remote(), timeout=20) == trio.left.node_id
    assert shoal.get(where_is.remote(at_left), timeout=20) != trio.left.node_id
    shoal.kill(holder)


# ------------------------------------------------------------------------------------------------ tasks without CPUs


@shoal.remote(num_cpus=0)
def pid() -> int:
    return os.getpid()


@shoal.remote(num_cpus=0)
def parent_pid() -> tuple[int, int]:
    return os.getpid(), int(shoal.get(pid.remote()))


@shoal.remote(num_cpus=0)
def meet(folder: str, number: int, count: int) -> int:
    """Return when all have come, which nobody but the file system knows."""
    Path(folder, str(number)).touch()
    while len(os.listdir(folder)) < count:
        time.sleep(0.01)
    return number


def test_a_flood_of_tasks_without_cpus_shares_few_workers(trio: Trio) -> None:
    pairs = shoal.get([parent_pid.remote() for _ in range(300)], timeout=60)
    assert len({number for pair in pairs for number in pair}) < 150


def test_tasks_without_cpus_that_wait_for_each_other_all_start(trio: Trio, tmp_path: Path) -> None:
    here = meet.options(label_selector={"zone": "a"})
    refs = [here.remote(str(tmp_path), number, 20) for number in range(20)]
    assert shoal.get(refs, timeout=60) == list(range(20))


# --------------------------------------------------------------------------------------------------- spread, packing


@pytest.mark.timeout(30)
def test_spread_uses_all_nodes(trio: Trio) -> None:
    spread = where_after.options(scheduling_strategy="SPREAD")
    everywhere = {trio.head.node_id, trio.left.node_id, trio.right.node_id}
    used: set[str] = set()
    while used != everywhere:  # once the nodes have heard that nothing runs on any of them any more
        used = set(shoal.get([spread.remote(0.05) for _ in range(6)], timeout=20))
