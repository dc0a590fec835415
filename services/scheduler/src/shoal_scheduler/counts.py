"""What one replica has decided and what waits: its numbers for those who watch, and for whoever adds nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from shoal_core.protocol.measures import SECONDS_BOUNDS, Histogram, Labels, labels
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import CPU, GPU, MEMORY, from_units, is_of_one_node
from shoal_scheduler.attempts import WaitingGroup
from shoal_scheduler.candidates import Shape
from shoal_scheduler.demand import Wanted
from shoal_scheduler.gangs import missing_bundles
from shoal_scheduler.policy import NodeView, is_feasible

ALWAYS_SHOWN = (CPU, GPU, MEMORY)
"""Resources that are shown also while nobody waits for them, so that whoever scales on them has a zero to see."""


@dataclass(slots=True)
class Counts:
    """Leases, since this replica began; those not granted by why not."""

    decisions: int = 0
    recalls: int = 0
    refusals: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("conflict", "able", "silent"), 0))
    answer_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS_BOUNDS))


def pending_leases(demand: Iterable[Wanted]) -> int:
    """Return how many leases are wanted and not granted."""
    return sum(wanted.unmet() for wanted in demand)


def pending_resources(demand: Iterable[Wanted], groups: Iterable[WaitingGroup]) -> dict[Labels, float]:
    """Return how much more of each resource is asked for than there is now.

    Bundles without a place are part of it. Leases that wait for a bundle are not: it has reserved what they will get.
    """
    sums = Counter(dict.fromkeys(ALWAYS_SHOWN, 0))
    for wanted in demand:
        if not isinstance(wanted.entry.strategy, Bundle):
            for name, units in wanted.entry.resources.items():
                sums[name] += units * wanted.unmet()
    for waiting in groups:
        for bundle in missing_bundles(waiting.demand):
            sums.update(bundle)
    return {labels(resource=name): from_units(units) for name, units in sums.items() if not is_of_one_node(name)}


def pending_infeasible(demand: Iterable[Wanted], views: Collection[NodeView]) -> int:
    """Return how many of them no node could ever grant, nor a bundle; the views are those of both."""
    unmet: Counter[Shape] = Counter()
    for wanted in demand:
        unmet[wanted.shape] += wanted.unmet()
    return sum(count for (amounts, strategy), count in unmet.items() if not is_feasible(dict(amounts), strategy, views))


def pending_seconds(demand: Iterable[Wanted], now: float) -> float:
    """Return how long the oldest demand has been waiting; 0 where none waits."""
    return max((now - wanted.since for wanted in demand), default=0.0)
