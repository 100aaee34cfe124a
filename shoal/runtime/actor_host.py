"""An actor inside its worker: construct it, run its methods in the way its class asks for, and let it go.

    synchronous, max_concurrency 1   methods run on the main thread, in the order of arrival
    max_concurrency n > 1, or        on up to n threads of each group, made when they are needed (see `call_threads`);
    concurrency groups               the main thread waits for the end
    any `async def` method           on an event loop on the main thread (see `async_actor`)

However it ends, the end is on the main thread: the instance goes (so that its `__del__` runs while the process is
whole), exit handlers run, and the agent hears the cause. Three things end it: `exit_actor()` or `sys.exit()` in it,
which wait for no other call; and the agent (`end`), when the last handle is gone, after all calls that were accepted.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import msgspec

from shoal import exceptions
from shoal.node.messages import ActorReady, BeginActor
from shoal.objects.serialization import deserialize, serialize
from shoal.runtime import worker_exit, worker_output
from shoal.runtime.actor_client import ActorArguments, ActorOptions
from shoal.runtime.call_threads import Calls, CallThreads
from shoal.runtime.calls import Arrival, Call
from shoal.runtime.execution import ActorExit, CallRunner
from shoal.runtime.messages import Argument, Run
from shoal.runtime.nesting import nest
from shoal.runtime.object_ref import ObjectRef

logger = logging.getLogger(__name__)

MAX_LABEL_CHARS: Final = 200
EXIT_CAUSE: Final = "exit_actor() was called"
TERMINATE_CAUSE: Final = "__ray_terminate__() was called"


class ActorInstance:
    """An actor with its instance; made on the reactor's thread, lives on the main thread. Subclasses run its calls.

    Attributes:
        any_order: calls of one caller may begin in another order than they were sent, whatever their group.
        instance: the user's object, None before the constructor has returned and after the end.
        leaving: why it ends before the calls that wait, "" while it does not.
    """

    def __init__(self, runner: CallRunner, begin: BeginActor, options: ActorOptions) -> None:
        self.spec = begin.spec
        self.restarts = begin.restarts
        self.instance: Any = None
        self.leaving = ""
        self._runner = runner
        self._runtime = runner.runtime
        self._blob = begin.class_blob
        self._depth = options.depth
        # Which groups keep the order of calls that wait for arguments: those that run one call at a time.
        ordered = [] if options.any_order or options.max_concurrency > 1 or options.is_async else [""]
        ordered += [name for name, size in options.groups.items() if size == 1]
        self._ordered = frozenset(ordered)
        self.any_order = not ordered
        self._label = begin.spec.class_name
        self._exit_code = 0
        self._arguments, self._all_here = self._fetch_arguments()
        runner.runtime.leave_actor = self.leave

    @property
    def label(self) -> str:
        return self._label

    # ------------------------------------------------------------------------------- what the reactor's thread asks

    def keeps_order(self, call: Call) -> bool:
        """Whether calls of the same caller and group may not begin before this one."""
        return call.target.template.group in self._ordered

    def submit(self, call: Call) -> None:
        """Run this when its turn comes. On the reactor's thread."""
        raise NotImplementedError

    def end(self, cause: str) -> None:
        """Leave after what was submitted. On the reactor's thread."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------- what the main thread does

    def live(self) -> NoReturn:
        """Construct, run calls until the end, and end the process."""
        self._runner.title.fix(self.spec.class_name)
        threading.excepthook = _report_unless_leaving
        cause = self._run()
        self.instance = None
        self._runner.forget_methods()
        self._runner.await_taken()
        if self._exit_code:
            worker_exit.end_process(self._runtime, self._exit_code)
        worker_exit.leave(self._runtime, cause)

    def _run(self) -> str:
        """Construct and run calls; returns why it ends."""
        raise NotImplementedError

    def construct(self) -> str:
        """Run the constructor and tell the agent how it went; returns why the actor must end, "" if it lives."""
        runtime, spec = self._runtime, self.spec
        runtime.nesting = nest(self._depth + 1, spec.priority, False)
        label = f"{spec.class_name}.__init__"
        error, text = b"", ""
        worker_output.flush(self._label)
        try:
            cls = deserialize(self._blob)
            args, kwargs = self._take_arguments()
            self.instance = cls(*args, **kwargs)
            self._label = self._describe()
        except ActorExit:
            return self.leaving
        except SystemExit as exc:
            self._exit_code = worker_exit.status_of(exc)
            return f"its constructor called sys.exit({exc.code})"
        except BaseException as exc:  # noqa: BLE001 - the boundary of user code
            failure = exceptions.TaskError.from_exception(exc, **self._runner.where(label))
            error = serialize(failure).flatten()
            text = f"its constructor raised {type(exc).__name__}: {exc}"
        worker_output.flush(self._label)
        runtime.reactor.call_soon(runtime.agent.send, ActorReady(spec.actor_id, error, text))
        return text

    def _fetch_arguments(self) -> tuple[Arrival, threading.Event]:
        """Begin to get the constructor's arguments; the event is set when all are here."""
        here = threading.Event()
        if not self.spec.arguments:
            here.set()
            return Arrival(Run(0, 0)), here
        packed = msgspec.msgpack.decode(self.spec.arguments, type=ActorArguments)
        arguments = [msgspec.convert(item, Argument) for item in packed.arguments]
        arrival = Arrival(Run(0, 0, packed.args, packed.kwargs, arguments, packed.packed))
        arrival.fetch(self._runtime, here.set)
        if not arrival.missing:
            here.set()
        return arrival, here

    def _take_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Raises what an argument failed with."""
        self._all_here.wait()
        arrival = self._arguments
        del self._arguments  # what it pins is the constructor's to keep
        if arrival.problem is not None:
            failed: ObjectRef[Any] = ObjectRef(self.spec.actor_id, b"", owned=False)
            failed.value, failed.state = arrival.problem.payload, arrival.problem.state
            raise self._runtime.error_of(failed)
        return arrival.arguments()

    def _describe(self) -> str:
        """What the log's prefix shows: the user's own repr, where the class has one."""
        own_repr: Any = type(self.instance).__repr__
        if own_repr is object.__repr__:
            return self.spec.class_name
        try:
            return str(repr(self.instance))[:MAX_LABEL_CHARS]
        except Exception as exc:  # noqa: BLE001 - the user's code
            logger.info("repr() of %s raised %s", self.spec.class_name, exc)
            return self.spec.class_name

    # --------------------------------------------------------------------------------------------- what calls need

    def method(self, name: str) -> Callable[..., Any]:
        """The callable behind a method name, those included that every actor has. Raises AttributeError."""
        match name:
            case "__ray_ready__" | "__shoal_ready__":
                return lambda: True
            case "__ray_call__" | "__shoal_call__":
                return lambda function, *args, **kwargs: function(self.instance, *args, **kwargs)
            case "__ray_terminate__" | "__shoal_terminate__":
                return lambda: self.leave(TERMINATE_CAUSE)
        if self.instance is None:
            raise ActorExit  # it has left, and this is another thread: its end is the answer
        found: Callable[..., Any] = getattr(self.instance, name)
        return found

    def current_call(self) -> Call | None:
        return None

    def running_calls(self) -> Sequence[Call]:
        return self._runner.running_calls()

    def interrupt(self, call: Call) -> bool:
        return False  # it asks `is_canceled()`, or not

    def leave(self, cause: str = EXIT_CAUSE) -> NoReturn:
        """`exit_actor()`, on whatever thread of this process calls it: leaves the method by an exception."""
        self.leaving = self.leaving or cause
        self.wake_to_leave()
        raise ActorExit

    def exit(self, code: int) -> None:
        self._exit_code = code
        self.leaving = self.leaving or f"sys.exit({code}) was called"
        self.wake_to_leave()

    def wake_to_leave(self) -> None:
        """`leaving` was set: have the main thread see it. Any thread."""
        raise NotImplementedError


def _report_unless_leaving(args: threading.ExceptHookArgs) -> None:
    """A thread of user code that called `exit_actor()` has nothing to report."""
    if args.exc_type is not ActorExit:
        threading.__excepthook__(args)


class SequentialActor(ActorInstance):
    """One call at a time, on the main thread."""

    _end_cause = ""

    def submit(self, call: Call) -> None:
        self._runner.queue.put(call)

    def end(self, cause: str) -> None:
        self._end_cause = cause
        self._runner.queue.put(None)

    def wake_to_leave(self) -> None:
        self._runner.queue.put(None)

    def _run(self) -> str:
        failure = self.construct()
        if failure:
            return failure
        runner = self._runner
        take, execute = runner.next_call, runner.execute
        while not self.leaving:
            call = take()
            if call is None:
                break
            runner.running = call
            execute(call)
            runner.running = None
        return self.leaving or self._end_cause


class ThreadedActor(ActorInstance):
    """Up to `max_concurrency` calls at a time, and as many of each concurrency group, each on a thread."""

    def __init__(self, runner: CallRunner, begin: BeginActor, options: ActorOptions) -> None:
        super().__init__(runner, begin, options)
        self._end_cause = ""
        self._over: queue.SimpleQueue[str] = queue.SimpleQueue()  # the main thread waits here
        self._main = self._threads(runner.queue, "actor", options.max_concurrency)
        self._groups = {name: self._threads(queue.SimpleQueue(), name, most) for name, most in options.groups.items()}
        self._working = 1 + len(self._groups)  # groups that have not ended
        self._lock = threading.Lock()

    def _threads(self, calls: Calls, name: str, most: int) -> CallThreads:
        return CallThreads(name, most, calls, self._runner.execute, lambda: self.leaving, self._group_over)

    def submit(self, call: Call) -> None:
        self._groups.get(call.target.template.group, self._main).submit(call)

    def end(self, cause: str) -> None:
        self._end_cause = cause
        for threads in (self._main, *self._groups.values()):
            threads.end()

    def _group_over(self) -> None:
        with self._lock:
            self._working -= 1
            last = self._working == 0
        if last:
            self._over.put(self._end_cause)

    def wake_to_leave(self) -> None:
        self._over.put("")

    def _run(self) -> str:
        failure = self.construct()
        return failure or self.leaving or self._over.get() or self.leaving
