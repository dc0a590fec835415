"""The control plane's messages about objects: shared memory of a node, and durable objects.

See ``messages`` for what all messages share.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from shoal_core.protocol.ids import JobId, NodeId, ObjectKey, ProcessId
from shoal_core.protocol.messages import Message

MOST_LISTED_OBJECTS = 1000
MOST_PINS = 1000
"""How many segments one request pins."""
PLACE = "A file in the node's shared-memory folder; with `+` and an offset where the file is one that segments share."
CHUNK_BYTES = 1024 * 1024 - 4096
"""Of a durable object: with its headers, a chunk is one message of the broker's usual ``max_payload``."""
PUT_HOLDER = "put"
"""Who holds a durable object because it was put as one."""
NODE_HOLDER = "node:"
"""What the names of the nodes begin with that hold a durable object because they have spilled it."""


class AllocateSegment(Message):
    """Ask the node for a segment to write one object into (verb ``allocate``).

    The same request again, as after a lost answer, is answered with the same segment while that is not sealed.
    """

    process: ProcessId
    size_bytes: int
    serial: int = Field(description="Of this process's requests, another number for each.")
    ahead: bool = Field(
        default=False,
        description="There is nothing to write yet: only where room is ample, and until `SegmentRecalled` asks for it.",
    )


class SegmentGranted(Message):
    """The file to write; it is pinned for the asker until it seals, frees or dies."""

    segment: str = Field(description="Empty where nothing is to be had ahead.")
    place: str = Field(description=PLACE)
    capacity_bytes: int


class PinSegment(Message):
    """Ask one's own node to keep a segment while this process maps it (verb ``pin``).

    Where the segment is another node's, the node first pulls a copy of it, once for all who ask.
    """

    process: ProcessId
    segment: str = Field(description="The segment's name on the node where the object lies, its home.")
    serial: int = Field(
        description="Rises with each pin this process asks for, from 1. A repeated or late request can so be told "
        "from a new one: `SegmentUnpinned` with this serial ends this pin, even if a copy of the request comes later."
    )
    home: NodeId = Field(
        default=NodeId(""), description="The node where the object lies; the one that is asked if empty."
    )
    size_bytes: int = Field(default=0, ge=0, description="How long the object is; needed where its home is elsewhere.")


class PinSegments(Message):
    """Ask the node to keep many segments of its own, as far as that can be done at once (verb ``pin_many``)."""

    process: ProcessId
    pins: dict[str, int] = Field(description="Segments, each with a serial as in `PinSegment`.", max_length=MOST_PINS)


class SegmentsPinned(Message):
    """Which of the segments are pinned; the others are to be asked for one by one, which says what is wrong."""

    places: dict[str, str] = Field(description=f"By the names of the segments. {PLACE}")


class SegmentPinned(Message):
    """The segment is kept; it can be mapped."""

    segment: str = Field(description="Its name on the node that was asked.")
    place: str = Field(description=PLACE)


class LendSegment(Message):
    """Ask the home of a segment to keep it for a puller, and to send its chunks or share its file (verb ``lend``).

    The puller is a node, or a driver without one. It says ``SegmentUnpinned`` with this serial when it has ended. A
    node that has pulled a copy is told ``SegmentFreed`` when the object goes, unless it says ``CopyDropped`` before.
    """

    puller: NodeId | ProcessId
    segment: str
    size_bytes: int = Field(ge=1)
    serial: int = Field(description="Of this puller's requests, another number for each.")
    job_id: JobId = Field(default=JobId(""), description="The puller's job, if it is a driver: its end ends the loan.")
    boot_id: str = Field(
        default="",
        description="The puller's, a node's: it would give the segment's file a name in its own folder, too, rather "
        "than pull chunks, if the home has the same.",
    )


class SegmentLent(Message):
    """The segment's chunks can be pulled, or its file be shared."""

    chunk_bytes: int = Field(description="The size of all chunks but the last.")
    linkable: bool = Field(
        default=False,
        description="The file may get another name, and no chunks are sent; nothing else is written there as long as "
        "it has two, or a reader locks it.",
    )


class TakeObject(Message):
    """A driver without a node asks one to pull an object from it into a new segment (verb ``take``).

    The answer comes when the object is there; it is the driver's then. Asked again, it is answered with the same.
    """

    process: ProcessId
    job_id: JobId
    stream: str = Field(description="The driver's name for the object, under which it offers its chunks.")
    size_bytes: int = Field(ge=1)
    chunk_bytes: int = Field(ge=1)
    object_id: str = Field(description="Its durable id, under which it can be spilled: 48 hex digits.")
    serial: int = Field(description="Of this process's requests, another number for each.")


class ListObjects(Message):
    """Ask a node which objects its processes hold and what its shared memory is used for (verb ``objects``)."""

    most: int = Field(ge=0, le=MOST_LISTED_OBJECTS, description="So many of the largest objects are described.")
    timeout_seconds: float = Field(gt=0, le=60, description="A process that has not answered by then is silent.")


