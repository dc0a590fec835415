"""Each step of an actor's life in the control store, and what replicas that are behind or crash must not do to it."""

from __future__ import annotations

from typing import Any

import pytest

from services.gcs.tests.builders import description, job_request
from services.gcs.tests.simulation import Asked, Replica
from services.gcs.tests.test_actors_replicas import DRIVERS, WORKERS, ActorWorld, about, spec
from shoal_core.protocol.actors import (
    MOST_METHODS_BYTES,
    MOST_SPEC_BYTES,
    ActorClaim,
    ActorEnded,
    ActorList,
    ActorRecord,
    ActorStarted,
    ActorState,
    ClaimActor,
    CreateActor,
    FindActor,
    GetActor,
    HostedActor,
    KillActor,
    ListActors,
    NodeActors,
    OpenActorJob,
    ReleaseActor,
)
from shoal_core.protocol.effects import Event, StoreRefused
from shoal_core.protocol.errors import (
    ActorAlreadyExistsError,
    BufferFullError,
    DeclaredDeadError,
    InvalidRequestError,
    NotFoundError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import ActorId, NodeId, actor_id
from shoal_core.protocol.messages import Done, FinishJob, JobRecord, JobState, Message, ProcessDied, RetireNode
from shoal_core.protocol.placement import NodeAffinity
from shoal_core.testing.builders import node_id, process_id
from shoal_gcs.actor_operations import Change, Ended, Kill, Started, dead
from shoal_gcs.actors import KEEP_DEAD_SECONDS, LISTED, NAMING_SECONDS, ORPHAN_SECONDS, UNKNOWN_NODE_SECONDS
from shoal_gcs.records import NAME_BYTES, job_id, name_key

ACTOR = actor_id(DRIVERS[0], 1)
HERE, THERE = node_id(1), node_id(2)
PROCESS = process_id(7)

NAMING, PENDING, ALIVE = ActorState.NAMING, ActorState.PENDING_CREATION, ActorState.ALIVE
RESTARTING, DEAD = ActorState.RESTARTING, ActorState.DEAD


def record(state: ActorState = PENDING, *, max_restarts: int = 0, **fields: Any) -> ActorRecord:
    """Return a record; one that is ALIVE was claimed here."""
    if state is ALIVE:
        fields = {"node_id": HERE, "process_id": PROCESS, "pid": 1, **fields}
    mine = about(ACTOR, DRIVERS[0], max_restarts=max_restarts)
    return ActorRecord(description=mine, state=state, created_at=1.0, **fields)


def after(change: Change, before: ActorRecord) -> ActorRecord:
    following = change.next(before, 5.0)
    assert isinstance(following, ActorRecord)
    return following


# ------------------------------------------------------------------------------------ how records change


@pytest.mark.parametrize("state", [NAMING, PENDING, ALIVE, RESTARTING])
@pytest.mark.parametrize("graceful", [True, False])
def test_a_kill_for_good_ends_whatever_lives(state: ActorState, graceful: bool) -> None:
    gone = after(Kill("told to", graceful=graceful), record(state, max_restarts=-1))
    assert gone.death is not None
    assert (gone.state, gone.death.reason, gone.ended_at, gone.process_id) == (DEAD, "told to", 5.0, None)
    assert (gone.graceful, gone.description.methods) == (graceful, b"")


def test_the_dead_are_not_killed_again() -> None:
    gone = dead(record(ALIVE), "first", 2.0)
    for change in (
        Kill("again"),
        Kill("again", no_restart=False),
        Ended(0, HERE, "late"),
        Ended(0, HERE, "", b"", True),
    ):
        assert change.next(gone, 5.0) is None
        assert not change.is_ahead(gone)


def test_a_kill_to_be_started_again_means_the_incarnation_that_was_there() -> None:
    alive = record(ALIVE, max_restarts=-1)
    kill = Kill("told to", no_restart=False).aimed(alive)
    again = after(kill, alive)
    assert (again.state, again.incarnation, again.node_id, again.process_id, again.pid) == (
        RESTARTING,
        1,
        None,
        None,
        0,
    )
    claimed = again.model_copy(update={"node_id": THERE})
    assert kill.next(claimed, 5.0) is None, "the next incarnation is not meant"
    assert kill.aimed(claimed) == kill


def test_a_kill_to_be_started_again_asks_the_leader_first() -> None:
    kill = Kill("told to", no_restart=False)
    assert kill.is_ahead(record(PENDING))
    assert not kill.aimed(record(PENDING)).is_ahead(record(PENDING))
    assert not Kill("told to").is_ahead(record(PENDING))


@pytest.mark.parametrize("state", [PENDING, RESTARTING])
def test_an_incarnation_that_nobody_has_needs_no_restart(state: ActorState) -> None:
    waiting = record(state, max_restarts=-1)
    assert Kill("", no_restart=False).aimed(waiting).next(waiting, 5.0) is None


@pytest.mark.parametrize(
    ("most", "incarnation", "reason"),
    [(0, 0, "it ended"), (1, 1, "it ended, after 1 restart"), (3, 3, "it ended, after 3 restarts")],
)
def test_an_end_after_the_last_restart_is_a_death(most: int, incarnation: int, reason: str) -> None:
    gone = after(Ended(incarnation, HERE, "it ended"), record(ALIVE, max_restarts=most, incarnation=incarnation))
    assert gone.state is DEAD
    assert gone.death is not None
    assert gone.death.reason == reason


@pytest.mark.parametrize("most", [-1, 5])
def test_an_end_that_nobody_wanted_is_followed_by_the_next_incarnation(most: int) -> None:
    again = after(Ended(4, HERE, "it ended"), record(ALIVE, max_restarts=most, incarnation=4))
    assert (again.state, again.incarnation, again.node_id, again.process_id) == (RESTARTING, 5, None, None)


def test_a_final_end_is_a_death_however_many_restarts_are_left() -> None:
    gone = after(Ended(0, HERE, "it raised", b"pickle", final=True), record(PENDING, max_restarts=-1, node_id=HERE))
    assert gone.death is not None
    assert (gone.state, gone.death.reason, gone.death.error) == (DEAD, "it raised", b"pickle")


def test_an_end_of_another_incarnation_or_node_changes_nothing() -> None:
    alive = record(ALIVE, max_restarts=-1, incarnation=2)
    for change in (Ended(1, HERE, ""), Ended(2, THERE, ""), Ended(1, HERE, "", b"", True)):
        assert change.next(alive, 5.0) is None
        assert not change.is_ahead(alive)


def test_a_start_publishes_where_the_actor_is_called() -> None:
    started = Started(1, HERE, PROCESS, 42, "Named(1)")
    alive = after(started, record(RESTARTING, max_restarts=1, incarnation=1, node_id=HERE))
    assert (alive.state, alive.process_id, alive.pid, alive.node_id) == (ALIVE, PROCESS, 42, HERE)
    assert alive.repr_name == "Named(1)"
    assert started.next(alive, 6.0) is None
    assert started.answer(alive) == alive


@pytest.mark.parametrize(
    "other",
    [
        record(ALIVE, incarnation=2),
        record(PENDING, incarnation=1, node_id=THERE),
        record(RESTARTING, incarnation=2),
        dead(record(ALIVE, incarnation=1), "killed", 2.0),
    ],
)
def test_a_start_that_is_not_wanted_any_more_is_refused(other: ActorRecord) -> None:
    started = Started(1, HERE, PROCESS, 42)
    assert isinstance(started.next(other, 5.0), DeclaredDeadError)
    assert not started.is_ahead(other)


@pytest.mark.parametrize("behind", [record(PENDING), record(ALIVE), record(RESTARTING, incarnation=1)])
def test_what_a_node_says_of_a_claim_that_the_cache_has_not_heard_of_is_ahead(behind: ActorRecord) -> None:
    assert Started(1, HERE, PROCESS, 42).is_ahead(behind)
    assert Ended(1, HERE, "").is_ahead(behind)


# ------------------------------------------------------------------------------------ replicas


class Cluster:
    """Two replicas, of which the second may be made to hear nothing for a while, and two nodes and jobs."""

    def __init__(self) -> None:
        self.world = ActorWorld()
        self.one, self.two = self.world.start(), self.world.start()
        for request in (description(1), description(2)):
            self.settled(request)
        for number, driver in enumerate(DRIVERS, 1):
            self.settled(job_request(1).model_copy(update={"driver": driver}))
            self.world.drivers[job_id(number)] = driver

    def settled(self, message: Message, replica: Replica | None = None) -> Message | ShoalError:
        return self.world.settled(replica or self.one, message)

    def deafen(self, replica: Replica) -> None:
        """From now on it has only the cache that it has, until something that it asks for comes back."""
        self.world.run()
        self.world.replicas.remove(replica)

    def undeafen(self, replica: Replica) -> None:
        self.world.replicas.append(replica)

    def create(self, name: str = "", number: int = 1, *, any_: bool = False, **fields: Any) -> CreateActor:
        actor = actor_id(fields.pop("owner", DRIVERS[0]), number)
        mine = about(actor, fields.pop("by", DRIVERS[0]), name=name, **fields)
        return CreateActor(description=mine, spec=spec(actor), get_if_exists=any_)

    def record(self, actor: ActorId = ACTOR) -> ActorRecord:
        return self.world.store.actors[actor]

    def claim(self, incarnation: int = 0, node: NodeId = HERE, actor: ActorId = ACTOR) -> ClaimActor:
        return ClaimActor(actor_id=actor, incarnation=incarnation, node_id=node)

    def started(self, incarnation: int = 0, node: NodeId = HERE) -> ActorStarted:
        return ActorStarted(actor_id=ACTOR, incarnation=incarnation, node_id=node, process_id=PROCESS, pid=1)

    def ended(self, incarnation: int = 0, node: NodeId = HERE, *, final: bool = False) -> ActorEnded:
        return ActorEnded(actor_id=ACTOR, incarnation=incarnation, node_id=node, reason="it ended", final=final)

    def alive(self, **fields: Any) -> None:
        self.settled(self.create(**fields))
        self.settled(self.claim())
        assert isinstance(self.settled(self.started()), ActorRecord)

    def seconds(self, count: int) -> None:
        for _ in range(count):
            self.world.second()

    def step_until(self, condition: Any) -> None:
        """Let things happen one by one until something is so."""
        self.world._tell_watches()
        while not condition():
            assert self.world.steps(), "nothing more can happen"
            self.world.take(0)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


KILL = KillActor(actor_id=ACTOR, reason="killed")
KILL_AND_RESTART = KillActor(actor_id=ACTOR, reason="killed", no_restart=False)


def test_an_actor_is_created_claimed_started_and_ended(cluster: Cluster) -> None:
    created = cluster.settled(cluster.create())
    assert isinstance(created, ActorRecord)
    assert created.state is PENDING
    ((start, demand),) = cluster.world.wanted()
    assert (start.actor_id, start.incarnation, demand.entries[0].resources) == (ACTOR, 0, {"CPU": 10_000})
    claim = cluster.settled(cluster.claim())
    assert isinstance(claim, ActorClaim)
    assert (claim.spec, claim.record.node_id) == (spec(ACTOR), HERE)
    assert claim.config == cluster.one.core.state.jobs[claim.record.description.job_id].value.record.config
    assert not cluster.world.wanted()
    assert cluster.settled(cluster.started()) == cluster.record()
    assert cluster.record().state is ALIVE
    assert cluster.settled(cluster.ended()) == Done()
    assert cluster.record().state is DEAD
    assert not cluster.world.store.specs()


def test_demand_is_repeated_until_the_incarnation_is_claimed(cluster: Cluster) -> None:
    cluster.settled(cluster.create())
    for _ in range(3):
        cluster.world.demands.clear()
        cluster.seconds(1)
        assert [start.actor_id for start, _ in cluster.world.wanted()] == [ACTOR]
    cluster.settled(cluster.claim())
    cluster.world.demands.clear()
    cluster.seconds(2)
    assert not cluster.world.wanted()


def test_that_it_has_a_place_is_stated_when_it_is_claimed_and_not_again_when_it_is_made(cluster: Cluster) -> None:
    cluster.settled(cluster.create())
    cluster.settled(cluster.claim())
    assert [demand.entries for demand in cluster.world.demands.values()] == [[]]
    cluster.world.demands.clear()
    cluster.settled(cluster.started())
    assert cluster.record().state is ActorState.ALIVE
    assert not cluster.world.demands


def test_one_node_has_an_incarnation_however_often_it_asks(cluster: Cluster) -> None:
    cluster.settled(cluster.create())
    cluster.deafen(cluster.two)
    first = cluster.settled(cluster.claim())
    cluster.undeafen(cluster.two)
    assert cluster.settled(cluster.claim(), cluster.two) == first
    assert isinstance(cluster.settled(cluster.claim(node=THERE), cluster.two), DeclaredDeadError)


def test_a_claim_through_a_replica_that_has_not_heard_of_the_decided_name_is_granted(cluster: Cluster) -> None:
    cluster.world.ask(cluster.one, cluster.create("n"))
    cluster.step_until(lambda: ACTOR in cluster.two.core.state.actors)
    cluster.world.replicas.remove(cluster.two)
    cluster.world.run()
    cluster.undeafen(cluster.two)
    assert cluster.two.core.state.actors[ACTOR].value.state is NAMING
    cluster.two.changes.clear()
    assert isinstance(cluster.settled(cluster.claim(), cluster.two), ActorClaim)


def test_a_claim_of_a_node_that_was_declared_dead_costs_no_incarnation(cluster: Cluster) -> None:
    cluster.settled(cluster.create())
    cluster.settled(RetireNode(node_id=THERE, reason="silent"))
    assert isinstance(cluster.settled(cluster.claim(node=THERE)), DeclaredDeadError)
    assert isinstance(cluster.settled(cluster.claim()), ActorClaim)


def test_a_claim_of_what_nobody_knows_is_refused(cluster: Cluster) -> None:
    assert isinstance(cluster.settled(cluster.claim()), DeclaredDeadError)
    cluster.settled(cluster.create())
    assert isinstance(cluster.settled(cluster.claim(1)), DeclaredDeadError)
    cluster.settled(KILL)
    assert isinstance(cluster.settled(cluster.claim()), DeclaredDeadError)


def test_an_end_that_is_said_again_does_not_end_the_next_incarnation(cluster: Cluster) -> None:
    cluster.alive(max_restarts=-1)
    cluster.settled(cluster.ended())
    cluster.settled(cluster.claim(1, THERE))
    for replica in (cluster.one, cluster.two):
        assert cluster.settled(cluster.ended(), replica) == Done()
        assert isinstance(cluster.settled(cluster.started(), replica), DeclaredDeadError)
    assert (cluster.record().incarnation, cluster.record().node_id) == (1, THERE)


def test_a_replica_that_is_behind_takes_what_a_node_says(cluster: Cluster) -> None:
    cluster.settled(cluster.create(max_restarts=1))
    cluster.deafen(cluster.two)
    cluster.settled(cluster.claim())
    cluster.undeafen(cluster.two)
    assert isinstance(cluster.settled(cluster.started(), cluster.two), ActorRecord)
    cluster.deafen(cluster.one)
    cluster.settled(cluster.ended(), cluster.two)
    cluster.settled(cluster.claim(1), cluster.two)
    cluster.undeafen(cluster.one)
    assert cluster.settled(cluster.ended(1), cluster.one) == Done()
    assert cluster.record().state is DEAD


def test_a_kill_to_be_started_again_is_done_by_a_replica_that_does_not_know_that_the_actor_lives(
    cluster: Cluster,
) -> None:
    cluster.settled(cluster.create(max_restarts=1))
    cluster.deafen(cluster.two)
    cluster.settled(cluster.claim())
    cluster.settled(cluster.started())
    cluster.undeafen(cluster.two)
    assert cluster.settled(KILL_AND_RESTART, cluster.two) == Done()
    assert (cluster.record().state, cluster.record().incarnation) == (RESTARTING, 1)


def test_a_kill_whose_answer_was_lost_and_that_was_followed_by_a_claim_does_not_kill_again(cluster: Cluster) -> None:
    cluster.alive(max_restarts=-1)
    asked = cluster.world.ask(cluster.one, KILL_AND_RESTART)
    cluster.step_until(lambda: any(running.stores for running in cluster.one.running))
    cluster.one.attempt(next(running for running in cluster.one.running if running.stores).stores[0], "lost answer")
    cluster.world.replicas.remove(cluster.one)
    cluster.settled(cluster.claim(1), cluster.two)
    cluster.undeafen(cluster.one)
    cluster.world.run()
    assert asked.answer == Done()
    assert (cluster.record().incarnation, cluster.record().node_id) == (1, HERE)


def test_a_kill_that_comes_with_the_end_starts_the_actor_again_once(cluster: Cluster) -> None:
    cluster.alive(max_restarts=-1)
    asked = [cluster.world.ask(cluster.two, KILL_AND_RESTART), cluster.world.ask(cluster.one, cluster.ended())]
    cluster.world.run()
    assert [one.answer for one in asked] == [Done(), Done()]
    assert cluster.record().incarnation == 1


def test_the_actors_of_a_dead_node_are_started_elsewhere_or_dead(cluster: Cluster) -> None:
    cluster.alive(max_restarts=1)
    cluster.settled(RetireNode(node_id=HERE, reason="silent"))
    cluster.seconds(1)
    assert (cluster.record().state, cluster.record().incarnation) == (RESTARTING, 1)
    cluster.settled(cluster.claim(1, THERE))
    cluster.settled(RetireNode(node_id=THERE, reason="silent"))
    cluster.seconds(1)
    death = cluster.record().death
    assert death is not None
    assert death.reason == f"its node {THERE} has died, after 1 restart"


def test_an_actor_that_is_bound_to_a_node_ends_where_that_can_never_hold_it(cluster: Cluster) -> None:
    bound = {
        1: NodeAffinity(HERE, soft=False),
        2: NodeAffinity(THERE, soft=False),
        3: NodeAffinity(THERE, soft=True),
        4: NodeAffinity(node_id(9), soft=False),
    }
    cluster.settled(RetireNode(node_id=THERE, reason="silent"))
    for number, strategy in bound.items():
        cluster.settled(cluster.create(number=number, strategy=strategy))
    too_large = cluster.create(number=5, strategy=bound[1])
    needs = too_large.description.model_copy(update={"placement": {"CPU": 50_000}})
    cluster.settled(too_large.model_copy(update={"description": needs}))
    cluster.seconds(1)
    assert cluster.record(actor_id(DRIVERS[0], 4)).state is PENDING, "it may have joined, and not be known here"
    cluster.seconds(round(UNKNOWN_NODE_SECONDS) + 1)
    assert [cluster.record(actor_id(DRIVERS[0], number)).state for number in (1, 3)] == [PENDING, PENDING]
    deaths = [cluster.record(actor_id(DRIVERS[0], number)).death for number in (2, 4, 5)]
    assert [death.code if death else "" for death in deaths] == ["actor_unschedulable"] * 3
    reasons = [death.reason if death else "" for death in deaths]
    assert "is dead (silent)" in reasons[0]
    assert "is not in the cluster" in reasons[1]
    assert "it needs {'CPU': 5.0}" in reasons[2]


def test_an_actor_that_is_bound_to_a_node_ends_when_it_would_start_again_without_it(cluster: Cluster) -> None:
    cluster.alive(max_restarts=-1, strategy=NodeAffinity(HERE, soft=False))
    cluster.settled(RetireNode(node_id=HERE, reason="silent"))
    cluster.seconds(3)
    death = cluster.record().death
    assert death is not None
    assert death.code == "actor_unschedulable"


def test_an_actor_ends_with_its_job_and_a_release_is_graceful(cluster: Cluster) -> None:
    cluster.alive(max_restarts=-1)
    cluster.settled(cluster.create(number=2))
    cluster.settled(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    cluster.seconds(1)
    assert (cluster.record().state, cluster.record().graceful) == (DEAD, False)
    assert cluster.record(actor_id(DRIVERS[0], 2)).state is DEAD
    assert isinstance(cluster.settled(cluster.create(number=3)), NotFoundError)
    mine = cluster.create(number=4, by=DRIVERS[1])
    cluster.settled(mine)
    cluster.settled(ReleaseActor(actor_id=mine.description.actor_id, reason="no handle"))
    assert cluster.record(mine.description.actor_id).graceful


def died(number: int = 0) -> ProcessDied:
    return ProcessDied(sequence=1, process_id=WORKERS[number], reason="")


def test_an_actor_ends_with_its_owner_unless_it_is_detached(cluster: Cluster) -> None:
    for number, detached in ((1, False), (2, True)):
        cluster.settled(cluster.create(number=number, by=WORKERS[0], detached=detached, max_restarts=-1))
    cluster.world.broadcast(died(), HERE)
    cluster.seconds(1)
    assert [cluster.record(actor_id(DRIVERS[0], number)).state for number in (1, 2)] == [DEAD, PENDING]


def test_an_actor_that_is_recorded_after_the_death_of_its_owner_was_told_ends_as_well(cluster: Cluster) -> None:
    cluster.world.broadcast(died(), HERE)
    cluster.world.run()
    cluster.settled(cluster.create(by=WORKERS[0], max_restarts=-1))
    cluster.seconds(1)
    assert cluster.record().state is DEAD


def test_an_actor_ends_with_the_node_of_its_owner(cluster: Cluster) -> None:
    cluster.settled(cluster.create(by=WORKERS[1]))
    cluster.settled(RetireNode(node_id=THERE, reason="silent"))
    cluster.seconds(1)
    assert cluster.record().state is DEAD


def test_a_node_that_hosts_what_is_not_wanted_is_told_so_again(cluster: Cluster) -> None:
    cluster.alive(max_restarts=-1)
    hosted = NodeActors(node_id=HERE, actors=[HostedActor(actor_id=ACTOR, incarnation=0)])
    cluster.world.news.clear()
    cluster.one.handle(Event(hosted, HERE))
    cluster.world.run()
    assert not cluster.world.news
    cluster.settled(KILL_AND_RESTART)
    cluster.world.news.clear()
    cluster.one.handle(Event(hosted, HERE))
    cluster.world.run()
    assert [news.incarnation for news in cluster.world.news] == [1]


# ------------------------------------------------------------------------------------ names


FIND = FindActor(name="n", namespace="")


def test_a_name_is_its_holders_until_the_holder_is_dead(cluster: Cluster) -> None:
    assert isinstance(cluster.settled(FIND), NotFoundError)
    first = cluster.settled(cluster.create("n"))
    assert first == cluster.settled(FIND, cluster.two)
    refused = cluster.settled(cluster.create("n", 2), cluster.two)
    assert isinstance(refused, ActorAlreadyExistsError)
    assert f"by actor {ACTOR} (Counter)" in str(refused)
    assert cluster.settled(cluster.create("n", 3, any_=True), cluster.two) == first
    assert cluster.settled(cluster.create("n")) == first, "the same request finds its own work"
    cluster.settled(KILL)
    assert isinstance(cluster.settled(FIND), NotFoundError)
    second = cluster.settled(cluster.create("n", 4), cluster.two)
    assert second == cluster.settled(FIND)
    assert isinstance(second, ActorRecord)
    assert second.description.actor_id == actor_id(DRIVERS[0], 4)


def test_the_same_name_in_another_namespace_is_another_name(cluster: Cluster) -> None:
    names = [("", "n"), ("n", ""), ("a.b", "n"), ("a", "b.n"), ("*", ">"), (" ", "é\n\x00"), ("", "="), ("=", "n")]
    for number, (namespace, name) in enumerate(names):
        request = cluster.create(name, number)
        mine = request.description.model_copy(update={"namespace": namespace})
        created = cluster.settled(request.model_copy(update={"description": mine}))
        assert isinstance(created, ActorRecord)
        if name:
            assert cluster.settled(FindActor(name=name, namespace=namespace), cluster.two) == created
    assert len(cluster.world.store.holders) == len(names) - 1, "who has no name holds none"


def test_of_racing_creators_exactly_one_wins(cluster: Cluster) -> None:
    replicas = [cluster.one, cluster.two, cluster.world.start()]
    asked = [
        cluster.world.ask(replicas[number % 3], cluster.create("n", number, any_=number % 2 == 1))
        for number in range(12)
    ]
    cluster.world.run()
    winner = cluster.settled(FIND)
    assert isinstance(winner, ActorRecord)
    for number, one in enumerate(asked):
        if number % 2 or winner.description.actor_id == actor_id(DRIVERS[0], number):
            assert one.answer == winner
        else:
            assert isinstance(one.answer, ActorAlreadyExistsError)
    assert len(cluster.world.store.specs()) == 1


def stored(cluster: Cluster, state: ActorState, actor: ActorId) -> bool:
    record = cluster.world.store.actors.get(actor)
    return record is not None and record.state is state


def crash_in(cluster: Cluster, request: CreateActor, state: ActorState, *, name_is_held: bool = False) -> None:
    """Have a replica crash in the middle of creating an actor."""
    cluster.world.ask(cluster.two, request)
    mine = request.description
    key = name_key(mine.namespace, mine.name)

    def is_there() -> bool:
        held = cluster.world.store.holders.get(key) == mine.actor_id or not name_is_held
        return stored(cluster, state, mine.actor_id) and held

    cluster.step_until(is_there)
    cluster.world.crash(cluster.two)


@pytest.mark.parametrize("name_is_held", [False, True])
def test_a_name_that_a_crashed_replica_left_undecided_is_decided_by_another(
    cluster: Cluster, name_is_held: bool
) -> None:
    crash_in(cluster, cluster.create("n"), NAMING, name_is_held=name_is_held)
    cluster.world.late.clear()
    cluster.seconds(1)
    assert cluster.record().state is NAMING
    assert cluster.settled(ListActors()) == ActorList(actors=[])
    cluster.seconds(int(NAMING_SECONDS) + 1)
    assert cluster.record().state is PENDING
    assert cluster.settled(FIND) == cluster.record()


def test_whoever_has_the_name_is_shown_as_pending_while_that_is_not_recorded(cluster: Cluster) -> None:
    crash_in(cluster, cluster.create("n"), NAMING, name_is_held=True)
    cluster.world.late.clear()
    for request in (FIND, GetActor(actor_id=ACTOR), cluster.create("n", 2, any_=True)):
        answer = cluster.settled(request)
        assert isinstance(answer, ActorRecord)
        assert (answer.description.actor_id, answer.state) == (ACTOR, PENDING)


def test_a_creator_that_asks_again_after_its_loss_was_recorded_gets_the_winner(cluster: Cluster) -> None:
    winner = cluster.settled(cluster.create("n"))
    loser = cluster.create("n", 2, any_=True)
    crash_in(cluster, loser, DEAD)
    cluster.world.run()
    assert cluster.settled(loser) == winner
    cluster.settled(KILL)
    assert isinstance(cluster.settled(loser), ActorAlreadyExistsError), "it lost while the winner lived"


def test_a_creator_that_asks_again_after_its_actor_has_died_does_not_have_it_once_more(cluster: Cluster) -> None:
    cluster.settled(cluster.create("n"))
    cluster.deafen(cluster.two)
    cluster.settled(KILL)
    other = cluster.settled(cluster.create("n", 2))
    for replica in (cluster.one, cluster.world.start()):
        assert cluster.settled(cluster.create("n"), replica) == cluster.record()
    cluster.undeafen(cluster.two)
    behind = cluster.settled(cluster.create("n"), cluster.two)
    assert isinstance(behind, ActorRecord)
    assert behind.description.actor_id == ACTOR
    assert cluster.record().state is DEAD
    assert cluster.settled(FIND) == other


def test_a_creator_that_asks_a_replica_that_knows_nothing_after_its_actor_has_died_leaves_nothing(
    cluster: Cluster,
) -> None:
    cluster.deafen(cluster.two)
    cluster.settled(cluster.create())
    cluster.settled(KILL)
    cluster.undeafen(cluster.two)
    cluster.two.changes.clear()
    assert cluster.settled(cluster.create(), cluster.two) == cluster.record()
    assert not cluster.world.store.specs()


def test_a_read_that_was_slow_does_not_undo_what_was_heard_since(cluster: Cluster) -> None:
    asked = cluster.world.ask(cluster.two, GetActor(actor_id=ACTOR))
    cluster.step_until(lambda: cluster.two.loads)
    cluster.two.steps()[0]()  # it is read, and on its way
    slow, cluster.two.loads = cluster.two.loads, []
    cluster.settled(cluster.create())
    cluster.settled(KILL)
    cluster.two.loads = slow
    cluster.world.run()
    assert isinstance(asked.answer, ActorRecord)
    assert cluster.settled(cluster.create(), cluster.two) == cluster.record()


def test_a_refused_write_on_the_way_does_not_keep_a_name_undecided(cluster: Cluster) -> None:
    crash_in(cluster, cluster.create("n"), NAMING)
    cluster.world.late.clear()
    cluster.world.run()
    cluster.world.now += NAMING_SECONDS + 1
    cluster.one.tick()
    cluster.step_until(lambda: any(running.stores for running in cluster.one.running))
    running = next(running for running in cluster.one.running if running.stores)
    (work,) = running.stores
    cluster.one.running.remove(running)
    full = BufferFullError("the store is full")
    cluster.one.handle(StoreRefused(work.store.key, full, work.store.context, work.store.bucket))
    cluster.seconds(1)
    assert cluster.record().state is PENDING


# ------------------------------------------------------------------------------------ what is left


def test_what_is_left_of_an_actor_goes_some_time_after_its_death(cluster: Cluster) -> None:
    cluster.settled(cluster.create("n"))
    cluster.settled(KILL)
    cluster.seconds(3)
    assert cluster.settled(GetActor(actor_id=ACTOR)) == cluster.record()
    cluster.world.now += KEEP_DEAD_SECONDS
    cluster.seconds(2)
    assert not cluster.world.store.actors
    assert not cluster.world.store.holders
    assert all(not replica.core.state.actors for replica in cluster.world.replicas)
    assert isinstance(cluster.settled(GetActor(actor_id=ACTOR)), NotFoundError)


def test_a_name_that_has_gone_on_to_another_stays_there(cluster: Cluster) -> None:
    cluster.settled(cluster.create("n"))
    cluster.settled(KILL)
    other = cluster.settled(cluster.create("n", 2))
    cluster.world.now += KEEP_DEAD_SECONDS
    cluster.seconds(2)
    assert [*cluster.world.store.actors] == [actor_id(DRIVERS[0], 2)]
    assert cluster.settled(FIND) == other


def test_what_a_dead_actor_was_made_from_goes_though_the_replica_that_wrote_the_death_crashed(cluster: Cluster) -> None:
    cluster.settled(cluster.create())
    cluster.world.ask(cluster.two, KILL)
    cluster.step_until(lambda: stored(cluster, DEAD, ACTOR))
    cluster.world.crash(cluster.two)
    assert cluster.world.store.specs() == {ACTOR}
    cluster.world.now += KEEP_DEAD_SECONDS
    cluster.seconds(2)
    assert not cluster.world.store.specs()


def test_a_replica_that_missed_the_death_and_hears_of_the_deletion_knows_the_actor_no_more(cluster: Cluster) -> None:
    cluster.alive()
    cluster.deafen(cluster.two)
    cluster.settled(KILL)
    cluster.world.now += KEEP_DEAD_SECONDS
    cluster.seconds(2)
    assert not cluster.world.store.actors
    cluster.undeafen(cluster.two)
    assert cluster.two.core.state.living_actors == {ACTOR}
    assert isinstance(cluster.settled(KILL, cluster.two), NotFoundError)
    assert not cluster.two.core.state.actors
    assert not cluster.two.core.state.living_actors


def test_the_deletion_of_a_record_that_seems_to_live_is_taken_in(cluster: Cluster) -> None:
    cluster.alive()
    revision = cluster.two.core.state.actors[ACTOR].revision
    cluster.two.core.state.remember(f"actor.{ACTOR}", None, revision - 1)
    assert ACTOR in cluster.two.core.state.actors, "that is older"
    cluster.two.core.state.remember(f"actor.{ACTOR}", None, revision + 2)
    assert not cluster.two.core.state.actors
    assert not cluster.two.core.state.living_actors


# ------------------------------------------------------------------------------------ jobs of their own


def open_job(cluster: Cluster, number: int) -> JobRecord:
    opened = cluster.settled(OpenActorJob(actor_id=actor_id(DRIVERS[0], number), creator_job=job_id(1)))
    assert isinstance(opened, JobRecord)
    return opened


def state_of(cluster: Cluster, job: JobRecord) -> JobState:
    return cluster.world.store.jobs()[f"job.{job.job_id}"].record.state


def test_a_detached_actors_job_is_configured_like_its_creators_and_opened_once(cluster: Cluster) -> None:
    job = open_job(cluster, 1)
    assert (job.actor, job.state, job.config.namespace) == (ACTOR, JobState.RUNNING, "n")
    assert open_job(cluster, 1) == job
    missing = OpenActorJob(actor_id=ACTOR, creator_job=job_id(77))
    assert isinstance(cluster.settled(missing), NotFoundError)


def test_a_detached_actors_job_outlives_its_creators_and_ends_with_it(cluster: Cluster) -> None:
    job = open_job(cluster, 1)
    cluster.settled(cluster.create("n", detached=True, job=job.job_id))
    cluster.settled(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    cluster.seconds(3)
    cluster.world.now += ORPHAN_SECONDS
    cluster.seconds(3)
    assert (cluster.record().state, state_of(cluster, job)) == (PENDING, JobState.RUNNING)
    cluster.settled(KILL)
    cluster.seconds(1)
    assert state_of(cluster, job) is JobState.SUCCEEDED


def submit(cluster: Cluster) -> JobRecord:
    said = {"driver": ACTOR, "actor": ACTOR, "submission_id": "train"}
    request = job_request(1).model_copy(update=said)
    opened = cluster.settled(request)
    assert isinstance(opened, JobRecord)
    return opened


def test_a_submitted_job_ends_with_its_supervisor_as_one_that_failed(cluster: Cluster) -> None:
    job = submit(cluster)
    assert (job.actor, job.submission_id) == (ACTOR, "train")
    cluster.settled(cluster.create("", detached=True, job=job.job_id))
    cluster.world.now += ORPHAN_SECONDS
    cluster.seconds(3)
    assert state_of(cluster, job) is JobState.RUNNING, "it has no driver whose silence would count"
    cluster.settled(KILL)
    cluster.seconds(1)
    record = cluster.world.store.jobs()[f"job.{job.job_id}"].record
    assert (record.state, record.message) == (JobState.FAILED, f"its supervisor has died: {KILL.reason}")


@pytest.mark.parametrize("state", [JobState.SUCCEEDED, JobState.STOPPED])
def test_what_a_supervisor_says_of_its_job_stays(cluster: Cluster, state: JobState) -> None:
    job = submit(cluster)
    cluster.settled(cluster.create("", detached=True, job=job.job_id))
    cluster.settled(FinishJob(job_id=job.job_id, state=state, message="done", exit_code=3))
    cluster.seconds(2)
    assert cluster.record().state is DEAD
    record = cluster.world.store.jobs()[f"job.{job.job_id}"].record
    assert (record.state, record.message, record.exit_code) == (state, "done", 3)


def test_of_two_detached_actors_that_race_for_a_name_the_losers_job_ends(cluster: Cluster) -> None:
    jobs = [open_job(cluster, number) for number in (1, 2)]
    asked: list[Asked] = []
    for number, replica in ((1, cluster.one), (2, cluster.two)):
        request = cluster.create("n", number, detached=True, job=jobs[number - 1].job_id)
        asked.append(cluster.world.ask(replica, request))
    cluster.world.run()
    cluster.seconds(2)
    won = [isinstance(one.answer, ActorRecord) for one in asked]
    assert sorted(won) == [False, True]
    assert [state_of(cluster, job) is JobState.RUNNING for job in jobs] == won


def test_a_job_whose_actor_is_never_created_ends(cluster: Cluster) -> None:
    job = open_job(cluster, 1)
    cluster.seconds(3)
    assert state_of(cluster, job) is JobState.RUNNING
    cluster.world.now += ORPHAN_SECONDS
    cluster.seconds(2)
    assert state_of(cluster, job) is JobState.FAILED


def test_a_replica_that_has_not_heard_of_an_actor_does_not_end_its_job(cluster: Cluster) -> None:
    job = open_job(cluster, 1)
    cluster.deafen(cluster.two)
    cluster.settled(cluster.create(detached=True, job=job.job_id))
    cluster.world.now += ORPHAN_SECONDS + 1
    cluster.undeafen(cluster.two)
    cluster.two.changes.clear()
    cluster.two.tick()
    cluster.world.run()
    assert state_of(cluster, job) is JobState.RUNNING
    assert ACTOR in cluster.two.core.state.actors


# ------------------------------------------------------------------------------------ bad requests, and lists


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "x" * (NAME_BYTES + 1)},
        {"name": "x" * NAME_BYTES, "namespace": "é"},
        {"actor_id": "a b"},
        {"actor_id": ""},
        {"methods": b"x" * (MOST_METHODS_BYTES + 1)},
        {"max_restarts": -2},
        {"placement": {"CPU": -1}, "resources": {"CPU": -1}},
        {"resources": {"CPU": -1}},
        {"resources": {"GPU": 10_000}},
        {"resources": {"CPU": 20_000}},
    ],
)
def test_an_actor_that_cannot_be_is_refused_at_once(cluster: Cluster, fields: dict[str, Any]) -> None:
    request = cluster.create()
    bad = request.model_copy(update={"description": request.description.model_copy(update=fields)})
    assert isinstance(cluster.settled(bad), InvalidRequestError)
    assert not cluster.world.store.actors
    assert not cluster.world.store.specs()


