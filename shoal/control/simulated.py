"""A cluster without processes, sockets or time: the real state machine, and agents that behave as real ones would.

For tests and for measuring decisions with thousands of nodes. Each simulated agent has a queue to control and one from
it, kept in order as a connection keeps them; which queue moves next is drawn by lot from a seed, so that messages cross
each other in as many ways as there are seeds. The clock moves only when it is told to.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec

from shoal.control.mail import Send
from shoal.control.messages import (
    FUNCTIONS,
    ActorFailed,
    ActorGone,
    ActorInfo,
    ActorReply,
    ActorSpec,
    ActorStarted,
    BundlesPrepared,
    CommitBundles,
    CreateActor,
    JobEnded,
    JobInfo,
    JobRegistered,
    NodeInfo,
    NodeRegistered,
    NodeReport,
    NodesChanged,
    PrepareBundles,
    ProcessGone,
    ProcessReply,
    PutKey,
    RegisterJob,
    RegisterNode,
    Relay,
    RelayReply,
    ReturnBundles,
    StartActor,
    StopActor,
    StopNode,
    WatchActor,
)
from shoal.control.settings import ControlSettings
from shoal.control.state import ControlState
from shoal.objects.ids import ActorId, NodeId, WorkerId
from shoal.rpc.messages import Message, Request
from shoal.scheduling.bundle_names import demand_on, shown_of
from shoal.scheduling.resources import add, fits, subtract, to_amounts
from shoal.scheduling.views import Amounts, NodeView, Strategy

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(ProcessReply).decode

HEARTBEAT_S = 1.0


class SimProcess:
    """A driver or worker at an agent. `pushes`: what control sent to it unasked."""

    def __init__(self, cluster: SimCluster, agent: SimAgent, worker_id: WorkerId, job: JobInfo) -> None:
        self.cluster = cluster
        self.agent = agent
        self.worker_id = worker_id
        self.job = job
        self.answers: dict[int, Any] = {}
        self.pushes: list[Any] = []

    def send(self, message: Message) -> None:
        """Queue a message on its way to control."""
        self.agent.say(Relay(self.worker_id, self.job.job_id, _encode(message)))

    def ask(self, request: Request) -> Any:
        """Send and wait: delivers what this agent said before, nothing else."""
        rid = self.cluster.next_rid()
        msgspec.structs.force_setattr(request, "rid", rid)
        self.send(request)
        self.cluster.deliver_from(self.agent)
        return self.answers.pop(rid)

    def receive(self, message: Any) -> None:
        rid = getattr(message, "rid", 0)
        if rid:
            self.answers[rid] = message
        else:
            self.pushes.append(message)

    def create(self, *, watch: bool = False, get_if_exists: bool = False, **fields: Any) -> ActorInfo:
        """Create an actor; `fields` as in `spec`. Raises AssertionError with the answer when control said no."""
        spec = self.spec(**fields)
        rid = self.cluster.next_rid()
        self.send(CreateActor(rid=rid, spec=spec, get_if_exists=get_if_exists))
        if watch:
            self.send(WatchActor(actor_id=spec.actor_id))  # in the same frame, as a real process sends it
        self.cluster.deliver_from(self.agent)
        reply = self.answers.pop(rid)
        assert isinstance(reply, ActorReply), reply
        return reply.actor

    def spec(
        self, *, cls: str = "Counter", cpus: float = 0, placement: Amounts | None = None,
        resources: Amounts | None = None, strategy: Strategy = Strategy(), **fields: Any,
    ) -> ActorSpec:  # fmt: skip
        """A spec of this process's own; by default 1 CPU to be placed and none held, as when nothing was asked for."""
        held = resources if resources is not None else to_amounts({"CPU": cpus})
        return ActorSpec(
            actor_id=ActorId(self.job.job_id + self.cluster.rng.randbytes(12)),
            job_id=self.job.job_id,
            owner_id=self.worker_id,
            owner_node=self.agent.node_id,
            class_name=cls,
            class_id=b"code of " + cls.encode(),
            arguments=b"",
            resources=held,
            placement=placement if placement is not None else (held or to_amounts({"CPU": 1})),
            strategy=strategy,
            **fields,
        )

    def die(self, cause: str = "it was killed") -> None:
        self.agent.say(ProcessGone(self.worker_id, self.job.job_id, self.worker_id == self.job.driver_id, cause))


