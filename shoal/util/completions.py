"""A thread that calls back for each reference that becomes ready: behind pools, executors and the joblib backend.

Their callbacks belong to the user (`Future.add_done_callback`, `apply_async(callback=...)`) and may do anything, also
wait for other results, so they cannot run on the runtime's own thread.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shoal.api.initialize import connect_if_needed
from shoal.exceptions import LocalAgentDiedError, ShoalError
from shoal.runtime import slot

if TYPE_CHECKING:
    from shoal.runtime.object_ref import ObjectRef

logger = logging.getLogger(__name__)

Read = Callable[[], Any]


class Completions:
    """Calls `done(read)` on a thread of its own; `read()` gives the value or raises what the task raised.

    The thread starts with the first `watch`, and ends after `finish` or `stop`. While it waits in a worker, that
    worker's CPUs are lent out, as in any `get`.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._runtime = connect_if_needed()
        self._arrivals = self._runtime.arrivals()
        self._watched: dict[bytes, Callable[[Read], None]] = {}
        # Re-entrant: whoever collects garbage while it holds the lock may come in again, from a `__del__`.
        self._changed = threading.Condition(threading.RLock())
        self._thread: threading.Thread | None = None
        self._ending = False
        self._later: tuple[float, Callable[[], None]] | None = None

    def watch(self, ref: ObjectRef[Any], done: Callable[[Read], None]) -> None:
        """Any thread."""
        with self._changed:
            self._watched[ref.binary()] = done
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()
        self._arrivals.add([ref])

    def check_connected(self) -> None:
        """A call now would go to the cluster that this began with, and not make the program connect to another one.

        Raises: LocalAgentDiedError: it would not.
        """
        if slot.current is not self._runtime:
            raise LocalAgentDiedError("the cluster that this belongs to is not connected any more")

    def cancel(self, ref: ObjectRef[Any], *, recursive: bool = True) -> None:
        self._runtime.cancel(ref, force=False, recursive=recursive)

    def finish(self) -> None:
        """Let the thread end when nothing is being watched any more."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def stop(self) -> None:
        """Forget what is being watched, and let the thread end."""
        with self._changed:
            self._watched.clear()
            self._ending = True
            self._changed.notify()
        self._arrivals.close()

    def call_after(self, delay_s: float, call: Callable[[], None]) -> None:
        """By a callback: call this too, unless something is due already, or nothing is being watched by then."""
        if self._later is None:
            self._later = time.monotonic() + delay_s, call

    def _run(self) -> None:
        while True:
            if self._later is not None and time.monotonic() >= self._later[0]:
                (_, call), self._later = self._later, None
                self._guard(call)
            with self._changed:
                while not self._watched:
                    if self._ending:
                        self._thread = None
                        return
                    self._changed.wait()
            try:
                left_s = None if self._later is None else max(0.001, self._later[0] - time.monotonic())
                arrived = self._arrivals.take(left_s)
            except ShoalError as exc:  # the cluster is gone: nothing will come any more
                self._fail_all(exc)
                continue
            for ref in arrived:
                self._call(ref.binary(), functools.partial(self._read, ref))

    def _read(self, ref: ObjectRef[Any]) -> Any:
        return self._runtime.get((ref,), None)[0]

    def _fail_all(self, error: ShoalError) -> None:
        def read() -> Any:
            raise error

        for key in list(self._watched):
            self._call(key, read)

    def _call(self, key: bytes, read: Read) -> None:
        with self._changed:
            done = self._watched.pop(key, None)
        if done is not None:
            self._guard(functools.partial(done, read))

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            logger.exception("a callback of %s raised", self._name)
