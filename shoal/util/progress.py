"""Progress bars that tasks and actors can move: all of them show as one block at the driver.

    for item in tqdm(items, desc="loading"):
        ...

The names are those of the package tqdm, as far as they go. A bar that is moved often tells its state ten times a
second.
"""

from __future__ import annotations

import atexit
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

from shoal.control.messages import LogLines
from shoal.runtime import slot
from shoal.runtime.driver_output import DriverOutput, OutputSettings
from shoal.runtime.progress import BarState

__all__ = ["safe_print", "tqdm"]

T = TypeVar("T")

_numbers: Final = itertools.count(1)
_own_output: DriverOutput | None = None


class tqdm(Generic[T]):  # noqa: N801 - the name that everybody knows
    """A progress bar.

    Args:
        iterable: what to iterate over; its length is the total when none is given.
        desc: stands in front of the bar.
        total: how many steps there are; None: unknown.
        unit: what one step is called.
        position: bars with a smaller one stand higher.
        flush_interval_s: least time between two states that are told.
    """

    def __init__(
        self,
        iterable: Iterable[T] | None = None,
        desc: str | None = None,
        total: float | None = None,
        unit: str | None = None,
        position: int | None = None,
        flush_interval_s: float = 0.1,
    ) -> None:
        self._closed = True  # until all is well: `__del__` comes also when this raises
        if total is None and iterable is not None:
            try:
                total = len(iterable)  # type: ignore[arg-type]
            except TypeError:  # an iterator
                total = None
        self.iterable = iterable
        self.desc = desc or ""
        self.total = total
        self.unit = unit or "it"
        self.position = position or 0
        self.n: float = 0
        self._id = next(_numbers)
        self._flush_interval_s = flush_interval_s
        self._pid = os.getpid()
        self._closed = False
        self._tell()

    def set_description(self, desc: str) -> None:
        self.desc = desc
        self._tell()

    def update(self, n: float = 1) -> None:
        """Move on by `n` steps."""
        self.n += n
        if time.monotonic() - self._told_at >= self._flush_interval_s:
            self._tell()

    def refresh(self) -> None:
        """Show the state now."""
        self._tell()

    def close(self) -> None:
        """The last state stays as a line."""
        if not self._closed:
            self._closed = True
            self._tell()

    def _tell(self) -> None:
        self._told_at = time.monotonic()
        state = BarState(self._id, self.desc, self.n, self.total, self.unit, self.position, self._closed)
        _show(state.line())

    def __iter__(self) -> Iterator[T]:
        if self.iterable is None:
            raise TypeError("this progress bar has nothing to iterate over; give it an iterable, or call update()")
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._closed and self._pid == os.getpid():
            try:
                self.close()
            except Exception:  # noqa: BLE001 - the interpreter is ending
                return


def safe_print(*values: Any, **options: Any) -> None:
    """`print`; in the driver, what is printed this way does not land inside the block of bars."""
    runtime = slot.current
    output = getattr(runtime, "output", None) or _own_output
    if output is None:
        print(*values, **options)
        return
    with output.without_bars():
        print(*values, **options)


def _show(line: str) -> None:
    global _own_output
    runtime = slot.current
    if runtime is not None:
        runtime.show_progress(line)
        return
    if _own_output is None:  # a program that is not connected
        _own_output = DriverOutput("", OutputSettings())
        atexit.register(_own_output.close)
    _own_output.show([LogLines(b"", b"", "", 0, "", "err", [line])])  # no pid: it needs no prefix
