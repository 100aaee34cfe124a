"""The owner's side of leases against an agent that grants, takes away, redirects and starves at random.

What must hold whatever the order: every call ends exactly once, calls with retries left survive lost workers, the
demand that each agent knows is the level the owner means, and when all is done every lease has gone back.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import random
from collections.abc import Callable, Collection
from types import SimpleNamespace
from typing import Any

import pytest

from shoal.exceptions import TaskCancelledError
from shoal.node.messages import (
    PENDING,
    LeaseDemand,
    LeaseGranted,
    LeaseLost,
    LeaseRedirected,
    LeaseSpec,
    ReclaimLeases,
    ReturnLease,
    WorkerAddress,
    WorkerExit,
)
from shoal.runtime import leases
from shoal.runtime.cancelling import Canceller
from shoal.runtime.leases import TaskManager
from shoal.runtime.nesting import OUTERMOST
from shoal.runtime.task_run import Bound, TaskRun

HERE, THERE = b"h" * 28, b"t" * 28


class FakeReactor:
    """Calls and timers on a virtual clock."""

    def __init__(self) -> None:
        self.now = 1.0
        self._calls: collections.deque[tuple[Callable[..., Any], tuple[Any, ...]]] = collections.deque()
        self._timers: list[tuple[float, int, Any]] = []
        self._order = itertools.count()

    def call_soon(self, call: Callable[..., Any], *args: Any) -> None:
        self._calls.append((call, args))

    def call_later(self, delay_s: float, call: Callable[[], Any]) -> Any:
        timer = SimpleNamespace(call=call)
        timer.cancel = lambda: setattr(timer, "call", None)
        heapq.heappush(self._timers, (self.now + delay_s, next(self._order), timer))
        return timer

    def settle(self) -> None:
        while self._calls:
            call, args = self._calls.popleft()
            call(*args)

    def advance(self, seconds: float) -> None:
        until = self.now + seconds
        self.settle()
        while self._timers and self._timers[0][0] <= until:
            self.now, _, timer = heapq.heappop(self._timers)
            if timer.call is not None:
                timer.call()
            self.settle()
        self.now = until


class FakeChannel:
    """What the owner says to an agent: the demand as a level, and returned leases."""

    def __init__(self) -> None:
        self.demand: dict[int, int] = {}
        self.specs: set[int] = set()
        self.returned: list[ReturnLease] = []
        self.context: Any = None

    def connect(self, *_: Any) -> None:
        pass

    def send(self, message: Any) -> None:
        if isinstance(message, LeaseDemand):
            if message.spec is not None:
                self.specs.add(message.class_id)
            assert message.class_id in self.specs, "a demand whose spec this agent never heard"
            self.demand[message.class_id] = message.wanted
        elif isinstance(message, ReturnLease):
            self.returned.append(message)


class FakeLink:
    def __init__(self, address: WorkerAddress) -> None:
        self.address = address
        self.running: dict[int, TaskRun] = {}
        self.sink: Any = None
        self.closed = False

    def use_for(self, sink: Any) -> None:
        self.sink = sink

    def send(self, run: TaskRun) -> None:
        assert not self.closed, "a call was sent to a lost worker"
        assert run.counter not in self.running
        self.running[run.counter] = run
        run.stage = "sent"

    def cancel(self, run: TaskRun, *, force: bool, recursive: bool) -> None:
        assert self.running[run.counter] is run

    def take_back(self) -> list[TaskRun]:
        runs = list(self.running.values())
        self.running.clear()
        return runs

    def close(self) -> None:
        self.closed = True


class FakeRuntime:
    node_id = HERE
    worker_id = b"o" * 28
    job_id = b"jobx"
    token = b""
    name = "owner"
    is_driver = True
    prefix = b"p" * 16

    def __init__(self) -> None:
        self.reactor = FakeReactor()
        self.agent = FakeChannel()
        self.canceller = Canceller(self)  # type: ignore[arg-type]
        self.tasks: TaskManager
        self.ended: collections.Counter[int] = collections.Counter()
        self.crashed: list[int] = []
        self.cancelled: list[int] = []
        self._links: dict[bytes, FakeLink] = {}

    def links(self) -> Collection[FakeLink]:
        return self._links.values()

    def link_to(self, address: WorkerAddress) -> FakeLink:
        return self._links.setdefault(address.worker_id, FakeLink(address))

    def fail_crashed(self, run: TaskRun, _exit: WorkerExit, _where: WorkerAddress) -> None:
        self._end(run)
        self.crashed.append(run.counter)

    def fail_with(self, run: TaskRun, error: Exception) -> None:
        assert isinstance(error, TaskCancelledError)
        self._end(run)
        self.cancelled.append(run.counter)

    def _end(self, run: TaskRun) -> None:
        run.stage = "done"
        self.ended[run.counter] += 1


class World:
    """An owner, its own agent, another agent, and workers that do what the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, retries: int = 3, pace_s: float | None = None) -> None:
        self.runtime = FakeRuntime()
        self.other = FakeChannel()
        monkeypatch.setattr(leases, "Channel", lambda *_: self.other)
        monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: self.runtime.reactor.now))
        self.tasks = self.runtime.tasks = TaskManager(self.runtime)  # type: ignore[arg-type]
        spec = LeaseSpec(b"jobx", {"CPU": 10_000}, "f")
        self.bound = Bound(self.runtime, "f", "f", 1, spec=spec, max_retries=retries)
        self.bound.pace_s = pace_s
        self.counters = itertools.count(1)
        self.lease_ids = itertools.count(1)
        self.granted: dict[int, tuple[FakeChannel, FakeLink]] = {}
        self.submitted = 0
        self.runs: list[TaskRun] = []

    def submit(self, count: int = 1) -> None:
        for _ in range(count):
            self.submitted += 1
            run = TaskRun(next(self.counters), self.bound, None, OUTERMOST)
            self.runs.append(run)
            self.tasks.submit(run)
        self.runtime.reactor.settle()

    def agent_link(self, channel: FakeChannel) -> leases.AgentLink:
        return self.tasks.local if channel is self.runtime.agent else self.tasks.agent_at(THERE, "there:1")

    def collect_returns(self) -> None:
        for channel in (self.runtime.agent, self.other):
            for message in channel.returned:
                held, link = self.granted.pop(message.lease_id)
                assert held is channel, "a lease went back to an agent that did not give it"
                assert message.broken or not link.running, "a lease went back with calls on it"
            channel.returned.clear()

    def held_by(self, channel: FakeChannel) -> list[int]:
        return [lease_id for lease_id, (held, _) in self.granted.items() if held is channel]

    def grant(self, channel: FakeChannel | None = None) -> int:
        channel = channel or self.runtime.agent
        lease_id = next(self.lease_ids)
        node = HERE if channel is self.runtime.agent else THERE
        address = WorkerAddress(lease_id.to_bytes(28, "big"), node, "a:1", "", 1)
        link = self.runtime.link_to(address)
        self.granted[lease_id] = (channel, link)
        self.tasks.from_agent(self.agent_link(channel), LeaseGranted(0, lease_id, address))
        self.runtime.reactor.settle()
        return lease_id

    def grant_and_reclaim(self) -> int:
        """Both messages arrive in one frame."""
        lease_id = next(self.lease_ids)
        address = WorkerAddress(lease_id.to_bytes(28, "big"), HERE, "a:1", "", 1)
        self.granted[lease_id] = (self.runtime.agent, self.runtime.link_to(address))
        self.tasks.from_agent(self.tasks.local, LeaseGranted(0, lease_id, address))
        self.tasks.from_agent(self.tasks.local, ReclaimLeases())
        self.runtime.reactor.settle()
        self.collect_returns()
        return lease_id

    def finish(self, lease_id: int, count: int = 1) -> None:
        _, link = self.granted[lease_id]
        for counter in list(link.running)[:count]:
            run = link.running.pop(counter)
            run.stage = "done"
            self.runtime.ended[counter] += 1
            if link.sink is not None:
                link.sink.run_ended(run)
        self.runtime.reactor.settle()
        self.collect_returns()

    def cancel(self, run: TaskRun, *, force: bool = False) -> None:
        ref: Any = SimpleNamespace(task=None if run.stage == "done" else run, state=PENDING, owned=True)
        self.runtime.canceller.cancel(ref, force, True)
        self.runtime.reactor.settle()

    def raise_retryable(self, lease_id: int) -> None:
        """The first call there raises what is to be tried again (`WorkerLink._ended`)."""
        _, link = self.granted[lease_id]
        run = link.running.pop(next(iter(link.running)))
        if not run.retries:
            self.runtime.ended[run.counter] += 1
            run.stage = "done"
            link.sink.run_ended(run)
        else:
            run.stage = "queued"
            link.sink.retry(run)
        self.runtime.reactor.settle()
        self.collect_returns()

    def hand_back(self, lease_id: int) -> None:
        _, link = self.granted[lease_id]
        runs = [link.running.pop(counter) for counter in list(link.running)[1:]]
        runs = self.runtime.canceller.without_cancelled(runs)
        if link.sink is not None:
            link.sink.handed_back(runs)
        self.runtime.reactor.settle()

    def lose(self, lease_id: int) -> None:
        channel, link = self.granted.pop(lease_id)
        self.tasks.from_agent(self.agent_link(channel), LeaseLost(lease_id, WorkerExit(signal=9)))
        self.runtime.reactor.settle()
        link.closed = True  # the agent's word was faster than the end of the connection
        if link.sink is not None:
            link.sink.link_closed(link, EOFError())
        self.runtime.reactor.settle()

    def running(self, lease_id: int) -> int:
        return len(self.granted[lease_id][1].running)


