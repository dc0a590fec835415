"""The segments of a node's shared memory: who writes, owns and maps each file, and which files are kept warm.

A segment's life::

    CREATING ──► WRITING ── SegmentSealed ──► SEALED ── freed, or its owner is gone ──► FREED ── no pins ──► reclaimed
       │            │                         │    ▲                                      ▲
       └────────────┴─ its writer is gone:    ▼    └── filled ── RETURNING                │
                       the file is removed,  SPILLED ── pinned ──────▲                    │
                       never used again       └───────────────────────────── freed ───────┘

A reclaimed file is kept *warm*, for the next object of its size class: writing to pages that have been touched is much
faster than to new ones. It gets a new name at each use. A name therefore means one object only, and a late request for
an object that is gone finds nothing, instead of another object.

A segment that was promised *ahead*, before there is anything to write, is WRITING, too; when its writer frees it, its
file is kept warm.

A small segment that a process of this node writes lies in a *part* of a file that it shares with others (see
``slabs``). A part is kept warm, or given back, as a file is. What is pulled, restored or comes back has its own file.

A sealed segment may be written to the *durable* tier as well. Once it is whole there, and nobody maps it, its file can
go: then it is spilled. It keeps its name; when it is pinned again its file is made anew and filled. The object stays
durable: what was spilled once can be spilled again without moving a byte. What is durable goes with its segment.

A *copy* is a segment with the object of another node's (see ``copies``). Its home is written down as its process. It is
never spilled, and dropped where room is needed: its home has the object.

Where the other node's folder lies beside ours, a copy need not have bytes of its own: it is *linked*. The file has a
name in either folder, and its pages go with the last name. It counts as used in both. Only its home uses it again, when
it has no other name and nobody has locked it: no node knows who maps what elsewhere, but readers lock what they map.

A pin is held for a process of this node, or for a puller elsewhere to which the segment is lent (see ``loans``).

A reader may map a segment first and tell of its pin then. Until that is heard, too, only its lock on the file keeps
that from being used again (see ``shoal_core.runtime.data.segments``), which whoever makes the files sees to.

Writer, owner and readers speak to the node over different channels, so a reader's pin and even the owner's "freed" may
overtake the writer's "sealed". Both are taken: a writer reveals a name only after it has written. Whoever asks for a
pin holds it from then on, also while the segment is on its way back.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import NO_NODE, JobId, NodeId, ProcessId
from shoal_core.protocol.places import is_part, located
from shoal_core.protocol.storage import NODE_HOLDER
from shoal_worker.objects.files import (
    CreateFile,
    DropDurable,
    FileCommand,
    FillFile,
    LinkFile,
    RemoveFile,
    ShelveFile,
    SpillFile,
    size_class,
)
from shoal_worker.objects.idle import Cost, IdleQueue
from shoal_worker.objects.pins import MOST_ENDED, Pins
from shoal_worker.objects.slabs import Slabs, Vacated


class SegmentState(Enum):
    """How far a segment is in its life."""

    CREATING = "creating"
    ABANDONED = "abandoned"
    WRITING = "writing"
    SEALED = "sealed"
    SPILLED = "spilled"
    RETURNING = "returning"
    FREED = "freed"


class DurableState(Enum):
    """Whether a segment's object is in the durable tier as well."""

    NONE = "none"
    WRITING = "being written"
    WHOLE = "whole"


