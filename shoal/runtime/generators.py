"""What users hold of a remote generator: a stream of references, or (the older way) all of them at once."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from typing import Any, Generic, NoReturn, Protocol, TypeVar

from shoal.objects.ids import OBJECT_BYTES
from shoal.runtime.object_ref import ObjectRef

T_co = TypeVar("T_co", covariant=True)


class Source(Protocol):
    """Where a generator gets its references from: see `streams.Stream`, whose reader it is."""

    @property
    def head(self) -> ObjectRef[Any]: ...
    @property
    def completed(self) -> ObjectRef[Any]: ...
    def next_item(self, timeout_s: float | None) -> ObjectRef[Any] | None: ...
    def is_finished(self) -> bool: ...
    def when_ready(self) -> Awaitable[None]: ...
    def whole(self) -> ObjectRef[Any]: ...
    def task_id(self) -> bytes: ...


class ObjectRefGenerator(Generic[T_co]):
    """References to what a remote generator yields, as soon as it does: `for ref in f.remote(): get(ref)`.

    When the generator raises, the last reference carries the error. What was not taken is freed when this object goes,
    and the remote generator is closed then. For one thread at a time; it stays in its process, the references travel.
    """

    __slots__ = ("__weakref__", "_source")

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def _head(self) -> ObjectRef[Any]:
        """What `wait` waits for in its place."""
        return self._source.head

    @property
    def _whole(self) -> ObjectRef[Any]:
        """What `cancel` takes in its place."""
        return self._source.completed

    def __iter__(self) -> ObjectRefGenerator[T_co]:
        return self

    def __next__(self) -> ObjectRef[T_co]:
        """Waits until the next item exists."""
        return self._source.next_item(None)  # type: ignore[return-value]  # None only with a timeout

    def __aiter__(self) -> ObjectRefGenerator[T_co]:
        return self

    async def __anext__(self) -> ObjectRef[T_co]:
        source = self._source
        while True:
            if not source.head.state:
                await source.when_ready()
            try:
                ref = source.next_item(0)
            except StopIteration:
                raise StopAsyncIteration from None
            if ref is not None:
                return ref

    def _next_sync(self, timeout: float | None = None) -> ObjectRef[T_co]:
        """As `next()`, but gives a nil reference when nothing has come within `timeout` seconds."""
        ref = self._source.next_item(timeout)
        return ref if ref is not None else ObjectRef(b"\xff" * OBJECT_BYTES, b"")

    def next_ready(self) -> bool:
        """Whether `next()` would return (or stop) at once."""
        return bool(self._source.head.state)

    def is_finished(self) -> bool:
        """Whether everything was taken and the remote generator has ended."""
        return self._source.is_finished()

    def completed(self) -> ObjectRef[None]:
        """A reference that is ready when the whole call has ended, and fails as it does.

        From now on the remote generator runs to its end, even if nobody takes what it yields.
        """
        return self._source.whole()

    def task_id(self) -> bytes:
        """Binary id of the call."""
        return self._source.task_id()

    def send(self, _value: object) -> NoReturn:
        raise NotImplementedError("nothing can be sent into a remote generator; call an actor's method instead")

    def throw(self, _type: object, _value: object = None, _traceback: object = None) -> NoReturn:
        raise NotImplementedError("nothing can be thrown into a remote generator; cancel() interrupts it")

    def close(self) -> NoReturn:
        raise NotImplementedError("a remote generator is closed when its ObjectRefGenerator is dropped: del it")

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self.task_id().hex()})"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an ObjectRefGenerator cannot leave its process; pass on the references that it yields, or list(generator)"
        )


class DynamicObjectRefGenerator(Generic[T_co]):
    """What `get` gives for a call with num_returns="dynamic": a reference for each value that it yielded."""

    def __init__(self, refs: list[ObjectRef[T_co]]) -> None:
        self._refs = refs

    def __iter__(self) -> Iterator[ObjectRef[T_co]]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __repr__(self) -> str:
        return f"DynamicObjectRefGenerator({len(self._refs)} references)"
