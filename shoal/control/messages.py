"""What control says and hears.

Three kinds of peers talk to control: agents (one connection each, for the node's life), processes (drivers and
workers, whose requests their agent relays as opaque bytes in `Relay`), and tools (the command line), which connect
directly and send the same requests a process may send.
User values (pickled arguments, classes, handles) pass through as opaque bytes.
"""

from __future__ import annotations

import msgspec

from shoal.rpc.messages import Done, Failed, Message, Reply, Request
from shoal.scheduling.views import Amounts, DemandReport, NodeView, Strategy, WaitReason


class NodeInfo(msgspec.Struct, array_like=True, frozen=True):
    """A node as every other node knows it."""

    node_id: bytes
    address: str  # "host:port" or "[v6]:port": the node's one TCP port, as peers reach it
    hostname: str
    total: Amounts
    available: Amounts
    labels: dict[str, str] = {}
    is_head: bool = False
    alive: bool = True
    death_reason: str = ""
    store_capacity: int = 0  # bytes
    store_used: int = 0  # bytes
    pid: int = 0  # of the agent
    started_unix_s: float = 0.0
    draining: bool = False
    store_spilled: int = 0  # bytes on disk

    def view(self) -> NodeView:
        return NodeView(self.node_id, self.total, self.available, self.labels, self.draining)


class JobInfo(msgspec.Struct, array_like=True, frozen=True):
    """A driver and what its workers need in order to run its code."""

    job_id: bytes
    namespace: str
    driver_id: bytes  # its worker id
    driver_node: bytes
    driver_pid: int = 0
    entrypoint: str = ""
    sys_path: list[str] = []
    working_dir: str = ""
    env_vars: dict[str, str] = {}
    started_unix_s: float = 0.0
    ended_unix_s: float = 0.0  # 0.0 while it runs
    default_lifetime: str = "non_detached"
    log_to_driver: bool = True
    preload: list[str] = []  # modules that its workers import before anything else
    logging: str = ""  # what their root loggers do, for `runtime/job_logging.py`; "" leaves them alone


class ActorSpec(msgspec.Struct, array_like=True, frozen=True):
    """All that is needed to make an actor, here or again on another node."""

    actor_id: bytes
    job_id: bytes
    owner_id: bytes  # worker id of the process that created it
    owner_node: bytes  # home of its handles' reference count
    class_name: str
    class_id: bytes  # FunctionId of the pickled class, in the key-value store under FUNCTIONS
    arguments: bytes  # opaque: the constructor's serialized arguments
    resources: Amounts  # held for the actor's life
    placement: Amounts  # needed to be placed (Ray: 1 CPU to place, 0 held, when nothing was asked for)
    strategy: Strategy = Strategy()
    name: str = ""
    namespace: str = ""
    detached: bool = False
    max_restarts: int = 0
    max_task_retries: int = 0
    max_concurrency: int = 0  # 0: the default of the kind of actor
    env_vars: dict[str, str] = {}
    handle: bytes = b""  # opaque: what get_actor() needs to make a handle
    options: bytes = b""  # opaque: what the worker needs to run it (concurrency groups ...)
    priority: int = 0  # among actors and tasks that wait for a place, higher first

    def needs(self) -> Amounts:
        """What must be free to place it: what it asks for that, and what it will hold."""
        needs = {name: amount for name, amount in self.placement.items() if amount}
        for name, amount in self.resources.items():
            if amount > needs.get(name, 0):
                needs[name] = amount
        return needs


class ActorInfo(msgspec.Struct, array_like=True, frozen=True):
    """An actor's state as callers need it.

    state: "pending" | "alive" | "restarting" | "dead". `incarnation` counts starts from 1; a message about an older
    incarnation is stale. When dead, `cause` says why in one line, and `error` may hold the pickled exception that the
    constructor raised. `kind` of death: "killed", "init_failed", "exited", "crashed", "node_died", "owner_died",
    "out_of_scope", "job_ended", "unschedulable", "group_removed".
    """

    actor_id: bytes
    state: str
    incarnation: int = 0
    node_id: bytes = b""
    address: str = ""  # of the node, for callers elsewhere
    worker_id: bytes = b""
    socket_path: str = ""  # of the worker, for callers on the same node
    pid: int = 0
    class_name: str = ""
    name: str = ""
    namespace: str = ""
    job_id: bytes = b""
    detached: bool = False
    restarts: int = 0
    max_restarts: int = 0
    kind: str = ""
    cause: str = ""
    error: bytes = b""
    reason: WaitReason | None = None  # while pending or restarting
    resources: Amounts = {}
    handle: bytes = b""
    max_concurrency: int = 1  # above 1, calls of one caller may overtake each other


