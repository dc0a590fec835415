"""The commands of ``shoal``, but those that have a name of their own: ``job``, ``logs``, ``security``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from shoal.cli.flags import (
    Format,
    Output,
    end_incomplete,
    json_object,
    on_cluster,
    out,
)
from shoal.cli.jobs import job
from shoal.cli.listing import Listed, fetch_timeline, filter_of, print_rows, read_rows
from shoal.cli.logs import logs
from shoal.cli.memory import print_memory
from shoal.cli.reasons import print_reasons
from shoal.cli.security import security
from shoal.cli.status import print_status
from shoal.cluster import HostInfo, HostOptions, check_metrics_port, read_current, start_host, stop_host
from shoal.draining import drain as drain_nodes
from shoal.memory import read_memory
from shoal.reasons import read_reasons
from shoal.rows import MOST_ROWS
from shoal.status import Target, read_status
from shoal_core import __version__
from shoal_core.bus.credentials import redacted
from shoal_core.protocol.errors import ConnectionFailedError, ShoalError
from shoal_core.protocol.storage import MOST_LISTED_OBJECTS

app = typer.Typer(
    name="shoal",
    help="Distributed Python over NATS: a local cluster, its state, and its services.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

SERVICES = {
    "gcs": "The control store: nodes, jobs, exported functions.",
    "scheduler": "Finds nodes for what waits.",
    "worker": "A node: runs tasks on this machine, and keeps their objects.",
    "objectstore": "Durable copies of objects.",
}
"""The services that run alone, and what each is."""


def main() -> None:
    """Run the command line; errors of Shoal are told in one line, without a traceback."""
    try:
        app()
    except ConnectionFailedError as error:
        _fail(error, 3)
    except ShoalError as error:
        _fail(error, 1)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"shoal {__version__}")
        raise typer.Exit


@app.callback()
def _shoal(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Take the flags that stand before a command."""


@app.command()
def up(
    num_cpus: Annotated[float | None, typer.Option(min=0, help="CPUs to offer; all of them by default.")] = None,
    num_gpus: Annotated[float | None, typer.Option(min=0, help="GPUs to offer; all that are found by default.")] = None,
    resources: Annotated[str | None, typer.Option(help='Resources of your own, as JSON: {"licence": 2}.')] = None,
    labels: Annotated[str | None, typer.Option(help='Labels of the node, as JSON: {"zone": "a"}.')] = None,
    object_store_memory: Annotated[int | None, typer.Option(min=1, help="Bytes of shared memory for objects.")] = None,
    object_store_folder: Annotated[
        str | None, typer.Option(help="Where objects lie; in shared memory by default.")
    ] = None,
    metrics_export_port: Annotated[
        int | None, typer.Option(help="Show metrics on this port of 127.0.0.1 and the three behind it.")
    ] = None,
) -> None:
    """Start a cluster on this machine that lasts until `shoal down`."""
    custom = json_object("--resources", resources)
    words = {name: str(value) for name, value in json_object("--labels", labels).items()}
    try:
        options = HostOptions.of(
            num_cpus,
            num_gpus,
            custom or None,
            words or None,
            object_store_memory,
            object_store_folder=object_store_folder,
        )
        metrics_port = check_metrics_port("--metrics-export-port", metrics_export_port)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from None
    running = read_current()
    if running is not None:
        as_asked = options == HostOptions() and not metrics_port
        other = "" if as_asked else " Its options cannot be changed: run `shoal down` first."
        out.print(f"A cluster runs already (pid {running.pid}).{other}\n")
        _print_host(running)
        raise typer.Exit(0 if as_asked else 1)
    try:
        host = start_host(options, lasting=True, metrics_port=metrics_port)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.print(f"[green]The cluster is up[/] (pid {host.pid}).\n")
    _print_host(host)


@app.command()
def down() -> None:
    """End the cluster that `shoal up` started, and everything that runs on it."""
    running = read_current()
    if running is None:
        out.print("No cluster that `shoal up` started runs on this machine.")
        return
    stop_host(running)
    out.print(f"The cluster is down (it was pid {running.pid}).")


@app.command()
@on_cluster()
def status(
    where: Target,
    output: Output = Format.TABLE,
) -> None:
    """Show the nodes, what is used of their resources, and what waits and why."""
    seen = asyncio.run(read_status(where))
    if output is Format.JSON:
        print(json.dumps(seen.to_json(), indent=2))
    else:
        print_status(seen, out)


@app.command()
@on_cluster()
def why(
    where: Target,
    about: Annotated[str, typer.Argument(help="A name of a task or actor, or an id, of a job or group too.")],
    output: Output = Format.TABLE,
) -> None:
    """Say why something waits: for what, on which nodes, behind whom; 1 where nothing of that name is known."""
    seen = asyncio.run(read_reasons(where, about))
    if output is Format.JSON:
        print(json.dumps(seen.to_json(), indent=2))
    else:
        print_reasons(seen, out)
    if not seen.are_known:
        raise typer.Exit(1)


