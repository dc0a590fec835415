"""Objects that do not fit into a node's shared memory: they go to the durable tier, and come back when read."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

import shoal
from shoal import ObjectRef
from shoal.cluster_utils import Cluster
from shoal.exceptions import ObjectStoreFullError
from shoal_core.bus import connect
from shoal_core.bus.credentials import Credentials
from shoal_core.bus.jetstream import JetStream
from shoal_core.protocol.subjects import Role, Subjects
from tests.integration.test_faults import family
from tests.integration.test_services import Stack, broker, stack  # noqa: F401
from tests.integration.waiting import SECONDS, get, until

STORE_BYTES = 64 * 1024 * 1024
OBJECT_BYTES = 6 * 1024 * 1024
COUNT = 3 * STORE_BYTES // OBJECT_BYTES

Array = NDArray[np.int64]


def array(number: int) -> Array:
    return np.arange(number, number + OBJECT_BYTES // 8, dtype=np.int64)


def is_right(value: Array, number: int) -> bool:
    return value.nbytes == OBJECT_BYTES and int(value[0]) == number and bool((np.diff(value[::1000]) == 1000).all())


def messages(address: str, cluster: str, credentials: Path) -> int:
    """Return how many messages the durable tier's stream holds: chunks and manifests."""

    async def look() -> int:
        proof = Credentials.from_file(credentials)
        async with connect(address, role=Role.OBJECTSTORE, identity="looks", cluster=cluster, credentials=proof) as bus:
            answer = await JetStream(bus).call(f"STREAM.INFO.{Subjects(cluster).object_stream()}", {})
            return int(answer["state"]["messages"])

    return asyncio.run(look())


@shoal.remote
def first(value: Array) -> int:
    return int(value[0])


@shoal.remote
def make(number: int) -> Array:
    return array(number)


@pytest.fixture
def small() -> Iterator[Any]:
    """Join a cluster whose store holds a third of what is put into it."""
    with shoal.init(num_cpus=2, object_store_memory=STORE_BYTES) as context:
        yield context


def test_three_times_the_store_is_put_and_read_back_in_any_order(small: Any) -> None:
    refs = [shoal.put(array(number)) for number in range(COUNT)]
    order = list(range(COUNT))
    for seed in range(2):
        random.Random(seed).shuffle(order)
        assert all(is_right(get(refs[number]), number) for number in order)


def test_tasks_get_spilled_arguments_and_their_results_are_spilled_too(small: Any) -> None:
    refs = [shoal.put(array(number)) for number in range(COUNT)]
    made = [make.remote(1000 + number) for number in range(COUNT)]
    assert get([first.remote(ref) for ref in refs]) == list(range(COUNT))
    assert get([first.remote(ref) for ref in made]) == [1000 + number for number in range(COUNT)]
    del refs[::2]
    assert all(is_right(get(ref), 1000 + number) for number, ref in enumerate(made))


