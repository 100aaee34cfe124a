"""Files of spilled copies: many copies fused into one large file, in several folders or any place that fsspec knows.

One large sequential write is what disks and object stores are good at, so copies are written in batches and a file is
never changed. It is removed when none of its copies is wanted any more; until then dropped copies in it take up space,
which is the price of never rewriting: a batch holds copies of one age, and those tend to be dropped together.

Local folders are read and written with plain system calls, straight from and into shared memory and without the
interpreter's lock. All methods that touch a disk block; they are for threads.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

from shoal.exceptions import ShoalError

FREE_FRACTION: Final = 0.05
FREE_BYTES: Final = 1 << 30
"""A local folder is full when less than the smaller of the two would stay free on its disk: others need it too."""
_PIECE_BYTES: Final = 64 << 20


class SpillFullError(OSError):
    """No folder could take a batch. `str()` is one line for a person: each folder, the bytes, and why not."""


class SpilledLostError(Exception):
    """A spilled copy cannot be read back."""


class _File:
    """One fused file. `wanted`: its copies that may still be read; counted by the loop's thread only."""

    __slots__ = ("folder", "name", "wanted")

    def __init__(self, folder: Folder, name: str, wanted: int) -> None:
        self.folder = folder
        self.name = name
        self.wanted = wanted


class Spot(NamedTuple):
    """Where a copy is."""

    file: _File
    position: int
    size: int


class Folder(Protocol):
    """A place for files. Each method raises OSError."""

    where: str

    def write(self, name: str, views: Sequence[memoryview]) -> None:
        """A new file of all `views`, one behind the other; nothing of it is left when this raises."""

    def read(self, name: str, position: int, target: memoryview) -> None:
        """Fill `target`. Raises EOFError: the file is too short."""

    def remove(self, name: str) -> None: ...
    def close(self) -> None:
        """Remove what is left."""


