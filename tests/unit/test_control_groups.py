"""The life of a placement group, as control leads it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from shoal.control.groups import CREATED, STEPS, GroupEvent, GroupRecord, GroupState, IllegalGroupStepError
from shoal.control.messages import (
    BundlesPrepared,
    CommitBundles,
    CreateActor,
    CreateGroup,
    FindGroup,
    GetStatus,
    GroupChanged,
    GroupInfo,
    GroupReply,
    GroupSpec,
    Notice,
    PrepareBundles,
    RemoveGroup,
    ReturnBundles,
    WatchActor,
    WatchGroup,
)
from shoal.control.simulated import SimAgent, SimCluster, SimProcess
from shoal.rpc.messages import Failed
from shoal.scheduling.resources import to_amounts
from shoal.scheduling.views import Strategy

ALL = list(itertools.product(GroupState, GroupEvent))


def record() -> GroupRecord:
    return GroupRecord(GroupSpec(b"g" * 18, b"job0", [to_amounts({"CPU": 1})]), 0.0, 0.0)


@pytest.mark.parametrize(("state", "event"), ALL)
def test_every_pair_of_the_table(state: GroupState, event: GroupEvent) -> None:
    group = record()
    group.state = state
    if (state, event) in STEPS:
        group.apply(event, 1.0)
        assert group.state is STEPS[state, event]
    else:
        with pytest.raises(IllegalGroupStepError, match=event.value):
            group.apply(event, 1.0)
        assert group.state is state


class World:
    def __init__(self, *cpus: float) -> None:
        self.cluster = SimCluster(1)
        self.agents = [self.cluster.add_node(count) for count in cpus]
        self.driver = self.cluster.add_driver(self.agents[0], namespace="space")
        self.cluster.settle()

    def create(self, *bundles: float, process: SimProcess | None = None, settle: bool = True, **fields: Any) -> bytes:
        process = process or self.driver
        spec = GroupSpec(
            group_id=self.cluster.rng.randbytes(18),
            job_id=process.job.job_id,
            bundles=[to_amounts({"CPU": cpus}) for cpus in bundles],
            **fields,
        )
        process.send(CreateGroup(spec=spec))
        if settle:
            self.cluster.settle()
        self.cluster.state.check_invariants()
        return spec.group_id

    def info(self, group_id: bytes) -> GroupInfo:
        reply = self.cluster.tool(FindGroup(rid=1, group_id=group_id))[0]
        assert isinstance(reply, GroupReply), reply
        return reply.group

    def news(self, group_id: bytes) -> list[str]:
        return [m.state for m in self.driver.pushes if isinstance(m, GroupChanged) and m.group_id == group_id]

    def orders(self, agent: SimAgent, kind: type) -> list[Any]:
        return [message for message in agent.seen if isinstance(message, kind)]


def test_a_group_on_one_node_takes_one_order() -> None:
    world = World(4)
    group_id = world.create(1, 2)
    (order,) = world.orders(world.agents[0], PrepareBundles)
    assert order.commit
    assert order.patience_s == 0
    assert world.orders(world.agents[0], CommitBundles) == []
    assert world.info(group_id).state == "CREATED"
    assert world.news(group_id) == ["CREATED"]


def test_a_group_on_two_nodes_is_prepared_by_both_before_either_commits() -> None:
    world = World(2, 2)
    group_id = world.create(2, 2, settle=False)
    world.cluster.deliver_from(world.agents[0])
    world.cluster.deliver_from(world.agents[0])
    assert world.info(group_id).state == "PENDING"
    assert not any(agent.committed for agent in world.agents)
    world.cluster.settle()
    assert all(agent.committed for agent in world.agents)
    assert set(world.info(group_id).nodes) == {agent.node_id for agent in world.agents}


def test_one_refusal_gives_everything_back_and_it_is_tried_again() -> None:
    world = World(2, 2)
    world.agents[1].available = {"CPU": 0}  # tasks took it a moment ago, and control has not heard
    group_id = world.create(2, 2)
    assert world.info(group_id).state == "PENDING"
    assert world.agents[0].bundles == {}
    assert world.orders(world.agents[0], ReturnBundles)
    world.cluster.advance(2)
    attempts = world.info(group_id).attempts
    assert attempts < 15, "the pauses grow"
    world.agents[1].available = dict(world.agents[1].total)
    world.agents[1].report()
    world.cluster.advance(2)
    assert world.info(group_id).state == "CREATED"


def test_a_stale_answer_is_not_heard() -> None:
    world = World(2)
    world.agents[0].available = {"CPU": 0}
    group_id = world.create(2)
    world.agents[0].say(BundlesPrepared(group_id, world.info(group_id).attempts, ok=True))
    world.agents[0].say(BundlesPrepared(b"?" * 18, 1, ok=True))
    world.cluster.settle()
    assert world.info(group_id).state == "PENDING"


def test_two_groups_for_the_same_room_do_not_block_each_other() -> None:
    world = World(2, 2)
    first, second = world.create(2, 2, settle=False), world.create(2, 2, settle=False)
    world.cluster.settle()
    states = [world.info(group_id).state for group_id in (first, second)]
    assert sorted(states) == ["CREATED", "PENDING"]
    assert "too little is free" in world.info(second).reason.text  # type: ignore[union-attr]
    world.driver.send(RemoveGroup(group_id=first))
    world.cluster.settle()
    assert world.info(second).state == "CREATED"
    assert world.info(first).state == "REMOVED"


def test_one_group_at_a_time_stands_in_line() -> None:
    world = World(2, 2)
    for agent in world.agents:
        agent.available = {"CPU": 0}
        agent.report()
    world.cluster.settle()
    waiting = [world.create(2), world.create(2)]
    world.cluster.advance(0.4)
    assert not any(order.patience_s for agent in world.agents for order in world.orders(agent, PrepareBundles))
    world.cluster.advance(0.2, settle=False)
    world.cluster.settle()
    patient = [order for agent in world.agents for order in world.orders(agent, PrepareBundles) if order.patience_s]
    assert {order.group_id for order in patient} <= set(waiting)
    assert patient
    for agent in world.agents:
        agent.available = dict(agent.total)
        agent.report()
    world.cluster.advance(3)
    assert [world.info(group_id).state for group_id in waiting] == ["CREATED", "CREATED"]


def test_a_lost_bundle_is_made_again_and_the_others_stay() -> None:
    world = World(2, 2)
    group_id = world.create(1, 1, strategy="STRICT_SPREAD")
    kept = next(index for index, node in enumerate(world.info(group_id).nodes) if node == world.agents[0].node_id)
    world.cluster.kill_node(world.agents[1])
    world.cluster.settle()
    info = world.info(group_id)
    assert info.state == "RESCHEDULING"
    assert info.nodes[kept] == world.agents[0].node_id
    assert info.reason is not None
    fresh = world.cluster.add_node(2)
    world.cluster.settle()
    assert world.info(group_id).nodes[1 - kept] == fresh.node_id
    assert world.news(group_id) == ["CREATED", "RESCHEDULING", "CREATED"]
    assert not world.orders(world.agents[0], ReturnBundles)


def test_a_node_that_dies_while_it_prepares_is_a_refusal() -> None:
    world = World(2, 2)
    group_id = world.create(2, 2, settle=False)
    world.cluster.deliver_from(world.agents[0])
    world.cluster.kill_node(world.agents[1])
    world.cluster.settle()
    assert world.info(group_id).state == "PENDING"
    assert world.agents[0].bundles == {}
    world.cluster.add_node(2)
    world.cluster.advance(1)
    assert world.info(group_id).state == "CREATED"


def test_removal_ends_actors_inside_for_good_and_tells_why() -> None:
    world = World(4)
    group_id = world.create(2)
    inside = Strategy("group", group=group_id)
    actor = world.driver.create(cpus=1, strategy=inside, max_restarts=-1, detached=True)
    outside = world.driver.create(cpus=1)
    world.cluster.settle()
    world.driver.send(RemoveGroup(group_id=group_id))
    world.cluster.settle()
    dead = world.driver.ask(WatchActor(actor_id=actor.actor_id)).actor
    assert (dead.state, dead.kind) == ("dead", "group_removed")
    assert "was removed with remove_placement_group()" in dead.cause
    assert world.driver.ask(WatchActor(actor_id=outside.actor_id)).actor.state == "alive"
    late = world.driver.spec(cpus=1, strategy=inside)
    world.driver.send(CreateActor(spec=late))
    world.cluster.settle()
    assert world.driver.ask(WatchActor(actor_id=late.actor_id)).actor.kind == "group_removed"
    assert world.agents[0].bundles == {}


def test_actors_wait_for_their_group_and_go_to_its_bundles() -> None:
    world = World(1, 4)
    group_id = b"later" + bytes(13)
    actor = world.driver.create(cpus=1, strategy=Strategy("group", group=group_id, bundle=0))
    assert actor.state == "pending"
    reason = actor.reason
    assert reason is not None
    assert reason.code == "group_pending"
    (demand,) = world.driver.ask(GetStatus()).demands
    assert (demand.resources, demand.group) == (to_amounts({"CPU": 1}), group_id), "as asked, not by names of bundles"
    spec = GroupSpec(group_id, world.driver.job.job_id, [to_amounts({"CPU": 3})])
    world.driver.send(CreateGroup(spec=spec))
    world.cluster.advance(1)
    alive = world.driver.ask(WatchActor(actor_id=actor.actor_id)).actor
    assert (alive.state, alive.node_id) == ("alive", world.agents[1].node_id)


def test_groups_end_with_their_job_or_actor_unless_detached() -> None:
    world = World(4)
    other = world.cluster.add_driver(world.agents[0])
    maker = other.create(detached=True)
    world.cluster.settle()
    brief = world.create(1, process=other)
    lasting = world.create(1, process=other, detached=True, name="lasting")
    of_actor = world.create(1, process=other, actor_id=maker.actor_id)
    other.die()
    world.cluster.settle()
    states = [world.info(group_id).state for group_id in (brief, lasting, of_actor)]
    assert states == ["REMOVED", "CREATED", "CREATED"]
    world.agents[0].end_actor(maker.actor_id, intended=True, cause="it left")
    world.cluster.settle()
    assert world.info(of_actor).state == "REMOVED"
    too_late = world.create(1, process=other, actor_id=maker.actor_id)
    reply = world.cluster.tool(FindGroup(rid=1, group_id=too_late))[0]
    assert isinstance(reply, Failed)


def test_names_are_unique_in_their_namespace_and_free_again_after_removal() -> None:
    world = World(4)
    first = world.create(1, name="web")
    taken = GroupSpec(b"t" * 18, world.driver.job.job_id, [to_amounts({"CPU": 1})], name="web")
    reply = world.driver.ask(CreateGroup(spec=taken))
    assert (reply.kind, "get_placement_group" in reply.text) == ("name_taken", True)
    elsewhere = world.driver.ask(FindGroup(name="web", namespace="other"))
    assert elsewhere.text.endswith("there is one in namespace 'space'")
    assert world.driver.ask(FindGroup(name="web", namespace="space")).group.spec.group_id == first
    world.driver.send(RemoveGroup(group_id=first))
    assert world.driver.ask(CreateGroup(spec=taken)).group.state == "PENDING"


def test_who_watches_is_told_now_and_of_each_change() -> None:
    world = World(2)
    other = world.cluster.add_driver(world.agents[0])
    group_id = world.create(1)
    other.send(WatchGroup(group_id))
    world.cluster.settle()
    world.driver.send(RemoveGroup(group_id=group_id))
    world.cluster.settle()
    other.send(WatchGroup(group_id))
    world.cluster.settle()
    told = [message.state for message in other.pushes if isinstance(message, GroupChanged)]
    assert told == ["CREATED", "REMOVED", "REMOVED"]
    assert world.cluster.state._groups._watchers == {}


def test_what_waits_is_in_the_status_and_is_told_to_the_driver() -> None:
    world = World(2)
    world.create(3, name="large")
    (demand,) = world.driver.ask(GetStatus()).demands
    assert demand.name == "placement group 'large' (PACK, 1 bundle)"
    assert demand.reason.text == "its bundle 0 fits on no node: no node has 3 CPU (the largest has 2)"
    world.cluster.advance(60)
    notices = [message.text for message in world.driver.pushes if isinstance(message, Notice)]
    assert len(notices) == 2
    assert notices[0].startswith(
        "placement group 'large' (PACK, 1 bundle) has been waiting for a place for 5 s: its bun"
    )


def test_nothing_is_placed_beside_a_bundle_that_is_full() -> None:
    world = World(2)
    group_id = world.create(1)
    world.driver.create(cpus=1)
    world.cluster.settle()
    waits = world.driver.create(cpus=1)
    assert waits.state == "pending"
    fits = world.driver.create(cpus=1, strategy=Strategy("group", group=group_id))
    world.cluster.settle()
    assert world.driver.ask(WatchActor(actor_id=fits.actor_id)).actor.state == "alive"
    assert world.cluster.state._groups._groups[group_id].state is CREATED
