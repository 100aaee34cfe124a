"""Interrupting the user code that runs on a worker's main thread: a KeyboardInterrupt, once, and only in there.

Python raises nothing into a thread that sleeps in the kernel (`time.sleep`, a lock, a socket), but a signal ends such
sleeps, and its handler runs on the main thread, wherever that is then: in the call it was meant for, in our own code
between two calls, or in the next call already. So the signal itself says nothing. The handler looks at which call's
code is running now (`user_call`), and raises only if that very call is to be interrupted and was not yet.

`user_call` is set and cleared by plain stores beside the call of the user's function. Python runs handlers after calls
and where functions and loops begin, never between a store and the next one, so there is no gap.

The signal is SIGURG: it is ignored where nobody handles it, hardly any program has a use for it, and SIGINT with
whatever handler the user's code gives it stays the user's. It is sent to the main thread, never to the process.
"""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from shoal.runtime.calls import Call

INTERRUPT: Final = signal.SIGURG


class Interrupts:
    """See the module. One per worker process, made on its main thread.

    Attributes:
        user_call: the call whose code runs on the main thread. Other threads of an actor set it too; their calls are
            never to be interrupted, so that means nothing.
    """

    __slots__ = ("user_call",)

    def __init__(self) -> None:
        self.user_call: Call | None = None
        signal.signal(INTERRUPT, self._handle)

    def send(self) -> None:
        """Have the main thread look at the `ending` of the call whose code it runs. Any thread."""
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, INTERRUPT)

    def _handle(self, _number: int, _frame: Any) -> None:
        call = self.user_call
        if call is not None and (ending := call.ending) is not None and ending.interrupt:
            ending.interrupt = False
            raise KeyboardInterrupt
