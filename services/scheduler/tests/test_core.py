"""One scheduler, input by input."""

from __future__ import annotations

from typing import Any

from services.scheduler.tests.builders import announced, demand, entry, summary
from services.scheduler.tests.simulation import SUBJECTS, cpus, job_id
from shoal_core.protocol.effects import Answered, Ask, Connected, Effect, Event, Publish, WakeAt
from shoal_core.protocol.errors import NoRespondersError
from shoal_core.protocol.ids import ServiceId, SlotId
from shoal_core.protocol.messages import JobFinished, JobState, NodeAnnouncement, NodeDied, ProcessDied
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.scheduling import (
    Demand,
    DemandNotice,
    LeaseAnswer,
    LeaseRequest,
    RecallLeases,
    SchedulerPresence,
)
from shoal_core.protocol.traces import Attributes, Spanned
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.core import (
    ASK_AGAIN_SECONDS,
    AVOID_SECONDS,
    PLAN_SECONDS_FOR_A_NODE,
    SILENT_SECONDS,
    Begin,
    Scheduler,
)
from shoal_scheduler.demand import REST_SECONDS

OWNER = process_id(1, 0)
JOB = job_id(1)


class Driven:
    """A scheduler that has begun, and the leases it asked for last."""

    def __init__(self) -> None:
        self.core = Scheduler(SUBJECTS, ServiceId("me"))
        self(Begin(), 0.0)

    def __call__(self, message: Any, now: float) -> list[Effect]:
        if isinstance(message, Demand):
            message = Event(message, message.owner)
        elif isinstance(message, NodeAnnouncement):
            message = Event(message, message.node_id)
        return self.core.handle(message, now)

    def asks(self, message: Any, now: float) -> list[Ask]:
        return leases(self(message, now))


def leases(effects: list[Effect]) -> list[Ask]:
    return [effect for effect in effects if isinstance(effect, Ask) and isinstance(effect.message, LeaseRequest)]


def answer(ask: Ask, granted: list[int], refused: list[int], free: Resources, sequence: int = 1) -> Answered:
    slots = ([SlotId(slot) for slot in granted], [SlotId(slot) for slot in refused])
    message = LeaseAnswer(node_id=ask.context.node, granted=slots[0], refused=slots[1], free=free, sequence=sequence)
    return Answered(ask.context, message)


def wake(effects: list[Effect]) -> float:
    return min(effect.at for effect in effects if isinstance(effect, WakeAt))


def test_demand_becomes_one_ask_to_a_node_that_has_room() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(4)), 0.0)
    (ask,) = driven.asks(demand(1, 1, entry([1, 2])), 0.0)
    assert ask.subject == SUBJECTS.node_from_scheduler(node_id(1), "lease")
    assert ask.message == LeaseRequest(
        scheduler="me", owner=OWNER, job_id=JOB, key=0, slots=[SlotId(1), SlotId(2)], resources=cpus(1)
    )
    assert ask.span is None, "nobody traces"
    assert driven.asks(demand(1, 2, entry([1, 2])), 1.0) == [], "it is under way"


def test_asking_is_part_of_the_trace_of_a_task_that_waits() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(1)), 0.0)
    traced = entry([1, 2]).model_copy(update={"trace": "00-1-2-01", "name": "f"})
    (ask,) = driven.asks(demand(1, 1, traced), 2.0)
    about: Attributes = {
        "shoal.node.id": node_id(1),
        "shoal.lease.slots": 1,
        "shoal.lease.wanted": 2,
        "shoal.queue.seconds": 0.0,
    }
    assert ask.span == Spanned("schedule f", "00-1-2-01", 2.0, about)
    (ask,) = driven.asks(announced(2, 1, cpus(1)), 5.5)
    assert ask.span is not None
    assert (ask.span.began_at, ask.span.attributes["shoal.queue.seconds"]) == (2.0, 3.5), "since it was wanted"


def test_demand_in_anothers_name_is_ignored() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(4)), 0.0)
    assert driven(Event(demand(1, 1, entry([1])), process_id(2, 0)), 0.0) == []
    assert len(driven.core.demand) == 0


def test_what_is_asked_counts_as_used_until_the_node_answers() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    (ask,) = driven.asks(demand(1, 1, entry([1, 2])), 0.0)
    assert driven.asks(demand(2, 1, entry([1])), 0.0) == []
    assert driven.asks(announced(1, 2, cpus(2)), 0.1) == [], "the node does not know yet of what is on its way"
    (second,) = driven.asks(answer(ask, [1], [2], cpus(1), 2), 0.2)
    assert second.message == ask.message.model_copy(
        update={"owner": process_id(2, 0), "job_id": job_id(2), "slots": [SlotId(1)]}
    )
    assert driven.core.nodes[node_id(1)].free == cpus(0)


