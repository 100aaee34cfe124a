"""Nothing waits silently: what cannot run yet is in `shoal status` with its reason, and gone from it when it runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal import session
from shoal.api.initialize import ClusterContext
from shoal.cli import status as face
from shoal.scheduling.views import WaitReason

LIMIT_S = 30.0
Row = dict[str, Any]


class Status:
    """What `shoal status` says of the local cluster."""

    def __init__(self, context: ClusterContext) -> None:
        self.address: str = context["address"]
        self.token = session.NodeFolder(context["session_dir"]).read_token()
        self.folder = Path(context["session_dir"])

    def data(self) -> dict[str, Any]:
        return face.as_data(face.ask(self.address, self.token, False), self.address)

    def rows(self, name: str) -> list[Row]:
        return [row for row in self.data()["demands"] if row["name"] == name]

    def wait_row(self, name: str, code: str, limit_s: float = LIMIT_S) -> Row:
        """The only row of that name, as soon as it has this reason."""
        deadline = time.monotonic() + limit_s
        while True:
            rows = self.rows(name)
            if [row["reason"]["code"] for row in rows] == [code]:
                return rows[0]
            assert time.monotonic() < deadline, f"waited for {name} to be {code}; it is {rows}"
            time.sleep(0.01)

    def wait_quiet(self, limit_s: float = LIMIT_S) -> None:
        """Until nothing waits, and everything is free."""
        deadline = time.monotonic() + limit_s
        while True:
            data = self.data()
            if not data["demands"] and data["resources"]["available"] == data["resources"]["total"]:
                return
            assert time.monotonic() < deadline, f"still there: {data['demands']}, {data['resources']}"
            time.sleep(0.01)

    def command(self, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", "status", f"--address={self.address}", *words],
            capture_output=True, text=True, timeout=LIMIT_S, check=True, env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        return done.stdout


@pytest.fixture
def status(local: ClusterContext) -> Iterator[Status]:
    made = Status(local)
    yield made
    made.wait_quiet()


class Gate:
    """Holds tasks back until it is opened: they wait for a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self) -> None:
        self.path.write_text("")


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "open")
    yield made
    made.open()


@shoal.remote
def wait_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.01)
    return path


@shoal.remote
def quick() -> int:
    return 1


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.01)


def test_an_idle_cluster_says_that_nothing_waits(status: Status) -> None:
    status.wait_quiet()
    assert "Nothing waits." in status.command()


def test_a_task_that_no_node_can_ever_run_says_so_until_it_is_given_up(status: Status) -> None:
    ref = quick.options(name="huge", num_cpus=64).remote()
    row = status.wait_row("huge", "infeasible")
    assert row["reason"]["text"] == "no node has 64 CPU (the largest has 2)"
    assert row["resources"] == {"CPU": 64.0}
    assert row["count"] == 1
    assert abs(row["since_unix_s"] - time.time()) < LIMIT_S
    text = status.command()
    assert "no node has 64 CPU" in text
    [found] = [row for row in json.loads(status.command("--json"))["demands"] if row["name"] == "huge"]
    assert found["reason"]["code"] == "infeasible"
    shoal.cancel(ref)
    until(lambda: not status.rows("huge"), "the demand to go with its task")


def test_a_resource_that_no_node_has_is_named(status: Status) -> None:
    ref = quick.options(name="odd", resources={"telescope": 1}).remote()
    assert "telescope (none has any)" in status.wait_row("odd", "infeasible")["reason"]["text"]
    shoal.cancel(ref)


def test_tasks_wait_while_all_is_busy_and_are_gone_when_they_run(status: Status, gate: Gate) -> None:
    holding = [wait_for.options(name="holding", num_cpus=1).remote(str(gate.path)) for _ in range(2)]
    until(lambda: status.data()["resources"]["available"].get("CPU", 0) == 0, "both CPUs to be taken")
    waiting = [quick.options(name="waiting", num_cpus=2).remote() for _ in range(3)]
    row = status.wait_row("waiting", "busy")
    assert "2 CPU" in row["reason"]["text"]
    assert "waiting" in status.command()
    gate.open()
    assert shoal.get(waiting, timeout=LIMIT_S) == [1, 1, 1]
    assert len(shoal.get(holding)) == 2
    until(lambda: not status.rows("waiting"), "the demand to go with its tasks")


