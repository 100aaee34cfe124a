"""The import hook: what `import ray` gives, and what it says about names that are not there."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from collections.abc import Iterator

import cloudpickle
import pytest

import shoal
from shoal import exceptions
from shoal.compat import settings
from shoal.compat.hook import RayFinder, install
from shoal.compat.names import RAY_VERSION, VIEWS


@pytest.fixture(autouse=True)
def hook() -> Iterator[None]:
    finders = list(sys.meta_path)
    install()
    yield
    sys.meta_path[:] = finders
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        del sys.modules[name]


def test_the_names_of_ray_are_those_of_shoal() -> None:
    ray = importlib.import_module("ray")
    for name in shoal.__all__:
        view = VIEWS["ray"]
        if name not in view.names and name not in view.constants and f"ray.{name}" not in VIEWS:
            assert getattr(ray, name) is getattr(shoal, name), name
    assert ray.ObjectID is shoal.ObjectRef
    assert ray.__version__ == RAY_VERSION
    assert set(shoal.__all__) <= set(dir(ray))


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_every_view_imports_and_every_name_of_it_is_there(name: str) -> None:
    if VIEWS[name].source and not _there(VIEWS[name].source):
        pytest.skip("not built yet")
    if name in ("ray.util.dask", "ray.util.joblib"):
        pytest.importorskip(name.rpartition(".")[2])
    module = importlib.import_module(name)
    for attribute in module.__all__:
        assert hasattr(module, attribute), attribute


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def test_submodules_are_reached_both_ways() -> None:
    import ray.exceptions
    import ray.util
    from ray.exceptions import RayError, RayTaskError  # noqa: F401
    from ray.util import get_node_ip_address

    assert ray.exceptions.GetTimeoutError is exceptions.GetTimeoutError
    assert RayError is exceptions.ShoalError
    assert get_node_ip_address is shoal.util.get_node_ip_address
    assert ray.util is sys.modules["ray.util"]


def test_modules_of_helpers_need_no_import_of_their_own() -> None:
    import ray

    assert ray.util.scheduling_strategies is sys.modules["ray.util.scheduling_strategies"]
    assert ray.experimental.internal_kv._internal_kv_get is not None
    assert not hasattr(ray.util, "no_such_module")


def test_what_is_missing_is_named_with_where_to_look() -> None:
    import ray

    text = r"shoal has no ray\.{}: docs/compatibility\.md"
    with pytest.raises(AttributeError, match=text.format("java_function")):
        _ = ray.java_function
    with pytest.raises(ImportError, match=text.format("java_function")):
        from ray import java_function  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=text.format("tune")):
        import ray.tune
    with pytest.raises(ModuleNotFoundError, match=text.format(r"util\.nothing")):
        from ray.util import nothing  # noqa: F401
    assert not hasattr(ray, "tune")
    assert getattr(ray, "tune", None) is None


def test_what_libraries_only_import_refuses_to_be_called() -> None:
    from ray.data import from_pandas_refs

    with pytest.raises(NotImplementedError, match=r"shoal has no ray\.data\.from_pandas_refs"):
        from_pandas_refs([])


def test_the_hook_answers_for_ray_alone_and_is_installed_once() -> None:
    install()
    assert sum(isinstance(finder, RayFinder) for finder in sys.meta_path) == 1
    for name in ("rayon", "array_ray", "json"):
        assert RayFinder().find_spec(name, None) is None


def test_a_name_that_was_used_is_an_ordinary_attribute_and_can_be_replaced() -> None:
    import ray

    assert "put" not in vars(ray)
    assert ray.put is vars(ray)["put"]
    ray.put = None
    assert ray.put is None
    assert shoal.put is not None


def test_code_that_names_the_views_can_be_pickled() -> None:
    import ray
    import ray.exceptions

    assert pickle.loads(cloudpickle.dumps(ray)) is ray
    assert pickle.loads(cloudpickle.dumps(lambda: ray.exceptions.RayError))() is exceptions.ShoalError


def test_environment_variables_of_ray_are_read_as_ours_unless_ours_are_set() -> None:
    environ = {"RAY_ADDRESS": "h:1", "RAY_NAMESPACE": "a", "SHOAL_NAMESPACE": "b", "RAY_UNKNOWN": "c"}
    settings.adopt(environ)
    assert environ == {
        "RAY_ADDRESS": "h:1", "SHOAL_ADDRESS": "h:1", "RAY_NAMESPACE": "a", "SHOAL_NAMESPACE": "b", "RAY_UNKNOWN": "c",
    }  # fmt: skip
