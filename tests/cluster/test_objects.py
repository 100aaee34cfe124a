"""Objects as a user meets them: put, get, wait, references of every kind, and memory that comes back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import os
import pickle
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.exceptions import GetTimeoutError, ObjectLostError
from shoal.runtime import slot

pytestmark = pytest.mark.usefixtures("local")

MIB = 1 << 20


@shoal.remote
def make(size: int) -> bytes:
    return bytes(size)


@shoal.remote
def length(value: bytes) -> int:
    return len(value)


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def store_used() -> int:
    runtime: Any = slot.current
    return sum(node.store_used for node in runtime.status().nodes)


@pytest.fixture
def store_comes_back() -> Iterator[None]:
    """Whatever the test did, the store is as full afterwards as it was before."""
    gc.collect()
    before = store_used()
    yield
    gc.collect()
    assert wait_until(lambda: store_used() <= before, 10), f"{store_used() - before} bytes were not given back"


clean = pytest.mark.usefixtures("store_comes_back")


# ---------------------------------------------------------------------------------------------------------- get, put


@clean
@pytest.mark.parametrize("size", [0, 10, 102_390, 102_401, 3 * MIB])
def test_put_and_get_of_any_size(size: int) -> None:
    value = os.urandom(size)
    ref = shoal.put(value)
    assert shoal.get(ref) == value
    assert shoal.get([ref, ref]) == [value, value]


def test_a_put_value_is_a_copy() -> None:
    value = [1, 2]
    ref = shoal.put(value)
    value.append(3)
    assert shoal.get(ref) == [1, 2]
    shoal.get(ref).append(9)
    assert shoal.get(ref) == [1, 2]


@clean
def test_arrays_come_without_a_copy_and_read_only() -> None:
    numpy = pytest.importorskip("numpy")
    array = numpy.arange(500_000.0)
    ref = shoal.put({"a": array, "b": [array, array[:10]]})
    first, second = shoal.get(ref), shoal.get(ref)
    assert (first["a"] == array).all()
    assert first["a"] is first["b"][0]
    assert numpy.shares_memory(first["a"], second["a"]), "both are views of the store"
    assert first["a"].ctypes.data % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        first["a"][0] = 1

    @shoal.remote
    def double(x: Any) -> Any:
        assert not x.flags.writeable
        return x * 2

    result = shoal.get(double.remote(array))
    assert (result == array * 2).all()
    assert not result.flags.writeable


@clean
def test_a_value_outlives_its_reference() -> None:
    numpy = pytest.importorskip("numpy")
    ref = shoal.put(numpy.ones(MIB))
    view = shoal.get(ref)[10:20]
    del ref
    others = [shoal.put(numpy.zeros(MIB)) for _ in range(4)]
    assert view.tolist() == [1.0] * 10
    del others, view


@clean
def test_raw_buffers_travel_out_of_band() -> None:
    payload = bytearray(os.urandom(2 * MIB))

    class Holder:
        def __init__(self, data: Any) -> None:
            self.data = data

        def __reduce__(self) -> Any:
            return _hold, (Holder, pickle.PickleBuffer(self.data))

    got = shoal.get(shoal.put(Holder(payload))).data
    assert memoryview(got).readonly
    assert bytes(got) == payload


def _hold(cls: Any, data: Any) -> Any:
    return cls(data)


def test_get_of_nothing_and_of_wrong_things() -> None:
    assert shoal.get([]) == []
    assert shoal.wait([]) == ([], [])
    ref = shoal.put(1)
    for wrong in ((ref,), {ref}, None, 5, iter([ref])):
        with pytest.raises((ValueError, TypeError)):
            shoal.get(wrong)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="element 1"):
        shoal.get([ref, 3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="reference already"):
        shoal.put(ref)
    with pytest.raises(ValueError, match="timeout"):
        shoal.get(ref, timeout=-1)


def test_order_and_duplicates_of_get() -> None:
    refs = [shoal.put(i) for i in range(10)] + [length.remote(bytes(i)) for i in range(10)]
    assert shoal.get(refs[::-1] + refs[:3]) == list(range(10))[::-1] + list(range(10))[::-1] + [0, 1, 2]


def test_a_hundred_thousand_references_in_one_get() -> None:
    refs = [shoal.put(i) for i in range(100_000)]
    assert shoal.get(refs) == list(range(100_000))
    one = length.remote(b"abc")
    assert shoal.get([one] * 100_000) == [3] * 100_000


@clean
def test_many_stored_objects_in_one_get() -> None:
    refs = [make.remote(110_000) for _ in range(500)]
    assert [len(value) for value in shoal.get(refs)] == [110_000] * 500


class Gate:
    """Tasks that wait until the test says go."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "go"

    def task(self) -> Any:
        @shoal.remote(num_cpus=0)
        def blocked(path: str, value: Any = None) -> Any:
            while not os.path.exists(path):
                time.sleep(0.005)
            return value

        return blocked

    def open(self) -> None:
        self.path.touch()


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.open()


