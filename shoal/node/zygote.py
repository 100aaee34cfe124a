"""The zygote: a warm interpreter that forks workers. Single-threaded, so that fork is safe.

Everything a worker needs is imported before the first fork; what all workers have in common is then shared memory, and
a worker costs ~1 ms and a few private MB instead of ~200 ms and ~40 MB for a fresh interpreter.

It hears one datagram per order over a SOCK_SEQPACKET pair from the agent (with the write ends of the worker's stdout
and stderr, and the worker's end of a connection to the agent), and says when a worker was forked and when one ended,
with its status: the zygote is their parent. It ends when the agent does, or when it is told to (by SIGTERM, which the
kernel sends when the supervisor dies), and takes the workers with it, and all that those started.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Final

import msgspec

from shoal.node.processes import (
    adopt_orphans,
    children,
    describe_status,
    die_with_parent,
    end_children,
    kill_group,
    reset_after_fork,
    set_title,
)

logger = logging.getLogger(__name__)

_DATAGRAM_BYTES: Final = 1 << 16
_END_S: Final = 3.0
"""How long the zygote waits for killed processes to be gone; only one that hangs in the kernel takes longer."""


class Fork(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Agent -> zygote, with three descriptors: the worker's stdout, stderr and connection to the agent."""

    worker_id: bytes


class Forked(msgspec.Struct, array_like=True, frozen=True, tag=2):
    worker_id: bytes
    pid: int
    error: str = ""  # the fork failed: why; pid is 0


class Exited(msgspec.Struct, array_like=True, frozen=True, tag=3):
    pid: int
    code: int
    signal: int
    text: str


RunWorker = Callable[[bytes, socket.socket], None]
"""The life of a worker, given its id and its connection to the agent; its return ends the process."""

FromZygote = Forked | Exited
_orders = msgspec.msgpack.Decoder(Fork)
_encode = msgspec.msgpack.encode
reports_decoder: msgspec.msgpack.Decoder[Forked | Exited] = msgspec.msgpack.Decoder(FromZygote)


def encode_order(worker_id: bytes) -> bytes:
    return _encode(Fork(worker_id))


def run_zygote(sock: socket.socket, run_worker: RunWorker) -> None:
    """Serve the agent at the other end of `sock` until it closes."""
    set_title("shoal::zygote")
    adopt_orphans()
    workers: set[int] = set()
    told_to_end: list[int] = []
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: told_to_end.append(number))
    signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()  # the collector of a worker never writes to (and so never copies) the pages that came from here
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(wake_in, select.POLLIN)
    try:
        while not told_to_end:
            for fd, _ in poll.poll():
                if fd == wake_in:
                    os.read(wake_in, 4096)
                    _reap(sock, workers)
                elif not _obey(sock, workers, run_worker, (wake_in, wake_out)):
                    return
    except BrokenPipeError:
        logger.info("the agent ended")
    finally:
        for pid in workers:
            kill_group(pid)
        end_children(_END_S)


def _obey(sock: socket.socket, workers: set[int], run_worker: RunWorker, wake: tuple[int, int]) -> bool:
    """Carry out one order; False when there will be no more."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, _DATAGRAM_BYTES, 3)
    except ConnectionResetError:
        return False
    if not data:
        return False
    order = _orders.decode(data)
    try:
        pid = _fork(sock, order, fds, run_worker, wake)
        workers.add(pid)
        report = Forked(order.worker_id, pid)
    except OSError as exc:
        logger.exception("fork failed")
        report = Forked(order.worker_id, 0, f"cannot start a process: {exc.strerror}")
    finally:
        for received in fds:
            os.close(received)
    sock.send(_encode(report))
    return True


def _reap(sock: socket.socket, workers: set[int]) -> None:
    """Report workers that ended; what they left behind in their sessions ends too."""
    ended = set()
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid == 0:
            break
        if pid in workers:  # else it was an orphan
            workers.discard(pid)
            ended.add(pid)
            kill_group(pid)
            sock.send(_encode(Exited(pid, *describe_status(status))))
    if ended:
        for pid in children():
            with contextlib.suppress(ProcessLookupError):
                if pid not in workers and os.getsid(pid) in ended:
                    os.kill(pid, signal.SIGKILL)


def _fork(sock: socket.socket, order: Fork, fds: list[int], run_worker: RunWorker, wake: tuple[int, int]) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        die_with_parent(parent)
        reset_after_fork((signal.SIGTERM, signal.SIGCHLD))
        set_title("shoal::IDLE")
        sock.close()
        os.close(wake[0])
        os.close(wake[1])
        out, err, agent = fds
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        os.set_inheritable(agent, False)
        run_worker(order.worker_id, socket.socket(fileno=agent))
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:  # noqa: BLE001 - the boundary of user code
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code & 0xFF)
