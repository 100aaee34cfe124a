"""What workers print, end to end: from every source in a worker to the driver's own streams and to the log files."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.cluster_utils import Cluster

LIMIT_S = 30.0
FAR = "127.0.0.2"
"""Address of the second node."""


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.01)


class Home:
    """Two nodes, and programs that connect to them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        dropped = ("SHOAL_DEDUP", "PYTHONUNBUFFERED")
        self.environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
        self.environ["ADDRESS"] = cluster.address

    def spawn(self, script: str, **environ: str) -> subprocess.Popen[str]:
        opening = "import os, shoal, sys, time\nshoal.init(os.environ['ADDRESS'])\n"
        return subprocess.Popen(
            [sys.executable, "-c", opening + textwrap.dedent(script)],
            env=self.environ | environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="surrogateescape",
        )  # fmt: skip

    def run(self, script: str, **environ: str) -> tuple[list[str], list[str]]:
        """The lines on stdout and stderr of a program that ends well."""
        process = self.spawn(script, **environ)
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, err
        return lines_of(out), lines_of(err)

    def files(self, suffix: str) -> str:
        """All that is in the worker files of both nodes."""
        found = ""
        for node in self.cluster.list_all_nodes():
            for path in Path(node.logs).glob(f"worker-*{suffix}*"):
                found += path.read_text("utf-8", "replace")
        return found


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "resources": {"near": 8}})
    cluster.add_node(num_cpus=4, resources={"far": 8}, node_ip_address=FAR)
    yield Home(cluster)
    cluster.shutdown()


def lines_of(text: str) -> list[str]:
    """Not `splitlines`, which cuts at more than line feeds."""
    return text.removesuffix("\n").split("\n") if text else []


def without_pids(lines: list[str]) -> list[str]:
    return [re.sub(r"pid=\d+", "pid=N", line) for line in lines]


def test_every_source_in_a_worker_is_shown_with_its_name(home: Home) -> None:
    out, err = home.run("""
        @shoal.remote(resources={"near": 1})
        def speak():
            import ctypes, logging, subprocess, threading
            print("a line", 1, "and more")
            print("an error", file=sys.stderr)
            thread = threading.Thread(target=print, args=("of a thread",))
            thread.start(); thread.join()
            subprocess.run(["sh", "-c", "echo of a child; echo of a child too >&2"])
            os.system("echo of a shell")
            os.write(1, b"of a file descriptor\\n")
            libc = ctypes.CDLL(None); libc.puts(b"of C"); libc.fflush(None)
            logging.warning("of logging")
            print("without an end", end="")

        @shoal.remote(resources={"near": 1})
        class Bear:
            def __init__(self): print("in its constructor")
            def growl(self): print("in its method"); os.system("echo of its child")

        @shoal.remote(resources={"near": 1})
        class Wolf:
            async def howl(self): print("in a coroutine")
            def __repr__(self): return "Wolf(grey)"

        shoal.get(speak.remote())
        bear, wolf = Bear.remote(), Wolf.remote()
        shoal.get([bear.growl.remote(), wolf.howl.remote()])
    """)
    expected = [
        "a line 1 and more", "of a thread", "of a child", "of a shell", "of a file descriptor", "of C",
        "without an end",
    ]  # fmt: skip
    out = without_pids(out)
    assert [line for line in out if line.startswith("(speak ")] == [f"(speak pid=N) {text}" for text in expected]
    assert [line for line in out if line.startswith("(Bear ")] == [
        f"(Bear pid=N) {text}" for text in ("in its constructor", "in its method", "of its child")
    ]
    assert [line for line in out if line.startswith("(Wolf")] == ["(Wolf(grey) pid=N) in a coroutine"]
    assert len(out) == len(expected) + 4
    assert without_pids(err) == [
        f"(speak pid=N) {text}" for text in ("an error", "of a child too", "WARNING:root:of logging")
    ]
    for text in (*expected, "in a coroutine"):
        assert text in home.files(".out")
    assert "an error\nof a child too\nWARNING:root:of logging" in home.files(".err")
    assert "\x1e" not in home.files(".out")


def test_what_a_task_left_behind_gets_no_name_of_another(home: Home) -> None:
    out, _ = home.run("""
        @shoal.remote(resources={"near": 8})
        def first(): print("mine")

        @shoal.remote(resources={"near": 8})
        def second(): os.system("echo of whom")

        shoal.get(first.remote())
        shoal.get(second.remote())
    """)
    assert without_pids(out) == ["(first pid=N) mine", "(pid=N) of whom"]


