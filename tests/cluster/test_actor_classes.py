"""Classes of every kind as actors; several drivers and threads at one actor."""

from __future__ import annotations

import abc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

import pytest

import shoal
from shoal.exceptions import ActorDiedError

pytestmark = pytest.mark.usefixtures("local")
T = TypeVar("T")
REPOSITORY = str(Path(shoal.__file__).parents[1])


class Shape(abc.ABC, Generic[T]):
    def __init__(self, size: T) -> None:
        self.size = size

    @abc.abstractmethod
    def area(self) -> float: ...

    def describe(self) -> tuple[str, float]:
        return type(self).__name__, self.area()


class Named:
    names = ("a", "b")

    @property
    def name(self) -> str:
        return "never seen from outside"

    @classmethod
    def kind(cls) -> str:
        return cls.__name__

    @staticmethod
    def double(x: int) -> int:
        return 2 * x

    @shoal.method(num_returns=2)
    def both(self) -> tuple[str, ...]:
        return self.names


@shoal.remote
class Square(Named, Shape[int]):
    def area(self) -> float:
        return self.size**2

    def describe(self) -> tuple[str, float]:
        name, area = super().describe()
        return name.lower(), area

    def __call__(self, by: int) -> int:
        return self.size * by

    def __len__(self) -> int:
        return self.size


def test_methods_come_from_all_bases() -> None:
    square = Square.remote(3)
    calls = [
        square.area.remote(), square.describe.remote(), square.kind.remote(), square.double.remote(4),
        *square.both.remote(), square.__call__.remote(5), square.__len__.remote(),
    ]  # fmt: skip
    assert shoal.get(calls, timeout=30) == [9, ("square", 9), "Square", 8, "a", "b", 15, 3]
    for attribute in ("name", "names"):
        with pytest.raises(AttributeError, match=rf"no method {attribute!r}.*area.*attributes are not visible"):
            getattr(square, attribute)
    for left_over in (Square, square.area):
        assert not hasattr(left_over, "bind")
        with pytest.raises(AttributeError, match=r"not supported yet; call \.remote"):
            left_over.bind  # noqa: B018


def test_an_abstract_class_says_what_is_missing() -> None:
    shape = shoal.remote(Shape).remote(1)  # type: ignore[type-abstract]
    with pytest.raises(ActorDiedError, match="abstract"):
        shoal.get(shape.describe.remote(), timeout=30)


def test_leaving_in_a_thread_of_the_users_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    @shoal.remote
    class Leaver:
        def leave(self) -> None:
            thread = threading.Thread(target=shoal.actor.exit_actor)
            thread.start()
            thread.join()
            print("left")

    leaver = Leaver.options(max_restarts=-1).remote()
    call = leaver.leave.remote()
    shoal.wait([call], timeout=30)
    with pytest.raises(ActorDiedError, match=r"exit_actor\(\) was called"):
        shoal.get(leaver.__ray_ready__.remote(), timeout=30)
    assert "Traceback" not in capfd.readouterr().err


def test_ending_by_a_call_says_so() -> None:
    square = Square.remote(1)
    calls = [square.area.remote(), square.__ray_terminate__.remote(), square.area.remote()]
    assert shoal.get(calls[0], timeout=30) == 1  # it comes in its turn
    for call in calls[1:]:
        with pytest.raises(ActorDiedError, match="__ray_terminate__"):
            shoal.get(call, timeout=30)


def test_threads_share_a_handle() -> None:
    @shoal.remote
    class Log:
        def __init__(self) -> None:
            self.lines: list[tuple[int, int]] = []

        def write(self, who: int, what: int) -> None:
            self.lines.append((who, what))

        def read(self) -> list[tuple[int, int]]:
            return self.lines

    log = Log.remote()

    def work(who: int) -> None:
        shoal.get([log.write.remote(who, n) for n in range(200)], timeout=30)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    lines = shoal.get(log.read.remote(), timeout=30)
    assert all([n for who, n in lines if who == me] == list(range(200)) for me in range(6))


DRIVER = """
import os, sys
import shoal
shoal.init(address=sys.argv[1], namespace="race", log_to_driver=False)

@shoal.remote(num_cpus=0)
class Shared:
    def __init__(self): self.lines = []
    def write(self, who, what): self.lines.append((who, what))
    def pid(self): return os.getpid()
    def lines_of(self, who): return [what for writer, what in self.lines if writer == who]

sys.stdin.readline()
shared = Shared.options(name="one", get_if_exists=True, lifetime="detached").remote()
me = os.getpid()
for n in range(100): shared.write.remote(me, n)
assert shoal.get(shared.lines_of.remote(me)) == list(range(100))
print(shoal.get(shared.pid.remote()), shoal.util.list_named_actors(), flush=True)
"""


def test_drivers_that_race_for_a_name_share_one_actor() -> None:
    address = shoal.get_runtime_context().gcs_address
    environment = {**os.environ, "PYTHONPATH": REPOSITORY}
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for _ in range(3)
    ]  # fmt: skip
    said = []
    for driver in drivers:  # all are about to begin
        assert driver.stdin is not None
        driver.stdin.write("\n")
        driver.stdin.flush()
    for driver in drivers:
        out, _ = driver.communicate(timeout=60)
        assert driver.returncode == 0
        said.append(out)
    assert len(set(said)) == 1
    assert said[0].endswith("['one']\n")
    shoal.kill(shoal.get_actor("one", namespace="race"))


def test_a_detached_actor_that_nobody_else_can_find_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    kept = Square.options(name="hidden", lifetime="detached").remote(1)
    assert "namespace=" in caplog.text
    assert "'hidden'" in caplog.text
    shoal.kill(kept)
    caplog.clear()
    kept = Square.options(name="hidden", lifetime="detached", namespace="known").remote(1)
    assert not caplog.records
    shoal.kill(kept)
