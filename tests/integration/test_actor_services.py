"""Actors and placement groups while the services that make them are killed: none is lost, none is made twice."""

from __future__ import annotations

import os
from typing import Any

import pytest

import shoal
from shoal.util import list_named_actors, placement_group, placement_group_table, remove_placement_group
from shoal.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.integration.test_services import Stack, broker, joined, stack
from tests.integration.waiting import SECONDS, get, until

COUNT = 20

__all__ = ["broker", "joined", "stack"]  # fixtures


class CounterClass:
    """Counts, and knows where it runs."""

    def __init__(self, start: int) -> None:
        self.value = start

    def increment(self) -> int:
        self.value += 1
        return self.value

    def pid(self) -> int:
        return os.getpid()


Counter: Any = shoal.remote(CounterClass)


@pytest.mark.parametrize("service", ["gcs", "scheduler"])
def test_actors_are_created_while_every_replica_of_a_service_is_killed(joined: Stack, service: str) -> None:
    counters = [Counter.options(num_cpus=0).remote(i) for i in range(COUNT)]
    refs = [counter.increment.remote() for counter in counters]
    for one in joined.alive(service):
        one.kill()
    counters += [Counter.options(num_cpus=0).remote(i) for i in range(COUNT, 2 * COUNT)]
    refs += [counter.increment.remote() for counter in counters[COUNT:]]
    joined.make_whole()
    assert get(refs) == list(range(1, 2 * COUNT + 1))
    assert len(set(get([counter.pid.remote() for counter in counters]))) == 2 * COUNT
    assert get([counter.increment.remote() for counter in counters]) == list(range(2, 2 * COUNT + 2))


@pytest.mark.parametrize("service", ["gcs", "scheduler"])
def test_groups_are_made_and_removed_while_every_replica_of_a_service_is_killed(joined: Stack, service: str) -> None:
    until(lambda: shoal.available_resources().get("CPU") == 2, "nothing is leased")
    groups = [placement_group([{"CPU": 0.05}] * 2) for _ in range(COUNT)]
    for one in joined.alive(service):
        one.kill()
    groups += [placement_group([{"CPU": 0.01}]) for _ in range(COUNT)]
    for group in groups[:5]:
        remove_placement_group(group)
    joined.make_whole()
    assert all(group.wait(SECONDS) for group in groups[5:])
    actors = [
        Counter.options(num_cpus=0.01, scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote(1)
        for group in groups[COUNT : COUNT + 3]
    ]
    assert get([actor.increment.remote() for actor in actors]) == [2] * 3
    for one in joined.alive(service):
        one.kill()
    for group in groups:
        remove_placement_group(group)
    joined.make_whole()
    until(lambda: shoal.available_resources().get("CPU") == 2, "all that was reserved is free again")
    assert {placement_group_table(group)["state"] for group in groups} == {"REMOVED"}


def test_names_are_kept_while_the_control_stores_are_killed_and_started_again(joined: Stack) -> None:
    first = Counter.options(name="kept").remote(1)
    assert get(first.increment.remote()) == 2
    for one in joined.alive("gcs"):
        one.kill()
    assert get(first.increment.remote()) == 3  # calls need no control store
    joined.make_whole()
    assert get(shoal.get_actor("kept").increment.remote()) == 4
    assert list_named_actors() == ["kept"]
    with pytest.raises(ValueError, match="kept"):
        Counter.options(name="kept").remote(2)
