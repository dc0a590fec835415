"""The durable tier as a service, over the in-memory broker and a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families
from zlib_ng.zlib_ng import crc32

from shoal_core.bus import Bus
from shoal_core.bus.jetstream import JetStream
from shoal_core.bus.requests import ask
from shoal_core.bus.streams import ObjectStream, open_object_stream
from shoal_core.protocol.errors import (
    AlreadyExistsError,
    InvalidRequestError,
    NotFoundError,
    ObjectStoreFullError,
)
from shoal_core.protocol.ids import JobId, new_process_id
from shoal_core.protocol.messages import JobFinished, JobState
from shoal_core.protocol.storage import (
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
from shoal_core.protocol.wire import encode
from shoal_core.service import Engine
from shoal_core.testing.buses import CLUSTER, BusHarness, Implementation, bus_harness
from shoal_objectstore import core
from shoal_objectstore.manifests import Manifest, manifest_key
from shoal_objectstore.manifests import encode as encode_manifest
from shoal_objectstore.service import ObjectStoreSettings, serve

SUBJECTS = Subjects(CLUSTER)
SETTINGS = ObjectStoreSettings(cluster=CLUSTER)
REPLICAS = 2
NO_JOB = JobId("")


@pytest.fixture(params=["memory", "fast"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[BusHarness]:
    implementation: Implementation = request.param
    async with bus_harness(implementation) as harness:
        yield harness


@pytest.fixture
async def bus(harness: BusHarness) -> AsyncIterator[Bus]:
    """Yield the connection of somebody who asks the durable tier."""
    async with replicas(harness):
        yield await harness.join(Role.PROCESS, new_process_id())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tombstones go at once."""
    monkeypatch.setattr(core, "TOMBSTONE_SECONDS", 0.1)
    monkeypatch.setattr(core, "TICK_SECONDS", 0.1)


@asynccontextmanager
async def replicas(harness: BusHarness) -> AsyncIterator[list[Engine]]:
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(serve(await harness.join(Role.OBJECTSTORE, f"store{n}"), SETTINGS))
            for n in range(REPLICAS)
        ]


def put(object_id: str, chunks: list[bytes], job: JobId = NO_JOB) -> DurablePut:
    size_bytes = sum(map(len, chunks))
    return DurablePut(object_id=object_id, size_bytes=size_bytes, digests=list(map(crc32, chunks)), job_id=job)


async def upload(bus: Bus, object_id: str, chunks: list[bytes], job: JobId = NO_JOB) -> None:
    await ask(bus, SUBJECTS.objectstore("put"), put(object_id, chunks, job))
    for index, chunk in enumerate(chunks):
        part = DurablePutChunk(object_id=object_id, index=index, data=chunk)
        await ask(bus, SUBJECTS.objectstore("put_chunk"), part)
    await ask(bus, SUBJECTS.objectstore("seal"), DurableSeal(object_id=object_id))


async def test_an_object_comes_back_as_it_was_put(bus: Bus) -> None:
    chunks = [b"a" * 1000, b"\x00\xff" * 500, b"c"]
    await upload(bus, "one", chunks)
    await upload(bus, "one", chunks)  # again, as after a lost answer
    manifest = await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="one"))
    assert isinstance(manifest, DurableManifest)
    assert (len(manifest.digests), manifest.size_bytes) == (3, 2001)
    got = []
    for index in range(3):
        part = await ask(bus, SUBJECTS.objectstore("get_chunk"), DurableGetChunk(object_id="one", index=index))
        assert isinstance(part, DurableChunk)
        got.append(part.data)
    assert got == chunks


async def test_an_object_is_readable_only_once_it_is_whole(bus: Bus) -> None:
    await ask(bus, SUBJECTS.objectstore("put"), put("half", [b"a", b"b"]))
    with pytest.raises(NotFoundError, match="half"):
        await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="half"))
    with pytest.raises(NotFoundError, match="0 of its 2 chunks"):
        await ask(bus, SUBJECTS.objectstore("seal"), DurableSeal(object_id="half"))


