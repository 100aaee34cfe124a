"""The worker's side of calls whose results come one by one: run a generator, and send what it yields while it goes on.

A fast producer must not pay for a message per item, and the item of a slow one must not wait. So an item leaves at once
when nothing has left for `HOLD_BACK_S`; else it waits for the next one after that time, or for the reactor, which is
asked to send what is there as soon as it gets to run. Large values go to the store one by one, as they are yielded.

A producer pauses in two cases, and until then runs ahead of whoever reads: at the limit of items that were not taken,
if the user set one, and when its owner is slower to take in bytes than it is to make them. A thread that pauses lends
its CPUs, as one does that waits in `get`. When nobody reads any more the generator is closed, and its `finally` runs.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from shoal import exceptions
from shoal.node.messages import INLINE, STORED, ObjectState
from shoal.objects.serialization import NONE_FLAT, serialize
from shoal.rpc.frames import encode_message
from shoal.runtime.messages import BeginStream, Ended, Yielded
from shoal.runtime.references import INLINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from shoal.runtime.calls import Call, Caller
    from shoal.runtime.execution import CallRunner

HOLD_BACK_S: Final = 0.001
BATCH_BYTES: Final = 1 << 20
"""A batch of more leaves at once; after so many bytes the owner is asked for an answer."""
MAX_UNANSWERED: Final = 4
"""Answers on their way. Beyond that the owner is the slower one, and the producer waits for it."""
SLICE_S: Final = 0.005
"""How long an async generator that never waits may keep the other calls of its actor from the event loop."""
_OVER: Final = object()


class Production:
    """What one call yields, on its way to its owner. Made when the call is announced, ahead of it.

    Methods belong to the thread that runs the generator, but for those of the reactor. `_lock` is held for a moment by
    either, to keep the items in order.

    Attributes:
        stopped: nobody reads: close the generator. Set by the reactor's thread.
        wake: called by the reactor's thread when a generator that is paused is to look whether it may go on.
    """

    def __init__(self, runner: CallRunner, caller: Caller, begin: BeginStream) -> None:
        self._runner = runner
        self._caller = caller
        self._counter = begin.counter
        self._have = begin.have
        self._limit = begin.limit
        self._per_yield = begin.per_yield
        self._consumed = begin.consumed
        self.stopped = begin.stopped
        self._index = 0  # of the last item that was yielded
        self._what = ""
        self._call: Call
        self._lock = threading.Lock()
        self._batch: list[ObjectState] = []
        self._first = begin.have + 1  # index of the first item in the batch
        self._batch_bytes = 0
        self._stored = False  # one of the batch is in the store
        self._kept: list[Any] = []  # references in the items of the batch
        self._sent_at = 0.0
        self._due = False  # the reactor will send the batch
        self._late = 0  # batches that wait for the reactor: what follows must not overtake them
        self._unasked_bytes = 0  # sent since the last batch that is to be answered
        self._unanswered = 0
        self._gate = threading.Lock()
        self._gate.acquire()
        self.wake: Callable[[], object] = self._open_gate

    # ------------------------------------------------------------------------------------------ the reactor's side

    def consumed(self, count: int) -> None:
        self._consumed = count
        self.wake()

    def answered(self) -> None:
        self._unanswered -= 1
        self.wake()

    def stop(self) -> None:
        self.stopped = True
        self.wake()

    def _open_gate(self) -> None:
        if self._gate.locked():  # only this thread opens it
            self._gate.release()

    def _send_due(self) -> None:
        self._due = False
        self.send()

    def _send_late(self, encoded: bytes) -> None:
        """The owner will wait for the agent's word that a value is sealed: it must be out when this process dies."""
        self._runner.runtime.agent.flush()
        with self._lock:
            self._caller.channel.send_encoded(encoded)
            self._late -= 1

    # ---------------------------------------------------------------------------------------------------- producing

    def begin(self, call: Call) -> None:
        self._call = call
        self._what = f"a value that {call.target.template.name} yielded"

    def take(self, value: Any) -> None:
        """The generator has yielded this.

        Raises:
            ValueError: not as many values as it should yield at a time. TypeError: it cannot be pickled.
            ObjectStoreFullError.
        """
        if self._per_yield == 1:
            self._add(value)
            return
        if not isinstance(value, (tuple, list)) or len(value) != self._per_yield:
            got = f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
            raise ValueError(
                f"{self._call.target.template.name} has _num_objects_per_yield={self._per_yield} and must yield tuples "
                f"or lists of as many values; it yielded {got}"
            )
        for one in value:
            self._add(one)

    def _add(self, value: Any) -> None:
        self._index += 1
        if self._index <= self._have:
            return
        result = serialize(value, self._what)
        kept: list[Any] = []
        if not result.refs and result.flat_size <= INLINE_BYTES:
            state = ObjectState(INLINE, result.flatten())
        else:
            state = self._runner.state_of(self._call, result, self._index, kept)
        now = time.perf_counter()
        with self._lock:
            self._batch.append(state)
            self._kept.extend(kept)
            self._batch_bytes += len(state.payload)
            self._stored = self._stored or state.state == STORED
        if now - self._sent_at > HOLD_BACK_S or self._batch_bytes > BATCH_BYTES or self._stored:
            self._sent_at = now
            self.send()
        elif not self._due:
            self._due = True
            self._runner.runtime.reactor.call_soon(self._send_due)

    def send(self) -> None:
        """Send what is there. Any thread."""
        caller, reactor = self._caller, self._runner.runtime.reactor
        with self._lock:
            if not self._batch:
                return
            batch, self._batch = self._batch, []
            kept, self._kept = self._kept, []
            first = self._first
            self._first += len(batch)
            self._unasked_bytes += self._batch_bytes
            self._batch_bytes = 0
            answer = self._unasked_bytes > BATCH_BYTES
            if answer:
                self._unasked_bytes = 0
                self._unanswered += 1
            if kept:
                self._runner.keep_for_owner(caller, (self._counter, first), kept)
            encoded = encode_message(Yielded(self._counter, first, batch, bool(kept), answer))
            if self._stored or self._late:
                self._stored = False
                self._late += 1
                reactor.call_soon(self._send_late, encoded)
                return
            caller.channel.post(encoded)
        caller.channel.flush_here()

    @property
    def goes_on(self) -> bool:
        """Whether to ask for another item. A first one always is: the call was made, and has its effects till then."""
        return not self.stopped or not self._index

    def is_open(self) -> bool:
        """The generator may go on."""
        ahead = self._index - self._consumed if self._limit else -1
        return (
            self.stopped or self._call.ending is not None or (ahead < self._limit and self._unanswered < MAX_UNANSWERED)
        )

    def pause(self) -> None:
        """Wait until it may go on; the thread's CPUs are lent meanwhile."""
        self.send()
        runtime = self._runner.runtime
        runtime.reactor.lead(self.is_open)
        if self.is_open():
            return
        runtime.lend(self, True)
        try:
            while not self.is_open():
                self._gate.acquire()
        finally:
            runtime.lend(self, False)

    async def pause_on_loop(self, go_on: asyncio.Event) -> None:
        self.send()
        while not self.is_open():
            go_on.clear()
            if not self.is_open():  # else it was opened in between
                await go_on.wait()

    def wake_loop(self, loop: asyncio.AbstractEventLoop) -> asyncio.Event:
        """From now on an event of this loop is set whenever it might go on."""
        go_on = asyncio.Event()
        self.wake = lambda: loop.call_soon_threadsafe(go_on.set)
        return go_on

    def end(self) -> Ended:
        """The generator has ended, or was closed.

        Raises:
            StreamingGeneratorReplayInconsistentError: the owner has more items of a former run.
        """
        if self._index < self._have and not self.stopped:
            name = self._call.target.template.name
            raise exceptions.StreamingGeneratorReplayInconsistentError(
                f"{name} was run again after its worker was lost, and yielded {self._index} values; "
                f"{self._have} had arrived before. A generator that may be retried must yield the same each time: "
                "see max_retries"
            )
        return Ended(self._counter, [ObjectState(INLINE, NONE_FLAT)])


