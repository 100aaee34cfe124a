"""Whatever is killed, what belonged to it is gone within seconds, the others go on, and nobody waits for ever."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import session
from shoal.cluster_utils import Cluster, Node
from shoal.exceptions import (
    ActorDiedError,
    LocalAgentDiedError,
    NodeDiedError,
    ObjectLostError,
    WorkerCrashedError,
)
from shoal.runtime import slot

MIB = 1 << 20
LIMIT_S = 5.0
"""Within this, everything that belonged to the dead must be gone."""
Make = Callable[..., Cluster]


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# ----------------------------------------------------------------------------------------------------- processes


def parents() -> dict[int, tuple[int, str, str]]:
    """Pid -> (parent, name, state) of all processes."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                head, _, rest = Path(entry.path, "stat").read_text().rpartition(")")
            except OSError:
                continue
            words = rest.split()
            found[int(entry.name)] = (int(words[1]), head.partition("(")[2], words[0])
    return found


def below(root: int) -> set[int]:
    """A process and everything below it."""
    table = parents()
    found = {root}
    while more := {pid for pid, (parent, _, _) in table.items() if parent in found} - found:
        found |= more
    return found


def alive(pids: set[int]) -> dict[int, str]:
    table = parents()
    return {pid: table[pid][1] for pid in pids if pid in table and table[pid][2] != "Z"}


def part(node: Node, name: str) -> int:
    """The pid of one of a node's processes: agent, zygote, control."""
    table = parents()
    return next(pid for pid in below(node.pid) if table[pid][1] == f"shoal::{name}")


# ---------------------------------------------------------------------------------------------------- user's code


@shoal.remote(num_cpus=0)
def pid_of() -> int:
    return os.getpid()


@shoal.remote(num_cpus=0, max_retries=0)
def start_children_and_hang(folder: str) -> None:
    """One child in the worker's process group, one in a session of its own, and a grandchild whose parent has gone."""
    plain = subprocess.Popen(["sleep", "3600"])
    subprocess.Popen(["sh", "-c", "sleep 3600 & exec sleep 3601"])
    detached = subprocess.Popen(["sleep", "3602"], start_new_session=True)
    Path(folder, "being-written").write_text(f"{plain.pid} {detached.pid}")
    Path(folder, "being-written").rename(Path(folder, "children"))
    time.sleep(3600)


@shoal.remote(num_cpus=0, max_retries=0)
def hang() -> None:
    time.sleep(3600)


@shoal.remote(num_cpus=0)
def big(value: int) -> bytes:
    return bytes([value]) * (3 << 20)


@shoal.remote(num_cpus=0)
class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def hang(self) -> None:
        time.sleep(3600)


def used() -> int:
    runtime: Any = slot.current
    return sum(node.store_used for node in runtime.status().nodes if node.alive)


def living_actors() -> int:
    from shoal.control.messages import ListActors

    runtime: Any = slot.current
    actors = runtime.ask_control(ListActors(named_only=False, namespace="")).actors
    return sum(actor.state != "dead" for actor in actors)


# ---------------------------------------------------------------------------------------- a node, in whichever way


@pytest.mark.parametrize("victim", ["supervisor", "agent", "zygote", "everything"])
def test_a_killed_node_is_gone_and_the_others_go_on(make_cluster: Make, tmp_path: Path, victim: str) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    node = cluster.add_node(num_cpus=2, resources={"doomed": 1})
    cluster.connect()
    there = {"doomed": 0.01}
    running = start_children_and_hang.options(resources=there).remote(str(tmp_path))
    actor = Counter.options(resources=there).remote()
    assert shoal.get(actor.add.remote(), timeout=20) == 1
    call = actor.hang.remote()
    stored = big.options(resources=there).remote(1)
    shoal.wait([stored], timeout=20, fetch_local=False)
    assert wait_until((tmp_path / "children").exists, 10)
    belonging = below(node.pid) | {int(pid) for pid in (tmp_path / "children").read_text().split()}
    begin = time.monotonic()
    if victim == "everything":
        cluster.remove_node(node, allow_graceful=False)
    else:
        os.kill(node.pid if victim == "supervisor" else part(node, victim), signal.SIGKILL)

    with pytest.raises((NodeDiedError, WorkerCrashedError), match=node.node_id[:12]):
        shoal.get(running, timeout=LIMIT_S)
    with pytest.raises(ActorDiedError, match=node.node_id[:12]):
        shoal.get(call, timeout=LIMIT_S)
    with pytest.raises(ActorDiedError):
        shoal.get(actor.add.remote(), timeout=LIMIT_S)
    with pytest.raises(ObjectLostError, match=node.node_id[:12]):
        shoal.get(stored, timeout=LIMIT_S)
    assert wait_until(lambda: not alive(belonging), LIMIT_S - (time.monotonic() - begin)), alive(belonging)
    assert wait_until(lambda: living_actors() == 0, LIMIT_S)
    assert shoal.get([pid_of.remote() for _ in range(10)], timeout=10)
    assert shoal.get(big.remote(2), timeout=10)[0] == 2
    assert "doomed" not in shoal.cluster_resources()
    rows = {row["NodeID"]: row for row in shoal.nodes()}
    assert not rows[node.node_id]["Alive"]


