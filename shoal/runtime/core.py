"""The runtime of a driver or worker inside a cluster: submits calls, and takes in what comes of them.

The layers below, and who owns what between the two threads: see `connection.py`.
"""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from shoal import exceptions
from shoal.node.messages import (
    ERROR,
    INLINE,
    LOST,
    PENDING,
    STORED,
    LeaseSpec,
    ObjectState,
    ProcessRegistered,
    Publish,
    WorkerAddress,
    WorkerExit,
)
from shoal.objects.serialization import serialize, with_serializers
from shoal.runtime.actor_client import ActorManager, Client
from shoal.runtime.arrivals import Arrivals
from shoal.runtime.cancelling import Canceller
from shoal.runtime.connection import LEFT
from shoal.runtime.groups import GroupManager
from shoal.runtime.leases import TaskManager
from shoal.runtime.link import WorkerLink
from shoal.runtime.messages import Argument
from shoal.runtime.nesting import OUTERMOST
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.references import INLINE_BYTES, error_state
from shoal.runtime.repeated_arguments import RepeatedArguments
from shoal.runtime.retrying import names_of
from shoal.runtime.streams import Readers, Stream
from shoal.runtime.task_run import CANCELLED_STAGES, Bound, Placeholder, TaskRun
from shoal.runtime.waiting import Waiting
from shoal.scheduling.views import Strategy

if TYPE_CHECKING:
    from shoal.runtime.interface import ActorTemplate, StreamOptions, TaskTemplate

__all__ = ["INLINE_BYTES", "CoreRuntime"]

logger = logging.getLogger(__name__)

MAX_CODE_BYTES: Final = 100 << 20
"""Code travels to each worker once for each connection and is kept there: a value belongs into the store."""
LARGE_CODE_BYTES: Final = 10 << 20
MAX_VARIANTS: Final = 64
"""Of one function, for the placement groups that its tasks inherit."""
MOST_INLINE_BYTES: Final = 1 << 20
"""Of all referenced arguments of one call; beyond that the worker reads those over `SMALL_ARGUMENT_BYTES` itself."""
SMALL_ARGUMENT_BYTES: Final = 100
_FIRST: Final = (1).to_bytes(4, "little")