class GroupSpec(msgspec.Struct, array_like=True, frozen=True):
    """A placement group as its creator wants it.

    `strategy`: one of `scheduling.bundles.STRATEGIES`. `labels`: a label selector for each bundle, or none at all.
    `actor_id`: the detached actor that it ends with; b"": it ends with its job. `detached`: it ends with neither.
    """

    group_id: bytes
    job_id: bytes
    bundles: list[Amounts]
    strategy: str = "PACK"
    name: str = ""
    namespace: str = ""
    detached: bool = False
    actor_id: bytes = b""
    labels: list[dict[str, str]] = []
    soft_target: bytes = b""  # the node that STRICT_PACK prefers


class GroupInfo(msgspec.Struct, array_like=True, frozen=True):
    """`state`: "PENDING", "CREATED", "RESCHEDULING" or "REMOVED". `nodes`: of each bundle, b"" where there is none.
    `attempts`: how often places were chosen. `reason`: while it has no place. `cause`: of its removal."""

    spec: GroupSpec
    state: str
    nodes: list[bytes] = []
    attempts: int = 0
    reason: WaitReason | None = None
    cause: str = ""
    asked_unix_s: float = 0.0
    created_unix_s: float = 0.0  # the first time


# ---------------------------------------------------------------------------------------- agent -> control, tags 100+


class RegisterNode(Request, frozen=True, tag=100):
    """First message of an agent. Answered by `NodeRegistered`, or `Failed` (kind "version", "duplicate")."""

    node: NodeInfo = msgspec.field(default_factory=lambda: NodeInfo(b"", "", "", {}, {}))
    python: str = ""
    version: str = ""


class NodeRegistered(Reply, frozen=True, tag=101):
    cluster_id: bytes = b""
    nodes: list[NodeInfo] = []


class NodeReport(Message, frozen=True, tag=102):
    """The agent's state, sent on change (coalesced) and at least every `heartbeat_s`."""

    available: Amounts
    store_used: int
    demands: list[DemandReport]
    workers: int = 0
    store_spilled: int = 0
    bundles: Amounts = {}  # what bundles of placement groups add to the node's totals (`scheduling.bundle_names`)


class RegisterJob(Request, frozen=True, tag=103):
    """A driver arrived at this agent; `job.job_id` is empty. Answered by `JobRegistered`."""

    job: JobInfo = msgspec.field(default_factory=lambda: JobInfo(b"", "", b"", b""))


class JobRegistered(Reply, frozen=True, tag=104):
    job: JobInfo = msgspec.field(default_factory=lambda: JobInfo(b"", "", b"", b""))


class GetJob(Request, frozen=True, tag=105):
    """Answered by `JobRegistered`, or `Failed` (kind "not_found" or "ended")."""

    job_id: bytes = b""


class ProcessGone(Message, frozen=True, tag=106):
    """A driver or worker of this node disconnected or died. For a driver this ends its job. `retired`: a worker that
    was ended because there was no more work for it; the actors that it created are the driver's from now on."""

    worker_id: bytes
    job_id: bytes
    is_driver: bool
    cause: str
    retired: bool = False


class ActorStarted(Message, frozen=True, tag=107):
    """The constructor returned; the actor takes calls."""

    actor_id: bytes
    incarnation: int
    worker_id: bytes
    socket_path: str
    pid: int


class ActorFailed(Message, frozen=True, tag=108):
    """A start did not succeed. kind "init_failed" (`error`: pickled exception, opaque; final), "crashed" (the process
    died in the constructor; counts as a restart), "refused" (the node cannot take it now: place it again, free)."""

    actor_id: bytes
    incarnation: int
    kind: str
    text: str
    error: bytes = b""


