"""ActorPool, as_completed, map_unordered, Queue and the executor on a real cluster."""

from __future__ import annotations

import asyncio
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, wait
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import ActorDiedError, TaskCancelledError
from shoal.util import ActorPool, ShoalExecutor, as_completed, map_unordered, wait_for_nodes
from shoal.util.queue import Empty, Full, Queue

pytestmark = pytest.mark.usefixtures("local")


@shoal.remote
def square(x: int) -> int:
    if x < 0:
        raise ValueError(f"{x} is negative")
    return x * x


@shoal.remote
class Gate:
    """Holds calls until somebody opens it."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def let_in(self) -> None:
        self.open.set()

    async def pass_through(self, value: Any) -> Any:
        await self.open.wait()
        return value


@shoal.remote
class Worker:
    def double(self, x: int) -> int:
        if x < 0:
            raise ValueError(f"{x} is negative")
        return 2 * x

    def passed(self, gate: Any, value: Any) -> Any:
        return shoal.get(gate.pass_through.remote(value))


# ------------------------------------------------------------------------------------------------------ as they come


def test_as_completed_gives_each_value_once_as_it_comes() -> None:
    gate = Gate.remote()
    late = gate.pass_through.remote("late")
    results = as_completed([late, *(square.remote(i) for i in range(100))])
    assert sorted(islice(results, 100)) == [i * i for i in range(100)]
    shoal.get(gate.let_in.remote())
    assert list(results) == ["late"]
    assert list(as_completed([])) == []


def test_as_completed_gives_references_and_raises_what_a_task_raised() -> None:
    refs = [square.remote(3), square.remote(4)]
    assert set(as_completed(refs, yield_obj_refs=True)) == set(refs)
    bad = square.remote(-1)
    results = as_completed([*refs, bad], chunk_size=3)
    with pytest.raises(ValueError, match="-1 is negative"):
        list(results)
    with pytest.raises(ValueError, match="each reference once"):
        as_completed([bad, bad])
    with pytest.raises(TypeError, match="takes references, not 3"):
        as_completed([3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="chunk_size is 1 or more"):
        as_completed(refs, chunk_size=0)


def test_map_unordered_reads_an_endless_iterable_only_as_far_as_it_is_used() -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for number in count():
            read.append(number)
            yield number

    results = map_unordered(square, numbers(), backpressure_size=8, chunk_size=2)
    assert len(set(islice(results, 50))) == 50
    assert len(read) <= 50 + 8
    assert sorted(map_unordered(square, range(200))) == [i * i for i in range(200)]
    assert list(map_unordered(square, [])) == []
    with pytest.raises(TypeError, match=r"write remote\(fn\)"):
        map_unordered(len, [[1]])


def test_ten_thousand_results_as_they_come_cost_no_more_than_a_get() -> None:
    assert sum(as_completed([square.remote(1) for _ in range(10_000)])) == 10_000


def test_a_task_that_waits_for_results_as_they_come_lends_its_cpu() -> None:
    @shoal.remote
    def outer() -> int:
        return sum(as_completed([square.remote(i) for i in range(5)])) + sum(map_unordered(square, range(5)))

    assert shoal.get([outer.remote() for _ in range(4)]) == [60] * 4


# --------------------------------------------------------------------------------------------------------- ActorPool


def test_an_actor_pool_maps_in_order_and_as_they_come() -> None:
    pool = ActorPool([Worker.remote() for _ in range(2)])
    assert list(pool.map(lambda a, v: a.double.remote(v), range(20))) == [2 * i for i in range(20)]
    assert sorted(pool.map_unordered(lambda a, v: a.double.remote(v), range(20))) == [2 * i for i in range(20)]
    assert not pool.has_next()
    with pytest.raises(StopIteration):
        pool.get_next()
    with pytest.raises(StopIteration):
        pool.get_next_unordered()


def test_an_actor_pool_goes_on_after_an_error_and_mixes_both_orders() -> None:
    pool = ActorPool([Worker.remote()])
    for value in (1, -2, 3, 4):
        pool.submit(lambda a, v: a.double.remote(v), value)
    assert pool.get_next() == 2
    with pytest.raises(ValueError, match="-2 is negative"):
        pool.get_next_unordered()
    assert (pool.get_next(), pool.get_next()) == (6, 8)


def test_an_actor_pool_with_late_results() -> None:
    gate = Gate.remote()
    pool = ActorPool([Worker.remote(), Worker.remote()])
    for name in ("a", "b", "c"):
        pool.submit(lambda a, v: a.passed.remote(gate, v), name)
    assert not pool.has_free()
    with pytest.raises(TimeoutError):
        pool.get_next(timeout=0.01)
    with pytest.raises(TimeoutError, match="given up"):
        pool.get_next(timeout=0, ignore_if_timedout=True)
    shoal.get(gate.let_in.remote())
    assert (pool.get_next(), pool.get_next()) == ("b", "c")
    assert not pool.has_next()


def test_one_late_result_does_not_hold_up_the_others() -> None:
    gate = Gate.remote()
    pool = ActorPool([Worker.remote(), Worker.remote()])
    pool.submit(lambda a, v: a.passed.remote(gate, v), "late")
    for value in range(50):
        pool.submit(lambda a, v: a.double.remote(v), value)
    assert sorted(pool.get_next_unordered() for _ in range(50)) == [2 * i for i in range(50)]
    shoal.get(gate.let_in.remote())
    assert pool.get_next() == "late"


def test_actors_leave_and_join_a_pool() -> None:
    first, second = Worker.remote(), Worker.remote()
    pool = ActorPool([first])
    assert pool.pop_idle() == first
    assert pool.pop_idle() is None
    pool.submit(lambda a, v: a.double.remote(v), 4)
    with pytest.raises(ValueError, match="no actor"):
        pool.get_next()
    pool.push(second)
    with pytest.raises(ValueError, match="already"):
        pool.push(second)
    assert pool.get_next() == 8
    assert pool.has_free()


# ------------------------------------------------------------------------------------------------------------- Queue


def test_a_queue_is_first_in_first_out_and_bounded() -> None:
    q = Queue(maxsize=2)
    assert (len(q), q.empty(), q.full()) == (0, True, False)
    q.put(1)
    q.put_nowait(None)
    assert (q.qsize(), q.size(), q.empty(), q.full()) == (2, 2, False, True)
    with pytest.raises(queue.Full):
        q.put(3, timeout=0.01)
    with pytest.raises(Full):
        q.put(3, block=False)
    assert (q.get(), q.get_nowait()) == (1, None)
    with pytest.raises(queue.Empty):
        q.get(timeout=0)
    with pytest.raises(Empty):
        q.get(block=False)
    with pytest.raises(ValueError, match="timeout"):
        q.get(timeout=-1)
    q.shutdown()
    with pytest.raises(ActorDiedError):
        q.size()


def test_batches_go_in_and_come_out_whole_or_not_at_all() -> None:
    q = Queue(3)
    q.put_nowait_batch([1, 2])
    with pytest.raises(Full, match="room for 1 items, not for 2"):
        q.put_nowait_batch([3, 4])
    with pytest.raises(Empty, match="has 2 items, not 3"):
        q.get_nowait_batch(3)
    assert q.get_nowait_batch(2) == [1, 2]
    assert q.get_nowait_batch(0) == []
    q.shutdown(force=True)


def test_a_queue_joins_tasks_threads_and_coroutines() -> None:
    q, back = Queue(4), Queue(actor_options={"num_cpus": 0})

    @shoal.remote
    def produce(q: Queue, n: int) -> None:
        for i in range(n):
            q.put(i)
        q.put("end")

    @shoal.remote
    def consume(q: Queue, back: Queue) -> None:
        while (item := q.get()) != "end":
            back.put(item)

    shoal.get([produce.remote(q, 20), consume.remote(q, back)])
    assert back.get_nowait_batch(20) == list(range(20))

    async def both() -> Any:
        waiting = asyncio.create_task(back.get_async())
        await back.put_async("x")
        with pytest.raises(Empty):
            await back.get_async(timeout=0.01)
        with pytest.raises(Empty):
            await back.get_async(block=False)
        return await waiting

    assert asyncio.run(both()) == "x"


# ---------------------------------------------------------------------------------------------------------- executor

PROGRAM = """
import shoal
from shoal.util import ShoalExecutor
from shoal.util.multiprocessing import Pool

