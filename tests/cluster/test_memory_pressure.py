"""A node that is short of memory ends a worker, says why, and runs its task again.

The node's limit is set just above what the machine uses now, so that a task which takes real memory passes it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import shoal
from shoal.cluster_utils import Cluster
from shoal.exceptions import OutOfMemoryError
from shoal.node.memory_watch import read_usage

TAKEN = 2 << 30
SPARE = 700 << 20


def connect(make_cluster: Callable[..., Cluster]) -> None:
    usage = read_usage()
    if usage.total - usage.used < 2 * TAKEN:
        pytest.skip("this machine has too little free memory for this test")
    limit = (usage.used + SPARE) / usage.total
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 2, "memory_threshold": limit})
    shoal.init(cluster.address)


def eat(path: str, size: int) -> int:
    """Take memory and hold it, the first time; later ones find that somebody did."""
    marker = Path(path)
    if marker.exists():
        return 1
    marker.touch()
    held = bytearray(b"x") * size
    with open(path + ".never") as file:  # a pipe without a writer: waits until the process is ended
        file.read()
    return len(held)


def hold(path: Path) -> str:
    import os

    os.mkfifo(str(path) + ".never")
    return str(path)


def test_a_task_that_must_not_run_again_gets_the_error_with_the_table(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    connect(make_cluster)
    task = shoal.remote(max_retries=0)(eat)
    with pytest.raises(OutOfMemoryError, match=r"about to run out of memory(.|\n)*eat  <- ended"):
        shoal.get(task.remote(hold(tmp_path / "one"), TAKEN), timeout=40)


def test_another_is_run_again_although_it_has_no_retries_to_spare(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    connect(make_cluster)
    task = shoal.remote(max_retries=1)(eat)
    assert shoal.get(task.remote(hold(tmp_path / "one"), TAKEN), timeout=50) == 1


def test_one_that_waits_to_be_tried_again_can_be_cancelled(
    make_cluster: Callable[..., Cluster], tmp_path: Path
) -> None:
    connect(make_cluster)

    @shoal.remote
    def always(path: str, size: int) -> None:
        with open(path, "a") as file:
            file.write("begun\n")
        held = bytearray(b"x") * size
        with open(path + ".never") as file:
            file.read()
        del held

    path = hold(tmp_path / "log")
    ref = always.remote(path, TAKEN)
    with pytest.raises(shoal.exceptions.GetTimeoutError):
        shoal.get(ref, timeout=3)
    shoal.cancel(ref)
    with pytest.raises(shoal.exceptions.TaskCancelledError):
        shoal.get(ref, timeout=20)
