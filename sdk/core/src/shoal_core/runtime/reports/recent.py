"""What a process tells of tasks: those of its own that have not ended, those that run here, and the last that ended.

Who runs a task knows best when it began and how it ended; its owner knows what has not been begun, and what ended
without being run to its end. Both tell what they know, and whoever asked puts it together. Noting a task is on the hot
path of whoever runs it: a tuple on a bounded list. A process that leaves in good order leaves what it has run with its
node; of one that is killed that is lost, and only its tasks' owner can tell of them.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from shoal_core.protocol.ids import ActorId, NodeId, PeerId, ProcessId, TaskNumber
from shoal_core.protocol.records import Failed, KnownTask, ReportTasks, TasksReported
from shoal_core.protocol.scheduling import TaskState
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.submission import PendingTask
from shoal_core.runtime.worker.work import Accepted, Ended

MOST_REMEMBERED = 1000
MOST_TEXT = 100
"""So many characters of a name, and of a line of an error's text, are told."""
TRACEBACK = "Traceback (most recent call last)"

OWN = ProcessId("")
"""The owner of a task that is the reporting process's own."""

Error = tuple[str, str]
"""The code and the text of an error."""
Ran = tuple[TaskNumber, int, ProcessId, str, float, float, Error | None]
"""Number, attempt, owner, name, when it began (``perf_counter``; 0: it did not), for how many seconds it ran, error."""


class Recent:
    """Answers ``ReportTasks`` for one process (I/O thread only).

    ``running`` returns what was given to this process to be run; ``actor`` is whose process it is, "" where no actor's.
    """

    def __init__(self, reactor: Reactor) -> None:
        self.running: Callable[[], Iterable[Accepted]] = lambda: ()
        self.actor = ActorId("")
        self._reactor = reactor
        self._ran: deque[Ran] = deque(maxlen=MOST_REMEMBERED)
        self._failed: deque[KnownTask] = deque(maxlen=MOST_REMEMBERED)
        reactor.records_by_type[ReportTasks] = self._report
        reactor.unrun = self._note_unrun

    # ------------------------------------------------------------------------------- noting

    def ran(self, ended: Ended) -> None:
        """A task has ended here; one that goes back to its owner, since it could not be begun, has not."""
        if not ended.missing:
            accepted, values = ended.accepted, ended.values
            task = accepted.task
            error = _error(values[0]) if values and type(values[0]) is Failed else None
            self._ran.append(
                (task.number, task.attempt, accepted.owner, task.name, accepted.began_at, ended.seconds, error)
            )

    def made(self, name: str, incarnation: int, began_at: float, error: str) -> None:
        """An actor was made here, or could not be."""
        seconds = time.perf_counter() - began_at
        told = ("actor_died", _told(error)) if error else None
        self._ran.append((TaskNumber(0), incarnation, OWN, name, began_at, seconds, told))

    def _note_unrun(self, task: PendingTask | PendingCall, failed: Failed) -> None:
        """A task of this process has ended of which nobody can tell who ran it to its end."""
        self._failed.append(_owned(task, TaskState.FAILED, failed))

    # ------------------------------------------------------------------------------- telling

    def _report(self, node: PeerId, request: ReportTasks) -> None:
        self._reactor.send(node, self.report(request))

    def leave(self, node: NodeId) -> None:
        """Leave what was run here with the node, as this process ends."""
        if self._ran:
            tasks = self._ended(MOST_REMEMBERED)
            self._reactor.send(node, TasksReported(0, os.getpid(), self._reactor.job, tasks))

    def report(self, request: ReportTasks) -> TasksReported:
        """Tell what runs, and of what has ended and what waits about the same number, the newest first."""
        tasks = self._running()
        ended = [*self._ended(request.most // 2), *islice(reversed(self._failed), request.most // 4)]
        tasks += ended
        tasks += self._pending(max(0, request.most - len(tasks)))
        return TasksReported(request.inquiry, os.getpid(), self._reactor.job, tasks[: request.most])

    def _running(self) -> list[KnownTask]:
        offset = time.time() - time.perf_counter()
        return [
            KnownTask(
                accepted.owner,
                accepted.task.number,
                accepted.task.attempt,
                accepted.task.name[:MOST_TEXT],
                TaskState.RUNNING.value,
                self.actor,
                offset + accepted.began_at,
            )
            for accepted in self.running()
            if accepted.began_at
        ]

    def _ended(self, most: int) -> list[KnownTask]:
        offset = time.time() - time.perf_counter()
        return [
            KnownTask(
                owner,
                number,
                attempt,
                name[:MOST_TEXT],
                (TaskState.FINISHED if error is None else TaskState.FAILED).value,
                self.actor,
                offset + began_at if began_at else 0.0,
                seconds,
                *(error or ("", "")),
            )
            for number, attempt, owner, name, began_at, seconds, error in islice(reversed(self._ran), most)
        ]

    def _pending(self, most: int) -> list[KnownTask]:
        queued = {id(task) for key in self._reactor.submission.keys.values() for task in key.queue}

        def state(task: PendingTask | PendingCall) -> TaskState:
            if task.unresolved:
                return TaskState.PENDING_ARGS_AVAIL
            return TaskState.PENDING_NODE_ASSIGNMENT if id(task) in queued else TaskState.SUBMITTED_TO_WORKER

        return [_owned(task, state(task), None) for task in islice(self._reactor.tasks.values(), most)]


def _owned(task: PendingTask | PendingCall, state: TaskState, failed: Failed | None) -> KnownTask:
    """Return what the owner of a task tells of it."""
    actor = task.actor if isinstance(task, PendingCall) else ActorId("")
    code, text = ("", "") if failed is None else _error(failed)
    wire = task.wire
    return KnownTask(OWN, wire.number, wire.attempt, wire.name[:MOST_TEXT], state.value, actor, code=code, text=text)


def _error(failed: Failed) -> Error:
    return failed.code, _told(failed.text)


def _told(text: str) -> str:
    """Return of an error's text what says most: of a traceback the last line, else the first."""
    head, traceback, tail = text.strip().partition(TRACEBACK)
    line = tail.rpartition("\n")[2] if traceback else head.partition("\n")[0]
    return line[:MOST_TEXT]