def test_too_much_to_make_an_actor_from_and_too_long_names_are_refused(cluster: Cluster) -> None:
    much = cluster.create().model_copy(update={"spec": b"x" * (MOST_SPEC_BYTES + 1)})
    assert isinstance(cluster.settled(much), InvalidRequestError)
    assert isinstance(cluster.settled(FindActor(name="x" * 5000, namespace="")), InvalidRequestError)
    for request in (GetActor(actor_id=ActorId("*")), cluster.claim(actor=ActorId("a.b"))):
        assert isinstance(cluster.settled(request), InvalidRequestError)


@pytest.mark.parametrize("message", [KILL, KILL_AND_RESTART, ReleaseActor(actor_id=ACTOR, reason="")])
def test_what_is_said_of_an_actor_that_nobody_knows_is_not_found(cluster: Cluster, message: Message) -> None:
    assert isinstance(cluster.settled(message), NotFoundError)


def test_a_claim_that_the_store_does_not_take_may_be_asked_for_again(cluster: Cluster) -> None:
    cluster.settled(cluster.create())
    asked = cluster.world.ask(cluster.one, cluster.claim())
    cluster.step_until(lambda: any(running.stores for running in cluster.one.running))
    running = next(running for running in cluster.one.running if running.stores)
    cluster.one.running.remove(running)
    store = running.stores[0].store
    cluster.one.handle(StoreRefused(store.key, BufferFullError("full"), store.context, store.bucket))
    cluster.world.run()
    assert isinstance(asked.answer, ServiceError)
    assert isinstance(cluster.settled(cluster.claim()), ActorClaim)


