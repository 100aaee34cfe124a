"""The cluster's state machine: a message or a tick in, messages out. No IO, no clock, no asyncio.

`handle` takes what a peer said, `disconnected` that it is gone, `tick` that time has passed; each returns what to send
to whom, in order. `deadline` says when the next tick is useful. Between two calls everything is consistent
(`check_invariants`), so a test or a simulator drives it exactly as the server does.

This module knows peers, nodes, jobs and keys; what concerns actors is in `lives.py`. A node that is declared dead stays
so: whatever its agent says later is answered with StopNode, and its work has been given to others.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import msgspec

from shoal.control.group_lives import GroupLives
from shoal.control.jobs import JobRecord, JobTable
from shoal.control.keys import KeyLimitError, KeyStore
from shoal.control.lives import ActorLives
from shoal.control.log_flushes import LogFlushes
from shoal.control.mail import Outbox, Send
from shoal.control.messages import (
    ActorFailed,
    ActorGone,
    ActorOutOfScope,
    ActorStarted,
    ActorWaits,
    BundlesPrepared,
    CreateActor,
    CreateGroup,
    DeleteKey,
    FindActor,
    FindGroup,
    FlushLogs,
    GetJob,
    GetKey,
    GetStatus,
    JobEnded,
    JobRegistered,
    JobsReply,
    KeyReply,
    KillActor,
    ListActors,
    ListGroups,
    ListJobs,
    ListKeys,
    ListMetrics,
    LogLines,
    LogsArrived,
    LogsFlushed,
    MetricsReply,
    NodeInfo,
    NodeRegistered,
    NodeReport,
    NodesChanged,
    Notice,
    ProcessGone,
    ProcessMessage,
    ProvideArguments,
    PublishLogs,
    PutKey,
    RegisterJob,
    RegisterNode,
    Relay,
    RemoveGroup,
    ReportMetrics,
    StatusReply,
    StopNode,
    UnwatchActor,
    WatchActor,
    WatchGroup,
)
from shoal.control.metrics import MetricTable
from shoal.control.names import anonymous_namespace
from shoal.control.nodes import NodeRecord, NodeTable
from shoal.control.processes import Origin, ProcessTable
from shoal.control.settings import ControlSettings
from shoal.objects.ids import ActorId, JobId
from shoal.rpc.messages import Message, Request

logger = logging.getLogger(__name__)

INFINITY = float("inf")
STOP_REPEAT_S = 1.0
"""A node that was declared dead and goes on talking is told to end at most this often."""
CHECKS_PER_TIMEOUT = 10
"""Silence is noticed within a tenth of the timeout after it."""


class ControlState:
    """See the module.

    Args:
        rng: for namespaces and for choices among equal nodes.
        now: the clock that all other calls' `now` is on, in seconds.
        unix_s: the same moment as Unix time, for what people are shown.
    """

    def __init__(
        self, settings: ControlSettings, cluster_id: bytes, rng: random.Random, now: float, unix_s: float
    ) -> None:
        self._settings = settings
        self._cluster_id = cluster_id
        self._rng = rng
        self._started_unix_s = unix_s
        self._outbox = Outbox(now, unix_s - now)
        self._nodes = NodeTable(settings.max_dead_nodes)
        self._fenced: dict[int, float] = {}  # connections of dead nodes -> when to tell them again
        self._changed: dict[bytes, None] = {}  # nodes whose availability the others do not know yet
        self._flush_at = INFINITY
        self._check_at = INFINITY
        self._jobs = JobTable(settings.max_ended_jobs)
        self._keys = KeyStore(settings.max_value_bytes, settings.max_store_bytes)
        self._processes = ProcessTable()
        self._metrics = MetricTable(settings.max_series)
        self._log_flushes = LogFlushes(self._outbox)
        lives = ActorLives(settings, self._outbox, self._nodes, self._jobs, self._keys, self._processes, rng)
        self._lives = lives
        groups = GroupLives(settings, self._outbox, self._nodes, self._jobs, lives, self._note_changed)
        self._groups = groups
        lives.why_group_is_gone, lives.on_end = groups.was_removed, groups.actor_ended
        self._decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(ProcessMessage).decode
        self._of_agents: dict[type[Message], Callable[[NodeRecord, Any], None]] = {
            NodeReport: self._node_report,
            RegisterJob: self._register_job,
            GetJob: self._get_job,
            ProcessGone: self._process_gone,
            ActorStarted: lives.started,
            ActorFailed: lives.failed,
            ActorGone: lives.gone,
            ActorOutOfScope: self._actor_out_of_scope,
            Relay: self._relay,
            PublishLogs: self._publish_logs,
            LogsFlushed: lambda node, message: self._log_flushes.flushed(node.peer, message.number),
            ActorWaits: lives.waits,
            BundlesPrepared: groups.prepared,
        }
        self._of_processes: dict[type[Message], Callable[[Origin, bytes, Any], None]] = {
            CreateActor: lives.create,
            FindActor: lives.find,
            WatchActor: lives.watch,
            UnwatchActor: lives.unwatch,
            KillActor: lives.kill,
            ListActors: lives.answer_list,
            PutKey: self._put_key,
            GetKey: self._get_key,
            DeleteKey: self._delete_key,
            ListKeys: self._list_keys,
            GetStatus: self._get_status,
            ListJobs: self._list_jobs,
            FlushLogs: self._flush_logs,
            ProvideArguments: lives.provide,
            ReportMetrics: self._report_metrics,
            ListMetrics: self._list_metrics,
            CreateGroup: groups.create,
            RemoveGroup: groups.remove,
            FindGroup: groups.find,
            ListGroups: groups.answer_list,
            WatchGroup: groups.watch,
        }

    # ---------------------------------------------------------------------------------------------------- inputs

    def handle(self, peer: int, message: Message, now: float) -> list[Send]:
        """What `peer` said. A peer is an agent once it has registered a node, and a tool otherwise."""
        self._outbox.now = now
        node = self._nodes.at(peer)
        if node is not None:
            node.heard_at = now
        kind = type(message)
        of_process = self._of_processes.get(kind)
        if of_process is not None:
            of_process(Origin(peer, b""), b"", message)
        elif peer in self._fenced:
            self._tell_fenced(peer, message)
        elif isinstance(message, RegisterNode):
            self._register_node(peer, message)
        elif node is not None:
            self._of_agents[kind](node, message)
        elif isinstance(message, Request):
            text = f"{kind.__name__} is for agents, and this connection has not registered a node"
            self._outbox.refuse(Origin(peer, b""), message, "unregistered", text)
        else:
            logger.warning("ignored a message of a peer without a node peer=%s message=%s", peer, kind.__name__)
        return self._finish()

    def disconnected(self, peer: int, reason: str, now: float) -> list[Send]:
        """The connection is gone; nothing is sent to this peer any more."""
        self._outbox.now = now
        node = self._nodes.at(peer)
        if node is not None:
            self._bury(node, reason)
        else:
            self._lives.end_owned(self._processes.drop_peer(peer), "the tool that created it disconnected")
            self._groups.peer_gone(peer)
        self._fenced.pop(peer, None)
        return [send for send in self._finish() if send.peer != peer]

    def tick(self, now: float) -> list[Send]:
        """Do what is due. Safe at any time, needed at `deadline()`."""
        self._outbox.now = now
        if now >= self._check_at:
            self._check_nodes()
        self._lives.tick()
        self._groups.tick()
        if now >= self._flush_at:
            self._flush_nodes()
        return self._finish()

    def _finish(self) -> list[Send]:
        self._lives.place_waiting()
        self._groups.place_waiting()
        return self._outbox.take()

    def deadline(self) -> float:
        """The clock at which `tick` has something to do; infinity when only messages can change anything."""
        return min(self._check_at, self._flush_at, self._lives.deadline(), self._groups.deadline())

    def shutdown(self, reason: str) -> list[Send]:
        """The cluster ends: every node is told to."""
        for node in self._nodes:
            self._outbox.send(node.peer, StopNode(reason))
        return self._outbox.take()

    # ----------------------------------------------------------------------------------------------------- nodes

    def _register_node(self, peer: int, request: RegisterNode) -> None:
        refusal = self._why_not(peer, request)
        if refusal is not None:
            kind, text = refusal
            logger.warning("refused a node node=%s reason=%s", request.node.node_id.hex(), text)
            self._outbox.refuse(Origin(peer, b""), request, kind, text)
            return
        node = self._nodes.add(request.node, peer, self._outbox.now)
        if self._check_at == INFINITY:
            self._check_at = self._outbox.now + self._check_every_s()
        logger.info("node joined node=%s address=%s total=%s", node.node_id.hex(), node.info.address, node.info.total)
        reply = NodeRegistered(cluster_id=self._cluster_id, nodes=self._nodes.infos(dead=False))
        self._outbox.answer(Origin(peer, b""), request, reply)
        self._changed[node.node_id] = None
        self._flush_nodes(but=peer)
        self._lives.node_joined(node)
        self._groups.room_made()

    def _why_not(self, peer: int, request: RegisterNode) -> tuple[str, str] | None:
        """Kind and text of the refusal."""
        info, settings = request.node, self._settings
        where = f"node {info.node_id.hex()[:12]} ({info.hostname or 'unknown host'}, {info.address})"
        for what, theirs, ours in (
            ("shoal", request.version, settings.version),
            ("Python", request.python, settings.python),
        ):
            if minor_of(theirs) != minor_of(ours):
                needs = f"install {what} {minor_of(ours)} there, or start the cluster with {what} {minor_of(theirs)}"
                return "version", f"{where} runs {what} {theirs or 'unknown'} and the head runs {what} {ours}; {needs}"
        if self._nodes.at(peer) is not None:
            return "duplicate", f"{where} has registered on this connection already"
        living = self._nodes.find(info.node_id)
        if living is not None:
            return "duplicate", f"a node with the id of {where} is in the cluster already, at {living.info.address}"
        dead = self._nodes.find_dead(info.node_id)
        if dead is not None:
            return "duplicate", f"{where} was declared dead ({dead.death_reason}); start it anew, with an id of its own"
        return None

    def _node_report(self, node: NodeRecord, report: NodeReport) -> None:
        if self._nodes.report(node, report):
            self._note_changed(node)
        self._lives.room_made(node)
        self._groups.room_made()

    def _note_changed(self, node: NodeRecord) -> None:
        """The other agents are to hear what this node has and what is free there."""
        self._changed[node.node_id] = None
        if self._flush_at == INFINITY:
            settings = self._settings
            pause_s = max(settings.coalesce_s, settings.coalesce_per_node_s * len(self._nodes))
            self._flush_at = self._outbox.now + pause_s

    def _flush_nodes(self, gone: NodeInfo | None = None, but: int = -1) -> None:
        """Tell all agents but one which nodes changed."""
        rows = [node.info for node_id in self._changed if (node := self._nodes.find(node_id)) is not None]
        if gone is not None:
            rows.append(gone)
        self._changed.clear()
        self._flush_at = INFINITY
        if rows:
            message = NodesChanged(rows)
            for node in self._nodes:
                if node.peer != but:
                    self._outbox.send(node.peer, message)

    def _check_every_s(self) -> float:
        return self._settings.node_timeout_s / CHECKS_PER_TIMEOUT

    def _check_nodes(self) -> None:
        now, timeout_s = self._outbox.now, self._settings.node_timeout_s
        if now - self._check_at > timeout_s / 2:
            # It was us who slept (a suspended laptop, a stopped process): what the nodes said is still unread.
            for node in self._nodes:
                node.heard_at = now
        silent = [node for node in self._nodes if now - node.heard_at >= timeout_s]
        for node in silent:
            self._fenced[node.peer] = now + STOP_REPEAT_S
            reason = f"nothing was heard from it for {now - node.heard_at:.0f} s"
            self._outbox.send(node.peer, StopNode(f"control declared this node dead: {reason}"))
            self._bury(node, reason)
        self._check_at = now + self._check_every_s() if len(self._nodes) else INFINITY

    def _tell_fenced(self, peer: int, message: Message) -> None:
        text = "control declared this node dead, and its work was given to others"
        if isinstance(message, Request):
            self._outbox.refuse(Origin(peer, b""), message, "duplicate", text)
        if self._outbox.now >= self._fenced[peer]:
            self._fenced[peer] = self._outbox.now + STOP_REPEAT_S
            self._outbox.send(peer, StopNode(text))

    def _bury(self, node: NodeRecord, reason: str) -> None:
        """A node is dead: its jobs, its processes and its actors in this order, so that nothing restarts for nobody."""
        logger.warning("node died node=%s address=%s reason=%s", node.node_id.hex(), node.info.address, reason)
        row = self._nodes.bury(node, reason)
        self._log_flushes.node_gone(node.peer)
        self._groups.peer_gone(node.peer)
        self._groups.node_died(node, reason)
        self._metrics.node_gone(node.peer)
        for job in self._jobs.at(node.peer):
            self._end_job(job, f"the node of the job's driver died: {reason}")
        owned = self._processes.drop_peer(node.peer)
        self._lives.end_owned(owned, f"the process that created it was on {node.describe()}, which died: {reason}")
        lost = len(node.actors)
        self._lives.node_died(node, reason)
        self._flush_nodes(gone=row)
        text = f"{node.describe()} left the cluster: {reason}" + (f"; actors on it: {lost}" if lost else "")
        for job in self._jobs.running():
            self._tell_driver(job, Notice(f"node-died:{node.node_id.hex()}", "warning", text))

    # ------------------------------------------------------------------------------------------ jobs and processes

    def _register_job(self, node: NodeRecord, request: RegisterJob) -> None:
        namespace = anonymous_namespace(self._rng)
        job = self._jobs.add(
            request.job, node.peer, namespace=namespace, node_id=node.node_id, unix_s=self._outbox.unix()
        )
        logger.info("job began job=%s driver_pid=%s", job.info.job_id.hex(), job.info.driver_pid)
        self._outbox.answer(Origin(node.peer, b""), request, JobRegistered(job=job.info))

    def _get_job(self, node: NodeRecord, request: GetJob) -> None:
        origin, job = Origin(node.peer, b""), self._jobs.find(JobId(request.job_id))
        if job is None:
            self._outbox.refuse(
                origin, request, "not_found", f"job {request.job_id.hex()} is not known to this cluster"
            )
        elif job.running or job.actors:  # a detached actor may restart on a node that never saw its job
            self._outbox.answer(origin, request, JobRegistered(job=job.info))
        else:
            self._outbox.refuse(origin, request, "ended", f"job {request.job_id.hex()} has ended")

    def _process_gone(self, node: NodeRecord, message: ProcessGone) -> None:
        if message.is_driver:
            job = self._jobs.find(JobId(message.job_id))
            if job is not None and job.running:
                self._end_job(job, f"the job's driver is gone: {message.cause}")
        self._log_flushes.process_gone(Origin(node.peer, message.worker_id))
        self._groups.process_gone(Origin(node.peer, message.worker_id))
        self._metrics.process_gone(node.peer, message.worker_id)
        owned = self._processes.drop(Origin(node.peer, message.worker_id))
        job = self._jobs.find(JobId(message.job_id))
        if message.retired and job is not None and job.running:
            self._lives.hand_on(owned, Origin(job.peer, job.info.driver_id))
        else:
            self._lives.end_owned(owned, f"the process that created it is gone: {message.cause}")

    def _end_job(self, job: JobRecord, cause: str) -> None:
        logger.info("job ended job=%s cause=%s", job.info.job_id.hex(), cause)
        self._jobs.end(job, self._outbox.unix())
        self._lives.end_job(job, cause)
        self._groups.end_job(job.info.job_id, cause)
        for node in self._nodes:
            self._outbox.send(node.peer, JobEnded(job.info.job_id))

    def _actor_out_of_scope(self, node: NodeRecord, message: ActorOutOfScope) -> None:
        self._lives.out_of_scope(ActorId(message.actor_id))

    def _relay(self, node: NodeRecord, relay: Relay) -> None:
        try:
            message = self._decode(relay.body)
        except (ValueError, RecursionError) as exc:  # msgspec's own are ValueErrors, and so is text that is not UTF-8
            # A process runs user code and may send anything; that must not cost its node the connection.
            logger.warning("unreadable message worker=%s node=%s: %s", relay.worker_id.hex(), node.node_id.hex(), exc)
            return
        self._of_processes[type(message)](Origin(node.peer, relay.worker_id), relay.job_id, message)

    def _publish_logs(self, node: NodeRecord, message: PublishLogs) -> None:
        by_job: dict[bytes, list[LogLines]] = {}
        for entry in message.entries:
            by_job.setdefault(entry.job_id, []).append(entry)
        for job_id, entries in by_job.items():
            job = self._jobs.find(JobId(job_id))
            if job is not None and job.running and job.info.log_to_driver:
                self._tell_driver(job, LogsArrived(entries))

    def _report_metrics(self, origin: Origin, job_id: bytes, message: ReportMetrics) -> None:
        self._metrics.report(origin.peer, origin.worker_id, message.rows)

    def _list_metrics(self, origin: Origin, job_id: bytes, request: ListMetrics) -> None:
        reply = MetricsReply(rows=self._metrics.rows(), dropped=self._metrics.dropped)
        self._outbox.answer(origin, request, reply)

    def _flush_logs(self, origin: Origin, job_id: bytes, request: FlushLogs) -> None:
        self._log_flushes.begin(origin, job_id, request, [node.peer for node in self._nodes])

    def _tell_driver(self, job: JobRecord, message: Message) -> None:
        self._outbox.tell(Origin(job.peer, job.info.driver_id), message)

    # ------------------------------------------------------------------------------------------------------ keys

    def _put_key(self, origin: Origin, job_id: bytes, request: PutKey) -> None:
        try:
            found = self._keys.put(
                request.space, request.key, request.value, overwrite=request.overwrite, job_id=JobId(job_id)
            )
        except KeyLimitError as exc:
            self._outbox.refuse(origin, request, exc.kind, exc.text)
            return
        self._outbox.answer(origin, request, KeyReply(found=found))

    def _get_key(self, origin: Origin, job_id: bytes, request: GetKey) -> None:
        value = self._keys.find(request.space, request.key)
        self._outbox.answer(origin, request, KeyReply(found=value is not None, value=value or b""))

    def _delete_key(self, origin: Origin, job_id: bytes, request: DeleteKey) -> None:
        delete = self._keys.delete_prefix if request.by_prefix else self._keys.delete
        count = delete(request.space, request.key)
        self._outbox.answer(origin, request, KeyReply(found=count > 0, count=count))

    def _list_keys(self, origin: Origin, job_id: bytes, request: ListKeys) -> None:
        keys = self._keys.list_keys(request.space, request.prefix)
        self._outbox.answer(origin, request, KeyReply(found=bool(keys), keys=keys, count=len(keys)))

    # ---------------------------------------------------------------------------------------------------- status

    def _get_status(self, origin: Origin, job_id: bytes, request: GetStatus) -> None:
        demands = [demand for node in self._nodes for demand in node.demands]
        demands.extend(self._lives.demand_reports())
        demands.extend(self._groups.demand_reports())
        reply = StatusReply(
            cluster_id=self._cluster_id,
            nodes=self._nodes.infos(dead=True),
            demands=demands,
            actors=self._lives.counts(),
            jobs=[job.info for job in self._jobs],
            started_unix_s=self._started_unix_s,
            version=self._settings.version,
        )
        self._outbox.answer(origin, request, reply)

    def _list_jobs(self, origin: Origin, job_id: bytes, request: ListJobs) -> None:
        self._outbox.answer(origin, request, JobsReply(jobs=[job.info for job in self._jobs]))

    # ------------------------------------------------------------------------------------------------ invariants

    def check_invariants(self) -> None:
        """What holds between any two calls; for tests and simulations."""
        self._nodes.check_invariants()
        self._keys.check_invariants()
        self._lives.check_invariants()
        self._groups.check_invariants()
        assert self._check_at < INFINITY or not len(self._nodes)
        assert bool(self._changed) <= (self._flush_at < INFINITY)
        assert not any(self._nodes.at(peer) for peer in self._fenced)


def minor_of(version: str) -> str:
    """ "3.12.1" -> "3.12": what must agree between two nodes."""
    return ".".join(version.split(".")[:2])
