"""Modin's DataFrame on its Ray engine, as it comes from the package index: groupby, merge and others equal pandas.

Modin imports `ray`, starts it, and runs remote functions, many of them generators with a number of returns. Here the
import hook gives it shoal.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("modin")

PROGRAM = """
import sys

import numpy as np
import pandas
from pandas.testing import assert_frame_equal

import modin.config
import modin.pandas as pd

modin.config.Engine.put("ray")
modin.config.CpuCount.put(2)

ROWS = 1_000_000
random = np.random.default_rng(7)
data = {
    "key": random.integers(0, 1000, ROWS),
    "whole": random.integers(-1000, 1000, ROWS),
    "real": random.random(ROWS),
    "word": random.choice(["red", "green", "blue"], ROWS),
}
names = {"key": np.arange(0, 1000, 2), "name": [f"n{i}" for i in range(500)]}


def compute(lib):
    left, right = lib.DataFrame(data), lib.DataFrame(names)
    joined = left.merge(right, on="key")
    yield "merge", joined
    yield "left merge", left.merge(right, on="key", how="left")
    yield "groupby", left.groupby("key").agg({"whole": "sum", "real": ["mean", "max"]})
    yield "groupby of merged", joined.groupby(["word", "name"])[["whole"]].sum()
    yield "filter and sort", left[left.whole > 900].sort_values(["key", "real"])
    yield "map", left[["whole", "real"]].abs().describe()
    yield "concat", lib.concat([left.head(10), left.tail(10)])


for (name, wanted), (_, have) in zip(compute(pandas), compute(pd)):
    assert type(have).__module__.startswith("modin."), type(have)
    assert_frame_equal(have._to_pandas(), wanted)
    print(name)

import ray

assert ray.__name__ == "ray" and sys.modules["ray"].__spec__.origin == "shoal (shoal)"
assert ray.is_initialized()
"""


@pytest.mark.timeout(300)
def test_modin_gives_what_pandas_gives(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, "-m", "shoal.compat", str(script)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    computed = [line for line in done.stdout.splitlines() if not line.startswith("(")]
    assert computed == [
        "merge", "left merge", "groupby", "groupby of merged", "filter and sort", "map", "concat",
    ]  # fmt: skip
