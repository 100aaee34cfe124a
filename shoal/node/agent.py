"""The agent: one per node, never runs user code, and therefore always answers.

It wires together what this room knows: leases (`LeaseService`), workers (`WorkerPool`), actors (`ActorHost`), objects
(`ObjectManager`), logs, and three kinds of connections: the processes of this node and owners from elsewhere
(`FromProcess`), other agents (`BetweenAgents`), and control (`ClusterLink`). It owns the node's one TCP port and hands
connections that are meant for a worker or for control to those processes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import platform
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from shoal.control import messages as control
from shoal.control.messages import JobInfo, NodeInfo
from shoal.exceptions import ShoalError
from shoal.node import starting
from shoal.node.actors import ActorHost
from shoal.node.cluster_link import ClusterLink
from shoal.node.group_host import GroupHost
from shoal.node.lease_service import LeaseService
from shoal.node.leases import LeaseScheduler
from shoal.node.logs import WorkerLogs
from shoal.node.memory_watch import MemoryWatch, WorkerMemory, private_bytes
from shoal.node.messages import (
    ActorReady,
    AgentHello,
    Allocate,
    BeginUses,
    BetweenAgents,
    Blocked,
    CancelCall,
    CancelResolve,
    ControlMail,
    EndProcess,
    FromProcess,
    GetTaskEvents,
    HandOverEvents,
    JoinNode,
    LeaseDemand,
    Leaving,
    MailFromControl,
    OwnerHello,
    ProcessRegistered,
    Publish,
    ReadStates,
    RegisterDriver,
    Release,
    Resolve,
    ReturnLease,
    RunsLong,
    Seal,
    TaskEvents,
    Unblocked,
    Unpin,
    Unuse,
    WorkerBusy,
    WorkerExit,
    WorkerReady,
)
from shoal.node.object_manager import ObjectManager
from shoal.node.peers import Peers
from shoal.node.settings import AgentSettings
from shoal.node.spill_files import SpillFiles, open_folder, spill_prefix
from shoal.node.task_events import EventCollector
from shoal.node.transfer import Puller, TransferServer
from shoal.node.workers import CLOSED, Worker, WorkerPool
from shoal.objects.arena import Arena, Warmer
from shoal.objects.ids import process_of
from shoal.rpc import aio
from shoal.rpc.frames import make_decoder
from shoal.rpc.messages import Done, Failed, Hello, Message, Refused
from shoal.rpc.sockets import tune
from shoal.scheduling.views import NodeView
from shoal.version import __version__

logger = logging.getLogger(__name__)

TICK_S: Final = 1.0
"""Heartbeat, idle workers, expired waits. Nothing that is urgent waits for it."""

CLOSE_S: Final = 4
"""Closing takes milliseconds; a process that is not gone by then is ended by the kernel."""

_process_decoder = make_decoder(FromProcess | BetweenAgents)


class Process:
    """A driver or worker of this node, or an owner of another node, that speaks with the agent."""

    __slots__ = ("connection", "is_driver", "is_remote", "job_id", "node_id", "worker", "worker_id")

    def __init__(self, connection: aio.Connection, worker_id: bytes) -> None:
        self.connection = connection
        self.worker_id = worker_id
        self.job_id = b""
        self.is_driver = False
        self.is_remote = False
        self.node_id = b""
        self.worker: Worker | None = None


class Agent:
    """See the module. One instance lives for the life of the process."""

    def __init__(self, settings: AgentSettings, zygote: socket.socket, arena: Arena) -> None:
        self._settings = settings
        self.node_id = settings.node_id
        self._loop = asyncio.get_running_loop()
        self.address = settings.address
        self._stop = asyncio.Event()
        self._ending = ""  # why the node ends
        self._processes: dict[bytes, Process] = {}
        self._alive: set[bytes] = set()  # 12-byte id prefixes of this node's processes
        self._tasks: set[asyncio.Task[Any]] = set()

        self.cluster = ClusterLink(
            settings, self._from_control, self._node_gone, self.decide_soon, self._measure, self._lost_control
        )
        self._logs = WorkerLogs(settings.logs, settings.node_ip, self._publish_logs, self._loop)
        cpus = math.ceil(settings.total.get("CPU", 0) / 10_000)
        self.pool = WorkerPool(
            zygote, settings.sockets, self._logs, max(cpus, 1), self._worker_begun, self._worker_ended
        )
        self._prestart = cpus
        self.actors = ActorHost(self)
        groups = self.groups = GroupHost(self)
        self.leases = LeaseService(
            self, settings.total, self.pool, lambda decision: self.actors.takes(decision) or groups.takes(decision)
        )
        peers = self._peers = Peers(settings.node_id, settings.address, settings.token, self.cluster.address_of)
        self._puller = Puller(settings.token, f"agent-{settings.node_id.hex()[:8]}")
        self.objects = ObjectManager(
            settings.node_id, arena, settings.store_bytes, peers, self._puller, self.cluster.address_of,
            self._alive.__contains__, lambda actor_id: self.tell_control(control.ActorOutOfScope(actor_id)),
            SpillFiles([open_folder(where) for where in settings.spill], spill_prefix(settings.node_id)),
        )  # fmt: skip
        self.events = EventCollector(
            settings.node_id, self.pool.workers, lambda: [view.node_id for view in self.cluster.views], peers
        )
        self._transfers = TransferServer(self.objects.pin_for_transfer, self.objects.unpin_from_transfer)
        self._arena = arena
        self._warmer = Warmer(settings.store_bytes)
        self._memory = MemoryWatch(settings.memory_threshold, self._worker_memory, self._end_for_memory)

    # ------------------------------------------------------------------------------------------------- running

    async def run(self, listener: socket.socket, ready: Callable[[str], None]) -> None:
        """Serve until told to stop. `ready("")` is called when the node is part of its cluster, `ready(why not)` if it
        cannot be."""
        settings = self._settings
        self.pool.prestart(self._prestart)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._end, "it was stopped")
        local = await aio.listen_local(
            settings.agent_socket,
            settings.token,
            _process_decoder,
            self._accept,
            name=f"agent-{self.node_id.hex()[:8]}",
        )
        listener.setblocking(False)
        outside = aio.Listener(listener, settings.token, f"node-{self.node_id.hex()[:8]}", self._admit, self._route)
        try:
            await self.cluster.join()
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
                    group.create_task(self._memory.run(), name="watch-memory"),
                ]
                await self._stop.wait()
                signal.alarm(CLOSE_S)  # nobody may be left to end this process if a thread of it hangs
                for helper in helpers:
                    helper.cancel()
        finally:
            self._close(local, outside)

    def _close(self, *listeners: aio.Listener) -> None:
        for listener in listeners:
            listener.close()
        for process in list(self._processes.values()):
            process.connection.send(EndProcess(f"node {self.node_id.hex()[:12]} has ended: {self._ending}"))
            process.connection.close()
        self.pool.close()
        self._logs.close()
        self.cluster.close()
        self._transfers.close()
        self._puller.close()
        self._peers.close()
        self.objects.spiller.close()
        for task in self._tasks:
            task.cancel()

    def _end(self, why: str) -> None:
        if not self._ending:
            self._ending = why
            logger.info("this node ends: %s", why)
            self._stop.set()

    async def _watch_zygote(self) -> None:
        await asyncio.shield(self.pool.lost_zygote)
        self._end("its zygote was killed, and the workers with it")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.objects.tick()
            self.pool.trim()
            if self.scheduler.is_waiting:
                self.decide_soon()
            self.cluster.report(beat=True)

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
            case RegisterDriver():
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
        if isinstance(message, CancelCall):
            self._pass_on(message)
            return
        if isinstance(message, GetTaskEvents):
            self.spawn(self.events.answer(connection, message), "collect-task-events")
            return
        if isinstance(message, TaskEvents):
            return  # too late
        self.objects.from_agent(node_id, connection, message)
        self.report_soon()  # it may have changed what the store holds

    def _pass_on(self, message: CancelCall) -> None:
        """To the owner, or to the agent of its node; an owner that is gone has nothing to cancel."""
        if message.home != self.node_id:
            self._peers.send(message.home, message)
            return
        owner = process_of(message.object_id)
        for process in self._processes.values():
            if process.worker_id.startswith(owner) and not process.is_remote:
                process.connection.send(message)

    # What leases and actors ask of the agent (`Surroundings`, `Host`).

    @property
    def scheduler(self) -> LeaseScheduler:
        return self.leases.scheduler

    def views(self) -> tuple[NodeView, ...]:
        return self.cluster.views

    def address_of(self, node_id: bytes) -> str | None:
        return self.cluster.address_of(node_id)

    async def job(self, job_id: bytes) -> JobInfo:
        return await self.cluster.job(job_id)

    def decide_soon(self) -> None:
        self.leases.decide_soon()

    def end_leases(self, lease_ids: list[int], cause: str) -> None:
        self.leases.end_leases(lease_ids, cause)

    def send_to(self, worker_id: bytes, message: Message) -> bool:
        process = self._processes.get(worker_id)
        if process is not None:
            process.connection.send(message)
        return process is not None

    def assigned(self, worker: Worker, job_id: bytes) -> None:
        process = self._processes.get(worker.worker_id)
        if process is not None:
            process.job_id = job_id

    def _add_process(self, process: Process) -> None:
        self._processes[process.worker_id] = process
        process.connection.on_message = lambda message: self._from_process(process, message)
        process.connection.on_close = lambda _: self._process_gone(process)

    def _register(self, connection: aio.Connection, message: RegisterDriver) -> None:
        process = Process(connection, message.worker_id)
        process.is_driver = True
        self._add_process(process)
        self._alive.add(message.worker_id[:12])
        self.spawn(self._register_driver(process, message), "register-driver")

    def _worker_begun(self, worker: Worker, sock: socket.socket) -> None:
        """The pool has ordered a worker, which will find what we send at the other end of `sock`."""
        tune(sock)
        connection = worker.connection = aio.Connection(_process_decoder, "worker")
        process = Process(connection, worker.worker_id)
        process.worker = worker
        self._add_process(process)
        self._alive.add(worker.worker_id[:12])
        connection.send(JoinNode(self._registration(None)))
        self.spawn(aio.attach(connection, sock), "attach-worker")

    def _registration(self, job: JobInfo | None) -> ProcessRegistered:
        settings = self._settings
        return ProcessRegistered(
            node_id=self.node_id, node_ip=settings.node_ip, node_address=settings.address, arena_path=self._arena.path,
            arena_capacity=settings.store_bytes, session_dir=settings.folder, job=job, node_total=settings.total,
            node_labels=settings.labels, control_address=settings.control_address,
        )  # fmt: skip

    async def _register_driver(self, process: Process, message: RegisterDriver) -> None:
        job = message.job
        if job is None:
            process.connection.reply(message, Failed(kind="bad_request", text="a driver must say what its job is"))
            return
        mine, theirs = (__version__, ".".join(platform.python_version_tuple()[:2])), (message.version, message.python)
        if mine != theirs:
            here, there = (f"shoal {shoal} on Python {python}" for shoal, python in (mine, theirs))
            text = f"the cluster runs {here}, this program {there}"
            process.connection.reply(message, Failed(kind="version", text=text))
            return
        job = msgspec.structs.replace(job, driver_node=self.node_id)
        try:
            answer = await self.cluster.ask(control.RegisterJob(job=job))
        except ShoalError as exc:
            process.connection.reply(message, Failed(kind="control", text=str(exc)))
            return
        process.job_id = answer.job.job_id
        if process.connection.closed.done():  # it left while control was asked, so its end was not told as a driver's
            self.tell_control(control.ProcessGone(process.worker_id, process.job_id, True, "it left during its start"))
            return
        self.cluster.remember_job(answer.job)
        process.connection.reply(message, self._registration(answer.job))

    def _process_gone(self, process: Process) -> None:
        """Its connection closed: it ended, crashed, or was told to go."""
        if self._processes.pop(process.worker_id, None) is None:
            return
        self.leases.drop_owner(process.worker_id)
        if process.is_remote:
            return
        self._alive.discard(process.worker_id[:12])
        self.objects.process_gone(process.worker_id)
        worker = process.worker
        if worker is not None:
            worker.connection = None
            self.pool.end(worker, worker.ending or CLOSED, intended=worker.intended)
        if process.job_id:
            cause = worker.ending if worker is not None else "the driver ended"
            retired = worker is not None and worker.retired
            gone = control.ProcessGone(process.worker_id, process.job_id, process.is_driver, cause, retired)
            self.tell_control(gone)
        if process.is_driver and process.job_id:
            self._end_job(process.job_id)

    # ------------------------------------------------------------------------------------ messages of processes

    def _from_process(self, process: Process, message: Any) -> None:
        objects, who = self.objects, process.worker_id
        match message:
            case LeaseDemand():
                self.leases.demand(who, message, remote=process.is_remote)
            case ReturnLease():
                self.leases.give_back(message)
            case Blocked() | Unblocked():
                if process.worker is not None:  # a driver holds no resources
                    self.leases.set_blocked(process.worker, isinstance(message, Blocked))
            case RunsLong():
                if process.worker is not None:
                    self.leases.set_slow(process.worker)
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
            case BeginUses():
                objects.begin_uses(who, process.connection, message)
            case ReadStates():
                objects.read_states(process.connection, message)
            case Unuse():
                objects.unuse(who, message)
                self.report_soon()
            case ControlMail():
                self.tell_control(control.Relay(who, process.job_id, message.body))
            case WorkerReady():
                if process.worker is not None:
                    self.pool.ready(process.worker, message.pid)
            case ActorReady():
                if process.worker is not None:
                    self.actors.ready(process.worker, message)
            case Leaving():
                if process.worker is not None:
                    process.worker.intended = True
                    process.worker.ending = process.worker.ending or message.cause
                    process.worker.retired = not process.worker.actor_id
            case CancelCall():
                self._pass_on(message)
            case GetTaskEvents():
                self.spawn(self.events.answer(process.connection, message), "collect-task-events")
            case HandOverEvents():
                self.events.keep(message.events)
            case WorkerBusy():
                logger.info("worker=%s task=%s: %s", who.hex()[:12], message.task, message.reason)
            case Done() | Failed() | TaskEvents():
                pass  # an answer to a request that was given up
            case _:
                logger.warning("unexpected message of a process: %s", type(message).__name__)

    def _worker_ended(self, worker: Worker, exit: WorkerExit) -> None:
        """The pool saw a worker's process end."""
        process = self._processes.get(worker.worker_id)
        if process is not None:
            self._process_gone(process)
        if worker.lease_id:
            self.leases.worker_ended(worker, exit)
        if worker.actor_id:
            self.actors.ended(worker, exit)
        self.decide_soon()

    def _worker_memory(self) -> list[WorkerMemory]:
        idle = [
            WorkerMemory(worker.worker_id, worker.pid, "", b"", private_bytes(worker.pid), worker.idle_since, True)
            for worker in self.pool.workers()
            if worker.is_idle
        ]
        return [*idle, *self.leases.memory(), *self.actors.memory()]

    def _end_for_memory(self, worker_id: bytes, why: str) -> None:
        worker = self.pool.find(worker_id)
        if worker is not None:
            worker.out_of_memory = True
            worker.retired = worker.is_idle
            self.pool.end(worker, why, intended=worker.is_idle)

    def _end_job(self, job_id: bytes) -> None:
        """The job's driver has ended: so do its workers here, but for detached actors."""
        self.cluster.forget_job(job_id)
        self.scheduler.drop_job(job_id)
        for worker in self.pool.workers():
            if worker.job_id == job_id and not self.actors.is_detached(worker.actor_id):
                self.pool.end(worker, "its job ended", intended=True)
        self.decide_soon()

    # -------------------------------------------------------------------------------------------- control

    def tell_control(self, message: Message) -> None:
        self.cluster.tell(message)

    def report_soon(self) -> None:
        self.cluster.report_soon()

    def _measure(self) -> tuple[Any, ...]:
        """This node's state, as the fields of a `NodeReport`."""
        now = time.time()
        demands = self.scheduler.demand_reports(now)
        demands += starting.reports([*self.leases.starting(), *self.actors.starting()], now)
        scheduler, store = self.scheduler, self.objects.store
        return (
            dict(scheduler.available),
            store.used,
            demands,
            len(self.pool),
            store.spilled_bytes,
            scheduler.bundle_totals(),
        )

    def _lost_control(self, reason: str) -> None:
        self._end(f"it lost the head of its cluster ({reason})")

    def _from_control(self, message: Any) -> None:
        match message:
            case control.StartActor():
                self.actors.start(message)
            case control.StopActor():
                self.actors.stop(message)
            case control.JobEnded():
                self._end_job(message.job_id)
            case control.RelayReply():
                self.send_to(message.worker_id, MailFromControl(message.body))
            case control.PrepareBundles():
                self.groups.prepare(message)
            case control.CommitBundles():
                self.groups.commit(message.group_id)
            case control.ReturnBundles():
                self.groups.give_back(message)
            case control.FlushNodeLogs():
                self._logs.flush_job(message.job_id)
                self.tell_control(control.LogsFlushed(message.number))
            case control.StopNode():
                self._end(f"the head ended it: {message.reason}")
            case _:
                logger.warning("unexpected message of control: %s", type(message).__name__)

    def _node_gone(self, info: NodeInfo) -> None:
        self._peers.forget(info.node_id)
        self._puller.forget(info.address)
        self.objects.node_gone(info.node_id)
        for process in [p for p in self._processes.values() if p.is_remote and p.node_id == info.node_id]:
            process.connection.abort(ShoalError("its node is gone"))

    def _publish_logs(self, entries: list[control.LogLines]) -> None:
        self.tell_control(control.PublishLogs(entries))


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
