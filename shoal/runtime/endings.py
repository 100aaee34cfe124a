"""Ending calls in a worker before they end themselves: cancelled by their owner, or out of time (`timeout_s`).

    not begun              answered at once, and passed over when its turn comes
    running task           KeyboardInterrupt in its code (`interrupts`). Out of time, it has `GRACE_S` to leave; then
                           its process ends. Cancelled, it has all the time it wants, unless force=True.
    coroutine of an actor  its asyncio task is cancelled
    other actor's call     is told by `is_canceled()`, and goes on. Out of time, its caller has its answer at once.

A cancelled call that returns a value all the same has a value. One that leaves by an exception was cancelled,
whichever exception it is. One that is out of time is out of time, whatever it does afterwards.

The decisions are the reactor's thread's; the call's own thread says when its code is over. Three races are decided:
- A call begins while it is cancelled. Its thread first shows it (`running_calls`), then looks whether it was dropped
  (`Caller.dropped`). The reactor first drops it, then looks again at what is shown. One of them sees the other.
- A call ends while its time runs out. Whoever takes it out of `_timed` decides; a set lets only one have it.
- Two answers may leave for a call that was dropped while it began. The owner takes the first.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from shoal import exceptions
from shoal.node.messages import ObjectState
from shoal.objects.ids import make_task_id
from shoal.rpc.reactor import Timer
from shoal.runtime import worker_exit
from shoal.runtime.calls import Call, Caller
from shoal.runtime.interrupts import Interrupts
from shoal.runtime.messages import Cancel, Ended
from shoal.runtime.references import error_state
from shoal.runtime.retrying import covers, describe

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime

logger = logging.getLogger(__name__)

GRACE_S: Final = 1.0
"""What a call that is out of time may take to leave after it was interrupted."""


class Ending:
    """Why a call that has begun is to end before it does so by itself.

    Attributes:
        interrupt: its code on the main thread is to get a KeyboardInterrupt, which it has not got yet.
        answered: its owner knows the outcome.
    """

    __slots__ = ("answered", "error", "interrupt", "recursive", "timed_out")

    def __init__(self, error: exceptions.ShoalError, *, timed_out: bool, recursive: bool) -> None:
        self.error = error
        self.timed_out = timed_out
        self.recursive = recursive
        self.interrupt = False
        self.answered = False


class Actor(Protocol):
    """What ending calls needs to know of the actor that lives here."""

    def running_calls(self) -> Sequence[Call]:
        """Those that have begun. Any thread."""

    def interrupt(self, call: Call) -> bool:
        """Have it end soon; False when it cannot be made to. On the reactor's thread."""


