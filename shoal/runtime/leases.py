"""The owner's side of tasks: scheduling classes, the leases they hold, and which worker gets which call.

Calls are grouped by what they need of a worker (`LeaseSpec`). A class tells agents as a level how many leases it could
use, and calls go straight to leased workers. How many are sent ahead to one worker adapts: one until the function's
pace is known, then as many as keep the worker busy for `BUDGET_S`, so a worker never waits for its owner, and never
holds a long queue that others could run. What a worker cannot start soon it hands back. Leases are used again while
there is work and returned `IDLE_S` to twice that after there is none, or at once when others wait.
"""

from __future__ import annotations

import collections
import itertools
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shoal import exceptions
from shoal.node.messages import (
    STORED,
    LeaseDemand,
    LeaseGranted,
    LeaseLost,
    LeaseRedirected,
    LeaseSpec,
    LeaseWaiting,
    OwnerHello,
    ReclaimLeases,
    ReturnLease,
    ToProcess,
    WorkerExit,
)
from shoal.rpc.frames import make_decoder
from shoal.rpc.reactor import Channel, Timer
from shoal.runtime.link import WorkerLink
from shoal.runtime.nesting import Nesting
from shoal.runtime.retrying import pause, use_retry
from shoal.runtime.task_run import CANCELLED_STAGES, Bound, TaskRun
from shoal.scheduling.locality import best_place, near
from shoal.scheduling.views import WaitReason

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime

BUDGET_S: Final = 0.004
MAX_AHEAD: Final = 1000
IDLE_S: Final = 0.1
TENURE_S: Final = 0.005
"""A lease that others wait for works for so long before it yields: to hand one over costs as much as some ten short
calls. Without anything to do it goes back at once."""
GENEROUS_S: Final = 1.0
"""After somebody was starved, idle leases go back at once for so long."""
VERDICT_S: Final = 2.0
"""How long the owner of a lost connection waits for the agent to say how the worker ended."""

_decoder = make_decoder(ToProcess)


class AgentLink:
    """An agent that gives leases: this node's, over the runtime's own channel, or another's, over one made for it."""

    def __init__(self, tasks: TaskManager, channel: Channel, node_id: bytes) -> None:
        self.tasks = tasks
        self.channel = channel
        self.node_id = node_id
        self.introduced: dict[int, str] = {}  # classes whose spec this agent has, and the name in it


