"""What a generator yields reaches its user once and in order, whatever crashes, ends, is closed or comes late."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import pickle
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_core.protocol.errors import TaskCancelledError, WorkerCrashedError
from shoal_core.protocol.ids import FunctionId, LeaseId, ProcessId, task_of
from shoal_core.protocol.records import (
    CancelTask,
    Failed,
    Inline,
    Item,
    LeaseGranted,
    SegmentFreed,
    Stored,
    StreamAdvanced,
    StreamClosed,
    Task,
    TaskDone,
    WorkerLost,
)
from shoal_core.runtime.ownership.streams import (
    MOST_AHEAD_OF_PACE,
    PACE_SECONDS,
    STREAMING,
    ObjectRefGenerator,
    Producer,
)
from shoal_core.runtime.runtime import Call
from shoal_core.runtime.tasks.submission import SchedulingClass, cancelled
from shoal_core.runtime.worker import work
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.builders import task as a_task
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE = node_id(1)
LOCAL = process_id(1)


def value(of: object) -> Inline:
    return Inline(pickle.dumps(of, 5))


def start(lone: LoneRuntime, *, ahead: int = 0, retries: int = -1) -> ObjectRefGenerator[int]:
    """Call a remote generator."""
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    call = Call(FunctionId("f" * 32), "numbers", STREAMING, key, retries, b"", ahead)
    [gen] = lone.runtime.submit(call, (), {})
    assert isinstance(gen, ObjectRefGenerator)
    lone.reactor.drain()
    return gen


def left_of(lone: LoneRuntime) -> tuple[list[int], list[int], list[int]]:
    """Return what a process knows of tasks, streams and objects, by number."""
    gc.collect()
    lone.reactor.drain()  # lets go of the stream,
    lone.reactor.drain()  # and then of what it held
    reactor = lone.reactor
    return list(reactor.tasks), list(reactor.streams), list(lone.runtime.objects.owned)


@dataclass
class Run:
    """One attempt of the generator, in one worker process."""

    task: Task
    attempt: int
    producer: Producer
    made: int = 0
    cancelled: bool = False
    ended: bool = False


@dataclass
class Worker:
    """A worker process: what it runs, and what it has said that did not arrive yet."""

    process: ProcessId
    lease: LeaseId
    run: Run | None = None
    said: deque[Item | TaskDone] = field(default_factory=deque)


class World(RuleBasedStateMachine):
    """One generator, its user, and the workers on which it is run again and again."""

    def __init__(self) -> None:
        super().__init__()
        gc.freeze()  # what is collected afterwards is of this world alone, which takes a hundredth of the time
        self.runner = asyncio.Runner()
        self.stack = contextlib.AsyncExitStack()
        self.workers: dict[ProcessId, Worker] = {}
        self.buried: list[Worker] = []
        self.taken: list[int] = []
        self.outcome = ""
        self.cancelled = False
        self.wanted = True

    @initialize(ahead=st.sampled_from([0, 0, 1, 3]), length=st.integers(0, 6), fails=st.booleans())
    def begin(self, ahead: int, length: int, fails: bool) -> None:
        self.lone = self.runner.run(self.stack.enter_async_context(lone_runtime(LOCAL)))
        self.length, self.fails = length, fails
        self.ahead = ahead
        self.gen: ObjectRefGenerator[int] | None = start(self.lone, ahead=ahead)
        self.listen()

    # --- what the owner says

    def listen(self) -> None:
        """Do what the owner asked of its workers and of the node."""
        for peer, record in self.lone.sent():
            worker = self.workers.get(ProcessId(peer))
            if worker is None:
                continue
            run = worker.run
            if isinstance(record, Task):
                worker.run = Run(record, record.attempt, Producer(record.ahead))
            elif run is not None and isinstance(record, StreamAdvanced):
                run.producer.advance(record.taken)
            elif run is not None and isinstance(record, StreamClosed):
                run.producer.close()
            elif run is not None and isinstance(record, CancelTask) and record.attempt == run.attempt:
                run.cancelled = True
                run.producer.close()

    @rule()
    def a_worker_is_granted(self) -> None:
        for key in self.lone.reactor.submission.keys.values():
            for slot in list(key.slots)[:1]:
                number = len(self.workers) + len(self.buried) + 2
                worker = Worker(process_id(number), LeaseId(number))
                self.workers[worker.process] = worker
                self.lone.receive(NODE, LeaseGranted(worker.lease, key.index, slot, worker.process))
                self.listen()

    # --- the generator

    def running(self) -> Worker | None:
        return next((w for w in self.workers.values() if w.run is not None and not w.run.ended), None)

    def makes(self, worker: Worker) -> bool:
        """Have the generator go on by one step; tell whether there was one to take."""
        run = worker.run
        assert run is not None
        if not run.producer.may_go_on(run.made):
            return False
        if run.producer.closed or run.made == self.length:
            self.ends(worker, retryable=False)
            return True
        run.made += 1
        worker.said.append(Item(run.task.number, run.attempt, run.made, value(run.made)))
        return True

    def ends(self, worker: Worker, *, retryable: bool) -> None:
        run = worker.run
        assert run is not None
        run.ended = True
        values: list[Inline | Failed | Stored] = []
        if run.cancelled:
            values = [cancelled("numbers")]
        elif retryable or (self.fails and not run.producer.closed):
            values = [Failed("worker_crashed", "it crashed")]
        worker.said.append(TaskDone(run.task.number, run.attempt, worker.lease, tuple(values), 0.001, retryable))

    @precondition(lambda self: self.running() is not None)
    @rule(steps=st.integers(1, 4))
    def the_generator_goes_on(self, steps: int) -> None:
        for _ in range(steps):
            worker = self.running()
            if worker is None or not self.makes(worker):
                return

    @precondition(lambda self: self.running() is not None)
    @rule()
    def the_generator_fails_and_is_tried_again(self) -> None:
        worker = self.running()
        assert worker is not None
        self.ends(worker, retryable=True)

    @precondition(lambda self: any(worker.said for worker in self.workers.values()))
    @rule(count=st.integers(1, 4))
    def something_arrives(self, count: int) -> None:
        worker = next(worker for worker in self.workers.values() if worker.said)
        batch = [worker.said.popleft() for _ in range(min(count, len(worker.said)))]
        self.lone.receive(worker.process, *batch)
        self.listen()

    @precondition(lambda self: bool(self.workers))
    @rule(late=st.booleans())
    def a_worker_crashes(self, late: bool) -> None:
        """What it has said is lost, or arrives when the generator is run elsewhere."""
        worker = self.workers.pop(next(iter(self.workers)))
        if not late:
            worker.said.clear()
        self.buried.append(worker)
        self.lone.reactor.submission.lost(NODE, WorkerLost(worker.lease, 1 << 62, "it was killed"))
        self.lone.reactor.finish()
        self.listen()

    @precondition(lambda self: any(worker.said for worker in self.buried))
    @rule()
    def last_words_arrive(self) -> None:
        worker = next(worker for worker in self.buried if worker.said)
        self.lone.receive(worker.process, *worker.said)
        worker.said.clear()
        self.listen()

    # --- the user

    @rule(count=st.integers(1, 3))
    def items_are_taken(self, count: int) -> None:
        for _ in range(count):
            self.take()

    def take(self) -> None:
        """Take the next item, or learn of the end, if that is there."""
        gen = self.gen
        if gen is None or gen._state.value is None:
            return
        ready, finished = gen.next_ready(), gen.is_finished()
        assert ready is not finished
        try:
            ref = next(gen)
        except StopIteration:
            assert finished
            self.outcome = self.outcome or "ended"
            return
        assert ready
        assert not self.outcome, "nothing comes behind the end"
        try:
            self.taken += self.lone.runtime.get([ref], 0)
        except TaskCancelledError:
            self.outcome = "cancelled"
        except WorkerCrashedError:
            self.outcome = "failed"
        self.listen()

    @precondition(lambda self: self.gen is not None)
    @rule()
    def the_generator_is_cancelled(self) -> None:
        assert self.gen is not None
        self.cancelled = True
        self.lone.runtime.cancel(self.gen.completed(), force=False, recursive=True)
        self.listen()

    @precondition(lambda self: self.gen is not None and self.wanted)
    @rule()
    def the_generator_is_closed(self) -> None:
        assert self.gen is not None
        self.gen.close()
        self.wanted = False
        assert self.gen.is_finished(), "at once, for its user"
        assert list(self.gen) == []
        self.listen()

    @precondition(lambda self: self.gen is not None)
    @rule()
    def the_generator_is_dropped(self) -> None:
        self.gen = None
        self.wanted = False
        self.listen()

    # --- what holds

    @invariant()
    def items_come_once_and_in_order(self) -> None:
        assert self.taken == list(range(1, len(self.taken) + 1))
        if self.outcome in ("ended", "failed") and self.wanted and not self.cancelled:
            assert len(self.taken) == self.length

    @invariant()
    def nobody_is_too_far_ahead(self) -> None:
        for worker in self.workers.values():
            if worker.run is not None and self.ahead and self.wanted:
                assert worker.run.made <= len(self.taken) + self.ahead

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.gen = None
            self.runner.run(self.stack.aclose())
            self.runner.close()

    def settle(self) -> None:
        """Let all run to its end: everybody hears of it, and nothing is left."""
        for _ in range(40):
            self.a_worker_is_granted()
            while (worker := self.running()) is not None and self.makes(worker):
                pass
            while any(worker.said for worker in self.workers.values()):
                self.something_arrives(3)
            self.take()
        assert self.running() is None, "the generator is not held up for ever"
        if self.gen is not None:
            expected = {"failed", "cancelled"} if self.fails else {"ended", "cancelled"}
            if self.cancelled:  # it may have crashed, or failed, just before that was heard: it is not tried again
                expected.add("failed")
            assert not self.wanted or self.outcome in expected, "the end is heard of"
            assert self.gen.is_finished()
        self.gen = None
        assert left_of(self.lone) == ([], [], [])


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------ single cases


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        yield lone


WORKER = process_id(2)


def run(lone: LoneRuntime) -> Task:
    """Give the generator a worker; return the task that this got."""
    [key] = lone.reactor.submission.keys.values()
    lone.receive(NODE, LeaseGranted(LeaseId(1), key.index, next(iter(key.slots)), WORKER))
    [(_, task)] = lone.sent(Task)
    assert isinstance(task, Task)
    return task


def item(task: Task, index: int, of: Inline | Stored | None = None) -> Item:
    return Item(task.number, task.attempt, index, of or value(index))


async def test_whoever_waits_for_the_next_item_hears_that_the_generator_was_closed(lone: LoneRuntime) -> None:
    gen = start(lone)
    task = run(lone)
    lone.receive(WORKER, item(task, 1))
    next(gen)
    waiting = asyncio.create_task(anext(gen, None))
    while not lone.reactor.notifying:  # noqa: ASYNC110
        await asyncio.sleep(0)
    gen.close()
    assert await waiting is None


async def test_a_generator_that_is_tried_again_on_the_same_worker_is_told_how_far_its_user_is(
    lone: LoneRuntime,
) -> None:
    """It begins to count anew, and would wait for ever for items to be taken that were taken long ago."""
    gen = start(lone, ahead=1)
    task = run(lone)
    lone.receive(WORKER, item(task, 1))
    next(gen)
    lone.sent()
    failed = Failed("task", "ValueError")
    lone.receive(WORKER, TaskDone(task.number, task.attempt, task.lease, (failed,), 0.001, True))
    [(_, again)] = lone.sent(Task)
    assert again.attempt == 1
    lone.receive(WORKER, item(again, 1))
    assert lone.sent(StreamAdvanced) == [(WORKER, StreamAdvanced(task.number, 1))]


async def test_items_of_a_run_that_is_over_are_not_mixed_with_those_of_the_next(lone: LoneRuntime) -> None:
    gen = start(lone)
    task = run(lone)
    old = Item(task.number, task.attempt, 1, value("old"))
    lone.receive(WORKER, TaskDone(task.number, task.attempt, task.lease, (Failed("task", ""),), 0.001, True))
    lone.receive(WORKER, old)
    assert not gen.next_ready()
    lone.receive(WORKER, Item(task.number, 1, 1, value("new")))
    assert lone.runtime.get([next(gen)], 0) == ["new"]


async def test_large_items_that_nobody_takes_are_freed(lone: LoneRuntime) -> None:
    gen = start(lone)
    task = run(lone)
    large = [Stored(NODE, f"segment-{index}", 1_000_000) for index in (1, 2, 3)]
    lone.receive(WORKER, *(item(task, index, stored) for index, stored in enumerate(large, 1)))
    taken = next(gen)
    lone.receive(WORKER, item(task, 2, Stored(NODE, "duplicate", 1_000_000)))
    assert lone.sent(SegmentFreed) == [(NODE, SegmentFreed("duplicate"))]
    del gen
    gc.collect()
    lone.reactor.drain()
    lone.receive(WORKER, item(task, 4, Stored(NODE, "late", 1_000_000)))
    freed = {record.segment for _, record in lone.sent(SegmentFreed)}
    assert freed == {"segment-2", "segment-3", "late"}
    assert taken._state.value == large[0]
    del taken
    assert lone.sent(SegmentFreed) == [(NODE, SegmentFreed("segment-1"))]


async def test_a_generator_is_stopped_as_soon_as_it_is_known_where_it_runs(lone: LoneRuntime) -> None:
    gen = start(lone)
    task = run(lone)
    gen.close()
    assert lone.sent(StreamClosed) == []
    lone.receive(WORKER, item(task, 1))
    assert lone.sent(StreamClosed) == [(WORKER, StreamClosed(task.number))]


async def test_a_cancelled_generator_gives_what_was_there_then_the_cancellation_then_has_no_more(
    lone: LoneRuntime,
) -> None:
    gen = start(lone)
    task = run(lone)
    lone.receive(WORKER, item(task, 1))
    lone.runtime.cancel(gen.completed(), force=False, recursive=True)
    assert lone.sent(CancelTask) == [(WORKER, CancelTask(task.number, 0, False, True))]
    lone.receive(WORKER, TaskDone(task.number, 0, task.lease, (cancelled("numbers"),), 0.001, False))
    assert lone.runtime.get([next(gen)], 0) == [1]
    with pytest.raises(TaskCancelledError):
        lone.runtime.get([next(gen)], 0)
    with pytest.raises(StopIteration):
        next(gen)
    with pytest.raises(TaskCancelledError):
        lone.runtime.get([gen.completed()], 0)


async def test_a_cancelled_generator_ends_with_the_cancellation_in_an_asynchronous_loop_too(lone: LoneRuntime) -> None:
    gen = start(lone)
    lone.runtime.cancel(gen.completed(), force=False, recursive=True)
    lone.reactor.drain()
    with pytest.raises(TaskCancelledError):
        await (await anext(gen))
    assert [ref async for ref in gen] == []


async def test_wait_takes_a_generator_like_a_reference(lone: LoneRuntime) -> None:
    gen = start(lone)
    ref = lone.runtime.put(1)
    waiting: list[object] = [gen, ref]
    assert lone.runtime.wait(waiting, 1, 0) == ([ref], [gen])  # type: ignore[arg-type, comparison-overlap]
    task = run(lone)
    lone.receive(WORKER, item(task, 1))
    assert lone.runtime.wait(waiting, 2, 0) == ([gen, ref], [])  # type: ignore[arg-type]
    next(gen)
    assert lone.runtime.wait(waiting, 2, 0) == ([ref], [gen])  # type: ignore[arg-type, comparison-overlap]
    lone.receive(WORKER, TaskDone(task.number, 0, task.lease, (), 0.001, False))
    assert lone.runtime.wait(waiting, 2, 0) == ([gen, ref], [])  # type: ignore[arg-type]


async def test_a_generator_cannot_be_pickled(lone: LoneRuntime) -> None:
    with pytest.raises(TypeError, match="taken in one place"):
        pickle.dumps(start(lone))


async def test_a_generator_and_its_end_have_one_task(lone: LoneRuntime) -> None:
    gen = start(lone)
    assert gen._generator_ref is gen.completed()
    assert gen.task_id() == gen.completed().task_id() == gen._stream.next().task_id()
    assert task_of(gen._state.key) == gen._stream.number


# ------------------------------------------------------------------------------------ the producer's side


def test_a_producer_goes_on_as_far_as_its_user_lets_it() -> None:
    producer = Producer(ahead=2)
    assert [producer.may_go_on(made) for made in (0, 1, 2)] == [True, True, False]
    producer.advance(1)
    assert [producer.may_go_on(made) for made in (2, 3)] == [True, False]
    producer.advance(0)
    assert producer.may_go_on(2), "news that comes late takes nothing back"
    producer.close()
    assert producer.may_go_on(1000), "to learn that it is closed"


def test_an_item_is_sent_at_once_unless_many_come_at_once() -> None:
    producer = Producer(ahead=0)
    due = [producer.is_due(100.0) for _ in range(MOST_AHEAD_OF_PACE + 4)]
    assert due[: MOST_AHEAD_OF_PACE - 1] == [True] * (MOST_AHEAD_OF_PACE - 1)
    assert not any(due[MOST_AHEAD_OF_PACE:])
    step = 1.5 * PACE_SECONDS
    assert producer.is_due(100.0 + step), "so often"
    assert all(producer.is_due(101.0 + step * number) for number in range(100))


def test_a_thread_that_waits_is_woken_by_an_advance_and_by_the_end() -> None:
    producer = Producer(ahead=1)
    made: list[int] = []
    turn = threading.Semaphore(0)

    def produce() -> None:
        while not producer.closed:
            producer.wait(len(made))
            made.append(len(made))
            turn.release()

    thread = threading.Thread(target=produce)
    thread.start()
    for taken in range(1, 10):
        turn.acquire()
        producer.advance(taken)
    turn.acquire()
    assert len(made) == 10
    producer.close()
    thread.join()


async def test_a_coroutine_that_waits_is_woken_by_an_advance_and_by_the_end() -> None:
    producer = Producer(ahead=1)
    waiting = asyncio.create_task(producer.wait_on_loop(1))
    await asyncio.sleep(0)
    assert not waiting.done()
    await asyncio.to_thread(producer.advance, 1)
    await waiting
    waiting = asyncio.create_task(producer.wait_on_loop(2))
    await asyncio.sleep(0)
    await asyncio.to_thread(producer.close)
    await waiting


async def test_a_generator_that_yields_more_than_keys_can_count_fails_in_words(
    lone: LoneRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "MOST_ITEMS", 3)
    accepted = work.Accepted(a_task(2, returns=STREAMING), WORKER, [], 1, Producer(0))
    with work.Work(lone.runtime, accepted, None) as running:
        running.succeed(iter(range(10)))
    assert [command.index for command in lone.reactor.commands if type(command) is work.Yielded] == [1, 2, 3]
    lone.reactor.commands.clear()
    [failed] = running.ended.values
    assert isinstance(failed, Failed)
    assert "yielded more than 3 items" in failed.text


async def test_items_belong_to_the_trace_of_their_generator(lone: LoneRuntime) -> None:
    gen = start(lone)
    gen._state.trace = "of the generator"
    task = run(lone)
    lone.receive(WORKER, item(task, 1))
    assert next(gen)._state.trace == "of the generator"
