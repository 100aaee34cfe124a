"""The agent: one per node, never runs user code, and therefore always answers.

It wires together what this room knows: leases (`LeaseScheduler`), workers (`WorkerPool`), objects (`ObjectManager`), logs,
and three kinds of connections: the processes of this node and owners from elsewhere (`FromProcess`), other agents
(`BetweenAgents`), and control. It owns the node's one TCP port and hands connections that are meant for a worker or for
control to those processes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import msgspec

from shoal.control import messages as control
from shoal.control.messages import JobInfo, NodeInfo
from shoal.exceptions import ShoalError
from shoal.node.actors import ActorHost
from shoal.node.leases import Grant, LeaseScheduler, Reclaim, Redirect, Wait
from shoal.node.logs import WorkerLogs
from shoal.node.messages import (
    ActorReady,
    AgentHello,
    Allocate,
    BetweenAgents,
    Blocked,
    CancelResolve,
    ControlMail,
    EndProcess,
    FromProcess,
    LeaseDemand,
    LeaseGranted,
    LeaseLost,
    LeaseRedirected,
    LeaseWaiting,
    Leaving,
    MailFromControl,
    OwnerHello,
    ProcessRegistered,
    Publish,
    ReclaimLeases,
    RegisterProcess,
    Release,
    Resolve,
    ReturnLease,
    Seal,
    Unblocked,
    Unpin,
    Unuse,
    Use,
    WorkerAddress,
    WorkerBusy,
    WorkerExit,
)
from shoal.node.object_manager import ObjectManager
from shoal.node.peers import Peers
from shoal.node.transfer import Puller, TransferServer
from shoal.node.workers import CLOSED, Worker, WorkerDiedError, WorkerPool
from shoal.objects.arena import Arena, Warmer
from shoal.rpc import aio
from shoal.rpc.frames import make_decoder
from shoal.rpc.messages import Done, Failed, Hello, Message, Refused
from shoal.rpc.sockets import tune
from shoal.scheduling.views import Amounts, NodeView
from shoal.version import __version__

logger = logging.getLogger(__name__)

TICK_S: Final = 1.0
"""Heartbeat, idle workers, expired waits. Nothing that is urgent waits for it."""
MAX_PAUSE_S: Final = 5.0
"""Longest pause between two tries when workers cannot be started."""
REPORT_S: Final = 0.02
"""Changes of this node travel to control at most this often."""

_process_decoder = make_decoder(FromProcess | BetweenAgents)
_control_decoder = make_decoder(control.ControlMessage)


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that an agent is told at its start."""

    node_id: bytes
    token: bytes
    address: str
    node_ip: str
    folder: str
    logs: str
    sockets: str
    agent_socket: str
    control_socket: str
    control_address: str
    is_head: bool
    total: Amounts
    labels: dict[str, str]
    store_bytes: int


class Process:
    """A driver or worker of this node, or an owner of another node, that speaks with the agent."""

    __slots__ = ("connection", "is_driver", "is_remote", "job_id", "node_id", "pid", "worker", "worker_id")

    def __init__(self, connection: aio.Connection, worker_id: bytes) -> None:
        self.connection = connection
        self.worker_id = worker_id
        self.job_id = b""
        self.pid = 0
        self.is_driver = False
        self.is_remote = False
        self.node_id = b""
        self.worker: Worker | None = None


class _Lease:
    __slots__ = ("class_id", "owner", "worker")

    def __init__(self, owner: bytes, class_id: int) -> None:
        self.owner = owner
        self.class_id = class_id
        self.worker: Worker | None = None


