"""Dask (distributed) with a local cluster: one single-threaded worker process per core, no dashboard.

Its actors live inside a worker and have no process of their own, and its values lie in its workers' heaps, so several
rows stay empty. A rate that needs no result kept is measured with `pure=False`, as otherwise Dask runs equal calls
once.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import worker
from workloads import MIB

CORES = len(os.sched_getaffinity(0))
QUEUED = 100_000
client: Any = None


@contextmanager
def cluster() -> Iterator[None]:
    global client
    from distributed import Client

    with Client(n_workers=CORES, threads_per_worker=1, dashboard_address=None, silence_logs=50) as client:
        yield


def no_op() -> bytes:
    return b"ok"


def echo(value: Any) -> Any:
    return value


def fib(n: int) -> int:
    from distributed import get_client, rejoin, secede

    if n < 2:
        return n
    here = get_client()
    futures = [here.submit(fib, n - 1, pure=False), here.submit(fib, n - 2, pure=False)]
    secede()
    results = here.gather(futures)
    rejoin()
    return sum(results)


def hold(path: str) -> None:
    while Path(path).exists():
        time.sleep(0.05)


class Actor:
    def no_op(self) -> bytes:
        return b"ok"


# ----------------------------------------------------------------------------------------------------------- workloads


def import_time(_: worker.Timing) -> float:
    program = (
        "import time; start = time.perf_counter(); from distributed import Client; print(time.perf_counter() - start)"
    )
    return [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(2)][-1]


def start_to_first_result(_: worker.Timing) -> float:
    import distributed  # noqa: F401  (not counted, as for the others)

    begin = time.perf_counter()
    with cluster():
        client.submit(no_op).result()
        return time.perf_counter() - begin


def tasks_sync(timing: worker.Timing) -> float:
    return timing.rate(lambda: client.submit(no_op, pure=False).result())


def all_at_once(count: int) -> None:
    client.gather([client.submit(no_op, pure=False) for _ in range(count)])


def tasks_async(timing: worker.Timing) -> float:
    return timing.rate(lambda: all_at_once(1000), 1000)


def tasks_batch(timing: worker.Timing) -> float:
    return timing.rate(lambda: all_at_once(1000))


def tasks_map(timing: worker.Timing) -> float:
    return timing.rate(lambda: client.gather(client.map(echo, range(10_000), pure=False)), 10_000)


def actor_sync(timing: worker.Timing) -> float:
    actor = client.submit(Actor, actor=True).result()
    return timing.rate(lambda: actor.no_op().result())


def actor_async(timing: worker.Timing) -> float:
    actor = client.submit(Actor, actor=True).result()

    def call() -> None:
        for future in [actor.no_op() for _ in range(1000)]:
            future.result()

    return timing.rate(call, 1000)


def put_calls(timing: worker.Timing) -> float:
    return timing.rate(lambda: client.scatter(0, hash=False))


def get_calls(timing: worker.Timing) -> float:
    future = client.scatter(0)
    return timing.rate(future.result)


def put_gigabytes(timing: worker.Timing) -> float:
    array = np.ones(100 * MIB // 8)
    return timing.rate(lambda: client.scatter(array, hash=False), 100 * MIB / 1e9)


def put_versus_memcpy(timing: worker.Timing) -> float:
    copied = worker.memcpy_rate(timing, 100 * MIB)
    return 100 * put_gigabytes(timing) / copied


def large_get(timing: worker.Timing) -> float:
    from distributed import wait

    taken = []
    for _ in range(3 if timing.quick else 9):
        future = client.submit(np.ones, 64 * MIB // 8, pure=False)
        wait(future)
        begin = time.perf_counter()
        value = future.result()
        taken.append(time.perf_counter() - begin)
        assert value[-1] == 1
        del value, future
    return statistics.median(taken) * 1e6


def wait_futures(timing: worker.Timing) -> float:
    from distributed import wait

    def wait_one_by_one() -> None:
        left = [client.submit(no_op, pure=False) for _ in range(1000)]
        while left:
            left = list(wait(left, return_when="FIRST_COMPLETED").not_done)

    return timing.rate(wait_one_by_one)


def fibonacci(_: worker.Timing) -> float:
    begin = time.perf_counter()
    assert client.submit(fib, 12, pure=False).result() == 144
    return time.perf_counter() - begin


def worker_memory(_: worker.Timing) -> float:
    with cluster():
        (pid, *_) = client.run(os.getpid).values()
        time.sleep(1.0)
        return worker.private_mb(pid)


def cluster_memory(_: worker.Timing) -> float:
    with cluster():
        client.submit(no_op).result()
        time.sleep(3.0)
        return sum(map(worker.proportional_mb, worker.cluster_pids()))


def cluster_cpu(_: worker.Timing) -> float:
    with cluster():
        client.submit(no_op).result()
        time.sleep(3.0)
        pids = worker.cluster_pids()
        before = sum(map(worker.cpu_seconds, pids))
        time.sleep(5.0)
        return 100 * (sum(map(worker.cpu_seconds, pids)) - before) / 5.0


def queued_bytes(_: worker.Timing) -> float:
    with cluster(), tempfile.NamedTemporaryFile() as gate:
        all_at_once(1000)
        holding = [client.submit(hold, gate.name, pure=False) for _ in range(CORES)]
        time.sleep(1.0)
        everyone = [os.getpid(), *worker.cluster_pids()]
        before = sum(map(worker.private_mb, everyone))
        kept = [client.submit(no_op, pure=False) for _ in range(QUEUED)]
        time.sleep(1.0)
        grown = sum(map(worker.private_mb, everyone)) - before
        del kept, holding
        return grown * 1e6 / QUEUED


if __name__ == "__main__":
    worker.main(
        {
            "import time": import_time,
            "start to first result": start_to_first_result,
            "single client tasks sync": tasks_sync,
            "single client tasks async": tasks_async,
            "map of 10k no-ops, chunksize=1": tasks_map,
            "single client tasks and get batch": tasks_batch,
            "1:1 actor calls sync": actor_sync,
            "1:1 actor calls async": actor_async,
            "single client get calls": get_calls,
            "single client put calls": put_calls,
            "single client put gigabytes": put_gigabytes,
            "put vs memcpy": put_versus_memcpy,
            "large get latency": large_get,
            "single client wait 1k refs": wait_futures,
            "fib(12) with a task per call": fibonacci,
            "idle worker private memory": worker_memory,
            "idle cluster total memory": cluster_memory,
            "idle cluster CPU": cluster_cpu,
            "queued tasks: bytes each (100k)": queued_bytes,
        },
        cluster,
    )
