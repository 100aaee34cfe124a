"""`remote`: one decorator for functions and classes, bare or with options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from shoal.api.actor import ActorClass
from shoal.api.options import ACTOR_OPTIONS, TASK_OPTIONS
from shoal.api.remote_function import RemoteFunction
from shoal.api.words import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class RemoteDecorator(Protocol):
    """What `remote(num_cpus=2)` returns."""

    @overload
    def __call__(self, target: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]  # a class is callable too
    @overload
    def __call__(self, target: Callable[P, R], /) -> RemoteFunction[P, R]: ...


@overload
def remote(target: type[T], /) -> ActorClass[T]: ...  # type: ignore[overload-overlap]  # a class is callable too
@overload
def remote(target: Callable[P, R], /) -> RemoteFunction[P, R]: ...
@overload
def remote(**options: Any) -> RemoteDecorator: ...
def remote(*targets: Any, **options: Any) -> Any:
    """Make a function a task, or a class an actor.

    Use it bare (`@remote`), with options (`@remote(num_cpus=2)`), or as a function (`remote(f)`, `remote(Class)`).

    Raises:
        ValueError, TypeError: an option that does not exist or has a wrong value, or a target that cannot be remote.
        NotImplementedError: an option that shoal does not have yet.
    """
    if targets:
        if len(targets) > 1 or options:
            raise TypeError("remote() takes a function or class, or options by keyword: @remote(num_cpus=2)")
        return _wrap(targets[0], {})
    for name in options:
        if name not in TASK_OPTIONS and name not in ACTOR_OPTIONS:
            known = sorted(option for option in {*TASK_OPTIONS, *ACTOR_OPTIONS} if not option.startswith("_"))
            raise ValueError(
                f"@remote: there is no option {name!r}.{did_you_mean(name, known)} It knows {', '.join(known)}"
            )
    return lambda target: _wrap(target, options)


def _wrap(target: Any, options: dict[str, Any]) -> RemoteFunction[..., Any] | ActorClass[Any]:
    if isinstance(target, (RemoteFunction, ActorClass)):
        raise TypeError(f"{target!r} is remote already; use .options(...) to change how it runs")
    if isinstance(target, type):
        return ActorClass(target, options)
    if isinstance(target, (staticmethod, classmethod)) or not callable(target):
        raise TypeError(f"@remote belongs on a function or a class, not on {target!r}")
    return RemoteFunction(target, options)
