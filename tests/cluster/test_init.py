"""Programs from their first line to their end: each test is a script of its own, as a user would run it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LIMIT_S = 40
ROOT = Path(__file__).resolve().parents[2]


class Scripts:
    """Runs driver scripts in a folder of their own, in which `nodes()` finds what they left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
        self.env |= {"SHOAL_TMPDIR": str(folder / "shoal"), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}

    def start(self, script: str, **env: str) -> subprocess.Popen[str]:
        path = self.folder / f"script{len(self.started)}.py"
        path.write_text(textwrap.dedent(script))
        process = subprocess.Popen(
            [sys.executable, str(path)], env=self.env | env, cwd=self.folder, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.started.append(process)
        return process

    def run(self, script: str, code: int = 0, **env: str) -> tuple[str, str]:
        """What the script printed on stdout and stderr."""
        process = self.start(script, **env)
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
        return out, err

    def processes(self) -> list[str]:
        """Processes of nodes that these scripts started."""
        needle = f"SHOAL_TMPDIR={self.env['SHOAL_TMPDIR']}\0".encode()
        mine = {process.pid for process in self.started}
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and int(entry.name) not in mine and needle in (entry / "environ").read_bytes():
                    state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append(f"{entry.name} {(entry / 'comm').read_text().strip()}")
            except OSError:
                continue
        return found


@pytest.fixture
def scripts(tmp_path: Path) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path)
    yield scripts
    for process in scripts.started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    assert wait_until(lambda: not scripts.processes(), 10), f"left behind: {scripts.processes()}"


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# --------------------------------------------------------------------------------------------- beginning and ending


def test_a_program_without_init_and_without_shutdown(scripts: Scripts) -> None:
    out, err = scripts.run(
        """
        import shoal

        class Point:
            def __init__(self, x): self.x = x

        FACTOR = 3

        @shoal.remote
        def scale(point):
            return Point(point.x * FACTOR)

        @shoal.remote
        class Counter:
            n = 0
            def add(self, point):
                self.n += point.x
                return self.n

        counter = Counter.remote()
        print(shoal.get([scale.remote(Point(i)) for i in range(3)])[2].x, shoal.get(counter.add.remote(Point(5))))
        """
    )
    assert out == "6 5\n"
    assert err == ""


def test_init_twice_shutdown_twice_and_again(scripts: Scripts) -> None:
    scripts.run(
        """
        import shoal
        assert not shoal.is_initialized()
        shoal.shutdown()
        first = shoal.init(num_cpus=1)
        try:
            shoal.init()
        except RuntimeError as exc:
            assert "already" in str(exc)
        else:
            raise AssertionError
        assert shoal.init(ignore_reinit_error=True)["node_id"] == first["node_id"]
        old = [shoal.put(1), shoal.put(bytes(200_000))]
        shoal.shutdown(); shoal.shutdown()
        assert not shoal.is_initialized()
        with shoal.init(num_cpus=1, namespace="mine") as context:
            assert context["node_id"] != first["node_id"]
            assert shoal.get_runtime_context().namespace == "mine"
            assert shoal.get(shoal.put(2)) == 2
            assert shoal.get(old[0]) == 1  # its value is in this process
            try:
                shoal.get(old[1], timeout=10)
            except shoal.exceptions.ObjectLostError as exc:
                print(exc)
            else:
                raise AssertionError("an object of a cluster that is gone")
        assert not shoal.is_initialized()
        """
    )


