"""Connections from this agent to the agents of other nodes: one each, made when first needed, and again when it breaks.

What is said to one node arrives there in the order in which it was said, whether the connection was open by then or
not: until it is, messages wait in a line. A node that cannot be reached is tried again for as long as nobody says that
it is gone, but for `PATIENCE_S` at most; whoever asked something learns then why there is no answer. When a connection
breaks and the node lives, some of what was said may be lost: `on_lost` is called for the room to say again what must be
known.

Control tells of nodes that come and go, and others may be faster: a node that is not known yet is no dead one. The dead
ones are remembered, since words of theirs may still arrive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from shoal.exceptions import ShoalError
from shoal.node.messages import AgentHello, BetweenAgents
from shoal.rpc import aio
from shoal.rpc.frames import make_decoder
from shoal.rpc.messages import Message, Reply, Request

logger = logging.getLogger(__name__)

PATIENCE_S: Final = 30.0
STRANGER_PATIENCE_S: Final = 5.0
"""How long to wait for control to say where a node is."""
MAX_REMEMBERED: Final = 10_000
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0

_decoder = make_decoder(BetweenAgents)

_Waiting = tuple[Message, asyncio.Future[Reply] | None]


class _Peer:
    """The way to one node: a line of messages until it is open, then a connection."""

    def __init__(self) -> None:
        self.line: list[_Waiting] = []
        self.connection: aio.Connection | None = None
        self.opening: asyncio.Task[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.connection is not None and self.connection.closed.done()

    def fail(self, reason: ShoalError) -> None:
        """Everything in line is not sent."""
        line, self.line = self.line, []
        for _, answer in line:
            if answer is not None and not answer.done():
                answer.set_exception(reason)
                answer.exception()  # retrieved: who does not wait any more is no cause for a warning


class Peers:
    """Speaks to other agents by node id. `address_of(node_id)` is None for a node that is not known to be alive."""

    def __init__(self, node_id: bytes, address: str, token: bytes, address_of: Callable[[bytes], str | None]) -> None:
        self._node_id = node_id
        self._address = address
        self._token = token
        self._address_of = address_of
        self._peers: dict[bytes, _Peer] = {}
        self._gone: dict[bytes, None] = {}
        self._loop = asyncio.get_running_loop()
        self.on_lost: Callable[[bytes], None] = lambda _: None

    def is_gone(self, node_id: bytes) -> bool:
        """Whether the node has ended. (One that this node has not heard of yet has not.)"""
        return node_id in self._gone

    def send(self, node_id: bytes, message: Message) -> None:
        """Send in order with what was said before; dropped, with a log line, when the node cannot be reached (its death
        is told by control, and makes the message meaningless)."""
        peer = self._peer(node_id)
        if peer.connection is not None:
            peer.connection.send(message)
        else:
            peer.line.append((message, None))

    def start_request(self, node_id: bytes, message: Request) -> asyncio.Future[Reply]:
        """Ask, in order with what was said before. The future fails with ShoalError when the node cannot be reached or
        goes away, with RequestFailed when it says no."""
        peer = self._peer(node_id)
        if peer.connection is not None:
            return peer.connection.start_request(message)
        answer: asyncio.Future[Reply] = self._loop.create_future()
        peer.line.append((message, answer))
        return answer

    async def request(self, node_id: bytes, message: Request) -> Any:
        """As `start_request`, waited for."""
        return await self.start_request(node_id, message)

    def forget(self, node_id: bytes) -> None:
        """The node is gone: whoever waits for it learns so now."""
        self._gone[node_id] = None
        if len(self._gone) > MAX_REMEMBERED:
            del self._gone[next(iter(self._gone))]
        peer = self._peers.pop(node_id, None)
        if peer is None:
            return
        gone = ShoalError(f"node {node_id.hex()[:12]} is gone")
        if peer.opening is not None:
            peer.opening.cancel()
        peer.fail(gone)
        if peer.connection is not None:
            peer.connection.abort(gone)  # not close(): nobody may be there to take what is pending

    def close(self) -> None:
        """The node ends. What was said before still leaves."""
        peers, self._peers = self._peers, {}
        for peer in peers.values():
            if peer.opening is not None:
                peer.opening.cancel()
            peer.fail(ShoalError("this node ends"))
            if peer.connection is not None:
                peer.connection.close()

    # -------------------------------------------------------------------------------------------- internals

    def _peer(self, node_id: bytes) -> _Peer:
        peer = self._peers.get(node_id)
        if peer is None or peer.is_over:
            peer = self._peers[node_id] = _Peer()
            peer.opening = self._loop.create_task(self._open(node_id, peer), name="peer-connect")
        return peer

    async def _open(self, node_id: bytes, peer: _Peer) -> None:
        try:
            connection = await self._connect(node_id)
        except (ShoalError, OSError) as exc:
            if peer.line:
                logger.warning("%s messages did not reach node=%s: %s", len(peer.line), node_id.hex()[:12], exc)
            if self._peers.get(node_id) is peer:
                del self._peers[node_id]
            peer.fail(exc if isinstance(exc, ShoalError) else ShoalError(str(exc)))
            return
        finally:
            peer.opening = None
        connection.on_close = lambda reason: self._lost(node_id, peer, reason)
        connection.send(AgentHello(self._node_id, self._address))
        line, peer.line = peer.line, []
        for message, answer in line:
            if answer is None:
                connection.send(message)
            elif not answer.done():
                assert isinstance(message, Request)
                _pass_on(connection.start_request(message), answer)
        peer.connection = connection

    def _lost(self, node_id: bytes, peer: _Peer, reason: Exception | None) -> None:
        if self._peers.get(node_id) is peer:  # else it was forgotten, or this node ends
            del self._peers[node_id]
            logger.info("lost the connection to node=%s: %s", node_id.hex()[:12], reason)
            self.on_lost(node_id)

    async def _connect(self, node_id: bytes) -> aio.Connection:
        begin = self._loop.time()
        pause_s = FIRST_PAUSE_S
        while True:
            if node_id in self._gone:
                raise ShoalError(f"node {node_id.hex()[:12]} is gone")
            address = self._address_of(node_id)
            if address is None:
                if self._loop.time() - begin > STRANGER_PATIENCE_S:
                    raise ShoalError(f"node {node_id.hex()[:12]} is not part of the cluster")
            else:
                try:
                    return await aio.connect(
                        address, self._token, _decoder, target="agent", name=f"agent-{self._node_id.hex()[:8]}"
                    )
                except (ShoalError, OSError) as exc:
                    if self._loop.time() - begin > PATIENCE_S:
                        raise
                    logger.info("cannot reach node=%s yet: %s", node_id.hex()[:12], exc)
            await asyncio.sleep(pause_s)  # nobody tells when a node answers again
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _pass_on(source: asyncio.Future[Reply], target: asyncio.Future[Reply]) -> None:
    """Whatever becomes of `source` becomes of `target`; who gives up on `target` gives up on both."""

    def answered(done: asyncio.Future[Reply]) -> None:
        if target.done():
            if not done.cancelled():
                done.exception()
        elif done.cancelled():
            target.cancel()
        elif (error := done.exception()) is not None:
            target.set_exception(error)
        else:
            target.set_result(done.result())

    source.add_done_callback(answered)
    target.add_done_callback(lambda _: source.cancel() if not source.done() else None)
