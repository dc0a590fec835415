"""What this node pulls: copies of other nodes' segments for its processes, and objects of drivers without a node.

A copy's life::

    QUEUED ──► WAITING (for its file) ──► ASKING (its home lends) ──► PULLING ──► HERE ── dropped, freed, home dead
       ▲                                    │                           │ │          ▲
       │────────────────────────────────────┼── (not offered any more) ─┘ │          │
       └─────────── (cannot be linked) ─────┼────────────────► LINKING ───┼──────────┘
                                            └─────────────────────────────┴──► failed: all who wait are told why

One copy is pulled however many processes wait for it; they are answered together. It belongs to nobody: unpinned, it is
the first thing that goes where room is needed. It waits for its own file like everything that needs room (see
``store``), unless nobody waits for it yet: what is pulled for a task that is still queued takes only what is free.
Its home remembers that it is here, and says when the object goes. What a driver without a node gives (``taken``) takes
the same way without ASKING, and is the driver's own afterwards. At most ``PULLS_AT_ONCE`` are pulled at a time, so that
what is in flight is bounded; others wait in order.

Each copy is tried to be *linked* first (see ``segments``): it waits for room, but makes no file, since its home's has
its bytes. That cannot be where the home runs on another kernel, whatever folders they share, or its folder does not lie
beside ours. The first copy from each such home finds that out: it begins anew, and is pulled like all others after it.

A segment whose pull fails is removed, never used again: the mover may still be writing into it. Where a pull ends
because what was lent is not offered (any more), that says nothing about the object, of which only its home knows: the
copy begins anew, and its home is asked once more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from shoal_core.protocol.effects import Answered, Ask, Effect, Reply, Send, Start
from shoal_core.protocol.errors import (
    BusError,
    DeclaredDeadError,
    NodeDiedError,
    NotFoundError,
    ObjectFetchTimedOutError,
    ServiceError,
    ShoalError,
    from_wire,
)
from shoal_core.protocol.ids import NodeId, PeerId, ProcessId
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import CopyDropped, SegmentUnpinned, SegmentWanted
from shoal_core.protocol.storage import LendSegment, PinSegment, SegmentGranted, SegmentLent, SegmentPinned, TakeObject
from shoal_core.protocol.subjects import Subjects
from shoal_worker.inputs import CancelPull, Pulled, PullSegment
from shoal_worker.objects.files import FileLinked
from shoal_worker.objects.pins import MOST_ENDED
from shoal_worker.objects.store import ObjectStore
from shoal_worker.objects.waiting import Incoming

PULLS_AT_ONCE = 4
MOST_PREFETCHED = 16
ASK_AGAIN_SECONDS = 0.2
ASK_SECONDS = 60.0
MOST_PULLS = 3


class CopyState(Enum):
    """How far a copy is in its life."""

    QUEUED = "queued"
    WAITING = "waiting"
    ASKING = "asking"
    LINKING = "linking"
    PULLING = "pulling"
    HERE = "here"


@dataclass(frozen=True, slots=True)
class AboutLoan:
    """The context of asking a home to lend."""

    name: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """A process that waits for a copy, to map it; or a driver, that waits until its object was taken."""

    process: ProcessId
    serial: int
    token: int


@dataclass(slots=True)
class Copy:
    """An object that comes or came from ``source``, which calls it ``origin``; ``name`` is its segment here.

    ``links``: it is to be linked rather than pulled.
    """

    source: PeerId
    origin: str
    size_bytes: int
    taken: TakeObject | None = None
    links: bool = False
    state: CopyState = CopyState.QUEUED
    incoming: Incoming | None = None
    name: str = ""
    serial: int = 0
    pulls: int = 0
    waiting: list[Waiting] = field(default_factory=list)
    ask_at: float | None = None
    ask_until: float = 0.0


class Copies:
    """All that one node pulls or has pulled. What is to be done is left in ``effects``."""

    def __init__(
        self, node_id: NodeId, store: ObjectStore, subjects: Subjects, is_dead: Callable[[PeerId], bool], boot_id: str
    ) -> None:
        self.effects: list[Effect] = []
        self._node_id = node_id
        self._store = store
        self._segments = store.segments
        self._subjects = subjects
        self._is_dead = is_dead
        self._boot_id = boot_id
        self._copies: dict[tuple[PeerId, str], Copy] = {}
        self._coming: dict[tuple[PeerId, str], Copy] = {}
        self._expected: dict[Incoming, Copy] = {}
        self._by_name: dict[str, Copy] = {}
        self._given_up: dict[ProcessId, dict[int, None]] = {}
        self._apart: set[PeerId] = set()
        """The living nodes whose files cannot be linked here."""
        self._serials = 0

    def __len__(self) -> int:
        return len(self._copies)

    def under_way(self) -> int:
        """Return how many objects are being pulled."""
        return len(self._coming)

    def homes(self) -> set[NodeId]:
        """Return the nodes that copies are of."""
        return {NodeId(copy.source) for copy in self._copies.values() if copy.taken is None}

    # ------------------------------------------------------------------------------- requests

    def pin(self, request: PinSegment, token: int) -> Message | None:
        """Pin a copy for a process; the answer comes later where it is not here yet."""
        if request.serial in self._given_up.get(request.process, ()):
            raise NotFoundError(f"pin {request.serial} of process {request.process} has ended before")
        copy = self._copies.get((request.home, request.segment))
        if copy is not None and copy.state is CopyState.HERE:
            self._segments.pin(copy.name, request.process, request.serial)
            return SegmentPinned(segment=copy.name, place=copy.name)
        if self._is_dead(request.home):
            raise _home_died(request.home)
        if copy is None:
            copy = self._enter(Copy(request.home, request.segment, request.size_bytes))
        copy.waiting.append(Waiting(request.process, request.serial, token))
        return None

    def want(self, wanted: SegmentWanted) -> None:
        """Pull what a queued task will read, if there is room: nothing has to go for it."""
        ahead = sum(not copy.waiting for copy in self._coming.values())
        if (wanted.home, wanted.segment) in self._copies or self._is_dead(wanted.home) or ahead >= MOST_PREFETCHED:
            return
        if self._store.has_room(wanted.size_bytes):
            self._enter(Copy(wanted.home, wanted.segment, wanted.size_bytes))

    def take(self, request: TakeObject, token: int) -> Message | None:
        """Pull an object from a driver into a segment that will be its own; asked again, the answer is the same."""
        copy = self._copies.get((request.process, request.stream))
        if copy is not None and copy.state is CopyState.HERE:
            return self._granted(copy)
        if copy is None:
            copy = self._enter(Copy(request.process, request.stream, request.size_bytes, taken=request))
        copy.waiting.append(Waiting(request.process, request.serial, token))
        return None

    def give_up(self, process: ProcessId, unpinned: SegmentUnpinned) -> None:
        """A process does not know whether its pin of a copy was heard: it is not to be held, now or later."""
        serials = self._given_up.setdefault(process, {})
        serials[unpinned.serial] = None
        if len(serials) > MOST_ENDED:
            del serials[next(iter(serials))]
        copy = self._copies.get((unpinned.home, unpinned.segment))
        if copy is not None:
            gone = [one for one in copy.waiting if (one.process, one.serial) == (process, unpinned.serial)]
            copy.waiting = [one for one in copy.waiting if one not in gone]
            error = NotFoundError(f"pin {unpinned.serial} of process {process} was given up")
            self.effects += [Reply(one.token, error) for one in gone]
            if gone:
                self._give_up_unwanted(copy)
        self._segments.unpin_anywhere(process, unpinned.serial)

    def _give_up_unwanted(self, copy: Copy) -> None:
        """Nobody waits any more for a copy that has no file yet: let others have the room."""
        if not copy.waiting and copy.state in (CopyState.QUEUED, CopyState.WAITING):
            self._fail(copy, NotFoundError("nobody waits for the copy any more"))

    # ------------------------------------------------------------------------------- the way of a copy

    def _enter(self, copy: Copy) -> Copy:
        self._copies[copy.source, copy.origin] = self._coming[copy.source, copy.origin] = copy
        return copy

    def begin(self, now: float) -> None:
        """Begin with those that wait in the queue, as many as may be pulled at once."""
        if not self._coming:
            return
        queued = [copy for copy in self._coming.values() if copy.state is CopyState.QUEUED]
        queued.sort(key=lambda copy: not copy.waiting)  # what somebody waits for before what a queued task will read
        free = PULLS_AT_ONCE - (len(self._coming) - len(queued))
        for copy in queued:
            if free <= 0:
                return
            if copy.waiting or self._store.has_room(copy.size_bytes):
                free -= self._expect(copy, now)
            else:
                self._fail(copy, NotFoundError("there is no room to pull what nobody waits for yet"))

    def _expect(self, copy: Copy, now: float) -> bool:
        """Let a copy wait for its file, or for room; False where it will never have one."""
        job = None if copy.taken is None else copy.taken.job_id
        copy.links = copy.taken is None and self._may_link(copy)
        try:
            copy.incoming = self._store.expect(
                copy.source, copy.size_bytes, job, is_copy=copy.taken is None, linked=copy.links, now=now
            )
        except ShoalError as error:
            self._fail(copy, error)
            return False
        copy.state = CopyState.WAITING
        self._expected[copy.incoming] = copy
        return True

    def _may_link(self, copy: Copy) -> bool:
        is_near = self._boot_id != "" and copy.source not in self._apart
        return is_near and not self._segments.is_shared(copy.size_bytes)

    def served(self, incoming: Incoming, error: ShoalError | None, now: float) -> None:
        """A copy has its file, or room; or there is none. Not of interest where the copy is given up by now."""
        copy = self._expected.pop(incoming, None)
        if copy is None:
            return
        copy.incoming = None
        if error is not None:
            self._fail(copy, error)
            return
        copy.name = incoming.name
        self._by_name[copy.name] = copy
        if copy.taken is not None:
            self._pull(copy, copy.taken.chunk_bytes)
        else:
            self._serials += 1
            copy.state, copy.serial, copy.ask_until = CopyState.ASKING, self._serials, now + ASK_SECONDS
            self._ask(copy)

    def _ask(self, copy: Copy) -> None:
        copy.ask_at = None
        request = LendSegment(
            puller=self._node_id,
            segment=copy.origin,
            serial=copy.serial,
            size_bytes=copy.size_bytes,
            boot_id=self._boot_id if copy.links else "",
        )
        subject = self._subjects.node_from_process(NodeId(copy.source), "lend")
        self.effects.append(Ask(subject, request, AboutLoan(copy.name)))

    def answered(self, answered: Answered, now: float) -> None:
        """The home of a copy lends it, or not; where it said nothing it is asked again, for a while."""
        copy = self._by_name.get(answered.context.name)
        if copy is None or copy.state is not CopyState.ASKING:
            return
        answer = answered.answer
        if isinstance(answer, SegmentLent) and not copy.links:
            self._pull(copy, answer.chunk_bytes)
        elif isinstance(answer, SegmentLent) and answer.linkable:
            copy.state = CopyState.LINKING
            self._segments.link(copy.name, NodeId(copy.source), copy.origin)
        elif isinstance(answer, SegmentLent):
            self._cannot_link(copy)
        elif isinstance(answer, BusError | ServiceError) and now < copy.ask_until:
            copy.ask_at = now + ASK_AGAIN_SECONDS
        elif isinstance(answer, BusError | ServiceError):
            text = f"node {copy.source}, where the object lies, did not answer for {ASK_SECONDS:g} s: {answer}"
            self._fail(copy, ObjectFetchTimedOutError(text))
        else:
            assert isinstance(answer, ShoalError)
            self._fail(copy, answer)

    def linked(self, linked: FileLinked) -> None:
        """A copy has its home's file, or cannot have it."""
        copy = self._by_name.get(linked.name)
        if copy is None or copy.state is not CopyState.LINKING:
            return
        if linked.error:
            self._cannot_link(copy)
        else:
            self._is_here(copy)

    def _cannot_link(self, copy: Copy) -> None:
        """Pull a copy, and all others of its home."""
        self._apart.add(copy.source)
        self._begin_anew(copy)

    def _pull(self, copy: Copy, chunk_bytes: int) -> None:
        copy.state = CopyState.PULLING
        copy.pulls += 1
        self.effects.append(Start(PullSegment(copy.name, copy.source, copy.origin, copy.size_bytes, chunk_bytes)))

    def pulled(self, pulled: Pulled) -> None:
        """A pull has ended."""
        copy = self._by_name.get(pulled.name)
        if copy is None or copy.state is not CopyState.PULLING:
            return
        if pulled.code:
            self._not_pulled(copy, pulled)
        else:
            self._is_here(copy)

    def _is_here(self, copy: Copy) -> None:
        owner = ProcessId(copy.source)
        copy.state = CopyState.HERE
        del self._coming[copy.source, copy.origin]
        waiting, copy.waiting = copy.waiting, []
        object_id = "" if copy.taken is None else copy.taken.object_id
        self._segments.seal(copy.name, owner, owner, object_id)
        if copy.taken is not None:
            self.effects += [Reply(one.token, self._granted(copy)) for one in waiting]
        else:
            self.effects.append(Send(copy.source, SegmentUnpinned(copy.origin, copy.serial)))
            for one in waiting:
                self.effects.append(Reply(one.token, self._pinned(copy, one)))

    def _not_pulled(self, copy: Copy, pulled: Pulled) -> None:
        error = from_wire(
            pulled.code, f"{copy.size_bytes:,} bytes could not be pulled from {copy.source}: {pulled.text}"
        )
        if copy.taken is not None or not isinstance(error, NotFoundError):
            self._fail(copy, error, cancel=False)
        elif copy.pulls == MOST_PULLS:
            self._fail(copy, ObjectFetchTimedOutError(f"{error}, {MOST_PULLS} times"), cancel=False)
        else:
            self._begin_anew(copy)

    def _begin_anew(self, copy: Copy) -> None:
        self._let_go(copy)
        copy.state, copy.name = CopyState.QUEUED, ""

    def _pinned(self, copy: Copy, one: Waiting) -> Message | ShoalError:
        try:
            self._segments.pin(copy.name, one.process, one.serial)
        except ShoalError as error:
            return error
        return SegmentPinned(segment=copy.name, place=copy.name)

    def _granted(self, copy: Copy) -> SegmentGranted:
        segment = self._segments.get(copy.name)
        assert segment is not None, "what was taken is known while its segment is"
        return SegmentGranted(segment=copy.name, place=copy.name, capacity_bytes=segment.capacity_bytes)

    # ------------------------------------------------------------------------------- ends

    def _fail(self, copy: Copy, error: ShoalError, *, cancel: bool = True) -> None:
        """A copy will not come: tell who waits, and leave nothing of it."""
        del self._copies[copy.source, copy.origin], self._coming[copy.source, copy.origin]
        self.effects += [Reply(one.token, error) for one in copy.waiting]
        if copy.incoming is not None:
            del self._expected[copy.incoming]
            self._store.withdraw(copy.incoming)
        if copy.state is CopyState.PULLING and cancel:
            self.effects.append(Start(CancelPull(copy.name)))
        self._let_go(copy)

    def _let_go(self, copy: Copy) -> None:
        """Drop the segment of a copy that has not come, and its loan."""
        if copy.name:
            del self._by_name[copy.name]
            self._segments.give_up(copy.name)
        if copy.taken is None and copy.serial and not self._is_dead(copy.source):
            self.effects.append(Send(copy.source, SegmentUnpinned(copy.origin, copy.serial)))
            self.effects.append(Send(copy.source, CopyDropped(copy.origin, copy.serial)))

    def freed(self, source: PeerId, origin: str) -> bool:
        """Whoever an object comes from needs it no more: it goes as soon as nobody maps it; tell whether it was known.

        A driver says so by its own name for the object where it never heard how its segment is called.
        """
        copy = self._copies.get((source, origin))
        if copy is None:
            return False
        if copy.state is CopyState.HERE:
            self._segments.free(copy.name, ProcessId(source))
        else:
            self._fail(copy, NotFoundError(f"{origin} of {source} was freed while it was pulled"))
        return True

    def gone(self, name: str) -> None:
        """A segment is no object's any more: freed, dropped or removed."""
        copy = self._by_name.pop(name, None)
        if copy is None:
            return
        del self._copies[copy.source, copy.origin]
        if copy.taken is None and not self._is_dead(copy.source):
            self.effects.append(Send(copy.source, CopyDropped(copy.origin, copy.serial)))

    def peer_died(self, peer: PeerId) -> None:
        """A home, a driver that gives, or a process that waits, is dead."""
        for copy in list(self._coming.values()):
            if copy.source == peer:
                self._fail(copy, _home_died(peer))
        error = DeclaredDeadError(f"process {peer} has died")
        for copy in list(self._coming.values()):
            gone = [one for one in copy.waiting if one.process == peer]
            copy.waiting = [one for one in copy.waiting if one.process != peer]
            self.effects += [Reply(one.token, error) for one in gone]
            if gone:
                self._give_up_unwanted(copy)
        self._given_up.pop(ProcessId(peer), None)
        self._apart.discard(peer)

    def tick(self, now: float) -> None:
        """Ask again where it is time."""
        for copy in list(self._coming.values()):
            if copy.ask_at is not None and now >= copy.ask_at:
                self._ask(copy)

    def wake_at(self) -> float:
        """Return when ``tick`` has something to do."""
        if not self._coming:
            return math.inf
        return min((copy.ask_at for copy in self._coming.values() if copy.ask_at is not None), default=math.inf)

    def sanity_check(self) -> None:
        """State the invariants."""
        for copy in self._copies.values():
            assert (copy.state in (CopyState.QUEUED, CopyState.WAITING)) == (not copy.name)
            assert (copy.state is CopyState.WAITING) == (copy.incoming is not None)
            assert not copy.name or self._by_name[copy.name] is copy
            assert not copy.name or self._segments.get(copy.name) is not None
            assert copy.state is not CopyState.HERE or not copy.waiting, "nobody waits for what is here"
        coming = {key for key, copy in self._copies.items() if copy.state is not CopyState.HERE}
        assert {*self._coming} == coming
        assert {*self._expected} == {copy.incoming for copy in self._coming.values() if copy.incoming is not None}
        assert len(self._by_name) == sum(bool(copy.name) for copy in self._copies.values())


def _home_died(home: PeerId) -> NodeDiedError:
    return NodeDiedError(f"{home}, where the object lay, has died")
