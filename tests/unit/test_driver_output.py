"""What the driver shows: prefixes, folding over windows, colours, and streams that misbehave."""

from __future__ import annotations

import io
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.control.messages import LogLines
from shoal.runtime import driver_output
from shoal.runtime.driver_output import (
    Deduplicator,
    DriverOutput,
    OutputSettings,
    Shown,
    Source,
    prefix_of,
    whole_lines,
)

A = Source("task", 1, "10.0.0.1", "out")
B = Source("task", 2, "10.0.0.1", "out")
C = Source("task", 1, "10.0.0.2", "out")  # the same pid on another node


def lines(shown: list[Shown]) -> list[tuple[str, int]]:
    return [(one.line, one.repeats) for one in shown]


def entry(*text: str, name: str = "f", pid: int = 7, ip: str = "10.0.0.1", stream: str = "out") -> LogLines:
    return LogLines(b"job1", b"w", ip, pid, name, stream, list(text))


# ----------------------------------------------------------------------------------------------------------- prefixes


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Source("square", 7, "10.0.0.1", "out"), "(square pid=7)"),
        (Source("", 7, "10.0.0.1", "out"), "(pid=7)"),
        (Source("Counter", 7, "10.0.0.2", "err"), "(Counter pid=7, ip=10.0.0.2)"),
        (Source("", 7, "fe80::1", "err"), "(pid=7, ip=fe80::1)"),
    ],
)
def test_a_prefix_names_the_node_only_when_it_is_another(source: Source, expected: str) -> None:
    assert prefix_of(source, "10.0.0.1") == expected


# -------------------------------------------------------------------------------------------------------- duplicates


def test_lines_of_other_processes_that_differ_in_numbers_only_are_folded() -> None:
    dedup = Deduplicator(OutputSettings())
    assert lines(dedup.feed(A, ["loaded 1 of 9 at 0x7f01"], 0.0)) == [("loaded 1 of 9 at 0x7f01", 0)]
    assert dedup.next_flush() is None
    assert dedup.feed(B, ["loaded 2 of 9 at 0xab"], 1.0) == []
    assert dedup.feed(C, ["loaded 3 of 9 at 0xcd"], 2.0) == []
    assert dedup.next_flush() == 5.0
    assert dedup.flush(4.9) == []
    assert dedup.flush(5.0) == [Shown(C, "loaded 3 of 9 at 0xcd", 2)]
    assert dedup.next_flush() is None
    assert lines(dedup.feed(A, ["loaded 4 of 9 at 0x1"], 5.0)) == [("loaded 4 of 9 at 0x1", 0)]  # a new window


def test_what_one_process_repeats_is_shown_until_a_second_does_too() -> None:
    dedup = Deduplicator(OutputSettings())
    assert lines(dedup.feed(A, ["step 1", "step 2", "step 3"], 0.0)) == [("step 1", 0), ("step 2", 0), ("step 3", 0)]
    assert dedup.feed(B, ["step 1"], 0.1) == []
    assert dedup.feed(A, ["step 4"], 0.2) == []
    assert lines(dedup.flush(5.0)) == [("step 4", 2)]


def test_a_single_folded_line_is_shown_without_a_count() -> None:
    dedup = Deduplicator(OutputSettings())
    dedup.feed(A, ["ready"], 0.0)
    dedup.feed(B, ["ready"], 0.0)
    assert lines(dedup.flush(9.0)) == [("ready", 0)]


def test_the_patterns_keep_lines_from_folding_and_from_showing() -> None:
    settings = OutputSettings.from_environment(
        {"SHOAL_DEDUP_LOGS_ALLOW_REGEX": "^keep", "SHOAL_DEDUP_LOGS_SKIP_REGEX": "secret"}
    )
    dedup = Deduplicator(settings)
    assert lines(dedup.feed(A, ["keep me", "a secret"], 0.0)) == [("keep me", 0)]
    assert lines(dedup.feed(B, ["keep me", "a secret", ""], 0.0)) == [("keep me", 0), ("", 0)]


