"""Submitted jobs on real clusters: how they run, are followed, stopped and lost, and what their drivers have."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import shoal
from shoal import cli
from shoal.cluster import running_at
from shoal.cluster_utils import Cluster
from shoal.job_submission import JobStatus, JobSubmissionClient, JobSubmissionError, JobType
from shoal.session import runtime
from shoal.util import state
from shoal_core.bus import Credentials
from shoal_core.protocol.actors import ActorList, ListActors
from shoal_core.runtime.session import Address
from tests.integration.waiting import is_gone, until

pytestmark = pytest.mark.usefixtures("two_cpus")

DRIVER = """
import os, sys
import shoal
from shoal.util import state
import helper

@shoal.remote
def seen():
    import helper
    return [helper.NAME, os.environ["KIND"], open("data.txt").read()]

shoal.init("auto")
row = state.get_job(shoal.get_runtime_context().get_job_id())
print("in:", row.submission_id, row.type, row.metadata)
print("task:", shoal.get(seen.remote()))
print("here:", os.environ["KIND"], open("data.txt").read(), file=sys.stderr)
"""
STUBBORN = "trap '' TERM; echo begun; while true; do sleep 0.1; done"


@pytest.fixture
def client() -> JobSubmissionClient:
    """Return a client of the cluster that the test has joined."""
    return JobSubmissionClient()


def ended(client: JobSubmissionClient, job: str) -> JobStatus:
    """Wait until a job has ended, and return how."""
    until(lambda: client.get_job_status(job).is_terminal(), f"the end of {job}")
    return client.get_job_status(job)


def printed(client: JobSubmissionClient, job: str, text: str) -> None:
    """Wait until a job has printed something."""
    until(lambda: text in client.get_job_logs(job), f"{job} prints {text!r}")


def pid_of_supervisor(job: str) -> int:
    """Return the pid of the process that runs a job's program."""
    answer = runtime().ask_gcs("list_actors", ListActors(namespace="shoal.submissions"))
    assert isinstance(answer, ActorList)
    (found,) = [one for one in answer.actors if one.class_name == job]
    return found.pid


def test_a_job_runs_and_is_told_of_and_deleted(client: JobSubmissionClient) -> None:
    job = client.submit_job(entrypoint="echo out; echo err >&2", metadata={"team": "a"})
    assert ended(client, job) is JobStatus.SUCCEEDED
    assert client.get_job_logs(job) == "out\nerr\n"
    details = client.get_job_info(job)
    assert (details.submission_id, details.type, details.metadata) == (job, JobType.SUBMISSION, {"team": "a"})
    assert (details.entrypoint, details.message) == ("echo out; echo err >&2", "The job has finished successfully.")
    assert details.start_time is not None
    assert details.end_time is not None
    assert details.start_time <= details.end_time
    assert details in client.list_jobs()
    assert details.job_id is not None
    assert client.get_job_info(details.job_id) == details
    assert client.stop_job(job) is False
    assert client.delete_job(job) is True
    assert job not in [one.submission_id for one in client.list_jobs()]
    with pytest.raises(RuntimeError, match="does not exist"):
        client.get_job_logs(job)
    assert client.submit_job(entrypoint="true", submission_id=job) == job, "its id is free again"
    assert ended(client, job) is JobStatus.SUCCEEDED
    assert [one.start_time for one in client.list_jobs() if one.submission_id == job] == [
        client.get_job_info(job).start_time
    ], "the deleted one is not listed again"


def test_a_program_that_fails_fails_its_job(client: JobSubmissionClient) -> None:
    commands = ("exit 3", "kill -KILL $$", "no-such-command", "kill -INT $$")
    jobs = [client.submit_job(entrypoint=command) for command in commands]
    assert {ended(client, job) for job in jobs} == {JobStatus.FAILED}
    messages = [client.get_job_info(job).message or "" for job in jobs]
    assert "exit code 3" in messages[0]
    assert "signal 9" in messages[1]
    assert "exit code 127" in messages[2]
    assert "signal 2" in messages[3], "programs hear what worker processes ignore"
    assert [client.get_job_info(job).driver_exit_code for job in jobs] == [3, -9, 127, -2]
    assert "no-such-command" in client.get_job_logs(jobs[2])


