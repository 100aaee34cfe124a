"""What owners and workers say to each other directly. Tasks are named by their owner's counter on that connection."""

from __future__ import annotations

from typing import Final

from shoal.node.messages import ObjectState
from shoal.rpc.messages import Message

STREAMED: Final = -1
"""`num_returns` of a call whose results come one by one, as `Yielded`. Then `Ended` has the state of the whole call:
INLINE (None), or the ERROR that comes after the last item."""


class Introduce(Message, frozen=True, tag=300):
    """First message of an owner on a connection to a worker: who it is, and where references to its objects are
    counted."""

    worker_id: bytes
    job_id: bytes
    node_id: bytes


class Template(Message, frozen=True, tag=301):
    """What calls with this `template_id` on this connection have in common. `code`: flat pickled function; empty for a
    method of the actor that lives there, named `method`. `once`: a call must not run twice, so its owner must know
    which one was running when the worker crashes: no result is held back before or after it. `timeout_s`: how long a
    call may run, 0.0 for ever. `retry_on`: errors that are tried again (`retrying.names_of`).
    `priority`: of what the call submits, unless that says otherwise. `group`: of a method: the concurrency group that
    runs it, empty for the default one."""

    template_id: int
    name: str  # of the task, for people
    function_name: str
    num_returns: int
    depth: int = 0
    code: bytes = b""
    method: str = ""
    resources: dict[str, int] = {}
    max_calls: int = 0
    once: bool = False
    timeout_s: float = 0.0
    retry_on: list[str] = []
    priority: int = 0
    group: str = ""
    placement_group: bytes = b""  # that tasks run in; `captures`: what they make runs there too
    captures: bool = False


class Argument(Message, frozen=True, tag=302):
    """A top-level argument that was a reference: INLINE comes with its value, STORED is read by the worker itself."""

    object_id: bytes
    home: bytes
    state: ObjectState


class Run(Message, frozen=True, tag=303):
    """Call it. `args`, `kwargs`: flat serialized tuple and dict, empty for none; references at the top level were
    replaced by `Placeholder`s into `arguments`. With `packed`, both are in the stored object `arguments[-1]` as one
    tuple."""

    template_id: int
    counter: int
    args: bytes = b""
    kwargs: bytes = b""
    arguments: list[Argument] = []
    packed: bool = False


class Finished(Message, frozen=True, tag=304):
    """One result that is small: the usual case."""

    counter: int
    payload: bytes


class Ended(Message, frozen=True, tag=305):
    """Results in order (1..num_returns), or one ERROR that holds for all. `handover`: the worker keeps what the results
    contain alive until it hears `Taken`. `leaving`: the worker ends on purpose; what else was sent to it has not begun.
    `retry`: not empty when `retry_on` covers the error: what it is, in a line."""

    counter: int
    results: list[ObjectState]
    handover: bool = False
    leaving: bool = False
    retry: str = ""


class Pace(Message, frozen=True, tag=306):
    """How long calls of this template take here, in seconds, smoothed; sent when first known and when it changes
    much."""

    template_id: int
    seconds: float


class HandedBack(Message, frozen=True, tag=307):
    """Not started, and would wait behind one that blocks or runs long: run them elsewhere."""

    counters: list[int]


class Taken(Message, frozen=True, tag=308):
    """The owner has registered its use of what the results of this task contain, or the items of its `Yielded` that
    began with the index `first`."""

    counter: int
    first: int = 0


class Cancel(Message, frozen=True, tag=309):
    """Drop the call if it has not begun, else interrupt it; `force`: by ending the process. `recursive`: and cancel
    what it submitted. Answered by the call's `Ended` or `Finished`, unless that is on its way already."""

    counter: int
    force: bool = False
    recursive: bool = True


class BeginStream(Message, frozen=True, tag=320):
    """Comes before the `Run` of a call that is `STREAMED`.

    Attributes:
        have: items that the owner has already, from a worker that is gone: they are not sent again.
        consumed: how many of all were taken. limit: the producer pauses while as many are not taken; 0: it does not.
        stopped: nobody reads; close the generator once it has begun.
        per_yield: what it yields are tuples or lists of so many items.
    """

    counter: int
    have: int
    consumed: int
    stopped: bool
    limit: int
    per_yield: int


class Consumed(Message, frozen=True, tag=321):
    """So many items of a stream were taken by now."""

    counter: int
    count: int


class StopStream(Message, frozen=True, tag=322):
    """Nobody reads the stream any more: close its generator."""

    counter: int


class Arrived(Message, frozen=True, tag=323):
    """Answers a `Yielded` that asked for it: it was taken in."""

    counter: int


class Yielded(Message, frozen=True, tag=324):
    """Items of a stream, the first of which has the index `first` (from 1 on). `handover`: as in `Ended`, until the
    `Taken` with this `first`. `answer`: say `Arrived`; so a fast producer does not outrun its owner by more than a few
    of these."""

    counter: int
    first: int
    states: list[ObjectState]
    handover: bool = False
    answer: bool = False


ToWorker = Introduce | Template | Run | Taken | Cancel | BeginStream | Consumed | StopStream | Arrived
ToOwner = Finished | Ended | Pace | HandedBack | Yielded
