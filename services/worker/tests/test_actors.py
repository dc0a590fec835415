"""The actors of a node, step by step: what the table says and decides, and what the node does about it."""

from __future__ import annotations

from typing import Any, TypeVar

import pytest

from services.worker.tests.test_actors_properties import DRIVERS, JOBS, OWNERS, TOTAL, World
from services.worker.tests.test_node_properties import HERE, OTHERS, SUBJECTS
from shoal_core.protocol.actors import (
    ActorChanged,
    ActorClaim,
    ActorDeath,
    ActorEnded,
    ActorRecord,
    ActorStarted,
    ActorState,
    ClaimActor,
    HostedActor,
    NodeActors,
    changed,
)
from shoal_core.protocol.effects import Answered, Ask, Event, Publish, Received, Send, Start
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    NoRespondersError,
    RequestTimeoutError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import ActorId, LeaseId, ProcessId, node_of
from shoal_core.protocol.messages import Done, JobFinished, JobState, Message, ProcessDied
from shoal_core.protocol.records import ActorDismissed, ActorLeft, ActorReady, LeaseReturned, Record, WorkerBlocked
from shoal_core.protocol.resources import CPU, Resources, subtract, to_resources
from shoal_core.protocol.scheduling import ActorStart, LeaseRequest
from shoal_core.testing.builders import process_id
from shoal_worker.actors import REPEAT_SECONDS, TELL_SECONDS, About, ActorTable, Hosted, Phase, Verdict
from shoal_worker.inputs import KillProcess, KillSoon
from shoal_worker.workers.processes import ProcessState

DRIVER, OWNER = OWNERS[0], OWNERS[2]
LEASE = LeaseId(1)
PROCESS = process_id(5)
M = TypeVar("M", bound=Message)


# ------------------------------------------------------------------------------------ the table


class Table:
    """A table with one incarnation, of which all that it says is kept."""

    def __init__(self) -> None:
        world = World(0, at_once=False)
        world.create(DRIVER, 0, 1, False)
        (self.record,) = world.store.records.values()
        self.actor = self.record.description.actor_id
        self.table = ActorTable(HERE, SUBJECTS)
        self.table.granted(ActorStart(actor_id=self.actor, incarnation=0, owner=DRIVER), LEASE, 0.0)
        (self.hosted,) = self.table

    def said(self) -> list[Message]:
        """Return what was said since the last time."""
        self.table.sanity_check()
        effects, self.table.effects = self.table.effects, []
        return [effect.message for effect in effects if isinstance(effect, Ask | Publish)]

    def answer(self, verb: str, answer: Message | ShoalError) -> tuple[Hosted, Verdict] | None:
        return self.table.answered(Answered(About((self.actor, 0), verb), answer), 0.0)

    def claim(self) -> ActorClaim:
        return ActorClaim(record=self.record.model_copy(update={"node_id": HERE}), spec=b"spec")

    def claimed(self) -> None:
        assert self.answer("claim_actor", self.claim()) == (self.hosted, Verdict.START)
        self.said()

    def alive(self) -> None:
        self.claimed()
        self.table.assigned(self.hosted)
        self.table.ready(ActorReady(self.actor, 0, 1, "Named(1)"), PROCESS, 0.0)

    def news(self, state: ActorState, incarnation: int = 0, **fields: Any) -> ActorChanged:
        return changed(self.record.model_copy(update={"state": state, "incarnation": incarnation, **fields}))


@pytest.fixture
def table() -> Table:
    return Table()


def test_a_grant_claims_and_says_so_until_it_is_answered(table: Table) -> None:
    claim = ClaimActor(actor_id=table.actor, incarnation=0, node_id=HERE)
    assert table.said() == [claim]
    table.table.tick(REPEAT_SECONDS / 2)
    assert claim not in table.said()
    for error in (RequestTimeoutError("late"), NoRespondersError("nobody"), ServiceError("full")):
        assert table.answer("claim_actor", error) is None
    table.table.tick(REPEAT_SECONDS)
    assert table.said() == [claim]
    table.claimed()
    table.table.tick(10.0)
    assert claim not in table.said()
    assert (table.hosted.phase, table.hosted.spec, table.hosted.owner) == (Phase.WAITING, b"spec", DRIVER)


