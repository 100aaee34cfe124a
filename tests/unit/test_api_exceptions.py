"""Errors: they pickle from their args, and a TaskError is the user's exception too, whatever that exception is like."""

from __future__ import annotations

import errno
import pickle
import threading
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import pytest

from shoal import exceptions
from shoal.exceptions import ActorDiedError, ShoalError, TaskError


def caught(function: Callable[[], Any]) -> BaseException:
    try:
        function()
    except BaseException as exc:
        return exc
    raise AssertionError("it did not raise")


def raised(exc: BaseException) -> BaseException:
    def fail() -> None:
        raise exc

    return caught(fail)


def made(exc: BaseException, name: str = "f") -> TaskError:
    """What a worker sends for `exc`."""
    return TaskError.from_exception(raised(exc), function_name=name, pid=7, ip="10.0.0.1", node_id="ab" * 28)


def arrived(exc: BaseException) -> TaskError:
    """What the getter raises for `exc`: through the wire, then combined."""
    return pickle.loads(pickle.dumps(made(exc))).as_raisable()


class Plain(Exception):
    pass


class CustomInit(Exception):
    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"code {code}")
        self.code, self.detail = code, detail


class Slotted(Exception):
    __slots__ = ("extra",)

    def __init__(self, extra: int) -> None:
        super().__init__("slotted")
        self.extra = extra


