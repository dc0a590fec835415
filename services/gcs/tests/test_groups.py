"""Placement groups in the control store: how records change, names, ends, and what replicas do by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.gcs.tests.builders import description, job_request
from services.gcs.tests.simulation import Asked, Replica, SimulatedStore, World, announcement
from services.gcs.tests.test_actors_replicas import ActorReplica
from services.gcs.tests.test_actors_replicas import about as about_actor
from shoal_core.protocol.actors import ActorChanged, ActorRecord, ActorState, CreateActor
from shoal_core.protocol.effects import Event, Publish, Store, StoreRefused
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    InvalidRequestError,
    JetStreamError,
    NotFoundError,
    PlacementGroupAlreadyExistsError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.groups import (
    MOST_BUNDLES,
    AbandonGroup,
    CommitGroup,
    CreateGroup,
    FindGroup,
    GetGroup,
    GroupChanged,
    GroupDemand,
    GroupDescription,
    GroupList,
    GroupRecord,
    GroupState,
    ListGroups,
    RemoveGroup,
    changed,
)
from shoal_core.protocol.ids import NodeId, PlacementGroupId, actor_id, creator_of
from shoal_core.protocol.messages import BundleSummary, Done, FinishJob, JobState, Message, RetireNode
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.scheduling import Demand
from shoal_core.testing.builders import node_id, process_id
from shoal_gcs import groups
from shoal_gcs.actors import NAMING_SECONDS, UNKNOWN_GROUP_SECONDS
from shoal_gcs.groups import KEEP_REMOVED_SECONDS
from shoal_gcs.records import LIST_BYTES, NAME_BYTES, group_key, group_name_key, job_id

PENDING, CREATED, RESCHEDULING = GroupState.PENDING, GroupState.CREATED, GroupState.RESCHEDULING
NAMING, REMOVED = GroupState.NAMING, GroupState.REMOVED
HERE, THERE = node_id(1), node_id(2)
ONE = {"CPU": 10_000}


def group_id(number: int = 1) -> PlacementGroupId:
    return PlacementGroupId(f"{process_id(1, 0)}{number:08x}")


GROUP = group_id()


def about(number: int = 1, **fields: Any) -> GroupDescription:
    """Return what the first driver says of its ``number``-th group."""
    filled = {"group_id": group_id(number), "job_id": job_id(1), "owner": process_id(1, 0), "bundles": [ONE, ONE]}
    return GroupDescription(**{**filled, **fields})


class GroupStore(SimulatedStore):
    """A store in which whoever lives under a name holds it."""

    def groups(self) -> dict[PlacementGroupId, GroupRecord]:
        """Return the records of all groups."""
        records = [GroupRecord.model_validate_json(value) for _, value in self._control("group.")]
        return {record.description.group_id: record for record in records}

    def change(self, store: Store) -> int | None:
        """Change a key; see who has which name."""
        revision = super().change(store)
        for group, record in self.groups().items():
            about = record.description
            if about.name and record.state not in (NAMING, REMOVED):
                key = group_name_key(about.namespace, about.name)
                assert self.get(("", key))[0] == group.encode(), "whoever lives under a name holds it"
        return revision

    def _check(self, key: str, before: bytes | None, after: bytes | None) -> None:
        if not key.startswith(("group", "actor.")):
            super()._check(key, before, after)


class GroupWorld(World):
    """Replicas, and what they tell of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.store: GroupStore = GroupStore()
        self.news: list[GroupChanged] = []
        self.demands: list[GroupDemand] = []

    def start(self) -> Replica:
        """Start a replica with an identity of its own."""
        self._started += 1
        replica = ActorReplica(self, self._started)
        self.replicas.append(replica)
        return replica

    def published(self, effect: Publish, replica: Replica) -> None:
        """Hear what the control store tells of groups."""
        match effect.message:
            case GroupChanged() as news:
                assert effect.subject == self.subjects.groups_changed(replica.identity, creator_of(news.group_id))
                self.news.append(news)
            case GroupDemand() as demand:
                self.demands.append(demand)
            case ActorChanged() | Demand():
                pass
            case _:
                super().published(effect, replica)


