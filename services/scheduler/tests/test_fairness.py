"""Whose turn it is, and who should give back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from services.scheduler.tests.builders import summary, view, waiting
from services.scheduler.tests.simulation import cpus
from shoal_core.protocol.resources import fits
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.demand import Wanted
from shoal_scheduler.fairness import (
    KEEP_SECONDS,
    PATIENCE_SECONDS,
    Holdings,
    Placement,
    Unmet,
    Victim,
    find_victim,
    holdings,
    plan,
)
from shoal_scheduler.policy import NodeView, able

SOON = PATIENCE_SECONDS - 0.1
LATE = PATIENCE_SECONDS + 0.1


def planned(
    demand: Sequence[Wanted], nodes: list[NodeView], held: Holdings | None = None, now: float = SOON
) -> tuple[list[Placement], list[Unmet]]:
    open_slots = [(wanted, list(wanted.open)) for wanted in demand]
    return plan(open_slots, nodes, Counter() if held is None else held, now)


def placed(placements: list[Placement]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for placement in placements:
        counts[placement.wanted.owner] += len(placement.slots)
    return dict(counts)


def test_slots_are_dealt_to_whoever_holds_fewest() -> None:
    held = Counter({process_id(1, 0): 3})
    one, two = waiting(1, range(10)), waiting(2, range(10))
    placements, unmet = planned([one, two], [view(1, cpus(7))], held)
    assert placed(placements) == {one.owner: 2, two.owner: 5}
    assert held == {one.owner: 5, two.owner: 5}
    assert {each.wanted.owner for each in unmet} == {one.owner, two.owner}


def test_deeper_demand_goes_before_an_equal_share() -> None:
    shallow, deep = waiting(1, range(3)), waiting(2, range(3), depth=1)
    placements, _ = planned([shallow, deep], [view(1, cpus(4))])
    assert placed(placements) == {shallow.owner: 1, deep.owner: 3}


def test_demand_that_waited_too_long_gets_one_slot_before_all_others() -> None:
    deep, patient, old = (
        waiting(1, range(9), served_at=1.0, depth=5),
        waiting(2, range(9), served_at=1.0),
        waiting(3, range(9)),
    )
    placements, _ = planned([deep, patient, old], [view(1, cpus(3))], now=LATE)
    assert placed(placements) == {deep.owner: 2, old.owner: 1}


def test_one_ask_carries_all_slots_of_a_demand_for_a_node() -> None:
    placements, unmet = planned([waiting(1, range(4))], [view(1, cpus(4))])
    assert [(placement.node.node_id, len(placement.slots)) for placement in placements] == [(node_id(1), 4)]
    assert unmet == []


def test_a_node_that_refused_this_demand_is_left_alone_by_it_only() -> None:
    one, two = waiting(1, [1]), waiting(2, [1])
    one.avoid[node_id(1)] = SOON + 1
    placements, unmet = planned([one, two], [view(1, cpus(4))])
    assert placed(placements) == {two.owner: 1}
    assert [each.wanted for each in unmet] == [one]


def test_room_is_kept_for_large_demand_that_waited_too_long() -> None:
    large, small = waiting(1, [1], cpus(4)), waiting(2, range(9), served_at=1.0)
    node = view(1, cpus(4), cpus(2))
    placements, unmet = planned([large, small], [node], now=LATE)
    assert placed(placements) == {}
    assert [each.kept for each in unmet if each.wanted is large] == [node]
    assert node.free == cpus(2), "what was kept is only counted during the round"


def test_room_is_kept_on_one_node_and_every_other_period_only() -> None:
    large, small = waiting(1, [1], cpus(4)), waiting(2, range(9), served_at=KEEP_SECONDS)
    nodes = [view(1, cpus(4), cpus(2)), view(2, cpus(4), cpus(1))]
    placements, _ = planned([large, small], nodes, now=LATE)
    assert [placement.node for placement in placements] == [nodes[1]]
    nodes = [view(1, cpus(4), cpus(2)), view(2, cpus(4), cpus(1))]
    placements, _ = planned([large, small], nodes, now=LATE + KEEP_SECONDS)
    assert placed(placements) == {small.owner: 3}


def test_kept_room_is_open_to_deeper_demand() -> None:
    large, deep = waiting(1, [1], cpus(4)), waiting(2, [1], served_at=1.0, depth=1)
    placements, _ = planned([large, deep], [view(1, cpus(4), cpus(2))], now=LATE)
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
    placements, unmet = planned(all_wanted, nodes, now=40.0)
    used: Counter[str] = Counter()
    slots: Counter[tuple[str, int]] = Counter()
    for placement in placements:
        used[placement.node.node_id] += placement.wanted.entry.resources["CPU"] * len(placement.slots)
        slots.update((placement.wanted.owner, slot) for slot in placement.slots)
    for node in nodes:
        assert node.free.get("CPU", 0) == node.total["CPU"] - used[node.node_id] >= 0
    assert all(count == 1 for count in slots.values())
    left = {wanted.owner for wanted in all_wanted if len(wanted.open) > placed(placements).get(wanted.owner, 0)}
    assert {each.wanted.owner for each in unmet} == left
    if not any(each.kept for each in unmet):
        assert not any(fits(each.wanted.entry.resources, node.free) for each in unmet for node in nodes)


# ------------------------------------------------------------------------------------ victims


def victim(wanted: Wanted, node: NodeView, rivals: int, *, kept: bool = False) -> Victim | None:
    groups = able(wanted.entry.resources, wanted.entry.strategy, [node])
    return find_victim(Unmet(wanted, node if kept else None), groups, holdings([node]), rivals, SOON)


def test_blocked_leases_do_not_count_as_held() -> None:
    nodes = [
        view(1, cpus(4), leases=[summary(1, 3, blocked=2)]),
        view(2, cpus(4), leases=[summary(1, 1), summary(2, 1)]),
    ]
    assert holdings(nodes) == {process_id(1, 0): 2, process_id(2, 0): 1}


def test_who_holds_most_beyond_an_equal_share_is_asked() -> None:
    node = view(1, cpus(6), {}, leases=[summary(1, 2), summary(2, 4)])
    found = victim(waiting(3, [1]), node, 3)
    assert found is not None
    assert found.lease.owner == process_id(2, 0)


def test_nobody_is_asked_by_an_owner_with_its_share() -> None:
    node = view(1, cpus(4), {}, leases=[summary(1, 2), summary(2, 2)])
    assert victim(waiting(1, [9]), node, 2) is None
    node = view(1, cpus(5), {}, leases=[summary(1, 2), summary(2, 3)])
    assert victim(waiting(1, [9]), node, 2) is None, "a lease that is over cannot be shared"


def test_an_owner_with_no_more_than_its_share_is_asked_only_for_one_that_has_nothing() -> None:
    node = view(1, cpus(6), {}, leases=[summary(1, 1), summary(2, 2), summary(3, 2)])
    assert victim(waiting(1, [9]), node, 2) is None
    node = view(1, cpus(6), {}, leases=[summary(1, 1), summary(2, 2), summary(3, 3)])
    found = victim(waiting(1, [9]), node, 3)
    assert found is not None
    assert found.lease.owner == process_id(3, 0)
    node = view(1, cpus(2), {}, leases=[summary(1, 1), summary(2, 1)])
    assert victim(waiting(3, [1]), node, 3) is not None


def test_leases_that_wait_or_are_asked_back_already_are_not_asked_for() -> None:
    assert victim(waiting(2, [1]), view(1, cpus(2), {}, leases=[summary(1, 2, recalled=2)]), 2) is None
    assert victim(waiting(2, [1]), view(1, cpus(2), {}, leases=[summary(1, 2, blocked=1, recalled=1)]), 2) is None
    assert victim(waiting(2, [1]), view(1, cpus(2), {}, leases=[summary(1, 2, recalled=1)]), 2) is not None


def test_a_lease_is_asked_for_only_where_its_return_helps() -> None:
    node = view(1, cpus(4), {}, leases=[summary(1, 4)])
    assert victim(waiting(2, [1], cpus(2)), node, 2) is None, "one lease is not room enough"
    assert victim(waiting(2, [1], cpus(2)), node, 2, kept=True) is not None, "but where room is kept, it is a beginning"
    assert victim(waiting(2, [1], {"GPU": 10_000}), node, 2, kept=True) is None
    assert victim(waiting(2, [1]), view(1, cpus(4), cpus(1), leases=[summary(1, 3)]), 2) is None, "there is room"
    assert victim(waiting(2, [1]), view(1, cpus(4), {}, draining=True, leases=[summary(1, 4)]), 2) is None
