"""Starting and stopping the nodes of this machine.

A node is its supervisor: whoever ends that ends the node. `stop` finds supervisors through the records in the session
folder, never by process names, so it cannot hit another user's node or another program. It holds each one by a pidfd:
the kernel then keeps the pid from meaning another process between looking and signalling.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Final

import typer

from shoal import session
from shoal.exceptions import ShoalError
from shoal.node.launch import NodeOptions, RunningNode, start_node
from shoal.rpc.sockets import split_address

KILL_WAIT_S: Final = 10.0
"""SIGKILL works at once, except on a process that waits for a broken disk."""


def ip_facing(address: str) -> str:
    """The address of this machine that the head at `address` sees; loopback for a head on loopback.

    Raises:
        ShoalError: `address` is not one, or its name or network is not known here.
    """
    host, port = split_address(address)
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # sends nothing: it only makes the kernel choose a route
            return str(probe.getsockname()[0])
    except OSError as exc:
        raise ShoalError(f"cannot reach {address}: {exc.strerror or exc}") from exc


# ----------------------------------------------------------------------------------------------------------- start


def start(options: NodeOptions, *, block: bool, as_json: bool) -> int:
    """Start a node and tell the user what to do next. Returns the exit code."""
    lifeline = os.pipe() if block else None  # a foreground node ends with us, even when we are killed
    if lifeline is not None:
        import msgspec

        options = msgspec.structs.replace(options, lifeline_fd=lifeline[0])
    node = start_node(options)
    asked: list[int] = []
    if lifeline is not None:
        os.close(lifeline[0])
        asked = _pass_signals_on(node)  # before anybody can know that the node is up
    if as_json:
        typer.echo(json.dumps(facts(node)))
    else:
        typer.echo(next_steps(node, options, block=block))
    sys.stdout.flush()
    return _stay(node, asked) if block else 0


def facts(node: RunningNode) -> dict[str, object]:
    """What a program that starts nodes needs to know."""
    record = node.record
    return {
        "address": record.address,
        "control_address": record.control_address,
        "node_id": record.node_id,
        "is_head": record.is_head,
        "pid": record.supervisor_pid,
        "token_file": str(node.folder.token_path),
        "logs": str(node.folder.logs),
    }


def next_steps(node: RunningNode, options: NodeOptions, *, block: bool) -> str:
    """The text after a start: where things are, and the commands that make sense now."""
    record, token = node.record, shlex.quote(str(node.folder.token_path))
    lines = [
        f"{'Head' if record.is_head else 'Node'} started at {record.address}",
        f"  logs: {node.folder.logs}",
    ]
    stop_command = (
        "Ctrl-C"
        if block
        else "shoal stop" + (f" --temp-dir {shlex.quote(options.temp_dir)}" if options.temp_dir else "")
    )
    if not record.is_head:
        return "\n".join([*lines, f"  cluster: {record.control_address}", f"  to stop it: {stop_command}"])
    lines += [
        "",
        "Add a node on this machine, or on another one that has a copy of the token file:",
        f"  SHOAL_TOKEN_FILE={token} shoal start --address={record.address}",
        "Connect from Python:",
        "  import shoal",
        f'  shoal.init("{record.address}")    # on any machine with a node of the cluster; here shoal.init() finds it',
        "See what it does, and stop it:",
        "  shoal status" + (f" --temp-dir {shlex.quote(options.temp_dir)}" if options.temp_dir else ""),
        f"  {stop_command}",
    ]
    if _is_loopback(options.node_ip):
        lines += ["", "Only this machine can reach it; to let others in, start it with --node-ip-address."]
    return "\n".join(lines)


def _is_loopback(ip: str) -> bool:
    return ip.startswith("127.") or ip in ("::1", "localhost")


def _pass_signals_on(node: RunningNode) -> list[int]:
    """From now on SIGINT, SIGTERM or SIGHUP ends the node, a second one kills it; the list notes which arrived."""
    asked: list[int] = []

    def end(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        node.process.send_signal(signal.SIGTERM if len(asked) == 1 else signal.SIGKILL)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    return asked


def _stay(node: RunningNode, asked: list[int]) -> int:
    """Wait in the foreground until the node has ended."""
    code = node.process.wait()
    if asked or code == 0:  # `shoal stop` asked it, from another terminal
        typer.echo("Node stopped.")
        return 0
    typer.echo(f"shoal: the node ended by itself (code {code}); see {node.folder.logs}", err=True)
    return 1


# ------------------------------------------------------------------------------------------------------------ stop


def stop(temp_dir: str | None, *, force: bool, grace_s: float, everything: bool, as_json: bool) -> int:
    """Stop this user's nodes on this machine and say which. Returns the exit code: 1 when one would not end."""
    base = session.base_folder(temp_dir)
    nodes = session.live_nodes(base)
    chosen = [node for node in nodes if everything or not node.record.private]
    outcome = end_nodes(chosen, 0.0 if force else grace_s)
    session.sweep(base)
    if as_json:
        rows = [{"address": node.record.address, "outcome": how} for node, how in zip(chosen, outcome, strict=True)]
        typer.echo(json.dumps({"stopped": rows, "left": len(nodes) - len(chosen)}))
    else:
        for node, how in zip(chosen, outcome, strict=True):
            kind = "head" if node.record.is_head else "node"
            typer.echo(f"{kind} {node.record.address}: {how}  (logs: {node.folder.logs})")
        if not chosen:
            typer.echo("No node of yours runs on this machine.")
        if len(nodes) > len(chosen):
            typer.echo(f"{len(nodes) - len(chosen)} more belong to running programs; --all stops those too.")
    return 1 if "still there" in outcome else 0


