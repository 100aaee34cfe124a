"""Start a node from any process: the command line, `init()`, tests. Light to import: no asyncio here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from shoal import session
from shoal.exceptions import ShoalError
from shoal.node.settings import NodeOptions

__all__ = ["NodeOptions", "RunningNode", "spawn_node", "start_node"]

GIVE_UP_S: Final = 2.0
"""How long a node may take to end when its start is interrupted."""


class RunningNode:
    """A node that this process started. `record` says how to reach it."""

    def __init__(
        self, process: subprocess.Popen[bytes], folder: session.NodeFolder, record: session.NodeRecord
    ) -> None:
        self.process = process
        self.folder = folder
        self.record = record

    def stop(self, grace_s: float = 10.0) -> None:
        """End the node and wait for it: politely, then by force. Idempotent."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """End the node as a power cut would: all of it at once, with no last word. What it left on disk goes with the
        next node's start."""
        if self.process.poll() is None:
            pids = _stop_all(self.process.pid)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


class StartingNode:
    """A node whose processes are on their way; do something else meanwhile, then `wait_ready`."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def wait_ready(self) -> RunningNode:
        """Raises ShoalError with one clear line when the node could not start."""
        stdout = self.process.stdout
        assert stdout is not None
        try:
            said = stdout.readline()  # not read(): the node's other processes hold the pipe's other end too
        except BaseException:
            self.process.terminate()  # it removes what it has made so far
            try:
                self.process.wait(GIVE_UP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            raise
        finally:
            stdout.close()
        if not said:
            code = self.process.wait()
            raise ShoalError(f"the node's supervisor ended with code {code} before it said anything")
        report = msgspec.json.decode(said)
        if report["type"] == "failed":
            self.process.wait()
            raise ShoalError(report["text"])
        folder = session.NodeFolder(Path(report["folder"]))
        record = folder.read_info()
        if record is None:
            raise ShoalError(f"the node ended right after its start; see {folder.logs}")
        return RunningNode(self.process, folder, record)


def _stop_all(root: int) -> list[int]:
    """SIGSTOP a process and everything below it, parents first, so that none acts on the end of another; their pids."""
    found = [root]
    for pid in found:  # grows meanwhile
        try:
            os.kill(pid, signal.SIGSTOP)
            for thread in os.listdir(f"/proc/{pid}/task"):
                found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        except OSError:
            continue  # it ended by itself, or this is not Linux
    return found


def spawn_node(options: NodeOptions) -> StartingNode:
    """Start a node's supervisor in a session of its own (a Ctrl-C in this terminal does not reach it).

    Raises:
        SessionError: SHOAL_TOKEN is no token.
    """
    token = os.environ.get("SHOAL_TOKEN")
    if token and options.token is None:
        options = msgspec.structs.replace(options, token=session.check_token(token, "SHOAL_TOKEN"))
    pass_fds = (options.lifeline_fd,) if options.lifeline_fd is not None else ()
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.node.supervisor"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=_environment(),
        start_new_session=True,
        pass_fds=pass_fds,
    )
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(options))
        process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once; `wait_ready` says why
    return StartingNode(process)


def start_node(options: NodeOptions) -> RunningNode:
    """Start a node and wait until it is up.

    Raises:
        ShoalError: it could not start; one clear line.
    """
    return spawn_node(options).wait_ready()


def _environment() -> dict[str, str]:
    """This process's environment, with shoal importable the way it is here.

    The token goes in by the options: the kernel shows a process's first environment to all that its user runs, for as
    long as the process lives, and user code finds its way into crash reports.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    inherited = {name: value for name, value in os.environ.items() if name != "SHOAL_TOKEN"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
