"""This process's connection to its node's agent, and through it to control: asking, telling, and losing it.

Two kinds of threads meet in a runtime. The user's make ids, serialize, and append what they want to deques; the
reactor's owns everything else: objects' states, scheduling classes, actors, connections. A method that belongs to
users' threads says so, or is part of the `Runtime` protocol; all others are the reactor's.

A runtime is one object with a layer for each subject, and each layer knows only those below it:

    CoreRuntime     core.py         submitting calls, taking in their results
    Waiting         waiting.py      get, wait, futures, and why one waits
    References      references.py   objects: their states, who refers to them, their bytes in the store
    NodeConnection  this module

Layers of one class rather than parts that hold each other, because a result passes through all of them a hundred
thousand times a second, and each hop from part to part costs a look-up.
"""

from __future__ import annotations

import itertools
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from shoal import exceptions
from shoal.control import messages as control
from shoal.node.messages import (
    CancelCall,
    ControlMail,
    EndProcess,
    GetTaskEvents,
    JoinNode,
    MailFromControl,
    ProcessRegistered,
    ToProcess,
)
from shoal.objects.arena import Arena
from shoal.objects.ids import task_prefix
from shoal.rpc.frames import encode_message, make_decoder
from shoal.rpc.messages import Failed, Message, Reply, Request
from shoal.rpc.reactor import Channel, Reactor

if TYPE_CHECKING:
    from shoal.runtime.interface import ContextData

EVENTS_S: Final = 60.0
"""How long all nodes together may take to say what ran there; each is given up on sooner."""

_process_decoder = make_decoder(ToProcess)
_mail_decoder = msgspec.msgpack.Decoder(control.ProcessReply)


LEFT: Final = "shutdown() was called"
"""Why a runtime is closed that its own program has left."""


class Answer:
    """One answer that a user's thread waits for. `set` belongs to the reactor's thread."""

    __slots__ = ("_lock", "_value")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._value: Any = None

    def set(self, value: Any) -> None:
        self._value = value
        self._lock.release()

    def is_set(self) -> bool:
        return not self._lock.locked()

    def wait(self, timeout_s: float = -1.0) -> Any:
        """The answer, or None after `timeout_s` (-1: for ever)."""
        return self._value if self._lock.acquire(timeout=timeout_s) else None


