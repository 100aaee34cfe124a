"""The worker's side of calls: takes them from their owners, runs them, and sends back what came of them.

Owners' messages arrive on the reactor's thread, user code runs on the process's main thread (and on more threads for an actor
with `max_concurrency`, or on an event loop on the main thread for an actor with async methods). A result leaves from the
thread that made it, without waking the reactor. Results of short calls travel together, but never wait for a call that is
not known to be short, and for `HOLD_BACK_S` at most.
"""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from shoal import exceptions
from shoal.node.messages import (
    ERROR,
    INLINE,
    STORED,
    AssignJob,
    BeginActor,
    EndActor,
    EndProcess,
    Leaving,
    ObjectState,
    Resolved,
)
from shoal.objects.ids import make_object_id, make_task_id, task_prefix
from shoal.objects.serialization import NONE_FLAT, deserialize, serialize
from shoal.rpc.frames import encode_message, make_decoder
from shoal.rpc.messages import Done, Failed, Hello
from shoal.rpc.reactor import Acceptor, Channel
from shoal.runtime import worker_output
from shoal.runtime.core import INLINE_BYTES, CoreRuntime
from shoal.runtime.interface import ContextData
from shoal.runtime.messages import (
    Argument,
    Cancel,
    Ended,
    Finished,
    HandedBack,
    Introduce,
    Pace,
    Run,
    Taken,
    Template,
    ToWorker,
)
from shoal.runtime.task_run import Placeholder

if TYPE_CHECKING:
    from shoal.runtime.actor_host import ActorInstance

logger = logging.getLogger(__name__)

SHORT_S: Final = 0.0005
"""A call expected to take less than this may run before the results of its predecessors have left."""
HOLD_BACK_S: Final = 0.001
MAX_FUNCTIONS: Final = 1000
STUCK_S: Final = 0.01
"""A call that runs longer hands back those queued behind it; looked for this often while any are queued."""

_decoder = make_decoder(ToWorker)


