"""The cluster as one agent sees it: the other nodes, less what it sent there since it last heard of them. Pure.

Views are a little old. An agent that has much to send would fill the same idle node again and again until the next
view came; so what is sent is deducted until that node's view changes, or for `DEDUCT_FOR_S`: what was sent may never
have arrived, and an idle node's view need not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from shoal.node.lease_queue import Plan
from shoal.scheduling import policy
from shoal.scheduling.resources import fits, subtract
from shoal.scheduling.views import Amounts, NodeView, Strategy

DEDUCT_FOR_S: Final = 2.0


class ClusterView:
    """`total` and `available` are this node's own live dicts: its row in the view is never believed over them.

    Attributes:
        version: a number that grows whenever other nodes may have more room than before.
    """

    __slots__ = (
        "_available", "_draining", "_labels", "_node_id", "_nodes", "_others", "_seen", "_sent_s", "_total", "version",
    )  # fmt: skip

    def __init__(self, node_id: bytes, total: Amounts, available: Amounts) -> None:
        self._node_id = node_id
        self._total = total
        self._available = available
        self._nodes: Sequence[NodeView] = ()
        self._seen: dict[bytes, NodeView] = {}
        self._others: dict[bytes, NodeView] = {}  # less what was sent
        self._sent_s: dict[bytes, float] = {}  # when something was last sent to a node
        self._labels: dict[str, str] = {}
        self._draining = False
        self.version = 0

    @property
    def is_draining(self) -> bool:
        """Whether this node takes no new work."""
        return self._draining

    @property
    def node_count(self) -> int:
        return 1 + len(self._others)

    def own(self) -> NodeView:
        return NodeView(self._node_id, self._total, self._available, self._labels, self._draining)

    def other(self, node_id: bytes) -> NodeView:
        """Raises KeyError: no such node but this one."""
        return self._others[node_id]

    def update(self, nodes: Sequence[NodeView], now: float) -> tuple[bool, bool]:
        """Take in the view; the same tuple again costs nothing.

        Returns:
            (another node changed or has room again, the roster changed: what could run where if all were idle).
        """
        changed = bool(self._sent_s) and self._forget_overdue(now)
        roster = False
        if nodes is not self._nodes or not isinstance(nodes, tuple):
            self._nodes = nodes
            changed_view, roster = self._compare(nodes)
            changed |= changed_view
        self.version += changed
        return changed, roster

    def _compare(self, nodes: Sequence[NodeView]) -> tuple[bool, bool]:
        changed = False
        roster = False
        count = 0
        for view in nodes:
            if view.node_id == self._node_id:
                if view.draining != self._draining or view.labels != self._labels:
                    self._draining, self._labels = view.draining, view.labels
                    roster = True
                continue
            count += 1
            old = self._seen.get(view.node_id)
            if old is view or old == view:
                continue
            self._seen[view.node_id] = self._others[view.node_id] = view
            self._sent_s.pop(view.node_id, None)
            changed = True
            if old is None or (old.total, old.labels, old.draining) != (view.total, view.labels, view.draining):
                roster = True
        if count != len(self._seen):
            for node_id in self._seen.keys() - {view.node_id for view in nodes}:
                del self._seen[node_id], self._others[node_id]
                self._sent_s.pop(node_id, None)
            roster = True
        return changed or roster, roster

    def _forget_overdue(self, now: float) -> bool:
        overdue = [node_id for node_id, sent_s in self._sent_s.items() if now - sent_s >= DEDUCT_FOR_S]
        for node_id in overdue:
            del self._sent_s[node_id]
            self._others[node_id] = self._seen[node_id]
        return bool(overdue)

    def deduct(self, node_id: bytes, demand: Amounts, count: int, now: float) -> None:
        """`count` times `demand` is on its way to that node. Raises KeyError: no such node but this one."""
        view = self._others[node_id]
        self._others[node_id] = msgspec.structs.replace(view, available=subtract(view.available, demand, count))
        self._sent_s[node_id] = now

    def with_room(self, demand: Amounts, node_ids: Sequence[bytes]) -> list[NodeView]:
        """Those of these other nodes where `demand` fits now."""
        return [self._others[node_id] for node_id in node_ids if fits(demand, self._others[node_id].available)]

    def plan(self, demand: Amounts, strategy: Strategy, *, pinned: bool) -> Plan:
        """Where `demand` can run at all. `pinned`: another agent chose this node, and knew the strategy."""
        if pinned:
            allowed = strategy if strategy.kind == "group" else Strategy()
            if not policy.can_ever_run(demand, allowed, self.own()):
                return Plan(False, (), policy.why_infeasible(demand, allowed, [self.own()]))
            return Plan(True, self._plan(demand, strategy).tiers)
        return self._plan(demand, strategy)

    def _plan(self, demand: Amounts, strategy: Strategy) -> Plan:
        own = self.own()
        first: bytes | None = None
        if strategy.kind == "group" and strategy.node_id == self._node_id:
            return Plan(True, ())
        if strategy.kind == "node":
            named = own if strategy.node_id == self._node_id else self._others.get(strategy.node_id)
            if named is not None and policy.can_ever_run(demand, strategy, named):
                first = named.node_id
                if strategy.when_busy != "spill":
                    return Plan(True, ()) if named is own else Plan(False, ((first,),))
            elif not strategy.soft:
                return Plan(False, (), policy.why_affinity_fails(demand, strategy, named))
        ranks: dict[bytes, int] = {}
        for node in (own, *self._others.values()):
            rank = policy.preference(demand, strategy, node)
            if rank is not None:
                ranks[node.node_id] = -1 if node.node_id == first else rank
        if not ranks:
            return Plan(False, (), policy.why_infeasible(demand, strategy, [own, *self._others.values()]))
        mine = ranks.pop(self._node_id, None)
        levels = sorted(set(ranks.values()))
        tiers = tuple(tuple(node_id for node_id, rank in ranks.items() if rank == level) for level in levels)
        if mine is None:
            return Plan(False, tiers)
        ahead = sum(level < mine for level in levels)
        return Plan(True, tiers, ahead=ahead, peers=tiers[ahead] if mine in levels else ())
