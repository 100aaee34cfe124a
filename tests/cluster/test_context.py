"""Where code finds itself: the runtime context in drivers, tasks, actors and their threads; nodes and devices."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import shoal
from shoal.api.initialize import ClusterContext
from shoal.cluster_utils import Cluster


def describe() -> dict[str, Any]:
    context = shoal.get_runtime_context()
    return {
        "job": context.get_job_id(), "node": context.get_node_id(), "worker": context.get_worker_id(),
        "task": context.get_task_id(), "name": context.get_task_name(), "function": context.get_task_function_name(),
        "actor": context.get_actor_id(), "actor_name": context.get_actor_name(), "namespace": context.namespace,
        "resources": context.get_assigned_resources(), "accelerators": context.get_accelerator_ids(),
        "labels": context.get_node_labels(), "env": context.runtime_env, "env_text": context.get_runtime_env_string(),
        "session": context.get_session_name(), "temp": context.get_temp_dir(), "head": context.gcs_address,
        "group": context.get_placement_group_id(), "gpus": shoal.get_gpu_ids(),
    }  # fmt: skip


def in_a_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


@shoal.remote(name="looker", resources={"special": 1}, runtime_env={"env_vars": {"LOOK": "here"}})
def look() -> tuple[dict[str, Any], dict[str, Any]]:
    return describe(), in_a_thread(describe)


@shoal.remote(resources={"special": 0.5})
class Looker:
    def look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return describe(), in_a_thread(describe)

    def restarted(self) -> bool:
        return shoal.get_runtime_context().was_current_actor_reconstructed

    def crash(self) -> None:
        os._exit(1)


def test_of_a_driver(local: ClusterContext) -> None:
    here = describe()
    assert here["node"] == local["node_id"]
    assert here["task"] is here["name"] is here["actor"] is here["actor_name"] is here["group"] is None
    assert here["resources"] == {}
    assert here["head"] == local["address"]
    assert os.path.join(here["temp"], here["session"]) == local["session_dir"]
    with pytest.raises(RuntimeError):
        _ = shoal.get_runtime_context().was_current_actor_reconstructed


def test_of_a_task_and_its_threads(local: ClusterContext) -> None:
    driver = describe()
    ref = look.remote()
    here, thread = shoal.get(ref)
    assert here == thread
    assert here["task"] == ref.task_id().hex()
    assert here["name"] == "looker"
    assert here["function"].endswith("look")
    assert here["resources"] == {"CPU": 1.0, "special": 1.0}
    assert here["env"] == {"env_vars": {"LOOK": "here"}}
    assert here["actor"] is None
    for same in ("job", "node", "namespace", "session", "temp", "head", "labels"):
        assert here[same] == driver[same], same
    assert here["worker"] != driver["worker"]


def test_of_an_actor_its_threads_and_its_second_life(local: ClusterContext) -> None:
    actor = Looker.options(name="looker", max_restarts=1, max_task_retries=1).remote()
    here, thread = shoal.get(actor.look.remote())
    assert here == thread
    assert here["actor"] == actor._actor_id.hex()
    assert here["actor_name"] == "looker"
    assert here["name"] == "Looker.look"
    assert here["resources"] == {"CPU": 1.0, "special": 0.5}
    assert not shoal.get(actor.restarted.remote())
    with pytest.raises(shoal.exceptions.ActorUnavailableError):
        shoal.get(actor.crash.options(max_task_retries=0).remote())
    assert shoal.get(actor.restarted.remote())


def test_the_old_names_work_and_are_deprecated(local: ClusterContext) -> None:
    context = shoal.get_runtime_context()
    with pytest.warns(DeprecationWarning, match="get_job_id"):
        assert context.job_id.hex() == context.get_job_id()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert context.node_id.hex() == context.get_node_id()
        assert context.task_id is context.actor_id is None
        assert context.get_resource_ids() == {"GPU": []}


def test_nodes_dead_ones_included(make_cluster: Callable[..., Cluster]) -> None:
    shoal.shutdown()
    cluster = make_cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 2})
    far = cluster.add_node(num_cpus=2, resources={"far": 1}, labels={"zone": "b"})
    cluster.connect()
    keys = {
        "NodeID", "Alive", "alive", "NodeManagerAddress", "NodeManagerHostname", "NodeManagerPort", "ObjectManagerPort",
        "ObjectStoreSocketName", "RayletSocketName", "MetricsExportPort", "NodeName", "RuntimeEnvAgentPort",
        "DeathReason", "DeathReasonMessage", "Resources", "Labels",
    }  # fmt: skip
    rows = {row["NodeID"]: row for row in shoal.nodes()}
    assert all(keys <= row.keys() for row in rows.values())
    assert rows[far.node_id]["Labels"]["zone"] == "b"
    assert shoal.cluster_resources()["CPU"] == 3
    assert shoal.cluster_resources()["node:__internal_head__"] == 1
    assert shoal.cluster_resources()["node:127.0.0.1"] == 2  # both are on this address

    @shoal.remote(num_cpus=0, resources={"far": 1})
    def there() -> dict[str, Any]:
        return describe()

    @shoal.remote(num_cpus=0, num_gpus=1)
    def with_gpu() -> tuple[Any, Any, Any]:
        context = shoal.get_runtime_context()
        return shoal.get_gpu_ids(), context.get_accelerator_ids(), os.environ["CUDA_VISIBLE_DEVICES"]

    found = shoal.get(there.remote())
    assert found["labels"]["zone"] == "b"
    assert found["head"] == cluster.address
    ids, accelerators, visible = shoal.get(with_gpu.remote())
    assert accelerators == {"GPU": [visible]}
    assert [str(number) for number in ids] == [visible]

    cluster.remove_node(far)
    cluster.wait_for_nodes()
    (dead,) = [row for row in shoal.nodes() if not row["Alive"]]
    assert dead["NodeID"] == far.node_id
    assert dead["Resources"] == {}
    assert dead["DeathReasonMessage"]
    assert shoal.cluster_resources()["CPU"] == 1
    assert "far" not in shoal.available_resources()
