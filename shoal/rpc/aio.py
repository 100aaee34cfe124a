"""Connections for processes that run asyncio: control, the agent, command-line tools.

`send` never blocks: messages are encoded at once and everything that is pending on a connection leaves in one frame at
the end of the loop's current round. The handshake happens on the plain socket, byte-exact, so that a listener can hand
the socket to another process instead of speaking on it itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

import msgspec

from shoal.exceptions import AuthenticationError, ClusterConnectionError, ShoalError
from shoal.rpc.auth import Admit, ClientHandshake, ServerHandshake, handshake_decoder
from shoal.rpc.frames import FrameError, FrameReader, check_size, decode_frame, encode_message, join_frame, make_decoder
from shoal.rpc.messages import MAX_HANDSHAKE_BYTES, Failed, Hello, Message, Reply, Request
from shoal.rpc.sockets import (
    HANDOFF,
    join_address,
    listen_unix,
    receive_handed_over,
    send_handed_over,
    split_address,
    tune,
)

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S: Final = 10.0
MAX_STRANGERS: Final = 512
"""Connections that may be in their handshake at once; more wait in the kernel's queue."""
STRANGER_PATIENCE_S: Final = 1.0
"""When there are that many, one that has been at it for longer gives way: strangers who say nothing, however many they
are, keep nobody out for ten seconds. A handshake takes two round trips."""
ACCEPT_AGAIN_S: Final = 0.05
CONNECT_AGAIN_S: Final = 0.01
HANDOVER_TIMEOUT_S: Final = 30.0
MAX_UNSENT_BYTES: Final = 1 << 30
"""A peer that lets this much pile up is as good as dead."""

_LENGTH = struct.Struct("<I")


class ConnectionClosedError(ShoalError):
    """The connection ended before the answer came."""


