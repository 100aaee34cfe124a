"""Addresses and plain sockets: what asyncio connections and the reactor share.

An address is "unix:/path", "host:port" or "[v6 address]:port".
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct

from shoal.exceptions import ShoalError
from shoal.rpc.auth import ClientHandshake, handshake_decoder
from shoal.rpc.frames import FrameError, FrameReader, decode_frame, encode_message, join_frame
from shoal.rpc.messages import MAX_HANDSHAKE_BYTES, Hello, Message

HANDOFF = "handoff"
"""Target of the short connection over which an agent passes an accepted socket to another process of its node."""

_LENGTH = struct.Struct("<I")
_FD = struct.Struct("@i")


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
    try:
        try:
            sock.bind(path)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
            os.unlink(path)
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
    """A connected TCP socket that blocks for up to `timeout_s` at a time.

    Raises:
        OSError: nobody answers there.
    """
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
    messages = decode_frame(handshake_decoder, _read_exactly(sock, size))
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


# ------------------------------------------------------------------------------------------- handing a socket on


def send_handed_over(carrier: socket.socket, sock: socket.socket, hello: Hello) -> None:
    """Send `sock` over an authenticated connection to its new owner. Raises OSError: that process is gone."""
    socket.send_fds(carrier, [join_frame([encode_message(hello)])], [sock.fileno()])


def receive_handed_over(carrier: socket.socket) -> tuple[socket.socket, Hello]:
    """The other end of `send_handed_over`; blocking with the timeout of `carrier`.

    Raises:
        FrameError, OSError: no socket came.
    """
    # Without the flag (which `socket.recv_fds` takes but does not use), programs that user code starts would hold the
    # connection open after this process has ended.
    room, flag = socket.CMSG_LEN(_FD.size), socket.MSG_CMSG_CLOEXEC
    data, extras, _, _ = carrier.recvmsg(MAX_HANDSHAKE_BYTES, room, flag)
    fds = [value for level, kind, value in extras if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)]
    if not fds or len(fds[0]) < _FD.size:
        raise FrameError("a handoff connection carried no socket")
    sock = socket.socket(fileno=_FD.unpack_from(fds[0])[0])
    try:
        for body in FrameReader(MAX_HANDSHAKE_BYTES).feed(data):
            for message in decode_frame(handshake_decoder, body):
                if isinstance(message, Hello):
                    return sock, message
        raise FrameError("a handoff connection carried no Hello")
    except BaseException:
        sock.close()
        raise