def test_an_id_that_is_not_known_is_an_error(client: JobSubmissionClient) -> None:
    for ask in (client.get_job_status, client.get_job_info, client.get_job_logs, client.stop_job, client.delete_job):
        for name in ("unknown", "not an id of anything", "00ffffff"):
            with pytest.raises(RuntimeError, match="does not exist"):
                ask(name)
    own = shoal.get_runtime_context().get_job_id()
    assert client.get_job_info(own).type is JobType.DRIVER
    with pytest.raises(RuntimeError, match="was not submitted"):
        client.stop_job(own)


def test_a_driver_in_a_job_has_its_environment_and_metadata(client: JobSubmissionClient, tmp_path: Path) -> None:
    project, library = tmp_path / "project", tmp_path / "library"
    project.mkdir()
    library.mkdir()
    (project / "program.py").write_text(DRIVER)
    (project / "data.txt").write_text("data")
    (library / "helper.py").write_text("NAME = 'helper'")
    job = client.submit_job(
        entrypoint="python program.py",
        runtime_env={
            "working_dir": str(project),
            "py_modules": [str(library / "helper.py")],
            "env_vars": {"KIND": "test"},
        },
        metadata={"team": "a"},
    )
    assert ended(client, job) is JobStatus.SUCCEEDED, client.get_job_logs(job)
    log = client.get_job_logs(job)
    assert f"in: {job} SUBMISSION {{'team': 'a'}}" in log
    assert "task: ['helper', 'test', 'data']" in log
    assert "here: test data" in log
    row, details = state.get_job(job), client.get_job_info(job)
    assert row is not None
    assert details.driver_info is not None
    assert (row.job_id, row.driver_info) == (details.job_id, details.driver_info.model_dump())
    assert [one.job_id for one in state.list_jobs(filters=[("submission_id", "=", job)])] == [row.job_id]


def test_an_environment_that_cannot_be_set_up_fails_the_job(client: JobSubmissionClient) -> None:
    job = client.submit_job(entrypoint="true", runtime_env={"worker_process_setup_hook": "no_such_module.hook"})
    assert ended(client, job) is JobStatus.FAILED
    assert "no_such_module" in (client.get_job_info(job).message or "")


async def test_a_log_is_followed_while_it_is_written(client: JobSubmissionClient, tmp_path: Path) -> None:
    go = tmp_path / "go"
    command = f"echo first; until test -e {go}; do sleep 0.02; done; seq 20000; echo häppy"
    job = client.submit_job(entrypoint=command)
    text = ""
    async with asyncio.timeout(40):
        async for new in client.tail_job_logs(job):
            text += new
            go.touch()
    assert text == "first\n" + "".join(f"{number}\n" for number in range(1, 20001)) + "häppy\n"
    assert client.get_job_logs(job) == text


def test_a_job_is_stopped_with_all_that_it_started(client: JobSubmissionClient) -> None:
    gentle = client.submit_job(entrypoint="sleep 1000 & echo $!; trap 'echo bye; exit 0' TERM; wait")
    stubborn = client.submit_job(entrypoint=STUBBORN)
    slow = client.submit_job(
        entrypoint="(trap 'sleep 0.3; echo saved; exit' TERM; echo begun; while true; do sleep 0.05; done); true"
    )
    printed(client, gentle, "\n")
    printed(client, slow, "begun")
    printed(client, stubborn, "begun")
    with pytest.raises(RuntimeError, match="has not ended"):
        client.delete_job(gentle)
    for job in (gentle, stubborn, slow):
        assert client.stop_job(job) is True
    assert {ended(client, job) for job in (gentle, stubborn, slow)} == {JobStatus.STOPPED}
    assert client.get_job_logs(slow).endswith("saved\n"), "the shell has ended at once, but not what it waited for"
    pid, said = client.get_job_logs(gentle).split()
    assert said == "bye"
    until(lambda: is_gone(int(pid)), "the end of what the job started")


def test_a_job_that_waits_is_stopped_before_it_begins(client: JobSubmissionClient) -> None:
    job = client.submit_job(entrypoint="true", entrypoint_num_cpus=64)
    assert client.get_job_status(job) is JobStatus.PENDING
    assert [one.status for one in client.list_jobs() if one.submission_id == job] == [JobStatus.PENDING]
    until(lambda: bool(state.why(job)["pending"]), "a scheduler that says why")
    assert client.get_job_info(job).message == (
        "The job has not begun: its supervisor waits for a place, or its environment is being set up."
    )
    assert client.stop_job(job) is True
    assert ended(client, job) is JobStatus.STOPPED
    assert "before it began" in (client.get_job_info(job).message or "")


