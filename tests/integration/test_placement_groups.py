"""Placement groups on several nodes: all or nothing, what runs in them, and that nothing of them is left."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import shoal
from shoal.cluster_utils import Cluster
from shoal.exceptions import (
    ActorDiedError,
    ActorPlacementGroupRemoved,
    PlacementGroupAlreadyExistsError,
    TaskPlacementGroupRemoved,
)
from shoal.util import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
    state,
)
from shoal.util.placement_group import PlacementGroup
from shoal.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from tests.integration.waiting import SECONDS, get, is_gone, until

CPUS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and three nodes of two."""
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        one.add_node(num_cpus=2, labels={"zone": "a"})
        one.add_node(num_cpus=2, labels={"zone": "b"})
        one.add_node(num_cpus=2, num_gpus=2, labels={"zone": "c"})
        one.connect()
        until(all_is_free, "the schedulers have heard of all nodes")
        yield one
    finally:
        one.shutdown()


@pytest.fixture(autouse=True)
def all_is_given_back(cluster: Cluster) -> Iterator[None]:
    yield
    for row in state.list_placement_groups(filters=[("state", "!=", "REMOVED")]):
        remove_placement_group(PlacementGroup(row.placement_group_id))
    until(all_is_free, "all CPUs and GPUs are free again")


def all_is_free() -> bool:
    free = shoal.available_resources()
    return (free.get("CPU"), free.get("GPU")) == (CPUS, 2)


def nodes(cluster: Cluster) -> list[str]:
    return [node.node_id for node in cluster.worker_nodes]


def lies_on(group: PlacementGroup) -> list[str]:
    """Return the node of each bundle of a group, once all of them are there."""
    assert group.wait(SECONDS)
    return list(placement_group_table(group)["bundles_to_node_id"].values())


def inside(group: PlacementGroup | None, index: int = -1, captures: bool | None = None) -> Any:
    return PlacementGroupSchedulingStrategy(group, index, captures)


@shoal.remote
def where() -> tuple[str, str | None]:
    context = shoal.get_runtime_context()
    return context.get_node_id(), context.get_placement_group_id()


@shoal.remote
def pid_and_sleep(pid: Any) -> None:
    get(pid.tell.remote(os.getpid()))
    signal.pause()