def test_actors_wait_with_a_reason_too(status: Status, gate: Gate) -> None:
    @shoal.remote
    class Bear:
        def ping(self) -> int:
            return 1

    impossible = Bear.options(resources={"special": 5}).remote()
    row = status.wait_row("Bear", "infeasible")
    assert row["reason"]["text"] == "no node has 5 special (the largest has 2)"
    assert status.data()["actors"]["pending"] == 1
    shoal.kill(impossible)
    until(lambda: not status.rows("Bear"), "the row to go with its actor")

    first = Bear.options(resources={"special": 2}).remote()
    assert shoal.get(first.ping.remote()) == 1
    second = Bear.options(resources={"special": 1}).remote()
    assert "special" in status.wait_row("Bear", "busy")["reason"]["text"]
    assert "Actors:" in status.command()
    shoal.kill(first)
    assert shoal.get(second.ping.remote(), timeout=LIMIT_S) == 1
    until(lambda: not status.rows("Bear"), "the row to go when its actor lives")
    shoal.kill(second)


def test_a_constructor_that_takes_long_is_no_silent_wait(status: Status, gate: Gate) -> None:
    @shoal.remote(num_cpus=1)
    class Slow:
        def __init__(self, path: str) -> None:
            while not os.path.exists(path):
                time.sleep(0.01)

        def pid(self) -> int:
            return os.getpid()

    slow = Slow.remote(str(gate.path))
    row = status.wait_row("Slow", "worker_starting")
    gate.open()
    assert row["reason"]["text"] == f"its constructor runs (pid {shoal.get(slow.pid.remote())})"
    until(lambda: not status.rows("Slow"), "the row to go when the constructor has returned")
    shoal.kill(slow)


def test_a_worker_that_does_not_come_up_is_no_silent_wait(status: Status) -> None:
    """The zygote is stopped, as on a machine that hangs: nobody can fork."""
    [zygote] = [
        int(entry.name)
        for entry in os.scandir("/proc")
        if entry.name.isdigit()
        and comm_of(entry.name) == "shoal::zygote"
        and parent_of(entry.name) == parent_of(str(status.data()["nodes"][0]["pid"]))
    ]
    os.kill(zygote, signal.SIGSTOP)
    try:
        ref = quick.options(name="unborn", runtime_env={"env_vars": {"A_NEW": "environment"}}).remote()
        row = status.wait_row("unborn", "worker_starting")
        assert row["reason"]["text"] == "its worker process is starting"
        assert "its worker process is starting" in status.command()
    finally:
        os.kill(zygote, signal.SIGCONT)
    assert shoal.get(ref, timeout=LIMIT_S) == 1
    until(lambda: not status.rows("unborn"), "the row to go when the task runs")


def comm_of(pid: str) -> str:
    try:
        return Path("/proc", pid, "comm").read_text().strip()
    except OSError:
        return ""


def parent_of(pid: str) -> int:
    try:
        return int(Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def test_what_a_program_leaves_waiting_goes_with_it(status: Status) -> None:
    script = f"""
import shoal, sys
shoal.init({status.address!r}, log_to_driver=False)
@shoal.remote(num_cpus=64)
def never(): pass
@shoal.remote(resources={{"special": 9}})
class Never: pass
refs, actor = [never.remote() for _ in range(5)], Never.remote()
print("up", flush=True)
sys.stdin.read()
"""
    program = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert program.stdout is not None
    assert program.stdout.readline() == b"up\n"
    status.wait_row("never", "infeasible")
    status.wait_row("Never", "infeasible")
    [job] = [job for job in status.data()["jobs"] if job["driver_pid"] == program.pid]
    assert {row["job_id"] for name in ("never", "Never") for row in status.rows(name)} == {job["job_id"]}
    program.kill()
    program.communicate()
    begin = time.monotonic()
    status.wait_quiet()
    assert time.monotonic() - begin < 5.0
    [job] = [job for job in status.data()["jobs"] if job["driver_pid"] == program.pid]
    assert job["ended_unix_s"] is not None


def test_a_thousand_waiting_tasks_are_one_row(status: Status, gate: Gate) -> None:
    holding = wait_for.options(name="holding", num_cpus=2).remote(str(gate.path))
    until(lambda: status.data()["resources"]["available"].get("CPU", 0) == 0, "the CPUs to be taken")
    refs = [quick.options(name="many").remote() for _ in range(1000)]
    row = status.wait_row("many", "busy")
    assert row["count"] >= 1
    gate.open()
    assert sum(shoal.get(refs, timeout=LIMIT_S)) == 1000
    shoal.get(holding)


def test_every_reason_has_a_code_that_is_known(status: Status) -> None:
    documented = (WaitReason.__doc__ or "").partition("Codes:")[2].replace(".", " ").replace(",", " ").split()
    assert {"infeasible", "busy", "worker_starting"} <= set(documented)
