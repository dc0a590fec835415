"""Actors while the services that create them are killed: none is lost, none is made twice."""

from __future__ import annotations

import os
from typing import Any

import pytest

import shoal
from shoal.util import list_named_actors
from tests.integration.test_services import Stack, broker, joined, stack
from tests.integration.waiting import get

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
