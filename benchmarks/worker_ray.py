"""Shoal and Ray: one file, since the API is the same. `worker_ray.py shoal ...` and `worker_ray.py ray ...` differ in
one import.

The bodies follow Ray's own microbenchmark (`ray microbenchmark`), with smaller batches where two cores and a minute
are all there is; the counts are equal for both, except where a comment says why not.
"""

from __future__ import annotations

import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import worker
from workloads import GIB, MIB

API = sys.argv.pop(1) if __name__ == "__main__" else "shoal"
CALLERS = 4
TARGETS = max(2, (os.cpu_count() or 2) // 2)
QUEUED = 100_000
STREAMED = 5_000

ray: Any = importlib.import_module(API)


# ------------------------------------------------------------------------------------------------------ what is called


@ray.remote
def no_op() -> bytes:
    return b"ok"


@ray.remote
def echo(value: Any) -> Any:
    return value


@ray.remote
def make_array(size_bytes: int) -> Any:
    return np.ones(size_bytes // 8)


@ray.remote
def make_refs(count: int) -> list[Any]:
    return [ray.put(1) for _ in range(count)]


@ray.remote
def fib(n: int) -> int:
    return n if n < 2 else sum(ray.get([fib.remote(n - 1), fib.remote(n - 2)]))


@ray.remote
def call_all(targets: list[Any], calls: int) -> None:
    ray.get([targets[i % len(targets)].no_op.remote() for i in range(calls)])


@ray.remote
def hold(path: str) -> None:
    while Path(path).exists():
        time.sleep(0.05)


@ray.remote
def count(n: int) -> Iterator[int]:
    for i in range(n):  # noqa: UP028 - Ray fails at `yield from range(n)`
        yield i


@ray.remote(num_cpus=0)
class Actor:
    def no_op(self) -> bytes:
        return b"ok"

    def pid(self) -> int:
        return os.getpid()

    def submit_tasks(self, count: int) -> None:
        ray.get([no_op.remote() for _ in range(count)])

    def put_many(self, count: int) -> None:
        for _ in range(count):
            ray.put(0)


@ray.remote(num_cpus=0)
class AsyncActor:
    async def no_op(self) -> bytes:
        return b"ok"

    async def echo(self, value: Any) -> Any:
        return value

    async def count(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i


@ray.remote(num_cpus=0)
class Caller:
    def __init__(self, targets: list[Any]) -> None:
        self.targets = targets

    def call_all(self, calls: int) -> None:
        ray.get([target.no_op.remote() for _ in range(calls) for target in self.targets])


# ------------------------------------------------------------------------------------------------------------ clusters


@contextmanager
def cluster(**options: Any) -> Iterator[None]:
    ray.init(logging_level="error", **options)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def actors(cls: Any, count: int = 1, **options: Any) -> Iterator[list[Any]]:
    """Actors that have answered once, and are gone afterwards."""
    made = [(cls.options(**options) if options else cls).remote() for _ in range(count)]
    try:
        ray.get([actor.no_op.remote() for actor in made])
        yield made
    finally:
        for actor in made:
            ray.kill(actor)


# --------------------------------------------------------------------------------------------------------------- start


def import_time(_: worker.Timing) -> float:
    """Seconds, the interpreter's own start not counted; the second import, so that byte code is there."""
    use = f"from {API} import get, init, put, remote, wait"  # not the bare module, which may put its own imports off
    program = f"import time; start = time.perf_counter(); {use}; print(time.perf_counter() - start)"
    return [float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(2)][-1]


def start_to_first_result(_: worker.Timing) -> float:
    begin = time.perf_counter()
    with cluster():
        ray.get(no_op.remote())
        return time.perf_counter() - begin


# --------------------------------------------------------------------------------------------------------------- tasks


def tasks_sync(timing: worker.Timing) -> float:
    return timing.rate(lambda: ray.get(no_op.remote()))


def tasks_async(timing: worker.Timing) -> float:
    return timing.rate(lambda: ray.get([no_op.remote() for _ in range(1000)]), 1000)


def tasks_map(timing: worker.Timing) -> float:
    return timing.rate(lambda: ray.get([echo.remote(i) for i in range(10_000)]), 10_000)


def tasks_batch(timing: worker.Timing) -> float:
    def batch() -> None:
        ray.get([no_op.remote() for _ in range(1000)])

    return timing.rate(batch)


def tasks_multi(timing: worker.Timing) -> float:
    with actors(Actor, CALLERS) as callers:
        return timing.rate(lambda: ray.get([a.submit_tasks.remote(2500) for a in callers]), CALLERS * 2500)


def read_stream(stream: Any) -> None:
    for ref in stream:
        ray.get(ref)


def task_stream(timing: worker.Timing) -> float:
    return timing.rate(lambda: read_stream(count.remote(STREAMED)), STREAMED)


def fibonacci(_: worker.Timing) -> float:
    begin = time.perf_counter()
    assert ray.get(fib.remote(12)) == 144
    return time.perf_counter() - begin


# -------------------------------------------------------------------------------------------------------------- actors


def one_to_one(cls: Any, pipelined: bool, **options: Any) -> worker.Run:
    def run(timing: worker.Timing) -> float:
        with actors(cls, **options) as (actor,):
            if pipelined:
                return timing.rate(lambda: ray.get([actor.no_op.remote() for _ in range(1000)]), 1000)
            return timing.rate(lambda: ray.get(actor.no_op.remote()))

    return run


def async_with_args(timing: worker.Timing) -> float:
    with actors(AsyncActor) as (actor,):
        return timing.rate(lambda: ray.get([actor.echo.remote(i) for i in range(1000)]), 1000)


def async_stream(timing: worker.Timing) -> float:
    with actors(AsyncActor) as (actor,):
        return timing.rate(lambda: read_stream(actor.count.remote(STREAMED)), STREAMED)


def one_to_many(timing: worker.Timing) -> float:
    with actors(Actor, TARGETS) as targets:
        caller = Caller.remote(targets)
        rate = timing.rate(lambda: ray.get(caller.call_all.remote(2500)), 2500 * TARGETS)
        ray.kill(caller)
        return rate


def many_to_many(timing: worker.Timing) -> float:
    with actors(Actor, TARGETS) as targets:
        return timing.rate(lambda: ray.get([call_all.remote(targets, 2500) for _ in range(CALLERS)]), CALLERS * 2500)


def new_actors(timing: worker.Timing) -> float:
    # 200 of Ray's workers need 18 GB and a minute; the rate is the same for fewer.
    count = 16 if API == "ray" else 200
    with cluster():
        ray.get(no_op.remote())
        begin = time.perf_counter()
        with actors(Actor, count):
            return count / (time.perf_counter() - begin)


# ------------------------------------------------------------------------------------------------------------- objects


def get_calls(timing: worker.Timing) -> float:
    ref = ray.put(0)
    return timing.rate(lambda: ray.get(ref))


def put_calls(timing: worker.Timing) -> float:
    return timing.rate(lambda: ray.put(0))


def put_calls_multi(timing: worker.Timing) -> float:
    with actors(Actor, CALLERS) as callers:
        return timing.rate(lambda: ray.get([a.put_many.remote(250) for a in callers]), CALLERS * 250)


def put_gigabytes(timing: worker.Timing) -> float:
    array = np.ones(100 * MIB // 8)
    return timing.rate(lambda: ray.put(array), 100 * MIB / 1e9)


def put_versus_memcpy(timing: worker.Timing) -> float:
    copied = worker.memcpy_rate(timing, 100 * MIB)
    return 100 * put_gigabytes(timing) / copied


def large_get(timing: worker.Timing) -> float:
    """Microseconds, median of the first gets of several objects."""
    taken = []
    for _ in range(3 if timing.quick else 9):
        ref = make_array.remote(64 * MIB)
        ray.wait([ref])
        begin = time.perf_counter()
        value = ray.get(ref)
        taken.append(time.perf_counter() - begin)
        assert value[-1] == 1
        del value, ref
    return statistics.median(taken) * 1e6


def wait_refs(timing: worker.Timing) -> float:
    def wait_one_by_one() -> None:
        left = [no_op.remote() for _ in range(1000)]
        first = True
        while left:  # fetching is asked for once, as in Ray's microbenchmark
            _, left = ray.wait(left, fetch_local=first)
            first = False

    return timing.rate(wait_one_by_one)


def get_refs(timing: worker.Timing) -> float:
    ref = make_refs.remote(10_000)
    return timing.rate(lambda: ray.get(ref))


def placement_groups(timing: worker.Timing) -> float:
    util = importlib.import_module(f"{API}.util")

    def create_and_remove() -> None:
        groups = [util.placement_group([{"CPU": 0.01}]) for _ in range(100)]
        for group in groups:
            assert group.wait(30)
        for group in groups:
            util.remove_placement_group(group)

    return timing.rate(create_and_remove, 100)


# -------------------------------------------------------------------------------------------------------------- weight


def worker_memory(_: worker.Timing) -> float:
    with cluster(), actors(Actor) as (actor,):
        pid = ray.get(actor.pid.remote())
        time.sleep(1.0)
        return worker.private_mb(pid)


def cluster_memory(_: worker.Timing) -> float:
    with cluster():
        ray.get(no_op.remote())
        time.sleep(3.0)
        return sum(map(worker.proportional_mb, worker.cluster_pids()))


def cluster_cpu(_: worker.Timing) -> float:
    with cluster():
        ray.get(no_op.remote())
        time.sleep(3.0)
        pids = worker.cluster_pids()
        before = sum(map(worker.cpu_seconds, pids))
        time.sleep(5.0)
        return 100 * (sum(map(worker.cpu_seconds, pids)) - before) / 5.0


def queued_bytes(_: worker.Timing) -> float:
    cores = os.cpu_count() or 1
    with cluster(num_cpus=cores), tempfile.NamedTemporaryFile() as gate:
        ray.get([no_op.remote() for _ in range(1000)])
        holding = [hold.remote(gate.name) for _ in range(cores)]
        time.sleep(1.0)
        everyone = [os.getpid(), *worker.cluster_pids()]
        before = sum(map(worker.private_mb, everyone))
        kept = [no_op.remote() for _ in range(QUEUED)]
        time.sleep(1.0)
        grown = sum(map(worker.private_mb, everyone)) - before
        del kept, holding
        return grown * 1e6 / QUEUED


def transfer(_: worker.Timing) -> float:
    """GB/s of a get of 1 GiB that lies on the other node; the second, when memory is warm on both sides."""
    nodes = importlib.import_module(f"{API}.cluster_utils")
    store = {"object_store_memory": 3 * GIB}
    group = nodes.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **store})
    try:
        group.add_node(num_cpus=1, resources={"far": 1}, **store)
        group.wait_for_nodes()
        ray.init(address=group.address, logging_level="error")
        rate = 0.0
        for _round in range(2):
            ref = make_array.options(resources={"far": 1}).remote(GIB)
            ray.wait([ref], fetch_local=False)
            begin = time.perf_counter()
            value = ray.get(ref)
            rate = GIB / 1e9 / (time.perf_counter() - begin)
            assert value[-1] == 1
            del value, ref
            time.sleep(1.0)
        return rate
    finally:
        ray.shutdown()
        group.shutdown()


if __name__ == "__main__":
    runs: dict[str, Callable[[worker.Timing], float]] = {
        "import time": import_time,
        "start to first result": start_to_first_result,
        "single client tasks sync": tasks_sync,
        "single client tasks async": tasks_async,
        "map of 10k no-ops, chunksize=1": tasks_map,
        "single client tasks and get batch": tasks_batch,
        "multi client tasks async": tasks_multi,
        "1:1 actor calls sync": one_to_one(Actor, pipelined=False),
        "1:1 actor calls async": one_to_one(Actor, pipelined=True),
        "1:1 actor calls concurrent": one_to_one(Actor, pipelined=True, max_concurrency=16),
        "1:n actor calls async": one_to_many,
        "n:n actor calls async": many_to_many,
        "1:1 async-actor calls sync": one_to_one(AsyncActor, pipelined=False),
        "1:1 async-actor calls async": one_to_one(AsyncActor, pipelined=True),
        "1:1 async-actor calls with args async": async_with_args,
        "single client streaming generator items": task_stream,
        "1:1 async-actor streaming generator items": async_stream,
        "single client get calls": get_calls,
        "single client put calls": put_calls,
        "multi client put calls": put_calls_multi,
        "single client put gigabytes": put_gigabytes,
        "put vs memcpy": put_versus_memcpy,
        "large get latency": large_get,
        "single client wait 1k refs": wait_refs,
        "single client get object containing 10k refs": get_refs,
        "placement group create/removal": placement_groups,
        "fib(12) with a task per call": fibonacci,
        "new actors (own process)": new_actors,
        "idle worker private memory": worker_memory,
        "idle cluster total memory": cluster_memory,
        "idle cluster CPU": cluster_cpu,
        "queued tasks: bytes each (100k)": queued_bytes,
        "node-to-node transfer of 1 GiB": transfer,
    }
    worker.main(runs, cluster)
