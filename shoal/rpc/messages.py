"""What every message has in common, and the messages that open a connection.

A message is a frozen, array-like, integer-tagged `msgspec.Struct`: small on the wire, validated when decoded,
and tolerant of a neighbour that knows more or fewer trailing fields. A frame is a 4-byte little-endian length
followed by a msgpack array of messages; whatever is pending on a connection travels in one frame.
Tags are unique within the set of messages that may travel together; a tag is never used twice.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 1 << 30
MAX_HANDSHAKE_BYTES = 4096


class Message(msgspec.Struct, array_like=True, frozen=True, tag=True):
    """Base of all messages; every concrete message gives its own integer `tag`."""


class Request(Message, frozen=True):
    """A message that is answered by exactly one `Reply` with the same `rid`.

    `rid` is set by the connection that sends it (`connection.request(...)`); leave it at 0 when building.
    A request whose `rid` is 0 on arrival wants no answer.
    """

    rid: int = 0


class Reply(Message, frozen=True):
    rid: int = 0


class Done(Reply, frozen=True, tag=1):
    """The request was carried out and there is nothing more to say."""


class Failed(Reply, frozen=True, tag=2):
    """The request could not be carried out. `kind` is machine-readable, `text` is one clear line for a person."""

    kind: str = "internal"
    text: str = ""


class Hello(Message, frozen=True, tag=3):
    """First words of whoever connects. `target`: "agent", "control", "transfer" or "worker:<hex id>"."""

    protocol: int
    version: str
    nonce: bytes
    target: str
    name: str = ""


class Challenge(Message, frozen=True, tag=4):
    """The server's answer: it proves that it knows the token before the client does."""

    protocol: int
    version: str
    nonce: bytes
    proof: bytes


class Proof(Message, frozen=True, tag=5):
    proof: bytes


class Welcome(Message, frozen=True, tag=6):
    """The connection is open. `name` says who answers (for logs)."""

    name: str = ""


class Refused(Message, frozen=True, tag=7):
    """The connection is not wanted: wrong protocol, wrong token, no such target. The line is for a person."""

    kind: str
    text: str
