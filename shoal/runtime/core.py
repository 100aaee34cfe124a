"""The runtime of a driver or worker inside a cluster: submitting, owning, waiting.

Two threads meet here. The user's threads make ids, serialize, and append what they want to deques; the reactor's thread
owns everything else: objects' states, scheduling classes, actors, connections. A method that belongs to users' threads says
so by being part of the `Runtime` protocol; all others are the reactor's.
"""

from __future__ import annotations

import collections
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shoal import exceptions
from shoal.control import messages as control
from shoal.node.messages import (
    ERROR,
    INLINE,
    LOST,
    PENDING,
    STORED,
    Allocate,
    Blocked,
    CancelResolve,
    ControlMail,
    EndProcess,
    LeaseSpec,
    MailFromControl,
    ObjectState,
    ProcessRegistered,
    Publish,
    Release,
    Resolve,
    Resolved,
    Seal,
    ToProcess,
    Unblocked,
    Unpin,
    Unuse,
    Use,
    WorkerAddress,
    WorkerExit,
)
from shoal.objects.arena import Arena
from shoal.objects.ids import task_prefix
from shoal.objects.serialization import Serialized, deserialize, serialize
from shoal.rpc.frames import encode_message, make_decoder
from shoal.rpc.messages import Failed, Message, Reply, Request
from shoal.rpc.reactor import Channel, Reactor
from shoal.runtime.actor_client import ActorManager, Client
from shoal.runtime.leases import TaskManager
from shoal.runtime.link import WorkerLink
from shoal.runtime.messages import Argument
from shoal.runtime.object_ref import Hold, ObjectRef
from shoal.runtime.task_run import Bound, Placeholder, TaskRun
from shoal.runtime.waiting import Waiter

if TYPE_CHECKING:
    from shoal.runtime.interface import ActorTemplate, ContextData, TaskTemplate

logger = logging.getLogger(__name__)

INLINE_BYTES: Final = 100 * 1024
"""Larger values live in the store."""
EXPLAIN_AFTER_S: Final = 5.0
EXPLAIN_AGAIN_S: Final = 30.0
_FIRST: Final = (1).to_bytes(4, "little")
_PUT: Final = bytes(4)
_NO_VIEWS: Final[dict[ObjectRef[Any], memoryview]] = {}

process_decoder = make_decoder(ToProcess)
_mail_decoder = msgspec.msgpack.Decoder(control.ProcessReply)


