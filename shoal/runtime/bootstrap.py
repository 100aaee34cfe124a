"""From an `InitRequest` to a running `CoreRuntime`: find a cluster on this machine, or start one."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from shoal import session
from shoal.control.messages import FlushLogs, JobInfo, LogLines, Notice
from shoal.exceptions import ClusterConnectionError, ClusterNotFoundError
from shoal.node.launch import NodeOptions, RunningNode, StartingNode, spawn_node
from shoal.node.messages import RegisterDriver, WorkerAddress
from shoal.objects.ids import new_worker_id
from shoal.objects.serialization import deserialize
from shoal.runtime import job_logging
from shoal.runtime.connection import Answer
from shoal.runtime.core import CoreRuntime
from shoal.runtime.driver_output import DriverOutput, OutputSettings
from shoal.runtime.init_request import InitRequest
from shoal.runtime.interface import ContextData
from shoal.runtime.link import WorkerLink
from shoal.scheduling.resources import to_floats
from shoal.version import __version__

logger = logging.getLogger(__name__)

FLUSH_LOGS_S: Final = 0.5
"""What the end of a program may wait for the last lines of its workers; usually they take a millisecond."""


class DriverRuntime(CoreRuntime):
    """A driver's runtime: what `init()` made, with the node it started, if it did."""

    def __init__(self, token: bytes) -> None:
        super().__init__(worker_id=bytes(new_worker_id()), token=token, is_driver=True, name=f"driver-{os.getpid()}")
        self.node: RunningNode | None = None
        self.lifeline = -1
        self.output: DriverOutput | None = None
        self.logging: logging.Handler | None = None
        self.describe_context = self._context
        self._used_workers = False
        self.on_notice = self._show_notice
        if os.environ.get("SHOAL_IGNORE_UNHANDLED_ERRORS", "0") in ("", "0", "false"):
            self.on_unseen_error = _show_unseen

    def _context(self) -> ContextData:
        return ContextData(
            job_id=self.job_id, node_id=self.node_id, worker_id=self.worker_id, namespace=self.job.namespace,
            node_ip=self.node_ip, control_address=self.control_address, session_dir=self.session_dir,
            env_vars=self.job.env_vars, node_labels=self.node_labels,
        )  # fmt: skip

    def _show_notice(self, notice: Notice) -> None:
        level = {"info": logging.INFO, "error": logging.ERROR}.get(notice.level, logging.WARNING)
        logger.log(level, "%s", notice.text)

    def link_to(self, address: WorkerAddress) -> WorkerLink:
        self._used_workers = True
        return super().link_to(address)

    def show_progress(self, line: str) -> None:
        if self.output is None:  # what workers print is not shown, but this is the driver's own
            self.output = DriverOutput(self.node_ip, OutputSettings.from_environment(os.environ))
        self.output.show([LogLines(self.job_id, self.worker_id, self.node_ip, 0, "", "err", [line])])

    def _flush_logs(self) -> None:
        """Wait until what workers have printed so far is here; nothing to wait for when none ever worked."""
        if self.output is None or not self._used_workers or self.closed:
            return
        flushed = Answer()
        self.reactor.call_soon(self.mail_control, FlushLogs(), flushed.set)
        self.wait_answer(flushed, FLUSH_LOGS_S)

    def shutdown(self) -> None:
        try:
            self._flush_logs()
        finally:
            self._leave()

    def _leave(self) -> None:
        super().shutdown()
        if self.logging is not None:
            job_logging.remove(self.logging)
        if self.output is not None:
            self.output.close()
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1
        if self.node is not None:
            self.node.stop()

    def forget_in_child(self) -> None:
        super().forget_in_child()
        if self.lifeline >= 0:
            os.close(self.lifeline)  # the node ends with its driver, not with a child of it
            self.lifeline = -1


def _show_unseen(flat: bytes) -> None:
    try:
        error = deserialize(flat)
    except Exception as exc:  # noqa: BLE001 # its class cannot be imported here
        error = f"(it cannot be read here: {exc})"
    logger.error("nobody got this error (SHOAL_IGNORE_UNHANDLED_ERRORS=1 hides such): %s", error)


