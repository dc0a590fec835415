"""The I/O thread's side of a runtime: every change of state happens here.

User threads leave commands on queues and wake the loop; channels deliver records; timers tick. Whatever came in
one turn of the loop is worked off together, so that each peer gets one message and the table's lock is taken once.
"I/O thread" stands here and elsewhere for whichever thread runs the loop's turn (see ``turns``).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from shoal_core.bus.interface import Bus
from shoal_core.bus.peers import Peers
from shoal_core.protocol.ids import JobId, NodeId, PeerId, ProcessId, TaskNumber, node_of, object_key, task_of
from shoal_core.protocol.messages import NO_TERMS
from shoal_core.protocol.records import (
    Borrow,
    Borrowed,
    CancelObject,
    CancelTask,
    Failed,
    Fetch,
    Fetched,
    Held,
    Inline,
    Item,
    LeaseGranted,
    LeaseRecalled,
    ObjectUnavailable,
    Record,
    SegmentsUnpinned,
    Stored,
    StreamAdvanced,
    StreamClosed,
    TaskDone,
    TasksReturned,
    Transfer,
    Unborrow,
    Value,
    WorkerBlocked,
    WorkerLost,
    contained_in,
)
from shoal_core.protocol.scheduling import Demand
from shoal_core.protocol.storage import MOST_PINS
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.commands import Cancel, Notify, Persisted, Say, StreamMoved, Want, Withdraw
from shoal_core.runtime.data.durable import Restoring
from shoal_core.runtime.loop import turns
from shoal_core.runtime.nodes import NodeWatch
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable
from shoal_core.runtime.ownership.recovery import Recovery
from shoal_core.runtime.ownership.sharing import Sharing
from shoal_core.runtime.ownership.streams import STREAMING, Stream
from shoal_core.runtime.ownership.unheeded import Unheeded
from shoal_core.runtime.reports.tally import MOST_LISTED, Tally
from shoal_core.runtime.tasks.actors import Abandon, Actors, Create, Created, Follow, Own
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.placement_groups import AwaitGroup, DropGroup, MakeGroup, PlacementGroups
from shoal_core.runtime.tasks.submission import PendingTask, SchedulingKey, Submission, cancelled

TICK_SECONDS = 0.05
LOSS_GRACE_SECONDS = 0.03
"""A crashed worker's last results may still be on their way when its node tells of the crash."""
UNPIN_SECONDS = 0.002
LOOK_SECONDS = 0.02
"""So long a reference to a small value that came a moment ago may be gone before that is counted."""
MOST_BOUNCES = 20
"""So often a task may come back unrun, since arguments could not be read where it was."""


