"""Several nodes: what runs where, joining and leaving, addresses, tokens, devices, and one port for each."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import shoal
from shoal.cluster_utils import Cluster
from shoal.exceptions import GetTimeoutError, ShoalError
from shoal.node.launch import NodeOptions, start_node
from shoal.runtime import slot
from shoal.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@shoal.remote
def where() -> str:
    return shoal.get_runtime_context().get_node_id()


@shoal.remote
def where_after(seconds: float) -> str:
    time.sleep(seconds)
    return shoal.get_runtime_context().get_node_id()


@shoal.remote(num_cpus=0)
class Here:
    def where(self) -> str:
        return shoal.get_runtime_context().get_node_id()

    def devices(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


@shoal.remote
def where_is(actor: Any) -> tuple[str, str]:
    """Node of this task, and of the actor that it calls."""
    return shoal.get_runtime_context().get_node_id(), shoal.get(actor.where.remote())


class Trio:
    """A head and two nodes, "left" and "right", with a driver on the head."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        self.left = self.cluster.add_node(num_cpus=2, resources={"left": 2}, labels={"side": "left"}, wait=False)
        self.right = self.cluster.add_node(num_cpus=2, resources={"right": 2}, num_gpus=2, wait=False)
        self.cluster.wait_for_nodes()
        self.cluster.connect()
        assert self.cluster.head_node is not None
        self.head = self.cluster.head_node


@pytest.fixture(scope="module")
def trio() -> Iterator[Trio]:
    made = Trio()
    yield made
    made.cluster.shutdown()


# ------------------------------------------------------------------------------------------------- what runs where


def test_custom_resources_place_tasks(trio: Trio) -> None:
    here = [where.options(resources={"left": 1}).remote(), where.options(resources={"right": 0.01}).remote()]
    assert shoal.get(here, timeout=20) == [trio.left.node_id, trio.right.node_id]


def test_tasks_spill_over_to_all_nodes_when_the_local_one_is_busy(trio: Trio) -> None:
    nodes = Counter(shoal.get([where_after.remote(0.5) for _ in range(5)], timeout=20))
    assert set(nodes) == {trio.head.node_id, trio.left.node_id, trio.right.node_id}


def test_short_tasks_stay_near_and_all_end(trio: Trio) -> None:
    nodes = Counter(shoal.get([where.remote() for _ in range(3000)], timeout=30))
    assert sum(nodes.values()) == 3000


def test_affinity_to_a_node(trio: Trio) -> None:
    for node in (trio.head, trio.left, trio.right):
        strategy = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        assert shoal.get(where.options(scheduling_strategy=strategy).remote(), timeout=20) == node.node_id


def test_affinity_to_a_node_that_is_not_there(trio: Trio) -> None:
    missing = "ab" * 28
    soft = NodeAffinitySchedulingStrategy(missing, soft=True)
    assert shoal.get(where.options(scheduling_strategy=soft).remote(), timeout=20)
    hard = where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(missing, soft=False)).remote()
    with pytest.raises((GetTimeoutError, ShoalError), match="ababab"):
        shoal.get(hard, timeout=3)
    shoal.cancel(hard)


def test_what_no_node_has_says_so_and_starts_when_one_comes(trio: Trio) -> None:
    ref = where.options(resources={"late": 1}).remote()
    with pytest.raises(GetTimeoutError, match="late"):
        shoal.get(ref, timeout=1.5)
    node = trio.cluster.add_node(num_cpus=1, resources={"late": 1})
    try:
        assert shoal.get(ref, timeout=20) == node.node_id
    finally:
        trio.cluster.remove_node(node)
        trio.cluster.wait_for_nodes()


def test_an_actor_on_one_node_is_called_by_a_task_on_another(trio: Trio) -> None:
    """The connection from node to node passes through the one port of the actor's node, to the actor itself."""
    actor = Here.options(resources={"left": 0.1}).remote()
    caller = where_is.options(resources={"right": 0.1})
    assert shoal.get(caller.remote(actor), timeout=20) == (trio.right.node_id, trio.left.node_id)
    assert shoal.get([caller.remote(actor) for _ in range(20)], timeout=20)[-1] == (
        trio.right.node_id, trio.left.node_id,
    )  # fmt: skip


def test_a_named_actor_is_found_from_every_node(trio: Trio) -> None:
    actor = Here.options(name="found", resources={"right": 0.1}).remote()

    @shoal.remote
    def look() -> str:
        return shoal.get(shoal.get_actor("found").where.remote())

    refs = [look.options(resources={side: 0.1}).remote() for side in ("left", "right")]
    assert shoal.get(refs, timeout=20) == [trio.right.node_id] * 2
    del actor


def test_nested_tasks_on_other_nodes(trio: Trio) -> None:
    @shoal.remote(num_cpus=1)
    def tree(depth: int) -> int:
        return 1 if depth == 0 else 1 + sum(shoal.get([tree.remote(depth - 1) for _ in range(2)]))

    assert shoal.get(tree.remote(5), timeout=40) == 63


# -------------------------------------------------------------------------------------------------------- devices


