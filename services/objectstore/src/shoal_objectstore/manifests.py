"""What a durable object's manifest says, and how it may change, as pure functions.

::

    (nothing) ── put ──► OPEN ── seal: all chunks are there, their digest is right ──► SEALED ── delete ──► (nothing)
                          └── nobody seals it for ABANDONED_SECONDS ──► (nothing)

The manifest changes by compare-and-set only, so any number of replicas may work on one object. An object is readable
once it is SEALED, and never changes afterwards.
"""

from __future__ import annotations

import msgspec

from shoal_core.protocol.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, ServiceError
from shoal_core.protocol.messages import DurableManifest, DurablePut

ABANDONED_SECONDS = 3600.0


class Manifest(msgspec.Struct, frozen=True):
    """The record of one object. ``opened_at`` is in seconds since the epoch."""

    object_id: str
    size_bytes: int
    chunks: int
    digest: str
    opened_at: float
    sealed: bool = False


def encode(manifest: Manifest) -> bytes:
    """Return a manifest as it is stored."""
    return msgspec.json.encode(manifest)


def decode(data: bytes) -> Manifest:
    """Return the manifest that is stored."""
    return msgspec.json.decode(data, type=Manifest)


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


def require_chunk(manifest: Manifest | None, object_id: str, index: int) -> Manifest:
    """Return the manifest of an open upload that has a chunk of this index."""
    if manifest is None:
        raise NotFoundError(f"object {object_id} was not opened; put it first")
    if not 0 <= index < manifest.chunks:
        raise InvalidRequestError(f"object {object_id} has chunks 0 to {manifest.chunks - 1}, not {index}")
    return manifest


def sealed(manifest: Manifest, size_bytes: int, digest: str) -> Manifest:
    """Return the manifest to store for a seal, after the size and digest of what is there were computed."""
    if (size_bytes, digest) != (manifest.size_bytes, manifest.digest):
        raise ServiceError(
            f"object {manifest.object_id} holds {size_bytes} bytes with digest {digest}, but {manifest.size_bytes} "
            f"bytes with digest {manifest.digest} were announced; upload it again"
        )
    return msgspec.structs.replace(manifest, sealed=True)


def readable(manifest: Manifest | None, object_id: str) -> DurableManifest:
    """Return what a reader is told; ``NotFoundError`` unless the object is sealed."""
    if manifest is None or not manifest.sealed:
        raise NotFoundError(f"object {object_id} is not in the durable tier")
    return DurableManifest(
        object_id=object_id, size_bytes=manifest.size_bytes, chunks=manifest.chunks, digest=manifest.digest
    )


def is_abandoned(manifest: Manifest | None, now: float) -> bool:
    """Tell whether what lies under an object's name can go: nobody ends its upload."""
    return manifest is None or (not manifest.sealed and now - manifest.opened_at > ABANDONED_SECONDS)