def test_an_old_announcement_or_answer_does_not_change_the_view() -> None:
    driven = Driven()
    driven(announced(1, 5, cpus(4), cpus(3)), 0.0)
    driven(announced(1, 4, cpus(4), cpus(4)), 0.1)
    assert driven.core.nodes[node_id(1)].free == cpus(3)
    (ask,) = driven.asks(demand(1, 1, entry([1])), 0.2)
    driven(answer(ask, [1], [], cpus(4), sequence=4), 0.3)
    assert driven.core.nodes[node_id(1)].free == cpus(3)


def test_a_node_that_refuses_although_it_has_room_is_left_alone_by_this_demand() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    (ask,) = driven.asks(demand(1, 1, entry([1])), 0.0)
    effects = driven(answer(ask, [], [1], cpus(2)), 0.1)
    assert leases(effects) == []
    assert wake(effects) == 0.1 + AVOID_SECONDS
    assert len(leases(driven.core.tick(0.1 + AVOID_SECONDS))) == 1
    assert sum(driven.core.counts.refusals.values()) == 1


def test_an_ask_that_nobody_answers_goes_to_another_node() -> None:
    driven = Driven()
    for number in (1, 2):
        driven(announced(number, 1, cpus(2)), 0.0)
    (ask,) = driven.asks(demand(1, 1, entry([1])), 0.0)
    first = ask.context.node
    (again,) = driven.asks(Answered(ask.context, NoRespondersError("nobody")), 0.1)
    assert again.context.node != first


def test_an_ask_whose_outcome_never_comes_is_given_up_by_time() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    effects = driven(demand(1, 1, entry([1])), 0.5)
    driven(announced(1, 2, cpus(2)), 2.0)
    (ask,) = leases(effects)
    assert leases(driven.core.tick(0.49 + ASK_AGAIN_SECONDS)) == []
    assert wake(driven.core.tick(2.4)) <= 0.5 + ASK_AGAIN_SECONDS
    driven.core.tick(0.5 + ASK_AGAIN_SECONDS)
    assert driven.core.asks == {}
    assert driven.core.nodes[node_id(1)].free == cpus(2)
    (again,) = leases(driven.core.tick(0.5 + ASK_AGAIN_SECONDS + AVOID_SECONDS))
    driven(answer(ask, [1], [], cpus(1)), 3.1)
    assert len(driven.core.demand) == 0, "a late grant counts all the same"
    driven(answer(again, [1], [], cpus(1)), 3.2)
    assert driven.core.asks == {}


def test_a_late_refusal_does_not_open_a_slot_that_is_asked_for_elsewhere() -> None:
    driven = Driven()
    for number in (1, 2):
        driven(announced(number, 1, cpus(2)), 0.0)
    (ask,) = driven.asks(demand(1, 1, entry([1])), 0.0)
    driven(announced(1, 2, cpus(2)), 1.9)
    driven(announced(2, 2, cpus(2)), 1.9)
    (again,) = leases(driven.core.tick(ASK_AGAIN_SECONDS))
    assert driven.asks(answer(ask, [], [1], cpus(0)), 2.1) == []
    assert list(driven.core.asks) == [again.context.number]


def test_what_was_asked_of_a_node_that_died_is_asked_of_another_at_once() -> None:
    driven = Driven()
    for number in (1, 2):
        driven(announced(number, 1, cpus(2)), 0.0)
    (ask,) = driven.asks(demand(1, 1, entry([1])), 0.0)
    (again,) = driven.asks(Event(NodeDied(node_id=ask.context.node, reason="killed"), "gcs"), 0.1)
    assert again.context.node != ask.context.node
    assert list(driven.core.nodes) == [again.context.node]


def test_the_demand_of_the_dead_is_dropped() -> None:
    driven = Driven()
    finished = JobFinished(job_id=JOB, driver=OWNER, state=JobState.FAILED, message="")
    died = ProcessDied(sequence=1, process_id=OWNER, reason="killed")
    for event in (finished, died):
        driven.core.demand.drop_owner(OWNER)
        driven(demand(1, 1, entry([1])), 0.0)
        assert len(driven.core.demand) == 1
        driven(Event(event, "source"), 0.1)
        assert driven.core.demand.known() == []


def test_nodes_and_replicas_that_are_silent_are_forgotten_unless_the_connection_was_lost() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    driven(Event(SchedulerPresence(scheduler="other"), "other"), 0.0)
    driven(Connected(False), 1.0)
    for second in range(2, 60):
        driven.core.tick(float(second))
    assert node_id(1) in driven.core.nodes
    driven(Connected(True), 60.0)
    driven.core.tick(60.0 + SILENT_SECONDS - 0.1)
    assert node_id(1) in driven.core.nodes
    driven.core.tick(61.0 + SILENT_SECONDS)
    assert driven.core.nodes == {}


