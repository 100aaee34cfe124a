"""A real node and strangers: who does not know the token gets no answer, changes nothing, and disturbs nobody."""

from __future__ import annotations

import ast
import asyncio
import os
import pickle
import resource
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import cloudpickle
import pytest

import shoal
from shoal import session
from shoal.api.initialize import ClusterContext
from shoal.control.messages import AgentMessage, GetStatus, ProcessMessage, ProcessReply, StatusReply
from shoal.exceptions import AuthenticationError, ShoalError
from shoal.node.messages import FromProcess, ToProcess
from shoal.rpc import aio
from shoal.rpc.auth import handshake_decoder
from shoal.rpc.frames import encode_message, join_frame
from shoal.rpc.messages import PROTOCOL_VERSION, Challenge, Hello, Message, Proof
from shoal.rpc.sockets import split_address
from shoal.runtime.messages import Introduce, Run

LIMIT_S = 20.0


@shoal.remote
def one() -> int:
    return 1


class Target:
    """A running node, and every door that it has."""

    def __init__(self, context: ClusterContext) -> None:
        self.address: str = context["address"]
        self.folder = session.NodeFolder(context["session_dir"])
        self.token = self.folder.read_token().encode()

    def doors(self) -> list[str]:
        """The TCP port, and the Unix sockets of agent, control and the workers."""
        return [self.address, *(f"unix:{path}" for path in sorted(self.folder.sockets.iterdir()))]

    def connect(self, door: str) -> socket.socket:
        if door.startswith("unix:"):
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(LIMIT_S)
            sock.connect(door[5:])
            return sock
        return socket.create_connection(split_address(door), timeout=LIMIT_S)


@pytest.fixture(scope="module")
def target(local: ClusterContext) -> Target:
    made = Target(local)
    shoal.get([one.remote() for _ in range(4)])
    return made


@pytest.fixture(autouse=True)
def undisturbed(target: Target) -> Iterator[None]:
    """Around each test: the same processes run, and they work."""

    def census() -> set[str]:
        found = set()
        for entry in os.scandir("/proc"):
            try:
                name = Path(entry.path, "comm").read_text().strip() if entry.name.isdigit() else ""
                if name in ("shoal::agent", "shoal::control", "shoal::zygote", "shoal::node"):
                    environ = Path(entry.path, "environ").read_bytes().split(b"\0")
                    if f"SHOAL_TMPDIR={target.folder.path.parent}".encode() in environ:
                        found.add(f"{entry.name} {name}")
            except OSError:
                continue
        return found

    before = census()
    assert len(before) == 4
    yield
    assert census() == before
    assert shoal.get([one.remote() for _ in range(20)], timeout=LIMIT_S) == [1] * 20
    for name in ("agent", "control"):
        log = Path(target.folder.logs, f"{name}.log").read_text()
        assert "Traceback" not in log, log
        assert "never retrieved" not in log, log


def heard_from(sock: socket.socket) -> bytes:
    """All that the other side says before it ends the connection."""
    data = b""
    try:
        while part := sock.recv(4096):
            data += part
    except ConnectionResetError:
        pass
    return data


class Bomb:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


STRANGE: dict[str, bytes] = {
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303") + b"\0" * 200,
    "ssh": b"SSH-2.0-OpenSSH_9.2\r\n",
    "zeros": b"\0" * 4096,
    "ones": b"\xff" * 4096,
    "huge length": struct.pack("<I", 0xFFFFFFFF) + b"x" * 1000,
    "one byte too long": struct.pack("<I", 4097) + b"x" * 4097,
    "four billion messages": struct.pack("<I", 5) + b"\xdd\xff\xff\xff\xff",
    "deeper than the stack": join_frame([b"\x9a\x03" + b"\x91" * 3500]),
    "not utf-8": join_frame([b"\x96\x03\x01\xa2\xff\xfe\xc4\x01n\xa1a\xa0"]),
    "no hello": join_frame([encode_message(Proof(b"x" * 32))]),
    "work without a hello": join_frame([encode_message(GetStatus(1))]),
    "empty": join_frame([]),
}


