"""Submitting jobs: what is refused at the call, what a program is given, and what is told of a job."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from shoal import job_config
from shoal.driver import DriverOptions
from shoal.inventory import job_row, newest_drivers
from shoal.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType
from shoal.jobs.details import details_of
from shoal.jobs.submitted import SUBMISSION_ID, VARIABLE, Submitted, submitted
from shoal.jobs.supervisor import variables, verdict
from shoal.session import find_cluster
from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.ids import ActorId, JobId, ProcessId
from shoal_core.protocol.messages import JobConfig, JobRecord, JobState

HERE = "nats://127.0.0.1:4222"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> JobSubmissionClient:
    """Return a client of no cluster."""
    monkeypatch.setattr(JobSubmissionClient, "_call", lambda *_: None)
    return JobSubmissionClient(HERE)


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"entrypoint": 1}, TypeError, "entrypoint must be a str, got int"),
        ({"entrypoint": " "}, ValueError, "entrypoint must not be empty"),
        ({"entrypoint": "x" * 40_000}, ValueError, "entrypoint must have at most 32,768 bytes, got 40,000"),
        ({"submission_id": 1}, TypeError, "submission_id must be a str"),
        ({"submission_id": "x" * 200}, ValueError, "submission_id must have at most 128 characters"),
        ({"metadata": {"a": 1}}, TypeError, "metadata must be a dict of str to str"),
        ({"metadata": {"a": "x" * 40_000}}, ValueError, "metadata must have at most"),
        ({"runtime_env": {"pip": ["x"]}}, ValueError, "'pip'"),
        ({"entrypoint_num_cpus": -1}, ValueError, "num_cpus"),
        ({"entrypoint_memory": "1"}, TypeError, "memory"),
        ({"entrypoint_resources": {"CPU": 1}}, ValueError, "num_cpus"),
    ],
)
def test_what_is_wrong_is_refused_at_the_call(
    client: JobSubmissionClient, wrong: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        client.submit_job(**{"entrypoint": "true", **wrong})


def test_an_id_is_drawn_where_none_is_given(client: JobSubmissionClient) -> None:
    drawn = {client.submit_job(entrypoint="true") for _ in range(3)}
    assert len(drawn) == 3
    assert client.submit_job(entrypoint="true", job_id="mine") == "mine"


def test_without_a_cluster_there_is_no_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("SHOAL_ADDRESS", raising=False)
    for address in (None, "auto", "local", "http://127.0.0.1:8265"):
        with pytest.raises(ClusterUnreachableError):
            JobSubmissionClient(address)


def test_the_address_that_the_environment_names_is_found_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ADDRESS", HERE)
    found = find_cluster("auto")
    assert found is not None
    assert found.address == HERE


@pytest.mark.parametrize(
    ("status", "was_stopped", "state", "says"),
    [
        (0, False, JobState.SUCCEEDED, "successfully"),
        (3, False, JobState.FAILED, "exit code 3"),
        (-9, False, JobState.FAILED, r"signal 9 \(Killed\)"),
        (-15, True, JobState.STOPPED, "was stopped"),
        (0, True, JobState.STOPPED, "was stopped"),
    ],
)
def test_how_a_job_ends_is_told_from_how_its_program_did(
    status: int, was_stopped: bool, state: JobState, says: str
) -> None:
    found, message = verdict(status, was_stopped=was_stopped)
    assert found is state
    assert says.replace("\\", "") in message


def test_a_program_has_what_its_supervisor_has_but_what_is_said_of_that_alone() -> None:
    process = {"PATH": "/bin", "PYTHONPATH": "/lib", "OMP_NUM_THREADS": "1", "SHOAL_TOKEN": "a node's", "X": "1"}
    found = variables(process, {"SHOAL_ADDRESS": HERE}, ["/packages/one"], {})
    assert found == {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}/bin",
        "PYTHONPATH": f"/packages/one{os.pathsep}/lib",
        "PYTHONUNBUFFERED": "1",
        "SHOAL_ADDRESS": HERE,
        "X": "1",
    }
    own = variables({"OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "0"}, {}, [], {"OMP_NUM_THREADS": "4"})
    assert own == {"PATH": str(Path(sys.executable).parent), "OMP_NUM_THREADS": "4", "PYTHONUNBUFFERED": "0"}


def test_a_process_that_outlives_its_job_is_told_so_unless_it_names_a_cluster(tmp_path: Path) -> None:
    gone = {VARIABLE: str(tmp_path / "gone")}
    with pytest.raises(ClusterUnreachableError, match=r"has ended since.*init"):
        submitted(None, gone)
    assert submitted("local", gone) is submitted(HERE, gone) is None


def test_a_driver_has_what_was_said_when_its_job_was_submitted(tmp_path: Path) -> None:
    environment = {"env_vars": {"A": "job", "B": "job"}, "working_dir": f"gcs://{'0' * 32}.zip"}
    said = Submitted(HERE, JobId("00000001"), {SUBMISSION_ID: "train", "team": "a", "kind": "x"}, environment)
    said.to_file(tmp_path / "file")
    set_here = {VARIABLE: str(tmp_path / "file")}
    assert submitted(None, {}) is None
    assert submitted("local", set_here) is submitted("nats://elsewhere", set_here) is None, "that is another cluster"
    assert submitted("auto", set_here) == submitted(None, set_here) == submitted(HERE, set_here) == said
    own = job_config.JobConfig(runtime_env={"env_vars": {"B": "driver"}}, metadata={"kind": "y"})
    options = DriverOptions.of(None, None, own, True, "INFO", part_of=said)
    assert options.metadata == {SUBMISSION_ID: "train", "team": "a", "kind": "y"}
    assert options.environment.fields == {**environment, "env_vars": {"A": "job", "B": "driver"}}


def record(job: str, *, submission: str = "", part_of: str = "", state: JobState = JobState.RUNNING) -> JobRecord:
    return JobRecord(
        job_id=JobId(job),
        driver=ProcessId(f"driver of {job}"),
        actor=ActorId(f"supervisor of {job}") if submission else None,
        submission_id=submission,
        hostname="there",
        machine_id="m",
        pid=7,
        entrypoint=f"python {job}.py",
        config=JobConfig(namespace="n", metadata={SUBMISSION_ID: part_of} if part_of else {}),
        state=state,
        started_at=1.0,
    )


def test_a_submitted_job_and_the_newest_driver_in_it_are_one_row() -> None:
    records = [record("1", submission="train"), record("2", part_of="train"), record("3", part_of="train"), record("4")]
    drivers = newest_drivers(records)
    assert {job: driver.job_id for job, driver in drivers.items()} == {"1": "3"}
    row = job_row(records[0], drivers[JobId("1")])
    assert (row.job_id, row.submission_id, row.type, row.entrypoint) == ("3", "train", "SUBMISSION", "python 1.py")
    assert row.driver_info == {"id": "driver of 3", "node_ip_address": "there", "pid": "7"}
    older = job_row(records[1])
    assert (older.job_id, older.submission_id, older.type) == ("2", "train", "SUBMISSION")
    assert (job_row(records[3]).type, job_row(records[3]).submission_id) == ("DRIVER", None)


def test_a_driver_belongs_to_the_job_that_had_its_submission_id_at_its_time() -> None:
    first = record("1", submission="train").model_copy(update={"ended_at": 5.0})
    second = record("3", submission="train").model_copy(update={"started_at": 6.0})
    early = record("2", part_of="train").model_copy(update={"started_at": 4.0})
    late = record("4", part_of="train").model_copy(update={"started_at": 8.0})
    drivers = newest_drivers([first, early, second, late])
    assert {job: driver.job_id for job, driver in drivers.items()} == {"1": "2", "3": "4"}


@pytest.mark.parametrize(
    ("state", "waits", "status", "message"),
    [
        (JobState.RUNNING, True, JobStatus.PENDING, "has not begun"),
        (JobState.RUNNING, False, JobStatus.RUNNING, "is running"),
        (JobState.STOPPED, True, JobStatus.STOPPED, ""),
    ],
)
def test_what_is_told_of_a_job(state: JobState, waits: bool, status: JobStatus, message: str) -> None:
    details = details_of(job_row(record("1", submission="train", state=state), waits=waits))
    assert (details.status, details.type, details.driver_info) == (status, JobType.SUBMISSION, None)
    assert message in (details.message or "")
    assert JobDetails(**json.loads(details.model_dump_json())) == details
    assert status.is_terminal() == (state is not JobState.RUNNING)
