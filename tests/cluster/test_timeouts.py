"""`timeout_s`: a call that runs for too long is ended, and says so."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import ShoalError, TaskTimeoutError

pytestmark = pytest.mark.usefixtures("local")

LIMIT_S = 30.0
SHORT_S = 0.05


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for {what}"
        time.sleep(0.005)


def timed_out(ref: shoal.ObjectRef[Any]) -> TaskTimeoutError:
    with pytest.raises(TaskTimeoutError) as error:
        shoal.get(ref, timeout=LIMIT_S)
    return error.value


@shoal.remote(num_cpus=0)
def sleeper(begun: str = "") -> None:
    if begun:
        Path(begun).touch()
    try:
        time.sleep(1000)
    except KeyboardInterrupt:
        if begun:
            Path(begun + "-interrupted").touch()
        raise


def test_a_task_is_interrupted_and_the_error_says_what_and_where(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=2, timeout_s=0.5)
    def slow(pid_file: Path) -> None:
        pid_file.write_text(str(os.getpid()))
        try:
            time.sleep(1000)
        finally:
            assert shoal.get_runtime_context().is_canceled()

    error = timed_out(slow.remote(tmp_path / "pid"))
    assert isinstance(error, TimeoutError)
    assert isinstance(error, ShoalError)
    assert error.timeout_s == 0.5
    assert error.function_name.endswith("slow")
    assert error.pid == int((tmp_path / "pid").read_text())
    assert error.node_id == shoal.get_runtime_context().get_node_id()
    assert "ran for longer than timeout_s=0.5" in str(error)
    assert "it was ended" in str(error)

    @shoal.remote(num_cpus=2)
    def pid() -> int:
        return os.getpid()

    assert shoal.get(pid.remote(), timeout=LIMIT_S) == error.pid, "the worker goes on"


def test_calls_in_time_are_left_alone_and_waiting_does_not_count() -> None:
    @shoal.remote(num_cpus=2, timeout_s=20)
    def quick(number: int) -> int:
        return number

    assert shoal.get([quick.remote(i) for i in range(500)], timeout=LIMIT_S) == list(range(500))

    @shoal.remote(num_cpus=2)
    def hold() -> None:
        time.sleep(3 * SHORT_S)

    holding = hold.remote()
    assert shoal.get(quick.options(timeout_s=2 * SHORT_S).remote(1), timeout=LIMIT_S) == 1
    shoal.get(holding)


def test_what_it_does_afterwards_changes_nothing(tmp_path: Path) -> None:
    @shoal.remote
    def returns() -> str:
        try:
            time.sleep(1000)
        except KeyboardInterrupt:
            return "a value"
        return "not reached"

    @shoal.remote
    def raises() -> None:
        try:
            time.sleep(1000)
        finally:
            raise ValueError("cleanup")

    @shoal.remote
    def exits() -> None:
        try:
            time.sleep(1000)
        finally:
            raise SystemExit(3)

    for function in (returns, raises, exits):
        timed_out(function.options(timeout_s=SHORT_S).remote())


def test_one_that_does_not_leave_ends_with_its_process_and_no_other_is_lost(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=2, timeout_s=0.3)
    def stubborn(file: Path) -> None:
        with file.open("a") as out:
            out.write(".")
        while True:
            try:
                time.sleep(1000)
            except KeyboardInterrupt:
                continue

    @shoal.remote(num_cpus=2, max_retries=0)
    def once(number: int) -> int:
        return number

    shoal.get([once.remote(i) for i in range(20)])
    ref = stubborn.remote(tmp_path / "n")
    behind = [once.remote(i) for i in range(20)]
    error = timed_out(ref)
    assert shoal.get(behind, timeout=LIMIT_S) == list(range(20))
    until(lambda: not Path(f"/proc/{error.pid}").exists(), "the process to end")
    assert (tmp_path / "n").read_text() == ".", "it was not tried again"


def test_what_it_submitted_is_cancelled(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=0)
    def parent(begun: str) -> None:
        shoal.get(sleeper.remote(begun))

    begun = tmp_path / "begun"
    timed_out(parent.options(timeout_s=0.3).remote(str(begun)))
    if begun.exists():  # else it was dropped before
        until(Path(f"{begun}-interrupted").exists, "the child to be interrupted")


@pytest.mark.parametrize(("retry_exceptions", "tries"), [(False, 1), ([KeyError], 1), ([TimeoutError], 3), (True, 3)])
def test_tried_again_only_when_retry_exceptions_says_so(tmp_path: Path, retry_exceptions: Any, tries: int) -> None:
    @shoal.remote(timeout_s=0.2, max_retries=2, retry_exceptions=retry_exceptions)
    def slow(file: Path) -> None:
        with file.open("a") as out:
            out.write(".")
        time.sleep(1000)

    timed_out(slow.remote(tmp_path / "n"))
    assert len((tmp_path / "n").read_text()) == tries


def test_cancelled_or_out_of_time_but_not_both(tmp_path: Path) -> None:
    ref = sleeper.options(timeout_s=1000).remote(str(tmp_path / "begun"))
    until((tmp_path / "begun").exists, "the task to begin")
    shoal.cancel(ref)
    with pytest.raises(shoal.exceptions.TaskCancelledError):
        shoal.get(ref, timeout=LIMIT_S)


def test_a_call_that_ends_as_its_time_runs_out_has_one_outcome() -> None:
    @shoal.remote(num_cpus=0, timeout_s=0.002, max_retries=0)
    def spin(number: int, seconds: float) -> int:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return number

    refs = [spin.remote(i, 0.0016 + i % 8 * 0.0001) for i in range(300)]
    outcomes = set()
    for number, ref in enumerate(refs):
        try:
            assert shoal.get(ref, timeout=LIMIT_S) == number
            outcomes.add("value")
        except TaskTimeoutError:
            outcomes.add("timeout")
    assert outcomes


# --------------------------------------------------------------------------------------------------------------- actors


class Slow:
    @shoal.method(timeout_s=SHORT_S)
    def hold(self) -> str:
        while not shoal.get_runtime_context().is_canceled():
            time.sleep(0.002)
        return "too late"

    @shoal.method(timeout_s=20)
    def quick(self, number: int) -> int:
        return number


@pytest.mark.parametrize("threads", [1, 3])
def test_a_synchronous_actor_is_told_and_goes_on(threads: int) -> None:
    actor = shoal.remote(Slow).options(num_cpus=0, max_concurrency=threads).remote()
    held = [actor.hold.remote() for _ in range(3)]
    behind = [actor.quick.remote(i) for i in range(20)]
    for ref in held:
        error = timed_out(ref)
        assert error.function_name == "Slow.hold"
        assert "it was told to stop" in str(error)
    assert shoal.get(behind, timeout=LIMIT_S) == list(range(20))

    @shoal.remote(num_cpus=0)
    def use(actor: Any) -> None:
        shoal.get(actor.hold.remote())

    with pytest.raises(TimeoutError):
        shoal.get(use.remote(actor), timeout=LIMIT_S)


def test_an_async_actor_gets_a_cancellation() -> None:
    @shoal.remote(num_cpus=0)
    class Waits:
        def __init__(self) -> None:
            self.events: list[str] = []

        async def hold(self, name: str) -> str:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.events.append(name)
                if name == "returns":
                    return "a value"
                if name == "stays":
                    await asyncio.Event().wait()
                raise
            return "not reached"

        async def seen(self) -> list[str]:
            return self.events

    actor = Waits.remote()
    hold = actor.hold.options(timeout_s=SHORT_S)
    for ref in [hold.remote("raises"), hold.remote("returns"), hold.remote("stays")]:
        timed_out(ref)
    assert sorted(shoal.get(actor.seen.remote(), timeout=LIMIT_S)) == ["raises", "returns", "stays"]
