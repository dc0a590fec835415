"""A worker process: what the template's child becomes.

The main thread runs tasks; the I/O thread receives leases and tasks, answers their owners, and gives back what the
main thread does not come to. Or the process is given an actor, makes it, and runs its methods until the actor ends.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from shoal_core import telemetry
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.interface import Bus
from shoal_core.bus.tracing import ENABLED
from shoal_core.machine import CUDA_VISIBLE
from shoal_core.protocol.errors import BusError, RequestTimeoutError
from shoal_core.protocol.ids import LeaseId, NodeId, PeerId, ProcessId, TaskNumber, node_of, task_of, told_task_id
from shoal_core.protocol.logs import attempt_name
from shoal_core.protocol.records import (
    ActorAssigned,
    ActorDismissed,
    ActorLeft,
    ActorReady,
    CancelTask,
    Failed,
    Item,
    LeaseAssigned,
    ProcessUnneeded,
    Reference,
    SegmentWanted,
    Stored,
    StreamAdvanced,
    StreamClosed,
    Task,
    TaskDone,
    TasksReturned,
    WorkerBlocked,
    WorkerReady,
    contained_in,
)
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.subjects import Subjects
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import STREAMING, Producer
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.session import Address, Session
from shoal_core.runtime.tasks.submission import cancelled
from shoal_core.runtime.worker.execution import BegunPage, Execution
from shoal_core.runtime.worker.hosting import Hosting, Left, Outcome
from shoal_core.runtime.worker.output import marked
from shoal_core.runtime.worker.work import (
    Accepted,
    Awaits,
    Crashed,
    Ended,
    Running,
    Yielded,
    cancel,
    current,
)

if ENABLED:
    from shoal_core.runtime.reports import spans

OVERRUN_SECONDS = 0.05
"""A task that runs so long holds up those behind it: they go back to their owners."""
LEAVE_SECONDS = 2.0
"""How long an actor that leaves waits for its callers to have heard all that it had answered."""
LAST_WORDS_SECONDS = 0.5
LINGER_SECONDS = 0.5
"""How often a process without work looks whether its objects are still referred to."""


TaskKey = tuple[ProcessId, TaskNumber]
"""A task in all the cluster: its owner and its number there."""


class WorkerConfig(msgspec.Struct, frozen=True):
    """What a worker process is told at its birth."""

    process_id: ProcessId
    node_id: NodeId
    cluster: str
    address: str
    credentials: dict[str, str]
    shared_memory_path: str
    begun_page: str
    environments_path: str
    tls: dict[str, str] = {}
    gpu_variable: str = CUDA_VISIBLE


class Service:
    """The I/O thread's side of a worker: between the channels and the execution queue."""

    def __init__(self, runtime: Runtime, execution: Execution) -> None:
        self._runtime = runtime
        self._execution = execution
        self._reactor = runtime.reactor
        self._leases: dict[LeaseId, LeaseAssigned] = {}
        self._early: dict[LeaseId, list[tuple[ProcessId, Task]]] = {}
        self._ended: list[Ended] = []
        self._unanswered = 0
        self._accepted: dict[TaskKey, Accepted] = {}
        self._awaited: dict[int, Reference] = {}  # lost arguments that calls wait for, by the calls' order
        self._order = 0
        self._ended_order = 0
        self._waits = 0
        self._blocked = False
        self._unneeded = False
        self._leaving = False
        self._left = False
        self._held: list[ObjectRef[object]] = []
        self._making_since = 0.0
        self._overrun: asyncio.TimerHandle | None = None
        self._sending = telemetry.Quiet(lambda: bool(self._accepted), self._send_spans)
        self._reactor.records_by_type |= {
            Task: self._task,
            LeaseAssigned: self._assigned,
            ActorAssigned: self._actor_assigned,
            ActorDismissed: self._actor_dismissed,
            ProcessUnneeded: self._unneeded_now,
            StreamAdvanced: self._stream_moved,
            StreamClosed: self._stream_moved,
            CancelTask: self._cancel_task,
        }
        self._reactor.commands_by_type |= {
            Ended: self._task_ended,
            Yielded: self._yielded,
            Awaits: self._call_awaits,
            Crashed: self._crashed,
            _Blocked: self._change_blocked,
            Outcome: self._actor_made,
            Left: self._actor_left,
        }
        self._reactor.phase = self._answer
        self._reactor.buried = self._stop_streams
        runtime.recent.running = self._accepted.values
        runtime.recent.resources = self._resources
        runtime.holdings.in_use = lambda: [*(one.references for one in self._accepted.values()), self._held]
        runtime.ended = runtime.command
        runtime.getting.blocked = lambda blocked: runtime.command(_Blocked(blocked, current.get()))

    # ------------------------------------------------------------------------------- work comes

    def _assigned(self, node: PeerId, lease: LeaseAssigned) -> None:
        self._leases = {lease.lease: lease}
        self._reactor.job = lease.job
        self._execution.queue.put(lease)
        for owner, task in self._early.pop(lease.lease, ()):
            self._task(owner, task)
        for passed in [number for number in self._early if number < lease.lease]:
            del self._early[passed]

    def _resources(self, task: Task) -> Resources:
        """Return what the lease of a task holds; a call has none of its own."""
        lease = self._leases.get(task.lease)
        return {} if lease is None else lease.resources

    def _task(self, owner: ProcessId, task: Task) -> None:
        if not task.lease:
            self._call(owner, task)
            return
        if task.lease not in self._leases:
            self._early.setdefault(task.lease, []).append((owner, task))
            return
        references = self._adopt(owner, task)
        if self._blocked or self._leaving:
            self._reactor.send(owner, TasksReturned(task.lease, [task.number], self._blocked))
            return
        self._execution.queue.put(self._accept(task, owner, references))
        if self._overrun is None:
            self._overrun = asyncio.get_running_loop().call_later(OVERRUN_SECONDS, self._look)

    def _call(self, caller: ProcessId, call: Task) -> None:
        """Have the actor of this process run a call; one that comes too late is its caller's to settle."""
        hosting = self._runtime.hosting
        if hosting is None or self._leaving:
            return
        accepted = self._accept(call, caller, self._adopt(caller, call))
        if not hosting.is_sequential:
            hosting.accept(accepted)
        elif self._awaited and any(_makes(accepted, awaited) for awaited in self._awaited.values()):
            self._answer_in_vain(accepted)
        else:
            self._execution.queue.put(accepted)

    def _call_awaits(self, awaits: Awaits) -> None:
        """A call waits for an argument: end the call that would make it, but waits behind this one."""
        hosting, awaited = self._runtime.hosting, awaits.awaited
        if hosting is None or not hosting.is_sequential:
            return
        if awaited is None:
            self._awaited.pop(awaits.accepted.order, None)
            return
        self._awaited[awaits.accepted.order] = awaited
        for accepted in list(self._accepted.values()):
            if _makes(accepted, awaited) and not cancel(accepted):
                self._answer_in_vain(accepted)

    def _answer_in_vain(self, accepted: Accepted) -> None:
        """End a call for whose result the call that runs here waits, and that would never have its turn."""
        del self._accepted[accepted.owner, accepted.task.number]
        name = accepted.task.name
        text = f"{name}() was not run again: its actor runs one call after the other, and is at one that waits for it."
        self._answer_unrun(accepted, Failed("reconstruction_failed", text))

    def _accept(self, task: Task, owner: ProcessId, references: list[ObjectRef[object]]) -> Accepted:
        if task.dependencies or type(task.arguments) is Stored:
            self._prefetch(task)
        self._order += 1
        accepted = Accepted(task, owner, references, self._order)
        if task.returns == STREAMING:
            accepted.producer = Producer(task.ahead)
        self._accepted[owner, task.number] = accepted
        return accepted

    def _prefetch(self, task: Task) -> None:
        """Have the node pull what the task will read from other nodes, while it waits here for its turn."""
        for value in (task.arguments, *task.dependencies):
            if type(value) is Stored and value.node != self._runtime.node:
                wanted = SegmentWanted(value.node, value.segment, value.size_bytes)
                self._reactor.send(self._runtime.node, wanted)

    def _stream_moved(self, owner: ProcessId, record: StreamAdvanced | StreamClosed) -> None:
        """The owner of a generator has taken items of it, or wants no more."""
        accepted = self._accepted.get((owner, record.number))
        if accepted is None or accepted.producer is None:
            return
        if isinstance(record, StreamClosed):
            accepted.producer.close()
        else:
            accepted.producer.advance(record.taken)

    def _cancel_task(self, owner: ProcessId, record: CancelTask) -> None:
        """End a task that the owner does not want any more; one that was not begun is answered at once."""
        accepted = self._accepted.get((owner, record.number))
        if accepted is None:
            self._cancel_early(owner, record)
            return
        if accepted.task.attempt != record.attempt:
            return
        if not cancel(accepted):
            del self._accepted[owner, record.number]
            self._answer_cancelled(accepted)
            return
        if accepted.producer is not None:
            accepted.producer.close()
        if record.recursive:
            self._reactor.cancel_children(accepted.order, record.force)
        if record.force:
            self._runtime.bus.spawn(self._die())
        elif (hosting := self._runtime.hosting) is not None:
            hosting.interrupt(accepted)
        else:
            self._execution.interrupt(accepted)

    def _cancel_early(self, owner: ProcessId, record: CancelTask) -> None:
        """End a task of a lease that this process has not been told of yet."""
        for tasks in self._early.values():
            for index, (of, task) in enumerate(tasks):
                if (of, task.number, task.attempt) == (owner, record.number, record.attempt):
                    del tasks[index]
                    self._answer_cancelled(Accepted(task, owner, [], self._order))
                    return

    def _answer_cancelled(self, accepted: Accepted) -> None:
        """Tell the owner of a task that it was cancelled before it was begun."""
        self._answer_unrun(accepted, cancelled(accepted.task.name))

    def _answer_unrun(self, accepted: Accepted, failed: Failed) -> None:
        self._ended.append(Ended(accepted, [failed] * abs(accepted.task.returns), [], 0.0, False))
        self._answer()

    def _stop_streams(self, owner: ProcessId) -> None:
        """A process has died: nobody wants the items of its generators any more."""
        for accepted in self._accepted.values():
            if accepted.owner == owner and accepted.producer is not None:
                accepted.producer.close()

    def _crashed(self, crashed: Crashed) -> None:
        """Run nothing more, and end with this status once the owners of what has ended before have heard of it."""
        self._leaving = self._left = True
        self._give_back(blocked=False)
        self._runtime.bus.spawn(self._die(crashed.status))

    async def _die(self, status: int = 1) -> None:
        """End this process at once, once the owners of what it has done before have heard of that."""
        with contextlib.suppress(BusError, RequestTimeoutError):
            await self._reactor.peers.flush(LAST_WORDS_SECONDS)
        if ENABLED:
            await asyncio.to_thread(telemetry.flush, LAST_WORDS_SECONDS)
        os._exit(status)

    def _yielded(self, item: Yielded) -> None:
        task, owner = item.accepted.task, item.accepted.owner
        self._reactor.sharing.lend_contents(item.value, item.result.references, owner)
        self._reactor.send(owner, Item(task.number, task.attempt, item.index, item.value))

    def _adopt(self, owner: ProcessId, task: Task) -> list[ObjectRef[object]]:
        """Make the references among a task's arguments, and have their owners count this process."""
        references: list[ObjectRef[object]] = []
        if not task.dependencies and not contained_in(task.arguments):
            return references
        for value in (task.arguments, *task.dependencies):
            references += [self._runtime.objects.restore(reference) for reference in contained_in(value)]
        if references:
            foreign = [ref._state.wire() for ref in references if ref._state.owner != owner]
            self._reactor.borrowing.ensure(foreign, _nothing)
        return references

    def _look(self) -> None:
        """Give back what waits behind a task that takes long."""
        self._overrun = None
        execution = self._execution
        if execution.queue.empty():
            return
        ran = time.perf_counter() - execution.began_at
        if execution.running is not None and ran >= OVERRUN_SECONDS:
            self._give_back(blocked=False)
            return
        self._overrun = asyncio.get_running_loop().call_later(max(0.001, OVERRUN_SECONDS - ran), self._look)

    def _give_back(self, *, blocked: bool) -> None:
        by_owner: dict[tuple[ProcessId, LeaseId], list[Accepted]] = {}
        for accepted in self._execution.withdraw():
            self._accepted.pop((accepted.owner, accepted.task.number), None)
            by_owner.setdefault((accepted.owner, accepted.task.lease), []).append(accepted)
        for (owner, lease), items in by_owner.items():
            self._reactor.send(owner, TasksReturned(lease, [item.task.number for item in items], blocked))

    def _change_blocked(self, change: _Blocked) -> None:
        """Count the threads of the task that wait; a thread that outlives its task holds up nobody."""
        running = change.running
        if running is not None and running.order > self._ended_order:
            self._waits += 1 if change.blocked else -1
            self._tell_blocked(running.task, running.owner)

    def _tell_blocked(self, task: Task, owner: ProcessId) -> None:
        """Tell the node that the CPU is not used; the owner of a task is told to send nothing more, too."""
        blocked = self._waits > 0
        hosting = self._runtime.hosting
        if blocked == self._blocked or (hosting is not None and not hosting.is_sequential):
            return
        self._blocked = blocked
        if hosting is not None:
            self._reactor.send(self._runtime.node, WorkerBlocked(hosting.lease.lease, blocked))
            return
        notice = WorkerBlocked(task.lease, blocked)
        self._reactor.send(self._runtime.node, notice)
        self._reactor.send(owner, notice)
        if blocked:
            self._give_back(blocked=True)

    # ------------------------------------------------------------------------------- an actor

    def _actor_assigned(self, node: PeerId, assigned: ActorAssigned) -> None:
        """Become the process of an actor, for the rest of this process's life."""
        self._reactor.job = assigned.lease.job
        hosting = Hosting(self._runtime, assigned, self._runtime.command)
        self._runtime.hosting = hosting
        self._runtime.puts_durably = assigned.detached
        self._runtime.recent.actor = assigned.actor
        self._runtime.recent.record = lambda: hosting.record
        self._making_since = time.perf_counter()
        refs = [self._runtime.objects.restore(reference) for reference in hosting.references]
        self._held = refs
        self._reactor.borrowing.ensure(hosting.references, _nothing)
        self._execution.queue.put(hosting)

    def _actor_made(self, outcome: Outcome) -> None:
        """Tell the node whether the instance is there; what it was made from is the instance's own to keep."""
        hosting = self._runtime.hosting
        assert hosting is not None
        assigned = hosting.assigned
        actor, incarnation = assigned.actor, assigned.incarnation
        self._held = []
        name = f"{assigned.class_name}.__init__"
        self._runtime.recent.made(name, incarnation, self._making_since, outcome.reason)
        if ENABLED:
            self._send_spans_soon()
        if not outcome.reason:
            self._reactor.send(self._runtime.node, ActorReady(actor, incarnation, os.getpid(), hosting.repr_name))
            return
        self._reactor.send(self._runtime.node, ActorLeft(actor, incarnation, outcome.reason, outcome.error))
        self._unneeded_now(self._runtime.node, ProcessUnneeded())

    def _actor_left(self, left: Left) -> None:
        """The actor ends by its own will: tell the node, once its callers have heard all that it had answered.

        Where it ends its process with an error instead, the node sees so, and may start it again.
        """
        hosting = self._runtime.hosting
        assert hosting is not None
        if self._leaving:
            return
        self._leaving = True
        hosting.leave()
        if left.status:
            self._runtime.bus.spawn(self._die(left.status))
            return
        assigned = hosting.assigned

        async def leave() -> None:
            with contextlib.suppress(BusError):
                await self._reactor.peers.flush(LEAVE_SECONDS)
            self._reactor.send(self._runtime.node, ActorLeft(assigned.actor, assigned.incarnation, left.reason))
            self._unneeded_now(self._runtime.node, ProcessUnneeded())

        self._runtime.bus.spawn(leave())

    def _actor_dismissed(self, node: PeerId, dismissed: ActorDismissed) -> None:
        """Nobody has a handle of the actor any more, so nobody waits for a call of it."""
        hosting = self._runtime.hosting
        if hosting is not None and not self._leaving:
            self._leaving = True
            hosting.leave()
            self._unneeded_now(node, ProcessUnneeded())

    # ------------------------------------------------------------------------------- results go

    def _task_ended(self, item: Ended) -> None:
        accepted = item.accepted
        self._ended.append(item)
        self._accepted.pop((accepted.owner, accepted.task.number), None)
        self._ended_order = max(self._ended_order, accepted.order)
        self._waits = 0
        self._tell_blocked(accepted.task, accepted.owner)

    def _answer(self) -> None:
        """Answer the owners of tasks that ended (after releases were counted, so that ``kept`` is exact)."""
        if not self._ended:
            return
        if ENABLED:
            self._send_spans_soon()
        ended, self._ended = self._ended, []
        self._unanswered += len(ended)
        self._runtime.reporter.task_ended()
        self._reactor.sharing.released_now()
        for item in ended:
            self._runtime.recent.ran(item)
            if item.accepted.references:
                self._send_done_when_counted(item)
            else:
                self._send_done(item)
        if any(item.exhausted for item in ended):
            self._leaving = True
            self._give_back(blocked=False)
            self._unneeded_now(self._runtime.node, ProcessUnneeded())

    def _send_done_when_counted(self, item: Ended) -> None:
        """Answer the owner of a task as soon as the owners of what this process keeps of its arguments count it."""
        accepted = item.accepted
        states = [ref._state for ref in accepted.references]
        accepted.references.clear()
        kept = [s for s in states if s.reference is not None and s.reference() is not None]
        foreign = [s.wire() for s in kept if s.owner != accepted.owner]
        own = [s.wire() for s in kept if s.owner == accepted.owner]
        holds = [s.reference() for s in kept if s.reference is not None]
        self._reactor.borrowing.ensure(foreign, partial(self._send_done, item, own, holds))

    def _send_done(
        self, item: Ended, kept: Sequence[Reference] = (), holds: Sequence[ObjectRef[object] | None] = ()
    ) -> None:
        task, owner = item.accepted.task, item.accepted.owner
        for value, result in zip(item.values, item.results, strict=False):
            self._reactor.sharing.lend_contents(value, result.references, owner)
        for reference in kept:
            self._reactor.borrowing.keep(reference)
        done = TaskDone(
            task.number,
            task.attempt,
            task.lease,
            tuple(item.values),
            item.seconds,
            item.retryable,
            tuple(kept),
            tuple(item.missing),
            item.fetch_seconds,
            item.exhausted,
        )
        self._reactor.send(owner, done)
        self._unanswered -= 1
        if self._leaving:
            self._leave_if_answered()

    def _send_spans_soon(self) -> None:
        if spans.unsent:
            self._sending.worked()

    def _send_spans(self) -> None:
        spans.unsent = False
        telemetry.flush()

    # ------------------------------------------------------------------------------- ends

    def _unneeded_now(self, node: PeerId, record: ProcessUnneeded) -> None:
        if not self._unneeded:
            self._unneeded = True
            self._linger()

    def _linger(self) -> None:
        """Leave as soon as nobody refers to an object of this process, and all tasks that it submitted have ended."""
        if self._reactor.borrowing.lent or self._reactor.tasks:
            asyncio.get_running_loop().call_later(LINGER_SECONDS, self._linger)
            return
        self._leaving = True
        self._leave_if_answered()

    def _leave_if_answered(self) -> None:
        """End the main thread's loop once the owners of all tasks that ended were told.

        An actor that leaves has told its node of that first, or its end would be taken for a crash.
        """
        told = self._runtime.hosting is None or self._unneeded
        if told and not self._unanswered and not self._left:
            self._left = True
            self._execution.stop()


