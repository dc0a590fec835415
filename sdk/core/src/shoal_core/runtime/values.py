"""Values where they lie: put into the node's shared memory or inline, mapped, or fetched from another node."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask, ask_raw
from shoal_core.protocol.errors import NodeDiedError, NotFoundError, ObjectFetchTimedOutError, ShoalError
from shoal_core.protocol.ids import NO_NODE, NodeId, ObjectKey, ProcessId, durable_id, node_of
from shoal_core.protocol.messages import (
    MOST_PINS,
    MOST_READ_BYTES,
    AllocateSegment,
    Message,
    ObjectRestored,
    PinSegment,
    PinSegments,
    RestoreObject,
    SegmentGranted,
    SegmentRead,
    SegmentsPinned,
)
from shoal_core.protocol.records import Failed, Inline, Reference, Stored, Value
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime import segments
from shoal_core.runtime.commands import seal, unpin
from shoal_core.runtime.failures import error_of
from shoal_core.runtime.objects import ObjectState
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.serialization import INLINE_BYTES, Codec, Serialized, read_segment, segment_bytes
from shoal_core.runtime.writing import Writer

T = TypeVar("T")

REQUEST_SECONDS = 60.0
READS_AT_ONCE = 4

SUSPECT_SECONDS = 1.0
"""Reading a copy that takes longer: somebody looks whether its node is dead, and looks again each time."""

Call = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the I/O thread and waits for its result."""


class CopyUnavailable(Exception):
    """A copy is gone, or its node is, or it was lost before (``value`` is None): the object has to come anew."""

    def __init__(self, value: Stored | None) -> None:
        super().__init__(value)
        self.value = value


