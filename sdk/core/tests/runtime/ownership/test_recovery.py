"""Objects that are lost: an owner among workers, nodes and a borrower that are played, and die at any moment."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_core.protocol.actors import ActorChanged, ActorState
from shoal_core.protocol.errors import (
    NotFoundError,
    ObjectReconstructionFailedBorrowedError,
    ObjectReconstructionFailedError,
    ObjectReconstructionFailedLineageDisabledError,
    ObjectReconstructionFailedPutError,
    ObjectReconstructionFailedRetriesDisabledError,
    ServiceError,
    from_wire,
)
from shoal_core.protocol.ids import (
    FunctionId,
    LeaseId,
    NodeId,
    ObjectKey,
    ProcessId,
    TaskNumber,
    actor_id,
    node_of,
    object_key,
)
from shoal_core.protocol.records import (
    Failed,
    Fetch,
    Fetched,
    Inline,
    Item,
    LeaseGranted,
    ObjectUnavailable,
    Reference,
    SegmentFreed,
    Stored,
    StreamClosed,
    Task,
    TaskDone,
    Unborrow,
    Value,
    decode,
    encode,
)
from shoal_core.runtime.ownership.lineage import Lineage
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import Call, MethodCall
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import node_id, process_id, put_key
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

HERE = node_id(1)
LOCAL = process_id(1)
OTHER = process_id(9, node=9)


def a_call(lone: LoneRuntime, name: str = "work", *, returns: int = 1, retries: int = 3) -> Call:
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    return Call(FunctionId("f" * 32), name, returns, key, retries, b"")


class Worker:
    """A worker process of a node, with one lease and what it was given and has to say."""

    def __init__(self, process: ProcessId, lease: int) -> None:
        self.process = process
        self.lease = lease
        self.tasks: list[Task] = []
        self.said: list[TaskDone] = []


class World(RuleBasedStateMachine):
    """An owner with tasks that make small and large objects of others, in a cluster whose nodes die."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = AsyncExitStack()
        self.lone: LoneRuntime = self.runner.run(self.stack.enter_async_context(lone_runtime(LOCAL)))
        self.lone.reactor.recovery.restore = self.restore
        self.refs: dict[int, ObjectRef[Any]] = {}
        self.expected: dict[int, str] = {}
        self.always: dict[int, bool] = {}
        self.large: dict[str, bool] = {}
        self.keys: dict[ObjectKey, int] = {}
        self.copies: dict[tuple[NodeId, str], str] = {}
        self.freed: set[tuple[NodeId, str]] = set()
        self.durable: dict[ObjectKey, str] = {}
        self.nodes = [node_id(2), node_id(3)]
        self.unheard: list[NodeId] = []
        self.workers: list[Worker] = []
        self.drawn = 0
        self.borrowed: dict[ObjectKey, Value | None] = {}
        self.asked: set[ObjectKey] = set()
        self.limited = False

    def draw(self) -> int:
        self.drawn += 1
        return self.drawn

    # --- the cluster

    async def restore(self, key: ObjectKey, remakable: bool) -> Stored:
        await asyncio.sleep(0)
        if key not in self.durable:
            raise NotFoundError("it is not durable")
        return self.store(HERE, self.durable[key])

    def store(self, node: NodeId, text: str) -> Stored:
        segment = f"o{self.draw()}"
        self.copies[node, segment] = text
        return Stored(node, segment, 1_000_000)

    def readable(self, value: Value) -> bool:
        if not isinstance(value, Stored):
            return True
        assert (value.node, value.segment) not in self.freed, "what is still needed is not freed"
        return (value.node, value.segment) in self.copies

    def read(self, value: Value) -> str:
        if isinstance(value, Stored):
            return self.copies[value.node, value.segment]
        assert isinstance(value, Inline)
        text: str = pickle.loads(value.data)
        return text

    def listen(self) -> None:
        """Take in what the owner says."""
        for peer, record in self.lone.sent():
            if isinstance(record, Task):
                (copy,) = decode(encode([record]))
                assert isinstance(copy, Task)
                running = [task.number for worker in self.workers for task in worker.tasks]
                assert copy.number not in running, "a task is never run twice at once"
                worker = next((w for w in self.workers if w.process == peer), None)
                if worker is not None and node_of(worker.process) in self.nodes:
                    worker.tasks.append(copy)
            elif isinstance(record, SegmentFreed):
                if self.copies.pop((NodeId(peer), record.segment), None) is not None:
                    self.freed.add((NodeId(peer), record.segment))
            elif isinstance(record, Fetched):
                assert peer == OTHER
                self.asked.discard(record.key)
                if record.key in self.borrowed:
                    self.borrowed[record.key] = record.value

    def turn(self) -> None:
        async def turns() -> None:
            for _ in range(5):
                await asyncio.sleep(0)

        self.runner.run(turns())
        self.listen()

    # --- rules

    @initialize(limit=st.sampled_from([1 << 30, 1 << 30, 1 << 30, 4000, 0]))
    def begin(self, limit: int) -> None:
        self.lone.reactor.recovery.lineage.most_bytes = limit
        self.limited = limit < 1 << 30

    @rule(
        large=st.sampled_from([True, True, False]),
        retries=st.sampled_from([-1, -1, -1, 0, 1, 2]),
        given=st.lists(st.integers(0, 5), max_size=3),
        nested=st.booleans(),
    )
    def a_task_is_submitted(self, large: bool, retries: int, given: list[int], nested: bool) -> None:
        names = sorted(self.refs)
        chosen = [names[-1 - index] for index in given if index < len(names)]
        number = self.draw()
        name = f"t{number}"
        self.large[name] = large
        args: tuple[Any, ...] = tuple(self.refs[index] for index in chosen)
        call = a_call(self.lone, name, retries=retries)
        if nested and args:
            args = (*args, [args[0]])
        [ref] = self.lone.runtime.submit(call, args, {})
        self.refs[number] = ref
        self.keys[ref._state.key] = number
        self.expected[number] = f"{name}({','.join(self.expected[index] for index in chosen)})"
        self.always[number] = retries == -1 and all(self.always[index] for index in chosen) and not self.limited
        self.turn()

    @rule(where=st.integers(0, 1), durable=st.booleans())
    def something_is_put(self, where: int, durable: bool) -> None:
        if where >= len(self.nodes):
            return
        number = self.draw()
        ref = self.lone.runtime.objects.create(object_key(TaskNumber(1_000_000 + 2 * number), 0))
        self.expected[number] = f"put{number}"
        ref._state.value = self.store(self.nodes[where], self.expected[number])
        self.refs[number] = ref
        self.keys[ref._state.key] = number
        self.always[number] = False
        if durable:
            self.durable[ref._state.key] = self.expected[number]

    @precondition(lambda self: self.refs)
    @rule(index=st.integers(0, 100))
    def a_reference_is_dropped(self, index: int) -> None:
        del self.refs[sorted(self.refs)[index % len(self.refs)]]
        self.turn()

    @precondition(lambda self: self.refs)
    @rule(index=st.integers(0, 100))
    def somebody_needs_an_object(self, index: int) -> None:
        self.need(self.refs[sorted(self.refs)[index % len(self.refs)]])

    def need(self, ref: ObjectRef[Any]) -> None:
        value = ref._state.value
        if isinstance(value, Stored) and not self.readable(value):
            self.lone.reactor.recovery.unreadable(ref._state, value)
        self.lone.runtime.wait([ref], 1, 0)
        self.turn()

    @rule()
    def a_worker_is_granted(self) -> None:
        self.lone.reactor.drain()
        # What has large arguments is queued under a key for where they lie.
        wanted = [(key.index, slot) for key in self.lone.reactor.submission.keys.values() for slot in key.slots]
        if wanted and self.nodes:
            index, slot = wanted[0]
            node = self.nodes[self.draw() % len(self.nodes)]
            worker = Worker(ProcessId(f"{node}{self.draw():08x}"), self.draw())
            self.workers.append(worker)
            self.lone.receive(node, LeaseGranted(LeaseId(worker.lease), index, slot, worker.process))
        self.turn()

    @precondition(lambda self: any(worker.tasks for worker in self.workers))
    @rule()
    def a_task_runs(self) -> None:
        worker = next(worker for worker in self.workers if worker.tasks)
        task = worker.tasks.pop(0)
        missing = [v for v in task.dependencies if isinstance(v, Stored) and not self.readable(v)]
        if missing:
            done = TaskDone(task.number, task.attempt, task.lease, (), 0.001, missing=tuple(missing))
        else:
            text = f"{task.name}({','.join(map(self.read, task.dependencies))})"
            node = node_of(worker.process)
            value = self.store(node, text) if self.large[task.name] else Inline(pickle.dumps(text, 5))
            done = TaskDone(task.number, task.attempt, task.lease, (value,), 0.001)
        worker.said.append(done)

    @precondition(lambda self: any(worker.said for worker in self.workers))
    @rule()
    def an_answer_comes(self) -> None:
        worker = next(worker for worker in self.workers if worker.said)
        self.lone.receive(worker.process, worker.said.pop(0))
        self.turn()

    @rule(which=st.integers(0, 1), heard=st.booleans(), words=st.booleans())
    def a_node_dies(self, which: int, heard: bool, words: bool) -> None:
        if which >= len(self.nodes):
            self.nodes.append(node_id(100 + self.draw()))
            return
        node = self.nodes.pop(which)
        for copy in [copy for copy in self.copies if copy[0] == node]:
            del self.copies[copy]
        for worker in self.workers:
            if node_of(worker.process) == node:
                worker.tasks.clear()
                if not words:
                    worker.said.clear()
        self.unheard.append(node)
        if heard:
            self.the_death_is_heard_of()

    @precondition(lambda self: self.unheard)
    @rule()
    def the_death_is_heard_of(self) -> None:
        for node in self.unheard:
            self.lone.reactor.node_died(node, "it was killed")
        self.unheard.clear()
        self.turn()

    @precondition(lambda self: self.copies)
    @rule(index=st.integers(0, 100))
    def a_copy_vanishes(self, index: int) -> None:
        del self.copies[sorted(self.copies)[index % len(self.copies)]]

    @precondition(lambda self: self.refs)
    @rule(index=st.integers(0, 100), durable=st.booleans())
    def a_result_is_spilled(self, index: int, durable: bool) -> None:
        number = sorted(self.refs)[index % len(self.refs)]
        self.durable[self.refs[number]._state.key] = self.expected[number]

    # --- a borrower

    @precondition(lambda self: self.refs)
    @rule(index=st.integers(0, 100))
    def another_process_borrows(self, index: int) -> None:
        key = self.refs[sorted(self.refs)[index % len(self.refs)]]._state.key
        if key not in self.borrowed:
            self.lone.reactor.borrowing.lend(key, OTHER)
            self.borrowed[key] = None
            self.ask(key)

    def ask(self, key: ObjectKey) -> None:
        value = self.borrowed[key]
        if key in self.asked or (value is not None and self.readable(value)):
            return
        self.asked.add(key)
        self.borrowed[key] = None
        told = [ObjectUnavailable(key, value.node, value.segment)] if isinstance(value, Stored) else []
        self.lone.receive(OTHER, *told, Fetch(key))
        self.turn()

    @precondition(lambda self: self.borrowed)
    @rule(index=st.integers(0, 100))
    def the_borrower_reads(self, index: int) -> None:
        self.ask(sorted(self.borrowed)[index % len(self.borrowed)])

    @precondition(lambda self: self.borrowed)
    @rule(index=st.integers(0, 100))
    def the_borrower_lets_go(self, index: int) -> None:
        key = sorted(self.borrowed)[index % len(self.borrowed)]
        if key not in self.asked:
            del self.borrowed[key]
            self.lone.receive(OTHER, Unborrow(key, 1))
            self.turn()

    # --- what holds

    @invariant()
    def the_records_are_in_order(self) -> None:
        lineage = self.lone.reactor.recovery.lineage
        if lineage.most_bytes or not len(lineage):
            lineage.sanity_check()

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.refs.clear()
            self.runner.run(self.stack.aclose())
            self.runner.close()

    def settle(self) -> None:
        """Let all come to rest: everybody has what it asked for, and then nothing is left."""
        if not self.nodes:
            self.nodes.append(node_id(99))
        if self.unheard:
            self.the_death_is_heard_of()
        self.go_on(self.is_answered)
        assert self.is_answered(), "nobody waits for ever"
        self.check_all()
        self.refs.clear()
        for key in list(self.borrowed):
            self.lone.receive(OTHER, Unborrow(key, 1))
        self.borrowed.clear()
        self.turn()
        self.go_on(lambda: not self.lone.reactor.tasks and not self.lone.runtime.objects.owned)
        reactor = self.lone.reactor
        assert reactor.tasks == {}
        assert self.lone.runtime.objects.owned == {}
        assert reactor.recovery.is_quiet(), "nothing is remembered of what is gone"
        assert reactor.recovery.lineage.size_bytes == 0
        assert reactor.borrowing.is_quiet()
        assert self.copies == {}, "no copy is left behind"

    def go_on(self, until: Callable[[], bool]) -> None:
        """Let everybody do what there is to do, until something holds, or for long enough."""
        for _ in range(100):
            for number in list(self.refs):
                self.need(self.refs[number])
            for key in list(self.borrowed):
                self.ask(key)
            self.work_goes_on(1)
            if until():
                break

    @rule(rounds=st.integers(1, 6))
    def work_goes_on(self, rounds: int) -> None:
        """Whoever has something to do does it, and is heard."""
        for _ in range(rounds):
            self.a_worker_is_granted()
            while any(worker.tasks for worker in self.workers):
                self.a_task_runs()
            while any(worker.said for worker in self.workers):
                self.an_answer_comes()

    def check_all(self) -> None:
        for number, ref in self.refs.items():
            self.check(number, ref._state.value)
        for key, value in self.borrowed.items():
            self.check(self.keys[key], value)

    def is_answered(self) -> bool:
        states = [ref._state.value for ref in self.refs.values()]
        values = [*states, *self.borrowed.values()]
        return not self.asked and all(value is not None and self.readable(value) for value in values)

    def check(self, number: int, value: Value | None) -> None:
        assert value is not None
        if not isinstance(value, Failed):
            assert self.read(value) == self.expected[number]
            return
        assert not self.always[number], f"{value.text}: it could have been made again"
        error = from_wire(value.code, value.text)
        assert isinstance(error, ObjectReconstructionFailedError) or value.code in ("worker_crashed", "node_died"), (
            value
        )


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# ------------------------------------------------------------------------------------ single cases


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    """A runtime whose objects are not durable."""

    async def restore(key: ObjectKey, remakable: bool) -> Stored:
        raise NotFoundError("it is not durable")

    async with lone_runtime(LOCAL) as lone:
        lone.reactor.recovery.restore = restore
        yield lone