class Cluster:
    """Two replicas with a job and two nodes."""

    def __init__(self) -> None:
        self.world = GroupWorld()
        self.one, self.two = self.world.start(), self.world.start()
        self.world.run()
        self.settled(job_request(1))
        for number in (1, 2):
            self.settled(description(number))

    def settled(self, message: Message, replica: Replica | None = None) -> Message | ShoalError:
        return self.world.settled(replica or self.one, message)

    def create(self, number: int = 1, **fields: Any) -> Message | ShoalError:
        return self.settled(CreateGroup(description=about(number, **fields)))

    def commit(
        self, nodes: dict[int, NodeId], attempt: int = 1, replica: Replica | None = None
    ) -> Message | ShoalError:
        return self.settled(CommitGroup(group_id=GROUP, attempt=attempt, nodes=nodes), replica)

    def created(self) -> None:
        self.create()
        self.commit({0: HERE, 1: THERE})

    def record(self, number: int = 1) -> GroupRecord:
        return self.world.store.groups()[group_id(number)]

    def seconds(self, count: int) -> None:
        for _ in range(count):
            self.world.second([HERE, THERE])


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


REMOVE = RemoveGroup(group_id=GROUP, reason="told to")


def has_bundle(node: NodeId, *, committed: bool, index: int = 0) -> Event:
    """Return the announcement of a node that has a bundle of the group."""
    summary = BundleSummary(group_id=GROUP, index=index, job_id=job_id(1), total=ONE, free=ONE, committed=committed)
    return Event(announcement(node).model_copy(update={"bundles": [summary]}), node)


def make_ignorant(replica: Replica) -> None:
    """Have a replica be one that has not heard of the group yet."""
    state = replica.core.state
    del state.groups[GROUP], state.revisions[group_key(GROUP)]
    state.living_groups.clear()


# ------------------------------------------------------------------------------------ a life


def test_a_group_waits_and_its_demand_is_stated_until_it_is_placed(cluster: Cluster) -> None:
    record = cluster.create()
    assert isinstance(record, GroupChanged)
    assert (record.state, record.attempt, record.nodes) == (PENDING, 0, [None, None])
    (demand,) = cluster.world.demands
    assert (demand.description, demand.attempt, demand.nodes) == (about(), 0, [None, None])
    cluster.seconds(1)
    assert len(cluster.world.demands) == 3, "both replicas repeat it"
    committed = cluster.commit({0: HERE, 1: THERE})
    assert committed == changed(cluster.record())
    assert (cluster.record().state, cluster.record().attempt, cluster.record().nodes) == (CREATED, 1, [HERE, THERE])
    assert [(news.state, news.nodes) for news in cluster.world.news] == [(CREATED, [HERE, THERE])]
    cluster.world.demands.clear()
    cluster.seconds(1)
    assert not cluster.world.demands


def test_the_same_requests_again_find_their_own_work(cluster: Cluster) -> None:
    assert cluster.create() == cluster.create() == changed(cluster.record())
    assert cluster.settled(GetGroup(group_id=GROUP), cluster.two) == cluster.record()
    first = cluster.commit({0: HERE, 1: THERE})
    assert cluster.commit({0: HERE, 1: THERE}, replica=cluster.two) == first
    assert cluster.settled(REMOVE) == cluster.settled(REMOVE, cluster.two) == Done()


@pytest.mark.parametrize(
    ("nodes", "attempt"),
    [({0: HERE}, 1), ({0: HERE, 1: THERE, 2: HERE}, 1), ({}, 1), ({0: HERE, 1: THERE}, 2), ({0: HERE, 1: THERE}, 0)],
)
def test_a_commit_is_of_all_that_is_missing_in_the_attempt_that_is_next(
    cluster: Cluster, nodes: dict[int, NodeId], attempt: int
) -> None:
    cluster.create()
    assert isinstance(cluster.commit(nodes, attempt), DeclaredDeadError)
    assert cluster.record().state is PENDING


def test_the_first_of_two_commits_counts(cluster: Cluster) -> None:
    cluster.create()
    cluster.commit({0: HERE, 1: THERE})
    assert isinstance(cluster.commit({0: THERE, 1: HERE}, replica=cluster.two), DeclaredDeadError)
    assert cluster.record().nodes == [HERE, THERE]


