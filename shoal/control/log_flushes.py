"""The last lines of a program: each node says when all that its workers printed so far has been published.

Nothing is awaited by time. A node's word travels behind the lines it speaks of, and so does control's answer to the
driver, so the driver has them all when it hears that answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal.control.mail import Outbox
from shoal.control.messages import FlushLogs, FlushNodeLogs
from shoal.control.processes import Origin
from shoal.rpc.messages import Done


class _Flush:
    __slots__ = ("missing", "origin", "request")

    def __init__(self, origin: Origin, request: FlushLogs, missing: set[int]) -> None:
        self.origin = origin
        self.request = request
        self.missing = missing


class LogFlushes:
    """Flushes that some node has not answered; one goes when its nodes have, and with the driver that asked."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._next = 1
        self._open: dict[int, _Flush] = {}

    def begin(self, origin: Origin, job_id: bytes, request: FlushLogs, peers: Iterable[int]) -> None:
        """`peers`: the nodes' connections."""
        flush = _Flush(origin, request, set(peers))
        number, self._next = self._next, self._next + 1
        self._open[number] = flush
        for peer in sorted(flush.missing):
            self._outbox.send(peer, FlushNodeLogs(job_id, number))
        self._settle(number, flush)

    def flushed(self, peer: int, number: int) -> None:
        flush = self._open.get(number)
        if flush is not None:
            flush.missing.discard(peer)
            self._settle(number, flush)

    def node_gone(self, peer: int) -> None:
        """It will not answer; and a driver that lived there will not listen."""
        for number, flush in list(self._open.items()):
            if flush.origin.peer == peer:
                del self._open[number]
            else:
                self.flushed(peer, number)

    def process_gone(self, origin: Origin) -> None:
        for number in [number for number, flush in self._open.items() if flush.origin == origin]:
            del self._open[number]

    def __len__(self) -> int:
        return len(self._open)

    def _settle(self, number: int, flush: _Flush) -> None:
        if not flush.missing:
            del self._open[number]
            self._outbox.answer(flush.origin, flush.request, Done())
