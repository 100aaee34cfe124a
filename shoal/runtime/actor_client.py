"""Calling actors: one `Connection` per actor and process, which queues calls until control says where the actor is,
then talks to its worker directly, in order and pipelined.

A handle is counted like a reference: its `Client` holds a ref to a pseudo-object that stands for the actor
(`ids.actor_object_id`), whose home is the agent of the node where the actor was created. When the last one anywhere
goes, that agent tells control, and the actor ends after the calls it has accepted. A call keeps its client, so nothing
that was submitted is lost that way. Handles that were found by name, and those of detached actors, are weak: nobody
counts them.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shoal import exceptions
from shoal.control import messages as control
from shoal.control.messages import FUNCTIONS, ActorInfo, ActorSpec
from shoal.control.names import is_anonymous
from shoal.node.messages import ERROR, INLINE, LOST, ObjectState, WorkerAddress
from shoal.objects.ids import actor_object_id, function_id, new_actor_id
from shoal.objects.serialization import deserialize, serialize
from shoal.rpc.messages import Failed
from shoal.runtime.actor_lines import Lines
from shoal.runtime.interface import ActorRules
from shoal.runtime.link import WorkerLink
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.pending_calls import PendingCalls
from shoal.runtime.retrying import use_retry
from shoal.runtime.task_run import CANCELLED_STAGES, Bound, TaskRun

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime
    from shoal.runtime.interface import ActorTemplate, MethodTemplate

logger = logging.getLogger(__name__)

ASYNC_CONCURRENCY: Final = 1000
"""Calls of an async actor that run at a time, when the class does not say."""
WANTED_ENDS: Final = frozenset({"killed", "exited", "out_of_scope", "job_ended", "group_removed"})
"""Kinds of death that somebody meant."""
MAX_BOUNDS: Final = 1000
"""Methods with their options that are remembered; who makes new options for each call must not fill the memory."""
REDIAL_S: Final = 1.0
LAST_WORDS_S: Final = 1.0
"""How long after the news of an actor's end its connection may take to end too; results may still be on it."""
UNKNOWN_S: Final = 3.0
"""How long control may not know an actor whose handle is here already: its creator's message takes another way."""
UNKNOWN_AGAIN_S: Final = 0.1


class ActorOptions(msgspec.Struct, array_like=True, frozen=True):
    """`ActorSpec.options`: what the worker needs to run the actor. `max_concurrency`, at least 1, is of the calls that
    name none of the concurrency `groups`. `any_order`: calls of one caller may overtake each other."""

    is_async: bool
    max_concurrency: int
    depth: int
    groups: dict[str, int] = {}
    any_order: bool = False


class ActorArguments(msgspec.Struct, array_like=True, frozen=True):
    """`ActorSpec.arguments`: the constructor's arguments as in `messages.Run`."""

    args: bytes
    kwargs: bytes
    arguments: list[Any]
    packed: bool


