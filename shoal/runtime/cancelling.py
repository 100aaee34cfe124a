"""The owner's side of `cancel`. What it does depends on how far the call has come:

    waits for arguments, or for a worker    dropped: its results are TaskCancelledError
    sent to a worker                        the worker is asked (`endings`), and what it answers is the outcome
    done                                    nothing

Another process that has a reference sends its wish to the owner, by way of the agents. If the owner is gone, or the
message is lost with a node, nothing happens.

So a call has exactly one outcome whenever the wish comes. Having been cancelled, it is not tried again, whatever ends
it. A worker that does not answer to force=True within `FORCE_S` (user code may keep the whole interpreter busy) is
ended by its agent.

Children are the calls that were submitted by a call which this process runs; each knows its parent by the time at which
that began (`Call.started`; no two calls of a process begin at the same time). They are looked for among all that is
pending here, when somebody cancels: nothing is kept for those who never do.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from shoal import exceptions
from shoal.node.messages import PENDING, CancelCall
from shoal.objects.ids import counter_of
from shoal.runtime.task_run import CANCELLED_STAGES, TaskRun

if TYPE_CHECKING:
    from shoal.node.messages import WorkerExit
    from shoal.runtime.core import CoreRuntime
    from shoal.runtime.link import WorkerLink
    from shoal.runtime.object_ref import ObjectRef

logger = logging.getLogger(__name__)

FORCE_S: Final = 1.0


class Canceller:
    """See the module. Reactor's thread only.

    Attributes:
        blocked: tasks that wait for arguments, or for a while; nothing else leads to all of them.
    """

    def __init__(self, runtime: CoreRuntime) -> None:
        self._runtime = runtime
        self.blocked: set[TaskRun] = set()

    def cancel(self, ref: ObjectRef[Any], force: bool, recursive: bool) -> None:
        run: TaskRun | None = ref.task
        if run is not None and ref.state == PENDING:
            self._cancel(run, force, recursive)
        elif not ref.owned and ref.state == PENDING:
            self._runtime.agent.send(CancelCall(ref.binary(), ref.home, force, recursive))

    def asked(self, message: CancelCall) -> None:
        """Another process that has a reference wants the call cancelled."""
        self._runtime.drain()
        counter = counter_of(message.object_id)
        run = next((run for run in self._pending() if run.counter == counter), None)
        if run is not None:
            self._cancel(run, message.force and run.client is None, message.recursive)

    def cancel_children(self, parent: float, force: bool) -> None:
        """Cancel what a call submitted that began at `parent`, and what that submitted."""
        self._runtime.drain()
        for run in [run for run in self._pending() if run.parent == parent]:
            self._cancel(run, force and run.client is None, True)

    def _pending(self) -> Iterator[TaskRun]:
        runtime = self._runtime
        sent = (link.running.values() for link in runtime.links())
        return itertools.chain(self.blocked, runtime.tasks.queued(), runtime.actors.queued(), *sent)

    def _cancel(self, run: TaskRun, force: bool, recursive: bool) -> None:
        for ref in run.result_refs():
            ref.watched = True  # nobody needs to be told of an error that somebody asked for
        if run.stage in ("arguments", "queued", "paused"):
            if run.client is None:
                self.blocked.discard(run)
                self._runtime.tasks.withdraw(run)
            self._end(run)
        elif run.stage == "sent" or (force and run.stage == "cancelling"):
            run.retries = 0
            run.stage = "killing" if force else "cancelling"
            link = self._link_of(run)
            if link is None:
                return  # it is between two incarnations of its actor, and ends with the first
            link.cancel(run, force=force, recursive=recursive)
            if force:
                self._runtime.reactor.call_later(FORCE_S, lambda: self._insist(run, link))

    def _link_of(self, run: TaskRun) -> WorkerLink | None:
        return next((link for link in self._runtime.links() if link.running.get(run.counter) is run), None)

    def _insist(self, run: TaskRun, link: WorkerLink) -> None:
        if link.running.get(run.counter) is run:
            self._runtime.tasks.end_worker(link, "cancel(force=True), and it did not answer")

    def _end(self, run: TaskRun) -> None:
        """It will not run (any more): that is its outcome."""
        self._runtime.fail_with(run, exceptions.TaskCancelledError(run.task_id().hex()))

    def without_cancelled(self, runs: list[TaskRun], exit: WorkerExit | None = None, link: Any = None) -> list[TaskRun]:
        """The calls that came back from a worker, but those that were cancelled, which end here.

        Args:
            exit: how the worker ended, if it did.
        """
        if all(run.stage not in CANCELLED_STAGES for run in runs):
            return runs
        left = []
        for run in runs:
            if run.stage == "killing" and exit is not None:
                self._runtime.fail_crashed(run, exit, link.address)
            elif run.stage in CANCELLED_STAGES:
                self._end(run)
            else:
                left.append(run)
        return left
