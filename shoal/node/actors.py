"""Actors on this node: control decides that one lives here, this gives it a worker and reports what becomes of it.

Control decides by what it was told of the node, and tasks may have taken that since. An actor that finds no room stands
in line with them: it wants one lease of what it needs to be placed, as an owner of its own, and the moment that is
granted, the lease is changed into the actor's resources. After `patience_s` it is refused, and control places it anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator
from typing import Any, Protocol

import msgspec

from shoal.control.messages import ActorFailed, ActorGone, ActorStarted, ActorWaits, JobInfo, StartActor, StopActor
from shoal.exceptions import ShoalError
from shoal.node.lease_decisions import Decision, Grant, Wait
from shoal.node.leases import LeaseScheduler
from shoal.node.memory_watch import WorkerMemory, private_bytes
from shoal.node.messages import ActorReady, BeginActor, EndActor, LeaseSpec, WorkerExit
from shoal.node.starting import Starting
from shoal.node.workers import Worker, WorkerPool
from shoal.rpc.messages import Message
from shoal.scheduling.views import Strategy

logger = logging.getLogger(__name__)

Devices = dict[str, list[int]]


class Host(Protocol):
    """What actors ask of the agent that they are part of."""

    pool: WorkerPool

    @property
    def scheduler(self) -> LeaseScheduler: ...
    async def job(self, job_id: bytes) -> JobInfo: ...
    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None: ...
    def assigned(self, worker: Worker, job_id: bytes) -> None:
        """The worker belongs to this job from now on."""

    def tell_control(self, message: Message) -> None: ...
    def decide_soon(self) -> None: ...


class _Hosted:
    __slots__ = ("devices", "order", "placed_unix_s", "started", "stopping", "timer", "turn", "worker")

    def __init__(self, order: StartActor) -> None:
        self.order = order
        self.worker: Worker | None = None
        self.devices: Devices | None = None  # the resources are held
        self.turn: asyncio.Event | None = None  # set when its turn in the line has come, or it need not wait any more
        self.placed_unix_s = 0.0  # when its turn had come
        self.started = False  # the constructor returned
        self.stopping = ""
        self.timer: asyncio.TimerHandle | None = None


class ActorHost:
    """The agent's actors. All state about one is dropped when its process has ended."""

    def __init__(self, agent: Host) -> None:
        self._agent = agent
        self._actors: dict[bytes, _Hosted] = {}

    def is_detached(self, actor_id: bytes) -> bool:
        hosted = self._actors.get(actor_id)
        return hosted is not None and hosted.order.spec.detached

    def memory(self) -> Iterator[WorkerMemory]:
        """The actors' workers."""
        for hosted in self._actors.values():
            worker, spec = hosted.worker, hosted.order.spec
            if worker is not None and worker.pid:
                yield WorkerMemory(
                    worker.worker_id, worker.pid, spec.class_name, spec.owner_id, private_bytes(worker.pid),
                    hosted.placed_unix_s, spec.max_restarts != 0,
                )  # fmt: skip

    def starting(self) -> Iterator[Starting]:
        """Actors that have their resources and whose constructor has not returned."""
        for hosted in self._actors.values():
            if hosted.placed_unix_s and not hosted.started and not hosted.stopping:
                spec, worker = hosted.order.spec, hosted.worker
                runs = worker is not None and worker.is_up
                text = f"its constructor runs (pid {worker.pid})" if worker and runs else "its process is starting"
                yield Starting(spec.class_name, spec.resources, spec.job_id, hosted.placed_unix_s, text)

    # ------------------------------------------------------------------------------------------------- starting

    def start(self, order: StartActor) -> None:
        """Give the actor a worker and have it run the constructor; the outcome is told by `ready` or `ended`."""
        actor_id = order.spec.actor_id
        if actor_id in self._actors:
            self._refuse(order, "an older life of it is still ending here")
            return
        hosted = self._actors[actor_id] = _Hosted(order)  # now: an order to stop it may come next
        self._agent.spawn(self._start(hosted), "start-actor")

    async def _start(self, hosted: _Hosted) -> None:
        order, agent = hosted.order, self._agent
        spec = order.spec
        if not hosted.stopping:
            hosted.devices = agent.scheduler.acquire_actor(spec.actor_id, spec.placement, spec.resources, spec.strategy)
            if hosted.devices is None and order.patience_s > 0:
                await self._stand_in_line(hosted)
        if hosted.devices is None or hosted.stopping:
            self._forget(spec.actor_id)
            if hosted.stopping:
                agent.tell_control(ActorGone(spec.actor_id, order.incarnation, True, hosted.stopping))
            else:
                self._refuse(order, "the node is busy")
            return

        hosted.placed_unix_s = time.time()

        def claim(worker: Worker) -> None:
            worker.actor_id, worker.incarnation = spec.actor_id, order.incarnation
            hosted.worker = worker

        try:
            job = await agent.job(spec.job_id)
            worker = agent.pool.assign(job, spec.env_vars, hosted.devices, claim)
        except (ShoalError, OSError) as exc:
            self._forget(spec.actor_id)
            kind = "refused" if isinstance(exc, OSError) else "crashed"
            agent.tell_control(ActorFailed(spec.actor_id, order.incarnation, kind, str(exc)))
            return
        agent.assigned(worker, spec.job_id)
        stopped = self._why_stopped(hosted)
        if stopped or worker.connection is None:
            agent.pool.end(worker, stopped or "it ended during its start", intended=True)
            return
        # It may not be up yet. If it ends before it is, that is told as the end of the actor's process.
        worker.connection.send(BeginActor(spec, order.incarnation, order.restarts, order.class_blob, hosted.devices))

    def _why_stopped(self, hosted: _Hosted) -> str:
        return hosted.stopping  # asked here, because it changes while `start` waits

    def _refuse(self, order: StartActor, why: str) -> None:
        self._agent.tell_control(ActorFailed(order.spec.actor_id, order.incarnation, "refused", why))

    async def _stand_in_line(self, hosted: _Hosted) -> None:
        """Wait until `hosted.devices` is given, or `patience_s` is over, or it is stopped."""
        spec, scheduler = hosted.order.spec, self._agent.scheduler
        # Control chose this node, and will choose again.
        here = Strategy("node", scheduler.node_id)
        if spec.strategy.kind == "group":
            here = msgspec.structs.replace(spec.strategy, node_id=scheduler.node_id)
        need = LeaseSpec(spec.job_id, spec.needs(), spec.class_name, strategy=here, priority=spec.priority)
        hosted.turn = asyncio.Event()
        scheduler.set_demand(spec.actor_id, 0, 1, need, time.time(), redirected=True)
        self._agent.decide_soon()
        try:
            async with asyncio.timeout(hosted.order.patience_s):
                await hosted.turn.wait()
        except TimeoutError:
            logger.debug("in line for too long actor=%s", spec.actor_id.hex())
        finally:
            hosted.turn = None
            scheduler.drop_owner(spec.actor_id)  # it has no lease: a grant is changed into the actor's at once

    def takes(self, decision: Decision) -> bool:
        """Whether the decision is about an actor in line; if so it is carried out."""
        hosted = self._actors.get(decision.owner)
        if hosted is None:
            return False
        spec, agent = hosted.order.spec, self._agent
        if isinstance(decision, Grant):
            agent.scheduler.drop_owner(spec.actor_id)
            agent.scheduler.release(decision.lease_id)
            if hosted.turn is not None and not hosted.turn.is_set():
                hosted.devices = agent.scheduler.acquire_actor(
                    spec.actor_id, spec.placement, spec.resources, spec.strategy
                )
                hosted.turn.set()
            agent.decide_soon()  # it may hold less than it needed to be placed
        elif isinstance(decision, Wait):
            agent.tell_control(ActorWaits(spec.actor_id, hosted.order.incarnation, decision.reason))
        return True

    def ready(self, worker: Worker, message: ActorReady) -> None:
        """The constructor returned or raised."""
        hosted = self._actors.get(message.actor_id)
        if hosted is None or hosted.worker is not worker:
            return
        order, agent = hosted.order, self._agent
        if message.error:
            self._forget(message.actor_id)
            worker.actor_id = b""
            agent.pool.end(worker, "the actor's constructor raised", intended=True)
            agent.tell_control(
                ActorFailed(message.actor_id, order.incarnation, "init_failed", message.text, message.error)
            )
            return
        hosted.started = True
        agent.tell_control(
            ActorStarted(message.actor_id, order.incarnation, worker.worker_id, worker.socket_path, worker.pid)
        )
        if hosted.stopping:
            self._end_gracefully(hosted, worker)  # asked for while the constructor ran

    # --------------------------------------------------------------------------------------------------- ending

    def stop(self, order: StopActor) -> None:
        """Control ends it. Graceful: the constructor, and calls that were accepted, may end first."""
        hosted = self._actors.get(order.actor_id)
        if hosted is None or hosted.order.incarnation != order.incarnation:
            return
        hosted.stopping = order.cause or "it was stopped"
        worker = hosted.worker
        if worker is None:
            if hosted.turn is not None:
                hosted.turn.set()
            return  # `start` sees it
        if not order.graceful or not worker.is_up:
            self._agent.pool.end(worker, hosted.stopping, intended=True)
            return
        if hosted.timer is None:
            why = f"{hosted.stopping}; it did not end in time"
            hosted.timer = asyncio.get_running_loop().call_later(
                order.grace_s, lambda: self._agent.pool.end(worker, why, intended=True)
            )
        if hosted.started:
            self._end_gracefully(hosted, worker)

    def _end_gracefully(self, hosted: _Hosted, worker: Worker) -> None:
        if worker.connection is not None:
            worker.connection.send(EndActor(hosted.stopping))

    def ended(self, worker: Worker, exit: WorkerExit) -> None:
        """The actor's process has ended."""
        hosted = self._actors.get(worker.actor_id)
        if hosted is None or hosted.worker is not worker:
            return
        self._forget(worker.actor_id)
        order, agent = hosted.order, self._agent
        cause = hosted.stopping or exit.cause
        if exit.tail and not worker.intended:
            cause += "; its last output was:\n    " + "\n    ".join(exit.tail)
        if hosted.started or hosted.stopping or worker.intended:
            intended = bool(hosted.stopping) or worker.intended or (exit.code == 0 and not exit.signal)
            agent.tell_control(ActorGone(worker.actor_id, order.incarnation, intended, cause))
        else:
            agent.tell_control(ActorFailed(worker.actor_id, order.incarnation, "crashed", cause))

    def _forget(self, actor_id: bytes) -> None:
        hosted = self._actors.pop(actor_id)
        if hosted.timer is not None:
            hosted.timer.cancel()
        if hosted.devices is not None:
            self._agent.scheduler.release_actor(actor_id)
        self._agent.decide_soon()