NODE, FAR = node_id(2), node_id(3)
WORKER = process_id(2, node=2)
FAR_WORKER = process_id(3, node=3)


def run(lone: LoneRuntime, node: NodeId = NODE, worker: ProcessId = WORKER) -> Task:
    """Give what is queued a worker, if it waits for one; return the task that this got."""
    lone.reactor.drain()
    [key] = lone.reactor.submission.keys.values()
    if key.slots:
        lone.receive(node, LeaseGranted(LeaseId(1), key.index, next(iter(key.slots)), worker))
    [(_, task)] = lone.sent(Task)
    assert isinstance(task, Task)
    return task


def done(task: Task, *values: Value) -> TaskDone:
    return TaskDone(task.number, task.attempt, task.lease, values, 0.001)


def made(lone: LoneRuntime, *values: Value, args: tuple[Any, ...] = (), retries: int = 3) -> list[ObjectRef[Any]]:
    """Return what a task returned on a node that may die."""
    refs: list[ObjectRef[Any]] = lone.runtime.submit(a_call(lone, returns=len(values), retries=retries), args, {})
    lone.receive(WORKER, done(run(lone), *values))
    return refs


async def need(lone: LoneRuntime, *refs: ObjectRef[Any]) -> None:
    lone.runtime.wait(refs, len(refs), 0)
    for _ in range(5):
        lone.reactor.drain()
        await asyncio.sleep(0)