class LocalFolder:
    """A folder of this machine, made when it is first needed."""

    def __init__(self, path: str) -> None:
        self.where = path

    def write(self, name: str, views: Sequence[memoryview]) -> None:
        os.makedirs(self.where, mode=0o700, exist_ok=True)
        size = sum(view.nbytes for view in views)
        disk = shutil.disk_usage(self.where)
        if disk.free - size < min(FREE_BYTES, disk.total * FREE_FRACTION):
            raise OSError(f"the disk is full: {disk.free} bytes are free, {size} are to be written")
        path = os.path.join(self.where, name)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                for view in views:
                    written = 0
                    while written < view.nbytes:
                        written += os.write(fd, view[written : written + _PIECE_BYTES])
            finally:
                os.close(fd)
        except OSError:
            self.remove(name)
            raise

    def read(self, name: str, position: int, target: memoryview) -> None:
        fd = os.open(os.path.join(self.where, name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            filled = 0
            while filled < target.nbytes:
                count = os.preadv(fd, [target[filled : filled + _PIECE_BYTES]], position + filled)
                if not count:
                    raise EOFError(f"{self.where}/{name} ends after {position + filled} bytes")
                filled += count
        finally:
            os.close(fd)

    def remove(self, name: str) -> None:
        try:
            os.unlink(os.path.join(self.where, name))
        except FileNotFoundError:
            pass

    def close(self) -> None:
        try:
            os.rmdir(self.where)
        except OSError:  # never made, or it holds what is not ours
            pass


class RemoteFolder:
    """Any URL that fsspec understands: "s3://bucket/prefix", "memory://x". Its package for the scheme must be there."""

    def __init__(self, url: str) -> None:
        import fsspec

        self.where = url
        self._files: Any
        self._files, self._path = fsspec.core.url_to_fs(url)

    def write(self, name: str, views: Sequence[memoryview]) -> None:
        self._files.makedirs(self._path, exist_ok=True)
        try:
            with self._files.open(f"{self._path}/{name}", "wb") as file:
                for view in views:
                    for start in range(0, view.nbytes, _PIECE_BYTES):
                        file.write(view[start : start + _PIECE_BYTES])
        except Exception as exc:
            self.remove(name)
            if isinstance(exc, OSError):
                raise
            raise OSError(f"{type(exc).__name__}: {exc}") from exc  # each store has errors of its own

    def read(self, name: str, position: int, target: memoryview) -> None:
        try:
            for start in range(0, target.nbytes, _PIECE_BYTES):
                end = min(start + _PIECE_BYTES, target.nbytes)
                data = self._files.cat_file(f"{self._path}/{name}", position + start, position + end)
                if len(data) != end - start:
                    raise EOFError(f"{self.where}/{name} ends before byte {position + end}")
                target[start:end] = data
        except (OSError, EOFError):
            raise
        except Exception as exc:
            raise OSError(f"{type(exc).__name__}: {exc}") from exc

    def remove(self, name: str) -> None:
        try:
            self._files.rm_file(f"{self._path}/{name}")
        except FileNotFoundError:
            pass
        except OSError:
            raise
        except Exception as exc:
            raise OSError(f"{type(exc).__name__}: {exc}") from exc

    def close(self) -> None:
        """The files were removed one by one; what a store calls a folder vanishes with them."""


def open_folder(where: str) -> Folder:
    """A path, or a URL.

    Raises:
        ValueError: the URL's scheme is not known, or its package is missing.
    """
    if "://" not in where:
        return LocalFolder(where)
    if where.startswith("file://"):
        return LocalFolder(where.removeprefix("file://"))
    try:
        return RemoteFolder(where)
    except (ImportError, ValueError) as exc:
        raise ValueError(f"cannot spill objects to {where!r}: {exc}") from exc


def spill_prefix(node_id: bytes) -> str:
    """Of the names of a node's files: nodes may share a folder."""
    return f"shoal-{node_id.hex()[:16]}"


def sweep_folder(where: str, prefix: str) -> None:
    """Remove what a node that has ended left in a local folder: it may not have had the time."""
    if not prefix or ("://" in where and not where.startswith("file://")):
        return
    folder = LocalFolder(where.removeprefix("file://"))
    try:
        names = os.listdir(folder.where)
    except OSError:
        return  # it was never made
    for name in names:
        if name.startswith(f"{prefix}-"):
            folder.remove(name)
    folder.close()


def check_folder(where: str) -> None:
    """Raises ShoalError when objects cannot be spilled there, as far as can be told without writing."""
    try:
        folder = open_folder(where)
    except ValueError as exc:
        raise ShoalError(str(exc)) from exc
    if isinstance(folder, LocalFolder):
        try:
            os.makedirs(folder.where, mode=0o700, exist_ok=True)
        except OSError as exc:
            raise ShoalError(f"cannot spill objects to {where!r}: {exc.strerror}") from exc
        if not os.access(folder.where, os.W_OK | os.X_OK):
            raise ShoalError(f"cannot spill objects to {where!r}: it is not writable")


class SpillFiles:
    """All files of one node. `write`, `read` and `remove` block; the rest belongs to the loop."""

    def __init__(self, folders: Sequence[Folder], prefix: str) -> None:
        self.folders = list(folders)
        self._prefix = prefix
        self._numbers = itertools.count(1)
        self._live: set[_File] = set()

    def write(self, views: Sequence[memoryview], first: int) -> list[Spot]:
        """Write one file, into the first folder that takes it, beginning with number `first`.

        Raises:
            SpillFullError: none did.
        """
        troubles = []
        for step in range(len(self.folders)):
            folder = self.folders[(first + step) % len(self.folders)]
            name = f"{self._prefix}-{next(self._numbers)}"
            try:
                folder.write(name, views)
            except OSError as exc:
                troubles.append(f"{folder.where}: {exc.strerror or exc}")
                continue
            file = _File(folder, name, len(views))
            self._live.add(file)  # whatever becomes of the writer's task
            ends = list(itertools.accumulate(view.nbytes for view in views))
            return [Spot(file, end - view.nbytes, view.nbytes) for end, view in zip(ends, views, strict=True)]
        size = sum(view.nbytes for view in views)
        raise SpillFullError(f"{size} bytes could not be written to {'; '.join(troubles)}")

    def read(self, spot: Spot, target: memoryview, start: int = 0) -> None:
        """Fill `target` with the copy's bytes from `start` on.

        Raises:
            SpilledLostError: it is not there any more, or not whole.
        """
        try:
            spot.file.folder.read(spot.file.name, spot.position + start, target)
        except (OSError, EOFError) as exc:
            raise SpilledLostError(f"its file {spot.file.folder.where}/{spot.file.name} cannot be read: {exc}") from exc

    def forget(self, spot: Spot) -> _File | None:
        """The copy is not wanted any more; the file that is to be removed if it was the last one in it."""
        spot.file.wanted -= 1
        if spot.file.wanted:
            return None
        self._live.discard(spot.file)
        return spot.file

    @staticmethod
    def remove(file: _File) -> None:
        """Raises OSError."""
        file.folder.remove(file.name)

    def close(self) -> list[str]:
        """Remove everything; returns what could not be removed."""
        left = []
        for file in self._live:
            try:
                file.folder.remove(file.name)
            except OSError as exc:
                left.append(f"{file.folder.where}/{file.name}: {exc}")
        self._live.clear()
        for folder in self.folders:
            folder.close()
        return left
