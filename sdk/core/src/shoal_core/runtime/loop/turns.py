"""The event loop of a process, whose turns are run by whoever waits for them.

To have another thread run what an answer brings, and then wake the thread that waits for it, takes the system about as
long as all that is done about the answer. So a thread that would sleep runs the turns of the loop itself meanwhile, as
a *guest*. The I/O thread, which is the *host* of the loop, naps: it looks now and then whether guests still come, and
runs the loop by itself when none does. What threads leave for the loop waits for the next guest, as long as one has
mostly come at once. A thread with an event loop of its own has that *attend* to this one, and is a guest at times.

Whoever holds the *turn* runs callbacks, and nobody else does. A guest holds it throughout its visit. The host

========  =====================================  ====================================================
runs      with the turn in hand                  until it has run what was ready
polls     without it                             until something comes; if there is a guest then, it naps
naps      without it                             until no guest was there for ``NAP_SECONDS``
sleeps    without it, while one guest stays      until that guest leaves, and rings
========  =====================================  ====================================================

A turn has to be run to its end, so handlers of signals are kept from guests. What came ends the visit, and its handler
is called then.

This leans on private names of asyncio's own loop; a contract test lists and holds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import selectors
import sys
import threading
import time
from asyncio import AbstractEventLoop, events
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import Context
from typing import Any, TypeVarTuple, Unpack

from shoal_core.runtime.loop.interruptions import Deferred
from shoal_core.runtime.loop.spinning import Spin

NAP_SECONDS = 0.002
"""Up to twice as late may the loop run what comes after a thread that visited it went on to something else."""
LEFT_IN_VAIN = 16
"""After something was left for a guest who did not come, the host is woken at once so often."""
SPARE_FRAMES = 200
"""So many more calls deep must a thread be allowed to go to be a guest."""

Arguments = TypeVarTuple("Arguments")
Ready = list[tuple[selectors.SelectorKey, int]]


class SharedLoop(asyncio.SelectorEventLoop):
    """An event loop that threads visit (see the module)."""

    _ready: Any
    _scheduled: Any
    _selector: Any
    _stopping: bool
    _thread_id: int | None
    _call_soon: Callable[[Callable[[], object], tuple[()], Context | None], object]
    _run_once: Callable[[], None]
    _write_to_self: Callable[[], None]

    def __init__(self) -> None:
        selector = _Selector(self)
        self._turn = threading.Lock()
        self._bell = threading.Lock()
        self._bell.acquire()
        self._pid = os.getpid()
        self._host: int | None = None
        self._guest: int | None = None
        self._visits = 0
        self._polls = False
        self._naps = False
        self._sleeps = False
        self._is_left = False  # whether something waits for a guest
        self._left_in_vain = 0
        self._attendant: AbstractEventLoop | None = None
        self._look_is_due = False
        self._has_events = select.poll()  # tells of the selector's own descriptor
        self._has_events.register(selector.fileno(), select.POLLIN)
        super().__init__(selector)

    # -- the host

    def run_forever(self) -> None:
        """Be the host until ``stop`` is called."""
        with self._turn:
            self._host = threading.get_ident()
            try:
                super().run_forever()
            finally:
                self._host = None

    def is_host(self) -> bool:
        """Tell whether this thread is the loop's own."""
        return self._host == threading.get_ident()

    def poll_as_host(self, poll: Callable[[float | None], Ready], timeout: float | None) -> Ready:
        """Let go of the turn while nothing happens, and come back with it and what has come."""
        visits = self._visits
        self._polls = True
        self._turn.release()
        ready = poll(timeout) if self._guest is None else []
        self._polls = False
        if not self._turn.acquire(blocking=False):
            self._nap()
        elif visits == self._visits:
            return ready
        return poll(0)  # what had come a guest may have seen to

    def _nap(self) -> None:
        """Leave the loop to its guests, and come back with the turn."""
        self._naps = True
        while True:
            visits, guest = self._visits, self._guest
            goes_on = self._bell.acquire(timeout=NAP_SECONDS)
            if visits == self._visits:
                goes_on = True
                if guest is not None and guest == self._guest:
                    self._sleep()
            if goes_on and self._turn.acquire(blocking=False):
                break
        self._naps = False
        if self._is_left:
            self._is_left = False
            self._left_in_vain = LEFT_IN_VAIN

    def _sleep(self) -> None:
        """Wait until the guest leaves who stays for long."""
        self._sleeps = True
        if self._guest is not None:  # else it left before it could see that it has to ring
            self._bell.acquire()
        self._sleeps = False

    # -- any thread

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Arguments]], object], *args: *Arguments, context: Context | None = None
    ) -> asyncio.Handle:
        """Have something called by whoever runs the loop, at once."""
        handle = super().call_soon_threadsafe(callback, *args, context=context)
        if self._naps and self._guest is None:
            self._ring()
        return handle

    def leave(self, callback: Callable[[], object], context: Context) -> None:
        """Have something called soon: by this thread, if it is about to visit, as it mostly did before."""
        if self._naps and self._guest is None and not self._left_in_vain:
            self._is_left = True
            self._call_soon(callback, (), context)
            if not self._naps or self._guest is not None:  # who runs the loop may have looked before this was there
                self._write_to_self()
        else:
            self._left_in_vain = max(0, self._left_in_vain - 1)
            self.call_soon_threadsafe(callback, context=context)
        if self._attendant is not None and events._get_running_loop() is self._attendant:
            self._look_soon(self._attendant)

    def _ring(self) -> None:
        """Have the host go on, if it naps or sleeps."""
        if self._bell.locked():
            with contextlib.suppress(RuntimeError):  # somebody else rang
                self._bell.release()

    # -- guests

    def visit(self, done: Callable[[], bool], timeout_seconds: float | None, spin: Spin) -> bool:
        """Run turns until ``done``, or the time is over; return False where somebody else has to run them.

        The loop may end before. ``spin`` is how it looks for what comes before it sleeps. Raises what handlers of
        signals raise.
        """
        if events._get_running_loop() is not None or not self._takes_guests() or _is_deep():
            return False
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            deferred = Deferred(self._write_to_self)
            try:
                with deferred:
                    if not self._take_turn():
                        return False
                    self._stay(done, deferred.noted, deadline, spin)
                    was_interrupted = bool(deferred.noted)
            finally:
                deferred.deliver()
            if not was_interrupted:
                return True

    def _stay(self, done: Callable[[], bool], noted: list[int], deadline: float | None, spin: Spin) -> None:
        """Run turns as long as this thread waits for something, one at least: it may come again and again."""
        timer: asyncio.TimerHandle | None = None
        with self._as_guest():
            if deadline is not None:
                timer = self.call_later(max(0.0, deadline - time.monotonic()), _nothing)
            while not (done() or noted or self._stopping):
                if not self._ready:
                    spin.until(self._has_come)
                self._run_once()
                if deadline is not None and time.monotonic() >= deadline:
                    break
            if timer is not None:
                timer.cancel()

    def run_here(self, callback: Callable[[], object]) -> bool:
        """Call something in a turn of its own; return False where somebody else has the turn."""
        if events._get_running_loop() is not None or not self._takes_guests() or _is_deep():
            return False
        deferred = Deferred(_nothing)
        try:
            with deferred:
                if not self._take_turn():
                    return False
                with self._as_guest():
                    callback()
        finally:
            deferred.deliver()
        return True

    def _has_come(self) -> bool:
        return bool(self._ready or self._has_events.poll(0))

    def _takes_guests(self) -> bool:
        """Tell whether guests may come now; a copy of the process, made by a fork, has no part in the loop."""
        return self._host is not None and self._guest is None and self._pid == os.getpid()

    def _take_turn(self) -> bool:
        """Take the turn, if nobody has it; return False where somebody has, or the loop has ended."""
        if not self._turn.acquire(blocking=False):
            return False
        if self._host is None or self._stopping:
            self._turn.release()
            return False
        return True

    @contextlib.contextmanager
    def _as_guest(self) -> Iterator[None]:
        """Be a guest, with the turn in hand, and let go of it at the end."""
        outer, host = events._get_running_loop(), self._thread_id
        try:
            self._guest = self._thread_id = threading.get_ident()
            self._visits += 1
            self._is_left = False
            events._set_running_loop(self)
            if self._polls:
                self._write_to_self()
            yield
        finally:
            events._set_running_loop(outer)
            self._thread_id = host
            self._guest = None
            self._turn.release()
            if self._polls:  # it could not be kicked out, and knows nothing of what this visit has left
                self._write_to_self()
            elif self._sleeps or (self._ready and outer is None):
                self._ring()

    # -- guests with an event loop of their own

    @contextlib.contextmanager
    def attended(self, loop: AbstractEventLoop) -> Iterator[None]:
        """Have another loop, which this thread is about to run, visit this one whenever something comes."""
        descriptor = self._selector.fileno()
        loop.add_reader(descriptor, self._look, loop)
        self._attendant = loop
        try:
            yield
        finally:
            self._attendant = None
            loop.remove_reader(descriptor)

    def _look_soon(self, attendant: AbstractEventLoop) -> None:
        if not self._look_is_due:
            self._look_is_due = True
            attendant.call_soon(self._look, attendant)

    def _look(self, attendant: AbstractEventLoop) -> None:
        """Run one turn, without waiting for anything, if nobody else does (the attending loop's thread)."""
        self._look_is_due = False
        if not self._takes_guests():
            return
        deferred = Deferred(_nothing)
        try:
            with deferred:
                if self._take_turn():
                    with self._as_guest():
                        self._call_soon(_nothing, (), None)  # else nothing to do would be waited for
                        self._run_once()
                    if self._ready:
                        self._look_soon(attendant)
        finally:
            deferred.deliver()


