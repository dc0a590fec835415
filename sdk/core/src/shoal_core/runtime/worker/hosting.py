"""The actor of a worker process: its instance, and the threads or the loop that run its methods.

=============  ============================================  ====================================================
kind           where methods run                             how many at once
=============  ============================================  ====================================================
plain          the main thread                               one
threaded       pools of threads, one for each group          the group's number
async          event loops, one for each group, that of the  the group's number of coroutines, others wait in order
               default group on the main thread
=============  ============================================  ====================================================

An actor is async if any of its methods is ``async def``, else threaded if more than one call may run at once. Methods
of an async actor that are not ``async`` run on the loop as well, and hold it up, but no other group's; as a rule at
once, in no task of their own, which is made only if they return something to await. Calls of a group begin in the order
in which they came.

The actor leaves when a method raises ``ActorExit`` (``exit_actor()``, ``__ray_terminate__``, ``sys.exit(0)``), or when
its node says that nobody has a handle of it any more. The call in which it left is not answered: its caller hears that
the actor has died. ``sys.exit`` with anything but 0 is a crash, as in Ray: the actor may be started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import pickle
import queue
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import BuiltinMethodType
from typing import TYPE_CHECKING, Any

import msgspec
from setproctitle import setproctitle

from shoal_core.bus.tracing import ENABLED
from shoal_core.protocol.actors import MOST_ERROR_BYTES, MOST_REPR_CHARACTERS, ActorRecord
from shoal_core.protocol.ids import FunctionId
from shoal_core.protocol.records import ActorAssigned, InGroup, Inline, LeaseAssigned, Reference
from shoal_core.runtime.data.failures import lasting_failure, sendable
from shoal_core.runtime.loop.turns import attended
from shoal_core.runtime.worker.work import Accepted, Work, begin, fill_in

if TYPE_CHECKING:
    from shoal_core.runtime.runtime import Runtime
if TYPE_CHECKING or ENABLED:
    from shoal_core.runtime.reports import spans

DEFAULT_GROUP = ""
ASYNC_CONCURRENCY = 1000


class ActorExit(BaseException):
    """Leaves a method to end its actor; no error of any call."""


class ActorSpec(msgspec.Struct, array_like=True, frozen=True):
    """What the process of an actor needs to make it.

    ``arguments`` are the pickled ``(args, kwargs)``, in which a ``Dependency`` stands for each of ``dependencies``;
    where they are too large to be kept in a record they are an object, ``whole``. ``concurrency`` is how many calls
    run at once outside the groups, 0 where nothing was said. ``in_group`` is the placement group it is made in.
    ``code`` is the pickle of the class where that is small, so that nobody need ask for it; else it is empty.
    """

    function: FunctionId
    arguments: Inline
    dependencies: list[Reference] = []
    whole: Reference | None = None
    concurrency: int = 0
    groups: dict[str, int] = {}
    in_group: InGroup | None = None
    code: bytes = b""


_SPECS = msgspec.msgpack.Decoder(ActorSpec)  # made here, where all worker processes share it


@dataclass(slots=True)
class Outcome:
    """What became of making the instance; ``error`` is the pickled exception, if there was one."""

    reason: str = ""
    error: bytes = b""


@dataclass(frozen=True, slots=True)
class Left:
    """The actor ends by its own will; with a ``status`` other than 0 that counts as a crash of its process."""

    reason: str
    status: int = 0


class Hosting:
    """The actor of this process. ``tell`` hands an ``Outcome`` and ``Left`` to the I/O thread.

    ``left``: it runs nothing more.
    """

    def __init__(self, runtime: Runtime, assigned: ActorAssigned, tell: Callable[[Any], None]) -> None:
        self.assigned = assigned
        self.lease: LeaseAssigned = assigned.lease
        self.instance: Any = None
        self._spec = spec = _SPECS.decode(assigned.spec)
        self.in_group = spec.in_group
        self.references = [*spec.arguments.contained, *spec.dependencies]
        if spec.whole is not None:
            self.references.append(spec.whole)
        self._runtime = runtime
        self._tell = tell
        self._group_names: dict[str, str] = {}
        self._groups: dict[str, _Pool | _Loop] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._maker: asyncio.Task[None] | None = None  # kept, since a loop holds its tasks weakly
        self.left = False
        self.repr_name = ""

    @cached_property
    def record(self) -> ActorRecord:
        """The actor's record; decoded when it is first asked for, which it seldom is."""
        return ActorRecord.model_validate_json(self.assigned.record)

    @property
    def label(self) -> str:
        """What people are shown of the actor."""
        return self.repr_name or self.assigned.class_name

    @property
    def is_sequential(self) -> bool:
        """Whether the main thread runs one call after the other."""
        return not self._groups

    @property
    def restarted(self) -> bool:
        """Whether this is not the actor's first incarnation."""
        return self.assigned.incarnation > 0

    # ------------------------------------------------------------------------------- the main thread

    def make(self) -> None:
        """Make the instance; an async actor's loop runs here until the actor leaves."""
        setproctitle(f"shoal: {self.assigned.class_name}")
        if (unfit := self._runtime.unfit) is not None:
            self._tell(Outcome(str(unfit), pickle.dumps(unfit)))
            return
        try:
            spec = self._spec
            cls: type[Any] = self._runtime.function(spec.function, spec.code).function  # type: ignore[assignment]
            self._arrange(cls)
            if self._loop is None:
                with self._making(cls) as (args, kwargs):
                    self.instance = cls(*args, **kwargs)
        except BaseException as error:
            self._tell(self._failed(error))
            return
        if self._loop is None:
            self._tell(Outcome())
        else:
            asyncio.set_event_loop(self._loop)
            self._maker = self._loop.create_task(self._make_on_loop(cls))
            with attended(self._runtime.loop, self._loop):
                self._loop.run_forever()

    def let_go(self) -> None:
        """Let the instance go, so that its ``__del__`` runs while the process is still whole."""
        self.instance = None
        gc.collect()

    async def _make_on_loop(self, cls: type[Any]) -> None:
        """Make an async actor's instance where its methods run, so that ``__init__`` may use the loop, or be async."""
        assert self._loop is not None
        try:
            with self._making(cls) as (args, kwargs):
                if inspect.iscoroutinefunction(cls.__init__):
                    self.instance = cls.__new__(cls, *args, **kwargs)
                    await cls.__init__(self.instance, *args, **kwargs)
                else:
                    self.instance = cls(*args, **kwargs)
        except BaseException as error:
            self._tell(self._failed(error))
            self._loop.stop()
        else:
            self._tell(Outcome())

    def _arrange(self, cls: type[Any]) -> None:
        """Find out of what kind the actor is, and make what its methods run on."""
        spec = self._spec
        in_tasks: set[str] = set()
        for name, method in _methods(cls):
            group = getattr(method, "__shoal_method__", {}).get("concurrency_group")
            if group:
                self._group_names[name] = group
            if _is_async(method):
                in_tasks.add(name)
        if in_tasks:
            default = _Loop(self, self._runtime, spec.concurrency or ASYNC_CONCURRENCY, in_tasks)
            others = {name: _Loop(self, self._runtime, limit, in_tasks, name) for name, limit in spec.groups.items()}
            self._groups = {DEFAULT_GROUP: default, **others}
            self._loop = default.loop
        elif spec.concurrency > 1 or spec.groups:
            limits = {DEFAULT_GROUP: spec.concurrency or 1, **spec.groups}
            self._groups = {name: _Pool(limit, name, self.run) for name, limit in limits.items()}

    @contextlib.contextmanager
    def _making(self, cls: type[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield the arguments of the instance, which is made meanwhile, of that class."""
        opened = spans.of_actor(self.record) if ENABLED else None
        try:
            arguments = self._arguments()
            if opened is not None:
                opened.run()
            yield arguments
            if any("__repr__" in vars(base) for base in cls.__mro__[:-1]):
                self.repr_name = one_line(repr(self.instance))
        except BaseException as error:
            if opened is not None:
                opened.end(error)
            raise
        if opened is not None:
            opened.end(None)

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the instance is made of."""
        spec, runtime = self._spec, self._runtime
        if spec.whole is not None:
            (args, kwargs) = runtime.get([runtime.objects.restore(spec.whole)], None)[0]
        elif spec.arguments.data:
            args, kwargs = runtime.codec.load(spec.arguments)
        else:
            args, kwargs = (), {}
        if spec.dependencies:
            refs = [runtime.objects.restore(reference) for reference in spec.dependencies]
            args, kwargs = fill_in(args, kwargs, runtime.get(refs, None))
        return args, kwargs

    def _failed(self, error: BaseException) -> Outcome:
        text, data = lasting_failure(f"{self.assigned.class_name}.__init__", error)
        if len(data) > MOST_ERROR_BYTES:
            data = b""
        return Outcome(f"an exception was raised in __init__:\n{text[:MOST_ERROR_BYTES]}", data)

    # ------------------------------------------------------------------------------- calls

    def accept(self, accepted: Accepted) -> None:
        """Have a call run, by its group (I/O thread; not for a sequential actor)."""
        self._group_of(accepted).put(accepted)

    def run(self, accepted: Accepted) -> None:
        """Run a call in this thread, and hand its end to the I/O thread."""
        if self.left or not begin(accepted):
            return
        work = Work(self._runtime, accepted, self.lease, (ActorExit, SystemExit), self.label)
        try:
            with work:
                work.succeed(self.result(work))
        except (ActorExit, SystemExit) as error:
            self.leaves(error)
            return
        self._runtime.ended(work.ended)

    def result(self, work: Work) -> Any:
        """Call the method that a call names, and return what it returns."""
        method = self.method(work.accepted)
        args, kwargs = work.arguments()
        if ENABLED and work.processing is not None:
            work.processing.run()
        return method(*args, **kwargs)

    def leave(self) -> None:
        """Run nothing more, and let the instance go, where that can be done from outside (I/O thread)."""
        self.left = True
        for group in self._groups.values():
            group.close()

    def interrupt(self, accepted: Accepted) -> None:
        """Cancel a call that runs, where it runs as a task of a loop; others look at ``is_canceled`` (I/O thread)."""
        if self._groups and isinstance(group := self._group_of(accepted), _Loop):
            group.interrupt(accepted)

    def leaves(self, error: BaseException) -> None:
        """A method has ended its actor: run nothing more, and tell."""
        if not self.left:
            self.left = True
            status = _status(error)
            reason = str(error) if isinstance(error, ActorExit) else f"it called sys.exit({error})"
            if status:
                sys.stdout.flush()
                print(f"The actor {self.label} ends: {reason}.", file=sys.stderr, flush=True)
            self._tell(Left(reason, status))

    def _group_of(self, accepted: Accepted) -> _Pool | _Loop:
        task = accepted.task
        name = task.group or self._group_names.get(task.function, DEFAULT_GROUP)
        return self._groups.get(name) or self._groups[DEFAULT_GROUP]

    def method(self, accepted: Accepted) -> Callable[..., Any]:
        """Return the method that a call names, of the instance."""
        task = accepted.task
        special = _SPECIAL.get(task.function)
        if special is not None:
            return special(self.instance)
        if task.group and task.group not in self._groups:
            raise ValueError(
                f"The actor {self.assigned.class_name} has no concurrency group {task.group!r}; "
                f"its groups are {sorted(self._spec.groups)}."
            )
        method: Callable[..., Any] = getattr(self.instance, task.function)
        return method


def one_line(text: str) -> str:
    """Return a text as one line of what can be sent, cut where it is long: it stands in front of others' lines."""
    return sendable(" ".join(text.splitlines())[:MOST_REPR_CHARACTERS])


def _status(error: BaseException) -> int:
    """Return with which status an actor ends its process: ``sys.exit()`` is Ray's way of crashing it, but for 0."""
    if isinstance(error, ActorExit) or (isinstance(error, SystemExit) and error.code == 0):
        return 0
    return error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1


class _Pool:
    """The threads of one concurrency group, started as they are needed."""

    def __init__(self, limit: int, name: str, run: Callable[[Accepted], None]) -> None:
        self._limit = limit
        self._name = name or "default"
        self._run = run
        self._queue: queue.SimpleQueue[Accepted | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []

    def put(self, accepted: Accepted) -> None:
        """Have a call run in one of the threads (I/O thread)."""
        self._queue.put(accepted)
        if len(self._threads) < self._limit and not self._idle.acquire(blocking=False):
            name = f"shoal-{self._name}-{len(self._threads)}"
            thread = threading.Thread(target=self._serve, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Have the threads end when what they run has ended."""
        for _ in self._threads:
            self._queue.put(None)

    def _serve(self) -> None:
        while (accepted := self._queue.get()) is not None:
            self._run(accepted)
            del accepted
            self._idle.release()


class _Loop:
    """The event loop of one concurrency group of an async actor; in a thread of its own, unless it is the default one.

    ``in_tasks`` names the methods that are ``async``.
    """

    def __init__(self, hosting: Hosting, runtime: Runtime, limit: int, in_tasks: set[str], name: str = "") -> None:
        self.loop = _new_event_loop()
        self._hosting = hosting
        self._runtime = runtime
        self._limit = _Limit(limit)
        self._in_tasks = in_tasks
        self._unbegun: set[int] = set()  # whose tasks have not made their first step
        self._arrived: deque[Accepted] = deque()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._thread = threading.Thread(target=self._serve, name=f"shoal-{name}", daemon=True) if name else None

    def put(self, accepted: Accepted) -> None:
        """Have a call run on the loop (I/O thread)."""
        self._arrived.append(accepted)
        if len(self._arrived) == 1:
            self.loop.call_soon_threadsafe(self._start_arrived)
        if self._thread is not None and self._thread.ident is None:
            self._thread.start()

    def interrupt(self, accepted: Accepted) -> None:
        """Cancel a call, if it runs as a task (I/O thread)."""
        self.loop.call_soon_threadsafe(self._cancel, accepted.order)

    def close(self) -> None:
        """Have the loop stop (I/O thread)."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def _cancel(self, order: int) -> None:
        task = self._running.get(order)
        if task is not None:
            task.cancel()

    def _start_arrived(self) -> None:
        arrived = self._arrived
        while arrived:
            accepted = arrived.popleft()
            if self._limit.enter(accepted):
                self._start(accepted)

    def _start(self, accepted: Accepted) -> None:
        """Begin a call, and those that waited for it to end if it ends at once."""
        hosting = self._hosting
        following: Accepted | None = accepted
        while following is not None and not hosting.left:
            context = contextvars.copy_context()
            work = Work(self._runtime, following, hosting.lease, (ActorExit, SystemExit), hosting.label)
            needs_task = following.task.function in self._in_tasks or following.producer or work.has_large_arguments
            rest = self._run_in_task(work) if needs_task or self._unbegun else context.run(self._run_at_once, work)
            if rest is not None:
                self._unbegun.add(following.order)
                task = self.loop.create_task(rest, context=context)
                self._running[following.order] = task
                task.add_done_callback(partial(self._task_ended, work, context))
                return
            following = self._limit.leave()

    def _task_ended(self, work: Work, context: contextvars.Context, task: asyncio.Task[None]) -> None:
        del self._running[work.accepted.order]
        if work.accepted.order in self._unbegun:
            context.run(self._drop, work)
        following = self._limit.leave()
        if following is not None:
            self._start(following)

    def _drop(self, work: Work) -> None:
        """Answer a call whose task was cancelled before its first step, by the actor's own code."""
        self._unbegun.remove(work.accepted.order)
        if not work.accepted.begun:
            if not begin(work.accepted):
                return
            work.__enter__()
        error = asyncio.CancelledError()
        work.__exit__(type(error), error, None)
        self._runtime.ended(work.ended)

    def _run_at_once(self, work: Work) -> Coroutine[Any, Any, None] | None:
        """Run a method that is not ``async``; return what is left to do if it returns something to await."""
        if self._hosting.left or not begin(work.accepted):
            return None
        try:
            with contextlib.ExitStack() as entered:
                entered.enter_context(work)
                result = self._hosting.result(work)
                if inspect.isawaitable(result):
                    return self._await(work, entered.pop_all(), result)
                work.succeed(result)
                del result
        except (ActorExit, SystemExit) as error:
            self._hosting.leaves(error)
            return None
        self._runtime.ended(work.ended)
        return None

    async def _await(self, work: Work, entered: contextlib.ExitStack, result: Awaitable[Any]) -> None:
        self._unbegun.remove(work.accepted.order)
        try:
            with entered:
                work.succeed(await result)
        except (ActorExit, SystemExit) as error:
            self._hosting.leaves(error)
            return
        self._runtime.ended(work.ended)

    async def _run_in_task(self, work: Work) -> None:
        self._unbegun.remove(work.accepted.order)
        if self._hosting.left or not begin(work.accepted):
            return
        try:
            with work:
                method = self._hosting.method(work.accepted)
                if work.has_large_arguments:
                    args, kwargs = await asyncio.to_thread(work.arguments)
                else:
                    args, kwargs = work.arguments()
                if ENABLED and work.processing is not None:
                    work.processing.run()
                try:
                    result = method(*args, **kwargs)
                    if inspect.isawaitable(result):
                        result = await result
                finally:
                    del args, kwargs, method
                if work.accepted.producer is not None:
                    await work.stream_on_loop(result)
                else:
                    work.succeed(result)
                del result
        except (ActorExit, SystemExit) as error:
            self._hosting.leaves(error)
            return
        self._runtime.ended(work.ended)


class _Limit:
    """How many calls of one concurrency group run on its loop at once; the others wait in order."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._waiting: deque[Accepted] = deque()

    def enter(self, accepted: Accepted) -> bool:
        """Tell whether a call may start now; else it waits."""
        if self._free:
            self._free -= 1
            return True
        self._waiting.append(accepted)
        return False

    def leave(self) -> Accepted | None:
        """One that ran has ended; return the one that may start in its place."""
        if self._waiting:
            return self._waiting.popleft()
        self._free += 1
        return None


def is_async(cls: type[Any]) -> bool:
    """Tell whether any method of a class is ``async def``."""
    return any(_is_async(method) for _, method in _methods(cls))


def _methods(cls: type[Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield what can be called of a class, by name, without what is in every class."""
    for name in dir(cls):
        member = getattr(cls, name, None)
        if callable(member) and member is not getattr(object, name, None) and type(member) is not BuiltinMethodType:
            yield name, member


def _is_async(method: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)


def _ready(instance: Any) -> Callable[[], bool]:
    return lambda: True


def _call(instance: Any) -> Callable[..., Any]:
    return lambda function, *args, **kwargs: function(instance, *args, **kwargs)


def _terminate(instance: Any) -> Callable[[], None]:
    def terminate() -> None:
        raise ActorExit("it was terminated by __ray_terminate__")

    return terminate


_SPECIAL: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "__ray_ready__": _ready,
    "__ray_call__": _call,
    "__ray_terminate__": _terminate,
}
SPECIAL_METHODS = frozenset(_SPECIAL)
"""Methods that every actor has."""


def _new_event_loop() -> asyncio.AbstractEventLoop:
    """Return uvloop's event loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
