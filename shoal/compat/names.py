"""Which part of shoal stands behind which part of Ray.

A module of Ray is a *view*: it shows the public names of one module of shoal, and besides those a few by other names.
`ray.util.x` and `ray.experimental.x` that are not listed are views of `shoal.util.x` and `shoal.experimental.x` where
those exist, so a helper that is added there needs no line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

RAY_VERSION: Final = "2.60.0"
"""The version whose API shoal follows; libraries compare it with what they need."""

TABLE_URL: Final = "docs/compatibility.md"


@dataclass(frozen=True, slots=True)
class View:
    """A module of Ray.

    Attributes:
        source: the module of shoal whose public names it has; "" for none.
        names: further names, each with "module" or "module:attribute" of what it stands for.
        constants: further names and their values.
        shadowed: functions that have the name of a submodule: `ray.util.placement_group` is the function even after
            `import ray.util.placement_group`.
        package: whether it may have submodules.
        absent: names that a library imports without always using them; calling one raises NotImplementedError.
    """

    source: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    shadowed: tuple[str, ...] = ()
    package: bool = False
    absent: tuple[str, ...] = ()


VIEWS: Final[Mapping[str, View]] = {
    "ray": View(
        "shoal",
        {
            "ObjectID": "shoal.runtime.object_ref:ObjectRef",
            "init": "shoal.compat.settings:init",
        },
        {"__version__": RAY_VERSION, "__commit__": "", "SCRIPT_MODE": 0, "WORKER_MODE": 1},
        package=True,
    ),
    "ray._private": View(package=True),
    "ray._private.services": View("", {"get_node_ip_address": "shoal.util:get_node_ip_address"}),  # for Modin
    "ray.actor": View("shoal.api.actor"),
    "ray.cluster_utils": View("shoal.cluster_utils"),
    "ray.data": View(absent=("from_pandas_refs",)),  # imported by Modin's Ray engine
    "ray.exceptions": View("shoal.exceptions"),
    "ray.experimental": View("shoal.experimental", package=True),
    "ray.experimental.tqdm_ray": View("shoal.util.progress"),
    "ray.remote_function": View("shoal.api.remote_function"),
    "ray.runtime_context": View("shoal.api.context"),
    "ray.types": View("", {"ObjectRef": "shoal.runtime.object_ref:ObjectRef"}),
    "ray.util": View("shoal.util", shadowed=("placement_group",), package=True),
    "ray.util.dask": View(
        "shoal.util.dask",
        {
            "ray_dask_get": "shoal.util.dask:shoal_dask_get",
            "enable_dask_on_ray": "shoal.util.dask:enable_dask_on_shoal",
            "disable_dask_on_ray": "shoal.util.dask:disable_dask_on_shoal",
        },
    ),
    "ray.util.joblib": View("shoal.util.joblib", {"register_ray": "shoal.util.joblib:register_shoal"}),
}

OPEN_PACKAGES: Final = ("ray.util.", "ray.experimental.")
"""Below these a module of the same name in shoal is shown without being listed."""


def find_view(name: str) -> View | None:
    """What stands behind the module `name` of Ray; whether its source exists is for the caller to see."""
    view = VIEWS.get(name)
    if view is None and name.startswith(OPEN_PACKAGES):
        return View("shoal" + name.removeprefix("ray"), package=True)
    return view


def missing(name: str) -> str:
    """The text of an error about the name `name` of Ray, which shoal does not have."""
    return f"shoal has no {name}: {TABLE_URL} lists what there is of Ray's API, and what is not there yet"