def slow_power(x, y):
    import time
    time.sleep(0.1)
    return x ** y

if __name__ == "__main__":
    shoal.init(num_cpus=1)
    pool = Pool(1)
    print("mapped", sum(pool.map(abs, range(1000))))
    unread = pool.imap(abs, range(100000))
    future = ShoalExecutor().submit(slow_power, 2, 10)
    future.add_done_callback(lambda done: print("future", done.result(), flush=True))
"""


def test_an_executor_runs_functions_of_every_kind() -> None:
    factor = 3
    with ShoalExecutor() as executor:
        assert executor.submit(pow, 2, 10).result() == 1024
        assert executor.submit(lambda x, *, y: x * y * factor, 2, y=5).result() == 30
        assert executor.submit(int, "7").result() == 7
        assert isinstance(executor.submit(pow, 2).exception(), TypeError)
        assert isinstance(executor.submit(lambda x: x, threading.Lock()).exception(), Exception)
        assert list(executor.map(pow, range(100), [2] * 100)) == [i * i for i in range(100)]
        assert list(executor.map(pow, range(100), [2] * 100, chunksize=7)) == [i * i for i in range(100)]
        with pytest.raises(ZeroDivisionError):
            list(executor.map(lambda x: 1 // x, [1, 0], chunksize=2))
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(pow, [1], [2], chunksize=0)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(pow, 1, 1)


def test_what_waits_in_an_executor_can_be_cancelled_and_what_runs_cannot() -> None:
    gate = Gate.remote()
    executor = ShoalExecutor(max_workers=1)
    running = executor.submit(lambda: shoal.get(gate.pass_through.remote(1)))
    waiting, last = executor.submit(pow, 2, 2), executor.submit(pow, 2, 3)
    called: list[Any] = []
    last.add_done_callback(called.append)
    assert (running.running(), running.cancel(), waiting.cancel()) == (True, False, True)
    with pytest.raises(TimeoutError):
        last.result(timeout=0.01)
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        last.result()
    assert called == [last]
    shoal.get(gate.let_in.remote())
    assert running.result() == 1
    executor.shutdown()
    assert wait([running, waiting, last]).not_done == set()


def test_an_executor_never_runs_more_than_it_has_workers(tmp_path: Path) -> None:
    def alone() -> bool:
        mark = tmp_path / "running"
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return False
        mark.unlink()
        return True

    with ShoalExecutor(1) as executor:
        assert all(future.result() for future in [executor.submit(alone) for _ in range(50)])


def test_a_callback_of_a_future_may_submit_and_wait() -> None:
    with ShoalExecutor(2) as executor:
        done = threading.Event()
        seen: list[int] = []

        def go_on(future: Any) -> None:
            seen.append(shoal.get(square.remote(future.result())))
            executor.submit(pow, 1, 1).add_done_callback(lambda _: done.set())

        executor.submit(pow, 3, 1).add_done_callback(go_on)
        assert done.wait(20)
        assert seen == [9]


def test_an_executor_that_is_dropped_finishes_what_it_was_given() -> None:
    futures = [ShoalExecutor(1).submit(pow, 2, i) for i in range(3)]
    assert [future.result() for future in futures] == [1, 2, 4]


def test_terminated_workers_are_interrupted() -> None:
    gate = Gate.remote()
    executor = ShoalExecutor(1)
    running = executor.submit(lambda: shoal.get(gate.pass_through.remote(1)))
    waiting = executor.submit(pow, 2, 2)
    executor.terminate_workers()
    with pytest.raises(TaskCancelledError):
        running.result(timeout=30)
    assert waiting.cancelled()


def test_an_event_loop_uses_an_executor() -> None:
    async def both() -> list[int]:
        loop = asyncio.get_running_loop()
        with ShoalExecutor() as executor:
            return await asyncio.gather(*(loop.run_in_executor(executor, pow, 2, i) for i in range(20)))

    assert asyncio.run(both()) == [2**i for i in range(20)]


def test_a_program_ends_after_its_futures_and_with_open_pools(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROGRAM)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "mapped 499500\nfuture 1024\n"


CUT_OFF = """
import shoal
from shoal.util import ShoalExecutor, as_completed
from shoal.util.multiprocessing import Pool
from shoal.util.queue import Queue

shoal.init(num_cpus=2)
never = Queue()
executor, pool = ShoalExecutor(), Pool(1)
future, result = executor.submit(never.get), pool.apply_async(never.get)
items, values = pool.imap(never.get, [True, True]), as_completed([never.actor.get.remote(None)])
shoal.shutdown()
for wait in (future.result, result.get, lambda: next(items), lambda: next(values)):
    try:
        print(wait())
    except Exception as exc:
        print(type(exc).__name__)
executor.shutdown()
pool.terminate()
pool.join()
print(shoal.is_initialized())
"""


def test_what_waits_when_the_cluster_goes_fails_and_starts_no_other(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CUT_OFF)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=50, check=False)
    print(ended.stderr)
    assert ended.stdout.split() == [*["LocalAgentDiedError"] * 4, "False"]


def test_waiting_for_nodes() -> None:
    wait_for_nodes(1)
    with pytest.raises(TimeoutError, match="2 nodes to be alive; 1 are"):
        wait_for_nodes(2, timeout=0)