def test_a_node_that_is_told_to_end_leaves_nothing(make_cluster: Make, tmp_path: Path) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    node = cluster.add_node(num_cpus=2, resources={"leaving": 1})
    cluster.connect()
    folder = session.NodeFolder(Path(node.logs).parent)
    running = start_children_and_hang.options(resources={"leaving": 0.1}).remote(str(tmp_path))
    assert wait_until((tmp_path / "children").exists, 10)
    belonging = below(node.pid) | {int(pid) for pid in (tmp_path / "children").read_text().split()}
    cluster.remove_node(node)
    assert not alive(belonging)
    with pytest.raises((NodeDiedError, WorkerCrashedError), match=node.node_id[:12]):
        shoal.get(running, timeout=LIMIT_S)
    assert {entry.name for entry in folder.path.iterdir()} == {"logs"}


def test_tasks_with_retries_run_elsewhere_when_their_node_dies(make_cluster: Make) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    first = cluster.add_node(num_cpus=2, resources={"any": 10})
    cluster.connect()

    @shoal.remote(resources={"any": 1}, max_retries=2)
    def steps(doomed: str) -> str:
        here = shoal.get_runtime_context().get_node_id()
        if here == doomed:
            time.sleep(3600)
        return str(here)

    refs = [steps.remote(first.node_id) for _ in range(2)]
    shoal.wait(refs, timeout=0.5)
    second = cluster.add_node(num_cpus=2, resources={"any": 10})
    cluster.remove_node(first, allow_graceful=False)
    assert shoal.get(refs, timeout=20) == [second.node_id] * 2


def test_an_actor_with_restarts_comes_back_on_another_node(make_cluster: Make) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    first = cluster.add_node(num_cpus=2, resources={"any": 10})
    cluster.connect()
    actor = Counter.options(resources={"any": 1}, max_restarts=1, max_task_retries=-1).remote()
    assert shoal.get(actor.add.remote(), timeout=20) == 1
    cluster.add_node(num_cpus=2, resources={"any": 10})
    cluster.remove_node(first, allow_graceful=False)
    assert shoal.get(actor.add.remote(), timeout=20) == 1, "a new one, elsewhere"


def test_a_node_that_hangs_is_given_up(make_cluster: Make) -> None:
    """Its connections stay open and say nothing; after the heartbeat's patience everybody is told."""
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2, "node_timeout_s": 3.0})
    node = cluster.add_node(num_cpus=2, resources={"frozen": 1})
    cluster.connect()
    stored = big.options(resources={"frozen": 0.1}).remote(1)
    shoal.wait([stored], timeout=20, fetch_local=False)
    processes = below(node.pid)
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(ObjectLostError, match=node.node_id[:12]):
            shoal.get(stored, timeout=40)
    finally:
        for pid in processes:
            with suppress(ProcessLookupError):  # those that went on first have ended the others
                os.kill(pid, signal.SIGCONT)
    assert wait_until(lambda: not alive(processes), LIMIT_S), "control told it that it is dead"


# ------------------------------------------------------------------------------------------------- the driver's node


@pytest.mark.parametrize("victim", ["supervisor", "agent", "zygote", "control"])
def test_a_driver_whose_node_is_killed_is_told_and_nothing_is_left(
    make_cluster: Make, tmp_path: Path, victim: str
) -> None:
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    other = cluster.add_node(num_cpus=1)
    cluster.connect()
    head = cluster.head_node
    assert head is not None
    running = start_children_and_hang.remote(str(tmp_path))
    actor = Counter.remote()
    shoal.get(actor.add.remote(), timeout=20)
    call = actor.hang.remote()
    pending = [running, call]
    assert wait_until((tmp_path / "children").exists, 10)
    children = {int(pid) for pid in (tmp_path / "children").read_text().split()}
    belonging = below(head.pid) | below(other.pid) | children
    begin = time.monotonic()
    os.kill(head.pid if victim == "supervisor" else part(head, victim), signal.SIGKILL)
    for ref in pending:
        with pytest.raises((LocalAgentDiedError, NodeDiedError, WorkerCrashedError, ActorDiedError)):
            shoal.get(ref, timeout=LIMIT_S)
    assert wait_until(lambda: not alive(belonging), LIMIT_S - (time.monotonic() - begin)), alive(belonging)
    for use in (lambda: shoal.put(bytes(1 << 20)), lambda: shoal.get(pid_of.remote()), shoal.nodes, Counter.remote):
        with pytest.raises(LocalAgentDiedError):
            use()  # type: ignore[operator]
    shoal.shutdown()
    assert not shoal.is_initialized()


# ------------------------------------------------------------------------------------------------------- a worker


