"""Running tasks in a worker process: the main thread's side.

The I/O thread puts work on a queue, the main thread takes one item after the other: taking it *is* beginning it, so
what is still on the queue can be given back to its owner, each task either begun or returned and never both.
"""

from __future__ import annotations

import contextvars
import mmap
import os
import pickle
import queue
import struct
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal_core.bus.tracing import ENABLED, span
from shoal_core.protocol.errors import TaskError, UnserializableException
from shoal_core.protocol.ids import FunctionId, LeaseId, ProcessId
from shoal_core.protocol.messages import JobConfig
from shoal_core.protocol.records import Failed, Inline, LeaseAssigned, Task, Value
from shoal_core.runtime.objects import ObjectRef
from shoal_core.runtime.serialization import Dependency, Serialized

if TYPE_CHECKING:
    from shoal_core.runtime.runtime import Runtime

BEGUN = struct.Struct("<QQ")
ALL_EXCEPTIONS = b"*"
_NO_ARGUMENTS: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})


@dataclass(slots=True)
class Accepted:
    """A task on this worker's queue; ``references`` are those nested in its arguments, held until it ends."""

    task: Task
    owner: ProcessId
    references: list[ObjectRef[Any]]


@dataclass(slots=True)
class Ended:
    """A task that ended here, as the I/O thread needs it to answer the owner."""

    accepted: Accepted
    values: list[Value]
    results: list[Serialized]
    seconds: float
    retryable: bool
    exhausted: bool


@dataclass(frozen=True, slots=True)
class Running:
    """What the current task may ask about itself."""

    task: Task
    owner: ProcessId
    lease: LeaseAssigned | None


current: contextvars.ContextVar[Running | None] = contextvars.ContextVar("shoal_current_task", default=None)


def running_name() -> str:
    """Return the name of the task that runs in this context, "" where none does."""
    running = current.get()
    return "" if running is None else running.task.name


class BegunPage:
    """The page shared with the node on which a worker notes what it has begun, before it begins it."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._page = mmap.mmap(descriptor, mmap.PAGESIZE)
        finally:
            os.close(descriptor)

    def note(self, lease: LeaseId, position: int) -> None:
        """Say that the task at this position of the lease has begun."""
        BEGUN.pack_into(self._page, 0, lease, position)


class Execution:
    """The queue of a worker process and the loop that serves it."""

    def __init__(self, runtime: Runtime, page: BegunPage) -> None:
        self.queue: queue.SimpleQueue[Accepted | LeaseAssigned | None] = queue.SimpleQueue()
        self.began_at = 0.0
        self.running: Accepted | None = None
        self._runtime = runtime
        self._page = page
        self._lease: LeaseAssigned | None = None
        self._configured = False
        self._calls: dict[FunctionId, int] = {}
        self._stopped = threading.Event()

    def serve(self) -> None:
        """Run tasks until told to stop (main thread)."""
        take = self.queue.get
        while (item := take()) is not None:
            if not isinstance(item, Accepted):
                self._serve_lease(item)
            elif self._run(item):
                # What is still on the queue is the I/O thread's to give back.
                self._stopped.wait()
                return

    def stop(self) -> None:
        """Have ``serve`` return when the task that runs has ended (I/O thread)."""
        self.queue.put(None)
        self._stopped.set()

    def withdraw(self) -> list[Accepted]:
        """Take back everything that was not begun (I/O thread)."""
        withdrawn: list[Accepted] = []
        kept: list[LeaseAssigned | None] = []
        while True:
            try:
                item = self.queue.get_nowait()
            except queue.Empty:
                break
            if isinstance(item, Accepted):
                withdrawn.append(item)
            else:
                kept.append(item)
        for item in kept:
            self.queue.put(item)
        return withdrawn

    def _serve_lease(self, lease: LeaseAssigned) -> None:
        self._lease = lease
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(lease.gpus)
        if not self._configured:
            self._configured = True
            configure(self._runtime.job_config(lease.job))

    def _run(self, accepted: Accepted) -> bool:
        """Run a task and hand its end to the I/O thread; return whether it was the last that ``max_calls`` allows."""
        task = accepted.task
        self._page.note(task.lease, task.position)
        self.began_at = began = time.perf_counter()
        self.running = accepted
        token = current.set(Running(task, accepted.owner, self._lease))
        exhausted = False
        results: list[Serialized] = []
        try:
            definition = self._runtime.function(task.function)
            exhausted = self._is_last_call(task.function, definition.max_calls)
            args, kwargs = self._arguments(task)
            try:
                if ENABLED:
                    with span(f"run {task.name}", "CONSUMER", task.trace):
                        result = definition.function(*args, **kwargs)
                else:
                    result = definition.function(*args, **kwargs)
            finally:
                del args, kwargs
            values, results = self._store(task, accepted.owner, result)
            del result
            retryable = False
        except BaseException as error:
            values = [failure(task.name, error)] * max(1, task.returns)
            retryable = _is_retryable(task, error)
            del error
        finally:
            current.reset(token)
            self.running = None
        seconds = time.perf_counter() - began
        self._runtime.ended(Ended(accepted, values, results, seconds, retryable, exhausted))
        return exhausted

    def _is_last_call(self, function: FunctionId, max_calls: int) -> bool:
        if not max_calls:
            return False
        calls = self._calls[function] = self._calls.get(function, 0) + 1
        return calls >= max_calls

    def _arguments(self, task: Task) -> tuple[Sequence[Any], dict[str, Any]]:
        arguments = task.arguments
        if type(arguments) is Inline and not arguments.data:
            return _NO_ARGUMENTS
        args, kwargs = self._runtime.load_value(arguments)
        if not task.dependencies:
            return args, kwargs
        values = [self._runtime.load_value(value) for value in task.dependencies]
        args = [values[arg.index] if type(arg) is Dependency else arg for arg in args]
        kwargs = {name: values[arg.index] if type(arg) is Dependency else arg for name, arg in kwargs.items()}
        return args, kwargs

    def _store(self, task: Task, owner: ProcessId, result: Any) -> tuple[list[Value], list[Serialized]]:
        """Serialize what a task returned; the owner of the values is the task's owner."""
        if task.returns == 1:
            results = [self._runtime.codec.dump(result)]
        elif task.returns == 0:
            return [], []
        else:
            results = [self._runtime.codec.dump(part) for part in _parts(task, result)]
        return [self._runtime.place(serialized, owner) for serialized in results], results