class Connection:
    """This process's one way to one actor: the order of its calls, and what became of it. Reactor's thread only."""

    def __init__(self, manager: ActorManager, actor_id: bytes, label: str) -> None:
        self._runtime = manager.runtime
        self._actor_id = actor_id
        self.label = label
        self.info = ActorInfo(actor_id, "pending")
        self.pending: PendingCalls | None = None  # when their number is limited
        self._lines = Lines()
        self._link: WorkerLink | None = None
        self._asked = False
        self._unknown_since = 0.0
        self._unsure: list[TaskRun] = []  # sent over a connection that broke: control says what became of the actor

    def set_rules(self, rules: ActorRules) -> None:
        """Any thread."""
        self._lines.main.any_order = rules.any_order
        if rules.max_pending_calls >= 0 and self.pending is None:
            self.pending = PendingCalls(rules.max_pending_calls)

    def enqueue(self, run: TaskRun) -> None:
        """Take its place in the order; it is sent when its arguments and its turn have come."""
        if not self._asked:
            self.watch()
        if self.info.state == "dead":
            self._runtime.fail(run, self._death())
            return
        line = self._lines.of(run) if run.bound.group else self._lines.main
        line.queue.append(run)
        if run.dependencies is None:
            link = self._link
            if link is not None and not link.channel.closed:
                line.send_to(link)

    def follow(self) -> None:
        """Control tells this process of the actor's life without being asked: it has just been created from here."""
        self._asked = True

    def watch(self) -> None:
        """Follow the actor's life."""
        self._asked = True
        self._runtime.mail_control(control.WatchActor(actor_id=self._actor_id), self._watched)

    def _watched(self, reply: Any) -> None:
        if not isinstance(reply, Failed):
            self.update(reply.actor)
            return
        if reply.kind == "closed":
            return  # everything fails at once elsewhere
        now = time.monotonic()
        self._unknown_since = self._unknown_since or now
        if reply.kind == "not_found" and now - self._unknown_since < UNKNOWN_S:
            self._runtime.reactor.call_later(UNKNOWN_AGAIN_S, self.watch)
        else:
            self.update(ActorInfo(self._actor_id, "dead", kind="unknown", cause=reply.text))

    def update(self, info: ActorInfo) -> None:
        """What control says of the actor now."""
        before, self.info = self.info, info
        match info.state:
            case "alive":
                if self._link is None or self._link.address.worker_id != info.worker_id:
                    self._connect(info)
            case "restarting" | "pending":
                if info.incarnation != before.incarnation or before.state == "alive":
                    self._await_last_words()
                else:
                    self._retry_or_fail()
            case "dead":
                self._await_last_words()
                self._fail_unsent()

    def _connect(self, info: ActorInfo) -> None:
        self._lose_link()
        self._retry_or_fail()
        address = WorkerAddress(info.worker_id, info.node_id, info.address, info.socket_path, info.pid)
        self._link = self._runtime.link_to(address)
        self._link.use_for(self)
        self.pump()

    def _await_last_words(self) -> None:
        """The process has ended or is about to: results that it sent are on the connection, which ends after them."""
        link = self._link
        if link is None or link.closed or not link.running:
            self._lose_link()
            self._settle_unsure()
        else:
            self._runtime.reactor.call_later(LAST_WORDS_S, lambda: self._cut_off(link))

    def _cut_off(self, link: WorkerLink) -> None:
        if self._link is link and self.info.state != "alive":
            self._lose_link()
            self._settle_unsure()

    def _lose_link(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self._take_back(link)
            link.close()

    def _take_back(self, link: WorkerLink) -> None:
        self._lines.link_lost()
        self._unsure.extend(link.take_back())

    def _settle_unsure(self) -> None:
        """What becomes of calls whose process is gone, by what control has said of the actor."""
        if self.info.state == "dead":
            self._fail(self._runtime.canceller.without_cancelled(self._unsure))
            self._unsure = []
        elif self.info.state != "alive":
            self._retry_or_fail()

    def _retry_or_fail(self) -> None:
        """Calls that an incarnation took with it: again, in front and in order, if retries allow; else they fail."""
        unsure, self._unsure = self._runtime.canceller.without_cancelled(self._unsure), []
        again = []
        for run in unsure:
            if run.retries == 0:
                text = f"{self.label} ended while {run.bound.name} was on its way or running, and is being restarted"
                self._runtime.fail_with(run, exceptions.ActorUnavailableError(text, self._actor_id.hex()))
                continue
            use_retry(self._runtime, run, f"{self.label} ended")
            run.stage = "queued"
            again.append(run)
        self._lines.again(again)

    def _fail_unsent(self) -> None:
        self._fail(self._lines.take_all())

    def _fail(self, runs: list[TaskRun]) -> None:
        death = self._death() if runs else None
        wanted = self.info.kind in WANTED_ENDS
        for run in runs:
            assert death is not None
            if run.stage == "done":
                continue
            if wanted:
                for ref in run.result_refs():
                    ref.watched = True  # nobody needs to be told of an error that somebody asked for
            self._runtime.finish(run, [death])

    def _death(self) -> ObjectState:
        info = self.info
        cause: exceptions.TaskError | None = None
        if info.error:
            found = deserialize(info.error)
            cause = found.as_raisable() if isinstance(found, exceptions.TaskError) else None
        text = f"{info.class_name or self.label} is dead: {info.cause or info.kind or 'the reason is not known'}"
        if info.kind == "unschedulable":
            return ObjectState(ERROR, serialize(exceptions.ActorUnschedulableError(text)).flatten())
        if info.kind == "group_removed":
            return ObjectState(ERROR, serialize(exceptions.ActorPlacementGroupRemoved(text)).flatten())
        error = exceptions.ActorDiedError(
            text, self._actor_id.hex(), actor_init_failed=info.kind == "init_failed", cause=cause
        )
        return ObjectState(ERROR, serialize(error).flatten())

    def pump(self) -> None:
        """Send calls in order, as long as their arguments are ready and the window allows."""
        link = self._link
        if link is not None and not link.closed:
            self._lines.send_to(link)

    def arguments_ready(self, run: TaskRun) -> None:
        """What the call waited for is here."""
        self._lines.of(run).arguments_ready(run)
        self.pump()

    def withdraw(self, run: TaskRun) -> None:
        """The call has failed before it was sent."""
        if self._lines.of(run).withdraw(run):
            self._runtime.reactor.call_soon(self.pump)

    def queued(self) -> Iterator[TaskRun]:
        """What waits here."""
        return self._lines.waiting()

    def retry(self, run: TaskRun) -> None:
        """User code raised what is to be tried again."""
        self._lines.again([run])
        self.pump()

    def worker_leaves(self) -> None:
        """Control says what becomes of an actor."""

    def run_ended(self, run: TaskRun) -> None:
        line = self._lines.of(run) if run.bound.group else self._lines.main
        if line.alone is run:
            line.alone = None
        if line.queue:
            self.pump()

    def handed_back(self, runs: list[TaskRun]) -> None:
        self._lines.again(runs)
        self.pump()

    def link_closed(self, link: WorkerLink, reason: Exception) -> None:
        if self._link is not link:
            return
        self._link = None
        self._take_back(link)
        logger.debug("lost actor=%s: %s", self._actor_id.hex(), reason)
        if self.info.state != "alive":
            self._settle_unsure()
            return
        # Control hears of the worker's end from its agent. If it was only the connection, dial again.
        self._runtime.reactor.call_later(REDIAL_S, self._redial)

    def _redial(self) -> None:
        if self._link is None and self.info.state == "alive":
            self.watch()

    def why(self, run: TaskRun) -> str:
        """What a call waits for."""
        if run.stage in ("sent", *CANCELLED_STAGES):
            return f"it is running or queued in {self.label} (pid {self.info.pid})"
        if self.info.state == "alive":
            what = "is being connected to" if self._link is None else "is busy with earlier calls"
            return f"{self.label} {what}"
        reason = self.info.reason
        return f"{self.label} is {self.info.state}" + (f": {reason.text}" if reason is not None else "")


class Client:
    """What handles hold. A counted one keeps the actor by its `ref`, a weak one does not; both share a connection.

    A call keeps the client that it was made with, so that an actor ends after all that was submitted to it.
    """

    def __init__(
        self, manager: ActorManager, connection: Connection, actor_id: bytes, ref: ObjectRef[Any] | None
    ) -> None:
        self._manager = manager
        self._connection = connection
        self._actor_id = actor_id
        self.ref = ref  # None: weak
        self.pending: PendingCalls | None = None  # told of each end of a call, when their number is limited
        # What a call asks of its client is the connection's matter.
        self.enqueue = connection.enqueue
        self.pump = connection.pump
        self.arguments_ready = connection.arguments_ready
        self.withdraw = connection.withdraw
        self.why = connection.why

    @property
    def actor_id(self) -> bytes:
        return self._actor_id

    @property
    def weak(self) -> bool:
        return self.ref is None

    def location(self) -> tuple[bytes, bytes, bool]:
        return self._actor_id, self.ref.home if self.ref is not None else b"", self.ref is None

    def set_rules(self, rules: ActorRules) -> None:
        self._connection.set_rules(rules)
        self.pending = self._connection.pending
        if self.pending is not None:
            self.call = self._call_limited  # type: ignore[method-assign]  # costs nothing where there is no limit

    def call(self, method: MethodTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        manager = self._manager
        bound = method.bound
        if bound is None or bound.runtime is not manager.runtime:
            bound = manager.bind_method(method)
        return manager.runtime.submit_call(self, bound, args, kwargs)

    def _call_limited(self, method: MethodTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pending = self.pending
        assert pending is not None
        if not pending.begin():
            text = f"{method.label}.remote(): {pending.limit} calls of this process to {self._connection.label} are"
            raise exceptions.PendingCallsLimitExceeded(f"{text} pending (max_pending_calls); get some results first")
        try:
            return Client.call(self, method, args, kwargs)
        except BaseException:  # it was not submitted
            pending.end()
            raise


class ActorManager:
    """All actors that this process knows."""

    def __init__(self, runtime: CoreRuntime) -> None:
        self.runtime = runtime
        self._bounds: dict[MethodTemplate, Bound] = {}
        self._connections: weakref.WeakValueDictionary[bytes, Connection] = weakref.WeakValueDictionary()
        self._counted: weakref.WeakValueDictionary[bytes, Client] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()
        self._shipped: set[bytes] = set()
        self._arguments: dict[bytes, Any] = {}  # by actor: what its constructor needs, or may need again

    def create(self, template: ActorTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Client, bytes]:
        """In a user's thread. A named actor is settled with control at once, since its name may be taken."""
        runtime = self.runtime
        bound = template.bound
        if bound is None or bound[0] is not runtime:
            bound = template.bound = self._bind(template)
        _, class_id, blob = bound
        actor_id = bytes(new_actor_id(runtime.job_id))  # type: ignore[arg-type]
        constructor = Bound(runtime, f"{template.cls.__name__}.__init__", template.cls.__qualname__, 0)
        run = TaskRun(0, constructor, None, runtime.nesting)
        if args or kwargs:
            runtime.pack(run, args, kwargs)
        detached = template.detached
        if detached is None:
            detached = runtime.job.default_lifetime == "detached"
        if detached and template.name and template.namespace is None and is_anonymous(runtime.job.namespace):
            logger.warning(
                "the detached actor %r is in the namespace of this program, which has no name: no other program will "
                "find it there; give namespace=... to init() or to the actor",
                template.name,
            )
        strategy = runtime.inherited if template.inherits else template.strategy
        # In a group, an actor that asks for nothing needs no free CPU to be placed: that is to spread over the cluster.
        placement = template.resources if strategy.group else template.placement
        concurrency = template.max_concurrency or (ASYNC_CONCURRENCY if template.is_async else 1)
        spec = ActorSpec(
            actor_id, runtime.job_id, runtime.worker_id, runtime.node_id, template.cls.__name__, class_id, b"",
            template.resources, placement, strategy, template.name or "",
            runtime.job.namespace if template.namespace is None else template.namespace, detached,
            template.max_restarts, template.max_task_retries, concurrency, template.env_vars, template.handle,
            msgspec.msgpack.encode(
                ActorOptions(
                    template.is_async, concurrency, runtime.nesting.depth, template.groups, template.rules.any_order
                )
            ),
            runtime.nesting.settle(template.priority),
        )  # fmt: skip
        client = self._own(actor_id, template.cls.__name__, weak=detached)
        creation = _Creation(self, client, spec, run, blob)
        if not template.name:
            runtime.reactor.call_soon(creation.begin)
            return client, template.handle
        answer = creation.settle_name(template.get_if_exists)
        if answer.actor_id != actor_id:
            return self.borrow(answer.actor_id, b"", weak=True), answer.handle
        return client, template.handle

    def _bind(self, template: ActorTemplate) -> tuple[CoreRuntime, bytes, bytes]:
        blob = self.runtime.pack_code(template.cls, f"the class {template.cls.__name__}")
        return self.runtime, bytes(function_id(blob)), blob

    def bind_method(self, method: MethodTemplate) -> Bound:
        """What all calls of this method share; methods of all actors of a class are equal."""
        bound = self._bounds.get(method)
        if bound is None:
            if len(self._bounds) >= MAX_BOUNDS:
                self._bounds.clear()
            bound = self._bounds[method] = Bound(
                self.runtime, method.label, method.label, method.num_returns, method=method.name,
                max_retries=method.max_task_retries, retry_on=method.retry_on, timeout_s=method.timeout_s,
                group=method.group, group_size=method.group_size, stream=method.stream,
            )  # fmt: skip
        method.bound = bound
        return bound

    def queued(self) -> Iterator[TaskRun]:
        """Calls that wait for an actor."""
        return itertools.chain.from_iterable(one.queued() for one in list(self._connections.values()))

    def _connect(self, actor_id: bytes, label: str) -> Connection:
        connection = self._connections.get(actor_id)
        if connection is None:
            connection = self._connections[actor_id] = Connection(self, actor_id, label)
        return connection

    def _own(self, actor_id: bytes, label: str, *, weak: bool) -> Client:
        """This process makes the actor: its node counts the handles."""
        runtime = self.runtime
        with self._lock:
            connection = self._connect(actor_id, label)
            connection.follow()
            if weak:
                return Client(self, connection, actor_id, None)
            ref: ObjectRef[Any] = ObjectRef(actor_object_id(actor_id), runtime.node_id)  # type: ignore[arg-type]
            ref.state = INLINE
            client = self._counted[actor_id] = Client(self, connection, actor_id, ref)
        runtime.reactor.call_soon(runtime.publish, ref)
        return client

    def ship_class(self, class_id: bytes, blob: bytes) -> None:
        """Control keeps each class once."""
        if class_id not in self._shipped:
            self._shipped.add(class_id)
            self.runtime.mail_control(
                control.PutKey(space=FUNCTIONS, key=class_id, value=blob, overwrite=False), self._class_shipped
            )

    def _class_shipped(self, reply: Any) -> None:
        if isinstance(reply, Failed):
            logger.error("control did not take an actor's class: %s", reply.text)

    def borrow(self, actor_id: bytes, home: bytes, weak: bool) -> Client:
        """The client of an actor that somebody else made (or this process, if it comes back). Any thread."""
        with self._lock:
            client = None if weak else self._counted.get(actor_id)
            if client is None:
                connection = self._connect(actor_id, "actor")
                if weak:
                    return Client(self, connection, actor_id, None)
                ref = self.runtime.borrow(actor_object_id(actor_id), home)  # type: ignore[arg-type]
                client = self._counted[actor_id] = Client(self, connection, actor_id, ref)
        return client

    def keep_arguments(self, actor_id: bytes, kept: Any) -> None:
        """They live until the constructor has run for the last time, even when no handle is left in this process."""
        self._arguments[actor_id] = kept

    def update(self, info: ActorInfo) -> None:
        """Control's news of an actor that this process follows."""
        actor_id = info.actor_id
        if info.state == "dead" or (info.state == "alive" and not info.max_restarts):
            self._arguments.pop(actor_id, None)
        connection = self._connections.get(actor_id)
        if connection is not None:
            connection.update(info)
        elif info.state != "dead" and actor_id not in self._arguments:
            self.runtime.tell_control(control.UnwatchActor(actor_id))


class _Creation:
    """An actor on its way to control, which knows it from the start: its name, its owner, and that it waits when the
    constructor's arguments are not ready. They follow once they are."""

    pending: Final = None  # as of a client, which it takes the place of

    def __init__(self, manager: ActorManager, client: Client, spec: ActorSpec, run: TaskRun, blob: bytes) -> None:
        self._manager = manager
        self._runtime = manager.runtime
        self._client = client  # keeps the actor until control knows it
        self._spec = spec
        self._run = run
        self._blob = blob
        self._get_if_exists = False
        self._announced = False
        self._answered: Callable[[Any], None] | None = None

    def begin(self) -> None:
        """On the reactor's thread."""
        runtime, run = self._runtime, self._run
        self._manager.ship_class(self._spec.class_id, self._blob)
        if run.keep:
            runtime.publish_all(run.keep)
        if run.keep or run.dependencies:
            self._manager.keep_arguments(self._spec.actor_id, (run.keep, run.dependencies))
        run.client = self  # until the arguments are settled: a circle would keep the actor
        ready = run.dependencies is None or runtime.settle_dependencies(run)
        if ready:
            run.client = None
        spec = msgspec.structs.replace(self._spec, arguments=self._packed()) if ready else self._spec
        request = control.CreateActor(spec=spec, get_if_exists=self._get_if_exists, unready=not ready)
        runtime.mail_control(request, self._created)
        self._announced = True
        if run.stage == "done":
            self._tell_failure()  # an argument had failed already

    def _packed(self) -> bytes:
        run = self._run
        return msgspec.msgpack.encode(ActorArguments(run.args, run.kwargs, run.arguments or [], run.packed))

    def arguments_ready(self, _run: TaskRun) -> None:
        """The last argument is ready (the runtime calls this as it would a client's)."""
        self._run.client = None
        self._runtime.tell_control(control.ProvideArguments(self._spec.actor_id, self._packed()))

    def withdraw(self, run: TaskRun) -> None:
        """An argument failed: the actor will never be."""
        self._run.client = None
        if self._announced:
            self._tell_failure()

    def _tell_failure(self) -> None:
        runtime = self._runtime
        failed = next(ref for ref in self._run.dependencies or () if ref.state in (ERROR, LOST))
        error = runtime.error_of(failed)
        text = f"an argument of its constructor failed: {error}"
        packed = failed.value if failed.state == ERROR else serialize(error).flatten()
        runtime.tell_control(control.ProvideArguments(self._spec.actor_id, error=packed, text=text))

    def _created(self, reply: Any) -> None:
        if self._answered is not None:
            self._answered(reply)
        if isinstance(reply, Failed):
            self._manager.update(ActorInfo(self._spec.actor_id, "dead", kind=reply.kind, cause=reply.text))
        elif reply.actor.actor_id == self._spec.actor_id:
            self._manager.update(reply.actor)
        else:  # somebody has the name, and is shared: this one never was
            self._manager.update(ActorInfo(self._spec.actor_id, "dead", kind="unknown", cause="its name was taken"))

    def settle_name(self, get_if_exists: bool) -> ActorInfo:
        """In a user's thread: create it, or learn who has the name.

        Raises:
            ActorAlreadyExistsError, ShoalSystemError.
        """
        self._get_if_exists = get_if_exists
        box: list[Any] = []
        lock = threading.Lock()
        lock.acquire()

        def answered(reply: Any) -> None:
            box.append(reply)
            lock.release()

        self._answered = answered
        self._runtime.reactor.call_soon(self.begin)
        lock.acquire()
        reply = box[0]
        if isinstance(reply, Failed):
            if reply.kind == "name_taken":
                raise exceptions.ActorAlreadyExistsError(reply.text)
            raise exceptions.ShoalSystemError(f"cannot create the actor {self._spec.name!r}: {reply.text}")
        actor: ActorInfo = reply.actor
        return actor
