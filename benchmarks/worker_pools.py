"""The standard library's process pools, as many workers as cores: what every Python has without installing anything.

They start by fork, the fastest way they have. They have no actors and no shared objects, so those rows stay empty.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import worker

FORK = multiprocessing.get_context("fork")
CORES = len(os.sched_getaffinity(0))
QUEUED = 100_000


def no_op(_: int = 0) -> bytes:
    return b"ok"


def hold(path: str) -> None:
    while Path(path).exists():
        time.sleep(0.05)


def queued_bytes(submit: Callable[..., Any]) -> float:
    with tempfile.NamedTemporaryFile() as gate:
        holding = [submit(hold, gate.name) for _ in range(CORES)]
        before = worker.private_mb(os.getpid())
        kept = [submit(no_op, i) for i in range(QUEUED)]
        grown = worker.private_mb(os.getpid()) - before
    del holding, kept
    return grown * 1e6 / QUEUED


# ------------------------------------------------------------------------------------------------- concurrent.futures


class Futures:
    pool: concurrent.futures.ProcessPoolExecutor

    @contextmanager
    def running(self) -> Iterator[None]:
        with concurrent.futures.ProcessPoolExecutor(CORES, mp_context=FORK) as self.pool:
            yield

    def start(self, _: worker.Timing) -> float:
        begin = time.perf_counter()
        with self.running():
            self.pool.submit(no_op).result()
            return time.perf_counter() - begin

    def sync(self, timing: worker.Timing) -> float:
        return timing.rate(lambda: self.pool.submit(no_op).result())

    def all_at_once(self, timing: worker.Timing) -> float:
        def call() -> None:
            for future in [self.pool.submit(no_op) for _ in range(1000)]:
                future.result()

        return timing.rate(call, 1000)

    def map(self, timing: worker.Timing) -> float:
        return timing.rate(lambda: list(self.pool.map(no_op, range(10_000))), 10_000)

    def queued(self, _: worker.Timing) -> float:
        with self.running():
            size = queued_bytes(self.pool.submit)
            self.pool.shutdown(cancel_futures=True)
            return size


# --------------------------------------------------------------------------------------------- multiprocessing.Pool


class Pool:
    pool: Any

    @contextmanager
    def running(self) -> Iterator[None]:
        with FORK.Pool(CORES) as self.pool:
            yield

    def submit(self, function: Callable[..., Any], *arguments: Any) -> AsyncResult[Any]:
        result: AsyncResult[Any] = self.pool.apply_async(function, arguments)
        return result

    def start(self, _: worker.Timing) -> float:
        begin = time.perf_counter()
        with self.running():
            self.pool.apply(no_op)
            return time.perf_counter() - begin

    def sync(self, timing: worker.Timing) -> float:
        return timing.rate(lambda: self.pool.apply(no_op))

    def all_at_once(self, timing: worker.Timing) -> float:
        def call() -> None:
            for result in [self.pool.apply_async(no_op) for _ in range(1000)]:
                result.get()

        return timing.rate(call, 1000)

    def map(self, timing: worker.Timing) -> float:
        return timing.rate(lambda: self.pool.map(no_op, range(10_000), chunksize=1), 10_000)

    def queued(self, _: worker.Timing) -> float:
        with self.running():
            return queued_bytes(self.submit)


if __name__ == "__main__":
    which = sys.argv.pop(1)
    peer: Futures | Pool = Futures() if which == "futures" else Pool()
    worker.main(
        {
            "start to first result": peer.start,
            "single client tasks sync": peer.sync,
            "single client tasks async": peer.all_at_once,
            "map of 10k no-ops, chunksize=1": peer.map,
            "queued tasks: bytes each (100k)": peer.queued,
        },
        peer.running,
    )