class Lease:
    """One worker, lent to one class."""

    __slots__ = (
        "__weakref__",
        "agent",
        "broken",
        "cls",
        "exit",
        "granted_at",
        "idle_since",
        "lease_id",
        "leaving",
        "link",
        "load_s",
        "used",
        "verdict_timer",
        "yielding",
    )

    def __init__(self, cls: SchedulingClass, agent: AgentLink, lease_id: int, link: WorkerLink) -> None:
        self.cls = cls
        self.agent = agent
        self.lease_id = lease_id
        self.link = link
        self.load_s = 0.0  # expected duration of what runs there
        self.idle_since = 0.0  # on the monotonic clock; 0.0 while it works
        self.verdict_timer: Timer | None = None
        self.broken = ""
        self.exit: WorkerExit | None = None  # the worker has ended, and what it said before is not all read yet
        self.used = False
        self.granted_at = time.monotonic()
        self.leaving = False  # its worker ends on purpose: no call is to blame for that
        self.yielding = False  # others wait for it: nothing more is sent, and it goes back when it has run dry

    @property
    def takes_calls(self) -> bool:
        return not self.broken and not self.yielding

    @property
    def runs_suspect(self) -> bool:
        """It runs a call that is to be alone: see `SchedulingClass.lost`."""
        running = self.link.running
        return bool(running) and next(iter(running.values())).suspect

    def run_ended(self, run: TaskRun) -> None:
        self.load_s -= run.bound.pace_s or 0.0
        if not self.link.running:
            self.load_s = 0.0
        self.cls.pump_soon()

    def handed_back(self, runs: list[TaskRun]) -> None:
        for run in reversed(runs):
            run.stage = "queued"
            self.cls.queue.appendleft(run)
        self.cls.held_up = True
        self.cls.pump_soon()

    def retry(self, run: TaskRun) -> None:
        """User code raised what is to be tried again. Behind all others: a call that never succeeds holds nobody up."""
        self.run_ended(run)
        self.cls.queue.append(run)

    def worker_leaves(self) -> None:
        self.leaving = True
        self.broken = self.broken or "its worker ends"

    def ended(self, exit: WorkerExit) -> None:
        """The agent says that the worker ended. Results that it sent before may still be on their way."""
        if self.link.closed:
            self.cls.tasks.lose(self, exit)
            return
        self.exit = exit
        self.broken = exit.cause or "its worker ended"
        self.verdict_timer = self.cls.tasks.runtime.reactor.call_later(
            VERDICT_S, lambda: self.cls.tasks.lose(self, exit)
        )

    def link_closed(self, _link: WorkerLink, reason: Exception) -> None:
        if self.exit is not None:
            self.cls.tasks.lose(self, self.exit)
            return
        self.broken = str(reason)
        self.verdict_timer = self.cls.tasks.runtime.reactor.call_later(VERDICT_S, self._no_verdict)

    def _no_verdict(self) -> None:
        """The agent has not said that the worker ended: then it hangs, or its node is out of reach."""
        self.agent.channel.send(ReturnLease(self.lease_id, broken=True))
        self.cls.tasks.lose(self, WorkerExit(cause=self.broken))


