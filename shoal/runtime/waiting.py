"""Those who wait for objects: threads in `get` and `wait`, futures, coroutines.

A waiting thread sleeps on a lock; all bookkeeping is the reactor's (`Waiter`). No wait is silent: after some seconds a
thread says what it waits for, and it can be interrupted at any time.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from shoal import exceptions
from shoal.node.messages import (
    ERROR,
    INLINE,
    LOST,
    PENDING,
    STORED,
    Blocked,
    Resolved,
    Unblocked,
)
from shoal.objects.loading import add_place
from shoal.objects.serialization import deserialize
from shoal.rpc.messages import Failed
from shoal.rpc.reactor import LEAD_S
from shoal.runtime.ready_log import ReadyLog, WaitCall
from shoal.runtime.references import References, foreign
from shoal.runtime.sweep import Sweep

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

    from shoal.runtime.object_ref import ObjectRef

logger = logging.getLogger(__name__)

EXPLAIN_AFTER_S: Final = 5.0
EXPLAIN_AGAIN_S: Final = 30.0
GRACE_S: Final = 0.1
"""What a look (timeout 0) may take when the answer is the agent's to give."""
_NO_VIEWS: Final[dict[bytes, memoryview]] = {}


class Waiter:
    """Waits until all of `refs` (each there once) are ready and stored ones in this node's store, or one failed.

    Attributes:
        views: the bytes of stored ones, by object id.
        problems: the exceptions that kept bytes from coming, by object id.
        asked: something was asked of the agent for this waiter, so that an answer may be on its way.
        done: called on the reactor's thread when it has what it waits for; None wakes the waiting thread. (Not a bound
            method by default: that would be a cycle, and what `views` pins would wait for the collector.)
    """

    __slots__ = (
        "_left",
        "_lock",
        "_missing",
        "_requests",
        "_runtime",
        "asked",
        "done",
        "finished",
        "problems",
        "refs",
        "views",
    )

    def __init__(self, runtime: References, refs: Sequence[ObjectRef[Any]]) -> None:
        self._runtime = runtime
        self._missing = len(refs)
        self._requests: dict[bytes, int] = {}
        self._left = False
        self.refs = refs
        self.views: dict[bytes, memoryview] = {}
        self.problems: dict[bytes, Exception] = {}
        self.asked = False
        self.done: Callable[[], None] | None = None  # instead of waking a thread
        self._lock = threading.Lock()
        self._lock.acquire()
        self.finished = False

    # ------------------------------------------------------------------------------------ the waiting thread's side

    def start(self) -> None:
        self._runtime.reactor.call_soon(self.begin)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until finished; False after `timeout_s` (-1: for ever)."""
        return self._lock.acquire(timeout=timeout_s)

    def leave(self) -> None:
        """Nobody waits any more (has what it wanted, its time is over, or it was interrupted). Any thread."""
        self._runtime.reactor.call_soon(self._abandon)

    def has(self, ref: ObjectRef[Any]) -> bool:
        """Whether `ref` is ready in the sense of this waiter."""
        state = ref.state
        if state == STORED:
            object_id = ref.binary()
            return object_id in self.views or object_id in self.problems
        return state != PENDING

    # ------------------------------------------------------------------------------------------- the reactor's side

    def begin(self) -> None:
        if self._left:
            return
        runtime = self._runtime
        runtime.waiters.add(self)
        for ref in self.refs:
            if self.finished:
                return
            if ref.state != PENDING:
                self.ready(ref)
            elif runtime.watch(ref, self):
                self.asked = True

    def ready(self, ref: ObjectRef[Any]) -> None:
        """`ref` is not pending any more."""
        if self.finished or self._left:
            return
        if ref.state == INLINE:
            self._count()
        elif ref.state != STORED:
            self._finish()
        elif not self._runtime.follows(ref):
            self.problems[ref.binary()] = foreign(ref)
            self._finish()
        else:
            self.asked = True
            self._requests[ref.binary()] = self._runtime.fetch(ref, lambda reply: self._fetched(ref, reply))

    def _fetched(self, ref: ObjectRef[Any], reply: Resolved | Failed) -> None:
        object_id = ref.binary()
        self._requests.pop(object_id, None)
        runtime = self._runtime
        failed = False
        if isinstance(reply, Failed):
            self.problems[object_id] = runtime.problem_of(ref, reply)
            failed = True
        elif reply.state.state == STORED:
            ref.local = True
            view = runtime.view_of(ref, reply)  # unpins when it is dropped, here or later
            if not self._left:
                self.views[object_id] = view
        else:
            runtime.learn(ref, reply.state)
            failed = ref.state in (ERROR, LOST)
        if self.finished or self._left:
            return
        if failed:
            self._finish()
        else:
            self._count()

    def _count(self) -> None:
        self._missing -= 1
        if self._missing <= 0:
            self._finish()

    def _finish(self) -> None:
        self.finished = True
        self._runtime.waiters.discard(self)
        if self.done is not None:
            self.done()
        else:
            self._lock.release()

    def _abandon(self) -> None:
        self._left = True
        self.done = None
        self._runtime.waiters.discard(self)
        for ref in self.refs:
            waiters = ref.waiters
            if waiters is not None and self in waiters:
                waiters.remove(self)
        for request in self._requests.values():
            self._runtime.cancel_fetch(request)


class Waiting(References):
    """See the module.

    Attributes:
        explain_after_s, explain_again_s: how long a thread waits until it says what for, and until it says so again.
        ready_log: what became ready of that for which somebody called `wait`.
        before_blocking: called in a user's thread before it waits (a worker hands its queue back).
    """

    def __init__(self, *, worker_id: bytes, token: bytes, is_driver: bool, name: str) -> None:
        super().__init__(worker_id=worker_id, token=token, is_driver=is_driver, name=name)
        self.explain_after_s = EXPLAIN_AFTER_S
        self.explain_again_s = EXPLAIN_AGAIN_S
        self.before_blocking: Callable[[], None] = lambda: None
        self.ready_log = ReadyLog(self)
        self._blocked: set[int] = set()  # by id: waiters whose threads lend their CPUs

    def why(self, ref: ObjectRef[Any]) -> str:
        """One line on what a ref that is not ready waits for. Any thread."""
        raise NotImplementedError

    def what(self, ref: ObjectRef[Any]) -> str:
        """The object in people's words."""
        run = ref.task
        return f"the result of {run.bound.name}" if run is not None else f"object {ref.hex()}"

    # ------------------------------------------------------------------------------------------------- get and wait

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        views = _NO_VIEWS
        for ref in refs:
            if ref.state == PENDING or ref.state == STORED:
                views = self._wait_for_values(refs, timeout_s)
                break
        return [self._value(ref, views) for ref in refs]

    def _value(self, ref: ObjectRef[Any], views: dict[bytes, memoryview]) -> Any:
        state = ref.state
        if state == INLINE:
            flat: bytes | memoryview = ref.value
        elif state == STORED:
            view = views.get(ref.binary())
            if view is None:
                return self.get([ref], None)[0]
            flat = view
        else:
            raise self.error_of(ref)
        try:
            return deserialize(flat)
        except Exception as exc:
            add_place(exc, self.what(ref))
            raise

    def _wait_for_values(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> dict[bytes, memoryview]:
        left = list({ref.binary(): ref for ref in refs if ref.state != INLINE}.values())
        if not left:  # they became ready meanwhile
            return _NO_VIEWS
        waiter = Waiter(self, left)
        if not self._sleep(waiter, timeout_s):
            missing = [ref for ref in left if not waiter.has(ref)]
            text = (
                f"{len(missing)} of {len({ref.binary() for ref in refs})} objects were not ready after {timeout_s:g} s"
            )
            if missing:
                text += f"; the first is {self.what(missing[0])}: {self.why(missing[0])}"
            raise exceptions.GetTimeoutError(text)
        for ref in left:
            if ref.state in (ERROR, LOST):
                for other in left:  # they were asked for as well, also those that have not ended yet
                    other.watched = other.watched or other.owned
                    self.seen(other)
                raise self.error_of(ref)
            if waiter.problems and ref.binary() in waiter.problems:
                raise waiter.problems[ref.binary()]
        return waiter.views

    def wait(
        self, refs: Sequence[ObjectRef[Any]], num_returns: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """`refs` are each there once. See `sweep` for what makes a wait over what an earlier one left over cheap."""
        log = self.ready_log
        sweep = Sweep.over(log, refs, fetch_local)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while len(sweep.found) < num_returns:
            sweep.catch_up()
            missing = num_returns - len(sweep.found)
            if missing <= 0:
                break
            call = WaitCall(
                self, log, sweep.refs, sweep.members, missing,
                fetch=fetch_local, since=sweep.seen, unattended=sweep.take_unattended(),
            )  # fmt: skip
            if not self._sleep(call, None if deadline is None else max(0.0, deadline - time.monotonic())):
                sweep.catch_up()
                break
        return sweep.split(num_returns)

    def _sleep(self, waiter: Waiter | WaitCall, timeout_s: float | None) -> bool:
        """Wait in a user's thread; lends its CPUs meanwhile, and says why after a while. False after the timeout."""
        self.check_may_block()
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        lends = False
        explain_in = self.explain_after_s
        try:
            if timeout_s is None or timeout_s > LEAD_S:
                self.reactor.calls.append((waiter.begin, ()))
                self.reactor.lead(lambda: waiter.finished)
                if waiter.finished:
                    return True
            else:
                self.reactor.call_soon(waiter.begin)
            if self.reactor.ended and not waiter.wait(1.0):
                raise exceptions.LocalAgentDiedError(self.closed)
            if not self.is_driver and timeout_s != 0:
                self.before_blocking()
                lends = True
                self.reactor.call_soon(self._set_blocked, id(waiter), True)
            while not waiter.finished:
                slice_s = explain_in
                if deadline is not None:
                    slice_s = max(0.0, min(slice_s, deadline - time.monotonic()))
                if waiter.wait(slice_s):
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return timeout_s == 0 and self._look(waiter)
                self._explain(waiter)
                explain_in = self.explain_again_s
            return True
        finally:
            waiter.leave()
            if lends:
                self.reactor.call_soon(self._set_blocked, id(waiter), False)

    def _look(self, waiter: Waiter | WaitCall) -> bool:
        """Timeout 0 must see what is ready already: give the reactor one round, and the agent time for an answer."""
        looked = threading.Event()
        self.reactor.call_soon(looked.set)
        looked.wait(1.0)
        return waiter.wait(GRACE_S if waiter.asked else 0)

    def _set_blocked(self, waiter: int, blocked: bool) -> None:
        """Saying it again, or the end without the beginning (an interrupt may come in between), changes nothing."""
        before = bool(self._blocked)
        if blocked:
            self._blocked.add(waiter)
        else:
            self._blocked.discard(waiter)
        if before != bool(self._blocked):
            self.agent.send(Blocked() if blocked else Unblocked())

    def lend(self, waiting: object, begin: bool) -> None:
        """A user's thread begins (ends) to wait for something else than objects, and lends its CPUs meanwhile."""
        if begin:
            self.before_blocking()
        self.reactor.call_soon(self._set_blocked, id(waiting), begin)

    def _explain(self, waiter: Waiter | WaitCall) -> None:
        waiting = [ref for ref in waiter.refs if not waiter.has(ref)]
        reasons: dict[str, ObjectRef[Any]] = {}  # text -> the first object that waits for it
        for ref in waiting[:1000]:
            reasons.setdefault(self.why(ref), ref)
        reasons.pop("it is running", None)  # long calls are nothing to worry about
        if not reasons:
            return
        why, ref = next(iter(reasons.items()))
        count = f"{len(waiting)} objects, one of which is " if len(waiting) > 1 else ""
        text = f"still waiting for {count}{self.what(ref)}: {why}"
        logger.warning("%s", text)
        if not self.is_driver and sys.stderr is not None:
            print(text, file=sys.stderr)  # comes out at the driver, which cannot know what a worker waits for

    # -------------------------------------------------------------------------------------------------------- futures

    def on_ready(self, ref: ObjectRef[Any], call: Callable[[Callable[[], Any]], None]) -> Waiter:
        """When the value is here, `call(read)` on the reactor's thread; `read()` returns it or raises. Any thread."""
        waiter = Waiter(self, [ref])

        def read() -> Any:
            if waiter.problems:
                raise waiter.problems[ref.binary()]
            return self._value(ref, waiter.views)

        waiter.done = lambda: call(read)
        waiter.start()
        return waiter

    def concurrent_future(self, ref: ObjectRef[Any]) -> concurrent.futures.Future[Any]:
        """Any thread."""
        import concurrent.futures

        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def ready(read: Callable[[], Any]) -> None:
            try:
                value = read()
            except BaseException as exc:  # noqa: BLE001 # whatever the task raised
                future.set_exception(exc)
            else:
                future.set_result(value)

        self.on_ready(ref, ready)
        return future

    def async_future(self, ref: ObjectRef[Any]) -> asyncio.Future[Any]:
        """By the thread of a running event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(read: Callable[[], Any]) -> None:
            if future.done():
                return
            try:
                value = read()
            except BaseException as exc:  # noqa: BLE001 # whatever the task raised
                future.set_exception(exc if not isinstance(exc, StopIteration) else RuntimeError(repr(exc)))
            else:
                future.set_result(value)

        def ready(read: Callable[[], Any]) -> None:
            try:
                loop.call_soon_threadsafe(settle, read)
            except RuntimeError:
                logger.debug("the event loop that awaited %s is closed", ref.hex())

        waiter = self.on_ready(ref, ready)
        future.add_done_callback(lambda done: waiter.leave() if done.cancelled() else None)
        return future
