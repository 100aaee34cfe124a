"""What the public API asks of a runtime. Two things implement it: the process inside a cluster, and the remote client.

One process-wide slot (`shoal.runtime.slot`) holds the current one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from shoal.control.messages import ActorInfo, GroupInfo, GroupSpec, JobInfo, MetricRow, StatusReply
from shoal.scheduling.views import Amounts, Strategy

if TYPE_CHECKING:
    from shoal.runtime.object_ref import ObjectRef


class Arrivals(Protocol):
    """References in the order in which they become ready; see `shoal.runtime.arrivals`."""

    def add(self, refs: Iterable[ObjectRef[Any]]) -> None: ...
    def take(self, timeout_s: float | None = None) -> list[ObjectRef[Any]]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How the results of a generator travel.

    Attributes:
        limit: it pauses while so many were not taken; 0: it does not.
        per_yield: it yields tuples or lists of so many items.
        dynamic: the call has one reference, to all items together.
    """

    limit: int = 0
    per_yield: int = 1
    dynamic: bool = False


class TaskTemplate:
    """A remote function with its options settled: what all calls of one `f` or `f.options(...)` share.

    The API makes one per decorated function and one per `.options()` call and passes the same instance each time;
    a runtime keeps what it prepared for it (pickled code, scheduling class) in `bound`.

    Attributes:
        function: the user's callable.
        name: for people; default is the function's qualified name.
        num_returns: 0 (`remote` returns None), 1 (a ref) or n (a list of refs); `STREAMED` with a `stream` (an
            `ObjectRefGenerator`).
        resources: what one running call holds.
        max_retries: -1 is unlimited.
        timeout_s: how long a call may run, 0.0 for ever.
        env_vars: of the task's runtime_env, merged over the job's.
        priority: among what waits, higher first; None is that of the task it is submitted from, else 0.
        inherits: no strategy was given, so that it runs in the placement group of who submits it, if that captures.
    """

    __slots__ = (
        "bound",
        "env_vars",
        "function",
        "inherits",
        "max_calls",
        "max_retries",
        "name",
        "num_returns",
        "priority",
        "resources",
        "retry_exceptions",
        "strategy",
        "stream",
        "timeout_s",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str,
        num_returns: int = 1,
        resources: Amounts,
        strategy: Strategy = Strategy(),
        max_retries: int = 3,
        retry_exceptions: bool | tuple[type[BaseException], ...] = False,
        max_calls: int = 0,
        timeout_s: float = 0.0,
        env_vars: Mapping[str, str] | None = None,
        priority: int | None = None,
        stream: StreamOptions | None = None,
        inherits: bool = False,
    ) -> None:
        self.priority = priority
        self.function = function
        self.inherits = inherits
        self.name = name
        self.num_returns = num_returns
        self.resources = resources
        self.strategy = strategy
        self.max_retries = max_retries
        self.retry_exceptions = retry_exceptions
        self.max_calls = max_calls
        self.timeout_s = timeout_s
        self.stream = stream
        self.env_vars = dict(env_vars or {})
        self.bound: Any = None


@dataclass(frozen=True, slots=True)
class ActorRules:
    """What whoever calls an actor must keep to; it travels with every handle.

    `any_order`: calls of one caller may overtake each other. `max_pending_calls`: of one process, -1 for no limit.
    """

    any_order: bool = False
    max_pending_calls: int = -1