def small(of: object) -> Inline:
    return Inline(pickle.dumps(of, 5))


async def test_results_that_were_not_lost_stay_as_they_are(lone: LoneRuntime) -> None:
    lost, kept = made(lone, Stored(NODE, "o1", 9), Stored(FAR, "o2", 9))
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, lost)
    lone.receive(FAR_WORKER, done(run(lone, FAR, FAR_WORKER), Stored(FAR, "o3", 9), Stored(FAR, "o4", 9)))
    assert lost._state.value == Stored(FAR, "o3", 9)
    assert kept._state.value == Stored(FAR, "o2", 9)
    assert lone.sent(SegmentFreed) == [(FAR, SegmentFreed("o4"))]


async def test_a_put_is_not_made_again_and_its_error_says_what_to_do(lone: LoneRuntime) -> None:
    ref: ObjectRef[Any] = lone.runtime.objects.create(put_key(1000))
    ref._state.value = Stored(NODE, "o1", 9)
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    with pytest.raises(ObjectReconstructionFailedPutError, match="durable=True") as caught:
        lone.runtime.get([ref], 0)
    assert ref.hex() in str(caught.value)
    assert NODE in str(caught.value)


async def test_what_is_durable_is_restored_and_no_task_runs(lone: LoneRuntime) -> None:
    async def restore(key: ObjectKey, remakable: bool) -> Stored:
        return Stored(HERE, "o7", 9)

    lone.reactor.recovery.restore = restore
    [ref] = made(lone, Stored(NODE, "o1", 9))
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    assert ref._state.value == Stored(HERE, "o7", 9)
    assert lone.sent(Task) == []


