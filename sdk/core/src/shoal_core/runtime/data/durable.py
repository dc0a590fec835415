"""The durable tier, as a process of the cluster uses it: objects that outlive their owner, and the node they lay on.

An object that was put as a durable one is held in the tier by its owner, who lets go of it when nobody refers to it any
more. When the owner is gone, nobody counts references to it: then it stays until its job ends, or its time is over. A
borrower whose owner has died looks there before it takes the object for lost. Where its node has shared memory, the
node fetches the object into a segment, which the borrower owns and frees; else it is read into the process.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING

from zlib_ng.zlib_ng import crc32

from shoal_core.bus.interface import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import NotFoundError, ObjectLostError, ShoalError
from shoal_core.protocol.ids import NodeId, ObjectKey, durable_id
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import Failed, SegmentFreed, Stored, Value
from shoal_core.protocol.storage import (
    CHUNK_BYTES,
    PUT_HOLDER,
    DurableChunk,
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurableManifest,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
    ObjectRestored,
    RestoreObject,
)
from shoal_core.protocol.subjects import Subjects
from shoal_core.runtime.data.serialization import as_inline
from shoal_core.runtime.ownership.objects import ObjectState

if TYPE_CHECKING:
    from shoal_core.runtime.reactor import Reactor

logger = logging.getLogger("shoal.runtime")

REQUEST_SECONDS = 60.0
LOOK_SECONDS = 10.0
"""So long is tried to find out whether the durable tier has an object; a service that was killed is back by then."""
ABSENT_SECONDS = 0.25
"""So long is looked for any service where there is another way to the object; none may be part of the cluster."""
RESTORE_SECONDS = 600.0
CHUNKS_AT_ONCE = 4
RESTORED_AT_ONCE = 16


class DurableTier:
    """Objects in the durable tier, by way of its service (I/O thread only)."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._bus = bus
        self._subjects = subjects

    async def put(self, put: DurablePut, data: bytes) -> None:
        """Upload an object; returns when it is sealed. What fails leaves nothing."""
        chunks = [data[offset : offset + CHUNK_BYTES] for offset in range(0, max(1, len(data)), CHUNK_BYTES)]
        put = put.model_copy(update={"digests": [crc32(chunk) for chunk in chunks]})
        parts = (
            DurablePutChunk(object_id=put.object_id, index=index, data=chunk) for index, chunk in enumerate(chunks)
        )

        async def upload() -> None:
            for part in parts:
                await self._ask("put_chunk", part)

        try:
            await self._ask("put", put)
            async with asyncio.TaskGroup() as group:
                for _ in range(CHUNKS_AT_ONCE):
                    group.create_task(upload())
            await self._ask("seal", DurableSeal(object_id=put.object_id))
        except* ShoalError as errors:
            await self.drop(put.object_id)
            raise _first(errors) from None

    async def get(self, object_id: str) -> bytes:
        """Return an object; ``NotFoundError`` where it is not there."""
        manifest = await self._ask("get", DurableGet(object_id=object_id), LOOK_SECONDS)
        assert isinstance(manifest, DurableManifest)
        data = bytearray(manifest.size_bytes)
        digests = iter(enumerate(manifest.digests))

        async def download() -> None:
            for index, digest in digests:
                chunk = await self._ask("get_chunk", DurableGetChunk(object_id=object_id, index=index))
                assert isinstance(chunk, DurableChunk)
                if crc32(chunk.data) != digest:
                    raise ObjectLostError(f"chunk {index} of durable object {object_id} is not what was written")
                offset = index * CHUNK_BYTES
                data[offset : offset + len(chunk.data)] = chunk.data

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(CHUNKS_AT_ONCE):
                    group.create_task(download())
        except* ShoalError as errors:
            raise _first(errors) from None
        return bytes(data)

    async def drop(self, object_id: str) -> None:
        """Hold an object no more; one that cannot be let go of now goes with its job."""
        try:
            await self._ask("delete", DurableDelete(object_id=object_id, holder=PUT_HOLDER))
        except ShoalError as error:
            logger.warning("durable object %s goes only with its job: %s", object_id, error)

    async def _ask(self, verb: str, message: Message, timeout_seconds: float = REQUEST_SECONDS) -> Message:
        return await ask(self._bus, self._subjects.objectstore(verb), message, timeout_seconds=timeout_seconds)


