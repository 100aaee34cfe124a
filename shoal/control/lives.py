"""All actors: what is asked of them, what happens to them, and what follows from it.

An actor changes only in `_step`, which walks the table in `actors.py` and then does everything that this step implies:
book or leave a node, join or leave a line, start or stop the process, tell the watchers, and at the end of its life
give back name, ownership and place in its job. Everything else here decides which event an actor is given.

Agents' words about an actor are checked against its incarnation and its node; a word about an earlier life is dropped,
and a process that started for an earlier life is told to end.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections.abc import Callable, Iterable, Iterator
from typing import assert_never

import msgspec

from shoal.control.actors import (
    ALIVE,
    DEAD,
    PLACED,
    RECYCLING,
    STARTS,
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
from shoal.control.keys import KeyStore
from shoal.control.mail import Outbox
from shoal.control.messages import (
    FUNCTIONS,
    ActorFailed,
    ActorGone,
    ActorInfo,
    ActorReply,
    ActorsReply,
    ActorStarted,
    ActorUpdate,
    ActorWaits,
    CreateActor,
    FindActor,
    KillActor,
    ListActors,
    Notice,
    ProvideArguments,
    StartActor,
    StopActor,
    UnwatchActor,
    WatchActor,
)
from shoal.control.names import NameTable
from shoal.control.nodes import NodeRecord, NodeTable
from shoal.control.placement import Infeasible, Line, Node, WaitingRoom
from shoal.control.processes import Origin, ProcessTable
from shoal.control.remembered import Remembered
from shoal.control.settings import ControlSettings
from shoal.objects.ids import ACTOR_BYTES, ActorId, JobId
from shoal.rpc.messages import Done
from shoal.scheduling.resources import add, fits
from shoal.scheduling.views import Amounts, DemandReport, WaitReason

logger = logging.getLogger(__name__)

INFINITY = float("inf")
UNWANTED_ENDS = frozenset({"crashed", "node_died", "init_failed", "unschedulable"})
QUICK_FALLS_FREE = 3
"""Starts that may fail at once before the next one waits."""
STAND_AFTER_S = 0.5
"""An actor that has waited for so long goes to stand in line at a busy node, and does so for `PATIENCE_S`. Then it is
placed anew, since there may be room elsewhere by now."""
PATIENCE_S, SHORT_PATIENCE_S = 10.0, 0.2
"""The short one is for a node that seemed to have room: tasks may have taken it a moment ago, or just hold it idle."""
FIRST_DELAY_S, MOST_DELAY_S = 0.1, 10.0
"""Waiting time in a crash loop: doubles from the first to the most."""


class ActorLives:
    """See the module. All tables but the actors' own are shared with the state machine that owns this."""

    def __init__(
        self, settings: ControlSettings, outbox: Outbox, nodes: NodeTable, jobs: JobTable, keys: KeyStore,
        processes: ProcessTable, rng: random.Random,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._outbox = outbox
        self._nodes = nodes
        self._jobs = jobs
        self._keys = keys
        self._processes = processes
        self._actors: dict[ActorId, ActorRecord] = {}
        self._dead: Remembered[ActorId, ActorInfo] = Remembered(settings.max_dead_actors, settings.max_dead_bytes)
        self._names = NameTable()
        self._room = WaitingRoom(nodes, rng)
        self._held_back: list[tuple[float, ActorId]] = []
        self._roomy: dict[bytes, None] = {}  # nodes to try the lines on at the end of this round
        self._in_groups: dict[bytes, set[ActorId]] = {}  # placement group -> actors that live in it
        self._recheck_at = INFINITY
        self._notice_at = INFINITY
        # What placement groups have to say and hear (see `group_lives`); set by who owns both.
        self.why_group_is_gone: Callable[[bytes], str] = lambda _: ""
        self.on_end: Callable[[ActorId, str], None] = lambda *_: None

    # ---------------------------------------------------------------------------------------------- what is asked

    def create(self, origin: Origin, job_id: bytes, request: CreateActor) -> None:
        spec = request.spec
        actor_id = ActorId(spec.actor_id)
        known = self.find_info(actor_id)
        if known is not None:  # asked again, for instance after a connection was made anew
            self._outbox.answer(origin, request, ActorReply(actor=known))
            return
        job = self._jobs.find(JobId(spec.job_id))
        if job is None:
            text = f"cannot create {spec.class_name}: job {spec.job_id.hex()} is not known to this cluster"
            self._outbox.refuse(origin, request, "not_found", text)
            return
        if len(actor_id) != ACTOR_BYTES:
            text = f"cannot create {spec.class_name}: an actor id has {ACTOR_BYTES} bytes, not {len(actor_id)}"
            self._outbox.refuse(origin, request, "invalid", text)
            return
        if len(self._actors) >= self._settings.max_actors:
            text = f"cannot create {spec.class_name}: the cluster has {len(self._actors):,} actors, which is its limit"
            self._outbox.refuse(origin, request, "limit", text)
            return
        spec = msgspec.structs.replace(
            spec, namespace=spec.namespace or job.info.namespace, owner_id=origin.worker_id or spec.owner_id
        )
        if spec.name:
            holder_id = self._names.find(spec.namespace, spec.name)
            if holder_id is not None:
                self._answer_taken(origin, request, self._actors[holder_id])
                return
            self._names.bind(spec.namespace, spec.name, actor_id)
        actor = self._actors[actor_id] = ActorRecord(spec, origin, self._outbox.now)
        job.actors.add(actor_id)
        if not spec.detached:
            self._processes.own(origin, actor_id)
        group_id = spec.strategy.group
        if group_id:
            self._in_groups.setdefault(group_id, set()).add(actor_id)
        gone = self.why_group_is_gone(group_id) if group_id else ""
        if gone:
            self._step(actor, Ended("group_removed", gone))
            self._outbox.answer(origin, request, ActorReply(actor=actor.info()))
            return
        if request.unready:
            actor.unready = True
            actor.reason = WaitReason("arguments", "its constructor's arguments are not ready")
        else:
            self._enqueue(actor)
        self._processes.watch(origin, actor_id)
        self._outbox.answer(origin, request, ActorReply(actor=actor.info()))

    def provide(self, origin: Origin, job_id: bytes, message: ProvideArguments) -> None:
        """An actor's constructor can have what it waited for, or never will."""
        actor = self._actors.get(ActorId(message.actor_id))
        if actor is None or not actor.unready:
            return  # it was killed meanwhile, or shares another's name
        actor.unready = False
        if message.error:
            self._step(actor, Ended("init_failed", message.text, message.error))
        else:
            actor.spec = msgspec.structs.replace(actor.spec, arguments=message.arguments)
            actor.reason = None
            self._enqueue(actor)

    def _answer_taken(self, origin: Origin, request: CreateActor, holder: ActorRecord) -> None:
        if request.get_if_exists:
            self._outbox.answer(origin, request, ActorReply(actor=holder.info()))
            return
        place = f"on {holder.hostname or holder.address}, pid {holder.pid}" if holder.pid else holder.public_state()
        text = (
            f"the name {holder.spec.name!r} is taken in namespace {holder.spec.namespace!r} by {holder.describe()} "
            f"({place}); choose another name, or use get_if_exists=True to share that actor"
        )
        self._outbox.refuse(origin, request, "name_taken", text)

    def find(self, origin: Origin, job_id: bytes, request: FindActor) -> None:
        namespace = request.namespace
        if not namespace and (job := self._jobs.find(JobId(job_id))) is not None:
            namespace = job.info.namespace
        actor_id = self._names.find(namespace, request.name)
        if actor_id is not None:
            self._outbox.answer(origin, request, ActorReply(actor=self._actors[actor_id].info()))
            return
        text = f"no actor is named {request.name!r} in namespace {namespace!r}"
        for dead in self._dead.values():
            if dead.name == request.name and dead.namespace == namespace:
                text = f"the actor named {request.name!r} in namespace {namespace!r} is dead: {dead.cause}"
        elsewhere = self._names.namespaces_with(request.name)
        if elsewhere:
            text += f"; there is one in namespace {elsewhere[0]!r}"
        self._outbox.refuse(origin, request, "not_found", text)

    def watch(self, origin: Origin, job_id: bytes, request: WatchActor) -> None:
        actor_id = ActorId(request.actor_id)
        info = self.find_info(actor_id)
        if info is None:
            self._refuse_unknown(origin, request, actor_id)
            return
        if actor_id in self._actors:  # the dead do not change any more
            self._processes.watch(origin, actor_id)
        self._outbox.answer(origin, request, ActorReply(actor=info))

    def unwatch(self, origin: Origin, job_id: bytes, message: UnwatchActor) -> None:
        self._processes.unwatch(origin, ActorId(message.actor_id))

    def kill(self, origin: Origin, job_id: bytes, request: KillActor) -> None:
        actor_id = ActorId(request.actor_id)
        actor = self._actors.get(actor_id)
        if actor is None and actor_id not in self._dead:
            self._refuse_unknown(origin, request, actor_id)
            return
        if actor is not None:
            self._kill(actor, no_restart=request.no_restart)
        self._outbox.answer(origin, request, Done())

    def _kill(self, actor: ActorRecord, *, no_restart: bool) -> None:
        if no_restart or actor.state is STOPPING:
            self._step(actor, Ended("killed", "it was killed with kill()"))
        elif actor.can(Recycled):
            if actor.may_restart:
                self._step(actor, Recycled("it was killed with kill(no_restart=False)"))
            else:
                self._step(actor, Ended("killed", f"it was killed with kill(no_restart=False){_spent(actor)}"))
        # else: it has no process yet, or is being restarted already, which is what was asked for

    def _refuse_unknown(self, origin: Origin, request: WatchActor | KillActor, actor_id: ActorId) -> None:
        text = f"actor {actor_id.hex()} is not known: it never existed, or it died so long ago that it was forgotten"
        self._outbox.refuse(origin, request, "not_found", text)

    def answer_list(self, origin: Origin, job_id: bytes, request: ListActors) -> None:
        infos = [actor.info() for actor in self._actors.values()]
        if request.all_states:
            infos = [*self._dead.values(), *infos]
        if request.named_only:
            infos = [info for info in infos if info.name and request.namespace in ("", info.namespace)]
        # Handles and errors can be large, and who lists actors reads neither.
        infos = [msgspec.structs.replace(info, handle=b"", error=b"") for info in infos]
        self._outbox.answer(origin, request, ActorsReply(actors=infos))

    def find_info(self, actor_id: ActorId) -> ActorInfo | None:
        actor = self._actors.get(actor_id)
        return actor.info() if actor is not None else self._dead.find(actor_id)

    def is_living(self, actor_id: bytes) -> bool:
        return ActorId(actor_id) in self._actors

    def held_on(self, node: NodeRecord) -> Amounts:
        """What actors hold on this node, but for those in placement groups."""
        held: Amounts = {}
        for actor_id in node.actors:
            actor = self._actors.get(actor_id)
            if actor is not None and not actor.spec.strategy.group:
                held = add(held, actor.hold)
        return held

    def counts(self) -> dict[str, int]:
        """Public state -> number of actors; the dead are those that are remembered."""
        counts: dict[str, int] = {}
        for actor in self._actors.values():
            state = actor.public_state()
            counts[state] = counts.get(state, 0) + 1
        if len(self._dead):
            counts["dead"] = len(self._dead)
        return counts

    def demand_reports(self) -> Iterator[DemandReport]:
        return self._room.demand_reports(self._outbox.unix(0.0))

    # ------------------------------------------------------------------------------------------- what agents report

    def started(self, node: NodeRecord, message: ActorStarted) -> None:
        actor = self._find_current(node, message.actor_id, message.incarnation)
        if actor is not None and actor.can(Started):
            self._step(actor, Started(message.worker_id, message.socket_path, message.pid))
        elif actor is None:
            cause = "control has ended this actor or started it elsewhere meanwhile"
            self._outbox.send(node.peer, StopActor(message.actor_id, message.incarnation, graceful=False, cause=cause))

    def failed(self, node: NodeRecord, message: ActorFailed) -> None:
        actor = self._find_current(node, message.actor_id, message.incarnation)
        if actor is None:
            return
        if message.kind == "refused" and actor.can(Refused):
            logger.info("start refused actor=%s node=%s: %s", actor.actor_id.hex(), node.node_id.hex(), message.text)
            self._step(actor, Refused(message.text))
            self._line_up(actor, refused_by=node)
        elif message.kind == "init_failed":
            self._step(actor, Ended("init_failed", message.text, message.error, process_gone=True))
        else:
            self._fall(actor, "crashed", message.text)

    def waits(self, node: NodeRecord, message: ActorWaits) -> None:
        """It has a place, but is in line there."""
        actor = self._find_current(node, message.actor_id, message.incarnation)
        if actor is not None and actor.state in STARTS and actor.reason != message.reason:
            actor.reason = message.reason
            self._push(actor)

    def gone(self, node: NodeRecord, message: ActorGone) -> None:
        actor = self._find_current(node, message.actor_id, message.incarnation)
        if actor is None:
            return
        if message.intended and actor.state not in (RECYCLING, STOPPING):
            self._step(actor, Ended("exited", message.cause, process_gone=True))
        else:
            self._fall(actor, "crashed", message.cause)

    def out_of_scope(self, actor_id: ActorId) -> None:
        actor = self._actors.get(actor_id)
        if actor is None or actor.spec.detached:
            return
        cause = "all handles to it went out of scope"
        if actor.can(Retired):
            self._step(actor, Retired(cause))
        elif actor.state is not STOPPING:
            self._step(actor, Ended("out_of_scope", cause))

    def _find_current(self, node: NodeRecord, actor_id: bytes, incarnation: int) -> ActorRecord | None:
        """The actor, if this is about its present life on this node."""
        actor = self._actors.get(ActorId(actor_id))
        if actor is None or actor.incarnation != incarnation or actor.node_id != node.node_id:
            logger.debug("stale word about an actor actor=%s incarnation=%s", actor_id.hex(), incarnation)
            return None
        return actor

    # --------------------------------------------------------------------------------- what follows from other tables

    def hand_on(self, actor_ids: Iterable[ActorId], heir: Origin) -> None:
        """The process that created these is gone, and another owns them from now on."""
        for actor_id in actor_ids:
            actor = self._actors.get(actor_id)
            if actor is not None and not actor.spec.detached:
                actor.owner = heir
                self._processes.own(heir, actor_id)

    def end_owned(self, actor_ids: Iterable[ActorId], cause: str) -> None:
        """The process that created these is gone."""
        for actor_id in actor_ids:
            actor = self._actors.get(actor_id)
            if actor is not None and not actor.spec.detached:
                self._step(actor, Ended("owner_died", cause))

    def end_job(self, job: JobRecord, cause: str) -> None:
        """The driver is gone (and `job` marked as ended): all of the job's actors but the detached ones end."""
        for actor_id in sorted(job.actors):
            actor = self._actors.get(actor_id)
            if actor is not None and not actor.spec.detached:
                self._step(actor, Ended("job_ended", cause))
        self._settle(job)

    def end_in_group(self, group_id: bytes, cause: str) -> None:
        """The placement group is gone, and with it what its actors ran on: they end for good, detached ones too."""
        for actor_id in sorted(self._in_groups.get(group_id, ())):
            self._step(self._actors[actor_id], Ended("group_removed", cause))

    def node_died(self, node: NodeRecord, reason: str) -> None:
        """Called when the node has left the table."""
        for actor_id in sorted(node.actors):
            actor = self._actors.get(actor_id)
            if actor is not None:  # else it ended with its owner, which lived there too
                self._fall(actor, "node_died", f"{node.describe()} died: {reason}")
        self.recheck_soon()

    def node_joined(self, node: NodeRecord) -> None:
        self.room_made(node)
        self.recheck_soon()

    def room_made(self, node: NodeRecord) -> None:
        """More may be free on this node than when the lines found no place."""
        if len(self._room):
            self._roomy[node.node_id] = None

    def place_waiting(self) -> None:
        """Try the lines on the nodes where room was made. Called at the end of each round, when all that ends has
        ended: what a dying job leaves must not be given to its own waiting actors."""
        while self._roomy:
            node_id, _ = self._roomy.popitem()
            node = self._nodes.find(node_id)
            if node is not None:
                for line in self._room.in_turn():
                    if not line.open_to(node):
                        continue
                    if fits(line.need, node.free):
                        self._place_first(line, node)
                    elif self._outbox.now - line.oldest()[1] >= STAND_AFTER_S and self._room.may_stand(line, node):
                        where = Placed(node.node_id, node.info.address, node.info.hostname, stands=True)
                        self._step(line.first(), where)

    # ------------------------------------------------------------------------------------------------------- one step

    def _fall(self, actor: ActorRecord, kind: str, cause: str) -> None:
        """The process is gone without having meant to: another life, if it may have one."""
        if actor.state is STOPPING:
            self._step(actor, Ended("out_of_scope", actor.cause, process_gone=True))
        elif actor.can(Fell) and actor.may_restart:
            self._step(actor, Fell(cause))
        else:
            self._step(actor, Ended(kind, cause + _spent(actor), process_gone=True))

    def _step(self, actor: ActorRecord, event: Event) -> None:
        now = self._outbox.now
        lived_s = now - actor.since
        node = self._nodes.find(actor.node_id) if actor.node_id else None
        was = actor.apply(event, now)
        if isinstance(event, Placed):
            self._begin_start(actor, stands=event.stands)
        elif isinstance(event, Started):
            self._room.leave(actor.actor_id)
        elif isinstance(event, Refused):
            self._leave_node(actor, node)
            return  # whoever steps here puts it back into its line, and tells
        elif isinstance(event, Recycled):
            self._room.leave(actor.actor_id)
            self._stop(actor, node, graceful=False)
        elif isinstance(event, Retired):
            self._room.leave(actor.actor_id)
            self._names.release(actor.spec.namespace, actor.spec.name, actor.actor_id)
            self._stop(actor, node, graceful=True)
        elif isinstance(event, Fell):
            self._room.leave(actor.actor_id)
            self._leave_node(actor, node)
            logger.info("actor falls actor=%s restarts=%s cause=%s", actor.actor_id.hex(), actor.restarts, event.cause)
            quick = was in STARTS or (was is ALIVE and lived_s < self._settings.quick_fall_s)
            actor.quick_falls = actor.quick_falls + 1 if quick else 0
            self._enqueue(actor)
            return  # told by the line
        elif isinstance(event, Ended):
            if was in PLACED and not event.process_gone:
                self._stop(actor, node, graceful=False)
            self._leave_node(actor, node)
            self._end(actor)
            return
        else:
            assert_never(event)
        self._push(actor)

    def _begin_start(self, actor: ActorRecord, *, stands: bool) -> None:
        node = self._nodes.find(actor.node_id)
        assert node is not None
        if stands:
            self._room.stand(actor.actor_id, node.node_id)
        else:
            self._room.leave(actor.actor_id)
        self._nodes.place(node, actor.actor_id, actor.hold)
        blob = self._keys.find(FUNCTIONS, actor.spec.class_id)
        assert blob is not None, "checked by _place"
        patience_s = PATIENCE_S if stands else SHORT_PATIENCE_S
        self._outbox.send(node.peer, StartActor(actor.spec, actor.incarnation, blob, actor.restarts, patience_s))

    def _stop(self, actor: ActorRecord, node: NodeRecord | None, *, graceful: bool) -> None:
        if node is not None:
            stop = StopActor(actor.spec.actor_id, actor.incarnation, graceful, actor.cause, self._settings.grace_s)
            self._outbox.send(node.peer, stop)

    def _leave_node(self, actor: ActorRecord, node: NodeRecord | None) -> None:
        if node is not None and self._nodes.leave(node, actor.actor_id, actor.hold):
            self.room_made(node)

    def _end(self, actor: ActorRecord) -> None:
        """The actor is DEAD: give back all that it had and remember how it ended."""
        actor_id, spec = actor.actor_id, actor.spec
        level = logging.INFO if actor.kind in UNWANTED_ENDS else logging.DEBUG
        logger.log(level, "%s ended kind=%s cause=%s", actor.describe(), actor.kind, actor.cause)
        self._push(actor)
        self._room.leave(actor_id)
        del self._actors[actor_id]
        if spec.name:
            self._names.release(spec.namespace, spec.name, actor_id)
        self._processes.forget_actor(actor_id, actor.owner)
        group_id = spec.strategy.group
        if group_id:
            self._in_groups[group_id].discard(actor_id)
            if not self._in_groups[group_id]:
                del self._in_groups[group_id]
        self.on_end(actor_id, f"{actor.describe()}, which created it, ended")
        info = msgspec.structs.replace(actor.info(), handle=b"", reason=None)
        self._dead.add(actor_id, info, len(info.error) + len(info.cause))
        job = self._jobs.find(JobId(spec.job_id))
        if job is not None:
            job.actors.discard(actor_id)
            self._settle(job)

    def _settle(self, job: JobRecord) -> None:
        if self._jobs.settle(job):
            self._keys.forget_code_of(JobId(job.info.job_id))

    def _push(self, actor: ActorRecord) -> None:
        watchers = self._processes.watchers(actor.actor_id)
        if watchers:
            self._outbox.tell_all(watchers, ActorUpdate(actor.info()))

    # ------------------------------------------------------------------------------------------------- waiting, placing

    def _enqueue(self, actor: ActorRecord) -> None:
        """It needs a (new) place: now, or a little later when its starts keep failing."""
        if actor.quick_falls <= QUICK_FALLS_FREE:
            self._line_up(actor)
            return
        delay_s = min(FIRST_DELAY_S * 2 ** (actor.quick_falls - QUICK_FALLS_FREE - 1), MOST_DELAY_S)
        why = f"it ended {actor.quick_falls} times in a row right after its start (last: {actor.cause})"
        actor.reason = WaitReason("actor_restarting", f"{why}; the next start is in {delay_s:g} s")
        heapq.heappush(self._held_back, (self._outbox.now + delay_s, actor.actor_id))
        self._push(actor)

    def _line_up(self, actor: ActorRecord, refused_by: NodeRecord | None = None) -> None:
        """Put an actor into its line, and place it if that is possible now."""
        now = self._outbox.now
        line = self._room.join(actor, now)
        if refused_by is not None:
            refused_by.refused.add(line.key)
        if line.notice_at == INFINITY:
            line.notice_at = now + self._settings.notice_after_s
            self._notice_at = min(self._notice_at, line.notice_at)
        if line.first() is actor or line.reason is None:
            self._place(line)
        if actor.state in WAITING:
            self._push(actor)

    def _place(self, line: Line) -> None:
        """Place as many of the line as go somewhere now."""
        while line.actors and self._place_first(line):
            pass

    def _place_first(self, line: Line, only: NodeRecord | None = None) -> bool:
        """Place the first of the line, or end it if that can never be; False when it goes on waiting."""
        if not line.actors:
            return False
        actor = line.first()
        if self._keys.find(FUNCTIONS, actor.spec.class_id) is None:
            which = f"class {actor.spec.class_name} ({actor.spec.class_id.hex()})"
            cause = f"the code of {which} is not in the cluster; it must be put before the actor is created"
            self._room.had_its_turn(line)
            self._step(actor, Ended("init_failed", cause))
            return True
        choice = self._room.choose(line, only)
        if isinstance(choice, Node):
            node = self._nodes.find(choice.node_id)
            assert node is not None
            self._room.had_its_turn(line)
            self._step(actor, Placed(node.node_id, node.info.address, node.info.hostname))
        elif isinstance(choice, Infeasible) and choice.reason.code == "unschedulable":
            self._room.had_its_turn(line)
            self._step(actor, Ended("unschedulable", choice.reason.text))
        else:
            if only is None or line.reason is None:
                self._set_reason(line, choice.reason)
            return False
        return True

    def _set_reason(self, line: Line, reason: WaitReason) -> None:
        """Watchers are told when the kind of reason changes; the words change more often and can be asked for."""
        was, line.reason = line.reason, reason
        if was == reason:
            return
        tell = was is None or was.code != reason.code
        for actor, _ in line.actors.values():
            actor.reason = reason
            if tell:
                self._push(actor)

    # ---------------------------------------------------------------------------------------------------------- time

    def deadline(self) -> float:
        held = self._held_back[0][0] if self._held_back else INFINITY
        return min(self._recheck_at, self._notice_at, held)

    def recheck_soon(self) -> None:
        """The cluster's shape changed: what was impossible may be possible and the other way round."""
        if len(self._room):
            self._recheck_at = min(self._recheck_at, self._outbox.now + self._settings.recheck_s)

    def tick(self) -> None:
        now = self._outbox.now
        while self._held_back and self._held_back[0][0] <= now:
            _, actor_id = heapq.heappop(self._held_back)
            actor = self._actors.get(actor_id)
            if actor is not None and actor.state in WAITING and self._room.line_of(actor_id) is None:
                self._line_up(actor)
        if now >= self._recheck_at:
            self._recheck_at = INFINITY
            for line in self._room.in_turn():
                self._place_first(line)
        if now >= self._notice_at:
            self._give_notice()

    def _give_notice(self) -> None:
        """Tell drivers what their actors have been waiting for too long."""
        now, settings = self._outbox.now, self._settings
        self._notice_at = INFINITY
        for line in self._room.lines():
            if now >= line.notice_at:
                assert line.reason is not None, "a line was looked at when it began"
                self._notice(line, line.reason, now - line.oldest()[1])
                line.notices += 1
                again_s = min(settings.notice_again_s * 2 ** (line.notices - 1), settings.notice_most_s)
                line.notice_at = now + again_s
            self._notice_at = min(self._notice_at, line.notice_at)

    def _notice(self, line: Line, reason: WaitReason, waited_s: float) -> None:
        job = self._jobs.find(JobId(line.spec.job_id))
        if job is None or not job.running:
            return
        count, name = len(line), line.spec.class_name
        who = f"actor {name} has" if count == 1 else f"{count} actors {name} have"
        text = f"{who} been waiting for a place for {waited_s:.0f} s: {reason.text}"
        key = f"actor-waits:{line.oldest()[0].actor_id.hex()}:{line.notices}"
        self._outbox.tell(Origin(job.peer, job.info.driver_id), Notice(key, "warning", text))

    # ---------------------------------------------------------------------------------------------------- invariants

    def check_invariants(self) -> None:
        assert not self._roomy
        self._room.check_invariants()
        self._processes.check_invariants()
        held = {actor_id for _, actor_id in self._held_back}
        for actor_id, actor in self._actors.items():
            assert actor.state is not DEAD
            assert actor_id not in self._dead
            waits = self._room.line_of(actor_id) is not None
            assert (actor.state in WAITING) == (waits or actor.unready or (actor_id in held and actor.state in WAITING))
            assert not (waits and actor.unready)
            assert not (waits or actor.unready) or actor.reason is not None
            assert (actor.state in PLACED) == bool(actor.node_id)
            assert not (waits and actor.node_id)
            if actor.node_id:
                node = self._nodes.find(actor.node_id)
                assert node is not None, "an actor on a node that is gone"
                assert actor_id in node.actors
            if actor.spec.name and actor.state is not STOPPING:
                assert self._names.find(actor.spec.namespace, actor.spec.name) == actor_id
            job = self._jobs.find(JobId(actor.spec.job_id))
            assert job is not None
            assert actor_id in job.actors
        for actor_id in self._names.actors():
            assert self._actors[actor_id].state is not STOPPING
        for node in self._nodes:
            assert all(self._actors[actor_id].node_id == node.node_id for actor_id in node.actors)


def _spent(actor: ActorRecord) -> str:
    """Why it does not restart, for the end of a cause; empty when it was never meant to."""
    if actor.spec.max_restarts == 0:
        return ""
    return f" (restarted {actor.restarts} times, and max_restarts is {actor.spec.max_restarts})"
