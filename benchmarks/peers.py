"""Who takes part: each peer's environment, made on demand from pinned versions, and the command that starts its
worker."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
ENVIRONMENTS: Final = HERE.parent / ".bench"


@dataclass(frozen=True, slots=True)
class Peer:
    """Attributes:
    script: the worker and its own arguments.
    environment: name of the virtual environment under `.bench/`, "" for the one that this process runs in.
    distribution: whose version the report names, "" for the standard library.
    """

    script: tuple[str, ...]
    environment: str = ""
    distribution: str = ""

    def python(self) -> str:
        if not self.environment:
            return sys.executable
        return str(ENVIRONMENTS / self.environment / "bin" / "python")

    def command(self) -> list[str]:
        return [self.python(), str(HERE / self.script[0]), *self.script[1:]]

    def prepare(self) -> None:
        """Make the environment if it is missing or holds other versions.

        Raises:
            RuntimeError: it could not be made; says why in one line.
        """
        if not self.environment:
            return
        folder = ENVIRONMENTS / self.environment
        wanted = (HERE / "peers" / f"{self.environment}.txt").read_text()
        stamp = folder / ".installed"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        venv.create(folder, with_pip=True, clear=True)
        requirements = str(HERE / "peers" / f"{self.environment}.txt")
        install = [self.python(), "-m", "pip", "install", "--quiet", "--require-hashes", "--requirement", requirements]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise RuntimeError((errors or ["pip failed"])[0])
        stamp.write_text(wanted)

    def version(self) -> str:
        """As installed; the interpreter's for the standard library."""
        ask = "import platform; print(platform.python_version())"
        if self.distribution:
            ask = f"import importlib.metadata; print(importlib.metadata.version({self.distribution!r}))"
        return subprocess.run([self.python(), "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


PEERS: Final = {
    "shoal": Peer(("worker_ray.py", "shoal"), distribution="shoal"),
    "ray": Peer(("worker_ray.py", "ray"), environment="ray", distribution="ray"),
    "dask": Peer(("worker_dask.py",), environment="dask", distribution="distributed"),
    "futures": Peer(("worker_pools.py", "futures")),
    "mp.Pool": Peer(("worker_pools.py", "pool")),
    "machine": Peer(("worker_machine.py",)),
}


def worker_environment(run: str, mark: str) -> dict[str, str]:
    """What a worker sees: nothing of the caller's configuration, folders of its own, and the mark it is found by."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TERM") if name in os.environ}
    own = {"HOME": run, "TMPDIR": run, "SHOAL_TMPDIR": f"{run}/shoal", "RAY_TMPDIR": f"{run}/ray", mark: run}
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    return kept | own | quiet
