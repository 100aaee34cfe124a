"""The session folder: what is found, what is swept, and which tokens are refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoal import log_config, session
from shoal.session import NodeFolder, NodeRecord, SessionError, TokenMissingError


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    made = session.base_folder(tmp_path / "base")
    yield made
    for folder in session.node_folders(made):
        folder.remove_traces()


@pytest.fixture
def dead_process() -> tuple[int, str]:
    """pid and stamp of a process that has ended and been reaped."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    stamp = session.process_stamp(child.pid)
    child.communicate(b"\n")
    assert stamp
    return child.pid, stamp


def record(started: float = 1.0, **changes: object) -> NodeRecord:
    made = NodeRecord(
        node_id="ab" * 28,
        session="s",
        address="127.0.0.1:1",
        control_address="127.0.0.1:1",
        is_head=True,
        private=False,
        supervisor_pid=os.getpid(),
        supervisor_stamp=session.process_stamp(os.getpid()),
        agent_socket="a",
        control_socket="c",
        started_unix_s=started,
        version="0.1.0",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def add(base: Path, made: NodeRecord) -> NodeFolder:
    folder = session.create_node_folder(base)
    folder.write_token(session.new_token())
    folder.write_info(made)
    return folder


# ------------------------------------------------------------------------------------------------------------ folders


def test_a_node_folder_is_private_and_complete(base: Path) -> None:
    folder = session.create_node_folder(base)
    assert base.stat().st_mode & 0o777 == 0o700
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.logs.is_dir()
    assert folder.sockets.is_dir()
    assert folder.read_info() is None
    folder.write_info(record())
    assert folder.read_info() == record()
    assert folder.info_path.stat().st_mode & 0o777 == 0o600


def test_sockets_have_room_for_a_name_however_long_the_base_is(tmp_path: Path) -> None:
    base = session.base_folder(tmp_path / ("long" * 40))
    folder = session.create_node_folder(base)
    assert len(os.fsencode(folder.sockets)) <= session.MAX_SOCKET_FOLDER_BYTES
    assert folder.sockets.is_dir()
    short = folder.sockets
    folder.remove_traces()
    assert not short.exists()
    assert sorted(os.listdir(folder.path)) == ["logs"]


def test_short_socket_folders_do_not_outlive_their_base(tmp_path: Path) -> None:
    gone = session.create_node_folder(session.base_folder(tmp_path / ("gone" * 40)))
    short = gone.sockets
    gone.path.rename(tmp_path / "elsewhere")
    folder = session.create_node_folder(session.base_folder(tmp_path / ("long" * 40)))
    assert not short.exists()
    assert folder.sockets.is_dir()
    folder.remove_traces()


def test_the_base_comes_from_the_environment(tmp_path: Path) -> None:
    assert session.base_folder(environ={"SHOAL_TMPDIR": str(tmp_path / "mine")}) == tmp_path / "mine"
    assert session.base_folder(environ={}) == Path(f"/tmp/shoal-{os.getuid()}")


def test_a_base_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    open_base = tmp_path / "open"
    open_base.mkdir()
    open_base.chmod(0o777)
    with pytest.raises(SessionError, match="others may write"):
        session.base_folder(open_base)


def test_a_base_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SessionError, match="SHOAL_TMPDIR"):
        session.base_folder(tmp_path / "file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_base_of_somebody_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    os.chown(other, 12345, 12345)
    with pytest.raises(SessionError, match="belongs to you"):
        session.base_folder(other)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"node_id": "a"}'])
def test_a_record_that_cannot_be_read_is_no_record(base: Path, text: str) -> None:
    folder = session.create_node_folder(base)
    folder.info_path.write_text(text)
    assert folder.read_info() is None


# ---------------------------------------------------------------------------------------------------------- processes


def test_a_stamp_tells_processes_apart(dead_process: tuple[int, str]) -> None:
    pid, stamp = dead_process
    assert session.process_stamp(os.getpid()) == session.process_stamp(os.getpid())
    assert stamp != session.process_stamp(os.getpid())
    assert session.process_stamp(pid) == ""
    assert session.process_stamp(0) == session.process_stamp(-1) == ""


