"""The durable tier as a service: its core on a bus and an object stream. Replicas share the work by a queue group."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, Literal

from pydantic import Field

from shoal_core.bus import Bus
from shoal_core.bus.streams import ObjectStream, open_object_stream
from shoal_core.protocol import metrics as names
from shoal_core.protocol.errors import BusError, JetStreamUnavailableError
from shoal_core.protocol.measures import labels
from shoal_core.protocol.messages import JobFinished
from shoal_core.protocol.subjects import OBJECTSTORE_QUEUE, Role, Subjects
from shoal_core.protocol.verbs import OBJECTSTORE
from shoal_core.service import Engine, Metrics, Route
from shoal_core.service.main import Service
from shoal_core.service.settings import ServiceSettings
from shoal_objectstore.core import Begin, DurableTier, Listed, ListPlaces
from shoal_objectstore.holdings import Quotas
from shoal_objectstore.operations import ChunkRead, ChunksCounted, CountChunks, Purge, Purged, ReadChunk

logger = logging.getLogger("shoal.objectstore")

HEADROOM_BYTES = 16 * 1024 * 1024


Command = ReadChunk | CountChunks | Purge | ListPlaces
Outcome = ChunkRead | ChunksCounted | Purged | Listed


class ObjectStoreSettings(ServiceSettings):
    """What the durable tier is told beside what every service is. All replicas are to be told the same."""

    durable_bytes: int | None = Field(default=None, gt=0, description="Bytes of objects at most; the broker's bound.")
    durable_bytes_per_job: int | None = Field(default=None, gt=0, description="Bytes of objects of one job at most.")
    durable_storage: Literal["file", "memory"] = Field(default="file", description="Where JetStream keeps the objects.")

    @property
    def most_bytes(self) -> int:
        """The stream's bound, -1 for none: with some room for manifests, so that a full tier can still be tidied up."""
        return -1 if self.durable_bytes is None else self.durable_bytes + self.durable_bytes // 64 + HEADROOM_BYTES


async def perform(stream: ObjectStream, command: Command) -> Outcome:
    """Carry out a command of the core once, and return what came of it."""
    try:
        match command:
            case ReadChunk():
                return ChunkRead(command, await stream.get_chunk(command.place, command.index))
            case CountChunks():
                return ChunksCounted(command, await stream.count_chunks(command.place))
            case Purge():
                bucket = stream.manifests
                below = None if command.revision is None else command.revision + 1
                await bucket.jetstream.purge(bucket.stream, f"{bucket.prefix}{command.place}.>", below_sequence=below)
                return Purged(command)
            case ListPlaces():
                return Listed(places_by_object(await stream.counts()))
    except (BusError, JetStreamUnavailableError) as error:
        if isinstance(command, ReadChunk):
            return ChunkRead(command, error)
        if isinstance(command, CountChunks):
            return ChunksCounted(command, error)
        logger.warning("what was deleted or left behind is swept later: %s", error)
        return Purged(command, error) if isinstance(command, Purge) else Listed({})


def places_by_object(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the places of each object's chunks, from the names under which the stream counts: objects and places."""
    places: dict[str, list[str]] = {}
    for name in names:
        object_id, _, upload = name.partition(".")
        places.setdefault(object_id, []).extend([name] if upload else [])
    return places


def count(metrics: Metrics, core: DurableTier) -> None:
    """Have a replica's numbers read."""
    counts = core.counts
    holdings = core.holdings
    tier = labels(tier="durable")
    metrics.read(names.OBJECTS, lambda: {tier: len(holdings)})
    metrics.read(names.OBJECT_BYTES, lambda: {tier: holdings.total_bytes})
    metrics.read(names.DURABLE_JOBS, lambda: len(holdings.bytes_by_job))
    metrics.read(names.DURABLE_REQUESTS, lambda: len(core.under_way))
    metrics.read(names.DURABLE_OPENED, lambda: counts.opened)
    metrics.read(names.DURABLE_SEALED, lambda: counts.sealed)
    metrics.read(names.DURABLE_DELETED, lambda: counts.deleted)
    metrics.read(names.DURABLE_SWEPT, lambda: counts.swept)
    metrics.read(names.DURABLE_WRITTEN, lambda: counts.written_bytes)
    metrics.read(names.DURABLE_READ, lambda: counts.read_bytes)


@asynccontextmanager
async def serve(bus: Bus, settings: ObjectStoreSettings) -> AsyncIterator[Engine]:
    """Run one replica of the durable tier; entering means that it serves."""
    subjects = Subjects(settings.cluster)
    stream = await open_object_stream(
        bus,
        subjects.object_stream(),
        subjects.object_prefix(),
        replicas=settings.replicas,
        max_bytes=settings.most_bytes,
        memory=settings.durable_storage == "memory",
    )
    core = DurableTier(subjects.gcs("get_job"), Quotas(settings.durable_bytes, settings.durable_bytes_per_job))

    async def start(command: Any) -> None:
        engine.inject(await perform(stream, command))

    engine = Engine(
        core,
        bus,
        name="objectstore",
        routes=[
            *(Route(subjects.objectstore(verb), model, OBJECTSTORE_QUEUE) for verb, model in OBJECTSTORE.items()),
            Route(subjects.event(Role.GCS, "*", "job_finished"), JobFinished, kind="event"),
        ],
        perform_start=start,
        stores={"": stream.manifests},
        watched=[""],
        first=[Begin()],
    )
    count(engine.metrics, core)
    async with engine:
        yield engine


SERVICE = Service("objectstore", Role.OBJECTSTORE, ObjectStoreSettings, serve)
