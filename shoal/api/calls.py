"""`get`, `put`, `wait`, `cancel`, `kill` and `get_actor`: check the arguments, then ask the runtime.

The checks look at a list of 100,000 references as a whole (`set(map(type, ...))` runs in C), never one by one.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar, overload

from shoal.api.actor import ActorClass, ActorHandle, ActorMethod, ClassInfo
from shoal.api.initialize import connect_if_needed
from shoal.runtime import slot
from shoal.runtime.generators import ObjectRefGenerator
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.sweep import Rest, id_of

T = TypeVar("T")
W = TypeVar("W", bound=ObjectRef[Any] | ObjectRefGenerator[Any])


@overload
def get(refs: ObjectRef[T], *, timeout: float | None = None) -> T: ...
@overload
def get(refs: list[ObjectRef[T]], *, timeout: float | None = None) -> list[T]: ...
@overload
def get(refs: ObjectRefGenerator[T], *, timeout: float | None = None) -> ObjectRefGenerator[T]: ...
def get(refs: Any, *, timeout: float | None = None) -> Any:
    """The value of a reference, or the values of a list of them in its order; waits until they are there.

    Args:
        refs: a reference or a list of references (the same one may be in it twice; [] gives []). A generator is
            returned as it is.
        timeout: seconds; 0 only looks; None waits as long as it takes.
    Raises:
        TaskError: the task raised; it is also an instance of the exception's class. The first error found is raised.
        GetTimeoutError: not all were there in time.
        ObjectLostError, ActorDiedError, WorkerCrashedError, ...: see `shoal.exceptions`.
        ValueError, TypeError: `refs` is something else.
    """
    runtime = slot.current
    if runtime is None:
        runtime = connect_if_needed()
    if timeout is not None:
        _check_timeout(timeout)
    if isinstance(refs, ObjectRef):
        return runtime.get((refs,), timeout)[0]
    if type(refs) is not list:
        if isinstance(refs, ObjectRefGenerator):
            return refs
        _refuse_refs("get", refs)
    if not refs:
        return []
    _check_elements("get", refs)
    return runtime.get(refs, timeout)


def put(value: T) -> ObjectRef[T]:
    """Store a value and return a reference to it. Later changes of `value` do not show.

    Raises:
        TypeError: it is a reference already. UnserializableError: it cannot be pickled. ObjectStoreFullError.
    """
    runtime = slot.current
    if runtime is None:
        runtime = connect_if_needed()
    if isinstance(value, ObjectRef):
        raise TypeError(f"{value!r} is a reference already; pass it on as it is, or put([ref]) to put it into a value")
    ref: ObjectRef[T] = runtime.put(value)
    return ref


def wait(
    refs: list[W], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[W], list[W]]:
    """Wait until `num_returns` of the references are ready; both lists keep the order of `refs`.

    A generator in the list is ready when its next item is, or when it has no more.

    Args:
        timeout: seconds; 0 only looks; None waits as long as it takes.
        fetch_local: count a value as ready only once it is on this node, and bring it here.
    Returns:
        (ready, not ready); at most `num_returns` are in the first, even when more are ready.
    Raises:
        ValueError, TypeError: not a list of references, one twice, or `num_returns` not between 1 and their number.
    """
    runtime = slot.current
    if runtime is None:
        runtime = connect_if_needed()
    unseen: list[Any] = refs
    if type(refs) is Rest:
        unseen = refs.unseen()  # what an earlier wait returned is known to be fine
    elif type(refs) is not list:
        _refuse_refs("wait", refs)
    if timeout is not None:
        _check_timeout(timeout)
    if isinstance(num_returns, bool) or not isinstance(num_returns, int):
        raise TypeError(f"num_returns is a whole number, not {num_returns!r}")
    if not refs:
        return [], []
    heads: Any = refs
    if unseen and ObjectRefGenerator in _check_elements("wait", unseen, (ObjectRef, ObjectRefGenerator)):
        heads = [ref._head if isinstance(ref, ObjectRefGenerator) else ref for ref in refs]
    if unseen and len(set(map(id_of, heads))) != len(refs):
        twice = next(ref for ref in refs if refs.count(ref) > 1)
        raise ValueError(f"wait() takes each reference once; {twice!r} is there {refs.count(twice)} times")
    if not 1 <= num_returns <= len(refs):
        raise ValueError(f"num_returns is between 1 and the number of references ({len(refs)}), not {num_returns}")
    ready, rest = runtime.wait(heads, num_returns, timeout, fetch_local)
    if heads is refs:
        return ready, rest  # type: ignore[return-value]  # no generators: these are what was given
    given = dict(zip(map(id_of, heads), refs, strict=True))
    return [given[id_of(head)] for head in ready], [given[id_of(head)] for head in rest]


def cancel(ref: ObjectRef[Any] | ObjectRefGenerator[Any], *, force: bool = False, recursive: bool = True) -> None:
    """Cancel the call that makes `ref`. What is done stays done.

    What has not begun is dropped. A running task gets a KeyboardInterrupt, a coroutine of an actor is cancelled, and
    another method of an actor is only told, through `get_runtime_context().is_canceled()`. `get` then raises
    TaskCancelledError, unless the call returns a value all the same: then that is its result. It is not tried again.
    A generator is closed at its next item, wherever it runs; the reference to that has the error.

    In a process that only borrows the reference this is a wish, which the process that submitted the call is told.

    Args:
        force: end the worker process; `get` then raises WorkerCrashedError.
        recursive: cancel what it has submitted, too.
    Raises:
        ValueError: `force` for a method of an actor. TypeError: `ref` is something else.
    """
    given: object = ref
    if isinstance(given, ObjectRefGenerator):
        given = given._whole
    if not isinstance(given, ObjectRef):
        raise TypeError(f"cancel() takes the reference that .remote() returned, not {_kind(given)}")
    connect_if_needed().cancel(given, force=bool(force), recursive=bool(recursive))


def kill(actor: ActorHandle[Any], *, no_restart: bool = True) -> None:
    """End an actor's process at once. Calls on their way fail with ActorDiedError.

    Args:
        no_restart: False lets it restart, if it has restarts left.
    Raises:
        ValueError: not a handle.
    """
    given: object = actor
    if not isinstance(given, ActorHandle):
        hint = "; use cancel() for a task" if isinstance(given, ObjectRef) else ""
        raise ValueError(f"kill() takes the handle of an actor, not {_kind(actor)}{hint}")
    connect_if_needed().kill_actor(actor._actor_id, no_restart=bool(no_restart))


def get_actor(name: str, namespace: str | None = None) -> ActorHandle[Any]:
    """A handle to the actor of that name. It does not keep the actor alive.

    Args:
        namespace: where to look; None is this job's own.
    Raises:
        ValueError: there is no such actor.
    """
    _check_name("get_actor()", name)
    if namespace is not None:
        _check_name("get_actor(namespace=...)", namespace)
    runtime = connect_if_needed()
    info = runtime.find_actor(name, namespace)
    # Weak handles are not counted, so they have no home that would count them.
    return ActorHandle(runtime.borrow_actor(info.actor_id, b"", weak=True), ClassInfo.unpack(info.handle))


# ---------------------------------------------------------------------------------------------------------- arguments


def _check_timeout(timeout: float) -> None:
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout is a number of seconds or None, not {timeout!r}")
    if math.isnan(timeout) or timeout < 0:
        raise ValueError(f"timeout is 0 or more seconds, or None to wait as long as it takes, not {timeout}")


def _check_name(where: str, name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where} takes a name that is not empty, not {name!r}")


def _check_elements(call: str, refs: list[Any], allowed: tuple[type, ...] = (ObjectRef,)) -> set[type]:
    """The types of the elements."""
    kinds = set(map(type, refs))
    if kinds == {ObjectRef}:
        return kinds
    for index, ref in enumerate(refs):
        if not isinstance(ref, allowed):
            raise TypeError(f"{call}() takes references; element {index} of the list is {_kind(ref)}{_hint(ref)}")
    return kinds


def _refuse_refs(call: str, refs: object) -> None:
    """Raises: ValueError, as Ray does, with a hint at what was meant."""
    if isinstance(refs, list):  # a subclass: fine
        return
    if isinstance(refs, ObjectRef):
        raise TypeError(f"{call}() takes a list of references; write {call}([ref])")
    if isinstance(refs, (tuple, set, frozenset)) or hasattr(refs, "__next__"):
        raise ValueError(f"{call}() takes a reference or a list of references, not {_kind(refs)}; write list(...)")
    if refs is None:
        raise ValueError(f"{call}() got None, which is what a task or method with num_returns=0 returns")
    raise ValueError(f"{call}() takes a reference or a list of references, not {_kind(refs)}{_hint(refs)}")


def _hint(value: object) -> str:
    if isinstance(value, ObjectRefGenerator):
        return "; iterate over it: get(list(generator))"
    if isinstance(value, ActorHandle):
        return "; call a method first: get(handle.method.remote())"
    if isinstance(value, (ActorMethod, ActorClass)) or hasattr(value, "remote"):
        return "; it was not called: write .remote(...)"
    if isinstance(value, list):
        return "; lists do not nest"
    return ""


def _kind(value: object) -> str:
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    return f"a {type(value).__name__}: {text}"