async def test_the_durable_tier_need_not_be_waited_for_where_a_task_can_run_again(lone: LoneRuntime) -> None:
    asked: list[bool] = []

    async def restore(key: ObjectKey, remakable: bool) -> Stored:
        asked.append(remakable)
        raise NotFoundError("it is not durable")

    lone.reactor.recovery.restore = restore
    [again], [once] = made(lone, Stored(NODE, "o1", 9)), made(lone, Stored(NODE, "o2", 9), retries=0)
    put = lone.runtime.put(1)
    put._state.value = Stored(NODE, "o3", 9)
    lone.reactor.node_died(NODE, "it was killed")
    for ref in (again, once, put):
        await need(lone, ref)
    assert asked == [True, False, False]


async def test_a_durable_tier_that_fails_is_named_where_nothing_else_helps(lone: LoneRuntime) -> None:
    async def restore(key: ObjectKey, remakable: bool) -> Stored:
        raise ServiceError("the disk is on fire")

    lone.reactor.recovery.restore = restore
    [ref] = made(lone, Stored(NODE, "o1", 9), retries=0)
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    with pytest.raises(ObjectReconstructionFailedRetriesDisabledError, match="the disk is on fire"):
        lone.runtime.get([ref], 0)


async def test_what_was_restored_for_nobody_is_freed(lone: LoneRuntime) -> None:
    go = asyncio.Event()

    async def restore(key: ObjectKey, remakable: bool) -> Stored:
        await go.wait()
        return Stored(HERE, "o7", 9)

    lone.reactor.recovery.restore = restore
    [ref] = made(lone, Stored(NODE, "o1", 9))
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    del ref
    lone.reactor.drain()
    go.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert lone.sent(SegmentFreed) == [(HERE, SegmentFreed("o7"))]
    assert lone.reactor.recovery.is_quiet()


