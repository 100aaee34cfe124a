from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.scheduling import resources as r
from shoal.scheduling.views import UNIT


@pytest.mark.parametrize(
    ("given_value", "steps"),
    [
        (1, 10_000),
        (0.5, 5_000),
        (0.0001, 1),
        (0.1 + 0.2, 3_000),
        (1234567.1, 12_345_671_000),
        (10**14, 10**18),
        (float(2**40), 2**40 * UNIT),
        (Fraction(1, 4), 2_500),
        (Decimal("0.3"), 3_000),
    ],
)
def test_amounts_are_exact(given_value: float, steps: int) -> None:
    assert r.to_amounts({"CPU": given_value}) == {"CPU": steps}


def test_zeros_are_left_out() -> None:
    assert r.to_amounts({"CPU": 0, "GPU": 0.0, "a": 1}) == {"a": UNIT}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("CPU", -1, "CPU is negative: -1"),
        ("CPU", -0.5, "CPU is negative"),
        ("CPU", float("nan"), "CPU is NaN"),
        ("CPU", float("inf"), "more than the 1e\\+14"),
        ("CPU", 10**14 + 1, "more than the 1e\\+14"),
        ("CPU", 0.00001, "steps of 0.0001"),
        ("CPU", 1.00005, "steps of 0.0001"),
        ("CPU", "1", "is a number, not '1' of type str"),
        ("CPU", None, "is a number, not None"),
        ("CPU", True, "is a number, not True"),
        ("", 1, "non-empty string"),
        (3, 1, "non-empty string, not 3"),
    ],
)
def test_wrong_amounts_are_one_clear_line(name: str, value: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        r.to_amounts({name: value})


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 10**12)))
def test_floats_come_back_as_they_were(steps: dict[str, int]) -> None:
    assert r.to_amounts(r.to_floats(steps)) == steps


def test_arithmetic() -> None:
    assert r.add({"a": 1}, {"a": 2, "b": 3}) == {"a": 3, "b": 3}
    assert r.subtract({"a": 5, "c": 1}, {"a": 2, "b": 3}, 2) == {"a": 1, "b": -6, "c": 1}
    assert r.fits({"a": 2}, {"a": 2})
    assert not r.fits({"a": 3}, {"a": 2})
    assert not r.fits({"b": 1}, {"a": 2})
    assert r.fits({"a": 0, "b": 0}, {"a": -5})
    assert r.fits({}, {})
    assert r.missing({"a": 3, "b": 1, "c": 0, "d": 1}, {"a": 2, "d": 1}) == {"a": (3, 2), "b": (1, 0)}


@given(
    st.dictionaries(st.sampled_from("ab"), st.integers(0, 5)),
    st.dictionaries(st.sampled_from("ab"), st.integers(-5, 30)),
    st.integers(0, 7),
)
def test_count_fitting_is_as_many_as_really_fit(demand: dict[str, int], available: dict[str, int], limit: int) -> None:
    count = r.count_fitting(demand, available, limit)
    assert 0 <= count <= limit
    if count:
        assert r.fits({name: amount * count for name, amount in demand.items()}, available)
    if count < limit:
        assert not r.fits({name: amount * (count + 1) for name, amount in demand.items()}, available)


@pytest.mark.parametrize(
    ("amounts", "text"),
    [
        ({"b": UNIT, "GPU": UNIT, "CPU": 2 * UNIT}, "2 CPU, 1 GPU, 1 b"),
        ({"CPU": 5_000}, "0.5 CPU"),
        ({"CPU": 1}, "0.0001 CPU"),
        ({"CPU": 100 * UNIT}, "100 CPU"),
        ({"memory": 3 * 512 * 1024**2 * UNIT}, "1.5 GiB memory"),
        ({"memory": 100 * UNIT}, "100 B memory"),
        ({"memory": 4096 * 1024**3 * UNIT}, "4096 GiB memory"),
        ({}, "nothing"),
        ({"CPU": 0}, "nothing"),
    ],
)
def test_describe(amounts: dict[str, int], text: str) -> None:
    assert r.describe(amounts) == text


