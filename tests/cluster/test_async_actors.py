"""Actors with coroutines, and actors with threads: many calls at a time."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import ActorDiedError, TaskError

pytestmark = pytest.mark.usefixtures("local")


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.005)


@shoal.remote
def echo(value: Any) -> Any:
    return value


@shoal.remote
class Async:
    def __init__(self, trace: str = "") -> None:
        self.trace = trace
        self.gate = asyncio.Event()
        self.running = self.most = 0
        self.started: list[int] = []
        self.loop = asyncio.get_running_loop()  # the constructor runs there, too

    async def wait(self, number: int = 0) -> int:
        self.started.append(number)
        self.running += 1
        self.most = max(self.most, self.running)
        await self.gate.wait()
        self.running -= 1
        return number

    async def open(self) -> None:
        self.gate.set()

    async def seen(self) -> tuple[list[int], int]:
        return self.started, self.most

    async def sleep(self, seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    def plain(self) -> bool:
        return asyncio.get_running_loop() is self.loop

    async def fail(self) -> None:
        await asyncio.sleep(0)
        raise KeyError("async")

    async def cancelled(self) -> None:
        raise asyncio.CancelledError("gave up")

    async def use(self, refs: list[Any]) -> Any:
        first, rest = await refs[0], await asyncio.gather(*refs[1:])
        return [first, *rest]

    async def use_and_fail(self, refs: list[Any]) -> Any:
        return await refs[0]

    async def two(self) -> tuple[int, int]:
        return 1, 2

    async def blob(self, size: int) -> bytes:
        return b"b" * size

    async def context(self) -> tuple[str, str | None, str | None]:
        before = shoal.get_runtime_context().get_task_id()
        await asyncio.sleep(0.01)
        context = shoal.get_runtime_context()
        assert context.get_task_id() == before
        in_thread = await asyncio.to_thread(lambda: shoal.get_runtime_context().get_task_id())
        assert in_thread == before
        return before or "", context.get_actor_id(), context.get_task_name()

    async def background(self) -> int:
        async def forever() -> None:
            try:
                await asyncio.sleep(1000)
            finally:
                await asyncio.sleep(0)
                Path(self.trace).write_text("cleaned\n")  # noqa: ASYNC240

        self.task = asyncio.create_task(forever())
        return os.getpid()

    async def exit(self) -> None:
        shoal.actor.exit_actor()

    async def exit_from_task(self) -> None:
        async def leave() -> None:
            shoal.actor.exit_actor()

        await asyncio.gather(asyncio.create_task(leave()), asyncio.sleep(1000))


def test_a_thousand_calls_wait_together_and_begin_in_order() -> None:
    actor = Async.remote()
    calls = [actor.wait.remote(number) for number in range(1000)]
    opened = actor.open.remote()  # the thousand hold all slots, so this one waits
    assert shoal.wait([opened], timeout=0.3)[0] == []
    shoal.kill(actor)
    with pytest.raises(ActorDiedError):
        shoal.get(calls)

    actor = Async.options(max_concurrency=1001).remote()
    calls = [actor.wait.remote(number) for number in range(1000)]
    shoal.get(actor.open.remote())
    assert shoal.get(calls) == list(range(1000))
    started, most = shoal.get(actor.seen.remote())
    assert started == list(range(1000))
    assert most == 1000


def test_max_concurrency_limits_how_many_run() -> None:
    actor = Async.options(max_concurrency=3).remote()
    calls = [actor.sleep.remote(0.05) for _ in range(9)]
    start = time.monotonic()
    shoal.get(calls)
    assert time.monotonic() - start > 0.1


def test_calls_run_together_and_plain_methods_between() -> None:
    actor = Async.remote()
    start = time.monotonic()
    slow = [actor.sleep.remote(0.3) for _ in range(100)]
    assert shoal.get(actor.plain.remote())
    assert shoal.get(slow) == [0.3] * 100
    assert time.monotonic() - start < 5.0


def test_results_and_errors() -> None:
    actor = Async.remote()
    with pytest.raises(KeyError, match="async") as caught:
        shoal.get(actor.fail.remote())
    assert isinstance(caught.value, TaskError)
    assert "in fail" in caught.value.traceback_str
    with pytest.raises(TaskError, match="gave up"):
        shoal.get(actor.cancelled.remote())
    assert shoal.get(list(actor.two.options(num_returns=2).remote())) == [1, 2]
    assert shoal.get(actor.blob.remote(500_000)) == b"b" * 500_000
    with pytest.raises(TypeError):
        shoal.get(actor.sleep.remote("a while"))
    assert shoal.get(actor.plain.remote())


def test_references_are_awaited_inside() -> None:
    @shoal.remote
    def broken() -> None:
        raise ValueError("in a task")

    actor = Async.remote()
    refs = [echo.remote(1), shoal.put(2), echo.remote(b"x" * 200_000)]
    assert shoal.get(actor.use.remote(refs)) == [1, 2, b"x" * 200_000]
    with pytest.raises(ValueError, match="in a task"):
        shoal.get(actor.use_and_fail.remote([broken.remote()]))


def test_a_call_that_waits_for_its_argument_does_not_hold_up_the_rest(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=0)
    def when(path: str) -> str:
        while not os.path.exists(path):
            time.sleep(0.002)
        return "now"

    actor = Async.remote()
    shoal.get(actor.plain.remote())
    gate = tmp_path / "gate"
    late = actor.use.remote([shoal.put(0)])
    waiting = actor.wait.remote(when.remote(str(gate)))
    shoal.get(actor.open.remote(), timeout=10)
    gate.touch()
    assert shoal.get([late, waiting]) == [[0], "now"]


def test_each_coroutine_knows_what_it_runs() -> None:
    actor = Async.remote()
    results = shoal.get([actor.context.remote() for _ in range(20)])
    assert len({task_id for task_id, _, _ in results}) == 20
    assert {actor_id for _, actor_id, _ in results} == {actor._actor_id.hex()}
    assert {name for _, _, name in results} == {"Async.context"}


def test_async_actors_call_each_other() -> None:
    @shoal.remote
    class Ping:
        async def ping(self, others: list[Any], depth: int) -> int:
            if not depth:
                return 1
            return sum(await asyncio.gather(*[other.ping.remote(others, depth - 1) for other in others]))

    actors = [Ping.remote() for _ in range(3)]
    assert shoal.get(actors[0].ping.remote(actors, 4)) == 81


def test_the_end_waits_for_calls_and_cancels_the_rest(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    actor = Async.remote(str(trace))
    shoal.get(actor.background.remote())
    slow = actor.sleep.remote(0.2)
    del actor
    assert shoal.get(slow) == 0.2
    wait_until(lambda: trace.exists() and trace.read_text() == "cleaned\n", "the clean-up of a background task")


@pytest.mark.parametrize("how", ["exit", "exit_from_task"])
def test_exit_actor_in_a_coroutine(how: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    actor = Async.remote(str(trace))
    shoal.get(actor.background.remote())
    calls = [actor.wait.remote(), getattr(actor, how).remote(), actor.sleep.remote(60)]
    for call in calls:
        with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
            shoal.get(call, timeout=10)
    assert trace.read_text() == "cleaned\n"


def test_a_constructor_of_an_async_actor_that_raises() -> None:
    @shoal.remote
    class Broken:
        def __init__(self) -> None:
            raise OSError("no loop")

        async def method(self) -> None: ...

    with pytest.raises(ActorDiedError, match="no loop"):
        shoal.get(Broken.remote().method.remote())


def test_an_asyncio_driver_and_an_async_actor() -> None:
    actor = Async.remote()

    async def main() -> list[Any]:
        return await asyncio.gather(*[actor.sleep.remote(0.01) for _ in range(200)])

    assert asyncio.run(main()) == [0.01] * 200


# -------------------------------------------------------------------------------------------------------------- threads


@shoal.remote(max_concurrency=4)
class Threads:
    def __init__(self) -> None:
        self.barrier = threading.Barrier(4)

    def meet(self) -> int:
        self.barrier.wait(10)
        return threading.get_ident()

    def context(self) -> tuple[str | None, str | None]:
        before = shoal.get_runtime_context().get_task_id()
        self.barrier.wait(10)
        return before, shoal.get_runtime_context().get_task_id()

    def nested(self, refs: list[Any]) -> Any:
        return shoal.get(refs[0])

    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    def main_thread(self) -> bool:
        return threading.current_thread() is threading.main_thread()


def test_as_many_threads_as_asked_for() -> None:
    actor = Threads.remote()
    assert len(set(shoal.get([actor.meet.remote() for _ in range(4)]))) == 4
    start = time.monotonic()
    shoal.get([actor.sleep.remote(0.1) for _ in range(8)])
    assert 0.15 < time.monotonic() - start < 5.0


def test_each_thread_has_its_own_context() -> None:
    actor = Threads.remote()
    seen = shoal.get([actor.context.remote() for _ in range(4)])
    assert all(before == after for before, after in seen)
    assert len({before for before, _ in seen}) == 4


def test_a_thread_that_waits_does_not_hold_up_the_others() -> None:
    actor = Threads.remote()
    never = actor.nested.remote([Async.remote().sleep.remote(3600)])
    assert shoal.get([actor.sleep.remote(0.01) for _ in range(10)]) == [0.01] * 10
    assert shoal.wait([never], timeout=0)[0] == []


def test_a_threaded_actor_ends_after_its_calls() -> None:
    actor = Threads.remote()
    pid = shoal.get(actor.pid.remote())
    calls = [actor.sleep.remote(0.1) for _ in range(10)]
    del actor
    assert shoal.get(calls) == [0.1] * 10
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "the process to end")


def test_a_threaded_actor_that_was_never_called_ends_too(tmp_path: Path) -> None:
    @shoal.remote(max_concurrency=2)
    class Marks:
        def __init__(self, path: str) -> None:
            self.path = path
            Path(path).write_text("begun")

        def __del__(self) -> None:
            Path(self.path).write_text("ended")

    marks = Marks.remote(str(tmp_path / "mark"))
    wait_until((tmp_path / "mark").exists, "the constructor")
    del marks
    wait_until(lambda: (tmp_path / "mark").read_text() == "ended", "the end")
