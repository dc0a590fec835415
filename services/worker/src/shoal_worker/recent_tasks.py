"""Which tasks the processes of this node own, run and have run lately: what they tell, and what those left that ended.

Of what has ended at most ``MOST_LEFT`` are kept of processes that have left, and nothing of a job that is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.messages import MOST_LISTED_TASKS, NodeTasks, TaskDescription, TaskState
from shoal_core.protocol.records import KnownTask, ReportTasks, TasksReported
from shoal_worker.inquiries import Inquiry, Topic

MOST_LEFT = MOST_LISTED_TASKS
ENDED = (TaskState.FINISHED, TaskState.FAILED)


@dataclass(frozen=True, slots=True)
class Left:
    """A task that a process had run that has left."""

    process: ProcessId
    pid: int
    job: JobId
    task: KnownTask


class RecentTasks(Topic[TasksReported]):
    """The topic of ``ListTasks``."""

    kind = TasksReported

    def __init__(self, node_id: NodeId) -> None:
        self._node_id = node_id
        self._left: deque[Left] = deque(maxlen=MOST_LEFT)

    def __len__(self) -> int:
        return len(self._left)

    def left(self, process: ProcessId, report: TasksReported) -> None:
        """A process leaves, and says what it has run, the newest first."""
        self._left += [Left(process, report.pid, report.job, task) for task in reversed(report.tasks)]

    def job_ended(self, job: JobId) -> None:
        """Forget what belonged to a job that is over."""
        self._left = deque((one for one in self._left if one.job != job), maxlen=MOST_LEFT)

    def question(self, inquiry: int, most: int) -> ReportTasks:
        """Return what a process is asked."""
        return ReportTasks(inquiry, most)

    def answer(self, inquiry: Inquiry[TasksReported]) -> NodeTasks:
        """Put together what the processes know: all that runs, and of the rest as much of either kind as there is."""
        told = list(self._told(inquiry.reports))
        running = [one for one in told if one.state is TaskState.RUNNING]
        ended = [one for one in told if one.state in ENDED]
        ended.sort(key=lambda one: -one.began_at)
        waiting = [one for one in told if one.state is not TaskState.RUNNING and one.state not in ENDED]
        room = max(0, inquiry.most - len(running))
        share = max(room // 2, room - len(waiting))
        tasks = [*running, *ended[:share]]
        tasks += waiting[: max(0, inquiry.most - len(tasks))]
        return NodeTasks(node_id=self._node_id, tasks=tasks[: inquiry.most], silent=inquiry.silent())

    def _told(self, reports: dict[ProcessId, TasksReported]) -> Iterable[TaskDescription]:
        for process, report in reports.items():
            for task in report.tasks:
                yield from _described(process, report.pid, report.job, task)
        for one in self._left:
            yield from _described(one.process, one.pid, one.job, one.task)


def _described(process: ProcessId, pid: int, job: JobId, task: KnownTask) -> list[TaskDescription]:
    """Return the description of a task; none where a process tells of what can be none."""
    try:
        state = TaskState(task.state)
    except ValueError:
        return []
    description = TaskDescription.model_construct(
        process_id=process,
        pid=pid,
        job_id=job,
        owner=task.owner or (process if task.number else ""),
        number=task.number,
        attempt=task.attempt,
        name=task.name,
        state=state,
        actor=task.actor,
        began_at=task.began_at,
        seconds=task.seconds,
        code=task.code,
        text=task.text,
    )
    return [description]