class ActorGone(Message, frozen=True, tag=109):
    """A started actor's process ended. `intended`: exit_actor, StopActor or a clean exit; it is not restarted."""

    actor_id: bytes
    incarnation: int
    intended: bool
    cause: str


class ActorOutOfScope(Message, frozen=True, tag=110):
    """The home agent counted the last handle away."""

    actor_id: bytes


class Relay(Message, frozen=True, tag=111):
    """A process's message to control, passed on unread. Answers and pushes return as `RelayReply`."""

    worker_id: bytes
    job_id: bytes
    body: bytes  # one encoded ProcessMessage; if it is a Request, the process chose its `rid`


class LogLines(msgspec.Struct, array_like=True, frozen=True):
    """Lines that one process printed. `name`: task or actor name, `stream`: "out" or "err"."""

    job_id: bytes
    worker_id: bytes
    node_ip: str
    pid: int
    name: str
    stream: str
    lines: list[str]


class PublishLogs(Message, frozen=True, tag=112):
    """Control passes each entry to the driver of its job (entries of no job go nowhere)."""

    entries: list[LogLines]


class ActorWaits(Message, frozen=True, tag=113):
    """The actor is in line for resources of this node, which others took since control chose it."""

    actor_id: bytes
    incarnation: int
    reason: WaitReason


class BundlesPrepared(Message, frozen=True, tag=120):
    """What became of `PrepareBundles`. Without `ok`, nothing is held."""

    group_id: bytes
    attempt: int
    ok: bool


class LogsFlushed(Message, frozen=True, tag=118):
    """`FlushNodeLogs` is done: all that had been printed by then has been published before this message."""

    number: int


# ---------------------------------------------------------------------------------------- control -> agent, tags 130+


class NodesChanged(Message, frozen=True, tag=130):
    """Full rows of the nodes that changed since the last one; `alive=False` says that a node is gone."""

    nodes: list[NodeInfo]


class StartActor(Message, frozen=True, tag=131):
    """Give this actor a worker. The agent answers with ActorStarted or ActorFailed. When others have taken the node's
    resources, the actor stands in line with tasks for at most `patience_s` before it is refused."""

    spec: ActorSpec
    incarnation: int
    class_blob: bytes
    restarts: int = 0
    patience_s: float = 0.0


class StopActor(Message, frozen=True, tag=132):
    """`graceful`: let calls that were accepted finish first (at most `grace_s`), else SIGKILL. Answered by
    ActorGone."""

    actor_id: bytes
    incarnation: int
    graceful: bool
    cause: str
    grace_s: float = 30.0


class JobEnded(Message, frozen=True, tag=133):
    """End the job's workers, leases and objects on this node; detached actors stay."""

    job_id: bytes


class FlushNodeLogs(Message, frozen=True, tag=138):
    """Publish what workers of the job have printed so far, then say `LogsFlushed` with the number."""

    job_id: bytes
    number: int


class PrepareBundles(Message, frozen=True, tag=140):
    """Set aside the resources of these bundles, of all or of none. With `commit` they are
    committed too: it is the only node that takes part. Where there is too little room, the group stands in line with
    the node's tasks for at most `patience_s`. Answered by `BundlesPrepared`."""

    group_id: bytes
    attempt: int
    bundles: dict[int, Amounts]
    commit: bool = False
    patience_s: float = 0.0


class CommitBundles(Message, frozen=True, tag=141):
    """Serve the group's work from what was prepared."""

    group_id: bytes


class ReturnBundles(Message, frozen=True, tag=142):
    """End these bundles, whatever they have come to, and the tasks in them. (Actors are ended by `StopActor`.)"""

    group_id: bytes
    bundles: list[int]
    cause: str = ""


class RelayReply(Message, frozen=True, tag=134):
    """An answer or a push for one process of this node."""

    worker_id: bytes
    body: bytes  # one encoded ProcessReply


class StopNode(Message, frozen=True, tag=135):
    """The node is told to end (cluster shutdown, fenced after a partition, version not wanted)."""

    reason: str


