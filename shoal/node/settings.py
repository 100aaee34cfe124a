"""What a node is started with, settled once by its supervisor and passed down, never read again from the
environment."""

from __future__ import annotations

import os
import socket

import msgspec

from shoal.exceptions import ShoalError
from shoal.node import accelerators
from shoal.scheduling.labels import ACCELERATOR_TYPE, check_labels
from shoal.scheduling.resources import to_amounts
from shoal.scheduling.views import Amounts


class NodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a user asks of a node; None means "as this machine is".

    Attributes:
        head: start control too. address: of the head to join ("host:port"), for other nodes.
        port: TCP port of this node; 0 takes any free one. node_ip: address to bind and to be reached at.
        memory, object_store_memory: bytes.
        token: the cluster's token; None makes a new one (head) or reads the environment (others).
        private: made by `init()` for one driver; nobody else finds it.
        spill: folders or URLs (of fsspec) for objects that do not fit into shared memory; none means a folder of the
            node's own, below `temp_dir`.
        memory_threshold: share of the machine's (or container's) memory in use at which workers are ended; 1 never.
        lifeline_fd: the node ends when the other end of this descriptor closes; None lives until it is told to end.
        worker_entry: "module:function" that prepares workers in the zygote; the rooms above say what those are.
    """

    head: bool
    address: str | None = None
    port: int = 0
    node_ip: str = "127.0.0.1"
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: dict[str, float] = {}
    labels: dict[str, str] = {}
    memory: int | None = None
    object_store_memory: int | None = None
    temp_dir: str | None = None
    token: str | None = None
    spill: list[str] = []
    memory_threshold: float = 0.95
    private: bool = False
    lifeline_fd: int | None = None
    log_level: str = "info"
    node_timeout_s: float = 10.0
    worker_entry: str = "shoal.runtime.worker:prepare_worker"


_LABEL_VARIABLES = {
    "ray.io/market-type": "SHOAL_NODE_MARKET_TYPE",
    "ray.io/availability-region": "SHOAL_NODE_REGION",
    "ray.io/availability-zone": "SHOAL_NODE_ZONE",
    "ray.io/node-group": "SHOAL_NODE_TYPE_NAME",
}
MIN_STORE_BYTES = 16 << 20
MAX_DEFAULT_STORE_BYTES = 200 << 30


class Capacity(msgspec.Struct, frozen=True):
    """What a node offers."""

    total: Amounts
    store_bytes: int
    labels: dict[str, str]


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that an agent is told at its start."""

    node_id: bytes
    token: bytes
    address: str
    node_ip: str
    folder: str
    logs: str
    sockets: str
    agent_socket: str
    control_socket: str
    control_address: str
    is_head: bool
    total: Amounts
    labels: dict[str, str]
    store_bytes: int
    spill: list[str]
    memory_threshold: float


def detect_capacity(options: NodeOptions) -> Capacity:
    """The node's resources: what was asked for, else what this machine (or its container) has.

    Raises:
        ShoalError: a number that makes no sense.
    """
    memory = options.memory or _container_memory()
    store = options.object_store_memory
    if store is None:
        store = min(int(memory * 0.3), MAX_DEFAULT_STORE_BYTES, int(_shared_memory_free() * 0.9))
    if store < MIN_STORE_BYTES:
        raise ShoalError(f"the object store needs {MIN_STORE_BYTES >> 20} MiB at least, not {store} bytes")
    amounts: dict[str, float] = {
        "CPU": _cpus() if options.num_cpus is None else options.num_cpus,
        "memory": max(memory - store, 0),
        "object_store_memory": store,
        f"node:{options.node_ip}": 1.0,
    }
    found = accelerators.here() if options.num_gpus is None or options.num_gpus else accelerators.Gpus(0, "")
    gpus = found.number if options.num_gpus is None else options.num_gpus
    if gpus:
        amounts["GPU"] = gpus
        if found.kind:
            amounts[f"accelerator_type:{found.kind}"] = 1.0
    if options.head:
        amounts["node:__internal_head__"] = 1.0
    try:
        total = to_amounts({**options.resources, **amounts})
    except (TypeError, ValueError) as exc:
        raise ShoalError(f"the node's resources: {exc}") from exc
    try:
        kind = {ACCELERATOR_TYPE: found.kind} if gpus and found.kind else {}
        labels = {**_machine_labels(), **kind, **check_labels(options.labels)}
    except (TypeError, ValueError) as exc:
        raise ShoalError(f"the node's labels: {exc}") from exc
    return Capacity({name: amount for name, amount in total.items() if amount}, store, labels)


def _machine_labels() -> dict[str, str]:
    """What the environment says of the machine, where a provider has set it."""
    named = {name: os.environ.get(variable, "") for name, variable in _LABEL_VARIABLES.items()}
    return check_labels({name: value for name, value in named.items() if value})


def _cpus() -> float:
    """CPUs this process may use: affinity, and the container's quota rounded up."""
    try:
        count = float(len(os.sched_getaffinity(0)))
    except AttributeError:
        count = float(os.cpu_count() or 1)
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        try:
            with open(path) as file:
                words = file.read().split()
            if len(words) == 1:
                with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
                    words.append(file.read().strip())
            quota, period = words[0], words[1]
        except (OSError, IndexError):
            continue
        if quota not in ("max", "-1") and float(period) > 0:
            count = min(count, max(1.0, float(-(-int(quota) // int(period)))))
    return count


def _container_memory() -> int:
    """Bytes of memory: the machine's, or the container's limit if that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        if text != "max":
            total = min(total, int(text))
    return total


def _shared_memory_free() -> int:
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:
        return 1 << 62
    return max(stat.f_bavail * stat.f_frsize, MIN_STORE_BYTES * 2)


def host_name() -> str:
    return socket.gethostname()
