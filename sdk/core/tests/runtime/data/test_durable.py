"""A process and the durable tier: what it holds there, and what it looks for there when an owner has died."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shoal_core.bus.interface import Message as BusMessage
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import NotFoundError, ObjectLostError, ObjectStoreFullError, ShoalError
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import Done, Message
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
    DurableUpload,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.verbs import OBJECTSTORE
from shoal_core.protocol.wire import decode, encode
from shoal_core.runtime.data.durable import DurableTier
from shoal_core.testing.builders import process_id

CLUSTER = "test"
SUBJECTS = Subjects(CLUSTER)


class Twin:
    """As much of the durable tier as a process sees."""

    def __init__(self) -> None:
        self.puts: dict[str, DurablePut] = {}
        self.chunks: dict[tuple[str, int], bytes] = {}
        self.sealed: set[str] = set()
        self.deleted: list[DurableDelete] = []
        self.full = False

    def answer(self, message: Message) -> Message | ShoalError:
        match message:
            case DurablePut():
                self.puts[message.object_id] = message
                return DurableUpload(place=f"{message.object_id}.1", sealed=False)
            case DurablePutChunk():
                if self.full:
                    return ObjectStoreFullError("full")
                self.chunks[message.object_id, message.index] = message.data
            case DurableSeal():
                self.sealed.add(message.object_id)
            case DurableGet():
                if message.object_id not in self.sealed:
                    return NotFoundError("nothing")
                put = self.puts[message.object_id]
                return DurableManifest(
                    object_id=put.object_id, size_bytes=put.size_bytes, digests=put.digests, place=f"{put.object_id}.1"
                )
            case DurableGetChunk():
                return DurableChunk(data=self.chunks[message.object_id, message.index])
            case DurableDelete():
                self.deleted.append(message)
        return Done()


@asynccontextmanager
async def tier() -> AsyncIterator[tuple[DurableTier, Twin]]:
    twin = Twin()
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.OBJECTSTORE, identity="twin", cluster=CLUSTER) as service,
        broker.connect(role=Role.PROCESS, identity=process_id(1), cluster=CLUSTER) as bus,
    ):

        def asked(message: BusMessage) -> None:
            request = decode(OBJECTSTORE[message.subject.rpartition(".")[2]], message.data)
            service.publish(message.reply, encode(twin.answer(request)))

        service.subscribe(SUBJECTS.objectstore("*"), asked)
        yield DurableTier(bus, SUBJECTS), twin


def put(data: bytes) -> DurablePut:
    return DurablePut(object_id="one", size_bytes=len(data), digests=[], job_id=JobId("00000001"), keep_seconds=5.0)


@pytest.mark.parametrize("size_bytes", [0, 10, CHUNK_BYTES, 3 * CHUNK_BYTES + 1])
async def test_an_object_comes_back_as_it_was_put(size_bytes: int) -> None:
    data = bytes(range(256)) * (size_bytes // 256) + b"x" * (size_bytes % 256)
    async with tier() as (one, twin):
        await one.put(put(data), data)
        assert (twin.puts["one"].holder, twin.puts["one"].keep_seconds) == (PUT_HOLDER, 5.0)
        assert await one.get("one") == data


async def test_an_upload_that_fails_is_let_go_of() -> None:
    async with tier() as (one, twin):
        twin.full = True
        with pytest.raises(ObjectStoreFullError):
            await one.put(put(b"data"), b"data")
        assert twin.deleted == [DurableDelete(object_id="one", holder=PUT_HOLDER)]
        assert not twin.sealed


async def test_bytes_that_changed_are_not_taken_for_the_object() -> None:
    async with tier() as (one, twin):
        await one.put(put(b"data"), b"data")
        twin.chunks["one", 0] = b"DATA"
        with pytest.raises(ObjectLostError, match="not what was written"):
            await one.get("one")


async def test_what_is_not_there_is_said_to_be_so() -> None:
    async with tier() as (one, _):
        with pytest.raises(NotFoundError):
            await one.get("one")
