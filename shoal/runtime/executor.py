"""The worker's shell: takes calls from their owners and orders from the agent, on the reactor's thread.

A call waits here until its arguments are on this node, and then goes to the main thread through the `CallRunner`'s
queue, or to the actor that this worker has become. Tasks that would wait behind one that blocks or runs long go back
to their owner. An actor's calls keep their order per caller: one whose arguments are still on the way holds up those
that the same caller sent after it, unless the actor takes calls in any order.
"""

from __future__ import annotations

import collections
import importlib
import logging
import os
import queue
import sys
import time
from typing import Any, Final

import msgspec

from shoal.node.messages import AssignJob, BeginActor, EndActor, EndProcess, GetTaskEvents, RunsLong, TaskEvents
from shoal.objects.ids import make_task_id
from shoal.rpc.frames import make_decoder
from shoal.rpc.messages import Done, Hello
from shoal.rpc.reactor import Acceptor, Channel
from shoal.runtime import devices, job_logging, worker_exit
from shoal.runtime.actor_client import ActorOptions
from shoal.runtime.actor_host import ActorInstance, SequentialActor, ThreadedActor
from shoal.runtime.async_actor import AsyncActor
from shoal.runtime.calls import Call, Caller, Target
from shoal.runtime.core import CoreRuntime
from shoal.runtime.execution import CallRunner
from shoal.runtime.interface import ContextData
from shoal.runtime.messages import (
    Arrived,
    BeginStream,
    Cancel,
    Consumed,
    HandedBack,
    Introduce,
    Run,
    StopStream,
    Taken,
    Template,
    ToWorker,
)
from shoal.runtime.yielding import Production

logger = logging.getLogger(__name__)

STUCK_S: Final = 0.01
"""A task that runs longer hands back those queued behind it; looked for this often while any are queued."""
LONG_S: Final = 0.05
"""A task that needs next to nothing and runs longer makes room for others: see `LeaseScheduler.set_slow`."""

_decoder = make_decoder(ToWorker)


