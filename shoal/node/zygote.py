"""The zygote: a warm interpreter that forks workers. Single-threaded, so that fork is safe.

Everything a worker needs is imported before the first fork; what all workers have in common is then shared memory, and
a worker costs ~1 ms and a few private MB instead of ~200 ms and ~40 MB for a fresh interpreter.

It hears one datagram per order over a SOCK_SEQPACKET pair from the agent (with the write ends of the worker's stdout
and stderr), and says when a worker was forked and when one ended, with its status: the zygote is their parent. It ends
when the agent does, and the kernel ends its workers with it.
"""

from __future__ import annotations

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

from shoal.node.processes import describe_status, die_with_parent, reset_after_fork, set_title

logger = logging.getLogger(__name__)

_DATAGRAM_BYTES: Final = 1 << 16


class Fork(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Agent -> zygote, with two file descriptors: the worker's stdout and stderr."""

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


FromZygote = Forked | Exited
_orders = msgspec.msgpack.Decoder(Fork)
_encode = msgspec.msgpack.encode
reports_decoder: msgspec.msgpack.Decoder[Forked | Exited] = msgspec.msgpack.Decoder(FromZygote)


def encode_order(worker_id: bytes) -> bytes:
    return _encode(Fork(worker_id))


def run_zygote(sock: socket.socket, run_worker: Callable[[bytes], None]) -> None:
    """Serve the agent at the other end of `sock` until it closes. `run_worker(worker_id)` is the life of a worker; it runs
    in a forked child and its return ends that child."""
    set_title("shoal::zygote")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    wake_in, wake_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_out, warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()  # the collector of a worker never writes to (and so never copies) the pages that came from here
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(wake_in, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake_in:
                os.read(wake_in, 4096)
                _report_exits(sock)
                continue
            data, fds, _, _ = socket.recv_fds(sock, _DATAGRAM_BYTES, 2)
            if not data:
                return
            order = _orders.decode(data)
            try:
                pid = _fork(sock, order, fds, run_worker, (wake_in, wake_out))
                report = Forked(order.worker_id, pid)
            except OSError as exc:
                logger.exception("fork failed")
                report = Forked(order.worker_id, 0, f"cannot start a process: {exc.strerror}")
            finally:
                for received in fds:
                    os.close(received)
            sock.send(_encode(report))


def _report_exits(sock: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        sock.send(_encode(Exited(pid, *describe_status(status))))


def _fork(
    sock: socket.socket, order: Fork, fds: list[int], run_worker: Callable[[bytes], None], wake: tuple[int, int]
) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        die_with_parent(parent)
        reset_after_fork()
        set_title("shoal::IDLE")
        sock.close()
        os.close(wake[0])
        os.close(wake[1])
        os.dup2(fds[0], 1)
        os.dup2(fds[1], 2)
        for fd in fds:
            os.close(fd)
        run_worker(order.worker_id)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code & 0xFF)
