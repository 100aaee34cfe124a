"""From where calls are submitted, as far as it decides who goes first.

A driver submits at depth 0 and priority 0, a task one deeper than itself and at its own priority. A call may ask for
another priority, but from inside a task for none below the task's own: it usually waits for what it submits, and would
hold its worker while everything between the two priorities goes first.

There is one `Nesting` for each pair, so that it can be compared, and looked up by, as fast as an object can.
"""

from __future__ import annotations

from functools import cache
from typing import Final


class Nesting:
    """Made by `nest` only."""

    __slots__ = ("depth", "in_task", "priority")

    def __init__(self, depth: int, priority: int, in_task: bool) -> None:
        self.depth = depth
        self.priority = priority
        self.in_task = in_task

    def settle(self, asked: int | None) -> int:
        """The priority of a call that is submitted from here; None asks for nothing."""
        if asked is None:
            return self.priority
        return max(asked, self.priority) if self.in_task else asked


@cache
def nest(depth: int, priority: int, in_task: bool) -> Nesting:
    return Nesting(depth, priority, in_task)


OUTERMOST: Final = nest(0, 0, False)
"""Of a driver."""
