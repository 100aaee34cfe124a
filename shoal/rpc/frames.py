"""Bytes <-> frames. A frame is a 4-byte little-endian length and a msgpack array of messages.

Messages are encoded one by one when they are sent and joined when the connection is written, so that everything that is
pending travels in one frame and one system call, and no message is encoded twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from shoal.rpc.messages import MAX_FRAME_BYTES

_LENGTH = struct.Struct("<I")
_ARRAY = struct.Struct(">BI")  # msgpack "array 32": the count follows big-endian
_ARRAY_TAG = 0xDD
_OVERHEAD = _ARRAY.size

MAX_MESSAGE_BYTES = MAX_FRAME_BYTES - _OVERHEAD
"""A message that fills a frame of its own. Who sends a longer one is told at once, before it reaches a connection."""

encode_message = msgspec.msgpack.Encoder().encode


class FrameError(Exception):
    """The peer sent something that is not a frame of ours (the connection must be closed), or a message is too long."""


def check_size(message: bytes) -> None:
    """Raises FrameError when an encoded message fits no frame."""
    if len(message) > MAX_MESSAGE_BYTES:
        raise FrameError(f"a message of {len(message)} bytes is larger than the limit of {MAX_MESSAGE_BYTES}")


def join_frame(messages: Sequence[bytes]) -> bytes:
    """One frame of messages that `encode_message` made.

    Raises:
        FrameError: the frame would be longer than `MAX_FRAME_BYTES`.
    """
    size = sum(map(len, messages)) + _OVERHEAD
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {size} bytes is larger than the limit of {MAX_FRAME_BYTES}")
    return b"".join((_LENGTH.pack(size), _ARRAY.pack(_ARRAY_TAG, len(messages)), *messages))


def make_decoder(messages: Any) -> msgspec.msgpack.Decoder[list[Any]]:
    """A decoder of frame bodies that holds any of `messages` (a union of message types, or such a decoder)."""
    if isinstance(messages, msgspec.msgpack.Decoder):
        return messages
    return msgspec.msgpack.Decoder(list[messages])


def decode_frame(decoder: msgspec.msgpack.Decoder[list[Any]], body: memoryview | bytes | bytearray) -> list[Any]:
    """The messages in one frame's body.

    Raises:
        FrameError: it does not hold messages that `decoder` knows.
    """
    try:
        return decoder.decode(body)
    except (ValueError, RecursionError) as exc:  # msgspec's own are ValueErrors, and so is text that is not UTF-8
        raise FrameError(f"not a message that is expected here: {exc}") from exc


class FrameReader:
    """Cuts a stream of bytes into frame bodies; `feed` never copies a frame that arrived whole."""

    __slots__ = ("_limit", "_rest")

    def __init__(self, limit_bytes: int = MAX_FRAME_BYTES) -> None:
        self._rest = bytearray()
        self._limit = limit_bytes

    def feed(self, data: bytes | memoryview) -> Iterable[memoryview]:
        """The bodies that are complete now.

        Raises:
            FrameError: the next frame claims to be longer than the limit.
        """
        if self._rest:
            self._rest += data
            if len(self._rest) < 4 or len(self._rest) < 4 + _LENGTH.unpack_from(self._rest)[0]:
                self._check(self._rest)
                return ()
            data = bytes(self._rest)
            self._rest = bytearray()
        view = memoryview(data)
        bodies = []
        start, end = 0, len(view)
        while end - start >= 4:
            size = _LENGTH.unpack_from(view, start)[0]
            if size > self._limit:
                raise FrameError(f"the peer announced a frame of {size} bytes; the limit here is {self._limit}")
            if end - start - 4 < size:
                break
            bodies.append(view[start + 4 : start + 4 + size])
            start += 4 + size
        if start < end:
            self._rest += view[start:]
        return bodies

    def _check(self, data: bytearray) -> None:
        if len(data) >= 4 and _LENGTH.unpack_from(data)[0] > self._limit:
            raise FrameError("the peer announced a frame that is longer than the limit")
