"""What the cluster has and did: `nodes`, `cluster_resources`, `available_resources`, `timeline`.

These do not connect on their own.
"""

from __future__ import annotations

import logging
import os
from typing import Any, overload

import msgspec

from shoal.api.initialize import connected
from shoal.control.messages import NodeInfo
from shoal.runtime.task_events import WorkerEvents
from shoal.runtime.trace import chrome_trace
from shoal.scheduling.resources import to_floats
from shoal.scheduling.views import Amounts

logger = logging.getLogger(__name__)


def nodes() -> list[dict[str, Any]]:
    """One row for each node, dead ones that are still remembered included.

    Raises:
        ShoalSystemError: not connected.
    """
    return [_row(node) for node in connected("nodes()").status().nodes]


def cluster_resources() -> dict[str, float]:
    """What all living nodes have, added up.

    Raises:
        ShoalSystemError: not connected.
    """
    living = [node.total for node in connected("cluster_resources()").status().nodes if node.alive]
    return to_floats(_sum(living))


def available_resources() -> dict[str, float]:
    """What is free on all living nodes, added up; what is used up is left out.

    Raises:
        ShoalSystemError: not connected.
    """
    living = [node.available for node in connected("available_resources()").status().nodes if node.alive]
    return to_floats({name: amount for name, amount in _sum(living).items() if amount > 0})


@overload
def timeline(filename: None = None) -> list[dict[str, Any]]: ...
@overload
def timeline(filename: str | os.PathLike[str]) -> None: ...
def timeline(filename: str | os.PathLike[str] | None = None) -> list[dict[str, Any]] | None:
    """What ran where and when, as a Chrome trace, for chrome://tracing or Perfetto.

    Each worker remembers its last 10,000 calls: when their arguments were fetched and unpickled, when they ran, and
    when their results were stored. Workers that crashed, or whose job is over, are not in it.

    Args:
        filename: write the events there as JSON, instead of returning them.
    Raises:
        ShoalSystemError: not connected. OSError: the file cannot be written.
    """
    given: object = filename
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"timeline() takes the name of a file to write, not {given!r}")
    packed, silent = connected("timeline()").task_events()
    for text in silent:
        logger.warning("the timeline is not complete: %s", text)
    decode = msgspec.msgpack.Decoder(WorkerEvents).decode
    events = chrome_trace(decode(worker) for worker in packed)
    if filename is None:
        return events
    with open(filename, "wb") as file:
        file.write(msgspec.json.encode(events))
    return None


def _sum(parts: list[Amounts]) -> Amounts:
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0) + amount
    return total


def _row(node: NodeInfo) -> dict[str, Any]:
    host, _, port = node.address.rpartition(":")
    return {
        "NodeID": node.node_id.hex(),
        "Alive": node.alive,
        "NodeManagerAddress": host.strip("[]"),
        "NodeManagerHostname": node.hostname,
        "NodeManagerPort": int(port) if port.isdigit() else 0,
        "ObjectManagerPort": int(port) if port.isdigit() else 0,  # one port for everything
        "ObjectStoreSocketName": "",
        "RayletSocketName": "",
        "MetricsExportPort": 0,
        "NodeName": node.hostname,
        "RuntimeEnvAgentPort": 0,
        "DeathReason": 0 if node.alive else 1,
        "DeathReasonMessage": node.death_reason,
        "alive": node.alive,
        "Resources": to_floats(node.total) if node.alive else {},
        "Labels": dict(node.labels),
        "IsHead": node.is_head,
    }
