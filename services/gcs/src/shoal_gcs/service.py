"""The control store as a service: its core on a bus and two buckets."""

from __future__ import annotations

import logging
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from shoal_core.bus import Bus
from shoal_core.protocol.actors import ActorState, NodeActors
from shoal_core.protocol.errors import BusError, JetStreamUnavailableError
from shoal_core.protocol.groups import GroupState
from shoal_core.protocol.ids import ServiceId
from shoal_core.protocol.measures import Labels, labels
from shoal_core.protocol.messages import DriverAlive, Echo, JobState, NodeAnnouncement, NodeState, ProcessDied
from shoal_core.protocol.metrics import ACTOR_DEATHS, ACTOR_RESTARTS, ACTORS, JOBS, NODE_DEATHS, NODES, PLACEMENT_GROUPS
from shoal_core.protocol.subjects import GCS_QUEUE, Role, Subjects
from shoal_core.protocol.verbs import GCS_CHANGING, GCS_NODE, GCS_READING, GCS_SCHEDULER
from shoal_core.service import Engine, Metrics, Route
from shoal_core.service.main import Service
from shoal_core.service.settings import ServiceSettings
from shoal_gcs.actor_operations import PurgeSpec
from shoal_gcs.core import Begin, ControlStore, Purged, PurgeFunctions
from shoal_gcs.records import CONTROL, FUNCTIONS, function_prefix, spec_prefix

logger = logging.getLogger("shoal.gcs")

SHOWN_STATES = [state for state in ActorState if state is not ActorState.NAMING]
SHOWN_GROUPS = [state for state in GroupState if state is not GroupState.NAMING]


def routes(subjects: Subjects, identity: str) -> list[Route]:
    """Return where a replica of the control store is asked, and what it listens to."""
    public = [Route(subjects.gcs(verb), model, GCS_QUEUE) for verb, model in (GCS_READING | GCS_CHANGING).items()]
    from_nodes = [Route(subjects.gcs_from_node(verb), model, GCS_QUEUE) for verb, model in GCS_NODE.items()]
    from_schedulers = [
        Route(subjects.gcs_from_scheduler(verb), model, GCS_QUEUE) for verb, model in GCS_SCHEDULER.items()
    ]
    this_one = [
        Route(subjects.gcs_replica_from_scheduler(identity, verb), model) for verb, model in GCS_SCHEDULER.items()
    ]
    events = [
        Route(subjects.event(Role.NODE, "*", "announce"), NodeAnnouncement, kind="event"),
        Route(subjects.event(Role.NODE, "*", "actors"), NodeActors, kind="event"),
        Route(subjects.event(Role.NODE, "*", "process_died"), ProcessDied, kind="event"),
        Route(subjects.event(Role.PROCESS, "*", "alive"), DriverAlive, kind="event"),
        Route(subjects.event(Role.GCS, "*", "echo"), Echo, kind="event"),
    ]
    return [*public, *from_nodes, *from_schedulers, *this_one, *events]


def count(metrics: Metrics, core: ControlStore) -> None:
    """Have a replica's numbers read: what the records say, and which ends it has recorded itself."""
    state, counts = core.state, core.counts
    metrics.read(NODES, lambda: by_state(NodeState, (held.value.record.state for held in state.nodes.values())))
    metrics.read(JOBS, lambda: by_state(JobState, (held.value.record.state for held in state.jobs.values())))
    metrics.read(ACTORS, lambda: by_state(SHOWN_STATES, (held.value.state for held in state.actors.values())))
    metrics.read(PLACEMENT_GROUPS, lambda: by_state(SHOWN_GROUPS, (held.value.state for held in state.groups.values())))
    metrics.read(ACTOR_RESTARTS, lambda: counts.actor_restarts)
    metrics.read(ACTOR_DEATHS, lambda: {labels(cause=cause): n for cause, n in counts.actor_deaths.items()})
    metrics.read(NODE_DEATHS, lambda: {labels(cause=cause): n for cause, n in counts.node_deaths.items()})


def by_state(all_states: Iterable[str], states: Iterable[str]) -> dict[Labels, float]:
    """Count how many are in which state, those in none of which is anything included."""
    seen = Counter(states)
    return {labels(state=state): float(seen[state]) for state in all_states}


@asynccontextmanager
async def serve(bus: Bus, settings: ServiceSettings) -> AsyncIterator[Engine]:
    """Run one replica of the control store; entering means that it serves."""
    subjects = Subjects(settings.cluster)
    core = ControlStore(subjects, ServiceId(bus.identity), secrets.token_hex(8), version("shoal-gcs"))
    functions = await bus.key_value(subjects.function_bucket(), replicas=settings.replicas)
    stores = {
        CONTROL: await bus.key_value(subjects.control_bucket(), replicas=settings.replicas),
        FUNCTIONS: functions,
    }

    async def purge(command: PurgeFunctions) -> None:
        try:
            await functions.purge(function_prefix(command.job_id))
        except (BusError, JetStreamUnavailableError) as error:
            logger.warning("the functions of job %s are deleted later: %s", command.job_id, error)
        else:
            engine.inject(Purged(command.job_id))

    async def purge_spec(command: PurgeSpec) -> None:
        try:
            await functions.purge(spec_prefix(command.actor_id))
        except (BusError, JetStreamUnavailableError) as error:
            logger.warning("what actor %s was made from is deleted later: %s", command.actor_id, error)

    def perform(command: Any) -> Awaitable[None]:
        return purge_spec(command) if isinstance(command, PurgeSpec) else purge(command)

    engine = Engine(
        core,
        bus,
        name="gcs",
        routes=routes(subjects, bus.identity),
        perform_start=perform,
        stores=stores,
        watched=[CONTROL],
        first=[Begin()],
    )
    count(engine.metrics, core)
    async with engine:
        yield engine


SERVICE = Service("gcs", Role.GCS, ServiceSettings, serve)
