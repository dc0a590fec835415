"""The service on the in-memory broker: demand in, requests for leases out, questions answered."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from services.scheduler.tests.builders import announced, demand, entry
from services.scheduler.tests.simulation import cpus, job_id
from shoal_core.bus import Bus
from shoal_core.bus.interface import Message as BusMessage
from shoal_core.bus.memory import MemoryBroker
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import SlotId
from shoal_core.protocol.scheduling import (
    GetPending,
    GetResources,
    LeaseAnswer,
    LeaseRequest,
    PendingList,
    ResourceView,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode
from shoal_core.service import Engine
from shoal_core.service.settings import ServiceSettings
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import CLUSTER, until
from shoal_scheduler.core import Scheduler
from shoal_scheduler.service import serve

SUBJECTS = Subjects(CLUSTER)
NODE = node_id(1)
OWNER = process_id(1, 0)


@dataclass
class Scene:
    """Replicas of the service, a node that grants all it is asked for, and an owner."""

    engines: list[Engine]
    node: Bus
    owner: Bus
    requests: list[LeaseRequest] = field(default_factory=list)

    @property
    def cores(self) -> list[Scheduler]:
        return [core for engine in self.engines if isinstance(core := engine.core, Scheduler)]

    async def announce(self, sequence: int, cpu_count: float) -> None:
        message = announced(1, sequence, cpus(4), cpus(cpu_count))
        self.node.publish(SUBJECTS.event(Role.NODE, NODE, "announce"), encode(message))
        await until(lambda: all(NODE in core.nodes and core.nodes[NODE].sequence == sequence for core in self.cores))

    def on_lease(self, message: BusMessage) -> None:
        request = decode(LeaseRequest, message.data)
        self.requests.append(request)
        answer = LeaseAnswer(node_id=NODE, granted=request.slots, refused=[], free=cpus(2), sequence=1)
        self.node.publish(message.reply, encode(answer))


@asynccontextmanager
async def scene(replicas: int) -> AsyncIterator[Scene]:
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:

        async def join(role: Role, identity: str) -> Bus:
            return await stack.enter_async_context(broker.connect(role=role, identity=identity, cluster=CLUSTER))

        node, owner = await join(Role.NODE, NODE), await join(Role.PROCESS, OWNER)
        engines = []
        for number in range(replicas):
            bus = await join(Role.SCHEDULER, f"scheduler-{number}")
            engines.append(await stack.enter_async_context(serve(bus, ServiceSettings(cluster=CLUSTER))))
        found = Scene(engines, node, owner)
        node.subscribe(SUBJECTS.node_from_scheduler(NODE, "lease"), found.on_lease)
        await node.flush()
        yield found


async def test_demand_becomes_a_request_for_leases_which_a_node_grants() -> None:
    async with scene(replicas=1) as world:
        await world.announce(1, 4)
        world.owner.publish(SUBJECTS.demand(OWNER), encode(demand(1, 1, entry([1, 2]))))
        await until(lambda: len(world.requests) == 1)
        assert world.requests[0] == LeaseRequest(
            scheduler="scheduler-0",
            owner=OWNER,
            job_id=job_id(1),
            key=0,
            slots=[SlotId(1), SlotId(2)],
            resources=cpus(1),
        )
        await until(lambda: not world.cores[0].asks and not len(world.cores[0].demand))


async def test_what_waits_and_what_there_is_is_answered_by_any_replica() -> None:
    async with scene(replicas=2) as world:
        await world.announce(1, 1)
        world.owner.publish(
            SUBJECTS.demand(OWNER), encode(demand(1, 1, entry([1], cpus(2)), entry([2], cpus(9), key=1)))
        )
        await until(lambda: all(len(core.demand) == 2 for core in world.cores))
        for _ in range(4):
            pending = await ask(world.owner, SUBJECTS.scheduler("pending"), GetPending())
            assert isinstance(pending, PendingList)
            assert sorted((row.name, row.feasible) for row in pending.pending) == [("f0", True), ("f1", False)]
            assert {row.name: row.why for row in pending.pending}["f0"].startswith("waits for CPU on 1 node")
            view = await ask(world.owner, SUBJECTS.scheduler("resources"), GetResources())
            assert view == ResourceView(total=cpus(4), free=cpus(1))
        assert world.requests == []


async def test_a_scheduler_that_joins_later_knows_the_cluster_after_one_round_of_announcements() -> None:
    async with scene(replicas=1) as world:
        await world.announce(1, 4)
        assert await ask(world.owner, SUBJECTS.scheduler("resources"), GetResources()) == ResourceView(
            total=cpus(4), free=cpus(4)
        )


async def test_the_schedulers_clock_is_not_one_that_can_be_set_back() -> None:
    async with scene(replicas=1) as world:
        before = time.monotonic()
        await world.announce(1, 4)
        assert before <= world.cores[0].nodes[NODE].heard_at <= time.monotonic()
