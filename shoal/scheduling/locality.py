"""Whether a task should go to its arguments, instead of the arguments to it. Pure.

Asked by the owner of a task, which knows size and place of what it passes. A task whose large arguments lie elsewhere
asks for a lease there first, but does not wait for one: as soon as that node has no room, any other does
(`Strategy.when_busy` "spill"), since a transfer is usually quicker than a turn in a line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from shoal.scheduling.views import Strategy

WORTH_BYTES: Final = 1 << 20
"""So much more than here must lie on another node: less travels faster than a lease is asked for there."""


def best_place(stored: Iterable[tuple[int, Sequence[bytes]]], here: bytes) -> bytes | None:
    """The node that holds most bytes of the arguments, None when `here` is as good.

    Args:
        stored: (size in bytes, nodes that have a copy) of each argument that is in a store.
    """
    held: dict[bytes, int] = {}
    for size, nodes in stored:
        for node in nodes:
            held[node] = held.get(node, 0) + size
    if not held:
        return None
    best = max(held, key=lambda node: (held[node], node))
    return best if held[best] - held.get(here, 0) >= WORTH_BYTES else None


def near(strategy: Strategy, node_id: bytes) -> Strategy:
    """The default strategy, for a task whose arguments lie on that node."""
    return msgspec.structs.replace(strategy, kind="node", node_id=node_id, soft=True, when_busy="spill")
