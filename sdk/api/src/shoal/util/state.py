"""The state of the cluster as rows: which objects there are and who holds them, and which placement groups.

Of objects it is what ``shoal memory`` prints, for programs. Rows are read by attribute (``row.object_size``) and by key
(``row["object_size"]``, ``row.get(...)``, ``row.asdict()``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shoal.memory import ClusterMemory, ask_all
from shoal.placement_groups import find_record, list_records, row_of
from shoal.session import runtime
from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.groups import GroupRecord
from shoal_core.protocol.ids import PlacementGroupId
from shoal_core.protocol.messages import MOST_LISTED_OBJECTS
from shoal_core.runtime.identities import PlacementGroupID
from shoal_core.runtime.runtime import Runtime

Filter = tuple[str, str, Any]
"""A column, "=" or "!=", and a value; texts are compared without regard to case."""

OBJECT_COLUMNS = (
    *("object_id", "object_size", "task_status", "reference_type", "call_site", "type", "pid", "ip"),
    *("reasons", "borrowers", "location", "process_id", "owner_id", "node_id"),
)
GROUP_COLUMNS = ("placement_group_id", "name", "state", "creator_job_id", "bundles", "is_detached", "stats")


class StateUnavailableError(ShoalError):
    """Some of the cluster did not answer in time (Ray: ``RayStateApiException``); the text says who."""


class _Row(Mapping[str, Any]):
    """One row: its columns are attributes, and keys."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.__dict__.update(row)

    def __getitem__(self, column: str) -> Any:
        return self.__dict__[column]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def asdict(self) -> dict[str, Any]:
        """Return the row as a dictionary."""
        return dict(self.__dict__)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


class ObjectState(_Row):
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


class PlacementGroupState(_Row):
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
    checked = _checked(filters, OBJECT_COLUMNS, limit)
    rows = _read(address, timeout, raise_on_missing_output).rows()
    return [ObjectState(row) for row in rows if all(_matches(row, one) for one in checked)][:limit]


def get_objects(id: str, address: str | None = None, timeout: float = 30) -> list[ObjectState]:
    """Return the rows of one object: one for each process that holds it; see ``list_objects``."""
    return list_objects(address, filters=[("object_id", "=", id)], timeout=timeout, limit=10_000)


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
        "task_state_counts": _counts(rows, "task_status"),
        "ref_type_counts": _counts(rows, "reference_type"),
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

    ``timeout`` is in seconds. ``detail`` is accepted: every row has all columns; so is ``raise_on_missing_output``:
    nothing is ever missing. ``address`` may name only the cluster that this process has joined. Raises ``ValueError``
    for a wrong filter or limit, and ``BusError`` where nobody answers in time.
    """
    checked = _checked(filters, GROUP_COLUMNS, limit)
    rows = map(_group_row, list_records(_joined(address, timeout), timeout))
    return [PlacementGroupState(row) for row in rows if all(_matches(row, one) for one in checked)][:limit]


def get_placement_group(id: str, address: str | None = None, timeout: float = 30) -> PlacementGroupState | None:
    """Return the row of one placement group; None where nothing is known of it (any more).

    Raises ``ValueError`` for what is no id.
    """
    group = PlacementGroupId(PlacementGroupID(id))
    record = find_record(_joined(address, timeout), group, timeout)
    return None if record is None else PlacementGroupState(_group_row(record))


def _group_row(record: GroupRecord) -> dict[str, Any]:
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
    return {column: row[column] for column in GROUP_COLUMNS}


# ------------------------------------------------------------------------------------ reading


def _joined(address: str | None, timeout: float) -> Runtime:
    """Return this process's part in the cluster, if it is the one that is meant."""
    if timeout <= 0:
        raise ValueError(f"timeout must be positive, got {timeout}.")
    current = runtime()
    if address not in (None, "auto", current.address):
        raise ValueError(
            f"This process has joined {current.address}; for the cluster at {address} use `shoal memory --address`."
        )
    return current


def _read(address: str | None, timeout: float, raise_on_missing_output: bool) -> ClusterMemory:
    current = _joined(address, timeout)
    seen = current.call(ask_all(current.bus, current.subjects, MOST_LISTED_OBJECTS, timeout))
    if raise_on_missing_output and not seen.is_complete:
        raise StateUnavailableError(f"Not everybody has answered within {timeout:g} s:\n{seen.missing()}")
    return seen


def _checked(filters: Sequence[Filter] | None, columns: Sequence[str], limit: int) -> Sequence[Filter]:
    """Return the filters; raise where one of them, or the limit, is wrong."""
    if not 0 < limit <= 10_000:
        raise ValueError(f"limit must be from 1 to 10,000, got {limit}.")
    for column, predicate, _ in filters or ():
        if column not in columns:
            raise ValueError(f"There is no column {column!r} to filter by; there are: {', '.join(columns)}.")
        if predicate not in ("=", "!="):
            raise ValueError(f"A filter compares by '=' or '!=', got {predicate!r}.")
    return filters or ()


def _matches(row: Mapping[str, Any], one: Filter) -> bool:
    column, predicate, value = one
    return (str(row[column]).lower() == str(value).lower()) == (predicate == "=")


def _counts(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[column]] = counts.get(row[column], 0) + 1
    return counts
