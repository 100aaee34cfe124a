"""The command line: what it understands, prints and returns, against a fake control and fake supervisors."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from shoal import cluster_utils, session
from shoal.cli import main as cli
from shoal.cli import nodes, status, words
from shoal.control.messages import GetStatus, JobInfo, NodeInfo, ProcessMessage, StatusReply
from shoal.exceptions import ShoalError
from shoal.node.launch import RunningNode
from shoal.node.settings import NodeOptions
from shoal.rpc.aio import Connection, Listener, attach
from shoal.rpc.messages import Hello
from shoal.rpc.sockets import join_address, listen_tcp
from shoal.scheduling.views import UNIT, DemandReport, WaitReason

TOKEN = "a-token-for-tests-0123456789"
NODE = bytes(range(28))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A session folder of the test's own, and no setting from outside."""
    for name in ("SHOAL_TOKEN", "SHOAL_TOKEN_FILE", "SHOAL_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHOAL_TMPDIR", str(tmp_path / "base"))
    made = session.base_folder()
    yield made
    for folder in session.node_folders(made):
        folder.remove_traces()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts; those left over are ended."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def run(*words_of_command: str) -> Result:
    return CliRunner().invoke(cli.app, list(words_of_command))


def record(pid: int, address: str = "127.0.0.1:7001", **changes: object) -> session.NodeRecord:
    values: dict[str, object] = {
        "node_id": NODE.hex(),
        "session": "s",
        "address": address,
        "control_address": address,
        "is_head": True,
        "private": False,
        "supervisor_pid": pid,
        "supervisor_stamp": session.process_stamp(pid),
        "agent_socket": "a",
        "control_socket": "c",
        "started_unix_s": time.time(),
        "version": "0.1.0",
    }
    return session.NodeRecord(**{**values, **changes})  # type: ignore[arg-type]


def add_node(base: Path, made: session.NodeRecord) -> session.NodeFolder:
    folder = session.create_node_folder(base)
    folder.write_token(TOKEN)
    folder.write_info(made)
    return folder


SUPERVISORS = {
    "polite": "import time; print('up', flush=True); time.sleep(60)",
    "stubborn": "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
}


def spawn(processes: list[subprocess.Popen[bytes]], kind: str) -> int:
    """A stand-in for a supervisor that is ready for its signals."""
    process = subprocess.Popen([sys.executable, "-c", SUPERVISORS[kind]], stdout=subprocess.PIPE)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process.pid


# -------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1073741824", 1 << 30),
        ("1GiB", 1 << 30),
        ("1.5 gib", 3 << 29),
        ("200MB", 200_000_000),
        ("2k", 2000),
        ("1 Ti", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert words.parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "much", "-1", "0", "1XB", "1e9", "GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--memory"):
        words.parse_size(text, "--memory")


def test_resources() -> None:
    assert words.parse_resources('{"shelf": 2, "license": 0.5}') == {"shelf": 2.0, "license": 0.5}
    assert words.parse_resources("{}") == {}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("shelf=2", "JSON"),
        ("[1]", "JSON"),
        ('{"shelf": "2"}', "'shelf'"),
        ('{"shelf": -1}', "'shelf'"),
        ('{"shelf": true}', "'shelf'"),
        ('{"shelf": NaN}', "'shelf'"),
        ('{"CPU": 2}', "--num-cpus"),
        ('{"object_store_memory": 2}', "--object-store-memory"),
    ],
)
def test_resources_that_are_none(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        words.parse_resources(text)


def test_labels() -> None:
    assert words.parse_labels("zone=a, disk=ssd,,note=") == {"zone": "a", "disk": "ssd", "note": ""}
    assert words.parse_labels("") == {}


@pytest.mark.parametrize("text", ["zone", "=a", "zone=a b", "zone=a,zone=b", "-x=1"])
def test_labels_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="--labels"):
        words.parse_labels(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (12.3, "12 s"), (600, "10 min"), (7200, "2.0 h"), (864000, "10.0 d")]
)
def test_spans(seconds: float, text: str) -> None:
    assert words.span_text(seconds) == text


