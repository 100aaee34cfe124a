"""Who is ended when memory gets short, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node import memory_watch
from shoal.node.memory_watch import (
    BIGGEST,
    WORTH_BYTES,
    MemoryWatch,
    Usage,
    WorkerMemory,
    choose_victim,
    explain,
    private_bytes,
    read_usage,
)

MIB = 1 << 20


def worker(
    number: int, group: bytes = b"owner", *, size: int = 100 * MIB, began: float = 0.0, retriable: bool = True
) -> WorkerMemory:
    name = f"task{number}" if group else ""
    return WorkerMemory(b"%02d" % number, 1000 + number, name, group, size, began, retriable)


def test_nobody_can_be_ended() -> None:
    assert choose_victim([]) is None
    assert choose_victim([worker(1, b"", size=WORTH_BYTES - 1)]) is None


def test_an_idle_worker_that_holds_much_goes_first() -> None:
    idle = worker(2, b"", size=WORTH_BYTES)
    assert choose_victim([worker(1, began=9.0), idle, worker(3, b"", size=1)]) is idle


def test_the_newest_of_the_owner_with_most_workers() -> None:
    few = [worker(1, b"few", size=5000 * MIB, began=99.0)]
    many = [worker(2, b"many", began=1.0), worker(3, b"many", began=7.0), worker(4, b"many", began=3.0)]
    assert choose_victim(few + many) is many[1]


def test_owners_with_as_many_are_told_apart_by_what_they_hold() -> None:
    small, large = worker(1, b"small", began=5.0), worker(2, b"large", size=200 * MIB)
    assert choose_victim([small, large]) is large


def test_what_may_not_be_tried_again_goes_last() -> None:
    precious = [worker(1, b"a", began=9.0, retriable=False), worker(2, b"a", began=8.0, retriable=False)]
    again = worker(3, b"b", began=1.0)
    assert choose_victim([*precious, again]) is again
    assert choose_victim(precious) is precious[0]


@given(
    st.lists(
        st.builds(
            worker,
            st.integers(0, 99),
            st.sampled_from([b"", b"a", b"b", b"c"]),
            size=st.integers(0, 10**10),
            began=st.floats(0, 1e9),
            retriable=st.booleans(),
        ),
        unique_by=lambda one: one.worker_id,
    )
)
def test_the_choice_is_one_of_them_and_does_not_depend_on_their_order(workers: list[WorkerMemory]) -> None:
    victim = choose_victim(workers)
    worth = [one for one in workers if one.group or one.size_bytes >= WORTH_BYTES]
    assert (victim is None) == (not worth)
    if victim is None:
        return
    assert victim in worth
    if any(one.retriable for one in worth):
        assert victim.retriable or not victim.group
    if victim.group:
        mine = [one for one in worth if one.group == victim.group and one.retriable == victim.retriable]
        assert victim.began == max(one.began for one in mine)


def test_the_text_names_the_victim_the_numbers_and_the_biggest() -> None:
    workers = [worker(number, size=number * 100 * MIB) for number in range(1, 15)]
    text = explain(Usage(96 << 30, 100 << 30, "this machine"), 0.95, workers[-2], workers)
    assert "this machine was about to run out of memory (96.0 GiB of 100.0 GiB in use, 96%" in text
    assert "95%" in text
    rows = [line for line in text.splitlines() if "pid" in line]
    assert len(rows) == BIGGEST
    assert "task14" in rows[0]
    assert [row for row in rows if "<- ended" in row] == [rows[1]]


def test_the_kernel_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "_CGROUP_V2", tmp_path / "v2")
    monkeypatch.setattr(memory_watch, "_CGROUP_V1", tmp_path / "v1")
    machine = read_usage()
    assert 0 < machine.used < machine.total
    assert machine.where == "this machine"
    v1 = tmp_path / "v1"
    v1.mkdir()
    (v1 / "memory.limit_in_bytes").write_text("1000000\n")
    (v1 / "memory.usage_in_bytes").write_text("990000\n")
    (v1 / "memory.stat").write_text("cache 5\ntotal_inactive_file 40000\n")
    assert read_usage() == Usage(950_000, 1_000_000, "this container")
    v2 = tmp_path / "v2"
    v2.mkdir()
    (v2 / "memory.max").write_text("max\n")
    assert read_usage().total == 1_000_000
    (v1 / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read_usage().where == "this machine"


def test_private_memory_grows_with_what_is_allocated() -> None:
    before = private_bytes(os.getpid())
    held = bytearray(os.urandom(1)) * (64 * MIB)
    assert private_bytes(os.getpid()) > before + 50 * MIB
    del held
    assert private_bytes(2**22 + 1) == 0


def test_one_worker_is_ended_when_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[bytes, str]] = []
    usage = Usage(94, 100, "this machine")
    watch = MemoryWatch(0.95, lambda: [worker(1), worker(2, began=1.0)], lambda *what: ended.append(what))
    monkeypatch.setattr(memory_watch, "read_usage", lambda: usage)
    assert not watch._look()
    usage = Usage(95, 100, "this machine")
    assert watch._look()
    [(victim, text)] = ended
    assert victim == b"02"
    assert "task2  <- ended" in text
