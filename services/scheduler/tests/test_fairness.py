"""Whose turn it is, and who should give back."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.tests.builders import clustered, summary, view, waiting
from services.scheduler.tests.simulation import cpus, job_id
from shoal_core.protocol.ids import SlotId
from shoal_core.protocol.messages import JobTerms, LeaseSummary
from shoal_core.protocol.resources import add, fits
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.cluster import MOST_SHAPES, Cluster
from shoal_scheduler.demand import HELP_SECONDS, Wanted
from shoal_scheduler.fairness import KEEP_SECONDS, Placement, keeps_room, plan
from shoal_scheduler.policy import NodeView
from shoal_scheduler.recall import Recall, Victim
from shoal_scheduler.waiting import LOOKED_AT, PATIENCE_SECONDS, Line, Waiting

SOON = PATIENCE_SECONDS - 0.1
LATE = PATIENCE_SECONDS + 0.1


def with_terms(cluster: Cluster, terms: dict[int, JobTerms] | None) -> Cluster:
    for number, job_terms in (terms or {}).items():
        cluster.jobs.get(job_id(number)).terms = job_terms
    return cluster


def planned(
    demand: Sequence[Wanted], nodes: list[NodeView], now: float = SOON, terms: dict[int, JobTerms] | None = None
) -> list[Placement]:
    cluster = with_terms(clustered(nodes), terms)
    lines = Waiting(cluster)
    for wanted in demand:
        lines.put(wanted, now)
    return plan(cluster, lines, now)


def placed(placements: list[Placement]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for placement in placements:
        counts[placement.wanted.owner] += len(placement.slots)
    return dict(counts)


def test_slots_are_dealt_to_the_job_with_the_smallest_share() -> None:
    one, two = waiting(1, range(10)), waiting(2, range(10))
    nodes = [view(1, cpus(10), cpus(7), leases=[summary(1, 3)])]
    placements = planned([one, two], nodes)
    assert placed(placements) == {one.owner: 2, two.owner: 5}
    assert (len(one.open), len(two.open)) == (8, 5)


def test_a_share_is_of_the_resource_of_which_a_job_has_most() -> None:
    total = {**cpus(10), "GPU": 40_000}
    nodes = [view(1, total, {**cpus(8), "GPU": 20_000}, leases=[summary(1, 2, {"CPU": 10_000, "GPU": 10_000})])]
    has_half_of_the_gpus, has_nothing = waiting(1, range(9)), waiting(2, range(4))
    placements = planned([has_half_of_the_gpus, has_nothing], nodes)
    assert placed(placements) == {has_half_of_the_gpus.owner: 4, has_nothing.owner: 4}
    assert placed(planned([waiting(1, range(9)), waiting(2, range(9))], [nodes[0]])) == {}


def test_a_share_is_divided_by_the_weight() -> None:
    one, three = waiting(1, range(20)), waiting(3, range(20))
    placements = planned([one, three], [view(1, cpus(8))], terms={3: JobTerms(weight=3)})
    assert placed(placements) == {one.owner: 2, three.owner: 6}


def test_a_job_of_a_higher_priority_goes_first() -> None:
    one, two = waiting(1, range(4)), waiting(2, range(4))
    placements = planned([one, two], [view(1, cpus(5))], terms={2: JobTerms(priority=1)})
    assert placed(placements) == {one.owner: 1, two.owner: 4}


def test_no_job_gets_more_than_its_quota() -> None:
    one, two = waiting(1, range(9)), waiting(2, range(9), {"GPU": 10_000})
    nodes = [view(1, {**cpus(8), "GPU": 40_000}, leases=[summary(1, 1)])]
    terms = {1: JobTerms(quotas=cpus(3)), 2: JobTerms(quotas=cpus(0))}
    assert placed(planned([one, two], nodes, terms=terms)) == {one.owner: 2, two.owner: 4}


def test_within_a_job_priority_goes_before_depth_and_depth_before_an_equal_share() -> None:
    shallow, deep = waiting(1, range(3)), waiting(2, range(3), depth=1, job=1)
    urgent = waiting(3, range(2), job=1, priority=1)
    placements = planned([shallow, deep, urgent], [view(1, cpus(6))])
    assert placed(placements) == {shallow.owner: 1, deep.owner: 3, urgent.owner: 2}


def test_within_a_job_the_owner_with_the_fewest_leases_goes_first() -> None:
    one, two = waiting(1, range(10)), waiting(2, range(10), job=1)
    placements = planned([one, two], [view(1, cpus(10), cpus(7), leases=[summary(1, 3)])])
    assert placed(placements) == {one.owner: 2, two.owner: 5}


def test_depth_does_not_go_before_the_share_of_another_job() -> None:
    shallow, deep = waiting(1, range(4)), waiting(2, range(4), depth=1)
    assert placed(planned([shallow, deep], [view(1, cpus(4))])) == {shallow.owner: 2, deep.owner: 2}


def test_what_waited_too_long_gets_one_slot_before_all_others() -> None:
    deep, patient, old = (
        waiting(1, range(9), served_at=1.0, depth=5),
        waiting(2, range(9), served_at=1.0, job=1),
        waiting(3, range(9), job=1),
    )
    placements = planned([deep, patient, old], [view(1, cpus(3))], now=LATE)
    assert placed(placements) == {deep.owner: 2, old.owner: 1}


def test_a_job_gets_no_more_than_its_share_by_having_much_that_waited_too_long() -> None:
    many = [waiting(number, [1], job=1) for number in range(1, 9)]
    fresh = waiting(9, range(9), served_at=LATE)
    placements = planned([*many, fresh], [view(1, cpus(8))], now=LATE)
    assert placed(placements)[fresh.owner] == 4


def test_one_ask_carries_all_slots_of_a_demand_for_a_node() -> None:
    placements = planned([waiting(1, range(4))], [view(1, cpus(4))])
    assert [(placement.node.node_id, len(placement.slots)) for placement in placements] == [(node_id(1), 4)]


def test_a_node_that_refused_this_demand_is_left_alone_by_it_only() -> None:
    one, two = waiting(1, [1]), waiting(2, [1])
    one.avoid[node_id(1)] = SOON + 1
    assert placed(planned([one, two], [view(1, cpus(4))])) == {two.owner: 1}
    assert list(one.open) == [1]


def test_room_is_kept_for_large_demand_that_waited_too_long() -> None:
    large, small = waiting(1, [1], cpus(4)), waiting(2, range(9), served_at=1.0)
    node = view(1, cpus(4), cpus(2))
    assert placed(planned([large, small], [node], now=LATE)) == {}
    assert node.free == cpus(2), "what was kept is only counted during the round"


def test_room_is_kept_on_one_node_and_every_other_period_only() -> None:
    large, small = waiting(1, [1], cpus(4)), waiting(2, range(9), served_at=KEEP_SECONDS)
    nodes = [view(1, cpus(4), cpus(2)), view(2, cpus(4), cpus(1))]
    placements = planned([large, small], nodes, now=LATE)
    assert [placement.node for placement in placements] == [nodes[1]]
    large, small = waiting(1, [1], cpus(4)), waiting(2, range(9), served_at=KEEP_SECONDS)
    nodes = [view(1, cpus(4), cpus(2)), view(2, cpus(4), cpus(1))]
    placements = planned([large, small], nodes, now=LATE + KEEP_SECONDS)
    assert placed(placements) == {small.owner: 3}


def test_room_is_kept_for_twice_as_long_each_time() -> None:
    changes = [at for at in range(1, 600) if keeps_room(at) != keeps_room(at - 1)]
    assert changes == [30, 60, 120, 180, 300, 420]
    assert keeps_room(0)
    assert not keeps_room(-1)


def test_kept_room_is_open_to_deeper_demand() -> None:
    large, deep = waiting(1, [1], cpus(4)), waiting(2, [1], served_at=1.0, depth=1)
    placements = planned([large, deep], [view(1, cpus(4), cpus(2))], now=LATE)
    assert placed(placements) == {deep.owner: 1}


AMOUNTS = st.sampled_from([0.5, 1, 2, 4])


@given(
    demand=st.lists(
        st.tuples(st.integers(1, 4), AMOUNTS, st.integers(1, 4), st.integers(0, 2), st.floats(0, 40)), max_size=6
    ),
    sizes=st.lists(st.integers(1, 6), max_size=3),
)
def test_a_plan_fits_the_nodes_and_leaves_nothing_that_fits(
    demand: list[tuple[int, float, int, int, float]], sizes: list[int]
) -> None:
    nodes = [view(number, cpus(size)) for number, size in enumerate(sizes, 1)]
    all_wanted = [
        waiting(owner * 10 + index, range(slots), cpus(amount), served_at=served_at, depth=depth)
        for index, (owner, amount, slots, depth, served_at) in enumerate(demand)
    ]
    placements = planned(all_wanted, nodes, now=40.0)
    used: Counter[str] = Counter()
    slots: Counter[tuple[str, int]] = Counter()
    for placement in placements:
        used[placement.node.node_id] += placement.wanted.entry.resources["CPU"] * len(placement.slots)
        slots.update((placement.wanted.owner, slot) for slot in placement.slots)
    for node in nodes:
        assert node.free.get("CPU", 0) == node.total["CPU"] - used[node.node_id] >= 0
    assert all(count == 1 for count in slots.values())
    left = [wanted for wanted in all_wanted if wanted.open]
    if not any(wanted.served_at <= 40.0 - PATIENCE_SECONDS for wanted in left):
        assert not any(fits(wanted.entry.resources, node.free) for wanted in left for node in nodes)


# ------------------------------------------------------------------------------------ victims


def victims(wanted: Wanted, nodes: list[NodeView], terms: dict[int, JobTerms] | None = None) -> list[Victim]:
    cluster = with_terms(clustered(nodes), terms)
    lines = Waiting(cluster)
    lines.put(wanted, SOON)
    (line,) = lines
    return Recall(cluster, 1, SOON).find_victims(line)


def victim(wanted: Wanted, node: NodeView, terms: dict[int, JobTerms] | None = None) -> str:
    return "".join(found.lease.owner for found in victims(wanted, [node], terms))


def full(*leases: LeaseSummary, count: int = 6) -> NodeView:
    return view(1, cpus(count), {}, leases=leases)


def test_leases_that_wait_count_as_held_but_for_their_cpu() -> None:
    shape = {**cpus(1), "GPU": 10_000}
    jobs = clustered([view(1, cpus(4), leases=[summary(1, 3, shape, blocked=2)])]).jobs
    job = jobs.get(job_id(1))
    assert job.used == {**cpus(1), "GPU": 30_000}
    assert job.owners == {process_id(1, 0): 1}


def test_the_job_that_holds_most_is_asked() -> None:
    assert victim(waiting(3, [1]), full(summary(1, 2), summary(2, 4))) == process_id(2, 0)


def test_nobody_is_asked_by_a_job_with_its_share() -> None:
    assert victim(waiting(1, [9]), full(summary(1, 2), summary(2, 2), count=4)) == ""
    node = full(summary(1, 2), summary(2, 3), count=5)
    assert victim(waiting(1, [9]), node) == "", "a lease that is over cannot be shared"


def test_a_job_with_no_more_than_its_share_is_asked_only_for_one_that_has_nothing() -> None:
    assert victim(waiting(1, [9]), full(summary(1, 1), summary(2, 2), summary(3, 2))) == ""
    assert victim(waiting(1, [9]), full(summary(1, 1), summary(2, 2), summary(3, 3))) == process_id(3, 0)
    assert victim(waiting(3, [1]), full(summary(1, 1), summary(2, 1), count=2)) != ""


def test_weights_and_priorities_decide_who_is_asked() -> None:
    held = full(summary(1, 2), summary(2, 4))
    assert victim(waiting(1, [9]), held, {2: JobTerms(weight=2)}) == ""
    assert victim(waiting(1, [9]), full(summary(1, 3), summary(2, 3)), {1: JobTerms(priority=1)}) == process_id(2, 0)
    assert victim(waiting(1, [9]), held, {2: JobTerms(priority=1)}) == ""
    assert victim(waiting(3, [1]), full(summary(1, 2), summary(2, 2)), {1: JobTerms(priority=-1)}) == process_id(1, 0)
    assert victim(waiting(3, [1]), full(summary(1, 3), summary(2, 3)), {3: JobTerms(priority=-1)}) == ""
    assert victim(waiting(1, [9]), held, {1: JobTerms(quotas=cpus(2))}) == "", "more than its quota it cannot get"


def test_within_a_job_the_owner_that_holds_most_is_asked() -> None:
    node = full(summary(1, 1), summary(2, 2, job=1), summary(3, 3, job=1))
    assert victim(waiting(1, [9]), node) == process_id(3, 0)
    assert victim(waiting(2, [9], job=1), node) == ""
    assert victim(waiting(4, [9], job=1), node) == process_id(3, 0)


def test_leases_that_wait_or_are_asked_back_already_are_not_asked_for() -> None:
    assert victim(waiting(2, [1]), full(summary(1, 2, recalled=2))) == ""
    assert victim(waiting(2, [1]), full(summary(1, 2, blocked=1, recalled=1))) == ""
    assert victim(waiting(2, [1]), full(summary(1, 3, recalled=1))) == "", "what comes back is enough"
    assert victim(waiting(2, [1]), full(summary(1, 6, recalled=1))) == process_id(1, 0)


def test_in_a_large_cluster_many_leases_are_asked_for_at_once_but_not_too_many() -> None:
    nodes = [view(number, cpus(1), {}, leases=[summary(1, 1)]) for number in range(1, 65)]
    assert len(victims(waiting(2, range(64)), nodes)) == 5
    nodes = [view(number, cpus(1), {}, leases=[summary(1, 1)]) for number in range(1, 65)]
    assert len(victims(waiting(2, range(2)), nodes)) == 2


def test_a_lease_is_asked_for_only_where_its_return_helps() -> None:
    node = view(1, cpus(4), {}, leases=[summary(1, 4)])
    assert victim(waiting(2, [1], cpus(2)), node) == "", "one lease is not room enough"
    assert victim(waiting(2, [1]), view(1, cpus(4), cpus(1), leases=[summary(1, 3)])) == "", "there is room"
    assert victim(waiting(2, [1]), view(1, cpus(4), {}, draining=True, leases=[summary(1, 4)])) == ""


def holder_asked(line: Line, cluster: Cluster) -> str | None:
    """Return of which other job one lease is asked back, from a look at all of them."""
    job, total, more = line.job, cluster.total, line.candidates.resources
    going = sum(other.going.get("CPU", 0) for other in cluster.jobs if other is not job)
    expected = {"CPU": going} if going else {}
    able: list[tuple[int, float, str]] = []
    for rival in cluster.jobs:
        lower = rival.terms.priority < job.terms.priority
        has_more = rival.lasting_share(total) > job.share(total, add(expected, more)) or not (job.used or expected)
        may = lower or (rival.terms.priority == job.terms.priority and has_more)
        helps = any(
            lease.job_id == rival.job_id and lease.count > lease.recalled and not fits(more, node.free)
            for node in cluster.nodes.values()
            for lease in node.leases
        )
        if rival is not job and may and helps:
            able.append((-rival.terms.priority, rival.lasting_share(total), rival.job_id))
    return max(able)[2] if able else None


@given(
    held=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 3)), max_size=6),
    priorities=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    weights=st.lists(st.integers(1, 3), min_size=4, max_size=4),
    askers=st.lists(st.integers(1, 4), min_size=1, max_size=6),
)
def test_one_after_the_other_is_asked_as_if_all_jobs_were_looked_at_each_time(
    held: list[tuple[int, int, int]], priorities: list[int], weights: list[int], askers: list[int]
) -> None:
    nodes = [
        view(number, cpus(count), {}, leases=[summary(job, count, recalled=min(count, recalled))])
        for number, (job, count, recalled) in enumerate(held, 1)
    ]
    terms = {n: JobTerms(priority=p, weight=w) for n, (p, w) in enumerate(zip(priorities, weights, strict=True), 1)}
    cluster = with_terms(clustered(nodes), terms)
    recall = Recall(cluster, 1, SOON)
    for number in askers:
        lines = Waiting(cluster)
        lines.put(waiting(number + 10, [1], job=number), SOON)
        (line,) = lines
        expected = holder_asked(line, cluster)
        asked = [found.lease.job_id for found in recall.find_victims(line)]
        assert [job for job in asked if job != line.job.job_id] == ([] if expected is None else [expected])


def cleared(wanted: Wanted, node: NodeView) -> list[str]:
    return [found.lease.owner for found in Recall(clustered([node]), 1, SOON).clear(wanted, node)]


def test_where_room_is_kept_whoever_is_in_the_way_is_asked_for_as_much_as_is_lacking() -> None:
    one, two, three = (process_id(number, 0) for number in (1, 2, 3))
    node = view(1, cpus(4), cpus(1), leases=[summary(1, 2), summary(2, 1)])
    assert cleared(waiting(3, [1], cpus(3)), node) == [one, two], "who will hold most comes first"
    assert cleared(waiting(3, [1], cpus(3)), node) == [], "they are asked"
    assert cleared(waiting(3, [1], cpus(4)), node) == [one]
    shared = view(1, {**cpus(4), "GPU": 10_000}, cpus(1), leases=[summary(1, 3), summary(2, 1, {"GPU": 10_000})])
    assert cleared(waiting(3, [1], {"GPU": 10_000}), shared) == [two], "only what is lacking"
    assert cleared(waiting(3, [1], cpus(2)), view(1, cpus(4), cpus(1), leases=[summary(3, 3)])) == [three]


def test_what_was_left_out_of_a_round_that_emptied_its_line_has_its_turn_later() -> None:
    cluster = clustered([view(1, cpus(4), cpus(1))])
    lines = Waiting(cluster)
    left_alone, other = waiting(1, [1], job=1), waiting(2, [1], job=1)
    left_alone.avoid[node_id(1)] = SOON + 1
    for wanted in (left_alone, other):
        lines.put(wanted, SOON)
    assert placed(plan(cluster, lines, SOON)) == {other.owner: 1}
    lines.put(other, SOON)
    cluster.nodes[node_id(1)].learn(cpus(2))
    assert placed(plan(cluster, lines, SOON + 2)) == {left_alone.owner: 1}
    assert len(lines) == 0


def many_lines(nodes: list[NodeView], count: int) -> tuple[Cluster, Waiting, list[Wanted]]:
    cluster = clustered(nodes)
    lines = Waiting(cluster)
    demand = [waiting(1, [1], {"CPU": 10 + number}, job=1) for number in range(count)]
    for number, wanted in enumerate(demand):
        wanted.owner = process_id(number + 1, 0)
        lines.put(wanted, SOON)
    return cluster, lines, demand


def test_of_very_many_different_things_some_are_looked_at_at_a_time_and_all_have_their_turn() -> None:
    count = 3 * MOST_SHAPES
    cluster, lines, demand = many_lines([view(number, cpus(4)) for number in range(1, 101)], count)
    most = lines.most_at_a_time(LOOKED_AT)
    assert most < count // 10
    rounds = 0
    while len(lines):
        assert len(plan(cluster, lines, SOON)) in range(1, MOST_SHAPES + 1)
        assert lines.look_at > SOON
        rounds += 1
    assert all(wanted.asked and not wanted.open for wanted in demand)
    assert rounds <= count // most + 2


def test_of_very_many_jobs_that_ask_for_the_same_all_have_their_turn_at_once() -> None:
    cluster = clustered([view(number, cpus(4)) for number in range(1, 101)])
    lines = Waiting(cluster)
    for number in range(1, 2 * MOST_SHAPES + 1):
        lines.put(waiting(number, [1]), SOON)
    assert len(plan(cluster, lines, SOON)) == 2 * MOST_SHAPES
    assert (len(lines), lines.look_at) == (0, math.inf)


def test_of_very_many_different_things_that_do_not_fit_no_node_is_looked_at() -> None:
    cluster, lines, demand = many_lines([view(1, cpus(4), {"CPU": 5}), view(2, cpus(4), {})], 2 * MOST_SHAPES)
    followed = [line for line in lines if line.candidates.seen >= 0]
    assert len(followed) <= MOST_SHAPES + 1
    assert plan(cluster, lines, SOON) == []
    assert lines.look_at == math.inf
    assert [line for line in lines if line.candidates.seen >= 0] == followed
    seen = {id(line) for _ in range(2 * MOST_SHAPES) for line in lines.to_attend()}
    assert len(seen) == len(demand), "but each is attended to in its turn"


def test_the_ceiling_is_the_most_that_is_free_anywhere() -> None:
    cluster = clustered([view(1, cpus(4), cpus(1)), view(2, {"CPU": 40_000, "GPU": 10_000})])
    assert cluster.ceiling() == {"CPU": 40_000, "GPU": 10_000}
    cluster.nodes[node_id(2)].take({"CPU": 35_000})
    assert cluster.ceiling() == {"CPU": 10_000, "GPU": 10_000}
    cluster.remove(node_id(2))
    assert cluster.ceiling() == cpus(1)


def test_what_came_before_it_was_contended_stays_with_its_first_replica_until_it_is_overdue() -> None:
    cluster = clustered([view(1, cpus(4), cpus(1))])
    lines = Waiting(cluster)
    wanted = waiting(1, [1, 2])
    wanted.heard = {SlotId(1): 1.0, SlotId(2): 1.5}
    lines.put(wanted, 1.5)
    line = lines.line_of(wanted)
    assert line is not None
    lines.contention.note(cpus(1), {}, 1.4)
    lines.leads = False
    assert lines.may_place(line, lines.stages_to_place(line.candidates, 1.6))
    assert lines.next_slot(line, wanted, 1.6) == 1
    del wanted.open[SlotId(1)]
    assert lines.next_slot(line, wanted, 1.6) is None, "the other one is the leader's"
    wanted.open = {SlotId(1): 1.0}
    lines.contention.note(cpus(1), {}, 1.8)
    assert lines.may_place(line, lines.stages_to_place(line.candidates, 1.05 + HELP_SECONDS))
    assert lines.next_slot(line, wanted, 1.05 + HELP_SECONDS) is None, "it is overdue"
    lines.contention.note(cpus(1), {}, 1.5 + HELP_SECONDS)
    assert not lines.may_place(line, lines.stages_to_place(line.candidates, 1.5 + HELP_SECONDS)), (
        "and so is all that came before"
    )
    lines.leads = True
    assert lines.may_place(line, lines.stages_to_place(line.candidates, 1.5 + HELP_SECONDS))
    assert lines.next_slot(line, wanted, 1.05 + HELP_SECONDS) == 1
