"""Where tasks and actors are placed, on nodes with labels and with GPUs that are numbers only."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

import shoal
from shoal.cluster_utils import Cluster
from shoal.exceptions import ActorUnschedulableError, TaskUnschedulableError
from shoal.util.scheduling_strategies import (
    Exists,
    In,
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    NotIn,
)
from tests.integration.waiting import get, is_gone, until


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without CPUs, and three nodes."""
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        one.add_node(num_cpus=2, labels={"zone": "a", "disk": "ssd"})
        one.add_node(num_cpus=2, labels={"zone": "b"})
        one.add_node(num_cpus=2, num_gpus=2, labels={"zone": "c"})
        one.connect()
        yield one
    finally:
        one.shutdown()


def nodes(cluster: Cluster) -> tuple[str, str, str]:
    a, b, c = (node.node_id for node in cluster.worker_nodes)
    return a, b, c


@shoal.remote
def where() -> str:
    return shoal.get_runtime_context().get_node_id()


class PlaceClass:
    def where(self) -> str:
        return shoal.get_runtime_context().get_node_id()


Place = shoal.remote(PlaceClass)


def on(node_id: str, *, soft: bool = False) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=soft)


# ------------------------------------------------------------------------------- nodes


def test_a_hard_affinity_is_kept_whatever_is_free_elsewhere(cluster: Cluster) -> None:
    for node in nodes(cluster):
        refs = [where.options(scheduling_strategy=on(node)).remote() for _ in range(6)]
        assert set(get(refs)) == {node}
        actor = Place.options(scheduling_strategy=on(node)).remote()
        assert get(actor.where.remote()) == node


def test_work_without_end_lets_what_is_bound_to_its_node_have_a_turn(cluster: Cluster) -> None:
    @shoal.remote
    def nap() -> None:
        time.sleep(0.05)

    backlog = [nap.remote() for _ in range(2_000)]
    for node in nodes(cluster):
        assert get(where.options(scheduling_strategy=on(node)).remote()) == node
    ready, _ = shoal.wait(backlog, num_returns=len(backlog), timeout=0)
    assert len(ready) < len(backlog), "they did not wait for all of it"
    for ref in backlog:
        shoal.cancel(ref)


def test_a_soft_affinity_goes_elsewhere_when_its_node_is_not_there(cluster: Cluster) -> None:
    a, _, _ = nodes(cluster)
    assert get(where.options(scheduling_strategy=on(a, soft=True)).remote()) == a
    assert get(where.options(scheduling_strategy=on("0" * 16, soft=True)).remote()) in nodes(cluster)


def empty() -> None:
    """Wait until nothing is leased any more: what idles for a moment would be in the way."""
    until(lambda: shoal.available_resources().get("CPU") == 6, "all nodes are empty")


def test_spread_uses_all_nodes(cluster: Cluster) -> None:
    empty()
    holding = [Place.options(num_cpus=1, scheduling_strategy="SPREAD").remote() for _ in range(3)]
    assert set(get([actor.where.remote() for actor in holding])) == set(nodes(cluster))


# ------------------------------------------------------------------------------- labels


def test_labels_choose_nodes(cluster: Cluster) -> None:
    a, b, c = nodes(cluster)
    strategy = NodeLabelSchedulingStrategy({"zone": In("a", "b")}, soft={"disk": Exists()})
    assert get(where.options(scheduling_strategy=strategy).remote()) == a
    strategy = NodeLabelSchedulingStrategy({"zone": NotIn("a", "b"), "ray.io/node-id": Exists()}, soft=None)
    assert get(where.options(scheduling_strategy=strategy, num_gpus=0.1).remote()) == c
    assert get(where.options(label_selector={"zone": "b"}).remote()) == b
    assert get(where.options(label_selector={"zone": "in(a,b)", "disk": "!ssd"}).remote()) == b
    assert get(where.options(label_selector={"ray.io/node-id": a}).remote()) == a
    actor = Place.options(label_selector={"zone": "c"}).remote()
    assert get(actor.where.remote()) == c


def test_a_selector_that_nobody_meets_falls_back(cluster: Cluster) -> None:
    _, b, _ = nodes(cluster)
    fallback: list[dict[str, Any]] = [{"label_selector": {"zone": "y"}}, {"label_selector": {"zone": "b"}}]
    task = where.options(label_selector={"zone": "x"}, fallback_strategy=fallback)
    assert get(task.remote()) == b
    actor = Place.options(label_selector={"zone": "x"}, fallback_strategy=fallback).remote()
    assert get(actor.where.remote()) == b


