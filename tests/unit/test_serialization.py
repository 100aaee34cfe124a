from __future__ import annotations

import copyreg
import functools
import os
import pickle
import subprocess
import sys
import threading
import time
import types
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.exceptions import UnserializableError
from shoal.objects import diagnose
from shoal.objects.serialization import (
    ALIGNMENT,
    NONE_FLAT,
    OUT_OF_BAND_BYTES,
    UNLOCKED_COPY_BYTES,
    Serialized,
    deregister_serializer,
    deserialize,
    note_ref,
    register_serializer,
    serialize,
)

LARGE = OUT_OF_BAND_BYTES
LOCK = threading.Lock()


def back(value: Any) -> Any:
    return deserialize(serialize(value).flatten())


@dataclass
class Point:
    x: int
    y: int
    tags: list[str] = field(default_factory=list)


Pair = namedtuple("Pair", "left right")


class Ref:
    """Stands for an ObjectRef."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __reduce__(self) -> tuple[type, tuple[str]]:
        self.noted = note_ref(self)
        return Ref, (self.name,)


# ------------------------------------------------------------------------------------------------------- round trips

atoms = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.builds(Pair, inner, inner)
        | st.builds(np.array, st.lists(st.floats(allow_nan=False)))
    ),
    max_leaves=20,
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, np.ndarray):
        return type(right) is np.ndarray and left.dtype == right.dtype and np.array_equal(left, right)
    if isinstance(left, list | tuple):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    return type(left) is type(right) and left == right


@given(values)
def test_any_value_comes_back(value: Any) -> None:
    serialized = serialize(value)
    flat = serialized.flatten()
    assert len(flat) == serialized.flat_size
    assert same(value, deserialize(flat))
    target = bytearray(len(flat))
    serialized.write_into(memoryview(target))
    assert target == flat


def test_none_is_a_constant() -> None:
    assert serialize(None) is serialize(None)
    assert serialize(None).flatten() == NONE_FLAT == pickle.dumps(None, 5)
    assert deserialize(NONE_FLAT) is None


@pytest.mark.parametrize("value", [0, "text", b"bytes", (1, "a"), [None, 2.5], {"a": 1, 2: b"c"}, 1j, True])
def test_small_plain_values_are_plain_pickles(value: Any) -> None:
    serialized = serialize(value)
    assert serialized.pickled == pickle.dumps(value, 5)
    assert (list(serialized.buffers), list(serialized.refs)) == ([], [])


def test_shared_and_recursive_structure_is_kept() -> None:
    inner: list[Any] = [1]
    loop: list[Any] = [inner, inner]
    loop.append(loop)
    got = back(loop)
    assert got[0] is got[1]
    assert got[2] is got


@pytest.mark.parametrize(
    "value", [deque([1, 2]), OrderedDict(a=1), {1, 2}, frozenset({3}), Pair(1, 2), Point(1, 2, ["a"]), range(5), ...]
)
def test_library_and_module_types(value: Any) -> None:
    assert back(value) == value


def test_subclasses_of_plain_types_keep_their_type() -> None:
    class Names(dict[str, int]):
        pass

    class Level(int):
        pass

    got = back([Names(a=1), Level(3)])
    assert got == [{"a": 1}, 3]
    assert [type(item).__name__ for item in got] == ["Names", "Level"]


# ------------------------------------------------------------------------------------------------ out-of-band buffers


@pytest.mark.parametrize("kind", [bytes, bytearray])
@pytest.mark.parametrize(
    "wrap", [lambda item: item, lambda item: (1, item), lambda item: [item, item], lambda item: {"k": item, "n": 1}]
)
def test_large_bytes_leave_the_pickle(kind: type, wrap: Any) -> None:
    value = wrap(kind(os.urandom(LARGE)))
    serialized = serialize(value)
    assert len(serialized.pickled) < 200
    assert sum(buffer.nbytes for buffer in serialized.buffers) >= LARGE
    assert same(value, back(value)) or back(value) == value
    small = kind(LARGE - 1)
    assert not serialize(small).buffers
    assert back(small) == small


ARRAYS = {
    "flat": np.arange(1000),
    "tiny": np.array([1], dtype=np.int8),
    "empty": np.zeros((0, 3)),
    "scalar": np.array(3.5),
    "c order": np.arange(24.0).reshape(2, 3, 4),
    "fortran order": np.asfortranarray(np.arange(24.0).reshape(4, 6)),
    "times": np.array(["2020-01-01", "2021-02-03"], dtype="datetime64[D]"),
    "dates with gaps": np.arange(0, 100, dtype="datetime64[s]").reshape(10, 10)[:, ::3],
    "strided": np.arange(100)[::3],
    "backwards": np.arange(100)[::-1],
    "broadcast": np.broadcast_to(np.arange(3), (4, 3)),
    "text": np.array(["ab", "c"]),
    "big-endian": np.arange(10, dtype=">i4"),
    "records": np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
    "with metadata": np.arange(3, dtype=np.dtype("i8", metadata={"unit": "m"})),
    "read-only": np.frombuffer(b"abcdefgh", dtype=np.uint8),
}


@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
@pytest.mark.parametrize("nested", [False, True])
def test_arrays_come_out_equal_and_read_only(array: Any, nested: bool) -> None:
    got = back({"a": [array]})["a"][0] if nested else back(array)
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)
    if array.flags.forc:
        assert got.flags.f_contiguous == array.flags.f_contiguous
    assert not got.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        got[...] = array


def test_arrays_of_objects_go_into_the_pickle() -> None:
    objects = np.array([Point(1, 2), None], dtype=object)
    assert list(back(objects)) == [Point(1, 2), None]


def test_a_subclass_of_ndarray_keeps_its_type() -> None:
    matrix = np.ma.masked_array([1.0, 2.0], mask=[True, False])
    got = back(matrix)
    assert type(got) is np.ma.MaskedArray
    assert got.mask.tolist() == [True, False]


def test_buffers_are_aligned_and_not_copied_on_either_side() -> None:
    arrays = [np.arange(n, dtype=np.uint8) for n in (1, 63, 64, 65, 200)]
    serialized = serialize(arrays)
    assert [np.shares_memory(np.frombuffer(b, np.uint8), a) for a, b in zip(arrays, serialized.buffers, strict=True)]
    room = np.zeros(serialized.flat_size + ALIGNMENT, dtype=np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    target = memoryview(room)[start : start + serialized.flat_size]
    serialized.write_into(target)
    for array, got in zip(arrays, deserialize(target), strict=True):
        assert np.array_equal(got, array)
        assert got.ctypes.data % ALIGNMENT == 0
        assert np.shares_memory(got, room)
        assert not got.flags.writeable  # though the memory under it is


def test_padding_is_written_so_that_reused_memory_does_not_leak() -> None:
    serialized = serialize([np.arange(3, dtype=np.uint8), np.arange(5, dtype=np.uint8)])
    dirty = bytearray(b"\xee" * serialized.flat_size)
    serialized.write_into(memoryview(dirty))
    assert b"\xee" not in dirty


@pytest.mark.parametrize("size", [UNLOCKED_COPY_BYTES - 1, UNLOCKED_COPY_BYTES, 3 * UNLOCKED_COPY_BYTES + 5])
@pytest.mark.parametrize("writable", [False, True])
def test_copies_with_and_without_the_lock(size: int, writable: bool) -> None:
    array = np.frombuffer(os.urandom(size), dtype=np.uint8)
    value = array.copy() if writable else array
    assert np.array_equal(back(value), array)


def test_a_target_of_another_size_or_format() -> None:
    import ctypes

    serialized = serialize(np.arange(10))
    with pytest.raises(ValueError, match="the target has 3"):
        serialized.write_into(memoryview(bytearray(3)))
    target = (ctypes.c_ubyte * serialized.flat_size)()
    serialized.write_into(memoryview(target))  # format "<B"
    assert np.array_equal(deserialize(memoryview(target)), np.arange(10))


@pytest.mark.parametrize("flat", [b"", b"\x07abc", b"\x01", b"not a pickle"])
def test_bytes_that_are_no_value(flat: bytes) -> None:
    with pytest.raises(ValueError, match=r"no bytes|not a serialized value|cut off"):
        deserialize(flat)


def test_every_cut_of_a_value_with_buffers_is_noticed() -> None:
    flat = serialize([np.arange(20, dtype=np.uint8), b"x"]).flatten()
    for length in range(1, len(flat)):
        with pytest.raises(ValueError, match="cut off"):
            deserialize(flat[:length])
    assert deserialize(memoryview(flat + b"more"))[1] == b"x"


# --------------------------------------------------------------------------------------------------------- references


def test_references_are_noted_in_order_wherever_they_sit() -> None:
    refs = [Ref("a"), Ref("b"), Ref("c")]
    captured = refs[2]
    serialized = serialize({"list": [refs[0]], "point": Point(1, 2, [refs[1]]), "code": lambda: captured})
    assert list(serialized.refs) == refs
    assert all(ref.noted for ref in refs)


def test_pickling_that_is_not_ours_is_told_so() -> None:
    ref = Ref("a")
    pickle.dumps(ref)
    assert ref.noted is False
    serialize(ref)
    assert ref.noted is True
    cloudpickle.dumps(ref)
    assert ref.noted is False


def test_a_serialization_inside_another_keeps_its_own_references() -> None:
    inner: list[Serialized] = []

    class Nested:
        def __reduce__(self) -> tuple[Any, ...]:
            inner.append(serialize([Ref("inner")]))
            return str, ("nested",)

    outer = serialize([Ref("before"), Nested(), Ref("after")])
    assert [ref.name for ref in outer.refs] == ["before", "after"]
    assert [ref.name for ref in inner[0].refs] == ["inner"]


def test_an_error_ends_the_noting() -> None:
    with pytest.raises(UnserializableError):
        serialize([Ref("a"), LOCK])
    assert note_ref("b") is False


def test_threads_do_not_see_each_other() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def __reduce__(self) -> tuple[Any, ...]:
            inside.set()
            assert go_on.wait(10)
            return str, ("slow",)

    results: list[Serialized] = []
    thread = threading.Thread(target=lambda: results.append(serialize([Slow(), Ref("theirs")])))
    thread.start()
    assert inside.wait(10)
    assert note_ref("mine") is False
    mine = serialize([Ref("mine")])
    go_on.set()
    thread.join()
    assert [ref.name for ref in mine.refs] == ["mine"]
    assert [ref.name for ref in results[0].refs] == ["theirs"]


# --------------------------------------------------------------------------------------------------- classes and code


def test_code_of_main_travels_by_value() -> None:
    script = """
