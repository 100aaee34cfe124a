"""How a worker leaves: after what it has sent has left, and as a Python program ends (`atexit`), but never held up by
threads of user code."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import TYPE_CHECKING, Final, NoReturn

from shoal.node.messages import HandOverEvents, Leaving
from shoal.runtime import worker_output

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime

FLUSH_S: Final = 2.0
"""How long the last messages may take to leave; a peer that does not read must not keep the process."""


def leave(runtime: CoreRuntime, cause: str) -> NoReturn:
    """End this process on purpose: for the agent that is no crash."""
    announce(runtime, cause)
    end_process(runtime, 0)


def announce(runtime: CoreRuntime, cause: str) -> None:
    """Tell the agent that this process leaves, before anybody else can know. Not on the reactor's thread."""
    runtime.reactor.call_soon(_hand_over, runtime)  # first: from then on nobody may wait for this process to end
    runtime.reactor.call_soon(runtime.agent.send, Leaving(cause))
    _flush(runtime)


def end_process(runtime: CoreRuntime, code: int) -> NoReturn:
    """End this process with an exit status. Exit handlers run unless this is the reactor's thread."""
    worker_output.flush()
    if runtime.reactor.is_here:
        _hand_over(runtime)
        runtime.agent.flush()
    else:
        atexit._run_exitfuncs()
    runtime.report_now()
    if not runtime.reactor.is_here:
        worker_output.flush()
        runtime.reactor.call_soon(_hand_over, runtime)
        _flush(runtime)
    os._exit(code & 0xFF)


def vanish(runtime: CoreRuntime, cause: str) -> NoReturn:
    """End this process now, on purpose, whatever its other threads do. On the reactor's thread."""
    runtime.agent.send(Leaving(cause))
    for channel in (*runtime.reactor.dirty, runtime.agent):
        channel.flush()
    os._exit(1)


def status_of(exc: SystemExit) -> int:
    """The exit status that `sys.exit(x)` means; a text is printed, as Python does."""
    if exc.code is None or isinstance(exc.code, int):
        return exc.code or 0
    print(exc.code, file=sys.stderr)
    return 1


def _hand_over(runtime: CoreRuntime) -> None:
    """Say what ran here; once."""
    events = runtime.pack_events()
    runtime.pack_events = lambda: b""
    if events:
        runtime.agent.send(HandOverEvents(events))


def _flush(runtime: CoreRuntime) -> None:
    gone = threading.Event()
    runtime.reactor.call_soon(_flush_all, runtime, gone)
    gone.wait(FLUSH_S)


def _flush_all(runtime: CoreRuntime, gone: threading.Event) -> None:
    for channel in [*runtime.reactor.dirty, runtime.agent]:
        channel.flush()
    runtime.reactor.call_soon(gone.set)