class StoreUse(Message):
    """What a node's shared memory is used for."""

    capacity_bytes: int
    used_bytes: int = Field(description="Of objects that are kept or being written.")
    pinned_bytes: int = Field(description="Of these, what processes have mapped at this moment.")
    warm_bytes: int = Field(description="Of freed objects, kept for the next ones.")
    segments: int


class ProcessHoldings(Message):
    """What one process knows altogether."""

    process_id: ProcessId
    pid: int
    kind: str = Field(description="WORKER or DRIVER.")
    job_id: JobId
    objects: int
    inline_bytes: int = Field(description="Of small values, in the process's own memory.")


class ObjectHolding(Message):
    """One object as one process holds it."""

    process_id: ProcessId
    object_id: str = Field(description="48 hex digits; empty where only a mapping is left, of an object that is gone.")
    owner: str = Field(description="The process that owns it; may be empty like `object_id`.")
    size_bytes: int = Field(description="-1: not known (yet, or here).")
    status: str = Field(description="Of the task that makes it: PENDING_…, SUBMITTED_TO_WORKER, FINISHED, FAILED, NIL.")
    reasons: list[str] = Field(description="Why the process holds it: LOCAL_REFERENCE and so on, most telling first.")
    borrowers: int = Field(default=0, description="How many other processes its owner counts as holders.")
    node: str = Field(default="", description="The node in whose shared memory it lies; empty: inline, or nowhere yet.")
    segment: str = ""


class NodeObjects(Message):
    """Who holds what on a node, the largest first."""

    node_id: NodeId
    store: StoreUse
    processes: list[ProcessHoldings]
    objects: list[ObjectHolding]
    silent: list[ProcessId] = Field(description="Processes that did not answer in time.")


class PersistSegment(Message):
    """Ask the node to copy what the asker has written into a segment to the durable tier (verb ``persist``).

    To be asked before the segment is sealed; the answer comes when the durable tier has sealed its copy.
    """

    process: ProcessId
    segment: str
    key: ObjectKey = Field(description="The asker's key of the object: the durable id is made of both.")
    keep_seconds: float | None = Field(default=None, gt=0, description="See `DurablePut`.")


class RestoreObject(Message):
    """Ask the node to fetch a durable object into a new segment that the asker owns (verb ``restore``).

    The segment is sealed, as if the object had been put there. The same request again, as after a lost answer, is
    answered with the same segment. ``NotFoundError`` where the durable tier has no such object.
    """

    process: ProcessId
    object_id: str = Field(description="The durable id: the object's id, 48 hex digits.")
    serial: int = Field(description="Of this process's restorations, another number for each.")
    absent_seconds: float = Field(default=10.0, gt=0, description="How long to wait for any objectstore service.")


class ObjectRestored(Message):
    """The segment that holds the object now; the asker frees it."""

    segment: str
    size_bytes: int


class DurablePut(Message):
    """Open the upload of a durable object, or hold one that is there with the same contents (verb ``put``).

    An object stays as long as anybody holds it, and its job runs. The objectstore is who is asked.
    """

    object_id: str
    size_bytes: int
    digests: list[int] = Field(description="crc32 of each chunk, in order. All but the last have CHUNK_BYTES.")
    job_id: JobId = Field(default=JobId(""), description="The object goes with this job; empty: with none.")
    holder: str = Field(default=PUT_HOLDER, description="Who holds the object; see `DurableDelete`.")
    keep_seconds: float | None = Field(default=None, gt=0, description="The holder holds it no longer than this.")


class DurableUpload(Message):
    """Where the chunks are to be written: a node does so itself, a process by ``put_chunk``."""

    place: str = Field(description="The upload's name: what follows the prefix in the subjects of its chunks.")
    sealed: bool = Field(description="The object is there already: nothing is to be uploaded.")


class DurablePutChunk(Message):
    """Upload one chunk (verb ``put_chunk``); refused where it is not the one that was announced."""

    bulk_field: ClassVar[str] = "data"

    object_id: str
    index: int
    data: bytes


class DurableSeal(Message):
    """End the upload of a durable object: all its chunks are there (verb ``seal``)."""

    object_id: str


class DurableGet(Message):
    """Ask for a durable object's manifest (verb ``get``)."""

    object_id: str


class DurableManifest(Message):
    """What a durable object consists of, and where its chunks lie."""

    object_id: str
    size_bytes: int
    digests: list[int]
    place: str


class DurableGetChunk(Message):
    """Ask for one chunk (verb ``get_chunk``)."""

    object_id: str
    index: int


class DurableChunk(Message):
    """One chunk of a durable object."""

    bulk_field: ClassVar[str] = "data"

    data: bytes


class DurableDelete(Message):
    """Hold a durable object no more; it goes with its last holder (verb ``delete``)."""

    object_id: str
    holder: str = Field(default="", description="Whose names begin with this, hold it no more; empty: nobody does.")
