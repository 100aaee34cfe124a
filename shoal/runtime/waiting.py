"""Threads that wait for objects. The waiting thread sleeps on a lock; all bookkeeping is the reactor's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from shoal.node.messages import ERROR, LOST, PENDING, STORED, Resolved
from shoal.rpc.messages import Failed

if TYPE_CHECKING:
    from shoal.runtime.core import CoreRuntime
    from shoal.runtime.object_ref import ObjectRef


class Waiter:
    """Waits until `target` of `refs` are ready, or (with `stop_on_error`) one of them failed.

    With `fetch`, a stored object is ready once it is in this node's store. With `keep`, its bytes are then found in `views`,
    or the exception that kept them from coming in `problems`, both by ref.
    """

    def __init__(
        self, runtime: CoreRuntime, refs: Sequence[ObjectRef[Any]], target: int, *, fetch: bool, keep: bool, stop_on_error: bool
    ) -> None:
        self._runtime = runtime
        self._refs = refs
        self._target = target
        self._fetch = fetch
        self._keep = keep
        self._stop_on_error = stop_on_error
        self._requests: dict[ObjectRef[Any], int] = {}
        self._left = False
        self.ready_refs: set[ObjectRef[Any]] = set()
        self.views: dict[ObjectRef[Any], memoryview] = {}
        self.problems: dict[ObjectRef[Any], Exception] = {}
        self.done: Callable[[], None] = self._wake
        self._lock = threading.Lock()
        self._lock.acquire()
        self.finished = False

    # ------------------------------------------------------------------------------------ the waiting thread's side

    def start(self) -> None:
        self._runtime.reactor.call_soon(self._begin)

    def wait(self, timeout_s: float) -> bool:
        """Sleep until finished; False after `timeout_s` (-1: for ever)."""
        return self._lock.acquire(timeout=timeout_s)

    def leave(self) -> None:
        """The thread does not wait any more (it has what it wanted, its time is over, or it was interrupted)."""
        self._runtime.reactor.call_soon(self._abandon)

    def _wake(self) -> None:
        self._lock.release()

    # ------------------------------------------------------------------------------------------- the reactor's side

    def _begin(self) -> None:
        for ref in self._refs:
            if self.finished:
                return
            if ref.state != PENDING:
                self.ready(ref)
            else:
                self._runtime.watch(ref, self)

    def ready(self, ref: ObjectRef[Any]) -> None:
        """`ref` is not pending any more."""
        if self.finished or self._left or ref in self.ready_refs:
            return
        if ref.state == STORED and self._fetch and (self._keep or not ref.local):
            if ref not in self._requests:
                self._requests[ref] = self._runtime.fetch(ref, lambda reply: self._fetched(ref, reply))
            return
        self._count(ref)

    def _fetched(self, ref: ObjectRef[Any], reply: Resolved | Failed) -> None:
        self._requests.pop(ref, None)
        view: memoryview | None = None
        if isinstance(reply, Failed):
            self.problems[ref] = self._runtime.problem_of(ref, reply)
        elif reply.state.state == STORED:
            ref.local = True
            view = self._runtime.view_of(ref, reply)  # also unpins when it is dropped below
        else:
            self._runtime.learn(ref, reply.state)
        if self.finished or self._left:
            return
        if view is not None and self._keep:
            self.views[ref] = view
        self._count(ref)

    def _count(self, ref: ObjectRef[Any]) -> None:
        self.ready_refs.add(ref)
        failed = self._stop_on_error and (ref.state in (ERROR, LOST) or ref in self.problems)
        if not self.finished and (failed or len(self.ready_refs) >= self._target):
            self.finished = True
            self.done()

    def _abandon(self) -> None:
        self._left = True
        for ref in self._refs:
            if ref.waiters is not None and self in ref.waiters:
                ref.waiters.remove(self)
        for request in self._requests.values():
            self._runtime.cancel_fetch(request)
