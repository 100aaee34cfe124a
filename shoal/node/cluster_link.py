"""The agent's connection to control: joining, what this node knows of the others, and its own reports."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import socket
import time
from collections.abc import Callable
from typing import Any, Final

from shoal.control import messages as control
from shoal.control.messages import JobInfo, NodeInfo
from shoal.exceptions import ShoalError
from shoal.node.settings import AgentSettings
from shoal.rpc import aio
from shoal.rpc.frames import make_decoder
from shoal.rpc.messages import Message, Request
from shoal.scheduling.views import NodeView
from shoal.version import __version__

logger = logging.getLogger(__name__)

REPORT_S: Final = 0.02
"""Changes of this node travel to control at most this often."""
JOIN_S: Final = 10.0

_decoder = make_decoder(control.ControlMessage)


class ClusterLink:
    """See the module.

    Args:
        hear: gets what control says, but for nodes.
        node_gone: a node that was known here is dead or has left.
        nodes_changed: called after rows of other nodes changed.
        measure: what this node reports now: the fields of `NodeReport`.
        lost: called with the reason when the connection ended without our doing.
    """

    def __init__(
        self,
        settings: AgentSettings,
        hear: Callable[[Any], None],
        node_gone: Callable[[NodeInfo], None],
        nodes_changed: Callable[[], None],
        measure: Callable[[], tuple[Any, ...]],
        lost: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._hear_rest = hear
        self._node_gone = node_gone
        self._nodes_changed = nodes_changed
        self._measure = measure
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._connection: aio.Connection | None = None
        self._nodes: dict[bytes, NodeInfo] = {}
        self.views: tuple[NodeView, ...] = ()  # of all nodes that are alive, this one included
        self._jobs: dict[bytes, asyncio.Future[JobInfo]] = {}
        self._report_due = False
        self._reported: tuple[Any, ...] = ()

    async def join(self) -> None:
        """Become part of the cluster.

        Raises:
            ShoalError: the head is not there, does not answer, or does not want this node.
        """
        settings = self._settings
        where = f"unix:{settings.control_socket}" if settings.control_socket else settings.control_address
        name = f"agent-{settings.node_id.hex()[:8]}"
        connection = await aio.connect(
            where, settings.token, _decoder, target="control", name=name, on_message=self._hear
        )
        connection.on_close = lambda reason: self._lost(str(reason or "it was closed"))
        self._connection = connection
        info = NodeInfo(
            settings.node_id, settings.address, socket.gethostname(), settings.total, settings.total, settings.labels,
            is_head=settings.is_head, store_capacity=settings.store_bytes, pid=os.getpid(), started_unix_s=time.time(),
        )  # fmt: skip
        request = control.RegisterNode(node=info, python=platform.python_version(), version=__version__)
        try:
            answer = await connection.request(request, JOIN_S)
        except TimeoutError as exc:
            raise ShoalError(f"the head at {where} did not answer within {JOIN_S:.0f} s") from exc
        self._take_rows(answer.nodes)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.on_close = lambda _: None
            self._connection.close()

    def tell(self, message: Message) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def ask(self, request: Request) -> Any:
        """Raises ShoalError: control said no, or cannot be reached."""
        if self._connection is None:
            raise ShoalError("this node has lost its cluster")
        return await self._connection.request(request)

    # --------------------------------------------------------------------------------------------------- nodes

    def address_of(self, node_id: bytes) -> str | None:
        """Of a node that is alive as far as is known here."""
        info = self._nodes.get(node_id)
        return info.address if info is not None else None

    def _hear(self, message: Any) -> None:
        if isinstance(message, control.NodesChanged):
            self._take_rows(message.nodes)
        else:
            self._hear_rest(message)

    def _take_rows(self, rows: list[NodeInfo]) -> None:
        for info in rows:
            if info.alive:
                self._nodes[info.node_id] = info
            elif self._nodes.pop(info.node_id, None) is not None:
                self._node_gone(info)
        # This node's own row is the scheduler's; control's copy of it is only an echo.
        self.views = tuple(info.view() for info in self._nodes.values())
        self._nodes_changed()

    # ---------------------------------------------------------------------------------------------------- jobs

    async def job(self, job_id: bytes) -> JobInfo:
        """Raises ShoalError when control does not know the job or it has ended."""
        known = self._jobs.get(job_id)
        if known is None or (known.done() and (known.cancelled() or known.exception() is not None)):
            known = self._jobs[job_id] = self._loop.create_task(self._ask_job(job_id), name="ask-job")
        return await asyncio.shield(known)

    async def _ask_job(self, job_id: bytes) -> JobInfo:
        answer: control.JobRegistered = await self.ask(control.GetJob(job_id=job_id))
        return answer.job

    def remember_job(self, job: JobInfo) -> None:
        known = self._jobs[job.job_id] = self._loop.create_future()
        known.set_result(job)

    def forget_job(self, job_id: bytes) -> None:
        self._jobs.pop(job_id, None)

    # ------------------------------------------------------------------------------------------------- reports

    def report_soon(self) -> None:
        """Something that control should know may have changed."""
        if not self._report_due:
            self._report_due = True
            self._loop.call_later(REPORT_S, self.report)

    def report(self, *, beat: bool = False) -> None:
        """Tell control how this node is; without `beat`, only if that has changed."""
        self._report_due = False
        now = self._measure()
        if beat or now != self._reported:
            self._reported = now
            self.tell(control.NodeReport(*now))
