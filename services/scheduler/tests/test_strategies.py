"""What each strategy promises, over snapshots of nodes with labels."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.tests.builders import among, view
from services.scheduler.tests.simulation import cpus
from shoal_core.protocol.ids import NodeId, PlacementGroupId
from shoal_core.protocol.placement import (
    DEFAULT,
    SPREAD,
    Bundle,
    Condition,
    Conditions,
    NodeAffinity,
    NodeLabels,
    Operator,
    Selected,
    Strategy,
    all_met,
)
from shoal_core.protocol.resources import Resources, fits
from shoal_core.testing.builders import node_id
from shoal_scheduler.policy import NodeView, explain, is_feasible


def place(
    resources: Resources,
    strategy: Strategy,
    nodes: list[NodeView],
    near: Mapping[NodeId, int] | None = None,
    avoid: Mapping[NodeId, float] | None = None,
) -> str | None:
    node = among(nodes, resources, strategy).choose(0.0, near=near or {}, avoid=avoid or {})
    return None if node is None else node.node_id


def has(label: str, *values: str) -> Condition:
    return Condition(label, Operator.IN, values)


def zones(*which: str, free: float = 4) -> list[NodeView]:
    return [view(number, cpus(4), cpus(free), labels={"zone": zone}) for number, zone in enumerate(which, 1)]


# ------------------------------------------------------------------------------- affinity


def test_a_hard_affinity_waits_for_its_node_and_takes_no_other() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4), cpus(0.5))]
    hard = NodeAffinity(node_id(2), soft=False)
    assert place(cpus(0.5), hard, nodes) == node_id(2)
    assert place(cpus(1), hard, nodes) is None
    assert is_feasible(cpus(1), hard, nodes)
    assert not is_feasible(cpus(5), hard, nodes)
    assert not is_feasible(cpus(1), NodeAffinity(node_id(3), soft=False), nodes)
    assert explain(cpus(1), NodeAffinity(node_id(3), soft=False), nodes) == (
        f"it wants node {node_id(3)}, which is not in the cluster or is about to leave"
    )


def test_a_soft_affinity_waits_while_its_node_lives_and_goes_elsewhere_when_it_does_not() -> None:
    soft, spilling = NodeAffinity(node_id(2), soft=True), NodeAffinity(node_id(2), soft=True, spill=True)
    busy = [view(1, cpus(4)), view(2, cpus(4), {})]
    assert place(cpus(1), soft, busy) is None
    assert place(cpus(1), spilling, busy) == node_id(1)
    for gone in ([view(1, cpus(4))], [view(1, cpus(4)), view(2, cpus(4), draining=True)]):
        assert place(cpus(1), soft, gone) == node_id(1)
    too_small = [view(1, cpus(8)), view(2, cpus(4))]
    assert place(cpus(5), soft, too_small) == node_id(1)


def test_a_node_that_refused_is_no_reason_to_break_an_affinity() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4))]
    assert place(cpus(1), NodeAffinity(node_id(2), soft=True), nodes, avoid={node_id(2): 1.0}) is None
    assert place(cpus(1), DEFAULT, nodes, avoid={node_id(1): 1.0}) == node_id(2)


# ------------------------------------------------------------------------------- labels


def test_hard_labels_must_be_met_and_soft_ones_are_preferred_while_there_is_room() -> None:
    nodes = zones("a", "b", "c")
    strategy = NodeLabels(hard=(has("zone", "b", "c"),), soft=(has("zone", "c"),))
    assert place(cpus(1), strategy, nodes) == node_id(3)
    nodes[2].free = {}
    assert place(cpus(1), strategy, nodes) == node_id(2)
    nodes[1].free = {}
    assert place(cpus(1), strategy, nodes) is None
    assert place(cpus(1), NodeLabels(soft=(has("zone", "x"),)), nodes) == node_id(1)


def test_selectors_are_tried_in_order() -> None:
    nodes = zones("a", "b", "c")
    strategy = Selected(((has("zone", "x"),), (has("zone", "b"),), ()))
    assert place(cpus(1), strategy, nodes) == node_id(2)
    nodes[1].free = {}
    assert place(cpus(1), strategy, nodes) == node_id(1)
    assert not is_feasible(cpus(1), Selected(((has("zone", "x"),),)), nodes)


def test_what_is_selected_is_packed_or_spread() -> None:
    nodes = [view(1, cpus(4), cpus(3), labels={"zone": "a"}), *zones("b", "a")[1:]]
    selector = ((has("zone", "a"),),)
    assert place(cpus(1), Selected(selector), nodes) == node_id(1)
    assert place(cpus(1), Selected(selector, spread=True), nodes) == node_id(2)


def test_the_reason_names_the_labels_and_the_nearest_node() -> None:
    assert explain(cpus(1), Selected(((has("zone", "x", "y"),), (has("disk", "ssd"),))), zones("a", "b")) == (
        "no node can ever run it: it wants zone in (x, y), or else disk=ssd; "
        f"the nearest, node {node_id(1)}, has zone=a"
    )
    missing = NodeLabels((Condition("a", Operator.EXISTS), Condition("b", Operator.DOES_NOT_EXIST)))
    assert explain(cpus(9), missing, [view(1, cpus(4))]) == (
        f"no node can ever run it: it wants a label a and no label b; the nearest, node {node_id(1)}, has no labels "
        "and lacks CPU 9 (it has 4)"
    )
    assert explain(cpus(9), Selected(((has("zone", "b"),),)), zones("a", "b")) == (
        f"no node can ever run it; the nearest, node {node_id(2)}, lacks CPU 9 (it has 4)"
    )
    assert explain(cpus(1), Selected(((has("zone", "b"),),)), zones("a", "b", free=0)) == (
        "waits for CPU on 1 node that could run it (CPU: 4 of 4 in use)"
    )


# ------------------------------------------------------------------------------- preferences


def test_tasks_go_where_their_large_arguments_lie_if_there_is_room() -> None:
    nodes = [view(1, cpus(4)), view(2, cpus(4), cpus(1)), view(3, cpus(4))]
    near = {node_id(3): 1 << 20, node_id(2): 1 << 30}
    assert place(cpus(1), DEFAULT, nodes) == node_id(1)
    assert place(cpus(1), DEFAULT, nodes, near) == node_id(2)
    assert place(cpus(2), DEFAULT, nodes, near) == node_id(3)
    assert place(cpus(2), DEFAULT, nodes, {node_id(9): 1}) == node_id(1)
    assert place(cpus(1), Selected(((),)), nodes, near) == node_id(2)


def test_nodes_with_gpus_are_left_to_those_who_need_them() -> None:
    with_gpu = {**cpus(4), "GPU": 10_000}
    nodes = [view(1, with_gpu), view(2, cpus(4), cpus(1))]
    assert place(cpus(1), DEFAULT, nodes) == node_id(2)
    assert place(cpus(2), DEFAULT, nodes) == node_id(1)
    assert place({**cpus(1), "GPU": 10_000}, DEFAULT, nodes) == node_id(1)
    assert place(cpus(1), SPREAD, nodes) == node_id(1)


def test_a_bundle_is_no_matter_of_single_nodes() -> None:
    assert place(cpus(1), Bundle(PlacementGroupId("group")), [view(1, cpus(4))]) is None


# ------------------------------------------------------------------------------- whatever the nodes are like

LABELS = st.dictionaries(st.sampled_from("ab"), st.sampled_from("xy"), max_size=2)
CONDITIONS = st.lists(
    st.builds(
        Condition,
        st.sampled_from("ab"),
        st.sampled_from(Operator),
        st.lists(st.sampled_from("xyz"), max_size=2).map(lambda values: tuple(values)),
    ),
    max_size=2,
).map(lambda conditions: tuple(conditions))
STRATEGIES: st.SearchStrategy[Strategy] = st.one_of(
    st.sampled_from([DEFAULT, SPREAD]),
    st.builds(NodeAffinity, st.integers(1, 6).map(node_id), st.booleans(), st.booleans()),
    st.builds(NodeLabels, CONDITIONS, CONDITIONS),
    st.builds(Selected, st.lists(CONDITIONS, min_size=1, max_size=3).map(lambda all_of: tuple(all_of)), st.booleans()),
)
UNITS = st.integers(0, 4).map(lambda count: count * 10_000)
NODES = st.lists(st.tuples(UNITS, UNITS, LABELS, st.booleans()), max_size=5)


def views(nodes: list[tuple[int, int, dict[str, str], bool]]) -> list[NodeView]:
    return [
        view(number, {"CPU": max(total, free)}, {"CPU": free}, draining=draining, labels=labels)
        for number, (total, free, labels, draining) in enumerate(nodes, 1)
    ]


def is_allowed(strategy: Strategy, node: NodeView) -> bool:
    """Tell whether a node meets what is hard in a strategy."""
    alternatives: tuple[Conditions, ...] = ((),)
    if isinstance(strategy, NodeAffinity):
        return strategy.soft or node.node_id == strategy.node
    if isinstance(strategy, NodeLabels):
        alternatives = (strategy.hard,)
    elif isinstance(strategy, Selected):
        alternatives = strategy.selectors
    return any(all_met(conditions, node.labels) for conditions in alternatives)


@given(
    nodes=NODES, wanted=UNITS, strategy=STRATEGIES, near=st.dictionaries(st.integers(1, 6).map(node_id), st.integers(0))
)
def test_what_is_chosen_fits_and_is_allowed_and_is_the_same_in_any_order(
    nodes: list[tuple[int, int, dict[str, str], bool]], wanted: int, strategy: Strategy, near: dict[NodeId, int]
) -> None:
    resources = {"CPU": wanted} if wanted else {}
    seen = views(nodes)
    chosen = place(resources, strategy, seen, near)
    assert chosen == place(resources, strategy, list(reversed(seen)), near)
    possible = [node for node in seen if not node.draining and is_allowed(strategy, node)]
    assert is_feasible(resources, strategy, seen) == any(fits(resources, node.total) for node in possible)
    having_room = {node.node_id for node in possible if fits(resources, node.free)}
    if chosen is not None:
        assert chosen in having_room
    elif having_room:
        assert isinstance(strategy, NodeAffinity), "only who waits for one node passes by a room"
        assert strategy.soft
        assert is_feasible(resources, NodeAffinity(strategy.node, soft=False), seen)
    assert explain(resources, strategy, seen)


@given(nodes=NODES, strategy=STRATEGIES, wanted=st.lists(UNITS, max_size=12))
def test_whatever_is_placed_no_node_is_over_committed(
    nodes: list[tuple[int, int, dict[str, str], bool]], strategy: Strategy, wanted: list[int]
) -> None:
    seen = views(nodes)
    by_id = {node.node_id: node for node in seen}
    for units in wanted:
        resources = {"CPU": units} if units else {}
        chosen = place(resources, strategy, seen)
        if chosen is not None:
            by_id[NodeId(chosen)].take(resources)
    assert all(node.free["CPU"] >= 0 for node in seen)


@given(nodes=NODES, strategy=STRATEGIES, wanted=UNITS)
def test_room_is_kept_only_where_it_may_be_used(
    nodes: list[tuple[int, int, dict[str, str], bool]], strategy: Strategy, wanted: int
) -> None:
    resources = {"CPU": wanted} if wanted else {}
    near = among(views(nodes), resources, strategy).nearest()
    if near is not None:
        assert is_allowed(strategy, near)
        assert not near.draining
        assert fits(resources, near.total)


@pytest.mark.parametrize("strategy", [DEFAULT, SPREAD])
def test_a_tie_breaks_by_id(strategy: Strategy) -> None:
    nodes = zones("a", "a", "a")
    orders = (nodes, nodes[::-1], nodes[1:] + nodes[:1])
    assert {place(cpus(1), strategy, order) for order in orders} == {node_id(1)}
