"""`ObjectRef`: the user's handle of an object, and at the same time this process's one record of it.

There is one instance per object and process (`References` finds it for objects that left the process), so Python's
own reference count is the local count: nothing is counted twice, and a ref that never leaves its process costs no
message and no finalizer. The end of the others, whose objects are known outside, is noticed by a `LastUse`.

All fields but `id` and `home` belong to the reactor's thread; `state` is written last when an object becomes ready, so
that other threads may read `value` once they see it.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from shoal.node.messages import PENDING
from shoal.objects import serialization
from shoal.objects.ids import OBJECT_BYTES, TASK_BYTES
from shoal.runtime import slot

if TYPE_CHECKING:
    import asyncio
    import concurrent.futures

    from shoal.runtime.core import CoreRuntime

T_co = TypeVar("T_co", covariant=True)


class ObjectRef(Generic[T_co]):
    """A reference to the result of a task, a method call, or a `put`; give it to `get`, `wait`, or another task.

    Hashable and equal by id; awaitable; picklable inside arguments, results and `put` values.
    """

    __slots__ = (
        "__weakref__",
        "_home",
        "_id",
        "attended",
        "contained",
        "followed",
        "local",
        "node",
        "owned",
        "published",
        "size",
        "state",
        "task",
        "value",
        "waiters",
        "watched",
    )

    def __init__(self, object_id: bytes, home: bytes, owned: bool = True, task: Any = None) -> None:
        self._id = object_id
        self._home = home  # node id of the home agent
        self.owned = owned  # this process made it: its state is known here first
        self.task = task  # what will produce it, while that is pending here
        self.state = PENDING
        self.value: bytes = b""  # flat value (INLINE, ERROR) or a text (LOST)
        self.size = 0
        self.waiters: list[Any] | None = None  # objects with `ready(ref)`
        self.followed = False  # a `LastUse` waits for its end
        self.contained: list[Any] | None = None  # keeps what the value refers to
        self.published = False  # the home agent knows it
        self.node = b""  # whose store was given the value first
        self.local = False  # a copy is in this node's store, as far as is known
        self.attended = False  # the `ReadyLog` will hear of it
        self.watched = False  # somebody has waited for it, so that the home of a borrowed one was asked

    def binary(self) -> bytes:
        """The 28 bytes of the id."""
        return self._id

    def hex(self) -> str:
        return self._id.hex()

    def task_id(self) -> bytes:
        """Binary id of the task that makes the object."""
        return self._id[:TASK_BYTES]

    def job_id(self) -> bytes:
        return self._id[:4]

    def is_nil(self) -> bool:
        return self._id == b"\xff" * OBJECT_BYTES

    @property
    def home(self) -> bytes:
        """Node id of the agent that counts references to the object."""
        return self._home

    def __hash__(self) -> int:
        return hash(self._id)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, ObjectRef) and self._id == other._id)

    def __repr__(self) -> str:
        return f"ObjectRef({self._id.hex()})"

    def __reduce__(self) -> tuple[Any, tuple[bytes, bytes]]:
        if not serialization.note_ref(self):
            _runtime().escaped_unseen(self)
        return _rebuild, (self._id, self._home)

    def __copy__(self) -> ObjectRef[T_co]:
        return self

    def __deepcopy__(self, memo: Any) -> ObjectRef[T_co]:
        return self

    def __await__(self) -> Generator[Any, None, T_co]:
        return self.as_future().__await__()

    def as_future(self) -> asyncio.Future[T_co]:
        """An asyncio future of the running loop. Cancelling it does not cancel the task."""
        future: asyncio.Future[T_co] = _runtime().async_future(self)
        return future

    def future(self) -> concurrent.futures.Future[T_co]:
        """A future of `concurrent.futures`; its callbacks run on a thread of the runtime and must be short."""
        future: concurrent.futures.Future[T_co] = _runtime().concurrent_future(self)
        return future


def _runtime() -> CoreRuntime:
    runtime = slot.current
    if runtime is None:
        raise RuntimeError("this ObjectRef belongs to a cluster that this process is not connected to any more")
    return runtime  # type: ignore[return-value]


def _rebuild(object_id: bytes, home: bytes) -> ObjectRef[Any]:
    return _runtime().borrow(object_id, home)
