"""What a program measures about itself: `Counter`, `Gauge`, `Histogram`, in drivers, tasks and actors.

    requests = Counter("requests", description="handled so far", tag_keys=("route",))
    requests.inc(tags={"route": "/index"})

Recording adds to a dictionary of this process, about a microsecond. What has gathered there is told to the head node at
most every two seconds, and when the process leaves. The head adds up counters and histograms over all processes, and
keeps the last value of each process's gauges while that process lives. `snapshot()` reads what it has.
"""

from __future__ import annotations

import math
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from shoal.api.initialize import connected
from shoal.control.messages import MetricRow
from shoal.runtime import slot

__all__ = ["Counter", "Gauge", "Histogram", "Metric", "Sample", "snapshot"]

REPORT_EVERY_S: Final = 2.0
FIRST_REPORT_S: Final = 0.05
"""After the first value for a while: those that come with it travel with it."""
MAX_PENDING: Final = 10_000
"""Series of one process that wait for the next report; beyond that, values of new ones are lost."""

_Tags = tuple[str, ...]


class _Recorder:
    """What this process has recorded since its last report: (metric, tag values) -> value, or [sum, buckets]."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: dict[tuple[Metric, _Tags], Any] = {}
        self._due = False  # a report will come and take what is pending
        self._reported_at = -math.inf

    def add(self, metric: Metric, tags: _Tags, value: float) -> None:
        key = metric, tags
        with self._lock:
            pending = self._pending
            if key in pending:
                pending[key] = metric._merge(pending[key], value)
            elif len(pending) < MAX_PENDING:
                pending[key] = metric._merge(None, value)
            if self._due:
                return
            runtime = slot.current
            if runtime is None:  # they wait for a connection, and the first value after it
                return
            self._due = True
            wait_s = max(FIRST_REPORT_S, self._reported_at + REPORT_EVERY_S - time.monotonic())
        runtime.report_later(wait_s, self.take)

    def take(self) -> list[MetricRow]:
        with self._lock:
            taken, self._pending = self._pending, {}
            self._due = False
            self._reported_at = time.monotonic()
        return [metric._row(tags, value) for (metric, tags), value in taken.items()]


_recorder = _Recorder()


def _after_fork_in_child() -> None:
    global _recorder
    _recorder = _Recorder()  # what was pending is the parent's to report


os.register_at_fork(after_in_child=_after_fork_in_child)


class Metric:
    """A name with tags; use `Counter`, `Gauge` or `Histogram`.

    Args:
        name: what it is exported as.
        tag_keys: the names of its tags. Each value recorded gives all of them, or has a default for them.
    """

    _kind = ""

    def __init__(self, name: str, description: str = "", tag_keys: Sequence[str] | None = None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"the name of a metric is a string, not {name!r}")
        if not name:
            raise ValueError("the name of a metric is not empty")
        if not isinstance(description, str):
            raise TypeError(f"the description of metric {name} is a string, not {description!r}")
        if isinstance(tag_keys, str) or not all(isinstance(key, str) for key in tag_keys or ()):
            raise TypeError(f"tag_keys of metric {name} is a tuple of strings, not {tag_keys!r}")
        self._name = name
        self._description = description
        self._tag_keys = tuple(tag_keys or ())
        self._default_tags: dict[str, str] = {}

    @property
    def info(self) -> dict[str, Any]:
        """name, description, tag_keys, default_tags."""
        return {
            "name": self._name,
            "description": self._description,
            "tag_keys": self._tag_keys,
            "default_tags": dict(self._default_tags),
        }

    def set_default_tags(self, default_tags: Mapping[str, str]) -> Metric:
        """Values of tags for records that do not give them; replaces earlier ones. Returns the metric itself.

        Raises:
            ValueError: a tag that the metric does not have. TypeError: a value that is no string.
        """
        self._default_tags = self._check_tags(default_tags)
        return self

    def _check_tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        for key, value in tags.items():
            if key not in self._tag_keys:
                known = ", ".join(self._tag_keys) or "no tags"
                raise ValueError(f"metric {self._name} has no tag {key!r}; it has {known}")
            if not isinstance(value, str):
                raise TypeError(f"tag {key!r} of metric {self._name} is a string, not {value!r}")
        return dict(tags)

    def _record(self, value: float, tags: Mapping[str, str] | None) -> None:
        if not self._tag_keys and not tags:
            _recorder.add(self, (), value)
            return
        given = {**self._default_tags, **self._check_tags(tags or {})}
        missing = [key for key in self._tag_keys if key not in given]
        if missing:
            raise ValueError(f"metric {self._name} needs a value for its tag {missing[0]!r}; give tags={{...}}")
        _recorder.add(self, tuple(given[key] for key in self._tag_keys), value)

    def _merge(self, before: Any, value: float) -> Any:
        raise NotImplementedError

    def _row(self, tags: _Tags, value: Any) -> MetricRow:
        named = dict(zip(self._tag_keys, tags, strict=True))
        return MetricRow(self._kind, self._name, self._description, named, float(value))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._arguments(), {"_default_tags": self._default_tags}

    def _arguments(self) -> tuple[Any, ...]:
        return self._name, self._description, self._tag_keys

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._name!r})"


def _number(metric: Metric, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            return float(value)  # numpy's numbers
        except (TypeError, ValueError):
            raise TypeError(f"metric {metric._name} takes a number, not {value!r}") from None
    return value


class Counter(Metric):
    """A sum that only grows."""

    _kind = "counter"

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Add `value`, which is above 0.

        Raises:
            ValueError: it is not; or a tag is missing or does not exist.
        """
        number = _number(self, value)
        if not 0 < number < math.inf:
            raise ValueError(f"counter {self._name} grows by numbers above 0, not by {value!r}")
        self._record(number, tags)

    def _merge(self, before: Any, value: float) -> Any:
        return value if before is None else before + value


