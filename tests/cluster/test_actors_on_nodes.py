"""Actors of a cluster of several nodes: calls and handles between them, and the end of a node."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest

import shoal
from shoal.cluster_utils import Cluster, Node
from shoal.exceptions import ActorDiedError, ActorUnavailableError
from shoal.runtime import slot

LARGE = 2_000_000


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.005)


@pytest.fixture
def nodes(make_cluster: Callable[..., Cluster]) -> tuple[Cluster, Node, Node]:
    """A head with the driver, and two nodes that have a resource of their own: "red" and "blue"."""
    cluster = make_cluster()
    cluster.add_node(num_cpus=2)
    red = cluster.add_node(num_cpus=2, resources={"red": 4}, wait=False)
    blue = cluster.add_node(num_cpus=2, resources={"blue": 4}, wait=False)
    cluster.wait_for_nodes()
    cluster.connect()
    return cluster, red, blue


@shoal.remote
class Box:
    def __init__(self, *items: Any) -> None:
        self.items = list(items)

    def where(self) -> str:
        return shoal.get_runtime_context().get_node_id() or ""

    def add(self, item: Any) -> int:
        self.items.append(item)
        return len(self.items)

    def sizes(self) -> list[int]:
        return [len(item) for item in self.items]

    def all(self) -> list[Any]:
        return self.items

    def use(self, others: list[Any], item: Any) -> int:
        number: int = shoal.get(others[0].add.remote(item))
        return number

    def keep(self, others: list[Any]) -> None:
        self.others = others

    def crash(self) -> None:
        os._exit(3)


def call_until_dead(box: Any) -> None:
    while True:
        try:
            shoal.get(box.add.remote(1), timeout=20)
        except ActorUnavailableError:
            continue


def alive() -> set[bytes]:
    found = slot.current.list_actors(named_only=False, namespace="")  # type: ignore[union-attr]
    return {info.actor_id for info in found if info.state == "alive"}


def test_handles_calls_and_values_between_nodes(nodes: tuple[Cluster, Node, Node]) -> None:
    _, red_node, blue_node = nodes
    blob = shoal.put(b"d" * LARGE)
    red = Box.options(resources={"red": 1}).remote(b"r" * LARGE, blob)
    blue = Box.options(resources={"blue": 1}).remote()
    assert shoal.get([red.where.remote(), blue.where.remote()]) == [red_node.node_id, blue_node.node_id]
    assert shoal.get(red.sizes.remote()) == [LARGE, LARGE]
    # In order, whatever the arguments: large ones, ones made elsewhere, ones that are not ready.
    made = [red.use.remote([blue], ("first", number)) for number in range(20)]
    assert shoal.get(made) == list(range(1, 21))
    mixed = [blue.add.remote(b"x" * LARGE), blue.add.remote(red.where.remote()), blue.add.remote(blob)]
    assert shoal.get(mixed) == [21, 22, 23]
    assert shoal.get(blue.all.remote())[:20] == [("first", number) for number in range(20)]
    assert len(shoal.get(blue.all.remote())[20]) == LARGE


def test_a_handle_on_another_node_keeps_the_actor(nodes: tuple[Cluster, Node, Node]) -> None:
    keeper = Box.options(resources={"red": 1}).remote()
    box = Box.options(resources={"blue": 1}).remote()
    shoal.get(keeper.keep.remote([box]))
    mine = box._actor_id
    shoal.get(box.add.remote(1))
    del box
    time.sleep(0.3)  # nothing to wait for: it must not happen
    assert mine in alive()
    shoal.kill(keeper)
    wait_until(lambda: mine not in alive(), "the actor to end with its last handle")
    wait_until(lambda: shoal.available_resources().get("blue") == 4.0, "its resources")


def test_an_actor_made_by_a_task_elsewhere(nodes: tuple[Cluster, Node, Node]) -> None:
    @shoal.remote(resources={"red": 1})
    def make() -> Any:
        box = Box.options(resources={"blue": 1}).remote(b"m" * LARGE)
        shoal.get(box.add.remote(b""))
        return box

    box = shoal.get(make.remote())
    assert shoal.get(box.sizes.remote()) == [LARGE, 0]


def test_the_end_of_a_node_ends_or_moves_its_actors(nodes: tuple[Cluster, Node, Node]) -> None:
    cluster, red_node, _ = nodes
    mortal = Box.options(resources={"red": 1}).remote()
    moves = Box.options(max_restarts=1, scheduling_strategy="SPREAD").remote(b"a" * LARGE)
    stays = Box.options(resources={"blue": 1}).remote()
    retried = Box.options(max_restarts=1, max_task_retries=1, resources={"red": 1}).remote()
    shoal.get([mortal.where.remote(), moves.where.remote(), stays.where.remote(), retried.where.remote()])
    cluster.remove_node(red_node, allow_graceful=False)
    with pytest.raises(ActorDiedError, match="died"):
        call_until_dead(mortal)
    assert shoal.get(stays.add.remote(1)) == 1
    waits = retried.add.remote("after the end")
    assert shoal.wait([waits], timeout=0.5)[0] == []  # no node has its resource any more
    cluster.add_node(num_cpus=1, resources={"red": 1})
    assert shoal.get(waits, timeout=20) == 1
    assert shoal.get(moves.sizes.remote(), timeout=20) == [LARGE]


def test_names_and_kills_reach_everywhere(nodes: tuple[Cluster, Node, Node]) -> None:
    @shoal.remote(resources={"blue": 1})
    def find_and_kill(name: str) -> str:
        box = shoal.get_actor(name)
        where: str = shoal.get(box.where.remote())
        shoal.kill(box)
        return where

    box = Box.options(name="known", resources={"red": 1}).remote()
    assert shoal.get(find_and_kill.remote("known")) == nodes[1].node_id
    with pytest.raises(ActorDiedError, match="killed"):
        shoal.get(box.where.remote())
