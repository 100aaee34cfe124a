"""`Pool` beside the standard library's: what holds for its pool of threads must hold for ours."""

from __future__ import annotations

import builtins
import gc
import multiprocessing
import multiprocessing.pool
import os
import pickle
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import ActorDiedError
from shoal.util import multiprocessing as shoal_multiprocessing
from shoal.util.multiprocessing import Pool
from shoal.util.queue import Queue

pytestmark = pytest.mark.usefixtures("local")


@pytest.fixture(params=["standard", "shoal"])
def pool(request: pytest.FixtureRequest) -> Iterator[Any]:
    made: Any = multiprocessing.pool.ThreadPool(2) if request.param == "standard" else Pool(2)
    with made:
        yield made


@pytest.fixture(scope="module")
def ours() -> Iterator[Pool]:
    with Pool(2) as made:
        yield made


def square(x: int, wait: float = 0.0) -> int:
    return x * x


def fail_at_three(x: int) -> int:
    if x == 3:
        raise ValueError("three")
    return x


def use_and_forget() -> int:
    value: int = Pool(1).apply_async(square, (6,)).get()
    gc.collect()
    return value


def three_numbers() -> Iterator[int]:
    yield from range(3)
    raise LookupError("no more")


def outcomes(results: Any, n: int) -> list[Any]:
    """The next `n` results, errors as their class names."""
    found: list[Any] = []
    for _ in range(n):
        try:
            found.append(next(results))
        except Exception as exc:
            found.append(next(c.__name__ for c in type(exc).__mro__ if c.__module__ == "builtins"))
    return found


# ------------------------------------------------------------------------------- as in the standard library: both pools


def test_calls(pool: Any) -> None:
    assert pool.apply(square, (5,)) == 25
    assert pool.apply(square, (), {"x": 3}) == 9
    assert pool.apply_async(square, (7, 0.0)).get() == 49
    with pytest.raises(ValueError, match="three"):
        pool.apply(fail_at_three, (3,))


@pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
def test_maps(pool: Any, chunksize: int | None) -> None:
    expected = [i * i for i in range(50)]
    assert pool.map(square, range(50), chunksize) == expected
    assert pool.map(square, iter(range(50)), chunksize) == expected
    assert pool.map_async(square, list(range(50)), chunksize).get() == expected
    assert pool.starmap(pow, [(i, 2) for i in range(50)], chunksize) == expected
    assert pool.starmap_async(pow, zip(range(50), [2] * 50, strict=True), chunksize).get() == expected
    assert list(pool.imap(square, range(50), chunksize or 1)) == expected
    assert sorted(pool.imap_unordered(square, iter(range(50)), chunksize or 1)) == expected


def test_empty_iterables(pool: Any) -> None:
    assert pool.map(square, []) == []
    assert pool.starmap(square, ()) == []
    assert list(pool.imap(square, [])) == []
    assert list(pool.imap_unordered(square, iter(()))) == []


def test_results_say_how_they_are(pool: Any) -> None:
    release = Queue() if isinstance(pool, Pool) else queue.Queue()
    result = pool.apply_async(lambda q: q.get(), (release,))
    assert not result.ready()
    result.wait(0.01)
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.01)
    release.put("x")
    assert result.get() == "x"
    assert result.ready()
    assert result.successful()
    bad = pool.apply_async(fail_at_three, (3,))
    bad.wait()
    assert not bad.successful()


def test_callbacks_come_before_get_returns(pool: Any) -> None:
    seen: list[Any] = []
    pool.apply_async(square, (2,), callback=seen.append).get()
    pool.map_async(square, range(3), callback=seen.append).get()
    pool.starmap_async(pow, [(2, 3)], callback=seen.append).get()
    assert seen == [4, [0, 1, 4], [8]]
    errors: list[Any] = []
    for result in (
        pool.apply_async(fail_at_three, (3,), callback=seen.append, error_callback=errors.append),
        pool.map_async(fail_at_three, range(5), 1, callback=seen.append, error_callback=errors.append),
    ):
        with pytest.raises(ValueError, match="three"):
            result.get()
    assert [isinstance(error, ValueError) for error in errors] == [True, True]
    assert len(seen) == 3


