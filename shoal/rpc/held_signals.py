"""Keeping the user's signal handlers out of code that must not be cut in two.

Python runs signal handlers on the main thread, between two instructions of whatever that runs, and a handler may raise
(Ctrl-C does). A thread of the user's that does the reactor's work for a moment (`Reactor.lead`) must not be left in the
middle of it. Masking signals does not help: another thread would get them, and the main thread run the handler.

So for that moment each Python handler is replaced by one that takes a note, and what was noted is raised anew, to the
user's own handler, when the moment is over. Only the main thread may change handlers, and it is busy here, so nobody
sees the change. `_signal` is the C module under `signal`, whose wrappers make enums of everything: 10 times slower.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import signal
import threading
from typing import Any, Final

_NUMBERS: Final = (  # SIGINT first: hardly any program has another handler
    int(signal.SIGINT),
    *sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGINT}),
)
_seen: list[Any] = []
_to_hold: list[tuple[int, Any]] = []


def _python_handlers() -> list[tuple[int, Any]]:
    """(signal number, handler) of those handlers that are Python's to run. By the main thread."""
    global _seen, _to_hold
    now = list(map(_signal.getsignal, _NUMBERS))
    if now != _seen:
        _to_hold = [(number, handler) for number, handler in zip(_NUMBERS, now, strict=True) if callable(handler)]
        _seen = now
    return _to_hold


class HeldSignals:
    """`with HeldSignals(): ...` on any thread; does nothing on any but the main one, which alone runs handlers."""

    __slots__ = ("_held", "_noted")

    def __init__(self) -> None:
        self._held: list[tuple[int, Any]] = []
        self._noted: list[int] = []

    def __enter__(self) -> None:
        if threading.get_ident() != threading.main_thread().ident:
            return
        try:
            for number, handler in _python_handlers():
                self._held.append((number, handler))
                _signal.signal(number, self._note)
        except BaseException:  # of a handler that is not held yet
            self._give_back()
            raise

    def _note(self, number: int, _frame: Any) -> None:
        self._noted.append(number)

    def __exit__(self, *_: object) -> None:
        if self._held:
            try:
                self._give_back()
            finally:
                self._raise_noted()

    def _give_back(self) -> None:
        """Also when a handler that is back already raises in the middle of it."""
        held = self._held
        try:
            while held:
                _signal.signal(*held[-1])  # SIGINT last
                held.pop()
        finally:
            if held:
                self._give_back()

    def _raise_noted(self) -> None:
        """Each once, as the kernel does with signals that wait; also when the handler of one raises."""
        try:
            while self._noted:
                number = self._noted[0]
                self._noted = [other for other in self._noted if other != number]
                signal.raise_signal(number)
        finally:
            if self._noted:
                self._raise_noted()