def test_a_claim_is_answered_once(table: Table) -> None:
    table.claimed()
    assert table.answer("claim_actor", table.claim()) is None
    assert table.answer("claim_actor", DeclaredDeadError("since killed")) is None
    assert table.hosted.phase is Phase.WAITING


def test_a_claim_that_is_refused_leaves_nothing_but_the_memory_of_the_grant(table: Table) -> None:
    assert table.answer("claim_actor", DeclaredDeadError("another has it")) == (table.hosted, Verdict.RELEASE)
    table.table.gone(table.hosted)
    assert len(table.table) == 0
    assert table.table.find(LEASE) is None
    assert table.table.knows(ActorStart(actor_id=table.actor, incarnation=0, owner=DRIVER))
    assert not table.table.knows(ActorStart(actor_id=table.actor, incarnation=1, owner=DRIVER))


def test_an_end_before_the_claim_is_answered_is_told_if_the_claim_was_granted(table: Table) -> None:
    table.said()
    table.table.over(table.hosted, "its job has ended", 0.0)
    assert table.said() == []
    assert table.answer("claim_actor", table.claim()) is None
    (ended,) = table.said()
    assert ended == ActorEnded(actor_id=table.actor, incarnation=0, node_id=HERE, reason="its job has ended")
    assert table.answer("actor_ended", Done()) is None
    assert len(table.table) == 0


def test_an_instance_that_is_made_is_told_with_its_process(table: Table) -> None:
    table.table.ready(ActorReady(table.actor, 0, 1), PROCESS, 0.0)
    assert table.hosted.phase is Phase.CLAIMING, "nobody can have made it yet"
    table.said()
    table.alive()
    started = ActorStarted(
        actor_id=table.actor, incarnation=0, node_id=HERE, process_id=PROCESS, pid=1, repr_name="Named(1)"
    )
    assert table.said() == [started]
    table.table.ready(ActorReady(table.actor, 0, 1), PROCESS, 0.0)
    assert table.said() == []
    assert table.answer("actor_started", DeclaredDeadError("killed")) == (table.hosted, Verdict.KILL)


def test_an_end_is_told_once_until_it_is_heard_and_a_start_no_more(table: Table) -> None:
    table.alive()
    table.said()
    table.table.over(table.hosted, "it raised", 0.0, b"error", final=True)
    table.table.over(table.hosted, "its process ended", 0.0)
    (ended,) = table.said()
    assert isinstance(ended, ActorEnded)
    assert (ended.reason, ended.error, ended.final) == ("it raised", b"error", True)
    assert table.answer("actor_started", DeclaredDeadError("it has ended")) is None
    assert table.answer("actor_ended", NoRespondersError("nobody")) is None
    table.table.tick(REPEAT_SECONDS)
    assert ended in table.said()
    assert table.answer("actor_ended", Done()) is None
    assert len(table.table) == 0
    table.table.tick(10.0)
    assert table.said() == []


@pytest.mark.parametrize(
    ("state", "fields", "verdict"),
    [
        (ActorState.DEAD, {}, Verdict.KILL),
        (ActorState.DEAD, {"graceful": True}, Verdict.DISMISS),
        (ActorState.RESTARTING, {"incarnation": 1}, Verdict.KILL),
        (ActorState.ALIVE, {"incarnation": 2, "node_id": HERE}, Verdict.KILL),
        (ActorState.PENDING_CREATION, {"node_id": OTHERS[0]}, Verdict.KILL),
        (ActorState.PENDING_CREATION, {}, None),
        (ActorState.PENDING_CREATION, {"node_id": HERE}, None),
        (ActorState.ALIVE, {"node_id": HERE}, None),
    ],
)
def test_news_end_what_the_record_does_not_name_any_more(
    table: Table, state: ActorState, fields: dict[str, Any], verdict: Verdict | None
) -> None:
    table.alive()
    expected = [] if verdict is None else [(table.hosted, verdict)]
    news = table.news(state, **fields)
    assert table.table.changed(news) == expected
    assert table.table.changed(news.model_copy(update={"actor_id": ActorId("another")})) == []
    table.table.over(table.hosted, "it ended", 0.0)
    assert table.table.changed(news) == []