def test_a_zombie_is_dead() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, nobody has reaped it
    assert session.process_stamp(child.pid) == ""
    child.wait()


def test_a_recycled_pid_does_not_bring_a_node_back() -> None:
    assert record().is_alive()
    assert not record(supervisor_stamp="12@boot/ns").is_alive()
    assert not record(supervisor_stamp="").is_alive()


# ---------------------------------------------------------------------------------------------------------- discovery


def test_discovery_finds_the_newest_shared_cluster_and_its_head(base: Path, dead_process: tuple[int, str]) -> None:
    assert session.find_cluster(base) is None
    pid, stamp = dead_process
    add(base, record(9.0, address="h:9", supervisor_pid=pid, supervisor_stamp=stamp))
    assert session.find_cluster(base) is None
    add(base, record(1.0, address="h:1", control_address="h:1"))
    head = add(base, record(2.0, address="h:2", control_address="h:2"))
    add(base, record(3.0, address="h:3", control_address="h:2", is_head=False))
    add(base, record(4.0, address="h:4", control_address="h:4", private=True))
    found = session.find_cluster(base)
    assert found is not None
    assert found.folder.path == head.path
    assert [node.record.address for node in session.live_nodes(base)] == ["h:1", "h:2", "h:3", "h:4"]


def test_a_node_of_a_remote_cluster_is_found_too(base: Path) -> None:
    add(base, record(address="h:3", control_address="elsewhere:1", is_head=False))
    found = session.find_cluster(base)
    assert found is not None
    assert found.record.address == "h:3"


def test_nodes_are_found_by_their_own_and_by_their_heads_address(base: Path) -> None:
    add(base, record(1.0, address="h:1", control_address="h:1"))
    add(base, record(2.0, address="h:2", control_address="h:1", is_head=False))
    add(base, record(3.0, address="h:3", control_address="far:1", is_head=False))
    add(base, record(4.0, address="127.0.0.1:4", control_address="127.0.0.1:4"))
    for address, expected in (("h:1", "h:1"), ("h:2", "h:2"), ("far:1", "h:3"), ("localhost:4", "127.0.0.1:4")):
        found = session.find_node(base, address)
        assert found is not None
        assert found.record.address == expected
    assert session.find_node(base, "h:4") is None


# -------------------------------------------------------------------------------------------------------------- sweep


def test_sweeping_leaves_the_living_and_the_logs(base: Path, dead_process: tuple[int, str]) -> None:
    pid, stamp = dead_process
    alive = add(base, record())
    starting = session.create_node_folder(base)
    dead = add(base, record(supervisor_pid=pid, supervisor_stamp=stamp))
    (dead.logs / "agent.log").write_text("why")
    session.sweep(base)
    assert sorted(os.listdir(alive.path)) == ["creator", "logs", "node.json", "s", "token"]
    assert sorted(os.listdir(starting.path)) == ["creator", "logs", "s"]
    assert sorted(os.listdir(dead.path)) == ["logs"]
    assert (dead.logs / "agent.log").read_text() == "why"


def test_nodes_of_another_pid_namespace_are_left_alone(base: Path) -> None:
    boot = session.process_stamp(os.getpid()).partition("@")[2].partition("/")[0]
    folder = add(base, record(supervisor_pid=1, supervisor_stamp=f"5@{boot}/pid:[1]"))
    session.sweep(base)
    assert folder.read_info() is not None
    assert session.live_nodes(base) == []


def test_nodes_of_an_earlier_boot_are_dead(base: Path) -> None:
    folder = add(base, record(supervisor_pid=1, supervisor_stamp="5@earlier-boot/pid:[1]"))
    session.sweep(base)
    assert folder.read_info() is None


def test_log_folders_are_bounded(base: Path, dead_process: tuple[int, str]) -> None:
    pid, stamp = dead_process
    old = time.time() - 3600
    for number in range(session.DEAD_FOLDERS_KEPT + 5):
        path = base / f"20200101T0000{number:02d}_{number:08x}"
        (path / "logs").mkdir(parents=True)
        (path / "creator").write_text(f"{pid} {stamp}\n")
        os.utime(path, (old, old))
    (base / "notes").mkdir()  # not ours: not touched
    session.sweep(base)
    left = sorted(os.listdir(base))
    assert len(left) == session.DEAD_FOLDERS_KEPT + 1
    assert left[0].startswith("20200101T000005")
    assert left[-1] == "notes"


