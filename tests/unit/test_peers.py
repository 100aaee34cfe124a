"""What one agent says to another arrives in the order in which it was said, or its failure is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shoal.exceptions import ShoalError
from shoal.node import peers as peers_module
from shoal.node.messages import AgentHello, AskState, BetweenAgents, CopyGone, HolderChanged, StateReply
from shoal.node.peers import Peers
from shoal.rpc import aio
from shoal.rpc.messages import Done
from shoal.rpc.sockets import listen_tcp

TOKEN = b"a token of more than sixteen characters"
HERE, THERE = b"h" * 28, b"t" * 28


class OtherAgent:
    """An agent that writes down what it hears, answers `HolderChanged`, and never answers `AskState`."""

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.connections: list[aio.Connection] = []
        self.listener: aio.Listener | None = None
        self.address = ""

    def open(self, port: int = 0) -> None:
        sock = listen_tcp("127.0.0.1", port)
        self.address = f"127.0.0.1:{sock.getsockname()[1]}"
        self.listener = aio.Listener(sock, TOKEN, "other", lambda _: None, self._route)

    async def _route(self, sock: Any, hello: Any) -> None:
        connection = aio.Connection(BetweenAgents, hello.name)
        connection.on_message = lambda message: self._hear(connection, message)
        self.connections.append(connection)
        await aio.attach(connection, sock)

    def _hear(self, connection: aio.Connection, message: Any) -> None:
        self.heard.append(message)
        if isinstance(message, HolderChanged):
            connection.reply(message, Done())

    def names(self) -> list[bytes]:
        return [message.object_id for message in self.heard if not isinstance(message, AgentHello)]

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()
        for connection in self.connections:
            connection.close()


@asynccontextmanager
async def two() -> AsyncIterator[tuple[Peers, OtherAgent, dict[bytes, str]]]:
    other = OtherAgent()
    addresses: dict[bytes, str] = {}
    peers = Peers(HERE, "127.0.0.1:1", TOKEN, addresses.get)
    try:
        yield peers, other, addresses
    finally:
        peers.close()
        other.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is looked at belongs to the other side of a socket
            await asyncio.sleep(0.005)


def name(number: int) -> bytes:
    return b"%04d" % number


def test_order_holds_from_before_the_connection_is_open() -> None:
    async def main() -> None:
        async with two() as (peers, other, addresses):
            other.open()
            addresses[THERE] = other.address
            answers = []
            for number in range(300):
                if number % 3:
                    peers.send(THERE, CopyGone(name(number)))
                else:
                    answers.append(peers.start_request(THERE, HolderChanged(object_id=name(number))))
                if number % 50 == 0:
                    await asyncio.sleep(0.001)
            assert all(isinstance(answer, Done) for answer in await asyncio.gather(*answers))
            await until(lambda: len(other.names()) == 300)
            assert other.names() == [name(number) for number in range(300)]
            assert other.heard[0] == AgentHello(HERE, "127.0.0.1:1")
            assert len(other.connections) == 1

    asyncio.run(main())


def test_a_node_that_is_not_known_or_not_up_yet_gets_what_was_said() -> None:
    async def main() -> None:
        async with two() as (peers, other, addresses):
            other.open()
            port = int(other.address.split(":")[1])
            other.close()
            peers.send(THERE, CopyGone(name(1)))
            answer = peers.start_request(THERE, HolderChanged(object_id=name(2)))
            await asyncio.sleep(0.02)
            addresses[THERE] = other.address
            await asyncio.sleep(0.02)
            other.open(port)
            assert isinstance(await answer, Done)
            assert other.names() == [name(1), name(2)]

    asyncio.run(main())


def test_who_waits_for_a_node_that_is_gone_learns_it() -> None:
    async def main() -> None:
        async with two() as (peers, other, addresses):
            other.open()
            addresses[THERE] = other.address
            connected = peers.start_request(THERE, AskState(object_id=name(1)))
            await until(lambda: other.names() == [name(1)])
            assert not peers.is_gone(THERE)
            peers.forget(THERE)
            assert peers.is_gone(THERE)
            for ask in (connected, peers.start_request(THERE, AskState(object_id=name(2)))):
                with pytest.raises(ShoalError):
                    async with asyncio.timeout(5):
                        await ask
            peers.send(THERE, CopyGone(name(3)))
            await asyncio.sleep(0.05)
            assert other.names() == [name(1)]

    asyncio.run(main())


def test_forgetting_ends_what_waits_in_line() -> None:
    async def main() -> None:
        async with two() as (peers, _, addresses):
            addresses[THERE] = "127.0.0.1:1"  # nobody listens there
            ask = peers.start_request(THERE, AskState(object_id=name(1)))
            await asyncio.sleep(0.1)
            assert not ask.done()
            peers.forget(THERE)
            with pytest.raises(ShoalError, match="gone"):
                await ask

    asyncio.run(main())


def test_a_node_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(peers_module, "STRANGER_PATIENCE_S", 0.2)

    async def main() -> None:
        async with two() as (peers, _, addresses):
            for address in (None, "127.0.0.1:1"):
                if address is not None:
                    addresses[THERE] = address
                with pytest.raises(ShoalError):
                    async with asyncio.timeout(5):
                        await peers.request(THERE, AskState(object_id=name(1)))

    asyncio.run(main())


def test_a_broken_connection_is_told_and_the_next_word_makes_a_new_one() -> None:
    async def main() -> None:
        async with two() as (peers, other, addresses):
            other.open()
            addresses[THERE] = other.address
            lost: list[bytes] = []
            peers.on_lost = lost.append
            await peers.request(THERE, HolderChanged(object_id=name(1)))
            asked = peers.start_request(THERE, AskState(object_id=name(2)))
            await until(lambda: len(other.names()) == 2)
            other.connections[0].abort(ShoalError("cut"))
            with pytest.raises(aio.ConnectionClosedError):
                await asked
            await until(lambda: lost == [THERE])
            await peers.request(THERE, HolderChanged(object_id=name(3)))
            assert other.names()[-1] == name(3)
            assert len(other.connections) == 2

    asyncio.run(main())


def test_who_gives_up_before_the_connection_is_open_costs_no_message() -> None:
    async def main() -> None:
        async with two() as (peers, other, addresses):
            other.open()
            ask = peers.start_request(THERE, AskState(object_id=name(1)))
            ask.cancel()
            addresses[THERE] = other.address
            await peers.request(THERE, HolderChanged(object_id=name(2)))
            assert other.names() == [name(2)]

    asyncio.run(main())


def test_replies_are_taken_by_number() -> None:
    """`StateReply` is a reply like any other; the other agent answers in its own time."""

    async def main() -> None:
        async with two() as (peers, other, addresses):
            other.open()
            addresses[THERE] = other.address
            ask = peers.start_request(THERE, AskState(object_id=name(1)))
            await until(lambda: len(other.names()) == 1)
            other.connections[0].reply(other.heard[-1], StateReply())
            assert isinstance(await ask, StateReply)

    asyncio.run(main())