def test_references_of_a_cluster_that_is_gone(scripts: Scripts) -> None:
    out, _ = scripts.run(
        """
        import shoal, time
        shoal.init(num_cpus=1)
        @shoal.remote
        def slow():
            time.sleep(60)
        pending = slow.remote()
        @shoal.remote
        def give():
            return [slow.remote()]
        borrowed = shoal.get(give.options(num_cpus=0).remote())[0]
        shoal.shutdown()
        shoal.init(num_cpus=1)
        for ref in (pending, borrowed):
            for call in (lambda: shoal.get(ref, timeout=10), lambda: ref.future().result(10)):
                try:
                    call()
                except shoal.exceptions.ShoalError as exc:
                    print(type(exc).__name__)
        """
    )
    assert out.split() == ["ObjectLostError"] * 4 or set(out.split()) <= {"ObjectLostError", "LocalAgentDiedError"}
    assert len(out.split()) == 4


def test_shutdown_while_threads_wait(scripts: Scripts) -> None:
    out, _ = scripts.run(
        """
        import shoal, threading, time
        shoal.init(num_cpus=1)
        @shoal.remote
        def slow():
            time.sleep(60)
        ref = slow.remote()
        def wait():
            try:
                shoal.get(ref)
            except shoal.exceptions.LocalAgentDiedError as exc:
                print(exc)
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads: thread.start()
        while len(__import__("shoal.runtime.slot").runtime.slot.current.waiters) < 3: time.sleep(0.01)
        shoal.shutdown()
        for thread in threads: thread.join(10); assert not thread.is_alive()
        """
    )
    assert out.count("shutdown() was called") == 3


def test_two_programs_share_a_cluster_by_its_address(scripts: Scripts) -> None:
    head = scripts.start(
        """
        import shoal, sys
        context = shoal.init(num_cpus=2)
        print(context["address"], flush=True)
        sys.stdin.readline()
        """
    )
    assert head.stdout is not None
    address = head.stdout.readline().strip()
    second = """
        import shoal, os
        context = shoal.init(%s)
        @shoal.remote
        def f(): return os.getpid()
        assert shoal.get(f.remote()) != os.getpid()
        print(context["node_id"])
        """
    found = {scripts.run(second % repr(address))[0], scripts.run(second % "", SHOAL_ADDRESS=address)[0]}
    assert len(found) == 1
    _, err = scripts.run(second % f"{address!r}, num_cpus=1", code=1)
    assert "num_cpus cannot be set" in err
    _, err = scripts.run(second % "'127.0.0.1:1'", code=1)
    assert "ConnectionError" in err
    assert "127.0.0.1:1" in err
    head.communicate("\n", timeout=LIMIT_S)
    assert head.returncode == 0


def test_auto_needs_a_cluster(scripts: Scripts) -> None:
    _, err = scripts.run("import shoal; shoal.init('auto')", code=1)
    assert "no cluster runs on this machine" in err


def test_environment_of_the_job(scripts: Scripts) -> None:
    scripts.run(
        """
        import os, shoal
        shoal.init(num_cpus=1, runtime_env={"env_vars": {"A": "job", "B": "job"}}, namespace="space")
        @shoal.remote
        def look(): return os.environ.get("A"), os.environ.get("B"), shoal.get_runtime_context().namespace
        assert shoal.get(look.remote()) == ("job", "job", "space")
        assert shoal.get(look.options(runtime_env={"env_vars": {"B": "task"}}).remote()) == ("job", "task", "space")
        assert "A" not in os.environ
        """
    )


def test_workers_find_the_programs_modules_and_folder(scripts: Scripts) -> None:
    (scripts.folder / "my_module.py").write_text("def f(x):\n    return x + 1\n")
    scripts.run(
        """
        import os, shoal, my_module
        assert shoal.get(shoal.remote(my_module.f).remote(1)) == 2
        assert shoal.get(shoal.remote(os.getcwd).remote()) == os.getcwd()
        """
    )


