"""``shoal list``: the rows of a cluster's nodes, jobs, actors, tasks and processes, for whoever is no driver of it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.markup import escape

from shoal import inventory
from shoal.cli.flags import connected
from shoal.cli.tables import new_table, print_table
from shoal.inventory import ActorState, JobState, NodeState, WorkerState
from shoal.rows import Filter, Row, check_filters, select
from shoal.status import Target
from shoal.tasks import TaskState, list_tasks, read_timeline
from shoal_core.bus import Bus
from shoal_core.protocol.subjects import Subjects


class Listed(StrEnum):
    """What can be listed."""

    ACTORS = "actors"
    JOBS = "jobs"
    NODES = "nodes"
    TASKS = "tasks"
    WORKERS = "workers"


KINDS: dict[Listed, type[Row]] = {
    Listed.ACTORS: ActorState,
    Listed.JOBS: JobState,
    Listed.NODES: NodeState,
    Listed.TASKS: TaskState,
    Listed.WORKERS: WorkerState,
}

SHOWN: dict[Listed, tuple[str, ...]] = {
    Listed.ACTORS: ("actor_id", "class_name", "state", "name", "ray_namespace", "job_id", "node_id", "pid"),
    Listed.JOBS: ("job_id", "submission_id", "status", "entrypoint", "message"),
    Listed.NODES: ("node_id", "node_name", "node_ip", "state", "is_head_node", "state_message"),
    Listed.TASKS: ("task_id", "name", "state", "type", "error_type", "job_id", "node_id", "worker_pid"),
    Listed.WORKERS: ("worker_id", "worker_type", "job_id", "node_id", "ip", "pid"),
}
"""The columns that people are shown; JSON has all of them."""


def filter_of(text: str) -> Filter:
    """Return the filter that a text like ``state=ALIVE`` or ``state!=DEAD`` means; ``ValueError`` for another."""
    column, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"A filter is 'column=value' or 'column!=value', got {text!r}.")
    return (column.removesuffix("!").strip(), "!=" if column.endswith("!") else "=", value.strip())


async def read_rows(
    target: Target, listed: Listed, filters: Sequence[Filter], limit: int, detail: bool, timeout_seconds: float
) -> tuple[list[Row], str]:
    """Connect to a cluster and return rows, and who did not answer, in words ("": everybody did).

    Raises ``ValueError`` for a wrong filter, and as ``read_status`` does.
    """
    check_filters(filters, limit, KINDS[listed])
    async with connected(target, timeout_seconds) as bus:
        return await _read(bus, Subjects(target.cluster), listed, filters, limit, detail, timeout_seconds)


async def fetch_timeline(target: Target, timeout_seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Connect to a cluster and return what has run, for Chrome's trace viewer, and who did not answer, in words."""
    async with connected(target, timeout_seconds) as bus:
        return await read_timeline(bus, Subjects(target.cluster), timeout_seconds)


async def _read(
    bus: Bus,
    subjects: Subjects,
    listed: Listed,
    filters: Sequence[Filter],
    limit: int,
    detail: bool,
    timeout_seconds: float,
) -> tuple[list[Row], str]:
    silent = ""
    rows: Sequence[Row]
    match listed:
        case Listed.NODES:
            rows = await inventory.list_nodes(bus, subjects, timeout_seconds)
        case Listed.JOBS:
            rows = await inventory.list_jobs(bus, subjects, timeout_seconds)
        case Listed.WORKERS:
            rows, silent = await inventory.list_workers(bus, subjects, timeout_seconds)
        case Listed.TASKS:
            rows, silent = await list_tasks(bus, subjects, timeout_seconds)
        case Listed.ACTORS:
            actors = select(await inventory.list_actors(bus, subjects, timeout_seconds), filters, limit)
            rows = await inventory.describe_actors(bus, subjects, actors, timeout_seconds) if detail else actors
            return list(rows), ""
    return select(rows, filters, limit), silent


def print_rows(rows: Sequence[Row], listed: Listed, out: Console) -> None:
    """Print rows as a table."""
    if not rows:
        out.print(f"There are no {listed.value} of that kind.")
        return
    table = new_table(*SHOWN[listed])
    for row in rows:
        table.add_row(*(_cell(row[column]) for column in SHOWN[listed]))
    print_table(table, out)


def _cell(value: Any) -> str:
    return "" if value is None else escape(str(value))
