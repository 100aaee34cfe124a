"""scikit-learn through joblib's backend."""

from __future__ import annotations

import os
from typing import Any

import pytest

joblib = pytest.importorskip("joblib")
pytest.importorskip("sklearn")

import numpy as np
import pandas
import scipy.sparse
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV

import shoal
import shoal.util.joblib
from shoal.util.joblib import register_shoal

pytestmark = pytest.mark.usefixtures("local")


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    register_shoal()


def test_a_grid_search_finds_what_it_finds_on_joblibs_own_backend() -> None:
    features, labels = make_classification(n_samples=2000, n_features=20, random_state=7)  # 320 KB: stored once
    grid = {"C": [0.01, 0.1, 1.0, 10.0], "fit_intercept": [True, False]}

    def search(backend: str) -> Any:
        with joblib.parallel_config(backend=backend, n_jobs=2):
            return GridSearchCV(LogisticRegression(max_iter=200), grid, cv=3).fit(features, labels)

    theirs, ours = search("threading"), search("shoal")
    assert ours.best_params_ == theirs.best_params_
    np.testing.assert_array_equal(ours.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"])


def test_a_forest_is_the_same_tree_by_tree() -> None:
    features, labels = make_classification(n_samples=300, random_state=1)
    theirs = RandomForestClassifier(20, random_state=3).fit(features, labels)
    with joblib.parallel_config(backend="ray", n_jobs=-1):
        ours = RandomForestClassifier(20, random_state=3).fit(features, labels)
    np.testing.assert_array_equal(ours.predict_proba(features), theirs.predict_proba(features))


def test_calls_run_in_other_processes_in_order_and_as_a_generator() -> None:
    with joblib.parallel_config(backend="shoal", n_jobs=2):
        results = joblib.Parallel(return_as="generator")(
            joblib.delayed(lambda x: (x * x, os.getpid()))(i) for i in range(50)
        )
        squares, pids = zip(*results, strict=True)
    assert list(squares) == [i * i for i in range(50)]
    assert os.getpid() not in pids


def test_an_error_comes_out_as_itself_and_the_backend_goes_on() -> None:
    def root(x: int) -> float:
        if x < 0:
            raise ValueError(f"no root of {x}")
        return float(x**0.5)

    with joblib.parallel_config(backend="shoal", n_jobs=2):
        with pytest.raises(ValueError, match="no root of -1"):
            joblib.Parallel()(joblib.delayed(root)(x) for x in [4, -1, *range(100)])
        assert joblib.Parallel()(joblib.delayed(root)(x) for x in (4, 9)) == [2.0, 3.0]


def test_a_large_argument_is_stored_once_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[Any] = []

    def put(value: Any) -> Any:
        stored.append(value)
        return shoal.put(value)

    monkeypatch.setattr(shoal.util.joblib, "put", put)
    table = pandas.DataFrame({"x": np.arange(50_000), "y": 1.0})
    array, sparse = np.ones(50_000), scipy.sparse.random(2000, 2000, density=0.02, format="csr")
    with joblib.parallel_config(backend="shoal", n_jobs=2, remote_args={"num_cpus": 0.5}):
        call = joblib.delayed(lambda i, a, t, *, s: i + a.sum() + t.y.sum() + s.nnz)
        sums = joblib.Parallel(batch_size=1)(call(i, array, table, s=sparse) for i in range(10))
    assert sums == [i + 100_000 + sparse.nnz for i in range(10)]
    assert [type(value) for value in stored] == [np.ndarray, pandas.DataFrame, type(sparse)]


def test_nested_parallel_calls_do_not_wait_for_each_other() -> None:
    def inner(x: int) -> int:
        return x + 1

    def outer(x: int) -> int:
        return sum(joblib.Parallel(n_jobs=2)(joblib.delayed(inner)(i) for i in range(x)))

    with joblib.parallel_config(backend="shoal", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(outer)(x) for x in range(6)) == [0, 1, 3, 6, 10, 15]
