"""Pulling from sources that fail: whatever one has sent is kept, and the next goes on at the same byte."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shoal.node import transfer
from shoal.node.messages import ChunkHeader, PullChunk
from shoal.node.transfer import Puller, Readable, SourceLostError, TransferServer
from shoal.objects.arena import Arena
from shoal.rpc.auth import ServerHandshake
from shoal.rpc.sockets import open_socket, read_handshake_message, shake_hands

TOKEN = b"a token of more than sixteen characters"
OBJECT = b"o" * 28
MIB = 1 << 20


class Source:
    """Accepts transfer connections on a port of its own and gives each to `serve`, on a thread."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.accepted = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            handshake = ServerHandshake(TOKEN, "source", lambda _: None)
            while not handshake.done:
                sock.sendall(handshake.receive(read_handshake_message(sock)))
            self._serve(sock)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


class Failing:
    """Sends `good` bytes of what is asked for, and then closes the connection, or says nothing any more."""

    def __init__(self, data: bytes, good: int, *, silent: bool = False) -> None:
        self.data = data
        self.good = good
        self.silent = silent
        self.asked: list[int] = []
        self.open: list[socket.socket] = []

    def __call__(self, sock: socket.socket) -> None:
        request: PullChunk = transfer._read_message(sock)
        self.asked.append(request.start)
        transfer._send(sock, ChunkHeader(OBJECT, request.start, request.length))
        sock.sendall(self.data[request.start : request.start + self.good])
        if self.silent:
            self.open.append(sock)
        else:
            sock.close()


@pytest.fixture
def sources() -> Iterator[Callable[[Callable[[socket.socket], None]], Source]]:
    made: list[Source] = []

    def make(serve: Callable[[socket.socket], None]) -> Source:
        made.append(Source(serve))
        return made[-1]

    yield make
    for source in made:
        source.close()


class Good:
    """A real transfer server over an arena that holds the object at some offset."""

    def __init__(self, data: bytes) -> None:
        self.arena = Arena.create(len(data) + 4096)
        self.arena.view(64, len(data))[:] = data
        self.size = len(data)
        self.pins = 0
        self.most_pins = 0
        self.server = TransferServer(self._pin, self._unpin)

    def _pieces(self, start: int, length: int) -> Iterator[memoryview]:
        for at in range(start, start + length, MIB):
            yield self.arena.view(64 + at, min(MIB, start + length - at))

    def _pin(self, object_id: bytes) -> Readable | None:
        if object_id != OBJECT:
            return None
        self.pins += 1
        self.most_pins = max(self.most_pins, self.pins)
        return Readable(self.size, self._pieces)

    def _unpin(self, _object_id: bytes) -> None:
        self.pins -= 1

    def close(self) -> None:
        self.server.close()


Make = Callable[[Callable[[socket.socket], None]], Source]


def test_several_chunks_arrive_whole_and_unpinned(sources: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "CHUNK_BYTES", MIB)
    data = os.urandom(5 * MIB + 17)

    async def main() -> None:
        good = Good(data)
        source = sources(good.server.serve)
        puller = Puller(TOKEN, "test")
        target = bytearray(len(data))
        for _ in range(2):
            target[:] = bytes(len(data))
            await puller.pull(OBJECT, memoryview(target), [source.address])
            assert target == data
        assert source.accepted == 1, "the connection is used again"
        assert good.most_pins == 1
        async with asyncio.timeout(5):
            while good.pins:  # noqa: ASYNC110 - the server's thread lets go after the last byte has left
                await asyncio.sleep(0.005)
        puller.close()
        good.close()

    asyncio.run(main())


