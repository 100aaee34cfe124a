"""What programs send each other: cycles, references in odd places, classes of every kind, odd exceptions."""

from __future__ import annotations

import collections
import dataclasses
import enum
import gc
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

import shoal
from shoal.exceptions import TaskError

pytestmark = pytest.mark.usefixtures("local")


@shoal.remote
def same(value: Any) -> Any:
    return value


@shoal.remote
def run(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def there_and_back(value: Any) -> Any:
    return shoal.get(same.remote(value))


# -------------------------------------------------------------------------------------------------- shapes of values


class Color(enum.Enum):
    RED = "red"


class Mode(enum.Flag):
    READ = enum.auto()
    WRITE = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int
    tags: list[str] = dataclasses.field(default_factory=list)


class Pair(NamedTuple):
    left: int
    right: str = "r"


Triple = collections.namedtuple("Triple", "a b c")  # programs use both


def test_classes_of_every_kind() -> None:
    assert there_and_back(Color.RED) is Color.RED
    assert there_and_back(Mode.READ | Mode.WRITE) == Mode.READ | Mode.WRITE
    assert there_and_back({Point(1, ["a"]).x: Point(1, ["a"])}) == {1: Point(1, ["a"])}
    assert type(there_and_back(Pair(1))) is Pair
    assert there_and_back(Triple(1, 2, 3)) == (1, 2, 3)

    @dataclasses.dataclass
    class Local:
        kind: Color

    class LocalColor(enum.Enum):
        BLUE = 1

    assert there_and_back(Local(Color.RED)) == Local(Color.RED)
    assert there_and_back([LocalColor.BLUE])[0].name == "BLUE"


def test_what_is_one_object_stays_one_object() -> None:
    shared, large = [1], bytearray(1 << 20)
    got = there_and_back({"a": shared, "b": [shared, shared], "c": large, "d": (large,)})
    assert got["a"] is got["b"][0] is got["b"][1]
    assert got["c"] is got["d"][0]
    loop: list[Any] = []
    loop.append({"self": loop})
    got = there_and_back(loop)
    assert got[0]["self"] is got


def test_huge_containers() -> None:
    assert len(there_and_back(list(range(1_000_000)))) == 1_000_000
    assert len(there_and_back({str(i): (i, None) for i in range(100_000)})) == 100_000
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(shoal.exceptions.UnserializableError, match="recursion"):
        same.remote(deep)


# ---------------------------------------------------------------------------------------------- references and handles


class Node:
    """Refers to itself and to whatever else."""

    def __init__(self, **more: Any) -> None:
        self.me = self
        self.__dict__.update(more)


@shoal.remote
class Peer:
    def __init__(self) -> None:
        self.peer: Any = None

    def meet(self, peer: Any) -> None:
        self.peer = peer

    def name(self) -> str:
        return "peer"

    def ask(self) -> str:
        return shoal.get(self.peer.name.remote())


def test_cycles_with_references_and_handles_in_them() -> None:
    one, other = Peer.remote(), Peer.remote()
    got = there_and_back(Node(ref=shoal.put(5), peers=[one, other], again={"node": Node(ref=shoal.put(6))}))
    assert got.me is got
    assert shoal.get([got.ref, got.again["node"].ref]) == [5, 6]
    shoal.get([got.peers[0].meet.remote(got.peers[1]), got.peers[1].meet.remote(got.peers[0])])
    assert [shoal.get(peer.ask.remote()) for peer in (one, other)] == ["peer", "peer"]  # in turn: each waits


def test_references_in_closures_are_kept_alive() -> None:
    def make() -> tuple[Any, Callable[[], Any]]:
        ref, large = shoal.put("kept"), shoal.put(bytes(1 << 20))

        @shoal.remote
        def reads() -> tuple[str, int]:
            return shoal.get(ref), len(shoal.get(large))

        return reads, lambda: shoal.get(ref)

    reads, function = make()
    gc.collect()
    assert shoal.get(reads.remote()) == ("kept", 1 << 20)
    assert shoal.get(run.remote(function)) == "kept"


def test_a_method_bound_to_an_object_with_references() -> None:
    class Holder:
        def __init__(self) -> None:
            self.ref = shoal.put([1, 2, 3])

        def total(self) -> int:
            return sum(shoal.get(self.ref))

    assert shoal.get(run.remote(Holder().total)) == 6


# ----------------------------------------------------------------------------------------------------------- exceptions


class KeywordOnly(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Locked(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class NotToBeSubclassed(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("no subclasses")


@shoal.remote
def raises(make: Callable[[], BaseException]) -> None:
    raise make()


def caught_from(make: Callable[[], BaseException]) -> TaskError:
    with pytest.raises(TaskError) as caught:
        shoal.get(raises.remote(make))
    return caught.value


def test_exceptions_with_odd_constructors_and_state() -> None:
    error: Any = caught_from(lambda: KeywordOnly(code=7))
    assert isinstance(error, KeywordOnly)
    assert error.code == 7
    assert isinstance(caught_from(Locked), Locked)
    assert "use `except TaskError`" in str(caught_from(lambda: NotToBeSubclassed("plain")))
    assert isinstance(caught_from(lambda: b"".decode and UnicodeDecodeError("utf-8", b"x", 0, 1, "why")), ValueError)


def test_groups_notes_and_causes() -> None:
    group: Any = caught_from(lambda: ExceptionGroup("several", [ValueError("a"), KeywordOnly(code=1)]))
    assert isinstance(group, ExceptionGroup)
    assert [type(inner) for inner in group.cause.exceptions] == [ValueError, KeywordOnly]

    def noted() -> BaseException:
        error = ValueError("n")
        error.add_note("a note")
        return error

    assert "a note" in str(caught_from(noted))

    @shoal.remote
    def chained() -> None:
        try:
            raise ZeroDivisionError("first")
        except ZeroDivisionError as exc:
            raise KeyError("second") from exc

    with pytest.raises(KeyError) as caught:
        shoal.get(chained.remote())
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    assert isinstance(cause.__cause__, ZeroDivisionError)
    assert "direct cause" in str(caught.value)


class DoesNotLoad:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise RuntimeError("I do not load")


def test_an_object_that_fails_on_load_is_named() -> None:
    error = caught_from_call(DoesNotLoad())
    assert "_refuse" in str(error)
    assert "in the arguments" in str(error)
    ref = shoal.put([DoesNotLoad()])
    with pytest.raises(RuntimeError, match="I do not load") as caught:
        shoal.get(ref)
    notes = " ".join(caught.value.__notes__)
    assert "_refuse" in notes
    assert ref.hex() in notes


def caught_from_call(value: Any) -> TaskError:
    with pytest.raises(TaskError) as caught:
        shoal.get(same.remote(value))
    return caught.value


# ------------------------------------------------------------------------------------------------------------- warnings


def test_a_large_closure_is_warned_of_and_a_huge_one_refused(caplog: pytest.LogCaptureFixture) -> None:
    def make(mebibytes: int) -> Any:
        blob = bytes(mebibytes << 20)
        return shoal.remote(lambda: len(blob))

    with caplog.at_level(logging.WARNING, logger="shoal"):
        assert shoal.get(make(11).remote()) == 11 << 20
    assert "put() that and pass the reference" in caplog.text
    with pytest.raises(ValueError, match="at most 100 MiB"):
        make(101).remote()


def test_a_large_argument_passed_again_and_again_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    large = bytes(2 << 20)
    with caplog.at_level(logging.WARNING, logger="shoal"):
        for number in range(15):
            shoal.get(run.remote(lambda a, b: None, number, large))
    assert caplog.text.count("put() it once") == 1