async def test_a_borrower_tells_the_owner_and_asks_again(lone: LoneRuntime) -> None:
    ref: ObjectRef[Any] = lone.runtime.objects.restore(Reference(OTHER, put_key(1)))
    await need(lone, ref)
    lone.receive(OTHER, Fetched(put_key(1), Stored(NODE, "o1", 9)))
    lone.sent()
    lone.reactor.node_died(NODE, "it was killed")
    assert lone.sent() == [], "not before somebody needs it"
    await need(lone, ref)
    assert lone.sent() == [(OTHER, ObjectUnavailable(put_key(1), NODE, "o1")), (OTHER, Fetch(put_key(1)))]
    lone.receive(OTHER, Fetched(put_key(1), small("again")))
    assert lone.runtime.get([ref], 0) == ["again"]


async def test_an_input_that_its_owner_has_freed_is_named(lone: LoneRuntime) -> None:
    given: ObjectRef[Any] = lone.runtime.objects.restore(Reference(OTHER, put_key(1)))
    [ref] = lone.runtime.submit(a_call(lone), (given,), {})
    lone.reactor.drain()
    lone.receive(OTHER, Fetched(put_key(1), Stored(FAR, "o1", 9)))
    lone.receive(WORKER, done(run(lone), Stored(NODE, "o2", 9)))
    del given
    lone.reactor.drain()
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    lone.receive(OTHER, Fetched(put_key(1), Failed("reference_counting", "it is gone")))
    with pytest.raises(ObjectReconstructionFailedBorrowedError, match=r"work\(\).*it is gone"):
        lone.runtime.get([ref], 0)


