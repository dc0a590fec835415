"""The segments of a node's shared memory: who writes, owns and maps each file, and which files are kept warm.

A segment's life::

    CREATING ──► WRITING ── SegmentSealed ──► SEALED ── freed, or its owner is gone ──► FREED ── no pins ──► reclaimed
       │            │
       └────────────┴── its writer is gone: the file is removed, never used again

A reclaimed file is kept *warm*, for the next object of its size class: writing to pages that have been touched is much
faster than to new ones. It gets a new name at each use. A name therefore means one object only, and a late request for
an object that is gone finds nothing, instead of another object.

Writer, owner and readers speak to the node over different channels, so a reader's pin and even the owner's "freed" may
overtake the writer's "sealed". Both are taken: a writer reveals a name only after it has written.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from shoal_core.protocol.errors import NotFoundError, ObjectStoreFullError
from shoal_core.protocol.ids import JobId, ProcessId

PAGE_BYTES = 4096
MOST_ENDED = 64


def size_class(size_bytes: int) -> int:
    """Return the size of the file for an object: powers of two in four steps, so that at most a quarter is unused."""
    if size_bytes <= PAGE_BYTES:
        return PAGE_BYTES
    step = max(PAGE_BYTES, 1 << ((size_bytes - 1).bit_length() - 3))
    return -(-size_bytes // step) * step


class SegmentState(Enum):
    """How far a segment is in its life."""

    CREATING = "creating"
    ABANDONED = "abandoned"
    WRITING = "writing"
    SEALED = "sealed"
    FREED = "freed"


class Pins:
    """The pins of one process on one segment, by serial.

    The requests of different threads may overtake each other, and a copy of a request may come after the end of its
    pin. So what ended is remembered: the newest ``MOST_ENDED`` serials, and that all below them have ended too.
    """

    __slots__ = ("_all_ended", "_ended", "held")

    def __init__(self) -> None:
        self.held: set[int] = set()
        self._ended: set[int] = set()
        self._all_ended = 0

    def hold(self, serial: int) -> bool:
        """Hold a pin; False if it has ended already."""
        if serial in self._ended or (serial <= self._all_ended and serial not in self.held):
            return False
        self.held.add(serial)
        return True

    def end(self, serial: int) -> None:
        """A pin is held no more, and never again."""
        self.held.discard(serial)
        if serial > self._all_ended:
            self._ended.add(serial)
        if len(self._ended) > MOST_ENDED:
            self._all_ended = min(self._ended)
            self._ended.remove(self._all_ended)


@dataclass(slots=True)
class Segment:
    """One object's file. ``process`` is the writer until it is sealed, the owner afterwards; both belong to ``job``.

    ``spoiled``: someone may still map it, so its file must not be used again. ``is_copy``: of another node's segment.
    ``freed_by`` are those who freed it before it was sealed: the owner, if its word overtook the writer's.
    """

    name: str
    capacity_bytes: int
    state: SegmentState
    process: ProcessId
    job: JobId | None = None
    pins: dict[ProcessId, Pins] = field(default_factory=dict)
    freed_by: set[ProcessId] = field(default_factory=set)
    spoiled: bool = False
    is_copy: bool = False

    def pinned(self) -> bool:
        """Tell whether a process maps the segment."""
        return any(pins.held for pins in self.pins.values())


@dataclass(frozen=True, slots=True)
class CreateFile:
    """Make a file of this size with all its pages reserved, from the warm file ``reused`` where one is named.

    The outcome comes back as ``FileCreated``.
    """

    name: str
    capacity_bytes: int
    reused: str = ""


@dataclass(frozen=True, slots=True)
class RemoveFile:
    """Remove a file, and its pages with it."""

    name: str


FileCommand = CreateFile | RemoveFile


class SegmentTable:
    """All segments of one node, within ``capacity_bytes``. What is to be done to files is left in ``commands``."""

    def __init__(self, capacity_bytes: int, warm_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.warm_bytes = 0
        self.commands: list[FileCommand] = []
        self.freed: list[str] = []
        """The segments that ceased to be any object's, for whoever keeps more about them."""
        self._most_warm_bytes = warm_bytes
        self._segments: dict[str, Segment] = {}
        self._warm: dict[int, deque[str]] = {}
        self._requests: dict[ProcessId, dict[int, str]] = {}
        self._drawn = 0

    def get(self, name: str) -> Segment | None:
        """Return a segment that has not been reclaimed."""
        return self._segments.get(name)

    def __len__(self) -> int:
        return len(self._segments)

    def processes(self) -> set[ProcessId]:
        """Return the writers and owners of segments; copies have none."""
        return {segment.process for segment in self._segments.values() if not segment.is_copy}

    def jobs(self) -> set[JobId]:
        """Return the jobs that segments belong to."""
        return {segment.job for segment in self._segments.values() if segment.job is not None}

    def has_room(self, size_bytes: int) -> bool:
        """Tell whether an object fits in without anything that is of use being evicted."""
        return self.used_bytes + size_class(size_bytes) <= self.capacity_bytes

    def allocate(
        self, process: ProcessId, size_bytes: int, job: JobId | None = None, *, is_copy: bool = False
    ) -> Segment:
        """Promise a file to a writer and order it made; ``ObjectStoreFullError`` says who holds what."""
        capacity = size_class(size_bytes)
        reused = self._warm[capacity].pop() if self._warm.get(capacity) else ""
        if reused:
            self.warm_bytes -= capacity
        else:
            self._make_room(capacity, size_bytes)
        self._drawn += 1
        segment = Segment(f"o{self._drawn}", capacity, SegmentState.CREATING, process, job, is_copy=is_copy)
        self._segments[segment.name] = segment
        self.used_bytes += capacity
        self.commands.append(CreateFile(segment.name, capacity, reused))
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
        """A file is made; return its segment, or None where its writer is gone by now."""
        segment = self._segments[name]
        if segment.state is SegmentState.ABANDONED:
            self._remove(segment)
            return None
        segment.state = SegmentState.WRITING
        return segment

    def creation_failed(self, name: str) -> None:
        """A file could not be made: nothing was promised."""
        self.used_bytes -= self._segments.pop(name).capacity_bytes

    def seal(self, name: str, writer: ProcessId, owner: ProcessId) -> bool:
        """The writer is done, and ``owner`` will free the segment; tell whether the writer may say so."""
        segment = self._segments.get(name)
        if segment is None or segment.state is not SegmentState.WRITING or segment.process != writer:
            return False
        segment.state, segment.process = SegmentState.SEALED, owner
        if owner in segment.freed_by:
            self.free(name, owner)
        return True

    def pin(self, name: str, process: ProcessId, serial: int) -> None:
        """Keep a segment for a process that is about to map it; ``NotFoundError`` where the object is gone."""
        segment = self._segments.get(name)
        if segment is None or segment.state not in (SegmentState.WRITING, SegmentState.SEALED):
            raise NotFoundError(f"segment {name} cannot be mapped: its object was freed, or its writer died")
        if not segment.pins.setdefault(process, Pins()).hold(serial):
            raise NotFoundError(f"pin {serial} of process {process} on segment {name} has ended before")
        if segment.is_copy:  # the one that was used last is evicted last
            self._segments[name] = self._segments.pop(name)

    def unpin(self, name: str, process: ProcessId, serial: int) -> None:
        """A process maps the segment no more; a copy of the request for that pin has no effect from now on."""
        segment = self._segments.get(name)
        if segment is None:
            return
        segment.pins.setdefault(process, Pins()).end(serial)
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
        if segment.process != process or segment.state not in (SegmentState.WRITING, SegmentState.SEALED):
            return False
        if segment.state is SegmentState.WRITING:
            self._remove(segment)
        else:
            self._free(segment)
        return True

    def _free(self, segment: Segment) -> None:
        segment.state = SegmentState.FREED
        self.freed.append(segment.name)
        self._reclaim(segment)

    def process_died(self, process: ProcessId, reaped: bool = True) -> None:
        """A process is gone: its mappings are, what it was writing never becomes whole, what it owned is freed.

        Where it was not ``reaped``, it may go on reading what it has mapped: those files are not used again.
        """
        self._requests.pop(process, None)
        for segment in list(self._segments.values()):
            pins = segment.pins.pop(process, None)
            if pins is not None and pins.held and not reaped:
                segment.spoiled = True
            if segment.process != process:
                self._reclaim(segment)
            elif segment.state is SegmentState.WRITING:
                self._remove(segment)
            elif segment.state is SegmentState.CREATING:
                segment.state = SegmentState.ABANDONED
            elif segment.state is SegmentState.SEALED:
                self._free(segment)
            else:
                self._reclaim(segment)

    def _evict_copies(self, capacity: int) -> None:
        """Let go of copies that nobody maps, the one that was used last at the end, until there is room."""
        for segment in [segment for segment in self._segments.values() if segment.is_copy]:
            if self.used_bytes + capacity <= self.capacity_bytes:
                return
            if segment.state is SegmentState.SEALED and not segment.pinned():
                self._free(segment)

    def _make_room(self, capacity: int, size_bytes: int) -> None:
        self._evict_copies(capacity)
        if self.used_bytes + capacity > self.capacity_bytes:
            raise ObjectStoreFullError(self._full(size_bytes))
        for size in sorted(self._warm, reverse=True):
            while self._warm[size] and self.used_bytes + self.warm_bytes + capacity > self.capacity_bytes:
                self._cool(size)

    def _full(self, size_bytes: int) -> str:
        held: dict[str, int] = {}
        for segment in self._segments.values():
            holder = f"copies of objects of node {segment.process} hold" if segment.is_copy else ""
            holder = holder or f"process {segment.process} holds"
            held[holder] = held.get(holder, 0) + segment.capacity_bytes
        most = sorted(held.items(), key=lambda item: (-item[1], item[0]))[:3]
        holders = ", ".join(f"{holder} {size:,}" for holder, size in most)
        return (
            f"an object of {size_bytes:,} bytes does not fit into the node's shared memory: {self.used_bytes:,} of "
            f"{self.capacity_bytes:,} bytes are in use ({holders or 'nobody holds any'}). Drop references to objects "
            "that are not needed, or give the node a larger object_store_memory"
        )

    def _reclaim(self, segment: Segment) -> None:
        """Keep the file of a segment warm once it is freed and nobody maps it."""
        if segment.state is not SegmentState.FREED or segment.pinned():
            return
        if segment.spoiled:
            self._remove(segment)
            return
        del self._segments[segment.name]
        self.used_bytes -= segment.capacity_bytes
        self.warm_bytes += segment.capacity_bytes
        self._warm.setdefault(segment.capacity_bytes, deque()).append(segment.name)
        while self.warm_bytes > self._most_warm_bytes:
            self._cool(max(size for size, names in self._warm.items() if names))

    def _cool(self, size: int) -> None:
        self.commands.append(RemoveFile(self._warm[size].popleft()))
        self.warm_bytes -= size

    def _remove(self, segment: Segment) -> None:
        del self._segments[segment.name]
        if segment.state is not SegmentState.FREED:
            self.freed.append(segment.name)
        self.used_bytes -= segment.capacity_bytes
        self.commands.append(RemoveFile(segment.name))

    def sanity_check(self) -> None:
        """State the invariants."""
        assert self.used_bytes == sum(segment.capacity_bytes for segment in self._segments.values())
        assert self.warm_bytes == sum(size * len(names) for size, names in self._warm.items())
        assert self.warm_bytes <= self._most_warm_bytes
        assert self.used_bytes + self.warm_bytes <= self.capacity_bytes
        assert not {name for names in self._warm.values() for name in names} & {*self._segments}
        for segment in self._segments.values():
            assert segment.state is not SegmentState.FREED or segment.pinned(), "what nobody needs is reclaimed"