async def test_a_chunk_with_other_bytes_than_were_announced_is_refused(bus: Bus) -> None:
    await ask(bus, SUBJECTS.objectstore("put"), put("bad", [b"data"]))
    part = DurablePutChunk(object_id="bad", index=0, data=b"others")
    with pytest.raises(InvalidRequestError, match="digest"):
        await ask(bus, SUBJECTS.objectstore("put_chunk"), part)


async def test_other_contents_and_chunks_that_are_not_announced_are_refused(bus: Bus) -> None:
    await upload(bus, "taken", [b"first"])
    with pytest.raises(AlreadyExistsError, match="taken"):
        await upload(bus, "taken", [b"second"])
    part = DurablePutChunk(object_id="taken", index=7, data=b"")
    with pytest.raises(InvalidRequestError, match="not 7"):
        await ask(bus, SUBJECTS.objectstore("put_chunk"), part)


async def test_a_deleted_object_is_gone(bus: Bus) -> None:
    await upload(bus, "gone", [b"data"])
    await ask(bus, SUBJECTS.objectstore("delete"), DurableDelete(object_id="gone"))
    with pytest.raises(NotFoundError):
        await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="gone"))
    await upload(bus, "gone", [b"again"])


async def test_a_chunk_is_readable_only_once_the_object_is_whole(bus: Bus) -> None:
    await ask(bus, SUBJECTS.objectstore("put"), put("half", [b"x"]))
    part = DurablePutChunk(object_id="half", index=0, data=b"x")
    await ask(bus, SUBJECTS.objectstore("put_chunk"), part)
    with pytest.raises(NotFoundError, match="half"):
        await ask(bus, SUBJECTS.objectstore("get_chunk"), DurableGetChunk(object_id="half", index=0))


async def test_an_id_that_names_all_objects_is_refused_and_harms_none(bus: Bus) -> None:
    await upload(bus, "kept", [b"data"])
    for object_id in ("*", ">", "with space"):
        with pytest.raises(InvalidRequestError, match="object_id"):
            await ask(bus, SUBJECTS.objectstore("delete"), DurableDelete(object_id=object_id))
    part = await ask(bus, SUBJECTS.objectstore("get_chunk"), DurableGetChunk(object_id="kept", index=0))
    assert part == DurableChunk(data=b"data")


async def messages_in_stream(bus: Bus) -> int:
    answer = await JetStream(bus).call(f"STREAM.INFO.{SUBJECTS.object_stream()}", {})
    return int(answer["state"]["messages"])


@pytest.mark.usefixtures("quick")
async def test_a_delete_leaves_nothing_in_the_stream(harness: BusHarness, bus: Bus) -> None:
    store = await harness.join(Role.OBJECTSTORE, "looks")
    await upload(bus, "gone", [b"one", b"two"])
    assert await messages_in_stream(store) == 3
    await ask(bus, SUBJECTS.objectstore("delete"), DurableDelete(object_id="gone"))
    while await messages_in_stream(store):
        pass


@pytest.mark.usefixtures("quick")
async def test_what_was_left_behind_is_swept_when_a_replica_begins(harness: BusHarness) -> None:
    store = await harness.join(Role.OBJECTSTORE, "crashed")
    stream = await open_object_stream(store, SUBJECTS.object_stream(), SUBJECTS.object_prefix())
    await stream.put_chunk("nobody.1", 0, b"of an upload that is gone")
    abandoned = Manifest("abandoned", 2, [0, 0], opened_at=0.0)
    revision = await stream.manifests.put(manifest_key("abandoned"), encode_manifest(abandoned), revision=0)
    await stream.put_chunk(f"abandoned.{revision}", 0, b"x")
    await stream.manifests.put(manifest_key("deleted"), b"", revision=0)
    async with replicas(harness) as [one, other]:
        while await messages_in_stream(store):
            pass
        swept = [value_of(engine, "shoal_durable_objects_swept_total") for engine in (one, other)]
        assert sum(swept) == 1


