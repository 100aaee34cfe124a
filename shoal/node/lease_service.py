"""Leases carried out: the shell around `LeaseScheduler`, which decides, and `WorkerPool`, which has the workers."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any, Final, Protocol

import msgspec

from shoal.control.messages import JobInfo
from shoal.exceptions import ShoalError
from shoal.node.lease_decisions import Decision, Grant, Reclaim, Redirect, Wait
from shoal.node.leases import LeaseScheduler
from shoal.node.memory_watch import WorkerMemory, private_bytes
from shoal.node.messages import (
    LeaseDemand,
    LeaseGranted,
    LeaseLost,
    LeaseRedirected,
    LeaseSpec,
    LeaseWaiting,
    ReclaimLeases,
    ReturnLease,
    WorkerAddress,
    WorkerExit,
)
from shoal.node.starting import Starting
from shoal.node.workers import Worker, WorkerDiedError, WorkerPool
from shoal.rpc.messages import Message
from shoal.scheduling.views import Amounts, NodeView

logger = logging.getLogger(__name__)

MAX_PAUSE_S: Final = 5.0
"""Longest pause between two tries when workers cannot be started."""


class Surroundings(Protocol):
    """What the service asks of the agent that it is part of."""

    node_id: bytes
    address: str

    def send_to(self, worker_id: bytes, message: Message) -> bool:
        """To a driver, worker or remote owner; False when it is gone."""

    def address_of(self, node_id: bytes) -> str | None: ...
    def views(self) -> tuple[NodeView, ...]: ...
    async def job(self, job_id: bytes) -> JobInfo: ...
    def assigned(self, worker: Worker, job_id: bytes) -> None:
        """The worker belongs to this job from now on."""

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None: ...
    def report_soon(self) -> None: ...


class _Lease:
    __slots__ = ("class_id", "granted_unix_s", "known", "owner", "reclaimed", "spec", "worker")

    def __init__(self, owner: bytes, class_id: int, spec: LeaseSpec) -> None:
        self.owner = owner
        self.class_id = class_id
        self.spec = spec
        self.granted_unix_s = time.time()
        self.worker: Worker | None = None
        self.known = False  # its owner was told
        self.reclaimed: ReclaimLeases | None = None  # before that: its owner was asked to return what this one is too


class LeaseService:
    """See the module. `takes(decision)` is asked first: actors and bundles stand in the same line as leases."""

    def __init__(
        self, around: Surroundings, total: Amounts, pool: WorkerPool, takes: Callable[[Decision], bool]
    ) -> None:
        self.scheduler = LeaseScheduler(around.node_id, total, random.Random(around.node_id))
        self._around = around
        self._pool = pool
        self._takes = takes
        self._loop = asyncio.get_running_loop()
        self._leases: dict[int, _Lease] = {}
        self._deciding = False
        self._failures = 0  # workers that could not be had, in a row

    # ------------------------------------------------------------------------------------------- what owners say

    def demand(self, owner: bytes, message: LeaseDemand, *, remote: bool) -> None:
        self.scheduler.set_demand(
            owner, message.class_id, message.wanted, message.spec, time.time(), redirected=remote, calls=message.calls
        )
        self.decide_soon()

    def give_back(self, message: ReturnLease) -> None:
        lease = self._leases.pop(message.lease_id, None)
        if lease is None:
            return  # it ended with its worker
        self.scheduler.release(message.lease_id)
        if lease.worker is not None:
            if message.broken:
                self._pool.end(lease.worker, "its owner could not speak with it", intended=False)
                lease.worker.lease_id = 0
            else:
                self._pool.release(lease.worker)
        self.decide_soon()

    def set_blocked(self, worker: Worker, blocked: bool) -> None:
        """The worker's task began or ceased to wait: its CPUs are lent, or taken back."""
        with suppress(KeyError):  # the lease may have been taken away while it waited
            if worker.actor_id:
                self.scheduler.set_actor_blocked(worker.actor_id, blocked)
            elif worker.lease_id:
                self.scheduler.set_blocked(worker.lease_id, blocked)
        self.decide_soon()

    def set_slow(self, worker: Worker) -> None:
        """The worker's call has run for long."""
        if worker.lease_id:
            with suppress(KeyError):
                self.scheduler.set_slow(worker.lease_id)
            self.decide_soon()

    def drop_owner(self, owner: bytes) -> None:
        """Nobody will collect what the owner's leased workers do: end them."""
        for lease_id in self.scheduler.drop_owner(owner):
            lease = self._leases.get(lease_id)
            if lease is None:
                continue
            if lease.worker is not None:
                self._pool.end(lease.worker, "the process that leased it ended", intended=True)
            else:
                lease.owner = b""  # its worker is still on its way: `_carry_out` sees that nobody waits
        self.decide_soon()

    def worker_ended(self, worker: Worker, exit: WorkerExit) -> None:
        lease = self._leases.pop(worker.lease_id, None)
        if lease is not None:
            removed = self.scheduler.was_closed(worker.lease_id)
            told = msgspec.structs.replace(exit, group_removed=True) if removed else exit
            self._around.send_to(lease.owner, LeaseLost(worker.lease_id, told))
            self.scheduler.release(worker.lease_id)

    def memory(self) -> Iterator[WorkerMemory]:
        """The leased workers."""
        for lease in self._leases.values():
            worker = lease.worker
            if worker is not None and worker.pid:
                yield WorkerMemory(
                    worker.worker_id, worker.pid, lease.spec.name, lease.owner, private_bytes(worker.pid),
                    lease.granted_unix_s, lease.spec.retriable,
                )  # fmt: skip

    def end_leases(self, lease_ids: list[int], cause: str) -> None:
        """What they are for is gone: end their workers."""
        for lease_id in lease_ids:
            lease = self._leases[lease_id]
            if lease.worker is not None and lease.known:
                self._pool.end(lease.worker, cause, intended=True)
            else:
                self.give_back(ReturnLease(lease_id, broken=True))

    def starting(self) -> Iterator[Starting]:
        """Leases that were granted and have no worker yet."""
        for lease in self._leases.values():
            if not lease.known:
                spec = lease.spec
                text = "its worker process is starting"
                yield Starting(spec.name, spec.resources, spec.job_id, lease.granted_unix_s, text)

    # ------------------------------------------------------------------------------------------------ deciding

    def decide_soon(self) -> None:
        """Look at what waits and what is free at the end of this round of the loop."""
        if not self._deciding:
            self._deciding = True
            self._loop.call_soon(self._decide)

    def _decide(self) -> None:
        self._deciding = False
        around = self._around
        for decision in self.scheduler.decide(around.views(), time.time()):
            if self._takes(decision):
                continue
            owner = decision.owner
            message: Message
            match decision:
                case Grant():
                    lease = self._leases[decision.lease_id] = _Lease(owner, decision.class_id, decision.spec)
                    around.spawn(self._carry_out(decision, lease), "grant")
                    continue
                case Redirect():
                    where = around.address_of(decision.node_id) or ""
                    message = LeaseRedirected(decision.class_id, decision.count, decision.node_id, where)
                case Wait():
                    message = LeaseWaiting(decision.class_id, decision.reason, decision.granted)
                case Reclaim():
                    message = reclaim = ReclaimLeases(decision.priority)
                    for lease in self._leases.values():
                        if lease.owner == owner and not lease.known:
                            lease.reclaimed = reclaim
            around.send_to(owner, message)
        around.report_soon()

    async def _carry_out(self, grant: Grant, lease: _Lease) -> None:
        """Give the lease a worker and tell its owner. If no worker can be had, the lease is free again."""

        def claim(worker: Worker) -> None:
            worker.lease_id = grant.lease_id
            lease.worker = worker

        around = self._around
        try:
            job = await around.job(grant.spec.job_id)
            worker = await self._pool.take(job, grant.spec.env_vars, grant.devices, claim)
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
        around.assigned(worker, job.job_id)
        if grant.lease_id not in self._leases or worker.lease_id != grant.lease_id:
            return  # it was given back, or its worker ended, in the meantime
        address = WorkerAddress(worker.worker_id, around.node_id, around.address, worker.socket_path, worker.pid)
        lease.known = True
        if not around.send_to(lease.owner, LeaseGranted(grant.class_id, grant.lease_id, address, grant.devices)):
            self.give_back(ReturnLease(grant.lease_id))
        elif lease.reclaimed is not None:
            around.send_to(lease.owner, lease.reclaimed)
