"""What a process tells of tasks: those of its own that have not ended, those that run here, and the last that ended.

Who runs a task knows best when it began and how it ended; its owner knows what has not been begun, and what ended
without being run to its end. Both tell what they know, and whoever asked puts it together. Noting a task is on the hot
path of whoever runs it: a record on a bounded list. A process that leaves in good order leaves what it has run with its
node; of one that is killed that is lost, and only its tasks' owner can tell of them.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

import msgspec

from shoal_core.protocol.actors import ActorRecord
from shoal_core.protocol.ids import ActorId, FunctionId, PeerId, ProcessId, TaskNumber, is_call, told_task_id
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.records import Failed, InGroup, KnownTask, ReportTasks, Task, TasksReported
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.scheduling import TaskState
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.submission import PendingTask
from shoal_core.runtime.worker.work import Accepted, Ended

MOST_REMEMBERED = 1000
MOST_TEXT = 100
"""So many characters of a name, and of a line of an error's text, are told."""
TRACEBACK = "Traceback (most recent call last)"

CUT_SHORT = ("worker_crashed", "its job or its owner ended before it did")
"""The code and the text of the error of a task that has not ended when its process has to."""

OWN = ProcessId("")
"""The owner of a task that is the reporting process's own."""

Error = tuple[str, str]
"""The code and the text of an error."""
Names = Callable[[FunctionId], str]
"""Returns the name of a function; "" where it is not known."""


class Ran(msgspec.Struct, frozen=True, gc=False):
    """One task that has ended here, without what it was given, which is not kept for this.

    It began at ``began_at`` and ended at ``ended_at`` (``perf_counter``; 0: it was not begun).
    """

    number: TaskNumber
    attempt: int
    owner: ProcessId
    name: str
    function: FunctionId
    created_at: float
    parent: TaskNumber
    parent_owner: str
    in_group: InGroup | None
    resources: Resources
    began_at: float
    ended_at: float
    error: Error | None


