"""The store's books: cases with a name, and a machine that allocates, seals, pins, deletes and dies in any order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.node.store import PATIENCE_S, RESTORE, SPILL_ABOVE, SPILL_DOWN_TO, Copy, Store, StoreFullError

KIB = 1024
CAPACITY = 64 * KIB
HERE, THERE = b"here", b"there"


class Desk:
    """A store, and what it answered."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.evicted: list[bytes] = []
        self.on_disk: set[int] = set()  # spots that may still be read
        self.spots = 0
        self.store = Store(capacity, self._evicted, self.on_disk.remove)

    def spill(self, at_least: int = 1, at_most: int = 1 << 30) -> list[bytes]:
        """Have copies written, all at once; their names."""
        chosen = self.store.to_spill(at_least, at_most)
        for object_id, _ in chosen:
            self.wrote(object_id)
        return [object_id for object_id, _ in chosen]

    def wrote(self, object_id: bytes) -> None:
        self.spots += 1
        self.on_disk.add(self.spots)
        self.store.spilled(object_id, self.spots)

    def restore(self, object_id: bytes) -> Copy | None:
        """Read a copy back, for which there is room."""
        copy = self.store.find(object_id)
        assert copy is not None
        (offset,) = self.ask(RESTORE, copy.size)
        assert isinstance(offset, int)
        return self.store.restored(object_id, offset)

    def _evicted(self, object_id: bytes, copy: Copy, why: str) -> None:
        assert why
        assert not copy.primary or copy.spot is None, "only what was lost on disk may go like that"
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


# --------------------------------------------------------------------------------------------------------- spilling


def test_a_store_that_fills_up_wants_the_longest_unused_on_disk(desk: Desk) -> None:
    for name in range(8):
        desk.make(b"%d" % name, 6 * KIB)  # 48 of 64 KiB
    assert desk.store.wanted_on_disk() == 0
    desk.store.pin(b"0", b"p")
    desk.make(b"last", 6 * KIB)
    assert desk.store.used > SPILL_ABOVE * CAPACITY
    wanted = desk.store.wanted_on_disk()
    assert wanted == 54 * KIB - int(SPILL_DOWN_TO * CAPACITY)
    assert desk.spill(wanted) == [b"1", b"2", b"3"], "what is read stays, and no more goes than is needed"
    assert desk.store.wanted_on_disk() == 0
    assert desk.store.used == 54 * KIB, "written copies stay in memory as well"


def test_a_written_copy_gives_its_room_when_somebody_needs_it_and_comes_back(desk: Desk) -> None:
    desk.make(b"x", 40 * KIB)
    assert desk.spill() == [b"x"]
    desk.make(b"y", 40 * KIB)
    copy = desk.store.find(b"x")
    assert copy is not None
    assert not copy.in_memory
    assert desk.evicted == [], "nobody need know: it is still here"
    desk.spill()
    again = desk.restore(b"x")
    assert again is copy
    assert copy.in_memory
    assert desk.store.spilled_bytes == 80 * KIB
    desk.store.delete(b"x")
    desk.store.delete(b"y")
    assert desk.on_disk == set()
    assert desk.store.used == desk.store.spilled_bytes == 0


def test_who_waits_gets_the_room_of_what_has_just_been_written(desk: Desk) -> None:
    desk.make(b"x", 60 * KIB)
    answers = desk.ask(b"p", 30 * KIB)
    assert desk.store.wanted_on_disk() == 30 * KIB
    desk.spill(desk.store.wanted_on_disk())
    assert answers == [0]


def test_a_copy_that_is_dropped_while_it_is_written_leaves_nothing(desk: Desk) -> None:
    desk.make(b"x", 1 * KIB)
    ((name, _),) = desk.store.to_spill(1, 1 << 30)
    desk.store.delete(name)
    assert desk.store.used == 1 * KIB, "it is being read by the writer"
    desk.wrote(name)
    assert desk.on_disk == set()
    assert desk.store.used == desk.store.spilled_bytes == 0


def test_a_copy_that_is_dropped_while_it_is_read_back_leaves_nothing(desk: Desk) -> None:
    desk.make(b"x", 40 * KIB)
    desk.spill()
    desk.make(b"y", 40 * KIB)
    desk.store.pin(b"x", RESTORE)
    desk.spill()
    (offset,) = desk.ask(RESTORE, 40 * KIB)
    assert isinstance(offset, int)
    desk.store.delete(b"x")
    assert len(desk.on_disk) == 2
    assert desk.store.restored(b"x", offset) is None
    desk.store.unpin(b"x", RESTORE)
    desk.store.delete(b"y")
    assert desk.on_disk == set()
    assert desk.store.used == 0


def test_what_cannot_be_written_stays_and_is_tried_again(desk: Desk) -> None:
    desk.make(b"x", 60 * KIB)
    answers = desk.ask(b"p", 30 * KIB, now=5.0)
    ((name, _),) = desk.store.to_spill(1, 1 << 30)
    desk.store.not_spilled(name)
    desk.store.trouble = "/spill: no space left"
    assert desk.store.find(b"x") is not None
    assert desk.store.wanted_on_disk() > 0
    desk.store.expire(5.0 + PATIENCE_S)
    (error,) = answers
    assert "/spill: no space left" in str(error)


