"""Connections of asyncio processes over real sockets: coalescing, every way to end, strangers, and handing over."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from shoal.exceptions import AuthenticationError, ClusterConnectionError, ShoalError
from shoal.rpc import aio, frames
from shoal.rpc.aio import Connection, ConnectionClosedError, Listener, RequestFailed, attach, connect, listen_local
from shoal.rpc.auth import ServerHandshake, handshake_decoder
from shoal.rpc.frames import encode_message, join_frame, make_decoder
from shoal.rpc.messages import Challenge, Done, Failed, Hello, Message, Refused, Request, Welcome
from shoal.rpc.sockets import HANDOFF, join_address, listen_tcp, listen_unix, send_handed_over

TOKEN = b"the-token-of-this-cluster"
LIMIT_S = 20.0


class Note(Message, frozen=True, tag=900):
    number: int = 0
    data: bytes = b""


class Ask(Request, frozen=True, tag=901):
    number: int = 0


decoder = make_decoder(Note | Ask | Done | Failed)
Main = Callable[[], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Main], None]:
    """Runs a test's main on each kind of loop, within a time."""

    def run_main(main: Main) -> None:
        async def limited() -> None:
            async with asyncio.timeout(LIMIT_S):
                await main()

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(limited())

    return run_main


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - what is looked at has no event
        await asyncio.sleep(0.002)


