"""One machine's part in the cluster: its processes, resources, store, and the agent that speaks for them.

Owned here: workers, leases, the arena's contents, the directory of objects that have their home here, logs, the port.
Who asks: drivers and workers of the node, owners elsewhere, other agents (`messages.py`), the CLI (`launch.py`).
It asks: control (`shoal.control.messages`). No process of this room runs user code; that is `shoal.runtime`'s.

    processes   launch, supervisor, zygote, processes, settings
    the agent   agent (connections, dispatch), cluster_link, peers
    leases      pure: leases, lease_decisions, lease_queue, resource_books, usage, cluster_view, starting;
                shells: lease_service, workers, actors
    objects     directory, store: pure;  object_manager, transfer, spiller, spill_files: shells
    logs        logs
    memory      memory_watch
"""
