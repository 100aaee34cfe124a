"""Actors that wait: for their constructor's arguments, and in line with tasks at nodes that are never idle; and who
owns an actor after a worker has done its work."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.control.messages import (
    ActorFailed,
    ActorInfo,
    ActorReply,
    ActorUpdate,
    ActorWaits,
    CreateActor,
    FindActor,
    KillActor,
    Notice,
    ProcessGone,
    ProvideArguments,
    StartActor,
    StopActor,
    WatchActor,
)
from shoal.control.simulated import SimAgent, SimCluster, SimProcess
from shoal.rpc.messages import Failed
from shoal.scheduling.resources import to_amounts
from shoal.scheduling.views import Strategy, WaitReason


@pytest.fixture
def cluster() -> SimCluster:
    return SimCluster()


@pytest.fixture
def head(cluster: SimCluster) -> SimAgent:
    return cluster.add_node(cpus=2)


@pytest.fixture
def driver(cluster: SimCluster, head: SimAgent) -> SimProcess:
    return cluster.add_driver(head)


def info_of(process: SimProcess, actor_id: bytes) -> ActorInfo:
    process.cluster.settle()
    reply = process.ask(WatchActor(actor_id=actor_id))
    assert isinstance(reply, ActorReply)
    return reply.actor


def create_unready(driver: SimProcess, **fields: Any) -> ActorInfo:
    reply = driver.ask(CreateActor(spec=driver.spec(**fields), unready=True))
    assert isinstance(reply, ActorReply), reply
    return reply.actor


def starts(agent: SimAgent) -> list[StartActor]:
    return [message for message in agent.seen if isinstance(message, StartActor)]


# ------------------------------------------------------------------------------------------------------------ arguments


def test_an_actor_exists_before_its_arguments_do(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    actor = create_unready(driver, name="early")
    assert actor.reason == WaitReason("arguments", "its constructor's arguments are not ready")
    cluster.advance(60)
    assert starts(head) == []
    found = driver.ask(FindActor(name="early", namespace=driver.job.namespace))
    assert found.actor.actor_id == actor.actor_id
    driver.send(ProvideArguments(actor.actor_id, b"packed"))
    cluster.settle()
    [start] = starts(head)
    assert start.spec.arguments == b"packed"
    assert info_of(driver, actor.actor_id).state == "alive"
    driver.send(ProvideArguments(actor.actor_id, b"again"))  # of no consequence
    cluster.settle()
    assert len(starts(head)) == 1
    cluster.state.check_invariants()


def test_arguments_that_never_come_end_it(cluster: SimCluster, driver: SimProcess) -> None:
    actor = create_unready(driver, name="n")
    driver.send(ProvideArguments(actor.actor_id, error=b"pickled", text="an argument failed"))
    dead = info_of(driver, actor.actor_id)
    assert (dead.state, dead.kind, dead.cause, dead.error) == ("dead", "init_failed", "an argument failed", b"pickled")
    assert isinstance(driver.ask(FindActor(name="n", namespace=driver.job.namespace)), Failed)


@pytest.mark.parametrize("how", ["kill", "driver"])
def test_an_actor_without_arguments_can_end(cluster: SimCluster, head: SimAgent, driver: SimProcess, how: str) -> None:
    actor = create_unready(driver)
    other = cluster.add_driver(head)
    if how == "kill":
        driver.ask(KillActor(actor_id=actor.actor_id))
    else:
        driver.die()
    assert info_of(other, actor.actor_id).state == "dead"
    driver.send(ProvideArguments(actor.actor_id, b"late"))
    cluster.settle()
    assert starts(head) == []
    cluster.state.check_invariants()


# ------------------------------------------------------------------------------------------- who is placed first


def hold(driver: SimProcess, count: int, **fields: Any) -> list[bytes]:
    """Create actors that hold a CPU each."""
    return [driver.create(cpus=1, **fields).actor_id for _ in range(count)]


def placed_in_order(cluster: SimCluster, head: SimAgent, rounds: int) -> list[bytes]:
    """Ends the actor that has run longest, again and again; returns those that were started in its place."""
    begun = []
    for _ in range(rounds):
        head.end_actor(next(iter(head.running)), intended=True, cause="done")
        cluster.settle()
        begun.append(list(head.running)[-1])
        cluster.state.check_invariants()
    return begun


def test_actors_of_higher_priority_are_placed_first(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    hold(driver, 2)
    [low] = hold(driver, 1, priority=-3)
    usual = hold(driver, 2)
    [high] = hold(driver, 1, priority=7)
    cluster.settle()
    assert placed_in_order(cluster, head, 4) == [high, *usual, low]


def test_jobs_take_turns_at_having_an_actor_placed(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    hold(driver, 2)
    for strategy in (Strategy(), Strategy("spread"), Strategy("node", head.node_id)):
        hold(driver, 10, strategy=strategy)
    other = cluster.add_driver(head)
    few = set(hold(other, 4))
    cluster.settle()
    order = [actor in few for actor in placed_in_order(cluster, head, 8)]
    assert order.count(True) == 4
    assert order[0] != order[1]
    assert order == order[:2] * 4


# --------------------------------------------------------------------------------------------------- in line with tasks


def flood(agent: SimAgent, cpus: float = 0) -> None:
    """Tasks hold all but `cpus` of the node's CPUs."""
    agent.available["CPU"] = to_amounts({"CPU": cpus}).get("CPU", 0)
    agent.report()