class SimAgent:
    """Takes actors while they fit, says so, and reports what is free.

    Attributes:
        running: actor -> (incarnation, spec) of those whose process exists.
        bundles: (placement group, index) -> resources that are set aside; committed: those that are in use.
        seen: control messages that are of no consequence here, for tests to look at.
        starts: set to False to leave started actors in their constructor.
    """

    def __init__(self, cluster: SimCluster, peer: int, node_id: NodeId, total: Amounts, labels: dict[str, str]) -> None:
        self.cluster = cluster
        self.peer = peer
        self.node_id = node_id
        self.total = total
        self.available = dict(total)
        self.labels = labels
        self.running: dict[bytes, tuple[int, ActorSpec]] = {}
        self.bundles: dict[tuple[bytes, int], Amounts] = {}
        self.committed: set[tuple[bytes, int]] = set()
        self.workers: dict[bytes, WorkerId] = {}
        self.processes: dict[bytes, SimProcess] = {}
        self.to_control: deque[Message] = deque()
        self.from_control: deque[Message] = deque()
        self.seen: list[Any] = []
        self.nodes: dict[bytes, NodeInfo] = {}
        self.starts = True
        self.stopped = ""

    def info(self) -> NodeInfo:
        host = f"host{self.peer}"
        return NodeInfo(self.node_id, f"10.0.0.{self.peer}:6380", host, self.total, dict(self.available), self.labels)

    def say(self, message: Message) -> None:
        self.to_control.append(message)

    def report(self) -> None:
        self.say(NodeReport(dict(self.available), 0, [], bundles=self.shown()))

    def shown(self) -> Amounts:
        """What committed bundles add to the totals."""
        shown: Amounts = {}
        for group_id, index in self.committed:
            shown = add(shown, shown_of(group_id, index, self.bundles[group_id, index]))
        return shown

    def view(self) -> NodeView:
        """As others should see it."""
        return NodeView(self.node_id, add(self.total, self.shown()), dict(self.available), self.labels)

    def receive(self, message: Any) -> None:
        if isinstance(message, StartActor):
            self._start(message)
        elif isinstance(message, StopActor):
            held = self.running.get(message.actor_id)
            if held is not None and held[0] == message.incarnation:
                self.end_actor(message.actor_id, intended=True, cause=message.cause)
        elif isinstance(message, PrepareBundles):
            self._prepare(message)
        elif isinstance(message, CommitBundles):
            self._commit(message.group_id)
        elif isinstance(message, ReturnBundles):
            self._return(message)
        elif isinstance(message, RelayReply):
            process = self.processes.get(message.worker_id)
            if process is not None:
                process.receive(_decode(message.body))
        elif isinstance(message, JobEnded):
            for actor_id, (_, spec) in list(self.running.items()):
                if spec.job_id == message.job_id and not spec.detached:
                    self.end_actor(actor_id, intended=False, cause="its job ended")
        elif isinstance(message, StopNode):
            self.stopped = message.reason
        elif isinstance(message, NodesChanged | NodeRegistered):
            self.nodes.update((node.node_id, node) for node in message.nodes)
        self.seen.append(message)

    def _prepare(self, message: PrepareBundles) -> None:
        wanted = {(message.group_id, index): amounts for index, amounts in message.bundles.items()}
        assert not wanted.keys() & self.bundles.keys(), "a bundle is prepared once"
        needs: Amounts = {}
        for amounts in wanted.values():
            needs = add(needs, amounts)
        done = fits(needs, self.available)
        if done:
            self.bundles.update(wanted)
            self.available = subtract(self.available, needs)
            if message.commit:
                self._commit(message.group_id)
            self.report()
        self.say(BundlesPrepared(message.group_id, message.attempt, done))

    def _commit(self, group_id: bytes) -> None:
        for key in [key for key in self.bundles if key[0] == group_id and key not in self.committed]:
            self.committed.add(key)
            self.available = add(self.available, shown_of(*key, self.bundles[key]))

    def _return(self, message: ReturnBundles) -> None:
        for key in [(message.group_id, index) for index in message.bundles]:
            amounts = self.bundles.pop(key, None)
            if amounts is not None:
                self.available = add(self.available, amounts)
                if key in self.committed:
                    self.committed.remove(key)
                    self.available = subtract(self.available, shown_of(*key, amounts))
        self.available = {name: amount for name, amount in self.available.items() if amount or name in self.total}
        self.report()

    def hold(self, spec: ActorSpec) -> Amounts:
        """What an actor holds of what this node shows."""
        at = spec.strategy
        if at.kind != "group" or not any(spec.resources.values()):
            return spec.resources
        return demand_on(at.group, at.bundle, spec.resources)

    def _start(self, message: StartActor) -> None:
        spec, incarnation = message.spec, message.incarnation
        assert spec.actor_id not in self.running, "an agent holds one life of an actor at most"
        at = spec.strategy
        needs = demand_on(at.group, at.bundle, spec.needs()) if at.kind == "group" else spec.needs()
        if not fits(needs, self.available):
            self.say(ActorFailed(spec.actor_id, incarnation, "refused", "its resources are taken"))
            return
        self.running[spec.actor_id] = (incarnation, spec)
        self.available = subtract(self.available, self.hold(spec))
        if self.starts:
            self.finish_start(spec.actor_id)
        if any(spec.resources.values()):
            self.report()

    def finish_start(self, actor_id: bytes) -> None:
        """The constructor returns."""
        worker_id = self.workers[actor_id] = WorkerId(self.cluster.rng.randbytes(28))
        incarnation, _ = self.running[actor_id]
        self.say(
            ActorStarted(actor_id, incarnation, worker_id, f"/run/{worker_id.hex()[:8]}", 1000 + len(self.workers))
        )

    def end_actor(self, actor_id: bytes, *, intended: bool, cause: str) -> None:
        """Its process ends, whatever it was doing."""
        incarnation, spec = self.running.pop(actor_id)
        self.available = add(self.available, self.hold(spec))
        worker_id = self.workers.pop(actor_id, None)
        if worker_id is None:
            self.say(ActorFailed(actor_id, incarnation, "crashed", cause))
        else:
            self.say(ActorGone(actor_id, incarnation, intended, cause))
            self.say(ProcessGone(worker_id, spec.job_id, False, cause))
        if any(spec.resources.values()):
            self.report()

    def held_less_than_total(self) -> Amounts:
        """What would be free if only the actors and bundles here held anything."""
        free = dict(self.total)
        for key, amounts in self.bundles.items():
            free = subtract(free, amounts)
            if key in self.committed:
                free = add(free, shown_of(*key, amounts))
        for _, spec in self.running.values():
            free = subtract(free, self.hold(spec))
        return free

    def process_of(self, actor_id: bytes) -> SimProcess:
        """The worker of a started actor, as a process that can ask control."""
        worker_id = self.workers[actor_id]
        job_id = self.running[actor_id][1].job_id
        process = self.processes.get(worker_id)
        if process is None:
            process = SimProcess(self.cluster, self, worker_id, JobInfo(job_id, "", b"", b""))
            self.processes[worker_id] = process
        return process


