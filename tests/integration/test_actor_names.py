"""Names of actors, asked for by many at once from two replicas of the control store on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random

import pytest

from services.gcs.tests.linearizability import KeyOperation, is_linearizable
from services.gcs.tests.test_actors_replicas import NameOperation
from shoal_core.bus import Bus, connect
from shoal_core.bus.broker import EmbeddedBroker, launch_broker
from shoal_core.bus.requests import ask
from shoal_core.protocol.actors import ActorDescription, ActorRecord, ActorState, CreateActor, FindActor, KillActor
from shoal_core.protocol.errors import ActorAlreadyExistsError, NotFoundError
from shoal_core.protocol.ids import ActorId, JobId, ObjectKey, actor_id, new_process_id
from shoal_core.protocol.messages import JobConfig, JobRecord, RegisterJob
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.service.settings import ServiceSettings
from shoal_gcs.service import serve

CLUSTER = "names"
SUBJECTS = Subjects(CLUSTER)
NAMES = ["a", "é.*>", "c"]
NAMESPACE = "space"


class Client:
    """A process with a connection of its own."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.process = new_process_id()
        self._drawn = 0

    async def open_job(self) -> JobId:
        job = RegisterJob(
            driver=self.process,
            hostname="host",
            machine_id="machine",
            pid=1,
            entrypoint="program",
            version="1",
            python_version="3.11",
            config=JobConfig(namespace=NAMESPACE),
        )
        answer = await ask(self.bus, SUBJECTS.gcs("register_job"), job)
        assert isinstance(answer, JobRecord)
        return answer.job_id

    def request(self, job: JobId, name: str, *, get_if_exists: bool = False) -> CreateActor:
        self._drawn += 1
        description = ActorDescription(
            actor_id=actor_id(self.process, self._drawn),
            job_id=job,
            owner=self.process,
            owner_key=ObjectKey(0),
            class_name="Counter",
            name=name,
            namespace=NAMESPACE,
            placement={},
            resources={},
        )
        return CreateActor(description=description, spec=b"spec", get_if_exists=get_if_exists)

    async def create(self, request: CreateActor) -> ActorId | None:
        """Return who has the name afterwards; None where it was taken."""
        try:
            record = await ask(self.bus, SUBJECTS.gcs("create_actor"), request)
        except ActorAlreadyExistsError:
            return None
        assert isinstance(record, ActorRecord)
        assert record.state in (ActorState.PENDING_CREATION, ActorState.DEAD)
        return record.description.actor_id

    async def find(self, name: str) -> ActorId | None:
        try:
            record = await ask(self.bus, SUBJECTS.gcs("find_actor"), FindActor(name=name, namespace=NAMESPACE))
        except NotFoundError:
            return None
        assert isinstance(record, ActorRecord)
        assert (record.state, record.description.name) == (ActorState.PENDING_CREATION, name)
        return record.description.actor_id

    async def kill(self, actor: ActorId) -> None:
        await ask(self.bus, SUBJECTS.gcs("kill_actor"), KillActor(actor_id=actor, reason="killed"))


class History:
    """What was done to names, with a counter for a clock: the loop runs one thing at a time."""

    def __init__(self) -> None:
        self.operations: dict[str, list[KeyOperation]] = {name: [] for name in NAMES}
        self._count = 0

    def tick(self) -> int:
        self._count += 1
        return self._count

    async def create(self, client: Client, request: CreateActor) -> None:
        name, mine = request.description.name, request.description.actor_id
        began_at = self.tick()
        holder = await client.create(request)
        result: bytes | bool = holder.encode() if holder is not None and request.get_if_exists else holder == mine
        self.operations[name].append(NameOperation("add", mine.encode(), began_at, self.tick(), result))

    async def find(self, client: Client, name: str) -> ActorId | None:
        began_at = self.tick()
        found = await client.find(name)
        result = (found or "").encode()
        self.operations[name].append(NameOperation("get", b"", began_at, self.tick(), result))
        return found

    async def kill(self, client: Client, name: str, actor: ActorId) -> None:
        began_at = self.tick()
        await client.kill(actor)
        self.operations[name].append(NameOperation("delete", actor.encode(), began_at, self.tick(), True))


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def join(stack: AsyncExitStack, broker: EmbeddedBroker, role: Role, identity: str) -> Bus:
    credentials = broker.credentials[role]
    connection = connect(broker.address, role=role, identity=identity, cluster=CLUSTER, credentials=credentials)
    return await stack.enter_async_context(connection)


async def clients_of_two_replicas(stack: AsyncExitStack, folder: Path, count: int) -> list[Client]:
    broker = await stack.enter_async_context(launch_broker(CLUSTER, store_dir=folder))
    for name in ("one", "two"):
        bus = await join(stack, broker, Role.GCS, name)
        await stack.enter_async_context(serve(bus, ServiceSettings(cluster=CLUSTER)))
    return [Client(await join(stack, broker, Role.PROCESS, f"client-{number}")) for number in range(count)]


@pytest.mark.parametrize("get_if_exists", [False, True])
async def test_of_thirty_simultaneous_creators_of_one_name_exactly_one_wins(
    stack: AsyncExitStack, tmp_path: Path, get_if_exists: bool
) -> None:
    clients = await clients_of_two_replicas(stack, tmp_path, 6)
    job = await clients[0].open_job()
    requests = [clients[number % 6].request(job, "a", get_if_exists=get_if_exists) for number in range(30)]
    holders = await asyncio.gather(*(clients[number % 6].create(requests[number]) for number in range(30)))
    (winner,) = {holder for holder in holders if holder is not None}
    ours = [request.description.actor_id for request in requests]
    assert winner in ours
    assert holders == [winner if get_if_exists or actor == winner else None for actor in ours]
    assert [await client.find("a") for client in clients] == [winner] * 6
    again = [await clients[number % 6].create(requests[number]) for number in range(30)]
    assert again == holders, "the same request again finds the same"


async def test_names_are_taken_found_and_freed_as_if_one_at_a_time(stack: AsyncExitStack, tmp_path: Path) -> None:
    clients = await clients_of_two_replicas(stack, tmp_path, 4)
    job = await clients[0].open_job()
    history = History()

    async def use(client: Client, random: Random) -> None:
        """Do one thing after the other, as two of the threads of a process would."""
        for _ in range(12):
            name = random.choice(NAMES)
            match random.randrange(4):
                case 0 | 1:
                    request = client.request(job, name, get_if_exists=random.random() < 0.5)
                    await history.create(client, request)
                case 2:
                    await history.find(client, name)
                case _:
                    if (holder := await history.find(client, name)) is not None:
                        await history.kill(client, name, holder)

    await asyncio.gather(*(use(clients[number % 4], Random(number)) for number in range(8)))
    for name, operations in history.operations.items():
        assert {"add", "get", "delete"} <= {operation.kind for operation in operations}
        assert is_linearizable(operations), name
