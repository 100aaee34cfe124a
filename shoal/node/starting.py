"""What has its place on this node and waits for its process: pure.

Usually that lasts a millisecond and nobody needs to know. A worker that does not come up, or a constructor that takes
long, must not be a silent wait: from `SHOWN_AFTER_S` on it is a row in what the node reports.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from shoal.scheduling.views import Amounts, DemandReport, WaitReason

SHOWN_AFTER_S: Final = 1.0
MAX_ROWS: Final = 100
"""They travel to control with each report; those that last longest stay."""


class Starting(NamedTuple):
    """A granted lease without a worker, or an actor whose constructor has not returned."""

    name: str
    resources: Amounts
    job_id: bytes
    since_unix_s: float
    text: str  # completes "waiting because ..."


def reports(starting: Iterable[Starting], now_unix_s: float) -> list[DemandReport]:
    """Rows for those that take long, summed over what a person would not tell apart, the longest first."""
    rows: dict[tuple[object, ...], DemandReport] = {}
    for one in sorted(starting, key=lambda one: one.since_unix_s):
        if now_unix_s - one.since_unix_s < SHOWN_AFTER_S:
            break
        key = (one.name, one.job_id, one.text, tuple(sorted(one.resources.items())))
        row = rows.get(key)
        count, since = (1, one.since_unix_s) if row is None else (row.count + 1, row.since_unix_s)
        reason = WaitReason("worker_starting", one.text)
        rows[key] = DemandReport(one.name, dict(one.resources), count, reason, since, one.job_id)
        if len(rows) >= MAX_ROWS:
            break
    return list(rows.values())
