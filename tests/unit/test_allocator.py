from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from shoal.objects.allocator import LARGE_BYTES, Allocator

UNIT = 64


def test_sizes_are_rounded_up_and_offsets_aligned() -> None:
    allocator = Allocator(1024)
    assert [allocator.allocate(size) for size in (0, 1, 64, 65)] == [0, 64, 128, 192]
    assert allocator.used == 5 * UNIT
    assert allocator.free_bytes == 1024 - 5 * UNIT
    assert allocator.high_water == 5 * UNIT


def test_capacity_is_rounded_down() -> None:
    assert Allocator(1000).capacity == 960
    with pytest.raises(ValueError, match="64 bytes at least"):
        Allocator(63)


def test_full_is_none_and_leaves_everything_as_it_was() -> None:
    allocator = Allocator(256)
    assert allocator.allocate(257) is None
    assert allocator.allocate(256) == 0
    assert allocator.allocate(0) is None
    assert allocator.largest_free == 0
    allocator.check_invariants()
    allocator.free(0, 256)
    assert allocator.largest_free == 256


def test_a_slab_is_given_back_in_pieces_in_any_order() -> None:
    allocator = Allocator(4096)
    slab = allocator.allocate(1024)
    assert slab == 0
    pieces = [(offset, UNIT) for offset in range(0, 1024, UNIT)]
    random.Random(7).shuffle(pieces)
    for offset, size in pieces:
        allocator.free(offset, size)
        allocator.check_invariants()
    assert allocator.used == 0
    assert allocator.largest_free == 4096


def test_one_free_may_span_several_extents() -> None:
    allocator = Allocator(4096)
    for _ in range(4):
        allocator.allocate(100)
    allocator.free(UNIT, 256)
    allocator.check_invariants()
    assert allocator.used == 4 * 128 - 256


@pytest.mark.parametrize(
    ("offset", "size"),
    [
        (0, 64),  # free as a whole
        (64, 64),
        (0, 192),  # its beginning is free
        (128, 256),  # its end is free
        (128, 512),  # never handed out
        (-64, 64),
        (32, 64),
        (4032, 128),
        (1 << 40, 64),
    ],
)
def test_freeing_what_is_not_allocated_is_refused_and_changes_nothing(offset: int, size: int) -> None:
    allocator = Allocator(4096)
    allocator.allocate(512)
    allocator.free(0, 128)
    allocator.free(320, 192)
    before = (allocator.used, allocator.largest_free, allocator.high_water)
    with pytest.raises(ValueError, match=r"free already|no extent"):
        allocator.free(offset, size)
    assert (allocator.used, allocator.largest_free, allocator.high_water) == before
    allocator.check_invariants()


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        Allocator(4096).allocate(-1)


def test_large_values_land_again_on_the_same_low_pages() -> None:
    allocator = Allocator(1 << 30)
    keep = allocator.allocate(LARGE_BYTES)
    for _ in range(100):
        offset = allocator.allocate(10 * LARGE_BYTES)
        assert offset == LARGE_BYTES
        allocator.free(offset, 10 * LARGE_BYTES)
    assert keep == 0
    assert allocator.high_water == 11 * LARGE_BYTES


def test_large_values_prefer_low_addresses_over_tight_fits() -> None:
    allocator = Allocator(1 << 30)
    spans = [allocator.allocate(size * LARGE_BYTES) for size in (8, 1, 4, 1)]
    allocator.free(0, 8 * LARGE_BYTES)
    assert spans[2] is not None
    allocator.free(spans[2], 4 * LARGE_BYTES)
    assert allocator.allocate(4 * LARGE_BYTES) == 0


def test_untouched_room_is_the_last_resort() -> None:
    allocator = Allocator(10 * 4096)
    allocator.allocate(8 * 4096)
    allocator.free(0, 4096)
    assert allocator.allocate(64) == 0  # the hole is tighter or not: it was touched before
    assert allocator.high_water == 8 * 4096


def test_free_room_below_the_mark_joins_the_untouched_room_above() -> None:
    allocator = Allocator(4096)
    allocator.allocate(1024)
    allocator.free(512, 512)
    assert allocator.largest_free == 4096 - 512
    assert allocator.allocate(4096 - 512) == 512
    assert allocator.free_bytes == 0
    allocator.check_invariants()


@pytest.mark.parametrize("seed", range(3))
def test_a_long_life_neither_leaks_nor_spreads(seed: int) -> None:
    chance = random.Random(seed)
    allocator = Allocator(1 << 30)
    live: list[tuple[int, int]] = []
    for _ in range(5_000):
        size = chance.choice((chance.randrange(64, 4096), chance.randrange(64, 4 * LARGE_BYTES)))
        offset = allocator.allocate(size)
        assert offset is not None
        live.append((offset, size))
        if len(live) > 100:
            index = chance.randrange(len(live))
            live[index], live[-1] = live[-1], live[index]
            allocator.free(*live.pop())
    assert allocator.high_water < 3 * 100 * LARGE_BYTES  # 100 MiB are in use on average
    for offset, size in live:
        allocator.free(offset, size)
    allocator.check_invariants()
    assert (allocator.used, allocator.largest_free) == (0, 1 << 30)


class AgainstNaiveModel(RuleBasedStateMachine):
    """The model is one flag per 64 bytes."""

    extents: Bundle[tuple[int, int]] = Bundle("extents")  # (first unit, units) of allocated room

    def __init__(self) -> None:
        super().__init__()
        self.units = 48
        self.allocator = Allocator(self.units * UNIT)
        self.taken = [False] * self.units
        self.high_water = 0

    def longest_gap(self) -> int:
        longest = run = 0
        for taken in self.taken:
            run = 0 if taken else run + 1
            longest = max(longest, run)
        return longest

    @rule(target=extents, size=st.integers(0, 20 * UNIT))
    def allocate(self, size: int) -> object:
        units = max(1, -(-size // UNIT))
        offset = self.allocator.allocate(size)
        if offset is None:
            assert self.longest_gap() < units
            return multiple()
        first, odd = divmod(offset, UNIT)
        assert odd == 0
        assert first + units <= self.units
        assert not any(self.taken[first : first + units])
        self.taken[first : first + units] = [True] * units
        self.high_water = max(self.high_water, offset + units * UNIT)
        return (first, units)

    @rule(target=extents, extent=consumes(extents), data=st.data())
    def free_a_part(self, extent: tuple[int, int], data: st.DataObject) -> object:
        first, units = extent
        start = data.draw(st.integers(0, units - 1))
        count = data.draw(st.integers(1, units - start))
        self.allocator.free((first + start) * UNIT, count * UNIT - data.draw(st.integers(0, UNIT - 1)))
        self.taken[first + start : first + start + count] = [False] * count
        rests = [(first, start), (first + start + count, units - start - count)]
        return multiple(*[rest for rest in rests if rest[1]])

    @rule(first=st.integers(0, 47), units=st.integers(1, 20))
    def free_what_is_free(self, first: int, units: int) -> None:
        if first + units <= self.units and all(self.taken[first : first + units]):
            return
        with pytest.raises(ValueError, match=r"free already|no extent"):
            self.allocator.free(first * UNIT, units * UNIT)

    @invariant()
    def agrees(self) -> None:
        self.allocator.check_invariants()
        assert self.allocator.used == sum(self.taken) * UNIT
        assert self.allocator.largest_free == self.longest_gap() * UNIT
        assert self.allocator.high_water == self.high_water


TestAgainstNaiveModel = AgainstNaiveModel.TestCase
TestAgainstNaiveModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
