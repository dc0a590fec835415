"""``shoal logs``: what worker processes and submitted jobs have printed."""

from __future__ import annotations

import asyncio
import codecs
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from shoal.asking import ask_nodes
from shoal.cli.flags import (
    Format,
    Output,
    connected,
    end_incomplete,
    on_cluster,
    out,
)
from shoal.cli.memory import size_text
from shoal.cli.tables import new_table, print_table
from shoal.jobs.submissions import Submissions
from shoal.logs import FOLLOW_SECONDS, Reader, Wanted, find_node, list_logs, open_log
from shoal.status import Target
from shoal_core.bus import Bus
from shoal_core.protocol.ids import NodeId, new_process_id
from shoal_core.protocol.logs import ListLogs, LogDescription, NodeLogs
from shoal_core.protocol.subjects import Subjects

Listed = list[tuple[NodeId, LogDescription]]
Open = Callable[[Bus, Subjects, float], Awaitable[Reader]]
"""Finds a log and returns who reads it; raises what says that there is none."""


class _Group(TyperGroup):
    """Takes what is no command for a pattern: ``shoal logs '*.err'`` is ``shoal logs cluster '*.err'``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the command there where there is none."""
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["cluster", *args])


logs = typer.Typer(
    cls=_Group,
    help="Show what worker processes and submitted jobs have printed; a pattern alone means `cluster` with it.",
)

Pattern = Annotated[str, typer.Argument(help="Of names, as in a shell; where one log has such a name, it is printed.")]
NodeIdFlag = Annotated[str | None, typer.Option("--node-id", help="Of this node.")]
NodeIp = Annotated[str | None, typer.Option("--node-ip", "-ip", help="Of the node at this address.")]
Tail = Annotated[int, typer.Option(help="So many of the last lines; -1: all that is kept.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the process has ended.")]
Err = Annotated[bool, typer.Option("--err", help="Its standard error, instead of its output.")]
Timeout = Annotated[float, typer.Option(min=0.1, max=60, help="Seconds to wait for answers.")]
TAIL, TIMEOUT = 1000, 10.0


@logs.command()
@on_cluster()
def cluster(
    where: Target,
    pattern: Pattern = "*",
    node_id: NodeIdFlag = None,
    node_ip: NodeIp = None,
    tail: Tail = TAIL,
    follow: Follow = False,
    timeout: Timeout = TIMEOUT,
    output: Output = Format.TABLE,
) -> None:
    """List the logs that nodes keep of their worker processes, or print the one that is meant."""
    listed, silent = asyncio.run(_list(where, pattern, node_id, node_ip, timeout))
    if len(listed) == 1 and not silent:
        [(node, log)] = listed
        _print(where, _worker_log(Wanted(node_id=node, filename=log.name)), tail, follow, timeout)
    elif output is Format.JSON:
        print(json.dumps([{"node_id": node, **log.model_dump()} for node, log in listed], indent=2))
    elif listed:
        table = new_table("node", "log", "size", "process")
        for node, log in listed:
            table.add_row(node, escape(log.name), size_text(log.size_bytes), "ended" if log.has_ended else "alive")
        print_table(table, out)
    else:
        out.print("There are no logs of that name.")
    if silent:
        end_incomplete(f"did not answer: {silent}")


@logs.command()
@on_cluster()
def actor(
    where: Target,
    id: Annotated[str, typer.Option("--id", help="The actor's id.")],
    err: Err = False,
    tail: Tail = TAIL,
    follow: Follow = False,
    timeout: Timeout = TIMEOUT,
) -> None:
    """Print what an actor has printed, also one that is dead."""
    _print(where, _worker_log(Wanted(actor_id=id, suffix=_suffix(err))), tail, follow, timeout)


@logs.command()
@on_cluster()
def worker(
    where: Target,
    pid: Annotated[int, typer.Option("--pid", min=1, help="The pid of the worker process.")],
    node_id: NodeIdFlag = None,
    node_ip: NodeIp = None,
    err: Err = False,
    tail: Tail = TAIL,
    follow: Follow = False,
    timeout: Timeout = TIMEOUT,
) -> None:
    """Print what a worker process has printed, also one that has ended."""
    if (node_id is None) == (node_ip is None):
        raise typer.BadParameter("say on which node: --node-id or --node-ip")
    wanted = Wanted(node_id=node_id, node_ip=node_ip, pid=pid, suffix=_suffix(err))
    _print(where, _worker_log(wanted), tail, follow, timeout)


@logs.command()
@on_cluster()
def task(
    where: Target,
    id: Annotated[str, typer.Option("--id", help="The task's id.")],
    attempt_number: Annotated[int, typer.Option("--attempt-number", "-a", min=0, help="Which attempt.")] = 0,
    err: Err = False,
    tail: Tail = TAIL,
    follow: Follow = False,
    timeout: Timeout = TIMEOUT,
) -> None:
    """Print what a task has printed, without what others printed in between."""
    wanted = Wanted(task_id=id, attempt_number=attempt_number, suffix=_suffix(err))
    _print(where, _worker_log(wanted), tail, follow, timeout)


@logs.command()
@on_cluster()
def job(
    where: Target,
    id: Annotated[str, typer.Option("--id", help="The job's submission id.")],
    tail: Tail = TAIL,
    follow: Follow = False,
    timeout: Timeout = TIMEOUT,
) -> None:
    """Print what a submitted job has printed."""

    async def opened(bus: Bus, subjects: Subjects, _timeout_seconds: float) -> Reader:
        return await Submissions(bus, subjects, new_process_id()).reader(id)

    _print(where, opened, tail, follow, timeout)


def _suffix(err: bool) -> str:
    return "err" if err else "out"


def _worker_log(wanted: Wanted) -> Open:
    async def opened(bus: Bus, subjects: Subjects, timeout_seconds: float) -> Reader:
        return await open_log(bus, subjects, wanted, timeout_seconds)

    return opened


def _print(where: Target, opened: Open, tail: int, follow: bool, timeout_seconds: float) -> None:
    """Print a log."""

    async def read() -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        async with connected(where, timeout_seconds) as bus:
            reader = await opened(bus, Subjects(where.cluster), timeout_seconds)
            await reader.start(tail)
            while (data := await reader.read()) is not None:
                print(decoder.decode(data), end="", flush=True)
                if not data and not follow:
                    return
                if not data:
                    await asyncio.sleep(FOLLOW_SECONDS)

    asyncio.run(read())


async def _list(
    where: Target, pattern: str, node_id: str | None, node_ip: str | None, timeout_seconds: float
) -> tuple[Listed, str]:
    """Return the logs of a node, or of all, by node, oldest first; and which nodes did not answer, in words."""
    async with connected(where, timeout_seconds) as bus:
        subjects = Subjects(where.cluster)
        if node_id is not None or node_ip is not None:
            node = await find_node(bus, subjects, node_id, node_ip, timeout_seconds)
            return [(node, log) for log in await list_logs(bus, subjects, node, pattern, timeout_seconds)], ""
        asked = await ask_nodes(bus, subjects, "logs", lambda _: ListLogs(pattern=pattern), NodeLogs, timeout_seconds)
        listed = [(node.node_id, log) for node, answer in asked.answers for log in answer.logs]
        return listed, ", ".join(f"node {node}" for node in asked.silent)
