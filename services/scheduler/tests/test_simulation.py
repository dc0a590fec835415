"""Schedulers, nodes and owners together: what must come true however the network behaves (see ``simulation``).

That no node promises more than it has is checked in the model at every grant.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduler.tests.builders import group_demand
from services.scheduler.tests.simulation import ENDLESS, Network, OwnerModel, Queue, World, cpus
from shoal_core.protocol.groups import GroupState, GroupStrategy
from shoal_core.protocol.ids import PlacementGroupId, ProcessId, SlotId
from shoal_core.protocol.placement import (
    DEFAULT,
    SPREAD,
    Condition,
    NodeAffinity,
    NodeLabels,
    Operator,
    Selected,
    Strategy,
)
from shoal_core.protocol.scheduling import LeaseRequest
from shoal_core.testing.builders import node_id
from shoal_scheduler.core import NOTICE_SECONDS, SETTLE_SECONDS
from shoal_scheduler.fairness import KEEP_SECONDS
from shoal_scheduler.waiting import PATIENCE_SECONDS

BAD = Network(loss=0.2, duplication=0.2, longest_delay=0.5)
GOOD = Network()


@dataclass
class Work:
    """What one owner has to do under one key."""

    cpus: float
    tasks: int
    seconds: float
    depth: int
    strategy: Strategy


STRATEGIES: list[Strategy] = [
    DEFAULT,
    SPREAD,
    NodeAffinity(node_id(1), soft=True),
    NodeLabels(soft=(Condition("zone", Operator.IN, ("a",)),)),
    Selected(((Condition("zone", Operator.EXISTS),), ()), spread=True),
]
WORK = st.builds(
    Work,
    cpus=st.sampled_from([0, 0.5, 1, 2, 4]),
    tasks=st.integers(1, 12),
    seconds=st.sampled_from([0.01, 0.3, 1.5]),
    depth=st.integers(0, 2),
    strategy=st.sampled_from(STRATEGIES),
)
TROUBLE = st.lists(st.sampled_from(["kill scheduler", "start scheduler", "kill node", "nothing"]), max_size=5)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    replicas=st.integers(1, 3),
    owners=st.lists(st.lists(WORK, min_size=1, max_size=2), min_size=1, max_size=4),
    trouble=TROUBLE,
)
def test_all_work_is_done_and_nothing_is_left_once_faults_stop(
    seed: int, replicas: int, owners: list[list[Work]], trouble: list[str]
) -> None:
    world = World(seed, replicas)
    for _ in range(2):
        world.add_node(cpus(4))
    for works in owners:
        world.add_owner(
            *(
                Queue(key, cpus(work.cpus), work.tasks, work.seconds, work.depth, work.strategy)
                for key, work in enumerate(works)
            )
        )
    world.network = BAD
    for event in trouble:
        world.run(world.random.uniform(0.0, 2.0))
        if event == "kill scheduler" and len(world.replicas) > 1:
            world.kill(world.random.choice(world.replicas))
        elif event == "start scheduler":
            world.start()
        elif event == "kill node" and world.nodes[1].alive:
            world.kill_node(world.nodes[1])
            world.add_node(cpus(4))
    world.run(3.0)
    world.network = GOOD
    assert world.run_until(world.is_quiet, 400.0), [replica.pending() for replica in world.replicas]


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("network", [GOOD, Network(loss=0.1, duplication=0.1, longest_delay=0.1)])
def test_large_demand_is_met_beside_an_endless_stream_of_small(replicas: int, network: Network) -> None:
    world = World(1, replicas)
    world.network = network
    world.add_node(cpus(4))
    for _ in range(3):
        world.add_owner(Queue(0, cpus(1), ENDLESS, 0.2))
    world.run(5.0)
    large = Queue(0, cpus(4), 3, 0.5)
    owner = world.add_owner(large)
    assert world.run_until(lambda: owner.unfinished == 0, KEEP_SECONDS)


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize(("cpu_count", "owner_count"), [(4, 2), (5, 2), (8, 3), (2, 3)])
def test_owners_with_endless_demand_end_up_within_one_lease_of_each_other(
    replicas: int, cpu_count: int, owner_count: int
) -> None:
    world = World(2, replicas)
    world.add_node(cpus(cpu_count))
    first = world.add_owner(Queue(0, cpus(1), ENDLESS, 0.05))
    world.run(3.0)
    assert first.leases == cpu_count, "whoever is alone has everything"
    owners = [first, *(world.add_owner(Queue(0, cpus(1), ENDLESS, 0.05)) for _ in range(owner_count - 1))]
    world.run(10.0)
    held: Counter[OwnerModel] = Counter()
    for _ in range(500):
        world.run(0.02)
        for owner in owners:
            held[owner] += owner.leases
    means = [held[owner] / 500 for owner in owners]
    assert max(means) - min(means) <= 1.0, means
    if cpu_count >= owner_count:
        assert sum(means) >= 0.95 * cpu_count, "sharing wastes little"


def test_fair_shares_are_stable_once_they_are_reached() -> None:
    world = World(3)
    node = world.add_node(cpus(4))
    owners = [world.add_owner(Queue(0, cpus(1), ENDLESS, 0.05)) for _ in range(2)]
    world.run(10.0)
    before = list(node.leases)
    world.run(20.0)
    assert [owner.leases for owner in owners] == [2, 2]
    assert list(node.leases) == before, "nobody is asked for leases when all have their share"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_without_faults_no_slot_is_asked_for_by_two_replicas(replicas: int) -> None:
    askers: dict[tuple[ProcessId, SlotId], set[str]] = {}

    class Watched(World):
        def asked(self, request: LeaseRequest) -> None:
            for slot in request.slots:
                askers.setdefault((request.owner, slot), set()).add(request.scheduler)

    world = Watched(4, replicas)
    for _ in range(2):
        world.add_node(cpus(16))
    world.run(3.0)
    owners = [world.add_owner(*(Queue(key, cpus(1), 2, 0.3) for key in range(3))) for _ in range(5)]
    assert world.run_until(world.is_quiet, 30.0)
    assert len(askers) >= 30
    assert {len(names) for names in askers.values()} == {1}
    assert sum(owner.surplus for owner in owners) == 0


def test_replicas_share_the_demand() -> None:
    world = World(5, replicas=3)
    world.add_node(cpus(64))
    world.run(3.0)
    for _ in range(20):
        world.add_owner(Queue(0, cpus(1), 1, 0.3))
    world.run(2.0)
    assert all(replica.core.counts.decisions > 0 for replica in world.replicas)
    assert sum(replica.core.counts.decisions for replica in world.replicas) == 20


@pytest.mark.parametrize("replicas", [1, 3])
def test_infeasible_demand_is_told_once_and_waits(replicas: int) -> None:
    world = World(6, replicas)
    world.add_node(cpus(4))
    world.run(3.0)
    impossible = world.add_owner(
        Queue(0, cpus(5), 2, 0.1), Queue(1, {"GPU": 10_000}, 1, 0.1), Queue(2, cpus(1), 3, 0.1)
    )
    world.run(60.0)
    assert sorted((owner, notice.key) for _, owner, notice in world.notices) == [
        (impossible.owner, 0),
        (impossible.owner, 1),
    ]
    texts = {notice.key: notice.text for _, _, notice in world.notices}
    assert "2 task(s) of f0() wait" in texts[0]
    assert "CPU 5 (it has 4)" in texts[0]
    assert "GPU 1 (it has 0)" in texts[1]
    for replica in world.replicas:
        assert [row.feasible for row in replica.pending().pending] == [False, False]
    world.add_node({**cpus(8), "GPU": 10_000})
    assert world.run_until(world.is_quiet, 30.0), "once such a node joins, it runs"


def test_infeasible_demand_is_told_again_by_a_scheduler_that_takes_over() -> None:
    world = World(7, replicas=2)
    world.add_node(cpus(4))
    world.run(3.0)
    world.add_owner(Queue(0, cpus(5), 1, 0.1))
    world.run(10.0)
    ((first, _, _),) = world.notices
    world.kill(next(replica for replica in world.replicas if replica.identity == first))
    world.run(10.0)
    assert [teller == first for teller, _, _ in world.notices] == [True, False]


def test_nothing_is_told_while_nodes_may_still_be_unheard() -> None:
    world = World(8)
    world.add_owner(Queue(0, cpus(1), 1, 0.1))
    world.run(NOTICE_SECONDS + SETTLE_SECONDS)
    world.add_node(cpus(4))
    assert world.run_until(world.is_quiet, 10.0)
    assert world.notices == []


def test_demand_that_can_only_run_on_a_node_that_leaves_is_infeasible() -> None:
    world = World(9)
    world.add_node(cpus(4)).draining = True
    world.run(3.0)
    world.add_owner(Queue(0, cpus(1), 1, 0.1))
    world.run(10.0)
    ((_, _, notice),) = world.notices
    assert "all nodes are about to leave" in notice.text


def test_another_scheduler_helps_where_the_first_is_dead() -> None:
    for seed in range(6):
        world = World(seed, replicas=2)
        world.add_node(cpus(4))
        world.run(3.0)
        world.kill(world.replicas[seed % 2])
        owner = world.add_owner(Queue(0, cpus(1), 1, 0.1))
        assert world.run_until(lambda owner=owner: owner.unfinished == 0, 2.5)  # type: ignore[misc]


def test_work_of_a_node_that_died_goes_to_others_within_seconds() -> None:
    world = World(10)
    nodes = [world.add_node(cpus(2)) for _ in range(2)]
    owner = world.add_owner(Queue(0, cpus(1), 4, 1.0))
    assert world.run_until(lambda: owner.leases == 4, 5.0)
    world.kill_node(nodes[0])
    assert world.run_until(world.is_quiet, 15.0)


def test_deeper_demand_goes_first() -> None:
    world = World(11)
    world.add_node(cpus(1))
    world.run(2.0)
    shallow = Queue(0, cpus(1), 1, 0.5)
    deep = Queue(1, cpus(1), 1, 0.5, depth=3)
    world.add_owner(shallow, deep)
    assert world.run_until(world.is_quiet, 15.0)
    assert deep.first_lease_at is not None
    assert shallow.first_lease_at is not None
    assert deep.first_lease_at < shallow.first_lease_at


def test_demand_waits_no_longer_than_a_moment_for_leases_that_return() -> None:
    world = World(12)
    world.add_node(cpus(1))
    world.add_owner(Queue(0, cpus(1), ENDLESS, 0.05))
    world.run(3.0)
    late = world.add_owner(Queue(0, cpus(1), 1, 0.05))
    assert world.run_until(lambda: late.unfinished == 0, PATIENCE_SECONDS)


def test_what_an_owner_stated_last_is_forgotten_when_its_withdrawal_was_lost() -> None:
    world = World(13)
    world.add_node(cpus(4))
    world.run(2.0)
    owner = world.add_owner(Queue(0, cpus(8), 1, 0.1))
    world.run(3.0)
    assert len(world.replicas[0].core.demand) == 1
    world.network = Network(loss=1.0)
    owner.queues[0].waiting = 0
    world.run(1.5)
    world.network = GOOD
    assert len(world.replicas[0].core.demand) == 1
    assert world.run_until(world.is_quiet, 12.0)
    assert world.replicas[0].core.demand.known() == []


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("network", [GOOD, Network(loss=0.1, duplication=0.1, longest_delay=0.05)])
def test_an_endless_stream_of_small_tasks_does_not_starve_groups_nor_these_the_tasks(
    replicas: int, network: Network
) -> None:
    world = World(5, replicas)
    world.network = network
    for _ in range(3):
        world.add_node(cpus(4))
    owners = [world.add_owner(Queue(0, cpus(1), ENDLESS, 0.3)) for _ in range(3)]
    world.run(3.0)
    strategies = (GroupStrategy.STRICT_SPREAD, GroupStrategy.STRICT_PACK, GroupStrategy.PACK)
    bundles = ([cpus(4)] * 3, [cpus(2)] * 2, [cpus(4)] * 2)
    for number, (strategy, wanted) in enumerate(zip(strategies, bundles, strict=True), 1):
        group = world.add_group(group_demand(wanted, strategy, number=number))
        assert world.run_until(lambda group=group: world.groups[group].state is GroupState.CREATED, 30.0)  # type: ignore[misc]
        world.run(1.0)
        world.remove_group(group)
        assert world.run_until(lambda: all(owner.leases >= 2 for owner in owners), 10.0)
    world.run(5.0)
    assert not any(node.table.reserved() for node in world.nodes)
    assert not any(len(replica.core.groups) for replica in world.replicas)


def test_an_endless_stream_of_groups_does_not_starve_a_large_task() -> None:
    world = World(5, 2)
    world.add_node(cpus(4))
    numbers = itertools.count(1)

    def another() -> None:
        group = world.add_group(group_demand([cpus(2)], number=next(numbers)))
        world.after(0.7, lambda: finish(group))

    def finish(group: PlacementGroupId) -> None:
        if world.groups[group].state is GroupState.CREATED:
            world.remove_group(group)
            another()
        else:
            world.after(0.1, lambda: finish(group))

    another()
    world.after(0.3, another)
    world.run(3.0)
    owner = world.add_owner(Queue(0, cpus(4), 1, 0.1))
    assert world.run_until(lambda: not owner.unfinished, 15.0)
    count = next(numbers)
    world.run(10.0)
    assert next(numbers) > count + 10, "and the groups go on"
