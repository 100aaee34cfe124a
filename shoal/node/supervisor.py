"""The supervisor: starts a node's processes, ends them all when one of them ends, and leaves nothing behind.

    supervisor -+- control (head only)
                +- zygote -- workers
                +- agent

It imports what its children need once and forks them, so a node is up in the time of one interpreter start. Children
are bound to it by the kernel (parent-death signal), so even SIGKILL of the supervisor leaves no process; the arena is
an anonymous memory file, so no shared memory can be left either.

It is run by `launch.start_node` with its options on stdin, and reports once on stdout: a `Started` or a `StartFailed`.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Final

import msgspec

from shoal import log_config, session
from shoal.control.server import ControlSettings, run_control
from shoal.exceptions import ShoalError
from shoal.node.agent import run_agent
from shoal.node.processes import (
    adopt_orphans,
    allow_open_files,
    describe_status,
    die_with_parent,
    end_children,
    kill_group,
    reset_after_fork,
    set_title,
)
from shoal.node.settings import AgentSettings, NodeOptions, detect_capacity
from shoal.node.spill_files import check_folder, spill_prefix, sweep_folder
from shoal.node.zygote import RunWorker, run_zygote
from shoal.objects.arena import Arena
from shoal.objects.ids import new_node_id
from shoal.rpc.sockets import join_address, listen_tcp
from shoal.scheduling.labels import NODE_ID
from shoal.version import __version__

logger = logging.getLogger(__name__)

STOP_GRACE_S: Final = 5.0
"""From SIGTERM to SIGKILL of a child: an agent needs milliseconds, a stuck disk may need more."""


ORPHANS_S: Final = 3.0
"""How long to wait for killed leftovers of workers to be gone; only one that hangs in the kernel takes longer."""


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The node is up. `folder` holds its record, token and logs."""

    folder: str


class StartFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The node is not up and everything that was started has ended. `text` is one line for a person."""

    text: str


class Supervisor:
    """The node's one parent; see the module."""

    def __init__(self, options: NodeOptions) -> None:
        self._options = options
        self._children: dict[int, str] = {}
        self._stopping = ""
        self._node_id = b""
        self.failed = False  # a child ended that should not have
        base = session.base_folder(options.temp_dir)
        session.sweep(base)
        self._base = base
        self.folder = session.create_node_folder(base)
        self._wake_in, self._wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ---------------------------------------------------------------------------------------------- starting

    def start(self) -> None:
        """Bring the node up.

        Raises:
            ShoalError, OSError: why not; call `stop` then.
        """
        options = self._options
        log_config.configure("supervisor", self.folder.logs, options.log_level)
        self._catch_signals()
        adopt_orphans()
        capacity = detect_capacity(options)
        for where in options.spill:
            check_folder(where)
        token = self._find_token()
        listener = listen_tcp(options.node_ip, options.port)
        address = join_address(options.node_ip, listener.getsockname()[1])
        arena = Arena.create(capacity.store_bytes)
        sockets = self.folder.sockets
        control_socket = str(sockets / "control") if options.head else ""
        control_address = address if options.head else str(options.address)
        agent_socket = str(sockets / "agent")

        module, _, name = options.worker_entry.partition(":")
        prepare_worker: Callable[[str, bytes], RunWorker] = getattr(importlib.import_module(module), name)
        gc.collect()
        gc.freeze()

        token_bytes = token.encode()
        agent_end, zygote_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        logs = str(self.folder.logs)

        def zygote() -> None:
            agent_end.close()
            listener.close()
            run_zygote(zygote_end, prepare_worker(str(sockets), token_bytes))

        self._fork("zygote", zygote)
        zygote_end.close()
        if options.head:
            settings = ControlSettings(node_timeout_s=options.node_timeout_s)

            def control(ready: Callable[[str], None]) -> None:
                listener.close()  # else peers could connect, to nobody, when the agent has ended
                agent_end.close()
                run_control(token_bytes, control_socket, settings, lambda: ready(""))

            self._fork_and_wait("control", control)
        node_id = self._node_id = new_node_id()
        agent_settings = AgentSettings(
            node_id=node_id,
            token=token_bytes,
            address=address,
            node_ip=options.node_ip,
            folder=str(self.folder.path),
            logs=logs,
            sockets=str(sockets),
            agent_socket=agent_socket,
            control_socket=control_socket,
            control_address=control_address,
            is_head=options.head,
            total=capacity.total,
            labels={**capacity.labels, NODE_ID: node_id.hex()},
            store_bytes=capacity.store_bytes,
            memory_threshold=options.memory_threshold,
            spill=options.spill or [str(self.folder.spill)],
        )
        self._fork_and_wait("agent", lambda ready: run_agent(agent_settings, listener, agent_end, arena, ready))
        agent_end.close()
        listener.close()
        self.folder.write_info(
            session.NodeRecord(
                node_id=node_id.hex(),
                session=self.folder.path.name,
                address=address,
                control_address=control_address,
                is_head=options.head,
                private=options.private,
                supervisor_pid=os.getpid(),
                supervisor_stamp=session.process_stamp(os.getpid()),
                agent_socket=agent_socket,
                control_socket=control_socket,
                started_unix_s=time.time(),
                version=__version__,
            )
        )
        logger.info("node is up node=%s address=%s folder=%s", node_id.hex(), address, self.folder.path)

    def _find_token(self) -> str:
        options = self._options
        if options.token is not None:
            token = session.check_token(options.token, "the given token")
        elif options.head:
            token = session.load_token(None) if _token_in_environment() else session.new_token()
        else:
            token = session.find_token(self._base, str(options.address))
        self.folder.write_token(token)
        return token

    def _fork(self, name: str, run: Callable[[], None]) -> int:
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self._children[pid] = name
            return pid
        code = 1
        try:
            # Those who can end others in order are told that this process died; the rest need not know.
            die_with_parent(parent, signal.SIGTERM if name in ("zygote", "agent") else signal.SIGKILL)
            reset_after_fork((signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP))
            if name != "zygote":  # whose children run user code, which may use select() and its 1024 descriptors
                allow_open_files()
            set_title(f"shoal::{name}")
            os.close(self._wake_in)
            os.close(self._wake_out)
            # The zygote's loggers are its workers': there the root logger is for what user code logs.
            log_config.configure(name, self.folder.logs, self._options.log_level, own_process=name != "zygote")
            run()
            code = 0
        except BaseException:
            logger.exception("%s failed", name)
        finally:
            logging.shutdown()
            os._exit(code)

    def _fork_and_wait(self, name: str, run: Callable[[Callable[[str], None]], None]) -> None:
        """Fork a child and wait until it calls `ready("")`, or `ready(why not)`, or ends."""
        ready_in, ready_out = os.pipe2(os.O_CLOEXEC)

        def ready(problem: str = "") -> None:
            os.write(ready_out, (problem or "ok").encode())
            os.close(ready_out)

        def child() -> None:
            os.close(ready_in)
            run(ready)

        pid = self._fork(name, child)
        os.close(ready_out)
        said = b""
        while part := os.read(ready_in, 4096):
            said += part
        os.close(ready_in)
        if said == b"ok":
            return
        if said:
            raise ShoalError(said.decode())
        _, status = os.waitpid(pid, 0)
        self._children.pop(pid, None)
        why = describe_status(status)[2]
        raise ShoalError(f"the node's {name} ended while it started ({why}); see {self.folder.logs / name}.log")

    # ----------------------------------------------------------------------------------------------- running

    def _catch_signals(self) -> None:
        def note(number: int, _frame: object) -> None:
            if number != signal.SIGCHLD:
                self._stopping = self._stopping or signal.Signals(number).name

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP):
            signal.signal(number, note)
        signal.set_wakeup_fd(self._wake_out, warn_on_full_buffer=False)

    def watch(self) -> None:
        """Return when the node must end: told to, its lifeline closed, or one of its processes ended."""
        poll = select.poll()
        poll.register(self._wake_in, select.POLLIN)
        lifeline = self._options.lifeline_fd
        if lifeline is not None:
            poll.register(lifeline, select.POLLIN)
        while not self._stopping:
            for fd, _ in poll.poll():
                if fd == self._wake_in:
                    os.read(self._wake_in, 4096)
                elif not os.read(lifeline or 0, 4096):
                    self._stopping = "the program that started the node ended"
            for name, why in self._reap():
                level = logging.INFO if why == "exit code 0" else logging.ERROR
                logger.log(level, "%s ended: %s; the node ends too", name, why)
                self._stopping = self._stopping or f"{name} ended ({why})"

    def _reap(self) -> list[tuple[str, str]]:
        ended = []
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            name = self._children.pop(pid, None)
            if name is not None:
                why = describe_status(status)[2]
                # Each of them, not the first only: the zygote notices the end of a killed agent before we do.
                self.failed = self.failed or why not in ("exit code 0", "killed by SIGTERM")
                ended.append((name, why))
        return ended

    # ---------------------------------------------------------------------------------------------- stopping

    def stop(self) -> None:
        """End every child (agent first: it tells the others), then remove all files but the logs."""
        logger.info("node ends: %s", self._stopping or "it could not start")
        deadline = time.monotonic() + STOP_GRACE_S
        for name in ("agent", "control", "zygote"):
            for pid in [pid for pid, child in self._children.items() if child == name]:
                self._end_child(pid, deadline)
        end_children(ORPHANS_S)
        for where in self._options.spill:
            sweep_folder(where, spill_prefix(self._node_id))
        self.folder.remove_traces()

    def _end_child(self, pid: int, deadline: float) -> None:
        os.kill(pid, signal.SIGTERM)
        poll = select.poll()
        poll.register(self._wake_in, select.POLLIN)
        while pid in self._children:
            self._reap()
            left = deadline - time.monotonic()
            if pid not in self._children:
                return
            if left <= 0:
                kill_group(pid)
                os.waitpid(pid, 0)
                del self._children[pid]
                return
            if poll.poll(left * 1000):
                os.read(self._wake_in, 4096)


def _token_in_environment() -> bool:
    return bool(os.environ.get("SHOAL_TOKEN") or os.environ.get("SHOAL_TOKEN_FILE"))


def main() -> int:
    """Entry of the supervisor's process: options as JSON on stdin, one report as JSON on stdout."""
    options = msgspec.json.decode(sys.stdin.buffer.read(), type=NodeOptions)
    report = os.dup(1)
    devnull = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(devnull, fd)  # whoever started us may be gone long before us
    os.close(devnull)
    set_title("shoal::node")
    try:
        supervisor = Supervisor(options)
    except (ShoalError, session.SessionError, OSError) as exc:
        os.write(report, msgspec.json.encode(StartFailed(str(exc))))
        return 1
    try:
        supervisor.start()
    except (ShoalError, session.SessionError, OSError, ImportError) as exc:
        logger.exception("the node could not start")
        supervisor.stop()
        os.write(report, msgspec.json.encode(StartFailed(str(exc))))
        return 1
    os.write(report, msgspec.json.encode(Started(str(supervisor.folder.path))) + b"\n")
    os.close(report)
    supervisor.watch()
    supervisor.stop()
    return int(supervisor.failed)


if __name__ == "__main__":
    sys.exit(main())
