"""The object store of a node: room for objects, by spilling others to the durable tier where there is none.

Theory
======

Whoever wants room (to write an object, to map one that was spilled, to restore a durable one, to pull one of another
node) waits in one queue, and is answered when its file is there. Room is made in this order, each step only as far as
it is needed, and least recently used first:

1. warm files, which hold nothing, are removed;
2. idle copies of other nodes' segments go: their homes have the objects;
3. idle segments that are whole in the durable tier lose their file: that moves no byte;
4. idle segments that are not are written to the durable tier, a few at a time.

Whoever wants to write leaves a *reserve*: so much that the largest spilled segment can come back, free, or taken by
segments that are durable, copies, or in use just now. Else a durable tier that is full would make what it holds
unreadable, since nothing could make room for it any more.

What is being written, what a process has mapped and what is lent stays. What was granted *ahead*, to who has nothing to
write there yet, is asked back when somebody waits, and granted only while half of the room is free. From that, whatever
the order of events:

1. **Nothing acknowledged is lost**: a segment loses its file only when the durable tier has acknowledged it, and stays
   there until it is freed.
2. **A pin never sees half an object**: it is answered when the segment lies in memory, and a file that is being filled
   has another name.
3. **Nothing hangs**: what moves bytes always ends. As long as something moves, the queue waits; when nothing moves for
   ``STALL_SECONDS``, or at once where the durable tier has just refused, the first in the queue is told why, and who
   holds what.
4. **Nothing is left**: what is durable goes with its segment, and a file with its segment or before.

What the durable tier refuses is tried again after ``REFUSED_SECONDS``, when somebody waits for room then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_

from shoal_core.protocol.errors import (
    AlreadyExistsError,
    DeclaredDeadError,
    NotFoundError,
    ObjectStoreFullError,
    ShoalError,
)
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId, durable_id
from shoal_core.protocol.messages import Done, Message
from shoal_core.protocol.records import SegmentSealed
from shoal_core.protocol.storage import (
    NODE_HOLDER,
    PUT_HOLDER,
    AllocateSegment,
    PersistSegment,
    PinSegment,
    RestoreObject,
    SegmentGranted,
    SegmentPinned,
)
from shoal_worker.objects.files import (
    DropDurable,
    DurableFound,
    FileCreated,
    FileFilled,
    FileSpilled,
    FindDurable,
    SpillFile,
    StoreCommand,
    StoreInput,
    size_class,
)
from shoal_worker.objects.idle import Cost
from shoal_worker.objects.restoring import Restoration, Restorations
from shoal_worker.objects.segments import DurableState, Segment, SegmentState, SegmentTable
from shoal_worker.objects.waiting import Allocation, Arrival, Incoming, Return, WaitingQueue, Wanted

STALL_SECONDS = 10.0
REFUSED_SECONDS = 5.0
SPILLS_AT_ONCE = 4
RECALL_SECONDS = 1.0
"""So long a process may take to give back what it was granted ahead."""
NEVER = float("inf")


@dataclass(slots=True)
class Counts:
    """What this node has moved since it began."""

    spilled: int = 0
    spilled_bytes: int = 0
    returned: int = 0
    returned_bytes: int = 0
    refused: int = 0


class ObjectStore:
    """The segments of one node, and who waits for room. What is to be done is left in ``commands`` and ``replies``."""

    def __init__(self, node: NodeId, capacity_bytes: int, warm_bytes: int, shared_bytes: int = 0) -> None:
        self.segments = SegmentTable(capacity_bytes, warm_bytes, node, shared_bytes)
        self.counts = Counts()
        self.replies: list[tuple[int, Message | ShoalError]] = []
        self.served: list[tuple[Incoming, ShoalError | None]] = []
        """What has its file now, or why it has none."""
        self.returned: list[str] = []
        """The segments that lie in memory again."""
        self.recalls: list[tuple[ProcessId, str]] = []
        """The segments that were granted ahead, and that processes are to give back."""
        self.waiting = WaitingQueue()
        self.wake_at = NEVER
        self._commands: list[StoreCommand] = []
        self._creating: dict[str, Wanted] = {}
        self._returns: dict[str, Return] = {}
        self._restorations = Restorations()
        self._spilling: dict[str, Segment] = {}
        self._persisting: dict[str, list[int]] = {}
        self._refusal = ""
        self._refused_until = float("-inf")
        self._recalled_until = float("-inf")
        self._stalled_at = NEVER

    def take_commands(self) -> list[StoreCommand]:
        """Return what is to be done, in order."""
        if not (self.segments.commands or self._commands):
            return []
        commands = [*self.segments.commands, *self._commands]
        self.segments.commands, self._commands = [], []
        return commands

    # ------------------------------------------------------------------------------- requests

    def allocate(self, request: AllocateSegment, token: int, job: JobId | None, now: float) -> None:
        """Promise a file to a writer; it is answered when that is there."""
        segment = self.segments.asked_again(request.process, request.serial)
        if segment is not None:
            if segment.state is SegmentState.CREATING:
                self._creating[segment.name].tokens.append(token)  # type: ignore[union-attr]
            else:
                self.replies.append((token, _granted(segment)))
            return
        for wanted in self.waiting:
            if isinstance(wanted, Allocation) and (wanted.process, wanted.serial) == (request.process, request.serial):
                wanted.tokens.append(token)
                return
        capacity = self._capacity(request.size_bytes)
        if request.ahead and not self._has_ample_room(capacity):
            self.replies.append((token, SegmentGranted(segment="", place="", capacity_bytes=0)))
            return
        self._want(
            Allocation(request.size_bytes, capacity, [token], request.process, request.serial, job, request.ahead)
        )
        self.pump(now)

    def pin(self, request: PinSegment, token: int, now: float) -> None:
        """Keep a segment for a process; it is answered when the segment lies in memory."""
        segment = self.segments.pin(request.segment, request.process, request.serial)
        self.answer_in_memory(segment, token, SegmentPinned(segment=segment.name, place=segment.place), now)

    def answer_in_memory(self, segment: Segment, token: int, answer: Message, now: float) -> None:
        """Answer a request once a segment, which is pinned, lies in memory."""
        if segment.in_memory():
            self.replies.append((token, answer))
            return
        self._return(segment).answers.append((token, answer))
        self.pump(now)

    def persist(self, request: PersistSegment, token: int, job: JobId | None) -> None:
        """Write what a process has written to the durable tier as well; it is answered when that has it."""
        waiting = self._persisting.get(request.segment)
        if waiting is not None:
            waiting.append(token)
            return
        segment = self.segments.get(request.segment)
        if segment is None or segment.state is not SegmentState.WRITING or segment.process != request.process:
            raise NotFoundError(f"segment {request.segment} is not one that process {request.process} writes")
        self._persisting[segment.name] = [token]
        object_id = durable_id(request.process, request.key)
        self._commands.append(
            SpillFile(
                segment.name,
                segment.place,
                object_id,
                segment.size_bytes,
                job or JobId(""),
                PUT_HOLDER,
                request.keep_seconds,
            )
        )

    def restore(self, request: RestoreObject, token: int, job: JobId | None) -> None:
        """Fetch a durable object for a process that will own it."""
        known = self._restorations.find(request)
        if known is None:
            self._commands.append(FindDurable(self._restorations.begin(request, job, token)))
        elif known.answer is None:
            known.tokens.append(token)
        else:
            self.replies.append((token, known.answer))

    def has_room(self, size_bytes: int) -> bool:
        """Tell whether there is room for an object at once, without anything that is of use having to go."""
        return self.segments.has_room(size_class(size_bytes)) and not len(self.waiting)

    def _has_ample_room(self, capacity: int) -> bool:
        """Tell whether a file can be spared for what may be written soon."""
        return not len(self.waiting) and self.segments.used_bytes + capacity <= self.segments.capacity_bytes // 2

    def expect(
        self, source: PeerId, size_bytes: int, job: JobId | None, *, is_copy: bool, linked: bool, now: float
    ) -> Incoming:
        """Let an object that is to come wait for its file; ``served`` says when it is there, or why it is not.

        What is to be ``linked`` waits for room only.
        """
        incoming = Incoming(size_bytes, self._capacity(size_bytes), source, job, is_copy, linked)
        self._want(incoming)
        self.pump(now)
        return incoming

    def withdraw(self, incoming: Incoming) -> None:
        """An object will not be pulled, or not be whole: nothing is left of it."""
        self.waiting.remove(partial(is_, incoming))
        self.segments.give_up(incoming.name)

    def _return(self, segment: Segment) -> Return:
        """Have a spilled segment come back, unless it is on its way."""
        back = self._returns.get(segment.name)
        if back is None:
            back = Return(segment.size_bytes, segment.capacity_bytes, segment.name)
            self._want(back)
        return back

    def _want(self, wanted: Wanted) -> None:
        self.waiting.add(wanted)
        if isinstance(wanted, Return):
            self._returns[wanted.segment] = wanted

    def _capacity(self, size_bytes: int) -> int:
        """Return the size of the file for an object; ``ObjectStoreFullError`` for one that will never fit."""
        capacity = size_class(size_bytes)
        if capacity > self.segments.capacity_bytes:
            raise ObjectStoreFullError(
                f"an object of {size_bytes:,} bytes is larger than the node's whole shared memory for objects, which "
                f"has {self.segments.capacity_bytes:,} bytes. Put it in parts, or give the node a larger "
                "object_store_memory"
            )
        return capacity

    # ------------------------------------------------------------------------------- what processes say

    def sealed(self, writer: ProcessId, record: SegmentSealed, now: float) -> bool:
        """A writer is done; tell whether it may say so."""
        object_id = durable_id(record.owner, record.key) if record.key else ""
        sealed = self.segments.seal(record.segment, writer, record.owner, object_id)
        self.pump(now)
        return sealed

    def mapped(self, process: ProcessId, segment: str, serial: int) -> None:
        """A process has mapped a segment without asking, by the pin of this serial."""
        self.segments.pin_many({segment: serial}, process)

    def unpinned(self, process: ProcessId, pins: Sequence[tuple[str, int]], now: float) -> None:
        """A process maps segments no more, each by the pin of this serial."""
        for segment, serial in pins:
            self.segments.unpin(segment, process, serial)
        self.pump(now)

    def freed(self, process: ProcessId, segment: str, now: float) -> None:
        """Nobody needs an object any more."""
        self.segments.free(segment, process)
        self._end_returns()
        self.pump(now)

    def process_died(self, process: ProcessId, reaped: bool, now: float) -> None:
        """A process is gone, with all that it wanted, wrote, mapped and owned."""
        gone = self.waiting.remove(lambda wanted: isinstance(wanted, Allocation) and wanted.process == process)
        for wanted in gone:
            self._refuse(wanted, DeclaredDeadError(f"process {process}, which asked for room, has died"))
        self._restorations.process_died(process)
        self.segments.process_died(process, reaped)
        self._end_returns()
        self.pump(now)

    def _end_returns(self) -> None:
        """Tell those who wait for a segment that was freed meanwhile."""
        for name, back in list(self._returns.items()):
            segment = self.segments.get(name)
            if segment is None or segment.state is SegmentState.FREED:
                self.waiting.remove(partial(is_, back))
                self._refuse(back, NotFoundError(f"segment {name} cannot be mapped: its object was freed"))

    # ------------------------------------------------------------------------------- what came of commands

    def take(self, message: StoreInput, now: float) -> None:
        """Take in what came of a command."""
        match message:
            case FileCreated():
                self._file_created(message)
            case FileFilled():
                self._file_filled(message)
            case FileSpilled():
                self._file_spilled(message, now)
            case DurableFound():
                self._durable_found(message)
        self.pump(now)

    def _file_created(self, created: FileCreated) -> None:
        wanted = self._creating.pop(created.name)
        if created.busy:
            self.segments.stays_warm(created.busy, created.name)
        if created.error:
            self.segments.creation_failed(created.name)
            self._refuse(wanted, ObjectStoreFullError(created.error))
            return
        segment = self.segments.created(created.name)
        if segment is None:
            self._refuse(wanted, DeclaredDeadError("the process that asked for the segment has died"))
        elif isinstance(wanted, Allocation):
            self.replies += [(token, _granted(segment)) for token in wanted.tokens]
        elif isinstance(wanted, Incoming):
            self.served.append((wanted, None))
        elif isinstance(wanted, Return):
            self.segments.fill(segment, segment.object_id)
        else:
            self.segments.fill(segment, wanted.restoration.request.object_id)

    def _file_filled(self, filled: FileFilled) -> None:
        segment = self.segments.filled(filled.name, filled.error is None)
        restoration = self._restorations.of_segment(filled.name)
        if restoration is not None:
            self._restored(restoration, filled.error)
            return
        back = self._returns.get(filled.name)
        if back is None or segment is None:
            return  # it was freed meanwhile
        if filled.error is not None:
            self._refuse(back, filled.error)
            return
        del self._returns[filled.name]
        self.counts.returned += 1
        self.counts.returned_bytes += segment.size_bytes
        self.replies += back.answers
        self.returned.append(segment.name)

    def _restored(self, restoration: Restoration, error: ShoalError | None) -> None:
        """Seal what was restored, for whoever asked."""
        request, name = restoration.request, restoration.segment
        process = request.process
        if error is not None:
            self.segments.free(name, process)
        elif not self.segments.seal(name, process, process, request.object_id):
            error = DeclaredDeadError(f"process {process}, which asked for the object, has died")
        if error is not None:
            self._give_up(restoration, error)
            return
        answer = self._restorations.succeed(restoration)
        self.replies += [(token, answer) for token in restoration.tokens]
        if request.object_id.startswith(process):
            # Its owner restores what it has lost: no node that spilled it before is asked for it again.
            self._commands.append(DropDurable(request.object_id, NODE_HOLDER))

    def _file_spilled(self, spilled: FileSpilled, now: float) -> None:
        if spilled.holder == PUT_HOLDER:
            answer = Done() if spilled.error is None else spilled.error
            self.replies += [(token, answer) for token in self._persisting.pop(spilled.name)]
            return
        del self._spilling[spilled.name]
        segment = self.segments.spilled(spilled.name, spilled.error is None)
        if spilled.error is None:
            self.counts.spilled += 1
            self.counts.spilled_bytes += segment.size_bytes
        elif isinstance(spilled.error, AlreadyExistsError | DeclaredDeadError):
            segment.unspillable = True  # another attempt made another value of it, or its job has ended
            self.segments.weigh(segment)
        else:
            self.counts.refused += 1
            self._refusal, self._refused_until = str(spilled.error), now + REFUSED_SECONDS

    def _durable_found(self, found: DurableFound) -> None:
        """Let a durable object wait for its segment."""
        restoration, size_bytes = found.restoration, found.size_bytes
        restoration.size_bytes = size_bytes
        try:
            if found.error is not None:
                raise found.error
            if self._restorations.find(restoration.request) is not restoration:
                raise DeclaredDeadError(f"process {restoration.request.process}, which asked for the object, has died")
            self._want(Arrival(size_bytes, self._capacity(size_bytes), restoration))
        except ShoalError as error:
            self._give_up(restoration, error)

    # ------------------------------------------------------------------------------- room

    def pump(self, now: float) -> None:
        """Serve who can be served, and make room for the others."""
        while (first := self.waiting.first) is not None:
            leaves_reserve = self._lacking_bytes(first) <= 0
            if leaves_reserve and self._begin(first):
                self.waiting.remove_first()
                self._stalled_at = NEVER
            elif not (leaves_reserve and self._evict_one()):
                self._recall(now)
                self._spill(now)
                if not self._is_hopeless(now):
                    break
                self._refuse(self.waiting.remove_first(), ObjectStoreFullError(self._full(first.size_bytes, now)))
        if not len(self.waiting):
            self._stalled_at = NEVER
        self.wake_at = self._stalled_at + STALL_SECONDS
        if len(self.waiting) and now < self._recalled_until:
            self.wake_at = min(self.wake_at, self._recalled_until)

    def _begin(self, wanted: Wanted) -> bool:
        """Order the file that somebody waits for; False where there is no room."""
        if isinstance(wanted, Return):
            segment = self.segments.get(wanted.segment)
            assert segment is not None, "who waits for what was freed is told so at once"
            if not self.segments.bring_back(segment):
                return False
        elif isinstance(wanted, Allocation):
            new = self.segments.allocate_to_writer(wanted.process, wanted.size_bytes, wanted.job)
            if new is None:
                return False
            segment = new
            self.segments.asked(wanted.process, wanted.serial, segment)
            if wanted.ahead:
                self.segments.ahead[segment.name] = False
        elif isinstance(wanted, Incoming):
            owner = ProcessId(wanted.source)
            if wanted.linked:
                new = self.segments.allocate_link(owner, wanted.size_bytes)
            else:
                new = self.segments.allocate(owner, wanted.size_bytes, wanted.job, is_copy=wanted.is_copy)
            if new is None:
                return False
            segment = new
            wanted.name = segment.name
            if wanted.linked:
                self.served.append((wanted, None))
                return True
        else:
            restoration = wanted.restoration
            if self._restorations.find(restoration.request) is not restoration:
                self._give_up(restoration, DeclaredDeadError(f"process {restoration.request.process} has died"))
                return True
            new = self.segments.allocate(restoration.request.process, wanted.size_bytes, restoration.job, filled=True)
            if new is None:
                return False
            segment = new
            self._restorations.give_segment(restoration, segment.name)
        self._creating[segment.name] = wanted
        return True

    def _reserve_bytes(self) -> int:
        """Return how much must be left for what was spilled to come back."""
        return max(self.segments.spilled_sizes, default=0)

    def _lacking_bytes(self, wanted: Wanted) -> int:
        """Return how many bytes of idle segments have to be spilled before somebody may write; 0 for one who reads.

        Who wants more than the reserve leaves may have it when there is nothing else to spill.
        """
        reserve = self._reserve_bytes()
        reads = isinstance(wanted, Return) or (isinstance(wanted, Incoming) and wanted.is_copy)
        if reads or not reserve:
            return 0
        table = self.segments
        unspilled = table.idle[Cost.SPILL].total_bytes + table.idle[Cost.SPILLING].total_bytes
        return min(unspilled, unspilled + wanted.capacity_bytes - (table.capacity_bytes - reserve))

    def _evict_one(self) -> bool:
        """Take the file of the idle segment that can go at the least cost; False where there is none."""
        if (segment := self._first_idle(Cost.COPY)) is not None:
            self.segments.drop(segment)
        elif (segment := self._first_idle(Cost.DURABLE)) is not None:
            self.segments.evict(segment)
        return segment is not None

    def _first_idle(self, cost: Cost) -> Segment | None:
        name = self.segments.idle[cost].first()
        return None if name is None else self.segments.get(name)

    def _recall(self, now: float) -> None:
        """Have processes give back what they were granted ahead and do not write yet, each once."""
        recalled = self.segments.recall()
        if recalled:
            self.recalls += recalled
            self._recalled_until = now + RECALL_SECONDS

    def _spill(self, now: float) -> None:
        """Have idle segments written to the durable tier, so many as those who wait need."""
        if now < self._refused_until:
            return
        table = self.segments
        leaving = sum(segment.capacity_bytes for segment in self._spilling.values() if not segment.pinned())
        missing = self.waiting.wanted_bytes - (table.capacity_bytes - table.used_bytes) - leaving
        if (first := self.waiting.first) is not None:
            missing = max(missing, self._lacking_bytes(first) - leaving)
        while missing > 0 and len(self._spilling) < SPILLS_AT_ONCE:
            segment = self._first_idle(Cost.SPILL)
            if segment is None:
                return
            table.begin_spill(segment)
            self._spilling[segment.name] = segment
            missing -= segment.capacity_bytes

    def _is_hopeless(self, now: float) -> bool:
        """Tell whether the first has waited in vain: nothing moves that could make room."""
        moving = (
            self._spilling
            or now < self._recalled_until
            or any(
                segment.state in (SegmentState.FREED, SegmentState.ABANDONED)
                for segment in self.segments.ordered.values()
            )
        )
        if moving:
            self._stalled_at = NEVER
            return False
        self._stalled_at = min(self._stalled_at, now)
        return now < self._refused_until or now >= self._stalled_at + STALL_SECONDS

    # ------------------------------------------------------------------------------- refusals

    def _refuse(self, wanted: Wanted, error: ShoalError) -> None:
        """Tell somebody that there is no room, or no object."""
        self._stalled_at = NEVER
        if isinstance(wanted, Arrival):
            self._give_up(wanted.restoration, error)
            return
        if isinstance(wanted, Incoming):
            self.served.append((wanted, error))
            return
        if isinstance(wanted, Return):
            self._refuse_return(wanted, error)
            return
        self.replies += [(token, error) for token in wanted.tokens]
        wanted.tokens = []

    def _refuse_return(self, back: Return, error: ShoalError) -> None:
        if self._returns.get(back.segment) is back:
            del self._returns[back.segment]
        self.replies += [(token, error) for token, _ in back.answers]
        back.answers = []

    def _give_up(self, restoration: Restoration, error: ShoalError) -> None:
        self._restorations.fail(restoration)
        self.replies += [(token, error) for token in restoration.tokens]
        restoration.tokens = []

    def _full(self, size_bytes: int, now: float) -> str:
        """Say who holds what, what cannot be spilled and why, and what to do."""
        table = self.segments
        held: dict[str, int] = {}
        mapped = unwritten = 0
        for segment in table:
            if segment.has_file():
                holder = f"copies from node {segment.process} hold" if segment.is_copy else ""
                holder = holder or f"process {segment.process} holds"
                held[holder] = held.get(holder, 0) + segment.capacity_bytes
                mapped += segment.capacity_bytes * segment.pinned()
                unwritten += segment.capacity_bytes * (segment.state is SegmentState.WRITING)
        most = sorted(held.items(), key=lambda item: (-item[1], item[0]))[:3]
        holders = ", ".join(f"{holder} {size:,}" for holder, size in most)
        reserve = self._reserve_bytes()
        reserved = f"{reserve:,} bytes are left for what was spilled to come back; " if reserve else ""
        refusal = f"the durable tier refused to take more ({self._refusal}); " if now < self._refused_until else ""
        return (
            f"an object of {size_bytes:,} bytes does not fit into the node's shared memory: {table.used_bytes:,} of "
            f"{table.capacity_bytes:,} bytes are in use ({holders or 'nobody holds any'}); {mapped:,} bytes are mapped "
            f"by processes or sent to other nodes and {unwritten:,} are being written, which cannot be spilled; "
            f"{reserved}{refusal}drop references to objects, and values that were read from them, or give the node a "
            "larger object_store_memory"
        )

    def sanity_check(self) -> None:
        """State the invariants."""
        self.segments.sanity_check()
        writing = {segment.name for segment in self.segments if segment.durable is DurableState.WRITING}
        assert writing == set(self._spilling)
        ordered = {segment.name for segment in self.segments if segment.ordered}
        assert set(self._creating) <= ordered
        for name in self._returns:
            back = self.segments.get(name)
            assert back is not None
            assert back.state in (SegmentState.SPILLED, SegmentState.RETURNING)
        for segment in self.segments:
            waits = segment.name in self._returns
            assert segment.state is not SegmentState.RETURNING or waits, "what returns is waited for"
        if len(self.waiting):
            assert self._spilling or self.wake_at < NEVER or any(segment.ordered for segment in self.segments)


def _granted(segment: Segment) -> SegmentGranted:
    return SegmentGranted(segment=segment.name, place=segment.place, capacity_bytes=segment.capacity_bytes)
