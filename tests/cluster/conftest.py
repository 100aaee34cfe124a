"""Fixtures of tests that run real processes, and the check that they leave nothing behind."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import shoal
from shoal import session
from shoal.api.initialize import ClusterContext
from shoal.cluster_utils import Cluster


@pytest.fixture(scope="session", autouse=True)
def private_folder() -> Iterator[Path]:
    """All nodes of this test session live in a folder of its own, and none may outlive it."""
    with tempfile.TemporaryDirectory(prefix="shoal-test-") as folder:
        before = os.environ.get("SHOAL_TMPDIR")
        os.environ["SHOAL_TMPDIR"] = folder
        try:
            yield Path(folder)
        finally:
            left = wait_until(lambda: not descendants_of_nodes(folder), 10.0)
            if before is None:
                del os.environ["SHOAL_TMPDIR"]
            else:
                os.environ["SHOAL_TMPDIR"] = before
            assert left, f"processes outlived the tests: {descendants_of_nodes(folder)}"
            assert not session.live_nodes(Path(folder)), "nodes outlived the tests"


def descendants_of_nodes(folder: str) -> list[str]:
    """Command names of live processes whose environment names `folder` (nodes, their workers, drivers of tests)."""
    found = []
    needle = f"SHOAL_TMPDIR={folder}".encode()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = Path(entry.path, "environ").read_bytes()
            state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
            if needle in environment and state != "Z":
                found.append(f"{entry.name} {Path(entry.path, 'comm').read_text().strip()}")
        except OSError:
            continue  # it ended meanwhile, or is not ours
    return found


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Look until `condition()` holds; False when it never did within `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def local() -> Iterator[ClusterContext]:
    """A local cluster with two CPUs, shared by the tests of a module."""
    with shoal.init(num_cpus=2, num_gpus=0, object_store_memory=256 << 20, resources={"special": 2}) as context:
        yield context
    gc.collect()


@pytest.fixture
def make_cluster() -> Iterator[Callable[..., Cluster]]:
    """Makes clusters of several real nodes; all are shut down at the end of the test, and so is the driver."""
    made: list[Cluster] = []

    def make(**options: object) -> Cluster:
        made.append(Cluster(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    shoal.shutdown()
    for cluster in made:
        cluster.shutdown()
