"""Where the bundles of a group go: each strategy by itself, and what holds for all of them, whatever the cluster."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.tests.builders import group_demand, view
from services.scheduler.tests.simulation import cpus
from shoal_core.protocol.groups import GroupDemand, GroupStrategy
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.placement import Condition, Conditions, Operator, all_met
from shoal_core.protocol.resources import Resources, add, fits
from shoal_core.testing.builders import node_id
from shoal_scheduler.gangs import Plan, explain, free_at_best, is_feasible, place
from shoal_scheduler.policy import NodeView

PACK, SPREAD = GroupStrategy.PACK, GroupStrategy.SPREAD
STRICT_PACK, STRICT_SPREAD = GroupStrategy.STRICT_PACK, GroupStrategy.STRICT_SPREAD
GPU = {"GPU": 10_000}


def placed(demand: GroupDemand, nodes: Sequence[NodeView], now: float = 0.0) -> list[int] | None:
    """Return the number of the node of each bundle, in order."""
    plan = place(demand, nodes, now)
    return None if plan is None else [int(plan[index], 16) for index in sorted(plan)]


def in_zone(zone: str) -> Conditions:
    return (Condition("zone", Operator.IN, (zone,)),)


def test_pack_takes_as_few_nodes_as_it_can() -> None:
    nodes = [view(1, cpus(2)), view(2, cpus(4)), view(3, cpus(3))]
    assert placed(group_demand([cpus(1)] * 4, PACK), nodes) == [2, 2, 2, 2]
    assert Counter(placed(group_demand([cpus(1)] * 7, PACK), nodes) or []) == {2: 4, 3: 3}
    assert placed(group_demand([cpus(1)] * 10, PACK), nodes) is None


def test_pack_takes_the_fullest_of_the_nodes_that_hold_as_much() -> None:
    nodes = [view(1, cpus(8)), view(2, cpus(8), cpus(3)), view(3, cpus(8), cpus(4))]
    assert placed(group_demand([cpus(3)], PACK), nodes) == [2]


def test_pack_does_not_fail_where_filling_node_by_node_would() -> None:
    nodes = [view(1, {**cpus(4), **GPU}), view(2, cpus(4))]
    demand = group_demand([cpus(2), cpus(2), {**cpus(4), **GPU}], PACK)
    assert placed(demand, nodes) == [2, 2, 1]


def test_spread_takes_one_node_after_the_other_and_then_begins_again() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4), cpus(3)), view(3, cpus(4))]
    assert placed(group_demand([cpus(1)] * 3, SPREAD), nodes) == [1, 3, 2]
    assert Counter(placed(group_demand([cpus(1)] * 7, SPREAD), nodes) or []) == {1: 3, 2: 2, 3: 2}
    assert placed(group_demand([cpus(1)] * 12, SPREAD), nodes) is None


def test_strict_pack_needs_one_node_for_all() -> None:
    nodes = [view(1, cpus(8), cpus(5)), view(2, cpus(8)), view(3, cpus(2))]
    assert placed(group_demand([cpus(2), cpus(3)], STRICT_PACK), nodes) == [1, 1], "the fullest that has room"
    assert placed(group_demand([cpus(4), cpus(4)], STRICT_PACK), nodes) == [2, 2]
    assert placed(group_demand([cpus(4), cpus(5)], STRICT_PACK), nodes) is None


def test_strict_pack_takes_its_soft_target_if_that_has_room() -> None:
    nodes = [view(1, cpus(8), cpus(5)), view(2, cpus(8)), view(3, cpus(2))]
    assert placed(group_demand([cpus(2)], STRICT_PACK, target=2), nodes) == [2]
    assert placed(group_demand([cpus(3)], STRICT_PACK, target=3), nodes) == [1]
    assert placed(group_demand([cpus(3)], STRICT_PACK, target=9), nodes) == [1]


def test_strict_spread_needs_a_node_for_each() -> None:
    nodes = [view(1, cpus(8)), view(2, cpus(8), cpus(4)), view(3, cpus(1))]
    assert placed(group_demand([cpus(1)] * 2, STRICT_SPREAD), nodes) == [1, 3], "the emptiest"
    assert sorted(placed(group_demand([cpus(1)] * 3, STRICT_SPREAD), nodes) or []) == [1, 2, 3]
    assert placed(group_demand([cpus(1)] * 4, STRICT_SPREAD), nodes) is None
    assert placed(group_demand([cpus(2)] * 3, STRICT_SPREAD), nodes) is None


def test_strict_spread_moves_bundles_where_another_has_no_other_node() -> None:
    nodes = [
        view(1, cpus(4), labels={"zone": "a"}),
        view(2, {**cpus(4), **GPU}, labels={"zone": "b"}),
        view(3, cpus(4), cpus(3), labels={"zone": "a"}),
    ]
    demand = group_demand([cpus(1), GPU, cpus(4)], STRICT_SPREAD, selectors=[in_zone("a"), (), ()])
    assert placed(demand, nodes) == [3, 2, 1]


def test_bundles_that_have_a_place_keep_it_and_the_others_go_by_it() -> None:
    nodes = [view(number, cpus(4)) for number in (1, 2, 3)]
    assert place(group_demand([cpus(1)] * 2, STRICT_SPREAD, there=[1, None]), nodes, 0.0) == {1: node_id(2)}
    assert place(group_demand([cpus(1)] * 2, PACK, there=[None, 3]), nodes, 0.0) == {0: node_id(3)}
    assert place(group_demand([cpus(1)] * 2, SPREAD, there=[1, None]), nodes, 0.0) == {1: node_id(2)}
    assert place(group_demand([cpus(1)] * 2, STRICT_PACK, there=[None, 2]), nodes, 0.0) == {0: node_id(2)}


def test_each_bundle_goes_where_its_selector_allows() -> None:
    nodes = [view(1, cpus(4), labels={"zone": "a"}), view(2, cpus(4), labels={"zone": "b"})]
    for strategy in (PACK, SPREAD, STRICT_SPREAD):
        demand = group_demand([cpus(1)] * 2, strategy, selectors=[in_zone("b"), in_zone("a")])
        assert placed(demand, nodes) == [2, 1]
    apart = group_demand([cpus(1)] * 2, STRICT_PACK, selectors=[in_zone("b"), in_zone("a")])
    assert placed(apart, nodes) is None
    assert placed(group_demand([cpus(1)] * 2, STRICT_PACK, selectors=[in_zone("b")] * 2), nodes) == [2, 2]


@pytest.mark.parametrize("strategy", GroupStrategy)
def test_nodes_with_gpus_are_left_to_those_who_need_them(strategy: GroupStrategy) -> None:
    nodes = [view(1, {**cpus(8), **GPU}), view(2, cpus(2))]
    assert placed(group_demand([cpus(1)], strategy), nodes) == [2]
    assert placed(group_demand([cpus(4)], strategy), nodes) == [1]
    assert placed(group_demand([GPU], strategy), nodes) == [1]


@pytest.mark.parametrize("strategy", GroupStrategy)
def test_nodes_that_leave_or_are_to_be_avoided_are_not_asked(strategy: GroupStrategy) -> None:
    nodes = [view(1, cpus(4), draining=True), view(2, cpus(4)), view(3, cpus(4), cpus(1))]
    demand = group_demand([cpus(1)], strategy)
    nodes[1].avoid_until = 5.0
    assert placed(demand, nodes, 4.0) == [3]
    assert place(demand, nodes, 4.0, avoid={node_id(3): 4.5}) is None
    assert place(demand, nodes, 6.0, avoid={node_id(3): 6.5}) == {0: node_id(2)}


SHAPES: list[Resources] = [cpus(1), cpus(2), cpus(3), {**cpus(1), **GPU}, GPU]
ZONES = ["a", "b"]
NODES = st.lists(
    st.builds(
        lambda total, used, gpus, zone: (total, min(total, used), gpus, zone),
        st.integers(1, 5),
        st.integers(0, 5),
        st.integers(0, 2),
        st.sampled_from(ZONES),
    ),
    min_size=1,
    max_size=4,
)


def cluster(rows: list[tuple[int, int, int, str]]) -> list[NodeView]:
    nodes = []
    for number, (total, used, gpus, zone) in enumerate(rows, 1):
        also = {"GPU": gpus * 10_000} if gpus else {}
        nodes.append(view(number, {**cpus(total), **also}, {**cpus(total - used), **also}, labels={"zone": zone}))
    return nodes


def obeys(demand: GroupDemand, plan: Plan, nodes: Sequence[NodeView]) -> bool:
    """Tell whether a plan is what was asked for: written apart from how plans are made."""
    views = {node.node_id: node for node in nodes}
    about = demand.description
    used: dict[NodeId, Resources] = {}
    for index, node in plan.items():
        used[node] = add(used.get(node, {}), about.bundles[index])
        if about.selectors and not all_met(about.selectors[index], views[node].labels):
            return False
    everywhere = [plan.get(index, node) for index, node in enumerate(demand.nodes)]
    if about.strategy is STRICT_SPREAD and len(set(everywhere)) < len(everywhere):
        return False
    if about.strategy is STRICT_PACK and len(set(everywhere)) > 1:
        return False
    return all(fits(resources, views[node].free) for node, resources in used.items())


@given(
    NODES,
    st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from([None, *ZONES])), min_size=1, max_size=4),
    st.sampled_from(GroupStrategy),
)
def test_a_plan_is_what_was_asked_for_and_a_strict_one_is_found_if_there_is_one(
    rows: list[tuple[int, int, int, str]], bundles: list[tuple[Resources, str | None]], strategy: GroupStrategy
) -> None:
    nodes = cluster(rows)
    selectors = [in_zone(zone) if zone else () for _, zone in bundles]
    demand = group_demand([resources for resources, _ in bundles], strategy, selectors=selectors)
    before = [dict(node.free) for node in nodes]
    plan = place(demand, nodes, 0.0)
    assert [node.free for node in nodes] == before, "planning changes nothing"
    if plan is not None:
        assert sorted(plan) == list(range(len(bundles)))
        assert obeys(demand, plan, nodes)
        assert is_feasible(demand, nodes)
    elif strategy in (STRICT_PACK, STRICT_SPREAD):
        for choice in itertools.product(nodes, repeat=len(bundles)):
            assert not obeys(demand, {index: node.node_id for index, node in enumerate(choice)}, nodes)


@pytest.mark.parametrize(
    ("demand", "says"),
    [
        (group_demand([cpus(1), cpus(9)], PACK), "no node can ever hold bundle 1 (CPU 9); the nearest, node"),
        (
            group_demand([cpus(1)], PACK, selectors=[in_zone("c")]),
            "no node can ever hold bundle 0 (CPU 1): none meets its label selector (zone=c)",
        ),
        (
            group_demand([cpus(3), cpus(3)], STRICT_PACK),
            "no node can ever hold 2 bundles (STRICT_PACK) together (CPU 6)",
        ),
        (
            group_demand([cpus(1)] * 3, STRICT_SPREAD),
            "3 bundles (STRICT_SPREAD) need a node each, and there are 2 that could hold one",
        ),
        (group_demand([cpus(3)] * 3, SPREAD), "all nodes together can never hold 3 bundles (SPREAD) (CPU 9)"),
        (
            group_demand([cpus(3)] * 2, SPREAD),
            "waits until there is room for 2 bundles (SPREAD) at once (CPU: 3 of 8 in use)",
        ),
        (
            group_demand([cpus(4)] * 2, SPREAD, there=[1, None]),
            "waits until there is room for 1 of its 2 bundles (SPREAD) at once (CPU: 3 of 8 in use)",
        ),
        (group_demand([cpus(1)], SPREAD), "it fits; its nodes are being asked"),
    ],
)
def test_why_a_group_waits_is_said_in_words(demand: GroupDemand, says: str) -> None:
    nodes = [view(1, cpus(4), cpus(2), labels={"zone": "a"}), view(2, cpus(4), cpus(3), labels={"zone": "b"})]
    assert says in explain(demand, nodes)
    assert is_feasible(demand, nodes) == (place(demand, nodes, 0.0, free_at_best) is not None)
    assert explain(demand, []) == "no node is alive"
