"""How threads of the user's get objects: they wait until these are ready, and read them.

A copy that cannot be read counts as lost, and is waited for until it has come anew. A task that waits for long gives
back its CPU meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from shoal_core.protocol.errors import GetTimeoutError, ObjectLostError, ShoalError
from shoal_core.protocol.records import Failed, Reference, Stored
from shoal_core.runtime.commands import Want
from shoal_core.runtime.data.failures import error_of
from shoal_core.runtime.data.values import Call, CopyUnavailable, Pins, Values
from shoal_core.runtime.loop.awaiting import BLOCK_GRACE_SECONDS
from shoal_core.runtime.loop.blocking import warn_if_a_loop_runs
from shoal_core.runtime.loop.spinning import Spin
from shoal_core.runtime.loop.turns import check_may_wait, visit
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable, Waiter
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.worker.work import current

MOST_READS = 20
"""So often ``get`` tries to read an object, each time from a copy that was made anew."""


class Getting:
    """What one process waits for and reads (user threads only, but for what says otherwise)."""

    def __init__(
        self,
        objects: ObjectTable,
        values: Values,
        reactor: Reactor,
        command: Callable[[Any], None],
        call: Call,
    ) -> None:
        self.blocked: Callable[[bool], None] | None = None
        """Told when a thread of a task begins and ends to wait, where that frees a CPU."""
        self.obstacle: Callable[[], ShoalError] | None = None
        """Makes the error of whoever waits, while nothing can become ready."""
        self._objects = objects
        self._local = objects.local
        self._values = values
        self._reactor = reactor
        self._command = command
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._spin = Spin(seconds=0.001)  # a round trip through a broker takes half of that

    def get(self, states: Sequence[ObjectState], timeout_seconds: float | None) -> list[Any]:
        """Return the values of objects in order; the first error among them is raised as soon as it is known.

        A copy that turns out to be lost is waited for until it has come again. The traceback of an error begins here:
        below it is nothing but how values are read, and frames that hold references.
        """
        try:
            return self._get(states, timeout_seconds)
        except Exception as error:
            if not isinstance(error, GetTimeoutError):
                for state in states:
                    state.heeded = True
            if isinstance(error, ShoalError):
                error.__traceback__ = None
            raise

    def _get(self, states: Sequence[ObjectState], timeout_seconds: float | None) -> list[Any]:
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        self._wait_for_all(states, deadline, timeout_seconds)
        values, lost = self._read(states)
        reads = 1
        while lost:
            missing = [states[index] for index in lost]
            if reads == MOST_READS:
                raise ObjectLostError(
                    f"{len(lost)} of {len(states)} objects could not be read {reads} times, each time from a new copy."
                )
            self._wait_for_all(missing, deadline, timeout_seconds)
            found, still_lost = self._read(missing)
            for index, value in zip(lost, found, strict=True):
                values[index] = value
            lost = [lost[index] for index in still_lost]
            reads += 1
        return values

    def _wait_for_all(
        self, states: Sequence[ObjectState], deadline: float | None, timeout_seconds: float | None
    ) -> None:
        """Wait until objects are ready; raise the first error among them as soon as it is known."""
        while pending := [state for state in states if state.value is None]:
            self._raise_first_error_of(states)
            all_ready = self._wait(pending, len(pending), _left(deadline), fail_fast=True)
            self._raise_first_error_of(states)
            if all_ready:
                return
            missing = sum(state.value is None for state in states)
            if missing and deadline is not None and time.monotonic() >= deadline:
                raise GetTimeoutError(
                    f"get() timed out after {timeout_seconds:g} s: {missing} of {len(states)} objects were not ready."
                )

    def _read(self, states: Sequence[ObjectState]) -> tuple[list[Any], list[int]]:
        """Return the values of objects that are ready, and the indices of those that have to come anew."""
        if len(states) == 1:
            return self._read_pinned(states, None)
        unmapped = [state.value for state in states if state.shared is None or state.shared() is None]
        with self._values.pinned(unmapped) as pins:
            return self._read_pinned(states, pins)

    def _read_pinned(self, states: Sequence[ObjectState], pins: Pins | None) -> tuple[list[Any], list[int]]:
        values: list[Any] = []
        lost: list[int] = []
        value_of = self._values.of
        for index, state in enumerate(states):
            try:
                values.append(value_of(state, pins))
            except CopyUnavailable as unavailable:
                unavailable.__traceback__ = None  # its frames hold references, in a cycle with the exception
                self._tell_unavailable(state, unavailable.value)
                values.append(None)
                lost.append(index)
        return values, lost

    def _tell_unavailable(self, state: ObjectState, value: Stored | None) -> None:
        """Have a copy count as lost that could not be read; raise why no other one will come, if there is a reason."""

        async def tell(lost: Stored) -> None:
            self._reactor.recovery.unreadable(state, lost)

        if value is None:
            self.check()
        else:
            self._call(tell(value))

    def read_again(self, reference: Reference, value: Stored) -> Any:
        """Return the value of an object whose copy could not be read, once it has come anew (user threads only)."""
        ref = self._objects.restore(reference)
        self._tell_unavailable(ref._state, value)
        return self.get([ref._state], None)[0]

    def _raise_first_error_of(self, states: Sequence[ObjectState]) -> None:
        for state in states:
            if type(state.value) is Failed:
                self._values.of(state)

    def wait(
        self, refs: Sequence[ObjectRef[Any]], count: int, timeout_seconds: float | None
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        """Return the first ``count`` references that are ready and the others, both in the order given."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            split = _split(refs, count)
            left_seconds = _left(deadline)
            if len(split[0]) >= count or left_seconds == 0:
                if left_seconds == 0:
                    self._ask_for([ref._state for ref in split[1]])
                return split
            pending = [ref._state for ref in split[1] if ref._state.value is None]
            self._wait(pending, count - len(split[0]), left_seconds, fail_fast=False)

    def _ask_for(self, states: Sequence[ObjectState]) -> None:
        """Have objects come that will not by themselves: those of others, and our own that were lost."""
        away = [s for s in states if s.lost is not None or (s.owner != self._local and not s.fetching)]
        if away:
            self._command(Want(away))

    def _wait(
        self, pending: Sequence[ObjectState], needed: int, timeout_seconds: float | None, fail_fast: bool
    ) -> bool:
        """Block until enough of the objects are ready, one fails, or the time is over; tell whether enough are."""
        waiter = Waiter(needed, fail_fast)
        self._objects.register(waiter, pending)
        self._ask_for(pending)  # only now: what is lost from now on finds the waiter
        try:
            self.check_open()
            if timeout_seconds == 0:
                return waiter.needed <= 0
            if self.obstacle is None:
                self._block(waiter, timeout_seconds)
            if self.obstacle is not None and waiter.needed > 0:
                raise self.obstacle()
            return waiter.needed <= 0
        finally:
            if waiter.needed > 0 or needed < len(pending):  # else what became ready has let go of it
                self._objects.unregister(waiter, pending)

    def _block(self, waiter: Waiter, timeout_seconds: float | None) -> None:
        """Block this thread; a task's thread gives back its CPU after a short grace."""
        check_may_wait(self._loop)
        runs_task = current.get() is not None
        if runs_task or self.blocked is None:  # else it is an actor that is being made, which can wait in no other way
            warn_if_a_loop_runs()
        if self.blocked is None or not runs_task:
            self._sleep(waiter, timeout_seconds)
            return
        began = time.monotonic()
        grace = BLOCK_GRACE_SECONDS if timeout_seconds is None else min(BLOCK_GRACE_SECONDS, timeout_seconds)
        if not self._sleep(waiter, grace):
            self.blocked(True)
            try:
                self._sleep(waiter, None if timeout_seconds is None else timeout_seconds - (time.monotonic() - began))
            finally:
                self.blocked(False)

    def _sleep(self, waiter: Waiter, timeout_seconds: float | None) -> bool:
        """Block until a waiter is released, or the time is over; tell whether it was released."""
        began = time.monotonic()
        visit(self._loop, waiter.is_released, timeout_seconds, self._spin)
        return waiter.wait(None if timeout_seconds is None else timeout_seconds - (time.monotonic() - began))

    def waiter(self) -> Callable[[bool], None] | None:
        """Return whom to tell when the task of this context waits, if it holds a CPU that others may need."""
        return self.blocked if current.get() is not None else None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Give back the CPU of the task in this thread while it waits for something else than objects."""
        if self.blocked is None or current.get() is None:
            yield
            return
        self.blocked(True)
        try:
            yield
        finally:
            self.blocked(False)

    def check(self) -> None:
        """Raise why nothing becomes ready, if there is a reason (any thread)."""
        self.check_open()
        if self.obstacle is not None:
            raise self.obstacle()

    def check_open(self) -> None:
        """Raise why this process has left the cluster, if it has."""
        if self._reactor.closed is not None:
            raise error_of(self._reactor.closed)


def _left(deadline: float | None) -> float | None:
    """Return how many seconds are left until a deadline, if there is one."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _split(refs: Sequence[ObjectRef[Any]], count: int) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
    """Return the first ``count`` references that are ready, and all others."""
    ready: list[ObjectRef[Any]] = []
    others: list[ObjectRef[Any]] = []
    for index, ref in enumerate(refs):
        if ref._state.value is not None:
            ready.append(ref)
            if len(ready) == count:
                others += refs[index + 1 :]
                break
        else:
            others.append(ref)
    return ready, others