class SchedulingClass:
    """Calls with equal needs, in the order of their submission."""

    def __init__(self, tasks: TaskManager, class_id: int, spec: LeaseSpec) -> None:
        self.tasks = tasks
        self.class_id = class_id
        self.spec = spec
        self.queue: collections.deque[TaskRun] = collections.deque()
        self.leases: list[Lease] = []
        self.told: dict[AgentLink, int] = {}  # demand that each agent knows
        self.elsewhere: dict[AgentLink, int] = {}  # leases that other agents were asked for, granted ones included
        self.told_calls = 0  # how long the queue was when the local agent was told last
        self.reason: WaitReason | None = None
        self.held_up = False  # a worker handed calls back: others would run them sooner
        self.removed = ""  # the placement group is gone, and why
        self._pumping = False

    def add(self, run: TaskRun) -> None:
        self.queue.append(run)
        self.pump_soon()

    def pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.tasks.dirty.append(self)
            if len(self.tasks.dirty) == 1:
                self.tasks.runtime.reactor.call_soon(self.tasks.pump)

    def pump(self) -> None:
        """Send what can be sent, and settle how many leases are wanted."""
        self._pumping = False
        if self.removed:
            self._fail(self.queue)
        if self.queue:
            self._fill()
        self._demand()
        self._look_for_idle()

    def _look_for_idle(self) -> None:
        """Give back at once what others wait for, and note since when the rest is idle."""
        tasks = self.tasks
        for lease in tuple(self.leases):
            if lease.link.running or lease.broken:
                lease.idle_since = 0.0
            elif lease.yielding or (tasks.wanted_by_others and not self.queue):
                self._return(lease)
            elif not lease.idle_since:
                lease.idle_since = time.monotonic()
                tasks.sweep_later()

    def return_idle(self, since: float) -> bool:
        """Give back leases that have been idle since before `since`; True while others are idle for less."""
        for lease in tuple(self.leases):
            if lease.idle_since and lease.idle_since <= since and not lease.link.running and not self.queue:
                self._return(lease)
        return any(lease.idle_since for lease in self.leases)

    def _fill(self) -> None:
        """Deal the queue out: every lease gets one call before any gets a second one ahead."""
        queue = self.queue
        for lease in self.leases:
            if not queue:
                return
            # One call even if it was reclaimed on its way here, else it might go to and fro with nothing done.
            if not lease.link.running and (lease.takes_calls or not (lease.used or lease.broken)):
                self._send(lease, queue.popleft())
        open_leases = [lease for lease in self.leases if lease.takes_calls]
        if not open_leases:
            return
        share = max(1, math.ceil(len(queue) / len(open_leases)))  # so that one worker does not get what two could run
        for lease in open_leases:
            sent = 0
            if lease.runs_suspect:
                continue
            while queue and sent < share and not queue[0].suspect:
                pace = queue[0].bound.pace_s
                if pace is None or queue[0].bound.max_calls or len(lease.link.running) >= MAX_AHEAD:
                    break
                if lease.link.running and lease.load_s + pace > BUDGET_S:
                    break
                self._send(lease, queue.popleft())
                sent += 1

    def _send(self, lease: Lease, run: TaskRun) -> None:
        lease.used = True
        lease.load_s += run.bound.pace_s or 0.0
        lease.link.send(run)

    # ---------------------------------------------------------------------------------------------- demand

    def _wanted(self) -> int:
        """Leases this class could use now, those it has included (idle ones too, while it keeps them)."""
        queued = len(self.queue)
        if not queued:
            self.held_up = False
        else:
            pace = self.queue[0].bound.pace_s
            if pace is not None and not self.held_up:
                queued = min(queued, max(1, math.ceil(queued * pace / BUDGET_S)))
        if not self.leases:
            return queued
        # One that yields counts until it has gone back: what runs there may wait for what is queued here.
        return queued + sum(1 for lease in self.leases if not lease.broken)

    def _demand(self) -> None:
        wanted = max(0, self._wanted() - sum(self.elsewhere.values()))
        self._tell(self.tasks.local, wanted)
        if not self.queue:
            for agent in list(self.elsewhere):
                granted = sum(1 for lease in self.leases if lease.agent is agent)
                self.elsewhere[agent] = granted
                self._tell(agent, granted)
                if not granted:
                    del self.elsewhere[agent]

    def _tell(self, agent: AgentLink, wanted: int) -> None:
        told = self.told.get(agent, 0)
        is_local = agent is self.tasks.local
        # The same, or of the same order while far out of reach; and so is what people are shown of the queue.
        same = wanted == told or (min(wanted, told) > 2 * len(self.leases) + 64 and told / 2 < wanted < told * 2)
        known = not (wanted and is_local) or self.told_calls / 2 - 64 < len(self.queue) < self.told_calls * 2 + 64
        if same and known:
            return
        self.told[agent] = wanted
        calls = 0
        if is_local:
            self.told_calls = len(self.queue)
            given = sum(1 for lease in self.leases if lease.agent is not agent)
            calls = max(0, len(self.queue) - sum(self.elsewhere.values()) + given)  # less those that wait elsewhere
        spec = None
        if self.queue and (first := self.queue[0].bound.spec) is not None and first.name != self.spec.name:
            self.spec = msgspec.structs.replace(self.spec, name=first.name)  # `status` names what waits now
        if agent.introduced.get(self.class_id) != self.spec.name:
            agent.introduced[self.class_id] = self.spec.name
            spec = self.spec
        agent.channel.send(LeaseDemand(self.class_id, wanted, spec, calls))

    # ---------------------------------------------------------------------------------------------- leases

    def granted(self, agent: AgentLink, message: LeaseGranted) -> None:
        self.reason = None
        link = self.tasks.runtime.link_to(message.worker)
        lease = Lease(self, agent, message.lease_id, link)
        link.use_for(lease)
        self.leases.append(lease)
        self.tasks.leases[agent, message.lease_id] = lease
        self.pump_soon()

    def waits(self, agent: AgentLink, message: LeaseWaiting) -> None:
        self.reason = message.reason
        if message.reason.code != "unschedulable":
            return
        coming = message.granted - sum(1 for lease in self.leases if lease.agent is agent)
        kept = [self.queue.popleft() for _ in range(min(max(coming, 0), len(self.queue)))]
        given_up = list(self.queue)
        self.queue.clear()
        self.queue.extend(kept)
        if agent in self.elsewhere:
            self.elsewhere[agent] = message.granted
        # Before anything else is queued, so that the agent's next word is about that.
        self.told[agent] = message.granted
        agent.channel.send(LeaseDemand(self.class_id, message.granted))
        for run in given_up:
            text = f"{run.bound.name} cannot be scheduled: {message.reason.text}"
            self.tasks.runtime.fail_with(run, exceptions.TaskUnschedulableError(text))
        self.pump_soon()

    def redirected(self, agent: AgentLink, message: LeaseRedirected) -> None:
        """Ask over there for what this agent cannot give."""
        self.told[agent] = max(0, self.told.get(agent, 0) - message.count)
        if agent in self.elsewhere:
            self.elsewhere[agent] = max(0, self.elsewhere[agent] - message.count)
        other = self.tasks.agent_at(message.node_id, message.address) if self.queue and message.address else None
        if other is None or other is self.tasks.local:
            self.pump_soon()
            return
        self.elsewhere[other] = self.elsewhere.get(other, 0) + message.count
        self._tell(other, self.elsewhere[other])

    def _return(self, lease: Lease) -> None:
        if lease.link.running or lease.broken or lease not in self.leases:
            return
        self._drop(lease)
        if lease.agent is not self.tasks.local and lease.agent in self.elsewhere:
            self.elsewhere[lease.agent] = max(0, self.elsewhere[lease.agent] - 1)
        self._demand()
        lease.agent.channel.send(ReturnLease(lease.lease_id))

    def yield_leases(self) -> None:
        """Others wait for what this class holds: idle leases go back now, busy ones when they have run dry.

        A class with more to do asks again in the same breath and takes its turn in the line of those who wait.
        """
        now = time.monotonic()
        soon = [lease for lease in self.leases if lease.granted_at + TENURE_S > now and not lease.yielding]
        for lease in self.leases:
            lease.yielding = lease.yielding or lease not in soon
        if soon:
            self.tasks.runtime.reactor.call_later(TENURE_S, lambda: self._end_tenure(soon))
        self.pump_soon()

    def _end_tenure(self, leases: list[Lease]) -> None:
        for lease in leases:
            lease.yielding = True
        self.pump_soon()

    def _drop(self, lease: Lease) -> None:
        self.leases.remove(lease)
        self.tasks.leases.pop((lease.agent, lease.lease_id), None)
        if lease.link.sink is lease:
            lease.link.use_for(None)
        if lease.verdict_timer is not None:
            lease.verdict_timer.cancel()

    def group_removed(self, why: str) -> None:
        """What is queued fails, and what comes; what runs fails when its worker has ended."""
        self.removed = self.removed or why
        self.pump_soon()

    def _fail(self, runs: collections.deque[TaskRun] | list[TaskRun]) -> None:
        """The placement group of these calls was removed."""
        while runs:
            run = runs.pop()
            text = f"{run.bound.name} was to run in a placement group that does not exist any more: {self.removed}"
            self.tasks.runtime.fail_with(run, exceptions.TaskPlacementGroupRemoved(text))

    def lost(self, lease: Lease, exit: WorkerExit) -> None:
        """The lease's worker ended: what it ran is tried again where that is allowed, what it had not begun always is.

        Which call that was is certain when it was the only one, or one that must not run twice (the worker holds back
        no results before and after those). Otherwise the first ones may be done, their results lost with the worker:
        nobody is blamed, and each of them runs alone the next time.
        """
        self._drop(lease)
        runs = lease.link.take_back()
        # Sure: the one that ran is known, and is none of those that are to run again.
        sure = lease.leaving or (bool(runs) and runs[0].stage in CANCELLED_STAGES)
        if runs:
            runs = self.tasks.runtime.canceller.without_cancelled(runs, exit, lease.link)
        lease.link.close()
        if lease.agent is not self.tasks.local and lease.agent in self.elsewhere:
            self.elsewhere[lease.agent] = max(0, self.elsewhere[lease.agent] - 1)
        if exit.group_removed or self.removed:
            self.removed = self.removed or exit.cause
            self._fail(runs)
        if sure:
            pass
        elif runs and (len(runs) == 1 or runs[0].suspect or runs[0].bound.max_retries == 0):
            first = runs[0]
            if exit.out_of_memory and first.bound.max_retries != 0:
                pause(self.tasks.runtime, first, exit.cause)
                del runs[0]
            elif first.retries == 0:
                self.tasks.runtime.fail_crashed(first, exit, lease.link.address)
                del runs[0]
            else:
                use_retry(self.tasks.runtime, first, f"its worker ended: {exit.cause or 'nobody knows why'}")
        else:
            for run in runs:
                if run.bound.max_retries == 0:
                    break  # it had not begun
                run.suspect = True
        for run in reversed(runs):
            run.stage = "queued"
            self.queue.appendleft(run)
        self.pump_soon()


