"""What running one task, or one call of an actor, means: arguments in, a function, results or a failure out.

``Work`` is one run of it. Who runs it (the main thread, a pool, an event loop) is in ``execution`` and ``hosting``.
"""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import sys
import threading
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from dataclasses import dataclass, field
from types import GeneratorType
from typing import TYPE_CHECKING, Any

import msgspec

from shoal_core.bus.tracing import ENABLED
from shoal_core.protocol.errors import TaskCancelledError, TaskError
from shoal_core.protocol.ids import MAX_RETURNS, ProcessId, object_key
from shoal_core.protocol.records import Failed, Inline, LeaseAssigned, Reference, Stored, Task, Value
from shoal_core.protocol.traces import UNRECORDED, is_recorded
from shoal_core.runtime.data.failures import failure
from shoal_core.runtime.data.serialization import Dependency, Serialized
from shoal_core.runtime.data.values import CopyUnavailable, Pins
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import Producer
from shoal_core.runtime.tasks.submission import cancelled

if TYPE_CHECKING:
    from shoal_core.runtime.reports.spans import Processing
    from shoal_core.runtime.runtime import Runtime
if TYPE_CHECKING or ENABLED:
    from shoal_core.bus.spans import UNRECORDED_CONTEXT, open_context
    from shoal_core.runtime.reports import spans

ALL_EXCEPTIONS = b"*"
MOST_ITEMS = MAX_RETURNS - 2
"""How many items a generator may yield: behind them there is room for its exception and for the end."""
_NO_ARGUMENTS: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass(slots=True)
class Accepted:
    """A task that came to this process; ``references`` are those nested in its arguments, held until it ends.

    ``order`` rises with each task that comes; ``producer`` is there for generators. What is ``cancelled`` before it was
    ``begun`` never is (see ``begin`` and ``cancel``). A cancellation may break into it only while it is
    ``interruptible``: while the user's code runs, on the main thread. It began at ``began_at`` (``perf_counter``; 0:
    not yet).
    """

    task: Task
    owner: ProcessId
    references: list[ObjectRef[Any]]
    order: int
    producer: Producer | None = None
    begun: bool = False
    cancelled: bool = False
    interruptible: bool = False
    began_at: float = 0.0


class ArgumentsUnavailable(Exception):
    """Arguments of a task cannot be read, since their copies are gone."""

    def __init__(self, missing: list[Stored]) -> None:
        super().__init__(missing)
        self.missing = missing


_beginning = threading.Lock()


def begin(accepted: Accepted) -> bool:
    """Begin a task, unless it was cancelled before: then False, and it was answered already (whoever runs tasks)."""
    with _beginning:
        accepted.begun = not accepted.cancelled
        return accepted.begun


def cancel(accepted: Accepted) -> bool:
    """Mark a task as cancelled; tell whether it had been begun (I/O thread)."""
    with _beginning:
        accepted.cancelled = True
        return accepted.begun


class TaskInterrupt(KeyboardInterrupt):
    """Breaks into the user's code of a task that was cancelled."""


CANCELLATIONS = (KeyboardInterrupt, asyncio.CancelledError, TaskCancelledError)
"""What leaves the user's code of a task that was cancelled; the last where a task of its own was cancelled with it."""


@dataclass(frozen=True, slots=True, eq=False)
class Awaits:
    """A call waits for an argument whose copy was lost, or (None) does so no more."""

    accepted: Accepted
    awaited: Reference | None


@dataclass(frozen=True, slots=True)
class Crashed:
    """Command: a task has ended its process, by ``sys.exit``; its owner is to hear that the process has died."""

    status: int


@dataclass(frozen=True, slots=True, eq=False)
class Yielded:
    """An item that a generator yielded here."""

    accepted: Accepted
    index: int
    value: Value
    result: Serialized


@dataclass(slots=True)
class Ended:
    """A task that ended here, as the I/O thread needs it to answer the owner."""

    accepted: Accepted
    values: list[Value]
    results: list[Serialized]
    seconds: float
    retryable: bool
    exhausted: bool = False
    missing: list[Stored] = field(default_factory=list)
    fetch_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Running:
    """What the current task may ask about itself; ``label`` is its name for people."""

    task: Task
    owner: ProcessId
    order: int
    lease: LeaseAssigned | None
    label: str
    accepted: Accepted | None = None


