"""The agent's lease scheduler: who may use a worker of this node, and who is better served elsewhere. Pure.

Owners (drivers and workers) say how many leases they want for each of their scheduling classes, as levels rather than
requests: saying it again is harmless, withdrawing needs no cancel, and a million queued tasks cost one number here.
`decide` turns levels and free resources into decisions; the agent carries them out.

What is owed to whom:

- Deeper first. A parent that waits for children holds a worker; finishing nested work before starting new roots keeps
  a recursion at a handful of live workers instead of one per call.
- At equal depth owners take turns, one lease each; within an owner its classes take turns.
- A class that needs much at once would never fit while small ones take each freed piece. When it was passed over for
  `RESERVE_AFTER_S`, what it lacks is kept for it (from its own depth and shallower), for `RESERVE_FOR_S` at most: the
  bound is what keeps a hold-back from ever becoming a deadlock with work that it waits for.
- Local first: work leaves only when it does not fit here now (default), is spread, or can never run here. Then it goes
  where the cluster view has room for it now; what was sent is deducted from the view until the view changes.

Cost: `decide` is called after every event. Classes whose needs are equal share a `_Shape`; a shape that does not fit
is not tried again until something is given back, and when every waiting shape is known not to fit nothing is scanned.
Only a change of another node's view looks at all waiting classes.

Blocked leases lend their CPUs and take them back at once when they go on, even if that oversubscribes: then
`available` is negative and nothing is granted until it has recovered.
"""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import msgspec

from shoal.node.messages import LeaseSpec
from shoal.scheduling import policy
from shoal.scheduling.resources import DEVICE_RESOURCES, DeviceSlots, count_fitting, fits, missing, subtract
from shoal.scheduling.views import Amounts, DemandReport, NodeView, Strategy, WaitReason

RESERVE_AFTER_S: Final = 1.0
RESERVE_FOR_S: Final = 10.0

MAX_REMEMBERED_SPECS: Final = 4096
"""Specs kept per owner for classes that want nothing now, so that the next demand need not repeat them."""

MAX_REPORTS: Final = 1000
"""Rows of `demand_reports`: a report travels to control on every change. The longest-waiting stay."""

_LENT: Final = "CPU"
"""What a blocked lease lends. A GPU or memory is still in use by what the process keeps there."""


class Grant(msgspec.Struct, frozen=True):
    owner: bytes
    class_id: int
    lease_id: int
    spec: LeaseSpec
    devices: dict[str, list[int]]


class Redirect(msgspec.Struct, frozen=True):
    """`count` leases of the class should be asked for at `node_id`; they no longer count in the demand here."""

    owner: bytes
    class_id: int
    count: int
    node_id: bytes


class Wait(msgspec.Struct, frozen=True):
    owner: bytes
    class_id: int
    reason: WaitReason


class Reclaim(msgspec.Struct, frozen=True):
    """Others wait for what this owner's leases hold: it should return those that are idle."""

    owner: bytes


Decision = Grant | Redirect | Wait | Reclaim


class _Plan(NamedTuple):
    """Where a shape can run by the totals of the nodes, whatever is free.

    here: this node. away: others it may be sent to. never: the reason when there is neither.
    """

    here: bool
    away: tuple[bytes, ...]
    never: WaitReason | None = None


class _Shape:
    """Everything about a demand that decides where it can run; shared by all classes that need the same."""

    __slots__ = ("busy", "demand", "key", "lacking", "pinned", "plan", "refs", "strategy", "waiting")

    def __init__(self, key: object, demand: Amounts, strategy: Strategy, pinned: bool) -> None:
        self.key = key
        self.demand = demand
        self.strategy = strategy
        self.pinned = pinned  # another agent sent it here
        self.refs = 0  # classes
        self.waiting = 0  # classes with unmet demand
        self.plan: _Plan | None = None  # None: not worked out since the roster of nodes changed
        self.lacking: tuple[str, ...] | None = None  # what this node had too little of when `busy` was written
        self.busy: WaitReason | None = None


