"""What workers print: from their pipes into files, into a short memory, and towards the drivers of their jobs.

Each worker's stdout and stderr are two pipes whose read ends the agent holds. Nothing in the worker is on the way, so
what a dying process, a C library or a child of it wrote arrives like the rest. Three rules keep a chatty worker from
harming others:
- The loop reads at most `read_bytes` of a stream and `read_total_bytes` of all in one tick; beyond that pipes fill
  and `print` waits.
- Files are written by one thread, a batch per tick. When it is behind by `backlog_bytes`, reading stops meanwhile.
- Drivers get at most `publish_bytes` in one tick, a share of every stream in turn. What does not fit waits, up to
  `waiting_bytes` for a stream; beyond that the oldest lines give way, and a line says how many. The file has them all.
Rejected: workers that write files themselves, and a process that follows those (a second copy of everything, polling,
lines torn by two writers); lines sent over the worker's connection (lost in a crash, when they matter most).

A worker names what it runs by a mark in the stream (`name_mark`), cut out here: following lines carry that name.
"""

from __future__ import annotations

import logging
import os
from asyncio import AbstractEventLoop, TimerHandle
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from shoal.control.messages import LogLines

logger = logging.getLogger(__name__)

MARK: Final = b"\x1e\x1f"
"""Begins a name mark. Two control characters that no text and no terminal sequence has side by side."""

