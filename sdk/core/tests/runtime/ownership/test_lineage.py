"""What an owner remembers of its tasks: no more than may be needed, and nothing of what is gone."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal_core.protocol.ids import TaskNumber, object_key
from shoal_core.protocol.records import Inline, Reference, Stored, Value
from shoal_core.runtime.ownership.lineage import RECORD_BYTES, Inputs, Lineage, Refusal
from shoal_core.runtime.tasks.submission import PendingTask, SchedulingClass, SchedulingKey
from shoal_core.testing.builders import node_id, process_id, task

LOCAL = process_id(1)
KEY = SchedulingKey(0, SchedulingClass(()), [])


def pending(number: int, retries: int = 3, arguments: Value | None = None) -> PendingTask:
    return PendingTask(task(number, arguments=arguments or Inline(b"x" * 100)), KEY, retries)


def result_of(number: int, index: int = 1) -> Reference:
    return Reference(LOCAL, object_key(TaskNumber(number), index))


def needs(*numbers: int) -> Inputs:
    return Inputs([result_of(number) for number in numbers])


class World(RuleBasedStateMachine):
    """Tasks that end, are run again and are given up, and results that are freed, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = 0
        self.tasks: dict[int, tuple[PendingTask, list[int]]] = {}
        self.alive: set[int] = set()
        self.running: set[int] = set()

    @initialize(limit=st.sampled_from([0, 3 * RECORD_BYTES, 10 * RECORD_BYTES, 1 << 30]))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.lineage = Lineage(LOCAL, limit)

    @rule(retries=st.sampled_from([-1, 0, 1, 3]), given=st.lists(st.integers(1, 4), max_size=3))
    def a_task_ends(self, retries: int, given: list[int]) -> None:
        self.drawn += 1
        inputs = sorted({self.drawn - back for back in given} & self.alive)
        self.tasks[self.drawn] = (pending(self.drawn, retries), inputs)
        self.alive.add(self.drawn)
        self.keep(self.drawn)

    def keep(self, number: int) -> None:
        of, inputs = self.tasks[number]
        self.lineage.keep(of, {1} if number in self.alive else set(), needs(*inputs))

    @precondition(lambda self: self.alive)
    @rule(index=st.integers(0, 100))
    def a_result_is_freed(self, index: int) -> None:
        number = sorted(self.alive)[index % len(self.alive)]
        self.alive.discard(number)
        self.lineage.freed(result_of(number).key)

    @precondition(lambda self: self.alive - self.running)
    @rule(index=st.integers(0, 100))
    def a_result_is_made_again(self, index: int) -> None:
        choice = sorted(self.alive - self.running)
        self.again(choice[index % len(choice)])

    def again(self, number: int) -> None:
        """Run a task again, and first those whose results it needs, as its owner does."""
        of, inputs = self.tasks[number]
        before = of.retries
        got = self.lineage.again(result_of(number).key)
        if isinstance(got, Refusal):
            assert before == 0 or self.limit < 1 << 30
            return
        assert got is of
        assert of.retries == (before - 1 if before > 0 else before)
        self.running.add(number)
        for other in inputs:
            if other not in self.alive:
                self.alive.add(other)
                assert other in self.running or self.lineage.of(TaskNumber(other)) is not None, "it can be revived"
                if other not in self.running:
                    self.again(other)

    @precondition(lambda self: self.running)
    @rule(index=st.integers(0, 100))
    def a_run_ends(self, index: int) -> None:
        number = sorted(self.running)[index % len(self.running)]
        self.running.discard(number)
        self.keep(number)

    @invariant()
    def the_records_are_in_order(self) -> None:
        if self.drawn:
            self.lineage.sanity_check()

    @invariant()
    def what_may_be_needed_is_remembered(self) -> None:
        for number in self.alive - self.running:
            ended = self.lineage.of(TaskNumber(number))
            assert ended is not None
            assert ended.live == {1}

    def teardown(self) -> None:
        for number in sorted(self.running):
            self.keep(number)
        for number in sorted(self.alive):
            self.lineage.freed(result_of(number).key)
        if self.drawn:
            assert len(self.lineage) == 0
            assert self.lineage.size_bytes == 0
            self.lineage.sanity_check()


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def test_a_chain_goes_with_the_last_result_however_long_it_is() -> None:
    lineage = Lineage(LOCAL, 1 << 30)
    for number in range(1, 20_001):
        lineage.keep(pending(number), {1}, needs(number - 1) if number > 1 else Inputs())
    for number in range(1, 20_000):
        lineage.freed(result_of(number).key)
    assert len(lineage) == 20_000
    lineage.freed(result_of(20_000).key)
    assert len(lineage) == 0


def test_the_oldest_records_go_first_and_leave_word() -> None:
    lineage = Lineage(LOCAL, 3 * RECORD_BYTES)
    for number in (1, 2, 3):
        lineage.keep(pending(number), {1}, Inputs())
    assert lineage.again(result_of(1).key) is Refusal.EVICTED
    assert isinstance(lineage.again(result_of(2).key), PendingTask)
    lineage.freed(result_of(1).key)
    assert lineage.of(TaskNumber(1)) is None, "nor is more kept than that"


@pytest.mark.parametrize(
    ("retries", "attempt", "refusal"), [(0, 0, Refusal.RETRIES_DISABLED), (0, 1, Refusal.ATTEMPTS_EXCEEDED)]
)
def test_why_a_task_is_not_run_again(retries: int, attempt: int, refusal: Refusal) -> None:
    lineage = Lineage(LOCAL, 1 << 30)
    of = pending(1, retries)
    of.wire.attempt = attempt
    lineage.keep(of, {1}, Inputs())
    assert lineage.again(result_of(1).key) is refusal
    assert lineage.size_bytes == 0


def test_large_arguments_and_what_was_put_are_never_there_again() -> None:
    lineage = Lineage(LOCAL, 1 << 30)
    lineage.keep(pending(1, arguments=Stored(node_id(1), "o1", 9)), {1}, Inputs())
    assert lineage.again(result_of(1).key) is Refusal.PUT
    assert lineage.again(result_of(2, 0).key) is Refusal.PUT
    assert lineage.again(result_of(3).key) is Refusal.UNKNOWN


def test_a_small_input_is_part_of_the_record_and_needs_no_other() -> None:
    lineage = Lineage(LOCAL, 1 << 30)
    small = result_of(1)
    lineage.keep(pending(2), {1}, Inputs([small], (), {small: Inline(b"y" * 5_000)}))
    assert not lineage.is_needed(TaskNumber(1))
    assert lineage.size_bytes > 5_000
