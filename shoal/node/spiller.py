"""Moving copies between shared memory and disk: the shell around `Store`, which decides what, and `SpillFiles`.

Batches are written on threads, one for each folder at a time, while the store wants bytes on disk; reads have threads
of their own, because somebody waits for those. When no folder takes a batch, everything stays in memory, and the next
try is `RETRY_S` later at the earliest: whoever asks for room meanwhile is told why there is none.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from shoal.node.spill_files import SpilledLostError, SpillFiles, SpillFullError, Spot
from shoal.node.store import RESTORE, Copy, Store, StoreFullError
from shoal.objects.arena import Arena

logger = logging.getLogger(__name__)

FUSED_BYTES: Final = 128 << 20
"""The size of a file, as far as copies are smaller."""
READERS: Final = 4
RETRY_S: Final = 2.0
STUCK_S: Final = 60.0
"""A disk that has finished nothing for so long does not make those who wait for room wait any longer."""
_PIECE_BYTES: Final = 1 << 20

__all__ = ["FUSED_BYTES", "RETRY_S", "SpilledLostError", "Spiller"]


class Spiller:
    """See the module. All methods but `pieces` belong to the loop."""

    def __init__(self, store: Store, arena: Arena, files: SpillFiles) -> None:
        self._store = store
        self._arena = arena
        self._files = files
        self._loop = asyncio.get_running_loop()
        self._writers = ThreadPoolExecutor(max(1, len(files.folders)), thread_name_prefix="shoal-spill")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="shoal-restore")
        self._writing: set[asyncio.Task[None]] = set()
        self._wrote_at = 0.0  # when the last write ended, or the first of those under way began
        self._next_folder = 0
        self._not_before = 0.0
        self._retry: asyncio.TimerHandle | None = None

    @property
    def makes_progress(self) -> bool:
        """A write is under way, and has not been for so long that its disk must be taken for dead."""
        return bool(self._writing) and self._loop.time() - self._wrote_at < STUCK_S

    def look(self) -> None:
        """Something was made, or somebody waits: begin to write if that is due."""
        while (
            len(self._writing) < len(self._files.folders)
            and (wanted := self._store.wanted_on_disk()) > 0
            and self._loop.time() >= self._not_before
        ):
            batch = self._store.to_spill(wanted, FUSED_BYTES)
            if not batch:
                return
            if not self._writing:
                self._wrote_at = self._loop.time()
            task = self._loop.create_task(self._write(batch), name="spill")
            self._writing.add(task)
            task.add_done_callback(self._written)

    def _written(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        if not task.cancelled():
            self.look()

    async def _write(self, batch: list[tuple[bytes, Copy]]) -> None:
        store = self._store
        views = [self._arena.view(copy.offset, copy.size) for _, copy in batch]
        first, self._next_folder = self._next_folder, self._next_folder + 1
        try:
            spots = await self._loop.run_in_executor(self._writers, self._files.write, views, first)
        except SpillFullError as exc:
            if not store.trouble:
                logger.warning("objects stay in memory: %s", exc)
            store.trouble = str(exc)
            self._not_before = self._loop.time() + RETRY_S
            if self._retry is None:
                self._retry = self._loop.call_later(RETRY_S, self._try_again)
            for object_id, _ in batch:
                store.not_spilled(object_id)
            return
        store.trouble = ""
        self._wrote_at = self._loop.time()
        logger.debug("spilled copies=%s bytes=%s", len(batch), sum(view.nbytes for view in views))
        store.be_patient(self._loop.time())
        for (object_id, _), spot in zip(batch, spots, strict=True):
            store.spilled(object_id, spot)

    def _try_again(self) -> None:
        self._retry = None
        self.look()

    async def restore(self, object_id: bytes, askers: list[bytes]) -> Copy | None:
        """Bring a spilled copy back into memory and pin it for each of `askers` (a list that may grow meanwhile; it is
        cleared). None when everybody dropped the object meanwhile.

        Raises:
            StoreFullError: there is no room for it. SpilledLostError: its file is gone or damaged, and so is the copy.
        """
        store = self._store
        copy = store.find(object_id)
        if copy is not None and not copy.in_memory:
            store.pin(object_id, RESTORE)  # its file stays
            try:
                offset = await self.room(RESTORE, copy.size)
            except BaseException:
                store.unpin(object_id, RESTORE)
                raise
            target = self._arena.view(offset, copy.size)
            try:
                # Nothing but the node's end cancels this: the thread would go on filling room that is somebody else's.
                await self._loop.run_in_executor(self._readers, self._files.read, copy.spot, target)
            except SpilledLostError as exc:
                logger.error("a spilled object is lost object=%s: %s", object_id.hex(), exc)
                store.release(RESTORE, offset)
                store.lose(object_id, str(exc))
                raise
            copy = store.restored(object_id, offset)
        if copy is not None:
            for process in askers:
                store.pin(object_id, process)
            askers.clear()
        store.unpin(object_id, RESTORE)  # last: once nobody holds it, its room may be taken
        return copy

    async def room(self, process: bytes, size: int) -> int:
        """Wait for room in the arena; its offset. Others go to disk for it where that helps.

        Raises:
            StoreFullError: there is none, and none came in time.
        """
        room: asyncio.Future[int] = self._loop.create_future()

        def got(result: int | StoreFullError) -> None:
            if room.cancelled():
                if isinstance(result, int):
                    self._store.release(process, result)
            elif isinstance(result, StoreFullError):
                room.set_exception(result)
            else:
                room.set_result(result)

        self._store.allocate(process, size, self._loop.time(), got)
        self.look()
        return await room

    def pieces(self, spot: Spot, start: int, length: int) -> Iterator[memoryview]:
        """The bytes of a pinned copy straight from its file, for a transfer's thread. Raises OSError."""
        buffer = memoryview(bytearray(min(_PIECE_BYTES, length)))
        done = 0
        while done < length:
            piece = buffer[: min(_PIECE_BYTES, length - done)]
            try:
                self._files.read(spot, piece, start + done)
            except SpilledLostError as exc:
                raise OSError(str(exc)) from exc  # as the loss of any source
            yield piece
            done += len(piece)

    def forget(self, spot: Spot) -> None:
        """Nobody will read this copy any more."""
        file = self._files.forget(spot)
        if file is not None:
            self._writers.submit(self._remove, file)

    def _remove(self, file: Any) -> None:
        try:
            self._files.remove(file)
        except OSError as exc:
            logger.warning("cannot remove a file of spilled objects: %s", exc)

    def close(self) -> None:
        """The node ends: remove all files, those too that are being written or read. The supervisor removes what is
        left if that takes too long."""
        for task in self._writing:
            task.cancel()
        if self._retry is not None:
            self._retry.cancel()
        self._files.close()
        self._readers.shutdown(wait=True, cancel_futures=True)
        self._writers.shutdown(wait=True, cancel_futures=True)
        for text in self._files.close():
            logger.warning("cannot remove a file of spilled objects: %s", text)