def produce(runner: CallRunner, call: Call, values: Any) -> Ended:
    """Run what a generator function returned to its end, on the calling thread. Raises what it raises."""
    production = _production(call)
    if not hasattr(values, "__next__"):
        raise TypeError(_no_generator(call, values))
    interrupts = runner.endings.interrupts
    try:
        while production.goes_on:
            interrupts.user_call = call  # an interrupt may end the user's code, but not what we do in between
            if call.ending is not None:
                raise KeyboardInterrupt  # it came in between
            value = next(values, _OVER)
            interrupts.user_call = None
            if value is _OVER:
                break
            production.take(value)
            del value  # it must not live while the next one is made
            if not production.is_open():
                production.pause()
    finally:
        close = getattr(values, "close", None)
        if close is not None:
            interrupts.user_call = call
            close()
        interrupts.user_call = None
    return production.end()


async def produce_on_loop(call: Call, values: Any) -> Ended:
    """As `produce`, for an async generator or a plain one, on the event loop of an actor."""
    production = _production(call)
    is_async = hasattr(values, "__anext__")
    if not is_async and not hasattr(values, "__next__"):
        raise TypeError(_no_generator(call, values))
    loop = asyncio.get_running_loop()
    go_on = production.wake_loop(loop)
    slice_end = loop.time() + SLICE_S
    try:
        while production.goes_on:
            value = await anext(values, _OVER) if is_async else next(values, _OVER)
            if value is _OVER:
                break
            production.take(value)
            del value
            if not production.is_open():
                await production.pause_on_loop(go_on)
            elif loop.time() > slice_end:
                await asyncio.sleep(0)
                slice_end = loop.time() + SLICE_S
    finally:
        if is_async and hasattr(values, "aclose"):
            await values.aclose()
        elif hasattr(values, "close"):
            values.close()
    return production.end()


def _production(call: Call) -> Production:
    production = call.caller.productions[call.message.counter]
    production.begin(call)
    return production


def _no_generator(call: Call, value: Any) -> str:
    name = call.target.template.name
    return (
        f'{name} has num_returns="streaming" or "dynamic" and must be a generator; it returned a {type(value).__name__}'
    )
