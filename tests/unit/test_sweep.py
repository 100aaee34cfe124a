"""Waits over what earlier waits left over, against a naive reading of the same references."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest

from shoal.node.messages import ERROR, INLINE, LOST, PENDING, STORED, ObjectState, Resolved
from shoal.runtime import ready_log
from shoal.runtime.object_ref import ObjectRef
from shoal.runtime.ready_log import ReadyLog, WaitCall
from shoal.runtime.sweep import REMEMBER, Rest, Sweep


class Objects:
    """As much of a runtime as the log asks for. What is called soon is called at once."""

    def __init__(self) -> None:
        self.reactor: Any = self
        self.waiters: set[Any] = set()
        self.closed = ""
        self.watched = 0
        self.fetches: list[tuple[ObjectRef[Any], Callable[[Any], None]]] = []

    def call_soon(self, call: Callable[..., object], *args: Any) -> None:
        call(*args)

    def fail_everything(self, error: Exception) -> None:
        for waiter in list(self.waiters):
            for ref in waiter.refs:
                if ref.state == PENDING:
                    self.learn(ref, ObjectState(ERROR))

    def watch(self, ref: ObjectRef[Any], waiter: Any) -> bool:
        self.watched += 1
        ref.waiters = [*(ref.waiters or ()), waiter]
        return False

    def follows(self, ref: ObjectRef[Any]) -> bool:
        return True

    def fetch(self, ref: ObjectRef[Any], answered: Any) -> int:
        self.fetches.append((ref, answered))
        return len(self.fetches)

    def view_of(self, ref: ObjectRef[Any], reply: Any) -> memoryview:
        return memoryview(b"")

    def learn(self, ref: ObjectRef[Any], state: ObjectState) -> None:
        ref.state = state.state
        for waiter in ref.waiters or ():
            waiter.ready(ref)
        ref.waiters = None


class World:
    def __init__(self) -> None:
        self.objects = Objects()
        self.log = ReadyLog(self.objects)
        self.made = 0

    def refs(self, count: int) -> list[ObjectRef[Any]]:
        self.made += count
        return [ObjectRef(n.to_bytes(28, "little"), b"home") for n in range(self.made - count, self.made)]

    def end(self, ref: ObjectRef[Any], state: int = INLINE) -> None:
        self.objects.learn(ref, ObjectState(state))

    def bring_all(self) -> None:
        fetches, self.objects.fetches = self.objects.fetches, []
        for ref, answered in fetches:
            answered(Resolved(object_id=ref.binary(), state=ObjectState(STORED, b"", 1, [])))

    def sweep(self, refs: list[Any], count: int, fetch: bool = True) -> tuple[Sweep, WaitCall | None]:
        """As `Waiting.wait` begins."""
        sweep = Sweep.over(self.log, refs, fetch)
        if len(sweep.found) < count:
            sweep.catch_up()
        if len(sweep.found) >= count:
            return sweep, None
        call = WaitCall(
            self.objects, self.log, sweep.refs, sweep.members, count - len(sweep.found),
            fetch=fetch, since=sweep.seen, unattended=sweep.take_unattended(),
        )  # fmt: skip
        call.begin()
        return sweep, call

    def wait(self, refs: list[Any], count: int = 1, fetch: bool = True) -> tuple[list[Any], list[Any]]:
        """A wait that only looks."""
        sweep, call = self.sweep(refs, count, fetch)
        if call is not None:
            call.leave()
            sweep.catch_up()
        return sweep.split(count)


def naive(refs: list[Any], count: int, fetch: bool) -> tuple[list[Any], list[Any]]:
    ready = [ref for ref in refs if (ref.local if ref.state == STORED and fetch else ref.state != PENDING)][:count]
    return ready, [ref for ref in refs if ref not in ready]


@pytest.mark.parametrize("seed", range(60))
def test_waits_find_what_a_look_at_everything_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr(ready_log, "KEPT", chance.choice([8, 1000]))  # so that some come too late for the log
    world = World()
    every = world.refs(chance.randint(1, 150))
    lists: list[list[Any]] = [list(every)]
    for _ in range(150):
        act = chance.random()
        refs = chance.choice(lists)
        if act < 0.4:
            pending = [ref for ref in every if ref.state == PENDING]
            for ref in chance.sample(pending, min(len(pending), chance.randint(0, 6))):
                state = chance.choice([INLINE, INLINE, STORED, ERROR, LOST])
                ref.local = state == STORED and chance.random() < 0.5
                world.end(ref, state)
        elif act < 0.5:
            world.bring_all()
        elif act < 0.6:
            new = world.refs(chance.randint(1, 3))
            every += new
            refs += new
        elif act < 0.65 and refs:
            del refs[chance.randrange(len(refs))]
        elif act < 0.7:
            chance.shuffle(refs)
        elif refs:
            count, fetch = chance.randint(1, len(refs)), chance.random() < 0.7
            before = list(refs)
            got = world.wait(refs, count, fetch)
            assert got == naive(before, count, fetch)
            assert refs == before
            lists.append(got[1])
            lists = lists[-3:]
    assert not world.objects.waiters


def test_a_wait_over_what_was_left_enters_itself_nowhere_again() -> None:
    world = World()
    refs = rest = world.refs(1000)
    for ref in reversed(refs):
        world.end(ref)
        ready, rest = world.wait(rest)
        assert ready == [ref]
    assert rest == []
    assert world.objects.watched <= len(refs)


def test_the_log_hears_of_each_reference_once_however_many_wait() -> None:
    world = World()
    refs = world.refs(100)
    for _ in range(5):
        assert world.wait(list(refs), len(refs)) == ([], refs)
    assert world.objects.watched == 100
    assert all(ref.waiters is not None and len(ref.waiters) == 1 for ref in refs)
    for ref in refs:
        world.end(ref)
    assert not any(ref.attended for ref in refs)


def test_a_sleeper_is_woken_when_it_has_enough() -> None:
    world = World()
    refs = world.refs(100)
    sweep, call = world.sweep(refs, 2)
    assert call is not None
    world.end(refs[70])
    assert not call.finished
    world.end(refs[7], ERROR)
    assert call.finished
    assert call.wait(0)
    sweep.catch_up()
    assert sweep.split(2)[0] == [refs[7], refs[70]]


def test_what_became_ready_on_the_way_to_sleep_is_not_missed() -> None:
    world = World()
    refs = world.refs(100)
    sweep = Sweep.over(world.log, refs, True)
    sweep.catch_up()
    world.end(refs[3])  # nobody was told: it is in no log
    call = WaitCall(
        world.objects, world.log, refs, sweep.members, 1,
        fetch=True, since=sweep.seen, unattended=sweep.take_unattended(),
    )  # fmt: skip
    call.begin()
    assert call.finished
    sweep.catch_up()
    assert sweep.split(1)[0] == [refs[3]]


def test_a_stored_value_is_brought_here_once_and_counts_then() -> None:
    world = World()
    refs = world.refs(50)
    sweep, call = world.sweep(refs, 1)
    assert call is not None
    world.end(refs[5], STORED)
    assert len(world.objects.fetches) == 1
    assert not call.finished
    assert world.wait(list(refs)) == ([], refs)
    assert world.wait(list(refs), fetch=False)[0] == [refs[5]]
    assert len(world.objects.fetches) == 1
    world.bring_all()
    assert call.finished
    sweep.catch_up()
    assert sweep.split(1)[0] == [refs[5]]


def test_a_wait_after_the_cluster_is_gone_ends_with_errors() -> None:
    world = World()
    refs = world.refs(50)
    assert world.wait(refs) == ([], refs)
    world.objects.closed = "gone"
    assert len(world.wait(list(refs), 50)[0]) == 50


def test_what_is_left_is_a_list_that_keeps_nothing_longer_than_itself() -> None:
    world = World()
    refs = world.refs(REMEMBER + 1)
    world.end(refs[0])
    rest = world.wait(refs)[1]
    assert isinstance(rest, Rest)
    assert rest == refs[1:]
    assert repr(rest) == repr(refs[1:])
    assert type(rest[:]) is list
    assert type(rest.copy()) is list
    assert type(pickle.loads(pickle.dumps(Rest([], Sweep(world.log, [], True))))) is list
    world.end(refs[1])
    assert type(world.wait(rest)[1]) is list  # too short to be worth it


def test_a_list_is_gone_on_with_once() -> None:
    world = World()
    refs = world.refs(200)
    world.end(refs[0])
    rest = world.wait(refs)[1]
    assert isinstance(rest, Rest)
    assert rest.unseen() == []
    rest.append(refs[0])
    assert rest.unseen() == [refs[0]]
    for _ in range(2):
        assert world.wait(rest) == ([refs[0]], refs[1:])
    assert rest.unseen() == rest  # its sweep went on in what the wait returned
