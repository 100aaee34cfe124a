"""Who is in the cluster, and what is free there.

What is free is known from reports that are a little old, and control itself changes it by placing actors. So each node
has two pictures: `available` as the agent said it (told to the other agents as it is), and `free`, which is that less
what control booked there since. A report replaces the picture and with it the bookings: the agent by then counts those
actors itself. In the moment in which report and booking cross, control may believe too much; the agent then refuses and
the actor is placed again, which is cheaper than holding resources back to be sure.

A dead node stays dead: its id cannot come back, since everything it ran has been given up or made anew elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import msgspec

from shoal.control.messages import NodeInfo, NodeReport
from shoal.control.remembered import Remembered
from shoal.objects.ids import ActorId
from shoal.scheduling.resources import add, subtract
from shoal.scheduling.views import UNIT, Amounts, DemandReport, NodeView

BundleKey = tuple[bytes, int]
"""A placement group's id and the number of a bundle."""


class NodeRecord:
    """A living node.

    Attributes:
        peer: its agent's connection.
        free: what control believes to be free (see above).
        bookings: actor, or bundle of a placement group -> what it holds, since the last report.
        base: what it has, without what bundles show.
        light: actors here that hold no resources: what spreads those.
        actors: all that are placed here and not dead.
        refused: lines of actors (placement.LineKey) of which it refused one since its last report.
    """

    __slots__ = (
        "actors", "base", "bookings", "demands", "free", "heard_at", "index", "info", "light", "peer", "refused",
        "workers",
    )  # fmt: skip

    def __init__(self, info: NodeInfo, peer: int, index: int, now: float) -> None:
        # Of its own: what bundles show is changed in place, since a node may show hundreds.
        self.info = msgspec.structs.replace(info, total=dict(info.total), available=dict(info.available))
        self.peer = peer
        self.index = index
        self.heard_at = now
        self.free: Amounts = dict(info.available)
        self.base: Amounts = info.total
        self.bookings: dict[ActorId | BundleKey, Amounts] = {}
        self.light = 0
        self.actors: set[ActorId] = set()
        self.refused: set[Hashable] = set()
        self.demands: list[DemandReport] = []
        self.workers = 0

    @property
    def node_id(self) -> bytes:
        return self.info.node_id

    def view(self) -> NodeView:
        return NodeView(self.info.node_id, self.info.total, self.free, self.info.labels, self.info.draining)

    def light_share(self) -> float:
        """Actors that hold nothing, per CPU (a node without CPUs counts as one with one)."""
        return self.light * UNIT / max(self.info.total.get("CPU", 0), UNIT)

    def describe(self) -> str:
        """For people: "node 0123456789ab (host, 10.0.0.7:6380)"."""
        return f"node {self.info.node_id.hex()[:12]} ({self.info.hostname or 'unknown host'}, {self.info.address})"


