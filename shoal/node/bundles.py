"""Bundles of placement groups on this node: parts of its resources with books of their own. Pure.

A bundle holds its resources of the node like a lease does, numbered devices included, and is itself a small account
(`ResourceBooks`) from which work of its group is served. So a holder that is blocked lends its CPUs within the bundle
only, and a GPU number that the bundle has goes to nobody else.

    prepare   take the resources of all bundles that control asks for, or of none; nobody is served from them yet
    commit    show them (`bundle_names`) and serve from them
    close     hide them, serve nobody; each gives its resources back once the last user has ended

Taking never waits, so two groups that are prepared at the same time on several nodes cannot block each other: at worst
one is refused somewhere, and control gives back what it got elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shoal.node.resource_books import Holding, ResourceBooks
from shoal.scheduling.bundle_names import MARK, amounts_in, join_name, shown_of
from shoal.scheduling.views import Amounts, Strategy


class Bundle:
    """One bundle here. `users`: holdings inside; `open`: work is served from it."""

    __slots__ = ("books", "group", "holding", "index", "open", "users")

    def __init__(self, group: bytes, index: int, holding: Holding) -> None:
        self.group = group
        self.index = index
        self.holding = holding
        self.books = ResourceBooks(holding.amounts, holding.devices)
        self.open = False
        self.users = 0

    def shown(self) -> Amounts:
        return shown_of(self.group, self.index, self.holding.amounts)

    def cpu_names(self) -> tuple[str, ...]:
        if "CPU" not in self.books.total:
            return ()
        return join_name("CPU", self.group), join_name("CPU", self.group, self.index)


class Bundles:
    """All bundles on this node; they show themselves in `node.total` and `node.available`."""

    def __init__(self, node: ResourceBooks) -> None:
        self._node = node
        self._open: dict[bytes, dict[int, Bundle]] = {}  # prepared or committed, by group
        self._closing: set[Bundle] = set()

    def __iter__(self) -> Iterator[Bundle]:
        """Those that hold resources of the node."""
        for bundles in self._open.values():
            yield from bundles.values()
        yield from self._closing

    def holdings(self) -> list[Holding]:
        """What bundles hold of the node."""
        return [bundle.holding for bundle in self]

    def shown_totals(self) -> Amounts:
        """What the bundles add to the node's totals."""
        totals: Amounts = {}
        for bundles in self._open.values():
            for bundle in bundles.values():
                if bundle.open:
                    for name, amount in bundle.shown().items():
                        totals[name] = totals.get(name, 0) + amount
        return totals

    def prepare(self, group: bytes, wanted: Mapping[int, Amounts]) -> bool:
        """Take all of `wanted` (bundle -> resources) or nothing. False: there is no room now."""
        here = self._open.get(group, {})
        assert not here.keys() & wanted.keys(), "a bundle is prepared twice"
        taken: dict[int, Bundle] = {}
        for index, resources in wanted.items():
            if not self._node.has_room(resources):
                for bundle in taken.values():
                    self._node.give_back(bundle.holding)
                return False
            taken[index] = Bundle(group, index, self._node.take(resources))
        self._open.setdefault(group, {}).update(taken)
        return True

    def commit(self, group: bytes) -> None:
        """Serve from all prepared bundles of the group."""
        for bundle in self._open.get(group, {}).values():
            if not bundle.open:
                bundle.open = True
                for name, amount in bundle.shown().items():
                    self._node.total[name] = self._node.total.get(name, 0) + amount
                    self._node.available[name] = self._node.available.get(name, 0) + amount

    def close(self, group: bytes, indices: list[int]) -> None:
        """End these bundles, as far as they are here; those that are in use end with their last user."""
        bundles = self._open.get(group, {})
        for index in indices:
            bundle = bundles.pop(index, None)
            if bundle is None:
                continue
            if bundle.open:
                bundle.open = False
                self._hide(bundle)
            if bundle.users:
                self._closing.add(bundle)
            else:
                self._node.give_back(bundle.holding)
        if not bundles:
            self._open.pop(group, None)

    def _hide(self, bundle: Bundle) -> None:
        total, available = self._node.total, self._node.available
        free = {**bundle.books.available, MARK: bundle.shown()[join_name(MARK, bundle.group)]}
        for name, amount in bundle.shown().items():
            total[name] -= amount
        for name, amount in amounts_in(bundle.group, bundle.index, free).items():
            available[name] -= amount
        for name in bundle.shown():
            if not total[name]:
                del total[name], available[name]

    # ------------------------------------------------------------------------------------------------- serving

    def find_room(self, strategy: Strategy, *demands: Amounts) -> Bundle | None:
        """The bundle that this strategy names, or the first of its group, with room for each of `demands` alone."""
        bundles = self._open.get(strategy.group, {})
        found = bundles.values() if strategy.bundle < 0 else filter(None, [bundles.get(strategy.bundle)])
        for bundle in found:
            if bundle.open and all(bundle.books.has_room(demand) for demand in demands):
                return bundle
        return None

    def take(self, bundle: Bundle, demand: Amounts) -> Holding:
        """Hold `demand`, for which there is room, inside the bundle."""
        inner = bundle.books.take(demand)
        holding = self._node.take(amounts_in(bundle.group, bundle.index, demand))
        holding.inner, holding.bundle, holding.cpu_names = inner, bundle, bundle.cpu_names()
        bundle.users += 1
        return holding

    def give_back(self, holding: Holding) -> None:
        """End a holding inside a bundle."""
        bundle, inner = holding.bundle, holding.inner
        assert inner is not None
        bundle.users -= 1
        bundle.books.give_back(inner)
        if bundle.open:
            self._node.give_back(holding)
        elif not bundle.users:
            self._closing.remove(bundle)
            self._node.give_back(bundle.holding)

    def lend(self, holding: Holding, lends: bool) -> bool:
        """As `ResourceBooks.lend`, inside the bundle."""
        assert holding.inner is not None
        gained: bool = holding.bundle.books.lend(holding.inner, lends)
        if holding.bundle.open:
            self._node.lend(holding, lends)
        return gained

    def check(self, users: list[Holding]) -> None:
        """Raises AssertionError unless exactly `users` hold something inside bundles."""
        for bundle in self:
            inside = [holding for holding in users if holding.bundle is bundle]
            assert len(inside) == bundle.users, "users are miscounted"
            bundle.books.check([holding.inner for holding in inside if holding.inner is not None])
            assert bundle.users or bundle not in self._closing, "a bundle is left behind"
        assert {id(holding.bundle) for holding in users} <= {id(bundle) for bundle in self}, "a user of no bundle"
        totals = self.shown_totals()
        shown = {name: amount for name, amount in self._node.total.items() if name in totals or "_group_" in name}
        assert shown == totals, "what is shown is not what is there"
        assert all(bundles for bundles in self._open.values()), "an empty group"
