"""All placement groups: what is asked of them, what happens to them, and what follows from it.

Places are chosen for one group after the other, in the one thread of control, from a picture in which what earlier
groups were promised is taken already; so two groups are never sent for the same resources. What control does not know
is what tasks took a moment ago: an agent then refuses, at once, and the group gives back what other nodes set aside and
tries again a little later. Nobody holds one thing while it waits for another, so no two groups can block each other,
and the pauses grow (`FIRST_RETRY_S` to `MOST_RETRY_S`) so that they do not chase each other either.

Tasks may keep nodes busy for as long as there are more of them. So a group that has waited for `STAND_AFTER_S` goes and
stands in line with the tasks at the nodes that could take it. It then does hold one thing while it waits for another:
therefore one group at a time, for `PATIENCE_S` at most, and the next one after it.

A group that found no place is tried again when a node says that it has room, or when the cluster changes; groups that
want the same are not all looked at for that, since the answer for one is the answer for all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from shoal.control.groups import CREATED, PENDING, WAITING, GroupEvent, GroupRecord
from shoal.control.jobs import JobTable
from shoal.control.mail import Outbox
from shoal.control.messages import (
    BundlesPrepared,
    CommitBundles,
    CreateGroup,
    FindGroup,
    GroupChanged,
    GroupInfo,
    GroupReply,
    GroupsReply,
    ListGroups,
    Notice,
    PrepareBundles,
    RemoveGroup,
    ReturnBundles,
    WatchGroup,
)
from shoal.control.nodes import NodeRecord, NodeTable
from shoal.control.processes import Origin
from shoal.control.remembered import Remembered
from shoal.control.settings import ControlSettings
from shoal.objects.ids import JobId
from shoal.rpc.messages import Done
from shoal.scheduling.bundle_names import shown_of
from shoal.scheduling.bundles import Assigned, place_bundles
from shoal.scheduling.resources import add, subtract
from shoal.scheduling.views import Amounts, DemandReport, NodeView, WaitReason

logger = logging.getLogger(__name__)

INFINITY = float("inf")
FIRST_RETRY_S, MOST_RETRY_S = 0.01, 1.0
"""Pause after a refusal; doubles from the first to the most."""
STAND_AFTER_S, PATIENCE_S = 0.5, 10.0
MAX_WATCHED_UNKNOWN = 100_000
"""Watches of groups that were never heard of: a group's creation may come later than a watch from another node."""


class Actors(Protocol):
    """What groups ask of the actors."""

    def end_in_group(self, group_id: bytes, cause: str) -> None:
        """The group is gone: its actors are to end."""

    def is_living(self, actor_id: bytes) -> bool: ...
    def held_on(self, node: NodeRecord) -> Amounts:
        """What actors hold there, but for those in groups."""


