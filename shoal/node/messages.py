"""What an agent says and hears: with the processes of its node, with owners elsewhere, and with other agents."""

from __future__ import annotations

import msgspec

from shoal.control.messages import ActorSpec, JobInfo
from shoal.rpc.messages import Done, Failed, Message, Reply, Request
from shoal.scheduling.views import Amounts, Strategy, WaitReason

# ------------------------------------------------------------------------------------------------ shared values


class LeaseSpec(msgspec.Struct, array_like=True, frozen=True):
    """What one scheduling class of an owner needs of a worker. Tasks with equal specs share leases."""

    job_id: bytes
    resources: Amounts
    name: str = ""  # of the task, for people
    depth: int = 0  # nesting: tasks of the driver are 0, tasks that those submit are 1 ...
    strategy: Strategy = Strategy()
    env_vars: dict[str, str] = {}
    priority: int = 0  # among what waits, higher first
    retriable: bool = True  # should the worker be ended: the tasks may run again


class WorkerAddress(msgspec.Struct, array_like=True, frozen=True):
    """How to reach a worker: by `socket_path` on its own node, else through its node's port at `node_address`."""

    worker_id: bytes
    node_id: bytes
    node_address: str
    socket_path: str
    pid: int = 0


class WorkerExit(msgspec.Struct, array_like=True, frozen=True):
    """How a worker process ended. `code` >= 0: exit status; `signal` > 0: killed by it. `tail`: its last log lines."""

    code: int = 0
    signal: int = 0
    cause: str = ""
    tail: list[str] = []
    out_of_memory: bool = False  # the node ended it to get memory back
    group_removed: bool = False  # it was ended because the placement group that it worked in is gone


# Object states on the wire.
PENDING, INLINE, STORED, ERROR, LOST = 0, 1, 2, 3, 4


class ObjectState(msgspec.Struct, array_like=True, frozen=True):
    """What is known of an object.

    INLINE: `payload` is the flat serialized value. ERROR: `payload` is the flat serialized exception.
    STORED: `size` bytes in the stores of `nodes` (NodeIds). LOST: `payload` is one utf-8 line that says why.
    `contained`: (object id, home node id) of the references inside the value.
    """

    state: int
    payload: bytes = b""
    size: int = 0
    nodes: list[bytes] = []
    contained: list[tuple[bytes, bytes]] = []


# ------------------------------------------------------------------------------------------ process -> agent, tags 200+


class RegisterDriver(Request, frozen=True, tag=200):
    """First message of a driver. Answered by `ProcessRegistered`."""

    worker_id: bytes = b""
    pid: int = 0
    job: JobInfo | None = None
    version: str = ""
    python: str = ""


class ProcessRegistered(Reply, frozen=True, tag=201):
    node_id: bytes = b""
    node_ip: str = ""
    node_address: str = ""
    arena_path: str = ""
    arena_capacity: int = 0
    session_dir: str = ""
    job: JobInfo | None = None
    node_total: Amounts = {}
    node_labels: dict[str, str] = {}
    control_address: str = ""  # of the head


class WorkerReady(Message, frozen=True, tag=222):
    """First message of a worker: it listens, and takes what it is sent."""

    pid: int


class LeaseDemand(Message, frozen=True, tag=202):
    """How many leases this owner wants for one of its scheduling classes, as a level: it replaces the last demand of
    the same class, leases already granted count, 0 withdraws it. `spec` comes with the first demand of a class.
    `calls`: about how many wait for those leases; 0 where a lease stands for one call."""

    class_id: int
    wanted: int
    spec: LeaseSpec | None = None
    calls: int = 0


class ReturnLease(Message, frozen=True, tag=203):
    lease_id: int
    broken: bool = False  # the owner saw the worker fail: end it


class Blocked(Message, frozen=True, tag=204):
    """The worker's task waits in get or wait: lend its CPUs out. Sent at most once until `Unblocked`."""


class Unblocked(Message, frozen=True, tag=205):
    pass


class Allocate(Request, frozen=True, tag=206):
    """Room for `size` bytes in the store. Answered by `Allocated`, or `Failed` kind "store_full". Room that is never
    sealed belongs to the asking process and is freed with it, or by `Release`."""

    size: int = 0


class Allocated(Reply, frozen=True, tag=207):
    offset: int = 0


class Release(Message, frozen=True, tag=208):
    """Give back unsealed room."""

    offset: int
    size: int


class Seal(Message, frozen=True, tag=209):
    """The bytes at `offset` are object `object_id` from now on, immutable. `home`: node whose agent counts its
    references (of the process `owner_id` that submitted the task or put the value). The extent must be allocated
    room."""

    object_id: bytes
    offset: int
    size: int
    home: bytes
    owner_id: bytes
    contained: list[tuple[bytes, bytes]] = []