class NodeConnection:
    """See the module. `start` fills it; `shutdown` empties it.

    Attributes:
        closed: why there is no cluster any more; "" while there is one.
        on_agent_message: what the worker's executor wants to hear of the agent; False for what it does not know.
        on_lease_message: what the agent says about leases.
        on_cancel_call: somebody else does not want a call of this process any more.
        pack_events: what this process ran, for its agent when it leaves (see `task_events`).
        on_lost: the agent is gone (not called when this process leaves by itself).
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
        self.node_labels: dict[str, str] = {}
        self.control_address = ""
        self.session_dir = ""
        self.job = control.JobInfo(b"", "", b"", b"")
        self.job_id = b""
        self.prefix = b""  # of the ids of all that this process makes
        self.closed = ""
        self.on_agent_message: Callable[[Any], bool] = lambda _: False
        self.on_lease_message: Callable[[Any], None] = lambda _: None
        self.on_cancel_call: Callable[[CancelCall], None] = lambda _: None
        self.on_actor_update: Callable[[control.ActorInfo], None] = lambda _: None
        self.on_group_changed: Callable[[control.GroupChanged], None] = lambda _: None
        self.on_notice: Callable[[control.Notice], None] = lambda _: None
        self.on_logs: Callable[[list[control.LogLines]], None] = lambda _: None
        self.on_lost: Callable[[], None] = lambda: None
        self.describe_context: Callable[[], ContextData] | None = None
        self.pack_events: Callable[[], bytes] = lambda: b""

        self.agent = Channel(self.reactor, _process_decoder, self._from_agent, self._lost_agent)
        self._lost: Exception | None = None
        self._arena: Arena | None = None
        self._arena_path = ""
        self._arena_capacity = 0
        self._arena_lock = threading.Lock()
        self._mail_rids = itertools.count(1)
        self._mail: dict[int, Callable[[Any], None]] = {}
        self._collect: Callable[[], list[control.MetricRow]] | None = None  # the metrics, if there are any

    # ---------------------------------------------------------------------------------------- opening, closing

    def open(self) -> None:
        """Begin to live, in this process and no other: a runtime opens no descriptor before."""
        self.reactor.start()

    def adopt(self, sock: socket.socket, ready: Message) -> None:
        """A worker's start: its agent made this connection, and says by `JoinNode` what there is to know."""
        self.open()
        self.reactor.call_soon(self.agent.adopt, sock)
        self.reactor.call_soon(self.agent.send, ready)

    def start(self, agent_socket: str, register: Request, timeout_s: float = 30.0) -> ProcessRegistered:
        """A driver's start: connect to this node's agent and register. Called once, before anything else.

        Raises:
            ClusterConnectionError, AuthenticationError, VersionMismatchError, ShoalError.
        """
        self.open()
        self.reactor.call_soon(self.agent.connect, f"unix:{agent_socket}", self.token, "agent", self.name)
        registered = Answer()

        def answered(reply: Reply) -> None:
            if isinstance(reply, ProcessRegistered):
                self.take_registration(reply)
            registered.set(reply)

        self.reactor.call_soon(self.agent.request, register, answered)
        answer = self.wait_answer(registered, timeout_s)
        if not isinstance(answer, ProcessRegistered):
            self.reactor.stop()
            if answer is None:
                raise exceptions.ClusterConnectionError(f"the node's agent did not answer within {timeout_s:.0f} s")
            if answer.kind == "version":
                raise exceptions.VersionMismatchError(answer.text)
            if isinstance(self._lost, exceptions.AuthenticationError):
                raise self._lost
            raise exceptions.ClusterConnectionError(answer.text)
        return answer

    def take_registration(self, answer: ProcessRegistered) -> None:
        """On the reactor's thread: what comes next from the agent may need all of this."""
        self.node_id, self.node_ip, self.node_address = answer.node_id, answer.node_ip, answer.node_address
        self.session_dir, self.node_total = answer.session_dir, answer.node_total
        self.node_labels, self.control_address = answer.node_labels, answer.control_address
        self._arena_path, self._arena_capacity = answer.arena_path, answer.arena_capacity
        if answer.job is not None:
            self.set_job(answer.job)

    def set_job(self, job: control.JobInfo) -> None:
        """From now on this process works for `job`."""
        self.job = job
        self.job_id = job.job_id
        self.prefix = task_prefix(job.job_id, self.worker_id)

    def _lost_agent(self, _channel: Channel, reason: Exception) -> None:
        self._lost = reason
        if not self.closed:
            self.closed = f"this process's node is gone: {reason}"
            self.on_lost()
        for answered in list(self._mail.values()):
            answered(Failed(kind="closed", text=self.closed))
        self._mail.clear()
        self.fail_everything(exceptions.LocalAgentDiedError(self.closed))

    def fail_everything(self, error: Exception) -> None:
        """There is no cluster any more: whatever waits is told. Layers above know what that is."""

    def shutdown(self) -> None:
        """Leave the cluster, by a user's thread. Refs of it are of no use afterwards."""
        self.closed = self.closed or LEFT
        if self.reactor.thread.is_alive() and not self.reactor.is_here:
            closed = Answer()
            self.reactor.call_soon(self._close, closed)
            closed.wait(5.0)
            self.reactor.stop()
            self.reactor.thread.join(5.0)
        if self._arena is not None:
            self._arena.close()

    def _close(self, closed: Answer) -> None:
        try:
            self.report_now()
            self.close_channels()
        finally:
            closed.set(True)

    def close_channels(self) -> None:
        self.agent.close()

    def forget_in_child(self) -> None:
        """After a fork, in the child: this object is the parent's.

        The child lets go of its copies of the descriptors, or nobody would notice when the parent ends. Their numbers
        stay taken, by a file that swallows everything, since objects of the parent's still use them here.
        """
        self.closed = "it belongs to the process that this one was forked from"
        nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for fd in self.reactor.descriptors():
            os.dup2(nothing, fd, inheritable=False)
        os.close(nothing)

    # ------------------------------------------------------------------------------------------- asking others

    def check_open(self) -> None:
        """Raises LocalAgentDiedError when there is no cluster any more."""
        if self.closed:
            raise exceptions.LocalAgentDiedError(self.closed)

    def check_may_block(self) -> None:
        """Raises RuntimeError on the reactor's thread, where waiting would never end: it brings what one waits for."""
        if self.reactor.is_here:
            raise RuntimeError(
                "this call waits, and callbacks of futures may not wait: they run on the thread that brings results; "
                "hand the work to a thread of yours"
            )

    def ask_agent(self, request: Request, timeout_s: float = -1.0) -> Any:
        """The agent's answer, waited for by a user's thread. `Failed` when the agent is gone or says so."""
        self.check_may_block()
        answer = Answer()
        reply = self.have_answered(answer, self.agent.request, request, answer.set, timeout_s=timeout_s)
        if reply is None:
            return Failed(kind="timeout", text=f"the node's agent did not answer within {timeout_s:.0f} s")
        return reply

    def have_answered(self, answer: Answer, call: Callable[..., Any], *args: Any, timeout_s: float = -1.0) -> Any:
        """Have the reactor `call(*args)`, which makes somebody set `answer`, and wait for that. By a user's thread."""
        self.reactor.calls.append((call, args))
        self.reactor.lead(answer.is_set)
        return self.wait_answer(answer, timeout_s)

    def wait_answer(self, answer: Answer, timeout_s: float = -1.0) -> Any:
        """Wait for what a call on the reactor will set; None after `timeout_s`. `Failed` when the reactor has ended."""
        if self.reactor.ended:  # by another thread: the answer is there, or this call came too late for any
            return answer.wait(1.0) or Failed(kind="closed", text=self.closed)
        return answer.wait(timeout_s)

    def mail_control(self, message: Request, answered: Callable[[Any], None]) -> None:
        """Ask control; `answered` is called with its answer: a Failed when it says no or cannot be reached."""
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
        """As `ask_control`, but a `Failed` is returned."""
        self.check_open()
        self.check_may_block()
        answer = Answer()
        reply = self.have_answered(answer, self.mail_control, message, answer.set, timeout_s=timeout_s)
        if reply is None:
            raise exceptions.ShoalSystemError(f"the head node did not answer within {timeout_s:.0f} s")
        return reply

    def _from_agent(self, _channel: Channel, message: Any) -> None:
        if self.on_agent_message(message):
            return
        match message:
            case MailFromControl():
                self._from_control(_mail_decoder.decode(message.body))
            case JoinNode():
                self.take_registration(message.node)
            case CancelCall():
                self.on_cancel_call(message)
            case EndProcess():
                self.closed = self.closed or message.reason
                self.agent.close(exceptions.ClusterConnectionError(message.reason))
            case _:
                self.on_lease_message(message)

    def _from_control(self, message: Any) -> None:
        if isinstance(message, Reply):
            answered = self._mail.pop(message.rid, None)
            if answered is not None:
                answered(message)
            return
        match message:
            case control.ActorUpdate():
                self.on_actor_update(message.actor)
            case control.GroupChanged():
                self.on_group_changed(message)
            case control.LogsArrived():
                self.on_logs(message.entries)
            case control.Notice():
                self.on_notice(message)

    @property
    def arena(self) -> Arena:
        """The node's shared memory; opened when first needed. Any thread."""
        arena = self._arena
        if arena is None:
            with self._arena_lock:
                arena = self._arena
                if arena is None:
                    arena = self._arena = Arena.open(self._arena_path, self._arena_capacity)
        return arena

    # ---------------------------------------------------------------------------------- control's tables, for users

    def status(self) -> control.StatusReply:
        answer: control.StatusReply = self.ask_control(control.GetStatus())
        return answer

    def task_events(self) -> tuple[list[bytes], list[str]]:
        """(what each worker of the cluster remembers of its calls, who is missing in that)."""
        answer = self.ask_agent(GetTaskEvents(everywhere=True), EVENTS_S)
        if isinstance(answer, Failed):
            raise exceptions.ShoalSystemError(f"cannot collect the events of tasks: {answer.text}")
        return answer.workers, answer.silent

    def context(self) -> ContextData:
        assert self.describe_context is not None
        return self.describe_context()

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

    # ----------------------------------------------------------------------------------------- progress and metrics

    def show_progress(self, line: str) -> None:
        """Show a state of a progress bar (`progress.BarState.line`) at the driver: here, by printing it."""
        stream = sys.__stderr__
        if stream is not None:
            stream.write(line + "\n")

    def report_later(self, delay_s: float, collect: Callable[[], list[control.MetricRow]]) -> None:
        """After a while, and before this process leaves, tell control what `collect()` returns."""
        self._collect = collect
        self.reactor.call_soon(self.reactor.call_later, delay_s, self._report)

    def report_now(self) -> None:
        if self._collect is None:
            return
        if self.reactor.is_here:
            self._report()
            self.agent.flush()
        else:
            self.reactor.call_soon(self._report)

    def _report(self) -> None:
        collect = self._collect
        if collect is not None and not self.agent.closed and (rows := collect()):
            self.tell_control(control.ReportMetrics(rows))

    def list_metrics(self) -> list[control.MetricRow]:
        self.report_now()
        rows: list[control.MetricRow] = self.ask_control(control.ListMetrics()).rows
        return rows

    # ------------------------------------------------------------------------------------------- key-value store

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
