"""Several real nodes on one machine, for tests of programs and of shoal itself.

    cluster = Cluster(initialize_head=True)
    node = cluster.add_node(num_cpus=4, resources={"shelf": 1})
    cluster.connect()
    cluster.remove_node(node, allow_graceful=False)  # as a power cut would
    cluster.shutdown()

Each node has its own processes, port, object store and folder, as on a machine of its own. The nodes are private:
nobody else's `init()` and no `shoal stop` meets them. They end with this process, however it ends.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from shoal import session
from shoal.control.messages import GetStatus, NodeInfo, ProcessReply, StatusReply
from shoal.exceptions import ClusterNotFoundError, ShoalError
from shoal.node.launch import NodeOptions, RunningNode, StartingNode, spawn_node
from shoal.rpc.aio import connect

STOP_GRACE_S: Final = 10.0
DEFAULT_STORE_BYTES: Final = 150 << 20
LOOK_AGAIN_S: Final = 0.02

NODE_ARGS: Final = (
    "num_cpus", "num_gpus", "memory", "object_store_memory", "resources", "labels", "port", "node_ip_address",
    "temp_dir", "log_level", "node_timeout_s", "spill", "memory_threshold",
)  # fmt: skip


class Node:
    """One node of a `Cluster`. What needs the node to be up waits until it is."""

    def __init__(self, starting: StartingNode) -> None:
        self._starting = starting
        self._running: RunningNode | None = None

    def wait_started(self) -> RunningNode:
        """Raises ShoalError when the node could not start; the text says why."""
        if self._running is None:
            self._running = self._starting.wait_ready()
        return self._running

    @property
    def node_id(self) -> str:
        """Hex."""
        return self.wait_started().record.node_id

    unique_id = node_id

    @property
    def address(self) -> str:
        """ "host:port" of the node's one port."""
        return self.wait_started().record.address

    @property
    def is_head(self) -> bool:
        return self.wait_started().record.is_head

    @property
    def pid(self) -> int:
        """Of the supervisor: end it, and the node is gone."""
        return self._starting.process.pid

    @property
    def logs(self) -> str:
        return str(self.wait_started().folder.logs)

    def is_running(self) -> bool:
        return self._starting.process.poll() is None

    def kill_all_processes(self, allow_graceful: bool = True) -> None:
        """End the node and wait until its supervisor has."""
        node = self.wait_started()
        if allow_graceful:
            node.stop(STOP_GRACE_S)
        else:
            node.kill()

    def __repr__(self) -> str:
        if self._running is None:
            return f"<Node starting, pid {self.pid}>"
        return f"<Node {self.node_id[:12]} at {self.address}{'' if self.is_running() else ', ended'}>"