def test_timeouts_of_get(gate: Gate) -> None:
    slow = gate.task().remote(str(gate.path), "done")
    ready = shoal.put(1)
    for timeout in (0, 0.05):
        begin = time.monotonic()
        with pytest.raises(GetTimeoutError, match="1 of 2 objects were not ready") as error:
            shoal.get([ready, slow], timeout=timeout)
        assert time.monotonic() - begin < 5
        assert isinstance(error.value, TimeoutError)
    gate.open()
    assert shoal.get([ready, slow], timeout=20) == [1, "done"]
    assert shoal.get([ready, slow], timeout=0) == [1, "done"]


@clean
def test_a_look_sees_what_is_in_the_store() -> None:
    ref = make.remote(3 * MIB)
    shoal.wait([ref])
    assert len(shoal.get(ref, timeout=0)) == 3 * MIB
    inner = shoal.get(nested.remote())[0]  # borrowed: only its home knows
    assert len(shoal.get(inner, timeout=0)) == MIB
    inner = shoal.get(nested.remote())[0]
    assert shoal.wait([inner], timeout=0) == ([inner], [])


@shoal.remote
def nested() -> list[Any]:
    ref = make.remote(MIB)
    shoal.wait([ref])
    return [ref]


def test_the_first_error_ends_a_get(gate: Gate) -> None:
    @shoal.remote
    def fail() -> None:
        raise KeyError("first")

    slow = gate.task().remote(str(gate.path))
    with pytest.raises(KeyError, match="first"):
        shoal.get([slow, fail.remote()], timeout=20)


# --------------------------------------------------------------------------------------------------------------- wait


def test_wait_keeps_the_order_and_returns_no_more_than_asked(gate: Gate) -> None:
    ready = [shoal.put(i) for i in range(5)]
    slow = gate.task().remote(str(gate.path))
    refs = [ready[0], slow, *ready[1:]]
    assert shoal.wait(refs) == ([ready[0]], [slow, *ready[1:]])
    assert shoal.wait(refs, num_returns=2) == (ready[:2], [slow, *ready[2:]])
    assert shoal.wait(refs, num_returns=6, timeout=0.05) == (ready, [slow])
    assert shoal.wait([slow], timeout=0) == ([], [slow])
    gate.open()
    assert shoal.wait(refs, num_returns=6, timeout=20) == (refs, [])


def test_wait_in_rounds() -> None:
    left = [length.remote(bytes(i)) for i in range(300)]
    seen = []
    while left:
        done, left = shoal.wait(left, timeout=20)
        seen += shoal.get(done)
    assert sorted(seen) == list(range(300))


def test_wrong_arguments_of_wait() -> None:
    a, b = shoal.put(1), shoal.put(2)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match="num_returns"):
            shoal.wait([a, b], num_returns=wrong)
    with pytest.raises(ValueError, match="once"):
        shoal.wait([a, a])
    with pytest.raises(TypeError):
        shoal.wait(a)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="timeout"):
        shoal.wait([a], timeout=-1)


def test_a_failed_object_is_ready() -> None:
    @shoal.remote
    def fail() -> None:
        raise ValueError

    ref = fail.remote()
    assert shoal.wait([ref], timeout=20) == ([ref], [])
    with pytest.raises(ValueError):
        shoal.get(ref)


@clean
def test_wait_with_and_without_fetching() -> None:
    refs = [make.remote(MIB) for _ in range(3)]
    assert shoal.wait(refs, num_returns=3, fetch_local=False, timeout=20) == (refs, [])
    assert shoal.wait(refs, num_returns=3, timeout=20) == (refs, [])


# ------------------------------------------------------------------------------------------------- futures, asyncio


def test_futures() -> None:
    future = length.remote(b"12").future()
    assert future.result(timeout=20) == 2

    @shoal.remote
    def fail() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        fail.remote().future().result(timeout=20)
    done = concurrent.futures.wait([length.remote(bytes(i)).future() for i in range(50)], timeout=20).done
    assert sorted(one.result() for one in done) == list(range(50))
    borrowed = shoal.get(nested.remote())[0].future()  # nobody holds the reference
    gc.collect()
    assert len(borrowed.result(timeout=20)) == MIB


def test_a_callback_of_a_future_cannot_wait() -> None:
    other = gate_less = length.remote(b"1")
    del gate_less
    problems: list[Any] = []
    seen = threading.Event()

    def callback(_: Any) -> None:
        try:
            shoal.get(make.remote(200_000))
        except RuntimeError as exc:
            problems.append(exc)
        seen.set()

    other.future().add_done_callback(callback)
    assert seen.wait(20)
    if problems:  # else it was ready before and ran here
        assert "may not wait" in str(problems[0])
    assert shoal.get(length.remote(b"123"), timeout=20) == 3


