"""What user code finds inside a worker: its context, its output, its process; and how workers of tasks end."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import WorkerCrashedError

pytestmark = pytest.mark.usefixtures("local")


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.005)


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


# -------------------------------------------------------------------------------------------------------------- context


def test_the_context_of_a_task() -> None:
    @shoal.remote(name="named", resources={"special": 0.5})
    def look() -> dict[str, Any]:
        context = shoal.get_runtime_context()
        return {
            "job": context.get_job_id(), "node": context.get_node_id(), "worker": context.get_worker_id(),
            "task": context.get_task_id(), "name": context.get_task_name(), "actor": context.get_actor_id(),
            "function": context.get_task_function_name(), "assigned": context.get_assigned_resources(),
            "namespace": context.namespace, "address": context.gcs_address,
        }  # fmt: skip

    here = shoal.get_runtime_context()
    ref = look.remote()
    seen = shoal.get(ref)
    assert seen["task"] == ref.task_id().hex()
    assert (seen["job"], seen["node"]) == (here.get_job_id(), here.get_node_id())
    assert seen["worker"] not in (None, here.get_worker_id())
    assert seen["name"] == "named"
    assert seen["function"].endswith("look")
    assert seen["actor"] is None
    assert seen["assigned"] == {"CPU": 1.0, "special": 0.5}
    assert seen["namespace"] == here.namespace


def test_the_context_of_an_actor() -> None:
    @shoal.remote
    class Looks:
        def __init__(self) -> None:
            context = shoal.get_runtime_context()
            self.at_birth = (context.get_actor_id(), context.get_actor_name(), context.get_task_id())

        def look(self) -> Any:
            context = shoal.get_runtime_context()
            return self.at_birth, context.get_actor_id(), context.get_task_name(), context.current_actor

        def from_thread(self) -> str | None:
            found: list[str | None] = []
            thread = threading.Thread(target=lambda: found.append(shoal.get_runtime_context().get_actor_id()))
            thread.start()
            thread.join()
            return found[0]

    looks = Looks.options(name="looks").remote()
    at_birth, actor_id, task_name, handle = shoal.get(looks.look.remote())
    assert at_birth == (actor_id, "looks", None)
    assert actor_id == looks._actor_id.hex()
    assert task_name == "Looks.look"
    assert handle == looks
    assert shoal.get(looks.from_thread.remote()) == actor_id


def test_titles_say_what_runs(tmp_path: Path) -> None:
    @shoal.remote
    def working(path: str) -> None:
        Path(path + ".pid").write_text(str(os.getpid()))
        while not os.path.exists(path):
            time.sleep(0.005)

    @shoal.remote
    class Keeper:
        def pid(self) -> int:
            return os.getpid()

    @shoal.remote
    def quick() -> int:
        return os.getpid()

    gate = str(tmp_path / "gate")
    shoal.get([quick.remote() for _ in range(100)])
    done = working.remote(gate)
    wait_until(lambda: os.path.exists(gate + ".pid") and Path(gate + ".pid").read_text(), "the task to begin")
    pid = int(Path(gate + ".pid").read_text())
    wait_until(lambda: comm(pid) == "shoal::working"[:15], "its title")
    Path(gate).touch()
    shoal.get(done)
    wait_until(lambda: not os.path.exists(f"/proc/{pid}") or comm(pid) == "shoal::IDLE", "it to be idle")
    keeper = Keeper.remote()
    assert comm(shoal.get(keeper.pid.remote())) == "shoal::Keeper"


def test_nesting_of_calls_reaches_tasks_and_actors() -> None:
    """Work is served depth first, so each worker must say how deep it is."""
    from shoal.runtime import slot

    @shoal.remote
    class Deep:
        def depth(self) -> int:
            return slot.current.nesting.depth  # type: ignore[union-attr]

    @shoal.remote
    def depth(more: int) -> int:
        found: int = shoal.get(depth.remote(more - 1)) if more else slot.current.nesting.depth  # type: ignore[union-attr]
        return found

    assert shoal.get(depth.remote(0)) == 1
    assert shoal.get(depth.remote(3)) == 4
    assert shoal.get(Deep.remote().depth.remote()) == 1


# --------------------------------------------------------------------------------------------------------------- output


def test_output_bears_the_name_of_who_prints(capfd: pytest.CaptureFixture[str]) -> None:
    @shoal.remote
    class Plain:
        def __init__(self) -> None:
            print("from its constructor")

        def say(self) -> None:
            print("from its method", end="")  # no end of line: it belongs to this call all the same

    @shoal.remote
    class Named:
        def __repr__(self) -> str:
            return "Named(7)"

        async def say(self) -> None:
            print("from a coroutine")
            print("to stderr", file=sys.stderr)

        def logs(self) -> None:
            logging.getLogger("user").warning("a log record")
            warnings.warn("a warning", stacklevel=1)

    plain, named = Plain.remote(), Named.remote()
    shoal.get([plain.say.remote(), named.say.remote(), named.logs.remote()])
    seen = ""

    def all_there() -> bool:
        nonlocal seen
        out, err = capfd.readouterr()
        seen += out + err
        return all(text in seen for text in ("constructor", "its method", "coroutine", "stderr", "record", "a warning"))

    wait_until(all_there, "the output")
    lines = [line for line in seen.splitlines() if " pid=" in line]
    assert any(line.startswith("(Plain pid=") and "from its constructor" in line for line in lines), seen
    assert any(line.startswith("(Plain pid=") and "from its method" in line for line in lines), seen
    assert any(line.startswith("(Named(7) pid=") and "from a coroutine" in line for line in lines), seen
    assert any(line.startswith("(Named(7) pid=") and "to stderr" in line for line in lines), seen


# ---------------------------------------------------------------------------------------------------------- environment


def test_environment_variables_of_a_call_stay_with_it() -> None:
    @shoal.remote
    def value() -> tuple[str | None, int]:
        return os.environ.get("SHOAL_TEST_VALUE"), os.getpid()

    @shoal.remote
    class Value:
        def value(self) -> str | None:
            return os.environ.get("SHOAL_TEST_VALUE")

    first, pid = shoal.get(value.options(runtime_env={"env_vars": {"SHOAL_TEST_VALUE": "one"}}).remote())
    second, other_pid = shoal.get(value.options(runtime_env={"env_vars": {"SHOAL_TEST_VALUE": "two"}}).remote())
    assert (first, second) == ("one", "two")
    assert pid != other_pid
    assert shoal.get(value.remote())[0] is None
    actor = Value.options(runtime_env={"env_vars": {"SHOAL_TEST_VALUE": "three"}}).remote()
    assert shoal.get(actor.value.remote()) == "three"


def test_a_worker_is_a_whole_python_program(tmp_path: Path) -> None:
    """Signals, threads, processes and the standard streams are as a program expects them."""

    @shoal.remote
    def look() -> dict[str, Any]:
        import multiprocessing
        import signal
        import subprocess

        with multiprocessing.get_context("fork").Pool(2) as pool:
            squares = pool.map(abs, [-1, -2])
        return {
            "squares": squares,
            "echo": subprocess.run(["echo", "hello"], capture_output=True, text=True, check=True).stdout,
            "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
            "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
            "main": threading.current_thread() is threading.main_thread(),
            "stdin": sys.stdin.read(),
            "directory": os.getcwd(),
        }

    seen = shoal.get(look.remote())
    assert seen == {
        "squares": [1, 2], "echo": "hello\n", "sigint": True, "sigterm": True, "main": True, "stdin": "",
        "directory": os.getcwd(),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ their end


def test_sys_exit_and_crashes_in_tasks() -> None:
    @shoal.remote(max_retries=0)
    def leave(how: str) -> None:
        if how == "exit":
            sys.exit(4)
        os._exit(5)

    for how, code in (("exit", 4), ("crash", 5)):
        with pytest.raises(WorkerCrashedError, match=f"exit code {code}"):
            shoal.get(leave.remote(how))


def test_a_task_that_runs_long_does_not_keep_those_behind_it(tmp_path: Path) -> None:
    @shoal.remote
    def task(path: str = "") -> int:
        while path and not os.path.exists(path):
            time.sleep(0.005)
        return os.getpid()

    gate = str(tmp_path / "gate")
    shoal.get([task.remote() for _ in range(50)])  # known to be short: many are sent ahead
    slow, quick = task.remote(gate), [task.remote() for _ in range(50)]
    shoal.get(quick, timeout=20)
    Path(gate).touch()
    shoal.get(slow)


def test_results_do_not_wait_for_a_slow_successor(tmp_path: Path) -> None:
    @shoal.remote
    class Paced:
        def quick(self) -> int:
            return 1

        def slow(self, path: str) -> int:
            while not os.path.exists(path):
                time.sleep(0.002)
            return 2

    paced = Paced.remote()
    shoal.get([paced.quick.remote() for _ in range(100)])
    gate = str(tmp_path / "gate")
    quick = [paced.quick.remote() for _ in range(100)]
    slow = paced.slow.remote(gate)
    assert shoal.get(quick, timeout=10) == [1] * 100
    Path(gate).touch()
    assert shoal.get(slow) == 2


def test_max_calls_ends_a_worker_after_so_many() -> None:
    @shoal.remote(max_calls=2)
    def pid() -> int:
        return os.getpid()

    pids = [shoal.get(pid.remote()) for _ in range(6)]
    assert max(pids.count(one) for one in pids) <= 2


def test_a_worker_that_leaves_after_a_call_is_missed_by_nobody() -> None:
    """Neither by the owner of its result, nor by those whose references it borrowed or gave, nor by an actor that might
    have been given this worker."""

    @shoal.remote(max_calls=1)
    def use(refs: list[Any]) -> list[Any]:
        return [shoal.put(shoal.get(refs[0]) + 1), os.getpid()]

    @shoal.remote
    class Actor:
        def pid(self) -> int:
            return os.getpid()

    for number in range(10):
        result, pid = shoal.get(use.remote([shoal.put(number)]))
        actor = Actor.remote()
        assert shoal.get(actor.pid.remote()) != pid
        assert shoal.get(result) == number + 1


def test_several_callers_of_one_actor_all_hear_their_results() -> None:
    """Replies to one caller must not wait behind calls of another."""

    @shoal.remote
    class Counter:
        value = 0

        def add(self) -> int:
            self.value += 1
            return self.value

    @shoal.remote(num_cpus=0)
    def call(counter: Any, times: int) -> int:
        total = 0
        for _ in range(times):
            total += len(shoal.get([counter.add.remote() for _ in range(20)]))
        return total

    counter = Counter.remote()
    assert shoal.get([call.remote(counter, 20) for _ in range(6)], timeout=50) == [400] * 6
    assert shoal.get(counter.add.remote()) == 2401
