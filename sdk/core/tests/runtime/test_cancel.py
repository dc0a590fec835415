"""Cancellation on both sides: the owner, who ends what is nowhere yet, and the worker, who interrupts what it runs."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from shoal_core.protocol.errors import TaskCancelledError
from shoal_core.protocol.ids import FunctionId, JobId, LeaseId
from shoal_core.protocol.records import (
    CancelObject,
    CancelTask,
    Failed,
    Item,
    LeaseAssigned,
    LeaseGranted,
    Reference,
    Task,
    TaskDone,
    TasksReturned,
    Value,
)
from shoal_core.runtime.ownership.streams import STREAMING, ObjectRefGenerator
from shoal_core.runtime.runtime import Call
from shoal_core.runtime.tasks.submission import CANCELLED, SchedulingClass
from shoal_core.runtime.worker.execution import INTERRUPT, BegunPage, Execution
from shoal_core.runtime.worker.process import Service
from shoal_core.runtime.worker.work import Accepted, TaskInterrupt, Work, begin
from shoal_core.testing.builders import inline, node_id, process_id, put_key, task
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE = node_id(1)
LOCAL = process_id(1)
WORKER = process_id(2)
OTHER = process_id(3)


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        yield lone


def a_call(lone: LoneRuntime, *, returns: int = 1) -> Call:
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    return Call(FunctionId("f" * 32), "work", returns, key, 3, b"")


def grant(lone: LoneRuntime) -> Task:
    """Give the lease that was asked for; return the task that is sent there."""
    lone.reactor.drain()
    [key] = lone.reactor.submission.keys.values()
    lone.receive(NODE, LeaseGranted(LeaseId(1), key.index, next(iter(key.slots)), WORKER))
    [(_, sent)] = lone.sent(Task)
    assert isinstance(sent, Task)
    return sent


# ------------------------------------------------------------------------------------ the owner


async def test_a_task_that_waits_for_another_ends_at_once_and_is_not_started_by_its_end(lone: LoneRuntime) -> None:
    [first] = lone.runtime.submit(a_call(lone), (), {})
    [second] = lone.runtime.submit(a_call(lone), (first,), {})
    running = grant(lone)
    lone.runtime.cancel(second, force=False, recursive=True)
    lone.reactor.drain()
    with pytest.raises(TaskCancelledError, match=r"work\(\) was cancelled"):
        lone.runtime.get([second], 0)
    lone.receive(WORKER, TaskDone(running.number, 0, running.lease, (inline(),), 0.001))
    assert lone.sent(Task) == []
    assert lone.reactor.tasks == {}


async def test_what_depends_on_a_cancelled_task_fails_with_it(lone: LoneRuntime) -> None:
    [first] = lone.runtime.submit(a_call(lone), (), {})
    [second] = lone.runtime.submit(a_call(lone), (first,), {})
    lone.reactor.drain()
    lone.runtime.cancel(first, force=False, recursive=True)
    lone.reactor.drain()
    with pytest.raises(TaskCancelledError):
        lone.runtime.get([second], 0)


async def test_what_has_ended_and_what_was_put_is_left_alone(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    running = grant(lone)
    lone.receive(WORKER, TaskDone(running.number, 0, running.lease, (inline(b"I1\n."),), 0.001))
    put = lone.runtime.put(2)
    for one in (ref, put):
        lone.runtime.cancel(one, force=True, recursive=True)
    assert lone.sent(CancelTask) == []
    assert lone.runtime.get([ref, put], 0) == [1, 2]


async def test_a_borrower_asks_the_owner(lone: LoneRuntime) -> None:
    ref = lone.runtime.objects.restore(Reference(OTHER, put_key(4)))
    lone.runtime.cancel(ref, force=True, recursive=False)
    assert lone.sent(CancelObject) == [(OTHER, CancelObject(put_key(4), True, False))]


async def test_an_owner_does_what_a_borrower_asks(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    running = grant(lone)
    lone.receive(OTHER, CancelObject(ref._state.key, True, False))
    assert lone.sent(CancelTask) == [(WORKER, CancelTask(running.number, 0, True, False))]


async def test_a_generator_that_is_given_back_and_cancelled_again_in_the_same_moment_ends_once(
    lone: LoneRuntime,
) -> None:
    [gen] = lone.runtime.submit(a_call(lone, returns=STREAMING), (), {})
    assert isinstance(gen, ObjectRefGenerator)
    running = grant(lone)
    lone.runtime.cancel(gen.completed(), force=False, recursive=True)
    lone.reactor.drain()
    lone.receive(
        WORKER,
        TasksReturned(running.lease, [running.number], False),
        CancelObject(gen.completed()._state.key, False, True),
    )
    with pytest.raises(TaskCancelledError):
        lone.runtime.get([next(gen)], 0)
    with pytest.raises(StopIteration):
        next(gen)
    assert lone.reactor.streams == {}


async def test_force_is_refused_for_calls_of_actors(lone: LoneRuntime) -> None:
    ref = lone.runtime.objects.restore(Reference(OTHER, put_key(5)))
    with pytest.raises(ValueError, match=r"kill\(\) ends the actor"):
        lone.runtime.cancel(ref, force=True, recursive=True)


# ------------------------------------------------------------------------------------ the worker


class Worker(LoneRuntime):
    """A worker process whose main thread is the test's."""

    def __init__(self, lone: LoneRuntime, page: Path) -> None:
        super().__init__(lone.runtime, lone.peers)
        self.execution = Execution(lone.runtime, BegunPage(page), page.parent)
        Service(lone.runtime, self.execution)

    def assign(self) -> None:
        self.receive(NODE, LeaseAssigned(LeaseId(1), OTHER, JobId("00000001"), {}))
        assert isinstance(self.execution.queue.get_nowait(), LeaseAssigned)

    def next(self) -> Accepted:
        accepted = self.execution.queue.get_nowait()
        assert isinstance(accepted, Accepted)
        return accepted

    def answers(self) -> list[tuple[int, str]]:
        """Return which tasks were answered, and how."""
        return [(done.number, _how(done.values)) for _, done in self.sent(TaskDone)]


