"""Does a call fit the parameters? Asked on each `.remote(...)`, so that a wrong call fails where it was written.

A full `inspect.signature().bind()` costs more than a whole task submission. Nearly all calls are plainly right, and
that can be seen by counting; only a call that does not pass the count is bound for real, to get Python's own words.
What cannot be counted (builtins, partials, callables of other kinds) is left to the worker.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Final

_VARARGS, _VARKEYWORDS = 0x04, 0x08  # code flags
GENERATOR, COROUTINE, ASYNC_GENERATOR = 0x20, 0x80, 0x200
_UNLIMITED = 1 << 30


class Shape:
    """The parameters of a function as numbers and names. Plain data: a handle carries it to other processes.

    Attributes:
        required: how many positional parameters have no default. limit: most positional arguments.
        names: the positional parameters in order; the first `positional_only` of them cannot be named.
        keyword_only: name -> whether it must be given.
        any_keyword: there is a `**kwargs`.
    """

    __slots__ = ("any_keyword", "keyword_only", "limit", "names", "positional_only", "required")

    def __init__(
        self,
        required: int,
        limit: int,
        positional_only: int,
        names: Sequence[str],
        keyword_only: Mapping[str, bool],
        any_keyword: bool,
    ) -> None:
        self.required = required
        self.limit = limit
        self.positional_only = positional_only
        self.names = tuple(names)
        self.keyword_only = dict(keyword_only)
        self.any_keyword = any_keyword

    def plain_range(self) -> tuple[int, int]:
        """Least and most arguments of a call without keywords; (1, 0) when there is no such call."""
        return (1, 0) if any(self.keyword_only.values()) else (self.required, self.limit)

    def pack(self) -> list[Any]:
        """As values that msgpack knows."""
        return [self.required, self.limit, self.positional_only, self.names, self.keyword_only, self.any_keyword]

    @classmethod
    def unpack(cls, packed: Sequence[Any]) -> Shape:
        return cls(*packed)

    def accepts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether Python would bind these arguments."""
        given = len(args)
        if given > self.limit:
            return False
        if not kwargs:
            return given >= self.required and not any(self.keyword_only.values())
        # Positional parameters are names[0:]; those that a position filled, or that take no keyword, cannot be named.
        by_keyword = 0
        for name in kwargs:
            if name in self.keyword_only:
                continue
            try:
                index = self.names.index(name)
            except ValueError:
                index = -1
            if index < self.positional_only:
                if not self.any_keyword:
                    return False
                continue
            if index < given:
                return False
            if index < self.required:
                by_keyword += 1
        if min(given, self.required) + by_keyword < self.required:
            return False
        return all(name in kwargs for name, must in self.keyword_only.items() if must)

    def complaint(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """One line on a call that `accepts` refused."""
        import inspect

        kinds = inspect.Parameter
        parameters = []
        for index, name in enumerate(self.names):
            kind = kinds.POSITIONAL_ONLY if index < self.positional_only else kinds.POSITIONAL_OR_KEYWORD
            default = kinds.empty if index < self.required else None
            parameters.append(kinds(name, kind, default=default))
        if self.limit == _UNLIMITED:
            parameters.append(kinds("args", kinds.VAR_POSITIONAL))
        for name, must in self.keyword_only.items():
            parameters.append(kinds(name, kinds.KEYWORD_ONLY, default=kinds.empty if must else None))
        if self.any_keyword:
            parameters.append(kinds("kwargs", kinds.VAR_KEYWORD))
        try:
            inspect.Signature(parameters).bind(*args, **kwargs)
        except TypeError as error:
            return str(error)
        return "the arguments do not fit its parameters"


ANYTHING: Final = Shape(0, _UNLIMITED, 0, (), {}, True)
"""What is known of a callable that is no plain Python function."""


def shape_of(function: Callable[..., Any], *, bound: bool) -> Shape | None:
    """The shape of a plain Python function, or None for anything else.

    Args:
        bound: leave the first parameter out: whoever calls it gives `self`.
    """
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    skip = 1 if bound and code.co_argcount else 0
    names = code.co_varnames[skip : code.co_argcount]
    optional = len(function.__defaults__ or ())
    limit = _UNLIMITED if code.co_flags & _VARARGS else len(names)
    has_default = function.__kwdefaults__ or {}
    first_keyword = code.co_argcount
    keyword_only = {
        name: name not in has_default
        for name in code.co_varnames[first_keyword : first_keyword + code.co_kwonlyargcount]
    }
    return Shape(
        required=max(0, len(names) - optional),
        limit=limit,
        positional_only=max(0, code.co_posonlyargcount - skip),
        names=names,
        keyword_only=keyword_only,
        any_keyword=bool(code.co_flags & _VARKEYWORDS),
    )


def code_flags(function: object) -> int:
    """Flags of the function's code (GENERATOR, COROUTINE, ASYNC_GENERATOR), looking through partials; 0 if none."""
    while True:
        inner = getattr(function, "func", None)  # functools.partial, partialmethod
        if inner is None or isinstance(function, FunctionType):
            break
        function = inner
    code = getattr(function, "__code__", None)
    return int(getattr(code, "co_flags", 0))