def connect(request: InitRequest, made: Callable[[DriverRuntime], object]) -> DriverRuntime:
    """Carry out `init()`.

    Args:
        made: given the runtime before it connects: the caller shuts that down if this raises, or if it is interrupted.
    Raises:
        ClusterNotFoundError: "auto", and no cluster runs on this machine.
        ClusterConnectionError, AuthenticationError, VersionMismatchError, ValueError, ShoalError.
    """
    base = session.base_folder(request.temp_dir)
    address = request.address
    if address == "local":
        return _start_local(request, made)
    if address in (None, "auto"):
        found = session.find_cluster(base)
        if found is None:
            if address == "auto":
                raise ClusterNotFoundError("no cluster runs on this machine; start one with: shoal start --head")
            return _start_local(request, made)
    else:
        assert address is not None
        found = session.find_node(base, address)
        if found is None:
            found = _find_member(base, address)
    request.refuse_for_existing(found.record.control_address)
    token = found.folder.read_token()
    runtime = DriverRuntime(token.encode())
    made(runtime)
    return _join(runtime, request, found.record)


def _find_member(base: os.PathLike[str], address: str) -> session.LiveNode:
    """A node of this machine that belongs to the cluster whose head is at `address`."""
    nodes = session.live_nodes(base)  # type: ignore[arg-type]
    for node in nodes:
        if address in (node.record.control_address, node.record.address):
            return node
    hint = f"start a node here that joins it first: shoal start --address={address}"
    raise ClusterConnectionError(f"no node on this machine belongs to a cluster at {address}; {hint}")


def _start_local(request: InitRequest, made: Callable[[DriverRuntime], object]) -> DriverRuntime:
    """A cluster of one node that ends with this process, however that ends."""
    lifeline_in, lifeline_out = os.pipe2(os.O_CLOEXEC)
    starting: StartingNode | None = None
    runtime: DriverRuntime | None = None
    try:
        try:
            starting = spawn_node(
                NodeOptions(
                    head=True,
                    node_ip=request.node_ip_address or "127.0.0.1",
                    num_cpus=request.num_cpus,
                    num_gpus=request.num_gpus,
                    resources=to_floats(request.resources),
                    labels=dict(request.labels),
                    memory=request.memory,
                    object_store_memory=request.object_store_memory,
                    temp_dir=request.temp_dir,
                    spill=list(request.spill),
                    private=True,
                    lifeline_fd=lifeline_in,
                )
            )
        finally:
            os.close(lifeline_in)
        node = starting.wait_ready()
        runtime = DriverRuntime(node.folder.read_token().encode())
        runtime.node, runtime.lifeline = node, lifeline_out
        made(runtime)
        return _join(runtime, request, node.record)
    except BaseException:
        if runtime is not None:
            runtime.shutdown()
        else:
            os.close(lifeline_out)  # the node, if it runs, ends with it
            if starting is not None and starting.process.poll() is None:
                starting.process.wait()
        raise


def _join(runtime: DriverRuntime, request: InitRequest, record: session.NodeRecord) -> DriverRuntime:
    runtime.control_address = record.control_address
    if request.logging:
        runtime.logging = job_logging.configure(request.logging, runtime.context)
    if request.log_to_driver:
        settings = OutputSettings.from_environment(os.environ)
        if job_logging.is_json(request.logging):
            settings = replace(settings, prefix=False, dedup=False)  # the lines are for a program to read
        runtime.output = DriverOutput(record.address.rpartition(":")[0].strip("[]"), settings)
        runtime.on_logs = runtime.output.show
    if request.logging_level is not None:
        logging.getLogger("shoal").setLevel(request.logging_level)
    job = JobInfo(
        b"", request.namespace or "", runtime.worker_id, bytes.fromhex(record.node_id), os.getpid(), request.entrypoint,
        [os.path.abspath(path) for path in sys.path], os.getcwd(), dict(request.env_vars), time.time(),
        default_lifetime=request.default_lifetime, log_to_driver=request.log_to_driver,
        preload=list(request.preload), logging=request.logging,
    )  # fmt: skip
    register = RegisterDriver(
        worker_id=runtime.worker_id, pid=os.getpid(), job=job, version=__version__,
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
    )  # fmt: skip
    runtime.start(record.agent_socket, register)
    return runtime
