"""Streams: what a remote generator yields, item by item, on the owner's side and on the producer's.

An item is an object like any other, with the key (task, index) and indices from 1. The owner accepts items in the
order of their indices, each index once: when a generator is run again after a crash, what it yields anew up to there is
dropped. The object *behind* the last item is made ready with ``END``, so that waiting for an item, for the end and for
an error is one and the same: waiting for the object of the next index.

::

    producer:  yield ── Item 1, Item 2, … ── TaskDone     stops when told StreamClosed, or while ``ahead`` items
    owner:     object 1, object 2, …, END behind the last     were not taken (back-pressure), until StreamAdvanced

An item is sent before the generator goes on, so that it is not lost where its process ends in what follows, unless
items come faster than that is worth (``PACE_SECONDS``).

A generator that raises has its exception as its last item, one that was cancelled the cancellation. Once a stream is
closed, its next object is END at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

from shoal_core.protocol.ids import ProcessId, TaskNumber, object_key
from shoal_core.protocol.records import Failed, Inline, Stored, Value
from shoal_core.runtime.loop.awaiting import ready
from shoal_core.runtime.ownership.identities import TaskID
from shoal_core.runtime.ownership.objects import ObjectRef, ObjectState, ObjectTable

if TYPE_CHECKING:
    from shoal_core.runtime.runtime import Runtime

T = TypeVar("T")

PACE_SECONDS = 0.004
MOST_AHEAD_OF_PACE = 16
"""A generator goes on when its item is sent, since its process may end in what follows: so often, and as often at once.

Items that come faster are sent together, which costs a tenth of that: a long stream is slowed by a few percent.
"""
STREAMING = -1
"""In place of a number of return values: a stream of them."""
END = Failed("stream_end", "the generator has no more items")
DONE = Inline(b"N.")
"""What becomes of the object that stands for the whole generator: None, pickled."""


class Stream:
    """A stream as its owner knows it. ``taken`` and ``closed`` are its user's, the rest is the I/O thread's.

    ``source`` is the process that runs the generator, and the attempt that it is there. ``stored`` are the indices of
    the items that lie in shared memory, and so may be lost.
    """

    __slots__ = (
        "_held",
        "_table",
        "ahead",
        "closed",
        "completion",
        "length",
        "number",
        "received",
        "source",
        "stored",
        "taken",
    )

    def __init__(self, table: ObjectTable, number: TaskNumber, ahead: int) -> None:
        self.number = number
        self.ahead = ahead
        self.received = 0
        self.taken = 0
        self.length: int | None = None
        self.stored: list[int] = []
        self.source: tuple[ProcessId, int] | None = None
        self.closed = False
        self.completion = table.create(object_key(number, 0))
        self._table = table
        self._held: dict[int, ObjectRef[Any]] = {}

    def next(self) -> ObjectRef[Any]:
        """Return the object of the next index, which may be an item, or END (any thread)."""
        with self._table.lock:
            if self.closed:
                return self._nothing_more()
            return self._at(self.taken + 1)

    def take(self) -> None:
        """The next item is its user's now (any thread)."""
        with self._table.lock:
            self.taken += 1
            self._held.pop(self.taken, None)

    def accept(self, index: int, value: Value) -> ObjectState | None:
        """Take in an item; return its object, or None where it is not wanted."""
        if self.closed or index != self.received + 1:
            return None
        self.received = index
        if type(value) is Stored:
            self.stored.append(index)
        with self._table.lock:
            return self._at(index)._state

    def end(self, failure: Failed | None) -> list[tuple[ObjectState, Value]]:
        """The generator has ended; return what is ready now: its last item, if it failed, END, and the whole."""
        settled: list[tuple[ObjectState, Value]] = [(self.completion._state, failure or DONE)]
        if failure is not None and (state := self.accept(self.received + 1, failure)) is not None:
            settled.append((state, failure))
        self.length = self.received
        if not self.closed:
            with self._table.lock:
                settled.append((self._at(self.length + 1)._state, END))
        return settled

    def drop(self) -> list[tuple[ObjectState, Value]]:
        """Let go of the items that were not taken; return what is ready now: END, where somebody waits (I/O thread)."""
        with self._table.lock:
            held, self._held = self._held, {}
        waited = held.get(self.received + 1)
        return [] if waited is None or waited._state.value is not None else [(waited._state, END)]

    def _at(self, index: int) -> ObjectRef[Any]:
        ref = self._held.get(index)
        if ref is None:
            ref = self._held[index] = self._table.create(object_key(self.number, index))
            ref._state.trace = self.completion._state.trace
        return ref

    def _nothing_more(self) -> ObjectRef[Any]:
        state = ObjectState(self._table.home, self._table.local, object_key(self.number, self.taken + 1))
        state.value = END  # known to nobody else: no table has it, and nobody can be waiting for it
        return ObjectRef(state)


