"""The node's shared memory: one anonymous file, mapped once in each process that touches it.

The problem: first touch of shared memory costs up to 60 times the copy itself, and each process pays again, in its page
tables, for pages that are warm already. Measured with 4 KiB pages on a 2-core virtual machine, GB/s over 256 MiB:

    copy into mapped pages                                          18
    copy into warm pages of a fresh mapping: one fault a page        3.1
    MADV_POPULATE_WRITE first, then the copy                         3.5
    MADV_POPULATE_READ first (maps 16 pages at once), then the copy  7.3
    copy into cold pages                                             0.3 (1.6 once the host has given the memory)
    MADV_POPULATE_WRITE of cold pages                                0.6 (1.7)

The choice: one arena per node, never remapped. The agent keeps a bounded stretch above the high-water mark warm
(`Warmer`, `Arena.warm`), and a process that is about to copy a large value to where it has not been yet populates its
own page tables first (`Arena.populate`). The file is a memfd, sealed in size: nothing is left on any disk or in
/dev/shm when the node dies, and nobody can shrink it under a reader. Others open it through /proc/<agent>/fd, which
only lets the same user in.

Reads are zero-copy. `Arena.pinned` gives a read-only view which tells when the last thing derived from it is gone.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading
import weakref
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

PAGE_BYTES: Final = mmap.PAGESIZE
MIB: Final = 1024 * 1024
POPULATE_BYTES: Final = 128 * 1024
"""Copies below this size just take their faults: 32 of them at the most, 35 us, once."""
_BLOCK_BYTES: Final = 64 * 1024  # what one fault maps where it can
_MOST_BLOCKS: Final = 256 * 1024
_FALLBACK_STEP_BYTES: Final = MIB  # how long touching pages by hand holds the GIL: less than a millisecond when warm
_SMALLEST_TYPE_BYTES: Final = 4096


class Arena:
    """A process's door to the node's shared memory. Making one maps nothing; the first use of its bytes does.

    All methods may be called from any thread.

    Attributes:
        capacity: in bytes.
        fd: of the memory, owned by this object until `close`.
        path: where processes of the same user can open the same memory as long as this process holds it.
    """

    def __init__(self, fd: int, capacity: int, path: str) -> None:
        """Use `create` or `open`."""
        self.capacity = capacity
        self.fd = fd
        self.path = path
        self._lock = threading.Lock()
        self._map: mmap.mmap | None = None
        self._whole = memoryview(b"")
        self._address = 0
        self._block_bytes = _BLOCK_BYTES
        while capacity > self._block_bytes * _MOST_BLOCKS:
            self._block_bytes *= 2
        self._touched = bytearray()  # one byte per block: 1 where this process has been
        self._closed = False

    @classmethod
    def create(cls, capacity: int) -> Arena:
        """Make the node's arena; its memory is taken from the machine page by page, as it is touched.

        Raises:
            ValueError: the capacity is not positive.
            OSError: the system has no such memory to give.
        """
        if capacity <= 0:
            raise ValueError(f"an arena needs a positive capacity, not {capacity}")
        fd = _anonymous_file(capacity)
        return cls(fd, capacity, f"/proc/{os.getpid()}/fd/{fd}")

    @classmethod
    def open(cls, path: str, capacity: int) -> Arena:
        """Open the arena that another process made.

        Raises:
            OSError: there is none at that path any more, or it belongs to another user.
            ValueError: it has another size.
        """
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        size = os.fstat(fd).st_size
        if size != capacity:
            os.close(fd)
            raise ValueError(f"the arena at {path} has {size} bytes; {capacity} were expected")
        return cls(fd, capacity, path)

    def view(self, offset: int, size: int) -> memoryview:
        """Writable bytes; the caller holds the extent for as long as it writes."""
        self._check(offset, size)
        if self._map is None:
            self._map_now()
        return self._whole[offset : offset + size]

    def pinned(self, offset: int, size: int, on_release: Callable[[], object]) -> memoryview:
        """Read-only bytes that know when nobody uses them any more.

        Args:
            on_release: called exactly once, when the view and all that was derived from it (slices, arrays, slices of
                those) are gone, in this process only (a forked child drops its views in silence). It runs in whichever
                thread drops the last one, maybe amid a garbage collection while that thread holds any lock: it must
                not block nor take a lock that is not re-entrant, and an exception it raises is only printed. When the
                process exits first it may not be called at all.
        """
        view, holder = self.lend(offset, size)
        weakref.finalize(holder, _release_in, os.getpid(), on_release).atexit = False
        return view

    def lend(self, offset: int, size: int) -> tuple[memoryview, object]:
        """Read-only bytes, and an object that lives exactly as long as the view or anything that was derived from it
        (slices, arrays, slices of those): follow it by a weak reference, and hold no other."""
        self._check(offset, size)
        memory = self._map
        if memory is None:
            memory = self._map_now()
        # ctypes makes a class for each array length, in 7 us: lengths are rounded up to share a few dozens of them.
        length = _SMALLEST_TYPE_BYTES if size <= _SMALLEST_TYPE_BYTES else 1 << (size - 1).bit_length()
        if offset + length > self.capacity:
            length = self.capacity - offset
            if length == 0:  # nothing at the very end
                offset, length = offset - 1, 1
        holder = _array_type(length).from_buffer(memory, offset)
        # Views keep what they view alive: the array dies after the last of them.
        return memoryview(holder).cast("B").toreadonly()[:size], holder

    def populate(self, offset: int, size: int) -> None:
        """Prepare this process for copying `size` bytes to `offset`: a third of the faults' cost where it never was.

        Does nothing for small copies and where this process has been before. Runs without the GIL.
        """
        if size < POPULATE_BYTES:
            return
        self._check(offset, size)
        if self._map is None:
            self._map_now()
        touched, block_bytes = self._touched, self._block_bytes
        block, end = offset // block_bytes, (offset + size - 1) // block_bytes + 1
        block = touched.find(0, block, end)
        while block >= 0:
            stop = touched.find(1, block, end)
            if stop < 0:
                stop = end
            touched[block:stop] = b"\1" * (stop - block)
            start = block * block_bytes
            self._populate_now(start, min(stop * block_bytes, self.capacity) - start)
            block = touched.find(0, stop, end)

    def _populate_now(self, start: int, size: int) -> None:
        from shoal.objects.memory import MADV_POPULATE_READ, populate

        try:
            supported = populate(self._address + start, size, MADV_POPULATE_READ)
        except OSError as exc:  # the copy that follows will fare no worse than without us
            logger.warning("cannot populate %d bytes of the arena at %d: %s", size, start, exc)
            return
        if not supported:
            self._touched[:] = b"\1" * len(self._touched)  # an old kernel: never ask again

    def warm(self, start: int, size: int) -> None:
        """Have the machine give memory for these bytes now rather than at somebody's first touch; contents stay.

        Meant for a background thread: 0.6 to 4 ms for each MiB that is cold, without the GIL (on kernels before 5.14
        with it, for a MiB at a time).

        Raises:
            OSError: there is no memory left.
        """
        self._check(start, size)
        if self._map is None:
            self._map_now()
        from shoal.objects.memory import MADV_POPULATE_WRITE, populate

        end = start + size
        start &= -PAGE_BYTES
        if populate(self._address + start, end - start, MADV_POPULATE_WRITE):
            return
        # Reading allocates pages of shared memory as well, and cannot undo what another process writes meanwhile.
        for step in range(start, end, _FALLBACK_STEP_BYTES):
            bytes(self._whole[step : min(step + _FALLBACK_STEP_BYTES, end) : PAGE_BYTES])

    def close(self) -> None:
        """Let go of the memory. Views that are out keep the mapping until they are gone; no new ones are given."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._whole = memoryview(b"")
            memory, self._map = self._map, None
            os.close(self.fd)
        if memory is not None:
            try:
                memory.close()
            except BufferError:  # views are out: the mapping goes with the last of them
                pass

    def _check(self, offset: int, size: int) -> None:
        if self._closed:
            raise ValueError("the arena is closed")
        if offset < 0 or size < 0 or offset + size > self.capacity:
            raise ValueError(f"{size} bytes at {offset} lie outside the arena's {self.capacity}")

    def _map_now(self) -> mmap.mmap:
        with self._lock:
            if self._closed:
                raise ValueError("the arena is closed")
            if self._map is None:
                import ctypes

                memory = mmap.mmap(self.fd, self.capacity)
                self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(memory))
                self._touched = bytearray(-(-self.capacity // self._block_bytes))
                self._whole = memoryview(memory)
                self._map = memory  # last: others look at it without the lock
            return self._map


def _release_in(pid: int, on_release: Callable[[], object]) -> None:
    if os.getpid() == pid:
        on_release()


def _anonymous_file(capacity: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("shoal-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, capacity)
        # A process that could shrink the file would end the others with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return fd
    import tempfile

    fd, path = tempfile.mkstemp(prefix="shoal-arena-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    os.unlink(path)
    os.ftruncate(fd, capacity)
    return fd


_array_types: Final[dict[int, Any]] = {}


def _array_type(length: int) -> Any:
    """The ctypes class for `length` bytes. Powers of two only are kept: the others are rests at the arena's end."""
    found = _array_types.get(length)
    if found is None:
        import ctypes

        found = ctypes.c_ubyte * length
        if length & (length - 1) == 0:
            _array_types[length] = found
    return found


class Warmer:
    """Decides which stretch of the arena to warm next. Pure: it knows offsets, and no memory.

    It keeps a quarter of what was ever used ahead of the high-water mark, between `least` and `most` bytes. 64 MiB at
    the least: on a quiet node that is the whole price of being ready, and the first values of a program (a few arrays,
    the slabs of a dozen workers) find it warm; it costs 40 to 250 ms of one core in the background. More as the node
    proves busy, since a filling store outruns a fixed stretch; 512 MiB at the most, so that what is warmed in vain
    stays small beside what is used.

    Attributes:
        warmed: every byte below is warm, or was given up on.
    """

    __slots__ = ("_capacity", "_least", "_most", "_step", "warmed")

    def __init__(self, capacity: int, *, least: int = 64 * MIB, most: int = 512 * MIB, step: int = 4 * MIB) -> None:
        """
        Args:
            step: bytes to warm in one go: a few milliseconds, after which the agent may stop or look again.
        """
        self._capacity = capacity
        self._least = least
        self._most = most
        self._step = step
        self.warmed = 0

    def next_stretch(self, high_water: int) -> tuple[int, int] | None:
        """The (start, size) to warm now, which counts as warm from here on; None when enough is warm.

        Args:
            high_water: end of the highest extent that was ever allocated: what lies below it was touched by its writer.
        """
        ahead = min(max(high_water // 4, self._least), self._most)
        goal = min(high_water + ahead, self._capacity)
        start = max(self.warmed, high_water & -PAGE_BYTES)
        if start >= goal:
            return None
        self.warmed = min(start + self._step, goal)
        return start, self.warmed - start
