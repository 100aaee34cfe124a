"""Arithmetic of resources: exact amounts, and which numbered devices a grant holds.

Users speak floats (`num_cpus=0.1`), schedulers add and subtract them millions of times, and 0.1 + 0.2 must still be
0.3 afterwards; so inside, every amount is an integer in steps of 1/10000 (`views.UNIT`) from the moment it is checked.
A name that is absent counts as 0, and checked amounts hold no zeros, so that equal demands are equal dicts.

Devices (GPUs) are counted like everything else, but a worker must also be told *which*: `DeviceSlots` keeps that book.
A grant holds whole devices and at most one fraction, and a fraction never spans two devices. Fractions go to the
fullest device that still has room (best fit), so that whole devices stay whole as long as possible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, SupportsFloat

from shoal.scheduling.bundle_names import parse_name
from shoal.scheduling.views import UNIT, Amounts

MAX_AMOUNT: Final = 10**14
"""Units. The product with `UNIT` must fit a signed 64-bit integer on the wire."""

DEVICE_RESOURCES: Final = frozenset({"GPU"})
"""Resources that come as numbered devices."""

BYTE_RESOURCES: Final = frozenset({"memory", "object_store_memory"})
"""Resources that people read in MiB and GiB."""

LIGHT_BELOW: Final = UNIT // 10
MIN_LIGHT_SLOTS: Final = 4

_NOISE: Final = 1e-6  # of a step: what sums of decimal fractions such as 0.1 + 0.2 are off by, with room to spare


def to_amounts(resources: Mapping[str, float]) -> Amounts:
    """Check what a user asked for and make it exact; zeros are left out.

    Raises:
        ValueError: a name is empty, or an amount is not a number, negative, NaN, infinite, finer than 0.0001, or
            more than 1e14.
    """
    amounts: Amounts = {}
    for name, value in resources.items():
        amount = _to_steps(name, value)
        if amount:
            amounts[name] = amount
    return amounts


def _to_steps(name: object, value: object) -> int:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a resource is a non-empty string, not {name!r}")
    if isinstance(value, bool) or not isinstance(value, int | float | SupportsFloat):
        raise ValueError(f"the amount of {name} is a number, not {value!r} of type {type(value).__name__}")
    if not isinstance(value, int):
        value = float(value)
        if math.isnan(value):
            raise ValueError(f"the amount of {name} is NaN (not a number)")
    if value < 0:
        raise ValueError(f"the amount of {name} is negative: {value}")
    if value > MAX_AMOUNT:
        raise ValueError(f"the amount of {name} is {value}, more than the {MAX_AMOUNT:.0e} that can be counted")
    if isinstance(value, int):
        return value * UNIT
    scaled = value * UNIT
    steps = round(scaled)
    if abs(scaled - steps) > _NOISE + scaled * 1e-15:  # second term: rounding of the product itself
        raise ValueError(f"the amount of {name} is {value}: resources are counted in steps of {1 / UNIT}")
    return steps


def to_floats(amounts: Amounts) -> dict[str, float]:
    """What users are shown: `{"CPU": 0.5}`."""
    return {name: amount / UNIT for name, amount in amounts.items()}


def fits(demand: Amounts, available: Amounts) -> bool:
    """Whether all of `demand` is there; what is asked for as 0 always is, even where `available` is negative."""
    return all(amount <= available.get(name, 0) for name, amount in demand.items() if amount)


def count_fitting(demand: Amounts, available: Amounts, at_most: int) -> int:
    """How many copies of `demand` fit into `available` together, at most `at_most` (also for no demand)."""
    for name, amount in demand.items():
        if amount:
            at_most = min(at_most, available.get(name, 0) // amount)
    return max(at_most, 0)


def add(left: Amounts, right: Amounts) -> Amounts:
    """The sum as a new dict; names of both, zeros kept."""
    total = dict(left)
    for name, amount in right.items():
        total[name] = total.get(name, 0) + amount
    return total


def subtract(left: Amounts, right: Amounts, copies: int = 1) -> Amounts:
    """`left` less `copies` of `right` as a new dict; may be negative (a lender took its CPUs back)."""
    rest = dict(left)
    for name, amount in right.items():
        rest[name] = rest.get(name, 0) - amount * copies
    return rest


def is_light(demand: Amounts) -> bool:
    """Whether it asks for so little that what a node has does not bound how many run there in any sensible way."""
    return not any(amount >= LIGHT_BELOW and name not in BYTE_RESOURCES for name, amount in demand.items())


def light_slots(total: Amounts) -> int:
    """How many light tasks a node runs at a time, but for those that block or take long."""
    return max(2 * total.get("CPU", 0) // UNIT, MIN_LIGHT_SLOTS)


def missing(demand: Amounts, total: Amounts) -> dict[str, tuple[int, int]]:
    """name -> (needed, there) for every resource that `total` has too little of, in sorted order of names."""
    return {
        name: (amount, total.get(name, 0))
        for name, amount in sorted(demand.items())
        if amount and amount > total.get(name, 0)
    }


def describe_amount(name: str, amount: int) -> str:
    """ "2 CPU", "0.5 GPU", "1.5 GiB memory", "1 CPU of placement group 0a1b2c3d4e5f"."""
    part = parse_name(name)
    if part is not None:
        bundle = f"bundle {part.bundle} of " if part.bundle >= 0 else ""
        return f"{describe_amount(part.resource, amount)} of {bundle}placement group {part.group[:12]}"
    if name in BYTE_RESOURCES:
        size = amount / UNIT
        for unit in ("B", "KiB", "MiB", "GiB"):
            if abs(size) < 1024 or unit == "GiB":
                return f"{_trim(size, 1)} {unit} {name}"
            size /= 1024
    return f"{_trim(amount / UNIT, 4)} {name}"


def describe(amounts: Amounts) -> str:
    """ "2 CPU, 1 GPU": CPUs and GPUs first, the rest by name; "nothing" for no resources."""
    order = sorted(amounts, key=lambda name: (name != "CPU", name != "GPU", name))
    return ", ".join(describe_amount(name, amounts[name]) for name in order if amounts[name]) or "nothing"


def _trim(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class DeviceSlots:
    """Which of the devices 0..n-1 are held, in steps of 1/10000 of a device.

    Args:
        total: the node's amount of the resource, a whole number of devices.
        numbers: for a part that was set aside: its devices, as `acquire(total)` gave them; the last one may be a
            fraction.
    Raises:
        ValueError: `total` is not whole, and no `numbers` are given.
    """

    __slots__ = ("_free", "_size", "name")

    def __init__(self, name: str, total: int, numbers: list[int] | None = None) -> None:
        if numbers is None and (total % UNIT or total < 0):
            raise ValueError(f"a node has a whole number of {name}, not {_trim(total / UNIT, 4)}")
        self.name = name
        self._size = dict(self.parts(list(range(total // UNIT)) if numbers is None else numbers, total))
        self._free = dict(self._size)

    @property
    def free(self) -> int:
        """Sum over all devices."""
        return sum(self._free.values())

    @property
    def numbers(self) -> list[int]:
        return list(self._size)

    def used(self) -> list[int]:
        """What is held of each device, in the order of `numbers`."""
        return [size - self._free[number] for number, size in self._size.items()]

    def has_room(self, amount: int) -> bool:
        """Whether `acquire(amount)` would succeed; the sum alone does not tell: 0.5 + 0.5 of two devices is not 1."""
        whole, part = divmod(amount, UNIT)
        free = list(self._free.values())
        if not part:
            return free.count(UNIT) >= whole
        if free.count(UNIT) > whole:
            return True
        return free.count(UNIT) == whole and any(part <= one < UNIT for one in free)

    def acquire(self, amount: int) -> list[int] | None:
        """Device numbers for `amount`, or None when it does not fit now.

        Whole devices come first, lowest number first; the last one is the shared one when `amount` has a fraction.
        """
        if not self.has_room(amount):
            return None
        whole, part = divmod(amount, UNIT)
        ids: list[int] = []
        shared = -1
        if part:  # before the whole ones: a partly used device is better than breaking another
            fitting = [number for number, free in self._free.items() if free >= part]
            shared = min(fitting, key=lambda number: (self._free[number], number))
            self._free[shared] -= part
        for number, free in self._free.items():
            if len(ids) == whole:
                break
            if free == UNIT and number != shared:
                self._free[number] = 0
                ids.append(number)
        if part:
            ids.append(shared)
        return ids

    def release(self, ids: list[int], amount: int) -> None:
        """Give back what `acquire(amount)` returned.

        Raises:
            ValueError: the numbers cannot have come from `acquire(amount)`, or are free already.
        """
        parts = self.parts(ids, amount)
        for number, part in parts:
            if number not in self._free or self._free[number] + part > self._size[number]:
                raise ValueError(f"{self.name} {number} is given back more often than it was taken")
        for number, part in parts:
            self._free[number] += part

    def parts(self, ids: list[int], amount: int) -> list[tuple[int, int]]:
        """(device, amount on it) of a grant. Raises ValueError: `ids` are not what such a grant holds."""
        whole, part = divmod(amount, UNIT)
        sizes = [UNIT] * whole + ([part] if part else [])
        if len(sizes) != len(ids) or len(set(ids)) != len(ids):
            raise ValueError(f"{self.name} {ids} are not what a grant of {_trim(amount / UNIT, 4)} holds")
        return list(zip(ids, sizes, strict=True))
