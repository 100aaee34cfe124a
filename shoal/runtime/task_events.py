"""What a worker ran and when, for `timeline()`: kept where it happened, and sent only when somebody asks.

A call costs a tuple and two looks at the clock, about 0.2 us; the newest `KEPT` are remembered. Telling anybody of each
call, as it happens or in batches, would cost more than a short call itself.

A worker that leaves on purpose hands its events to its agent first. Those of one that crashes are lost with it.
"""

from __future__ import annotations

import collections
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shoal.objects.ids import make_task_id

if TYPE_CHECKING:
    pass

KEPT: Final = 10_000
"""Calls of one worker; as many take about half a megabyte on the wire."""


class Span(msgspec.Struct, array_like=True, frozen=True):
    """One call. Times are microseconds since the worker's `zero`; -1 where that did not happen.

    `begin`: its turn came; `called`: its arguments are unpickled; `returned`: the user's code returned (-1: it raised);
    `ended`: its results are pickled and stored. `fetching`, `fetched`: when stored arguments were asked for and here.
    """

    name: int  # index into `WorkerEvents.names`
    task_id: bytes
    begin: int
    called: int
    returned: int
    ended: int
    fetching: int = -1
    fetched: int = -1


class WorkerEvents(msgspec.Struct, array_like=True, frozen=True):
    """What one worker remembers. `zero_us`: microseconds since 1970. `names`: (name of the task, of its function)."""

    node_id: bytes
    node_ip: str
    worker_id: bytes
    pid: int
    label: str  # of the actor that it is, or ""
    job_id: bytes
    zero_us: int
    names: list[tuple[str, str]]
    spans: list[Span]


class TaskEvents:
    """The ring of one worker. `record` is called by the thread that ran the call, with

    (call's target, prefix of its caller's ids, counter, (fetching, fetched) or None, begin, called, returned, ended)

    in seconds of the performance counter, 0.0 for what did not happen.
    """

    def __init__(self) -> None:
        self._ring: collections.deque[tuple[Any, ...]] = collections.deque(maxlen=KEPT)
        self.record = self._ring.append
        self._origin = time.perf_counter()
        self._origin_us = round(time.time() * 1e6)

    def packed(self, *, node_id: bytes, node_ip: str, worker_id: bytes, pid: int, label: str, job_id: bytes) -> bytes:
        """One encoded `WorkerEvents`; b"" when nothing ran. Any thread."""
        rows = self._ring.copy()  # at once: others may append meanwhile
        if not rows:
            return b""
        origin = self._origin
        zero = round((min(row[4] if row[3] is None else row[3][0] for row in rows) - origin) * 1e6)
        names: dict[tuple[str, str], int] = {}
        spans = []

        def micros(at: float) -> int:
            return round((at - origin) * 1e6) - zero if at else -1

        for target, prefix, counter, fetch, *times in rows:
            template = target.template
            name = names.setdefault((template.name, template.function_name), len(names))
            begin, called, returned, ended = map(micros, times)
            fetching, fetched = map(micros, fetch or (0.0, 0.0))
            spans.append(Span(name, make_task_id(prefix, counter), begin, called, returned, ended, fetching, fetched))
        zero_us = self._origin_us + zero
        events = WorkerEvents(node_id, node_ip, worker_id, pid, label, job_id, zero_us, list(names), spans)
        return msgspec.msgpack.encode(events)
