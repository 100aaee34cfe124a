"""Tasks as a user meets them: arguments, results, nesting, retries, code that travels."""

from __future__ import annotations

import functools
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import GetTimeoutError, TaskError, UnserializableError, WorkerCrashedError

pytestmark = pytest.mark.usefixtures("local")


@shoal.remote
def echo(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@shoal.remote
def add(a: int, b: int = 1) -> int:
    return a + b


def test_arguments_arrive_as_they_were_given() -> None:
    value = {"a": [1, (2, 3)], "b": {4}, "c": b"5", "d": None}
    assert shoal.get(echo.remote(1, "x", value, key=value, other=2.5)) == (
        (1, "x", value),
        {"key": value, "other": 2.5},
    )
    assert shoal.get(add.remote(1)) == 2
    assert shoal.get(add.remote(1, b=5)) == 6
    assert shoal.get(echo.remote()) == ((), {})


def test_references_at_the_top_level_are_resolved_and_nested_ones_are_not() -> None:
    ref = shoal.put(41)

    @shoal.remote
    def look(top: Any, *, key: Any, inside: Any) -> list[Any]:
        return [top, key, type(inside[0]).__name__, shoal.get(inside[0])]

    assert shoal.get(look.remote(ref, key=ref, inside=[ref])) == [41, 41, "ObjectRef", 41]


def test_a_chain_of_references_is_resolved_without_a_get() -> None:
    ref: Any = 0
    for _ in range(200):
        ref = add.remote(ref)
    assert shoal.get(ref) == 200


def test_the_same_reference_as_several_arguments() -> None:
    big = shoal.put(bytes(1_000_000))

    @shoal.remote
    def sizes(*args: bytes, **kwargs: bytes) -> list[int]:
        return [len(one) for one in (*args, *kwargs.values())]

    assert shoal.get(sizes.remote(big, big, last=big)) == [1_000_000] * 3


def test_identity_inside_one_argument_is_kept() -> None:
    @shoal.remote
    def same(pair: list[Any]) -> bool:
        return pair[0] is pair[1]

    one = [1]
    assert shoal.get(same.remote([one, one]))


@pytest.mark.parametrize("size", [0, 1, 100_000, 102_400, 110_000, 5_000_000])
def test_arguments_and_results_of_any_size(size: int) -> None:
    data = os.urandom(size)

    @shoal.remote
    def back(data: bytes, *, key: bytes) -> tuple[bytes, bytes]:
        return data, key

    assert shoal.get(back.remote(data, key=data)) == (data, data)
    assert shoal.get(back.options(num_returns=2).remote(data, key=data)) == [data, data]


def test_ten_thousand_arguments() -> None:
    refs = [shoal.put(i) for i in range(5_000)]

    @shoal.remote
    def total(*values: int) -> int:
        return sum(values)

    assert shoal.get(total.remote(*refs, *range(5_000))) == 2 * sum(range(5_000))


def test_many_middling_arguments_do_not_travel_in_one_message() -> None:
    refs = [shoal.put(os.urandom(50_000)) for _ in range(200)]

    @shoal.remote
    def total(*values: bytes) -> int:
        return sum(map(len, values))

    assert shoal.get(total.remote(*refs)) == 200 * 50_000


def test_three_thousand_returns() -> None:
    @shoal.remote(num_returns=3000)
    def many() -> list[int]:
        return list(range(3000))

    refs = many.remote()
    assert len(refs) == 3000
    assert shoal.get(refs) == list(range(3000))


def test_number_of_returns() -> None:
    @shoal.remote
    def values(count: int) -> tuple[int, ...]:
        return tuple(range(count))

    assert values.options(num_returns=0).remote(3) is None
    first, second = values.options(num_returns=2).remote(2)
    assert shoal.get([second, first]) == [1, 0]
    for wrong in (1, 3):
        refs = values.options(num_returns=2).remote(wrong)
        for ref in refs:
            with pytest.raises(ValueError, match=f"num_returns=2 .* returned {wrong} values"):
                shoal.get(ref)

    @shoal.remote(num_returns=2)
    def one() -> int:
        return 1

    with pytest.raises(ValueError, match="returned a int"):
        shoal.get(one.remote())

    mine = values.options(num_returns=3).remote(3)
    last = mine.pop()  # the list is the caller's: what they do to it changes nothing for the task
    assert shoal.get([last, *mine]) == [2, 0, 1]


def test_nested_tasks_on_fewer_cpus_than_levels() -> None:
    @shoal.remote
    def nest(depth: int) -> int:
        return 0 if depth == 0 else 1 + shoal.get(nest.remote(depth - 1))

    assert shoal.get(nest.remote(8), timeout=30) == 8


def test_recursion_with_a_task_per_call() -> None:
    @shoal.remote
    def fib(n: int) -> int:
        return n if n < 2 else sum(shoal.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert shoal.get(fib.remote(9), timeout=30) == 34


def test_a_task_returns_references_of_its_own_tasks() -> None:
    @shoal.remote
    def outer() -> list[Any]:
        return [add.remote(1), shoal.put("small"), shoal.put(bytes(1_000_000))]

    refs = shoal.get(outer.remote())
    values = shoal.get(refs)
    assert values[:2] == [2, "small"]
    assert len(values[2]) == 1_000_000


def test_closures_lambdas_and_local_classes() -> None:
    factor = 3

    class Point:
        def __init__(self, x: int) -> None:
            self.x = x

        def scaled(self) -> Point:
            return Point(self.x * factor)

    @shoal.remote
    def scale(point: Point) -> Point:
        return point.scaled()

    assert shoal.get(scale.remote(Point(2))).x == 6
    assert shoal.get(shoal.remote(lambda x: x * factor).remote(5)) == 15
    assert shoal.get(shoal.remote(functools.partial(max, 4)).remote(2)) == 4


def test_a_function_that_is_defined_again_runs_anew() -> None:
    def make(value: int) -> Any:
        @shoal.remote
        def f() -> int:
            return value

        return f

    assert [shoal.get(make(i).remote()) for i in range(5)] == list(range(5))


def test_options_leave_the_original_alone() -> None:
    @shoal.remote(num_cpus=1, resources={"special": 1})
    def held() -> dict[str, float]:
        return shoal.get_runtime_context().get_assigned_resources()

    changed = held.options(num_cpus=0.5, resources={"special": 0.25})
    assert shoal.get(changed.remote()) == {"CPU": 0.5, "special": 0.25}
    assert shoal.get(held.remote()) == {"CPU": 1.0, "special": 1.0}


def test_environment_variables_of_tasks_and_of_nobody_else() -> None:
    @shoal.remote
    def look(name: str) -> str | None:
        return os.environ.get(name)

    given = look.options(runtime_env={"env_vars": {"SHOAL_TEST_GIVEN": "yes"}})
    assert shoal.get(given.remote("SHOAL_TEST_GIVEN")) == "yes"
    assert shoal.get([look.remote("SHOAL_TEST_GIVEN") for _ in range(4)]) == [None] * 4
    assert "SHOAL_TEST_GIVEN" not in os.environ


def test_names_are_seen_inside() -> None:
    @shoal.remote
    def where() -> tuple[str | None, str | None, str | None]:
        context = shoal.get_runtime_context()
        return context.get_task_name(), context.get_task_id(), context.get_node_id()

    ref = where.options(name="a name").remote()
    name, task_id, node_id = shoal.get(ref)
    assert name == "a name"
    assert ref.hex().startswith(task_id)
    assert node_id == shoal.get_runtime_context().get_node_id()


# ---------------------------------------------------------------------------------------------------------- crashes


def test_a_worker_that_dies_is_an_error_with_its_cause() -> None:
    @shoal.remote(max_retries=0)
    def die(how: int) -> None:
        print("last line", file=sys.stderr, flush=True)
        if how < 0:
            os.kill(os.getpid(), -how)
        os._exit(how)

    with pytest.raises(WorkerCrashedError, match=r"die was running on pid \d+") as code:
        shoal.get(die.remote(7))
    assert code.value.exit_code == 7
    assert "last line" in str(code.value)
    with pytest.raises(WorkerCrashedError, match="SIGKILL") as killed:
        shoal.get(die.remote(-signal.SIGKILL))
    assert killed.value.signal == signal.SIGKILL
    with pytest.raises(WorkerCrashedError, match="SIGSEGV"):
        shoal.get(die.remote(-signal.SIGSEGV))


def test_a_task_whose_worker_dies_is_tried_again(tmp_path: Path) -> None:
    @shoal.remote
    def third_time(marks: str) -> int:
        mark = Path(marks, str(os.getpid()))
        mark.touch()
        if len(os.listdir(marks)) < 3:
            os._exit(1)
        return len(os.listdir(marks))

    assert shoal.get(third_time.options(max_retries=3).remote(str(tmp_path))) == 3
    for mark in tmp_path.iterdir():
        mark.unlink()
    with pytest.raises(WorkerCrashedError):
        shoal.get(third_time.options(max_retries=1).remote(str(tmp_path)))


def test_sys_exit_ends_the_worker() -> None:
    @shoal.remote(max_retries=0)
    def leave(code: Any) -> None:
        sys.exit(code)

    with pytest.raises(WorkerCrashedError) as error:
        shoal.get(leave.remote(3))
    assert error.value.exit_code == 3
    with pytest.raises(WorkerCrashedError):
        shoal.get(leave.remote("a text"))


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_only_the_task_that_crashes_its_worker_fails(retries: int, tmp_path: Path) -> None:
    @shoal.remote(max_retries=retries)
    def work(i: int) -> int:
        if i == 50:
            (tmp_path / f"{os.getpid()}").touch()
            os._exit(1)
        return i

    shoal.get([work.remote(0) for _ in range(100)])  # known to be short: sent many at a time
    refs = [work.remote(i) for i in range(100)]
    with pytest.raises(WorkerCrashedError):
        shoal.get(refs[50], timeout=20)
    assert [shoal.get(ref, timeout=20) for i, ref in enumerate(refs) if i != 50] == [i for i in range(100) if i != 50]
    runs = len(list(tmp_path.iterdir()))
    assert runs == 1 if retries == 0 else retries + 1 <= runs <= retries + 2  # at most once means that


def test_max_calls_renews_the_worker() -> None:
    @shoal.remote(max_calls=2)
    def pid() -> int:
        return os.getpid()

    pids = [shoal.get(pid.remote()) for _ in range(6)]
    assert len(set(pids)) >= 3
    assert all(pids.count(one) <= 2 for one in pids)


# ------------------------------------------------------------------------------------------------- user code's ways


def test_threads_of_a_task_may_use_the_cluster() -> None:
    @shoal.remote
    def spread() -> list[int]:
        results: list[int] = []
        threads = [threading.Thread(target=lambda i=i: results.append(shoal.get(add.remote(i)))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(results)

    assert shoal.get(spread.remote(), timeout=30) == list(range(1, 9))


def test_many_threads_of_the_driver() -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            refs = [add.remote(number, i) for i in range(200)]
            assert shoal.get(refs) == [number + i for i in range(200)]
            big = shoal.put(bytes([number]) * 300_000)
            assert shoal.get(echo.remote(big))[0][0] == bytes([number]) * 300_000
            ready, rest = shoal.wait([add.remote(1) for _ in range(10)], num_returns=10)
            assert len(ready) == 10
            assert not rest
        except BaseException as exc:
            problems.append(exc)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert problems == []


def test_multiprocessing_inside_a_task() -> None:
    @shoal.remote
    def parallel() -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, -2, -3])

    assert shoal.get(parallel.remote(), timeout=30) == [1, 2, 3]


def test_a_task_may_fork() -> None:
    @shoal.remote
    def fork() -> tuple[int, bool]:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write, b"0" if shoal.is_initialized() else b"1")
            os._exit(4)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), os.read(read, 1) == b"1"

    assert shoal.get(fork.remote(), timeout=30) == (4, True)
    assert shoal.get(add.remote(1)) == 2


