"""`init`, `shutdown`, connecting by itself, and what `import shoal` brings with it."""

from __future__ import annotations

import inspect
import logging
import os
import signal
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shoal
from shoal.api import initialize
from shoal.exceptions import ShoalSystemError
from shoal.runtime import slot
from shoal.runtime.fake import NODE, FakeRuntime
from shoal.runtime.init_request import InitRequest


@pytest.fixture(autouse=True)
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InitRequest]]:
    """What `init` asked for; each request is answered with a fake runtime."""
    asked: list[InitRequest] = []

    def connect(request: InitRequest, made: Callable[[Any], object]) -> FakeRuntime:
        asked.append(request)
        runtime = FakeRuntime()
        made(runtime)
        return runtime

    module = types.ModuleType("shoal.runtime.bootstrap")
    module.connect = connect  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shoal.runtime.bootstrap", module)
    for name in ("SHOAL_ADDRESS", "SHOAL_NAMESPACE", "SHOAL_ENABLE_AUTO_CONNECT", "SHOAL_LOG_TO_DRIVER"):
        monkeypatch.delenv(name, raising=False)
    slot.current = None
    yield asked
    slot.current = None


def test_defaults(requests: list[InitRequest]) -> None:
    context = shoal.init()
    assert shoal.is_initialized()
    request = requests[0]
    assert (request.address, request.num_cpus, request.namespace, request.log_to_driver) == (None, None, None, True)
    assert request.only_for_new_cluster() == []
    assert context.address_info["node_id"] == context["node_id"] == NODE.hex()
    assert context.address_info["address"] == "127.0.0.1:1"
    assert context.shoal_version == context.ray_version == shoal.__version__
    assert "127.0.0.1:1" in repr(context)


def test_everything_arrives(requests: list[InitRequest]) -> None:
    shoal.init(
        num_cpus=4, num_gpus=1, resources={"x": 0.5}, labels={"zone": "a"}, object_store_memory=1 << 28, namespace="n",
        runtime_env={"env_vars": {"A": "1"}}, log_to_driver=False, logging_level="debug", _temp_dir="/t",
        _node_ip_address="::1", _memory=1 << 30, _node_name="me", include_dashboard=False, dashboard_host="0.0.0.0",
    )  # fmt: skip
    request = requests[0]
    assert (request.num_cpus, request.num_gpus, request.resources) == (4, 1, {"x": 5_000})
    assert (request.labels, request.object_store_memory, request.namespace) == ({"zone": "a"}, 1 << 28, "n")
    assert (request.env_vars, request.log_to_driver, request.logging_level) == ({"A": "1"}, False, logging.DEBUG)
    assert (request.temp_dir, request.node_ip_address, request.memory) == ("/t", "::1", 1 << 30)
    assert "num_cpus" in request.only_for_new_cluster()
    with pytest.raises(ValueError, match="num_cpus, num_gpus, resources, labels"):
        request.refuse_for_existing("h:1")


