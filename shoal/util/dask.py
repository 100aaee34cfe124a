"""A Dask scheduler: each task of a Dask graph is a task of the cluster.

    from shoal.util.dask import enable_dask_on_shoal
    with enable_dask_on_shoal():
        x.sum().compute()

The whole graph is submitted at once, in Dask's own order, with references for dependencies: the cluster starts what is
ready, keeps what is large in shared memory, and drops what nobody needs any more. Dask optimizes a graph before it asks
a scheduler; on top of that, chains of which no middle part is wanted become one task.

Options of tasks are given as an annotation: `with dask.annotate(shoal_remote_args={"num_gpus": 1}): ...`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import dask
from dask._task_spec import Alias, DataNode, convert_legacy_graph, cull, fuse_linear_task_spec
from dask.callbacks import local_callbacks, unpack_callbacks
from dask.core import flatten
from dask.order import order
from dask.utils import key_split

from shoal.api.calls import cancel, get, put
from shoal.api.remote_function import RemoteFunction
from shoal.api.words import not_supported
from shoal.runtime.object_ref import ObjectRef
from shoal.util.iteration import as_completed

Key = Hashable
ANNOTATIONS = ("shoal_remote_args", "ray_remote_args")
_SETTINGS = ("scheduler", "dataframe.shuffle.method")


def shoal_dask_get(dsk: Any, keys: Any, **options: Any) -> Any:
    """The values of `keys`, nested as they are: for `dask.config.set(scheduler=...)` and `compute(scheduler=...)`.

    Args:
        dsk: a graph, or an expression that has one.
        options: of other schedulers (num_workers, pool, ...), which mean nothing here.
    Raises: what a task raised; the others are cancelled then.
    """
    if options.get("ray_persist"):
        raise not_supported("ray_persist=True", "persist() brings the results to this process, as with threads")
    wanted = set(flatten([keys] if not isinstance(keys, list) else keys))
    remote_args = dict(_annotations(dsk))
    nodes = convert_legacy_graph(dict(dsk.__dask_graph__() if hasattr(dsk, "__dask_graph__") else dsk))
    nodes = cull(nodes, wanted)
    if not remote_args:
        nodes = fuse_linear_task_spec(nodes, wanted)
    with local_callbacks(options.get("callbacks")) as callbacks:
        watchers = _Watchers(callbacks, nodes)
        refs = _submit(nodes, remote_args)
        failed = True
        try:
            watchers.follow(refs)
            results = dict(zip(wanted, get([refs[key] for key in wanted]), strict=True))
            failed = False
        finally:
            if failed:
                for ref in refs.values():
                    cancel(ref)
            watchers.finish(failed)
    return _arrange(keys, results)


ray_dask_get = shoal_dask_get


def enable_dask_on_shoal(shuffle: str | None = "tasks") -> Any:
    """Make this scheduler Dask's default, from now on or within a `with` statement.

    Args:
        shuffle: how dataframes are shuffled; by tasks, since workers on several machines share no disk.
    """
    return dask.config.set(dict(zip(_SETTINGS, (shoal_dask_get, shuffle), strict=True)))


def disable_dask_on_shoal() -> Any:
    """Give Dask its own defaults back."""
    return dask.config.set(dict.fromkeys(_SETTINGS))


enable_dask_on_ray = enable_dask_on_shoal
disable_dask_on_ray = disable_dask_on_shoal


def _submit(nodes: Mapping[Key, Any], remote_args: Mapping[Key, Mapping[str, Any]]) -> dict[Key, ObjectRef[Any]]:
    refs: dict[Key, ObjectRef[Any]] = {}
    functions: dict[Any, RemoteFunction[..., Any]] = {}
    ranks = order(nodes)
    for key in sorted(nodes, key=ranks.__getitem__):
        node = nodes[key]
        dependencies = list(node.dependencies)
        if isinstance(node, DataNode):
            refs[key] = put(node({}))
        elif isinstance(node, Alias):
            refs[key] = refs[dependencies[0]]
        else:
            asked = remote_args.get(key, {})
            kind = (key_split(key), repr(sorted(asked.items())))
            function = functions.get(kind)
            if function is None:
                function = functions[kind] = RemoteFunction(_run, {"name": f"dask:{kind[0]}", **asked})
            refs[key] = function.remote(node, dependencies, *(refs[one] for one in dependencies))
    return refs


def _run(node: Any, dependencies: Sequence[Key], *values: Any) -> Any:
    return node(dict(zip(dependencies, values, strict=True)))


def _annotations(dsk: Any) -> Iterator[tuple[Key, Mapping[str, Any]]]:
    found = dsk.__dask_annotations__() if hasattr(dsk, "__dask_annotations__") else {}
    for name in ANNOTATIONS:
        yield from found.get(name, {}).items()


def _arrange(keys: Any, results: Mapping[Key, Any]) -> Any:
    return tuple(_arrange(key, results) for key in keys) if isinstance(keys, list) else results[keys]


class _Watchers:
    """Dask's callbacks (progress bars, profilers), told of each task that has ended, with a reference."""

    def __init__(self, callbacks: Any, nodes: Mapping[Key, Any]) -> None:
        start, start_state, self._before, self._after, self._finish = unpack_callbacks(callbacks or ())
        self._nodes = nodes
        self._state: dict[str, Any] = {
            "dependencies": {key: set(node.dependencies) for key, node in nodes.items()},
            "ready": [],
            "running": set(),
            "waiting": dict.fromkeys(nodes),
            "finished": set(),
            "released": set(),
            "cache": {},
        }
        for call in start:
            call(nodes)
        for call in start_state:
            call(nodes, self._state)

    def follow(self, refs: Mapping[Key, ObjectRef[Any]]) -> None:
        """Until all have ended; at once when nobody listens."""
        if not (self._before or self._after or self._finish):
            return
        by_ref: dict[ObjectRef[Any], list[Key]] = {}
        for key, ref in refs.items():
            by_ref.setdefault(ref, []).append(key)
        for key in refs:
            for call in self._before:
                call(key, self._nodes, self._state)
        for ref in as_completed(list(by_ref), yield_obj_refs=True):
            for key in by_ref[ref]:
                del self._state["waiting"][key]
                self._state["finished"].add(key)
                for call in self._after:
                    call(key, ref, self._nodes, self._state, "shoal")

    def finish(self, failed: bool) -> None:
        for call in self._finish:
            call(self._nodes, self._state, failed)