class MetricRow(msgspec.Struct, array_like=True, frozen=True):
    """One series of a user's metric. In a report, counters and histograms have what was added since the last one."""

    kind: str  # "counter" | "gauge" | "histogram"
    name: str
    description: str = ""
    tags: dict[str, str] = {}
    value: float = 0.0  # of a histogram: the sum of what was observed
    boundaries: list[float] = []
    buckets: list[int] = []  # how many up to each boundary (and above the last one before it), then those above all
    worker_id: bytes = b""  # of a gauge: whose it is; filled in by control


# -------------------------------------------------------------- process or tool -> control (ProcessMessage), tags 150+


class CreateActor(Request, frozen=True, tag=150):
    """Answered by `ActorReply`; `Failed` kind "name_taken". With `get_if_exists` a taken name is answered with the
    existing actor's info instead. Who creates an actor watches it. With `unready` it waits for `ProvideArguments`."""

    spec: ActorSpec = msgspec.field(default_factory=lambda: ActorSpec(b"", b"", b"", b"", "", b"", b"", {}, {}))
    get_if_exists: bool = False
    unready: bool = False


class FindActor(Request, frozen=True, tag=151):
    """By name. Answered by `ActorReply`, or `Failed` kind "not_found"."""

    name: str = ""
    namespace: str = ""


class WatchActor(Request, frozen=True, tag=152):
    """Answered by `ActorReply` now, and with `ActorUpdate` pushes at each change until the process ends or unwatches.
    `Failed` kind "not_found"."""

    actor_id: bytes = b""


class UnwatchActor(Message, frozen=True, tag=153):
    actor_id: bytes


class KillActor(Request, frozen=True, tag=154):
    """Answered by `Done` once control has decided (the process may still be ending)."""

    actor_id: bytes = b""
    no_restart: bool = True


class PutKey(Request, frozen=True, tag=155):
    """Answered by `KeyReply(found=<it existed before>)`."""

    space: str = ""
    key: bytes = b""
    value: bytes = b""
    overwrite: bool = True


class GetKey(Request, frozen=True, tag=156):
    """Answered by `KeyReply`."""

    space: str = ""
    key: bytes = b""


class DeleteKey(Request, frozen=True, tag=157):
    """Answered by `KeyReply(count=<deleted>)`; with `by_prefix` all keys that begin with `key`."""

    space: str = ""
    key: bytes = b""
    by_prefix: bool = False


class ListKeys(Request, frozen=True, tag=158):
    """Answered by `KeyReply(keys=...)`, sorted."""

    space: str = ""
    prefix: bytes = b""


class GetStatus(Request, frozen=True, tag=159):
    """Answered by `StatusReply`. All that `status`, `nodes()` and `cluster_resources()` need, in one picture."""

    detail: bool = False


class ListActors(Request, frozen=True, tag=160):
    """Answered by `ActorsReply`. `all_states` includes the dead that control still remembers."""

    all_states: bool = False
    named_only: bool = False
    namespace: str = ""  # with named_only: "" = every namespace


class FlushLogs(Request, frozen=True, tag=168):
    """Of a driver that is about to leave. Answered by `Done` after all that its job's workers had printed by now."""


class ListJobs(Request, frozen=True, tag=161):
    """Answered by `JobsReply`."""


class ReportMetrics(Message, frozen=True, tag=176):
    """What the process's metrics have gathered since its last report."""

    rows: list[MetricRow]


class ListMetrics(Request, frozen=True, tag=177):
    """Answered by `MetricsReply`."""


class CreateGroup(Request, frozen=True, tag=170):
    """Answered by `GroupReply`; `Failed` kind "name_taken", "limit". Who creates a group watches it, and when it has
    given no `rid` hears of a refusal as of a removal."""

    spec: GroupSpec = msgspec.field(default_factory=lambda: GroupSpec(b"", b"", []))


class RemoveGroup(Request, frozen=True, tag=171):
    """Answered by `Done`, also when there is no such group (any more). Its tasks and actors end. Who gives no `rid`
    does not hear of it."""

    group_id: bytes = b""


class FindGroup(Request, frozen=True, tag=172):
    """By id, or by name. Answered by `GroupReply`, or `Failed` kind "not_found"."""

    group_id: bytes = b""
    name: str = ""
    namespace: str = ""


