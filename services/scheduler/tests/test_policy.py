"""Where a lease should go, and what people are told: over snapshots of nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.tests.builders import among, summary, view
from services.scheduler.tests.simulation import cpus
from shoal_core.protocol.placement import DEFAULT, SPREAD, Strategy
from shoal_core.protocol.resources import Resources, fits
from shoal_core.protocol.scheduling import ResourceView
from shoal_core.testing.builders import node_id
from shoal_scheduler.answers import resource_view
from shoal_scheduler.candidates import HALF_FULL
from shoal_scheduler.policy import NodeView, explain, is_feasible

GPU = {"GPU": 10_000}


def chosen(nodes: list[NodeView], count: float = 1, strategy: Strategy = DEFAULT, now: float = 0.0) -> str | None:
    node = place(cpus(count), strategy, nodes, now)
    return None if node is None else node.node_id


def place(resources: Resources, strategy: Strategy, nodes: list[NodeView], now: float = 0.0) -> NodeView | None:
    return among(nodes, resources, strategy).choose(now)


def test_default_packs_nodes_up_to_half_then_takes_the_emptiest() -> None:
    nodes = [view(1, cpus(8)), view(2, cpus(8), cpus(6)), view(3, cpus(8), cpus(3))]
    assert chosen(nodes) == node_id(2), "the fullest that stays at most half full"
    nodes = [view(1, cpus(8), cpus(4)), view(2, cpus(8), cpus(2)), view(3, cpus(8), cpus(1))]
    assert chosen(nodes) == node_id(1), "above half, the emptiest"


def test_spread_takes_the_emptiest_and_ties_break_by_id() -> None:
    nodes = [view(1, cpus(8), cpus(6)), view(3, cpus(8)), view(2, cpus(8))]
    assert chosen(nodes, strategy=SPREAD) == node_id(2)
    assert chosen(list(reversed(nodes)), strategy=SPREAD) == node_id(2)


def test_what_needs_no_resources_goes_where_the_fewest_leases_are() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4)), view(3, cpus(4), leases=[summary(1, 2)])]
    where = []
    for number in range(4):
        node = place({}, DEFAULT, nodes)
        assert node is not None
        node.promise(number, {})
        node.touch()
        where.append(node.node_id)
    assert where == [node_id(1), node_id(2), node_id(1), node_id(2)]


def test_actors_that_hold_nothing_count_where_nothing_else_does() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4)), view(3, cpus(4))]
    nodes[0].actors, nodes[1].actors = 2, 1
    assert chosen(nodes, strategy=SPREAD) == node_id(3)
    nodes[2].actors = 3
    assert chosen(nodes, strategy=SPREAD) == node_id(2)


def test_a_replica_packs_its_own_nodes_first_and_spreads_over_all() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4)), view(3, cpus(4), cpus(3))]
    nodes[2].turn, nodes[0].turn = 1, 2
    assert chosen(nodes) == node_id(2)
    nodes[1].free = cpus(2)
    assert chosen(nodes) == node_id(3), "another's that stays half full, rather than one's own above that"
    nodes[2].free = cpus(1)
    nodes[0].free = cpus(1.5)
    nodes[1].free = cpus(1)
    assert chosen(nodes) == node_id(2), "above half it is one's own, even if another's is emptier"
    nodes[1].free = {}
    assert chosen(nodes) == node_id(3), "then that where fewer others come first"
    nodes[0].free, nodes[1].free = cpus(3.5), cpus(2)
    assert chosen(nodes) == node_id(1)
    assert chosen(nodes, strategy=SPREAD) == node_id(1)


def test_what_drains_or_is_avoided_or_full_is_not_chosen() -> None:
    assert chosen([view(1, cpus(4), draining=True)]) is None
    assert chosen([view(1, cpus(4), {})]) is None
    assert chosen([view(1, {"CPU": 10_000}, {"CPU": 9_999})]) is None
    avoided = view(1, cpus(4))
    avoided.avoid_until = 5.0
    assert chosen([avoided], now=4.9) is None
    assert chosen([avoided], now=5.0) == node_id(1)


def test_all_wanted_resources_must_fit() -> None:
    nodes = [view(1, {**cpus(4), **GPU}, cpus(4)), view(2, {**cpus(1), **GPU})]
    assert place({**cpus(1), **GPU}, DEFAULT, nodes) is nodes[1]
    assert place({**cpus(2), **GPU}, DEFAULT, nodes) is None


UNITS = st.integers(0, 80_000)


@given(
    nodes=st.lists(st.tuples(UNITS, UNITS, st.booleans()), max_size=5),
    wanted=UNITS,
    strategy=st.sampled_from([DEFAULT, SPREAD]),
)
def test_a_choice_fits_and_there_is_one_whenever_something_fits(
    nodes: list[tuple[int, int, bool]], wanted: int, strategy: Strategy
) -> None:
    views = [
        view(number, {"CPU": max(total, free)}, {"CPU": free}, draining=draining)
        for number, (total, free, draining) in enumerate(nodes, 1)
    ]
    resources = {"CPU": wanted} if wanted else {}
    node = place(resources, strategy, views)
    fitting = [each for each in views if not each.draining and fits(resources, each.free)]
    assert (node is None) == (not fitting)
    if node is not None:
        assert node in fitting
        least = min(each.utilisation(resources) for each in fitting)
        if strategy is SPREAD or node.utilisation(resources) > HALF_FULL:
            assert node.utilisation(resources) == least


def test_feasible_is_what_a_node_that_stays_could_ever_hold() -> None:
    assert is_feasible(cpus(4), DEFAULT, [view(1, cpus(4), {})])
    assert not is_feasible(cpus(5), DEFAULT, [view(1, cpus(4))])
    assert not is_feasible(cpus(4), DEFAULT, [view(1, cpus(4), draining=True)])
    assert not is_feasible({}, DEFAULT, [])


def test_the_nearest_is_the_node_where_the_least_must_come_free() -> None:
    nodes = [
        view(1, cpus(4), cpus(1)),
        view(2, cpus(4), cpus(2)),
        view(3, cpus(2)),
        view(4, cpus(8), {}, draining=True),
    ]
    assert among(nodes, cpus(4)).nearest() is nodes[1]
    assert among(nodes, cpus(9)).nearest() is None


def test_the_explanation_says_what_is_lacking_and_where() -> None:
    assert explain(cpus(1), DEFAULT, []) == "no node is alive"
    assert explain(cpus(1), DEFAULT, [view(1, cpus(4), draining=True)]) == "all nodes are about to leave"
    assert explain(cpus(1), DEFAULT, [view(1, cpus(4))]) == "it fits; a node is being asked"
    busy = [view(1, cpus(4), cpus(0.5)), view(2, cpus(4), {}), view(3, cpus(0.5))]
    assert explain(cpus(1), DEFAULT, busy) == "waits for CPU on 2 nodes that could run it (CPU: 7.5 of 8 in use)"
    assert explain({**cpus(1), **GPU}, DEFAULT, [view(1, {**cpus(1), **GPU}, {})]) == (
        "waits for CPU and GPU on 1 node that could run it (CPU: 1 of 1 in use, GPU: 1 of 1 in use)"
    )
    assert explain({**cpus(9), **GPU}, DEFAULT, [view(1, cpus(4)), view(2, {**cpus(2), **GPU})]) == (
        f"no node can ever run it; the nearest, node {node_id(2)}, lacks CPU 9 (it has 2)"
    )


def test_a_view_counts_what_is_asked_on_top_of_what_a_node_says() -> None:
    node = view(1, cpus(4))
    node.promise(1, cpus(1))
    node.learn(cpus(3))
    assert node.free == cpus(2)
    node.take(cpus(1), 2)
    assert node.free == cpus(0)
    node.take(cpus(1), -2)
    assert node.free == cpus(2)
    assert node.utilisation(cpus(1)) == 0.75
    assert node.utilisation({}) == 0.0


def test_the_clusters_resources_are_the_sum_over_its_nodes() -> None:
    nodes = [view(1, {**cpus(4), **GPU}, cpus(1)), view(2, cpus(2), {"CPU": -5_000})]
    assert resource_view(nodes) == ResourceView(total={**cpus(6), **GPU}, free=cpus(0.5))
    assert resource_view([]) == ResourceView(total={}, free={})
