"""`max_pending_calls`: how many calls of this process to one actor have no result yet; may there be one more?"""

from __future__ import annotations

import collections
from typing import Final


class PendingCalls:
    """Begun in users' threads, ended in the reactor's: each is one operation on a deque, which no signal and no other
    thread can cut in two. Threads that ask at the same moment for the last place may both be told that it is taken."""

    __slots__ = ("_begun", "limit")

    def __init__(self, limit: int) -> None:
        self.limit: Final = limit
        self._begun: collections.deque[None] = collections.deque()

    def begin(self) -> bool:
        """Whether one more may be made; then `end` is to be called once."""
        self._begun.append(None)
        if len(self._begun) <= self.limit:
            return True
        self._begun.pop()
        return False

    def end(self) -> None:
        self._begun.pop()
