"""Bundles of placement groups on this node: carries out what control orders, and says what became of it.

Setting resources aside never waits, with one exception. Where tasks keep a node busy for as long as there are more of
them, a group would never find room; so control lets one group at a time stand in line: it wants one lease for each of
its bundles, as an owner of its own, and when it has all of them they are changed into the bundles, at once. What it has
got by then is held while it waits for the rest, but nobody can hold something else that it waits for: no other group
stands, tasks end or lend their CPUs, and after `patience_s` it gives everything back.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from shoal.control.messages import BundlesPrepared, PrepareBundles, ReturnBundles
from shoal.node.lease_decisions import Decision, Grant
from shoal.node.leases import LeaseScheduler
from shoal.node.messages import LeaseSpec
from shoal.rpc.messages import Message
from shoal.scheduling.views import Strategy

_NO_JOB: Final = b""


class Host(Protocol):
    """What bundles ask of the agent that they are part of."""

    @property
    def scheduler(self) -> LeaseScheduler: ...
    def end_leases(self, lease_ids: list[int], cause: str) -> None: ...
    def tell_control(self, message: Message) -> None: ...
    def decide_soon(self) -> None: ...
    def report_soon(self) -> None: ...


class _Standing:
    __slots__ = ("leases", "order", "timer")

    def __init__(self, order: PrepareBundles, timer: asyncio.TimerHandle) -> None:
        self.order = order
        self.timer = timer
        self.leases = 0  # that it has


class GroupHost:
    """See the module."""

    def __init__(self, agent: Host) -> None:
        self._agent = agent
        self._standing: dict[bytes, _Standing] = {}  # by group

    def prepare(self, order: PrepareBundles) -> None:
        """Set bundles aside, and serve from them at once if no other node takes part."""
        done = self._take(order)
        if done or order.patience_s <= 0:
            self._answer(order, done)
        else:
            self._stand(order)

    def commit(self, group_id: bytes) -> None:
        self._agent.scheduler.commit_bundles(group_id)
        self._agent.decide_soon()

    def give_back(self, order: ReturnBundles) -> None:
        """Whoever works in them ends, and what they hold is free when that has happened."""
        self._leave_line(order.group_id)
        agent = self._agent
        agent.end_leases(agent.scheduler.close_bundles(order.group_id, order.bundles), order.cause)
        agent.decide_soon()

    def _take(self, order: PrepareBundles) -> bool:
        done = self._agent.scheduler.prepare_bundles(order.group_id, order.bundles)
        if done and order.commit:
            self.commit(order.group_id)
        return done

    def _answer(self, order: PrepareBundles, done: bool) -> None:
        self._agent.report_soon()
        self._agent.tell_control(BundlesPrepared(order.group_id, order.attempt, done))

    # -------------------------------------------------------------------------------------------------- the line

    def _stand(self, order: PrepareBundles) -> None:
        scheduler = self._agent.scheduler
        group_id = order.group_id
        timer = asyncio.get_running_loop().call_later(order.patience_s, self._give_up, group_id)
        self._standing[group_id] = _Standing(order, timer)
        here = Strategy("node", scheduler.node_id)  # control chose, and will choose again
        name = f"a bundle of placement group {group_id.hex()[:12]}"
        for index, resources in order.bundles.items():
            need = LeaseSpec(_NO_JOB, resources, name, strategy=here)
            scheduler.set_demand(group_id, index, 1, need, time.time(), redirected=True)
        self._agent.decide_soon()

    def takes(self, decision: Decision) -> bool:
        """Whether the decision is about a group in line; if so it is carried out."""
        standing = self._standing.get(decision.owner)
        if standing is None:
            return False
        if isinstance(decision, Grant):
            standing.leases += 1
            if standing.leases == len(standing.order.bundles):
                self._leave_line(decision.owner)
                self._answer(standing.order, self._take(standing.order))  # nothing comes between
        return True

    def _give_up(self, group_id: bytes) -> None:
        standing = self._leave_line(group_id)
        if standing is not None:
            self._answer(standing.order, False)

    def _leave_line(self, group_id: bytes) -> _Standing | None:
        standing = self._standing.pop(group_id, None)
        if standing is not None:
            standing.timer.cancel()
            scheduler = self._agent.scheduler
            for lease_id in scheduler.drop_owner(group_id):
                scheduler.release(lease_id)
            self._agent.decide_soon()
        return standing