def test_old_news_end_no_later_incarnation(table: Table) -> None:
    table.table.granted(ActorStart(actor_id=table.actor, incarnation=1, owner=DRIVER), LeaseId(2), 0.0)
    assert table.table.changed(table.news(ActorState.RESTARTING, 1)) == [(table.hosted, Verdict.KILL)]
    assert table.table.changed(table.news(ActorState.ALIVE, 0, node_id=OTHERS[0])) == [(table.hosted, Verdict.KILL)]


def test_an_actor_that_is_not_made_yet_is_killed_and_not_dismissed(table: Table) -> None:
    gone = table.news(ActorState.DEAD, graceful=True)
    assert table.table.changed(gone) == [(table.hosted, Verdict.KILL)]
    table.claimed()
    table.table.assigned(table.hosted)
    assert table.table.changed(gone) == [(table.hosted, Verdict.KILL)]


def test_whom_a_node_hosts_is_told_every_other_second(table: Table) -> None:
    table.claimed()
    here = NodeActors(node_id=HERE, actors=[HostedActor(actor_id=table.actor, incarnation=0)])
    table.table.tick(10.0)
    assert table.said() == [here]
    table.table.tick(10.0 + TELL_SECONDS / 2)
    assert table.said() == []
    table.table.tick(10.0 + TELL_SECONDS)
    assert table.said() == [here]


def test_the_owners_are_those_of_claimed_actors_that_are_not_detached(table: Table) -> None:
    assert table.table.owners() == set()
    table.claimed()
    assert table.table.owners() == {DRIVER}
    assert table.table.owned_by(DRIVER) == [table.hosted]
    about = table.record.description.model_copy(update={"detached": True})
    table.hosted.record = table.record.model_copy(update={"description": about})
    assert (table.table.owners(), table.table.owned_by(DRIVER)) == (set(), [])


# ------------------------------------------------------------------------------------ the node


class Node:
    """A node with one actor of one CPU to be placed by two, and all that it did since it was last looked at."""

    def __init__(self, *, owner: ProcessId = OWNER, resources: Resources | None = None, detached: bool = False) -> None:
        self.world = World(0, at_once=True)
        self.core = self.world.core
        self.world.create(owner, 0, 3, detached)
        (record,) = self.world.store.records.values()
        self.actor = record.description.actor_id
        placed = {"placement": to_resources({CPU: 2}), "resources": resources or to_resources({CPU: 1})}
        about = record.description.model_copy(update=placed)
        self.world.store.records[self.actor] = record.model_copy(update={"description": about})
        self.effects = self.world.effects

    @property
    def record(self) -> ActorRecord:
        return self.world.store.records[self.actor]

    @property
    def process(self) -> ProcessId:
        """The process that was the last to make the actor."""
        return list(self.world.made.values())[-1]

    @property
    def lease(self) -> LeaseId:
        """The lease that the process serves."""
        lease = self.world.workers[self.process].lease
        assert lease is not None
        return lease

    def request(self, incarnation: int = 0) -> LeaseRequest:
        return self.world.lease_request(self.actor, incarnation)

    def placed(self) -> None:
        self.world.request(self.request())

    def answer(self) -> None:
        """Have every question answered."""
        for ask in list(self.world.asks):
            self.world.arrive(ask)
        for answer in list(self.world.answers):
            self.world.deliver(answer)
        self.world.proceed()
        self.world.check()

    def alive(self) -> None:
        self.placed()
        self.answer()
        self.say(ActorReady(self.actor, 0, 1))
        self.answer()
        assert self.record.state is ActorState.ALIVE
        self.effects.clear()

    def say(self, record: Record, process: ProcessId | None = None) -> None:
        """Have a process say something, by default the actor's."""
        process = process or self.process
        worker = self.world.workers[process]
        if worker.made is not None:
            worker.alive = worker.alive or isinstance(record, ActorReady)
            worker.left = worker.left or isinstance(record, ActorLeft)
        self.world.say(process, record)
        self.world.hear(process)
        self.world.check()

    def news(self) -> None:
        """Tell the node of the record as it is."""
        self.world.inject(Event(changed(self.record), "gcs"))
        self.world.check()

    def took(self, command: object) -> bool:
        return Start(command) in self.effects

    def asked(self, kind: type[M]) -> list[M]:
        messages = [effect.message for effect in self.effects if isinstance(effect, Ask)]
        return [message for message in messages if isinstance(message, kind)]

    def held(self) -> Resources:
        return subtract(TOTAL, self.core.leases.free)

    def reap(self) -> None:
        self.world.end_worker(self.process)
        self.world.check()