def test_the_first_of_a_line_goes_and_stands_at_a_busy_node(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    flood(head)
    cluster.settle()
    head._start = lambda message: None  # type: ignore[method-assign]  # it lets them stand
    actors = [driver.create() for _ in range(3)]
    cluster.settle()
    assert starts(head) == []  # it may be free again in a moment
    cluster.advance(2)
    [start] = starts(head)
    assert start.spec.actor_id == actors[0].actor_id
    assert start.patience_s > 1
    assert info_of(driver, actors[0].actor_id).reason == info_of(driver, actors[1].actor_id).reason
    cluster.advance(5)
    assert len(starts(head)) == 1, "one at a time"
    head.running[actors[0].actor_id] = (start.incarnation, start.spec)
    head.finish_start(actors[0].actor_id)
    cluster.advance(2)
    assert info_of(driver, actors[0].actor_id).state == "alive"
    assert [s.spec.actor_id for s in starts(head)] == [actor.actor_id for actor in actors[:2]]
    cluster.state.check_invariants()


def test_one_that_stood_in_vain_is_first_again(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    flood(head)
    cluster.settle()
    head._start = lambda message: None  # type: ignore[method-assign]
    first, second = driver.create(), driver.create()
    cluster.advance(2)
    [start] = starts(head)
    head.say(ActorFailed(first.actor_id, start.incarnation, "refused", "the node is busy"))
    cluster.advance(2)
    assert [s.spec.actor_id for s in starts(head)] == [first.actor_id] * 2
    assert info_of(driver, second.actor_id).state == "pending"
    cluster.state.check_invariants()


def test_who_stands_says_what_for_and_its_driver_hears_of_it(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    flood(head)
    cluster.settle()
    head._start = lambda message: None  # type: ignore[method-assign]
    actor = driver.create()
    cluster.advance(2)
    why = WaitReason("busy", "0 of 2 CPU are free")
    head.say(ActorWaits(actor.actor_id, starts(head)[0].incarnation, why))
    assert info_of(driver, actor.actor_id).reason == why
    assert any(isinstance(push, ActorUpdate) and push.actor.reason == why for push in driver.pushes)
    assert not any(isinstance(push, Notice) for push in driver.pushes)
    cluster.advance(4)
    [notice] = [push for push in driver.pushes if isinstance(push, Notice)]
    assert "has been waiting for a place" in notice.text


def test_each_busy_node_has_one_of_a_line_and_only_those_that_could_take_it(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    second, small = cluster.add_node(cpus=2), cluster.add_node(cpus=1)
    for agent in (head, second, small):
        flood(agent)
        agent._start = lambda message: None  # type: ignore[method-assign]
    cluster.settle()
    for _ in range(5):
        driver.create(cpus=2)
    cluster.advance(3)
    assert [len(starts(agent)) for agent in (head, second, small)] == [1, 1, 0]
    driver.create(cpus=1, strategy=Strategy("node", small.node_id))
    cluster.advance(3)
    assert len(starts(small)) == 1
    cluster.state.check_invariants()


def test_an_actor_that_stands_can_be_killed(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    flood(head)
    cluster.settle()
    head._start = lambda message: None  # type: ignore[method-assign]
    actor = driver.create()
    cluster.advance(2)
    driver.ask(KillActor(actor_id=actor.actor_id))
    cluster.settle()
    assert any(isinstance(message, StopActor) and message.actor_id == actor.actor_id for message in head.seen)
    assert info_of(driver, actor.actor_id).state == "dead"
    cluster.state.check_invariants()


# --------------------------------------------------------------------------------------------------------------- owners


def test_what_a_worker_made_is_the_drivers_when_the_worker_has_no_more_to_do(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    worker = cluster.add_worker(head, driver.job)
    actor = worker.create()
    cluster.settle()
    head.say(ProcessGone(worker.worker_id, driver.job.job_id, False, "it was idle", retired=True))
    assert info_of(driver, actor.actor_id).state == "alive"
    cluster.state.check_invariants()
    other = cluster.add_driver(head)
    driver.die()
    assert info_of(other, actor.actor_id).kind in ("job_ended", "owner_died")
    cluster.state.check_invariants()
