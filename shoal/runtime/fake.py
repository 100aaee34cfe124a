"""A runtime without a cluster, for tests of what sits above the interface.

It runs each task at once, in the calling thread, and keeps values as they are. It is as strict as a real one where the
API could get it wrong: top-level references are resolved and nested ones are not, errors come back as a `TaskError`
made fresh for each reader, and a name can be taken once.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from shoal.control.messages import ActorInfo, JobInfo, MetricRow, NodeInfo, StatusReply
from shoal.control.metrics import MetricTable
from shoal.exceptions import ActorAlreadyExistsError, ActorDiedError, ShoalError, TaskError
from shoal.node.messages import INLINE
from shoal.objects.ids import OBJECT_BYTES, TASK_BYTES, ActorId, JobId, NodeId, new_actor_id
from shoal.runtime.generators import DynamicObjectRefGenerator, ObjectRefGenerator
from shoal.runtime.interface import (
    ActorClient,
    ActorRules,
    ActorTemplate,
    ContextData,
    MethodTemplate,
    StreamOptions,
    TaskTemplate,
)
from shoal.runtime.object_ref import ObjectRef
from shoal.scheduling.resources import to_amounts

JOB: Final = JobId(b"\1\0\0\0")
NODE: Final = NodeId(b"n" * 28)


class FakeRef(ObjectRef[Any]):
    """A reference that nobody counts."""

    def __init__(self, object_id: bytes) -> None:
        self._id = self.object_id = object_id
        self.state = INLINE

    def binary(self) -> bytes:
        return self.object_id

    def hex(self) -> str:
        return self.object_id.hex()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FakeRef) and other.object_id == self.object_id

    def __hash__(self) -> int:
        return hash(self.object_id)

    def __repr__(self) -> str:
        return f"ObjectRef({self.hex()})"

    def __reduce__(self) -> Any:
        return FakeRef, (self.object_id,)

    def __del__(self) -> None:
        """Nothing to give back."""


class FakeStream:
    """All items of a generator, which has ended before anybody looked."""

    def __init__(self, refs: list[FakeRef], completed: FakeRef, end: FakeRef) -> None:
        self._left = [*reversed(refs)]
        self._end = end
        self.completed: ObjectRef[Any] = completed

    @property
    def head(self) -> ObjectRef[Any]:
        return self._left[-1] if self._left else self._end

    def next_item(self, timeout_s: float | None) -> ObjectRef[Any]:
        if not self._left:
            raise StopIteration
        return self._left.pop()

    def is_finished(self) -> bool:
        return not self._left

    async def when_ready(self) -> None:
        """All are."""

    def whole(self) -> ObjectRef[Any]:
        return self.completed

    def task_id(self) -> bytes:
        return self.completed.binary()[:TASK_BYTES]


class FakeActor:
    """An actor and, since there is one process, its one client."""

    rules = ActorRules()

    def __init__(self, runtime: FakeRuntime, template: ActorTemplate, actor_id: ActorId) -> None:
        self.runtime = runtime
        self.template = template
        self.actor_id: bytes = actor_id
        self.instance: Any = None
        self.failure: ShoalError | None = None
        self.calls: list[MethodTemplate] = []

    def location(self) -> tuple[bytes, bytes, bool]:
        return self.actor_id, NODE, False

    def set_rules(self, rules: ActorRules) -> None:
        self.rules = rules

    def call(self, method: MethodTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls.append(method)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self.failure is not None:
                raise self.failure
            if method.name == "__ray_ready__":
                return True
            if method.name == "__ray_call__":
                return args[0](self.instance, *args[1:], **kwargs)
            if method.name == "__ray_terminate__":
                self.failure = ActorDiedError("it was asked to end", self.actor_id.hex())
                return None
            with self.runtime.inside(ContextData(JOB, NODE, b"w", actor_id=self.actor_id, is_driver=False)):
                return getattr(self.instance, method.name)(*args, **kwargs)

        return self.runtime.run(run, method.label, method.num_returns, args, kwargs, method.stream)


class _Inside:
    def __init__(self, runtime: FakeRuntime, data: ContextData) -> None:
        self._runtime, self._data = runtime, data

    def __enter__(self) -> None:
        self._before, self._runtime.where = self._runtime.where, self._data

    def __exit__(self, *_: object) -> None:
        self._runtime.where = self._before


class FakeArrivals:
    """All but what is `pending` has arrived."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self._runtime = runtime
        self._refs: list[ObjectRef[Any]] = []

    def add(self, refs: Iterable[ObjectRef[Any]]) -> None:
        self._refs += refs

    def take(self, timeout_s: float | None = None) -> list[ObjectRef[Any]]:
        ready = [ref for ref in self._refs if ref.binary() not in self._runtime.pending]
        self._refs = [ref for ref in self._refs if ref not in ready]
        return ready

    def close(self) -> None:
        self._refs = []