import sys
from dataclasses import dataclass
from shoal.objects.serialization import serialize
factor = 3
@dataclass
class Job:
    n: int
    def run(self): return helper(self.n)
def helper(n): return n * factor
sys.stdout.buffer.write(serialize((Job(14), lambda job: job.run())).flatten())
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30, env=environment, check=True)
    job, run = deserialize(done.stdout)
    assert run(job) == 42
    assert type(back(job)) is type(job)  # a class that came by value is still one class after another trip


def test_importable_code_travels_by_name() -> None:
    for value in (Point, os.path.join, functools.partial, OrderedDict, len, Point.__init__):
        assert back(value) is value
    assert len(serialize(os.path.join).pickled) < 60


def test_modules_registered_by_value_are_honoured() -> None:
    import json.encoder as module

    cloudpickle.register_pickle_by_value(module)
    try:
        assert back(module.JSONEncoder) is not module.JSONEncoder or len(serialize(module.JSONEncoder).pickled) > 500
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    assert back(module.JSONEncoder) is module.JSONEncoder


def test_reducers_registered_with_copyreg_at_any_time_are_honoured() -> None:
    class Odd:
        pass

    serialize([Odd()])
    copyreg.pickle(Odd, lambda odd: (str, ("by copyreg",)))
    try:
        assert back([Odd()]) == ["by copyreg"]
    finally:
        del copyreg.dispatch_table[Odd]


