"""References that travel: inside arguments, results, other values and actors, from node to node, and memory that comes
back everywhere when the last one goes."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.cluster_utils import Cluster
from shoal.exceptions import ObjectLostError, OwnerDiedError, TaskCancelledError
from shoal.runtime import slot

MIB = 1 << 20
SIZE = 2 * MIB
LEFT, RIGHT = {"left": 0.01}, {"right": 0.01}


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def used() -> dict[str, int]:
    """Bytes in the store of each living node."""
    runtime: Any = slot.current
    return {node.node_id.hex()[:8]: node.store_used for node in runtime.status().nodes if node.alive}


@pytest.fixture(scope="module", autouse=True)
def trio() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2, resources={"left": 100}, wait=False)
    cluster.add_node(num_cpus=2, resources={"right": 100}, wait=False)
    cluster.wait_for_nodes()
    cluster.connect()
    yield cluster
    cluster.shutdown()


@pytest.fixture(autouse=True)
def stores_come_back(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    gc.collect()
    if "closures" in request.node.name:
        return
    assert wait_until(lambda: not any(used().values()), 8), used()


def large(value: int = 0) -> Any:
    return np.full(SIZE, value, dtype=np.uint8)


@shoal.remote(num_cpus=0)
def make(value: int) -> Any:
    return np.full(2 << 20, value, dtype=np.uint8)


@shoal.remote(num_cpus=0)
def first_of(box: list[Any]) -> int:
    return int(shoal.get(box[0])[0])


@shoal.remote(num_cpus=0)
def put_and_return(value: int) -> list[Any]:
    return [shoal.put(np.full(2 << 20, value, dtype=np.uint8))]


@shoal.remote(num_cpus=0)
def submit_and_return(value: int, where: dict[str, float]) -> list[Any]:
    return [make.options(resources=where).remote(value)]


@shoal.remote(num_cpus=0)
class Keeper:
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def keep(self, box: list[Any]) -> int:
        self.kept += box
        return len(self.kept)

    def first(self) -> int:
        return int(np.ravel(shoal.get(self.kept[0]))[0])

    def give(self) -> list[Any]:
        return list(self.kept)

    def open_and_forget_the_box(self) -> int:
        """Take the refs out of a value that nobody else keeps, and use them after the value is gone."""
        inner = [ref for box in self.kept for ref in shoal.get(box)]
        self.kept = []
        gc.collect()
        self.kept = inner
        return len(inner)

    def drop(self) -> None:
        self.kept = []

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def owner_of(self, value: int, pending: bool) -> list[Any]:
        """A ref that this process owns: of a value that it put, or of a task that never ends."""
        return [sleep_for_ever.remote()] if pending else [shoal.put(np.full(2 << 20, value, dtype=np.uint8))]


@shoal.remote(num_cpus=0)
def sleep_for_ever() -> None:
    time.sleep(3600)


def keeper(where: dict[str, float]) -> Any:
    return Keeper.options(resources=where).remote()


# ---------------------------------------------------------------------------------------------- arguments and results


def test_a_ref_inside_an_argument(trio: Cluster) -> None:
    for where in (LEFT, RIGHT):
        assert shoal.get(first_of.options(resources=where).remote([shoal.put(large(7))]), timeout=20) == 7


def test_refs_that_are_dropped_at_once_live_until_the_task_has_used_them(trio: Cluster) -> None:
    refs = [
        first_of.options(resources=where).remote([make.options(resources=other).remote(n)])
        for n in range(10)
        for where, other in ((LEFT, RIGHT), (RIGHT, LEFT))
    ]
    gc.collect()
    assert shoal.get(refs, timeout=30) == [n for n in range(10) for _ in range(2)]


def test_a_task_returns_refs_of_what_it_put(trio: Cluster) -> None:
    box = shoal.get(put_and_return.options(resources=LEFT).remote(3), timeout=20)
    assert shoal.get(box[0], timeout=20)[0] == 3
    assert shoal.get(first_of.options(resources=RIGHT).remote(box), timeout=20) == 3


def test_a_task_returns_refs_of_tasks_it_submitted_elsewhere(trio: Cluster) -> None:
    box = shoal.get(submit_and_return.options(resources=LEFT).remote(4, RIGHT), timeout=20)
    assert shoal.get(box[0], timeout=20)[0] == 4


def test_a_result_with_refs_passed_on_without_being_read(trio: Cluster) -> None:
    box = put_and_return.options(resources=LEFT).remote(5)
    assert shoal.get(first_of.options(resources=RIGHT).remote(box), timeout=20) == 5


def test_values_inside_values_inside_values(trio: Cluster) -> None:
    ref: Any = shoal.put(large(1))
    for _ in range(20):
        ref = shoal.put([ref])
    gc.collect()

    @shoal.remote(num_cpus=0)
    def dig(box: list[Any]) -> int:
        value: Any = box
        while isinstance(value, list):
            value = shoal.get(value[0])
        return int(value[0])

    assert shoal.get(dig.options(resources=LEFT).remote(ref), timeout=30) == 1


def test_large_values_that_contain_refs(trio: Cluster) -> None:
    inner = make.options(resources=LEFT).remote(6)
    outer = shoal.put([large(), inner])
    del inner

    @shoal.remote(num_cpus=0)
    def look(box: list[Any]) -> int:
        return int(shoal.get(box[1])[0])

    assert shoal.get(look.options(resources=RIGHT).remote(outer), timeout=20) == 6


def test_the_same_ref_many_times_over_many_tasks(trio: Cluster) -> None:
    ref = make.options(resources=LEFT).remote(8)
    refs = [first_of.options(resources=(LEFT, RIGHT, {})[n % 3]).remote([ref, ref]) for n in range(60)]
    del ref
    assert shoal.get(refs, timeout=40) == [8] * 60


# --------------------------------------------------------------------------------------------------------------- actors


def test_an_actor_keeps_what_its_caller_dropped(trio: Cluster) -> None:
    actor = keeper(LEFT)
    refs = [shoal.put(large(9)), make.options(resources=RIGHT).remote(9)]
    assert shoal.get(actor.keep.remote(refs), timeout=20) == 2
    del refs
    gc.collect()
    assert shoal.get(actor.first.remote(), timeout=20) == 9
    assert wait_until(lambda: sum(used().values()) >= 2 * SIZE, 5)
    shoal.get(actor.drop.remote(), timeout=20)
    assert wait_until(lambda: not any(used().values()), 8), used()


def test_refs_go_from_actor_to_actor(trio: Cluster) -> None:
    one, two = keeper(LEFT), keeper(RIGHT)
    shoal.get(one.keep.remote([shoal.put(large(3))]), timeout=20)
    shoal.get(two.keep.remote(shoal.get(one.give.remote(), timeout=20)), timeout=20)
    shoal.get(one.drop.remote(), timeout=20)
    gc.collect()
    assert shoal.get(two.first.remote(), timeout=20) == 3


def test_refs_taken_out_of_a_value_outlive_it(trio: Cluster) -> None:
    for n in range(5):
        actor = keeper(LEFT)
        box = put_and_return.options(resources=RIGHT).remote(n)
        shoal.get(actor.keep.remote([box]), timeout=20)
        del box
        gc.collect()
        assert shoal.get(actor.open_and_forget_the_box.remote(), timeout=20) == 1
        assert shoal.get(actor.first.remote(), timeout=20) == n


def test_what_a_dead_actor_kept_is_given_back(trio: Cluster) -> None:
    actor = keeper(LEFT)
    shoal.get(actor.keep.remote([shoal.put(large()), make.options(resources=RIGHT).remote(1)]), timeout=20)
    assert wait_until(lambda: sum(used().values()) >= 2 * SIZE, 5)
    shoal.kill(actor)
    assert wait_until(lambda: not any(used().values()), 5), used()


def test_an_actor_whose_handle_is_inside_a_value_lives_as_long_as_the_value(trio: Cluster) -> None:
    box = shoal.put([keeper(LEFT)])
    gc.collect()

    @shoal.remote(num_cpus=0)
    def call(handles: list[Any]) -> int:
        return int(shoal.get(handles[0].keep.remote([1, 2, 3])))

    assert shoal.get(call.options(resources=RIGHT).remote(box), timeout=20) == 3
    runtime: Any = slot.current
    assert living_actors(runtime) == 1
    del box
    assert wait_until(lambda: living_actors(runtime) == 0, 8)


def living_actors(runtime: Any) -> int:
    from shoal.control.messages import ListActors

    actors = runtime.ask_control(ListActors(named_only=False, namespace="")).actors
    return sum(actor.state != "dead" for actor in actors)


# -------------------------------------------------------------------------------------------------- owners that die


def test_what_a_dead_owner_finished_lives_on(trio: Cluster) -> None:
    actor = keeper(LEFT)
    (ref,) = shoal.get(actor.owner_of.remote(5, False), timeout=20)
    with pytest.raises(Exception, match="SIGKILL"):
        shoal.get(actor.die.remote(), timeout=20)
    assert wait_until(used_after_report, 5)
    assert shoal.get(ref, timeout=20)[0] == 5
    assert shoal.get(first_of.options(resources=RIGHT).remote([ref]), timeout=20) == 5


def used_after_report() -> bool:
    return any(used().values())


def test_what_a_dead_owner_still_owed_is_an_owner_died_error(trio: Cluster) -> None:
    actor = keeper(LEFT)
    (ref,) = shoal.get(actor.owner_of.remote(0, True), timeout=20)
    waiting = first_of.options(resources=RIGHT).remote([ref])
    ready, _ = shoal.wait([ref, waiting], timeout=0.3)
    assert not ready
    with pytest.raises(Exception, match="SIGKILL"):
        shoal.get(actor.die.remote(), timeout=20)
    with pytest.raises(OwnerDiedError):
        shoal.get(ref, timeout=5)
    with pytest.raises(OwnerDiedError):
        shoal.get(waiting, timeout=5)


def test_a_worker_that_dies_with_results_it_stored_leaves_no_bytes(trio: Cluster) -> None:
    @shoal.remote(num_cpus=0, max_retries=0, num_returns=2)
    def store_one_and_die() -> Any:
        class Deadly:
            def __reduce__(self) -> Any:
                time.sleep(0.2)  # the first result is stored by then
                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError

        return np.zeros(2 << 20, dtype=np.uint8), Deadly()

    for where in (LEFT, RIGHT, {}):
        refs = store_one_and_die.options(resources=where).remote()
        with pytest.raises(Exception, match="SIGKILL"):
            shoal.get(refs, timeout=20)


def test_a_lost_home_is_said(trio: Cluster) -> None:
    """The node of the process that put a value is gone, and with it who counts its references."""
    node = trio.add_node(num_cpus=1, resources={"third": 1})
    box = shoal.get(put_and_return.options(resources={"third": 0.1}).remote(1), timeout=20)
    trio.remove_node(node, allow_graceful=False)
    with pytest.raises(ObjectLostError, match=node.node_id[:12]):
        shoal.get(box[0], timeout=20)
    trio.wait_for_nodes()


def test_who_borrows_a_reference_on_another_node_can_cancel_its_call() -> None:
    @shoal.remote(num_cpus=0, resources=RIGHT)
    def endless() -> None:
        while True:
            time.sleep(1)

    @shoal.remote(num_cpus=0, resources=LEFT)
    def cancel(refs: list[shoal.ObjectRef[Any]]) -> None:
        shoal.cancel(refs[0])

    ref = endless.remote()
    shoal.get(cancel.remote([ref]), timeout=30)
    with pytest.raises(TaskCancelledError):
        shoal.get(ref, timeout=30)


def test_refs_in_closures_and_defaults_live_with_the_function(trio: Cluster) -> None:
    """And that may be called at any time, by the driver and by the workers that know it: the last test of this module,
    since what it put stays until those processes end."""
    ref = shoal.put(large(2))

    @shoal.remote(num_cpus=0)
    def closes_over() -> int:
        return int(shoal.get(ref)[0])

    assert shoal.get(closes_over.options(resources=LEFT).remote(), timeout=20) == 2
    runtime: Any = slot.current
    runtime._kept_for_good.clear()  # documented: such a ref lives as long as its process
