"""What one scheduler does about placement groups, input by input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from services.scheduler.tests.builders import announced, demand, entry, group_demand, performed, summary
from services.scheduler.tests.simulation import SUBJECTS, cpus, job_id
from shoal_core.protocol.effects import Answered, Ask, Connected, Effect, Event, Publish, Reply, Request
from shoal_core.protocol.errors import DeclaredDeadError, RequestTimeoutError, ShoalError
from shoal_core.protocol.groups import (
    BundlesPrepared,
    CommitGroup,
    GroupChanged,
    GroupState,
    GroupStrategy,
    PrepareBundles,
    ReturnBundles,
)
from shoal_core.protocol.ids import NodeId, PlacementGroupId, ServiceId
from shoal_core.protocol.messages import BundleSummary, JobTerms, LeaseSummary, Message, NodeAnnouncement, NodeDied
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.scheduling import (
    DemandEntry,
    DemandNotice,
    GetPending,
    LeaseRequest,
    PendingList,
    RecallLeases,
)
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.core import Begin, Scheduler
from shoal_scheduler.demand import FORGET_SECONDS
from shoal_scheduler.fairness import KEEP_SECONDS
from shoal_scheduler.groups import LOOK_SECONDS, PATIENCE_SECONDS

JOB = job_id(1)
APART = GroupStrategy.STRICT_SPREAD
GROUP = group_demand([cpus(1)]).description.group_id
M = TypeVar("M", bound=Message)


class Driven:
    """A scheduler that knows some nodes of four CPUs."""

    def __init__(self, *nodes: int) -> None:
        self.core = Scheduler(SUBJECTS, ServiceId("me"))
        self(Begin(), 0.0)
        for number in nodes:
            self(announced(number, 1, cpus(4)), 0.0)

    def __call__(self, message: Any, now: float) -> list[Effect]:
        if isinstance(message, Message):
            message = Event(message, getattr(message, "owner", "somebody"))
        return performed(self.core, self.core.handle(message, now), now)

    def prepared(self, ask: Ask, now: float, free: Resources | None = None, sequence: int = 2) -> list[Effect]:
        """Have a node reserve, or refuse where it says what is ``free``."""
        granted = BundlesPrepared(
            node_id=ask.context.node,
            granted=free is None,
            free=cpus(1) if free is None else free,
            sequence=sequence,
        )
        return self(Answered(ask.context, granted), now)


def asks(effects: Sequence[Effect], kind: type[M]) -> list[Ask]:
    return [effect for effect in effects if isinstance(effect, Ask) and isinstance(effect.message, kind)]


def told(effects: Sequence[Effect]) -> list[DemandNotice]:
    messages = [effect.message for effect in effects if isinstance(effect, Publish)]
    return [message for message in messages if isinstance(message, DemandNotice)]


def news(state: GroupState, attempt: int, nodes: Sequence[NodeId | None] = ()) -> GroupChanged:
    return GroupChanged(group_id=GROUP, state=state, attempt=attempt, nodes=list(nodes))


def test_a_group_is_prepared_on_all_its_nodes_and_then_committed() -> None:
    driven = Driven(1, 2)
    wanted = group_demand([cpus(3), cpus(2)], APART)
    first, second = asks(driven(wanted, 1.0), PrepareBundles)
    assert first.subject == SUBJECTS.node_from_scheduler(node_id(1), "prepare")
    assert first.message == PrepareBundles(plan="me.1", group_id=GROUP, job_id=JOB, attempt=1, bundles={0: cpus(3)})
    assert second.message == PrepareBundles(plan="me.1", group_id=GROUP, job_id=JOB, attempt=1, bundles={1: cpus(2)})
    assert asks(driven(wanted, 2.0), PrepareBundles) == [], "it is under way"
    assert driven.prepared(first, 2.0) == []
    (commit,) = driven.prepared(second, 2.0)
    assert isinstance(commit, Ask)
    assert commit.subject == SUBJECTS.gcs_from_scheduler("commit_group")
    assert commit.message == CommitGroup(group_id=GROUP, attempt=1, nodes={0: node_id(1), 1: node_id(2)})
    assert driven(Answered(commit.context, news(GroupState.CREATED, 1, [node_id(1), node_id(2)])), 2.0) == []
    assert len(driven.core.groups) == 0
    assert asks(driven(wanted, 3.0), PrepareBundles) == [], "an old statement"


def test_the_commit_is_asked_of_the_replica_that_alone_knows_of_the_group_as_long_as_that_is_so() -> None:
    driven = Driven(1)
    wanted = group_demand([cpus(1)])
    (ask,) = asks(driven(wanted.model_copy(update={"replica": "one"}), 1.0), PrepareBundles)
    (commit,) = asks(driven.prepared(ask, 1.0), CommitGroup)
    assert commit.subject == SUBJECTS.gcs_replica_from_scheduler("one", "commit_group")
    for replica, subject in (
        ("two", SUBJECTS.gcs_replica_from_scheduler("two", "commit_group")),
        ("", SUBJECTS.gcs_from_scheduler("commit_group")),
    ):
        driven(Answered(commit.context, RequestTimeoutError("")), 2.0)
        driven(wanted.model_copy(update={"replica": replica}), 2.0)
        (commit,) = asks(driven.core.tick(2.1), CommitGroup)
        assert commit.subject == subject


def test_bundles_of_one_node_are_asked_for_together() -> None:
    driven = Driven(1)
    (ask,) = asks(driven(group_demand([cpus(1), cpus(2)]), 1.0), PrepareBundles)
    assert isinstance(ask.message, PrepareBundles)
    assert ask.message.bundles == {0: cpus(1), 1: cpus(2)}
    assert driven.core.nodes[node_id(1)].free == cpus(1), "it counts as used"


def test_where_a_node_refuses_the_others_give_back_and_it_is_tried_again_after_a_pause() -> None:
    driven = Driven(1, 2)
    first, second = asks(driven(group_demand([cpus(3), cpus(3)], APART), 1.0), PrepareBundles)
    driven.prepared(first, 1.0)
    effects = driven.prepared(second, 1.0, cpus(4))
    returned = asks(effects, ReturnBundles)
    assert [ask.message for ask in returned] == [ReturnBundles(plan="me.1", group_id=GROUP)] * 2
    assert [ask.subject.split(".")[3] for ask in returned] == [node_id(1), node_id(2)]
    assert asks(effects, PrepareBundles) == []
    driven(announced(1, 3, cpus(4)), 1.0)
    driven(announced(3, 1, cpus(4)), 1.0)
    again = asks(driven.core.tick(1.3), PrepareBundles)
    assert [ask.context.node for ask in again] == [node_id(1), node_id(3)], "not who refused although it had room"
    assert {ask.context.plan for ask in again} == {"me.2"}


def test_a_node_that_does_not_answer_is_left_alone_for_a_moment() -> None:
    driven = Driven(1, 2)
    (ask,) = asks(driven(group_demand([cpus(3)]), 1.0), PrepareBundles)
    effects = driven(Answered(ask.context, RequestTimeoutError("")), 2.0)
    assert len(asks(effects, ReturnBundles)) == 1
    (again,) = asks(driven.core.tick(2.3), PrepareBundles)
    assert (ask.context.node, again.context.node) == (node_id(1), node_id(2))


def test_a_late_answer_to_a_plan_that_was_given_up_says_nothing_but_what_is_free() -> None:
    driven = Driven(1, 2)
    first, second = asks(driven(group_demand([cpus(3), cpus(3)], APART), 1.0), PrepareBundles)
    driven.prepared(first, 1.0, cpus(0.5))
    assert asks(driven.prepared(second, 1.0), CommitGroup) == []
    assert driven.core.nodes[node_id(2)].free == cpus(1)


def test_a_commit_is_asked_for_until_it_is_known_whether_it_was_heard() -> None:
    driven = Driven(1)
    wanted = group_demand([cpus(3)])
    (ask,) = asks(driven(wanted, 1.0), PrepareBundles)
    (commit,) = driven.prepared(ask, 1.0)
    assert isinstance(commit, Ask)
    effects = driven(Answered(commit.context, RequestTimeoutError("")), 2.0)
    assert asks(effects, ReturnBundles) == [], "it may have taken effect"
    (again,) = asks(driven.core.tick(2.3), CommitGroup)
    assert again.message == commit.message
    refused: ShoalError = DeclaredDeadError("somebody was quicker")
    assert driven(Answered(again.context, refused), 4.0) == [], "an earlier one may have taken effect: the record says"
    assert len(driven.core.groups) == 0
    driven(announced(1, 3, cpus(4)), 5.0)
    assert len(asks(driven(group_demand([cpus(3)], attempt=1), 5.0), PrepareBundles)) == 1, "stated anew"


def test_a_group_that_was_removed_meanwhile_is_given_back() -> None:
    driven = Driven(1)
    (ask,) = asks(driven(group_demand([cpus(3)]), 1.0), PrepareBundles)
    (returned,) = driven(news(GroupState.REMOVED, 0), 1.1)
    assert isinstance(returned, Ask)
    assert returned.message == ReturnBundles(plan="me.1", group_id=GROUP)
    assert driven.prepared(ask, 1.2) == []
    assert asks(driven(group_demand([cpus(3)]), 1.3), PrepareBundles) == [], "an old statement"


def test_a_new_attempt_is_planned_anew() -> None:
    driven = Driven(1)
    driven(group_demand([cpus(3)]), 1.0)
    effects = driven(group_demand([cpus(3)], attempt=1), 1.5)
    assert len(asks(effects, ReturnBundles)) == 1
    (ask,) = asks(effects, PrepareBundles)
    assert isinstance(ask.message, PrepareBundles)
    assert ask.message.attempt == 2
    assert driven(group_demand([cpus(3)]), 1.6)[:-1] == [], "an old statement"


def test_a_plan_does_not_wait_for_a_node_that_died() -> None:
    driven = Driven(1, 2, 3)
    first, _ = asks(driven(group_demand([cpus(3), cpus(3)], APART), 1.0), PrepareBundles)
    effects = driven(NodeDied(node_id=node_id(1), reason=""), 1.1)
    assert len(asks(effects, ReturnBundles)) == 2
    again = asks(driven.core.tick(1.3), PrepareBundles)
    assert [ask.context.node for ask in again] == [node_id(2), node_id(3)]
    assert driven.prepared(first, 1.3) == []


def test_a_group_that_nobody_states_any_more_is_forgotten_but_not_while_nothing_can_be_heard() -> None:
    driven = Driven(1)
    driven(group_demand([cpus(9)]), 0.0)
    driven(Connected(False), 1.0)
    driven.core.tick(FORGET_SECONDS + 5.0)
    assert len(driven.core.groups) == 1
    driven(Connected(True), 20.0)
    driven.core.tick(20.0 + FORGET_SECONDS - 1.0)
    assert len(driven.core.groups) == 1
    driven.core.tick(20.0 + FORGET_SECONDS + 1.0)
    assert len(driven.core.groups) == 0


def test_one_of_many_schedulers_plans_a_group_and_the_others_help_if_it_is_stated_again() -> None:
    both = [Driven(1), Driven(1)]
    for number, one in enumerate(both):
        one.core._identity = ServiceId(f"s{number}")
        one.core._replicas = {"s0": 1e9, "s1": 1e9}
    wanted = [group_demand([cpus(0.5)], number=number) for number in range(1, 9)]
    planned = [[ask.context.group for w in wanted for ask in asks(one(w, 1.0), PrepareBundles)] for one in both]
    assert sorted(planned[0] + planned[1]) == [w.description.group_id for w in wanted], "each is planned by one"
    assert all(planned)
    helped = [ask.context.group for w in wanted for ask in asks(both[0](w, 2.0), PrepareBundles)]
    assert helped == planned[1]


# ------------------------------------------------------------------------------- room


def test_groups_come_by_the_priority_of_their_job_and_their_own_and_then_by_age() -> None:
    driven = Driven()
    for number, of_job, priority, created_at in ((1, 0, 0, 2.0), (2, 0, 0, 1.0), (3, 0, 5, 3.0), (4, 1, 0, 4.0)):
        terms = JobTerms(priority=of_job)
        stated = group_demand([cpus(3)], number=number, priority=priority, created_at=created_at, terms=terms)
        driven(stated, 1.0)
    order = []
    for node in (1, 2, 3, 4):
        effects = driven(announced(node, 1, cpus(4)), 1.0 + node * LOOK_SECONDS * 2)
        order += [ask.context.group for ask in asks(effects, PrepareBundles)]
    assert [int(group, 16) for group in order] == [4, 3, 2, 1]


def busy(driven: Driven, now: float, sequence: int, *leases: LeaseSummary, free: float = 0.0) -> list[Effect]:
    return driven(announced(1, sequence, cpus(4), cpus(free), leases), now)


def test_small_tasks_do_not_starve_a_group_that_waits() -> None:
    driven = Driven(1)
    busy(driven, 0.0, 2, summary(1, 4))
    effects = driven(group_demand([cpus(3)]), 1.0)
    assert asks(effects, RecallLeases) == [], "leases may come back by themselves"
    late = 1.0 + PATIENCE_SECONDS
    effects = driven.core.tick(late)
    assert [ask.message for ask in asks(effects, RecallLeases)] == [
        RecallLeases(owner=process_id(1, 0), resources=cpus(1), count=3)
    ]
    effects = busy(driven, late, 3, summary(1, 3, recalled=2), free=1)
    assert asks(effects, RecallLeases) == [], "two are coming"
    assert asks(driven(demand(2, 1, entry([1])), late), LeaseRequest) == [], "the room is kept"
    assert asks(busy(driven, late, 4, summary(1, 1), free=3), PrepareBundles) == [], "it was just looked at"
    effects = driven.core.tick(late + 2 * LOOK_SECONDS)
    assert [ask.message for ask in asks(effects, PrepareBundles)] == [
        PrepareBundles(plan="me.1", group_id=GROUP, job_id=JOB, attempt=1, bundles={0: cpus(3)})
    ]


def test_room_is_kept_for_a_bounded_time() -> None:
    driven = Driven(1)
    busy(driven, 0.0, 2, summary(1, 3), free=1)
    wanted = group_demand([cpus(3)])
    driven(wanted, 1.0)
    late = 1.0 + PATIENCE_SECONDS + KEEP_SECONDS
    for second in range(2, int(late) + 2):
        driven(wanted, float(second))
        busy(driven, float(second), second + 1, summary(1, 3), free=1)
    assert len(asks(driven(demand(2, 1, entry([1])), late + 1.0), LeaseRequest)) == 1


def test_room_is_kept_for_the_first_group_alone_and_what_fits_beside_it_goes_on() -> None:
    driven = Driven(1, 2)
    busy(driven, 0.0, 2, summary(1, 4))
    driven(announced(2, 2, cpus(4), cpus(1), [summary(1, 3)]), 0.0)
    driven(group_demand([cpus(4)], number=1, created_at=1.0), 0.0)
    driven(group_demand([cpus(3)], number=2, created_at=2.0), 0.0)
    driven.core.tick(1.0)
    (ask,) = asks(driven(demand(2, 1, entry([1])), 1.0), LeaseRequest)
    assert ask.context.node == node_id(2)


def test_a_group_that_nothing_can_ever_hold_is_told_to_its_owner_once() -> None:
    driven = Driven(1)
    assert told(driven(group_demand([cpus(9)]), 0.0)) == []
    assert told(driven.core.tick(1.5)) == []
    driven(announced(1, 2, cpus(4)), 2.4)
    (notice,) = told(driven.core.tick(3.0))
    assert notice.group == GROUP
    assert notice.name == GROUP
    assert notice.text == f"Placement group {GROUP} waits: {notice.why}. It is placed when such nodes join."
    assert "no node can ever hold bundle 0 (CPU 9)" in notice.why
    driven(group_demand([cpus(9)], attempt=1), 3.5)
    assert told(driven.core.tick(5.0)) == []


def test_what_waits_is_listed_with_the_groups() -> None:
    driven = Driven(1)
    driven(group_demand([cpus(3), cpus(4)]), 1.0)
    (reply,) = driven(Request(GetPending(), 1), 3.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, PendingList)
    (row,) = reply.message.pending
    assert (row.name, row.resources, row.wanted) == (f"placement group {GROUP}", cpus(7), 2)
    assert (row.waiting_seconds, row.feasible, row.job_id) == (2.0, False, JOB)


def test_groups_of_a_job_do_not_take_it_beyond_its_quota() -> None:
    driven = Driven(1, 2)
    terms = JobTerms(quotas=cpus(4))
    first, second = (group_demand([cpus(3)], number=number, terms=terms) for number in (1, 2))
    (ask,) = asks(driven(first, 1.0), PrepareBundles)
    assert asks(driven(second, 1.0), PrepareBundles) == [], "what is being prepared counts"
    (commit,) = asks(driven.prepared(ask, 1.0), CommitGroup)
    driven(Answered(commit.context, news(GroupState.CREATED, 1, [node_id(1)])), 1.0)
    assert asks(driven.core.tick(1.1), PrepareBundles) == [], "and what was prepared and not announced yet"
    (row,) = pending(driven, 1.1)
    assert row.why == "its job would hold more than its quota of CPU"
    driven(announced_bundle(1, 3, (0, 3, 3, True)), 1.2)
    assert asks(driven.core.tick(1.3), PrepareBundles) == []
    assert len(asks(driven(announced(1, 4, cpus(4)), 1.4), PrepareBundles)) == 1, "the first was removed"


# ------------------------------------------------------------------------------- leases out of bundles


def announced_bundle(
    node: int, sequence: int, *bundles: tuple[int, float, float, bool], leases: Sequence[LeaseSummary] = ()
) -> NodeAnnouncement:
    """Return the announcement of a node with bundles: index, total, free and whether it is committed."""
    summaries = [
        BundleSummary(group_id=GROUP, index=index, job_id=JOB, total=cpus(total), free=cpus(free), committed=committed)
        for index, total, free, committed in bundles
    ]
    return announced(node, sequence, cpus(4), cpus(1), leases).model_copy(update={"bundles": summaries})


def in_bundle(slots: Sequence[int], index: int = -1, resources: Resources | None = None) -> DemandEntry:
    strategy = Bundle(PlacementGroupId(GROUP), index)
    return entry(slots, resources).model_copy(update={"strategy": strategy})


def test_leases_come_out_of_the_bundle_that_was_named() -> None:
    driven = Driven()
    driven(announced_bundle(1, 1, (0, 2, 2, True), (1, 1, 1, True)), 0.0)
    (ask,) = asks(driven(demand(1, 1, in_bundle([1, 2], 1)), 0.0), LeaseRequest)
    assert isinstance(ask.message, LeaseRequest)
    assert (ask.message.bundle, len(ask.message.slots)) == (Bundle(PlacementGroupId(GROUP), 1), 1)
    assert driven.core.nodes[node_id(1)].free == cpus(1), "the node's own are not touched"
    assert len(driven.core.demand) == 1


def test_any_bundle_of_the_group_that_has_room_will_do() -> None:
    driven = Driven()
    driven(announced_bundle(1, 1, (0, 2, 1, True), (2, 2, 2, False)), 0.0)
    driven(announced_bundle(2, 1, (1, 1, 1, True)), 0.0)
    given = asks(driven(demand(1, 1, in_bundle([1, 2, 3])), 0.0), LeaseRequest)
    places = [
        (ask.context.node, ask.message.bundle.index)
        for ask in given
        if isinstance(ask.message, LeaseRequest) and ask.message.bundle
    ]
    assert sorted(places) == [(node_id(1), 0), (node_id(2), 1)], "those that are committed"


def test_the_leases_of_a_bundle_are_shared_as_others_are() -> None:
    driven = Driven()
    bundle = Bundle(PlacementGroupId(GROUP), 0)
    held = summary(1, 2).model_copy(update={"bundle": bundle})
    outside = summary(3, 3)
    driven(announced_bundle(1, 1, (0, 2, 0, True), leases=[held, outside]), 0.0)
    effects = driven(demand(2, 1, in_bundle([1], 0)), 0.0)
    effects += driven.core.tick(0.1)
    (ask,) = asks(effects, RecallLeases)
    assert ask.message == RecallLeases(owner=process_id(1, 0), resources=cpus(1), count=1, bundle=bundle)


def test_demand_for_a_bundle_waits_quietly_for_its_group_and_is_told_if_no_bundle_can_hold_it() -> None:
    driven = Driven(1)
    driven(demand(1, 1, in_bundle([1], 0, cpus(2))), 0.0)
    driven(announced(1, 2, cpus(4)), 4.0)
    assert told(driven.core.tick(5.0)) == [], "its group has no place yet"
    (row,) = pending(driven, 5.0)
    assert "waits until bundle 0 of placement group" in row.why
    driven(announced_bundle(1, 3, (0, 1, 1, True)), 5.0)
    (notice,) = told(driven.core.tick(5.1))
    assert "can never hold it: the nearest, on node 0000000000000001, lacks CPU 2 (it has 1)" in notice.why


def pending(driven: Driven, now: float) -> list[Any]:
    (reply,) = driven(Request(GetPending(), 1), now)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, PendingList)
    return list(reply.message.pending)
