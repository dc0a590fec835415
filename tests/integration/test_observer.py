"""What the credential of an observer is good for: everything there is to see, and no change, on a real broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import shoal
from shoal import cli
from shoal.cluster import running_at
from shoal.exceptions import PermissionViolationError
from shoal.job_submission import JobStatus, JobSubmissionClient
from shoal.session import runtime
from shoal_core.bus import Bus, Credentials, connect
from shoal_core.bus.requests import ask
from shoal_core.protocol.actors import KillActor
from shoal_core.protocol.ids import ActorId
from shoal_core.protocol.messages import KvGet, KvPut, KvValue, ListNodes
from shoal_core.protocol.subjects import Role
from shoal_core.protocol.verbs import GCS_CHANGING
from shoal_core.protocol.wire import encode
from shoal_core.runtime.session import Address
from tests.integration.waiting import get, until

pytestmark = pytest.mark.usefixtures("two_cpus")


class HostClass:
    def lives(self) -> bool:
        return True


Host = shoal.remote(HostClass)


@pytest.fixture
def credentials() -> Path:
    """Return the file that lets an observer into the cluster that the test has joined."""
    host = running_at(runtime().address)
    assert host is not None
    return Path(host.credentials_path).with_name("observer.json")


@asynccontextmanager
async def joined(role: Role, credentials: Path) -> AsyncIterator[Bus]:
    """Join the broker of the test's cluster in a role."""
    proof, cluster = Credentials.from_file(credentials), runtime().subjects.cluster
    async with connect(runtime().address, role=role, identity="looks", cluster=cluster, credentials=proof) as bus:
        yield bus


def observing(credentials: Path) -> AbstractAsyncContextManager[Bus]:
    return joined(Role.OBSERVER, credentials)


@pytest.mark.parametrize("verb", GCS_CHANGING)
async def test_a_verb_that_changes_something_is_refused(credentials: Path, verb: str) -> None:
    async with observing(credentials) as bus:
        with pytest.raises(PermissionViolationError, match=verb):
            await bus.request(runtime().subjects.gcs(verb), b"{}", timeout_seconds=60)


async def test_what_is_refused_does_not_happen(credentials: Path) -> None:
    subjects, host = runtime().subjects, Host.remote()
    assert await host.lives.remote()
    kill = KillActor(actor_id=ActorId(host._actor_id.hex()), reason="at will")
    async with observing(credentials) as bus:
        with pytest.raises(PermissionViolationError):
            await ask(bus, subjects.gcs("kill_actor"), kill)
        with pytest.raises(PermissionViolationError):
            await ask(bus, subjects.gcs("kv_put"), KvPut(namespace="n", key="k", value=b"v"))
        assert await ask(bus, subjects.gcs("kv_get"), KvGet(namespace="n", key="k")) == KvValue(value=None)
    assert await host.lives.remote()


async def test_an_answer_is_not_written_where_only_the_control_store_may_write(credentials: Path) -> None:
    subjects = runtime().subjects
    bucket, list_nodes = subjects.control_bucket(), subjects.gcs("list_nodes")
    async with observing(credentials) as bus, joined(Role.GCS, credentials.with_name("gcs.json")) as gcs:
        for subject in (list_nodes, "$SRV.PING"):
            bus.publish(subject, encode(ListNodes()), reply=f"$KV.{bucket}.forged")
        assert await ask(bus, list_nodes, ListNodes())
        assert await (await gcs.key_value(bucket)).get("forged") is None


@pytest.fixture
def running() -> Iterator[str]:
    """Have a job run, and stop it in the end."""
    client = JobSubmissionClient()
    job = client.submit_job(entrypoint="echo begun; sleep 1000")
    until(lambda: "begun" in client.get_job_logs(job), "it has begun")
    yield job
    client.stop_job(job)
    until(lambda: client.get_job_status(job).is_terminal(), "its end")


def test_jobs_are_seen_and_neither_submitted_nor_stopped(credentials: Path, running: str) -> None:
    where = Address(runtime().address, runtime().subjects.cluster, Credentials.from_file(credentials))
    client, before = JobSubmissionClient(where), JobSubmissionClient().list_jobs()
    with pytest.raises(PermissionViolationError):
        client.submit_job(entrypoint="true")
    with pytest.raises(PermissionViolationError):
        client.stop_job(running)
    assert client.list_jobs() == before
    assert client.get_job_status(running) is JobStatus.RUNNING


def test_the_commands_that_only_look(credentials: Path, running: str, tmp_path: Path) -> None:
    host = Host.remote()
    assert get(host.lives.remote())
    looks = [
        ["status"],
        *(["list", kind] for kind in ("nodes", "jobs", "actors", "tasks", "workers")),
        ["memory"],
        ["why", host._actor_id.hex()],
        ["timeline", str(tmp_path / "timeline.json")],
        ["job", "list"],
        ["job", "status", running],
        ["job", "logs", running],
        ["logs"],
        ["logs", "*.err", "--format", "json"],
        ["logs", "actor", "--id", host._actor_id.hex()],
        ["logs", "job", "--id", running],
    ]
    target = ["--address", runtime().address, "--credentials", str(credentials)]
    for words in looks:
        done = CliRunner().invoke(cli.app, [*words, *target])
        assert done.exit_code == 0, f"{words}: {done.output} {done.exception!r}"