def test_what_belongs_to_the_program_is_left_alone(scripts: Scripts) -> None:
    scripts.run(
        """
        import logging, os, signal, sys, threading, warnings
        def mine(*_): pass
        signal.signal(signal.SIGTERM, mine)
        def state():
            handlers = {n: signal.getsignal(n) for n in signal.valid_signals() if n not in (9, 19)}
            return (handlers, dict(os.environ), warnings.filters[:], logging.getLogger().handlers[:],
                    logging.getLogger().level, sys.excepthook, threading.excepthook, sys.unraisablehook,
                    sys.stdout, sys.stderr, os.getcwd(), sys.path[:], sys.argv[:], os.umask(0o22))
        before = state()
        import shoal
        assert state() == before
        shoal.init(num_cpus=1)
        assert state() == before
        shoal.get(shoal.remote(lambda: 1).remote())
        assert state() == before
        shoal.shutdown()
        assert state() == before
        assert threading.active_count() == 1, threading.enumerate()
        """
    )


def test_nothing_stays_open_after_shutdown(scripts: Scripts) -> None:
    scripts.run(
        """
        import gc, os, shoal
        def round():
            shoal.init(num_cpus=1)
            f = shoal.remote(lambda: bytes(200_000))
            shoal.get([f.remote() for _ in range(4)])
            shoal.shutdown()
            gc.collect()
            return len(os.listdir("/proc/self/fd"))
        first = round()
        assert [round() for _ in range(3)] == [first] * 3
        """
    )


def test_hooks_at_exit_may_use_the_cluster(scripts: Scripts) -> None:
    out, _ = scripts.run(
        """
        import atexit, shoal
        shoal.init(num_cpus=1)
        f = shoal.remote(lambda x: x + 1)
        atexit.register(lambda: print("late", shoal.get(f.remote(1))))
        """
    )
    assert out == "late 2\n"


