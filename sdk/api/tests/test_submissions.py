"""Submitting, as the control store sees it: what is asked in which order, and what is undone where it fails."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.environments import Packed
from shoal.jobs import submissions
from shoal.jobs.submissions import IDS, JobSubmissionError, Submission, Submissions
from shoal.jobs.supervisor import LOGS
from shoal_core.protocol.actors import CreateActor
from shoal_core.protocol.errors import ServiceError
from shoal_core.protocol.ids import JobId, ProcessId
from shoal_core.protocol.messages import (
    Done,
    FinishJob,
    JobConfig,
    JobRecord,
    JobState,
    KvAdded,
    KvDelete,
    KvDeleted,
    KvGet,
    KvKeyList,
    KvKeys,
    KvPut,
    KvValue,
    Message,
    RegisterJob,
)
from shoal_core.protocol.subjects import Subjects

JOB = JobId("00000007")


class Control:
    """A control store that keeps keys, opens one job, and notes what was asked."""

    def __init__(self) -> None:
        self.keys: dict[tuple[str, str], bytes] = {}
        self.asked: list[Message] = []
        self.other: bytes | None = None
        self.refuses: type[Message] | None = None

    async def ask(self, bus: Any, subject: str, message: Message, timeout_seconds: float) -> Message:
        self.asked.append(message)
        if type(message) is self.refuses:
            raise ServiceError("the disk is full")
        match message:
            case RegisterJob():
                return _record(message)
            case KvPut():
                key = (message.namespace, message.key)
                self.keys.setdefault(key, self.other or message.value)
                return KvAdded(added=False)
            case KvGet():
                return KvValue(value=self.keys.get((message.namespace, message.key)))
            case KvKeys():
                return KvKeyList(keys=[key for space, key in self.keys if space == message.namespace])
            case KvDelete():
                gone = [key for key in self.keys if key[0] == message.namespace and key[1].startswith(message.key)]
                for key in gone:
                    del self.keys[key]
                return KvDeleted(count=len(gone))
        return Done()

    def ends(self) -> list[tuple[JobId, JobState]]:
        """Return which jobs were ended, and how."""
        return [(one.job_id, one.state) for one in self.asked if isinstance(one, FinishJob)]

    def created(self) -> bool:
        """Tell whether a supervisor was asked for."""
        return any(isinstance(one, CreateActor) for one in self.asked)


def _record(message: RegisterJob) -> JobRecord:
    return JobRecord(
        job_id=JOB,
        driver=message.driver,
        hostname="here",
        machine_id="m",
        pid=0,
        entrypoint=message.entrypoint,
        config=JobConfig(namespace="n"),
        state=JobState.RUNNING,
        started_at=0.0,
    )


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> Control:
    control = Control()
    monkeypatch.setattr(submissions, "ask", control.ask)
    return control


def jobs() -> Submissions:
    bus: Any = None
    return Submissions(bus, Subjects("c"), ProcessId("0" * 24))


SUBMISSION = Submission("train", "true")


async def test_an_id_that_is_ours_after_a_second_attempt_is_ours(control: Control) -> None:
    await jobs().submit(SUBMISSION)
    assert control.created()
    assert control.keys[IDS, "train"] == JOB.encode()
    assert control.ends() == []


async def test_an_id_that_is_taken_is_refused_before_anything_is_made(control: Control) -> None:
    control.keys[IDS, "train"] = b"00000001"
    with pytest.raises(JobSubmissionError, match="train exists already"):
        await jobs().submit(SUBMISSION)
    assert len(control.asked) == 1


async def test_who_comes_second_has_its_job_ended(control: Control) -> None:
    control.other = b"00000001"
    with pytest.raises(JobSubmissionError, match="train exists already"):
        await jobs().submit(SUBMISSION)
    assert control.ends() == [(JOB, JobState.FAILED)]
    assert not control.created()


async def test_a_job_whose_supervisor_cannot_be_asked_for_ends(control: Control) -> None:
    control.refuses = CreateActor
    with pytest.raises(ServiceError, match="the disk is full"):
        await jobs().submit(SUBMISSION)
    assert control.ends() == [(JOB, JobState.FAILED)]


async def test_an_environment_that_is_too_large_is_refused_before_anything_is_made(control: Control) -> None:
    with pytest.raises(ValueError, match="as JSON"):
        await jobs().submit(Submission("train", "true", Packed({"env_vars": {"A": "x" * 600_000}})))
    assert control.asked == []


async def test_the_logs_of_old_jobs_are_forgotten(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions, "MOST_LOGS", 2)
    for job in ("0000000a", "00000009", "00000002", "00000001"):
        control.keys[LOGS, f"{job}/0"] = control.keys[LOGS, f"{job}/1"] = b""
    await jobs().submit(SUBMISSION)
    assert {key.partition("/")[0] for space, key in control.keys if space == LOGS} == {"00000009", "0000000a"}