class GroupLives:
    """See the module.

    Args:
        shown: called with a node when what it shows of bundles changed: the others are to hear of it.
    """

    def __init__(
        self, settings: ControlSettings, outbox: Outbox, nodes: NodeTable, jobs: JobTable,
        actors: Actors, shown: Callable[[NodeRecord], None],
    ) -> None:  # fmt: skip
        self._settings = settings
        self._outbox = outbox
        self._nodes = nodes
        self._jobs = jobs
        self._actors = actors
        self._shown = shown
        self._groups: dict[bytes, GroupRecord] = {}
        self._removed: Remembered[bytes, GroupInfo] = Remembered(settings.max_removed_groups)
        self._names: dict[tuple[str, str], bytes] = {}
        self._waiting: dict[bytes, GroupRecord] = {}  # in the order in which they began to wait
        self._of_job: dict[bytes, set[bytes]] = {}
        self._of_actor: dict[bytes, set[bytes]] = {}
        self._watchers: dict[bytes, dict[Origin, None]] = {}
        self._watched: dict[Origin, set[bytes]] = {}
        self._standing: GroupRecord | None = None  # stands in line at nodes
        self._try_at = INFINITY
        self._notice_at = INFINITY

    # ---------------------------------------------------------------------------------------------- what is asked

    def create(self, origin: Origin, job_id: bytes, request: CreateGroup) -> None:
        """Who wants no answer hears of a refusal as of a removal: it watches the group."""
        spec, group_id = request.spec, request.spec.group_id
        known = self._groups.get(group_id)
        if known is not None:
            self._watch(origin, group_id)
            self._outbox.answer(origin, request, GroupReply(group=known.info()))
            return
        job = self._jobs.find(JobId(spec.job_id))
        if job is None or not (job.running or spec.detached or spec.actor_id):
            self._refuse(origin, request, "not_found", f"job {spec.job_id.hex()} has ended")
            return
        if spec.actor_id and not self._actors.is_living(spec.actor_id):
            text = f"the actor that makes it ({spec.actor_id.hex()}) has ended"
            self._refuse(origin, request, "not_found", text)
            return
        if len(self._groups) >= self._settings.max_groups:
            text = f"the cluster has {len(self._groups):,} placement groups, which is its limit"
            self._refuse(origin, request, "limit", text)
            return
        spec = msgspec.structs.replace(spec, namespace=spec.namespace or job.info.namespace)
        if spec.name:
            if (spec.namespace, spec.name) in self._names:
                text = f"the name {spec.name!r} is taken in namespace {spec.namespace!r} by a placement group; "
                text += "choose another name, or use get_placement_group() to share it"
                self._refuse(origin, request, "name_taken", text)
                return
            self._names[spec.namespace, spec.name] = group_id
        group = self._groups[group_id] = GroupRecord(spec, self._outbox.now, self._outbox.unix())
        self._watch(origin, group_id)
        if spec.actor_id:
            self._of_actor.setdefault(spec.actor_id, set()).add(group_id)
        elif not spec.detached:
            self._of_job.setdefault(spec.job_id, set()).add(group_id)
        self._wait(group)
        self._try(group)
        if request.rid:
            self._outbox.answer(origin, request, GroupReply(group=group.info()))

    def _refuse(self, origin: Origin, request: CreateGroup, kind: str, text: str) -> None:
        if request.rid:
            self._outbox.refuse(origin, request, kind, text)
        else:
            text = f"the placement group was not created: {text}"
            self._outbox.tell(origin, GroupChanged(request.spec.group_id, "REMOVED", text))

    def remove(self, origin: Origin, job_id: bytes, request: RemoveGroup) -> None:
        group = self._groups.get(request.group_id)
        if group is not None:
            if not request.rid:
                self._unwatch(origin, request.group_id)  # it knows
            self._remove(group, "it was removed with remove_placement_group()")
        self._outbox.answer(origin, request, Done())

    def find(self, origin: Origin, job_id: bytes, request: FindGroup) -> None:
        group_id = request.group_id
        if request.name:
            group_id = self._names.get((request.namespace, request.name), b"")
        group = self._groups.get(group_id)
        info = group.info() if group is not None else self._removed.find(group_id)
        if info is not None:
            self._outbox.answer(origin, request, GroupReply(group=info))
            return
        what = f"is named {request.name!r} in namespace {request.namespace!r}" if request.name else "has this id"
        elsewhere = sorted(space for space, name in self._names if name == request.name)
        hint = f"; there is one in namespace {elsewhere[0]!r}" if elsewhere else ""
        self._outbox.refuse(origin, request, "not_found", f"no placement group {what}{hint}")

    def answer_list(self, origin: Origin, job_id: bytes, request: ListGroups) -> None:
        infos = [*self._removed.values(), *(group.info() for group in self._groups.values())]
        self._outbox.answer(origin, request, GroupsReply(groups=infos))

    def watch(self, origin: Origin, job_id: bytes, message: WatchGroup) -> None:
        self._watch(origin, message.group_id)
        group, removed = self._groups.get(message.group_id), self._removed.find(message.group_id)
        if group is not None:
            self._outbox.tell(origin, self._news(group))
        elif removed is not None:
            self._outbox.tell(origin, GroupChanged(message.group_id, removed.state, removed.cause))
            self._unwatch(origin, message.group_id)

    def was_removed(self, group_id: bytes) -> str:
        """Why, or "" for a group that exists or was never heard of."""
        info = self._removed.find(group_id)
        return info.cause if info is not None else ""

    def demand_reports(self) -> Iterator[DemandReport]:
        for group in self._waiting.values():
            reason = group.reason or WaitReason("busy", "it has not been looked at yet")
            since = self._outbox.unix(group.since)
            yield DemandReport(group.describe(), group.missing(), 1, reason, since, group.spec.job_id)

    # ------------------------------------------------------------------------------------------- what agents report

    def prepared(self, node: NodeRecord, message: BundlesPrepared) -> None:
        group = self._groups.get(message.group_id)
        if group is None or group.attempt != message.attempt or node.node_id not in group.unprepared:
            logger.debug("stale word about a group group=%s attempt=%s", message.group_id.hex(), message.attempt)
            return
        if not message.ok:
            self._refused(group, f"{node.describe()} had too little left when it was asked")
            return
        group.unprepared.remove(node.node_id)
        if group.unprepared:
            return
        self._created(group)

    # --------------------------------------------------------------------------------- what follows from other tables

    def end_job(self, job_id: bytes, cause: str) -> None:
        self._remove_all(self._of_job.pop(job_id, ()), cause)

    def actor_ended(self, actor_id: bytes, cause: str) -> None:
        self._remove_all(self._of_actor.pop(actor_id, ()), cause)

    def _remove_all(self, group_ids: Iterable[bytes], cause: str) -> None:
        for group_id in sorted(group_ids):
            self._remove(self._groups[group_id], cause)

    def node_died(self, node: NodeRecord, reason: str) -> None:
        """Called when the node has left the table."""
        for group in list(self._groups.values()):
            takes_part = node.node_id in group.asked.values()
            lost = [index for index, where in group.places.items() if where == node.node_id]
            if lost:
                logger.info("group loses bundles group=%s bundles=%s", group.group_id.hex(), lost)
                self._give_back(group)
                for index in lost:
                    del group.places[index]
                self._step(group, GroupEvent.LOST)
                group.failures, group.retry_at = 0, 0.0
                text = f"{node.describe()}, where {len(lost)} of its bundles were, died: {reason}"
                self._wait(group, WaitReason("busy", text))
                self._push(group)
            elif takes_part:
                self._refused(group, f"{node.describe()} died: {reason}")
        self.room_made()

    def room_made(self) -> None:
        """More may be free than when a group found no place."""
        if self._waiting:
            self._try_at = min(self._try_at, self._outbox.now)

    def process_gone(self, origin: Origin) -> None:
        for group_id in self._watched.pop(origin, ()):
            watchers = self._watchers[group_id]
            del watchers[origin]
            if not watchers:
                del self._watchers[group_id]

    def peer_gone(self, peer: int) -> None:
        for origin in [origin for origin in self._watched if origin.peer == peer]:
            self.process_gone(origin)

    # ------------------------------------------------------------------------------------------------------- one step

    def _step(self, group: GroupRecord, event: GroupEvent) -> None:
        group.apply(event, self._outbox.now)

    def _wait(self, group: GroupRecord, reason: WaitReason | None = None) -> None:
        """It needs places."""
        group.reason = reason or group.reason
        self._waiting[group.group_id] = group
        if group.notice_at == INFINITY:
            group.notice_at = self._outbox.now + self._settings.notice_after_s
        self._notice_at = min(self._notice_at, group.notice_at)
        self._try_at = min(self._try_at, max(group.retry_at, self._outbox.now))

    def _try(self, group: GroupRecord) -> WaitReason | None:
        """Choose places and ask the agents to prepare; returns why there are none."""
        spec, needs = group.spec, group.needs()
        plan = place_bundles(needs, spec.strategy, self._nodes.views, kept=group.places, soft_target=spec.soft_target)
        if not isinstance(plan, Assigned):
            group.reason = plan.reason
            return plan.reason
        self._ask(group, plan.nodes, 0.0)
        return None

    def _ask(self, group: GroupRecord, places: dict[int, bytes], patience_s: float) -> None:
        """These nodes are to prepare its bundles."""
        del self._waiting[group.group_id]
        self._step(group, GroupEvent.CHOSEN)
        group.attempt += 1
        group.asked = places
        group.unprepared = set(places.values())
        alone = len(group.unprepared) == 1
        for node_id in dict.fromkeys(places.values()):
            node = self._nodes.find(node_id)
            assert node is not None
            bundles = {index: group.spec.bundles[index] for index, where in places.items() if where == node_id}
            for index, resources in bundles.items():
                self._nodes.book(node, (group.group_id, index), resources)
            self._outbox.send(node.peer, PrepareBundles(group.group_id, group.attempt, bundles, alone, patience_s))

    def _line_up(self) -> None:
        """Let the next group that has waited for long enough stand in line, if none does."""
        now = self._outbox.now
        views: list[NodeView] = []
        for group in self._waiting.values():
            if self._standing is not None:
                return
            if group.reason is None or group.reason.code != "busy":
                continue
            due = max(group.since + STAND_AFTER_S, group.retry_at)
            if now < due:
                self._try_at = min(self._try_at, due)
                continue
            views = views or self._views_without_tasks()
            spec = group.spec
            plan = place_bundles(group.needs(), spec.strategy, views, kept=group.places, soft_target=spec.soft_target)
            if isinstance(plan, Assigned):
                self._ask(group, plan.nodes, PATIENCE_S)
                self._standing = group
                return

    def _views_without_tasks(self) -> list[NodeView]:
        """The nodes as if nothing but actors and bundles were there."""
        held = {node.node_id: self._actors.held_on(node) for node in self._nodes}
        for group in self._groups.values():
            for index, where in (*group.places.items(), *group.asked.items()):
                held[where] = add(held[where], group.spec.bundles[index])
        views = []
        for node in self._nodes:
            info, left = node.info, subtract(node.base, held[node.node_id])
            views.append(NodeView(info.node_id, node.base, left, info.labels, info.draining))
        return views

    def _leave_line(self, group: GroupRecord) -> None:
        if self._standing is group:
            self._standing = None
            self.room_made()

    def _created(self, group: GroupRecord) -> None:
        """All agents have set their bundles aside."""
        self._leave_line(group)
        alone = len(set(group.asked.values())) == 1
        for node_id in dict.fromkeys(group.asked.values()):
            node = self._nodes.find(node_id)
            assert node is not None, "node_died has ended this attempt"
            if not alone:
                self._outbox.send(node.peer, CommitBundles(group.group_id))
            for index, where in group.asked.items():
                if where == node_id:
                    self._nodes.show(node, shown_of(group.group_id, index, group.spec.bundles[index]))
            self._shown(node)
        group.places.update(group.asked)
        group.asked = {}
        group.reason = None
        group.failures, group.notices, group.notice_at = 0, 0, INFINITY
        group.created_unix_s = group.created_unix_s or self._outbox.unix()
        self._step(group, GroupEvent.PREPARED)
        self._push(group)

    def _refused(self, group: GroupRecord, why: str) -> None:
        self._give_back(group)
        self._step(group, GroupEvent.REFUSED)
        group.retry_at = self._outbox.now + min(FIRST_RETRY_S * 2**group.failures, MOST_RETRY_S)
        group.failures += 1
        self._wait(group, WaitReason("busy", why))

    def _give_back(self, group: GroupRecord) -> None:
        """End this attempt, if there is one: whatever its agents have done, they undo."""
        self._leave_line(group)
        for node_id in dict.fromkeys(group.asked.values()):
            indices = [index for index, where in group.asked.items() if where == node_id]
            node = self._nodes.find(node_id)
            if node is not None:
                self._return(group, node, indices)
        group.asked = {}
        group.unprepared.clear()

    def _return(self, group: GroupRecord, node: NodeRecord, indices: list[int]) -> None:
        for index in indices:
            self._nodes.unbook(node, (group.group_id, index))
        self._outbox.send(node.peer, ReturnBundles(group.group_id, indices, group.cause))

    def _remove(self, group: GroupRecord, cause: str) -> None:
        spec, group_id = group.spec, group.group_id
        logger.debug("%s ends: %s", group.describe(), cause)
        group.cause = f"{group.describe()} is gone: {cause}"
        # Its users are told, and its actors ended, before their processes are: so they know why.
        was_waiting = group.state in WAITING
        self._step(group, GroupEvent.REMOVED)
        self._push(group)
        self._actors.end_in_group(group_id, group.cause)
        self._give_back(group)
        for node_id in dict.fromkeys(group.places.values()):
            node = self._nodes.find(node_id)
            assert node is not None, "node_died has taken its places away"
            indices = [index for index, where in group.places.items() if where == node_id]
            for index in indices:
                shown = shown_of(group_id, index, spec.bundles[index])
                self._nodes.show(node, shown, hide=True)
            self._return(group, node, indices)
            self._shown(node)
        group.places = {}
        group.reason = None
        if was_waiting:
            del self._waiting[group_id]
        del self._groups[group_id]
        self._removed.add(group_id, group.info())
        if spec.name:
            del self._names[spec.namespace, spec.name]
        for owned, owner in ((self._of_job, spec.job_id), (self._of_actor, spec.actor_id)):
            if owner in owned:
                owned[owner].discard(group_id)
                if not owned[owner]:
                    del owned[owner]
        for origin in list(self._watchers.get(group_id, ())):
            self._unwatch(origin, group_id)

    # -------------------------------------------------------------------------------------------------------- telling

    def _watch(self, origin: Origin, group_id: bytes) -> None:
        if group_id in self._groups or len(self._watchers) < len(self._groups) + MAX_WATCHED_UNKNOWN:
            self._watchers.setdefault(group_id, {})[origin] = None
            self._watched.setdefault(origin, set()).add(group_id)

    def _unwatch(self, origin: Origin, group_id: bytes) -> None:
        watched = self._watched.get(origin)
        if watched is not None and group_id in watched:
            watched.remove(group_id)
            if not watched:
                del self._watched[origin]
            del self._watchers[group_id][origin]
            if not self._watchers[group_id]:
                del self._watchers[group_id]

    def _news(self, group: GroupRecord) -> GroupChanged:
        text = group.cause or (group.reason.text if group.reason is not None else "")
        return GroupChanged(group.group_id, group.public_state(), text)

    def _push(self, group: GroupRecord) -> None:
        watchers = self._watchers.get(group.group_id)
        if watchers:
            self._outbox.tell_all(list(watchers), self._news(group))

    # ----------------------------------------------------------------------------------------------------------- time

    def deadline(self) -> float:
        return min(self._try_at, self._notice_at)

    def place_waiting(self) -> None:
        """Look for places, if anything changed that may help. Called at the end of each round."""
        now = self._outbox.now
        if now < self._try_at:
            return
        self._try_at = INFINITY
        hopeless: dict[object, WaitReason] = {}
        for group in list(self._waiting.values()):
            if group.retry_at > now:
                self._try_at = min(self._try_at, group.retry_at)
                continue
            key = None
            if group.state is PENDING:
                spec = group.spec
                key = msgspec.msgpack.encode((spec.bundles, spec.strategy, spec.labels), order="deterministic")
                if key in hopeless:
                    group.reason = hopeless[key]
                    continue
            reason = self._try(group)
            if reason is not None and key is not None:
                hopeless[key] = reason
        self._line_up()

    def tick(self) -> None:
        now, settings = self._outbox.now, self._settings
        if now < self._notice_at:
            return
        self._notice_at = INFINITY
        for group in [*self._waiting.values(), *filter(None, [self._standing])]:
            if now >= group.notice_at:
                self._give_notice(group, now - group.since)
                group.notices += 1
                again_s = min(settings.notice_again_s * 2 ** (group.notices - 1), settings.notice_most_s)
                group.notice_at = now + again_s
            self._notice_at = min(self._notice_at, group.notice_at)

    def _give_notice(self, group: GroupRecord, waited_s: float) -> None:
        job = self._jobs.find(JobId(group.spec.job_id))
        if job is None or not job.running or group.reason is None:
            return
        who = group.describe()
        text = f"{who} has been waiting for a place for {waited_s:.0f} s: {group.reason.text}"
        key = f"group-waits:{group.group_id.hex()}:{group.notices}"
        self._outbox.tell(Origin(job.peer, job.info.driver_id), Notice(key, "warning", text))

    # ---------------------------------------------------------------------------------------------------- invariants

    def check_invariants(self) -> None:
        for group_id, group in self._groups.items():
            assert (group_id in self._waiting) == (group.state in WAITING)
            assert bool(group.asked) == bool(group.unprepared) == (group.state not in WAITING | {CREATED})
            assert not group.asked.keys() & group.places.keys()
            count = len(group.spec.bundles)
            assert (len(group.places) == count) == (group.state is CREATED)
            assert (len(group.places) + len(group.asked) == count) or group.state in WAITING
            for node_id in (*group.places.values(), *group.asked.values()):
                assert self._nodes.find(node_id) is not None, "a bundle on a node that is gone"
            assert (group.reason is None) == (group.state is CREATED)
            if group.spec.name:
                assert self._names[group.spec.namespace, group.spec.name] == group_id
        assert self._standing is None or self._standing.asked
        assert {group_id for groups in self._of_job.values() for group_id in groups} <= self._groups.keys()
        assert {group_id for groups in self._of_actor.values() for group_id in groups} <= self._groups.keys()
        assert set(self._names.values()) <= self._groups.keys()
        pairs = {(group_id, origin) for group_id, origins in self._watchers.items() for origin in origins}
        assert pairs == {(group_id, origin) for origin, groups in self._watched.items() for group_id in groups}
        assert all(self._watchers.values())
        assert all(self._watched.values())
