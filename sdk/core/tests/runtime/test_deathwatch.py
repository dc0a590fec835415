"""Whom a process takes for dead: what it is told, and what it asks when it may have missed that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker, MemoryBus
from shoal_core.protocol import messages
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import JobId, ProcessId, node_of
from shoal_core.protocol.messages import (
    JobConfig,
    JobFinished,
    JobList,
    JobRecord,
    JobState,
    NodeDied,
    ProcessDied,
    ProcessList,
)
from shoal_core.protocol.records import Unborrow
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.deathwatch import watching_deaths
from shoal_core.testing.builders import node_record, process_id, put_key
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

SUBJECTS = Subjects("test")
LOCAL, BESIDE, ELSEWHERE, NODELESS = process_id(1), process_id(2), process_id(3, node=2), process_id(4, node=0)


def job(driver: ProcessId, state: JobState) -> JobRecord:
    return JobRecord(
        job_id=JobId("00000001"),
        driver=driver,
        hostname="host",
        machine_id="machine",
        pid=1,
        entrypoint="python",
        config=JobConfig(namespace="test"),
        state=state,
        started_at=1.0,
    )


class World:
    """A process that spoke with three others, and the services that tell of them and are asked about them."""

    def __init__(self, broker: MemoryBroker, lone: LoneRuntime, store: Bus, node: Bus) -> None:
        self.reactor = lone.reactor
        self.peers = lone.peers
        self.jobs: list[JobRecord] = []
        self.alive = [LOCAL, BESIDE, ELSEWHERE]
        self.is_node_known = True
        self.asked: list[str] = []
        self._broker = broker
        self._bus = lone.runtime.bus
        self._store = store
        self._node = node
        for other in (BESIDE, ELSEWHERE, NODELESS):
            self.peers.send(other, Unborrow(put_key(1), 1))
        store.subscribe(SUBJECTS.gcs("get_node"), self._get_node)
        store.subscribe(SUBJECTS.gcs("list_jobs"), self._list_jobs)
        for home in (node_of(BESIDE), node_of(ELSEWHERE)):
            node.subscribe(SUBJECTS.node_from_process(home, "processes"), self._processes)

    def _get_node(self, message: Message) -> None:
        self.asked.append("node")
        answer = node_record(node_of(LOCAL)) if self.is_node_known else NotFoundError("there is no such node")
        self._store.publish(message.reply, encode(answer))

    def _list_jobs(self, message: Message) -> None:
        self.asked.append("jobs")
        self._store.publish(message.reply, encode(JobList(jobs=self.jobs)))

    def _processes(self, message: Message) -> None:
        self.asked.append("processes")
        self._node.publish(message.reply, encode(ProcessList(sequence=9, processes=self.alive)))

    def tell_death(self, process: ProcessId, sequence: int) -> None:
        event = ProcessDied(sequence=sequence, process_id=process, reason="it was killed")
        self._node.publish(SUBJECTS.event(Role.NODE, node_of(process), "process_died"), encode(event))

    def tell(self, kind: str, event: messages.Message) -> None:
        self._store.publish(SUBJECTS.event(Role.GCS, "store", kind), encode(event))

    async def until_silence_ends(self, process: ProcessId) -> None:
        """Suspect a process again and again, as channels do, until it is dead."""
        while process not in self.peers.forgotten:
            self.fall_silent(process)
            await asyncio.sleep(0.001)
        assert self.peers.forgotten == {process}

    def fall_silent(self, process: ProcessId) -> None:
        for listener in self.peers.silence_listeners:
            listener(process, 3.0)

    def cut_off(self) -> None:
        assert isinstance(self._bus, MemoryBus)
        self._broker.disconnect(self._bus)
        self._broker.reconnect(self._bus)

    async def until_forgotten(self, *processes: ProcessId) -> None:
        await until(lambda: set(processes) <= self.peers.forgotten)
        assert self.peers.forgotten == set(processes)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with connected() as one:
        yield one


@asynccontextmanager
async def connected() -> AsyncIterator[World]:
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.GCS, identity="store", cluster="test") as store,
        broker.connect(role=Role.NODE, identity=node_of(LOCAL), cluster="test") as node,
        lone_runtime(LOCAL, broker=broker) as lone,
    ):
        world = World(broker, lone, store, node)
        with watching_deaths(lone.runtime):
            yield world


async def test_a_death_that_is_told_is_believed_and_nothing_asked(world: World) -> None:
    world.tell_death(BESIDE, 1)
    await world.until_forgotten(BESIDE)
    assert world.asked == []


async def test_after_a_gap_the_node_is_asked_who_lives(world: World) -> None:
    world.alive = [LOCAL]
    world.tell_death(process_id(7), 1)
    world.tell_death(process_id(8), 3)
    await world.until_forgotten(process_id(7), process_id(8), BESIDE)
    assert world.asked == ["node", "processes"]


async def test_a_driver_is_gone_with_its_job_on_a_node_or_without_one(world: World) -> None:
    for driver in (BESIDE, NODELESS):
        finished = JobFinished(job_id=JobId("00000001"), driver=driver, state=JobState.SUCCEEDED, message="")
        world.tell("job_finished", finished)
    without = JobFinished(job_id=JobId("00000002"), driver=ProcessId(""), state=JobState.SUCCEEDED, message="")
    world.tell("job_finished", without)  # that of a detached actor
    await world.until_forgotten(BESIDE, NODELESS)
    assert world.asked == []


async def test_a_node_that_is_declared_dead_takes_its_processes_along(world: World) -> None:
    world.tell("node_died", NodeDied(node_id=node_of(ELSEWHERE), reason="it was silent"))
    await world.until_forgotten(ELSEWHERE, node_of(ELSEWHERE))  # type: ignore[arg-type]


async def test_of_a_silent_process_its_node_is_asked(world: World) -> None:
    world.fall_silent(ELSEWHERE)
    await until(lambda: world.asked == ["node", "processes"])
    world.alive = [LOCAL, BESIDE]
    await world.until_silence_ends(ELSEWHERE)


async def test_a_node_that_nobody_knows_is_dead(world: World) -> None:
    world.is_node_known = False
    world.fall_silent(ELSEWHERE)
    await world.until_forgotten(ELSEWHERE, node_of(ELSEWHERE))  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [None, JobState.RUNNING])
async def test_of_a_silent_driver_without_a_node_its_job_is_asked(world: World, state: JobState | None) -> None:
    world.jobs = [] if state is None else [job(NODELESS, state)]
    world.fall_silent(NODELESS)
    await until(lambda: world.asked == ["jobs"])
    await asyncio.sleep(0)
    assert not world.reactor.is_dead(NODELESS), "its job runs, or the replica has not heard of it yet"
    world.jobs = [job(NODELESS, JobState.FAILED)]
    await world.until_silence_ends(NODELESS)


async def test_after_a_reconnect_all_are_asked_about(world: World) -> None:
    world.alive = [LOCAL]
    world.jobs = [job(NODELESS, JobState.FAILED)]
    world.cut_off()
    await world.until_forgotten(BESIDE, ELSEWHERE, NODELESS)
    assert sorted(world.asked) == ["jobs", "node", "node", "processes", "processes"]
