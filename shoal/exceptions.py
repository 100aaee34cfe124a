"""Every error that shoal raises on purpose, sorted by blame: the user's code, the caller, the cluster, ourselves.

Two things make errors of a cluster different from errors of a program. They travel: an instance is pickled from its
`args` alone, so each class passes everything it keeps to `super().__init__` and writes its text in `__str__`. And one
of them, `TaskError`, stands for an exception that somebody else's code raised in another process. That exception may
refuse to be pickled, to be unpickled, or to be subclassed; none of that may keep the reader from seeing what happened.
So a `TaskError` always carries text, carries the exception itself as far as it can be carried (`_pack`: whole, else in
parts, else its nearest base class), and only where it is raised becomes an instance of the user's class as well.

Rejected: raising the bare user exception (loses where it ran), and pickling the combined class (its module may be
missing where it is read, and then not even the text would arrive).

Imports nothing from shoal. Ray's names for the same errors are aliases at the end.
"""

from __future__ import annotations

import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from traceback import TracebackException

_PACKAGE_DIR: Final = os.path.dirname(os.path.abspath(__file__)) + os.sep
_MAX_TRACEBACK_CHARS: Final = 64 * 1024  # a thousand nested tasks must not make a thousand times the text
_MAX_CHAIN: Final = 16  # exceptions carried along `__cause__`; the text shows the rest
_MAX_STRIPPED: Final = 1000  # exceptions of one chain whose frames are looked at
_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was not made by the interpreter itself


class ShoalError(Exception):
    """Base of everything in this module."""


# ------------------------------------------------------------------------------------------- the user's code raised


class TaskError(ShoalError):
    """A task or actor method raised. What `get` raises is this and the user's exception class at once.

    Attributes:
        function_name: qualified name, "Counter.add" for a method.
        traceback_str: the remote traceback without shoal's own frames; at most 64 KiB of text.
        cause: the user's exception as far as it could be carried, or None when only its text could.
        pid, ip, node_id: where it ran; `node_id` is hex.
        actor_repr: repr() of the actor instance, "" for a task.
    """

    def __init__(
        self,
        function_name: str,
        traceback_str: str,
        cause: BaseException | None = None,
        pid: int = 0,
        ip: str = "",
        node_id: str = "",
        actor_repr: str = "",
    ) -> None:
        super().__init__(function_name, traceback_str, pid, ip, node_id, actor_repr)
        # Kept apart from `args` and from plain names, which belong to the user's class in a combined error.
        self._shoal_task = (function_name, traceback_str, pid, ip, node_id, actor_repr)
        self._shoal_cause = cause
        self._shoal_hint = ""
        self.__cause__ = cause

    @classmethod
    def from_exception(
        cls, exc: BaseException, *, function_name: str, pid: int, ip: str, node_id: str, actor_repr: str = ""
    ) -> TaskError:
        """What a worker returns in place of a value. `exc` must still have its traceback. Never raises."""
        return TaskError(function_name, _format(exc), exc, pid, ip, node_id, actor_repr)

    @property
    def function_name(self) -> str:
        return self._shoal_task[0]

    @property
    def traceback_str(self) -> str:
        return self._shoal_task[1]

    @property
    def pid(self) -> int:
        return self._shoal_task[2]

    @property
    def ip(self) -> str:
        return self._shoal_task[3]

    @property
    def node_id(self) -> str:
        return self._shoal_task[4]

    @property
    def actor_repr(self) -> str:
        return self._shoal_task[5]

    @property
    def cause(self) -> BaseException | None:
        return self._shoal_cause

    def as_raisable(self) -> TaskError:
        """A fresh instance to raise: also an instance of the user's exception class wherever that is possible.

        It is fresh each time, so that several readers of one result do not share a traceback. Plain `TaskError`s come
        back for exceptions that steer the interpreter (KeyboardInterrupt, SystemExit, StopIteration, cancellation: they
        meant the task, not its reader) and for classes that cannot be subclassed.
        """
        plain = TaskError(self.function_name, self.traceback_str, self.cause, *self._shoal_task[2:])
        origin = _origin(self.cause)
        if origin is None or _steers_interpreter(origin):
            return plain
        try:
            error = _new_combined(_combined_class(type(origin)), origin)
        except Exception as failure:  # noqa: BLE001 - the class is the user's: its metaclass and __new__ may raise anything
            plain._shoal_hint = (
                f"{type(origin).__qualname__} cannot be combined with TaskError ({failure}), "
                f"so `except {type(origin).__name__}` does not match; use `except TaskError`"
            )
            return plain
        error._shoal_task = self._shoal_task
        error._shoal_cause = self._shoal_cause
        error._shoal_hint = ""
        error.__cause__ = self._shoal_cause
        return error

    def __str__(self) -> str:
        function_name, traceback_str, pid, ip, node_id, actor_repr = self._shoal_task
        actor = f", actor={actor_repr}" if actor_repr else ""
        node = f", node={node_id[:12]}" if node_id else ""
        hint = f"\n{self._shoal_hint}" if self._shoal_hint else ""
        return f"{function_name}() failed (pid={pid}, ip={ip}{node}{actor})\n{traceback_str.rstrip()}{hint}"

    def __repr__(self) -> str:
        cause = self._shoal_cause
        try:
            inner = self.traceback_str.rstrip().rpartition("\n")[2] if cause is None else repr(cause)
        except Exception:  # noqa: BLE001 - the user's __repr__
            inner = f"<{type(cause).__qualname__}>"
        return f"TaskError({inner})"

    def __reduce__(self) -> tuple[Callable[..., TaskError], tuple[Any, ...]]:
        combined = type(self) is not TaskError
        return _unpack_task_error, (self._shoal_task, _pack(self._shoal_cause), combined)


