"""Two replicas of the service on one broker: the in-memory one, and a real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from services.gcs.tests.builders import description, job_request
from shoal_core.bus import Bus
from shoal_core.bus.interface import Message as BusMessage
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import DeclaredDeadError, InvalidRequestError
from shoal_core.protocol.ids import FunctionId, JobId
from shoal_core.protocol.messages import (
    ClusterInfo,
    Done,
    FinishJob,
    FunctionPart,
    GetCluster,
    GetFunctionPart,
    GetJob,
    GetNode,
    JobFinished,
    JobList,
    JobRecord,
    JobState,
    KvGet,
    KvPut,
    KvValue,
    ListJobs,
    ListNodes,
    Message,
    NodeDied,
    NodeList,
    NodeRecord,
    NodeState,
    PutFunctionPart,
    RetireNode,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode
from shoal_core.service import Engine
from shoal_core.service.settings import ServiceSettings
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import CLUSTER, BusHarness, Implementation, bus_harness, until
from shoal_gcs.core import ControlStore
from shoal_gcs.records import StoredJob, StoredNode, job_id
from shoal_gcs.service import serve

SUBJECTS = Subjects(CLUSTER)
SETTINGS = ServiceSettings(cluster=CLUSTER)
FUNCTION = FunctionId("f" * 32)


@pytest.fixture(params=["memory", "fast"])
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[BusHarness]:
    implementation: Implementation = request.param
    async with bus_harness(implementation) as harness:
        yield harness


@asynccontextmanager
async def replicas(harness: BusHarness, *names: str) -> AsyncIterator[list[ControlStore]]:
    """Run replicas; those that are left are gone from the broker."""
    async with AsyncExitStack() as stack:
        engines: list[Engine] = []
        for name in names:
            engines.append(await stack.enter_async_context(serve(await harness.join(Role.GCS, name), SETTINGS)))
        yield [core for engine in engines if isinstance(core := engine.core, ControlStore)]


def all_is_told(core: ControlStore) -> bool:
    """Tell whether a replica knows of one node and one job, and that their ends were told."""
    records: list[StoredNode | StoredJob] = [held.value for held in core.state.nodes.values()]
    records += [held.value for held in core.state.jobs.values()]
    return [record.told for record in records] == [True, True]


class Asker:
    """A node that asks whichever replica the broker picks."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def __call__(self, verb: str, message: Message) -> Message:
        of_nodes = verb in ("register_node", "retire_node")
        return await ask(self._bus, SUBJECTS.gcs_from_node(verb) if of_nodes else SUBJECTS.gcs(verb), message)


async def test_what_one_replica_took_any_other_knows_also_after_a_restart(harness: BusHarness) -> None:
    asker = Asker(await harness.join(Role.NODE, node_id(1)))
    async with replicas(harness, "one"):
        cluster = await asker("cluster", GetCluster(version="0.1.0"))
        node = await asker("register_node", description(1))
        job = await asker("register_job", job_request(1))
        assert isinstance(job, JobRecord)
        part = PutFunctionPart(job_id=job.job_id, function_id=FUNCTION, part=0, parts=1, data=b"\x00code")
        assert await asker("put_function", part) == Done()
        await asker("kv_put", KvPut(namespace="", key="a key.*", value=b"value"))
    async with replicas(harness, "two", "three") as cores:
        for _ in range(4):
            assert isinstance(cluster, ClusterInfo)
            assert await asker("cluster", GetCluster(version="0.1.0")) == cluster
            assert await asker("get_node", GetNode(node_id=node_id(1))) == node
            assert await asker("get_job", GetJob(job_id=job.job_id)) == job
            assert await asker("list_jobs", ListJobs()) == JobList(jobs=[job])
            assert await asker("list_nodes", ListNodes()) == NodeList(
                nodes=[node] if isinstance(node, NodeRecord) else []
            )
            assert await asker("kv_get", KvGet(namespace="", key="a key.*")) == KvValue(value=b"value")
            get = GetFunctionPart(job_id=job.job_id, function_id=FUNCTION, part=0)
            assert await asker("get_function", get) == FunctionPart(parts=1, data=b"\x00code")
        again = await asker("register_job", job_request(1))
        second = await asker("register_job", job_request(2))
        assert again == job
        assert isinstance(second, JobRecord)
        assert second.job_id == job_id(2)
        await until(lambda: all(second.job_id in core.state.jobs for core in cores))


async def test_ends_are_told_and_known_to_every_replica(harness: BusHarness) -> None:
    bus = await harness.join(Role.NODE, node_id(1))
    asker = Asker(bus)
    heard: list[Message] = []
    events: dict[str, type[Message]] = {"node_died": NodeDied, "job_finished": JobFinished}
    for kind, model in events.items():

        def on_event(message: BusMessage, model: type[Message] = model) -> None:
            heard.append(decode(model, message.data))

        bus.subscribe(SUBJECTS.event(Role.GCS, "*", kind), on_event)
    await bus.flush()
    async with replicas(harness, "one", "two") as cores:
        await asker("register_node", description(1))
        await asker("register_job", job_request(1))
        part = PutFunctionPart(job_id=job_id(1), function_id=FUNCTION, part=0, parts=1, data=b"code")
        await asker("put_function", part)
        await asker("retire_node", RetireNode(node_id=node_id(1), reason="told to"))
        await asker("finish_job", FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
        await until(lambda: len(heard) == 2)
        assert NodeDied(node_id=node_id(1), reason="told to") in heard
        finished = JobFinished(job_id=job_id(1), driver=process_id(1), state=JobState.SUCCEEDED, message="")
        assert finished in heard
        await until(lambda: all(all_is_told(core) for core in cores))
        with pytest.raises(DeclaredDeadError):
            await asker("register_node", description(1))
        functions = await (await harness.join(Role.GCS, "reader")).key_value(SUBJECTS.function_bucket())
        assert await functions.get(f"function.{job_id(1)}.{FUNCTION}.0") is None


async def test_replicas_go_on_after_the_broker_was_restarted(harness: BusHarness) -> None:
    asker = Asker(await harness.join(Role.NODE, node_id(1)))
    async with replicas(harness, "one", "two") as cores:
        await asker("register_job", job_request(1))
        await harness.restart()
        await asker("register_node", description(1))
        job = await asker("register_job", job_request(2))
        assert isinstance(job, JobRecord)
        assert job.job_id == job_id(2)
        await until(lambda: all(node_id(1) in core.state.nodes and len(core.state.jobs) == 2 for core in cores))
        assert all(core.state.nodes[node_id(1)].value.record.state is NodeState.ALIVE for core in cores)


async def test_a_request_with_an_id_that_is_none_harms_nobody(harness: BusHarness) -> None:
    asker = Asker(await harness.join(Role.PROCESS, process_id(1)))
    async with replicas(harness, "one"):
        for bad in ("a b", "*", "", "x" * 5000):
            with pytest.raises(InvalidRequestError):
                await asker("get_job", GetJob(job_id=JobId(bad)))
            with pytest.raises(InvalidRequestError):
                await asker("get_function", GetFunctionPart(job_id=job_id(1), function_id=FunctionId(bad), part=0))
        assert isinstance(await asker("register_job", job_request(1)), JobRecord)