class Restoring:
    """What this process holds in the durable tier, and what it has restored from there (I/O thread only).

    ``node`` is this process's node, None where it shares no memory with one.
    """

    def __init__(self, bus: Bus, subjects: Subjects, node: NodeId | None, reactor: Reactor, tier: DurableTier) -> None:
        self._bus = bus
        self._subjects = subjects
        self._node = node
        self._reactor = reactor
        self._tier = tier
        self._durable: set[ObjectState] = set()
        self._segments: dict[ObjectState, Stored] = {}
        self._under_way: dict[ObjectState, asyncio.Future[Value | None]] = {}
        self._serials = itertools.count(1)
        self._turn = asyncio.Semaphore(RESTORED_AT_ONCE)

    def persisted(self, state: ObjectState) -> None:
        """Note that an object of this process is durable."""
        self._durable.add(state)

    def forget(self, state: ObjectState) -> None:
        """Nobody here refers to an object any more."""
        restored = self._segments.pop(state, None)
        if restored is not None:
            self._reactor.send(restored.node, SegmentFreed(restored.segment))
        if state in self._durable:
            self._durable.remove(state)
            self._bus.spawn(self._tier.drop(_id(state)))

    def lost(self, state: ObjectState, failure: Failed) -> None:
        """Settle an object whose owner has died: restored if it was durable, else failed."""
        self._bus.spawn(self._settle(state, failure))

    async def _settle(self, state: ObjectState, failure: Failed) -> None:
        try:
            value: Value = await self._restore(state) or failure
        except ShoalError as error:
            value = Failed(failure.code, f"{failure.text} Nor could it be had from the durable tier: {error}")
        if state.value is None:
            self._reactor.settle(state, value)

    async def own(self, key: ObjectKey, remakable: bool) -> Stored:
        """Return a new copy of one of our objects that was lost; ``NotFoundError`` where the tier has nothing of it.

        Where it can be made again, it is not waited for a tier that has no service.
        """
        if self._node is None:
            raise NotFoundError("this process has no node that could restore its objects")
        absent_seconds = ABSENT_SECONDS if remakable else LOOK_SECONDS
        return await self._copy(durable_id(self._reactor.local, key), self._node, absent_seconds)

    async def _restore(self, state: ObjectState) -> Value | None:
        """Return what the durable tier has of an object, None where it has nothing; many who ask, ask once."""
        under_way = self._under_way.get(state)
        if under_way is not None:
            return await asyncio.shield(under_way)
        future = self._under_way[state] = asyncio.get_running_loop().create_future()
        value: Value | None = None
        try:
            async with self._turn:
                value = await self._fetch(state)
        except NotFoundError:
            pass
        finally:
            del self._under_way[state]
            future.set_result(value)
        return value

    async def _fetch(self, state: ObjectState) -> Value:
        object_id = _id(state)
        if self._node is None:
            return as_inline(await self._tier.get(object_id))
        value = await self._copy(object_id, self._node, LOOK_SECONDS)
        if state.instances:
            self._segments[state] = value
        else:
            self._reactor.send(value.node, SegmentFreed(value.segment))
        return value

    async def _copy(self, object_id: str, node: NodeId, absent_seconds: float) -> Stored:
        """Have the node fetch an object into a segment that this process owns."""
        request = RestoreObject(
            process=self._reactor.local,
            object_id=object_id,
            serial=next(self._serials),
            absent_seconds=absent_seconds,
        )
        subject = self._subjects.node_from_process(node, "restore")
        restored = await ask(self._bus, subject, request, timeout_seconds=RESTORE_SECONDS)
        assert isinstance(restored, ObjectRestored)
        return Stored(node, restored.segment, restored.size_bytes)


def _id(state: ObjectState) -> str:
    return durable_id(state.owner, state.key)


def _first(errors: BaseExceptionGroup[ShoalError]) -> ShoalError:
    """Return one error of a group."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, ShoalError)
    return error