# --------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("command", ["start", "stop", "status"])
def test_each_command_has_help_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example:" in result.output
    assert f"shoal {command}" in result.output


def test_version() -> None:
    assert run("--version").output == "shoal 0.1.0\n"


def test_commands_do_not_load_what_they_do_not_need() -> None:
    unwanted = ("rich", "asyncio", "numpy")
    code = f"import shoal.cli.main, shoal.cli.nodes, sys; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# -------------------------------------------------------------------------------------------------------------- start


@pytest.fixture
def started(base: Path, monkeypatch: pytest.MonkeyPatch, processes: list[subprocess.Popen[bytes]]) -> list[NodeOptions]:
    """`start_node` notes its options and starts a stand-in."""
    asked: list[NodeOptions] = []

    def start_fake(options: NodeOptions) -> RunningNode:
        asked.append(options)
        pid = spawn(processes, "polite")
        made = record(pid, control_address=options.address or "127.0.0.1:7001", is_head=options.head)
        return RunningNode(processes[-1], add_node(base, made), made)

    monkeypatch.setattr(nodes, "start_node", start_fake)
    return asked


def test_starting_a_head_says_what_to_do_next(started: list[NodeOptions]) -> None:
    result = run(
        "start", "--head", "--num-cpus=2", "--num-gpus", "0", "--resources", '{"shelf": 1}', "--labels", "zone=a",
        "--memory", "1GiB", "--object-store-memory", "100MB",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (options,) = started
    assert (options.head, options.address, options.port, options.node_ip) == (True, None, 6380, "127.0.0.1")
    assert (options.num_cpus, options.num_gpus, options.resources) == (2, 0, {"shelf": 1})
    assert (options.labels, options.memory, options.object_store_memory) == ({"zone": "a"}, 1 << 30, 100_000_000)
    assert not options.private
    for expected in (
        "Head started at 127.0.0.1:7001", "shoal start --address=127.0.0.1:7001", "SHOAL_TOKEN_FILE=", "shoal.init(",
        "shoal status", "shoal stop", "--node-ip-address",
    ):  # fmt: skip
        assert expected in result.output
    assert TOKEN not in result.output


def test_joining_listens_where_the_head_can_reach_it(started: list[NodeOptions]) -> None:
    result = run("start", "--address=127.0.0.1:6380", "--json")
    assert result.exit_code == 0, result.output
    (options,) = started
    assert (options.head, options.address, options.port, options.node_ip) == (False, "127.0.0.1:6380", 0, "127.0.0.1")
    facts = json.loads(result.output)
    assert facts["control_address"] == "127.0.0.1:6380"
    assert session.read_token_file(Path(facts["token_file"])) == TOKEN


@pytest.mark.parametrize(
    ("command", "match"),
    [
        ([], "--head"),
        (["--head", "--address=h:1"], "--head"),
        (["--head", "--resources=x"], "JSON"),
        (["--head", "--labels=x"], "KEY=VALUE"),
        (["--head", "--memory=lots"], "--memory"),
        (["--head", "--log-level=loud"], "log level"),
        (["--head", "--port=70000"], "port"),
        (["--head", "--num-cpus=-1"], "num-cpus"),
    ],
)
def test_a_wrong_command_line_is_told_apart(started: list[NodeOptions], command: list[str], match: str) -> None:
    result = run("start", *command)
    assert result.exit_code == 2
    assert match in " ".join(result.output.split())
    assert not started


def call_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *command: str) -> tuple[object, str]:
    """Exit code and stderr of the command as its entry point runs it."""
    monkeypatch.setattr(sys, "argv", ["shoal", *command])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


