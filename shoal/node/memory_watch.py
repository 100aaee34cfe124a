"""Ending a worker before the kernel ends something worse.

When a machine or container runs out of memory, the kernel kills whichever process it likes, often the agent or the
user's driver, after minutes of thrashing. So the agent looks at what is free four times a second, and ends the worker
whose loss costs least: one that is idle, else the newest that may be tried again, of the owner that has most workers
(that owner gets on with the others, and what is newest has done least). Whoever waits for it is told why, with a table
of the biggest workers.

Reading is two small files of the kernel; workers are looked at only when memory is short.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

logger = logging.getLogger(__name__)

WATCH_S: Final = 0.25
PAUSE_S: Final = 2.0
"""After ending a worker: the kernel needs a moment to take its memory back; another victim would be one too many."""
WORTH_BYTES: Final = 32 << 20
"""Ending an idle worker that holds less changes nothing."""
BIGGEST: Final = 10

_CGROUP_V2: Final = Path("/sys/fs/cgroup")
_CGROUP_V1: Final = Path("/sys/fs/cgroup/memory")


class Usage(NamedTuple):
    """Memory in bytes; `where` is "this machine" or "this container", whichever is nearer to its end."""

    used: int
    total: int
    where: str

    @property
    def share(self) -> float:
        return self.used / self.total


class WorkerMemory(NamedTuple):
    """What ending this worker would give and cost.

    Attributes:
        group: who would lose it: the owner of its lease, or the creator of its actor; b"" for an idle worker.
        began: when it was given its work, on any clock; the newest has the greatest.
        retriable: its work may be tried again.
    """

    worker_id: bytes
    pid: int
    name: str
    group: bytes
    size_bytes: int
    began: float
    retriable: bool


def choose_victim(workers: Sequence[WorkerMemory]) -> WorkerMemory | None:
    """Whose end costs least; None when there is nobody."""
    idle = [worker for worker in workers if not worker.group and worker.size_bytes >= WORTH_BYTES]
    if idle:
        return max(idle, key=lambda worker: worker.size_bytes)
    busy = [worker for worker in workers if worker.group]
    candidates = [worker for worker in busy if worker.retriable] or busy
    if not candidates:
        return None
    groups: dict[bytes, list[WorkerMemory]] = {}
    for worker in candidates:
        groups.setdefault(worker.group, []).append(worker)
    biggest = max(groups.values(), key=lambda group: (len(group), sum(worker.size_bytes for worker in group)))
    return max(biggest, key=lambda worker: (worker.began, worker.worker_id))


def explain(usage: Usage, limit: float, victim: WorkerMemory, workers: Sequence[WorkerMemory]) -> str:
    """What the user reads in the task's error."""
    rows = sorted(workers, key=lambda worker: -worker.size_bytes)[:BIGGEST]
    table = "\n".join(
        f"    {_size(worker.size_bytes):>10}  pid {worker.pid:<8} {worker.name or '(idle)'}"
        + ("  <- ended" if worker is victim else "")
        for worker in rows
    )
    return (
        f"{usage.where} was about to run out of memory ({_size(usage.used)} of {_size(usage.total)} in use, "
        f"{usage.share:.0%}; workers are ended at {limit:.0%}). The biggest workers were\n{table}\n"
        "Ask for fewer at a time (num_cpus=, memory=), make each smaller, or raise --memory-usage-threshold"
    )


class MemoryWatch:
    """The shell: looks, and has a worker ended.

    Args:
        limit: share of the memory in use at which a worker is ended; 1.0 or more never does.
        workers: those there are now; called when memory is short.
        end: (worker id, why).
    """

    def __init__(
        self, limit: float, workers: Callable[[], list[WorkerMemory]], end: Callable[[bytes, str], None]
    ) -> None:
        self._limit = limit
        self._workers = workers
        self._end = end

    async def run(self) -> None:
        """Until it is cancelled."""
        if self._limit >= 1.0:
            return
        try:
            read_usage()
        except (OSError, KeyError, ValueError) as exc:
            logger.warning("nobody ends workers when memory gets short: this system does not tell how much is: %s", exc)
            return
        pause_s = WATCH_S
        while True:  # the kernel's own signals of pressure come too late, and containers rarely have them
            await asyncio.sleep(pause_s)
            pause_s = PAUSE_S if self._look() else WATCH_S

    def _look(self) -> bool:
        """Whether a worker was ended."""
        usage = read_usage()
        if usage.share < self._limit:
            return False
        workers = self._workers()
        victim = choose_victim(workers)
        if victim is None:
            return False
        text = explain(usage, self._limit, victim, workers)
        logger.warning("ended worker=%s pid=%s: %s", victim.worker_id.hex()[:12], victim.pid, text)
        self._end(victim.worker_id, text)
        return True


def read_usage() -> Usage:
    """How much is in use now. Raises OSError where the kernel does not tell."""
    machine = _machine()
    container = _container(machine.total)
    return container if container is not None and container.share > machine.share else machine


def private_bytes(pid: int) -> int:
    """Memory of one process that it shares with nobody; 0 when it is gone."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:
        return 0
    return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")


def _machine() -> Usage:
    found: dict[str, int] = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if name in ("MemTotal", "MemAvailable"):
                found[name] = int(rest.split()[0]) * 1024
                if len(found) == 2:
                    break
    return Usage(found["MemTotal"] - found["MemAvailable"], found["MemTotal"], "this machine")


def _container(most: int) -> Usage | None:
    """None without a limit below `most`. What the kernel can drop at once (files that nobody used lately) is free."""
    for folder, limit, usage, inactive in (
        (_CGROUP_V2, "memory.max", "memory.current", "inactive_file"),
        (_CGROUP_V1, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            total = (folder / limit).read_text().strip()
            if total == "max" or int(total) >= most:
                continue
            used = int((folder / usage).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        return Usage(max(0, used - int(statistics.get(inactive, 0))), int(total), "this container")
    return None


def _size(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
