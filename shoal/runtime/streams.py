"""The owner's side of calls whose results come one by one: generators, and who reads what they yield.

The problem: items arrive in batches on the reactor's thread and are read by a user's thread, which may have to wait for
the next one by itself (`next`), together with other things (`wait`), or in an event loop.

The choice: a stream always holds one reference more than has arrived, to the item that comes next. It is an ordinary
pending `ObjectRef`, so whatever can wait for an object can wait for a stream, and nothing else had to be taught what a
stream is. When an item comes, that reference gets its value and a new one follows it; at the end it becomes `end`,
which nobody gets to see. The reactor only appends and the one reader only takes, so they need no lock.

A worker that is lost is replaced in the usual way. The new one is told how many items are here and leaves those out.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from shoal.node.messages import ERROR, INLINE, LOST, PENDING, ObjectState
from shoal.objects.ids import TASK_BYTES
from shoal.objects.serialization import NONE_FLAT, serialize
from shoal.runtime.generators import DynamicObjectRefGenerator, ObjectRefGenerator
from shoal.runtime.last_uses import LastUse, LastUses
from shoal.runtime.messages import BeginStream, Consumed, StopStream
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.waiting import Waiter

if TYPE_CHECKING:
    import asyncio

    from shoal.runtime.interface import StreamOptions
    from shoal.runtime.link import WorkerLink
    from shoal.runtime.task_run import TaskRun
    from shoal.runtime.waiting import Waiting

ALL: Final = 1 << 62
"""As many items as there will ever be have been consumed."""
_WHOLE: Final = b"\xff" * 4
"""The index of the reference to the end of the whole call."""


class Stream:
    """The items of one call. Methods and fields belong to the reactor's thread, but for those of the reader.

    Attributes:
        items: what has arrived and was not taken, and as the last one the reference to what comes next.
        completed: becomes None when the call has ended, or the error that it ended with; with `dynamic`, all its items.
        end: the last of `items`, once nothing comes any more.
        dropped: nobody reads any more.
    """

    __slots__ = (
        "_base",
        "_options",
        "_run",
        "_runtime",
        "_taken",
        "_telling",
        "_to_the_end",
        "arrived",
        "completed",
        "dropped",
        "end",
        "items",
        "link",
    )

    def __init__(self, runtime: Waiting, counter: int, options: StreamOptions) -> None:
        """By a user's thread."""
        self._runtime = runtime
        self._options = options
        self._base = runtime.prefix + counter.to_bytes(8, "little")
        self._run: TaskRun | None = None
        self._taken = 0
        self._telling = False  # the reactor will tell the producer how many were taken
        self._to_the_end = options.dynamic  # somebody waits for the end of the whole call
        self.arrived = 0
        self.dropped = False
        self.end: ObjectRef[Any] | None = None
        self.link: WorkerLink | None = None  # to the worker that runs the call
        self.completed: ObjectRef[Any] = ObjectRef(self._base + _WHOLE, runtime.node_id)
        self.completed.watched = not options.dynamic  # its error is told by the item that has it, too
        self.items: collections.deque[ObjectRef[Any]] = collections.deque((self._make(1),))

    @property
    def dynamic(self) -> bool:
        """There is no reader: all items together are the value of `completed`."""
        return self._options.dynamic

    def _make(self, index: int) -> ObjectRef[Any]:
        return ObjectRef(self._base + index.to_bytes(4, "little"), self._runtime.node_id, task=self._run)

    # -------------------------------------------------------------------------------------------- the reader's side

    @property
    def head(self) -> ObjectRef[Any]:
        """What comes next: an item, or something that is ready when it is known that there is no item."""
        return self.items[0]

    def next_item(self, timeout_s: float | None) -> ObjectRef[Any] | None:
        """Wait for the next item and take it; None when it has not come within `timeout_s`.

        Raises:
            StopIteration: there is none.
        """
        ref = self.items[0]
        if ref.state == PENDING and not self._runtime._sleep(_Next(self._runtime, (ref,)), timeout_s):
            return None
        if ref is self.end:
            raise StopIteration
        if len(self.items) == 1:  # failed together with the runtime, and not by the call's end
            self._end()
        if self._options.limit:
            self._taken += 1
            if not self._telling:
                self._telling = True
                self._runtime.reactor.call_soon(self._tell_taken)
        return self.items.popleft()

    def is_finished(self) -> bool:
        """Everything was taken, and nothing comes any more."""
        return self.items[0] is self.end

    def when_ready(self) -> asyncio.Future[None]:
        """A future of the running loop: `head` is not pending any more."""
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def ready() -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop is closed: nobody waits
                pass

        waiter = _Next(self._runtime, (self.head,))
        waiter.done = ready
        waiter.start()
        future.add_done_callback(lambda done: waiter.leave() if done.cancelled() else None)
        return future

    def whole(self) -> ObjectRef[Any]:
        """The reference to the end of the call, which is to come even if nobody takes its items."""
        self._to_the_end = True
        return self.completed

    def task_id(self) -> bytes:
        return self._base[:TASK_BYTES]

    # ------------------------------------------------------------------------------------------- the reactor's side

    def begin(self, run: TaskRun) -> None:
        """The call that will fill it, before that is submitted. By a user's thread."""
        self._run = run
        self.completed.task = run
        self.items[0].task = run

    def tail(self) -> ObjectRef[Any]:
        """The reference to what comes next from the producer."""
        return self.items[-1]

    def opening(self, counter: int) -> BeginStream:
        """What a worker must know before it is sent the call."""
        options = self._options
        taken = ALL if self.dropped else self._taken
        return BeginStream(counter, self.arrived, taken, self.stopped, options.limit, options.per_yield)

    @property
    def stopped(self) -> bool:
        """The producer need not go on."""
        return self.dropped and not self._to_the_end

    def take_in(self, first: int, states: Sequence[ObjectState]) -> None:
        """Items have arrived; the first of them has the index `first`."""
        runtime, items = self._runtime, self.items
        for state in states[max(0, self.arrived + 1 - first) :]:
            ref = items[-1]
            self.arrived += 1
            items.append(self._make(self.arrived + 1))  # first: the reader finds it behind what it takes
            if self.dropped:
                items.popleft()
            ref.task = None
            if state.state == INLINE and not state.contained:
                ref.value = state.payload
                ref.state = INLINE
                if ref.waiters is not None:
                    runtime.wake(ref)
            else:
                runtime.learn(ref, state)

    def finish(self, state: ObjectState) -> None:
        """The call has ended with `state`: INLINE when all went well."""
        runtime, completed = self._runtime, self.completed
        failed = state.state in (ERROR, LOST)
        if failed and self.end is None and (self.arrived or not self._options.dynamic):
            self.take_in(self.arrived + 1, [state])
            if self._options.dynamic:
                failed = False
        if self._options.dynamic and not failed:
            refs = list(self.items)[:-1]
            packed = serialize(DynamicObjectRefGenerator(refs))
            completed.contained = runtime.contained_refs(packed)
            state = ObjectState(INLINE, packed.flatten())
            self.items.clear()
            self.items.append(self._make(self.arrived + 1))
        if self.end is None:
            self._end()
        self.link = None
        completed.task = self._run = None
        runtime.learn(completed, state)

    def _end(self) -> None:
        if self.items[-1].state != PENDING:
            self.items.append(self._make(self.arrived + 1))
        self.end = end = self.items[-1]
        end.task = None
        end.value = NONE_FLAT
        end.state = INLINE
        if end.waiters is not None:
            self._runtime.wake(end)

    def _tell_taken(self) -> None:
        self._telling = False  # first: what is taken from here on has to ask again
        if self.link is not None and self._run is not None:
            self.link.channel.send(Consumed(self._run.counter, self._taken))

    def drop(self) -> None:
        """The reader is gone, and with it what it has not taken."""
        if self.dropped:
            return
        self.dropped = True
        while len(self.items) > 1:
            self.items.popleft()
        run = self._run
        if run is None or self.end is not None:
            return
        self.items[0].watched = True  # an error is not worth a word: nobody asks any more
        if self.stopped:
            run.retries = 0
        if self.link is not None:
            stop = self.stopped
            self.link.channel.send(StopStream(run.counter) if stop else Consumed(run.counter, ALL))


