"""The spans of a task's life, in the processes that take part in it; imported only where tracing is on.

::

    submit f            its owner, in the user's thread: .remote()
    ├── queue f         its owner: until it is sent to a worker process, once for each time it is sent
    ├── schedule f      a scheduler, for the leases it waits for; below it the node that is asked
    ├── process f       the worker process: fetch arguments, run f (below it the user's own spans), store result
    ├── lost f          its owner: an attempt whose process died, since that process tells of nothing more
    └── get             whoever gets its result, unless a span is open there: then below that, with a link

The user's open span at ``.remote()`` is the parent of ``submit``. Whether all this is recorded is decided there, once;
what is not recorded costs its owner a look at what is open, and the worker process the same for what the user may open.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import Token
from dataclasses import dataclass
from functools import partial

from opentelemetry import trace as api
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import Span

from shoal_core.bus.spans import (
    NOTHING_TO_SAY,
    UNRECORDED_CONTEXT,
    About,
    OfMany,
    OfTask,
    begin,
    error_type,
    fail,
    fail_with,
    is_open,
    is_wanted,
    named,
    open_context,
    opened,
    record,
    record_wanted,
    said,
)
from shoal_core.protocol.actors import ActorRecord
from shoal_core.protocol.ids import ActorId, JobId, ProcessId
from shoal_core.protocol.records import Failed, Inline, Stored, Task, Value
from shoal_core.protocol.traces import UNRECORDED, Attributes, is_recorded
from shoal_core.runtime.ownership.objects import ObjectState

MOST_LINKS = 64
NO_PROCESS = ProcessId("")
PROCESSING: Attributes = {
    "messaging.operation.name": "process",
    "messaging.operation.type": "process",
    "faas.trigger": "pubsub",
}
MOST_ITEMS = 100
"""So many items of one generator have a span of their own."""


# ------------------------------------------------------------------------------------ .remote()


def submitted(task: Task, owner: ProcessId, job: JobId, began_ns: int) -> str:
    """Record the submission of a task, which ``is_wanted``; return the task's trace."""
    about = OfTask(_submission, task.number, owner, (task.name, _size_bytes(task.arguments), job))
    return record_wanted(f"submit {task.name}", about, began_ns)


def _submission(task_id: str, name: str, size_bytes: int, job: JobId) -> Attributes:
    return {
        "messaging.destination.name": name,
        "messaging.message.id": task_id,
        "messaging.operation.name": "submit",
        "messaging.operation.type": "create",
        "messaging.message.body.size": size_bytes,
        "shoal.job.id": job,
    }


def created(class_name: str, actor: ActorId, job: JobId, began_ns: int) -> str:
    """Record that an actor was asked for, if that is wanted; return its trace, which its making belongs to."""
    if not is_wanted():
        return UNRECORDED
    about = {
        "messaging.destination.name": class_name,
        "messaging.operation.name": "create",
        "messaging.operation.type": "create",
        "shoal.actor.id": actor,
        "shoal.job.id": job,
    }
    return record_wanted(f"create {class_name}", about, began_ns)


