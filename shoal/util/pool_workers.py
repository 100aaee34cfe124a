"""The workers behind `shoal.util.multiprocessing.Pool`: actors, and who of them gets which batch of calls.

Batches wait here, not at the actors, so that whoever is free takes the next one. Only when batches turn out to be short
are several sent ahead (`ahead`), so that the way to the actor and back does not count. When one of them takes long
after all, those behind it are taken back (cancelled) for a worker that has nothing to do: what runs first may be
waiting for what they bring about. An actor takes part once its constructor has ended, so an actor that finds no place
in the cluster holds up nothing.

A worker that dies is replaced. What it had been given fails: some of it may have run. When the initializer raises, or
workers die again and again before they have begun, everything fails, with that reason: more of them would not help.
"""

from __future__ import annotations

import collections
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol

from shoal.api.actor import ActorHandle
from shoal.api.initialize import connect_if_needed
from shoal.api.options import qualified_name
from shoal.exceptions import ActorDiedError, ActorError, LocalAgentDiedError, ShoalError, TaskCancelledError, TaskError
from shoal.rpc.held_signals import HeldSignals
from shoal.util.completions import Completions, Read

if TYPE_CHECKING:
    from shoal.runtime.object_ref import ObjectRef

MOST_AHEAD: Final = 64
TAKE_BACK_AFTER_S: Final = 0.02
AHEAD_S: Final = 0.004
"""So much work is sent ahead: much more than the way there takes, much less than people notice."""
MOST_FAILED_STARTS: Final = 3

Outcome = tuple[bool, Any]
"""(True, value) or (False, exception)."""


