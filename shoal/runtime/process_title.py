"""What `ps` and `top` show of a worker: what its main thread runs, "shoal::IDLE" when that is nothing.

A title costs a system call, and calls take microseconds: so it is set at most every `PAUSE_S`, only when it changes,
and a timer, which runs only while there is something to correct, sets it to what runs for longer, or to "shoal::IDLE".
A worker that does nothing has no timer; one that runs many short calls of several functions shows one of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from shoal.node.processes import set_title

if TYPE_CHECKING:
    from shoal.rpc.reactor import Reactor
    from shoal.runtime.calls import Target

PAUSE_S: Final = 0.05
LOOK_AGAIN_S: Final = 0.5
IDLE: Final = "shoal::IDLE"


class ProcessTitle:
    """See the module. `running()` says what the main thread runs now; called on the reactor's thread.

    Attributes:
        shown: compared with `is` before each call, so that the usual case costs no more than that.
    """

    def __init__(self, reactor: Reactor, running: Callable[[], Target | None]) -> None:
        self._reactor = reactor
        self._running = running
        self._set_at = 0.0
        self._watching = False
        self._fixed = False
        self.shown: Target | None = None

    def show(self, target: Target, now: float) -> None:
        """The main thread begins to run this. `now`: the performance counter."""
        if self._fixed:
            self.shown = target
            return
        if not self._watching:
            self._watching = True
            self._reactor.call_soon(self._look_later)
        if now - self._set_at >= PAUSE_S:
            self._set_at = now
            self.shown = target
            set_title(_title_of(target))

    def fix(self, name: str) -> None:
        """The worker is an actor from now on. On the main thread."""
        self._fixed = True
        set_title(f"shoal::{name}")

    def _look_later(self) -> None:
        self._reactor.call_later(LOOK_AGAIN_S, self._look)

    def _look(self) -> None:
        if self._fixed:
            return
        target = self._running()
        if target is None:
            self.shown, self._set_at, self._watching = None, 0.0, False
            _set_title_of_process(IDLE)
            target = self._running()
            if target is None:
                return  # what begins from here on finds `_watching` cleared
            self._watching = True
        if target is not self.shown:
            self.shown, self._set_at = target, time.perf_counter()
            _set_title_of_process(_title_of(target))
        self._look_later()


def _title_of(target: Target) -> str:
    """The kernel keeps few characters: the function's own name says more than where it was defined."""
    return f"shoal::{target.template.name.rpartition('.')[2]}"


def _set_title_of_process(title: str) -> None:
    """As `set_title`, which names the calling thread, for the main thread."""
    if sys.platform == "linux":
        fd = os.open("/proc/self/comm", os.O_WRONLY)
        try:
            os.write(fd, title.encode()[:15])
        finally:
            os.close(fd)
