"""Calls of actors: every order of news, results, deaths, restarts, late arguments and passing time."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal_core.protocol.actors import ActorChanged, ActorDeath, ActorState
from shoal_core.protocol.ids import ProcessId, TaskNumber, actor_id
from shoal_core.protocol.records import Task, TaskDone
from shoal_core.protocol.traces import UNRECORDED, TraceParent
from shoal_core.runtime.reports.spans import queueing_of
from shoal_core.runtime.tasks.calls import ASK_SECONDS, GRACE_SECONDS, MISSING_SECONDS, WINDOW, Calls, PendingCall
from shoal_core.testing.builders import inline, process_id, task

CALLER = process_id(1)
ACTOR = actor_id(CALLER, 1)


def call(number: int, *, retries: int = 0, unresolved: int = 0, unordered: bool = False) -> PendingCall:
    record = task(number)
    pending = PendingCall(ACTOR, record, retries, unordered=unordered)
    pending.unresolved = unresolved
    return pending


def news(
    state: ActorState, incarnation: int = 0, process: ProcessId | None = None, death: str = "it was killed"
) -> ActorChanged:
    return ActorChanged(
        actor_id=ACTOR,
        state=state,
        incarnation=incarnation,
        node_id=None,
        process_id=process,
        graceful=False,
        death=ActorDeath(reason=death) if state is ActorState.DEAD else None,
    )


def done(pending: PendingCall, *, retryable: bool = False) -> TaskDone:
    wire = pending.wire
    return TaskDone(wire.number, wire.attempt, wire.lease, (inline(),), 0.001, retryable)


class One:
    """The calls of one actor, and what they lead to."""

    def __init__(self, *, sequential: bool = True) -> None:
        self.calls = Calls()
        self.now = 10.0
        self.calls.know(ACTOR, "Counter", sequential=sequential)

    def sent(self) -> list[int]:
        """Return the numbers of the calls that are sent now."""
        self.calls.pump(self.now)
        sent, self.calls.outgoing = self.calls.outgoing, []
        self.calls.sanity_check()
        return [record.number for _, record in sent if isinstance(record, Task)]

    def failed(self) -> list[tuple[int, str]]:
        """Return the calls that failed, by number and wire code."""
        self.calls.pump(self.now)
        failed, self.calls.failed = self.calls.failed, []
        return [(pending.wire.number, failure.code) for pending, failure in failed]

    def hear(self, *told: ActorChanged) -> None:
        for one in told:
            self.calls.changed(one, self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.calls.tick(self.now)


FIRST, SECOND = process_id(2), process_id(3)


def test_calls_wait_for_the_actor_and_go_in_their_order() -> None:
    one = One()
    for number in (1, 2, 3):
        one.calls.enqueue(call(number))
    assert one.sent() == []
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    assert one.sent() == [1, 2, 3]


def test_of_a_traced_call_is_told_where_it_goes_and_why_it_is_made_again() -> None:
    one = One()
    for number, trace in ((1, str(TraceParent(1, 2))), (2, UNRECORDED), (3, "")):
        pending = call(number, retries=-1)
        pending.wire.trace = trace
        pending.queueing = queueing_of(pending.wire, ())
        one.calls.enqueue(pending)
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    assert one.sent() == [1, 2, 3]
    assert one.calls.again == []
    assert [(pushed.wire.number, process) for pushed, process in one.calls.pushed] == [(1, FIRST)]
    one.hear(news(ActorState.RESTARTING, 1))
    one.wait(GRACE_SECONDS)
    told = [(again.wire.number, again.wire.attempt, failure and failure.code) for again, failure in one.calls.again]
    assert told == [(number, 1, "actor_unavailable") for number in (1, 2, 3)], "of others nobody tells what ended them"


def test_a_call_whose_argument_is_late_holds_up_those_behind_it() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    late = call(1, unresolved=1)
    one.calls.enqueue(late)
    one.calls.enqueue(call(2))
    assert one.sent() == []
    late.unresolved = 0
    one.calls.resolved(late)
    assert one.sent() == [1, 2]


def test_where_order_is_not_asked_for_a_late_argument_holds_up_nobody() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    late, failed = call(1, unresolved=1, unordered=True), call(2, unresolved=1, unordered=True)
    one.calls.enqueue(late)
    one.calls.enqueue(failed)
    one.calls.enqueue(call(3, unordered=True))
    assert one.sent() == [3]
    assert one.calls.withdraw(failed)
    late.unresolved = 0
    one.calls.resolved(late)
    assert one.sent() == [1]


def test_calls_whose_arguments_are_late_die_with_the_actor() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    one.calls.enqueue(call(1, unresolved=1, unordered=True))
    assert one.sent() == []
    one.calls.process_died(FIRST, one.now)
    assert one.calls.questions == [ACTOR], "somebody waits for it"
    one.hear(news(ActorState.DEAD))
    one.wait(GRACE_SECONDS)
    assert one.failed() == [(1, "actor_died")]


def test_a_call_whose_argument_failed_holds_up_nobody() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    failed = call(1, unresolved=1)
    one.calls.enqueue(failed)
    one.calls.enqueue(call(2))
    assert one.calls.withdraw(failed)
    assert one.sent() == [2]
    assert not one.calls.withdraw(failed)


def test_a_sequential_actor_gets_a_window_of_calls_and_any_other_gets_all() -> None:
    for sequential, expected in ((True, WINDOW), (False, WINDOW + 10)):
        one = One(sequential=sequential)
        one.hear(news(ActorState.ALIVE, 0, FIRST))
        pending = [call(number) for number in range(1, WINDOW + 11)]
        for one_call in pending:
            one.calls.enqueue(one_call)
        assert len(one.sent()) == expected
        one.calls.done(FIRST, done(pending[0]))
        assert len(one.sent()) == (1 if sequential else 0)


def test_while_an_actor_restarts_calls_without_retries_fail_and_others_wait() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    one.calls.enqueue(call(1))
    one.calls.enqueue(call(2, retries=1))
    assert one.sent() == [1, 2]
    one.hear(news(ActorState.RESTARTING, 1))
    assert one.failed() == []
    one.wait(GRACE_SECONDS)
    assert one.failed() == [(1, "actor_unavailable")]
    one.calls.enqueue(call(3))
    assert one.failed() == [(3, "actor_unavailable")]
    one.hear(news(ActorState.ALIVE, 1, SECOND))
    assert one.sent() == [2]


def test_the_last_results_of_a_process_count_although_its_end_was_told_before() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    first = call(1)
    one.calls.enqueue(first)
    one.sent()
    one.hear(news(ActorState.DEAD))
    assert one.calls.done(FIRST, done(first)) is first
    one.wait(GRACE_SECONDS)
    assert one.failed() == []


def test_nothing_more_is_sent_to_a_process_whose_end_was_told() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    one.calls.enqueue(call(1))
    assert one.sent() == [1]
    one.hear(news(ActorState.DEAD))
    one.calls.enqueue(call(2))
    assert one.sent() == [], "it would still run there, after kill() has returned"
    one.wait(GRACE_SECONDS)
    assert one.failed() == [(1, "actor_died"), (2, "actor_died")]


def test_old_news_is_no_news() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 1, SECOND), news(ActorState.ALIVE, 0, FIRST), news(ActorState.RESTARTING, 1))
    one.calls.enqueue(call(1))
    one.calls.pump(one.now)
    assert [peer for peer, _ in one.calls.outgoing] == [SECOND]
    one.hear(news(ActorState.DEAD, 0), news(ActorState.ALIVE, 2, FIRST))
    one.wait(GRACE_SECONDS)
    assert one.failed() == [(1, "actor_died")]


def test_a_call_that_is_cancelled_while_it_waits_holds_up_nobody() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    late = call(1, unresolved=1)
    one.calls.enqueue(late)
    one.calls.enqueue(call(2))
    assert one.calls.cancel(late) is None
    assert one.sent() == [2]
    late.unresolved = 0
    one.calls.resolved(late)
    assert one.sent() == []


def test_a_call_that_is_cancelled_in_flight_ends_where_it_runs_and_is_never_made_again() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    pending = call(1, retries=3)
    one.calls.enqueue(pending)
    one.sent()
    assert one.calls.cancel(pending) == FIRST
    assert one.calls.done(FIRST, done(pending, retryable=True)) is pending


def test_a_call_that_is_cancelled_when_its_process_has_died_ends_at_once_and_only_then() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    pending = call(1, retries=3)
    one.calls.enqueue(pending)
    one.sent()
    one.calls.process_died(FIRST, one.now)
    assert one.calls.cancel(pending) is None
    one.hear(news(ActorState.RESTARTING, 1), news(ActorState.ALIVE, 1, SECOND))
    one.wait(GRACE_SECONDS)
    assert one.sent() == []
    assert one.failed() == []


def test_an_actor_that_somebody_waits_for_is_asked_about_again_and_again() -> None:
    one = One()
    one.calls.enqueue(call(1))
    one.sent()
    for _ in range(3):
        one.wait(ASK_SECONDS)
        assert one.calls.questions == [ACTOR]
        one.calls.questions = []
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    one.sent()
    one.wait(ASK_SECONDS)
    assert one.calls.questions == []
    assert one.calls.quiet()


def test_a_process_that_died_is_asked_about_at_once() -> None:
    one = One()
    one.hear(news(ActorState.ALIVE, 0, FIRST))
    one.calls.enqueue(call(1))
    one.sent()
    one.calls.process_died(FIRST, one.now)
    assert one.calls.questions == [ACTOR]


def test_an_actor_that_is_not_known_yet_is_waited_for_a_while() -> None:
    one = One()
    one.calls.enqueue(call(1))
    one.calls.gone(ACTOR, one.now)
    assert one.failed() == []
    one.now += MISSING_SECONDS
    one.calls.gone(ACTOR, one.now)
    assert one.failed() == [(1, "actor_died")]


def test_an_actor_that_could_not_be_created_fails_all_calls() -> None:
    one = One()
    one.calls.enqueue(call(1))
    one.calls.refused(ACTOR, "its job has ended")
    one.calls.enqueue(call(2))
    assert one.failed() == [(1, "actor_died"), (2, "actor_died")]


# ------------------------------------------------------------------------------------ every order


@dataclass
class Fate:
    """What became of a call: how often it was carried out, in which incarnations, and how it ended."""

    call: PendingCall
    retries: int
    carried_out: list[int] = field(default_factory=list)
    ended: int = 0
    cancelled: bool = False


class World(RuleBasedStateMachine):
    """A caller, an actor whose incarnations come and go, a network that may be late, and the control store's truth."""

    def __init__(self) -> None:
        super().__init__()
        self.dead: set[str] = set()
        self.unheard: set[ProcessId] = set()
        """Those that have died, which the caller does not know."""
        self.calls = Calls(self.dead)
        self.calls.know(ACTOR, "Counter", sequential=True)
        self.now = 100.0
        self.fates: dict[TaskNumber, Fate] = {}
        self.record = news(ActorState.PENDING_CREATION)
        self.told: list[ActorChanged] = []
        self.to_actor: dict[ProcessId, deque[Task]] = {}
        self.to_caller: dict[ProcessId, deque[TaskDone]] = {}
        self.alive: ProcessId | None = None
        self.incarnation = 0
        self.restarts = 3
        self.processes = 1
        self.order: list[list[int]] = [[]]

    # --- the caller

    @rule(retries=st.integers(-1, 2), late=st.booleans(), unordered=st.booleans())
    def a_call_is_made(self, retries: int, late: bool, unordered: bool) -> None:
        number = TaskNumber(len(self.fates) + 1)
        pending = call(number, retries=retries, unresolved=1 if late else 0, unordered=unordered)
        self.fates[number] = Fate(pending, retries)
        self.calls.enqueue(pending)

    @precondition(lambda self: any(fate.call.unresolved for fate in self.fates.values()))
    @rule(fails=st.booleans(), data=st.data())
    def an_argument_comes(self, fails: bool, data: st.DataObject) -> None:
        late = data.draw(st.sampled_from([fate for fate in self.fates.values() if fate.call.unresolved]))
        late.call.unresolved = 0
        if fails:
            if self.calls.withdraw(late.call):
                late.ended += 1
        else:
            self.calls.resolved(late.call)

    @precondition(lambda self: bool(self.fates))
    @rule(data=st.data())
    def a_call_is_cancelled(self, data: st.DataObject) -> None:
        """Any that has not ended, whatever has become of its actor, and also twice."""
        fate = data.draw(st.sampled_from(list(self.fates.values())))
        if fate.ended or any(pending is fate.call for pending, _ in self.calls.failed):
            return
        fate.cancelled = True
        process = self.calls.cancel(fate.call)
        if process is None:
            fate.ended += 1
        else:
            assert process not in self.dead, "nobody waits for an answer of the dead"

    @rule()
    def a_turn_ends(self) -> None:
        self.calls.pump(self.now)
        for pending, failure in self.calls.failed:
            fate = self.fates[pending.wire.number]
            fate.ended += 1
            assert failure.code in ("actor_died", "actor_unavailable")
            tried_enough = fate.retries >= 0 and pending.wire.attempt == fate.retries
            assert tried_enough or fate.cancelled or failure.code == "actor_died", "what may be tried again is"
        self.calls.failed = []
        for process, record in self.calls.outgoing:
            assert isinstance(record, Task)
            assert not self.fates[record.number].cancelled, "what was cancelled is never sent again"
            copy = Task(**{name: getattr(record, name) for name in Task.__struct_fields__})
            assert process not in self.dead, "nothing is sent to a process that is known to be dead"
            self.to_actor.setdefault(ProcessId(process), deque()).append(copy)
        self.calls.outgoing = []

    @rule(seconds=st.sampled_from([0.01, GRACE_SECONDS, ASK_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.calls.tick(self.now)

    # --- the actor

    @precondition(lambda self: self.alive is None and self.record.state is not ActorState.DEAD)
    @rule(tell=st.booleans())
    def an_incarnation_starts(self, tell: bool) -> None:
        self.processes += 1
        self.alive = process_id(self.processes)
        self._record(news(ActorState.ALIVE, self.incarnation, self.alive), tell)

    @precondition(lambda self: self.alive is not None and self.to_actor.get(self.alive))
    @rule(fails=st.booleans())
    def the_actor_works(self, fails: bool) -> None:
        assert self.alive is not None
        wire = self.to_actor[self.alive].popleft()
        fate = self.fates[wire.number]
        fate.carried_out.append(self.incarnation)
        self.order[self.incarnation].append(wire.number)
        result = TaskDone(wire.number, wire.attempt, wire.lease, (inline(),), 0.001, fails)
        self.to_caller.setdefault(self.alive, deque()).append(result)

    @precondition(lambda self: self.alive is not None)
    @rule(tell=st.booleans(), hear=st.booleans(), lost=st.integers(0, 3))
    def the_process_dies(self, tell: bool, hear: bool, lost: int) -> None:
        """Its last results may be lost; what has been sent is delivered before its death is acted on."""
        assert self.alive is not None
        results = self.to_caller.get(self.alive, deque())
        for _ in range(min(lost, len(results))):
            results.pop()
        while results:
            self._deliver(self.alive)
        if hear:
            self._mourn(self.alive)
        else:
            self.unheard.add(self.alive)
        self.to_actor.pop(self.alive, None)
        self.alive = None
        if self.restarts:
            self.restarts -= 1
            self.incarnation += 1
            self.order.append([])
            self._record(news(ActorState.RESTARTING, self.incarnation), tell)
        else:
            self._record(news(ActorState.DEAD, self.incarnation), tell)

    # --- what is told

    @precondition(lambda self: any(self.to_caller.values()))
    @rule(data=st.data())
    def a_result_comes(self, data: st.DataObject) -> None:
        self._deliver(data.draw(st.sampled_from([process for process, results in self.to_caller.items() if results])))

    @precondition(lambda self: bool(self.told))
    @rule(data=st.data())
    def news_comes_late_and_twice(self, data: st.DataObject) -> None:
        self.calls.changed(data.draw(st.sampled_from(self.told)), self.now)

    @rule()
    def the_control_store_answers(self) -> None:
        questions, self.calls.questions = self.calls.questions, []
        for _ in questions:
            self.calls.changed(self.record, self.now)

    @rule()
    def the_connection_comes_back(self) -> None:
        self.calls.reread(self.now)

    # --- what holds

    @invariant()
    def all_is_in_order(self) -> None:
        self.calls.sanity_check()
        for number, fate in self.fates.items():
            assert fate.ended <= 1, f"call {number} ends once"
            assert fate.retries or len(fate.carried_out) <= 1, f"call {number} is carried out at most once"

    def teardown(self) -> None:
        """Let everything come that is on its way: every call ends, and what first came first, ran first."""
        for fate in self.fates.values():
            if fate.call.unresolved:
                fate.call.unresolved = 0
                self.calls.resolved(fate.call)
        for _ in range(len(self.fates) * 8 + 40):
            self.a_turn_ends()
            for process in [process for process in self.to_actor if process != self.alive]:
                del self.to_actor[process]
                self.unheard.add(process)
            while self.unheard:
                self._mourn(self.unheard.pop())  # its silence is noticed
            if self.alive is None and self.record.state is not ActorState.DEAD:
                self.an_incarnation_starts(True)
            while self.alive is not None and self.to_actor.get(self.alive):
                self.the_actor_works(False)
            while any(self.to_caller.values()):
                self._deliver(next(process for process, results in self.to_caller.items() if results))
            self.time_passes(ASK_SECONDS)
            self.the_control_store_answers()
        self.calls.sanity_check()
        assert {number for number, fate in self.fates.items() if fate.ended != 1} == set(), "every call ends"
        for order in self.order:
            fates = [self.fates[TaskNumber(number)] for number in order]
            firsts = [fate.call.wire.number for fate in fates if fate.retries == 0 and not fate.call.unordered]
            assert firsts == sorted(firsts), "calls run in the order in which they were made"
        assert self.calls.quiet()

    def _deliver(self, process: ProcessId) -> None:
        result = self.to_caller[process].popleft()
        if self.calls.done(process, result) is not None:
            self.fates[result.number].ended += 1

    def _mourn(self, process: ProcessId) -> None:
        self.dead.add(process)
        self.calls.process_died(process, self.now)

    def _record(self, record: ActorChanged, tell: bool) -> None:
        self.record = record
        self.told.append(record)
        if tell:
            self.calls.changed(record, self.now)


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
