"""Bundles in a node's books: what they hold, serve, lend and show."""

from __future__ import annotations

import random

import pytest

from shoal.node.bundles import Bundles
from shoal.node.leases import Grant, LeaseScheduler
from shoal.node.messages import LeaseSpec
from shoal.node.resource_books import Holding, ResourceBooks
from shoal.scheduling.resources import DeviceSlots, to_amounts
from shoal.scheduling.views import UNIT, Strategy

GROUP, OTHER = b"g" * 18, b"h" * 18
NAME = GROUP.hex()


class Node:
    """Books with bundles; every step checks them."""

    def __init__(self, **total: float) -> None:
        self.books = ResourceBooks(to_amounts(total))
        self.bundles = Bundles(self.books)
        self.users: list[Holding] = []

    def make(self, *bundles: dict[str, float], group: bytes = GROUP) -> bool:
        done = self.bundles.prepare(group, {index: to_amounts(bundle) for index, bundle in enumerate(bundles)})
        self.bundles.commit(group)
        self.check()
        return done

    def take(self, index: int = -1, **asked: float) -> Holding | None:
        strategy = Strategy("group", group=GROUP, bundle=index)
        bundle = self.bundles.find_room(strategy, to_amounts(asked))
        if bundle is None:
            return None
        holding = self.bundles.take(bundle, to_amounts(asked))
        self.users.append(holding)
        self.check()
        return holding

    def give_back(self, holding: Holding) -> None:
        self.users.remove(holding)
        self.bundles.give_back(holding)
        self.check()

    def free(self, name: str) -> float:
        return self.books.available.get(name, 0) / UNIT

    def check(self) -> None:
        shown = [holding for holding in self.users if holding.bundle.open]
        self.books.check([*shown, *self.bundles.holdings()])
        self.bundles.check(self.users)


def test_a_bundle_takes_from_the_node_and_shows_itself() -> None:
    node = Node(CPU=4)
    assert node.make({"CPU": 1}, {"CPU": 2})
    assert node.free("CPU") == 1
    assert (node.free(f"CPU_group_{NAME}"), node.free(f"CPU_group_0_{NAME}"), node.free(f"CPU_group_1_{NAME}")) == (
        3,
        1,
        2,
    )
    assert node.take(0, CPU=1) is not None
    assert (node.free(f"CPU_group_{NAME}"), node.free(f"CPU_group_0_{NAME}")) == (2, 0)
    assert node.take(0, CPU=0.5) is None
    assert node.take(CPU=2) is not None


def test_all_bundles_or_none() -> None:
    node = Node(CPU=4)
    assert not node.make({"CPU": 3}, {"CPU": 2})
    assert node.books.available == node.books.total == to_amounts({"CPU": 4})


def test_what_is_prepared_serves_nobody_and_shows_nothing() -> None:
    node = Node(CPU=4)
    assert node.bundles.prepare(GROUP, {0: to_amounts({"CPU": 1})})
    assert node.take(CPU=1) is None
    assert node.books.total == to_amounts({"CPU": 4})
    node.bundles.close(GROUP, [0])
    assert node.books.available == node.books.total


def test_two_small_bundles_do_not_serve_a_large_demand() -> None:
    node = Node(CPU=4)
    node.make({"CPU": 1}, {"CPU": 1})
    assert node.take(CPU=2) is None
    assert node.take(CPU=1) is not None
    assert node.take(CPU=1) is not None
    assert node.take(CPU=1) is None


def test_device_numbers_belong_to_the_bundle() -> None:
    node = Node(CPU=4, GPU=4)
    node.make({"GPU": 1}, {"GPU": 1.5})
    first, second = node.take(0, GPU=1), node.take(1, GPU=1)
    assert first is not None
    assert second is not None
    assert first.numbers != second.numbers
    held = {number for bundle in node.bundles for number in bundle.holding.devices["GPU"]}
    part = node.take(1, GPU=0.5)
    assert part is not None
    assert {*first.numbers["GPU"], *second.numbers["GPU"], *part.numbers["GPU"]} == held
    assert node.take(GPU=0.5) is None
    outside = node.books.take(to_amounts({"GPU": 1}))
    assert not held & set(outside.devices["GPU"])
    node.books.give_back(outside)


