"""The rows of the benchmark: what each measures, in which unit, on which systems, and the bar Shoal has to pass.

Where Ray's own ``ray microbenchmark`` has a row, ours is that row: the same task, the same batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

System = Literal["shoal", "ray", "dask"]
SYSTEMS: tuple[System, ...] = ("shoal", "ray", "dask")


@dataclass(frozen=True)
class Row:
    """One measurement.

    ``rounds`` fresh processes for each system take it in turn; ``times_ray`` is how many times better than Ray Shoal
    has to be, ``limit`` the value it may not pass (both ``None``: the row has no bar of that kind).
    """

    name: str
    title: str
    unit: str
    higher_is_better: bool = True
    systems: tuple[System, ...] = ("shoal", "ray")
    times_ray: float | None = None
    limit: float | None = None
    rounds: int = 1
    timeout_seconds: float = 180.0

    @property
    def bar(self) -> str:
        """The bar in words."""
        if self.times_ray is not None:
            return f"≥ {self.times_ray:g} x Ray"
        return "" if self.limit is None else f"≤ {self.limit:g} {self.unit}"

    def ratio(self, shoal: float, ray: float) -> float:
        """Return how many times better than Ray Shoal is; below 1 it is worse."""
        better, worse = (shoal, ray) if self.higher_is_better else (ray, shoal)
        return better / worse if worse else float("inf")

    def passes(self, shoal: float, ray: float | None) -> bool | None:
        """Tell whether Shoal passes the bar; ``None`` where there is none or Ray was not measured."""
        if self.times_ray is not None:
            return None if ray is None else self.ratio(shoal, ray) >= self.times_ray
        return None if self.limit is None else shoal <= self.limit


ROWS: tuple[Row, ...] = (
    Row("tasks_sync", "tasks, one at a time", "1/s", systems=SYSTEMS, times_ray=3),
    Row("tasks_async", "tasks, 1,000 in flight", "1/s", systems=SYSTEMS, times_ray=10),
    Row("tasks_multi_client", "tasks from 4 tasks at once", "1/s", times_ray=5),
    Row("put_small", "put of a small value", "1/s", times_ray=10),
    Row("get_small", "get of a small value", "1/s", times_ray=10),
    Row("wait_1k", "wait loop over 1,000 references", "1/s", times_ray=10),
    Row("put_gigabytes", "put of 0.8 GB arrays", "GB/s", times_ray=2),
    Row("init", "init to first result", "s", higher_is_better=False, systems=SYSTEMS, limit=1.0, rounds=3),
    Row("memory", "memory at rest, 2 workers", "MB", higher_is_better=False, limit=150.0),
    Row("queued_100k", "100,000 tasks queued at once", "1/s", systems=SYSTEMS, times_ray=10, timeout_seconds=600.0),
    Row(
        "queued_1m",
        "1,000,000 tasks queued: memory of each",
        "B",
        higher_is_better=False,
        systems=("shoal",),
        limit=1500.0,
        timeout_seconds=1800.0,
    ),
)


def find_rows(names: list[str]) -> list[Row]:
    """Return the rows of these names, all rows for none; ``ValueError`` names an unknown one and those there are."""
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no row {', '.join(map(repr, unknown))}; the rows are: {', '.join(known)}")
    return [known[name] for name in names] or list(ROWS)