def _how(values: Sequence[Value]) -> str:
    return values[0].code if values and isinstance(values[0], Failed) else "a value"


@pytest.fixture
async def worker(tmp_path: Path) -> AsyncIterator[Worker]:
    page = tmp_path / "begun"
    page.write_bytes(bytes(4096))
    async with lone_runtime(LOCAL) as lone:
        yield Worker(lone, page)


def cancel_of(number: int, *, attempt: int = 0) -> CancelTask:
    return CancelTask(task(number).number, attempt, False, True)


def run(worker: Worker, accepted: Accepted, *yielded: object) -> None:
    """Run a generator as the main thread does."""
    assert begin(accepted)
    with Work(worker.runtime, accepted, None) as work:
        work.succeed(iter(yielded))
    worker.runtime.ended(work.ended)


async def test_what_was_not_begun_is_answered_at_once_and_never_runs(worker: Worker) -> None:
    worker.assign()
    worker.receive(OTHER, task(2), task(4))
    worker.receive(OTHER, cancel_of(2))
    assert worker.answers() == [(2, CANCELLED)]
    assert not begin(worker.next())
    assert begin(worker.next())


async def test_a_cancellation_that_comes_before_the_lease_is_not_lost(worker: Worker) -> None:
    worker.receive(OTHER, task(2), task(4), cancel_of(2))
    assert worker.answers() == [(2, CANCELLED)]
    worker.assign()
    assert worker.next().task.number == 4
    assert worker.execution.queue.empty()


async def test_a_cancellation_of_another_attempt_changes_nothing(worker: Worker) -> None:
    worker.assign()
    worker.receive(OTHER, task(2), cancel_of(2, attempt=1), cancel_of(6))
    assert worker.answers() == []
    assert begin(worker.next())


async def test_what_has_ended_is_answered_once(worker: Worker) -> None:
    worker.assign()
    worker.receive(OTHER, task(2, returns=STREAMING))
    run(worker, worker.next())
    worker.sent()
    worker.receive(OTHER, cancel_of(2))
    assert worker.answers() == []


