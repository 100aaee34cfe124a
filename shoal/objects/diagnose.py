"""Why a value cannot be pickled: finds the part that is to blame, and where it sits.

The search goes down from the value the way the pickler does: it asks each object for what pickling would take of it
(its items, its `__reduce_ex__`, a function's closure, defaults and globals), tries those parts one by one, and goes on
with the first that fails. When no part fails, the object itself is to blame. What the pickler leaves out (a
`__getstate__` that drops a lock) is so never blamed. It runs only after an error and is bounded in depth, in tries and
in time: a huge value gets a less exact answer rather than a long wait. The price: `__reduce_ex__` of parts runs again.
"""

from __future__ import annotations

import copyreg
import pickle
import time
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any, Final

from shoal.exceptions import UnserializableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_DEPTH: Final = 50
MAX_TRIES: Final = 5_000
MAX_SECONDS: Final = 2.0
_MAX_KEY_TEXT: Final = 60
_LEAVES: Final = (type(None), bool, int, float, complex, str, bytes, bytearray, ModuleType)


def explain(
    value: object, error: BaseException, what: str, try_to_pickle: Callable[[object], object]
) -> UnserializableError:
    """The error to raise for `value`, whose pickling raised `error`.

    Args:
        try_to_pickle: raises for what cannot be pickled; its result does not matter.
        what: what the value is, in the words of whoever passed it: the path begins with it.
    """
    return find_culprit(value, error, what, try_to_pickle)[2]


def find_culprit(
    value: object, error: BaseException, what: str, try_to_pickle: Callable[[object], object]
) -> tuple[object, object, UnserializableError]:
    """As `explain`; returns the object to blame, the one that holds it (None when it is the value), and the error."""
    culprit, path, cause, holder, kind = _search(value, error, what, try_to_pickle)
    where = f"{path} (type {kind})" if kind else path
    return culprit, holder, UnserializableError(_describe(culprit), where, _reason(culprit, cause))


def _search(
    value: object, error: BaseException, what: str, try_to_pickle: Callable[[object], object]
) -> tuple[object, str, BaseException, object, str]:
    """Returns (object to blame, its path, what pickling it raised, its holder, name of the holder's type or "")."""
    give_up_at = time.monotonic() + MAX_SECONDS
    tries = 0
    path, cause, holder = what, error, ""
    parent: object = None
    if isinstance(error.__cause__, RecursionError) or isinstance(error, RecursionError):
        return value, path, cause, parent, holder  # nothing in it is to blame but its depth
    on_the_way = {id(value)}
    keep_alive: list[object] = []  # parts made by __reduce_ex__: their ids must not be used anew
    for _ in range(MAX_DEPTH):
        found = False
        for suffix, part in _until_error(_parts(value)):
            if isinstance(part, _LEAVES) or id(part) in on_the_way:
                continue
            tries += 1
            if tries > MAX_TRIES or time.monotonic() > give_up_at:
                return value, path, cause, parent, holder
            try:
                try_to_pickle(part)
            except Exception as exc:  # noqa: BLE001 # whatever users' `__reduce__` raises is what we look for
                holder = _holder_name(value, suffix)
                parent, value, cause, found = value, part, exc, True
                path += suffix
                on_the_way.add(id(part))
                keep_alive.append(part)
                break
        if not found:
            break
    return value, path, cause, parent, holder