async def test_a_tier_that_is_full_says_so_and_takes_more_after_a_delete() -> None:
    async with bus_harness("fast") as harness:  # the twin has no limits
        store = await harness.join(Role.OBJECTSTORE, "first")
        async with replicas(harness):
            # The broker's bound; what the replicas know of their own bound lags behind.
            await open_object_stream(store, SUBJECTS.object_stream(), SUBJECTS.object_prefix(), max_bytes=10_000)
            bus = await harness.join(Role.PROCESS, new_process_id())
            await upload(bus, "small", [bytes(5000)])
            with pytest.raises(ObjectStoreFullError, match="large"):
                await upload(bus, "large", [bytes(8000)])
            await ask(bus, SUBJECTS.objectstore("delete"), DurableDelete(object_id="small"))
            await upload(bus, "large", [bytes(8000)])


async def test_replicas_count_objects_and_bytes(harness: BusHarness) -> None:
    async with replicas(harness) as engines:
        bus = await harness.join(Role.PROCESS, new_process_id())
        await upload(bus, "one", [b"abc", b"de"])
        await upload(bus, "two", [b"f"])
        await ask(bus, SUBJECTS.objectstore("get_chunk"), DurableGetChunk(object_id="one", index=1))
        await ask(bus, SUBJECTS.objectstore("delete"), DurableDelete(object_id="one"))
        names = ("objects_opened", "objects_sealed", "objects_deleted", "written_bytes", "read_bytes")
        totals = [sum(value_of(engine, f"shoal_durable_{name}_total") for engine in engines) for name in names]
        assert totals == [2, 2, 1, 6, 2]
        while value_of(engines[0], "shoal_objects") != 1:
            await bus.flush()
        assert value_of(engines[0], "shoal_object_bytes") == 1
        assert value_of(engines[0], "shoal_durable_requests") == 0


def value_of(engine: Engine, name: str) -> float:
    families = text_string_to_metric_families(engine.metrics.exposition().decode())
    [value] = [sample.value for family in families for sample in family.samples if sample.name == name]
    return value


@pytest.mark.usefixtures("quick")
async def test_the_end_of_a_job_takes_its_objects_along(harness: BusHarness) -> None:
    store = await harness.join(Role.OBJECTSTORE, "looks")
    gcs = await harness.join(Role.GCS, "gcs")
    async with replicas(harness):
        bus = await harness.join(Role.PROCESS, new_process_id())
        await upload(bus, "kept", [b"one"], JobId("00000002"))
        await upload(bus, "gone", [b"one", b"two"], JobId("00000001"))
        finished = JobFinished(job_id=JobId("00000001"), driver=new_process_id(), state=JobState.SUCCEEDED, message="")
        gcs.publish(SUBJECTS.event(Role.GCS, "gcs", "job_finished"), encode(finished))
        while await messages_in_stream(store) > 2:
            pass
        assert await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id="kept"))


async def test_chunks_may_be_written_into_the_stream_itself(harness: BusHarness, bus: Bus) -> None:
    node = await harness.join(Role.NODE, "0123456789abcdef")
    stream = ObjectStream(node, SUBJECTS.object_stream(), SUBJECTS.object_prefix())
    opened = await ask(bus, SUBJECTS.objectstore("put"), put("direct", [b"one", b"two"]))
    assert isinstance(opened, DurableUpload)
    for index, chunk in enumerate((b"one", b"two")):
        assert await stream.put_chunk(opened.place, index, chunk)
        assert not await stream.put_chunk(opened.place, index, chunk)
    await ask(bus, SUBJECTS.objectstore("seal"), DurableSeal(object_id="direct"))
    part = await ask(bus, SUBJECTS.objectstore("get_chunk"), DurableGetChunk(object_id="direct", index=1))
    assert part == DurableChunk(data=b"two")
    assert await stream.get_chunk_directly(opened.place, 0) == b"one"
    assert await stream.get_chunk_directly(opened.place, 2) is None


async def test_the_bounds_of_a_stream_that_exists_are_changed() -> None:
    async with bus_harness("fast") as harness:
        store = await harness.join(Role.OBJECTSTORE, "first")
        for settings in (SETTINGS, ObjectStoreSettings(cluster=CLUSTER, durable_bytes=32_000_000)):
            async with serve(store, settings):
                answer = await JetStream(store).call(f"STREAM.INFO.{SUBJECTS.object_stream()}", {})
                assert answer["config"]["max_bytes"] == settings.most_bytes
