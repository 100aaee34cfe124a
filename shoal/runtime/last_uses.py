"""Noticing that the last reference to something is gone, without running Python code at that moment.

The problem: the agent must hear when this process drops an object, and references die anywhere: in a thread that holds
any lock, amid a garbage collection, or while a Ctrl-C is on its way. A `__del__`, or a Python function as a weak
reference's callback, is a place where an interrupt is raised and then swallowed (Python can only print it), and where
another thread may run between "the object is gone" and "somebody knows".

The choice: two weak references whose callbacks are C functions. One appends itself to a deque: never lost, and done
before any other thread sees the death. The other rings a bell, an eventfd that the reactor listens to. It was made
first, because callbacks run in the reverse order of their making. The reactor then takes what is in the deque.
"""

from __future__ import annotations

import collections
import operator
import os
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Final

_RING: Final = operator.methodcaller("ring")
_SILENCE: Final = staticmethod(int)  # a C function that does nothing


class LastUse(weakref.ref[Any]):
    """Tells, by being in `LastUses.gone`, that what it refers to is no more. `key` and `home` say what that was."""

    __slots__ = ("alarm", "home", "key", "note", "request")

    key: bytes
    home: bytes
    alarm: Any
    note: bytes  # an error that nobody has seen yet
    request: int  # of the Resolve that is not answered yet


class LastUses:
    """The bell of one runtime, and what it has rung for. `open` hangs it up, in the process that will hear it.

    Attributes:
        gone: appended to by the interpreter, and by whoever has to tell something in order with the ends; taken by the
            reactor.
        fd: readable when something was appended.
    """

    def __init__(self) -> None:
        self.gone: collections.deque[Any] = collections.deque()
        self.fd = -1
        # A class of its own, so that one assignment silences all alarms: `fd` may be somebody else's file then.
        self._alarm: Any = type("_Alarm", (weakref.ref,), {"__slots__": (), "ring": _SILENCE})
        self._tell: Callable[[Any], None] = self.gone.append

    def open(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._alarm.ring = staticmethod(partial(os.eventfd_write, self.fd, 1))

    def follow(self, target: Any, key: bytes, home: bytes = b"") -> LastUse:
        """Who gets it must keep the result for as long as it wants to be told."""
        alarm = self._alarm(target, _RING)
        use = LastUse(target, self._tell)
        use.key, use.home, use.alarm, use.note, use.request = key, home, alarm, b"", 0
        return use

    def heard(self) -> None:
        """Reset the bell. To be called before looking into `gone`."""
        os.eventfd_read(self.fd)

    def silence(self) -> None:
        """Ring no more."""
        self._alarm.ring = _SILENCE

    def __del__(self) -> None:
        # Not before: a thread on its way into the ring would write into whatever file got the number next.
        self.silence()
        if self.fd >= 0:
            os.close(self.fd)
