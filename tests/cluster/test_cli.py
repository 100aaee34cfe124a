"""The `shoal` command as a user types it: real processes on several "machines" (session folders), and all mistakes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shoal import session
from shoal.rpc.sockets import join_address

COMMAND = [sys.executable, "-m", "shoal.cli.main"]
TOKEN = "a-token-that-the-user-chose-0123"
STORE = "--object-store-memory=64MiB"
LIMIT_S = 30.0


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.01)


def processes_of(base: Path) -> list[str]:
    """Live processes of the nodes and drivers of one machine."""
    found = []
    for entry in os.scandir("/proc"):
        try:
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            environ = Path(entry.path, "environ").read_bytes().split(b"\0")
            state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
            if f"SHOAL_TMPDIR={base}".encode() in environ and state != "Z":
                found.append(f"{entry.name} {Path(entry.path, 'comm').read_text().strip()}")
        except OSError:
            continue  # it ended meanwhile
    return found


class Machine:
    """A session folder of its own stands for a machine: nodes in it find each other, and nobody else's."""

    def __init__(self, base: Path) -> None:
        base.mkdir(mode=0o700)
        self.base = base
        dropped = {"SHOAL_TOKEN", "SHOAL_TOKEN_FILE", "SHOAL_ADDRESS", "SHOAL_NAMESPACE"}
        self.environ = {name: value for name, value in os.environ.items() if name not in dropped}
        self.environ |= {"SHOAL_TMPDIR": str(base), "COLUMNS": "160", "NO_COLOR": "1"}

    def run(self, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words], env=self.environ | environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    def spawn(self, *words: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*COMMAND, *words], env=self.environ | environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def start(self, *words: str, **environ: str) -> dict[str, Any]:
        """Start a node and return what `--json` says."""
        done = self.run("start", STORE, "--json", *words, **environ)
        assert done.returncode == 0, done.stderr
        facts: dict[str, Any] = json.loads(done.stdout)
        return facts

    def status(self, *words: str, **environ: str) -> dict[str, Any]:
        done = self.run("status", "--json", *words, **environ)
        assert done.returncode == 0, done.stderr
        data: dict[str, Any] = json.loads(done.stdout)
        return data

    def python(self, script: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env=self.environ | environ, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        )  # fmt: skip

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/bash", "-c", line], env=self.environ, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )

    def stop_all(self) -> None:
        if session.live_nodes(self.base):
            self.run("stop", "--force", "--all")
        else:
            session.sweep(self.base)

    def check_nothing_left(self) -> None:
        wait_until(lambda: not processes_of(self.base), f"the end of {processes_of(self.base)}", 10.0)
        for folder in session.node_folders(self.base):
            assert sorted(os.listdir(folder.path)) == ["logs"], f"{folder.path} holds more than logs"


@pytest.fixture(scope="module")
def make_machine(private_folder: Path) -> Iterator[Callable[[], Machine]]:
    made: list[Machine] = []

    def make() -> Machine:
        number = sum(entry.name.startswith("m") for entry in os.scandir(private_folder))
        made.append(Machine(private_folder / f"m{number}"))
        return made[-1]

    yield make
    for machine in made:
        machine.stop_all()
    for machine in made:
        machine.check_nothing_left()


@pytest.fixture
def machine(make_machine: Callable[[], Machine]) -> Iterator[Machine]:
    made = make_machine()
    yield made
    made.stop_all()
    made.check_nothing_left()