def test_the_environment_is_asked(requests: list[InitRequest], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("SHOAL_NAMESPACE", "space")
    monkeypatch.setenv("SHOAL_LOG_TO_DRIVER", "0")
    shoal.init()
    shoal.shutdown()
    shoal.init("local", namespace="mine", log_to_driver=True)
    assert [(r.address, r.namespace, r.log_to_driver) for r in requests] == [
        ("10.0.0.1:6379", "space", False),
        ("local", "mine", True),
    ]


@pytest.mark.parametrize("address", ["auto", "local", "host:1", "10.0.0.1:6379", "[::1]:80"])
def test_addresses(requests: list[InitRequest], address: str) -> None:
    shoal.init(address)
    assert requests[0].address == address


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"address": "http://h:1"}, ValueError, "serves jobs"),
        ({"address": "ray://h:1"}, NotImplementedError, "remote client"),
        ({"address": "foo://h:1"}, ValueError, "scheme"),
        ({"address": "h"}, ValueError, "HOST:PORT"),
        ({"address": "h:0"}, ValueError, "HOST:PORT"),
        ({"address": "h:x"}, ValueError, "HOST:PORT"),
        ({"address": "::1:80"}, ValueError, r"\[::1\]:80"),
        ({"address": 3}, TypeError, "string"),
        ({"address": "h:1", "num_cpus": 2}, ValueError, "num_cpus cannot be set"),
        ({"num_cpu": 2}, RuntimeError, "Did you mean 'num_cpus'"),
        ({"local_mode": True}, RuntimeError, "local_mode"),
        ({"job_config": object()}, NotImplementedError, "job_config"),
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_cpus": 1.5}, ValueError, "whole number"),
        ({"resources": {"GPU": 1}}, ValueError, "num_gpus=1"),
        ({"resources": 3}, TypeError, "dict"),
        ({"labels": {"a": 1}}, TypeError, "strings"),
        ({"object_store_memory": 1}, ValueError, "at least"),
        ({"object_store_memory": "1G"}, TypeError, "bytes"),
        ({"namespace": 3}, TypeError, "namespace"),
        ({"logging_level": "loud"}, ValueError, "logging.INFO"),
        ({"runtime_env": {"pip": ["x"]}}, NotImplementedError, "pip"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        shoal.init(**arguments)
    assert not shoal.is_initialized()


def test_a_second_init(requests: list[InitRequest]) -> None:
    shoal.init()
    with pytest.raises(RuntimeError, match=r"shoal.shutdown\(\)"):
        shoal.init()
    assert shoal.init(ignore_reinit_error=True)["node_id"] == NODE.hex()
    assert len(requests) == 1


def test_shutdown_is_idempotent_and_a_with_statement_calls_it() -> None:
    with shoal.init():
        runtime: Any = slot.current
        assert shoal.is_initialized()
    assert runtime.is_shut_down
    assert not shoal.is_initialized()
    shoal.shutdown()
    shoal.init()


def test_the_first_call_connects(requests: list[InitRequest]) -> None:
    assert shoal.get(shoal.remote(lambda: 1).remote()) == 1
    assert len(requests) == 1
    shoal.shutdown()
    shoal.put(1)
    shoal.shutdown()
    shoal.remote(type("C", (), {})).remote()
    shoal.shutdown()
    shoal.get_runtime_context()
    assert len(requests) == 4


def test_connecting_by_itself_can_be_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ENABLE_AUTO_CONNECT", "0")
    with pytest.raises(ShoalSystemError, match=r"shoal.init\(\)"):
        shoal.remote(lambda: 1).remote()
    shoal.init()
    shoal.remote(lambda: 1).remote()


def test_many_threads_connect_once(requests: list[InitRequest]) -> None:
    barrier = threading.Barrier(8)

    def first_call() -> None:
        barrier.wait()
        shoal.put(1)

    threads = [threading.Thread(target=first_call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(requests) == 1


def test_what_fails_to_connect_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    half_made = FakeRuntime()

    def refuse(request: InitRequest, made: Callable[[Any], object]) -> None:
        made(half_made)
        raise ConnectionError("nobody there")

    monkeypatch.setattr(sys.modules["shoal.runtime.bootstrap"], "connect", refuse)
    with pytest.raises(ConnectionError, match="nobody there"):
        shoal.init()
    assert not shoal.is_initialized()
    assert half_made.is_shut_down


def test_the_program_is_left_alone() -> None:
    before = (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        list(warnings.filters),
        dict(os.environ),
    )
    with shoal.init():
        pass
    assert before == (
        signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), list(warnings.filters), dict(os.environ)
    )  # fmt: skip


def test_an_exit_hook_shuts_down(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: list[Any] = []
    monkeypatch.setattr(initialize.atexit, "register", hooks.append)
    monkeypatch.setattr(initialize, "_exit_hook_set", False)
    shoal.init()
    shoal.shutdown()
    shoal.init()
    assert hooks == [initialize.shutdown]


# ------------------------------------------------------------------------------------------------------ what users see

SIGNATURES = {
    "available_resources": "() -> 'dict[str, float]'",
    "cancel": "(ref: 'ObjectRef[Any] | ObjectRefGenerator[Any]', *, force: 'bool' = False, recursive: 'bool' = True)"
    " -> 'None'",
    "cluster_resources": "() -> 'dict[str, float]'",
    "get": "(refs: 'Any', *, timeout: 'float | None' = None) -> 'Any'",
    "get_actor": "(name: 'str', namespace: 'str | None' = None) -> 'ActorHandle[Any]'",
    "get_gpu_ids": "() -> 'list[int | str]'",
    "get_runtime_context": "() -> 'RuntimeContext'",
    "init": "(address: 'str | None' = None, *, num_cpus: 'float | None' = None, num_gpus: 'float | None' = None, "
    "resources: 'Mapping[str, float] | None' = None, labels: 'Mapping[str, str] | None' = None, "
    "object_store_memory: 'int | None' = None, namespace: 'str | None' = None, "
    "runtime_env: 'Mapping[str, Any] | None' = None, ignore_reinit_error: 'bool' = False, "
    "log_to_driver: 'bool | None' = None, logging_level: 'int | str | None' = None, "
    "logging_config: 'LoggingConfig | None' = None, "
    "_node_ip_address: 'str | None' = None, _node_name: 'str | None' = None, _memory: 'int | None' = None, "
    "_temp_dir: 'str | None' = None, "
    "object_spilling_directory: 'str | Sequence[str] | None' = None, **more: 'Any') -> 'ClusterContext'",
    "is_initialized": "() -> 'bool'",
    "kill": "(actor: 'ActorHandle[Any]', *, no_restart: 'bool' = True) -> 'None'",
    "method": "(function: 'Any' = None, /, **options: 'Any') -> 'Any'",
    "nodes": "() -> 'list[dict[str, Any]]'",
    "put": "(value: 'T') -> 'ObjectRef[T]'",
    "remote": "(*targets: 'Any', **options: 'Any') -> 'Any'",
    "shutdown": "(*, wait_for_processes: 'bool' = False) -> 'None'",
    "timeline": "(filename: 'str | os.PathLike[str] | None' = None) -> 'list[dict[str, Any]] | None'",
    "typed": "(handle: 'ActorHandle[T]') -> 'T'",
    "wait": "(refs: 'list[W]', *, num_returns: 'int' = 1, timeout: 'float | None' = None, "
    "fetch_local: 'bool' = True) -> 'tuple[list[W], list[W]]'",
}
OTHERS = {
    "ActorClass", "ActorHandle", "DynamicObjectRefGenerator", "LoggingConfig", "ObjectRef", "ObjectRefGenerator",
    "__version__", "actor",
    "exceptions", "util",
}  # fmt: skip


def test_the_names_are_pinned() -> None:
    assert set(shoal.__all__) == SIGNATURES.keys() | OTHERS
    assert set(shoal.__all__) <= set(dir(shoal))
    assert shoal.__version__ == "0.1.0"
    for name in shoal.__all__:
        assert getattr(shoal, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shoal.nothing  # noqa: B018


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_the_signatures_are_pinned(name: str) -> None:
    assert str(inspect.signature(getattr(shoal, name))) == SIGNATURES[name]


def test_a_star_import_brings_all_names() -> None:
    space: dict[str, Any] = {}
    exec("from shoal import *", space)  # noqa: S102 - that is what is tested
    assert set(shoal.__all__) <= space.keys()


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import shoal", "asyncio numpy cloudpickle rich typer inspect msgspec psutil uvloop logging"),
        ("import shoal.exceptions", "asyncio numpy cloudpickle rich typer inspect msgspec psutil uvloop"),
        (
            "import shoal; f = shoal.remote(lambda: 1); shoal.remote(type('C', (), {})); shoal.init; shoal.get",
            "asyncio numpy cloudpickle rich typer psutil uvloop multiprocessing",
        ),
        (
            "import shoal.util; dir(shoal.util)",
            "asyncio numpy cloudpickle joblib dask multiprocessing concurrent.futures",
        ),
    ],
)
def test_importing_is_light(code: str, heavy: str) -> None:
    report = f"import sys; {code}; print(*sorted(set({heavy.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-Sc", f"import sys; sys.path = {sys.path!r}; {report}"],
                          capture_output=True, text=True, check=True, timeout=30)  # fmt: skip
    assert done.stdout.split() == []