def test_nothing_is_asked_without_a_connection() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    driven(Connected(False), 0.1)
    assert driven.asks(demand(1, 1, entry([1])), 0.2) == []
    assert len(driven.asks(Connected(True), 0.3)) == 1


def test_a_lease_is_asked_back_for_demand_that_waits() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2), {}, [summary(2, 2)]), 0.0)
    effects = driven(demand(1, 1, entry([1])), 0.0)
    recalls = [e for e in driven.core.tick(wake(effects)) if isinstance(e, Ask)]
    assert [ask.message for ask in recalls] == [RecallLeases(owner=process_id(2, 0), resources=cpus(1), count=1)]
    assert recalls[0].subject == SUBJECTS.node_from_scheduler(node_id(1), "recall")


def test_a_notice_is_told_once_and_after_a_moment() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    notices: list[Publish] = []
    now = wake(driven(demand(1, 1, entry([1], cpus(3))), 0.0))
    told_at: list[float] = []
    for version in range(2, 30):
        effects = [*driven(announced(1, version, cpus(2)), now), *driven(demand(1, version, entry([1], cpus(3))), now)]
        effects += driven.core.tick(now)
        for effect in effects:
            if isinstance(effect, Publish) and isinstance(effect.message, DemandNotice):
                notices.append(effect)
                told_at.append(now)
        now += 0.5
    assert [notice.subject for notice in notices] == [SUBJECTS.notice("me", OWNER)]
    assert 2.0 <= told_at[0] <= 3.0


def test_what_many_nodes_announce_in_a_moment_is_planned_once() -> None:
    driven = Driven()
    nodes = 100
    for number in range(1, nodes + 1):
        driven(announced(number, 1, cpus(1), {}), 0.0)
    assert driven.asks(demand(1, 1, entry([1, 2, 3])), 1.0) == []
    pause = nodes * PLAN_SECONDS_FOR_A_NODE
    for number in (1, 2, 3):
        effects = driven(announced(number, 2, cpus(1)), 1.0 + number * pause / 10)
        assert leases(effects) == []
        assert wake(effects) == 1.0 + pause
    assert len(leases(driven.core.tick(1.0 + pause))) == 3
    driven(demand(1, 2, entry([1, 2, 3, 4])), 1.0 + 2 * pause)
    assert len(driven.asks(announced(4, 2, cpus(1)), 1.0 + 4 * pause)) == 1, "at once, where nobody spoke before"


def test_whom_others_were_quicker_than_rests_longer_each_time() -> None:
    driven = Driven()
    driven(announced(1, 1, cpus(2)), 0.0)
    driven(announced(2, 1, cpus(2)), 0.0)
    driven.core.tick(1.0)
    (ask,) = driven.asks(demand(1, 1, entry([1])), 1.1)
    effects = driven(answer(ask, [], [1], {}, sequence=2), 1.1)
    assert leases(effects) == [], "the other node may be as full as this one"
    assert wake(effects) == 1.1 + REST_SECONDS
    (ask,) = leases(driven.core.tick(1.1 + REST_SECONDS))
    driven(answer(ask, [], [1], {}, sequence=2), 1.2)
    assert driven.asks(announced(1, 3, cpus(2)), 1.2 + 1.9 * REST_SECONDS) == []
    (ask,) = leases(driven.core.tick(1.2 + 2 * REST_SECONDS))
    driven(answer(ask, [1], [], cpus(1), sequence=4), 1.3)
    (ask,) = driven.asks(demand(1, 2, entry([2])), 1.4)
    effects = driven(answer(ask, [], [2], {}, sequence=5), 1.4)
    assert wake(effects) == 1.4 + REST_SECONDS, "a success makes up for it"


def presences(effects: list[Effect]) -> list[list[str]]:
    messages = [effect.message for effect in effects if isinstance(effect, Publish)]
    return [message.contended for message in messages if isinstance(message, SchedulerPresence)]


def test_what_one_replica_finds_contended_the_others_hear_of_at_once() -> None:
    one, other = Driven(), Driven()
    for driven, its_peer in ((one, "you"), (other, "me")):
        driven(announced(1, 1, cpus(1), {}), 0.0)
        driven(Event(SchedulerPresence(scheduler=its_peer), its_peer), 0.0)
        driven.core.tick(0.5)
    effects = one(demand(1, 1, entry([1])), 0.6)
    assert wake(effects) < 0.61, "long before the next sign of life is due"
    assert presences(one.core.tick(0.61)) == [["CPU"]]
    contention = other.core.waiting.contention
    assert contention.began_at(cpus(1), 0.62) is None
    other(Event(SchedulerPresence(scheduler="you", contended=["CPU"]), "you"), 0.62)
    assert contention.began_at(cpus(1), 2.0) == 0.62
    assert contention.began_at(cpus(1), 2.2) is None, "it was not said again"
    assert contention.found(0.62) == [], "and it does not say so itself"
