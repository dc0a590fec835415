"""Who holds which object on this node: what its processes tell, and what they have mapped of its shared memory."""

from __future__ import annotations

from collections.abc import Iterable

from shoal_core.protocol.ids import NodeId, ProcessId, object_id_bytes
from shoal_core.protocol.records import KnownObject, ObjectsReported, ReportObjects
from shoal_core.protocol.storage import NodeObjects, ObjectHolding, ProcessHoldings, StoreUse
from shoal_worker.inquiries import Inquiry, Topic
from shoal_worker.objects.segments import SegmentTable

PINNED_IN_MEMORY = "PINNED_IN_MEMORY"
WORKER, DRIVER = "WORKER", "DRIVER"


class Holdings(Topic[ObjectsReported]):
    """The topic of ``ListObjects``."""

    kind = ObjectsReported

    def __init__(self, node_id: NodeId, segments: SegmentTable) -> None:
        self._node_id = node_id
        self._segments = segments

    def question(self, inquiry: int, most: int) -> ReportObjects:
        """Return what a process is asked."""
        return ReportObjects(inquiry, most)

    def answer(self, inquiry: Inquiry[ObjectsReported]) -> NodeObjects:
        """Put together what the processes hold, and what the node knows of its shared memory."""
        processes = [
            ProcessHoldings(
                process_id=process,
                pid=report.pid,
                kind=inquiry.processes[process],
                job_id=report.job,
                objects=report.count,
                inline_bytes=report.inline_bytes,
            )
            for process, report in inquiry.reports.items()
        ]
        holdings = [*self._reported(inquiry.reports), *self._only_mapped(inquiry)]
        holdings.sort(key=lambda one: (-one.size_bytes, one.object_id, one.process_id))
        return NodeObjects(
            node_id=self._node_id,
            store=self._store_use(),
            processes=processes,
            objects=holdings[: inquiry.most],
            silent=inquiry.silent(),
        )

    def _reported(self, reports: dict[ProcessId, ObjectsReported]) -> Iterable[ObjectHolding]:
        for process, report in reports.items():
            for known in report.objects:
                pinned = known.node == self._node_id and self._pins(known.segment, process)
                yield ObjectHolding(
                    process_id=process,
                    object_id=_object_id(known),
                    owner=known.owner,
                    size_bytes=known.size_bytes,
                    status=known.status,
                    reasons=[*known.reasons, *[PINNED_IN_MEMORY] * pinned],
                    borrowers=known.borrowers,
                    node=known.node,
                    segment=known.segment,
                )

    def _only_mapped(self, inquiry: Inquiry[ObjectsReported]) -> Iterable[ObjectHolding]:
        """Yield what processes have mapped without knowing the object: arguments, and objects that are gone."""
        names: dict[str, KnownObject] = {}
        told: set[tuple[ProcessId, str]] = set()
        for process, report in inquiry.reports.items():
            for known in report.objects:
                if known.node == self._node_id:
                    names[known.segment] = known
                    told.add((process, known.segment))
        for segment in self._segments:
            known_as = names.get(segment.name)
            for process, pins in segment.pins.items():
                if pins.held and (process, segment.name) not in told:
                    yield ObjectHolding(
                        process_id=process,
                        object_id="" if known_as is None else _object_id(known_as),
                        owner="" if known_as is None else known_as.owner,
                        size_bytes=segment.capacity_bytes if known_as is None else known_as.size_bytes,
                        status="NIL",
                        reasons=[PINNED_IN_MEMORY],
                        node=self._node_id,
                        segment=segment.name,
                    )

    def _pins(self, name: str, process: ProcessId) -> bool:
        segment = self._segments.get(name)
        pins = None if segment is None else segment.pins.get(process)
        return pins is not None and bool(pins.held)

    def _store_use(self) -> StoreUse:
        table = self._segments
        return StoreUse(
            capacity_bytes=table.capacity_bytes,
            used_bytes=table.used_bytes,
            pinned_bytes=sum(segment.capacity_bytes for segment in table if segment.pinned()),
            warm_bytes=table.warm_bytes,
            segments=len(table),
        )


def _object_id(known: KnownObject) -> str:
    """Return the id of an object; empty where a process tells of what can be none."""
    try:
        return object_id_bytes(known.owner, known.key).hex()
    except (ValueError, OverflowError):
        return ""
