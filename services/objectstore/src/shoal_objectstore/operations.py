"""What the durable tier is asked to do, each as one operation on one object.

An operation reads the manifest, looks at it, and answers or asks for the next step; the outcome comes back to it. An
operation that lost a race looks at what is there now. See ``core`` for what they promise together.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from shoal_core.protocol.effects import Conflict, Effect, Load, Reply, Start, Store
from shoal_core.protocol.errors import AlreadyExistsError, ShoalError
from shoal_core.protocol.messages import Done, DurableChunk, DurablePut, DurablePutChunk, Message
from shoal_objectstore import manifests
from shoal_objectstore.manifests import TOMBSTONE, Manifest, manifest_key


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """Command: read a chunk from any replica of the stream; ``ChunkRead`` comes back."""

    place: str
    index: int
    context: Operation


@dataclass(frozen=True, slots=True)
class ChunkRead:
    """Input: a chunk's bytes; None if it is not there, or the error that came instead."""

    command: ReadChunk
    data: bytes | ShoalError | None


@dataclass(frozen=True, slots=True)
class Purge:
    """Command: delete all keys below ``place`` whose revision is at most ``revision``; ``Purged`` comes back."""

    place: str
    revision: int | None
    context: Operation


@dataclass(frozen=True, slots=True)
class Purged:
    """Input: they are gone; or the error that came instead, after which they may be."""

    command: Purge
    error: ShoalError | None = None


class Operation(ABC):
    """One thing to be done to one object; ``token`` names who asked, None where nobody did.

    What forbids it is raised as a ``ShoalError``, which becomes the answer.
    """

    token: int | None
    object_id: str

    def begin(self) -> list[Effect]:
        """Read the manifest."""
        return [Load(manifest_key(self.object_id), self)]

    @abstractmethod
    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Decide by the manifest that the key holds at this revision (None and 0: nothing, None: a tombstone)."""

    def conflicted(self, conflict: Conflict) -> list[Effect]:
        """Decide anew after a write came too late."""
        return self.look(manifests.decode(conflict.value, conflict.revision), conflict.revision)

    def stored(self, revision: int) -> list[Effect]:
        """Go on after a write."""
        return self.answer(Done())

    def read(self, data: bytes) -> list[Effect]:
        """Go on after a chunk was read."""
        raise TypeError(f"{type(self).__name__} reads no chunks")

    def purged(self) -> list[Effect]:
        """Go on after a purge."""
        return self.answer(Done())

    def answer(self, message: Message | ShoalError) -> list[Effect]:
        """Return the answer to whoever asked."""
        return [] if self.token is None else [Reply(self.token, message)]

    def write(self, value: bytes, revision: int) -> list[Effect]:
        """Replace the manifest that was looked at."""
        return [Store(manifest_key(self.object_id), value, revision, self)]


@dataclass(frozen=True, slots=True)
class OpenUpload(Operation):
    """Open an upload."""

    token: int
    object_id: str
    request: DurablePut
    now: float

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Make the manifest, unless the same upload is there."""
        new = manifests.opened(manifest, self.request, self.now)
        return self.answer(Done()) if new is None else self.write(manifests.encode(new), revision)


@dataclass(frozen=True, slots=True)
class WriteChunk(Operation):
    """Store a chunk of an open upload."""

    token: int
    object_id: str
    request: DurablePutChunk

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Write it; a sealed object has it already."""
        upload = manifests.require_upload(manifest, self.object_id)
        manifests.check_index(upload, self.request.index)
        if upload.sealed:
            return self.answer(Done())
        return [Store(f"{upload.place}.{self.request.index}", self.request.data, 0, self)]

    def conflicted(self, conflict: Conflict) -> list[Effect]:
        """Accept the same bytes, and no others."""
        if conflict.value is None:  # the upload was deleted meanwhile
            return self.begin()
        if conflict.value != self.request.data:
            raise AlreadyExistsError(
                f"chunk {self.request.index} of object {self.object_id} was uploaded with other bytes; "
                "delete the object and upload it again"
            )
        return self.answer(Done())


@dataclass(frozen=True, slots=True)
class SealObject(Operation):
    """Check what was uploaded, one chunk at a time, and make the object readable."""

    token: int
    object_id: str
    upload: Manifest | None = None
    revision: int = 0
    index: int = 0
    size_bytes: int = 0
    digest: int = 0

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Begin to check, unless it is sealed."""
        upload = manifests.require_upload(manifest, self.object_id)
        if upload.sealed:
            return self.answer(manifests.described(upload))
        checking = replace(self, upload=upload, revision=revision, index=0, size_bytes=0, digest=0)
        return [Start(ReadChunk(upload.place, 0, checking))]

    def read(self, data: bytes) -> list[Effect]:
        """Add a chunk to what was checked; after the last, write the seal."""
        assert self.upload is not None
        checked = replace(
            self,
            index=self.index + 1,
            size_bytes=self.size_bytes + len(data),
            digest=zlib.crc32(data, self.digest),
        )
        if checked.index < self.upload.chunks:
            return [Start(ReadChunk(self.upload.place, checked.index, checked))]
        whole = manifests.sealed(self.upload, checked.size_bytes, f"{checked.digest:08x}")
        return replace(checked, upload=whole).write(manifests.encode(whole), self.revision)

    def stored(self, revision: int) -> list[Effect]:
        """Answer with what is readable now."""
        assert self.upload is not None
        return self.answer(manifests.described(self.upload))


@dataclass(frozen=True, slots=True)
class DescribeObject(Operation):
    """Answer with the manifest of a sealed object."""

    token: int
    object_id: str

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Answer."""
        return self.answer(manifests.described(manifests.require_sealed(manifest, self.object_id)))


@dataclass(frozen=True, slots=True)
class FetchChunk(Operation):
    """Answer with a chunk of a sealed object."""

    token: int
    object_id: str
    index: int

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Read it."""
        whole = manifests.require_sealed(manifest, self.object_id)
        manifests.check_index(whole, self.index)
        return [Start(ReadChunk(whole.place, self.index, self))]

    def read(self, data: bytes) -> list[Effect]:
        """Answer."""
        return self.answer(DurableChunk(data=data))


class Removal(Operation):
    """What ends with a tombstone, and a purge of all up to it."""

    def bury(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Write the tombstone in place of what is there, unless it is a tombstone."""
        return self.stored(revision) if manifest is None else self.write(TOMBSTONE, revision)

    def stored(self, revision: int) -> list[Effect]:
        """Purge up to the tombstone."""
        return [Start(Purge(self.object_id, revision, self))]


@dataclass(frozen=True, slots=True)
class DeleteObject(Removal):
    """Remove an object; it is no error if it is not there."""

    token: int
    object_id: str

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Remove what there is."""
        return self.bury(manifest, revision) if revision else self.answer(Done())


@dataclass(frozen=True, slots=True)
class SweepObject(Removal):
    """Remove what nobody will miss of an object; ``places`` are those where its chunks were seen to lie."""

    object_id: str
    places: tuple[str, ...]
    now: float
    token: None = None

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Remove an upload that was abandoned or deleted; else chunks of earlier uploads, one upload at a time."""
        if revision and (manifest is None or manifests.is_abandoned(manifest, self.now)):
            return self.bury(manifest, revision)
        gone = [place for place in self.places if manifest is None or place != manifest.place]
        return [Start(Purge(gone[0], None, replace(self, places=tuple(gone[1:]))))] if gone else []

    def purged(self) -> list[Effect]:
        """Look again if there is more."""
        return self.begin() if self.places else []
