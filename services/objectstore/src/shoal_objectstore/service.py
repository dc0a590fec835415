"""The durable tier as a service: chunks and manifests in JetStream. Replicas share the work through a queue group."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from shoal_core.bus import Bus
from shoal_core.bus.streams import ObjectStream, is_full, open_object_stream
from shoal_core.protocol.effects import Effect
from shoal_core.protocol.errors import JetStreamError, NotFoundError, ObjectStoreFullError, RevisionConflict
from shoal_core.protocol.messages import (
    Done,
    DurableChunk,
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
)
from shoal_core.protocol.subjects import OBJECTSTORE_QUEUE, Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.service import Engine, RawRoute
from shoal_core.service.main import Service
from shoal_core.service.settings import ServiceSettings
from shoal_objectstore import manifests
from shoal_objectstore.manifests import Manifest

SWEEP_SECONDS = 600.0


class _Nothing:
    """The engine's core: all requests of this service are answered from the stream itself."""

    def handle(self, message: object, now: float) -> list[Effect]:
        """Ignore connection changes."""
        return []

    def tick(self, now: float) -> list[Effect]:
        """Nothing is ever due."""
        return []


class DurableObjects:
    """Answers requests from one object stream."""

    def __init__(self, stream: ObjectStream) -> None:
        self._stream = stream

    async def put(self, request: DurablePut) -> bytes:
        """Open an upload."""
        while True:
            current, revision = await self._manifest(request.object_id)
            manifest = manifests.opened(current, request, time.time())
            if manifest is None or await self._store(manifest, revision):
                return encode(Done())

    async def put_chunk(self, request: DurablePutChunk) -> bytes:
        """Store a chunk of an open upload."""
        current, _ = await self._manifest(request.object_id)
        manifest = manifests.require_chunk(current, request.object_id, request.index)
        if not manifest.sealed:
            try:
                await self._stream.put_chunk(request.object_id, request.index, request.data)
            except JetStreamError as error:
                if is_full(error):
                    raise ObjectStoreFullError(f"the durable tier is full: {error}") from error
                raise
        return encode(Done())

    async def seal(self, request: DurableSeal) -> bytes:
        """Check what was uploaded and make the object readable."""
        while True:
            current, revision = await self._manifest(request.object_id)
            manifest = manifests.require_chunk(current, request.object_id, 0)
            if manifest.sealed:
                return encode(manifests.readable(manifest, request.object_id))
            size_bytes = digest = 0
            for index in range(manifest.chunks):
                chunk = await self._chunk(request.object_id, index)
                size_bytes += len(chunk)
                digest = zlib.crc32(chunk, digest)
            whole = manifests.sealed(manifest, size_bytes, f"{digest:08x}")
            if await self._store(whole, revision):
                return encode(manifests.readable(whole, request.object_id))

    async def get(self, request: DurableGet) -> bytes:
        """Return the manifest of a sealed object."""
        current, _ = await self._manifest(request.object_id)
        return encode(manifests.readable(current, request.object_id))

    async def get_chunk(self, request: DurableGetChunk) -> bytes:
        """Return one chunk."""
        return encode(DurableChunk(data=await self._chunk(request.object_id, request.index)))

    async def delete(self, request: DurableDelete) -> bytes:
        """Remove an object; it is no error if it is not there."""
        await self._stream.purge(request.object_id)
        return encode(Done())

    async def sweep(self) -> None:
        """Remove what uploads left behind that nobody ended, again and again."""
        while True:
            for object_id in await self._stream.counts():
                current, _ = await self._manifest(object_id)
                if manifests.is_abandoned(current, time.time()):
                    await self._stream.purge(object_id)
            await asyncio.sleep(SWEEP_SECONDS)

    async def _manifest(self, object_id: str) -> tuple[Manifest | None, int]:
        entry = await self._stream.manifests.get(f"{object_id}.manifest")
        return (None, 0) if entry is None else (manifests.decode(entry.value), entry.revision)

    async def _store(self, manifest: Manifest, revision: int) -> bool:
        try:
            await self._stream.manifests.put(
                f"{manifest.object_id}.manifest", manifests.encode(manifest), revision=revision
            )
        except RevisionConflict:
            return False
        return True

    async def _chunk(self, object_id: str, index: int) -> bytes:
        chunk = await self._stream.get_chunk(object_id, index)
        if chunk is None:
            raise NotFoundError(f"chunk {index} of object {object_id} is not in the durable tier")
        return chunk


@asynccontextmanager
async def serve(bus: Bus, settings: ServiceSettings) -> AsyncIterator[Engine]:
    """Run one replica of the durable tier; entering means that it serves."""
    subjects = Subjects(settings.cluster)
    stream = await open_object_stream(
        bus, subjects.object_stream(), subjects.object_prefix(), replicas=settings.replicas
    )
    objects = DurableObjects(stream)
    routes = [
        RawRoute(subjects.objectstore("put"), DurablePut, objects.put, OBJECTSTORE_QUEUE),
        RawRoute(subjects.objectstore("put_chunk"), DurablePutChunk, objects.put_chunk, OBJECTSTORE_QUEUE),
        RawRoute(subjects.objectstore("seal"), DurableSeal, objects.seal, OBJECTSTORE_QUEUE),
        RawRoute(subjects.objectstore("get"), DurableGet, objects.get, OBJECTSTORE_QUEUE),
        RawRoute(subjects.objectstore("get_chunk"), DurableGetChunk, objects.get_chunk, OBJECTSTORE_QUEUE),
        RawRoute(subjects.objectstore("delete"), DurableDelete, objects.delete, OBJECTSTORE_QUEUE),
    ]
    async with asyncio.TaskGroup() as tasks:
        sweeping = tasks.create_task(objects.sweep())
        async with Engine(_Nothing(), bus, name="objectstore", routes=routes) as engine:
            yield engine
        sweeping.cancel()


SERVICE = Service("objectstore", Role.OBJECTSTORE, ServiceSettings, serve)
