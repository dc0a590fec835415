"""Where tasks go: every order of grants, results, returns, recalls, crashes and passing time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shoal_core.protocol.ids import FunctionId, LeaseId, NodeId, PeerId, PlacementGroupId, ProcessId, SlotId, TaskNumber
from shoal_core.protocol.placement import DEFAULT, SPREAD, Bundle, NodeAffinity
from shoal_core.protocol.records import (
    Inline,
    LeaseGranted,
    LeaseReturned,
    Record,
    Stored,
    Task,
    TaskDone,
    TasksReturned,
    WorkerLost,
)
from shoal_core.protocol.traces import UNRECORDED, TraceParent, is_recorded
from shoal_core.runtime.reports.spans import queueing_of
from shoal_core.runtime.tasks.submission import (
    CANCELLED,
    IDLE_SECONDS,
    LARGE_BYTES,
    MOST_IN_FLIGHT,
    MOST_SLOTS,
    OVERRUN_SECONDS,
    REPEAT_SECONDS,
    TURN_SECONDS,
    PendingTask,
    SchedulingClass,
    SchedulingKey,
    Submission,
)
from shoal_core.testing.builders import node_id, process_id

IN_GROUP = SchedulingClass((("CPU", 10_000),), Bundle(PlacementGroupId("a" * 32), 0))
CLASSES = (SchedulingClass((("CPU", 10_000),)), SchedulingClass((("GPU", 10_000),), SPREAD), IN_GROUP)
NODES = (node_id(1), node_id(2))
Place = tuple[NodeId, LeaseId]
TRACE = str(TraceParent(1, 2))
TRACES = ("", TRACE, UNRECORDED)


@dataclass
class Pushed:
    """A task as it was when it was pushed."""

    number: TaskNumber
    attempt: int
    position: int


@dataclass
class Worker:
    """A leased worker process: what it was sent and has neither ended nor returned; it runs the first."""

    node: NodeId
    lease: LeaseId
    process: ProcessId
    tasks: list[Pushed] = field(default_factory=list)
    last_position: int = 0
    blocked: bool = False
    recalled: bool = False
    gave_back: bool = False


@dataclass
class Fate:
    """What became of a task."""

    task: PendingTask
    max_retries: int
    ended: int = 0
    used: int = 0
    cancelled: bool = False


class World:
    """A submission, the nodes and workers it deals with, and the clock."""

    def __init__(self) -> None:
        self.submission = Submission()
        self.now = 100.0
        self.fates: dict[TaskNumber, Fate] = {}
        self.workers: dict[Place, Worker] = {}
        self.gone: list[Worker] = []
        self.leases: Counter[NodeId] = Counter()
        self.old_slots: list[tuple[int, SlotId]] = []
        self.traced: set[TaskNumber] = set()
        """The traced tasks that wait, as far as it was told."""

    # ------------------------------------------------------------------------------- inputs

    def submit(
        self, scheduling_class: SchedulingClass, function: str, max_retries: int, *large: tuple[NodeId, int]
    ) -> Fate:
        """Submit a task with arguments of so many bytes on these nodes."""
        number = TaskNumber(len(self.fates) + 1)
        wire = Task(number, 0, LeaseId(0), 0, FunctionId(function), function, 1, Inline(b""))
        wire.dependencies = tuple(Stored(node, f"o{number}", size) for node, size in large)
        wire.trace = TRACES[number % len(TRACES)]
        task = PendingTask(wire, self.submission.key_for(scheduling_class), max_retries)
        task.queueing = queueing_of(wire, ())
        if task.queueing is not None:
            self.traced.add(number)
        fate = self.fates[number] = Fate(task, max_retries)
        self.submission.enqueue(task)
        self.turn()
        return fate

    def slots(self) -> list[tuple[int, SlotId]]:
        return [(key.index, slot) for key in self.submission.keys.values() for slot in key.slots]

    def grant(self, key: int, slot: SlotId, node: NodeId = NODES[0]) -> Worker:
        self.leases[node] += 1
        lease = LeaseId(self.leases[node])
        worker = Worker(node, lease, process_id(lease, int(node, 16)))
        self.workers[node, lease] = worker
        self.old_slots.append((key, slot))
        self.submission.granted(node, LeaseGranted(lease, key, slot, worker.process), self.now)
        self.turn()
        return worker

    def end(self, worker: Worker, *, seconds: float = 0.001, retryable: bool = False) -> None:
        """End the task that runs at a worker."""
        pushed = worker.tasks.pop(0)
        worker.gave_back = False
        self.result(worker, pushed, seconds=seconds, retryable=retryable)
        self.turn()

    def result(self, worker: Worker, pushed: Pushed, *, seconds: float = 0.001, retryable: bool = False) -> None:
        fate = self.fates[pushed.number]
        retries, attempt = fate.task.retries, fate.task.wire.attempt
        done = TaskDone(pushed.number, pushed.attempt, worker.lease, (Inline(b""),), seconds, retryable)
        ended = self.submission.done(worker.process, done, self.now)
        if ended is not None:
            assert ended is fate.task
            assert not (retryable and retries)
            fate.ended += 1
        elif fate.task.wire.attempt != attempt:
            assert retryable
            fate.used += 1

    def give_back(self, worker: Worker, *, blocked: bool) -> None:
        """Return what a worker has not begun."""
        returned = worker.tasks[1:]
        del worker.tasks[1:]
        worker.gave_back = True
        numbers = [pushed.number for pushed in returned]
        self.submission.returned(worker.process, TasksReturned(worker.lease, numbers, blocked))
        self.turn()

    def block(self, worker: Worker, *, blocked: bool) -> None:
        worker.blocked = blocked
        self.submission.blocked(worker.process, worker.lease, blocked)
        self.turn()

    def recall(self, worker: Worker) -> None:
        worker.recalled = True
        self.submission.recalled(worker.node, worker.lease)
        self.turn()

    def lose(self, worker: Worker, begun: int) -> None:
        """End a worker process; ``begun`` of the tasks it has were begun."""
        del self.workers[worker.node, worker.lease]
        self.gone.append(worker)
        last = worker.tasks[begun - 1].position if begun else 0
        attempts = {pushed.number: self.fates[pushed.number].task.wire.attempt for pushed in worker.tasks}
        self.submission.lost(worker.node, WorkerLost(worker.lease, last, "killed"))
        for index, pushed in enumerate(worker.tasks):
            fate = self.fates[pushed.number]
            free = index >= begun
            if fate.cancelled:
                assert fate.task.wire.attempt == attempts[pushed.number], "what was cancelled is never tried again"
                continue
            assert free is (fate.task.wire.attempt == attempts[pushed.number] and not self._failed(fate))
            fate.used += fate.task.wire.attempt - attempts[pushed.number]
        self.turn()

    def lose_node(self, node: NodeId) -> None:
        attempts = {number: fate.task.wire.attempt for number, fate in self.fates.items()}
        for worker in [worker for worker in self.workers.values() if worker.node == node]:
            del self.workers[worker.node, worker.lease]
            self.gone.append(worker)
        self.submission.node_lost(node, "it is gone")
        for number, fate in self.fates.items():
            fate.used += fate.task.wire.attempt - attempts[number]
        self.turn()

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.submission.tick(self.now)
        self.turn()

    def cancel(self, fate: Fate) -> Worker | None:
        """Cancel a task; return the worker that is to be told."""
        task = fate.task
        queued = task in task.key.queue
        worker = next((w for w in self.workers.values() if any(p.number == task.wire.number for p in w.tasks)), None)
        process = self.submission.cancel(task)
        if not fate.ended:
            assert process == (None if worker is None else worker.process)
            if process is None:
                assert queued
                fate.ended += 1
        fate.cancelled = True
        self.turn()
        return worker

    def end_cancelled(self, worker: Worker) -> None:
        """Answer what a worker had not begun, or what it was interrupted in."""
        for pushed in [pushed for pushed in worker.tasks if self.fates[pushed.number].cancelled]:
            worker.tasks.remove(pushed)
            self.result(worker, pushed, seconds=0.0)
        self.turn()

    def _failed(self, fate: Fate) -> bool:
        return any(task is fate.task for task, _ in self.submission.failed)

    # ------------------------------------------------------------------------------- outputs

    def turn(self) -> None:
        """Do what the reactor does at the end of each turn."""
        submission = self.submission
        submission.pump(self.now)
        failed, submission.failed = submission.failed, []
        for task, failure in failed:
            fate = self.fates[task.wire.number]
            assert fate.task is task
            assert task.retries == 0
            assert fate.cancelled or failure.code != CANCELLED
            fate.ended += 1
        again, submission.again = submission.again, []
        for task in [task for task, _ in again if task.queueing is not None]:
            assert task.wire.number not in self.traced, "what waits again was sent before"
            self.traced.add(task.wire.number)
        pushed, submission.pushed = submission.pushed, []
        told = [(worker, task.wire) for task, worker in pushed]
        outgoing, submission.outgoing = submission.outgoing, []
        tasks = [(peer, record) for peer, record in outgoing if isinstance(record, Task)]
        traced = [(peer, record) for peer, record in tasks if is_recorded(record.trace)]
        assert told == traced, "of each traced task is told where it goes"
        for peer, record in outgoing:
            self._sent(peer, record)
        if submission.demand_changed:
            submission.demand(self.now)
        self.check()

    def _sent(self, peer: PeerId, record: Record) -> None:
        if isinstance(record, LeaseReturned):
            worker = self.workers.pop((NodeId(peer), record.lease))
            assert not worker.tasks, "a lease goes back with nothing in flight"
            return
        assert isinstance(record, Task)
        [worker] = [worker for worker in self.workers.values() if worker.process == peer]
        assert record.lease == worker.lease
        assert not any((worker.blocked, worker.recalled, worker.gave_back))
        assert record.position > worker.last_position
        worker.last_position = record.position
        assert is_recorded(record.trace) == (record.number in self.traced), "of each traced task is told that it waits"
        self.traced.discard(record.number)
        assert not self.fates[record.number].cancelled, "what was cancelled is never pushed again"
        worker.tasks.append(Pushed(record.number, record.attempt, record.position))

    # ------------------------------------------------------------------------------- what always holds

    def check(self) -> None:
        places: Counter[TaskNumber] = Counter()
        for key in self.submission.keys.values():
            places.update(task.wire.number for task in key.queue)
            for place, lease in key.leases.items():
                assert list(lease.in_flight) == [pushed.number for pushed in self.workers[place].tasks]
                assert len(lease.in_flight) <= MOST_IN_FLIGHT
                places.update(lease.in_flight.keys())
            self._check_demand(key)
            assert key.traced is None or (key.traced in key.queue and is_recorded(key.traced.wire.trace))
        for number, fate in self.fates.items():
            assert fate.ended in (0, 1), "a task ends once"
            assert places[number] + fate.ended == 1, "a task is in one place, until it ends"
            assert fate.used == fate.task.wire.attempt
            if fate.cancelled:
                assert fate.task.retries == 0
            elif fate.max_retries >= 0:
                assert fate.used + fate.task.retries == fate.max_retries

    def _check_demand(self, key: SchedulingKey) -> None:
        assert len(key.slots) <= MOST_SLOTS
        if not key.queue:
            assert not key.slots, "nothing is asked for that nobody needs"
        elif not any(lease.is_open for lease in key.leases.values()):
            assert key.slots, "what is queued has a lease to go to, or one is asked for"

    # ------------------------------------------------------------------------------- the end

    def settle(self) -> None:
        """Let everything run to its end; then nothing may be left."""
        for worker in list(self.workers.values()):
            if worker.blocked:
                self.block(worker, blocked=False)
        for _ in range(100 + 4 * len(self.fates)):
            for key, slot in self.slots()[:1]:
                self.grant(key, slot)
            for worker in list(self.workers.values()):
                if worker.tasks:
                    self.end(worker)
            self.pass_time(0.001)
        assert all(fate.ended == 1 for fate in self.fates.values()), "every task ends"
        self.pass_time(IDLE_SECONDS + 0.001)
        assert not self.workers, "every lease goes back"
        self.pass_time(REPEAT_SECONDS + 0.001)
        assert self.submission.quiet()
        assert IN_GROUP not in self.submission.keys, "what groups leave behind is forgotten"


index = st.integers(0, 1000)


class SubmissionMachine(RuleBasedStateMachine):
    """Any history of one owner."""

    @initialize()
    def start(self) -> None:
        self.world = World()

    def worker(self, which: int) -> Worker | None:
        workers = list(self.world.workers.values())
        return workers[which % len(workers)] if workers else None

    @rule(
        scheduling_class=st.sampled_from(CLASSES),
        function=st.sampled_from(["short", "long"]),
        max_retries=st.sampled_from([0, 0, 1, 2, -1]),
        count=st.sampled_from([1, 1, 1, 5, 40]),
        large=st.lists(st.tuples(st.sampled_from(NODES), st.sampled_from([1000, LARGE_BYTES])), max_size=2),
    )
    def submit(
        self,
        scheduling_class: SchedulingClass,
        function: str,
        max_retries: int,
        count: int,
        large: list[tuple[NodeId, int]],
    ) -> None:
        for _ in range(count):
            self.world.submit(scheduling_class, function, max_retries, *large)

    @rule(which=index, node=st.sampled_from(NODES))
    def grant(self, which: int, node: NodeId) -> None:
        slots = self.world.slots()
        if slots:
            self.world.grant(*slots[which % len(slots)], node)

    @rule(which=index, node=st.sampled_from(NODES))
    def grant_again(self, which: int, node: NodeId) -> None:
        """Two schedulers asked two nodes for the same slot, or the slot was withdrawn meanwhile."""
        slots = self.world.old_slots
        if slots:
            self.world.grant(*slots[which % len(slots)], node)

    @rule(which=index, retryable=st.booleans(), seconds=st.sampled_from([0.00001, 0.001, 0.05, 3.0]))
    def end(self, which: int, retryable: bool, seconds: float) -> None:
        worker = self.worker(which)
        if worker is not None and worker.tasks:
            if worker.blocked:
                self.world.block(worker, blocked=False)
            self.world.end(worker, seconds=seconds, retryable=retryable)

    @rule(which=index)
    def cancel(self, which: int) -> None:
        """Cancel any task, also one that has ended, and also twice."""
        fates = list(self.world.fates.values())
        if fates:
            self.world.cancel(fates[which % len(fates)])

    @rule(which=index)
    def the_cancelled_end(self, which: int) -> None:
        worker = self.worker(which)
        if worker is not None:
            self.world.end_cancelled(worker)

    @rule(which=index)
    def overrun(self, which: int) -> None:
        worker = self.worker(which)
        if worker is not None and len(worker.tasks) > 1:
            self.world.give_back(worker, blocked=False)

    @rule(which=index)
    def block(self, which: int) -> None:
        worker = self.worker(which)
        if worker is not None and worker.tasks:
            self.world.block(worker, blocked=True)
            if worker.tasks[1:]:
                self.world.give_back(worker, blocked=True)

    @rule(which=index)
    def unblock(self, which: int) -> None:
        worker = self.worker(which)
        if worker is not None and worker.blocked:
            self.world.block(worker, blocked=False)

    @rule(which=index)
    def recall(self, which: int) -> None:
        worker = self.worker(which)
        if worker is not None:
            self.world.recall(worker)

    @rule(which=index, begun=index)
    def crash(self, which: int, begun: int) -> None:
        worker = self.worker(which)
        if worker is not None:
            self.world.lose(worker, begun % (len(worker.tasks) + 1))

    @rule(node=st.sampled_from(NODES), sure=st.sampled_from([False, False, True]))
    def lose_node(self, node: NodeId, sure: bool) -> None:
        if sure:
            self.world.lose_node(node)

    @rule(which=index, retryable=st.booleans())
    def late_result(self, which: int, retryable: bool) -> None:
        """The result of a worker that is known to be dead."""
        late = [(worker, pushed) for worker in self.world.gone for pushed in worker.tasks]
        if late:
            worker, pushed = late[which % len(late)]
            ended = {number: fate.ended for number, fate in self.world.fates.items()}
            self.world.result(worker, pushed, retryable=retryable)
            assert ended == {number: fate.ended for number, fate in self.world.fates.items()}
            self.world.turn()

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.2, 0.3, 2.0]))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def everything_is_in_its_place(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


SubmissionMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestSubmissionMachine = SubmissionMachine.TestCase


def test_long_tasks_are_not_stacked_up_behind_each_other() -> None:
    world = World()
    for _ in range(10):
        world.submit(CLASSES[0], "long", 0)
    worker = world.grant(*world.slots()[0])
    assert len(worker.tasks) == 1, "nothing is known of the function"
    world.end(worker, seconds=3.0)
    assert len(worker.tasks) == 1, "one is enough to be busy"


def test_short_tasks_travel_in_bulk_and_are_shared_out() -> None:
    world = World()
    world.submit(CLASSES[0], "short", 0)
    first = world.grant(*world.slots()[0])
    world.end(first, seconds=0.0)
    for _ in range(100):
        world.submit(CLASSES[0], "short", 0)
    assert len(first.tasks) == 100
    world.give_back(first, blocked=False)
    second = world.grant(*world.slots()[0])
    assert len(second.tasks) == 99


def test_tasks_that_come_back_keep_their_order() -> None:
    world = World()
    world.submit(CLASSES[0], "short", 0)
    worker = world.grant(*world.slots()[0])
    world.end(worker, seconds=0.0)
    for _ in range(5):
        world.submit(CLASSES[0], "short", 0)
    world.lose(worker, 0)
    assert [task.wire.number for task in world.submission.key_for(CLASSES[0]).queue] == [2, 3, 4, 5, 6]


def test_a_lease_whose_task_takes_long_is_not_counted_on() -> None:
    """It looked as if the function were quick, so the open lease seemed to be worth more than what is queued."""
    world = World()
    world.submit(CLASSES[0], "varies", 0)
    world.submit(CLASSES[0], "varies", 0)
    workers = [world.grant(*slot) for slot in world.slots()]
    for worker in workers:
        world.end(worker, seconds=0.011)
    world.submit(CLASSES[0], "varies", 0)
    world.submit(CLASSES[0], "varies", 0)
    assert [len(worker.tasks) for worker in workers] == [1, 1]
    world.submit(CLASSES[0], "varies", 0)
    for _ in range(10):
        world.pass_time(OVERRUN_SECONDS / 4)
    assert world.slots(), "a third worker is asked for"
    world.end(workers[0], seconds=0.3)
    assert len(workers[0].tasks) == 1, "who gets free first, takes it"


def test_demand_names_what_waits_and_is_repeated() -> None:
    world = World()
    submission = world.submission
    world.submit(CLASSES[0], "short", 0)
    world.submit(CLASSES[1], "long", 0)
    entries = submission.demand(world.now)
    assert [(entry.name, entry.wanted, entry.resources, entry.strategy) for entry in entries] == [
        ("short", 1, {"CPU": 10_000}, DEFAULT),
        ("long", 1, {"GPU": 10_000}, SPREAD),
    ]
    assert not submission.demand_changed
    submission.tick(world.now + REPEAT_SECONDS / 2)
    assert not submission.demand_changed
    submission.tick(world.now + REPEAT_SECONDS)
    assert submission.demand_changed
    assert submission.demand(world.now) == entries


def test_demand_names_the_trace_of_a_task_that_waits() -> None:
    world = World()
    traced = world.submit(CLASSES[0], "f", 0)
    world.submit(CLASSES[0], "f", 0)
    assert [entry.trace for entry in world.submission.demand(world.now)] == [traced.task.wire.trace] == [TRACE]
    world.grant(*world.slots()[0])
    assert [entry.trace for entry in world.submission.demand(world.now)] == [""], "it waits no more"


def test_of_a_traced_task_whose_attempt_was_lost_is_told_how() -> None:
    world = World()
    fate = world.submit(CLASSES[0], "f", 1)
    worker = world.grant(*world.slots()[0])
    world.submission.lost(worker.node, WorkerLost(worker.lease, 1, "it was killed"))
    [(task, failure)] = world.submission.again
    assert task is fate.task
    assert failure is not None
    assert failure.code == "worker_crashed"


def test_of_a_lost_attempt_it_is_told_how_also_where_nothing_is_traced() -> None:
    world = World()
    fates = [world.submit(CLASSES[0], "f", 1) for _ in range(2)]
    worker = [world.grant(*slot) for slot in world.slots()][1]
    assert fates[1].task.queueing is None
    world.submission.lost(worker.node, WorkerLost(worker.lease, 1, "it was killed"))
    [(task, failure)] = world.submission.again
    assert task is fates[1].task
    assert (task.wire.attempt, failure and failure.code) == (1, "worker_crashed")


def test_a_crash_is_told_in_words() -> None:
    world = World()
    for max_retries in (0, 1):
        world.submit(CLASSES[0], "work", max_retries)
    texts = []
    while world.slots():
        worker = world.grant(*world.slots()[0])
        place = (worker.node, worker.lease)
        del world.workers[place]
        world.submission.lost(worker.node, WorkerLost(worker.lease, 1 << 62, "it was killed", out_of_memory=False))
        texts += [(failure.code, failure.text) for _, failure in world.submission.failed]
        for fate in world.fates.values():
            fate.used = fate.task.wire.attempt
        world.turn()
    assert texts == [
        (
            "worker_crashed",
            "Task work() failed after 1 attempt: it was killed. It was not retried, since max_retries is 0.",
        ),
        ("worker_crashed", "Task work() failed after 2 attempts: it was killed."),
    ]


def test_a_task_whose_node_died_for_the_last_time_says_so() -> None:
    world = World()
    world.submit(CLASSES[0], "work", 0)
    worker = world.grant(*world.slots()[0])
    world.submission.node_lost(worker.node, "node 1 was pulled out")
    [(_, failure)] = world.submission.failed
    assert failure.code == "node_died"
    assert "work() failed after 1 attempt: node 1 was pulled out." in failure.text


def test_closing_gives_back_all_leases() -> None:
    world = World()
    for _ in range(3):
        world.submit(CLASSES[0], "long", 0)
    for slot in world.slots():
        world.grant(*slot)
    world.submission.close()
    assert sorted(record.lease for _, record in world.submission.outgoing if isinstance(record, LeaseReturned)) == [
        1,
        2,
        3,
    ]


def test_closing_has_processes_ended_that_run_something() -> None:
    world = World()
    world.submit(CLASSES[0], "short", 0)
    idle = world.grant(*world.slots()[0])
    world.end(idle, seconds=0.0)
    world.submit(CLASSES[1], "long", 0)
    busy = world.grant(*world.slots()[0])
    world.submission.outgoing.clear()
    world.submission.close()
    returned = {r.lease: r.kill for _, r in world.submission.outgoing if isinstance(r, LeaseReturned)}
    assert returned == {idle.lease: False, busy.lease: True}


def test_a_queued_task_that_is_cancelled_asks_for_no_worker() -> None:
    world = World()
    fate = world.submit(CLASSES[0], "long", 3)
    assert world.slots()
    assert world.cancel(fate) is None
    assert world.slots() == []
    world.settle()


def test_a_cancelled_task_that_its_worker_gives_back_ends_there() -> None:
    world = World()
    world.submit(CLASSES[0], "short", 0)
    worker = world.grant(*world.slots()[0])
    world.end(worker, seconds=0.0)
    first, second = world.submit(CLASSES[0], "short", 3), world.submit(CLASSES[0], "short", 3)
    assert world.cancel(second) is worker
    world.give_back(worker, blocked=True)
    assert (first.ended, second.ended) == (0, 1)


def test_a_cancelled_task_whose_worker_crashes_says_why_it_was_not_retried() -> None:
    world = World()
    fate = world.submit(CLASSES[0], "work", 3)
    worker = world.grant(*world.slots()[0])
    world.cancel(fate)
    world.submission.lost(worker.node, WorkerLost(worker.lease, 1 << 62, "it was killed"))
    [(_, failure)] = world.submission.failed
    assert failure.code == "task_killed"
    assert "not retried, since it was cancelled" in failure.text


# ------------------------------------------------------------------------------- where large arguments lie


def near(world: World) -> dict[str, dict[NodeId, int]]:
    return {entry.name: entry.near for entry in world.submission.demand(world.now)}


def test_demand_says_where_the_large_arguments_of_tasks_lie() -> None:
    world = World()
    here, there = NODES
    world.submit(CLASSES[0], "none", 0)
    world.submit(CLASSES[0], "one", 0, (here, LARGE_BYTES - 1), (there, LARGE_BYTES))
    assert near(world) == {"none": {}, "one": {there: LARGE_BYTES}}
    world.submit(CLASSES[1], "spread", 0, (here, LARGE_BYTES))
    assert near(world)["spread"] == {}, "who says where goes there"
    world = World()
    world.submit(CLASSES[0], "both", 0, (here, LARGE_BYTES), (there, LARGE_BYTES), (here, LARGE_BYTES))
    assert near(world) == {"both": {here: 2 * LARGE_BYTES, there: LARGE_BYTES}}
    world.submit(CLASSES[0], "small", 0, (here, LARGE_BYTES // 2))
    assert near(world)["small"] == {}


def test_tasks_find_the_leases_of_where_their_data_is() -> None:
    world = World()
    workers = {}
    for node in NODES:
        world.submit(CLASSES[0], "f", 0, (node, LARGE_BYTES))
        workers[node] = world.grant(*world.slots()[0], node)
        world.end(workers[node], seconds=0.0)
        world.submit(CLASSES[0], "f", 0, (node, LARGE_BYTES))
    assert [len(workers[node].tasks) for node in NODES] == [1, 1]


def test_an_idle_lease_of_tasks_that_want_the_same_elsewhere_goes_back_at_once() -> None:
    world = World()
    world.submit(CLASSES[0], "f", 0, (NODES[0], LARGE_BYTES))
    worker = world.grant(*world.slots()[0], NODES[0])
    world.submit(CLASSES[0], "g", 0)
    assert (worker.node, worker.lease) in world.workers, "it has work"
    world.end(worker)
    world.submit(CLASSES[0], "h", 0)
    assert (worker.node, worker.lease) not in world.workers


# ------------------------------------------------------------------------------- turns between keys


def busy_world() -> tuple[World, dict[NodeId, Worker]]:
    """Work without end under one key, with a lease on each node."""
    world = World()
    for _ in range(20):
        world.submit(CLASSES[0], "long", 0)
    return world, {node: world.grant(*world.slots()[0], node) for node in NODES}


def test_a_key_that_waits_for_long_has_a_lease_of_another_key_returned() -> None:
    world, workers = busy_world()
    for _ in range(2):
        world.submit(SchedulingClass((("CPU", 10_000),), NodeAffinity(NODES[1], soft=False)), "bound", 0)
    world.pass_time(TURN_SECONDS * 0.9)
    assert not any(worker.recalled for worker in workers.values())
    world.pass_time(TURN_SECONDS * 0.2)
    lease = world.submission.key_for(CLASSES[0]).leases[NODES[1], workers[NODES[1]].lease]
    assert lease.recalled, "the one on the node that it is bound to"
    world.end(workers[NODES[1]], seconds=3.0)
    assert (NODES[1], workers[NODES[1]].lease) not in world.workers
    assert (NODES[0], workers[NODES[0]].lease) in world.workers


def test_what_is_bound_to_a_node_where_its_owner_holds_nothing_takes_nothing_elsewhere() -> None:
    world, _ = busy_world()
    world.submit(SchedulingClass((("CPU", 10_000),), NodeAffinity(node_id(9), soft=False)), "bound", 0)
    world.pass_time(TURN_SECONDS * 4)
    assert not any(lease.recalled for lease in world.submission.key_for(CLASSES[0]).leases.values())


def test_leases_inside_a_group_and_outside_make_no_room_for_each_other() -> None:
    world, _ = busy_world()
    inside = SchedulingClass((("CPU", 10_000),), Bundle(PlacementGroupId("group")))
    world.submit(inside, "inside", 0)
    world.pass_time(TURN_SECONDS * 4)
    assert not any(lease.recalled for lease in world.submission.key_for(CLASSES[0]).leases.values())
    key = world.submission.key_for(inside)
    worker = world.grant(key.index, next(iter(key.slots)))
    first = SchedulingClass((("CPU", 10_000),), Bundle(PlacementGroupId("group"), 0))
    world.submit(first, "inside too", 0)
    world.pass_time(TURN_SECONDS * 1.1)
    assert key.leases[worker.node, worker.lease].recalled


def test_a_key_of_a_group_that_was_forgotten_is_used_again() -> None:
    world = World()
    world.submit(IN_GROUP, "f", 0)
    key = world.submission.key_for(IN_GROUP)
    (slot,) = key.slots
    world.end(world.grant(key.index, slot))
    world.pass_time(IDLE_SECONDS)
    assert world.submission.find(key.index) is None
    world.submit(IN_GROUP, "f", 0)
    again = world.submission.key_for(IN_GROUP)
    worker = world.grant(again.index, next(iter(again.slots)))
    world.end(worker)
    world.lose(worker, 0)
    assert world.submission.find(again.index) is None
    world.grant(key.index, slot)
    assert not world.workers, "a grant that comes late goes back"
    wire = Task(TaskNumber(3), 0, LeaseId(0), 0, FunctionId("f"), "f", 1, Inline(b""))
    world.fates[wire.number] = Fate(PendingTask(wire, key, 0), 0)
    world.submission.enqueue(world.fates[wire.number].task)
    world.turn()
    assert world.submission.key_for(IN_GROUP) is key
    world.settle()


def test_what_no_turn_helps_asks_for_one_less_and_less_often() -> None:
    world, _ = busy_world()
    for _ in range(2):
        world.submit(CLASSES[1], "never", 0)
    key = world.submission.key_for(CLASSES[1])
    waits = []
    for _ in range(8):
        waits.append(key.turn_seconds)
        world.pass_time(key.turn_at - world.now)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 32.0, 32.0]
    world.grant(key.index, next(iter(key.slots)), NODES[0])
    assert (key.turn_seconds, key.turn_at) == (TURN_SECONDS, float("inf"))