def listed(cluster: Cluster, **fields: Any) -> list[tuple[str, ActorState]]:
    answer = cluster.settled(ListActors(**fields))
    assert isinstance(answer, ActorList)
    return [(actor.name, actor.state) for actor in answer.actors]


def test_actors_are_listed_oldest_first_with_the_names_that_live(cluster: Cluster) -> None:
    for number, name in ((3, "c"), (1, "b"), (2, ""), (0, "a")):
        cluster.world.now += 0.1
        cluster.settled(cluster.create(name, number))
    cluster.settled(KILL)
    assert listed(cluster) == [("c", PENDING), ("b", DEAD), ("", PENDING), ("a", PENDING)]
    assert listed(cluster, named_only=True) == [("c", PENDING), ("a", PENDING)]
    assert listed(cluster, namespace="elsewhere") == []


def test_of_many_dead_actors_only_the_newest_are_listed_with_the_beginnings_of_why(cluster: Cluster) -> None:
    state = cluster.one.core.state
    for number in range(LISTED + 10):
        mine = about(actor_id(DRIVERS[0], number), DRIVERS[0])
        one = ActorRecord(description=mine, state=PENDING, created_at=float(number))
        one = one if number < 5 else dead(one, "it raised:\n" * 10_000, 1.0)
        state.remember(f"actor.{mine.actor_id}", one.model_dump_json().encode(), 100 + number)
    answer = cluster.settled(ListActors())
    assert isinstance(answer, ActorList)
    numbers = [int(actor.actor_id[-8:], 16) for actor in answer.actors]
    assert numbers == [*range(5), *range(15, LISTED + 10)]
    assert len(answer.model_dump_json()) < 1_000_000
