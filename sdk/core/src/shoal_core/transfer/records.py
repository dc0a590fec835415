"""What the two ends of a transfer say to each other: msgspec structs in msgpack, arrays on the wire."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from shoal_core.protocol.ids import PeerId

CHUNK_BYTES = 1024 * 1024
"""The size of a chunk where the broker takes as much in one message."""


class Want(msgspec.Struct, array_like=True, frozen=True, tag=1):
    """Puller → source: send me what I do not ``have``; also how it acknowledges, and how it asks again.

    ``have`` is a bitmap of chunks, little-endian. ``pull`` is the puller's number of this pull; ``epoch`` rises where
    what is in flight to it is not to be counted upon. At most ``window`` chunks may be in flight.
    """

    stream: str
    pull: int
    epoch: int
    have: bytes
    window: int


class Leave(msgspec.Struct, array_like=True, frozen=True, tag=2):
    """Puller → source: this pull has ended."""

    stream: str
    pull: int


class Whole(msgspec.Struct, array_like=True, frozen=True, tag=3):
    """Source → puller: you have all chunks; ``digest`` is the crc32 of their crc32s, 4 little-endian bytes each."""

    pull: int
    digest: int


class Gone(msgspec.Struct, array_like=True, frozen=True, tag=4):
    """Source → puller: the object is not offered here (any more)."""

    pull: int
    reason: str


class Resume(msgspec.Struct, array_like=True, frozen=True, tag=5):
    """Source → puller: my connection was lost; say again what you want."""

    pull: int


Record = Want | Leave | Whole | Gone | Resume

encode = msgspec.msgpack.Encoder().encode
"""Turn one record into bytes."""
decode = msgspec.msgpack.Decoder(Record).decode
"""Turn bytes into a record; ``msgspec.ValidationError`` if they are none."""


@dataclass(frozen=True, slots=True)
class Tell:
    """Effect of both cores: send a record to a peer."""

    peer: PeerId
    record: Record


def chunk_count(size_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks an object has."""
    return -(-size_bytes // chunk_bytes)


def to_bitmap(bits: int, count: int) -> bytes:
    """Return a set of chunks as it travels."""
    return bits.to_bytes((count + 7) // 8, "little")


def lowest(bits: int) -> int:
    """Return the lowest number in a set that is not empty."""
    return (bits & -bits).bit_length() - 1