def test_a_task_knows_the_labels_of_its_node(cluster: Cluster) -> None:
    @shoal.remote(label_selector={"zone": "a"})
    def labels() -> dict[str, str]:
        return shoal.get_runtime_context().get_node_labels()

    a, _, _ = nodes(cluster)
    seen = get(labels.remote())
    assert (seen["zone"], seen["disk"], seen["ray.io/node-id"]) == ("a", "ssd", a)
    assert seen == next(node["Labels"] for node in shoal.nodes() if node["NodeID"] == a)
    assert shoal.get_runtime_context().get_node_labels()["ray.io/node-id"] == shoal.get_runtime_context().get_node_id()


def test_nodes_can_be_asked_for_by_what_they_are_called(cluster: Cluster) -> None:
    assert cluster.head_node is not None
    head = where.options(num_cpus=0, resources={"node:__internal_head__": 0.001})
    assert get(head.remote()) == cluster.head_node.node_id
    assert get(where.options(resources={"node:127.0.0.1": 0.0001}).remote()) in nodes(cluster)


# ------------------------------------------------------------------------------- arguments


@shoal.remote
def make(size: int) -> bytes:
    return bytes(size)


@shoal.remote(num_cpus=0.1)
def read(data: bytes) -> str:
    return shoal.get_runtime_context().get_node_id()


def test_a_task_goes_where_its_large_argument_lies(cluster: Cluster) -> None:
    for node in nodes(cluster):
        data = make.options(scheduling_strategy=on(node)).remote(20_000_000)
        shoal.wait([data], fetch_local=False)
        empty()
        assert get([read.remote(data) for _ in range(4)]) == [node] * 4


# ------------------------------------------------------------------------------- what can never run


def test_a_node_that_is_not_there_is_an_error_of_what_is_bound_to_it(cluster: Cluster) -> None:
    nowhere = on("0123456789abcdef")
    with pytest.raises(TaskUnschedulableError, match="node 0123456789abcdef is not in the cluster"):
        get(where.options(scheduling_strategy=nowhere).remote())
    with pytest.raises(TaskUnschedulableError, match="soft=False"):
        get([where.options(scheduling_strategy=nowhere).remote() for _ in range(3)])
    actor = Place.options(scheduling_strategy=nowhere).remote()
    with pytest.raises(ActorUnschedulableError, match="bound to is not in the cluster"):
        get(actor.where.remote())


def test_a_worker_process_hears_of_it_too(cluster: Cluster) -> None:
    @shoal.remote
    def outer() -> str:
        return str(shoal.get(where.options(scheduling_strategy=on("0123456789abcdef")).remote()))

    with pytest.raises(TaskUnschedulableError, match="is not in the cluster"):
        get(outer.remote())


def test_a_node_that_is_too_small_is_an_error_of_what_is_bound_to_it(cluster: Cluster) -> None:
    a, _, _ = nodes(cluster)
    with pytest.raises(TaskUnschedulableError, match=r"'CPU': 2.0.*, not \{'CPU': 9.0\}"):
        get(where.options(num_cpus=9, scheduling_strategy=on(a)).remote())
    with pytest.raises(ActorUnschedulableError, match="needs"):
        get(Place.options(num_cpus=9, scheduling_strategy=on(a)).remote().where.remote())


def test_a_node_that_has_died_is_an_error_of_what_is_bound_to_it(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1)
    there = Place.options(scheduling_strategy=on(node.node_id), max_restarts=-1).remote()
    assert get(there.where.remote()) == node.node_id
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(TaskUnschedulableError, match="is dead"):
        get(where.options(scheduling_strategy=on(node.node_id), max_retries=-1).remote())
    with pytest.raises(ActorUnschedulableError, match="is dead"):
        get(there.where.options(max_task_retries=-1).remote())
    assert get(where.options(scheduling_strategy=on(node.node_id, soft=True)).remote()) in nodes(cluster)


def test_what_is_to_fail_without_room_does(cluster: Cluster) -> None:
    a, _, _ = nodes(cluster)
    holder = Place.options(num_cpus=2, scheduling_strategy=on(a)).remote()
    assert get(holder.where.remote()) == a
    impatient = NodeAffinitySchedulingStrategy(a, soft=False, _fail_on_unavailable=True)
    with pytest.raises(TaskUnschedulableError, match="waits for CPU"):
        get(where.options(scheduling_strategy=impatient).remote())
    spilling = NodeAffinitySchedulingStrategy(a, soft=True, _spill_on_unavailable=True)
    assert get(where.options(scheduling_strategy=spilling).remote()) in nodes(cluster)[1:]