@pytest.mark.parametrize("said", STRANGE.values(), ids=STRANGE.keys())
def test_strangers_get_no_answer_at_any_door(target: Target, said: bytes) -> None:
    for door in target.doors():
        with target.connect(door) as sock:
            try:
                sock.sendall(said)
            except (BrokenPipeError, ConnectionResetError):
                continue
            answer = heard_from(sock)
        if said == STRANGE["no hello"]:  # a message of the handshake, at the wrong time: it is told so, and no more
            assert b"unexpected Proof" in answer
            answer = b""
        assert answer == b"", door


def test_random_garbage_at_every_door(target: Target) -> None:
    for door in target.doors():
        for size in (1, 3, 4, 5, 100, 5000, 200_000):
            with target.connect(door) as sock:
                try:
                    sock.sendall(os.urandom(size))
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    continue  # cut off before all of it was sent
                assert heard_from(sock) == b""


def test_a_hello_gets_a_challenge_and_nothing_else_without_the_proof(target: Target) -> None:
    """Also when everything that an honest client sends behind its proof comes along."""
    hello = Hello(PROTOCOL_VERSION, "0.1.0", b"n" * 16, "control", "mallory")
    for door in target.doors():
        with target.connect(door) as sock:
            sock.sendall(join_frame([encode_message(hello)]))
            sock.sendall(join_frame([encode_message(Proof(b"\0" * 32))]) + join_frame([encode_message(GetStatus(1))]))
            answer = heard_from(sock)
        size = int.from_bytes(answer[:4], "little")
        [challenge] = handshake_decoder.decode(answer[4 : 4 + size])
        [refusal] = handshake_decoder.decode(answer[8 + size :])
        assert isinstance(challenge, Challenge)
        assert "token" in refusal.text
        assert target.token not in answer


def test_a_wrong_token_opens_no_door(target: Target) -> None:
    async def try_all() -> None:
        for door in target.doors():
            for token in (b"", b"guess", target.token[:-1], target.token + b"x"):
                with pytest.raises(AuthenticationError):
                    await aio.connect(door, token, ProcessReply, target="control", name="mallory")

    asyncio.run(try_all())


def test_a_pickle_of_a_stranger_is_never_opened(target: Target, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb"
    payloads = [pickle.dumps(Bomb(bomb)), cloudpickle.dumps(Bomb(bomb), protocol=5)]
    assert payloads[0]
    run = encode_message(Run(0, 1, b"\0" * 8 + payloads[0]))
    introduce = encode_message(Introduce(b"w" * 28, b"j" * 4, b"n" * 28))
    hello = encode_message(Hello(PROTOCOL_VERSION, "0.1.0", b"n" * 16, "worker", "mallory"))
    for door in target.doors():
        for said in (
            *payloads,
            *(struct.pack("<I", len(payload)) + payload for payload in payloads),
            join_frame([introduce, run]),
            join_frame([hello]) + join_frame([introduce, run]),
        ):
            with target.connect(door) as sock:
                try:
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    continue
                heard_from(sock)
    assert shoal.get([one.remote() for _ in range(8)]) == [1] * 8
    assert not bomb.exists()
    pickle.loads(payloads[0])
    assert bomb.exists(), "the bomb is real"


def test_the_authentic_cannot_name_what_is_not_theirs(target: Target) -> None:
    """With the token, but with messages of another room or none at all: the connection ends, the node goes on."""

    async def try_all() -> None:
        loop = asyncio.get_running_loop()
        for wanted, messages in (("agent", ToProcess), ("control", ProcessReply)):
            for said in (b"\xff" * 40, join_frame([b"\x92\xcd\x03\x84\x00"]), join_frame([b"\x91\xa1\xff"])):
                sock, _ = await aio.open_plain(target.address, target.token, target=wanted, name="mallory", timeout_s=9)
                await loop.sock_sendall(sock, said)
                try:
                    while await loop.sock_recv(sock, 4096):
                        pass
                except ConnectionResetError:
                    pass
                sock.close()
            connection = await aio.connect(target.address, target.token, messages, target=wanted, name="odd")
            connection.close()
        for nowhere in ("nobody", "worker:", "worker:zz", "worker:" + "0" * 56):
            with pytest.raises(ShoalError, match=r"there is no|not on this node"):
                await aio.connect(target.address, target.token, ToProcess, target=nowhere, name="odd")

    asyncio.run(try_all())


def test_hundreds_of_silent_connections_keep_nobody_out(target: Target) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    silent = []
    try:
        for number in range(600):
            sock = target.connect(target.address)
            if number % 3 == 0:
                sock.sendall(b"\x20\0")  # half a length
            elif number % 3 == 1:
                sock.sendall(join_frame([encode_message(Hello(PROTOCOL_VERSION, "1", b"n" * 16, "agent"))]))
            silent.append(sock)

        async def ask() -> StatusReply:
            connection = await aio.connect(
                target.address, target.token, ProcessReply, target="control", name="honest", timeout_s=LIMIT_S
            )
            answer: StatusReply = await connection.request(GetStatus(), LIMIT_S)
            connection.close()
            return answer

        begin = time.monotonic()
        assert asyncio.run(ask()).nodes
        assert time.monotonic() - begin < 5.0, "strangers must give way long before their handshakes time out"
        assert shoal.get(one.remote(), timeout=LIMIT_S) == 1
    finally:
        for sock in silent:
            sock.close()


def test_a_node_out_of_descriptors_recovers(target: Target) -> None:
    [agent] = [
        int(entry.name)
        for entry in os.scandir("/proc")
        if entry.name.isdigit() and is_agent_of(Path(entry.path), target.folder.path.parent)
    ]
    limits = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    held: list[socket.socket] = []
    log = Path(target.folder.logs, "agent.log")
    deadline = time.monotonic() + LIMIT_S
    while len(os.listdir(f"/proc/{agent}/fd")) > 150:  # of those that another test has just closed
        assert time.monotonic() < deadline
        time.sleep(0.01)
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (200, limits[1]))
    try:
        held.extend(target.connect(target.address) for _ in range(250))
        while "cannot accept connections" not in log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        resource.prlimit(agent, resource.RLIMIT_NOFILE, limits)
        for sock in held:
            sock.close()
    assert log.read_text().count("cannot accept connections") <= 3, "it must not fill the log"

    async def ask() -> None:
        connection = await aio.connect(target.address, target.token, ProcessReply, target="control", name="honest")
        await connection.request(GetStatus(), LIMIT_S)
        connection.close()

    asyncio.run(ask())


