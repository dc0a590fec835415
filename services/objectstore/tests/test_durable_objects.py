"""The durable tier over the in-memory broker and its JetStream."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shoal_core.bus import Bus
from shoal_core.bus.memory import MemoryBroker
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, ServiceError
from shoal_core.protocol.ids import new_process_id
from shoal_core.protocol.messages import (
    DurableChunk,
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurableManifest,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.service.settings import ServiceSettings
from shoal_objectstore.manifests import ABANDONED_SECONDS, Manifest, is_abandoned
from shoal_objectstore.service import serve

CLUSTER = "test"
SUBJECTS = Subjects(CLUSTER)


@asynccontextmanager
async def durable_tier() -> AsyncIterator[Bus]:
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.OBJECTSTORE, identity="store", cluster=CLUSTER) as bus,
        serve(bus, ServiceSettings(cluster=CLUSTER)),
        broker.connect(role=Role.PROCESS, identity=new_process_id(), cluster=CLUSTER) as asker,
    ):
        yield asker


def digest(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


async def upload(bus: Bus, object_id: str, chunks: list[bytes], *, wrong: bool = False) -> None:
    data = b"".join(chunks)
    put = DurablePut(
        object_id=object_id, size_bytes=len(data), chunks=len(chunks), digest="0" * 8 if wrong else digest(data)
    )
    await ask(bus, SUBJECTS.objectstore("put"), put)
    for index, chunk in enumerate(chunks):
        part = DurablePutChunk(object_id=object_id, index=index, data=chunk)
        await ask(bus, SUBJECTS.objectstore("put_chunk"), part)
    await ask(bus, SUBJECTS.objectstore("seal"), DurableSeal(object_id=object_id))


async def test_an_object_comes_back_as_it_was_put() -> None:
    chunks = [b"a" * 1000, b"\x00\xff" * 500, b"c"]
    async with durable_tier() as bus:
        await upload(bus, "one", chunks)
        await upload(bus, "one", chunks)  # again, as after a lost answer
        manifest = await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="one"))
        assert isinstance(manifest, DurableManifest)
        assert (manifest.chunks, manifest.size_bytes) == (3, 2001)
        got = []
        for index in range(3):
            part = await ask(bus, SUBJECTS.objectstore("get_chunk"), DurableGetChunk(object_id="one", index=index))
            assert isinstance(part, DurableChunk)
            got.append(part.data)
        assert got == chunks


async def test_an_object_is_readable_only_once_it_is_whole() -> None:
    async with durable_tier() as bus:
        put = DurablePut(object_id="half", size_bytes=2, chunks=2, digest="00000000")
        await ask(bus, SUBJECTS.objectstore("put"), put)
        with pytest.raises(NotFoundError, match="half"):
            await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="half"))
        with pytest.raises(NotFoundError, match="chunk 0"):
            await ask(bus, SUBJECTS.objectstore("seal"), DurableSeal(object_id="half"))


async def test_a_wrong_digest_is_refused() -> None:
    async with durable_tier() as bus:
        with pytest.raises(ServiceError, match="digest"):
            await upload(bus, "bad", [b"data"], wrong=True)


async def test_other_contents_and_chunks_that_are_not_announced_are_refused() -> None:
    async with durable_tier() as bus:
        await upload(bus, "taken", [b"first"])
        with pytest.raises(AlreadyExistsError, match="taken"):
            await upload(bus, "taken", [b"second"])
        part = DurablePutChunk(object_id="taken", index=7, data=b"")
        with pytest.raises(InvalidRequestError, match="not 7"):
            await ask(bus, SUBJECTS.objectstore("put_chunk"), part)


async def test_a_deleted_object_is_gone() -> None:
    async with durable_tier() as bus:
        await upload(bus, "gone", [b"data"])
        await ask(bus, SUBJECTS.objectstore("delete"), DurableDelete(object_id="gone"))
        with pytest.raises(NotFoundError):
            await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="gone"))
        await upload(bus, "gone", [b"again"])


def test_only_uploads_that_nobody_ends_are_abandoned() -> None:
    manifest = Manifest("x", 1, 1, "0", opened_at=0.0)
    assert not is_abandoned(manifest, ABANDONED_SECONDS)
    assert is_abandoned(manifest, ABANDONED_SECONDS + 1)
    assert not is_abandoned(Manifest("x", 1, 1, "0", 0.0, sealed=True), 1e12)
