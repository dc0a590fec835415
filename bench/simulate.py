"""``python -m bench.simulate``: schedulers among a thousand nodes with a million tasks, in virtual time.

The cores that decide are the real ones, and so are the nodes' tables of leases; owners are the small models of
``services/scheduler/tests/simulation.py``. Each run has the same workload, drawn from ``--seed``: jobs that come one
after another, with weights and priorities, owners, tasks of three kinds of length, actors, and placement groups. While
it runs, no node may promise more than it has, no group may be created that is not whole, and no job that waits may
starve; at its end all work must be done and nothing be held.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.plots import Plot, Series, draw
from services.scheduler.tests.simulation import OwnerModel, Queue, World, job_id, longest_wait
from shoal_core.protocol.groups import GroupDemand, GroupDescription, GroupRecord, GroupState, GroupStrategy
from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId
from shoal_core.protocol.messages import JobTerms
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import CPU, Resources, to_resources
from shoal_core.testing.builders import process_id

NODE: dict[str, float] = {"CPU": 16, "memory": 64e9}
NODE_WITH_GPUS: dict[str, float] = {"CPU": 32, "GPU": 4, "memory": 256e9}
GPU_NODES = 8
"""One node in so many has GPUs."""
SHAPES: list[tuple[float, dict[str, float]]] = [
    (0.60, {"CPU": 1}),
    (0.15, {"CPU": 0.5}),
    (0.15, {"CPU": 2}),
    (0.07, {"CPU": 4, "memory": 8e9}),
    (0.03, {"CPU": 1, "GPU": 1}),
]
"""What tasks ask for, each with how many of the queues do."""
LENGTHS: list[tuple[float, float, float]] = [(0.70, 0.05, 1.0), (0.27, 0.8, 0.8), (0.03, 8.0, 0.6)]
"""Kinds of tasks: how many queues are of it, the median of its lengths in seconds, and their spread (log-normal)."""
KINDS_OF_AN_OWNER = 3
LONGEST_SECONDS = 60.0
SAMPLE_SECONDS = 1.0
MOST_VIRTUAL_SECONDS = 7200.0


@dataclass(frozen=True)
class Scale:
    """How large the simulated cluster and its work are."""

    nodes: int
    tasks: int
    actors: int
    groups: int
    jobs: int
    arrival_seconds: float


@dataclass
class Report:
    """What one run showed. Waiting times are those of leases, from being asked for to being used, in seconds.

    ``busiest_seconds`` is the time that the core of the busiest scheduler took, ``decisions_per_second`` what all of
    them decided in that time: what they could do together, with a processor each. (It is taken by the clock, since to
    ask for processor time at each input takes as long as to decide; on a busy machine it is too long.) ``samples`` are
    (time, part of the CPUs in use, slots that wait), ``waits`` quantiles.
    """

    schedulers: int
    seed: int
    nodes: int
    tasks: int
    actors: int
    groups: int
    jobs: int
    arrival_seconds: float
    virtual_seconds: float = 0.0
    leases: int = 0
    decisions: int = 0
    decisions_per_second: float = 0.0
    busiest_seconds: float = 0.0
    refused: int = 0
    granted_twice: int = 0
    conflict_rate: float = 0.0
    utilisation: float = 0.0
    wait_p50: float = 0.0
    wait_p95: float = 0.0
    wait_p99: float = 0.0
    wait_max: float = 0.0
    longest_without_lease: float = 0.0
    group_wait_p50: float = 0.0
    group_wait_max: float = 0.0
    samples: list[tuple[float, float, int]] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)


class Simulation(World):
    """A world that counts what happens in it."""

    def __init__(self, seed: int, schedulers: int) -> None:
        super().__init__(seed, schedulers)
        self.check_every = 50
        self.timer = time.perf_counter
        self.waits = array("d")
        self.samples: list[tuple[float, float, int]] = []
        self.idle_since: dict[JobId, float] = {}
        self.longest_without_lease = 0.0
        self.coming = 0
        self.group_waits: list[float] = []
        self.group_lives: dict[PlacementGroupId, float] = {}
        """How long each group lives that is not removed yet."""

    def waited(self, owner: OwnerModel, queue: Queue, seconds: float) -> None:
        """Keep a waiting time."""
        self.waits.append(seconds)

    def group_changed(self, record: GroupRecord) -> None:
        """Check that a group that was created is whole, and remove it when its time is over."""
        group = record.description.group_id
        if record.state is GroupState.CREATED:
            for index, node in enumerate(record.nodes):
                assert node is not None
                assert Bundle(group, index) in self.nodes[int(node, 16) - 1].plans, "a gang is whole"
            self.group_waits.append(self.now - record.created_at)
            self.after(self.group_lives[group], lambda: self.remove_group(group))
        elif record.state is GroupState.REMOVED:
            del self.group_lives[group]

    def is_over(self) -> bool:
        """Tell whether all work has come and is done, and nobody remembers any."""
        return not self.coming and not self.group_lives and self.is_quiet()

    def sample(self) -> None:
        """Look at the cluster: how much of it is used, how much waits, and whether anybody starves."""
        total = sum(node.table.total.get(CPU, 0) for node in self.nodes)
        free = sum(node.table.free.get(CPU, 0) for node in self.nodes)
        waiting = 0
        holding: set[JobId] = set()
        wanting: set[JobId] = set()
        for owner in self.owners.values():
            slots = sum(len(queue.slots) for queue in owner.queues.values())
            waiting += slots
            if slots:
                wanting.add(owner.job_id)
            if owner.leases:
                holding.add(owner.job_id)
        idle = wanting - holding
        self.idle_since = {job: self.idle_since.get(job, self.now) for job in idle}
        without = max((self.now - since for since in self.idle_since.values()), default=0.0)
        self.longest_without_lease = max(self.longest_without_lease, without)
        assert without <= longest_wait(LONGEST_SECONDS, len(wanting)), "no job starves"
        self.samples.append((self.now, 1 - free / total, waiting))
        if not self.is_over():
            self.after(SAMPLE_SECONDS, self.sample)


def add_nodes(world: Simulation, count: int) -> None:
    """Start the nodes, some of them with GPUs."""
    for number in range(count):
        world.add_node(to_resources(NODE_WITH_GPUS if number % GPU_NODES == 0 else NODE))


def add_work(world: Simulation, scale: Scale, draw_from: random.Random) -> None:
    """Have all jobs come, each at its time, with what it has to do."""
    sizes = [draw_from.paretovariate(1.2) for _ in range(scale.jobs)]
    for number, size in enumerate(sizes, 1):
        job = JobPlan(
            number,
            JobTerms(priority=draw_from.choice((0, 0, 0, 0, 1)), weight=draw_from.choice((1, 1, 1, 2, 4))),
            tasks=max(1, round(scale.tasks * size / sum(sizes))),
            kinds=[TaskKind.drawn(draw_from) for _ in range(draw_from.randint(1, 12))],
            groups=[GroupPlan.drawn(draw_from, scale.nodes) for _ in range(scale.groups // scale.jobs)],
            lives=[_bounded(draw_from.lognormvariate(3.0, 0.5)) for _ in range(scale.actors // scale.jobs)],
        )
        world.coming += 1
        world.after(draw_from.uniform(0.0, scale.arrival_seconds), partial(job.begin, world))


@dataclass(frozen=True)
class TaskKind:
    """What the tasks of one queue ask for, and how long they take: log-normal around a median."""

    resources: Resources
    seed: float
    median: float
    spread: float

    @classmethod
    def drawn(cls, draw_from: random.Random) -> TaskKind:
        """Draw a kind."""
        ((_, shape),) = draw_from.choices(SHAPES, [weight for weight, _ in SHAPES])
        ((_, median, spread),) = draw_from.choices(LENGTHS, [weight for weight, _, _ in LENGTHS])
        return cls(to_resources(shape), draw_from.random(), median, spread)

    def lengths(self) -> Callable[[], float]:
        """Return what draws one length after another."""
        draw_from = random.Random(self.seed)
        return lambda: _bounded(self.median * draw_from.lognormvariate(0.0, self.spread))


@dataclass(frozen=True)
class JobPlan:
    """A job that is to come."""

    number: int
    terms: JobTerms
    tasks: int
    kinds: list[TaskKind]
    groups: list[GroupPlan]
    lives: list[float]

    def begin(self, world: Simulation) -> None:
        """Start the job: its tasks, a few kinds for each owner, and its actors."""
        world.coming -= 1
        counts = [self.tasks // len(self.kinds) + (i < self.tasks % len(self.kinds)) for i in range(len(self.kinds))]
        queues = [
            Queue(index % KINDS_OF_AN_OWNER, kind.resources, count, kind.lengths(), most_slots=256)
            for index, (kind, count) in enumerate(zip(self.kinds, counts, strict=True))
        ]
        for start in range(0, len(queues), KINDS_OF_AN_OWNER):
            world.add_owner(*queues[start : start + KINDS_OF_AN_OWNER], job=self.number, terms=self.terms)
        for seconds in self.lives:
            life = Queue(0, to_resources({"CPU": 1}), 1, seconds, is_actor=True)
            world.add_owner(life, job=self.number, terms=self.terms)
        for group in self.groups:
            group.begin(world, self.number)


@dataclass(frozen=True)
class GroupPlan:
    """A placement group that is to come."""

    bundles: list[Resources]
    strategy: GroupStrategy
    seconds: float

    @classmethod
    def drawn(cls, draw_from: random.Random, nodes: int) -> GroupPlan:
        """Draw a group: most are small, one in twenty is as large as a gang of workers for training."""
        count = min(nodes, 64 if draw_from.random() < 0.05 else draw_from.randint(1, 8))
        bundle = to_resources({"CPU": draw_from.choice((1, 2, 4))})
        strategy = draw_from.choice((GroupStrategy.PACK, GroupStrategy.SPREAD, GroupStrategy.STRICT_SPREAD))
        return cls([bundle] * count, strategy, _bounded(draw_from.lognormvariate(2.0, 0.5)))

    def begin(self, world: Simulation, job: int) -> None:
        """Have the group wait."""
        about = GroupDescription(
            group_id=PlacementGroupId(f"{len(world.groups) + 1:032x}"),
            job_id=job_id(job),
            owner=process_id(len(world.owners), 0),
            bundles=self.bundles,
            strategy=self.strategy,
        )
        world.group_lives[about.group_id] = self.seconds
        nowhere: list[NodeId | None] = [None] * len(self.bundles)
        world.add_group(GroupDemand(description=about, attempt=0, nodes=nowhere, created_at=world.now))


def _bounded(seconds: float) -> float:
    return min(LONGEST_SECONDS, seconds)


# ------------------------------------------------------------------------------- runs


def simulate(scale: Scale, schedulers: int, seed: int) -> Report:
    """Run the workload to its end, and say how it went; AssertionError if an invariant was broken."""
    world = Simulation(seed, schedulers)
    add_nodes(world, scale.nodes)
    world.run(3.0)
    add_work(world, scale, random.Random(seed))
    world.sample()
    while not world.is_over():
        assert world.now < MOST_VIRTUAL_SECONDS, "all work is done in time"
        world.run(SAMPLE_SECONDS)
    for node in world.nodes:
        node.table.sanity_check()
        assert node.table.free == node.table.total, "nothing is held when all is done"
    return _report(world, scale, schedulers, seed)


def _report(world: Simulation, scale: Scale, schedulers: int, seed: int) -> Report:
    waits = sorted(world.waits)
    cores = [replica.core for replica in world.replicas]
    decisions = sum(core.counts.decisions for core in cores)
    refused = sum(sum(core.counts.refusals.values()) for core in cores)
    twice = sum(owner.surplus for owner in world.owners.values())
    busiest = max(replica.seconds for replica in world.replicas)
    return Report(
        schedulers,
        seed,
        **asdict(scale),
        virtual_seconds=round(world.now, 1),
        leases=len(waits),
        decisions=decisions,
        decisions_per_second=round(decisions / busiest),
        busiest_seconds=round(busiest, 2),
        refused=refused,
        granted_twice=twice,
        conflict_rate=round((refused + twice) / decisions, 5),
        utilisation=round(_utilisation(world.samples), 4),
        wait_p50=_quantile(waits, 0.50),
        wait_p95=_quantile(waits, 0.95),
        wait_p99=_quantile(waits, 0.99),
        wait_max=_quantile(waits, 1.0),
        longest_without_lease=round(world.longest_without_lease, 3),
        group_wait_p50=_quantile(sorted(world.group_waits), 0.5),
        group_wait_max=_quantile(sorted(world.group_waits), 1.0),
        samples=world.samples,
        waits=[_quantile(waits, step / 200) for step in range(201)],
    )


def _quantile(ordered: list[float], part: float) -> float:
    if not ordered:
        return 0.0
    return round(ordered[round(part * (len(ordered) - 1))], 4)


def _utilisation(samples: list[tuple[float, float, int]]) -> float:
    """Return the mean part of all CPUs that was in use while anything waited."""
    loaded = [used for _, used, waiting in samples if waiting]
    return statistics.mean(loaded or [used for _, used, _ in samples])


# ------------------------------------------------------------------------------- the command


class Format(StrEnum):
    """How to print the reports."""

    TABLE = "table"
    JSON = "json"


def plots(reports: list[Report]) -> list[Plot]:
    """Return what is drawn of the runs."""
    by_count = [(float(report.schedulers), report) for report in reports]
    return [
        Plot(
            "CPUs in use (part of all)",
            "virtual seconds",
            [_line(r, [(t, u) for t, u, _ in r.samples]) for r in reports],
        ),
        Plot(
            "Slots that wait", "virtual seconds", [_line(r, [(t, float(w)) for t, _, w in r.samples]) for r in reports]
        ),
        Plot(
            "Waiting time of leases (seconds)",
            "part of leases",
            [_line(r, [(step / 200, wait) for step, wait in enumerate(r.waits)]) for r in reports],
        ),
        Plot(
            "Decisions a second",
            "schedulers",
            [Series("", [(n, r.decisions_per_second) for n, r in by_count])],
        ),
        Plot("Conflicts (part of decisions)", "schedulers", [Series("", [(n, r.conflict_rate) for n, r in by_count])]),
    ]


def _line(report: Report, points: list[tuple[float, float]]) -> Series:
    return Series(f"{report.schedulers} scheduler{'s' * (report.schedulers > 1)}", points)


ROWS = [
    "decisions", "decisions_per_second", "busiest_seconds", "refused", "granted_twice", "conflict_rate", "leases",
    "utilisation", "wait_p50", "wait_p95", "wait_p99", "wait_max", "longest_without_lease", "group_wait_p50",
    "group_wait_max", "virtual_seconds",
]  # fmt: skip


def main(
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of 16 CPUs; every eighth has 32 and four GPUs.")] = 1000,
    tasks: Annotated[int, typer.Option(min=0, help="Tasks of all jobs together.")] = 1_000_000,
    actors: Annotated[int, typer.Option(min=0, help="Actors of all jobs together.")] = 10_000,
    groups: Annotated[int, typer.Option(min=0, help="Placement groups of all jobs together.")] = 1000,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs, of very different sizes.")] = 50,
    schedulers: Annotated[list[int], typer.Option(min=1, help="Run with so many; may be repeated.")] = [1, 2, 4, 8],  # noqa: B006 - typer copies it
    arrival_seconds: Annotated[float, typer.Option(min=0, help="Within this time all jobs come.")] = 20.0,
    seed: Annotated[int, typer.Option(help="What the workload and the network are drawn from.")] = 1,
    plot: Annotated[Path | None, typer.Option(help="Draw the runs into this file (SVG).")] = None,
    output: Annotated[Format, typer.Option("--format", help="How to print the reports.")] = Format.TABLE,
) -> None:
    """Simulate schedulers among many nodes, and check that no node is over-committed and nobody starves."""
    scale = Scale(nodes, tasks, actors, groups, jobs, arrival_seconds)
    reports = []
    for count in schedulers:
        report = simulate(scale, count, seed)
        reports.append(report)
        typer.echo(f"seed {seed}, {count} scheduler(s): {report.decisions_per_second} decisions/s", err=True)
    if plot is not None:
        plot.write_text(draw(plots(reports)))
    if output is Format.JSON:
        typer.echo(json.dumps([asdict(report) for report in reports]))
        return
    table = Table("", *(str(report.schedulers) for report in reports), title=f"schedulers (seed {seed})")
    for row in ROWS:
        table.add_row(row, *(f"{getattr(report, row):g}" for report in reports))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
