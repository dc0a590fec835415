"""Placement groups that a process waits for: every order of making, news, lost news, removal and passing time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal_core.protocol.groups import GroupChanged, GroupState
from shoal_core.protocol.ids import NodeId, PlacementGroupId
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.records import Failed, Inline, Value
from shoal_core.runtime.ownership.objects import ObjectState
from shoal_core.runtime.tasks.groups import ASK_SECONDS, ASK_SOON_SECONDS, MISSING_SECONDS, Groups
from shoal_core.runtime.tasks.submission import SchedulingClass, SchedulingKey, Submission
from shoal_core.testing.builders import inline, node_id, process_id, put_key

LOCAL = process_id(1)
GROUP = PlacementGroupId("a" * 32)
NODE = node_id(1)


def news(state: GroupState, attempt: int = 0, group: PlacementGroupId = GROUP, reason: str = "") -> GroupChanged:
    nodes: list[NodeId | None] = [NODE if state is GroupState.CREATED else None]
    return GroupChanged(group_id=group, state=state, attempt=attempt, nodes=nodes, reason=reason)


CREATED = news(GroupState.CREATED, 1)
REMOVED = news(GroupState.REMOVED, 1, reason="it was removed")


class One:
    """The groups of one process, and what it is told."""

    def __init__(self) -> None:
        self.groups = Groups()
        self.now = 10.0
        self._keys = Submission()
        self._numbers: Iterator[int] = count(1)

    def await_ready(self, group: PlacementGroupId = GROUP) -> ObjectState:
        state = ObjectState(None, LOCAL, put_key(next(self._numbers)))  # type: ignore[arg-type]
        self.groups.await_ready(group, state, inline(), self.now)
        return state

    def key(self, group: PlacementGroupId = GROUP) -> SchedulingKey:
        key = self._keys.key_for(SchedulingClass((("CPU", 10_000),), Bundle(group)))
        key.name = "f"
        return key

    def demand(self, *keys: SchedulingKey) -> None:
        self.groups.demanded(keys, self.now)

    def hear(self, *told: GroupChanged) -> None:
        for one in told:
            self.groups.changed(one, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.groups.tick(self.now)

    def asked(self) -> list[PlacementGroupId]:
        asked, self.groups.questions = self.groups.questions, []
        self.groups.sanity_check()
        return asked

    def settled(self) -> list[tuple[ObjectState, Value]]:
        settled, self.groups.settled = self.groups.settled, []
        self.groups.sanity_check()
        return settled

    def given_up(self) -> list[tuple[SchedulingKey, str]]:
        given_up, self.groups.given_up = self.groups.given_up, []
        return [(key, failure.text) for key, failure in given_up]


def test_an_object_is_ready_as_soon_as_its_group_is() -> None:
    one = One()
    first, second = one.await_ready(), one.await_ready()
    assert set(one.asked()) == {GROUP}
    one.hear(news(GroupState.PENDING))
    assert one.settled() == []
    one.hear(CREATED)
    assert [state for state, _ in one.settled()] == [first, second]
    assert not one.groups.knows(GROUP)
    assert one.groups.unheard == [GROUP]
    assert one.groups.quiet()


def test_objects_of_a_group_that_is_removed_fail() -> None:
    one = One()
    state = one.await_ready()
    one.hear(REMOVED)
    ((failed, value),) = one.settled()
    assert failed is state
    assert isinstance(value, Failed)
    assert value == Failed("task_group_removed", f"Placement group {GROUP} is no more: it was removed.")


def test_a_group_of_our_own_is_known_without_asking() -> None:
    one = One()
    one.groups.make(GROUP)
    state = one.await_ready()
    one.wait(2 * ASK_SECONDS)
    assert one.asked() == []
    one.hear(CREATED)
    one.groups.made(GROUP, one.now)
    assert [settled for settled, _ in one.settled()] == [state]
    later = one.await_ready()
    assert [settled for settled, _ in one.settled()] == [later]
    assert one.asked() == []
    one.hear(news(GroupState.RESCHEDULING, 1))
    last = one.await_ready()
    assert (one.settled(), one.asked()) == ([], [])
    one.hear(news(GroupState.CREATED, 2))
    assert [settled for settled, _ in one.settled()] == [last]


def test_whether_a_group_is_there_can_be_looked_up_as_long_as_news_of_it_are_believed() -> None:
    one = One()
    assert not one.groups.is_created(GROUP)
    one.groups.make(GROUP)
    assert not one.groups.is_created(GROUP)
    one.hear(CREATED)
    assert one.groups.is_created(GROUP)
    one.groups.reread(one.now)
    assert not one.groups.is_created(GROUP)
    one.hear(CREATED)
    one.hear(news(GroupState.RESCHEDULING, 1))
    assert not one.groups.is_created(GROUP)
    one.hear(news(GroupState.CREATED, 2))
    assert one.groups.is_created(GROUP)
    one.groups.let_go(GROUP, one.now)
    assert not one.groups.is_created(GROUP)


def test_a_group_that_could_not_be_made_is_an_error_of_what_waits_for_it() -> None:
    one = One()
    one.groups.make(GROUP)
    one.await_ready()
    one.groups.refused(GROUP, "it could not be made: why", one.now)
    ((_, value),) = one.settled()
    assert isinstance(value, Failed)
    assert "it could not be made: why" in value.text
    assert not one.groups.knows(GROUP)


def test_old_news_is_ignored() -> None:
    one = One()
    one.groups.make(GROUP)
    one.hear(news(GroupState.CREATED, 2), news(GroupState.RESCHEDULING, 1), CREATED)
    one.await_ready()
    assert len(one.settled()) == 1
    one.hear(news(GroupState.RESCHEDULING, 2), news(GroupState.CREATED, 2), news(GroupState.RESCHEDULING, 3))
    one.await_ready()
    assert one.settled() == []


def test_who_waits_asks_again_since_a_hint_may_be_lost() -> None:
    one = One()
    one.await_ready()
    assert one.asked() == [GROUP]
    one.hear(news(GroupState.PENDING))
    one.wait(ASK_SECONDS - 0.1)
    assert one.asked() == []
    one.wait(0.2)
    assert one.asked() == [GROUP]
    one.groups.reread(one.now)
    assert one.asked() == [GROUP]


def test_after_a_reconnect_nothing_is_believed_of_a_group_that_nothing_waits_for() -> None:
    one = One()
    one.groups.make(GROUP)
    one.hear(CREATED)
    one.groups.reread(one.now)
    assert one.asked() == []
    one.await_ready()
    assert one.settled() == []
    assert one.asked() == [GROUP]


def test_a_group_that_is_not_known_may_only_be_late() -> None:
    one = One()
    one.await_ready()
    one.asked()
    one.groups.gone(GROUP, one.now, one.now)
    one.wait(ASK_SOON_SECONDS)
    assert one.asked() == [GROUP]
    assert one.settled() == []
    asked_at, one.now = one.now, one.now + MISSING_SECONDS
    one.groups.gone(GROUP, asked_at, one.now)
    assert one.settled() == [], "this answer is old"
    one.groups.gone(GROUP, one.now, one.now)
    ((_, value),) = one.settled()
    assert isinstance(value, Failed)
    assert "does not know it" in value.text


def test_tasks_that_wait_for_a_group_that_is_removed_are_given_up() -> None:
    one = One()
    key = one.key()
    one.demand(key)
    assert one.asked() == [GROUP]
    one.demand(key)
    assert one.asked() == []
    one.hear(CREATED)
    assert one.given_up() == []
    one.hear(REMOVED)
    text = f"Task f() cannot run: its placement group {GROUP} is no more: it was removed."
    assert one.given_up() == [(key, text)]
    one.groups.sanity_check()
    one.demand()
    one.demand(key)
    assert one.asked() == [GROUP]  # it was asked for anew: so it is looked up anew
    one.demand()
    assert one.groups.quiet()


def test_nothing_is_heard_of_a_group_that_nobody_waits_for_any_more() -> None:
    one = One()
    state = one.await_ready()
    one.groups.released(state)
    one.groups.released(state)
    one.groups.sanity_check()
    assert not one.groups.knows(GROUP)
    assert one.groups.unheard == [GROUP]
    one.groups.make(GROUP)
    one.groups.let_go(GROUP, one.now)
    assert not one.groups.knows(GROUP)


def test_that_a_group_was_there_is_no_news_once_this_process_has_removed_it() -> None:
    one = One()
    one.groups.make(GROUP)
    one.demand(one.key())
    one.hear(CREATED)
    one.groups.let_go(GROUP, one.now)
    one.await_ready()
    one.hear(CREATED)
    assert not one.groups.is_created(GROUP)
    assert one.settled() == []
    assert set(one.asked()) == {GROUP}
    one.hear(REMOVED)
    ((_, value),) = one.settled()
    assert isinstance(value, Failed)


def test_what_still_waits_for_a_group_that_this_process_removes_is_told() -> None:
    one = One()
    one.groups.make(GROUP)
    one.await_ready()
    one.groups.let_go(GROUP, one.now)
    one.groups.sanity_check()
    one.hear(REMOVED)
    assert len(one.settled()) == 1
    assert not one.groups.knows(GROUP)


# ------------------------------------------------------------------------------- every order


@dataclass
class Truth:
    """A group as the control store has it, and the hints about it that are still on their way."""

    state: GroupState = GroupState.PENDING
    attempt: int = 0
    appeared_at: float = math.inf
    own: bool = False
    hints: list[GroupChanged] = field(default_factory=list)

    @property
    def exists(self) -> bool:
        return self.appeared_at < math.inf

    def told(self, group: PlacementGroupId) -> GroupChanged:
        return news(self.state, self.attempt, group, "it was removed" if self.state is GroupState.REMOVED else "")

    def change(self, group: PlacementGroupId, state: GroupState, attempt: int) -> None:
        self.state, self.attempt = state, attempt
        self.hints.append(self.told(group))


NAMES = [PlacementGroupId(letter * 32) for letter in "ab"]
names = st.sampled_from(NAMES)


class EveryOrder(RuleBasedStateMachine):
    """Hints are lost, doubled and late; answers are true when they are given. In the end everything is settled."""

    def __init__(self) -> None:
        super().__init__()
        self.one = One()
        self.truths = {name: Truth() for name in NAMES}
        self.waiting: dict[ObjectState, PlacementGroupId] = {}
        self.too_late: set[ObjectState] = set()
        self.dropped: set[PlacementGroupId] = set()
        self.keys: dict[PlacementGroupId, SchedulingKey] = {}
        self.first_asked: dict[PlacementGroupId, float] = {}
        self.answers: list[tuple[PlacementGroupId, float, GroupChanged | None]] = []

    @rule(name=names)
    def make(self, name: PlacementGroupId) -> None:
        truth = self.truths[name]
        if not truth.exists and not truth.own and not self.one.groups.knows(name):
            truth.own = True
            self.one.groups.make(name)

    @rule(name=names)
    def appear(self, name: PlacementGroupId) -> None:
        truth = self.truths[name]
        truth.appeared_at = min(truth.appeared_at, self.one.now)
        if truth.own:
            self.one.groups.made(name, self.one.now)
            self.one.hear(truth.told(name))

    @rule(name=names, state=st.sampled_from([GroupState.CREATED, GroupState.RESCHEDULING, GroupState.REMOVED]))
    def change(self, name: PlacementGroupId, state: GroupState) -> None:
        truth = self.truths[name]
        if not truth.exists or truth.state is GroupState.REMOVED:
            return
        if state is GroupState.RESCHEDULING and truth.state is not GroupState.CREATED:
            return
        truth.change(name, state, truth.attempt + (state is GroupState.CREATED))

    @rule(name=names, data=st.data())
    def hint(self, name: PlacementGroupId, data: st.DataObject) -> None:
        hints = self.truths[name].hints
        if hints:
            self.one.hear(data.draw(st.sampled_from(hints)))

    @rule(name=names)
    def await_ready(self, name: PlacementGroupId) -> None:
        state = self.one.await_ready(name)
        self.waiting[state] = name
        if name in self.dropped:
            self.too_late.add(state)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        state = data.draw(st.sampled_from(sorted(self.waiting, key=lambda state: state.key)))
        del self.waiting[state]
        self.one.groups.released(state)

    @rule(chosen=st.sets(names))
    def demand(self, chosen: set[PlacementGroupId]) -> None:
        self.keys = {name: self.one.key(name) for name in chosen}
        self.one.demand(*self.keys.values())

    @rule(name=names)
    def let_go(self, name: PlacementGroupId) -> None:
        if self.truths[name].exists:
            self.one.groups.let_go(name, self.one.now)
            self.dropped.add(name)

    @rule()
    def reread(self) -> None:
        self.one.groups.reread(self.one.now)

    @rule(seconds=st.floats(0.0, 2 * ASK_SECONDS))
    def wait(self, seconds: float) -> None:
        self.one.wait(seconds)

    @rule()
    def ask(self) -> None:
        for name in self.one.asked():
            truth = self.truths[name]
            self.first_asked.setdefault(name, self.one.now)
            self.answers.append((name, self.one.now, truth.told(name) if truth.exists else None))

    @precondition(lambda self: self.answers)
    @rule()
    def answer(self) -> None:
        name, asked_at, answer = self.answers.pop(0)
        if answer is not None:
            self.one.hear(answer)
        else:
            self.one.groups.gone(name, asked_at, self.one.now)

    @invariant()
    def what_is_settled_was_true(self) -> None:
        for state, value in self.one.settled():
            name = self.waiting.pop(state)
            truth = self.truths[name]
            if isinstance(value, Inline):
                assert truth.attempt > 0, "it was CREATED once"
                assert state not in self.too_late
            else:
                assert self._is_no_more(name)
        for key, _ in self.one.given_up():
            name = next(name for name in NAMES if self.one.key(name) is key)
            assert self._is_no_more(name)
            self.keys.pop(name, None)

    def _is_no_more(self, name: PlacementGroupId) -> bool:
        """Tell whether a group was removed, or was looked for in vain for long enough."""
        truth = self.truths[name]
        late = truth.appeared_at - self.first_asked.get(name, math.inf) >= MISSING_SECONDS
        return truth.state is GroupState.REMOVED or late

    def teardown(self) -> None:
        """From here on nothing is lost: whatever waits for a group that is CREATED or REMOVED is settled."""
        for name in NAMES:
            self.appear(name)
            truth = self.truths[name]
            if truth.state is not GroupState.REMOVED:
                removed = name in self.dropped
                truth.change(name, GroupState.REMOVED if removed else GroupState.CREATED, truth.attempt + (not removed))
        for _ in range(4):
            self.one.wait(ASK_SECONDS)
            self.ask()
            while self.answers:
                self.answer()
            self.what_is_settled_was_true()
        assert not self.waiting
        assert all(self.truths[name].state is not GroupState.REMOVED for name in self.keys)


TestEveryOrder = EveryOrder.TestCase
TestEveryOrder.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