class RequestFailed(ShoalError):
    """The peer answered `Failed`: `kind` for programs, `text` for people."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text


class Connection(asyncio.Protocol):
    """One open, authenticated connection.

    Set `on_message` before messages can arrive (in the same round of the loop as the connection was given to you);
    `on_close` is called once, with None after `close()` and with the reason otherwise.
    """

    def __init__(self, messages: Any, peer_name: str = "") -> None:
        self.peer_name = peer_name
        self.on_message: Callable[[Any], None] = self._unexpected
        self.on_close: Callable[[Exception | None], None] = lambda _: None
        self._decoder = make_decoder(messages)
        self._reader = FrameReader()
        self._outbox: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Transport | None = None
        self._transport: asyncio.Transport | None = None  # from `attached` on
        self._requests: dict[int, asyncio.Future[Reply]] = {}
        self._rids = itertools.count(1)
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._reason: Exception | None = None
        self._closing = False

    # ------------------------------------------------------------------------------------------------ sending

    def send(self, message: Message) -> None:
        """Queue one message; on a closed connection it is dropped (whoever cares watches `on_close`).

        Raises:
            FrameError: it is longer than any frame may be; nothing was sent.
        """
        if self.closed.done():
            return
        encoded = encode_message(message)
        check_size(encoded)
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(encoded)

    def reply(self, request: Request, answer: Reply) -> None:
        """Answer `request`; nothing is sent when it wanted no answer."""
        if request.rid:
            msgspec.structs.force_setattr(answer, "rid", request.rid)
            self.send(answer)

    async def request(self, message: Request, timeout_s: float | None = None) -> Any:
        """Send and wait for the answer.

        Raises:
            RequestFailed: the peer said no. ConnectionClosedError: it went away. TimeoutError. FrameError: as `send`.
        """
        future = self.start_request(message)
        async with asyncio.timeout(timeout_s):
            return await future

    def start_request(self, message: Request) -> asyncio.Future[Reply]:
        """As `request`, for callers that wait later or by callback."""
        future: asyncio.Future[Reply] = self._loop.create_future()
        if self.closed.done():
            future.set_exception(ConnectionClosedError(f"the connection to {self.peer_name or 'the peer'} is closed"))
            return future
        rid = next(self._rids)
        msgspec.structs.force_setattr(message, "rid", rid)
        self.send(message)
        self._requests[rid] = future
        future.add_done_callback(lambda _: self._requests.pop(rid, None))
        return future

    def _flush(self) -> None:
        transport = self._transport
        if transport is None or self.closed.done() or not self._outbox:
            return  # what is sent before the connection is attached leaves when it is
        messages, self._outbox = self._outbox, []
        try:
            transport.write(join_frame(messages))
        except FrameError:  # too much for one frame; each alone fits
            for message in messages:
                transport.write(join_frame([message]))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.abort(ConnectionClosedError(f"{self.peer_name or 'the peer'} stopped reading"))

    def close(self) -> None:
        """Send what is pending, then close."""
        self._closing = True
        if self._transport is not None and not self._transport.is_closing():
            self._flush()
            self._transport.close()

    def abort(self, reason: Exception) -> None:
        """Close at once, whatever has arrived or waits to be sent; `on_close` gets `reason`."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------------------------------------- receiving

    def _unexpected(self, message: Any) -> None:
        logger.warning("unexpected message peer=%s message=%s", self.peer_name, type(message).__name__)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made = cast(asyncio.Transport, transport)

    def attached(self) -> None:
        """The loop owns the socket now: do what was asked for before.

        Not in `connection_made`: uvloop closes a socket that is closed there without telling the socket object, which
        then, when it is collected, closes whatever has the same number.
        """
        transport = self._transport = self._made
        assert transport is not None
        if self._reason is not None:
            transport.abort()
        elif self._closing:
            self.close()
        else:
            self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                for message in decode_frame(self._decoder, body):
                    if self._reason is None:
                        self._dispatch(message)
        except FrameError as exc:
            logger.error("closing a connection that broke the protocol peer=%s error=%s", self.peer_name, exc)
            self.abort(exc)

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, Reply):
            future = self._requests.pop(message.rid, None)
            if future is not None and not future.done():
                if isinstance(message, Failed):
                    future.set_exception(RequestFailed(message.kind, message.text))
                else:
                    future.set_result(message)
                return
            if future is not None or message.rid:
                return  # whoever asked has given up meanwhile
        try:
            self.on_message(message)
        except Exception as exc:
            # The boundary of this process: a bug in one handler must not end the connections of everybody else.
            logger.exception("handler failed peer=%s message=%s", self.peer_name, type(message).__name__)
            if isinstance(message, Request):
                self.reply(message, Failed(kind="internal", text=f"{type(exc).__name__}: {exc}"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.closed.done():
            return
        reason = self._reason or exc
        self.closed.set_result(None)
        gone = ConnectionClosedError(f"the connection to {self.peer_name or 'the peer'} closed")
        for future in list(self._requests.values()):
            if not future.done():
                future.set_exception(gone)
                future.exception()  # retrieved: a request nobody waits for any more is not worth a warning
        self._requests.clear()
        self.on_close(reason)


# ----------------------------------------------------------------------------------------------------- handshakes


async def _read_message(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Message:
    async def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = await loop.sock_recv(sock, size - len(data))
            if not part:
                raise ConnectionResetError("the peer closed the connection during the handshake")
            data += part
        return data

    (size,) = _LENGTH.unpack(await exactly(4))
    if size > MAX_HANDSHAKE_BYTES:
        raise FrameError("the peer does not speak shoal's protocol")
    messages = decode_frame(handshake_decoder, await exactly(size))
    if len(messages) != 1:
        raise FrameError("a handshake frame holds one message")
    return cast(Message, messages[0])


async def _welcome(sock: socket.socket, token: bytes, name: str, admit: Admit) -> Hello | None:
    loop = asyncio.get_running_loop()
    handshake = ServerHandshake(token, name, admit)
    while not handshake.done and handshake.refused is None:
        answer = handshake.receive(await _read_message(loop, sock))
        await loop.sock_sendall(sock, answer)
    if handshake.refused is not None:
        logger.warning("refused a connection kind=%s reason=%s", handshake.refused.kind, handshake.refused.text)
    return handshake.hello if handshake.done else None


async def shake_hands(sock: socket.socket, token: bytes, target: str, name: str) -> str:
    """The client's side on a connected non-blocking socket. Returns the peer's name; raises as `ClientHandshake`."""
    loop = asyncio.get_running_loop()
    handshake = ClientHandshake(token, target, name)
    await loop.sock_sendall(sock, handshake.start())
    while not handshake.done:
        answer = handshake.receive(await _read_message(loop, sock))
        if answer:
            await loop.sock_sendall(sock, answer)
    return handshake.peer_name


class Listener:
    """Accepts, authenticates and passes on: `route(sock, hello)` owns the socket from then on."""

    def __init__(
        self,
        sock: socket.socket,
        token: bytes,
        name: str,
        admit: Admit,
        route: Callable[[socket.socket, Hello], Awaitable[None]],
    ) -> None:
        self._sock = sock
        self._token = token
        self._name = name
        self._admit = admit
        self._route = route
        self._strangers: dict[socket.socket, tuple[float, asyncio.Task[None]]] = {}  # the one that came first is first
        self._one_less = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._acceptor = asyncio.get_running_loop().create_task(self._accept(), name=f"accept-{name}")

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        trouble = ""
        while True:
            while len(self._strangers) >= MAX_STRANGERS:
                await self._make_room()
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError as exc:  # out of file descriptors, or the peer went away in the queue
                if trouble != str(exc):
                    trouble = str(exc)
                    logger.warning("cannot accept connections at %s: %s", self._name, exc)
                # Not a signal to wait for: the kernel has none for "descriptors are free again".
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            trouble = ""
            task = loop.create_task(self._meet(sock), name="handshake")
            self._strangers[sock] = (loop.time(), task)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _make_room(self) -> None:
        """Wait until there is one stranger less; when that takes long, send away the one that came first."""
        sock, (came_at, task) = next(iter(self._strangers.items()))
        left_s = came_at + STRANGER_PATIENCE_S - asyncio.get_running_loop().time()
        if left_s <= 0:
            del self._strangers[sock]
            task.cancel()
            return
        self._one_less.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self._one_less.wait()

    async def _meet(self, sock: socket.socket) -> None:
        taken = False
        try:
            tune(sock)
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    hello = await _welcome(sock, self._token, self._name, self._admit)
            finally:
                self._strangers.pop(sock, None)
                self._one_less.set()
            if hello is not None:
                taken = True
                await self._route(sock, hello)
        except (OSError, TimeoutError, FrameError, ShoalError) as exc:
            logger.info("a connection ended in its handshake: %s", exc)
        finally:
            if not taken:
                sock.close()

    def close(self) -> None:
        self._acceptor.cancel()
        for task in self._tasks:
            task.cancel()
        self._sock.close()


async def attach(connection: Connection, sock: socket.socket) -> None:
    """Begin to speak over `sock`; handlers of `connection` must be set before."""
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: connection, sock=sock)
    connection.attached()


async def listen_local(
    path: str,
    token: bytes,
    messages: Any,
    accept: Callable[[Connection, Hello], None],
    *,
    name: str,
    handoff: bool = False,
) -> Listener:
    """Serve a Unix socket: `accept(connection, hello)` is called for each authentic connection and sets its handlers.

    With `handoff`, connections that an agent accepted for this process arrive here too (see `hand_over`).
    """
    decoder = make_decoder(messages)

    async def route(sock: socket.socket, hello: Hello) -> None:
        if handoff and hello.target == HANDOFF:
            try:
                sock.settimeout(HANDSHAKE_TIMEOUT_S)
                handed, hello = await asyncio.get_running_loop().run_in_executor(None, receive_handed_over, sock)
            finally:
                sock.close()
            tune(handed)
            sock = handed
        connection = Connection(decoder, hello.name)
        accept(connection, hello)
        await attach(connection, sock)

    return Listener(listen_unix(path), token, name, lambda _: None, route)


async def hand_over(sock: socket.socket, path: str, token: bytes, hello: Hello) -> None:
    """Pass the authenticated connection `sock` to the process that listens at Unix socket `path`; closes it here.

    That process may run user code that keeps it busy for a while: a task waits for it here, never a thread.

    Raises:
        ClusterConnectionError, OSError: the process is gone, or did not take it in time.
    """
    with sock:
        carrier, _ = await open_plain(
            f"unix:{path}", token, target=HANDOFF, name=hello.name, timeout_s=HANDOVER_TIMEOUT_S
        )
        with carrier:
            send_handed_over(carrier, sock, hello)


async def _open_unix(path: str) -> socket.socket:
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(path)
            return sock
        except BlockingIOError:  # its queue of connections is full, and the kernel does not say when it has room again
            sock.close()
            await asyncio.sleep(CONNECT_AGAIN_S)
        except BaseException:
            sock.close()
            raise


async def _open_tcp(address: str) -> socket.socket:
    """To the first address of the name that answers: "localhost" may be ::1 first, and the node listen on 127.0.0.1."""
    loop = asyncio.get_running_loop()
    host, port = split_address(address)
    infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, kind, protocol, _, where) in enumerate(infos, 1):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, where)
            return sock
        except OSError:
            sock.close()
            if number == len(infos):
                raise
        except BaseException:
            sock.close()
            raise
    raise OSError(f"{join_address(host, port)} has no address")


