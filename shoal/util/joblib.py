"""joblib's `Parallel`, and with it scikit-learn, on the cluster.

    from shoal.util.joblib import register_shoal
    register_shoal()
    with joblib.parallel_config(backend="shoal"):
        GridSearchCV(...).fit(X, y)

A batch of calls is a task. Large arrays and tables among the arguments are stored once for each `Parallel` call, not
once for each batch, and workers read them in place; so they must not be written to, as with joblib's own memory maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final

import joblib
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

from shoal.api.calls import put
from shoal.api.cluster import cluster_resources
from shoal.api.initialize import connect_if_needed
from shoal.runtime.object_ref import ObjectRef
from shoal.util.executor import ShoalExecutor

LARGE_BYTES: Final = 100 << 10
"""From here on a value goes to the object store anyway."""


def register_shoal() -> None:
    """Make "shoal" a backend that joblib knows; also under the name "ray", for programs that ask for that one."""
    for name in ("shoal", "ray"):
        joblib.register_parallel_backend(name, ShoalBackend)


register_ray = register_shoal


class ShoalBackend(AutoBatchingMixin, ParallelBackendBase):
    """What joblib asks of a backend; made by joblib, once for each `Parallel` or `parallel_config`."""

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, nesting_level: int | None = None, **options: Any) -> None:
        """`options` as given to `parallel_config`: `remote_args={...}` are options of the tasks."""
        self._remote_args = options.pop("remote_args", None) or options.pop("ray_remote_args", None) or {}
        super().__init__(nesting_level=nesting_level, **options)
        self._executor: ShoalExecutor | None = None
        self._stored: dict[int, tuple[Any, ObjectRef[Any]]] = {}

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs > 0:
            return n_jobs
        connect_if_needed()
        return max(1, int(cluster_resources().get("CPU", 1)) + 1 + n_jobs)

    def configure(self, n_jobs: int = 1, parallel: Any = None, **options: Any) -> int:
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._executor = ShoalExecutor(n_jobs, remote_args=self._remote_args)
        return n_jobs

    def start_call(self) -> None:
        self._stored.clear()

    def stop_call(self) -> None:
        self._stored.clear()

    def submit(self, func: Any, callback: Callable[[Future[Any]], None] | None = None) -> Future[Any]:
        if self._executor is None:
            raise RuntimeError("the backend has been terminated; joblib configures it anew for each Parallel")
        large: list[ObjectRef[Any]] = []
        if hasattr(func, "items"):
            func = copy.copy(func)
            func.items = [
                (
                    function,
                    tuple(self._set_aside(value, large) for value in args),
                    {name: self._set_aside(value, large) for name, value in kwargs.items()},
                )
                for function, args, kwargs in func.items
            ]
        future = self._executor.submit(_run_batch, func, *large)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def _set_aside(self, value: Any, large: list[ObjectRef[Any]]) -> Any:
        """`value` itself, or its place in `large` if it is worth being stored once for all batches."""
        if _size_bytes(value) < LARGE_BYTES:
            return value
        kept = self._stored.get(id(value))
        if kept is None:  # with the value itself, so that its id stays its own
            kept = self._stored[id(value)] = (value, put(value))
        large.append(kept[1])
        return _Large(len(large) - 1)

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        if self._executor is not None:
            self._executor.terminate_workers()
        self.terminate()
        if ensure_ready:
            self.configure(self.parallel.n_jobs, self.parallel)

    def terminate(self) -> None:
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)
        self.reset_batch_stats()


class _Large:
    """Stands in a batch for an argument that travels beside it."""

    def __init__(self, place: int) -> None:
        self.place = place


def _run_batch(batch: Any, *large: Any) -> Any:
    if large:
        batch.items = [
            (
                function,
                tuple(_fill_in(value, large) for value in args),
                {k: _fill_in(v, large) for k, v in kwargs.items()},
            )
            for function, args, kwargs in batch.items
        ]
    return batch()


def _fill_in(value: Any, large: tuple[Any, ...]) -> Any:
    return large[value.place] if type(value) is _Large else value


def _size_bytes(value: Any) -> int:
    """Of arrays, sparse matrices and tables; 0 for anything else."""
    size: Any = getattr(value, "nbytes", None)
    if size is None and hasattr(value, "memory_usage"):  # a table of pandas
        size = value.memory_usage().sum()
    elif size is None:  # a sparse matrix
        size = getattr(getattr(value, "data", None), "nbytes", None)
    return int(size) if hasattr(size, "__index__") else 0
