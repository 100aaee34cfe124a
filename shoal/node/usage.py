"""How much of a node each job uses, and the slots for work that needs next to no resources. Pure.

Two accounts beside the resources themselves (`resource_books`), of leases only:

- What jobs use decides whose turn it is. A lease counts by the resource that it takes most of, as a share of the node;
  one that is blocked does not count, since others may use what it lends.
- Light work (`resources.is_light`) would get a worker for each task. It takes a slot instead; one that blocks lends its
  slot, and one that runs for long frees its own and makes room for one more. So short tasks share a few workers, and
  tasks that wait for each other in ways that nobody sees still all get one.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal.scheduling.policy import share_of
from shoal.scheduling.resources import light_slots
from shoal.scheduling.views import Amounts


class Use:
    """By one lease."""

    __slots__ = ("blocked", "job_id", "light", "share", "slow")

    def __init__(self, job_id: bytes, share: int, light: bool) -> None:
        self.job_id = job_id
        self.share = share  # of the node, in millionths
        self.light = light
        self.blocked = False
        self.slow = False  # one of its calls ran for long

    def slots(self) -> int:
        """What it takes of the slots; -1: it makes room for one more."""
        if not self.light or self.blocked:
            return 0
        return -1 if self.slow else 1


class Usage:
    """All uses of a node that has `total`. `free_slots` may be negative: what was lent is taken back at once."""

    __slots__ = ("_by_job", "_total", "free_slots")

    def __init__(self, total: Amounts) -> None:
        self._total = total
        self._by_job: dict[bytes, int] = {}
        self.free_slots = light_slots(total)

    def of(self, job_id: bytes) -> int:
        """The sum of the job's shares, in millionths of the node."""
        return self._by_job.get(job_id, 0)

    def begin(self, job_id: bytes, demand: Amounts, *, light: bool) -> Use:
        use = Use(job_id, share_of(demand, self._total), light)
        self._count(use, 1)
        return use

    def end(self, use: Use) -> None:
        """It must not be used again."""
        self._count(use, -1)

    def set_blocked(self, use: Use, blocked: bool) -> None:
        """Saying it again changes nothing."""
        self._count(use, -1)
        use.blocked = blocked
        self._count(use, 1)

    def set_slow(self, use: Use) -> None:
        """A call under it has run for long."""
        self._count(use, -1)
        use.slow = True
        self._count(use, 1)

    def _count(self, use: Use, sign: int) -> None:
        self.free_slots -= sign * use.slots()
        if use.blocked:
            return
        total = self._by_job.get(use.job_id, 0) + sign * use.share
        if total:
            self._by_job[use.job_id] = total
        else:
            self._by_job.pop(use.job_id, None)

    def check(self, uses: Iterable[Use]) -> None:
        """Raises AssertionError unless `uses`, all there are, explain the accounts."""
        uses = list(uses)
        by_job: dict[bytes, int] = {}
        for use in uses:
            if not use.blocked:
                by_job[use.job_id] = by_job.get(use.job_id, 0) + use.share
        assert by_job == self._by_job, "what jobs use does not add up"
        slots = light_slots(self._total) - sum(use.slots() for use in uses)
        assert slots == self.free_slots, "the slots for light work do not add up"
