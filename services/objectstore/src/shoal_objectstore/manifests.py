"""What a durable object's manifest says, where its parts lie, and how it may change, as pure functions.

::

    (nothing) ── put ──► OPEN ── seal: all chunks are there, their digest is right ──► SEALED ── delete ──► tombstone
        ▲                 └── nobody seals it for ABANDONED_SECONDS ──────────────────────────────────────────┤
        └──────────────────────────────────────── purge ──────────────────────────────────────────────────────┘

=================================  ===================================================================
key                                value
=================================  ===================================================================
``<object>.manifest``              a ``Manifest`` as JSON; a tombstone is empty
``<object>.<upload>.<index>``      a chunk's bytes; written once, at a key that holds nothing
=================================  ===================================================================

An *upload* is named by the revision at which it was opened, which no other upload ever has. So what a slow writer still
writes for an upload that was deleted lies beside the next one, and not in it.
"""

from __future__ import annotations

import re

import msgspec

from shoal_core.protocol.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, ServiceError
from shoal_core.protocol.messages import DurableManifest, DurablePut, DurablePutChunk

ABANDONED_SECONDS = 3600.0
CHUNK_BYTES = 512 * 1024
OBJECT_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
TOMBSTONE = b""


class Manifest(msgspec.Struct, frozen=True):
    """The record of one object. ``opened_at`` is in seconds since the epoch.

    ``upload`` is 0 in the record of an open upload, which cannot know the revision that it is given.
    """

    object_id: str
    size_bytes: int
    chunks: int
    digest: str
    opened_at: float
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


def opened(current: Manifest | None, request: DurablePut, now: float) -> Manifest | None:
    """Return the manifest to store for a put; None if the same upload is open or done already."""
    if request.chunks < 1 or request.size_bytes < 0:
        raise InvalidRequestError(f"object {request.object_id}: an upload has at least one chunk and no negative size")
    if current is None:
        return Manifest(request.object_id, request.size_bytes, request.chunks, request.digest, now)
    same = (request.size_bytes, request.chunks, request.digest)
    if (current.size_bytes, current.chunks, current.digest) != same:
        raise AlreadyExistsError(f"object {request.object_id} exists with other contents; delete it first")
    return None


def require_upload(manifest: Manifest | None, object_id: str) -> Manifest:
    """Return the manifest of an upload, open or sealed."""
    if manifest is None:
        raise NotFoundError(f"object {object_id} was not opened; put it first")
    return manifest


def check_index(manifest: Manifest, index: int) -> None:
    """Refuse a chunk that was not announced."""
    if not 0 <= index < manifest.chunks:
        raise InvalidRequestError(f"object {manifest.object_id} has chunks 0 to {manifest.chunks - 1}, not {index}")


def check_size(chunk: DurablePutChunk) -> None:
    """Refuse a chunk that is too large."""
    if len(chunk.data) > CHUNK_BYTES:
        raise InvalidRequestError(f"data: a chunk has at most {CHUNK_BYTES} bytes, not {len(chunk.data)}")


def sealed(manifest: Manifest, size_bytes: int, digest: str) -> Manifest:
    """Return the manifest to store for a seal, after the size and digest of what is there were computed."""
    if (size_bytes, digest) != (manifest.size_bytes, manifest.digest):
        raise ServiceError(
            f"object {manifest.object_id} holds {size_bytes} bytes with digest {digest}, but {manifest.size_bytes} "
            f"bytes with digest {manifest.digest} were announced; delete it and upload it again"
        )
    return msgspec.structs.replace(manifest, sealed=True)


def require_sealed(manifest: Manifest | None, object_id: str) -> Manifest:
    """Return the manifest of an object that may be read."""
    if manifest is None or not manifest.sealed:
        raise NotFoundError(f"object {object_id} is not in the durable tier")
    return manifest


def described(manifest: Manifest) -> DurableManifest:
    """Return what a reader is told."""
    return DurableManifest(
        object_id=manifest.object_id, size_bytes=manifest.size_bytes, chunks=manifest.chunks, digest=manifest.digest
    )


def is_abandoned(manifest: Manifest, now: float) -> bool:
    """Tell whether nobody will end an upload."""
    return not manifest.sealed and now - manifest.opened_at > ABANDONED_SECONDS
