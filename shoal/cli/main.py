"""The application: its commands, their options and help, and the one place where errors become a line and an exit code.

Exit codes: 0 done; 1 it could not be done (one line on stderr says why); 2 the command line itself was wrong.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from shoal.exceptions import ShoalError
from shoal.session import SessionError

DEFAULT_PORT = 6380

app = typer.Typer(
    name="shoal",
    help="Start, look at and stop the nodes of a cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from shoal.version import __version__

        typer.echo(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Start, look at and stop the nodes of a cluster."""


@app.command(
    epilog="Example:  [bold]shoal start --head --num-cpus 4[/bold]   and on another machine   "
    "[bold]SHOAL_TOKEN_FILE=token shoal start --address=10.0.0.1:6380[/bold]"
)
def start(
    head: Annotated[bool, typer.Option("--head", help="Start a new cluster with this node as its head.")] = False,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Join the cluster whose head has this address.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help=f"This node's one TCP port; 0 takes a free one (default: {DEFAULT_PORT} on a head, else 0).",
        ),
    ] = None,
    node_ip_address: Annotated[
        str | None,
        typer.Option(
            metavar="IP",
            help="Address to listen on and to be reached at (default: 127.0.0.1 on a head, else the one facing it).",
        ),
    ] = None,
    num_cpus: Annotated[float | None, typer.Option(min=0, help="CPUs to offer (default: all there are).")] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs to offer (default: all there are).")] = None,
    resources: Annotated[str, typer.Option(metavar="JSON", help="Custom resources, such as '{\"shelf\": 2}'.")] = "{}",
    labels: Annotated[str, typer.Option(metavar="K=V,K=V", help="Labels that scheduling may ask for.")] = "",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to offer, such as 8GiB (default: all there is).")
    ] = None,
    object_store_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of the object store, such as 2GiB (default: 30 % of the memory)."),
    ] = None,
    memory_usage_threshold: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="Share of memory in use at which a worker is ended; 1 ends none."),
    ] = 0.95,
    object_spilling_directory: Annotated[
        str | None,
        typer.Option(
            metavar="DIR,DIR",
            help="Where objects go that do not fit: folders, or URLs of fsspec (default: a folder in --temp-dir).",
        ),
    ] = None,
    temp_dir: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder for logs and sockets (default: $SHOAL_TMPDIR or /tmp/shoal-UID)."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="Of the node's own logs: debug, info, warning, error.")] = "info",
    block: Annotated[
        bool, typer.Option("--block", help="Stay in the foreground until the node ends; Ctrl-C stops it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what a program needs to know as one line.")] = False,
) -> None:
    """Start a node on this machine: the head of a new cluster, or one that joins it."""
    from shoal.cli import nodes
    from shoal.cli.words import parse_labels, parse_resources, parse_size
    from shoal.log_config import parse_level
    from shoal.node.settings import NodeOptions

    if head == (address is not None):
        raise typer.BadParameter("say --head to start a cluster, or --address=HOST:PORT to join one")
    try:
        parse_level(log_level)
        chosen_resources, chosen_labels = parse_resources(resources), parse_labels(labels)
        memory_bytes = parse_size(memory, "--memory") if memory else None
        store_bytes = (
            parse_size(object_store_memory, "--object-store-memory") if object_store_memory is not None else None
        )
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc
    options = NodeOptions(
        head=head,
        address=address,
        port=port if port is not None else (DEFAULT_PORT if head else 0),
        node_ip=node_ip_address or ("127.0.0.1" if address is None else nodes.ip_facing(address)),
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        resources=chosen_resources,
        labels=chosen_labels,
        memory=memory_bytes,
        object_store_memory=store_bytes,
        memory_threshold=memory_usage_threshold,
        spill=[where.strip() for where in (object_spilling_directory or "").split(",") if where.strip()],
        temp_dir=temp_dir,
        log_level=log_level,
    )
    raise typer.Exit(nodes.start(options, block=block, as_json=as_json))


@app.command(epilog="Example:  [bold]shoal stop[/bold]   or, at once,   [bold]shoal stop --force[/bold]")
def stop(
    force: Annotated[bool, typer.Option("--force", "-f", help="Do not ask the nodes to end: kill them.")] = False,
    grace_period: Annotated[
        float, typer.Option("--grace-period", "-g", min=0, metavar="SECONDS", help="Time to end before being killed.")
    ] = 16.0,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the nodes that programs started for themselves with init().")
    ] = False,
    temp_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The --temp-dir that the nodes were started with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was stopped for a program to read.")] = False,
) -> None:
    """Stop the nodes that you started on this machine. Nothing to stop is fine too."""
    from shoal.cli import nodes

    raise typer.Exit(nodes.stop(temp_dir, force=force, grace_s=grace_period, everything=everything, as_json=as_json))


@app.command(
    epilog="Example:  [bold]shoal status -v[/bold]   or, for a program,   [bold]shoal status --json | jq .nodes[/bold]"
)
def status(
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Of the head (default: $SHOAL_ADDRESS, else the cluster on this machine)."
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every node, label, resource and job.")] = False,
    temp_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="The --temp-dir that this machine's node was started with.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it for a program to read.")] = False,
) -> None:
    """Show the cluster: nodes, what is used, what waits and why, actors and jobs."""
    from shoal.cli import status as face

    face.show(address or os.environ.get("SHOAL_ADDRESS") or None, temp_dir, verbose=verbose, as_json=as_json)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": []},
    epilog="Example:  [bold]shoal run train.py --epochs 3[/bold]   or   [bold]shoal run -m package.module[/bold]",
)
def run(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="SCRIPT [ARGUMENT]...", help="Or -m MODULE [ARGUMENT]...")
    ] = None,
) -> None:
    """Run a program that says `import ray` on shoal, unchanged."""
    sys.stdout.flush()
    # A process of its own kind from the first line on: its exit code, signals and tracebacks are the program's.
    os.execv(sys.executable, [sys.executable, "-m", "shoal.compat", *(arguments or ())])


_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Of the click that typer brings along under a private name."""


def main() -> None:
    """Entry point of the `shoal` command."""
    try:
        code = app(standalone_mode=False)  # else a wrong option is a box of six lines
        sys.stdout.flush()  # here, where a reader that has gone is no error
        sys.exit(code)
    except _UsageError as exc:
        _explain(exc)
        sys.exit(2)
    except (ShoalError, SessionError) as exc:
        print(f"shoal: {exc}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `shoal status | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)


def _explain(exc: Any) -> None:
    """Print a mistake in the command line as one line."""
    text = " ".join(exc.format_message().split())
    if not text:  # nothing was asked for, and the help has been shown
        return
    where = exc.ctx.command_path if exc.ctx is not None else "shoal"
    print(f"shoal: {text.rstrip('.')}; see: {where} --help", file=sys.stderr)


if __name__ == "__main__":
    main()