class _Class:
    """One scheduling class of one owner."""

    __slots__ = ("class_id", "granted", "owner", "queued", "reason", "served", "shape", "since", "spec", "wanted")

    def __init__(self, owner: bytes, class_id: int, spec: LeaseSpec, shape: _Shape) -> None:
        self.owner = owner
        self.class_id = class_id
        self.spec = spec
        self.shape = shape
        self.wanted = 0
        self.granted = 0  # leases not released
        self.queued = False
        self.since = 0.0  # when demand became unmet
        self.served = 0.0  # that, or the last grant since
        self.reason: WaitReason | None = None  # as last told to the owner

    @property
    def unmet(self) -> int:
        return max(self.wanted - self.granted, 0)


class _Owner:
    __slots__ = ("classes", "leases", "specs")

    def __init__(self) -> None:
        self.classes: dict[int, _Class] = {}
        self.leases: set[int] = set()
        self.specs: dict[int, LeaseSpec] = {}  # of classes that are forgotten, oldest first


class _Holding:
    """What one lease or actor holds. `lent` of its CPUs count as available for now."""

    __slots__ = ("amounts", "devices", "lent")

    def __init__(self, amounts: Amounts, devices: dict[str, list[int]]) -> None:
        self.amounts = amounts
        self.devices = devices
        self.lent = 0


class _Lease:
    __slots__ = ("class_id", "holding", "job_id", "owner")

    def __init__(self, owner: bytes, class_id: int, job_id: bytes, holding: _Holding) -> None:
        self.owner = owner
        self.class_id = class_id
        self.job_id = job_id
        self.holding = holding


class _Reservation(NamedTuple):
    cls: _Class
    names: frozenset[str]  # resources kept for it
    until: float


