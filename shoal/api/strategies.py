"""Where a task or actor may run, as the user says it: `scheduling_strategy=`, `label_selector=`,
`fallback_strategy=`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from shoal.api.placement_group import PlacementGroup
from shoal.objects.ids import UNIQUE_BYTES
from shoal.scheduling import labels
from shoal.scheduling.views import Strategy

_DEFAULT: Final = Strategy()


class NodeAffinitySchedulingStrategy:
    """Run on one node.

    Args:
        node_id: hex, as in `nodes()` and `get_runtime_context().get_node_id()`.
        soft: when the node is gone or can never fit it, run anywhere; otherwise fail with `TaskUnschedulableError` or
            `ActorUnschedulableError`.
        _spill_on_unavailable: (soft) when the node has no room now, run anywhere instead of waiting for it.
        _fail_on_unavailable: (hard) when the node has no room now, fail instead of waiting for it.
    """

    __slots__ = ("_fail_on_unavailable", "_spill_on_unavailable", "_strategy", "node_id", "soft")

    def __init__(
        self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False
    ) -> None:
        if not isinstance(node_id, str):
            raise TypeError(f"node_id is a hex string, not {node_id!r}")
        if _spill_on_unavailable and not soft:
            raise ValueError(
                "_spill_on_unavailable=True lets it run elsewhere, which soft=False forbids; use soft=True"
            )
        if _fail_on_unavailable and soft:
            raise ValueError(
                "_fail_on_unavailable=True forbids it to run elsewhere, which soft=True allows; use soft=False"
            )
        try:
            binary = bytes.fromhex(node_id)
        except ValueError:
            raise ValueError(f"node_id is a hex string, not {node_id!r}") from None
        if len(binary) != UNIQUE_BYTES:
            raise ValueError(f"node_id has {2 * UNIQUE_BYTES} hex digits, {node_id!r} has {len(node_id)}")
        self.node_id = node_id
        self.soft = bool(soft)
        self._spill_on_unavailable = bool(_spill_on_unavailable)
        self._fail_on_unavailable = bool(_fail_on_unavailable)
        when_busy = "spill" if _spill_on_unavailable else "fail" if _fail_on_unavailable else ""
        self._strategy = Strategy("node", binary, self.soft, when_busy=when_busy)

    def __repr__(self) -> str:
        return f"NodeAffinitySchedulingStrategy({self.node_id!r}, soft={self.soft})"

    def __reduce__(self) -> tuple[type, tuple[str, bool, bool, bool]]:
        flags = self._spill_on_unavailable, self._fail_on_unavailable
        return NodeAffinitySchedulingStrategy, (self.node_id, self.soft, *flags)


class _Condition:
    """On one label, for `NodeLabelSchedulingStrategy`."""

    __slots__ = ("values",)

    def __init__(self, *values: str) -> None:
        if not values:
            raise ValueError(f"{type(self).__name__}() needs at least one value")
        self.values = list(values)

    def text(self) -> str:
        return labels.in_condition(self.values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.values))})"


class In(_Condition):
    """The label has one of these values."""


class NotIn(_Condition):
    """The label has none of these values, or is absent."""

    def text(self) -> str:
        return "!" + super().text()


class Exists(_Condition):
    """The node has the label."""

    def __init__(self) -> None:
        self.values = []

    def text(self) -> str:
        return labels.EXISTS


class DoesNotExist(Exists):
    """The node does not have the label."""

    def text(self) -> str:
        return "!" + labels.EXISTS


class NodeLabelSchedulingStrategy:
    """Run on nodes whose labels satisfy `hard`, and while there is room on such that satisfy `soft` too, on those.

    Both map names of labels to `In(...)`, `NotIn(...)`, `Exists()` or `DoesNotExist()`. The options `label_selector`
    and `fallback_strategy` say the same in fewer words.
    """

    __slots__ = ("_strategy", "hard", "soft")

    def __init__(
        self, hard: Mapping[str, _Condition] | None = None, *, soft: Mapping[str, _Condition] | None = None
    ) -> None:
        self.hard, self.soft = dict(hard or {}), dict(soft or {})
        if not self.hard and not self.soft:
            raise ValueError("NodeLabelSchedulingStrategy needs conditions in hard or soft")
        must, prefer = _selector("hard", self.hard), _selector("soft", self.soft)
        self._strategy = Strategy(labels=labels.both(must, prefer), fallbacks=[must] if prefer else [])

    def __repr__(self) -> str:
        return f"NodeLabelSchedulingStrategy({self.hard!r}, soft={self.soft!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _label_strategy, (self.hard, self.soft)


def _label_strategy(hard: dict[str, _Condition], soft: dict[str, _Condition]) -> NodeLabelSchedulingStrategy:
    return NodeLabelSchedulingStrategy(hard, soft=soft)


def _selector(which: str, conditions: Mapping[Any, Any]) -> dict[str, str]:
    selector: dict[str, str] = {}
    for key, condition in conditions.items():
        if not isinstance(condition, _Condition):
            raise ValueError(
                f"{which}[{key!r}] of NodeLabelSchedulingStrategy is In(...), NotIn(...), Exists() or DoesNotExist(), "
                f"not {condition!r}"
            )
        name = next(iter(labels.check_selector({key: labels.in_condition(condition.values or ["any"])})))
        selector[name] = condition.text()
    return selector


def to_selector(option: str, value: Any) -> dict[str, str]:
    """A checked `label_selector`. Raises: ValueError, TypeError."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"option {option!r} is a dict of label names to conditions, not {value!r}")
    try:
        return labels.check_selector(value)
    except (ValueError, TypeError) as exc:
        raise type(exc)(f"option {option!r}: {exc}") from None