def test_an_actor_holds_what_it_is_placed_by_until_it_is_claimed_and_then_what_it_needs() -> None:
    node = Node()
    node.placed()
    assert node.held() == to_resources({CPU: 2})
    node.answer()
    assert node.held() == to_resources({CPU: 1})
    node.alive()
    node.world.inject(Received(node.process, [WorkerBlocked(node.lease, True)]))
    assert node.held() == {}, "a call that waits gives its CPU to others"
    node.world.inject(Received(node.process, [WorkerBlocked(node.lease, False)]))
    assert node.held() == to_resources({CPU: 1})
    node.world.store.follow(node.actor, dead=True)
    node.news()
    node.reap()
    assert node.held() == {}


def test_a_process_starts_while_the_actor_is_being_claimed_and_waits_for_the_next_if_it_is_not() -> None:
    node = Node()
    node.placed()
    (process,) = node.core.processes
    node.world.store.claim(ClaimActor(actor_id=node.actor, incarnation=0, node_id=OTHERS[0]))
    node.answer()
    assert [(one.process_id, one.state) for one in node.core.processes] == [(process.process_id, ProcessState.IDLE)]


def test_a_request_that_comes_again_is_granted_again_and_starts_nothing() -> None:
    node = Node()
    for _ in range(3):
        node.placed()
    node.alive()
    node.placed()
    assert len(node.core.leases) == 1
    node.say(ActorLeft(node.actor, 0, "it left"))
    node.answer()
    node.effects.clear()
    node.placed()
    assert (len(node.core.leases), node.asked(ClaimActor)) == (0, [])


def test_a_claim_whose_answer_was_lost_is_asked_for_again_and_starts_once() -> None:
    node = Node()
    node.placed()
    (ask,) = [ask for ask in node.world.asks if isinstance(ask.message, ClaimActor)]
    node.world.arrive(ask)
    node.world.deliver(node.world.answers[-1], RequestTimeoutError("lost"))
    node.world.tick(1.0)
    node.answer()
    assert [*node.world.made] == [(node.actor, 0)]


def test_a_refused_claim_frees_the_place() -> None:
    node = Node()
    node.placed()
    node.world.store.claim(ClaimActor(actor_id=node.actor, incarnation=0, node_id=OTHERS[0]))
    node.answer()
    assert (len(node.core.leases), len(node.core.actors), node.held()) == (0, 0, {})
    assert not node.asked(ActorEnded)


def test_a_process_that_is_killed_ends_its_incarnation_and_the_next_may_come_here() -> None:
    node = Node()
    node.alive()
    first = node.process
    node.reap()
    (ended,) = node.asked(ActorEnded)
    assert (ended.reason, ended.final) == ("it ended", False)
    node.answer()
    node.world.request(node.request(1))
    node.answer()
    assert node.process != first


def test_an_init_that_raises_is_a_final_end_and_its_process_stays_while_it_is_needed() -> None:
    node = Node()
    node.placed()
    node.answer()
    process = node.process
    node.say(ActorLeft(node.actor, 0, "it raised", b"error"))
    (ended,) = node.asked(ActorEnded)
    assert (ended.reason, ended.error, ended.final) == ("it raised", b"error", True)
    assert node.held() == {}
    assert not node.took(KillProcess(process))
    node.answer()
    assert node.record.state is ActorState.DEAD


def test_a_released_actor_is_dismissed() -> None:
    node = Node()
    node.alive()
    node.world.store.follow(node.actor, dead=True, graceful=True)
    process = node.process
    node.news()
    node.news()
    assert [e for e in node.effects if isinstance(e, Send)] == [
        Send(process, ActorDismissed(node.actor, "it is started anew"))
    ]
    assert not node.took(KillProcess(process))
    assert node.held() == {}


def test_a_killed_actor_holds_what_it_has_until_its_process_was_reaped() -> None:
    node = Node()
    node.alive()
    death = ActorDeath(reason="it was killed by kill()")
    node.world.store.put(node.record, state=ActorState.DEAD, process_id=None, death=death)
    process = node.process
    node.news()
    node.news()
    assert node.effects.count(Start(KillProcess(process))) == 1
    assert node.held() == to_resources({CPU: 1})
    assert not node.asked(ActorEnded)
    node.reap()
    (ended,) = node.asked(ActorEnded)
    assert ended.reason == "it was killed by kill()"
    assert node.held() == {}


