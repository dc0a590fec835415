"""What a replica of the scheduler shows of what waits, and of what nodes answered."""

from __future__ import annotations

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from services.scheduler.tests.builders import announced, demand, entry, group_demand
from services.scheduler.tests.simulation import SUBJECTS, cpus
from services.scheduler.tests.test_core import answer, leases
from shoal_core.protocol.effects import Effect, Event
from shoal_core.protocol.ids import ServiceId
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import UNIT, Resources
from shoal_core.protocol.scheduling import DemandEntry
from shoal_core.service.metrics import Metrics
from shoal_scheduler.core import ASK_AGAIN_SECONDS, Begin, Scheduler
from shoal_scheduler.service import count


class Counted:
    """A scheduler with one node of two CPUs, and what its metrics say."""

    def __init__(self) -> None:
        self.core = Scheduler(SUBJECTS, ServiceId("me"))
        self(Begin())
        self(Event(announced(1, 1, cpus(2)), "n1"))

    def __call__(self, message: Any, now: float = 0.0) -> list[Effect]:
        return self.core.handle(message, now)

    def wants(self, *entries: DemandEntry, owner: int = 1, now: float = 0.0) -> list[Effect]:
        stated = demand(owner, 1, *entries)
        return self(Event(stated, stated.owner), now)

    def __getitem__(self, name: str) -> float:
        metrics = Metrics()
        count(metrics, self.core)
        shown = {
            ":".join([sample.name.removeprefix("shoal_"), *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(metrics.exposition().decode())
            for sample in family.samples
        }
        return shown[name]


def test_nothing_waits_is_a_zero_for_whoever_scales_on_it() -> None:
    counted = Counted()
    assert [counted[f"pending_resources:{name}"] for name in ("CPU", "GPU", "memory")] == [0, 0, 0]
    assert (counted["pending_leases"], counted["pending_seconds"]) == (0, 0)
    assert (counted["scheduler_nodes"], counted["scheduler_replicas"]) == (1, 1)


def test_what_is_not_granted_waits_also_while_a_node_is_asked() -> None:
    counted = Counted()
    asked = leases(counted.wants(entry([1, 2, 3], {**cpus(1), "licence": UNIT // 2, "node:10.0.0.1": UNIT})))
    assert asked == []
    assert counted["pending_leases"] == counted["pending_infeasible_leases"] == 3
    assert (counted["pending_resources:CPU"], counted["pending_resources:licence"]) == (3, 1.5)
    (ask,) = leases(counted.wants(entry([1, 2, 3]), owner=2))
    assert (counted["pending_leases"], counted["pending_infeasible_leases"]) == (6, 3)
    counted(answer(ask, [1, 2], [], {}, sequence=2))
    assert counted["pending_leases"] == 4


def test_bundles_without_a_place_are_asked_for_and_what_waits_for_a_bundle_is_not() -> None:
    counted = Counted()
    group = group_demand([cpus(1), cpus(4), cpus(8)], there=[1, None, None])
    counted(Event(group, "gcs"))
    inside = entry([1]).model_copy(update={"strategy": Bundle(group=group.description.group_id, index=0)})
    counted.wants(inside)
    assert counted["pending_resources:CPU"] == 12
    assert counted["pending_placement_groups"] == 1


def test_decisions_and_their_fates_are_counted() -> None:
    counted = Counted()
    (ask,) = leases(counted.wants(entry([1, 2])))
    counted(answer(ask, [1], [2], {}), 0.25)
    assert counted["scheduler_decisions_total"] == 2
    assert counted["scheduler_refusals_total:conflict"] == 1
    assert (counted["scheduler_answer_seconds_count"], counted["scheduler_answer_seconds_sum"]) == (1, 0.25)
    free: Resources = cpus(1)
    counted(Event(announced(1, 2, cpus(2), free), "n1"), 0.5)
    assert counted["scheduler_decisions_total"] == 3
    counted.core.tick(0.5 + ASK_AGAIN_SECONDS)
    assert counted["scheduler_refusals_total:silent"] == 1
