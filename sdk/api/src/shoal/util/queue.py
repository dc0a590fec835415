"""``Queue``: first in, first out, between any processes of the cluster.

The items are in an actor, whose one loop serves everybody in turn. Whoever waits there, waits for a future: a blocked
``get`` costs nothing until there is an item.

What coroutines of one event loop ask for in the same turn of it goes in one call, as far as it can be had at once; the
others wait each in a call of its own. ``queue_actor`` says what becomes of items whose taker is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar, cast

from shoal.actor import ActorClass, kill
from shoal.handle import ActorHandle
from shoal.objects import get, wait
from shoal.session import runtime
from shoal.util.queue_actor import Empty, Full, QueueActor, Result, Ticket, ticket_of
from shoal_core.runtime.ownership.objects import ObjectRef

T = TypeVar("T")

logger = logging.getLogger("shoal")

MOST_TOGETHER = 256
"""So many coroutines at most share a call."""

MOST_WAITING = 1_000_000
"""So many callers may wait for one queue at once, unless ``actor_options`` say otherwise."""


class _Turn:
    """What coroutines of one event loop ask for in one turn of it: each a future, and the item if it puts one."""

    __slots__ = ("asked", "loop")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.asked: list[tuple[asyncio.Future[Any], Any]] = []


Send = Callable[[ActorHandle[QueueActor], Sequence[tuple[asyncio.Future[Any], Any]]], Coroutine[Any, Any, None]]


class _Turns:
    """The turns in which coroutines come together, and the calls that are made for them.

    A future's result is false where its coroutine has to go its own way.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._open: _Turn | None = None
        self._calls: set[asyncio.Task[None]] = set()

    def join(self, actor: ActorHandle[QueueActor], item: Any = None) -> asyncio.Future[Any]:
        """Ask in the current turn of the running loop."""
        loop = asyncio.get_running_loop()
        turn = self._open
        if turn is None or turn.loop is not loop or len(turn.asked) == MOST_TOGETHER:
            turn = self._open = _Turn(loop)
            loop.call_soon(self._close, actor, turn)
        future = loop.create_future()
        turn.asked.append((future, item))
        return future

    def _close(self, actor: ActorHandle[QueueActor], turn: _Turn) -> None:
        if self._open is turn:
            self._open = None
        asked = [one for one in turn.asked if not one[0].done()]
        if len(asked) == 1:
            asked[0][0].set_result(False)
        elif asked:
            call = turn.loop.create_task(self._send(actor, asked))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)


