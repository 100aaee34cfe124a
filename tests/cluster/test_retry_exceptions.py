"""`retry_exceptions`: errors of user code that are tried again, how often, and in which order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import TaskCancelledError, TaskError

pytestmark = pytest.mark.usefixtures("local")

LIMIT_S = 30.0


class Flaky(ValueError):
    pass


class Unreadable(Flaky):
    """Cannot be unpickled anywhere."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("unpickled")


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for {what}"
        time.sleep(0.005)


def attempt(file: Path) -> int:
    """Counts its calls, over processes."""
    with file.open("a") as out:
        out.write(".")
    return len(file.read_text())


def attempts(file: Path) -> int:
    return len(file.read_text())


@shoal.remote
def fail(file: Path, times: int, error: type[Exception] = Flaky) -> int:
    number = attempt(file)
    if number <= times:
        raise error(f"attempt {number}")
    return number


@pytest.mark.parametrize(
    ("retry_exceptions", "error", "tries"),
    [
        (False, Flaky, 1),
        (True, Flaky, 4),
        ([ValueError], Flaky, 4),
        ((KeyError, Flaky), Flaky, 4),
        ([Flaky], Unreadable, 4),
        ([KeyError], Flaky, 1),
        ([], Flaky, 1),
    ],
)
def test_which_errors_are_tried_again(
    tmp_path: Path, retry_exceptions: Any, error: type[Exception], tries: int
) -> None:
    ref = fail.options(retry_exceptions=retry_exceptions).remote(tmp_path / "n", 100, error)
    with pytest.raises(TaskError, match=f"attempt {tries}"):
        shoal.get(ref, timeout=LIMIT_S)
    assert attempts(tmp_path / "n") == tries, "max_retries is 3"


@pytest.mark.parametrize(
    ("max_retries", "times", "works"), [(0, 1, False), (1, 1, True), (1, 2, False), (-1, 40, True)]
)
def test_how_often(tmp_path: Path, max_retries: int, times: int, works: bool) -> None:
    ref = fail.options(retry_exceptions=True, max_retries=max_retries).remote(tmp_path / "n", times)
    if works:
        assert shoal.get(ref, timeout=LIMIT_S) == times + 1
    else:
        with pytest.raises(Flaky):
            shoal.get(ref, timeout=LIMIT_S)
        assert attempts(tmp_path / "n") == max_retries + 1


def test_the_driver_says_so_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    shoal.get(
        fail.options(name="twice", retry_exceptions=True, max_retries=2).remote(tmp_path / "n", 2), timeout=LIMIT_S
    )
    said = [record.message for record in caplog.records if "is tried again" in record.message]
    assert said == [
        "twice is tried again (1 more after this) because it raised Flaky: attempt 1",
        "twice is tried again (0 more after this) because it raised Flaky: attempt 2",
    ]
    caplog.clear()
    shoal.get(
        fail.options(name="often", retry_exceptions=True, max_retries=-1).remote(tmp_path / "m", 100), timeout=LIMIT_S
    )
    said = [record.message for record in caplog.records if "is tried again" in record.message]
    assert len(said) == 13, "ten, and at 16, 32 and 64"
    assert "number 64 of this function" in said[-1]


def test_an_error_that_came_from_another_task_and_several_returns(tmp_path: Path) -> None:
    @shoal.remote(retry_exceptions=[Flaky], num_returns=2)
    def parent(file: Path) -> tuple[int, int]:
        return attempt(file), shoal.get(fail.remote(file.with_name("child"), 2))

    assert shoal.get(list(parent.remote(tmp_path / "n")), timeout=LIMIT_S) == [3, 3]  # type: ignore[call-overload]


def test_an_argument_that_failed_is_not_tried_again(tmp_path: Path) -> None:
    bad = fail.remote(tmp_path / "bad", 9)
    with pytest.raises(Flaky):
        shoal.get(fail.options(retry_exceptions=True).remote(tmp_path / "n", bad), timeout=LIMIT_S)
    assert not (tmp_path / "n").exists()
    assert attempts(tmp_path / "bad") == 1


def test_errors_and_crashes_use_up_the_same_retries(tmp_path: Path) -> None:
    @shoal.remote(retry_exceptions=True, max_retries=2)
    def falls(file: Path) -> None:
        if attempt(file) == 2:
            os._exit(3)
        raise Flaky

    with pytest.raises(Flaky):
        shoal.get(falls.remote(tmp_path / "n"), timeout=LIMIT_S)
    assert attempts(tmp_path / "n") == 3