class Resolve(Request, frozen=True, tag=210):
    """Wait until the object is ready and, if it is stored, until a local copy exists (`fetch`) which is then pinned
    for the asking process until `Unpin`. Answered by `Resolved`. May take for ever: the asker withdraws with
    `CancelResolve`."""

    object_id: bytes = b""
    home: bytes = b""
    fetch: bool = True


class Resolved(Reply, frozen=True, tag=211):
    """`state.state` is INLINE, STORED, ERROR or LOST. When STORED and fetched, the value is at `offset`."""

    object_id: bytes = b""
    state: ObjectState = ObjectState(PENDING)
    offset: int = -1


class CancelResolve(Message, frozen=True, tag=212):
    """`request` is the `rid` of the Resolve that is not wanted any more (an answer on its way is unpinned by the
    asker)."""

    request: int


class Unpin(Message, frozen=True, tag=213):
    object_ids: list[bytes]


class Publish(Message, frozen=True, tag=214):
    """A ref of this process's own object leaves the process, or an object that left becomes ready: tell the home agent
    (which is this agent) the state as it is now."""

    object_id: bytes
    state: ObjectState


class BeginUses(Request, frozen=True, tag=230):
    """This process holds refs to objects that it did not create (first uses). Answered by `Done` when their homes have
    counted all of them."""

    objects: list[tuple[bytes, bytes]] = []  # (object id, home node id)


class ReadStates(Request, frozen=True, tag=231):
    """What is known of objects of this home, as far as they are ready. Answered at once by `States`: for those that are
    not, and for those whose values would make the answer too long, the asker waits with a `Resolve` each."""

    object_ids: list[bytes] = []


class States(Reply, frozen=True, tag=232):
    """In the order of the question; PENDING for those that are not told."""

    states: list[ObjectState] = []


class Unuse(Message, frozen=True, tag=216):
    """The process dropped its last ref (its own published or stored objects, or borrowed ones)."""

    objects: list[tuple[bytes, bytes]]  # (object id, home node id)


class ControlMail(Message, frozen=True, tag=217):
    """For control: `body` is one encoded ProcessMessage."""

    body: bytes


class ActorReady(Message, frozen=True, tag=218):
    """The constructor that `BeginActor` asked for returned, or raised (`error`: flat serialized exception)."""

    actor_id: bytes
    error: bytes = b""
    text: str = ""


class Leaving(Message, frozen=True, tag=219):
    """The worker ends on purpose (exit_actor, graceful stop, max_calls): not a crash."""

    cause: str


class WorkerBusy(Message, frozen=True, tag=220):
    """What the process waits for or runs, for `status`: sent only when it has lasted for seconds."""

    task: str
    reason: WaitReason | None


class CancelCall(Message, frozen=True, tag=223):
    """Somebody who is not its owner wants the call that makes `object_id` cancelled. Goes to the owner: through the
    agent of the process that wants it, and that of the owner's node, `home`."""

    object_id: bytes
    home: bytes
    force: bool
    recursive: bool


class RunsLong(Message, frozen=True, tag=229):
    """The worker's call has run for `executor.LONG_S`. Said once of a call, and only of those that need next to nothing
    (`resources.is_light`): more of those are run at a time when they are not short."""


class TaskEvents(Reply, frozen=True, tag=226):
    """What workers remember of the calls that they ran: one encoded `WorkerEvents` each, read by the driver only.
    `silent`: who did not answer in time, or whose events were too many, in words."""

    workers: list[bytes] = []
    silent: list[str] = []


class GetTaskEvents(Request, frozen=True, tag=225):
    """To an agent, by a driver or another agent, and by it to its workers. Answered by `TaskEvents`. `everywhere`: of
    all nodes."""

    everywhere: bool = False


class HandOverEvents(Message, frozen=True, tag=227):
    """The last words of a worker: what `TaskEvents` would have had of it."""

    events: bytes


# ------------------------------------------------------------------------------------------ agent -> process, tags 240+


class LeaseGranted(Message, frozen=True, tag=240):
    class_id: int
    lease_id: int
    worker: WorkerAddress
    devices: dict[str, list[int]] = {}  # resource name -> device numbers, for GPUs


class LeaseRedirected(Message, frozen=True, tag=241):
    """`count` leases of the class are better asked for at another node; they no longer count in this agent's demand."""

    class_id: int
    count: int
    node_id: bytes
    address: str


class LeaseWaiting(Message, frozen=True, tag=242):
    """Why the demand of a class is not met; sent when the reason changes. With code "unschedulable" no more than
    `granted` leases, those given before included, will come of it: what is queued beyond that fails."""

    class_id: int
    reason: WaitReason
    granted: int = 0