class _Caller:
    """One owner's connection."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.worker_id = b""
        self.job_id = b""
        self.node_id = b""
        self.prefix = b""
        self.templates: list[_Callable] = []
        self.handover: dict[int, list[Any]] = {}  # by counter: refs in results, kept until the owner counts them
        self.held: list[Call] = []  # in arrival order, from the first whose arguments are not here (actors only)


class _Callable:
    """A template as this worker knows it."""

    __slots__ = ("function", "pace_s", "template", "told_s", "uses")

    def __init__(self, template: Template) -> None:
        self.template = template
        self.function: Callable[..., Any] | None = None
        self.pace_s: float | None = None
        self.told_s = 0.0
        self.uses = 0


class Call:
    """One call on its way through this worker."""

    __slots__ = ("callable", "caller", "cancelled", "message", "missing", "problem", "started", "values")

    def __init__(self, caller: _Caller, target: _Callable, message: Run) -> None:
        self.caller = caller
        self.callable = target
        self.message = message
        self.values: list[Any] = []  # flat bytes of `message.arguments`
        self.missing = 0
        self.problem: ObjectState | None = None
        self.started = 0.0
        self.cancelled = False

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        message = self.message
        if not message.arguments:
            args = deserialize(message.args) if message.args else ()
            return args, deserialize(message.kwargs) if message.kwargs else {}
        values = [deserialize(flat) for flat in self.values]
        if message.packed:
            args, kwargs = values[-1]
        else:
            args = deserialize(message.args) if message.args else ()
            kwargs = deserialize(message.kwargs) if message.kwargs else {}
        args = tuple(values[arg.index] if type(arg) is Placeholder else arg for arg in args)
        kwargs = {key: values[arg.index] if type(arg) is Placeholder else arg for key, arg in kwargs.items()}
        return args, kwargs


class Executor:
    """See the module. One per worker process."""

    def __init__(self, runtime: CoreRuntime, socket_path: str) -> None:
        self.runtime = runtime
        self._queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._current = threading.local()
        self._main: Call | None = None  # what the main thread runs
        self._functions: dict[bytes, Callable[..., Any]] = {}  # by code: many callers may send the same
        self._watching = False
        self._flushed_at = 0.0
        self._devices: dict[str, list[int]] = {}
        self._env_vars: dict[str, str] = {}
        self.actor: ActorInstance | None = None
        self._begin: BeginActor | None = None
        runtime.on_agent_message = self._from_agent
        runtime.before_blocking = self._hand_back_queue
        runtime.describe_context = self.context
        self._acceptor = Acceptor(
            runtime.reactor, socket_path, runtime.token, runtime.name, self._new_channel, self._opened
        )

    # ------------------------------------------------------------------------------------------ owners' messages

    def _new_channel(self) -> Channel:
        return Channel(self.runtime.reactor, _decoder, self._from_owner, self._owner_gone)

    def _opened(self, channel: Channel, _hello: Hello) -> None:
        channel.context = _Caller(channel)

    def _owner_gone(self, channel: Channel, _reason: Exception) -> None:
        caller: _Caller | None = channel.context
        if caller is not None:
            caller.handover.clear()
            caller.held.clear()

    def _from_owner(self, channel: Channel, message: Any) -> None:
        caller: _Caller = channel.context
        kind = type(message)
        if kind is Run:
            self._arrived(caller, Call(caller, caller.templates[message.template_id], message))
        elif kind is Template:
            caller.templates.append(_Callable(message))
        elif kind is Introduce:
            caller.worker_id, caller.job_id, caller.node_id = message.worker_id, message.job_id, message.node_id
            caller.prefix = task_prefix(message.job_id, message.worker_id)
        elif kind is Taken:
            caller.handover.pop(message.counter, None)
        elif kind is Cancel:
            self._cancel(caller, message.counter)

    def _arrived(self, caller: _Caller, call: Call) -> None:
        for index, argument in enumerate(call.message.arguments):
            if argument.state.state == STORED:
                call.values.append(None)
                call.missing += 1
                self._fetch(call, index, argument)
            else:
                call.values.append(argument.state.payload)
        if self.actor is not None and (caller.held or call.missing):
            if not self.actor.any_order:
                caller.held.append(call)  # its turn comes after those before it, whose arguments are still on the way
                return
        if call.missing == 0:
            self._enqueue(call)

    def _fetch(self, call: Call, index: int, argument: Argument) -> None:
        from shoal.runtime.object_ref import ObjectRef

        ref: ObjectRef[Any] = ObjectRef(argument.object_id, argument.home, owned=False)

        def answered(reply: Any) -> None:
            if isinstance(reply, Failed):
                error = self.runtime.problem_of(ref, reply)
                call.problem = ObjectState(ERROR, serialize(error).flatten())
            elif isinstance(reply, Resolved) and reply.state.state == STORED:
                call.values[index] = self.runtime.view_of(ref, reply)
            elif reply.state.state == INLINE:
                call.values[index] = reply.state.payload
            else:
                call.problem = reply.state
            call.missing -= 1
            if call.missing == 0:
                self._complete(call)

        self.runtime.fetch(ref, answered)

    def _complete(self, call: Call) -> None:
        """All arguments are here."""
        held = call.caller.held
        if not held:
            self._enqueue(call)
            return
        while held and held[0].missing == 0:
            self._enqueue(held.pop(0))

    def _enqueue(self, call: Call) -> None:
        if self.actor is not None and self.actor.takes_calls_itself:
            self.actor.submit(call)
            return
        self._queue.put(call)
        if not self._watching and self.actor is None:
            self._watching = True
            self.runtime.reactor.call_later(STUCK_S, self._look_for_stuck)

    def _look_for_stuck(self) -> None:
        """While calls are queued: see that none waits behind one that takes long."""
        self._watching = False
        if self._queue.empty():
            return
        current = self._main
        if current is not None and time.perf_counter() - current.started > STUCK_S:
            self._return_queued()
            return
        self._watching = True
        self.runtime.reactor.call_later(STUCK_S, self._look_for_stuck)

    def _hand_back_queue(self) -> None:
        """The main thread is about to wait for something."""
        if self.actor is None and not self._queue.empty():
            self.runtime.reactor.call_soon(self._return_queued)

    def _return_queued(self) -> None:
        counters: dict[_Caller, list[int]] = {}
        while True:
            try:
                call = self._queue.get_nowait()
            except queue.Empty:
                break
            if call is None:
                self._queue.put(None)
                break
            counters.setdefault(call.caller, []).append(call.message.counter)
        for caller, numbers in counters.items():
            caller.channel.send(HandedBack(numbers))

    def _cancel(self, caller: _Caller, counter: int) -> None:
        for call in caller.held:
            if call.message.counter == counter:
                call.cancelled = True

    # -------------------------------------------------------------------------------------------------- running

    def run(self) -> None:
        """The main thread's life: run calls until told to end, or become an actor for good."""
        take = self._queue.get
        while True:
            call = take()
            if call is None:
                begin = self._begin
                if begin is None:
                    return
                self._begin = None
                self._become(begin)
                continue
            self._main = call
            self.execute(call)
            self._main = None

    def execute(self, call: Call) -> None:
        """Run one call on this thread and send what came of it."""
        target, channel = call.callable, call.caller.channel
        pace = target.pace_s
        if channel._outbox and (pace is None or pace > SHORT_S or time.perf_counter() - self._flushed_at > HOLD_BACK_S):
            self._flush(channel)
        self._current.call = call
        self.runtime.depth = target.template.depth + 1
        call.started = begin = time.perf_counter()
        try:
            if call.problem is not None:
                reply: Any = self._failed(call, call.problem)
            else:
                function = target.function or self._load(target)
                args, kwargs = call.arguments()
                value = function(*args, **kwargs)
                args = kwargs = None  # type: ignore[assignment]  # what they pinned goes before the owner hears of the end
                reply = self._reply(call, value)
                value = None
        except BaseException as exc:
            reply = self._raised(call, exc)
        self._measure(target, channel, time.perf_counter() - begin)
        call.values = []
        self._current.call = None
        self.send_reply(call, reply)
        if target.template.max_calls:
            target.uses += 1
            if target.uses >= target.template.max_calls:
                self.leave(f"{target.template.name} ran max_calls={target.template.max_calls} times here")

    def send_reply(self, call: Call, reply: Any) -> None:
        """Send now if nothing follows soon, else with what follows. Any thread."""
        runtime, channel = self.runtime, call.caller.channel
        encoded = encode_message(reply)
        if runtime.uses_counted < runtime.uses_begun:
            # The call borrowed references: the owner may let go of its own only when ours are counted.
            runtime.reactor.call_soon(runtime.after_uses, lambda: channel.send_encoded(encoded))
            return
        channel.post(encoded)
        if self._queue.empty():
            self._flush(channel)
        elif len(channel._outbox) == 1:
            runtime.reactor.call_soon(channel.flush)  # in case what runs next takes longer than it used to

    def _flush(self, channel: Channel) -> None:
        self._flushed_at = time.perf_counter()
        channel.flush_here()

    def _load(self, target: _Callable) -> Callable[..., Any]:
        template = target.template
        if template.method:
            assert self.actor is not None
            target.function = self.actor.method(template.method)
        else:
            function = self._functions.get(template.code)
            if function is None:
                function = deserialize(template.code)
                self._functions[template.code] = function
                if len(self._functions) > MAX_FUNCTIONS:
                    del self._functions[next(iter(self._functions))]
            target.function = function
        assert target.function is not None
        return target.function

    def _measure(self, target: _Callable, channel: Channel, seconds: float) -> None:
        """Smooth the pace of this function, quick to notice that it became slow."""
        pace = target.pace_s
        if pace is None:
            pace = seconds
        elif seconds > 4 * pace:
            pace = (pace + seconds) / 2
        else:
            pace += (seconds - pace) / 8
        target.pace_s = pace
        if not target.told_s / 2 < pace < target.told_s * 2:
            target.told_s = pace
            template_id = next(i for i, known in enumerate(channel.context.templates) if known is target)
            channel.post(encode_message(Pace(template_id, pace)))

    def _reply(self, call: Call, value: Any) -> Any:
        template = call.callable.template
        counter = call.message.counter
        if template.num_returns == 1:
            if value is None:
                return Finished(counter, NONE_FLAT)
            result = serialize(value, f"the result of {template.name}")
            if not result.refs and result.flat_size <= INLINE_BYTES:
                return Finished(counter, result.flatten())
            results = [result]
        elif template.num_returns == 0:
            return Finished(counter, NONE_FLAT)
        else:
            values = list(value) if isinstance(value, (tuple, list)) else None
            if values is None or len(values) != template.num_returns:
                got = f"{len(values)} values" if values is not None else f"a {type(value).__name__}"
                raise ValueError(
                    f"{template.name} has num_returns={template.num_returns} and must return a tuple or list of as many "
                    f"values; it returned {got}"
                )
            results = [serialize(one, f"result {i} of {template.name}") for i, one in enumerate(values)]
        return self._large_reply(call, results)

    def _large_reply(self, call: Call, results: list[Any]) -> Ended:
        runtime, caller, counter = self.runtime, call.caller, call.message.counter
        states = []
        kept: list[Any] = []
        for index, result in enumerate(results):
            refs = runtime.contained_refs(result) if result.refs else []
            kept.extend(refs)
            contained = [(ref.binary(), ref.home) for ref in refs]
            if result.flat_size <= INLINE_BYTES:
                states.append(ObjectState(INLINE, result.flatten(), contained=contained))
                continue
            object_id = make_object_id(caller.prefix, counter, index + 1)
            runtime.store(result, object_id, caller.node_id, caller.worker_id, refs)
            states.append(ObjectState(STORED, b"", result.flat_size, [runtime.node_id], contained))
        if kept:
            caller.handover[counter] = kept
            runtime.reactor.call_soon(runtime.publish_all, kept)
        return Ended(counter, states, bool(kept))

    def _failed(self, call: Call, state: ObjectState) -> Ended:
        return Ended(call.message.counter, [state])

    def _raised(self, call: Call, exc: BaseException) -> Ended:
        template = call.callable.template
        if isinstance(exc, exceptions.TaskError) and not isinstance(exc, exceptions.TaskCancelledError):
            error: Any = exceptions.TaskError.from_exception(exc, **self._where(template.function_name))
        elif isinstance(exc, SystemExit) and self.actor is None:
            self._flush(call.caller.channel)
            logger.info("%s called sys.exit(%s)", template.name, exc.code)
            self.leave_now(exc.code if isinstance(exc.code, int) else int(exc.code is not None))
            raise AssertionError  # not reached
        else:
            error = exceptions.TaskError.from_exception(exc, **self._where(template.function_name))
        return Ended(call.message.counter, [ObjectState(ERROR, serialize(error).flatten())])

    def _where(self, function_name: str) -> dict[str, Any]:
        import os

        actor = self.actor.describe() if self.actor is not None else ""
        runtime = self.runtime
        return {
            "function_name": function_name.rpartition(".")[2] if not actor else function_name,
            "pid": os.getpid(), "ip": runtime.node_ip, "node_id": runtime.node_id.hex(), "actor_repr": actor,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------ life of the worker

    def _from_agent(self, message: Any) -> bool:
        match message:
            case AssignJob():
                self._assign(message)
            case BeginActor():
                self._begin = message
                self._queue.put(None)
            case EndActor():
                if self.actor is not None:
                    self.actor.end(message.cause)
                else:
                    self.leave_now(0)
            case EndProcess():
                self.leave_now(0)
            case _:
                return False
        return True

    def _assign(self, message: AssignJob) -> None:
        """From now on this worker serves one job: make its environment that of the job's driver."""
        import os

        self.runtime.set_job(message.job)
        self._devices, self._env_vars = message.devices, message.env_vars
        for name, value in message.env_vars.items():
            os.environ[name] = os.path.expandvars(value)
        gpus = message.devices.get("GPU")
        if gpus is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = _visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
        for path in reversed(message.job.sys_path):
            if path not in sys.path:
                sys.path.insert(0, path)
        if message.job.working_dir:
            try:
                os.chdir(message.job.working_dir)
            except OSError as exc:
                logger.info("the driver's working directory is not on this node: %s", exc)
        self.runtime.agent.reply(message, Done())

    def _become(self, begin: BeginActor) -> None:
        from shoal.runtime.actor_host import ActorInstance

        ActorInstance(self, begin).live()

    def leave(self, cause: str) -> None:
        """End this worker after what it has sent has left. On the main thread."""
        self.runtime.reactor.call_soon(self.runtime.agent.send, Leaving(cause))
        self.leave_now(0)

    def leave_now(self, code: int) -> None:
        """End the process as a Python program ends, but without waiting for other threads."""
        import atexit
        import os

        worker_output.flush()
        if threading.current_thread() is not self.runtime.reactor.thread:
            gone = threading.Event()
            self.runtime.reactor.call_soon(self._flush_all, gone)
            gone.wait(2.0)
            atexit._run_exitfuncs()
        worker_output.flush()
        os._exit(code & 0xFF)

    def _flush_all(self, gone: threading.Event) -> None:
        for channel in [*self.runtime.reactor.dirty, self.runtime.agent]:
            channel.flush()
        self.runtime.reactor.call_soon(gone.set)

    def current_name(self) -> str:
        """What is running on this thread, for the log's prefix."""
        if self.actor is not None:
            return self.actor.name
        call: Call | None = getattr(self._current, "call", None) or self._main
        return call.callable.template.name if call is not None else ""

    def current_call(self) -> Call | None:
        found: Call | None = getattr(self._current, "call", None)
        if found is None and self.actor is not None:
            found = self.actor.current_call()
        return found

    def context(self) -> ContextData:
        runtime, call = self.runtime, self.current_call()
        actor = self.actor
        task_id = b""
        name = function_name = ""
        assigned = dict(actor.spec.resources) if actor is not None else {}
        if call is not None:
            task_id = make_task_id(call.caller.prefix, call.message.counter)
            name, function_name = call.callable.template.name, call.callable.template.function_name
            assigned = assigned or dict(call.callable.template.resources)
        return ContextData(
            job_id=runtime.job_id, node_id=runtime.node_id, worker_id=runtime.worker_id, task_id=task_id, task_name=name,
            function_name=function_name, actor_id=actor.spec.actor_id if actor else b"",
            actor_name=actor.spec.name if actor else "", namespace=runtime.job.namespace, node_ip=runtime.node_ip,
            control_address=runtime.node_address, session_dir=runtime.session_dir, assigned=assigned,
            devices=self._devices, restarts=actor.restarts if actor else 0, env_vars=self._env_vars, is_driver=False,
        )  # fmt: skip


def _visible(numbers: list[int], allowed: str | None) -> str:
    """The devices with these numbers, in the names that this machine gives them."""
    names = [name.strip() for name in allowed.split(",") if name.strip()] if allowed else []
    return ",".join(names[number] if number < len(names) else str(number) for number in numbers)


