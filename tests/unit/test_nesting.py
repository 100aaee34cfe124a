from __future__ import annotations

import pytest

from shoal.runtime.nesting import OUTERMOST, nest


def test_there_is_one_for_each_place() -> None:
    assert nest(1, 5, True) is nest(1, 5, True)
    assert nest(1, 5, True) is not nest(1, 5, False)


@pytest.mark.parametrize(("asked", "settled"), [(None, 3), (5, 5), (3, 3), (1, 3), (-4, 3)])
def test_a_call_never_ranks_below_the_task_that_submits_it(asked: int | None, settled: int) -> None:
    assert nest(2, 3, True).settle(asked) == settled


@pytest.mark.parametrize(("asked", "settled"), [(None, 3), (5, 5), (-4, -4)])
def test_an_actor_may_submit_at_any_priority(asked: int | None, settled: int) -> None:
    assert nest(1, 3, False).settle(asked) == settled


def test_a_driver_submits_at_priority_0() -> None:
    assert [OUTERMOST.settle(None), OUTERMOST.settle(-2), OUTERMOST.depth] == [0, -2, 0]
