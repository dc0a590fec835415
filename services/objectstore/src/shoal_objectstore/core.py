"""The durable tier's decisions. Replicas are equal and keep nothing: what there is to know lies in the stream.

Theory
======

Every request begins with its object's manifest, read through the stream's leader, and changes it by compare-and-set
only; who loses the race looks at what is there now and decides anew. From that, with any number of replicas that crash
between any two steps:

1. **An acknowledged seal is readable, and its bytes are right.** Chunks are written once: a second writer of a chunk
   finds the same bytes, or is refused. So the bytes that a seal has read are those that readers get. The seal takes
   effect only on the very manifest under which it read them.
2. **An upload that is not sealed is never readable**: chunks, too, are read only under a sealed manifest.
3. **A delete is final until a new put.** It replaces the manifest by a tombstone, and then purges, in one step, all of
   the object up to the tombstone's revision. A new put may replace the tombstone at any time: what it writes has a
   higher revision, and is not purged.
4. **Nothing is left.** What a crash or a slow writer left behind (tombstones, uploads that nobody ends, chunks of
   uploads that are gone) every replica sweeps from time to time. A sweep deletes only what it has read, at the revision
   at which it read it, or chunks of an upload whose name will never come again.

Memory is bounded: so many requests are under way at most, each of which holds one chunk at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.effects import (
    Conflict,
    Connected,
    Effect,
    Loaded,
    Reply,
    Request,
    Start,
    Stored,
    StoreRefused,
    WakeAt,
)
from shoal_core.protocol.errors import (
    InvalidRequestError,
    NotFoundError,
    ObjectStoreFullError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.messages import (
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
    Message,
)
from shoal_objectstore import manifests
from shoal_objectstore.operations import (
    ChunkRead,
    DeleteObject,
    DescribeObject,
    FetchChunk,
    OpenUpload,
    Operation,
    Purged,
    SealObject,
    SweepObject,
    WriteChunk,
)

SWEEP_SECONDS = 600.0
MOST_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class Begin:
    """Input: the replica begins."""


@dataclass(frozen=True, slots=True)
class ListPlaces:
    """Command: find out of which objects anything is there; ``Listed`` comes back."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Input: the places of each object's chunks."""

    places: Mapping[str, Sequence[str]]


@dataclass(slots=True)
class Counts:
    """What this replica has done since it began."""

    opened: int = 0
    sealed: int = 0
    deleted: int = 0
    swept: int = 0
    written_bytes: int = 0
    read_bytes: int = 0


class DurableTier:
    """One replica's core."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.under_way: set[int] = set()
        self._unswept: deque[SweepObject] = deque()

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input."""
        match message:
            case Request():
                effects = self._request(message, now)
            case Begin():
                effects = [WakeAt(now)]
            case Connected():
                effects = []
            case Listed():
                self._unswept.extend(
                    SweepObject(object_id, tuple(places), now) for object_id, places in sorted(message.places.items())
                )
                effects = self._sweep_next()
            case Loaded() | Conflict() | Stored() | StoreRefused() | ChunkRead() | Purged():
                effects = self._settled(message)
            case _:
                raise TypeError(f"not an input of the durable tier: {message!r}")
        self.under_way.difference_update(effect.token for effect in effects if isinstance(effect, Reply))
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Begin to sweep, unless the last time is not over yet."""
        sweep: list[Effect] = [] if self._unswept else [Start(ListPlaces())]
        return [WakeAt(now + SWEEP_SECONDS), *sweep]

    def _request(self, request: Request, now: float) -> list[Effect]:
        """Begin what is asked for, or refuse it."""
        try:
            if len(self.under_way) >= MOST_REQUESTS:
                raise ServiceError(f"the durable tier is busy: {MOST_REQUESTS} requests are under way; ask again later")
            operation = _operation(request.token, request.message, now)
            manifests.check_object_id(operation.object_id)
        except ShoalError as error:
            return [Reply(request.token, error)]
        self.under_way.add(request.token)
        return operation.begin()

    def _settled(self, outcome: Any) -> list[Effect]:
        """Go on with the operation that an outcome belongs to; a sweep that is over makes room for the next."""
        operation: Operation = (outcome.command if isinstance(outcome, ChunkRead | Purged) else outcome).context
        try:
            effects = self._go_on(operation, outcome)
        except ShoalError as error:
            effects = operation.answer(error)
        return effects or (self._sweep_next() if isinstance(operation, SweepObject) else [])

    def _go_on(self, operation: Operation, outcome: Any) -> list[Effect]:
        match outcome:
            case Loaded():
                return operation.look(manifests.decode(outcome.value, outcome.revision), outcome.revision)
            case Conflict():
                return operation.conflicted(outcome)
            case Stored():
                self._count(operation)
                return operation.stored(outcome.revision)
            case StoreRefused():
                raise ObjectStoreFullError(
                    f"the durable tier cannot keep object {operation.object_id}: {outcome.error}"
                )
            case ChunkRead(_, ShoalError() as error) | Purged(_, ShoalError() as error):
                raise error
            case ChunkRead(command, None):
                raise NotFoundError(f"chunk {command.index} of object {operation.object_id} is not in the durable tier")
            case ChunkRead(_, bytes() as data):
                self.counts.read_bytes += len(data)
                return operation.read(data)
        return operation.purged()

    def _sweep_next(self) -> list[Effect]:
        """Sweep one object after the other, so that askers need not wait for it."""
        return self._unswept.popleft().begin() if self._unswept else []

    def _count(self, operation: Operation) -> None:
        match operation:
            case OpenUpload():
                self.counts.opened += 1
            case WriteChunk():
                self.counts.written_bytes += len(operation.request.data)
            case SealObject():
                self.counts.sealed += 1
            case DeleteObject():
                self.counts.deleted += 1
            case SweepObject():
                self.counts.swept += 1


def _operation(token: int, message: Message, now: float) -> Operation:
    """Return the operation a request asks for."""
    match message:
        case DurablePut():
            return OpenUpload(token, message.object_id, message, now)
        case DurablePutChunk():
            manifests.check_size(message)
            return WriteChunk(token, message.object_id, message)
        case DurableSeal():
            return SealObject(token, message.object_id)
        case DurableGet():
            return DescribeObject(token, message.object_id)
        case DurableGetChunk():
            return FetchChunk(token, message.object_id, message.index)
        case DurableDelete():
            return DeleteObject(token, message.object_id)
    raise InvalidRequestError(f"the durable tier does not know the request {type(message).__name__}")