class Agent:
    """See the module. One instance lives for the life of the process."""

    def __init__(self, settings: AgentSettings, zygote: socket.socket, arena: Arena) -> None:
        self._settings = settings
        self.node_id = settings.node_id
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.scheduler = LeaseScheduler(settings.node_id, settings.total, random.Random(settings.node_id))
        self._control: aio.Connection | None = None
        self._nodes: dict[bytes, NodeInfo] = {}
        self._views: tuple[NodeView, ...] = ()
        self._processes: dict[bytes, Process] = {}
        self._alive: set[bytes] = set()  # 12-byte id prefixes of this node's processes
        self._leases: dict[int, _Lease] = {}
        self._jobs: dict[bytes, asyncio.Task[JobInfo]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._deciding = False
        self._failures = 0  # workers that could not be had, in a row
        self._report_due = False
        self._reported: tuple[Any, ...] = ()

        self._logs = WorkerLogs(settings.logs, settings.node_ip, self._publish_logs, self._loop)
        cpus = math.ceil(settings.total.get("CPU", 0) / 10_000)
        self.pool = WorkerPool(zygote, settings.sockets, self._logs, max(cpus, 1), self._worker_ended)
        self._prestart = cpus
        peers = self._peers = Peers(settings.node_id, settings.address, settings.token, self.address_of)
        self._puller = Puller(settings.token, f"agent-{settings.node_id.hex()[:8]}")
        self.objects = ObjectManager(
            settings.node_id, arena, settings.store_bytes, peers, self._puller, self.address_of,
            self._alive.__contains__, lambda actor_id: self.tell_control(control.ActorOutOfScope(actor_id)),
        )  # fmt: skip
        self._transfers = TransferServer(
            arena.fd, self.objects.pin_for_transfer, self.objects.unpin_from_transfer
        )
        self.actors = ActorHost(self)
        self._arena = arena
        self._warmer = Warmer(settings.store_bytes)

    # ------------------------------------------------------------------------------------------------- running

    async def run(self, listener: socket.socket, ready: Callable[[str], None]) -> None:
        """Serve until told to stop. `ready("")` is called when the node is part of its cluster, `ready(why not)` if it
        cannot be."""
        settings = self._settings
        self.pool.prestart(self._prestart)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop.set)
        local = await aio.listen_local(
            settings.agent_socket, settings.token, _process_decoder, self._accept, name=f"agent-{self.node_id.hex()[:8]}"
        )
        listener.setblocking(False)
        outside = aio.Listener(listener, settings.token, f"node-{self.node_id.hex()[:8]}", self._admit, self._route)
        try:
            await self._join()
        except ShoalError as exc:
            logger.error("cannot join the cluster: %s", exc)
            ready(str(exc))
            return
        ready("")
        try:
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(self._tick(), name="tick"),
                    group.create_task(self._warm(), name="warm"),
                    group.create_task(self._watch_zygote(), name="watch-zygote"),
                ]
                await self._stop.wait()
                for helper in helpers:
                    helper.cancel()
        finally:
            self._close(local, outside)

    def _close(self, *listeners: aio.Listener) -> None:
        for listener in listeners:
            listener.close()
        for process in list(self._processes.values()):
            process.connection.send(EndProcess("the node ends"))
            process.connection.close()
        self.pool.close()
        if self._control is not None:
            self._control.close()
        self._logs.close()
        self._transfers.close()
        self._puller.close()
        self._peers.close()
        for task in self._tasks:
            task.cancel()

    async def _join(self) -> None:
        settings = self._settings
        where = f"unix:{settings.control_socket}" if settings.control_socket else settings.control_address
        connection = await aio.connect(
            where, settings.token, _control_decoder, target="control",
            name=f"agent-{self.node_id.hex()[:8]}", on_message=self._from_control,
        )  # fmt: skip
        connection.on_close = self._lost_control
        self._control = connection
        info = NodeInfo(
            self.node_id, settings.address, socket.gethostname(), settings.total, settings.total, settings.labels,
            is_head=settings.is_head, store_capacity=settings.store_bytes, pid=os.getpid(), started_unix_s=time.time(),
        )  # fmt: skip
        python = "%d.%d.%d" % sys.version_info[:3]
        try:
            answer = await connection.request(control.RegisterNode(node=info, python=python, version=__version__), 10.0)
        except TimeoutError as exc:
            raise ShoalError(f"the head at {where} did not answer within 10 s") from exc
        self._nodes_changed(answer.nodes)

    def _lost_control(self, reason: Exception | None) -> None:
        if not self._stop.is_set():
            logger.error("lost the connection to control (%s); this node ends", reason)
            self._stop.set()

    async def _watch_zygote(self) -> None:
        await asyncio.shield(self.pool.lost_zygote)
        logger.error("the zygote ended and took the workers with it; this node ends")
        self._stop.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.objects.store.expire(self._loop.time())
            self.pool.trim()
            if self.scheduler.is_waiting:
                self.decide_soon()
            self._report(beat=True)

    async def _warm(self) -> None:
        """Keep the stretch of the arena that is used next warm, a few MB at a time, without the GIL."""
        while True:
            stretch = self._warmer.next_stretch(self.objects.store.high_water)
            if stretch is None:
                await asyncio.sleep(TICK_S)
            else:
                await self._loop.run_in_executor(None, self._arena.warm, *stretch)

    def spawn(self, coroutine: Any, name: str) -> None:
        """Run `coroutine` as a child of the agent; an exception in it is logged."""
        task = self._loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._child_ended)

    def _child_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s failed", task.get_name(), exc_info=task.exception())

    # --------------------------------------------------------------------------------------------- connections

    def address_of(self, node_id: bytes) -> str | None:
        """Of a node that is alive as far as is known here."""
        info = self._nodes.get(node_id)
        return info.address if info is not None and info.alive else None

    def _admit(self, hello: Hello) -> Refused | None:
        target = hello.target
        if target in ("agent", "transfer") or (target == "control" and self._settings.control_socket):
            return None
        if target == "control":
            head = self._settings.control_address
            return Refused("no_target", f"this node is not the head of its cluster; the head is at {head}")
        if target.startswith("worker:"):
            worker = self._worker_named(target)
            return None if worker is not None else Refused("no_target", "that worker is not on this node any more")
        return Refused("no_target", f"there is no {target!r} here")

    def _worker_named(self, target: str) -> Worker | None:
        try:
            return self.pool.find(bytes.fromhex(target[7:]))
        except ValueError:
            return None

    async def _route(self, sock: socket.socket, hello: Hello) -> None:
        """An authenticated connection on the TCP port goes to whom it is for."""
        if hello.target == "agent":
            connection = aio.Connection(_process_decoder, hello.name)
            self._accept(connection, hello)
            await aio.attach(connection, sock)
        elif hello.target == "transfer":
            self._transfers.serve(sock)
        else:
            path = self._settings.control_socket
            if hello.target != "control":
                worker = self._worker_named(hello.target)
                if worker is None:
                    sock.close()
                    return
                path = worker.socket_path
            await aio.hand_over(sock, path, self._settings.token, hello)

    def _accept(self, connection: aio.Connection, hello: Hello) -> None:
        connection.on_message = lambda message: self._first_message(connection, message)

    def _first_message(self, connection: aio.Connection, message: Any) -> None:
        match message:
            case RegisterProcess():
                self._register(connection, message)
            case OwnerHello():
                process = Process(connection, message.worker_id)
                process.is_remote, process.node_id, process.job_id = True, message.node_id, message.job_id
                self._add_process(process)
            case AgentHello():
                connection.on_message = lambda m: self._from_agent(message.node_id, connection, m)
            case _:
                connection.abort(ShoalError(f"a connection began with {type(message).__name__}"))

    def _from_agent(self, node_id: bytes, connection: aio.Connection, message: Any) -> None:
        self.objects.from_agent(node_id, connection, message)
        self.report_soon()  # it may have changed what the store holds

    def process(self, worker_id: bytes) -> Process | None:
        return self._processes.get(worker_id)

    def _add_process(self, process: Process) -> None:
        self._processes[process.worker_id] = process
        process.connection.on_message = lambda message: self._from_process(process, message)
        process.connection.on_close = lambda _: self._process_gone(process)

    def _register(self, connection: aio.Connection, message: RegisterProcess) -> None:
        process = Process(connection, message.worker_id)
        process.pid, process.is_driver = message.pid, message.is_driver
        if message.is_driver:
            self._add_process(process)
            self._alive.add(message.worker_id[:12])
            self.spawn(self._register_driver(process, message), "register-driver")
            return
        worker = self.pool.registered(message.worker_id, message.pid, connection)
        if worker is None:
            connection.reply(message, Failed(kind="unknown", text="this worker is not expected here"))
            connection.close()
            return
        process.worker = worker
        self._add_process(process)
        self._alive.add(message.worker_id[:12])
        connection.reply(message, self._registration(None))

    def _registration(self, job: JobInfo | None) -> ProcessRegistered:
        settings = self._settings
        return ProcessRegistered(
            node_id=self.node_id, node_ip=settings.node_ip, node_address=settings.address, arena_path=self._arena.path,
            arena_capacity=settings.store_bytes, session_dir=settings.folder, job=job, node_total=settings.total,
        )  # fmt: skip

    async def _register_driver(self, process: Process, message: RegisterProcess) -> None:
        job = message.job
        if job is None or self._control is None:
            process.connection.reply(message, Failed(kind="bad_request", text="a driver must say what its job is"))
            return
        mine, theirs = (__version__, "%d.%d" % sys.version_info[:2]), (message.version, message.python)
        if mine != theirs:
            text = f"the cluster runs shoal {mine[0]} on Python {mine[1]}, this program shoal {theirs[0]} on Python {theirs[1]}"
            process.connection.reply(message, Failed(kind="version", text=text))
            return
        job = msgspec.structs.replace(job, driver_node=self.node_id)
        try:
            answer = await self._control.request(control.RegisterJob(job=job))
        except ShoalError as exc:
            process.connection.reply(message, Failed(kind="control", text=str(exc)))
            return
        process.job_id = answer.job.job_id
        if process.connection.closed.done():  # it left while control was asked, so its end was not told as a driver's
            self.tell_control(control.ProcessGone(process.worker_id, process.job_id, True, "it left during its start"))
            return
        self._jobs[process.job_id] = self._loop.create_task(_value(answer.job))
        process.connection.reply(message, self._registration(answer.job))

    async def job(self, job_id: bytes) -> JobInfo:
        """Raises ShoalError when control does not know the job or it has ended."""
        task = self._jobs.get(job_id)
        if task is None or (task.done() and (task.cancelled() or task.exception() is not None)):
            task = self._jobs[job_id] = self._loop.create_task(self._ask_job(job_id))
        return await asyncio.shield(task)

    async def _ask_job(self, job_id: bytes) -> JobInfo:
        if self._control is None:
            raise ShoalError("this node has lost its cluster")
        answer: control.JobRegistered = await self._control.request(control.GetJob(job_id=job_id))
        return answer.job

    def _process_gone(self, process: Process) -> None:
        """Its connection closed: it ended, crashed, or was told to go."""
        if self._processes.pop(process.worker_id, None) is None:
            return
        self._drop_owner(process.worker_id)
        if process.is_remote:
            return
        self._alive.discard(process.worker_id[:12])
        self.objects.process_gone(process.worker_id)
        worker = process.worker
        if worker is not None:
            worker.connection = None
            self.pool.end(worker, worker.ending or CLOSED, intended=worker.intended)
            self.pool_changed()
        if process.job_id:
            cause = worker.ending if worker is not None else "the driver ended"
            self.tell_control(control.ProcessGone(process.worker_id, process.job_id, process.is_driver, cause))
        if process.is_driver and process.job_id:
            self._end_job(process.job_id)

    def _drop_owner(self, owner: bytes) -> None:
        """Nobody will collect what the owner's leased workers do: end them."""
        for lease_id in self.scheduler.drop_owner(owner):
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.worker is not None:
                self.pool.end(lease.worker, "the process that leased it ended", intended=True)
            else:
                lease.owner = b""  # its worker is still on its way: `_carry_out` sees that nobody waits
        self.decide_soon()

    # ------------------------------------------------------------------------------------ messages of processes

    def _from_process(self, process: Process, message: Any) -> None:
        objects, who = self.objects, process.worker_id
        match message:
            case LeaseDemand():
                self.scheduler.set_demand(
                    who, message.class_id, message.wanted, message.spec, time.time(), redirected=process.is_remote
                )
                self.decide_soon()
            case ReturnLease():
                self._return_lease(message)
            case Blocked() | Unblocked():
                self._set_blocked(process, isinstance(message, Blocked))
            case Allocate():
                objects.allocate(who, process.connection, message)
            case Release():
                objects.release(who, message)
            case Seal():
                objects.seal(who, message)
                self.report_soon()
            case Resolve():
                objects.resolve(who, process.connection, message)
            case CancelResolve():
                objects.cancel_resolve(who, message)
            case Unpin():
                objects.unpin(who, message)
                self.report_soon()
            case Publish():
                objects.publish(who, message)
            case Use():
                objects.use(who, process.connection, message)
            case Unuse():
                objects.unuse(who, message)
                self.report_soon()
            case ControlMail():
                self.tell_control(control.Relay(who, process.job_id, message.body))
            case ActorReady():
                if process.worker is not None:
                    self.actors.ready(process.worker, message)
            case Leaving():
                if process.worker is not None:
                    process.worker.intended = True
                    process.worker.ending = process.worker.ending or message.cause
            case WorkerBusy():
                logger.info("worker=%s task=%s: %s", who.hex()[:12], message.task, message.reason)
            case Done() | Failed():
                pass  # an answer to a request that was given up
            case _:
                logger.warning("unexpected message of a process: %s", type(message).__name__)

    def _set_blocked(self, process: Process, blocked: bool) -> None:
        worker = process.worker
        if worker is None:
            return  # a driver holds no resources
        with suppress(KeyError):  # the lease may have been taken away while it waited
            if worker.actor_id:
                self.scheduler.set_actor_blocked(worker.actor_id, blocked)
            elif worker.lease_id:
                self.scheduler.set_blocked(worker.lease_id, blocked)
        self.decide_soon()

    def _return_lease(self, message: ReturnLease) -> None:
        lease = self._leases.pop(message.lease_id, None)
        if lease is None:
            return  # it ended with its worker
        self.scheduler.release(message.lease_id)
        if lease.worker is not None:
            if message.broken:
                self.pool.end(lease.worker, "its owner could not speak with it", intended=False)
                lease.worker.lease_id = 0
            else:
                self.pool.release(lease.worker)
        self.decide_soon()

    # -------------------------------------------------------------------------------------------- leases

    def pool_changed(self) -> None:
        self.decide_soon()

    def decide_soon(self) -> None:
        """Look at what waits and what is free at the end of this round of the loop."""
        if not self._deciding:
            self._deciding = True
            self._loop.call_soon(self._decide)

    def _decide(self) -> None:
        self._deciding = False
        for decision in self.scheduler.decide(self._views, time.time()):
            if self.actors.takes(decision):
                continue
            match decision:
                case Grant():
                    lease = self._leases[decision.lease_id] = _Lease(decision.owner, decision.class_id)
                    self.spawn(self._carry_out(decision, lease), "grant")
                case Redirect():
                    self._send_owner(
                        decision.owner,
                        LeaseRedirected(
                            decision.class_id, decision.count, decision.node_id, self.address_of(decision.node_id) or ""
                        ),
                    )
                case Wait():
                    self._send_owner(decision.owner, LeaseWaiting(decision.class_id, decision.reason))
                case Reclaim():
                    self._send_owner(decision.owner, ReclaimLeases())
        self.report_soon()

    def _send_owner(self, owner: bytes, message: Message) -> None:
        process = self._processes.get(owner)
        if process is not None:
            process.connection.send(message)

    async def _carry_out(self, grant: Grant, lease: _Lease) -> None:
        """Give the lease a worker and tell its owner. If no worker can be had, the lease is free again."""

        def claim(worker: Worker) -> None:
            worker.lease_id = grant.lease_id
            lease.worker = worker

        try:
            job = await self.job(grant.spec.job_id)
            worker = await self.pool.take(job, grant.spec.env_vars, grant.devices, claim)
        except (ShoalError, WorkerDiedError, OSError) as exc:
            pause_s = min(MAX_PAUSE_S, 0.05 * 2 ** min(self._failures, 10))
            self._failures += 1
            logger.warning(
                "no worker for lease=%s of %s, next try in %.2f s: %s", grant.lease_id, grant.spec.name, pause_s, exc
            )
            await asyncio.sleep(pause_s)  # what keeps a worker from starting has no signal for its end
            if self._leases.pop(grant.lease_id, None) is not None:
                self.scheduler.release(grant.lease_id)  # the class still wants it: it is served again
                self.decide_soon()
            return
        self._failures = 0
        process = self._processes.get(worker.worker_id)
        if process is not None:
            process.job_id = job.job_id
        if grant.lease_id not in self._leases or worker.lease_id != grant.lease_id:
            return
        owner = self._processes.get(lease.owner)
        if owner is None:
            self._return_lease(ReturnLease(grant.lease_id))
            return
        address = WorkerAddress(
            worker.worker_id, self.node_id, self._settings.address, worker.socket_path, worker.pid
        )
        owner.connection.send(LeaseGranted(grant.class_id, grant.lease_id, address, grant.devices))

    def _worker_ended(self, worker: Worker, exit: WorkerExit) -> None:
        """The pool saw a worker's process end."""
        process = self._processes.get(worker.worker_id)
        if process is not None:
            self._process_gone(process)
        if worker.lease_id:
            lease = self._leases.pop(worker.lease_id, None)
            if lease is not None:
                self._send_owner(lease.owner, LeaseLost(worker.lease_id, exit))
                self.scheduler.release(worker.lease_id)
        if worker.actor_id:
            self.actors.ended(worker, exit)
        self.decide_soon()

    def _end_job(self, job_id: bytes) -> None:
        """The job's driver has ended: so do its workers here, but for detached actors."""
        self._jobs.pop(job_id, None)
        self.scheduler.drop_job(job_id)
        for worker in self.pool.workers():
            if worker.job_id == job_id and not self.actors.is_detached(worker.actor_id):
                self.pool.end(worker, "its job ended", intended=True)
        self.decide_soon()

    # -------------------------------------------------------------------------------------------- control

    def tell_control(self, message: Message) -> None:
        if self._control is not None:
            self._control.send(message)

    def _from_control(self, message: Any) -> None:
        match message:
            case control.NodesChanged():
                self._nodes_changed(message.nodes)
            case control.StartActor():
                self.spawn(self.actors.start(message), "start-actor")
            case control.StopActor():
                self.actors.stop(message)
            case control.JobEnded():
                self._end_job(message.job_id)
            case control.RelayReply():
                process = self._processes.get(message.worker_id)
                if process is not None:
                    process.connection.send(MailFromControl(message.body))
            case control.FlushNodeLogs():
                self._logs.flush_job(message.job_id)
                self.tell_control(control.LogsFlushed(message.number))
            case control.StopNode():
                logger.error("control ends this node: %s", message.reason)
                self._stop.set()
            case _:
                logger.warning("unexpected message of control: %s", type(message).__name__)

    def _nodes_changed(self, nodes: list[NodeInfo]) -> None:
        for info in nodes:
            before = self._nodes.get(info.node_id)
            if info.alive:
                self._nodes[info.node_id] = info
            elif before is not None:
                del self._nodes[info.node_id]
                self._node_gone(before)
        # This node's own row is the scheduler's; control's copy of it is only an echo.
        self._views = tuple(info.view() for info in self._nodes.values())
        self.decide_soon()

    def _node_gone(self, info: NodeInfo) -> None:
        self._peers.forget(info.node_id)
        self._puller.forget(info.address)
        self.objects.node_gone(info.node_id)
        for process in [p for p in self._processes.values() if p.is_remote and p.node_id == info.node_id]:
            process.connection.abort(ShoalError("its node is gone"))

    def report_soon(self) -> None:
        if not self._report_due:
            self._report_due = True
            self._loop.call_later(REPORT_S, self._report)

    def _report(self, beat: bool = False) -> None:
        self._report_due = False
        store = self.objects.store
        demands = self.scheduler.demand_reports(time.time())
        now = (dict(self.scheduler.available), store.used, demands, len(self.pool))
        if beat or now != self._reported:
            self._reported = now
            self.tell_control(control.NodeReport(*now))

    def _publish_logs(self, entries: list[control.LogLines]) -> None:
        self.tell_control(control.PublishLogs(entries))


async def _value(job: JobInfo) -> JobInfo:
    return job


def run_agent(
    settings: AgentSettings, listener: socket.socket, zygote: socket.socket, arena: Arena, ready: Callable[[str], None]
) -> None:
    """The agent's process: returns when the node ends."""
    tune(zygote)

    async def main() -> None:
        await Agent(settings, zygote, arena).run(listener, ready)

    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
    else:
        uvloop.run(main())