def test_the_demand_is_a_level_and_is_withdrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.submit(5)
    assert world.runtime.agent.demand == {0: 5}
    lease_id = world.grant()
    assert world.running(lease_id) == 1, "nothing is sent ahead while the pace is not known"
    for _ in range(5):
        world.finish(lease_id)
    assert world.runtime.agent.demand == {0: 1}, "the lease that is kept for a while still counts"
    world.runtime.reactor.advance(1.0)
    world.collect_returns()
    assert world.granted == {}
    assert world.runtime.agent.demand == {0: 0}


def test_short_calls_are_sent_ahead_for_some_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, pace_s=0.0001)
    world.submit(500)
    assert world.runtime.agent.demand[0] == 13, "500 calls of 0.1 ms fill 13 workers for 4 ms"
    lease_id = world.grant()
    assert world.running(lease_id) == pytest.approx(0.004 / 0.0001, abs=1)


def test_what_a_worker_hands_back_goes_elsewhere_and_widens_the_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, pace_s=0.0001)
    world.submit(40)
    first = world.grant()
    assert world.running(first) == 40
    world.hand_back(first)
    assert world.running(first) == 1
    assert world.runtime.agent.demand[0] >= 39, "they would wait behind a slow call: each is worth a lease"
    second = world.grant()
    assert world.running(second) >= 1


