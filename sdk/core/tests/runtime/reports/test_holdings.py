"""What a process tells of the objects it knows, and why it keeps each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal_core.protocol.ids import ActorId, FunctionId, JobId, TaskNumber, object_key
from shoal_core.protocol.records import (
    Borrow,
    Failed,
    KnownObject,
    ObjectsReported,
    Reference,
    ReportObjects,
    Stored,
)
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import Call
from shoal_core.runtime.tasks.actors import Follow
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE, LOCAL, OTHER = node_id(1), process_id(1), process_id(2)


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        lone.reactor.job = JobId("00000001")
        yield lone


def report(lone: LoneRuntime, most: int = 100) -> ObjectsReported:
    lone.sent()
    lone.receive(NODE, ReportObjects(3, most))
    ((peer, told),) = lone.sent(ObjectsReported)
    assert peer == NODE
    assert isinstance(told, ObjectsReported)
    return told


def told_of(lone: LoneRuntime, ref: ObjectRef[Any]) -> KnownObject:
    (known,) = [one for one in report(lone).objects if (one.owner, one.key) == (ref._state.owner, ref._state.key)]
    return known


def submit(lone: LoneRuntime, *args: Any, returns: int = 1) -> list[Any]:
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    return lone.runtime.submit(Call(FunctionId("f" * 32), "work", returns, key, 0, b""), args, {})


async def test_the_largest_are_described_and_all_are_counted(lone: LoneRuntime) -> None:
    refs = [lone.runtime.put(b"x" * size) for size in (10, 3000, 200, 40)]
    told = report(lone, most=2)
    assert (told.inquiry, told.pid, told.job, told.count) == (3, os.getpid(), "00000001", 4)
    assert [one.key for one in told.objects] == [refs[1]._state.key, refs[2]._state.key]
    assert told.objects[0].size_bytes >= 3000
    assert told.inline_bytes > 3250
    assert report(lone, most=0).objects == []
    del refs
    assert report(lone).count == 0


async def test_a_large_value_says_where_it_lies(lone: LoneRuntime) -> None:
    (ref,) = submit(lone)
    lone.reactor.drain()
    task = lone.reactor.tasks[TaskNumber(ref._state.key >> 24)]
    lone.reactor._settle_returns(task, [Stored(node_id(7), "o5", 123_456)], OTHER)
    lone.reactor.finish()
    known = told_of(lone, ref)
    assert (known.size_bytes, known.node, known.segment) == (123_456, node_id(7), "o5")
    assert known.status == "FINISHED"


async def test_the_status_is_that_of_the_task(lone: LoneRuntime) -> None:
    (first,) = submit(lone)
    (second,) = submit(lone, first)
    put = lone.runtime.put(1)
    assert told_of(lone, first).status == "PENDING_NODE_ASSIGNMENT"
    assert told_of(lone, second).status == "PENDING_ARGS_AVAIL"
    assert told_of(lone, put).status == "NIL"
    assert told_of(lone, first).size_bytes == -1
    lone.reactor.fail(lone.reactor.tasks[TaskNumber(first._state.key >> 24)], Failed("system", "no"))
    lone.reactor.finish()
    assert told_of(lone, first).status == "FAILED"
    assert told_of(lone, second).status == "FAILED"


async def test_users_own_references_and_those_of_tasks_and_values_are_told_apart(lone: LoneRuntime) -> None:
    runtime = lone.runtime
    mine, used, both, inside, kept = (runtime.put(index) for index in range(5))
    pending = submit(lone, used, [both])
    container = runtime.put([inside, inside])
    runtime.pin(kept)
    assert told_of(lone, mine).reasons == ["LOCAL_REFERENCE"]
    assert told_of(lone, used).reasons == ["USED_BY_PENDING_TASK", "LOCAL_REFERENCE"]
    assert told_of(lone, kept).reasons == ["KEPT_FOR_JOB", "LOCAL_REFERENCE"]
    states = [one._state for one in (used, both, inside, kept)]
    del used, both, inside, kept
    reasons = {one.key: one.reasons for one in report(lone).objects}
    assert [reasons[state.key] for state in states] == [
        ["USED_BY_PENDING_TASK"],
        ["USED_BY_PENDING_TASK"],
        ["CAPTURED_IN_OBJECT"],
        ["KEPT_FOR_JOB"],
    ]
    assert told_of(lone, container).reasons == ["LOCAL_REFERENCE"]
    del pending


async def test_what_running_tasks_were_given_is_told(lone: LoneRuntime) -> None:
    given = [lone.runtime.put(1)]
    lone.runtime.holdings.in_use = lambda: [given]
    assert [one.reasons for one in report(lone).objects] == [["USED_BY_PENDING_TASK"]]


async def test_borrowers_are_counted_also_where_nothing_else_holds_the_object(lone: LoneRuntime) -> None:
    ref = lone.runtime.put(1)
    lone.receive(OTHER, Borrow(ref._state.key))
    assert (told_of(lone, ref).reasons, told_of(lone, ref).borrowers) == (["LOCAL_REFERENCE", "BORROWED"], 1)
    del ref
    (known,) = report(lone).objects
    assert (known.reasons, known.borrowers) == (["BORROWED"], 1)


async def test_an_object_behind_a_handle_says_so(lone: LoneRuntime) -> None:
    ref = lone.runtime.token()
    lone.runtime.command(Follow(ActorId("a" * 32), "actor", True, ref._state, True, False))
    assert told_of(lone, ref).reasons == ["ACTOR_HANDLE"]


async def test_anothers_object_is_told_with_its_owner(lone: LoneRuntime) -> None:
    key = object_key(TaskNumber(4), 0)
    (ref,) = lone.reactor.sharing.adopt([Reference(OTHER, key)], OTHER)
    known = told_of(lone, ref)
    assert (known.owner, known.key, known.size_bytes, known.status) == (OTHER, key, -1, "NIL")