class Values:
    """The values that one process puts and reads (user threads only). ``shared_memory`` is its node's folder."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        local: ProcessId,
        shared_memory: Path | None,
        codec: Codec,
        reactor: Reactor,
        call: Call,
    ) -> None:
        self.codec = codec
        self._bus = bus
        self._subjects = subjects
        self._local = local
        self._node = node_of(local)
        self._shared_memory = shared_memory
        self._writer = None if shared_memory is None else Writer(shared_memory, reactor.later)
        self._reactor = reactor
        self._call = call
        self._pins = itertools.count(1)
        self._allocations = itertools.count(1)
        self._restorations = itertools.count(1)

    def close(self) -> None:
        """Let go of what is kept for the next value to be put (any thread)."""
        if self._writer is not None:
            self._writer.close()

    def place(self, serialized: Serialized, owner: ProcessId, key: ObjectKey) -> Value:
        """Return a value as it travels: small ones inline, large ones in the node's shared memory."""
        if not serialized.raw and serialized.size_bytes <= INLINE_BYTES:
            return serialized.inline()
        if self._writer is None:
            return serialized.inline()
        size = segment_bytes(serialized)
        request = AllocateSegment(process=self._local, size_bytes=size, serial=next(self._allocations))
        granted = self._call(self._ask_node("allocate", request))
        assert isinstance(granted, SegmentGranted)
        self._writer.write(granted.segment, serialized)
        seal(self._reactor, self._node, granted.segment, Reference(owner, key))
        self._reactor.wake()
        return Stored(self._node, granted.segment, size, serialized.contained)

    def of(self, state: ObjectState, pins: dict[str, int] | None = None) -> Any:
        """Return the value of an object that is ready, or raise its error; a mapping that is alive is used again.

        Raises ``CopyUnavailable`` where the object is not ready any more, or will have to come anew. ``pins`` are those
        that ``pinned`` holds.
        """
        value = state.value
        if value is None:
            raise CopyUnavailable(None)
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Stored and value.node == self._node and self._shared_memory is not None:
            mapping = None if state.shared is None else state.shared()
            if mapping is None:
                loaded, mapping = self._map(value, self._shared_memory, pins)
                state.shared = weakref.ref(mapping)
                return loaded
            return read_segment(memoryview(mapping))
        return self.read(value, pins)

    def read(self, value: Value, pins: dict[str, int] | None = None) -> Any:
        """Return what a value stands for, wherever it lies; raise the error it stands for, or ``CopyUnavailable``."""
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Failed:
            raise error_of(value)
        assert type(value) is Stored
        if value.node == self._node and self._shared_memory is not None:
            return self._map(value, self._shared_memory, pins)[0]
        data = self._call(self._unless_lost(value, partial(self._pull, value)))
        return read_segment(memoryview(data).toreadonly())

    @contextlib.contextmanager
    def pinned(self, values: Sequence[Value | None]) -> Iterator[dict[str, int]]:
        """Pin the segments of this node among values with few requests, for ``of`` and ``read`` to take from.

        What cannot be pinned at once is left to whoever reads it; what is not taken is let go again.
        """
        names = [value.segment for value in values if type(value) is Stored and value.node == self._node]
        if len(names) < 2 or self._shared_memory is None:
            yield {}
            return
        asked = {name: next(self._pins) for name in names}
        pins: dict[str, int] = {}
        try:
            waiting = list(asked.items())
            for start in range(0, len(waiting), MOST_PINS):
                request = PinSegments(process=self._local, pins=dict(waiting[start : start + MOST_PINS]))
                answer = self._call(self._ask_node("pin_many", request))
                assert isinstance(answer, SegmentsPinned)
                pins |= {name: asked.pop(name) for name in answer.segments}
            yield pins
        finally:
            for name, serial in (*asked.items(), *pins.items()):
                unpin(self._reactor, self._node, name, serial)

    def _map(self, value: Stored, folder: Path, pins: dict[str, int] | None) -> tuple[Any, mmap.mmap]:
        """Map a segment of this node, one of those pinned or pinned for it alone."""
        ahead = pins.pop(value.segment, None) if pins else None
        serial = next(self._pins) if ahead is None else ahead
        reactor, node = self._reactor, self._node

        def done(segment: str) -> None:
            unpin(reactor, node, segment, serial)

        try:
            if ahead is None:
                request = PinSegment(process=self._local, segment=value.segment, serial=serial)
                self._call(self._unless_lost(value, partial(self._ask_node, "pin", request)))
            return segments.read(folder, value.segment, value.size_bytes, done)
        except BaseException:
            done(value.segment)  # whether the node heard of the pin is unknown; if not, it will never count
            raise

    async def restore(self, key: ObjectKey) -> Stored:
        """Get one of our objects from the durable tier; ``NotFoundError`` where it is not there (I/O thread)."""
        if self._node == NO_NODE:
            raise NotFoundError("this process has no node that could restore its objects")
        name, serial = durable_id(self._local, key), next(self._restorations)
        request = RestoreObject(process=self._local, object_id=name, serial=serial)
        restored = await self._ask_node("restore", request)
        assert isinstance(restored, ObjectRestored)
        return Stored(self._node, restored.segment, restored.size_bytes)

    async def _unless_lost(self, value: Stored, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what reading a copy returns; ``CopyUnavailable`` where it is gone, or its node dies meanwhile."""
        reactor, node, task = self._reactor, value.node, asyncio.current_task()
        assert task is not None
        if reactor.is_dead(node):
            raise CopyUnavailable(value)
        readers = reactor.readers.setdefault(node, set())
        readers.add(task)
        loop = asyncio.get_running_loop()
        suspicion = loop.call_later(SUSPECT_SECONDS, self._suspect, task, node)
        try:
            return await read()
        except (NotFoundError, NodeDiedError):
            raise CopyUnavailable(value) from None
        except asyncio.CancelledError:
            if not reactor.is_dead(node) or task.uncancel():
                raise
            raise CopyUnavailable(value) from None
        finally:
            suspicion.cancel()
            readers.discard(task)
            if not readers:
                reactor.readers.pop(node, None)

    def _suspect(self, task: asyncio.Task[Any], node: NodeId) -> None:
        if task in self._reactor.readers.get(node, ()):
            self._reactor.suspect(node)
            asyncio.get_running_loop().call_later(SUSPECT_SECONDS, self._suspect, task, node)

    async def _ask_node(self, verb: str, message: Message) -> Message:
        return await ask(self._bus, self._on(self._node, verb), message, timeout_seconds=REQUEST_SECONDS)

    def _on(self, node: NodeId, verb: str) -> str:
        return self._subjects.node_from_process(node, verb)

    async def _pull(self, value: Stored) -> bytearray:
        """Read a segment of another node through the broker, a few chunks at a time."""
        data = bytearray(value.size_bytes)
        offsets = iter(range(0, value.size_bytes, MOST_READ_BYTES))
        subject = self._on(value.node, "read")

        async def read() -> None:
            for offset in offsets:
                length = min(MOST_READ_BYTES, value.size_bytes - offset)
                request = encode(SegmentRead(segment=value.segment, offset=offset, length=length))
                data[offset : offset + length] = await ask_raw(
                    self._bus, subject, request, timeout_seconds=REQUEST_SECONDS
                )

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(READS_AT_ONCE):
                    group.create_task(read())
        except* ShoalError as errors:
            reason = errors.exceptions[0]
            if isinstance(reason, NotFoundError):
                raise reason from None
            raise ObjectFetchTimedOutError(
                f"{value.size_bytes:,} bytes could not be read from node {value.node}: {reason}"
            ) from reason
        return data
