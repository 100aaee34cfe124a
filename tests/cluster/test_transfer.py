"""Large objects on their way between nodes: once per node, whatever dies, and back-pressure when a store is full."""

from __future__ import annotations

import gc
import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.cluster_utils import Cluster, Node
from shoal.exceptions import ObjectLostError, ObjectStoreFullError
from shoal.runtime import slot

MIB = 1 << 20


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
    return {node.node_id.hex(): node.store_used for node in runtime.status().nodes if node.alive}


@shoal.remote(num_cpus=0)
def make(size: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


@shoal.remote(num_cpus=0)
def digest(data: Any) -> str:
    assert not data.flags.writeable
    return hashlib.blake2b(data).hexdigest()


@shoal.remote(num_cpus=0)
def same(data: Any) -> Any:
    return data


def expected(size: int, seed: int = 0) -> str:
    return hashlib.blake2b(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)).hexdigest()


class Pair:
    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 300 * MIB})
        self.left = self.cluster.add_node(
            num_cpus=2, resources={"left": 100}, object_store_memory=200 * MIB, log_level="debug"
        )
        self.right = self.cluster.add_node(num_cpus=2, resources={"right": 100}, object_store_memory=200 * MIB)
        self.cluster.connect()
        assert self.cluster.head_node is not None
        self.head = self.cluster.head_node


@shoal.remote
def is_at_home(refs: list[Any]) -> bool:
    """Asks the home, since this is a borrower: true once a copy was reported there."""
    ready, _ = shoal.wait(refs, timeout=20, fetch_local=False)
    return bool(ready)


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.cluster.shutdown()


@pytest.fixture(autouse=True)
def stores_come_back() -> Iterator[None]:
    """Whatever a test does, all stores of living nodes are as empty afterwards as before."""
    yield
    gc.collect()
    if shoal.is_initialized():
        assert wait_until(lambda: not any(used().values()), 8), used()


LEFT, RIGHT = {"left": 0.01}, {"right": 0.01}


@pytest.mark.parametrize("size", [200 * 1024, 16 * MIB, 16 * MIB + 1, 50 * MIB + 7])
def test_a_value_arrives_whole(pair: Pair, size: int) -> None:
    ref = make.options(resources=LEFT).remote(size, 1)
    there = digest.options(resources=RIGHT).remote(ref)
    assert shoal.get(there, timeout=30) == expected(size, 1)
    assert hashlib.blake2b(shoal.get(ref, timeout=30)).hexdigest() == expected(size, 1)


def test_put_here_used_there_returned_back(pair: Pair) -> None:
    data = np.arange(3 * MIB, dtype=np.uint8)
    ref = shoal.put(data)
    back = same.options(resources=LEFT).remote(same.options(resources=RIGHT).remote(ref))
    got = shoal.get(back, timeout=30)
    assert np.array_equal(got, data)
    del got


def test_many_tasks_share_one_transfer_and_one_copy(pair: Pair) -> None:
    ref = shoal.put(np.zeros(20 * MIB, dtype=np.uint8))
    before = used()[pair.left.node_id]
    refs = [digest.options(resources=LEFT).remote(ref) for _ in range(10)]
    assert len(set(shoal.get(refs, timeout=30))) == 1
    assert wait_until(lambda: used()[pair.left.node_id] - before > 20 * MIB, 5)
    assert used()[pair.left.node_id] - before < 21 * MIB
    pulls = sum("pulled object=" + ref.hex() in line for line in agent_log(pair.left))
    assert pulls == 1


def agent_log(node: Node) -> list[str]:
    with open(os.path.join(node.logs, "agent.log")) as file:
        return file.read().splitlines()


def test_several_large_values_at_once_in_both_directions(pair: Pair) -> None:
    lefts = [make.options(resources=LEFT).remote(8 * MIB, n) for n in range(4)]
    rights = [make.options(resources=RIGHT).remote(8 * MIB, n) for n in range(4)]
    crossed = [digest.options(resources=RIGHT).remote(ref) for ref in lefts]
    crossed += [digest.options(resources=LEFT).remote(ref) for ref in rights]
    assert shoal.get(crossed, timeout=40) == [expected(8 * MIB, n) for n in range(4)] * 2


def test_wait_without_fetching_leaves_the_value_where_it_is(pair: Pair) -> None:
    ref = make.options(resources=LEFT).remote(5 * MIB)
    ready, _ = shoal.wait([ref], timeout=20, fetch_local=False)
    assert ready == [ref]
    assert wait_until(lambda: used()[pair.left.node_id] > 5 * MIB, 5)
    assert used()[pair.head.node_id] == 0
    ready, _ = shoal.wait([ref], timeout=20)
    assert ready == [ref]
    assert wait_until(lambda: used()[pair.head.node_id] > 5 * MIB, 5)


# ------------------------------------------------------------------------------------------------------ full stores


@shoal.remote(num_cpus=0)
class Holder:
    """Reads values, which pins them."""

    def __init__(self) -> None:
        self.values: list[np.ndarray] = []

    def hold(self, refs: list[shoal.ObjectRef[np.ndarray]]) -> None:
        self.values = shoal.get(refs)

    def drop(self, count: int) -> None:
        del self.values[:count]


def test_copies_from_elsewhere_make_room_and_can_be_fetched_again(pair: Pair) -> None:
    refs = [make.options(resources=LEFT).remote(40 * MIB, n) for n in range(4)]  # 160 of left's 200 MiB
    sums = shoal.get([digest.options(resources=RIGHT).remote(ref) for ref in refs], timeout=40)
    own = make.options(resources=RIGHT).remote(150 * MIB, 9)  # only without those copies
    assert shoal.get(digest.options(resources=RIGHT).remote(own), timeout=40) == expected(150 * MIB, 9)
    del own
    again = shoal.get([digest.options(resources=RIGHT).remote(ref) for ref in refs], timeout=40)
    assert again == sums == [expected(40 * MIB, n) for n in range(4)]