async def test_what_is_small_is_part_of_the_record(lone: LoneRuntime) -> None:
    [given] = made(lone, small("given"))
    [ref] = made(lone, Stored(NODE, "o2", 9), args=(given, [given]))
    del given
    lone.reactor.drain()
    assert list(lone.runtime.objects.owned) == [ref._state.key]
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    again = run(lone, FAR, FAR_WORKER)
    assert again.dependencies == (small("given"),), "and so its task does not run again"
    assert again.attempt == 1


async def test_a_generator_runs_again_up_to_the_last_item_that_was_lost(lone: LoneRuntime) -> None:
    [gen] = lone.runtime.submit(a_call(lone, returns=-1), (), {})
    task = run(lone)
    items: list[Value] = [
        Stored(NODE, "o1", 9),
        Stored(FAR, "o2", 9),
        Stored(NODE, "o3", 9),
        small("4"),
        Stored(NODE, "o5", 9),
    ]
    lone.receive(WORKER, *[Item(task.number, 0, index, item) for index, item in enumerate(items, 1)], done(task))
    refs = list(gen)
    del refs[4]
    lone.sent()
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, refs[0])
    again = run(lone, FAR, FAR_WORKER)
    assert (again.ahead, again.attempt) == (3, 1)
    fresh = [Item(task.number, 1, index, Stored(FAR, f"n{index}", 9)) for index in (1, 2, 3)]
    lone.receive(FAR_WORKER, *fresh)
    sent = lone.sent()
    assert (FAR_WORKER, StreamClosed(task.number)) in sent
    assert (FAR, SegmentFreed("n2")) in sent, "that item was not lost"
    lone.receive(FAR_WORKER, done(again))
    assert [ref._state.value for ref in refs] == [
        Stored(FAR, "n1", 9),
        Stored(FAR, "o2", 9),
        Stored(FAR, "n3", 9),
        small("4"),
    ]
    del refs, gen
    lone.reactor.drain()
    assert lone.reactor.recovery.is_quiet()


async def test_items_that_do_not_come_again_are_errors(lone: LoneRuntime) -> None:
    [gen] = lone.runtime.submit(a_call(lone, returns=-1), (), {})
    task = run(lone)
    lone.receive(WORKER, Item(task.number, 0, 1, Stored(NODE, "o1", 9)), done(task))
    [ref] = list(gen)
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    lone.receive(FAR_WORKER, done(run(lone, FAR, FAR_WORKER)))
    with pytest.raises(ObjectReconstructionFailedError, match="fewer items"):
        lone.runtime.get([ref], 0)


async def test_an_item_that_is_lost_while_the_generator_runs_waits_for_its_end(lone: LoneRuntime) -> None:
    [gen] = lone.runtime.submit(a_call(lone, returns=-1), (), {})
    task = run(lone)
    lone.receive(WORKER, Item(task.number, 0, 1, Stored(FAR, "o1", 9)))
    ref = next(gen)
    lone.reactor.node_died(FAR, "it was killed")
    await need(lone, ref)
    assert lone.sent(Task) == []
    lone.receive(WORKER, done(task))
    for _ in range(3):
        await asyncio.sleep(0)
    [(_, again)] = lone.sent(Task)
    lone.receive(WORKER, Item(task.number, 1, 1, Stored(NODE, "o2", 9)), done(again))
    assert ref._state.value == Stored(NODE, "o2", 9)


async def test_a_task_that_never_finds_its_arguments_ends(lone: LoneRuntime) -> None:
    given: ObjectRef[Any] = lone.runtime.objects.create(put_key(1000))
    count = 0

    async def restore(key: ObjectKey, remakable: bool) -> Stored:
        nonlocal count
        count += 1
        return Stored(HERE, f"o{count}", 9)

    lone.reactor.recovery.restore = restore
    given._state.value = Stored(HERE, "o0", 9)
    [ref] = lone.runtime.submit(a_call(lone), (given,), {})
    task = run(lone)
    while ref._state.value is None:
        (copy,) = task.dependencies
        assert isinstance(copy, Stored)
        lone.receive(WORKER, TaskDone(task.number, 0, task.lease, (), 0.001, missing=(copy,)))
        for _ in range(5):
            await asyncio.sleep(0)
        for _, task in lone.sent(Task):
            assert task.attempt == 0, "it was not run, and this costs no retry"
    assert ref._state.value.code == "object_lost"


