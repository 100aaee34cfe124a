"""A connection from an owner to one worker: sends calls, and takes in what comes back. Reactor's thread only."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Protocol

from shoal.node.messages import WorkerAddress
from shoal.rpc.frames import encode_message, make_decoder
from shoal.rpc.reactor import Channel
from shoal.runtime.messages import (
    Arrived,
    Cancel,
    Ended,
    Finished,
    HandedBack,
    Introduce,
    Pace,
    Run,
    Taken,
    ToOwner,
    Yielded,
)
from shoal.runtime.nesting import Nesting
from shoal.runtime.retrying import use_retry
from shoal.runtime.task_run import Bound, TaskRun

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime

_decoder = make_decoder(ToOwner)


class Sink(Protocol):
    """Who uses the worker at the other end: a lease, or an actor's client."""

    def run_ended(self, run: TaskRun) -> None: ...
    def handed_back(self, runs: list[TaskRun]) -> None: ...
    def retry(self, run: TaskRun) -> None: ...
    def worker_leaves(self) -> None: ...
    def link_closed(self, link: WorkerLink, reason: Exception) -> None: ...


class WorkerLink:
    """See the module. `running` holds what was sent and has not ended, oldest first."""

    def __init__(self, runtime: CoreRuntime, address: WorkerAddress, sink: Sink | None) -> None:
        self.runtime = runtime
        self.address = address
        self._sink: weakref.ref[Sink] | None = None
        self.use_for(sink)
        self.running: dict[int, TaskRun] = {}
        self._templates: dict[tuple[int, Nesting], int] = {}
        self._bounds: list[Bound] = []  # by template id; also keeps `id(bound)` from being used again
        self.channel = Channel(runtime.reactor, _decoder, self._message, self._closed)
        if address.node_id == runtime.node_id:
            where, target = f"unix:{address.socket_path}", "worker"
        else:
            where, target = address.node_address, f"worker:{address.worker_id.hex()}"
        self.channel.connect(where, runtime.token, target, runtime.name)
        self.channel.send(Introduce(runtime.worker_id, runtime.job_id, runtime.node_id))

    @property
    def sink(self) -> Sink | None:
        return self._sink() if self._sink is not None else None

    def use_for(self, sink: Sink | None) -> None:
        """Whom to tell. Held weakly: an actor's last client must not be kept by its own connection."""
        self._sink = weakref.ref(sink, self._sink_gone) if sink is not None else None

    def _sink_gone(self, gone: weakref.ref[Sink]) -> None:
        self.runtime.reactor.call_soon(lambda: self.close() if self._sink is gone else None)

    @property
    def closed(self) -> bool:
        return self.channel.closed

    def send(self, run: TaskRun) -> None:
        bound = run.bound
        key = (id(bound), run.nesting)
        template_id = self._templates.get(key)
        if template_id is None:
            template_id = self._templates[key] = len(self._bounds)
            self._bounds.append(bound)
            self.channel.send(bound.template(template_id, run.nesting))
        if bound.stream is not None:
            run.refs.link = self
            self.channel.send(run.refs.opening(run.counter))
        self.running[run.counter] = run
        run.stage = "sent"
        self.channel.send_encoded(
            encode_message(Run(template_id, run.counter, run.args, run.kwargs, run.arguments or [], run.packed))
        )

    def take_back(self) -> list[TaskRun]:
        """What was sent and has not ended, oldest first, when the worker is gone or given up.

        It may have stored the results of some: the end of their refs is told, so that the bytes go with them.
        """
        runs = list(self.running.values())
        self.running.clear()
        for run in runs:
            for ref in run.result_refs():
                self.runtime.follow(ref)
        return runs

    def cancel(self, run: TaskRun, *, force: bool, recursive: bool) -> None:
        self.channel.send(Cancel(run.counter, force, recursive))

    def _message(self, _channel: Channel, message: Any) -> None:
        kind = type(message)
        if kind is Finished:
            run = self.running.pop(message.counter, None)
            if run is not None:
                self.runtime.finish_inline(run, message.payload)
                if (sink := self.sink) is not None:
                    sink.run_ended(run)
        elif kind is Ended:
            self._ended(message)
        elif kind is Yielded:
            run = self.running.get(message.counter)
            if run is not None:
                self._take_in(run, message)
        elif kind is Pace:
            self._bounds[message.template_id].pace_s = message.seconds
        elif kind is HandedBack:
            runs = [run for counter in message.counters if (run := self.running.pop(counter, None)) is not None]
            runs = self.runtime.canceller.without_cancelled(runs)
            if (sink := self.sink) is not None:
                sink.handed_back(runs)

    def _ended(self, message: Ended) -> None:
        sink = self.sink
        if message.leaving and sink is not None:
            sink.worker_leaves()
        run = self.running.pop(message.counter, None)
        if run is None:
            return  # a second answer: see `endings`
        if message.retry and run.retries and sink is not None:
            use_retry(self.runtime, run, f"it raised {message.retry}")
            run.stage = "queued"
            sink.retry(run)
            return
        self.runtime.finish(run, message.results)
        if message.handover:
            self.runtime.after_uses(lambda: self.channel.send(Taken(message.counter)))
        if sink is not None:
            sink.run_ended(run)

    def _take_in(self, run: TaskRun, message: Yielded) -> None:
        counter, first = message.counter, message.first
        run.refs.take_in(first, message.states)
        if message.handover:
            self.runtime.after_uses(lambda: self.channel.send(Taken(counter, first)))
        if message.answer:
            self.channel.send(Arrived(counter))

    def _closed(self, _channel: Channel, reason: Exception) -> None:
        self.runtime.forget_link(self)
        if (sink := self.sink) is not None:
            sink.link_closed(self, reason)

    def close(self) -> None:
        self.use_for(None)
        self.channel.close()
