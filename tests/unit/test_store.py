"""The store's books: cases with a name, and a machine that allocates, seals, pins, deletes and dies in any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.node.store import PATIENCE_S, Copy, Store, StoreFullError

KIB = 1024
CAPACITY = 64 * KIB
HERE, THERE = b"here", b"there"


class Desk:
    """A store, and what it answered."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.evicted: list[bytes] = []
        self.store = Store(capacity, self._evicted)

    def _evicted(self, object_id: bytes, copy: Copy) -> None:
        assert not copy.pins
        assert not copy.primary
        self.evicted.append(object_id)

    def ask(self, process: bytes, size: int, now: float = 0.0) -> list[int | StoreFullError]:
        """The answer, once there is one."""
        answers: list[int | StoreFullError] = []
        self.store.allocate(process, size, now, answers.append)
        return answers

    def make(self, object_id: bytes, size: int, *, primary: bool = True, process: bytes = b"p") -> Copy:
        (offset,) = self.ask(process, size)
        assert isinstance(offset, int)
        return self.store.seal(
            process, object_id, offset, size, HERE if primary else THERE, process, primary=primary, contained=[]
        )


@pytest.fixture
def desk() -> Desk:
    return Desk()


def test_room_returns_when_nobody_refers_to_the_object(desk: Desk) -> None:
    desk.make(b"x", 1000)
    assert desk.store.used == 1024
    desk.store.delete(b"x")
    assert desk.store.used == 0
    assert desk.store.find(b"x") is None
    desk.store.delete(b"x")  # a second word of the same is nothing


def test_a_deleted_copy_that_is_read_stays_until_the_last_reader(desk: Desk) -> None:
    desk.make(b"x", 1000)
    for process in (b"p", b"p", b"q"):
        desk.store.pin(b"x", process)
    desk.store.delete(b"x")
    assert desk.store.find(b"x") is None, "nobody may begin to read it"
    desk.store.unpin(b"x", b"p")
    desk.store.unpin(b"x", b"p")
    assert desk.store.used == 1024
    desk.store.process_gone(b"q")
    assert desk.store.used == 0


def test_what_is_sealed_smaller_than_allocated_gives_the_rest_back(desk: Desk) -> None:
    (offset,) = desk.ask(b"p", 10_000)
    assert isinstance(offset, int)
    desk.store.seal(b"p", b"x", offset, 100, HERE, b"p", primary=True, contained=[])
    assert desk.store.used == 128


def test_room_that_a_dead_process_never_sealed_returns(desk: Desk) -> None:
    desk.ask(b"p", 1000)
    desk.ask(b"q", 1000)
    desk.store.process_gone(b"p")
    assert desk.store.used == 1024


def test_second_copies_make_room_for_others_the_longest_unused_first(desk: Desk) -> None:
    for name in (b"a", b"b", b"c"):
        desk.make(name, 16 * KIB, primary=False)
    desk.make(b"mine", 16 * KIB)
    desk.store.pin(b"a", b"p")
    desk.store.unpin(b"a", b"p")  # used after b and c
    desk.make(b"d", 16 * KIB)
    assert desk.evicted == [b"b"]


def test_nothing_is_evicted_in_vain(desk: Desk) -> None:
    desk.make(b"mine", 32 * KIB)
    desk.make(b"copy", 16 * KIB, primary=False)
    assert desk.ask(b"p", 40 * KIB) == []
    assert desk.evicted == []


def test_a_pinned_second_copy_is_not_evicted(desk: Desk) -> None:
    desk.make(b"copy", 48 * KIB, primary=False)
    desk.store.pin(b"copy", b"p")
    assert desk.ask(b"q", 32 * KIB) == []
    assert desk.store.find(b"copy") is not None


def test_who_waits_for_room_gets_it_when_a_pin_goes(desk: Desk) -> None:
    desk.make(b"copy", 48 * KIB, primary=False)
    desk.store.pin(b"copy", b"p")
    answers = desk.ask(b"q", 32 * KIB)
    desk.store.unpin(b"copy", b"p")
    assert answers == [0]
    assert desk.evicted == [b"copy"]


def test_creators_are_served_in_the_order_they_came(desk: Desk) -> None:
    desk.make(b"x", 60 * KIB)
    first, second = desk.ask(b"p", 30 * KIB), desk.ask(b"q", 1 * KIB)
    assert first == second == [], "the small one does not overtake"
    desk.store.delete(b"x")
    assert first
    assert second


def test_who_waited_too_long_is_told_the_sizes_and_those_behind_are_served(desk: Desk) -> None:
    desk.make(b"x", 50 * KIB)
    large, small = desk.ask(b"p", 60 * KIB, now=10.0), desk.ask(b"q", 4 * KIB, now=11.0)
    desk.store.expire(10.0 + PATIENCE_S - 0.1)
    assert large == []
    desk.store.expire(10.0 + PATIENCE_S)
    (error,) = large
    assert isinstance(error, StoreFullError)
    for number in (60 * KIB, 50 * KIB, CAPACITY):
        assert str(number) in str(error)
    assert small == [50 * KIB]


def test_what_can_never_fit_is_refused_at_once(desk: Desk) -> None:
    (error,) = desk.ask(b"p", CAPACITY + 1)
    assert isinstance(error, StoreFullError)
    assert "never" in str(error)