class Queueing:
    """What is noted of a task or call of this process that is traced, until it has ended (I/O thread only)."""

    __slots__ = ("_process", "_queued_ns", "_resolved_ns", "_sent_ns")

    def __init__(self) -> None:
        self._queued_ns = 0
        self._resolved_ns = 0
        self._sent_ns = 0
        self._process = NO_PROCESS

    def queued(self) -> None:
        """It waits from now on: for its arguments, for a place, for its turn."""
        self._queued_ns = time.time_ns()

    def resolved(self) -> None:
        """Its arguments are all there."""
        self._resolved_ns = time.time_ns()

    def sent(self, task: Task, process: ProcessId) -> None:
        """It goes out now, and waits no more."""
        self._record("queue", task, self._queued_ns, OfMany(_attempt, (task.attempt, process)))
        self._queued_ns = 0
        self._sent_ns = time.time_ns()
        self._process = process

    def again(self, task: Task, failure: Failed | None) -> None:
        """It was sent and waits again; ``failure`` is what ended the attempt, where no process tells of that."""
        self._lost(task, failure, task.attempt - 1)
        self.queued()

    def failed(self, task: Task, failure: Failed) -> None:
        """It ends without its process telling of it."""
        if self._queued_ns:
            self._record("queue", task, self._queued_ns, OfMany(_attempt, (task.attempt,)), failure)
        self._lost(task, failure, task.attempt)

    def ended(self) -> bool:
        """It has ended; tell whether a process tells of that."""
        was_sent = self._sent_ns > 0
        self._queued_ns = self._resolved_ns = self._sent_ns = 0
        return was_sent

    def _lost(self, task: Task, failure: Failed | None, attempt: int) -> None:
        if self._sent_ns and failure is not None:
            self._record("lost", task, self._sent_ns, OfMany(_attempt, (attempt, self._process)), failure)
        self._sent_ns = 0

    def _record(self, what: str, task: Task, began_ns: int, attempt: OfMany, failure: Failed | None = None) -> None:
        about: About = attempt
        if self._resolved_ns:
            about = {**attempt(), "shoal.queue.arguments_seconds": (self._resolved_ns - began_ns) / 1e9}
            self._resolved_ns = 0
        told = None if failure is None else (failure.code, failure.text)
        record(f"{what} {task.name}", "INTERNAL", named(task.trace), about, began_ns, told)


def _attempt(attempt: int, process: ProcessId = NO_PROCESS) -> Attributes:
    about: Attributes = {"shoal.task.attempt": attempt}
    return {**about, "shoal.process.id": process} if process else about


def queueing_of(task: Task, results: Sequence[ObjectState]) -> Queueing | None:
    """Note on what a task that was submitted will make to which trace it belongs, if it is recorded.

    Return what there will be noted of the task itself, None where it is not recorded.
    """
    if not is_recorded(task.trace):
        return None
    for state in results:
        state.trace = task.trace
    return Queueing()


# ------------------------------------------------------------------------------------ the worker process


class Processing:
    """The spans of one run of a task: ``process``, and below it one phase after the other, fetching first if it has to.

    Whatever the user's code opens hangs below the phase in which it runs.
    """

    __slots__ = ("_before", "_items", "_name", "_phase", "_process")

    def __init__(self, name: str, trace: str, about: About, fetches: bool = True) -> None:
        self._name = name
        self._items = 0
        self._phase: Span | None = None
        self._before: Token[Context] | None = None
        self._process = begin(f"process {name}", "CONSUMER", named(trace), about)
        if fetches:
            self._enter("fetch arguments")

    def run(self) -> None:
        """The user's code runs from now on."""
        self._enter(f"run {self._name}")

    def store(self) -> None:
        """What the user's code returned is stored from now on."""
        self._enter("store result")

    def item(self, began_ns: int, value: Value) -> None:
        """An item of a generator was stored; the code that makes the next one goes on."""
        self._items += 1
        if self._items <= MOST_ITEMS:
            about = {"shoal.item.index": self._items, "messaging.message.body.size": _size_bytes(value)}
            record("store item", "INTERNAL", self._process, about, began_ns)

    def end(self, error: BaseException | None, failure: Failed | None = None) -> None:
        """The run has ended: well, by an exception, or with a failure that is not the user's code's."""
        global unsent
        phase, process = self._phase, self._process
        if failure is not None:
            fail_with(process, failure.code, failure.text)
        elif error is not None:
            fail(process if phase is None else phase, error)
            fail_with(process, error_type(error), said(error))
        if self._items:
            process.set_attribute("shoal.items", self._items)
        if phase is not None:
            phase.end()
        process.end()
        unsent = True
        if self._before is not None:
            detach(self._before)

    def _enter(self, name: str) -> None:
        """Have one phase end and the next one begin, which is the open span then, up to the end of the run."""
        if self._phase is not None:
            self._phase.end()
        self._phase = phase = begin(name, "INTERNAL", self._process, NOTHING_TO_SAY)
        token = attach(api.set_span_in_context(phase, Context()))
        self._before = self._before or token


unsent = False
"""Whether a run has ended whose spans may still wait in this process for being sent."""