class Endings:
    """See the module. One per worker process."""

    def __init__(self, runtime: CoreRuntime, tasks: Callable[[], Sequence[Call]]) -> None:
        self.actor: Actor | None = None
        self.interrupts = Interrupts()
        self._runtime = runtime
        self._running_tasks = tasks
        self._timed: set[Call] = set()  # running calls that have a limit, as long as it has not been reached
        self._look_at = float("inf")  # when the timer is due, on the monotonic clock
        self._timer: Timer | None = None

    # --------------------------------------------------------------------------------- what the call's thread does

    def begin(self, call: Call) -> None:
        """A call with `timeout_s` begins."""
        call.deadline = time.monotonic() + call.target.template.timeout_s
        self._timed.add(call)
        if call.deadline < self._look_at:
            self._runtime.reactor.call_soon(self._set_timer)

    def over(self, call: Call) -> Ending | None:
        """The call's code is over: what ended it, None when nothing did."""
        ending = call.ending
        if call.target.template.timeout_s:
            try:
                self._timed.remove(call)
            except KeyError:
                return call.ending
            if ending is not None and ending.timed_out:
                return None  # the last moment
        return ending

    def reply(self, call: Call, ending: Ending, exc: BaseException | None) -> Ended | None:
        """What to tell the owner of a call that was ended; None when it knows."""
        if ending.recursive:  # what it started after it was told to end
            self._runtime.reactor.call_soon(self._runtime.canceller.cancel_children, call.started, False)
        if ending.answered:
            return None
        error = ending.error
        if isinstance(error, exceptions.TaskCancelledError) and isinstance(exc, Exception):
            text = f"{error}; on its way out it raised {describe(exc)}"
            error = exceptions.TaskCancelledError(error.task_id, text)
        return self._ended(call, error)

    def _ended(self, call: Call, error: exceptions.ShoalError, *, leaving: bool = False) -> Ended:
        again = isinstance(error, exceptions.TaskTimeoutError) and covers(call.target.template.retry_on, error)
        retry = describe(error) if again else ""
        return Ended(call.message.counter, [error_state(error)], leaving=leaving, retry=retry)

    # --------------------------------------------------------------------------------- what the reactor's thread does

    def cancel(self, caller: Caller, message: Cancel) -> None:
        """The owner of a call does not want it any more."""
        call = self._find(caller, message.counter)
        if call is None:
            caller.drop(message.counter)
            call = self._find(caller, message.counter)  # it may have begun meanwhile
        if call is None:
            caller.channel.send(Ended(message.counter, [dropped_state(caller, message.counter)]))
            return
        if call.ending is None:
            error = exceptions.TaskCancelledError(_task_id(caller, message.counter), self._text(call, "was cancelled"))
            call.ending = Ending(error, timed_out=False, recursive=message.recursive)
            self._interrupt(call, call.ending)
        if message.recursive:
            self._runtime.canceller.cancel_children(call.started, message.force)
        if message.force and self.actor is None:
            self._kill(call, exceptions.WorkerCrashedError(self._text(call, "was ended by cancel(force=True)")))

    def _interrupt(self, call: Call, ending: Ending) -> bool:
        production = call.caller.productions.get(call.message.counter)
        if production is not None:
            production.wake()
        if self.actor is not None:
            return self.actor.interrupt(call)
        ending.interrupt = True
        self.interrupts.send()
        return True

    def _running(self) -> Sequence[Call]:
        return self._running_tasks() if self.actor is None else self.actor.running_calls()

    def _find(self, caller: Caller, counter: int) -> Call | None:
        for call in self._running():
            if call.message.counter == counter and call.caller is caller and not (call.ending and call.ending.answered):
                return call
        return None

    def _text(self, call: Call, what: str) -> str:
        runtime = self._runtime
        return (
            f"{call.target.template.name} {what} while it ran on pid {os.getpid()}, node {runtime.node_id.hex()[:12]}"
        )

    def _set_timer(self) -> None:
        """Look again when the next of those that are running is out of time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._look_at = min((call.deadline for call in tuple(self._timed)), default=float("inf"))
        if self._timed:
            self._timer = self._runtime.reactor.call_later(max(0.0, self._look_at - time.monotonic()), self._look)

    def _look(self) -> None:
        now = time.monotonic()
        for call in tuple(self._timed):
            if call.deadline <= now:
                self._expire(call)
        self._set_timer()

    def _expire(self, call: Call) -> None:
        template, runtime = call.target.template, self._runtime
        if call.ending is not None:  # cancelled, and on its way out or not: that is not for us to decide
            self._timed.discard(call)
            return
        error = exceptions.TaskTimeoutError(
            template.name, template.timeout_s, os.getpid(), runtime.node_ip, runtime.node_id.hex(),
            goes_on=self.actor is not None,
        )  # fmt: skip
        ending = call.ending = Ending(error, timed_out=True, recursive=True)
        try:
            self._timed.remove(call)
        except KeyError:
            call.ending = None  # it ended at the last moment
            return
        logger.info("%s", error)
        runtime.canceller.cancel_children(call.started, False)
        if self._interrupt(call, ending):
            runtime.reactor.call_later(GRACE_S, lambda: self._insist(call, ending))
        else:
            self._answer(call, ending)

    def _insist(self, call: Call, ending: Ending) -> None:
        if call not in self._running():
            return
        if self.actor is None:
            self._kill(call, ending.error)
        else:
            self._answer(call, ending)

    def _answer(self, call: Call, ending: Ending) -> None:
        """Its owner need not wait for it."""
        ending.answered = True
        production = call.caller.productions.get(call.message.counter)
        if production is not None:
            production.stop()  # nobody reads
        call.caller.channel.send(self._ended(call, ending.error))

    def _kill(self, call: Call, error: exceptions.ShoalError) -> None:
        """End this process, and say first what that means for the call."""
        call.caller.channel.send(self._ended(call, error, leaving=True))
        worker_exit.vanish(self._runtime, str(error))


def dropped_state(caller: Caller, counter: int) -> ObjectState:
    return error_state(exceptions.TaskCancelledError(_task_id(caller, counter)))


def _task_id(caller: Caller, counter: int) -> str:
    return make_task_id(caller.prefix, counter).hex()
