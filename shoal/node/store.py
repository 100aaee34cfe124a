"""The agent's object store: who owns which stretch of the arena. Bookkeeping only; values are copied by others.

Room goes through these hands: allocated (belongs to a process until sealed or released) -> sealed (an immutable copy of
an object) -> free. A sealed copy is pinned while some process of this node reads it; deleting a pinned copy dooms it,
and its room returns with the last pin. A second copy, pulled from elsewhere, may be evicted when it is not pinned: its
home can name another. A first copy may be written to disk when it is not pinned (`to_spill`, `spilled`); then its room
can be taken at any moment, and it is read back when it is asked for (`restored`). When nothing can be evicted, creators
queue in the order they came, and are served as room comes back.

Spilling begins in the background when the store is `SPILL_ABOVE` full, with what was unused longest, so that creators
seldom wait for a disk. Written copies stay in memory until their room is needed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from shoal.objects.allocator import Allocator, rounded

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 3.0
"""How long a creator waits for room before it is told that the store is full: long enough for references that were just
dropped to be counted away, short enough that a program that really holds everything learns it. Time in which spilling
makes progress does not count."""

SPILL_ABOVE: Final = 0.8
SPILL_DOWN_TO: Final = 0.6
"""Share of the store that is held by what cannot be given up at once."""

SPILL: Final = b"spill"
"""Pins a copy while it is written to disk."""
RESTORE: Final = b"restore"
"""Owns room that a copy is read back into."""


class StoreFullError(Exception):
    """No room, nothing to evict, and none came back in time. `str()` is one line for a person."""


class Copy:
    """A sealed object: in the arena, on disk, or both.

    Attributes:
        offset: in the arena; -1 while it is only on disk.
        spot: where it is on disk, in the words of whoever wrote it; None where it is not.
        pins: worker id (or a name of the agent's own, for a transfer) -> count.
    """

    __slots__ = ("contained", "doomed", "home", "offset", "owner", "pins", "primary", "size", "spot")

    def __init__(
        self, offset: int, size: int, home: bytes, owner: bytes, primary: bool, contained: list[tuple[bytes, bytes]]
    ) -> None:
        self.offset = offset
        self.size = size
        self.home = home
        self.owner = owner
        self.primary = primary
        self.contained = contained
        self.pins: dict[bytes, int] = {}
        self.doomed = False
        self.spot: Any = None

    @property
    def in_memory(self) -> bool:
        return self.offset >= 0


class _Creator(NamedTuple):
    process: bytes
    size: int
    done: Callable[[int | StoreFullError], None]
    deadline: float


class Store:
    """See the module.

    Args:
        evicted: called with (object id, copy, why) after this node's copy is gone for good, for its home to know.
        forgotten: called with a `Copy.spot` that nobody will read any more.
    Attributes:
        spilled_bytes: on disk, whether in memory as well or not.
        trouble: why spilling does not work now, for people who are told that the store is full; "" while it does.
    """

    def __init__(
        self,
        capacity: int,
        evicted: Callable[[bytes, Copy, str], None],
        forgotten: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self.capacity = capacity
        self.spilled_bytes = 0
        self.trouble = ""
        self._forgotten = forgotten
        self._allocator = Allocator(capacity)
        self._evicted = evicted
        self._copies: dict[bytes, Copy] = {}
        # Unpinned copies in memory, oldest use first: those whose room may be taken, and those to be written first.
        self._evictable: OrderedDict[bytes, None] = OrderedDict()
        self._evictable_bytes = 0
        self._spillable: OrderedDict[bytes, None] = OrderedDict()
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
            self._evict(next(iter(self._evictable)))
            offset = self._allocator.allocate(size)
        if offset is not None:
            self._unsealed.setdefault(process, {})[offset] = size
        return offset

    def _evict(self, object_id: bytes) -> None:
        copy = self._copies[object_id]
        self._keep(object_id, copy)
        self._allocator.free(copy.offset, copy.size)
        if copy.spot is not None:
            copy.offset = -1
        else:
            del self._copies[object_id]
            self._evicted(object_id, copy, "its last copy was evicted")

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
            sealed = sum(copy.size for copy in self._copies.values() if copy.in_memory)
            pinned = sum(copy.size for copy in self._copies.values() if copy.in_memory and copy.pins)
            text = (
                f"no room for {creator.size} bytes: {self.used} of the store's {self.capacity} bytes are in use "
                f"({sealed} by objects that something still refers to, {pinned} of those are being read)"
            )
            if self.trouble:
                text += f", and nothing can be moved to disk: {self.trouble}"
            creator.done(
                StoreFullError(f"{text}; drop references, or start the node with a larger --object-store-memory")
            )
        self._serve()  # those behind may want less

    def be_patient(self, now: float) -> None:
        """Room is being made: who waits for it waits anew."""
        self._creators = deque(creator._replace(deadline=now + PATIENCE_S) for creator in self._creators)

    # ---------------------------------------------------------------------------------------------- spilling

    def wanted_on_disk(self) -> int:
        """Bytes that should be written to disk now, as far as there are any that can be."""
        if not self._spillable:
            return 0
        held = self._allocator.used - self._evictable_bytes
        wanted = held - int(self.capacity * SPILL_DOWN_TO) if held > self.capacity * SPILL_ABOVE else 0
        if self._creators:  # even if there is room enough in sum: it may lie in pieces
            wanted = max(wanted, sum(creator.size for creator in self._creators))
        return wanted

    def to_spill(self, at_least: int, at_most: int) -> list[tuple[bytes, Copy]]:
        """Those unused longest, together `at_least` bytes or all there are, but not more than `at_most` (unless the
        first alone is). They are pinned until `spilled` or `not_spilled` is called for each."""
        chosen: list[tuple[bytes, Copy]] = []
        total = 0
        for object_id in self._spillable:
            copy = self._copies[object_id]
            if chosen and total + copy.size > at_most:
                break
            chosen.append((object_id, copy))
            total += copy.size
            if total >= at_least:
                break
        for object_id, _ in chosen:
            self.pin(object_id, SPILL)
        return chosen

    def spilled(self, object_id: bytes, spot: Any) -> None:
        """It is on disk. If everybody has dropped it meanwhile, `spot` is forgotten at once."""
        copy = self._copies[object_id]
        copy.spot = spot
        self.spilled_bytes += copy.size
        self.unpin(object_id, SPILL)
        self._serve()

    def not_spilled(self, object_id: bytes) -> None:
        self.unpin(object_id, SPILL)

    def restored(self, object_id: bytes, offset: int) -> Copy | None:
        """Room of `RESTORE` has been filled with the copy's bytes. None when it is not wanted any more."""
        size = self._unsealed[RESTORE].pop(offset)
        copy = self.find(object_id)
        if copy is None or copy.in_memory:
            self._free(offset, size)
            return copy
        copy.offset = offset
        if not copy.pins:
            self._offer(object_id, copy)
        return copy

    def lose(self, object_id: bytes, why: str) -> None:
        """What was written cannot be read back: the copy is gone, unless it is in memory again."""
        copy = self._copies.get(object_id)
        if copy is None or copy.in_memory or copy.spot is None:
            return
        del self._copies[object_id]
        for process in copy.pins:
            self._pinned_by[process].discard(object_id)
            if not self._pinned_by[process]:
                del self._pinned_by[process]
        self._forget(copy)
        self._evicted(object_id, copy, why)

    def _forget(self, copy: Copy) -> None:
        if copy.spot is not None:
            self.spilled_bytes -= copy.size
            spot, copy.spot = copy.spot, None
            self._forgotten(spot)

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
                if not existing.pins:
                    self._offer(object_id, existing)
            return existing
        if room > size:
            self._free_tail(offset, size, room)
        copy = self._copies[object_id] = Copy(offset, size, home, owner, primary, contained)
        self._offer(object_id, copy)
        return copy

    def _offer(self, object_id: bytes, copy: Copy) -> None:
        """Nobody reads the copy in memory: its room may be taken, or the copy be written so that it may."""
        if copy.primary and copy.spot is None:
            self._spillable[object_id] = None
            return
        self._evictable[object_id] = None
        self._evictable_bytes += rounded(copy.size)

    def _keep(self, object_id: bytes, copy: Copy) -> None:
        """The copy stays in memory as it is."""
        self._spillable.pop(object_id, None)
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
            self._remove(object_id, copy)
        elif copy.in_memory:
            self._offer(object_id, copy)
            if object_id in self._evictable:
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
            self._remove(object_id, copy)

    def _remove(self, object_id: bytes, copy: Copy) -> None:
        del self._copies[object_id]
        self._forget(copy)
        if copy.in_memory:
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
        held = sum(rounded(copy.size) for copy in self._copies.values() if copy.in_memory)
        held += sum(rounded(size) for rooms in self._unsealed.values() for size in rooms.values())
        assert held == self.used, (held, self.used)
        for object_id, copy in self._copies.items():
            free = copy.in_memory and not copy.pins
            on_disk = copy.spot is not None
            assert (object_id in self._evictable) == (free and (on_disk or not copy.primary)), object_id.hex()
            assert (object_id in self._spillable) == (free and copy.primary and not on_disk), object_id.hex()
            assert copy.in_memory or on_disk, object_id.hex()
            assert copy.pins or not copy.doomed, object_id.hex()
            assert all(object_id in self._pinned_by[process] and count > 0 for process, count in copy.pins.items())
        assert self._evictable.keys() | self._spillable.keys() <= self._copies.keys()
        assert self._evictable_bytes == sum(rounded(self._copies[object_id].size) for object_id in self._evictable)
        assert self.spilled_bytes == sum(copy.size for copy in self._copies.values() if copy.spot is not None)
        self._allocator.check_invariants()