def test_an_exception_ends_the_program_as_ever(scripts: Scripts) -> None:
    _, err = scripts.run(
        """
        import shoal
        @shoal.remote
        def fail(): raise ValueError("mine")
        shoal.get(fail.remote())
        """,
        code=1,
    )
    assert "ValueError" in err
    assert "mine" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_killed_leaves_nothing(scripts: Scripts, number: int) -> None:
    process = scripts.start(
        """
        import shoal, time
        shoal.init(num_cpus=2)
        @shoal.remote
        def slow():
            print("runs", flush=True)
            time.sleep(600)
        refs = [slow.remote() for _ in range(2)]
        shoal.get(refs)
        """
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    process.wait(10)
    assert wait_until(lambda: not scripts.processes(), 5)


# ------------------------------------------------------------------------------------------------------------- output


def test_the_last_lines_of_tasks_arrive_before_the_program_ends(scripts: Scripts) -> None:
    for _ in range(3):
        out, err = scripts.run(
            """
            import shoal, sys
            shoal.init(num_cpus=2)
            @shoal.remote
            def speak(i):
                print("line", i)
                print("error", i, file=sys.stderr)
                print("no end", i, end="")
            @shoal.remote
            class Actor:
                def speak(self): print("actor speaks")
            actor = Actor.remote()
            shoal.get([speak.remote(i) for i in range(2)] + [actor.speak.remote()])
            """,
            SHOAL_DEDUP_LOGS="0",
        )
        for i in range(2):
            assert f"line {i}" in out
            assert f"no end {i}" in out
            assert f"error {i}" in err
        assert "(Actor pid=" in out
        assert "actor speaks" in out


def test_output_can_be_switched_off(scripts: Scripts) -> None:
    script = """
        import shoal
        shoal.init(num_cpus=1 %s)
        shoal.get(shoal.remote(lambda: print("hidden")).remote())
        """
    assert scripts.run(script % ", log_to_driver=False") == ("", "")
    assert scripts.run(script % "", SHOAL_LOG_TO_DRIVER="0") == ("", "")
    assert "hidden" in scripts.run(script % "")[0]


def test_shutdown_does_not_wait_for_a_worker_that_is_busy(scripts: Scripts) -> None:
    out, _ = scripts.run(
        """
        import shoal, time
        shoal.init(num_cpus=1)
        @shoal.remote
        def busy():
            print("begun", flush=True)
            while True: pass
        ref = busy.remote()
        shoal.wait([ref], timeout=0.5)
        begin = time.perf_counter()
        shoal.shutdown()
        print("took", time.perf_counter() - begin)
        """
    )
    assert "begun" in out
    assert float(out.rpartition("took ")[2]) < 3


# ------------------------------------------------------------------------------------------------ fork, multiprocessing


def test_a_forked_child_begins_without_a_cluster(scripts: Scripts) -> None:
    out, err = scripts.run(
        """
        import os, shoal, sys
        shoal.init(num_cpus=1)
        f = shoal.remote(lambda x: x + 1)
        ref, big, small = f.remote(1), shoal.put(bytes(500_000)), shoal.put("small")
        value = shoal.get(big)
        pid = os.fork()
        if pid == 0:
            assert not shoal.is_initialized()
            del value
            try:
                ref.future()
            except RuntimeError as exc:
                assert "not connected" in str(exc)
            del ref, big
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert shoal.get(ref) == 2 and len(shoal.get(big)) == 500_000
        pid = os.fork()
        if pid == 0:
            shoal.init(num_cpus=1)
            assert shoal.get(f.remote(5)) == 6
            assert shoal.get(small) == "small"
            for lost in (big,):
                try:
                    shoal.get(lost, timeout=10)
                except shoal.exceptions.ShoalError:
                    pass
                else:
                    raise AssertionError
            shoal.shutdown()
            sys.exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        assert shoal.get(f.remote(6)) == 7
        """
    )
    assert (out, err) == ("", "")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_beside_the_cluster(scripts: Scripts, method: str) -> None:
    out, err = scripts.run(
        f"""
        import multiprocessing, shoal

        def double(x):
            return 2 * x

        if __name__ == "__main__":
            shoal.init(num_cpus=1)
            f = shoal.remote(double)
            with multiprocessing.get_context("{method}").Pool(2) as pool:
                pending = f.remote(1)
                assert pool.map(double, range(10)) == [2 * i for i in range(10)]
                assert shoal.get(pending) == 2
            assert shoal.get([f.remote(i) for i in range(10)]) == [2 * i for i in range(10)]
        """
    )
    assert (out, err) == ("", "")


def test_a_child_that_outlives_a_killed_program_does_not_keep_the_cluster(scripts: Scripts) -> None:
    process = scripts.start(
        """
        import os, shoal, signal, time
        shoal.init(num_cpus=1)
        shoal.get(shoal.remote(lambda: 1).remote())
        pid = os.fork()
        if pid == 0:
            os.closerange(0, 3)
            os.environ.clear()
            time.sleep(600)
        print(pid, flush=True)
        time.sleep(600)
        """
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        gone = wait_until(lambda: not [one for one in scripts.processes() if not one.startswith(f"{child} ")], 5)
    finally:
        os.kill(child, signal.SIGKILL)
    assert gone


# ------------------------------------------------------------------------------------------------------------- Ctrl-C

INTERRUPTED = """
    import shoal, signal, sys, time
    shoal.init(num_cpus=2)

    @shoal.remote
    def small(x):
        return x

    @shoal.remote
    def large(x):
        return bytes(300_000)

    @shoal.remote
    def slow():
        time.sleep(600)

    def submit():
        while True:
            small.remote(1)

    def submit_and_get():
        while True:
            assert shoal.get([small.remote(i) for i in range(20)]) == list(range(20))

    def put_and_get():
        data = bytes(300_000)
        while True:
            ref = shoal.put(data)
            assert len(shoal.get(ref)) == len(data)

    def large_results():
        while True:
            shoal.get(large.remote(bytes(200_000)))

    def borrow():
        f = shoal.remote(lambda: [small.remote(1), large.remote(1)])
        while True:
            shoal.get(shoal.get(f.remote()))

    def wait():
        while True:
            left = [small.remote(i) for i in range(20)]
            while left:
                _, left = shoal.wait(left)

    def blocked():
        shoal.get(slow.options(num_cpus=0).remote())

    work = globals()[sys.argv[1] if len(sys.argv) > 1 else WORK]
    shoal.get([small.remote(1), large.remote(1)])
    print("ready", flush=True)
    while True:
        try:
            try:
                work()
            except KeyboardInterrupt:
                line = "interrupted"
        except KeyboardInterrupt:
            line = "interrupted"
        # The program goes on working after each.
        assert shoal.get([small.remote(7), small.remote(8)], timeout=20) == [7, 8]
        assert len(shoal.get(large.remote(1), timeout=20)) == 300_000
        print(line, flush=True)
        if sys.stdin.readline() == "end\\n":
            break
    import gc
    gc.collect()
    from shoal.runtime import slot
    deadline = time.monotonic() + 10
    while used := sum(node.store_used for node in slot.current.status().nodes):
        assert time.monotonic() < deadline, f"{used} bytes are still in the store"
        time.sleep(0.02)
    shoal.shutdown()
    print("clean", flush=True)
"""


@pytest.mark.parametrize(
    "work", ["submit", "submit_and_get", "put_and_get", "large_results", "borrow", "wait", "blocked"]
)
def test_ctrl_c_at_any_moment(scripts: Scripts, work: str) -> None:
    process = scripts.start(textwrap.dedent(INTERRUPTED).replace("WORK]", f"{work!r}]"))
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    rounds = 12
    for number in range(rounds):
        time.sleep(random.uniform(0.005, 0.05))
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        line = process.stdout.readline()
        assert line == "interrupted\n", f"{line}{process.communicate(timeout=5)[1]}"
        assert time.monotonic() - sent < 5
        process.stdin.write("end\n" if number == rounds - 1 else "on\n")
        process.stdin.flush()
    out, err = process.communicate(timeout=LIMIT_S)
    assert (out, err) == ("clean\n", "")
    assert process.returncode == 0


def test_ctrl_c_during_init(scripts: Scripts) -> None:
    for _ in range(8):
        process = scripts.start(
            """
            import shoal, sys
            shoal.remote(lambda: 1), shoal.init.__doc__
            print("ready", flush=True)
            try:
                shoal.init(num_cpus=1)
            except KeyboardInterrupt:
                print("interrupted")
                assert not shoal.is_initialized()
                shoal.init(num_cpus=1)
            assert shoal.get(shoal.remote(lambda: 1).remote()) == 1
            shoal.shutdown()
            print("clean")
            """
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.uniform(0, 0.3))
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_S)
        # After init() returned, the interrupt may hit anything: then it ends the program as it should.
        if process.returncode == 0:
            assert out.endswith("clean\n"), err
        else:
            assert "KeyboardInterrupt" in err
        assert "Exception ignored" not in err
        assert wait_until(lambda: not scripts.processes(), 5), scripts.processes()


def test_ctrl_c_ends_a_program_that_does_not_catch_it(scripts: Scripts) -> None:
    process = scripts.start(
        """
        import shoal, time
        @shoal.remote
        def slow():
            print("runs", flush=True)
            time.sleep(600)
        shoal.get(slow.remote())
        """
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 130)
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert wait_until(lambda: not scripts.processes(), 5)


def test_a_handle_of_an_ended_session_says_so(scripts: Scripts) -> None:
    out, _ = scripts.run(
        """
        import shoal
        @shoal.remote
        class Counter:
            def add(self): return 1
        for _ in range(2):
            with shoal.init(num_cpus=1):
                counter = Counter.remote()
                assert shoal.get(counter.add.remote()) == 1
            try:
                counter.add.remote()
            except shoal.exceptions.ActorHandleNotFoundError as error:
                print(error)
        """
    )
    assert out.count("Counter.add.remote(): the handle is of a session that has ended") == 2