@pytest.mark.parametrize("dismissed", [False, True])
def test_an_actor_that_leaves_or_is_dismissed_while_it_is_killed_holds_what_it_has_until_then(dismissed: bool) -> None:
    node = Node()
    node.alive()
    process = node.process
    node.world.store.follow(node.actor)
    node.news()
    assert node.took(KillProcess(process))
    node.effects.clear()
    if dismissed:
        node.world.store.follow(node.actor, dead=True, graceful=True)
        node.news()
    else:
        node.say(ActorLeft(node.actor, 0, "it left"), process)
    assert node.held() == to_resources({CPU: 1})
    node.world.inject(
        Event(JobFinished(job_id=JOBS[0], driver=DRIVERS[0], state=JobState.SUCCEEDED, message=""), "gcs")
    )
    assert not node.took(KillProcess(process)), "it is killed once"
    assert not [effect for effect in node.effects if isinstance(effect, Send)]
    node.world.end_worker(process)
    assert node.held() == {}
    assert len(node.asked(ActorEnded)) == 1


@pytest.mark.parametrize("claimed_before", [True, False])
def test_an_actor_ends_for_good_with_its_owner_whenever_the_node_hears_of_it(claimed_before: bool) -> None:
    node = Node()
    died = Event(ProcessDied(sequence=1, process_id=OWNER, reason=""), node_of(OWNER))
    if claimed_before:
        node.alive()
        node.world.inject(died)
        assert node.took(KillSoon(node.process))
        node.reap()
    else:
        node.placed()
        node.world.inject(died)
        node.answer()
        assert not node.world.made
    (ended,) = node.asked(ActorEnded)
    assert (ended.reason, ended.final) == ("its owner has died", True)
    node.answer()
    assert (node.record.state, node.held()) == (ActorState.DEAD, {})


def test_a_detached_actor_outlives_its_owner() -> None:
    node = Node(detached=True)
    node.alive()
    node.world.inject(Event(ProcessDied(sequence=1, process_id=OWNER, reason=""), node_of(OWNER)))
    assert not node.took(KillProcess(node.process))
    assert node.held() == to_resources({CPU: 1})


def test_an_actor_ends_with_its_job_also_before_its_claim_is_answered() -> None:
    node = Node()
    node.placed()
    finished = JobFinished(job_id=JOBS[0], driver=DRIVERS[0], state=JobState.FAILED, message="")
    node.world.inject(Event(finished, "gcs"))
    assert node.held() == {}
    node.answer()
    assert len(node.asked(ActorEnded)) == 1
    assert not node.world.made
    node.answer()
    assert len(node.core.actors) == 0


def test_nobody_speaks_for_the_process_of_another_actor() -> None:
    node = Node()
    node.placed()
    node.answer()
    task = LeaseRequest(scheduler="s", owner=DRIVER, job_id=JOBS[0], key=1, slots=[], resources={})
    node.world.request(task.model_copy(update={"slots": [1]}))
    node.world.proceed()
    (liar,) = node.world.task_leases.values()
    node.say(ActorReady(node.actor, 0, 1), liar)
    node.say(ActorLeft(node.actor, 0, "a lie"), liar)
    assert not node.asked(ActorStarted)
    assert not node.asked(ActorEnded)
    node.say(ActorReady(node.actor, 0, 1))
    assert [started.process_id for started in node.asked(ActorStarted)] == [node.process]


def test_the_lease_of_an_actor_is_nobodys_to_give_back() -> None:
    node = Node()
    node.alive()
    for who in (ProcessId(node.actor), OWNER, node.process):
        node.world.inject(Received(who, [LeaseReturned(node.lease, True)]))
    assert not node.took(KillProcess(node.process))
    assert len(node.core.leases) == 1


def test_a_start_that_is_refused_ends_the_process() -> None:
    node = Node()
    node.placed()
    node.answer()
    node.world.store.follow(node.actor)
    node.say(ActorReady(node.actor, 0, 1))
    node.answer()
    assert node.took(KillProcess(node.process))
    node.reap()
    assert len(node.asked(ActorEnded)) == 1