class Home:
    """A running cluster that the tests of this module look at."""

    def __init__(self, here: Machine, there: Machine) -> None:
        self.here, self.there = here, there
        self.head = here.start(
            "--head", "--port=0", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--num-gpus=1",
            '--resources={"shelf": 2, "license": 0.5}', "--labels=zone=a,disk=ssd", "--memory=3GiB",
            "--log-level=debug", SHOAL_TOKEN=TOKEN,
        )  # fmt: skip
        self.near = here.start(f"--address={self.head['address']}", "--num-cpus=1", "--num-gpus=0")
        self.far = there.start(f"--address={self.head['address']}", "--num-cpus=1", "--num-gpus=0", SHOAL_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def home(make_machine: Callable[[], Machine]) -> Home:
    return Home(make_machine(), make_machine())


# ------------------------------------------------------------------------------------------------- a cluster that runs


def test_a_node_is_what_its_options_say(home: Home) -> None:
    data = home.here.status()
    nodes = {node["node_id"]: node for node in data["nodes"]}
    assert set(nodes) == {home.head["node_id"], home.near["node_id"], home.far["node_id"]}
    assert all(node["state"] == "alive" for node in nodes.values())
    head = nodes[home.head["node_id"]]
    assert head["is_head"]
    assert head["address"] == home.head["address"]
    store = 64 << 20
    wanted = {"CPU": 2, "GPU": 1, "shelf": 2, "license": 0.5, "memory": (3 << 30) - store, "object_store_memory": store}
    assert {name: head["total"][name] for name in wanted} == wanted
    assert head["labels"] == {"zone": "a", "disk": "ssd", "ray.io/node-id": head["node_id"]}
    assert head["store_capacity_bytes"] == store
    assert data["resources"]["total"]["CPU"] == 4
    assert (data["demands"], data["actors"], data["address"]) == ([], {}, home.head["address"])
    assert not home.near["is_head"]
    assert home.near["control_address"] == home.head["address"]
    log = Path(home.head["logs"], "control.log").read_text()
    assert " DEBUG " in log
    assert f"node joined node={home.near['node_id']}" in log


def test_the_picture_for_people_says_the_same(home: Home) -> None:
    done = home.here.run("status")
    assert (done.returncode, done.stderr) == (0, "")
    for facts in (home.head, home.near, home.far):
        assert facts["address"] in done.stdout
    assert "alive (head)" in done.stdout
    assert "0/4 CPU" in done.stdout
    assert "0/2 shelf" in done.stdout
    assert "Nothing waits." in done.stdout
    verbose = home.here.run("status", "-v").stdout
    assert "labels disk=ssd, zone=a" in verbose
    assert home.far["node_id"] in verbose


def test_every_node_of_the_cluster_can_be_asked_from_its_machine(home: Home) -> None:
    near, far = home.near["address"], home.far["address"]
    port = home.head["address"].rpartition(":")[2]
    cluster_id = home.here.status()["cluster_id"]
    for machine, words in (
        (home.here, [f"--address={near}"]),
        (home.here, [f"--address=localhost:{port}"]),
        (home.there, []),
        (home.there, [f"--address={far}"]),
    ):
        assert machine.status(*words)["cluster_id"] == cluster_id
    assert len(home.here.status(SHOAL_ADDRESS=home.head["address"])["nodes"]) == 3


def test_from_elsewhere_a_token_is_enough(home: Home, make_machine: Callable[[], Machine], tmp_path: Path) -> None:
    elsewhere, address = make_machine(), home.head["address"]
    assert elsewhere.run("status", f"--address={address}").stderr.startswith("shoal: no token: set SHOAL_TOKEN")
    assert len(elsewhere.status(f"--address={address}", SHOAL_TOKEN=TOKEN)["nodes"]) == 3
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    token_file.chmod(0o600)
    assert len(elsewhere.status(f"--address={address}", SHOAL_TOKEN_FILE=str(token_file))["nodes"]) == 3
    assert len(elsewhere.status(SHOAL_ADDRESS=address, SHOAL_TOKEN_FILE=home.head["token_file"])["nodes"]) == 3


CONNECT = """
    import json, os, shoal

    @shoal.remote
    def where():
        return shoal.get_runtime_context().get_node_id(), os.getpid()

    def look(**options):
        with shoal.init(log_to_driver=False, **options) as context:
            shoal.get(where.remote())
            return context["address"], len(shoal.nodes()), shoal.get_runtime_context().namespace

    head, near = os.environ["HEAD"], os.environ["NEAR"]
    port = head.rpartition(":")[2]
    found = [look(), look(address="auto"), look(address=head), look(address=near), look(address=f"localhost:{port}")]
    os.environ["SHOAL_ADDRESS"] = head
    os.environ["SHOAL_NAMESPACE"] = "my-space"
    found.append(look())
    print(json.dumps(found))
"""


def test_a_program_connects_in_every_way(home: Home) -> None:
    done = home.here.python(CONNECT, HEAD=home.head["address"], NEAR=home.near["address"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert {(address, count) for address, count, _ in found} == {(home.head["address"], 3)}
    spaces = [space for _, _, space in found]
    assert spaces[-1] == "my-space"
    assert len(set(spaces)) == len(spaces)
    wait_until(lambda: not [job for job in home.here.status()["jobs"] if job["ended_unix_s"] is None], "jobs to end")


def test_a_program_on_the_machine_of_another_node_connects_there(home: Home) -> None:
    done = home.there.python(CONNECT, HEAD=home.head["address"], NEAR=home.far["address"])
    assert done.returncode == 0, done.stderr


def test_a_local_cluster_of_a_program_is_found_by_nobody_else(home: Home) -> None:
    done = home.here.python(
        """
        import os, shoal, subprocess, sys
        with shoal.init("local", num_cpus=1) as context:
            assert context["address"] != os.environ["HEAD"]
            out = subprocess.run([sys.executable, "-m", "shoal.cli.main", "stop", "--json"], capture_output=True,
                                 text=True, env={**os.environ, "SHOAL_TMPDIR": os.environ["SHOAL_TMPDIR"] + "x"})
            listed = subprocess.run([sys.executable, "-m", "shoal.cli.main", "status", "--json"], capture_output=True,
                                    text=True)
            assert os.environ["HEAD"] in listed.stdout, listed
        """,
        HEAD=home.head["address"],
    )
    (home.here.base.parent / f"{home.here.base.name}x").rmdir()
    assert done.returncode == 0, done.stderr


def test_the_status_lists_jobs_and_actors_while_they_run(home: Home) -> None:
    script = """
        import shoal, sys
        shoal.init(namespace="zoo", log_to_driver=False)

        @shoal.remote(num_cpus=1)
        class Bear:
            def pid(self): return 1

        bears = [Bear.remote() for _ in range(2)]
        shoal.get([bear.pid.remote() for bear in bears])
        print("up", flush=True)
        sys.stdin.readline()
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=home.here.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert driver.stdout is not None
    assert driver.stdout.readline() == "up\n"
    data = home.here.status()
    assert data["actors"].get("alive") == 2, data["actors"]
    [job] = [job for job in data["jobs"] if job["ended_unix_s"] is None]
    assert (job["namespace"], job["driver_pid"]) == ("zoo", driver.pid)
    wait_until(lambda: home.here.status()["resources"]["available"]["CPU"] == 2, "the actors' CPUs to be shown as used")
    text = home.here.run("status").stdout
    assert "Actors: 2 alive" in text
    assert f"(pid {driver.pid})" in text
    driver.kill()
    driver.communicate()
    wait_until(lambda: not home.here.status()["actors"].get("alive"), "the actors of a driver that was killed to go")
    wait_until(lambda: home.here.status()["resources"]["available"]["CPU"] == 4, "their CPUs to be free")


def test_the_token_is_in_no_process_and_in_no_log(home: Home) -> None:
    secret = TOKEN.encode()
    home.here.python("import shoal; shoal.init(); shoal.get(shoal.remote(lambda: 1).remote())")
    looked = 0
    for machine in (home.here, home.there):
        for line in processes_of(machine.base):
            for name in ("cmdline", "environ"):
                looked += 1
                assert secret not in Path("/proc", line.split()[0], name).read_bytes(), (line, name)
        for log in machine.base.glob("*/logs/*"):
            assert secret not in log.read_bytes(), log
        for _, folder in session.live_nodes(machine.base):
            assert folder.token_path.stat().st_mode & 0o777 == 0o600
            assert folder.path.stat().st_mode & 0o777 == 0o700
            assert all(entry.stat().st_mode & 0o077 == 0 for entry in folder.sockets.iterdir())
    assert looked >= 10
    assert session.NodeFolder(Path(home.far["token_file"]).parent).read_token() == TOKEN


# ---------------------------------------------------------------------------------------------------------- mistakes


PATCHES = {
    "shoal": "import shoal.version; shoal.version.__version__ = '9.9.0'",
    "protocol": "import shoal.rpc.messages; shoal.rpc.messages.PROTOCOL_VERSION = 99",
}


@pytest.fixture
def patched(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """An environment whose Python programs run another version of shoal."""

    def make(which: str) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(PATCHES[which])
        paths = [str(tmp_path), str(Path(session.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}

    return make


def refused(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line that says why a command was not carried out."""
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("shoal: "), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["start"], "--head"),
        (["start", "--head", "--hed"], "No such option: --hed"),
        (["start", "--head", "--address=127.0.0.1:1"], "--head to start a cluster, or --address"),
        (["start", "--head", "--resources={bad"], "--resources is a JSON object"),
        (["start", "--head", '--resources={"CPU": 2}'], "say --num-cpus"),
        (["start", "--head", "--labels=a"], "is not KEY=VALUE"),
        (["start", "--head", "--memory=lots"], "--memory is a number of bytes"),
        (["start", "--head", "--port=99999"], "--port"),
        (["start", "--head", "--num-cpus=-1"], "--num-cpus"),
        (["start", "--head", "--log-level=loud"], "no such log level"),
        (["sttaus"], "No such command 'sttaus'"),
        (["stop", "now"], "unexpected extra argument"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_and_code_2(make_machine: Any, words: list[str], text: str) -> None:
    machine = make_machine()
    assert text in refused(machine.run(*words), code=2)
    assert os.listdir(machine.base) == []


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["status"], "no cluster runs on this machine"),
        (["status", "--address=auto"], "no cluster runs on this machine"),
        (["status", "--address=nowhere"], "HOST:PORT"),
        (["start", "--address=nowhere"], "HOST:PORT"),
        (["start", "--address=no.such.host.invalid:6380"], "cannot reach no.such.host.invalid:6380"),
        (["start", "--head", "--port=0", "--node-ip-address=192.0.2.7"], "cannot listen on 192.0.2.7"),
        (["start", "--head", "--port=0", "--object-store-memory=1kB"], "object store"),
        (["start", "--head", "--port=0", "--num-cpus=0.00001"], "CPU"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line_and_code_1(machine: Machine, words: list[str], text: str) -> None:
    assert text in refused(machine.run(*words, SHOAL_TOKEN=TOKEN))
    assert machine.run("stop").stdout == "No node of yours runs on this machine.\n"


def test_a_wrong_address_is_one_line(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = join_address(*taken.getsockname())
        text = refused(machine.run("start", "--head", f"--port={address.rpartition(':')[2]}"))
        assert f"cannot listen on {address}: Address already in use" in text
    for command in ("start", "status"):
        text = refused(machine.run(command, f"--address={address}", SHOAL_TOKEN=TOKEN))
        assert f"cannot reach a shoal node at {address}: Connection refused" in text
        assert "no token" in refused(machine.run(command, f"--address={address}"))


def test_something_else_at_the_address_is_one_line(machine: Machine) -> None:
    """An HTTP server, say: it answers, but not as we do."""
    import threading

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = join_address(*server.getsockname())

        def serve() -> None:
            for _ in range(2):
                sock, _ = server.accept()
                with sock:
                    sock.recv(4096)
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for command in ("start", "status"):
            text = refused(machine.run(command, f"--address={address}", SHOAL_TOKEN=TOKEN))
            assert "does not speak shoal's protocol" in text
        thread.join(LIMIT_S)


def test_a_wrong_token_is_one_line(home: Home, machine: Machine, tmp_path: Path) -> None:
    address = home.head["address"]
    for command in ("start", "status"):
        text = refused(machine.run(command, f"--address={address}", SHOAL_TOKEN="not-the-token-of-that-one"))
        assert "the cluster's token is not the one given here" in text
        assert "not-the-token" not in text
    assert "SHOAL_TOKEN has 5 characters" in refused(machine.run("start", "--head", "--port=0", SHOAL_TOKEN="short"))
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o644)
    call = ["start", "--head", "--port=0"]
    assert "chmod 600" in refused(machine.run(*call, SHOAL_TOKEN_FILE=str(token_file)))
    call = ["status", f"--address={address}"]
    assert "cannot read the token file" in refused(machine.run(*call, SHOAL_TOKEN_FILE="/nowhere/token"))
    done = machine.python(f"import shoal; shoal.init({address!r})")
    assert done.returncode == 1
    assert f"shoal start --address={address}" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("which", ["shoal", "protocol"])
def test_a_wrong_version_is_one_line(
    home: Home, machine: Machine, patched: Callable[[str], dict[str, str]], which: str
) -> None:
    environ, address = patched(which), home.head["address"]
    said = "9.9.0" if which == "shoal" else "99 (shoal"
    text = refused(machine.run("start", f"--address={address}", **environ, SHOAL_TOKEN=TOKEN))
    assert said in text
    if which == "protocol":
        assert said in refused(machine.run("status", f"--address={address}", **environ, SHOAL_TOKEN=TOKEN))
    done = home.here.python("import shoal; shoal.init('auto')", **environ)
    assert done.returncode == 1
    assert said in done.stderr.splitlines()[-1]
    assert len([node for node in home.here.status()["nodes"] if node["state"] == "alive"]) == 3


def test_joining_a_node_that_is_not_the_head_says_where_the_head_is(home: Home, machine: Machine) -> None:
    text = refused(machine.run("start", f"--address={home.near['address']}", SHOAL_TOKEN=TOKEN))
    assert f"the head is at {home.head['address']}" in text


def test_a_folder_that_cannot_be_used_is_one_line(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    for folder, command in ((file, ["start", "--head", "--port=0"]), (open_folder, ["status"]), (file, ["stop"])):
        assert str(folder) in refused(machine.run(*command, f"--temp-dir={folder}"))


# --------------------------------------------------------------------------------------------------- start and stop


def test_a_head_says_what_to_do_next_and_those_commands_work(machine: Machine) -> None:
    done = machine.run("start", "--head", "--port=0", "--num-cpus=1", STORE)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines()]
    [join] = [line for line in lines if "shoal start --address=" in line]
    words = join.replace("shoal start", f"{sys.executable} -m shoal.cli.main start {STORE}")
    joined = machine.shell(words)
    assert joined.returncode == 0, joined.stderr
    assert "shoal status" in lines
    assert len(machine.status()["nodes"]) == 2
    assert "Only this machine can reach it" in done.stdout
    stopped = machine.run("stop")
    assert stopped.returncode == 0
    assert [line.split(":")[0].split()[0] for line in stopped.stdout.splitlines()] == ["head", "node"]
    assert stopped.stdout.count(": stopped") == 2
    machine.check_nothing_left()


def test_ports_are_on_loopback_unless_an_address_is_named(machine: Machine) -> None:
    facts = machine.start("--head", "--port=0", "--num-cpus=1")
    assert facts["address"].startswith("127.0.0.1:")
    listening = listeners_of(machine)
    assert listening == [facts["address"]]
    v6 = machine.start("--head", "--port=0", "--num-cpus=1", "--node-ip-address=::1")
    assert v6["address"].startswith("[::1]:")
    assert machine.status(f"--address={v6['address']}")["address"] == v6["address"]
    joined = machine.start(f"--address={v6['address']}", "--num-cpus=1")
    assert joined["address"].startswith("[::1]:")


def listeners_of(machine: Machine) -> list[str]:
    """Addresses of all listening TCP sockets of the machine's processes."""
    inodes = set()
    for line in processes_of(machine.base):
        for fd in Path("/proc", line.split()[0], "fd").iterdir():
            try:
                target = os.readlink(fd)
            except OSError:
                continue
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for row in Path(table).read_text().splitlines()[1:]:
            words = row.split()
            if words[3] == "0A" and words[9] in inodes:
                raw, port = words[1].split(":")
                host = socket.inet_ntoa(bytes.fromhex(raw)[::-1]) if len(raw) == 8 else raw
                found.append(f"{host}:{int(port, 16)}")
    return found


def test_a_node_that_ends_is_shown_as_dead_with_the_reason(machine: Machine, make_machine: Any) -> None:
    other = make_machine()
    head = machine.start("--head", "--port=0", "--num-cpus=1", SHOAL_TOKEN=TOKEN)
    node = other.start(f"--address={head['address']}", "--num-cpus=1", SHOAL_TOKEN=TOKEN)
    os.kill(node["pid"], signal.SIGKILL)

    def dead() -> list[dict[str, Any]]:
        return [row for row in machine.status()["nodes"] if row["state"] == "dead"]

    wait_until(dead, "the node to be seen as dead")
    [row] = dead()
    assert row["node_id"] == node["node_id"]
    assert row["death_reason"]
    assert node["address"] in machine.run("status").stdout
    wait_until(lambda: not processes_of(other.base), "the processes of a node that was killed to end", 5.0)
    assert other.run("stop").stdout == "No node of yours runs on this machine.\n"


def test_the_nodes_end_when_their_head_does(machine: Machine, make_machine: Any) -> None:
    other = make_machine()
    head = machine.start("--head", "--port=0", "--num-cpus=1", SHOAL_TOKEN=TOKEN)
    other.start(f"--address={head['address']}", "--num-cpus=1", SHOAL_TOKEN=TOKEN)
    assert "stopped" in machine.run("stop").stdout
    wait_until(lambda: not processes_of(other.base), "the other node to end with its head", 10.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_node_in_the_foreground_ends_with_a_signal(machine: Machine, number: signal.Signals) -> None:
    process = machine.spawn("start", "--head", "--port=0", "--num-cpus=1", STORE, "--block")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("Head started at 127.0.0.1:")
    process.send_signal(number)
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("Node stopped.\n")
    machine.check_nothing_left()


def test_a_node_in_the_foreground_ends_with_its_command_however_that_ends(machine: Machine) -> None:
    process = machine.spawn("start", "--head", "--port=0", "--num-cpus=1", STORE, "--block", "--json")
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["is_head"]
    process.kill()
    process.communicate()
    wait_until(lambda: not processes_of(machine.base), "the node to end with its command", 10.0)


def test_stop_ends_a_node_in_the_foreground_of_another_terminal(machine: Machine) -> None:
    process = machine.spawn("start", "--head", "--port=0", "--num-cpus=1", STORE, "--block")
    assert process.stdout is not None
    process.stdout.readline()
    assert "stopped" in machine.run("stop").stdout
    out, err = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, err) == (0, "")
    assert out.endswith("Node stopped.\n")


def test_a_foreground_node_whose_process_dies_says_so(machine: Machine) -> None:
    process = machine.spawn("start", "--head", "--port=0", "--num-cpus=1", STORE, "--block")
    assert process.stdout is not None
    process.stdout.readline()
    [agent] = [int(line.split()[0]) for line in processes_of(machine.base) if line.endswith("shoal::agent")]
    os.kill(agent, signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert err.startswith("shoal: the node ended by itself")


@pytest.mark.parametrize(("after_s", "block"), [(0.05, False), (0.12, True), (0.2, False), (0.25, True), (0.3, False)])
def test_an_interrupt_at_any_moment_of_a_start_leaves_nothing_half_done(
    machine: Machine, after_s: float, block: bool
) -> None:
    process = machine.spawn("start", "--head", "--port=0", "--num-cpus=1", STORE, *(["--block"] if block else []))
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert "in main" not in err, err  # before that runs, the interpreter prints what it likes
    if process.returncode == 0 and not block:
        assert "Head started" in out
        assert "stopped" in machine.run("stop").stdout
    else:
        assert process.returncode in (0, 1, 130, -signal.SIGINT), (process.returncode, out, err)
    wait_until(lambda: not processes_of(machine.base), "everything to end", 10.0)


def test_stop_spares_what_programs_started_for_themselves(machine: Machine) -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", "import shoal, sys; shoal.init(num_cpus=1); print('up', flush=True); sys.stdin.read()"],
        env=machine.environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    machine.start("--head", "--port=0", "--num-cpus=1")
    stopped = json.loads(machine.run("stop", "--json").stdout)
    assert [row["outcome"] for row in stopped["stopped"]] == ["stopped"]
    assert stopped["left"] == 1
    assert "1 more belong to running programs" in machine.run("stop").stdout
    assert "no cluster runs on this machine" in machine.run("status").stderr
    assert json.loads(machine.run("stop", "--all", "--json").stdout)["left"] == 0
    program.communicate("")
    assert session.live_nodes(machine.base) == []


def test_stop_with_force_and_a_node_that_does_not_listen(machine: Machine) -> None:
    first = machine.start("--head", "--port=0", "--num-cpus=1")
    done = machine.run("stop", "--force")
    assert f"head {first['address']}: killed" in done.stdout
    machine.check_nothing_left()
    second = machine.start("--head", "--port=0", "--num-cpus=1")
    os.kill(second["pid"], signal.SIGSTOP)
    done = machine.run("stop", "--grace-period=0.2")
    assert (done.returncode, f"head {second['address']}: killed" in done.stdout) == (0, True)
    machine.check_nothing_left()


def test_a_killed_node_leaves_no_process_and_the_next_start_sweeps(machine: Machine) -> None:
    first = machine.start("--head", "--port=0", "--num-cpus=1")
    os.kill(first["pid"], signal.SIGKILL)
    wait_until(lambda: not processes_of(machine.base), "all processes of the node to end", 5.0)
    assert "no cluster runs on this machine" in machine.run("status").stderr
    assert Path(first["token_file"]).exists()
    second = machine.start("--head", f"--port={first['address'].rpartition(':')[2]}", "--num-cpus=1")
    assert second["address"] == first["address"]
    assert not Path(first["token_file"]).exists()
    assert Path(first["logs"], "agent.log").exists()


def test_a_reader_that_has_seen_enough_is_no_error(home: Home) -> None:
    done = home.here.shell(f"{sys.executable} -m shoal.cli.main status -v | head -1; exit ${{PIPESTATUS[0]}}")
    assert done.stdout.startswith("shoal ")
    assert done.stderr == ""