class Cluster:
    """A head and any number of nodes on this machine.

    Args:
        initialize_head: start a head at once, with `head_node_args`; otherwise the first `add_node` starts it.
        connect: then `init()` this process as a driver.
        shutdown_at_exit: `shutdown` when the interpreter ends.
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: dict[str, Any] | None = None,
        shutdown_at_exit: bool = True,
    ) -> None:
        self.head_node: Node | None = None
        self.worker_nodes: list[Node] = []
        self.connected = False
        self._token = session.new_token()
        self._removed: set[str] = set()
        self._bases: set[Path] = set()
        self._lifeline: tuple[int, int] | None = None
        self._atexit = shutdown_at_exit
        if connect and not initialize_head:
            raise ValueError("Cluster(connect=True) needs initialize_head=True: there is nothing to connect to yet")
        if head_node_args and not initialize_head:
            raise ValueError("head_node_args are used with initialize_head=True; or give them to the first add_node")
        if shutdown_at_exit:
            atexit.register(self.shutdown)
        if initialize_head:
            self.add_node(**(head_node_args or {}))
            if connect:
                self.connect()

    @property
    def address(self) -> str:
        """Of the head: for `init(address=...)`.

        Raises:
            ClusterNotFoundError: no head was added yet.
        """
        if self.head_node is None:
            raise ClusterNotFoundError("this Cluster has no node yet; call add_node() first")
        return self.head_node.address

    gcs_address = address

    def connect(self, namespace: str | None = None) -> None:
        """Make this process a driver of the cluster."""
        import shoal

        shoal.init(address=self.address, namespace=namespace, ignore_reinit_error=True)
        self.connected = True

    def add_node(self, wait: bool = True, **node_args: Any) -> Node:
        """Start a node: 1 CPU, no GPU and 150 MiB of object store unless said otherwise. The first one is the head.

        Args:
            wait: until the cluster knows the node; otherwise it starts in the background (see `wait_for_nodes`).
            node_args: num_cpus, num_gpus, memory, object_store_memory (bytes), resources, labels, port,
                node_ip_address, temp_dir, log_level, node_timeout_s (of the head: silence after which a node is dead),
                spill (list of folders or URLs for objects that do not fit), memory_threshold (share of the machine's
                memory in use at which workers are ended).
        Raises:
            TypeError: an unknown argument. ShoalError: the node could not start.
        """
        unknown = sorted(set(node_args) - set(NODE_ARGS))
        if unknown:
            raise TypeError(f"add_node() does not know {', '.join(unknown)}; it knows {', '.join(NODE_ARGS)}")
        if self._lifeline is None:
            self._lifeline = os.pipe()
        chosen = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": DEFAULT_STORE_BYTES, **node_args}
        node_ip = chosen.pop("node_ip_address", None) or "127.0.0.1"
        options = NodeOptions(
            head=self.head_node is None,
            address=None if self.head_node is None else self.address,
            node_ip=node_ip,
            token=self._token,
            private=True,
            lifeline_fd=self._lifeline[0],
            **{name: value for name, value in chosen.items() if value is not None},
        )
        self._bases.add(session.base_folder(options.temp_dir))
        node = Node(spawn_node(options))
        if self.head_node is None:
            self.head_node = node
        else:
            self.worker_nodes.append(node)
        if wait:
            try:
                node.wait_started()
            except ShoalError:
                self._forget(node)
                raise
            self._wait_until(lambda alive: node.node_id in alive, 30.0, f"node {node.node_id[:12]} to join")
        return node

    def remove_node(self, node: Node, allow_graceful: bool = True) -> None:
        """End a node; with `allow_graceful=False` as a power cut would. Its supervisor has ended on return; when the
        others know, `wait_for_nodes` returns."""
        if node is not self.head_node and node not in self.worker_nodes:
            raise ValueError(f"{node!r} is not, or no longer, a node of this cluster")
        node.kill_all_processes(allow_graceful)
        self._removed.add(node.node_id)
        self._forget(node)

    def list_all_nodes(self) -> list[Node]:
        """The head first; removed ones are not in it."""
        return ([self.head_node] if self.head_node is not None else []) + self.worker_nodes

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Wait until the cluster's nodes are exactly those that were added and not removed.

        Raises:
            TimeoutError: they were not within `timeout` seconds. ShoalError: one could not start.
        """
        wanted = {node.node_id for node in self.list_all_nodes()}
        self._wait_until(
            lambda alive: wanted <= alive and not (self._removed & alive), timeout, f"{len(wanted)} nodes to be alive"
        )

    def remaining_processes_alive(self) -> bool:
        """Whether every node that was added and not removed still runs."""
        return all(node.is_running() for node in self.list_all_nodes())

    def shutdown(self) -> None:
        """Disconnect, end all nodes (the head last) and wait for them. Idempotent."""
        if self._atexit:
            atexit.unregister(self.shutdown)
        if self.connected:
            import shoal

            self.connected = False
            shoal.shutdown()
        for node in [*self.worker_nodes, *([self.head_node] if self.head_node is not None else [])]:
            try:
                node.kill_all_processes()
            except ShoalError:  # it never came up; there is nothing to end
                continue
        self.worker_nodes.clear()
        self.head_node = None
        if self._lifeline is not None:
            for fd in self._lifeline:
                os.close(fd)
            self._lifeline = None
        for base in self._bases:
            session.sweep(base)  # nodes that were killed left their sockets and token

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _forget(self, node: Node) -> None:
        if node is self.head_node:
            self.head_node = None
        elif node in self.worker_nodes:
            self.worker_nodes.remove(node)

    def _wait_until(self, enough: Callable[[set[str]], bool], timeout_s: float, what: str) -> None:
        """Wait until `enough(hex ids of the nodes that control takes for alive)`."""
        address, token = self.address, self._token.encode()

        async def look() -> None:
            deadline = time.monotonic() + timeout_s
            connection = await connect(address, token, ProcessReply, target="control", name="cluster_utils")
            try:
                while True:
                    status: StatusReply = await connection.request(GetStatus(), timeout_s)
                    if enough({_hex(node) for node in status.nodes if node.alive}):
                        return
                    if time.monotonic() > deadline:
                        states = ", ".join(f"{_hex(n)[:12]} {'alive' if n.alive else 'dead'}" for n in status.nodes)
                        raise TimeoutError(f"waited {timeout_s:.0f} s for {what}; the cluster sees: {states}")
                    await asyncio.sleep(LOOK_AGAIN_S)  # a tool is told of nothing: it can only look again
            finally:
                connection.close()

        # On a thread of its own, since the calling one may be running a loop already.
        with ThreadPoolExecutor(1, thread_name_prefix="shoal-cluster-utils") as apart:
            apart.submit(asyncio.run, look()).result()


def _hex(node: NodeInfo) -> str:
    return node.node_id.hex()