def test_small_objects_are_spilled_and_read_back_too(small: Any) -> None:
    count = 3 * STORE_BYTES // 500_000
    refs = [shoal.put(np.full(500_000 // 8, number)) for number in range(count)]
    for _ in range(2):
        for start in range(0, count, 50):
            values = get(refs[start : start + 50])
            assert [int(value[0]) for value in values] == [int(value[-1]) for value in values]
            assert [int(value[0]) for value in values] == list(range(start, start + len(values)))
    del refs[::2]
    refs += [shoal.put(np.full(500_000 // 8, count + number)) for number in range(count // 2)]
    assert [int(get(ref)[-1]) for ref in refs] == [*range(1, count, 2), *range(count, count + count // 2)]


def test_what_cannot_be_spilled_is_said_and_costs_nothing(small: Any) -> None:
    with pytest.raises(ObjectStoreFullError, match="larger than the node's whole shared memory"):
        shoal.put(np.zeros(2 * STORE_BYTES, dtype=np.uint8))
    refs = [shoal.put(array(number)) for number in range(COUNT)]
    mapped: list[Array] = []
    with pytest.raises(ObjectStoreFullError, match=r"bytes are mapped by processes") as raised:
        mapped.extend(get(ref) for ref in refs)
    assert "holds" in str(raised.value)
    assert len(mapped) >= STORE_BYTES // OBJECT_BYTES // 2
    assert all(is_right(value, number) for number, value in enumerate(mapped))
    mapped.clear()
    assert all(is_right(get(ref), number) for number, ref in enumerate(refs))


def test_objects_that_go_leave_nothing_in_the_durable_tier(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    (node,) = stack.alive("worker")
    node.end()
    stack.start("worker", "--object-store-memory", str(STORE_BYTES))
    stack.make_whole()
    monkeypatch.setenv("SHOAL_ADDRESS", stack.address)
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.credentials(Role.PROCESS)))

    def left() -> int:
        return messages(stack.address, "default", stack.credentials(Role.OBJECTSTORE))

    with shoal.init():
        refs = [shoal.put(array(number)) for number in range(COUNT)]
        assert left() > 0
        assert is_right(get(refs[0]), 0)
        refs.clear()
        until(lambda: left() == 0, "the copies of freed objects are gone")
        refs = [shoal.put(array(number)) for number in range(COUNT)]
        assert left() > 0
    until(lambda: left() == 0, "the copies of a job that has ended are gone")


@pytest.fixture
def crowded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:  # noqa: F811
    """Join services of which the node has a small store."""
    for node in stack.alive("worker"):
        node.end()
    stack.start("worker", "--object-store-memory", str(STORE_BYTES))
    stack.make_whole()
    monkeypatch.setenv("SHOAL_ADDRESS", stack.address)
    monkeypatch.setenv("SHOAL_CREDENTIALS", str(stack.credentials(Role.PROCESS)))
    with shoal.init():
        yield stack
    for node in stack.alive("worker"):
        node.end()


def test_a_durable_tier_that_is_killed_while_objects_are_spilled_costs_none(crowded: Stack) -> None:
    (tier,) = crowded.alive("objectstore")
    refs: list[ObjectRef[Array]] = []
    for number in range(COUNT):
        refs.append(shoal.put(array(number)))
        if number == COUNT // 2:
            tier.kill()
            crowded.start("objectstore")
    crowded.make_whole()
    for number, ref in enumerate(refs):
        if number == COUNT // 2:
            crowded.alive("objectstore")[0].kill()
            crowded.start("objectstore")
        assert is_right(shoal.get(ref, timeout=SECONDS), number)


def test_a_node_that_is_killed_while_it_spills_leaves_neither_files_nor_copies(crowded: Stack) -> None:
    (node,) = crowded.alive("worker")
    refs = [shoal.put(array(number)) for number in range(COUNT)]
    node.kill()
    shoal.shutdown()
    del refs

    def left() -> int:
        return messages(crowded.address, "default", crowded.credentials(Role.OBJECTSTORE))

    until(lambda: left() == 0, "the copies of a job that has ended are gone")
    crowded.make_whole()
    assert not list(Path("/dev/shm").glob(f"shoal-{node.process.pid}-*")), "the next node sweeps what the last one left"


def brokers() -> list[psutil.Process]:
    """Return the brokers of clusters that drivers here have started; that of the services is none of them."""
    return [one for host in family("shoal.host") for one in host.children() if "nats-server" in one.name()]


def kill_broker() -> None:
    """Kill the broker, once the one that was killed before has a successor."""
    until(lambda: len(brokers()) == 1, "one broker runs")
    (one,) = brokers()
    one.kill()
    one.wait(SECONDS)


def test_a_broker_that_is_killed_while_objects_are_spilled_and_restored_costs_none(small: Any) -> None:
    refs: list[ObjectRef[Array]] = []
    for number in range(COUNT):
        refs.append(shoal.put(array(number)))
        if number == COUNT // 2:
            kill_broker()
    for number, ref in enumerate(refs):
        if number == COUNT // 2:
            kill_broker()
        assert is_right(get(ref), number)


def test_a_durable_tier_that_was_away_hears_of_the_end_of_a_job_when_it_is_back(crowded: Stack) -> None:
    refs = [shoal.put(array(number)) for number in range(COUNT)]
    (tier,) = crowded.alive("objectstore")
    tier.kill()
    shoal.shutdown()
    del refs

    def left() -> int:
        return messages(crowded.address, "default", crowded.credentials(Role.OBJECTSTORE))

    assert left() > 0
    crowded.make_whole()
    until(lambda: left() == 0, "the copies of a job that has ended are gone")


def test_a_durable_tier_that_is_full_says_so_and_costs_nothing(crowded: Stack) -> None:
    (tier,) = crowded.alive("objectstore")
    tier.end()
    bound = 3 * OBJECT_BYTES
    until(crowded.start("objectstore", "--durable-bytes", str(bound)).is_ready, "the bounded tier is ready")
    refs: list[ObjectRef[Array]] = []
    with pytest.raises(ObjectStoreFullError, match="the durable tier refused to take more") as raised:
        refs.extend(shoal.put(array(number)) for number in range(COUNT))
    assert f"{bound:,} bytes are in use" in str(raised.value)
    assert len(refs) >= STORE_BYTES // OBJECT_BYTES
    assert all(is_right(get(ref), number) for number, ref in enumerate(refs))
    with pytest.raises(ObjectStoreFullError, match="--durable-bytes"):
        shoal.put(array(0), durable=True)
    refs.clear()
    crowded.alive("objectstore")[0].end()


def test_a_reader_on_another_node_gets_what_its_home_has_spilled() -> None:
    cluster = Cluster(
        initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE_BYTES}
    )
    try:
        cluster.add_node(num_cpus=1, resources={"there": 1})
        cluster.wait_for_nodes()
        refs = [shoal.put(array(number)) for number in range(COUNT)]
        away = first.options(resources={"there": 0.1})
        assert get([away.remote(ref) for ref in refs]) == list(range(COUNT))
    finally:
        cluster.shutdown()
