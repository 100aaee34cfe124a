"""References in the order in which they become ready, at a cost that does not grow with how many are still missing.

`wait` copies the list that it is given, each time, so whoever calls it once for each result of n pays n squared.
`Arrivals` tells the reactor of each reference once, and each costs one entry in a queue when it is ready. The helpers
that hand out results as they come (`shoal.util`) are built on it.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from shoal import exceptions
from shoal.node.messages import PENDING
from shoal.runtime.references import error_state
from shoal.runtime.waiting import Waiter, Waiting

if TYPE_CHECKING:
    from shoal.runtime.object_ref import ObjectRef


class Arrivals:
    """A queue that fills itself: `add` references, `take` those that are ready (with a value or an error).

    Ready means known, not near: a large value may still be on another node. Any thread may add; one at a time takes.
    All fields but `_arrived` are the reactor's.
    """

    def __init__(self, runtime: Waiting) -> None:
        self._runtime = runtime
        self._pending: dict[bytes, ObjectRef[Any]] = {}
        self._arrived: collections.deque[ObjectRef[Any]] = collections.deque()
        self._gate: _Gate | None = None
        self._closed = False

    def add(self, refs: Iterable[ObjectRef[Any]]) -> None:
        """Watch these too. One that is being watched already is not watched twice."""
        self._runtime.reactor.call_soon(self._watch, list(refs))

    def take(self, timeout_s: float | None = None) -> list[ObjectRef[Any]]:
        """All that have become ready since the last call; waits for the first.

        Returns:
            [] after `timeout_s`, when nothing is being watched, or when `close` was called.
        """
        arrived = self._arrived
        if not arrived:
            self._runtime._sleep(_Gate(self, self._runtime), timeout_s)
        return [arrived.popleft() for _ in range(len(arrived))]

    def close(self) -> None:
        """Forget what is pending and end a `take`. Any thread."""
        self._runtime.reactor.call_soon(self._close)

    # ------------------------------------------------------------------------------------------- the reactor's side

    def _watch(self, refs: list[ObjectRef[Any]]) -> None:
        pending, runtime = self._pending, self._runtime
        if self._closed:
            return
        for ref in refs:
            if ref.state != PENDING:
                self._arrived.append(ref)
            elif ref.binary() not in pending:
                pending[ref.binary()] = ref
                runtime.watch(ref, self)
        self._open_if_due()

    def ready(self, ref: ObjectRef[Any]) -> None:
        """`ref` is not pending any more."""
        if self._pending.pop(ref.binary(), None) is not None:
            self._arrived.append(ref)
            if self._gate is not None:
                self._open_if_due()

    def pending(self) -> list[ObjectRef[Any]]:
        return list(self._pending.values())

    def wait_at(self, gate: _Gate) -> None:
        """Open `gate` as soon as there is a reason to go on."""
        self._gate = gate
        if self._runtime.closed:
            state = error_state(exceptions.LocalAgentDiedError(self._runtime.closed))
            for ref in self.pending():
                self._runtime.learn(ref, state)
        self._open_if_due()

    def leave(self, gate: _Gate) -> None:
        if self._gate is gate:
            self._gate = None

    def _open_if_due(self) -> None:
        gate = self._gate
        if gate is not None and (self._arrived or not self._pending or self._closed):
            self._gate = None
            gate.open()

    def _close(self) -> None:
        self._closed = True
        for ref in self._pending.values():
            if ref.waiters is not None and self in ref.waiters:
                ref.waiters.remove(self)
        self._pending.clear()
        self._open_if_due()


class _Gate(Waiter):
    """One sleep in `Arrivals.take`. Its `refs` are listed only when somebody asks what is being waited for."""

    __slots__ = ("_arrivals",)

    def __init__(self, arrivals: Arrivals, runtime: Waiting) -> None:
        super().__init__(runtime, ())
        self._arrivals = arrivals

    @property
    def refs(self) -> Sequence[ObjectRef[Any]]:
        return self._arrivals.pending()

    @refs.setter
    def refs(self, refs: Sequence[ObjectRef[Any]]) -> None:
        """The base class sets it."""

    def begin(self) -> None:
        if not self._left:
            self._runtime.waiters.add(self)
            self._arrivals.wait_at(self)

    def open(self) -> None:
        self._finish()

    def _abandon(self) -> None:
        self._left = True
        self._runtime.waiters.discard(self)
        self._arrivals.leave(self)