MAX_NAME_BYTES: Final = 256
TAIL_LINES: Final = 20
CHUNK_BYTES: Final = 1 << 16
"""One read: what a pipe holds by default."""


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Bounds, sizes in bytes.

    Attributes:
        tick_s: least time between two batches, to the files and to drivers.
        partial_s: how long the beginning of a line waits for its end before it is shown as it is.
        max_line_bytes: a longer line is shown in pieces.
        publish_bytes, share_bytes: what drivers get in one tick, of all streams and of one of them.
        waiting_bytes, waiting_total_bytes: what may wait for that, of one stream and of all of them.
        file_bytes, files_kept: per stream, one file and this many older ones.
    """

    tick_s: float = 0.05
    partial_s: float = 1.0
    max_line_bytes: int = 64 << 10
    read_bytes: int = 512 << 10
    read_total_bytes: int = 1 << 20
    publish_bytes: int = 256 << 10
    share_bytes: int = 64 << 10
    waiting_bytes: int = 1 << 20
    waiting_total_bytes: int = 32 << 20
    backlog_bytes: int = 16 << 20
    file_bytes: int = 64 << 20
    files_kept: int = 2


def name_mark(name: str) -> bytes:
    """What a worker writes before text that belongs to `name` (of a task or actor; "" for none)."""
    text = name.replace("\n", " ").encode("utf-8", "replace")[:MAX_NAME_BYTES]
    return MARK + text + b"\n"


class Text(NamedTuple):
    """A piece of a stream, marks cut out."""

    name: str
    data: bytes


class MarkCutter:
    """Cuts name marks out of a stream that arrives in arbitrary pieces."""

    __slots__ = ("_held", "name")

    def __init__(self) -> None:
        self.name = ""
        self._held = b""

    def feed(self, data: bytes) -> Iterator[Text]:
        """The text in `data`, in pieces of one name each. What may be half a mark is held until more arrives."""
        if self._held:
            data, self._held = self._held + data, b""
        while True:
            start = data.find(MARK)
            if start < 0:
                if data.endswith(MARK[:1]):
                    data, self._held = data[:-1], data[-1:]
                break
            if start:
                yield Text(self.name, data[:start])
            end = data.find(b"\n", start)
            if end < 0 and len(data) - start <= MAX_NAME_BYTES + len(MARK):
                self._held = data[start:]
                return
            if end < 0 or end - start > MAX_NAME_BYTES + len(MARK):  # not one of ours: it is text after all
                yield Text(self.name, data[start : start + len(MARK)])
                data = data[start + len(MARK) :]
                continue
            self.name = data[start + len(MARK) : end].decode("utf-8", "replace")
            data = data[end + 1 :]
        if data:
            yield Text(self.name, data)

    def finish(self) -> Text | None:
        """The stream ended: what was held was text, or a mark that nothing follows."""
        held, self._held = self._held, b""
        return Text(self.name, held) if held and not held.startswith(MARK) else None


class LineBuffer:
    """Turns pieces of text into lines, and keeps the newest that fit `limit` bytes until they are taken.

    A carriage return without a line feed means "write over this line": only what comes after the last one is kept, so
    that a progress bar is shown as its newest state instead of its whole history.
    """

    __slots__ = ("_begun_at", "_cut", "_dropped", "_lines", "_max_line", "_name", "begun", "limit", "size")

    def __init__(self, limit: int, max_line: int) -> None:
        self.limit, self._max_line = limit, max_line
        self._lines: deque[tuple[str, bytes]] = deque()
        self._dropped = 0
        self._name = ""
        self._begun_at = 0.0
        self._cut = False  # the last line was shown before its end came
        self.begun = b""  # the line that waits for its end
        self.size = 0  # bytes of the lines that wait to be taken

    def feed(self, text: Text, now: float, tail: deque[bytes]) -> None:
        """Take in text read at `now`; complete lines are also appended to `tail`."""
        if self.begun and text.name != self._name:
            self.end_line(tail)  # the new name's text begins in the middle of a line
        self._name = text.name
        *lines, begun = (self.begun + text.data).split(b"\n")
        if self._cut and lines:
            self._cut = False
            if not lines[0] and not self.begun:
                del lines[0]  # only the end of what has been shown
        for line in lines:
            self._append(line, tail)
        if lines or not self.begun:
            self._begun_at = now
        while len(begun) > self._max_line:
            self._append(begun[: self._max_line], tail)
            begun = begun[self._max_line :]
        shown = begun.rstrip(b"\r")
        self.begun = _after_return(shown) + begun[len(shown) :][:1]

    def end_line(self, tail: deque[bytes]) -> None:
        """Show the line that has begun as it is."""
        if self.begun:
            line, self.begun = self.begun, b""
            self._append(line, tail)
            self._cut = True

    def due_at(self, patience_s: float) -> float | None:
        """When the line that has begun will have waited long enough for its end; None when there is none."""
        return self._begun_at + patience_s if self.begun else None

    def _append(self, line: bytes, tail: deque[bytes]) -> None:
        line = _after_return(line)
        tail.append(line)
        self._lines.append((self._name, line))
        self.size += len(line) + 1
        while self.size > self.limit and len(self._lines) > 1:
            self.size -= len(self._lines.popleft()[1]) + 1
            self._dropped += 1

    def discard(self) -> None:
        """Nobody wants these lines."""
        self._lines.clear()
        self.size = self._dropped = 0

    def take(self, most: int | None = None) -> list[tuple[str, list[str]]]:
        """The oldest lines by name, in order, of about `most` bytes (None: all). If lines were dropped since the last
        time, one line in front says how many."""
        groups: list[tuple[str, list[str]]] = []
        if self._dropped:
            note = f"[{self._dropped} lines dropped: printed faster than they can be shown; the log file has them]"
            groups.append((self._lines[0][0], [note]))
            self._dropped = 0
        enough = 0 if most is None else max(0, self.size - most)
        while self._lines and self.size > enough:
            name, line = self._lines.popleft()
            self.size -= len(line) + 1
            if not groups or groups[-1][0] != name:
                groups.append((name, []))
            groups[-1][1].append(line.decode("utf-8", "replace"))
        return groups


def _report(done: Future[None]) -> None:
    """An error that the writer's code did not expect must not vanish in its future."""
    error = done.exception()
    if error is not None:
        logger.error("writing what workers printed failed", exc_info=error)


def _after_return(line: bytes) -> bytes:
    """What a terminal would show of a line: nothing before its last carriage return."""
    return line.rstrip(b"\r").rpartition(b"\r")[2] if b"\r" in line else line


