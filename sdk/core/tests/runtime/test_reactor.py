"""What a process does with commands and records, one loop turn after the other, while the test plays everybody else."""

from __future__ import annotations

import asyncio
import gc
import pickle
import threading
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from shoal_core.protocol.errors import (
    ClusterUnreachableError,
    DeclaredDeadError,
    GetTimeoutError,
    LocalNodeDiedError,
    OwnerDiedError,
    ReferenceCountingAssertionError,
    SystemError_,
    WorkerCrashedError,
)
from shoal_core.protocol.ids import ActorId, FunctionId, LeaseId, ObjectKey, ProcessId, TaskNumber, object_key, task_of
from shoal_core.protocol.records import (
    Failed,
    Fetch,
    Fetched,
    Inline,
    LeaseGranted,
    Reference,
    SegmentFreed,
    Stored,
    Task,
    TaskDone,
    Unborrow,
    WorkerLost,
)
from shoal_core.runtime.loop import turns
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.runtime import Call, MethodCall, Runtime
from shoal_core.runtime.tasks.submission import SchedulingClass
from shoal_core.testing.builders import node_id, process_id, put_key
from shoal_core.testing.buses import until
from shoal_core.testing.runtimes import LoneRuntime, lone_runtime

NODE = node_id(1)
LOCAL = process_id(1)
WORKER = process_id(2)
OTHER = process_id(3, node=2)
ACTOR = ActorId("a" * 32)


@pytest.fixture
async def lone() -> AsyncIterator[LoneRuntime]:
    async with lone_runtime(LOCAL) as lone:
        yield lone


def a_call(lone: LoneRuntime, *, returns: int = 1, retries: int = 0) -> Call:
    key = lone.runtime.scheduling_key(SchedulingClass((("CPU", 10_000),)))
    return Call(FunctionId("f" * 32), "work", returns, key, retries, b"")


def grant(lone: LoneRuntime, lease: int = 1, worker: ProcessId = WORKER) -> None:
    """Give the lease that was asked for first."""
    lone.reactor.drain()
    [key] = lone.reactor.submission.keys.values()
    lone.receive(NODE, LeaseGranted(LeaseId(lease), key.index, next(iter(key.slots)), worker))


def the_task(lone: LoneRuntime) -> Task:
    [(_, task)] = lone.sent(Task)
    assert isinstance(task, Task)
    return task


def done(task: Task, *values: Inline | Failed | Stored, kept: Sequence[Reference] = ()) -> TaskDone:
    return TaskDone(task.number, task.attempt, task.lease, values, 0.001, kept=tuple(kept))


def value(of: object) -> Inline:
    return Inline(pickle.dumps(of, 5))


def borrowed(lone: LoneRuntime, number: int = 1, owner: ProcessId = OTHER) -> ObjectRef[object]:
    return lone.runtime.objects.restore(Reference(owner, put_key(number)))


async def turns_until(condition: object) -> None:
    """Let the loop run until something holds; the test's time limit is the only one."""
    assert callable(condition)
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_a_task_is_sent_to_the_worker_of_a_lease_and_its_result_is_the_objects_value(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (1,), {})
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert lone.runtime.get([ref], 0) == [42]


async def test_a_chain_of_tasks_fails_at_once_when_its_first_does(lone: LoneRuntime) -> None:
    call = a_call(lone)
    [first] = lone.runtime.submit(call, (), {})
    ref = first
    for _ in range(20):
        [ref] = lone.runtime.submit(call, (ref,), {})
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), Failed("worker_crashed", "it crashed")))
    with pytest.raises(WorkerCrashedError, match="it crashed"):
        lone.runtime.get([ref], 0)


async def test_get_raises_an_error_that_is_known_before_it_waits_for_anything(lone: LoneRuntime) -> None:
    call = a_call(lone)
    [slow] = lone.runtime.submit(call, (), {})
    [failed] = lone.runtime.submit(call, (), {})
    failed._state.value = Failed("worker_crashed", "it crashed")
    with pytest.raises(WorkerCrashedError):
        lone.runtime.get([slow, failed], None)