def test_devices_are_numbers_of_their_own_and_fractions_share_one(trio: Trio) -> None:
    @shoal.remote
    def visible(seconds: float) -> str | None:
        time.sleep(seconds)
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert shoal.get(visible.options(num_gpus=2).remote(0), timeout=20) == "0,1"
    one_each = shoal.get([visible.options(num_gpus=1, num_cpus=0).remote(0.5) for _ in range(2)], timeout=20)
    assert sorted(str(one) for one in one_each) == ["0", "1"]
    halves = shoal.get([visible.options(num_gpus=0.5, num_cpus=0).remote(0.5) for _ in range(4)], timeout=20)
    assert Counter(halves) == {"0": 2, "1": 2}
    actors = [Here.options(num_gpus=0.5).remote() for _ in range(2)]
    assert set(shoal.get([actor.devices.remote() for actor in actors], timeout=20)) <= {"0", "1"}
    del actors
    more_than_one = shoal.get(visible.options(num_gpus=1.5).remote(0), timeout=20)
    assert sorted(str(more_than_one).split(",")) == ["0", "1"]


def test_tasks_without_devices_see_none_of_them_taken_away(trio: Trio) -> None:
    """A worker that was given no device keeps the node's own setting."""

    @shoal.remote
    def visible() -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    assert shoal.get(visible.options(resources={"right": 0.1}).remote(), timeout=20) in (
        None, "", os.environ.get("CUDA_VISIBLE_DEVICES"),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- joining and leaving


def test_what_a_cluster_offers_follows_its_nodes(trio: Trio) -> None:
    before = shoal.cluster_resources()
    node = trio.cluster.add_node(num_cpus=3, resources={"extra": 5})
    assert wait_until(lambda: shoal.cluster_resources().get("extra") == 5.0, 5)
    assert shoal.cluster_resources()["CPU"] == before["CPU"] + 3
    trio.cluster.remove_node(node)
    assert wait_until(lambda: "extra" not in shoal.cluster_resources(), 5)
    rows = {row["NodeID"]: row for row in shoal.nodes()}
    assert rows[node.node_id]["Alive"] is False
    assert rows[trio.left.node_id]["Alive"] is True


def test_each_node_listens_on_one_port_and_on_loopback_only(trio: Trio) -> None:
    actor = Here.options(resources={"left": 0.1}).remote()
    shoal.get(where_is.options(resources={"right": 0.1}).remote(actor), timeout=20)
    for node in (trio.head, trio.left, trio.right):
        listening = listening_addresses(session_pids(node.pid))
        assert [f"{host}:{port}" for host, port in listening] == [node.address]


def session_pids(supervisor: int) -> set[int]:
    """The supervisor and everything below it."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {supervisor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening_addresses(pids: set[int]) -> list[tuple[str, int]]:
    """IPv4 addresses on which these processes listen, each once."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            continue
        inodes |= {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if words[3] == "0A" and words[9] in inodes:
            host, port = words[1].split(":")
            found.append((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found


def test_a_node_that_cannot_join_says_why_in_one_line_and_leaves_nothing(trio: Trio) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        silent = f"127.0.0.1:{nobody.getsockname()[1]}"
        complaints = {
            "nobody there": joining(silent, "x" * 32),
            "wrong token": joining(trio.cluster.address, "x" * 32),
            "not the head": joining(trio.left.address, trio.cluster._token),
            "no address": joining("nonsense", trio.cluster._token),
            "no such host": joining("no.such.host.invalid:6380", trio.cluster._token),
            "port taken": joining(trio.cluster.address, trio.cluster._token, port=int(trio.left.address.split(":")[1])),
        }
    for what, text in complaints.items():
        assert text, what
        assert "\n" not in text, what
        assert "Traceback" not in text, what
    assert silent in complaints["nobody there"]
    assert "token" in complaints["wrong token"]
    assert trio.cluster.address in complaints["not the head"]
    assert "nonsense" in complaints["no address"]
    assert "no.such.host" in complaints["no such host"]
    assert trio.left.address in complaints["port taken"]


def joining(address: str, token: str, port: int = 0) -> str:
    """What a node says that tries to join."""
    with pytest.raises(ShoalError) as caught:
        start_node(NodeOptions(head=False, address=address, token=token, port=port, num_cpus=1, private=True)).stop()
    return str(caught.value)


def test_a_node_of_another_version_is_refused_in_one_line(trio: Trio, tmp_path: Path) -> None:
    root = Path(shoal.__file__).parents[1]
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import shoal.version; shoal.version.__version__ = '0.0.0-other'\n"
        "import msgspec\n"
        "from shoal.node import supervisor\n"
        "sys.exit(supervisor.main())\n"
    )
    options = NodeOptions(head=False, address=trio.cluster.address, token=trio.cluster._token, private=True)
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)], input=msgspec.json.encode(options), capture_output=True,
        timeout=30, check=False,
    )  # fmt: skip
    said = msgspec.json.decode(done.stdout)
    assert said["type"] == "failed"
    assert "0.0.0-other" in said["text"]
    assert shoal.__version__ in said["text"]
    assert "\n" not in said["text"]


# ------------------------------------------------------------------------------------------------------------ IPv6


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this machine has no IPv6")
def test_a_cluster_over_ipv6(make_cluster: Callable[..., Cluster]) -> None:
    shoal.shutdown()
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 1, "node_ip_address": "::1"})
    node = cluster.add_node(num_cpus=1, resources={"far": 1}, node_ip_address="::1")
    assert node.address.startswith("[::1]:")
    cluster.connect()
    actor = Here.options(resources={"far": 0.1}).remote()
    assert shoal.get(actor.where.remote(), timeout=20) == node.node_id

    @shoal.remote(resources={"far": 0.1})
    def double(data: bytes) -> bytes:
        return data * 2

    assert len(shoal.get(double.remote(bytes(3 << 20)), timeout=20)) == 6 << 20
    runtime: Any = slot.current
    assert {row.address for row in runtime.status().nodes} == {cluster.address, node.address}