def test_a_class_that_was_replaced_in_its_module_travels_by_value() -> None:
    module = types.ModuleType("shoal_test_module")
    sys.modules["shoal_test_module"] = module
    try:
        exec("class Old:\n    answer = 42", module.__dict__)  # noqa: S102
        old = module.Old
        exec("class Old:\n    answer = 43", module.__dict__)  # noqa: S102
        assert back([old()])[0].answer == 42
        assert back([module.Old()])[0].answer == 43
    finally:
        del sys.modules["shoal_test_module"]


class Socket:
    """Cannot be pickled."""

    def __init__(self, address: str) -> None:
        self.address, self.lock = address, threading.Lock()


def test_serializers_of_the_user() -> None:
    register_serializer(Socket, lambda socket: socket.address, lambda address: f"socket to {address}")
    try:
        assert back({"s": [Socket("here")]}) == {"s": ["socket to here"]}
        assert back(Socket("there")) == "socket to there"
        register_serializer(Socket, lambda socket: 1, lambda one: one)
        assert back(Socket("x")) == 1
    finally:
        deregister_serializer(Socket)
    deregister_serializer(Socket)
    with pytest.raises(UnserializableError):
        serialize(Socket("here"))


def test_serializers_of_the_user_replace_the_ways_that_exist() -> None:
    for cls, value in ((np.ndarray, np.arange(3)), (types.ModuleType, os)):
        register_serializer(cls, lambda _: "mine", lambda text: text)
        try:
            assert back(value) == "mine"
        finally:
            deregister_serializer(cls)
    assert np.array_equal(back(np.arange(3)), np.arange(3))
    assert back(os) is os


