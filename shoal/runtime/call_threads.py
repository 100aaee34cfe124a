"""Threads of an actor: each concurrency group has its own, made when they are needed, up to the group's size.

So a group whose threads all wait holds up no other. Calls of a group begin in the order of their arrival.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from shoal.runtime.calls import Call

logger = logging.getLogger(__name__)

Calls = queue.SimpleQueue[Call | None]


class CallThreads:
    """The threads of one group.

    Args:
        most: how many there may be.
        calls: what they are to run; None is passed on from thread to thread, and ends all.
        execute: runs one call.
        leaving: not empty when they are to stop before the calls that wait.
        over: called by the last thread when all have stopped after `end`.
    """

    def __init__(
        self,
        name: str,
        most: int,
        calls: Calls,
        execute: Callable[[Call], None],
        leaving: Callable[[], str],
        over: Callable[[], None],
    ) -> None:
        self._name = name
        self._most = most
        self._calls = calls
        self._execute = execute
        self._leaving = leaving
        self._over = over
        self._idle = threading.Semaphore(0)  # threads that wait for a call
        self._made = 0  # the reactor's
        self._stopped = 0
        self._ends = False
        self._lock = threading.Lock()

    def submit(self, call: Call) -> None:
        """On the reactor's thread."""
        self._calls.put(call)
        if self._made < self._most and not self._idle.acquire(blocking=False):
            try:
                threading.Thread(target=self._work, name=f"{self._name}-{self._made + 1}", daemon=True).start()
            except RuntimeError as exc:
                if not self._made:
                    raise
                logger.warning("%s cannot have more than %s threads: %s", self._name, self._made, exc)
                self._most = self._made
            else:
                self._made += 1

    def end(self) -> None:
        """Stop after what was submitted. On the reactor's thread."""
        with self._lock:
            self._ends = True
            nobody = self._stopped == self._made
        if nobody:
            self._over()
        self._calls.put(None)

    def _work(self) -> None:
        calls, execute = self._calls, self._execute
        while not self._leaving():
            try:
                call = calls.get_nowait()
            except queue.Empty:
                self._idle.release()
                call = calls.get()
            if call is None:
                calls.put(None)
                break
            execute(call)
        with self._lock:
            self._stopped += 1
            last = self._ends and self._stopped == self._made
        if last:
            self._over()