def test_what_cannot_be_done_is_one_line_and_exit_code_1(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_options: NodeOptions) -> RunningNode:
        raise ShoalError("cannot listen on 127.0.0.1:6380: Address already in use")

    monkeypatch.setattr(nodes, "start_node", fail)
    code, err = call_main(monkeypatch, capsys, "start", "--head")
    assert (code, err) == (1, "shoal: cannot listen on 127.0.0.1:6380: Address already in use\n")
    assert base.is_dir()


def test_an_address_that_is_none_is_one_line(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, err = call_main(monkeypatch, capsys, "start", "--address=somewhere")
    assert code == 1
    assert err.count("\n") == 1
    assert "HOST:PORT" in err
    assert base.is_dir()


BLOCKING = """
import signal, subprocess, sys
from shoal import session
from shoal.cli import nodes
from shoal.node.launch import RunningNode
from shoal.node.settings import NodeOptions
sys.path.insert(0, sys.argv[1])
from test_cli import record, add_node
def start_fake(options):
    assert options.lifeline_fd is not None
    process = subprocess.Popen([sys.executable, "-c", sys.argv[2]], stdout=subprocess.PIPE)
    process.stdout.readline()
    made = record(process.pid)
    return RunningNode(process, add_node(session.base_folder(), made), made)
nodes.start_node = start_fake
sys.exit(nodes.start(NodeOptions(head=True), block=True, as_json=True))
"""


def start_blocking(processes: list[subprocess.Popen[bytes]], supervisor: str) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", BLOCKING, here, supervisor]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    processes.append(process)
    assert process.stdout is not None
    json.loads(process.stdout.readline())
    return process


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_blocking_start_ends_its_node_on_signals(processes: list[subprocess.Popen[bytes]], number: int) -> None:
    process = start_blocking(processes, SUPERVISORS["polite"])
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"Node stopped.\n", b"")


@pytest.mark.usefixtures("base")
@pytest.mark.parametrize(("code", "told"), [(0, b""), (3, b"ended by itself (code 3)")])
def test_a_blocking_start_ends_with_its_node(processes: list[subprocess.Popen[bytes]], code: int, told: bytes) -> None:
    process = start_blocking(processes, f"import os; print('up', flush=True); os._exit({code})")
    _, err = process.communicate(timeout=20)
    assert process.returncode == (1 if code else 0)
    assert told in err


# --------------------------------------------------------------------------------------------------------------- stop


def test_stopping_nothing_is_fine(base: Path) -> None:
    result = run("stop")
    assert (result.exit_code, result.output) == (0, "No node of yours runs on this machine.\n")
    assert base.is_dir()


def test_stop_ends_shared_nodes_heads_last_and_leaves_private_ones(
    base: Path, processes: list[subprocess.Popen[bytes]]
) -> None:
    head = add_node(base, record(spawn(processes, "polite"), "h:1"))
    add_node(base, record(spawn(processes, "polite"), "h:2", is_head=False))
    add_node(base, record(spawn(processes, "polite"), "h:3", private=True))
    result = run("stop", "--json")
    assert result.exit_code == 0
    told = json.loads(result.output)
    assert {row["address"]: row["outcome"] for row in told["stopped"]} == {"h:1": "stopped", "h:2": "stopped"}
    assert told["left"] == 1
    assert [process.wait(5) for process in processes[:2]] == [-signal.SIGTERM] * 2
    assert processes[2].poll() is None
    assert sorted(os.listdir(head.path)) == ["logs"]
    assert [node.record.address for node in session.live_nodes(base)] == ["h:3"]
    assert run("stop", "--all").exit_code == 0
    assert processes[2].wait(5) == -signal.SIGTERM


