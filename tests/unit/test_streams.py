"""The owner's side of a stream against a naive model: items arrive, are taken, come again from a second worker, the
call ends or fails, and the reader goes, in any order.

What must hold: the reader gets each item once and in order, then the error if there was one, then the end; what is
waited for is always the last of `items`; and a worker is told what it must know to go on where the first one stopped.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.node.messages import ERROR, INLINE, PENDING, STORED, ObjectState
from shoal.objects.serialization import NONE_FLAT, deserialize
from shoal.runtime.interface import StreamOptions
from shoal.runtime.messages import BeginStream, Consumed, StopStream
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.streams import ALL, Stream

COUNTER = 7
HOME = b"h" * 28


class FakeRuntime:
    """The few things that a stream asks of its runtime. Calls on the reactor wait until `settle`."""

    def __init__(self) -> None:
        self.prefix, self.node_id = b"p" * 16, HOME
        self.reactor = self
        self.woken: list[ObjectRef[Any]] = []
        self._calls: list[tuple[Any, tuple[Any, ...]]] = []

    def call_soon(self, call: Any, *args: Any) -> None:
        self._calls.append((call, args))

    def settle(self) -> None:
        calls, self._calls = self._calls, []
        for call, args in calls:
            call(*args)

    def wake(self, ref: ObjectRef[Any]) -> None:
        ref.waiters = None
        self.woken.append(ref)

    def learn(self, ref: ObjectRef[Any], state: ObjectState) -> None:
        if ref.state == PENDING:
            ref.value, ref.size, ref.state = state.payload, state.size, state.state
            if ref.waiters is not None:
                self.wake(ref)

    def contained_refs(self, packed: Any) -> list[ObjectRef[Any]]:
        return list(packed.refs)

    def _sleep(self, _waiter: Any, _timeout_s: float | None) -> bool:
        return False  # whatever is awaited does not come


class Sent:
    """What the owner tells the worker."""

    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.channel = self

    def send(self, message: Any) -> None:
        self.messages.append(message)


def start(runtime: FakeRuntime, **options: Any) -> tuple[Stream, Any]:
    stream = Stream(runtime, COUNTER, StreamOptions(**options))  # type: ignore[arg-type]
    run = SimpleNamespace(counter=COUNTER, retries=3)
    stream.begin(run)  # type: ignore[arg-type]
    return stream, run


def inline(number: int) -> ObjectState:
    return ObjectState(INLINE, b"%d" % number)


class Life(RuleBasedStateMachine):
    """See the module. Item n has the payload n; every third is in the store."""

    @initialize(limit=st.sampled_from([0, 1, 3]))
    def begin(self, limit: int) -> None:
        self.runtime = FakeRuntime()
        self.limit = limit
        self.stream, self.run = start(self.runtime, limit=limit)
        self.link: Any = None
        self.sent: list[Any] = []
        self.made = 0  # by the worker that runs it now, counted from the first item
        self.arrived = self.taken = 0
        self.ended = self.failed = self.dropped = self.whole = False

    def state(self, number: int) -> ObjectState:
        return ObjectState(STORED, b"%d" % number, 200_000, [HOME]) if number % 3 == 0 else inline(number)

    @precondition(lambda self: not self.ended and self.link is None)
    @rule()
    def send(self) -> None:
        """A worker gets the call."""
        self.link = Sent()
        self.stream.link = self.link
        opening = self.stream.opening(COUNTER)
        told = ALL if self.dropped else self.taken if self.limit else 0
        stopped = self.dropped and not self.whole
        assert opening == BeginStream(COUNTER, self.arrived, told, stopped, self.limit, 1)
        self.made = self.arrived

    @precondition(lambda self: self.link is not None)
    @rule(count=st.integers(1, 5), again=st.integers(0, 3))
    def arrive(self, count: int, again: int) -> None:
        """Items come, some of which may have come before."""
        first = max(1, self.made + 1 - again)
        self.made += count
        self.stream.take_in(first, [self.state(number) for number in range(first, self.made + 1)])
        self.arrived = self.made

    @precondition(lambda self: self.link is not None)
    @rule()
    def lose_worker(self) -> None:
        self.link = None

    @precondition(lambda self: not self.ended)
    @rule(failed=st.booleans())
    def finish(self, failed: bool) -> None:
        self.stream.finish(ObjectState(ERROR, b"error") if failed else ObjectState(INLINE, NONE_FLAT))
        self.ended, self.failed, self.link = True, failed, None

    @precondition(lambda self: not self.dropped)
    @rule()
    def take(self) -> None:
        head = self.stream.head
        try:
            ref = self.stream.next_item(0)
        except StopIteration:
            assert self.ended
            assert self.taken == self.arrived + self.failed
            assert self.stream.is_finished()
            return
        if ref is None:
            assert not self.ended
            assert self.taken == self.arrived
            return
        self.taken += 1
        assert ref is head
        assert ref.task is None
        expected = b"error" if self.taken > self.arrived else b"%d" % self.taken
        assert ref.value == expected
        assert int.from_bytes(ref.binary()[24:], "little") == self.taken

    @precondition(lambda self: self.link is not None)
    @rule()
    def settle(self) -> None:
        """The producer hears how far the reader is."""
        self.runtime.settle()
        if self.limit and not self.dropped and self.link.messages:
            assert self.link.messages[-1] == Consumed(COUNTER, self.taken)

    @rule(whole=st.booleans())
    def drop(self, whole: bool) -> None:
        if self.dropped:
            self.stream.drop()  # the second time nothing happens
            return
        if whole:
            assert self.stream.whole() is self.stream.completed
        self.stream.drop()
        self.dropped, self.whole = True, whole
        if self.link is not None:
            assert self.link.messages[-1] == (Consumed(COUNTER, ALL) if whole else StopStream(COUNTER))
        if not self.ended:
            assert self.run.retries == (3 if whole else 0)

    @invariant()
    def what_comes_next_is_the_last(self) -> None:
        *ready, last = self.stream.items
        assert all(ref.state != PENDING for ref in ready)
        assert (last.state == PENDING) == (not self.ended)
        assert (last is self.stream.end) == self.ended
        assert (last.task is None) == self.ended
        if self.dropped:
            assert not ready
        else:
            assert len(ready) == self.arrived + (self.ended and self.failed) - self.taken
        assert (self.stream.completed.state != PENDING) == self.ended


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_who_waits_is_woken_by_the_item_or_the_end() -> None:
    runtime = FakeRuntime()
    stream, _ = start(runtime)
    first = stream.head
    first.waiters = []
    stream.take_in(1, [inline(1), inline(2)])
    assert runtime.woken == [first]
    assert [stream.next_item(0), stream.next_item(0)][0] is first
    stream.head.waiters = []
    stream.finish(ObjectState(INLINE, NONE_FLAT))
    assert runtime.woken[-1] is stream.end


def test_a_reference_that_failed_with_the_runtime_is_the_last_item() -> None:
    runtime = FakeRuntime()
    stream, _ = start(runtime)
    runtime.learn(stream.head, ObjectState(ERROR, b"no cluster"))
    ref = stream.next_item(0)
    assert ref is not None
    assert ref.value == b"no cluster"
    with pytest.raises(StopIteration):
        stream.next_item(0)
    stream.finish(ObjectState(ERROR, b"no cluster"))
    with pytest.raises(StopIteration):
        stream.next_item(0)
    assert stream.completed.state == ERROR


def test_all_items_of_a_dynamic_call_are_the_value_of_one_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    stream, _ = start(runtime, dynamic=True)
    stream.take_in(1, [inline(1), inline(2)])
    refs = list(stream.items)[:2]
    stream.finish(ObjectState(INLINE, NONE_FLAT))
    assert stream.completed.contained == refs
    known = {ref.binary(): ref for ref in refs}
    monkeypatch.setattr("shoal.runtime.slot.current", SimpleNamespace(borrow=lambda object_id, _home: known[object_id]))
    assert list(deserialize(stream.completed.value)) == refs


def test_an_ended_stream_holds_no_circle() -> None:
    """Else items that nobody reads would wait for the collector."""
    runtime = FakeRuntime()
    gc.collect()
    gc.disable()
    try:
        stream, run = start(runtime)
        run.refs = stream
        stream.take_in(1, [inline(1)])
        gone = weakref.ref(stream.head)
        stream.finish(ObjectState(INLINE, NONE_FLAT))
        del stream, run
        assert gone() is None
    finally:
        gc.enable()