class FakeRuntime:
    """See the module. Public attributes are there for tests to look at and to set."""

    def __init__(self) -> None:
        self.values: dict[bytes, Any] = {}
        self.actors: dict[bytes, FakeActor] = {}
        self.named: dict[tuple[str, str], FakeActor] = {}
        self.submitted: list[TaskTemplate] = []
        self.cancelled: list[tuple[ObjectRef[Any], bool, bool]] = []
        self.pending: set[bytes] = set()  # ids that `wait` and `get` take for not ready
        self.metrics = MetricTable(100)
        self.progress: list[str] = []
        self.collect: Callable[[], list[MetricRow]] = list
        self.keys: dict[tuple[str, bytes], bytes] = {}
        self.is_shut_down = False
        self.where = ContextData(JOB, NODE, b"d", namespace="space", node_ip="127.0.0.1", control_address="127.0.0.1:1")
        self.nodes = [
            NodeInfo(NODE, "127.0.0.1:1", "h", to_amounts({"CPU": 2}), to_amounts({"CPU": 1}), is_head=True),
            NodeInfo(b"m" * 28, "[::1]:2", "i", to_amounts({"CPU": 4, "GPU": 1}), to_amounts({"CPU": 4})),
            NodeInfo(b"o" * 28, "127.0.0.1:3", "j", to_amounts({"CPU": 8}), {}, alive=False, death_reason="gone"),
        ]
        self._counter = itertools.count()

    @property
    def job(self) -> JobInfo:
        return JobInfo(JOB, self.where.namespace, b"d", NODE)

    def inside(self, data: ContextData) -> _Inside:
        """Make `context()` answer `data` within a `with` statement."""
        return _Inside(self, data)

    def submit_task(self, template: TaskTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.submitted.append(template)
        return self.run(template.function, template.name, template.num_returns, args, kwargs, template.stream)

    def run(
        self,
        function: Any,
        label: str,
        num_returns: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        stream: StreamOptions | None = None,
    ) -> FakeRef | list[FakeRef] | ObjectRefGenerator[Any] | None:
        """Run one call now; its result or error goes into as many references as it returns."""
        if stream is not None:
            return self._run_stream(function, label, args, kwargs, stream)
        refs = [self._new_ref() for _ in range(num_returns)]
        try:
            args = tuple(self._resolve(arg) for arg in args)
            kwargs = {name: self._resolve(arg) for name, arg in kwargs.items()}
            result = function(*args, **kwargs)
            if inspect.iscoroutine(result):
                result = asyncio.run(result)
            results = [result] if num_returns == 1 else list(result or ())
            if len(results) != num_returns:
                raise ValueError(f"{label} returned {len(results)} values, and num_returns is {num_returns}")
        except ShoalError as passed_on:
            results = [passed_on] * num_returns  # an argument's error passes through as it is
        except Exception as exc:  # noqa: BLE001 - the user's code may raise anything
            error = TaskError.from_exception(exc, function_name=label, pid=1, ip="127.0.0.1", node_id=NODE.hex())
            results = [error] * num_returns
        for ref, value in zip(refs, results, strict=True):
            self.values[ref.object_id] = value
        return None if num_returns == 0 else refs[0] if num_returns == 1 else refs

    def _run_stream(
        self, function: Any, label: str, args: tuple[Any, ...], kwargs: dict[str, Any], stream: StreamOptions
    ) -> FakeRef | ObjectRefGenerator[Any]:
        refs = []
        try:
            for value in function(
                *map(self._resolve, args), **{key: self._resolve(one) for key, one in kwargs.items()}
            ):
                refs.append(self._new_ref())
                self.values[refs[-1].object_id] = value
        except Exception as exc:  # noqa: BLE001 - the user's code may raise anything
            error = TaskError.from_exception(exc, function_name=label, pid=1, ip="127.0.0.1", node_id=NODE.hex())
            refs.append(self._new_ref())
            self.values[refs[-1].object_id] = error
        whole = self._new_ref()
        self.values[whole.object_id] = DynamicObjectRefGenerator(list(refs)) if stream.dynamic else None
        return whole if stream.dynamic else ObjectRefGenerator(FakeStream(refs, whole, self._new_ref()))

    def _new_ref(self) -> FakeRef:
        return FakeRef(next(self._counter).to_bytes(OBJECT_BYTES, "little"))

    def _resolve(self, arg: Any) -> Any:
        return self.get([arg], None)[0] if isinstance(arg, ObjectRef) else arg

    def create_actor(
        self, template: ActorTemplate, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[ActorClient, bytes]:
        key = (template.namespace or self.where.namespace, template.name or "")
        if template.name and key in self.named:
            if not template.get_if_exists:
                raise ActorAlreadyExistsError(f"the name {template.name!r} is taken in namespace {key[0]!r}")
            found = self.named[key]
            return found, found.template.handle
        actor = FakeActor(self, template, new_actor_id(JOB))
        self.actors[actor.actor_id] = actor
        if template.name:
            self.named[key] = actor
        try:
            actor.instance = template.cls(*map(self._resolve, args), **kwargs)
        except Exception as exc:  # noqa: BLE001 - the user's code may raise anything
            cause = TaskError.from_exception(exc, function_name="__init__", pid=1, ip="", node_id=NODE.hex())
            actor.failure = ActorDiedError("its constructor raised", actor.actor_id.hex(), False, True, cause)
        return actor, template.handle

    def borrow_actor(self, actor_id: bytes, home: bytes, weak: bool = False) -> ActorClient:
        return self.actors[actor_id]

    def find_actor(self, name: str, namespace: str | None) -> ActorInfo:
        actor = self.named.get((namespace or self.where.namespace, name))
        if actor is None:
            raise ValueError(f"there is no actor named {name!r}")
        return self._info(actor)

    def _info(self, actor: FakeActor) -> ActorInfo:
        template = actor.template
        space = template.namespace or self.where.namespace
        state = "dead" if actor.failure else "alive"
        return ActorInfo(
            actor.actor_id, state, name=template.name or "", namespace=space, handle=template.handle, node_id=NODE
        )

    def list_actors(self, *, named_only: bool, namespace: str) -> list[ActorInfo]:
        infos = [self._info(actor) for actor in self.actors.values()]
        if named_only:
            infos = [info for info in infos if info.name and info.state != "dead"]
        return [info for info in infos if not namespace or info.namespace == namespace]

    def kill_actor(self, actor_id: bytes, *, no_restart: bool) -> None:
        self.actors[actor_id].failure = ActorDiedError("it was killed", actor_id.hex())

    def cancel(self, ref: ObjectRef[Any], *, force: bool, recursive: bool) -> None:
        self.cancelled.append((ref, force, recursive))

    def put(self, value: Any) -> ObjectRef[Any]:
        ref = self._new_ref()
        self.values[ref.object_id] = value
        return ref

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_s: float | None) -> list[Any]:
        values = [self.values[ref.binary()] for ref in refs]
        for value in values:
            if isinstance(value, TaskError):
                raise value.as_raisable()
            if isinstance(value, ShoalError):
                raise value
        return values

    def wait(
        self, refs: Sequence[ObjectRef[Any]], num_returns: int, timeout_s: float | None, fetch_local: bool
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        ready = [ref for ref in refs if ref.binary() not in self.pending][:num_returns]
        return ready, [ref for ref in refs if ref not in ready]

    def arrivals(self) -> FakeArrivals:
        return FakeArrivals(self)

    def status(self) -> StatusReply:
        return StatusReply(nodes=self.nodes)

    def context(self) -> ContextData:
        return self.where

    def show_progress(self, line: str) -> None:
        self.progress.append(line)

    def report_later(self, delay_s: float, collect: Callable[[], list[MetricRow]]) -> None:
        self.collect = collect

    def list_metrics(self) -> list[MetricRow]:
        self.metrics.report(0, b"me", self.collect())
        return self.metrics.rows()

    def kv_put(self, space: str, key: bytes, value: bytes, *, overwrite: bool) -> bool:
        existed = (space, key) in self.keys
        if overwrite or not existed:
            self.keys[space, key] = value
        return existed

    def kv_get(self, space: str, key: bytes) -> bytes | None:
        return self.keys.get((space, key))

    def kv_delete(self, space: str, key: bytes, *, by_prefix: bool) -> int:
        gone = [
            one for one in self.keys if one[0] == space and (one[1].startswith(key) if by_prefix else one[1] == key)
        ]
        for one in gone:
            del self.keys[one]
        return len(gone)

    def kv_list(self, space: str, prefix: bytes) -> list[bytes]:
        return sorted(key for one, key in self.keys if one == space and key.startswith(prefix))

    def exit_actor(self) -> None:
        actor = self.actors[self.where.actor_id]
        actor.failure = ActorDiedError("it ended itself", actor.actor_id.hex())
        raise actor.failure

    def forget_in_child(self) -> None:
        """Nothing is shared."""

    def shutdown(self) -> None:
        self.is_shut_down = True
