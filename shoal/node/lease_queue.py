"""The order in which unmet demand is served. Pure.

priority -> job -> depth -> owner -> class: the highest priority and, within a job, the deepest first; of equals whoever
stands first in line. Lines are dicts, rotated by re-inserting whoever was just served, so that joining, leaving and
taking turns cost the same however long they are. Each entry is a level (a class that wants n more), never n items.

Classes that need the same share one `Shape`: whether it fits, where else it could run and why it waits is worked out
once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from shoal.node.messages import LeaseSpec
from shoal.scheduling.bundle_names import demand_on
from shoal.scheduling.resources import is_light
from shoal.scheduling.views import Amounts, Strategy, WaitReason


class Plan(NamedTuple):
    """Where a shape can run by the totals of the nodes, whatever is free.

    here: on this node. tiers: on these others, to which it may be sent; those of the first tier rather than those of
    the second (fallbacks of a label selector). ahead: so many tiers are better than here, even if there is room here.
    never: the reason when there is neither. peers: others that are just as good as here.
    """

    here: bool
    tiers: tuple[tuple[bytes, ...], ...]
    never: WaitReason | None = None
    ahead: int = 0
    peers: tuple[bytes, ...] = ()

    @property
    def away(self) -> list[bytes]:
        """All other nodes, best first."""
        return [node_id for tier in self.tiers for node_id in tier]


class Shape:
    """Everything about a demand that decides where it can run. `pinned`: another agent sent it here. `light`: it needs
    next to nothing, so how many run is bounded by slots.

    `demand` is what a node must show to have room; in a placement group that is under the bundles' names, and `asked`
    is what the work itself said.
    """

    __slots__ = (
        "asked",
        "busy",
        "demand",
        "key",
        "lacking",
        "light",
        "offered",
        "pinned",
        "plan",
        "refs",
        "strategy",
        "waiting",
    )

    def __init__(self, key: object, asked: Amounts, strategy: Strategy, pinned: bool) -> None:
        self.key = key
        self.asked = asked
        self.demand = demand_on(strategy.group, strategy.bundle, asked) if strategy.kind == "group" else asked
        self.strategy = strategy
        self.pinned = pinned
        self.light = is_light(asked)
        self.refs = 0  # classes
        self.waiting = 0  # classes in the queue
        self.plan: Plan | None = None  # None: not worked out since the roster of nodes changed
        self.lacking: tuple[str, ...] | None = None  # what this node had too little of when a reason was last given
        self.busy: WaitReason | None = None  # that reason
        self.offered = -1  # version of the cluster view in which no other node had room for it


class DemandClass:
    """One scheduling class of one owner."""

    __slots__ = (
        "calls", "class_id", "failed_holds", "granted", "owner", "patient_until", "queued", "reason", "shape", "since",
        "spec", "wanted",
    )  # fmt: skip

    def __init__(self, owner: bytes, class_id: int, spec: LeaseSpec, shape: Shape) -> None:
        self.owner = owner
        self.class_id = class_id
        self.spec = spec
        self.shape = shape
        self.wanted = 0
        self.calls = 0  # about how many wait for those leases, for people
        self.granted = 0  # leases not released
        self.queued = False
        self.since = 0.0  # when the demand became unmet
        self.patient_until = 0.0  # from then on resources are kept for it
        self.failed_holds = 0  # how often that was in vain
        self.reason: WaitReason | None = None  # as last told to the owner

    @property
    def unmet(self) -> int:
        return max(self.wanted - self.granted, 0)


class LeaseQueue:
    """Classes with unmet demand.

    Attributes:
        full: waiting shapes that are known not to fit here until something is given back; whoever gives back clears it.
        touched: classes in the queue whose demand changed since the last decision.
    """

    __slots__ = ("_levels", "_shapes", "_waiting_shapes", "full", "touched")

    def __init__(self) -> None:
        self._levels: dict[int, dict[bytes, dict[int, dict[bytes, dict[int, DemandClass]]]]] = {}
        self._shapes: dict[object, Shape] = {}
        self._waiting_shapes = 0
        self.full: set[Shape] = set()
        self.touched: dict[tuple[bytes, int], DemandClass] = {}

    def __bool__(self) -> bool:
        return self._waiting_shapes > 0

    def __iter__(self) -> Iterator[DemandClass]:
        """In order of service, but for turns; the queue must not change meanwhile."""
        for priority in self.priorities():
            for job in self._levels[priority].values():
                for depth in sorted(job, reverse=True):
                    for classes in job[depth].values():
                        yield from classes.values()

    def is_exhausted(self, withheld: int = 0) -> bool:
        """Whether every waiting shape is full, but for `withheld` that are not but may not be served either."""
        return len(self.full) + withheld >= self._waiting_shapes

    def priorities(self) -> list[int]:
        """The highest first, as a copy."""
        return sorted(self._levels, reverse=True)

    def jobs_at(self, priority: int) -> list[bytes]:
        """In the order of their turns, as a copy."""
        return list(self._levels.get(priority, ()))

    def depths_of(self, priority: int, job: bytes) -> list[int]:
        """The deepest first, as a copy."""
        return sorted(self._levels.get(priority, {}).get(job, ()), reverse=True)

    def owners_at(self, priority: int, job: bytes, depth: int) -> list[bytes]:
        """In the order of their turns, as a copy."""
        return list(self._levels.get(priority, {}).get(job, {}).get(depth, ()))

    def classes_of(self, priority: int, job: bytes, depth: int, owner: bytes) -> list[DemandClass]:
        """In the order of their turns, as a copy."""
        return list(self._levels.get(priority, {}).get(job, {}).get(depth, {}).get(owner, {}).values())

    def join(self, cls: DemandClass, now: float) -> None:
        """At the end of its line. Joining again changes nothing but `touched`."""
        self.touched[cls.owner, cls.class_id] = cls
        if cls.queued:
            return
        cls.queued = True
        cls.since = now
        spec = cls.spec
        depths = self._levels.setdefault(spec.priority, {}).setdefault(spec.job_id, {})
        depths.setdefault(spec.depth, {}).setdefault(cls.owner, {})[cls.class_id] = cls
        cls.shape.waiting += 1
        self._waiting_shapes += cls.shape.waiting == 1

    def leave(self, cls: DemandClass) -> None:
        """Its demand is met or withdrawn; leaving again changes nothing."""
        if not cls.queued:
            return
        cls.queued = False
        cls.reason = None
        cls.failed_holds = 0
        self.touched.pop((cls.owner, cls.class_id), None)
        spec = cls.spec
        jobs = self._levels[spec.priority]
        depths = jobs[spec.job_id]
        owners = depths[spec.depth]
        del owners[cls.owner][cls.class_id]
        if not owners[cls.owner]:
            del owners[cls.owner]
        if not owners:
            del depths[spec.depth]
        if not depths:
            del jobs[spec.job_id]
        if not jobs:
            del self._levels[spec.priority]
        cls.shape.waiting -= 1
        if not cls.shape.waiting:
            self._waiting_shapes -= 1
            self.full.discard(cls.shape)

    def had_its_turn(self, cls: DemandClass) -> None:
        """To the end of all lines: the job's, the owner's in it at its depth, and the class's at its owner."""
        spec = cls.spec
        jobs = self._levels[spec.priority]
        depths = jobs[spec.job_id] = jobs.pop(spec.job_id)
        owners = depths[spec.depth]
        classes = owners[cls.owner] = owners.pop(cls.owner)
        classes[cls.class_id] = classes.pop(cls.class_id)

    def shape_of(self, spec: LeaseSpec, pinned: bool) -> Shape:
        """The shape of a new class; give it back with `drop_shape` when the class is forgotten or changes."""
        demand = {name: amount for name, amount in spec.resources.items() if amount}
        key = (tuple(sorted(demand.items())), spec.strategy.key(), pinned)
        shape = self._shapes.get(key)
        if shape is None:
            shape = self._shapes[key] = Shape(key, demand, spec.strategy, pinned)
        shape.refs += 1
        return shape

    def drop_shape(self, shape: Shape) -> None:
        shape.refs -= 1
        if not shape.refs:
            del self._shapes[shape.key]

    def forget_plans(self) -> None:
        """The roster of nodes changed: where shapes can run, and why they wait, must be worked out again."""
        self.full.clear()
        for shape in self._shapes.values():
            shape.plan = shape.lacking = shape.busy = None

    def check(self, classes: list[DemandClass]) -> None:
        """Raises AssertionError unless the queue is what `classes`, all there are, say it should be."""
        queued = [id(cls) for cls in self]
        assert len(queued) == len(set(queued)), "a class waits in two places"
        assert set(queued) == {id(cls) for cls in classes if cls.unmet}, "the queue is not the unmet classes"
        assert all(cls.queued == (cls.unmet > 0) for cls in classes), "a class does not know whether it is queued"
        assert {id(cls) for cls in self.touched.values()} <= set(queued), "a touched class is not in the queue"
        waiting: dict[object, int] = {}
        refs: dict[object, int] = {}
        for cls in classes:
            waiting[cls.shape.key] = waiting.get(cls.shape.key, 0) + cls.queued
            refs[cls.shape.key] = refs.get(cls.shape.key, 0) + 1
        assert {shape.key: shape.waiting for shape in self._shapes.values()} == waiting, "waiting of a shape is wrong"
        assert {shape.key: shape.refs for shape in self._shapes.values()} == refs, "refs of a shape are wrong"
        assert self._waiting_shapes == sum(count > 0 for count in waiting.values()), "the count of shapes is wrong"
        assert all(shape.waiting for shape in self.full), "a full shape does not wait"
