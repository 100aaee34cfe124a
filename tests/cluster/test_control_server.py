"""The real control process over real sockets."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shoal.control.messages import (
    FUNCTIONS,
    ActorSpec,
    ActorStarted,
    ControlMessage,
    CreateActor,
    GetStatus,
    JobInfo,
    JobRegistered,
    KeyReply,
    NodeInfo,
    NodeRegistered,
    NodeReport,
    NodesChanged,
    ProcessReply,
    PutKey,
    RegisterJob,
    RegisterNode,
    Relay,
    RelayReply,
    StartActor,
    StatusReply,
    StopNode,
)
from shoal.control.server import ControlSettings
from shoal.exceptions import AuthenticationError
from shoal.rpc.aio import Connection, RequestFailed, attach, connect, hand_over
from shoal.rpc.messages import PROTOCOL_VERSION, Hello, Message
from shoal.scheduling.resources import to_amounts

TOKEN = b"a token that both sides know"
CHILD = """
import os, sys
from shoal.control.server import ControlSettings, run_control
run_control({token!r}, sys.argv[1], ControlSettings(node_timeout_s=1.0), lambda: os.write(1, b"ready"))
"""


class Control:
    """A control process and the way to it."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "control.sock")
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD.format(token=TOKEN), self.path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stdout is not None
        assert self.process.stdout.read(5) == b"ready", self.process.communicate()[1].decode()

    def stop(self) -> str:
        """Returns what it wrote to stderr."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=10)
        return errors.decode()


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Control]:
    control = Control(tmp_path)
    yield control
    if control.process.poll() is None:
        control.process.kill()
        control.process.communicate()


class Peer:
    """A connection and what came over it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._messages: asyncio.Queue[Any] = asyncio.Queue()
        connection.on_message = self._messages.put_nowait

    async def wait_for(self, kind: type, check: Callable[[Any], bool] = lambda _: True) -> Any:
        while True:
            message = await self._messages.get()
            if isinstance(message, kind) and check(message):
                return message


async def join(control: Control, name: bytes, **fields: Any) -> Peer:
    connection = await connect(f"unix:{control.path}", TOKEN, ControlMessage, target="control", name="agent")
    peer = Peer(connection)
    total = to_amounts({"CPU": 2})
    settings = ControlSettings()
    info = NodeInfo(name, f"127.0.0.1:{len(name)}", "here", total, dict(total))
    hello = {"version": settings.version, "python": settings.python} | fields
    reply = await connection.request(RegisterNode(node=info, **hello), timeout_s=5)
    assert isinstance(reply, NodeRegistered)
    return peer


async def as_tool(control: Control) -> Connection:
    return await connect(f"unix:{control.path}", TOKEN, ProcessReply, target="control", name="tool")


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await main()

    asyncio.run(bounded())


def test_from_the_first_node_to_the_last_word(control: Control) -> None:
    async def main() -> None:
        first = await join(control, b"n1")
        registered = await first.connection.request(RegisterJob(job=JobInfo(b"", "", b"driver", b"")), timeout_s=5)
        assert isinstance(registered, JobRegistered)
        job_id = registered.job.job_id

        def relay(message: Message) -> None:
            first.connection.send(Relay(b"driver", job_id, msgspec.msgpack.encode(message)))

        async def answer(rid: int) -> Any:
            while True:
                reply = await first.wait_for(RelayReply)
                body = msgspec.msgpack.decode(reply.body, type=ProcessReply)
                if getattr(body, "rid", 0) == rid:
                    return body

        spec = ActorSpec(
            job_id + b"a" * 12, job_id, b"driver", b"n1", "Counter", b"class", b"", {}, to_amounts({"CPU": 1})
        )
        relay(PutKey(rid=1, space=FUNCTIONS, key=b"class", value=b"pickled"))
        relay(CreateActor(rid=2, spec=spec))
        start = await first.wait_for(StartActor)  # sent before the answer: the agent need not wait for it
        assert (await answer(2)).actor.state == "pending"
        assert (start.incarnation, start.class_blob) == (1, b"pickled")
        first.connection.send(ActorStarted(spec.actor_id, 1, b"worker", "/run/w", os.getpid()))

        second = await join(control, b"n2")
        await first.wait_for(NodesChanged, lambda m: [n.node_id for n in m.nodes] == [b"n2"])
        tool = await as_tool(control)
        status = await tool.request(GetStatus(), timeout_s=5)
        assert isinstance(status, StatusReply)
        assert (status.actors, [node.node_id for node in status.nodes]) == ({"alive": 1}, [b"n1", b"n2"])

        second.connection.close()
        change = await first.wait_for(NodesChanged)
        assert [(n.node_id, n.alive, n.death_reason) for n in change.nodes] == [(b"n2", False, "its connection closed")]

        errors = await asyncio.get_running_loop().run_in_executor(None, control.stop)
        assert (await first.wait_for(StopNode)).reason == "the head node is stopping"
        await asyncio.shield(first.connection.closed)
        assert (control.process.returncode, errors.splitlines()) == (
            0, ["node died node=6e32 address=127.0.0.1:2 reason=its connection closed"],
        )  # fmt: skip

    run(main)
    assert not os.path.exists(control.path)


