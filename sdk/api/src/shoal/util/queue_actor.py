"""The actor behind a ``Queue``: its items, and who waits for them. Its one loop serves everybody in turn.

An item that was taken for a caller who is gone is not lost. A caller that has to wait is known to the actor by a
*sign of life*, a reference that its process owns and that never becomes ready; it fails when the process dies. What
such a caller is given is kept until it says that it has received it, and goes back to the head of the queue otherwise:

    take ── an item is there ──► it is the result
      │
      └─ none is there ──► the caller waits ── put ──► given, kept ── received ──► forgotten
                             │                           │
                             ├── time is over: ``Empty`` ├── the caller gave up, or its process died ──► back
                             └── the caller gave up, or its process died: forgotten
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
from collections import deque
from collections.abc import Awaitable, Iterator
from typing import Any

from shoal.actor import method
from shoal_core.protocol.errors import ShoalError
from shoal_core.runtime.ownership.objects import ObjectRef

QUIET_SECONDS = 5.0
"""So long a process that waits for nothing is remembered: a worker process whose object somebody holds does not end."""

Ticket = str
"""What names a call that may wait (see ``ticket_of``)."""

Result = tuple[()] | tuple[Any] | tuple[Any, Ticket]
"""What ``take`` returns: nothing (its sign of life is wanted), an item, or an item whose receipt is to be told."""

NOBODY = ""
"""The process of those who use the actor itself."""

_numbers = itertools.count(1)


def ticket_of(process: str) -> Ticket:
    """Draw what names a call that may wait: its process, and a number (in one string, which is pickled fast)."""
    return f"{process}:{next(_numbers)}"


def _process_of(ticket: Ticket) -> str:
    return ticket.partition(":")[0]


class Empty(queue.Empty):
    """There is no item, or there are too few."""


class Full(queue.Full):
    """There is no room."""


class _Client:
    """A process that waits, or has lately waited, for items: what it was given and has not received yet."""

    __slots__ = ("given", "process", "used_at", "waiting", "watch")

    def __init__(self, process: str) -> None:
        self.process = process
        self.given: dict[Ticket, Any] = {}
        self.waiting = 0
        self.used_at = 0.0
        self.watch: asyncio.Task[None] | None = None

    @property
    def is_quiet(self) -> bool:
        """Whether it would not matter if the process died."""
        return not self.waiting and not self.given


class _Taker:
    """A call that waits for an item; without a client nobody knows whether its caller lives."""

    __slots__ = ("client", "future")

    def __init__(self, future: asyncio.Future[Any], client: _Client | None) -> None:
        self.future = future
        self.client = client


class _Giver:
    """A call that waits for room for its item."""

    __slots__ = ("future", "item")

    def __init__(self, future: asyncio.Future[None], item: Any) -> None:
        self.future = future
        self.item = item


class QueueActor:
    """The items of a queue and who waits for them. Nobody waits for an item while there is one, nor for room.

    Methods return at once what can be had at once, and else something to await.
    """

    def __init__(self, maxsize: int) -> None:
        self._maxsize = maxsize
        self._items: deque[Any] = deque()
        self._takers: dict[Ticket, _Taker] = {}
        self._givers: dict[Ticket, _Giver] = {}
        self._clients: dict[str, _Client] = {}
        self._loop = asyncio.get_event_loop()
        self._sweep: asyncio.TimerHandle | None = None

    def qsize(self) -> int:
        """Return the number of items."""
        return len(self._items)

    def empty(self) -> bool:
        """Tell whether there is no item."""
        return not self._items

    def full(self) -> bool:
        """Tell whether there is no room."""
        return 0 < self._maxsize <= len(self._items)

    def put(self, item: Any, timeout: float | None = None, ticket: Ticket | None = None) -> Awaitable[None] | None:
        """Add an item, as soon as there is room."""
        if self.full():
            return self._wait_for_room(item, timeout, ticket or ticket_of(NOBODY))
        self._add(item)
        return None

    def get(self, timeout: float | None = None) -> Any:
        """Take an item, as soon as there is one (for those who use the actor itself)."""
        if self._items:
            return self._pop()
        return self._wait_for_item(timeout, ticket_of(NOBODY), None)

    def put_nowait(self, item: Any) -> None:
        """Add an item, if there is room."""
        if self.full():
            raise Full
        self._add(item)

    def get_nowait(self) -> Any:
        """Take an item, if there is one."""
        if not self._items:
            raise Empty
        return self._pop()

    def put_nowait_batch(self, items: list[Any]) -> None:
        """Add all of the items, if there is room for all."""
        if 0 < self._maxsize < len(items) + self.qsize():
            raise Full(f"Cannot add {len(items)} items to queue of size {self.qsize()} and maxsize {self._maxsize}.")
        for item in items:
            self._add(item)

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Take so many items, if there are so many."""
        if num_items > self.qsize():
            raise Empty(f"Cannot get {num_items} items from queue of size {self.qsize()}.")
        return [self._pop() for _ in range(num_items)]

    def put_some(self, items: list[Any]) -> int:
        """Add as many of the items as there is room for, the first ones; return how many."""
        room = max(0, self._maxsize - len(self._items)) if self._maxsize > 0 else len(items)
        for item in items[:room]:
            self._add(item)
        return min(room, len(items))

    def take_some(self, most: int) -> list[Any]:
        """Take the items that are there, at most so many."""
        return [self._pop() for _ in range(min(most, len(self._items)))]

    # ------------------------------------------------------------------------------- callers that may be gone

    def take(self, ticket: Ticket, timeout: float | None, life: list[ObjectRef[Any]] | None = None) -> Any:
        """Take an item, as soon as there is one; ``life`` is the caller's sign of life. Returns ``Result``."""
        if self._items:
            return (self._pop(),)
        process = _process_of(ticket)
        client = self._clients.get(process)
        if client is None:
            if life is None and timeout != 0:
                return ()
            client = _Client(process) if life is None else self._meet(process, life[0])
        return self._wait_for_item(timeout, ticket, client)

    @method(num_returns=0)
    def received(self, ticket: Ticket) -> None:
        """Forget what was given to a call: its caller has it."""
        client = self._clients.get(_process_of(ticket))
        if client is not None:
            client.given.pop(ticket, None)
            self._used(client)

    @method(num_returns=0)
    async def give_up(self, ticket: Ticket, taken: list[ObjectRef[Result]]) -> None:
        """Undo a call: its caller does not wait for it any more, and has not received anything."""
        client = self._clients.get(_process_of(ticket))
        if (taker := self._takers.pop(ticket, None)) is not None:
            taker.future.set_exception(Empty())
        elif (giver := self._givers.pop(ticket, None)) is not None:
            giver.future.set_exception(Full())
        elif client is not None and ticket in client.given:
            self._put_back([client.given.pop(ticket)])
            self._used(client)
        elif taken:
            with contextlib.suppress(ShoalError):
                result = await taken[0]
                self._put_back(list(result[:1]))

    @method(num_returns=0)
    async def put_back(self, items: list[Any] | list[ObjectRef[list[Any]]], by_reference: bool = False) -> None:
        """Have items be the first again: nobody took them. ``by_reference``: they are what ``take_some`` returned."""
        if by_reference:
            with contextlib.suppress(ShoalError):
                items = await items[0]
        self._put_back(items)

    def _meet(self, process: str, life: ObjectRef[Any]) -> _Client:
        """Know a process from now on, until its sign of life fails."""
        client = self._clients[process] = _Client(process)
        client.watch = self._loop.create_task(self._watch(client, life))
        return client

    async def _watch(self, client: _Client, life: ObjectRef[Any]) -> None:
        try:
            await life
        except ShoalError:
            del self._clients[client.process]
            for ticket in [ticket for ticket, taker in self._takers.items() if taker.client is client]:
                self._takers.pop(ticket).future.set_exception(Empty())
            given, client.given = client.given, {}
            self._put_back(list(given.values()))

    def _used(self, client: _Client) -> None:
        """Note that a process may be quiet from now on; those who are so for a while are forgotten."""
        client.used_at = self._loop.time()
        if self._sweep is None and client.is_quiet:
            self._sweep = self._loop.call_later(QUIET_SECONDS, self._forget_the_quiet)

    def _forget_the_quiet(self) -> None:
        self._sweep = None
        quiet = [client for client in self._clients.values() if client.is_quiet]
        for client in quiet:
            if self._loop.time() - client.used_at < QUIET_SECONDS:
                self._sweep = self._sweep or self._loop.call_later(QUIET_SECONDS, self._forget_the_quiet)
                continue
            del self._clients[client.process]
            if client.watch is not None:
                client.watch.cancel()

    # ------------------------------------------------------------------------------- items

    def _add(self, item: Any) -> None:
        """Give an item to who waits longest, or keep it."""
        if not self._takers:
            self._items.append(item)
            return
        ticket = next(iter(self._takers))
        taker = self._takers.pop(ticket)
        if taker.client is not None:
            taker.client.given[ticket] = item
        taker.future.set_result(item)

    def _pop(self) -> Any:
        """Return the first item, and make use of its room."""
        item = self._items.popleft()
        if self._givers and not self.full():
            giver = self._givers.pop(next(iter(self._givers)))
            self._add(giver.item)
            giver.future.set_result(None)
        return item

    def _put_back(self, items: list[Any]) -> None:
        """Have items be the first again that are taken, also where there is no room for them any more."""
        later = []
        for item in items:
            if self._takers:
                self._add(item)
            else:
                later.append(item)
        self._items.extendleft(reversed(later))

    async def _wait_for_item(self, seconds: float | None, ticket: Ticket, client: _Client | None) -> Any:
        taker = _Taker(self._loop.create_future(), client)
        self._takers[ticket] = taker
        if client is not None:
            client.waiting += 1
        try:
            with self._limited(seconds, self._takers, ticket, Empty):
                item = await taker.future
        finally:
            if client is not None:
                client.waiting -= 1
                self._used(client)
        return item if client is None else (item, ticket)

    async def _wait_for_room(self, item: Any, seconds: float | None, ticket: Ticket) -> None:
        giver = _Giver(self._loop.create_future(), item)
        self._givers[ticket] = giver
        with self._limited(seconds, self._givers, ticket, Full):
            await giver.future

    @contextlib.contextmanager
    def _limited(
        self,
        seconds: float | None,
        waiting: dict[Ticket, _Taker] | dict[Ticket, _Giver],
        ticket: Ticket,
        error: type[Exception],
    ) -> Iterator[None]:
        """Have a call that waits fail when its time is over."""

        def time_is_over() -> None:
            one = waiting.pop(ticket, None)
            if one is not None:
                one.future.set_exception(error())

        if seconds == 0:
            time_is_over()
        timer = self._loop.call_later(seconds, time_is_over) if seconds else None
        try:
            yield
        finally:
            waiting.pop(ticket, None)
            if timer is not None:
                timer.cancel()
