"""The node's shared memory, as processes and other nodes see it: their requests and records about segments.

It is put together from what each knows one thing::

    SharedMemory ── ObjectStore ── SegmentTable    (room, and the durable tier)
          ├──────── Loans                          (our segments, for others)
          └──────── Copies                         (others' segments, for us)

What one of them does may concern the others: that an object is gone, that a file is there, that a segment is back in
memory. They leave word of it, and it is passed on until there is nothing more to tell (``settle``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from shoal_core.protocol.effects import Answered, Effect, Reply, Send, Start
from shoal_core.protocol.errors import DeclaredDeadError, ShoalError
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId, is_node
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import (
    CopyDropped,
    SegmentFreed,
    SegmentMapped,
    SegmentRecalled,
    SegmentSealed,
    SegmentsUnpinned,
    SegmentUnpinned,
    SegmentWanted,
)
from shoal_core.protocol.storage import (
    AllocateSegment,
    LendSegment,
    PersistSegment,
    PinSegment,
    PinSegments,
    RestoreObject,
    SegmentsPinned,
    TakeObject,
)
from shoal_core.protocol.subjects import Subjects
from shoal_worker.inputs import Pulled
from shoal_worker.liveness import Liveness
from shoal_worker.objects.copies import Copies
from shoal_worker.objects.files import FileLinked, StoreInput
from shoal_worker.objects.loans import Loans
from shoal_worker.objects.store import ObjectStore

SegmentRecord = (
    SegmentSealed | SegmentMapped | SegmentUnpinned | SegmentsUnpinned | SegmentFreed | CopyDropped | SegmentWanted
)
"""What processes and other nodes say about segments."""

Handler = Callable[..., Message | ShoalError | None]


class SharedMemory:
    """One node's; ``job_of`` returns the job of a process of this node, and raises where there is none."""

    def __init__(
        self,
        node_id: NodeId,
        subjects: Subjects,
        store: ObjectStore,
        liveness: Liveness,
        job_of: Callable[[ProcessId], JobId | None],
        chunk_bytes: int,
        boot_id: str,
    ) -> None:
        self.store = store
        self.loans = Loans(store.segments, chunk_bytes, boot_id)
        self.copies = Copies(node_id, store, subjects, self._is_dead, boot_id)
        self.requests: Mapping[type[Message], Handler] = {
            AllocateSegment: self._allocate,
            PinSegment: self._pin,
            PinSegments: self._pin_many,
            PersistSegment: self._persist,
            RestoreObject: self._restore,
            LendSegment: self._lend,
            TakeObject: self._take,
        }
        self._node_id = node_id
        self._liveness = liveness
        self._job_of = job_of

    def effects(self, now: float) -> list[Effect]:
        """Return what is to be done: segments are withdrawn before their files go, and offered before it is told."""
        self._settle(now)
        effects, self.loans.effects = self.loans.effects, []
        effects += map(Start, self.store.take_commands())
        if self.store.recalls:
            effects += [Send(process, SegmentRecalled(name)) for process, name in self.store.recalls]
            self.store.recalls = []
        if self.store.replies:
            effects += [Reply(token, answer) for token, answer in self.store.replies]
            self.store.replies = []
        if self.copies.effects:
            effects += self.copies.effects
            self.copies.effects = []
        return effects

    def _settle(self, now: float) -> None:
        """Pass on what concerns several."""
        store, table = self.store, self.store.segments
        while True:
            self.copies.begin(now)
            store.pump(now)
            if not (table.gone or store.served or store.returned):
                return
            gone, table.gone = table.gone, []
            served, store.served = store.served, []
            returned, store.returned = store.returned, []
            for name in gone:
                self.loans.gone(name)
                self.copies.gone(name)
            for incoming, error in served:
                self.copies.served(incoming, error, now)
            for name in returned:
                self.loans.returned(name)

    def wake_at(self) -> float:
        """Return when ``tick`` has something to do."""
        return min(self.store.wake_at, self.copies.wake_at())

    def tick(self, now: float) -> None:
        """Do what is due."""
        self.copies.tick(now)

    # ------------------------------------------------------------------------------- requests

    def _allocate(self, request: AllocateSegment, token: int, now: float) -> None:
        self.store.allocate(request, token, self._job_of(request.process), now)

    def _pin(self, request: PinSegment, token: int, now: float) -> Message | None:
        self._job_of(request.process)
        if request.home not in ("", self._node_id):
            return self.copies.pin(request, token)
        self.store.pin(request, token, now)
        return None

    def _pin_many(self, request: PinSegments, token: int, now: float) -> SegmentsPinned:
        self._job_of(request.process)
        return SegmentsPinned(places=self.store.segments.pin_many(request.pins, request.process))

    def _persist(self, request: PersistSegment, token: int, now: float) -> None:
        self.store.persist(request, token, self._job_of(request.process))

    def _restore(self, request: RestoreObject, token: int, now: float) -> None:
        self.store.restore(request, token, self._job_of(request.process))

    def _lend(self, request: LendSegment, token: int, now: float) -> None:
        if self._is_dead(request.puller) or self._liveness.has_ended(request.job_id):
            raise DeclaredDeadError(f"{request.puller}, which asks for a segment, was declared dead")
        segment, answer = self.loans.lend(request)
        self.store.answer_in_memory(segment, token, answer, now)

    def _take(self, request: TakeObject, token: int, now: float) -> Message | None:
        if self._is_dead(request.process) or self._liveness.has_ended(request.job_id):
            raise DeclaredDeadError(f"driver {request.process} or its job {request.job_id} has ended")
        return self.copies.take(request, token)

    # ------------------------------------------------------------------------------- records and inputs

    def said(self, peer: PeerId, record: SegmentRecord, now: float) -> None:
        """Take what a process or another node says about a segment."""
        process = ProcessId(peer)
        match record:
            case SegmentSealed():
                if self.store.sealed(process, record, now) and self._is_dead(record.owner):
                    self.store.freed(record.owner, record.segment, now)
            case SegmentMapped():
                self.store.mapped(process, record.segment, record.serial)
            case SegmentUnpinned() if record.home not in ("", self._node_id):
                self.copies.give_up(process, record)
            case SegmentUnpinned():
                self.loans.ended(process, record.segment, record.serial)
                self.store.unpinned(process, [(record.segment, record.serial)], now)
            case SegmentsUnpinned():
                self.store.unpinned(process, record.pins, now)
            case SegmentFreed():
                if not self.copies.freed(peer, record.segment) and not is_node(peer):
                    self.store.freed(process, record.segment, now)
            case CopyDropped():
                self.loans.dropped(NodeId(peer), record.segment, record.serial)
            case SegmentWanted():
                self.copies.want(record)

    def take(self, message: StoreInput | FileLinked | Pulled, now: float) -> None:
        """Take in what came of a command."""
        if isinstance(message, Pulled):
            self.copies.pulled(message)
        elif isinstance(message, FileLinked):
            self.copies.linked(message)
        else:
            self.store.take(message, now)

    def lent(self, answered: Answered, now: float) -> None:
        """Take in what the home of a segment answered."""
        self.copies.answered(answered, now)

    # ------------------------------------------------------------------------------- deaths

    def peer_died(self, peer: PeerId, now: float, *, reaped: bool = True) -> None:
        """Let go of what a dead process or node has of our segments, and of what we have of its."""
        self.copies.peer_died(peer)
        self.loans.peer_died(peer)
        self.store.process_died(ProcessId(peer), reaped, now)

    def nodes(self) -> set[NodeId]:
        """Return the nodes we have copies of, and those that have copies of ours."""
        return self.copies.homes() | self.loans.holders()

    def jobs(self) -> set[JobId]:
        """Return the jobs that segments and loans belong to."""
        return self.store.segments.jobs() | self.loans.jobs()

    def _is_dead(self, peer: PeerId) -> bool:
        return self._liveness.is_dead(ProcessId(peer))

    def sanity_check(self) -> None:
        """State the invariants."""
        self.store.sanity_check()
        self.copies.sanity_check()
        self.loans.sanity_check()
