"""Running calls inside a worker: from a `Call` whose arguments are here to the reply that leaves for its owner.

User code runs on the process's main thread (for an actor also on more threads, or on an event loop on the main thread;
see `actor_host`), and a result leaves from the thread that made it, without waking the reactor. Results of short calls
travel together, but never wait for a call that is not known to be short, and for `HOLD_BACK_S` at most.

`CallRunner` is what the executor (which receives calls), the main thread and an actor share. It owns the queue of calls
that wait for a thread, and knows what each thread runs.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import GeneratorType
from typing import Any, Final, NoReturn, Protocol

import msgspec

from shoal import exceptions
from shoal.node.messages import ERROR, INLINE, STORED, ObjectState
from shoal.objects.ids import make_object_id
from shoal.objects.serialization import NONE_FLAT, Serialized, deserialize, serialize
from shoal.rpc.frames import encode_message
from shoal.runtime import worker_exit, worker_output
from shoal.runtime.calls import Call, Caller, Target
from shoal.runtime.core import INLINE_BYTES, CoreRuntime
from shoal.runtime.endings import Endings, dropped_state
from shoal.runtime.messages import STREAMED, Ended, Finished, Pace
from shoal.runtime.process_title import ProcessTitle
from shoal.runtime.retrying import covers, describe
from shoal.runtime.task_events import TaskEvents
from shoal.runtime.yielding import produce

logger = logging.getLogger(__name__)

SHORT_S: Final = 0.0005
"""A call expected to take less than this may run before the results of its predecessors have left."""
HOLD_BACK_S: Final = 0.001
MAX_FUNCTIONS: Final = 1000
TAKEN_S: Final = 2.0
"""How long a worker that leaves waits until the owners of its results have counted the references in them."""


class ActorExit(BaseException):
    """Raised by `exit_actor()` to leave the method. Its call gets no reply: it fails with the actor's end."""


class Actor(Protocol):
    """What running calls needs to know of the actor that lives here."""

    @property
    def label(self) -> str:
        """What people see: the class's name, or the user's own repr of the instance."""

    def method(self, name: str) -> Callable[..., Any]:
        """The callable behind a method name. Raises AttributeError."""

    def current_call(self) -> Call | None:
        """What the calling code belongs to, where the thread alone does not say."""

    def exit(self, code: int) -> None:
        """A method called `sys.exit(code)`. On the thread that runs it; another thread may end the process."""


