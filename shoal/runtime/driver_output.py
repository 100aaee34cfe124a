"""What the driver shows of what its workers print: a prefix that says who, and one line instead of a thousand alike.

    (square pid=4711) hello
    (Counter pid=4712, ip=10.0.0.7) loading shard 3 [repeated 7x across cluster]

De-duplication: the first line of its kind is shown at once. As soon as a second process prints a line that is equal but
for its numbers, such lines are counted until `window_s` after the first, when the last of them is shown with the count.
What one process alone repeats is shown as it is: a loop that prints its progress shall not be folded. The decision is
`Deduplicator`, pure, with time passed in; `DriverOutput` is the shell: a thread that formats and writes to whatever
sys.stdout and sys.stderr are at that moment (notebooks and test runners replace them). A thread of its own, because a
terminal that is stopped or a pager that is not read blocks its writer, and must not block the runtime.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TextIO

from shoal.control.messages import LogLines
from shoal.runtime.progress import MARK as BAR_MARK
from shoal.runtime.progress import Bars
from shoal.runtime.progress import parse as parse_bar

MAX_KINDS: Final = 10_000
"""Kinds of lines that are remembered at once; beyond it the oldest is shown with its count and forgotten."""

MAX_PENDING_LINES: Final = 50_000
"""Lines that wait for a slow terminal."""

COLORS: Final = (36, 35, 32, 34, 33, 96, 95, 92, 94, 93)
"""ANSI colours of prefixes, one per process in turn; red stays for errors."""

PIECE_BYTES: Final = 4096
"""What the kernel writes to a pipe in one go: an unbuffered `print` of the user's does not land inside a line."""

_PLAIN_ENCODINGS: Final = frozenset({"utf-8", "utf8", "ascii", "us-ascii", "iso-8859-1", "latin-1", "latin1"})
"""Those that encode each character by itself."""

_NUMBERS: Final = re.compile(r"\b0x[0-9a-fA-F]+\b|\d+")


@dataclass(frozen=True, slots=True)
class OutputSettings:
    """How lines are shown. `color`: "auto" (on a terminal), "always" or "never"."""

    dedup: bool = True
    window_s: float = 5.0
    allow: re.Pattern[str] | None = None  # lines that match are never folded
    skip: re.Pattern[str] | None = None  # lines that match are never shown
    color: str = "auto"
    prefix: bool = True  # who printed it stands in front of each line

    @staticmethod
    def from_environment(environ: Mapping[str, str]) -> OutputSettings:
        """SHOAL_DEDUP_LOGS (0 | 1), SHOAL_DEDUP_LOGS_AGG_WINDOW_S, SHOAL_DEDUP_LOGS_ALLOW_REGEX,
        SHOAL_DEDUP_LOGS_SKIP_REGEX, SHOAL_COLOR_PREFIX (0 | 1), NO_COLOR.

        Raises:
            ValueError: one of them cannot be read; the text names it.
        """
        window = environ.get("SHOAL_DEDUP_LOGS_AGG_WINDOW_S", "5")
        try:
            window_s = float(window)
        except ValueError as exc:
            raise ValueError(f"SHOAL_DEDUP_LOGS_AGG_WINDOW_S must be a number of seconds, not {window!r}") from exc
        color = {"": "auto", "0": "never"}.get(environ.get("SHOAL_COLOR_PREFIX", ""), "always")
        return OutputSettings(
            dedup=environ.get("SHOAL_DEDUP_LOGS", "1") not in ("0", "false"),
            window_s=window_s,
            allow=_pattern(environ, "SHOAL_DEDUP_LOGS_ALLOW_REGEX"),
            skip=_pattern(environ, "SHOAL_DEDUP_LOGS_SKIP_REGEX"),
            color="never" if environ.get("NO_COLOR") and color == "auto" else color,
        )


def _pattern(environ: Mapping[str, str], name: str) -> re.Pattern[str] | None:
    text = environ.get(name)
    try:
        return re.compile(text) if text else None
    except re.error as exc:
        raise ValueError(f"{name} is not a regular expression: {exc}") from exc


@dataclass(frozen=True, slots=True)
class Source:
    """The process (and the stream of it) that printed a line."""

    name: str
    pid: int
    ip: str
    stream: str  # "out" or "err"


@dataclass(frozen=True, slots=True)
class Shown:
    """A line to show. `repeats`: it stands for this many lines; 0: for itself."""

    source: Source
    line: str
    repeats: int = 0


class _Kind:
    """Lines that are equal but for their numbers, within one window."""

    __slots__ = ("count", "first", "line", "shared", "source", "until")

    def __init__(self, first: tuple[str, int], until: float) -> None:
        self.first = first  # (ip, pid) that printed the first one
        self.shared = False  # another process printed one too
        self.until = until
        self.count = 0  # folded lines
        self.line = ""  # the last of them
        self.source: Source | None = None