def test_asyncio_inside_a_task() -> None:
    @shoal.remote
    def run() -> list[int]:
        import asyncio

        async def main() -> list[int]:
            return list(await asyncio.gather(*[add.remote(i) for i in range(10)]))

        return asyncio.run(main())

    assert shoal.get(run.remote(), timeout=30) == list(range(1, 11))


def test_a_task_that_waits_lends_its_cpu() -> None:
    @shoal.remote(num_cpus=2)
    def wide() -> str:
        return "ran"

    @shoal.remote(num_cpus=2)
    def outer() -> tuple[str, int]:
        ready, _ = shoal.wait([wide.remote()], timeout=20)
        return shoal.get(wide.remote()), len(ready)

    assert shoal.get(outer.remote(), timeout=30) == ("ran", 1)


def test_short_tasks_do_not_wait_behind_a_long_one() -> None:
    @shoal.remote
    def block(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)

    @shoal.remote
    def quick(i: int) -> int:
        return i

    shoal.get([quick.remote(i) for i in range(200)])  # its pace is known: many are sent ahead
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "go")
        blocked = block.remote(path)
        assert shoal.get([quick.remote(i) for i in range(200)], timeout=20) == list(range(200))
        Path(path).touch()
        shoal.get(blocked, timeout=20)


def test_cancel_drops_what_has_not_begun() -> None:
    @shoal.remote(num_cpus=2)
    def hold(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "go")
        running = hold.remote(path)
        waiting = add.remote(1)
        dependent = add.remote(waiting)
        shoal.cancel(waiting)
        with pytest.raises(shoal.exceptions.TaskCancelledError):
            shoal.get(waiting, timeout=10)
        with pytest.raises(shoal.exceptions.TaskCancelledError):
            shoal.get(dependent, timeout=10)
        Path(path).touch()
        shoal.get(running, timeout=20)
        shoal.cancel(running)  # done: nothing happens