async def test_arguments_of_a_task_go_with_its_end(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (1,), {})
    lone.reactor.drain()
    [task] = lone.reactor.tasks.values()
    task.wire.arguments = Stored(HERE, "o1", 1_000_000)
    lone.receive(WORKER, done(run(lone), small("done")))
    assert (HERE, SegmentFreed("o1")) in lone.sent(SegmentFreed)
    assert lone.runtime.get([ref], 0) == ["done"]


async def test_a_process_may_remember_nothing(lone: LoneRuntime) -> None:
    lone.reactor.recovery.lineage = Lineage(LOCAL, 0)
    [ref] = made(lone, Stored(NODE, "o1", 9))
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    with pytest.raises(ObjectReconstructionFailedLineageDisabledError, match="SHOAL_LINEAGE_BYTES"):
        lone.runtime.get([ref], 0)


ACTOR = actor_id(LOCAL, 1)
METHOD = MethodCall(ACTOR, "work", "Actor.work", 1, 2, b"")


def an_actor(lone: LoneRuntime, process: ProcessId = WORKER) -> ObjectRef[Any]:
    """Have an actor be known and alive; return the reference behind its handle."""
    handle: ObjectRef[Any] = lone.runtime.objects.create(put_key(5000))
    lone.runtime.follow(ACTOR, "Actor", handle, sequential=True, new=True)
    lone.reactor.drain()
    alive(lone, 0, process)
    return handle


def alive(lone: LoneRuntime, incarnation: int, process: ProcessId) -> None:
    news = ActorChanged(
        actor_id=ACTOR,
        state=ActorState.ALIVE,
        incarnation=incarnation,
        node_id=node_of(process),
        process_id=process,
        graceful=False,
        death=None,
    )
    lone.reactor.actors.calls.changed(news, 0.0)
    lone.reactor.finish()


async def test_a_call_is_made_again_before_those_that_may_wait_for_it(lone: LoneRuntime) -> None:
    handle = an_actor(lone)
    [ref] = lone.runtime.call_actor(METHOD, handle, (), {})
    [(_, call)] = lone.sent(Task)
    lone.receive(WORKER, done(call, Stored(NODE, "o1", 9)))
    lone.reactor.node_died(NODE, "it was killed")
    [user] = lone.runtime.call_actor(METHOD, handle, (ref,), {})
    await need(lone, user)
    alive(lone, 1, FAR_WORKER)
    [(_, again)] = lone.sent(Task)
    assert (again.number, again.attempt) == (call.number, 1)
    lone.receive(FAR_WORKER, done(again, Stored(FAR, "o2", 9)))
    [(_, using)] = lone.sent(Task)
    assert using.dependencies == (Stored(FAR, "o2", 9),)
    assert using.origins == (ref._state.wire(),), "so that the actor can ask for it, where it cannot read it"


async def test_what_an_actor_waits_for_is_not_asked_of_itself(lone: LoneRuntime) -> None:
    handle = an_actor(lone)
    [ref] = lone.runtime.call_actor(METHOD, handle, (), {})
    [(_, call)] = lone.sent(Task)
    lone.receive(WORKER, done(call, Stored(NODE, "o1", 9)))
    [_user] = lone.runtime.call_actor(METHOD, handle, (ref,), {})
    assert len(lone.sent(Task)) == 1
    lone.receive(WORKER, ObjectUnavailable(ref._state.key, NODE, "o1"), Fetch(ref._state.key))
    for _ in range(5):
        await asyncio.sleep(0)
    [(_, fetched)] = lone.sent(Fetched)
    assert fetched.value.code == "reconstruction_failed", "to wait for each other would have no end"


async def test_without_a_handle_nothing_is_asked_of_an_actor(lone: LoneRuntime) -> None:
    handle = an_actor(lone)
    [ref] = lone.runtime.call_actor(METHOD, handle, (), {})
    [(_, call)] = lone.sent(Task)
    lone.receive(WORKER, done(call, Stored(NODE, "o1", 9)))
    del handle
    lone.reactor.drain()
    lone.reactor.node_died(NODE, "it was killed")
    await need(lone, ref)
    with pytest.raises(ObjectReconstructionFailedError, match="no handle"):
        lone.runtime.get([ref], 0)
