"""Values where they lie: put into the node's shared memory or inline, mapped, or fetched from another node."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import weakref
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask, ask_raw
from shoal_core.protocol.errors import ObjectLostError, ShoalError
from shoal_core.protocol.ids import NodeId, ObjectKey, ProcessId, node_of
from shoal_core.protocol.messages import (
    MOST_READ_BYTES,
    AllocateSegment,
    Message,
    PinSegment,
    SegmentGranted,
    SegmentRead,
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

REQUEST_SECONDS = 60.0
READS_AT_ONCE = 4

Call = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the I/O thread and waits for its result."""


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
        self._reactor = reactor
        self._call = call
        self._pins = itertools.count(1)
        self._allocations = itertools.count(1)

    def place(self, serialized: Serialized, owner: ProcessId, key: ObjectKey) -> Value:
        """Return a value as it travels: small ones inline, large ones in the node's shared memory."""
        if not serialized.raw and serialized.size_bytes <= INLINE_BYTES:
            return serialized.inline()
        if self._shared_memory is None:
            return serialized.inline()
        size = segment_bytes(serialized)
        request = AllocateSegment(process=self._local, size_bytes=size, serial=next(self._allocations))
        granted = self._call(self._ask_node("allocate", request))
        assert isinstance(granted, SegmentGranted)
        segments.write(self._shared_memory, granted.segment, serialized)
        seal(self._reactor, self._node, granted.segment, Reference(owner, key))
        self._reactor.wake()
        return Stored(self._node, granted.segment, size, serialized.contained)

    def of(self, state: ObjectState) -> Any:
        """Return the value of an object that is ready, or raise its error; a mapping that is alive is used again."""
        value = state.value
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Stored and value.node == self._node and self._shared_memory is not None:
            mapping = None if state.shared is None else state.shared()
            if mapping is None:
                loaded, mapping = self._map(value, self._shared_memory)
                state.shared = weakref.ref(mapping)
                return loaded
            return read_segment(memoryview(mapping))
        assert value is not None
        return self.read(value)

    def read(self, value: Value) -> Any:
        """Return what a value stands for, wherever it lies; raise the error it stands for."""
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Failed:
            raise error_of(value)
        assert type(value) is Stored
        if value.node == self._node and self._shared_memory is not None:
            return self._map(value, self._shared_memory)[0]
        return read_segment(memoryview(self._call(self._pull(value))).toreadonly())

    def _map(self, value: Stored, folder: Path) -> tuple[Any, mmap.mmap]:
        """Pin and map a segment of this node."""
        serial = next(self._pins)
        reactor, node = self._reactor, self._node

        def done(segment: str) -> None:
            unpin(reactor, node, segment, serial)

        try:
            self._call(self._ask_node("pin", PinSegment(process=self._local, segment=value.segment, serial=serial)))
            return segments.read(folder, value.segment, value.size_bytes, done)
        except BaseException:
            done(value.segment)  # whether the node heard of the pin is unknown; if not, it will never count
            raise

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
            raise ObjectLostError(
                f"{value.size_bytes:,} bytes could not be read from node {value.node}: {reason}"
            ) from reason
        return data