class _Selector(selectors.EpollSelector):
    """The selector of a ``SharedLoop``."""

    def __init__(self, loop: SharedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Ready:
        """Wait for something to come; the host lets guests in meanwhile."""
        if (timeout is not None and timeout <= 0) or not self._loop.is_host():
            return super().select(timeout)
        return self._loop.poll_as_host(super().select, timeout)


def leave(loop: AbstractEventLoop, callback: Callable[[], object], context: Context) -> None:
    """Have something called by a loop soon, whether somebody visits it or not (any thread)."""
    if isinstance(loop, SharedLoop):
        loop.leave(callback, context)
    else:
        loop.call_soon_threadsafe(callback, context=context)


def visit(loop: AbstractEventLoop, done: Callable[[], bool], timeout_seconds: float | None, spin: Spin) -> None:
    """Wait for something: for long where this thread may run the loop meanwhile, else for a moment (user threads)."""
    if not isinstance(loop, SharedLoop) or not loop.visit(done, timeout_seconds, spin):
        spin.until(done)


def run_here(loop: AbstractEventLoop, callback: Callable[[], object]) -> bool:
    """Call something in this thread as the loop would, if nobody else runs the loop now; return whether it did."""
    return isinstance(loop, SharedLoop) and loop.run_here(callback)


def attended(shared: AbstractEventLoop, loop: AbstractEventLoop) -> AbstractContextManager[None]:
    """Have a loop that this thread is about to run visit the shared one whenever something comes."""
    return shared.attended(loop) if isinstance(shared, SharedLoop) else contextlib.nullcontext()


def is_here(loop: AbstractEventLoop) -> bool:
    """Tell whether this thread runs callbacks of a loop now, as its host or as a guest."""
    return events._get_running_loop() is loop


def check_may_wait(loop: AbstractEventLoop) -> None:
    """Raise where this thread would wait for what it has to run itself: it runs a callback, or a finalizer in one."""
    if is_here(loop):
        raise RuntimeError(
            "A blocking call was made where Shoal's own event loop runs: in a callback or a finalizer. Use the "
            "awaitable form there, or another thread."
        )


def _is_deep() -> bool:
    """Tell whether this thread is so deep in calls that a turn might go over the limit."""
    try:
        sys._getframe(max(0, sys.getrecursionlimit() - SPARE_FRAMES))
    except ValueError:
        return False
    return True


def _nothing() -> None:
    """Only the time is over, or the loop is woken."""
