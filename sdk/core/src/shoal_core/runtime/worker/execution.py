"""The main thread of a worker process: it runs tasks, or makes the one actor of the process.

The I/O thread puts work on a queue, the main thread takes one item after the other: taking it *is* beginning it, so
what is still on the queue can be given back to its owner, each task either begun or returned and never both.

User code may fork. The child is a copy of this process but no part of the cluster: what it asks of Shoal is an error,
it ends where it comes back from user code, and it does not outlive this process. (The kernel ties a child to the thread
that made it, so this last is for what the main thread forks; a pool's thread may end long before the process.)
"""

from __future__ import annotations

import contextlib
import mmap
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, Protocol

from setproctitle import setproctitle

from shoal_core.bus.tracing import ENABLED
from shoal_core.machine import CUDA_VISIBLE, death_with_parent, die_with_parent
from shoal_core.protocol.errors import RuntimeEnvSetupError, wire_code
from shoal_core.protocol.ids import FunctionId, LeaseId
from shoal_core.protocol.messages import JobConfig
from shoal_core.protocol.records import Failed, LeaseAssigned
from shoal_core.protocol.resources import CPU, UNIT
from shoal_core.runtime.environments import set_up
from shoal_core.runtime.loop.spinning import Spin
from shoal_core.runtime.loop.turns import visit
from shoal_core.runtime.ownership.objects import Waiter
from shoal_core.runtime.reports.logs import set_up_logging
from shoal_core.runtime.worker.work import Accepted, Crashed, Ended, TaskInterrupt, Work, begin

if TYPE_CHECKING:
    from shoal_core.runtime.runtime import Runtime

THREADS = "OMP_NUM_THREADS"
BEGUN = struct.Struct("<QQ")
FIRST_POSITION = 1
"""Of the tasks of a lease."""
INTERRUPT = signal.SIGURG
"""Sent to the main thread to cancel what it runs; a signal that does nothing where nobody expects it."""
AGAIN_SECONDS = 0.005
"""How soon an interruption is tried again that was lost in a finalizer."""


class Hosted(Protocol):
    """The actor of this process, as the main thread knows it."""

    lease: LeaseAssigned

    def make(self) -> None:
        """Make the instance, and run whatever of it has to run on the main thread."""

    def run(self, accepted: Accepted) -> None:
        """Run a call."""


IDLE = "worker"
"""What a process is called that runs no task."""
MOST_TITLE_CHARACTERS = 200

