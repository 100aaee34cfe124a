"""Concurrency groups: each has its own threads, or its own places on the event loop; and limits on pending calls."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import shoal
from shoal.exceptions import ActorDiedError, ActorUnavailableError, PendingCallsLimitExceeded

pytestmark = pytest.mark.usefixtures("local")


@shoal.remote(concurrency_groups={"io": 2, "compute": 1})
class Threads:
    """Its methods meet each other, or wait until they are let go."""

    def __init__(self) -> None:
        self.gates = {name: threading.Event() for name in ("io", "compute", "default")}
        self.both = threading.Barrier(2)
        self.seen: list[Any] = []

    @shoal.method(concurrency_group="io")
    def open(self, name: str) -> None:
        self.gates[name].set()

    @shoal.method(concurrency_group="io")
    def meet(self) -> int:
        return self.both.wait(timeout=30)

    @shoal.method(concurrency_group="compute")
    def wait_computing(self) -> str:
        assert self.gates["compute"].wait(30)
        return threading.current_thread().name

    @shoal.method(concurrency_group="compute")
    def note(self, value: Any) -> str:
        self.seen.append(value)
        return threading.current_thread().name

    def wait(self) -> str:
        assert self.gates["default"].wait(30)
        return threading.current_thread().name

    def notes(self) -> list[Any]:
        return self.seen


def test_groups_do_not_wait_for_each_other() -> None:
    actor = Threads.remote()
    computing, waiting = actor.wait_computing.remote(), actor.wait.remote()
    assert sorted(shoal.get([actor.meet.remote(), actor.meet.remote()], timeout=30)) == [0, 1]  # two threads
    shoal.get([actor.open.remote("compute"), actor.open.remote("default")], timeout=30)
    assert shoal.get([computing, waiting], timeout=30) == ["compute-1", "actor-1"]


def test_a_call_chooses_its_group() -> None:
    actor = Threads.remote()
    waiting = actor.wait.options(concurrency_group="compute").remote()
    assert shoal.get(actor.note.options(concurrency_group="io").remote(1), timeout=30) == "io-1"
    shoal.get(actor.open.remote("default"), timeout=30)
    assert shoal.get(waiting, timeout=30) == "compute-1"
    assert shoal.get(actor.notes.options(concurrency_group=None).remote(), timeout=30) == [1]  # as the method says


def test_a_group_of_one_keeps_the_order_of_a_caller_and_no_other_does() -> None:
    @shoal.remote(num_cpus=0)
    def after(refs: list[Any], value: int) -> int:
        shoal.get(refs)
        return value

    actor = Threads.remote()
    gate = actor.wait.remote()
    late = after.remote([gate], 0)
    held = [actor.note.remote(late), *(actor.note.remote(n) for n in range(1, 5))]
    # All of "compute" waits for an argument; "io" does not, and opens what that is waiting for.
    assert shoal.get(actor.note.options(concurrency_group="io").remote("io"), timeout=30) == "io-1"
    shoal.get(actor.open.remote("default"), timeout=30)
    assert shoal.get(held, timeout=30) == ["compute-1"] * 5
    assert shoal.get(actor.notes.remote(), timeout=30) == ["io", 0, 1, 2, 3, 4]

    refs = [actor.note.remote(shoal.put(bytes(200_000)) if n % 3 == 0 else n) for n in range(30)]
    shoal.get(refs, timeout=30)
    numbers = [n if isinstance(n, int) else None for n in shoal.get(actor.notes.remote(), timeout=30)[6:]]
    assert numbers == [None if n % 3 == 0 else n for n in range(30)]


@shoal.remote(concurrency_groups={"io": 2}, max_concurrency=3)
class Loop:
    def __init__(self) -> None:
        self.inside = {"io": 0, "": 0}
        self.most = {"io": 0, "": 0}
        self.go, self.full = asyncio.Event(), asyncio.Event()

    async def _run(self, group: str) -> None:
        self.inside[group] += 1
        self.most[group] = max(self.most[group], self.inside[group])
        if self.inside == {"io": 2, "": 2}:
            self.full.set()
        await self.go.wait()
        self.inside[group] -= 1

    @shoal.method(concurrency_group="io")
    async def io(self) -> None:
        await self._run("io")

    async def default(self) -> None:
        await self._run("")

    async def release(self) -> dict[str, int]:
        """The last of the default group to come."""
        await self.full.wait()
        self.go.set()
        return dict(self.most)


def test_an_async_actor_has_places_for_each_group() -> None:
    actor = Loop.remote()
    calls = [actor.io.remote() for _ in range(5)] + [actor.default.remote() for _ in range(2)]
    assert shoal.get(actor.release.remote(), timeout=30) == {"io": 2, "": 2}
    shoal.get(calls, timeout=30)


def test_what_was_accepted_ends_before_the_actor_does() -> None:
    @shoal.remote(concurrency_groups={"a": 1, "b": 2})
    class Slow:
        def __init__(self) -> None:
            self.met = threading.Barrier(3)

        @shoal.method(concurrency_group="a")
        def a(self) -> str:
            self.met.wait(30)
            return "a"

        @shoal.method(concurrency_group="b")
        def b(self) -> str:
            self.met.wait(30)
            return "b"

    actor = Slow.remote()
    refs = [actor.a.remote(), actor.b.remote(), actor.b.remote()]
    del actor
    assert shoal.get(refs, timeout=30) == ["a", "b", "b"]


def test_leaving_from_a_group() -> None:
    actor = Threads.remote()
    computing = actor.wait_computing.remote()
    leave = actor.__ray_call__.options(concurrency_group="io").remote(lambda _: shoal.actor.exit_actor())
    for ref in (leave, computing):
        with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
            shoal.get(ref, timeout=30)


def test_unknown_groups_are_named() -> None:
    actor = Threads.remote()
    with pytest.raises(
        ValueError,
        match=r"Threads\.wait\.options\(\).*no concurrency group 'comput'.*mean 'compute'.*It has 'io', 'compute'",
    ):
        actor.wait.options(concurrency_group="comput")
    borrowed = shoal.get(shoal.put(actor))
    with pytest.raises(ValueError, match=r"has no concurrency group 'disk'"):
        borrowed.wait.options(concurrency_group="disk")
    with pytest.raises(ValueError, match=r"Wrong\.read\b.*no concurrency group 'io'.*It has none"):

        @shoal.remote
        class Wrong:
            @shoal.method(concurrency_group="io")
            def read(self) -> None: ...


# ------------------------------------------------------------------------------------------------------- pending calls


@shoal.remote(max_concurrency=8)
class Gate:
    def __init__(self) -> None:
        self.open_ = threading.Event()

    def pass_(self) -> bool:
        return self.open_.wait(30)

    def open(self) -> None:
        self.open_.set()

    def fail(self) -> None:
        raise ValueError("no")


def test_pending_calls_are_limited_where_they_are_made() -> None:
    opener = Gate.options(name="gate").remote()
    limited = Gate.options(max_pending_calls=3, name="limited").remote()
    refs = [limited.pass_.remote() for _ in range(3)]
    with pytest.raises(PendingCallsLimitExceeded, match=r"Gate\.pass_.*3 calls.*max_pending_calls"):
        limited.pass_.remote()
    found = shoal.get_actor("limited")
    with pytest.raises(PendingCallsLimitExceeded):  # of the same process, whichever handle it uses
        found.open.remote()
    with pytest.raises(PendingCallsLimitExceeded):
        found.pass_.options(name="other").remote()

    @shoal.remote(num_cpus=0)
    def open_it(gate: Any) -> None:
        shoal.get(gate.open.remote())

    shoal.get(open_it.remote(limited), timeout=30)  # another process has places of its own
    assert shoal.get(refs, timeout=30) == [True] * 3
    for _ in range(10):  # each has its place back when its result is there, also when that is an error
        assert shoal.get(limited.pass_.remote(), timeout=30)
        with pytest.raises(ValueError, match="no"):
            shoal.get(limited.fail.remote(), timeout=30)
    with pytest.raises(TypeError):
        limited.pass_.remote(threading.Lock())
    assert shoal.get([limited.pass_.remote() for _ in range(3)], timeout=30) == [True] * 3
    del opener


def test_calls_that_fail_with_the_actor_give_their_places_back() -> None:
    limited = Gate.options(max_pending_calls=2, max_restarts=1).remote()
    for _ in range(2):
        assert shoal.get(limited.__ray_ready__.remote(), timeout=30)
        refs = [limited.pass_.remote() for _ in range(2)]
        with pytest.raises(PendingCallsLimitExceeded):
            limited.pass_.remote()
        shoal.kill(limited, no_restart=False)
        for ref in refs:
            with pytest.raises((ActorDiedError, ActorUnavailableError)):
                shoal.get(ref, timeout=30)
    for _ in range(3):
        with pytest.raises(ActorDiedError):
            shoal.get(limited.pass_.remote(), timeout=30)


# --------------------------------------------------------------------------------------------------------------- order


def test_calls_of_a_synchronous_actor_may_overtake_when_told_so() -> None:
    @shoal.remote
    class Notes:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def note(self, value: Any) -> None:
            self.seen.append(value)

        def notes(self) -> list[Any]:
            return self.seen

    @shoal.remote(num_cpus=0)
    def after(refs: list[Any]) -> str:
        shoal.get(refs)
        return "late"

    actor = Notes.options(allow_out_of_order_execution=True).remote()
    marker = Notes.remote()
    gate = marker.note.remote(0)
    late = actor.note.remote(after.remote([gate, actor.note.remote("early")]))
    early = actor.note.remote("next")
    shoal.get([late, early], timeout=30)
    assert sorted(shoal.get(actor.notes.remote(), timeout=30)) == ["early", "late", "next"]
    assert shoal.get(actor.notes.remote(), timeout=30)[-1] == "late"