def test_stop_kills_what_does_not_end_in_time(base: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    add_node(base, record(spawn(processes, "stubborn"), "h:1"))
    result = run("stop", "--grace-period", "0.05")
    assert result.exit_code == 0
    assert "head h:1: killed" in result.output
    assert processes[0].wait(5) == -signal.SIGKILL


def test_stop_with_force_does_not_ask(base: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    add_node(base, record(spawn(processes, "polite")))
    assert run("stop", "--force").exit_code == 0
    assert processes[0].wait(5) == -signal.SIGKILL


def test_stop_never_hits_a_process_that_inherited_the_pid(base: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    pid = spawn(processes, "polite")
    stale = record(pid, supervisor_stamp="1@another/pid:[1]")
    folder = session.create_node_folder(base)
    assert nodes.end_nodes([session.LiveNode(stale, folder)], 1.0) == ["stopped"]
    assert processes[0].poll() is None


# ------------------------------------------------------------------------------------------------------------- status


def amounts(**units: float) -> dict[str, int]:
    return {name: int(amount * UNIT) for name, amount in units.items()}


def a_status() -> StatusReply:
    waits = WaitReason("infeasible", "no node has the resource [shelf]")
    return StatusReply(
        cluster_id=b"\x01\x02",
        nodes=[
            NodeInfo(
                NODE, "127.0.0.1:7001", "laptop",
                amounts(CPU=4, GPU=1, memory=8 << 30), amounts(CPU=1.5, memory=4 << 30), {"zone": "a"}, True,
                store_capacity=100 << 20, store_used=1 << 20, pid=5, started_unix_s=1000.0,
            ),
            NodeInfo(NODE[::-1], "127.0.0.1:7002", "laptop", amounts(CPU=2), amounts(CPU=2)),
            NodeInfo(b"\xff" * 28, "10.0.0.9:1", "gone", {}, {}, alive=False, death_reason="silent for 10 s"),
        ],
        demands=[DemandReport("train[0]", amounts(shelf=1), 7, waits, 940.0, b"\0\0\0\1")],
        actors={"alive": 3, "pending": 1, "dead": 0},
        jobs=[
            JobInfo(b"\0\0\0\1", "ns", b"w", NODE, 42, "train.py\x1b[2J", started_unix_s=900.0),
            JobInfo(b"\0\0\0\0", "old", b"w", NODE, 41, "old.py", started_unix_s=1.0, ended_unix_s=2.0),
        ],
        started_unix_s=400.0,
        version="0.1.0",
    )  # fmt: skip


def show(reply: StatusReply, *, verbose: bool) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=200, highlight=False)
    for part in status.picture(reply, "127.0.0.1:7001", 1000.0, verbose=verbose):
        status.print_part(console, part)
    return screen.getvalue()


def test_the_picture_for_people() -> None:
    text = show(a_status(), verbose=False)
    for expected in (
        "0.1.0 at 127.0.0.1:7001, up 10 min", "alive (head)", "2.5/4", "1 MiB/100 MiB",
        "1/1 GPU", "2.5/6 CPU, 1/1 GPU, 4 GiB/8 GiB memory",
        "silent for 10 s", "2.5/6 CPU", "train[0]", "60 s", "1 shelf", "no node has the resource [shelf]",
        "Actors: 3 alive, 1 pending", "Job 00000001: train.py?[2J (pid 42), 2 min",
    ):  # fmt: skip
        assert expected in text, expected
    assert "\x1b" not in text
    assert "old.py" not in text
    assert "zone=a" not in text
    assert "zone=a" in show(a_status(), verbose=True)


def test_the_picture_of_an_idle_cluster() -> None:
    text = show(StatusReply(version="0.1.0"), verbose=False)
    for expected in ("Nothing waits.", "Actors: none", "Jobs: none runs"):
        assert expected in text


def test_a_large_cluster_is_cut_short() -> None:
    many = [NodeInfo(bytes([n]) * 28, f"h:{n}", "h", amounts(CPU=1), amounts(CPU=1)) for n in range(100)]
    demands = [DemandReport(f"d{n}", amounts(CPU=1), 1, WaitReason("busy", "all busy"), 0.0) for n in range(50)]
    reply = StatusReply(nodes=many, demands=demands)
    text = show(reply, verbose=False)
    assert "and 70 more nodes" in text
    assert "and 30 more kinds" in text
    assert "h:99" in show(reply, verbose=True)


class FakeControl:
    """Answers `GetStatus` on a TCP port of its own, on a thread of its own."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()
        self._up = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._end: Callable[[], None] = lambda: None
        self.address = ""
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()))
        self._thread.start()
        assert self._up.wait(5.0)

    async def _serve(self) -> None:
        end = asyncio.Event()
        self._end = lambda: self._loop.call_soon_threadsafe(end.set)
        listening = listen_tcp("127.0.0.1", 0)
        self.address = join_address("127.0.0.1", listening.getsockname()[1])
        listener = Listener(listening, self._token, "control", lambda _: None, self._route)
        self._up.set()
        await end.wait()
        listener.close()

    async def _route(self, sock: socket.socket, hello: Hello) -> None:
        assert hello.target == "control"
        connection = Connection(ProcessMessage, hello.name)

        def answer(message: object) -> None:
            assert isinstance(message, GetStatus)
            connection.reply(message, a_status())

        connection.on_message = answer
        await attach(connection, sock)

    def close(self) -> None:
        self._end()
        self._thread.join(5.0)
        self._loop.close()


@pytest.fixture
def control(base: Path) -> Iterator[FakeControl]:
    made = FakeControl(TOKEN)
    add_node(base, record(os.getpid(), made.address))
    yield made
    made.close()


def test_status_finds_the_cluster_of_this_machine(control: FakeControl) -> None:
    result = run("status")
    assert result.exit_code == 0, result.output
    assert control.address in result.output
    assert "Actors: 3 alive" in result.output


def test_status_for_programs(control: FakeControl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ADDRESS", control.address)
    told = json.loads(run("status", "--json").output)
    assert told["nodes"][0]["total"] == {"CPU": 4.0, "GPU": 1.0, "memory": float(8 << 30)}
    assert [node["state"] for node in told["nodes"]] == ["alive", "alive", "dead"]
    assert told["demands"][0]["reason"] == {"code": "infeasible", "text": "no node has the resource [shelf]"}
    assert told["resources"]["available"]["CPU"] == 3.5
    assert told["jobs"][0]["ended_unix_s"] is None


def test_status_tells_what_is_wrong_in_one_line(
    control: FakeControl, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ({"SHOAL_TOKEN": "another-token-0123456789"}, ["status"], "token"),
        ({"SHOAL_TOKEN": "short"}, ["status"], "at least 16"),
        ({"SHOAL_TOKEN": TOKEN}, ["status", "--address", "127.0.0.1:1"], "cannot reach"),
        ({}, ["status", "--address", "127.0.0.1:1"], "SHOAL_TOKEN_FILE"),
        ({"SHOAL_TMPDIR": os.environ["SHOAL_TMPDIR"] + "2"}, ["status"], "no cluster runs"),
    ]
    for environ, command, match in cases:
        with monkeypatch.context() as context:
            for name, value in environ.items():
                context.setenv(name, value)
            code, err = call_main(context, capsys, *command)
        assert code == 1
        assert match in err, err
        assert err.count("\n") == 1, err
        assert TOKEN not in err


# ------------------------------------------------------------------------------------------------------ cluster_utils


def test_a_cluster_refuses_what_it_does_not_know() -> None:
    cluster = cluster_utils.Cluster(shutdown_at_exit=False)
    with pytest.raises(TypeError, match="num_cpu; it knows num_cpus"):
        cluster.add_node(num_cpu=1)
    with pytest.raises(ShoalError, match="add_node"):
        _ = cluster.address
    with pytest.raises(ValueError, match="initialize_head"):
        cluster_utils.Cluster(connect=True)
    with pytest.raises(ValueError, match="initialize_head"):
        cluster_utils.Cluster(head_node_args={"num_cpus": 2})
    assert cluster.list_all_nodes() == []
    cluster.shutdown()
