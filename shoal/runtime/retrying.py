"""Which errors of user code are tried again, and saying so.

`retry_exceptions` names classes; whether an error is one of them is found out where it was raised, by the names of its
class and of that class's bases. The owner would have to unpickle the error for it, on the thread that serves everybody,
with whatever imports and code of the user's that brings.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from shoal.exceptions import TaskError

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime
    from shoal.runtime.task_run import TaskRun

logger = logging.getLogger(__name__)

ALL: Final = ("*",)
MAX_REASON_CHARS: Final = 200
MAX_PAUSE_S: Final = 60.0
MAX_NESTING: Final = 16
TOLD_EACH: Final = 10
"""So many retries of one function are logged one by one; then only each that doubles their number."""


def names_of(retry_exceptions: bool | tuple[type[BaseException], ...]) -> tuple[str, ...]:
    """The option as it travels."""
    if isinstance(retry_exceptions, bool):
        return ALL if retry_exceptions else ()
    return tuple(map(_name, retry_exceptions))


def covers(retry_on: Sequence[str], error: BaseException) -> bool:
    """Whether `retry_exceptions` as `names_of` gave it asks for another try after `error`."""
    if not retry_on:
        return False
    if retry_on[0] == "*":
        return True
    return not {_name(cls) for cls in type(error).__mro__}.isdisjoint(retry_on)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def describe(error: BaseException) -> str:
    """One short line. Never raises."""
    for _ in range(MAX_NESTING):  # what a task got from another one that failed
        if not isinstance(error, TaskError) or error.cause is None:
            break
        error = error.cause
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - the user's __str__
        text = ""
    line = next(iter(text.splitlines()), "")
    if len(text) > len(line) or len(line) > MAX_REASON_CHARS:
        line = f"{line[:MAX_REASON_CHARS]} ..."
    return f"{type(error).__qualname__}: {line}" if line else type(error).__qualname__


def pause(runtime: CoreRuntime, run: TaskRun, cause: str) -> None:
    """The call's worker was ended because its node had too little memory: run it again, each time after a longer while.

    That costs no retry: it was not its fault alone, and others may need less by then. On the owner's reactor's thread.
    """
    pause_s = min(MAX_PAUSE_S, 2.0**run.pauses)
    run.pauses += 1
    run.stage = "paused"
    runtime.canceller.blocked.add(run)
    _tell(runtime, f"{run.bound.name} is tried again in {pause_s:.0f} s because its worker ended: {cause}")

    def resume() -> None:
        if run.stage == "paused":
            runtime.canceller.blocked.discard(run)
            runtime.tasks.submit(run)

    runtime.reactor.call_later(pause_s, resume)


def _tell(runtime: CoreRuntime, text: str) -> None:
    logger.warning("%s", text)
    if not runtime.is_driver and sys.stderr is not None:
        print(text, file=sys.stderr)  # comes out at the driver


def use_retry(runtime: CoreRuntime, run: TaskRun, reason: str) -> None:
    """The call runs again because of `reason`: count it, and tell the user. On the owner's reactor's thread."""
    if run.retries > 0:
        run.retries -= 1
    bound = run.bound
    bound.retried += 1
    if bound.retried > TOLD_EACH and bound.retried & (bound.retried - 1):
        return
    left = "without limit" if run.retries < 0 else f"{run.retries} more after this"
    count = f", number {bound.retried} of this function," if bound.retried > TOLD_EACH else ""
    _tell(runtime, f"{bound.name} is tried again ({left}){count} because {reason}")
