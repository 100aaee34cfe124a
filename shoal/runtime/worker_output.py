"""A worker's stdout and stderr: real text streams that tell the agent which task or actor is printing.

The streams are ordinary `io.TextIOWrapper`s over an ordinary `io.BufferedWriter`, so that whatever user code does with
a stream works at C speed; only the raw layer below is ours. It sees what leaves the buffer (once per line, since the
streams are line-buffered) and puts a name mark in front when the name is another than last time. A task that prints
nothing therefore costs nothing, and one that prints costs one call of `current_name` per line.

The mark and its text leave in one `write`, which the kernel keeps in one piece up to PIPE_BUF, so that output of child
processes on the same pipe cannot come between. Text that is still in the buffer when the name changes gets the new
name: whoever runs tasks calls `flush` when one has ended. That also takes the name away from what comes next: text of C
libraries and child programs passes us by, and no name is better than that of a task which is over.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from shoal.node.logs import name_mark

_outputs: Final[list[_NamedOutput]] = []
"""Those over the process's own stdout and stderr."""


def install(current_name: Callable[[], str]) -> None:
    """Replace sys.stdout and sys.stderr by streams over the file descriptors 1 and 2, here and in forks from here.

    Args:
        current_name: of the task or actor that the calling thread runs, "" for none; called in any thread that prints.
    """
    _flush_quietly(sys.stdout)
    _flush_quietly(sys.stderr)
    sys.stdout = sys.__stdout__ = open_stream(1, "<stdout>", current_name)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = open_stream(2, "<stderr>", current_name)  # type: ignore[misc]
    _outputs[:] = [sys.stdout.buffer.raw, sys.stderr.buffer.raw]  # type: ignore[attr-defined]


def open_stream(fd: int, label: str, current_name: Callable[[], str]) -> io.TextIOWrapper:
    """A line-buffered stream over `fd`, which stays open when the stream is closed or collected."""
    raw = _NamedOutput(fd, label, current_name)
    # Text that no encoding can hold is shown escaped: a task shall not fail because of what it prints.
    stream = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", newline="\n", line_buffering=True
    )
    stream.mode = "w"  # type: ignore[misc]  # as sys.stdout has it
    return stream


def flush(next_name: str = "") -> None:
    """Write out what user code printed without a line end; nothing of it when it replaced or closed the streams.

    Args:
        next_name: of what is written from now on past these streams.
    """
    _flush_quietly(sys.stdout)
    _flush_quietly(sys.stderr)
    for output in _outputs:
        output.rename(next_name)


def _flush_quietly(stream: Any) -> None:
    try:
        stream.flush()
    except (AttributeError, ValueError, OSError):  # None, closed, or nobody reads any more: nothing is left to tell
        return


class _NamedOutput(io.RawIOBase):
    """The raw layer. `BufferedWriter` holds its own lock around `write`, so there is one writer at a time."""

    def __init__(self, fd: int, label: str, current_name: Callable[[], str]) -> None:
        super().__init__()
        self.name = label
        self.mode = "wb"
        self._fd = fd
        self._current_name = current_name
        self._last_name = ""
        self._naming = threading.Lock()

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("write to closed file")
        name = self._current_name()
        if name == self._last_name:
            return os.write(self._fd, data)
        with self._naming:
            return self._write_named(name, bytes(data))

    def rename(self, name: str) -> None:
        """What is written past this stream from now on is this name's. Nobody reading is no error."""
        if name == self._last_name:
            return
        with self._naming:
            try:
                self._write_named(name, b"")
            except OSError:
                return

    def _write_named(self, name: str, data: bytes) -> int:
        self._last_name = name
        mark = name_mark(name)
        whole = mark + data
        done = os.write(self._fd, whole)
        while done < len(mark):  # a signal cut it short: half a mark must not be left
            done += os.write(self._fd, whole[done:])
        return done - len(mark)

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return False

    def writable(self) -> bool:
        return True