class TaskManager:
    """All scheduling classes of this process. Reactor's thread only."""

    def __init__(self, runtime: CoreRuntime) -> None:
        self.runtime = runtime
        self.local = AgentLink(self, runtime.agent, runtime.node_id)
        self.leases: dict[tuple[AgentLink, int], Lease] = {}
        self.dirty: list[SchedulingClass] = []
        self._classes: dict[bytes, SchedulingClass] = {}
        self._by_id: list[SchedulingClass] = []
        self._agents: dict[bytes, AgentLink] = {}
        self._sweeping = False
        self.wanted_by_others = False
        self._generous: Timer | None = None

    def submit(self, run: TaskRun) -> None:
        """The arguments are ready: queue it."""
        run.stage = "queued"
        self.class_of(run).add(run)

    def class_of(self, run: TaskRun) -> SchedulingClass:
        bound = run.bound
        place = self._best_place(run) if run.arguments else None
        key: Any = run.nesting if place is None else (run.nesting, place)
        cls: SchedulingClass | None = bound.classes.get(key)
        if cls is None:
            cls = bound.classes[key] = self._find_class(bound, run.nesting, place)
        return cls

    def _best_place(self, run: TaskRun) -> bytes | None:
        """Another node, to which the call should go because its arguments are there."""
        assert run.bound.spec is not None
        if run.bound.spec.strategy.kind != "default":
            return None
        states = [argument.state for argument in run.arguments or () if argument.state.state == STORED]
        return best_place([(state.size, state.nodes) for state in states], self.runtime.node_id) if states else None

    def _find_class(self, bound: Bound, nesting: Nesting, place: bytes | None) -> SchedulingClass:
        spec = bound.spec
        assert spec is not None
        spec = msgspec.structs.replace(spec, depth=nesting.depth, priority=nesting.settle(bound.priority))
        if place is not None:
            spec = msgspec.structs.replace(spec, strategy=near(spec.strategy, place))
        key = msgspec.msgpack.encode(msgspec.structs.replace(spec, name=""), order="sorted")
        cls = self._classes.get(key)
        if cls is None:
            cls = self._classes[key] = SchedulingClass(self, len(self._by_id), spec)
            self._by_id.append(cls)
            if spec.strategy.group:
                cls.removed = self.runtime.groups.watch(spec.strategy.group)
        return cls

    def group_removed(self, group: bytes, why: str) -> None:
        """A placement group is gone: its calls fail."""
        for cls in self._by_id:
            if cls.spec.strategy.group == group:
                cls.group_removed(why)

    def pump(self) -> None:
        dirty, self.dirty = self.dirty, []
        for cls in dirty:
            cls.pump()

    def agent_at(self, node_id: bytes, address: str) -> AgentLink:
        """Another node's agent, connected when first needed."""
        if node_id == self.runtime.node_id:
            return self.local
        agent = self._agents.get(node_id)
        if agent is None:
            runtime = self.runtime
            channel = Channel(runtime.reactor, _decoder, self._from_other_agent, self._agent_lost)
            agent = self._agents[node_id] = AgentLink(self, channel, node_id)
            channel.context = agent
            channel.connect(address, runtime.token, "agent", runtime.name)
            channel.send(OwnerHello(runtime.worker_id, runtime.job_id, runtime.node_id))
        return agent

    def _from_other_agent(self, channel: Channel, message: Any) -> None:
        self.from_agent(channel.context, message)

    def _agent_lost(self, channel: Channel, reason: Exception) -> None:
        """Another node's agent is gone, and its leases with it."""
        agent: AgentLink = channel.context
        self._agents.pop(agent.node_id, None)
        for (owner, _), lease in list(self.leases.items()):
            if owner is agent:
                self.lose(lease, WorkerExit(cause=f"its node {agent.node_id.hex()[:12]} is gone: {reason}"))
        for cls in self._by_id:
            if cls.elsewhere.pop(agent, None) is not None or cls.told.pop(agent, None) is not None:
                cls.pump_soon()

    def from_agent(self, agent: AgentLink, message: Any) -> None:
        """What an agent says about leases."""
        match message:
            case LeaseGranted():
                self._by_id[message.class_id].granted(agent, message)
            case LeaseRedirected():
                self._by_id[message.class_id].redirected(agent, message)
            case LeaseWaiting():
                self._by_id[message.class_id].waits(agent, message)
            case ReclaimLeases():
                self._yield_all(message.priority)
            case LeaseLost():
                lease = self.leases.get((agent, message.lease_id))
                if lease is not None:
                    lease.ended(message.exit)

    def _yield_all(self, priority: int) -> None:
        """Somebody is starved. For a while leases are not kept for calls that may come."""
        for cls in self._by_id:
            if cls.spec.priority <= priority:
                cls.yield_leases()
        self.wanted_by_others = True
        if self._generous is not None:
            self._generous.cancel()
        self._generous = self.runtime.reactor.call_later(GENEROUS_S, self._not_generous)

    def sweep_later(self) -> None:
        """Some lease is idle: see to it that it goes back in time."""
        if not self._sweeping:
            self._sweeping = True
            self.runtime.reactor.call_later(IDLE_S, self._sweep)

    def _sweep(self) -> None:
        self._sweeping = False
        since = time.monotonic() - IDLE_S
        left = False
        for cls in {lease.cls for lease in self.leases.values()}:
            left = cls.return_idle(since) or left
        if left:
            self.sweep_later()

    def _not_generous(self) -> None:
        self._generous = None
        self.wanted_by_others = False

    def lose(self, lease: Lease, exit: WorkerExit) -> None:
        lease.cls.lost(lease, exit)

    def withdraw(self, run: TaskRun) -> None:
        """Take a call out of its queue, if it is there: it may wait for arguments."""
        if run.stage == "queued":
            cls = self.class_of(run)
            cls.queue.remove(run)
            cls.pump_soon()  # less is wanted now

    def queued(self) -> Iterator[TaskRun]:
        return itertools.chain.from_iterable(cls.queue for cls in self._by_id)

    def end_worker(self, link: WorkerLink, cause: str) -> None:
        """Have the agent end a leased worker that does not do so itself."""
        lease = link.sink
        if isinstance(lease, Lease) and not lease.exit:
            lease.agent.channel.send(ReturnLease(lease.lease_id, broken=True))
            self.lose(lease, WorkerExit(cause=cause))
