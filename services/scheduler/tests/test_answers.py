"""What people are told of what waits: from what the scheduler itself decides by."""

from __future__ import annotations

from collections.abc import Sequence

from services.scheduler.tests.builders import clustered, summary, view, waiting
from services.scheduler.tests.simulation import cpus, job_id
from shoal_core.protocol.messages import JobTerms
from shoal_core.protocol.placement import DEFAULT
from shoal_core.protocol.scheduling import (
    MOST_NAMED,
    MOST_PENDING,
    GetPending,
    JobStanding,
    NodeShortage,
    PendingDemand,
    PendingList,
)
from shoal_core.testing.builders import node_id
from shoal_scheduler.answers import pending_list
from shoal_scheduler.demand import Wanted
from shoal_scheduler.policy import NodeView, explain
from shoal_scheduler.waiting import PATIENCE_SECONDS, Waiting

NOW = PATIENCE_SECONDS - 0.5


def listed(
    demand: Sequence[Wanted],
    nodes: list[NodeView],
    now: float = NOW,
    about: str = "",
    terms: dict[int, JobTerms] | None = None,
) -> PendingList:
    cluster = clustered(nodes)
    for number, job_terms in (terms or {}).items():
        cluster.jobs.get(job_id(number)).terms = job_terms
    lines = Waiting(cluster)
    for wanted in demand:
        lines.put(wanted, now)
    return pending_list(GetPending(about=about), demand, [], cluster, lines, now)


def only(rows: PendingList) -> PendingDemand:
    (row,) = rows.pending
    return row


def test_what_waits_is_listed_longest_first_with_the_reason() -> None:
    young, old = waiting(1, [1, 2], served_at=8.0), waiting(2, [1], cpus(9), served_at=1.0)
    nodes = [view(1, cpus(4), {})]
    rows = listed([young, old], nodes, 10.0).pending
    assert [(row.owner, row.waiting_seconds, row.wanted, row.feasible) for row in rows] == [
        (old.owner, 9.0, 1, False),
        (young.owner, 2.0, 2, True),
    ]
    assert rows[0].why == explain(cpus(9), DEFAULT, nodes)
    assert rows[0].turn is None, "it has no turn, whatever comes free"
    assert only(listed([young], nodes, 7.0)).waiting_seconds == 0.0, "never negative"


def test_only_so_much_is_listed_and_what_is_asked_about() -> None:
    many = [waiting(number, [1]) for number in range(1, MOST_PENDING + 3)]
    rows = listed(many, [view(1, cpus(4), {})])
    assert (len(rows.pending), rows.count) == (MOST_PENDING, MOST_PENDING + 2)
    few = [waiting(1, [1]), waiting(2, [1], job=1), waiting(3, [1])]
    nodes = [view(1, cpus(4), {})]
    assert [row.owner for row in listed(few, nodes, about=job_id(1)).pending] == [few[0].owner, few[1].owner]
    assert only(listed(few, nodes, about=few[2].owner)).owner == few[2].owner
    assert listed(few, nodes, about="f0").count == 3
    assert listed(few, nodes, about="f1") == PendingList(pending=[], count=0)


def test_who_goes_before_is_named_with_what_it_may_claim() -> None:
    nodes = [view(1, cpus(8), {}, leases=[summary(1, 4), summary(2, 1), summary(3, 3)])]
    demand = [waiting(1, [1]), waiting(2, [1]), waiting(3, [1])]
    terms = {2: JobTerms(weight=2.0), 3: JobTerms(priority=1)}
    rows = {row.job_id: row.turn for row in listed(demand, nodes, terms=terms).pending}
    last, second, first = rows[job_id(1)], rows[job_id(2)], rows[job_id(3)]
    assert last is not None
    assert second is not None
    assert first is not None
    urgent = JobStanding(job_id=job_id(3), priority=1, weight=1.0, share=0.375)
    light = JobStanding(job_id=job_id(2), priority=0, weight=2.0, share=0.0625)
    assert last.job == JobStanding(job_id=job_id(1), priority=0, weight=1.0, share=0.5)
    assert (last.jobs_before, last.job_count) == ([urgent, light], 2)
    assert second.jobs_before == [urgent]
    assert first.jobs_before == []


def test_within_a_job_it_is_counted_what_goes_before() -> None:
    demand = [
        waiting(1, [1], priority=1),
        waiting(2, [1], job=1, depth=1),
        waiting(3, [1], job=1),
        waiting(4, [1], job=1, served_at=0.5),
    ]
    rows = listed(demand, [view(1, cpus(4), {}, leases=[summary(9, 4)])]).pending
    assert [row.turn.before_in_job for row in rows if row.turn is not None] == [0, 1, 2, 3]


def test_what_waited_too_long_goes_first_and_room_is_kept_for_it() -> None:
    nodes = [view(1, cpus(4), cpus(1)), view(2, cpus(4), cpus(2))]
    turn = only(listed([waiting(1, [1], cpus(4))], nodes, now=PATIENCE_SECONDS + 1)).turn
    assert turn is not None
    assert (turn.goes_first_seconds, turn.kept_on) == (1.0, node_id(2))
    assert turn.nearest == [
        NodeShortage(node_id=node_id(2), lacking=cpus(2)),
        NodeShortage(node_id=node_id(1), lacking=cpus(3)),
    ]
    turn = only(listed([waiting(1, [1], cpus(4))], nodes)).turn
    assert turn is not None
    assert (turn.goes_first_seconds, turn.kept_on) == (None, None)
    many = [view(number, cpus(1), {}) for number in range(1, 20)]
    turn = only(listed([waiting(1, [1])], many)).turn
    assert turn is not None
    assert len(turn.nearest) == MOST_NAMED


def test_a_quota_is_a_reason() -> None:
    nodes = [view(1, cpus(8), cpus(6), leases=[summary(1, 2)])]
    turn = only(listed([waiting(1, [9])], nodes, terms={1: JobTerms(quotas=cpus(2))})).turn
    assert turn is not None
    assert turn.over_quota == ["CPU"]
    assert turn.nearest == [], "there is room"
