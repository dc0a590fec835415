"""What a process makes of what schedulers say about its demand."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import ActorId, FunctionId, PlacementGroupId
from shoal_core.protocol.messages import GetNode, NodeRecord, NodeState
from shoal_core.protocol.placement import DEFAULT, NodeAffinity, Strategy
from shoal_core.protocol.records import Failed
from shoal_core.protocol.scheduling import DemandNotice
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import Call, Runtime
from shoal_core.runtime.tasks import notices
from shoal_core.runtime.tasks.notices import heeding_notices, why_never
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import node_id, node_record, process_id
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import RecordedPeers

CLUSTER = "test"
SUBJECTS = Subjects(CLUSTER)
LOCAL, NODE = process_id(1), node_id(2)
ONE_CPU = {"CPU": 10_000}
HARD = NodeAffinity(NODE, soft=False)


class World:
    """A process, a scheduler that speaks to it, and what the control store says of the node."""

    def __init__(self, runtime: Runtime, store: Bus, scheduler: Bus) -> None:
        self.runtime = runtime
        self.record: NodeRecord | None = node_record(NODE)
        self.asked = 0
        self._store = store
        self._scheduler = scheduler
        store.subscribe(SUBJECTS.gcs("get_node"), self._get_node)

    def _get_node(self, message: Message) -> None:
        assert decode(GetNode, message.data).node_id == NODE
        self.asked += 1
        self._store.publish(message.reply, encode(self.record or NotFoundError("there is no such node")))

    def submit(self, strategy: Strategy) -> ObjectRef[object]:
        key = self.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),), strategy))
        (ref,) = self.runtime.submit(Call(FunctionId("f" * 32), "f", 1, key, 0, b""), (), {})
        self.runtime.reactor.drain()
        return ref  # type: ignore[no-any-return]

    def notice(self, key: int = 0, actor: ActorId | None = None, group: PlacementGroupId | None = None) -> None:
        text = "1 task(s) of f() wait: why."
        told = DemandNotice(key=key, name="f", text=text, why="why", actor=actor, group=group)
        self._scheduler.publish(SUBJECTS.notice("scheduler", LOCAL), encode(told))


def failed(ref: ObjectRef[object]) -> Failed | None:
    value = ref._state.value
    assert value is None or isinstance(value, Failed)
    return value


@asynccontextmanager
async def connected() -> AsyncIterator[World]:
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.GCS, identity="store", cluster=CLUSTER) as store,
        broker.connect(role=Role.SCHEDULER, identity="scheduler", cluster=CLUSTER) as scheduler,
        broker.connect(role=Role.PROCESS, identity=LOCAL, cluster=CLUSTER) as bus,
    ):
        runtime = Runtime(bus, SUBJECTS, LOCAL, None, "memory")
        runtime.reactor.peers = RecordedPeers()  # type: ignore[assignment]
        try:
            with heeding_notices(runtime):
                yield World(runtime, store, scheduler)
        finally:
            runtime.close()


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(notices, "PAUSE_SECONDS", 0.0)
    async with connected() as one:
        yield one


@pytest.fixture(autouse=True)
def propagated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have what is logged reach ``caplog``."""
    monkeypatch.setattr(logging.getLogger("shoal"), "propagate", True)


async def test_what_waits_is_warned_of_once_for_each_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    first = world.submit(DEFAULT)
    soft = world.submit(NodeAffinity(NODE, soft=True))
    for key in (0, 0, 1, 0):
        world.notice(key)
    await until(lambda: len(caplog.records) == 2)
    world.notice(7)  # of a key that this process does not know: an actor's, say
    await until(lambda: len(caplog.records) == 3)
    assert (failed(first), failed(soft), world.asked) == (None, None, 0)


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        (None, f"node {NODE} is not in the cluster"),
        (node_record(NODE, NodeState.DEAD), f"node {NODE} is dead (it was silent)"),
        (node_record(NODE, cpus=0), f"node {NODE} has {{'CPU': 0.0}}, not {{'CPU': 1.0}}"),
    ],
)
async def test_what_is_bound_to_a_node_that_can_never_run_it_fails(
    world: World, gone: NodeRecord | None, reason: str
) -> None:
    world.record = gone
    refs = [world.submit(HARD), world.submit(HARD)]
    other = world.submit(DEFAULT)
    world.notice()
    await until(lambda: all(failed(ref) for ref in refs))
    for ref in refs:
        value = failed(ref)
        assert value is not None
        assert value.code == "task_unschedulable"
        assert reason in value.text
    assert failed(other) is None
    assert why_never(NODE, ONE_CPU, node_record(NODE)) == ""


async def test_a_node_that_may_come_back_is_looked_at_until_it_is_known(world: World) -> None:
    ref = world.submit(HARD)
    world.notice()
    world.notice()
    await until(lambda: world.asked >= 3)
    assert failed(ref) is None
    world.record = node_record(NODE, NodeState.DEAD)
    await until(lambda: failed(ref) is not None)


async def test_what_is_to_fail_without_room_fails_at_once(world: World) -> None:
    ref = world.submit(NodeAffinity(NODE, soft=False, fail=True))
    world.notice()
    await until(lambda: failed(ref) is not None)
    value = failed(ref)
    assert value is not None
    assert "cannot run: why" in value.text
    assert world.asked == 0


async def test_each_group_is_warned_of_once(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.record = None
    ref = world.submit(HARD)
    for name in "abab":
        world.notice(0, group=PlacementGroupId(name * 32))
    world.notice(1)
    await until(lambda: len(caplog.records) == 3)
    assert (failed(ref), world.asked) == (None, 0)


async def test_the_demand_of_an_actor_is_none_of_our_keys(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.record = None
    ref = world.submit(HARD)
    world.notice(0, ActorId("a" * 32))
    await until(lambda: len(caplog.records) == 1)
    assert (failed(ref), world.asked) == (None, 0)