class Server:
    """Serves a Unix socket and a TCP port, and keeps what it is told."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.connections: list[Connection] = []
        self.hellos: list[Hello] = []
        self.heard: list[Any] = []
        self.closings: list[Exception | None] = []
        self.on_ask: Callable[[Connection, Ask], None] = lambda connection, ask: connection.reply(ask, Done())
        self.admit: Callable[[Hello], Refused | None] = lambda _: None
        self.tcp = ""

    def check(self, hello: Hello) -> Refused | None:
        return self.admit(hello)

    def accept(self, connection: Connection, hello: Hello) -> None:
        self.connections.append(connection)
        self.hellos.append(hello)

        def on_message(message: Any) -> None:
            self.heard.append(message)
            if isinstance(message, Ask):
                self.on_ask(connection, message)

        connection.on_message = on_message
        connection.on_close = self.closings.append

    async def route(self, sock: socket.socket, hello: Hello) -> None:
        connection = Connection(decoder, hello.name)
        self.accept(connection, hello)
        await attach(connection, sock)

    async def open(self, **options: Any) -> Connection:
        return await connect(
            options.pop("address", f"unix:{self.path}"), options.pop("token", TOKEN), decoder,
            target=options.pop("target", "control"), name="test", **options,
        )  # fmt: skip


@contextlib.asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(str(tmp_path / "s"))
    local = await listen_local(server.path, TOKEN, decoder, server.accept, name="server", handoff=True)
    sock = listen_tcp("127.0.0.1", 0)
    server.tcp = join_address(*sock.getsockname())
    outside = Listener(sock, TOKEN, "server", server.check, server.route)
    try:
        yield server
    finally:
        local.close()
        outside.close()
        for connection in server.connections:
            connection.close()
            await connection.closed


def plain(server: Server) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(server.path)
    sock.setblocking(False)
    return sock


async def is_cut_off(sock: socket.socket) -> bool:
    try:
        return await asyncio.get_running_loop().sock_recv(sock, 100) == b""
    except ConnectionResetError:
        return True  # what we said was not even read to its end


# ----------------------------------------------------------------------------------------------------------- messages


def test_messages_and_answers_over_both_kinds_of_sockets(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            for address in (f"unix:{server.path}", server.tcp):
                connection = await server.open(address=address, target="worker:0a")
                assert connection.peer_name == "server"
                answers = await asyncio.gather(*(connection.request(Ask(0, number)) for number in range(200)))
                assert all(isinstance(answer, Done) for answer in answers)
                connection.close()
                await connection.closed
            assert [ask.number for ask in server.heard] == [*range(200), *range(200)]
            assert {hello.target for hello in server.hellos} == {"worker:0a"}
            await until(lambda: len(server.closings) == 2)
            assert server.closings == [None, None]

    run(main)


def test_what_is_sent_in_one_round_travels_in_one_frame(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        ours, peer = socket.socketpair()
        connection = Connection(decoder)
        await attach(connection, ours)
        for number in range(500):
            connection.send(Note(number))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        peer.settimeout(LIMIT_S)
        with peer.makefile("rb") as stream:
            size = int.from_bytes(stream.read(4), "little")
            assert [note.number for note in decoder.decode(stream.read(size))] == list(range(500))
        peer.close()
        await connection.closed

    run(main)


def test_closing_sends_what_is_pending_and_aborting_does_not(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        for polite in (True, False):
            ours, peer = socket.socketpair()
            connection = Connection(decoder)
            reasons: list[Exception | None] = []
            connection.on_close = reasons.append
            await attach(connection, ours)
            connection.send(Note(1))
            if polite:
                connection.close()
            else:
                connection.abort(ShoalError("enough"))
            await connection.closed
            connection.send(Note(2))
            peer.setblocking(False)
            data = await asyncio.get_running_loop().sock_recv(peer, 1000)
            assert data.endswith(encode_message(Note(1))) == polite
            assert (str(reasons[0]) == "enough") != polite
            assert len(reasons) == 1
            peer.close()

    run(main)


def test_a_connection_may_be_closed_before_it_is_attached(run: Callable[[Main], None]) -> None:
    """As a handler does that refuses a peer when it is told of it."""

    async def main() -> None:
        for polite in (True, False):
            ours, peer = socket.socketpair()
            connection = Connection(decoder)
            connection.send(Note(1))
            if polite:
                connection.close()
            else:
                connection.abort(ShoalError("not you"))
            await attach(connection, ours)
            await connection.closed
            peer.setblocking(False)
            data = await asyncio.get_running_loop().sock_recv(peer, 1000)
            assert data.endswith(encode_message(Note(1))) == polite
            await until(lambda sock=ours: sock.fileno() == -1)  # type: ignore[misc]  # or it would close its number twice
            peer.close()

    run(main)


def test_nothing_is_handled_after_an_abort(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        ours, peer = socket.socketpair()
        connection = Connection(decoder)
        heard: list[int] = []

        def on_message(message: Any) -> None:
            heard.append(message.number)
            connection.abort(ShoalError("one is enough"))

        connection.on_message = on_message
        await attach(connection, ours)
        peer.sendall(join_frame([encode_message(Note(number)) for number in range(5)]))
        await connection.closed
        assert heard == [0]
        peer.close()

    run(main)


def test_a_peer_that_stops_reading_blocks_nobody_and_is_given_up_in_the_end(
    run: Callable[[Main], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "MAX_UNSENT_BYTES", 50 << 20)

    async def main() -> None:
        async with serving(tmp_path) as server:
            ours, peer = socket.socketpair()
            slow = Connection(decoder, "the sleeper")
            await attach(slow, ours)
            data = os.urandom(1 << 20)
            waiting = slow.start_request(Ask(0, 1))
            for number in range(40):
                slow.send(Note(number, data))
            other = await server.open()
            assert isinstance(await other.request(Ask()), Done)
            assert not slow.closed.done()
            for number in range(40):
                slow.send(Note(number, data))
            await slow.closed
            with pytest.raises(ConnectionClosedError, match="sleeper"):
                await waiting
            other.close()
            peer.close()

    run(main)


def test_what_waited_for_a_slow_peer_arrives_whole(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        fast, slow = Connection(decoder), Connection(decoder)
        heard: list[Any] = []
        slow.on_message = heard.append
        await attach(fast, ours)
        data = os.urandom(100_000)
        for number in range(100):
            fast.send(Note(number, data))
            if number % 10 == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        await attach(slow, theirs)
        await until(lambda: len(heard) == 100)
        assert heard == [Note(number, data) for number in range(100)]
        fast.close()
        await slow.closed

    run(main)


def test_a_peer_that_ends_in_the_middle_of_a_frame_fails_the_requests(run: Callable[[Main], None]) -> None:
    async def main() -> None:
        ours, peer = socket.socketpair()
        connection = Connection(decoder, "the peer")
        heard: list[Any] = []
        connection.on_message = heard.append
        await attach(connection, ours)
        requests = [connection.start_request(Ask(0, number)) for number in range(3)]
        abandoned = connection.start_request(Ask(0, 4))  # nobody looks at it again: not worth a warning
        frame = join_frame([encode_message(Note(1, b"x" * 1000))])
        peer.sendall(frame + frame[:500])
        await asyncio.sleep(0)
        peer.close()
        for request in requests:
            with pytest.raises(ConnectionClosedError, match="the peer"):
                await request
        del abandoned
        assert heard == [Note(1, b"x" * 1000)]
        with pytest.raises(ConnectionClosedError):
            await connection.request(Ask())

    run(main)


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 64, b"\x03\0\0\0abc", join_frame([b"\x92\xcd\x03\x84"]), join_frame([b"\x91\xa1\xff"])]
)
def test_a_peer_that_breaks_the_protocol_is_cut_off(
    run: Callable[[Main], None], garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        ours, peer = socket.socketpair()
        connection = Connection(decoder, "breaker")
        reasons: list[Exception | None] = []
        connection.on_close = reasons.append
        await attach(connection, ours)
        peer.sendall(garbage)
        await connection.closed
        assert isinstance(reasons[0], frames.FrameError)
        peer.close()

    with caplog.at_level(logging.ERROR):
        run(main)
    assert "broke the protocol peer=breaker" in caplog.text
    assert "Traceback" not in caplog.text


def test_failed_answers_timeouts_and_late_answers(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            connection = await server.open()
            late: list[tuple[Connection, Ask]] = []

            def on_ask(asker: Connection, ask: Ask) -> None:
                if ask.number == 0:
                    asker.reply(ask, Failed(kind="nope", text="one clear line"))
                elif ask.number == 1:
                    late.append((asker, ask))
                elif ask.number == 2:
                    raise ValueError("a bug in the handler")
                else:
                    asker.reply(ask, Done())

            server.on_ask = on_ask
            with pytest.raises(RequestFailed, match="one clear line") as failed:
                await connection.request(Ask(0, 0))
            assert failed.value.kind == "nope"
            with pytest.raises(TimeoutError):
                await connection.request(Ask(0, 1), timeout_s=0.02)
            for asker, ask in late:
                asker.reply(ask, Done())
            with pytest.raises(RequestFailed, match="a bug in the handler") as failed:
                await connection.request(Ask(0, 2))
            assert failed.value.kind == "internal"
            assert isinstance(await connection.request(Ask(0, 3)), Done)
            connection.close()

    run(main)


def test_what_is_too_long_for_a_frame_is_the_senders_to_see(
    run: Callable[[Main], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "MAX_MESSAGE_BYTES", 1000)
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 1005)

    async def main() -> None:
        async with serving(tmp_path) as server:
            connection = await server.open()
            with pytest.raises(frames.FrameError, match="larger than the limit"):
                connection.send(Note(0, b"x" * 1000))
            for number in range(5):  # together too long for one frame, each alone not
                connection.send(Note(number, b"x" * 400))
            assert isinstance(await connection.request(Ask()), Done)
            assert [note.number for note in server.heard[:-1]] == list(range(5))
            connection.close()

    run(main)


# --------------------------------------------------------------------------------------------------------- handshakes


def test_a_wrong_token_a_refusal_and_nobody_there(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            with pytest.raises(AuthenticationError, match="SHOAL_TOKEN"):
                await server.open(token=b"some other token entirely")
            server.admit = lambda hello: Refused("no_target", f"there is no {hello.target!r} here")
            with pytest.raises(ShoalError, match="there is no 'nobody' here"):
                await server.open(address=server.tcp, target="nobody")
            assert server.hellos == []
            with socket.create_server(("127.0.0.1", 0)) as silent:
                address = join_address(*silent.getsockname())
                with pytest.raises(ClusterConnectionError, match=f"{address}: nothing answered in time"):
                    await server.open(address=address, timeout_s=0.1)
            with pytest.raises(ClusterConnectionError, match="Connection refused"):
                await server.open(address=address)
            with pytest.raises(ClusterConnectionError, match="No such file"):
                await server.open(address=f"unix:{tmp_path}/nothing")
            with pytest.raises(ClusterConnectionError, match=r"no\.such\.host\.invalid"):
                await server.open(address="no.such.host.invalid:80")
            for wrong in ("host", "host:", ":80", "host:port", "host:0", "host:65536"):
                with pytest.raises(ShoalError, match="is not an address"):
                    await server.open(address=wrong)

    run(main)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", join_frame([encode_message(Welcome("trust me"))]), b"", b"\x91\0\0\0"]
)
def test_a_server_that_is_no_node_of_ours_is_not_believed(
    run: Callable[[Main], None], tmp_path: Path, said: bytes
) -> None:
    async def main() -> None:
        with socket.create_server(("127.0.0.1", 0)) as fake:
            fake.setblocking(False)
            opening = asyncio.create_task(Server("").open(address=join_address(*fake.getsockname())))
            theirs, _ = await asyncio.get_running_loop().sock_accept(fake)
            theirs.send(said)
            theirs.close()
            with pytest.raises(ShoalError):
                await opening

    run(main)


def test_a_name_with_several_addresses_is_tried_through(
    run: Callable[[Main], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            loop = asyncio.get_running_loop()
            port = int(server.tcp.rpartition(":")[2])

            async def both(host: str, wanted: int, **_: Any) -> list[Any]:
                return [
                    (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", wanted, 0, 0)),
                    (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", wanted)),
                ]

            if isinstance(loop, uvloop.Loop):
                return  # its methods cannot be replaced
            monkeypatch.setattr(loop, "getaddrinfo", both)
            connection = await server.open(address=f"localhost:{port}")
            assert isinstance(await connection.request(Ask()), Done)
            connection.close()

    run(main)


STRANGE = [
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",  # TLS
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x01\x10\0\0",  # one byte over the limit
    b"\x05\0\0\0\xdd\xff\xff\xff\xff",
    join_frame([encode_message(Note(1))]),
    join_frame([]),
    join_frame([encode_message(Hello(1, "1", b"n", "control"))] * 2),
    join_frame([b"\x92\x06\xa2\xff\xfe"]),  # text that is not UTF-8
    join_frame([b"\x9a\x06\xa1a" + b"\x91" * 3000]),  # nested deeper than the interpreter's stack
]


@pytest.mark.parametrize("said", STRANGE, ids=range(len(STRANGE)))
def test_strangers_are_cut_off_without_a_word(
    run: Callable[[Main], None], tmp_path: Path, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            sock = plain(server)
            await asyncio.get_running_loop().sock_sendall(sock, said)
            assert await is_cut_off(sock)
            sock.close()
            connection = await server.open()
            assert isinstance(await connection.request(Ask()), Done)
            connection.close()
            assert len(server.connections) == 1

    with caplog.at_level(logging.INFO):
        run(main)
    assert "Traceback" not in caplog.text
    assert "never retrieved" not in caplog.text


def test_half_a_handshake_and_then_silence_is_given_up(
    run: Callable[[Main], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with serving(tmp_path) as server:
            loop = asyncio.get_running_loop()
            half = plain(server)
            await loop.sock_sendall(half, join_frame([encode_message(Hello(1, "1", b"n" * 16, "control"))]))
            body = (await loop.sock_recv(half, 4096))[4:]
            assert isinstance(handshake_decoder.decode(body)[0], Challenge)
            dribble = plain(server)
            for byte in b"\x10\0\0":
                await loop.sock_sendall(dribble, bytes([byte]))
            for sock in (half, dribble):
                assert await is_cut_off(sock)
                sock.close()

    run(main)


def test_idle_strangers_keep_nobody_out(
    run: Callable[[Main], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "MAX_STRANGERS", 20)
    monkeypatch.setattr(aio, "STRANGER_PATIENCE_S", 0.1)

    async def main() -> None:
        async with serving(tmp_path) as server:
            idle = [plain(server) for _ in range(60)]
            begin = time.monotonic()
            connection = await server.open()
            assert isinstance(await connection.request(Ask()), Done)
            assert time.monotonic() - begin < 2.0
            connection.close()
            gone = 0
            for sock in idle:
                try:
                    gone += sock.recv(1) == b""
                except BlockingIOError:
                    pass
                sock.close()
            assert 41 <= gone <= 60

    run(main)


def test_many_honest_clients_at_once_all_get_in(
    run: Callable[[Main], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aio, "MAX_STRANGERS", 8)

    async def main() -> None:
        async with serving(tmp_path) as server:
            connections = await asyncio.gather(*(server.open(address=server.tcp) for _ in range(150)))
            answers = await asyncio.gather(*(connection.request(Ask()) for connection in connections))
            assert len(answers) == 150
            for connection in connections:
                connection.close()

    run(main)


def test_a_listener_out_of_descriptors_recovers(
    run: Callable[[Main], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            waiting = [socket.socket(socket.AF_UNIX) for _ in range(5)]
            before = await server.open()
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            held: list[int] = []
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 3, hard))
            try:
                with contextlib.suppress(OSError):
                    while True:
                        held.append(os.dup(0))
                for sock in waiting:
                    sock.connect(server.path)
                assert isinstance(await before.request(Ask()), Done)
                await until(lambda: "cannot accept connections" in caplog.text)
                await asyncio.sleep(0.15)
            finally:
                for fd in held:
                    os.close(fd)
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert caplog.text.count("cannot accept connections") == 1
            for sock in waiting:
                sock.setblocking(False)
                assert await aio.shake_hands(sock, TOKEN, "control", "patient") == "server"
                sock.close()
            before.close()

    run(main)


def test_a_full_queue_of_a_unix_socket_is_waited_for(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        path = str(tmp_path / "busy")
        busy = listen_unix(path)
        busy.listen(0)
        fillers = []
        while True:
            filler = socket.socket(socket.AF_UNIX)
            filler.setblocking(False)
            fillers.append(filler)
            if filler.connect_ex(path):
                break
        opening = asyncio.create_task(Server(path).open())
        await asyncio.sleep(0.03)
        assert not opening.done()
        for _ in range(len(fillers) - 1):
            busy.accept()[0].close()
        listener = Listener(busy, TOKEN, "late", lambda _: None, Server(path).route)
        (await opening).close()
        listener.close()
        for filler in fillers:
            filler.close()

    run(main)


# ------------------------------------------------------------------------------------------------------- handed over


def test_a_connection_is_handed_over_with_what_was_sent_on_it(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            ours, theirs = socket.socketpair()
            ours.sendall(join_frame([encode_message(Note(5))]))
            await aio.hand_over(theirs, server.path, TOKEN, Hello(1, "1", b"", "control", "from afar"))
            assert theirs.fileno() == -1
            await until(lambda: server.heard)
            assert server.heard == [Note(5)]
            assert server.hellos[0].name == "from afar"
            connection = Connection(decoder)
            ours.setblocking(False)
            await attach(connection, ours)
            assert isinstance(await connection.request(Ask()), Done)
            connection.close()

    run(main)


def test_who_waits_for_a_busy_process_holds_no_thread(run: Callable[[Main], None], tmp_path: Path) -> None:
    """A worker whose user code keeps the interpreter busy takes its connections later; others go on meanwhile."""

    async def main() -> None:
        async with serving(tmp_path) as server:
            busy = listen_unix(str(tmp_path / "busy"))
            pairs = [socket.socketpair() for _ in range(40)]
            hello = Hello(1, "1", b"", "worker:aa", "from afar")
            waiting = [
                asyncio.create_task(aio.hand_over(theirs, str(tmp_path / "busy"), TOKEN, hello)) for _, theirs in pairs
            ]
            connection = await server.open()
            assert isinstance(await connection.request(Ask()), Done)
            assert not any(task.done() for task in waiting)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            assert all(theirs.fileno() == -1 for _, theirs in pairs)
            for ours, _ in pairs:
                ours.close()
            busy.close()
            connection.close()

    run(main)


def test_a_process_that_is_gone_cannot_be_handed_anything(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        with pytest.raises(ClusterConnectionError):
            await aio.hand_over(theirs, str(tmp_path / "gone"), TOKEN, Hello(1, "1", b"", "worker:aa"))
        assert ours.recv(1) == b""
        ours.close()

    run(main)


def test_a_handoff_without_a_socket_or_a_hello_harms_nobody(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            loop = asyncio.get_running_loop()
            for said in (b"nothing", join_frame([encode_message(Hello(1, "1", b"", "control"))]), b""):
                carrier = plain(server)
                await aio.shake_hands(carrier, TOKEN, HANDOFF, "agent")
                if said:
                    await loop.sock_sendall(carrier, said)
                carrier.close()
            pair = socket.socketpair()
            carrier = plain(server)
            await aio.shake_hands(carrier, TOKEN, HANDOFF, "agent")
            socket.send_fds(carrier, [b"no hello"], [pair[1].fileno()])
            pair[1].close()
            pair[0].setblocking(False)
            assert await is_cut_off(pair[0])
            pair[0].close()
            carrier.close()
            connection = await server.open()
            assert isinstance(await connection.request(Ask()), Done)
            connection.close()
            assert len(server.connections) == 1

    run(main)


def test_a_stranger_hands_over_nothing(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(tmp_path) as server:
            sock, pair = plain(server), socket.socketpair()
            send_handed_over(sock, pair[1], Hello(1, "1", b"n" * 16, HANDOFF))
            loop = asyncio.get_running_loop()
            assert isinstance(handshake_decoder.decode((await loop.sock_recv(sock, 4096))[4:])[0], Challenge)
            send_handed_over(sock, pair[1], Hello(1, "1", b"n" * 16, HANDOFF))
            assert isinstance(handshake_decoder.decode((await loop.sock_recv(sock, 4096))[4:])[0], Refused)
            assert await is_cut_off(sock)
            assert server.connections == []
            for end in (sock, *pair):
                end.close()

    run(main)


def test_cycles_leave_no_descriptor(run: Callable[[Main], None], tmp_path: Path) -> None:
    async def main() -> None:
        async def cycle() -> None:
            async with serving(tmp_path) as server:
                connection = await server.open(address=server.tcp)
                await connection.request(Ask())
                with contextlib.suppress(AuthenticationError):
                    await server.open(token=b"wrong" * 5)
                connection.close()
                await connection.closed

        await cycle()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(10):
            await cycle()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(main)


def test_the_sockets_of_a_node_are_for_its_user_only(tmp_path: Path) -> None:
    with listen_unix(str(tmp_path / "s")):
        assert os.stat(tmp_path / "s").st_mode & 0o777 == 0o600
    with listen_unix(str(tmp_path / "s")):
        pass  # replaces what a dead process left


def test_a_port_that_is_taken_or_an_address_of_another_machine_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ShoalError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: Address already in use; give"):
            listen_tcp("127.0.0.1", port)
    with pytest.raises(ShoalError, match=r"^cannot listen on 192\.0"):
        listen_tcp("192.0.2.1", 0)
    with pytest.raises(ShoalError, match=r"^cannot listen on no\.such\.host\.invalid"):
        listen_tcp("no.such.host.invalid", 0)


def test_a_server_handshake_is_not_done_by_a_hello_alone() -> None:
    handshake = ServerHandshake(TOKEN, "server", lambda _: None)
    handshake.receive(Hello(1, "1", b"n" * 16, "control"))
    assert not handshake.done