async def open_plain(
    address: str, token: bytes, *, target: str, name: str, timeout_s: float
) -> tuple[socket.socket, str]:
    """A connected, authenticated, non-blocking socket and the peer's name; errors as in `connect`."""
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            sock = await (_open_unix(address[5:]) if address.startswith("unix:") else _open_tcp(address))
            tune(sock)
            return sock, await shake_hands(sock, token, target, name)
    except (AuthenticationError, ShoalError, asyncio.CancelledError):
        if sock is not None:
            sock.close()
        raise
    except (OSError, TimeoutError, FrameError) as exc:
        if sock is not None:
            sock.close()
        if isinstance(exc, TimeoutError):
            what = "nothing answered in time"
        else:
            what = os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else str(exc)
        raise ClusterConnectionError(f"cannot reach a shoal node at {address.removeprefix('unix:')}: {what}") from exc


async def connect(
    address: str,
    token: bytes,
    messages: Any,
    *,
    target: str,
    name: str,
    timeout_s: float = 10.0,
    on_message: Callable[[Any], None] | None = None,
) -> Connection:
    """Connect, prove the token both ways, and speak. Give `on_message` where the peer may speak first.

    Raises:
        ClusterConnectionError: nobody (or something else) is there. AuthenticationError: wrong token.
        ShoalError: refused (no such target, wrong version).
    """
    sock, peer = await open_plain(address, token, target=target, name=name, timeout_s=timeout_s)
    try:
        connection = Connection(messages, peer)
        if on_message is not None:
            connection.on_message = on_message
        await attach(connection, sock)
        return connection
    except BaseException:
        with contextlib.suppress(OSError):
            sock.close()
        raise