def test_a_program_takes_what_its_entrypoint_asks_for(client: JobSubmissionClient, tmp_path: Path) -> None:
    first = client.submit_job(entrypoint="echo begun; exec sleep 1000", entrypoint_num_cpus=2)
    printed(client, first, "begun")
    second = client.submit_job(entrypoint="true", entrypoint_num_cpus=1)
    third = client.submit_job(entrypoint="true")
    assert ended(client, third) is JobStatus.SUCCEEDED, "it asks for nothing"
    assert client.get_job_status(second) is JobStatus.PENDING
    client.stop_job(first)
    assert ended(client, second) is JobStatus.SUCCEEDED


def test_of_two_clients_that_want_one_id_one_gets_it(client: JobSubmissionClient) -> None:
    outcomes: list[str] = []

    def submit() -> None:
        try:
            outcomes.append(JobSubmissionClient().submit_job(entrypoint="true", submission_id="wanted"))
        except RuntimeError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=submit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("wanted") == 1
    assert sum("exists already" in one for one in outcomes) == 3
    assert ended(client, "wanted") is JobStatus.SUCCEEDED
    assert [one.status for one in client.list_jobs() if one.submission_id == "wanted"] == [JobStatus.SUCCEEDED]


def test_a_supervisor_that_is_killed_takes_its_program_along(client: JobSubmissionClient) -> None:
    job = client.submit_job(entrypoint=f"echo $$; {STUBBORN}")
    printed(client, job, "begun")
    pid = int(client.get_job_logs(job).split()[0])
    os.kill(pid_of_supervisor(job), signal.SIGKILL)
    assert ended(client, job) is JobStatus.FAILED
    assert "its supervisor has died" in (client.get_job_info(job).message or "")
    assert "begun" in client.get_job_logs(job), "the log outlives the supervisor"
    until(lambda: is_gone(pid), "the end of the program")


def test_an_observer_may_ask(client: JobSubmissionClient) -> None:
    job = client.submit_job(entrypoint="echo seen")
    assert ended(client, job) is JobStatus.SUCCEEDED
    host = running_at(runtime().address)
    assert host is not None
    observer = Credentials.from_file(Path(host.credentials_path).with_name("observer.json"))
    watching = JobSubmissionClient(Address(host.address, host.cluster, observer))
    assert watching.get_job_info(job) == client.get_job_info(job)
    assert watching.get_job_logs(job) == "seen\n"


def test_the_commands(tmp_path: Path) -> None:
    credentials = runtime().credentials
    assert credentials is not None
    credentials.to_file(tmp_path / "credentials.json")
    variables = {"SHOAL_ADDRESS": runtime().address, "SHOAL_CREDENTIALS": str(tmp_path / "credentials.json")}

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli.app, ["job", *words], env=variables)
        assert done.exit_code == code, done.output
        return str(done.exception) if isinstance(done.exception, JobSubmissionError) else done.output

    submit = ("submit", "--submission-id", "mine", "--runtime-env-json", '{"env_vars": {"KIND": "a test"}}')
    said = run(*submit, "--", "sh", "-c", 'echo "$KIND"; exit 2', code=2)
    assert "Submitted as mine" in said
    assert "a test\n" in said
    assert "FAILED: The entrypoint failed with exit code 2." in said
    assert "exists already" in run(*submit, "--", "true", code=1)
    assert json.loads(run("status", "mine", "--format", "json"))["status"] == "FAILED"
    assert run("logs", "mine") == run("logs", "mine", "--follow") == "a test\n"
    assert "FAILED" in run("list")
    assert "Deleted" in run("delete", "mine")
    assert "does not exist" in run("status", "mine", code=1)
    run("submit", "--no-wait", "--submission-id", "long", "--", "sleep", "1000")
    assert "STOPPED" in run("stop", "long")


@pytest.fixture
def two_nodes() -> Iterator[Cluster]:
    """Start a cluster of two nodes, of which the second has a place for a job."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def test_a_job_whose_node_dies_has_failed(two_nodes: Cluster) -> None:
    node = two_nodes.add_node(num_cpus=1, resources={"place": 1})
    client = JobSubmissionClient(two_nodes.address)
    job = client.submit_job(entrypoint=f"echo $$; {STUBBORN}", entrypoint_resources={"place": 1})
    printed(client, job, "begun")
    pid = int(client.get_job_logs(job).split()[0])
    two_nodes.remove_node(node, allow_graceful=False)
    assert ended(client, job) is JobStatus.FAILED
    assert "its supervisor has died" in (client.get_job_info(job).message or "")
    assert "begun" in client.get_job_logs(job)
    until(lambda: is_gone(pid), "the end of the program")