@pytest.mark.parametrize("stopped_at", [0, 1, 700_000, 3 * MIB])
def test_the_next_source_goes_on_where_the_lost_one_stopped(sources: Make, stopped_at: int) -> None:
    data = os.urandom(4 * MIB)

    async def main() -> None:
        good = Good(data)
        lost = sources(Failing(data, stopped_at))
        puller = Puller(TOKEN, "test")
        target = bytearray(len(data))
        await puller.pull(OBJECT, memoryview(target), [lost.address, sources(good.server.serve).address])
        assert target == data
        puller.close()
        good.close()

    asyncio.run(main())


def test_a_second_failing_source_is_asked_from_where_the_first_stopped(sources: Make) -> None:
    data = os.urandom(MIB)
    first, second = Failing(data, 1000), Failing(data, 2000)

    async def main() -> None:
        puller = Puller(TOKEN, "test")
        target = bytearray(len(data))
        with pytest.raises(SourceLostError, match=r"clos|reset"):
            await puller.pull(OBJECT, memoryview(target), [sources(first).address, sources(second).address])
        assert first.asked == [0]
        assert second.asked == [1000]
        assert target[:3000] == data[:3000]
        puller.close()

    asyncio.run(main())


def test_a_source_without_the_object_says_so(sources: Make) -> None:
    async def main() -> None:
        good = Good(b"x" * 1000)
        puller = Puller(TOKEN, "test")
        with pytest.raises(SourceLostError, match="no copy"):
            await puller.pull(b"p" * 28, memoryview(bytearray(1000)), [sources(good.server.serve).address])
        puller.close()
        good.close()

    asyncio.run(main())


def test_a_connection_that_was_closed_while_it_was_kept_costs_nothing(sources: Make) -> None:
    data = os.urandom(1000)

    async def main() -> None:
        good = Good(data)
        source = sources(good.server.serve)
        puller = Puller(TOKEN, "test")
        target = bytearray(len(data))
        await puller.pull(OBJECT, memoryview(target), [source.address])
        good.server.close()
        target[:] = bytes(len(data))
        await puller.pull(OBJECT, memoryview(target), [source.address])
        assert target == data
        assert source.accepted == 2
        puller.close()
        good.close()

    asyncio.run(main())


def test_a_silent_source_is_given_up_in_time(sources: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 1.0)
    data = os.urandom(MIB)

    async def main() -> None:
        puller = Puller(TOKEN, "test")
        silent = sources(Failing(data, 1000, silent=True))
        with pytest.raises(SourceLostError, match="nothing"):
            await puller.pull(OBJECT, memoryview(bytearray(len(data))), [silent.address])
        puller.close()

    asyncio.run(main())


def test_forgetting_a_node_ends_what_is_pulled_from_it_at_once(sources: Make) -> None:
    data = os.urandom(MIB)
    failing = Failing(data, 1000, silent=True)

    async def main() -> None:
        puller = Puller(TOKEN, "test")
        silent = sources(failing)
        pull = asyncio.create_task(puller.pull(OBJECT, memoryview(bytearray(len(data))), [silent.address]))
        async with asyncio.timeout(5):
            while not failing.open:  # noqa: ASYNC110 - what is looked at belongs to the other side of a socket
                await asyncio.sleep(0.005)
            puller.forget(silent.address)
            with pytest.raises(SourceLostError):
                await pull
        puller.close()

    asyncio.run(main())


def test_what_is_no_transfer_message_ends_the_connection_only(sources: Make) -> None:
    async def main() -> None:
        good = Good(b"x" * 1000)
        source = sources(good.server.serve)
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1) as apart:
            assert await loop.run_in_executor(apart, _talk_nonsense, source.address) == b""
        puller = Puller(TOKEN, "test")
        target = bytearray(1000)
        await puller.pull(OBJECT, memoryview(target), [source.address])
        assert target == b"x" * 1000
        puller.close()
        good.close()

    asyncio.run(main())


def _talk_nonsense(address: str) -> bytes:
    with open_socket(address, 5) as sock:
        shake_hands(sock, TOKEN, "transfer", "nonsense")
        sock.sendall(b"\x10\0\0\0" + b"\xff" * 16)
        return sock.recv(10)