def test_await_gather_and_cancel(gate: Gate) -> None:
    async def main() -> None:
        assert await length.remote(b"123") == 3
        assert await asyncio.gather(*[length.remote(bytes(i)) for i in range(100)]) == list(range(100))
        assert len(await shoal.put(bytes(MIB))) == MIB
        assert await shoal.put(1) == 1

        @shoal.remote
        def fail() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await fail.remote()
        slow = gate.task().remote(str(gate.path), 7)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(slow.as_future(), 0.05)
        gate.open()
        assert await slow == 7  # cancelling the future did not cancel the task

        @shoal.remote
        def stop() -> None:
            raise StopIteration("odd")

        with pytest.raises(Exception, match="odd"):
            await stop.remote()

    asyncio.run(main())


# --------------------------------------------------------------------------------------------- what references are


def test_references_are_values() -> None:
    ref = shoal.put(1)
    same = pickle.loads(pickle.dumps(ref))
    assert same == ref
    assert same is ref, "one record for each object in a process"
    assert hash(same) == hash(ref)
    assert {ref: "x"}[same] == "x"
    assert ref != shoal.put(1)
    assert ref != 5
    assert copy.copy(ref) is ref
    assert copy.deepcopy([ref])[0] is ref
    assert ref.hex() in repr(ref)
    assert bytes.fromhex(ref.hex()) == ref.binary()
    assert len(ref.binary()) == 28
    assert len(ref.task_id()) == 24
    assert not ref.is_nil()
    with pytest.raises(TypeError):
        len(ref)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        iter(ref)  # type: ignore[call-overload]


# --------------------------------------------------------------------------------------- memory that comes back


@clean
def test_dropped_objects_free_the_store() -> None:
    for _ in range(20):
        shoal.put(bytes(20 * MIB))
        shoal.get(make.remote(20 * MIB))
        shoal.get(length.remote(bytes(20 * MIB)))


@clean
def test_results_that_nobody_waits_for() -> None:
    refs = [make.remote(MIB) for _ in range(20)]
    del refs[::2]
    shoal.get(refs)


@clean
def test_references_inside_values_keep_what_they_refer_to() -> None:
    inner = shoal.put(bytes(5 * MIB))
    outer = shoal.put({"ref": inner, "again": [inner, inner]})
    outermost = shoal.put([outer])
    del inner, outer
    gc.collect()
    got = shoal.get(shoal.get(outermost)[0])
    assert len(shoal.get(got["ref"])) == 5 * MIB
    assert got["ref"] is got["again"][1]
    del got
    assert len(shoal.get(shoal.get(shoal.get(outermost)[0])["ref"])) == 5 * MIB


@clean
def test_references_inside_large_values() -> None:
    inner = shoal.put(bytes(MIB))
    outer = shoal.put([inner, bytes(MIB)])
    del inner
    gc.collect()

    @shoal.remote
    def dig(value: list[Any]) -> int:
        return len(shoal.get(value[0]))

    assert shoal.get(dig.remote(outer)) == MIB
    assert shoal.get(dig.remote([make.remote(MIB), bytes(MIB)])) == MIB


@clean
def test_references_in_arguments_outlive_the_caller_s() -> None:
    @shoal.remote
    def late(refs: list[Any], path: str) -> int:
        while not os.path.exists(path):
            time.sleep(0.005)
        return sum(len(shoal.get(ref)) for ref in refs)

    with tempfile.TemporaryDirectory() as folder:
        result = late.remote([shoal.put(bytes(MIB)), make.remote(MIB), shoal.put(b"abc")], f"{folder}/go")
        gc.collect()
        Path(folder, "go").touch()
        assert shoal.get(result, timeout=20) == 2 * MIB + 3


@clean
def test_references_that_were_returned_outlive_the_worker_s() -> None:
    @shoal.remote
    def outer(depth: int) -> list[Any]:
        if depth == 0:
            return [shoal.put(bytes(MIB)), make.remote(MIB)]
        return [outer.remote(depth - 1)]

    got = shoal.get(outer.remote(0))
    assert [len(value) for value in shoal.get(got)] == [MIB, MIB]
    ref = outer.remote(3)
    for _ in range(3):
        ref = shoal.get(ref, timeout=20)[0]
    assert [len(value) for value in shoal.get(shoal.get(ref, timeout=20), timeout=20)] == [MIB, MIB]


@clean
def test_borrowed_references_travel_on() -> None:
    @shoal.remote
    def read(refs: list[Any]) -> int:
        return len(shoal.get(refs[0]))

    @shoal.remote
    def pass_on(refs: list[Any], hops: int) -> Any:
        return read.remote(refs) if hops == 0 else pass_on.remote(refs, hops - 1)

    ref = pass_on.remote([shoal.put(bytes(MIB))], 3)
    while isinstance(ref, shoal.ObjectRef):
        ref = shoal.get(ref, timeout=20)
    assert ref == MIB