@pytest.mark.parametrize("cls", [int, dict, type, "Socket", lambda: None])
def test_serializers_that_could_never_be_called_are_refused(cls: Any) -> None:
    with pytest.raises(TypeError):
        register_serializer(cls, lambda value: value, lambda value: value)


# ------------------------------------------------------------------------------------------------------------- errors


class Config:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __repr__(self) -> str:
        return "Config()"


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


class DropsLock:
    def __init__(self, other: Any) -> None:
        self.lock, self.other = LOCK, other

    def __getstate__(self) -> dict[str, Any]:
        return {"other": self.other}


class Raises:
    def __reduce__(self) -> tuple[Any, ...]:
        raise ValueError("not today")


def uses_global() -> Any:
    return LOCK


uses_global.__module__ = "__main__"  # so that it goes by value


def closes_over(value: Any) -> Any:
    def inner() -> Any:
        return value

    return inner


BROKEN: dict[str, tuple[Any, str, str]] = {
    "itself": (LOCK, "'_thread.lock' object", "value"),
    "dict and attribute": ({"cfg": Config(lock=LOCK)}, "'_thread.lock' object", "value['cfg'].lock (type Config)"),
    "list and tuple": ([0, (1, LOCK)], "'_thread.lock' object", "value[1][1]"),
    "key": ({Config(lock=LOCK): 1}, "'_thread.lock' object", "value.<key Config()>.lock (type Config)"),
    "named tuple": ([Pair(1, LOCK)], "'_thread.lock' object", "value[0].right (type Pair)"),
    "slots": (Slotted([LOCK]), "'_thread.lock' object", "value.inner[0]"),
    "what is dropped is not blamed": (DropsLock([LOCK]), "'_thread.lock' object", "value.other[0]"),
    "argument default": (lambda a=LOCK: a, "'_thread.lock' object", "value.__defaults__[0]"),
    "keyword default": (lambda *, a=LOCK: a, "'_thread.lock' object", "value.__kwdefaults__['a']"),
    "closure": (closes_over(LOCK), "'_thread.lock' object", "value.<closure value>"),
    "global": (uses_global, "'_thread.lock' object", "value.<global LOCK>"),
    "partial": (functools.partial(print, 1, x=LOCK), "'_thread.lock' object", "value.keywords['x'] (type partial)"),
    "bound method": (Config(lock=LOCK).__repr__, "'_thread.lock' object", "value.__self__.lock (type Config)"),
    "deque": (deque([1, LOCK]), "'_thread.lock' object", "value[1]"),
    "ordered dict": (OrderedDict(a=LOCK), "'_thread.lock' object", "value['a']"),
    "array of objects": (np.array([1, LOCK], dtype=object), "'_thread.lock' object", "value.flat[1] (type ndarray)"),
    "generator": ([(i for i in ())], "'generator' object", "value[0]"),
    "users' code": ({"r": Raises()}, ".Raises' object", "value['r']"),
}