def configure(config: JobConfig) -> None:
    """Make this process one of the job: its import path, working directory and environment."""
    for path in reversed(config.sys_path):
        if path not in sys.path:
            sys.path.insert(0, path)
    os.environ.update(config.environment)
    if config.working_directory and os.path.isdir(config.working_directory):
        os.chdir(config.working_directory)


def failure(name: str, error: BaseException) -> Failed:
    """Return an exception of user code as it travels: with its remote traceback, and pickled if it can be."""
    frames = traceback.format_exception(type(error), error, _user_frames(error))
    text = f"{name}() (pid={os.getpid()}, ip={_address()})\n" + "".join(frames).rstrip()
    return Failed("task", text, pickle_error(name, text, error))


def pickle_error(name: str, text: str, error: BaseException) -> bytes:
    """Pickle a ``TaskError``; where its cause cannot travel, with the cause's text instead."""
    import cloudpickle

    error.__traceback__ = None
    cause = error.cause if isinstance(error, TaskError) else error
    try:
        data: bytes = cloudpickle.dumps(TaskError(name, text, cause), protocol=5)
        pickle.loads(data)
    except Exception as reason:
        substitute = UnserializableException(f"{type(cause).__name__}: {cause} (it could not be pickled: {reason})")
        data = pickle.dumps(TaskError(name, text, substitute), 5)
    return data


def _user_frames(error: BaseException) -> Any:
    """Return the traceback from the user's first frame on."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return frames


def _address() -> str:
    return os.environ.get("SHOAL_NODE_ADDRESS", "127.0.0.1")


def _parts(task: Task, result: Any) -> Sequence[Any]:
    try:
        parts = list(result)
    except TypeError:
        parts = None
    if parts is None or len(parts) != task.returns:
        got = f"an object of type {type(result).__name__}" if parts is None else f"{len(parts)} values"
        raise ValueError(f"Task {task.name} was declared with num_returns={task.returns} but returned {got}.")
    return parts


def _is_retryable(task: Task, error: BaseException) -> bool:
    if not task.retry_on or not isinstance(error, Exception):
        return False
    if task.retry_on == ALL_EXCEPTIONS:
        return True
    cause = error.cause if isinstance(error, TaskError) else error
    return isinstance(cause, pickle.loads(task.retry_on))
