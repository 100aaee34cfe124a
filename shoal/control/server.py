"""Control as a process: connections, one timer, and the state machine between them.

Every connection is a peer with a number. What it says goes into `ControlState.handle`, what comes out is sent; a timer
runs `tick` at the machine's deadline and at no other time, so an idle control process sleeps. Connections arrive at the
Unix socket of the node: from processes and tools of this machine directly, and from elsewhere through the head's agent,
which accepts on the node's one port, checks the token and hands the open socket over.

Order is kept per peer: messages are handled as they are read and answered in that order. Nothing here awaits while the
state is between two states.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import signal
import time
from collections.abc import Callable, Iterable

from shoal.control.mail import Send
from shoal.control.messages import AgentMessage, ProcessMessage
from shoal.control.settings import ControlSettings
from shoal.control.state import ControlState
from shoal.rpc.aio import Connection, Listener, listen_local
from shoal.rpc.messages import Hello, Message

__all__ = ["ControlServer", "ControlSettings", "run_control"]

logger = logging.getLogger(__name__)

CLUSTER_ID_BYTES = 16
GC_THRESHOLDS = (50_000, 20, 100)
"""The tables are large, long-lived and without cycles: at Python's own thresholds, walking them again and again to find
nothing costs as much as all decisions together when many actors are created."""


class ControlServer:
    """Serves one cluster. Must be made inside a running event loop."""

    def __init__(self, token: bytes, settings: ControlSettings) -> None:
        self._token = token
        self._loop = asyncio.get_running_loop()
        self._state = ControlState(
            settings,
            cluster_id=os.urandom(CLUSTER_ID_BYTES),
            rng=random.Random(os.urandom(16)),
            now=self._loop.time(),
            unix_s=time.time(),
        )
        self._peers: dict[int, Connection] = {}
        self._last_peer = 0
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0  # kept here: uvloop's handle of a deadline that has passed does not say

    async def serve(self, unix_path: str, ready: Callable[[], None], stop: asyncio.Event) -> None:
        """Listen at `unix_path`, call `ready`, and serve until `stop` is set; then tell every node to end.

        Raises:
            ShoalError: the socket cannot be made.
        """
        listener = await listen_local(
            unix_path, self._token, AgentMessage | ProcessMessage, self._accept, name="control", handoff=True
        )
        try:
            ready()
            await stop.wait()
        finally:
            self._close(listener, unix_path)
        # Closing connections write what is pending; wait for the last of them, but not for a peer that does not read.
        closing = [connection.closed for connection in self._peers.values()]
        if closing:
            await asyncio.wait(closing, timeout=1.0)

    def _close(self, listener: Listener, unix_path: str) -> None:
        listener.close()
        if self._timer is not None:
            self._timer.cancel()
        self._send(self._state.shutdown("the head node is stopping"))
        for connection in self._peers.values():
            connection.on_message = lambda _: None
            connection.on_close = lambda _: None
            connection.close()
        try:
            os.unlink(unix_path)
        except FileNotFoundError:
            logger.debug("the socket was removed before us path=%s", unix_path)

    def _accept(self, connection: Connection, hello: Hello) -> None:
        self._last_peer += 1
        peer = self._last_peer
        self._peers[peer] = connection

        def on_message(message: Message) -> None:
            try:
                out = self._state.handle(peer, message, self._loop.time())
            finally:
                self._arm()
            self._send(out)

        def on_close(reason: Exception | None) -> None:
            del self._peers[peer]
            text = f"its connection broke ({reason})" if reason is not None else "its connection closed"
            self._send(self._state.disconnected(peer, text, self._loop.time()))
            self._arm()

        connection.on_message = on_message
        connection.on_close = on_close
        logger.debug("connected peer=%s name=%s", peer, hello.name)

    def _send(self, out: Iterable[Send]) -> None:
        peers = self._peers
        for peer, message in out:
            connection = peers.get(peer)
            if connection is not None:  # else it went away in this very moment; `disconnected` follows or has been
                connection.send(message)

    def _arm(self) -> None:
        deadline = self._state.deadline()
        timer = self._timer
        if timer is not None:
            if self._timer_at <= deadline:
                return  # early is fine: the tick arms the next one
            timer.cancel()
        self._timer = self._loop.call_at(deadline, self._tick) if deadline != float("inf") else None
        self._timer_at = deadline

    def _tick(self) -> None:
        self._timer = None
        try:
            self._send(self._state.tick(self._loop.time()))
        finally:
            self._arm()


def run_control(token: bytes, unix_path: str, settings: ControlSettings, on_ready: Callable[[], None]) -> None:
    """Be the control process until SIGTERM. SIGINT is ignored: a Ctrl-C at the terminal is the supervisor's to handle.

    Args:
        unix_path: where to listen; replaced if it exists, removed at the end.
        on_ready: called once, when connections are accepted.
    Raises:
        ShoalError: the socket cannot be made.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        await ControlServer(token, settings).serve(unix_path, on_ready, stop)

    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # absent on some platforms, where asyncio's own loop serves
    except ImportError:
        return None
    return uvloop.new_event_loop
