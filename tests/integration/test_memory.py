"""A node whose memory runs out: the task that takes it is ended, and everybody else lives."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import shoal
from shoal import exceptions
from shoal_worker.workers.memory_meter import read_memory
from shoal_worker.workers.pressure import Memory
from tests.integration.waiting import SECONDS

ROOM_BYTES = 512 * 2**20
STEP_BYTES = 64 * 2**20


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Memory]:
    """A cluster that takes memory for short when half a GiB more is used than now."""
    memory = read_memory()
    monkeypatch.setenv("SHOAL_MEMORY_THRESHOLD", str((memory.used_bytes + ROOM_BYTES) / memory.total_bytes))
    shoal.init("local", num_cpus=2)
    yield memory
    shoal.shutdown()


def hoard() -> None:
    """Take memory, a little at a time, until somebody does something about it."""
    taken: list[bytearray] = []
    while len(taken) * STEP_BYTES < read_memory().total_bytes // 2:
        taken.append(bytearray(b"x") * STEP_BYTES)
        time.sleep(0.02)
    time.sleep(600)


@shoal.remote
def call(function: Callable[[], Any]) -> Any:
    return function()


class Keeper:
    def ping(self) -> str:
        return "here"

    def hoard(self) -> None:
        hoard()


def test_a_task_that_takes_all_memory_is_ended_and_says_so(cluster: Memory) -> None:
    keeper: Any = shoal.remote(Keeper).remote()
    assert shoal.get(keeper.ping.remote(), timeout=SECONDS) == "here"
    with pytest.raises(exceptions.OutOfMemoryError, match=r"memory ran out: [\d.]+ of [\d.]+ GiB(.|\n)*memory="):
        shoal.get(call.options(max_retries=0).remote(hoard), timeout=SECONDS)
    assert shoal.get(keeper.ping.remote(), timeout=SECONDS) == "here"
    assert shoal.get(call.remote(lambda: "after"), timeout=SECONDS) == "after"


def test_an_actor_that_does_dies_of_it(cluster: Memory) -> None:
    keeper: Any = shoal.remote(Keeper).remote()
    with pytest.raises(exceptions.ActorDiedError, match="memory ran out"):
        shoal.get(keeper.hoard.remote(), timeout=SECONDS)
