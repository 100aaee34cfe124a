"""The mutual challenge that opens every connection: pure state machines, fed with messages.

    client                                   server
    Hello(nonce c, target)        ->
                                  <-         Challenge(nonce s, HMAC(token, "server" c s hello))
    Proof(HMAC(token, "client" c s hello)) ->
                                  <-         Welcome, or Refused(why)

The server proves itself first, so a client never answers to a stranger; both proofs bind both nonces and the whole
Hello (the target too). Until Welcome only these four messages are decoded, from frames of at most 4 KiB, and nothing
is ever unpickled here. Source: the three-pass mutual authentication of ISO/IEC 9798-4, with HMAC-SHA256.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable

import msgspec

from shoal.exceptions import AuthenticationError, ShoalError
from shoal.rpc.frames import encode_message, join_frame, make_decoder
from shoal.rpc.messages import PROTOCOL_VERSION, Challenge, Hello, Message, Proof, Refused, Welcome
from shoal.version import __version__

handshake_decoder = make_decoder(Hello | Challenge | Proof | Refused | Welcome)

Admit = Callable[[Hello], Refused | None]


_encode_facts = msgspec.msgpack.Encoder().encode


def _proof(token: bytes, role: bytes, hello: Hello, server_nonce: bytes) -> bytes:
    # Exactly these facts, each with its length, and not the Hello as it was sent: a neighbouring version may add a
    # field to it that this one does not see.
    facts = (role, server_nonce, hello.protocol, hello.version, hello.nonce, hello.target, hello.name)
    return hmac.digest(token, _encode_facts(facts), "sha256")


def _check_protocol(mine: int, theirs: int, their_version: str) -> str | None:
    """Versions may differ by one. Returns what is wrong, if anything."""
    if abs(mine - theirs) <= 1:
        return None
    return f"this side speaks protocol {mine} (shoal {__version__}), the other side {theirs} (shoal {their_version})"


class ClientHandshake:
    """`start()` gives the first bytes; `receive` takes each message and gives the bytes to answer with."""

    def __init__(self, token: bytes, target: str, name: str) -> None:
        self._token = token
        self._hello = Hello(PROTOCOL_VERSION, __version__, os.urandom(16), target, name)
        self.done = False
        self.proved = False  # our proof is on its way: what follows it is read once it was checked
        self.peer_name = ""

    def start(self) -> bytes:
        return join_frame([encode_message(self._hello)])

    def receive(self, message: Message) -> bytes:
        """Raises AuthenticationError (wrong token), ShoalError (refused for another reason)."""
        match message:
            case Challenge() if not self.proved:
                wrong = _check_protocol(PROTOCOL_VERSION, message.protocol, message.version)
                if wrong is not None:
                    raise ShoalError(f"cannot talk to this cluster: {wrong}")
                expected = _proof(self._token, b"server", self._hello, message.nonce)
                if not hmac.compare_digest(expected, message.proof):
                    raise AuthenticationError(
                        "the cluster's token is not the one given here; "
                        "set SHOAL_TOKEN or SHOAL_TOKEN_FILE to the token of the head node"
                    )
                self.proved = True
                return join_frame([encode_message(Proof(_proof(self._token, b"client", self._hello, message.nonce)))])
            case Welcome() if self.proved:  # else anybody could open a connection by just saying so
                self.done = True
                self.peer_name = message.name
                return b""
            case Refused():
                if message.kind == "token":
                    raise AuthenticationError(message.text)
                raise ShoalError(message.text)
            case _:
                raise ShoalError(f"the peer answered a handshake with {type(message).__name__}")


class ServerHandshake:
    """`receive` takes each message and gives the bytes to answer with; `done` or `refused` says how it ended."""

    def __init__(self, token: bytes, name: str, admit: Admit) -> None:
        self._token = token
        self._name = name
        self._admit = admit
        self._nonce = os.urandom(16)
        self.hello: Hello | None = None
        self.done = False
        self.refused: Refused | None = None

    def receive(self, message: Message) -> bytes:
        match message:
            case Hello() if self.hello is None:
                wrong = _check_protocol(PROTOCOL_VERSION, message.protocol, message.version)
                if wrong is not None:
                    return self._refuse("version", wrong)
                self.hello = message
                proof = _proof(self._token, b"server", message, self._nonce)
                return join_frame([encode_message(Challenge(PROTOCOL_VERSION, __version__, self._nonce, proof))])
            case Proof() if self.hello is not None:
                expected = _proof(self._token, b"client", self.hello, self._nonce)
                if not hmac.compare_digest(expected, message.proof):
                    return self._refuse("token", "the token is not this cluster's")
                refused = self._admit(self.hello)
                if refused is not None:
                    return self._refuse(refused.kind, refused.text)
                self.done = True
                return join_frame([encode_message(Welcome(self._name))])
            case _:
                return self._refuse("protocol", f"unexpected {type(message).__name__} in a handshake")

    def _refuse(self, kind: str, text: str) -> bytes:
        self.refused = Refused(kind, text)
        return join_frame([encode_message(self.refused)])
