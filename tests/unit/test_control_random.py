"""Anything may happen to a cluster, in any order; then it heals, and what should hold is looked at."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.control.messages import (
    ActorOutOfScope,
    CreateActor,
    CreateGroup,
    GetStatus,
    GroupSpec,
    KillActor,
    ListActors,
    ListGroups,
    RemoveGroup,
    UnwatchActor,
    WatchActor,
)
from shoal.control.settings import ControlSettings
from shoal.control.simulated import SimAgent, SimCluster, SimProcess
from shoal.scheduling.bundles import STRATEGIES, Assigned, BundleNeed, place_bundles
from shoal.scheduling.policy import can_ever_run
from shoal.scheduling.resources import fits, to_amounts
from shoal.scheduling.views import Strategy

KINDS = (
    ["create"] * 6
    + ["step"] * 6
    + ["settle", "pass", "crash", "crash", "exit", "kill", "recycle", "scope", "watch", "unwatch"]
    + ["group", "group", "remove group"]
    + ["node", "node dies", "node is cut off", "worker", "process dies", "driver", "driver dies", "busy", "idle"]
)
EVENTS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1)),
    min_size=40,
    max_size=150,
)


class World:
    """A cluster to which things happen; one lot decides each detail of an event."""

    def __init__(self, seed: int) -> None:
        self.cluster = SimCluster(seed, ControlSettings(max_dead_actors=20))
        self.processes: list[SimProcess] = []
        self.actors: list[bytes] = []
        self.groups: list[bytes] = []
        self.add_driver(self.cluster.add_node(4))

    def add_driver(self, agent: SimAgent) -> None:
        self.processes.append(self.cluster.add_driver(agent, namespace="shared", classes=("Counter", "Gpu")))

    def happen(self, what: str, lot: random.Random) -> None:
        cluster = self.cluster
        self.drop_given_up()
        agents = list(cluster.agents.values())
        agent = lot.choice(agents) if agents else None
        process = lot.choice(self.processes) if self.processes else None
        actor = lot.choice(self.actors) if self.actors else b"?" * 16
        if what == "step":
            for _ in range(lot.randint(1, 10)):
                cluster.step()
        elif what == "settle":
            cluster.settle()
        elif what == "pass":
            cluster.advance(lot.choice([0.01, 0.1, 1, 6]), settle=lot.random() < 0.5)
        elif what == "node":
            cluster.add_node(lot.choice([1, 4]), **({"GPU": 2} if lot.random() < 0.5 else {}))
        elif agent is None:
            return
        elif what == "node dies":
            self.forget(agent)
            cluster.kill_node(agent)
        elif what == "node is cut off":  # its words are lost until control gives it up
            agent.to_control.clear()
            agent.from_control.clear()
            self.forget(agent)
            del cluster.agents[agent.peer]
            cluster.silence(0.5)
        elif what == "driver":
            self.add_driver(agent)
        elif what == "busy":
            agent.available = {}
        elif what == "idle":
            agent.available = agent.held_less_than_total()
            agent.report()
        elif what in ("crash", "exit"):
            if agent.running:
                agent.end_actor(lot.choice(sorted(agent.running)), intended=what == "exit", cause=what)
        elif process is None:
            return
        elif what == "create":
            self.create(process, lot)
        elif what == "group":
            self.create_group(process, lot)
        elif what == "remove group":
            if self.groups:
                process.send(RemoveGroup(group_id=lot.choice(self.groups)))
        elif what == "kill":
            process.send(KillActor(actor_id=actor))
        elif what == "recycle":
            process.send(KillActor(actor_id=actor, no_restart=False))
        elif what == "scope":
            agent.say(ActorOutOfScope(actor))
        elif what == "watch":
            process.send(WatchActor(actor_id=actor))
        elif what == "unwatch":
            process.send(UnwatchActor(actor))
        elif what == "worker":
            self.processes.append(cluster.add_worker(agent, process.job))
        else:
            if (process.worker_id == process.job.driver_id) == (what == "driver dies"):
                process.die()
                self.processes.remove(process)

    def drop_given_up(self) -> None:
        """Nodes that control takes for dead, because nothing was delivered for long, end."""
        for agent in list(self.cluster.agents.values()):
            if self.cluster.state._nodes.at(agent.peer) is None:
                self.forget(agent)
                self.cluster.kill_node(agent)

    def create(self, process: SimProcess, lot: random.Random) -> None:
        cluster = self.cluster
        strategy = Strategy()
        if lot.random() < 0.2 and cluster.agents:
            node = lot.choice(list(cluster.agents.values()))
            strategy = Strategy("node", node.node_id, soft=lot.random() < 0.5)
        elif lot.random() < 0.2:
            strategy = Strategy("spread")
        elif lot.random() < 0.4 and self.groups:
            strategy = Strategy("group", group=lot.choice(self.groups), bundle=lot.choice([-1, -1, 0, 1]))
        spec = process.spec(
            cls=lot.choice(["Counter"] * 4 + ["Gpu"] * 4 + ["Unknown"]),
            resources=to_amounts(lot.choice([{}, {}, {"CPU": 1}, {"CPU": 3}, {"GPU": 1}, {"GPU": 0.5, "CPU": 1}])),
            strategy=strategy,
            name=lot.choice(["", "", "", "a", "b"]),
            detached=lot.random() < 0.2,
            max_restarts=lot.choice([0, 0, 1, -1]),
        )
        process.send(CreateActor(rid=cluster.next_rid(), spec=spec, get_if_exists=lot.random() < 0.5))
        self.actors.append(spec.actor_id)

    def create_group(self, process: SimProcess, lot: random.Random) -> None:
        kinds: list[dict[str, float]] = [{"CPU": 1}, {"CPU": 1}, {"CPU": 2}, {"CPU": 1, "GPU": 1}]
        spec = GroupSpec(
            group_id=lot.randbytes(18),
            job_id=process.job.job_id,
            bundles=[to_amounts(lot.choice(kinds)) for _ in range(lot.randint(1, 3))],
            strategy=lot.choice(STRATEGIES),
            name=lot.choice(["", "", "", "g"]),
            detached=lot.random() < 0.2,
            actor_id=lot.choice(self.actors) if self.actors and lot.random() < 0.1 else b"",
        )
        process.send(CreateGroup(rid=self.cluster.next_rid(), spec=spec))
        self.groups.append(spec.group_id)

    def forget(self, agent: SimAgent) -> None:
        self.processes = [process for process in self.processes if process.agent is not agent]

    def heal(self) -> None:
        """Time for every message, timeout, restart and report."""
        self.drop_given_up()
        for agent in self.cluster.agents.values():
            agent.available = agent.held_less_than_total()
        self.cluster.advance(30)

    def check_always(self) -> None:
        self.cluster.state.check_invariants()
        listed = self.cluster.tool(ListActors(rid=1))[0].actors  # type: ignore[attr-defined]
        assert all(actor.state != "dead" for actor in listed)

    def check_healed(self) -> None:
        cluster = self.cluster
        cluster.state.check_invariants()
        listed = cluster.tool(ListActors(rid=1))[0].actors  # type: ignore[attr-defined]
        places = {
            actor.actor_id: (actor.node_id, actor.incarnation, actor.worker_id) for actor in listed if actor.node_id
        }
        assert places == {
            actor_id: (agent.node_id, incarnation, agent.workers[actor_id])
            for agent in cluster.agents.values()
            for actor_id, (incarnation, _) in agent.running.items()
        }
        groups = cluster.tool(ListGroups(rid=1))[0].groups  # type: ignore[attr-defined]
        living = [group for group in groups if group.state != "REMOVED"]
        assert {
            (group.spec.group_id, index, node_id)
            for group in living
            for index, node_id in enumerate(group.nodes)
            if node_id
        } == {(*key, agent.node_id) for agent in cluster.agents.values() for key in agent.bundles}, (
            "a bundle is left behind, or was not made"
        )
        for agent in cluster.agents.values():
            assert agent.committed == set(agent.bundles)
            assert all(amount >= 0 for amount in agent.available.values()), "a node is over-committed"
        views = [agent.view() for agent in cluster.agents.values()]
        for group in living:
            assert (group.state == "CREATED") == all(group.nodes)
            if group.state != "CREATED":
                assert group.reason is not None
                kept = {index: node_id for index, node_id in enumerate(group.nodes) if node_id}
                needs = [BundleNeed(bundle) for bundle in group.spec.bundles]
                plan = place_bundles(needs, group.spec.strategy, views, kept=kept)
                assert not isinstance(plan, Assigned), "it waits and there is room"
        names = Counter((actor.namespace, actor.name) for actor in listed if actor.name)
        assert all(count == 1 for count in names.values())
        for line in cluster.state._lives._room.lines():
            named = line.spec.strategy.node_id if line.spec.strategy.kind == "node" else None
            for agent in cluster.agents.values():
                if (named is None or agent.node_id == named) and can_ever_run(
                    line.need, line.spec.strategy, agent.view()
                ):
                    assert not fits(line.need, agent.available), f"{line.need} waits and {agent.available} is idle"
        status = cluster.tool(GetStatus(rid=1))[0]
        assert {node.node_id for node in status.nodes if node.alive} == {  # type: ignore[attr-defined]
            agent.node_id for agent in cluster.agents.values()
        }
        waiting = sum(actor.state in ("pending", "restarting") for actor in listed)
        waiting += sum(group.state != "CREATED" for group in living)
        assert sum(demand.count for demand in status.demands) == waiting  # type: ignore[attr-defined]
        assert all(actor.reason is not None for actor in listed if actor.state != "alive")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), EVENTS)
def test_whatever_happens_the_cluster_heals(seed: int, events: list[tuple[str, int]]) -> None:
    world = World(seed)
    for what, lot in events:
        world.happen(what, random.Random(lot))
        world.check_always()
    world.heal()
    world.check_healed()


@pytest.mark.parametrize("seed", range(40))
def test_a_long_and_busy_life(seed: int) -> None:
    world, lot = World(seed), random.Random(seed)
    rare = {"node dies", "node is cut off", "driver dies"}
    for _ in range(600):
        what = lot.choice(KINDS)
        if what not in rare or lot.random() < 0.3:
            world.happen(what, lot)
            world.check_always()
    world.heal()
    world.check_healed()


def test_all_is_given_back_when_everybody_leaves() -> None:
    world = World(5)
    lot = random.Random(6)
    kinds = ["create", "step", "crash", "watch", "worker", "driver", "node", "kill", "group"]
    for _ in range(2000):
        world.happen(lot.choice(kinds), lot)
    cluster = world.cluster
    cluster.settle()
    for actor in cluster.tool(ListActors(rid=1))[0].actors:  # type: ignore[attr-defined]
        cluster.tool(KillActor(rid=1, actor_id=actor.actor_id))
    for process in list(world.processes):
        process.die()
    for group_id in world.groups:
        cluster.tool(RemoveGroup(rid=1, group_id=group_id))
    cluster.advance(5)
    state = cluster.state
    assert (len(state._groups._groups), len(state._groups._waiting), state._groups._names) == (0, 0, {})
    assert (state._groups._watchers, state._groups._of_job, state._groups._of_actor) == ({}, {}, {})
    assert all(agent.bundles == {} for agent in cluster.agents.values())
    state.check_invariants()
    lives = state._lives
    assert (len(lives._actors), len(lives._room), len(lives._names), len(state._processes)) == (0, 0, 0, 0)
    assert (len(lives._dead), state._jobs.running()) == (20, [])
    assert state._keys.size_bytes == 0
    assert all(agent.running == {} and node.actors == set() and node.light == 0 and node.free == agent.total
               for agent, node in zip(cluster.agents.values(), state._nodes, strict=True))  # fmt: skip


def test_two_thousand_nodes_and_forty_thousand_actors() -> None:
    cluster = SimCluster(3)
    nodes = [cluster.add_quiet_node(32) for _ in range(2000)]
    drivers = [cluster.add_driver(node) for node in nodes[:10]]
    for number in range(40_000):
        driver = drivers[number % 10]
        driver.send(CreateActor(spec=driver.spec(cpus=number % 2, max_restarts=1)))
    for driver in drivers:
        cluster.deliver_from(driver.agent)
    for agent in nodes:
        cluster.deliver_from(agent)
    counts = [len(agent.running) for agent in nodes]
    assert sum(counts) == 40_000
    assert max(counts) <= 50  # ten nodes are those of the creators, which keep up to 32 small ones
    cluster.kill_node(nodes[1500])
    for agent in cluster.agents.values():
        cluster.deliver_from(agent)
        cluster.deliver_from(agent)
    status = drivers[0].ask(GetStatus())
    assert status.actors == {"alive": 40_000}
    assert status.demands == []