def test_an_attempt_that_a_node_had_end_cannot_be_committed(cluster: Cluster) -> None:
    cluster.create()
    ended = cluster.settled(AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=1), cluster.two)
    assert isinstance(ended, GroupRecord)
    assert (ended.state, ended.attempt) == (PENDING, 1)
    assert cluster.world.demands[-1].attempt == 1, "it is stated anew"
    assert cluster.world.news[-1].attempt == 1, "and nodes hear that it is over"
    assert isinstance(cluster.commit({0: HERE, 1: THERE}), DeclaredDeadError)
    assert isinstance(cluster.commit({0: HERE, 1: THERE}, 2), GroupChanged)


def test_an_attempt_that_was_committed_does_not_end(cluster: Cluster) -> None:
    cluster.created()
    answer = cluster.settled(AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=1))
    assert answer == cluster.record()
    assert (cluster.record().state, cluster.record().attempt) == (CREATED, 1)


def test_a_replica_that_is_behind_reads_before_it_refuses(cluster: Cluster) -> None:
    cluster.create()
    cluster.settled(AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=1))
    make_ignorant(cluster.two)
    assert isinstance(cluster.commit({0: HERE, 1: THERE}, 2, cluster.two), GroupChanged)


def test_bundles_of_a_dead_node_are_wanted_again_and_the_others_stay(cluster: Cluster) -> None:
    cluster.created()
    cluster.settled(RetireNode(node_id=HERE, reason="gone"))
    cluster.world.second([THERE])
    record = cluster.record()
    assert (record.state, record.attempt, record.nodes, record.missing) == (RESCHEDULING, 2, [None, THERE], [0])
    assert cluster.world.demands[-1].nodes == [None, THERE]
    assert cluster.world.news[-1].state is RESCHEDULING
    assert isinstance(cluster.commit({0: THERE}, 3), GroupChanged)
    assert (cluster.record().state, cluster.record().nodes) == (CREATED, [THERE, THERE])


def test_an_end_is_for_good_and_told(cluster: Cluster) -> None:
    cluster.created()
    assert cluster.settled(REMOVE) == Done()
    record = cluster.record()
    assert (record.state, record.nodes, record.reason) == (REMOVED, [None, None], "told to")
    assert (cluster.world.news[-1].state, cluster.world.news[-1].reason) == (REMOVED, "told to")
    assert isinstance(cluster.commit({0: HERE, 1: THERE}, 2), DeclaredDeadError)
    assert cluster.settled(AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=9)) == record
    cluster.world.demands.clear()
    cluster.seconds(2)
    assert not cluster.world.demands


def test_a_group_ends_with_its_job_unless_it_is_detached(cluster: Cluster) -> None:
    cluster.create(1)
    cluster.create(2, detached=True)
    cluster.settled(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    cluster.seconds(1)
    assert (cluster.record(1).state, cluster.record(1).reason) == (REMOVED, "its job has ended")
    assert cluster.record(2).state is PENDING
    assert isinstance(cluster.create(3), NotFoundError), "its job is over"


def test_what_is_not_there_is_said_so(cluster: Cluster) -> None:
    for message in (
        GetGroup(group_id=GROUP),
        REMOVE,
        CommitGroup(group_id=GROUP, attempt=1, nodes={}),
        FindGroup(name="n", namespace=""),
    ):
        assert isinstance(cluster.settled(message), NotFoundError)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bundles": []}, "has 0 bundles"),
        ({"bundles": [ONE] * (MOST_BUNDLES + 1)}, f"a group has 1 to {MOST_BUNDLES}"),
        ({"bundles": [ONE, {}]}, "bundle 1 of"),
        ({"bundles": [{"CPU": 0}]}, "bundle 0 of"),
        ({"bundles": [{"CPU": -1}]}, "bundle 0 of"),
        ({"selectors": [()]}, "1 label selectors for 2 bundles"),
        ({"bundles": [{"x" * 300_000: 1}]}, "is described in"),
        ({"name": "x" * (NAME_BYTES + 1)}, "at most"),
        ({"group_id": "a.b"}, "not the id of a placement group"),
    ],
)
def test_what_could_not_be_kept_or_placed_is_refused(cluster: Cluster, fields: dict[str, Any], says: str) -> None:
    refused = cluster.create(**fields)
    assert isinstance(refused, InvalidRequestError)
    assert says in str(refused)


# ------------------------------------------------------------------------------------ what is placed first


def place_first(cluster: Cluster, replica: Replica | None = None, **fields: Any) -> Asked:
    """Ask for a group that may be placed before it is stored."""
    asked = cluster.world.ask(replica or cluster.one, CreateGroup(description=about(**fields), placed_first=True))
    cluster.world.run()
    return asked


