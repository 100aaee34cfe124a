"""Where this code runs: `get_runtime_context()` and `get_gpu_ids()`."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.api.actor import ActorHandle, ClassInfo
from shoal.api.initialize import connect_if_needed
from shoal.scheduling.resources import to_floats

if TYPE_CHECKING:
    from shoal.runtime.interface import ContextData, Runtime

T = TypeVar("T")


class RuntimeContext:
    """The place of the calling code, asked anew at each call: an actor's threads and coroutines each see their own."""

    __slots__ = ("_runtime",)

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    @property
    def _data(self) -> ContextData:
        return self._runtime.context()

    def get_job_id(self) -> str:
        """Hex."""
        return self._data.job_id.hex()

    def get_node_id(self) -> str:
        """Hex."""
        return self._data.node_id.hex()

    def get_worker_id(self) -> str:
        """Hex."""
        return self._data.worker_id.hex()

    def get_task_id(self) -> str | None:
        """Hex; None in a driver."""
        return self._data.task_id.hex() or None

    def get_task_name(self) -> str | None:
        """The task's `name` option, else its function's name; None in a driver."""
        return self._data.task_name or None

    def get_task_function_name(self) -> str | None:
        """None in a driver."""
        return self._data.function_name or None

    def get_actor_id(self) -> str | None:
        """Hex; None outside of an actor."""
        return self._data.actor_id.hex() or None

    def get_actor_name(self) -> str | None:
        """None outside of an actor; "" in one without a name."""
        data = self._data
        return data.actor_name if data.actor_id else None

    def get_placement_group_id(self) -> str | None:
        """Hex; None outside of one."""
        return self._data.group.hex() or None

    def get_assigned_resources(self) -> dict[str, float]:
        """What the current task or actor holds; empty in a driver."""
        return to_floats(self._data.assigned)

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Kind -> devices that the current task or actor may use."""
        found: dict[str, list[str]] = {"GPU": []}
        for kind, ids in self._data.devices.items():
            found[kind] = [str(number) for number in ids]
        return found

    def get_node_labels(self) -> dict[str, str]:
        return dict(self._data.node_labels)

    def get_runtime_env_string(self) -> str:
        """JSON."""
        import json

        return json.dumps(self.runtime_env)

    def get_session_name(self) -> str:
        return os.path.basename(self._data.session_dir)

    def get_temp_dir(self) -> str:
        return os.path.dirname(self._data.session_dir)

    @property
    def runtime_env(self) -> dict[str, Any]:
        """Of the current task, actor or job."""
        env_vars = dict(self._data.env_vars)
        return {"env_vars": env_vars} if env_vars else {}

    @property
    def namespace(self) -> str:
        return self._data.namespace

    @property
    def gcs_address(self) -> str:
        """HOST:PORT of the head."""
        return self._data.control_address

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether the current actor was restarted.

        Raises:
            RuntimeError: not called inside an actor.
        """
        data = self._data
        if not data.actor_id:
            raise RuntimeError("was_current_actor_reconstructed exists only inside an actor")
        return data.restarts > 0

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        """Whether tasks and actors that are made here, and given no strategy, run in the placement group too."""
        return self._data.captures

    @property
    def current_actor(self) -> ActorHandle[Any]:
        """A handle to the actor that this code runs in. It does not keep the actor alive.

        Raises:
            RuntimeError: not called inside an actor.
        """
        data = self._data
        if not data.actor_id:
            raise RuntimeError("current_actor exists only inside an actor")
        client = self._runtime.borrow_actor(data.actor_id, b"", weak=True)
        return ActorHandle(client, ClassInfo.unpack(data.actor_handle))

    def is_canceled(self) -> bool:
        """Whether the current task or method was cancelled, or its `timeout_s` is over: then it should return soon.

        Raises:
            RuntimeError: not called inside a task or a method, or in an async actor, where `asyncio.CancelledError`
                says so.
        """
        data = self._data
        if data.is_driver:
            raise RuntimeError("is_canceled() works only inside a task or a method of an actor")
        if data.is_cancelled is None:
            raise RuntimeError("is_canceled() does not work in an async actor; a cancelled call gets CancelledError")
        return data.is_cancelled

    def get(self) -> dict[str, str]:
        """The ids of this place as one dict, without those that it does not have."""
        data = self._data
        ids = {"job_id": data.job_id, "node_id": data.node_id, "worker_id": data.worker_id}
        ids |= {"task_id": data.task_id, "actor_id": data.actor_id}
        return {name: value.hex() for name, value in ids.items() if value} | {"namespace": data.namespace}

    # What Ray has kept of its first names. Its ids are objects there and bytes here: `.hex()` works on both.

    @property
    def job_id(self) -> bytes:
        return _deprecated("job_id", self._data.job_id)

    @property
    def node_id(self) -> bytes:
        return _deprecated("node_id", self._data.node_id)

    @property
    def worker_id(self) -> bytes:
        return _deprecated("worker_id", self._data.worker_id)

    @property
    def task_id(self) -> bytes | None:
        return _deprecated("task_id", self._data.task_id or None)

    @property
    def actor_id(self) -> bytes | None:
        return _deprecated("actor_id", self._data.actor_id or None)

    def get_resource_ids(self) -> dict[str, list[str]]:
        return _deprecated("resource_ids", self.get_accelerator_ids(), "get_accelerator_ids()")


def _deprecated(name: str, value: T, instead: str = "") -> T:
    warnings.warn(f"use {instead or f'get_{name}()'}, which gives text", DeprecationWarning, stacklevel=3)
    return value


def get_runtime_context() -> RuntimeContext:
    """Where the calling code runs: ids, node, resources. Connects if needed."""
    return RuntimeContext(connect_if_needed())


def get_gpu_ids() -> list[int | str]:
    """The GPUs that the current task or actor may use, by number, or by the name that CUDA_VISIBLE_DEVICES has for them
    on this node; [] in a driver. Connects if needed."""
    return list(connect_if_needed().context().devices.get("GPU", ()))
