"""The files in tests/typing say, line by line, what a type checker must know; mypy agrees with every line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = ROOT / "tests" / "typing"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Strict, with the plugin, on whatever project configuration there is."""
    path = tmp_path_factory.mktemp("mypy") / "mypy.ini"
    path.write_text(
        "[mypy]\nstrict = True\nwarn_unused_ignores = True\nplugins = shoal.api.mypy_plugin\n"
        f"cache_dir = {path.parent / 'cache'}\n"
        "[mypy-shoal.*]\nignore_errors = True\n"
        "[mypy-cloudpickle.*,uvloop.*,sortedcontainers.*,psutil.*]\nignore_missing_imports = True\n"
    )
    return path


def check(config: Path, *files: Path) -> str:
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=55, cwd=ROOT, check=False)
    return done.stdout + done.stderr


def test_mypy_knows_the_types(config: Path) -> None:
    report = check(config, *sorted(CASES.glob("*.py")))
    assert report.startswith("Success"), report


def test_a_wrong_type_would_be_seen(config: Path, tmp_path: Path) -> None:
    """The test above would pass if nothing was checked at all: see that something is."""
    wrong = tmp_path / "wrong.py"
    wrong.write_text((CASES / "functions.py").read_text().replace("ObjectRef[float])", "ObjectRef[int])"))
    report = check(config, wrong)
    assert 'Expression is of type "ObjectRef[float]", not "ObjectRef[int]"' in report
