"""What waits for its process: shown when it takes long, and summed up for people."""

from __future__ import annotations

from shoal.node.starting import MAX_ROWS, SHOWN_AFTER_S, Starting, reports
from shoal.scheduling.views import DemandReport, WaitReason

CPU = {"CPU": 10_000}


def one(name: str, since: float, text: str = "its worker process is starting", job: bytes = b"j") -> Starting:
    return Starting(name, CPU, job, since, text)


def test_what_starts_in_time_is_not_worth_a_word() -> None:
    assert reports([one("f", 100.0)], 100.0 + SHOWN_AFTER_S - 0.01) == []


def test_what_takes_long_is_a_row_with_its_reason() -> None:
    reason = WaitReason("worker_starting", "its worker process is starting")
    assert reports([one("f", 100.0), one("f", 99.0), one("f", 105.0)], 105.5) == [
        DemandReport("f", CPU, 2, reason, 99.0, b"j")
    ]


def test_rows_are_apart_where_a_person_would_tell_them_apart_and_the_longest_is_first() -> None:
    rows = reports(
        [one("f", 3.0), one("g", 1.0), one("f", 2.0, "its constructor runs (pid 1)"), one("f", 0.0, job=b"k")], 9.0
    )
    assert [(row.name, row.since_unix_s) for row in rows] == [("f", 0.0), ("g", 1.0), ("f", 2.0), ("f", 3.0)]


def test_rows_are_bounded() -> None:
    assert len(reports([one(f"f{number}", 0.0) for number in range(3 * MAX_ROWS)], 9.0)) == MAX_ROWS
