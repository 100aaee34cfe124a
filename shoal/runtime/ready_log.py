"""Who waits in `wait()`, and the log of what became ready: the reactor's side of it.

The problem: a program waits for the first of 10,000 results, handles it, and waits for the rest, ten thousand times.
Entering each wait at each reference and taking it out again costs a hundred million steps.

The choice: a reference that anybody ever waited for tells one `ReadyLog` when it becomes ready, once, however many
waits it takes part in; that entry stays until then. The log keeps the ids of the last `KEPT` that did, numbered. A
wait knows up to which number it has read, so the next wait over the same references reads only what is new (`sweep`).
Ids and not references, because the log must not keep alive what the program has dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

from shoal.exceptions import LocalAgentDiedError
from shoal.node.messages import PENDING, STORED, Resolved
from shoal.rpc.messages import Failed

if TYPE_CHECKING:
    from shoal.rpc.reactor import Reactor
    from shoal.runtime.object_ref import ObjectRef

KEPT: Final = 16_384
"""Ids in the log, a megabyte or two. Who reads too late to find all of them looks at its references instead."""


class Objects(Protocol):
    """What the log needs of the runtime."""

    reactor: Reactor
    waiters: set[Any]
    closed: str

    def fail_everything(self, error: Exception) -> None: ...
    def watch(self, ref: ObjectRef[Any], waiter: Any) -> bool: ...
    def follows(self, ref: ObjectRef[Any]) -> bool: ...
    def fetch(self, ref: ObjectRef[Any], answered: Any) -> int: ...
    def view_of(self, ref: ObjectRef[Any], reply: Resolved) -> memoryview: ...
    def learn(self, ref: ObjectRef[Any], state: Any) -> None: ...


class ReadyLog:
    """See the module. One per runtime; the reactor's, but for `end` and `since`."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self._calls: tuple[WaitCall, ...] = ()
        self._log: tuple[int, list[bytes]] = (0, [])  # number of the first entry, entries; replaced, never cut

    @property
    def end(self) -> int:
        """The number that the next entry will have. Any thread."""
        first, ids = self._log
        return first + len(ids)

    def since(self, number: int) -> tuple[list[bytes], int, bool]:
        """(ids from `number` on, `end`, whether those are all). Any thread."""
        first, ids = self._log
        fresh = ids[max(0, number - first) :]
        return fresh, first + len(ids) if number < first else max(number, first) + len(fresh), number >= first

    def attend(self, refs: Sequence[ObjectRef[Any]], fetch: bool) -> bool:
        """From now on each of these is logged when it is ready. True when the agent was asked for something."""
        asked = False
        for ref in refs:
            if ref.attended:
                continue
            if ref.state == PENDING:
                ref.attended = True
                asked |= self._objects.watch(ref, self)
            elif fetch and ref.state == STORED and not ref.local:
                asked |= self._fetch(ref)
            else:
                self._note(ref)  # it became ready on the way here
        return asked

    def ready(self, ref: ObjectRef[Any]) -> None:
        """`ref` is not pending any more."""
        ref.attended = False
        if ref.state == STORED and not ref.local:
            object_id = ref.binary()
            if any(call.fetch and object_id in call.members for call in self._calls):
                self._fetch(ref)
        self._note(ref)

    def _note(self, ref: ObjectRef[Any]) -> None:
        object_id = ref.binary()
        first, ids = self._log
        ids.append(object_id)
        if len(ids) >= 2 * KEPT:
            self._log = (first + len(ids) - KEPT, ids[-KEPT:])
        elsewhere = ref.state == STORED and not ref.local
        for call in self._calls:
            if object_id in call.members and not (elsewhere and call.fetch):
                call.count(1)

    def _fetch(self, ref: ObjectRef[Any]) -> bool:
        """Bring a copy to this node. It is carried through even when nobody waits any more."""
        if not self._objects.follows(ref):
            ref.local = True  # another runtime's: whoever wants the value is told so
            self._note(ref)
            return False
        ref.attended = True
        self._objects.fetch(ref, lambda reply: self._fetched(ref, reply))
        return True

    def _fetched(self, ref: ObjectRef[Any], reply: Resolved | Failed) -> None:
        ref.attended = False
        if isinstance(reply, Failed):
            ref.local = True  # there is no more to wait for: whoever wants the value asks again and gets the error
        elif reply.state.state == STORED:
            ref.local = True
            self._objects.view_of(ref, reply)  # dropped at once, which unpins it
        else:
            self._objects.learn(ref, reply.state)
        self._note(ref)

    # ---------------------------------------------------------------------------------------------- those who wait

    def enter(self, call: WaitCall) -> None:
        self._objects.waiters.add(call)
        self._calls = (*self._calls, call)

    def leave(self, call: WaitCall) -> None:
        self._objects.waiters.discard(call)
        self._calls = tuple(other for other in self._calls if other is not call)


class WaitCall:
    """A thread that sleeps until the log has `missing` more of `members`. It looks then whether that is enough.

    Args:
        refs: for errors and explanations.
        members: ids of `refs`.
        unattended: those of `refs` that the log would not hear of yet.
        since: up to where the thread has read the log.
    """

    __slots__ = (
        "_left", "_lock", "_log", "_missing", "_objects", "_since", "_unattended", "asked", "fetch", "finished",
        "members", "refs",
    )  # fmt: skip

    def __init__(
        self,
        objects: Objects,
        log: ReadyLog,
        refs: Sequence[ObjectRef[Any]],
        members: Container[bytes],
        missing: int,
        *,
        fetch: bool,
        since: int,
        unattended: Sequence[ObjectRef[Any]],
    ) -> None:
        self._objects = objects
        self._log = log
        self._missing = missing
        self._since = since
        self._unattended = unattended
        self._left = False
        self._lock = threading.Lock()
        self._lock.acquire()
        self.refs = refs
        self.members = members
        self.fetch = fetch
        self.asked = False
        self.finished = False

    # ------------------------------------------------------------------------------------ the waiting thread's side

    def wait(self, timeout_s: float) -> bool:
        """Sleep until finished; False after `timeout_s` (-1: for ever)."""
        return self._lock.acquire(timeout=timeout_s)

    def leave(self) -> None:
        """Nobody waits any more. Any thread."""
        self._objects.reactor.call_soon(self._abandon)

    def has(self, ref: ObjectRef[Any]) -> bool:
        state = ref.state
        return ref.local if state == STORED and self.fetch else state != PENDING

    # ------------------------------------------------------------------------------------------- the reactor's side

    def begin(self) -> None:
        if self._left:
            return
        self._log.enter(self)
        fresh, _, complete = self._log.since(self._since)
        self.count(sum(map(self.members.__contains__, fresh)) if complete else self._missing)
        if not self.finished:
            self.asked = self._log.attend(self._unattended, self.fetch)
        if self._objects.closed:
            self._objects.fail_everything(LocalAgentDiedError(self._objects.closed))

    def count(self, ready: int) -> None:
        self._missing -= ready
        if self._missing <= 0 and not self.finished:
            self.finished = True
            self._log.leave(self)
            self._lock.release()

    def _abandon(self) -> None:
        self._left = True
        self._log.leave(self)
