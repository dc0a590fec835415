"""Values where they lie: inline, or in the shared memory of a node, mapped from there.

A value in another node's memory is mapped like any other: this process's own node pulls a copy first. A process that
shares memory with no node (``transfers``) pulls it into memory of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import NodeDiedError, NotFoundError, ObjectLostError
from shoal_core.protocol.ids import ObjectKey, ProcessId, durable_id, node_of
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import Failed, Inline, Reference, Stored, Value
from shoal_core.protocol.storage import (
    MOST_PINS,
    AllocateSegment,
    DurablePut,
    PersistSegment,
    PinSegment,
    PinSegments,
    SegmentGranted,
    SegmentPinned,
    SegmentsPinned,
)
from shoal_core.protocol.subjects import Subjects
from shoal_core.runtime.commands import discard, pin, seal, unpin
from shoal_core.runtime.data.ahead import Ahead
from shoal_core.runtime.data.durable import DurableTier
from shoal_core.runtime.data.failures import error_of
from shoal_core.runtime.data.segments import Memory, Reader, view
from shoal_core.runtime.data.serialization import INLINE_BYTES, Codec, Serialized, read_segment, segment_bytes, written
from shoal_core.runtime.data.transfers import REQUEST_SECONDS, Transfers, patience_seconds
from shoal_core.runtime.data.writing import Writer
from shoal_core.runtime.ownership.objects import ObjectState
from shoal_core.runtime.reactor import Reactor

T = TypeVar("T")

ROOM_SECONDS = 600.0
"""So long a node may take to make room for an object, or to bring one back; it says itself when it gives up."""

LARGE_BYTES = 1024 * 1024
"""The end of a smaller mapping is told together with others; a larger one has a file of its own."""

Pins = dict[str, tuple[int, str]]
"""Segments that are pinned: the serial of the pin of each, and where it lies."""

Call = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the I/O thread and waits for its result."""


class CopyUnavailable(Exception):
    """A copy is gone, or its node is, or it was lost before (``value`` is None): the object has to come anew."""

    def __init__(self, value: Stored | None) -> None:
        super().__init__(value)
        self.value = value


