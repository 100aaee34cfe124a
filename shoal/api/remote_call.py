"""What type checkers see of `.remote(...)`; nothing here runs.

Arguments are checked against the parameters of the function or method, and the result is an `ObjectRef[R]`. Where a
parameter wants a `T`, an `ObjectRef[T]` may be passed too, because top-level references are resolved before the call
starts. Type checkers cannot map a `ParamSpec` that way, so `remote` is overloaded: the plain call in full, with
keywords and defaults; then calls with references for up to nine positional arguments, matched through the callable
that is wrapped (`Wraps`), which unlike a ParamSpec may be compared loosely; then one or two references before the rest.

A generator gives an `ObjectRefGenerator` of what it yields.

Rejected: one class for each number of parameters, as Ray has, which loses keywords and defaults in every editor.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Never, ParamSpec, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from shoal.runtime.generators import ObjectRefGenerator
    from shoal.runtime.object_ref import ObjectRef

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
F_co = TypeVar("F_co", covariant=True)
T0 = TypeVar("T0")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")
T7 = TypeVar("T7")
T8 = TypeVar("T8")
Y = TypeVar("Y")


class Wraps(Protocol[F_co]):
    """Whatever wraps a callable of type F."""

    @property
    def _function(self) -> F_co: ...


class RemoteCall(Generic[P, R_co]):
    """Something with a `remote` that takes P and returns an `ObjectRef[R]`."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def _function(self) -> Callable[P, R_co]: ...

        @overload
        def remote(  # type: ignore[overload-overlap]  # results of which nothing is known; else they would be items
            self: RemoteCall[P, Never], *args: P.args, **kwargs: P.kwargs
        ) -> ObjectRef[Any]: ...
        @overload
        def remote(  # type: ignore[overload-overlap]  # a generator's items rather than what it returns
            self: RemoteCall[P, Iterator[Y] | AsyncIterator[Y]], *args: P.args, **kwargs: P.kwargs
        ) -> ObjectRefGenerator[Y]: ...
        @overload
        def remote(self, *args: P.args, **kwargs: P.kwargs) -> ObjectRef[R_co]: ...
        @overload
        def remote(self: Wraps[Callable[[T0], R]], a0: T0 | ObjectRef[T0], /) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1], R]], a0: T0 | ObjectRef[T0], a1: T1 | ObjectRef[T1], /
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2, T3], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            a3: T3 | ObjectRef[T3],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2, T3, T4], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            a3: T3 | ObjectRef[T3],
            a4: T4 | ObjectRef[T4],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2, T3, T4, T5], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            a3: T3 | ObjectRef[T3],
            a4: T4 | ObjectRef[T4],
            a5: T5 | ObjectRef[T5],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2, T3, T4, T5, T6], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            a3: T3 | ObjectRef[T3],
            a4: T4 | ObjectRef[T4],
            a5: T5 | ObjectRef[T5],
            a6: T6 | ObjectRef[T6],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2, T3, T4, T5, T6, T7], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            a3: T3 | ObjectRef[T3],
            a4: T4 | ObjectRef[T4],
            a5: T5 | ObjectRef[T5],
            a6: T6 | ObjectRef[T6],
            a7: T7 | ObjectRef[T7],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[[T0, T1, T2, T3, T4, T5, T6, T7, T8], R]],
            a0: T0 | ObjectRef[T0],
            a1: T1 | ObjectRef[T1],
            a2: T2 | ObjectRef[T2],
            a3: T3 | ObjectRef[T3],
            a4: T4 | ObjectRef[T4],
            a5: T5 | ObjectRef[T5],
            a6: T6 | ObjectRef[T6],
            a7: T7 | ObjectRef[T7],
            a8: T8 | ObjectRef[T8],
            /,
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[Concatenate[T0, Q], R]], a0: ObjectRef[T0], /, *args: Q.args, **kwargs: Q.kwargs
        ) -> ObjectRef[R]: ...
        @overload
        def remote(
            self: Wraps[Callable[Concatenate[T0, T1, Q], R]],
            a0: T0 | ObjectRef[T0],
            a1: ObjectRef[T1],
            /,
            *args: Q.args,
            **kwargs: Q.kwargs,
        ) -> ObjectRef[R]: ...
        def remote(self, *args: Any, **kwargs: Any) -> Any: ...  # type: ignore[misc]  # P may name an argument "self"