class Reactor:
    """The state of one process of the cluster, and what it does with records and commands (I/O thread only)."""

    peers: Peers
    """Set once by whoever opens the channels, which deliver to this very object."""
    restoring: Restoring
    """Set once by the runtime: what of this process is in the durable tier, and what comes from there."""

    def __init__(self, bus: Bus, subjects: Subjects, local: ProcessId, table: ObjectTable) -> None:
        self.local = local
        self.node = node_of(local)
        self.job = JobId("")
        self.terms = NO_TERMS
        self.commands: deque[Any] = deque()
        self.tally = Tally()
        self.counted: Callable[[], None] = _nothing
        """Told, in every turn in which there are tasks, that there will be something to report."""
        self.submission = Submission(self.tally)
        self._dead: set[str] = set()
        self.sharing = Sharing(local, table, self._dead, self.send, self._settle)
        self.sharing.forgotten = self._forgotten
        self.sharing.orphaned = lambda state, failure: self.restoring.lost(state, failure)
        self.nodes = NodeWatch(self._dead)
        self.released = self.sharing.released
        self.unpinned: deque[tuple[str, int]] = deque()
        """Small segments of this node that user threads map no more, each with the serial of its pin."""
        self._will_unpin = False
        self.borrowing = self.sharing.borrowing
        self.actors = Actors(bus, subjects, self._dead, self.tally)
        self.actors.turn = self._finish_unless_closed
        self.groups = PlacementGroups(bus, subjects)
        self.groups.turn = self._finish_unless_closed
        self.pinned: list[ObjectRef[Any]] = []
        self.streams: dict[TaskNumber, Stream] = {}
        self.tasks: dict[TaskNumber, PendingTask | PendingCall] = {}
        self.recovery = Recovery(
            table,
            self.sharing,
            self.tasks,
            self._dead,
            self._settle,
            self._run_again,
            bus.spawn,
            self._finish_unless_closed,
        )
        self.sharing.needed = self.recovery.want
        self.unheeded = Unheeded(table)
        self._bus = bus
        self._subjects = subjects
        self._table = table
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.Context()
        """That of nobody: what a turn of the loop does is not done for whoever happened to wake it."""
        self.traced_ended_at = 0.0
        """When a task that is traced ended last, of those that some process had begun (``time.monotonic``)."""
        self._awake = False
        self._looks_soon = False
        """Whether a look at the queues is due without anybody's waking the loop."""
        self._tick: asyncio.TimerHandle | None = None
        self._version = 0
        self._settled: list[tuple[ObjectState, Value]] = []
        self.notifying: set[Notify] = set()
        self.asking: set[asyncio.Task[Any]] = set()
        """What asks others on behalf of user threads that wait for the answer."""
        self.closed: Failed | None = None
        self.commands_by_type = self._commands_taken()
        self.records_by_type = self._records_taken()
        self.phase: Callable[[], None] | None = None
        self.buried: Callable[[ProcessId], None] | None = None
        """Told of every process that has died, once its last words were heard."""
        self.unrun: Callable[[PendingTask | PendingCall, Failed, int], None] = _nobody_asks
        """Told of every attempt to run a task that ends without a result of its own."""

    def _commands_taken(self) -> dict[type, Callable[[Any], None]]:
        """Return what is done about each command of user threads."""
        return {
            PendingTask: self._submit,
            PendingCall: self._call,
            Follow: self._follow,
            Own: self.actors.own,
            Abandon: self.actors.abandon,
            Create: self.actors.create,
            Created: self.actors.created,
            MakeGroup: self.groups.make,
            AwaitGroup: self.groups.await_ready,
            DropGroup: self.groups.drop,
            Notify: self._notify,
            Withdraw: self._withdraw,
            Want: lambda want: self.sharing.want(want.states),
            Cancel: self._cancel_object,
            Persisted: lambda persisted: self.restoring.persisted(persisted.state),
            StreamMoved: lambda moved: self._tell_producer(moved.stream),
            Say: lambda say: self.send(say.peer, say.record),
        }

    def _records_taken(self) -> dict[type, Callable[[Any, Any], None]]:
        """Return what is done about each record of a peer."""
        return {
            LeaseGranted: lambda peer, r: self.submission.granted(peer, r, time.monotonic()),
            LeaseRecalled: lambda peer, r: self.submission.recalled(peer, r.lease),
            TasksReturned: self.submission.returned,
            WorkerBlocked: lambda peer, r: self.submission.blocked(peer, r.lease, r.blocked),
            WorkerLost: self._worker_lost,
            Item: self._item,
            CancelObject: lambda peer, r: self._cancel(task_of(r.key), r.force, r.recursive),
            Fetch: self.sharing.fetch,
            Fetched: self.sharing.fetched,
            ObjectUnavailable: self.recovery.unavailable,
            Borrow: lambda peer, r: self.borrowing.asked(r.key, peer),
            Borrowed: self.sharing.borrowed,
            Unborrow: self.sharing.unborrow,
            Transfer: self.sharing.transfer,
            Held: lambda peer, r: self.borrowing.held(r.transfer),
        }

    # ------------------------------------------------------------------------------- turns

    def wake(self) -> None:
        """Have the loop look at the queues soon; cheap when it is going to anyway (any thread)."""
        if not self._awake:
            self._awake = True
            try:
                turns.leave(self._loop, self.drain, self._context)
            except BaseException:  # a signal's: nobody may take the loop for woken
                self._awake = False
                raise

    def release(self, state: ObjectState) -> None:
        """Count one reference less: at once, or soon where it holds no more than a small value (any thread).

        Who makes one call after the other drops the result of each just before the next call, which wakes the loop
        anyway. To wake it for both takes longer than the rest of what is done there.
        """
        self.released.append(state)
        if not self._looks_soon or type(state.value) is not Inline or state.contents:
            self.wake()

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Have something done on the I/O thread after some seconds (any thread)."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: this process is leaving
            self._loop.call_soon_threadsafe(self._loop.call_later, seconds, callback)

    def unpin(self, segment: str, serial: int) -> None:
        """Tell the node soon, together with others, that a segment is mapped no more (any thread).

        To wake the loop for each takes longer than to read the next one: both want the interpreter's lock.
        """
        self.unpinned.append((segment, serial))
        if not self._will_unpin:
            self._will_unpin = True
            try:
                self.later(UNPIN_SECONDS, self._unpin_all)
            except BaseException:  # a signal's
                self._will_unpin = False
                raise

    def _unpin_all(self) -> None:
        self._will_unpin = False
        while self.unpinned and self.closed is None:
            count = min(len(self.unpinned), MOST_PINS)
            self.send(self.node, SegmentsUnpinned([self.unpinned.popleft() for _ in range(count)]))

    def drain(self) -> None:
        """Work off what user threads left on the queues."""
        if self.closed is not None:
            return
        self._awake = False
        self._bus.begin_turn()
        try:
            self._work_off()
        finally:
            self._bus.end_turn()

    def _look(self) -> None:
        """Count the references that are gone of what has settled a moment ago."""
        self._looks_soon = False  # before the queue is looked at: what comes later finds it so, and wakes the loop
        self.drain()

    def _work_off(self) -> None:
        # A release is counted before the commands are taken: whatever was asked for before it, comes before it.
        releases = len(self.released)
        commands = self.commands
        handlers = self.commands_by_type
        while commands:
            command = commands.popleft()
            handlers[type(command)](command)
        if releases:
            self.sharing.release(releases)
        if self.phase is not None:
            self.phase()
        if self.tasks:
            self.counted()
        self.finish()

    def deliver(self, peer: PeerId, records: list[Record]) -> None:
        """Handle what a channel delivered."""
        if self.closed is not None:
            return
        handlers = self.records_by_type
        now = time.monotonic()
        for record in records:
            if type(record) is TaskDone:
                self._task_done(peer, record, now)  # type: ignore[arg-type]
            else:
                handlers[type(record)](peer, record)
        if len(self.tally.seconds) >= MOST_LISTED:
            self.tally.work_off()
        self.finish()

    def finish(self) -> None:
        """End a turn: wake who waits, push what can be pushed, send what is to be sent."""
        if self.closed is not None:
            return
        groups = self.groups.core
        if groups.settled or groups.given_up:
            self._take_from_groups()
        while self._settled or self.recovery.work_off():  # what is settled may settle others: tasks that need it
            settled, self._settled = self._settled, []
            if self._dead:
                settled = [pair for pair in settled if not self.recovery.came_late(*pair)]
            if not self._looks_soon:
                self._looks_soon = True
                self._loop.call_later(LOOK_SECONDS, self._look, context=self._context)
            self._table.settle(settled)
        submission, calls = self.submission, self.actors.calls
        now = time.monotonic()
        submission.pump(now)
        calls.pump(now)
        if submission.failed or calls.failed:
            failed: list[tuple[PendingTask | PendingCall, Failed]] = [*submission.failed, *calls.failed]
            submission.failed, calls.failed = [], []
            for task, failure in failed:
                self.fail(task, failure)
            self.finish()
            return
        if submission.again or calls.again or submission.pushed or calls.pushed:
            self._note_waits()
        if submission.outgoing:
            self._send_all(submission.outgoing)
        if calls.outgoing:
            self._send_all(calls.outgoing)
        if calls.questions:
            self.actors.ask()
        self.sharing.flush()
        if submission.demand_changed:
            self._publish_demand()
        if not self.groups.is_idle:
            self.groups.work_off()
        if self._tick is None and not (submission.quiet() and calls.quiet() and groups.quiet()):
            self._tick = self._loop.call_later(TICK_SECONDS, self._on_tick)

    def _finish_unless_closed(self) -> None:
        if self.closed is None:
            self.finish()

    def _take_from_groups(self) -> None:
        """Settle what has waited for placement groups."""
        groups = self.groups.core
        self._settled += groups.settled
        groups.settled = []
        given_up, groups.given_up = groups.given_up, []
        for key, failure in given_up:
            for task in self.submission.give_up(key):
                self.fail(task, failure)

    def is_dead(self, peer: PeerId) -> bool:
        """Tell whether a node or process is known to be dead."""
        return peer in self._dead

    def reread(self) -> None:
        """The broker was away: news of actors and placement groups may have been missed."""
        self.actors.reread()
        self.groups.reread()

    def send(self, peer: PeerId, record: Record) -> None:
        """Send a record on the channel to a peer."""
        self.peers.send(peer, record)

    def _send_all(self, outgoing: list[tuple[PeerId, Record]]) -> None:
        send = self.peers.send
        for peer, record in outgoing:
            send(peer, record)
        outgoing.clear()

    def _note_waits(self) -> None:
        """Note which tasks wait once more, and why, and which of those that are traced wait no more."""
        for core in (self.submission, self.actors.calls):
            for again, failure in core.again:
                if failure is not None:
                    self.unrun(again, failure, again.wire.attempt - 1)
                if again.queueing is not None:
                    again.queueing.again(again.wire, failure)
            for pushed, process in core.pushed:
                pushed.queueing.sent(pushed.wire, process)
            core.again, core.pushed = [], []

    def _on_tick(self) -> None:
        self._tick = None
        now = time.monotonic()
        self.submission.tick(now)
        self.actors.calls.tick(now)
        self.groups.core.tick(now)
        self.finish()

    def _publish_demand(self) -> None:
        self._version += 1
        now = time.monotonic()
        entries = self.submission.demand(now)
        self.groups.core.demanded(self.submission.waiting(), now)
        demand = Demand(owner=self.local, job_id=self.job, version=self._version, entries=entries, terms=self.terms)
        self._bus.publish(self._subjects.demand(self.local), encode(demand))

    def close(self, reason: Failed) -> None:
        """Give everything back; nothing is handled afterwards, and what is not ready now never will be.

        ``reason`` is what becomes of it. A second call changes nothing.
        """
        if self.closed is not None:
            return
        self.closed = reason
        self._awake = True  # nobody needs to wake what handles nothing
        if self._tick is not None:
            self._tick.cancel()
        self.submission.close()
        self._send_all(self.submission.outgoing)
        states = [*self._table.owned.values(), *self._table.borrowed.values()]
        self._table.settle([(state, reason) for state in states if state.value is None])
        self.give_up()
        while self.commands:
            command = self.commands.popleft()
            if type(command) is Notify:
                command.call_back()
        for pending in self.tasks.values():
            pending.dependencies = pending.nested = ()  # from which a way leads back to here: see ``PendingTask``
        for task in list(self.asking):
            task.cancel()

    def disown(self, reason: Failed) -> None:
        """Handle nothing any more, and tell nobody: this is a copy of the process whose state this is."""
        self.closed = reason
        self._awake = True

    # ------------------------------------------------------------------------------- tasks of this process

    def _submit(self, task: PendingTask) -> None:
        """Queue a task as soon as the objects it depends on are ready."""
        self.tasks[task.wire.number] = task
        if task.queueing is not None:
            task.queueing.queued()
        if not task.dependencies:
            task.ready_at = time.monotonic()
            self.submission.enqueue(task)
            return

        def resolved(failure: Failed | None) -> None:
            if task.cancelled:
                return
            if failure is None:
                task.ready_at = time.monotonic()
                if task.queueing is not None:
                    task.queueing.resolved()
                self.submission.enqueue(task)
            else:
                self.fail(task, failure)

        self._resolve(task, resolved)

    def _call(self, call: PendingCall) -> None:
        """Queue a call of an actor at once, since its place among others is fixed now."""
        calls = self.actors.calls
        self.tasks[call.wire.number] = call
        if call.queueing is not None:
            call.queueing.queued()
        calls.enqueue(call)
        if not call.dependencies:
            return

        def resolved(failure: Failed | None) -> None:
            if failure is None:
                if call.queueing is not None:
                    call.queueing.resolved()
                calls.resolved(call)
            elif calls.withdraw(call):
                self.fail(call, failure)

        self._resolve(call, resolved)

    def _run_again(self, task: PendingTask | PendingCall) -> bool:
        """Submit a task once more that has ended; False where its actor is not known any more, or waits for it."""
        if type(task) is PendingCall:
            calls = self.actors.calls
            if not calls.knows(task.actor) or self._is_awaited_by(task.wire.number, calls.holding_up(task.actor)):
                return False
            self._call(task)
        else:
            assert type(task) is PendingTask
            self._submit(task)
        return True

    def _is_awaited_by(self, number: TaskNumber, tasks: Sequence[PendingTask | PendingCall]) -> bool:
        """Tell whether one of the tasks cannot go on before another has ended, which may be what it is made from."""
        seen: set[TaskNumber] = set()
        left = [*tasks]
        while left:
            for ref in left.pop().dependencies:
                state, other = ref._state, task_of(ref._state.key)
                if state.value is not None or state.owner != self.local or other in seen:
                    continue
                if other == number:
                    return True
                seen.add(other)
                if (task := self.tasks.get(other)) is not None:
                    left.append(task)
        return False

    def _cancel_object(self, cancel: Cancel) -> None:
        state = cancel.state
        if state.owner == self.local:
            self._cancel(task_of(state.key), cancel.force, cancel.recursive)
        elif state.value is None:
            self.send(state.owner, CancelObject(state.key, cancel.force, cancel.recursive))

    def _cancel(self, number: TaskNumber, force: bool, recursive: bool) -> None:
        """End a task that has not ended: at once where it is queued here, by the worker that has it else."""
        task = self.tasks.get(number)
        if task is None:
            return
        if type(task) is PendingCall:
            worker = self.actors.calls.cancel(task)
            force = False  # the process is the actor's, who has other callers
        else:
            assert type(task) is PendingTask
            worker = self.submission.cancel(task)
        if worker is None:
            self.fail(task, cancelled(task.wire.name))
        else:
            self.send(worker, CancelTask(number, task.wire.attempt, force, recursive))

    def cancel_children(self, parent: int, force: bool) -> None:
        """Cancel all that a task of this process has submitted, and so on."""
        for number in [number for number, task in self.tasks.items() if task.parent == parent]:
            self._cancel(number, force, recursive=True)
        self.finish()

    def _follow(self, follow: Follow) -> None:
        if follow.uncounted:
            self.borrowing.ensure([follow.state.wire()], _nothing)
        self.actors.follow(follow)

    def _resolve(self, task: PendingTask | PendingCall, then: Callable[[Failed | None], None]) -> None:
        """Collect the values a task depends on; ``then`` is told when all are there, or which has failed."""
        waiting = [ref._state for ref in task.dependencies if ref._state.value is None]
        task.unresolved = len(waiting)

        def one(_state: ObjectState) -> None:
            task.unresolved -= 1
            if not task.unresolved:
                self._resolve(task, then)  # what was there before may have been lost meanwhile

        if not waiting:
            then(_collect(task))
            return
        self.sharing.want(waiting)
        for state in waiting:
            self._table.observe(state, one)

    def give_up_key(self, key: SchedulingKey, text: str) -> None:
        """Fail all queued tasks of a scheduling key, since no node can ever run them."""
        for task in self.submission.give_up(key):
            self.fail(task, Failed("task_unschedulable", text))
        self.finish()

    def fail(self, task: PendingTask | PendingCall, failure: Failed) -> None:
        """End a task without a result of its own, unless it has ended: all it would return is this error."""
        if self.tasks.get(task.wire.number) is not task:
            return
        if task.queueing is not None:
            task.queueing.failed(task.wire, failure)
        self.unrun(task, failure, task.wire.attempt)
        self._settle_returns(task, [failure] * abs(task.wire.returns), self.local)

    def _task_done(self, worker: ProcessId, result: TaskDone, now: float) -> None:
        task = self.submission.done(worker, result, now) if result.lease else self.actors.calls.done(worker, result)
        for reference in result.kept:
            if reference.owner == self.local:
                self.borrowing.lend(reference.key, worker)
        if task is None:
            for value in result.values:
                self.sharing.adopt(contained_in(value), worker)
                self.sharing.discard(value)
        elif result.missing:
            self._came_back(task, result.missing)
        else:
            self.tally.seconds.append(result.seconds)
            if result.fetch_seconds:
                self.tally.fetch_seconds.observe(result.fetch_seconds)
            self._settle_returns(task, result.values, worker)

    def _came_back(self, task: PendingTask | PendingCall, missing: Sequence[Stored]) -> None:
        """A task was not run, since arguments of it could not be read: have them made again, and then try anew.

        This costs none of its retries. It ends, since each time an argument was made again, which costs one of *its*
        task's; where it can be had for ever and yet never be read, after ``MOST_BOUNCES`` times.
        """
        name = task.wire.name
        if task.cancelled:
            self.fail(task, cancelled(name))
        elif type(task) is not PendingTask or task.wire.arguments in missing:
            text = f"{name}() was not run: its arguments, which were large and passed by value, were lost before."
            self.fail(task, Failed("reconstruction_put", f"{text} Pass such values as put(x, durable=True)."))
        elif task.bounces >= MOST_BOUNCES:
            text = f"{name}() was not run: {task.bounces + 1} times its arguments could not be read where it was to be."
            self.fail(task, Failed("object_lost", text))
        else:
            task.bounces += 1
            for ref in task.dependencies:
                value = ref._state.value
                if type(value) is Stored and value in missing:
                    self._table.lose(ref._state, value)
            self._submit(task)

    def _settle_returns(self, task: PendingTask | PendingCall, values: Sequence[Value], worker: ProcessId) -> None:
        number: TaskNumber = task.wire.number
        self.tasks.pop(number, None)
        if values and type(error := values[-1]) is Failed:
            self.tally.failed(task.wire.name, error.code)
        else:
            self.tally.names.append(task.wire.name)
        if task.queueing is not None and task.queueing.ended():
            self.traced_ended_at = time.monotonic()
        if task.remade:
            values = [self.recovery.outcome(task, value) for value in values]
        if task.wire.returns == STREAMING:
            failed = values[0] if values else None
            assert failed is None or type(failed) is Failed
            stream = self.streams.pop(number, None)
            if stream is not None:
                settled = stream.end(failed)
                stream.completion._state.heeded = True  # the last item speaks for it
                if failed is not None and failed.contained:
                    contents = self.sharing.adopt(failed.contained, worker)
                    for made, value in settled:
                        made.contents = contents if value is failed else ()
                self._settled += settled
            self.recovery.stream_ended(task, stream, failed)
        else:
            if values and type(failed := values[-1]) is Failed and not task.remade:
                self.unheeded.failed(number, values, failed)
            self.recovery.ended(task, self._take_values(number, values, worker))
        self.sharing.discard(task.wire.arguments)
        task.dependencies = ()
        task.nested = ()
        if type(task) is PendingCall and task.ended is not None:
            task.ended()
            task.ended = None

    def _take_values(self, number: TaskNumber, values: Sequence[Value], worker: ProcessId) -> list[int]:
        """Make the results of a task the values of its objects, but for those that have one; return which are large."""
        owned = self._table.owned
        large = []
        for index, value in enumerate(values, 1):
            state = owned.get(object_key(number, index))
            wanted = state is not None and state.value is None
            if contained := contained_in(value):
                contents = self.sharing.adopt(contained, worker)
                if state is not None and wanted:
                    state.contents = contents
            if state is None or not wanted:
                self.sharing.discard(value)
            else:
                self._settled.append((state, value))
            if state is not None and type(state.value or value) is Stored:
                large.append(index)
        return large

    def _item(self, worker: ProcessId, item: Item) -> None:
        """Take in what a generator yielded, unless it is known from a run before, or nobody wants it."""
        task = self.tasks.get(item.number)
        stream, state = None, None
        contents = self.sharing.adopt(contained_in(item.value), worker)
        if task is not None and task.wire.attempt == item.attempt:
            stream = self.streams.get(item.number)
            state = self.recovery.item(worker, item) if stream is None else stream.accept(item.index, item.value)
        if state is None:
            self.sharing.discard(item.value)
        else:
            state.contents = contents
            self._settled.append((state, item.value))
        source = (worker, item.attempt)
        if stream is not None and stream.source != source:
            stream.source = source
            if stream.closed or stream.ahead:
                self._tell_producer(stream)

    def _tell_producer(self, stream: Stream) -> None:
        """Tell the process that runs a generator, if it is known, whether and how far it should go on."""
        if stream.closed:
            self._settled += stream.drop()
        if stream.source is not None and stream.number in self.streams:
            self.send(
                stream.source[0],
                StreamClosed(stream.number) if stream.closed else StreamAdvanced(stream.number, stream.taken),
            )

    def _worker_lost(self, node: NodeId, loss: WorkerLost) -> None:
        def lose() -> None:
            if self.closed is None:
                self.submission.lost(node, loss)
                self.finish()

        self._loop.call_later(LOSS_GRACE_SECONDS, lose)

    # ------------------------------------------------------------------------------- objects

    def _notify(self, notify: Notify) -> None:
        state = notify.state
        if state.value is None:
            self.sharing.want((state,))
        self.notifying.add(notify)

        def observer(_state: ObjectState) -> None:
            self._call_back(notify)

        notify.observer = observer
        self._table.observe(state, observer)

    def _withdraw(self, withdraw: Withdraw) -> None:
        notify = withdraw.notice
        self.notifying.discard(notify)
        if notify.observer is not None:
            self._table.ignore(notify.state, notify.observer)

    def _call_back(self, notify: Notify) -> None:
        self.notifying.discard(notify)
        notify.call_back()

    def give_up(self) -> None:
        """Have everyone who waits look again, although nothing became ready."""
        self._table.release_all()
        for notify in list(self.notifying):
            self._call_back(notify)

    def settle(self, state: ObjectState, value: Value) -> None:
        """Make one object ready (in a turn of its own)."""
        self._settle(state, value)
        self._finish_unless_closed()

    def _settle(self, state: ObjectState, value: Value) -> None:
        self._settled.append((state, value))

    def _forgotten(self, state: ObjectState) -> None:
        self.restoring.forget(state)
        if state in self.actors.handles:
            self.actors.released(state)
        self.groups.core.released(state)
        if state.owner == self.local:
            self.recovery.forgotten(state)
            if type(state.value) is Failed:
                self.unheeded.forgotten(state, state.value)

    # ------------------------------------------------------------------------------- deaths

    def process_died(self, process: ProcessId) -> None:
        """A process of the cluster is gone, and with it what it owned and held; its last words may still come."""
        if process not in self._dead and process != self.local:
            self._dead.add(process)
            self._loop.call_later(LOSS_GRACE_SECONDS, self._bury, process)

    def _bury(self, process: ProcessId) -> None:
        if self.closed is not None:
            return
        self.peers.forget(process)
        self.actors.calls.process_died(process, time.monotonic())
        if self.buried is not None:
            self.buried(process)
        self.sharing.process_died(process)
        self.finish()

    def node_died(self, node: NodeId, reason: str) -> None:
        """A node of the cluster is gone, and all its processes.

        If it is that of this process, everybody else takes this process for dead. A worker process is about to be
        killed; a driver lives on, and can only begin anew.
        """
        if self.closed is not None:
            return
        self._dead.add(node)
        processes = [
            ProcessId(peer) for peer in self.peers.known() if len(peer) > len(node) and node_of(ProcessId(peer)) == node
        ]
        self.peers.forget(node)
        if node == self.node:
            for process in processes:
                self.peers.forget(process)
            self.close(
                Failed(
                    "local_node_died",
                    f"The node {node}, to which this process belonged, died: {reason}. With it went this process's job "
                    "and objects; call shutdown() and init() to begin anew.",
                )
            )
            return
        self.recovery.node_died(node)
        self.nodes.node_died(node)
        self.submission.node_lost(node, f"its node {node} died: {reason}")
        for process in processes:
            self._dead.add(process)
            self._bury(process)
        self.finish()


def _collect(task: PendingTask | PendingCall) -> Failed | None:
    """Give a task the values it depends on; return the first that has failed, if any has."""
    values: list[Value] = []
    for ref in task.dependencies:
        value = ref._state.value
        assert value is not None
        if type(value) is Failed:
            ref._state.heeded = True
            return msgspec.structs.replace(value, kept_from=task.wire.name)
        values.append(value)
    task.wire.dependencies = tuple(values)
    if type(task) is PendingCall and any(type(value) is Stored for value in values):
        task.wire.origins = tuple([ref._state.wire() for ref in task.dependencies])
    return None


def _nothing() -> None:
    """Nobody waits for an owner's answer."""


def _nobody_asks(task: PendingTask | PendingCall, failure: Failed, attempt: int) -> None:
    """Nobody wants to know how tasks ended."""
