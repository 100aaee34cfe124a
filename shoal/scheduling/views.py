"""Frozen values that scheduling decisions read and that travel inside messages.

Amounts are integers in steps of 1/10000 of a unit (`UNIT`), so that sums of fractions stay exact.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNIT: Final = 10_000

Amounts = dict[str, int]
"""Resource name -> amount in 1/10000 units. "memory" and "object_store_memory" count bytes * 10000 as well."""


class Strategy(msgspec.Struct, array_like=True, frozen=True):
    """Where a task or actor wants to run.

    kind: "default" (hybrid: fill up, then spread), "spread", "node" (affinity to `node_id`;
    `soft` falls back to default when that node is gone or can never fit), or "group" (inside the placement group
    `group`: in its bundle number `bundle`, -1 for any; `capture`: what it makes runs there too, unless told otherwise).
    labels: selector (see `labels`) that a node must satisfy.
    fallbacks: selectors to go by instead, in order, where those before them find no room.
    when_busy: of "node": "" waits for room there, "spill" (soft) goes elsewhere, "fail" (hard) gives up.
    """

    kind: str = "default"
    node_id: bytes = b""
    soft: bool = False
    labels: dict[str, str] = {}
    fallbacks: list[dict[str, str]] = []
    when_busy: str = ""
    group: bytes = b""
    bundle: int = -1
    capture: bool = False

    def key(self) -> bytes:
        """Equal for equal strategies."""
        return msgspec.msgpack.encode(self, order="sorted")


class WaitReason(msgspec.Struct, array_like=True, frozen=True):
    """Why something is not running yet. `code` is for machines, `text` completes "waiting because ...".

    Codes: infeasible, unschedulable (it was told not to wait for that, so it fails), busy, arguments, worker_starting,
    node_starting, environment, owner_gone, connecting, actor_pending, actor_restarting, object_pending, store_full,
    transfer, group_pending.
    """

    code: str
    text: str


class NodeView(msgspec.Struct, array_like=True, frozen=True):
    """What a scheduler knows about one node; `total` and `available` may be a little out of date."""

    node_id: bytes
    total: Amounts
    available: Amounts
    labels: dict[str, str] = {}
    draining: bool = False


class DemandReport(msgspec.Struct, array_like=True, frozen=True):
    """Work that one agent (or control, for actors) could not place yet; what `status` and the autoscaler read."""

    name: str
    resources: Amounts
    count: int
    reason: WaitReason
    since_unix_s: float
    job_id: bytes = b""
    group: bytes = b""  # the placement group that it waits for room in