class Executor:
    """See the module. One per worker process."""

    _acceptor: Acceptor

    def __init__(self, runtime: CoreRuntime) -> None:
        self.runtime = runtime
        self.runner = CallRunner(runtime)
        self._actor: ActorInstance | None = None
        self._underway = 0  # the actor's calls whose arguments, or predecessors, are not here yet
        self._end_cause: str | None = None  # the actor is to end when those have come
        self._watching = False
        self._told_of = 0.0  # when the call began of which the agent was told last that it runs long
        self._devices: dict[str, list[int | str]] = {}
        self._env_vars: dict[str, str] = {}
        runtime.on_agent_message = self._from_agent
        runtime.before_blocking = self._hand_back_queue
        runtime.describe_context = self.context
        runtime.pack_events = self._pack_events
        runtime.find_parent = self.runner.begin_of_caller

    def listen(self, socket_path: str) -> None:
        """Let callers in."""
        runtime = self.runtime
        self._acceptor = Acceptor(
            runtime.reactor, socket_path, runtime.token, runtime.name, self._new_channel, self._opened
        )

    def run(self) -> None:
        """The main thread's life: run tasks until told to end, or become an actor for good."""
        runner = self.runner
        take = runner.next_call
        while True:
            call = take()
            if call is None:
                break
            runner.running = call
            runner.execute(call)
            runner.running = None
        if self._actor is not None:
            self._actor.live()

    # ------------------------------------------------------------------------------------------ owners' messages

    def _new_channel(self) -> Channel:
        return Channel(self.runtime.reactor, _decoder, self._from_owner, self._owner_gone)

    def _opened(self, channel: Channel, _hello: Hello) -> None:
        channel.context = Caller(channel)

    def _owner_gone(self, channel: Channel, _reason: Exception) -> None:
        caller: Caller | None = channel.context
        if caller is not None:
            self.runner.caller_gone(caller)

    def _from_owner(self, channel: Channel, message: Any) -> None:
        caller: Caller = channel.context
        kind = type(message)
        if kind is Run:
            self._arrived(caller, Call(caller, caller.targets[message.template_id], message))
        elif kind is Template:
            caller.targets.append(Target(message))
        elif kind is Introduce:
            caller.introduce(message)
        elif kind is Taken:
            self.runner.taken(caller, (message.counter, message.first) if message.first else message.counter)
        elif kind is BeginStream:
            caller.productions[message.counter] = Production(self.runner, caller, message)
        elif kind is Cancel:
            self.runner.endings.cancel(caller, message)
        else:
            production = caller.productions.get(message.counter)  # None: it has ended, and its end is on its way
            if production is not None:
                _tell(production, message)

    def _arrived(self, caller: Caller, call: Call) -> None:
        if call.message.arguments:
            call.fetch(self.runtime, lambda: self._complete(call))
        actor = self._actor
        if actor is None:
            if call.missing == 0:
                self._enqueue_task(call)
            return
        if call.missing == 0 and (actor.any_order or not caller.held):
            actor.submit(call)
            return
        if not actor.keeps_order(call):
            if call.missing == 0:
                actor.submit(call)
            else:
                self._underway += 1
            return
        held = caller.held.get(call.target.template.group)
        if held is None:
            if call.missing == 0:
                actor.submit(call)
                return
            held = caller.held[call.target.template.group] = collections.deque()
        self._underway += 1
        held.append(call)

    def _complete(self, call: Call) -> None:
        """The last of its arguments has come."""
        actor = self._actor
        if actor is None:
            self._enqueue_task(call)
        elif not actor.keeps_order(call):
            self._submit_late(actor, call)
        else:
            group = call.target.template.group
            held = call.caller.held[group]
            while held and held[0].missing == 0:
                self._submit_late(actor, held.popleft())
            if not held:
                del call.caller.held[group]

    def _submit_late(self, actor: ActorInstance, call: Call) -> None:
        self._underway -= 1
        actor.submit(call)
        if self._underway == 0 and self._end_cause is not None:
            actor.end(self._end_cause)

    # ----------------------------------------------------------------------------------------------------- tasks

    def _enqueue_task(self, call: Call) -> None:
        self.runner.queue.put(call)
        if not self._watching:
            self._watching = True
            self.runtime.reactor.call_later(STUCK_S, self._look_for_stuck)

    def _look_for_stuck(self) -> None:
        """While tasks are queued: see that none waits behind one that takes long. And tell of light ones that do."""
        self._watching = False
        running = self.runner.running
        lasts_s = time.perf_counter() - running.started if running is not None and running.started else 0.0
        if lasts_s > STUCK_S:
            self._return_queued()
        watched = running is not None and running.target.light and running.started != self._told_of
        if running is not None and watched and lasts_s > LONG_S:
            self._told_of, watched = running.started, False
            self.runtime.agent.send(RunsLong())
        if not watched and (lasts_s > STUCK_S or self.runner.queue.empty()):
            return
        self._watching = True
        self.runtime.reactor.call_later(STUCK_S, self._look_for_stuck)

    def _hand_back_queue(self) -> None:
        """The main thread is about to wait for something."""
        if self._actor is None and not self.runner.queue.empty():
            self.runtime.reactor.call_soon(self._return_queued)

    def _return_queued(self) -> None:
        if self._actor is not None:
            return
        counters: dict[Caller, list[int]] = {}
        while True:
            try:
                call = self.runner.queue.get_nowait()
            except queue.Empty:
                break
            if call is not None:
                counters.setdefault(call.caller, []).append(call.message.counter)
                call.caller.productions.pop(call.message.counter, None)
        for caller, numbers in counters.items():
            caller.channel.send(HandedBack(numbers))

    # ------------------------------------------------------------------------------------------- agent's messages

    def _from_agent(self, message: Any) -> bool:
        match message:
            case AssignJob():
                self._assign(message)
            case BeginActor():
                self._become(message)
            case EndActor():
                self._end_actor(message.cause)
            case GetTaskEvents():
                events = self._pack_events()
                self.runtime.agent.reply(message, TaskEvents(workers=[events] if events else []))
            case EndProcess():
                worker_exit.end_process(self.runtime, 0)
            case _:
                return False
        return True

    def _assign(self, message: AssignJob) -> None:
        """From now on this worker serves one job: make its environment that of the job's driver."""
        self.runtime.set_job(message.job)
        self._env_vars = message.env_vars
        for name, value in message.env_vars.items():
            os.environ[name] = os.path.expandvars(value)
        gpus = message.devices.get("GPU", [])
        self._devices = {"GPU": devices.names_of(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))} if gpus else {}
        os.environ.update(devices.settings_for(gpus, os.environ))
        for path in reversed(message.job.sys_path):
            if path not in sys.path:
                sys.path.insert(0, path)
        if message.job.working_dir:
            try:
                os.chdir(message.job.working_dir)
            except OSError as exc:
                logger.info("the driver's working directory is not on this node: %s", exc)
        if message.job.logging:
            job_logging.configure(message.job.logging, self.context)
        for module in message.job.preload:
            try:
                importlib.import_module(module)
            except Exception:  # the user's module: calls that need it will say what is missing
                logger.exception("cannot import %s (SHOAL_PRELOAD of the driver)", module)
        self.runtime.agent.reply(message, Done())

    def _become(self, begin: BeginActor) -> None:
        options = msgspec.msgpack.decode(begin.spec.options, type=ActorOptions)
        kind: type[ActorInstance] = AsyncActor if options.is_async else SequentialActor
        if not options.is_async and (options.max_concurrency > 1 or options.groups):
            kind = ThreadedActor
        actor = kind(self.runner, begin, options)
        self.runtime.inherit(begin.spec.strategy.group if begin.spec.strategy.capture else b"")
        self.runtime.groups.owner_actor = begin.spec.actor_id if begin.spec.detached else b""
        self._actor = self.runner.actor = self.runner.endings.actor = actor
        self.runner.queue.put(None)  # the main thread stops taking tasks

    def _end_actor(self, cause: str) -> None:
        if self._actor is None:
            worker_exit.end_process(self.runtime, 0)
        if self._underway:
            self._end_cause = cause
        else:
            self._actor.end(cause)

    def _pack_events(self) -> bytes:
        """What ran here, for `timeline()`; b"" when nothing did."""
        events, runtime = self.runner.events, self.runtime
        if events is None:
            return b""
        return events.packed(
            node_id=runtime.node_id, node_ip=runtime.node_ip, worker_id=runtime.worker_id, pid=os.getpid(),
            label=self.runner.actor.label if self.runner.actor is not None else "", job_id=runtime.job_id,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------- who am I

    def context(self) -> ContextData:
        """Of the calling thread or task."""
        runtime, actor = self.runtime, self._actor
        call = self.runner.current_call() or self.runner.running  # a thread that user code made is part of its call
        cancelled = None if isinstance(actor, AsyncActor) else self.runner.is_cancelled()
        task_id = b""
        name = function_name = ""
        group, captures = b"", False
        if actor is not None:
            group, captures = actor.spec.strategy.group, actor.spec.strategy.capture
        assigned = dict(actor.spec.resources) if actor is not None else {}
        if call is not None:
            task_id = make_task_id(call.caller.prefix, call.message.counter)
            name, function_name = call.target.template.name, call.target.template.function_name
            assigned = assigned or dict(call.target.template.resources)
            if actor is None:
                group, captures = call.target.template.placement_group, call.target.template.captures
        return ContextData(
            job_id=runtime.job_id, node_id=runtime.node_id, worker_id=runtime.worker_id, task_id=task_id,
            task_name=name, function_name=function_name, actor_id=actor.spec.actor_id if actor else b"",
            actor_name=actor.spec.name if actor else "", namespace=runtime.job.namespace, node_ip=runtime.node_ip,
            control_address=runtime.control_address, node_labels=runtime.node_labels, session_dir=runtime.session_dir,
            assigned=assigned,
            devices=self._devices, restarts=actor.restarts if actor else 0, env_vars=self._env_vars, is_driver=False,
            actor_handle=actor.spec.handle if actor else b"", is_cancelled=cancelled, group=group, captures=captures,
        )  # fmt: skip


def _tell(production: Production, message: Consumed | StopStream | Arrived) -> None:
    match message:
        case Consumed():
            production.consumed(message.count)
        case StopStream():
            production.stop()
        case Arrived():
            production.answered()
