"""The life of a worker process.

It is made in the zygote, once, up to the point where it would open a descriptor or start a thread; the forks of the
zygote are workers that need only do that. What the first calls in a worker would otherwise compute for themselves
(types of messages, pages that are written to) is done before the fork as well: a node starts hundreds of them a second.
"""

from __future__ import annotations

import hmac
import os
import socket
import sys
from collections.abc import Callable

import msgspec

from shoal import log_config
from shoal.node.messages import WorkerReady
from shoal.objects import serialization
from shoal.runtime import slot, worker_output
from shoal.runtime.actor_client import ActorArguments, ActorOptions
from shoal.runtime.core import CoreRuntime
from shoal.runtime.executor import Executor
from shoal.runtime.task_events import TaskEvents

serialization.preload()
for message in (ActorArguments, ActorOptions):
    msgspec.msgpack.Decoder(message)  # looks up the types of its fields once
hmac.digest(b"key", b"message", "sha256")  # finds the algorithm once


def prepare_worker(sockets: str, token: bytes) -> Callable[[bytes, socket.socket], None]:
    """What each fork of this process is to call: it serves until the agent ends the process, or is gone itself.

    Args:
        sockets: the folder where a worker listens.
    Returns:
        Takes the worker's id and its connection to the agent; returns when the worker has nothing left to do.
    """
    runtime = CoreRuntime(worker_id=b"", token=token, is_driver=False, name="worker")
    runtime.on_lost = lambda: os._exit(1)
    executor = Executor(runtime)
    if os.environ.get("SHOAL_ENABLE_TASK_EVENTS", "1").lower() not in ("0", "false"):
        executor.runner.events = TaskEvents()
    worker_output.install(executor.runner.current_name)
    log_config.name_forks(lambda: f"{runtime.name}-{os.getpid()}")
    sys.argv = ["shoal-worker"]

    def run_worker(worker_id: bytes, agent: socket.socket) -> None:
        runtime.worker_id = worker_id
        runtime.name = f"worker-{worker_id[:4].hex()}"
        slot.current = runtime
        executor.listen(f"{sockets}/w-{worker_id[:8].hex()}")
        runtime.adopt(agent, WorkerReady(os.getpid()))
        executor.run()

    return run_worker
