"""The key-value store over every bus: compare-and-set, watches, restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest

from shoal_core.bus.interface import Message
from shoal_core.bus.jetstream import JetStream
from shoal_core.bus.keyvalue import Deleted, Entry
from shoal_core.protocol.errors import (
    JetStreamError,
    JetStreamUnavailableError,
    NotFoundError,
    PayloadTooLargeError,
    RequestTimeoutError,
    RevisionConflict,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.testing.buses import CLUSTER, IMPLEMENTATIONS, BusHarness, Implementation, bus_harness, until

BUCKET = Subjects(CLUSTER).control_bucket()


@pytest.fixture(params=IMPLEMENTATIONS)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[BusHarness]:
    implementation: Implementation = request.param
    async with bus_harness(implementation) as harness:
        yield harness


async def test_a_broker_with_jetstream_is_said_to_have_it(harness: BusHarness) -> None:
    process = await harness.join(Role.PROCESS, "process")
    assert process.has_jetstream
    await harness.restart()
    assert process.has_jetstream


async def test_a_key_is_made_changed_and_deleted(harness: BusHarness) -> None:
    bucket = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    assert await bucket.get("actor.1") is None
    first = await bucket.put("actor.1", b"\x00one", revision=0)
    assert await bucket.get("actor.1") == Entry("actor.1", b"\x00one", first)
    second = await bucket.put("actor.1", b"", revision=first)
    assert second > first
    assert await bucket.get("actor.1") == Entry("actor.1", b"", second)
    await bucket.delete("actor.1", revision=second)
    assert await bucket.get("actor.1") is None
    third = await bucket.put("actor.1", b"again", revision=0)
    assert await bucket.get("actor.1") == Entry("actor.1", b"again", third)


async def test_a_change_that_comes_too_late_is_told_what_the_key_holds(harness: BusHarness) -> None:
    one = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    two = await (await harness.join(Role.GCS, "two")).key_value(BUCKET)
    first = await one.put("key", b"one", revision=0)
    with pytest.raises(RevisionConflict, match="'key'") as conflict:
        await two.put("key", b"two", revision=0)
    assert (conflict.value.key, conflict.value.value, conflict.value.revision) == ("key", b"one", first)
    second = await two.put("key", b"two", revision=first)
    with pytest.raises(RevisionConflict) as conflict:
        await one.put("key", b"late", revision=first)
    assert (conflict.value.value, conflict.value.revision) == (b"two", second)
    with pytest.raises(RevisionConflict) as conflict:
        await one.delete("key", revision=first)
    assert (conflict.value.value, conflict.value.revision) == (b"two", second)
    await one.delete("key", revision=second)
    with pytest.raises(RevisionConflict) as conflict:
        await two.put("key", b"late", revision=second)
    assert (conflict.value.value, conflict.value.revision) == (None, 0)


async def test_of_many_who_want_a_key_one_gets_it(harness: BusHarness) -> None:
    bucket = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    for _ in range(2):
        attempts = (bucket.put("name", b"%d" % number, revision=0) for number in range(20))
        outcomes = await asyncio.gather(*attempts, return_exceptions=True)
        (revision,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
        assert sum(isinstance(outcome, RevisionConflict) for outcome in outcomes) == 19
        await bucket.delete("name", revision=revision)


async def test_a_watch_tells_what_is_and_then_what_changes(harness: BusHarness) -> None:
    bucket = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    other = await (await harness.join(Role.GCS, "two")).key_value(BUCKET)
    revisions = [await bucket.put(f"key.{number}", b"%d" % number, revision=0) for number in range(50)]
    await bucket.delete("key.0", revision=revisions[0])
    seen: list[Entry | Deleted] = []
    watch = await other.watch(seen.append)
    await watch.caught_up()
    assert seen == [Entry(f"key.{number}", b"%d" % number, revisions[number]) for number in range(1, 50)]
    seen.clear()
    changed = await bucket.put("key.1", b"new", revision=revisions[1])
    await bucket.delete("key.2", revision=revisions[2])
    await until(lambda: len(seen) == 2)
    assert seen[0] == Entry("key.1", b"new", changed)
    assert isinstance(seen[1], Deleted)
    assert seen[1].key == "key.2"
    watch.stop()
    watch.stop()
    await bucket.put("key.3", b"unseen", revision=revisions[3])
    await other.get("key.3")
    assert len(seen) == 2


async def test_a_watch_leaves_out_what_was_acknowledged_to_the_same_bucket(harness: BusHarness) -> None:
    bucket = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    other = await (await harness.join(Role.GCS, "two")).key_value(BUCKET)
    revisions: dict[str, int] = {}
    seen: list[Entry | Deleted] = []
    told_again: list[Entry | Deleted] = []

    def changed(entry: Entry | Deleted) -> None:
        (seen if entry.revision > revisions.get(entry.key, 0) else told_again).append(entry)

    def acknowledged(key: str, outcome: object) -> None:
        assert isinstance(outcome, int)
        revisions[key] = outcome

    watch = await bucket.watch(changed)
    await watch.caught_up()
    for key in (f"key.{number}" for number in range(50)):
        bucket.begin(key, b"ours", partial(acknowledged, key), revision=0)
    await until(lambda: len(revisions) == 50)
    theirs = await other.put("key.0", b"theirs", revision=revisions["key.0"])
    await other.delete("key.1", revision=revisions["key.1"])
    await until(lambda: bool(seen) and isinstance(seen[-1], Deleted))
    assert seen[-2] == Entry("key.0", b"theirs", theirs)
    assert seen[-1].key == "key.1"
    assert told_again == []
    watch.stop()


async def test_a_watch_of_nothing_has_caught_up(harness: BusHarness) -> None:
    bucket = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    seen: list[Entry | Deleted] = []
    watch = await bucket.watch(seen.append)
    await watch.caught_up()
    assert seen == []
    watch.stop()


async def test_keys_and_watches_survive_a_restart_of_the_broker(harness: BusHarness) -> None:
    bucket = await (await harness.join(Role.GCS, "one")).key_value(BUCKET)
    kept = await bucket.put("kept", b"1", revision=0)
    gone = await bucket.put("gone", b"1", revision=0)
    seen: list[Entry | Deleted] = []
    watch = await bucket.watch(seen.append)
    await watch.caught_up()
    seen.clear()
    await harness.restart()
    assert await bucket.get("kept") == Entry("kept", b"1", kept)
    changed = await bucket.put("kept", b"2", revision=kept)
    await bucket.delete("gone", revision=gone)
    await until(lambda: len(seen) == 2)
    assert {entry.key: type(entry) for entry in seen} == {"kept": Entry, "gone": Deleted}
    assert Entry("kept", b"2", changed) in seen
    watch.stop()


async def test_a_deletion_whose_marker_is_gone_is_seen_after_a_reconnect(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "one")
    bucket = await bus.key_value(BUCKET)
    revision = await bucket.put("gone", b"1", revision=0)
    seen: list[Entry | Deleted] = []
    watch = await bucket.watch(seen.append)
    await watch.caught_up()
    # A purge leaves no marker, so the consumer has nothing to tell of it.
    await JetStream(bus).purge(f"KV_{BUCKET}", f"$KV.{BUCKET}.gone")
    await harness.restart()
    await until(lambda: len(seen) == 2)
    assert seen == [Entry("gone", b"1", revision), Deleted("gone", revision)]
    watch.stop()


async def test_opening_a_bucket_twice_is_opening_one(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "one")
    with pytest.raises(NotFoundError, match=BUCKET):
        await bus.key_value(BUCKET, create=False)
    first = await bus.key_value(BUCKET)
    revision = await first.put("key", b"1", revision=0)
    for options in ({}, {"memory": True}, {"create": False}):
        second = await bus.key_value(BUCKET, **options)
        assert await second.get("key") == Entry("key", b"1", revision)


async def test_bad_keys_and_values_are_refused_where_they_are_given(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "one")
    bucket = await bus.key_value(BUCKET)
    for key in ("", ".a", "a.", "a..b", "a b", "a.*", ">", "ü"):
        with pytest.raises(ValueError, match="not a key"):
            await bucket.put(key, b"", revision=0)
        with pytest.raises(ValueError, match="not a key"):
            await bucket.get(key)
    with pytest.raises(PayloadTooLargeError):
        await bucket.put("key", bytes(bus.max_payload + 1), revision=0)


async def test_streams_store_purge_and_refuse(harness: BusHarness) -> None:
    bus = await harness.join(Role.OBJECTSTORE, "store")
    jetstream = JetStream(bus)
    stream = Subjects(CLUSTER).object_stream()
    configuration = {"name": stream, "subjects": [f"obj.{CLUSTER}.>"], "allow_direct": True, "storage": "memory"}
    assert not await jetstream.stream_exists(stream)
    found = await jetstream.ensure_stream(configuration)
    assert found["subjects"] == configuration["subjects"]
    assert await jetstream.stream_exists(stream)
    chunks = [Subjects(CLUSTER).object_chunk("object", 1, index) for index in range(3)]
    sequences = await asyncio.gather(*(jetstream.publish(chunk, chunk.encode()) for chunk in chunks))
    assert sequences == [1, 2, 3]
    message = await jetstream.last_message(stream, chunks[1])
    assert message is not None
    assert (message.subject, message.sequence, message.data) == (chunks[1], 2, chunks[1].encode())
    direct = await bus.request(f"$JS.API.DIRECT.GET.{stream}.{chunks[2]}", b"", timeout_seconds=10)
    assert direct.data == chunks[2].encode()
    with pytest.raises(JetStreamError) as error:
        await jetstream.publish(chunks[0], b"", expected_revision=0)
    assert error.value.error_code == 10071
    assert await jetstream.purge(stream, f"{Subjects(CLUSTER).object_prefix()}object.>") == 3
    assert await jetstream.last_message(stream, chunks[1]) is None


async def test_a_stream_is_asked_for_again_where_there_is_no_answer(
    harness: BusHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await harness.join(Role.OBJECTSTORE, "store")
    request, asked = bus.request, 0

    async def lose_two(subject: str, data: bytes, *, timeout_seconds: float, headers: None = None) -> Message:
        nonlocal asked
        asked += 1
        answer = await request(subject, data, timeout_seconds=timeout_seconds, headers=headers)
        if asked < 3:
            raise RequestTimeoutError(f"no answer on {subject!r}")
        return answer

    monkeypatch.setattr(bus, "request", lose_two)
    stream = Subjects(CLUSTER).object_stream()
    found = await JetStream(bus).ensure_stream({"name": stream, "subjects": [f"obj.{CLUSTER}.>"], "storage": "memory"})
    assert (found["name"], asked) == (stream, 3)


async def test_a_watch_begins_again_where_there_is_no_answer(
    harness: BusHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = await harness.join(Role.GCS, "one")
    bucket = await bus.key_value(BUCKET)
    other = await (await harness.join(Role.GCS, "two")).key_value(BUCKET)
    await other.put("key.1", b"before", revision=0)
    request, asked = bus.request, 0

    async def lose_two(subject: str, data: bytes, *, timeout_seconds: float, headers: None = None) -> Message:
        nonlocal asked
        answer = await request(subject, data, timeout_seconds=timeout_seconds, headers=headers)
        asked += ".CONSUMER.CREATE." in subject
        if asked < 3:
            raise RequestTimeoutError(f"no answer on {subject!r}")
        return answer

    monkeypatch.setattr(bus, "request", lose_two)
    seen: list[str] = []
    watch = await bucket.watch(lambda entry: seen.append(entry.key))
    await watch.caught_up()
    await other.put("key.2", b"after", revision=0)
    await until(lambda: "key.2" in seen)
    watch.stop()
    assert (seen, asked) == (["key.1", "key.2"], 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_a_broker_without_jetstream_is_said_to_be_one(implementation: Implementation) -> None:
    async with bus_harness(implementation, jetstream=False) as harness:
        process = await harness.join(Role.PROCESS, "process")
        assert not process.has_jetstream
        await harness.restart()
        assert not process.has_jetstream
        bus = await harness.join(Role.GCS, "one")
        with pytest.raises(JetStreamUnavailableError, match="--jetstream"):
            await bus.key_value(BUCKET)
