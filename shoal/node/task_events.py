"""Collecting what workers remember of the calls that they ran, when somebody asks: `shoal.timeline()`.

Nobody is told of a call while it happens. The driver asks its agent, which asks its workers and the other agents, and
those theirs. What a worker that left had to say is kept here, within `KEPT_BYTES`; nobody but the driver reads it.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable, Iterable
from typing import Any, Final

from shoal.exceptions import ShoalError
from shoal.node.messages import GetTaskEvents, TaskEvents
from shoal.node.peers import Peers
from shoal.node.workers import Worker
from shoal.rpc.aio import Connection, ConnectionClosedError

KEPT_BYTES: Final = 32 << 20
ANSWER_BYTES: Final = 256 << 20
"""Of one answer: a quarter of the longest frame."""
WORKER_S: Final = 3.0
"""How long a worker may take: user code may hold its GIL."""
NODE_S: Final = 10.0


class EventCollector:
    """See the module.

    Args:
        workers: those of this node. nodes: ids of all that are alive.
    """

    def __init__(
        self, node_id: bytes, workers: Callable[[], Iterable[Worker]], nodes: Callable[[], list[bytes]], peers: Peers
    ) -> None:
        self._node_id = node_id
        self._workers = workers
        self._nodes = nodes
        self._peers = peers
        self._kept: collections.deque[bytes] = collections.deque()
        self._kept_bytes = 0

    def keep(self, events: bytes) -> None:
        """Of a worker that leaves; the oldest make room."""
        self._kept.append(events)
        self._kept_bytes += len(events)
        while self._kept_bytes > KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())

    async def answer(self, connection: Connection, message: GetTaskEvents) -> None:
        asked: dict[asyncio.Future[Any], str] = {}
        for worker in self._workers():
            if worker.connection is not None and worker.job_id and worker.is_up:
                asked[worker.connection.start_request(GetTaskEvents())] = f"pid {worker.pid}"
        elsewhere: dict[asyncio.Future[Any], str] = {}
        if message.everywhere:
            for node in self._nodes():
                if node != self._node_id:
                    elsewhere[self._peers.start_request(node, GetTaskEvents())] = f"node {node.hex()[:12]}"
        parts = await _answers(asked, WORKER_S)
        parts += await _answers(elsewhere, NODE_S)
        parts.append(TaskEvents(workers=list(self._kept)))  # now: some of those that were asked have left meanwhile
        connection.reply(message, _joined(parts))


async def _answers(asked: dict[asyncio.Future[Any], str], limit_s: float) -> list[TaskEvents]:
    if not asked:
        return []
    await asyncio.wait(asked, timeout=limit_s)
    parts = []
    for future, name in asked.items():
        if not future.done():
            future.cancel()
            parts.append(TaskEvents(silent=[f"{name} did not answer within {limit_s:.0f} s"]))
        elif isinstance(future.exception(), ConnectionClosedError):
            continue  # it ended, with its last words or without
        elif isinstance(future.exception(), ShoalError):
            parts.append(TaskEvents(silent=[f"{name}: {future.exception()}"]))
        else:
            parts.append(future.result())
    return parts


def _joined(parts: list[TaskEvents]) -> TaskEvents:
    workers: list[bytes] = []
    silent: list[str] = []
    size = left_out = 0
    for part in parts:
        silent += part.silent
        for events in part.workers:
            size += len(events)
            if size > ANSWER_BYTES:
                left_out += 1
            else:
                workers.append(events)
    if left_out:
        silent.append(f"{left_out} workers are left out: the events are more than {ANSWER_BYTES >> 20} MiB")
    return TaskEvents(workers=workers, silent=silent)
