"""The home's side of copies: which segments of this node are lent to pullers, and which nodes have copies of them.

A loan pins a segment for its puller, so that it stays where it is until it is pulled; one that was spilled comes back
first, and is offered then. It ends when the puller says so, or is dead. A node that has pulled keeps a copy beyond
that: it is told when the object goes, unless it says before that it has dropped the copy. Each copy is known by the
serial of its loan, since what is said of one may be overtaken by the request for the next.

What is lent to be linked (see ``segments``) is not offered to be pulled.
"""

from __future__ import annotations

from shoal_core.protocol.effects import Effect, Send, Start
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId
from shoal_core.protocol.places import is_part
from shoal_core.protocol.records import SegmentFreed
from shoal_core.protocol.storage import LendSegment, SegmentLent
from shoal_worker.inputs import OfferSegment, WithdrawSegment
from shoal_worker.objects.segments import Segment, SegmentTable


class Loans:
    """All loans of one node. What is to be done is left in ``effects``."""

    def __init__(self, segments: SegmentTable, chunk_bytes: int, boot_id: str) -> None:
        self.effects: list[Effect] = []
        self._boot_id = boot_id
        self._segments = segments
        self._chunk_bytes = chunk_bytes
        self._lent: dict[str, set[tuple[PeerId, int]]] = {}
        self._holders: dict[str, dict[NodeId, int]] = {}
        self._pulled: set[str] = set()
        """What is to be offered, once it lies in memory."""
        self._offered: set[str] = set()
        self._jobs: dict[PeerId, JobId] = {}

    def __len__(self) -> int:
        return len(self._lent)

    def holders(self) -> set[NodeId]:
        """Return the nodes that have copies or pull them."""
        return {node for nodes in self._holders.values() for node in nodes}

    def jobs(self) -> set[JobId]:
        """Return the jobs of the drivers that pull."""
        return set(self._jobs.values())

    def lend(self, request: LendSegment) -> tuple[Segment, SegmentLent]:
        """Keep a segment for a puller; return it, and what the puller is told once it lies in memory.

        Raises ``NotFoundError`` where the object is gone.
        """
        segment = self._segments.get(request.segment)
        if segment is not None and request.size_bytes != segment.size_bytes:
            raise NotFoundError(f"segment {segment.name} has {segment.size_bytes:,} bytes, not {request.size_bytes:,}")
        segment = self._segments.pin(request.segment, ProcessId(request.puller), request.serial)
        lent = self._lent.setdefault(segment.name, set())
        lent.add((request.puller, request.serial))
        linkable = request.boot_id != "" and request.boot_id == self._boot_id and not is_part(segment.place)
        if linkable:
            segment.lent_to_link = True
        else:
            self._pulled.add(segment.name)
            self._offer(segment)
        if request.job_id:
            self._jobs[request.puller] = request.job_id
        else:
            holders = self._holders.setdefault(segment.name, {})
            holder = NodeId(request.puller)
            holders[holder] = max(request.serial, holders.get(holder, 0))
        return segment, SegmentLent(chunk_bytes=self._chunk_bytes, linkable=linkable)

    def returned(self, name: str) -> None:
        """A segment lies in memory again: who waited for it can pull it."""
        segment = self._segments.get(name)
        if name in self._pulled and segment is not None:
            self._offer(segment)

    def _offer(self, segment: Segment) -> None:
        if segment.in_memory() and segment.name not in self._offered:
            self._offered.add(segment.name)
            self.effects.append(Start(OfferSegment(segment.name, segment.place, segment.size_bytes, self._chunk_bytes)))

    def _withdraw(self, name: str) -> None:
        del self._lent[name]
        self._pulled.discard(name)
        if name in self._offered:
            self._offered.remove(name)
            self.effects.append(Start(WithdrawSegment(name)))

    def ended(self, puller: PeerId, segment: str, serial: int) -> None:
        """A loan has ended, by the word of the puller."""
        lent = self._lent.get(segment)
        if lent is None or (puller, serial) not in lent:
            return
        lent.discard((puller, serial))
        if not lent:
            self._withdraw(segment)
        if puller in self._jobs and not any(peer == puller for pullers in self._lent.values() for peer, _ in pullers):
            del self._jobs[puller]

    def dropped(self, holder: NodeId, segment: str, serial: int) -> None:
        """A node has no copy any more by this loan."""
        holders = self._holders.get(segment, {})
        if holder in holders and holders[holder] <= serial:
            self._forget(holder, segment)

    def _forget(self, holder: NodeId, segment: str) -> None:
        del self._holders[segment][holder]
        if not self._holders[segment]:
            del self._holders[segment]

    def gone(self, segment: str) -> None:
        """An object has gone: so do its copies; and where its file was removed, nothing is lent any more."""
        for holder in sorted(self._holders.pop(segment, ())):
            self.effects.append(Send(holder, SegmentFreed(segment)))
        if segment in self._lent and self._segments.get(segment) is None:
            for puller, serial in sorted(self._lent[segment]):
                self.ended(puller, segment, serial)

    def peer_died(self, peer: PeerId) -> None:
        """A puller is dead; its pins are released by whoever says so."""
        for segment, lent in list(self._lent.items()):
            for puller, serial in sorted(lent):
                if puller == peer:
                    self.ended(puller, segment, serial)
        for segment in [segment for segment, holders in self._holders.items() if peer in holders]:
            self._forget(NodeId(peer), segment)
        self._jobs.pop(peer, None)

    def sanity_check(self) -> None:
        """State the invariants."""
        for name, lent in self._lent.items():
            segment = self._segments.get(name)
            assert lent, "what is lent is lent to somebody"
            assert segment is not None, "what is lent is kept"
            for puller, serial in lent:
                assert serial in segment.pins[ProcessId(puller)].held
        assert self._offered <= self._pulled <= {*self._lent}
        for name in self._holders:
            assert self._segments.get(name) is not None, "who has a copy is told when the object goes"
