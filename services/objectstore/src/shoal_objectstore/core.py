"""The durable tier's decisions. Replicas are equal and keep nothing: what there is to know lies in the stream.

Theory
======

Every request begins with its object's manifest, read through the stream's leader, and changes it by compare-and-set
only; who loses the race looks at what is there now and decides anew. From that, with any number of replicas that crash
between any two steps:

1. **An acknowledged seal is readable, and its bytes are right.** Chunks are written once, with the digests that the
   manifest announced: who writes through a replica is held to them, nodes write straight into the stream, and readers
   check again. The seal counts the chunks, and takes effect only on the very manifest under which it did.
2. **An upload that is not sealed is never readable**: chunks, too, are read only under a sealed manifest.
3. **An object stays while anybody holds it and its job runs.** Its last holder lets go of it in one step with its
   removal, so who begins to hold it comes before, or finds nothing.
4. **A removal is final until a new put.** It replaces the manifest by a tombstone, and then purges, in one step, all of
   the object below the tombstone's revision. A new put may replace the tombstone at any time: what it writes has a
   higher revision, and is not purged.
5. **Nothing is left.** What a crash or a slow writer left behind (tombstones, uploads that nobody ends, chunks of
   uploads that are gone), what nobody holds any longer, and what is of a job that has ended, every replica sweeps from
   time to time. A sweep deletes only what it has read, at the revision at which it read it, or chunks of an upload
   whose name will never come again.

Replicas watch the manifests, and so see which jobs have objects. They hear of the end of a job; whatever they did not
hear, they ask the control store from time to time and after each reconnect. What is purged before a watch was told of
it, that never hears of. So whoever has written or found a tombstone drops it only after ``TOMBSTONE_SECONDS``.

Memory is bounded: so many requests are under way at most, each of which holds one chunk at most; of each object a
replica knows its job and its size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.effects import (
    Answered,
    Ask,
    Changed,
    Conflict,
    Connected,
    Effect,
    Event,
    Loaded,
    Reply,
    Request,
    Start,
    Stored,
    StoreRefused,
    WakeAt,
)
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    InvalidRequestError,
    NotFoundError,
    ObjectStoreFullError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import GetJob, JobFinished, JobRecord, JobState, Message
from shoal_core.protocol.storage import (
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
)
from shoal_objectstore import manifests
from shoal_objectstore.holdings import Holdings, Quotas
from shoal_objectstore.operations import (
    ChunkRead,
    ChunksCounted,
    DeleteObject,
    DescribeObject,
    DropTombstone,
    FetchChunk,
    OpenUpload,
    Operation,
    Purged,
    Removal,
    SealObject,
    SweepObject,
    WriteChunk,
)

SWEEP_SECONDS = 600.0
JOB_SECONDS = 60.0
TICK_SECONDS = 5.0
TOMBSTONE_SECONDS = 10.0
"""So long a replica may be behind with what it is told of."""
SWEEPS_AT_ONCE = 4
MOST_REQUESTS = 256
MOST_ENDED_JOBS = 1024
MOST_BURIED = 4096
"""Tombstones of which a replica knows that they have to go; others are found."""


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


@dataclass(frozen=True, slots=True)
class AboutJob:
    """The context of a question to the control store: does this job still run?"""

    job_id: JobId


class DurableTier:
    """One replica's core. ``job_question`` is the subject on which the control store is asked for a job."""

    def __init__(self, job_question: str = "", quotas: Quotas | None = None) -> None:
        self.counts = Counts()
        self.under_way: set[int] = set()
        self.holdings = Holdings(quotas or Quotas())
        self._job_question = job_question
        self._ended: dict[JobId, None] = {}
        self._buried: deque[tuple[float, DropTombstone]] = deque(maxlen=MOST_BURIED)
        self._unswept: deque[SweepObject | DropTombstone] = deque()
        self._sweeping = 0
        self._ask_at = self._sweep_at = float("-inf")

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input."""
        match message:
            case Request():
                effects = self._request(message, now)
            case Begin():
                effects = [WakeAt(now)]
            case Connected():
                effects = self._ask_for_jobs() if message.connected else []
            case Changed():
                object_id = message.key.removesuffix(".manifest")
                self.holdings.changed(object_id, manifests.decode(message.value, message.revision))
                effects = []
            case Event(JobFinished(job_id=job)):
                effects = self._job_ended(job, now)
            case Answered(AboutJob(job)):
                effects = self._job_ended(job, now) if _has_ended(message.answer) else []
            case Listed():
                effects = self._sweep(message.places, now)
            case Loaded() | Conflict() | Stored() | StoreRefused() | ChunkRead() | ChunksCounted() | Purged():
                effects = self._settled(message, now)
            case _:
                raise TypeError(f"not an input of the durable tier: {message!r}")
        self.under_way.difference_update(effect.token for effect in effects if isinstance(effect, Reply))
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Sweep what has expired, and from time to time all there is; ask which jobs run still."""
        effects: list[Effect] = [WakeAt(now + TICK_SECONDS)]
        if now >= self._ask_at:
            self._ask_at = now + JOB_SECONDS
            effects += self._ask_for_jobs()
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            effects += [] if self._unswept or self._sweeping else [Start(ListPlaces())]
        effects += self._sweep(dict.fromkeys(self.holdings.expired(now), ()), now)
        while self._buried and self._buried[0][0] <= now:
            self._unswept.append(self._buried.popleft()[1])
        return effects + self._sweep_next()

    # ------------------------------------------------------------------------------- jobs

    def _ask_for_jobs(self) -> list[Effect]:
        return [Ask(self._job_question, GetJob(job_id=job), AboutJob(job)) for job in self.holdings.jobs()]

    def _job_ended(self, job: JobId, now: float) -> list[Effect]:
        """Refuse what is put for a job that has ended, and remove what it has."""
        self._ended[job] = None
        if len(self._ended) > MOST_ENDED_JOBS:
            del self._ended[next(iter(self._ended))]
        return self._sweep(dict.fromkeys(self.holdings.of_job(job), ()), now)

    def _request(self, request: Request, now: float) -> list[Effect]:
        """Begin what is asked for, or refuse it."""
        try:
            if len(self.under_way) >= MOST_REQUESTS:
                raise ServiceError(f"the durable tier is busy: {MOST_REQUESTS} requests are under way; ask again later")
            operation = _operation(request.token, request.message, now)
            manifests.check_object_id(operation.object_id)
            if isinstance(request.message, DurablePut):
                self._check_put(request.message)
        except ShoalError as error:
            return [Reply(request.token, error)]
        self.under_way.add(request.token)
        return operation.begin()

    def _check_put(self, request: DurablePut) -> None:
        manifests.check_put(request)
        if request.job_id in self._ended:
            raise DeclaredDeadError(f"object {request.object_id} belongs to job {request.job_id}, which has ended")
        self.holdings.check_room(request)

    def _settled(self, outcome: Any, now: float) -> list[Effect]:
        """Go on with the operation that an outcome belongs to; a sweep that is over makes room for the next."""
        through_command = isinstance(outcome, ChunkRead | ChunksCounted | Purged)
        operation: Operation = (outcome.command if through_command else outcome).context
        try:
            effects = self._go_on(operation, outcome, now)
        except ShoalError as error:
            effects = operation.answer(error)
        if not effects and isinstance(operation, SweepObject | DropTombstone):
            self._sweeping -= 1
            return self._sweep_next()
        return effects

    def _go_on(self, operation: Operation, outcome: Any, now: float) -> list[Effect]:
        match outcome:
            case Loaded():
                manifest = manifests.decode(outcome.value, outcome.revision)
                if isinstance(operation, SweepObject) and manifest is None and outcome.revision:
                    self._bury(operation.object_id, outcome.revision, now)
                return operation.look(manifest, outcome.revision)
            case Conflict():
                return operation.conflicted(outcome)
            case Stored():
                self._count(operation)
                if isinstance(operation, Removal) and not operation.kept:
                    self._bury(operation.object_id, outcome.revision, now)
                return operation.stored(outcome.revision)
            case StoreRefused():
                raise ObjectStoreFullError(
                    f"the durable tier cannot keep object {operation.object_id}: {outcome.error}"
                )
            case (
                ChunkRead(_, ShoalError() as error)
                | ChunksCounted(_, ShoalError() as error)
                | Purged(_, ShoalError() as error)
            ):
                raise error
            case ChunksCounted(_, int() as count):
                return operation.counted(count)
            case ChunkRead(command, None):
                raise NotFoundError(f"chunk {command.index} of object {operation.object_id} is not in the durable tier")
            case ChunkRead(_, bytes() as data):
                self.counts.read_bytes += len(data)
                return operation.read(data)
        return operation.purged()

    def _bury(self, object_id: str, revision: int, now: float) -> None:
        """Have a tombstone go when all replicas have seen it."""
        self._buried.append((now + TOMBSTONE_SECONDS, DropTombstone(object_id, revision)))

    def _sweep(self, places: Mapping[str, Sequence[str]], now: float) -> list[Effect]:
        self._unswept.extend(
            SweepObject(object_id, tuple(found), now, self._ended) for object_id, found in sorted(places.items())
        )
        return self._sweep_next()

    def _sweep_next(self) -> list[Effect]:
        """Sweep a few objects at a time, so that askers need not wait for it."""
        effects: list[Effect] = []
        while self._unswept and self._sweeping < SWEEPS_AT_ONCE:
            self._sweeping += 1
            effects += self._unswept.popleft().begin()
        return effects

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


def _has_ended(answer: Message | ShoalError) -> bool:
    """Tell whether an answer of the control store means that a job has ended; those long ended it has forgotten."""
    return isinstance(answer, NotFoundError) or (isinstance(answer, JobRecord) and answer.state is not JobState.RUNNING)


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
            return DeleteObject(token, message.object_id, message.holder)
    raise InvalidRequestError(f"the durable tier does not know the request {type(message).__name__}")
