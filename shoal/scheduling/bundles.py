"""On which nodes the bundles of a placement group go: all of them or none. Pure.

    STRICT_PACK    all on one node                     exact: a node that holds the sum
    STRICT_SPREAD  each on a node of its own           exact: a matching of bundles and nodes
    PACK           on as few nodes as possible         one node if that works, else largest first onto used nodes
    SPREAD         on as many nodes as possible        onto unused nodes first, then onto those with fewest bundles

PACK and SPREAD are packing problems without a quick exact answer: a search that prefers what the rule says and goes
back when it is stuck, for a bounded number of steps. Its first descent is the usual greedy answer.

When some bundles have a node already (`kept`: the others were lost with theirs), only the rest is placed, by the same
rule seen over all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from shoal.scheduling.labels import matches
from shoal.scheduling.policy import Busy, Infeasible, utilisation, why_infeasible
from shoal.scheduling.resources import add, describe, fits, subtract
from shoal.scheduling.views import Amounts, NodeView, Strategy, WaitReason

STRATEGIES: Final = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
MAX_STEPS_BACK: Final = 2_000
"""Of the search, beyond one step for each bundle: some milliseconds."""


class BundleNeed(NamedTuple):
    resources: Amounts
    labels: Mapping[str, str] = {}


class Assigned(NamedTuple):
    """Bundle -> node, for those that were to be placed."""

    nodes: dict[int, bytes]


Plan = Assigned | Busy | Infeasible


def place_bundles(
    bundles: Sequence[BundleNeed],
    strategy: str,
    nodes: Sequence[NodeView],
    *,
    kept: Mapping[int, bytes] = {},
    soft_target: bytes = b"",
) -> Plan:
    """Find a node for each bundle that is not `kept`.

    Args:
        kept: bundle -> the node where it is, and stays; what it holds is in no node's `available`.
        soft_target: the node that STRICT_PACK prefers.
    """
    open_nodes = [node for node in nodes if not node.draining]
    wanted = [index for index in range(len(bundles)) if index not in kept]
    found = _assign(bundles, wanted, strategy, open_nodes, kept, soft_target)
    if found is not None:
        return Assigned(found)
    idle = [msgspec.structs.replace(node, available=_idle(node, bundles, kept)) for node in open_nodes]
    if _assign(bundles, wanted, strategy, idle, kept, soft_target) is None:
        return Infeasible(_why_never(bundles, wanted, strategy, nodes, idle))
    needs = describe(_sum(bundles, wanted))
    where = "at once on one node" if strategy == "STRICT_PACK" else "at once"
    if strategy == "STRICT_SPREAD":
        where = "at once, each bundle on a node of its own"
    return Busy(WaitReason("busy", f"it needs {needs} {where}, and too little is free"))


def _idle(node: NodeView, bundles: Sequence[BundleNeed], kept: Mapping[int, bytes]) -> Amounts:
    """What the node would have if nothing but the kept bundles were there."""
    free = node.total
    for index, where in kept.items():
        if where == node.node_id:
            free = subtract(free, bundles[index].resources)
    return free


def _sum(bundles: Sequence[BundleNeed], wanted: Sequence[int]) -> Amounts:
    total: Amounts = {}
    for index in wanted:
        total = add(total, bundles[index].resources)
    return total


def _may_hold(bundle: BundleNeed, node: NodeView) -> bool:
    return fits(bundle.resources, node.available) and matches(bundle.labels, node.labels)


def _assign(
    bundles: Sequence[BundleNeed],
    wanted: Sequence[int],
    strategy: str,
    nodes: Sequence[NodeView],
    kept: Mapping[int, bytes],
    soft_target: bytes,
) -> dict[int, bytes] | None:
    if strategy == "STRICT_PACK":
        return _on_one(bundles, wanted, nodes, kept, soft_target)
    if strategy == "STRICT_SPREAD":
        return _match(bundles, wanted, nodes, kept)
    if strategy == "PACK" and not kept:
        found = _on_one(bundles, wanted, nodes, kept, b"")
        if found is not None:
            return found
    return _search(bundles, wanted, nodes, kept, pack=strategy == "PACK")


def _wastes_gpu(needs: Amounts, node: NodeView) -> bool:
    return bool(node.total.get("GPU")) and not needs.get("GPU")


def _on_one(
    bundles: Sequence[BundleNeed],
    wanted: Sequence[int],
    nodes: Sequence[NodeView],
    kept: Mapping[int, bytes],
    soft_target: bytes,
) -> dict[int, bytes] | None:
    """All on one node: the fullest that has room, so that large groups find room later."""
    needs = _sum(bundles, wanted)
    fitting = [
        node
        for node in nodes
        if fits(needs, node.available)
        and all(matches(bundles[index].labels, node.labels) for index in wanted)
        and all(where == node.node_id for where in kept.values())
    ]
    if not fitting:
        return None
    chosen = min(
        fitting,
        key=lambda node: (node.node_id != soft_target, _wastes_gpu(needs, node), -utilisation(needs, node)),
    )
    return dict.fromkeys(wanted, chosen.node_id)


def _match(
    bundles: Sequence[BundleNeed], wanted: Sequence[int], nodes: Sequence[NodeView], kept: Mapping[int, bytes]
) -> dict[int, bytes] | None:
    """Each on a node of its own, by augmenting paths: a bundle may push another to its next possible node."""
    taken = set(kept.values())
    free = [node for node in nodes if node.node_id not in taken]
    options: dict[int, list[int]] = {}
    seen: list[tuple[BundleNeed, list[int]]] = []
    for index in wanted:
        bundle = bundles[index]
        known = next((choices for other, choices in seen if other == bundle), None)
        if known is None:
            fitting = [number for number, node in enumerate(free) if _may_hold(bundle, node)]
            known = sorted(fitting, key=lambda number: _spread_rank(bundle.resources, free[number]))
            seen.append((bundle, known))
        options[index] = known
    holder: dict[int, int] = {}  # node -> bundle
    for index in sorted(wanted, key=lambda index: len(options[index])):
        if not _augment(index, options, holder):
            return None
    return {index: free[number].node_id for number, index in holder.items()}


def _augment(start: int, options: Mapping[int, Sequence[int]], holder: dict[int, int]) -> bool:
    """Give `start` a node, moving others if need be. Breadth first, without recursion."""
    came_from: dict[int, int] = {}  # node -> the bundle that would take it
    queue = [start]
    for index in queue:
        for number in options[index]:
            if number in came_from:
                continue
            came_from[number] = index
            if number in holder:
                queue.append(holder[number])
                continue
            while True:  # walk back: each takes the node, and leaves the one it had
                taker = came_from[number]
                left = next((other for other, bundle in holder.items() if bundle == taker), None)
                holder[number] = taker
                if taker == start or left is None:
                    return True
                number = left
    return False


def _spread_rank(needs: Amounts, node: NodeView) -> tuple[bool, float]:
    return _wastes_gpu(needs, node), utilisation(needs, node)


def _search(
    bundles: Sequence[BundleNeed],
    wanted: Sequence[int],
    nodes: Sequence[NodeView],
    kept: Mapping[int, bytes],
    *,
    pack: bool,
) -> dict[int, bytes] | None:
    """Depth first over the bundles, hardest first; candidates in order of preference, looked for lazily."""
    needs = _sum(bundles, wanted)
    room = {node.node_id: node.available for node in nodes}
    count: Counter[bytes] = Counter(where for where in kept.values() if where in room)
    if pack:
        preferred = sorted(nodes, key=lambda node: (_wastes_gpu(needs, node), -_share(needs, node)))
    else:
        preferred = sorted(nodes, key=lambda node: _spread_rank(needs, node))
    order = sorted(wanted, key=lambda index: -_weight(bundles[index].resources, needs))

    def candidates(bundle: BundleNeed) -> Iterator[bytes]:
        used = [node for node in preferred if count[node.node_id]]
        if not pack:
            used.sort(key=lambda node: count[node.node_id])
        unused = (node for node in preferred if not count[node.node_id])
        for part in (used, unused) if pack else (unused, used):
            for node in part:
                if fits(bundle.resources, room[node.node_id]) and matches(bundle.labels, node.labels):
                    yield node.node_id

    chosen: list[bytes] = []
    levels: list[Iterator[bytes]] = [candidates(bundles[order[0]])] if order else []
    for _ in range(2 * len(order) + MAX_STEPS_BACK):
        if len(chosen) == len(order):
            return dict(zip(order, chosen, strict=True))
        where = next(levels[-1], None)
        if where is None:
            levels.pop()
            if not levels:
                return None
            where = chosen.pop()
            room[where] = add(room[where], bundles[order[len(chosen)]].resources)
            count[where] -= 1
            continue
        room[where] = subtract(room[where], bundles[order[len(chosen)]].resources)
        count[where] += 1
        chosen.append(where)
        if len(chosen) < len(order):
            levels.append(candidates(bundles[order[len(chosen)]]))
    return None


def _share(needs: Amounts, node: NodeView) -> float:
    """How much of all that is needed this node could hold, by its scarcest resource."""
    return min((node.available.get(name, 0) / amount for name, amount in needs.items() if amount), default=0.0)


def _weight(resources: Amounts, needs: Amounts) -> float:
    return max((amount / needs[name] for name, amount in resources.items() if amount), default=0.0)


def _why_never(
    bundles: Sequence[BundleNeed],
    wanted: Sequence[int],
    strategy: str,
    nodes: Sequence[NodeView],
    idle: Sequence[NodeView],
) -> WaitReason:
    for index in wanted:
        bundle = bundles[index]
        if not any(_may_hold(bundle, node) for node in idle):
            labels = dict(bundle.labels)
            why = why_infeasible(bundle.resources, Strategy(labels=labels), nodes)
            return WaitReason("infeasible", f"its bundle {index} fits on no node: {why.text}")
    if strategy == "STRICT_PACK":
        why = why_infeasible(_sum(bundles, wanted), Strategy(), nodes)
        return WaitReason("infeasible", f"all of its bundles must be on one node, and {why.text}")
    if strategy == "STRICT_SPREAD":
        able = sum(any(_may_hold(bundles[index], node) for index in wanted) for node in idle)
        text = f"its {len(bundles)} bundles must be on as many nodes, and {able} nodes could hold one of them"
        if len(wanted) < len(bundles):
            text = f"{len(wanted)} of its {len(bundles)} bundles need nodes of their own, and no others could hold them"
        return WaitReason("infeasible", text)
    return WaitReason(
        "infeasible", f"the nodes are too small for all of its bundles ({describe(_sum(bundles, wanted))})"
    )