class _Next(Waiter):
    """Waits until it is known what comes next, wherever its bytes are."""

    __slots__ = ()

    def has(self, ref: ObjectRef[Any]) -> bool:
        return ref.state != PENDING

    def ready(self, _ref: ObjectRef[Any]) -> None:
        if not (self.finished or self._left):
            self._finish()


class Readers:
    """Notices when the readers of a runtime's streams are gone, however they go (see `last_uses`)."""

    def __init__(self, runtime: Waiting) -> None:
        self._runtime = runtime
        self._uses: LastUses | None = None  # made by the first stream: most processes have none
        self._lock = threading.Lock()
        self._followed: dict[bytes, tuple[LastUse, Callable[[], None]]] = {}

    def open(self, stream: Stream) -> ObjectRefGenerator[Any]:
        """The reader of a stream. By a user's thread."""
        uses = self._uses
        if uses is None:
            with self._lock:
                uses = self._uses
                if uses is None:
                    uses = LastUses()
                    uses.open()
                    self._runtime.reactor.call_soon(self._runtime.reactor.register, uses.fd, self._hear)
                    self._uses = uses
        reader: ObjectRefGenerator[Any] = ObjectRefGenerator(stream)
        key = stream.completed.binary()
        self._followed[key] = (uses.follow(reader, key), stream.drop)
        return reader

    def _hear(self, _events: int) -> None:
        uses = self._uses
        assert uses is not None
        uses.heard()
        for _ in range(len(uses.gone)):
            followed = self._followed.pop(uses.gone.popleft().key, None)
            if followed is not None:
                followed[1]()

    def close(self) -> None:
        if self._uses is not None:
            self._runtime.reactor.unregister(self._uses.fd)
            self._uses.silence()

    def silence(self) -> None:
        """In a forked child: the streams are the parent's."""
        if self._uses is not None:
            self._uses.silence()
