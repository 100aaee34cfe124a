"""`make bench`: the same workloads on shoal and its peers, in one run, side by side.

Peers take turns in every round, so that what a shared machine does meanwhile hits all of them; a cell is the median of
the rounds. A peer that fails, hangs or is not there costs its own cell and nothing else: its process is ended, the
cell says why, and the rest goes on.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import selectors
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.status import Status

import processes
import report
from peers import HERE, PEERS, worker_environment
from worker import MARK
from workloads import BY_NAME, TITLES, WORKLOADS, YARDSTICKS

START_LIMIT_S = 60.0  # from a worker's start to its first workload, and from its last result to its end


@dataclass
class Results:
    """What has been measured so far, per (peer, workload)."""

    values: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    failures: dict[tuple[str, str], str] = field(default_factory=dict)

    def medians(self) -> dict[tuple[str, str], float]:
        return {key: statistics.median(values) for key, values in self.values.items()}


class Session:
    """One run of the benchmark: `measure` starts workers, one at a time, and fills `results`."""

    def __init__(self, quick: bool, verbose: bool, status: Status) -> None:
        self.results = Results()
        self._quick = quick
        self._verbose = verbose
        self._status = status

    def measure(self, peer: str, names: list[str]) -> None:
        """Run the workloads, those that are fresh each in a worker of their own; whatever goes wrong ends in a cell."""
        left = [name for name in names if (peer, name) not in self.results.failures]
        for name in [name for name in left if BY_NAME[name].fresh]:
            self._run_worker(peer, [name])
            left.remove(name)
        while left:  # a worker that dies is started again for what comes after the workload that killed it
            left = self._run_worker(peer, left)

    def _run_worker(self, peer: str, names: list[str]) -> list[str]:
        """Returns the workloads that the worker did not come to."""
        run = tempfile.mkdtemp(prefix="bench-", dir="/tmp")  # short: sockets below it have at most 107 characters
        command = PEERS[peer].command() + (["--quick"] if self._quick else []) + names
        with open(f"{run}/errors", "w+b") as errors:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=run,
                env=worker_environment(run, processes.MARK),
                start_new_session=True,
            )
            try:
                return self._listen(peer, names, process, Path(errors.name))
            finally:
                processes.end_all(run)
                process.wait()
                shutil.rmtree(run, ignore_errors=True)

    def _listen(self, peer: str, names: list[str], process: subprocess.Popen[bytes], errors: Path) -> list[str]:
        left, current, ended = list(names), "", False
        deadline = time.monotonic() + START_LIMIT_S
        for line in _lines(process):
            if line is not None and line.startswith(MARK):
                event = json.loads(line.removeprefix(MARK))
                if event["event"] == "done":
                    ended = True
                    break
                name = event["name"]
                if event["event"] == "start":
                    current = name
                    self._status.update(f"{TITLES.get(peer, peer)}: {name}")
                    deadline = time.monotonic() + BY_NAME[name].limit_s
                    continue
                if event["event"] == "value":
                    self.results.values[peer, name].append(event["value"])
                else:
                    self.results.failures[peer, name] = event["reason"]
                left.remove(name)
                current, deadline = "", time.monotonic() + START_LIMIT_S
            if time.monotonic() > deadline:
                limit = BY_NAME[current].limit_s if current else START_LIMIT_S
                self._fail(peer, current, left, f"no result within {limit:.0f} s")
                return left
        if ended:
            self._wait_end(process)
        elif left:
            self._fail(peer, current, left, _last_line(errors) or f"the process ended with code {process.wait()}")
            return left
        if self._verbose:
            self._status.console.print(errors.read_text(errors="replace"), style="dim", markup=False)
        return []

    def _fail(self, peer: str, current: str, left: list[str], reason: str) -> None:
        """Blame the workload that ran; when none did, the cluster did not start, and all that were left have failed."""
        for name in [current] if current else list(left):
            self.results.failures[peer, name] = reason
            left.remove(name)

    @staticmethod
    def _wait_end(process: subprocess.Popen[bytes]) -> None:
        """Let the peer stop its cluster by itself; what stays longer is ended by the caller."""
        try:
            process.wait(START_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """Lines of the process's output, None about every second without one, until the process is gone or closes its
    output."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    buffer = b""
    with selectors.DefaultSelector() as selector, process.stdout as stream:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=1.0):
                if process.poll() is not None:
                    return  # its daemons may hold the pipe open
                yield None
                continue
            chunk = stream.read()
            if not chunk:
                return
            *lines, buffer = (buffer + chunk).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)


def _last_line(errors: Path) -> str:
    lines = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def offered(peer: str) -> list[str]:
    """Names of the workloads that the peer's worker has.

    Raises:
        RuntimeError: the worker cannot even say that.
    """
    done = subprocess.run([*PEERS[peer].command(), "--list"], capture_output=True, text=True, check=False, timeout=60)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return list(json.loads(line.removeprefix(MARK))["names"])
    raise RuntimeError((done.stderr.strip().splitlines() or ["it says nothing"])[-1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="one short round: rough numbers in a few minutes")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="(default 3)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="workloads with this in their name; may repeat; * and ? work"
    )
    parser.add_argument("--peers", default=",".join(TITLES), metavar="A,B", help=f"(default {','.join(TITLES)})")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write (default docs/benchmarks.md, after complete runs only)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every single value there")
    parser.add_argument("--verbose", action="store_true", help="show what the workers print on stderr")
    arguments = parser.parse_args()
    chosen = arguments.peers.split(",")
    if unknown := set(chosen) - set(TITLES):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}; there are {', '.join(TITLES)}")
    names = [w.name for w in WORKLOADS if not arguments.only or any(_matches(w.name, only) for only in arguments.only)]
    if not names:
        parser.error("no workload has that name; there are:\n  " + "\n  ".join(w.name for w in WORKLOADS))

    console = Console() if sys.stdout.isatty() else Console(width=160)
    with console.status("starting") as status:
        session = Session(arguments.quick, arguments.verbose, status)
        has: dict[str, list[str]] = {}
        for peer in [*chosen, "machine"]:
            status.update(f"{TITLES.get(peer, peer)}: preparing its environment")
            try:
                PEERS[peer].prepare()
                has[peer] = offered(peer)
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                session.results.failures.update({(peer, name): str(error) for name in names})
        rounds = 1 if arguments.quick else arguments.rounds
        begin = time.monotonic()
        for number in range(rounds):
            session.measure("machine", [yardstick.name for yardstick in YARDSTICKS])
            order = [peer for peer in chosen if peer in has]
            for peer in order[number % len(order) :] + order[: number % len(order)] if order else []:
                session.measure(peer, [name for name in names if name in has[peer]])
        facts = report.Facts(
            versions={peer: PEERS[peer].version() for peer in has},
            rounds=rounds,
            quick=arguments.quick,
            took_s=time.monotonic() - begin,
        )

    results = session.results
    table = report.Table(results.medians(), results.failures, chosen, names)
    console.print(table.for_terminal())
    for line in table.failure_lines():
        console.print(line, style="yellow", markup=False)
    if arguments.json:
        everything = [{"peer": p, "workload": n, "values": v} for (p, n), v in results.values.items()]
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    complete = len(names) == len(WORKLOADS) and set(chosen) == set(TITLES)
    if arguments.output or complete:
        path = arguments.output or HERE.parent / "docs" / "benchmarks.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(table.for_docs(facts))
        console.print(f"wrote {path}")
        if not arguments.output:
            report.refresh_readme(HERE.parent / "README.md", table)
    sys.exit(any(peer == "shoal" for peer, _ in results.failures))


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatch(name, f"*{pattern}*")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
