"""What a durable object's manifest says, where its parts lie, and how it may change, as pure functions.

::

    (nothing) ── put ──► OPEN ── seal: all chunks are there ──► SEALED ── nobody holds it, or its job ends ──► tombstone
        ▲                 └── nobody seals it for ABANDONED_SECONDS ─────────────────────────────────────────────┤
        └──────────────────────────────────────────── purge ─────────────────────────────────────────────────────┘

=================================  ===================================================================
key                                value
=================================  ===================================================================
``<object>.manifest``              a ``Manifest`` as JSON; a tombstone is empty
``<object>.<upload>.<index>``      a chunk's bytes; written once, at a key that holds nothing
=================================  ===================================================================

An *upload* is named by the revision at which it was opened, which no other upload ever has. So what a slow writer still
writes for an upload that was deleted lies beside the next one, and not in it.

An object has *holders*: whoever put it, and each node that has spilled it (the results of two attempts of one task are
one object, perhaps on two nodes). The same contents may be put again, by others too, who hold it from then on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from shoal_core.protocol.errors import AlreadyExistsError, InvalidRequestError, NotFoundError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.storage import CHUNK_BYTES, DurableManifest, DurablePut, DurablePutChunk

ABANDONED_SECONDS = 3600.0
OBJECT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
TOMBSTONE = b""
FOR_EVER = 0.0


class Manifest(msgspec.Struct, frozen=True):
    """The record of one object. ``opened_at`` is in seconds since the epoch.

    ``holders`` says until when each holds the object (seconds since the epoch; ``FOR_EVER``: no end). ``upload`` is 0
    in the record that opens an upload, which cannot know the revision that it is given.
    """

    object_id: str
    size_bytes: int
    digests: list[int]
    opened_at: float
    job_id: JobId = JobId("")
    holders: Mapping[str, float] = {}
    sealed: bool = False
    upload: int = 0

    @property
    def place(self) -> str:
        """What the keys of its chunks begin with."""
        return f"{self.object_id}.{self.upload}"


def manifest_key(object_id: str) -> str:
    """Return where an object's manifest is kept."""
    return f"{object_id}.manifest"


def encode(manifest: Manifest) -> bytes:
    """Return a manifest as it is stored."""
    return msgspec.json.encode(manifest)


def decode(value: bytes | None, revision: int) -> Manifest | None:
    """Return the manifest that is stored at a revision; None for a tombstone, or nothing."""
    if not value:
        return None
    manifest = msgspec.json.decode(value, type=Manifest)
    return manifest if manifest.upload else msgspec.structs.replace(manifest, upload=revision)


def check_object_id(object_id: str) -> None:
    """Refuse what is no token of a subject, or a pattern that would mean other objects too."""
    if OBJECT_ID.fullmatch(object_id) is None:
        raise InvalidRequestError(f"object_id: {object_id[:140]!r} is not 1 to 128 letters, digits, - or _")


def check_put(request: DurablePut) -> None:
    """Refuse an upload whose chunks could not make an object of its size."""
    chunks = len(request.digests)
    if chunks < 1 or not 0 <= request.size_bytes <= chunks * CHUNK_BYTES:
        raise InvalidRequestError(
            f"object {request.object_id}: {request.size_bytes} bytes do not make {chunks} chunks of at most "
            f"{CHUNK_BYTES} bytes"
        )


def opened(current: Manifest | None, request: DurablePut, now: float) -> Manifest | None:
    """Return the manifest to store for a put; None if it changes nothing: the upload is there, and held so."""
    until = FOR_EVER if request.keep_seconds is None else now + request.keep_seconds
    if current is None:
        return Manifest(
            request.object_id, request.size_bytes, request.digests, now, request.job_id, {request.holder: until}
        )
    if (current.size_bytes, current.digests) != (request.size_bytes, request.digests):
        raise AlreadyExistsError(f"object {request.object_id} exists with other contents; delete it first")
    if request.holder in current.holders:
        return None
    return msgspec.structs.replace(current, holders={**current.holders, request.holder: until})


def released(manifest: Manifest, holder: str) -> Manifest | None:
    """Return the manifest without the holders whose names begin so; None if nobody is left who holds the object."""
    holders = {name: until for name, until in manifest.holders.items() if not name.startswith(holder)}
    return msgspec.structs.replace(manifest, holders=holders) if holders else None


def expired(manifest: Manifest, now: float) -> Manifest | None:
    """Return the manifest without the holders whose time is over; None if nobody is left, or nobody ends the upload."""
    if not manifest.sealed and now - manifest.opened_at > ABANDONED_SECONDS:
        return None
    holders = {name: until for name, until in manifest.holders.items() if until == FOR_EVER or until > now}
    if not holders:
        return None
    return manifest if len(holders) == len(manifest.holders) else msgspec.structs.replace(manifest, holders=holders)


def require_upload(manifest: Manifest | None, object_id: str) -> Manifest:
    """Return the manifest of an upload, open or sealed."""
    if manifest is None:
        raise NotFoundError(f"object {object_id} was not opened; put it first")
    return manifest


def check_index(manifest: Manifest, index: int) -> None:
    """Refuse a chunk that was not announced."""
    chunks = len(manifest.digests)
    if not 0 <= index < chunks:
        raise InvalidRequestError(f"object {manifest.object_id} has chunks 0 to {chunks - 1}, not {index}")


def check_size(chunk: DurablePutChunk) -> None:
    """Refuse a chunk that is too large."""
    if len(chunk.data) > CHUNK_BYTES:
        raise InvalidRequestError(f"data: a chunk has at most {CHUNK_BYTES} bytes, not {len(chunk.data)}")


def check_digest(manifest: Manifest, index: int, digest: int) -> None:
    """Refuse a chunk with other bytes than were announced."""
    if digest != manifest.digests[index]:
        raise InvalidRequestError(
            f"chunk {index} of object {manifest.object_id} has digest {digest:08x}, but "
            f"{manifest.digests[index]:08x} was announced; delete the object and upload it again"
        )


def sealed(manifest: Manifest, chunks: int) -> Manifest:
    """Return the manifest to store for a seal, after the chunks that are there were counted."""
    if chunks < len(manifest.digests):
        raise NotFoundError(
            f"object {manifest.object_id} is not whole: {chunks} of its {len(manifest.digests)} chunks are there; "
            "upload the others"
        )
    return msgspec.structs.replace(manifest, sealed=True, upload=manifest.upload)


def require_sealed(manifest: Manifest | None, object_id: str) -> Manifest:
    """Return the manifest of an object that may be read."""
    if manifest is None or not manifest.sealed:
        raise NotFoundError(f"object {object_id} is not in the durable tier")
    return manifest


def described(manifest: Manifest) -> DurableManifest:
    """Return what a reader is told."""
    return DurableManifest(
        object_id=manifest.object_id,
        size_bytes=manifest.size_bytes,
        digests=manifest.digests,
        place=manifest.place,
    )
