"""Which bytes of the arena are free. Pure: it knows offsets and sizes, and no memory.

The problem: extents of 64 bytes and of gigabytes side by side, given back in any order and in pieces (a worker's slab
is allocated whole and freed object by object), with pages that are warm below the high-water mark and cold above it.
The choice: the set of free extents, kept twice: by address, for coalescing and for seeing a double free, and by
(size, address), for finding room. Small requests take the smallest extent that fits; large ones the lowest of the
smallest few that fit, so that large values land again and again on the same warm pages. Memory above the high-water
mark, which nobody has touched, is none of these extents: it is only taken, from its low end, when nothing else fits.
Rejected: a buddy allocator (up to half of each large value wasted) and plain first fit (slow with many holes).

Allocated extents are not recorded: whatever is not free is allocated. That is what lets a slab be freed in pieces.
"""

from __future__ import annotations

from typing import Final

from sortedcontainers import SortedList

GRANULE_BYTES: Final = 64
LARGE_BYTES: Final = 1024 * 1024
_CANDIDATES: Final = 32  # how many of the smallest fitting extents a large request compares by address


class Allocator:
    """Room of `capacity` bytes (rounded down to a multiple of 64), all free at first.

    Attributes:
        capacity: in bytes.
        used: allocated bytes, rounding included.
        high_water: the end of the highest extent that was ever allocated; memory above it was never handed out.
    """

    __slots__ = ("_by_address", "_by_size", "_size_at", "capacity", "high_water", "used")

    def __init__(self, capacity: int) -> None:
        if capacity < GRANULE_BYTES:
            raise ValueError(f"an arena needs {GRANULE_BYTES} bytes at least, not {capacity}")
        self.capacity = capacity - capacity % GRANULE_BYTES
        self.used = 0
        self.high_water = 0
        # Free extents below the high-water mark.
        self._by_address: SortedList[int] = SortedList()  # start
        self._by_size: SortedList[tuple[int, int]] = SortedList()  # (size, start)
        self._size_at: dict[int, int] = {}  # start -> size

    @property
    def free_bytes(self) -> int:
        return self.capacity - self.used

    @property
    def largest_free(self) -> int:
        """Size in bytes of the largest request that would succeed now."""
        largest: int = self._by_size[-1][0] if self._by_size else 0
        return max(largest, self.capacity - self._untouched_start())

    def allocate(self, size: int) -> int | None:
        """Take room for `size` bytes.

        Returns:
            The 64-aligned offset, or None when no free extent is large enough.
        Raises:
            ValueError: the size is negative.
        """
        size = rounded(size)
        by_size = self._by_size
        index = by_size.bisect_left((size, 0))
        if index == len(by_size):
            return self._allocate_untouched(size)
        start: int
        if size >= LARGE_BYTES:
            start = min(start for _, start in by_size.islice(index, index + _CANDIDATES))
            found = self._size_at[start]
            by_size.remove((found, start))
        else:
            found, start = by_size.pop(index)
        self._by_address.remove(start)
        del self._size_at[start]
        if found > size:
            self._add(start + size, found - size)
        self.used += size
        return start

    def _allocate_untouched(self, size: int) -> int | None:
        start = self._untouched_start()
        if start + size > self.capacity:
            return None
        if start < self.high_water:
            self._drop(start)
        self.high_water = start + size
        self.used += size
        return start

    def _untouched_start(self) -> int:
        """Where the free room that reaches to the end of the arena begins: the free extent that ends at the high-water
        mark counts."""
        if self._by_address:
            last: int = self._by_address[-1]
            if last + self._size_at[last] == self.high_water:
                return last
        return self.high_water

    def free(self, offset: int, size: int) -> None:
        """Give back allocated room: an extent as it was allocated, or any 64-aligned part of one or several.

        Raises:
            ValueError: part of it is free already, or lies outside; nothing has changed then.
        """
        size = rounded(size)
        end = offset + size
        if offset < 0 or end > self.capacity or offset % GRANULE_BYTES:
            raise ValueError(f"no extent of this arena: {size} bytes at {offset} (capacity {self.capacity})")
        by_address = self._by_address
        index = by_address.bisect_left(offset)
        below = by_address[index - 1] if index else None
        above = by_address[index] if index < len(by_address) else None
        below_end = -1 if below is None else below + self._size_at[below]
        if below_end > offset or end > self.high_water or (above is not None and above < end):
            raise ValueError(f"freed twice: part of the {size} bytes at {offset} is free already")
        start, total = offset, size
        if above == end:
            total += self._drop(end)
        if below is not None and below_end == offset:
            start = below
            total += self._drop(below)
        self._add(start, total)
        self.used -= size

    def check_invariants(self) -> None:
        """Raise AssertionError when the two orders disagree, extents touch or overlap, or the sums are wrong."""
        by_address = [(self._size_at[start], start) for start in self._by_address]
        if len(self._size_at) != len(by_address) or sorted(by_address) != list(self._by_size):
            raise AssertionError("the free extents by address and by size differ")
        end = -1
        for size, start in by_address:
            if start <= end or size <= 0 or start % GRANULE_BYTES or size % GRANULE_BYTES:
                raise AssertionError(f"a free extent of {size} bytes at {start} follows one that ends at {end}")
            end = start + size
        if end > self.high_water or self.high_water > self.capacity:
            raise AssertionError(f"{end} (last free byte) <= {self.high_water} (mark) <= {self.capacity} does not hold")
        if self.used + sum(size for size, _ in by_address) != self.high_water:
            raise AssertionError("used and free bytes do not add up")

    def _add(self, start: int, size: int) -> None:
        self._by_address.add(start)
        self._by_size.add((size, start))
        self._size_at[start] = size

    def _drop(self, start: int) -> int:
        size = self._size_at.pop(start)
        self._by_address.remove(start)
        self._by_size.remove((size, start))
        return size


def rounded(size: int) -> int:
    """The room that `size` bytes take: a multiple of 64, and at least 64."""
    if size < 0:
        raise ValueError(f"a size cannot be negative: {size}")
    return (size + GRANULE_BYTES - 1) & -GRANULE_BYTES or GRANULE_BYTES
