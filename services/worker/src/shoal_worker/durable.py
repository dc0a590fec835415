"""The durable tier, as a node uses it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import ObjectLostError
from shoal_core.protocol.messages import DurableChunk, DurableGet, DurableGetChunk, DurableManifest
from shoal_core.protocol.subjects import Subjects

REQUEST_SECONDS = 30.0


class DurableTier:
    """Durable objects, read through the service that keeps them."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects

    async def manifest(self, object_id: str) -> DurableManifest:
        """Return what is kept of an object; ``NotFoundError`` where nothing is."""
        request = DurableGet(object_id=object_id)
        answer = await ask(self._bus, self._subjects.objectstore("get"), request, timeout_seconds=REQUEST_SECONDS)
        assert isinstance(answer, DurableManifest)
        return answer

    async def size_bytes(self, object_id: str) -> int:
        """Return an object's size; ``NotFoundError`` where it is not there."""
        return (await self.manifest(object_id)).size_bytes

    async def read_into(self, path: Path, object_id: str) -> None:
        """Write an object into a file that is large enough; ``ObjectLostError`` where its bytes are not right."""
        manifest = await self.manifest(object_id)
        digest = offset = 0
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for index in range(manifest.chunks):
                request = DurableGetChunk(object_id=object_id, index=index)
                chunk = await ask(
                    self._bus, self._subjects.objectstore("get_chunk"), request, timeout_seconds=REQUEST_SECONDS
                )
                assert isinstance(chunk, DurableChunk)
                digest = zlib.crc32(chunk.data, digest)
                offset += os.pwrite(descriptor, chunk.data, offset)
        finally:
            os.close(descriptor)
        if f"{digest:08x}" != manifest.digest:
            raise ObjectLostError(f"durable object {object_id} has digest {digest:08x}, not {manifest.digest}")
