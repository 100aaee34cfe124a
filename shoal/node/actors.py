"""Actors on this node: control decides that one lives here, this gives it a worker and reports what becomes of it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from shoal.control.messages import ActorFailed, ActorGone, ActorStarted, StartActor, StopActor
from shoal.exceptions import ShoalError
from shoal.node.messages import ActorReady, BeginActor, EndActor, WorkerExit
from shoal.node.workers import Worker, WorkerDiedError

if TYPE_CHECKING:
    from shoal.node.agent import Agent

logger = logging.getLogger(__name__)


class _Hosted:
    __slots__ = ("order", "started", "stopping", "timer", "worker")

    def __init__(self, order: StartActor) -> None:
        self.order = order
        self.worker: Worker | None = None
        self.started = False  # the constructor returned
        self.stopping = ""
        self.timer: asyncio.TimerHandle | None = None


class ActorHost:
    """The agent's actors. All state about one is dropped when its process has ended."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._actors: dict[bytes, _Hosted] = {}

    def is_detached(self, actor_id: bytes) -> bool:
        hosted = self._actors.get(actor_id)
        return hosted is not None and hosted.order.spec.detached

    async def start(self, order: StartActor) -> None:
        """Give the actor a worker and have it run the constructor; the outcome is told by `ready` or `ended`."""
        spec, agent = order.spec, self._agent
        devices = None
        if spec.actor_id not in self._actors:  # else an older incarnation is still ending here
            devices = agent.scheduler.acquire_actor(spec.actor_id, spec.placement, spec.resources)
        if devices is None:
            agent.tell_control(ActorFailed(spec.actor_id, order.incarnation, "refused", "the node is busy by now"))
            return
        hosted = self._actors[spec.actor_id] = _Hosted(order)

        def claim(worker: Worker) -> None:
            worker.actor_id, worker.incarnation = spec.actor_id, order.incarnation
            hosted.worker = worker

        try:
            job = await agent.job(spec.job_id)
            worker = await agent.pool.take(job, spec.env_vars, devices, claim)
        except (ShoalError, WorkerDiedError, OSError) as exc:
            if self._actors.get(spec.actor_id) is hosted:
                self._forget(spec.actor_id)
                kind = "refused" if isinstance(exc, OSError) else "crashed"
                agent.tell_control(ActorFailed(spec.actor_id, order.incarnation, kind, str(exc)))
            return
        process = agent.process(worker.worker_id)
        if process is not None:
            process.job_id = spec.job_id
        if hosted.stopping or worker.connection is None:
            agent.pool.end(worker, hosted.stopping or "it ended during its start", intended=True)
            return
        worker.connection.send(BeginActor(spec, order.incarnation, order.restarts, order.class_blob, devices))

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

    def stop(self, order: StopActor) -> None:
        hosted = self._actors.get(order.actor_id)
        if hosted is None or hosted.order.incarnation != order.incarnation:
            return
        hosted.stopping = order.cause or "it was stopped"
        worker = hosted.worker
        if worker is None:
            return  # `start` sees it
        if order.graceful and worker.connection is not None and hosted.started:
            worker.connection.send(EndActor(hosted.stopping))
            if hosted.timer is None:
                why = f"{hosted.stopping}; it did not end in time"
                hosted.timer = asyncio.get_running_loop().call_later(
                    order.grace_s, lambda: self._agent.pool.end(worker, why, intended=True)
                )
            return
        self._agent.pool.end(worker, hosted.stopping, intended=True)

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
        if hosted.started or hosted.stopping:
            intended = bool(hosted.stopping) or worker.intended or (exit.code == 0 and not exit.signal)
            agent.tell_control(ActorGone(worker.actor_id, order.incarnation, intended, cause))
        else:
            agent.tell_control(ActorFailed(worker.actor_id, order.incarnation, "crashed", cause))

    def _forget(self, actor_id: bytes) -> None:
        hosted = self._actors.pop(actor_id)
        if hosted.timer is not None:
            hosted.timer.cancel()
        self._agent.scheduler.release_actor(actor_id)
        self._agent.decide_soon()
