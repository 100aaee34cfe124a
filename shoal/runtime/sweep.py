"""What a thread in `wait()` has found out about its list of references, for this wait and the next over what is left.

The first look costs some tens of nanoseconds for each reference, in C. What is left over is returned as a `Rest`: an
ordinary list to whoever holds it, that remembers its `Sweep`. When it comes back, perhaps with more at its end, only
what the `ReadyLog` has written since is looked at, and the lists are copied: a few nanoseconds for each reference.

Rejected: keeping the knowledge in the runtime, where it would keep the references alive; in the `Rest` it ends with
the list. A `Rest` that was changed other than at its end, or was used before, counts as any list.

Decides only; who sleeps and who is woken is `waiting` and `ready_log`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from itertools import compress
from operator import attrgetter, not_, or_
from typing import Any, Final, Protocol

from shoal.node.messages import ERROR, INLINE, LOST, STORED
from shoal.runtime.object_ref import ObjectRef

REMEMBER: Final = 32
"""A shorter list is looked at as quickly as it is compared."""

_state_of: Final = attrgetter("state")
_is_local: Final = attrgetter("local")
_is_attended: Final = attrgetter("attended")
id_of: Final = attrgetter("_id")

# By state of a reference: whether that alone makes it ready.
_READY: Final = bytes(state in (INLINE, ERROR, LOST, STORED) for state in range(256))
_READY_BUT_STORED: Final = bytes(state in (INLINE, ERROR, LOST) for state in range(256))


class Log(Protocol):
    """What a sweep asks of the `ReadyLog`."""

    @property
    def end(self) -> int: ...
    def since(self, number: int) -> tuple[list[bytes], int, bool]: ...


class Rest(list[ObjectRef[Any]]):
    """A list of references that `wait` left over; see the module."""

    __slots__ = ("_sweep",)

    def __init__(self, refs: list[ObjectRef[Any]], sweep: Sweep) -> None:
        super().__init__(refs)
        self._sweep = [sweep]

    def unseen(self) -> list[ObjectRef[Any]]:
        """What no wait has looked at yet: the new ones at the end, or all of them."""
        for sweep in self._sweep:
            known = len(sweep.refs)
            if self[:known] == sweep.refs:
                return self[known:]
        return self[:]

    def take(self, log: Log, fetch: bool) -> Sweep | None:
        """The sweep to go on with, once: two threads may have the same list. None when it is not about this list."""
        try:
            sweep = self._sweep.pop()  # first of all: an interrupt from here on must not leave half a sweep behind
        except IndexError:
            return None
        known = len(sweep.refs)
        if sweep.log is not log or sweep.fetch != fetch or self[:known] != sweep.refs:
            return None
        sweep.add(self[known:])
        return sweep

    def __reduce_ex__(self, _protocol: object) -> tuple[type, tuple[list[ObjectRef[Any]]]]:
        return list, (self[:],)


class Sweep:
    """See the module. The user's thread's.

    Attributes:
        refs: in the caller's order, each there once.
        members: their ids -> keys, which rise as the order does; empty until `attended`.
        found: keys of those that are known to be ready, rising.
        seen: up to where the log is read.
        attended: the log hears, or is about to be told, of all that are not found.
    """

    __slots__ = (
        "_keys",
        "_next_key",
        "_ready",
        "_unattended",
        "attended",
        "fetch",
        "found",
        "log",
        "members",
        "refs",
        "seen",
    )

    def __init__(self, log: Log, refs: Sequence[ObjectRef[Any]], fetch: bool) -> None:
        self.log = log
        self.fetch = fetch
        self.refs = list(refs)
        self.members: dict[bytes, int] = {}
        self.attended = False
        self.found: list[int] = []
        self.seen = 0
        self._ready = b""
        self._unattended: list[ObjectRef[Any]] = []
        self._keys: Sequence[int] = range(len(self.refs))
        self._next_key = len(self.refs)
        self._look()

    @staticmethod
    def over(log: Log, refs: Sequence[ObjectRef[Any]], fetch: bool) -> Sweep:
        """A new one, or the one that `refs` brings along."""
        sweep = refs.take(log, fetch) if type(refs) is Rest else None
        return sweep if sweep is not None else Sweep(log, refs, fetch)

    def add(self, refs: list[ObjectRef[Any]]) -> None:
        """More references at the end."""
        if not refs:
            return
        keys = range(self._next_key, self._next_key + len(refs))
        self._next_key = keys.stop
        self._keys = array("q", self._keys)
        self._keys.extend(keys)
        self.refs += refs
        ready = _flags(refs, self.fetch)
        self.found.extend(compress(keys, ready))
        if self.attended:
            self.members.update(zip(map(id_of, refs), keys, strict=True))
            self._unattended += compress(refs, map(not_, ready))

    def catch_up(self) -> None:
        """Take in what has become ready since the last look."""
        fresh, self.seen, complete = self.log.since(self.seen)
        if not (complete and self.attended):
            self._look()
            if not self.attended:
                self.attended = True
                self.members = dict(zip(map(id_of, self.refs), self._keys, strict=True))
                known = map(or_, self._ready, map(_is_attended, self.refs))
                self._unattended = list(compress(self.refs, map(not_, known)))
            return
        for object_id in fresh:
            key = self.members.get(object_id)
            if key is None:
                continue
            place = bisect_left(self.found, key)
            if place < len(self.found) and self.found[place] == key:
                continue
            ref = self.refs[bisect_left(self._keys, key)]
            if ref.state == STORED and self.fetch and not ref.local:
                self._unattended.append(ref)
            else:
                self.found.insert(place, key)

    def take_unattended(self) -> list[ObjectRef[Any]]:
        """Those that the log must be told to attend to before anybody sleeps; `catch_up` counts on that."""
        refs, self._unattended = self._unattended, []
        return refs

    def split(self, at_most: int) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """(the first that are ready, all others). The sweep goes on in the second list and must not be used after."""
        found = self.found[:at_most]
        if not found:
            return [], self._rest(self.refs)
        refs, keys = self.refs, self._keys
        ready: list[ObjectRef[Any]] = []
        rest: list[ObjectRef[Any]] = []
        kept = array("q")
        begin = 0
        for key in found:
            place = bisect_left(keys, key, begin)
            ready.append(refs[place])
            if place > begin:
                rest += refs[begin:place]
                kept.extend(keys[begin:place])
            begin = place + 1
        rest += refs[begin:]
        if len(rest) >= REMEMBER:
            kept.extend(keys[begin:])
            del self.found[: len(found)]
            if self.attended:
                for ref in ready:
                    del self.members[ref.binary()]
            self._keys = kept
        return ready, self._rest(rest)

    def _rest(self, refs: list[ObjectRef[Any]]) -> list[ObjectRef[Any]]:
        if len(refs) < REMEMBER:
            return refs
        self.refs = refs
        return Rest(refs, self)

    def _look(self) -> None:
        """Look at all of them."""
        self.seen = self.log.end  # first: what becomes ready meanwhile may be found twice, but not missed
        self._ready = _flags(self.refs, self.fetch)
        self.found = list(compress(self._keys, self._ready))


def _flags(refs: Sequence[ObjectRef[Any]], fetch: bool) -> bytes:
    """For each whether it is ready: 1 or 0."""
    states = bytes(map(_state_of, refs))
    if not fetch or STORED not in states:
        return states.translate(_READY)
    return bytes(map(or_, states.translate(_READY_BUT_STORED), map(_is_local, refs)))