def test_de_duplication_can_be_switched_off() -> None:
    dedup = Deduplicator(OutputSettings.from_environment({"SHOAL_DEDUP_LOGS": "0"}))
    assert len(dedup.feed(A, ["x"], 0.0) + dedup.feed(B, ["x"], 0.0)) == 2


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_output, "MAX_KINDS", 2)
    dedup = Deduplicator(OutputSettings())
    dedup.feed(A, ["a", "b"], 0.0)
    dedup.feed(B, ["a", "a"], 0.0)
    assert lines(dedup.feed(B, ["c"], 1.0)) == [("a", 2), ("c", 0)]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SHOAL_DEDUP_LOGS_AGG_WINDOW_S", "soon"),
        ("SHOAL_DEDUP_LOGS_ALLOW_REGEX", "("),
        ("SHOAL_DEDUP_LOGS_SKIP_REGEX", "["),
    ],
)
def test_a_setting_that_cannot_be_read_is_named(variable: str, value: str) -> None:
    with pytest.raises(ValueError, match=variable):
        OutputSettings.from_environment({variable: value})


@given(
    st.lists(
        st.tuples(st.sampled_from([A, B, C]), st.sampled_from(["x 1", "x 2", "y", "z 3 4"]), st.floats(0.0, 3.0)),
        max_size=60,
    )
)
def test_no_line_is_lost_and_every_kind_is_seen_at_once(events: list[tuple[Source, str, float]]) -> None:
    dedup = Deduplicator(OutputSettings())
    now, shown, open_until = 0.0, [], {}  # type: ignore[var-annotated]
    for source, line, gap in events:
        now += gap
        new = dedup.feed(source, [line], now)
        kind = line.split()[0]
        if open_until.get(kind, 0.0) <= now:
            assert Shown(source, line) in new
            open_until[kind] = now + 5.0
        shown += new
    shown += dedup.flush(float("inf"))
    for kind in "xyz":
        counted = sum(max(one.repeats, 1) for one in shown if one.line.startswith(kind))
        assert counted == sum(line.startswith(kind) for _, line, _ in events)


# ------------------------------------------------------------------------------------------------------------ the shell


class Screen(io.StringIO):
    """A stream that says when it was written to."""

    def __init__(self, tty: bool = False) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


def put_screens(monkeypatch: pytest.MonkeyPatch) -> tuple[Screen, Screen]:
    """To be called in the test itself: pytest sets its own streams between a fixture and its test."""
    out, err = Screen(), Screen()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    return out, err


def test_lines_go_to_the_stream_they_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = put_screens(monkeypatch)
    output = DriverOutput("10.0.0.1", OutputSettings())
    output.show([entry("hello", "world"), entry("oh", stream="err", ip="10.0.0.9"), entry("x", name="")])
    output.close()
    assert screens[0].getvalue() == "(f pid=7) hello\n(f pid=7) world\n(pid=7) x\n"
    assert screens[1].getvalue() == "(f pid=7, ip=10.0.0.9) oh\n"
    output.show([entry("too late")])
    output.close()
    assert "too late" not in screens[0].getvalue()


def test_folded_lines_appear_at_the_end_with_a_hint_once(monkeypatch: pytest.MonkeyPatch) -> None:
    screens = put_screens(monkeypatch)
    output = DriverOutput("10.0.0.1", OutputSettings())
    for pid in range(4):
        output.show([entry("a 1", pid=pid), entry("b 1", pid=pid)])
    output.close()
    assert screens[0].getvalue().splitlines() == [
        "(f pid=0) a 1",
        "(f pid=0) b 1",
        "(f pid=3) a 1 [repeated 3x across cluster] (SHOAL_DEDUP_LOGS=0 shows each)",
        "(f pid=3) b 1 [repeated 3x across cluster]",
    ]