def is_agent_of(process: Path, base: Path) -> bool:
    try:
        return process.joinpath(
            "comm"
        ).read_text() == "shoal::agent\n" and f"SHOAL_TMPDIR={base}".encode() in process.joinpath(
            "environ"
        ).read_bytes().split(b"\0")
    except OSError:
        return False


def test_the_files_of_a_node_are_for_its_user_only(target: Target) -> None:
    assert target.folder.path.stat().st_mode & 0o777 == 0o700
    assert target.folder.token_path.stat().st_mode & 0o777 == 0o600
    for path in target.folder.sockets.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert target.folder.sockets.stat().st_mode & 0o077 == 0


def test_user_code_cannot_read_the_token_in_its_environment(target: Target) -> None:
    @shoal.remote
    def look() -> bool:
        return target_token in Path("/proc/self/environ").read_bytes() or any(
            target_token.decode() in value for value in os.environ.values()
        )

    target_token = target.token
    assert shoal.get(look.remote()) is False


def test_a_connection_is_not_inherited_by_programs_that_user_code_starts(target: Target) -> None:
    @shoal.remote
    def look() -> list[str]:
        import subprocess

        command = ["sh", "-c", "for f in /proc/self/fd/*; do readlink $f; done"]
        out = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=False)
        return [line for line in out.stdout.splitlines() if line.startswith(("socket:", "anon_inode:[event"))]

    assert shoal.get(look.remote()) == []


# ------------------------------------------------------------------------------------------------- who may unpickle

PACKAGE = Path(shoal.__file__).parent
NEVER = ("pickle", "cloudpickle", "marshal", "shelve", "dill", "shoal.objects.serialization")


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ["rpc", "scheduling", "control", "node"])
def test_what_runs_no_user_code_cannot_unpickle(room: str) -> None:
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        for name in imports_of(path):
            assert not any(name == never or name.startswith(f"{never}.") for never in NEVER), (path.name, name)
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            assert name not in ("deserialize", "loads", "eval", "exec", "__reduce__"), (path.name, name)


def test_what_travels_is_messages_that_are_named_one_by_one() -> None:
    for messages in (FromProcess, ToProcess, ProcessReply, ProcessMessage, AgentMessage):
        assert all(issubclass(kind, Message) for kind in get_args(messages))
        assert len(get_args(messages)) > 5
