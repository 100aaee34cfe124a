"""The order in which one process's calls to an actor are sent, by concurrency group; and how many may be pending."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.runtime import actor_lines
from shoal.runtime.actor_lines import Line, Lines
from shoal.runtime.nesting import OUTERMOST
from shoal.runtime.pending_calls import PendingCalls
from shoal.runtime.task_run import Bound, TaskRun


class FakeLink:
    def __init__(self) -> None:
        self.running: dict[int, TaskRun] = {}
        self.sent: list[int] = []

    def send(self, run: TaskRun) -> None:
        run.stage = "sent"
        self.running[run.counter] = run
        self.sent.append(run.counter)


def call(counter: int, group: str = "", size: int = 0, *, waits: bool = False, **bound: Any) -> TaskRun:
    run = TaskRun(
        counter, Bound(SimpleNamespace(), "A.m", "A.m", 1, group=group, group_size=size, **bound), None, OUTERMOST
    )
    run.stage = "arguments" if waits else "queued"
    return run


def ready(run: TaskRun, line: Line) -> None:
    run.stage = "queued"
    line.arguments_ready(run)


def test_one_that_waits_for_arguments_holds_up_its_line() -> None:
    link, line = FakeLink(), Line(any_order=False)
    runs = [call(0), call(1, waits=True), call(2)]
    line.queue.extend(runs)
    line.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [0]
    ready(runs[1], line)
    line.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [0, 1, 2]


def test_one_that_waits_for_arguments_steps_aside_in_any_order() -> None:
    link, line = FakeLink(), Line(any_order=True)
    runs = [call(0, waits=True), call(1), call(2, waits=True)]
    line.queue.extend(runs)
    line.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [1]
    assert [run.counter for run in line.waiting()] == [0, 2]
    ready(runs[2], line)
    line.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [1, 2]
    assert not line.withdraw(runs[0])
    assert line.take_all() == []


def test_a_call_that_may_be_tried_again_is_alone_in_an_ordered_line() -> None:
    link, lines = FakeLink(), Lines()
    first = call(0, max_retries=2, retry_on=("*",))
    others = [call(1), call(2, "io", 1), call(3, "io", 1)]
    for run in (first, *others):
        lines.of(run).queue.append(run)
    lines.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [0, 2, 3]  # another group does not wait for it
    lines.again([first])
    lines.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [0, 2, 3, 0]
    lines.link_lost()
    lines.send_to(link)  # type: ignore[arg-type]
    assert link.sent == [0, 2, 3, 0, 1]


def test_the_window_is_of_all_groups_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_lines, "WINDOW", 3)
    link, lines = FakeLink(), Lines()
    for run in [call(n, "io" if n % 2 else "", n % 2) for n in range(6)]:
        lines.of(run).queue.append(run)
    lines.send_to(link)  # type: ignore[arg-type]
    assert len(link.sent) == 3
    link.running.clear()
    lines.send_to(link)  # type: ignore[arg-type]
    assert sorted(link.sent) == list(range(6))


@given(
    st.lists(st.tuples(st.sampled_from([("", 0), ("one", 1), ("two", 2)]), st.booleans()), max_size=30),
    st.randoms(use_true_random=False),
)
def test_every_call_is_sent_once_and_groups_of_one_in_order(
    plan: list[tuple[tuple[str, int], bool]], random: Any
) -> None:
    link, lines = FakeLink(), Lines()
    runs = [call(n, group, size, waits=waits) for n, ((group, size), waits) in enumerate(plan)]
    for run in runs:
        lines.of(run).queue.append(run)
    waiting = [run for run in runs if run.stage == "arguments"]
    random.shuffle(waiting)
    lines.send_to(link)  # type: ignore[arg-type]
    for run in waiting:
        ready(run, lines.of(run))
        lines.send_to(link)  # type: ignore[arg-type]
        if random.random() < 0.2:  # the process ended: what was sent comes first, and in order
            back = [link.running.pop(counter) for counter in sorted(link.running)]
            for one in back:
                one.stage = "queued"
                link.sent.remove(one.counter)
            lines.link_lost()
            lines.again(back)
            lines.send_to(link)  # type: ignore[arg-type]
    assert sorted(link.sent) == list(range(len(plan)))
    for group in ("", "one"):
        sent = [n for n in link.sent if plan[n][0][0] == group]
        assert sent == sorted(sent)
    assert not list(lines.waiting())


def test_pending_calls_have_as_many_places_as_the_limit() -> None:
    pending = PendingCalls(2)
    assert [pending.begin() for _ in range(4)] == [True, True, False, False]
    pending.end()
    assert [pending.begin(), pending.begin()] == [True, False]
