"""What a node's object store orders to be done with files and the durable tier, and what comes back; sizes of files."""

from __future__ import annotations

from dataclasses import dataclass

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import JobId, NodeId
from shoal_worker.objects.restoring import Restoration

PAGE_BYTES = 4096
SLAB_BYTES = 64 * 1024 * 1024
MOST_SHARED_BYTES = 1024 * 1024
"""What processes write that takes no more than this shares its file with others (see ``slabs``)."""


def size_class(size_bytes: int) -> int:
    """Return the size of the file for an object: powers of two in four steps, so that at most a quarter is unused."""
    if size_bytes <= PAGE_BYTES:
        return PAGE_BYTES
    step = max(PAGE_BYTES, 1 << ((size_bytes - 1).bit_length() - 3))
    return -(-size_bytes // step) * step


@dataclass(frozen=True, slots=True)
class CreateFile:
    """Make a file of this size with all its pages reserved, from the warm file ``reused`` if that is free to be used.

    The outcome comes back as ``FileCreated``. Where it is to be ``filled``, nobody finds it under its name before.
    ``part`` says where it is to lie in a file that others share; a part that is warm is ``reused`` where it lies.
    """

    name: str
    capacity_bytes: int
    reused: str = ""
    filled: bool = False
    part: str = ""


@dataclass(frozen=True, slots=True)
class LinkFile:
    """Give a file of another node, whose folder lies beside ours, a name here as well; ``FileLinked`` comes back."""

    name: str
    home: NodeId
    origin: str


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """Remove a file, and its pages with it; or the pages of a part of one, which has so many bytes."""

    name: str
    part_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ShelveFile:
    """Give the file of a spilled segment another name, under which it is kept warm."""

    name: str
    shelf: str


@dataclass(frozen=True, slots=True)
class FillFile:
    """Write a durable object into a file that was made to be filled; ``FileFilled`` comes back."""

    name: str
    object_id: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SpillFile:
    """Copy the object that lies at ``place`` into the durable tier; ``FileSpilled`` comes back.

    ``holder`` is the segment, or, where the object was put as a durable one, ``PUT_HOLDER``: for so long.
    """

    name: str
    place: str
    object_id: str
    size_bytes: int
    job: JobId
    holder: str
    keep_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class DropDurable:
    """Hold a durable object no more: those whose names begin so."""

    object_id: str
    holder: str


FileCommand = CreateFile | LinkFile | RemoveFile | ShelveFile | FillFile | SpillFile | DropDurable


@dataclass(frozen=True, slots=True)
class FindDurable:
    """Command: ask the durable tier for an object's size; ``DurableFound`` comes back."""

    restoration: Restoration


@dataclass(frozen=True, slots=True)
class FileCreated:
    """Input: a segment's file is made and its pages are reserved; ``error`` says why not.

    ``busy`` is the warm file that was to be used again, where somebody else uses it still: it is as it was.
    """

    name: str
    error: str = ""
    no_space: bool = False
    busy: str = ""


@dataclass(frozen=True, slots=True)
class FileLinked:
    """Input: a file of another node has a name here as well; ``error`` says why not."""

    name: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class FileFilled:
    """Input: a file holds its object now; ``error`` says why not."""

    name: str
    error: ShoalError | None = None


@dataclass(frozen=True, slots=True)
class FileSpilled:
    """Input: an object is in the durable tier now; ``error`` says why not, and then nothing of it is."""

    name: str
    holder: str
    error: ShoalError | None = None


@dataclass(frozen=True, slots=True)
class DurableFound:
    """Input: the size of a durable object that is to be restored, or the error that came instead."""

    restoration: Restoration
    size_bytes: int
    error: ShoalError | None = None


StoreInput = FileCreated | FileFilled | FileSpilled | DurableFound

StoreCommand = FileCommand | FindDurable