class SimCluster:
    """See the module."""

    def __init__(self, seed: int = 0, settings: ControlSettings | None = None) -> None:
        self.rng = random.Random(seed)
        self.settings = settings or ControlSettings()
        self.now = 1000.0
        self.state = ControlState(self.settings, b"cluster", random.Random(seed + 1), self.now, unix_s=1.7e9)
        self.agents: dict[int, SimAgent] = {}
        self.tools: dict[int, list[Message]] = {}
        self.lives: dict[tuple[bytes, int], int] = {}  # (actor, incarnation) -> the peer that was told to start it
        self._last_peer = 0
        self._last_rid = 0
        self._heartbeat_at = self.now + HEARTBEAT_S

    # --------------------------------------------------------------------------------------------------- who is there

    def add_node(self, cpus: float = 4, labels: dict[str, str] | None = None, **resources: float) -> SimAgent:
        self._last_peer += 1
        total = to_amounts({"CPU": cpus, **resources})
        agent = SimAgent(self, self._last_peer, NodeId(self.rng.randbytes(28)), total, labels or {})
        self.agents[agent.peer] = agent
        settings = self.settings
        hello = RegisterNode(rid=self.next_rid(), node=agent.info(), python=settings.python, version=settings.version)
        agent.say(hello)
        self.deliver_from(agent)
        return agent

    def add_quiet_node(self, cpus: float = 4) -> SimAgent:
        """As `add_node`, without telling it of its neighbours: what is quadratic in nodes is not what is measured."""
        agent = self.add_node(cpus)
        for other in self.agents.values():
            other.from_control.clear()
        return agent

    def add_driver(self, agent: SimAgent, namespace: str = "", classes: tuple[str, ...] = ("Counter",)) -> SimProcess:
        """A job whose driver is at this agent, with the code of its classes put."""
        worker_id = WorkerId(self.rng.randbytes(28))
        rid = self.next_rid()
        agent.say(RegisterJob(rid=rid, job=JobInfo(b"", namespace, worker_id, b"", driver_pid=7)))
        self.deliver_from(agent)
        reply = next(m for m in reversed(agent.seen) if isinstance(m, JobRegistered) and m.rid == rid)
        driver = agent.processes[worker_id] = SimProcess(self, agent, worker_id, reply.job)
        for cls in classes:
            driver.ask(PutKey(space=FUNCTIONS, key=b"code of " + cls.encode(), value=b"pickled " + cls.encode()))
        return driver

    def add_worker(self, agent: SimAgent, job: JobInfo) -> SimProcess:
        worker_id = WorkerId(self.rng.randbytes(28))
        worker = agent.processes[worker_id] = SimProcess(self, agent, worker_id, job)
        return worker

    def kill_node(self, agent: SimAgent) -> None:
        """Its connection closes; what it had said and not delivered is lost."""
        del self.agents[agent.peer]
        self._route(self.state.disconnected(agent.peer, "its connection closed", self.now))

    def tool(self, message: Message) -> list[Message]:
        """What a fresh direct connection is told in answer to this."""
        self._last_peer += 1
        self.tools[self._last_peer] = []
        self._route(self.state.handle(self._last_peer, message, self.now))
        return self.tools[self._last_peer]

    def next_rid(self) -> int:
        self._last_rid += 1
        return self._last_rid

    # ------------------------------------------------------------------------------------------------ what moves

    def deliver_from(self, agent: SimAgent) -> None:
        """All that this agent has said goes to control, and what control says to this agent arrives."""
        while agent.to_control:
            self._route(self.state.handle(agent.peer, agent.to_control.popleft(), self.now))
        while agent.from_control:
            agent.receive(agent.from_control.popleft())

    def step(self) -> bool:
        """One message of one queue, drawn by lot, moves. False when all queues are empty."""
        moves = [(agent, True) for agent in self.agents.values() if agent.to_control]
        moves += [(agent, False) for agent in self.agents.values() if agent.from_control]
        if not moves:
            return False
        agent, up = self.rng.choice(moves)
        if up:
            self._route(self.state.handle(agent.peer, agent.to_control.popleft(), self.now))
        else:
            agent.receive(agent.from_control.popleft())
        return True

    def settle(self, limit: int = 100_000) -> None:
        """Deliver until nothing is on its way; the clock stands still."""
        for _ in range(limit):
            if not self.step():
                return
        raise AssertionError("the cluster does not come to rest")

    def advance(self, seconds: float, *, settle: bool = True) -> None:
        """Let time pass: ticks come at their deadlines, agents report once a second, messages travel in no time."""
        end = self.now + seconds
        while True:
            if settle:
                self.settle()
            due = min(self.state.deadline(), self._heartbeat_at)
            if due > end:
                break
            self.now = max(self.now, due)
            if self.now >= self._heartbeat_at:
                self._heartbeat_at = self.now + HEARTBEAT_S
                for agent in self.agents.values():
                    agent.report()
                if settle:
                    self.settle()
            self._route(self.state.tick(self.now))
        self.now = end
        if settle:
            self.settle()

    def silence(self, seconds: float) -> None:
        """Time passes and no agent is heard."""
        end = self.now + seconds
        while (due := self.state.deadline()) <= end:
            self.now = max(self.now, due)
            self._route(self.state.tick(self.now))
        self.now = end

    def _route(self, sends: list[Send]) -> None:
        for peer, message in sends:
            if isinstance(message, StartActor):
                life = (message.spec.actor_id, message.incarnation)
                assert life not in self.lives, "each life of an actor is begun once, on one node"
                self.lives[life] = peer
            agent = self.agents.get(peer)
            if agent is not None:
                agent.from_control.append(message)
            elif peer in self.tools:
                self.tools[peer].append(message)


def count_by_node(cluster: SimCluster) -> dict[bytes, int]:
    """How many actors each living node runs."""
    return {agent.node_id: len(agent.running) for agent in cluster.agents.values()}
