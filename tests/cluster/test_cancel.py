"""`cancel`: whatever a call is doing when it is cancelled, it has one outcome, and nobody else is hit."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import TaskCancelledError, WorkerCrashedError

pytestmark = pytest.mark.usefixtures("local")

LIMIT_S = 30.0


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:.0f} s for {what}"
        time.sleep(0.005)


def cancelled(ref: shoal.ObjectRef[Any]) -> bool:
    with pytest.raises(TaskCancelledError):
        shoal.get(ref, timeout=LIMIT_S)
    return True


@shoal.remote
def add(a: int, b: int = 1) -> int:
    return a + b


def sleep(_: Path) -> None:
    time.sleep(1000)


def lock(_: Path) -> None:
    held = threading.Lock()
    held.acquire()
    held.acquire()


def read(_: Path) -> None:
    here, _there = socket.socketpair()
    here.recv(1)


def spin(_: Path) -> None:
    while True:
        pass


def get(folder: Path) -> None:
    shoal.get(add.options(resources={"unobtainium": 1}).remote(1))


def wait(folder: Path) -> None:
    shoal.wait([add.options(resources={"unobtainium": 1}).remote(1)])


@pytest.mark.parametrize("block", [sleep, lock, read, spin, get, wait], ids=lambda f: f.__name__)
def test_a_running_task_is_interrupted_once_and_its_worker_goes_on(
    tmp_path: Path, block: Callable[[Path], None]
) -> None:
    @shoal.remote(num_cpus=2)
    def run(folder: Path) -> None:
        (folder / "pid").write_text(str(os.getpid()))
        try:
            (folder / "begun").touch()
            block(folder)
        except KeyboardInterrupt:
            for _ in range(100_000):
                pass  # a second one would come here
            (folder / "interrupted").touch()
            raise
        finally:
            (folder / "left").touch()

    @shoal.remote(num_cpus=2)
    def pid() -> int:
        return os.getpid()

    ref = run.remote(tmp_path)
    until((tmp_path / "begun").exists, "the task to begin")
    for _ in range(3):
        shoal.cancel(ref)
    with pytest.raises(TaskCancelledError, match=r"run was cancelled while it ran on pid"):
        shoal.get(ref, timeout=LIMIT_S)
    assert (tmp_path / "interrupted").exists()
    assert (tmp_path / "left").exists()
    assert shoal.get(pid.remote(), timeout=LIMIT_S) == int((tmp_path / "pid").read_text())
    shoal.cancel(ref)
    assert cancelled(ref)


def test_what_a_cancelled_task_does_with_the_interrupt_decides(tmp_path: Path) -> None:
    @shoal.remote
    def save(begun: Path) -> str:
        try:
            begun.touch()
            time.sleep(1000)
        except KeyboardInterrupt:
            return f"saved, cancelled={shoal.get_runtime_context().is_canceled()}"
        return "not reached"

    @shoal.remote
    def stumble(begun: Path) -> None:
        try:
            begun.touch()
            time.sleep(1000)
        finally:
            raise ValueError("the file was never opened")

    saves, stumbles = save.remote(tmp_path / "saves"), stumble.remote(tmp_path / "stumbles")
    for name, ref in (("saves", saves), ("stumbles", stumbles)):
        until((tmp_path / name).exists, "the task to begin")
        shoal.cancel(ref)
    assert shoal.get(saves, timeout=LIMIT_S) == "saved, cancelled=True", "it finished, with a value"
    with pytest.raises(TaskCancelledError, match="on its way out it raised ValueError: the file was never opened"):
        shoal.get(stumbles, timeout=LIMIT_S)


def test_an_interrupt_hits_only_the_call_it_was_meant_for() -> None:
    """Short calls that end, begin and queue up while some of them are cancelled at random moments."""

    @shoal.remote
    def spin(number: int, seconds: float) -> int:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return number

    rng = random.Random(7)
    shoal.get([spin.remote(0, 0.0002) for _ in range(50)])
    for _ in range(6):
        refs = [spin.remote(i, rng.choice([0.0, 0.0002, 0.001])) for i in range(100)]
        victims = set(rng.sample(range(100), 30))
        for number in sorted(victims, key=lambda _: rng.random()) if rng.random() < 0.5 else sorted(victims):
            shoal.wait(refs, num_returns=rng.randint(1, 20), timeout=rng.choice([0, 0.001]))
            shoal.cancel(refs[number])
        for number, ref in enumerate(refs):
            try:
                assert shoal.get(ref, timeout=LIMIT_S) == number
            except TaskCancelledError:
                assert number in victims


def test_calls_that_were_sent_ahead_are_dropped_at_once(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=2)
    def step(path: str) -> None:
        if path:
            Path(path, "begun").touch()
            while not Path(path, "go").exists():
                time.sleep(0.005)

    shoal.get([step.remote("") for _ in range(100)])
    first = step.remote(str(tmp_path))
    behind = [step.remote("") for _ in range(50)]
    until((tmp_path / "begun").exists, "the first to begin")
    for ref in behind[::2]:
        shoal.cancel(ref)
    assert all(cancelled(ref) for ref in behind[::2]), "while the first one still runs"
    (tmp_path / "go").touch()
    assert shoal.get([first, *behind[1::2]], timeout=LIMIT_S) == [None] * 26


def test_all_results_of_a_cancelled_task_and_what_depends_on_it_end(tmp_path: Path) -> None:
    @shoal.remote(num_returns=2)
    def two(begun: Path) -> tuple[int, int]:
        begun.touch()
        time.sleep(1000)
        return 1, 2

    refs = two.remote(tmp_path / "begun")
    dependent = add.remote(refs[0])  # type: ignore[index]
    behind = add.remote(dependent)
    never = add.remote(dependent)
    shoal.cancel(never)
    assert cancelled(never)
    until((tmp_path / "begun").exists, "the task to begin")
    shoal.cancel(refs[1])  # type: ignore[index]
    assert all(map(cancelled, [*refs, dependent, behind]))


def test_what_is_not_there_to_be_cancelled() -> None:
    done = add.remote(1)
    shoal.get(done, timeout=LIMIT_S)
    value = shoal.put(3)
    for ref in (done, value):
        shoal.cancel(ref)
        shoal.cancel(ref, force=True)
    assert shoal.get([done, value]) == [2, 3]


def test_force_ends_the_process_of_a_running_task_and_no_other_is_lost(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=2, max_retries=3)
    def stubborn(folder: Path) -> None:
        if folder.name == "busy":
            import ctypes

            (folder / f"begun-{os.getpid()}").touch()
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter: not even our own thread runs
        while True:
            try:
                (folder / f"begun-{os.getpid()}").touch()
                time.sleep(1000)
            except KeyboardInterrupt:
                (folder / "swallowed").touch()

    @shoal.remote(num_cpus=2, max_retries=0)
    def once() -> str:
        return "ran"

    for name in ("polite", "busy"):
        folder = tmp_path / name
        folder.mkdir()
        ref = stubborn.remote(folder)
        behind = [once.remote() for _ in range(5)]
        until(lambda folder=folder: list(folder.glob("begun-*")), "the task to begin")
        if name == "polite":
            shoal.cancel(ref)
            until((folder / "swallowed").exists, "the interrupt")
        shoal.cancel(ref, force=True)
        with pytest.raises(WorkerCrashedError, match=r"stubborn.*cancel\(force=True\)"):
            shoal.get(ref, timeout=LIMIT_S)
        assert shoal.get(behind, timeout=LIMIT_S) == ["ran"] * 5
        assert len(list(folder.glob("begun-*"))) == 1, "it was not tried again"


@shoal.remote(num_cpus=0)
def tree(folder: str, name: str, depth: int) -> None:
    """A task that waits for two like it, one of which never gets its worker."""
    Path(folder, f"begun-{name}").touch()
    try:
        if depth == 0:
            time.sleep(1000)
        shoal.get(
            [
                tree.remote(folder, name + "a", depth - 1),
                tree.options(resources={"unobtainium": 1}).remote(folder, name + "b", depth - 1),
                add.remote(tree.remote(folder, name + "c", 0)),  # type: ignore[arg-type]
            ]
        )
    except KeyboardInterrupt:
        Path(folder, f"interrupted-{name}").touch()
        raise


def names(folder: Path, what: str) -> set[str]:
    return {path.name.removeprefix(what + "-") for path in folder.glob(f"{what}-*")}


def test_recursive_cancels_all_that_a_task_submitted_and_nothing_else(tmp_path: Path) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    for folder in (mine, others):
        folder.mkdir()
    everybody = {"x", "xa", "xaa", "xc", "xac"}
    first, second = tree.remote(str(mine), "x", 2), tree.remote(str(others), "x", 2)
    until(lambda: names(mine, "begun") == names(others, "begun") == everybody, "all to begin")
    shoal.cancel(first)
    until(lambda: names(mine, "interrupted") == everybody, "all to be interrupted")
    assert cancelled(first)
    assert names(others, "interrupted") == set()
    shoal.cancel(second, recursive=False)
    assert cancelled(second)
    assert names(others, "interrupted") == {"x"}


def test_recursive_and_force(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=0)
    def leaf(pid_file: str) -> None:
        Path(pid_file + ".new").write_text(str(os.getpid()))
        os.rename(pid_file + ".new", pid_file)
        time.sleep(1000)

    @shoal.remote(num_cpus=0)
    def root(pid_file: str) -> None:
        shoal.get(leaf.remote(pid_file))

    pid_file = tmp_path / "pid"
    ref = root.remote(str(pid_file))
    until(pid_file.exists, "the leaf to begin")
    shoal.cancel(ref, force=True)
    with pytest.raises(WorkerCrashedError):
        shoal.get(ref, timeout=LIMIT_S)
    until(lambda: not Path("/proc", pid_file.read_text()).exists(), "the leaf's process to end")


def test_one_that_borrows_a_reference_can_cancel_it(tmp_path: Path) -> None:
    @shoal.remote(num_cpus=0)
    def cancel(refs: list[shoal.ObjectRef[Any]], force: bool) -> None:
        for ref in refs:
            shoal.cancel(ref, force=force)

    for force in (False, True):
        folder = tmp_path / str(force)
        folder.mkdir()
        running = tree.remote(str(folder), "x", 1)
        queued = add.options(resources={"unobtainium": 1}).remote(1)
        until(lambda folder=folder: names(folder, "begun") == {"x", "xa", "xc"}, "all to begin")
        shoal.get(cancel.remote([running, queued], force), timeout=LIMIT_S)
        with pytest.raises(WorkerCrashedError if force else TaskCancelledError):
            shoal.get(running, timeout=LIMIT_S)
        assert cancelled(queued)


# --------------------------------------------------------------------------------------------------------------- actors


@shoal.remote
class Slow:
    def __init__(self) -> None:
        self.log: list[str] = []

    def hold(self, folder: Path, name: str = "") -> str:
        (folder / f"begun{name}").touch()
        while not (folder / "go").exists():
            if shoal.get_runtime_context().is_canceled():
                return f"stopped{name}"
            time.sleep(0.002)
        return "went"

    def note(self, text: str) -> str:
        self.log.append(text)
        return text

    def seen(self) -> list[str]:
        return self.log

    def fail_when_cancelled(self, folder: Path) -> None:
        self.hold(folder)
        raise ValueError("stopped early")


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_of_an_actor(tmp_path: Path, threads: int) -> None:
    actor = Slow.options(num_cpus=0, max_concurrency=threads).remote()
    holds = [actor.hold.remote(tmp_path, str(i)) for i in range(threads)]
    behind = [actor.note.remote(str(i)) for i in range(6)]
    for i in range(threads):
        until((tmp_path / f"begun{i}").exists, "the call to begin")
    for ref in behind[1::2]:
        shoal.cancel(ref)
    assert all(cancelled(ref) for ref in behind[1::2]), "while it is busy"
    with pytest.raises(ValueError, match=r"force=True ends the worker process, and that of Slow\.hold is an actor"):
        shoal.cancel(holds[0], force=True)
    shoal.cancel(holds[0])
    assert shoal.get(holds[0], timeout=LIMIT_S) == "stopped0", "it was told, and nothing more"
    (tmp_path / "go").touch()
    assert shoal.get(holds[1:], timeout=LIMIT_S) == ["went"] * (threads - 1)
    assert shoal.get(behind[::2], timeout=LIMIT_S) == ["0", "2", "4"]
    assert sorted(shoal.get(actor.seen.remote(), timeout=LIMIT_S)) == ["0", "2", "4"]
    assert shoal.get(actor.note.remote("on"), timeout=LIMIT_S) == "on"


def test_a_cancelled_call_of_an_actor_that_raises_was_cancelled(tmp_path: Path) -> None:
    actor = Slow.options(num_cpus=0).remote()
    ref = actor.fail_when_cancelled.remote(tmp_path)
    until((tmp_path / "begun").exists, "the call to begin")
    shoal.cancel(ref)
    with pytest.raises(TaskCancelledError, match="ValueError: stopped early"):
        shoal.get(ref, timeout=LIMIT_S)


def test_calls_of_an_async_actor() -> None:
    import asyncio

    @shoal.remote(num_cpus=0, max_concurrency=3)
    class Waits:
        def __init__(self) -> None:
            self.events: list[str] = []
            self.begun = 0

        async def hold(self, name: str) -> str:
            self.begun += 1
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.events.append(name)
                if name == "swallows":
                    return "a value"
                raise
            return "not reached"

        async def count(self) -> tuple[int, list[str]]:
            return self.begun, self.events

        async def asks(self) -> bool:
            return shoal.get_runtime_context().is_canceled()

    actor = Waits.remote()
    with pytest.raises(RuntimeError, match="does not work in an async actor"):
        shoal.get(actor.asks.remote(), timeout=LIMIT_S)
    plain, swallows = actor.hold.remote("plain"), actor.hold.remote("swallows")
    until(lambda: shoal.get(actor.count.remote())[0] == 2, "both to begin")
    third = actor.hold.remote("third")
    waiting = actor.hold.remote("waiting")
    shoal.cancel(waiting)
    assert cancelled(waiting)
    for ref in (plain, swallows, third):
        shoal.cancel(ref)
    assert cancelled(plain)
    assert shoal.get(swallows, timeout=LIMIT_S) == "a value"
    assert cancelled(third)
    begun, events = shoal.get(actor.count.remote(), timeout=LIMIT_S)
    assert "waiting" not in events
    assert begun <= 3


def test_a_call_cancels_what_it_submitted_to_an_actor(tmp_path: Path) -> None:
    actor = Slow.options(num_cpus=0).remote()

    @shoal.remote(num_cpus=0)
    def caller(actor: Any) -> None:
        shoal.get([actor.hold.remote(tmp_path), actor.note.remote("never")])

    ref = caller.remote(actor)
    until((tmp_path / "begun").exists, "the call to begin")
    shoal.cancel(ref)
    assert cancelled(ref)
    assert shoal.get(actor.seen.remote(), timeout=LIMIT_S) == []
    assert not (tmp_path / "go").exists()


def test_is_canceled_asks_where_there_is_something_to_cancel() -> None:
    with pytest.raises(RuntimeError, match="only inside a task"):
        shoal.get_runtime_context().is_canceled()

    @shoal.remote
    def ask() -> list[bool]:
        found = [shoal.get_runtime_context().is_canceled()]
        thread = threading.Thread(target=lambda: found.append(shoal.get_runtime_context().is_canceled()))
        thread.start()
        thread.join()
        return found

    assert shoal.get(ask.remote(), timeout=LIMIT_S) == [False, False]


def test_the_users_own_handler_of_sigint_stays_his(tmp_path: Path) -> None:
    @shoal.remote
    def run(begun: Path) -> None:
        import signal

        def mine(*_: object) -> None:
            raise OSError("the user's own")

        before = signal.signal(signal.SIGINT, mine)
        try:
            with pytest.raises(OSError, match="the user's own"):
                signal.raise_signal(signal.SIGINT)
            begun.touch()
            time.sleep(1000)
        finally:
            signal.signal(signal.SIGINT, before)

    ref = run.remote(tmp_path / "begun")
    until((tmp_path / "begun").exists, "the task to begin")
    shoal.cancel(ref)
    with pytest.raises(TaskCancelledError) as error:
        shoal.get(ref, timeout=LIMIT_S)
    assert "OSError" not in str(error.value)


def test_a_function_with_max_calls_can_be_cancelled_and_its_worker_leaves(tmp_path: Path) -> None:
    @shoal.remote(max_calls=1, num_cpus=2)
    def run(folder: str) -> int:
        if folder:
            Path(folder, "begun").touch()
            time.sleep(1000)
        return os.getpid()

    ref = run.remote(str(tmp_path))
    behind = [run.remote("") for _ in range(3)]
    until((tmp_path / "begun").exists, "the task to begin")
    shoal.cancel(behind[1])
    shoal.cancel(ref)
    assert cancelled(ref)
    assert cancelled(behind[1])
    pids = shoal.get([behind[0], behind[2]], timeout=LIMIT_S)
    assert len(set(pids)) == 2
