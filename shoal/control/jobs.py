"""Jobs: one per driver. A job runs while its driver is connected; what it left running (detached actors) may outlive
it.

Ids are a counter, so that they sort by age and fit into every other id. An ended job is kept as long as one of its
actors lives, because a restart needs its search path and environment, and after that in a bounded memory for people who
ask.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from shoal.control.messages import JobInfo
from shoal.control.remembered import Remembered
from shoal.objects.ids import JOB_BYTES, ActorId, JobId


class JobRecord:
    """`peer`: connection of the agent at which the driver lives. `actors`: those that are not dead."""

    __slots__ = ("actors", "info", "peer")

    def __init__(self, info: JobInfo, peer: int) -> None:
        self.info = info
        self.peer = peer
        self.actors: set[ActorId] = set()

    @property
    def running(self) -> bool:
        return self.info.ended_unix_s == 0.0


class JobTable:
    def __init__(self, max_ended: int) -> None:
        self._next = 1
        self._jobs: dict[JobId, JobRecord] = {}
        self._ended: Remembered[JobId, JobRecord] = Remembered(max_ended)

    def add(self, job: JobInfo, peer: int, *, namespace: str, node_id: bytes, unix_s: float) -> JobRecord:
        """`namespace`: used when the driver named none."""
        job_id = JobId(self._next.to_bytes(JOB_BYTES, "big"))
        self._next += 1
        info = msgspec.structs.replace(
            job,
            job_id=job_id,
            namespace=job.namespace or namespace,
            driver_node=job.driver_node or node_id,
            started_unix_s=unix_s,
            ended_unix_s=0.0,
        )
        record = self._jobs[job_id] = JobRecord(info, peer)
        return record

    def find(self, job_id: JobId) -> JobRecord | None:
        return self._jobs.get(job_id) or self._ended.find(job_id)

    def end(self, record: JobRecord, unix_s: float) -> None:
        """The driver is gone. The record moves to the memory with `settle`, when no actor of it lives."""
        record.info = msgspec.structs.replace(record.info, ended_unix_s=unix_s)

    def settle(self, record: JobRecord) -> bool:
        """Move an ended job without actors to the memory. Returns whether it moved now."""
        job_id = JobId(record.info.job_id)
        if record.running or record.actors or job_id not in self._jobs:
            return False
        del self._jobs[job_id]
        self._ended.add(job_id, record)
        return True

    def at(self, peer: int) -> list[JobRecord]:
        """Running jobs whose driver lives at this agent."""
        return [record for record in self._jobs.values() if record.peer == peer and record.running]

    def running(self) -> list[JobRecord]:
        return [record for record in self._jobs.values() if record.running]

    def __iter__(self) -> Iterator[JobRecord]:
        """All that are known, by age."""
        return iter(sorted((*self._ended.values(), *self._jobs.values()), key=lambda record: record.info.job_id))