class LeaseScheduler:
    """Levels in, decisions out. All `now` are unix seconds; they need not be exact.

    Raises:
        ValueError: `total` has a fraction of a device.
    """

    def __init__(self, node_id: bytes, total: Amounts, rng: random.Random) -> None:
        self.node_id = node_id
        self.total: Amounts = dict(total)
        self.available: Amounts = dict(total)
        self._rng = rng
        self._now = 0.0
        self._last_lease = 0
        self._devices = {name: DeviceSlots(name, total[name]) for name in sorted(DEVICE_RESOURCES) if name in total}
        self._owners: dict[bytes, _Owner] = {}
        self._leases: dict[int, _Lease] = {}
        self._actors: dict[bytes, _Holding] = {}
        self._shapes: dict[object, _Shape] = {}
        # The queue: depth -> owner -> class_id -> class with unmet demand. Its dicts rotate by re-inserting.
        self._levels: dict[int, dict[bytes, dict[int, _Class]]] = {}
        self._depths: list[int] = []  # negated and ascending: the deepest first
        self._touched: dict[tuple[bytes, int], _Class] = {}  # queued classes whose demand changed since `decide`
        self._waiting_shapes = 0  # shapes with waiting > 0
        self._full: set[_Shape] = set()  # of those: known not to fit here until something is given back
        self._reservation: _Reservation | None = None
        self._untold: set[bytes] = set()  # owners with leases that were not told to return idle ones,
        self._told: set[bytes] = set()  # and those that were
        # The cluster but for this node, less what was sent there since its view changed.
        self._seen: dict[bytes, NodeView] = {}
        self._others: dict[bytes, NodeView] = {}
        self._labels: dict[str, str] = {}
        self._draining = False
        self._nodes: Sequence[NodeView] = ()

    # ------------------------------------------------------------------------------------------------ inputs

    def set_demand(
        self, owner: bytes, class_id: int, wanted: int, spec: LeaseSpec | None, now: float, *, redirected: bool = False
    ) -> None:
        """`owner` wants `wanted` leases of its class in all, those it has included. Replaces what it said before.

        Args:
            spec: given with the first demand of a class, and remembered for the owner's life (beyond
                `MAX_REMEMBERED_SPECS` classes that want nothing now, the oldest are forgotten).
            redirected: another agent sent the owner here; what cannot be served waits here.
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
            cls = record.classes[class_id] = _Class(owner, class_id, spec, self._shape_of(spec, redirected))
        elif (spec is not None and spec != cls.spec) or redirected != cls.shape.pinned:
            self._dequeue(cls)
            self._drop_shape(cls.shape)
            cls.spec = spec or cls.spec
            cls.shape = self._shape_of(cls.spec, redirected)
        cls.wanted = wanted
        self._requeue(cls)

    def drop_owner(self, owner: bytes) -> list[int]:
        """The owner is gone: forget its demands. Its leases, which are returned, are held until `release`."""
        record = self._owners.pop(owner, None)
        if record is None:
            return []
        for cls in record.classes.values():
            self._dequeue(cls)
            self._drop_shape(cls.shape)
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
        self._lend(self._leases[lease_id].holding, blocked)

    def acquire_actor(self, actor_id: bytes, placement: Amounts, hold: Amounts) -> dict[str, list[int]] | None:
        """Hold `hold` for an actor if `placement` and it fit now: its device numbers, or None.

        Raises:
            ValueError: the actor holds resources here already.
        """
        if actor_id in self._actors:
            raise ValueError(f"actor {actor_id.hex()} holds resources here already")
        if self._draining or not self._has_room(placement) or not self._has_room(hold):
            return None
        holding = self._actors[actor_id] = self._take(hold)
        return holding.devices

    def release_actor(self, actor_id: bytes) -> None:
        """Raises KeyError: the actor holds nothing here."""
        self._give_back(self._actors.pop(actor_id))

    def set_actor_blocked(self, actor_id: bytes, blocked: bool) -> None:
        """As `set_blocked`. Raises KeyError: the actor holds nothing here."""
        self._lend(self._actors[actor_id], blocked)

    # --------------------------------------------------------------------------------------------- questions

    def unmet(self, owner: bytes, class_id: int) -> int:
        """How many leases the class still waits for; 0 for a class that is not known."""
        record = self._owners.get(owner)
        cls = record.classes.get(class_id) if record is not None else None
        return cls.unmet if cls is not None else 0

    @property
    def is_waiting(self) -> bool:
        """Whether any demand is unmet; then `decide` should be called at least every second or so."""
        return self._waiting_shapes > 0

    def demand_reports(self, now: float) -> list[DemandReport]:
        """Unmet demand, summed over classes that a person would not tell apart; the longest wait first."""
        new = WaitReason("busy", "it was asked for a moment ago")
        rows: dict[tuple[bytes, str, object, WaitReason], tuple[_Class, int, float]] = {}
        for cls in self._queued_classes():
            key = (cls.spec.job_id, cls.spec.name, cls.shape.key, cls.reason or new)
            _, count, since = rows.get(key, (cls, 0, now))
            rows[key] = (cls, count + cls.unmet, min(since, cls.since))
        reports = [
            DemandReport(cls.spec.name, dict(cls.shape.demand), count, cls.reason or new, since, cls.spec.job_id)
            for cls, count, since in rows.values()
        ]
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
        changed = self._look_at(nodes)
        if not self._waiting_shapes:
            self._touched.clear()
            self._end_starvation()
            return []
        decisions: list[Decision] = []
        moving = list(self._queued_classes()) if changed else list(self._touched.values())
        for cls in moving:
            self._send_before_granting(cls, decisions)
        if self._reservation is not None and now >= self._reservation.until:
            self._reservation.cls.served = now  # it had its chance: the others come first for as long as it waited
            self._end_reservation()
        if len(self._full) < self._waiting_shapes and self._grant(decisions, worker_limit):
            moving = list(self._queued_classes())
        for cls in moving:
            if cls.queued:
                self._settle(cls, decisions)
        self._touched.clear()
        self._reclaim(decisions)
        return decisions

    def _grant(self, decisions: list[Decision], worker_limit: Callable[[LeaseSpec], bool] | None) -> bool:
        """Serve the queue in order. True: what some shape lacks here is not what it lacked before."""
        shifted = False
        withheld: set[_Shape] = set()  # by the reservation, in this pass
        for negated in list(self._depths):
            level = self._levels.get(-negated, {})
            reserved = self._reservation
            owners = list(level)
            if reserved is not None and reserved.cls.spec.depth == -negated:
                owners.insert(0, reserved.cls.owner)
            while owners:
                served: list[bytes] = []
                for owner in owners:
                    if len(self._full) + len(withheld) >= self._waiting_shapes:
                        return shifted
                    for cls in list(level.get(owner, {}).values()):
                        shape = cls.shape
                        if shape in self._full or shape in withheld:
                            continue
                        if self._is_withheld_from(cls):
                            withheld.add(shape)
                        elif not self._plan(shape).here or not self._has_room(shape.demand):
                            shifted |= self._note_full(cls)
                        elif worker_limit is None or not worker_limit(cls.spec):
                            decisions.append(self._grant_one(cls))
                            served.append(owner)
                            break
                owners = served
        return shifted

    def _grant_one(self, cls: _Class) -> Grant:
        holding = self._take(cls.shape.demand)
        self._last_lease += 1
        self._leases[self._last_lease] = _Lease(cls.owner, cls.class_id, cls.spec.job_id, holding)
        self._owners[cls.owner].leases.add(self._last_lease)
        self._told.discard(cls.owner)
        self._untold.add(cls.owner)
        cls.granted += 1
        cls.served = self._now
        if self._reservation is not None and self._reservation.cls is cls:
            self._end_reservation()
        # To the end of both lines: the owner's among its depth, the class's among the owner's.
        level = self._levels[cls.spec.depth]
        classes = level[cls.owner] = level.pop(cls.owner)
        classes[cls.class_id] = classes.pop(cls.class_id)
        if not cls.unmet:
            self._dequeue(cls)
        return Grant(cls.owner, cls.class_id, self._last_lease, cls.spec, holding.devices)

    def _note_full(self, cls: _Class) -> bool:
        """It does not fit here now. True: for another reason than the one that was told."""
        shape = cls.shape
        self._full.add(shape)
        if not self._plan(shape).here:
            return False
        if self._reservation is None and self._now - cls.served >= RESERVE_AFTER_S:
            movable = dict(self.total)
            for holding in self._actors.values():
                movable = subtract(movable, holding.amounts)
            if fits(shape.demand, movable):  # else giving leases back would not help it
                names = frozenset(missing(shape.demand, self.available)) or frozenset(shape.demand)
                self._reservation = _Reservation(cls, names, self._now + RESERVE_FOR_S)
        return shape.lacking is not None and shape.lacking != tuple(missing(shape.demand, self.available))

    def _is_withheld_from(self, cls: _Class) -> bool:
        held = self._reservation
        if held is None or held.cls is cls or cls.spec.depth > held.cls.spec.depth:
            return False
        return not held.names.isdisjoint(cls.shape.demand)

    def _end_reservation(self) -> None:
        self._reservation = None

    # ---------------------------------------------------------------------------------- other nodes and reasons

    def _look_at(self, nodes: Sequence[NodeView]) -> bool:
        """Take in the view. True: another node changed, so that all that waits must be looked at again."""
        if nodes is self._nodes and isinstance(nodes, tuple):
            return False
        self._nodes = nodes
        changed = roster = False
        count = 0
        for view in nodes:
            if view.node_id == self.node_id:
                if view.draining != self._draining or view.labels != self._labels:
                    self._draining, self._labels = view.draining, view.labels
                    roster = True
                continue
            count += 1
            old = self._seen.get(view.node_id)
            if old is view or old == view:
                continue
            self._seen[view.node_id] = self._others[view.node_id] = view
            changed = True
            if old is None or (old.total, old.labels, old.draining) != (view.total, view.labels, view.draining):
                roster = True
        if count != len(self._seen):
            for node_id in self._seen.keys() - {view.node_id for view in nodes}:
                del self._seen[node_id], self._others[node_id]
            roster = True
        if roster:
            self._full.clear()
            for shape in self._shapes.values():
                shape.plan = shape.lacking = shape.busy = None
        return changed or roster

    def _own_view(self) -> NodeView:
        return NodeView(self.node_id, self.total, self.available, self._labels, self._draining)

    def _plan(self, shape: _Shape) -> _Plan:
        if shape.plan is None:
            shape.plan = self._make_plan(shape)
        return shape.plan

    def _make_plan(self, shape: _Shape) -> _Plan:
        demand, strategy, own = shape.demand, shape.strategy, self._own_view()
        if shape.pinned:
            here = policy.can_ever_run(demand, Strategy(), own)
            return _Plan(here, (), None if here else policy.why_infeasible(demand, Strategy(), [own]))
        if strategy.kind == "node":
            named = own if strategy.node_id == self.node_id else self._others.get(strategy.node_id)
            if named is not None and policy.can_ever_run(demand, strategy, named):
                return _Plan(True, ()) if named is own else _Plan(False, (named.node_id,))
            if not strategy.soft:
                return _Plan(False, (), policy.why_affinity_fails(demand, strategy, named))
        here = policy.can_ever_run(demand, strategy, own)
        away = tuple(node.node_id for node in self._others.values() if policy.can_ever_run(demand, strategy, node))
        if here or away:
            return _Plan(here, away)
        return _Plan(False, (), policy.why_infeasible(demand, strategy, [own, *self._others.values()]))

    def _send_before_granting(self, cls: _Class, decisions: list[Decision]) -> None:
        """What never runs here leaves at once, to where it fits now if it does anywhere; what is spread, by shares."""
        plan = self._plan(cls.shape)
        if not plan.away:
            return
        if plan.here:
            if cls.shape.strategy.kind == "spread":
                self._share_out(cls, decisions, keep=True)
            return
        self._share_out(cls, decisions)
        for index, node_id in enumerate(plan.away):
            if not cls.unmet:
                break
            self._send(cls, node_id, -(-cls.unmet // (len(plan.away) - index)), decisions)

    def _settle(self, cls: _Class, decisions: list[Decision]) -> None:
        """The demand could not all be met here now: offer it to others, and say why the rest waits."""
        shape, plan = cls.shape, self._plan(cls.shape)
        if plan.away and plan.here and shape.demand and shape in self._full:
            self._share_out(cls, decisions)
            if not cls.queued:
                return
        reason = plan.never or self._busy_reason(shape, plan)
        if reason is not cls.reason and reason != cls.reason:
            cls.reason = reason
            decisions.append(Wait(cls.owner, cls.class_id, reason))

    def _busy_reason(self, shape: _Shape, plan: _Plan) -> WaitReason:
        lacking = tuple(missing(shape.demand, self.available))
        if shape.busy is None or lacking != shape.lacking:
            others = [self._others[node_id] for node_id in plan.away]
            shape.busy = policy.why_busy(shape.demand, [self._own_view(), *others] if plan.here else others)
            shape.lacking = lacking
        return shape.busy

    def _share_out(self, cls: _Class, decisions: list[Decision], *, keep: bool = False) -> None:
        """Send unmet demand to nodes where it fits now, in equal shares as far as they have room.

        With `keep` this node takes a share like the others, which just stays in the queue.
        """
        demand, away = cls.shape.demand, self._plan(cls.shape).away
        rest, own = cls.unmet, self._own_view()
        while rest:
            views = [self._others[node_id] for node_id in away if fits(demand, self._others[node_id].available)]
            if keep and fits(demand, own.available):
                views.append(own)
            if not views:
                return
            ranked = policy.rank_nodes(demand, cls.shape.strategy, views, 1 + len(self._others), self._rng)
            share = -(-rest // len(ranked))
            for view in ranked:
                count = count_fitting(demand, view.available, min(share, rest))
                rest -= count
                if view is own:
                    available = subtract(own.available, demand, count)
                    own = NodeView(own.node_id, own.total, available, own.labels, own.draining)
                elif count:
                    self._send(cls, view.node_id, count, decisions)

    def _send(self, cls: _Class, node_id: bytes, count: int, decisions: list[Decision]) -> None:
        view = self._others[node_id]
        room = subtract(view.available, cls.shape.demand, count)
        self._others[node_id] = NodeView(view.node_id, view.total, room, view.labels, view.draining)
        decisions.append(Redirect(cls.owner, cls.class_id, count, node_id))
        cls.wanted -= count
        if not cls.unmet:
            self._requeue(cls)
        elif (level := self._levels[cls.spec.depth]) and len(level) > 1:
            level[cls.owner] = level.pop(cls.owner)  # others first when there is room again

    def _reclaim(self, decisions: list[Decision]) -> None:
        """Tell owners of leases once that others starve; again only after a new lease or in a new starvation."""
        starving = [shape for shape in self._full if self._plan(shape).here]
        if not starving:
            self._end_starvation()
            return
        if not self._untold:
            return
        names = {name for shape in starving for name in missing(shape.demand, self.available)}
        alone: _Class | None = None  # the one starving class: its own leases are no help to it
        if len(starving) == 1 and starving[0].waiting == 1:
            alone = next(cls for cls in self._queued_classes() if cls.shape is starving[0])
        for owner in sorted(self._untold):
            for cls in self._owners[owner].classes.values():
                if cls.granted and cls is not alone and not names.isdisjoint(cls.shape.demand):
                    self._untold.remove(owner)
                    self._told.add(owner)
                    decisions.append(Reclaim(owner))
                    break

    def _end_starvation(self) -> None:
        if self._told:
            self._untold |= self._told
            self._told.clear()

    # ------------------------------------------------------------------------------------------------- books

    def _queued_classes(self) -> Iterator[_Class]:
        """In order of service."""
        for negated in self._depths:
            for classes in self._levels[-negated].values():
                yield from classes.values()

    def _requeue(self, cls: _Class) -> None:
        """Put the class where its numbers say: in the queue, out of it, or forgotten."""
        if cls.unmet:
            self._touched[cls.owner, cls.class_id] = cls
            if cls.queued:
                return
            cls.queued = True
            cls.since = cls.served = self._now
            level = self._levels.get(cls.spec.depth)
            if level is None:
                level = self._levels[cls.spec.depth] = {}
                insort(self._depths, -cls.spec.depth)
            level.setdefault(cls.owner, {})[cls.class_id] = cls
            cls.shape.waiting += 1
            self._waiting_shapes += cls.shape.waiting == 1
            return
        self._dequeue(cls)
        if not cls.wanted and not cls.granted:
            record = self._owners[cls.owner]
            del record.classes[cls.class_id]
            self._drop_shape(cls.shape)
            record.specs[cls.class_id] = cls.spec
            if len(record.specs) > MAX_REMEMBERED_SPECS:
                del record.specs[next(iter(record.specs))]

    def _dequeue(self, cls: _Class) -> None:
        if not cls.queued:
            return
        cls.queued = False
        cls.reason = None
        self._touched.pop((cls.owner, cls.class_id), None)
        depth = cls.spec.depth
        level = self._levels[depth]
        del level[cls.owner][cls.class_id]
        if not level[cls.owner]:
            del level[cls.owner]
            if not level:
                del self._levels[depth]
                self._depths.remove(-depth)
        cls.shape.waiting -= 1
        if not cls.shape.waiting:
            self._waiting_shapes -= 1
            self._full.discard(cls.shape)
        if self._reservation is not None and self._reservation.cls is cls:
            self._end_reservation()

    def _shape_of(self, spec: LeaseSpec, pinned: bool) -> _Shape:
        demand = {name: amount for name, amount in spec.resources.items() if amount}
        at = spec.strategy
        key = (tuple(sorted(demand.items())), at.kind, at.node_id, at.soft, tuple(sorted(at.labels.items())), pinned)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = _Shape(key, demand, at, pinned)
        shape.refs += 1
        return shape

    def _drop_shape(self, shape: _Shape) -> None:
        shape.refs -= 1
        if not shape.refs:
            del self._shapes[shape.key]

    def _has_room(self, demand: Amounts) -> bool:
        """Whether it fits now, the devices' fractions included."""
        available = self.available
        for name, amount in demand.items():
            if amount and amount > available.get(name, 0):
                return False
        return all(slots.has_room(demand[name]) for name, slots in self._devices.items() if name in demand)

    def _take(self, demand: Amounts) -> _Holding:
        devices: dict[str, list[int]] = {}
        for name, amount in demand.items():
            self.available[name] = self.available.get(name, 0) - amount
            slots = self._devices.get(name)
            if slots is not None and amount:
                numbers = slots.acquire(amount)
                assert numbers is not None, "the caller asked _has_room"
                devices[name] = numbers
        return _Holding(demand, devices)

    def _give_back(self, holding: _Holding) -> None:
        self._lend(holding, False)
        for name, amount in holding.amounts.items():
            self.available[name] += amount
        for name, numbers in holding.devices.items():
            self._devices[name].release(numbers, holding.amounts[name])
        self._full.clear()

    def _lend(self, holding: _Holding, lend: bool) -> None:
        lent = holding.amounts.get(_LENT, 0) if lend else 0
        if lent == holding.lent:
            return
        self.available[_LENT] += lent - holding.lent
        if lent > holding.lent:
            self._full.clear()
        holding.lent = lent

    def check_invariants(self) -> None:
        """Raises AssertionError, saying which book is wrong. For tests and for a debugging agent."""
        holdings = [lease.holding for lease in self._leases.values()] + list(self._actors.values())
        for name in self.total.keys() | self.available.keys():
            held = sum(holding.amounts.get(name, 0) for holding in holdings)
            lent = sum(holding.lent for holding in holdings) if name == _LENT else 0
            assert held - lent + self.available.get(name, 0) == self.total.get(name, 0), f"{name}: books do not add up"
        for name, slots in self._devices.items():
            used = [0] * len(slots.used())
            for holding in holdings:
                for number, part in slots.parts(holding.devices.get(name, []), holding.amounts.get(name, 0)):
                    used[number] += part
            assert slots.used() == used, f"{name}: device books differ"
            assert slots.free == self.available.get(name, 0), f"{name}: devices and amounts differ"
        owned: list[int] = []
        waiting: dict[object, int] = {}
        refs: dict[object, int] = {}
        queued = list(self._queued_classes())
        assert len(queued) == len({id(cls) for cls in queued}), "a class waits in two places"
        for owner, record in self._owners.items():
            owned += record.leases
            for class_id, cls in record.classes.items():
                mine = [n for n in record.leases if self._leases[n].class_id == class_id]
                assert cls.granted == len(mine), f"class {class_id}: granted is wrong"
                assert cls.queued == (cls.unmet > 0) == (cls in queued), f"class {class_id}: queue is wrong"
                assert cls.wanted or cls.granted, f"class {class_id}: should be forgotten"
                waiting[cls.shape.key] = waiting.get(cls.shape.key, 0) + cls.queued
                refs[cls.shape.key] = refs.get(cls.shape.key, 0) + 1
            assert (owner in self._untold) + (owner in self._told) == bool(record.leases), "told is wrong"
        assert len(owned) == len(set(owned)), "a lease has two owners"
        assert set(owned) <= self._leases.keys(), "an owner has a lease that is not held"
        assert {shape.key: shape.waiting for shape in self._shapes.values()} == waiting, "shapes: waiting is wrong"
        assert {shape.key: shape.refs for shape in self._shapes.values()} == refs, "shapes: refs are wrong"
        assert self._waiting_shapes == sum(count > 0 for count in waiting.values()), "shapes: count is wrong"
        assert all(shape.waiting for shape in self._full), "a full shape does not wait"
        assert self._depths == sorted(-depth for depth in self._levels), "depths are wrong"
