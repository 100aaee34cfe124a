"""`timeline()`: what really ran, on which worker of which node, and in which phases."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shoal
from shoal.api.initialize import ClusterContext
from shoal.cluster_utils import Cluster
from shoal.exceptions import ShoalSystemError


def calls(name: str) -> list[dict[str, Any]]:
    return [event for event in shoal.timeline() if event.get("cat") == "task" and event["name"].endswith(name)]


def phases_of(call: dict[str, Any]) -> dict[str, dict[str, Any]]:
    task_id = call["args"]["task_id"]
    same = [e for e in shoal.timeline() if e["ph"] == "X" and e["cat"] != "task" and e["args"]["task_id"] == task_id]
    return {event["name"]: event for event in same}


def test_tasks_with_their_phases(local: ClusterContext, tmp_path: Path) -> None:
    @shoal.remote(name="nap")
    def nap(array: bytes) -> tuple[int, bytes]:
        threading.Event().wait(0.05)
        return os.getpid(), array

    @shoal.remote
    def broken() -> None:
        raise ValueError("on purpose")

    large = shoal.put(bytes(1 << 20))
    pid, _ = shoal.get(nap.remote(large))
    with pytest.raises(ValueError, match="on purpose"):
        shoal.get(broken.remote())
    (call,) = calls("nap")
    assert call["tid"] // 1000 == pid
    assert call["dur"] >= 50_000
    phases = phases_of(call)
    assert set(phases) == {
        "task:fetch_arguments", "task:deserialize_arguments", "task:execute", "task:store_outputs",
    }  # fmt: skip
    assert phases["task:execute"]["dur"] >= 50_000
    assert phases["task:fetch_arguments"]["ts"] <= call["ts"]
    inside = [phases[f"task:{name}"] for name in ("deserialize_arguments", "execute", "store_outputs")]
    assert inside[0]["ts"] == call["ts"]
    assert inside[-1]["ts"] + inside[-1]["dur"] == call["ts"] + call["dur"]
    (failed,) = [e for e in shoal.timeline() if e.get("cat") == "task" and e["args"]["failed"]]
    assert failed["args"]["function"].endswith("broken")

    assert shoal.timeline(tmp_path / "trace.json") is None
    assert json.loads((tmp_path / "trace.json").read_text()) == shoal.timeline()


def test_methods_of_actors_of_every_kind(local: ClusterContext) -> None:
    @shoal.remote
    class Plain:
        def work(self) -> None:
            pass

    @shoal.remote
    class Async:
        def __init__(self) -> None:
            self.entered = 0
            self.all_in = asyncio.Event()

        async def meet(self, number: int) -> None:
            self.entered += 1
            if self.entered == number:
                self.all_in.set()
            await self.all_in.wait()

    plain, waiting = Plain.remote(), Async.remote()
    shoal.get([plain.work.remote() for _ in range(3)])
    shoal.get([waiting.meet.remote(4) for _ in range(4)])
    assert len(calls("Plain.work")) == 3
    assert len({call["tid"] for call in calls("Async.meet")}) == 4  # they ran at the same time


def test_workers_that_left_have_said_what_they_ran(local: ClusterContext) -> None:
    @shoal.remote(max_calls=1)
    def once() -> None:
        pass

    @shoal.remote
    class Leaver:
        def leave(self) -> None:
            shoal.actor.exit_actor()

    shoal.get([once.remote() for _ in range(3)])
    actor = Leaver.remote()
    with pytest.raises(shoal.exceptions.ActorDiedError):
        shoal.get(actor.leave.remote())
    assert len(calls("once")) == 3
    assert len(calls("Leaver.leave")) == 1


def test_a_busy_process_does_not_hold_the_timeline_up(local: ClusterContext) -> None:
    @shoal.remote
    def blocked(path: str) -> None:
        with open(path) as pipe:  # without the GIL
            pipe.read()

    path = f"{local['session_dir']}/gate"
    os.mkfifo(path)
    ref = blocked.remote(path)
    with open(path, "w") as gate:
        assert calls("blocked") == []  # not over yet
        gate.write("go")
    shoal.get(ref)
    assert len(calls("blocked")) == 1


def test_all_nodes_are_in_it(make_cluster: Callable[..., Cluster]) -> None:
    shoal.shutdown()
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1, resources={"far": 1})
    cluster.connect()

    @shoal.remote
    def where() -> str:
        return shoal.get_runtime_context().get_node_id()

    there = where.options(resources={"far": 1})
    nodes = set(shoal.get([where.remote() for _ in range(3)] + [there.remote() for _ in range(3)]))
    assert len(nodes) == 2
    assert {call["args"]["node_id"] for call in calls("where")} == nodes


def test_without_a_cluster_and_with_wrong_names() -> None:
    shoal.shutdown()
    with pytest.raises(ShoalSystemError):
        shoal.timeline()
    with pytest.raises(TypeError, match="name of a file"):
        shoal.timeline(7)  # type: ignore[call-overload]