class ReclaimLeases(Message, frozen=True, tag=243):
    """Others wait for what leases hold: return idle ones at once, and the rest when they have run dry. `priority`: of
    what waits; leases for work of a higher one may stay."""

    priority: int = 2**62


class LeaseLost(Message, frozen=True, tag=244):
    """The leased worker ended."""

    lease_id: int
    exit: WorkerExit


class JoinNode(Message, frozen=True, tag=250):
    """First message to a worker, sent before it even runs: what it must know of the node it is on."""

    node: ProcessRegistered


class AssignJob(Request, frozen=True, tag=245):
    """From now on the worker belongs to this job. Answered by `Done`."""

    job: JobInfo = msgspec.field(default_factory=lambda: JobInfo(b"", "", b"", b""))
    env_vars: dict[str, str] = {}
    devices: dict[str, list[int]] = {}


class BeginActor(Message, frozen=True, tag=246):
    """Become this actor; answered by `ActorReady`."""

    spec: ActorSpec
    incarnation: int
    restarts: int
    class_blob: bytes
    devices: dict[str, list[int]] = {}


class EndActor(Message, frozen=True, tag=247):
    """Finish the calls that were accepted, then exit."""

    cause: str


class MailFromControl(Message, frozen=True, tag=248):
    body: bytes  # one encoded ProcessReply


class EndProcess(Message, frozen=True, tag=249):
    """The node or the job ends: a worker exits at once, a driver fails what it waits for with `reason`."""

    reason: str


# ------------------------------------------------------------------------------------------- agent <-> agent, tags 260+
# Owners of another node speak LeaseDemand / ReturnLease with an agent as local ones do, after `OwnerHello`.


class OwnerHello(Message, frozen=True, tag=260):
    """First message of an owner (driver or worker of another node) that wants leases here."""

    worker_id: bytes
    job_id: bytes
    node_id: bytes


class AgentHello(Message, frozen=True, tag=261):
    """First message of an agent that connects to another agent."""

    node_id: bytes
    address: str


class HolderChanged(Request, frozen=True, tag=262):
    """To the home agent: the sender's node began (`holds`) or ceased to hold refs of the object. Answered by `Done`
    when `rid` is set."""

    object_id: bytes = b""
    holds: bool = True


class CopyMade(Message, frozen=True, tag=263):
    """To the home agent: the sender's node has a sealed copy."""

    object_id: bytes
    size: int
    owner_id: bytes
    contained: list[tuple[bytes, bytes]] = []


class CopyGone(Message, frozen=True, tag=264):
    """To the home agent: the sender's copy was evicted or lost."""

    object_id: bytes
    why: str = "its last copy was evicted"


class DeleteCopy(Message, frozen=True, tag=265):
    """From the home agent: nobody refers to the object any more."""

    object_id: bytes


class AskState(Request, frozen=True, tag=266):
    """To the home agent: answer with `StateReply` once the object is not PENDING any more."""

    object_id: bytes = b""


class StateReply(Reply, frozen=True, tag=267):
    state: ObjectState = ObjectState(PENDING)


# --------------------------------------------------------------------------- transfer connections (puller <-> source)


class PullChunk(Message, frozen=True, tag=280):
    """Send `length` bytes of the object from byte `start` on. Answered by a `ChunkHeader` frame and then the raw
    bytes."""

    object_id: bytes
    start: int
    length: int


class ChunkHeader(Message, frozen=True, tag=281):
    """`length` -1: this node has no such copy (any more)."""

    object_id: bytes
    start: int
    length: int


FromProcess = (
    Done | Failed | RegisterDriver | WorkerReady | OwnerHello | LeaseDemand | ReturnLease | Blocked | Unblocked
    | Allocate | Release | Seal | Resolve | CancelResolve | Unpin | Publish | BeginUses | ReadStates | Unuse
    | ControlMail | ActorReady | Leaving | WorkerBusy | CancelCall | RunsLong | GetTaskEvents | TaskEvents
    | HandOverEvents
)  # fmt: skip
ToProcess = (
    Done | Failed | JoinNode | ProcessRegistered | LeaseGranted | LeaseRedirected | LeaseWaiting | ReclaimLeases
    | LeaseLost | Allocated | Resolved | AssignJob | BeginActor | EndActor | MailFromControl | EndProcess
    | CancelCall | GetTaskEvents | TaskEvents | States
)  # fmt: skip
BetweenAgents = (
    Done | Failed | AgentHello | HolderChanged | CopyMade | CopyGone | DeleteCopy | AskState | StateReply
    | CancelCall | GetTaskEvents | TaskEvents
)  # fmt: skip
