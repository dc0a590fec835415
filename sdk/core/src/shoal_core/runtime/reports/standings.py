"""What a process tells of a task of its own that somebody asks about: how far it is, and what it waits for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shoal_core.protocol.ids import ObjectKey, PeerId, ProcessId
from shoal_core.protocol.records import ReportTask, TaskReported
from shoal_core.protocol.scheduling import MOST_NAMED, TaskState
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.submission import PendingTask, SchedulingKey


class Standings:
    """Answers ``ReportTask`` for one process (I/O thread only)."""

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        reactor.records_by_type[ReportTask] = self._report

    def _report(self, node: PeerId, request: ReportTask) -> None:
        self._reactor.send(node, self.report(request))

    def report(self, request: ReportTask) -> TaskReported:
        """Say how far a task is."""
        task = self._reactor.tasks.get(request.task)
        if task is None:
            return TaskReported(request.inquiry, TaskState.NIL.value)
        report = TaskReported(request.inquiry, TaskState.SUBMITTED_TO_WORKER.value, task.wire.name)
        if task.unresolved:
            missing = _missing(task.dependencies)
            report.state = TaskState.PENDING_ARGS_AVAIL.value
            report.missing, report.missing_count = missing[:MOST_NAMED], len(missing)
        if isinstance(task, PendingCall):
            report.actor = task.actor
        elif not task.unresolved:
            _place(task, task.key, report)
        return report


def _place(task: PendingTask, key: SchedulingKey, report: TaskReported) -> None:
    """Fill in where a task is: in the queue of its key, or at a worker process."""
    report.leases = len(key.leases)
    for before, queued in enumerate(key.queue):
        if queued is task:
            report.state, report.key, report.before = TaskState.PENDING_NODE_ASSIGNMENT.value, key.index, before
            return
    for lease in key.leases.values():
        if task.wire.number in lease.in_flight:
            report.process = lease.worker
            report.before = [*lease.in_flight].index(task.wire.number)


def _missing(references: Sequence[Any]) -> list[tuple[ProcessId, ObjectKey]]:
    """Return the objects that are not ready."""
    states = dict.fromkeys(reference._state for reference in references if reference._state.value is None)
    return [(state.owner, state.key) for state in states]