class ListGroups(Request, frozen=True, tag=173):
    """Answered by `GroupsReply`: those that exist, and those removed that control still remembers."""


class WatchGroup(Message, frozen=True, tag=174):
    """Say `GroupChanged` now, if the group is known, and at each change, until this process ends."""

    group_id: bytes


class ProvideArguments(Message, frozen=True, tag=162):
    """What an `unready` actor waited for: `ActorSpec.arguments`; or it will never come, and `error` (an opaque pickled
    exception) and `text` say why."""

    actor_id: bytes
    arguments: bytes = b""
    error: bytes = b""
    text: str = ""


# -------------------------------------------------------------- control -> process or tool (ProcessReply), tags 180+


class ActorReply(Reply, frozen=True, tag=180):
    actor: ActorInfo = msgspec.field(default_factory=lambda: ActorInfo(b"", "pending"))


class ActorUpdate(Message, frozen=True, tag=181):
    actor: ActorInfo


class KeyReply(Reply, frozen=True, tag=182):
    found: bool = False
    value: bytes = b""
    keys: list[bytes] = []
    count: int = 0


class StatusReply(Reply, frozen=True, tag=183):
    cluster_id: bytes = b""
    nodes: list[NodeInfo] = []  # dead ones that are still remembered included
    demands: list[DemandReport] = []  # of all agents and of control's own pending actors
    actors: dict[str, int] = {}  # state -> count
    jobs: list[JobInfo] = []
    started_unix_s: float = 0.0
    version: str = ""


class ActorsReply(Reply, frozen=True, tag=184):
    actors: list[ActorInfo] = []


class JobsReply(Reply, frozen=True, tag=185):
    jobs: list[JobInfo] = []


class MetricsReply(Reply, frozen=True, tag=196):
    rows: list[MetricRow] = []
    dropped: int = 0  # rows that did not fit


class LogsArrived(Message, frozen=True, tag=186):
    """Push to a driver: what the processes of its job printed."""

    entries: list[LogLines]


class Notice(Message, frozen=True, tag=187):
    """Push to a driver: something a person should read, once per `key` (an infeasible actor, a node that died ...)."""

    key: str
    level: str  # "info" | "warning" | "error"
    text: str


class GroupReply(Reply, frozen=True, tag=190):
    group: GroupInfo = msgspec.field(default_factory=lambda: GroupInfo(GroupSpec(b"", b"", []), "PENDING"))


class GroupsReply(Reply, frozen=True, tag=191):
    groups: list[GroupInfo] = []


class GroupChanged(Message, frozen=True, tag=192):
    """Push to who watches a placement group; `state` as in `GroupInfo`. `text`: why it waits, or was removed."""

    group_id: bytes
    state: str
    text: str = ""


FUNCTIONS = "functions"
"""Key-value space of pickled classes and functions, by FunctionId."""

AgentMessage = (
    RegisterNode | NodeReport | RegisterJob | GetJob | ProcessGone | ActorStarted | ActorFailed | ActorGone
    | ActorOutOfScope | Relay | PublishLogs | ActorWaits | LogsFlushed | BundlesPrepared
)  # fmt: skip
ProcessMessage = (
    CreateActor | FindActor | WatchActor | UnwatchActor | KillActor | PutKey | GetKey | DeleteKey | ListKeys
    | GetStatus | ListActors | ListJobs | ProvideArguments | FlushLogs | ReportMetrics | ListMetrics | CreateGroup
    | RemoveGroup | FindGroup | ListGroups | WatchGroup
)  # fmt: skip
ControlMessage = (
    Done | Failed | NodeRegistered | JobRegistered | NodesChanged | StartActor | StopActor | JobEnded | RelayReply
    | StopNode | FlushNodeLogs | PrepareBundles | CommitBundles | ReturnBundles
)  # fmt: skip
ProcessReply = (
    Done | Failed | ActorReply | ActorUpdate | KeyReply | StatusReply | ActorsReply | JobsReply | LogsArrived | Notice
    | MetricsReply | GroupReply | GroupsReply | GroupChanged
)  # fmt: skip
