"""`ActorPool`: calls for a fixed set of actors, one at a time each."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NoReturn, TypeVar

from shoal.api.actor import ActorHandle
from shoal.api.calls import get
from shoal.api.initialize import connect_if_needed
from shoal.runtime.object_ref import ObjectRef

A = TypeVar("A")
Call = Callable[[Any, Any], ObjectRef[Any]]


class ActorPool(Generic[A]):
    """Gives each value to an actor that is free.

        pool = ActorPool([Worker.remote() for _ in range(4)])
        print(list(pool.map(lambda worker, value: worker.double.remote(value), range(100))))

    A failed call raises from the `get_next...` that would have given its result; its actor is free again then.
    """

    def __init__(self, actors: Sequence[ActorHandle[A]]) -> None:
        self._idle: collections.deque[ActorHandle[A]] = collections.deque(actors)
        self._all = set(self._idle)
        self._arrivals = connect_if_needed().arrivals()
        self._running: dict[ObjectRef[Any], ActorHandle[A]] = {}
        self._waiting: collections.deque[tuple[Call, Any]] = collections.deque()
        self._begun = 0  # so many calls, numbered in the order of submission
        self._next = 0  # no result before this number is left
        self._results: dict[int, ObjectRef[Any]] = {}  # number of the call -> its result, begun and not taken
        self._number_of: dict[ObjectRef[Any], int] = {}  # the same the other way round
        self._done: collections.deque[ObjectRef[Any]] = collections.deque()  # ended; some may be taken already

    def map(self, fn: Call, values: Iterable[Any]) -> Iterator[Any]:
        """Results of `fn(actor, value)`, which returns a reference, for each value, in their order.

        All values are submitted at once; results of earlier calls that nobody has taken are dropped.
        """
        return self._map(fn, values, self.get_next)

    def map_unordered(self, fn: Call, values: Iterable[Any]) -> Iterator[Any]:
        """As `map`, in the order in which the results come."""
        return self._map(fn, values, self.get_next_unordered)

    def _map(self, fn: Call, values: Iterable[Any], take: Callable[[], Any]) -> Iterator[Any]:
        self._waiting.clear()
        for number in list(self._results):
            self._drop(number)
        for value in values:
            self.submit(fn, value)

        def results() -> Iterator[Any]:
            while self.has_next():
                yield take()

        return results()

    def submit(self, fn: Call, value: Any) -> None:
        """Call `fn(actor, value)` with a free actor, now or as soon as there is one."""
        self._waiting.append((fn, value))
        self._start_waiting()

    def has_next(self) -> bool:
        """Whether there is a result to take, now or later."""
        return bool(self._results or self._waiting)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The next result in the order of submission.

        Args:
            timeout: seconds.
            ignore_if_timedout: give up a result that is late; its actor is used again once the call has ended.
        Raises:
            StopIteration: there is none. TimeoutError: it is not there yet.
        """
        self._check_next()
        number = self._first()
        deadline = None if timeout is None else time.monotonic() + timeout
        while number not in self._results or self._results[number] in self._running:
            if not self._collect(deadline):
                self._late(number, timeout, ignore_if_timedout)
        return self._take(number)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The result that is there first. Arguments and errors: see `get_next`."""
        self._check_next()
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            while self._done:
                number = self._number_of.get(self._done.popleft())
                if number is not None:
                    return self._take(number)
            if not self._collect(deadline):
                self._late(self._first(), timeout, ignore_if_timedout)

    def has_free(self) -> bool:
        """Whether an actor is free and no call waits for one, as far as the results taken so far show."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle[A] | None:
        """Take a free actor out of the pool; None when there is none."""
        if not self.has_free():
            return None
        actor = self._idle.popleft()
        self._all.discard(actor)
        return actor

    def push(self, actor: ActorHandle[A]) -> None:
        """Put one more actor into the pool.

        Raises: ValueError: it is in it already.
        """
        if actor in self._all:
            raise ValueError(f"{actor!r} belongs to the pool already")
        self._all.add(actor)
        self._idle.append(actor)
        self._start_waiting()

    # --------------------------------------------------------------------------------------------------------- inside

    def _check_next(self) -> None:
        if not self.has_next():
            raise StopIteration("no more results to get")
        if not self._running and not self._results:
            raise ValueError("the pool has no actor to run what was submitted; push() one")

    def _start_waiting(self) -> None:
        while self._idle and self._waiting:
            fn, value = self._waiting.popleft()
            actor = self._idle.popleft()
            try:
                ref = fn(actor, value)
                if not isinstance(ref, ObjectRef):
                    raise TypeError(f"the function of an ActorPool returns a reference, not {ref!r}: call .remote()")
            except BaseException:
                self._idle.append(actor)
                raise
            self._running[ref] = actor
            self._results[self._begun] = ref
            self._number_of[ref] = self._begun
            self._begun += 1
            self._arrivals.add([ref])

    def _first(self) -> int:
        """Number of the first result that was not taken; its call may have to wait for an actor yet."""
        while self._next < self._begun and self._next not in self._results:
            self._next += 1
        return self._next

    def _collect(self, deadline: float | None) -> bool:
        """Wait until a call has ended; its actor gets the next one. False after the deadline."""
        arrived = self._arrivals.take(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for ref in arrived:
            self._idle.append(self._running.pop(ref))
            if ref in self._number_of:
                self._done.append(ref)
        self._start_waiting()
        return bool(arrived)

    def _take(self, number: int) -> Any:
        return get(self._drop(number))

    def _drop(self, number: int) -> ObjectRef[Any]:
        ref = self._results.pop(number)
        del self._number_of[ref]
        return ref

    def _late(self, number: int, timeout: float | None, ignore: bool) -> NoReturn:
        text = f"no result came within {timeout:g} s"
        if ignore and number in self._results:
            self._drop(number)
            text += "; the call was given up"
        raise TimeoutError(text)