class ActorTemplate:
    """An actor class with its options settled; `bound` as in `TaskTemplate`.

    Attributes:
        cls: the user's plain class.
        resources: held for life. placement: needed to be placed (1 CPU when the user asked for nothing at all).
        max_concurrency: 0 = default (1 for a synchronous class, 1000 for one with `async def` methods).
        groups: concurrency groups: name -> calls at a time. `max_concurrency` holds for all other calls.
        methods: name -> options of every public method, as the handle needs them.
        handle: opaque bytes from which the API can rebuild a handle (for `get_actor`).
        priority: of its creation, as of a task.
    """

    __slots__ = (
        "bound",
        "cls",
        "detached",
        "env_vars",
        "get_if_exists",
        "groups",
        "handle",
        "inherits",
        "is_async",
        "max_concurrency",
        "max_restarts",
        "max_task_retries",
        "methods",
        "name",
        "namespace",
        "placement",
        "priority",
        "resources",
        "rules",
        "strategy",
    )

    def __init__(
        self,
        cls: type,
        *,
        methods: Mapping[str, MethodTemplate],
        resources: Amounts,
        placement: Amounts,
        strategy: Strategy = Strategy(),
        name: str | None = None,
        namespace: str | None = None,
        detached: bool | None = None,
        get_if_exists: bool = False,
        max_restarts: int = 0,
        max_task_retries: int = 0,
        max_concurrency: int = 0,
        groups: Mapping[str, int] | None = None,
        rules: ActorRules = ActorRules(),
        is_async: bool = False,
        env_vars: Mapping[str, str] | None = None,
        handle: bytes = b"",
        priority: int | None = None,
        inherits: bool = False,
    ) -> None:
        self.priority = priority
        self.cls = cls
        self.inherits = inherits
        self.methods = dict(methods)
        self.resources = resources
        self.placement = placement
        self.strategy = strategy
        self.name = name
        self.namespace = namespace
        self.detached = detached
        self.get_if_exists = get_if_exists
        self.max_restarts = max_restarts
        self.max_task_retries = max_task_retries
        self.max_concurrency = max_concurrency
        self.groups = dict(groups or {})
        self.rules = rules
        self.is_async = is_async
        self.env_vars = dict(env_vars or {})
        self.handle = handle
        self.bound: Any = None


@dataclass(slots=True, unsafe_hash=True)
class MethodTemplate:
    """A method of an actor with its options, not changed after it was made. `name` is the attribute; `label` is for
    people ("Counter.add"); `bound` as in `TaskTemplate`.

    `retry_on`: errors that are tried again, as `retrying.names_of` gives them. `timeout_s`: as for tasks. `group`: the
    concurrency group that runs it, "" for the default one; `group_size`: how many calls run there at a time.
    """

    name: str
    label: str
    num_returns: int = 1
    max_task_retries: int = 0
    retry_on: tuple[str, ...] = ()
    timeout_s: float = 0.0
    group: str = ""
    group_size: int = 0
    stream: StreamOptions | None = None
    bound: Any = field(default=None, compare=False, repr=False)


