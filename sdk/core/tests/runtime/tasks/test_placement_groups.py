"""What a process says to the control store about placement groups, and what it makes of the answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import InvalidRequestError, NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.groups import (
    CreateGroup,
    GetGroup,
    GroupChanged,
    GroupDescription,
    GroupRecord,
    GroupState,
    RemoveGroup,
    changed,
)
from shoal_core.protocol.ids import FunctionId, JobId, LeaseId, PlacementGroupId, creator_of, group_id
from shoal_core.protocol.messages import Done
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.records import Failed, InGroup, LeaseGranted, Task, WorkerLost
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode, pack
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import Call, Runtime
from shoal_core.runtime.tasks import placement_groups
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import inline, node_id, process_id
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import RecordedPeers

SUBJECTS = Subjects("test")
LOCAL, NODE, WORKER, OTHER = process_id(1), node_id(2), process_id(3, node=2), process_id(4)
JOB = JobId("00000001")


class World:
    """A process, and a control store that keeps what it is asked for."""

    def __init__(self, runtime: Runtime, store: Bus, peers: RecordedPeers) -> None:
        self.runtime = runtime
        self.reactor = runtime.reactor
        self.peers = peers
        self.records: dict[PlacementGroupId, GroupRecord] = {}
        self.heard: list[str] = []
        self.placed_first: list[bool] = []
        self.errors: list[ShoalError] = []
        """What the control store answers first, in place of what it should."""
        self.holds = asyncio.Event()
        """While it is not set, nobody is answered."""
        self.holds.set()
        self._store = store
        for verb in ("create_group", "get_group", "remove_group"):
            store.subscribe(SUBJECTS.gcs(verb), self._hear)

    def _hear(self, message: Message) -> None:
        verb = message.subject.rsplit(".", 1)[1]
        self.heard.append(verb)
        self._store.spawn(self._answer(verb, message))

    async def _answer(self, verb: str, message: Message) -> None:
        await self.holds.wait()
        packed = message.data.startswith(b"[")
        requests = [msgspec.json.encode(request) for request in msgspec.json.decode(message.data)] if packed else []
        answers = [
            self.errors.pop(0) if self.errors else self._carry_out(verb, data) for data in requests or [message.data]
        ]
        if message.reply:
            self._store.publish(message.reply, pack([encode(answer) for answer in answers]))

    def _carry_out(self, verb: str, data: bytes) -> GroupRecord | GroupChanged | Done | ShoalError:
        if verb == "create_group":
            request = decode(CreateGroup, data)
            about = request.description
            self.placed_first.append(request.placed_first)
            record = GroupRecord(description=about, state=GroupState.PENDING, nodes=[None], created_at=1.0)
            return changed(self.records.setdefault(about.group_id, record))
        if verb == "remove_group":
            removal = decode(RemoveGroup, data)
            self.change(removal.group_id, GroupState.REMOVED, removal.reason)
            return Done()
        group = decode(GetGroup, data).group_id
        return self.records.get(group) or NotFoundError(f"there is no placement group {group}")

    def change(self, group: PlacementGroupId, state: GroupState, reason: str = "", *, told: bool = True) -> None:
        record = self.records[group]
        attempt = record.attempt + (state is GroupState.CREATED)
        self.records[group] = record.model_copy(update={"state": state, "attempt": attempt, "reason": reason})
        if told:
            self._store.publish(
                SUBJECTS.groups_changed("store", creator_of(group)), encode(changed(self.records[group]))
            )

    def make(self) -> PlacementGroupId:
        group = self.runtime.new_group()
        self.runtime.make_group(
            GroupDescription(group_id=group, job_id=JOB, owner=LOCAL, bundles=[{"CPU": 10_000}], selectors=[])
        )
        return group

    def ready(self, group: PlacementGroupId) -> ObjectRef[object]:
        return self.runtime.await_group(group, inline(b"the group"))

    def submit(self, group: PlacementGroupId) -> ObjectRef[object]:
        key = self.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),), Bundle(group, 0)))
        call = Call(FunctionId("f" * 32), "f", 1, key, 3, b"", in_group=InGroup(group, captures=True))
        (ref,) = self.runtime.submit(call, (), {})
        self.reactor.drain()
        return ref  # type: ignore[no-any-return]

    def lease(self, ref: ObjectRef[object]) -> Task:
        """Grant the lease that the task of a reference waits for; return what is sent to the worker."""
        (key,) = self.reactor.submission.waiting()
        granted = LeaseGranted(LeaseId(1), key.index, next(iter(key.slots)), WORKER)
        self.reactor.deliver(NODE, [granted])
        task = self.peers.sent[-1][1]
        assert isinstance(task, Task)
        return task


def failed(ref: ObjectRef[object]) -> Failed:
    value = ref._state.value
    assert isinstance(value, Failed)
    return value


@asynccontextmanager
async def connected() -> AsyncIterator[World]:
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.GCS, identity="store", cluster="test") as store,
        broker.connect(role=Role.PROCESS, identity=LOCAL, cluster="test") as bus,
    ):
        runtime = Runtime(bus, SUBJECTS, LOCAL, None, "memory")
        peers = RecordedPeers()
        runtime.reactor.peers = peers  # type: ignore[assignment]
        try:
            yield World(runtime, store, peers)
        finally:
            runtime.close()


async def test_a_group_is_made_and_waited_for_without_being_asked_about() -> None:
    async with connected() as world:
        group = world.make()
        ref = world.ready(group)
        await until(lambda: group in world.records)
        assert ref._state.value is None
        world.change(group, GroupState.CREATED)
        await until(lambda: ref._state.value == inline(b"the group"))
        later = world.ready(group)
        await until(lambda: later._state.value == inline(b"the group"))
        assert world.heard == ["create_group"]


async def test_what_is_made_and_removed_in_one_turn_is_told_in_packets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_groups, "PAUSE_SECONDS", 0.001)
    async with connected() as world:
        world.holds.clear()
        groups = [world.make() for _ in range(3)]
        refs = [world.ready(group) for group in groups]
        await until(lambda: world.heard == ["create_group"])
        world.errors = [ServiceError("busy"), InvalidRequestError("too large")]
        world.holds.set()
        await until(lambda: world.heard == ["create_group"] * 2)
        await until(lambda: refs[1]._state.value is not None)
        assert "it could not be made: too large" in failed(refs[1]).text
        for group in (groups[0], groups[2]):
            world.change(group, GroupState.CREATED)
        await until(lambda: all(refs[index]._state.value == inline(b"the group") for index in (0, 2)))
        for group in groups:
            world.runtime.remove_group(group, "it was removed")
        await until(lambda: all(world.records[group].state is GroupState.REMOVED for group in groups))
        await world.reactor.groups.told(1.0)
        assert world.heard == ["create_group"] * 2 + ["remove_group"]


async def test_another_processs_group_is_asked_about_once() -> None:
    async with connected() as world:
        group = group_id(OTHER, 1)
        about = GroupDescription(group_id=group, job_id=JOB, owner=OTHER, bundles=[{"CPU": 10_000}], selectors=[])
        world.records[group] = GroupRecord(description=about, state=GroupState.CREATED, nodes=[NODE], created_at=1.0)
        refs = [world.ready(group) for _ in range(3)]
        await until(lambda: all(ref._state.value is not None for ref in refs))
        assert world.heard == ["get_group"]


async def test_who_waits_for_a_group_that_it_has_removed_is_told_so_whatever_else_comes_late() -> None:
    async with connected() as world:
        group = world.make()
        await until(lambda: group in world.records)
        world.change(group, GroupState.CREATED)
        await until(lambda: world.runtime.group_is_created(group))
        world.holds.clear()
        world.runtime.remove_group(group, "it was removed")
        ref = world.ready(group)
        await until(lambda: world.heard[-1] == "remove_group")
        world.change(group, GroupState.CREATED)
        await asyncio.sleep(0.05)
        assert ref._state.value is None
        world.holds.set()
        await until(lambda: ref._state.value is not None)
        assert failed(ref).code == "task_group_removed"


async def test_removing_waits_for_making_and_asking_for_both() -> None:
    async with connected() as world:
        world.holds.clear()
        group = world.make()
        ref = world.ready(group)
        world.runtime.remove_group(group, "it was removed")
        await until(lambda: world.heard == ["create_group", "create_group"])
        asking = asyncio.ensure_future(world.reactor.groups.ask("get_group", GetGroup(group_id=group), 10.0))
        world.holds.set()
        answer = await asking
        assert isinstance(answer, GroupRecord)
        assert answer.state is GroupState.REMOVED
        assert [verb for verb in world.heard if verb != "get_group"] == ["create_group"] * 2 + ["remove_group"]
        assert world.placed_first == [True, False], "who waits for it cannot wait for its places"
        await until(lambda: ref._state.value is not None)
        assert failed(ref) == Failed("task_group_removed", f"Placement group {group} is no more: it was removed.")


async def test_a_group_that_is_refused_is_an_error_of_what_waits_for_it() -> None:
    async with connected() as world:
        world.errors = [InvalidRequestError("there are too many bundles")]
        ref = world.ready(world.make())
        await until(lambda: ref._state.value is not None)
        assert "it could not be made: there are too many bundles" in failed(ref).text


async def test_a_control_store_that_fails_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_groups, "PAUSE_SECONDS", 0.001)
    async with connected() as world:
        world.errors = [ServiceError("the store is full")] * 2
        group = world.make()
        await until(lambda: group in world.records)
        world.errors = [ServiceError("the store is full")] * 2
        world.runtime.remove_group(group, "it was removed")
        await until(lambda: world.records[group].state is GroupState.REMOVED)
        await world.reactor.groups.told(1.0)
        assert world.heard == ["create_group"] * 3 + ["remove_group"] * 3


async def test_queued_tasks_of_a_group_that_is_removed_fail() -> None:
    async with connected() as world:
        group = world.make()
        await until(lambda: group in world.records)
        refs = [world.submit(group) for _ in range(3)]
        world.change(group, GroupState.REMOVED, "its job has ended")
        await until(lambda: all(ref._state.value is not None for ref in refs))
        assert {failed(ref).code for ref in refs} == {"task_group_removed"}
        assert failed(refs[0]).text == (
            f"Task f() cannot run: its placement group {group} is no more: its job has ended."
        )
        late = world.submit(group)
        await until(lambda: late._state.value is not None)
        assert failed(late).code == "task_group_removed"


async def test_a_task_that_is_killed_with_its_group_is_not_tried_again() -> None:
    async with connected() as world:
        group = world.make()
        ref = world.submit(group)
        task = world.lease(ref)
        assert task.in_group == InGroup(group, captures=True)
        lost = WorkerLost(LeaseId(1), 1, f"its placement group {group} was removed", group_removed=True)
        world.reactor.deliver(NODE, [lost])
        await until(lambda: ref._state.value is not None)
        assert failed(ref) == Failed(
            "task_group_removed", f"Task f() was ended: its placement group {group} was removed."
        )


async def test_after_a_reconnect_a_group_that_is_waited_for_is_looked_up_again() -> None:
    async with connected() as world:
        group = world.make()
        ref = world.ready(group)
        await until(lambda: group in world.records)
        await world.reactor.groups.told(1.0)
        world.change(group, GroupState.CREATED, told=False)
        world.reactor.reread()
        await until(lambda: ref._state.value is not None)
        assert world.heard == ["create_group", "get_group"]


async def test_what_is_dropped_is_not_heard_of() -> None:
    async with connected() as world:
        group = world.make()
        await until(lambda: group in world.records)
        ref = world.ready(group)
        world.reactor.drain()
        world.runtime.remove_group(group, "it was removed")
        del ref
        world.reactor.drain()
        assert not world.reactor.groups.core.knows(group)
        assert world.reactor.groups._heard == {}
