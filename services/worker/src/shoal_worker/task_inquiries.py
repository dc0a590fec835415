"""Inquiries into how far a task is: the node asks the task's owner, and passes its answer on.

Only processes of this node are asked, whose death it sees; the others' nodes are asked by whoever wants to know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal_core.protocol.effects import Effect, Reply, Send
from shoal_core.protocol.errors import NotFoundError, RequestTimeoutError, ServiceError
from shoal_core.protocol.ids import ProcessId, TaskNumber, object_id_bytes
from shoal_core.protocol.records import ReportTask, TaskReported
from shoal_core.protocol.scheduling import ExplainTask, TaskStanding, TaskState

MOST_INQUIRIES = 1000


@dataclass(frozen=True, slots=True)
class TaskInquiry:
    """One asker's question."""

    token: int
    owner: ProcessId
    deadline: float


class TaskInquiries:
    """All inquiries about tasks that are under way at one node. What is to be done is left in ``effects``."""

    def __init__(self) -> None:
        self.effects: list[Effect] = []
        self._open: dict[int, TaskInquiry] = {}
        self._drawn = 0

    @property
    def next_deadline(self) -> float:
        """When the first inquiry has waited long enough."""
        return min(inquiry.deadline for inquiry in self._open.values()) if self._open else math.inf

    def open(self, request: ExplainTask, token: int, now: float) -> None:
        """Ask a task's owner for an asker, who is answered later; ``ServiceError`` where too many ask at once."""
        if len(self._open) >= MOST_INQUIRIES:
            raise ServiceError(f"{MOST_INQUIRIES} other questions about tasks are not answered yet; ask again")
        self._drawn += 1
        self._open[self._drawn] = TaskInquiry(token, request.owner, now + request.timeout_seconds)
        self.effects.append(Send(request.owner, ReportTask(self._drawn, TaskNumber(request.task))))

    def reported(self, process: ProcessId, report: TaskReported) -> None:
        """An owner has answered."""
        inquiry = self._open.get(report.inquiry)
        if inquiry is not None and inquiry.owner == process:
            del self._open[report.inquiry]
            self.effects.append(Reply(inquiry.token, _standing(report)))

    def process_died(self, process: ProcessId) -> None:
        """An owner will not answer any more."""
        for number, inquiry in list(self._open.items()):
            if inquiry.owner == process:
                del self._open[number]
                self.effects.append(Reply(inquiry.token, NotFoundError(f"the task's owner {process} has died")))

    def tick(self, now: float) -> None:
        """Answer whom there is nothing more to wait for."""
        for number, inquiry in list(self._open.items()):
            if now >= inquiry.deadline:
                del self._open[number]
                silent = RequestTimeoutError(f"the task's owner {inquiry.owner} does not answer")
                self.effects.append(Reply(inquiry.token, silent))


def _standing(report: TaskReported) -> TaskStanding:
    """Return what an owner has said; of a process that says what makes no sense, that it knows nothing."""
    try:
        state = TaskState(report.state)
        missing = [object_id_bytes(owner, key).hex() for owner, key in report.missing]
    except (ValueError, OverflowError):
        return TaskStanding(state=TaskState.NIL)
    return TaskStanding(
        state=state,
        name=report.name,
        key=report.key,
        before=report.before,
        leases=report.leases,
        process=report.process,
        actor=report.actor,
        missing=missing,
        missing_count=report.missing_count,
    )
