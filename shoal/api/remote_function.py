"""`@remote` on a function.

A `RemoteFunction` holds one settled `TaskTemplate` and hands it, with the arguments, to the current runtime. A call
costs one look into the slot and one comparison of argument counts on top of what the runtime does.

Types: see `remote_call.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, ParamSpec, TypeVar

from shoal.api.options import (
    TASK_OPTIONS,
    check_options,
    check_task_function,
    qualified_name,
    task_template,
    variant_key,
)
from shoal.api.remote_call import RemoteCall
from shoal.api.signatures import ANYTHING, Shape, shape_of
from shoal.api.words import no_graphs
from shoal.runtime import slot
from shoal.runtime.interface import TaskTemplate

P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)

_MAX_VARIANTS: Final = 64  # remembered `.options(...)` of one function; a loop over names must not fill the memory


class RemoteFunction(RemoteCall[P, R_co]):
    """A function whose calls run as tasks: `f.remote(...)` returns at once with a reference to the result."""

    __name__: str
    __qualname__: str
    __wrapped__: Callable[P, R_co]

    def __init__(self, function: Callable[P, R_co], options: Mapping[str, Any]) -> None:
        """`options` are as the user gave them.

        Raises:
            ValueError, TypeError, NotImplementedError: see `check_options`.
        """
        check_task_function(function)
        label = qualified_name(function)
        self._options = dict(options)
        self._bind(function, task_template(function, check_options(TASK_OPTIONS, options, where=f"@remote on {label}")))

    def _bind(self, function: Callable[P, R_co], template: TaskTemplate) -> None:
        self._template = template
        # The shape is read at the first call: while a recursive function is unpickled, its defaults are not there yet.
        self._shape: Shape | None = None
        self._least, self._most = 1, 0  # no count of arguments lies between them, so the first call looks closer
        self._variants: dict[object, RemoteFunction[P, R_co]] = {}
        for name in ("__module__", "__name__", "__qualname__", "__doc__", "__annotations__"):
            try:
                setattr(self, name, getattr(function, name))
            except AttributeError:  # a partial has no name
                continue
        self.__wrapped__ = function

    @property
    def _function(self) -> Callable[P, R_co]:
        """The plain function: what a task runs, and what a test may call."""
        function: Callable[P, R_co] = self._template.function
        return function

    if not TYPE_CHECKING:

        def remote(self, *args, **kwargs):
            """Submit one task; returns a reference, a list of them, or None, as `num_returns` says.

            Raises:
                TypeError: the arguments do not fit the parameters.
                UnserializableError: an argument, or the function itself, cannot be pickled.
            """
            if kwargs or not self._least <= len(args) <= self._most:
                self._check(args, kwargs)
            runtime = slot.current
            if runtime is None:
                runtime = _connect()
            return runtime.submit_task(self._template, args, kwargs)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._shape is None:
            self._shape = shape = shape_of(self._function, bound=False) or ANYTHING
            self._least, self._most = shape.plain_range()
        shape = self._shape
        if not shape.accepts(args, kwargs):
            raise TypeError(f"{qualified_name(self._function)}.remote(): {shape.complaint(args, kwargs)}")

    def options(self, **options: Any) -> RemoteFunction[P, R_co]:
        """The same function with other options; those not named stay as they are. The original does not change.

        An option replaces the former value as a whole: `resources={...}` is not merged.
        """
        key = variant_key(options)
        variant = None if key is None else self._variants.get(key)
        if variant is None:
            label = qualified_name(self._function)
            check_options(TASK_OPTIONS, options, where=f"{label}.options()")
            variant = RemoteFunction(self._function, {**self._options, **options})
            if key is not None:
                if len(self._variants) >= _MAX_VARIANTS:
                    self._variants.clear()
                self._variants[key] = variant
        return variant

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> NoReturn:
        name = getattr(self, "__name__", "f")
        raise TypeError(
            f"a remote function cannot be called directly: instead of {name}(...) write {name}.remote(...), "
            f"or {name}._function(...) to run it here"
        )

    if not TYPE_CHECKING:

        def __getattr__(self, name):
            if name == "bind":
                raise no_graphs(getattr(self, "__name__", "f"))
            raise AttributeError(f"a remote function has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"RemoteFunction({qualified_name(self._function)})"

    def __reduce__(self) -> tuple[Any, ...]:
        # State is set after the object exists, so that a function whose globals hold its own RemoteFunction (recursion)
        # can be pickled. What the runtime prepared (`template.bound`) belongs to this process and stays here.
        return _blank, (), (self._function, self._options)

    def __setstate__(self, state: tuple[Callable[P, R_co], dict[str, Any]]) -> None:
        function, self._options = state
        self._bind(function, task_template(function, check_options(TASK_OPTIONS, self._options, where="@remote")))


def _blank() -> RemoteFunction[..., Any]:
    return RemoteFunction.__new__(RemoteFunction)


def _connect() -> Any:
    from shoal.api.initialize import connect_if_needed

    return connect_if_needed()