def test_a_killed_worker_takes_its_children_with_it(local: object, tmp_path: Path) -> None:
    running = start_children_and_hang.remote(str(tmp_path))
    assert wait_until((tmp_path / "children").exists, 10)
    plain = int((tmp_path / "children").read_text().split()[0])
    worker = parents()[plain][0]
    group = {pid for pid in parents() if session_of(pid) == worker}
    assert len(group) >= 3
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError, match="SIGKILL"):
        shoal.get(running, timeout=LIMIT_S)
    assert wait_until(lambda: not alive(group), LIMIT_S), alive(group)


def session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return -1


def test_a_killed_actor_is_dead_for_everybody_and_its_name_is_free(local: object) -> None:
    actor = Counter.options(name="mortal").remote()
    pid = shoal.get(actor.pid.remote(), timeout=20)
    call = actor.hang.remote()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ActorDiedError, match="SIGKILL"):
        shoal.get(call, timeout=LIMIT_S)
    with pytest.raises(ActorDiedError):
        shoal.get(actor.add.remote(), timeout=LIMIT_S)
    with pytest.raises(ValueError, match="mortal"):
        shoal.get_actor("mortal")
    assert shoal.get(Counter.options(name="mortal").remote().add.remote(), timeout=20) == 1


def test_what_a_killed_worker_held_is_free_again(local: object) -> None:
    @shoal.remote(num_cpus=2, resources={"special": 2}, max_retries=0)
    def hold() -> None:
        value = shoal.put(bytes(5 << 20))
        assert value
        time.sleep(3600)

    ref = hold.remote()
    assert wait_until(lambda: used() > 5 * MIB, 10)
    runtime: Any = slot.current
    worker = next(pid for pid, (_, name, _) in parents().items() if "hold" in name and pid in below(local_root()))
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError):
        shoal.get(ref, timeout=LIMIT_S)
    assert wait_until(lambda: used() == 0, LIMIT_S)
    assert wait_until(lambda: shoal.available_resources().get("CPU") == 2, LIMIT_S)
    assert shoal.available_resources()["special"] == 2
    del runtime


def local_root() -> int:
    runtime: Any = slot.current
    return int(runtime.node.process.pid)


# -------------------------------------------------------------------------------------------------------- a driver

DRIVER = """
import os, sys, time, subprocess
import shoal

@shoal.remote(num_cpus=0)
class Actor:
    def pid(self): return os.getpid()

@shoal.remote(num_cpus=0)
def nap(folder):
    child = subprocess.Popen(["sleep", "3600"])
    name = os.path.join(folder, f"nap-{os.getpid()}")
    with open(name + ".tmp", "w") as file:
        file.write(str(child.pid))
    os.rename(name + ".tmp", name)
    time.sleep(3600)

shoal.init(address=sys.argv[1])
held = shoal.put(bytes(4 << 20))
actors = [Actor.options(resources={side: 0.1}).remote() for side in ("left", "right")]
kept = Actor.options(name="kept", lifetime="detached", namespace="survivors").remote()
pids = shoal.get([actor.pid.remote() for actor in [*actors, kept]])
naps = [nap.options(resources={side: 0.1}).remote(sys.argv[2]) for side in ("left", "right")]
stored = [shoal.put([held]) for _ in range(10)]
while len([name for name in os.listdir(sys.argv[2]) if name.startswith("nap-") and "." not in name]) < 2:
    time.sleep(0.01)
print(*pids, flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Cluster]:
    """A cluster that this process's driver shares with other drivers."""
    shoal.shutdown()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for side in ("left", "right"):
        cluster.add_node(num_cpus=2, resources={side: 1}, wait=False)
    cluster.wait_for_nodes()
    cluster.connect()
    yield cluster
    cluster.shutdown()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_ends_leaves_nothing_behind(shared: Cluster, tmp_path: Path, how: signal.Signals) -> None:
    before = used()
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, shared.address, str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(Path(shoal.__file__).parents[1])},
    )  # fmt: skip
    assert driver.stdout is not None
    words = driver.stdout.readline().split()
    assert len(words) == 3
    *actors, kept = (int(word) for word in words)
    naps = {int(path.name[4:]) for path in tmp_path.glob("nap-*")}
    naps |= {int(path.read_text()) for path in tmp_path.glob("nap-*")}
    belonging = set(actors) | naps
    assert len(alive(belonging)) == 6
    assert wait_until(lambda: used() > before + 4 * MIB, 5)
    driver.send_signal(how)
    driver.wait(10)
    driver.stdout.close()
    assert wait_until(lambda: not alive(belonging), LIMIT_S), alive(belonging)
    assert wait_until(lambda: used() == before, LIMIT_S), used()
    assert alive({kept}), "a detached actor lives on"
    assert wait_until(lambda: living_actors() == 1, LIMIT_S)
    assert wait_until(lambda: shoal.available_resources().get("CPU") == shoal.cluster_resources()["CPU"], LIMIT_S)
    shoal.kill(shoal.get_actor("kept", namespace="survivors"))
    assert wait_until(lambda: not alive({kept}), LIMIT_S)