# -------------------------------------------------------------------------------------------------------------- token


def test_the_token_comes_from_the_first_place_that_has_one(base: Path, tmp_path: Path) -> None:
    folder = add(base, record())
    file = tmp_path / "token"
    file.write_text("from-the-file-0123\n")
    file.chmod(0o600)
    both = {"SHOAL_TOKEN": "from-the-environment", "SHOAL_TOKEN_FILE": str(file)}
    assert session.load_token("from-the-argument", folder, both) == "from-the-argument"
    assert session.load_token(None, folder, both) == "from-the-environment"
    assert session.load_token(None, folder, {"SHOAL_TOKEN_FILE": str(file)}) == "from-the-file-0123"
    assert session.load_token(None, folder, {}) == folder.read_token()
    assert session.find_token(base, "127.0.0.1:1", {}) == folder.read_token()
    with pytest.raises(TokenMissingError, match="SHOAL_TOKEN_FILE"):
        session.find_token(base, "127.0.0.1:2", {})


def test_tokens_are_long_random_and_plain() -> None:
    tokens = {session.new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) >= 43 and token.replace("-", "").replace("_", "").isalnum() for token in tokens)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602])
def test_a_token_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "token"
    file.write_text(session.new_token())
    file.chmod(mode)
    with pytest.raises(SessionError, match=r"chmod 600"):
        session.read_token_file(file)


@pytest.mark.parametrize(
    ("content", "match"), [(b"", "at least"), (b"short\n", "at least"), (b"\xff" * 40, "not text")]
)
def test_a_token_file_without_a_token_is_refused(tmp_path: Path, content: bytes, match: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    file.chmod(0o600)
    with pytest.raises(SessionError, match=match):
        session.read_token_file(file)


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="nowhere: No such file"):
        session.load_token(environ={"SHOAL_TOKEN_FILE": str(tmp_path / "nowhere")})


# ---------------------------------------------------------------------------------------------------------- our logs


@pytest.fixture
def restored_loggers() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("shoal")
    before = (root.level, list(root.handlers), ours.level, ours.propagate)
    yield
    for logger in (root, ours):
        for handler in list(logger.handlers):
            if type(handler).__name__ == "_ProcessLog":
                log_config.remove(handler)
    root.setLevel(before[0])
    ours.setLevel(before[2])
    ours.propagate = before[3]


@pytest.mark.usefixtures("restored_loggers")
def test_a_process_of_ours_logs_to_its_file(tmp_path: Path) -> None:
    log_config.configure("agent", tmp_path, "info")
    handler = log_config.configure("agent", tmp_path, "info")  # again: no line twice
    logging.getLogger("shoal.node.agent").info("lease=%s granted", "ab")
    logging.getLogger("shoal.node.agent").debug("not this")
    handler.flush()
    (line,) = (tmp_path / "agent.log").read_text().splitlines()
    assert line.endswith("shoal.node.agent: lease=ab granted")
    assert f" {os.getpid()} " in line
    assert " INFO " in line


@pytest.mark.usefixtures("restored_loggers")
def test_a_drivers_own_logging_is_left_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    handler = log_config.configure("driver-1", tmp_path, "debug", own_process=False)
    assert (root.handlers, root.level) == (handlers, level)
    logging.getLogger("shoal.runtime").debug("ours")
    logging.getLogger("theirs").error("theirs")
    handler.flush()
    assert "ours" in (tmp_path / "driver-1.log").read_text()
    assert "theirs" not in (tmp_path / "driver-1.log").read_text()
    log_config.remove(handler)
    assert logging.getLogger("shoal").handlers == []
    assert logging.getLogger("shoal").propagate


def test_an_unknown_log_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="debug, info, warning"):
        log_config.configure("agent", tmp_path, "loud")