def test_a_lost_worker_costs_a_retry_of_what_it_ran_only(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, retries=0, pace_s=0.0001)
    world.submit(10)
    lease_id = world.grant()
    assert world.running(lease_id) == 10
    world.lose(lease_id)
    assert world.runtime.crashed == [1]
    world.finish(world.grant(), 9)
    assert sum(world.runtime.ended.values()) == 10


def test_when_several_may_have_crashed_a_worker_each_runs_alone_and_one_is_found_guilty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, retries=1, pace_s=0.0001)
    world.submit(5)
    world.lose(world.grant())
    assert world.runtime.crashed == []
    lease_id = world.grant()
    for _ in range(2):
        assert world.running(lease_id) == 1
        world.finish(lease_id)
    for _ in range(2):  # the third one does it again, twice
        assert world.running(lease_id) == 1
        world.lose(lease_id)
        lease_id = world.grant()
    assert world.runtime.crashed == [3]
    world.finish(lease_id)
    world.finish(lease_id)
    assert sum(world.runtime.ended.values()) == 5


def test_what_is_cancelled_in_the_queue_ends_and_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.submit(3)
    for _ in range(2):
        world.cancel(world.runs[1])
    assert world.runtime.cancelled == [2]
    assert world.runtime.agent.demand == {0: 2}