def test_lines_of_another_node_name_its_address(home: Home) -> None:
    out, err = home.run("""
        @shoal.remote
        def where():
            print("here I am")
            print("and here", file=sys.stderr)
            return os.getpid()

        print(shoal.get([where.options(name="my name", resources={"far": 1}).remote()]))
    """)
    pid = out[0].strip("[]") if out[0].startswith("[") else out[1].strip("[]")
    assert f"(my name pid={pid}, ip={FAR}) here I am" in out
    assert err == [f"(my name pid={pid}, ip={FAR}) and here"]


SAME = """
    import threading

    @shoal.remote(resources={"far": 1}, num_cpus=1)
    class Worker:
        def pid(self): return os.getpid()
        def say(self, text, number): print(text, number)

    workers = [Worker.remote() for _ in range(4)]
    assert len(set(shoal.get([worker.pid.remote() for worker in workers]))) == 4
    shoal.get([worker.say.remote("loading shard", number) for number, worker in enumerate(workers)])
    shoal.get(workers[0].say.remote("only once", 1))
"""


def test_what_many_workers_say_alike_is_said_once(home: Home) -> None:
    out, _ = home.run(SAME)
    shards = [line for line in out if "loading shard" in line]
    assert len(shards) == 2
    assert "repeated" not in shards[0]
    assert re.search(r"loading shard \d \[repeated 3x across cluster\] \(SHOAL_DEDUP_LOGS=0 shows each\)$", shards[1])
    assert len([line for line in out if line.endswith("only once 1")]) == 1
    out, _ = home.run(SAME, SHOAL_DEDUP_LOGS="0")
    assert len([line for line in out if "loading shard" in line]) == 4
    out, _ = home.run(SAME, SHOAL_DEDUP_LOGS_SKIP_REGEX="shard", SHOAL_COLOR_PREFIX="1")
    assert len(out) == 1
    assert out[0].startswith("\x1b[")


def test_unreadable_text_arrives_as_well_as_it_can(home: Home) -> None:
    out, _ = home.run("""
        @shoal.remote(resources={"near": 1})
        def strange():
            sys.stdout.buffer.write(b"bytes \\xff\\xfe\\x00 here\\n"); sys.stdout.flush()
            print("\\u65e5\\u672c \\U0001f600 lone \\udcff")
            print("tab\\tkept \\x1b[31mred\\x1b[0m")
            for percent in range(0, 101, 10): print(f"\\r{percent}%", end="")
            print()
            os.write(1, b"\\x1e\\x1f no mark of ours" + b"." * 300 + b"\\n")
            print("x" * 300_000)
            print()
            print("last")

        shoal.get(strange.remote())
    """)
    texts = [line.partition(") ")[2] for line in out]
    assert texts[0] == "bytes \ufffd\ufffd\0 here"
    assert texts[1] == "\u65e5\u672c \U0001f600 lone \\udcff"
    assert texts[2] == "tab\tkept \x1b[31mred\x1b[0m"
    assert texts[3] == "100%"
    assert "no mark of ours" in texts[4]
    assert texts[-1] == "last"
    assert sum(text.count("x") for text in texts[5:]) == 300_000


def test_streams_that_user_code_closed_or_replaced_end_nothing(home: Home) -> None:
    out, _ = home.run("""
        import io

        @shoal.remote(resources={"near": 1}, max_calls=1)
        def odd(how):
            if how == "closed": sys.stdout.close()
            elif how == "none": sys.stdout = sys.stderr = None
            elif how == "replaced": sys.stdout = io.StringIO(); print("nowhere")
            elif how == "descriptor": os.close(1); os.close(2)
            return how

        for how in ("closed", "none", "replaced", "descriptor", "normal"):
            assert shoal.get(odd.remote(how)) == how
    """)
    assert out == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_flood_stalls_nobody_and_the_file_has_it_all(home: Home, unbuffered: str) -> None:
    before = home.files(".out").count("y" * 90 + "\n")
    script = """
        @shoal.remote(resources={"far": 1})
        def flood(count):
            line = "y" * 90 + "\\n"
            for _ in range(count // 1000): sys.stdout.write(line * 1000)
            print("end of the flood")

        @shoal.remote(resources={"far": 1})
        def quick(): return time.monotonic()

        flooding = flood.remote(100_000)
        slowest = 0.0
        while not shoal.wait([flooding], timeout=0)[0]:
            begin = time.monotonic()
            shoal.get(quick.remote())
            slowest = max(slowest, time.monotonic() - begin)
        sys.stdout.write(f"slowest {slowest}\\n")
    """
    process = home.spawn(script, PYTHONUNBUFFERED=unbuffered)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    lines = lines_of(out)
    [slowest] = [float(line.split()[1]) for line in lines if line.startswith("slowest")]
    assert slowest < 2.0
    assert any(line.endswith("end of the flood") for line in lines)
    shown = sum(line.endswith("yyy") for line in lines)
    dropped = sum(int(number) for number in re.findall(r"\[(\d+) lines ", out + err))
    assert shown + dropped == 100_000
    wait_until(lambda: home.files(".out").count("y" * 90 + "\n") == before + 100_000, "the file to be written")