class ActorClient(Protocol):
    """A process's one connection point to one actor; it lives as long as some handle in this process does."""

    @property
    def actor_id(self) -> bytes: ...

    def call(self, method: MethodTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Submit one call, in order after those submitted before; returns what `TaskTemplate.num_returns` says."""

    def set_rules(self, rules: ActorRules) -> None:
        """For all calls that this process makes from now on."""

    def location(self) -> tuple[bytes, bytes, bool]:
        """(actor id, home node id, weak): what a pickled handle carries; give it to `Runtime.borrow_actor`."""


@dataclass(frozen=True, slots=True)
class ContextData:
    """Where the calling code runs. Ids are binary; b"" or "" where there is none (a driver has no task)."""

    job_id: bytes
    node_id: bytes
    worker_id: bytes
    task_id: bytes = b""
    task_name: str = ""
    function_name: str = ""
    actor_id: bytes = b""
    actor_name: str = ""
    namespace: str = ""
    node_ip: str = ""
    node_labels: Mapping[str, str] = field(default_factory=dict)
    control_address: str = ""
    session_dir: str = ""
    assigned: Amounts = field(default_factory=dict)
    devices: Mapping[str, Sequence[int | str]] = field(default_factory=dict)  # "GPU" -> the node's names for them
    restarts: int = 0  # of the current actor
    env_vars: Mapping[str, str] = field(default_factory=dict)
    is_driver: bool = True
    actor_handle: bytes = b""  # of the current actor, as `ActorTemplate.handle`
    is_cancelled: bool | None = None  # the current call is to end; None where nobody can say
    group: bytes = b""  # the placement group that this code runs in
    captures: bool = False  # what it makes runs there too, unless told otherwise


class Groups(Protocol):
    """Placement groups. All methods may be called from any thread."""

    @property
    def owner_actor(self) -> bytes:
        """The detached actor that this process is, with which the groups that it makes end."""

    def create(self, spec: GroupSpec) -> None:
        """Raises ValueError: the name is taken."""

    def remove(self, group_id: bytes) -> None: ...
    def find(self, group_id: bytes, name: str = "", namespace: str | None = None) -> GroupInfo:
        """By id, or by name in a namespace (None: this job's). Raises ValueError: there is none."""

    def all(self) -> list[GroupInfo]:
        """Those that exist, and those removed that are still remembered."""

    def is_created(self, group_id: bytes) -> bool:
        """As far as this process knows."""

    def ready(self, group_id: bytes, value: bytes) -> ObjectRef[Any]:
        """A reference that gets `value` (a flat value) when all bundles have their places."""


class Runtime(Protocol):
    """All methods may be called from any thread and raise `shoal.exceptions`."""

    @property
    def groups(self) -> Groups: ...
    @property
    def job(self) -> JobInfo: ...
    def submit_task(self, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...
    def create_actor(
        self, template: ActorTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ActorClient, bytes]:
        """Returns the client and the handle bytes of the actor (the existing actor's when get_if_exists found one)."""

    def borrow_actor(self, actor_id: bytes, home: bytes, weak: bool = False) -> ActorClient: ...
    def find_actor(self, name: str, namespace: str | None) -> ActorInfo:
        """Raises ValueError when there is no such actor alive or pending."""

    def list_actors(self, *, named_only: bool, namespace: str) -> list[ActorInfo]: ...
    def kill_actor(self, actor_id: bytes, *, no_restart: bool) -> None: ...
    def cancel(self, ref: ObjectRef[Any], *, force: bool, recursive: bool) -> None:
        """Raises ValueError when `force` is meant for a call of an actor."""

    def put(self, value: Any) -> ObjectRef[Any]: ...
    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        """Values in the order of `refs`; raises the first error found, GetTimeoutError after `timeout_s`."""

    def wait(
        self, refs: Sequence[ObjectRef[Any]], num_returns: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]: ...
    def arrivals(self) -> Arrivals:
        """For results in the order in which they come."""

    def status(self) -> StatusReply: ...
    def context(self) -> ContextData: ...
    def task_events(self) -> tuple[list[bytes], list[str]]:
        """(an encoded `WorkerEvents` of each worker of the cluster that ran something, who is missing in that)."""

    def kv_put(self, space: str, key: bytes, value: bytes, *, overwrite: bool) -> bool: ...
    def kv_get(self, space: str, key: bytes) -> bytes | None: ...
    def kv_delete(self, space: str, key: bytes, *, by_prefix: bool) -> int: ...
    def kv_list(self, space: str, prefix: bytes) -> list[bytes]: ...
    def show_progress(self, line: str) -> None:
        """Show a state of a progress bar (`progress.BarState.line`) at the driver."""

    def report_later(self, delay_s: float, collect: Callable[[], list[MetricRow]]) -> None:
        """After a while, and before this process leaves, tell control what `collect()` returns; it runs on a thread of
        the runtime's and must be short."""

    def list_metrics(self) -> list[MetricRow]: ...
    def exit_actor(self) -> None:
        """Inside an actor: end it once the current call has returned; raises to leave the method at once."""

    def shutdown(self) -> None:
        """Leave the cluster; again does nothing."""

    def forget_in_child(self) -> None:
        """This process was forked from the one that the runtime belongs to: touch nothing that both share."""