# ---------------------------------------------------------------------------------------------------- wrong input


def test_what_cannot_be_pickled_is_named_with_its_place() -> None:
    lock = threading.Lock()
    with pytest.raises(UnserializableError, match=r"argument 1 of echo\['deep'\]\[0\]"):
        echo.remote(1, {"deep": [lock]})
    with pytest.raises(UnserializableError, match=r"argument 'key' of echo"):
        echo.remote(key=lock)

    @shoal.remote
    def captures() -> Any:
        return lock

    with pytest.raises(TypeError, match=r"the function .*captures.*<closure lock>"):
        captures.remote()

    @shoal.remote
    def returns() -> Any:
        import threading

        return {"inner": threading.Lock()}

    with pytest.raises(UnserializableError, match=r"the result of .*returns\['inner'\]") as error:
        shoal.get(returns.remote())
    assert isinstance(error.value, TaskError)


def test_code_that_drags_a_large_value_along_is_refused() -> None:
    ballast = bytes(101 << 20)

    @shoal.remote
    def heavy() -> int:
        return len(ballast)

    with pytest.raises(ValueError, match=r"heavy is 101 MiB large .* put\(\) that and pass the reference"):
        heavy.remote()


def test_a_call_with_the_wrong_arguments_fails_at_once() -> None:
    with pytest.raises(TypeError, match="add"):
        add.remote(1, 2, 3)
    with pytest.raises(TypeError, match="add"):
        add.remote(c=1)
    with pytest.raises(TypeError, match="cannot be called directly"):
        add(1)