Item = Accepted | LeaseAssigned | Hosted | None


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

    def __init__(self, runtime: Runtime, page: BegunPage, environments: Path, gpu_variable: str = CUDA_VISIBLE) -> None:
        self.queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self.began_at = 0.0
        self.running: Accepted | None = None
        self._runtime = runtime
        self._page = page
        self._environments = environments
        self._gpu_variable = gpu_variable
        self._lease: LeaseAssigned | None = None
        self._hosted: Hosted | None = None
        self._bounds_threads = False
        self._calls: dict[FunctionId, int] = {}
        self._shown = IDLE
        self._stopped = threading.Event()
        self._spin = Spin(seconds=0.0005)  # the next task of a sequence follows the answer to the last
        self._is_fork = False
        self._main_thread = 0

    def serve(self) -> None:
        """Run tasks until told to stop (main thread)."""
        death_with_parent()  # loads what a child needs, who may not load anything itself
        os.register_at_fork(after_in_child=partial(self._forked, os.getpid(), threading.get_ident()))
        self._main_thread = threading.get_ident()
        signal.signal(INTERRUPT, self._interrupted)
        sys.unraisablehook = self._unraisable
        while (item := self._take()) is not None:
            if isinstance(item, Accepted):
                if self._hosted is not None:
                    self._hosted.run(item)
                elif self._run(item):
                    # What is still on the queue is the I/O thread's to give back.
                    self._stopped.wait()
                    return
            elif isinstance(item, LeaseAssigned):
                self._serve_lease(item)
            else:
                self._serve_lease(item.lease)
                self._hosted = item
                item.make()
            if self._is_fork:
                leave(None)

    def _take(self) -> Item:
        """Return the next item, as soon as there is one (main thread)."""
        if self.queue.empty():
            if self._hosted is None:
                self._show(IDLE)
            visit(self._runtime.loop, lambda: not self.queue.empty(), None, self._spin)
        return self.queue.get()

    def stop(self) -> None:
        """Have ``serve`` return when the task that runs has ended (I/O thread)."""
        self.queue.put(None)
        self._stopped.set()

    def interrupt(self, accepted: Accepted) -> None:
        """Break into the user's code of a task that was cancelled, also where it sleeps or waits (I/O thread)."""
        if self.running is accepted:
            signal.pthread_kill(self._main_thread, INTERRUPT)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the task that runs, if it is the one that was meant: no signal ever hits the next (main thread)."""
        running = self.running
        if running is not None and running.cancelled and running.interruptible:
            if (target := _to_come_back_to(frame)) is not None:
                self._interrupt_in(target, running)
                return
            running.interruptible = False
            raise TaskInterrupt

    def _interrupt_in(self, target: FrameType, accepted: Accepted) -> None:
        """Interrupt a task as soon as it goes on in this frame, as a debugger would (main thread)."""
        if target.f_trace is not None:
            return  # on its way already, or a debugger is at work there
        before = sys.gettrace()

        def trace(frame: FrameType, event: str, argument: object) -> None:
            del frame.f_trace
            sys.settrace(before)
            if self.running is accepted and accepted.interruptible:
                accepted.interruptible = False
                raise TaskInterrupt

        target.f_trace = trace
        sys.settrace(_no_trace)

    def _interrupt_later(self, accepted: Accepted) -> None:
        loop = self._runtime.loop
        loop.call_soon_threadsafe(loop.call_later, AGAIN_SECONDS, self.interrupt, accepted)

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        """Try again where an interruption came in a finalizer, from which no exception gets out (main thread)."""
        running = self.running
        if running is None or unraisable.exc_type is not TaskInterrupt:
            sys.__unraisablehook__(unraisable)
            return
        running.interruptible = True
        self._interrupt_later(running)

    def withdraw(self) -> list[Accepted]:
        """Take back everything that was not begun (I/O thread)."""
        withdrawn: list[Accepted] = []
        kept: list[Item] = []
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

    def _forked(self, parent: int, main_thread: int) -> None:
        """Make of a copy of this process what it is: none of the cluster's (in the child, before it goes on)."""
        is_child = not self._is_fork
        self._is_fork = True
        self._runtime.disown()
        self._runtime.ended = _ended_in_fork
        if is_child and threading.get_ident() == main_thread:
            die_with_parent(parent)

    def _serve_lease(self, lease: LeaseAssigned) -> None:
        first = self._lease is None
        self._lease = lease
        if first:
            configure(self._runtime.job_config(lease.job, lease.config))
            if lease.environment:
                # A hook may end this process each time; what was never begun would be placed again without end.
                self._page.note(lease.lease, FIRST_POSITION)
            try:
                set_up(self._runtime, lease.job, lease.environment, self._environments)
            except RuntimeEnvSetupError as error:
                self._runtime.unfit = error
            self._bounds_threads = THREADS not in os.environ
        show_gpus(self._gpu_variable, lease.gpus)
        if self._bounds_threads:
            bound_threads(lease.resources)

    def _run(self, accepted: Accepted) -> bool:
        """Run a task and hand its end to the I/O thread; return whether this process runs nothing after it.

        That is so after the last call that ``max_calls`` allows, and where the task leaves by ``sys.exit``.
        """
        if not begin(accepted):
            return False
        if self._runtime.unfit is not None:
            return self._refuse(accepted, self._runtime.unfit)
        task = accepted.task
        self._page.note(task.lease, task.position)
        self._show(task.name)
        self.began_at = time.perf_counter()
        self.running = accepted
        exhausted = False
        work = Work(self._runtime, accepted, self._lease, (SystemExit,))
        try:
            with work:
                definition = self._runtime.function(task.function)
                exhausted = self._is_last_call(task.function, definition.max_calls)
                args, kwargs = work.arguments()
                if ENABLED and work.processing is not None:
                    work.processing.run()
                try:
                    accepted.interruptible = True
                    if accepted.cancelled:
                        raise TaskInterrupt
                    result = definition.function(*args, **kwargs)
                finally:
                    accepted.interruptible = False
                    del args, kwargs
                    if self._is_fork:
                        leave(sys.exc_info()[1])
                work.succeed(result)
                del result
        except SystemExit as error:
            self._crash(task.name, error)
            return True
        self.running = None
        work.ended.exhausted = exhausted
        self._runtime.ended(work.ended)
        return exhausted

    def _show(self, name: str) -> None:
        """Show to those who list processes what this one runs."""
        if name != self._shown:
            self._shown = name
            setproctitle(f"shoal: {name[:MOST_TITLE_CHARACTERS]}".replace("\0", " "))

    def _crash(self, name: str, error: SystemExit) -> None:
        """End this process, as the task's code asks: a crash, as in Ray, after which the task may be tried again."""
        with contextlib.suppress(OSError, ValueError):  # user code may have closed it
            print(f"The task {name} ends its process: SystemExit({error.code!r}).", file=sys.stderr)
        _flush()
        status = error.code if isinstance(error.code, int) and error.code else 1
        self._runtime.command(Crashed(status))

    def _refuse(self, accepted: Accepted, reason: RuntimeEnvSetupError) -> bool:
        """Answer a task that cannot run in this process; return whether it was the last, since nothing else waits."""
        failed = Failed(wire_code(reason), str(reason))
        exhausted = self.queue.empty()
        self._runtime.ended(
            Ended(accepted, [failed] * max(1, abs(accepted.task.returns)), [], 0.0, False, exhausted=exhausted)
        )
        return exhausted

    def _is_last_call(self, function: FunctionId, max_calls: int) -> bool:
        if not max_calls:
            return False
        calls = self._calls[function] = self._calls.get(function, 0) + 1
        return calls >= max_calls


