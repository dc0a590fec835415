"""A process's part in the cluster, as its user threads see it: submit, put, get, wait.

``Runtime.open`` starts the I/O thread and returns when the process is connected; ``close`` ends it. In between
any thread may use it. ``Runtime.current`` is the runtime of this process; there is at most one at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from shoal_core import telemetry
from shoal_core.bus.bulk import BulkAddress
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask
from shoal_core.bus.tracing import ENABLED
from shoal_core.protocol.actors import ActorDescription, ActorRecord, CreateActor, KillActor
from shoal_core.protocol.errors import (
    BusError,
    PendingCallsLimitExceeded,
    RuntimeEnvSetupError,
    ShoalError,
)
from shoal_core.protocol.groups import GroupDescription
from shoal_core.protocol.ids import (
    ActorId,
    FunctionId,
    JobId,
    LeaseId,
    ObjectKey,
    PlacementGroupId,
    ProcessId,
    TaskNumber,
    actor_id,
    group_id,
    is_call,
    node_of,
    object_key,
    task_of,
    told_task_id,
)
from shoal_core.protocol.messages import GetJob, JobConfig, JobRecord, Message
from shoal_core.protocol.records import Failed, InGroup, Inline, Reference, Task, Value
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.traces import UNRECORDED
from shoal_core.protocol.wire import decode
from shoal_core.runtime.commands import Cancel, Notify, Persisted, StreamMoved, Withdraw
from shoal_core.runtime.data.durable import DurableTier, Restoring
from shoal_core.runtime.data.failures import culprit, error_of, failure
from shoal_core.runtime.data.serialization import INLINE_BYTES, Codec, Dependency, Serialized
from shoal_core.runtime.data.transfers import Transfers
from shoal_core.runtime.data.values import Values
from shoal_core.runtime.environments import Fields
from shoal_core.runtime.getting import Getting
from shoal_core.runtime.loop.spinning import Spin
from shoal_core.runtime.loop.turns import check_may_wait, is_here, run_here, visit
from shoal_core.runtime.ownership import objects
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable
from shoal_core.runtime.ownership.streams import STREAMING, ObjectRefGenerator, Stream
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.reports.holdings import Holdings
from shoal_core.runtime.reports.recent import Recent
from shoal_core.runtime.reports.reporting import Reporter
from shoal_core.runtime.reports.standings import Standings
from shoal_core.runtime.tasks.actors import Abandon, Create, Created, Follow, Own
from shoal_core.runtime.tasks.calls import PendingCall
from shoal_core.runtime.tasks.functions import Definition, Exported, FunctionStore
from shoal_core.runtime.tasks.pending import PendingCounter
from shoal_core.runtime.tasks.placement_groups import AwaitGroup, DropGroup, MakeGroup
from shoal_core.runtime.tasks.submission import PendingTask, SchedulingClass, SchedulingKey
from shoal_core.runtime.worker.work import Ended, current

if TYPE_CHECKING:
    from shoal_core.runtime.worker.hosting import Hosting
if TYPE_CHECKING or ENABLED:
    from shoal_core.bus.spans import is_open, is_wanted
    from shoal_core.runtime.reports import spans

T = TypeVar("T")

REQUEST_SECONDS = 60.0
NO_ARGUMENTS = Inline(b"")
LEFT = Failed("system", "The object is out of reach: this process left the cluster before it was ready.")
FORKED = Failed("system", "This process was forked from one of the cluster's, and is not of the cluster itself.")


@dataclass(frozen=True, slots=True)
class Call:
    """All that calls of one remote function with the same options share."""

    function: FunctionId
    name: str
    returns: int
    key: SchedulingKey
    retries: int
    retry_on: bytes
    ahead: int = 0
    in_group: InGroup | None = None


@dataclass(frozen=True, slots=True)
class MethodCall:
    """All that calls of one method of an actor with the same options share; ``name`` is for people."""

    actor: ActorId
    method: str
    name: str
    returns: int
    retries: int
    retry_on: bytes
    group: str = ""
    unordered: bool = False
    ahead: int = 0


class Runtime:
    """One process of the cluster; see the module."""

    current: ClassVar[Runtime | None] = None

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        local: ProcessId,
        shared_memory: Path | None,
        address: str,
        bulk: BulkAddress | None = None,
        credentials: Credentials | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self.address = address
        self.credentials = credentials
        self.tls = tls
        self.bus = bus
        self.subjects = subjects
        self.local = local
        self.node = node_of(local)
        self.loop = asyncio.get_running_loop()
        self.objects = ObjectTable(self, local)
        self.reactor = Reactor(bus, subjects, local, self.objects)
        self.reporter = Reporter(bus, subjects, self.reactor)
        self.codec = Codec(self.objects.remember)
        self.reactor.restoring = Restoring(
            bus, subjects, None if shared_memory is None else self.node, self.reactor, DurableTier(bus, subjects)
        )
        self.transfers: Transfers | None = None
        if shared_memory is None and bulk is not None:
            self.transfers = Transfers(bus, subjects, local, bulk, self.reactor, self.call)
        self.values = Values(bus, subjects, local, shared_memory, self.transfers, self.codec, self.reactor, self.call)
        self.getting = Getting(self.objects, self.values, self.reactor, self.command, self.call)
        self.reactor.recovery.restore = self.reactor.restoring.own
        self.holdings = Holdings(self.reactor, self.objects)
        self.standings = Standings(self.reactor)
        self.functions = FunctionStore(bus, subjects)
        self.recent = Recent(self.reactor, lambda function: self.functions.name_of(self.job, function))
        self.ended: Callable[[Ended], None] = _nobody_runs
        self.namespace = ""
        self.environment: Fields = {}
        """The runtime environment of this process, and of what it submits unless that says otherwise."""
        self.unfit: RuntimeEnvSetupError | None = None
        """Why this process runs nothing: its environment could not be set up."""
        self.hosting: Hosting | None = None
        self.puts_durably = False
        """Whether what is put here is durable unless it is said not to be: so in the process of a detached actor."""
        self._numbers = itertools.count(1)
        self._actor_numbers = itertools.count(1)
        self._group_numbers = itertools.count(1)
        self._commands = self.reactor.commands
        self._spin = Spin(seconds=0.001)

    def release(self, state: ObjectState) -> None:
        """Count one reference less (any thread, in a finalizer)."""
        self.reactor.release(state)

    def command(self, command: Any) -> None:
        """Leave a command for the I/O thread (any thread)."""
        self._commands.append(command)
        self.reactor.wake()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the I/O thread and wait for its result (user threads only).

        When this process leaves the cluster meanwhile, raise why.
        """
        try:
            check_may_wait(self.loop)
        except RuntimeError:
            coroutine.close()
            raise
        if self.reactor.closed is not None:
            coroutine.close()
            raise error_of(self.reactor.closed)
        future = asyncio.run_coroutine_threadsafe(self._unless_closed(coroutine), self.loop)
        visit(self.loop, future.done, None, self._spin)
        return future.result()

    def send_now(self) -> None:
        """Return when what this thread has left for the I/O thread is sent; where it runs the loop itself, at once."""
        if is_here(self.loop) or self.reactor.closed is not None:
            return
        if not run_here(self.loop, self.reactor.drain):
            asyncio.run_coroutine_threadsafe(self._drain(), self.loop).result()

    async def send_soon(self) -> None:
        """Return when what this thread has left for the I/O thread is sent (on an event loop of an actor)."""
        if self.reactor.closed is None:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._drain(), self.loop))

    async def _drain(self) -> None:
        self.reactor.drain()

    async def _unless_closed(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return what a coroutine returns, unless this process leaves the cluster before its end (I/O thread)."""
        reactor, task = self.reactor, asyncio.current_task()
        assert task is not None
        if reactor.closed is not None:
            coroutine.close()
            raise error_of(reactor.closed)
        reactor.asking.add(task)
        try:
            return await coroutine
        except asyncio.CancelledError:
            if reactor.closed is None:
                raise
            raise error_of(reactor.closed) from None
        finally:
            reactor.asking.discard(task)

    @property
    def job(self) -> JobId:
        """The job this process works for; empty for a worker that serves none yet."""
        return self.reactor.job

    def job_of(self, owner: ProcessId) -> JobId:
        """Return the job of a process that this one exchanges references with: they share it."""
        return self.reactor.job

    # ------------------------------------------------------------------------------- tasks

    def export(self, job: JobId, exported: Exported) -> None:
        """Make a function known to a job's workers; returns when they can fetch it."""
        if not self.functions.is_uploaded(job, exported.function_id):
            self.call(self.functions.upload(job, exported))

    @property
    def priority(self) -> int:
        """The priority of the task that runs here: what it submits has it too."""
        running = current.get()
        return 0 if running is None else running.task.priority

    def scheduling_key(self, scheduling_class: SchedulingClass) -> SchedulingKey:
        """Return the queue that tasks of a scheduling class share."""
        return self.reactor.submission.key_for(scheduling_class)

    def _key_by_priority(self, key: SchedulingKey, wire: Task) -> SchedulingKey:
        """Return the queue of a new task, which has the priority of the task that submits it if none of its own."""
        own = key.scheduling_class.priority
        if own is None and wire.priority:
            return self.scheduling_key(replace(key.scheduling_class, priority=wire.priority))
        wire.priority = own or 0
        return key

    def submit(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Start a task and return the references to what it will return; never waits for the task.

        Of a generator, the one thing returned is an ``ObjectRefGenerator``.
        """
        dependencies: Sequence[ObjectRef[Any]] = ()
        nested: Sequence[ObjectRef[Any]] = ()
        arguments: Value = NO_ARGUMENTS
        number = self._draw_number()
        began_ns = time.time_ns() if ENABLED and is_wanted() else 0
        if args or kwargs:
            arguments, dependencies, nested = self._arguments(call.name, number, args, kwargs)
        wire = self._wire(number, call.function, call.name, call.returns, arguments, call.retry_on, began_ns)
        wire.in_group = call.in_group
        refs = self._returns(wire, call.ahead)
        key = self._key_by_priority(call.key, wire)
        queueing = spans.queueing_of(wire, [ref._state for ref in refs]) if began_ns else None
        self._commands.append(PendingTask(wire, key, call.retries, dependencies, nested, _parent(), queueing=queueing))
        self.reactor.wake()
        return refs

    def call_actor(
        self,
        call: MethodCall,
        handle: ObjectRef[Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        counter: PendingCounter | None = None,
    ) -> list[Any]:
        """Call a method and return the references to what it will return; never waits for the actor.

        ``handle`` is the reference behind the caller's handle, which the call holds until it ends. Raises
        ``PendingCallsLimitExceeded`` where ``counter`` allows no more.
        """
        if counter is not None and not counter.rise():
            raise PendingCallsLimitExceeded(
                f"{call.name}.remote() was refused: {counter.most} calls of this handle have not ended "
                "(max_pending_calls). Get some of their results first."
            )
        dependencies: Sequence[ObjectRef[Any]] = ()
        nested: Sequence[ObjectRef[Any]] = ()
        arguments: Value = NO_ARGUMENTS
        number = TaskNumber(self._draw_number() + 1)  # odd: a call (see ``ids``)
        began_ns = time.time_ns() if ENABLED and is_wanted() else 0
        try:
            if args or kwargs:
                arguments, dependencies, nested = self._arguments(call.name, number, args, kwargs)
            wire = self._wire(
                number, FunctionId(call.method), call.name, call.returns, arguments, call.retry_on, began_ns
            )
        except BaseException:
            if counter is not None:
                counter.fall()
            raise
        wire.group = call.group
        refs = self._returns(wire, call.ahead)
        holds = [*nested, handle]
        self._commands.append(
            PendingCall(
                call.actor,
                wire,
                call.retries,
                dependencies,
                holds,
                call.unordered,
                counter.fall if counter is not None else None,
                _parent(),
                queueing=spans.queueing_of(wire, [ref._state for ref in refs]) if began_ns else None,
            )
        )
        self.reactor.wake()
        return refs

    def _draw_number(self) -> TaskNumber:
        """Draw the number of a task that is no call, or of an object that no task makes."""
        return TaskNumber(2 * next(self._numbers))

    def _wire(
        self,
        number: TaskNumber,
        function: FunctionId,
        name: str,
        returns: int,
        arguments: Value,
        retry_on: bytes,
        began_ns: int,
    ) -> Task:
        """Return a new task as it travels; its submission began at ``began_ns``, if it is traced (else 0)."""
        self.getting.check_open()
        running = current.get()
        wire = Task(
            number,
            0,
            LeaseId(0),
            0,
            function,
            name,
            returns,
            arguments,
            (),
            retry_on,
            created_at=time.time(),
        )
        if running is not None:
            submitter = running.task
            wire.depth, wire.priority = submitter.depth + 1, submitter.priority
            wire.parent, wire.parent_owner = submitter.number, running.owner
        elif self.hosting is not None:
            wire.parent_owner = self.hosting.assigned.actor
        if ENABLED:
            wire.trace = spans.submitted(wire, self.local, self.job, began_ns) if began_ns else UNRECORDED
        return wire

    @property
    def submitter(self) -> str:
        """The id of the task that submits something here: of an actor outside of calls its own, "" for the driver."""
        if (running := current.get()) is not None:
            return told_task_id(running.owner, running.task.number)
        return "" if self.hosting is None else self.hosting.assigned.actor

    def _returns(self, wire: Task, ahead: int) -> list[Any]:
        """Make the references to what a task will return, or its generator."""
        if wire.returns == STREAMING:
            wire.ahead = ahead
            stream = self.reactor.streams[wire.number] = Stream(self.objects, wire.number, ahead)
            return [ObjectRefGenerator(self, stream)]
        create = self.objects.create
        first = object_key(wire.number, 1)
        return [create(ObjectKey(first + index)) for index in range(wire.returns)]

    def _arguments(
        self, name: str, number: TaskNumber, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Value, Sequence[ObjectRef[Any]], Sequence[ObjectRef[Any]]]:
        """Serialize arguments; references among them become dependencies, those inside them are nested.

        Where they are large, they lie in a segment as the task's object 0, which no reference ever names.
        """
        dependencies: list[ObjectRef[Any]] = []
        serialized = self._serialize(name, args, kwargs, dependencies)
        return self.values.place(serialized, self.local, object_key(number, 0)), dependencies, serialized.references

    def _serialize(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], dependencies: list[ObjectRef[Any]]
    ) -> Serialized:
        """Serialize arguments without the references among them, which go into ``dependencies``."""

        def substitute(value: Any) -> Any:
            if type(value) is not ObjectRef:
                return value
            dependencies.append(value)
            return Dependency(len(dependencies) - 1)

        args = tuple([substitute(arg) for arg in args])
        if kwargs:
            kwargs = {key: substitute(value) for key, value in kwargs.items()}
        try:
            return self.codec.dump_arguments(args, kwargs)
        except (TypeError, pickle.PicklingError, AttributeError, RuntimeError, ValueError) as error:
            raise TypeError(
                f"The arguments of {name}.remote() cannot be sent to a worker: "
                f"{culprit(self.codec, args, kwargs, error)}"
            ) from error

    # ------------------------------------------------------------------------------- actors

    def trace_of_actor(self, class_name: str, actor: ActorId, job: JobId, began_ns: int) -> str:
        """Return the trace of an actor's making, which was begun at ``began_ns``; "" where this process traces none."""
        return spans.created(class_name, actor, job, began_ns) if ENABLED else ""

    def new_actor(self) -> tuple[ActorId, ObjectRef[Any]]:
        """Draw the id of an actor that this process creates, and make its creation object."""
        ref = self.objects.create(object_key(self._draw_number(), 0))
        return actor_id(self.local, next(self._actor_numbers)), ref

    def made_of(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Inline, list[Reference], Reference | None, list[ObjectRef[Any]]]:
        """Serialize what an actor is made of: arguments, references among them, or one large object; and all held."""
        dependencies: list[ObjectRef[Any]] = []
        serialized = self._serialize(name, args, kwargs, dependencies)
        names = [ref._state.wire() for ref in dependencies]
        if serialized.raw or serialized.size_bytes > INLINE_BYTES:
            ref = self._put(serialized)
            return NO_ARGUMENTS, names, ref._state.wire(), [ref, *dependencies]
        return serialized.inline(), names, None, [*dependencies, *serialized.references]

    def create_actor(self, description: ActorDescription, spec: bytes, holds: Sequence[ObjectRef[Any]]) -> None:
        """Have an actor without a name created; never waits. What goes wrong comes out of its calls."""
        self.command(Create(description, spec, holds))

    def create_named_actor(
        self,
        description: ActorDescription,
        spec: bytes,
        holds: Sequence[ObjectRef[Any]],
        handle: ObjectRef[Any],
        get_if_exists: bool,
    ) -> ActorRecord:
        """Have an actor with a name created, or find the one that has it; waits for the control store only.

        Raises ``ActorAlreadyExistsError`` where the name is taken and ``get_if_exists`` is not set.
        """
        request = CreateActor(description=description, spec=spec, get_if_exists=get_if_exists)
        try:
            record = self.ask_gcs("create_actor", request)
        except BusError:
            self.command(Abandon(description.actor_id))
            raise
        assert isinstance(record, ActorRecord)
        if record.description.actor_id == description.actor_id:
            if not description.detached:
                self.own_actor(description, handle)
            self.command(Created(description.actor_id, holds))
        return record

    def kill_actor(self, actor: ActorId, *, no_restart: bool, reason: str) -> None:
        """Have an actor killed; returns when the control store has recorded it (user threads only)."""
        request = KillActor(actor_id=actor, no_restart=no_restart, reason=reason)
        self.call(self.reactor.actors.kill(request))

    def own_actor(self, description: ActorDescription, handle: ObjectRef[Any]) -> None:
        """Have an actor of this process go when nobody refers to its creation object any more."""
        self.command(Own(description.actor_id, handle._state))

    # ------------------------------------------------------------------------------- placement groups

    @property
    def in_group(self) -> InGroup | None:
        """The placement group in which runs what this context belongs to, None if it is in none."""
        if self.hosting is not None:
            return self.hosting.in_group
        running = current.get()
        return None if running is None else running.task.in_group

    def new_group(self) -> PlacementGroupId:
        """Draw the id of a placement group that this process makes."""
        return group_id(self.local, next(self._group_numbers))

    def make_group(self, description: GroupDescription) -> None:
        """Have a group without a name made; never waits. What goes wrong comes out of what waits for the group."""
        self.getting.check_open()
        self.command(MakeGroup(description))

    def await_group(self, group: PlacementGroupId, value: Inline) -> ObjectRef[Any]:
        """Return a reference to an object of this value, which is ready as soon as a group is."""
        self.getting.check_open()
        ref = self.objects.create(object_key(self._draw_number(), 0))
        self.command(AwaitGroup(group, ref._state, value))
        return ref

    def group_is_created(self, group: PlacementGroupId) -> bool:
        """Tell whether a group is known to have all its bundles; where it is not, ``await_group`` finds out."""
        self.getting.check_open()
        return self.reactor.groups.core.is_created(group)

    def remove_group(self, group: PlacementGroupId, reason: str) -> None:
        """Have a group removed; never waits."""
        self.getting.check_open()
        self.command(DropGroup(group, reason))

    def ask_about_groups(self, verb: str, message: Message, timeout_seconds: float = REQUEST_SECONDS) -> Message:
        """Ask the control store about groups, after all that was done to them here (user threads only)."""
        return self.call(self.reactor.groups.ask(verb, message, timeout_seconds))

    def groups_told(self) -> None:
        """Return when the control store has heard of the groups that were made here (user threads only)."""
        self.call(self.reactor.groups.told(REQUEST_SECONDS))

    # ------------------------------------------------------------------------------- what the control store knows

    def ask_gcs(self, verb: str, message: Message) -> Message:
        """Ask the control store something and wait for the answer (user threads only)."""
        return self.call(ask(self.bus, self.subjects.gcs(verb), message, timeout_seconds=REQUEST_SECONDS))

    def follow(
        self,
        actor: ActorId,
        name: str,
        ref: ObjectRef[Any],
        *,
        sequential: bool,
        new: bool = False,
        uncounted: bool = False,
    ) -> None:
        """Hear of an actor for as long as the reference behind its handle lives (see ``actors.Follow``)."""
        self.command(Follow(actor, name, sequential, ref._state, new, uncounted))

    def call_seconds(self, actor: ActorId) -> float | None:
        """Return how long calls of an actor take as a rule, as far as this process knows (any thread)."""
        return self.reactor.actors.calls.seconds(actor)

    def token(self) -> ObjectRef[Any]:
        """Return a reference to nothing, by whose end the end of a handle is noticed that nobody counts."""
        return self.objects.create(object_key(self._draw_number(), 0))

    def function(self, function_id: FunctionId, data: bytes = b"") -> Definition:
        """Return a function of the job, of its pickle or fetched at its first use (user threads only)."""
        definition = self.functions.known(self.job, function_id)
        if definition is None:
            data = data or self.call(self.functions.download(self.job, function_id))
            definition = self.functions.load(self.job, function_id, data)
        return definition

    def job_config(self, job: JobId, told: bytes) -> JobConfig:
        """Return what a job's processes need to know of it, as ``told`` with the lease or asked (user threads only)."""
        if told:
            config = decode(JobConfig, told)
        else:
            record = self.ask_gcs("get_job", GetJob(job_id=job))
            assert isinstance(record, JobRecord)
            config = record.config
        self.namespace = config.namespace
        self.reactor.terms = config.terms
        return config

    # ------------------------------------------------------------------------------- objects

    def put(self, value: Any, *, durable: bool | None = None, keep_seconds: float | None = None) -> ObjectRef[Any]:
        """Make an object of a value and return a reference to it; see ``shoal.put`` for durable ones."""
        serialized = self.codec.dump(value)
        if ENABLED and is_open():
            with spans.putting(serialized.size_bytes):
                return self._put_as(serialized, durable, keep_seconds)
        return self._put_as(serialized, durable, keep_seconds)

    def _put_as(self, serialized: Serialized, durable: bool | None, keep_seconds: float | None) -> ObjectRef[Any]:
        if durable or (durable is None and self.puts_durably):
            return self._put_durably(serialized, keep_seconds)
        return self._put(serialized)

    def _put_durably(self, serialized: Serialized, keep_seconds: float | None) -> ObjectRef[Any]:
        self.getting.check_open()
        ref = self.objects.create(object_key(self._draw_number(), 0))
        state = ref._state
        state.contents = serialized.references
        state.value = self.values.place_durably(serialized, state.key, keep_seconds)
        self.command(Persisted(state))
        return ref

    def _put(self, serialized: Serialized) -> ObjectRef[Any]:
        self.getting.check_open()
        ref = self.objects.create(object_key(self._draw_number(), 0))
        state = ref._state
        state.contents = serialized.references
        placed = self.values.place(serialized, self.local, state.key)
        # Nobody else knows the object yet, so nobody can be waiting for it.
        state.value = placed
        return ref

    def put_failure(self, name: str, error: BaseException) -> ObjectRef[Any]:
        """Make an object in whose place there is an exception, of the task of that name, and return a reference."""
        self.getting.check_open()
        failed, pickled = failure(self.codec, name, error)
        ref = self.objects.create(object_key(self._draw_number(), 0))
        ref._state.contents, ref._state.value = pickled.references, failed
        ref._state.heeded = True  # whoever reads it is in another process, and this one is not told
        return ref

    def get(self, refs: Sequence[ObjectRef[Any]], timeout_seconds: float | None) -> list[Any]:
        """Return the values of references in order; the first error among them is raised as soon as it is known.

        A copy that turns out to be lost is waited for until it has come again.
        """
        states = [ref._state for ref in refs]
        if not ENABLED or (place := spans.place_of(states)) is None:
            return self.getting.get(states, timeout_seconds)
        with spans.retrieving("get", place, len(states)):
            return self.getting.get(states, timeout_seconds)

    def wait(
        self, refs: Sequence[ObjectRef[Any]], count: int, timeout_seconds: float | None
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """Return the first ``count`` references that are ready and the others, both in the order given."""
        if ENABLED and is_open():  # else loops of ``wait`` would fill the first task's trace
            place = spans.place_of([ref._state for ref in refs])
            assert place is not None
            with spans.retrieving("wait", place, len(refs)):
                return self.getting.wait(refs, count, timeout_seconds)
        return self.getting.wait(refs, count, timeout_seconds)

    def waiter(self) -> Callable[[bool], None] | None:
        """Return whom to tell when what runs in this context waits, if it holds a CPU that others may need."""
        return self.getting.waiter() if self.hosting is None or self.hosting.is_sequential else None

    def cancel(self, ref: ObjectRef[Any], *, force: bool, recursive: bool) -> None:
        """Cancel the task that makes an object, if it has not ended (any thread).

        Raises ``ValueError`` where ``force`` is asked for a call of an actor.
        """
        state = ref._state
        if force and is_call(task_of(state.key)):
            raise ValueError("force=True is not supported for calls of actors; kill() ends the actor itself.")
        self.command(Cancel(state, force, recursive))

    def move_stream(self, stream: Stream) -> None:
        """Tell the producer of a stream that items were taken, or that nobody wants more (any thread)."""
        self.command(StreamMoved(stream))

    def notify(self, state: ObjectState, callback: Callable[[], None]) -> Notify:
        """Call back on the I/O thread when an object is ready, or out of reach; return the notice (any thread)."""
        notice = Notify(state, callback)
        self.command(notice)
        if self.reactor.closed is not None:
            notice.call_back()
        return notice

    def withdraw(self, notice: Notify) -> None:
        """Nobody waits for a notice any more (any thread)."""
        self.command(Withdraw(notice))

    def aside(self, work: Callable[[], None]) -> None:
        """Do something in another thread than the I/O thread: this one, or one of the loop's pool."""
        if is_here(self.loop):
            self.loop.run_in_executor(None, work)
        else:
            work()

    def pin(self, ref: ObjectRef[Any]) -> None:
        """Keep an object until the job ends, and find its reference again when it is unpickled (any thread)."""
        self.objects.remember(ref)
        self.reactor.pinned.append(ref)

    def load(self, state: ObjectState) -> Any:
        """Return the value of an object, or raise its error, or why it will not be ready; waits where it was lost."""
        value = state.value
        if value is None:
            self.check()
        if type(value) is Inline:
            return self.values.of(state)
        return self.getting.get([state], None)[0]

    def awaited(self, state: ObjectState, began_ns: int) -> None:
        """An object was awaited, which is traced like a ``get`` (any thread)."""
        if ENABLED:
            spans.retrieved(state, began_ns)

    def check(self) -> None:
        """Raise why nothing becomes ready, if there is a reason (any thread)."""
        self.getting.check()

    def send_spans(self) -> None:
        """Have spans be sent, here and by idle worker processes, which the end of the job would kill (user threads)."""
        if ENABLED:
            sent_at = self.reactor.traced_ended_at + telemetry.SENT_SECONDS
            telemetry.flush(telemetry.SECONDS)
            time.sleep(max(0.0, sent_at - time.monotonic()))

    def close(self, reason: Failed = LEFT) -> None:
        """Stop handling anything; ``reason`` is what becomes of all that is not ready (I/O thread)."""
        self.reactor.close(reason)
        self.values.close()
        if self.transfers is not None:
            self.transfers.close()

    def disown(self) -> None:
        """Be no process of the cluster: this one is a copy, made by a fork, without the I/O thread (in the child)."""
        self.objects.lock = threading.Lock()  # the thread that held the other may be gone
        self.reporter.measures.disown()
        self.reactor.disown(FORKED)

    def obstruct(self, obstacle: Callable[[], ShoalError] | None) -> None:
        """Have whoever waits, or begins to, raise this error instead, until None is said (I/O thread)."""
        self.getting.obstacle = obstacle
        if obstacle is not None:
            self.reactor.give_up()

    def install(self) -> None:
        """Make this the process's runtime."""
        Runtime.current = self
        objects.install(self._restore)

    def uninstall(self) -> None:
        """Undo ``install``."""
        if Runtime.current is self:
            Runtime.current = None
        objects.uninstall(self._restore)

    def _restore(self, owner: ProcessId, key: ObjectKey) -> ObjectRef[Any]:
        return self.objects.restore(Reference(owner, key))


def _parent() -> int:
    """Return the order of the task that runs in this thread, 0 where none does."""
    running = current.get()
    return 0 if running is None else running.order


def _nobody_runs(ended: Ended) -> None:
    raise RuntimeError("this process runs no tasks")
