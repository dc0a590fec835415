"""What there is in a cluster, as rows: its nodes, jobs, actors and processes.

Read-only: an observer may ask. Nodes, jobs and actors are told by the control store, which forgets the oldest of many
that have ended; processes by their nodes, which forget them when they end.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from shoal.jobs.submitted import SUBMISSION_ID, SUPERVISORS
from shoal.memory import ask_all
from shoal.rows import Row
from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.actors import ActorList, ActorRecord, ActorSummary, GetActor, ListActors
from shoal_core.protocol.actors import ActorState as State
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.ids import NO_NODE, ActorId, FunctionId, JobId, NodeId, node_of
from shoal_core.protocol.messages import (
    FunctionPart,
    GetFunctionPart,
    GetJob,
    GetNode,
    JobList,
    JobRecord,
    ListJobs,
    ListNodes,
    NodeList,
    NodeRecord,
)
from shoal_core.protocol.messages import JobState as Progress
from shoal_core.protocol.messages import NodeState as Life
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import to_amounts
from shoal_core.protocol.subjects import Subjects

MOST_ASKED = 32
"""So many records are asked for at a time."""


class NodeState(Row):
    """One node. ``state`` is ALIVE or DEAD, ``state_message`` why it is dead; times are in milliseconds."""

    node_id: str
    node_ip: str
    node_name: str
    state: str
    state_message: str | None
    is_head_node: bool
    resources_total: dict[str, float]
    labels: dict[str, str]
    start_time_ms: int
    end_time_ms: int | None


class JobState(Row):
    """One job. ``status`` is PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED; times are in milliseconds.

    ``type`` is SUBMISSION for one that was submitted, else DRIVER. A submitted job and the newest driver in its program
    are one row, with the ``job_id`` of the driver. A detached actor has a job of its own, whose ``driver_info`` is
    None. ``driver_exit_code`` is that of a submitted job's program (negative: the signal that killed it), None until it
    has ended. ``error_type`` is always None.
    """

    job_id: str
    submission_id: str | None
    type: str
    status: str
    entrypoint: str
    message: str
    error_type: str | None
    start_time: int
    end_time: int | None
    metadata: dict[str, str]
    runtime_env: dict[str, Any]
    driver_info: dict[str, Any] | None
    driver_exit_code: int | None


class ActorState(Row):
    """One actor. ``state`` is PENDING_CREATION, ALIVE, RESTARTING or DEAD.

    With ``detail`` the last four are told too, else they are None. ``repr_name`` is what the class's own ``__repr__``
    returned when the actor was made, on one line; "" where it has none, or was not made yet.
    """

    actor_id: str
    class_name: str
    state: str
    job_id: str
    name: str
    node_id: str | None
    pid: int
    ray_namespace: str
    is_detached: bool
    num_restarts: int
    death_cause: dict[str, Any] | None
    required_resources: dict[str, float] | None
    placement_group_id: str | None
    serialized_runtime_env: str | None
    repr_name: str | None


class WorkerState(Row):
    """One process that lives. ``worker_type`` is WORKER or DRIVER; a driver without a node has no ``node_id``."""

    worker_id: str
    is_alive: bool
    worker_type: str
    job_id: str
    node_id: str | None
    ip: str
    pid: int


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


# ------------------------------------------------------------------------------------ nodes


async def list_nodes(bus: Bus, subjects: Subjects, timeout_seconds: float) -> list[NodeState]:
    """Return a row for each node, oldest first."""
    answer = await ask(bus, subjects.gcs("list_nodes"), ListNodes(), timeout_seconds)
    assert isinstance(answer, NodeList)
    return [_node(record) for record in answer.nodes]


async def get_node(bus: Bus, subjects: Subjects, node_id: str, timeout_seconds: float) -> NodeState | None:
    """Return the row of a node; None where none of this id is known."""
    try:
        answer = await ask(bus, subjects.gcs("get_node"), GetNode(node_id=NodeId(node_id)), timeout_seconds)
    except NotFoundError:
        return None
    assert isinstance(answer, NodeRecord)
    return _node(answer)


def _node(record: NodeRecord) -> NodeState:
    about = record.description
    return NodeState(
        {
            "node_id": about.node_id,
            "node_ip": about.address,
            "node_name": about.name or about.hostname,
            "state": record.state.value,
            "state_message": record.death_reason or None,
            "is_head_node": about.is_head,
            "resources_total": to_amounts(about.total) if record.state is Life.ALIVE else {},
            "labels": dict(about.labels),
            "start_time_ms": _milliseconds(about.started_at),
            "end_time_ms": _milliseconds(record.ended_at),
        }
    )


# ------------------------------------------------------------------------------------ jobs


async def list_jobs(bus: Bus, subjects: Subjects, timeout_seconds: float) -> list[JobState]:
    """Return a row for each job, oldest first."""
    return await job_rows(bus, subjects, await read_jobs(bus, subjects, timeout_seconds), timeout_seconds)


async def job_rows(
    bus: Bus, subjects: Subjects, records: Sequence[JobRecord], timeout_seconds: float
) -> list[JobState]:
    """Return the rows that records of jobs amount to."""
    drivers = newest_drivers(records)
    shown_above = {driver.job_id for driver in drivers.values()}
    waiting = await _waiting_supervisors(bus, subjects, records, timeout_seconds)
    return [
        job_row(record, drivers.get(record.job_id), waits=record.actor in waiting)
        for record in records
        if record.job_id not in shown_above
    ]


def newest_drivers(records: Sequence[JobRecord]) -> dict[JobId, JobRecord]:
    """Return the newest of the jobs that drivers in the program of each submitted one have opened.

    A submission id may have been used before, so a driver is one of the job that ran when it came.
    """
    submitted: dict[str, list[JobRecord]] = {}
    for record in records:
        if record.submission_id:
            submitted.setdefault(record.submission_id, []).append(record)
    return {
        job.job_id: driver
        for driver in records
        if driver.actor is None
        for job in submitted.get(driver.config.metadata.get(SUBMISSION_ID, ""), ())
        if job.started_at <= driver.started_at <= (job.ended_at or math.inf)
    }


async def _waiting_supervisors(
    bus: Bus, subjects: Subjects, records: Iterable[JobRecord], timeout_seconds: float
) -> set[ActorId | None]:
    """Return the supervisors that have not begun."""
    if not any(record.submission_id and record.state is Progress.RUNNING for record in records):
        return set()
    answer = await ask(bus, subjects.gcs("list_actors"), ListActors(namespace=SUPERVISORS), timeout_seconds)
    assert isinstance(answer, ActorList)
    return {actor.actor_id for actor in answer.actors if actor.state is State.PENDING_CREATION}


async def get_job(bus: Bus, subjects: Subjects, job_id: str, timeout_seconds: float) -> JobState | None:
    """Return the row of a job, by its id or as a submitted one; None where nothing is known of it."""
    for row in reversed(await list_jobs(bus, subjects, timeout_seconds)):
        if job_id in (row.job_id, row.submission_id):
            return row
    try:
        answer = await ask(bus, subjects.gcs("get_job"), GetJob(job_id=JobId(job_id)), timeout_seconds)
    except NotFoundError:
        return None
    assert isinstance(answer, JobRecord)
    return job_row(answer)


async def read_jobs(bus: Bus, subjects: Subjects, timeout_seconds: float) -> list[JobRecord]:
    """Return the records of all jobs, oldest first; of many that ended only the newest."""
    answer = await ask(bus, subjects.gcs("list_jobs"), ListJobs(), timeout_seconds)
    assert isinstance(answer, JobList)
    return answer.jobs


def job_row(record: JobRecord, driver: JobRecord | None = None, *, waits: bool = False) -> JobState:
    """Return the row of a job; of a submitted one with the ``driver`` in its program, and whether it has not begun."""
    if driver is None and record.actor is None:
        driver = record
    submission = record.submission_id or record.config.metadata.get(SUBMISSION_ID)
    return JobState(
        {
            "job_id": record.job_id if driver is None else driver.job_id,
            "submission_id": submission,
            "type": "SUBMISSION" if submission else "DRIVER",
            "status": "PENDING" if waits and record.state is Progress.RUNNING else record.state.value,
            "entrypoint": record.entrypoint,
            "message": record.message,
            "error_type": None,
            "start_time": _milliseconds(record.started_at),
            "end_time": _milliseconds(record.ended_at),
            "metadata": dict(record.config.metadata),
            "runtime_env": json.loads(record.config.runtime_env or "{}"),
            "driver_info": None if driver is None else _driver_info(driver),
            "driver_exit_code": record.exit_code,
        }
    )


def _driver_info(record: JobRecord) -> dict[str, str]:
    return {"id": record.driver, "node_ip_address": record.hostname, "pid": str(record.pid)}


# ------------------------------------------------------------------------------------ actors


async def list_actors(bus: Bus, subjects: Subjects, timeout_seconds: float) -> list[ActorState]:
    """Return a row for each actor, oldest first."""
    answer = await ask(bus, subjects.gcs("list_actors"), ListActors(), timeout_seconds)
    assert isinstance(answer, ActorList)
    return [_actor(summary) for summary in answer.actors]


async def describe_actors(
    bus: Bus, subjects: Subjects, rows: list[ActorState], timeout_seconds: float
) -> list[ActorState]:
    """Return rows with everything that is known of their actors; one that is forgotten meanwhile stays as it is."""
    gate = asyncio.Semaphore(MOST_ASKED)

    async def describe(row: ActorState) -> ActorState:
        async with gate:
            return await get_actor(bus, subjects, row.actor_id, timeout_seconds) or row

    return list(await asyncio.gather(*map(describe, rows)))


async def get_actor(bus: Bus, subjects: Subjects, actor_id: str, timeout_seconds: float) -> ActorState | None:
    """Return the row of an actor, with everything that is known of it; None where none of this id is known."""
    try:
        answer = await ask(bus, subjects.gcs("get_actor"), GetActor(actor_id=ActorId(actor_id)), timeout_seconds)
    except NotFoundError:
        return None
    assert isinstance(answer, ActorRecord)
    about = answer.description
    environment = await _environment(bus, subjects, about.job_id, about.environment, timeout_seconds)
    return _actor_in_detail(answer, environment)


async def _environment(bus: Bus, subjects: Subjects, job: JobId, digest: str, timeout_seconds: float) -> str:
    """Return a runtime environment as JSON; it goes with its job."""
    if not digest:
        return "{}"
    request = GetFunctionPart(job_id=job, function_id=FunctionId(digest), part=0)
    try:
        answer = await ask(bus, subjects.gcs("get_function"), request, timeout_seconds)
    except NotFoundError:
        return "{}"
    assert isinstance(answer, FunctionPart)
    return answer.data.decode()


def _actor(summary: ActorSummary) -> ActorState:
    return ActorState(
        {
            "actor_id": summary.actor_id,
            "class_name": summary.class_name,
            "state": summary.state.value,
            "job_id": summary.job_id,
            "name": summary.name,
            "node_id": summary.node_id,
            "pid": summary.pid,
            "ray_namespace": summary.namespace,
            "is_detached": summary.detached,
            "num_restarts": summary.restarts,
            "death_cause": {"error_message": summary.death_reason} if summary.state is State.DEAD else None,
            "required_resources": None,
            "placement_group_id": None,
            "serialized_runtime_env": None,
            "repr_name": None,
        }
    )


def _actor_in_detail(record: ActorRecord, environment: str) -> ActorState:
    about = record.description
    summary = ActorSummary(
        actor_id=about.actor_id,
        job_id=about.job_id,
        class_name=about.class_name,
        name=about.name,
        namespace=about.namespace,
        state=record.state,
        node_id=record.node_id,
        pid=record.pid,
        restarts=record.incarnation,
        detached=about.detached,
        death_reason=record.death.reason if record.death is not None else "",
    )
    return ActorState(
        {
            **_actor(summary),
            "required_resources": to_amounts(about.resources),
            "placement_group_id": about.strategy.group if isinstance(about.strategy, Bundle) else None,
            "serialized_runtime_env": environment,
            "repr_name": record.repr_name,
        }
    )


# ------------------------------------------------------------------------------------ processes


async def list_workers(bus: Bus, subjects: Subjects, timeout_seconds: float) -> tuple[list[WorkerState], str]:
    """Return a row for each process that lives, and who did not answer in time, in words ("": everybody did)."""
    seen = await ask_all(bus, subjects, 0, timeout_seconds)
    rows = [
        WorkerState(
            {
                "worker_id": process.process_id,
                "is_alive": True,
                "worker_type": process.kind,
                "job_id": process.job_id,
                "node_id": node.description.node_id,
                "ip": node.description.address,
                "pid": process.pid,
            }
        )
        for node in seen.nodes
        for process in node.objects.processes
    ]
    for job in await read_jobs(bus, subjects, timeout_seconds):
        if job.driver in seen.unreached_drivers and node_of(job.driver) == NO_NODE:
            rows.append(_lone_driver(job))
    silent = [f"node {node}" for node in seen.silent_nodes] + [f"process {one}" for one in seen.silent_processes]
    return sorted(rows, key=lambda row: row.worker_id), ", ".join(silent)


def _lone_driver(job: JobRecord) -> WorkerState:
    return WorkerState(
        {
            "worker_id": job.driver,
            "is_alive": True,
            "worker_type": "DRIVER",
            "job_id": job.job_id,
            "node_id": None,
            "ip": job.hostname,
            "pid": job.pid,
        }
    )