class Deduplicator:
    """Folds equal lines of several processes; time only ever comes in as an argument, in seconds of any clock."""

    def __init__(self, settings: OutputSettings) -> None:
        self._settings = settings
        self._kinds: dict[str, _Kind] = {}  # in the order of `until`, since windows are equally long

    def feed(self, source: Source, lines: Sequence[str], now: float) -> list[Shown]:
        """What to show now for these lines; windows that are over are closed first."""
        settings = self._settings
        shown = self.flush(now)
        process = (source.ip, source.pid)
        for line in lines:
            if settings.skip is not None and settings.skip.search(line):
                continue
            if not settings.dedup or not line.strip() or (settings.allow is not None and settings.allow.search(line)):
                shown.append(Shown(source, line))
                continue
            key = _NUMBERS.sub("", line)
            kind = self._kinds.get(key)
            if kind is None:
                if len(self._kinds) >= MAX_KINDS:
                    shown += self._close(next(iter(self._kinds)))
                self._kinds[key] = _Kind(process, now + settings.window_s)
                shown.append(Shown(source, line))
            elif kind.first == process and not kind.shared:
                shown.append(Shown(source, line))
            else:
                kind.shared = True
                kind.count += 1
                kind.line, kind.source = line, source
        return shown

    def flush(self, now: float) -> list[Shown]:
        """What windows that are over have folded; `float("inf")` closes all."""
        shown: list[Shown] = []
        while self._kinds:
            key, kind = next(iter(self._kinds.items()))
            if kind.until > now:
                break
            shown += self._close(key)
        return shown

    def next_flush(self) -> float | None:
        """When the first window with something folded in it is over."""
        return next((kind.until for kind in self._kinds.values() if kind.count), None)

    def _close(self, key: str) -> list[Shown]:
        kind = self._kinds.pop(key)
        if kind.source is None:
            return []
        return [Shown(kind.source, kind.line, kind.count if kind.count > 1 else 0)]


def prefix_of(source: Source, driver_ip: str) -> str:
    """`(name pid=1)`, `(pid=1)`, `(name pid=1, ip=10.0.0.7)`: the address only when it is another node's."""
    name = f"{source.name} " if source.name else ""
    ip = f", ip={source.ip}" if source.ip != driver_ip else ""
    return f"({name}pid={source.pid}{ip})"


