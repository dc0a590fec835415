"""What there is in a cluster, as rows, for programs and on the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

import shoal
from shoal import cli
from shoal.cluster import running_at
from shoal.job_config import JobConfig
from shoal.rows import columns_of
from shoal.util import state
from tests.integration.waiting import get, until


class HostClass:
    def pid(self) -> int:
        return os.getpid()


class BrokenClass:
    def __init__(self) -> None:
        raise ValueError("it does not work")

    def call(self) -> None: ...


class OneClass(HostClass):
    """Of which there is one actor only."""


Host, One, Broken = shoal.remote(HostClass), shoal.remote(OneClass), shoal.remote(BrokenClass)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    config = JobConfig(metadata={"team": "a"}, runtime_env={"env_vars": {"A": "1"}})
    with shoal.init(num_cpus=2, labels={"zone": "z"}, namespace="mine", job_config=config) as context:
        yield context["address"]


@pytest.mark.usefixtures("address")
def test_nodes() -> None:
    (row,) = state.list_nodes()
    assert list(row) == columns_of(state.NodeState)
    assert (row.node_id, row.state, row.is_head_node) == (shoal.get_runtime_context().get_node_id(), "ALIVE", True)
    assert (row.resources_total["CPU"], row.labels["zone"], row.end_time_ms) == (2, "z", None)
    assert state.get_node(row.node_id) == row
    assert state.get_node("0" * 16) is None
    assert state.list_nodes(filters=[("state", "=", "dead")]) == []


@pytest.mark.usefixtures("address")
def test_jobs() -> None:
    context = shoal.get_runtime_context()
    row = state.get_job(context.get_job_id())
    assert row is not None
    assert list(row) == columns_of(state.JobState)
    assert (row.status, row.type, row.metadata) == ("RUNNING", "DRIVER", {"team": "a"})
    assert row.runtime_env == {"env_vars": {"A": "1"}}
    assert row.driver_info is not None
    assert row.driver_info["pid"] == str(os.getpid())
    assert row in state.list_jobs()
    assert state.get_job("ffffffff") is None


@pytest.mark.usefixtures("address")
def test_actors() -> None:
    actor = One.options(name="one", num_cpus=0.5, max_restarts=1, runtime_env={"env_vars": {"B": "2"}}).remote()
    broken = Broken.remote()
    pid = get(actor.pid.remote())
    failed = [("class_name", "=", "BrokenClass"), ("state", "=", "dead")]
    until(lambda: bool(state.list_actors(filters=failed)), "the one that cannot be made is dead")
    (row,) = state.list_actors(filters=[("class_name", "=", "OneClass")])
    assert list(row) == columns_of(state.ActorState)
    assert (row.actor_id, row.name, row.state, row.pid) == (actor._actor_id.hex(), "one", "ALIVE", pid)
    assert (row.ray_namespace, row.is_detached, row.num_restarts) == ("mine", False, 0)
    assert (row.required_resources, row.death_cause) == (None, None)
    (detailed,) = state.list_actors(filters=[("class_name", "=", "OneClass")], detail=True)
    assert detailed == state.get_actor(row.actor_id)
    assert detailed.required_resources == {"CPU": 0.5}
    assert json.loads(detailed.serialized_runtime_env or "") == {"env_vars": {"A": "1", "B": "2"}}
    dead = state.get_actor(broken._actor_id.hex())
    assert dead is not None
    assert dead.death_cause is not None
    assert "it does not work" in dead.death_cause["error_message"]
    summary = state.summarize_actors()["cluster"]
    assert summary["summary"]["BrokenClass"] == {"class_name": "BrokenClass", "state_counts": {"DEAD": 1}}
    assert summary["summary"]["OneClass"]["state_counts"] == {"ALIVE": 1}
    assert summary["total_actors"] >= 2
    assert state.get_actor("f" * 32) is None


@pytest.mark.usefixtures("address")
def test_processes() -> None:
    actor = Host.remote()
    pid = get(actor.pid.remote())
    (row,) = state.list_workers(filters=[("pid", "=", pid)])
    assert list(row) == columns_of(state.WorkerState)
    assert (row.worker_type, row.is_alive, row.job_id) == ("WORKER", True, shoal.get_runtime_context().get_job_id())
    assert state.get_worker(row.worker_id) == row
    (driver,) = state.list_workers(filters=[("worker_type", "=", "driver")])
    assert (driver.pid, driver.worker_id) == (os.getpid(), shoal.get_runtime_context().get_worker_id())
    assert state.get_worker("0" * 24) is None


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 10_001}, {"filters": [("spam", "=", 1)]}, {"timeout": 0}])
@pytest.mark.parametrize("list_rows", [state.list_actors, state.list_jobs, state.list_nodes, state.list_workers])
def test_wrong_questions_are_refused(list_rows: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"limit|column|timeout"):
        list_rows(**wrong)


def test_rays_client_joins_like_anyone(address: str) -> None:
    with pytest.raises(RuntimeError, match="joined a cluster already"):
        shoal.util.connect(address)


def test_the_command_line_lists_them(address: str) -> None:
    host = running_at(address)
    assert host is not None
    actor = Host.options(name="shown").remote()
    get(actor.pid.remote())
    target = ["--address", address, "--credentials", host.credentials_path]
    for what in ("actors", "jobs", "nodes", "workers"):
        done = CliRunner().invoke(cli.app, ["list", what, *target, "--format", "json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)
        assert CliRunner().invoke(cli.app, ["list", what, *target, "--filter", "pid=1", "-f", "x"]).exit_code == 2
    shown = CliRunner().invoke(cli.app, ["list", "actors", *target, "-f", "name=shown", "--detail"])
    assert "shown" in shown.output
    assert "shown" not in CliRunner().invoke(cli.app, ["list", "actors", *target, "-f", "name!=shown"]).output
