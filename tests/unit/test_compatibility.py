"""docs/compatibility.toml says of each public name of Ray whether shoal has it. Here every line is held against the
package, so that the page can be believed: what is promised exists with its parameters, and what is "not yet" does not.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shoal.api import initialize, options
from shoal.compat.hook import install
from shoal.compat.names import VIEWS

ROOT = Path(__file__).resolve().parents[2]

spec = importlib.util.spec_from_file_location("make_compatibility", ROOT / "docs" / "make_compatibility.py")
assert spec is not None
assert spec.loader is not None
page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(page)

TABLE: Mapping[str, Mapping[str, str]] = page.read()
OPTIONS = {
    "options of tasks": options.TASK_OPTIONS,
    "options of actors": options.ACTOR_OPTIONS,
    "options of ray.method": options.METHOD_OPTIONS,
    "options of a method's call": options.CALL_OPTIONS,
}
NEEDS = {"ray.util.joblib": "joblib", "ray.util.dask": "dask"}  # what the module is for
HINT = "correct docs/compatibility.toml, and run: python docs/make_compatibility.py"


@pytest.fixture(autouse=True)
def hook() -> Iterator[None]:
    finders = list(sys.meta_path)
    install()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        del sys.modules[name]


def test_the_page_is_what_is_generated() -> None:
    assert page.render(page.read()) == page.PAGE.read_text(), "run: python docs/make_compatibility.py"


@pytest.mark.parametrize("section", TABLE)
def test_every_line_is_true(section: str) -> None:
    if section in NEEDS:
        pytest.importorskip(NEEDS[section])
    wrong = [
        f"{name}: {complaint}" for name, text in TABLE[section].items() if (complaint := check(section, name, text))
    ]
    assert not wrong, f"{HINT}\n  " + "\n  ".join(wrong)


def check(section: str, name: str, text: str) -> str:
    """What is wrong with a line, "" for nothing."""
    kind, remark = page.verdict(text)
    if kind != "same" and not remark:
        return f"it does not say {'how' if kind == 'better' else 'why'}"
    if section in OPTIONS:
        return _agree(kind, _option_works(OPTIONS[section], name))
    if section == "arguments of ray.init":
        return _agree(kind, _argument_works(name))
    if section == "keys of runtime_env":
        return _agree(kind, _key_works(name))
    path, parameters, bases = _parse(name)
    found = _find(section, path)
    if kind == "not yet":
        return _agree(kind, found is not _ABSENT)
    if found is _ABSENT:
        return "it does not exist"
    for base in bases:
        if not issubclass(found, _find("builtins", base) if _find(section, base) is _ABSENT else _find(section, base)):
            return f"it is no {base}"
    return "" if parameters is None else _compare(parameters, found)


def _agree(kind: str, works: bool) -> str:
    if works and kind == "not yet":
        return "it works now"
    return "" if works or kind == "not yet" else "it does not work"


def _option_works(table: Mapping[str, Any], name: str) -> bool:
    return name in table and not table[name].__qualname__.startswith("_later.")


def _argument_works(name: str) -> bool:
    return name in inspect.signature(initialize.init).parameters or name in initialize._IGNORED


def _key_works(name: str) -> bool:
    try:
        options.check_runtime_env({name: {"A": "1"}})
    except NotImplementedError:
        return False
    except (TypeError, ValueError):
        return name in options._RUNTIME_ENV_KEYS
    return True


class _Absent:
    pass


_ABSENT: Any = _Absent()


def _parse(line: str) -> tuple[str, str | None, list[str]]:
    """("Queue.put", "item, block=True", []), or ("GetTimeoutError", None, ["RayError", "TimeoutError"])."""
    name, is_class, bases = line.partition(" < ")
    if is_class:
        return name, None, bases.split(", ")
    path, has_parameters, rest = line.partition("(")
    return path, rest[:-1] if has_parameters else None, []


def _find(section: str, path: str) -> Any:
    """The object that `path` names in a module of Ray, or in a class (as in "ray.ObjectRef")."""
    try:
        found: Any = importlib.import_module(section)
    except ImportError:
        module, _, name = section.rpartition(".")
        found = getattr(sys.modules.get(module), name, _ABSENT)
    for part in path.split("."):
        if found is _ABSENT:
            return _ABSENT
        owner, found = found, getattr(found, part, _ABSENT)
        if found is _ABSENT and isinstance(owner, type) and issubclass(owner, BaseException):
            found = vars(owner()).get(part, _ABSENT)
    if inspect.ismodule(found) and VIEWS[found.__name__].absent:
        return _ABSENT  # it has only names that refuse to be called
    return found


def _compare(parameters: str, found: Any) -> str:
    wanted = inspect.signature(eval(f"lambda {parameters}: 0")).parameters
    have = dict(inspect.signature(found).parameters)
    have.pop("self", None)
    for name, parameter in wanted.items():
        real = have.get(name)
        if real is None:
            return f"it has no parameter {name!r}, only {', '.join(have)}"
        if real.kind is not parameter.kind:
            return f"parameter {name!r} is {real.kind.description}, not {parameter.kind.description}"
        if real.default != parameter.default:
            return f"parameter {name!r} has the default {real.default!r}, not {parameter.default!r}"
    return ""