def _makes(accepted: Accepted, awaited: Reference) -> bool:
    """Tell whether a call makes an object."""
    return accepted.owner == awaited.owner and accepted.task.number == task_of(awaited.key)


@dataclass(frozen=True, slots=True)
class _Blocked:
    """Command: a thread of the task that runs begins or ends to wait for objects."""

    blocked: bool
    running: Running | None


def main(config: WorkerConfig) -> None:
    """Serve leases until the node ends this process, or lets it go."""
    if ENABLED:
        about = {"shoal.node.id": config.node_id, "faas.instance": config.process_id}
        telemetry.set_up("process", config.process_id, config.cluster, about)
    holder: list[Execution] = []

    def begin(runtime: Runtime, execution: Execution) -> None:
        holder.append(execution)
        runtime.reactor.send(node_of(config.process_id), WorkerReady(os.getpid()))

    with session_of(config, begin) as session:
        holder[0].serve()
        if (hosting := session.runtime.hosting) is not None:
            hosting.let_go()
        # The process ends without Python's own farewell, which is the template's; user code may count on this part.
        atexit._run_exitfuncs()


def printing_name() -> str:
    """Return whose output it is that is printed here: the running task's, else the process's actor's, "" for neither.

    An actor's constructor prints as well, and so do threads that it has started: for the node that is its making.
    """
    if (running := current.get()) is not None:
        task = running.task
        return marked(running.label, attempt_name(told_task_id(running.owner, task.number), task.attempt))
    runtime = Runtime.current
    hosting = None if runtime is None else runtime.hosting
    if hosting is None:
        return ""
    return marked(hosting.label, attempt_name(hosting.assigned.actor, hosting.assigned.incarnation))


def session_of(config: WorkerConfig, begin: Callable[[Runtime, Execution], None]) -> Session:
    """Return a worker process's session, which calls ``begin`` when all is there for it to serve (I/O thread)."""
    page = BegunPage(Path(config.begun_page))

    @contextlib.asynccontextmanager
    async def identify(bus: Bus, subjects: Subjects) -> AsyncIterator[tuple[ProcessId, Path | None]]:
        yield config.process_id, Path(config.shared_memory_path)

    @contextlib.asynccontextmanager
    async def serve(runtime: Runtime) -> AsyncIterator[None]:
        execution = Execution(runtime, page, Path(config.environments_path), config.gpu_variable)
        Service(runtime, execution)
        begin(runtime, execution)
        yield

    address = Address(
        config.address,
        config.cluster,
        Credentials.from_json(config.credentials),
        TlsFiles(**config.tls) if config.tls else None,
    )
    return Session(address, identify, serve)


def _nothing() -> None:
    """Nothing waits for the owners' answers yet; the end of the task does."""
