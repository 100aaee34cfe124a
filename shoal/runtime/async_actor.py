"""An actor with `async def` methods: its calls are tasks of an event loop on the worker's main thread.

Up to `max_concurrency` (1000) calls are begun at a time, and as many of each concurrency group as that says, in the
order of their arrival; methods that are not coroutines run on the loop too, and hold it up. Calls come from the reactor
in batches: one wake-up of the loop for all that have arrived meanwhile, and the replies of one round of the loop leave
in one write.

At the end the user's own tasks, which belong to no call, are cancelled and given `CANCEL_S` for their clean-up.
"""

from __future__ import annotations

import asyncio
import collections
import contextvars
import inspect
import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

from shoal.node.messages import BeginActor
from shoal.runtime.actor_client import ActorOptions
from shoal.runtime.actor_host import ActorInstance
from shoal.runtime.calls import Call, Caller
from shoal.runtime.execution import CallRunner
from shoal.runtime.messages import STREAMED, Ended, Finished
from shoal.runtime.yielding import produce_on_loop

logger = logging.getLogger(__name__)

CANCEL_S: Final = 2.0

_call: contextvars.ContextVar[Call | None] = contextvars.ContextVar("shoal_call", default=None)


class AsyncActor(ActorInstance):
    """See the module. All but `submit`, `end` and `wake_to_leave` happens on the loop."""

    def __init__(self, runner: CallRunner, begin: BeginActor, options: ActorOptions) -> None:
        super().__init__(runner, begin, options)
        self._loop = asyncio.new_event_loop()
        self._arrived: collections.deque[Call] = collections.deque()
        self._waking = False  # the loop was told to look at what arrived
        self._main = _Group(self, options.max_concurrency)
        self._groups = {name: _Group(self, most) for name, most in options.groups.items()}
        self._running: dict[Call, asyncio.Task[None]] = {}
        self._unflushed: set[Caller] = set()
        self._end_cause = ""
        self._end_task: asyncio.Task[None] | None = None
        self._look_again = asyncio.Event()  # for `_finish`
        self._warned = False
        runner.runtime.before_blocking = self._about_to_block

    # ------------------------------------------------------------------------------- what other threads ask

    def submit(self, call: Call) -> None:
        self._arrived.append(call)
        if not self._waking:
            self._waking = True
            self._loop.call_soon_threadsafe(self._take_arrived)

    def end(self, cause: str) -> None:
        self._loop.call_soon_threadsafe(self._begin_end, cause)

    def wake_to_leave(self) -> None:
        self._loop.call_soon_threadsafe(self._begin_end, self.leaving)

    # --------------------------------------------------------------------------------------------- the loop's life

    def _run(self) -> str:
        loop = self._loop
        asyncio.set_event_loop(loop)
        loop.call_soon(self._begin)
        loop.run_forever()
        return self.leaving or self._end_cause

    def _begin(self) -> None:
        failure = self.construct()
        if failure:
            self._end_cause = failure
            self._loop.stop()

    def _begin_end(self, cause: str) -> None:
        self._end_cause = self._end_cause or cause
        self._look_again.set()
        if self._end_task is None:
            self._end_task = self._loop.create_task(self._finish())

    async def _finish(self) -> None:
        me = asyncio.current_task()
        while not self.leaving and (
            self._arrived or any(group.is_busy for group in (self._main, *self._groups.values()))
        ):
            self._look_again.clear()
            await self._look_again.wait()
        rest = [task for task in asyncio.all_tasks() if task is not me]
        for task in rest:
            task.cancel()
        if rest:
            _, stuck = await asyncio.wait(rest, timeout=CANCEL_S)
            if stuck:
                logger.info("%s ends with %s tasks that did not end when cancelled", self.label, len(stuck))
        await self._loop.shutdown_asyncgens()
        self._flush()
        self._loop.stop()

    # ------------------------------------------------------------------------------------------------------- calls

    def _take_arrived(self) -> None:
        self._waking = False
        arrived, main, groups = self._arrived, self._main, self._groups
        while arrived:
            call = arrived.popleft()
            (main if not groups else groups.get(call.target.template.group, main)).waiting.append(call)
        main.start_waiting()
        for group in groups.values():
            group.start_waiting()

    def start(self, call: Call) -> asyncio.Task[None]:
        return self._loop.create_task(self._run_call(call))

    def call_ended(self) -> None:
        if self._end_task is not None:
            self._look_again.set()

    async def _run_call(self, call: Call) -> None:
        runner = self._runner
        _call.set(call)
        call.started = time.perf_counter()
        self._running[call] = asyncio.current_task()  # type: ignore[assignment]
        timed = call.target.template.timeout_s
        called = returned = 0.0
        reply: Finished | Ended | None
        try:
            reply = None if call.problem is None and not call.caller.dropped else runner.refused(call)
            if reply is None:
                function = call.target.function or runner.load(call.target)
                args, kwargs = call.arguments()
                called = time.perf_counter()
                if timed:
                    runner.endings.begin(call)
                value = function(*args, **kwargs)
                if inspect.isawaitable(value):
                    value = await value
                if call.target.template.num_returns == STREAMED:
                    value = await produce_on_loop(call, value)
                returned = time.perf_counter()
                reply = runner.reply(call, value) if not timed else runner.reply_in_time(call, value)
                del args, kwargs, value
        except BaseException as exc:  # noqa: BLE001 - the boundary of user code
            reply = runner.raised(call, exc) if not self.leaving else None
        if runner.events is not None:
            times = (call.started, called, returned, time.perf_counter())
            runner.events.record((call.target, call.caller.prefix, call.message.counter, call.fetched, *times))
        call.values = []
        del self._running[call]
        if reply is None:
            call.caller.productions.pop(call.message.counter, None)
            return  # the actor's end is the answer, or the caller has one already
        runner.post(call, reply)
        if not self._unflushed:
            self._loop.call_soon(self._flush)
        self._unflushed.add(call.caller)

    def _flush(self) -> None:
        while self._unflushed:
            self._runner.flush(self._unflushed.pop())

    def current_call(self) -> Call | None:
        return _call.get()

    def running_calls(self) -> Sequence[Call]:
        return tuple(self._running)

    def interrupt(self, call: Call) -> bool:
        try:
            self._loop.call_soon_threadsafe(self._cancel, call)
        except RuntimeError:
            return False  # the loop is closed
        return True

    def _cancel(self, call: Call) -> None:
        task = self._running.get(call)
        if task is not None:
            task.cancel()

    def _about_to_block(self) -> None:
        if not self._warned and threading.current_thread() is threading.main_thread():
            self._warned = True
            text = "%s waits with get() or wait() on its event loop, where nothing else runs meanwhile; use await"
            logger.warning(text, self.label)


class _Group:
    """A concurrency group: how many of its calls run at a time, and those that wait for a place."""

    __slots__ = ("_actor", "_most", "_tasks", "waiting")

    def __init__(self, actor: AsyncActor, most: int) -> None:
        self._actor = actor
        self._most = most
        self._tasks: set[asyncio.Task[None]] = set()
        self.waiting: collections.deque[Call] = collections.deque()

    @property
    def is_busy(self) -> bool:
        return bool(self.waiting or self._tasks)

    def start_waiting(self) -> None:
        actor, waiting, tasks = self._actor, self.waiting, self._tasks
        while waiting and len(tasks) < self._most and not actor.leaving:
            task = actor.start(waiting.popleft())
            tasks.add(task)
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.waiting:
            self.start_waiting()
        self._actor.call_ended()
