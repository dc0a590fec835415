"""The home's side of copies: which segments of this node are lent to pullers, and which nodes have copies of them.

A loan pins a segment for its puller, so that the chunks that are sent are those of the object. It ends when the puller
says so, or is dead. A node that has pulled keeps a copy beyond that: it is told when the object goes, unless it says
before that it has dropped the copy.
"""

from __future__ import annotations

from shoal_core.protocol.effects import Effect, Send, Start
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId
from shoal_core.protocol.messages import LendSegment, SegmentLent
from shoal_core.protocol.records import SegmentFreed
from shoal_worker.inputs import OfferSegment, WithdrawSegment
from shoal_worker.segments import SegmentTable


class Loans:
    """All loans of one node. What is to be done is left in ``effects``."""

    def __init__(self, segments: SegmentTable, chunk_bytes: int) -> None:
        self.effects: list[Effect] = []
        self._segments = segments
        self._chunk_bytes = chunk_bytes
        self._lent: dict[str, set[tuple[PeerId, int]]] = {}
        self._holders: dict[str, set[NodeId]] = {}
        self._jobs: dict[PeerId, JobId] = {}

    def __len__(self) -> int:
        return len(self._lent)

    def holders(self) -> set[NodeId]:
        """Return the nodes that have copies or pull them."""
        return {node for nodes in self._holders.values() for node in nodes}

    def jobs(self) -> set[JobId]:
        """Return the jobs of the drivers that pull."""
        return set(self._jobs.values())

    def lend(self, request: LendSegment) -> SegmentLent:
        """Keep a segment for a puller, and offer its chunks; raises ``NotFoundError`` where the object is gone."""
        segment = self._segments.get(request.segment)
        if segment is not None and request.size_bytes > segment.capacity_bytes:
            raise NotFoundError(f"segment {request.segment} is smaller than {request.size_bytes:,} bytes")
        self._segments.pin(request.segment, ProcessId(request.puller), request.serial)
        lent = self._lent.setdefault(request.segment, set())
        if not lent:
            self.effects.append(Start(OfferSegment(request.segment, request.size_bytes, self._chunk_bytes)))
        lent.add((request.puller, request.serial))
        if request.job_id:
            self._jobs[request.puller] = request.job_id
        else:
            self._holders.setdefault(request.segment, set()).add(NodeId(request.puller))
        return SegmentLent(chunk_bytes=self._chunk_bytes)

    def ended(self, puller: PeerId, segment: str, serial: int) -> None:
        """A loan has ended, by the word of the puller."""
        lent = self._lent.get(segment)
        if lent is None or (puller, serial) not in lent:
            return
        lent.discard((puller, serial))
        if not lent:
            del self._lent[segment]
            self.effects.append(Start(WithdrawSegment(segment)))
        if puller in self._jobs and not any(peer == puller for pullers in self._lent.values() for peer, _ in pullers):
            del self._jobs[puller]

    def dropped(self, holder: NodeId, segment: str) -> None:
        """A node has no copy any more."""
        holders = self._holders.get(segment)
        if holders is not None:
            holders.discard(holder)
            if not holders:
                del self._holders[segment]

    def freed(self, segment: str) -> None:
        """An object has gone: so do its copies."""
        for holder in sorted(self._holders.pop(segment, ())):
            self.effects.append(Send(holder, SegmentFreed(segment)))

    def peer_died(self, peer: PeerId) -> None:
        """A puller is dead; its pins are released by whoever says so."""
        for segment, lent in list(self._lent.items()):
            for puller, serial in sorted(lent):
                if puller == peer:
                    self.ended(puller, segment, serial)
        for segment in list(self._holders):
            self.dropped(NodeId(peer), segment)
        self._jobs.pop(peer, None)

    def sanity_check(self) -> None:
        """State the invariants."""
        for name, lent in self._lent.items():
            segment = self._segments.get(name)
            assert lent, "what is lent is lent to somebody"
            assert segment is not None, "what is lent is kept"
            for puller, serial in lent:
                assert serial in segment.pins[ProcessId(puller)].held
