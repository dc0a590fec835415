"""Inquiries into who holds what: the node asks its processes, and answers when all have, or when the time is over.

A process that says nothing, or dies meanwhile, is named in the answer as ``silent``; the others' word is not held up
for longer than the asker wants to wait. At most ``MOST_INQUIRIES`` are under way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal_core.protocol.effects import Effect, Reply, Send
from shoal_core.protocol.errors import ServiceError
from shoal_core.protocol.ids import NodeId, ProcessId, object_id_bytes
from shoal_core.protocol.messages import ListObjects, NodeObjects, ObjectHolding, ProcessHoldings, StoreUse
from shoal_core.protocol.records import KnownObject, ObjectsReported, ReportObjects
from shoal_worker.segments import SegmentTable

MOST_INQUIRIES = 16
PINNED_IN_MEMORY = "PINNED_IN_MEMORY"
WORKER, DRIVER = "WORKER", "DRIVER"


@dataclass(slots=True)
class Inquiry:
    """One asker's question, and what has been answered; ``processes`` says of what kind each that was asked is."""

    token: int
    most: int
    deadline: float
    processes: dict[ProcessId, str]
    reports: dict[ProcessId, ObjectsReported] = field(default_factory=dict)
    gone: set[ProcessId] = field(default_factory=set)

    def is_over(self, now: float) -> bool:
        """Tell whether there is nothing more to wait for."""
        return now >= self.deadline or len(self.reports) + len(self.gone) == len(self.processes)


class Inquiries:
    """All inquiries of one node that are under way. What is to be done is left in ``effects``."""

    def __init__(self, node_id: NodeId, segments: SegmentTable) -> None:
        self.effects: list[Effect] = []
        self._node_id = node_id
        self._segments = segments
        self._open: dict[int, Inquiry] = {}
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def next_deadline(self) -> float:
        """When the first inquiry has waited long enough."""
        return min(inquiry.deadline for inquiry in self._open.values()) if self._open else math.inf

    def open(self, request: ListObjects, token: int, processes: dict[ProcessId, str], now: float) -> None:
        """Ask all processes for an asker, who is answered later; ``ServiceError`` where too many ask at once."""
        if len(self._open) >= MOST_INQUIRIES:
            raise ServiceError(
                f"node {self._node_id} is answering {len(self._open)} other questions about its objects; ask again"
            )
        self._drawn += 1
        self._open[self._drawn] = Inquiry(token, request.most, now + request.timeout_seconds, processes)
        report = ReportObjects(self._drawn, request.most)
        self.effects += [Send(process, report) for process in processes]
        self.tick(now)

    def reported(self, process: ProcessId, report: ObjectsReported, now: float) -> None:
        """A process has answered."""
        inquiry = self._open.get(report.inquiry)
        if inquiry is not None and process in inquiry.processes and process not in inquiry.gone:
            inquiry.reports[process] = report
            self.tick(now)

    def process_died(self, process: ProcessId, now: float) -> None:
        """A process will not answer any more; it holds nothing, either."""
        for inquiry in self._open.values():
            if process in inquiry.processes and process not in inquiry.reports:
                inquiry.gone.add(process)
        self.tick(now)

    def tick(self, now: float) -> None:
        """Answer whom there is nothing more to wait for."""
        for number, inquiry in list(self._open.items()):
            if inquiry.is_over(now):
                del self._open[number]
                self.effects.append(Reply(inquiry.token, self._answer(inquiry)))

    def _answer(self, inquiry: Inquiry) -> NodeObjects:
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
            silent=[one for one in inquiry.processes if one not in inquiry.reports and one not in inquiry.gone],
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

    def _only_mapped(self, inquiry: Inquiry) -> Iterable[ObjectHolding]:
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
