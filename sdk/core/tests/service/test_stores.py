"""Stores and loads through lost connections: the outcome is certain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from shoal_core.bus.jetstream import WRONG_LAST_SEQUENCE, Acknowledged
from shoal_core.bus.keyvalue import Entry, KeyValue, WatchCallback, conflict
from shoal_core.bus.watch import Watch
from shoal_core.protocol.effects import Conflict, Store, Stored, StoreRefused
from shoal_core.protocol.errors import (
    BusClosedError,
    BusError,
    DisconnectedError,
    JetStreamError,
    JetStreamUnavailableError,
    NoRespondersError,
    PayloadTooLargeError,
    RequestTimeoutError,
    RevisionConflict,
    ShoalError,
)
from shoal_core.service.stores import perform_load, see_store_through
from shoal_core.testing import run_virtual

LOST = DisconnectedError("the connection broke while a request was in flight")
Between = Callable[["FaultyBucket"], None]


class FaultyBucket(KeyValue):
    """A bucket in memory. ``faults`` are what befalls the next calls: None, or an error.

    An error in a pair with True strikes after the change was made. ``between`` runs after each fault.
    """

    bucket = "faulty"

    def __init__(self, *faults: ShoalError | tuple[ShoalError, bool] | None, between: Between | None = None) -> None:
        self.held: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.faults = list(faults)
        self.between = between
        self.calls = 0

    def change(self, key: str, value: bytes | None) -> int:
        self.revision += 1
        if value is None:
            del self.held[key]
        else:
            self.held[key] = (value, self.revision)
        return self.revision

    def _begin(self) -> ShoalError | None:
        """Strike before the change, or return the error that strikes after it."""
        self.calls += 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, tuple):
            return fault[0]
        if fault is not None:
            self._strike(fault)
        return None

    def _strike(self, error: ShoalError) -> None:
        if self.between is not None:
            self.between(self)
        raise error

    async def _changed(self, key: str, value: bytes | None, revision: int) -> int:
        after = self._begin()
        now = self.held.get(key)
        if (now[1] if now else 0) != revision:
            raise conflict(self.bucket, key, revision, Entry(key, *now) if now else None)
        new = self.change(key, value)
        if after is not None:
            self._strike(after)
        return new

    async def get(self, key: str) -> Entry | None:
        self._begin()
        return Entry(key, *self.held[key]) if key in self.held else None

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        return await self._changed(key, value, revision)

    async def delete(self, key: str, *, revision: int) -> None:
        await self._changed(key, None, revision)

    def begin(self, key: str, value: bytes | None, settled: Acknowledged, *, revision: int) -> None:
        raise NotImplementedError

    async def purge(self, prefix: str) -> int:
        raise NotImplementedError

    async def watch(self, callback: WatchCallback) -> Watch:
        raise NotImplementedError


async def perform_store(bucket: FaultyBucket, store: Store) -> Stored | Conflict | StoreRefused:
    """Do what the engine does: try once, and see it through where that fails."""
    try:
        revision = await bucket._changed(store.key, store.value, store.revision)
    except RevisionConflict:
        failure: ShoalError = JetStreamError("wrong last sequence", 400, WRONG_LAST_SEQUENCE[0])
    except ShoalError as error:
        failure = error
    else:
        revision = 0 if store.value is None else revision
        return Stored(store.key, store.value, revision, store.context, store.bucket)
    return await see_store_through(bucket, store, failure)


def perform(bucket: FaultyBucket, store: Store) -> Stored | Conflict | StoreRefused:
    return run_virtual(perform_store(bucket, store))


STORE = Store("key", b"mine", 0, "context", "bucket")
STORED = Stored("key", b"mine", 1, "context", "bucket")


def test_a_store_that_goes_well_is_done_once() -> None:
    bucket = FaultyBucket()
    assert perform(bucket, STORE) == STORED
    assert bucket.calls == 1


def test_a_store_that_comes_too_late_is_told_what_is_there() -> None:
    bucket = FaultyBucket()
    bucket.change("key", b"theirs")
    assert perform(bucket, STORE) == Conflict("key", b"theirs", 1, "context", "bucket")
    assert perform(bucket, Store("other", b"mine", 7)) == Conflict("other", None, 0, None)


@pytest.mark.parametrize("times", [1, 2, 10])
@pytest.mark.parametrize(
    "lost", [LOST, RequestTimeoutError("late"), NoRespondersError("none"), JetStreamUnavailableError("")]
)
def test_a_store_that_did_not_happen_is_tried_again(times: int, lost: ShoalError) -> None:
    faults = [fault for _ in range(times) for fault in (lost, None)]
    assert perform(FaultyBucket(*faults), STORE) == STORED


def test_a_store_that_happened_without_an_answer_is_not_done_again() -> None:
    bucket = FaultyBucket((LOST, True))
    assert perform(bucket, STORE) == STORED
    assert bucket.revision == 1


def test_a_question_whose_answer_is_lost_too_is_asked_again() -> None:
    bucket = FaultyBucket((LOST, True), LOST, LOST)
    assert perform(bucket, STORE) == STORED
    assert bucket.revision == 1


def test_others_who_came_between_are_a_conflict() -> None:
    def others(bucket: FaultyBucket) -> None:
        bucket.change("key", b"theirs")

    for happened in (LOST, (LOST, True)):
        bucket = FaultyBucket(happened, between=others)
        outcome = perform(bucket, STORE)
        assert outcome == Conflict("key", b"theirs", bucket.revision, "context", "bucket")


def test_others_who_come_between_the_question_and_the_second_attempt_are_a_conflict() -> None:
    class Late(FaultyBucket):
        async def get(self, key: str) -> Entry | None:
            entry = await super().get(key)
            if not self.held:
                self.change("key", b"theirs")
            return entry

    bucket = Late(LOST)
    assert perform(bucket, STORE) == Conflict("key", b"theirs", 1, "context", "bucket")
    assert bucket.held == {"key": (b"theirs", 1)}


@pytest.mark.parametrize("happened", [False, True])
def test_a_delete_is_resolved_in_the_same_way(happened: bool) -> None:
    bucket = FaultyBucket((LOST, True) if happened else LOST)
    bucket.change("key", b"old")
    assert perform(bucket, Store("key", None, 1)) == Stored("key", None, 0, None)
    assert bucket.held == {}


@pytest.mark.parametrize(
    "error",
    [
        PayloadTooLargeError("2 MiB"),
        JetStreamError("bad request", 400, 10025),
        JetStreamError("maximum bytes exceeded", 503, 10077),
        JetStreamError("insufficient storage", 500, 10047),
    ],
)
def test_a_store_that_will_never_be_taken_is_refused_at_once(error: ShoalError) -> None:
    bucket = FaultyBucket(error)
    assert perform(bucket, STORE) == StoreRefused("key", error, "context", "bucket")
    assert bucket.calls == 1


def test_a_stream_without_a_leader_is_waited_for() -> None:
    bucket = FaultyBucket(JetStreamError("no leader", 503, 10008))
    assert perform(bucket, STORE) == STORED


@pytest.mark.parametrize(
    "work", [lambda bucket: perform_store(bucket, STORE), lambda bucket: perform_load(bucket, "key")]
)
def test_a_bus_that_was_closed_ends_the_work(work: Callable[[KeyValue], Coroutine[Any, Any, Any]]) -> None:
    with pytest.raises(BusClosedError):
        run_virtual(work(FaultyBucket(BusClosedError("closed"), BusClosedError("closed"))))


@pytest.mark.parametrize(
    "fault", [LOST, BusError("odd"), JetStreamUnavailableError(""), JetStreamError("", 503, 10008)]
)
def test_a_load_is_tried_as_often_as_it_takes(fault: ShoalError) -> None:
    bucket = FaultyBucket(*[fault] * 8)
    bucket.change("key", b"value")
    assert run_virtual(perform_load(bucket, "key")) == Entry("key", b"value", 1)
    assert run_virtual(perform_load(bucket, "other")) is None


def test_a_load_that_can_never_succeed_raises() -> None:
    with pytest.raises(JetStreamError, match="no such stream"):
        run_virtual(perform_load(FaultyBucket(JetStreamError("no such stream", 404, 10059)), "key"))


def test_pauses_grow_to_a_second_and_long_ones_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await perform_load(FaultyBucket(*[LOST] * 9), "key")
        return loop.time() - began

    pauses = [min(1.0, 0.02 * 2**attempt) for attempt in range(9)]
    assert run_virtual(main()) == pytest.approx(sum(pauses))
    assert [record.getMessage() for record in caplog.records] == [f"reading 'key' still fails, trying on: {LOST}"] * 3
