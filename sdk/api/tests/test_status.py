"""What `shoal status` finds out, over a broker in memory whose services are played by the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from shoal.status import Target, observe
from shoal_core.bus import Bus, Credentials, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import NoRespondersError
from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.messages import ClusterInfo, NodeAnnouncement, NodeDescription, NodeList, NodeRecord, NodeState
from shoal_core.protocol.messages import Message as ControlMessage
from shoal_core.protocol.resources import to_resources
from shoal_core.protocol.scheduling import PendingDemand, PendingList
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode

CLUSTER = "default"
SUBJECTS = Subjects(CLUSTER)
TARGET = Target("nats://memory", CLUSTER)


def record(node: str, state: NodeState = NodeState.ALIVE) -> NodeRecord:
    description = NodeDescription(
        node_id=NodeId(node),
        hostname="host",
        address="127.0.0.1",
        machine_id="machine",
        pid=1,
        total=to_resources({"CPU": 4, "licence": 1}),
        shared_memory_path="",
        object_store_bytes=0,
        version="0",
        python_version="3.11",
        started_at=0.0,
    )
    return NodeRecord(description=description, state=state)


def announcement(node: str, free_cpus: float) -> NodeAnnouncement:
    total = to_resources({"CPU": 4, "licence": 1})
    free = to_resources({"CPU": free_cpus, "licence": 1})
    return NodeAnnouncement(node_id=NodeId(node), sequence=1, total=total, free=free, worker_processes=3)


def pending() -> PendingDemand:
    return PendingDemand(
        owner=ProcessId("o" * 24),
        job_id=JobId("00000001"),
        name="train",
        resources=to_resources({"GPU": 1}),
        wanted=7,
        waiting_seconds=12.5,
        why="no node has a GPU",
        feasible=False,
    )


@pytest.fixture
async def buses() -> AsyncIterator[dict[Role, Bus]]:
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        yield {
            role: await stack.enter_async_context(broker.connect(role=role, identity=f"the-{role}", cluster=CLUSTER))
            for role in (Role.GCS, Role.SCHEDULER, Role.NODE, Role.OBSERVER)
        }


def answer(bus: Bus, subject: str, reply: ControlMessage) -> None:
    def respond(request: Message) -> None:
        bus.publish(request.reply, encode(reply))

    bus.subscribe(subject, respond)


def play_gcs(buses: dict[Role, Bus], nodes: list[NodeRecord], announce: list[NodeAnnouncement]) -> None:
    gcs, node = buses[Role.GCS], buses[Role.NODE]
    answer(gcs, SUBJECTS.gcs("cluster"), ClusterInfo(cluster=CLUSTER, version="0", protocol=1, session="s"))

    def list_nodes(request: Message) -> None:
        for told in announce:
            node.publish(SUBJECTS.event(Role.NODE, told.node_id, "announce"), encode(told))
        gcs.publish(request.reply, encode(NodeList(nodes=nodes)))

    gcs.subscribe(SUBJECTS.gcs("list_nodes"), list_nodes)


async def test_nodes_with_what_is_used_of_them_and_what_waits(buses: dict[Role, Bus]) -> None:
    play_gcs(buses, [record("a"), record("b", NodeState.DEAD)], [announcement("a", free_cpus=1.5)])
    answer(buses[Role.SCHEDULER], SUBJECTS.scheduler("pending"), PendingList(pending=[pending()]))

    seen = await observe(buses[Role.OBSERVER], TARGET, 5)

    assert [node.record.description.node_id for node in seen.alive()] == ["a"]
    assert seen.totals() == {"CPU": (2.5, 4.0), "licence": (0.0, 1.0)}
    shown = seen.to_json()
    assert [node["state"] for node in shown["nodes"]] == ["ALIVE", "DEAD"]
    assert shown["nodes"][0]["used"] == {"CPU": 2.5}
    assert shown["nodes"][1]["used"] is None
    assert shown["pending"][0]["why"] == "no node has a GPU"
    assert shown["pending"][0]["resources"] == {"GPU": 1.0}


async def test_a_node_that_says_nothing_is_shown_without_its_use(
    buses: dict[Role, Bus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.status.HEARING_SECONDS", 0.01)
    play_gcs(buses, [record("a")], [])
    answer(buses[Role.SCHEDULER], SUBJECTS.scheduler("pending"), PendingList(pending=[]))

    seen = await observe(buses[Role.OBSERVER], TARGET, 5)

    assert seen.nodes[0].used is None
    assert seen.totals()["CPU"] == (0.0, 4.0)


async def test_a_cluster_without_a_scheduler_is_an_error(buses: dict[Role, Bus]) -> None:
    play_gcs(buses, [], [])
    with pytest.raises(NoRespondersError):
        await observe(buses[Role.OBSERVER], TARGET, 0.2)


@pytest.mark.parametrize(
    ("user", "role"), [("observer", Role.OBSERVER), ("process", Role.PROCESS), ("alice", Role.OBSERVER)]
)
def test_the_role_is_that_of_the_credential(user: str, role: Role) -> None:
    assert Target("nats://x", CLUSTER, Credentials(user=user, password="p")).role is role
