"""Very many references at once: in `get`, in `wait` and its loops, in futures and coroutines, own and borrowed."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest

import shoal

pytestmark = pytest.mark.usefixtures("local")


@shoal.remote
def same(value: Any) -> Any:
    return value


@shoal.remote
def nothing() -> None:
    return None


def test_a_hundred_thousand_results_and_values_in_one_get() -> None:
    refs = [nothing.remote() for _ in range(50_000)]
    refs += [shoal.put(None) for _ in range(50_000)]
    assert shoal.get(refs) == [None] * 100_000
    assert shoal.get(refs, timeout=0) == [None] * 100_000
    ready, rest = shoal.wait(refs, num_returns=len(refs))
    assert (ready, rest) == (refs, [])


def test_a_loop_of_waits_takes_each_once() -> None:
    refs = rest = [same.remote(i) for i in range(10_000)]
    got = []
    while rest:
        ready, rest = shoal.wait(rest)
        got += ready
    assert len(got) == len(refs)
    assert set(got) == set(refs)
    assert sorted(shoal.get(got)) == list(range(10_000))


def test_waits_with_a_bounded_number_underway() -> None:
    rest = [same.remote(i) for i in range(100)]
    got = []
    for i in range(100, 2000):
        ready, rest = shoal.wait(rest)
        got += shoal.get(ready)
        rest.append(same.remote(i))
    got += shoal.get(rest)
    assert sorted(got) == list(range(2000))


def test_waits_over_a_set_of_references() -> None:
    pending = {same.remote(i) for i in range(500)}
    got = []
    while pending:
        ready, _ = shoal.wait(list(pending), timeout=20)
        got += shoal.get(ready)
        pending -= set(ready)
    assert sorted(got) == list(range(500))


def test_stored_results_in_a_loop_of_waits() -> None:
    refs = rest = [same.remote(bytes(120_000)) for _ in range(60)]
    seen = 0
    while rest:
        ready, rest = shoal.wait(rest, timeout=30)
        seen += len(shoal.get(ready[0])) // 120_000
    assert seen == len(refs)


@shoal.remote
class Asker:
    """Borrows references and asks for their values."""

    def get(self, box: list[Any]) -> int:
        return sum(shoal.get(box))

    def wait(self, box: list[Any]) -> int:
        rest, total = box, 0
        while rest:
            ready, rest = shoal.wait(rest, timeout=30)
            total += shoal.get(ready[0])
        return total


def test_borrowed_references_ready_and_pending() -> None:
    asker = Asker.remote()
    values = [shoal.put(i) for i in range(3000)]
    assert shoal.get(asker.get.remote(values)) == sum(range(3000))
    results = [same.remote(i) for i in range(3000)]
    assert shoal.get(asker.get.remote(results)) == sum(range(3000))
    assert shoal.get(asker.wait.remote([same.remote(i) for i in range(1000)])) == sum(range(1000))


def test_futures_and_coroutines_by_the_thousand() -> None:
    def refs() -> list[shoal.ObjectRef[Any]]:
        return [same.remote(i) for i in range(3000)]

    async def gathered() -> list[Any]:
        return await asyncio.gather(*refs())

    async def waited() -> list[Any]:
        done, pending = await asyncio.wait([ref.as_future() for ref in refs()])
        assert not pending
        return [future.result() for future in done]

    assert asyncio.run(gathered()) == list(range(3000))
    assert sorted(asyncio.run(waited())) == list(range(3000))
    done, left = concurrent.futures.wait([ref.future() for ref in refs()], timeout=60)
    assert not left
    assert sorted(future.result() for future in done) == list(range(3000))
