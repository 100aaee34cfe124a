"""Where a task or actor may run, as the user says it (`scheduling_strategy=`)."""

from __future__ import annotations

from typing import Any, Final

from shoal.api.words import not_supported
from shoal.objects.ids import UNIQUE_BYTES
from shoal.scheduling.views import Strategy

_DEFAULT: Final = Strategy()


class NodeAffinitySchedulingStrategy:
    """Run on one node.

    Args:
        node_id: hex, as in `nodes()` and `get_runtime_context().get_node_id()`.
        soft: when the node is gone or can never fit it, run anywhere instead of failing.
    """

    __slots__ = ("_strategy", "node_id", "soft")

    def __init__(
        self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False
    ) -> None:
        if not isinstance(node_id, str):
            raise TypeError(f"node_id is a hex string, not {node_id!r}")
        if _spill_on_unavailable or _fail_on_unavailable:
            raise not_supported("_spill_on_unavailable and _fail_on_unavailable")
        try:
            binary = bytes.fromhex(node_id)
        except ValueError:
            raise ValueError(f"node_id is a hex string, not {node_id!r}") from None
        if len(binary) != UNIQUE_BYTES:
            raise ValueError(f"node_id has {2 * UNIQUE_BYTES} hex digits, {node_id!r} has {len(node_id)}")
        self.node_id = node_id
        self.soft = bool(soft)
        self._strategy = Strategy("node", binary, self.soft)

    def __repr__(self) -> str:
        return f"NodeAffinitySchedulingStrategy({self.node_id!r}, soft={self.soft})"

    def __reduce__(self) -> tuple[type, tuple[str, bool]]:
        return NodeAffinitySchedulingStrategy, (self.node_id, self.soft)


def to_strategy(value: Any) -> Strategy:
    """What the scheduler reads for a `scheduling_strategy` option.

    Raises:
        ValueError, TypeError: it is no strategy. NotImplementedError: not one that shoal has yet.
    """
    if value is None or value == "DEFAULT":
        return _DEFAULT
    if value == "SPREAD":
        return Strategy("spread")
    if isinstance(value, NodeAffinitySchedulingStrategy):
        return value._strategy
    if isinstance(value, str):
        raise ValueError(f"scheduling_strategy is 'DEFAULT', 'SPREAD' or a strategy object, not {value!r}")
    if type(value).__name__ in ("PlacementGroupSchedulingStrategy", "NodeLabelSchedulingStrategy"):
        raise not_supported(type(value).__name__)
    raise TypeError(f"scheduling_strategy is 'DEFAULT', 'SPREAD' or a strategy object, not {type(value).__name__}")
