"""Awaiting objects in event loops: any loop, several loops, none of them Shoal's own.

The I/O thread tells what became ready; each loop is woken once for all that became ready for it meanwhile.

A task that runs a loop gives its CPU back while anything is awaited there, after a short grace: what it waits for may
need that CPU. Whatever else its loop does meanwhile, it does beside.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState


BLOCK_GRACE_SECONDS = 0.01
"""A worker that waits longer than this gives its CPU back."""


class _Inbox:
    """What has become ready for one loop and was not told there yet, and how much is awaited there."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._due: deque[asyncio.Future[None]] = deque()
        self._called = False
        self._awaited = 0
        self._grace: asyncio.TimerHandle | None = None
        self._blocked: Callable[[bool], None] | None = None

    def begin(self, loop: asyncio.AbstractEventLoop, waiter: Callable[[bool], None]) -> None:
        """Something more is awaited; ``waiter`` is told if this lasts (on the loop)."""

        def tell() -> None:
            self._grace, self._blocked = None, waiter
            waiter(True)

        self._awaited += 1
        if self._awaited == 1:
            self._grace = loop.call_later(BLOCK_GRACE_SECONDS, tell)

    def end(self, _future: asyncio.Future[None]) -> None:
        """Something is not awaited any more (on the loop)."""
        self._awaited -= 1
        if self._awaited:
            return
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        if self._blocked is not None:
            self._blocked(False)
            self._blocked = None

    def belongs_to(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether this is the loop's."""
        return self._loop() is loop

    def settle(self, future: asyncio.Future[None]) -> None:
        """Have a future of the loop done soon (any thread)."""
        self._due.append(future)
        loop = self._loop()
        if not self._called and loop is not None:
            self._called = True
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(self._settle_all)

    def _settle_all(self) -> None:
        self._called = False  # before looking: what comes from now on is seen here, or calls again
        due = self._due
        while due:
            future = due.popleft()
            if not future.done():
                future.set_result(None)


class _ThreadInbox(threading.local):
    """The inbox of the loop that runs in this thread; a thread runs one loop at a time."""

    inbox: _Inbox | None = None


_here = _ThreadInbox()


async def ready(ref: ObjectRef[Any]) -> None:
    """Wait until the object of a reference is ready; raise why, where it will not be."""
    state = ref._state
    began_ns = time.time_ns()
    while state.value is None:
        await until_told(state, asyncio.get_running_loop())
        if state.value is None:  # there is a reason, or it was lost
            state.home.check()
    state.home.awaited(state, began_ns)


def until_told(state: ObjectState, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Return a future of the running ``loop``, done when an object is ready, or known not to become so."""
    inbox = _here.inbox
    if inbox is None or not inbox.belongs_to(loop):
        inbox = _here.inbox = _Inbox(loop)
    due = inbox
    told: asyncio.Future[None] = loop.create_future()
    notice = state.home.notify(state, lambda: due.settle(told))

    def withdraw(told: asyncio.Future[None]) -> None:
        if told.cancelled():
            state.home.withdraw(notice)

    told.add_done_callback(withdraw)
    if (waiter := state.home.waiter()) is not None:
        due.begin(loop, waiter)
        told.add_done_callback(due.end)
    return told
