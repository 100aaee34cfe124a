"""What of this node's resources is held, lent and free. Pure.

One account for everything that holds resources, leases and actors alike, so that `available` is never derived from two
lists that could disagree. Three facts make it more than subtraction:

- Devices have numbers: the sum of free GPU does not tell whether 0.8 of one GPU is free (`DeviceSlots`).
- A holder that is blocked lends its CPUs, and takes them back at once when it goes on, even if somebody uses them by
  then: refusing would deadlock the two. So `available` CPU may be negative until others have given back.
- GPUs and memory are never lent: what the blocked process keeps in them stays there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from shoal.scheduling.resources import DEVICE_RESOURCES, DeviceSlots
from shoal.scheduling.views import Amounts

_LENT: Final[tuple[str, ...]] = ("CPU",)


class Holding:
    """What one lease, actor or bundle holds; `lent` of its CPUs count as available for now.

    Inside a bundle (`node/bundles.py`) it is held twice: of the `bundle`'s own books (`inner`), and of the node's under
    the names that show the bundle, among which `cpu_names` are those that can be lent.
    """

    __slots__ = ("amounts", "bundle", "cpu_names", "devices", "inner", "lent")

    def __init__(self, amounts: Amounts, devices: dict[str, list[int]]) -> None:
        self.amounts = amounts
        self.devices = devices
        self.lent = 0
        self.cpu_names = _LENT
        self.bundle: Any = None
        self.inner: Holding | None = None

    @property
    def numbers(self) -> dict[str, list[int]]:
        """Resource -> numbers of the devices that the holder may use."""
        return self.devices if self.inner is None else self.inner.devices


class ResourceBooks:
    """Args: total: what the node or bundle has. devices: of a bundle, its devices by number.

    Raises:
        ValueError: a node has a fraction of a device.
    """

    __slots__ = ("_devices", "available", "total")

    def __init__(self, total: Amounts, devices: dict[str, list[int]] | None = None) -> None:
        self.total: Amounts = dict(total)
        self.available: Amounts = dict(total)
        self._devices = {
            name: DeviceSlots(name, total[name], None if devices is None else devices.get(name, []))
            for name in sorted(DEVICE_RESOURCES)
            if name in total
        }

    def has_room(self, demand: Amounts) -> bool:
        """Whether `demand` fits now, with its devices."""
        available = self.available
        for name, amount in demand.items():
            if amount and amount > available.get(name, 0):
                return False
        return all(slots.has_room(demand[name]) for name, slots in self._devices.items() if name in demand)

    def take(self, demand: Amounts) -> Holding:
        """Hold `demand`, for which there is room. The dict is kept and must not change."""
        devices: dict[str, list[int]] = {}
        for name, amount in demand.items():
            if not amount:
                continue
            self.available[name] -= amount
            slots = self._devices.get(name)
            if slots is not None:
                numbers = slots.acquire(amount)
                assert numbers is not None, "take() without room"
                devices[name] = numbers
        return Holding(demand, devices)

    def give_back(self, holding: Holding) -> None:
        """End a holding, blocked or not; it must not be used again."""
        self.lend(holding, False)
        for name, amount in holding.amounts.items():
            if amount:
                self.available[name] += amount
        for name, numbers in holding.devices.items():
            self._devices[name].release(numbers, holding.amounts[name])

    def lend(self, holding: Holding, lends: bool) -> bool:
        """Lend the holding's CPUs out or take them back; saying it again changes nothing. True: there is more now."""
        names = holding.cpu_names
        lent = holding.amounts.get(names[0], 0) if lends and names else 0
        gained = lent - holding.lent
        if gained:
            for name in names:
                self.available[name] += gained
            holding.lent = lent
        return gained > 0

    def check(self, holdings: Iterable[Holding]) -> None:
        """Raises AssertionError unless exactly `holdings` explain what is not available."""
        holdings = list(holdings)
        for name in self.total.keys() | self.available.keys():
            held = sum(holding.amounts.get(name, 0) for holding in holdings)
            lent = sum(holding.lent for holding in holdings if name in holding.cpu_names)
            assert held - lent + self.available.get(name, 0) == self.total.get(name, 0), f"{name} does not add up"
        for name, slots in self._devices.items():
            used = dict.fromkeys(slots.numbers, 0)
            for holding in holdings:
                for number, part in slots.parts(holding.devices.get(name, []), holding.amounts.get(name, 0)):
                    used[number] += part
            assert slots.used() == list(used.values()), f"{name}: the devices are not those of the holders"
            assert slots.free == self.available.get(name, 0), f"{name}: devices and amounts differ"
