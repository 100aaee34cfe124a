"""A cluster runtime for Python: tasks, actors and shared objects, on a laptop or on many machines.

    import shoal

    @shoal.remote
    def square(x: int) -> int:
        return x * x

    print(shoal.get([square.remote(i) for i in range(4)]))

This module only re-exports; `shoal.api` is where it happens. The names are Ray's: `import shoal as ray` works.

A name is imported when it is first used. Every process of a cluster imports `shoal.something` and with it this module,
and those that run no user code should not load, or depend on, the API that sits on top of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.version import __version__

if TYPE_CHECKING:
    from shoal import exceptions, util
    from shoal.api import actor
    from shoal.api.actor import ActorClass, ActorHandle, method, typed
    from shoal.api.calls import cancel, get, get_actor, kill, put, wait
    from shoal.api.cluster import available_resources, cluster_resources, nodes, timeline
    from shoal.api.context import get_gpu_ids, get_runtime_context
    from shoal.api.decorator import remote
    from shoal.api.initialize import init, is_initialized, shutdown
    from shoal.runtime.generators import DynamicObjectRefGenerator, ObjectRefGenerator
    from shoal.runtime.job_logging import LoggingConfig
    from shoal.runtime.object_ref import ObjectRef

__all__ = [
    "ActorClass",
    "ActorHandle",
    "DynamicObjectRefGenerator",
    "LoggingConfig",
    "ObjectRef",
    "ObjectRefGenerator",
    "__version__",
    "actor",
    "available_resources",
    "cancel",
    "cluster_resources",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "shutdown",
    "timeline",
    "typed",
    "util",
    "wait",
]

_HOMES = {
    "ActorClass": "api.actor",
    "ActorHandle": "api.actor",
    "DynamicObjectRefGenerator": "runtime.generators",
    "LoggingConfig": "runtime.job_logging",
    "ObjectRef": "runtime.object_ref",
    "ObjectRefGenerator": "runtime.generators",
    "actor": "api.actor:",
    "available_resources": "api.cluster",
    "cancel": "api.calls",
    "cluster_resources": "api.cluster",
    "exceptions": "exceptions:",
    "get": "api.calls",
    "get_actor": "api.calls",
    "get_gpu_ids": "api.context",
    "get_runtime_context": "api.context",
    "init": "api.initialize",
    "is_initialized": "api.initialize",
    "kill": "api.calls",
    "method": "api.actor",
    "nodes": "api.cluster",
    "put": "api.calls",
    "remote": "api.decorator",
    "shutdown": "api.initialize",
    "timeline": "api.cluster",
    "typed": "api.actor",
    "util": "util:",
    "wait": "api.calls",
}  # name -> module that has it; with a colon, the module itself is meant


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    from importlib import import_module

    module = import_module("shoal." + home.rstrip(":"))
    value: object = module if home.endswith(":") else getattr(module, name)
    globals()[name] = value  # the next use is an ordinary look-up
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
