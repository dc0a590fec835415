"""The state of the cluster as rows: which objects there are, and who holds them.

What ``shoal memory`` prints, for programs. Rows are read by attribute (``row.object_size``) and by key
(``row["object_size"]``, ``row.get(...)``, ``row.asdict()``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shoal.memory import ClusterMemory, ask_all
from shoal.session import runtime
from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.messages import MOST_LISTED_OBJECTS

Filter = tuple[str, str, Any]
"""A column, "=" or "!=", and a value; texts are compared without regard to case."""

COLUMNS = (
    *("object_id", "object_size", "task_status", "reference_type", "call_site", "type", "pid", "ip"),
    *("reasons", "borrowers", "location", "process_id", "owner_id", "node_id"),
)


class StateUnavailableError(ShoalError):
    """Some of the cluster did not answer in time (Ray: ``RayStateApiException``); the text says who."""


class ObjectState(Mapping[str, Any]):
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
        return f"ObjectState({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


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
    if not 0 < limit <= 10_000:
        raise ValueError(f"limit must be from 1 to 10,000, got {limit}.")
    checked = [_checked(one) for one in filters or ()]
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


def _read(address: str | None, timeout: float, raise_on_missing_output: bool) -> ClusterMemory:
    if timeout <= 0:
        raise ValueError(f"timeout must be positive, got {timeout}.")
    current = runtime()
    if address not in (None, "auto", current.address):
        raise ValueError(
            f"This process has joined {current.address}; for the cluster at {address} use `shoal memory --address`."
        )
    seen = current.call(ask_all(current.bus, current.subjects, MOST_LISTED_OBJECTS, timeout))
    if raise_on_missing_output and not seen.is_complete:
        raise StateUnavailableError(f"Not everybody has answered within {timeout:g} s:\n{seen.missing()}")
    return seen


def _checked(one: Filter) -> Filter:
    column, predicate, value = one
    if column not in COLUMNS:
        raise ValueError(f"There is no column {column!r} to filter by; there are: {', '.join(COLUMNS)}.")
    if predicate not in ("=", "!="):
        raise ValueError(f"A filter compares by '=' or '!=', got {predicate!r}.")
    return column, predicate, value


def _matches(row: Mapping[str, Any], one: Filter) -> bool:
    column, predicate, value = one
    return (str(row[column]).lower() == str(value).lower()) == (predicate == "=")


def _counts(rows: Sequence[Mapping[str, Any]], column: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[column]] = counts.get(row[column], 0) + 1
    return counts
