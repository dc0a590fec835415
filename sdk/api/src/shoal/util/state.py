"""The state of the cluster as rows: nodes, jobs, actors, tasks, processes, placement groups, objects, who holds them.

What ``shoal list`` and ``shoal memory`` print, for programs. Rows are read by attribute (``row.object_size``) and by
key (``row["object_size"]``, ``row.get(...)``, ``row.asdict()``).

What all functions share: ``filters`` are (column, "=" or "!=", value), ``limit`` is how many rows there are at most
(10,000), ``timeout`` is in seconds. ``address`` may name only the cluster that this process has joined. They raise
``ValueError`` for a wrong filter or limit, and ``BusError`` where nobody answers in time.
"""

from __future__ import annotations

import codecs
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from typing import Any, TypeVar

from shoal import inventory, logs, tasks
from shoal.inventory import ActorState, JobState, NodeState, WorkerState
from shoal.logs import FOLLOW_SECONDS, Reader, Wanted
from shoal.memory import ClusterMemory, ask_all
from shoal.placement_groups import find_record, list_records, row_of
from shoal.reasons import ask_why
from shoal.rows import MOST_ROWS, AnyRow, Filter, Row, check_filters, columns_of, count, select
from shoal.session import runtime
from shoal.tasks import TaskState, summarize
from shoal_core.bus import Bus
from shoal_core.protocol.errors import NotFoundError, ShoalError
from shoal_core.protocol.groups import GroupRecord
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.logs import LogDescription
from shoal_core.protocol.storage import MOST_LISTED_OBJECTS
from shoal_core.protocol.subjects import Subjects
from shoal_core.runtime.ownership.identities import PlacementGroupID
from shoal_core.runtime.runtime import Runtime

__all__ = [
    "ActorState",
    "JobState",
    "NodeState",
    "ObjectState",
    "PlacementGroupState",
    "StateUnavailableError",
    "TaskState",
    "WorkerState",
    "get_actor",
    "get_job",
    "get_log",
    "get_node",
    "get_objects",
    "get_placement_group",
    "get_task",
    "get_worker",
    "list_actors",
    "list_jobs",
    "list_logs",
    "list_nodes",
    "list_objects",
    "list_placement_groups",
    "list_tasks",
    "list_workers",
    "summarize_actors",
    "summarize_objects",
    "summarize_tasks",
    "why",
]

T = TypeVar("T")
ANSI_CODE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
"""What colours text on terminals, and the like."""


class StateUnavailableError(ShoalError):
    """Some of the cluster did not answer in time, or what was asked for is not there; the text says who, or what.

    Ray's ``RayStateApiException``.
    """


class ObjectState(Row):
    """One object as one process holds it.

    ``object_id`` (empty where a mapping is all that is left), ``object_size`` in bytes (-1: not known), ``task_status``
    of the task that makes it, ``reference_type`` (the first of ``reasons``), ``call_site`` ("disabled"), ``type``
    (WORKER or DRIVER), ``pid`` and ``ip`` of the holder. Beyond Ray's: ``reasons``, ``borrowers`` (how many other
    processes hold it), ``location`` ("inline" or "node …"), ``process_id``, ``owner_id``, ``node_id`` of the holder.
    """

    object_id: str
    object_size: int
    task_status: str
    reference_type: str
    call_site: str
    type: str
    pid: int
    ip: str
    reasons: list[str]
    borrowers: int
    location: str
    process_id: str
    owner_id: str
    node_id: str


class PlacementGroupState(Row):
    """One placement group.

    ``state`` is PENDING, CREATED, RESCHEDULING or REMOVED. ``bundles`` has for each its ``bundle_id`` (the group's id
    and an index), ``node_id`` (None: it is not reserved) and ``unit_resources``; ``stats`` is as in
    ``placement_group_table``.
    """

    placement_group_id: str
    name: str
    state: str
    creator_job_id: str
    bundles: list[dict[str, Any]]
    is_detached: bool
    stats: dict[str, Any]


def list_objects(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ObjectState]:
    """Return a row for each object and process that holds it, the largest first.

    Each node tells of its 1,000 largest; ``filters`` and ``limit`` are applied to those. ``timeout`` is in seconds.
    ``detail`` is accepted: every row has all columns. ``address`` may name only the cluster that this process has
    joined. Raises ``StateUnavailableError`` where a node or a process does not answer in time, unless
    ``raise_on_missing_output`` is False: then their objects are missing; ``ValueError`` for a wrong filter or limit.
    """
    check_filters(filters, limit, ObjectState)
    rows = _read(address, timeout, raise_on_missing_output).rows()
    return select(map(ObjectState, rows), filters, limit)