def test_a_file_that_cannot_be_read_is_a_lost_copy(desk: Desk) -> None:
    desk.make(b"x", 40 * KIB)
    desk.spill()
    desk.make(b"y", 40 * KIB)
    desk.store.pin(b"x", RESTORE)
    desk.store.lose(b"x", "its file is gone")
    assert desk.evicted == [b"x"]
    assert desk.store.find(b"x") is None
    assert desk.on_disk == set()


def test_who_waits_is_not_given_up_while_room_is_being_made(desk: Desk) -> None:
    desk.make(b"x", 60 * KIB)
    answers = desk.ask(b"p", 30 * KIB, now=0.0)
    desk.store.be_patient(PATIENCE_S)
    desk.store.expire(PATIENCE_S)
    assert answers == []
    desk.store.expire(2 * PATIENCE_S)
    assert len(answers) == 1


def test_a_batch_is_as_large_as_a_file_may_be_or_one_copy(desk: Desk) -> None:
    for name in (b"a", b"b", b"c"):
        desk.make(name, 10 * KIB)
    assert desk.spill(30 * KIB, at_most=25 * KIB) == [b"a", b"b"]
    desk.make(b"d", 20 * KIB)
    assert desk.spill(30 * KIB, at_most=5 * KIB) == [b"c"]


class StoreMachine(RuleBasedStateMachine):
    """Any order of everything. The bytes are followed as well: no two things may ever share one."""

    def __init__(self) -> None:
        super().__init__()
        self.desk = Desk()
        self.now = 0.0
        self.unsealed: dict[tuple[bytes, int], int] = {}
        self.waiting: list[tuple[bytes, int]] = []
        self.pins: list[tuple[bytes, bytes]] = []
        self.writing: list[bytes] = []
        self.restoring: set[bytes] = set()
        self.rooms: list[tuple[bytes, int]] = []  # that are being filled
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
        copy = self.desk.store.find(object_id)
        if copy is not None and copy.in_memory:
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

    @rule(at_least=sizes, at_most=sizes)
    def begin_to_spill(self, at_least: int, at_most: int) -> None:
        self.writing += [object_id for object_id, _ in self.desk.store.to_spill(at_least, at_most)]

    @precondition(lambda self: self.writing)
    @rule(which=st.integers(0, 100), well=st.booleans())
    def end_to_spill(self, which: int, well: bool) -> None:
        object_id = self.writing.pop(which % len(self.writing))
        if well:
            self.desk.wrote(object_id)
        else:
            self.desk.store.not_spilled(object_id)

    @rule(which=st.integers(0, 100))
    def begin_to_restore(self, which: int) -> None:
        object_id = b"%d" % (which % (self.names + 1))
        copy = self.desk.store.find(object_id)
        if copy is None or copy.in_memory or object_id in self.restoring:
            return
        self.restoring.add(object_id)
        self.desk.store.pin(object_id, RESTORE)

        def done(result: int | StoreFullError) -> None:
            if isinstance(result, int):
                self.rooms.append((object_id, result))
            else:
                self.restoring.remove(object_id)
                self.desk.store.unpin(object_id, RESTORE)

        self.desk.store.allocate(RESTORE, copy.size, self.now, done)

    @precondition(lambda self: self.rooms)
    @rule(which=st.integers(0, 100), well=st.booleans())
    def end_to_restore(self, which: int, well: bool) -> None:
        object_id, offset = self.rooms.pop(which % len(self.rooms))
        self.restoring.remove(object_id)
        if well:
            self.desk.store.restored(object_id, offset)
            self.desk.store.unpin(object_id, RESTORE)
        else:
            self.desk.store.release(RESTORE, offset)
            self.desk.store.lose(object_id, "its file is gone")

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
        restoring = len(self.restoring) - len(self.rooms)
        assert self.desk.store.is_waiting == bool(self.waiting or restoring)
        assert len(self.desk.on_disk) == sum(copy.spot is not None for copy in self.desk.store._copies.values())

    @invariant()
    def what_is_read_is_there(self) -> None:
        for object_id, process in self.pins:
            assert self.desk.store._copies[object_id].pins[process]

    @invariant()
    def nothing_overlaps(self) -> None:
        stretches = [(offset, size) for (_, offset), size in self.unsealed.items()]
        stretches += [(offset, self.desk.store._unsealed[RESTORE][offset]) for _, offset in self.rooms]
        stretches += [(copy.offset, copy.size) for copy in self.desk.store._copies.values() if copy.in_memory]
        stretches.sort()
        for (start, size), (following, _) in itertools.pairwise(stretches):
            assert start + max(size, 1) <= following

    def teardown(self) -> None:
        for object_id in self.writing:
            self.desk.store.not_spilled(object_id)
        for process in (b"p", b"q", b"r", RESTORE):
            self.desk.store.process_gone(process)
        for object_id in list(self.desk.store._copies):
            self.desk.store.delete(object_id)
        assert self.desk.store.used == 0
        assert self.desk.on_disk == set()


TestAnyOrder: Any = StoreMachine.TestCase
TestAnyOrder.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
