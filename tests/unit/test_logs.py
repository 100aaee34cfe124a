"""Worker output from the worker's streams through the agent's pipes to files, tails and drivers."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.control.messages import LogLines
from shoal.node.logs import (
    MARK,
    TAIL_LINES,
    LineBuffer,
    LogSettings,
    MarkCutter,
    RotatingFile,
    Text,
    WorkerLogs,
    name_mark,
)
from shoal.runtime import worker_output

WORKER = bytes(range(28))


# -------------------------------------------------------------------------------------------------------------- marks


def cut(pieces: list[bytes]) -> list[tuple[str, bytes]]:
    cutter = MarkCutter()
    found = [text for piece in pieces for text in cutter.feed(piece)]
    rest = cutter.finish()
    merged: list[tuple[str, bytes]] = []
    for name, data in [*found, *([rest] if rest else [])]:
        if merged and merged[-1][0] == name:
            merged[-1] = (name, merged[-1][1] + data)
        else:
            merged.append((name, data))
    return merged


def test_marks_are_cut_out_and_name_what_follows() -> None:
    stream = b"before\n" + name_mark("f") + b"one\ntwo\n" + name_mark("") + b"three"
    assert cut([stream]) == [("", b"before\n"), ("f", b"one\ntwo\n"), ("", b"three")]


def test_a_name_with_line_ends_or_of_any_length_makes_one_mark() -> None:
    assert cut([name_mark("a\nb") + b"x"]) == [("a b", b"x")]
    assert cut([name_mark("n" * 1000) + b"x"]) == [("n" * 256, b"x")]


@pytest.mark.parametrize("text", [MARK + b"x" * 300 + b"\n", MARK + b"y" * 300, b"\x1e", b"a\x1eb"])
def test_what_only_looks_like_a_mark_is_text(text: bytes) -> None:
    assert b"".join(data for _, data in cut([text])) == text


pieces_of_streams = st.lists(
    st.one_of(st.text("ab\n\x1e\x1f", max_size=8).map(str.encode), st.sampled_from("fg").map(name_mark)), max_size=12
)


@given(pieces_of_streams, st.lists(st.integers(0, 60), max_size=8))
def test_where_a_stream_is_cut_into_pieces_does_not_matter(pieces: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(pieces)
    ends = sorted({min(end, len(stream)) for end in cuts} | {len(stream)})
    split = [stream[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    assert cut(split) == cut([stream])


# -------------------------------------------------------------------------------------------------------------- lines


def buffer(limit: int = 1000, max_line: int = 100) -> tuple[LineBuffer, deque[bytes]]:
    return LineBuffer(limit, max_line), deque(maxlen=TAIL_LINES)


def test_lines_are_grouped_by_name_in_order() -> None:
    lines, tail = buffer()
    for name, data in [("f", b"1\n2\n3"), ("g", b"4\n"), ("f", b"5\n")]:
        lines.feed(Text(name, data), 0.0, tail)
    assert lines.take() == [("f", ["1", "2", "3"]), ("g", ["4"]), ("f", ["5"])]
    assert list(tail) == [b"1", b"2", b"3", b"4", b"5"]
    assert lines.take() == []


def test_the_oldest_lines_give_way_and_are_counted() -> None:
    lines, tail = buffer(limit=10)
    lines.feed(Text("f", b"".join(b"%d\n" % n for n in range(9))), 0.0, tail)
    ((name, taken),) = lines.take()
    assert name == "f"
    assert taken[0].startswith("[4 lines dropped")
    assert taken[1:] == ["4", "5", "6", "7", "8"]
    lines.feed(Text("f", b"9\n"), 0.0, tail)
    assert lines.take() == [("f", ["9"])]


def test_lines_can_be_taken_a_share_at_a_time() -> None:
    lines, tail = buffer()
    lines.feed(Text("f", b"1\n2\n3\n4\n5\n"), 0.0, tail)
    assert lines.take(4) == [("f", ["1", "2"])]
    assert lines.size == 6
    assert lines.take(0) == []
    assert lines.take() == [("f", ["3", "4", "5"])]
    assert lines.size == 0


def test_a_line_without_an_end_waits_and_then_shows_once() -> None:
    lines, tail = buffer()
    lines.feed(Text("f", b"thinking"), 3.0, tail)
    lines.feed(Text("f", b" ..."), 3.5, tail)
    assert lines.due_at(1.0) == 4.0
    assert lines.take() == []
    lines.end_line(tail)
    assert lines.due_at(1.0) is None
    lines.feed(Text("f", b"\ndone\n"), 5.0, tail)
    assert lines.take() == [("f", ["thinking ...", "done"])]


def test_of_a_progress_bar_only_the_newest_state_is_kept() -> None:
    lines, tail = buffer()
    for percent in range(0, 100, 10):
        lines.feed(Text("f", b"\r%d%%" % percent), 0.0, tail)
        assert len(lines.begun) < 10
    lines.end_line(tail)
    lines.feed(Text("f", b"\r100%\n"), 0.0, tail)
    lines.feed(Text("f", b"windows\r\n"), 0.0, tail)
    lines.feed(Text("f", b"1\r"), 0.0, tail)
    lines.feed(Text("f", b"2\r"), 0.0, tail)
    lines.feed(Text("f", b"\n"), 0.0, tail)
    assert lines.take() == [("f", ["90%", "100%", "windows", "2"])]


def test_an_endless_line_is_shown_in_pieces() -> None:
    lines, tail = buffer(max_line=10)
    lines.feed(Text("f", b"x" * 25), 0.0, tail)
    assert lines.take() == [("f", ["x" * 10, "x" * 10])]
    assert lines.begun == b"x" * 5


def test_text_that_is_not_utf8_is_shown_all_the_same() -> None:
    lines, tail = buffer()
    lines.feed(Text("f", b"caf\xe9\n"), 0.0, tail)
    assert lines.take() == [("f", ["caf\ufffd"])]


# -------------------------------------------------------------------------------------------------------------- files


def test_files_rotate_and_the_oldest_goes(tmp_path: Path) -> None:
    file = RotatingFile(tmp_path / "w.out", limit=10, kept=2)
    assert not list(tmp_path.iterdir())
    for number in range(8):
        file.write(b"line %d\n" % number)
    file.close()
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"w.out": "line 7\n", "w.out.1": "line 6\n", "w.out.2": "line 5\n"}


def test_a_disk_that_cannot_be_written_costs_the_text_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = RotatingFile(tmp_path / "missing" / "w.out", limit=10, kept=2)
    file.write(b"lost")
    file.write(b"lost too")
    assert len(caplog.records) == 1
    assert "lost_bytes=4" in caplog.text
    (tmp_path / "missing").mkdir()
    file.write(b"kept")
    file.close()
    assert (tmp_path / "missing" / "w.out").read_bytes() == b"kept"


# --------------------------------------------------------------------------------------------------- the agent's side


class Rig:
    """A `WorkerLogs` with one worker attached, and a way to wait for what it publishes."""

    def __init__(self, folder: Path, settings: LogSettings) -> None:
        self.folder = folder
        self.published: list[LogLines] = []
        self._arrived = asyncio.Event()
        self.logs = WorkerLogs(folder, "10.0.0.1", self._publish, asyncio.get_running_loop(), settings)
        out_in, self.out = os.pipe()
        err_in, self.err = os.pipe()
        self.logs.attach(WORKER, 77, out_in, err_in)

    def _publish(self, entries: list[LogLines]) -> None:
        self.published += entries
        self._arrived.set()

    async def wait_for(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(10.0):
            while not enough():
                self._arrived.clear()
                await self._arrived.wait()

    def lines(self) -> list[str]:
        return [line for entry in self.published for line in entry.lines]

    def file(self, which: str) -> bytes:
        return (self.folder / f"worker-{WORKER.hex()[:8]}-77.{which}").read_bytes()


@asynccontextmanager
async def rig(folder: Path, settings: LogSettings | None = None) -> AsyncIterator[Rig]:
    made = Rig(folder, settings or LogSettings())
    yield made
    for fd in (made.out, made.err):
        if fd >= 0:
            os.close(fd)
    made.logs.close()


def test_what_a_worker_prints_reaches_driver_file_and_tail(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as it:
            it.logs.set_job(WORKER, b"job1")
            os.write(it.out, name_mark("square") + b"hello\n")
            os.write(it.err, b"oh\n")
            await it.wait_for(lambda: len(it.published) == 2)
            by_stream = {entry.stream: entry for entry in it.published}
            assert by_stream["out"] == LogLines(b"job1", WORKER, "10.0.0.1", 77, "square", "out", ["hello"])
            assert by_stream["err"] == LogLines(b"job1", WORKER, "10.0.0.1", 77, "", "err", ["oh"])
            assert sorted(it.logs.tail(WORKER)) == ["hello", "oh"]
        assert it.file("out") == b"hello\n"
        assert it.file("err") == b"oh\n"

    asyncio.run(scenario())


def test_the_last_words_of_a_process_that_died_are_kept(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as it:
            it.logs.set_job(WORKER, b"job1")
            os.write(it.out, b"".join(b"%d\n" % n for n in range(100)) + b"Segmentation")
            os.close(it.out)
            it.out = -1
            tail = it.logs.detach(WORKER)
            assert tail == [*(str(n) for n in range(81, 100)), "Segmentation"]
            assert it.logs.tail(WORKER) == it.logs.detach(WORKER) == []
            await it.wait_for(lambda: it.lines()[-1:] == ["Segmentation"])
            assert len(it.lines()) == 101

    asyncio.run(scenario())


def test_lines_before_the_first_job_stay_in_the_file_and_later_ones_change_jobs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as it:
            os.write(it.out, b"starting\n")
            it.logs.set_job(WORKER, b"job1")
            os.write(it.out, b"one\nhalf")
            it.logs.set_job(WORKER, b"job2")
            os.write(it.out, b"two\n")
            await it.wait_for(lambda: "two" in it.lines())
            assert [(entry.job_id, line) for entry in it.published for line in entry.lines] == [
                (b"job1", "one"),
                (b"job1", "half"),
                (b"job2", "two"),
            ]
            it.logs.set_job(WORKER, b"job3", to_driver=False)
            os.write(it.out, b"quiet\n")
        assert it.file("out") == b"starting\none\nhalftwo\nquiet\n"
        assert "quiet" not in it.lines()

    asyncio.run(scenario())


def test_a_flood_is_bounded_for_the_driver_and_whole_in_the_file(tmp_path: Path) -> None:
    settings = LogSettings(
        read_bytes=1 << 17,
        read_total_bytes=1 << 17,
        publish_bytes=4096,
        waiting_bytes=8192,
        share_bytes=4096,
        backlog_bytes=1 << 18,
        tick_s=0.002,
    )
    text = b"".join(b"line %06d of a flood\n" % n for n in range(60_000))

    async def scenario() -> None:
        async with rig(tmp_path, settings) as it:
            it.logs.set_job(WORKER, b"job1")
            writer = threading.Thread(target=write_all, args=(it.out, text))
            writer.start()
            turns = 0
            while "line 059999 of a flood" not in it.lines():
                await asyncio.sleep(0)  # others get their turn meanwhile
                turns += 1
            writer.join()
            assert turns > 10
            assert sum(len(line) + 1 for entry in it.published for line in entry.lines) < len(text)
            assert any("lines dropped" in line for line in it.lines())
            assert max(len(entry.lines) for entry in it.published) <= 4096 // 22 + 1
        assert it.file("out") == text

    asyncio.run(asyncio.wait_for(scenario(), 30.0))


def write_all(fd: int, data: bytes) -> None:
    with open(fd, "wb", closefd=False) as file:
        file.write(data)


def test_the_end_of_a_line_is_not_waited_for_too_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path, LogSettings(partial_s=0.02)) as it:
            it.logs.set_job(WORKER, b"job1")
            os.write(it.out, b"Continue? ")
            await it.wait_for(lambda: it.lines() == ["Continue? "])

    asyncio.run(scenario())


def test_a_child_that_keeps_the_pipe_open_delays_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as it:  # the rig keeps the write ends open, as a grandchild would
            os.write(it.out, b"bye\n")
            assert it.logs.detach(WORKER) == ["bye"]
            with pytest.raises(BrokenPipeError):
                os.write(it.out, b"from beyond\n")

    asyncio.run(scenario())


def test_a_file_takes_the_pid_that_is_known_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with rig(tmp_path) as it:
            out_in, out = os.pipe()
            err_in, err = os.pipe()
            other = bytes(28)
            it.logs.attach(other, None, out_in, err_in)
            it.logs.set_job(other, b"job1")
            os.write(out, b"early\n")
            await it.wait_for(lambda: "early" in it.lines())
            it.logs.set_pid(other, 99)
            os.write(out, b"late\n")
            os.close(out)
            os.close(err)
            it.logs.detach(other)
        assert (tmp_path / "worker-00000000-99.out").read_text() == "early\nlate\n"
        assert not (tmp_path / "worker-00000000.out").exists()

    asyncio.run(scenario())


def test_closing_leaves_no_descriptor_and_no_thread(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    async def scenario() -> None:
        async with rig(tmp_path) as it:
            os.write(it.out, b"x\n")

    asyncio.run(scenario())
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if "shoal-worker-logs" in thread.name]


# -------------------------------------------------------------------------------------------------- the worker's side


class Pipe:
    """A stream of a worker whose other end the test reads."""

    def __init__(self) -> None:
        self.name = ""
        self._read, self._write = os.pipe()
        self.stream = worker_output.open_stream(self._write, "<stdout>", lambda: self.name)

    def read(self) -> bytes:
        """All that was written, up to the end: closes the writing side."""
        self.stream.close()
        os.close(self._write)
        with open(self._read, "rb") as file:
            return file.read()


def test_a_mark_is_written_only_when_the_name_changed_and_something_is_printed() -> None:
    pipe = Pipe()
    print("no name yet", file=pipe.stream)
    pipe.name = "silent"
    pipe.name = "f"
    print("one", file=pipe.stream)
    print("two", file=pipe.stream)
    pipe.name = ""
    print("three", file=pipe.stream)
    assert cut([pipe.read()]) == [("", b"no name yet\n"), ("f", b"one\ntwo\n"), ("", b"three\n")]


def test_a_workers_stream_behaves_as_a_real_one() -> None:
    pipe = Pipe()
    stream = pipe.stream
    assert isinstance(stream, io.TextIOWrapper)
    assert (stream.encoding, stream.name, stream.mode, stream.isatty()) == ("utf-8", "<stdout>", "w", False)
    assert stream.fileno() == pipe._write
    assert stream.writable()
    assert not stream.readable()
    stream.write("no end")
    stream.flush()
    stream.buffer.write(b", bytes \xff")
    stream.buffer.flush()
    stream.writelines(["\n", "lone surrogate \ud800, e\u0301\n"])
    stream.reconfigure(write_through=True)
    stream.write("at once")
    assert pipe.read() == b"no end, bytes \xff\nlone surrogate \\ud800, e\xcc\x81\nat once"
    with pytest.raises(ValueError, match="closed"):
        stream.write("x")


def test_threads_do_not_tear_each_others_lines() -> None:
    pipe = Pipe()
    local = threading.local()
    pipe.stream.close()
    stream = worker_output.open_stream(pipe._write, "<stdout>", lambda: getattr(local, "name", ""))
    pipe.stream = stream

    def work(number: int) -> None:
        local.name = f"task-{number}"
        for count in range(50):
            stream.write(f"{number}:{count}\n")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = b"".join(data for _, data in cut([pipe.read()])).decode()
    assert sorted(text.splitlines()) == sorted(f"{number}:{count}" for number in range(4) for count in range(50))


def test_install_replaces_the_streams_of_the_process() -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        worker_output.install(lambda: "f")
        print("out")
        print("err", file=sys.stderr)
        print("rest", end="")
        worker_output.flush()
        os.write(1, b"of a child\n")
        worker_output.flush()
        os._exit(0)
    os.close(write)
    with open(read, "rb") as file:
        text = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    assert text == name_mark("f") + b"out\n" + name_mark("f") + b"err\nrest" + name_mark("") * 2 + b"of a child\n"


def test_what_passes_the_streams_by_gets_the_name_that_was_left_for_it() -> None:
    pipe = Pipe()
    pipe.name = "f"
    print("one", file=pipe.stream)
    raw = pipe.stream.buffer.raw  # type: ignore[attr-defined]
    raw.rename("Actor")
    os.write(pipe._write, b"from a child\n")
    raw.rename("Actor")
    print("two", file=pipe.stream)
    assert cut([pipe.read()]) == [("f", b"one\n"), ("Actor", b"from a child\n"), ("f", b"two\n")]


def test_flush_survives_streams_that_user_code_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", closed)
    monkeypatch.setattr(sys, "stderr", None)
    worker_output.flush()