def _unpack_task_error(task: tuple[str, str, int, str, str, str], packed: bytes | None, combined: bool) -> TaskError:
    error = TaskError(task[0], task[1], _unpack(packed), *task[2:])
    return error.as_raisable() if combined else error


def _origin(exc: BaseException | None) -> BaseException | None:
    """The user's exception at the bottom of errors that passed through several tasks."""
    for _ in range(_MAX_CHAIN):
        if not isinstance(exc, TaskError):
            return exc
        exc = exc.cause
    return None


def _steers_interpreter(exc: BaseException) -> bool:
    if isinstance(exc, (KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, StopAsyncIteration)):
        return True
    return any(c.__name__ == "CancelledError" and not issubclass(c, Exception) for c in type(exc).__mro__)


# Weak in the combined class, which holds the user's class: classes that came by value can be collected.
_combined: weakref.WeakValueDictionary[type, type[TaskError]] = weakref.WeakValueDictionary()


def _combined_class(origin: type[BaseException]) -> type[TaskError]:
    if issubclass(TaskError, origin):  # Exception itself, ShoalError: nothing to add
        return TaskError
    found = _combined.get(origin)
    if found is None:
        name = f"TaskError({origin.__name__})"
        body = {"__module__": "shoal.exceptions", "__qualname__": name, "__doc__": origin.__doc__}
        found = _combined[origin] = type(name, (TaskError, origin), body)
    return found


def _new_combined(combined: type[TaskError], origin: BaseException) -> TaskError:
    """An instance that looks like `origin` in every attribute, made without running the user's `__init__`."""
    error: TaskError = _new_bare(combined, origin)
    if combined is TaskError:
        return error
    error.__dict__.update(vars(origin))
    _copy_slots(origin, error)
    error.args = origin.args
    return error


def _new_bare(cls: type[Any], like: BaseException) -> Any:
    builtin = next(c for c in cls.__mro__ if not c.__flags__ & _HEAP_TYPE)
    make: Callable[..., Any] = builtin.__new__
    return make(cls, like.message, like.exceptions) if isinstance(like, BaseExceptionGroup) else make(cls)


def _copy_slots(source: BaseException, target: BaseException) -> None:
    for name, value in _slots(source).items():
        try:
            setattr(target, name, value)
        except (AttributeError, TypeError):  # read-only
            continue


def _slots(exc: BaseException) -> dict[str, Any]:
    """What lives outside `__dict__`: `__slots__`, and fields of built-in classes such as OSError.errno."""
    found: dict[str, Any] = {}
    for cls in type(exc).__mro__:
        if cls is BaseException:
            break
        for name, member in vars(cls).items():
            if name[:2] == "__" or type(member).__name__ not in ("member_descriptor", "getset_descriptor"):
                continue
            try:
                found[name] = getattr(exc, name)
            except AttributeError:  # unset
                continue
    return found