def test_folded_lines_appear_when_their_window_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = threading.Event()

    class Watched(Screen):
        def write(self, text: str) -> int:
            if "repeated 2x" in text:
                seen.set()
            return super().write(text)

    monkeypatch.setattr(sys, "stdout", Watched())
    output = DriverOutput("10.0.0.1", OutputSettings(window_s=0.05))
    for pid in range(3):
        output.show([entry("same", pid=pid)])
    assert seen.wait(5.0)
    output.close()


def test_colours_are_for_terminals_and_one_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(tty=True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "xterm")
    output = DriverOutput("10.0.0.1", OutputSettings.from_environment({}))
    output.show([entry("a", pid=1), entry("b", pid=2), entry("c", pid=1)])
    output.close()
    first, second, third = screen.getvalue().splitlines()
    assert first == "\x1b[36m(f pid=1)\x1b[0m a"
    assert second.startswith("\x1b[35m")
    assert third.startswith("\x1b[36m")


@pytest.mark.parametrize(
    ("environ", "color"),
    [
        ({}, "auto"),
        ({"NO_COLOR": "1"}, "never"),
        ({"SHOAL_COLOR_PREFIX": "0"}, "never"),
        ({"SHOAL_COLOR_PREFIX": "1"}, "always"),
        ({"SHOAL_COLOR_PREFIX": "1", "NO_COLOR": "1"}, "always"),
    ],
)
def test_colours_can_be_chosen(environ: dict[str, str], color: str) -> None:
    assert OutputSettings.from_environment(environ).color == color


def test_streams_that_are_closed_gone_or_narrow_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def write(self, _text: str) -> int:
            raise OSError("gone")

    closed = io.StringIO()
    closed.close()
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    for stream in (None, closed, Broken(), narrow):
        monkeypatch.setattr(sys, "stdout", stream)
        output = DriverOutput("10.0.0.1", OutputSettings())
        output.show([entry("žluť")])
        output.close()
        assert output._thread is not None
        assert not output._thread.is_alive()
    narrow.seek(0)
    assert narrow.read() == "(f pid=7) \\u017elu\\u0165\n"


def test_a_terminal_that_takes_nothing_blocks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, free = threading.Event(), threading.Event()

    class Stuck(Screen):
        def write(self, text: str) -> int:
            stuck.set()
            free.wait(10.0)
            return super().write(text)

    screen = Stuck()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", Screen())
    monkeypatch.setattr(driver_output, "MAX_PENDING_LINES", 3)
    output = DriverOutput("10.0.0.1", OutputSettings())
    output.show([entry("first")])
    assert stuck.wait(5.0)
    for number in range(10):
        output.show([entry(f"later {number}")])
    output.close(timeout_s=0.01)
    free.set()
    assert output._thread is not None
    output._thread.join(5.0)
    assert screen.getvalue().splitlines() == ["(f pid=7) first", *(f"(f pid=7) later {n}" for n in (7, 8, 9))]
    assert "[7 lines of workers dropped" in sys.stderr.getvalue()  # type: ignore[attr-defined]


@given(st.lists(st.binary(max_size=30), max_size=30), st.integers(1, 40))
def test_text_is_cut_after_line_ends_only(lines: list[bytes], most: int) -> None:
    lines = [line.replace(b"\n", b"") + b"\n" for line in lines]
    pieces = list(whole_lines(b"".join(lines), most))
    assert b"".join(pieces) == b"".join(lines)
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert all(len(piece) <= most or piece.count(b"\n") == 1 for piece in pieces)


def test_two_threads_lose_no_text_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user prints while lines of workers are shown, on a stream that is buffered as stdout is."""
    with open(tmp_path / "out", "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        output = DriverOutput("1.1.1.1", OutputSettings(dedup=False))
        for number in range(300):
            output.show([LogLines(b"", b"", "1.1.1.1", 5, "f", "out", [f"{number} " + "y" * 3000])])
            sys.stdout.write(f"mine {number}\n")
        output.close(10.0)
    lines = (tmp_path / "out").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("mine")] == [str(number) for number in range(300)]
    assert len([line for line in lines if line.startswith("(f pid=5)")]) == 300
