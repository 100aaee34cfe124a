"""What workers remember of their calls as a Chrome trace: for chrome://tracing, Perfetto, and programs. Pure.

A node is a process of the trace and a worker a thread of it. Calls of one worker that overlap (threads of an actor, or
coroutines) are laid on as many rows, since a row of a trace can only nest.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shoal.runtime.task_events import Span, WorkerEvents

PHASES = ("task:fetch_arguments", "task:deserialize_arguments", "task:execute", "task:store_outputs")
"""Names of the events inside a call's own. The first comes before the call: its worker ran others meanwhile."""


def chrome_trace(workers: Iterable[WorkerEvents]) -> list[dict[str, Any]]:
    """One complete event ("ph": "X", microseconds since 1970) for each call and each of its phases, in order of time,
    after the names of the rows.

    A worker may be there twice: a call that both say is taken once.
    """
    names: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    nodes: dict[bytes, int] = {}
    for worker in _merged(workers):
        node = nodes.get(worker.node_id)
        if node is None:
            node = nodes[worker.node_id] = len(nodes) + 1
            names.append(_name("process_name", node, 0, f"node {worker.node_id.hex()[:12]} ({worker.node_ip})"))
        title = f"{worker.label or 'worker'} pid={worker.pid}"
        calls = _Rows(node, worker.pid * 1000, title, names)
        fetches = _Rows(node, worker.pid * 1000 + 500, f"{title}, fetching", names)
        for span in sorted(worker.spans, key=lambda span: span.begin):
            events += _events(worker, span, calls, fetches)
    events.sort(key=lambda event: event["ts"])
    return names + events


def _merged(workers: Iterable[WorkerEvents]) -> list[WorkerEvents]:
    """Each worker once, with what it said last (which includes all that it still remembers of what it said before)."""
    latest = {worker.worker_id: worker for worker in workers}
    return sorted(latest.values(), key=lambda worker: (worker.node_id, worker.pid))


class _Rows:
    """The rows on which one kind of events of one worker lie, each event after the last one of its row."""

    def __init__(self, node: int, first: int, title: str, names: list[dict[str, Any]]) -> None:
        self.node = node
        self._first = first
        self._title = title
        self._names = names
        self._ended: list[int] = []

    def row(self, begin: int, end: int) -> int:
        for number, ended in enumerate(self._ended):
            if ended <= begin:
                self._ended[number] = end
                return self._first + number
        number = len(self._ended)
        self._ended.append(end)
        title = self._title if not number else f"{self._title} ({number + 1})"
        self._names.append(_name("thread_name", self.node, self._first + number, title))
        return self._first + number


def _events(worker: WorkerEvents, span: Span, calls: _Rows, fetches: _Rows) -> Iterable[dict[str, Any]]:
    name, function = worker.names[span.name]
    failed = span.returned < 0
    args: dict[str, Any] = {
        "task_id": span.task_id.hex(), "job_id": worker.job_id.hex(), "worker_id": worker.worker_id.hex(),
        "node_id": worker.node_id.hex(), "function": function, "failed": failed,
    }  # fmt: skip

    def event(row: int, what: str, category: str, begin: int, end: int) -> dict[str, Any]:
        at = {"name": what, "cat": category, "ph": "X", "ts": worker.zero_us + begin, "dur": max(0, end - begin)}
        return at | {"pid": calls.node, "tid": row, "args": args}

    fetch, deserialize, execute, store = PHASES
    if span.fetching >= 0 <= span.fetched:
        yield event(fetches.row(span.fetching, span.fetched), fetch, fetch, span.fetching, span.fetched)
    row = calls.row(span.begin, span.ended)
    yield event(row, name, "task", span.begin, span.ended) | ({"cname": "terrible"} if failed else {})
    called = span.called if span.called >= 0 else span.ended
    yield event(row, deserialize, deserialize, span.begin, called)
    if span.called >= 0:
        yield event(row, execute, execute, called, span.ended if failed else span.returned)
    if not failed:
        yield event(row, store, store, span.returned, span.ended)


def _name(kind: str, node: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": node, "tid": thread, "args": {"name": name}}
