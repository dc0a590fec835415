"""What there is in a cluster, as rows, for programs and on the command line."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import shoal
from shoal import cli, exceptions
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

    def __repr__(self) -> str:
        return "One(\n1)"


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
    assert (row.repr_name, detailed.repr_name) == (None, "One( 1)")
    assert json.loads(detailed.serialized_runtime_env or "") == {"env_vars": {"A": "1", "B": "2"}}
    dead = state.get_actor(broken._actor_id.hex())
    assert dead is not None
    assert dead.death_cause is not None
    assert "it does not work" in dead.death_cause["error_message"]
    assert dead.repr_name == ""
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


@shoal.remote
def succeed(seconds: float = 0.0, *after: object) -> int:
    time.sleep(seconds)
    return os.getpid()


@shoal.remote(max_retries=1, retry_exceptions=[KeyError])
def raise_once_more() -> None:
    raise KeyError("no such thing")


@shoal.remote(max_retries=0)
def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@shoal.remote(max_calls=1)
def run_alone() -> int:
    return os.getpid()


def tasks_named(name: str) -> list[state.TaskState]:
    return state.list_tasks(filters=[("name", "=", name)])


@pytest.mark.usefixtures("address")
def test_tasks_that_have_ended() -> None:
    ref = succeed.remote(0.05)
    pid = get(ref)
    row = state.get_task(ref.task_id().hex())
    assert isinstance(row, state.TaskState)
    assert list(row) == columns_of(state.TaskState)
    assert (row.name, row.state, row.type, row.attempt_number) == ("succeed", "FINISHED", "NORMAL_TASK", 0)
    assert (row.job_id, row.node_id) == (shoal.get_runtime_context().get_job_id(), state.list_nodes()[0].node_id)
    assert (row.worker_pid, row.error_type, row.actor_id) == (pid, None, None)
    assert row.worker_id in [worker.worker_id for worker in state.list_workers()]
    assert row.start_time_ms is not None
    assert row.end_time_ms is not None
    assert row.end_time_ms - row.start_time_ms >= 49
    assert row.creation_time_ms is not None
    assert 0 < row.creation_time_ms <= row.start_time_ms
    assert (row.parent_task_id, row.required_resources) == ("f" * 32 + row.job_id, {"CPU": 1})
    assert abs(time.time() * 1000 - row.end_time_ms) < 60_000
    assert state.get_task("f" * 48) is None


@shoal.remote(num_cpus=0.5)
def ask_another() -> tuple[str, str]:
    ref = succeed.options(name="asked for").remote()
    actor = One.remote()
    get([ref, actor.pid.remote()])
    return ref.task_id().hex(), actor._actor_id.hex()


class ParentClass:
    def ask(self) -> str:
        ref = succeed.remote()
        get(ref)
        return str(ref.task_id().hex())


@pytest.mark.usefixtures("address")
def test_who_has_submitted_a_task() -> None:
    ref, parent = ask_another.remote(), shoal.remote(ParentClass).options(num_cpus=0).remote()
    (task, actor), call = get(ref), parent.ask.remote()
    for child, mother in ((task, ref), (actor, ref), (get(call), call)):
        row = state.get_task(child)
        assert isinstance(row, state.TaskState)
        assert row.parent_task_id == mother.task_id().hex()
        assert row.creation_time_ms
    (named,) = tasks_named("asked for")
    assert named.func_or_class_name == "succeed"
    made = state.get_task(actor)
    assert isinstance(made, state.TaskState)
    assert made.required_resources == {}


@pytest.mark.usefixtures("address")
def test_tasks_that_have_failed() -> None:
    with pytest.raises(KeyError):
        get(raise_once_more.remote())
    attempts = tasks_named("raise_once_more")
    assert sorted(row.attempt_number for row in attempts) == [0, 1]
    assert {(row.state, row.error_type) for row in attempts} == {("FAILED", "TASK_EXECUTION_EXCEPTION")}
    assert attempts[0].error_message == "KeyError: 'no such thing'"
    assert state.get_task(attempts[0].task_id) == attempts
    with pytest.raises(exceptions.WorkerCrashedError):
        get(crash.remote())
    (row,) = tasks_named("crash")
    assert (row.state, row.error_type, row.worker_pid) == ("FAILED", "WORKER_DIED", None)
    assert "crash" in (row.error_message or "")
    with pytest.raises(exceptions.WorkerCrashedError):
        get(crash.options(name="crash again", max_retries=1).remote())
    assert sorted((row.attempt_number, row.state, row.error_type or "") for row in tasks_named("crash again")) == [
        (0, "FAILED", "WORKER_DIED"),
        (1, "FAILED", "WORKER_DIED"),
    ]


@pytest.mark.usefixtures("address")
def test_tasks_of_processes_that_have_left() -> None:
    pids = get([run_alone.remote() for _ in range(3)])
    assert len(set(pids)) == 3
    until(lambda: not any(row.pid in pids for row in state.list_workers()), "the processes have left")
    assert sorted(row.worker_pid or 0 for row in tasks_named("run_alone")) == sorted(pids)


@pytest.mark.usefixtures("address")
def test_tasks_that_wait_and_run() -> None:
    slow = [succeed.options(name="slow").remote(600) for _ in range(2)]
    until(lambda: [row.state for row in tasks_named("slow")] == ["RUNNING"] * 2, "they run")
    queued = succeed.options(name="queued").remote()
    waits = succeed.options(name="waits").remote(0, queued)
    until(lambda: [row.state for row in tasks_named("queued")] == ["PENDING_NODE_ASSIGNMENT"], "it has no node")
    (row,) = tasks_named("waits")
    assert (row.state, row.start_time_ms, row.worker_id) == ("PENDING_ARGS_AVAIL", None, None)
    assert (row.func_or_class_name, row.required_resources) == ("succeed", {"CPU": 1})
    assert row.task_id == waits.task_id().hex()
    for ref in (waits, queued):
        shoal.cancel(ref)
    for ref in slow:
        shoal.cancel(ref, force=True)
    for name, count in (("slow", 2), ("queued", 1), ("waits", 1)):
        until(lambda name=name, count=count: _cancelled(name) == count, f"{name} was cancelled")  # type: ignore[misc]


def _cancelled(name: str) -> int:
    return sum(row.error_type == "TASK_CANCELLED" for row in tasks_named(name))


@pytest.mark.usefixtures("address")
def test_calls_of_actors_and_their_making() -> None:
    actor, broken = One.remote(), Broken.remote()
    get(actor.pid.remote())
    with pytest.raises(exceptions.ActorDiedError):
        get(broken.call.remote())
    mine = {row.type: row for row in state.list_tasks(filters=[("actor_id", "=", actor._actor_id.hex())])}
    assert (mine["ACTOR_TASK"].name, mine["ACTOR_TASK"].state) == ("OneClass.pid", "FINISHED")
    made = mine["ACTOR_CREATION_TASK"]
    assert (made.name, made.state, made.task_id) == ("OneClass.__init__", "FINISHED", actor._actor_id.hex())
    until(lambda: state.get_task(broken._actor_id.hex()) is not None, "its process has left word")
    failed = state.get_task(broken._actor_id.hex())
    assert isinstance(failed, state.TaskState)
    assert (failed.state, failed.error_type) == ("FAILED", "ACTOR_DIED")
    summary = state.summarize_tasks()["cluster"]
    assert summary["summary"]["OneClass.pid"]["type"] == "ACTOR_TASK"
    assert summary["total_actor_scheduled"] >= 2


def test_the_timeline_is_drawn_from_what_has_run(address: str, tmp_path: Path) -> None:
    host = running_at(address)
    assert host is not None
    get([succeed.options(name="drawn").remote(0.01) for _ in range(5)])
    rows = shoal.timeline()
    bars = [row for row in rows if row["ph"] == "X" and row["name"] == "drawn"]
    assert len(bars) == 5
    assert all(bar["dur"] >= 10_000 for bar in bars)
    for before, after in pairwise(sorted(bars, key=lambda bar: (bar["tid"], bar["ts"]))):
        assert before["tid"] != after["tid"] or before["ts"] + before["dur"] <= after["ts"], "one after the other"
    assert {row["tid"] for row in rows if row["name"] == "thread_name"} >= {bar["tid"] for bar in bars}
    shoal.timeline(tmp_path / "driver.json")
    target = ["--address", address, "--credentials", host.credentials_path]
    done = CliRunner().invoke(cli.app, ["timeline", str(tmp_path / "observer.json"), *target])
    assert (done.exit_code, "tasks written" in done.output) == (0, True), done.output
    printed = CliRunner().invoke(cli.app, ["timeline", "-", *target])
    for text in ((tmp_path / "driver.json").read_text(), (tmp_path / "observer.json").read_text(), printed.output):
        assert sum(row["name"] == "drawn" for row in json.loads(text)) == 5
    assert CliRunner().invoke(cli.app, ["timeline", str(tmp_path / "none" / "x.json"), *target]).exit_code == 2


@pytest.mark.usefixtures("address")
@pytest.mark.parametrize("wrong", [{"limit": 0}, {"limit": 10_001}, {"filters": [("spam", "=", 1)]}, {"timeout": 0}])
@pytest.mark.parametrize("kind", ["actors", "jobs", "nodes", "tasks", "workers"])
def test_wrong_questions_are_refused(kind: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"limit|column|timeout"):
        getattr(state, f"list_{kind}")(**wrong)


def test_rays_client_joins_like_anyone(address: str) -> None:
    with pytest.raises(RuntimeError, match="joined a cluster already"):
        shoal.util.connect(address)


def test_the_command_line_lists_them(address: str) -> None:
    host = running_at(address)
    assert host is not None
    actor = Host.options(name="shown").remote()
    get(actor.pid.remote())
    target = ["--address", address, "--credentials", host.credentials_path]
    for what in ("actors", "jobs", "nodes", "tasks", "workers"):
        done = CliRunner().invoke(cli.app, ["list", what, *target, "--format", "json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)
        assert CliRunner().invoke(cli.app, ["list", what, *target, "--filter", "pid=1", "-f", "x"]).exit_code == 2
    shown = CliRunner().invoke(cli.app, ["list", "actors", *target, "-f", "name=shown", "--detail"])
    assert "shown" in shown.output
    assert "shown" not in CliRunner().invoke(cli.app, ["list", "actors", *target, "-f", "name!=shown"]).output
