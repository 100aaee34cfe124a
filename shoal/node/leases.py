"""The agent's lease scheduler: who may use a worker of this node, and who is better served elsewhere. Pure.

Owners (drivers and workers) say how many leases they want for each of their scheduling classes, as levels rather than
requests: saying it again is harmless, withdrawing needs no cancel, and a million queued tasks are one number here.
`decide` turns levels and free resources into decisions; the agent carries them out.

Who is served:

- Higher priority first, whosoever it is. What runs is not interrupted, but its lease goes to the next by this order.
- Of equal priority, the job that uses least of the node (what its leases hold and do not lend, by the scarcest
  resource of each), and of equals whoever had its turn longest ago: so the flood of one job cannot starve another.
- Within a job, deeper first. A parent that waits for children holds a worker; finishing nested work before starting
  new roots keeps a recursion at a handful of live workers instead of one per call. Owners never rank nested work below
  the task that submits it, so a parent never waits behind its own kind.
- At equal depth owners take turns, one lease each; within an owner its classes take turns.
- Light work, which needs next to nothing, gets slots (see `usage`).
- A class that needs much at once would never fit while small ones take each piece that is freed. When it has waited
  for `RESERVE_AFTER_S`, what it lacks is kept from others of no higher
  priority and no greater depth, for `RESERVE_FOR_S` at most:
  the bound is what keeps a hold from becoming a deadlock with work that its holders wait for. A hold in vain doubles
  the time until the next one.
- Here first: work leaves only when it does not fit here now (default), is spread, or can never run here. Then it goes
  where the cluster view has room for it now; what was sent is deducted from that view until it changes.

Cost: `decide` is called after every event. A shape of demand that does not fit is not tried again until something is
given back, and when no waiting shape fits nothing is scanned. Only a change of another node looks at all that waits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from shoal.node.bundles import Bundles
from shoal.node.cluster_view import ClusterView
from shoal.node.lease_decisions import Decision, Grant, Reclaim, Redirect, Wait
from shoal.node.lease_queue import DemandClass, LeaseQueue, Plan, Shape
from shoal.node.messages import LeaseSpec
from shoal.node.resource_books import Holding, ResourceBooks
from shoal.node.usage import Usage, Use
from shoal.scheduling import policy
from shoal.scheduling.resources import count_fitting, fits, light_slots, missing, subtract
from shoal.scheduling.views import Amounts, DemandReport, NodeView, Strategy, WaitReason

RESERVE_AFTER_S: Final = 1.0
RESERVE_FOR_S: Final = 10.0
MAX_PATIENCE_S: Final = 640.0
"""The longest time between two holds for one class."""

MAX_REMEMBERED_SPECS: Final = 4096
"""Specs kept per owner for classes that want nothing now, so that the next demand need not repeat them."""

MAX_REPORTS: Final = 1000
"""Rows of `demand_reports`, which travel to control on every change. Those that wait longest stay."""

REVISIT_S: Final = 1.0
"""After this, work that must run on a node which is not there is given up (the view may be a little behind), and work
that another agent sent here may be sent on (the view by which it was sent was a little behind)."""

_NEW: Final = WaitReason("busy", "it was asked for a moment ago")
_RESERVED: Final = WaitReason("busy", "what is free is kept for older work that needs more at once")
_SPLIT: Final = WaitReason("busy", "enough is free in all, but not on one device")
_CROWDED: Final = WaitReason(
    "busy", "the node runs enough tasks that need no CPU; more start when these end, block or run for long"
)
_LIMITED: Final = WaitReason("busy", "the node has as many workers as it may have")


class _Owner:
    __slots__ = ("classes", "leases", "specs")

    def __init__(self) -> None:
        self.classes: dict[int, DemandClass] = {}
        self.leases: set[int] = set()
        self.specs: dict[int, LeaseSpec] = {}  # of classes that are forgotten, oldest first


class _Lease:
    __slots__ = ("class_id", "holding", "job_id", "owner", "use")

    def __init__(self, owner: bytes, class_id: int, job_id: bytes, holding: Holding, use: Use) -> None:
        self.owner = owner
        self.class_id = class_id
        self.job_id = job_id
        self.holding = holding
        self.use = use


class _Reservation(NamedTuple):
    cls: DemandClass
    names: frozenset[str]  # resources that are kept for it
    until: float


class LeaseScheduler:
    """Levels in, decisions out. All `now` are unix seconds; they need not be exact.

    Raises:
        ValueError: `total` has a fraction of a device.
    """

    def __init__(self, node_id: bytes, total: Amounts, rng: random.Random) -> None:
        self.node_id = node_id
        self._rng = rng
        self._now = 0.0
        self._last_lease = 0
        self._books = ResourceBooks(total)
        self._bundles = Bundles(self._books)
        self._bundles_changed = False  # since the last decision: work may have a place here, or none, for that reason
        self._queue = LeaseQueue()
        self._owners: dict[bytes, _Owner] = {}
        self._leases: dict[int, _Lease] = {}
        self._actors: dict[bytes, Holding] = {}
        self._reservation: _Reservation | None = None
        self._usage = Usage(self._books.total)
        self._revisit: dict[DemandClass, None] = {}  # to look at when they have waited for `REVISIT_S`
        # Notes of one decision:
        self._reasons_shifted = False  # some that were looked at before wait for another reason now
        self._something_to_grant = False  # a reservation ended, so that others may have what it kept
        self._untold: set[bytes] = set()  # owners with leases that were not told to return idle ones,
        self._told: set[bytes] = set()  # and those that were
        self._cluster = ClusterView(node_id, self._books.total, self._books.available)

    @property
    def total(self) -> Amounts:
        return self._books.total

    @property
    def available(self) -> Amounts:
        """What is free now; CPU may be negative. The live dict: copy it before sending it."""
        return self._books.available

    # ------------------------------------------------------------------------------------------------ inputs

    def set_demand(
        self,
        owner: bytes,
        class_id: int,
        wanted: int,
        spec: LeaseSpec | None,
        now: float,
        *,
        redirected: bool = False,
        calls: int = 0,
    ) -> None:
        """`owner` wants `wanted` leases of its class in all, those it has included. Replaces what it said before.

        Args:
            spec: given with the first demand of a class and when its name changes, and remembered for the owner's life
                (beyond `MAX_REMEMBERED_SPECS` classes that want nothing now, the oldest are forgotten).
            redirected: another agent sent the owner here; what cannot be served waits here, for `REVISIT_S` at least.
        Raises:
            KeyError: a positive demand of a class whose spec is not known.
            ValueError: `wanted` is negative.
        """
        if wanted < 0:
            raise ValueError(f"wanted is a number of leases, not {wanted}")
        self._now = now
        record = self._owners.get(owner)
        cls = record.classes.get(class_id) if record is not None else None
        if cls is None:
            if wanted == 0:
                return
            remembered = record.specs.pop(class_id, None) if record is not None else None
            spec = spec or remembered
            if spec is None:
                raise KeyError(f"class {class_id} of owner {owner.hex()[:12]} has no spec")
            if record is None:
                record = self._owners[owner] = _Owner()
            cls = DemandClass(owner, class_id, spec, self._queue.shape_of(spec, redirected))
            record.classes[class_id] = cls
        if spec is not None and spec != cls.spec and msgspec.structs.replace(spec, name=cls.spec.name) == cls.spec:
            cls.spec = spec  # the same needs under another name: it keeps its place in the line
        if (spec is not None and spec != cls.spec) or redirected != cls.shape.pinned:
            self._leave_queue(cls)
            self._queue.drop_shape(cls.shape)
            cls.spec = spec or cls.spec
            cls.shape = self._queue.shape_of(cls.spec, redirected)
        cls.wanted = wanted
        cls.calls = calls
        self._requeue(cls)

    def drop_owner(self, owner: bytes) -> list[int]:
        """The owner is gone: forget its demands. Its leases, which are returned, are held until `release`."""
        record = self._owners.pop(owner, None)
        if record is None:
            return []
        for cls in record.classes.values():
            self._leave_queue(cls)
            self._queue.drop_shape(cls.shape)
        self._untold.discard(owner)
        self._told.discard(owner)
        return sorted(record.leases)

    def drop_job(self, job_id: bytes) -> list[int]:
        """The job is over: forget its demands, whoever made them. Its leases, returned, are held until `release`."""
        for record in self._owners.values():
            for cls in [cls for cls in record.classes.values() if cls.spec.job_id == job_id]:
                cls.wanted = 0
                self._requeue(cls)
            for class_id in [number for number, spec in record.specs.items() if spec.job_id == job_id]:
                del record.specs[class_id]
        return sorted(number for number, lease in self._leases.items() if lease.job_id == job_id)

    def release(self, lease_id: int) -> None:
        """What the lease held is free again. If its class still wants as many as before, it gets another.

        Raises:
            KeyError: there is no such lease.
        """
        lease = self._leases.pop(lease_id)
        self._usage.end(lease.use)
        self._give_back(lease.holding)
        record = self._owners.get(lease.owner)
        if record is None or lease_id not in record.leases:
            return  # of an owner that was dropped
        record.leases.remove(lease_id)
        if not record.leases:
            self._untold.discard(lease.owner)
            self._told.discard(lease.owner)
        cls = record.classes[lease.class_id]
        cls.granted -= 1
        self._requeue(cls)

    def set_blocked(self, lease_id: int, blocked: bool) -> None:
        """A blocked lease lends its CPUs; one that goes on takes them back, even if that oversubscribes.

        Raises:
            KeyError: there is no such lease.
        """
        lease = self._leases[lease_id]
        self._usage.set_blocked(lease.use, blocked)
        if blocked and lease.use.light:
            self._queue.full.clear()
        self._lend(lease.holding, blocked)

    def set_slow(self, lease_id: int) -> None:
        """A call under this lease has run for long. Raises KeyError: there is no such lease."""
        lease = self._leases[lease_id]
        self._usage.set_slow(lease.use)
        if lease.use.light:
            self._queue.full.clear()

    def acquire_actor(
        self, actor_id: bytes, placement: Amounts, hold: Amounts, strategy: Strategy = Strategy()
    ) -> dict[str, list[int]] | None:
        """Hold `hold` for an actor if `placement` and it fit now: its device numbers, or None.

        To wait in line with leases, let the actor want one lease of `placement` as its own owner, and when it is
        granted, release it and call this: nothing comes between the two.

        Raises:
            ValueError: the actor holds resources here already.
        """
        if actor_id in self._actors:
            raise ValueError(f"actor {actor_id.hex()} holds resources here already")
        if self._cluster.is_draining:
            return None
        if strategy.kind == "group":
            bundle = self._bundles.find_room(strategy, placement, hold)
            if bundle is None:
                return None
            holding = self._bundles.take(bundle, hold)
        elif self._books.has_room(placement) and self._books.has_room(hold):
            holding = self._books.take(hold)
        else:
            return None
        self._actors[actor_id] = holding
        return holding.numbers

    def release_actor(self, actor_id: bytes) -> None:
        """Raises KeyError: the actor holds nothing here."""
        self._give_back(self._actors.pop(actor_id))

    def set_actor_blocked(self, actor_id: bytes, blocked: bool) -> None:
        """As `set_blocked`. Raises KeyError: the actor holds nothing here."""
        self._lend(self._actors[actor_id], blocked)

    # --------------------------------------------------------------------------------------------- placement groups

    def prepare_bundles(self, group: bytes, wanted: dict[int, Amounts]) -> bool:
        """Set aside what these bundles of a placement group need: all or nothing."""
        return not self._cluster.is_draining and self._bundles.prepare(group, wanted)

    def commit_bundles(self, group: bytes) -> None:
        """Serve work of the group from what was set aside."""
        self._bundles.commit(group)
        self._note_bundles()

    def close_bundles(self, group: bytes, indices: list[int]) -> list[int]:
        """Serve nobody from these any more. Returns the leases in them, which the caller ends."""
        self._bundles.close(group, indices)
        self._note_bundles()
        closed = [number for number in self._leases if self.was_closed(number)]
        return [number for number in closed if self._leases[number].holding.bundle.group == group]

    def was_closed(self, lease_id: int) -> bool:
        """Whether the lease is in a bundle that ends."""
        lease = self._leases.get(lease_id)
        return lease is not None and lease.holding.bundle is not None and not lease.holding.bundle.open

    def bundle_totals(self) -> Amounts:
        """What bundles add to the node's totals."""
        return self._bundles.shown_totals()

    def _note_bundles(self) -> None:
        self._queue.forget_plans()
        self._bundles_changed = True

    # --------------------------------------------------------------------------------------------- questions

    def unmet(self, owner: bytes, class_id: int) -> int:
        """How many leases the class still waits for; 0 for a class that is not known."""
        record = self._owners.get(owner)
        cls = record.classes.get(class_id) if record is not None else None
        return cls.unmet if cls is not None else 0

    @property
    def is_waiting(self) -> bool:
        """Whether any demand is unmet; then `decide` should be called every second even if nothing happens."""
        return bool(self._queue)

    def demand_reports(self, now: float) -> list[DemandReport]:
        """Calls that wait, summed over classes that a person would not tell apart; the longest wait first."""
        rows: dict[tuple[bytes, str, object, WaitReason], tuple[DemandClass, int, float]] = {}
        for cls in self._queue:
            key = (cls.spec.job_id, cls.spec.name, cls.shape.key, cls.reason or _NEW)
            _, count, since = rows.get(key, (cls, 0, now))
            rows[key] = (cls, count + max(cls.unmet, cls.calls), min(since, cls.since))
        reports = []
        for cls, count, since in rows.values():
            spec, asked, reason = cls.spec, dict(cls.shape.asked), cls.reason or _NEW
            reports.append(DemandReport(spec.name, asked, count, reason, since, spec.job_id, spec.strategy.group))
        reports.sort(key=lambda report: report.since_unix_s)
        return reports[:MAX_REPORTS]

    # --------------------------------------------------------------------------------------------- decisions

    def decide(
        self, nodes: Sequence[NodeView], now: float, worker_limit: Callable[[LeaseSpec], bool] | None = None
    ) -> list[Decision]:
        """What to do now; the books already say that it is done.

        Args:
            nodes: the cluster as control sees it, with or without this node (of whose row only labels and draining
                are read). Passing the same tuple again means that nothing changed, and costs nothing.
            worker_limit: True when no further worker can be had for a spec now. Asked once before each grant, and
                False is always followed by that grant, so that it can count.
        """
        self._now = now
        queue = self._queue
        changed, roster_changed = self._cluster.update(nodes, now)
        if roster_changed:
            queue.forget_plans()
        changed, self._bundles_changed = changed or self._bundles_changed, False
        if not queue:
            self._end_starvation()
            return []
        decisions: list[Decision] = []
        looked_at = list(queue) if changed else self._touched()
        for cls in looked_at:
            self._send_before_granting(cls, decisions)
        self._end_overdue_reservation()
        self._something_to_grant = True
        while self._something_to_grant:
            self._something_to_grant = self._reasons_shifted = False
            if not queue.is_exhausted():
                self._grant(decisions, worker_limit)
            for cls in list(queue) if self._reasons_shifted else looked_at:
                if cls.queued:
                    self._settle(cls, decisions)  # it may leave, and end the reservation that was made for it
        queue.touched.clear()
        self._reclaim(decisions)
        return decisions

    def _touched(self) -> list[DemandClass]:
        """Classes that must be looked at though no other node changed."""
        queue = self._queue
        for cls in [cls for cls in self._revisit if self._now - cls.since >= REVISIT_S]:
            del self._revisit[cls]
            queue.touched[cls.owner, cls.class_id] = cls
        return list(queue.touched.values())

    def _grant(self, decisions: list[Decision], worker_limit: Callable[[LeaseSpec], bool] | None) -> None:
        """Serve the queue in order, as far as there is room."""
        queue, usage = self._queue, self._usage
        withheld: set[Shape] = set()  # they fit, but not past the reservation
        for priority in queue.priorities():
            jobs = {
                job: self._serve(priority, job, decisions, worker_limit, withheld) for job in queue.jobs_at(priority)
            }
            while jobs:
                if queue.is_exhausted(len(withheld)):
                    return
                job = min(jobs, key=usage.of) if len(jobs) > 1 else next(iter(jobs))
                turns = jobs.pop(job)
                if next(turns, False):
                    jobs[job] = turns

    def _serve(
        self,
        priority: int,
        job: bytes,
        decisions: list[Decision],
        worker_limit: Callable[[LeaseSpec], bool] | None,
        withheld: set[Shape],
    ) -> Iterator[bool]:
        """Grant one lease of the job after the other, in order, as far as there is room."""
        queue = self._queue
        for depth in queue.depths_of(priority, job):
            if self._reservation is not None and (reserved := self._reservation.cls).spec.depth == depth:
                mine = (reserved.spec.priority, reserved.spec.job_id) == (priority, job)
                if mine and self._try(reserved, decisions, worker_limit, withheld):
                    yield True
            owners = queue.owners_at(priority, job, depth)
            while owners:
                served: list[bytes] = []
                for owner in owners:
                    if queue.is_exhausted(len(withheld)):
                        return
                    for cls in queue.classes_of(priority, job, depth, owner):
                        if self._try(cls, decisions, worker_limit, withheld):
                            served.append(owner)
                            yield True
                            break
                owners = served

    def _try(
        self,
        cls: DemandClass,
        decisions: list[Decision],
        worker_limit: Callable[[LeaseSpec], bool] | None,
        withheld: set[Shape],
    ) -> bool:
        """Grant one lease of the class if it may have one and fits. Notes why not in `withheld` or `queue.full`."""
        shape = cls.shape
        if shape in self._queue.full:
            return False
        if not self._plan(shape).here or not self._has_room(shape):
            self._note_full(cls)
            return False
        if shape.light and self._usage.free_slots <= 0:
            self._queue.full.add(shape)
            return False
        if self._is_withheld_from(cls):
            withheld.add(shape)
            return False
        if worker_limit is not None and worker_limit(cls.spec):
            return False
        decisions.append(self._grant_one(cls))
        return True

    def _grant_one(self, cls: DemandClass) -> Grant:
        holding = self._take(cls.shape)
        self._last_lease += 1
        job = cls.spec.job_id
        use = self._usage.begin(job, cls.shape.asked, light=cls.shape.light)
        self._leases[self._last_lease] = _Lease(cls.owner, cls.class_id, job, holding, use)
        self._owners[cls.owner].leases.add(self._last_lease)
        self._told.discard(cls.owner)
        self._untold.add(cls.owner)
        cls.granted += 1
        cls.failed_holds = 0
        cls.patient_until = self._now + RESERVE_AFTER_S
        if self._reservation is not None and self._reservation.cls is cls:
            self._end_reservation()
        self._queue.had_its_turn(cls)
        if not cls.unmet:
            self._leave_queue(cls)
        return Grant(cls.owner, cls.class_id, self._last_lease, cls.spec, holding.numbers)

    def _note_full(self, cls: DemandClass) -> None:
        """It does not fit here now; if it has waited long enough, keep for it what it lacks."""
        shape = cls.shape
        self._queue.full.add(shape)
        if not self._plan(shape).here:
            return
        lacking = tuple(missing(shape.demand, self.available))
        if self._reservation is None and self._now >= cls.patient_until and fits(shape.demand, self._movable()):
            names = frozenset(lacking or shape.demand)  # nothing lacks where only devices are split
            self._reservation = _Reservation(cls, names, self._now + RESERVE_FOR_S)
            self._reasons_shifted = True
        elif shape.lacking is not None and shape.lacking != lacking:
            self._reasons_shifted = True

    def _movable(self) -> Amounts:
        """What would be free if all leases were returned."""
        movable = self.total
        for holding in (*self._actors.values(), *self._bundles.holdings()):
            if holding.bundle is None or holding.bundle.open:
                movable = subtract(movable, holding.amounts)
        return movable

    def _is_withheld_from(self, cls: DemandClass) -> bool:
        held = self._reservation
        if held is None or held.cls is cls:
            return False
        spec, reserved = cls.spec, held.cls.spec
        if spec.priority > reserved.priority or spec.depth > reserved.depth:
            return False
        return not held.names.isdisjoint(cls.shape.demand)

    def _end_reservation(self) -> None:
        self._reservation = None
        self._something_to_grant = True

    def _end_overdue_reservation(self) -> None:
        if self._reservation is None or self._now < self._reservation.until:
            return
        cls = self._reservation.cls
        cls.patient_until = self._now + min(RESERVE_FOR_S * 2**cls.failed_holds, MAX_PATIENCE_S)
        cls.failed_holds += 1
        self._end_reservation()

    def _reclaim(self, decisions: list[Decision]) -> None:
        """Tell owners of leases once that others starve; again only after a new lease or in a new starvation."""
        starving = [shape for shape in self._queue.full if self._plan(shape).here]
        if not starving:
            self._end_starvation()
            return
        if not self._untold:
            return
        names: set[str] = set()
        for shape in starving:
            names.update(missing(shape.demand, self.available) or (() if shape.light else shape.demand))
        crowded = self._usage.free_slots <= 0 and any(shape.light for shape in starving)
        alone: DemandClass | None = None  # the only one that starves: its own leases are no help to it
        if len(starving) == 1 and starving[0].waiting == 1:
            alone = next(cls for cls in self._queue if cls.shape is starving[0])
        priority = self._queue.priorities()[0]
        for owner in sorted(self._untold):
            for cls in self._owners[owner].classes.values():
                if not cls.granted or cls is alone or cls.spec.priority > priority:
                    continue
                if (crowded and cls.shape.light) or not names.isdisjoint(cls.shape.demand):
                    self._untold.remove(owner)
                    self._told.add(owner)
                    decisions.append(Reclaim(owner, priority))
                    break

    def _end_starvation(self) -> None:
        if self._told:
            self._untold |= self._told
            self._told.clear()

    # ---------------------------------------------------------------------------------- other nodes and reasons

    def _plan(self, shape: Shape) -> Plan:
        if shape.plan is None:
            shape.plan = self._cluster.plan(shape.demand, shape.strategy, pinned=shape.pinned)
        return shape.plan

    def _send_before_granting(self, cls: DemandClass, decisions: list[Decision]) -> None:
        """What never runs here leaves at once, to where it fits now if it does anywhere; what is spread, by shares."""
        plan = self._plan(cls.shape)
        if not plan.tiers or cls.shape.pinned:
            return
        if plan.here:
            for tier in plan.tiers[: plan.ahead]:
                self._share_out(cls, tier, decisions)
            if cls.shape.strategy.kind == "spread":
                self._share_out(cls, plan.peers, decisions, keep=True)
            return
        self._offer(cls, decisions)
        if cls.shape.strategy.when_busy == "fail":
            return
        for index, node_id in enumerate(plan.tiers[0]):
            if not cls.unmet:
                break
            self._send(cls, node_id, -(-cls.unmet // (len(plan.tiers[0]) - index)), decisions)

    def _settle(self, cls: DemandClass, decisions: list[Decision]) -> None:
        """Not all of the demand could be met here now: offer it to others, and say why the rest waits."""
        shape, plan = cls.shape, self._plan(cls.shape)
        is_new = self._now - cls.since < REVISIT_S
        if is_new and shape.pinned and plan.tiers:
            self._revisit[cls] = None
        elif plan.tiers and plan.here and shape.offered != self._cluster.version:
            if shape in self._queue.full or self._is_withheld_from(cls):
                self._offer(cls, decisions)
            if not cls.queued:
                return
        reason = plan.never or self._busy_reason(cls, plan)
        if is_new and reason.code == "unschedulable":
            self._revisit[cls] = None
            reason = WaitReason("infeasible", reason.text)
        elif plan.never is None and shape.strategy.when_busy == "fail":
            reason = policy.why_unavailable(shape.demand, self._named(shape))
        if reason is not cls.reason and reason != cls.reason:
            cls.reason = reason
            decisions.append(Wait(cls.owner, cls.class_id, reason, cls.granted))

    def _named(self, shape: Shape) -> NodeView:
        """The node that the shape must run on, which is there."""
        node_id = shape.strategy.node_id
        return self._cluster.own() if node_id == self.node_id else self._cluster.other(node_id)

    def _busy_reason(self, cls: DemandClass, plan: Plan) -> WaitReason:
        shape = cls.shape
        lacking = tuple(missing(shape.demand, self.available))
        if shape.busy is None or shape.lacking != lacking:
            shape.lacking = lacking
            others = [self._cluster.other(node_id) for node_id in plan.away]
            shape.busy = policy.why_busy(shape.demand, [self._cluster.own(), *others] if plan.here else others)
        if lacking:
            return shape.busy
        if self._is_withheld_from(cls):
            return _RESERVED
        if shape.light and self._usage.free_slots <= 0:
            return _CROWDED
        return _SPLIT if shape in self._queue.full else _LIMITED

    def _offer(self, cls: DemandClass, decisions: list[Decision]) -> None:
        """Send unmet demand to where it fits now, best nodes first."""
        for tier in self._plan(cls.shape).tiers:
            if not cls.unmet:
                return
            self._share_out(cls, tier, decisions)
        if cls.unmet:
            cls.shape.offered = self._cluster.version

    def _share_out(
        self, cls: DemandClass, away: Sequence[bytes], decisions: list[Decision], *, keep: bool = False
    ) -> None:
        """Send unmet demand to those of the nodes `away` where it fits now, in equal shares as far as they have room.

        With `keep` this node takes a share like the others, which just stays in the queue.
        """
        shape = cls.shape
        demand = shape.demand
        rest, own = cls.unmet, self._cluster.own()
        while rest:
            views = self._cluster.with_room(demand, away)
            if keep and fits(demand, own.available):
                views.append(own)
            if not views:
                return
            ranked = policy.rank_nodes(demand, shape.strategy, views, self._cluster.node_count, self._rng)
            share = -(-rest // len(ranked))
            for view in ranked:
                most = min(share, light_slots(view.total)) if shape.light else share
                count = count_fitting(demand, view.available, min(most, rest))
                rest -= count
                if view is own:
                    own = msgspec.structs.replace(own, available=subtract(own.available, demand, count))
                elif count:
                    self._send(cls, view.node_id, count, decisions)
            if shape.light:
                return  # it fits for ever

    def _send(self, cls: DemandClass, node_id: bytes, count: int, decisions: list[Decision]) -> None:
        self._cluster.deduct(node_id, cls.shape.demand, count, self._now)
        decisions.append(Redirect(cls.owner, cls.class_id, count, node_id))
        self._queue.had_its_turn(cls)
        cls.wanted -= count
        if not cls.unmet:
            self._requeue(cls)

    # ------------------------------------------------------------------------------------------------- books

    def _requeue(self, cls: DemandClass) -> None:
        """Put the class where its numbers say: in the queue, out of it, or forgotten."""
        if cls.unmet:
            if not cls.queued:
                cls.patient_until = self._now + RESERVE_AFTER_S
            self._queue.join(cls, self._now)
            return
        self._leave_queue(cls)
        if not cls.wanted and not cls.granted:
            record = self._owners[cls.owner]
            del record.classes[cls.class_id]
            self._queue.drop_shape(cls.shape)
            record.specs[cls.class_id] = cls.spec
            if len(record.specs) > MAX_REMEMBERED_SPECS:
                del record.specs[next(iter(record.specs))]

    def _leave_queue(self, cls: DemandClass) -> None:
        if self._revisit:
            self._revisit.pop(cls, None)
        if self._reservation is not None and self._reservation.cls is cls:
            self._end_reservation()
        self._queue.leave(cls)

    def _has_room(self, shape: Shape) -> bool:
        if shape.strategy.kind == "group":
            return self._bundles.find_room(shape.strategy, shape.asked) is not None
        return self._books.has_room(shape.demand)

    def _take(self, shape: Shape) -> Holding:
        if shape.strategy.kind == "group":
            bundle = self._bundles.find_room(shape.strategy, shape.asked)
            assert bundle is not None, "take without room"
            return self._bundles.take(bundle, shape.asked)
        return self._books.take(shape.demand)

    def _give_back(self, holding: Holding) -> None:
        if holding.bundle is None:
            self._books.give_back(holding)
        else:
            self._bundles.give_back(holding)
        self._queue.full.clear()

    def _lend(self, holding: Holding, lends: bool) -> None:
        if (self._books if holding.bundle is None else self._bundles).lend(holding, lends):
            self._queue.full.clear()

    def check_invariants(self) -> None:
        """Raises AssertionError, saying what is wrong. For tests and for an agent that is being debugged."""
        users = [*(lease.holding for lease in self._leases.values()), *self._actors.values()]
        shown = [holding for holding in users if holding.bundle is None or holding.bundle.open]
        self._books.check([*shown, *self._bundles.holdings()])
        self._bundles.check([holding for holding in users if holding.bundle is not None])
        self._usage.check(lease.use for lease in self._leases.values())
        owned: list[int] = []
        classes: list[DemandClass] = []
        for owner, record in self._owners.items():
            owned += record.leases
            classes += record.classes.values()
            assert (owner in self._untold) + (owner in self._told) == bool(record.leases), "who was told is wrong"
            for cls in record.classes.values():
                assert cls.wanted or cls.granted, f"class {cls.class_id} should be forgotten"
                mine = [number for number in record.leases if self._leases[number].class_id == cls.class_id]
                assert cls.granted == len(mine), f"class {cls.class_id} miscounts its leases"
        assert len(owned) == len(set(owned)), "a lease has two owners"
        assert set(owned) <= self._leases.keys(), "an owner has a lease that is not held"
        assert self._untold | self._told <= self._owners.keys(), "an owner that is gone may still be told"
        assert self._reservation is None or self._reservation.cls.queued, "resources are kept for nobody"
        self._queue.check(classes)
