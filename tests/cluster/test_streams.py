"""Generators: their items are there when they are yielded, and nobody makes what nobody can take."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal import ObjectRef, ObjectRefGenerator
from shoal.exceptions import StreamingGeneratorReplayInconsistentError, TaskCancelledError, WorkerCrashedError
from shoal.runtime import slot

pytestmark = pytest.mark.usefixtures("local")

LARGE = 200 * 1024
"""Bytes of a value that lives in the store."""


@shoal.remote
def count(n: int) -> Iterator[int]:
    yield from range(n)


@shoal.remote
def note_each(path: Path, n: int, size: int = 0) -> Iterator[Any]:
    """Notes in a file what is about to be yielded, and its own end."""
    try:
        for i in range(n):
            note(path, i)
            yield np.full(size, i % 256, np.uint8) if size else i
    finally:
        note(path, "closed")


@shoal.remote(num_cpus=2)
def both_cpus() -> int:
    return os.getpid()


@shoal.remote
class Maker:
    def __init__(self) -> None:
        self.made = 0

    def upto(self, n: int) -> Iterator[int]:
        for _ in range(n):
            self.made += 1
            yield self.made

    @shoal.method(_generator_backpressure_num_objects=2)
    def slow_reader(self, n: int) -> Iterator[int]:
        yield from range(n)

    def so_far(self) -> int:
        return self.made


@shoal.remote
class AsyncMaker:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.closed = 0

    async def upto(self, n: int) -> AsyncIterator[int]:
        for i in range(n):
            yield i

    async def gated(self) -> AsyncIterator[str]:
        try:
            yield "before"
            await self.gate.wait()
            yield "after"
            yield "more"
        finally:
            self.closed += 1

    def plain(self, n: int) -> Iterator[int]:
        yield from range(n)

    async def open(self) -> None:
        self.gate.set()

    async def closings(self) -> int:
        return self.closed


def note(path: Path, what: object) -> None:
    with path.open("a") as file:
        file.write(f"{what}\n")


def notes(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def store_used() -> int:
    runtime: Any = slot.current
    return sum(node.store_used for node in runtime.status().nodes)


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# ------------------------------------------------------------------------------------------------------------ reading


def test_items_come_in_order_and_then_it_stops() -> None:
    stream = count.remote(2000)
    assert type(stream) is ObjectRefGenerator
    assert shoal.get(stream) is stream
    assert iter(stream) is stream
    assert [shoal.get(ref) for ref in stream] == list(range(2000))
    assert stream.is_finished()
    with pytest.raises(StopIteration):
        next(stream)
    assert shoal.get(stream.completed()) is None
    assert list(count.remote(0)) == []


def test_an_item_is_there_before_the_next_one_is_made(tmp_path: Path) -> None:
    @shoal.remote
    def gated() -> Iterator[int]:
        yield 1
        wait_until((tmp_path / "go").exists, 20.0)
        yield 2

    stream = gated.remote()
    first = next(stream)
    assert shoal.get(first) == 1
    assert not stream.next_ready()
    assert not stream.is_finished()
    assert stream._next_sync(timeout=0).is_nil()
    assert stream._next_sync(timeout=0.01).is_nil()
    assert shoal.wait([stream.completed()], timeout=0)[0] == []
    (tmp_path / "go").touch()
    second = stream._next_sync(timeout=20)
    assert shoal.get(second) == 2
    assert second.task_id() == stream.task_id() == first.task_id()
    with pytest.raises(StopIteration):
        stream._next_sync(timeout=20)


def test_the_error_is_the_last_item() -> None:
    @shoal.remote
    def failing(n: int) -> Iterator[int]:
        yield from range(n)
        raise KeyError("gone")

    stream = failing.remote(3)
    refs = list(stream)
    assert shoal.get(refs[:3]) == [0, 1, 2]
    for ref in (refs[3], stream.completed()):
        with pytest.raises(KeyError, match="gone"):
            shoal.get(ref)
    assert len(refs) == 4

    @shoal.remote
    def unpicklable() -> Iterator[Any]:
        yield 1
        yield (i for i in ())

    one, error = unpicklable.remote()
    assert shoal.get(one) == 1
    with pytest.raises(TypeError, match="yielded"):
        shoal.get(error)


def test_arguments_that_failed_or_do_not_fit() -> None:
    @shoal.remote
    def broken() -> int:
        raise ValueError("no number")

    [error] = count.remote(broken.remote())
    with pytest.raises(ValueError, match="no number"):
        shoal.get(error)

    @shoal.remote(num_returns="streaming")
    def no_generator() -> list[int]:
        return [1]

    [error] = no_generator.remote()
    with pytest.raises(TypeError, match="must be a generator; it returned a list"):
        shoal.get(error)


def test_other_numbers_of_returns_of_a_generator() -> None:
    assert shoal.get(count.options(num_returns=3).remote(3)) == [0, 1, 2]
    wrong = count.options(num_returns=2).remote(3)
    with pytest.raises(ValueError, match="num_returns=2"):
        shoal.get(wrong)
    dynamic = count.options(num_returns="dynamic").remote(4)
    assert type(dynamic) is ObjectRef
    refs = shoal.get(dynamic)
    assert type(refs) is shoal.DynamicObjectRefGenerator
    assert len(refs) == 4
    assert shoal.get(list(refs)) == [0, 1, 2, 3]

    @shoal.remote
    def total(refs: shoal.DynamicObjectRefGenerator[int]) -> int:
        return sum(shoal.get(list(refs)))

    assert shoal.get(total.remote(dynamic)) == 6

    @shoal.remote(num_returns="dynamic")
    def failing() -> Iterator[int]:
        yield 1
        raise KeyError("gone")

    one, error = shoal.get(failing.remote())
    assert shoal.get(one) == 1
    with pytest.raises(KeyError):
        shoal.get(error)


def test_groups_of_items_in_one_yield() -> None:
    @shoal.remote(_num_objects_per_yield=2)
    def pairs(n: int) -> Iterator[Any]:
        for i in range(n):
            yield i, -i
        yield (1, 2, 3)

    refs = list(pairs.remote(3))
    assert shoal.get(refs[:-1]) == [0, 0, 1, -1, 2, -2]
    with pytest.raises(ValueError, match="_num_objects_per_yield=2"):
        shoal.get(refs[-1])


def test_what_a_remote_generator_cannot() -> None:
    stream = count.remote(1)
    for call in (lambda: stream.send(1), lambda: stream.throw(ValueError), stream.close):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(TypeError, match="cannot leave its process"):
        shoal.put([stream])
    with pytest.raises(TypeError, match="iterate over it"):
        shoal.get([stream])  # type: ignore[list-item]


def test_wait_takes_generators_and_references_together(tmp_path: Path) -> None:
    @shoal.remote
    def gated() -> Iterator[int]:
        wait_until((tmp_path / "go").exists, 20.0)
        yield 2

    late = gated.remote()
    ready = shoal.put(1)
    assert shoal.wait([late, ready]) == ([ready], [late])
    assert shoal.wait([late, ready], num_returns=2, timeout=0.01) == ([ready], [late])
    (tmp_path / "go").touch()
    assert shoal.wait([late, ready], num_returns=2) == ([late, ready], [])
    assert shoal.get(next(late)) == 2
    assert shoal.wait([late]) == ([late], [])  # its end is known
    assert list(late) == []
    with pytest.raises(ValueError, match="once"):
        shoal.wait([late, late])


def test_a_task_reads_a_generator_and_is_one_itself() -> None:
    @shoal.remote(num_cpus=1)
    def doubled(n: int) -> Iterator[int]:
        for ref in count.options(_generator_backpressure_num_objects=2).remote(n):
            yield 2 * shoal.get(ref)

    streams = [doubled.remote(20) for _ in range(3)]  # more than there are CPUs: those who wait lend theirs
    assert [[shoal.get(ref) for ref in stream] for stream in streams] == [list(range(0, 40, 2))] * 3


def test_an_event_loop_may_give_up_waiting(tmp_path: Path) -> None:
    @shoal.remote
    def gated() -> Iterator[int]:
        wait_until((tmp_path / "go").exists, 20.0)
        yield 2

    async def main() -> list[int]:
        stream = gated.remote()
        for _ in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(stream), 0.01)
        (tmp_path / "go").touch()
        return [await ref async for ref in stream]

    assert asyncio.run(main()) == [2]


def test_an_event_loop_reads_several_at_once() -> None:
    async def total(stream: ObjectRefGenerator[int]) -> int:
        return sum([await ref async for ref in stream])

    async def main() -> list[int]:
        return await asyncio.gather(*(total(count.remote(n)) for n in (10, 100, 1)))

    assert asyncio.run(main()) == [45, 4950, 0]


# ----------------------------------------------------------------------------------------------------- what it yields


def test_items_go_to_other_tasks_while_the_producer_runs(tmp_path: Path) -> None:
    @shoal.remote
    def gated() -> Iterator[Any]:
        yield 20
        yield np.ones(LARGE, np.uint8)
        wait_until((tmp_path / "go").exists, 20.0)
        yield shoal.put(3)

    @shoal.remote
    def size(value: Any) -> int:
        return int(np.sum(value))

    stream = gated.remote()
    assert shoal.get([size.remote(next(stream)), size.remote(next(stream))]) == [20, LARGE]
    (tmp_path / "go").touch()
    inner = shoal.get(next(stream))
    assert list(stream) == []
    assert shoal.get(size.remote(inner)) == 3


def test_references_in_items_outlive_their_maker() -> None:
    @shoal.remote(max_calls=1)
    def put_each(n: int) -> Iterator[list[ObjectRef[Any]]]:
        for i in range(n):
            yield [shoal.put(i), shoal.put(np.full(LARGE, i, np.uint8))]

    stream = put_each.remote(5)
    shoal.wait([stream.completed()])
    for i, ref in enumerate(stream):
        _, large = shoal.get(ref)
        assert shoal.get(large)[0] == i


def test_many_megabytes_of_small_items() -> None:
    """More than may be on its way unanswered."""

    @shoal.remote
    def flood(n: int) -> Iterator[bytes]:
        for i in range(n):
            yield bytes([i % 256]) * 90_000

    assert [shoal.get(ref)[-1] for ref in flood.remote(300)] == [i % 256 for i in range(300)]


def test_large_items_leave_their_maker_and_are_freed_when_read() -> None:
    @shoal.remote
    def make(n: int) -> Iterator[Any]:
        peak = 0
        for i in range(n):
            yield np.full(4 << 20, i, np.uint8)
            _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
            peak = max(peak, (resident - shared) * 4096)
        yield peak

    n = 200  # 800 MiB pass through a store of 256
    for ref in make.options(_generator_backpressure_num_objects=4).remote(n):
        last = shoal.get(ref)
    assert last < 100 << 20
    assert wait_until(lambda: store_used() < 16 << 20, 10.0)


# ------------------------------------------------------------------------------------------------- who goes on how far


def test_the_producer_pauses_at_the_limit_and_lends_its_cpus(tmp_path: Path) -> None:
    path = tmp_path / "made"
    streams = [
        note_each.options(_generator_backpressure_num_objects=3, num_cpus=1).remote(path.with_suffix(f".{k}"), 100)
        for k in range(2)
    ]
    for stream in streams:
        assert shoal.get(next(stream)) == 0
    shoal.get(both_cpus.remote())  # there is room for it when both wait
    assert wait_until(lambda: len(notes(path.with_suffix(".0"))) == 4, 10.0)
    assert shoal.get(next(streams[0])) == 1
    assert wait_until(lambda: len(notes(path.with_suffix(".0"))) == 5, 10.0)
    shoal.get(both_cpus.remote())
    assert [len(notes(path.with_suffix(f".{k}"))) for k in range(2)] == [5, 4]
    assert [shoal.get(ref) for ref in streams[1]] == list(range(1, 100))


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_a_limit_loses_nothing(limit: int) -> None:
    stream = count.options(_generator_backpressure_num_objects=limit).remote(300)
    assert [shoal.get(ref) for ref in stream] == list(range(300))


@pytest.mark.parametrize("size", [0, LARGE])
def test_a_dropped_generator_is_closed_and_its_items_are_freed(tmp_path: Path, size: int) -> None:
    path = tmp_path / "made"
    stream = note_each.options(_generator_backpressure_num_objects=10).remote(path, 1000, size)
    kept = next(stream)
    assert wait_until(lambda: len(notes(path)) == 11, 10.0)
    del stream
    gc.collect()
    assert wait_until(lambda: notes(path)[-1] == "closed", 10.0)
    assert len(notes(path)) <= 13
    assert np.all(shoal.get(kept) == 0)
    del kept
    assert wait_until(lambda: store_used() < LARGE, 10.0)


def test_a_dropped_generator_runs_to_its_end_when_that_is_awaited(tmp_path: Path) -> None:
    path = tmp_path / "made"
    done = note_each.options(_generator_backpressure_num_objects=2).remote(path, 20).completed()
    assert shoal.get(done) is None
    assert notes(path) == [*map(str, range(20)), "closed"]


def test_a_generator_dropped_before_it_began_runs_to_its_first_item(tmp_path: Path) -> None:
    @shoal.remote
    def gated() -> int:
        wait_until((tmp_path / "go").exists, 20.0)
        return 100

    path = tmp_path / "made"
    note_each.remote(path, gated.remote())
    runtime: Any = slot.current
    assert wait_until(lambda: not runtime.readers._followed, 10.0)
    (tmp_path / "go").touch()
    assert wait_until(lambda: notes(path) == ["0", "closed"], 10.0)


# ------------------------------------------------------------------------------------------------------------- actors


def test_generator_methods_keep_the_order_of_calls() -> None:
    maker = Maker.remote()
    first, between, second = maker.upto.remote(3), maker.so_far.remote(), maker.upto.remote(2)
    assert shoal.get(list(second)) == [4, 5]
    assert shoal.get(between) == 3
    assert shoal.get(list(first)) == [1, 2, 3]
    stream = maker.slow_reader.remote(10)
    after = maker.so_far.remote()
    assert shoal.get(next(stream)) == 0
    assert shoal.wait([after], timeout=0)[0] == []  # the actor's one thread is in the generator, which waits
    assert shoal.get(list(stream)) == list(range(1, 10))
    assert shoal.get(after) == 5
    assert [shoal.get(ref) for ref in shoal.get(maker.upto.options(num_returns="dynamic").remote(1))] == [6]


def test_threads_of_an_actor_pause_one_by_one() -> None:
    maker = Maker.options(max_concurrency=2).remote()
    paused = maker.slow_reader.remote(5)
    assert shoal.get(next(paused)) == 0
    assert shoal.get(list(maker.upto.remote(3))) == [1, 2, 3]
    assert shoal.get(list(paused)) == [1, 2, 3, 4]


def test_an_actor_that_restarts_goes_on_where_it_was(tmp_path: Path) -> None:
    @shoal.remote(max_restarts=1, max_task_retries=1)
    class Dying:
        def dies_once(self, path: Path, n: int, at: int) -> Iterator[int]:
            yield from dies_once(path, n, at)

    path = tmp_path / "runs"
    stream = Dying.remote().dies_once.remote(path, 20, 10)
    before = [shoal.get(next(stream)) for _ in range(10)]
    path.with_suffix(".kill").touch()
    assert before + [shoal.get(ref) for ref in stream] == list(range(20))


def test_methods_of_a_handle_that_travelled_stream_too() -> None:
    @shoal.remote
    def read(maker: Any) -> list[int]:
        return [shoal.get(ref) for ref in maker.slow_reader.remote(6)]

    assert shoal.get(read.remote(Maker.remote())) == list(range(6))


def test_async_generators_run_beside_each_other() -> None:
    maker = AsyncMaker.remote()
    gated = maker.gated.remote()
    assert shoal.get(next(gated)) == "before"
    assert shoal.get(list(maker.upto.remote(1000))) == list(range(1000))
    limited = maker.plain.options(_generator_backpressure_num_objects=1).remote(50)
    assert shoal.get(next(limited)) == 0
    shoal.get(maker.open.remote())  # the one that is paused does not hold the others up
    assert shoal.get(list(gated)) == ["after", "more"]
    assert shoal.get(list(limited)) == list(range(1, 50))
    assert shoal.get(maker.closings.remote()) == 1


def test_a_dropped_async_generator_is_closed() -> None:
    maker = AsyncMaker.options(_actor_generator_backpressure_num_objects=1).remote()
    stream = maker.gated.remote()
    assert shoal.get(next(stream)) == "before"
    shoal.get(maker.open.remote())
    assert shoal.get(next(stream)) == "after"
    del stream
    assert wait_until(lambda: shoal.get(maker.closings.remote()) == 1, 10.0)


# ----------------------------------------------------------------------------------------------------------- failures


def dies_once(path: Path, n: int, at: int, then: int = -1) -> Iterator[int]:
    """Its worker is killed before it yields `at`, once it has noted what it began; the second time `then` come."""
    again = path.exists()
    note(path, os.getpid())
    for i in range(n if not again or then < 0 else then):
        if i == at and not again:
            wait_until(path.with_suffix(".kill").exists, 20.0)
            os.kill(os.getpid(), signal.SIGKILL)
        yield i


def test_a_lost_worker_is_replaced_and_no_item_comes_twice(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    stream = shoal.remote(dies_once).remote(path, 100, 50)
    before = [shoal.get(next(stream)) for _ in range(50)]
    path.with_suffix(".kill").touch()
    assert before + [shoal.get(ref) for ref in stream] == list(range(100))
    assert len(notes(path)) == 2


def test_a_replay_that_yields_less_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    stream = shoal.remote(dies_once).remote(path, 100, 50, then=10)
    refs = [next(stream) for _ in range(50)]
    path.with_suffix(".kill").touch()
    [error] = stream
    with pytest.raises(StreamingGeneratorReplayInconsistentError, match="yielded 10 values; 50 had arrived"):
        shoal.get(error)
    assert shoal.get(refs) == list(range(50))


def test_without_retries_the_loss_is_the_last_item(tmp_path: Path) -> None:
    path = tmp_path / "runs"
    path.with_suffix(".kill").touch()
    refs = list(shoal.remote(max_retries=0)(dies_once).remote(path, 100, 3))
    with pytest.raises(WorkerCrashedError):
        shoal.get(refs[-1])
    assert shoal.get(refs[:-1]) == list(range(len(refs) - 1))


def test_a_producer_whose_owner_is_gone_stops(tmp_path: Path) -> None:
    path = tmp_path / "made"

    @shoal.remote
    class Endless:
        def numbers(self) -> Iterator[int]:
            try:
                while True:
                    yield 1
            finally:
                note(path, "closed")

    @shoal.remote(max_retries=0)
    def read_one_and_die(actor: Any) -> None:
        stream = actor.numbers.options(_generator_backpressure_num_objects=5).remote()
        shoal.get(next(stream))
        os.kill(os.getpid(), signal.SIGKILL)

    actor = Endless.remote()
    with pytest.raises(WorkerCrashedError):
        shoal.get(read_one_and_die.remote(actor))
    assert wait_until(lambda: notes(path) == ["closed"], 10.0)


@pytest.mark.parametrize("limit", [-1, 3])
def test_a_running_or_paused_generator_can_be_cancelled(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "made"
    stream = note_each.options(_generator_backpressure_num_objects=limit).remote(path, 1 << 40)
    first = next(stream)
    shoal.cancel(stream)
    *items, error = stream
    for ref in (error, stream.completed()):
        with pytest.raises(TaskCancelledError):
            shoal.get(ref)
    assert shoal.get([first, *items]) == list(range(1 + len(items)))
    assert notes(path)[-1] == "closed"


@pytest.mark.parametrize("method", ["upto", "slow_reader"])
@pytest.mark.parametrize("kind", [Maker, AsyncMaker])
def test_a_generator_of_an_actor_can_be_cancelled(method: str, kind: Any) -> None:
    maker = kind.remote()
    stream = (
        getattr(maker, "upto" if kind is AsyncMaker else method)
        .options(_generator_backpressure_num_objects=2 if method == "slow_reader" else -1)
        .remote(1 << 40)
    )
    next(stream)
    shoal.cancel(stream)
    *_, error = stream
    with pytest.raises(TaskCancelledError):
        shoal.get(error)
    assert shoal.get(list(maker.upto.remote(0))) == []


def test_a_generator_that_is_out_of_time() -> None:
    stream = count.options(timeout_s=0.3, _generator_backpressure_num_objects=2).remote(10)
    assert shoal.get(next(stream)) == 0
    shoal.wait([stream.completed()])
    *items, error = stream
    assert shoal.get(items) == [1, 2]
    with pytest.raises(shoal.exceptions.TaskTimeoutError):
        shoal.get(error)


def test_a_generator_that_raised_is_tried_again(tmp_path: Path) -> None:
    @shoal.remote(retry_exceptions=[OSError])
    def flaky(n: int) -> Iterator[int]:
        again = (tmp_path / "again").exists()
        (tmp_path / "again").touch()
        for i in range(n):
            if i == 3 and not again:
                raise OSError("not yet")
            yield i

    assert shoal.get(list(flaky.remote(6))) == list(range(6))


def test_a_queued_generator_can_be_cancelled() -> None:
    stream = count.options(resources={"special": 3}).remote(3)
    shoal.cancel(stream)
    [error] = stream
    with pytest.raises(TaskCancelledError):
        shoal.get(error)


def test_ended_streams_leave_nothing_behind() -> None:
    runtime: Any = slot.current
    for _ in range(20):
        assert len(list(count.remote(3))) == 3
        next(count.remote(100))
    gc.collect()
    assert wait_until(lambda: not runtime.readers._followed, 10.0)