async def _put_together(actor: ActorHandle[QueueActor], asked: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    accepted = 0
    try:
        accepted = await actor.put_some.remote([item for _, item in asked])
    except Exception:
        logger.debug("a call for %d coroutines failed; each makes its own", len(asked), exc_info=True)
    for index, (future, _) in enumerate(asked):
        if not future.done():
            future.set_result(index < accepted)


async def _take_together(actor: ActorHandle[QueueActor], asked: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    taken: ObjectRef[list[Any]] | None = None
    items: list[Any] = []
    try:
        taken = actor.take_some.remote(len(asked))
        items = await taken
    except asyncio.CancelledError:
        actor.put_back.remote([taken], by_reference=True)
        raise
    except Exception:
        logger.debug("a call for %d coroutines failed; each makes its own", len(asked), exc_info=True)
    given = 0
    for future, _ in asked:
        if not future.done():
            future.set_result((items[given],) if given < len(items) else ())
            given += 1
    if items[given:]:
        actor.put_back.remote(items[given:])


class Queue(Generic[T]):
    """A queue that tasks, actors and drivers share: pass it as an argument, or keep it in anything that is pickled.

    ::

        queue = Queue(maxsize=100)
        queue.put(1)
        print(queue.get())

    ``maxsize`` is the most items it holds, 0 for any number; ``actor_options`` are those of the actor that holds them,
    for example ``{"name": "jobs", "lifetime": "detached"}``. The items live as long as that actor: as long as anybody
    has the queue, and its creator lives. Items of one producer come out in the order in which they were put.
    """

    def __init__(self, maxsize: int = 0, actor_options: Mapping[str, Any] | None = None) -> None:
        options = {"max_concurrency": MOST_WAITING, **(actor_options or {})}
        actor_class: ActorClass[QueueActor, [int]] = ActorClass(QueueActor, options)
        self.__setstate__((maxsize, actor_class.remote(maxsize)))

    def __getstate__(self) -> tuple[int, ActorHandle[QueueActor]]:
        return self.maxsize, self.actor

    def __setstate__(self, state: tuple[int, ActorHandle[QueueActor]]) -> None:
        self.maxsize, self.actor = state
        self._puts = _Turns(_put_together)
        self._takes = _Turns(_take_together)

    def __len__(self) -> int:
        return self.size()

    def size(self) -> int:
        """Return the number of items."""
        return cast(int, get(self._living.qsize.remote()))

    def qsize(self) -> int:
        """Return the number of items."""
        return self.size()

    def empty(self) -> bool:
        """Tell whether there is no item."""
        return cast(bool, get(self._living.empty.remote()))

    def full(self) -> bool:
        """Tell whether there is no room."""
        return cast(bool, get(self._living.full.remote()))

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Add an item, waiting for room; raise ``Full`` if there is none (after ``timeout`` seconds, if ``block``)."""
        if not block:
            _settle(lambda: get(self._living.put_nowait.remote(item)))
            return
        _check_timeout(timeout)
        ticket = _ticket()
        with self._given_up(ticket):
            _settle(lambda: get(self._living.put.remote(item, timeout, ticket)))

    async def put_async(
        self,
        item: T,
        block: bool = True,
        timeout: float | None = None,  # noqa: ASYNC109 - Ray's name
    ) -> None:
        """Add an item as ``put`` does. Where it is cancelled while it waits for room, the item is not added."""
        if not block:
            await _settle_async(self._living.put_nowait.remote(item))
            return
        _check_timeout(timeout)
        if await self._puts.join(self._living, item):
            return
        ticket = _ticket()
        with self._given_up(ticket):
            await _settle_async(self._living.put.remote(item, timeout, ticket))

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Take an item, waiting for one; raise ``Empty`` if there is none (after ``timeout`` seconds, if ``block``)."""
        if not block:
            return cast(T, _settle(lambda: get(self._living.get_nowait.remote())))
        _check_timeout(timeout)
        ticket = _ticket()
        taken: ObjectRef[Result] = self._living.take.remote(ticket, timeout)
        with self._given_up(ticket, lambda: taken):
            result = _settle(lambda: get(taken))
            if not result:
                taken = self._living.take.remote(ticket, timeout, [runtime().token()])
                result = _settle(lambda: get(taken))
        return self._received(result)

    async def get_async(self, block: bool = True, timeout: float | None = None) -> T:  # noqa: ASYNC109 - Ray's name
        """Take an item as ``get`` does. Where it is cancelled, the item stays in the queue."""
        if not block:
            return cast(T, await _settle_async(self._living.get_nowait.remote()))
        _check_timeout(timeout)
        together = self._takes.join(self._living)
        try:
            taken_together = await together
        except asyncio.CancelledError:
            if not together.cancelled() and together.result():
                self._living.put_back.remote(list(together.result()))
            raise
        if taken_together:
            return cast(T, taken_together[0])
        ticket = _ticket()
        taken: ObjectRef[Result] = self._living.take.remote(ticket, timeout)
        with self._given_up(ticket, lambda: taken):
            result = await _settle_async(taken)
            if not result:
                taken = self._living.take.remote(ticket, timeout, [runtime().token()])
                result = await _settle_async(taken)
        return self._received(result)

    def put_nowait(self, item: T) -> None:
        """Add an item; raise ``Full`` if there is no room."""
        self.put(item, block=False)

    def put_nowait_batch(self, items: Iterable[T]) -> None:
        """Add items in their order, all of them or none: raise ``Full`` if they do not all fit."""
        if not isinstance(items, Iterable):
            raise TypeError("Argument 'items' must be an Iterable")
        batch = list(items)
        _settle(lambda: get(self._living.put_nowait_batch.remote(batch)))

    def get_nowait(self) -> T:
        """Take an item; raise ``Empty`` if there is none."""
        return self.get(block=False)

    def get_nowait_batch(self, num_items: int) -> list[T]:
        """Take so many items; raise ``Empty`` and take none if there are fewer."""
        if not isinstance(num_items, int):
            raise TypeError("Argument 'num_items' must be an int")
        if num_items < 0:
            raise ValueError("'num_items' must be nonnegative")
        return cast(list[T], _settle(lambda: get(self._living.get_nowait_batch.remote(num_items))))

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the actor, and with it the queue: after the calls made so far, or at once if ``force``.

        Where those take longer than ``grace_period_s`` seconds it is ended at once as well.
        """
        actor: ActorHandle[QueueActor] | None = self.actor
        if actor is None:
            return
        if force:
            kill(actor)
        else:
            ended, _ = wait([actor.__ray_terminate__.remote()], timeout=grace_period_s)
            if not ended:
                kill(actor)
        self.actor = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Queue(maxsize={self.maxsize}, {self.actor!r})"

    # ------------------------------------------------------------------------------- inside

    @property
    def _living(self) -> ActorHandle[QueueActor]:
        actor: ActorHandle[QueueActor] | None = self.actor
        if actor is None:
            raise RuntimeError("This queue was shut down: shutdown() was called on it, here.")
        return actor

    def _received(self, result: Result) -> T:
        if len(result) == 2:
            self._living.received.remote(result[1])
        return cast(T, result[0])  # type: ignore[misc]

    @contextlib.contextmanager
    def _given_up(self, ticket: Ticket, taken: Callable[[], ObjectRef[Result]] | None = None) -> Iterator[None]:
        """Undo a call whose caller stops waiting: it is cancelled, or interrupted."""
        actor = self._living
        try:
            yield
        except Exception:
            raise
        except BaseException:
            actor.give_up.remote(ticket, [] if taken is None else [taken()])
            raise


def _settle(call: Callable[[], Any]) -> Any:
    """Return what a call returns; the queue's own errors are raised as if they had been raised here."""
    try:
        return call()
    except Empty as error:
        raise Empty(*_text(error)) from None
    except Full as error:
        raise Full(*_text(error)) from None


async def _settle_async(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except Empty as error:
        raise Empty(*_text(error)) from None
    except Full as error:
        raise Full(*_text(error)) from None


def _text(error: BaseException) -> tuple[Any, ...]:
    cause = getattr(error, "cause", error)
    return cast(tuple[Any, ...], cause.args)


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and timeout < 0:
        raise ValueError("'timeout' must be a non-negative number")


def _ticket() -> Ticket:
    """Draw what names a call of this process that may wait."""
    return ticket_of(runtime().local)


__all__ = ["Empty", "Full", "Queue"]
