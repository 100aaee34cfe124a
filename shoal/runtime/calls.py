"""What a worker knows of calls: who sent them, what they call, and their arguments on the way here.

Values only: `executor` receives calls, `execution` runs them, and an actor (`actor_host`) may run them its own way.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from shoal.node.messages import ERROR, INLINE, STORED, ObjectState, Resolved
from shoal.objects.ids import task_prefix
from shoal.objects.loading import add_place
from shoal.objects.serialization import deserialize, serialize
from shoal.rpc.messages import Failed
from shoal.rpc.reactor import Channel
from shoal.runtime.messages import Argument, Introduce, Run, Template
from shoal.runtime.nesting import nest
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.task_run import Placeholder
from shoal.scheduling.resources import is_light

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime
    from shoal.runtime.endings import Ending
    from shoal.runtime.yielding import Production

MAX_DROPPED: Final = 10_000
"""As many as one caller may have sent to an actor."""


class Caller:
    """One owner's connection.

    Attributes:
        dropped: counters of calls that were cancelled before they began, so that they never do.
        flush_due: the reactor will flush what was posted to it; set by any thread, cleared by the reactor just before.
    """

    __slots__ = (
        "channel", "dropped", "flush_due", "handover", "held", "job_id", "node_id", "prefix", "productions", "targets",
        "worker_id",
    )  # fmt: skip

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.worker_id = b""
        self.job_id = b""
        self.node_id = b""
        self.prefix = b""
        self.targets: list[Target] = []  # by template id
        # Refs in results, kept until the owner counts them: by counter (and index of the first, of what was yielded).
        self.handover: dict[int | tuple[int, int], list[Any]] = {}
        self.productions: dict[int, Production] = {}  # by counter: of generators, from before their call until its end
        self.held: dict[str, collections.deque[Call]] = {}  # by concurrency group; see `Executor`
        self.flush_due = False
        self.dropped: dict[int, None] = {}

    def drop(self, counter: int) -> None:
        """Never run this call. The oldest such wish may be forgotten: its owner does not care for the result then."""
        self.dropped[counter] = None
        if len(self.dropped) > MAX_DROPPED:
            del self.dropped[next(iter(self.dropped))]

    def introduce(self, message: Introduce) -> None:
        self.worker_id, self.job_id, self.node_id = message.worker_id, message.job_id, message.node_id
        self.prefix = task_prefix(message.job_id, message.worker_id)


class Target:
    """A template as this worker knows it. `function` is set by whoever runs it first. `light`: its tasks need next to
    nothing. `captured`: the placement group that what its tasks make runs in too, unless told otherwise."""

    __slots__ = (
        "__weakref__", "captured", "function", "light", "max_calls", "nesting", "pace_s", "template", "timed", "told_s",
        "uses",
    )  # fmt: skip

    def __init__(self, template: Template) -> None:
        self.template = template
        self.timed = bool(template.timeout_s)
        self.max_calls = template.max_calls
        self.captured = template.placement_group if template.captures else b""
        self.nesting = nest(template.depth + 1, template.priority, True)  # of what it submits
        self.light = not template.method and is_light(template.resources)
        self.function: Callable[..., Any] | None = None
        self.pace_s: float | None = None
        self.told_s = 0.0  # the pace that the owner knows
        self.uses = 0


class Arrival:
    """The arguments of a call (or of an actor's constructor) on their way to this worker.

    Attributes:
        values: flat bytes of `message.arguments`; None while they are fetched.
        missing: how many are fetched.
        problem: one of them failed or is lost: so does the call.
        fetched: when the fetching of arguments began and ended, on the performance counter; None without any.
    """

    __slots__ = ("fetched", "message", "missing", "problem", "values")

    def __init__(self, message: Run) -> None:
        self.message = message
        self.values: list[Any] = []
        self.missing = 0
        self.problem: ObjectState | None = None
        self.fetched: tuple[float, float] | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Unpickle them. What is not copied (arrays) pins its object until it is dropped."""
        message = self.message
        try:
            if message.arguments:
                return self._with_fetched(message)
            args = deserialize(message.args) if message.args else ()
            return args, deserialize(message.kwargs) if message.kwargs else {}
        except Exception as exc:
            add_place(exc, "the arguments")
            raise

    def _with_fetched(self, message: Run) -> tuple[tuple[Any, ...], dict[str, Any]]:
        values = [deserialize(flat) for flat in self.values]
        if message.packed:
            args, kwargs = values[-1]
        else:
            args = deserialize(message.args) if message.args else ()
            kwargs = deserialize(message.kwargs) if message.kwargs else {}
        args = tuple(values[arg.index] if type(arg) is Placeholder else arg for arg in args)
        kwargs = {key: values[arg.index] if type(arg) is Placeholder else arg for key, arg in kwargs.items()}
        return args, kwargs

    def fetch(self, runtime: CoreRuntime, complete: Callable[[], None]) -> None:
        """Ask for the stored ones; `complete()` once the last has come. On the reactor's thread.

        When nothing is `missing` afterwards, all are here and `complete` is never called.
        """
        for index, argument in enumerate(self.message.arguments):
            if argument.state.state == INLINE:
                self.values.append(argument.state.payload)
                continue
            self.values.append(None)
            self.missing += 1
            if self.fetched is None:
                self.fetched = (time.perf_counter(), 0.0)
            self._fetch_one(runtime, index, argument, complete)

    def _fetch_one(self, runtime: CoreRuntime, index: int, argument: Argument, complete: Callable[[], None]) -> None:
        ref: ObjectRef[Any] = ObjectRef(argument.object_id, argument.home, owned=False)

        def answered(reply: Any) -> None:
            if isinstance(reply, Failed):
                self.problem = ObjectState(ERROR, serialize(runtime.problem_of(ref, reply)).flatten())
            elif isinstance(reply, Resolved) and reply.state.state == STORED:
                self.values[index] = runtime.view_of(ref, reply)
            elif reply.state.state == INLINE:
                self.values[index] = reply.state.payload
            else:
                self.problem = reply.state
            self.missing -= 1
            if self.missing == 0:
                if self.fetched is not None:
                    self.fetched = (self.fetched[0], time.perf_counter())
                complete()

        runtime.fetch(ref, answered)


class Call(Arrival):
    """One call on its way through this worker.

    Attributes:
        started: the performance counter when it began, 0.0 before. No two calls of a process begin at the same time.
        ending: why it is to end before it does so by itself. Set by the reactor's thread only.
        deadline: on the monotonic clock; only for those with `timeout_s`.
    """

    __slots__ = ("caller", "deadline", "ending", "started", "target")

    deadline: float

    def __init__(self, caller: Caller, target: Target, message: Run) -> None:
        # Not by `super()`: a call in itself, a hundred thousand times a second.
        self.message = message
        self.values = []
        self.missing = 0
        self.problem = None
        self.fetched = None
        self.caller = caller
        self.target = target
        self.started = 0.0
        self.ending: Ending | None = None