def test_a_dead_process_does_not_wait_any_more(desk: Desk) -> None:
    desk.make(b"x", 60 * KIB)
    dead = desk.ask(b"dead", 30 * KIB)
    living = desk.ask(b"q", 30 * KIB)
    desk.store.process_gone(b"dead")
    desk.store.delete(b"x")
    assert dead == []
    assert living == [0]


def test_a_second_sealing_of_the_same_object_is_dropped_and_makes_it_primary(desk: Desk) -> None:
    first = desk.make(b"x", 1000, primary=False)
    again = desk.make(b"x", 1000, primary=True, process=b"q")
    assert again is first
    assert desk.store.used == 1024
    desk.make(b"large", 62 * KIB)
    assert desk.evicted == []


def test_room_of_another_process_cannot_be_sealed_or_released(desk: Desk) -> None:
    (offset,) = desk.ask(b"p", 1000)
    assert isinstance(offset, int)
    with pytest.raises(KeyError):
        desk.store.seal(b"q", b"x", offset, 1000, HERE, b"q", primary=True, contained=[])
    with pytest.raises(KeyError):
        desk.store.release(b"q", offset)
    assert desk.store.used == 1024


class StoreMachine(RuleBasedStateMachine):
    """Any order of everything. The bytes are followed as well: no two things may ever share one."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.now = 0.0
        self.unsealed: dict[tuple[bytes, int], int] = {}
        self.waiting: list[tuple[bytes, int]] = []
        self.pins: list[tuple[bytes, bytes]] = []
        self.names = 0

    processes = st.sampled_from([b"p", b"q", b"r"])
    sizes = st.one_of(st.integers(0, 200), st.integers(1, CAPACITY // 2), st.integers(1, CAPACITY))

    @rule(process=processes, size=sizes)
    def allocate(self, process: bytes, size: int) -> None:
        ticket = (process, size)

        def done(result: int | StoreFullError) -> None:
            if ticket in self.waiting:
                self.waiting.remove(ticket)
            if isinstance(result, int):
                self.unsealed[process, result] = size

        self.waiting.append(ticket)
        self.desk.store.allocate(process, size, self.now, done)

    @precondition(lambda self: self.unsealed)
    @rule(which=st.integers(0, 100), primary=st.booleans(), shrink=st.booleans())
    def seal(self, which: int, primary: bool, shrink: bool) -> None:
        (process, offset), size = sorted(self.unsealed.items())[which % len(self.unsealed)]
        del self.unsealed[process, offset]
        self.names += 1
        self.desk.store.seal(
            process, b"%d" % self.names, offset, size // 2 if shrink else size, HERE, process,
            primary=primary, contained=[],
        )  # fmt: skip

    @precondition(lambda self: self.unsealed)
    @rule(which=st.integers(0, 100))
    def release(self, which: int) -> None:
        process, offset = sorted(self.unsealed)[which % len(self.unsealed)]
        del self.unsealed[process, offset]
        self.desk.store.release(process, offset)

    @rule(process=processes, which=st.integers(0, 100))
    def pin(self, process: bytes, which: int) -> None:
        object_id = b"%d" % (which % (self.names + 1))
        if self.desk.store.find(object_id) is not None:
            self.desk.store.pin(object_id, process)
            self.pins.append((object_id, process))

    @precondition(lambda self: self.pins)
    @rule(which=st.integers(0, 100))
    def unpin(self, which: int) -> None:
        self.desk.store.unpin(*self.pins.pop(which % len(self.pins)))

    @rule(which=st.integers(0, 100))
    def delete(self, which: int) -> None:
        object_id = b"%d" % (which % (self.names + 1))
        self.desk.store.delete(object_id)
        assert self.desk.store.find(object_id) is None

    @rule(process=processes)
    def process_gone(self, process: bytes) -> None:
        self.desk.store.process_gone(process)
        self.unsealed = {key: size for key, size in self.unsealed.items() if key[0] != process}
        self.pins = [pin for pin in self.pins if pin[1] != process]
        self.waiting = [ticket for ticket in self.waiting if ticket[0] != process]

    @rule(seconds=st.floats(0.1, 2.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.desk.store.expire(self.now)

    @invariant()
    def the_books_are_consistent(self) -> None:
        self.desk.store.check_invariants()
        assert self.desk.store.is_waiting == bool(self.waiting)

    @invariant()
    def what_is_read_is_there(self) -> None:
        for object_id, process in self.pins:
            assert self.desk.store._copies[object_id].pins[process]

    @invariant()
    def nothing_overlaps(self) -> None:
        stretches = [(offset, size) for (_, offset), size in self.unsealed.items()]
        stretches += [(copy.offset, copy.size) for copy in self.desk.store._copies.values()]
        stretches.sort()
        for (start, size), (following, _) in itertools.pairwise(stretches):
            assert start + max(size, 1) <= following

    def teardown(self) -> None:
        for process in (b"p", b"q", b"r"):
            self.desk.store.process_gone(process)
        for object_id in list(self.desk.store._copies):
            self.desk.store.delete(object_id)
        assert self.desk.store.used == 0


TestAnyOrder: Any = StoreMachine.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