def _pack(exc: BaseException | None, depth: int = 0) -> bytes | None:
    """`exc` and its chain as bytes that `_unpack` can read, or None when only text can travel.

    The bytes are opaque to the pickle that carries them, so that what cannot be read there cannot break the rest.
    """
    if exc is None or depth > _MAX_CHAIN:
        return None
    chained = exc.__cause__ if exc.__cause__ is not None else None if exc.__suppress_context__ else exc.__context__
    if isinstance(exc, TaskError) and chained is exc.cause:
        chained = None  # it carries that itself
    link = _pack(chained, depth + 1)
    explicit = exc.__cause__ is not None
    for attempt in (_whole, _parts, _base_class):
        try:
            body = attempt(exc, depth)
        except Exception:  # noqa: BLE001 - user code runs in here (__reduce__, __eq__): go on with the next way
            continue
        if body is not None:
            return pickle.dumps((body, link, explicit))
    return None


def _unpack(packed: bytes | None) -> BaseException | None:
    if packed is None:
        return None
    try:
        (way, body), link, explicit = pickle.loads(packed)  # noqa: S301
        exc = _restore(way, body)
    except Exception:  # noqa: BLE001 - a module that is missing here, a class that changed: the text still says what happened
        return None
    chained = _unpack(link)
    if chained is not None:
        if explicit:
            exc.__cause__ = chained
        else:
            exc.__context__ = chained
    return exc


def _restore(way: str, body: Any) -> BaseException:
    if way == "whole":
        exc: BaseException = pickle.loads(body)  # noqa: S301
        return exc
    if way == "group":
        cls, message, members = pickle.loads(body)  # noqa: S301
        inner = [_unpack(member) or ShoalError(text) for member, text in members]
        group: BaseException = cls(message, inner)
        return group
    cls, args, state = pickle.loads(body)  # noqa: S301
    builtin = next(c for c in cls.__mro__ if not c.__flags__ & _HEAP_TYPE)
    try:
        made: BaseException = builtin.__new__(cls, *args)
        builtin.__init__(made, *args)
    except Exception:  # noqa: BLE001
        made = builtin.__new__(cls)
    made.args = args
    for name, value in state.items():
        try:
            setattr(made, name, value)
        except Exception:  # noqa: BLE001 - a property or a frozen class: its own storage is __dict__
            made.__dict__[name] = value
    return made


def _whole(exc: BaseException, depth: int) -> tuple[str, Any] | None:
    """For classes that say how they want to be pickled. The others only inherit a way that calls `cls(*args)`, which is
    wrong for each one whose `__init__` takes something else than what it hands to `super().__init__`."""
    import cloudpickle

    own = {"__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__", "__getnewargs_ex__"}
    if not any(own & vars(cls).keys() for cls in type(exc).__mro__ if cls.__flags__ & _HEAP_TYPE):
        return None
    body: bytes = cloudpickle.dumps(exc)
    back = pickle.loads(body)  # noqa: S301
    return ("whole", body) if type(back) is type(exc) else None


def _parts(exc: BaseException, depth: int) -> tuple[str, Any]:
    """Class, args and attributes one by one; what cannot be pickled is replaced by its repr()."""
    import cloudpickle

    if not isinstance(exc, BaseExceptionGroup):
        return "parts", _portable_parts(type(exc), exc)
    cls: type[BaseException] = type(exc)
    try:
        cls(exc.message, [ValueError()])
        cloudpickle.dumps(cls)
    except Exception:  # noqa: BLE001 - a user's class with another constructor: the plain group says the same
        cls = ExceptionGroup if isinstance(exc, Exception) else BaseExceptionGroup
    members = [(_pack(member, depth + 1), _line(member)) for member in exc.exceptions]
    return "group", cloudpickle.dumps((cls, exc.message, members))


def _base_class(exc: BaseException, depth: int) -> tuple[str, Any] | None:
    """The nearest base class that can travel, so that at least `except` finds it."""
    for cls in type(exc).__mro__[1:]:
        if cls in (Exception, BaseException, object) or not issubclass(cls, BaseException):
            continue
        try:
            return "parts", _portable_parts(cls, exc)
        except Exception:  # noqa: BLE001
            continue
    return None