def test_answers_keep_their_order(control: Control) -> None:
    async def main() -> None:
        agent = await join(control, b"n1")
        registered = await agent.connection.request(RegisterJob(job=JobInfo(b"", "", b"driver", b"")), timeout_s=5)
        for rid in range(1, 101):
            put = PutKey(rid=rid, space="s", key=b"k", value=b"v", overwrite=False)
            agent.connection.send(Relay(b"driver", registered.job.job_id, msgspec.msgpack.encode(put)))
        replies = [await agent.wait_for(RelayReply) for _ in range(100)]
        bodies = [msgspec.msgpack.decode(reply.body, type=KeyReply) for reply in replies]
        assert [body.rid for body in bodies] == list(range(1, 101))
        assert [body.found for body in bodies] == [False] + [True] * 99
        agent.connection.close()

    run(main)


def test_a_node_that_falls_silent_is_given_up(control: Control) -> None:
    async def main() -> None:
        silent, talking = await join(control, b"n1"), await join(control, b"n2")

        async def talk() -> None:
            while True:
                talking.connection.send(NodeReport(to_amounts({"CPU": 2}), 0, []))
                await asyncio.sleep(0.2)

        talker = asyncio.create_task(talk())
        change = await talking.wait_for(NodesChanged, lambda m: not m.nodes[0].alive)
        assert change.nodes[0].node_id == b"n1"
        stop = await silent.wait_for(StopNode)
        assert "nothing was heard from it for 1 s" in stop.reason
        talker.cancel()
        silent.connection.close()
        talking.connection.close()

    run(main)


def test_a_connection_that_an_agent_accepted_is_handed_over(control: Control) -> None:
    async def main() -> None:
        ours, theirs = socket.socketpair()
        hello = Hello(PROTOCOL_VERSION, "", b"", target="control", name="from afar")
        await hand_over(theirs, control.path, TOKEN, hello)
        ours.setblocking(False)
        connection = Connection(ProcessReply, "control")
        await attach(connection, ours)
        assert isinstance(await connection.request(GetStatus(), timeout_s=5), StatusReply)
        connection.close()

    run(main)


def test_mistakes_of_others_leave_the_process_up(control: Control) -> None:
    async def main() -> None:
        with pytest.raises(AuthenticationError):
            await connect(f"unix:{control.path}", b"wrong", ProcessReply, target="control", name="stranger")
        with pytest.raises(RequestFailed, match=r"runs Python 3\.1 and the head runs Python"):
            await join(control, b"n1", python="3.1")
        control.process.send_signal(signal.SIGINT)
        tool = await as_tool(control)
        from_afar = await as_tool(control)
        from_afar.send(RelayReply(b"", b""))  # nothing that control knows
        await asyncio.shield(from_afar.closed)
        with pytest.raises(RequestFailed) as failed:
            await tool.request(CreateActor(), timeout_s=5)
        assert failed.value.kind == "not_found"
        assert isinstance(await tool.request(GetStatus(), timeout_s=5), StatusReply)
        tool.close()

    run(main)


def test_a_thousand_status_requests_and_no_descriptor_is_left(control: Control) -> None:
    async def main() -> None:
        first = await as_tool(control)
        await first.request(GetStatus(), timeout_s=5)
        before = len(os.listdir(f"/proc/{control.process.pid}/fd"))
        for _ in range(20):
            tool = await as_tool(control)
            replies = await asyncio.gather(*(tool.request(GetStatus(), timeout_s=5) for _ in range(50)))
            assert all(isinstance(reply, StatusReply) for reply in replies)
            tool.close()
            await asyncio.shield(tool.closed)
        last = await as_tool(control)
        await last.request(GetStatus(), timeout_s=5)
        assert len(os.listdir(f"/proc/{control.process.pid}/fd")) <= before + 2
        first.close()
        last.close()

    run(main)
