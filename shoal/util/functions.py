"""Functions that travel with many calls: pickled once here, and unpickled once by each worker.

That pays for code that has no name to be found by (of `__main__`, a notebook, a lambda). A closure travels as it is:
its cells may hold anything, and each call gets what they held when it was made.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any, Final

from shoal.objects.serialization import pickle_anything

MOST_FUNCTIONS: Final = 64
MOST_BYTES: Final = 64 << 10
"""Kept by each worker for each function; larger ones are likely to carry data."""


def pack(function: Callable[..., Any]) -> Any:
    """What to send in place of `function`; it unpickles as the function."""
    if type(function) is not FunctionType or function.__closure__ or is_importable(function):
        return function
    return _pack(function)


def is_importable(function: Callable[..., Any]) -> bool:
    """Whether it pickles as a name."""
    module = getattr(function, "__module__", None)
    if not isinstance(module, str) or module == "__main__":
        return False
    found: Any = sys.modules.get(module)
    for name in getattr(function, "__qualname__", "").split("."):
        found = getattr(found, name, None)
    return found is function


@lru_cache(MOST_FUNCTIONS)
def _pack(function: FunctionType) -> Any:
    try:
        pickled, buffers, refs = pickle_anything(function)
    except Exception:  # noqa: BLE001 # user code; whoever sends it explains what is wrong with it
        return function
    # References must be seen by whoever sends them.
    return function if buffers or refs or len(pickled) > MOST_BYTES else _Packed(pickled)


class _Packed:
    __slots__ = ("_pickled",)

    def __init__(self, pickled: bytes) -> None:
        self._pickled = pickled

    def __reduce__(self) -> tuple[Any, tuple[bytes]]:
        return _unpack, (self._pickled,)


@lru_cache(MOST_FUNCTIONS)
def _unpack(pickled: bytes) -> Any:
    return pickle.loads(pickled)  # noqa: S301
