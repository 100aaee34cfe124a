"""Results in the order in which they come: `as_completed` and `map_unordered`.

Both cost the same for each result, however many there are: see `shoal.runtime.arrivals`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from shoal.api.initialize import connect_if_needed
from shoal.runtime.object_ref import ObjectRef

if TYPE_CHECKING:
    from shoal.runtime.interface import Runtime


def as_completed(refs: Sequence[ObjectRef[Any]], chunk_size: int = 10, yield_obj_refs: bool = False) -> Iterator[Any]:
    """The values of `refs` as they become ready, in no particular order.

    Args:
        chunk_size: how many are read at once.
        yield_obj_refs: give the references that are ready, and read nothing.
    Raises:
        TaskError, ...: as `get`, when the turn of a failed one comes; that ends the iteration.
        ValueError, TypeError: wrong arguments, at once.
    """
    _check_whole("chunk_size", chunk_size)
    refs = list(refs)
    for ref in refs:
        if not isinstance(ref, ObjectRef):
            raise TypeError(f"as_completed() takes references, not {ref!r} of type {type(ref).__name__}")
    if len(set(refs)) != len(refs):
        raise ValueError("as_completed() takes each reference once")
    return _as_completed(connect_if_needed(), refs, chunk_size, yield_obj_refs)


def _as_completed(runtime: Runtime, refs: list[ObjectRef[Any]], chunk_size: int, yield_obj_refs: bool) -> Iterator[Any]:
    arrivals = runtime.arrivals()
    arrivals.add(refs)
    missing = len(refs)
    refs.clear()  # who has read a value may drop it
    try:
        while missing:
            arrived = arrivals.take()[::-1]  # the next one last
            missing -= len(arrived)
            while arrived:
                if yield_obj_refs:
                    yield arrived.pop()
                else:
                    yield from _values(runtime, arrived, chunk_size)
    finally:
        arrivals.close()


def _values(runtime: Runtime, arrived: list[ObjectRef[Any]], chunk_size: int) -> Iterator[Any]:
    """The values of the next `chunk_size` of `arrived`, which are removed from it."""
    chunk = arrived[-chunk_size:][::-1]
    del arrived[-chunk_size:]
    values: Iterable[Any]
    try:
        values = runtime.get(chunk, None)
    except Exception:  # noqa: BLE001 # some of them are fine, and come before the error
        values = (runtime.get([ref], None)[0] for ref in chunk)
    yield from values


def map_unordered(
    fn: Any, items: Iterable[Any], backpressure_size: int | None = 100, chunk_size: int = 10
) -> Iterator[Any]:
    """`fn.remote(item)` for each item; gives the results as they come.

    Args:
        fn: a remote function, or a method of an actor's handle.
        items: read as they are needed, so it may be endless.
        backpressure_size: most calls whose results were not taken yet; None is no limit.
        chunk_size: how many results are read at once.
    Raises: as `as_completed`.
    """
    _check_whole("chunk_size", chunk_size)
    if backpressure_size is not None:
        _check_whole("backpressure_size", backpressure_size)
    if not hasattr(fn, "remote"):
        raise TypeError(f"map_unordered() takes a remote function or an actor's method, not {fn!r}; write remote(fn)")
    return _map_unordered(connect_if_needed(), fn, iter(items), backpressure_size, chunk_size)


def _map_unordered(runtime: Runtime, fn: Any, items: Iterator[Any], most: int | None, chunk_size: int) -> Iterator[Any]:
    arrivals = runtime.arrivals()
    arrived: list[ObjectRef[Any]] = []  # the next one last
    unread = 0
    try:
        while True:
            new = [fn.remote(item) for item in islice(items, None if most is None else most - unread)]
            arrivals.add(new)
            unread += len(new)
            del new  # a reference that has been read should go
            if not unread:
                return
            if not arrived:
                arrived = arrivals.take()
                arrived.reverse()
            for value in _values(runtime, arrived, chunk_size):
                unread -= 1
                yield value
    finally:
        arrivals.close()


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if value < 1:
        raise ValueError(f"{name} is 1 or more, not {value}")
