"""The cluster's state machine: a message or a tick in, messages out. No IO, no clock, no asyncio.

`handle` takes what a peer said, `disconnected` that it is gone, `tick` that time has passed; each returns what to send to
whom, in order. `deadline` says when the next tick is useful. Between two calls everything is consistent
(`check_invariants`), so that a test or a simulator drives it exactly as the server does.

Three things tie the tables together:
- an actor changes only in `_step`, which walks the table in `actors.py` and does all that follows from that step;
- an actor without a place stands in a line (`placement.py`) or, in a crash loop, in `_held_back` until its time;
- whoever is gone (process, node, job) is undone by ending what it owned, through the same steps.
"""

from __future__ import annotations

import heapq
import logging
import random
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, assert_never

import msgspec

from shoal.control.actors import (
    DEAD,
    PLACED,
    STOPPING,
    WAITING,
    ActorRecord,
    Ended,
    Event,
    Fell,
    Placed,
    Recycled,
    Refused,
    Retired,
    Started,
)
from shoal.control.jobs import JobRecord, JobTable
from shoal.control.keys import KeyLimitError, KeyStore
from shoal.control.messages import (
    FUNCTIONS,
    ActorFailed,
    ActorGone,
    ActorInfo,
    ActorOutOfScope,
    ActorReply,
    ActorsReply,
    ActorStarted,
    ActorUpdate,
    CreateActor,
    DeleteKey,
    FindActor,
    GetJob,
    GetKey,
    GetStatus,
    JobEnded,
    JobRegistered,
    JobsReply,
    KeyReply,
    KillActor,
    ListActors,
    ListJobs,
    ListKeys,
    LogLines,
    LogsArrived,
    NodeInfo,
    NodeRegistered,
    NodeReport,
    NodesChanged,
    Notice,
    ProcessGone,
    ProcessMessage,
    PublishLogs,
    PutKey,
    RegisterJob,
    RegisterNode,
    Relay,
    RelayReply,
    StartActor,
    StatusReply,
    StopActor,
    StopNode,
    UnwatchActor,
    WatchActor,
)
from shoal.control.names import NameTable
from shoal.control.nodes import NodeRecord, NodeTable
from shoal.control.placement import Infeasible, Line, Node, WaitingRoom
from shoal.control.processes import Origin, ProcessTable
from shoal.control.remembered import Remembered
from shoal.control.settings import ControlSettings
from shoal.objects.ids import ActorId, JobId
from shoal.rpc.messages import Done, Failed, Message, Reply, Request
from shoal.scheduling.resources import fits
from shoal.scheduling.views import WaitReason

logger = logging.getLogger(__name__)

INFINITY = float("inf")
ERROR_BYTES_KEPT = 1 << 20
"""A dead actor's pickled exception above this is told to those who watch and then forgotten."""
STOP_REPEAT_S = 1.0
"""A node that was declared dead and goes on talking is told to end at most this often."""


class Send(NamedTuple):
    peer: int
    message: Message