def test_each_attempt_counts_as_a_call_of_max_calls(tmp_path: Path) -> None:
    @shoal.remote(retry_exceptions=True, max_calls=1, max_retries=2)
    def run(folder: Path) -> int:
        (folder / str(os.getpid())).touch()
        if len(os.listdir(folder)) < 3:
            raise Flaky
        return len(os.listdir(folder))

    assert shoal.get(run.remote(tmp_path), timeout=LIMIT_S) == 3


def test_cancel_ends_a_call_that_is_tried_again_for_ever(tmp_path: Path) -> None:
    endless = fail.options(retry_exceptions=True, max_retries=-1)
    refs = [endless.remote(tmp_path / str(i), 10**9) for i in range(3)]
    until(lambda: all((tmp_path / str(i)).exists() and attempts(tmp_path / str(i)) > 3 for i in range(3)), "attempts")
    assert shoal.get(fail.remote(tmp_path / "other", 0), timeout=LIMIT_S) == 1, "they hold nobody up"
    for ref in refs:
        shoal.cancel(ref)
        with pytest.raises((TaskCancelledError, Flaky)):
            shoal.get(ref, timeout=LIMIT_S)


# --------------------------------------------------------------------------------------------------------------- actors


@shoal.remote(num_cpus=0, max_task_retries=2)
class Steps:
    def __init__(self) -> None:
        self.log: list[str] = []
        self.tries: dict[str, int] = {}

    @shoal.method(retry_exceptions=[ValueError])
    def step(self, name: str, times: int = 0) -> str:
        self.log.append(name)
        self.tries[name] = self.tries.get(name, 0) + 1
        if self.tries[name] <= times:
            raise Flaky(name)
        return name

    def plain(self, name: str, times: int = 0) -> str:
        self.log.append(name)
        self.tries[name] = self.tries.get(name, 0) + 1
        if self.tries[name] <= times:
            raise Flaky(name)
        return name

    def seen(self) -> list[str]:
        return self.log


def test_calls_of_an_actor_keep_their_order_over_retries() -> None:
    actor = Steps.remote()
    refs = [actor.plain.remote("a"), actor.step.remote("b", 2), actor.plain.remote("c"), actor.step.remote("d", 1)]
    refs += [actor.plain.remote("e")]
    assert shoal.get(refs, timeout=LIMIT_S) == ["a", "b", "c", "d", "e"]
    assert shoal.get(actor.seen.remote(), timeout=LIMIT_S) == list("abbbcdde")


def test_the_retries_of_a_method_and_who_decides_them() -> None:
    actor = Steps.remote()
    failing = [
        (actor.step, 3),  # max_task_retries of the class
        (actor.plain, 1),  # no retry_exceptions
        (actor.plain.options(retry_exceptions=True), 3),
        (actor.step.options(retry_exceptions=False), 1),
        (actor.step.options(max_task_retries=4), 5),
        (Steps.options(max_task_retries=0).remote().step, 1),
    ]
    for number, (method, tries) in enumerate(failing):
        name = f"x{number}"
        with pytest.raises(Flaky):
            shoal.get(method.remote(name, 100), timeout=LIMIT_S)
        if number < 5:
            assert shoal.get(actor.seen.remote()).count(name) == tries, number


def test_a_handle_in_another_process_knows_the_retries() -> None:
    @shoal.remote(num_cpus=0)
    def use(actor: Any) -> str:
        return str(shoal.get(actor.step.remote("far", 2)))

    actor = Steps.remote()
    assert shoal.get(use.remote(actor), timeout=LIMIT_S) == "far"
    assert shoal.get(actor.seen.remote()) == ["far"] * 3


def test_an_async_actor_tries_again() -> None:
    @shoal.remote(num_cpus=0, max_task_retries=-1)
    class Tries:
        def __init__(self) -> None:
            self.count = 0

        @shoal.method(retry_exceptions=True)
        async def step(self) -> int:
            self.count += 1
            if self.count < 5:
                raise Flaky
            return self.count

    assert shoal.get(Tries.remote().step.remote(), timeout=LIMIT_S) == 5
