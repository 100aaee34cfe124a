"""Programs that nobody wrote for shoal, on real clusters. `make integration` installs them and runs these tests.

Each module begins with `pytest.importorskip`, so that a run without the extra skips it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal
from shoal import session
from shoal.api.initialize import ClusterContext


@pytest.fixture(scope="session", autouse=True)
def private_folder() -> Iterator[Path]:
    """All nodes of this test session live in a folder of its own, and none may outlive it."""
    with tempfile.TemporaryDirectory(prefix="shoal-test-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_TMPDIR", folder)
        yield Path(folder)
        assert not session.live_nodes(Path(folder)), "nodes outlived the tests"


@pytest.fixture(scope="module")
def local() -> Iterator[ClusterContext]:
    """A local cluster with two CPUs, shared by the tests of a module."""
    with shoal.init(num_cpus=2, num_gpus=0, object_store_memory=256 << 20) as context:
        yield context
