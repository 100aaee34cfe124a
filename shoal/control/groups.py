"""The life of one placement group, as a table.

    PENDING --Chosen--> PREPARING --Prepared--> CREATED --Lost--> RESCHEDULING
       ^                    |                      ^                 |     ^
       +------Refused-------+                      |              Chosen   | Refused, Lost
                                                   |                 v     |
                                                   +---Prepared--- REPREPARING

PENDING and RESCHEDULING look for places for the bundles that have none; PREPARING and REPREPARING have chosen some and
wait until every agent has set its bundles aside. When the last one has, the group is CREATED in the same breath: the
agents that took part are told to commit, which cannot fail but by the end of a node, and that is `Lost`. One refusal,
or the end of a node that takes part, gives back what the others set aside. A node that only takes part alone prepares
and commits in one step. REMOVED is left by nothing.

Each choice is a new attempt; an answer to an earlier one is stale.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from typing import Final

from shoal.control.actors import STORY_STEPS
from shoal.control.messages import GroupInfo, GroupSpec
from shoal.scheduling.bundles import BundleNeed
from shoal.scheduling.views import Amounts, WaitReason


class GroupState(enum.Enum):
    PENDING = "pending"
    PREPARING = "preparing"
    CREATED = "created"
    RESCHEDULING = "rescheduling"
    REPREPARING = "repreparing"
    REMOVED = "removed"


class GroupEvent(enum.Enum):
    CHOSEN = "chosen"
    """Places were chosen, and agents are asked to prepare."""
    PREPARED = "prepared"
    """All of them have."""
    REFUSED = "refused"
    """One of them did not, or ended meanwhile: all is given back."""
    LOST = "lost"
    """A node that had bundles of it has ended."""
    REMOVED = "removed"


PENDING, PREPARING, CREATED = GroupState.PENDING, GroupState.PREPARING, GroupState.CREATED
RESCHEDULING, REPREPARING, REMOVED = GroupState.RESCHEDULING, GroupState.REPREPARING, GroupState.REMOVED

STEPS: Final[Mapping[tuple[GroupState, GroupEvent], GroupState]] = {
    (PENDING, GroupEvent.CHOSEN): PREPARING,
    (PENDING, GroupEvent.REMOVED): REMOVED,
    (PREPARING, GroupEvent.PREPARED): CREATED,
    (PREPARING, GroupEvent.REFUSED): PENDING,
    (PREPARING, GroupEvent.REMOVED): REMOVED,
    (CREATED, GroupEvent.LOST): RESCHEDULING,
    (CREATED, GroupEvent.REMOVED): REMOVED,
    (RESCHEDULING, GroupEvent.CHOSEN): REPREPARING,
    (RESCHEDULING, GroupEvent.LOST): RESCHEDULING,
    (RESCHEDULING, GroupEvent.REMOVED): REMOVED,
    (REPREPARING, GroupEvent.PREPARED): CREATED,
    (REPREPARING, GroupEvent.REFUSED): RESCHEDULING,
    (REPREPARING, GroupEvent.LOST): RESCHEDULING,
    (REPREPARING, GroupEvent.REMOVED): REMOVED,
}

WAITING: Final = frozenset({PENDING, RESCHEDULING})
"""States in which bundles need a place."""

_PUBLIC: Final = {
    PENDING: "PENDING", PREPARING: "PENDING", CREATED: "CREATED", RESCHEDULING: "RESCHEDULING",
    REPREPARING: "RESCHEDULING", REMOVED: "REMOVED",
}  # fmt: skip


class IllegalGroupStepError(Exception):
    """A bug of ours: an event was made for a group that cannot take it."""


class GroupRecord:
    """What control keeps of a placement group that is not removed.

    Attributes:
        places: bundle -> node where it is, committed.
        asked: bundle -> node that was asked to prepare it in this attempt.
        unprepared: nodes of this attempt that have not answered.
        attempt: counts choices.
        failures: choices in a row that came to nothing; retry_at: no earlier choice than that.
        reason: why bundles have no place.
        since: when it began to wait; notice_at, notices: of warnings about that.
    """

    __slots__ = (
        "asked", "asked_unix_s", "attempt", "cause", "created_unix_s", "failures", "group_id", "notice_at", "notices",
        "places", "reason", "retry_at", "since", "spec", "state", "story", "unprepared",
    )  # fmt: skip

    def __init__(self, spec: GroupSpec, now: float, unix_s: float) -> None:
        self.spec = spec
        self.group_id = spec.group_id
        self.state = PENDING
        self.places: dict[int, bytes] = {}
        self.asked: dict[int, bytes] = {}
        self.unprepared: set[bytes] = set()
        self.attempt = 0
        self.failures = 0
        self.retry_at = 0.0
        self.reason: WaitReason | None = WaitReason("busy", "it was asked for a moment ago")
        self.cause = ""
        self.since = now
        self.notice_at = float("inf")
        self.notices = 0
        self.asked_unix_s = unix_s
        self.created_unix_s = 0.0
        self.story: deque[tuple[float, str, str]] = deque(maxlen=STORY_STEPS)

    def apply(self, event: GroupEvent, now: float) -> None:
        """Raises IllegalGroupStepError: the table has no such step; nothing changed."""
        step = STEPS.get((self.state, event))
        if step is None:
            steps = ", ".join(f"{now - at:.1f} s ago {what} -> {state}" for at, what, state in self.story)
            raise IllegalGroupStepError(f"group {self.group_id.hex()} is {self.state.value}, no {event.value}: {steps}")
        if step in WAITING and self.state not in WAITING and event is GroupEvent.LOST:
            self.since = now
        self.state = step
        self.story.append((now, event.value, step.value))

    def needs(self) -> list[BundleNeed]:
        spec = self.spec
        labels = spec.labels or [{}] * len(spec.bundles)
        return [BundleNeed(resources, selector) for resources, selector in zip(spec.bundles, labels, strict=True)]

    def missing(self) -> Amounts:
        """What its bundles without a place need in all."""
        total: Amounts = {}
        for index, resources in enumerate(self.spec.bundles):
            if index not in self.places:
                for name, amount in resources.items():
                    total[name] = total.get(name, 0) + amount
        return total

    def public_state(self) -> str:
        return _PUBLIC[self.state]

    def info(self) -> GroupInfo:
        return GroupInfo(
            spec=self.spec,
            state=self.public_state(),
            nodes=[self.places.get(index, b"") for index in range(len(self.spec.bundles))],
            attempts=self.attempt,
            reason=self.reason,
            cause=self.cause,
            asked_unix_s=self.asked_unix_s,
            created_unix_s=self.created_unix_s,
        )

    def describe(self) -> str:
        """For people: "placement group 'web' (PACK, 2 bundles)"."""
        name = repr(self.spec.name) if self.spec.name else self.group_id.hex()[:12]
        count = len(self.spec.bundles)
        return f"placement group {name} ({self.spec.strategy}, {count} bundle{'s' if count > 1 else ''})"