def test_an_error_in_the_middle(pool: Any) -> None:
    for chunksize in (1, 2, 50):
        with pytest.raises(ValueError, match="three"):
            pool.map(fail_at_three, range(20), chunksize)
    assert outcomes(pool.imap(fail_at_three, range(6)), 7) == [0, 1, 2, "ValueError", 4, 5, "StopIteration"]
    found = outcomes(pool.imap_unordered(fail_at_three, range(6)), 7)
    assert sorted(map(str, found)) == sorted(map(str, [0, 1, 2, "ValueError", 4, 5, "StopIteration"]))


def test_iterables_that_raise(pool: Any) -> None:
    with pytest.raises(LookupError):
        pool.map(square, three_numbers())
    with pytest.raises(LookupError):
        pool.starmap_async(pow, three_numbers())
    assert outcomes(pool.imap(square, three_numbers()), 5) == [0, 1, 4, "LookupError", "StopIteration"]


def test_an_iterable_may_wait_for_earlier_results(pool: Any) -> None:
    results: list[int] = []
    more = threading.Semaphore(1)

    def feedback() -> Iterator[int]:
        for i in range(5):
            assert more.acquire(timeout=20)
            yield i

    for value in pool.imap(square, feedback()):
        results.append(value)
        more.release()
    assert results == [0, 1, 4, 9, 16]


def test_next_with_a_timeout(pool: Any) -> None:
    release = Queue() if isinstance(pool, Pool) else queue.Queue()
    results = pool.imap(lambda q: q.get(), [release])
    with pytest.raises(multiprocessing.TimeoutError):
        results.next(timeout=0.01)
    release.put(1)
    assert results.next(timeout=20) == 1
    with pytest.raises(StopIteration):
        results.next(timeout=20)


def test_a_closed_pool_finishes_and_takes_no_more(pool: Any) -> None:
    with pytest.raises(ValueError, match="Pool is still running"):
        pool.join()
    result = pool.map_async(square, range(100), 1)
    unread = pool.imap(square, range(100))
    pool.close()
    for submit in (pool.map, pool.imap, pool.map_async, pool.imap_unordered):
        with pytest.raises(ValueError, match="Pool not running"):
            submit(square, [1])
    with pytest.raises(ValueError, match="Pool not running"):
        pool.apply_async(square, (1,))
    with pytest.raises(ValueError, match="Pool not running"):
        pool.__enter__()
    pool.join()
    assert result.ready()
    assert list(unread) == [i * i for i in range(100)]


@pytest.mark.parametrize("make", [multiprocessing.pool.ThreadPool, Pool])
def test_wrong_arguments(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="Number of processes must be at least 1"):
        make(0)
    with pytest.raises(TypeError, match="initializer must be a callable"):
        make(1, initializer=1)
    with make(1) as made:
        for chunksize in (0, -1):
            with pytest.raises(ValueError, match="Chunksize must be 1"):
                made.imap(square, [1], chunksize)
        with pytest.raises(NotImplementedError, match="cannot be passed between processes"):
            pickle.dumps(made)


# ------------------------------------------------------------------------------------------------------------ our own


def test_workers_are_processes_that_keep_what_the_initializer_set() -> None:
    def set_up(a: int, b: int) -> None:
        builtins.pool_state = a + b  # type: ignore[attr-defined]

    with Pool(2, set_up, (40, 2)) as pool:
        found = pool.map(lambda _: (os.getpid(), builtins.pool_state), range(40), chunksize=1)  # type: ignore[attr-defined]
    assert {state for _, state in found} == {42}
    assert os.getpid() not in {pid for pid, _ in found}
    assert len({pid for pid, _ in found}) <= 2


def test_an_initializer_that_raises_is_the_error_of_every_call() -> None:
    def set_up() -> None:
        raise OSError("no licence")

    with Pool(2, set_up) as pool:
        for _ in range(2):
            with pytest.raises(ActorDiedError, match="no licence"):
                pool.map(square, range(10))


