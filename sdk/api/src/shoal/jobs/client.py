"""The client of submitted jobs, which joins no cluster, and opens a connection for each call."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from shoal.actor_options import check_actor, resolve_actor
from shoal.environments import pack
from shoal.job_config import JobConfig
from shoal.jobs.details import JobDetails, JobStatus, details_of
from shoal.jobs.submissions import Submission, Submissions
from shoal.session import find_cluster
from shoal_core.bus import connect
from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.ids import new_process_id
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.session import Address, check_cluster

MOST_NAME_CHARACTERS = 128
MOST_TEXT_BYTES = 32 * 1024
"""So long an entrypoint may be, and all metadata together: they are in the job's record."""

T = TypeVar("T")


class JobSubmissionClient:
    """Submits jobs to a cluster, and asks about them.

    ``address`` is as in ``init``, or an ``Address`` that says how to get in. None or "auto" is the cluster that this
    process has joined, else that of ``SHOAL_ADDRESS``, else that of ``shoal up``. So is the address of a dashboard
    ("http://…"), which Shoal has not. The other parameters are Ray's, and mean nothing here. Raises
    ``ClusterUnreachableError`` and the other ``ConnectionError`` of ``init`` where there is no cluster.

    An id that is not known is a ``RuntimeError`` ("… does not exist") of each method.
    """

    def __init__(
        self,
        address: str | Address | None = None,
        create_cluster_if_needed: bool = False,
        cookies: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        headers: Mapping[str, Any] | None = None,
        verify: str | bool | None = True,
    ) -> None:
        self._where = address if isinstance(address, Address) else _find(address)

        async def nothing(_jobs: Submissions) -> None:
            return

        self._call(nothing)

    def submit_job(
        self,
        *,
        entrypoint: str,
        job_id: str | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
        submission_id: str | None = None,
        entrypoint_num_cpus: float | None = None,
        entrypoint_num_gpus: float | None = None,
        entrypoint_memory: int | None = None,
        entrypoint_resources: Mapping[str, float] | None = None,
        entrypoint_label_selector: Mapping[str, str] | None = None,
    ) -> str:
        """Have a shell command run on some node of the cluster, and return its submission id at once.

        ``python`` in it is the node's interpreter. What it prints is the job's log. A driver in it joins this cluster,
        and has the job's ``runtime_env`` and ``metadata``. ``submission_id`` (``job_id`` is its old name) is drawn
        where it is left out. The ``entrypoint_…`` are what the command itself takes while it runs, nothing by default.

        Raises ``TypeError`` and ``ValueError`` for what is wrong, ``RuntimeEnvSetupError`` for an environment that
        cannot be packed, and ``RuntimeError`` where there is a job of this id.
        """
        options = {
            "num_cpus": entrypoint_num_cpus or 0,
            "num_gpus": entrypoint_num_gpus,
            "memory": entrypoint_memory,
            "resources": None if entrypoint_resources is None else dict(entrypoint_resources),
            "label_selector": entrypoint_label_selector,
        }
        check_actor(options)
        asked = resolve_actor(options)
        config = JobConfig(metadata=metadata)
        submission = Submission(
            submission_id=_name(submission_id or job_id),
            entrypoint=_text("entrypoint", entrypoint),
            environment=pack(runtime_env),
            metadata=config.metadata,
            resources=asked.placement,
            strategy=asked.strategy,
        )
        _check_size("metadata", "".join([*config.metadata, *config.metadata.values()]))
        self._call(lambda jobs: jobs.submit(submission))
        return submission.submission_id

    def get_job_status(self, job_id: str) -> JobStatus:
        """Return how far a job is."""
        return JobStatus(self._call(lambda jobs: jobs.status(job_id)))

    def get_job_info(self, job_id: str) -> JobDetails:
        """Return what is known of a job."""
        return details_of(self._call(lambda jobs: jobs.describe(job_id)))

    def list_jobs(self) -> list[JobDetails]:
        """Return what is known of all jobs, oldest first, drivers that nobody submitted among them."""
        return [details_of(row) for row in self._call(lambda jobs: jobs.rows())]

    def get_job_logs(self, job_id: str) -> str:
        """Return the last 2 MiB of what a job has printed so far."""
        return self._call(lambda jobs: jobs.log(job_id))

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Yield what a job has printed, and then what it prints, some lines at a time, until it has ended."""
        async with self._connected() as jobs:
            async for text in jobs.follow(job_id):
                yield text

    def stop_job(self, job_id: str) -> bool:
        """Have a job stopped, and return at once; False where it has ended already.

        Its processes are asked to end (SIGTERM), and killed after three seconds.
        """
        return self._call(lambda jobs: jobs.stop(job_id))

    def delete_job(self, job_id: str) -> bool:
        """Forget a job and its log; ``RuntimeError`` where it has not ended."""
        self._call(lambda jobs: jobs.delete(job_id))
        return True

    def get_address(self) -> str:
        """Return the address of the cluster."""
        return self._where.address

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Submissions]:
        where, local = self._where, new_process_id()
        async with connect(
            where.address,
            role=_role(where),
            identity=local,
            cluster=where.cluster,
            credentials=where.credentials,
            tls=where.tls,
        ) as bus:
            subjects = Subjects(where.cluster)
            await check_cluster(bus, subjects, where.address)
            yield Submissions(bus, subjects, local)

    def _call(self, ask: Callable[[Submissions], Awaitable[T]]) -> T:
        """Connect, ask, and return the answer; in a thread, since there may be an event loop in this one."""

        async def connected() -> T:
            async with self._connected() as jobs:
                return await ask(jobs)

        with ThreadPoolExecutor(1, thread_name_prefix="shoal-jobs") as thread:
            return thread.submit(asyncio.run, connected()).result()


def _role(where: Address) -> Role:
    """Return the role of the credential, where its user is named after one: an observer may ask, too."""
    user = where.credentials.user if where.credentials is not None else None
    return Role(user) if user in set(Role) else Role.PROCESS


def _find(address: str | None) -> Address:
    if address is not None and address.startswith(("http://", "https://")):
        address = None
    current = Runtime.current
    if address in (None, "auto") and current is not None:
        return Address(current.address, current.subjects.cluster, current.credentials, current.tls)
    where = find_cluster(address or "auto")
    if where is None:
        raise ClusterUnreachableError(f"JobSubmissionClient({address!r}) does not start a cluster; name one that runs.")
    return where


def _name(given: Any) -> str:
    if given is None:
        return f"shoalsubmit_{secrets.token_hex(8)}"
    if not isinstance(given, str):
        raise TypeError(f"submission_id must be a str, got {type(given).__name__}.")
    if len(given) > MOST_NAME_CHARACTERS:
        raise ValueError(f"submission_id must have at most {MOST_NAME_CHARACTERS} characters, got {len(given)}.")
    return given


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise TypeError(f"{name} must be a str, got {type(given).__name__}.")
    if not given.strip():
        raise ValueError(f"{name} must not be empty: it is the command that the job runs.")
    _check_size(name, given)
    return given


def _check_size(name: str, text: str) -> None:
    if len(text.encode()) > MOST_TEXT_BYTES:
        raise ValueError(f"{name} must have at most {MOST_TEXT_BYTES:,} bytes, got {len(text.encode()):,}.")
