"""Placement groups among the real cores of all services: whatever is lost and whoever dies, never half a gang."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal_core.protocol.groups import CreateGroup, GroupState, GroupStrategy
from shoal_core.protocol.ids import PlacementGroupId
from tests.gang_world import World

PACK, SPREAD = GroupStrategy.PACK, GroupStrategy.SPREAD
STRICT_PACK, STRICT_SPREAD = GroupStrategy.STRICT_PACK, GroupStrategy.STRICT_SPREAD
SETTLE_SECONDS = 60.0


def all_are(world: World, groups: Sequence[PlacementGroupId], state: GroupState) -> bool:
    return all(world.state(group) is state for group in groups)


def is_quiet(world: World) -> bool:
    """Tell whether nothing is reserved, and no scheduler has anything to do."""
    return not world.reserved() and not any(len(scheduler.core.groups) for scheduler in world.schedulers)


def settle(world: World, groups: Sequence[PlacementGroupId]) -> None:
    """Let the network be good again and everyone alive; then all groups find their places, end, and leave nothing."""
    world.network.loss = world.network.duplication = 0.0
    world.network.longest_delay = 0.003
    while len(world.stores) < 2:
        world.start_store()
    while len(world.schedulers) < 2:
        world.start_scheduler()
    for _ in range(2):
        world.start_node(100)  # room for all, wherever they are packed
    living = [group for group in groups if group not in world.unwanted]
    done = world.run_until(lambda: all_are(world, living, GroupState.CREATED), SETTLE_SECONDS)
    assert done, {group: world.state(group) for group in living}
    world.run(8.0)
    assert all_are(world, living, GroupState.CREATED), "and stay there"
    for group in living:
        world.remove(group)
    assert world.run_until(lambda: all_are(world, groups, GroupState.REMOVED) and is_quiet(world), SETTLE_SECONDS)
    for node in world.living_nodes():
        assert node.core.leases.free == node.core.leases.total, "nothing stays reserved"


GROUPS = st.tuples(
    st.just("create"), st.sampled_from(GroupStrategy), st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=2)
)
STEPS = st.one_of(
    GROUPS,
    st.tuples(st.just("remove"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["kill store", "kill scheduler", "new store", "new scheduler", "new node"])),
    st.tuples(st.just("kill node"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["pause store", "pause scheduler"]), st.sampled_from([0.3, 2.0, 6.0])),
)


@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(STEPS, st.sampled_from([0.0, 0.002, 0.01, 0.3, 2.5, 7.0])), min_size=3, max_size=14),
    st.sampled_from([0.0, 0.1, 0.3]),
)
@settings(max_examples=40, deadline=None)
def test_never_half_a_gang_whatever_is_lost_and_whoever_dies(
    seed: int, steps: list[tuple[tuple[object, ...], float]], loss: float
) -> None:
    world = World(seed)
    world.network.loss, world.network.duplication, world.network.longest_delay = loss, loss, 0.02 if loss else 0.003
    groups: list[PlacementGroupId] = []
    for step, pause in steps:
        match step:
            case ("create", GroupStrategy() as strategy, list() as cpus):
                groups.append(world.create(strategy, cpus))
            case ("remove", int(which)) if groups:
                world.remove(groups[which % len(groups)])
            case ("kill store",) if len(world.stores) > 1:
                world.kill(world.stores[0])
            case ("pause store", float(seconds)):
                world.stores[0].paused_until = world.now + seconds
            case ("pause scheduler", float(seconds)) if world.schedulers:
                world.schedulers[0].paused_until = world.now + seconds
            case ("kill scheduler",) if world.schedulers:
                world.kill(world.schedulers[0])
            case ("new store",) if len(world.stores) < 3:
                world.start_store()
            case ("new scheduler",) if len(world.schedulers) < 3:
                world.start_scheduler()
            case ("new node",) if len(world.nodes) < 5:
                world.start_node(3)
            case ("kill node", int(which)) if world.living_nodes():
                world.kill(world.living_nodes()[which % len(world.living_nodes())])
        world.run(pause)
    settle(world, groups)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", [0.0, 0.1])
def test_gangs_that_want_the_same_nodes_all_have_their_turn(seed: int, loss: float) -> None:
    world = World(seed, schedulers=4, nodes=(4, 4, 4))
    world.network.loss = world.network.duplication = loss
    groups = [world.create(STRICT_SPREAD, [3, 3, 3]) for _ in range(6)]
    served: list[PlacementGroupId] = []
    while len(served) < len(groups):

        def next_ones() -> list[PlacementGroupId]:
            return [group for group in groups if group not in served and world.state(group) is GroupState.CREATED]

        assert world.run_until(lambda: bool(next_ones()), 30.0), "somebody always comes through"
        (one,) = next_ones()
        served.append(one)
        world.remove(one)
    assert world.run_until(lambda: is_quiet(world), SETTLE_SECONDS)


def test_a_scheduler_that_dies_in_the_middle_leaves_nothing_behind() -> None:
    world = World(7, schedulers=1)
    group = world.create(STRICT_SPREAD, [4, 4])
    assert world.run_until(lambda: world.reserved() == 1, 5.0)
    world.kill(world.schedulers[0])
    world.run(8.0)
    assert world.reserved() == 0, "a node in doubt has the attempt end"
    assert world.state(group) is GroupState.PENDING
    world.start_scheduler()
    assert world.run_until(lambda: world.state(group) is GroupState.CREATED, 5.0)


def test_the_bundles_of_a_dead_node_are_placed_again_and_the_others_stay() -> None:
    world = World(3, nodes=(4, 4, 4))
    group = world.create(STRICT_SPREAD, [3, 3])
    assert world.run_until(lambda: world.state(group) is GroupState.CREATED, 5.0)
    lost, stays = world.leader.groups[group].nodes
    assert lost is not None
    world.kill(world.nodes[lost])
    assert world.run_until(lambda: world.state(group) is GroupState.RESCHEDULING, 15.0)
    assert world.run_until(lambda: world.state(group) is GroupState.CREATED, 5.0)
    placed, still = world.leader.groups[group].nodes
    assert still == stays
    assert placed not in (lost, stays)


def test_a_replica_that_wakes_up_late_commits_nothing_that_nodes_have_given_back() -> None:
    world = World(5, schedulers=1)
    about, store = world.describe(STRICT_SPREAD, [4, 4]), world.stores[0]
    answers: list[object] = []
    store.request(CreateGroup(description=about, placed_first=True), answers.append)
    assert world.run_until(lambda: world.reserved() == 1, 5.0)
    store.paused_until = world.now + 10.0
    world.run(9.5)
    assert world.reserved() == 0, "nodes in doubt had the attempt end at another replica"
    assert world.leader.groups[about.group_id].is_blank
    assert not answers
    assert world.run_until(lambda: world.state(about.group_id) is GroupState.CREATED, 5.0)
    assert answers
    assert world.leader.groups[about.group_id].attempt > 1


def test_a_group_is_placed_although_the_replica_that_knew_of_it_has_died() -> None:
    world = World(6, schedulers=1)
    group = world.create(STRICT_SPREAD, [4, 4])
    assert world.run_until(lambda: world.reserved() == 1, 5.0)
    (store,) = [store for store in world.stores if store.core.state.unwritten]
    world.kill(store)
    assert world.run_until(lambda: world.state(group) is GroupState.CREATED, 5.0)