# ------------------------------------------------------------------------------------------------------- devices


def test_whole_devices_are_taken_lowest_first_and_come_back() -> None:
    slots = r.DeviceSlots("GPU", 4 * UNIT)
    assert slots.acquire(2 * UNIT) == [0, 1]
    assert slots.acquire(1 * UNIT) == [2]
    assert slots.acquire(2 * UNIT) is None
    slots.release([0, 1], 2 * UNIT)
    assert slots.acquire(3 * UNIT) == [0, 1, 3]
    assert slots.free == 0


def test_fractions_share_one_device_and_leave_the_others_whole() -> None:
    slots = r.DeviceSlots("GPU", 2 * UNIT)
    assert slots.acquire(5_000) == [0]
    assert slots.acquire(3_000) == [0]
    assert slots.acquire(3_000) == [1]
    assert slots.acquire(2_000) == [0], "best fit: the fullest device that has room"
    assert slots.acquire(8_000) is None
    assert slots.acquire(UNIT) is None


def test_a_fraction_never_spans_devices() -> None:
    slots = r.DeviceSlots("GPU", 2 * UNIT)
    slots.acquire(6_000)
    slots.acquire(6_000)
    assert slots.free == 8_000
    assert not slots.has_room(5_000)
    assert slots.acquire(5_000) is None


def test_one_and_a_half() -> None:
    slots = r.DeviceSlots("GPU", 3 * UNIT)
    slots.acquire(5_000)
    assert slots.acquire(15_000) == [1, 0], "the fraction, last, joins the one that is broken already"
    assert slots.used() == [UNIT, UNIT, 0]
    slots.release([1, 0], 15_000)
    assert slots.used() == [5_000, 0, 0]


def test_a_node_has_whole_devices() -> None:
    with pytest.raises(ValueError, match=r"whole number of GPU, not 0\.5"):
        r.DeviceSlots("GPU", 5_000)


@pytest.mark.parametrize(
    ("ids", "amount"), [([0], 2 * UNIT), ([0, 0], 2 * UNIT), ([1], UNIT), ([7], UNIT), ([0], 5_001)]
)
def test_a_wrong_release_is_refused_and_changes_nothing(ids: list[int], amount: int) -> None:
    slots = r.DeviceSlots("GPU", 2 * UNIT)
    slots.acquire(5_000)
    with pytest.raises(ValueError, match="GPU"):
        slots.release(ids, amount)
    assert slots.used() == [5_000, 0]


@given(st.integers(1, 5), st.lists(st.integers(1, 30_000), max_size=40), st.integers(0, 2**32))
def test_books_of_devices_always_add_up(count: int, amounts: list[int], seed: int) -> None:
    rng = random.Random(seed)
    slots = r.DeviceSlots("GPU", count * UNIT)
    held: list[tuple[list[int], int]] = []
    for amount in amounts:
        expected = slots.has_room(amount)
        ids = slots.acquire(amount)
        assert (ids is not None) == expected
        if ids is not None:
            assert len(ids) == -(-amount // UNIT)
            held.append((ids, amount))
        if held and rng.random() < 0.5:
            slots.release(*held.pop(rng.randrange(len(held))))
        assert all(0 <= used <= UNIT for used in slots.used())
        assert slots.free == count * UNIT - sum(amount for _, amount in held)
    for ids, amount in held:
        slots.release(ids, amount)
    assert slots.acquire(count * UNIT) == list(range(count))


@pytest.mark.parametrize(
    ("needs", "light"),
    [({}, True), ({"memory": 1e9}, True), ({"accelerator_type:A": 0.001, "CPU": 0.05}, True), ({"CPU": 0.1}, False),
     ({"GPU": 0.5}, False), ({"x": 1}, False)],
)  # fmt: skip
def test_what_is_light(needs: dict[str, float], light: bool) -> None:
    assert r.is_light(r.to_amounts(needs)) is light
