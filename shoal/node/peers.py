"""Connections from this agent to the agents of other nodes: one each, made when first needed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from shoal.exceptions import ShoalError
from shoal.node.messages import AgentHello, BetweenAgents
from shoal.rpc import aio
from shoal.rpc.frames import make_decoder
from shoal.rpc.messages import Message, Request

logger = logging.getLogger(__name__)

_decoder = make_decoder(BetweenAgents)


class Peers:
    """Speaks to other agents by node id. `address_of(node_id)` is None for a node that is not alive."""

    def __init__(self, node_id: bytes, address: str, token: bytes, address_of: Callable[[bytes], str | None]) -> None:
        self._node_id = node_id
        self._address = address
        self._token = token
        self._address_of = address_of
        self._connections: dict[bytes, asyncio.Task[aio.Connection]] = {}
        self._sends: set[asyncio.Task[None]] = set()

    async def _connection(self, node_id: bytes) -> aio.Connection:
        task = self._connections.get(node_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() or task.result().closed.done())):
            task = asyncio.get_running_loop().create_task(self._open(node_id), name="peer-connect")
            self._connections[node_id] = task
        return await asyncio.shield(task)

    async def _open(self, node_id: bytes) -> aio.Connection:
        address = self._address_of(node_id)
        if address is None:
            raise ShoalError(f"node {node_id.hex()[:12]} is not alive")
        connection = await aio.connect(
            address, self._token, _decoder, target="agent", name=f"agent-{self._node_id.hex()[:8]}"
        )
        connection.send(AgentHello(self._node_id, self._address))
        return connection

    def send(self, node_id: bytes, message: Message) -> None:
        """Send in order with what was sent before; dropped, with a log line, when the node cannot be reached (its death
        is told by control, and makes the message meaningless)."""
        task = self._connections.get(node_id)
        if task is not None and task.done() and not task.cancelled() and task.exception() is None:
            task.result().send(message)
            return
        later = asyncio.get_running_loop().create_task(self._send_later(node_id, message))
        self._sends.add(later)
        later.add_done_callback(self._sends.discard)

    async def _send_later(self, node_id: bytes, message: Message) -> None:
        try:
            (await self._connection(node_id)).send(message)
        except ShoalError as exc:
            logger.info("could not tell node=%s %s: %s", node_id.hex()[:12], type(message).__name__, exc)

    async def request(self, node_id: bytes, message: Request) -> Any:
        """Raises ShoalError when the node cannot be reached or goes away, RequestFailed when it says no."""
        return await (await self._connection(node_id)).request(message)

    def forget(self, node_id: bytes) -> None:
        """The node is gone."""
        task = self._connections.pop(node_id, None)
        if task is None:
            return
        if not task.done():
            task.cancel()
        elif not task.cancelled() and task.exception() is None:
            task.result().close()

    def close(self) -> None:
        for node_id in list(self._connections):
            self.forget(node_id)
        for task in self._sends:
            task.cancel()
