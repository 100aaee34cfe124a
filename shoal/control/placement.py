"""Which actors wait for a place, and where the next one goes.

Actors that are equal to a scheduler (same job, class, needs, strategy and priority) wait in one line, first come first
served. The answer for the first of a line is the answer for all of it, so work grows with the number of lines and not
of actors, and a line has one reason, one row in `status` and one notice to its driver.

Lines of higher priority go first. Of equal priority jobs take turns, one actor each, and within a job its lines do: a
flood of actors holds up only those of its own job.

Choosing looks at a few nodes drawn at random and at all of them only when none of those will do: among thousands of
nodes the best of ten is about as good as the best, at a hundredth of the cost. A line that found no place anywhere
is tried again on the node that changed, and on that one only. Tasks may keep nodes busy for as long as there are more
of them, so the first of a line goes and stands in line with them at each node that could take it, one at each.

An actor that holds nothing (the default: one CPU to be placed, none held) does not change what is free, so that the
usual policy would pile all of them onto one node. Those stay with their creator while it has fewer of them than CPUs
(calls stay on the machine), and go where there are fewest per CPU after that.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterator, Mapping, Sequence

from shoal.control.actors import ActorRecord
from shoal.control.messages import ActorSpec
from shoal.control.nodes import NodeRecord, NodeTable
from shoal.objects.ids import ActorId
from shoal.scheduling.bundle_names import asked_of
from shoal.scheduling.labels import matches
from shoal.scheduling.policy import Busy, Choice, Infeasible, Node, acceptable, can_ever_run, choose_node
from shoal.scheduling.resources import fits
from shoal.scheduling.views import Amounts, DemandReport, NodeView, WaitReason

DRAWN = 10
"""Nodes looked at first; a cluster of up to three times as many is looked at as a whole."""

LineKey = tuple[bytes, str, tuple[tuple[str, int], ...], bool, bytes, int]


class Line:
    """Actors that wait for the same thing, each with the clock when it began to wait.

    Attributes:
        standing: those that stand in line at a busy node, with that node; they may be back.
        turn: grows with each turn that it has.
    """

    __slots__ = ("actors", "key", "light", "need", "notice_at", "notices", "reason", "spec", "standing", "turn")

    def __init__(self, key: LineKey, spec: ActorSpec, need: Amounts, light: bool) -> None:
        self.key = key
        self.spec = spec
        self.need = need
        self.light = light
        self.actors: dict[ActorId, tuple[ActorRecord, float]] = {}
        self.standing: dict[ActorId, tuple[ActorRecord, float, bytes]] = {}
        self.reason: WaitReason | None = None
        self.notice_at = float("inf")
        self.notices = 0
        self.turn = 0

    def first(self) -> ActorRecord:
        """The next to be placed."""
        return next(iter(self.actors.values()))[0]

    def oldest(self) -> tuple[ActorRecord, float]:
        """Who has waited longest, and since when."""
        waiting = list(self.actors.values())[:1]
        waiting += [(actor, since) for actor, since, _ in self.standing.values()]
        return min(waiting, key=lambda entry: entry[1])

    def __len__(self) -> int:
        return len(self.actors) + len(self.standing)

    def open_to(self, node: NodeRecord) -> bool:
        """Whether the node has not refused one of this line since its last report.

        The node keeps that, not the line: a line ends when its only actor is placed, and two full nodes would then be
        asked in turn for ever.
        """
        return self.key not in node.refused


class WaitingRoom:
    """All lines, and the choice of a place."""

    def __init__(self, nodes: NodeTable, rng: random.Random) -> None:
        self._nodes = nodes
        self._rng = rng
        self._lines: dict[LineKey, Line] = {}
        self._line_of: dict[ActorId, Line] = {}
        self._standing: dict[ActorId, Line] = {}
        self._jobs: dict[bytes, int] = {}  # with lines: how many
        self._turns: dict[bytes, int] = {}  # of those that had one
        self._last_turn = 0

    def __len__(self) -> int:
        return len(self._line_of)

    def in_turn(self) -> Iterator[Line]:
        """Every line once, in the order of their turns as they are when asked for the next; a line whose first was
        placed comes again."""
        waiting = [(self._rank(line), number, line) for number, line in enumerate(self._lines.values())]
        heapq.heapify(waiting)
        while waiting:
            rank, number, line = heapq.heappop(waiting)
            if not len(line):
                continue
            if rank != self._rank(line):  # its job had a turn with another line
                heapq.heappush(waiting, (self._rank(line), number, line))
                continue
            before = line.turn
            yield line
            if line.turn != before and line.actors:
                heapq.heappush(waiting, (self._rank(line), number, line))

    def _rank(self, line: Line) -> tuple[int, int, int]:
        return -line.spec.priority, self._turns.get(line.spec.job_id, 0), line.turn

    def had_its_turn(self, line: Line) -> None:
        """Its first is placed, or ended."""
        self._last_turn += 1
        line.turn = self._last_turn
        if line.spec.job_id in self._jobs:
            self._turns[line.spec.job_id] = self._last_turn

    def lines(self) -> list[Line]:
        """Oldest line first; a copy, since placing closes lines."""
        return list(self._lines.values())

    def join(self, actor: ActorRecord, now: float) -> Line:
        """Wait for a place; one that stood in line at a node, and was refused in the end, is back where it was."""
        line = self._standing.pop(actor.actor_id, None)
        if line is not None:
            _, since, _ = line.standing.pop(actor.actor_id)
            waiting = {actor.actor_id: (actor, since), **line.actors}
            line.actors = dict(sorted(waiting.items(), key=lambda item: item[1][1]))
            self._line_of[actor.actor_id] = line
            actor.reason = line.reason
            return line
        spec = actor.spec
        need = actor.need
        light = actor.holds_nothing
        key: LineKey = (
            spec.job_id,
            spec.class_name,
            tuple(sorted(need.items())),
            light,
            spec.strategy.key(),
            spec.priority,
        )
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(key, spec, need, light)
            self._jobs[spec.job_id] = self._jobs.get(spec.job_id, 0) + 1
        line.actors[actor.actor_id] = (actor, now)
        self._line_of[actor.actor_id] = line
        if line.reason is not None:
            actor.reason = line.reason
        return line

    def leave(self, actor_id: ActorId) -> None:
        """Placed or dead; does nothing for an actor that does not wait here."""
        line = self._line_of.pop(actor_id, None)
        if line is not None:
            del line.actors[actor_id]
        else:
            line = self._standing.pop(actor_id, None)
            if line is None:
                return
            del line.standing[actor_id]
        if not len(line):
            del self._lines[line.key]
            job_id = line.spec.job_id
            self._jobs[job_id] -= 1
            if not self._jobs[job_id]:
                del self._jobs[job_id]
                self._turns.pop(job_id, None)

    def may_stand(self, line: Line, node: NodeRecord) -> bool:
        """Whether the first of the line may go and stand in line at this node, which is busy: one at a time does."""
        strategy = line.spec.strategy
        if not line.actors or any(where == node.node_id for _, _, where in line.standing.values()):
            return False
        if strategy.kind == "node" and not strategy.soft and strategy.node_id != node.node_id:
            return False
        return can_ever_run(line.need, strategy, self._nodes.views[node.index])

    def stand(self, actor_id: ActorId, node_id: bytes) -> None:
        """The first of a line goes to a busy node, to stand in line there."""
        line = self._line_of.pop(actor_id)
        self._standing[actor_id] = line
        line.standing[actor_id] = (*line.actors.pop(actor_id), node_id)

    def line_of(self, actor_id: ActorId) -> Line | None:
        return self._line_of.get(actor_id)

    # ------------------------------------------------------------------------------------------------ choosing

    def choose(self, line: Line, only: NodeRecord | None = None) -> Choice:
        """A place for the first of the line.

        Args:
            only: the one node that changed since the line found no place anywhere; a refusal then says nothing
                about the others.
        """
        named = line.spec.strategy.kind == "node"
        if named and only is not None and only.node_id != line.spec.strategy.node_id:
            only = None  # affinity is about a node that must be looked up, whichever changed
        if only is not None:
            if not line.open_to(only):
                return Busy(_just_refused(only))
            return self._choose_among(line, [self._nodes.views[only.index]])
        creator = self._nodes.find(line.first().spec.owner_node)
        if len(self._nodes) > 3 * DRAWN and not named and not line.spec.strategy.fallbacks:
            choice = self._choose_among(line, self._draw(line, creator))
            if isinstance(choice, Node) and not self._wastes_gpu(line, choice):
                return choice
        return self._choose_among_all(line)

    def _draw(self, line: Line, creator: NodeRecord | None) -> list[NodeView]:
        views = self._nodes.views
        picked = {int(self._rng.random() * len(views)) for _ in range(DRAWN)}
        if creator is not None and line.light:
            picked.add(creator.index)
        order = self._nodes.order
        return [views[index] for index in sorted(picked) if not order[index].refused or line.open_to(order[index])]

    def _wastes_gpu(self, line: Line, choice: Node) -> bool:
        node = self._nodes.find(choice.node_id)
        return node is not None and "GPU" not in line.need and bool(node.info.total.get("GPU"))

    def _choose_among_all(self, line: Line) -> Choice:
        views: Sequence[NodeView] = self._nodes.views
        open_views = [view for node, view in zip(self._nodes.order, views, strict=True) if line.open_to(node)]
        if len(open_views) == len(views):
            return self._choose_among(line, views)
        choice = self._choose_among(line, open_views)
        if isinstance(choice, Node):
            return choice
        choice = self._choose_among(line, views)
        if isinstance(choice, Node):  # the only one with room has just refused
            node = self._nodes.find(choice.node_id)
            assert node is not None
            return Busy(_just_refused(node))
        return choice

    def _choose_among(self, line: Line, views: Sequence[NodeView]) -> Choice:
        strategy = line.spec.strategy
        if line.light and strategy.kind != "node":
            for labels in acceptable(strategy):
                place = self._choose_light(line, views, labels)
                if place is not None:
                    return place
        return choose_node(line.need, strategy, views, None, self._rng)

    def _choose_light(self, line: Line, views: Sequence[NodeView], labels: Mapping[str, str]) -> Node | None:
        strategy, need = line.spec.strategy, line.need
        stays_home = strategy.kind == "default"
        avoids_gpus = "GPU" not in need
        creator_id = line.first().spec.owner_node
        best: NodeRecord | None = None
        best_share = (True, 0.0, 0.0)
        for view in views:
            if view.draining or not fits(need, view.available):
                continue
            if labels and not matches(labels, view.labels):
                continue
            node = self._nodes.find(view.node_id)
            assert node is not None
            share = node.light_share()
            if stays_home and share < 1.0 and view.node_id == creator_id:
                return Node(view.node_id)
            # A GPU is for those who need one; ties fall by lot.
            rank = (avoids_gpus and bool(view.total.get("GPU")), share, self._rng.random())
            if best is None or rank < best_share:
                best, best_share = node, rank
        return Node(best.node_id) if best is not None else None

    # ------------------------------------------------------------------------------------------------- telling

    def demand_reports(self, to_unix: float) -> Iterator[DemandReport]:
        """`to_unix`: what makes a Unix time of the loop's clock."""
        for line in self._lines.values():
            if not line.actors:
                continue  # the agents where they stand report them
            yield DemandReport(
                name=line.spec.class_name,
                resources=asked_of(line.need),
                count=len(line.actors),
                reason=line.reason or WaitReason("busy", "it has not been looked at yet"),
                since_unix_s=line.oldest()[1] + to_unix,
                job_id=line.spec.job_id,
                group=line.spec.strategy.group,
            )

    def check_invariants(self) -> None:
        assert {actor for line in self._lines.values() for actor in line.actors} == set(self._line_of)
        assert {actor for line in self._lines.values() for actor in line.standing} == set(self._standing)
        jobs = [line.spec.job_id for line in self._lines.values()]
        assert self._jobs == {job_id: jobs.count(job_id) for job_id in jobs}
        assert self._turns.keys() <= self._jobs.keys()
        for key, line in self._lines.items():
            assert len(line)
            assert line.key == key
            since = [begun for _, begun in line.actors.values()]
            assert since == sorted(since), "the first of a line has waited longest"


def _just_refused(node: NodeRecord) -> WaitReason:
    return WaitReason("busy", f"{node.describe()} has just refused it and will be asked again after its next report")


__all__ = ["Busy", "Infeasible", "Line", "Node", "WaitingRoom"]
