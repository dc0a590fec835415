"""The bundles of a node: what they reserve, when they are given back, and the leases that come out of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.worker.tests.test_node_properties import HERE, OTHERS, SUBJECTS, description
from shoal_core.protocol.actors import (
    ActorClaim,
    ActorDeath,
    ActorDescription,
    ActorRecord,
    ActorState,
    ClaimActor,
    changed,
)
from shoal_core.protocol.effects import Answered, Ask, Effect, Event, Publish, Received, Reply, Request, Send, Start
from shoal_core.protocol.errors import NotFoundError, RequestTimeoutError, ShoalError
from shoal_core.protocol.groups import (
    AbandonGroup,
    BundlesPrepared,
    GroupChanged,
    GroupDescription,
    GroupRecord,
    GroupState,
    PrepareBundles,
    ReturnBundles,
)
from shoal_core.protocol.ids import ActorId, JobId, NodeId, ObjectKey, PlacementGroupId, SlotId
from shoal_core.protocol.messages import (
    BundleSummary,
    Done,
    DrainNode,
    JobFinished,
    JobState,
    Message,
    NodeAnnouncement,
)
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.records import (
    LeaseAssigned,
    LeaseGranted,
    LeaseRecalled,
    WorkerBlocked,
    WorkerLost,
    WorkerReady,
)
from shoal_core.protocol.resources import Resources, to_resources
from shoal_core.protocol.scheduling import ActorStart, LeaseAnswer, LeaseRequest, RecallLeases
from shoal_core.testing.builders import process_id
from shoal_worker.bundles import DOUBT_SECONDS, REPEAT_SECONDS
from shoal_worker.inputs import KillProcess, ProcessEnded, StartProcess
from shoal_worker.leases import Lease, LeaseTable
from shoal_worker.node import NodeCore

GROUP = PlacementGroupId("0" * 31 + "1")
JOB = JobId("00000001")
OWNER = process_id(1, 0)
ONE = to_resources({"CPU": 1})
TWO = to_resources({"CPU": 2})
ALL = to_resources({"CPU": 4, "GPU": 2, "custom": 1})


def bundle(index: int = 0) -> Bundle:
    return Bundle(GROUP, index)


class Node:
    """A node of four CPUs and two GPUs, and what it was made to do last."""

    def __init__(self) -> None:
        self.core = NodeCore(description(ALL), SUBJECTS, gpu_names=["0", "1"])
        self.now = 0.0
        self.effects: list[Effect] = []

    def __call__(self, message: object) -> list[Effect]:
        self.effects = self.core.handle(message, self.now)
        self.core.sanity_check()
        return self.effects

    def ask(self, message: Message) -> Message | ShoalError:
        replies = [effect for effect in self(Request(message, 7)) if isinstance(effect, Reply)]
        return replies[0].message

    def prepare(self, *bundles: Resources, attempt: int = 1, plan: str = "a") -> bool:
        request = PrepareBundles(
            plan=plan, group_id=GROUP, job_id=JOB, attempt=attempt, bundles=dict(enumerate(bundles))
        )
        answer = self.ask(request)
        assert isinstance(answer, BundlesPrepared)
        assert answer.granted == (not answer.reason)
        assert answer.free == self.core.leases.free
        return answer.granted

    def hear(self, state: GroupState, attempt: int = 1, nodes: Sequence[NodeId | None] = (HERE,)) -> list[Effect]:
        return self(Event(GroupChanged(group_id=GROUP, state=state, attempt=attempt, nodes=list(nodes)), "gcs"))

    def later(self, seconds: float) -> list[Message]:
        """Let time pass; return what is asked of the control store about groups."""
        self.now += seconds
        effects = self.core.tick(self.now)
        self.core.sanity_check()
        asked = [effect.message for effect in effects if isinstance(effect, Ask)]
        return [message for message in asked if isinstance(message, AbandonGroup)]

    def announced(self) -> NodeAnnouncement:
        """Return the next announcement."""
        self.now += 1.0
        messages = [effect.message for effect in self.core.tick(self.now) if isinstance(effect, Publish)]
        (announcement,) = [message for message in messages if isinstance(message, NodeAnnouncement)]
        return announcement

    def lease(self, *slots: int, index: int = 0, resources: Resources = ONE, **fields: Any) -> LeaseAnswer:
        request = LeaseRequest(
            scheduler="s",
            owner=OWNER,
            job_id=JOB,
            key=0,
            slots=[SlotId(slot) for slot in slots],
            resources=resources,
            bundle=bundle(index),
        )
        answer = self.ask(request.model_copy(update=fields))
        assert isinstance(answer, LeaseAnswer)
        return answer

    def staffed(self) -> list[LeaseAssigned]:
        """Have a process come up for each lease that waits; return what they serve."""
        starts = [effect.command for effect in self.effects if isinstance(effect, Start)]
        assigned: list[LeaseAssigned] = []
        for command in starts:
            assert isinstance(command, StartProcess)
            for effect in self(Received(command.process_id, [WorkerReady(1)])):
                if isinstance(effect, Send) and isinstance(effect.record, LeaseAssigned):
                    assigned.append(effect.record)
        return assigned


@pytest.fixture
def node() -> Node:
    return Node()


def record(state: GroupState, attempt: int, nodes: Sequence[NodeId | None]) -> GroupRecord:
    about = GroupDescription(group_id=GROUP, job_id=JOB, owner=OWNER, bundles=[TWO] * len(nodes))
    return GroupRecord(description=about, state=state, attempt=attempt, nodes=list(nodes), created_at=0.0)


# ------------------------------------------------------------------------------- reserving


def test_what_a_bundle_reserves_is_free_for_nobody_else(node: Node) -> None:
    assert node.prepare(TWO, ONE)
    assert node.core.leases.free == to_resources({"CPU": 1, "GPU": 2, "custom": 1})
    assert node.announced().bundles == [
        BundleSummary(group_id=GROUP, index=0, job_id=JOB, total=TWO, free=TWO, committed=False),
        BundleSummary(group_id=GROUP, index=1, job_id=JOB, total=ONE, free=ONE, committed=False),
    ]


def test_bundles_are_reserved_all_or_none(node: Node) -> None:
    assert not node.prepare(TWO, to_resources({"CPU": 3}))
    assert node.core.leases.free == node.core.leases.total
    assert len(node.core.bundles) == 0


def test_the_same_request_again_and_another_plan_for_the_same_bundle_reserve_it_once(node: Node) -> None:
    assert node.prepare(TWO)
    assert node.prepare(TWO)
    assert node.prepare(TWO, plan="b")
    assert node.core.leases.free["CPU"] == 20_000
    node.ask(ReturnBundles(plan="a", group_id=GROUP))
    assert len(node.core.bundles) == 1, "the other plan counts on it"
    assert node.ask(ReturnBundles(plan="b", group_id=GROUP)) == Done()
    assert node.core.leases.free == node.core.leases.total


def test_a_node_that_leaves_reserves_nothing(node: Node) -> None:
    assert node.ask(DrainNode()) == Done()
    assert not node.prepare(ONE)


def test_what_is_committed_is_not_given_back_to_a_scheduler(node: Node) -> None:
    node.prepare(TWO)
    node.hear(GroupState.CREATED)
    node.ask(ReturnBundles(plan="a", group_id=GROUP))
    assert node.announced().bundles[0].committed


def test_attempts_that_are_over_are_given_back_and_later_ones_are_kept(node: Node) -> None:
    node.prepare(ONE, attempt=1, plan="a")
    node.prepare(ONE, attempt=3, plan="b")
    node.hear(GroupState.PENDING, 2, [None])
    assert len(node.core.bundles) == 1
    node.hear(GroupState.CREATED, 3, [OTHERS[0]])
    assert len(node.core.bundles) == 0


def test_old_news_does_not_end_what_is_committed(node: Node) -> None:
    node.prepare(ONE, attempt=2)
    node.hear(GroupState.CREATED, 2)
    node.hear(GroupState.PENDING, 1, [None])
    node.hear(GroupState.RESCHEDULING, 3, [HERE, None])
    assert node.announced().bundles[0].committed


def test_a_node_in_doubt_has_the_attempt_end_and_says_so_until_it_is_answered(node: Node) -> None:
    node.prepare(TWO, attempt=2)
    assert node.later(DOUBT_SECONDS - 0.1) == []
    assert node.later(0.1) == [AbandonGroup(group_id=GROUP, job_id=JOB, attempt=2)]
    (context,) = {effect.context for effect in asked(node)}
    node(Answered(context, RequestTimeoutError("")))
    assert node.later(REPEAT_SECONDS / 2) == []
    assert node.later(REPEAT_SECONDS / 2) == [AbandonGroup(group_id=GROUP, job_id=JOB, attempt=2)]
    node(Answered(context, record(GroupState.PENDING, 2, [None])))
    assert node.core.leases.free == node.core.leases.total
    assert node.later(10.0) == []


def asked(node: Node) -> list[Ask]:
    """Ask again what is in doubt, to see with which context."""
    effects = node.core.tick(node.now + REPEAT_SECONDS)
    node.now += REPEAT_SECONDS
    return [effect for effect in effects if isinstance(effect, Ask) and isinstance(effect.message, AbandonGroup)]


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        (record(GroupState.CREATED, 1, [HERE]), True),
        (record(GroupState.CREATED, 1, [OTHERS[0]]), False),
        (record(GroupState.RESCHEDULING, 2, [HERE]), True),
        (record(GroupState.REMOVED, 1, [None]), False),
        (NotFoundError("no such group"), False),
    ],
)
def test_the_record_says_whether_a_bundle_is_kept(node: Node, answer: GroupRecord | ShoalError, kept: bool) -> None:
    node.prepare(TWO)
    node.now += DOUBT_SECONDS
    (ask,) = asked(node)
    node(Answered(ask.context, answer))
    assert len(node.core.bundles) == kept
    assert [summary.committed for summary in node.announced().bundles] == [True] * kept


def test_nothing_is_reserved_for_a_group_that_was_removed(node: Node) -> None:
    node.hear(GroupState.REMOVED, 0, [])
    assert not node.prepare(ONE)


# ------------------------------------------------------------------------------- leases


def committed(node: Node, *bundles: Resources) -> None:
    node.prepare(*bundles)
    node.hear(GroupState.CREATED, 1, [HERE] * len(bundles))


def test_leases_come_out_of_a_bundle_only_when_it_is_committed(node: Node) -> None:
    node.prepare(TWO)
    assert node.lease(1).granted == []
    node.hear(GroupState.CREATED)
    answer = node.lease(1, 2, 3)
    assert (answer.granted, answer.refused, answer.free) == ([1, 2], [3], {})
    assert node.core.leases.free["CPU"] == 20_000, "the node's own are not touched"
    assert node.lease(4, index=5).reason == "the node has no bundle 5 of placement group " + GROUP
    (summary,) = node.announced().leases
    assert (summary.bundle, summary.count) == (bundle(), 2)


def test_the_end_of_a_lease_gives_back_to_its_bundle(node: Node) -> None:
    committed(node, TWO)
    node.lease(1)
    (assigned,) = node.staffed()
    (worker,) = [process.process_id for process in node.core.processes]
    node(Received(worker, [WorkerBlocked(assigned.lease, True)]))
    assert node.announced().bundles[0].free == TWO, "a blocked one lends its CPU to others in the bundle"
    node(ProcessEnded(worker, "it crashed"))
    assert node.announced().bundles[0].free == TWO
    assert node.core.leases.free["CPU"] == 20_000


def test_leases_get_those_gpus_that_their_bundle_has_reserved(node: Node) -> None:
    gpu = to_resources({"GPU": 1})
    committed(node, gpu, gpu)
    node.lease(1, index=1, resources=gpu)
    node.lease(2, index=0, resources=to_resources({"GPU": 0.5}))
    node.lease(3, index=0, resources=to_resources({"GPU": 0.5}))
    held = {lease.slot: [share.index for share in lease.gpus] for lease in node.core.leases}
    assert held == {1: [1], 2: [0], 3: [0]}
    assert node.lease(4, index=0, resources=gpu).granted == []


def test_leases_are_asked_back_bundle_by_bundle(node: Node) -> None:
    committed(node, ONE, ONE)
    node.lease(1, index=0)
    node.staffed()
    node.lease(2, index=1)
    node.staffed()
    effects = node(Request(RecallLeases(owner=OWNER, resources=ONE, count=5, bundle=bundle(1)), 1))
    recalled = [effect.record for effect in effects if isinstance(effect, Send)]
    (second,) = [lease for lease in node.core.leases if lease.slot == 2]
    assert recalled == [LeaseRecalled(second.number)]
    node(Request(RecallLeases(owner=OWNER, resources=ONE, count=5), 1))
    assert [lease.recalled for lease in node.core.leases] == [False, True]


def test_the_end_of_a_group_kills_what_runs_in_it_and_tells_the_owner(node: Node) -> None:
    committed(node, TWO)
    node.lease(1)
    (assigned,) = node.staffed()
    node.lease(2)
    (worker,) = [process.process_id for process in node.core.processes if process.lease]
    effects = node.hear(GroupState.REMOVED, 1, [None])
    lost = [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.record, WorkerLost)]
    assert [(effect.peer, effect.record) for effect in lost] == [
        (OWNER, WorkerLost(assigned.lease, 0, "its placement group was removed", group_removed=True))
    ]
    assert Start(KillProcess(worker)) in effects
    assert node.core.leases.free["CPU"] == 30_000, "what the process still uses is not free"
    after = node(ProcessEnded(worker, "killed"))
    assert not [effect for effect in after if isinstance(effect, Send) and isinstance(effect.record, WorkerLost)]
    assert node.core.leases.free == node.core.leases.total


def test_a_lease_that_had_no_process_yet_ends_with_the_group(node: Node) -> None:
    committed(node, TWO)
    node.lease(1)
    effects = node.hear(GroupState.REMOVED, 1, [None])
    assert not [effect for effect in effects if isinstance(effect, Send)]
    assert node.core.leases.free == node.core.leases.total
    assert not [record for record in node.staffed() if isinstance(record, LeaseGranted)]


def test_bundles_outlive_jobs_since_their_record_decides(node: Node) -> None:
    committed(node, TWO)
    node.lease(1)
    node.staffed()
    (worker,) = [process.process_id for process in node.core.processes]
    node(Event(JobFinished(job_id=JOB, driver=OWNER, state=JobState.SUCCEEDED, message=""), "gcs"))
    node(ProcessEnded(worker, "killed"))
    assert node.announced().bundles[0].free == TWO


def test_an_actor_comes_out_of_a_bundle_and_ends_when_the_control_store_has_ended_it(node: Node) -> None:
    committed(node, TWO)
    start = ActorStart(actor_id=ActorId(OWNER + "00000001"), incarnation=0, owner=OWNER)
    assert node.lease(1, resources=TWO, actor=start).granted == [1]
    assert not node.staffed(), "a process starts, which nobody is given before the claim"
    assert node.announced().bundles[0].free == {}
    node.now += 1.0
    (claim,) = [effect for effect in node.core.tick(node.now) if _is_claim(effect)]
    assert isinstance(claim, Ask)
    about = ActorDescription(
        actor_id=start.actor_id,
        job_id=JOB,
        owner=OWNER,
        owner_key=ObjectKey(0),
        class_name="Counter",
        placement=TWO,
        resources=ONE,
        strategy=bundle(),
    )
    record = ActorRecord(description=about, state=ActorState.PENDING_CREATION, node_id=HERE, created_at=0.0)
    node(Answered(claim.context, ActorClaim(record=record, spec=b"")))
    assert node.announced().bundles[0].free == ONE, "it needs less to live than to be placed"
    effects = node.hear(GroupState.REMOVED, 1, [None])
    assert not [effect for effect in effects if isinstance(effect, Start)], "it is not the node that ends actors"
    assert node.core.leases.free["CPU"] == 30_000
    gone = record.model_copy(update={"state": ActorState.DEAD, "death": ActorDeath(reason="its group was removed")})
    effects = node(Event(changed(gone), "gcs"))
    (worker,) = [process.process_id for process in node.core.processes if process.lease]
    assert Start(KillProcess(worker)) in effects
    node(ProcessEnded(worker, "killed"))
    assert node.core.leases.free == node.core.leases.total


def _is_claim(effect: Effect) -> bool:
    return isinstance(effect, Ask) and isinstance(effect.message, ClaimActor)


# ------------------------------------------------------------------------------- the table of leases

AMOUNTS = st.sampled_from(
    [to_resources(amounts) for amounts in ({"CPU": 1}, {"CPU": 2}, {"CPU": 0.5, "GPU": 0.5}, {"GPU": 1}, {"GPU": 0.3})]
)
MOVES = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 3), AMOUNTS),
    st.tuples(st.just("open"), st.integers(0, 3)),
    st.tuples(st.just("release"), st.integers(0, 3)),
    st.tuples(st.just("grant"), st.integers(-1, 3), AMOUNTS),
    st.tuples(st.sampled_from(["end", "block", "unblock"]), st.integers(0, 9)),
)


@given(st.lists(MOVES, max_size=30))
@settings(max_examples=60)
def test_whatever_comes_and_goes_nothing_is_promised_twice_and_all_comes_back(moves: list[tuple[Any, ...]]) -> None:
    table = LeaseTable(ALL, ["0", "1"])
    leases: list[Lease] = []
    for slot, move in enumerate(moves):
        match move:
            case ("reserve", int(index), resources) if bundle(index) not in table.reserved():
                table.reserve(bundle(index), resources)
            case ("open", int(index)) if bundle(index) in table.reserved():
                table.open(bundle(index))
            case ("release", int(index)) if bundle(index) in table.reserved():
                assert all(lease.bundle is None for lease in table.release(bundle(index)))
            case ("grant", int(index), resources) if index < 0 or table.has_open(bundle(index)):
                place = None if index < 0 else bundle(index)
                lease = table.grant(OWNER, JOB, 0, SlotId(slot), resources, bundle=place)
                leases += [] if lease is None else [lease]
            case ("end", int(which)) if leases:
                table.end(leases.pop(which % len(leases)))
            case ("block", int(which)) if leases:
                table.block(leases[which % len(leases)])
            case ("unblock", int(which)) if leases:
                table.unblock(leases[which % len(leases)])
        table.sanity_check()
    for lease in leases:
        table.end(lease)
    for reserved in table.reserved():
        table.release(reserved)
    table.sanity_check()
    assert (table.free, table.gpus.free) == (ALL, [10_000, 10_000])
