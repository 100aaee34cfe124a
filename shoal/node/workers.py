"""The agent's worker processes: which there are, whom each belongs to, and how each ends.

A worker is forked by the zygote without knowing whom it will serve (`fresh`), is then assigned to one job and one
environment, and never serves another. It is `idle`, or works under one lease, or is one actor for its life. Workers
that were given devices are not used again, since libraries keep what they opened on a GPU.

Forking costs ~1 ms, so the pool keeps few: as many fresh ones as the node has CPUs from the start, and idle ones up to
the same number; what is idle beyond that for `SPARE_S` ends.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable
from typing import Final

from shoal.control.messages import JobInfo
from shoal.node.logs import WorkerLogs
from shoal.node.messages import AssignJob, EndProcess, WorkerExit
from shoal.node.processes import kill_group
from shoal.node.zygote import Exited, Forked, encode_order, reports_decoder
from shoal.objects.ids import new_worker_id
from shoal.rpc.aio import Connection
from shoal.rpc.messages import Reply

logger = logging.getLogger(__name__)

SPARE_S: Final = 5.0
MAX_PRESTARTED: Final = 16
LEAVE_S: Final = 5.0
IDLE: Final = "it was idle"
CLOSED: Final = "it closed its connection"
"""Why a worker is ended whose connection closed, usually because it is ending already."""

EnvKey = tuple[tuple[str, str], ...]


class Worker:
    """One worker process, from the order to fork it until the zygote says how it ended."""

    __slots__ = (
        "actor_id", "assigned", "connection", "devices", "ending", "env", "idle_since", "incarnation", "intended",
        "job_id", "lease_id", "out_of_memory", "pid", "ready", "retired", "socket_path", "worker_id",
    )  # fmt: skip

    def __init__(self, worker_id: bytes, socket_path: str, ready: asyncio.Future[None]) -> None:
        self.worker_id = worker_id
        self.socket_path = socket_path
        self.ready = ready  # set when it listens; failed when it ended before
        self.pid = 0
        self.connection: Connection | None = None  # from the start: what is sent before it runs waits for it
        self.job_id = b""  # empty while fresh
        self.assigned: asyncio.Future[Reply] | None = None  # its answer to that
        self.env: EnvKey = ()
        self.devices: dict[str, list[int]] = {}
        self.lease_id = 0
        self.actor_id = b""
        self.incarnation = 0
        self.idle_since = 0.0
        self.ending = ""  # why we end it, or why it said it leaves
        self.intended = False  # its end is no crash
        self.out_of_memory = False  # it was ended to get memory back
        self.retired = False  # it ends because there is no more work for it: what it made lives on

    @property
    def is_up(self) -> bool:
        return self.connection is not None and self.ready.done()

    @property
    def is_idle(self) -> bool:
        return not self.lease_id and not self.actor_id and not self.ending and self.is_up


class WorkerDiedError(Exception):
    """A worker ended before it could be used."""


class WorkerPool:
    """See the module.

    Args:
        begun: called with each new worker and the agent's end of its connection; sets `worker.connection`.
        ended: called once for each worker, after its process is gone.
    """

    def __init__(
        self,
        zygote: socket.socket,
        sockets: str,
        logs: WorkerLogs,
        keep_idle: int,
        begun: Callable[[Worker, socket.socket], None],
        ended: Callable[[Worker, WorkerExit], None],
    ) -> None:
        self._zygote = zygote
        self._sockets = sockets
        self._logs = logs
        self._keep_idle = keep_idle
        self._begun = begun
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._workers: dict[bytes, Worker] = {}
        self._by_pid: dict[int, Worker] = {}
        self._lost_zygote: asyncio.Future[None] = self._loop.create_future()
        zygote.setblocking(False)
        self._loop.add_reader(zygote.fileno(), self._hear_zygote)

    @property
    def lost_zygote(self) -> asyncio.Future[None]:
        """Done when the zygote has ended: no worker can be forked any more, and all of them are gone."""
        return self._lost_zygote

    def find(self, worker_id: bytes) -> Worker | None:
        return self._workers.get(worker_id)

    def workers(self) -> Iterable[Worker]:
        return list(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    # -------------------------------------------------------------------------------------------- making workers

    def prestart(self, count: int) -> None:
        for _ in range(min(count, MAX_PRESTARTED)):
            self._fork()

    def _fork(self) -> Worker:
        worker_id = bytes(new_worker_id())
        path = f"{self._sockets}/w-{worker_id[:8].hex()}"
        worker = self._workers[worker_id] = Worker(worker_id, path, self._loop.create_future())
        worker.ready.add_done_callback(lambda future: future.cancelled() or future.exception())  # never "not retrieved"
        out_in, out_out = os.pipe2(os.O_CLOEXEC)
        err_in, err_out = os.pipe2(os.O_CLOEXEC)
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self._zygote, [encode_order(worker_id)], [out_out, err_out, theirs.fileno()])
        except OSError:
            del self._workers[worker_id]
            for fd in (out_in, err_in):
                os.close(fd)
            ours.close()
            raise
        finally:
            os.close(out_out)
            os.close(err_out)
            theirs.close()
        self._logs.attach(worker_id, None, out_in, err_in)
        self._begun(worker, ours)
        return worker

    def ready(self, worker: Worker, pid: int) -> None:
        """The worker's process listens."""
        worker.pid = pid
        worker.idle_since = self._loop.time()
        if not worker.ready.done():
            worker.ready.set_result(None)

    def assign(
        self, job: JobInfo, env_vars: dict[str, str], devices: dict[str, list[int]], claim: Callable[[Worker], None]
    ) -> Worker:
        """A worker of this job and environment. It need not be up yet: what is sent to it now, it will do then.

        Args:
            claim: called first of all, to mark the worker as taken.
        Raises:
            OSError: none can be had.
        """
        worker = self._choose(job.job_id, tuple(sorted(env_vars.items())), bool(devices))
        claim(worker)
        if not worker.job_id:
            assert worker.connection is not None
            worker.job_id = job.job_id
            worker.env = tuple(sorted(env_vars.items()))
            worker.devices = devices
            self._logs.set_job(worker.worker_id, job.job_id, to_driver=job.log_to_driver)
            message = AssignJob(job=job, env_vars={**job.env_vars, **env_vars}, devices=devices)
            worker.assigned = worker.connection.start_request(message)
        return worker

    async def take(
        self, job: JobInfo, env_vars: dict[str, str], devices: dict[str, list[int]], claim: Callable[[Worker], None]
    ) -> Worker:
        """As `assign`, but ready for others, who may connect to it.

        Raises:
            WorkerDiedError: it ended before it was ready.
        """
        worker = self.assign(job, env_vars, devices, claim)
        await worker.ready
        assert worker.assigned is not None
        await worker.assigned
        if worker.connection is None or worker.ending:
            raise WorkerDiedError(worker.ending or "the worker ended")
        return worker

    def _choose(self, job_id: bytes, env: EnvKey, needs_devices: bool) -> Worker:
        """An idle worker of the job, else a fresh one that is up, else one that is on its way, else a new one."""
        fresh: Worker | None = None
        for worker in self._workers.values():
            if worker.lease_id or worker.actor_id or worker.ending:
                continue
            if worker.job_id == job_id and worker.env == env and not worker.devices and not needs_devices:
                if worker.is_up:
                    return worker
            elif not worker.job_id and worker.connection is not None and (fresh is None or not fresh.is_up):
                fresh = worker
        return fresh or self._fork()

    # -------------------------------------------------------------------------------------------- ending workers

    def release(self, worker: Worker) -> None:
        """The lease is over: keep the worker for the next one of its job, or end it."""
        worker.lease_id = 0
        worker.idle_since = self._loop.time()
        if worker.devices:
            worker.retired = True
            self.end(worker, "its devices were given back", intended=True)

    def end(self, worker: Worker, why: str, *, intended: bool) -> None:
        """SIGKILL the worker and everything that it started."""
        worker.ending = worker.ending or why
        worker.intended = worker.intended or intended
        if worker.pid:
            kill_group(worker.pid)

    def trim(self) -> None:
        """Ask workers to leave that have been idle for a while beyond the number that is kept."""
        now = self._loop.time()
        for worker in self.workers():
            if worker.ending == IDLE and now - worker.idle_since > LEAVE_S:
                self.end(worker, IDLE, intended=True)
        idle = sorted((w for w in self._workers.values() if w.is_idle), key=lambda w: w.idle_since)
        for worker in idle[: max(0, len(idle) - self._keep_idle)]:
            if now - worker.idle_since > SPARE_S:
                worker.retired = worker.intended = True
                worker.ending, worker.idle_since = IDLE, now
                assert worker.connection is not None
                worker.connection.send(EndProcess(IDLE))  # it says what it ran (see `task_events`), and goes

    def _hear_zygote(self) -> None:
        while True:
            try:
                data = self._zygote.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._zygote.fileno())
                if not self._lost_zygote.done():
                    self._lost_zygote.set_result(None)
                return
            report = reports_decoder.decode(data)
            if isinstance(report, Forked):
                self._forked(report)
            else:
                self._exited(report)

    def _forked(self, report: Forked) -> None:
        worker = self._workers.get(report.worker_id)
        if worker is None:
            return
        if not report.pid:
            self._gone(worker, WorkerExit(cause=report.error))
            return
        worker.pid = report.pid
        self._by_pid[report.pid] = worker
        self._logs.set_pid(worker.worker_id, report.pid)
        if worker.ending:
            kill_group(report.pid)

    def _exited(self, report: Exited) -> None:
        worker = self._by_pid.pop(report.pid, None)
        if worker is None:
            return
        kill_group(report.pid)  # whatever it started and left behind
        cause = worker.ending
        if cause in ("", CLOSED):  # it closes its connection because it ends: how it ended says more
            cause = report.text
            if report.signal == signal.SIGKILL:
                cause = "killed by SIGKILL: by somebody, or by the kernel because the machine ran out of memory"
        tail = self._logs.tail(worker.worker_id)
        self._gone(worker, WorkerExit(report.code, report.signal, cause, tail, worker.out_of_memory))

    def _gone(self, worker: Worker, exit: WorkerExit) -> None:
        self._workers.pop(worker.worker_id, None)
        self._logs.detach(worker.worker_id)
        try:
            os.unlink(worker.socket_path)
        except FileNotFoundError:
            pass
        if not worker.ready.done():
            worker.ready.set_exception(WorkerDiedError(exit.cause))
        if not worker.intended and (exit.code or exit.signal):
            logger.warning("worker ended worker=%s pid=%s: %s", worker.worker_id.hex()[:12], worker.pid, exit.cause)
        connection, worker.connection = worker.connection, None
        self._ended(worker, exit)
        if connection is not None:
            connection.close()

    def close(self) -> None:
        for worker in self.workers():
            self.end(worker, "the node ends", intended=True)
        self._loop.remove_reader(self._zygote.fileno())
        self._zygote.close()
