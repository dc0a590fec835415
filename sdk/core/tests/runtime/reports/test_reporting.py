"""When a process tells its node what it has counted, and which node."""

from __future__ import annotations

import asyncio

import pytest

from shoal_core.bus.interface import Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.ids import NO_NODE, PeerId, ProcessId
from shoal_core.protocol.measures import Kind, Metric, labels
from shoal_core.protocol.messages import NodeDescription, NodeList, NodeRecord, NodeState
from shoal_core.protocol.records import MetricsReported
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.reports import reporting
from shoal_core.runtime.reports.reporting import MOST_IN_RECORD
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

SERVED = Metric("served", Kind.COUNTER, "Served.", ("route",))
NODE = node_id(1)
WORKER = process_id(1, node=1)
DRIVER = ProcessId(NO_NODE + "0" * 7 + "1")


def count(lone: LoneRuntime, routes: int = 1) -> None:
    lone.runtime.reporter.measures.define(SERVED)
    for route in range(routes):
        lone.runtime.reporter.measures.add(SERVED, labels(route=str(route)), 1.0)


def told(lone: LoneRuntime) -> list[tuple[PeerId, float]]:
    """Return to whom how much was told since the last look."""
    return [(peer, sum(one.value for one in report.measured)) for peer, report in lone.sent(MetricsReported)]


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "REPORT_SECONDS", 0.02)


async def test_what_a_task_counted_is_told_before_its_end_is_and_not_too_often() -> None:
    async with lone_runtime(WORKER) as lone:
        count(lone)
        lone.runtime.reporter.task_ended()
        assert told(lone) == [(NODE, 1.0)]
        lone.runtime.reporter.task_ended()
        assert told(lone) == [], "nothing was counted"
        count(lone)
        lone.runtime.reporter.task_ended()
        assert told(lone) == [], "that would be too soon"
        await until(lambda: told(lone) == [(NODE, 1.0)])


async def test_what_was_counted_meanwhile_is_told_now_and_then_and_at_the_end() -> None:
    async with lone_runtime(WORKER) as lone:
        count(lone)
        await until(lambda: told(lone) == [(NODE, 1.0)])
        count(lone)
        await lone.runtime.reporter.finish()
        assert told(lone) == [(NODE, 1.0)]


async def test_much_is_told_in_parts() -> None:
    async with lone_runtime(WORKER) as lone:
        count(lone, routes=MOST_IN_RECORD + 1)
        await lone.runtime.reporter.finish()
        assert told(lone) == [(NODE, float(MOST_IN_RECORD)), (NODE, 1.0)]


async def test_nothing_counted_is_nothing_told() -> None:
    async with lone_runtime(WORKER) as lone:
        lone.runtime.reporter.task_ended()
        await lone.runtime.reporter.finish()
        assert told(lone) == []


async def test_a_driver_without_a_node_tells_one_that_lives_and_another_when_that_has_died() -> None:
    alive = [1, 2]

    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.GCS, identity="gcs", cluster="test") as gcs,
        lone_runtime(DRIVER, broker=broker) as lone,
    ):

        def answer(asked: Message) -> None:
            records = [NodeRecord(description=described(number), state=state(number)) for number in (1, 2)]
            gcs.publish(asked.reply, encode(NodeList(nodes=records)))

        def state(number: int) -> NodeState:
            return NodeState.ALIVE if number in alive else NodeState.DEAD

        gcs.subscribe(Subjects("test").gcs("list_nodes"), answer)
        count(lone)
        await until(lambda: told(lone) == [(node_id(1), 1.0)])
        alive.remove(1)
        lone.reactor.node_died(node_id(1), "on purpose")
        count(lone)
        await until(lambda: told(lone) == [(node_id(2), 1.0)])


async def test_a_driver_that_finds_no_node_ends_all_the_same() -> None:
    async with lone_runtime(DRIVER) as lone:
        count(lone)
        async with asyncio.timeout(5):
            await lone.runtime.reporter.finish()
        assert told(lone) == []


def described(number: int) -> NodeDescription:
    return NodeDescription(
        node_id=node_id(number),
        hostname="host",
        address="10.0.0.1",
        machine_id="m",
        pid=1,
        total={},
        labels={},
        shared_memory_path="",
        object_store_bytes=0,
        version="0",
        python_version="3",
        started_at=0.0,
    )
