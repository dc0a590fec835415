"""The scheduler as a service: its core on a bus."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal_core.bus import Bus
from shoal_core.protocol import metrics as names
from shoal_core.protocol.groups import GroupChanged, GroupDemand
from shoal_core.protocol.ids import ServiceId
from shoal_core.protocol.measures import labels
from shoal_core.protocol.messages import JobFinished, NodeAnnouncement, NodeDied, ProcessDied
from shoal_core.protocol.scheduling import Demand, SchedulerPresence
from shoal_core.protocol.subjects import SCHEDULER_QUEUE, Role, Subjects
from shoal_core.protocol.verbs import SCHEDULER_PUBLIC
from shoal_core.service import Engine, Metrics, Route
from shoal_core.service.main import Service
from shoal_core.service.settings import ServiceSettings
from shoal_scheduler.core import Begin, Scheduler
from shoal_scheduler.counts import pending_infeasible, pending_leases, pending_resources, pending_seconds


def routes(subjects: Subjects) -> list[Route]:
    """Return where the scheduler is asked, and what it listens to."""
    public = [Route(subjects.scheduler(verb), model, SCHEDULER_QUEUE) for verb, model in SCHEDULER_PUBLIC.items()]
    events = [
        Route(subjects.demand("*"), Demand, kind="event"),
        Route(subjects.event(Role.NODE, "*", "announce"), NodeAnnouncement, kind="event"),
        Route(subjects.event(Role.NODE, "*", "process_died"), ProcessDied, kind="event"),
        Route(subjects.event(Role.GCS, "*", "group_demand"), GroupDemand, kind="event"),
        Route(subjects.groups_changed("*", "*"), GroupChanged, kind="event"),
        Route(subjects.event(Role.GCS, "*", "node_died"), NodeDied, kind="event"),
        Route(subjects.event(Role.GCS, "*", "job_finished"), JobFinished, kind="event"),
        Route(subjects.event(Role.SCHEDULER, "*", "presence"), SchedulerPresence, kind="event"),
    ]
    return [*public, *events]


def count(metrics: Metrics, core: Scheduler) -> None:
    """Have a replica's numbers read."""
    counts = core.counts
    metrics.read(names.SCHEDULER_NODES, lambda: len(core.nodes))
    metrics.read(names.SCHEDULER_REPLICAS, lambda: core.replicas)
    metrics.read(names.PENDING_LEASES, lambda: pending_leases(core.demand))
    metrics.read(names.PENDING_INFEASIBLE, lambda: pending_infeasible(core.demand, core.cluster.views()))
    metrics.read(names.PENDING_RESOURCES, lambda: pending_resources(core.demand, core.groups))
    metrics.read(names.PENDING_GROUPS, lambda: len(core.groups))
    metrics.read(names.PENDING_SECONDS, lambda: pending_seconds(core.demand, time.monotonic()))
    metrics.read(names.SCHEDULER_DECISIONS, lambda: counts.decisions)
    metrics.read(names.SCHEDULER_REFUSALS, lambda: {labels(reason=reason): n for reason, n in counts.refusals.items()})
    metrics.read(names.SCHEDULER_RECALLS, lambda: counts.recalls)
    metrics.tell(lambda: [(names.SCHEDULER_ANSWER, {(): counts.answer_seconds})])


@asynccontextmanager
async def serve(bus: Bus, settings: ServiceSettings) -> AsyncIterator[Engine]:
    """Run one replica of the scheduler; entering means that it hears demand."""
    subjects = Subjects(settings.cluster)
    core = Scheduler(subjects, ServiceId(bus.identity))
    # Nothing here is a date: a wall clock that is set back would only stop all that waits.
    engine = Engine(core, bus, name="scheduler", routes=routes(subjects), first=[Begin()], clock=time.monotonic)
    count(engine.metrics, core)
    async with engine:
        yield engine


SERVICE = Service("scheduler", Role.SCHEDULER, ServiceSettings, serve)