class DriverOutput:
    """Shows lines on the driver's own streams. `show` may be called from any thread and never waits.

    Args:
        driver_ip: of the driver's node: lines from there show no address.
    """

    def __init__(self, driver_ip: str, settings: OutputSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._driver_ip = driver_ip
        self._settings = settings
        self._clock = clock
        self._dedup = Deduplicator(settings)
        self._colors: dict[tuple[str, int], int] = {}
        self._hint_due = True
        self._changed = threading.Condition()
        self._pending: deque[LogLines] = deque()  # under `_changed`, as the next three
        self._pending_lines = 0
        self._dropped = 0
        self._closing = False
        self._bars = Bars()
        self._writing = threading.RLock()  # around all that is written, the bars and `_drawn`
        self._drawn = 0  # lines of the block that stand on the terminal
        self._thread: threading.Thread | None = None  # started by the first line

    def show(self, entries: Sequence[LogLines]) -> None:
        """Show what arrived from control, soon. When the terminal takes nothing, the oldest lines give way."""
        with self._changed:
            if self._closing:
                return
            for entry in entries:
                self._pending.append(entry)
                self._pending_lines += len(entry.lines)
            while self._pending_lines > MAX_PENDING_LINES and len(self._pending) > 1:
                lost = len(self._pending.popleft().lines)
                self._pending_lines -= lost
                self._dropped += lost
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="shoal-driver-output", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self, timeout_s: float = 1.0) -> None:
        """Show what is left, folded lines included; a stream that takes nothing is given up after `timeout_s`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                at = self._dedup.next_flush()
                patience_s = None if at is None else max(0.0, at - self._clock())
                self._changed.wait_for(lambda: self._pending or self._closing, patience_s)
                entries = list(self._pending)
                dropped, self._dropped = self._dropped, 0
                closing = self._closing
                self._pending.clear()
                self._pending_lines = 0
            with self._writing:
                self._show_now(entries, dropped, closing)
            if closing:
                return

    def _show_now(self, entries: Sequence[LogLines], dropped: int, closing: bool) -> None:
        now = self._clock()
        shown = self._dedup.flush(now)
        finished: list[str] = []
        for entry in entries:
            source = Source(entry.name, entry.pid, entry.node_ip, entry.stream)
            lines = entry.lines
            if any(line.startswith(BAR_MARK) for line in lines):
                finished += self._take_bars(source, lines, now)
                lines = [line for line in lines if not line.startswith(BAR_MARK)]
            shown += self._dedup.feed(source, lines, now)
        if closing:
            shown += self._dedup.flush(float("inf"))
        self._erase_bars()
        self._write(shown, dropped)
        self._draw_bars(finished, now)

    # ------------------------------------------------------------------------------------------------ progress bars

    def _take_bars(self, source: Source, lines: Sequence[str], now: float) -> list[str]:
        """The last lines of those that are done."""
        prefix = prefix_of(source, self._driver_ip) if source.pid else ""
        columns = self._terminal()[0]
        finished = []
        for line in lines:
            state = parse_bar(line) if line.startswith(BAR_MARK) else None
            if state is not None:
                last = self._bars.update((source.ip, source.pid), prefix, state, now, columns)
                if last is not None:
                    finished.append(last)
        return finished

    def _draw_bars(self, finished: list[str], now: float) -> None:
        if not finished and not len(self._bars):
            return
        columns, rows, is_terminal = self._terminal()
        lines = finished + (self._bars.block(now, columns, rows) if is_terminal else self._bars.plain(now, columns))
        if lines and sys.stderr is not None:
            _write_text(sys.stderr, "".join(f"{line}\n" for line in lines))
        self._drawn = len(lines) - len(finished) if is_terminal else 0

    def _erase_bars(self) -> None:
        if self._drawn:
            _write_text(
                sys.stderr, f"\x1b[{self._drawn}F\x1b[J"
            )  # up, to the start of that line, and wipe what is below
            self._drawn = 0

    def _terminal(self) -> tuple[int, int, bool]:
        """(columns, rows, whether it is one), of stderr, where bars are drawn."""
        try:
            size = os.get_terminal_size(sys.stderr.fileno())
        except (AttributeError, ValueError, OSError):
            return 100, 24, False
        columns, rows = size.columns or 80, size.lines or 24  # some pretend to have none
        return max(columns - 1, 20), rows, os.environ.get("TERM") != "dumb"

    @contextmanager
    def without_bars(self) -> Iterator[None]:
        """For the time of a `with` statement the terminal is the caller's."""
        with self._writing:
            self._erase_bars()
            try:
                yield
            finally:
                self._draw_bars([], self._clock())

    def _write(self, shown: Sequence[Shown], dropped: int) -> None:
        # One write per stream and batch: lines stay whole beside what the user's own threads print.
        if dropped and sys.stderr is not None:
            _write_text(sys.stderr, f"[{dropped} lines of workers dropped: printed faster than they can be shown]\n")
        for stream, target in (("out", sys.stdout), ("err", sys.stderr)):
            chosen = [one for one in shown if one.source.stream == stream]
            if chosen and target is not None:
                color = self._is_colored(target)
                _write_text(target, "".join(self._format(one, color) for one in chosen))

    def _format(self, one: Shown, color: bool) -> str:
        if not self._settings.prefix:
            return f"{one.line}\n"
        prefix = prefix_of(one.source, self._driver_ip)
        folded = ""
        if one.repeats:
            hint = " (SHOAL_DEDUP_LOGS=0 shows each)" if self._hint_due else ""
            self._hint_due = False
            folded = f" [repeated {one.repeats}x across cluster]{hint}"
        if color:
            process = (one.source.ip, one.source.pid)
            number = self._colors.get(process)
            if number is None:
                if len(self._colors) >= MAX_KINDS:
                    self._colors.clear()
                number = self._colors[process] = COLORS[len(self._colors) % len(COLORS)]
            prefix = f"\x1b[{number}m{prefix}\x1b[0m"
            folded = folded and f"\x1b[32m{folded}\x1b[0m"
        return f"{prefix} {one.line}{folded}\n"

    def _is_colored(self, target: TextIO) -> bool:
        if self._settings.color != "auto":
            return self._settings.color == "always"
        try:
            return target.isatty() and os.environ.get("TERM") != "dumb"
        except (AttributeError, ValueError):  # a stand-in without isatty, or a closed stream
            return False


def _write_text(target: Any, text: str) -> None:
    """Write and flush; a stream that is closed, full or of another encoding costs the text, not the driver."""
    try:
        # A progress bar of the user's may be drawn on this terminal line: go to its start, and wipe it.
        if _has_progress_bar() and target.isatty():
            text = "\r\x1b[K" + text
        # The text layer of a stream may lose what two threads write at once (CPython before 3.13, gh-119506), and the
        # other one is the user's. The layer below has a lock.
        if isinstance(target, io.TextIOWrapper) and target.encoding.lower() in _PLAIN_ENCODINGS:
            target.flush()
            for piece in whole_lines(text.encode(target.encoding, "backslashreplace"), PIECE_BYTES):
                target.buffer.write(piece)
            target.buffer.flush()
        else:
            target.write(text)
            target.flush()
    except UnicodeEncodeError:
        encoding = getattr(target, "encoding", None) or "ascii"
        _write_text(target, text.encode(encoding, "backslashreplace").decode(encoding))
    except (ValueError, OSError, AttributeError):
        return


def whole_lines(data: bytes, most: int) -> Iterator[bytes]:
    """Cut `data` after line ends into pieces of up to `most` bytes; a line that is longer is a piece of its own."""
    start = 0
    while start < len(data):
        end = start + most
        if end < len(data):
            end = data.rfind(b"\n", start, end) + 1 or data.find(b"\n", end) + 1 or len(data)
        yield data[start:end]
        start = end


def _has_progress_bar() -> bool:
    """Whether the user's process draws tqdm bars now; never imports it."""
    tqdm = sys.modules.get("tqdm")
    return bool(getattr(getattr(tqdm, "tqdm", None), "_instances", None))
