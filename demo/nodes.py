"""A cluster of several nodes on this machine, made with the same command line that a user has, and removed without a
trace.

All files go to one private folder ($SHOAL_TMPDIR), so that nothing here meets another cluster of the same user. The
nodes are found by that folder too: it stands in the environment of each of their processes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

SHOAL = str(Path(sys.executable).with_name("shoal"))


class CommandError(RuntimeError):
    """A `shoal` command failed; carries what it said."""


class LeftoverError(RuntimeError):
    """Something of the cluster was still there after it had stopped; says what."""


class LocalNodes:
    """Use as `with LocalNodes() as nodes: nodes.start_head(...); nodes.start_worker(...)`; the end of the block stops
    them all, however it is reached.

    Attributes:
        folder: of all files; the logs in it stay.
        environment: what a process needs to find the cluster and, once there is a head, to be let in.
        address: "host:port" of the head, once it runs.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-demo-", dir="/tmp"))
        self.environment = {"SHOAL_TMPDIR": str(self.folder)}
        self.address = ""
        self._shared_memory: set[str] = set()

    def start_head(self, *options: str) -> None:
        started = json.loads(self._command("start", "--head", "--port=0", "--json", *options))
        self.address = started["address"]
        self.environment["SHOAL_TOKEN_FILE"] = started["token_file"]

    def start_worker(self, *options: str) -> None:
        self._command("start", f"--address={self.address}", *options)

    # ------------------------------------------------------------------------------------------------------------ end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop everything and look for leftovers; deaf to further Ctrl-C, because half a clean-up is none."""
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._shared_memory |= self._mapped()
            stopped = self._run("stop")
            leftovers = self._leftovers()
            for pid in self._processes():
                os.kill(pid, signal.SIGKILL)
            if leftovers or stopped.returncode:
                raise LeftoverError("\n".join([stopped.stderr.strip(), *leftovers]).strip()) from error
            if not any(path.is_file() for path in self.folder.rglob("*")):
                shutil.rmtree(self.folder)  # it ended before anything started: there are no logs
            elif error is not None:
                print(f"stopped; the logs are in {self.folder}", file=sys.stderr)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _leftovers(self, patience_s: float = 3.0) -> list[str]:
        """What should not be there any more, in words: processes, shared memory, and files that are no logs."""
        deadline = time.monotonic() + patience_s  # a process that was told to end may take a moment to be gone
        while (pids := self._processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        processes = [f"process {pid} is still there: {_command_line(pid)}" for pid in pids]
        memory = [
            f"shared memory is still there: {path}" for path in sorted(self._shared_memory) if Path(path).exists()
        ]
        files = [
            f"file is still there: {path}"
            for path in sorted(self.folder.rglob("*"))
            if not path.is_dir() and "logs" not in path.relative_to(self.folder).parts
        ]
        return [*processes, *memory, *files]

    def _processes(self) -> list[int]:
        """Ids of the living processes that have our folder in their environment, without this one."""
        mark = f"SHOAL_TMPDIR={self.folder}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has just ended, or belongs to somebody else
        return found

    def _mapped(self) -> set[str]:
        """The shared memory files that our processes have mapped."""
        paths: set[str] = set()
        for pid in self._processes():
            try:
                paths.update(re.findall(r"(/dev/shm/\S+)$", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE))
            except OSError:
                continue  # ended meanwhile
        return paths

    # ------------------------------------------------------------------------------------------------------- commands

    def _command(self, *arguments: str) -> str:
        done = self._run(*arguments)
        if done.returncode:
            raise CommandError(f"shoal {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        self._shared_memory |= self._mapped()
        return done.stdout

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `shoal ...`. A Ctrl-C does not cut it short (it could leave half a node behind) but is raised
        afterwards."""
        environment = os.environ | self.environment | {"COLUMNS": "200", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [SHOAL, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            out, err = process.communicate()
        except BaseException:
            process.communicate(timeout=30)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(just ended)"
