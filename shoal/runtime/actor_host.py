"""An actor inside its worker: construct it, run its methods in the way its class asks for, and let it go.

    synchronous, max_concurrency 1   methods run on the main thread, in the order of arrival
    max_concurrency n > 1            on n threads
    any `async def` method           on an event loop on the main thread, at most n (1000) at once
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from shoal import exceptions
from shoal.node.messages import STORED, ActorReady, BeginActor
from shoal.objects.serialization import deserialize, serialize
from shoal.runtime import worker_output
from shoal.runtime.actor_client import ActorArguments, ActorOptions
from shoal.runtime.messages import Argument, Run, Template

if TYPE_CHECKING:
    import asyncio

    from shoal.runtime.executor import Call, Executor

logger = logging.getLogger(__name__)


class ActorExit(BaseException):
    """Raised by `exit_actor()` to leave the method; only the executor catches it."""


class ActorInstance:
    """See the module. Made and run on the worker's main thread."""

    def __init__(self, executor: Executor, begin: BeginActor) -> None:
        self._executor = executor
        self.spec = begin.spec
        self.restarts = begin.restarts
        self._blob = begin.class_blob
        options = msgspec.msgpack.decode(begin.spec.options, type=ActorOptions)
        self._is_async = options.is_async
        self._concurrency = options.max_concurrency or (1000 if options.is_async else 1)
        self._depth = options.depth
        self.name = begin.spec.class_name
        self.instance: Any = None
        self.any_order = options.is_async or self._concurrency > 1
        self.takes_calls_itself = options.is_async
        self._leaving = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: asyncio.Semaphore | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._async_call: Any = None

    # ------------------------------------------------------------------------------------------------ living

    def live(self) -> None:
        """Construct, then take calls until the end. Calls that came early wait in the executor's queue."""
        executor = self._executor
        if self._is_async:
            self._live_async()
            return
        executor.actor = self
        if not self._construct():
            return
        threads = [
            threading.Thread(target=self._work, name=f"actor-{number}", daemon=True) for number in range(1, self._concurrency)
        ]
        for thread in threads:
            thread.start()
        self._work()

    def _construct(self) -> bool:
        """Run the constructor and tell the agent how it went."""
        executor, runtime = self._executor, self._executor.runtime
        runtime.depth = self._depth + 1
        runtime.leave_actor = self.leave
        error, text = b"", ""
        label = f"{self.spec.class_name}.__init__"
        try:
            cls = deserialize(self._blob)
            args, kwargs = self._arguments(label)
            self.instance = cls(*args, **kwargs)
            self.name = self._label()
        except ActorExit:
            executor.leave(self._leaving)
        except BaseException as exc:
            failure = exceptions.TaskError.from_exception(exc, **executor._where(label))
            error = serialize(failure).flatten()
            text = f"its constructor raised {type(exc).__name__}: {exc}"
        worker_output.flush()
        runtime.reactor.call_soon(runtime.agent.send, ActorReady(self.spec.actor_id, error, text))
        return not error

    def _arguments(self, label: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The constructor's arguments; those that are stored are fetched here, since nothing else can run yet."""
        from shoal.runtime.executor import Call, _Callable, _Caller
        from shoal.runtime.object_ref import ObjectRef

        if not self.spec.arguments:
            return (), {}
        packed = msgspec.msgpack.decode(self.spec.arguments, type=ActorArguments)
        arguments = [msgspec.convert(item, Argument) for item in packed.arguments]
        message = Run(0, 0, packed.args, packed.kwargs, arguments, packed.packed)
        call = Call(_Caller(self._executor.runtime.agent), _Callable(Template(0, label, label, 0)), message)
        for argument in arguments:
            if argument.state.state != STORED:
                call.values.append(argument.state.payload)
                continue
            ref: ObjectRef[Any] = ObjectRef(argument.object_id, argument.home, owned=False)
            call.values.append(self._fetch(ref))
        return call.arguments()

    def _fetch(self, ref: Any) -> memoryview | bytes:
        from shoal.node.messages import INLINE, Resolve
        from shoal.rpc.messages import Failed

        runtime = self._executor.runtime
        reply = runtime.ask_agent(Resolve(object_id=ref.binary(), home=ref.home, fetch=True))
        if isinstance(reply, Failed):
            raise runtime.problem_of(ref, reply)
        if reply.state.state == STORED:
            return runtime.view_of(ref, reply)
        if reply.state.state == INLINE:
            return bytes(reply.state.payload)
        ref.state, ref.value = reply.state.state, reply.state.payload
        raise runtime.error_of(ref)

    def _label(self) -> str:
        """What the log's prefix shows: the user's own repr, where the class has one."""
        own_repr: Any = type(self.instance).__repr__
        if own_repr is object.__repr__:
            return self.spec.class_name
        try:
            return repr(self.instance)
        except Exception as exc:
            logger.info("repr() of %s raised %s", self.spec.class_name, exc)
            return self.spec.class_name

    def describe(self) -> str:
        return self.name

    def method(self, name: str) -> Callable[..., Any]:
        """The callable behind a method name, hidden ones included."""
        match name:
            case "__ray_ready__" | "__shoal_ready__":
                return lambda: True
            case "__ray_call__" | "__shoal_call__":
                return lambda function, *args, **kwargs: function(self.instance, *args, **kwargs)
            case "__ray_terminate__" | "__shoal_terminate__":
                return self.leave
        found: Callable[..., Any] = getattr(self.instance, name)
        return found

    # ------------------------------------------------------------------------------------------- synchronous

    def _work(self) -> None:
        """Run calls on this thread, one after the other."""
        executor = self._executor
        take = executor._queue.get
        while True:
            call = take()
            if call is None:
                executor._queue.put(None)  # for the other threads
                break
            executor.execute(call)
            if self._leaving:
                break
        if threading.current_thread() is threading.main_thread():
            self._destroy()
            executor.leave(self._leaving or "it was told to end")

    def _destroy(self) -> None:
        """Let the instance go, so that its `__del__` runs while the process is whole."""
        self._executor._current.call = None
        self.instance = None

    def leave(self) -> None:
        """`exit_actor()`: on whatever thread runs the method."""
        self._leaving = "exit_actor() was called"
        self._executor._queue.put(None)
        raise ActorExit

    def end(self, cause: str) -> None:
        """The last handle is gone, or control stops it: finish what was accepted. On the reactor's thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_async, cause)
        else:
            self._executor._queue.put(None)

    # ------------------------------------------------------------------------------------------------- async

    def _live_async(self) -> None:
        import asyncio
        import contextvars

        self._async_call = contextvars.ContextVar("shoal_call", default=None)
        self._loop = loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        self._slots = asyncio.Semaphore(self._concurrency)
        self._executor.actor = self
        backlog = []
        while not self._executor._queue.empty():
            backlog.append(self._executor._queue.get_nowait())
        loop.call_soon(self._begin_async, backlog)
        loop.run_forever()

    def _begin_async(self, backlog: list[Call | None]) -> None:
        assert self._loop is not None
        if not self._construct():
            self._loop.stop()
            return
        for call in backlog:
            if call is None:
                self._end_async("it was told to end")
            else:
                self._start(call)

    def submit(self, call: Call) -> None:
        """A call for an async actor, from the reactor's thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._start, call)

    def _start(self, call: Call) -> None:
        assert self._loop is not None
        task = self._loop.create_task(self._run_async(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_async(self, call: Call) -> None:
        executor = self._executor
        assert self._slots is not None
        async with self._slots:
            self._async_call.set(call)
            try:
                if call.problem is not None:
                    reply: Any = executor._failed(call, call.problem)
                else:
                    function = call.callable.function or executor._load(call.callable)
                    args, kwargs = call.arguments()
                    value = function(*args, **kwargs)
                    if inspect.isawaitable(value):
                        value = await value
                    reply = executor._reply(call, value)
                    del args, kwargs, value
            except BaseException as exc:
                reply = executor._raised(call, exc)
            call.values = []
        executor.send_reply(call, reply)
        if self._leaving:
            self._end_async(self._leaving)

    def current_call(self) -> Call | None:
        if self._async_call is None:
            return None
        call: Call | None = self._async_call.get()
        return call

    def _end_async(self, cause: str) -> None:
        import asyncio

        assert self._loop is not None
        current = asyncio.current_task(self._loop)
        others = [task for task in self._tasks if task is not current]
        if self._leaving:
            others = []  # exit_actor() does not wait for other calls
        self._loop.create_task(self._finish_async(others, cause))

    async def _finish_async(self, others: list[asyncio.Task[None]], cause: str) -> None:
        import asyncio

        if others:
            await asyncio.wait(others)
        self._destroy()
        self._executor.leave(cause)


