"""The life of one actor, as a table.

    PENDING --Placed--> STARTING --Started--> ALIVE --Ended--> DEAD
       ^                  |   |                 |
       +-----Refused------+   +------Fell-------+---> RESTARTING --Placed--> REVIVING --Started--> ALIVE

PENDING and RESTARTING have no process and wait for a place; STARTING and REVIVING have a place and wait for the
constructor. RECYCLING is killed with permission to restart: its next life begins when the agent says that the process
is gone, since an agent books an actor's resources under its id and cannot hold two of one actor. STOPPING has lost its
last handle and may finish the calls that it accepted.

Whether a fall leads to a restart is decided before the event is made (`Fell` or `Ended`), so that the table has no
conditions. Every placement is a new incarnation, also after a refusal: a late message names the life that it is about.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Mapping
from typing import Final

import msgspec

from shoal.control.messages import ActorInfo, ActorSpec
from shoal.control.processes import Origin
from shoal.objects.ids import ActorId
from shoal.scheduling.bundle_names import demand_on
from shoal.scheduling.views import WaitReason

STORY_STEPS = 8
"""Steps that a record remembers of itself, for the log line of a bug: enough for one restart."""


class ActorState(enum.Enum):
    PENDING = "pending"
    STARTING = "starting"
    ALIVE = "alive"
    RECYCLING = "recycling"
    STOPPING = "stopping"
    RESTARTING = "restarting"
    REVIVING = "reviving"
    DEAD = "dead"


PENDING, STARTING, ALIVE, RECYCLING = ActorState.PENDING, ActorState.STARTING, ActorState.ALIVE, ActorState.RECYCLING
STOPPING, RESTARTING, REVIVING, DEAD = ActorState.STOPPING, ActorState.RESTARTING, ActorState.REVIVING, ActorState.DEAD


# ---------------------------------------------------------------------------------------------------------- events


class Placed(msgspec.Struct, frozen=True):
    """Control chose a node and sends StartActor. `stands`: the node is busy, and the actor stands in line there."""

    node_id: bytes
    address: str
    hostname: str = ""
    stands: bool = False


class Refused(msgspec.Struct, frozen=True):
    """The node cannot take it now; nothing ran."""

    text: str


class Started(msgspec.Struct, frozen=True):
    """The constructor returned."""

    worker_id: bytes
    socket_path: str
    pid: int


class Recycled(msgspec.Struct, frozen=True):
    """Killed, and may restart."""

    cause: str


class Retired(msgspec.Struct, frozen=True):
    """The last handle is gone: finish what was accepted, then end."""

    cause: str


class Fell(msgspec.Struct, frozen=True):
    """The process or its node is gone, and the budget of restarts allows another life."""

    cause: str


class Ended(msgspec.Struct, frozen=True):
    """For good. `process_gone`: there is no process left to stop (it ended by itself, or its node is dead)."""

    kind: str
    cause: str
    error: bytes = b""
    process_gone: bool = False


Event = Placed | Refused | Started | Recycled | Retired | Fell | Ended

STEPS: Final[Mapping[tuple[ActorState, type[Event]], ActorState]] = {
    (PENDING, Placed): STARTING,
    (PENDING, Ended): DEAD,
    (STARTING, Refused): PENDING,
    (STARTING, Started): ALIVE,
    (STARTING, Recycled): RECYCLING,
    (STARTING, Retired): STOPPING,
    (STARTING, Fell): RESTARTING,
    (STARTING, Ended): DEAD,
    (ALIVE, Recycled): RECYCLING,
    (ALIVE, Retired): STOPPING,
    (ALIVE, Fell): RESTARTING,
    (ALIVE, Ended): DEAD,
    (RECYCLING, Fell): RESTARTING,
    (RECYCLING, Ended): DEAD,
    (STOPPING, Started): STOPPING,  # the handle went away during the constructor: calls may still be on their way to it
    (STOPPING, Ended): DEAD,
    (RESTARTING, Placed): REVIVING,
    (RESTARTING, Ended): DEAD,
    (REVIVING, Refused): RESTARTING,
    (REVIVING, Started): ALIVE,
    (REVIVING, Recycled): RECYCLING,
    (REVIVING, Retired): STOPPING,
    (REVIVING, Fell): RESTARTING,
    (REVIVING, Ended): DEAD,
}

WAITING: Final = frozenset({PENDING, RESTARTING})
"""States without a place."""
STARTS: Final = frozenset({STARTING, REVIVING})
"""States in which the constructor runs."""
PLACED: Final = frozenset({STARTING, ALIVE, RECYCLING, STOPPING, REVIVING})
"""States in which an agent holds the actor."""


class IllegalStepError(Exception):
    """A bug of ours: an event was made for an actor that cannot take it."""

    def __init__(self, actor_id: bytes, state: str, event: str, story: str) -> None:
        super().__init__(actor_id, state, event, story)
        self.actor_id, self.state, self.event, self.story = actor_id, state, event, story

    def __str__(self) -> str:
        return f"actor {self.actor_id.hex()} is {self.state} and cannot take {self.event}; so far: {self.story}"


class ActorRecord:
    """What control keeps of an actor that is not dead.

    Attributes:
        incarnation: counts placements; 0 before the first.
        restarts: lives begun after the first one; what `max_restarts` limits.
        since: the loop's clock at the last step.
        reason: why it has no worker yet.
        need: what a node must show to be free to place it; hold: of that, what it holds then.
        quick_falls: how often in a row it ended right after its start.
        unready: its constructor's arguments are on their way; it is in no line until then.
    """

    __slots__ = (
        "actor_id", "address", "cause", "error", "hold", "hostname", "incarnation", "job_id", "kind",
        "need", "node_id", "owner", "pid", "quick_falls", "reason", "restarts", "since", "socket_path", "spec",
        "state", "story", "unready", "worker_id",
    )  # fmt: skip

    def __init__(self, spec: ActorSpec, owner: Origin, now: float) -> None:
        self.spec = spec
        self.actor_id = ActorId(spec.actor_id)
        self.job_id = spec.job_id
        self.need, self.hold = spec.needs(), spec.resources
        at = spec.strategy
        if at.kind == "group":
            self.need = demand_on(at.group, at.bundle, self.need)
            self.hold = demand_on(at.group, at.bundle, self.hold) if any(self.hold.values()) else {}
        self.owner = owner
        self.state = PENDING
        self.since = now
        self.incarnation = 0
        self.restarts = 0
        self.node_id = b""
        self.address = ""
        self.hostname = ""
        self.worker_id = b""
        self.socket_path = ""
        self.pid = 0
        self.kind = ""
        self.cause = ""
        self.error = b""
        self.reason: WaitReason | None = None
        self.quick_falls = 0
        self.unready = False
        self.story: deque[tuple[float, str, str]] = deque(maxlen=STORY_STEPS)

    def can(self, event: type[Event]) -> bool:
        return (self.state, event) in STEPS

    @property
    def may_restart(self) -> bool:
        return self.spec.max_restarts < 0 or self.restarts < self.spec.max_restarts

    @property
    def holds_nothing(self) -> bool:
        return not any(self.spec.resources.values())

    def apply(self, event: Event, now: float) -> ActorState:
        """Take one step of the table and note what the event says; returns the state before.

        Raises:
            IllegalStepError: the table has no such step; nothing changed.
        """
        was = self.state
        step = STEPS.get((was, type(event)))
        if step is None:
            raise IllegalStepError(self.actor_id, was.value, type(event).__name__, self.tell_story(now))
        self.state, self.since = step, now
        self.story.append((now, type(event).__name__, step.value))
        if isinstance(event, Placed):
            self.incarnation += 1
            self.node_id, self.address, self.hostname = event.node_id, event.address, event.hostname
            if not event.stands:  # else what it waits for is still true
                where = event.hostname or event.address
                self.reason = WaitReason("worker_starting", f"its worker is starting on {where}")
        elif isinstance(event, Started):
            self.worker_id, self.socket_path, self.pid = event.worker_id, event.socket_path, event.pid
            self.reason = None
        elif isinstance(event, Refused):
            self._leave_place()
        elif isinstance(event, Fell):
            self.restarts += 1
            self.cause = event.cause
            self._leave_place()
        elif isinstance(event, Recycled):
            self.cause = event.cause
            self.reason = WaitReason("actor_restarting", event.cause)
        elif isinstance(event, Retired):
            self.cause = event.cause
        else:
            self.kind, self.cause, self.error = event.kind, event.cause, event.error
            self.reason = None
        return was

    def _leave_place(self) -> None:
        self.node_id = self.worker_id = b""
        self.address = self.hostname = self.socket_path = ""
        self.pid = 0

    def public_state(self) -> str:
        """What callers are told: they do not care whether a worker is being looked for or being started."""
        if self.state is DEAD:
            return "dead"
        if self.state is ALIVE or (self.state is STOPPING and self.worker_id):
            return "alive"
        return "restarting" if self.restarts or self.state is RECYCLING else "pending"

    def info(self) -> ActorInfo:
        spec = self.spec
        return ActorInfo(
            actor_id=spec.actor_id,
            state=self.public_state(),
            incarnation=self.incarnation,
            node_id=self.node_id,
            address=self.address,
            worker_id=self.worker_id,
            socket_path=self.socket_path,
            pid=self.pid,
            class_name=spec.class_name,
            name=spec.name,
            namespace=spec.namespace,
            job_id=spec.job_id,
            detached=spec.detached,
            restarts=self.restarts,
            max_restarts=spec.max_restarts,
            kind=self.kind,
            cause=self.cause,
            error=self.error,
            reason=self.reason,
            resources=spec.resources,
            handle=spec.handle,
            max_concurrency=spec.max_concurrency,
        )

    def describe(self) -> str:
        """For people: "actor Counter 'jobs' (0a1b2c...)"."""
        name = f" {self.spec.name!r}" if self.spec.name else ""
        return f"actor {self.spec.class_name}{name} ({self.actor_id.hex()})"

    def tell_story(self, now: float) -> str:
        steps = (f"{now - at:.1f} s ago {event} -> {state}" for at, event, state in self.story)
        return ", ".join(steps) or "nothing happened yet"