def test_a_blocked_holder_lends_within_its_bundle_only() -> None:
    node = Node(CPU=2)
    node.make({"CPU": 1})
    holder = node.take(CPU=1)
    assert holder is not None
    assert node.take(CPU=1) is None
    assert node.bundles.lend(holder, True)
    assert not node.bundles.lend(holder, True)
    node.check()
    assert node.free("CPU") == 1
    guest = node.take(CPU=1)
    assert guest is not None
    node.bundles.lend(holder, False)
    node.check()
    assert node.free(f"CPU_group_{NAME}") == -1, "taken back at once, though somebody uses it"


def test_a_bundle_in_use_ends_with_its_last_user() -> None:
    node = Node(CPU=2, GPU=1)
    node.make({"CPU": 1, "GPU": 1}, {"CPU": 1})
    holder, other = node.take(0, GPU=1), node.take(1, CPU=0.5)
    assert holder is not None
    assert other is not None
    node.bundles.close(GROUP, [0, 1])
    node.check()
    assert node.books.total == to_amounts({"CPU": 2, "GPU": 1})
    assert node.free("GPU") == 0, "its process still has it"
    assert node.take(1, CPU=0.1) is None
    node.give_back(holder)
    assert (node.free("GPU"), node.free("CPU")) == (1, 1)
    node.give_back(other)
    assert node.books.available == node.books.total
    assert list(node.bundles) == []


def test_a_group_may_come_again_while_its_former_bundle_ends() -> None:
    node = Node(CPU=2)
    node.make({"CPU": 1})
    holder = node.take(CPU=1)
    assert holder is not None
    node.bundles.close(GROUP, [0])
    assert node.make({"CPU": 1})
    again = node.take(0, CPU=1)
    assert again is not None
    node.give_back(holder)
    node.give_back(again)
    node.bundles.close(GROUP, [0])
    assert node.books.available == node.books.total == to_amounts({"CPU": 2})


def test_devices_of_a_part_are_its_own() -> None:
    slots = DeviceSlots("GPU", 15_000, [3, 1])
    assert slots.numbers == [3, 1]
    assert slots.acquire(UNIT) == [3]
    assert slots.acquire(UNIT) is None
    assert slots.acquire(5_000) == [1]
    assert slots.used() == [UNIT, 5_000]
    with pytest.raises(ValueError, match="more often"):
        slots.release([1], 6_000)
    slots.release([1], 5_000)
    slots.release([3], UNIT)
    assert slots.free == 15_000


def test_work_of_a_group_waits_for_it_and_says_so() -> None:
    scheduler = LeaseScheduler(b"here", to_amounts({"CPU": 2}), random.Random(0))
    spec = LeaseSpec(b"job0", to_amounts({"CPU": 1}), "f", strategy=Strategy("group", group=GROUP))
    scheduler.set_demand(b"o", 1, 2, spec, 0.0)

    def decide() -> list[object]:
        return [one if isinstance(one, Grant) else one.reason.text for one in scheduler.decide((), 0.0)]  # type: ignore[union-attr]

    assert decide() == [f"placement group {NAME[:12]} has no place yet"]
    scheduler.prepare_bundles(GROUP, {0: to_amounts({"CPU": 1})})
    assert decide() == []
    scheduler.commit_bundles(GROUP)
    granted, why = decide()
    assert isinstance(granted, Grant)
    assert why == f"all 1 CPU of placement group {NAME[:12]} are busy on the only node that could run it"
    (report,) = scheduler.demand_reports(0.0)
    assert (report.resources, report.group, report.count) == (to_amounts({"CPU": 1}), GROUP, 1)
    large = LeaseSpec(b"job0", to_amounts({"CPU": 2}), "g", strategy=Strategy("group", group=GROUP, bundle=0))
    scheduler.set_demand(b"o", 2, 1, large, 0.0)
    assert decide() == [f"bundle 0 of placement group {NAME[:12]} does not have 2 CPU"]
    assert scheduler.close_bundles(GROUP, [0]) == [granted.lease_id]
    assert scheduler.close_bundles(OTHER, [0]) == []
    assert scheduler.was_closed(granted.lease_id)
    scheduler.release(granted.lease_id)
    assert scheduler.available == to_amounts({"CPU": 2})
    scheduler.check_invariants()