def _portable_parts(cls: type[BaseException], exc: BaseException) -> bytes:
    import cloudpickle

    state = _slots(exc) | vars(exc)
    state.pop("obj", None)  # of an AttributeError: whatever it was looked up on, however large
    try:
        body: bytes = cloudpickle.dumps((cls, exc.args, state))
        _restore("parts", body)
    except Exception:  # noqa: BLE001 - user code runs in here: find out which part it is
        args = tuple(map(_portable, exc.args))
        body = cloudpickle.dumps((cls, args, {name: _portable(value) for name, value in state.items()}))
        _restore("parts", body)
    return body


def _portable(value: Any) -> Any:
    import cloudpickle

    try:
        pickle.loads(cloudpickle.dumps(value))  # noqa: S301
    except Exception:  # noqa: BLE001 - user code runs in here
        try:
            return repr(value)
        except Exception:  # noqa: BLE001
            return f"<{type(value).__qualname__}>"
    return value


def _line(exc: BaseException) -> str:
    try:
        return f"{type(exc).__qualname__}: {exc}"
    except Exception:  # noqa: BLE001 - the user's __str__
        return type(exc).__qualname__


def _format(exc: BaseException) -> str:
    import traceback

    try:
        report = traceback.TracebackException.from_exception(exc, compact=True)
        _strip(report, exc)
        text = "".join(report.format())
    except Exception:  # noqa: BLE001 - the user's __str__ or a broken source loader
        text = _line(exc) + "\n"
    if len(text) > _MAX_TRACEBACK_CHARS:
        half = _MAX_TRACEBACK_CHARS // 2
        text = f"{text[:half]}\n  ... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"
    return text


def _strip(report: TracebackException, exc: BaseException) -> None:
    """Take shoal's own frames out of a traceback and of all that it chains to; keep them where nothing else is left."""
    todo: list[tuple[TracebackException | None, BaseException | None]] = [(report, exc)]
    for _ in range(_MAX_STRIPPED):
        if not todo:
            return
        one, of = todo.pop()
        if one is None or of is None:
            continue
        users = [frame for frame in one.stack if not frame.filename.startswith(_PACKAGE_DIR)]
        if users:
            one.stack[:] = users
        if isinstance(of, TaskError):
            one.__cause__ = one.__context__ = None  # its text tells that part already
        todo += [(one.__cause__, of.__cause__), (one.__context__, of.__context__)]
        if isinstance(of, BaseExceptionGroup):
            todo += zip(one.exceptions or (), of.exceptions, strict=False)


class UserCodeException(ShoalError):
    """Code that the user handed to shoal (a hook, a constructor of a plugin) raised."""


class TaskCancelledError(ShoalError):
    """The task was cancelled before it finished. `task_id` is hex."""

    def __init__(self, task_id: str = "", text: str = "") -> None:
        super().__init__(task_id, text)
        self.task_id, self.text = task_id, text

    def __str__(self) -> str:
        return self.text or f"task {self.task_id} was cancelled".replace("task  was", "the task was")


class TaskTimeoutError(ShoalError, TimeoutError):
    """A task or method ran for longer than its `timeout_s`, and was ended.

    Args:
        function_name: for people, "Counter.add" for a method.
        timeout_s: the limit.
        pid, ip, node_id: where it ran; `node_id` is hex.
        goes_on: it belongs to an actor, and nobody can say that it has ended by now.
    """

    def __init__(
        self,
        function_name: str,
        timeout_s: float = 0.0,
        pid: int = 0,
        ip: str = "",
        node_id: str = "",
        goes_on: bool = False,
    ) -> None:
        super().__init__(function_name, timeout_s, pid, ip, node_id, goes_on)
        self.function_name, self.timeout_s = function_name, timeout_s
        self.pid, self.ip, self.node_id, self.goes_on = pid, ip, node_id, goes_on

    def __str__(self) -> str:
        where = f"pid={self.pid}, ip={self.ip}, node={self.node_id[:12]}"
        after = "it was told to stop" if self.goes_on else "it was ended"
        return f"{self.function_name} ran for longer than timeout_s={self.timeout_s:g} ({where}); {after}"


