"""What a value was rebuilding when unpickling it failed.

The error of a failed load is whatever some constructor or `__setstate__` raised, which says little about whose it was.
So the bytes are unpickled once more, by the standard library's pickler in Python, which can be watched; what it was
calling when it failed is added to the error as a note (PEP 678), which every traceback shows. It runs only after an
error; the price is that what could be rebuilt is rebuilt twice.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any, Final

MOST_BYTES: Final = 16 << 20
"""A longer pickle would take seconds."""

_Unpickler: Any = pickle._Unpickler
_WATCHED = (pickle.REDUCE, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.BUILD)


class _Watched(_Unpickler):  # type: ignore[misc]
    """Keeps in `doing` what it is about to call."""

    doing = ""
    dispatch = dict(_Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        self.doing = f"{module}.{name}, which is looked up by name"
        found = super().find_class(module, name)
        self.doing = ""
        return found

    def _watch(self, code: int) -> None:
        stack = self.stack
        if code == pickle.BUILD[0]:
            self.doing = f"{_name(type(stack[-2]))}, whose state is restored"
        else:
            function = stack[-3 if code == pickle.NEWOBJ_EX[0] else -2]
            self.doing = f"{_name(function)}, which is called"
        _Unpickler.dispatch[code](self)
        self.doing = ""


for _code in _WATCHED:
    _Watched.dispatch[_code[0]] = lambda self, code=_code[0]: self._watch(code)


def add_culprit(error: BaseException, stream: bytes | memoryview, buffers: Sequence[memoryview]) -> None:
    """Note on `error`, which unpickling raised, what it came from; nothing when that does not fail again, or would take
    too long to find."""
    if len(stream) > MOST_BYTES:
        return
    unpickler = _Watched(io.BytesIO(stream), buffers=buffers)
    try:
        unpickler.load()
    except BaseException:  # noqa: BLE001 # the same error as before, or one that says less
        if unpickler.doing:
            error.add_note(f"unpickling failed at {unpickler.doing}")


def add_place(error: BaseException, place: str) -> None:
    """Say which value it was."""
    error.add_note(f"it is in {place}")


def _name(thing: Any) -> str:
    qualified = getattr(thing, "__qualname__", None) or repr(thing)
    return f"{getattr(thing, '__module__', '')}.{qualified}".removeprefix("builtins.")