class CoreRuntime(Waiting):
    """See the module. `start` fills it; `shutdown` empties it.

    Attributes:
        nesting: of the calls that are submitted from here.
        inherited: the strategy of tasks and actors that are given none: that of a placement group, while code runs that
            captures what it makes. One instance for each group, so that a comparison of identities tells.
        leave_actor: what `exit_actor()` does; None outside of an actor.
        find_parent: `Call.started` of the call that the calling code belongs to; None in a driver.
    """

    def __init__(self, *, worker_id: bytes, token: bytes, is_driver: bool, name: str) -> None:
        super().__init__(worker_id=worker_id, token=token, is_driver=is_driver, name=name)
        self.nesting = OUTERMOST
        self.inherited = Strategy()
        self._inheritable = {b"": self.inherited}
        self.leave_actor: Callable[[], None] | None = None
        self.find_parent: Callable[[], float] | None = None
        self.canceller = Canceller(self)
        self.tasks: TaskManager
        self.actors = ActorManager(self)
        self.on_actor_update = self.actors.update
        self.on_cancel_call = self.canceller.asked
        self.groups = GroupManager(self)
        self.on_group_changed = self.groups.heard
        self.on_lease_message = lambda message: self.tasks.from_agent(self.tasks.local, message)
        self._submitted: collections.deque[TaskRun] = collections.deque()
        self._repeated = RepeatedArguments()
        self._draining = False
        self._drain_call = (self.drain, ())
        self._links: dict[bytes, WorkerLink] = {}
        self.readers = Readers(self)

    def take_registration(self, answer: ProcessRegistered) -> None:
        super().take_registration(answer)
        self.tasks = TaskManager(self)

    def close_channels(self) -> None:
        for link in list(self._links.values()):
            link.close()
        self.readers.close()
        super().close_channels()

    def forget_in_child(self) -> None:
        super().forget_in_child()
        self.readers.silence()

    # ------------------------------------------------------------------------------------------------- submitting

    def inherit(self, group: bytes) -> None:
        """Code begins to run that captures what it makes in this placement group (b"": in none)."""
        found = self._inheritable.get(group)
        if found is None:
            found = self._inheritable[group] = Strategy("group", group=group, capture=True)
        self.inherited = found

    def bind(self, template: TaskTemplate) -> Bound:
        """Pickle the function once per template.

        Raises:
            UnserializableError; ValueError when the code is too large.
        """
        known: Bound | None = template.bound
        if known is not None and known.runtime is not self:
            known = None
        strategy = self.inherited if template.inherits else template.strategy
        variants = known.variants if known is not None else {}
        variant = variants.get(strategy.group)
        if variant is not None:
            variant.place = self.inherited
            template.bound = variant
            return variant
        function = template.function
        name = getattr(function, "__qualname__", None) or template.name
        code = known.code if known is not None else self.pack_code(function, f"the function {template.name}")
        bound = Bound(
            self,
            template.name,
            f"{getattr(function, '__module__', '')}.{name}",
            template.num_returns,
            code=code,
            spec=LeaseSpec(
                self.job_id,
                template.resources,
                template.name,
                strategy=strategy,
                env_vars=template.env_vars,
                retriable=template.max_retries != 0,
            ),
            max_retries=template.max_retries,
            max_calls=template.max_calls or (1 if template.resources.get("GPU") else 0),
            retry_on=names_of(template.retry_exceptions),
            timeout_s=template.timeout_s,
            priority=template.priority,
            stream=template.stream,
        )
        if len(variants) >= MAX_VARIANTS:
            variants.clear()
        variants[strategy.group] = bound
        bound.place, bound.variants = self.inherited, variants
        template.bound = bound
        return bound

    def pack_code(self, code: Any, what: str) -> bytes:
        """A function or class, flat. What it refers to is kept for good: code may be run at any time."""
        packed = serialize(with_serializers(code), what=what)
        size = packed.flat_size
        if size > LARGE_CODE_BYTES:
            why = "because of what it refers to; put() that and pass the reference"
            text = f"{what} is {size >> 20} MiB large when pickled, {why}"
            if size > MAX_CODE_BYTES:
                raise ValueError(f"{text} (at most {MAX_CODE_BYTES >> 20} MiB)")
            logger.warning("%s", text)
        self.keep_for_good(self.contained_refs(packed))
        return packed.flatten()

    def submit_task(self, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = template.bound
        if bound is None or bound.place is not self.inherited:
            bound = self.bind(template)
        counter = next(self.counter)
        if bound.num_returns == 1:
            refs: Any = ObjectRef(self.prefix + counter.to_bytes(8, "little") + _FIRST, self.node_id)
            run = TaskRun(counter, bound, refs, self.nesting)
        elif bound.stream is not None:
            refs, run = self._make_stream(counter, bound, bound.stream)
        else:
            refs = self._make_refs(counter, bound.num_returns)
            run = TaskRun(counter, bound, refs and tuple(refs), self.nesting)  # the list is the user's to change
        if args or kwargs:
            self.pack(run, args, kwargs)
        self.submit(run)
        return refs

    def submit_call(self, client: Client, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method call; in order after those that this process submitted to the actor before."""
        counter = next(self.counter)
        if bound.num_returns == 1:
            refs: Any = ObjectRef(self.prefix + counter.to_bytes(8, "little") + _FIRST, self.node_id)
            run = TaskRun(counter, bound, refs, self.nesting)
        elif bound.stream is not None:
            refs, run = self._make_stream(counter, bound, bound.stream)
        else:
            refs = self._make_refs(counter, bound.num_returns)
            run = TaskRun(counter, bound, refs and tuple(refs), self.nesting)  # the list is the user's to change
        run.client = client
        if args or kwargs:
            self.pack(run, args, kwargs)
        self.submit(run)
        return refs

    def submit(self, run: TaskRun) -> None:
        """Hand the call to the reactor. If this process is interrupted before the append, nothing has happened."""
        if self.closed:
            self._refuse(run)
        if self.find_parent is not None:
            run.parent = self.find_parent()
        refs = run.refs
        if type(refs) is ObjectRef:
            refs.task = run
        elif type(refs) is Stream:
            refs.begin(run)
        elif refs is not None:
            for ref in refs:
                ref.task = run
        self._submitted.append(run)
        reactor = self.reactor
        if not self._draining:
            # Python looks at signals after calls and where functions begin. None of that comes between this flag and
            # the C function that makes it true, so no Ctrl-C leaves a flag behind for which nothing will be done.
            self._draining = True
            reactor.calls.append(self._drain_call)
        if not reactor.awake:
            reactor.wake()

    def _make_stream(self, counter: int, bound: Bound, options: StreamOptions) -> tuple[Any, TaskRun]:
        stream = Stream(self, counter, options)
        reader = stream.completed if stream.dynamic else self.readers.open(stream)
        return reader, TaskRun(counter, bound, stream, self.nesting)

    def _refuse(self, run: TaskRun) -> NoReturn:
        if run.client is not None and self.closed == LEFT:
            text = f"{run.bound.name}.remote(): the handle is of a session that has ended ({LEFT})"
            raise exceptions.ActorHandleNotFoundError(f"{text}; make the actor, or look it up, in this one")
        raise exceptions.LocalAgentDiedError(self.closed)

    def new_promise(self, bound: Bound, keeper: Any) -> ObjectRef[Any]:
        """A ref to what no task makes: the `keeper` finishes its run, and says why one waits. Any thread."""
        run = TaskRun(next(self.counter), bound, None, self.nesting)
        run.client = keeper
        ref: ObjectRef[Any] = ObjectRef(self.prefix + run.counter.to_bytes(8, "little") + _FIRST, self.node_id)
        run.refs, ref.task = ref, run
        return ref

    def _make_refs(self, counter: int, count: int) -> list[ObjectRef[Any]] | None:
        if count == 0:
            return None
        base = self.prefix + counter.to_bytes(8, "little")
        return [ObjectRef(base + (index + 1).to_bytes(4, "little"), self.node_id) for index in range(count)]

    def pack(self, run: TaskRun, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Serialize the arguments into the run; references at the top level become dependencies."""
        dependencies: list[ObjectRef[Any]] = []
        for value in itertools.chain(args, kwargs.values()):
            if type(value) is ObjectRef:
                places: dict[bytes, Placeholder] = {}
                args = tuple(_place(value, dependencies, places) for value in args)
                kwargs = {key: _place(value, dependencies, places) for key, value in kwargs.items()}
                break
        try:
            packed_args = serialize(args) if args else None
            packed_kwargs = serialize(kwargs) if kwargs else None
            size = (packed_args.flat_size if packed_args else 0) + (packed_kwargs.flat_size if packed_kwargs else 0)
            both = serialize((args, kwargs)) if size > INLINE_BYTES else None
        except exceptions.UnserializableError:
            _blame_argument(run.bound.name, args, kwargs)
            raise
        if both is not None:
            advice = self._repeated.look(run.bound.name, both)
            if advice:
                logger.warning("%s", advice)
            stored = self.put_serialized(both)
            run.packed = True
            dependencies.append(stored)
        else:
            if packed_args is not None:
                run.args = packed_args.flatten()
                if packed_args.refs:
                    run.keep = self.contained_refs(packed_args)
            if packed_kwargs is not None:
                run.kwargs = packed_kwargs.flatten()
                if packed_kwargs.refs:
                    run.keep = [*(run.keep or ()), *self.contained_refs(packed_kwargs)]
        if dependencies:
            run.dependencies = dependencies

    def drain(self) -> None:
        """Take in what users' threads have submitted. Reactor's thread only, like all that follows."""
        self._draining = False
        submitted = self._submitted
        for _ in range(len(submitted)):
            run = submitted.popleft()
            if self.closed:
                self.fail_with(run, exceptions.LocalAgentDiedError(self.closed))
                continue
            if run.keep:
                self.publish_all(run.keep)
            client = run.client
            if client is not None:
                client.enqueue(run)
            if run.dependencies is not None and not self.settle_dependencies(run):
                continue
            if client is None:
                self.tasks.submit(run)
            elif run.dependencies is not None:
                client.pump()  # they were ready already: nothing else would send the call

    def settle_dependencies(self, run: TaskRun) -> bool:
        """True when all are ready; otherwise `arguments_ready(run)` is called when they are."""
        run.stage = "arguments"
        run.missing = 1  # so that none that becomes ready in here is the last
        for ref in run.dependencies or ():
            if ref.state == PENDING:
                run.missing += 1
                self.watch(ref, run)
        run.missing -= 1
        if run.missing and run.client is None:
            self.canceller.blocked.add(run)
        return run.missing == 0 and self._fill_arguments(run)

    def arguments_ready(self, run: TaskRun) -> None:
        self.canceller.blocked.discard(run)
        if self._fill_arguments(run):
            if run.client is not None:
                run.client.arguments_ready(run)
            else:
                self.tasks.submit(run)

    def _fill_arguments(self, run: TaskRun) -> bool:
        """Copy what is known of the dependencies into the run; False when one failed, and with it the call."""
        arguments = []
        inline_bytes = 0
        for ref in run.dependencies or ():
            state = ref.state
            if state == INLINE:
                inline_bytes += len(ref.value)
                if inline_bytes > MOST_INLINE_BYTES and len(ref.value) > SMALL_ARGUMENT_BYTES:
                    self.publish(ref)
                    arguments.append(Argument(ref.binary(), ref.home, ObjectState(PENDING)))
                    continue
            elif state in (ERROR, LOST):
                self.seen(ref)
                self.fail(run, self.state_of(ref))
                return False
            arguments.append(Argument(ref.binary(), ref.home, self.state_of(ref)))
        run.arguments = arguments
        run.stage = "queued"
        return True

    def arrivals(self) -> Arrivals:
        return Arrivals(self)

    # ---------------------------------------------------------------------------------------------------- results

    def finish_inline(self, run: TaskRun, payload: bytes) -> None:
        """The usual end: one small value."""
        run.stage = "done"
        if run.client is not None and run.client.pending is not None:
            run.client.pending.end()
        ref = run.refs
        if type(ref) is not ObjectRef:  # no result wanted, or the worker speaks of another number of them
            return
        ref.task = None
        ref.value = payload
        ref.state = INLINE
        if ref.published:
            self.agent.send(Publish(ref.binary(), ObjectState(INLINE, payload)))
        if ref.waiters is not None:
            self.wake(ref)

    def finish(self, run: TaskRun, results: list[ObjectState]) -> None:
        run.stage = "done"
        if run.client is not None and run.client.pending is not None:
            run.client.pending.end()
        if run.bound.stream is not None:
            run.refs.finish(results[0])
            return
        refs = run.result_refs()
        if len(results) == 1 and len(refs) != 1:
            results = results * len(refs)  # one error for all
        for ref, state in zip(refs, results, strict=True):
            ref.task = None
            self.learn(ref, state)

    def fail(self, run: TaskRun, state: ObjectState) -> None:
        """The call will not run (again): every result is this error."""
        if run.stage == "done":
            return
        if run.client is not None:
            run.client.withdraw(run)
        self.finish(run, [state])

    def fail_with(self, run: TaskRun, error: Exception) -> None:
        self.fail(run, error_state(error))

    def fail_crashed(self, run: TaskRun, exit: WorkerExit, where: WorkerAddress) -> None:
        text = (
            f"{run.bound.name} was running on pid {where.pid}, node {where.node_id.hex()[:12]}, when its worker ended"
        )
        if exit.cause:
            text += f": {exit.cause}"
        if exit.out_of_memory:
            self.fail_with(run, exceptions.OutOfMemoryError(text))
            return
        code = None if exit.signal or not exit.code else exit.code
        self.fail_with(run, exceptions.WorkerCrashedError(text, code, exit.signal or None, exit.tail))

    def cancel(self, ref: ObjectRef[Any], *, force: bool, recursive: bool) -> None:
        """See `cancelling`. By a user's thread.

        Raises:
            ValueError: `force` for a call of an actor.
        """
        run = ref.task
        if force and run is not None and run.client is not None:
            raise ValueError(
                f"force=True ends the worker process, and that of {run.bound.name} is an actor, which others may use; "
                "cancel the call without it, or end the actor with kill()"
            )
        self.reactor.call_soon(self.canceller.cancel, ref, force, recursive)

    # ------------------------------------------------------------------------------------------- why one waits

    def why(self, ref: ObjectRef[Any]) -> str:
        run = ref.task
        if run is None:
            if ref.state == STORED:
                return "its value is being fetched"
            return "its owner has not made it yet" if not ref.owned else "nothing makes it any more"
        if run.stage == "arguments":
            missing = [dep for dep in run.dependencies or () if dep.state == PENDING]
            if not missing:
                return "its arguments are being read"
            inner = f"{self.what(missing[0])}: {self.why(missing[0])}"
            return f"{len(missing)} of its arguments are not ready, the first of which is {inner}"
        if run.client is not None:
            return str(run.client.why(run))
        if run.stage == "paused":
            return "it was ended because memory was short, and is tried again in a while"
        if run.stage in ("sent", *CANCELLED_STAGES):
            return "it is running"
        reason = self.tasks.class_of(run).reason
        return reason.text if reason is not None else "a worker is being started for it"

    # ---------------------------------------------------------------------------------------------- links, actors

    def links(self) -> Collection[WorkerLink]:
        return self._links.values()

    def link_to(self, address: WorkerAddress) -> WorkerLink:
        link = self._links.get(address.worker_id)
        if link is None or link.closed:
            link = self._links[address.worker_id] = WorkerLink(self, address, None)
        return link

    def forget_link(self, link: WorkerLink) -> None:
        if self._links.get(link.address.worker_id) is link:
            del self._links[link.address.worker_id]

    def create_actor(
        self, template: ActorTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Client, bytes]:
        self.check_open()
        return self.actors.create(template, args, kwargs)

    def borrow_actor(self, actor_id: bytes, home: bytes, weak: bool = False) -> Client:
        return self.actors.borrow(actor_id, home, weak)

    def exit_actor(self) -> None:
        if self.leave_actor is None:
            raise RuntimeError("exit_actor() works only inside an actor")
        self.leave_actor()


def _place(value: Any, dependencies: list[ObjectRef[Any]], places: dict[bytes, Placeholder]) -> Any:
    """The placeholder for a reference; the same reference is one dependency, however often it is passed."""
    if type(value) is not ObjectRef:
        return value
    place = places.get(value.binary())
    if place is None:
        place = places[value.binary()] = Placeholder(len(dependencies))
        dependencies.append(value)
    return place


def _blame_argument(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises: UnserializableError that names the argument. Returns when each alone can be pickled."""
    for index, value in enumerate(args):
        serialize(value, f"argument {index} of {name}")
    for key, value in kwargs.items():
        serialize(value, f"argument {key!r} of {name}")