class AsyncioActorExit(ShoalError):
    """Leaves an async actor's method when it called `exit_actor()`."""


# -------------------------------------------------------------------------------------------------- caller's mistake


class UnserializableError(TypeError, ShoalError):
    """A value cannot be pickled.

    Args:
        what: the offending object, as text ("'_thread.lock' object").
        path: where it sits in the value ("value['cfg'].lock (type Config)").
        reason: what pickling it raised.
    """

    def __init__(self, what: str, path: str = "", reason: str = "") -> None:
        super().__init__(what, path, reason)
        self.what, self.path, self.reason = what, path, reason

    def __str__(self) -> str:
        where = f"; it sits at {self.path}" if self.path else ""
        why = f" ({self.reason})" if self.reason else ""
        return f"cannot pickle {self.what}{where}{why}"


class GetTimeoutError(ShoalError, TimeoutError):
    """`get` did not have every value in time. The text says what is missing and why."""


class ActorAlreadyExistsError(ValueError, ShoalError):
    """The name is taken in this namespace."""


class ActorHandleNotFoundError(ValueError, ShoalError):
    """The handle belongs to another cluster or an earlier session."""


class PendingCallsLimitExceeded(ShoalError):
    """A handle has `max_pending_calls` calls on their way already."""


class RuntimeEnvSetupError(ShoalError):
    """A runtime environment could not be built."""


class AuthenticationError(ShoalError, PermissionError):
    """The other side does not know the cluster's token, or we do not."""


class VersionMismatchError(ShoalError, RuntimeError):
    """Two sides speak different versions. The text names both."""


class ClusterConnectionError(ShoalError, ConnectionError):
    """No cluster answers at the address."""


class ClusterNotFoundError(ClusterConnectionError):
    """`address="auto"` found no running cluster."""


class OutOfBandObjectRefSerializationError(ShoalError):
    """A reference was pickled outside of shoal, where nobody can count it."""


class CrossLanguageError(ShoalError):
    """Raised in another language's worker."""


# ---------------------------------------------------------------------------------------------- cluster's misfortune


class WorkerCrashedError(ShoalError):
    """The process that ran the task ended in the middle of it.

    Args:
        text: one line; "" is replaced by a general one.
        exit_code: status, or None when a signal ended it. signal: its number, or None.
        log_tail: the last lines that the process printed.
    """

    def __init__(
        self, text: str = "", exit_code: int | None = None, signal: int | None = None, log_tail: Sequence[str] = ()
    ) -> None:
        super().__init__(text, exit_code, signal, tuple(log_tail))
        self.text, self.exit_code, self.signal, self.log_tail = text, exit_code, signal, tuple(log_tail)

    def __str__(self) -> str:
        line = self.text or "the worker process ended while it ran the task"
        if self.signal and "killed by" not in line:
            line += f" (killed by signal {self.signal})"
        elif self.exit_code is not None and "exit code" not in line:
            line += f" (exit code {self.exit_code})"
        if self.log_tail:
            line += "; its last lines:\n  " + "\n  ".join(self.log_tail)
        return line


class NodeDiedError(ShoalError):
    """The node that ran the task is gone."""


class LocalAgentDiedError(ShoalError):
    """The agent of this process's own node is gone, and with it this process's part in the cluster."""


class OutOfMemoryError(ShoalError):
    """The node was short of memory and ended the worker."""


class ActorError(ShoalError):
    """An actor cannot take the call. `actor_id` is hex."""

    def __init__(self, error_msg: str = "", actor_id: str = "") -> None:
        super().__init__(error_msg, actor_id)
        self.error_msg, self.actor_id = error_msg, actor_id

    def __str__(self) -> str:
        who = f" (actor {self.actor_id})" if self.actor_id else ""
        return (self.error_msg or "the actor failed") + who