class Final(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("this class is final")


class WithMeta(Exception, metaclass=ABCMeta):
    pass


class BadRepr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Unreadable(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("will not be pickled")


class Frozen(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        if name in ("code",):
            raise AttributeError("frozen")
        super().__setattr__(name, value)


class OwnBase(BaseException):
    pass


SAMPLES: dict[type, tuple[Any, ...]] = {
    exceptions.TaskError: ("f", "Traceback", ValueError("x"), 1, "ip", "node", "repr"),
    exceptions.UnserializableError: ("'lock'", "value.x", "why"),
    exceptions.WorkerCrashedError: ("gone", None, 9, ("last line",)),
    exceptions.ActorDiedError: ("gone", "aa", True, False, None),
    exceptions.ObjectLostError: ("ab", "why"),
}


def all_errors() -> list[type[Exception]]:
    return [item for item in vars(exceptions).values() if isinstance(item, type) and issubclass(item, ShoalError)]


@pytest.mark.parametrize("cls", sorted(set(all_errors()), key=lambda cls: cls.__name__))
def test_every_error_pickles_from_its_args_and_has_a_text(cls: type[Exception]) -> None:
    args = next((SAMPLES[base] for base in cls.__mro__ if base in SAMPLES), ("text",))
    error = cls(*args)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is cls
    assert str(back) == str(error) != ""
    assert {k: v for k, v in vars(back).items() if not k.startswith("_")} == {
        k: v for k, v in vars(error).items() if not k.startswith("_")
    }


@pytest.mark.parametrize("cls", sorted({c for c in all_errors() if c is not TaskError}, key=lambda cls: cls.__name__))
def test_every_error_can_be_made_of_a_text_alone(cls: type[Exception]) -> None:
    assert "some text" in str(cls("some text"))


def test_rays_names_are_there() -> None:
    wanted = """RayError RayTaskError TaskCancelledError WorkerCrashedError NodeDiedError LocalRayletDiedError
        OutOfMemoryError RayActorError ActorDiedError ActorUnavailableError ActorAlreadyExistsError
        ActorHandleNotFoundError PendingCallsLimitExceeded AsyncioActorExit TaskUnschedulableError
        ActorUnschedulableError TaskPlacementGroupRemoved ActorPlacementGroupRemoved GetTimeoutError ObjectLostError
        ObjectFetchTimedOutError ObjectFreedError OwnerDiedError ReferenceCountingAssertionError
        ObjectReconstructionFailedError ObjectStoreFullError OutOfDiskError RuntimeEnvSetupError RaySystemError RpcError
        AuthenticationError CrossLanguageError UserCodeException UnserializableException
        ObjectRefStreamEndOfStreamError StreamingGeneratorReplayInconsistentError
        OufOfBandObjectRefSerializationException RayChannelError RayChannelTimeoutError RayCgraphCapacityExceeded
        RayDirectTransportError PlasmaObjectNotAvailable"""
    for name in wanted.split():
        assert issubclass(getattr(exceptions, name), ShoalError), name


def test_errors_are_also_what_python_would_have_raised() -> None:
    assert issubclass(exceptions.GetTimeoutError, TimeoutError)
    assert issubclass(exceptions.UnserializableError, TypeError)
    assert issubclass(exceptions.ActorAlreadyExistsError, ValueError)
    assert issubclass(exceptions.ClusterNotFoundError, ConnectionError)


def test_a_task_error_is_also_the_users_exception() -> None:
    error = arrived(ValueError("boom", 3))
    with pytest.raises(ValueError, match="boom") as info:
        raise error
    assert isinstance(info.value, TaskError)
    assert info.value.args == ("boom", 3)
    assert isinstance(error.__cause__, ValueError)
    assert error.cause is error.__cause__
    assert repr(error) == "TaskError(ValueError('boom', 3))"
    assert type(error).__name__ == "TaskError(ValueError)"


def test_its_text_says_what_and_where() -> None:
    text = str(arrived(ValueError("boom")))
    assert text.startswith("f() failed (pid=7, ip=10.0.0.1, node=abababababab)")
    assert "in fail" in text
    assert text.endswith("ValueError: boom")


def test_fields_tell_where_it_ran() -> None:
    error = TaskError.from_exception(
        raised(Plain("x")), function_name="C.m", pid=1, ip="::1", node_id="aa", actor_repr="C()"
    )
    error = error.as_raisable()
    where = (error.function_name, error.pid, error.ip, error.node_id, error.actor_repr)
    assert where == ("C.m", 1, "::1", "aa", "C()")
    assert "actor=C()" in str(error)


def test_each_reader_gets_an_instance_of_its_own() -> None:
    stored = made(ValueError("x"))
    first, second = stored.as_raisable(), stored.as_raisable()
    assert first is not second
    assert type(first) is type(second)  # the class is made once


def test_a_custom_init_is_not_run_and_its_attributes_are_there() -> None:
    error = arrived(CustomInit(4, detail="d"))
    assert isinstance(error, CustomInit)
    assert (error.code, error.detail) == (4, "d")
    assert isinstance(error.cause, CustomInit)
    assert error.cause.detail == "d"


def test_slots_travel() -> None:
    error = arrived(Slotted(5))
    assert isinstance(error, Slotted)
    assert error.extra == 5


def test_what_cannot_be_pickled_becomes_its_repr() -> None:
    problem = Plain("has a lock", threading.Lock())
    problem.lock = threading.Lock()  # type: ignore[attr-defined]
    problem.number = 3  # type: ignore[attr-defined]
    error: Any = arrived(problem)
    assert isinstance(error, Plain)
    assert "lock" in error.args[1]
    assert error.number == 3
    assert "lock" in error.lock


def test_a_class_that_refuses_to_be_pickled_still_travels() -> None:
    error = arrived(Unreadable("x"))
    assert isinstance(error, Unreadable)
    assert error.args == ("x",)


def test_a_class_that_exists_only_in_the_worker_arrives_as_its_base() -> None:
    class Local(KeyError):
        handle = threading.Lock()  # by value, and so not at all

    error = arrived(Local("k"))
    assert isinstance(error, KeyError)
    assert "Local" in str(error)


def test_a_class_whose_module_is_missing_at_the_reader_leaves_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = pickle.dumps(made(Plain("lost")))
    monkeypatch.setitem(globals(), "Plain", None)
    back = pickle.loads(flat)
    error = back.as_raisable()
    assert type(error) is TaskError
    assert error.cause is None
    assert "lost" in str(error)
    assert "lost" in repr(error)


def test_builtin_fields_outside_of_dict_are_copied() -> None:
    error: Any = arrived(OSError(errno.ENOENT, "no such", "file"))
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror, error.filename) == (errno.ENOENT, "no such", "file")
    decode: Any = arrived(caught(b"\xff".decode))
    assert isinstance(decode, UnicodeDecodeError)
    assert (decode.encoding, decode.start, decode.object) == ("utf-8", 0, b"\xff")


def test_key_error_and_stop_iteration_and_attribute_error() -> None:
    assert isinstance(arrived(KeyError("k")), KeyError)
    missing: Any = arrived(caught(lambda: object().missing))  # type: ignore[attr-defined]
    assert missing.name == "missing"
    assert type(arrived(StopIteration(3))) is TaskError  # would end a generator of the reader


@pytest.mark.parametrize("exc", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_what_steers_the_interpreter_stays_with_the_task(exc: BaseException) -> None:
    error = arrived(exc)
    assert type(error) is TaskError
    assert type(error.cause) is type(exc)
    assert type(exc).__name__ in str(error)


def test_cancellation_stays_with_the_task() -> None:
    import asyncio

    assert type(arrived(asyncio.CancelledError())) is TaskError


def test_a_base_exception_of_the_users_is_caught_as_itself() -> None:
    with pytest.raises(OwnBase):
        raise arrived(OwnBase("x"))


def test_groups_can_be_split() -> None:
    error = arrived(ExceptionGroup("several", [ValueError("a"), KeyError("b")]))
    assert isinstance(error, ExceptionGroup)
    seen = []
    try:
        raise error
    except* ValueError as group:
        seen += group.exceptions
    except* KeyError as group:
        seen += group.exceptions
    assert [type(one) for one in seen] == [ValueError, KeyError]


def test_groups_with_members_that_do_not_pickle() -> None:
    error = arrived(ExceptionGroup("several", [ValueError(threading.Lock()), CustomInit(1, detail="d")]))
    assert isinstance(error, ExceptionGroup)
    assert [type(one) for one in error.exceptions] == [ValueError, CustomInit]


def test_a_class_that_cannot_be_combined_is_said() -> None:
    error = arrived(Final("x"))
    assert type(error) is TaskError
    assert isinstance(error.cause, Final)
    assert "use `except TaskError`" in str(error)


@pytest.mark.parametrize("exc", [WithMeta("x"), BadRepr("x"), Frozen("x")])
def test_odd_classes(exc: Exception) -> None:
    error = arrived(exc)
    assert isinstance(error, type(exc))
    assert str(error)
    assert repr(error)


def test_frozen_attributes_survive() -> None:
    exc = Frozen("x")
    exc.__dict__["code"] = threading.Lock()
    error: Any = arrived(exc)
    assert "lock" in error.code


def test_the_chain_is_kept() -> None:
    def fail() -> None:
        try:
            raise KeyError("inner")
        except KeyError as inner:
            raise ValueError("outer") from inner

    error = arrived(caught(fail))
    assert isinstance(error.cause, ValueError)
    assert isinstance(error.cause.__cause__, KeyError)
    assert "direct cause" in str(error)


def test_an_error_that_passes_through_several_tasks_stays_the_first_one() -> None:
    error: TaskError = arrived(ValueError("deep"))
    for depth in range(3):
        error = pickle.loads(pickle.dumps(made(error, name=f"level{depth}"))).as_raisable()
    assert isinstance(error, ValueError)
    assert "level2() failed" in str(error)
    assert "level0() failed" in str(error)
    assert str(error).count("f() failed") == 1


def test_a_combined_error_can_be_sent_on() -> None:
    error = arrived(CustomInit(4, detail="d"))
    again: Any = pickle.loads(pickle.dumps(error))
    assert isinstance(again, CustomInit)
    assert isinstance(again, TaskError)
    assert again.detail == "d"


def test_shoals_own_errors_are_combined_too() -> None:
    error = arrived(exceptions.GetTimeoutError("late"))
    assert isinstance(error, TimeoutError)
    assert isinstance(error, TaskError)
    assert type(arrived(ShoalError("x"))) is TaskError


def test_own_frames_are_not_shown() -> None:
    from shoal.api.options import check_runtime_env

    def user_code() -> None:
        check_runtime_env(3)

    text = made(caught(user_code)).traceback_str
    assert "in user_code" in text
    assert "options.py" not in text
    assert "in check_runtime_env" not in text


def test_the_text_is_bounded() -> None:
    assert len(made(ValueError("x" * 1_000_000)).traceback_str) < 70_000


def test_a_died_actor_shows_why() -> None:
    error = ActorDiedError("its constructor raised", "aa", False, True, made(ValueError("no")))
    back = pickle.loads(pickle.dumps(error))
    assert "ValueError: no" in str(back)
    assert back.actor_init_failed
    assert isinstance(back.__cause__, TaskError)


def test_a_lost_object_takes_a_name_and_a_reason_or_a_whole_text() -> None:
    assert str(exceptions.ObjectLostError("ab", "its node died")) == "object ab is lost: its node died"
    assert str(exceptions.OwnerDiedError("object ab is lost: x")) == "object ab is lost: x"
