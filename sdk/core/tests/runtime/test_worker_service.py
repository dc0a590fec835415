"""The I/O thread's side of a worker, with channels that only record, and a main thread played by the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shoal_core.protocol.ids import JobId, LeaseId, ProcessId, TaskNumber, object_key
from shoal_core.protocol.records import (
    Borrow,
    Borrowed,
    LeaseAssigned,
    ProcessUnneeded,
    Reference,
    Task,
    TaskDone,
    TasksReturned,
    Unborrow,
    WorkerBlocked,
)
from shoal_core.runtime.worker.execution import BegunPage, Execution
from shoal_core.runtime.worker.process import Service
from shoal_core.runtime.worker.work import Accepted, Awaits, Ended, Running, begin, current
from shoal_core.testing.builders import inline, node_id, process_id, put_key, task
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE = node_id(1)
WORKER = process_id(1)
OWNER = process_id(2)
THIRD = process_id(3)


class Worker(LoneRuntime):
    """A worker process whose tasks begin and end when the test says so."""

    def __init__(self, lone: LoneRuntime, page: Path) -> None:
        super().__init__(lone.runtime, lone.peers)
        self.execution = Execution(lone.runtime, BegunPage(page), page.parent)
        Service(lone.runtime, self.execution)

    def assign(self, lease: int = 1, owner: ProcessId = OWNER) -> None:
        self.receive(NODE, LeaseAssigned(LeaseId(lease), owner, JobId("00000001"), {}))
        item = self.execution.queue.get_nowait()
        assert isinstance(item, LeaseAssigned)

    def begin(self) -> Accepted:
        """Begin the next task, as the main thread does."""
        accepted = self.execution.queue.get_nowait()
        assert isinstance(accepted, Accepted)
        self.execution.running = accepted
        current.set(Running(accepted.task, accepted.owner, accepted.order, None, ""))
        return accepted

    def end(self, accepted: Accepted, *, exhausted: bool = False) -> None:
        """End the running task, as the main thread does; the I/O thread does not notice yet."""
        self.execution.running = None
        current.set(None)
        self.runtime.ended(Ended(accepted, [inline()], [], 0.001, False, exhausted))

    def block(self, blocked: bool) -> None:
        """Enter or leave a wait on the main thread."""
        assert self.runtime.getting.blocked is not None
        self.runtime.getting.blocked(blocked)


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    page = tmp_path / "begun"
    page.write_bytes(bytes(4096))
    async with lone_runtime(WORKER) as lone:
        yield Worker(lone, page)
        current.set(None)


def numbered(number: int, *, lease: int = 1, contained: list[Reference] | None = None) -> Task:
    record = task(number, arguments=inline(contained=contained or []))
    record.lease = LeaseId(lease)
    return record


async def test_a_task_is_answered_by_its_result(worker: Worker) -> None:
    worker.assign()
    worker.receive(OWNER, numbered(1))
    worker.end(worker.begin())
    [(peer, done)] = worker.sent()
    assert peer == OWNER
    assert isinstance(done, TaskDone)
    assert done.number == 1


async def test_a_worker_that_waits_gives_back_what_it_has_not_begun_and_takes_nothing_more(worker: Worker) -> None:
    worker.assign()
    worker.receive(OWNER, numbered(1), numbered(2))
    accepted = worker.begin()
    worker.block(True)
    assert worker.sent() == [
        (NODE, WorkerBlocked(LeaseId(1), True)),
        (OWNER, WorkerBlocked(LeaseId(1), True)),
        (OWNER, TasksReturned(LeaseId(1), [accepted.task.number + 1], True)),  # type: ignore[list-item]
    ]
    worker.receive(OWNER, numbered(3))
    assert worker.sent(TasksReturned) == [(OWNER, TasksReturned(LeaseId(1), [numbered(3).number], True))]
    worker.block(False)
    worker.end(accepted)
    assert [type(record) for _, record in worker.sent()] == [WorkerBlocked, WorkerBlocked, TaskDone]
    worker.receive(OWNER, numbered(4))
    assert worker.begin().task.number == 4


async def test_a_wait_that_ends_just_before_its_task_is_over(worker: Worker) -> None:
    """The I/O thread hears of all three at once, when the main thread is idle already."""
    worker.assign()
    worker.receive(OWNER, numbered(1))
    accepted = worker.begin()
    worker.block(True)
    worker.sent()
    worker.block(False)
    worker.end(accepted)
    assert [type(record) for _, record in worker.sent()] == [WorkerBlocked, WorkerBlocked, TaskDone]
    worker.receive(OWNER, numbered(2))
    assert worker.sent(TasksReturned) == []


async def test_a_wait_that_was_over_before_it_was_noticed_disturbs_nobody_for_long(worker: Worker) -> None:
    worker.assign()
    worker.receive(OWNER, numbered(1))
    accepted = worker.begin()
    worker.block(True)
    worker.block(False)
    worker.end(accepted)
    told = [record.blocked for peer, record in worker.sent(WorkerBlocked) if peer == OWNER]
    assert told in ([], [True, False])
    worker.receive(OWNER, numbered(2))
    assert worker.begin().task.number == 2


async def test_a_worker_is_blocked_while_any_thread_of_its_task_waits(worker: Worker) -> None:
    worker.assign()
    worker.receive(OWNER, numbered(1))
    worker.begin()
    worker.block(True)
    worker.block(True)
    assert len(worker.sent(WorkerBlocked)) == 2
    worker.block(False)
    assert worker.sent(WorkerBlocked) == []
    worker.block(False)
    assert len(worker.sent(WorkerBlocked)) == 2


async def test_a_thread_that_outlives_its_task_holds_up_nobody(worker: Worker) -> None:
    worker.assign()
    worker.receive(OWNER, numbered(1), numbered(2))
    accepted = worker.begin()
    worker.block(True)
    worker.end(accepted)
    assert [record.blocked for peer, record in worker.sent(WorkerBlocked) if peer == OWNER] == [True, False]
    current.set(Running(accepted.task, OWNER, accepted.order, None, ""))
    worker.block(False)
    worker.block(True)
    assert worker.sent(WorkerBlocked) == []
    worker.receive(OWNER, numbered(3))
    assert worker.begin().task.number == 3


async def test_tasks_that_come_before_their_lease_wait_for_it(worker: Worker) -> None:
    worker.receive(OWNER, numbered(1, lease=7))
    worker.receive(THIRD, numbered(5, lease=8))
    worker.receive(OWNER, numbered(2, lease=7))
    assert worker.execution.queue.empty()
    worker.assign(lease=7)
    first = worker.begin()
    assert first.task.number == 1
    worker.end(first)
    worker.end(worker.begin())
    worker.sent()
    worker.assign(lease=8, owner=THIRD)
    assert worker.begin().task.number == 5


async def test_what_a_task_keeps_of_its_owner_is_told_with_its_end(worker: Worker) -> None:
    reference = Reference(OWNER, put_key(9))
    worker.assign()
    worker.receive(OWNER, numbered(1, contained=[reference]))
    accepted = worker.begin()
    kept = accepted.references[0]
    worker.end(accepted)
    [(_, done)] = worker.sent(TaskDone)
    assert done.kept == (reference,)
    del accepted, kept
    assert worker.sent() == [(OWNER, Unborrow(reference.key, 1))]


async def test_what_a_task_does_not_keep_is_not_mentioned(worker: Worker) -> None:
    worker.assign()
    worker.receive(OWNER, numbered(1, contained=[Reference(OWNER, put_key(9))]))
    worker.end(worker.begin())
    [(_, done)] = worker.sent()
    assert done.kept == ()
    assert worker.runtime.reactor.borrowing.is_quiet()


async def test_the_end_of_a_task_that_keeps_a_third_partys_object_waits_until_that_counts_it(worker: Worker) -> None:
    reference = Reference(THIRD, put_key(9))
    worker.assign()
    worker.receive(OWNER, numbered(1, contained=[reference]))
    accepted = worker.begin()
    assert worker.sent() == [(THIRD, Borrow(reference.key))]
    kept = accepted.references[0]
    worker.end(accepted)
    assert worker.sent() == []
    worker.receive(THIRD, Borrowed(reference.key))
    [(_, done)] = worker.sent()
    assert isinstance(done, TaskDone)
    assert done.kept == ()
    del accepted, kept
    assert worker.sent() == [(THIRD, Unborrow(reference.key, 1))]


async def test_a_worker_that_ran_its_last_call_gives_back_the_rest_and_leaves_once_it_has_answered(
    worker: Worker,
) -> None:
    reference = Reference(THIRD, put_key(9))
    worker.assign()
    worker.receive(OWNER, numbered(1, contained=[reference]), numbered(2))
    accepted = worker.begin()
    kept = accepted.references[0]
    worker.end(accepted, exhausted=True)
    assert worker.sent(TasksReturned) == [(OWNER, TasksReturned(LeaseId(1), [numbered(2).number], False))]
    assert worker.execution.queue.empty()
    worker.receive(THIRD, Borrowed(reference.key))
    assert len(worker.sent(TaskDone)) == 1
    assert worker.execution.queue.get_nowait() is None
    del kept


async def test_a_worker_that_nobody_needs_leaves(worker: Worker) -> None:
    worker.receive(NODE, ProcessUnneeded())
    assert worker.execution.queue.get_nowait() is None


async def test_a_worker_stays_as_long_as_its_objects_are_referred_to(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal_core.runtime.worker.process.LINGER_SECONDS", 0.001)
    key = put_key(9)
    worker.runtime.reactor.borrowing.lend(key, THIRD)
    worker.receive(NODE, ProcessUnneeded())
    assert worker.execution.queue.empty()
    worker.receive(THIRD, Unborrow(key, 1))
    while worker.execution.queue.empty():  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert worker.execution.queue.get_nowait() is None


class SequentialHosting:
    """As much of an actor as calls notice on their way to it."""

    is_sequential = True


@pytest.mark.parametrize("before", [True, False])
async def test_a_call_that_makes_what_the_running_one_waits_for_ends(worker: Worker, before: bool) -> None:
    worker.runtime.hosting = SequentialHosting()  # type: ignore[assignment]
    worker.receive(OWNER, numbered(3, lease=0))
    using = worker.begin()
    assert begin(using)
    if before:
        worker.receive(OWNER, numbered(5, lease=0))
    worker.runtime.command(Awaits(using, Reference(OWNER, object_key(TaskNumber(5), 1))))
    worker.reactor.drain()
    if not before:
        worker.receive(OWNER, numbered(5, lease=0))
    worker.receive(THIRD, numbered(5, lease=0))
    [(peer, done)] = worker.sent(TaskDone)
    assert (peer, done.number) == (OWNER, 5)
    assert [value.code for value in done.values] == ["reconstruction_failed"]
    worker.runtime.command(Awaits(using, None))
    worker.reactor.drain()
    worker.receive(OWNER, numbered(5, lease=0))
    assert worker.sent(TaskDone) == [], "it waits for nothing any more"