class ActorDiedError(ActorError):
    """The actor is dead for good.

    Args:
        error_msg: why, in one line.
        actor_id: hex.
        preempted: its node was taken away on purpose.
        actor_init_failed: its constructor raised.
        cause: the constructor's `TaskError`, if it was that.
    """

    def __init__(
        self,
        error_msg: str = "",
        actor_id: str = "",
        preempted: bool = False,
        actor_init_failed: bool = False,
        cause: TaskError | None = None,
    ) -> None:
        super().__init__(error_msg, actor_id)
        self.args = (error_msg, actor_id, preempted, actor_init_failed, cause)
        self.preempted, self.actor_init_failed, self.cause = preempted, actor_init_failed, cause
        if cause is not None:
            self.__cause__ = cause

    def __str__(self) -> str:
        who = f" (actor {self.actor_id})" if self.actor_id else ""
        why = f"\n{self.cause}" if self.cause is not None else ""
        return (self.error_msg or "the actor is dead") + who + why


class ActorUnavailableError(ActorError):
    """The actor cannot be reached now. The call may or may not have run; a later one may succeed."""

    def __str__(self) -> str:
        who = f" (actor {self.actor_id})" if self.actor_id else ""
        return (self.error_msg or "the actor is unavailable; the call may or may not have run") + who


class TaskUnschedulableError(ShoalError):
    """No node may run the task under the strategy that it was given."""


class ActorUnschedulableError(ShoalError):
    """No node may run the actor under the strategy that it was given."""


class TaskPlacementGroupRemoved(ShoalError):
    """The placement group of the task was removed."""


class ActorPlacementGroupRemoved(ShoalError):
    """The placement group of the actor was removed."""


class ObjectLostError(ShoalError):
    """A value that existed, or was promised, is gone.

    Args:
        object_ref_hex: which one; or the whole text, and then no reason.
        reason: one line.
    """

    def __init__(self, object_ref_hex: str = "", reason: str = "") -> None:
        super().__init__(object_ref_hex, reason)
        self.object_ref_hex, self.reason = object_ref_hex, reason

    def __str__(self) -> str:
        if not self.reason and " " in self.object_ref_hex:
            return self.object_ref_hex
        return f"object {self.object_ref_hex} is lost" + (f": {self.reason}" if self.reason else "")


class ObjectFetchTimedOutError(ObjectLostError):
    """No copy could be fetched in time."""


class ObjectFreedError(ObjectLostError):
    """The value was freed by hand."""


class OwnerDiedError(ObjectLostError):
    """The process that was to produce the value is gone."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The value was freed although a reference to it exists: a bug."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The last copy is gone and the value cannot be computed again; `reason` says why."""


class ObjectStoreFullError(ShoalError):
    """The store has no room, and nothing in it may be evicted or spilled."""


class OutOfDiskError(ShoalError):
    """The disk that spilled objects go to is full."""


class ObjectNotAvailableError(ShoalError):
    """The store does not have the object now."""


# --------------------------------------------------------------------------------------------------------- ourselves


class ShoalSystemError(ShoalError):
    """Something inside shoal went wrong; please report it."""


class RpcError(ShoalError):
    """A message could not be delivered or answered. `kind` is machine-readable."""

    def __init__(self, text: str = "", kind: str = "") -> None:
        super().__init__(text, kind)
        self.text, self.kind = text, kind

    def __str__(self) -> str:
        return self.text or self.kind or "a message was not answered"


class ObjectRefStreamEndOfStreamError(ShoalError):
    """A stream of references has ended."""


class StreamingGeneratorReplayInconsistentError(ShoalError):
    """A retried generator yielded another number of values than before."""


class ChannelError(ShoalError):
    """A channel between actors failed."""


class ChannelTimeoutError(ChannelError, TimeoutError):
    """A channel between actors did not move in time."""


class CompiledGraphCapacityExceeded(ShoalError):
    """Too many executions of a compiled graph are on their way."""


class DirectTransportError(ShoalError):
    """Moving a tensor between devices failed."""


# -------------------------------------------------------------------------------------------- names that Ray users know

RayError = ShoalError
RayTaskError = TaskError
RayActorError = ActorError
RaySystemError = ShoalSystemError
LocalRayletDiedError = LocalAgentDiedError
UnserializableException = UnserializableError
OufOfBandObjectRefSerializationException = OutOfBandObjectRefSerializationError
RayChannelError = ChannelError
RayChannelTimeoutError = ChannelTimeoutError
RayCgraphCapacityExceeded = CompiledGraphCapacityExceeded
RayDirectTransportError = DirectTransportError
PlasmaObjectNotAvailable = ObjectNotAvailableError
