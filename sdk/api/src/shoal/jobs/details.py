"""What is told of a job, in the shapes of ``ray.job_submission``."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel

from shoal.inventory import JobState


class JobStatus(StrEnum):
    """How far a job is. It is PENDING until its supervisor has been placed, and its environment is set up."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"

    def is_terminal(self) -> bool:
        """Tell whether it stays so."""
        return self not in (JobStatus.PENDING, JobStatus.RUNNING)


class JobType(StrEnum):
    """Whether a job was submitted, or is a driver that somebody runs."""

    SUBMISSION = "SUBMISSION"
    DRIVER = "DRIVER"


class DriverInfo(BaseModel):
    """The driver of a job: its process's id, the host, the pid."""

    id: str
    node_ip_address: str
    pid: str


class JobDetails(BaseModel):
    """What is known of a job; times are in milliseconds.

    ``job_id`` is that of the newest driver in a submitted job's program, else of the job itself. Those of another
    ``type`` have no ``submission_id``. ``message`` says how it ended, or for what it waits. ``driver_exit_code`` is
    that of the program (negative: the signal that killed it), None until it has ended, and where nobody saw it end.
    """

    type: JobType
    job_id: str | None
    submission_id: str | None
    driver_info: DriverInfo | None
    status: JobStatus
    entrypoint: str
    message: str | None
    error_type: str | None
    start_time: int | None
    end_time: int | None
    metadata: dict[str, str] | None
    runtime_env: dict[str, Any] | None
    driver_exit_code: int | None


JobInfo = JobDetails
"""An older name of it."""

_MESSAGES = {
    JobStatus.PENDING: "The job has not begun: its supervisor waits for a place, or its environment is being set up.",
    JobStatus.RUNNING: "The job is running.",
}


def details_of(row: JobState) -> JobDetails:
    """Return what is told of a job from its row."""
    details = JobDetails(**row)
    return details.model_copy(update={"message": row.message or _MESSAGES.get(details.status, "")})
