"""`init` and `shutdown`: filling and emptying the one slot that holds this process's runtime.

`init` checks what the user said, writes it into an `InitRequest`, and leaves the rest to `bootstrap.connect`. It
touches nothing that belongs to the program: no signal handler, no warning filter, no environment variable.

What `init()` began it finishes or undoes: a Ctrl-C in the middle leaves no half-made connection and no cluster behind.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from shoal.api.options import check_runtime_env
from shoal.api.words import did_you_mean, not_supported
from shoal.exceptions import ShoalSystemError
from shoal.runtime import slot
from shoal.runtime.init_request import InitRequest
from shoal.scheduling.labels import check_labels
from shoal.scheduling.resources import to_amounts
from shoal.version import __version__

if TYPE_CHECKING:
    from shoal.runtime.interface import Runtime
    from shoal.runtime.job_logging import LoggingConfig

LEAST_STORE_BYTES: Final = 75 * 1024 * 1024

# One thread at a time connects or disconnects; re-entrant, because connecting may import user code that calls us.
_lock = threading.RLock()
_exit_hook_set = False


class ClusterContext(Mapping[str, Any]):
    """What `init()` returns: where the cluster is. Use it in a `with` statement to shut down at the end of it.

    Attributes:
        address_info: node_ip_address, address, gcs_address (the same), session_dir, node_id (hex), webui_url.
        dashboard_url: "" while there is no dashboard.
    """

    dashboard_url = ""
    shoal_commit = ray_commit = ""
    shoal_version = ray_version = __version__

    def __init__(self, address_info: Mapping[str, Any]) -> None:
        self.address_info = dict(address_info)
        self.python_version = ".".join(map(str, sys.version_info[:3]))

    def __getitem__(self, key: str) -> Any:
        if key == "address_info":
            return self.address_info
        return self.address_info[key]

    def __iter__(self) -> Any:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> ClusterContext:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disconnect()

    def disconnect(self) -> None:
        shutdown()

    def __repr__(self) -> str:
        address = self.address_info.get("address")
        return f"ClusterContext(address={address!r}, shoal={__version__}, python={self.python_version})"


# Options of Ray that change nothing here, at any value: what they steer does not exist or is always so.
_IGNORED: Final = {
    "include_dashboard", "dashboard_host", "dashboard_port", "configure_logging", "logging_format",
    "_metrics_export_port", "_driver_object_store_memory", "_skip_env_hook", "_enable_object_reconstruction",
    "_redis_username", "_redis_password", "_plasma_directory",
}  # fmt: skip
# Options of Ray that would change something: only their defaults pass.
_LATER: Final[Mapping[str, Any]] = {
    "job_config": None, "enable_resource_isolation": False, "cgroup_path": None,
    "system_reserved_cpu": None, "system_reserved_memory": None, "proxy_server_url": None, "allow_multiple": False,
    "_tracing_startup_hook": None, "_system_config": None,
}  # fmt: skip
_KNOWN: Final = (
    "address", "num_cpus", "num_gpus", "resources", "labels", "object_store_memory", "namespace", "runtime_env",
    "ignore_reinit_error", "log_to_driver", "logging_level", "logging_config",
    "_node_ip_address", "_node_name", "_memory", "_temp_dir",
    "object_spilling_directory",
    *sorted(_IGNORED), *_LATER,
)  # fmt: skip


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    object_store_memory: int | None = None,
    namespace: str | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    ignore_reinit_error: bool = False,
    log_to_driver: bool | None = None,
    logging_level: int | str | None = None,
    logging_config: LoggingConfig | None = None,
    _node_ip_address: str | None = None,
    _node_name: str | None = None,
    _memory: int | None = None,
    _temp_dir: str | None = None,
    object_spilling_directory: str | Sequence[str] | None = None,
    **more: Any,
) -> ClusterContext:
    """Connect this process to a cluster, or start one on this machine.

    Args:
        address: None looks at SHOAL_ADDRESS, then for a cluster that runs on this node, else starts one. "auto" does
            not start one. "local" always does. "HOST:PORT" connects there.
        num_cpus, num_gpus: of the cluster that is started; None detects them.
        resources, labels: of the node that is started.
        object_store_memory: bytes, at least 75 MiB.
        namespace: of named actors; None looks at SHOAL_NAMESPACE, else makes an anonymous one.
        runtime_env: for every task and actor; {"env_vars": {...}} so far.
        ignore_reinit_error: a second `init` returns the first one's result.
        log_to_driver: show what tasks and actors print; None looks at SHOAL_LOG_TO_DRIVER, else True.
        logging_level: of the driver's logger "shoal".
        logging_config: what the root loggers of the driver and of its workers write.
        object_spilling_directory: where objects go that do not fit into the store of the cluster that is started: a
            folder, a URL that fsspec knows ("s3://bucket/prefix"), or several; None is a folder of its own in /tmp.
    Raises:
        RuntimeError: this process is connected already, or an argument does not exist.
        ConnectionError: no cluster answers (ClusterNotFoundError, ClusterConnectionError).
        AuthenticationError, VersionMismatchError: one answers, and will not have us.
        ValueError, TypeError: a wrong argument, or one that an existing cluster cannot honour.
    """
    _refuse_unknown(more)
    env_vars = check_runtime_env(runtime_env)
    env = os.environ
    if log_to_driver is None:
        log_to_driver = env.get("SHOAL_LOG_TO_DRIVER", "1").lower() not in ("0", "false", "no")
    request = InitRequest(
        address=_check_address(address or env.get("SHOAL_ADDRESS") or None),
        num_cpus=_check_count("num_cpus", num_cpus),
        num_gpus=_check_count("num_gpus", num_gpus),
        resources=_check_resources(resources),
        labels=_check_labels(labels),
        object_store_memory=_check_bytes("object_store_memory", object_store_memory, LEAST_STORE_BYTES),
        memory=_check_bytes("_memory", _memory, 1),
        namespace=_check_name("namespace", namespace or env.get("SHOAL_NAMESPACE") or None),
        log_to_driver=bool(log_to_driver),
        logging_level=_check_level(logging_level),
        logging=_check_logging(logging_config),
        env_vars=env_vars,
        node_ip_address=_check_name("_node_ip_address", _node_ip_address),
        node_name=_check_name("_node_name", _node_name),
        temp_dir=_check_name("_temp_dir", _temp_dir),
        spill=_check_folders("object_spilling_directory", object_spilling_directory),
        entrypoint=" ".join(sys.argv),
        preload=tuple(filter(None, env.get("SHOAL_PRELOAD", "").split(","))),
    )
    if request.address not in (None, "local"):
        request.refuse_for_existing(request.address or "")
    with _lock:
        if slot.current is not None:
            if not ignore_reinit_error:
                raise RuntimeError(
                    "this process is connected to a cluster already; call shoal.shutdown() first, "
                    "or pass ignore_reinit_error=True"
                )
            return _describe(slot.current)
        made: list[Runtime] = []
        try:
            _connect(request, made)
            return _describe(made[0])
        except BaseException:
            slot.current = None
            for runtime in made:
                runtime.shutdown()
            raise


def _connect(request: InitRequest, made: list[Runtime]) -> None:
    """Fill the slot. The caller holds the lock, has seen it empty, and ends what is in `made` when this raises."""
    global _exit_hook_set
    from shoal.runtime.bootstrap import connect

    if not _exit_hook_set:
        # Before connecting: hooks run last in, first out, so that those of the runtime's parts run before this one.
        atexit.register(shutdown)
        _exit_hook_set = True
    slot.current = connect(request, made.append)


def connect_if_needed() -> Runtime:
    """The current runtime; the first call of a program that never called `init()` gets one here.

    Raises:
        ShoalSystemError: SHOAL_ENABLE_AUTO_CONNECT=0 forbids that. Else as `init`.
    """
    with _lock:
        if slot.current is None:
            if os.environ.get("SHOAL_ENABLE_AUTO_CONNECT", "1").lower() in ("0", "false", "no"):
                raise ShoalSystemError(
                    "shoal is not connected; call shoal.init() first (SHOAL_ENABLE_AUTO_CONNECT=0 is set)"
                )
            init()
        runtime = slot.current
    if runtime is None:  # another thread called shutdown() meanwhile
        raise ShoalSystemError("shoal was shut down while this call began")
    return runtime


def connected(what: str) -> Runtime:
    """The current runtime, for calls that do not connect by themselves."""
    runtime = slot.current
    if runtime is None:
        raise ShoalSystemError(f"{what} needs a connection; call shoal.init() first")
    return runtime


def shutdown(*, wait_for_processes: bool = False) -> None:
    """Disconnect, and end the cluster if `init()` started it. Does nothing when there is no connection.

    Args:
        wait_for_processes: accepted for compatibility; `shutdown` always waits until what it ends has ended.
    """
    with _lock:
        runtime, slot.current = slot.current, None
        if runtime is not None:
            runtime.shutdown()


def is_initialized() -> bool:
    """Whether this process is connected to a cluster."""
    return slot.current is not None


def _describe(runtime: Runtime) -> ClusterContext:
    where = runtime.context()
    return ClusterContext(
        {
            "node_ip_address": where.node_ip,
            "address": where.control_address,
            "gcs_address": where.control_address,
            "session_dir": where.session_dir,
            "node_id": where.node_id.hex(),
            "namespace": where.namespace,
            "webui_url": "",
        }
    )


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that is not here may have held it


os.register_at_fork(after_in_child=_after_fork_in_child)


# ---------------------------------------------------------------------------------------------------------- arguments


def _refuse_unknown(more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if name in _IGNORED:
            continue
        if name in _LATER:
            if value != _LATER[name]:
                raise not_supported(f"init({name}=...)")
            continue
        if name == "local_mode":
            if value:
                raise RuntimeError("local_mode does not exist; call f._function(...) to run a remote function in place")
            continue
        raise RuntimeError(f"init() has no argument {name!r}.{did_you_mean(name, _KNOWN)}")


def _check_address(address: object) -> str | None:
    if address is None:
        return None
    if not isinstance(address, str):
        raise TypeError(f"address is a string such as 'HOST:PORT', not {address!r}")
    if address in ("auto", "local"):
        return address
    scheme, found, _ = address.partition("://")
    if found:
        if scheme in ("http", "https"):
            raise ValueError(f"{address} is an HTTP address, which serves jobs; init() wants HOST:PORT of the head")
        if scheme in ("ray", "shoal"):
            raise not_supported(f"a remote client ({address})", "give HOST:PORT on a machine of the cluster's network")
        raise ValueError(f"address {address!r} has the scheme {scheme!r}; write HOST:PORT, 'auto' or 'local'")
    host, found, port = address.rpartition(":")
    if not found or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r} is not HOST:PORT (or [IPV6]:PORT), 'auto' or 'local'")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"address {address!r} looks like IPv6; write it with brackets: [{host}]:{port}")
    return address


def _check_count(name: str, value: float | None) -> float | None:
    if value is not None:
        try:
            to_amounts({name: value})
        except ValueError as error:
            raise ValueError(f"init({name}=...): {error}") from None
        if value != int(value):
            raise ValueError(f"init({name}=...): a node has a whole number of them, not {value}")
    return value


def _check_resources(resources: Mapping[str, float] | None) -> dict[str, int]:
    if resources is None:
        return {}
    if not isinstance(resources, Mapping):
        raise TypeError(f"init(resources=...) is a dict of names to amounts, not {resources!r}")
    for key, instead in (
        ("CPU", "num_cpus"), ("GPU", "num_gpus"), ("memory", "_memory"), ("object_store_memory", "object_store_memory"),
    ):  # fmt: skip
        if key in resources:
            raise ValueError(f"init(resources=...) cannot have {key!r}; use {instead}={resources[key]!r} instead")
    return to_amounts(resources)


def _check_labels(labels: Mapping[Any, Any] | None) -> dict[str, str]:
    if labels is None:
        return {}
    if not isinstance(labels, Mapping):
        raise TypeError(f"init(labels=...) is a dict of strings to strings, not {labels!r}")
    for key, value in labels.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"init(labels=...) is a dict of strings to strings; {key!r}: {value!r} is not")
    try:
        return check_labels(labels)
    except ValueError as exc:
        raise ValueError(f"init(labels=...): {exc}") from None


def _check_bytes(name: str, value: Any, least: int) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value):
        raise TypeError(f"init({name}=...) is a whole number of bytes, not {value!r}")
    if value < least:
        raise ValueError(f"init({name}=...) is at least {least} bytes, not {value}")
    return int(value)


def _check_name(name: str, value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    raise TypeError(f"init({name}=...) is a string that is not empty, not {value!r}")


def _check_folders(name: str, value: object) -> tuple[str, ...]:
    """One place or several, as a tuple."""
    places = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else value
    if places is None:
        return ()
    if not isinstance(places, tuple) or not all(isinstance(place, str) and place for place in places):
        raise TypeError(f"{name} is a folder or URL, or a list of them, not {value!r}")
    return places


def _check_logging(config: object) -> str:
    if config is None:
        return ""
    from shoal.runtime import job_logging

    if not isinstance(config, job_logging.LoggingConfig):
        raise TypeError(f"init(logging_config=...) is a shoal.LoggingConfig, not {config!r}")
    return job_logging.pack(config)


def _check_level(level: int | str | None) -> int | None:
    if level is None or (isinstance(level, int) and not isinstance(level, bool)):
        return level
    if isinstance(level, str):
        import logging

        number = logging.getLevelNamesMapping().get(level.upper())
        if number is not None:
            return number
    raise ValueError(f"init(logging_level=...) is a level such as logging.INFO or 'info', not {level!r}")
