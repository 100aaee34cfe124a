"""The one process-wide slot: the runtime that this process's API calls go to.

A process that was forked by user code inherits the slot but not the threads behind it, and its parent still uses the
sockets. So the child starts with an empty slot and may `init()` for itself. The inherited runtime is kept, untouched,
until the child ends: letting it be collected would close and unregister what the two share.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.runtime.interface import Runtime

current: Runtime | None = None
inherited: Final[list[Runtime]] = []


def _after_fork_in_child() -> None:
    global current
    if current is not None:
        runtime, current = current, None
        inherited.append(runtime)
        runtime.forget_in_child()


os.register_at_fork(after_in_child=_after_fork_in_child)
