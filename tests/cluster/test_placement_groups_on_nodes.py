"""Placement groups on several nodes: where bundles go, and what becomes of them when a node or a job ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal.cluster_utils import Cluster
from shoal.util import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from shoal.util.scheduling_strategies import PlacementGroupSchedulingStrategy

LIMIT_S = 30


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def inside(group: PlacementGroup, index: int = -1, capture: bool | None = None) -> dict[str, Any]:
    return {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, index, capture)}


@shoal.remote
def where_am_i() -> tuple[str, str | None]:
    context = shoal.get_runtime_context()
    return context.get_node_id(), context.get_placement_group_id()


@shoal.remote
def hold(gate: Any) -> str:
    """Runs until the gate opens; the gate hears that it has begun."""
    shoal.get(gate.enter.remote())
    shoal.get(gate.opened.remote())
    return "done"


@shoal.remote(num_cpus=0, max_concurrency=100)
class Gate:
    """Lives outside of any group."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()

    def enter(self) -> None:
        self.entered.release()

    def wait_entered(self, count: int) -> bool:
        return all(self.entered.acquire(timeout=LIMIT_S) for _ in range(count))

    def open(self) -> None:
        self.gate.set()

    def opened(self) -> None:
        self.gate.wait()


def wait_for_error(kind: type[Exception], call: Callable[[], object]) -> None:
    """Call until it raises `kind`: a removal is not waited for, and what was begun before may still succeed."""

    def fails() -> bool:
        try:
            call()
        except kind:
            return True
        return False

    assert wait_until(fails, LIMIT_S)


def all_is_free() -> bool:
    """Nothing is held, and no bundle is left behind."""
    total, free = shoal.cluster_resources(), shoal.available_resources()
    return total == free and not [name for name in total if "_group_" in name]


def test_strict_rules_spread_and_pack_over_nodes(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    others = [cluster.add_node(num_cpus=2, labels={"zone": "b"}), cluster.add_node(num_cpus=2)]
    cluster.connect()
    assert wait_until(lambda: shoal.cluster_resources().get("CPU") == 6, LIMIT_S)
    spread = placement_group([{"CPU": 1}] * 3, strategy="STRICT_SPREAD")
    assert spread.wait(LIMIT_S)
    assert len(set(placement_group_table(spread)["bundles_to_node_id"].values())) == 3
    places = placement_group_table(spread)["bundles_to_node_id"]
    got = shoal.get([where_am_i.options(**inside(spread, index)).remote() for index in range(3)], timeout=LIMIT_S)
    assert [node for node, _ in got] == list(places.values())
    gate = Gate.remote()  # type: ignore[attr-defined]
    held = [hold.options(**inside(spread)).remote(gate) for _ in range(3)]  # any bundle: all three at a time
    assert shoal.get(gate.wait_entered.remote(3), timeout=LIMIT_S)
    shoal.get(gate.open.remote())
    assert shoal.get(held, timeout=LIMIT_S) == ["done"] * 3
    packed = placement_group([{"CPU": 0.5}] * 2, strategy="STRICT_PACK", _soft_target_node_id=others[1].node_id)
    labelled = placement_group([{"CPU": 0.5}], bundle_label_selector=[{"zone": "b"}])
    assert packed.wait(LIMIT_S)
    assert labelled.wait(LIMIT_S)
    assert set(placement_group_table(packed)["bundles_to_node_id"].values()) == {others[1].node_id}
    assert placement_group_table(labelled)["bundles_to_node_id"] == {0: others[0].node_id}
    too_many = placement_group([{"CPU": 0.1}] * 4, strategy="STRICT_SPREAD")
    assert not too_many.wait(0.05)
    assert "4 bundles must be on as many nodes" in placement_group_table(too_many)["reason"]
    with pytest.raises(ValueError, match="does not fit"):
        where_am_i.options(num_cpus=1, **inside(packed))
    for group in (spread, packed, labelled, too_many):
        remove_placement_group(group)
    assert wait_until(all_is_free, LIMIT_S)


def test_lost_bundles_are_made_again_elsewhere(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    lost = cluster.add_node(num_cpus=2, resources={"slot": 1})
    cluster.connect()
    group = placement_group([{"CPU": 1}, {"CPU": 1, "slot": 1}])
    assert group.wait(LIMIT_S)
    assert placement_group_table(group)["bundles_to_node_id"][1] == lost.node_id

    @shoal.remote(num_cpus=1, max_restarts=1, max_task_retries=-1)
    class Lodger:
        def node(self) -> str:
            return shoal.get_runtime_context().get_node_id()

    lodger = Lodger.options(**inside(group, 1)).remote()  # type: ignore[attr-defined]
    assert shoal.get(lodger.node.remote(), timeout=LIMIT_S) == lost.node_id
    cluster.remove_node(lost, allow_graceful=False)
    assert wait_until(lambda: placement_group_table(group)["state"] == "RESCHEDULING", LIMIT_S)
    task = where_am_i.options(num_cpus=0.5, **inside(group, 0)).remote()
    fresh = cluster.add_node(num_cpus=2, resources={"slot": 1})
    assert wait_until(lambda: placement_group_table(group)["state"] == "CREATED", LIMIT_S)
    assert shoal.get(lodger.node.remote(), timeout=LIMIT_S) == fresh.node_id
    assert shoal.get(task, timeout=LIMIT_S)[1] == group.id.hex()
    remove_placement_group(group)
    wait_for_error(exceptions.ActorPlacementGroupRemoved, lambda: shoal.get(lodger.node.remote()))
    assert wait_until(all_is_free, LIMIT_S)


def test_groups_end_with_their_job_unless_detached(make_cluster: Callable[..., Cluster]) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.connect(namespace="shop")
    brief = placement_group([{"CPU": 1}])
    lasting = placement_group([{"CPU": 1}], name="lasting", lifetime="detached")
    assert brief.wait(LIMIT_S)
    assert lasting.wait(LIMIT_S)
    shoal.shutdown()
    cluster.connect(namespace="shop")
    assert wait_until(lambda: placement_group_table(brief)["state"] == "REMOVED", LIMIT_S)
    assert get_placement_group("lasting") == lasting
    assert shoal.get(where_am_i.options(**inside(lasting)).remote(), timeout=LIMIT_S)[1] == lasting.id.hex()

    @shoal.remote(num_cpus=0)
    class Maker:
        def make(self) -> PlacementGroup:
            group = placement_group([{"CPU": 0.5}])
            assert group.wait(LIMIT_S)
            return group

    maker = Maker.options(name="maker", lifetime="detached").remote()  # type: ignore[attr-defined]
    made = shoal.get(maker.make.remote(), timeout=LIMIT_S)
    shoal.shutdown()
    cluster.connect(namespace="shop")
    assert placement_group_table(made)["state"] == "CREATED"
    shoal.kill(shoal.get_actor("maker"))
    assert wait_until(lambda: placement_group_table(made)["state"] == "REMOVED", LIMIT_S)
    remove_placement_group(get_placement_group("lasting"))
    assert wait_until(all_is_free, LIMIT_S)
