"""What jobs get beside each other: weights, priorities, quotas, and how long anybody waits (see ``simulation``)."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.scheduler.tests.simulation import ENDLESS, OwnerModel, Queue, World, cpus, longest_wait
from shoal_core.protocol.ids import JobId
from shoal_core.protocol.messages import JobTerms
from shoal_core.protocol.scheduling import LeaseRequest


def mean_leases(world: World, owners: list[OwnerModel], seconds: float = 10.0) -> list[float]:
    """Return how many leases each owner holds on average."""
    held: Counter[OwnerModel] = Counter()
    steps = round(seconds / 0.05)
    for _ in range(steps):
        world.run(0.05)
        for owner in owners:
            held[owner] += owner.leases
    return [held[owner] / steps for owner in owners]


def endless(world: World, terms: JobTerms, cpu_count: float = 1, seconds: float = 0.2, job: int = 0) -> OwnerModel:
    return world.add_owner(Queue(0, cpus(cpu_count), ENDLESS, seconds), terms=terms, job=job)


@pytest.mark.parametrize("replicas", [1, 4])
def test_jobs_share_by_their_weights_whoever_came_first(replicas: int) -> None:
    world = World(1, replicas)
    for _ in range(2):
        world.add_node(cpus(4))
    light = endless(world, JobTerms(weight=1))
    world.run(5.0)
    heavy = endless(world, JobTerms(weight=3))
    world.run(10.0)
    low, high = mean_leases(world, [light, heavy])
    assert abs(low - 2) <= 0.6
    assert abs(high - 6) <= 0.9


@pytest.mark.parametrize("replicas", [1, 4])
def test_owners_of_one_job_share_what_their_job_has(replicas: int) -> None:
    world = World(2, replicas)
    world.add_node(cpus(8))
    one, two, other = (endless(world, JobTerms(), job=job) for job in (1, 1, 2))
    world.run(10.0)
    first, second, alone = mean_leases(world, [one, two, other])
    assert abs(alone - 4) <= 0.9, "a job gets no more by having two owners"
    assert abs(first - second) <= 1.0


@pytest.mark.parametrize("replicas", [1, 4])
def test_a_higher_priority_goes_first_and_the_lower_does_not_starve(replicas: int) -> None:
    world = World(3, replicas)
    world.add_node(cpus(4))
    low = endless(world, JobTerms())
    world.run(3.0)
    high = endless(world, JobTerms(priority=1))
    world.run(5.0)
    left, got = mean_leases(world, [low, high], 20.0)
    assert got >= 3.5
    assert 0 < left <= 0.5


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    replicas=st.integers(1, 4),
    quota=st.sampled_from([0.5, 1, 2, 3]),
    shapes=st.lists(st.sampled_from([0.5, 1, 2]), min_size=1, max_size=3),
)
def test_a_job_never_holds_more_than_its_quota_and_uses_all_of_it(
    seed: int, replicas: int, quota: float, shapes: list[float]
) -> None:
    held: Counter[JobId] = Counter()

    class Watched(World):
        def asked(self, request: LeaseRequest) -> None:
            held[request.job_id] = sum(
                lease.at_node.resources["CPU"] for node in self.nodes for lease in node.leases.values()
            )
            assert held[request.job_id] <= quota * 10_000

    world = Watched(seed, replicas)
    for _ in range(2):
        world.add_node(cpus(4))
    world.run(3.0)
    terms = JobTerms(quotas=cpus(quota))
    for shape in shapes:
        world.add_owner(Queue(0, cpus(shape), 6, 0.1), job=1, terms=terms)
    feasible = [owner for owner, shape in zip(world.owners.values(), shapes, strict=True) if shape <= quota]
    assert world.run_until(lambda: not any(owner.unfinished for owner in feasible), 60.0)
    assert all(owner.unfinished == 6 for owner in world.owners.values() if owner not in feasible)


# ------------------------------------------------------------------------------- how long anybody waits


class Timed(World):
    """A world that notes how long owners had no lease while they waited."""

    def __init__(self, seed: int, replicas: int) -> None:
        super().__init__(seed, replicas)
        self.idle_since: dict[OwnerModel, float] = {}
        self.longest = 0.0
        self._look()

    def _look(self) -> None:
        for owner in self.owners.values():
            if owner.leases or not owner.unfinished:
                self.idle_since.pop(owner, None)
            else:
                self.longest = max(self.longest, self.now - self.idle_since.setdefault(owner, self.now))
        self.after(0.1, self._look)


RIVALS = st.lists(
    st.tuples(st.sampled_from([0.5, 1, 2, 4]), st.integers(-1, 1), st.sampled_from([0.5, 1, 4])), min_size=1, max_size=4
)


@settings(max_examples=12, deadline=None)
@example(seed=1, most_seconds=4.0, rivals=[(1, 1, 4), (0.5, 1, 4), (2, 0, 1)])
@example(seed=22445127, most_seconds=0.2, rivals=[(0.5, 0, 0.5), (0.5, -1, 1), (0.5, -1, 1)])
@given(seed=st.integers(0, 2**32), most_seconds=st.sampled_from([0.2, 1.0, 4.0]), rivals=RIVALS)
def test_with_eight_schedulers_nobody_waits_longer_than_the_stated_bound(
    seed: int, most_seconds: float, rivals: list[tuple[float, int, float]]
) -> None:
    world = Timed(seed, 8)
    for _ in range(2):
        world.add_node(cpus(4))
    world.run(3.0)
    for size, priority, weight in rivals:
        lengths = lambda: world.random.uniform(0.3, 1.0) * most_seconds  # noqa: E731
        terms = JobTerms(priority=priority, weight=weight)
        world.add_owner(Queue(0, cpus(size), ENDLESS, lengths), terms=terms)
    world.run(2.0)
    last = world.add_owner(Queue(0, cpus(4), 2, most_seconds), terms=JobTerms(priority=-1))
    bound = longest_wait(most_seconds, len(rivals) + 1)
    assert world.run_until(lambda: last.unfinished == 0, 2 * (bound + most_seconds)), "a whole node, last in priority"
    world.run(5.0)
    assert world.longest <= bound
