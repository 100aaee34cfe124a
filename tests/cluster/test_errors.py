"""What a user's exceptions look like on the other side."""

from __future__ import annotations

import logging
import pickle
import traceback
from typing import Any

import pytest

import shoal
from shoal.exceptions import ShoalError, TaskError

pytestmark = pytest.mark.usefixtures("local")


class CustomError(Exception):
    """Its constructor takes something else than it hands on, as many do."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.detail = detail


class HoldsLockError(Exception):
    def __init__(self) -> None:
        import threading

        super().__init__("holds a lock")
        self.lock = threading.Lock()


class RefusesError(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("I do not travel")


class FinalMeta(type):
    def __init__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> None:
        if any(isinstance(base, FinalMeta) for base in bases):
            raise TypeError("not to be subclassed")
        super().__init__(name, bases, body)


class FinalError(Exception, metaclass=FinalMeta):
    pass


@shoal.remote
def throw(error: Any) -> None:
    raise error


@shoal.remote
def throw_made(make: Any) -> None:
    raise make()


def test_the_exception_comes_back_as_itself_and_as_a_task_error() -> None:
    @shoal.remote
    def fail(x: int) -> float:
        return 1 / x

    with pytest.raises(ZeroDivisionError) as caught:
        shoal.get(fail.remote(0))
    error: Any = caught.value
    assert isinstance(error, TaskError)
    assert isinstance(error, ShoalError)
    assert error.function_name == "fail"
    assert isinstance(error.cause, ZeroDivisionError)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert error.pid > 0
    assert error.node_id == shoal.get_runtime_context().get_node_id()
    text = str(error)
    assert "fail() failed (pid=" in text
    assert "return 1 / x" in text
    assert "ZeroDivisionError: division by zero" in text
    assert "shoal/runtime" not in text, "our own frames are nobody's business"


def test_each_reader_gets_its_own_exception() -> None:
    ref = throw.remote(ValueError("once"))
    with pytest.raises(ValueError) as first:
        shoal.get(ref)
    with pytest.raises(ValueError) as second:
        shoal.get(ref)
    assert first.value is not second.value
    assert "".join(traceback.format_exception(first.value)).count("shoal.get(ref)") == 1


def test_attributes_and_constructors_of_custom_exceptions() -> None:
    with pytest.raises(CustomError) as caught:
        shoal.get(throw_made.remote(lambda: CustomError(7, detail="deep")))
    assert (caught.value.code, caught.value.detail) == (7, "deep")
    assert caught.value.args == ("code 7",)
    with pytest.raises(OSError) as missing:
        shoal.get(throw.remote(FileNotFoundError(2, "gone", "file.txt")))
    assert missing.value.errno == 2
    assert missing.value.filename == "file.txt"
    with pytest.raises(UnicodeDecodeError):
        shoal.get(throw_made.remote(lambda: UnicodeDecodeError("utf-8", b"x", 0, 1, "why")))


@pytest.mark.parametrize(("make", "kind"), [(HoldsLockError, HoldsLockError), (RefusesError, RefusesError)])
def test_exceptions_that_cannot_be_pickled_still_arrive(make: type[Exception], kind: type[Exception]) -> None:
    with pytest.raises(TaskError) as caught:
        shoal.get(throw_made.remote(make))
    assert isinstance(caught.value, kind)
    assert make.__name__ in str(caught.value)


def test_classes_that_cannot_be_subclassed() -> None:
    with pytest.raises(TaskError, match="except TaskError") as caught:
        shoal.get(throw_made.remote(FinalError))
    assert isinstance(caught.value.cause, FinalError)


def test_chains_are_kept() -> None:
    @shoal.remote
    def chained() -> None:
        try:
            raise KeyError("inner")
        except KeyError as exc:
            raise ValueError("outer") from exc

    with pytest.raises(ValueError) as caught:
        shoal.get(chained.remote())
    cause: Any = caught.value.__cause__
    assert isinstance(cause, ValueError)
    assert isinstance(cause.__cause__, KeyError)
    assert "direct cause" in str(caught.value)


def test_groups_keep_their_members() -> None:
    @shoal.remote
    def group() -> None:
        raise ExceptionGroup("several", [ValueError(1), ExceptionGroup("inner", [KeyError("k")])])

    with pytest.raises(ExceptionGroup) as caught:
        shoal.get(group.remote())
    assert [type(one) for one in caught.value.exceptions] == [ValueError, ExceptionGroup]
    found = caught.value.subgroup(KeyError)
    assert found is not None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, GeneratorExit, StopIteration, StopAsyncIteration])
def test_exceptions_that_steer_the_interpreter_stay_in_the_task(kind: type[BaseException]) -> None:
    with pytest.raises(TaskError) as caught:
        shoal.get(throw_made.remote(kind))
    assert not isinstance(caught.value, kind)
    assert isinstance(caught.value.cause, kind)
    assert shoal.get(shoal.put(1)) == 1


def test_an_error_travels_through_tasks_that_depend_on_it() -> None:
    @shoal.remote
    def use(value: Any, **more: Any) -> Any:
        return value

    failed = throw.remote(LookupError("first"))
    for ref in (use.remote(failed), use.remote(use.remote(failed)), use.remote(1, key=failed)):
        with pytest.raises(LookupError, match="first") as caught:
            shoal.get(ref)
        assert caught.value.function_name == "throw"  # type: ignore[attr-defined]
    refs = use.options(num_returns=2).remote(failed)
    for ref in refs:
        with pytest.raises(LookupError):
            shoal.get(ref)


def test_an_error_that_a_nested_get_raises_names_both_tasks() -> None:
    @shoal.remote
    def outer() -> None:
        shoal.get(throw.remote(ValueError("deep")))

    with pytest.raises(ValueError, match="deep") as caught:
        shoal.get(outer.remote())
    assert "throw()" in str(caught.value)
    assert "outer()" in str(caught.value)


def test_an_error_can_be_pickled_and_caught_again() -> None:
    with pytest.raises(ValueError) as caught:
        shoal.get(throw.remote(ValueError("x")))
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, ValueError)
    assert isinstance(again, TaskError)
    assert str(again) == str(caught.value)
    with pytest.raises(ValueError):
        shoal.get(throw.remote(caught.value))


def test_a_value_that_is_an_exception_is_a_value() -> None:
    @shoal.remote
    def give() -> Exception:
        return ValueError("a value")

    assert isinstance(shoal.get(give.remote()), ValueError)
    assert isinstance(shoal.get(shoal.put(KeyError(1))), KeyError)


def test_local_classes_as_exceptions() -> None:
    class LocalError(Exception):
        pass

    @shoal.remote
    def fail() -> None:
        raise LocalError("here")

    with pytest.raises(LocalError, match="here"):
        shoal.get(fail.remote())


def test_arguments_that_cannot_be_unpickled_fail_the_call_alone() -> None:
    class Bad:
        def __reduce__(self) -> Any:
            return _explode, ()

    @shoal.remote
    def take(value: Any) -> None:
        """Never gets that far."""

    with pytest.raises(OverflowError, match="unpickling"):
        shoal.get(take.remote(Bad()))

    @shoal.remote
    def give() -> Any:
        return Bad()

    with pytest.raises(OverflowError, match="unpickling"):
        shoal.get(give.remote())
    assert shoal.get(shoal.put(2)) == 2


def _explode() -> None:
    raise OverflowError("unpickling")


def test_an_error_that_nobody_read_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    import time

    with caplog.at_level(logging.ERROR, logger="shoal"):
        read = throw.remote(ValueError("was read"))
        with pytest.raises(ValueError):
            shoal.get(read)
        del read
        throw.remote(ValueError("nobody looked"))
        deadline = time.monotonic() + 10
        while "nobody looked" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "nobody looked" in caplog.text
    assert "was read" not in caplog.text


def test_errors_that_others_read_are_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    @shoal.remote
    def use(value: Any) -> Any:
        return value

    @shoal.remote
    def read(refs: list[Any]) -> str:
        try:
            shoal.get(refs[0])
        except ValueError as exc:
            return type(exc).__name__
        return "no error"

    with caplog.at_level(logging.ERROR, logger="shoal"):
        with pytest.raises(ValueError):
            shoal.get(use.remote(throw.remote(ValueError("through a task"))))
        with pytest.raises(ValueError):
            shoal.get([throw.remote(ValueError(f"one of several {i}")) for i in range(3)])
        assert "ValueError" in shoal.get(read.remote([throw.remote(ValueError("by a borrower"))]))
        shoal.get(use.remote(1))
    assert caplog.text == ""