def test_more_than_fits_is_an_error_that_names_the_sizes(pair: Pair) -> None:
    held = [shoal.get(shoal.put(np.zeros(90 * MIB, dtype=np.uint8))) for _ in range(3)]  # read, so none can be spilled
    with pytest.raises(ObjectStoreFullError, match=str(300 * MIB)):
        shoal.put(np.zeros(90 * MIB, dtype=np.uint8))
    del held[0]
    assert shoal.put(np.zeros(90 * MIB, dtype=np.uint8))
    with pytest.raises(ObjectStoreFullError, match="can never fit"):
        shoal.put(np.zeros(310 * MIB, dtype=np.uint8))


def test_a_result_that_does_not_fit_is_the_tasks_error(pair: Pair) -> None:
    with pytest.raises(ObjectStoreFullError, match="can never fit"):
        shoal.get(make.options(resources=LEFT).remote(250 * MIB), timeout=30)


def test_who_waits_for_room_goes_on_when_refs_are_dropped(pair: Pair) -> None:
    holder = Holder.options(resources=LEFT).remote()
    shoal.get(holder.hold.remote([make.options(resources=LEFT).remote(60 * MIB) for _ in range(3)]), timeout=30)
    late = make.options(resources=LEFT).remote(60 * MIB, 5)
    ready, _ = shoal.wait([late], timeout=0.5, fetch_local=False)
    assert not ready
    shoal.get(holder.drop.remote(2), timeout=20)
    assert shoal.get(digest.options(resources=LEFT).remote(late), timeout=20) == expected(60 * MIB, 5)


def test_a_stream_of_values_larger_than_the_store(pair: Pair) -> None:
    """Each is dropped after its use: back-pressure, and no error."""
    total = 0
    for n in range(12):
        total += int(shoal.get(make.options(resources=LEFT).remote(50 * MIB, n), timeout=30)[0] >= 0)
    assert total == 12


def test_a_fetch_into_a_full_store_says_so(pair: Pair) -> None:
    mine = [shoal.get(shoal.put(np.zeros(95 * MIB, dtype=np.uint8))) for _ in range(3)]
    far = make.options(resources=LEFT).remote(60 * MIB)
    with pytest.raises(ObjectStoreFullError, match="no room"):
        shoal.get(far, timeout=30)
    del mine[0]
    assert shoal.get(far, timeout=30).nbytes == 60 * MIB


# --------------------------------------------------------------------------------------------------- sources that die


@pytest.fixture
def disposable(pair: Pair) -> Iterator[Node]:
    node = pair.cluster.add_node(num_cpus=2, resources={"gone": 100}, object_store_memory=400 * MIB)
    yield node
    if node in pair.cluster.worker_nodes:
        pair.cluster.remove_node(node, allow_graceful=False)
    pair.cluster.wait_for_nodes()


GONE = {"gone": 0.01}


def test_another_copy_serves_when_the_source_is_killed_amid_the_transfer(pair: Pair, disposable: Node) -> None:
    size = 190 * MIB
    ref = make.options(resources=GONE).remote(size, 3)
    assert shoal.get(digest.options(resources=LEFT).remote(ref), timeout=40) == expected(size, 3)
    result = digest.options(resources=RIGHT).remote(ref)
    wait_until(lambda: used()[pair.right.node_id] > 0, 10)  # room was made: the bytes flow
    pair.cluster.remove_node(disposable, allow_graceful=False)
    assert shoal.get(result, timeout=40) == expected(size, 3)


def test_a_clear_error_when_the_only_source_is_killed_amid_the_transfer(pair: Pair, disposable: Node) -> None:
    ref = make.options(resources=GONE).remote(190 * MIB)
    shoal.wait([ref], timeout=40, fetch_local=False)
    # The owner may know of the result before its home has heard of the copy, and without that no transfer begins.
    assert shoal.get(is_at_home.options(resources=LEFT).remote([ref]), timeout=20)
    os.kill(agent_of(disposable), signal.SIGSTOP)  # else the transfer may be over before the kill
    result = digest.options(resources=LEFT).remote(ref)
    assert wait_until(lambda: used()[pair.left.node_id] > 0, 10), "room was made"
    pair.cluster.remove_node(disposable, allow_graceful=False)
    begin = time.monotonic()
    with pytest.raises(ObjectLostError, match=disposable.node_id[:12]):
        shoal.get(result, timeout=20)
    assert time.monotonic() - begin < 5


def test_a_source_that_is_stopped_is_given_up_when_its_node_is_declared_dead(pair: Pair, disposable: Node) -> None:
    ref = make.options(resources=GONE).remote(100 * MIB)
    shoal.wait([ref], timeout=40, fetch_local=False)
    agent = agent_of(disposable)
    os.kill(agent, signal.SIGSTOP)
    result = digest.options(resources=LEFT).remote(ref)
    ready, _ = shoal.wait([result], timeout=0.5)
    assert not ready
    os.kill(agent, signal.SIGKILL)
    with pytest.raises(ObjectLostError):
        shoal.get(result, timeout=20)


def agent_of(node: Node) -> int:
    return next(pid for pid, name in below(node.pid) if name == "shoal::agent")


def below(supervisor: int) -> list[tuple[int, str]]:
    """Pid and name of the supervisor's children."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                with open(f"{entry.path}/stat") as file:
                    head, _, rest = file.read().rpartition(")")
            except OSError:
                continue
            if int(rest.split()[1]) == supervisor:
                found.append((int(entry.name), head.partition("(")[2]))
    return found
