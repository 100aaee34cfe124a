"""Placement groups on one node."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal.api.initialize import ClusterContext
from shoal.util import (
    PlacementGroup,
    get_current_placement_group,
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


def test_a_group_is_made_used_and_removed(local: ClusterContext) -> None:
    group = placement_group([{"CPU": 1}, {"CPU": 1}])
    assert shoal.get(group.ready(), timeout=LIMIT_S) == group
    assert group.wait(0)
    assert wait_until(lambda: shoal.available_resources().get("CPU") is None, LIMIT_S)  # all of it is set aside
    assert shoal.available_resources()[f"CPU_group_{group.id.hex()}"] == 2
    assert shoal.get(where_am_i.options(**inside(group)).remote(), timeout=LIMIT_S)[1] == group.id.hex()
    outside = where_am_i.remote()
    assert shoal.wait([outside], timeout=0.1)[1] == [outside], "what is set aside is for the group only"
    row = placement_group_table(group)
    assert (row["state"], row["strategy"], row["bundles"]) == ("CREATED", "PACK", {0: {"CPU": 1.0}, 1: {"CPU": 1.0}})
    remove_placement_group(group)
    assert shoal.get(outside, timeout=LIMIT_S)[1] is None
    assert placement_group_table(group)["state"] == "REMOVED"
    assert placement_group_table()[group.id.hex()]["state"] == "REMOVED"
    assert wait_until(all_is_free, LIMIT_S)


def test_handles_are_values(local: ClusterContext) -> None:
    group = placement_group([{"special": 1}])
    copy = pickle.loads(pickle.dumps(group))
    assert copy == group
    assert hash(copy) == hash(group)
    assert (copy.bundle_specs, copy.bundle_count) == ([{"special": 1.0}], 1)
    assert shoal.get(shoal.remote(lambda g: (g.wait(LIMIT_S), g.bundle_specs)).remote(group), timeout=LIMIT_S) == (
        True,
        [{"special": 1.0}],
    )
    assert PlacementGroup.empty().is_empty
    assert get_current_placement_group() is None
    remove_placement_group(group)
    remove_placement_group(group)  # again does nothing


def test_work_is_captured_only_when_it_should_be(local: ClusterContext) -> None:
    group = placement_group([{"CPU": 1}])

    @shoal.remote(num_cpus=0.1)
    class Inner:
        def group(self) -> str | None:
            return shoal.get_runtime_context().get_placement_group_id()

    @shoal.remote(num_cpus=0.1)
    def outer() -> list[Any]:
        context, current = shoal.get_runtime_context(), get_current_placement_group()
        here = where_am_i.options(num_cpus=0.1)
        tasks = [here, here.options(scheduling_strategy="DEFAULT"), here.options(placement_group=None)]
        return [
            current.id.hex() if current is not None else None,
            context.should_capture_child_tasks_in_placement_group,
            *(group for _, group in shoal.get([task.remote() for task in tasks])),
            shoal.get(Inner.remote().group.remote()),  # type: ignore[attr-defined]
            shoal.get(Inner.options(placement_group=None).remote().group.remote()),  # type: ignore[attr-defined]
        ]

    name = group.id.hex()
    for _ in range(2):  # the same worker, function and class: nothing of a group sticks to them
        captured = shoal.get(outer.options(**inside(group, 0, True)).remote(), timeout=LIMIT_S)
        assert captured == [name, True, name, None, None, name, None]
        assert shoal.get(outer.options(**inside(group)).remote(), timeout=LIMIT_S) == [name, False, *[None] * 5]
        assert shoal.get(outer.remote(), timeout=LIMIT_S) == [None, False, *[None] * 5]
    remove_placement_group(group)
    assert wait_until(all_is_free, LIMIT_S)


def test_removal_ends_what_runs_waits_and_lives_there(local: ClusterContext) -> None:
    group = placement_group([{"CPU": 1}])
    gate = Gate.remote()  # type: ignore[attr-defined]

    @shoal.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    class Lodger:
        def ping(self) -> str:
            return "pong"

    running = hold.options(max_retries=5, **inside(group)).remote(gate)
    queued = hold.options(**inside(group)).remote(gate)
    lodger = Lodger.options(**inside(group, 0)).remote()  # type: ignore[attr-defined]
    assert shoal.get([lodger.ping.remote(), gate.wait_entered.remote(1)], timeout=LIMIT_S) == ["pong", True]
    remove_placement_group(group)
    wait_for_error(exceptions.ActorPlacementGroupRemoved, lambda: shoal.get(lodger.ping.remote()))
    for ref in (running, queued, where_am_i.options(**inside(group)).remote()):
        with pytest.raises(exceptions.TaskPlacementGroupRemoved, match="was removed with remove_placement_group"):
            shoal.get(ref, timeout=LIMIT_S)
    late = Lodger.options(**inside(group)).remote()  # type: ignore[attr-defined]
    with pytest.raises(exceptions.ActorPlacementGroupRemoved):
        shoal.get(late.ping.remote(), timeout=LIMIT_S)
    for waits in (lambda: shoal.get(group.ready(), timeout=LIMIT_S), lambda: group.wait(LIMIT_S)):
        with pytest.raises(exceptions.TaskPlacementGroupRemoved):
            waits()
    assert wait_until(all_is_free, LIMIT_S)


def test_a_blocked_holder_lends_its_cpu_within_the_group(local: ClusterContext) -> None:
    group = placement_group([{"CPU": 1}])

    @shoal.remote
    def nested(depth: int) -> int:
        return 1 + shoal.get(nested.remote(depth - 1)) if depth else 0

    assert shoal.get(nested.options(**inside(group, 0, True)).remote(5), timeout=LIMIT_S) == 5
    remove_placement_group(group)
    assert wait_until(all_is_free, LIMIT_S)


def test_a_group_gets_its_turn_among_tasks_that_never_end(local: ClusterContext) -> None:
    @shoal.remote
    def short() -> None:
        time.sleep(0.02)

    stop = threading.Event()

    def flood() -> None:
        running = [short.remote() for _ in range(20)]
        while not stop.is_set():
            _, running = shoal.wait(running)
            running.append(short.remote())

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        groups = [placement_group([{"CPU": 1}, {"CPU": 1}]), placement_group([{"CPU": 2}])]
        for group in groups:
            assert group.wait(LIMIT_S)
            remove_placement_group(group)
    finally:
        stop.set()
        thread.join()
    assert wait_until(all_is_free, LIMIT_S)


def test_names_belong_to_one_group_at_a_time(local: ClusterContext) -> None:
    group = placement_group([{"special": 1}], name="web")
    assert get_placement_group("web") == group
    assert get_placement_group("web").bundle_specs == [{"special": 1.0}]
    with pytest.raises(ValueError, match="the name 'web' is taken"):
        placement_group([{"special": 1}], name="web")
    remove_placement_group(group)
    with pytest.raises(ValueError, match="no placement group is named 'web'"):
        get_placement_group("web")
    again = placement_group([{"special": 1}], name="web")
    assert again.wait(LIMIT_S)
    remove_placement_group(again)


def test_a_group_that_does_not_fit_waits_and_says_why(local: ClusterContext) -> None:
    small, large = placement_group([{"special": 1}]), placement_group([{"special": 1}, {"special": 1}])
    never = placement_group([{"CPU": 64}])
    assert small.wait(LIMIT_S)
    assert not large.wait(0.05)
    assert placement_group_table(large)["reason"] == "it needs 2 special at once, and too little is free"
    text = placement_group_table(never)["reason"]
    assert text == "its bundle 0 fits on no node: no node has 64 CPU (the largest has 2)"
    with pytest.raises(exceptions.GetTimeoutError, match="has no place yet"):
        shoal.get(large.ready(), timeout=0.05)
    ready = large.ready()
    remove_placement_group(small)
    assert shoal.get(ready, timeout=LIMIT_S) == large
    remove_placement_group(large)
    unready = never.ready()
    remove_placement_group(never)
    with pytest.raises(exceptions.TaskPlacementGroupRemoved):
        shoal.get(unready, timeout=LIMIT_S)
    assert wait_until(all_is_free, LIMIT_S)


def test_wrong_input_gives_one_clear_line(local: ClusterContext) -> None:
    for bundles, words in [
        ([], "bundles is empty"),
        ([{}], "bundle 0 asks for nothing"),
        ([{"CPU": 1}, {"CPU": 0}], "bundle 1 asks for nothing"),
        ([{"CPU": -1}], "bundle 0: the amount of CPU is negative"),
        ([3], "bundle 0 is a dict"),
        ("CPU", "bundles is a list of dicts"),
        ([{"CPU_group_" + "0" * 36: 1}], "part of another placement group"),
    ]:
        with pytest.raises(ValueError, match=words):
            placement_group(bundles)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strategy is one of 'PACK'"):
        placement_group([{"CPU": 1}], strategy="PAKC")
    with pytest.raises(ValueError, match="lifetime is None or 'detached'"):
        placement_group([{"CPU": 1}], lifetime="forever")
    with pytest.raises(ValueError, match="goes with strategy='STRICT_PACK'"):
        placement_group([{"CPU": 1}], _soft_target_node_id="00")
    with pytest.raises(ValueError, match="the condition 'a b' is none of"):
        placement_group([{"CPU": 1}], bundle_label_selector=[{"zone": "a b"}])
    with pytest.raises(ValueError, match="a part of a placement group"):
        where_am_i.options(resources={"CPU_group_" + "0" * 36: 1})
    with pytest.raises(ValueError, match="one dict for each of the 1 bundles"):
        placement_group([{"CPU": 1}], bundle_label_selector=[{}, {}])
    group = placement_group([{"special": 1}, {"CPU": 0.5}])
    with pytest.raises(ValueError, match="between 0 and 1, or -1 for any bundle, not 2"):
        PlacementGroupSchedulingStrategy(group, 2)
    with pytest.raises(ValueError, match="1 CPU does not fit into any bundle"):
        where_am_i.options(**inside(group))
    with pytest.raises(ValueError, match="CPU does not fit into bundle 0"):
        where_am_i.options(num_cpus=0.5, placement_group=group, placement_group_bundle_index=0)
    with pytest.raises(ValueError, match="not both"):
        where_am_i.options(placement_group=group, scheduling_strategy="SPREAD")
    with pytest.raises(TypeError, match="placement_group is what placement_group"):
        PlacementGroupSchedulingStrategy("web")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a placement group is what placement_group"):
        remove_placement_group("web")  # type: ignore[arg-type]
    remove_placement_group(group)