class RotatingFile:
    """One stream's file; used by the writer thread only. Opened by the first write: most workers print nothing."""

    __slots__ = ("_file", "_kept", "_limit", "_path", "_troubled", "size")

    def __init__(self, path: Path, limit: int, kept: int) -> None:
        self._path, self._limit, self._kept = path, limit, kept
        self._file: BinaryIO | None = None
        self.size = 0
        self._troubled = False

    def write(self, data: bytes) -> None:
        """Never raises: a full disk costs the text, not the node."""
        try:
            if self._file is None or (self.size and self.size + len(data) > self._limit):
                self._open()
            assert self._file is not None
            self._file.write(data)
            self.size += len(data)
            self._troubled = False
        except OSError as exc:
            if not self._troubled:
                logger.error("cannot write what a worker printed path=%s lost_bytes=%d: %s", self._path, len(data), exc)
            self._troubled = True

    def rename(self, path: Path) -> None:
        if self._file is not None:
            try:
                os.rename(self._path, path)
            except OSError as exc:
                logger.warning("cannot rename path=%s to=%s: %s", self._path, path, exc)
                return
        self._path = path

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        """Open the file, the first one or the next one; older ones move up one number, the oldest goes."""
        if self._file is not None:
            self.close()
            for number in range(self._kept, 0, -1):
                older = self._numbered(number - 1)
                if older.exists():
                    os.replace(older, self._numbered(number))
        self._file = open(self._path, "wb" if self._kept == 0 else "ab", buffering=0)  # noqa: SIM115
        self.size = self._file.tell()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path


class _Stream:
    """One pipe, on the loop's side."""

    __slots__ = ("cutter", "fd", "file", "lines", "read_now", "reading", "unwritten", "which")

    def __init__(self, fd: int, which: str, file: RotatingFile, settings: LogSettings) -> None:
        self.fd, self.which, self.file = fd, which, file
        self.cutter = MarkCutter()
        self.lines = LineBuffer(settings.waiting_bytes, settings.max_line_bytes)
        self.unwritten: list[bytes] = []
        self.read_now = 0  # bytes since the last tick
        self.reading = False


class _Worker:
    __slots__ = ("job_id", "pid", "streams", "tail", "to_driver", "worker_id")

    def __init__(self, worker_id: bytes, pid: int) -> None:
        self.worker_id, self.pid = worker_id, pid
        self.job_id = b""
        self.to_driver = True
        self.tail: deque[bytes] = deque(maxlen=TAIL_LINES)
        self.streams: tuple[_Stream, ...] = ()