class Values:
    """The values that one process puts and reads (user threads only).

    ``shared_memory`` is its node's folder; a process without one has ``transfers`` in its place.
    """

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        local: ProcessId,
        shared_memory: Path | None,
        transfers: Transfers | None,
        codec: Codec,
        reactor: Reactor,
        call: Call,
    ) -> None:
        self.codec = codec
        self._bus = bus
        self._subjects = subjects
        self._local = local
        self._node = node_of(local)
        self._writer = None if shared_memory is None else Writer(shared_memory, reactor.later)
        self._reader = None if shared_memory is None else Reader(shared_memory, reactor.later, self._unpin)
        self._transfers = transfers
        self._reactor = reactor
        self._call = call
        self._durable = DurableTier(bus, subjects)
        self._pins = itertools.count(1)
        self._allocations = itertools.count(1)
        give_back = partial(discard, reactor, self._node)
        self._ahead = Ahead(reactor, bus.spawn, partial(self._allocate, ahead=True), give_back)

    def close(self) -> None:
        """Let go of what is kept for the next value to be put (any thread)."""
        if self._writer is not None:
            self._writer.close()
        if self._reader is not None:
            self._reader.close()

    def place(self, serialized: Serialized, owner: ProcessId, key: ObjectKey) -> Value:
        """Return a value as it travels: small ones inline, large ones in a node's shared memory."""
        if not serialized.raw and serialized.size_bytes <= INLINE_BYTES:
            return serialized.inline()
        if self._writer is None:
            return serialized.inline() if self._transfers is None else self._transfers.give(serialized, owner, key)
        segment = self._write(serialized, self._writer)
        return self._seal(segment, serialized, Reference(owner, key))

    def place_durably(self, serialized: Serialized, key: ObjectKey, keep_seconds: float | None) -> Value:
        """Return a value of this process's own, as it travels, once the durable tier has it too."""
        small = not serialized.raw and serialized.size_bytes <= INLINE_BYTES
        if small or self._writer is None:
            put = DurablePut(
                object_id=durable_id(self._local, key),
                size_bytes=segment_bytes(serialized),
                digests=[],
                job_id=self._reactor.job,
                keep_seconds=keep_seconds,
            )
            self._call(self._durable.put(put, written(serialized)))
            return self.place(serialized, self._local, key)
        segment = self._write(serialized, self._writer)
        request = PersistSegment(process=self._local, segment=segment, key=key, keep_seconds=keep_seconds)
        try:
            self._call(self._ask_node("persist", request, ROOM_SECONDS))
        except BaseException:
            discard(self._reactor, self._node, segment)
            raise
        return self._seal(segment, serialized, Reference(self._local, key))

    def _write(self, serialized: Serialized, writer: Writer) -> str:
        """Write a value into a new segment of this node; return its name."""
        size_bytes = segment_bytes(serialized)
        granted = self._ahead.take(size_bytes) or self._call(self._allocate(size_bytes, ahead=False))
        writer.write(granted.place, serialized)
        return granted.segment

    async def _allocate(self, size_bytes: int, *, ahead: bool) -> SegmentGranted:
        request = AllocateSegment(
            process=self._local, size_bytes=size_bytes, serial=next(self._allocations), ahead=ahead
        )
        granted = await self._ask_node("allocate", request, ROOM_SECONDS)
        assert isinstance(granted, SegmentGranted)
        return granted

    def _seal(self, segment: str, serialized: Serialized, written: Reference) -> Stored:
        size_bytes = segment_bytes(serialized)
        seal(self._reactor, self._node, segment, written)
        self._ahead.written(size_bytes)
        self._reactor.wake()
        return Stored(self._node, segment, size_bytes, serialized.contained)

    def of(self, state: ObjectState, pins: Pins | None = None) -> Any:
        """Return the value of an object that is ready, or raise its error; memory that is alive is used again.

        Raises ``CopyUnavailable`` where the object is not ready any more, or will have to come anew. ``pins`` are those
        that ``pinned`` holds.
        """
        value = state.value
        if value is None:
            raise CopyUnavailable(None)
        if type(value) is Stored:
            memory = None if state.shared is None else state.shared()
            if memory is not None:
                return read_segment(view(memory))
            loaded, memory = self._load(value, pins)
            state.shared = weakref.ref(memory)
            return loaded
        return self.read(value, pins)

    def read(self, value: Value, pins: Pins | None = None) -> Any:
        """Return what a value stands for, wherever it lies; raise the error it stands for, or ``CopyUnavailable``."""
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Failed:
            raise error_of(value)
        assert type(value) is Stored
        return self._load(value, pins)[0]

    @contextlib.contextmanager
    def pinned(self, values: Sequence[Value | None]) -> Iterator[Pins]:
        """Pin the segments of this node among values with few requests, for ``of`` and ``read`` to take from.

        What cannot be pinned at once is left to whoever reads it; what is not taken is let go again.
        """
        names = [value.segment for value in values if type(value) is Stored and value.node == self._node]
        if len(names) < 2 or self._reader is None:
            yield {}
            return
        asked = {name: next(self._pins) for name in names}
        pins: Pins = {}
        try:
            waiting = list(asked.items())
            for start in range(0, len(waiting), MOST_PINS):
                request = PinSegments(process=self._local, pins=dict(waiting[start : start + MOST_PINS]))
                answer = self._call(self._ask_node("pin_many", request))
                assert isinstance(answer, SegmentsPinned)
                pins |= {name: (asked.pop(name), place) for name, place in answer.places.items()}
            yield pins
        finally:
            left = {name: serial for name, (serial, _) in pins.items()}
            for name, serial in (*asked.items(), *left.items()):
                self._reactor.unpin(name, serial)

    def _load(self, value: Stored, pins: Pins | None) -> tuple[Any, Memory]:
        """Return the value of a segment, and the memory it lies in."""
        if self._reader is not None:
            return self._map(value, self._reader, pins)
        if self._transfers is None:
            raise ObjectLostError(f"this process has no way to read what lies on node {value.node}")
        mapping = self._call(self._unless_lost(value, partial(self._transfers.fetch, value)))
        return read_segment(view(mapping)), mapping

    def _map(self, value: Stored, reader: Reader, pins: Pins | None) -> tuple[Any, Memory]:
        """Map a segment of this node, pinned already or not, or a copy that this node pulls."""
        segment = value.segment
        serial, place = pins.pop(segment, (0, "")) if pins and value.node == self._node else (0, "")
        serial = serial or next(self._pins)
        if not place and value.node == self._node and value.size_bytes >= LARGE_BYTES:
            memory = reader.map_unasked(segment, value.size_bytes, serial)
            if memory is not None:
                pin(self._reactor, self._node, segment, serial)
                return read_segment(view(memory)), memory
        try:
            if not place:
                segment, place = self._pin(value, serial)
            return reader.read(segment, place, value.size_bytes, serial)
        except BaseException:
            if place:
                self._unpin(segment, serial, value.size_bytes)
            else:  # whether the node heard of the pin is unknown; if not, it will never count
                unpin(self._reactor, self._node, segment, serial, value.node)
            raise

    def _unpin(self, segment: str, serial: int, size_bytes: int) -> None:
        """Tell the node of the end of a pin: at once where somebody may wait for the room (any thread)."""
        if size_bytes < LARGE_BYTES:
            self._reactor.unpin(segment, serial)
        else:
            unpin(self._reactor, self._node, segment, serial)

    def _pin(self, value: Stored, serial: int) -> tuple[str, str]:
        """Have the node keep a segment, or pull a copy of it; return its name here, and where it lies."""
        request = PinSegment(
            process=self._local, segment=value.segment, serial=serial, home=value.node, size_bytes=value.size_bytes
        )
        seconds = ROOM_SECONDS + patience_seconds(value.size_bytes)
        pinned = self._call(self._unless_lost(value, partial(self._ask_node, "pin", request, seconds)))
        assert isinstance(pinned, SegmentPinned)
        return pinned.segment, pinned.place

    async def _unless_lost(self, value: Stored, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what reading a copy returns; ``CopyUnavailable`` where it is gone, or its node dies meanwhile."""
        try:
            return await self._reactor.nodes.unless_dead(value.node, read)
        except (NotFoundError, NodeDiedError):
            raise CopyUnavailable(value) from None

    async def _ask_node(self, verb: str, message: Message, timeout_seconds: float = REQUEST_SECONDS) -> Message:
        subject = self._subjects.node_from_process(self._node, verb)
        return await ask(self._bus, subject, message, timeout_seconds=timeout_seconds)