current: contextvars.ContextVar[Running | None] = contextvars.ContextVar("shoal_current_task", default=None)


class Work:
    """One run of a task. Use: ``with work: work.succeed(function(*args, **kwargs))``, then look at ``ended``.

    Entering makes the task the current one and notes the time; an exception that leaves the block is the task's
    failure, and goes no further. What ``lets_pass`` names does. ``actor`` is what people are shown of an actor.
    ``runs`` is to be called before the function.
    """

    __slots__ = (
        "_fetch_seconds",
        "_label",
        "_lease",
        "_lets_pass",
        "_made",
        "_name",
        "_runtime",
        "_token",
        "accepted",
        "ended",
        "processing",
    )

    ended: Ended
    processing: Processing | None
    """There where this process traces; None where the task is not recorded."""

    def __init__(
        self,
        runtime: Runtime,
        accepted: Accepted,
        lease: LeaseAssigned | None,
        lets_pass: tuple[type[BaseException], ...] = (),
        actor: str = "",
    ) -> None:
        self.accepted = accepted
        name = accepted.task.name
        self._label = actor or name
        self._name = f"{actor}.{accepted.task.function}" if actor else name
        self._runtime = runtime
        self._lease = lease
        self._lets_pass = lets_pass
        self._made: list[tuple[Value, Serialized]] = []

    def __enter__(self) -> Work:
        accepted = self.accepted
        self._fetch_seconds = 0.0
        accepted.began_at = time.perf_counter()
        self._token = current.set(
            Running(accepted.task, accepted.owner, accepted.order, self._lease, self._label, accepted)
        )
        if ENABLED:
            self.processing = None
            if accepted.task.trace != UNRECORDED or open_context() is not UNRECORDED_CONTEXT:
                self.processing = self._open_spans(accepted.task)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        passes = error is not None and isinstance(error, self._lets_pass)
        if ENABLED and self.processing is not None:
            self._end_spans(self.processing, None if passes else error)
        current.reset(self._token)
        if error is None or passes:
            return not passes
        task = self.accepted.task
        returns = max(1, task.returns)
        if isinstance(error, ArgumentsUnavailable):
            self._end([], [], False)
            self.ended.missing = error.missing
            return True
        left = returns - len(self._made)
        if self._was_cancelled_by(error):
            self._end_with([*self._made, *[(self._cancelled(), None)] * left])
        else:
            retryable = is_retryable(task, error)
            failed = failure(self._runtime.codec, self._name, error)
            self._end_with([*self._made, *[failed] * left], retryable=retryable)
        return True

    def _was_cancelled_by(self, error: BaseException) -> bool:
        return self.accepted.cancelled and isinstance(error, CANCELLATIONS)

    def _cancelled(self) -> Failed:
        """Return what becomes of a run that was cancelled: the error of a task as well, as in Ray."""
        failed = cancelled(self._name)
        error = TaskError(self._name, failed.text, TaskCancelledError(failed.text))
        return msgspec.structs.replace(failed, data=pickle.dumps(error))

    def _open_spans(self, task: Task) -> Processing | None:
        if not is_recorded(task.trace):
            spans.unrecorded(task.trace)
            return None
        hosting = self._runtime.hosting
        return spans.of_task(task, self.accepted.owner, None if hosting is None else hosting.record, self._knows)

    def _knows(self) -> bool:
        """Tell whether this process has run the task's function before."""
        runtime = self._runtime
        return runtime.hosting is not None or (
            runtime.functions.known(runtime.job, self.accepted.task.function) is not None
        )

    def _end_spans(self, opened: Processing, error: BaseException | None) -> None:
        if isinstance(error, ArgumentsUnavailable):
            failed = Failed("arguments_unavailable", "copies of its arguments are gone; it goes back to its owner")
            opened.end(None, failed)
        elif error is not None and self._was_cancelled_by(error):
            opened.end(None, cancelled(self._name))
        else:
            opened.end(error)

    def arguments(self) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the task's positional and keyword arguments.

        Where some of them cannot be read, a task goes back to its owner, since what makes them again may need what it
        holds (``ArgumentsUnavailable``). A call keeps its place and waits, since an actor keeps what it holds anyway.
        """
        task = self.accepted.task
        if type(task.arguments) is Inline and not task.dependencies:
            return self._runtime.codec.load(task.arguments) if task.arguments.data else _NO_ARGUMENTS
        missing: list[Stored] = []
        values = (task.arguments, *task.dependencies)
        began = time.perf_counter()
        with self._runtime.values.pinned(values) as pins:
            (args, kwargs), *given = [self._read(value, index, pins, missing) for index, value in enumerate(values, -1)]
        if missing:
            raise ArgumentsUnavailable(missing)
        if self.has_large_arguments:
            self._fetch_seconds = time.perf_counter() - began
        return fill_in(args, kwargs, given) if given else (args, kwargs)

    def _read(self, value: Value, index: int, pins: Pins, missing: list[Stored]) -> Any:
        """Return the value of a dependency, or (index -1) of the arguments; what cannot be read becomes ``missing``."""
        origins = self.accepted.task.origins
        try:
            return self._runtime.values.read(value, pins)
        except CopyUnavailable as unavailable:
            unavailable.__traceback__ = None  # its frames hold the arguments, in a cycle with the exception
            assert type(value) is Stored
            if index >= 0 and origins:
                return self._read_again(origins[index], value)
            missing.append(value)
            return None, None

    def _read_again(self, origin: Reference, value: Stored) -> Any:
        """Wait for an argument to come anew."""
        self._runtime.command(Awaits(self.accepted, origin))
        try:
            return self._runtime.getting.read_again(origin, value)
        finally:
            self._runtime.command(Awaits(self.accepted, None))

    @property
    def has_large_arguments(self) -> bool:
        """Whether fetching the arguments may take a while."""
        task = self.accepted.task
        return any(type(value) is Stored for value in (task.arguments, *task.dependencies))

    def succeed(self, result: Any) -> None:
        """Serialize what the function returned; the owner of the values is the task's owner.

        What a call of an actor returns that was cancelled meanwhile is dropped, as Ray does.
        """
        task, runtime = self.accepted.task, self._runtime
        if self.accepted.producer is not None:
            self._stream(result, self.accepted.producer)
            return
        if self.accepted.cancelled and runtime.hosting is not None:
            raise TaskCancelledError
        if isinstance(result, GeneratorType) and task.returns:
            self._take(result)
            return
        if ENABLED and self.processing is not None:
            self.processing.store()
        if task.returns == 1:
            results = [self._dump(result)]
        elif task.returns == 0:
            results = []
        else:
            results = [self._dump(part) for part in _parts(task, result)]
        self._end([self._place(index, serialized) for index, serialized in enumerate(results, 1)], results, False)

    def _take(self, items: Generator[Any, None, None]) -> None:
        """Run a generator that is to yield as many values as the task returns; each is stored as it comes.

        Where it fails, those that it had yielded stay, as in Ray. Nobody waits for what it does after the last: an item
        too many and an exception are printed here.
        """
        made, task = self._made, self.accepted.task
        try:
            while len(made) < task.returns:
                serialized = self._dump(self._next(items))
                made.append((self._place(len(made) + 1, serialized), serialized))
            self._next(items)
            print(f"{_declared(task)} more values; the rest is dropped.", file=sys.stderr, flush=True)
        except StopIteration:
            if len(made) < task.returns:
                raise ValueError(f"{_declared(task)} {len(made)} values.") from None
        except Exception as error:
            if len(made) < task.returns:
                raise
            failed, _ = failure(self._runtime.codec, self._name, error)
            print(f"After its last value an exception left {failed.text}", file=sys.stderr, flush=True)
        finally:
            items.close()
        self._end_with(made)

    def _end_with(self, ends: Sequence[tuple[Value, Serialized | None]], *, retryable: bool = False) -> None:
        results = [result for _, result in ends if result is not None]
        self._end([value for value, _ in ends], results, retryable)

    def _next(self, items: Generator[Any, None, None]) -> Any:
        """Return a generator's next item; its code runs meanwhile, and may be interrupted."""
        accepted = self.accepted
        try:
            accepted.interruptible = True
            if accepted.cancelled:
                raise TaskInterrupt
            return next(items)
        finally:
            accepted.interruptible = False

    def _dump(self, value: Any) -> Serialized:
        """Serialize what the function returned or yielded."""
        try:
            return self._runtime.codec.dump(value)
        except Exception as error:
            error.add_note(f"What {self._name}() returned cannot be pickled: a {type(value).__name__}.")
            raise

    def _place(self, index: int, serialized: Serialized) -> Value:
        """Return one value that the task makes as it travels."""
        key = object_key(self.accepted.task.number, index)
        return self._runtime.values.place(serialized, self.accepted.owner, key)

    def _stream(self, result: Any, producer: Producer) -> None:
        """Run a generator in this thread, and hand on what it yields."""
        items = _iterator(self._name, result)
        made = 0
        try:
            while True:
                if not producer.may_go_on(made):
                    with self._runtime.getting.waiting():
                        producer.wait(made)
                if producer.closed:
                    break
                try:
                    item = self._next(items)  # interruptible here alone: what is half handed on would be lost
                except StopIteration:
                    break
                made += 1
                self._hand_on(made, item)
                del item
                if producer.is_due(time.perf_counter()):
                    self._runtime.send_now()
        finally:
            items.close()
        self._end_stream()

    async def stream_on_loop(self, result: Any) -> None:
        """Run a generator, asynchronous or not, on an actor's loop, and hand on what it yields."""
        producer = self.accepted.producer
        assert producer is not None
        items = result if hasattr(result, "__anext__") else _as_async(_iterator(self._name, result))
        made = 0
        try:
            while True:
                await producer.wait_on_loop(made)
                if producer.closed:
                    break
                try:
                    item = await anext(items)
                except StopAsyncIteration:
                    break
                made += 1
                self._hand_on(made, item)
                del item
                if producer.is_due(time.perf_counter()):
                    await self._runtime.send_soon()
        finally:
            await items.aclose()
        self._end_stream()

    def _end_stream(self) -> None:
        """The generator has no more items; where it was cancelled, that is what its owner is to hear."""
        self._end([self._cancelled()] if self.accepted.cancelled else [], [], False)

    def _hand_on(self, index: int, item: Any) -> None:
        if index > MOST_ITEMS:
            raise ValueError(f"{self._name} yielded more than {MOST_ITEMS:,} items; yield them in batches.")
        began_ns = time.time_ns() if ENABLED else 0
        serialized = self._dump(item)
        value = self._place(index, serialized)
        if ENABLED and self.processing is not None:
            self.processing.item(began_ns, value)
        self._runtime.command(Yielded(self.accepted, index, value, serialized))

    def _end(self, values: list[Value], results: list[Serialized], retryable: bool) -> None:
        seconds = time.perf_counter() - self.accepted.began_at
        self.ended = Ended(self.accepted, values, results, seconds, retryable, fetch_seconds=self._fetch_seconds)