def test_what_no_node_can_run_waits_for_one_and_is_told_once(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("shoal"), "propagate", True)
    unmet = where.options(label_selector={"zone": "z"})
    ref = unmet.remote()

    def told() -> list[str]:
        return [record.getMessage() for record in caplog.records if "where()" in record.getMessage()]

    until(lambda: bool(told()), "the driver is told")
    assert "it wants zone=z; the nearest, node" in told()[0]
    more = [unmet.remote() for _ in range(3)]
    node = cluster.add_node(num_cpus=1, labels={"zone": "z"})
    assert set(get([ref, *more])) == {node.node_id}
    assert len(told()) == 1
    cluster.remove_node(node)
    cluster.wait_for_nodes()


# ------------------------------------------------------------------------------- GPUs


@shoal.remote(num_cpus=0)
def gpus() -> tuple[list[int], str | None, dict[str, list[str]]]:
    ids: Any = shoal.get_gpu_ids()
    return ids, os.environ.get("CUDA_VISIBLE_DEVICES"), shoal.get_runtime_context().get_accelerator_ids()


class GpusClass:
    def seen(self) -> tuple[list[int], str | None]:
        ids: Any = shoal.get_gpu_ids()
        return ids, os.environ.get("CUDA_VISIBLE_DEVICES")

    def resources(self) -> dict[str, float]:
        return shoal.get_runtime_context().get_assigned_resources()

    def pid(self) -> int:
        return os.getpid()


Gpus = shoal.remote(num_cpus=0)(GpusClass)


def test_a_task_sees_its_gpus_and_no_others(cluster: Cluster) -> None:
    assert get(gpus.options(num_gpus=2).remote()) == ([0, 1], "0,1", {"GPU": ["0", "1"]})
    ids, visible, by_kind = get(gpus.options(num_gpus=1).remote())
    assert ([str(gpu) for gpu in ids], by_kind) == ([visible], {"GPU": [visible]})
    assert get(gpus.remote()) == ([], "", {"GPU": []})


def test_actors_share_gpus_exactly_and_those_of_the_killed_come_back(cluster: Cluster) -> None:
    whole = Gpus.options(num_gpus=1).remote()
    halves = [Gpus.options(num_gpus=0.5).remote() for _ in range(2)]
    ids, visible = get(whole.seen.remote())
    others = get([half.seen.remote() for half in halves])
    assert len(ids) == 1
    assert visible == str(ids[0])
    assert others == [([1 - ids[0]], str(1 - ids[0]))] * 2
    assert get(halves[0].resources.remote()) == {"GPU": 0.5}
    waiting = gpus.options(num_gpus=2).remote()
    for actor in (whole, *halves):
        os.kill(get(actor.pid.remote()), signal.SIGKILL)
    assert get(waiting)[0] == [0, 1]
    del whole, halves, actor
    until(lambda: shoal.available_resources().get("GPU") == 2, "all GPUs are free again")


def test_a_task_with_gpus_leaves_nothing_on_them_unless_told_to(cluster: Cluster) -> None:
    @shoal.remote(num_cpus=0, num_gpus=1)
    def pid() -> int:
        return os.getpid()

    pids = [get(pid.remote()) for _ in range(3)]
    assert len(set(pids)) == 3
    until(lambda: all(is_gone(each) for each in pids), "the processes are gone, and what CUDA kept with them")


def test_a_worker_process_sees_the_same_gpus_as_long_as_it_lives(cluster: Cluster) -> None:
    @shoal.remote(num_cpus=0, max_calls=0)
    def process() -> tuple[int, str | None]:
        return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

    seen: dict[int, set[str | None]] = {}
    for amount in (1, 2, 0.5, 1, 2, 0.5):
        pid, visible = get(process.options(num_gpus=amount).remote())
        seen.setdefault(pid, set()).add(visible)
        until(lambda: shoal.available_resources().get("GPU") == 2, "the lease is over")
    assert all(len(visible) == 1 for visible in seen.values())
    fresh = {get(gpus.options(num_gpus=1).remote())[1] for _ in range(2)}
    assert fresh <= {"0", "1"}
