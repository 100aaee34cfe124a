"""What every worker script shares: the command line, the clock, and the lines of JSON that the coordinator reads.

Lines start with a mark, because the libraries under test print to the same stream. A workload announces itself before
it runs: when its process hangs or dies, the coordinator knows which one to blame and goes on with the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import processes
from processes import processes_of
from workloads import BY_NAME

MARK = "@bench "
Run = Callable[["Timing"], float]


class Timing:
    """How long and how often to measure; `quick` gives a rough answer in a tenth of the time."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.warm_up_s = 0.1 if quick else 0.5
        self.sample_s = 0.2 if quick else 1.0
        self.samples = 1 if quick else 2

    def rate(self, call: Callable[[], Any], operations_per_call: float = 1) -> float:
        """Operations per second of `call`, the median of the samples. Ray's method, shorter: warm up, then whole
        samples."""
        once, begin, took = 0, time.perf_counter(), 0.0
        while once == 0 or took < self.warm_up_s:
            call()
            once += 1
            took = time.perf_counter() - begin
        if once == 1 and took > 5 * self.sample_s:
            return operations_per_call / took  # one call alone is longer than all samples should be
        batch = max(1, once // 10)
        return statistics.median(self._sample(call, batch) for _ in range(self.samples)) * operations_per_call

    def _sample(self, call: Callable[[], Any], batch: int) -> float:
        done, start = 0, time.perf_counter()
        while True:
            for _ in range(batch):
                call()
            done += batch
            elapsed = time.perf_counter() - start
            if elapsed >= self.sample_s:
                return done / elapsed


def memcpy_rate(timing: Timing, size_bytes: int) -> float:
    """GB/s of a copy between two buffers of this process that have been touched before."""
    source, target = bytearray(size_bytes), bytearray(size_bytes)
    source[:] = target[:] = b"x" * size_bytes
    view = memoryview(target)

    def copy() -> None:
        view[:] = source

    return timing.rate(copy, size_bytes / 1e9)


# ----------------------------------------------------------------------------------------------------------- processes


def private_mb(pid: int) -> float:
    """Memory that would come back if the process ended, in MB (10^6)."""
    return sum(kb for name, kb in _smaps(pid) if name in ("Private_Clean", "Private_Dirty")) * 1024 / 1e6


def proportional_mb(pid: int) -> float:
    """The process's memory with shared pages split among those who share them, in MB (10^6)."""
    return sum(kb for name, kb in _smaps(pid) if name == "Pss") * 1024 / 1e6


def _smaps(pid: int) -> Iterator[tuple[str, int]]:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return  # ended since it was listed
    for line in text.splitlines()[1:]:
        name, kb, *_ = line.split()
        yield name.rstrip(":"), int(kb)


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used, user and system."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / 100  # USER_HZ


def cluster_pids() -> list[int]:
    """Every process of the cluster that this worker started, without the worker itself."""
    return [pid for pid in processes_of(os.environ[processes.MARK]) if pid != os.getpid()]


# --------------------------------------------------------------------------------------------------------------- main


def main(workloads: Mapping[str, Run], cluster: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
    """Run what the command line names, in order; those that are not `fresh` share what `cluster()` starts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    if arguments.list:
        emit(event="list", names=list(workloads))
        return
    timing = Timing(arguments.quick)
    fresh = any(BY_NAME[name].fresh for name in arguments.names)
    with nullcontext() if fresh else cluster():
        for name in arguments.names:
            emit(event="start", name=name)
            try:
                value = workloads[name](timing)
            except Exception as error:
                traceback.print_exc()
                emit(event="failed", name=name, reason=f"{type(error).__name__}: {error}".splitlines()[0][:200])
            else:
                emit(event="value", name=name, value=value)
            gc.collect()
    emit(event="done")


def emit(**fields: Any) -> None:
    """Tell the coordinator."""
    print(f"\n{MARK}{json.dumps(fields)}", flush=True)