def test_workers_are_replaced_after_maxtasksperchild_batches() -> None:
    with Pool(1, maxtasksperchild=2) as pool:
        pids = pool.map(lambda _: os.getpid(), range(6), chunksize=1)
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] == pids[5]
    with pytest.raises(ValueError, match="maxtasksperchild"):
        Pool(1, maxtasksperchild=0)


def test_a_worker_that_dies_fails_its_call_and_is_replaced(ours: Pool) -> None:
    result = ours.apply_async(lambda: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ActorDiedError):
        result.get()
    assert ours.map(square, range(10)) == [i * i for i in range(10)]


def test_no_call_waits_behind_a_long_one_while_a_worker_is_free(ours: Pool) -> None:
    ours.map(square, range(400), chunksize=1)  # so short that several are sent ahead
    gate = Queue()
    held = [ours.apply_async(gate.get) if i == 5 else ours.apply_async(square, (i,)) for i in range(100)]
    assert [result.get() for i, result in enumerate(held) if i != 5] == [i * i for i in range(100) if i != 5]
    gate.put("go")
    assert held[5].get() == "go"


def test_workers_that_find_no_place_hold_up_nothing() -> None:
    with Pool(4, remote_args={"num_cpus": 1}) as pool:  # there are two CPUs
        assert pool.map(square, range(20), chunksize=1) == [i * i for i in range(20)]


def test_terminate_fails_what_is_not_done() -> None:
    pool = Pool(1)
    gate = Queue()
    running, waiting = pool.apply_async(gate.get), pool.apply_async(square, (1,))
    results = pool.imap(square, count())
    pool.terminate()
    pool.join()
    for result in (running, waiting):
        with pytest.raises(RuntimeError, match="terminated"):
            result.get()
    with pytest.raises(RuntimeError, match="terminated"):
        list(results)
    pool.terminate()


def test_an_endless_iterable_is_read_as_results_are_taken(ours: Pool) -> None:
    results = ours.imap(square, count(), chunksize=10)
    assert list(islice(results, 30)) == [i * i for i in range(30)]


def test_chunks_of_imap_keep_what_is_beside_an_error(ours: Pool) -> None:
    assert outcomes(ours.imap(fail_at_three, range(6), 4), 7) == [0, 1, 2, "ValueError", 4, 5, "StopIteration"]
    assert outcomes(ours.imap(square, three_numbers(), 2), 5) == [0, 1, 4, "LookupError", "StopIteration"]


def test_lambdas_closures_references_and_what_cannot_be_pickled(ours: Pool) -> None:
    ref = shoal.put(5)
    assert ours.map(lambda x: x + shoal.get(ref), range(30)) == list(range(5, 35))
    with pytest.raises(Exception, match="lock"):
        ours.apply_async(square, (threading.Lock(),)).get()
    with pytest.raises(Exception, match="lock"):
        ours.apply(threading.Lock)


def test_a_callback_may_use_the_pool(ours: Pool) -> None:
    done = threading.Event()

    def again(value: int) -> None:
        ours.apply_async(square, (value,), callback=lambda value: value == 81 and done.set())

    ours.apply_async(square, (3,), callback=again)
    assert done.wait(20)


def test_a_pool_inside_a_task_and_one_that_is_forgotten(tmp_path: Path) -> None:
    @shoal.remote
    def inside() -> list[int]:
        with Pool(2) as pool:
            return pool.map(square, range(10))

    assert shoal.get([inside.remote(), inside.remote()]) == [[i * i for i in range(10)]] * 2
    with pytest.warns(ResourceWarning, match="unclosed"):
        assert use_and_forget() == 36


def test_processes_defaults_to_the_cpus_and_options_reach_the_workers() -> None:
    with Pool(ray_remote_args={"resources": {"special": 1}}) as pool:
        assert "pool_size=2" in repr(pool)
        pids = pool.map(lambda _: os.getpid(), range(8), chunksize=1)
        assert os.getpid() not in pids
    assert issubclass(shoal_multiprocessing.TimeoutError, multiprocessing.TimeoutError)
    assert issubclass(shoal_multiprocessing.TimeoutError, TimeoutError)
