"""What is measured: the names, units and goals that every peer's worker and the report share.

Names are those of Ray's microbenchmark wherever it has the workload, so that its published numbers can be laid beside
ours. A worker script defines a function for each workload that its peer can do; where it has none, the report shows a
dash.

A `fresh` workload gets a process and a cluster of its own, because it measures starting, or needs a quiet or special
cluster. The others of a peer share one process and one cluster in each round, as in a real program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1024 * 1024
GIB: Final = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Workload:
    """One row of the table.

    Attributes:
        unit: of the values that workers report. more_is_better: False for times and sizes. goal: a bound in `unit`
        that shoal should reach (at least, or at most), None where the goal is relative or absent.
        versus: (peer, factor): shoal should be that many times better than the peer in the same run.
        yardstick: (name, fraction): shoal should reach that fraction of what the bare machine does.
        limit_s: a peer that takes longer is stopped and its cell says so.
    """

    name: str
    unit: str
    more_is_better: bool = True
    fresh: bool = False
    goal: float | None = None
    versus: tuple[str, float] | None = None
    yardstick: tuple[str, float] | None = None
    limit_s: float = 60.0
    about: str = ""


PING_PONG: Final = "bare socket ping-pong"
MEMCPY: Final = "memcpy into warm memory"
TCP_COPY: Final = "bare TCP copy of 1 GiB"

YARDSTICKS: Final = (
    Workload(PING_PONG, "/s", about="two Python processes, a 100-byte message there and back"),
    Workload(MEMCPY, "GB/s", about="100 MiB, both sides touched before"),
    Workload(TCP_COPY, "GB/s", about="two processes over loopback, warm buffers on both sides"),
)

WORKLOADS: Final = (
    Workload(
        "import time",
        "s",
        more_is_better=False,
        fresh=True,
        goal=0.1,
        about="of the functions that a program needs, in a fresh interpreter",
    ),
    Workload(
        "start to first result",
        "s",
        more_is_better=False,
        fresh=True,
        goal=0.35,
        about="init() to the first task's result",
    ),
    Workload(
        "single client tasks sync",
        "/s",
        versus=("ray", 8),
        yardstick=(PING_PONG, 1 / 1.5),
        about="one no-op task at a time",
    ),
    Workload("single client tasks async", "/s", goal=50_000, versus=("ray", 25), about="1,000 no-op tasks all at once"),
    Workload(
        "map of 10k no-ops, chunksize=1",
        "/s",
        goal=50_000,
        versus=("mp.Pool", 1),
        about="10,000 no-op tasks with an argument each, all at once",
    ),
    Workload("single client tasks and get batch", "/s", about="batches of 1,000 tasks, each with its get"),
    Workload("multi client tasks async", "/s", about="four actors submit 2,500 tasks each"),
    Workload("1:1 actor calls sync", "/s", versus=("ray", 8), yardstick=(PING_PONG, 1 / 1.5)),
    Workload("1:1 actor calls async", "/s", goal=80_000, versus=("ray", 15)),
    Workload("1:1 actor calls concurrent", "/s", about="max_concurrency=16"),
    Workload("1:n actor calls async", "/s", about="one actor calls two"),
    Workload("n:n actor calls async", "/s", about="four tasks call two actors"),
    Workload("1:1 async-actor calls sync", "/s"),
    Workload("1:1 async-actor calls async", "/s"),
    Workload("1:1 async-actor calls with args async", "/s"),
    Workload(
        "single client streaming generator items",
        "/s",
        goal=50_000,
        versus=("ray", 10),
        about="a task yields 5,000 numbers, each is got as it comes",
    ),
    Workload("1:1 async-actor streaming generator items", "/s", about="the same from an async generator method"),
    Workload("single client get calls", "/s", goal=300_000, about="of one small put object"),
    Workload("single client put calls", "/s", goal=300_000, versus=("ray", 100), about="of the number 0"),
    Workload("multi client put calls", "/s", about="ten tasks put 100 numbers each"),
    Workload("single client put gigabytes", "GB/s", yardstick=(MEMCPY, 0.9), about="a numpy array of 100 MiB"),
    Workload("put vs memcpy", "%", goal=90, about="the same put, against a copy into warm memory by the same process"),
    Workload(
        "large get latency", "us", more_is_better=False, goal=100, about="first get of a 64 MiB array that a task made"
    ),
    Workload("single client wait 1k refs", "/s", about="submit 1,000 tasks, wait for them one by one"),
    Workload("single client get object containing 10k refs", "/s"),
    Workload(
        "placement group create/removal",
        "/s",
        versus=("ray", 10),
        about="one client makes 100 groups of one bundle, waits until each is ready, removes them",
    ),
    Workload(
        "fib(12) with a task per call",
        "s",
        more_is_better=False,
        goal=1.0,
        limit_s=90.0,
        about="465 tasks that wait for others",
    ),
    Workload(
        "new actors (own process)",
        "/s",
        fresh=True,
        goal=300,
        limit_s=90.0,
        about="200 at once, each answers once; Ray is asked for 16",
    ),
    Workload(
        "idle worker private memory",
        "MB",
        more_is_better=False,
        fresh=True,
        goal=10,
        about="an actor that has answered once",
    ),
    Workload(
        "idle cluster total memory",
        "MB",
        more_is_better=False,
        fresh=True,
        goal=250,
        about="proportional share of every process but the driver, 3 s after the first task",
    ),
    Workload(
        "idle cluster CPU",
        "% of a core",
        more_is_better=False,
        fresh=True,
        goal=1,
        about="every process but the driver, over 5 s",
    ),
    Workload(
        "queued tasks: bytes each (100k)",
        "bytes",
        more_is_better=False,
        fresh=True,
        goal=1536,
        limit_s=120.0,
        about="growth of the driver and the cluster's own processes while nothing can run",
    ),
    Workload(
        "node-to-node transfer of 1 GiB",
        "GB/s",
        fresh=True,
        yardstick=(TCP_COPY, 0.8),
        limit_s=120.0,
        about="two nodes on this machine; the second of two gets",
    ),
)

PEERS: Final = ("shoal", "ray", "dask", "futures", "mp.Pool")
TITLES: Final = {
    "shoal": "shoal",
    "ray": "Ray",
    "dask": "Dask",
    "futures": "concurrent.futures",
    "mp.Pool": "multiprocessing.Pool",
}
BY_NAME: Final = {workload.name: workload for workload in (*YARDSTICKS, *WORKLOADS)}
