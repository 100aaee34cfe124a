"""What control does when asked and when things end, driven through simulated agents without sockets or time."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from shoal.control.messages import (
    FUNCTIONS,
    ActorFailed,
    ActorGone,
    ActorOutOfScope,
    ActorReply,
    ActorsReply,
    ActorStarted,
    ActorUpdate,
    CreateActor,
    DeleteKey,
    FindActor,
    GetJob,
    GetKey,
    GetStatus,
    JobEnded,
    JobRegistered,
    JobsReply,
    KeyReply,
    KillActor,
    ListActors,
    ListJobs,
    ListKeys,
    LogLines,
    LogsArrived,
    NodeRegistered,
    NodeReport,
    NodesChanged,
    Notice,
    ProcessGone,
    PublishLogs,
    PutKey,
    RegisterNode,
    Relay,
    RelayReply,
    StartActor,
    StatusReply,
    StopActor,
    StopNode,
    UnwatchActor,
    WatchActor,
)
from shoal.control.settings import ControlSettings
from shoal.control.simulated import SimAgent, SimCluster, SimProcess, count_by_node
from shoal.control.state import minor_of
from shoal.rpc.messages import Done, Failed
from shoal.scheduling.resources import to_amounts
from shoal.scheduling.views import Strategy


@pytest.fixture
def cluster() -> SimCluster:
    return SimCluster(seed=1)


@pytest.fixture
def head(cluster: SimCluster) -> SimAgent:
    return cluster.add_node(4)


@pytest.fixture
def driver(cluster: SimCluster, head: SimAgent) -> SimProcess:
    return cluster.add_driver(head)


def info_of(process: SimProcess, actor_id: bytes) -> Any:
    process.cluster.settle()
    process.cluster.state.check_invariants()
    reply = process.ask(ListActors(all_states=True))
    return next(actor for actor in reply.actors if actor.actor_id == actor_id)


def updates(process: SimProcess) -> list[tuple[str, int]]:
    """(state, incarnation) of the pushes, without repeats."""
    steps = [(push.actor.state, push.actor.incarnation) for push in process.pushes if isinstance(push, ActorUpdate)]
    return [step for number, step in enumerate(steps) if number == 0 or step != steps[number - 1]]


def agent_of(cluster: SimCluster, actor_id: bytes) -> SimAgent:
    return next(agent for agent in cluster.agents.values() if actor_id in agent.running)


def crash(cluster: SimCluster, actor_id: bytes, cause: str = "signal 11") -> None:
    agent_of(cluster, actor_id).end_actor(actor_id, intended=False, cause=cause)
    cluster.settle()


# ----------------------------------------------------------------------------------------------------------- nodes


def test_a_node_is_told_of_all_and_all_of_it(cluster: SimCluster) -> None:
    first, second = cluster.add_node(), cluster.add_node()
    cluster.settle()
    registered = second.seen[0]
    assert isinstance(registered, NodeRegistered)
    assert registered.cluster_id == b"cluster"
    assert [node.node_id for node in registered.nodes] == [first.node_id, second.node_id]
    assert set(first.nodes) == set(second.nodes) == {first.node_id, second.node_id}


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"version": "9.9.0"}, "version", r"runs shoal 9\.9\.0 and the head runs shoal 0\.1\.0; install shoal 0\.1"),
        ({"python": "2.7.1"}, "version", r"runs Python 2\.7\.1 and the head runs Python 3\."),
        ({"python": ""}, "version", "runs Python unknown"),
    ],
)
def test_a_node_of_another_version_is_refused(
    cluster: SimCluster, fields: dict[str, str], kind: str, words: str
) -> None:
    settings = cluster.settings
    info = cluster.add_node().info()
    fields = {"version": settings.version, "python": settings.python} | fields
    (answer,) = cluster.tool(RegisterNode(rid=1, node=msgspec.structs.replace(info, node_id=b"new"), **fields))
    assert isinstance(answer, Failed)
    assert answer.kind == kind
    assert re.search(words, answer.text)


def test_a_patch_version_may_differ(cluster: SimCluster) -> None:
    info = msgspec.structs.replace(cluster.add_node().info(), node_id=b"new")
    version, python = minor_of(cluster.settings.version) + ".99", minor_of(cluster.settings.python) + ".99"
    (answer,) = cluster.tool(RegisterNode(rid=1, node=info, version=version, python=python))
    assert isinstance(answer, NodeRegistered)


def test_an_id_is_used_once_by_the_living_and_never_again_after_death(cluster: SimCluster) -> None:
    agent = cluster.add_node()
    settings = cluster.settings
    again = RegisterNode(rid=1, node=agent.info(), version=settings.version, python=settings.python)
    (answer,) = cluster.tool(again)
    assert (answer.kind, "is in the cluster already" in answer.text) == ("duplicate", True)  # type: ignore[attr-defined]
    cluster.kill_node(agent)
    (answer,) = cluster.tool(again)
    assert answer.kind == "duplicate"  # type: ignore[attr-defined]
    assert "declared dead (its connection closed); start it anew" in answer.text  # type: ignore[attr-defined]


def test_availability_travels_coalesced_and_joins_at_once(cluster: SimCluster) -> None:
    first, second = cluster.add_node(), cluster.add_node()
    cluster.settle()
    first.seen.clear()
    for cpus in (3, 2, 1):
        second.say(NodeReport(to_amounts({"CPU": cpus}), 0, []))
        cluster.settle()
    second.say(NodeReport(to_amounts({"CPU": 1}), 99, []))  # only the store changed
    cluster.settle()
    assert first.seen == []
    cluster.silence(0.06)
    cluster.settle()
    (change,) = first.seen
    assert isinstance(change, NodesChanged)
    assert [(row.node_id, row.available) for row in change.nodes] == [(second.node_id, to_amounts({"CPU": 1}))]
    third = cluster.add_node()
    cluster.settle()
    assert third.node_id in first.nodes


def test_a_node_whose_connection_closes_is_dead_at_once(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    other = cluster.add_node()
    cluster.kill_node(other)
    cluster.settle()
    row = head.nodes[other.node_id]
    assert (row.alive, row.death_reason) == (False, "its connection closed")
    status = driver.ask(GetStatus())
    assert [node.alive for node in status.nodes] == [True, False]
    (notice,) = [push for push in driver.pushes if isinstance(push, Notice)]
    assert (notice.level, "left the cluster: its connection closed" in notice.text) == ("warning", True)


def test_a_silent_node_is_dead_and_told_so_and_its_late_words_have_no_effect(cluster: SimCluster) -> None:
    first, second = cluster.add_node(), cluster.add_node()
    cluster.settle()
    driver = cluster.add_driver(second)
    actor = driver.create(cpus=1)
    for _ in range(11):
        first.report()
        cluster.deliver_from(first)
        cluster.silence(1.0)
    assert not first.nodes[second.node_id].alive
    cluster.deliver_from(second)
    assert "declared this node dead: nothing was heard from it for 10 s" in second.stopped
    second.seen.clear()
    cluster.silence(2.0)
    second.say(ActorStarted(actor.actor_id, 1, b"w", "/run/w", 1))
    second.say(NodeReport(to_amounts({"CPU": 4}), 0, []))
    cluster.deliver_from(second)
    assert second.seen == [StopNode("control declared this node dead, and its work was given to others")]
    cluster.state.check_invariants()
    assert cluster.tool(ListJobs(rid=1))[0].jobs[0].ended_unix_s > 0  # type: ignore[attr-defined]


def test_a_control_that_slept_itself_blames_nobody(cluster: SimCluster) -> None:
    cluster.add_node()
    cluster.advance(2)
    cluster.now += 100.0  # nothing ran: SIGSTOP, a suspended laptop
    cluster.state.tick(cluster.now)
    assert [node.alive for node in cluster.tool(GetStatus(rid=1))[0].nodes] == [True]  # type: ignore[attr-defined]
    cluster.silence(20)
    assert [node.alive for node in cluster.tool(GetStatus(rid=1))[0].nodes] == [False]  # type: ignore[attr-defined]


def test_dead_nodes_are_remembered_up_to_a_bound() -> None:
    cluster = SimCluster(settings=ControlSettings(max_dead_nodes=3))
    for _ in range(5):
        cluster.kill_node(cluster.add_node())
    assert len(cluster.tool(GetStatus(rid=1))[0].nodes) == 3  # type: ignore[attr-defined]


def test_an_idle_control_without_nodes_has_nothing_to_do(cluster: SimCluster) -> None:
    assert cluster.state.deadline() == float("inf")
    agent = cluster.add_node()
    assert cluster.state.deadline() <= cluster.now + 1.0
    cluster.kill_node(agent)
    cluster.silence(30)
    assert cluster.state.deadline() == float("inf")


def test_words_of_a_connection_without_a_node_are_refused(cluster: SimCluster) -> None:
    (answer,) = cluster.tool(GetJob(rid=1, job_id=b"0001"))
    assert (answer.kind, answer.rid) == ("unregistered", 1)  # type: ignore[attr-defined]
    assert cluster.tool(NodeReport({}, 0, [])) == []


def test_shutdown_tells_every_node(cluster: SimCluster) -> None:
    agents = [cluster.add_node(), cluster.add_node()]
    assert cluster.state.shutdown("bye") == [(agent.peer, StopNode("bye")) for agent in agents]


# ------------------------------------------------------------------------------------------------------------ jobs


def test_a_job_gets_an_id_and_a_namespace(cluster: SimCluster, head: SimAgent) -> None:
    first, second = cluster.add_driver(head), cluster.add_driver(head, namespace="mine")
    assert (first.job.job_id, second.job.job_id) == (b"\0\0\0\1", b"\0\0\0\2")
    assert len(first.job.namespace) == 36
    assert second.job.namespace == "mine"
    assert second.job.driver_node == head.node_id
    assert cluster.tool(ListJobs(rid=1)) == [JobsReply(rid=1, jobs=[first.job, second.job])]


@pytest.mark.parametrize("how", ["process", "node"])
def test_a_job_ends_with_its_driver(cluster: SimCluster, head: SimAgent, driver: SimProcess, how: str) -> None:
    other = cluster.add_node()
    watcher = cluster.add_driver(other, classes=())
    plain, detached = driver.create(cpus=3), driver.create(cpus=3, detached=True, max_restarts=-1)
    cluster.settle()
    assert count_by_node(cluster) == {head.node_id: 1, other.node_id: 1}
    if how == "process":
        driver.die()
    else:
        cluster.kill_node(head)
    ended = info_of(watcher, plain.actor_id)
    assert (ended.state, ended.kind) == ("dead", "job_ended")
    assert info_of(watcher, detached.actor_id).state == "alive"
    assert JobEnded(driver.job.job_id) in other.seen
    assert watcher.ask(ListJobs()).jobs[0].ended_unix_s >= 1.7e9
    other.say(GetJob(rid=77, job_id=driver.job.job_id))  # the detached actor needs it when it restarts
    cluster.settle()
    assert isinstance(other.seen[-1], JobRegistered)
    assert watcher.ask(GetKey(space=FUNCTIONS, key=b"code of Counter")).found
    watcher.ask(KillActor(actor_id=detached.actor_id))
    other.say(GetJob(rid=78, job_id=driver.job.job_id))
    cluster.settle()
    assert (other.seen[-1].rid, other.seen[-1].kind) == (78, "ended")
    assert not watcher.ask(GetKey(space=FUNCTIONS, key=b"code of Counter")).found


def test_an_unknown_job_is_said_to_be_unknown(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    head.say(GetJob(rid=5, job_id=b"nope"))
    cluster.settle()
    assert head.seen[-1].kind == "not_found"
    reply = driver.ask(_create(driver, job_id=b"nope"))
    assert (reply.kind, "job 6e6f7065 is not known" in reply.text) == ("not_found", True)


def _create(process: SimProcess, **fields: Any) -> Any:
    return CreateActor(spec=msgspec.structs.replace(process.spec(), **fields))


# ------------------------------------------------------------------------------------------- an actor's life and end


def test_an_actor_starts_and_its_watchers_hear_of_it(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    actor = driver.create(watch=True, handle=b"handle", max_restarts=2)
    assert actor.state == "pending"
    cluster.settle()
    assert updates(driver) == [("alive", 1)]
    alive = driver.pushes[-1].actor
    assert (alive.node_id, alive.address, alive.pid) == (head.node_id, "10.0.0.1:6380", 1001)
    assert (alive.worker_id, alive.socket_path) == (head.workers[actor.actor_id], alive.socket_path)
    assert (alive.handle, alive.class_name, alive.max_restarts) == (b"handle", "Counter", 2)
    (start,) = [message for message in head.seen if isinstance(message, StartActor)]
    assert (start.incarnation, start.class_blob, start.restarts) == (1, b"pickled Counter", 0)
    assert start.spec.namespace == driver.job.namespace


def test_creating_the_same_actor_again_answers_with_what_it_is(cluster: SimCluster, driver: SimProcess) -> None:
    request = _create(driver)
    first = driver.ask(request)
    cluster.settle()
    again = driver.ask(request)
    assert (first.actor.state, again.actor.state) == ("pending", "alive")


def test_a_class_that_nobody_put_ends_the_actor_with_a_clear_cause(driver: SimProcess) -> None:
    actor = driver.create(cls="Unknown")
    assert (actor.state, actor.kind) == ("dead", "init_failed")
    assert "the code of class Unknown" in actor.cause
    assert "is not in the cluster" in actor.cause


def test_an_exception_in_the_constructor_is_final(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    head.starts = False
    actor = driver.create(watch=True, max_restarts=5)
    cluster.settle()
    head.running.clear()
    head.say(ActorFailed(actor.actor_id, 1, "init_failed", "ValueError: no", b"pickled"))
    dead = info_of(driver, actor.actor_id)
    assert (dead.state, dead.kind, dead.cause) == ("dead", "init_failed", "ValueError: no")
    assert driver.pushes[-1].actor.error == b"pickled"


def test_a_crash_restarts_until_the_budget_is_spent(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    actor = driver.create(watch=True, max_restarts=2)
    cluster.settle()
    for _ in range(3):
        cluster.advance(5)
        crash(cluster, actor.actor_id)
    assert updates(driver) == [
        ("alive", 1), ("restarting", 2), ("alive", 2), ("restarting", 3), ("alive", 3), ("dead", 3),
    ]  # fmt: skip
    dead = info_of(driver, actor.actor_id)
    assert (dead.kind, dead.cause, dead.restarts) == (
        "crashed", "signal 11 (restarted 2 times, and max_restarts is 2)", 2,
    )  # fmt: skip
    assert [m.restarts for m in head.seen if isinstance(m, StartActor)] == [0, 1, 2]


def test_an_intended_exit_is_final(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    actor = driver.create(max_restarts=-1)
    cluster.settle()
    head.end_actor(actor.actor_id, intended=True, cause="exit_actor() was called")
    dead = info_of(driver, actor.actor_id)
    assert (dead.state, dead.kind, dead.cause) == ("dead", "exited", "exit_actor() was called")


def test_a_crash_in_the_constructor_counts_as_a_restart(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    head.starts = False
    actor = driver.create(max_restarts=1)
    cluster.settle()
    crash(cluster, actor.actor_id)
    assert info_of(driver, actor.actor_id).state == "restarting"
    crash(cluster, actor.actor_id)
    assert info_of(driver, actor.actor_id).kind == "crashed"


def test_a_crash_loop_slows_down_and_says_so(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    head.starts = False
    actor = driver.create(watch=True, max_restarts=-1)
    cluster.settle()
    for _ in range(4):
        crash(cluster, actor.actor_id)
    assert head.running == {}
    waiting = info_of(driver, actor.actor_id)
    assert (waiting.state, waiting.reason.code) == ("restarting", "actor_restarting")
    assert (
        "ended 4 times in a row right after its start (last: signal 11); the next start is in 0.1 s"
        in waiting.reason.text
    )
    cluster.advance(0.15)
    assert actor.actor_id in head.running
    for delay_s in (0.2, 0.4, 0.8):
        crash(cluster, actor.actor_id)
        cluster.advance(delay_s * 0.9)
        assert head.running == {}
        cluster.advance(delay_s * 0.2)
        assert actor.actor_id in head.running
    head.finish_start(actor.actor_id)
    cluster.advance(5)
    crash(cluster, actor.actor_id)  # it had lived: at once again
    assert actor.actor_id in head.running


def test_killing_an_actor_that_is_held_back_ends_it(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    head.starts = False
    actor = driver.create(max_restarts=-1)
    cluster.settle()
    for _ in range(4):
        crash(cluster, actor.actor_id)
    assert driver.ask(KillActor(actor_id=actor.actor_id, no_restart=False)) == Done(rid=cluster._last_rid)
    assert info_of(driver, actor.actor_id).state == "restarting"
    driver.ask(KillActor(actor_id=actor.actor_id))
    assert info_of(driver, actor.actor_id).kind == "killed"
    cluster.advance(1)
    assert head.running == {}


def test_a_dead_node_restarts_its_actors_elsewhere(cluster: SimCluster, driver: SimProcess) -> None:
    other = cluster.add_node(8, special=1)
    needs = {"resources": to_amounts({"special": 1}), "watch": True}
    kept, lost = driver.create(max_restarts=1, **needs), driver.create(**needs)
    assert lost.state == "pending"
    cluster.settle()
    driver.ask(KillActor(actor_id=lost.actor_id))
    cluster.kill_node(other)
    cluster.advance(1)
    info = info_of(driver, kept.actor_id)
    assert (info.state, info.node_id, info.reason.code) == ("restarting", b"", "infeasible")
    fresh = cluster.add_node(1, special=1)
    info = info_of(driver, kept.actor_id)
    assert (info.state, info.node_id, info.restarts, info.incarnation) == ("alive", fresh.node_id, 1, 2)
    cluster.kill_node(fresh)
    info = info_of(driver, kept.actor_id)
    assert (info.state, info.kind) == ("dead", "node_died")
    assert "died: its connection closed (restarted 1 times, and max_restarts is 1)" in info.cause


# ---------------------------------------------------------------------------------------------------------- killing


@pytest.mark.parametrize("when", ["pending", "starting", "alive"])
def test_kill_is_final_at_any_time(cluster: SimCluster, head: SimAgent, driver: SimProcess, when: str) -> None:
    head.starts = when == "alive"
    actor = driver.create(cpus=100 if when == "pending" else 1, max_restarts=-1, watch=True)
    if when != "pending":
        cluster.settle()
        assert actor.actor_id in head.running
    assert isinstance(driver.ask(KillActor(actor_id=actor.actor_id)), Done)
    dead = info_of(driver, actor.actor_id)
    assert (dead.state, dead.kind, head.running) == ("dead", "killed", {})
    assert updates(driver)[-1][0] == "dead"
    stops = [m for m in head.seen if isinstance(m, StopActor)]
    assert [(m.incarnation, m.graceful) for m in stops] == ([] if when == "pending" else [(1, False)])
    assert isinstance(driver.ask(KillActor(actor_id=actor.actor_id)), Done)  # it is what was asked for
    assert driver.ask(KillActor(actor_id=b"?" * 16)).kind == "not_found"


@pytest.mark.parametrize("when", ["starting", "alive"])
def test_kill_with_restart_begins_a_new_life(
    cluster: SimCluster, head: SimAgent, driver: SimProcess, when: str
) -> None:
    head.starts = when == "alive"
    actor = driver.create(max_restarts=1, watch=True)
    cluster.settle()
    head.starts = True
    driver.ask(KillActor(actor_id=actor.actor_id, no_restart=False))
    assert info_of(driver, actor.actor_id).incarnation == 2
    assert updates(driver)[-2:] == [("restarting", 2), ("alive", 2)]
    driver.ask(KillActor(actor_id=actor.actor_id, no_restart=False))
    dead = info_of(driver, actor.actor_id)
    assert (dead.kind, "max_restarts is 1" in dead.cause) == ("killed", True)


def test_the_next_life_waits_until_the_last_one_has_ended(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    actor = driver.create(max_restarts=1)
    cluster.settle()
    driver.send(KillActor(actor_id=actor.actor_id, no_restart=False))
    driver.send(KillActor(actor_id=actor.actor_id, no_restart=False))  # it is on its way already
    while head.to_control:
        cluster._route(cluster.state.handle(head.peer, head.to_control.popleft(), cluster.now))
    assert [type(m) for m in head.from_control if not isinstance(m, RelayReply)] == [StopActor]
    assert info_of(driver, actor.actor_id).state == "alive"


# -------------------------------------------------------------------------------------------------- scope and owners


def test_out_of_scope_is_graceful_and_frees_the_name(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    actor = driver.create(name="x", watch=True, max_restarts=-1)
    cluster.settle()
    head.say(ActorOutOfScope(actor.actor_id))
    while head.to_control:
        cluster._route(cluster.state.handle(head.peer, head.to_control.popleft(), cluster.now))
    (stop,) = [message for message in head.from_control if isinstance(message, StopActor)]
    assert (stop.graceful, stop.grace_s) == (True, 30.0)
    head.from_control.remove(stop)
    assert driver.ask(FindActor(name="x")).kind == "not_found"
    second = driver.create(name="x")
    assert updates(driver) == [("alive", 1)]  # calls that were accepted may still be answered
    head.end_actor(actor.actor_id, intended=True, cause="done")
    dead = info_of(driver, actor.actor_id)
    assert (dead.kind, dead.cause) == ("out_of_scope", "all handles to it went out of scope")
    assert driver.ask(FindActor(name="x")).actor.actor_id == second.actor_id


def test_out_of_scope_before_there_is_a_process_is_the_end(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    actor = driver.create(cpus=100)
    head.say(ActorOutOfScope(actor.actor_id))
    head.say(ActorOutOfScope(actor.actor_id))
    assert info_of(driver, actor.actor_id).kind == "out_of_scope"


def test_out_of_scope_during_the_constructor_still_says_where_it_lives(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    head.starts = False
    actor = driver.create(watch=True)
    cluster.settle()
    head.finish_start(actor.actor_id)
    head.to_control.appendleft(ActorOutOfScope(actor.actor_id))
    for _ in range(2):
        cluster._route(cluster.state.handle(head.peer, head.to_control.popleft(), cluster.now))
    cluster.settle()
    assert updates(driver) == [("pending", 1), ("alive", 1), ("dead", 1)]


def test_a_crash_while_it_stops_is_not_a_restart(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    actor = driver.create(max_restarts=-1)
    cluster.settle()
    head.say(ActorOutOfScope(actor.actor_id))
    head.end_actor(actor.actor_id, intended=False, cause="signal 9")
    assert info_of(driver, actor.actor_id).kind == "out_of_scope"
    assert head.running == {}


def test_a_detached_actor_ignores_scope_owner_and_job(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    worker = cluster.add_worker(head, driver.job)
    actor = worker.create(detached=True, name="stays", namespace="ns")
    cluster.settle()
    head.say(ActorOutOfScope(actor.actor_id))
    worker.die()
    driver.die()
    cluster.settle()
    other = cluster.add_driver(head, namespace="ns")
    assert other.ask(FindActor(name="stays")).actor.state == "alive"


@pytest.mark.parametrize("how", ["process", "node"])
def test_actors_end_with_the_process_that_created_them(cluster: SimCluster, driver: SimProcess, how: str) -> None:
    other = cluster.add_node(4, there=1)
    worker = cluster.add_worker(other, driver.job)
    here = worker.create(max_restarts=-1, watch=True)
    there = worker.create(max_restarts=-1, resources=to_amounts({"there": 1}))
    mine = driver.create()
    cluster.settle()
    if how == "process":
        worker.die("it ran out of memory")
    else:
        cluster.kill_node(other)
    for actor in (here, there):
        dead = info_of(driver, actor.actor_id)
        assert (dead.state, dead.kind) == ("dead", "owner_died")
    assert info_of(driver, mine.actor_id).state == "alive"
    assert [actor_id for agent in cluster.agents.values() for actor_id in agent.running] == [mine.actor_id]


def test_actors_of_actors_end_with_them(cluster: SimCluster, driver: SimProcess) -> None:
    parent = driver.create()
    cluster.settle()
    child = agent_of(cluster, parent.actor_id).process_of(parent.actor_id).create()
    cluster.settle()
    grandchild = agent_of(cluster, child.actor_id).process_of(child.actor_id).create()
    cluster.settle()
    driver.ask(KillActor(actor_id=parent.actor_id))
    assert info_of(driver, grandchild.actor_id).kind == "owner_died"


def test_an_actor_that_a_tool_created_ends_with_its_connection(cluster: SimCluster, driver: SimProcess) -> None:
    request = _create(driver)
    (reply,) = cluster.tool(msgspec.structs.replace(request, rid=1))
    assert isinstance(reply, ActorReply)
    cluster.settle()
    cluster._route(cluster.state.disconnected(cluster._last_peer, "closed", cluster.now))
    assert info_of(driver, reply.actor.actor_id).kind == "owner_died"


# --------------------------------------------------------------------------------------------------- stale messages


def test_words_about_an_earlier_life_are_dropped_and_its_process_is_ended(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    actor = driver.create(max_restarts=1)
    cluster.settle()
    crash(cluster, actor.actor_id)
    head.seen.clear()
    head.say(ActorGone(actor.actor_id, 1, False, "late"))
    head.say(ActorFailed(actor.actor_id, 1, "init_failed", "late"))
    head.say(ActorStarted(actor.actor_id, 1, b"old worker", "/run/old", 1))
    info = info_of(driver, actor.actor_id)
    assert (info.state, info.incarnation, info.worker_id) == ("alive", 2, head.workers[actor.actor_id])
    assert [(m.incarnation, m.graceful) for m in head.seen if isinstance(m, StopActor)] == [(1, False)]
    head.say(ActorGone(b"?" * 16, 1, False, "never existed"))
    cluster.settle()


def test_an_unreadable_message_costs_nothing_but_itself(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    head.say(Relay(driver.worker_id, driver.job.job_id, b"\xc1 garbage"))
    head.say(Relay(driver.worker_id, driver.job.job_id, b""))
    cluster.settle()
    assert driver.ask(ListJobs()).jobs


# ------------------------------------------------------------------------------------------------------------ names


def test_a_name_is_taken_until_its_actor_is_dead(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    first = driver.create(name="x", handle=b"h")
    cluster.settle()
    refused = driver.ask(_create(driver, name="x"))
    assert isinstance(refused, Failed)
    assert refused.kind == "name_taken"
    assert f"by actor Counter 'x' ({first.actor_id.hex()}) (on host1, pid 1001)" in refused.text
    assert "get_if_exists=True" in refused.text
    found = driver.ask(FindActor(name="x")).actor
    assert (found.actor_id, found.handle, found.state) == (first.actor_id, b"h", "alive")
    assert driver.create(name="x", get_if_exists=True).actor_id == first.actor_id
    elsewhere = driver.create(name="x", namespace="other")
    assert elsewhere.actor_id != first.actor_id
    driver.ask(KillActor(actor_id=first.actor_id))
    gone = driver.ask(FindActor(name="x"))
    assert gone.kind == "not_found"
    assert "is dead: it was killed with kill(); there is one in namespace 'other'" in gone.text
    assert driver.create(name="x", get_if_exists=True).actor_id != first.actor_id


def test_two_creators_at_once_get_one_actor(cluster: SimCluster, driver: SimProcess) -> None:
    other = cluster.add_driver(cluster.add_node(), namespace=driver.job.namespace)
    ids = {process.create(name="one", get_if_exists=True).actor_id for process in (driver, other, driver, other)}
    assert len(ids) == 1
    names = driver.ask(ListActors(named_only=True, namespace=driver.job.namespace))
    assert isinstance(names, ActorsReply)
    assert [actor.name for actor in names.actors] == ["one"]
    assert driver.ask(ListActors(named_only=True, namespace="elsewhere")).actors == []


def test_dead_actors_are_remembered_up_to_a_bound() -> None:
    cluster = SimCluster(settings=ControlSettings(max_dead_actors=3))
    driver = cluster.add_driver(cluster.add_node())
    ids = [driver.create().actor_id for _ in range(5)]
    for actor_id in ids:
        driver.ask(KillActor(actor_id=actor_id))
    assert [actor.actor_id for actor in driver.ask(ListActors(all_states=True)).actors] == ids[2:]
    assert driver.ask(ListActors()).actors == []
    assert driver.ask(WatchActor(actor_id=ids[0])).kind == "not_found"
    assert driver.ask(WatchActor(actor_id=ids[-1])).actor.kind == "killed"


def test_there_is_a_limit_to_actors() -> None:
    cluster = SimCluster(settings=ControlSettings(max_actors=2))
    driver = cluster.add_driver(cluster.add_node())
    driver.create()
    driver.create()
    assert driver.ask(_create(driver)).kind == "limit"


# --------------------------------------------------------------------------------------------------------- watchers


def test_a_watcher_is_told_until_it_unwatches_or_is_gone(
    cluster: SimCluster, head: SimAgent, driver: SimProcess
) -> None:
    workers = [cluster.add_worker(head, driver.job) for _ in range(3)]
    actor = driver.create(max_restarts=-1)
    for worker in workers:
        worker.ask(WatchActor(actor_id=actor.actor_id))
    workers[1].send(UnwatchActor(actor.actor_id))
    workers[2].die()
    cluster.settle()
    cluster.advance(5)
    crash(cluster, actor.actor_id)
    assert [len(updates(worker)) > 1 for worker in workers] == [True, False, False]
    assert driver.ask(WatchActor(actor_id=b"?" * 16)).kind == "not_found"


# ------------------------------------------------------------------------------------------------ keys, logs, status


def test_keys(driver: SimProcess) -> None:
    ask = driver.ask
    assert not ask(PutKey(space="s", key=b"k", value=b"v")).found
    assert ask(PutKey(space="s", key=b"k", value=b"w", overwrite=False)).found
    got = ask(GetKey(space="s", key=b"k"))
    assert isinstance(got, KeyReply)
    assert (got.found, got.value) == (True, b"v")
    assert not ask(GetKey(space="t", key=b"k")).found
    assert ask(ListKeys(space="s", prefix=b"")).keys == [b"k"]
    assert ask(DeleteKey(space="s", key=b"", by_prefix=True)).count == 1
    assert ask(DeleteKey(space="s", key=b"k")).count == 0


def test_a_value_that_is_too_large_is_refused() -> None:
    cluster = SimCluster(settings=ControlSettings(max_value_bytes=1000))
    driver = cluster.add_driver(cluster.add_node())
    refused = driver.ask(PutKey(space="s", key=b"k", value=bytes(1000)))
    assert (refused.kind, "at most 1,000" in refused.text) == ("too_large", True)


def test_logs_reach_the_driver_of_their_job(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    other = cluster.add_driver(cluster.add_node())
    lines = [
        LogLines(p.job.job_id, b"w", "10.0.0.1", 7, "f", "out", [text]) for p, text in ((driver, "a"), (other, "b"))
    ]
    unowned = LogLines(b"", b"w", "10.0.0.1", 7, "f", "out", ["nobody's"])
    head.say(PublishLogs([lines[0], lines[1], unowned, lines[0]]))
    cluster.settle()
    assert [push for push in driver.pushes if isinstance(push, LogsArrived)] == [LogsArrived([lines[0], lines[0]])]
    assert [push for push in other.pushes if isinstance(push, LogsArrived)] == [LogsArrived([lines[1]])]
    driver.die()
    head.say(PublishLogs([lines[0]]))
    cluster.settle()
    assert len(driver.pushes) == 1


def test_status_shows_everything_in_one_picture(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    driver.create()
    driver.create(cpus=100)
    driver.create(cpus=100)
    cluster.advance(7)
    status = driver.ask(GetStatus())
    assert isinstance(status, StatusReply)
    assert (status.cluster_id, status.version, status.started_unix_s) == (b"cluster", cluster.settings.version, 1.7e9)
    assert status.actors == {"alive": 1, "pending": 2}
    (demand,) = status.demands
    assert (demand.name, demand.count, demand.job_id) == ("Counter", 2, driver.job.job_id)
    assert demand.reason.code == "infeasible"
    assert demand.reason.text == "no node has 100 CPU (the largest has 4)"
    assert demand.since_unix_s == pytest.approx(1.7e9)
    assert [job.job_id for job in status.jobs] == [driver.job.job_id]


def test_a_worker_that_is_gone_does_not_end_its_job(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    head.say(ProcessGone(b"some worker", driver.job.job_id, False, "idle"))
    cluster.settle()
    assert driver.ask(ListJobs()).jobs[0].ended_unix_s == 0.0


# -------------------------------------------------------------------------------------------------------- placement


def test_two_hundred_small_actors_are_placed_at_once_and_spread(cluster: SimCluster, driver: SimProcess) -> None:
    for _ in range(3):
        cluster.add_node(4)
    for _ in range(200):
        driver.send(_create(driver))
    driver.cluster.deliver_from(driver.agent)
    placed = [sum(isinstance(m, StartActor) for m in (*a.seen, *a.from_control)) for a in cluster.agents.values()]
    assert sum(placed) == 200
    assert max(placed) - min(placed) <= 1
    cluster.settle()
    assert driver.ask(GetStatus()).actors == {"alive": 200}


def test_few_small_actors_stay_with_their_creator(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    cluster.add_node(64)
    actors = [driver.create() for _ in range(4)]
    cluster.settle()
    assert {actor.actor_id for actor in actors} == set(head.running)
    driver.create()
    cluster.settle()
    assert len(head.running) == 4


def test_what_holds_resources_is_booked_before_the_node_reports(cluster: SimCluster, driver: SimProcess) -> None:
    for _ in range(2):
        cluster.add_node(4)
    actors = [driver.create(cpus=1) for _ in range(20)]
    cluster.settle()
    assert sorted(count_by_node(cluster).values()) == [4, 4, 4]
    assert not [m for agent in cluster.agents.values() for m in agent.to_control]
    status = driver.ask(GetStatus())
    assert status.actors == {"alive": 12, "pending": 8}
    assert [(d.count, d.reason.code) for d in status.demands] == [(8, "busy")]
    for actor in actors[:12]:
        driver.ask(KillActor(actor_id=actor.actor_id))
    cluster.settle()
    assert driver.ask(GetStatus()).actors == {"alive": 8, "dead": 12}


def test_an_actor_that_waits_says_why_and_repeats_it(cluster: SimCluster, driver: SimProcess) -> None:
    actor = driver.create(resources=to_amounts({"GPU": 4}), watch=True)
    assert (actor.state, actor.reason.code) == ("pending", "infeasible")  # type: ignore[union-attr]

    def notices() -> list[str]:
        return [push.text for push in driver.pushes if isinstance(push, Notice)]

    cluster.advance(4.9)
    assert notices() == []
    cluster.advance(0.2)
    assert notices() == ["actor Counter has been waiting for a place for 5 s: no node has 4 GPU (none has any)"]
    driver.create(resources=to_amounts({"GPU": 4}))
    cluster.advance(29.9)
    cluster.add_node(1, GPU=1)
    cluster.advance(0.2)
    assert notices()[1:] == [
        "2 actors Counter have been waiting for a place for 35 s: no node has 4 GPU (none has any)",
    ]
    cluster.advance(60)
    assert notices()[2].endswith("95 s: no node has 4 GPU (the largest has 1)")
    assert len({push.key for push in driver.pushes if isinstance(push, Notice)}) == 3
    cluster.add_node(1, GPU=8)
    assert info_of(driver, actor.actor_id).state == "alive"
    cluster.advance(500)
    assert len(notices()) == 3


def test_watchers_hear_when_the_kind_of_reason_changes(cluster: SimCluster, driver: SimProcess) -> None:
    driver.create(resources=to_amounts({"GPU": 1}), watch=True)
    holder_node = cluster.add_node(1, GPU=1)
    cluster.settle()
    first = next(iter(holder_node.running))
    second = driver.create(resources=to_amounts({"GPU": 1}), watch=True)
    assert second.reason.code == "busy"  # type: ignore[union-attr]
    driver.pushes.clear()
    cluster.kill_node(holder_node)
    cluster.advance(1)
    codes = [(p.actor.actor_id == first, p.actor.state, p.actor.reason and p.actor.reason.code) for p in driver.pushes
             if isinstance(p, ActorUpdate)]  # fmt: skip
    assert codes == [(True, "dead", None), (False, "pending", "infeasible")]


def test_a_node_that_refuses_is_asked_again_after_its_next_report(cluster: SimCluster, driver: SimProcess) -> None:
    agent = cluster.add_node(2, here=1)
    agent.available = {}  # taken by tasks, and control does not know yet
    actor = driver.create(resources=to_amounts({"here": 1}))
    cluster.settle()
    starts = [m for m in agent.seen if isinstance(m, StartActor)]
    assert len(starts) == 1
    info = info_of(driver, actor.actor_id)
    assert (info.state, info.reason.code) == ("pending", "busy")
    assert "has just refused it" in info.reason.text
    agent.available = dict(agent.total)
    agent.report()
    info = info_of(driver, actor.actor_id)
    assert (info.state, info.incarnation, info.restarts) == ("alive", 2, 0)


def test_a_refused_actor_goes_to_another_node_at_once(cluster: SimCluster) -> None:
    full, free = cluster.add_node(4), cluster.add_node(4)
    driver = cluster.add_driver(full)
    full.available = {}
    actor = driver.create()
    cluster.settle()
    assert actor.actor_id in free.running


@pytest.mark.parametrize("soft", [False, True])
def test_affinity_to_a_node_that_is_there(cluster: SimCluster, driver: SimProcess, soft: bool) -> None:
    nodes = [cluster.add_node(4) for _ in range(3)]
    actors = [driver.create(strategy=Strategy("node", nodes[1].node_id, soft=soft)) for _ in range(10)]
    cluster.settle()
    assert set(nodes[1].running) == {actor.actor_id for actor in actors}


def test_affinity_to_a_node_that_is_gone(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    hard = driver.create(strategy=Strategy("node", b"gone"))
    assert (hard.state, hard.kind) == ("dead", "unschedulable")
    assert "is not in the cluster" in hard.cause
    soft = driver.create(strategy=Strategy("node", b"gone", soft=True))
    other = cluster.add_node(4)
    bound = driver.create(strategy=Strategy("node", other.node_id), max_restarts=-1)
    cluster.settle()
    assert soft.actor_id in head.running
    cluster.kill_node(other)
    cluster.advance(1)
    dead = info_of(driver, bound.actor_id)
    assert (dead.state, dead.kind) == ("dead", "unschedulable")


def test_a_busy_node_is_waited_for_by_affinity(cluster: SimCluster, head: SimAgent, driver: SimProcess) -> None:
    other = cluster.add_node(1)
    first, second = (driver.create(cpus=1, strategy=Strategy("node", other.node_id)) for _ in range(2))
    cluster.settle()
    assert info_of(driver, second.actor_id).reason.code == "busy"
    cluster.kill_node(cluster.add_node(8))
    cluster.advance(1)
    driver.ask(KillActor(actor_id=first.actor_id))
    assert info_of(driver, second.actor_id).node_id == other.node_id


def test_labels_are_kept_for_small_actors_too(cluster: SimCluster, driver: SimProcess) -> None:
    labelled = cluster.add_node(1, labels={"zone": "b"})
    actors = [driver.create(strategy=Strategy(labels={"zone": "b"})) for _ in range(5)]
    cluster.settle()
    assert set(labelled.running) == {actor.actor_id for actor in actors}


def test_gpu_nodes_are_left_to_those_who_need_them(cluster: SimCluster) -> None:
    gpu, plain = cluster.add_node(64, GPU=8), cluster.add_node(2)
    driver = cluster.add_driver(plain)
    for _ in range(50):
        driver.create()
    cluster.settle()
    assert (len(gpu.running), len(plain.running)) == (0, 50)
