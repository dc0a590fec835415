"""What is kept in order and counted as nodes change is what a look at everything would find."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.tests.builders import announced, clustered, summary, view, waiting
from services.scheduler.tests.simulation import cpus, job_id
from shoal_core.protocol.placement import DEFAULT, SPREAD, Condition, NodeAffinity, Operator, Selected, Strategy
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.candidates import Candidates, shape_of
from shoal_scheduler.cluster import MOST_SHAPES, Cluster, Granted
from shoal_scheduler.fairness import plan
from shoal_scheduler.ordering import Ordering
from shoal_scheduler.policy import NodeView
from shoal_scheduler.waiting import Waiting


@given(st.lists(st.tuples(st.integers(0, 5), st.none() | st.integers(0, 3))))
def test_an_ordering_is_sorted_whatever_is_put_and_discarded(steps: list[tuple[int, int | None]]) -> None:
    ordering: Ordering[int] = Ordering()
    kept: dict[int, int] = {}
    for name, key in steps:
        if key is None:
            ordering.discard(name)
            kept.pop(name, None)
        else:
            ordering.put(name, (key, name), name)
            kept[name] = key
        assert list(ordering) == sorted(kept, key=lambda name: (kept[name], name))
        assert len(ordering) == len(kept)
        if kept:
            assert ordering.first == next(iter(ordering))


STRATEGIES: list[Strategy] = [
    DEFAULT,
    SPREAD,
    NodeAffinity(node_id(1), soft=True),
    Selected(((Condition("zone", Operator.EXISTS),), ())),
]
STEPS = st.lists(
    st.tuples(
        st.integers(1, 4),
        st.sampled_from(["announce", "take", "avoid", "remove", "drain"]),
        st.sampled_from([0, 1, 2, 4]),
        st.booleans(),
    ),
    max_size=20,
)


def copied(cluster: Cluster) -> Cluster:
    """Return a cluster that has just heard of the same nodes."""
    return clustered([replace(node, leases=list(node.leases)) for node in cluster.nodes.values()])


@settings(max_examples=60)
@given(steps=STEPS, strategy=st.sampled_from(STRATEGIES), wanted=st.sampled_from([0, 1, 2]))
def test_candidates_that_follow_changes_choose_as_if_they_were_new(
    steps: list[tuple[int, str, int, bool]], strategy: Strategy, wanted: int
) -> None:
    cluster = Cluster()
    shape = shape_of(cpus(wanted) if wanted else {}, strategy)
    for sequence, (number, step, amount, labelled) in enumerate(steps, 1):
        node = cluster.nodes.get(node_id(number))
        if step == "announce" or node is None:
            labels = {"zone": "a"} if labelled else {}
            said = announced(number, sequence, cpus(4), cpus(amount)).model_copy(update={"labels": labels})
            cluster.announced(said, 0.0)
        elif step == "take":
            node.take(cpus(amount))
        elif step == "avoid":
            node.avoid_until = float(amount)
        elif step == "drain":
            node.draining = labelled
            node.touch()
        else:
            cluster.remove(node.node_id)
        followed, new = cluster.candidates(shape), copied(cluster).candidates(shape)
        for now in (0.0, 3.0):
            one, other = followed.choose(now), new.choose(now)
            assert (one and one.node_id) == (other and other.node_id)
        assert (len(followed), followed.have_room) == (len(new), new.have_room)
        near, other = followed.nearest(), new.nearest()
        assert (near and near.node_id) == (other and other.node_id)


def test_candidates_that_were_not_asked_for_long_are_brought_up_to_date() -> None:
    cluster = clustered([view(1, cpus(4)), view(2, cpus(4))])
    shape = shape_of(cpus(1), DEFAULT)
    cluster.candidates(shape)
    cluster.remove(node_id(1))
    for number in range(3000):
        cluster.nodes[node_id(2)].take(cpus(1), 1 if number % 2 else -1)
        cluster.candidates(shape_of(cpus(2), DEFAULT))
    chosen = cluster.candidates(shape).choose(0.0)
    assert chosen is cluster.nodes[node_id(2)]
    assert len(cluster.candidates(shape)) == 1
    for units in range(1, 2 * MOST_SHAPES):
        cluster.candidates(shape_of({"CPU": units}, DEFAULT))
    assert len(cluster.candidates(shape)) == 1


HELD = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 2), st.integers(0, 2)), max_size=3
)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 3), st.booleans(), HELD, st.integers(0, 2)), max_size=8))
def test_what_is_counted_is_what_the_nodes_said_last(
    steps: list[tuple[int, bool, list[tuple[int, int, int, int, int]], int]],
) -> None:
    cluster = Cluster()
    last: dict[int, list[tuple[int, int, int, int, int]]] = {}
    actors: dict[int, int] = {}
    for sequence, (number, dies, held, actor) in enumerate(steps, 1):
        if dies:
            cluster.remove(node_id(number))
            last.pop(number, None)
            actors.pop(number, None)
            continue
        leases = [
            summary(owner, count, cpus(size), blocked=blocked, recalled=min(recalled, count - blocked))
            for owner, size, count, blocked, recalled in held
            if blocked <= count
        ]
        said = announced(number, sequence, cpus(4), {}, leases)
        cluster.announced(said.model_copy(update={"held_by_actors": {job_id(1): cpus(actor)} if actor else {}}), 0.0)
        last[number] = [row for row in held if row[3] <= row[2]]
        actors[number] = actor
    used: Counter[int] = Counter()
    owners: Counter[int] = Counter()
    for rows in last.values():
        for owner, size, count, blocked, _ in rows:
            used[owner] += size * 10_000 * (count - blocked)
            owners[owner] += count - blocked
    used[1] += sum(actors.values()) * 10_000
    for owner in (1, 2, 3):
        job = cluster.jobs.get(job_id(owner))
        assert job.used.get("CPU", 0) == used[owner]
        assert job.owners.get(process_id(owner, 0), 0) == owners[owner]
    assert cluster.total == ({"CPU": 40_000 * len(last)} if last else {})
    assert all(node in cluster.nodes for places in cluster.places.values() for node in places)


def test_grants_count_in_whatever_order_their_answers_come() -> None:
    cluster = clustered([])
    cluster.announced(announced(1, 1, cpus(4)), 0.0)
    node = cluster.nodes[node_id(1)]
    for sequence in (3, 2):
        cluster.granted(node_id(1), Granted(sequence, job_id(1), process_id(1, 0), cpus(1), 1))
        node.sequence = max(node.sequence, sequence)
    assert cluster.jobs.get(job_id(1)).used == cpus(2)


def test_a_grant_counts_until_the_node_announces_it() -> None:
    cluster = clustered([])
    cluster.announced(announced(1, 1, cpus(4)), 0.0)
    job = cluster.jobs.get(job_id(1))
    cluster.granted(node_id(1), Granted(1, job_id(1), process_id(1, 0), cpus(1), 2))
    assert job.used == cpus(2)
    cluster.announced(announced(1, 2, cpus(4), cpus(2), [summary(1, 2)]), 0.1)
    assert job.used == cpus(2)
    cluster.granted(node_id(1), Granted(1, job_id(1), process_id(1, 0), cpus(1), 2))
    assert job.used == cpus(2), "what was announced before the answer came is not counted again"
    cluster.remove(node_id(1))
    assert job.used == {}
    cluster.jobs.forget_idle(set())
    assert list(cluster.jobs) == []


def test_a_decision_looks_at_no_more_nodes_where_there_are_more(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[str] = []
    update = Candidates.update

    def counted(self: Candidates, node_id: str, node: NodeView | None) -> None:
        looked_at.append(node_id)
        update(self, node_id, node)

    monkeypatch.setattr(Candidates, "update", counted)
    counts = []
    for size in (10, 1000):
        cluster = clustered(view(number, cpus(8)) for number in range(1, size + 1))
        lines = Waiting(cluster)
        lines.put(waiting(1, [0]), 0.0)
        plan(cluster, lines, 0.0)
        looked_at.clear()
        lines.put(waiting(2, range(40)), 0.0)
        assert sum(len(placement.slots) for placement in plan(cluster, lines, 0.0)) == 40
        counts.append(len(looked_at))
    assert counts[0] == counts[1] <= 45