# ------------------------------------------------------------------------------------------------- silent waits


@pytest.fixture
def explain_soon() -> Any:
    """Have the driver say what it waits for after a moment instead of 5 s."""
    from shoal.runtime import slot

    runtime: Any = slot.current
    runtime.explain_after_s = 0.2
    yield
    runtime.explain_after_s = 5.0


Waits = Callable[[], Any]


@pytest.mark.usefixtures("explain_soon")
def test_a_wait_for_a_resource_that_nobody_has_says_so(caplog: pytest.LogCaptureFixture) -> None:
    ref = add.options(resources={"unobtainium": 1}).remote(1)
    dependent = add.remote(ref)
    with pytest.raises(GetTimeoutError, match="unobtainium"):
        shoal.get(ref, timeout=0.5)
    assert "still waiting for the result of add" in caplog.text
    assert "unobtainium" in caplog.text
    caplog.clear()
    with pytest.raises(GetTimeoutError):
        shoal.get(dependent, timeout=0.5)
    assert "1 of its arguments are not ready" in caplog.text
    assert "unobtainium" in caplog.text
    caplog.clear()
    shoal.wait([ref], timeout=0.5)
    assert "unobtainium" in caplog.text
    shoal.cancel(ref)


@pytest.mark.usefixtures("explain_soon")
def test_a_wait_for_busy_workers_says_so(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    @shoal.remote(num_cpus=2)
    def hold(path: str) -> None:
        while not os.path.exists(path):
            time.sleep(0.01)

    go = tmp_path / "go"
    running = hold.remote(str(go))
    behind = add.remote(1)
    with pytest.raises(GetTimeoutError):
        shoal.get(behind, timeout=0.6)
    assert "still waiting for the result of add" in caplog.text
    caplog.clear()
    shoal.wait([running], timeout=0.5)
    assert caplog.text == ""  # it runs: nothing to worry about
    go.touch()
    assert shoal.get(behind, timeout=20) == 2
