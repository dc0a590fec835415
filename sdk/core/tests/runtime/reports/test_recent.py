"""What a process tells of tasks: those that it owns, runs and has run, and what it leaves behind."""

from __future__ import annotations

import pickle
import time
from collections.abc import AsyncIterator

import pytest

from shoal_core.protocol.ids import ActorId, FunctionId, JobId, PlacementGroupId, TaskNumber, task_id_bytes
from shoal_core.protocol.records import Failed, InGroup, KnownTask, ReportTasks, Stored, Task, TasksReported
from shoal_core.runtime.reports.recent import MOST_REMEMBERED
from shoal_core.runtime.runtime import Call
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.runtime.worker.work import Accepted, Ended
from shoal_core.testing.builders import inline, node_id, process_id, task
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE, LOCAL, OWNER = node_id(1), process_id(1), process_id(2)


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        lone.reactor.job = JobId("00000001")
        yield lone


def submit(lone: LoneRuntime) -> None:
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    lone.runtime.submit(Call(FunctionId("f" * 32), "work", 1, key, 0, b""), (), {})
    lone.reactor.drain()


def run(
    lone: LoneRuntime, number: int, error: Failed | None = None, *, begun: bool = True, one: Task | None = None
) -> Ended:
    """Have a task of another process end here that took a second."""
    accepted = Accepted(one or task(number), OWNER, [], number)
    accepted.began_at = time.perf_counter() - 1.0 if begun else 0.0
    ended = Ended(accepted, [error or inline()], [], 1.0 * begun, False)
    lone.runtime.recent.ran(ended)
    return ended


def told(lone: LoneRuntime, most: int = 100) -> list[KnownTask]:
    lone.sent()
    lone.receive(NODE, ReportTasks(3, most))
    ((peer, report),) = lone.sent(TasksReported)
    assert (peer, report.inquiry, report.job) == (NODE, 3, "00000001")
    return list(report.tasks)


async def test_what_ran_here_is_told_with_its_times_the_newest_first(lone: LoneRuntime) -> None:
    run(lone, 1)
    where = 'work() (pid=1, ip=127.0.0.1)\nTraceback (most recent call last):\n  File "f.py", line 1, in work\n'
    run(lone, 2, Failed("task", where + f"ValueError: {'no good ' * 100}\n", b"the exception"))
    run(lone, 3, Failed("task_cancelled", "it was cancelled\nby its owner"), begun=False)
    cancelled, failed, finished = told(lone)
    assert (finished.owner, finished.number, finished.state) == (OWNER, 1, "FINISHED")
    assert abs(finished.ended_at - finished.began_at - 1.0) < 0.001
    assert abs(time.time() - 1.0 - finished.began_at) < 60
    assert (failed.state, failed.code, len(failed.text)) == ("FAILED", "task", 100)
    assert failed.text.startswith("ValueError: no good"), "that is what a traceback ends with"
    assert cancelled.text == "it was cancelled"
    assert (cancelled.state, cancelled.code, cancelled.began_at) == ("FAILED", "task_cancelled", 0.0)
    assert abs(time.time() - cancelled.ended_at) < 60


async def test_whoever_ran_a_task_tells_what_it_calls_and_who_submitted_it_when(lone: LoneRuntime) -> None:
    recent = lone.runtime.recent
    recent.resources = lambda task: {"CPU": 5_000}
    lone.runtime.functions.load(lone.reactor.job, FunctionId("f" * 32), pickle.dumps((repr, 0)))
    one = task(1)
    one.created_at, one.parent, one.parent_owner = 7.0, TaskNumber(4), OWNER
    one.in_group = InGroup(PlacementGroupId("d" * 32), captures=False)
    run(lone, 1, one=one)
    recent.running = lambda: [Accepted(one, OWNER, [], 2, began_at=time.perf_counter())]
    for known in told(lone):
        assert (known.name, known.function, known.created_at, known.resources) == ("test", "repr", 7.0, {"CPU": 5_000})
        assert (known.parent, known.group) == (task_id_bytes(OWNER, TaskNumber(4)).hex(), "d" * 32)
    recent.running = list
    one.parent, one.parent_owner, one.name = TaskNumber(0), "a" * 32, "repr"
    run(lone, 1, one=one)
    (last, _) = told(lone)
    assert (last.function, last.parent) == ("", "a" * 32), "an actor submitted it outside of any call"