class CallRunner:
    """See the module. One per worker process.

    Attributes:
        queue: calls that wait for a thread; None wakes one up for another reason: the worker becomes an actor, or ends.
        actor: set once, on the reactor's thread, before the first call of the actor arrives.
        running: the call that the main thread runs, for others to look at.
        events: what ran here; None when nobody is to remember it.
    """

    def __init__(self, runtime: CoreRuntime) -> None:
        self.runtime = runtime
        self.queue: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self.actor: Actor | None = None
        self.running: Call | None = None
        self.events: TaskEvents | None = None
        self.title = ProcessTitle(runtime.reactor, self._running_target)
        self.calls: dict[int, Call] = {}  # that run now, by thread
        self.endings = Endings(runtime, self.running_calls)
        self.interrupts = self.endings.interrupts
        self._target: Target | None = None  # of the last call
        self._functions: dict[bytes, Callable[..., Any]] = {}  # by code: many callers may send the same
        self._handing_over: set[Caller] = set()  # those that have not counted the references in some result
        self._all_taken: threading.Event | None = None  # somebody waits for that
        self._methods: weakref.WeakSet[Target] = weakref.WeakSet()  # those with a bound method of the actor's instance
        self._flushed_at = 0.0

    # -------------------------------------------------------------------------------------------------- running

    def next_call(self) -> Call | None:
        """Wait for what this thread is to run next. For the main thread, which brings it itself if it comes soon."""
        waiting = self.queue
        if waiting.empty():
            self.runtime.reactor.lead(self._something_waits)
        return waiting.get()

    def _something_waits(self) -> bool:
        return not self.queue.empty()

    def execute(self, call: Call) -> None:
        """Run one call on this thread and send what came of it."""
        target, caller = call.target, call.caller
        begin = time.perf_counter()
        pace = target.pace_s
        if caller.flush_due and (
            pace is None or pace > SHORT_S or target.template.once or begin - self._flushed_at > HOLD_BACK_S
        ):
            self.flush(caller)
        if target is not self.title.shown:
            self.title.show(target, begin)
        if target is not self._target:
            self._prepare_for(target)
        call.started = begin
        thread = threading.get_ident()
        self.calls[thread] = call  # from here on it can be cancelled
        timed = target.timed
        interrupts = self.interrupts
        called = returned = 0.0
        reply: Finished | Ended | None
        try:
            reply = None if call.problem is None and not caller.dropped else self.refused(call)
            if reply is None:
                interrupts.user_call = call
                if call.ending is not None:
                    raise KeyboardInterrupt  # before there was anything to interrupt
                function = target.function or self.load(target)
                args, kwargs = call.arguments()
                if timed:
                    self.endings.begin(call)
                called = time.perf_counter()
                value = function(*args, **kwargs)
                interrupts.user_call = None
                returned = time.perf_counter()
                args = kwargs = None  # type: ignore[assignment]  # what they pinned goes before the owner hears of the end
                reply = self.reply(call, value) if not timed else self.reply_in_time(call, value)
                value = None
        except BaseException as exc:  # noqa: BLE001 - the boundary of user code
            interrupts.user_call = None  # first, with no call before it: see `interrupts`
            reply = self.raised(call, exc)
        ended = time.perf_counter()
        self._measure(target, caller, ended - begin)
        if self.events is not None:
            self.events.record(
                (target, caller.prefix, call.message.counter, call.fetched, begin, called, returned, ended)
            )
        call.values = []
        del self.calls[thread]
        if target.max_calls:
            target.uses += 1
            if target.uses >= target.max_calls:
                self._reply_and_leave(call, reply)
        if reply is not None:
            self.send(call, reply)
        else:
            caller.productions.pop(call.message.counter, None)

    def _prepare_for(self, target: Target) -> None:
        """Calls of another template than before are run: what they submit belongs elsewhere."""
        self._target = target
        self.runtime.nesting = target.nesting
        if self.actor is None and target.captured != self.runtime.inherited.group:
            self.runtime.inherit(target.captured)

    def _reply_and_leave(self, call: Call, reply: Finished | Ended | None) -> NoReturn:
        template = call.target.template
        # First the agent: once the owner has its result it returns the lease, and nobody must be given this worker.
        worker_exit.announce(self.runtime, f"{template.name} ran max_calls={template.max_calls} times here")
        if type(reply) is Finished:
            reply = Ended(reply.counter, [ObjectState(INLINE, reply.payload)], leaving=True)
        elif reply is not None:
            msgspec.structs.force_setattr(reply, "leaving", True)
        if reply is not None:
            self.post(call, reply)
        self.flush(call.caller)
        self.await_taken()
        worker_exit.end_process(self.runtime, 0)

    def load(self, target: Target) -> Callable[..., Any]:
        """The user's function or bound method; unpickled once per code."""
        template = target.template
        if template.method:
            if self.actor is None:
                raise exceptions.ShoalSystemError(f"{template.name} was sent to a worker that is no actor")
            target.function = self.actor.method(template.method)
            self._methods.add(target)
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

    def forget_methods(self) -> None:
        """The actor's instance is to go: nothing here may keep it."""
        for target in list(self._methods):
            target.function = None

    def _measure(self, target: Target, caller: Caller, seconds: float) -> None:
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
            caller.channel.post(encode_message(Pace(target.template.template_id, pace)))

    # -------------------------------------------------------------------------------------------------- replies

    def reply(self, call: Call, value: Any) -> Finished | Ended:
        """What to send for a returned value: inline when it is small, else its bytes go to the store.

        Raises:
            ValueError: not as many values as `num_returns`. TypeError: one cannot be pickled. ObjectStoreFullError.
        """
        template = call.target.template
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
        elif template.num_returns == STREAMED:
            return value if type(value) is Ended else produce(self, call, value)  # an actor's event loop has done it
        else:
            values = list(value) if isinstance(value, (tuple, list, GeneratorType)) else None
            if values is None or len(values) != template.num_returns:
                got = f"{len(values)} values" if values is not None else f"a {type(value).__name__}"
                raise ValueError(
                    f"{template.name} has num_returns={template.num_returns} and must return a tuple or list of as "
                    f"many values; it returned {got}"
                )
            results = [serialize(one, f"result {i} of {template.name}") for i, one in enumerate(values)]
        return self._large_reply(call, results)

    def _large_reply(self, call: Call, results: list[Any]) -> Ended:
        counter = call.message.counter
        states = []
        kept: list[Any] = []
        for index, result in enumerate(results):
            states.append(self.state_of(call, result, index + 1, kept))
        if kept:
            self.keep_for_owner(call.caller, counter, kept)
        return Ended(counter, states, bool(kept))

    def state_of(self, call: Call, result: Serialized, index: int, kept: list[Any]) -> ObjectState:
        """A result as it travels, its bytes in the store if it is large; what it refers to is added to `kept`.

        Raises:
            ObjectStoreFullError.
        """
        runtime, caller = self.runtime, call.caller
        refs = runtime.contained_refs(result) if result.refs else []
        kept.extend(refs)
        contained = [(ref.binary(), ref.home) for ref in refs]
        if result.flat_size <= INLINE_BYTES:
            return ObjectState(INLINE, result.flatten(), contained=contained)
        object_id = make_object_id(caller.prefix, call.message.counter, index)
        runtime.store(result, object_id, caller.node_id, caller.worker_id, refs)
        return ObjectState(STORED, b"", result.flat_size, [runtime.node_id], contained)

    def keep_for_owner(self, caller: Caller, key: int | tuple[int, int], refs: list[Any]) -> None:
        """Keep what results refer to until the owner says `Taken`. By a thread of user code."""
        caller.handover[key] = refs
        self._handing_over.add(caller)
        self.runtime.reactor.call_soon(self.runtime.publish_all, refs)

    def taken(self, caller: Caller, key: int | tuple[int, int]) -> None:
        """The owner has counted what a result refers to: it need not be kept here. On the reactor's thread."""
        caller.handover.pop(key, None)
        if not caller.handover:
            self._end_handover(caller)

    def caller_gone(self, caller: Caller) -> None:
        """On the reactor's thread."""
        for production in caller.productions.values():
            production.stop()
        caller.handover.clear()
        self._end_handover(caller)

    def _end_handover(self, caller: Caller) -> None:
        self._handing_over.discard(caller)
        if caller.handover:  # a result that was made meanwhile
            self._handing_over.add(caller)
        if self._all_taken is not None and not self._handing_over:
            self._all_taken.set()

    def await_taken(self) -> None:
        """Before this process ends: wait until nothing is kept for owners any more. By a thread of user code."""
        taken = threading.Event()
        # Replies of calls that borrowed references wait until those are counted, and are on their way then.
        self.runtime.reactor.call_soon(self.runtime.after_uses, lambda: self._watch_handovers(taken))
        if not taken.wait(TAKEN_S):
            logger.info("leaving although owners have not counted the references in their results")

    def _watch_handovers(self, taken: threading.Event) -> None:
        self._all_taken = taken
        if not self._handing_over:
            taken.set()

    def refused(self, call: Call) -> Ended | None:
        """The answer to a call that will not run: an argument failed, or its owner cancelled it. None: it will."""
        if call.problem is not None:
            return self.failed(call, call.problem)
        if call.message.counter in call.caller.dropped:
            return self.failed(call, dropped_state(call.caller, call.message.counter))
        return None

    def reply_in_time(self, call: Call, value: Any) -> Finished | Ended | None:
        """As `reply`, unless the call's time was over before its code was."""
        if call.target.template.num_returns == STREAMED:
            value = self.reply(call, value)  # runs its code
        ending = self.endings.over(call)
        if ending is not None and ending.timed_out:
            return self.endings.reply(call, ending, None)
        return self.reply(call, value)

    def failed(self, call: Call, state: ObjectState) -> Ended:
        """An argument failed: so does the call, with the same error."""
        return Ended(call.message.counter, [state])

    def raised(self, call: Call, exc: BaseException) -> Ended | None:
        """What to send for an exception of user code; None when the process ends and its end is the answer."""
        template = call.target.template
        if isinstance(exc, ActorExit):
            return None
        ending = self.endings.over(call)
        if ending is not None:
            return self.endings.reply(call, ending, exc)
        if isinstance(exc, SystemExit):
            self.flush(call.caller)
            code = worker_exit.status_of(exc)
            logger.info("%s called sys.exit(%s)", template.name, exc.code)
            if self.actor is None:
                worker_exit.end_process(self.runtime, code)
            self.actor.exit(code)
            return None
        error = exceptions.TaskError.from_exception(exc, **self.where(template.function_name))
        retry = describe(exc) if covers(template.retry_on, exc) else ""
        return Ended(call.message.counter, [ObjectState(ERROR, serialize(error).flatten())], retry=retry)

    def where(self, function_name: str) -> dict[str, Any]:
        """What a `TaskError` says besides its traceback."""
        actor, runtime = self.actor, self.runtime
        return {
            "function_name": function_name.rpartition(".")[2] if actor is None else function_name,
            "pid": os.getpid(), "ip": runtime.node_ip, "node_id": runtime.node_id.hex(),
            "actor_repr": actor.label if actor is not None else "",
        }  # fmt: skip

    def send(self, call: Call, reply: Finished | Ended) -> None:
        """Send now if nothing follows soon, else with what follows. Any thread."""
        self.post(call, reply)
        caller = call.caller
        if self.queue.empty():
            worker_output.flush(self.actor.label if self.actor is not None else "")  # begun lines are this call's
            self.flush(caller)
        elif call.target.template.once:
            self.flush(caller)
        elif not caller.flush_due:
            caller.flush_due = True
            self.runtime.reactor.call_soon(self._flush_due, caller)  # in case what runs next takes long

    def post(self, call: Call, reply: Finished | Ended) -> None:
        """Put a reply where the next `flush` of its caller takes it. Any thread."""
        runtime, caller = self.runtime, call.caller
        encoded = encode_message(reply)
        late = type(reply) is Ended and (self._end_stream(call) or any(one.state == STORED for one in reply.results))
        if late or runtime.uses_counted < runtime.uses_begun:
            # The call borrowed references: the owner may let go of its own only when ours are counted.
            runtime.reactor.call_soon(runtime.after_uses, partial(self._send_sealed, caller, encoded))
            return
        caller.channel.post(encoded)

    def _end_stream(self, call: Call) -> bool:
        """Before the last word on a call: send what it has yielded. True: something may be left for the reactor."""
        if call.target.template.num_returns != STREAMED:
            return False
        call.caller.productions.pop(call.message.counter).send()
        return True

    def _send_sealed(self, caller: Caller, reply: bytes) -> None:
        """The owner will wait for the agent's word that a value is sealed: it must be out when this process dies."""
        self.runtime.agent.flush()
        caller.channel.send_encoded(reply)

    def flush(self, caller: Caller) -> None:
        """Write what was posted to this caller. Any thread."""
        self._flushed_at = time.perf_counter()
        caller.channel.flush_here()

    def _flush_due(self, caller: Caller) -> None:
        caller.flush_due = False  # first: what is posted from here on has to ask again
        caller.channel.flush()

    # ------------------------------------------------------------------------------------------- who is running

    def current_call(self) -> Call | None:
        """The call that the calling code belongs to; None in threads that user code made."""
        found = self.calls.get(threading.get_ident())
        if found is None and self.actor is not None:
            found = self.actor.current_call()
        return found

    def running_calls(self) -> Sequence[Call]:
        """Those that run on threads. Any thread."""
        return tuple(self.calls.values())

    def begin_of_caller(self) -> float:
        """When the call began that the calling code belongs to: names it; 0.0 for none. Any thread.

        Threads that user code made belong to the call of the main thread, where there is only one at a time.
        """
        call = self.current_call() or self.running
        return call.started if call is not None else 0.0

    def is_cancelled(self) -> bool:
        """Whether the call that the calling code belongs to is to end. Any thread."""
        call = self.current_call() or self.running
        return call is not None and call.ending is not None

    def _running_target(self) -> Target | None:
        call = self.running
        return call.target if call is not None else None

    def current_name(self) -> str:
        """What is running on this thread, for the log's prefix."""
        if self.actor is not None:
            return self.actor.label
        call = self.calls.get(threading.get_ident()) or self.running
        return call.target.template.name if call is not None else ""
