"""Which processes belong to a run, so that they can be weighed, and ended when a peer does not end them itself.

A process belongs when its environment carries the run's mark, or when one of its ancestors does: the clusters under
test start daemons that leave their parent, and some rewrite the memory that holds their environment. Only marked
processes are ever ended.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

MARK = "SHOAL_BENCH_RUN"


def processes_of(run: str) -> list[int]:
    """Ids of the living processes whose environment, or an ancestor's, says that they belong to `run`."""
    needle = f"{MARK}={run}".encode()
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        pid = int(folder.name)
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z":
                continue
            parents[pid] = int(parent)
            if needle in (folder / "environ").read_bytes().split(b"\0"):
                marked.add(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's
    return sorted(pid for pid in parents if _descends(pid, parents, marked))


def _descends(pid: int, parents: dict[int, int], marked: set[int]) -> bool:
    while pid > 1:
        if pid in marked:
            return True
        pid = parents.get(pid, 0)
    return False


def end_all(run: str, patience_s: float = 5.0) -> list[int]:
    """End what is left of `run`; returns the ids that had to be ended. Looks again until nothing appears any more.

    Python's resource trackers come last: they end by themselves when the others have, and remove their semaphores.
    """
    ended: set[int] = set()
    begin = time.monotonic()
    while (left := processes_of(run)) and time.monotonic() < begin + patience_s:
        trackers = [] if time.monotonic() > begin + patience_s / 2 else [pid for pid in left if _is_tracker(pid)]
        for pid in set(left).difference(trackers):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            ended.add(pid)
        time.sleep(0.05)
    return sorted(ended)


def _is_tracker(pid: int) -> bool:
    try:
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # ended meanwhile
