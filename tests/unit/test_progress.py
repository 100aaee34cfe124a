"""Progress bars: their states, their lines, and the block that the driver draws."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import termios
from collections.abc import Iterator

import pytest

from shoal.control.messages import LogLines
from shoal.runtime import slot
from shoal.runtime.driver_output import DriverOutput, OutputSettings
from shoal.runtime.fake import FakeRuntime
from shoal.runtime.progress import MARK, MAX_BARS, Bars, BarState, bar_text, parse
from shoal.util.progress import safe_print, tqdm


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    slot.current = fake = FakeRuntime()
    yield fake
    slot.current = None


def states(runtime: FakeRuntime) -> list[BarState]:
    found = [parse(line) for line in runtime.progress]
    assert None not in found
    return found  # type: ignore[return-value]


def test_iterating_tells_the_beginning_and_the_end(runtime: FakeRuntime) -> None:
    assert list(tqdm("abc", desc="letters")) == ["a", "b", "c"]
    first, *_, last = states(runtime)
    assert (first.desc, first.n, first.total, first.closed) == ("letters", 0, 3, False)
    assert (last.n, last.closed, last.id) == (3, True, first.id)


def test_updates_that_come_fast_are_told_together(runtime: FakeRuntime) -> None:
    bar = tqdm(total=100, flush_interval_s=1000)
    for _ in range(100):
        bar.update()
    assert len(runtime.progress) == 1
    bar.refresh()
    bar.set_description("new")
    assert [(state.n, state.desc) for state in states(runtime)[1:]] == [(100, ""), (100, "new")]
    bar.close()
    bar.close()
    assert len(runtime.progress) == 4


def test_a_bar_that_is_dropped_is_closed(runtime: FakeRuntime) -> None:
    bar = tqdm(total=5, unit="B", position=2)
    with tqdm(iter("ab")) as other:
        assert other.total is None
        with pytest.raises(TypeError, match="nothing to iterate over"):
            next(iter(bar))
    del bar
    assert [state.closed for state in states(runtime)][-1]


@pytest.mark.parametrize(
    ("state", "elapsed_s", "text"),
    [
        (BarState(1, "load", 1, 4), 3.0, "load:  25%|██▌       | 1/4 [00:03<00:09, 0.33it/s]"),
        (BarState(1, "load", 4, 4), 0.0, "load: 100%|█████████████| 4/4 [00:00<00:00, ?it/s]"),
        (BarState(1, "", 7, None, "B"), 3700.0, "7B [1:01:40, 0.00B/s]"),
        (BarState(1, "a\x1b[2Jb", 0, 4), 0.0, "a [2Jb:   0%|               | 0/4 [00:00<?, ?it/s]"),
        (BarState(1, "x" * 50, 1, 4), 1.0, "x" * 50),
    ],
)
def test_the_line_of_a_bar(state: BarState, elapsed_s: float, text: str) -> None:
    assert bar_text(state, "", elapsed_s, 50) == text


def test_bars_of_several_processes_make_one_block() -> None:
    bars = Bars()
    for process, position in (("a", 1), ("b", 0), ("c", 0)):
        assert bars.update(process, f"({process})", BarState(1, "x", 0, 10, position=position), 0.0, 40) is None
    assert [line[:3] for line in bars.block(1.0, 40, 24)] == ["(b)", "(c)", "(a)"]
    assert bars.block(1.0, 40, 4)[2] == "... and 1 more"
    last = bars.update("b", "(b)", BarState(1, "x", 10, 10, closed=True), 2.0, 60)
    assert last is not None
    assert last.startswith("(b) x: 100%|")
    assert len(bars) == 2
    assert bars.plain(9.9, 40) == []
    assert len(bars.plain(10.0, 40)) == 2
    assert bars.plain(10.1, 40) == []


def test_the_number_of_bars_is_bounded() -> None:
    bars = Bars()
    for number in range(MAX_BARS + 5):
        bars.update("p", "", BarState(number), float(number), 40)
    assert len(bars) == MAX_BARS


def test_what_only_looks_like_a_bar_is_none() -> None:
    assert parse(BarState(1).line()) == BarState(1)
    for line in (MARK, MARK + "{", MARK + "{}", MARK + '{"id": "x"}', MARK + "[" * 100_000):
        assert parse(line) is None


# ----------------------------------------------------------------------------------------------------------- drawing


def entry(pid: int, *lines: str) -> LogLines:
    return LogLines(b"", b"", "ip", pid, "f", "err", list(lines))


def test_the_block_is_drawn_below_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    monkeypatch.setenv("TERM", "xterm")
    output = DriverOutput("ip", OutputSettings(color="never"))
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        one, two = BarState(1, "one", 1, 2), BarState(1, "two", 0, 2)
        output._show_now([entry(1, one.line()), entry(2, two.line())], 0, False)
        output._show_now([entry(1, "hello", BarState(1, "one", 2, 2, closed=True).line())], 0, False)
        with output.without_bars():
            os.write(slave, b"mine\n")
        printed = b""
        while printed.count(b"\n") < 7:  # a terminal hands over what it has by now
            printed += os.read(master, 10_000)
        shown = printed.decode().replace("\r\n", "\n").split("\n")
    os.close(master)
    assert [line.partition("|")[0] for line in shown] == [
        "(f pid=1) one:  50%",
        "(f pid=2) two:   0%",
        "\x1b[2F\x1b[J(f pid=1) hello",
        "(f pid=1) one: 100%",
        "(f pid=2) two:   0%",
        "\x1b[1F\x1b[Jmine",
        "(f pid=2) two:   0%",
        "",
    ]


def test_without_a_terminal_bars_are_lines_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    output = DriverOutput("ip", OutputSettings(), clock=lambda: now)
    for now in (0.0, 1.0, 11.0, 12.0):
        output._show_now([entry(1, BarState(1, "one", now, 20).line())], 0, False)
    output._show_now([entry(1, BarState(1, "one", 20, 20, closed=True).line())], 0, True)
    shown = capsys.readouterr().err.splitlines()
    assert [line[:19] for line in shown] == ["(f pid=1) one:  55%", "(f pid=1) one: 100%"]


def test_safe_print_is_print_where_there_are_no_bars(capsys: pytest.CaptureFixture[str]) -> None:
    safe_print("a", 1, sep="-")
    assert capsys.readouterr().out == "a-1\n"