def to_fallbacks(option: str, value: Any) -> list[dict[str, str]]:
    """A checked `fallback_strategy`. Raises: ValueError, TypeError."""
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"option {option!r} is a list of dicts with a 'label_selector', not {value!r}")
    selectors = []
    for entry in value:
        if not isinstance(entry, Mapping) or set(entry) != {"label_selector"}:
            raise ValueError(f"option {option!r} lists dicts with 'label_selector' and nothing else, not {entry!r}")
        selectors.append(to_selector(option, entry["label_selector"]))
    return selectors


def place(strategy: Strategy, options: Mapping[str, Any]) -> Strategy:
    """`strategy` with what the options `label_selector` and `fallback_strategy` add to it."""
    asked: dict[str, str] = options.get("label_selector") or {}
    instead: list[dict[str, str]] = options.get("fallback_strategy") or []
    if not asked and not instead:
        return strategy
    choices = [
        labels.both(theirs, ours) for ours in (asked, *instead) for theirs in (strategy.labels, *strategy.fallbacks)
    ]
    return msgspec.structs.replace(strategy, labels=choices[0], fallbacks=choices[1:])


class PlacementGroupSchedulingStrategy:
    """Run inside a placement group.

    Args:
        placement_group_bundle_index: in this bundle; -1 in any.
        placement_group_capture_child_tasks: tasks and actors that it makes run in the group too, unless they are given
            another strategy.
    """

    __slots__ = (
        "_strategy", "placement_group", "placement_group_bundle_index", "placement_group_capture_child_tasks",
    )  # fmt: skip

    def __init__(
        self,
        placement_group: PlacementGroup,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        group, index = placement_group, placement_group_bundle_index
        self._strategy = in_group(group, index, placement_group_capture_child_tasks)
        self.placement_group = group
        self.placement_group_bundle_index = index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks

    def __repr__(self) -> str:
        return f"PlacementGroupSchedulingStrategy({self.placement_group!r}, {self.placement_group_bundle_index})"

    def __reduce__(self) -> tuple[type, tuple[PlacementGroup, int, bool | None]]:
        return PlacementGroupSchedulingStrategy, (
            self.placement_group, self.placement_group_bundle_index, self.placement_group_capture_child_tasks,
        )  # fmt: skip


def in_group(group: Any, index: Any, capture: Any) -> Strategy:
    """Raises ValueError, TypeError: not a group, or no bundle of it."""
    if not isinstance(group, PlacementGroup):
        raise TypeError(f"placement_group is what placement_group() returned, not {group!r}")
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"placement_group_bundle_index is a whole number, not {index!r}")
    if capture is not None and not isinstance(capture, bool):
        raise TypeError(f"placement_group_capture_child_tasks is True, False or None, not {capture!r}")
    if group.is_empty:
        raise ValueError("this placement group is empty: it is no group that work can run in")
    count = group.known_bundle_count
    if index < -1 or (count is not None and index >= count):
        most = f"between 0 and {count - 1}" if count is not None else "0 or more"
        raise ValueError(f"placement_group_bundle_index is {most}, or -1 for any bundle, not {index}")
    return Strategy("group", group=bytes(group.id), bundle=index, capture=bool(capture))


def to_strategy(value: Any) -> Strategy:
    """What the scheduler reads for a `scheduling_strategy` option.

    Raises:
        ValueError, TypeError: it is no strategy.
    """
    if value is None or value == "DEFAULT":
        return _DEFAULT
    if value == "SPREAD":
        return Strategy("spread")
    if isinstance(
        value, NodeAffinitySchedulingStrategy | NodeLabelSchedulingStrategy | PlacementGroupSchedulingStrategy
    ):
        return value._strategy
    if isinstance(value, str):
        raise ValueError(f"scheduling_strategy is 'DEFAULT', 'SPREAD' or a strategy object, not {value!r}")
    raise TypeError(f"scheduling_strategy is 'DEFAULT', 'SPREAD' or a strategy object, not {type(value).__name__}")
