"""The agent's object store: who owns which stretch of the arena. Bookkeeping only; values are copied by others.

Room goes through these hands: allocated (belongs to a process until sealed or released) -> sealed (an immutable copy of
an object) -> free. A sealed copy is pinned while some process of this node reads it; deleting a pinned copy dooms it,
and its room returns with the last pin. A second copy, pulled from elsewhere, may be evicted when it is not pinned: its
home can name another. When nothing can be evicted, creators queue in the order they came, and are served as room comes
back.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, NamedTuple

from shoal.objects.allocator import Allocator, rounded

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 3.0
"""How long a creator waits for room before it is told that the store is full: long enough for references that were just
dropped to be counted away, short enough that a program that really holds everything learns it."""


class StoreFullError(Exception):
    """No room, nothing to evict, and none came back in time. `str()` is one line for a person."""


class Copy:
    """A sealed object in the arena."""

    __slots__ = ("contained", "doomed", "home", "offset", "owner", "pins", "primary", "size")

    def __init__(
        self, offset: int, size: int, home: bytes, owner: bytes, primary: bool, contained: list[tuple[bytes, bytes]]
    ) -> None:
        self.offset = offset
        self.size = size
        self.home = home
        self.owner = owner
        self.primary = primary
        self.contained = contained
        self.pins: dict[bytes, int] = {}  # worker id (or b"" for a transfer) -> count
        self.doomed = False


class _Creator(NamedTuple):
    process: bytes
    size: int
    done: Callable[[int | StoreFullError], None]
    deadline: float


class Store:
    """See the module. `evicted(object_id, copy)` is called after a copy was evicted, for its home to know."""

    def __init__(self, capacity: int, evicted: Callable[[bytes, Copy], None]) -> None:
        self.capacity = capacity
        self._allocator = Allocator(capacity)
        self._evicted = evicted
        self._copies: dict[bytes, Copy] = {}
        self._evictable: OrderedDict[bytes, None] = OrderedDict()  # secondary, unpinned copies; oldest use first
        self._evictable_bytes = 0
        self._unsealed: dict[bytes, dict[int, int]] = {}  # process -> offset -> size
        self._creators: deque[_Creator] = deque()
        self._pinned_by: dict[bytes, set[bytes]] = {}

    @property
    def used(self) -> int:
        """Bytes that are allocated or sealed."""
        return self._allocator.used

    @property
    def high_water(self) -> int:
        return self._allocator.high_water

    @property
    def is_waiting(self) -> bool:
        """Creators wait for room: call `expire` from time to time."""
        return bool(self._creators)

    def find(self, object_id: bytes) -> Copy | None:
        """The copy that may still be read, if this node has one."""
        copy = self._copies.get(object_id)
        return copy if copy is not None and not copy.doomed else None

    # -------------------------------------------------------------------------------------------- allocation

    def allocate(self, process: bytes, size: int, now: float, done: Callable[[int | StoreFullError], None]) -> None:
        """Give `done` the offset of `size` bytes that belong to `process` until sealed: now, or when there is room."""
        if size > self.capacity:
            text = f"an object of {size} bytes can never fit into this node's store of {self.capacity} bytes"
            done(StoreFullError(f"{text}; start the node with a larger --object-store-memory"))
            return
        offset = None if self._creators else self._try_allocate(process, size)
        if offset is None:
            self._creators.append(_Creator(process, size, done, now + PATIENCE_S))
        else:
            done(offset)

    def _try_allocate(self, process: bytes, size: int) -> int | None:
        offset = self._allocator.allocate(size)
        while offset is None and self._evictable:
            if self._allocator.free_bytes + self._evictable_bytes < size:
                return None  # not even without any of them
            object_id = next(iter(self._evictable))
            copy = self._copies.pop(object_id)
            self._keep(object_id, copy)
            self._allocator.free(copy.offset, copy.size)
            self._evicted(object_id, copy)
            offset = self._allocator.allocate(size)
        if offset is not None:
            self._unsealed.setdefault(process, {})[offset] = size
        return offset

    def release(self, process: bytes, offset: int) -> None:
        """Give back unsealed room; unknown offsets are the caller's bug and raise KeyError."""
        self._free(offset, self._unsealed[process].pop(offset))

    def _free(self, offset: int, size: int) -> None:
        self._allocator.free(offset, size)
        self._serve()

    def _serve(self) -> None:
        """Give room to those who wait for it, in the order in which they came."""
        while self._creators:
            creator = self._creators[0]
            found = self._try_allocate(creator.process, creator.size)
            if found is None:
                return
            self._creators.popleft()
            creator.done(found)

    def expire(self, now: float) -> None:
        """Tell creators who waited too long that the store is full."""
        while self._creators and self._creators[0].deadline <= now:
            creator = self._creators.popleft()
            sealed = sum(copy.size for copy in self._copies.values())
            creator.done(
                StoreFullError(
                    f"no room for {creator.size} bytes: {self.used} of the store's {self.capacity} bytes are in use "
                    f"({sealed} by objects that something still refers to); drop references, or start the node with a "
                    "larger --object-store-memory"
                )
            )
        self._serve()  # those behind may want less

    # ------------------------------------------------------------------------------------------------ copies

    def seal(
        self,
        process: bytes,
        object_id: bytes,
        offset: int,
        size: int,
        home: bytes,
        owner: bytes,
        *,
        primary: bool,
        contained: list[tuple[bytes, bytes]],
    ) -> Copy:
        """Unsealed room of `process` becomes a copy of the object. A second copy of the same object is dropped.

        Raises:
            KeyError: the room is not this process's.
        """
        room = self._unsealed[process].pop(offset)
        existing = self._copies.get(object_id)
        if existing is not None:
            self._free(offset, room)
            existing.doomed = False
            if primary and not existing.primary:
                existing.primary = True
                self._keep(object_id, existing)
            return existing
        if room > size:
            self._free_tail(offset, size, room)
        copy = self._copies[object_id] = Copy(offset, size, home, owner, primary, contained)
        if not primary:
            self._offer(object_id, copy)
        return copy

    def _offer(self, object_id: bytes, copy: Copy) -> None:
        """The copy may be evicted."""
        self._evictable[object_id] = None
        self._evictable_bytes += rounded(copy.size)

    def _keep(self, object_id: bytes, copy: Copy) -> None:
        """The copy may not be evicted (any more)."""
        if object_id in self._evictable:
            del self._evictable[object_id]
            self._evictable_bytes -= rounded(copy.size)

    def _free_tail(self, offset: int, size: int, room: int) -> None:
        kept = rounded(size)
        if kept < rounded(room):
            self._free(offset + kept, room - kept)

    def pin(self, object_id: bytes, process: bytes) -> Copy:
        """`process` reads the copy until as many `unpin`s. KeyError when there is no copy."""
        copy = self._copies[object_id]
        copy.pins[process] = copy.pins.get(process, 0) + 1
        self._pinned_by.setdefault(process, set()).add(object_id)
        self._keep(object_id, copy)
        return copy

    def unpin(self, object_id: bytes, process: bytes) -> None:
        copy = self._copies.get(object_id)
        if copy is None or process not in copy.pins:
            return
        copy.pins[process] -= 1
        if copy.pins[process] == 0:
            self._drop_pin(object_id, copy, process)

    def _drop_pin(self, object_id: bytes, copy: Copy, process: bytes) -> None:
        del copy.pins[process]
        pinned = self._pinned_by[process]
        pinned.discard(object_id)
        if not pinned:
            del self._pinned_by[process]
        if copy.pins:
            return
        if copy.doomed:
            del self._copies[object_id]
            self._free(copy.offset, copy.size)
        elif not copy.primary:
            self._offer(object_id, copy)
            self._serve()

    def delete(self, object_id: bytes) -> None:
        """Nobody refers to the object any more; its room returns now or with the last pin."""
        copy = self._copies.get(object_id)
        if copy is None:
            return
        self._keep(object_id, copy)
        if copy.pins:
            copy.doomed = True
        else:
            del self._copies[object_id]
            self._free(copy.offset, copy.size)

    def copies_of_home(self, home: bytes) -> list[bytes]:
        return [object_id for object_id, copy in self._copies.items() if copy.home == home]

    def process_gone(self, process: bytes) -> None:
        """Room that it never sealed and pins that it held return."""
        self._creators = deque(creator for creator in self._creators if creator.process != process)
        for object_id in list(self._pinned_by.get(process, ())):
            self._drop_pin(object_id, self._copies[object_id], process)
        for offset, size in self._unsealed.pop(process, {}).items():
            self._free(offset, size)

    def check_invariants(self) -> None:
        held = sum(rounded(copy.size) for copy in self._copies.values())
        held += sum(rounded(size) for rooms in self._unsealed.values() for size in rooms.values())
        assert held == self.used, (held, self.used)
        for object_id, copy in self._copies.items():
            assert (object_id in self._evictable) == (not copy.pins and not copy.primary), object_id.hex()
            assert copy.pins or not copy.doomed, object_id.hex()
            assert all(object_id in self._pinned_by[process] and count > 0 for process, count in copy.pins.items())
        assert self._evictable_bytes == sum(rounded(self._copies[object_id].size) for object_id in self._evictable)
        self._allocator.check_invariants()