class ObjectRefGenerator(Generic[T]):
    """The references to what a remote generator yields, in order, each as soon as it is there.

    Iterate with ``for`` or ``async for``, or take one with ``next``; ``wait`` takes it like a reference, which is ready
    when the next item is, or when there are no more. An exception of the generator comes out of ``get`` of its last
    item, and so does ``TaskCancelledError`` where it was cancelled. When this object goes, or ``close()`` is called,
    the generator is stopped and its items are freed.
    """

    def __init__(self, runtime: Runtime, stream: Stream) -> None:
        self._runtime = runtime
        self._stream = stream

    @property
    def _state(self) -> ObjectState:
        """The object whose readiness is this generator's."""
        return self._stream.next()._state

    @property
    def _generator_ref(self) -> ObjectRef[None]:
        return self._stream.completion

    def __iter__(self) -> Iterator[ObjectRef[T]]:
        return self

    def __next__(self) -> ObjectRef[T]:
        ref = self._stream.next()
        self._runtime.wait([ref], 1, None)
        if ref._state.value is END:
            raise StopIteration
        return self._took(ref)

    def __aiter__(self) -> AsyncIterator[ObjectRef[T]]:
        return self

    async def __anext__(self) -> ObjectRef[T]:
        ref = self._stream.next()
        await ready(ref)
        if ref._state.value is END:
            raise StopAsyncIteration
        return self._took(ref)

    def completed(self) -> ObjectRef[None]:
        """Return a reference that is ready when the generator has ended; ``get`` of it raises what it raised."""
        return self._stream.completion

    def next_ready(self) -> bool:
        """Tell whether the next item is there: ``next`` would not wait."""
        value = self._state.value
        return value is not None and value is not END

    def is_finished(self) -> bool:
        """Tell whether all items were taken and there will be no more."""
        return self._state.value is END

    def task_id(self) -> TaskID:
        """Return the id of the task."""
        return self._stream.completion.task_id()

    def close(self) -> None:
        """Stop the generator, and free the items that were not taken."""
        if not self._stream.closed:
            self._stream.closed = True  # without a lock: this may run at any moment, as the end of an object
            self._runtime.move_stream(self._stream)

    def _took(self, ref: ObjectRef[T]) -> ObjectRef[T]:
        self._stream.take()
        if self._stream.ahead:
            self._runtime.move_stream(self._stream)
        return ref

    def __del__(self) -> None:
        if hasattr(self, "_stream"):
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "An ObjectRefGenerator cannot be pickled: its items are taken in one place. Pass the references that it "
            "gives, or take the items where they are needed."
        )

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self.task_id().hex()})"


class Producer:
    """A generator that runs in this process: whether it is still wanted, and how far ahead it may run.

    The I/O thread advances and closes it, whoever runs the generator waits.
    """

    def __init__(self, ahead: int) -> None:
        self.closed = False
        self._ahead = ahead
        self._taken = 0
        self._due_at = 0.0
        self._moved = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    def may_go_on(self, made: int) -> bool:
        """Tell whether another item may be made after ``made`` of them."""
        return self.closed or not self._ahead or made - self._taken < self._ahead

    def is_due(self, now: float) -> bool:
        """Tell whether the item that was made now is to be sent before the generator goes on (its thread)."""
        if now < self._due_at:
            return False
        self._due_at = max(self._due_at, now - (MOST_AHEAD_OF_PACE - 1) * PACE_SECONDS) + PACE_SECONDS
        return True

    def wait(self, made: int) -> None:
        """Wait until another item may be made (user threads)."""
        with self._moved:
            while not self.may_go_on(made):
                self._moved.wait()

    async def wait_on_loop(self, made: int) -> None:
        """Wait until another item may be made (an actor's loop)."""
        loop = asyncio.get_running_loop()
        while not self.may_go_on(made):
            moved: asyncio.Future[None] = loop.create_future()

            def wake(moved: asyncio.Future[None] = moved) -> None:
                loop.call_soon_threadsafe(_settle, moved)

            self._listeners.append(wake)
            if not self.may_go_on(made):
                await moved

    def advance(self, taken: int) -> None:
        """So many items were taken (I/O thread)."""
        with self._moved:
            self._taken = max(self._taken, taken)
            self._moved.notify_all()
        self._wake()

    def close(self) -> None:
        """Nobody wants more items (I/O thread)."""
        with self._moved:
            self.closed = True
            self._moved.notify_all()
        self._wake()

    def _wake(self) -> None:
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener()


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