class Recent:
    """Answers ``ReportTasks`` for one process (I/O thread only).

    ``running`` returns what was given to this process to be run, and ``resources`` what the lease of such a task holds;
    ``actor`` is whose process it is, "" where no actor's, and ``record`` returns that actor's record. ``named`` returns
    the name of a function that this process knows.
    """

    def __init__(self, reactor: Reactor, named: Names) -> None:
        self.running: Callable[[], Iterable[Accepted]] = lambda: ()
        self.resources: Callable[[Task], Resources] = lambda task: {}
        self.record: Callable[[], ActorRecord] | None = None
        self._named = named
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
            error = _error(values[-1]) if values and type(values[-1]) is Failed else None
            began_at = accepted.began_at
            ended_at = began_at + ended.seconds if began_at else time.perf_counter()
            self._ran.append(
                Ran(
                    task.number,
                    task.attempt,
                    accepted.owner,
                    task.name,
                    task.function,
                    task.created_at,
                    task.parent,
                    task.parent_owner,
                    task.in_group,
                    self.resources(task),
                    began_at,
                    ended_at,
                    error,
                )
            )

    def made(self, name: str, incarnation: int, began_at: float, error: str) -> None:
        """An actor was made here, or could not be."""
        told = ("actor_died", _told(error)) if error else None
        number, now = TaskNumber(0), time.perf_counter()
        self._ran.append(
            Ran(number, incarnation, OWN, name, FunctionId(""), 0.0, number, "", None, {}, began_at, now, told)
        )

    def _note_unrun(self, task: PendingTask | PendingCall, failed: Failed, attempt: int) -> None:
        """An attempt to run a task of this process has ended of which nobody can tell who ran it to its end."""
        self._failed.append(msgspec.structs.replace(self._owned(task, TaskState.FAILED, failed), attempt=attempt))

    # ------------------------------------------------------------------------------- telling

    def _report(self, node: PeerId, request: ReportTasks) -> None:
        if request.inquiry:
            self._reactor.send(node, self.report(request))
        else:
            self.leave(node, request.most)

    def leave(self, node: PeerId, most: int = MOST_REMEMBERED) -> None:
        """Leave with the node what was run here and what this process owned, as it ends.

        What has not ended counts as failed; who runs it may know better.
        """
        tasks = [*self._running(), *self._ended(most), *islice(reversed(self._failed), most)]
        tasks = [_cut_short(task) for task in [*tasks, *self._pending(most)][:most]]
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
            self._known(
                accepted.owner,
                accepted.task,
                TaskState.RUNNING,
                self._actor_of(accepted.task.number),
                self.resources(accepted.task),
                began_at=offset + accepted.began_at,
            )
            for accepted in self.running()
            if accepted.began_at
        ]

    def _ended(self, most: int) -> list[KnownTask]:
        offset = time.time() - time.perf_counter()
        return [self._ended_task(ran, offset) for ran in islice(reversed(self._ran), most)]

    def _actor_of(self, number: TaskNumber) -> ActorId:
        """Return the actor that a task is of; the process may have run others before it was given to one."""
        return self.actor if not number or is_call(number) else ActorId("")

    def _ended_task(self, ran: Ran, offset: float) -> KnownTask:
        state = TaskState.FINISHED if ran.error is None else TaskState.FAILED
        known = self._known(
            ran.owner,
            ran,
            state,
            self._actor_of(ran.number),
            ran.resources,
            began_at=offset + ran.began_at if ran.began_at else 0.0,
            ended_at=offset + ran.ended_at,
            error=ran.error,
        )
        if ran.number or self.record is None:
            return known
        record = self.record()
        about = record.description
        group = about.strategy.group if isinstance(about.strategy, Bundle) else ""
        return msgspec.structs.replace(
            known, created_at=record.created_at, parent=about.parent, resources=about.resources, group=group
        )

    def _pending(self, most: int) -> list[KnownTask]:
        queued = {id(task) for key in self._reactor.submission.keys.values() for task in key.queue}

        def state(task: PendingTask | PendingCall) -> TaskState:
            if task.unresolved:
                return TaskState.PENDING_ARGS_AVAIL
            return TaskState.PENDING_NODE_ASSIGNMENT if id(task) in queued else TaskState.SUBMITTED_TO_WORKER

        return [self._owned(task, state(task), None) for task in islice(self._reactor.tasks.values(), most)]

    def _owned(self, task: PendingTask | PendingCall, state: TaskState, failed: Failed | None) -> KnownTask:
        """Return what the owner of a task tells of it."""
        actor, resources = (task.actor, {}) if isinstance(task, PendingCall) else (ActorId(""), task.key.resources)
        if failed is None:
            return self._known(OWN, task.wire, state, actor, resources)
        return self._known(OWN, task.wire, state, actor, resources, ended_at=time.time(), error=_error(failed))

    def _known(
        self,
        owner: ProcessId,
        task: Task | Ran,
        state: TaskState,
        actor: ActorId,
        resources: Resources,
        began_at: float = 0.0,
        ended_at: float = 0.0,
        error: Error | None = None,
    ) -> KnownTask:
        """Return what is told of a task."""
        code, text = error or ("", "")
        if not actor:
            function = self._named(task.function)
        elif self.record is not None and task.function:
            function = f"{self.record().description.class_name}.{task.function}"
        else:
            function = ""
        return KnownTask(
            owner,
            task.number,
            task.attempt,
            task.name[:MOST_TEXT],
            state.value,
            actor,
            began_at,
            ended_at,
            code,
            text,
            function[:MOST_TEXT] if function != task.name else "",
            task.created_at,
            told_task_id(task.parent_owner, task.parent),
            resources,
            task.in_group.group if task.in_group is not None else "",
        )


def _cut_short(task: KnownTask) -> KnownTask:
    """Return what becomes of a task when the process that tells of it ends."""
    if task.ended_at:
        return task
    state, (code, text) = TaskState.FAILED.value, CUT_SHORT
    return msgspec.structs.replace(task, state=state, ended_at=time.time(), code=code, text=text)


def _error(failed: Failed) -> Error:
    return failed.code, _told(failed.text)


def _told(text: str) -> str:
    """Return of an error's text what says most: of a traceback the last line, else the first."""
    head, traceback, tail = text.strip().partition(TRACEBACK)
    line = tail.rpartition("\n")[2] if traceback else head.partition("\n")[0]
    return line[:MOST_TEXT]
