"""How a worker leaves: after what it has sent has left, and as a Python program ends (`atexit`), but never held up by
threads of user code."""

from __future__ import annotations

import atexit
import os
import threading
from typing import TYPE_CHECKING, Final, NoReturn

from shoal.node.messages import Leaving
from shoal.runtime import worker_output

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime

FLUSH_S: Final = 2.0
"""How long the last messages may take to leave; a peer that does not read must not keep the process."""


def leave(runtime: CoreRuntime, cause: str) -> NoReturn:
    """End this process on purpose: for the agent that is no crash."""
    runtime.reactor.call_soon(runtime.agent.send, Leaving(cause))
    end_process(runtime, 0)


def end_process(runtime: CoreRuntime, code: int) -> NoReturn:
    """End this process with an exit status. Exit handlers run unless this is the reactor's thread."""
    worker_output.flush()
    if threading.current_thread() is not runtime.reactor.thread:
        atexit._run_exitfuncs()
        worker_output.flush()
        gone = threading.Event()
        runtime.reactor.call_soon(_flush_all, runtime, gone)
        gone.wait(FLUSH_S)
    os._exit(code & 0xFF)


def _flush_all(runtime: CoreRuntime, gone: threading.Event) -> None:
    for channel in [*runtime.reactor.dirty, runtime.agent]:
        channel.flush()
    runtime.reactor.call_soon(gone.set)