def fill_in(args: Sequence[Any], kwargs: dict[str, Any], values: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
    """Return arguments with each ``Dependency`` replaced by the value it stands for."""
    args = [values[arg.index] if type(arg) is Dependency else arg for arg in args]
    kwargs = {name: values[arg.index] if type(arg) is Dependency else arg for name, arg in kwargs.items()}
    return args, kwargs


def _iterator(name: str, result: Any) -> Generator[Any, None, None]:
    """Return what a streaming task returned as a generator."""
    try:
        items = iter(result)
    except TypeError:
        raise TypeError(
            f"{name} was called with num_returns='streaming' but returned a {type(result).__name__}, which cannot be "
            "iterated over; make it a generator."
        ) from None
    return result if hasattr(result, "close") and items is result else (item for item in items)


async def _as_async(items: Generator[Any, None, None]) -> AsyncGenerator[Any, None]:
    """Yield the items of a generator that is not asynchronous; the loop turns between them."""
    try:
        for item in items:
            yield item
            await asyncio.sleep(0)
    finally:
        items.close()


def _parts(task: Task, result: Any) -> Sequence[Any]:
    try:
        parts = list(result)
    except TypeError:
        raise TypeError(f"{_declared(task)} an object of type {type(result).__name__}.") from None
    if len(parts) != task.returns:
        raise ValueError(f"{_declared(task)} {len(parts)} values.")
    return parts


def _declared(task: Task) -> str:
    return f"Task {task.name} was declared with num_returns={task.returns} but returned"


def is_retryable(task: Task, error: BaseException) -> bool:
    """Tell whether a task is to be tried again after an exception."""
    if not task.retry_on or not isinstance(error, Exception):
        return False
    if task.retry_on == ALL_EXCEPTIONS:
        return True
    cause = error.cause if isinstance(error, TaskError) else error
    return isinstance(cause, pickle.loads(task.retry_on))