def test_the_first_write_of_a_group_may_be_its_commit_and_then_its_creator_is_answered(cluster: Cluster) -> None:
    creating = place_first(cluster)
    assert not cluster.world.store.groups()
    assert creating.answer is None
    (demand,) = cluster.world.demands
    assert (demand.description, demand.attempt, demand.replica) == (about(), 0, cluster.one.identity)
    committed = cluster.commit({0: HERE, 1: THERE})
    assert (cluster.record().state, cluster.record().attempt, cluster.record().nodes) == (CREATED, 1, [HERE, THERE])
    assert creating.answer == committed == changed(cluster.record())
    assert [news.state for news in cluster.world.news] == [CREATED]
    cluster.seconds(2)
    assert len(cluster.world.demands) == 1


def test_a_group_that_is_not_placed_in_a_moment_is_stored_as_one_that_waits(cluster: Cluster) -> None:
    creating = place_first(cluster)
    cluster.seconds(1)
    assert creating.answer == changed(cluster.record())
    assert (cluster.record().state, cluster.record().attempt) == (PENDING, 0)
    assert cluster.world.demands[-1].replica == "", "now any replica may commit it"
    assert isinstance(cluster.commit({0: HERE, 1: THERE}, replica=cluster.two), GroupChanged)


def test_whoever_cannot_wait_has_it_stored_by_any_replica(cluster: Cluster) -> None:
    creating = place_first(cluster)
    assert cluster.settled(CreateGroup(description=about()), cluster.two) == changed(cluster.record())
    assert creating.answer == changed(cluster.record())
    assert (cluster.record().state, cluster.record().attempt) == (PENDING, 0)


def test_an_attempt_can_end_before_there_is_a_record_and_the_group_lives_on(cluster: Cluster) -> None:
    creating = place_first(cluster)
    ended = cluster.settled(AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=1), cluster.two)
    assert isinstance(ended, GroupRecord)
    assert (ended.state, ended.attempt) == (PENDING, 1)
    assert isinstance(cluster.commit({0: HERE, 1: THERE}), DeclaredDeadError)
    assert creating.answer == changed(cluster.record())
    assert (cluster.record().description, cluster.record().nodes) == (about(), [None, None])
    assert (cluster.world.demands[-1].attempt, cluster.world.demands[-1].replica) == (1, "")
    assert isinstance(cluster.commit({0: HERE, 1: THERE}, 2), GroupChanged)


