"""Large values of a process that shares memory with no node: a driver on another machine.

What it puts is pulled from it by a node, which keeps it as any segment, with the driver as its owner; what it reads it
pulls into memory of its own, from the node where it lies. Both by the protocol of ``shoal_core.transfer``.
"""

from __future__ import annotations

import asyncio
import itertools
import mmap
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

from shoal_core.bus.bulk import BulkAddress
from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import (
    BusError,
    NodeDiedError,
    NotFoundError,
    ObjectFetchTimedOutError,
    ObjectStoreFullError,
    ShoalError,
    from_wire,
)
from shoal_core.protocol.ids import NodeId, ObjectKey, ProcessId, durable_id
from shoal_core.protocol.messages import ListNodes, NodeList, NodeState
from shoal_core.protocol.records import SegmentFreed, SegmentUnpinned, Stored
from shoal_core.protocol.storage import LendSegment, SegmentGranted, SegmentLent, TakeObject
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.runtime.data.copying import copy
from shoal_core.runtime.data.serialization import Serialized, segment_bytes, write_segment
from shoal_core.runtime.reactor import Reactor
from shoal_core.transfer.mover import Cancel, Mover, Offer, Pull, Withdraw
from shoal_core.transfer.pulling import Ended
from shoal_core.transfer.records import CHUNK_BYTES

REQUEST_SECONDS = 60.0
MOST_PULLS = 3
SLOWEST_BYTES_PER_SECOND = 1_000_000
"""A transfer that makes progress is waited for as long as it takes at this rate, and a minute more."""


def patience_seconds(size_bytes: int) -> float:
    """Return for how long the transfer of so many bytes is waited for."""
    return REQUEST_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND


class Transfers:
    """The transfers of one process; ``fetch`` and ``give`` are for user threads, the rest for the I/O thread."""

    def __init__(
        self,
        bus: Bus,
        subjects: Subjects,
        local: ProcessId,
        bulk: BulkAddress,
        reactor: Reactor,
        call: Callable[[Coroutine[Any, Any, Any]], Any],
    ) -> None:
        self._bus = bus
        self._subjects = subjects
        self._local = local
        self._reactor = reactor
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._mover = Mover(bulk, subjects, Role.PROCESS, local, self._ended)
        self._serials = itertools.count(1)
        self._pulls: dict[str, asyncio.Future[Ended]] = {}
        self._giving: dict[str, asyncio.Task[Any]] = {}
        self._refused: dict[str, Ended] = {}

    def close(self) -> None:
        """End the bulk connection."""
        self._mover.close()

    # ------------------------------------------------------------------------------- reading

    async def fetch(self, value: Stored) -> mmap.mmap:
        """Return the bytes of a segment; raises ``NotFoundError`` where it is lost (cancelled if its node dies).

        Whether it is lost only its home knows: where it is just not offered any more, its home is asked again.
        """
        for _ in range(MOST_PULLS):
            memory = mmap.mmap(-1, value.size_bytes)
            ended = await self._pull(value, memory)
            if not ended.code:
                return memory
            error = from_wire(ended.code, ended.text)
            if not isinstance(error, NotFoundError):
                raise error
        raise ObjectFetchTimedOutError(f"{error}, {MOST_PULLS} times")

    async def _pull(self, value: Stored, memory: mmap.mmap) -> Ended:
        """Have a segment lent, and pull it; ``NotFoundError`` where its home does not have it."""
        serial = next(self._serials)
        name = f"g{serial}"
        request = LendSegment(
            puller=self._local,
            segment=value.segment,
            size_bytes=value.size_bytes,
            serial=serial,
            job_id=self._reactor.job,
        )
        subject = self._subjects.node_from_process(value.node, "lend")
        try:
            lent = await ask(self._bus, subject, request, timeout_seconds=REQUEST_SECONDS)
            assert isinstance(lent, SegmentLent)
            ended: asyncio.Future[Ended] = self._loop.create_future()
            self._pulls[name] = ended
            self._mover.order(
                Pull(name, value.node, value.segment, value.size_bytes, lent.chunk_bytes, memoryview(memory))
            )
            return await ended
        finally:
            if self._pulls.pop(name, None) is not None:
                self._mover.order(Cancel(name))
            if not self._reactor.is_dead(value.node):
                self._reactor.send(value.node, SegmentUnpinned(value.segment, serial))

    def _ended(self, ended: Ended) -> None:
        """A pull has ended, or what is offered cannot be sent (the mover's thread)."""
        self._loop.call_soon_threadsafe(self._settle, ended)

    def _settle(self, ended: Ended) -> None:
        future = self._pulls.get(ended.name)
        if future is not None and not future.done():
            future.set_result(ended)
        elif ended.name in self._giving and ended.name not in self._refused:
            self._refused[ended.name] = ended
            self._giving[ended.name].cancel()

    # ------------------------------------------------------------------------------- putting

    def give(self, value: Serialized, owner: ProcessId, key: ObjectKey) -> Stored:
        """Have a node keep a value, which this process owns; raises ``ObjectStoreFullError`` where none can."""
        size = segment_bytes(value)
        memory = mmap.mmap(-1, size)
        write_segment(value, memoryview(memory), copy)
        node, segment = self._call(self._give(memory, size, durable_id(owner, key)))
        return Stored(node, segment, size, value.contained)

    async def _give(self, memory: mmap.mmap, size_bytes: int, object_id: str) -> tuple[NodeId, str]:
        serial = next(self._serials)
        name = f"p{serial}"
        chunk_bytes = min(CHUNK_BYTES, self._bus.max_payload)
        self._mover.order(Offer(name, memoryview(memory), size_bytes, chunk_bytes))
        request = TakeObject(
            process=self._local,
            job_id=self._reactor.job,
            stream=name,
            size_bytes=size_bytes,
            chunk_bytes=chunk_bytes,
            object_id=object_id,
            serial=serial,
        )
        refusals: list[ShoalError] = []
        task = asyncio.current_task()
        assert task is not None
        self._giving[name] = task
        try:
            for node in await self._nodes():
                subject = self._subjects.node_from_process(node, "take")
                asked = partial(ask, self._bus, subject, request, timeout_seconds=patience_seconds(size_bytes))
                try:
                    granted = await self._reactor.nodes.unless_dead(node, asked)
                except (ObjectStoreFullError, NodeDiedError, NotFoundError, BusError) as error:
                    refusals.append(error)
                    if isinstance(error, BusError):  # it may have taken it, or do so yet
                        self._reactor.send(node, SegmentFreed(name))
                    continue
                assert isinstance(granted, SegmentGranted)
                return node, granted.segment
        except asyncio.CancelledError:
            refused = self._refused.get(name)
            if refused is None or task.uncancel():
                raise
            raise from_wire(refused.code, refused.text) from None
        finally:
            del self._giving[name]
            self._refused.pop(name, None)
            self._mover.order(Withdraw(name, "the driver offers it no more"))
        reasons = "; ".join(map(str, refusals)) or "the cluster has no node"
        raise ObjectStoreFullError(f"no node of the cluster takes an object of {size_bytes:,} bytes: {reasons}")

    async def _nodes(self) -> Iterator[NodeId]:
        """Return the nodes that may keep something, the one to be asked first at first."""
        answer = await ask(self._bus, self._subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=REQUEST_SECONDS)
        assert isinstance(answer, NodeList)
        alive = [record.description for record in answer.nodes if record.state is NodeState.ALIVE]
        alive.sort(key=lambda node: (not node.is_head, -node.object_store_bytes))
        return iter([node.node_id for node in alive])
