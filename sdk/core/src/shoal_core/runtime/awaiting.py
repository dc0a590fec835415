"""Awaiting objects in event loops: any loop, several loops, none of them Shoal's own.

The I/O thread tells what became ready; each loop is woken once for all that became ready for it meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal_core.runtime.objects import ObjectRef, ObjectState


class _Inbox:
    """What has become ready for one loop and was not told there yet."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._due: deque[asyncio.Future[None]] = deque()

    def belongs_to(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether this is the loop's."""
        return self._loop() is loop

    def settle(self, future: asyncio.Future[None]) -> None:
        """Have a future of the loop done soon (any thread)."""
        self._due.append(future)
        loop = self._loop()
        if len(self._due) == 1 and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(self._settle_all)

    def _settle_all(self) -> None:
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
    if state.value is None:
        await until_told(state, asyncio.get_running_loop())
        if state.value is None:
            state.home.load(state)


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
    return told
