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
    has to be, ``limit`` the value it may not pass, or has to reach where higher is better (both ``None``: the row has
    no bar of that kind).
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
        return "" if self.limit is None else f"{'≥' if self.higher_is_better else '≤'} {self.limit:g} {self.unit}"

    def ratio(self, shoal: float, ray: float) -> float:
        """Return how many times better than Ray Shoal is; below 1 it is worse."""
        better, worse = (shoal, ray) if self.higher_is_better else (ray, shoal)
        return better / worse if worse else float("inf")

    def passes(self, shoal: float, ray: float | None) -> bool | None:
        """Tell whether Shoal passes the bar; ``None`` where there is none or Ray was not measured."""
        if self.times_ray is not None:
            return None if ray is None else self.ratio(shoal, ray) >= self.times_ray
        if self.limit is None:
            return None
        return shoal >= self.limit if self.higher_is_better else shoal <= self.limit


ROWS: tuple[Row, ...] = (
    Row("tasks_sync", "tasks, one at a time", "1/s", systems=SYSTEMS, times_ray=3),
    Row("tasks_async", "tasks, 1,000 in flight", "1/s", systems=SYSTEMS, times_ray=10),
    Row("tasks_multi_client", "tasks from 4 tasks at once", "1/s", times_ray=5),
    Row("put_small", "put of a small value", "1/s", times_ray=10),
    Row("get_small", "get of a small value", "1/s", times_ray=10),
    Row("wait_1k", "wait loop over 1,000 references", "1/s", times_ray=10),
    Row("put_gigabytes", "put of 0.8 GB arrays", "GB/s", times_ray=2),
    Row("spill", "put of 6 times what the store holds", "GB/s"),
    Row("restore", "get of what was spilled", "GB/s"),
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
    Row("actor_sync", "actor calls, one at a time", "1/s", times_ray=1.5),
    Row("actor_async", "actor calls, 1,000 in flight", "1/s", times_ray=5),
    Row("actor_concurrent", "threaded actor, 1,000 in flight", "1/s", times_ray=5),
    Row("actors_1_n", "actor that calls n actors", "1/s", times_ray=5),
    Row("actors_n_n", "4 tasks that call n actors", "1/s", times_ray=5),
    Row("actors_n_n_arg", "n actors call n with a reference", "1/s", times_ray=5),
    Row("async_actor_sync", "async actor calls, one at a time", "1/s", times_ray=1.5),
    Row("async_actor_async", "async actor, 1,000 in flight", "1/s", times_ray=5),
    Row("async_actor_async_arg", "async actor calls with argument", "1/s", times_ray=5),
    Row("async_actors_1_n", "actor that calls n async actors", "1/s", times_ray=5),
    Row("async_actors_n_n", "4 tasks that call n async actors", "1/s", times_ray=5),
    Row("actors_created", "40 actors created and called", "1/s", times_ray=20, timeout_seconds=300.0),
    Row(
        "actors_alive",
        "1,000 actors: memory of each",
        "MB",
        higher_is_better=False,
        systems=("shoal",),
        limit=12.0,
        timeout_seconds=600.0,
    ),
    Row("queue_pairs", "Queue put and get, one by one", "1/s", times_ray=2.5),
    Row("queue_pairs_many", "Queue put and get, 200 at once", "1/s", times_ray=10),
    Row("actor_pool_map", "ActorPool.map over 2 actors", "1/s", times_ray=5),
    Row("get_actor", "an actor by its name", "ms", higher_is_better=False, systems=("shoal",), limit=2.0),
    Row("placement_groups", "placement groups made and removed", "1/s", times_ray=5),
    Row("stream_items", "items of a generator, one by one", "1/s", times_ray=10),
    Row("stream_first_item", "first item, in times of a task", "x", higher_is_better=False, limit=2.0),
    Row("stream_large", "80 MB items of a generator", "GB/s", times_ray=2),
    Row("stream_100", "100 generators consumed at once", "1/s", times_ray=10),
    Row("transfer", "1 GB between two nodes", "MB/s", limit=400.0, timeout_seconds=300.0),
    Row(
        "broadcast",
        "1 GB to 8 nodes, in times of one",
        "x",
        higher_is_better=False,
        limit=3.0,
        timeout_seconds=600.0,
    ),
    Row(
        "broadcast_beside",
        "1 GB to 8 nodes in one memory",
        "s",
        higher_is_better=False,
        times_ray=10,
        timeout_seconds=600.0,
    ),
    Row("args_10k", "a task with 10,000 arguments", "s", higher_is_better=False, times_ray=1),
    Row("returns_3k", "a task with 3,000 returns", "s", higher_is_better=False, times_ray=1),
    Row("get_10k", "get of 10,000 objects of 1 KB", "s", higher_is_better=False, times_ray=1),
    Row("get_1k_stored", "get of 1,000 objects of 200 KB", "s", higher_is_better=False, times_ray=1),
    Row("live_100k", "100,000 live references", "s", higher_is_better=False, times_ray=1, timeout_seconds=300.0),
    Row("object_8gb", "one object of 8 GB", "s", higher_is_better=False, times_ray=1, timeout_seconds=300.0),
    Row("put_multi_gigabytes", "put of 80 MB arrays, 10 tasks", "GB/s", times_ray=1),
    Row("put_in_copies", "put, in times of a plain copy", "x", higher_is_better=False, systems=("shoal",), limit=1.5),
    Row("task_result_80mb", "results of 80 MB", "GB/s", times_ray=3),
    Row("task_argument_80mb", "arguments of 80 MB", "GB/s", times_ray=3),
    Row(
        "traced_tasks",
        "tasks, 1 % traced, in times of none",
        "x",
        higher_is_better=False,
        systems=("shoal",),
        limit=1.1,
        rounds=2,
        timeout_seconds=300.0,
    ),
    *(
        Row(
            f"secured_{name}",
            f"{title}, secured, in times of not",
            "x",
            higher_is_better=False,
            systems=("shoal",),
            timeout_seconds=300.0,
        )
        for name, title in (
            ("tasks_sync", "tasks"),
            ("tasks_async", "1,000 tasks"),
            ("actor_sync", "calls"),
            ("put_small", "put"),
            ("get_small", "get"),
            ("transfer", "1 GB"),
        )
    ),
    Row("await_10k", "await of 10,000, in times of get", "x", higher_is_better=False, limit=1.2),
)


def find_rows(names: list[str]) -> list[Row]:
    """Return the rows of these names, all rows for none; ``ValueError`` names an unknown one and those there are."""
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no row {', '.join(map(repr, unknown))}; the rows are: {', '.join(known)}")
    return [known[name] for name in names] or list(ROWS)