class PoolWorker:
    """The actor. Module state that the initializer sets stays for all calls that it runs."""

    def __init__(self, initializer: Callable[..., object] | None, initargs: tuple[Any, ...]) -> None:
        if initializer is not None:
            initializer(*initargs)

    def one(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    def each(self, function: Callable[..., Any], items: list[Any]) -> list[Any]:
        return [function(item) for item in items]

    def each_star(self, function: Callable[..., Any], items: list[Any]) -> list[Any]:
        return [function(*item) for item in items]

    def outcomes(self, function: Callable[..., Any], items: list[Any]) -> list[Outcome]:
        """Goes on after an error: whoever takes the results one by one gets those behind it, too."""
        return [self._outcome(function, item) for item in items]

    def _outcome(self, function: Callable[..., Any], item: Any) -> Outcome:
        try:
            return True, function(item)
        except Exception as exc:  # noqa: BLE001 # the boundary of user code
            where = connect_if_needed().context()
            name = qualified_name(function)
            error = TaskError.from_exception(
                exc, function_name=name, pid=os.getpid(), ip=where.node_ip, node_id=where.node_id.hex()
            )
            return False, error


class Job(Protocol):
    """Who is told of the results of batches; once for each, on the crew's own thread or on that of `submit`."""

    def settle(self, index: int, ok: bool, value: Any) -> None: ...


class Batch:
    """One call of a `PoolWorker`; `index` is its place in the job."""

    __slots__ = ("args", "index", "job", "method", "taken_back")

    def __init__(self, job: Job, index: int, method: str, *args: Any) -> None:
        self.job = job
        self.index = index
        self.method = method
        self.args = args
        self.taken_back = False


class _Slot:
    """The place of one worker."""

    def __init__(self, actor: ActorHandle[Any]) -> None:
        self.actor = actor
        self.gone = False  # it died, or has had its number of batches
        self.listed = False  # in one of the lists of those that can take another batch
        self.out: dict[Batch, tuple[ObjectRef[Any], float]] = {}  # what it has: result, when it was sent
        self.given = 0
        self.ahead = 1  # batches that it may have at a time
        self.last_end = 0.0
        self.pace_s = AHEAD_S  # between the ends of two batches, averaged

    def has_ended_one(self, sent: float, now: float) -> None:
        self.pace_s = 0.7 * self.pace_s + 0.3 * (now - max(sent, self.last_end))
        self.last_end = now
        self.ahead = min(MOST_AHEAD, max(1, int(AHEAD_S / self.pace_s)))


class Crew:
    """A number of workers and a line of batches for them. Any thread may call.

    Attributes:
        changed: guards everything here and in the jobs; notified when something ended. Re-entrant, because collecting
            garbage while it is held may run a `__del__` that ends the pool.
        closed: no more batches will come. ended: why nothing is run any more, or None.
    """

    def __init__(self, processes: int, make_actor: Callable[[], ActorHandle[Any]], max_batches: int | None) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.closed = False
        self.ended: BaseException | None = None
        self._make_actor = make_actor
        self._max_batches = max_batches
        self._runtime = connect_if_needed()
        self._completions = Completions("shoal-pool")
        self._line: collections.deque[Batch] = collections.deque()
        self._out: set[Batch] = set()
        self._unsendable: list[tuple[Batch, BaseException]] = []
        self._busy = 0  # who feeds, or tells a job: the end has to wait for them
        self._idle: collections.deque[_Slot] = collections.deque()
        self._with_room: collections.deque[_Slot] = collections.deque()  # busy, but may have more
        self._slots: set[_Slot] = set()
        self._failed_starts = 0
        for _ in range(processes):
            self._start_one()

    # ----------------------------------------------------------------------------------------------------- batches

    def submit(self, *batches: Batch) -> bool:
        """False when nothing is run any more; the jobs have been told why."""
        # A Ctrl-C in the middle must not lose a worker: in a notebook the pool lives on.
        with HeldSignals(), self.changed:
            error = self.ended
            if error is None:
                self._line.extend(batches)
                self._hand_out()
        if error is not None:
            self._fail(batches, error)
        self._fail_unsendable()
        return error is None

    def begin_feeding(self) -> None:
        """Somebody will submit more, also after `close`."""
        with self.changed:
            self._busy += 1

    def end_feeding(self) -> None:
        with self.changed:
            self._busy -= 1
            self._look_for_the_end()

    # ---------------------------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """End when all that was submitted is done."""
        with self.changed:
            self.closed = True
            self._look_for_the_end()

    def end(self, error: BaseException, *, kill: bool) -> None:
        """End now: what is not done fails with `error`. Without `kill` the workers end after what they are doing."""
        with self.changed:
            self.closed = True
            left = self._break(error)
            actors = [slot.actor for slot in self._slots]
            self._slots.clear()
            self._idle.clear()
            self._with_room.clear()
            self._completions.stop()
            self.changed.notify_all()
        for actor in actors if kill else ():
            try:
                self._runtime.kill_actor(actor._actor_id, no_restart=True)
            except ShoalError:  # the cluster is gone, and with it the actor
                break
        self._fail(left, error)

    def wait_done(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.ended is not None or not (self._line or self._out or self._busy))

    def _look_for_the_end(self) -> None:
        if not (self._line or self._out or self._busy):
            self.changed.notify_all()
            if self.closed:
                self._slots.clear()  # a worker ends with its handle
                self._idle.clear()
                self._with_room.clear()
                self._completions.finish()
        elif self.closed:
            self.changed.notify_all()  # who feeds need not wait for room any more

    def _break(self, error: BaseException) -> list[Batch]:
        """Run nothing any more; returns what has to fail."""
        self.ended = self.ended or error
        left = [*self._out, *self._line]
        self._out.clear()
        self._line.clear()
        self.changed.notify_all()
        return left

    def _fail(self, batches: list[Batch] | tuple[Batch, ...], error: BaseException) -> None:
        for batch in batches:
            batch.job.settle(batch.index, False, error)

    def _fail_unsendable(self) -> None:
        while self._unsendable:
            batch, error = self._unsendable.pop()
            batch.job.settle(batch.index, False, error)

    # ------------------------------------------------------------------------------------------ workers; with the lock

    def _start_one(self) -> None:
        slot = _Slot(self._make_actor())
        self._slots.add(slot)
        self._completions.watch(slot.actor.__ray_ready__.remote(), partial(self._started, slot))

    def _list(self, slot: _Slot) -> None:
        if not slot.listed and not slot.gone and len(slot.out) < slot.ahead:
            slot.listed = True
            (self._with_room if slot.out else self._idle).append(slot)

    def _hand_out(self) -> None:
        line = self._line
        while line and (self._idle or self._with_room):
            slot = (self._idle or self._with_room).popleft()
            slot.listed = False
            if slot.gone:
                continue
            batch = line.popleft()
            try:
                ref = getattr(slot.actor, batch.method).remote(*batch.args)
            except Exception as exc:  # noqa: BLE001 # arguments that cannot be pickled
                self._unsendable.append((batch, exc))  # jobs are told without the lock: that runs callbacks
                self._list(slot)
                continue
            self._out.add(batch)
            slot.out[batch] = (ref, time.monotonic())
            slot.given += 1
            self._completions.watch(ref, partial(self._done, slot, batch))
            if self._max_batches is not None and slot.given >= self._max_batches:
                self._replace(slot)
            else:
                self._list(slot)
        if self._idle and not line:
            self._take_back()

    def _take_back(self) -> None:
        """Somebody has nothing to do: cancel what waits behind a batch that turned out to be long.

        On the thread of the completions: only there a worker becomes idle, and one that is gets the next batch.
        """
        late = time.monotonic() - TAKE_BACK_AFTER_S
        for slot in self._slots:
            if len(slot.out) < 2:
                continue
            if max(next(iter(slot.out.values()))[1], slot.last_end) > late:
                self._completions.call_after(TAKE_BACK_AFTER_S, self._look_again)
                continue
            for batch, (ref, _) in list(slot.out.items())[1:]:
                if not batch.taken_back:
                    batch.taken_back = True
                    self._completions.cancel(ref, recursive=False)  # should it have begun, it goes on

    def _look_again(self) -> None:
        with self.changed:
            self._hand_out()
        self._fail_unsendable()

    def _replace(self, slot: _Slot) -> None:
        """Its actor ends when it has done what it was given, since nobody else holds it."""
        slot.gone = True
        self._slots.discard(slot)
        if self.ended is None and not (self.closed and not self._line and not self._busy):
            try:
                self._completions.check_connected()
            except LocalAgentDiedError as exc:
                self._unsendable += [(batch, exc) for batch in self._break(exc)]
            else:
                self._start_one()

    # ----------------------------------------------------------------------------- on the thread of the completions

    def _started(self, slot: _Slot, read: Read) -> None:
        error: ShoalError | None = None
        try:
            read()
        except ShoalError as exc:
            error = exc
        left: list[Batch] = []
        with self.changed:
            if error is None:
                self._failed_starts = 0
                self._list(slot)
                self._hand_out()
            elif slot in self._slots:
                self._failed_starts += 1
                hopeless = not isinstance(error, ActorDiedError) or error.actor_init_failed
                if hopeless or self._failed_starts > MOST_FAILED_STARTS:
                    left = self._break(error)
                else:
                    self._replace(slot)
        if error is not None:
            self._fail(left, error)
        self._fail_unsendable()

    def _done(self, slot: _Slot, batch: Batch, read: Read) -> None:
        ok, value = True, None
        try:
            value = read()
        except BaseException as exc:  # noqa: BLE001 # whatever the user's code raised
            ok, value = False, exc
        with self.changed:
            known = batch in self._out
            self._out.discard(batch)
            _, sent = slot.out.pop(batch)
            self._busy += 1
            if known and batch.taken_back and isinstance(value, TaskCancelledError):
                batch.taken_back = known = False
                self._line.appendleft(batch)
            else:
                slot.has_ended_one(sent, time.monotonic())
            if not ok and isinstance(value, ActorError) and not isinstance(value, TaskError) and not slot.gone:
                self._replace(slot)  # the worker itself died
            if slot.listed and not slot.out:  # it has become idle
                self._with_room.remove(slot)
                slot.listed = False
            self._list(slot)
            self._hand_out()
        if known:
            batch.job.settle(batch.index, ok, value)
        self._fail_unsendable()
        with self.changed:
            self._busy -= 1
            self._look_for_the_end()