def end_nodes(nodes: Sequence[session.LiveNode], grace_s: float) -> list[str]:
    """End nodes, heads last, so that the others can still say good-bye. With `grace_s` 0 they are killed at once.

    Returns:
        For each node "stopped", "killed" (it did not end in time) or "still there".
    """
    outcome = ["stopped"] * len(nodes)
    deadline = time.monotonic() + grace_s
    for heads in (False, True):
        group = [number for number, node in enumerate(nodes) if node.record.is_head == heads]
        held = {number: fd for number in group if (fd := _hold(nodes[number].record)) is not None}
        try:
            if grace_s > 0:
                for fd in held.values():
                    _signal(fd, signal.SIGTERM)
                _wait_ended(held, deadline)
            for number in _running(held):
                outcome[number] = "killed"
                _signal(held[number], signal.SIGKILL)
            _wait_ended(held, time.monotonic() + KILL_WAIT_S)
            for number in _running(held):
                outcome[number] = "still there"
        finally:
            for fd in held.values():
                os.close(fd)
    return outcome


def _hold(record: session.NodeRecord) -> int | None:
    """A pidfd of the node's supervisor, or None when it has ended."""
    try:
        fd = os.pidfd_open(record.supervisor_pid)
    except ProcessLookupError:
        return None
    if record.is_alive():
        return fd
    os.close(fd)  # the pid was handed out again
    return None


def _signal(fd: int, number: signal.Signals) -> None:
    try:
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:  # it has ended meanwhile, which is what we want
        return


def _running(held: dict[int, int]) -> list[int]:
    """Those of `held` whose process runs; a pidfd becomes readable when it ends."""
    poll = select.poll()
    for fd in held.values():
        poll.register(fd, select.POLLIN)
    ended = {fd for fd, _ in poll.poll(0)}
    return [number for number, fd in held.items() if fd not in ended]


def _wait_ended(held: dict[int, int], deadline: float) -> None:
    """Wait until all have ended or `deadline` (of time.monotonic) is over."""
    while running := _running(held):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return
        poll = select.poll()
        for number in running:
            poll.register(held[number], select.POLLIN)
        poll.poll(left_s * 1000)