async def test_a_task_that_goes_back_to_its_owner_has_not_ended(lone: LoneRuntime) -> None:
    ended = Ended(Accepted(task(1), OWNER, [], 1), [], [], 0.0, False, missing=[Stored(NODE, "o1", 1)])
    lone.runtime.recent.ran(ended)
    assert told(lone) == []


async def test_what_runs_is_told_and_what_waits_here_is_left_to_its_owner(lone: LoneRuntime) -> None:
    waits, runs = Accepted(task(1), OWNER, [], 1), Accepted(task(2), OWNER, [], 2, began_at=time.perf_counter())
    lone.runtime.recent.running = lambda: [waits, runs]
    (running,) = told(lone)
    assert (running.number, running.state, running.ended_at) == (2, "RUNNING", 0.0)


async def test_of_its_own_tasks_a_process_tells_how_far_they_are_and_which_were_never_run_to_their_end(
    lone: LoneRuntime,
) -> None:
    submit(lone)
    (own,) = told(lone)
    assert (own.owner, own.name, own.state) == ("", "work", "PENDING_NODE_ASSIGNMENT")
    assert (own.resources, own.parent, own.ended_at) == ({"CPU": 10_000}, "", 0.0)
    assert abs(time.time() - own.created_at) < 60
    (pending,) = lone.reactor.tasks.values()
    lone.reactor.fail(pending, Failed("task_unschedulable", "there is no such node"))
    (own,) = told(lone)
    assert (own.owner, own.state, own.code, own.text) == ("", "FAILED", "task_unschedulable", "there is no such node")
    assert own.ended_at >= own.created_at


async def test_the_making_of_an_actor_is_told_and_what_its_process_runs_is_its(lone: LoneRuntime) -> None:
    recent = lone.runtime.recent
    recent.actor = ActorId("a" * 32)
    recent.made("Counter.__init__", 2, time.perf_counter() - 1.0, "")
    run(lone, 2)
    assert told(lone)[0].actor == "", "its process ran that before it was given to the actor"
    run(lone, 1)
    call, _, made = told(lone)
    assert (made.number, made.attempt, made.name, made.state) == (0, 2, "Counter.__init__", "FINISHED")
    assert call.actor == made.actor == "a" * 32
    recent.made("Counter.__init__", 3, time.perf_counter(), "it raised")
    assert (told(lone)[0].state, told(lone)[0].text) == ("FAILED", "it raised")


async def test_no_more_is_remembered_or_told_than_there_is_room_for(lone: LoneRuntime) -> None:
    for number in range(1, MOST_REMEMBERED + 10):
        run(lone, number)
    submit(lone)
    assert len(told(lone, 4000)) == MOST_REMEMBERED + 1
    tasks = told(lone, 10)
    assert [one.number for one in tasks[:5]] == [*range(MOST_REMEMBERED + 9, MOST_REMEMBERED + 4, -1)]
    assert [one.state for one in tasks[5:]] == ["PENDING_NODE_ASSIGNMENT"]
    assert told(lone, 0) == []


async def test_a_process_that_leaves_leaves_what_it_has_run_with_its_node(lone: LoneRuntime) -> None:
    run(lone, 1)
    run(lone, 3)
    lone.runtime.recent.leave(NODE)
    ((peer, left),) = lone.sent(TasksReported)
    assert (peer, left.inquiry, [one.number for one in left.tasks]) == (NODE, 0, [3, 1])
    lone.receive(NODE, ReportTasks(0, 1))
    ((peer, left),) = lone.sent(TasksReported)
    assert (peer, left.inquiry, [one.number for one in left.tasks]) == (NODE, 0, [3])


async def test_what_has_not_ended_when_a_process_has_to_leave_counts_as_failed(lone: LoneRuntime) -> None:
    submit(lone)
    runs = Accepted(task(8), OWNER, [], 2, began_at=time.perf_counter())
    lone.runtime.recent.running = lambda: [runs]
    lone.runtime.recent.leave(NODE)
    ((_, left),) = lone.sent(TasksReported)
    assert [(one.owner, one.state, one.code) for one in left.tasks] == [
        (OWNER, "FAILED", "worker_crashed"),
        ("", "FAILED", "worker_crashed"),
    ]
    assert all(abs(time.time() - one.ended_at) < 60 for one in left.tasks)
