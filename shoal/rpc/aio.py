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
from typing import Any, cast

import msgspec

from shoal.exceptions import AuthenticationError, ClusterConnectionError, ShoalError
from shoal.rpc.auth import Admit, ClientHandshake, ServerHandshake, handshake_decoder
from shoal.rpc.frames import FrameError, FrameReader, encode_message, join_frame, make_decoder
from shoal.rpc.messages import MAX_HANDSHAKE_BYTES, Failed, Hello, Message, Reply, Request
from shoal.rpc.sockets import HANDOFF, listen_unix, receive_handed_over, split_address, tune

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 10.0
MAX_STRANGERS = 512
"""Connections that may be in their handshake at once; more wait in the kernel's queue."""
MAX_UNSENT_BYTES = 1 << 30
"""A peer that lets this much pile up is as good as dead."""

_LENGTH = struct.Struct("<I")


class ConnectionClosedError(ShoalError):
    """The connection ended before the answer came."""


class RequestFailed(ShoalError):  # noqa: N818 - named for what the peer said
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
        self._transport: asyncio.Transport | None = None
        self._requests: dict[int, asyncio.Future[Reply]] = {}
        self._rids = itertools.count(1)
        self.closed: asyncio.Future[None] = self._loop.create_future()
        self._reason: Exception | None = None

    # ------------------------------------------------------------------------------------------------ sending

    def send(self, message: Message) -> None:
        """Queue one message; on a closed connection it is dropped (whoever cares watches `on_close`)."""
        if self.closed.done():
            return
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(encode_message(message))

    def reply(self, request: Request, answer: Reply) -> None:
        """Answer `request`; nothing is sent when it wanted no answer."""
        if request.rid:
            msgspec.structs.force_setattr(answer, "rid", request.rid)
            self.send(answer)

    async def request(self, message: Request, timeout_s: float | None = None) -> Any:
        """Send and wait for the answer.

        Raises:
            RequestFailed: the peer said no. ConnectionClosedError: it went away. TimeoutError.
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
        self._requests[rid] = future
        future.add_done_callback(lambda _: self._requests.pop(rid, None))
        self.send(message)
        return future

    def _flush(self) -> None:
        messages, self._outbox = self._outbox, []
        transport = self._transport
        if transport is None or self.closed.done() or not messages:
            return
        try:
            transport.write(join_frame(messages))
        except FrameError:
            for message in messages:  # each alone may fit; one that does not is the sender's bug and ends the connection
                transport.write(join_frame([message]))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            self.abort(ConnectionClosedError(f"{self.peer_name or 'the peer'} stopped reading"))

    def close(self) -> None:
        """Send what is pending, then close."""
        if self._transport is not None and not self._transport.is_closing():
            self._flush()
            self._transport.close()

    def abort(self, reason: Exception) -> None:
        """Close at once; `on_close` gets `reason`."""
        self._reason = self._reason or reason
        if self._transport is not None:
            self._transport.abort()

    # ---------------------------------------------------------------------------------------------- receiving

    def _unexpected(self, message: Any) -> None:
        logger.warning("unexpected message peer=%s message=%s", self.peer_name, type(message).__name__)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._outbox:
            self._loop.call_soon(self._flush)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._reader.feed(data):
                for message in self._decoder.decode(body):
                    self._dispatch(message)
        except (FrameError, msgspec.DecodeError, msgspec.ValidationError) as exc:
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
    messages = handshake_decoder.decode(await exactly(size))
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
        self._strangers = asyncio.Semaphore(MAX_STRANGERS)
        self._tasks: set[asyncio.Task[None]] = set()
        self._acceptor = asyncio.get_running_loop().create_task(self._accept(), name=f"accept-{name}")

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._strangers.acquire()
            try:
                sock, _ = await loop.sock_accept(self._sock)
            except OSError as exc:  # out of file descriptors, or the peer went away in the queue
                self._strangers.release()
                logger.warning("accept failed: %s", exc)
                await asyncio.sleep(0.05)  # not a signal to wait for: the kernel has none for "descriptors are free again"
                continue
            task = loop.create_task(self._meet(sock), name="handshake")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _meet(self, sock: socket.socket) -> None:
        taken = False
        try:
            tune(sock)
            try:
                async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
                    hello = await _welcome(sock, self._token, self._name, self._admit)
            finally:
                self._strangers.release()
            if hello is not None:
                taken = True
                await self._route(sock, hello)
        except (OSError, TimeoutError, FrameError, msgspec.DecodeError, msgspec.ValidationError, ShoalError) as exc:
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


async def listen_local(
    path: str, token: bytes, messages: Any, accept: Callable[[Connection, Hello], None], *, name: str, handoff: bool = False
) -> Listener:
    """Serve a Unix socket: `accept(connection, hello)` is called for each authenticated connection and sets its handlers.

    With `handoff`, connections that an agent accepted for this process arrive here too (see `sockets.hand_over`).
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


async def open_plain(address: str, token: bytes, *, target: str, name: str, timeout_s: float) -> tuple[socket.socket, str]:
    """A connected, authenticated, non-blocking socket and the peer's name; errors as in `connect`."""
    loop = asyncio.get_running_loop()
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(timeout_s):
            if address.startswith("unix:"):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.setblocking(False)
                await loop.sock_connect(sock, address[5:])
            else:
                host, port = split_address(address)
                infos = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                sock = socket.socket(infos[0][0], socket.SOCK_STREAM)
                sock.setblocking(False)
                await loop.sock_connect(sock, infos[0][4])
            tune(sock)
            return sock, await shake_hands(sock, token, target, name)
    except (AuthenticationError, ShoalError, asyncio.CancelledError):
        if sock is not None:
            sock.close()
        raise
    except (OSError, TimeoutError, FrameError, msgspec.DecodeError, msgspec.ValidationError) as exc:
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
