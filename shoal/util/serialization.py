"""How values of a class travel, and why one does not: `register_serializer`, `inspect_serializability`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO, TypeVar

from shoal.objects import serialization
from shoal.objects.diagnose import find_culprit

__all__ = ["FailureTuple", "deregister_serializer", "inspect_serializability", "register_serializer"]

T = TypeVar("T")


def register_serializer(cls: type[T], *, serializer: Callable[[T], Any], deserializer: Callable[[Any], T]) -> None:
    """Let instances of exactly `cls` travel as `serializer(instance)` and come back as `deserializer(that)`.

    It holds in this process, and in every worker that runs a function or an actor of this process whose code was sent
    after the registration: call this before the first `.remote()` of those that deal in such values. A process that
    only reads a value needs no registration, the deserializer travels with it.

    Raises:
        TypeError: `cls` is no class, or one that pickle never asks about (int, str, list ...).
    """
    serialization.register_serializer(cls, serializer, deserializer)


def deregister_serializer(cls: type) -> None:
    """Undo `register_serializer` in this process and for code that it sends from now on; workers that have been told
    stay as they are."""
    serialization.deregister_serializer(cls)


class FailureTuple(NamedTuple):
    """A part that cannot be pickled: the object, its place in the value, and the object that holds it."""

    obj: Any
    name: str
    parent: Any


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int = 3, print_file: TextIO | None = None
) -> tuple[bool, list[FailureTuple]]:
    """Whether a value can travel and, when not, which part of it is to blame and why; prints what it finds.

    Args:
        name: what to call the value; None takes its own name.
        depth: accepted for compatibility; the search goes down to the part itself.
        print_file: where to print; None is stdout.
    Returns:
        (True, []), or (False, [the part that pickling stumbles over first]).
    """
    label = name or getattr(base_obj, "__name__", None) or type(base_obj).__name__
    try:
        serialization.pickle_anything(base_obj)
    except Exception as error:  # noqa: BLE001 - whatever users' `__reduce__` raises is what was asked for
        culprit, holder, why = find_culprit(base_obj, error, label, serialization.pickle_anything)
        print(why, file=print_file or sys.stdout)
        return False, [FailureTuple(culprit, why.path, holder)]
    print(f"{label} can be pickled", file=print_file or sys.stdout)
    return True, []
