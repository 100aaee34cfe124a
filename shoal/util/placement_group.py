"""Placement groups: resources set aside on one or many nodes, all of them or none, for tasks and actors to run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shoal.api.initialize import connect_if_needed, connected
from shoal.api.placement_group import PlacementGroup, PlacementGroupID
from shoal.api.strategies import to_selector
from shoal.api.words import not_supported
from shoal.control.messages import GroupInfo, GroupSpec
from shoal.objects.ids import UNIQUE_BYTES
from shoal.scheduling.bundle_names import parse_name
from shoal.scheduling.bundles import STRATEGIES
from shoal.scheduling.resources import to_amounts, to_floats
from shoal.scheduling.views import Amounts

__all__ = [
    "PlacementGroup",
    "PlacementGroupID",
    "get_current_placement_group",
    "get_placement_group",
    "placement_group",
    "placement_group_table",
    "remove_placement_group",
]


def placement_group(
    bundles: list[dict[str, float]],
    strategy: str = "PACK",
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: list[dict[str, str]] | None = None,
    topology_strategy: Mapping[str, str] | None = None,
) -> PlacementGroup:
    """Set resources aside for tasks and actors: all `bundles` or none. Returns at once; see `ready` and `wait`.

    Args:
        bundles: what each needs: {"CPU": 2, "GPU": 1}. A bundle is on one node.
        strategy: "PACK" (as few nodes as possible), "SPREAD" (as many), "STRICT_PACK" (one node), "STRICT_SPREAD" (a
            node for each bundle).
        name: to find it with `get_placement_group`; unique in this job's namespace.
        lifetime: "detached": it lives until it is removed. None: it ends with this job, or with the detached actor that
            makes it.
        bundle_label_selector: labels of the node, for each bundle.
    Raises:
        ValueError, TypeError: not such bundles, or the name is taken.
    """
    wanted = _check_bundles(bundles)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy is one of {', '.join(map(repr, STRATEGIES))}, not {strategy!r}")
    given_name: object = name
    if not isinstance(given_name, str | None):
        raise TypeError(f"name is a string, not {given_name!r}")
    if lifetime not in (None, "detached"):
        raise ValueError(f"lifetime is None or 'detached', not {lifetime!r}")
    if topology_strategy:
        raise not_supported("topology_strategy", "use bundle_label_selector")
    target = _check_target(_soft_target_node_id, strategy)
    labels = _check_labels(bundle_label_selector, len(wanted))
    runtime = connect_if_needed()
    group_id = PlacementGroupID.of(runtime.job.job_id)
    spec = GroupSpec(
        group_id=bytes(group_id), job_id=runtime.job.job_id, bundles=wanted, strategy=strategy, name=name or "",
        namespace=runtime.job.namespace, detached=lifetime == "detached", actor_id=runtime.groups.owner_actor,
        labels=labels, soft_target=target,
    )  # fmt: skip
    runtime.groups.create(spec)
    return PlacementGroup(group_id, [dict(bundle) for bundle in bundles])


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Give the resources of a group back. Tasks and actors that run in it are ended. Again does nothing."""
    connect_if_needed().groups.remove(bytes(_check_group(placement_group).id))


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group of this name in this job's namespace.

    Raises:
        ValueError: there is none.
    """
    given: object = placement_group_name
    if not isinstance(given, str) or not given:
        raise ValueError(f"get_placement_group() takes a name that is not empty, not {given!r}")
    info = connect_if_needed().groups.find(b"", placement_group_name)
    return PlacementGroup(PlacementGroupID(info.spec.group_id), [to_floats(bundle) for bundle in info.spec.bundles])


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the calling task or actor runs in; None outside of one."""
    group = connect_if_needed().context().group
    return PlacementGroup(PlacementGroupID(group)) if group else None


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """The state of a group; without one, of all groups by their ids (hex), removed ones that are remembered included.

    Raises:
        ShoalSystemError: not connected. ValueError: there is no such group.
    """
    groups = connected("placement_group_table()").groups
    if placement_group is None:
        return {info.spec.group_id.hex(): _row(info) for info in groups.all()}
    return _row(groups.find(bytes(_check_group(placement_group).id)))


def _row(info: GroupInfo) -> dict[str, Any]:
    spec = info.spec
    latency_ms = max(info.created_unix_s - info.asked_unix_s, 0.0) * 1000
    return {
        "placement_group_id": spec.group_id.hex(),
        "name": spec.name,
        "bundles": {index: to_floats(bundle) for index, bundle in enumerate(spec.bundles)},
        "bundles_to_node_id": {index: node.hex() for index, node in enumerate(info.nodes)},
        "strategy": spec.strategy,
        "state": info.state,
        "is_detached": spec.detached,
        "creator_job_id": spec.job_id.hex(),
        "reason": info.reason.text if info.reason is not None else info.cause,
        "stats": {
            "end_to_end_creation_latency_ms": latency_ms,
            "scheduling_latency_ms": latency_ms,
            "scheduling_attempt": info.attempts,
            "highest_retry_delay_ms": 0.0,
            "scheduling_state": info.reason.code.upper() if info.reason is not None else "FINISHED",
        },
    }


# ---------------------------------------------------------------------------------------------------------- arguments


def _check_group(group: Any) -> PlacementGroup:
    if not isinstance(group, PlacementGroup):
        raise TypeError(f"a placement group is what placement_group() returned, not {group!r}")
    return group


def _check_bundles(bundles: Any) -> list[Amounts]:
    if not isinstance(bundles, Sequence) or isinstance(bundles, str):
        raise ValueError(f"bundles is a list of dicts such as [{{'CPU': 1}}], not {bundles!r}")
    if not bundles:
        raise ValueError("bundles is empty: a placement group has at least one bundle, such as [{'CPU': 1}]")
    wanted = []
    for index, bundle in enumerate(bundles):
        if not isinstance(bundle, Mapping):
            raise ValueError(f"bundle {index} is a dict of resource names to amounts, not {bundle!r}")
        try:
            amounts = to_amounts(bundle)
        except ValueError as exc:
            raise ValueError(f"bundle {index}: {exc}") from None
        of_group = next((name for name in amounts if parse_name(name) is not None), None)
        if of_group is not None:
            raise ValueError(f"bundle {index} asks for {of_group!r}, which is part of another placement group")
        if not amounts:
            raise ValueError(f"bundle {index} asks for nothing: {dict(bundle)}; leave it out")
        wanted.append(amounts)
    return wanted


def _check_target(node_id: str | None, strategy: str) -> bytes:
    if node_id is None:
        return b""
    if strategy != "STRICT_PACK":
        raise ValueError(f"_soft_target_node_id goes with strategy='STRICT_PACK', not {strategy!r}")
    try:
        target = bytes.fromhex(node_id)
    except (TypeError, ValueError):
        raise ValueError(f"_soft_target_node_id is a node id in hex, not {node_id!r}") from None
    if len(target) != UNIQUE_BYTES:
        raise ValueError(f"_soft_target_node_id has {2 * UNIQUE_BYTES} hex digits, {node_id!r} has {len(node_id)}")
    return target


def _check_labels(selectors: Any, count: int) -> list[dict[str, str]]:
    if not selectors:
        return []
    if not isinstance(selectors, Sequence) or len(selectors) != count:
        raise ValueError(f"bundle_label_selector has one dict for each of the {count} bundles, not {selectors!r}")
    return [to_selector("bundle_label_selector", selector) for selector in selectors]
