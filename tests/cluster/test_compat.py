"""Programs that say `import ray` run unchanged: with their own arguments, errors and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

DIVISION = """\
Traceback (most recent call last):
  File "FILE", line 3, in <module>
    f()
  File "FILE", line 2, in f
    1 / 0
    ~~^~~
ZeroDivisionError: division by zero
"""


def run(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal.compat", *arguments],
        cwd=folder, env={**os.environ, **environ}, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def write(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return str(path)


def test_a_program_of_tasks_actors_and_errors(tmp_path: Path) -> None:
    write(
        tmp_path / "app" / "steps.py",
        """
        import ray
        from ray.exceptions import RayTaskError

        @ray.remote
        def inner(x):
            return x * 2

        @ray.remote
        def outer(x):  # pickled by reference: the worker imports this module, and with it ray
            try:
                ray.get(fails.remote())
            except RayTaskError as error:
                assert isinstance(error, KeyError)
            return ray.get(inner.remote(x)) + 1

        @ray.remote
        def fails():
            raise KeyError("no such")

        def twice(x):
            import ray.util
            return ray.put(x) is not None and 2 * x
        """,
    )
    script = write(
        tmp_path / "app" / "main.py",
        """
        import json, sys
        import ray
        import steps

        ray.init(num_cpus=2, include_dashboard=False, namespace="ns")

        @ray.remote
        class Counter:
            def __init__(self):
                self.n = 0

            def add(self, k):
                self.n += k
                return self.n

        counter = Counter.options(name="counter", lifetime="detached").remote()
        ray.get(counter.add.remote(3))
        try:
            ray.get(steps.fails.remote())
        except KeyError as error:
            caught = isinstance(error, ray.exceptions.RayTaskError)
        try:
            ray.get(Counter.remote().add.remote("a"))
        except ray.exceptions.RayError as error:
            kind = type(error.cause).__name__
        refs = [ray.remote(steps.twice).remote(i) for i in range(3)]
        ready, rest = ray.wait(refs, num_returns=3)
        print(json.dumps({
            "outer": ray.get(steps.outer.remote(4)),
            "named": ray.get(ray.get_actor("counter").add.remote(1)),
            "twice": ray.get(ready),
            "caught": caught,
            "kind": kind,
            "context": ray.get_runtime_context().namespace,
            "is_ref": isinstance(refs[0], ray.ObjectRef),
            "argv": sys.argv[1:],
            "name": __name__,
            "version": ray.__version__,
        }))
        """,
    )
    done = run(tmp_path, script, "--flag", "x")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "outer": 9, "named": 4, "twice": [0, 2, 4], "caught": True, "kind": "TypeError", "context": "ns",
        "is_ref": True, "argv": ["--flag", "x"], "name": "__main__", "version": "2.60.0",
    }  # fmt: skip


def test_a_module_and_the_environment(tmp_path: Path) -> None:
    write(
        tmp_path / "pack" / "__main__.py",
        """
        import sys
        import ray
        from . import part

        print(sys.argv, __package__, ray.get(part.where.remote()))
        """,
    )
    write(tmp_path / "pack" / "__init__.py", "")
    write(
        tmp_path / "pack" / "part.py",
        """
        import ray

        @ray.remote(num_cpus=0)
        def where():
            return ray.get_runtime_context().namespace
        """,
    )
    done = run(tmp_path, "-m", "pack", "1", RAY_NAMESPACE="from-the-environment")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"['{tmp_path / 'pack' / '__main__.py'}', '1'] pack from-the-environment\n"


@pytest.mark.parametrize(
    ("source", "code", "output", "complaint"),
    [
        ("import sys\nsys.exit(7)", 7, "", ""),
        ("import sys\nsys.exit('stop')", 1, "", "stop\n"),
        ("raise SystemExit", 0, "", ""),
        (
            "def f():\n    1 / 0\nf()", 1, "",
            DIVISION,
        ),
        ("x = (", 1, "", '  File "FILE", line 1\n    x = (\n        ^\nSyntaxError: \'(\' was never closed\n'),
        ("import atexit\natexit.register(lambda: print(__name__, x))\nx = 1", 0, "__main__ 1\n", ""),
    ],
    ids=["code", "text", "bare", "error", "syntax", "exit handlers"],
)  # fmt: skip
def test_a_script_ends_as_under_the_interpreter(
    tmp_path: Path, source: str, code: int, output: str, complaint: str
) -> None:
    script = write(tmp_path / "s.py", source)
    done = run(tmp_path, script)
    assert (done.returncode, done.stdout, done.stderr) == (code, output, complaint.replace("FILE", script))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nothing.py"], "cannot read nothing.py: No such file or directory"),
        (["-m", "nothing_here"], "there is no module nothing_here that can be run"),
        (["-m"], "-m needs the name of a module"),
        ([], "give a script"),
        (["--fast"], "there is no option --fast"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == f"shoal run: {complaint}"


def test_the_command_runs_it_too(tmp_path: Path) -> None:
    script = write(tmp_path / "s.py", "import ray, sys\nprint(ray.__name__, sys.argv[1:])\nsys.exit(3)")
    done = subprocess.run(
        [sys.executable, "-m", "shoal.cli.main", "run", script, "--help", "-v"],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (3, "ray ['--help', '-v']\n", "")


def test_progress_bars_of_tasks_show_at_the_driver(tmp_path: Path) -> None:
    script = write(
        tmp_path / "s.py",
        """
        import ray
        from ray.experimental.tqdm_ray import tqdm

        @ray.remote
        def work(name):
            for _ in tqdm(range(3), desc=name):
                print("in", name)

        ray.init(num_cpus=2)
        ray.get([work.remote("one"), work.remote("two")])
        """,
    )
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr
    bars = sorted(line.partition(") ")[2][:10] for line in done.stderr.splitlines())
    assert bars == ["one: 100%|", "two: 100%|"]
    assert "in one" in done.stdout
    assert "\x1e" not in done.stdout + done.stderr


def test_a_logging_config_reaches_the_workers(tmp_path: Path) -> None:
    script = write(
        tmp_path / "s.py",
        """
        import logging
        import ray

        @ray.remote
        def work():
            logging.getLogger("app").info("in the task")

        ray.init(num_cpus=1, logging_config=ray.LoggingConfig(encoding="JSON"))
        logging.getLogger("app").info("in the driver")
        ray.get(work.remote())
        """,
    )
    done = run(tmp_path, script)
    assert done.returncode == 0, done.stderr
    driver, task = (json.loads(line) for line in done.stderr.splitlines())
    assert (driver["message"], task["message"], task["task_name"]) == ("in the driver", "in the task", "work")
    assert driver["job_id"] == task["job_id"]
    assert driver["worker_id"] != task["worker_id"]