class BoardClass:
    """Where tasks say who they are."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def tell(self, pid: int) -> None:
        self.pids.append(pid)

    def told(self) -> list[int]:
        return self.pids


Board = shoal.remote(num_cpus=0)(BoardClass)


class PlaceClass:
    def where(self) -> tuple[str, str | None]:
        context = shoal.get_runtime_context()
        return context.get_node_id(), context.get_placement_group_id()

    def pid(self) -> int:
        return os.getpid()

    def child(self) -> tuple[str, str | None]:
        place: tuple[str, str | None] = shoal.get(where.options(num_cpus=0).remote())
        return place


Place = shoal.remote(PlaceClass)


# ------------------------------------------------------------------------------- where bundles lie


@pytest.mark.parametrize(
    ("strategy", "count", "distinct"),
    [("PACK", 2, 1), ("STRICT_PACK", 2, 1), ("SPREAD", 4, 3), ("STRICT_SPREAD", 3, 3)],
)
def test_bundles_lie_as_their_strategy_says(cluster: Cluster, strategy: str, count: int, distinct: int) -> None:
    group = placement_group([{"CPU": 1}] * count, strategy=strategy)
    assert shoal.get(group.ready(), timeout=SECONDS) == group
    places = lies_on(group)
    assert len(places) == count
    assert len(set(places)) == distinct
    for index, node in enumerate(places):
        task = where.options(scheduling_strategy=inside(group, index))
        assert get(task.remote()) == (node, group.id)
    actor = Place.options(num_cpus=1, scheduling_strategy=inside(group, 1)).remote()
    assert get(actor.where.remote()) == (places[1], group.id)


def test_a_group_is_placed_whole_or_not_at_all(cluster: Cluster) -> None:
    too_many = placement_group([{"CPU": 1}] * 4, strategy="STRICT_SPREAD")
    too_large = placement_group([{"CPU": 2}, {"CPU": 2}], strategy="STRICT_PACK")
    fits = placement_group([{"CPU": 2}] * 3, strategy="STRICT_SPREAD")
    assert len(set(lies_on(fits))) == 3
    assert not too_many.wait(0)
    assert not too_large.wait(0.1)
    for group in (too_many, too_large):
        table = placement_group_table(group)
        assert (table["state"], table["bundles_to_node_id"]) == ("PENDING", {})
    node = cluster.add_node(num_cpus=4, labels={"zone": "d"})
    try:
        assert lies_on(too_large) == [node.node_id] * 2
        assert not too_many.wait(0)
    finally:
        remove_placement_group(too_large)
        cluster.remove_node(node)
        cluster.wait_for_nodes()


def test_gangs_that_compete_are_placed_one_after_the_other(cluster: Cluster) -> None:
    groups = [placement_group([{"CPU": 2}] * 2, strategy="STRICT_SPREAD") for _ in range(4)]
    placed = 0
    while groups:
        ready, _ = shoal.wait([group.ready() for group in groups], timeout=SECONDS)
        group = get(ready[0])
        assert len(set(lies_on(group))) == 2
        remove_placement_group(group)
        groups.remove(group)
        placed += 1
    assert placed == 4


def test_each_bundle_may_choose_its_node_by_labels(cluster: Cluster) -> None:
    a, _, c = nodes(cluster)
    selectors = [{"zone": "c"}, {"zone": "in(a,x)"}]
    assert lies_on(placement_group([{"CPU": 1}] * 2, bundle_label_selector=selectors)) == [c, a]
    target = placement_group([{"CPU": 1}] * 2, strategy="STRICT_PACK", _soft_target_node_id=a)
    assert lies_on(target) in ([a, a], [c, c], [nodes(cluster)[1]] * 2)


def test_what_no_nodes_can_hold_is_told_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("shoal"), "propagate", True)
    group = placement_group([{"CPU": 1, "licence": 1}])

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if group.id in record.getMessage()]

    until(lambda: bool(told()), "the driver is told")
    assert "licence" in told()[0]
    assert not group.wait(0)
    assert len(told()) == 1


# ------------------------------------------------------------------------------- what runs in them


def test_gpus_are_those_that_the_bundle_has_reserved(cluster: Cluster) -> None:
    group = placement_group([{"GPU": 1}, {"GPU": 1}], strategy="STRICT_PACK")

    @shoal.remote(num_cpus=0, num_gpus=1)
    def gpus() -> Any:
        return shoal.get_gpu_ids()

    seen = [get(gpus.options(scheduling_strategy=inside(group, index)).remote()) for index in (0, 1)]
    assert sorted(seen) == [[0], [1]]
    assert [get(gpus.options(scheduling_strategy=inside(group, index)).remote()) for index in (0, 1)] == seen
    assert shoal.available_resources().get("GPU", 0) == 0


def test_children_are_captured_where_their_parent_says_so(cluster: Cluster) -> None:
    group = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="STRICT_SPREAD")

    @shoal.remote
    def parent(other: PlacementGroup) -> list[Any]:
        current = get_current_placement_group()
        assert current == other
        captures = shoal.get_runtime_context().should_capture_child_tasks_in_placement_group
        outside = where.options(scheduling_strategy=inside(None)).remote()
        grandchild = Place.options(num_cpus=0).remote()
        return [captures, get(where.remote())[1], get(outside)[1], get(grandchild.child.remote())[1]]

    assert get(parent.options(scheduling_strategy=inside(group, 0, True)).remote(group)) == [
        *(True, group.id, None, group.id)
    ]
    assert get(parent.options(scheduling_strategy=inside(group, 0)).remote(group)) == [False, None, None, None]
    actor = Place.options(num_cpus=1, scheduling_strategy=inside(group, 0, True)).remote()
    assert get(actor.child.remote())[1] == group.id
    assert get_current_placement_group() is None
    assert shoal.get_runtime_context().get_placement_group_id() is None


def test_a_child_that_fits_into_no_bundle_is_an_error_where_it_is_submitted(cluster: Cluster) -> None:
    group = placement_group([{"CPU": 1}])

    @shoal.remote
    def parent() -> None:
        where.options(num_cpus=2).remote()

    with pytest.raises(ValueError, match=r"\{'CPU': 2.0\} cannot fit into any bundles"):
        get(parent.options(scheduling_strategy=inside(group, 0, True)).remote())


def test_a_group_made_by_a_task_can_be_used_by_whoever_gets_it(cluster: Cluster) -> None:
    @shoal.remote(num_cpus=0)
    def make() -> PlacementGroup:
        return placement_group([{"CPU": 1}])

    @shoal.remote(num_cpus=0)
    def look(groups: list[PlacementGroup]) -> tuple[bool, Any]:
        return groups[0].wait(SECONDS), get(where.options(scheduling_strategy=inside(groups[0])).remote())

    group = get(make.remote())
    ready, place = get(look.remote([group]))
    assert ready
    assert place == (*lies_on(group), group.id)


# ------------------------------------------------------------------------------- ends


def test_who_waits_for_a_group_that_it_has_removed_is_told_so(cluster: Cluster) -> None:
    for _ in range(10):
        group = placement_group([{"CPU": 1}])
        assert group.wait(SECONDS)
        assert group.wait(0)
        remove_placement_group(group)
        with pytest.raises(TaskPlacementGroupRemoved):
            group.wait(SECONDS)


def test_removal_kills_what_runs_and_ends_what_waits(cluster: Cluster) -> None:
    group = placement_group([{"CPU": 1}, {"CPU": 1}])
    board = Board.remote()
    running = pid_and_sleep.options(scheduling_strategy=inside(group, 0), max_retries=-1).remote(board)
    actor = Place.options(num_cpus=1, max_restarts=-1, scheduling_strategy=inside(group, 1)).remote()
    late = Place.options(num_cpus=1, scheduling_strategy=inside(group, 1)).remote()
    pids = [get(actor.pid.remote())]
    until(lambda: bool(get(board.told.remote())), "the task runs")
    pids += get(board.told.remote())
    waiting = where.options(scheduling_strategy=inside(group, 0)).remote()
    remove_placement_group(group)
    for ref in (running, waiting):
        with pytest.raises(TaskPlacementGroupRemoved):
            get(ref)
    for handle in (actor, late):
        with pytest.raises(ActorPlacementGroupRemoved) as raised:
            get(handle.where.remote())
        assert isinstance(raised.value, ActorDiedError)
        assert raised.value.actor_id == handle._actor_id.hex()
    until(lambda: all(map(is_gone, pids)), "the processes are gone")
    assert placement_group_table(group)["state"] == "REMOVED"
    remove_placement_group(group)
    with pytest.raises(TaskPlacementGroupRemoved):
        group.wait(SECONDS)
    with pytest.raises(TaskPlacementGroupRemoved):
        get(group.ready())
    with pytest.raises(TaskPlacementGroupRemoved):
        get(where.options(scheduling_strategy=inside(group)).remote())
    with pytest.raises(ActorPlacementGroupRemoved):
        get(Place.options(num_cpus=1, scheduling_strategy=inside(group)).remote().where.remote())


def test_bundles_of_a_node_that_is_killed_are_placed_again(cluster: Cluster) -> None:
    doomed = cluster.add_node(num_cpus=2, labels={"zone": "e"})
    selectors = [{"zone": "a"}, {"zone": "in(b,e)"}]
    filler = placement_group([{"CPU": 2}], bundle_label_selector=[{"zone": "b"}])
    assert filler.wait(SECONDS)
    group = placement_group([{"CPU": 1}] * 2, bundle_label_selector=selectors)
    a, b, _ = nodes(cluster)[:3]
    assert lies_on(group) == [a, doomed.node_id]
    stays = Place.options(num_cpus=1, scheduling_strategy=inside(group, 0)).remote()
    moves = Place.options(num_cpus=1, max_restarts=1, scheduling_strategy=inside(group, 1)).remote()
    assert get(stays.where.remote()) == (a, group.id)
    assert get(moves.where.remote()) == (doomed.node_id, group.id)
    cluster.remove_node(doomed, allow_graceful=False)
    until(lambda: placement_group_table(group)["state"] == "RESCHEDULING", "the loss is seen")
    assert placement_group_table(group)["bundles_to_node_id"] == {0: a}
    assert not group.wait(0)
    remove_placement_group(filler)
    assert lies_on(group) == [a, b]
    assert get(moves.where.options(max_task_retries=-1).remote()) == (b, group.id)
    assert get(stays.where.remote()) == (a, group.id)


DRIVER = """
import shoal, sys
from shoal.util import get_placement_group, placement_group
shoal.init(sys.argv[1], namespace="there")
plain = placement_group([{"CPU": 1}], name="plain")
lasting = placement_group([{"CPU": 1}], name="lasting", lifetime="detached")
assert plain.wait() and lasting.wait()
print(get_placement_group("plain").id, lasting.id)
"""


def test_groups_end_with_their_job_and_detached_ones_do_not(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    host = cluster._running()
    environment = {**os.environ, "SHOAL_CREDENTIALS": host.credentials_path, "SHOAL_CLUSTER": host.cluster}
    command = [sys.executable, "-c", DRIVER, cluster.address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    plain, lasting = done.stdout.split()
    until(lambda: placement_group_table()[plain]["state"] == "REMOVED", "it ends with its job")
    assert placement_group_table()[lasting]["state"] == "CREATED"
    with pytest.raises(ValueError, match="lasting"):
        get_placement_group("lasting")  # it is in another namespace
    group = PlacementGroup(lasting)
    assert get(where.options(scheduling_strategy=inside(group)).remote())[1] == lasting
    row = state.get_placement_group(lasting)
    assert row is not None
    assert (row.name, row.state, row.is_detached, row["creator_job_id"]) == (
        *("lasting", "CREATED", True),
        row.creator_job_id,
    )
    assert row.bundles[0]["node_id"] in nodes(cluster)


def test_a_name_is_one_groups_until_that_is_removed(cluster: Cluster) -> None:
    group = placement_group([{"CPU": 1}], name="gang")
    assert get_placement_group("gang") == group
    assert get_placement_group("gang").bundle_specs == [{"CPU": 1.0}]
    with pytest.raises(PlacementGroupAlreadyExistsError, match="gang"):
        placement_group([{"CPU": 1}], name="gang")
    remove_placement_group(group)
    with pytest.raises(ValueError, match="Failed to look up placement group with name: 'gang'"):
        get_placement_group("gang")
    again = placement_group([{"CPU": 1}], name="gang")
    assert get_placement_group("gang") == again != group
