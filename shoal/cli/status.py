"""`shoal status`: one question to control, one picture of the answer, for people or for programs."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

import typer

from shoal import session
from shoal.cli.words import size_text, span_text
from shoal.control.messages import GetStatus, NodeInfo, ProcessReply, StatusReply
from shoal.exceptions import ClusterNotFoundError
from shoal.scheduling.bundle_names import MARK, parse_name
from shoal.scheduling.labels import NODE_ID
from shoal.scheduling.resources import BYTE_RESOURCES, describe, to_floats

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

TIMEOUT_S: Final = 10.0
NODES_SHOWN: Final = 30
DEMANDS_SHOWN: Final = 20


def show(address: str | None, temp_dir: str | None, *, verbose: bool, as_json: bool) -> None:
    """Ask and print.

    Raises:
        ShoalError, SessionError: no cluster, no token, wrong address or token; one line.
    """
    where, token = find_control(address, temp_dir)
    status = ask(where, token, verbose)
    if as_json:
        typer.echo(json.dumps(as_data(status, where)))
        return
    from rich.console import Console

    console = Console(highlight=False)
    for part in picture(status, where, time.time(), verbose=verbose):
        print_part(console, part)


def find_control(address: str | None, temp_dir: str | None) -> tuple[str, str]:
    """(address of control, token): of the cluster named by `address`, or of the one that has a node on this machine.

    Raises:
        ClusterNotFoundError: none was named and none runs here. SessionError: no token for it.
    """
    base = session.base_folder(temp_dir)
    if address is None or address == "auto":
        local = session.find_cluster(base)
        if local is None:
            raise ClusterNotFoundError("no cluster runs on this machine; start one, or say --address=HOST:PORT")
    else:
        local = session.find_node(base, address)
        if local is None:
            return address, session.load_token()
    # Any node of the cluster may be named on its own machine; control answers at the head.
    return local.record.control_address, session.load_token(folder=local.folder)


def ask(address: str, token: str, detail: bool) -> StatusReply:
    """One connection, one question."""
    import asyncio

    from shoal.rpc.aio import connect

    async def ask_once() -> StatusReply:
        connection = await connect(
            address, token.encode(), ProcessReply, target="control", name="shoal status", timeout_s=TIMEOUT_S
        )
        try:
            answer: StatusReply = await connection.request(GetStatus(detail=detail), TIMEOUT_S)
            return answer
        finally:
            connection.close()

    return asyncio.run(ask_once())


def as_data(status: StatusReply, address: str) -> dict[str, Any]:
    """The same picture as plain data; amounts are floats, memory is in bytes, times are Unix seconds."""
    return {
        "address": address,
        "cluster_id": status.cluster_id.hex(),
        "version": status.version,
        "started_unix_s": status.started_unix_s,
        "resources": {"total": to_floats(_sum(status, "total")), "available": to_floats(_sum(status, "available"))},
        "nodes": [
            {
                "node_id": node.node_id.hex(),
                "address": node.address,
                "hostname": node.hostname,
                "state": state_of(node),
                "is_head": node.is_head,
                "death_reason": node.death_reason,
                "labels": node.labels,
                "total": to_floats(node.total),
                "available": to_floats(node.available),
                "store_used_bytes": node.store_used,
                "store_spilled_bytes": node.store_spilled,
                "store_capacity_bytes": node.store_capacity,
                "pid": node.pid,
                "started_unix_s": node.started_unix_s,
            }
            for node in status.nodes
        ],
        "demands": [
            {
                "name": demand.name,
                "resources": to_floats(demand.resources),
                "count": demand.count,
                "reason": {"code": demand.reason.code, "text": demand.reason.text},
                "since_unix_s": demand.since_unix_s,
                "job_id": demand.job_id.hex(),
                "placement_group": demand.group.hex() or None,
            }
            for demand in status.demands
        ],
        "actors": status.actors,
        "jobs": [
            {
                "job_id": job.job_id.hex(),
                "namespace": job.namespace,
                "entrypoint": job.entrypoint,
                "driver_pid": job.driver_pid,
                "driver_node": job.driver_node.hex(),
                "started_unix_s": job.started_unix_s,
                "ended_unix_s": job.ended_unix_s or None,
            }
            for job in status.jobs
        ],
    }


def state_of(node: NodeInfo) -> str:
    if not node.alive:
        return "dead"
    return "draining" if node.draining else "alive"


def picture(status: StatusReply, address: str, now_unix_s: float, *, verbose: bool) -> list[RenderableType]:
    """What a person sees, top to bottom; `now_unix_s` for "since ..."."""
    alive = [node for node in status.nodes if node.alive]
    dead = [node for node in status.nodes if not node.alive]
    running = [job for job in status.jobs if not job.ended_unix_s]
    started = f", up {span_text(now_unix_s - status.started_unix_s)}" if status.started_unix_s else ""
    parts: list[RenderableType] = [
        f"[bold]shoal[/bold] {status.version} at {address}{started}",
        "",
        _nodes_table(alive if verbose else alive[:NODES_SHOWN]),
    ]
    if verbose:
        parts += [_details(node, now_unix_s) for node in alive]
    if len(alive) > NODES_SHOWN and not verbose:
        parts.append(f"[dim]... and {len(alive) - NODES_SHOWN} more nodes (-v shows all)[/dim]")
    parts += [
        f"[red]dead[/red] {_id(node.node_id)} {node.address}: {_safe(node.death_reason or 'no reason known')}"
        for node in (dead if verbose else dead[-5:])
    ]
    if alive:
        parts.append(f"Used in all: {_safe(_used(_sum(status, 'total'), _sum(status, 'available')))}")
    parts.append("")
    if status.demands:
        parts.append(_demands_table(status, now_unix_s, verbose))
        if len(status.demands) > DEMANDS_SHOWN and not verbose:
            parts.append(f"[dim]... and {len(status.demands) - DEMANDS_SHOWN} more kinds (-v shows all)[/dim]")
    else:
        parts.append("Nothing waits.")
    actors = ", ".join(f"{count} {state}" for state, count in sorted(status.actors.items()) if count)
    parts.append(f"Actors: {actors or 'none'}")
    if not running:
        parts.append("Jobs: none runs")
    for job in running if verbose else running[-10:]:
        since = span_text(now_unix_s - job.started_unix_s)
        entry = _safe(job.entrypoint or "a driver")
        space = f", namespace {_safe(job.namespace)}" if verbose else ""
        parts.append(f"Job {job.job_id.hex()}: {entry} (pid {job.driver_pid}{space}), {since}")
    return parts


def print_part(console: Console, part: RenderableType) -> None:
    console.print(part, soft_wrap=isinstance(part, str))


def _nodes_table(nodes: list[NodeInfo]) -> RenderableType:
    """Narrow enough for 80 columns: what is rarely looked at is in `_details`."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("node", "address", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("CPU used", justify="right", no_wrap=True)
    table.add_column("store used", justify="right", no_wrap=True)
    table.add_column("others used")
    for node in nodes:
        state = state_of(node)
        color = "green" if state == "alive" else "yellow"
        others = {name: amount for name, amount in node.total.items() if name not in BYTE_RESOURCES | {"CPU"}}
        table.add_row(
            _id(node.node_id),
            node.address,
            f"[{color}]{state}[/{color}]" + (" (head)" if node.is_head else ""),
            _fraction(node.total, node.available, "CPU"),
            f"{size_text(node.store_used)}/{size_text(node.store_capacity)}"
            + (f", {size_text(node.store_spilled)} on disk" if node.store_spilled else ""),
            _safe(_used(others, node.available)),
        )
    return table