class CoreRuntime:
    """See the module. `connect` fills it; `shutdown` empties it.

    Attributes:
        on_agent_message: what the worker's executor wants to hear of the agent; returns False for what it does not know.
        before_blocking: called in a user's thread before it waits (a worker hands its queue back).
    """

    def __init__(self, *, worker_id: bytes, token: bytes, is_driver: bool, name: str) -> None:
        self.worker_id = worker_id
        self.token = token
        self.is_driver = is_driver
        self.name = name
        self.reactor = Reactor(name)
        self.node_id = b""
        self.node_ip = ""
        self.node_address = ""
        self.node_total: dict[str, int] = {}
        self.session_dir = ""
        self.job = control.JobInfo(b"", "", b"", b"")
        self.prefix = b""
        self.depth = 0  # of calls submitted from here
        self.closed = ""  # why there is no cluster any more
        self.known: weakref.WeakValueDictionary[bytes, ObjectRef[Any]] = weakref.WeakValueDictionary()
        self.on_agent_message: Callable[[Any], bool] = lambda _: False
        self.before_blocking: Callable[[], None] = lambda: None
        self.on_notice: Callable[[control.Notice], None] = lambda _: None
        self.on_logs: Callable[[list[control.LogLines]], None] = lambda _: None
        self.describe_context: Callable[[], ContextData] | None = None
        self.leave_actor: Callable[[], None] | None = None
        self.on_lost: Callable[[], None] = lambda: None

        self.agent = Channel(self.reactor, process_decoder, self._from_agent, self._lost_agent)
        self._arena: Arena | None = None
        self._arena_path = ""
        self._arena_capacity = 0
        self._counter = itertools.count(1)
        self._submitted: collections.deque[TaskRun] = collections.deque()
        self._draining = False
        self._dropped: collections.deque[tuple[bytes, bytes]] = collections.deque()
        self._dropping = False
        self._unpins: collections.deque[bytes] = collections.deque()
        self._unpinning = False
        self._borrow_lock = threading.RLock()
        self._mail_rids = itertools.count(1)
        self._mail: dict[int, Callable[[Any], None]] = {}
        self._links: dict[bytes, WorkerLink] = {}
        self.uses_begun = 0  # borrowed refs whose use was announced, and those whose use the home has counted
        self.uses_counted = 0
        self._after_uses: list[tuple[int, Callable[[], None]]] = []
        self._pinned_for_good: list[Any] = []
        self._blocked = 0
        self._running: weakref.WeakValueDictionary[bytes, ObjectRef[Any]] = weakref.WeakValueDictionary()
        self.tasks: TaskManager
        self.actors = ActorManager(self)

    # ---------------------------------------------------------------------------------------- opening, closing

    def start(self, agent_socket: str, register: Request, timeout_s: float = 30.0) -> ProcessRegistered:
        """Connect to this node's agent and register. Called once, before anything else.

        Raises:
            ClusterConnectionError, AuthenticationError, VersionMismatchError, ShoalError.
        """
        self.reactor.start()
        self.reactor.call_soon(self.agent.connect, f"unix:{agent_socket}", self.token, "agent", self.name)
        answer = self.ask_agent(register, timeout_s)
        if isinstance(answer, Failed):
            self.reactor.stop()
            if answer.kind == "version":
                raise exceptions.VersionMismatchError(answer.text)
            if self._lost is not None and isinstance(self._lost, exceptions.AuthenticationError):
                raise self._lost
            raise exceptions.ClusterConnectionError(answer.text)
        self.node_id, self.node_ip, self.node_address = answer.node_id, answer.node_ip, answer.node_address
        self.session_dir, self.node_total = answer.session_dir, answer.node_total
        self._arena_path, self._arena_capacity = answer.arena_path, answer.arena_capacity
        if answer.job is not None:
            self.set_job(answer.job)
        self.tasks = TaskManager(self)
        registered: ProcessRegistered = answer
        return registered

    _lost: Exception | None = None

    def set_job(self, job: control.JobInfo) -> None:
        self.job = job
        self.job_id = job.job_id
        self.prefix = task_prefix(job.job_id, self.worker_id)

    job_id = b""

    def _lost_agent(self, _channel: Channel, reason: Exception) -> None:
        self._lost = reason
        if not self.closed:
            self.closed = f"this process's node is gone: {reason}"
            self.on_lost()
        error = exceptions.LocalAgentDiedError(self.closed)
        for answered in list(self._mail.values()):
            answered(Failed(kind="closed", text=self.closed))
        self._mail.clear()
        self.fail_everything(error)

    def fail_everything(self, error: Exception) -> None:
        """There is no cluster any more: whatever waits is told."""
        state = ObjectState(ERROR, serialize(error).flatten())
        for ref in [*self._running.values(), *self.known.values()]:
            if ref.state == PENDING:
                self.learn(ref, state)

    def shutdown(self) -> None:
        """Leave the cluster. Refs of it are of no use afterwards."""
        self.closed = self.closed or "shutdown() was called"
        if self.reactor.thread.is_alive() and threading.current_thread() is not self.reactor.thread:
            done = threading.Event()
            self.reactor.call_soon(self._close_channels, done)
            done.wait(5.0)
            self.reactor.stop()
            self.reactor.thread.join(5.0)
        if self._arena is not None:
            self._arena.close()

    def _close_channels(self, done: threading.Event) -> None:
        try:
            for link in list(self._links.values()):
                link.close()
            self.agent.close()
        finally:
            done.set()

    # ------------------------------------------------------------------------------------------- asking others

    def ask_agent(self, request: Request, timeout_s: float = -1.0) -> Any:
        """The agent's answer, waited for by a user's thread. `Failed` when the agent is gone or says so."""
        box: list[Any] = []
        lock = threading.Lock()
        lock.acquire()

        def answered(reply: Reply) -> None:
            box.append(reply)
            lock.release()

        self.reactor.call_soon(self.agent.request, request, answered)
        if not lock.acquire(timeout=timeout_s):
            return Failed(kind="timeout", text=f"the node's agent did not answer within {timeout_s:.0f} s")
        return box[0]

    def mail_control(self, message: Request, answered: Callable[[Any], None]) -> None:
        """Ask control; `answered` is called on the reactor's thread, with Failed when that says no or cannot be reached."""
        rid = next(self._mail_rids)
        msgspec.structs.force_setattr(message, "rid", rid)
        if self.agent.closed:
            answered(Failed(kind="closed", text=self.closed))
            return
        self._mail[rid] = answered
        self.agent.send(ControlMail(encode_message(message)))

    def tell_control(self, message: Message) -> None:
        self.agent.send(ControlMail(encode_message(message)))

    def ask_control(self, message: Request, timeout_s: float = 60.0) -> Any:
        """Control's answer, waited for by a user's thread.

        Raises:
            ShoalSystemError: control said Failed, and the caller does not expect any `kind` of it.
        """
        answer = self.try_control(message, timeout_s)
        if isinstance(answer, Failed):
            raise exceptions.ShoalSystemError(answer.text)
        return answer

    def try_control(self, message: Request, timeout_s: float = 60.0) -> Any:
        box: list[Any] = []
        lock = threading.Lock()
        lock.acquire()

        def answered(reply: Reply) -> None:
            box.append(reply)
            lock.release()

        self._check_open()
        self.reactor.call_soon(self.mail_control, message, answered)
        if not lock.acquire(timeout=timeout_s):
            raise exceptions.ShoalSystemError(f"the head node did not answer within {timeout_s:.0f} s")
        return box[0]

    def _check_open(self) -> None:
        if self.closed:
            raise exceptions.LocalAgentDiedError(self.closed)

    def _from_agent(self, _channel: Channel, message: Any) -> None:
        if self.on_agent_message(message):
            return
        match message:
            case MailFromControl():
                self._from_control(_mail_decoder.decode(message.body))
            case EndProcess():
                self.closed = self.closed or message.reason
                self.agent.close(exceptions.ClusterConnectionError(message.reason))
            case _:
                self.tasks.from_agent(self.tasks.local, message)

    def _from_control(self, message: Any) -> None:
        if isinstance(message, Reply):
            answered = self._mail.pop(message.rid, None)
            if answered is not None:
                answered(message)
            return
        match message:
            case control.ActorUpdate():
                self.actors.update(message.actor)
            case control.LogsArrived():
                self.on_logs(message.entries)
            case control.Notice():
                self.on_notice(message)

    @property
    def arena(self) -> Arena:
        if self._arena is None:
            with self._borrow_lock:
                if self._arena is None:
                    self._arena = Arena.open(self._arena_path, self._arena_capacity)
        return self._arena

    # ------------------------------------------------------------------------------------------------- submitting

    def bind(self, template: TaskTemplate) -> Bound:
        """Pickle the function once per template."""
        function = template.function
        name = getattr(function, "__qualname__", None) or template.name
        code = serialize(function, what=f"the function {template.name}")
        captured = self.contained_refs(code)
        bound = Bound(
            self,
            template.name,
            f"{getattr(function, '__module__', '')}.{name}",
            template.num_returns,
            code=code.flatten(),
            spec=LeaseSpec(
                self.job_id, template.resources, template.name, strategy=template.strategy, env_vars=template.env_vars
            ),
            max_retries=template.max_retries,
            max_calls=template.max_calls or (1 if template.resources.get("GPU") else 0),
        )
        self.keep_for_good(captured)  # a function that closes over refs may be called at any time
        template.bound = bound
        return bound

    def submit_task(self, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = template.bound
        if bound is None or bound.runtime is not self:
            bound = self.bind(template)
        counter = next(self._counter)
        if bound.num_returns == 1:
            refs: Any = ObjectRef(self.prefix + counter.to_bytes(8, "little") + _FIRST, self.node_id)
        else:
            refs = self._make_refs(counter, bound.num_returns)
        run = TaskRun(counter, bound, refs, self.depth)
        if args or kwargs:
            self.pack(run, args, kwargs)
        self.submit(run)
        return refs

    def submit_call(self, client: Client, bound: Bound, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A method call; in order after those that this process submitted to the actor before."""
        counter = next(self._counter)
        if bound.num_returns == 1:
            refs: Any = ObjectRef(self.prefix + counter.to_bytes(8, "little") + _FIRST, self.node_id)
        else:
            refs = self._make_refs(counter, bound.num_returns)
        run = TaskRun(counter, bound, refs, self.depth)
        run.client = client
        if args or kwargs:
            self.pack(run, args, kwargs)
        self.submit(run)
        return refs

    def submit(self, run: TaskRun) -> None:
        """Hand the call to the reactor. If this process is interrupted before the append, nothing has happened."""
        if self.closed:
            self._check_open()
        refs = run.refs
        if type(refs) is ObjectRef:
            refs.task = run
        elif refs is not None:
            for ref in refs:
                ref.task = run
        self._submitted.append(run)
        if not self._draining:
            self._draining = True
            self.reactor.call_soon(self._drain)

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
                args = tuple(self._place(value, dependencies) for value in args)
                kwargs = {key: self._place(value, dependencies) for key, value in kwargs.items()}
                break
        what = f"the arguments of {run.bound.name}"
        packed_args = serialize(args, what) if args else None
        packed_kwargs = serialize(kwargs, what) if kwargs else None
        size = (packed_args.flat_size if packed_args else 0) + (packed_kwargs.flat_size if packed_kwargs else 0)
        if size > INLINE_BYTES:
            both = serialize((args, kwargs), what)
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

    def _place(self, value: Any, dependencies: list[ObjectRef[Any]]) -> Any:
        if type(value) is not ObjectRef:
            return value
        dependencies.append(value)
        return Placeholder(len(dependencies) - 1)

    def contained_refs(self, serialized: Serialized) -> list[ObjectRef[Any]]:
        """The references inside a value that was just serialized, those of actors' handles included.

        Whoever unpickles them in this process must find these instances, so they are known from here on.
        """
        refs = []
        for item in serialized.refs:
            if isinstance(item, Client):
                if item.weak:
                    continue  # nobody counts it
                item = item.ref
            assert isinstance(item, ObjectRef)
            self.known.setdefault(item.binary(), item)
            refs.append(item)
        return refs

    def keep_for_good(self, refs: Sequence[ObjectRef[Any]]) -> None:
        """References that leave with code, which may be run whenever: they live as long as this process."""
        if refs:
            self._pinned_for_good.extend(refs)
            self.reactor.call_soon(self.publish_all, refs)

    def _drain(self) -> None:
        self._draining = False
        submitted = self._submitted
        for _ in range(len(submitted)):
            run = submitted.popleft()
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
        for ref in run.dependencies or ():
            if ref.state == PENDING:
                run.missing += 1
                self.watch(ref, run)
        if run.missing:
            return False
        return self._fill_arguments(run)

    def arguments_ready(self, run: TaskRun) -> None:
        if self._fill_arguments(run):
            if run.client is not None:
                run.client.pump()
            else:
                self.tasks.submit(run)

    def _fill_arguments(self, run: TaskRun) -> bool:
        """Copy what is known of the dependencies into the run; False when one failed, and with it the call."""
        arguments = []
        for ref in run.dependencies or ():
            if ref.state in (ERROR, LOST):
                self.fail(run, self.state_of(ref))
                return False
            arguments.append(Argument(ref.binary(), ref.home, self.state_of(ref)))
        run.arguments = arguments
        run.stage = "queued"
        return True

    # ----------------------------------------------------------------------------------------------- results

    def finish_inline(self, run: TaskRun, payload: bytes) -> None:
        """The usual end: one small value."""
        run.stage = "done"
        ref = run.refs
        if type(ref) is not ObjectRef:  # no result wanted, or the worker speaks of another number of them
            return
        ref.task = None
        ref.value = payload
        ref.state = INLINE
        if ref.published:
            self.agent.send(Publish(ref.binary(), ObjectState(INLINE, payload)))
        if ref.waiters is not None:
            self._wake(ref)

    def finish(self, run: TaskRun, results: list[ObjectState]) -> None:
        run.stage = "done"
        refs = [run.refs] if type(run.refs) is ObjectRef else run.refs or []
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
        self.fail(run, ObjectState(ERROR, serialize(error).flatten()))

    def fail_crashed(self, run: TaskRun, exit: WorkerExit, where: WorkerAddress) -> None:
        text = f"{run.bound.name} was running on pid {where.pid}, node {where.node_id.hex()[:12]}, when its worker ended"
        if exit.cause:
            text += f": {exit.cause}"
        code = None if exit.signal or not exit.code else exit.code
        self.fail_with(run, exceptions.WorkerCrashedError(text, code, exit.signal or None, exit.tail))

    def learn(self, ref: ObjectRef[Any], state: ObjectState) -> None:
        """`ref` is not pending any more: take over its state and wake who waits."""
        if ref.state != PENDING:
            if not (ref.state == STORED and state.state in (LOST, ERROR)):
                return
        ref.value, ref.size = state.payload, state.size
        if state.contained and ref.contained is None and ref.owned:
            ref.contained = [self.borrow(inner, home) for inner, home in state.contained]
        if state.state == STORED:
            ref.local = self.node_id in state.nodes
            if ref.hold is None:
                ref.hold = Hold(self, ref.binary(), ref.home)
                self.known.setdefault(ref.binary(), ref)
        ref.state = state.state
        if ref.published and ref.owned:
            self.agent.send(Publish(ref.binary(), self.state_of(ref)))
        self._wake(ref)

    def _wake(self, ref: ObjectRef[Any]) -> None:
        waiters, ref.waiters = ref.waiters, None
        for waiter in waiters or ():
            waiter.ready(ref)

    def state_of(self, ref: ObjectRef[Any]) -> ObjectState:
        contained = self.name_all(ref.contained) if ref.contained else []
        return ObjectState(ref.state, ref.value, ref.size, [], contained)

    # ----------------------------------------------------------------------------------------- references

    def publish_all(self, refs: Sequence[ObjectRef[Any]]) -> None:
        for ref in refs:
            self.publish(ref)

    def publish(self, ref: ObjectRef[Any]) -> None:
        """A ref leaves this process: from now on its home agent knows the object."""
        if ref.published or not ref.owned:
            return
        ref.published = True
        self.known.setdefault(ref.binary(), ref)
        if ref.hold is None:
            ref.hold = Hold(self, ref.binary(), ref.home)
        self.agent.send(Publish(ref.binary(), self.state_of(ref)))

    def borrow(self, object_id: bytes, home: bytes) -> ObjectRef[Any]:
        """The record of an object that somebody else made (or that this process did, if it comes back). Any thread."""
        ref = self.known.get(object_id)
        if ref is not None:
            return ref
        with self._borrow_lock:
            ref = self.known.get(object_id)
            if ref is None:
                ref = ObjectRef(object_id, home, owned=False)
                ref.hold = Hold(self, object_id, home)
                self.known[object_id] = ref
                self.uses_begun += 1
                self.reactor.call_soon(self._use, object_id, home)
        return ref

    def _use(self, object_id: bytes, home: bytes) -> None:
        self.agent.request(Use(object_id=object_id, home=home), self._use_counted)

    def _use_counted(self, _reply: Reply) -> None:
        self.uses_counted += 1
        while self._after_uses and self._after_uses[0][0] <= self.uses_counted:
            self._after_uses.pop(0)[1]()

    def after_uses(self, call: Callable[[], None]) -> None:
        """Run `call` once every use that was begun so far is counted by its home."""
        if self.uses_counted >= self.uses_begun:
            call()
        else:
            self._after_uses.append((self.uses_begun, call))

    def dropped(self, object_id: bytes, home: bytes) -> None:
        """A `Hold` was collected: from any thread, possibly inside the collector, so only an append."""
        self._dropped.append((object_id, home))
        if not self._dropping and not self.closed:
            self._dropping = True
            self.reactor.call_soon(self._tell_dropped)

    def _tell_dropped(self) -> None:
        self._dropping = False
        gone = [self._dropped.popleft() for _ in range(len(self._dropped))]
        self.agent.send(Unuse(gone))

    def escaped_unseen(self, ref: ObjectRef[Any]) -> None:
        """Pickled by somebody else, who does not count: keep the object for this process's life."""
        self.known.setdefault(ref.binary(), ref)
        self.keep_for_good([ref])

    def watch(self, ref: ObjectRef[Any], waiter: Any) -> None:
        """Call `waiter.ready(ref)` when it is not pending any more; the home of a borrowed one is asked."""
        if ref.waiters is None:
            ref.waiters = []
        ref.waiters.append(waiter)
        if self.closed:
            self.learn(ref, ObjectState(ERROR, serialize(exceptions.LocalAgentDiedError(self.closed)).flatten()))
            return
        if not ref.owned and not ref.requested:
            ref.requested = True
            request = Resolve(object_id=ref.binary(), home=ref.home, fetch=False)
            weak = weakref.ref(ref)
            self.agent.request(request, lambda reply: self._resolved(weak, reply))
        elif ref.owned and ref.binary() not in self._running:
            self._running[ref.binary()] = ref

    def _resolved(self, weak: weakref.ref[ObjectRef[Any]], reply: Any) -> None:
        ref = weak()
        if ref is None:
            return
        if isinstance(reply, Failed):
            error = self.problem_of(ref, reply)
            self.learn(ref, ObjectState(ERROR, serialize(error).flatten()))
        else:
            self.learn(ref, reply.state)

    def fetch(self, ref: ObjectRef[Any], answered: Callable[[Any], None]) -> int:
        """Ask for a local, pinned copy; the answer is a `Resolved` or `Failed`."""
        return self.agent.request(Resolve(object_id=ref.binary(), home=ref.home, fetch=True), answered)

    def cancel_fetch(self, request: int) -> None:
        self.agent.send(CancelResolve(request))

    def view_of(self, ref: ObjectRef[Any], reply: Resolved) -> memoryview:
        """The pinned bytes; unpinned when the last view of them is gone."""
        object_id = ref.binary()
        return self.arena.pinned(reply.offset, reply.state.size, lambda: self._unpin(object_id))

    def _unpin(self, object_id: bytes) -> None:
        self._unpins.append(object_id)
        if not self._unpinning and not self.closed:
            self._unpinning = True
            self.reactor.call_soon(self._tell_unpins)

    def _tell_unpins(self) -> None:
        self._unpinning = False
        self.agent.send(Unpin([self._unpins.popleft() for _ in range(len(self._unpins))]))

    def problem_of(self, ref: ObjectRef[Any], reply: Failed) -> Exception:
        if reply.kind == "store_full":
            return exceptions.ObjectStoreFullError(f"cannot fetch {ref.hex()}: {reply.text}")
        if reply.kind == "closed":
            return exceptions.LocalAgentDiedError(self.closed or reply.text)
        return exceptions.ShoalSystemError(f"cannot fetch {ref.hex()}: {reply.text}")

    # --------------------------------------------------------------------------------------------- put, get, wait

    def put(self, value: Any) -> ObjectRef[Any]:
        serialized = serialize(value)
        if serialized.flat_size > INLINE_BYTES:
            return self.put_serialized(serialized)
        self._check_open()
        counter = next(self._counter)
        ref: ObjectRef[Any] = ObjectRef(self.prefix + counter.to_bytes(8, "little") + _PUT, self.node_id)
        if serialized.refs:
            ref.contained = self.contained_refs(serialized)
        ref.value = serialized.flatten()
        ref.state = INLINE
        return ref

    def put_serialized(self, serialized: Serialized) -> ObjectRef[Any]:
        """Store a large value of this process."""
        counter = next(self._counter)
        ref: ObjectRef[Any] = ObjectRef(self.prefix + counter.to_bytes(8, "little") + _PUT, self.node_id)
        if serialized.refs:
            ref.contained = self.contained_refs(serialized)
        size = serialized.flat_size
        self.store(serialized, ref.binary(), self.node_id, self.worker_id, ref.contained or ())
        ref.size, ref.local = size, True
        ref.hold = Hold(self, ref.binary(), self.node_id)
        self.known[ref.binary()] = ref
        ref.state = STORED
        return ref

    def store(self, value: Serialized, object_id: bytes, home: bytes, owner: bytes, refs: Sequence[ObjectRef[Any]]) -> None:
        """Copy a value into this node's store and seal it.

        Raises:
            ObjectStoreFullError: no room, and none to be had.
        """
        self._check_open()
        size = value.flat_size
        answer = self.ask_agent(Allocate(size=size))
        if isinstance(answer, Failed):
            if answer.kind == "store_full":
                raise exceptions.ObjectStoreFullError(answer.text)
            raise exceptions.LocalAgentDiedError(answer.text)
        try:
            arena = self.arena
            arena.populate(answer.offset, size)
            value.write_into(arena.view(answer.offset, size))
        except BaseException:
            self.reactor.call_soon(self.agent.send, Release(answer.offset, size))
            raise
        self.reactor.call_soon(self._seal, object_id, answer.offset, size, home, owner, refs)

    def _seal(
        self, object_id: bytes, offset: int, size: int, home: bytes, owner: bytes, refs: Sequence[ObjectRef[Any]]
    ) -> None:
        self.agent.send(Seal(object_id, offset, size, home, owner, self.name_all(refs)))

    def name_all(self, refs: Sequence[ObjectRef[Any]]) -> list[tuple[bytes, bytes]]:
        """Publish what a value refers to, and name it as it travels: (object id, home)."""
        self.publish_all(refs)
        return [(ref.binary(), ref.home) for ref in refs]

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        views = _NO_VIEWS
        for ref in refs:
            if ref.state == PENDING or ref.state == STORED:
                views = self._wait_for_values(refs, timeout_s)
                break
        return [self._value(ref, views) for ref in refs]

    def _value(self, ref: ObjectRef[Any], views: dict[ObjectRef[Any], memoryview]) -> Any:
        state = ref.state
        if state == INLINE:
            return deserialize(ref.value)
        if state == STORED:
            view = views.get(ref)
            return deserialize(view) if view is not None else self.get([ref], None)[0]
        raise self.error_of(ref)

    def error_of(self, ref: ObjectRef[Any]) -> BaseException:
        """What to raise for a failed object."""
        if ref.state == ERROR:
            error: BaseException = deserialize(ref.value)
            return error.as_raisable() if isinstance(error, exceptions.TaskError) else error
        kind, _, text = ref.value.decode(errors="replace").partition(":")
        if kind == "owner":
            return exceptions.OwnerDiedError(f"object {ref.hex()} is lost: {text}")
        return exceptions.ObjectLostError(f"object {ref.hex()} is lost: {text if kind == 'node' else ref.value.decode()}")

    def _wait_for_values(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> dict[ObjectRef[Any], memoryview]:
        unique = list(dict.fromkeys(refs))
        waiter = Waiter(self, unique, len(unique), fetch=True, keep=True, stop_on_error=True)
        if not self._sleep(waiter, unique, timeout_s):
            left = [ref for ref in unique if ref not in waiter.ready_refs]
            text = f"{len(left)} of {len(unique)} objects were not ready after {timeout_s:g} s"
            raise exceptions.GetTimeoutError(f"{text}; the first is {left[0] if left else ''}: {self._why(left)}")
        for ref in unique:
            if ref in waiter.problems:
                raise waiter.problems[ref]
            if ref in waiter.ready_refs and ref.state in (ERROR, LOST):
                raise self.error_of(ref)
        return waiter.views

    def _sleep(self, waiter: Waiter, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> bool:
        """Wait in a user's thread; lends its CPUs meanwhile, and says why after a while. False after the timeout."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        waiter.start()
        if not self.is_driver and timeout_s != 0:
            self.before_blocking()
            self.reactor.call_soon(self._set_blocked, 1)
        explain_in = EXPLAIN_AFTER_S
        try:
            while True:
                slice_s = explain_in
                if deadline is not None:
                    slice_s = max(0.0, min(slice_s, deadline - time.monotonic()))
                if waiter.wait(slice_s):
                    return True
                if deadline is not None and time.monotonic() >= deadline:
                    return self._grace(waiter, timeout_s)
                self._explain(waiter, refs)
                explain_in = EXPLAIN_AGAIN_S
        finally:
            waiter.leave()
            if not self.is_driver and timeout_s != 0:
                self.reactor.call_soon(self._set_blocked, -1)

    def _grace(self, waiter: Waiter, timeout_s: float | None) -> bool:
        """A poll (timeout 0) must see what is ready already, so it gives the reactor one round."""
        if timeout_s != 0:
            return False
        looked = threading.Event()
        self.reactor.call_soon(looked.set)
        looked.wait(1.0)
        return waiter.wait(0)

    def _set_blocked(self, step: int) -> None:
        self._blocked += step
        if step > 0 and self._blocked == 1:
            self.agent.send(Blocked())
        elif step < 0 and self._blocked == 0:
            self.agent.send(Unblocked())

    def wait(
        self, refs: Sequence[ObjectRef[Any]], num_returns: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        waiter = Waiter(self, refs, num_returns, fetch=fetch_local, keep=False, stop_on_error=False)
        self._sleep(waiter, refs, timeout_s)
        found = waiter.ready_refs.copy()
        ready: list[ObjectRef[Any]] = []
        rest: list[ObjectRef[Any]] = []
        for ref in refs:
            if ref in found and len(ready) < num_returns:
                ready.append(ref)
            else:
                rest.append(ref)
        return ready, rest

    # -------------------------------------------------------------------------------------------------- futures

    def on_ready(self, ref: ObjectRef[Any], call: Callable[[Callable[[], Any]], None]) -> None:
        """When the value is here, `call(read)` on the reactor's thread; `read()` returns it or raises. Any thread."""
        waiter = Waiter(self, [ref], 1, fetch=True, keep=True, stop_on_error=True)

        def read() -> Any:
            if ref in waiter.problems:
                raise waiter.problems[ref]
            return self._value(ref, waiter.views)

        waiter.done = lambda: call(read)
        waiter.start()

    def concurrent_future(self, ref: ObjectRef[Any]) -> Any:
        import concurrent.futures

        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_running_or_notify_cancel()

        def ready(read: Callable[[], Any]) -> None:
            try:
                value = read()
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(value)

        self.on_ready(ref, ready)
        return future

    def async_future(self, ref: ObjectRef[Any]) -> Any:
        import asyncio

        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(read: Callable[[], Any]) -> None:
            if future.done():
                return
            try:
                value = read()
            except BaseException as exc:
                future.set_exception(exc if not isinstance(exc, StopIteration) else RuntimeError(repr(exc)))
            else:
                future.set_result(value)

        def ready(read: Callable[[], Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, read)

        self.on_ready(ref, ready)
        return future

    # ------------------------------------------------------------------------------------------- why one waits

    def _explain(self, waiter: Waiter, refs: Sequence[ObjectRef[Any]]) -> None:
        waiting = [ref for ref in refs if ref not in waiter.ready_refs]
        why = self._why(waiting)
        if why and not why.startswith("it is running"):
            count = f"{len(waiting)} objects, the first of which is " if len(waiting) > 1 else ""
            logger.warning("still waiting for %s%s: %s", count, self._what(waiting[0]), why)

    def _what(self, ref: ObjectRef[Any]) -> str:
        run = ref.task
        return f"the result of {run.bound.name}" if run is not None else f"object {ref.hex()}"

    def _why(self, refs: Sequence[ObjectRef[Any]]) -> str:
        """One line on what the first of `refs` waits for."""
        if not refs:
            return ""
        ref = refs[0]
        run = ref.task
        if run is None:
            if ref.state == STORED:
                return "its value is being fetched"
            return "its owner has not made it yet" if not ref.owned else "nothing makes it any more"
        if run.stage == "arguments":
            missing = [dep for dep in run.dependencies or () if dep.state == PENDING]
            inner = self._why(missing[:1])
            return f"{len(missing)} of its arguments are not ready ({inner})" if missing else "its arguments are being read"
        if run.client is not None:
            return str(run.client.why(run))
        if run.stage == "sent":
            return "it is running"
        reason = self.tasks.class_of(run).reason
        return reason.text if reason is not None else "a worker is being started for it"

    # ---------------------------------------------------------------------------------------------- links, actors

    def link_to(self, address: WorkerAddress) -> WorkerLink:
        link = self._links.get(address.worker_id)
        if link is None or link.closed:
            link = self._links[address.worker_id] = WorkerLink(self, address, None)
        return link

    def forget_link(self, link: WorkerLink) -> None:
        if self._links.get(link.address.worker_id) is link:
            del self._links[link.address.worker_id]

    def create_actor(self, template: ActorTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Client, bytes]:
        self._check_open()
        return self.actors.create(template, args, kwargs)

    def borrow_actor(self, actor_id: bytes, home: bytes, weak: bool = False) -> Client:
        return self.actors.borrow(actor_id, home, weak)

    def find_actor(self, name: str, namespace: str | None) -> control.ActorInfo:
        space = self.job.namespace if namespace is None else namespace
        answer = self.try_control(control.FindActor(name=name, namespace=space))
        if isinstance(answer, Failed):
            raise ValueError(answer.text)
        info: control.ActorInfo = answer.actor
        return info

    def list_actors(self, *, named_only: bool, namespace: str) -> list[control.ActorInfo]:
        answer = self.ask_control(control.ListActors(named_only=named_only, namespace=namespace))
        actors: list[control.ActorInfo] = answer.actors
        return actors

    def kill_actor(self, actor_id: bytes, *, no_restart: bool) -> None:
        self.ask_control(control.KillActor(actor_id=actor_id, no_restart=no_restart))

    def cancel(self, ref: ObjectRef[Any], *, force: bool, recursive: bool) -> None:
        """Drop the call if it has not begun. One that runs is left alone: see `exceptions.TaskCancelledError`."""
        self.reactor.call_soon(self._cancel, ref)

    def _cancel(self, ref: ObjectRef[Any]) -> None:
        run = ref.task
        if run is None or ref.state != PENDING:
            return
        if run.stage == "queued" and run.client is None and not self.tasks.cancel(run):
            return
        if run.stage in ("arguments", "queued"):
            self.fail_with(run, exceptions.TaskCancelledError(ref.task_id().hex()))

    # ------------------------------------------------------------------------------------------------- the rest

    def status(self) -> control.StatusReply:
        answer: control.StatusReply = self.ask_control(control.GetStatus())
        return answer

    def context(self) -> ContextData:
        assert self.describe_context is not None
        return self.describe_context()

    def kv_put(self, space: str, key: bytes, value: bytes, *, overwrite: bool) -> bool:
        return bool(self.ask_control(control.PutKey(space=space, key=key, value=value, overwrite=overwrite)).found)

    def kv_get(self, space: str, key: bytes) -> bytes | None:
        answer = self.ask_control(control.GetKey(space=space, key=key))
        return answer.value if answer.found else None

    def kv_delete(self, space: str, key: bytes, *, by_prefix: bool) -> int:
        return int(self.ask_control(control.DeleteKey(space=space, key=key, by_prefix=by_prefix)).count)

    def kv_list(self, space: str, prefix: bytes) -> list[bytes]:
        keys: list[bytes] = self.ask_control(control.ListKeys(space=space, prefix=prefix)).keys
        return keys

    def exit_actor(self) -> None:
        if self.leave_actor is None:
            raise RuntimeError("exit_actor() works only inside an actor")
        self.leave_actor()