def unrecorded(trace: str) -> None:
    """What begins here is not recorded, nor is what its code opens; "": its owner does not trace, so code may.

    For most tasks it is so already, after the task before, and a worker process pays a look at that (``work``).
    """
    if trace:
        if open_context() is not UNRECORDED_CONTEXT:
            attach(UNRECORDED_CONTEXT)
    elif open_context() is UNRECORDED_CONTEXT:
        attach(Context())


def of_task(task: Task, owner: ProcessId, actor: ActorRecord | None, known: Callable[[], bool]) -> Processing:
    """Return the spans of a task that begins here and is recorded.

    ``known`` tells whether the process has run its function before.
    """
    is_known = known()
    actor_id = None if actor is None else actor.description.actor_id
    about = OfTask(_run, task.number, owner, (task.name, task.attempt, not is_known, actor_id))
    return Processing(task.name, task.trace, about, fetches=not is_known or _has_arguments(task))


def _run(task_id: str, name: str, attempt: int, is_cold: bool, actor: ActorId | None) -> Attributes:
    about = {
        **PROCESSING,
        "messaging.destination.name": name,
        "messaging.message.id": task_id,
        "faas.invocation_id": task_id,
        "faas.coldstart": is_cold,
        "shoal.task.attempt": attempt,
    }
    return about if actor is None else {**about, "shoal.actor.id": actor}


def of_actor(record: ActorRecord) -> Processing | None:
    """Return the spans of making an actor's instance here; None where it is not recorded: then nor is what it opens."""
    about = record.description
    if not is_recorded(about.trace):
        unrecorded(about.trace)
        return None
    return Processing(f"{about.class_name}.__init__", about.trace, partial(_making, record))


def _making(record: ActorRecord) -> Attributes:
    about = record.description
    return {
        **PROCESSING,
        "messaging.destination.name": about.class_name,
        "faas.invocation_id": about.actor_id,
        "faas.coldstart": True,
        "shoal.actor.id": about.actor_id,
        "shoal.actor.incarnation": record.incarnation,
    }


# ------------------------------------------------------------------------------------ get, wait, put


@dataclass(frozen=True, slots=True)
class Place:
    """Where a span hangs: below what its ``trace`` names ("": what is open here), with links to other tasks' traces."""

    trace: str
    links: list[str]


def place_of(states: Sequence[ObjectState]) -> Place | None:
    """Return where the span of a ``get`` of objects hangs; None where it is not recorded."""
    recorded = is_open()
    traces = [] if recorded is False else _traces_of(states)
    if not (recorded or traces):
        return None
    below, linked = ("", traces) if recorded else (traces[0], traces[1:])
    return Place(below, linked)


def _traces_of(states: Sequence[ObjectState]) -> list[str]:
    """Return the traces of the tasks of this process whose results these are, each once, as far as links go."""
    return list(dict.fromkeys([state.trace for state in states if state.trace]))[:MOST_LINKS]


def retrieved(state: ObjectState, began_ns: int) -> None:
    """Record that an object was awaited, which is the same as a ``get`` of it."""
    if (place := place_of((state,))) is not None:
        above = named(place.trace) if place.trace else None
        about: Attributes = {"messaging.operation.name": "get", "shoal.objects": 1}
        record("get", "CLIENT", above, about, began_ns, links=place.links)


def retrieving(what: str, place: Place, count: int) -> AbstractContextManager[Span]:
    """Open the span of a ``get`` or ``wait`` of so many objects."""
    about: Attributes = {"messaging.operation.name": what, "shoal.objects": count}
    return opened(what, "CLIENT", place.trace, about, links=place.links)


def putting(size_bytes: int) -> AbstractContextManager[Span]:
    """Open the span of a ``put`` below the one that is open here."""
    about: Attributes = {"messaging.operation.name": "put", "messaging.message.body.size": size_bytes}
    return opened("put", "CLIENT", "", about)


def _has_arguments(task: Task) -> bool:
    return bool(task.dependencies) or type(task.arguments) is not Inline or bool(task.arguments.data)


def _size_bytes(value: Value) -> int:
    """Return how many bytes a value has, wherever they lie."""
    if type(value) is Inline:
        return len(value.data) + sum(map(len, value.buffers))
    return value.size_bytes if type(value) is Stored else 0