@clean
def test_an_actor_keeps_what_it_was_given() -> None:
    @shoal.remote
    class Keeper:
        def __init__(self) -> None:
            self.refs: list[Any] = []

        def keep(self, refs: list[Any]) -> None:
            self.refs += refs

        def sizes(self) -> list[int]:
            return [len(value) for value in shoal.get(self.refs)]

        def give(self) -> list[Any]:
            return self.refs

        def drop(self) -> None:
            self.refs.clear()

    keeper = Keeper.remote()
    shoal.get(keeper.keep.remote([shoal.put(bytes(MIB)), make.remote(2 * MIB)]))
    gc.collect()
    assert shoal.get(keeper.sizes.remote()) == [MIB, 2 * MIB]
    back = shoal.get(keeper.give.remote())
    shoal.get(keeper.drop.remote())
    assert [len(value) for value in shoal.get(back)] == [MIB, 2 * MIB]
    del back
    shoal.get(keeper.keep.remote([shoal.put(bytes(MIB))]))
    shoal.kill(keeper)


@clean
def test_a_reference_that_comes_home() -> None:
    @shoal.remote
    def back(refs: list[Any]) -> list[Any]:
        return refs

    ref = shoal.put(bytes(MIB))
    again = shoal.get(back.remote([ref]))[0]
    assert again is ref
    identity = ref.hex()
    result = back.remote([ref])
    del ref, again
    gc.collect()
    again = shoal.get(result)[0]
    assert again.hex() == identity
    assert len(shoal.get(again)) == MIB


@clean
def test_references_between_threads_that_drop_and_borrow() -> None:
    @shoal.remote
    def back(refs: list[Any]) -> list[Any]:
        return refs

    problems: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(30):
                ref = shoal.put(bytes(200_000))
                pending = back.remote([ref])
                del ref
                assert len(shoal.get(shoal.get(pending, timeout=20)[0], timeout=20)) == 200_000
        except BaseException as exc:
            problems.append(exc)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert problems == []


@clean
def test_references_in_a_cycle_are_collected() -> None:
    box: list[Any] = [shoal.put(bytes(MIB))]
    box.append(box)
    del box
    gc.collect()


@clean
def test_an_exception_does_not_keep_arguments() -> None:
    @shoal.remote
    def fail(value: bytes) -> None:
        raise ValueError(len(value))

    for _ in range(5):
        with pytest.raises(ValueError, match=str(5 * MIB)):
            shoal.get(fail.remote(bytes(5 * MIB)))


@clean
def test_a_worker_that_dies_with_objects_in_its_hands() -> None:
    @shoal.remote(max_retries=0)
    def die(value: bytes, refs: list[Any]) -> None:
        shoal.get(refs)
        shoal.put(bytes(MIB))
        os._exit(1)

    with pytest.raises(shoal.exceptions.WorkerCrashedError):
        shoal.get(die.remote(bytes(3 * MIB), [shoal.put(bytes(MIB))]))


def test_a_reference_pickled_elsewhere_keeps_its_object() -> None:
    ref = shoal.put(bytes(200_000))
    text = pickle.dumps(ref)
    del ref
    gc.collect()

    @shoal.remote
    def read(text: bytes) -> int:
        return len(shoal.get(pickle.loads(text)))

    assert shoal.get(read.remote(text), timeout=20) == 200_000
    assert len(shoal.get(pickle.loads(text))) == 200_000


def test_refs_of_a_dead_process_say_so() -> None:
    @shoal.remote(max_retries=0)
    def leave_one(box: list[Any], path: str) -> None:
        @shoal.remote(num_cpus=0)
        def never(path: str) -> None:
            while True:
                time.sleep(1)

        Path(path + ".new").write_bytes(pickle.dumps((os.getpid(), never.remote(path))))
        os.rename(path + ".new", path)
        while True:
            time.sleep(1)

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/ref"
        owner = leave_one.remote([], path)
        assert wait_until(lambda: os.path.exists(path), 20)
        pid, orphan = pickle.loads(Path(path).read_bytes())
        with pytest.raises(GetTimeoutError):
            shoal.get(orphan, timeout=0.05)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ObjectLostError):
            shoal.get(orphan, timeout=20)
        with pytest.raises(shoal.exceptions.WorkerCrashedError):
            shoal.get(owner, timeout=20)


def test_nothing_of_the_runtime_keeps_dropped_references() -> None:
    ref = length.remote(b"12")
    weak = weakref.ref(ref)
    shoal.get(ref)
    del ref
    assert wait_until(lambda: weak() is None, 5)