def _details(node: NodeInfo, now_unix_s: float) -> str:
    marks = ", ".join(name for name in sorted(node.total) if name.startswith("node:"))
    labels = {name: value for name, value in node.labels.items() if name != NODE_ID}  # the id is there already
    facts = [
        f"host {node.hostname}, agent's pid {node.pid}, up {span_text(now_unix_s - node.started_unix_s)}",
        f"  used {_used(node.total, node.available)}" + (f"; {marks}" if marks else ""),
        f"  labels {', '.join(f'{key}={value}' for key, value in sorted(labels.items())) or 'none'}",
        f"  id {node.node_id.hex()}",
    ]
    return f"[bold]{_id(node.node_id)}[/bold] " + "\n".join(map(_safe, facts))


def _demands_table(status: StatusReply, now_unix_s: float, verbose: bool) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Waiting", title_justify="left", title_style="bold")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("each needs")
    table.add_column("since", justify="right", no_wrap=True)
    table.add_column("because")
    for demand in status.demands if verbose else status.demands[:DEMANDS_SHOWN]:
        color = "red" if demand.reason.code == "infeasible" else "yellow"
        table.add_row(
            _safe(demand.name or "task"),
            str(demand.count),
            _safe(describe(demand.resources)),
            span_text(now_unix_s - demand.since_unix_s),
            f"[{color}]{_safe(demand.reason.text)}[/{color}]",
        )
    return table


def _used(total: dict[str, int], available: dict[str, int]) -> str:
    """ "1/4 GPU, 2 GiB/8 GiB memory"; without the marks that every node has (`node:...`).

    Of bundles of placement groups it says what is set aside, which counts as used, and how much of that is in use.
    """
    names = sorted(total, key=lambda name: (name != "CPU", name != "GPU", name))
    plain = [name for name in names if not name.startswith("node:") and parse_name(name) is None]
    text = ", ".join(f"{_fraction(total, available, name)} {name}" for name in plain)
    inside: tuple[dict[str, int], dict[str, int]] = {}, {}
    for name in names:
        part = parse_name(name)
        if part is not None and part.bundle < 0 and part.resource != MARK:
            for sums, amounts in zip(inside, (total, available), strict=True):
                sums[part.resource] = sums.get(part.resource, 0) + amounts.get(name, 0)
    if inside[0]:
        text += f" (in placement groups: {_used(*inside)})"
    return text


def _fraction(total: dict[str, int], available: dict[str, int], name: str) -> str:
    most, left = to_floats(total).get(name, 0.0), to_floats(available).get(name, 0.0)
    used = max(0.0, round(most - left, 4))
    if name in BYTE_RESOURCES:
        return f"{size_text(used)}/{size_text(most)}"
    return f"{used:g}/{most:g}"


def _sum(status: StatusReply, which: str) -> dict[str, int]:
    amounts: dict[str, int] = {}
    for node in status.nodes:
        if node.alive:
            for name, amount in (node.total if which == "total" else node.available).items():
                amounts[name] = amounts.get(name, 0) + amount
    return amounts


def _id(node_id: bytes) -> str:
    return node_id.hex()[:8]


def _safe(text: str) -> str:
    """Text of users, shown as it is: not as markup, and without control characters that would steer the terminal."""
    from rich.markup import escape

    return escape("".join(char if char.isprintable() else "?" for char in text))
