"""Which node should run something: a pure choice over a view of the cluster.

The default is a hybrid, as users of Ray know it: stay local while the local node is at most half used (no hop, warm
workers, data at hand), then go to the least used node where it fits now. Several schedulers choose at the same time
from views that are a little old; were they all to take the very best node, they would all hit the same one, so the
choice is random among the best fifth. Work that needs no GPU stays away from nodes that have some.

A choice that is no node says why as a `WaitReason`. Its text is made of demands and totals, not of what happens to be
free, so that it stays the same while nothing that a person would act on has changed.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from shoal.scheduling.bundle_names import MARK, asked_of, could_hold, join_name
from shoal.scheduling.labels import describe as describe_labels
from shoal.scheduling.labels import matches
from shoal.scheduling.resources import describe, describe_amount, fits, missing
from shoal.scheduling.views import UNIT, Amounts, NodeView, Strategy, WaitReason

PACK_LIMIT: Final = 0.5
"""Utilisation of the local node above which other nodes are considered."""

TOP_FRACTION: Final = 0.2
"""Share of all nodes among which the choice is random."""

_CRITICAL: Final = ("CPU", "memory", "object_store_memory")


class Node(NamedTuple):
    """Run it on this node, where it fits now."""

    node_id: bytes


class Busy(NamedTuple):
    """Some node could run it, none has room now."""

    reason: WaitReason


class Infeasible(NamedTuple):
    """No node that is there could ever run it."""

    reason: WaitReason


Choice = Node | Busy | Infeasible


def choose_node(
    demand: Amounts, strategy: Strategy, nodes: Sequence[NodeView], local: bytes | None, rng: random.Random
) -> Choice:
    """Choose a node where `demand` fits now.

    Args:
        local: the node that the default strategy prefers; None for no preference.
    """
    if strategy.kind == "node":
        named = next((node for node in nodes if node.node_id == strategy.node_id), None)
        if named is not None and can_ever_run(demand, strategy, named):
            if fits(demand, named.available):
                return Node(named.node_id)
            if strategy.when_busy == "fail":
                return Infeasible(why_unavailable(demand, named))
            if strategy.when_busy != "spill":
                return Busy(why_busy(demand, [named]))
        elif not strategy.soft:
            return Infeasible(why_affinity_fails(demand, strategy, named))
    busy: dict[bytes, NodeView] = {}
    large = nodes if strategy.kind != "group" else [node for node in nodes if could_hold(demand, node.total)]
    for labels in acceptable(strategy):
        feasible = [node for node in large if _could_run(demand, labels, node)]
        fitting = [node for node in feasible if fits(demand, node.available)]
        if fitting:
            return _choose_among(demand, strategy, fitting, len(nodes), local, rng)
        busy.update({node.node_id: node for node in feasible})
    if not busy:
        return Infeasible(why_infeasible(demand, strategy, nodes))
    return Busy(why_busy(demand, list(busy.values())))


def _choose_among(
    demand: Amounts,
    strategy: Strategy,
    fitting: list[NodeView],
    node_count: int,
    local: bytes | None,
    rng: random.Random,
) -> Node:
    if strategy.kind == "spread":
        return Node(_least_used(demand, fitting, 1, rng).node_id)
    if not demand.get("GPU"):
        fitting = [node for node in fitting if not node.total.get("GPU")] or fitting
    if local is not None:
        for node in fitting:
            if node.node_id == local and utilisation(demand, node) <= PACK_LIMIT:
                return Node(local)
    return Node(_least_used(demand, fitting, max(int(node_count * TOP_FRACTION), 1), rng).node_id)


def acceptable(strategy: Strategy) -> list[dict[str, str]]:
    """Selectors in order of preference; a node need satisfy only one."""
    return [strategy.labels, *strategy.fallbacks] if strategy.fallbacks else [strategy.labels]


def can_ever_run(demand: Amounts, strategy: Strategy, node: NodeView) -> bool:
    """Whether the node takes work, has the labels, and is large enough when nothing else runs there.

    In a placement group, `demand` is what `bundle_names.demand_on` makes of it.
    """
    return preference(demand, strategy, node) is not None


def preference(demand: Amounts, strategy: Strategy, node: NodeView) -> int | None:
    """0 for nodes of the first choice, 1 for those of the first fallback ...; None: it can never run there."""
    if node.draining or not fits(demand, node.total):
        return None
    if strategy.kind == "group" and not could_hold(demand, node.total):
        return None
    for rank, labels in enumerate(acceptable(strategy)):
        if not labels or matches(labels, node.labels):
            return rank
    return None


def _could_run(demand: Amounts, labels: Mapping[str, str], node: NodeView) -> bool:
    return not node.draining and fits(demand, node.total) and (not labels or matches(labels, node.labels))


def utilisation(demand: Amounts, node: NodeView) -> float:
    """Share in use of the node's most used resource, 0.0 to 1.0 (more when CPUs are oversubscribed).

    Only CPU, memory and what `demand` itself needs are looked at: a marker resource that is taken says nothing.
    """
    highest = 0.0
    for name in {*_CRITICAL, *demand}:
        total = node.total.get(name, 0)
        if total > 0:
            highest = max(highest, 1.0 - node.available.get(name, 0) / total)
    return highest


def share_of(demand: Amounts, total: Amounts) -> int:
    """What part of a node `demand` is, in millionths: of the resource that it needs most of. 1 at least."""
    shares = [amount * 1_000_000 // total[name] for name, amount in demand.items() if total.get(name)]
    return max(shares, default=0) or 1


def _least_used(demand: Amounts, nodes: Sequence[NodeView], top: int, rng: random.Random) -> NodeView:
    """One of the `top` least used, by chance; equally used ones are in random order."""
    if len(nodes) == 1:
        return nodes[0]
    ranked = [(utilisation(demand, node), rng.random(), index) for index, node in enumerate(nodes)]
    best = heapq.nsmallest(top, ranked) if top > 1 else [min(ranked)]
    return nodes[rng.choice(best)[2]]


def rank_nodes(
    demand: Amounts, strategy: Strategy, fitting: Sequence[NodeView], node_count: int, rng: random.Random
) -> list[NodeView]:
    """Where to send many at once: the order in which `choose_node` might pick among nodes where `demand` fits now.

    With the default strategy, work without GPU gets nodes with GPUs only when there are no others.

    Args:
        node_count: nodes of the whole cluster, for the width of the random choice.
    """
    spread = strategy.kind == "spread"
    if not spread and not demand.get("GPU"):
        fitting = [node for node in fitting if not node.total.get("GPU")] or fitting
    ranked = sorted(((utilisation(demand, node), rng.random(), index) for index, node in enumerate(fitting)))
    order = [fitting[index] for _, _, index in ranked]
    top = 1 if spread else min(max(int(node_count * TOP_FRACTION), 1), len(order))
    head = order[:top]
    rng.shuffle(head)
    return head + order[top:]


# ------------------------------------------------------------------------------------------------------- reasons


def why_busy(demand: Amounts, feasible: Sequence[NodeView]) -> WaitReason:
    """`feasible`: the nodes that could run `demand` if they were idle; it fits on none of them now.

    The resource that is named is the one that most of them lack.
    """
    lacking = dict.fromkeys(sorted(demand), 0)
    for node in feasible:
        for name in missing(demand, node.available):
            lacking[name] += 1
    where = "the only node that could run it" if len(feasible) == 1 else f"the {len(feasible)} nodes that could run it"
    if not lacking or not max(lacking.values()):
        return WaitReason("busy", f"{where} cannot take more work now")
    name = max(lacking, key=lambda name: (lacking[name], name == "CPU"))
    total = sum(node.total.get(name, 0) for node in feasible)
    if demand[name] <= UNIT:
        return WaitReason("busy", f"all {describe_amount(name, total)} are busy on {where}")
    needed, there = describe_amount(name, demand[name]), describe_amount(name, total)
    return WaitReason("busy", f"it needs {needed} at once, and too little of the {there} is free on {where}")


def why_infeasible(demand: Amounts, strategy: Strategy, nodes: Sequence[NodeView]) -> WaitReason:
    """None of `nodes` can ever run `demand`: name the one thing a person would have to add."""
    if not nodes:
        return WaitReason("infeasible", "the cluster has no nodes")
    if strategy.kind == "group":
        return _why_no_bundle(demand, strategy, nodes)
    choices = acceptable(strategy)
    selective = all(choices)
    if selective:
        labelled = [node for node in nodes if any(matches(labels, node.labels) for labels in choices)]
        if not labelled:
            wanted = ", nor ".join(describe_labels(labels) for labels in choices)
            return WaitReason("infeasible", f"no node has the labels {wanted}")
        nodes = labelled
    open_nodes = [node for node in nodes if not node.draining]
    if not open_nodes or any(node.draining and fits(demand, node.total) for node in nodes):
        return WaitReason("infeasible", "the only nodes that could run it are draining")
    among = "no node with the labels has" if selective else "no node has"
    for name, amount in sorted(demand.items()):
        largest = max(node.total.get(name, 0) for node in open_nodes)
        if amount > largest:
            largest_text = describe_amount(name, largest).removesuffix(f" {name}")
            best = f"the largest has {largest_text}" if largest else "none has any"
            return WaitReason("infeasible", f"{among} {describe_amount(name, amount)} ({best})")
    return WaitReason("infeasible", f"no single node has all of {describe(demand)}")


def why_unavailable(demand: Amounts, named: NodeView) -> WaitReason:
    """Affinity that shall not wait, to a node that is busy."""
    lacking = ", ".join(missing(demand, named.available)) or "room"
    node = f"node {named.node_id.hex()[:12]}, which it must run on,"
    return WaitReason("unschedulable", f"{node} has too little {lacking} free now, and it was told not to wait")


def _why_no_bundle(demand: Amounts, strategy: Strategy, nodes: Sequence[NodeView]) -> WaitReason:
    group = f"placement group {strategy.group.hex()[:12]}"
    bundle = f"bundle {strategy.bundle} of {group}" if strategy.bundle >= 0 else group
    mark = join_name(MARK, strategy.group, strategy.bundle)
    if not any(mark in node.total for node in nodes):
        return WaitReason("group_pending", f"{bundle} has no place yet")
    subject = bundle if strategy.bundle >= 0 else f"no bundle of {group}"
    verb = "does not have" if strategy.bundle >= 0 else "has"
    return WaitReason("infeasible", f"{subject} {verb} {describe(asked_of(demand))}")


def why_affinity_fails(demand: Amounts, strategy: Strategy, named: NodeView | None) -> WaitReason:
    """Hard affinity to a node that is not there (`named` None) or can never run it."""
    node = f"node {strategy.node_id.hex()[:12]}, which it must run on,"
    if named is None:
        return WaitReason("unschedulable", f"{node} is not in the cluster")
    if named.draining:
        return WaitReason("unschedulable", f"{node} is draining")
    if not any(matches(labels, named.labels) for labels in acceptable(strategy)):
        return WaitReason("unschedulable", f"{node} does not have the labels that it asks for")
    name, (needed, there) = next(iter(missing(demand, named.total).items()))
    best = f"has {describe_amount(name, there)}" if there else f"has no {name}"
    return WaitReason("unschedulable", f"{node} {best}, and it needs {describe_amount(name, needed)}")
