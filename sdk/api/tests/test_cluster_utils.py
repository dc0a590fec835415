"""Clusters of several nodes on one machine: real processes, a real broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import shoal
from shoal.cluster_utils import Cluster, ClusterNode
from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.labels import as_value


def until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    one = Cluster(
        initialize_head=True,
        connect=True,
        head_node_args={"num_cpus": 1, "node_name": "first", "labels": {"zone": "a"}, "memory": 1_000_000},
    )
    try:
        yield one
    finally:
        one.shutdown()


@shoal.remote(num_cpus=0)
def where() -> str:
    return shoal.get_runtime_context().get_node_id()


def by_id() -> dict[str, dict[str, Any]]:
    return {node["NodeID"]: node for node in shoal.nodes() if node["Alive"]}


def test_a_node_that_was_added_is_used_at_once(cluster: Cluster) -> None:
    for count in (2, 3):
        cluster.add_node(num_cpus=1)
        assert shoal.available_resources()["CPU"] == count


def test_nodes_added_from_two_threads_are_who_they_say(cluster: Cluster) -> None:
    def add(name: str) -> ClusterNode:
        return cluster.add_node(
            num_cpus=1,
            resources={name: 1},
            labels={"zone": name},
            node_name=f"the {name}",
            object_store_memory=80_000_000,
        )

    with ThreadPoolExecutor(2) as threads:
        left, right = threads.map(add, ["left", "right"])
    assert left.node_id != right.node_id
    assert {node.node_id for node in cluster.worker_nodes} == {left.node_id, right.node_id}
    seen = by_id()
    for name, node in (("left", left), ("right", right)):
        assert node.unique_id == node.node_id
        assert shoal.get(where.options(resources={name: 1}).remote()) == node.node_id
        assert seen[node.node_id]["NodeName"] == f"the {name}"
        assert seen[node.node_id]["Labels"]["zone"] == name
        assert seen[node.node_id]["Labels"]["ray.io/node-id"] == node.node_id
        resources = seen[node.node_id]["Resources"]
        assert isinstance(resources, dict)
        assert resources["object_store_memory"] == 80_000_000
        assert resources[name] == 1


def test_the_head_is_a_node_as_it_was_described(cluster: Cluster) -> None:
    assert cluster.head_node is not None
    assert cluster.list_all_nodes() == [cluster.head_node]
    head = by_id()[cluster.head_node.node_id]
    assert head["NodeName"] == "first"
    assert head["Labels"] == {
        "zone": "a",
        "ray.io/node-id": cluster.head_node.node_id,
        "shoal.io/hostname": as_value(head["NodeManagerHostname"]),
    }
    assert head["Resources"]["node:__internal_head__"] == head["Resources"]["node:127.0.0.1"] == 1
    resources = head["Resources"]
    assert isinstance(resources, dict)
    assert (resources["CPU"], resources["memory"]) == (1, 1_000_000)
    assert cluster.address == cluster.gcs_address == shoal.get_runtime_context().gcs_address
    assert shoal.get(where.remote()) == cluster.head_node.node_id


def test_nodes_come_and_go(cluster: Cluster) -> None:
    node = cluster.add_node(wait=False, num_cpus=1)
    cluster.wait_for_nodes()
    assert node.node_id in by_id()
    assert cluster.remaining_processes_alive()
    cluster.remove_node(node)
    cluster.wait_for_nodes()
    assert node.node_id not in by_id()
    assert cluster.remaining_processes_alive()
    with pytest.raises(ValueError, match=node.node_id):
        cluster.remove_node(node)
    assert cluster.head_node is not None
    with pytest.raises(ValueError, match="head"):
        cluster.remove_node(cluster.head_node)


def test_a_node_that_dies_alone_is_noticed(cluster: Cluster) -> None:
    node = cluster.add_node(num_cpus=1)
    assert node.process is not None
    node.process.kill()
    node.process.wait()
    assert not cluster.remaining_processes_alive()
    with pytest.raises(TimeoutError, match=node.node_id):
        cluster.wait_for_nodes(timeout=0)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"cpus": 1}, ValueError, "'cpus'"),
        ({"num_cpus": "two"}, TypeError, "num_cpus"),
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"memory": 1.5}, ValueError, "memory"),
        ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
        ({"labels": {"zone": 1}}, TypeError, "zone"),
        ({"plasma_directory": "/nowhere"}, ValueError, "folder of the object store"),
        ({"object_store_folder": "/dev/shm"}, ValueError, "object_store_folder"),
    ],
)
def test_a_wrong_parameter_of_a_node_is_named_before_anything_starts(
    options: dict[str, object], error: type[Exception], says: str
) -> None:
    cluster = Cluster()
    with pytest.raises(error, match=says):
        cluster.add_node(**options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no head"):
        _ = cluster.address
    cluster.shutdown()


def test_a_node_that_cannot_start_says_why(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no room for you >&2\nexit 7\n")
    broken.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(RuntimeError, match=r"did not join and ended with status 7(.|\n)*no room for you"):
        cluster.add_node(num_cpus=1)
    assert cluster.worker_nodes == []


def test_connecting_leaves_the_environment_as_it_was(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    shoal.shutdown()
    monkeypatch.setenv("SHOAL_CREDENTIALS", "/another/file")
    monkeypatch.delenv("SHOAL_CLUSTER", raising=False)
    with cluster.connect(namespace="mine") as context:
        assert context["namespace"] == "mine"
        assert shoal.get_runtime_context().namespace == "mine"
    assert os.environ["SHOAL_CREDENTIALS"] == "/another/file"
    assert "SHOAL_CLUSTER" not in os.environ


def test_a_cluster_that_has_ended_can_be_ended_again(cluster: Cluster) -> None:
    cluster.shutdown()
    cluster.shutdown()
    assert cluster.list_all_nodes() == []
    assert not shoal.is_initialized()
    with pytest.raises(ShoalError):
        shoal.init("auto")


PROGRAM = """
import sys
from shoal.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}, shutdown_at_exit=True)
cluster.add_node(num_cpus=1)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [None, signal.SIGKILL])
def test_no_node_outlives_the_program_that_added_it(number: signal.Signals | None) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout is not None
        assert program.stdin is not None
        assert program.stdout.readline() == "up\n"
        below = psutil.Process(program.pid).children(recursive=True)
        assert any("shoal: template" in " ".join(process.cmdline()) for process in below)
        if number is None:
            program.stdin.close()
        else:
            program.send_signal(number)
        assert program.wait(timeout=30) == (0 if number is None else -number)
    until(lambda: not any(process.is_running() for process in below), "all processes of the cluster are gone")
