"""Inquiries into what processes know: the node asks them, and answers when all have, or when the time is over.

A process that says nothing, or dies meanwhile, is named in the answer as ``silent``; the others' word is not held up
for longer than the asker wants to wait. At most ``MOST_INQUIRIES`` are under way. What is asked, and how the reports
become an answer, is a ``Topic``: ``holdings`` or ``recent_tasks``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from shoal_core.protocol.effects import Effect, Reply, Send
from shoal_core.protocol.errors import ServiceError
from shoal_core.protocol.ids import NodeId, ProcessId
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import ObjectsReported, Record, TasksReported
from shoal_core.protocol.scheduling import ListTasks
from shoal_core.protocol.storage import ListObjects

MOST_INQUIRIES = 16

Report = TypeVar("Report", ObjectsReported, TasksReported)


@dataclass(slots=True)
class Inquiry(Generic[Report]):
    """One asker's question, and what has been answered; ``processes`` says of what kind each that was asked is."""

    topic: Topic[Report]
    token: int
    most: int
    deadline: float
    processes: dict[ProcessId, str]
    reports: dict[ProcessId, Report] = field(default_factory=dict)
    gone: set[ProcessId] = field(default_factory=set)

    def is_over(self, now: float) -> bool:
        """Tell whether there is nothing more to wait for."""
        return now >= self.deadline or len(self.reports) + len(self.gone) == len(self.processes)

    def silent(self) -> list[ProcessId]:
        """Return who lives, as far as is known, and has not answered."""
        return [one for one in self.processes if one not in self.reports and one not in self.gone]


class Topic(ABC, Generic[Report]):
    """What may be asked about."""

    kind: type[Report]
    """What processes answer with."""

    @abstractmethod
    def question(self, inquiry: int, most: int) -> Record:
        """Return what a process is asked."""

    @abstractmethod
    def answer(self, inquiry: Inquiry[Report]) -> Message:
        """Return what the asker is told."""


class Inquiries:
    """All inquiries of one node that are under way. What is to be done is left in ``effects``."""

    def __init__(self, node_id: NodeId) -> None:
        self.effects: list[Effect] = []
        self._node_id = node_id
        self._open: dict[int, Inquiry[Any]] = {}
        self._drawn = 0

    def __len__(self) -> int:
        return len(self._open)

    @property
    def next_deadline(self) -> float:
        """When the first inquiry has waited long enough."""
        return min(inquiry.deadline for inquiry in self._open.values()) if self._open else math.inf

    def open(
        self,
        topic: Topic[Any],
        request: ListObjects | ListTasks,
        token: int,
        processes: dict[ProcessId, str],
        now: float,
    ) -> None:
        """Ask all processes for an asker, who is answered later; ``ServiceError`` where too many ask at once."""
        if len(self._open) >= MOST_INQUIRIES:
            raise ServiceError(f"node {self._node_id} is answering {len(self._open)} other questions; ask again")
        self._drawn += 1
        self._open[self._drawn] = Inquiry(topic, token, request.most, now + request.timeout_seconds, processes)
        question = topic.question(self._drawn, request.most)
        self.effects += [Send(process, question) for process in processes]
        self.tick(now)

    def reported(self, process: ProcessId, report: ObjectsReported | TasksReported, now: float) -> None:
        """A process has answered."""
        inquiry = self._open.get(report.inquiry)
        if inquiry is None or type(report) is not inquiry.topic.kind:
            return
        if process in inquiry.processes and process not in inquiry.gone:
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
                self.effects.append(Reply(inquiry.token, inquiry.topic.answer(inquiry)))