@pytest.mark.parametrize(("value", "what", "path"), BROKEN.values(), ids=BROKEN.keys())
def test_the_error_names_the_culprit_and_where_it_sits(value: Any, what: str, path: str) -> None:
    with pytest.raises(UnserializableError) as caught:
        serialize(value)
    assert caught.value.what.endswith(what)
    assert caught.value.path == path
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is not None


def test_the_whole_sentence() -> None:
    with pytest.raises(UnserializableError) as caught:
        serialize({"cfg": Config(lock=LOCK)}, what="argument 2 of f")
    expected = "cannot pickle '_thread.lock' object; it sits at argument 2 of f['cfg'].lock (type Config)"
    assert str(caught.value) == expected
    assert str(pickle.loads(pickle.dumps(caught.value))) == expected


def test_the_reason_of_users_code_is_told() -> None:
    with pytest.raises(UnserializableError, match="ValueError: not today"):
        serialize([Raises()])


def test_an_instance_whose_class_cannot_travel() -> None:
    class Holder:
        lock = LOCK

    with pytest.raises(UnserializableError) as caught:
        serialize([Holder()])
    assert caught.value.path.startswith("value[0].__class__.lock (type ")


def test_too_deep_a_value_is_itself_to_blame() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnserializableError) as caught:
        serialize(deep)
    assert caught.value.path == "value"
    assert "recursion" in caught.value.reason


def test_circles_do_not_hold_up_the_search() -> None:
    first, second = Config(), Config()
    first.other, second.other, second.lock = second, first, LOCK
    with pytest.raises(UnserializableError) as caught:
        serialize(first)
    assert caught.value.path == "value.other.lock (type Config)"


def test_the_search_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "MAX_TRIES", 100)
    value: Any = [*[Point(i, i) for i in range(1000)], LOCK]
    started = time.monotonic()
    with pytest.raises(UnserializableError) as caught:
        serialize(value)
    assert time.monotonic() - started < 10
    assert caught.value.path == "value"
    assert "_thread.lock" in caught.value.reason


def test_parts_whose_own_code_fails_do_not_hide_the_error() -> None:
    class Vexing:
        def __reduce_ex__(self, protocol: Any) -> Any:
            return list, (), None, self

        def __iter__(self) -> Any:
            raise RuntimeError("no iteration")

        def __repr__(self) -> str:
            raise RuntimeError("no repr")

    with pytest.raises(UnserializableError) as caught:
        serialize({"v": {Vexing(): 1}})
    assert "<key <Vexing>>" in caught.value.path


def test_running_out_of_memory_is_not_a_pickling_problem() -> None:
    class Hungry:
        def __reduce__(self) -> tuple[Any, ...]:
            raise MemoryError

    with pytest.raises(MemoryError):
        serialize(Hungry())


def test_importing_it_is_light() -> None:
    script = (
        "import sys; from shoal.objects.serialization import serialize, deserialize\n"
        "deserialize(serialize({'a': 1, 'b': b'x' * 100_000}).flatten())\n"
        "heavy = {'cloudpickle', 'ctypes', 'numpy', 'asyncio', 'dataclasses', 'inspect'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30, env=environment)
