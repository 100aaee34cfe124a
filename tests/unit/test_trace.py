"""What workers remember, and the Chrome trace that is made of it."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime import task_events
from shoal.runtime.task_events import Span, TaskEvents, WorkerEvents
from shoal.runtime.trace import PHASES, chrome_trace


def worker(spans: list[Span], pid: int = 7, node: bytes = b"n" * 28, label: str = "") -> WorkerEvents:
    return WorkerEvents(
        node, "10.0.0.1", pid.to_bytes(28, "little"), pid, label, b"job1", 1_000_000, [("f", "mod.f")], spans
    )


def test_a_call_and_its_phases() -> None:
    trace = chrome_trace([worker([Span(0, b"t" * 24, 10, 12, 15, 20)])])
    assert [(e["ph"], e["name"]) for e in trace[:2]] == [("M", "process_name"), ("M", "thread_name")]
    shown = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in trace[2:]]
    assert shown == [
        ("f", "task", 1_000_010, 10),
        (PHASES[1], PHASES[1], 1_000_010, 2),
        (PHASES[2], PHASES[2], 1_000_012, 3),
        (PHASES[3], PHASES[3], 1_000_015, 5),
    ]
    assert trace[2]["args"]["task_id"] == (b"t" * 24).hex()
    json.dumps(trace)


def test_what_raised_and_what_was_fetched() -> None:
    trace = chrome_trace([worker([Span(0, b"a" * 24, 10, 12, -1, 20), Span(0, b"b" * 24, 30, -1, -1, 31, 0, 9)])])
    by_name = defaultdict(list)
    for event in trace:
        by_name[event["name"]].append(event)
    assert [e["args"]["failed"] for e in by_name["f"]] == [True, True]
    assert [(e["ts"], e["dur"]) for e in by_name[PHASES[0]]] == [(1_000_000, 9)]
    assert len(by_name[PHASES[2]]) == 1  # the second never began
    assert PHASES[3] not in by_name


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=40))
def test_calls_on_one_row_never_overlap(times: list[tuple[int, int]]) -> None:
    spans = [Span(0, bytes(24), begin, begin, begin + length, begin + length) for begin, length in times]
    rows = defaultdict(list)
    for event in chrome_trace([worker(spans, label="Actor")]):
        if event.get("cat") == "task":
            rows[event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    assert sum(map(len, rows.values())) == len(times)
    for calls in rows.values():
        calls.sort()
        assert all(before[1] <= after[0] for before, after in pairwise(calls))


def test_nodes_and_workers_have_rows_of_their_own_and_a_worker_is_taken_once() -> None:
    span = Span(0, bytes(24), 0, 1, 2, 3)
    workers = [worker([span], 7), worker([span, span], 7), worker([span], 8), worker([span], 9, b"m" * 28)]
    tasks = [e for e in chrome_trace(workers) if e.get("cat") == "task"]
    assert len(tasks) == 4
    assert len({e["pid"] for e in tasks}) == 2
    assert len({(e["pid"], e["tid"] // 1000) for e in tasks}) == 3


def test_the_ring_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_events, "KEPT", 3)
    events = TaskEvents()
    ids: dict[str, Any] = {
        "node_id": b"n", "node_ip": "ip", "worker_id": b"w", "pid": 1, "label": "", "job_id": b"j",
    }  # fmt: skip
    assert events.packed(**ids) == b""
    target = SimpleNamespace(template=SimpleNamespace(name="f", function_name="m.f"))
    for number in range(5):
        begin = 100.0 + number
        fetched = (begin - 0.5, begin - 0.25) if number == 2 else None
        events.record((target, b"p" * 16, number, fetched, begin, begin + 0.1, 0.0, begin + 0.2))
    read = msgspec.msgpack.decode(events.packed(**ids), type=WorkerEvents)
    assert [int.from_bytes(span.task_id[16:], "little") for span in read.spans] == [2, 3, 4]
    assert read.names == [("f", "m.f")]
    assert read.spans[0] == Span(0, read.spans[0].task_id, 500_000, 600_000, -1, 700_000, 0, 250_000)
