"""The life of a worker process, from the zygote's fork to its end."""

from __future__ import annotations

import logging
import os
import sys

from shoal import log_config
from shoal.node.messages import RegisterProcess
from shoal.objects import serialization
from shoal.runtime import slot, worker_output
from shoal.runtime.core import CoreRuntime
from shoal.runtime.executor import Executor
from shoal.version import __version__

serialization.preload()  # once, in the zygote: workers are forked with it


def run_worker(worker_id: bytes, agent_socket: str, token: bytes, logs: str) -> None:
    """Serve calls until the agent ends this process, or is gone itself."""
    _forget_logging_of_parent()
    log_config.configure(f"worker-{worker_id[:4].hex()}-{os.getpid()}", logs, own_process=False)
    runtime = CoreRuntime(worker_id=worker_id, token=token, is_driver=False, name=f"worker-{worker_id[:4].hex()}")
    runtime.on_lost = lambda: os._exit(1)
    socket_path = os.path.join(os.path.dirname(agent_socket), f"w-{worker_id[:8].hex()}")
    executor = Executor(runtime, socket_path)
    worker_output.install(executor.runner.current_name)
    slot.current = runtime
    sys.argv = ["shoal-worker"]
    runtime.start(
        agent_socket,
        RegisterProcess(
            worker_id=worker_id, pid=os.getpid(), socket_path=socket_path, version=__version__,
            python=".".join(map(str, sys.version_info[:2])),
        ),
    )  # fmt: skip
    executor.run()


def _forget_logging_of_parent() -> None:
    """The zygote's root logger is its own; user code finds logging as a fresh interpreter has it."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        log_config.remove(handler)
    root.setLevel(logging.WARNING)