def _until_error(parts: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The parts up to where users' code (a `__reduce__`, an `__iter__`, a `__hash__`) raises."""
    try:
        yield from parts
    except Exception:  # noqa: BLE001 # what cannot be looked into is itself to blame, and pickling it has said why
        return


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What pickling takes of `value`, each with the text that leads there from it."""
    kind = type(value)
    if kind is dict:
        yield from _items(value)
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        yield from ((f".{name}", item) for name, item in zip(kind._fields, value, strict=False))
    elif kind in (list, tuple):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif kind in (set, frozenset):
        yield from ((f".<element {_short(item)}>", item) for item in value)
    elif kind is FunctionType:
        yield from _parts_of_function(value)
    elif kind is MethodType:
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif kind is partial:
        yield ".func", value.func
        yield from ((f".args[{index}]", item) for index, item in enumerate(value.args))
        yield from ((f".keywords[{name!r}]", item) for name, item in value.keywords.items())
    elif kind.__module__ == "numpy" and kind.__name__ == "ndarray":
        yield from ((f".flat[{index}]", item) for index, item in enumerate(value.flat if value.dtype.hasobject else ()))
    elif isinstance(value, type):
        yield from ((f".{name}", _underlying(item)) for name, item in vars(value).items() if _is_own(name))
        yield from ((f".__bases__[{index}]", base) for index, base in enumerate(value.__bases__))
    else:
        yield from _parts_of_instance(value)


def _items(mapping: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, item in mapping.items():
        yield f"[{_short(key)}]", item
        yield f".<key {_short(key)}>", key


def _parts_of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield f".<closure {name}>", cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for index, default in enumerate(function.__defaults__ or ()):
        yield f".__defaults__[{index}]", default
    for name, default in (function.__kwdefaults__ or {}).items():
        yield f".__kwdefaults__[{name!r}]", default
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield f".<global {name}>", function.__globals__[name]
    for name, item in vars(function).items():
        yield f".{name}", item


def _global_names(code: Any) -> list[str]:
    """Names that the code, or code nested in it, may look up in its globals, in order of appearance."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            names.update(dict.fromkeys(_global_names(constant)))
    return list(names)


def _is_own(name: str) -> bool:
    return name not in ("__dict__", "__weakref__", "__module__", "__doc__", "__slots__")


def _underlying(item: Any) -> Any:
    """A plain function for what a class body wraps one in."""
    return item.__func__ if isinstance(item, classmethod | staticmethod) else item


def _parts_of_instance(value: Any) -> Iterator[tuple[str, Any]]:
    reduce = copyreg.dispatch_table.get(type(value))
    reduced = reduce(value) if reduce is not None else value.__reduce_ex__(5)
    if not isinstance(reduced, tuple) or len(reduced) < 2:
        return
    function, arguments, *rest = reduced
    state, list_items, dict_items = (*rest, None, None, None)[:3]
    yield from _parts_of_state(state)
    for index, item in enumerate(list_items or ()):
        yield f"[{index}]", item
    yield from _items(dict(dict_items or ()))
    for index, item in enumerate(arguments if isinstance(arguments, tuple) else ()):
        if not (index == 0 and item is type(value)):  # the class itself comes last
            yield f".<argument {index} of {getattr(function, '__name__', 'its constructor')}>", item
    yield ".__class__", type(value)


def _parts_of_state(state: Any) -> Iterator[tuple[str, Any]]:
    if type(state) is tuple and len(state) == 2 and isinstance(state[1], dict) and isinstance(state[0], dict | None):
        own, slots = state  # (__dict__, __slots__), as object.__reduce_ex__ gives it
        state = {**(own or {}), **slots}
    if type(state) is dict:
        for name, item in state.items():
            yield (f".{name}" if isinstance(name, str) and name.isidentifier() else f".<state {_short(name)}>"), item
    elif type(state) in (tuple, list):
        yield from ((f".<state>[{index}]", item) for index, item in enumerate(state))
    elif state is not None:
        yield ".<state>", state


def _holder_name(holder: object, suffix: str) -> str:
    """The type to name beside the path: of objects with attributes, whose type the path does not show."""
    if type(holder) in (dict, set, frozenset, FunctionType) or not suffix.startswith("."):
        return ""
    return holder.__qualname__ if isinstance(holder, type) else type(holder).__qualname__


def _describe(culprit: object) -> str:
    if isinstance(culprit, FunctionType | type):
        return f"{'class' if isinstance(culprit, type) else 'function'} {culprit.__qualname__}"
    kind = type(culprit)
    module = "" if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}."
    return f"'{module}{kind.__qualname__}' object"


def _reason(culprit: object, cause: BaseException) -> str:
    text = str(cause)
    if text == f"cannot pickle {_describe(culprit)}":
        return ""  # it would only repeat the sentence
    if isinstance(cause, TypeError | pickle.PicklingError):
        return text
    return f"{type(cause).__name__}: {text}"


def _short(key: object) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 # a user's `__repr__`
        text = f"<{type(key).__name__}>"
    return text if len(text) <= _MAX_KEY_TEXT else text[: _MAX_KEY_TEXT - 3] + "..."
