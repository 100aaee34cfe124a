"""Addresses and plain sockets: what asyncio connections and the reactor share.

An address is "unix:/path", "host:port" or "[v6 address]:port".
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

from shoal.exceptions import ShoalError
from shoal.rpc.auth import Admit, ClientHandshake, ServerHandshake, handshake_decoder
from shoal.rpc.frames import FrameError, FrameReader, encode_message, join_frame
from shoal.rpc.messages import MAX_HANDSHAKE_BYTES, Hello, Message

HANDOFF = "handoff"
"""Target of the short connection over which an agent passes an accepted socket to another process of its node."""

_LENGTH = struct.Struct("<I")


def split_address(address: str) -> tuple[str, int]:
    """ "host:port" or "[v6]:port" -> (host, port).

    Raises:
        ShoalError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ShoalError(f"{address!r} is not an address; write HOST:PORT, for example 127.0.0.1:6380 or [::1]:6380")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tune(sock: socket.socket) -> None:
    """Non-blocking, no delay; buffers large enough that a batch goes out in one call."""
    sock.setblocking(False)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        with contextlib.suppress(OSError):  # a limit of the system may be lower; then its limit is used
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)


def listen_unix(path: str) -> socket.socket:
    """A listening socket at `path`, readable by this user only; replaces what a dead process left there."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(1024)
    except OSError as exc:
        sock.close()
        raise ShoalError(f"cannot listen at {path}: {exc}") from exc
    sock.setblocking(False)
    return sock


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket, IPv4 or IPv6 as `host` is; port 0 takes any free one.

    Raises:
        ShoalError: the port is taken or the address is not one of this machine.
    """
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as exc:
        raise ShoalError(f"cannot listen on {join_address(host, port)}: {exc.strerror or exc}") from exc
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(1024)
    except OSError as exc:
        sock.close()
        reason = exc.strerror or str(exc)
        raise ShoalError(f"cannot listen on {join_address(host, port)}: {reason}; give another --port, or 0") from exc
    sock.setblocking(False)
    return sock


def open_socket(address: str, timeout_s: float) -> socket.socket:
    """A connected blocking socket. Unix sockets connect at once; TCP takes up to `timeout_s`.

    Raises:
        OSError: nobody answers there.
    """
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(timeout_s)
        try:
            sock.connect(address[5:])
        except OSError:
            sock.close()
            raise
        return sock
    return socket.create_connection(split_address(address), timeout=timeout_s)


# ------------------------------------------------------------------------------------------- blocking handshakes


def _read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionResetError("the peer closed the connection during the handshake")
        data += part
    return data


def read_handshake_message(sock: socket.socket) -> Message:
    """Read one frame of one message and not a byte more, so that the socket can be handed on."""
    (size,) = _LENGTH.unpack(_read_exactly(sock, 4))
    if size > MAX_HANDSHAKE_BYTES:
        raise FrameError("the peer does not speak shoal's protocol")
    messages = handshake_decoder.decode(_read_exactly(sock, size))
    if len(messages) != 1:
        raise FrameError("a handshake frame holds one message")
    message: Message = messages[0]
    return message


def shake_hands(sock: socket.socket, token: bytes, target: str, name: str) -> str:
    """The client's side, blocking with the socket's timeout. Returns the peer's name.

    Raises:
        AuthenticationError, ShoalError: as `ClientHandshake.receive`. OSError: the connection broke.
    """
    handshake = ClientHandshake(token, target, name)
    sock.sendall(handshake.start())
    while not handshake.done:
        answer = handshake.receive(read_handshake_message(sock))
        if answer:
            sock.sendall(answer)
    return handshake.peer_name


def welcome(sock: socket.socket, token: bytes, name: str, admit: Admit) -> Hello | None:
    """The server's side, blocking with the socket's timeout. Returns the client's Hello, or None after refusing it."""
    handshake = ServerHandshake(token, name, admit)
    while not handshake.done and handshake.refused is None:
        sock.sendall(handshake.receive(read_handshake_message(sock)))
    return handshake.hello if handshake.done else None


# ------------------------------------------------------------------------------------------- handing a socket on


def hand_over(sock: socket.socket, path: str, token: bytes, hello: Hello, timeout_s: float = 5.0) -> None:
    """Pass the authenticated connection `sock` to the process that listens at Unix socket `path`; closes it here.

    Raises:
        OSError: that process is gone.
    """
    with sock, open_socket(f"unix:{path}", timeout_s) as carrier:
        shake_hands(carrier, token, HANDOFF, hello.name)
        socket.send_fds(carrier, [join_frame([encode_message(hello)])], [sock.fileno()])


def receive_handed_over(carrier: socket.socket) -> tuple[socket.socket, Hello]:
    """The other end of `hand_over`, after the carrier was authenticated; blocking with its timeout.

    Raises:
        FrameError, OSError: no socket came.
    """
    data, fds, _, _ = socket.recv_fds(carrier, MAX_HANDSHAKE_BYTES, 1)
    if not fds:
        raise FrameError("a handoff connection carried no socket")
    sock = socket.socket(fileno=fds[0])
    try:
        for body in FrameReader(MAX_HANDSHAKE_BYTES).feed(data):
            for message in handshake_decoder.decode(body):
                if isinstance(message, Hello):
                    return sock, message
        raise FrameError("a handoff connection carried no Hello")
    except BaseException:
        sock.close()
        raise
