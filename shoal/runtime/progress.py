"""Progress bars of all processes as one block at the bottom of the driver's terminal.

A bar's state travels as a line that its process prints, beginning with `MARK`: so it takes the way of all output, in
order, bounded, and seen by nobody who does not look. `Bars` keeps the newest state of each bar and makes the lines of
the block; it is pure, and `DriverOutput` draws them. A bar that is done leaves the block and becomes an ordinary line.
Where there is no terminal, a bar is an ordinary line every ten seconds and when it is done.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

import msgspec

MARK: Final = "\x1eshoal-bar "
MAX_BARS: Final = 1000
"""Remembered at once; those that were silent longest go."""
MAX_LINES: Final = 20
"""Of the block; one more line says how many bars are not shown."""
PLAIN_EVERY_S: Final = 10.0
"""Between two lines of one bar where there is no terminal."""

_BLOCKS: Final = " ▏▎▍▌▋▊▉█"


class BarState(msgspec.Struct, frozen=True):
    """One bar at one moment. `id` is its process's own number for it; `total` None: it is not known."""

    id: int
    desc: str = ""
    n: float = 0
    total: float | None = None
    unit: str = "it"
    position: int = 0
    closed: bool = False

    def line(self) -> str:
        return MARK + msgspec.json.encode(self).decode()


_decoder = msgspec.json.Decoder(BarState)


def parse(line: str) -> BarState | None:
    """None for a line that looks like a bar and is none: anybody can print anything."""
    try:
        return _decoder.decode(line[len(MARK) :])
    except (ValueError, RecursionError):
        return None


class _Bar:
    __slots__ = ("began_at", "plain_at", "prefix", "state")

    def __init__(self, state: BarState, prefix: str, now: float) -> None:
        self.state = state
        self.prefix = prefix
        self.began_at = now
        self.plain_at = now

    def text(self, now: float, columns: int) -> str:
        return bar_text(self.state, self.prefix, now - self.began_at, columns)


class Bars:
    """See the module. Time comes in as an argument, in seconds of any clock."""

    def __init__(self) -> None:
        self._bars: dict[tuple[Hashable, int], _Bar] = {}  # the one that was silent longest first

    def update(self, process: Hashable, prefix: str, state: BarState, now: float, columns: int) -> str | None:
        """Take in a state; returns the bar's last line when that was its last one.

        Args:
            prefix: says whose bar it is; "" for the driver's own.
        """
        key = process, state.id
        bar = self._bars.pop(key, None)
        if bar is None:
            bar = _Bar(state, prefix, now)
        bar.state = state
        if state.closed:
            return bar.text(now, columns)
        self._bars[key] = bar
        if len(self._bars) > MAX_BARS:
            del self._bars[next(iter(self._bars))]
        return None

    def block(self, now: float, columns: int, rows: int) -> list[str]:
        """The lines to draw: by position, and then by age."""
        most = max(1, min(MAX_LINES, rows - 2))
        bars = sorted(self._bars.values(), key=lambda bar: (bar.state.position, bar.began_at, bar.prefix))
        lines = [bar.text(now, columns) for bar in bars[:most]]
        if len(bars) > most:
            lines.append(f"... and {len(bars) - most} more")
        return lines

    def plain(self, now: float, columns: int) -> list[str]:
        """Lines of the bars that have said nothing for `PLAIN_EVERY_S`, where there is no terminal."""
        lines = []
        for bar in self._bars.values():
            if now - bar.plain_at >= PLAIN_EVERY_S:
                bar.plain_at = now
                lines.append(bar.text(now, columns))
        return lines

    def __len__(self) -> int:
        return len(self._bars)


def bar_text(state: BarState, prefix: str, elapsed_s: float, columns: int) -> str:
    """One line of at most `columns` characters: "load:  25%|███   | 1/4 [00:03<00:09, 0.33it/s]"."""
    head = f"{prefix} {state.desc}".strip()
    head = "".join(char if char.isprintable() else " " for char in head)
    head = head and head + ": "
    rate = state.n / elapsed_s if elapsed_s > 0 and state.n > 0 else 0.0
    speed = f"{_number(rate)}{state.unit}/s" if rate else f"?{state.unit}/s"
    if not state.total or state.total < 0:
        return f"{head}{_number(state.n)}{state.unit} [{_clock(elapsed_s)}, {speed}]"[:columns]
    share = min(max(state.n / state.total, 0.0), 1.0)
    left = _clock((state.total - state.n) / rate) if rate and share < 1 else "00:00" if share == 1 else "?"
    before = f"{head}{share * 100:3.0f}%|"
    after = f"| {_number(state.n)}/{_number(state.total)} [{_clock(elapsed_s)}<{left}, {speed}]"
    width = columns - len(before) - len(after)
    return (before + _filled(share, min(width, 40)) + after if width >= 3 else before + after[1:])[:columns]


def _filled(share: float, width: int) -> str:
    eighths = int(share * width * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (_BLOCKS[part] if part else "")).ljust(width)


def _number(value: float) -> str:
    if value == int(value):
        return str(int(value))
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