class Gauge(Metric):
    """The newest value, of each process."""

    _kind = "gauge"

    def set(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Raises: ValueError: a tag is missing or does not exist."""
        self._record(_number(self, value), tags)

    def _merge(self, before: Any, value: float) -> Any:
        return value


class Histogram(Metric):
    """How many values lie between boundaries.

    Args:
        boundaries: upper ends of the buckets, above 0 and ascending; one more bucket is for what is above all.
    """

    _kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] | None = None,
        tag_keys: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, description, tag_keys)
        ends = [_number(self, end) for end in boundaries or ()]
        if not ends:
            raise ValueError(f"histogram {name} needs boundaries=[...], the upper ends of its buckets")
        if ends[0] <= 0 or any(low >= high for low, high in pairwise(ends)):
            raise ValueError(
                f"the boundaries of histogram {name} are above 0 and ascending, not {list(boundaries or ())}"
            )
        self._boundaries = [float(end) for end in ends]

    @property
    def info(self) -> dict[str, Any]:
        """name, description, tag_keys, default_tags, boundaries."""
        return {**super().info, "boundaries": list(self._boundaries)}

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """Raises: ValueError: a tag is missing or does not exist."""
        self._record(_number(self, value), tags)

    def _merge(self, before: Any, value: float) -> Any:
        entry: list[Any] = [0.0, [0] * (len(self._boundaries) + 1)] if before is None else before
        entry[0] += value
        entry[1][bisect_left(self._boundaries, value)] += 1
        return entry

    def _row(self, tags: _Tags, value: Any) -> MetricRow:
        named = dict(zip(self._tag_keys, tags, strict=True))
        return MetricRow(self._kind, self._name, self._description, named, value[0], self._boundaries, value[1])

    def _arguments(self) -> tuple[Any, ...]:
        return self._name, self._description, self._boundaries, self._tag_keys


class Sample(NamedTuple):
    """One series. `value`: the sum of a counter or histogram, a gauge's newest value; `buckets` of a histogram: how
    many values were at most each of `boundaries` and above the one before, and last those above all."""

    kind: str
    name: str
    tags: dict[str, str]
    value: float
    boundaries: list[float]
    buckets: list[int]
    worker_id: str  # hex, of a gauge


def snapshot() -> list[Sample]:
    """What the head knows of all metrics of the cluster: this process's up to now, others' up to their last report.

    Raises:
        ShoalSystemError: not connected.
    """
    rows = connected("snapshot()").list_metrics()
    return [
        Sample(row.kind, row.name, row.tags, row.value, row.boundaries, row.buckets, row.worker_id.hex())
        for row in rows
    ]