@app.command()
@on_cluster()
def memory(
    where: Target,
    output: Output = Format.TABLE,
    limit: Annotated[int, typer.Option(min=0, max=MOST_LISTED_OBJECTS, help="So many of the largest objects.")] = 100,
    timeout: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds to wait for nodes and processes.")] = 10.0,
) -> None:
    """Show who holds which object, how large it is, where it lies and why it is kept; 1 where somebody is silent."""
    seen = asyncio.run(read_memory(where, limit, timeout))
    if output is Format.JSON:
        print(json.dumps(seen.to_json() | {"objects": seen.rows()[:limit]}, indent=2))
    else:
        print_memory(seen, limit, out)
    if not seen.is_complete:
        end_incomplete(seen.missing())


@app.command("list")
@on_cluster()
def list_(
    where: Target,
    what: Annotated[Listed, typer.Argument(help="What to list.")],
    output: Output = Format.TABLE,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", "-f", help="column=value or column!=value; may be repeated.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=MOST_ROWS, help="So many rows at most.")] = 100,
    detail: Annotated[bool, typer.Option("--detail", help="All that is known, of actors too.")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds to wait for answers.")] = 10.0,
) -> None:
    """List the nodes, jobs, actors, tasks or worker processes; 1 where somebody is silent."""
    try:
        wanted = [filter_of(text) for text in filters or ()]
        rows, silent = asyncio.run(read_rows(where, what, wanted, limit, detail, timeout))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if output is Format.JSON:
        print(json.dumps([row.asdict() for row in rows], indent=2))
    else:
        print_rows(rows, what, out)
    if silent:
        end_incomplete(f"did not answer: {silent}")


@app.command()
@on_cluster()
def timeline(
    where: Target,
    file: Annotated[Path, typer.Argument(help="Where to write it, as JSON in Chrome's trace format; '-': print it.")],
    timeout: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds to wait for answers.")] = 10.0,
) -> None:
    """Write what has run lately, and where, for ui.perfetto.dev or chrome://tracing; 1 where somebody is silent."""
    rows, silent = asyncio.run(fetch_timeline(where, timeout))
    if file == Path("-"):
        print(json.dumps(rows))
    else:
        try:
            file.write_text(json.dumps(rows))
        except OSError as error:
            raise typer.BadParameter(str(error)) from None
        count = sum(row["ph"] == "X" for row in rows)
        out.print(f"{count:,} tasks written to {escape(str(file))}; ui.perfetto.dev and chrome://tracing draw it.")
    if silent:
        end_incomplete(f"did not answer: {silent}")


@app.command()
@on_cluster()
def drain(
    where: Target,
    node: Annotated[
        list[str] | None, typer.Argument(help="Ids of nodes; none: those of this machine, or container.")
    ] = None,
    deadline: Annotated[float, typer.Option(min=0, help="Seconds to wait for what runs.")] = 300.0,
) -> None:
    """Have nodes take nothing new, and wait for what runs on them; 1 where something is left at the deadline.

    It needs the credential of role node. Then the node can be ended: what is left is run again elsewhere.
    """
    left = asyncio.run(drain_nodes(where, node or (), deadline))
    if not left:
        out.print("Drained.")
        return
    for name, what in left.items():
        out.print(f"Node {name} still has {what.leases} leases and {what.actors} actors after {deadline:g} s.")
    raise typer.Exit(1)


_services = typer.Typer(
    no_args_is_help=True,
    help="Run one service in this process. Its flags are its own: `shoal service gcs --help` lists them.",
)
app.add_typer(_services, name="service")
app.add_typer(security, name="security")
app.add_typer(job, name="job")
app.add_typer(logs, name="logs")


def _exec_service(name: str) -> Callable[[typer.Context], None]:
    """Return a command that becomes a service, and leaves all flags to it."""

    def become(context: typer.Context) -> None:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", f"shoal_{name}", *context.args])

    return become


for _name, _help in SERVICES.items():
    _services.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_exec_service(_name))


def _fail(error: ShoalError, code: int) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]{type(error).__name__}:[/] {escape(str(error))}")
    raise SystemExit(code)


# ------------------------------------------------------------------------------------ what is printed


def _print_host(host: HostInfo) -> None:
    out.print(f"  address      {redacted(host.address)}")
    out.print(f"  credentials  {host.credentials_path}\n")
    out.print("Programs of yours on this machine find it by themselves: shoal.init()")
    out.print(f"Others on it: SHOAL_ADDRESS={redacted(host.address)} SHOAL_CREDENTIALS=<a copy of that file>")
    out.print("To see what it does: shoal status. To end it: shoal down")
