"""Rows: what is told of the parts of a cluster, read by attribute (``row.state``) and by key (``row["state"]``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

Filter = tuple[str, str, Any]
"""A column, "=" or "!=", and a value; texts are compared without regard to case."""

MOST_ROWS = 10_000


class Row(Mapping[str, Any]):
    """One row. Its columns are attributes, and keys; those that every row of a class has are annotated there."""

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


AnyRow = TypeVar("AnyRow", bound=Row)


def columns_of(kind: type[Row]) -> list[str]:
    """Return the columns of a kind of rows: what its class annotates."""
    return list(kind.__annotations__)


def check_filters(filters: Sequence[Filter] | None, limit: int, kind: type[Row]) -> None:
    """Raise ``ValueError`` for a filter or a limit that is wrong."""
    if not 0 < limit <= MOST_ROWS:
        raise ValueError(f"limit must be from 1 to {MOST_ROWS:,}, got {limit}.")
    columns = columns_of(kind)
    for column, predicate, _ in filters or ():
        if column not in columns:
            raise ValueError(f"There is no column {column!r} to filter by; there are: {', '.join(columns)}.")
        if predicate not in ("=", "!="):
            raise ValueError(f"A filter compares by '=' or '!=', got {predicate!r}.")


def select(rows: Iterable[AnyRow], filters: Sequence[Filter] | None, limit: int) -> list[AnyRow]:
    """Return the first ``limit`` rows that meet all filters."""
    return [row for row in rows if all(_matches(row, one) for one in filters or ())][:limit]


def _matches(row: Mapping[str, Any], one: Filter) -> bool:
    column, predicate, value = one
    return (str(row[column]).lower() == str(value).lower()) == (predicate == "=")


def count(rows: Iterable[Mapping[str, Any]], column: str) -> dict[str, int]:
    """Return how many rows have each value of a column."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[column]] = counts.get(row[column], 0) + 1
    return counts
