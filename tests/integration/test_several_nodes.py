"""Several nodes on one machine: placement, objects across nodes, the death of a node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import shoal
from shoal import exceptions
from shoal.cluster_utils import Cluster
from tests.integration.waiting import until


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    one = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        one.add_node(num_cpus=1, resources={"far": 1})
        one.connect()
        yield one
    finally:
        one.shutdown()


@shoal.remote
def where() -> str:
    return shoal.get_runtime_context().get_node_id()


@shoal.remote(num_cpus=0, resources={"far": 0.5})
def stay(begun: Path) -> None:
    begun.touch()
    time.sleep(600)


@shoal.remote(num_cpus=0)
def large(size: int) -> bytes:
    return b"z" * size


def test_tasks_run_where_their_resources_are(cluster: Cluster) -> None:
    assert cluster.head_node is not None
    (far,) = cluster.worker_nodes
    assert shoal.cluster_resources()["CPU"] == 2
    assert shoal.get(where.options(resources={"far": 0.5}).remote()) == far.node_id


def test_large_objects_cross_nodes(cluster: Cluster) -> None:
    ref = large.options(resources={"far": 1}).remote(3_000_000)
    assert shoal.get(ref) == b"z" * 3_000_000
    big = shoal.put(b"y" * 2_000_000)

    @shoal.remote(resources={"far": 1}, num_cpus=0)
    def length(data: bytes) -> int:
        return len(data)

    assert shoal.get(length.remote(big)) == 2_000_000


def test_a_killed_node_costs_no_task_but_those_that_may_not_be_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    (far,) = cluster.worker_nodes
    stays = stay.options(max_retries=0).remote(tmp_path / "begun")
    until((tmp_path / "begun").exists, "the task has begun")
    refs = [where.remote() for _ in range(5_000)]
    cluster.remove_node(far, allow_graceful=False)
    assert len(shoal.get(refs, timeout=50)) == 5_000
    with pytest.raises(exceptions.NodeDiedError, match=r"stay\(\) failed after 1 attempt"):
        shoal.get(stays, timeout=50)
    cluster.wait_for_nodes()