def get_objects(id: str, address: str | None = None, timeout: float = 30) -> list[ObjectState]:
    """Return the rows of one object: one for each process that holds it; see ``list_objects``."""
    return list_objects(address, filters=[("object_id", "=", id)], timeout=timeout, limit=MOST_ROWS)


def summarize_objects(
    address: str | None = None, timeout: float = 30, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """Return totals: of the cluster (by reference type and task status), and of each node's shared memory, in bytes."""
    seen = _read(address, timeout, raise_on_missing_output)
    rows = seen.rows()
    summary = {
        "total_objects": seen.counted(),
        "total_size_mb": sum(node.objects.store.used_bytes for node in seen.nodes) / 2**20,
        "total_num_workers": sum(len(node.objects.processes) for node in seen.nodes),
        "total_num_nodes": len(seen.nodes),
        "task_state_counts": count(rows, "task_status"),
        "ref_type_counts": count(rows, "reference_type"),
    }
    nodes = {node.description.node_id: node.objects.store.model_dump() for node in seen.nodes}
    return {"cluster": {"summary": {"disabled": summary}, "callsite_enabled": False, **summary}, "nodes": nodes}


# ------------------------------------------------------------------------------------ placement groups


def list_placement_groups(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[PlacementGroupState]:
    """Return a row for each placement group, oldest first; of many that were removed only the newest.

    ``detail`` is accepted: every row has all columns; so is ``raise_on_missing_output``: nothing is ever missing.
    """
    check_filters(filters, limit, PlacementGroupState)
    return select(map(_group_row, list_records(_joined(address, timeout), timeout)), filters, limit)


def get_placement_group(id: str, address: str | None = None, timeout: float = 30) -> PlacementGroupState | None:
    """Return the row of one placement group; None where nothing is known of it (any more).

    Raises ``ValueError`` for what is no id.
    """
    group = PlacementGroupId(PlacementGroupID(id))
    record = find_record(_joined(address, timeout), group, timeout)
    return None if record is None else _group_row(record)


def _group_row(record: GroupRecord) -> PlacementGroupState:
    about, row = record.description, row_of(record)
    bundles = [
        {
            "bundle_id": {"placement_group_id": about.group_id, "bundle_index": index},
            "node_id": record.nodes[index],
            "unit_resources": resources,
        }
        for index, resources in row["bundles"].items()
    ]
    shared = {column: row[column] for column in ("placement_group_id", "name", "state", "stats")}
    row = {**shared, "creator_job_id": about.job_id, "bundles": bundles, "is_detached": about.detached}
    return PlacementGroupState({column: row[column] for column in columns_of(PlacementGroupState)})


# ------------------------------------------------------------------------------------ nodes, jobs, actors, processes


def list_nodes(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[NodeState]:
    """Return a row for each node, dead ones too, oldest first. Every row has all columns."""
    return _list(inventory.list_nodes, NodeState, address, filters, limit, timeout)


def get_node(id: str, address: str | None = None, timeout: float = 30) -> NodeState | None:
    """Return the row of one node; None where none of this id is known."""
    return _get(inventory.get_node, id, address, timeout)


def list_jobs(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[JobState]:
    """Return a row for each job, oldest first. Every row has all columns.

    A submitted job and the newest driver in its program are one row.
    """
    return _list(inventory.list_jobs, JobState, address, filters, limit, timeout)


def get_job(id: str, address: str | None = None, timeout: float = 30) -> JobState | None:
    """Return the row of one job, by its id or its submission id; None where none of this id is known."""
    return _get(inventory.get_job, id, address, timeout)


def list_actors(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[ActorState]:
    """Return a row for each actor, oldest first; with ``detail`` all is told that is known of each."""
    rows = _list(inventory.list_actors, ActorState, address, filters, limit, timeout)
    if not detail:
        return rows
    current = _joined(address, timeout)
    return current.call(inventory.describe_actors(current.bus, current.subjects, rows, timeout))


def get_actor(id: str, address: str | None = None, timeout: float = 30) -> ActorState | None:
    """Return the row of one actor, in detail; None where none of this id is known."""
    return _get(inventory.get_actor, id, address, timeout)


def summarize_actors(
    address: str | None = None, timeout: float = 30, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """Return how many actors of each class are in which state."""
    rows = list_actors(address, limit=MOST_ROWS, timeout=timeout)
    classes = sorted({row.class_name for row in rows})
    summary = {
        name: {"class_name": name, "state_counts": count((row for row in rows if row.class_name == name), "state")}
        for name in classes
    }
    return {"cluster": {"summary": summary, "total_actors": len(rows), "summary_by": "class"}}


def list_workers(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[WorkerState]:
    """Return a row for each worker process and driver that lives. Every row has all columns.

    Raises ``StateUnavailableError`` where a node or a process does not answer in time, unless
    ``raise_on_missing_output`` is False.
    """
    check_filters(filters, limit, WorkerState)
    current = _joined(address, timeout)
    told = current.call(inventory.list_workers(current.bus, current.subjects, timeout))
    return select(_complete(told, timeout, raise_on_missing_output), filters, limit)


def get_worker(id: str, address: str | None = None, timeout: float = 30) -> WorkerState | None:
    """Return the row of one process; None where none of this id lives."""
    rows = list_workers(address, [("worker_id", "=", id)], 1, timeout, raise_on_missing_output=False)
    return rows[0] if rows else None


def _list(
    read: Callable[[Bus, Subjects, float], Awaitable[list[AnyRow]]],
    kind: type[AnyRow],
    address: str | None,
    filters: Sequence[Filter] | None,
    limit: int,
    timeout: float,
) -> list[AnyRow]:
    check_filters(filters, limit, kind)
    current = _joined(address, timeout)
    return select(current.call(_run(read, current, timeout)), filters, limit)


async def _run(read: Callable[[Bus, Subjects, float], Awaitable[T]], current: Runtime, timeout_seconds: float) -> T:
    return await read(current.bus, current.subjects, timeout_seconds)


def _get(read: Callable[[Bus, Subjects, str, float], Awaitable[T]], id: str, address: str | None, timeout: float) -> T:
    current = _joined(address, timeout)
    return current.call(_run(lambda bus, subjects, seconds: read(bus, subjects, id, seconds), current, timeout))


# ------------------------------------------------------------------------------------ tasks


def list_tasks(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[TaskState]:
    """Return a row for each task, call of an actor and making of one: what has not ended first, then the newest.

    Processes remember the last 1,000 that they have run, nodes tell of 2,000; ``filters`` and ``limit`` are applied to
    those. What waits at a driver that has no node is not told. Every row has all columns. Raises
    ``StateUnavailableError`` where a node or a process does not answer in time, unless ``raise_on_missing_output`` is
    False.
    """
    check_filters(filters, limit, TaskState)
    return select(_tasks(address, timeout, raise_on_missing_output), filters, limit)


def get_task(id: str, address: str | None = None, timeout: float = 30) -> TaskState | list[TaskState] | None:
    """Return the row of one task; a list where it was tried more than once, None where nothing is known of it."""
    rows = list_tasks(address, [("task_id", "=", id)], MOST_ROWS, timeout, raise_on_missing_output=False)
    return None if not rows else rows[0] if len(rows) == 1 else rows


def summarize_tasks(
    address: str | None = None, timeout: float = 30, raise_on_missing_output: bool = True
) -> dict[str, Any]:
    """Return how many tasks of each function are in which state, of those that ``list_tasks`` can tell of."""
    return summarize(_tasks(address, timeout, raise_on_missing_output))


def _tasks(address: str | None, timeout: float, raise_on_missing_output: bool) -> list[TaskState]:
    current = _joined(address, timeout)
    told = current.call(tasks.list_tasks(current.bus, current.subjects, timeout))
    return _complete(told, timeout, raise_on_missing_output)


# ------------------------------------------------------------------------------------ logs


def list_logs(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    glob_filter: str | None = None,
    timeout: float = 30,
) -> dict[str, list[str]]:
    """Return the names of the logs that a node keeps of what its worker processes have printed, oldest first.

    They are in two lists, ``worker_out`` and ``worker_err``, where there are any. ``glob_filter`` is a pattern of the
    shell's. Raises ``StateUnavailableError`` where there is no such node.
    """
    if (node_id is None) == (node_ip is None):
        raise ValueError("Say of which node: node_id or node_ip.")
    current = _joined(address, timeout)

    async def read() -> list[LogDescription]:
        node = await logs.find_node(current.bus, current.subjects, node_id, node_ip, timeout)
        return await logs.list_logs(current.bus, current.subjects, node, glob_filter or "*", timeout)

    found: dict[str, list[str]] = {}
    for log in _told(current, read()):
        found.setdefault(f"worker_{log.name.rpartition('.')[2]}", []).append(log.name)
    return found


def get_log(
    address: str | None = None,
    node_id: str | None = None,
    node_ip: str | None = None,
    filename: str | None = None,
    actor_id: str | None = None,
    task_id: str | None = None,
    pid: int | None = None,
    follow: bool = False,
    tail: int = -1,
    timeout: float = 30,
    suffix: str = "out",
    encoding: str | None = "utf-8",
    errors: str = "strict",
    submission_id: str | None = None,
    attempt_number: int = 0,
    _interval: float | None = None,
    filter_ansi_code: bool = False,
) -> Generator[Any, None, None]:
    """Return what a worker process has printed, or a submitted job, some of it at a time; nothing where it has not.

    ``filename`` is as ``list_logs`` tells it; ``pid`` is that of a worker process: both want ``node_id`` or
    ``node_ip``. An actor is known by its process, dead ones too. Of a task there is what it has printed itself, without
    what others printed in between; of an actor's making, whose id is the actor's, all that no call has. ``tail`` is how
    many of the last lines are wanted; -1: all that is kept. With ``follow`` what is printed from now on comes, too,
    until the process, or the task, has ended. ``suffix`` is "out" or "err". ``encoding`` None: bytes come.

    Raises ``ValueError`` for what is no choice, ``StateUnavailableError`` where there is no such log (any more).
    """
    current = _joined(address, timeout)
    reader: Reader
    if submission_id is not None:
        reader = _reader_of_job(current, submission_id)
    else:
        wanted = Wanted(node_id, node_ip, filename, actor_id, task_id, attempt_number, pid, suffix)
        reader = _told(current, logs.open_log(current.bus, current.subjects, wanted, timeout))
    _told(current, reader.start(tail))
    interval = FOLLOW_SECONDS if _interval is None else _interval
    read = _read_log(current, reader, interval if follow else None)
    return read if encoding is None else _decoded(read, encoding, errors, filter_ansi_code)


def _reader_of_job(current: Runtime, submission_id: str) -> Reader:
    from shoal.jobs.submissions import JobSubmissionError, Submissions  # few need it, and all would import it

    try:
        return current.call(Submissions(current.bus, current.subjects, current.local).reader(submission_id))
    except JobSubmissionError as error:
        raise StateUnavailableError(str(error)) from None


def _read_log(current: Runtime, reader: Reader, interval_seconds: float | None) -> Generator[bytes, None, None]:
    """Yield what a reader reads; without an interval only what is there."""
    while (data := _told(current, reader.read())) is not None:
        if data:
            yield data
        elif interval_seconds is None:
            return
        else:
            time.sleep(interval_seconds)


def _decoded(read: Iterable[bytes], encoding: str, errors: str, filter_ansi_code: bool) -> Generator[str, None, None]:
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    for data in read:
        if text := decoder.decode(data):
            yield ANSI_CODE.sub("", text) if filter_ansi_code else text


def _told(current: Runtime, answer: Coroutine[Any, Any, T]) -> T:
    """Return an answer about a log; raises ``StateUnavailableError`` where there is no such log."""
    try:
        return current.call(answer)
    except NotFoundError as error:
        raise StateUnavailableError(str(error)) from None


# ------------------------------------------------------------------------------------ why it waits


def why(about: str, *, address: str | None = None, timeout: float = 30) -> dict[str, Any]:
    """Return why something waits, as ``shoal why --format json`` prints it (docs/scheduling.md).

    ``about`` is the name of a function, of an actor or of its class, or the id of a task, an actor, a placement group,
    a job or a process. ``pending`` holds what waits of it, and ``text`` of each says why in words; ``actors`` are those
    that it names.
    """
    current = _joined(address, timeout)
    return current.call(ask_why(current.bus, current.subjects, about, timeout)).to_json()


# ------------------------------------------------------------------------------------ reading


def _joined(address: str | None, timeout: float) -> Runtime:
    """Return this process's part in the cluster, if it is the one that is meant."""
    if timeout <= 0:
        raise ValueError(f"timeout must be positive, got {timeout}.")
    current = runtime()
    if address not in (None, "auto", current.address):
        raise ValueError(
            f"This process has joined {current.address}; for the cluster at {address} use the command line: "
            "`shoal list --address`, `shoal memory --address`."
        )
    return current


def _complete(told: tuple[list[AnyRow], str], timeout: float, raise_on_missing_output: bool) -> list[AnyRow]:
    """Return the rows, if everybody has answered or it does not matter."""
    rows, silent = told
    if silent and raise_on_missing_output:
        raise StateUnavailableError(f"Not everybody has answered within {timeout:g} s: {silent}.")
    return rows


def _read(address: str | None, timeout: float, raise_on_missing_output: bool) -> ClusterMemory:
    current = _joined(address, timeout)
    seen = current.call(ask_all(current.bus, current.subjects, MOST_LISTED_OBJECTS, timeout))
    if raise_on_missing_output and not seen.is_complete:
        raise StateUnavailableError(f"Not everybody has answered within {timeout:g} s:\n{seen.missing()}")
    return seen