class ControlState:
    """See the module.

    Args:
        rng: for namespaces and for choices among equal nodes.
        now: the clock that all other calls' `now` is on, in seconds.
        unix_s: the same moment as Unix time, for what people are shown.
    """

    def __init__(self, settings: ControlSettings, cluster_id: bytes, rng: random.Random, now: float, unix_s: float) -> None:
        self._settings = settings
        self._cluster_id = cluster_id
        self._rng = rng
        self._now = now
        self._to_unix = unix_s - now
        self._started_unix_s = unix_s
        self._out: list[Send] = []

        self._nodes = NodeTable(settings.max_dead_nodes)
        self._fenced: dict[int, float] = {}  # peers of dead nodes that are still connected -> when to tell them again
        self._changed: dict[bytes, None] = {}  # nodes whose availability the others do not know yet
        self._flush_at = INFINITY
        self._check_at = INFINITY
        self._checked_at = now

        self._jobs = JobTable(settings.max_ended_jobs)
        self._keys = KeyStore(settings.max_value_bytes, settings.max_store_bytes)
        self._processes = ProcessTable()

        self._actors: dict[ActorId, ActorRecord] = {}
        self._dead: Remembered[ActorId, ActorInfo] = Remembered(settings.max_dead_actors, settings.max_dead_bytes)
        self._names = NameTable()
        self._room = WaitingRoom(self._nodes, rng)
        self._held_back: list[tuple[float, ActorId]] = []
        self._recheck_at = INFINITY
        self._notice_at = INFINITY

        self._decode: Callable[[bytes], Any] = msgspec.msgpack.Decoder(ProcessMessage).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._of_agents: dict[type[Message], Callable[[NodeRecord, Any], None]] = {
            NodeReport: self._node_report,
            RegisterJob: self._register_job,
            GetJob: self._get_job,
            ProcessGone: self._process_gone,
            ActorStarted: self._actor_started,
            ActorFailed: self._actor_failed,
            ActorGone: self._actor_gone,
            ActorOutOfScope: self._actor_out_of_scope,
            Relay: self._relay,
            PublishLogs: self._publish_logs,
        }
        self._of_processes: dict[type[Message], Callable[[Origin, bytes, Any], None]] = {
            CreateActor: self._create_actor,
            FindActor: self._find_actor,
            WatchActor: self._watch_actor,
            UnwatchActor: self._unwatch_actor,
            KillActor: self._kill_actor,
            PutKey: self._put_key,
            GetKey: self._get_key,
            DeleteKey: self._delete_key,
            ListKeys: self._list_keys,
            GetStatus: self._get_status,
            ListActors: self._list_actors,
            ListJobs: self._list_jobs,
        }

    # ------------------------------------------------------------------------------------------------ three inputs

    def handle(self, peer: int, message: Message, now: float) -> list[Send]:
        """What `peer` said. A peer is an agent once it has registered a node, and a tool otherwise."""
        self._now = now
        node = self._nodes.at(peer)
        if node is not None:
            node.heard_at = now
        kind = type(message)
        if (of_process := self._of_processes.get(kind)) is not None:
            of_process(Origin(peer, b""), b"", message)
        elif peer in self._fenced:
            self._fence(peer)
        elif kind is RegisterNode:
            self._register_node(peer, message)  # type: ignore[arg-type]
        elif node is not None and (of_agent := self._of_agents.get(kind)) is not None:
            of_agent(node, message)
        elif isinstance(message, Request):
            text = f"{kind.__name__} is for agents, and this connection has not registered a node"
            self._answer(Origin(peer, b""), message, Failed(kind="unregistered", text=text))
        else:
            logger.warning("ignored a message of a peer that has not registered peer=%s message=%s", peer, kind.__name__)
        return self._take()

    def disconnected(self, peer: int, reason: str, now: float) -> list[Send]:
        """The connection is gone; nothing can be sent to this peer any more."""
        self._now = now
        node = self._nodes.at(peer)
        if node is not None:
            self._bury(node, reason)
        else:
            self._end_owned(self._processes.drop_peer(peer), "the tool that created it disconnected")
        self._fenced.pop(peer, None)
        return [send for send in self._take() if send.peer != peer]

    def tick(self, now: float) -> list[Send]:
        """Do what is due. Safe to call at any time; needed at `deadline()`."""
        self._now = now
        if now >= self._check_at:
            self._check_nodes()
        while self._held_back and self._held_back[0][0] <= now:
            _, actor_id = heapq.heappop(self._held_back)
            actor = self._actors.get(actor_id)
            if actor is not None and actor.state in WAITING and self._room.line_of(actor_id) is None:
                self._enqueue(actor)
        if now >= self._recheck_at:
            self._recheck_at = INFINITY
            for line in self._room.lines():
                self._place(line)
        if now >= self._flush_at:
            self._flush_nodes()
        if now >= self._notice_at:
            self._give_notice()
        return self._take()

    def deadline(self) -> float:
        """The clock at which `tick` has something to do; infinity when only messages can change anything."""
        held = self._held_back[0][0] if self._held_back else INFINITY
        return min(self._check_at, self._flush_at, self._recheck_at, self._notice_at, held)

    def shutdown(self, reason: str) -> list[Send]:
        """The cluster ends: every node is told to."""
        for node in self._nodes:
            self._out.append(Send(node.peer, StopNode(reason)))
        return self._take()

    # ----------------------------------------------------------------------------------------------------- sending

    def _take(self) -> list[Send]:
        out, self._out = self._out, []
        return out

    def _tell(self, origin: Origin, message: Message) -> None:
        if origin.worker_id:
            message = RelayReply(origin.worker_id, self._encode(message))
        self._out.append(Send(origin.peer, message))

    def _answer(self, origin: Origin, request: Request, reply: Reply) -> None:
        """`reply` must have been made for this request: it is given its `rid`."""
        if request.rid:
            msgspec.structs.force_setattr(reply, "rid", request.rid)
            self._tell(origin, reply)

    def _refuse(self, origin: Origin, request: Request, kind: str, text: str) -> None:
        self._answer(origin, request, Failed(kind=kind, text=text))

    def _push(self, actor: ActorRecord) -> None:
        watchers = self._processes.watchers(actor.actor_id)
        if watchers:
            update = ActorUpdate(actor.info())
            body = self._encode(update)
            for peer, worker_id in watchers:
                self._out.append(Send(peer, RelayReply(worker_id, body) if worker_id else update))

    def _unix(self) -> float:
        return self._now + self._to_unix
