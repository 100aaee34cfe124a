"""What one round of the state machine says, in order, and the clock of that round.

Handlers do not send: they put messages here, and whoever called the machine takes them out and sends them.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from shoal.control.messages import RelayReply
from shoal.control.processes import Origin
from shoal.rpc.messages import Failed, Message, Reply, Request

_encode = msgspec.msgpack.Encoder().encode


class Send(NamedTuple):
    peer: int
    message: Message


class Outbox:
    """`now`: the loop's clock in this round, in seconds; `to_unix` added to it is Unix time."""

    def __init__(self, now: float, to_unix: float) -> None:
        self.now = now
        self._to_unix = to_unix
        self._out: list[Send] = []

    def unix(self, at: float | None = None) -> float:
        """Unix time of the clock's `at`, or of this round."""
        return (self.now if at is None else at) + self._to_unix

    def take(self) -> list[Send]:
        out, self._out = self._out, []
        return out

    def send(self, peer: int, message: Message) -> None:
        self._out.append(Send(peer, message))

    def tell(self, origin: Origin, message: Message) -> None:
        """To a process through its agent, or to a tool directly."""
        if origin.worker_id:
            message = RelayReply(origin.worker_id, _encode(message))
        self._out.append(Send(origin.peer, message))

    def tell_all(self, origins: list[Origin], message: Message) -> None:
        """As `tell`, encoded once."""
        if origins:
            body = _encode(message)
            for peer, worker_id in origins:
                self._out.append(Send(peer, RelayReply(worker_id, body) if worker_id else message))

    def answer(self, origin: Origin, request: Request, reply: Reply) -> None:
        """`reply` was made for this request alone: it is given its `rid`. A request without one wants no answer."""
        if request.rid:
            msgspec.structs.force_setattr(reply, "rid", request.rid)
            self.tell(origin, reply)

    def refuse(self, origin: Origin, request: Request, kind: str, text: str) -> None:
        self.answer(origin, request, Failed(kind=kind, text=text))
