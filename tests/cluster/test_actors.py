"""Actors as their callers see them: construction, calls and their order, handles, names, errors."""

from __future__ import annotations

import asyncio
import os
import pickle
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import shoal
from shoal.exceptions import ActorDiedError, TaskError, UnserializableError

pytestmark = pytest.mark.usefixtures("local")
LARGE = 300_000  # bytes: more than travels inline


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.005)


@shoal.remote
class Box:
    """Keeps what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.items: list[Any] = []

    def init_args(self) -> Any:
        return self.args, self.kwargs

    def add(self, item: Any) -> int:
        self.items.append(item)
        return len(self.items)

    def all(self) -> list[Any]:
        return self.items

    def pid(self) -> int:
        return os.getpid()

    def wait_for(self, path: str) -> str:
        """Until the file is there."""
        while not os.path.exists(path):
            time.sleep(0.002)
        return path


@shoal.remote
def echo(value: Any) -> Any:
    return value


@shoal.remote
def when(path: str, value: Any) -> Any:
    """`value`, once the file is there."""
    while not os.path.exists(path):
        time.sleep(0.002)
    return value


# --------------------------------------------------------------------------------------------------------- construction


def test_constructor_arguments_of_every_kind_arrive(tmp_path: Any) -> None:
    small, large = shoal.put("small"), shoal.put(b"x" * LARGE)
    pending = echo.remote("made")
    box = Box.remote(1, small, large, pending, [small], key=small, blob=b"y" * LARGE)
    args, kwargs = shoal.get(box.init_args.remote())
    assert args[:4] == (1, "small", b"x" * LARGE, "made")
    assert shoal.get(args[4]) == ["small"]  # inside a container a reference stays one
    assert kwargs == {"key": "small", "blob": b"y" * LARGE}


def test_large_arguments_outlive_the_handle_that_made_the_actor() -> None:
    """The creator gives its only handle away at once, and the actor has not even started."""

    @shoal.remote
    def first_call(boxes: list[Any]) -> int:
        args, _ = shoal.get(boxes[0].init_args.remote())
        return len(args[0])

    assert shoal.get(first_call.remote([Box.remote(b"z" * LARGE)])) == LARGE


def test_a_constructor_waits_for_arguments_that_are_not_ready_and_holds_nobody_up(tmp_path: Any) -> None:
    gate = str(tmp_path / "gate")
    late = when.remote(gate, "late")
    start = time.monotonic()
    box = Box.remote(late)
    named = Box.options(name="waits-for-argument").remote(late)
    assert time.monotonic() - start < 1.0
    found = shoal.get_actor("waits-for-argument")  # it exists already
    calls = [box.init_args.remote(), named.init_args.remote(), found.init_args.remote()]
    states = {info.class_name: info.reason for info in _infos() if info.state == "pending"}
    assert states["Box"].code == "arguments"
    open(gate, "w").close()
    assert [args for args, _ in shoal.get(calls)] == [("late",)] * 3


def _infos() -> list[Any]:
    from shoal.runtime import slot

    return list(slot.current.list_actors(named_only=False, namespace=""))  # type: ignore[union-attr]


def test_others_can_call_an_actor_whose_arguments_are_not_ready(tmp_path: Any) -> None:
    @shoal.remote(num_cpus=0)
    def call(boxes: list[Any]) -> Any:
        return shoal.get(boxes[0].init_args.remote())

    gate = str(tmp_path / "gate")
    box = Box.remote(when.remote(gate, 7))
    result = call.remote([box])
    assert shoal.wait([result], timeout=0.3) == ([], [result])
    open(gate, "w").close()
    assert shoal.get(result) == ((7,), {})


def test_an_argument_that_failed_fails_the_actor() -> None:
    @shoal.remote
    def broken() -> None:
        raise KeyError("no such thing")

    box = Box.remote(broken.remote())
    with pytest.raises(ActorDiedError, match="an argument of its constructor failed") as caught:
        shoal.get(box.pid.remote())
    assert isinstance(caught.value.cause, KeyError)


def test_what_a_constructor_raises_comes_out_of_the_first_call() -> None:
    @shoal.remote
    class Broken:
        def __init__(self) -> None:
            raise ValueError("not today")

        def method(self) -> None: ...

    broken = Broken.remote()
    for _ in range(2):
        with pytest.raises(ActorDiedError, match="its constructor raised ValueError: not today") as caught:
            shoal.get(broken.method.remote())
        assert caught.value.actor_init_failed
        assert isinstance(caught.value.cause, ValueError)
        assert isinstance(caught.value.cause, TaskError)
        assert "Broken.__init__" in str(caught.value.cause)


def test_a_constructor_that_leaves_or_crashes() -> None:
    @shoal.remote
    class Leaves:
        def __init__(self, how: str) -> None:
            if how == "exit_actor":
                shoal.actor.exit_actor()
            if how == "sys.exit":
                raise SystemExit(3)
            os._exit(5)

        def method(self) -> None: ...

    for how, cause in (("exit_actor", re.escape("exit_actor()")), ("sys.exit", "3"), ("crash", "exit code 5")):
        with pytest.raises(ActorDiedError, match=cause):
            shoal.get(Leaves.remote(how).method.remote())


def test_a_class_that_cannot_be_pickled_or_called_says_so() -> None:
    lock = threading.Lock()

    @shoal.remote
    class Holds:
        def method(self) -> Any:
            return lock

    with pytest.raises(UnserializableError, match="lock"):
        Holds.remote()
    with pytest.raises(TypeError, match=r"Box\.remote"):
        Box()
    with pytest.raises(UnserializableError):
        Box.remote(lock)


# ---------------------------------------------------------------------------------------------------------------- calls


def test_results_of_every_kind() -> None:
    @shoal.remote
    class Maker:
        @shoal.method(num_returns=2)
        def two(self) -> tuple[int, bytes]:
            return 1, b"r" * LARGE

        def nothing(self) -> None: ...

        def refs(self) -> list[Any]:
            return [shoal.put("inner"), shoal.put(b"i" * LARGE)]

        def lock(self) -> Any:
            return threading.Lock()

    maker = Maker.remote()
    one, two = maker.two.remote()
    assert shoal.get([one, two]) == [1, b"r" * LARGE]
    assert shoal.get(maker.nothing.remote()) is None
    assert maker.nothing.options(num_returns=0).remote() is None
    assert shoal.get(shoal.get(maker.refs.remote())) == ["inner", b"i" * LARGE]
    with pytest.raises(TypeError, match="lock"):
        shoal.get(maker.lock.remote())
    with pytest.raises(ValueError, match="num_returns=3"):
        shoal.get(maker.two.options(num_returns=3).remote())
    assert shoal.get(maker.nothing.remote()) is None  # it lives on


def test_a_method_that_raises() -> None:
    @shoal.remote
    class Raises:
        def __repr__(self) -> str:
            return "Raises(7)"

        def method(self) -> None:
            raise LookupError("lost")

    with pytest.raises(LookupError) as caught:
        shoal.get(Raises.remote().method.remote())
    assert isinstance(caught.value, TaskError)
    assert caught.value.function_name == "Raises.method"
    assert caught.value.actor_repr == "Raises(7)"


def test_methods_that_every_actor_has() -> None:
    box = Box.remote()
    assert shoal.get(box.__ray_ready__.remote())
    assert shoal.get(box.__ray_call__.remote(lambda self, n: self.add(n), 5)) == 1
    assert shoal.get(box.all.remote()) == [5]
    ended = box.__ray_terminate__.remote()
    with pytest.raises(ActorDiedError):
        shoal.get(ended)


# ---------------------------------------------------------------------------------------------------------------- order


def test_calls_of_one_caller_run_in_order_whatever_their_arguments(tmp_path: Any) -> None:
    box = Box.remote()
    gate = str(tmp_path / "gate")
    late, large = when.remote(gate, "late"), shoal.put(b"l" * LARGE)
    results = [box.add.remote(0), box.add.remote(late), box.add.remote(2), box.add.remote(large)]
    results += [box.add.remote(b"inline" * LARGE), box.add.remote(echo.remote(5)), box.add.remote(6)]
    assert shoal.get(results[0]) == 1
    assert shoal.wait(results, num_returns=2, timeout=0.2)[1] == results[1:]  # nothing overtakes
    open(gate, "w").close()
    assert shoal.get(results) == [1, 2, 3, 4, 5, 6, 7]
    items = shoal.get(box.all.remote())
    assert items[:3] == [0, "late", 2]
    assert items[5:] == [5, 6]


def test_a_call_whose_argument_failed_does_not_hold_up_the_rest() -> None:
    @shoal.remote
    def broken() -> None:
        raise KeyError("k")

    box = Box.remote()
    results = [box.add.remote(1), box.add.remote(broken.remote()), box.add.remote(3)]
    assert shoal.get(results[2]) == 2
    with pytest.raises(KeyError):
        shoal.get(results[1])


def test_each_caller_has_its_own_order() -> None:
    """Threads of the driver share one order; tasks have one each."""

    @shoal.remote(num_cpus=0)
    def call(box: Any, name: str) -> None:
        shoal.get([box.add.remote((name, number)) for number in range(200)])

    box = Box.remote()
    tasks = [call.remote(box, f"task-{index}") for index in range(4)]

    def from_thread(name: str) -> None:
        shoal.get([box.add.remote((name, number)) for number in range(200)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(from_thread, [f"thread-{index}" for index in range(4)]))
    shoal.get(tasks)
    seen: dict[str, list[int]] = {}
    for name, number in shoal.get(box.all.remote()):
        seen.setdefault(name, []).append(number)
    assert len(seen) == 8
    assert all(numbers == list(range(200)) for numbers in seen.values())


def test_more_calls_than_the_window_holds() -> None:
    box = Box.remote()
    assert shoal.get([box.add.remote(None) for _ in range(25_000)]) == list(range(1, 25_001))


# -------------------------------------------------------------------------------------------------------------- handles


def test_handles_are_values() -> None:
    box, other = Box.remote(), Box.remote()
    again = shoal.get(echo.remote([box]))[0]
    assert again == box
    assert again != other
    assert hash(again) == hash(box)
    assert {box: 1}[again] == 1
    assert box != "a box"
    assert re.fullmatch(r"Actor\(Box, [0-9a-f]{32}\)", repr(box))
    assert pickle.loads(pickle.dumps(box)) == box
    shoal.get(box.add.remote(1))
    assert shoal.get(again.all.remote()) == [1]


def test_handles_travel_every_way() -> None:
    @shoal.remote
    class Keeper:
        def keep(self, boxes: dict[str, Any]) -> None:
            self.box = boxes["box"]

        def use(self) -> int:
            number: int = shoal.get(self.box.add.remote("from keeper"))
            return number

        def give(self) -> Any:
            return {"back": self.box}

        def make(self) -> Any:
            return Box.remote("made by keeper")

    @shoal.remote
    def use(box: Any) -> int:
        number: int = shoal.get(box.add.remote("from task"))
        return number

    box, keeper = Box.remote(), Keeper.remote()
    shoal.get(keeper.keep.remote({"box": box}))
    assert shoal.get(use.remote(box)) == 1
    assert shoal.get(keeper.use.remote()) == 2
    assert shoal.get(shoal.get(shoal.put([box]))[0].all.remote()) == ["from task", "from keeper"]
    del box
    back = shoal.get(keeper.give.remote())["back"]
    assert shoal.get(back.add.remote("back")) == 3

    @shoal.remote
    def closes_over() -> int:
        number: int = shoal.get(back.add.remote("closure"))
        return number

    assert shoal.get(closes_over.remote()) == 4
    made = shoal.get(keeper.make.remote())
    assert shoal.get(made.init_args.remote()) == (("made by keeper",), {})


def test_an_actor_that_calls_itself_and_others() -> None:
    @shoal.remote
    class Node:
        def __init__(self, depth: int) -> None:
            self.child = Node.remote(depth - 1) if depth else None

        def count(self) -> int:
            return 1 + (shoal.get(self.child.count.remote()) if self.child is not None else 0)

        def call_later(self) -> Any:
            me = shoal.get_runtime_context().current_actor
            return [me.count.remote()]  # runs after this method

    node = Node.remote(3)
    assert shoal.get(node.count.remote()) == 4
    assert shoal.get(shoal.get(node.call_later.remote()))[0] == 4


def test_many_handles_of_one_actor() -> None:
    box = Box.remote()
    handles = shoal.get([echo.remote(box) for _ in range(300)])
    assert shoal.get([handle.add.remote(1) for handle in handles]) == list(range(1, 301))
    del box, handles[1:]
    assert shoal.get(handles[0].add.remote(1)) == 301


def test_two_hundred_actors_in_processes_of_their_own() -> None:
    start = time.monotonic()
    boxes = [Box.remote(number) for number in range(200)]
    pids = shoal.get([box.pid.remote() for box in boxes])
    assert len(set(pids)) == 200
    assert shoal.get([box.init_args.remote() for box in boxes[::50]]) == [((n,), {}) for n in (0, 50, 100, 150)]
    assert time.monotonic() - start < 20.0


# ---------------------------------------------------------------------------------------------------------------- names


def test_a_name_belongs_to_one_actor_of_a_namespace() -> None:
    first = Box.options(name="solo").remote()
    assert shoal.get_actor("solo") == first
    with pytest.raises(shoal.exceptions.ActorAlreadyExistsError, match="'solo' is taken"):
        Box.options(name="solo").remote()
    with pytest.raises(ValueError, match="no actor is named 'nobody'"):
        shoal.get_actor("nobody")
    elsewhere = Box.options(name="solo", namespace="other").remote("elsewhere")
    assert shoal.get_actor("solo", namespace="other") == elsewhere != first
    assert shoal.get(shoal.get_actor("solo", namespace="other").init_args.remote()) == (("elsewhere",), {})
    shoal.kill(first)
    second = Box.options(name="solo").remote("second")  # a name is free as soon as its actor is dead
    assert shoal.get(shoal.get_actor("solo").init_args.remote()) == (("second",), {})
    assert shoal.get(second.pid.remote()) != os.getpid()


def test_get_if_exists_makes_one_actor_however_many_ask() -> None:
    @shoal.remote(num_cpus=0)
    def ask() -> int:
        box = Box.options(name="shared", get_if_exists=True, lifetime="detached").remote()
        pid: int = shoal.get(box.pid.remote())
        return pid

    def in_thread(_: int) -> int:
        box = Box.options(name="shared", get_if_exists=True, lifetime="detached").remote()
        pid: int = shoal.get(box.pid.remote())
        return pid

    tasks = [ask.remote() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        pids = {*pool.map(in_thread, range(8)), *shoal.get(tasks)}
    assert len(pids) == 1
    shoal.kill(shoal.get_actor("shared"))


def test_a_named_handle_does_not_keep_the_actor() -> None:
    box = Box.options(name="weak").remote()
    weak = shoal.get_actor("weak")
    assert shoal.get(weak.add.remote(1)) == 1
    del box
    wait_until(lambda: _fails(weak), "the actor to end with its only counted handle")
    with pytest.raises(ValueError, match="'weak'"):
        shoal.get_actor("weak")


def _fails(handle: Any) -> bool:
    try:
        shoal.get(handle.all.remote())
    except ActorDiedError:
        return True
    return False


# -------------------------------------------------------------------------------------------------------------- killing


def test_kill_fails_what_runs_and_what_waits_at_once(tmp_path: Any) -> None:
    box = Box.remote()
    calls = [box.wait_for.remote(str(tmp_path / "never")), *[box.add.remote(n) for n in range(10)]]
    wait_until(lambda: _is_alive(box), "the actor to start")
    start = time.monotonic()
    shoal.kill(box)
    for call in calls:
        with pytest.raises(ActorDiedError, match=r"killed with kill\(\)"):
            shoal.get(call, timeout=5.0)
    assert time.monotonic() - start < 2.0
    with pytest.raises(ActorDiedError):
        shoal.get(box.pid.remote())
    shoal.kill(box)  # again is no mistake


def _is_alive(handle: Any) -> bool:
    return any(info.actor_id == handle._actor_id and info.state == "alive" for info in _infos())


def test_kill_before_it_has_started(tmp_path: Any) -> None:
    waiting = Box.remote(when.options(num_cpus=0).remote(str(tmp_path / "gate"), 1))
    starting = Box.remote()
    for box in (waiting, starting):
        call = box.wait_for.remote(str(tmp_path / "never"))
        shoal.kill(box)
        with pytest.raises(ActorDiedError, match="killed"):
            shoal.get(call, timeout=5.0)
    (tmp_path / "gate").touch()


def test_a_crash_says_how() -> None:
    @shoal.remote
    class Fragile:
        def crash(self) -> None:
            print("last words", flush=True)
            os._exit(9)

        def shoot(self) -> None:
            os.kill(os.getpid(), 9)

        def add(self) -> int:
            return 1

    fragile = Fragile.remote()
    assert shoal.get(fragile.add.remote()) == 1
    done, crash, after = fragile.add.remote(), fragile.crash.remote(), fragile.add.remote()
    assert shoal.get(done) == 1  # what was finished before stays finished
    for call in (crash, after):
        with pytest.raises(ActorDiedError, match="exit code 9"):
            shoal.get(call)
    with pytest.raises(ActorDiedError, match="SIGKILL"):
        shoal.get(Fragile.remote().shoot.remote())


def test_wrong_use_is_told() -> None:
    box = Box.remote()
    with pytest.raises(AttributeError, match="has no method 'push'"):
        box.push.remote(1)
    with pytest.raises(TypeError):
        box.add.remote()
    with pytest.raises(TypeError):
        box.add(1)
    with pytest.raises(TypeError):
        shoal.actor.exit_actor()
    with pytest.raises(ValueError):
        shoal.kill("box")


def test_awaiting_calls_from_an_event_loop() -> None:
    box = Box.remote()

    async def main() -> list[int]:
        return await asyncio.gather(*[box.add.remote(n) for n in range(50)])

    assert asyncio.run(main()) == list(range(1, 51))