def test_what_is_cancelled_while_it_runs_is_not_tried_again_and_blames_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, retries=0, pace_s=0.0001)
    world.submit(3)
    lease_id = world.grant()
    world.cancel(world.runs[0])
    assert world.runtime.ended == {}, "its worker says what comes of it"
    world.lose(lease_id)
    assert (world.runtime.cancelled, world.runtime.crashed) == ([1], [])
    world.finish(world.grant(), 3)
    assert world.runtime.ended == {1: 1, 2: 1, 3: 1}


def test_what_is_cancelled_and_handed_back_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, pace_s=0.0001)
    world.submit(3)
    lease_id = world.grant()
    world.cancel(world.runs[2])
    world.hand_back(lease_id)
    assert world.runtime.cancelled == [3]
    world.finish(lease_id, 3)
    world.finish(lease_id, 3)
    assert world.runtime.ended == {1: 1, 2: 1, 3: 1}


def test_a_worker_that_does_not_answer_to_force_is_ended_by_its_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, pace_s=0.0001)
    world.submit(3)
    world.grant()
    world.cancel(world.runs[0], force=True)
    assert world.runtime.ended == {}
    world.runtime.reactor.advance(1.5)
    assert [message.broken for message in world.runtime.agent.returned] == [True]
    assert world.runtime.crashed == [1]
    world.collect_returns()
    world.finish(world.grant(), 3)
    assert world.runtime.ended == {1: 1, 2: 1, 3: 1}


def test_a_worker_that_leaves_on_purpose_costs_nobody_a_retry(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, retries=0, pace_s=0.0001)
    world.submit(2)
    lease_id = world.grant()
    _, link = world.granted[lease_id]
    link.sink.worker_leaves()
    world.finish(lease_id)
    world.submit()
    assert world.running(lease_id) == 1, "it takes no more calls"
    world.lose(lease_id)
    assert world.runtime.crashed == []
    world.finish(world.grant(), 2)
    assert world.runtime.ended == {1: 1, 2: 1, 3: 1}