@dataclass(slots=True)
class Segment:
    """One object's file. ``process`` is the writer until it is sealed, the owner afterwards; both belong to ``job``.

    ``place`` is where it lies: in a file that is called like it, or in a part of another.
    ``spoiled``: someone may still use it, so its file must not be used again.
    ``freed_by`` are those who freed it before it was sealed: the owner, if its word overtook the writer's.
    ``object_id`` names the object in the durable tier, and ``holder`` the segment itself, as who holds it there.
    ``ordered``: its file is being made or filled. ``used`` rises with each use of any segment. ``is_copy``: of another
    node's segment. ``lent_to_link``: another node may have linked its file.
    """

    name: str
    capacity_bytes: int
    state: SegmentState
    process: ProcessId
    job: JobId | None = None
    size_bytes: int = 0
    object_id: str = ""
    pins: dict[ProcessId, Pins] = field(default_factory=dict)
    freed_by: set[ProcessId] = field(default_factory=set)
    spoiled: bool = False
    durable: DurableState = DurableState.NONE
    holder: str = ""
    unspillable: bool = False
    ordered: bool = False
    used: int = 0
    is_copy: bool = False
    lent_to_link: bool = False
    place: str = ""

    def __post_init__(self) -> None:
        self.place = self.place or self.name

    def pinned(self) -> bool:
        """Tell whether a process maps the segment, or a puller pulls it."""
        return any(pins.held for pins in self.pins.values())

    def has_file(self) -> bool:
        """Tell whether the segment takes room."""
        return self.state is not SegmentState.SPILLED

    def in_memory(self) -> bool:
        """Tell whether the segment can be mapped, now that it is pinned."""
        return self.state in (SegmentState.WRITING, SegmentState.SEALED)

    def is_idle(self) -> bool:
        """Tell whether the segment lies in memory and nobody maps it."""
        return self.state is SegmentState.SEALED and not self.pinned()

    def is_spillable(self) -> bool:
        """Tell whether the durable tier may take the segment's object."""
        return bool(self.object_id) and not self.unspillable

    def cost(self) -> Cost | None:
        """Return what it takes to have the segment's file go; None where it has to stay."""
        if not self.is_idle():
            return None
        if self.is_copy:
            return Cost.COPY
        if self.durable is DurableState.WHOLE:
            return Cost.DURABLE
        if not self.is_spillable():
            return None
        return Cost.SPILL if self.durable is DurableState.NONE else Cost.SPILLING


_UNWRITTEN = (SegmentState.CREATING, SegmentState.WRITING, SegmentState.ABANDONED)
_PINNABLE = (SegmentState.WRITING, SegmentState.SEALED, SegmentState.SPILLED, SegmentState.RETURNING)


