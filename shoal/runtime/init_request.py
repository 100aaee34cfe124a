"""What `init()` asks for: one frozen value, checked by the API, carried out by `shoal.runtime.bootstrap.connect`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from shoal.scheduling.views import Amounts


@dataclass(frozen=True, slots=True)
class InitRequest:
    """Where to connect, or what to start.

    Attributes:
        address: None (a cluster that runs on this node, else start a local one), "auto" (such a cluster, else an
            error), "local" (always start one), or "HOST:PORT". The environment has been looked at already.
        num_cpus, num_gpus: None means detect.
        resources: custom ones that the new node has.
        object_store_memory: bytes; None means choose.
        namespace: None means a fresh anonymous one.
        logging_level: of the driver's "shoal" logger; None leaves it alone.
        env_vars: for every worker of the job.
        default_lifetime: of actors that do not say, "detached" or "non_detached".
        node_ip_address, temp_dir, spill (where objects go that do not fit): of a new cluster; None means choose.
        preload: modules that every worker of the job imports before anything else.
        logging: a packed `LoggingConfig` for the root loggers of the driver and its workers, or "".
    """

    address: str | None = None
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: Amounts = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    object_store_memory: int | None = None
    memory: int | None = None
    namespace: str | None = None
    log_to_driver: bool = True
    logging_level: int | None = None
    env_vars: Mapping[str, str] = field(default_factory=dict)
    default_lifetime: str = "non_detached"
    node_ip_address: str | None = None
    node_name: str | None = None
    temp_dir: str | None = None
    spill: tuple[str, ...] = ()
    entrypoint: str = ""
    preload: tuple[str, ...] = ()
    logging: str = ""

    def only_for_new_cluster(self) -> list[str]:
        """Names of the options that were given and that an existing cluster cannot honour any more."""
        given = {
            "num_cpus": self.num_cpus is not None,
            "num_gpus": self.num_gpus is not None,
            "resources": bool(self.resources),
            "labels": bool(self.labels),
            "object_store_memory": self.object_store_memory is not None,
            "_memory": self.memory is not None,
            "_node_name": self.node_name is not None,
            "_temp_dir": self.temp_dir is not None,
            "object_spilling_directory": bool(self.spill),
        }
        return [name for name, was_given in given.items() if was_given]

    def refuse_for_existing(self, address: str) -> None:
        """Raise ValueError when an option was given that the cluster running at `address` cannot honour."""
        names = self.only_for_new_cluster()
        if names:
            raise ValueError(
                f"init() found a running cluster at {address} and connects to it, so {', '.join(names)} cannot be set; "
                "leave them out, or say address='local' to start a cluster of your own"
            )
