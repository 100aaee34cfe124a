"""What users' code measures: sums over all processes, and the last word of each on its gauges.

Processes report what was added since their last report, so that a sum outlives those who contributed. A gauge belongs
to its process and goes with it. The number of series is bounded, since a tag with many values makes many: what comes
beyond is dropped, and counted.
"""

from __future__ import annotations

import logging
from typing import Final

from shoal.control.messages import MetricRow

logger = logging.getLogger(__name__)

MAX_LABEL_CHARS: Final = 4096
"""Of a name and its tags together."""

_Key = tuple[str, str, tuple[tuple[str, str], ...], tuple[float, ...], bytes]


class MetricTable:
    def __init__(self, max_series: int) -> None:
        self._max_series = max_series
        self._series: dict[_Key, MetricRow] = {}
        self._gauges: dict[tuple[int, bytes], list[_Key]] = {}  # by peer (the node) and worker id
        self.dropped = 0

    def report(self, peer: int, worker_id: bytes, rows: list[MetricRow]) -> None:
        for row in rows:
            owner = worker_id if row.kind == "gauge" else b""
            key = (row.kind, row.name, tuple(sorted(row.tags.items())), tuple(row.boundaries), owner)
            held = self._series.get(key)
            if held is None:
                if len(self._series) >= self._max_series or _label_chars(row) > MAX_LABEL_CHARS:
                    self._drop(row)
                    continue
                if owner:
                    self._gauges.setdefault((peer, owner), []).append(key)
                self._series[key] = _with(row, row.value, row.buckets, owner)
            elif row.kind == "gauge":
                self._series[key] = _with(row, row.value, [], owner)
            elif len(row.buckets) == len(held.buckets):
                buckets = [mine + more for mine, more in zip(held.buckets, row.buckets, strict=True)]
                self._series[key] = _with(row, held.value + row.value, buckets, owner)

    def process_gone(self, peer: int, worker_id: bytes) -> None:
        for key in self._gauges.pop((peer, worker_id), ()):
            del self._series[key]

    def node_gone(self, peer: int) -> None:
        for process in [process for process in self._gauges if process[0] == peer]:
            self.process_gone(*process)

    def rows(self) -> list[MetricRow]:
        """All series, by kind, name and tags."""
        return [self._series[key] for key in sorted(self._series)]

    def __len__(self) -> int:
        return len(self._series)

    def _drop(self, row: MetricRow) -> None:
        if self.dropped == 0:
            logger.warning("too many metrics (at most %s series) or too long a name: dropping name=%.100s",
                           self._max_series, row.name)  # fmt: skip
        self.dropped += 1


def _label_chars(row: MetricRow) -> int:
    return len(row.name) + len(row.description) + sum(len(key) + len(value) for key, value in row.tags.items())


def _with(row: MetricRow, value: float, buckets: list[int], owner: bytes) -> MetricRow:
    return MetricRow(row.kind, row.name, row.description, row.tags, value, row.boundaries, buckets, owner)