def test_a_starved_neighbour_gets_busy_leases_when_they_run_dry(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.submit(3)
    lease_id = world.grant()
    world.runtime.reactor.advance(leases.TENURE_S)
    world.tasks.from_agent(world.tasks.local, ReclaimLeases())
    world.runtime.reactor.settle()
    assert lease_id in world.granted
    world.finish(lease_id)
    assert lease_id not in world.granted, "it was returned although there was more to do"
    assert world.runtime.agent.demand == {0: 2}, "and asked for again"


def test_a_lease_that_was_just_granted_works_for_a_while_before_it_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else owners that starve each other hand leases to and fro, one call at a time."""
    world = World(monkeypatch, pace_s=0.0001)
    world.submit(100)
    lease_id = world.grant()
    world.tasks.from_agent(world.tasks.local, ReclaimLeases())
    world.runtime.reactor.settle()
    world.finish(lease_id, 20)
    assert world.running(lease_id) > 1, "it takes more calls"
    world.runtime.reactor.advance(leases.TENURE_S)
    world.finish(lease_id, world.running(lease_id))
    assert lease_id not in world.granted, "and then it goes back, although there is more to do"
    assert sum(world.runtime.ended.values()) < 100


def test_a_reclaimed_lease_without_work_goes_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, pace_s=0.0001)
    world.submit()
    lease_id = world.grant()
    world.tasks.from_agent(world.tasks.local, ReclaimLeases())
    world.runtime.reactor.settle()
    world.finish(lease_id)
    assert lease_id not in world.granted


def test_a_reclaimed_lease_that_never_runs_dry_does_not_stand_for_what_is_queued(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, pace_s=0.0001)
    world.submit()
    lease_id = world.grant()
    world.runtime.reactor.advance(leases.TENURE_S)
    world.tasks.from_agent(world.tasks.local, ReclaimLeases())
    world.runtime.reactor.settle()
    world.submit(5)  # and the first one waits for them
    assert world.running(lease_id) == 1
    assert world.runtime.agent.demand == {0: 2}, "one is held, one more is wanted"


def test_a_lease_reclaimed_on_its_way_does_one_call_before_it_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.submit(3)
    lease_id = world.grant_and_reclaim()
    assert world.running(lease_id) == 1, "else it could go to and fro for ever"
    world.runtime.reactor.advance(leases.TENURE_S)
    world.finish(lease_id)
    assert lease_id not in world.granted


def test_redirected_demand_counts_there_and_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.submit(4)
    world.tasks.from_agent(world.tasks.local, LeaseRedirected(0, 3, THERE, "there:1"))
    world.runtime.reactor.settle()
    assert world.other.demand == {0: 3}
    assert world.runtime.agent.demand == {0: 1} or world.tasks._by_id[0].told[world.tasks.local] == 1
    for lease_id in [world.grant(world.other), world.grant(world.other), world.grant(world.other), world.grant()]:
        assert world.running(lease_id) == 1
    for lease_id in list(world.granted):
        world.finish(lease_id)
    world.runtime.reactor.advance(1.0)
    world.collect_returns()
    assert world.granted == {}
    assert world.other.demand == {0: 0}


@pytest.mark.parametrize("seed", range(150))
def test_every_call_ends_once_whatever_happens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    world = World(monkeypatch, retries=-1, pace_s=rng.choice([None, 0.00005, 0.002]))
    for _ in range(rng.randint(20, 120)):
        held = list(world.granted)
        match rng.randrange(11):
            case 0 | 1:
                world.submit(rng.randint(1, 30))
            case 2 | 3:
                for channel in (world.runtime.agent, world.other):
                    if channel.demand.get(0, 0) > len(world.held_by(channel)):
                        world.grant(channel)
            case 4 | 5 if held:
                world.finish(rng.choice(held), rng.randint(1, 20))
            case 6 if held:
                lease_id = rng.choice(held)
                world.lose(lease_id) if rng.random() < 0.5 else world.hand_back(lease_id)
            case 7:
                world.tasks.from_agent(world.tasks.local, ReclaimLeases())
            case 8:
                unmet = world.runtime.agent.demand.get(0, 0) - len(world.held_by(world.runtime.agent))
                if unmet > 0:
                    world.tasks.from_agent(
                        world.tasks.local, LeaseRedirected(0, rng.randint(1, unmet), THERE, "there:1")
                    )
            case 9 if world.runs:
                world.cancel(rng.choice(world.runs), force=rng.random() < 0.2)
            case 10 if held and world.running(lease_id := rng.choice(held)):
                world.raise_retryable(lease_id)
        world.runtime.reactor.advance(rng.choice([0.0, 0.0, 0.01, 0.3]))
        world.collect_returns()
    for _ in range(10_000):
        if sum(world.runtime.ended.values()) == world.submitted:
            break
        for channel in (world.runtime.agent, world.other):
            if channel.demand.get(0, 0) > len(world.held_by(channel)):
                world.grant(channel)
        for lease_id in list(world.granted):
            if lease_id in world.granted:  # the end of another's calls may have sent it back
                world.finish(lease_id, 1000)
        world.runtime.reactor.advance(0.01)
        world.collect_returns()
    assert sum(world.runtime.ended.values()) == world.submitted, f"seed {seed}: some calls never ended"
    assert set(world.runtime.ended.values()) <= {1}
    world.runtime.reactor.advance(5.0)
    world.collect_returns()
    assert world.granted == {}, f"seed {seed}: leases were kept"
    assert world.runtime.agent.demand.get(0, 0) == 0
    assert world.other.demand.get(0, 0) == 0
