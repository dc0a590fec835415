"""What a process tells of a task of its own: how far it is, what it waits for, and behind how many others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from shoal_core.protocol.ids import FunctionId, JobId, LeaseId, TaskNumber
from shoal_core.protocol.records import Failed, LeaseGranted, ReportTask, TaskReported
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import Call
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE, LOCAL, WORKER = node_id(1), process_id(1), process_id(2)


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        lone.reactor.job = JobId("00000001")
        yield lone


def submit(lone: LoneRuntime, *args: Any) -> ObjectRef[Any]:
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    (ref,) = lone.runtime.submit(Call(FunctionId("f" * 32), "work", 1, key, 0, b""), args, {})
    lone.reactor.drain()
    return ref  # type: ignore[no-any-return]


def number(ref: ObjectRef[Any]) -> TaskNumber:
    return TaskNumber(ref._state.key >> 24)


def told_of(lone: LoneRuntime, ref: ObjectRef[Any]) -> TaskReported:
    lone.sent()
    lone.receive(NODE, ReportTask(3, number(ref)))
    ((peer, told),) = lone.sent(TaskReported)
    assert peer == NODE
    assert isinstance(told, TaskReported)
    assert told.inquiry == 3
    return told


async def test_a_queued_task_has_its_place_and_its_key(lone: LoneRuntime) -> None:
    refs = [submit(lone) for _ in range(3)]
    (key,) = lone.reactor.submission.waiting()
    for before, ref in enumerate(refs):
        assert told_of(lone, ref) == TaskReported(3, "PENDING_NODE_ASSIGNMENT", "work", key.index, before)


async def test_a_task_waits_for_the_arguments_that_are_not_ready(lone: LoneRuntime) -> None:
    first, ready = submit(lone), lone.runtime.put(1)
    second = submit(lone, first, ready, first)
    told = told_of(lone, second)
    assert (told.state, told.missing, told.missing_count) == ("PENDING_ARGS_AVAIL", [(LOCAL, first._state.key)], 1)


async def test_a_task_that_was_sent_runs_or_waits_at_the_process(lone: LoneRuntime) -> None:
    first, second = submit(lone), submit(lone)
    (key,) = lone.reactor.submission.waiting()
    key.seconds["f" * 32] = 0.0001  # short enough to send both at once
    lone.receive(NODE, LeaseGranted(LeaseId(1), key.index, next(iter(key.slots)), WORKER))
    told = told_of(lone, first)
    assert (told.state, told.process, told.before, told.leases) == ("SUBMITTED_TO_WORKER", WORKER, 0, 1)
    assert told_of(lone, second).before == 1


async def test_of_a_task_that_has_ended_nothing_is_known(lone: LoneRuntime) -> None:
    ref = submit(lone)
    lone.reactor.fail(lone.reactor.tasks[number(ref)], Failed("system", "no"))
    lone.reactor.finish()
    assert told_of(lone, ref) == TaskReported(3, "NIL")