def test_nothing_is_shown_when_it_is_not_wanted(home: Home) -> None:
    script = """
        @shoal.remote(resources={"near": 1})
        def say(): print("for the file only"); print("errors too", file=sys.stderr)

        shoal.get(say.remote())
    """
    opening = "shoal.shutdown(); shoal.init(os.environ['ADDRESS'], log_to_driver=False)\n"
    assert home.run(opening + textwrap.dedent(script)) == ([], [])
    wait_until(lambda: "for the file only" in home.files(".out"), "the file to be written")
    assert home.run(script, SHOAL_LOG_TO_DRIVER="0") == ([], [])


def test_a_driver_sees_only_its_own_job(home: Home) -> None:
    script = """
        @shoal.remote(resources={"near": 1})
        def say(text): print(text)

        for number in range(20): shoal.get(say.remote(f"{os.environ['WHO']} says {number}"))
    """
    processes = {who: home.spawn(script, WHO=who) for who in ("anna", "bert")}
    for who, process in processes.items():
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, err
        assert [line.partition(") ")[2] for line in lines_of(out)] == [f"{who} says {n}" for n in range(20)]


def test_the_last_words_of_a_worker_are_in_the_error(home: Home) -> None:
    out, _ = home.run("""
        import ctypes, signal

        @shoal.remote(max_retries=0, resources={"near": 1})
        def die(how):
            print("the last thing I did")
            print("and what went wrong", file=sys.stderr)
            print("unfinished", end="")
            sys.stdout.flush()
            if how == "exit": os._exit(7)
            if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
            if how == "abort": os.abort()
            if how == "segv": ctypes.string_at(0)

        for how, said in {"exit": "7", "kill": "SIGKILL", "abort": "SIGABRT", "segv": "SIGSEGV"}.items():
            try:
                shoal.get(die.remote(how))
            except shoal.exceptions.WorkerCrashedError as exc:
                text = str(exc)
                assert said in text, text
                for words in ("the last thing I did", "and what went wrong", "unfinished"):
                    assert words in text, text
                print(f"{how} ok")

        @shoal.remote(resources={"near": 1})
        class Bear:
            def die(self):
                print("the bear falls")
                os._exit(9)

        bear = Bear.remote()
        try:
            shoal.get(bear.die.remote())
        except shoal.exceptions.ActorDiedError as exc:
            assert "9" in str(exc) and "the bear falls" in str(exc), str(exc)
            print("actor ok")
    """)
    assert [line for line in out if line.endswith(" ok")] == ["exit ok", "kill ok", "abort ok", "segv ok", "actor ok"]


def test_the_last_lines_of_a_short_program_are_shown(home: Home) -> None:
    """Also when the program ends at once, and for a task that was still on its way."""
    for _ in range(5):
        out, _ = home.run("""
            @shoal.remote(resources={"far": 1})
            def say(): print("just in time")

            shoal.get(say.remote())
        """)
        assert [line.partition(") ")[2] for line in out] == ["just in time"]


def test_a_reader_that_goes_away_ends_nothing(home: Home) -> None:
    process = home.spawn("""
        @shoal.remote(resources={"near": 1})
        def say(number): print("line", number)

        shoal.get(say.remote(0))
        sys.stdin.readline()
        for number in range(100): shoal.get(say.remote(number))
        os.write(2, b"done\\n")
        shoal.shutdown()
        os._exit(0)
    """)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stderr is not None
    assert process.stdout.readline().endswith("line 0\n")
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stderr.read() == "done\n"
    assert process.wait(LIMIT_S) == 0
    process.stderr.close()
    process.stdin.close()


def test_every_process_of_a_node_has_its_file(home: Home) -> None:
    for node in home.cluster.list_all_nodes():
        names = {path.name for path in Path(node.logs).iterdir()}
        assert {"supervisor.log", "agent.log"} <= names  # the zygote's is made when it has something to say
        assert ("control.log" in names) == node.is_head

    home.run("""
        @shoal.remote
        def say():
            print("so there is something to write")
        shoal.get(say.remote())
        """)
    logs = [Path(node.logs) for node in home.cluster.list_all_nodes()]
    written = [path.name for folder in logs for path in folder.iterdir() if path.name.startswith("worker-")]
    assert any(re.fullmatch(r"worker-[0-9a-f]{8}-\d+\.out", name) for name in written), written
    control = Path(home.cluster.list_all_nodes()[0].logs, "control.log").read_text()
    assert "node joined" in control
    assert "job began" in control