async def test_get_says_how_many_objects_were_not_ready(lone: LoneRuntime) -> None:
    call = a_call(lone)
    refs = [lone.runtime.submit(call, (), {})[0] for _ in range(3)]
    refs[1]._state.value = value(1)
    with pytest.raises(GetTimeoutError, match="2 of 3 objects"):
        lone.runtime.get(refs, 0)


async def test_a_dropped_result_is_forgotten_and_its_memory_given_back(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    task = the_task(lone)
    lone.receive(WORKER, done(task, Stored(NODE, "a-segment", 1000)))
    assert lone.sent() == []
    del ref
    assert lone.sent() == [(NODE, SegmentFreed("a-segment"))]
    assert not lone.runtime.objects.owned


async def test_the_loop_is_not_woken_for_a_small_result_dropped_at_once_and_forgets_it_all_the_same(
    lone: LoneRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs = [lone.runtime.submit(a_call(lone), (), {})[0] for _ in range(2)]
    grant(lone)
    await asyncio.sleep(0)  # what woke the loop up to now is over
    for _ in range(2):
        lone.receive(WORKER, done(the_task(lone), value(1)))
    woken: list[int] = []
    monkeypatch.setattr(lone.reactor, "wake", lambda: woken.append(len(refs)))
    refs.pop()
    assert len(lone.runtime.objects.owned) == 2
    await turns_until(lambda: len(lone.runtime.objects.owned) == 1)
    assert not woken
    refs.pop()  # so late that nothing else makes the loop look
    assert woken == [0]


async def test_the_memory_of_a_result_that_nobody_waits_for_any_more_is_given_back(lone: LoneRuntime) -> None:
    refs = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    task = the_task(lone)
    refs.clear()
    lone.sent()
    lone.receive(WORKER, done(task, Stored(NODE, "a-segment", 1000)))
    assert lone.sent() == [(NODE, SegmentFreed("a-segment"))]


async def test_a_second_result_of_a_task_is_discarded(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    task = the_task(lone)
    lone.receive(WORKER, done(task, value(1)), done(task, Stored(NODE, "a-segment", 1000)))
    assert lone.runtime.get([ref], 0) == [1]
    assert lone.sent() == [(NODE, SegmentFreed("a-segment"))]


async def test_references_inside_a_result_are_held_by_it(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    inner = Reference(WORKER, put_key(7))
    lone.receive(WORKER, done(the_task(lone), Inline(pickle.dumps([]), contained=(inner,))))
    gc.collect()
    assert lone.sent(Unborrow) == []
    del ref
    assert lone.sent() == []  # what the object contained is noticed in the next turn
    assert lone.sent() == [(WORKER, Unborrow(inner.key, 1))]
    assert lone.reactor.borrowing.is_quiet()


async def test_an_object_of_another_process_is_fetched_once(lone: LoneRuntime) -> None:
    ref = borrowed(lone)
    for _ in range(3):
        with pytest.raises(GetTimeoutError):
            lone.runtime.get([ref], 0)
    assert lone.sent() == [(OTHER, Fetch(ref._state.key))]
    lone.receive(OTHER, Fetched(ref._state.key, value("theirs")))
    assert lone.runtime.get([ref], 0) == ["theirs"]


async def test_an_owner_answers_a_fetch_when_the_object_is_ready(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    task = the_task(lone)
    lone.receive(OTHER, Fetch(ref._state.key))
    assert lone.sent() == []
    lone.receive(WORKER, done(task, value(1)))
    assert lone.sent() == [(OTHER, Fetched(ref._state.key, value(1)))]


async def test_asking_for_an_object_that_is_gone_is_answered_with_an_error(lone: LoneRuntime) -> None:
    key = object_key(TaskNumber(99), 1)
    lone.receive(OTHER, Fetch(key))
    [(_, fetched)] = lone.sent()
    assert fetched.value.code == "reference_counting"
    ref = borrowed(lone)
    lone.receive(OTHER, Fetched(ref._state.key, fetched.value))
    with pytest.raises(ReferenceCountingAssertionError):
        lone.runtime.get([ref], 0)


async def test_objects_of_a_process_that_died_are_lost(lone: LoneRuntime) -> None:
    ref = borrowed(lone)
    with pytest.raises(GetTimeoutError):
        lone.runtime.get([ref], 0)
    lone.reactor.drain()
    lone.reactor.process_died(OTHER)
    await turns_until(lambda: ref._state.value is not None)
    with pytest.raises(OwnerDiedError, match=OTHER):
        lone.runtime.get([ref], 0)


async def test_what_a_process_said_last_is_heard_after_its_death_is_known(lone: LoneRuntime) -> None:
    ref = borrowed(lone)
    lone.reactor.process_died(OTHER)
    lone.receive(OTHER, Fetched(ref._state.key, value("last words")))
    await turns_until(lambda: OTHER in lone.peers.forgotten)
    assert lone.runtime.get([ref], 0) == ["last words"]


async def test_nobody_waits_for_an_object_whose_owner_was_dead_before(lone: LoneRuntime) -> None:
    lone.reactor.node_died(node_id(2), "silence")
    ref = borrowed(lone)
    with pytest.raises(GetTimeoutError):
        lone.runtime.get([ref], 0)
    lone.reactor.drain()
    await turns_until(lambda: ref._state.value is not None)
    with pytest.raises(OwnerDiedError):
        lone.runtime.get([ref], 0)


async def test_a_crash_fails_the_task_that_had_begun_and_runs_the_others_elsewhere(lone: LoneRuntime) -> None:
    call = a_call(lone)
    [warm] = lone.runtime.submit(call, (), {})
    grant(lone)
    first = the_task(lone)
    lone.receive(WORKER, TaskDone(first.number, 0, first.lease, (value(0),), 0.0001))
    refs = [lone.runtime.submit(call, (), {})[0] for _ in range(3)]
    tasks = [task for _, task in lone.sent(Task)]
    assert [task.number for task in tasks] == [first.number + 2 * n for n in (1, 2, 3)]
    lone.receive(NODE, WorkerLost(LeaseId(1), tasks[0].position, "killed"))
    await turns_until(lambda: refs[0]._state.value is not None)
    with pytest.raises(WorkerCrashedError, match=r"work.* failed after 1 attempt: killed"):
        lone.runtime.get([refs[0]], 0)
    grant(lone, lease=2)
    again = [task for _, task in lone.sent(Task)]
    assert [task.number for task in again] == [task.number for task in tasks[1:]]
    assert [task.attempt for task in again] == [0, 0]
    del warm


async def test_a_result_that_comes_just_after_the_news_of_a_crash_counts(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    task = the_task(lone)
    lone.receive(NODE, WorkerLost(task.lease, task.position, "killed"))
    lone.reactor.process_died(WORKER)
    lone.receive(WORKER, done(task, value(1)))
    await turns_until(lambda: WORKER in lone.peers.forgotten)
    assert lone.runtime.get([ref], 0) == [1]


async def test_the_future_of_a_reference_that_nobody_else_holds_is_fulfilled(lone: LoneRuntime) -> None:
    future = lone.runtime.submit(a_call(lone), (), {})[0].future()
    gc.collect()
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert await asyncio.wrap_future(future) == 42


class SaysWhere:
    """Notes which thread unpickles it."""

    def __reduce__(self) -> tuple[object, ...]:
        return threading.get_ident, ()


async def test_values_for_futures_are_not_unpickled_on_the_io_thread(lone: LoneRuntime) -> None:
    future = lone.runtime.put(SaysWhere()).future()
    assert await asyncio.wrap_future(future) != threading.get_ident()


async def test_a_reference_can_be_awaited(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})

    async def wait_for_it() -> object:
        return await ref

    waiting = asyncio.ensure_future(wait_for_it())
    await asyncio.sleep(0)
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert await waiting == 42


async def test_an_object_that_was_awaited_in_a_loop_that_is_closed_hurts_nobody(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})

    def wait_elsewhere() -> None:
        async def give_up() -> None:
            async def wait_for_it() -> object:
                return await ref

            waiting = asyncio.ensure_future(wait_for_it())
            await asyncio.sleep(0)
            waiting.cancel()

        asyncio.run(give_up())

    await asyncio.to_thread(wait_elsewhere)
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert lone.runtime.get([ref], 0) == [42]


async def test_who_waits_when_the_process_leaves_gets_an_error(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    future = ref.future()
    waiting = asyncio.create_task(asyncio.to_thread(lone.runtime.get, [ref], None))
    await turns_until(lambda: ref._state.waiters is not None)
    lone.reactor.drain()
    lone.runtime.close()
    with pytest.raises(SystemError_, match="left the cluster"):
        await waiting
    with pytest.raises(SystemError_, match="left the cluster"):
        await asyncio.wrap_future(future)


async def test_who_waits_after_the_process_left_gets_an_error(lone: LoneRuntime) -> None:
    lone.runtime.close()
    ref = lone.runtime.objects.create(ObjectKey(1 << 24 | 1))
    with pytest.raises(SystemError_, match="left the cluster"):
        lone.runtime.get([ref], None)


async def test_a_process_that_left_submits_nothing_more(lone: LoneRuntime) -> None:
    lone.runtime.close(Failed("declared_dead", "job 1 was ended"))
    lone.runtime.close()  # the first reason stands
    with pytest.raises(DeclaredDeadError, match="job 1 was ended"):
        lone.runtime.submit(a_call(lone), (), {})


async def test_a_process_whose_own_node_died_leaves_nobody_waiting(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    theirs = borrowed(lone)
    lone.reactor.send(WORKER, Fetch(ref._state.key))
    future = asyncio.wrap_future(ref.future())
    waiting = [asyncio.create_task(asyncio.to_thread(lone.runtime.get, [one], None)) for one in (ref, theirs)]
    await turns_until(lambda: all(one._state.waiters is not None for one in (ref, theirs)))
    lone.reactor.node_died(NODE, "it was pulled out")
    for one in (*waiting, future, asyncio.ensure_future(ref)):
        with pytest.raises(LocalNodeDiedError, match=r"it was pulled out.*shutdown\(\) and init\(\)"):
            await one
    assert {NODE, WORKER} <= lone.peers.forgotten
    with pytest.raises(LocalNodeDiedError):
        lone.runtime.submit(a_call(lone), (), {})
    for value in (1, b"x" * 10_000_000):
        with pytest.raises(LocalNodeDiedError):
            await asyncio.to_thread(lone.runtime.put, value)
    lone.reactor.node_died(node_id(2), "nobody cares any more")


async def test_the_death_of_another_node_ends_nothing_here(lone: LoneRuntime) -> None:
    lone.reactor.node_died(node_id(2), "it was pulled out")
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert lone.runtime.get([ref], 0) == [42]


async def test_a_request_under_way_fails_when_the_process_leaves(lone: LoneRuntime) -> None:
    never = asyncio.get_running_loop().create_future()

    async def ask() -> None:
        await never

    asking = asyncio.create_task(asyncio.to_thread(lone.runtime.call, ask()))
    await turns_until(lambda: lone.reactor.asking)
    lone.runtime.close(Failed("local_node_died", "pulled out"))
    with pytest.raises(LocalNodeDiedError, match="pulled out"):
        await asking
    assert never.cancelled()
    assert not lone.reactor.asking


async def test_a_reference_that_is_awaited_after_the_process_left_raises_why(lone: LoneRuntime) -> None:
    lone.runtime.close(Failed("local_node_died", "pulled out"))
    ref = borrowed(lone)
    with pytest.raises(LocalNodeDiedError, match="pulled out"):
        await ref
    future = await asyncio.to_thread(ref.future)
    with pytest.raises(LocalNodeDiedError, match="pulled out"):
        await asyncio.wrap_future(future)


async def test_who_asked_to_be_called_just_before_the_process_left_is_called(lone: LoneRuntime) -> None:
    ref = borrowed(lone)
    awaiting = asyncio.ensure_future(ref)
    await asyncio.sleep(0)
    assert lone.reactor.commands  # nobody has come to it yet
    lone.runtime.close(Failed("local_node_died", "pulled out"))
    with pytest.raises(LocalNodeDiedError, match="pulled out"):
        await awaiting


def away() -> ClusterUnreachableError:
    return ClusterUnreachableError("the broker is away")


async def test_an_obstacle_is_raised_by_whoever_waits_and_loses_nothing(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    future = asyncio.wrap_future(ref.future())
    awaiting = asyncio.ensure_future(ref)
    blocked = asyncio.create_task(asyncio.to_thread(lone.runtime.get, [ref], None))
    await turns_until(lambda: ref._state.waiters is not None)
    lone.reactor.drain()
    lone.runtime.obstruct(away)
    for waiting in (blocked, awaiting, future):
        with pytest.raises(ClusterUnreachableError, match="away"):
            await waiting
    with pytest.raises(ClusterUnreachableError, match="away"):
        await asyncio.to_thread(lone.runtime.get, [ref], None)
    with pytest.raises(ClusterUnreachableError, match="away"):
        await asyncio.to_thread(lone.runtime.wait, [ref], 1, None)
    lone.runtime.obstruct(None)
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert lone.runtime.get([ref], 0) == [42]
    assert not lone.reactor.notifying


async def test_who_gives_up_awaiting_leaves_nothing_behind(lone: LoneRuntime) -> None:
    [ref] = lone.runtime.submit(a_call(lone), (), {})
    waiting = [asyncio.ensure_future(ref) for _ in range(10)]
    await turns_until(lambda: len(lone.reactor.notifying) == 10)
    for one in waiting[1:]:
        one.cancel()
    await turns_until(lambda: len(lone.reactor.notifying) == 1)
    assert ref._state.observers is not None
    assert len(ref._state.observers) == 1
    grant(lone)
    lone.receive(WORKER, done(the_task(lone), value(42)))
    assert await waiting[0] == 42
    assert not lone.reactor.notifying


async def test_what_is_ready_is_read_in_spite_of_an_obstacle(lone: LoneRuntime) -> None:
    ref = lone.runtime.put(7)
    lone.runtime.obstruct(away)
    assert lone.runtime.get([ref], None) == [7]
    assert await ref == 7


async def test_arguments_that_cannot_be_pickled_are_named(lone: LoneRuntime) -> None:
    lock = threading.Lock()
    call = a_call(lone)
    with pytest.raises(TypeError, match=r"work\.remote\(\) .* argument 1, .*lock.* cannot be pickled"):
        lone.runtime.submit(call, (1, lock), {})
    with pytest.raises(TypeError, match=r"work\.remote\(\) .* here, .*lock.* cannot be pickled"):
        lone.runtime.submit(call, (1,), {"here": [lock]})


async def test_the_culprit_among_arguments_is_shown_in_short(lone: LoneRuntime) -> None:
    with pytest.raises(TypeError) as caught:
        lone.runtime.submit(a_call(lone), ([list(range(100_000)), threading.Lock()],), {})
    assert len(str(caught.value)) < 1000


async def test_large_arguments_give_their_memory_back_when_the_task_has_ended(lone: LoneRuntime) -> None:
    (ref,) = lone.runtime.submit(a_call(lone), (), {})
    lone.sent()
    task = lone.reactor.tasks[task_of(ref._state.key)]
    task.wire.arguments = Stored(NODE, "o7", 1_000_000)
    lone.reactor.fail(task, Failed("system", "over"))
    assert lone.sent(SegmentFreed) == [(NODE, SegmentFreed("o7"))]


async def test_what_lay_in_a_segment_of_a_dead_owner_is_lost(lone: LoneRuntime) -> None:
    stored, inlined = Reference(OTHER, put_key(1)), Reference(OTHER, put_key(2))
    refs = lone.reactor.sharing.adopt([stored, inlined], OTHER)
    lone.receive(OTHER, Fetched(stored.key, Stored(NODE, "o7", 1_000_000)))
    lone.receive(OTHER, Fetched(inlined.key, Inline(pickle.dumps("kept"))))
    lone.reactor._dead.add(OTHER)
    lone.reactor._bury(OTHER)
    with pytest.raises(GetTimeoutError):
        lone.runtime.get([refs[0]], 0)
    lone.reactor.drain()
    await turns_until(lambda: type(refs[0]._state.value) is Failed)
    with pytest.raises(OwnerDiedError):
        lone.runtime.get([refs[0]], 0)
    assert lone.runtime.get([refs[1]], 0) == ["kept"]


async def test_a_failure_of_a_task_keeps_what_its_exception_refers_to(lone: LoneRuntime) -> None:
    inner = Reference(OTHER, put_key(1))
    (first,) = lone.runtime.submit(a_call(lone), (), {})
    (second,) = lone.runtime.submit(a_call(lone), (first,), {})
    lone.sent()
    task = lone.reactor.tasks[task_of(first._state.key)]
    lone.reactor._settle_returns(task, [Failed("task", "text", b"", (inner,))], OTHER)
    lone.reactor.finish()
    assert [ref._state.wire() for ref in first._state.contents] == [inner]
    assert [ref._state.wire() for ref in second._state.contents] == [inner]
    del first, second
    lone.sent()
    gc.collect()
    assert lone.sent(Unborrow) == [(OTHER, Unborrow(inner.key, 1))]
    assert lone.reactor.borrowing.is_quiet()


def test_what_has_not_ended_when_a_process_leaves_does_not_keep_it_in_memory() -> None:
    """Tasks and calls hold references, which hold the runtime, and the collector goes through no task and no call."""

    async def leave() -> weakref.ref[Runtime]:
        async with lone_runtime(LOCAL) as lone:
            handle: ObjectRef[object] = lone.runtime.objects.create(put_key(5000))
            lone.runtime.follow(ACTOR, "Actor", handle, sequential=True, new=True)
            never = borrowed(lone)
            call = a_call(lone)
            lone.runtime.submit(call, ([never],), {})
            grant(lone)
            lone.runtime.submit(call, ([never],), {})
            lone.runtime.submit(call, (never,), {})
            lone.runtime.call_actor(MethodCall(ACTOR, "work", "Actor.work", 1, 0, b""), handle, ([never],), {})
            lone.sent()
            assert len(lone.reactor.tasks) == 4
            return weakref.ref(lone.runtime)

    gone = asyncio.run(leave())
    gc.collect()
    assert gone() is None


async def test_an_interruption_while_the_loop_is_woken_leaves_it_to_the_next_to_wake_it(
    lone: LoneRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C may raise anywhere in the main thread: between a note that the loop is woken and the waking, too."""

    leave, interruptions = turns.leave, [KeyboardInterrupt]

    def interrupted(*arguments: Any) -> None:
        if interruptions:
            raise interruptions.pop()
        leave(*arguments)

    monkeypatch.setattr(turns, "leave", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lone.runtime.submit(a_call(lone), (), {})
    with monkeypatch.context() as patched:
        interruptions.append(KeyboardInterrupt)
        patched.setattr(lone.reactor, "later", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lone.reactor.unpin("a", 1)
    refs = lone.runtime.submit(a_call(lone), (), {})
    lone.reactor.unpin("b", 2)
    await until(lambda: len(lone.reactor.tasks) == 2 and not lone.reactor.unpinned)
    assert refs