class WorkerLogs:
    """The output of all workers of one node. To be used on the loop's thread only.

    Args:
        folder: where the files go: `worker-<first 8 hex digits of the id>-<pid>.out` and `.err`.
        publish: gets what drivers shall see, at most once per tick; must not block.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        node_ip: str,
        publish: Callable[[list[LogLines]], None],
        loop: AbstractEventLoop,
        settings: LogSettings | None = None,
    ) -> None:
        self._folder = Path(folder)
        self._node_ip = node_ip
        self._publish = publish
        self._loop = loop
        self._settings = settings or LogSettings()
        self._workers: dict[bytes, _Worker] = {}
        self._active: dict[
            _Stream, _Worker
        ] = {}  # streams with something to do at the next tick, longest waiting first
        self._entries: list[LogLines] = []  # published next
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shoal-worker-logs")
        self._backlog = 0  # bytes that the writer thread has not written yet
        self._read_now = 0  # bytes since the last tick, all streams
        self._timer: TimerHandle | None = None
        self._timer_at = 0.0
        self._ticked_at = -1.0
        self._closed = False

    def attach(self, worker_id: bytes, pid: int | None, out_fd: int, err_fd: int) -> None:
        """Follow a worker's pipes; the read ends belong to this object from now on."""
        worker = _Worker(worker_id, pid or 0)
        worker.streams = tuple(
            _Stream(fd, which, self._file(worker, which), self._settings)
            for fd, which in ((out_fd, "out"), (err_fd, "err"))
        )
        self._workers[worker_id] = worker
        for stream in worker.streams:
            os.set_blocking(stream.fd, False)
            self._resume(worker, stream)

    def set_pid(self, worker_id: bytes, pid: int) -> None:
        worker = self._workers[worker_id]
        worker.pid = pid
        for stream in worker.streams:
            self._submit(stream.file.rename, self._path(worker, stream.which))

    def set_job(self, worker_id: bytes, job_id: bytes, *, to_driver: bool = True) -> None:
        """What the worker prints from now on is for this job's driver. Before the first job it is for the file only."""
        worker = self._workers[worker_id]
        if worker.job_id == job_id and worker.to_driver == to_driver:
            return
        for stream in worker.streams:
            self._drain(worker, stream)
            stream.lines.end_line(worker.tail)
            self._collect(worker, stream)
        worker.job_id, worker.to_driver = job_id, to_driver

    def tail(self, worker_id: bytes) -> list[str]:
        """The last lines that the worker printed, up to this moment, both streams as they came in."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return []
        for stream in worker.streams:
            self._drain(worker, stream)
        lines = deque(worker.tail, maxlen=TAIL_LINES)
        lines.extend(stream.lines.begun for stream in worker.streams if stream.lines.begun)
        return [line.decode("utf-8", "replace") for line in lines]

    def detach(self, worker_id: bytes) -> list[str]:
        """The process has ended: read what is left in its pipes, close them, and return the last lines.

        A grandchild that outlives the worker may hold the pipe open for ever; it is not waited for.
        """
        worker = self._workers.pop(worker_id, None)
        if worker is None:
            return []
        for stream in worker.streams:
            self._drain(worker, stream)
            rest = stream.cutter.finish()
            if rest is not None:
                self._take_in(worker, stream, rest)
            stream.lines.end_line(worker.tail)
            self._collect(worker, stream)
            self._write(stream)
            self._active.pop(stream, None)
            self._pause(stream)
            self._close(stream)
            self._submit(stream.file.close)
        return [line.decode("utf-8", "replace") for line in worker.tail]

    def flush_job(self, job_id: bytes) -> None:
        """Publish at once what workers of the job have printed so far, lines without an end included."""
        for worker in self._workers.values():
            if worker.job_id == job_id and worker.to_driver:
                for stream in worker.streams:
                    self._drain(worker, stream)
                    stream.lines.end_line(worker.tail)
                    self._collect(worker, stream)
        self._flush()

    def close(self) -> None:
        """Detach all, publish what is left, and wait until the files are written."""
        for worker_id in list(self._workers):
            self.detach(worker_id)
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._flush()
        self._writer.shutdown(wait=True)

    # ------------------------------------------------------------------------------------------------ reading

    def _readable(self, worker: _Worker, stream: _Stream) -> None:
        self._activate(worker, stream)
        settings = self._settings
        if (
            stream.read_now >= settings.read_bytes
            or self._read_now >= settings.read_total_bytes
            or self._backlog >= settings.backlog_bytes
        ):
            self._pause(stream)  # the next tick resumes it
        elif not self._read(worker, stream):
            self._pause(stream)
            self._close(stream)

    def _read(self, worker: _Worker, stream: _Stream) -> bool:
        """Read one chunk; False at the end of the stream."""
        try:
            data = os.read(stream.fd, CHUNK_BYTES)
        except BlockingIOError:
            return True
        except OSError as exc:
            logger.warning("cannot read a worker's pipe pid=%d stream=%s: %s", worker.pid, stream.which, exc)
            return False
        if not data:
            return False
        stream.read_now += len(data)
        self._read_now += len(data)
        for text in stream.cutter.feed(data):
            self._take_in(worker, stream, text)
        return True

    def _take_in(self, worker: _Worker, stream: _Stream, text: Text) -> None:
        stream.unwritten.append(text.data)
        self._backlog += len(text.data)
        stream.lines.feed(text, self._loop.time(), worker.tail)
        if not (worker.job_id and worker.to_driver):
            stream.lines.discard()

    def _drain(self, worker: _Worker, stream: _Stream) -> None:
        """Read what is in the pipe now, but not for ever: somebody may be writing as fast as we read."""
        for _ in range(self._settings.read_bytes // CHUNK_BYTES + 1):
            before = stream.read_now
            if stream.fd < 0 or not self._read(worker, stream) or stream.read_now == before:
                break
        self._activate(worker, stream)

    def _activate(self, worker: _Worker, stream: _Stream) -> None:
        self._active.setdefault(stream, worker)
        self._wake(self._ticked_at + self._settings.tick_s)

    def _pause(self, stream: _Stream) -> None:
        if stream.reading:
            stream.reading = False
            self._loop.remove_reader(stream.fd)

    def _resume(self, worker: _Worker, stream: _Stream) -> None:
        if not stream.reading and stream.fd >= 0:
            stream.reading = True
            self._loop.add_reader(stream.fd, self._readable, worker, stream)

    def _close(self, stream: _Stream) -> None:
        if stream.fd >= 0:
            os.close(stream.fd)
            stream.fd = -1

    # -------------------------------------------------------------------------------------------------- ticks

    def _wake(self, at: float) -> None:
        """Have a tick at `at`, a time of the loop's clock, or as soon as it is over; an earlier one is enough."""
        if self._closed or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._loop.call_at(at, self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        settings = self._settings
        self._timer = None
        self._ticked_at = now
        self._read_now = 0
        room = settings.publish_bytes
        active, self._active = self._active, {}
        limit = min(
            settings.waiting_bytes, max(settings.waiting_total_bytes // (len(active) or 1), settings.share_bytes)
        )
        later: dict[_Stream, _Worker] = {}
        for stream, worker in active.items():
            stream.read_now = 0
            due_at = stream.lines.due_at(settings.partial_s)
            if due_at is not None and due_at <= now:
                stream.lines.end_line(worker.tail)
            elif due_at is not None:
                later[stream] = worker
                self._wake(due_at)
            self._write(stream)
            stream.lines.limit = limit
            if room > 0:
                share = min(stream.lines.size, settings.share_bytes)
                room -= share
                self._collect(worker, stream, share)
                turn = later
            else:
                turn = self._active  # not served now: first at the next tick
            if stream.lines.size:
                turn[stream] = worker
                self._wake(now + settings.tick_s)
            if self._backlog < settings.backlog_bytes:
                self._resume(worker, stream)
            else:
                later[stream] = worker  # `_caught_up` wakes us
        for stream, worker in later.items():
            self._active.setdefault(stream, worker)
        self._flush()

    def _collect(self, worker: _Worker, stream: _Stream, most: int | None = None) -> None:
        """Move the stream's lines, or the oldest `most` bytes of them, into what is published next."""
        if not stream.lines.size:
            return
        for name, lines in stream.lines.take(most):
            self._entries.append(
                LogLines(worker.job_id, worker.worker_id, self._node_ip, worker.pid, name, stream.which, lines)
            )

    def _flush(self) -> None:
        if self._entries:
            entries, self._entries = self._entries, []
            self._publish(entries)

    # -------------------------------------------------------------------------------------------------- files

    def _write(self, stream: _Stream) -> None:
        if stream.unwritten:
            data = b"".join(stream.unwritten)
            stream.unwritten.clear()
            self._submit(stream.file.write, data).add_done_callback(partial(self._written, len(data)))

    def _written(self, size: int, _done: Future[None]) -> None:
        """On the writer's thread."""
        if not self._closed:
            self._loop.call_soon_threadsafe(self._caught_up, size)

    def _caught_up(self, size: int) -> None:
        was_full = self._backlog >= self._settings.backlog_bytes
        self._backlog -= size
        if was_full and self._backlog < self._settings.backlog_bytes:
            self._wake(self._ticked_at + self._settings.tick_s)

    def _submit(self, work: Callable[..., None], *args: object) -> Future[None]:
        done = self._writer.submit(work, *args)
        done.add_done_callback(_report)
        return done

    def _file(self, worker: _Worker, which: str) -> RotatingFile:
        return RotatingFile(self._path(worker, which), self._settings.file_bytes, self._settings.files_kept)

    def _path(self, worker: _Worker, which: str) -> Path:
        pid = f"-{worker.pid}" if worker.pid else ""
        return self._folder / f"worker-{worker.worker_id.hex()[:8]}{pid}.{which}"