_RUNS_USER_CODE = (
    "shoal_core.runtime.worker.execution",
    "shoal_core.runtime.worker.work",
    "shoal_core.runtime.loop.spinning",  # so that a wait is interrupted there, too
    "shoal_core.runtime.loop.turns",
    "shoal.generators",
)


def _to_come_back_to(frame: FrameType | None) -> FrameType | None:
    """Return None where user code may be interrupted at once, or else the frame that it has to be back in first.

    It may be anywhere in its own code, and within Shoal where it waits for objects. Elsewhere something would be left
    half done: a segment that was not sealed, a pin that a finalizer was about to give back.
    """
    inner = frame
    while inner is not None and _module(inner) == "weakref":
        inner = inner.f_back
    outer = inner
    while outer is not None and not _module(outer).startswith(("shoal.", "shoal_core.")):
        outer = outer.f_back
    if outer is None or outer.f_code is Waiter.wait.__code__ or _module(outer) in _RUNS_USER_CODE:
        return None if inner is frame else inner
    while outer is not None and _module(outer).startswith(("shoal.", "shoal_core.")):
        if _module(outer) in _RUNS_USER_CODE:
            break
        outer = outer.f_back
    return outer


def _module(frame: FrameType) -> str:
    name = frame.f_globals.get("__name__")
    return name if isinstance(name, str) else ""


def _no_trace(frame: FrameType, event: str, argument: object) -> None:
    """Trace nothing but the one frame that has a function of its own for it."""


def leave(error: BaseException | None) -> NoReturn:
    """End a process that user code forked, and from which it returned or raised, as an interpreter ends."""
    status: object = 0
    if isinstance(error, SystemExit):
        status = error.code or 0
    elif error is not None:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    _flush()
    os._exit(status if isinstance(status, int) else 1)


def _flush() -> None:
    """Write what was printed, before this process ends."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # user code may have closed them
            stream.flush()


def _ended_in_fork(ended: Ended) -> None:
    """A method of an actor came back, in a process that it forked."""
    failures = [value for value in ended.values if isinstance(value, Failed)]
    for failure in failures[:1]:
        print(failure.text, file=sys.stderr)
    leave(SystemExit(len(failures) and 1))


def show_gpus(variable: str, names: Sequence[str]) -> None:
    """Show this process the GPUs of its lease and no others; those who look are told none where it has none.

    Indices are the driver's, and CUDA's only if it orders the devices as the driver does.
    """
    os.environ[variable] = ",".join(names)
    if variable == CUDA_VISIBLE:
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def bound_threads(resources: Mapping[str, int]) -> None:
    """Have libraries that compute in threads use as many as this process has CPUs, at least one, as Ray does.

    By themselves they use as many as the machine has, in each of its processes. They read this when they are loaded.
    """
    os.environ[THREADS] = str(max(1, resources.get(CPU, 0) // UNIT))


def configure(config: JobConfig) -> None:
    """Make this process one of the job: its import path, logging and working directory."""
    for path in reversed(config.sys_path):
        if path not in sys.path:
            sys.path.insert(0, path)
    if config.logging is not None:
        set_up_logging(config.logging)
    if config.working_directory and os.path.isdir(config.working_directory):
        os.chdir(config.working_directory)