async def test_a_generator_that_was_cancelled_between_two_items_says_so(worker: Worker) -> None:
    """Where nothing interrupts it, as in an actor, it ends by itself; its user must not take that for its end."""
    worker.assign()
    worker.receive(OTHER, task(2, returns=STREAMING))
    accepted = worker.next()
    assert begin(accepted)

    def items() -> object:
        yield 1
        worker.receive(OTHER, cancel_of(2))
        yield 2
        raise AssertionError("nobody wants a third")

    with Work(worker.runtime, accepted, None) as work:
        work.succeed(items())
    worker.runtime.ended(work.ended)
    sent = worker.sent()
    assert [record.index for _, record in sent if isinstance(record, Item)] == [1, 2]
    assert [_how(record.values) for _, record in sent if isinstance(record, TaskDone)] == [CANCELLED]


async def test_the_generators_of_a_process_that_died_are_stopped(worker: Worker) -> None:
    worker.assign()
    worker.receive(OTHER, task(2, returns=STREAMING))
    worker.receive(WORKER, task(2, returns=STREAMING))
    producers = [worker.next().producer, worker.next().producer]
    worker.reactor._bury(OTHER)
    assert [producer is not None and producer.closed for producer in producers] == [True, False]


async def test_a_task_of_its_own_that_was_cancelled_with_it_does_not_hide_why_a_task_ended(worker: Worker) -> None:
    worker.assign()
    worker.receive(OTHER, task(2))
    accepted = worker.next()
    assert begin(accepted)
    worker.receive(OTHER, cancel_of(2))
    with Work(worker.runtime, accepted, None) as work:
        raise TaskCancelledError("child() was cancelled.")
    worker.runtime.ended(work.ended)
    assert worker.answers() == [(2, CANCELLED)]


async def test_the_interruption_hits_only_the_task_that_was_meant_and_only_its_own_code(worker: Worker) -> None:
    execution = worker.execution
    execution._main_thread = threading.get_ident()
    worker.assign()
    worker.receive(OTHER, task(2), task(4))
    first, second = worker.next(), worker.next()
    handler = signal.signal(INTERRUPT, execution._interrupted)
    try:
        execution.running = second
        second.interruptible = True
        execution.interrupt(first)
        signal.raise_signal(INTERRUPT)  # one that was sent for a task that has ended since
        second.cancelled = True
        second.interruptible = False
        execution.interrupt(second)  # what is half handed on would be lost
        second.interruptible = True
        with pytest.raises(TaskInterrupt):
            execution.interrupt(second)
        execution.interrupt(second)  # once is enough
    finally:
        signal.signal(INTERRUPT, handler)


@pytest.fixture
async def interrupted(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Accepted, list[Accepted]]]:
    """Run a cancelled task on the test's thread; return it, and the interruptions that are tried again."""
    execution = worker.execution
    worker.assign()
    worker.receive(OTHER, task(2))
    accepted = worker.next()
    accepted.cancelled = accepted.interruptible = True
    execution.running = accepted
    again: list[Accepted] = []
    monkeypatch.setattr(execution, "_interrupt_later", again.append)
    monkeypatch.setattr(sys, "unraisablehook", execution._unraisable)
    handler = signal.signal(INTERRUPT, execution._interrupted)
    yield accepted, again
    signal.signal(INTERRUPT, handler)


async def test_an_interruption_that_a_finalizer_swallows_comes_again(
    interrupted: tuple[Accepted, list[Accepted]],
) -> None:
    class Finalized:
        def __del__(self) -> None:
            signal.raise_signal(INTERRUPT)

    accepted, again = interrupted
    Finalized()
    assert again == [accepted]
    assert accepted.interruptible


async def test_an_interruption_waits_while_something_of_shoals_is_half_done(
    worker: Worker, interrupted: tuple[Accepted, list[Accepted]]
) -> None:
    class Interrupts:
        def __reduce__(self) -> tuple[object, ...]:
            signal.raise_signal(INTERRUPT)
            return int, ()

    steps = []

    def user_code() -> None:
        steps.append("before")
        ref = worker.runtime.put(Interrupts())
        steps.append(repr(ref))

    with pytest.raises(TaskInterrupt):
        user_code()
    assert steps == ["before"]
    assert interrupted[1] == []
    assert sys.gettrace() is None