def test_a_blank_record_is_not_listed_and_ends_with_its_job(cluster: Cluster) -> None:
    cluster.settled(AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=1))
    assert cluster.record().is_blank
    assert cluster.settled(ListGroups()) == GroupList(groups=[])
    cluster.settled(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    cluster.seconds(1)
    assert cluster.record().state is REMOVED


def test_another_replica_begins_anew_where_one_has_died_with_what_it_knew(cluster: Cluster) -> None:
    place_first(cluster)
    cluster.world.crash(cluster.one)
    assert isinstance(cluster.commit({0: HERE, 1: THERE}, replica=cluster.two), NotFoundError)
    creating = place_first(cluster, cluster.two)
    assert cluster.world.demands[-1].replica == cluster.two.identity
    assert cluster.commit({0: HERE, 1: THERE}, replica=cluster.two) == creating.answer


def test_a_group_that_is_not_stored_yet_can_be_removed(cluster: Cluster) -> None:
    creating = place_first(cluster)
    assert cluster.settled(REMOVE) == Done()
    assert creating.answer == changed(cluster.record())
    assert cluster.record().state is REMOVED
    assert isinstance(cluster.commit({0: HERE, 1: THERE}), DeclaredDeadError)


@pytest.mark.parametrize("fields", [{"name": "n"}, {"detached": True}])
def test_what_may_outlive_its_creator_or_must_win_a_name_is_stored_first(
    cluster: Cluster, fields: dict[str, Any]
) -> None:
    creating = place_first(cluster, **fields)
    assert creating.answer == changed(cluster.record())
    assert [demand.replica for demand in cluster.world.demands] == [""]


def test_nothing_is_placed_for_a_job_that_ends(cluster: Cluster) -> None:
    creating = place_first(cluster)
    cluster.settled(FinishJob(job_id=job_id(1), state=JobState.SUCCEEDED))
    cluster.seconds(1)
    assert isinstance(creating.answer, NotFoundError)
    cluster.world.demands.clear()
    assert isinstance(place_first(cluster).answer, NotFoundError)
    assert not cluster.world.demands
    assert not cluster.world.store.groups()


def test_a_first_write_that_the_store_refuses_is_told_to_all_who_wait_for_it(cluster: Cluster) -> None:
    creating = place_first(cluster)
    committing = cluster.world.ask(cluster.one, CommitGroup(group_id=GROUP, attempt=1, nodes={0: HERE, 1: THERE}))
    (running,) = cluster.one.running
    store = running.effects[running.position]
    assert isinstance(store, Store)
    cluster.one.running.clear()
    cluster.one.handle(StoreRefused(store.key, JetStreamError("it is full", 503, 10077), store.context))
    cluster.world.run()
    assert isinstance(creating.answer, ServiceError)
    assert isinstance(committing.answer, ServiceError)
    cluster.seconds(2)
    assert not cluster.world.store.groups()


FIRST_REQUESTS = st.sampled_from(["create", "create at once", "commit", "commit elsewhere", "abandon", "remove"])


@given(
    st.lists(st.one_of(st.integers(0, 1000), st.tuples(FIRST_REQUESTS, st.integers(0, 1))), max_size=60),
    st.integers(0, 60),
    st.integers(0, 60),
)
@example([("create", 1), 1, ("create", 0), 1, ("commit", 1), 6, 2, 1, ("abandon", 0), ("create", 0), 6, 6], 60, 60)
@settings(max_examples=100, deadline=None)
def test_an_attempt_that_is_over_is_never_committed_whatever_is_written_first_and_whoever_crashes(
    steps: Sequence[int | tuple[str, int]], crash_at: int, tick_at: int
) -> None:
    cluster = Cluster()
    requests: dict[str, Message] = {
        "create": CreateGroup(description=about(), placed_first=True),
        "create at once": CreateGroup(description=about()),
        "commit": CommitGroup(group_id=GROUP, attempt=1, nodes={0: HERE, 1: THERE}),
        "commit elsewhere": CommitGroup(group_id=GROUP, attempt=1, nodes={0: THERE, 1: HERE}),
        "abandon": AbandonGroup(group_id=GROUP, job_id=job_id(1), attempt=1),
        "remove": REMOVE,
    }
    asked = [cluster.world.ask(cluster.one, requests["create"])]
    for position, step in enumerate(steps):
        if position == crash_at:
            cluster.world.crash(cluster.one)
            cluster.one = cluster.world.start()
        if position == tick_at:
            cluster.world.now += 1.0
            cluster.two.tick()
            cluster.one.tick()
        if isinstance(step, int):
            cluster.world.take(step)
        else:
            asked.append(cluster.world.ask((cluster.one, cluster.two)[step[1]], requests[step[0]]))
    cluster.seconds(3)
    final = cluster.create()
    assert final == changed(cluster.record())
    records = [
        GroupRecord.model_validate_json(value)
        for (_, key), value, _ in cluster.world.store.changes
        if key == group_key(GROUP) and value is not None
    ]
    over = [record.attempt >= 1 for record in records]
    assert all(
        not (record.state is CREATED and record.attempt == 1 and any(over[:number]))
        for number, record in enumerate(records)
    ), "an attempt that is over is not committed"
    for one in asked:
        if isinstance(one.answer, GroupChanged):
            assert one.answer in [*map(changed, records)], "what was answered was stored"
        elif isinstance(one.message, AbandonGroup) and one.answer is not None:
            assert isinstance(one.answer, GroupRecord)
            assert one.answer in records
            assert one.answer.attempt >= 1 or one.answer.state is REMOVED, "a node may give back what it has reserved"
    living = [one for one in asked if one.replica in cluster.world.replicas]
    assert all(one.answer is not None for one in living), "everybody has an answer in the end"


# ------------------------------------------------------------------------------------ what nodes are told again


def told_after(cluster: Cluster, *events: Event) -> list[GroupChanged]:
    """Return what is told when a node announces itself at two ticks."""
    cluster.world.news.clear()
    for event in events:
        cluster.one.handle(event)
        cluster.one.handle(event)
        cluster.world.run()
        cluster.one.tick()
        cluster.world.run()
    return cluster.world.news


def test_a_node_that_does_not_know_what_the_record_says_is_told_again_after_a_while(cluster: Cluster) -> None:
    cluster.created()
    unaware, aware = has_bundle(HERE, committed=False), has_bundle(HERE, committed=True)
    assert told_after(cluster, aware, aware, aware) == []
    assert told_after(cluster, unaware) == [], "it may be on its way"
    assert [news.state for news in told_after(cluster, unaware, unaware)] == [CREATED, CREATED]
    wrong = has_bundle(HERE, committed=True, index=1)
    assert [news.nodes for news in told_after(cluster, aware, wrong, wrong)] == [[HERE, THERE]]
    cluster.settled(REMOVE)
    assert {news.state for news in told_after(cluster, aware, aware)} == {REMOVED}


def test_a_node_that_has_bundles_of_a_group_that_nobody_knows_is_told_that_it_is_gone(cluster: Cluster) -> None:
    news = told_after(cluster, *[has_bundle(HERE, committed=True)] * 2)
    assert [(one.group_id, one.state) for one in news] == [(GROUP, REMOVED)]
    assert told_after(cluster, *[has_bundle(HERE, committed=False)] * 2) == [], "it may not be recorded yet"
    cluster.created()
    make_ignorant(cluster.one)
    assert told_after(cluster, *[has_bundle(HERE, committed=True)] * 2) == [], "the leader knows it"


# ------------------------------------------------------------------------------------ names


FIND = FindGroup(name="n", namespace="")


def test_a_name_is_its_holders_until_the_holder_is_removed(cluster: Cluster) -> None:
    first = cluster.create(name="n")
    assert isinstance(first, GroupChanged)
    assert first.state is PENDING
    assert cluster.settled(FIND, cluster.two) == cluster.record()
    refused = cluster.create(2, name="n")
    assert isinstance(refused, PlacementGroupAlreadyExistsError)
    assert "The name 'n' is already taken" in str(refused)
    assert isinstance(cluster.create(2, name="n"), PlacementGroupAlreadyExistsError), "however often it asks"
    assert isinstance(cluster.create(3, name="n", namespace="other"), GroupChanged)
    cluster.settled(REMOVE)
    assert isinstance(cluster.settled(FIND), NotFoundError)
    cluster.create(4, name="n")
    assert cluster.settled(FIND) == cluster.record(4)
    listed = cluster.settled(ListGroups())
    assert isinstance(listed, GroupList)
    assert [record.description.group_id for record in listed.groups] == [group_id(1), group_id(3), group_id(4)]


def test_a_name_that_a_crashed_replica_left_undecided_is_decided_by_another(cluster: Cluster) -> None:
    cluster.world.ask(cluster.two, CreateGroup(description=about(name="n")))
    while GROUP not in cluster.world.store.groups():
        cluster.world.step_of(cluster.two)
    cluster.world.crash(cluster.two)
    cluster.world.late.clear()
    cluster.seconds(1)
    assert cluster.record().state is NAMING
    shown = cluster.settled(GetGroup(group_id=GROUP))
    assert isinstance(shown, GroupRecord)
    assert shown.state is PENDING
    cluster.seconds(int(NAMING_SECONDS) + 1)
    assert cluster.record().state is PENDING
    assert cluster.settled(FIND) == cluster.record()


@given(st.lists(st.integers(0, 1000), max_size=60), st.booleans(), st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_of_many_that_want_a_name_at_most_one_lives_whoever_crashes(
    choices: Sequence[int], remove: bool, crash_at: int
) -> None:
    cluster = Cluster()
    asked = [
        cluster.world.ask(replica, CreateGroup(description=about(number, name="n")))
        for number, replica in enumerate((cluster.one, cluster.two, cluster.one), 1)
    ]
    for position, choice in enumerate(choices):
        if position == crash_at:
            cluster.world.crash(cluster.two)
            cluster.two = cluster.world.start()
        if remove and position == len(choices) // 2:
            cluster.world.ask(cluster.two, REMOVE)
        cluster.world.take(choice)
    cluster.seconds(int(NAMING_SECONDS) + 3)
    for number, request in enumerate(asked, 1):
        final = cluster.create(number, name="n")
        if request.answer is not None:
            assert isinstance(request.answer, PlacementGroupAlreadyExistsError) == isinstance(
                final, PlacementGroupAlreadyExistsError
            ), "what was answered stays true"
    living = [group for group, record in cluster.world.store.groups().items() if record.state is not REMOVED]
    assert len(living) <= 1
    assert remove or len(living) == 1


# ------------------------------------------------------------------------------------ lists, and what is forgotten


def test_groups_that_were_removed_long_ago_are_forgotten_with_their_names(cluster: Cluster) -> None:
    cluster.create(name="n")
    cluster.create(2)
    cluster.settled(REMOVE)
    cluster.world.now += KEEP_REMOVED_SECONDS
    cluster.seconds(3)
    assert list(cluster.world.store.groups()) == [group_id(2)]
    assert cluster.world.store.get(("", group_name_key("", "n"))) == (None, 0)
    for replica in (cluster.one, cluster.two):
        assert list(replica.core.state.groups) == [group_id(2)]
        assert not replica.core.state.removed_groups


def test_of_many_that_were_removed_the_oldest_are_forgotten(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "MOST_REMOVED", 2)
    for number in range(1, 5):
        cluster.create(number)
        cluster.settled(RemoveGroup(group_id=group_id(number), reason=""))
    cluster.seconds(2)
    assert sorted(cluster.world.store.groups()) == [group_id(3), group_id(4)]


def test_those_that_can_wait_are_forgotten_once_no_more_are_removed(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MOST_REMOVED", 2)
    monkeypatch.setattr(groups, "MOST_REMOVED_IN_HASTE", 4)
    monkeypatch.setattr(groups, "FORGOTTEN_AT_LEISURE", 1)
    left = []
    for number in range(1, 8):
        cluster.create(number)
        cluster.settled(RemoveGroup(group_id=group_id(number), reason=""))
        cluster.seconds(1)
        left.append(len(cluster.world.store.groups()))
    assert left == [1, 2, 3, 4, 4, 4, 4]
    for fewer in (3, 2, 2):
        cluster.seconds(1)
        assert len(cluster.world.store.groups()) == fewer
    assert sorted(cluster.world.store.groups()) == [group_id(6), group_id(7)]


def test_a_list_that_is_too_long_leaves_out_those_that_were_removed_first(cluster: Cluster) -> None:
    large = [{f"resource-{'x' * 1000}-{number}": 1 for number in range(LIST_BYTES // 4000)}]
    for number in range(1, 5):
        cluster.world.now += 1.0
        cluster.create(number, bundles=large)
        if number < 4:
            cluster.settled(RemoveGroup(group_id=group_id(number), reason=""))
    listed = cluster.settled(ListGroups())
    assert isinstance(listed, GroupList)
    assert [record.description.group_id for record in listed.groups] == [group_id(2), group_id(3), group_id(4)]


# ------------------------------------------------------------------------------------ actors in groups


ACTOR = actor_id(process_id(1, 0), 1)


def create_actor(cluster: Cluster) -> ActorRecord:
    mine = about_actor(ACTOR, process_id(1), max_restarts=-1, job=job_id(1), strategy=Bundle(GROUP))
    answer = cluster.settled(CreateActor(description=mine, spec=b"spec"))
    assert isinstance(answer, ActorRecord)
    return answer


def actor_of(cluster: Cluster) -> ActorRecord:
    return cluster.one.core.state.actors[ACTOR].value


def test_an_actor_dies_with_its_group_at_once_and_for_good(cluster: Cluster) -> None:
    cluster.created()
    assert create_actor(cluster).state is ActorState.PENDING_CREATION
    assert cluster.settled(REMOVE) == Done()
    record = actor_of(cluster)
    assert record.death is not None
    assert (record.state, record.death.code) == (ActorState.DEAD, "actor_group_removed")
    assert record.death.reason == f"its placement group {GROUP} was removed (told to)"
    assert not cluster.one.core.state.actors_in_groups


def test_an_actor_in_a_group_that_is_not_there_dies_soon(cluster: Cluster) -> None:
    create_actor(cluster)
    cluster.seconds(1)
    assert actor_of(cluster).state is ActorState.PENDING_CREATION, "it may not have been heard of yet"
    cluster.seconds(int(UNKNOWN_GROUP_SECONDS) + 1)
    record = actor_of(cluster)
    assert record.death is not None
    assert record.death.reason == f"there is no placement group {GROUP} (any more)"


def test_a_groups_key_has_its_id() -> None:
    assert group_key(GROUP) == f"group.{GROUP}"
