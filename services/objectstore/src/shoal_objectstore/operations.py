"""What the durable tier is asked to do, each as one operation on one object.

An operation reads the manifest, looks at it, and answers or asks for the next step; the outcome comes back to it. An
operation that lost a race looks at what is there now. See ``core`` for what they promise together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass, replace

from zlib_ng.zlib_ng import crc32

from shoal_core.protocol.effects import Conflict, Effect, Load, Reply, Start, Store
from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import Done, Message
from shoal_core.protocol.storage import DurableChunk, DurablePut, DurablePutChunk, DurableUpload
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
class CountChunks:
    """Command: count the chunks of an upload, as the stream's leader knows them; ``ChunksCounted`` comes back."""

    place: str
    context: Operation


@dataclass(frozen=True, slots=True)
class ChunksCounted:
    """Input: how many chunks there are, or the error that came instead."""

    command: CountChunks
    count: int | ShoalError


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

    def counted(self, chunks: int) -> list[Effect]:
        """Go on after chunks were counted."""
        raise TypeError(f"{type(self).__name__} counts no chunks")

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
    """Open an upload, or hold what is there."""

    token: int
    object_id: str
    request: DurablePut
    now: float
    sealed: bool = False
    upload: int = 0

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Make or change the manifest, unless it says so already."""
        new = manifests.opened(manifest, self.request, self.now)
        known = manifest if new is None else new
        assert known is not None
        seen = replace(self, sealed=known.sealed, upload=known.upload)
        return seen.stored(revision) if new is None else seen.write(manifests.encode(new), revision)

    def stored(self, revision: int) -> list[Effect]:
        """Answer with where the chunks go."""
        return self.answer(DurableUpload(place=f"{self.object_id}.{self.upload or revision}", sealed=self.sealed))


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
        manifests.check_digest(upload, self.request.index, crc32(self.request.data))
        if upload.sealed:
            return self.answer(Done())
        return [Store(f"{upload.place}.{self.request.index}", self.request.data, 0, self)]

    def conflicted(self, conflict: Conflict) -> list[Effect]:
        """Take a chunk that is there for this one: it has the digest that was announced, or nobody could write it."""
        return self.begin() if conflict.value is None else self.answer(Done())


@dataclass(frozen=True, slots=True)
class SealObject(Operation):
    """See that all chunks are there, and make the object readable."""

    token: int
    object_id: str
    upload: Manifest | None = None
    revision: int = 0

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Have the chunks counted, unless it is sealed."""
        upload = manifests.require_upload(manifest, self.object_id)
        if upload.sealed:
            return self.answer(Done())
        return [Start(CountChunks(upload.place, replace(self, upload=upload, revision=revision)))]

    def counted(self, chunks: int) -> list[Effect]:
        """Write the seal in place of the manifest under which they were counted."""
        assert self.upload is not None
        return self.write(manifests.encode(manifests.sealed(self.upload, chunks)), self.revision)


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
    """What ends with a tombstone, and a purge of all before it; or with less, where the object is ``kept``."""

    kept: bool

    def stored(self, revision: int) -> list[Effect]:
        """Purge all before the tombstone, if one was written."""
        return self.let_go() if self.kept else [Start(Purge(self.object_id, revision - 1, self))]

    @abstractmethod
    def let_go(self) -> list[Effect]:
        """Go on after some have let go of the object that others hold."""


@dataclass(frozen=True, slots=True)
class DeleteObject(Removal):
    """Hold an object no more, and remove it with its last holder; it is no error if it is not there."""

    token: int
    object_id: str
    holder: str
    kept: bool = False

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Let go of it, or remove what there is."""
        if manifest is None:
            return self.stored(revision) if revision else self.answer(Done())
        left = manifests.released(manifest, self.holder)
        if left is None:
            return self.write(TOMBSTONE, revision)
        if left == manifest:
            return self.answer(Done())
        return replace(self, kept=True).write(manifests.encode(left), revision)

    def conflicted(self, conflict: Conflict) -> list[Effect]:
        """Decide anew."""
        return replace(self, kept=False).look(manifests.decode(conflict.value, conflict.revision), conflict.revision)

    def let_go(self) -> list[Effect]:
        """Answer."""
        return self.answer(Done())


@dataclass(frozen=True, slots=True)
class SweepObject(Removal):
    """Remove what nobody will miss of an object; ``places`` are those where its chunks were seen to lie.

    ``jobs`` are those that have ended, of which nobody will miss anything.
    """

    object_id: str
    places: tuple[str, ...]
    now: float
    jobs: Container[JobId] = ()
    kept: bool = False
    token: None = None

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Remove what is expired or abandoned; else chunks of earlier uploads, one upload at a time."""
        if manifest is not None:
            left = None if manifest.job_id in self.jobs else manifests.expired(manifest, self.now)
            if left is None:
                return replace(self, kept=False).write(TOMBSTONE, revision)
            if left != manifest:
                return replace(self, kept=True).write(manifests.encode(left), revision)
        gone = [place for place in self.places if manifest is None or place != manifest.place]
        return [Start(Purge(gone[0], None, replace(self, places=tuple(gone[1:]))))] if gone else []

    def let_go(self) -> list[Effect]:
        """Look again, for what else there may be."""
        return self.begin()

    def purged(self) -> list[Effect]:
        """Look again if there is more."""
        return self.begin() if self.places else []


@dataclass(frozen=True, slots=True)
class DropTombstone(Operation):
    """Purge what is left of an object that was removed at this revision: the tombstone."""

    object_id: str
    revision: int
    token: None = None

    def begin(self) -> list[Effect]:
        """Purge; what was put since has a higher revision."""
        return [Start(Purge(self.object_id, self.revision, self))]

    def look(self, manifest: Manifest | None, revision: int) -> list[Effect]:
        """Raise: there is nothing to look at."""
        raise TypeError("a tombstone is dropped without a look")
