"""When actors end, what ends them, and what is given back; restarts; detached ones; resources."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import ActorDiedError, ActorUnavailableError
from shoal.runtime import slot

pytestmark = pytest.mark.usefixtures("local")
REPOSITORY = str(Path(shoal.__file__).parents[1])


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 10.0) -> float:
    """Returns how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + limit_s, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.005)
    return time.monotonic() - start


def infos(state: str = "alive") -> list[Any]:
    found = slot.current.list_actors(named_only=False, namespace="")  # type: ignore[union-attr]
    return [info for info in found if info.state == state]


def call_until_dead(method: Any) -> None:
    while True:
        shoal.get(method.remote(), timeout=10)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def note(path: str, what: str) -> None:
    with open(path, "a") as file:
        file.write(what + "\n")


@shoal.remote
class Actor:
    def __init__(self, trace: str = "") -> None:
        self.trace = trace
        self.calls = 0
        if trace:
            import atexit

            atexit.register(note, trace, "atexit")

    def __del__(self) -> None:
        if self.trace:
            note(self.trace, "__del__")

    def pid(self) -> int:
        return os.getpid()

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def sleep(self, seconds: float) -> float:
        time.sleep(seconds)
        if self.trace:
            note(self.trace, "slept")
        return seconds

    def crash(self) -> None:
        os._exit(7)

    def exit(self) -> None:
        shoal.actor.exit_actor()

    def sys_exit(self, code: int | str) -> None:
        sys.exit(code)

    def reconstructed(self) -> bool:
        return shoal.get_runtime_context().was_current_actor_reconstructed

    def make(self) -> Any:
        self.child = Actor.remote()
        return shoal.get(self.child.pid.remote())

    def give_child(self) -> list[Any]:
        return [self.child]

    def assigned(self) -> dict[str, float]:
        return shoal.get_runtime_context().get_assigned_resources()


# ------------------------------------------------------------------------------------------------------ the last handle


