"""The order of one process's calls to one actor: a line of calls for each of its concurrency groups.

Calls of one line are sent in the order in which they were submitted. One whose arguments are not ready holds up those
behind it, unless the line is in any order: then it steps aside. So does nothing else: a call of another group waits in
another line.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from shoal.runtime.task_run import TaskRun

if TYPE_CHECKING:
    from shoal.runtime.link import WorkerLink

WINDOW: Final = 10_000
"""Calls sent and not answered, per caller and actor; more wait here rather than in the actor's memory."""


class Line:
    """See the module. Reactor's thread only.

    Attributes:
        queue: what is to be sent, in order.
        alone: is sent, may be tried again, and nothing may overtake it.
        any_order: calls may overtake each other.
    """

    __slots__ = ("_aside", "alone", "any_order", "queue")

    def __init__(self, any_order: bool) -> None:
        self.queue: collections.deque[TaskRun] = collections.deque()
        self.alone: TaskRun | None = None
        self.any_order = any_order
        self._aside: dict[int, TaskRun] = {}  # by counter: waits for arguments, and holds nobody up

    def send_to(self, link: WorkerLink) -> None:
        """Send what may be sent, as far as the window allows."""
        queue = self.queue
        while queue and self.alone is None and len(link.running) < WINDOW:
            run = queue[0]
            if run.stage == "arguments":
                if not self.any_order:
                    return
                self._aside[queue.popleft().counter] = run
                continue
            queue.popleft()
            link.send(run)
            if run.bound.retry_on and run.retries and not self.any_order:
                self.alone = run

    def arguments_ready(self, run: TaskRun) -> None:
        if self._aside.pop(run.counter, None) is not None:
            self.queue.append(run)

    def withdraw(self, run: TaskRun) -> bool:
        """It will not be sent. True when that may let others go on."""
        if self._aside.pop(run.counter, None) is not None:
            return False
        try:
            self.queue.remove(run)
        except ValueError:
            return False  # it was not in the queue: it had been sent
        return True

    def again(self, runs: list[TaskRun]) -> None:
        """They were sent, and are to be sent again before all others. Oldest first."""
        self.alone = None
        self.queue.extendleft(reversed(runs))

    def take_all(self) -> list[TaskRun]:
        taken = list(self.waiting())
        self.queue.clear()
        self._aside.clear()
        return taken

    def waiting(self) -> Iterator[TaskRun]:
        return itertools.chain(self.queue, self._aside.values())


class Lines:
    """All lines of one actor. `main` is that of the calls which name no group."""

    __slots__ = ("_all", "main")

    def __init__(self) -> None:
        self.main = Line(any_order=False)
        self._all = {"": self.main}

    def of(self, run: TaskRun) -> Line:
        bound = run.bound
        line = self._all.get(bound.group)
        if line is None:
            line = self._all[bound.group] = Line(bound.group_size > 1)
        return line

    def send_to(self, link: WorkerLink) -> None:
        for line in self._all.values():
            if line.queue:
                line.send_to(link)

    def again(self, runs: Iterable[TaskRun]) -> None:
        by_line: dict[Line, list[TaskRun]] = {}
        for run in runs:
            by_line.setdefault(self.of(run), []).append(run)
        for line, those in by_line.items():
            line.again(those)

    def link_lost(self) -> None:
        for line in self._all.values():
            line.alone = None

    def take_all(self) -> list[TaskRun]:
        return [run for line in self._all.values() for run in line.take_all()]

    def waiting(self) -> Iterator[TaskRun]:
        return itertools.chain.from_iterable(line.waiting() for line in self._all.values())
