"""Dask on the cluster, compared with its scheduler of threads."""

from __future__ import annotations

import os
from typing import Any

import pytest

dask = pytest.importorskip("dask")
pytest.importorskip("dask.array")

import dask.array as da
import numpy as np
from dask.callbacks import Callback
from dask.delayed import delayed
from dask.diagnostics import ProgressBar

import shoal
from shoal.util.dask import disable_dask_on_shoal, enable_dask_on_shoal, ray_dask_get, shoal_dask_get

pytestmark = pytest.mark.usefixtures("local")


def fail_at_17(block: Any) -> Any:
    if 17 in block:
        raise LookupError("block 17")
    return block


def test_an_array_computation_gives_what_threads_give() -> None:
    x = da.random.default_rng(5).normal(size=(1200, 1000), chunks=(300, 250))
    centred = x - x.mean(axis=0)
    wanted = [(centred.T @ centred) / len(x), da.linalg.norm(x, axis=1), x.cumsum(axis=0)[-1], da.median(x, axis=1)]
    theirs = dask.compute(*wanted, scheduler="threads")
    with enable_dask_on_shoal():
        ours = dask.compute(*wanted)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_delayed_functions_run_in_other_processes_and_share_what_they_have_in_common() -> None:
    @delayed
    def load(name: str) -> list[Any]:
        return [name, os.getpid()]

    @delayed
    def join(parts: list[list[Any]], *, sep: str) -> tuple[str, set[int], bool]:
        return sep.join(part[0] for part in parts), {part[1] for part in parts}, parts[0] is parts[-1]

    shared = load("a")
    with dask.config.set(scheduler=shoal_dask_get):
        text, pids, same = join([shared, load("b"), shared], sep="-").compute()
    assert (text, same) == ("a-b-a", True)
    assert os.getpid() not in pids


def test_graphs_in_dasks_older_notation() -> None:
    def fail() -> None:
        raise AssertionError("nobody asked for it")

    graph = {"a": 1, ("b", 0): (sum, ["a", "a", 3]), "c": ("b", 0), "d": ["a", "c"], "e": (len, "d"), "f": (fail,)}
    assert shoal_dask_get(graph, "e") == 2
    assert ray_dask_get(graph, [["a", ("b", 0)], "c", "d"]) == ((1, 5), 5, [1, 5])


def test_an_error_comes_out_as_itself() -> None:
    x = da.from_array(np.arange(40), chunks=4)
    with enable_dask_on_shoal(), pytest.raises(LookupError, match="block 17"):
        x.map_blocks(fail_at_17).sum().compute()
    assert x.sum().compute(scheduler=shoal_dask_get) == sum(range(40))


def test_progress_bars_and_other_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[Any] = []
    x = da.ones(100, chunks=10)
    with Callback(posttask=lambda key, *_: ended.append(key)), ProgressBar():
        assert x.sum().compute(scheduler=shoal_dask_get) == 100
    assert len(ended) >= 10
    assert "100%" in capsys.readouterr().out


def test_annotations_are_options_of_tasks() -> None:
    def cpus() -> float:
        return shoal.get_runtime_context().get_assigned_resources()["CPU"]

    with dask.annotate(ray_remote_args={"num_cpus": 2}):
        two = delayed(cpus)()
    assert delayed(lambda a, b: (a, b))(two, delayed(cpus)()).compute(scheduler=shoal_dask_get) == (2, 1)


def test_enabling_lasts_until_disabled() -> None:
    try:
        enable_dask_on_shoal()
        assert dask.config.get("scheduler") is shoal_dask_get
        assert delayed(os.getpid)().compute() != os.getpid()
    finally:
        disable_dask_on_shoal()
    assert delayed(os.getpid)().compute() == os.getpid()
