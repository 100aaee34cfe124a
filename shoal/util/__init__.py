"""Helpers built on the public API. Each is imported when it is first used, but for the function `placement_group`: it
has the name of its module, and must not be replaced by that when the module is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoal.api.initialize import connected
from shoal.runtime import slot
from shoal.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

if TYPE_CHECKING:
    from shoal.util.actor_pool import ActorPool
    from shoal.util.executor import ShoalExecutor
    from shoal.util.iteration import as_completed, map_unordered
    from shoal.util.logging_once import disable_log_once_globally, enable_periodic_logging, log_once
    from shoal.util.nodes import wait_for_nodes
    from shoal.util.serialization import deregister_serializer, inspect_serializability, register_serializer

__all__ = [
    "ActorPool",
    "PlacementGroup",
    "ShoalExecutor",
    "as_completed",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "placement_group",
    "placement_group_table",
    "register_serializer",
    "remove_placement_group",
    "wait_for_nodes",
]

_HOMES = {
    "ActorPool": "actor_pool",
    "ShoalExecutor": "executor",
    "as_completed": "iteration",
    "deregister_serializer": "serialization",
    "disable_log_once_globally": "logging_once",
    "enable_periodic_logging": "logging_once",
    "inspect_serializability": "serialization",
    "log_once": "logging_once",
    "map_unordered": "iteration",
    "register_serializer": "serialization",
    "wait_for_nodes": "nodes",
}  # name -> module of this package that has it

_MODULES = {"dask", "joblib", "metrics", "multiprocessing", "progress", "queue", "scheduling_strategies"}
"""Modules of names that are not here: `shoal.util.queue.Queue` needs no import of its own."""


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """Actors that have a name and are not dead.

    Returns:
        names in this job's namespace, or {"name": ..., "namespace": ...} for each with `all_namespaces`; sorted.
    Raises:
        ShoalSystemError: not connected.
    """
    runtime = connected("list_named_actors()")
    namespace = "" if all_namespaces else runtime.context().namespace
    found = sorted((info.namespace, info.name) for info in runtime.list_actors(named_only=True, namespace=namespace))
    if all_namespaces:
        return [{"name": name, "namespace": space} for space, name in found]
    return [name for _, name in found]


def get_node_ip_address() -> str:
    """The address by which other nodes reach this one; without a connection, the one this machine uses to go out."""
    if slot.current is not None:
        return slot.current.context().node_ip
    import socket

    # Connecting a datagram socket sends nothing; it only asks the kernel which address it would use.
    for family, target in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
            except OSError:  # no route for this family
                continue
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def __getattr__(name: str) -> object:
    from importlib import import_module

    home = _HOMES.get(name)
    if home is None:
        if name in _MODULES:
            return import_module(f"shoal.util.{name}")
        raise AttributeError(f"module 'shoal.util' has no attribute {name!r}")
    value: object = getattr(import_module(f"shoal.util.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
