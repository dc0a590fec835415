"""Values where they lie: put into the node's shared memory or inline, mapped, or fetched from another node."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import mmap
import time
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask, ask_raw
from shoal_core.protocol.errors import ObjectLostError, ShoalError
from shoal_core.protocol.ids import NodeId, ProcessId, node_of
from shoal_core.protocol.messages import (
    MOST_PINS,
    MOST_READ_BYTES,
    AllocateSegment,
    Message,
    PinSegment,
    PinSegments,
    SegmentGranted,
    SegmentRead,
    SegmentsPinned,
)
from shoal_core.protocol.records import Failed, Inline, Stored, Value
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime import segments
from shoal_core.runtime.commands import seal, unpin
from shoal_core.runtime.failures import error_of
from shoal_core.runtime.objects import ObjectState
from shoal_core.runtime.reactor import Reactor
from shoal_core.runtime.serialization import INLINE_BYTES, Codec, Serialized, read_segment, segment_bytes
from shoal_core.runtime.warm import IDLE_SECONDS, WarmMappings

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
        self.warm = WarmMappings()
        self._cooling = False
        self._pins = itertools.count(1)
        self._allocations = itertools.count(1)

    def place(self, serialized: Serialized, owner: ProcessId) -> Value:
        """Return a value as it travels: small ones inline, large ones in the node's shared memory."""
        if not serialized.raw and serialized.size_bytes <= INLINE_BYTES:
            return serialized.inline()
        if self._shared_memory is None:
            return serialized.inline()
        size = segment_bytes(serialized)
        request = AllocateSegment(process=self._local, size_bytes=size, serial=next(self._allocations))
        granted = self._call(self._ask_node("allocate", request))
        assert isinstance(granted, SegmentGranted)
        segments.write(self._shared_memory, granted.segment, serialized, self.warm)
        if not self._cooling and self.warm.size_bytes:
            self._cooling = True
            self._reactor.spawn(self._cool)
        seal(self._reactor, self._node, granted.segment, owner)
        self._reactor.wake()
        return Stored(self._node, granted.segment, size, serialized.contained)

    async def _cool(self) -> None:
        """Unmap what is not written to any more, until nothing is left (I/O thread)."""
        while self._cooling:
            await asyncio.sleep(IDLE_SECONDS)
            await asyncio.to_thread(self.warm.drop_idle, time.monotonic())
            self._cooling = False  # whoever keeps a mapping from here on begins anew
            self._cooling = self.warm.size_bytes > 0

    def close(self) -> None:
        """Unmap what was kept."""
        self.warm.drop_idle()

    def of(self, state: ObjectState, pins: dict[str, int] | None = None) -> Any:
        """Return the value of an object that is ready, or raise its error; a mapping that is alive is used again."""
        value = state.value
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Stored and value.node == self._node and self._shared_memory is not None:
            mapping = None if state.shared is None else state.shared()
            if mapping is None:
                loaded, mapping = self._map(value, self._shared_memory, pins)
                state.shared = weakref.ref(mapping)
                return loaded
            return read_segment(memoryview(mapping))
        assert value is not None
        return self.read(value, pins)

    def read(self, value: Value, pins: dict[str, int] | None = None) -> Any:
        """Return what a value stands for, wherever it lies; raise the error it stands for."""
        if type(value) is Inline:
            return self.codec.load(value)
        if type(value) is Failed:
            raise error_of(value)
        assert type(value) is Stored
        if value.node == self._node and self._shared_memory is not None:
            return self._map(value, self._shared_memory, pins)[0]
        return read_segment(memoryview(self._call(self._pull(value))).toreadonly())

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