def test_an_actor_ends_when_its_last_handle_goes(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    actor = Actor.remote(str(trace))
    pid = shoal.get(actor.pid.remote())
    del actor
    assert wait_until(lambda: not exists(pid), "the process to end") < 2.0
    assert trace.read_text().split() == ["__del__", "atexit"]


def test_calls_that_were_submitted_finish_first(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    actor = Actor.remote(str(trace))
    late = actor.sleep.remote(0.3)
    last = actor.count.remote()
    del actor
    assert shoal.get([late, last]) == [0.3, 1]
    wait_until(lambda: trace.exists() and "atexit" in trace.read_text(), "the end")
    assert trace.read_text().split() == ["slept", "__del__", "atexit"]


def test_nobody_keeps_a_result_and_still_the_calls_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    Actor.remote(str(trace)).sleep.remote(0.1)
    wait_until(lambda: trace.exists() and "atexit" in trace.read_text(), "the end")
    assert "slept" in trace.read_text()


def test_a_borrowed_handle_keeps_it_and_a_stored_one_too() -> None:
    @shoal.remote
    def hold(actors: list[Any], path: str) -> int:
        while not os.path.exists(path):
            time.sleep(0.005)
        count: int = shoal.get(actors[0].count.remote())
        return count

    actor = Actor.remote()
    pid = shoal.get(actor.pid.remote())
    box = shoal.put([actor])
    del actor
    gc.collect()
    time.sleep(0.1)  # nothing to wait for: it must not happen
    assert exists(pid)
    [back] = shoal.get(box)
    del box
    assert shoal.get(back.count.remote()) == 1
    del back
    wait_until(lambda: not exists(pid), "the end")


def test_two_hundred_actors_end_together_and_give_all_back() -> None:
    @shoal.remote  # in here: it travels by value, and no process needs to import this module with all of pytest
    class Small:
        def pid(self) -> int:
            return os.getpid()

    wait_until(lambda: not infos(), "earlier actors to end")
    actors = [Small.remote() for _ in range(200)]
    pids = shoal.get([actor.pid.remote() for actor in actors])
    del actors
    took_s = wait_until(lambda: not any(exists(pid) for pid in pids), "their processes to end")
    assert took_s < 5.0  # about 0.4 s on an idle machine
    wait_until(lambda: not infos(), "control to know")
    assert shoal.available_resources().get("CPU") == 2.0 or wait_until(
        lambda: shoal.available_resources().get("CPU") == 2.0, "their CPUs"
    )


def test_a_kill_that_overtakes_the_start_leads_to_a_restart() -> None:
    for _ in range(5):
        actor = Actor.options(max_restarts=1).remote()
        call = actor.count.remote()
        shoal.kill(actor, no_restart=False)  # the order to start it has just left
        assert shoal.get(call, timeout=30) == 1  # it had not been sent, and waited


# ---------------------------------------------------------------------------------------------------- leaving, crashing


def test_exit_actor_ends_it_on_purpose(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    actor = Actor.options(max_restarts=5).remote(str(trace))
    assert shoal.get(actor.count.remote()) == 1
    calls = [actor.exit.remote(), actor.count.remote()]
    for call in calls:
        with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
            shoal.get(call, timeout=10)
    assert trace.read_text().split() == ["__del__", "atexit"]
    with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
        shoal.get(actor.count.remote())


def test_exit_actor_from_any_thread() -> None:
    @shoal.remote
    class Threads:
        def start(self) -> int:
            threading.Thread(target=self.leave).start()
            return os.getpid()

        def leave(self) -> None:
            shoal.actor.exit_actor()

    for options in ({}, {"max_concurrency": 3}):
        actor = Threads.options(**options).remote()
        shoal.get(actor.start.remote())
        with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
            call_until_dead(actor.leave)


def test_sys_exit_ends_it_and_only_zero_was_meant() -> None:
    actor = Actor.options(max_restarts=1).remote()
    with pytest.raises(ActorDiedError):
        shoal.get(actor.sys_exit.remote(0))
    actor = Actor.options(max_restarts=1).remote()
    with pytest.raises((ActorDiedError, ActorUnavailableError)):
        shoal.get(actor.sys_exit.remote(3))
    assert shoal.get(actor.reconstructed.remote())


def test_sys_exit_with_a_text_says_it() -> None:
    with pytest.raises(ActorDiedError, match=r"(?s)exit code 1.*enough for today"):
        shoal.get(Actor.remote().sys_exit.remote("enough for today"))


def test_restarts_and_retries() -> None:
    actor = Actor.options(max_restarts=2).remote()
    first = shoal.get(actor.pid.remote())
    assert shoal.get([actor.count.remote(), actor.count.remote()]) == [1, 2]
    with pytest.raises(ActorUnavailableError):
        shoal.get(actor.crash.remote())
    assert shoal.get(actor.pid.remote()) != first  # calls made meanwhile wait for the new process
    assert shoal.get(actor.count.remote()) == 1  # which begins anew
    assert shoal.get(actor.reconstructed.remote())
    with pytest.raises(ActorUnavailableError):
        shoal.get(actor.crash.remote())
    assert shoal.get(actor.count.remote()) == 1
    with pytest.raises(ActorDiedError, match="max_restarts is 2"):
        shoal.get(actor.crash.remote())


def test_calls_are_retried_in_order_when_they_may_be(tmp_path: Path) -> None:
    @shoal.remote(max_restarts=-1, max_task_retries=-1)
    class Retried:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def add(self, number: int, marker: str = "") -> list[int]:
            if marker and not os.path.exists(marker):
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self.seen.append(number)
            return list(self.seen)

    actor = Retried.remote()
    calls = [actor.add.remote(1, str(tmp_path / "marker")), actor.add.remote(2), actor.add.remote(3)]
    assert shoal.get(calls) == [[1], [1, 2], [1, 2, 3]]


def test_kill_with_a_restart() -> None:
    actor = Actor.options(max_restarts=1).remote()
    first = shoal.get(actor.pid.remote())
    shoal.kill(actor, no_restart=False)
    wait_until(lambda: not exists(first), "the old process to end")
    assert shoal.get(actor.pid.remote()) != first
    shoal.kill(actor, no_restart=False)
    with pytest.raises(ActorDiedError):
        shoal.get(actor.pid.remote())


def test_large_constructor_arguments_are_there_for_a_restart() -> None:
    @shoal.remote(max_restarts=1)
    class Holds:
        def __init__(self, blob: bytes, ref: list[Any]) -> None:
            self.size = len(blob) + len(shoal.get(ref[0]))

        def get_size(self) -> int:
            return self.size

        def crash(self) -> None:
            os._exit(1)

    actor = Holds.remote(b"b" * 400_000, [shoal.put(b"r" * 400_000)])
    assert shoal.get(actor.get_size.remote()) == 800_000
    with pytest.raises(ActorUnavailableError):
        shoal.get(actor.crash.remote())
    assert shoal.get(actor.get_size.remote()) == 800_000


def test_the_end_of_the_worker_that_made_an_actor_ends_it() -> None:
    parent = Actor.remote()
    child_pid = shoal.get(parent.make.remote())
    [child] = shoal.get(parent.give_child.remote())
    assert shoal.get(child.count.remote()) == 1
    shoal.kill(parent)
    with pytest.raises(ActorDiedError, match="process that created it is gone"):
        call_until_dead(child.count)
    wait_until(lambda: not exists(child_pid), "the child's process to end")


def test_an_actor_outlives_the_worker_that_made_it_and_had_no_more_to_do() -> None:
    @shoal.remote(max_calls=1)
    def make() -> Any:
        return Actor.remote(), os.getpid()

    actor, maker = shoal.get(make.remote())
    wait_until(lambda: not exists(maker), "the worker to leave")
    pid = shoal.get(actor.pid.remote())
    del actor
    wait_until(lambda: not exists(pid), "the actor to end with its last handle")


def test_children_of_an_actor_end_with_it() -> None:
    @shoal.remote
    class Starts:
        def start(self) -> int:
            return subprocess.Popen(["sleep", "1000"]).pid

    actor = Starts.remote()
    pid = shoal.get(actor.start.remote())
    shoal.kill(actor)
    wait_until(lambda: not exists(pid), "the actor's own process to end")


# ------------------------------------------------------------------------------------------------------------ resources


def free(name: str) -> float:
    return shoal.available_resources().get(name, 0.0)


def test_resources_are_held_for_life() -> None:
    wait_until(lambda: free("CPU") == 2.0, "all CPUs to be free")
    plain = Actor.remote()
    assert shoal.get(plain.assigned.remote()) == {}
    wait_until(lambda: free("CPU") == 2.0, "the CPU that it needed to be placed")
    holds = Actor.options(num_cpus=1, resources={"special": 1.5}).remote()
    assert shoal.get(holds.assigned.remote()) == {"CPU": 1.0, "special": 1.5}
    wait_until(lambda: free("special") == 0.5, "what it holds to be seen")
    assert free("CPU") == 1.0
    shoal.kill(holds)
    wait_until(lambda: free("special") == 2.0, "what it held to be free")
    assert free("CPU") == 2.0


def test_actors_wait_their_turn_for_resources() -> None:
    actors = [Actor.options(resources={"special": 1}, num_cpus=0).remote() for _ in range(4)]
    calls = [actor.pid.remote() for actor in actors]
    ready, waiting = shoal.wait(calls, num_returns=2, timeout=10)
    assert len(ready) == 2
    assert len(shoal.wait(calls, num_returns=3, timeout=0.2)[0]) == 2
    shoal.kill(actors[calls.index(ready[0])])
    shoal.kill(actors[calls.index(ready[1])])
    assert len(set(shoal.get(waiting, timeout=10))) == 2


def test_an_actor_gets_its_turn_while_tasks_flood_the_node() -> None:
    """There are always more tasks than CPUs: a node that is asked whether it is free says no as long as they last."""

    @shoal.remote
    def work() -> None:
        time.sleep(0.02)

    flood = [work.remote() for _ in range(400)]  # for some seconds
    shoal.wait(flood, num_returns=10)
    placed, held = Actor.remote(), Actor.options(num_cpus=1).remote()
    shoal.get([placed.pid.remote(), held.pid.remote()], timeout=20)
    assert shoal.wait(flood, num_returns=len(flood), timeout=0)[1], "the tasks were over before the actors began"
    shoal.get(flood)


def test_a_blocked_actor_lends_its_cpus() -> None:
    @shoal.remote
    def child() -> int:
        return 5

    @shoal.remote(num_cpus=1)
    class Parent:
        def ask(self) -> int:
            number: int = shoal.get(child.remote())
            return number

    parents = [Parent.remote() for _ in range(2)]  # they hold all CPUs
    assert shoal.get([parent.ask.remote() for parent in parents], timeout=20) == [5, 5]


def test_the_driver_is_told_of_an_actor_that_no_node_can_take(caplog: pytest.LogCaptureFixture) -> None:
    actor = Actor.options(resources={"unobtainable": 1}).remote()
    call = actor.pid.remote()
    wait_until(lambda: any("unobtainable" in record.getMessage() for record in caplog.records), "a warning", 12.0)
    assert any("has been waiting for a place" in record.getMessage() for record in caplog.records)
    [info] = [info for info in infos("pending") if info.actor_id == actor._actor_id]
    assert info.reason.code == "infeasible"
    shoal.kill(actor)
    with pytest.raises(ActorDiedError):
        shoal.get(call)


# -------------------------------------------------------------------------------------------------------- other drivers

DRIVER = """
import os, sys
import shoal
shoal.init(address=sys.argv[1], namespace="shared", log_to_driver=False)

@shoal.remote
class Counter:
    def __init__(self, start): self.value = len(start)
    def add(self): self.value += 1; return self.value
    def pid(self): return os.getpid()

kept = Counter.options(name="kept", lifetime="detached").remote(b"x" * 200_000)
mortal = Counter.options(name="mortal").remote(b"")
print(shoal.get([kept.add.remote(), mortal.add.remote()]), shoal.get(mortal.pid.remote()), flush=True)
sys.stdin.readline()
if sys.argv[2] == "kill":
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["leave", "kill"])
def test_detached_actors_outlive_their_driver_and_others_do_not(how: str) -> None:
    name = shoal.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, name, how],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        line = process.stdout.readline()
        assert line.startswith("[200001, 1]"), line
        mortal_pid = int(line.split()[-1])
        kept = shoal.get_actor("kept", namespace="shared")
        assert shoal.get(kept.add.remote()) == 200_002
        process.stdin.write("\n")
        process.stdin.close()
        process.wait(10)
    wait_until(lambda: not exists(mortal_pid), "the driver's actor to end", 5.0)
    with pytest.raises(ValueError, match="mortal"):
        shoal.get_actor("mortal", namespace="shared")
    assert shoal.get(kept.add.remote()) == 200_003
    pid = shoal.get(kept.pid.remote())
    del kept
    again = shoal.get_actor("kept", namespace="shared")
    assert shoal.get(again.pid.remote()) == pid
    shoal.kill(again)
    wait_until(lambda: not exists(pid), "the detached actor to end")
