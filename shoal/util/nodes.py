"""Waiting for a cluster to grow."""

from __future__ import annotations

import time
from typing import Final

from shoal.api.cluster import nodes

LOOK_AGAIN_S: Final = 0.05


def wait_for_nodes(count: int, timeout: float = 30.0) -> None:
    """Wait until at least `count` nodes are alive.

    Args:
        timeout: seconds.
    Raises:
        TimeoutError: fewer are alive by then; the text says how many.
        ShoalSystemError: not connected.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"wait_for_nodes() takes a number of nodes, not {count!r}")
    deadline = time.monotonic() + timeout
    while True:
        alive = sum(node["Alive"] for node in nodes())
        if alive >= count:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {count} nodes to be alive; {alive} are")
        time.sleep(LOOK_AGAIN_S)  # a driver is not told of nodes that join: it can only look again
