"""Which tasks the processes of this node own, run and have run lately: what they tell, and what those left that ended.

Of processes that have left, the last ``MOST_LEFT`` tasks that have ended are kept, also where their job is over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec

from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.records import KnownTask, ReportTasks, TasksReported
from shoal_core.protocol.scheduling import MOST_LISTED_TASKS, NodeTasks, TaskDescription, TaskState
from shoal_worker.inquiries import Inquiry, Topic

MOST_LEFT = MOST_LISTED_TASKS
MOST_BYTES = 900 * 1024
"""An answer is one message of the broker's, with what there is in it beside names and texts counted in."""
FIXED_BYTES = 350
RUNNING, ENDED = TaskState.RUNNING.value, (TaskState.FINISHED.value, TaskState.FAILED.value)
WAITING = {state.value for state in TaskState} - {RUNNING, *ENDED, TaskState.NIL.value}


@dataclass(frozen=True, slots=True)
class Told:
    """A task, and the process that told of it."""

    process: ProcessId
    pid: int
    job: JobId
    task: KnownTask


class RecentTasks(Topic[TasksReported]):
    """The topic of ``ListTasks``."""

    kind = TasksReported

    def __init__(self, node_id: NodeId) -> None:
        self._node_id = node_id
        self._left: deque[Told] = deque(maxlen=MOST_LEFT)

    def __len__(self) -> int:
        return len(self._left)

    def left(self, process: ProcessId, report: TasksReported) -> None:
        """A process leaves, and says what it has run, the newest first."""
        self._left += [Told(process, report.pid, report.job, task) for task in reversed(report.tasks)]

    def question(self, inquiry: int, most: int) -> ReportTasks:
        """Return what a process is asked."""
        return ReportTasks(inquiry, most)

    def answer(self, inquiry: Inquiry[TasksReported]) -> NodeTasks:
        """Put together what the processes know: all that runs, and of the rest as much of either kind as there is.

        What is in no state that a task can be in, no process can mean.
        """
        told = [
            Told(process, report.pid, report.job, task)
            for process, report in inquiry.reports.items()
            for task in report.tasks
        ]
        told += self._left
        running = [one for one in told if one.task.state == RUNNING]
        ended = sorted((one for one in told if one.task.state in ENDED), key=lambda one: -one.task.began_at)
        waiting = [one for one in told if one.task.state in WAITING]
        room = max(0, inquiry.most - len(running))
        share = max(room // 2, room - len(waiting))
        chosen = [*running, *ended[:share]]
        chosen += waiting[: max(0, inquiry.most - len(chosen))]
        tasks = list(_as_many_as_fit(chosen[: inquiry.most]))
        return NodeTasks(node_id=self._node_id, tasks=tasks, silent=inquiry.silent())


def _of_any_length(task: KnownTask) -> tuple[object, ...]:
    about = (task.function, task.parent, task.resources, task.group)
    return (task.name, task.text, task.code, task.owner, task.actor, *about)


def _as_many_as_fit(chosen: Iterable[Told]) -> Iterator[TaskDescription]:
    left = MOST_BYTES
    for one in chosen:
        task = one.task
        left -= FIXED_BYTES + len(msgspec.json.encode(_of_any_length(task)))
        if left < 0:
            return
        yield TaskDescription.model_construct(
            process_id=one.process,
            pid=one.pid,
            job_id=one.job,
            owner=task.owner or (one.process if task.number else ""),
            number=task.number,
            attempt=task.attempt,
            name=task.name,
            state=TaskState(task.state),
            actor=task.actor,
            began_at=task.began_at,
            ended_at=task.ended_at,
            code=task.code,
            text=task.text,
            function=task.function,
            created_at=task.created_at,
            parent=task.parent,
            resources=task.resources,
            group=task.group,
        )
