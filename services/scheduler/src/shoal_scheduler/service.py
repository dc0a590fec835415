"""The scheduler as a service: its core on a bus."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal_core.bus import Bus
from shoal_core.protocol.groups import GroupChanged, GroupDemand
from shoal_core.protocol.ids import PlacementGroupId, ServiceId
from shoal_core.protocol.messages import (
    Demand,
    JobFinished,
    NodeAnnouncement,
    NodeDied,
    ProcessDied,
    SchedulerPresence,
)
from shoal_core.protocol.subjects import SCHEDULER_QUEUE, Role, Subjects
from shoal_core.protocol.verbs import SCHEDULER_PUBLIC
from shoal_core.service import Engine, Route
from shoal_core.service.main import Service
from shoal_core.service.settings import ServiceSettings
from shoal_scheduler.core import Begin, Scheduler


def routes(subjects: Subjects) -> list[Route]:
    """Return where the scheduler is asked, and what it listens to."""
    public = [Route(subjects.scheduler(verb), model, SCHEDULER_QUEUE) for verb, model in SCHEDULER_PUBLIC.items()]
    events = [
        Route(subjects.demand("*"), Demand, kind="event"),
        Route(subjects.event(Role.NODE, "*", "announce"), NodeAnnouncement, kind="event"),
        Route(subjects.event(Role.NODE, "*", "process_died"), ProcessDied, kind="event"),
        Route(subjects.event(Role.GCS, "*", "group_demand"), GroupDemand, kind="event"),
        Route(subjects.group_changed("*", PlacementGroupId("*")), GroupChanged, kind="event"),
        Route(subjects.event(Role.GCS, "*", "node_died"), NodeDied, kind="event"),
        Route(subjects.event(Role.GCS, "*", "job_finished"), JobFinished, kind="event"),
        Route(subjects.event(Role.SCHEDULER, "*", "presence"), SchedulerPresence, kind="event"),
    ]
    return [*public, *events]


@asynccontextmanager
async def serve(bus: Bus, settings: ServiceSettings) -> AsyncIterator[Engine]:
    """Run one replica of the scheduler; entering means that it hears demand."""
    subjects = Subjects(settings.cluster)
    core = Scheduler(subjects, ServiceId(bus.identity))
    # Nothing here is a date: a wall clock that is set back would only stop all that waits.
    engine = Engine(core, bus, name="scheduler", routes=routes(subjects), first=[Begin()], clock=time.monotonic)
    engine.metrics.gauge("nodes_seen", "Nodes that announce themselves.", lambda: len(core.nodes))
    engine.metrics.gauge("demand_pending", "Scheduling keys that wait for leases.", lambda: len(core.demand))
    engine.metrics.gauge("groups_pending", "Placement groups that wait for nodes.", lambda: len(core.groups))
    async with engine:
        yield engine


SERVICE = Service("scheduler", Role.SCHEDULER, ServiceSettings, serve)
