"""The import hook: `import ray`, and every module below it, gives a view of what shoal has.

A view is a plain module whose names are looked up when they are first used (PEP 562), so that importing `ray` costs
what importing `shoal` costs. Modules that Ray has and shoal has not raise an ImportError that says so; so do names in
`from ray.x import y`. A look at `ray.x.y` raises AttributeError, so `hasattr` tells the truth.

The finder comes first in `sys.meta_path`: a Ray that is installed is not used, in no part. Importing this module does
nothing; a process installs the hook when it is told to: `shoal run` in the driver, and `shoal.compat.preload` in the
workers of its job, which must be able to import the same modules as the driver.

Rejected: a folder with a package `ray` on `sys.path`, which would have to lie at the same place on every node.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import NoReturn

from shoal.compat.names import OPEN_PACKAGES, VIEWS, View, find_view, missing


class RayFinder(MetaPathFinder):
    """Answers for `ray` and for what is below it, and for nothing else."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "ray" and not fullname.startswith("ray."):
            return None
        view = find_view(fullname)
        if view is None or not _exists(view.source):
            # `from ray import x` asks for a module `ray.x` when there is no such name, and then goes on silently if the
            # error has that name; without one, it shows our text.
            raise ModuleNotFoundError(missing(fullname))
        return ModuleSpec(fullname, _ViewLoader(view), origin=f"shoal ({view.source})", is_package=view.package)


class _ViewLoader(Loader):
    def __init__(self, view: View) -> None:
        self._view = view

    def exec_module(self, module: ModuleType) -> None:
        view, name = self._view, module.__name__
        source = import_module(view.source) if view.source else None
        public = _public_names(source)
        children = {child.rpartition(".")[2] for child in VIEWS if child.rpartition(".")[0] == name}

        def look_up(attribute: str) -> object:
            target = view.names.get(attribute)
            if target is not None:
                where, _, what = target.partition(":")
                value: object = import_module(where)
                if what:
                    value = getattr(value, what)
            elif attribute in children:
                value = import_module(f"{name}.{attribute}")
            elif attribute in public:
                value = getattr(source, attribute)
            elif f"{name}." in OPEN_PACKAGES and _exists(f"{view.source}.{attribute}"):
                value = import_module(f"{name}.{attribute}")
            elif attribute in view.absent:
                value = _absent(f"{name}.{attribute}")
            else:
                raise AttributeError(missing(f"{name}.{attribute}"), name=attribute, obj=module)
            setattr(module, attribute, value)
            return value

        module.__doc__ = f"{name}, as shoal has it."
        module.__dict__.update(view.constants)
        module.__dict__["__getattr__"] = look_up
        shown = {*view.names, *view.constants, *public}
        module.__dict__["__dir__"] = lambda: sorted({*vars(module), *shown, *children})
        module.__dict__["__all__"] = sorted(attribute for attribute in shown if not attribute.startswith("__"))
        for child in view.shadowed:
            import_module(f"{name}.{child}")  # binds the module to the name now, and never again
            module.__dict__.pop(child)


def install() -> None:
    """Answer for `ray` from now on, in this process; again does nothing."""
    if not any(isinstance(finder, RayFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, RayFinder())


def _absent(name: str) -> Callable[..., NoReturn]:
    def refuse(*_args: object, **_options: object) -> NoReturn:
        raise NotImplementedError(missing(name))

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse


def _exists(module_name: str) -> bool:
    try:
        return not module_name or find_spec(module_name) is not None
    except ModuleNotFoundError:  # its parent
        return False


def _public_names(source: ModuleType | None) -> frozenset[str]:
    if source is None:
        return frozenset()
    listed = getattr(source, "__all__", None)
    if listed is not None:
        return frozenset(listed)
    return frozenset(
        name for name, value in vars(source).items() if name[0] != "_" and not isinstance(value, ModuleType)
    )