class SegmentTable:
    """All segments of one node, within ``capacity_bytes``. What is to be done to files is left in ``commands``.

    What processes write shares files where it takes no more than ``shared_bytes``.
    """

    def __init__(self, capacity_bytes: int, warm_bytes: int, node: NodeId = NO_NODE, shared_bytes: int = 0) -> None:
        self.node = node
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.warm_bytes = 0
        self.spilled_sizes: Counter[int] = Counter()
        self.slabs = Slabs()
        self.commands: list[FileCommand] = []
        self.idle = {cost: IdleQueue() for cost in Cost}
        self.ordered: dict[str, Segment] = {}
        """The segments whose files are being made or filled."""
        self.ahead: dict[str, bool] = {}
        """The segments that were promised before there was anything to write, and whether they were asked back."""
        self.gone: list[str] = []
        """The segments that ceased to be any object's, or that are removed, for whoever knows more about them."""
        self._most_warm_bytes = warm_bytes
        self._segments: dict[str, Segment] = {}
        self._shared_bytes = shared_bytes
        self._warm: dict[int, deque[str]] = {}
        self._warm_parts: dict[int, deque[str]] = {}
        self._requests: dict[ProcessId, dict[int, str]] = {}
        self._drawn = 0
        self._uses = 0

    def get(self, name: str) -> Segment | None:
        """Return a segment that has not been reclaimed."""
        return self._segments.get(name)

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments.values())

    def processes(self) -> set[ProcessId]:
        """Return the writers and owners of segments; copies have none."""
        return {segment.process for segment in self._segments.values() if not segment.is_copy}

    def jobs(self) -> set[JobId]:
        """Return the jobs that segments belong to."""
        return {segment.job for segment in self._segments.values() if segment.job is not None}

    def allocate(
        self,
        process: ProcessId,
        size_bytes: int,
        job: JobId | None = None,
        *,
        filled: bool = False,
        is_copy: bool = False,
    ) -> Segment | None:
        """Promise a file to one who will fill it and order it made; None where there is no room now."""
        capacity = size_class(size_bytes)
        reused = self._take_room(capacity)
        if reused is None:
            return None
        segment = self._new(capacity, process, job, size_bytes, is_copy=is_copy)
        self._order_file(segment, reused, filled=filled)
        return segment

    def allocate_link(self, home: ProcessId, size_bytes: int) -> Segment | None:
        """Promise room for a copy that shares its file with its home; None where there is none now."""
        capacity = size_class(size_bytes)
        if not self._make_room(capacity):
            return None
        segment = self._new(capacity, home, None, size_bytes, is_copy=True)
        segment.state, segment.spoiled = SegmentState.WRITING, True
        return segment

    def link(self, name: str, home: NodeId, origin: str) -> None:
        """Order the file of a copy for which there is room: its home's."""
        self.commands.append(LinkFile(name, home, origin))

    def is_shared(self, size_bytes: int) -> bool:
        """Tell whether an object of this size shares its file with others where a process writes it."""
        return size_class(size_bytes) <= self._shared_bytes

    def allocate_to_writer(self, process: ProcessId, size_bytes: int, job: JobId | None = None) -> Segment | None:
        """Promise a file, or a part of one, to a process of this node; None where there is no room now."""
        capacity = size_class(size_bytes)
        if not self.is_shared(size_bytes):
            return self.allocate(process, size_bytes, job)
        if warm := self._warm_parts.get(capacity):
            self.warm_bytes -= capacity
            self.used_bytes += capacity
            part = reused = warm.pop()
        elif self._make_room(capacity):
            part, reused = self.slabs.take(capacity), ""
        else:
            return None
        segment = self._new(capacity, process, job, size_bytes)
        segment.place = part
        self._order(segment)
        self.commands.append(CreateFile(segment.name, capacity, reused, part=part))
        return segment

    def _new(
        self, capacity: int, process: ProcessId, job: JobId | None, size_bytes: int, *, is_copy: bool = False
    ) -> Segment:
        self._drawn += 1
        segment = Segment(f"o{self._drawn}", capacity, SegmentState.CREATING, process, job, size_bytes, is_copy=is_copy)
        self._segments[segment.name] = segment
        return segment

    def asked_again(self, process: ProcessId, serial: int) -> Segment | None:
        """Return the segment that this request of a process was promised before, None where it is new.

        Raises ``NotFoundError`` where the segment is no longer the asker's to write: the request is a late copy.
        """
        name = self._requests.get(process, {}).get(serial)
        if name is None:
            return None
        segment = self._segments.get(name)
        if segment is None or segment.state not in (SegmentState.CREATING, SegmentState.WRITING):
            raise NotFoundError(f"request {serial} of process {process} was answered with segment {name} before")
        return segment

    def asked(self, process: ProcessId, serial: int, segment: Segment) -> None:
        """Note which segment a request was promised; of each process the newest ``MOST_ENDED`` are remembered."""
        requests = self._requests.setdefault(process, {})
        requests[serial] = segment.name
        if len(requests) > MOST_ENDED:
            del requests[next(iter(requests))]

    def created(self, name: str) -> Segment | None:
        """A file is made; return its segment, or None where nobody needs it by now."""
        segment = self._segments[name]
        self._done(segment)
        if segment.state is SegmentState.ABANDONED:
            self._remove(segment)
            return None
        if segment.state is SegmentState.FREED:
            segment.spoiled = True  # it was not filled, and lies under another name
            self._reclaim(segment)
            return None
        if segment.state is SegmentState.CREATING:
            segment.state = SegmentState.WRITING
        return segment

    def stays_warm(self, warm: str, name: str) -> None:
        """A file was not made of that warm one, which somebody still uses: it is warm as before."""
        self._keep_warm(warm, self._segments[name].capacity_bytes, busy=True)

    def creation_failed(self, name: str) -> None:
        """A file could not be made: nothing was promised, and what was spilled still is."""
        segment = self._segments[name]
        self._done(segment)
        self.used_bytes -= segment.capacity_bytes
        if is_part(segment.place):
            self._vacate(segment.place)
        if segment.state in (SegmentState.RETURNING, SegmentState.FREED):
            self._spilled_again(segment)
        else:
            self._end(segment)

    def seal(self, name: str, writer: ProcessId, owner: ProcessId, object_id: str = "") -> bool:
        """The writer is done, and ``owner`` will free the segment; tell whether the writer may say so."""
        segment = self._segments.get(name)
        if segment is None or segment.state is not SegmentState.WRITING or segment.process != writer:
            return False
        segment.state, segment.process, segment.object_id = SegmentState.SEALED, owner, object_id
        self.ahead.pop(name, None)
        self._use(segment)
        if owner in segment.freed_by:
            self.free(name, owner)
        return True

    def recall(self) -> list[tuple[ProcessId, str]]:
        """Return what processes were promised ahead and are to give back, each once."""
        recalled = [name for name, asked in self.ahead.items() if not asked and not self._segments[name].ordered]
        self.ahead.update(dict.fromkeys(recalled, True))
        return [(self._segments[name].process, name) for name in recalled]

    def pin(self, name: str, process: ProcessId, serial: int) -> Segment:
        """Keep a segment for a process that is about to map it; ``NotFoundError`` where the object is gone.

        The process may map it once it lies in memory.
        """
        segment = self._segments.get(name)
        if segment is None or segment.state not in _PINNABLE:
            raise NotFoundError(f"segment {name} cannot be mapped: its object was freed, or its writer died")
        if not segment.pins.setdefault(process, Pins()).hold(serial):
            raise NotFoundError(f"pin {serial} of process {process} on segment {name} has ended before")
        self._use(segment)
        return segment

    def pin_many(self, pins: dict[str, int], process: ProcessId) -> dict[str, str]:
        """Keep segments (by their serials) for a process, as far as they lie in memory; return where those lie."""
        pinned = {}
        for name, serial in pins.items():
            segment = self._segments.get(name)
            if segment is not None and segment.state not in (SegmentState.WRITING, SegmentState.SEALED):
                continue  # the process asks for it alone, and waits until it is back
            try:
                pinned[name] = self.pin(name, process, serial).place
            except NotFoundError:
                continue  # the process asks for it alone, and is told why it cannot have it
        return pinned

    def unpin(self, name: str, process: ProcessId, serial: int) -> None:
        """A process maps the segment no more; a copy of the request for that pin has no effect from now on."""
        segment = self._segments.get(name)
        if segment is None:
            return
        segment.pins.setdefault(process, Pins()).end(serial)
        self._use(segment)
        self._reclaim(segment)

    def unpin_anywhere(self, process: ProcessId, serial: int) -> None:
        """A process maps nothing by this pin any more, on whatever segment it may have been."""
        for name, segment in list(self._segments.items()):
            if process in segment.pins and serial in segment.pins[process].held:
                self.unpin(name, process, serial)

    def give_up(self, name: str) -> None:
        """What was being written will never be whole: its file is removed, as soon as it is made."""
        segment = self._segments.get(name)
        if segment is not None and segment.state is SegmentState.CREATING:
            segment.state = SegmentState.ABANDONED
        elif segment is not None and segment.state is SegmentState.WRITING:
            self._remove(segment)

    def free(self, name: str, process: ProcessId) -> bool:
        """The owner (or the writer, who gives up) needs the segment no more; tell whether that had an effect."""
        segment = self._segments.get(name)
        if segment is None:
            return False
        if segment.state is SegmentState.WRITING and segment.process != process:
            segment.freed_by.add(process)
            return False
        if segment.process != process or segment.state not in _PINNABLE:
            return False
        if segment.state is SegmentState.WRITING and name not in self.ahead:
            self._remove(segment)
        else:
            self._set_free(segment)
        return True

    def process_died(self, process: ProcessId, reaped: bool = True) -> None:
        """A process is gone: its mappings are, what it was writing never becomes whole, what it owned is freed.

        Where it was not ``reaped``, it may go on using what it has mapped: those files are not used again.
        """
        self._requests.pop(process, None)
        for segment in list(self._segments.values()):
            pins = segment.pins.pop(process, None)
            if pins is not None and pins.held and not reaped:
                segment.spoiled = True
            self.weigh(segment)
            if segment.process != process:
                self._reclaim(segment)
            elif segment.state is SegmentState.WRITING:
                segment.spoiled = segment.spoiled or not reaped
                self._remove(segment)
            elif segment.state is SegmentState.CREATING:
                segment.state = SegmentState.ABANDONED
            else:
                self._set_free(segment)

    # ------------------------------------------------------------------------------- memory and the durable tier

    def begin_spill(self, segment: Segment) -> None:
        """Order an idle segment written to the durable tier."""
        assert segment.is_idle()
        assert not segment.is_copy
        self._drawn += 1
        segment.durable, segment.holder = DurableState.WRITING, f"{NODE_HOLDER}{self.node}:{self._drawn:012x}"
        self.weigh(segment)
        self.commands.append(
            SpillFile(
                segment.name,
                segment.place,
                segment.object_id,
                segment.size_bytes,
                segment.job or JobId(""),
                segment.holder,
            )
        )

    def spilled(self, name: str, whole: bool) -> Segment:
        """The object is whole in the durable tier, or could not be written there; the file is there as before."""
        segment = self._segments[name]
        segment.durable = DurableState.WHOLE if whole else DurableState.NONE
        self.weigh(segment)
        self._reclaim(segment)
        return segment

    def evict(self, segment: Segment) -> None:
        """Take the file of an idle segment that is durable."""
        assert segment.is_idle()
        assert segment.durable is DurableState.WHOLE
        segment.state = SegmentState.SPILLED
        self.weigh(segment)
        self.spilled_sizes[segment.capacity_bytes] += 1
        if segment.spoiled:
            self._give_back(segment)
            segment.spoiled, segment.place = False, segment.name
            return
        self.used_bytes -= segment.capacity_bytes
        if is_part(segment.place):
            self._keep_warm(segment.place, segment.capacity_bytes)
            segment.place = segment.name
            return
        self._drawn += 1
        shelf = f"w{self._drawn}"
        self.commands.append(ShelveFile(segment.name, shelf))
        self._keep_warm(shelf, segment.capacity_bytes, busy=segment.lent_to_link)
        segment.lent_to_link = False

    def drop(self, segment: Segment) -> None:
        """Have an idle copy go."""
        assert segment.is_copy
        assert segment.is_idle()
        self._set_free(segment)

    def bring_back(self, segment: Segment) -> bool:
        """Order the file of a spilled segment made, to be filled again; False where there is no room now."""
        assert segment.state is SegmentState.SPILLED
        reused = self._take_room(segment.capacity_bytes)
        if reused is None:
            return False
        segment.state = SegmentState.RETURNING
        self._returned(segment)
        self._order_file(segment, reused, filled=True)
        return True

    def fill(self, segment: Segment, object_id: str) -> None:
        """Order a file that is made filled from a durable object."""
        self._order(segment)
        self.commands.append(FillFile(segment.name, object_id, segment.size_bytes))

    def filled(self, name: str, whole: bool) -> Segment | None:
        """A file holds its object again, or could not be filled; None where its process is gone with it."""
        segment = self._segments.get(name)
        if segment is None:
            return None
        self._done(segment)
        if segment.state is SegmentState.RETURNING and whole:
            segment.state = SegmentState.SEALED
            self._use(segment)
        elif segment.state is SegmentState.RETURNING:
            self.commands.append(RemoveFile(name))
            self.used_bytes -= segment.capacity_bytes
            self._spilled_again(segment)
        else:
            segment.spoiled = segment.spoiled or not whole
            self._reclaim(segment)
        return segment

    def _spilled_again(self, segment: Segment) -> None:
        """There is no file, as before the segment was to return; where it was freed since, nothing is left of it."""
        if segment.state is SegmentState.FREED:
            self._drop_durable(segment)
            self._end(segment)
        else:
            segment.state = SegmentState.SPILLED
            self.spilled_sizes[segment.capacity_bytes] += 1

    def _returned(self, segment: Segment) -> None:
        """A segment is spilled no more."""
        self.spilled_sizes[segment.capacity_bytes] -= 1
        if not self.spilled_sizes[segment.capacity_bytes]:
            del self.spilled_sizes[segment.capacity_bytes]

    def _drop_durable(self, segment: Segment) -> None:
        if segment.durable is DurableState.WHOLE:
            self.commands.append(DropDurable(segment.object_id, segment.holder))

    # ------------------------------------------------------------------------------- room

    def has_room(self, capacity: int) -> bool:
        """Tell whether there is room for a file; warm files are none."""
        return bool(self._warm.get(capacity)) or self.used_bytes + capacity <= self.capacity_bytes

    def _take_room(self, capacity: int) -> str | None:
        """Take room for a file; return the warm file to use for it, "" for a new one, None where there is no room.

        Warm files of other sizes make room.
        """
        if self._warm.get(capacity):
            self.warm_bytes -= capacity
            self.used_bytes += capacity
            return self._warm[capacity].pop()
        return "" if self._make_room(capacity) else None

    def _make_room(self, capacity: int) -> bool:
        """Take room for a new file, from warm ones where there is no other; tell whether there was any."""
        if self.used_bytes + capacity > self.capacity_bytes:
            return False
        while self.used_bytes + self.warm_bytes + capacity > self.capacity_bytes:
            self._cool_largest()
        self.used_bytes += capacity
        return True

    def _order_file(self, segment: Segment, reused: str, *, filled: bool) -> None:
        self._order(segment)
        self.commands.append(CreateFile(segment.name, segment.capacity_bytes, reused, filled))

    def _order(self, segment: Segment) -> None:
        segment.ordered = True
        self.ordered[segment.name] = segment

    def _done(self, segment: Segment) -> None:
        segment.ordered = False
        del self.ordered[segment.name]

    def _use(self, segment: Segment) -> None:
        self._uses += 1
        segment.used = self._uses
        self.weigh(segment)

    def weigh(self, segment: Segment) -> None:
        """Note what it would take to have a segment's file go, after whatever it depends on has changed."""
        wanted = segment.cost()
        for cost, queue in self.idle.items():
            if cost is wanted:
                queue.put(segment.name, segment.used, segment.capacity_bytes)
            else:
                queue.remove(segment.name)

    def _set_free(self, segment: Segment) -> None:
        """Nobody needs the object any more."""
        if segment.state is SegmentState.SPILLED:
            self._returned(segment)
            self._drop_durable(segment)
            self._end(segment)
            return
        if segment.state is not SegmentState.FREED:
            segment.state = SegmentState.FREED
            self.ahead.pop(segment.name, None)
            self.weigh(segment)
            self.gone.append(segment.name)
        self._reclaim(segment)

    def _end(self, segment: Segment) -> None:
        """Nothing is left of a segment."""
        del self._segments[segment.name]
        self.ordered.pop(segment.name, None)
        self.ahead.pop(segment.name, None)
        for queue in self.idle.values():
            queue.remove(segment.name)
        self.gone.append(segment.name)

    def _reclaim(self, segment: Segment) -> None:
        """Keep the file of a segment warm once it is freed, nobody maps it and nothing was ordered with it."""
        under_way = segment.ordered or segment.durable is DurableState.WRITING
        if segment.state is not SegmentState.FREED or segment.pinned() or under_way:
            return
        self._drop_durable(segment)
        if segment.spoiled:
            self._remove(segment)
            return
        del self._segments[segment.name]
        self.used_bytes -= segment.capacity_bytes
        self._keep_warm(segment.place, segment.capacity_bytes, busy=segment.lent_to_link)

    def _keep_warm(self, place: str, capacity: int, *, busy: bool = False) -> None:
        """Keep what lies there for the next object of its size, as long as there is room for that.

        What may be ``busy`` elsewhere is the last to be used again.
        """
        if is_part(place) and self.slabs.is_closed(place):
            self._vacate(place)
            return
        warm = self._warm_parts if is_part(place) else self._warm
        self.warm_bytes += capacity
        places = warm.setdefault(capacity, deque())
        if busy:
            places.appendleft(place)
        else:
            places.append(place)
        while self.warm_bytes > self._most_warm_bytes or self.used_bytes + self.warm_bytes > self.capacity_bytes:
            self._cool_largest()

    def _cool_largest(self) -> None:
        """Give back what is warm: the largest first, and of those the one that was used the longest ago."""
        size = max(size for warm in (self._warm, self._warm_parts) for size, places in warm.items() if places)
        self.warm_bytes -= size
        if self._warm.get(size):
            self.commands.append(RemoveFile(self._warm[size].popleft()))
        else:
            self._vacate(self._warm_parts[size].popleft())

    def _remove(self, segment: Segment) -> None:
        self._end(segment)
        self._give_back(segment)

    def _give_back(self, segment: Segment) -> None:
        """Have a segment's file go, or its part; what is spoiled of a shared one has to stay, and counts as used."""
        if not is_part(segment.place):
            self.used_bytes -= segment.capacity_bytes
            self.commands.append(RemoveFile(segment.name))
        elif segment.spoiled:
            self._lose(segment.place, segment.capacity_bytes)
        else:
            self.used_bytes -= segment.capacity_bytes
            self._vacate(segment.place)

    def _lose(self, place: str, capacity: int) -> None:
        """Leave a part to whoever may still use it, and keep nothing warm beside it that would keep its file."""
        if (vacated := self.slabs.lose(place)) is not None:
            self._vacated(vacated)
        warm = self._warm_parts.get(capacity, deque())
        beside = [part for part in warm if located(part)[0] == located(place)[0]]
        for part in beside:
            warm.remove(part)
            self.warm_bytes -= capacity
            self._vacate(part)

    def _vacate(self, part: str) -> None:
        self._vacated(self.slabs.vacate(part))

    def _vacated(self, vacated: Vacated) -> None:
        self.used_bytes -= vacated.lost_bytes
        self.commands.append(RemoveFile(vacated.place, vacated.part_bytes))

    def sanity_check(self) -> None:
        """State the invariants."""
        for cost, queue in self.idle.items():
            idle = [segment for segment in self if segment.cost() is cost]
            assert all(segment.name in queue for segment in idle)
            assert len(queue) == len(idle)
            assert queue.total_bytes == sum(segment.capacity_bytes for segment in idle)
            assert queue.first() == min(idle, key=_last_use).name if idle else queue.first() is None
        assert all(self._segments[name].state in _UNWRITTEN for name in self.ahead)
        assert self.ordered == {segment.name: segment for segment in self if segment.ordered}
        used = [segment for segment in self if segment.has_file()]
        assert self.used_bytes == sum(segment.capacity_bytes for segment in used) + self.slabs.lost_bytes()
        spilled = Counter(segment.capacity_bytes for segment in self if not segment.has_file())
        assert self.spilled_sizes == spilled
        kept = [*self._warm.items(), *self._warm_parts.items()]
        assert self.warm_bytes == sum(size * len(places) for size, places in kept)
        assert self.warm_bytes <= self._most_warm_bytes
        assert self.used_bytes + self.warm_bytes <= self.capacity_bytes
        places = [*(segment.place for segment in used), *(place for _, warm in kept for place in warm)]
        assert len({*places}) == len(places), "no two lie in the same place"
        for segment in self._segments.values():
            assert not segment.is_copy or segment.durable is DurableState.NONE, "copies are never spilled"
            under_way = segment.ordered or segment.durable is DurableState.WRITING
            needed = segment.pinned() or under_way
            assert segment.state is not SegmentState.FREED or needed, "what nobody needs is reclaimed"
            assert segment.state is not SegmentState.SPILLED or segment.durable is DurableState.WHOLE, "nothing is lost"
            assert segment.state is not SegmentState.RETURNING or segment.durable is DurableState.WHOLE


def _last_use(segment: Segment) -> int:
    return segment.used