class NodeTable:
    """`views` is parallel to `order`, in no particular order, and always current: decisions index into it."""

    def __init__(self, max_dead: int) -> None:
        self._by_id: dict[bytes, NodeRecord] = {}
        self._by_peer: dict[int, NodeRecord] = {}
        self._dead: Remembered[bytes, NodeInfo] = Remembered(max_dead)
        self.order: list[NodeRecord] = []
        self.views: list[NodeView] = []

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[NodeRecord]:
        return iter(self.order)

    def find(self, node_id: bytes) -> NodeRecord | None:
        return self._by_id.get(node_id)

    def at(self, peer: int) -> NodeRecord | None:
        return self._by_peer.get(peer)

    def find_dead(self, node_id: bytes) -> NodeInfo | None:
        return self._dead.find(node_id)

    def infos(self, *, dead: bool) -> list[NodeInfo]:
        """Living nodes in order of their arrival, then the remembered dead ones."""
        living = [node.info for node in self._by_id.values()]
        return [*living, *self._dead.values()] if dead else living

    def add(self, info: NodeInfo, peer: int, now: float) -> NodeRecord:
        assert info.node_id not in self._by_id, "ask find first"
        info = msgspec.structs.replace(info, alive=True, death_reason="")
        node = NodeRecord(info, peer, len(self.order), now)
        self._by_id[info.node_id] = node
        self._by_peer[peer] = node
        self.order.append(node)
        self.views.append(node.view())
        return node

    def bury(self, node: NodeRecord, reason: str) -> NodeInfo:
        """Take a node out; returns its last row, `alive` False, with the reason. Its actors are the caller's matter."""
        info = msgspec.structs.replace(
            node.info, alive=False, death_reason=reason, available={}, store_used=0, store_spilled=0
        )
        del self._by_id[node.node_id]
        del self._by_peer[node.peer]
        last = self.order[-1]
        self.order[node.index], self.views[node.index] = last, self.views[-1]
        last.index = node.index
        self.order.pop()
        self.views.pop()
        self._dead.add(info.node_id, info)
        return info

    def report(self, node: NodeRecord, report: NodeReport) -> bool:
        """Take the agent's word for what is free. Returns whether availability changed since its last word."""
        total = add(node.base, report.bundles)
        changed = report.available != node.info.available or total != node.info.total
        store = (report.store_used, report.store_spilled)
        if changed or store != (node.info.store_used, node.info.store_spilled):
            node.info = msgspec.structs.replace(
                node.info, total=total, available=report.available, store_used=store[0], store_spilled=store[1]
            )
        node.refused.clear()
        node.demands = report.demands
        node.workers = report.workers
        if changed or node.bookings:
            node.bookings.clear()
            self._set_free(node, dict(report.available))
        return changed

    def place(self, node: NodeRecord, actor_id: ActorId, hold: Amounts) -> None:
        """An actor goes to this node."""
        node.actors.add(actor_id)
        if any(hold.values()):
            node.bookings[actor_id] = hold
            self._set_free(node, subtract(node.free, hold))
        else:
            node.light += 1

    def leave(self, node: NodeRecord, actor_id: ActorId, hold: Amounts) -> bool:
        """The actor is not there any more. Returns whether that freed a booking (what the agent counted itself is freed
        by its next report)."""
        node.actors.discard(actor_id)
        if not any(hold.values()):
            node.light -= 1
            return False
        booked = node.bookings.pop(actor_id, None)
        if booked is None:
            return False
        self._set_free(node, add(node.free, booked))
        return True

    def book(self, node: NodeRecord, bundle: BundleKey, hold: Amounts) -> None:
        """A bundle is to be there."""
        node.bookings[bundle] = hold
        _change(node.free, hold, -1)

    def unbook(self, node: NodeRecord, bundle: BundleKey) -> None:
        """It is not, after all; what the agent counted itself is freed by its next report."""
        booked = node.bookings.pop(bundle, None)
        if booked is not None:
            _change(node.free, booked, 1)

    def show(self, node: NodeRecord, shown: Amounts, *, hide: bool = False) -> None:
        """The agent shows this of a bundle (or with `hide` not any more), and its reports will say so too."""
        total = node.info.total
        pictures = (total, node.info.available, node.free)
        for amounts in pictures:
            _change(amounts, shown, -1 if hide else 1)
        for name in shown:
            if total[name] <= 0:
                for amounts in pictures:
                    del amounts[name]

    def _set_free(self, node: NodeRecord, free: Amounts) -> None:
        node.free = free
        self.views[node.index] = node.view()

    def check_invariants(self) -> None:
        assert len(self.order) == len(self.views) == len(self._by_id) == len(self._by_peer)
        for index, (node, view) in enumerate(zip(self.order, self.views, strict=True)):
            assert node.index == index
            assert self._by_id[node.node_id] is node
            assert self._by_peer[node.peer] is node
            assert node.node_id not in self._dead
            assert view == node.view()
            assert {key for key in node.bookings if not isinstance(key, tuple)} <= node.actors
            assert 0 <= node.light <= len(node.actors)
            expected = dict(node.info.available)
            for hold in node.bookings.values():
                expected = subtract(expected, hold)
            names = expected.keys() | node.free.keys()
            assert all(expected.get(name, 0) == node.free.get(name, 0) for name in names)


def _change(amounts: Amounts, by: Amounts, sign: int) -> None:
    for name, amount in by.items():
        amounts[name] = amounts.get(name, 0) + sign * amount
