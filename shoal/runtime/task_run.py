"""What the owner keeps of a call between `.remote()` and its result, and what calls of one template share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from shoal.node.messages import LeaseSpec
from shoal.objects.ids import make_task_id
from shoal.runtime.messages import Argument, Template
from shoal.runtime.nesting import Nesting

if TYPE_CHECKING:
    from shoal.objects.ids import TaskId
    from shoal.runtime.interface import StreamOptions
    from shoal.runtime.object_ref import ObjectRef

CANCELLED_STAGES: Final = ("cancelling", "killing")
"""Sent, and its owner does not want it any more: whatever ends it, it is not tried again."""


class Placeholder:
    """Stands in the serialized arguments for the n-th reference, until the worker puts the value there."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, tuple[int]]:
        return Placeholder, (self.index,)


class Bound:
    """A template as one runtime prepared it: pickled code and scheduling class. One per `f` or `f.options(...)`.

    Attributes:
        spec: None for a method of an actor.
        stream: how the results travel when they come one by one; None for all other calls.
        place: what `CoreRuntime.inherited` was when this was made, or last used.
        variants: of one template, by the placement group that its tasks inherit; shared by all of them.
        pace_s: how long a call takes, None until a worker said so.
        retry_on: errors of user code that are tried again, as `retrying.names_of` gives them.
        timeout_s: how long a call may run, 0.0 for ever.
        group: of a method: the concurrency group that runs it, "" for the default one; `group_size`: at once there.
        retried: how many times calls were tried again.
    """

    __slots__ = (
        "classes",
        "code",
        "function_name",
        "group",
        "group_size",
        "max_calls",
        "max_retries",
        "method",
        "name",
        "num_returns",
        "pace_s",
        "place",
        "priority",
        "retried",
        "retry_on",
        "runtime",
        "spec",
        "stream",
        "timeout_s",
        "variants",
    )

    def __init__(
        self,
        runtime: Any,
        name: str,
        function_name: str,
        num_returns: int,
        *,
        code: bytes = b"",
        method: str = "",
        spec: LeaseSpec | None = None,
        max_retries: int = 0,
        max_calls: int = 0,
        retry_on: tuple[str, ...] = (),
        timeout_s: float = 0.0,
        priority: int | None = None,
        group: str = "",
        group_size: int = 0,
        stream: StreamOptions | None = None,
    ) -> None:
        self.runtime = runtime
        self.name = name
        self.function_name = function_name
        self.num_returns = num_returns
        self.code = code
        self.method = method
        self.spec = spec
        self.max_retries = max_retries
        self.max_calls = max_calls
        self.retry_on = retry_on if max_retries else ()
        self.timeout_s = timeout_s
        self.priority = priority
        self.group = group
        self.group_size = group_size
        self.retried = 0
        self.stream = stream
        self.pace_s: float | None = None
        self.classes: dict[Any, Any] = {}  # by nesting, or nesting and node: scheduling classes
        self.place: Any = None
        self.variants: dict[bytes, Bound] = {}

    def template(self, template_id: int, nesting: Nesting) -> Template:
        resources = self.spec.resources if self.spec is not None else {}
        placement_group, captures = (
            (self.spec.strategy.group, self.spec.strategy.capture) if self.spec is not None else (b"", False)
        )
        return Template(
            template_id,
            self.name,
            self.function_name,
            self.num_returns,
            nesting.depth,
            self.code,
            self.method,
            resources,
            self.max_calls,
            self.spec is not None and self.max_retries == 0,
            self.timeout_s,
            list(self.retry_on),
            nesting.settle(self.priority),
            self.group,
            placement_group,
            captures,
        )


class TaskRun:
    """One call that has no result yet.

    Attributes:
        refs: of the results: one ref, or a tuple of them, or None when there are none; or their `Stream`.
        dependencies: refs among the top-level arguments (the last may be the stored arguments themselves).
        keep: what must live until the call has ended: refs inside arguments, the actor's client.
        missing: dependencies that are not ready yet.
        suspect: it may have been what ended a worker, so it is sent alone from now on.
        stage: "arguments" -> "queued" -> "sent" -> "done"; after "sent" also "cancelling" and "killing", and "paused"
            before "queued".
        pauses: how often its worker was ended for lack of memory.
        parent: `Call.started` of the call that submitted it; 0.0 when none did.
    """

    __slots__ = (
        "args",
        "arguments",
        "bound",
        "client",
        "counter",
        "dependencies",
        "keep",
        "kwargs",
        "missing",
        "nesting",
        "packed",
        "parent",
        "pauses",
        "refs",
        "retries",
        "stage",
        "suspect",
    )

    def __init__(self, counter: int, bound: Bound, refs: Any, nesting: Nesting) -> None:
        self.counter = counter
        self.bound = bound
        self.refs = refs
        self.nesting = nesting
        self.args = b""
        self.kwargs = b""
        self.packed = False
        self.dependencies: list[ObjectRef[Any]] | None = None
        self.arguments: list[Argument] | None = None
        self.keep: Any = None
        self.client: Any = None  # of the actor, for a method call
        self.missing = 0
        self.retries = bound.max_retries
        self.pauses = 0
        self.stage = "queued"
        self.suspect = False
        self.parent = 0.0

    def task_id(self) -> TaskId:
        return make_task_id(self.bound.runtime.prefix, self.counter)

    def result_refs(self) -> tuple[ObjectRef[Any], ...]:
        """The refs that the call makes; of a stream only the one that comes next."""
        refs = self.refs
        if refs is None or type(refs) is tuple:
            return refs or ()
        return (refs.tail() if self.bound.stream is not None else refs,)

    def ready(self, _ref: ObjectRef[Any]) -> None:
        """One of the dependencies has become ready."""
        self.missing -= 1
        if self.missing == 0 and self.stage == "arguments":
            self.bound.runtime.arguments_ready(self)
