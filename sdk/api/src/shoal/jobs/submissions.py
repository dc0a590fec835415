"""Submitted jobs: programs that the cluster runs by itself.

A submitted job is a job of the control store (``JobRecord.submission_id``) that has no driver but an actor, its
*supervisor*, which is placed and claimed like any other and runs the program (``shoal.jobs.supervisor``).

1. Whoever submits opens the job, and takes its submission id: a key of the internal key-value store that is put only
   where there is none. Who takes it second has its job ended again. Packages are stored in the job; last the actor is
   created. A job whose actor is not created within a minute ends by itself.
2. PENDING is a job that runs and whose supervisor has not been made yet. The program begins when it is made.
3. The supervisor stores the log, and ends the job when the program has ended. That is one compare-and-set out of
   RUNNING. If the supervisor dies before, or its node, the control store ends the job as FAILED.
4. A job that is PENDING is stopped by ending it. Of one that runs its stop is noted under a key, and an event says so;
   the supervisor hears the event, and looks for the note if it may have missed that.
5. What is left of a job that has ended is its record, which stays, and the log, kept of the last ``MOST_LOGS`` jobs.
   Deleting removes the log and frees the submission id.
"""

from __future__ import annotations

import asyncio
import codecs
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from shoal.environments import Packed
from shoal.inventory import MOST_ASKED, JobState, job_row, job_rows, newest_drivers, read_jobs
from shoal.jobs.log import Piece, Reading, whole
from shoal.jobs.submitted import SUBMISSION_ID, SUPERVISORS
from shoal.jobs.supervisor import LOGS, STOPS, Supervisor
from shoal.logs import FOLLOW_SECONDS, last_lines
from shoal_core import __version__
from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.machine import machine_id
from shoal_core.protocol.actors import ActorDescription, ActorRecord, ActorState, CreateActor, GetActor
from shoal_core.protocol.errors import NotFoundError, RequestRefusedError, ShoalError
from shoal_core.protocol.ids import ActorId, JobId, ObjectKey, ProcessId, actor_id
from shoal_core.protocol.messages import (
    FinishJob,
    GetJob,
    JobConfig,
    JobRecord,
    KvDelete,
    KvGet,
    KvKeyList,
    KvKeys,
    KvPut,
    KvValue,
    Message,
    RegisterJob,
    StopJob,
)
from shoal_core.protocol.messages import JobState as Progress
from shoal_core.protocol.placement import DEFAULT, Strategy
from shoal_core.protocol.records import Inline
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.subjects import Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.environments import encoded, shown
from shoal_core.runtime.tasks.functions import Definition, Exported, FunctionStore, export
from shoal_core.runtime.worker.hosting import ActorSpec

IDS = "shoal.submissions"
"""Where in the internal key-value store the job of each submission id is."""
MOST_LOGS = 200
REQUEST_SECONDS = 10.0


class JobSubmissionError(ShoalError, RuntimeError):
    """What was asked about a submitted job cannot be done; the text says why."""


@dataclass(frozen=True)
class Submission:
    """What is to be run: a shell command, and what its supervisor is placed by."""

    submission_id: str
    entrypoint: str
    environment: Packed = field(default_factory=lambda: Packed({}))
    metadata: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=dict)
    strategy: Strategy = DEFAULT


class Submissions:
    """The submitted jobs of a cluster, for the process that is connected to it as ``local``."""

    def __init__(self, bus: Bus, subjects: Subjects, local: ProcessId) -> None:
        self._bus = bus
        self._subjects = subjects
        self._local = local

    # ------------------------------------------------------------------------------- submitting

    async def submit(self, submission: Submission) -> None:
        """Have a job run; returns when the control store has recorded it.

        Raises ``JobSubmissionError`` where its id is taken, ``ValueError`` where its environment is too large.
        """
        name, environment = submission.submission_id, encoded(submission.environment.fields)
        taken = JobSubmissionError(f"Job {name} exists already. Choose another submission_id, or delete that job.")
        if await self._value(IDS, name) is not None:
            raise taken
        supervisor = actor_id(self._local, 1)
        job = await self._open(submission, supervisor)
        try:
            await self._ask("kv_put", KvPut(namespace=IDS, key=name, value=job.encode(), overwrite=False))
            if await self._value(IDS, name) != job.encode():  # what was answered may be to a second attempt of ours
                raise taken
            await self._forget_old_logs()
            await self._create(submission, supervisor, job, environment)
        except ShoalError as error:
            await self._ask("finish_job", FinishJob(job_id=job, state=Progress.FAILED, message=str(error)))
            raise

    async def _open(self, submission: Submission, supervisor: ActorId) -> JobId:
        request = RegisterJob(
            driver=ProcessId(supervisor),
            actor=supervisor,
            submission_id=submission.submission_id,
            hostname=socket.gethostname(),
            machine_id=machine_id(),
            pid=0,
            entrypoint=submission.entrypoint,
            version=__version__,
            python_version="",
            config=JobConfig(
                namespace=SUPERVISORS,
                runtime_env=shown(submission.environment.fields),
                metadata=dict(submission.metadata),
            ),
        )
        job = await self._ask("register_job", request)
        assert isinstance(job, JobRecord)
        return job.job_id

    async def _create(
        self, submission: Submission, supervisor: ActorId, job: JobId, environment: Exported | None
    ) -> None:
        """Store what the supervisor needs in its job, and create it."""
        functions, code = FunctionStore(self._bus, self._subjects), export(Definition(Supervisor))
        for part in (*submission.environment.exports, *([] if environment is None else [environment])):
            await functions.upload(job, part)
        description = ActorDescription(
            actor_id=supervisor,
            job_id=job,
            owner=self._local,
            owner_key=ObjectKey(0),
            class_name=submission.submission_id,  # under which `shoal why` finds what it waits for
            namespace=SUPERVISORS,
            detached=True,
            placement=submission.resources,
            resources=submission.resources,
            strategy=submission.strategy,
            environment="" if environment is None else environment.function_id,
        )
        spec = ActorSpec(code.function_id, Inline(b""), code=code.data)
        await self._ask("create_actor", CreateActor(description=description, spec=msgspec.msgpack.encode(spec)))

    async def _forget_old_logs(self) -> None:
        """Remove the logs of all but the last jobs, whose ids count up."""
        jobs = sorted({key.partition("/")[0] for key in await self._keys(LOGS)})
        for job in jobs[:-MOST_LOGS]:
            await self._ask("kv_delete", KvDelete(namespace=LOGS, key=f"{job}/", prefix=True))

    # ------------------------------------------------------------------------------- asking

    async def status(self, name: str) -> str:
        """Return how far a job is."""
        record = await self._find(name)
        return job_row(record, waits=await self._waits(record)).status

    async def describe(self, name: str) -> JobState:
        """Return the row of a job, by its submission id or the id of a driver's job."""
        record = await self._find(name)
        drivers = newest_drivers(await read_jobs(self._bus, self._subjects, REQUEST_SECONDS))
        return job_row(record, drivers.get(record.job_id), waits=await self._waits(record))

    async def rows(self) -> list[JobState]:
        """Return the rows of all jobs, oldest first, but of those submitted ones that were deleted."""
        records = await read_jobs(self._bus, self._subjects, REQUEST_SECONDS)
        owners = await self._owners({of for record in records if (of := _submission_of(record))})
        kept = [record for record in records if _is_known(record, owners)]
        return await job_rows(self._bus, self._subjects, kept, REQUEST_SECONDS)

    async def _owners(self, names: Iterable[str]) -> dict[str, JobId | None]:
        """Return the job that has each of these submission ids; None where it is free."""
        gate = asyncio.Semaphore(MOST_ASKED)

        async def owner(name: str) -> tuple[str, JobId | None]:
            async with gate:
                job = await self._value(IDS, name)
            return name, None if job is None else JobId(job.decode())

        return dict(await asyncio.gather(*map(owner, names)))

    async def _find(self, name: str) -> JobRecord:
        """Return the record of a job by its submission id, or by the id of a job. Raises where there is none of it."""
        job = await self._value(IDS, name)
        try:
            record = await self._record(JobId(name if job is None else job.decode()))
        except RequestRefusedError:
            raise JobSubmissionError(f"Job {name} does not exist.") from None
        of = "" if record.submission_id else _submission_of(record)
        above = await self._value(IDS, of) if of else None
        return record if above is None else await self._record(JobId(above.decode()))

    async def _record(self, job: JobId) -> JobRecord:
        record = await self._ask("get_job", GetJob(job_id=job))
        assert isinstance(record, JobRecord)
        return record

    async def _submitted(self, name: str) -> JobRecord:
        """Return the record of a submitted job."""
        record = await self._find(name)
        if not record.submission_id:
            raise JobSubmissionError(f"Job {name} was not submitted: it is a driver, and ends with its own process.")
        return record

    async def _waits(self, record: JobRecord) -> bool:
        """Tell whether the supervisor of a job has not begun."""
        if record.actor is None or record.state is not Progress.RUNNING:
            return False
        try:
            actor = await self._ask("get_actor", GetActor(actor_id=record.actor))
        except NotFoundError:
            return True
        assert isinstance(actor, ActorRecord)
        return actor.state is ActorState.PENDING_CREATION

    # ------------------------------------------------------------------------------- ending

    async def stop(self, name: str) -> bool:
        """Have a job stopped, and return at once; tell whether it had not ended already."""
        record = await self._submitted(name)
        if record.state is not Progress.RUNNING:
            return False
        job = record.job_id
        if await self._waits(record):
            end = FinishJob(job_id=job, state=Progress.STOPPED, message="The job was stopped before it began.")
            await self._ask("finish_job", end)
            return True
        await self._ask("kv_put", KvPut(namespace=STOPS, key=job, value=b"stop"))
        self._bus.publish(self._subjects.job_stop(self._local, job), encode(StopJob(job_id=job)))
        await self._bus.flush()
        return True

    async def delete(self, name: str) -> None:
        """Forget a job that has ended, and its log. Raises where it has not ended."""
        record = await self._submitted(name)
        if record.state is Progress.RUNNING:
            raise JobSubmissionError(f"Job {name} has not ended, and so cannot be deleted. Stop it before.")
        await self._ask("kv_delete", KvDelete(namespace=LOGS, key=f"{record.job_id}/", prefix=True))
        await self._ask("kv_delete", KvDelete(namespace=STOPS, key=record.job_id))
        await self._ask("kv_delete", KvDelete(namespace=IDS, key=record.submission_id))

    # ------------------------------------------------------------------------------- logs

    async def log(self, name: str) -> str:
        """Return what is kept of what a job has printed."""
        job = (await self._submitted(name)).job_id
        keys = await self._keys(LOGS, f"{job}/")
        stored = await asyncio.gather(*(self._value(LOGS, key) for key in keys))
        return whole(Piece.decode(one) for one in stored if one is not None).decode(errors="replace")

    async def follow(self, name: str) -> AsyncIterator[str]:
        """Yield what a job has printed and prints, until it has ended."""
        reader, decoder = await self.reader(name), codecs.getincrementaldecoder("utf-8")(errors="replace")
        while (new := await reader.read()) is not None:
            if text := decoder.decode(new):
                yield text
            if not new:
                await asyncio.sleep(FOLLOW_SECONDS)

    async def reader(self, name: str) -> JobLogReader:
        """Return who reads the log of a job, from its beginning on."""
        return JobLogReader(self, (await self._submitted(name)).job_id)

    async def has_ended(self, job: JobId) -> bool:
        """Tell whether a job has ended."""
        return (await self._record(job)).state is not Progress.RUNNING

    async def read_on(self, job: JobId, reading: Reading) -> bytes:
        """Return what follows what was read of a job's log, as far as it is there."""
        stored = await self._value(LOGS, f"{job}/{reading.slot}")
        return b"" if stored is None else reading.read(Piece.decode(stored))

    # ------------------------------------------------------------------------------- the control store

    async def _ask(self, verb: str, message: Message) -> Message:
        return await ask(self._bus, self._subjects.gcs(verb), message, REQUEST_SECONDS)

    async def _value(self, namespace: str, key: str) -> bytes | None:
        answer = await self._ask("kv_get", KvGet(namespace=namespace, key=key))
        assert isinstance(answer, KvValue)
        return answer.value

    async def _keys(self, namespace: str, prefix: str = "") -> list[str]:
        answer = await self._ask("kv_keys", KvKeys(namespace=namespace, prefix=prefix))
        assert isinstance(answer, KvKeyList)
        return answer.keys


class JobLogReader:
    """Reads the log of a submitted job (a ``logs.Reader``)."""

    def __init__(self, jobs: Submissions, job: JobId) -> None:
        self._jobs = jobs
        self._job = job
        self._reading = Reading()
        self._has_ended = False
        self._unread = b""

    async def start(self, lines: int) -> None:
        """Begin with the last lines; less than 0: with the first that is kept."""
        text = b""
        while lines >= 0 and (new := await self._jobs.read_on(self._job, self._reading)):
            text += new
        self._unread = last_lines(text, lines)

    async def read(self) -> bytes | None:
        """Return what follows; empty where nothing has come yet, None where nothing ever will."""
        if self._unread:
            unread, self._unread = self._unread, b""
            return unread
        new = await self._jobs.read_on(self._job, self._reading)
        if not new and not self._has_ended and await self._jobs.has_ended(self._job):
            self._has_ended = True
            new = await self._jobs.read_on(self._job, self._reading)  # its last words are stored before its end
        return new or (None if self._has_ended else b"")


def _submission_of(record: JobRecord) -> str:
    """Return the submission id of a submitted job, or of the one that a driver is in; empty for others."""
    return record.submission_id or record.config.metadata.get(SUBMISSION_ID, "")


def _is_known(record: JobRecord, owners: Mapping[str, JobId | None]) -> bool:
    """Tell whether a job was not submitted, or has its submission id still, and was the first to take it."""
    of = _submission_of(record)
    if not record.submission_id:
        return not of or owners[of] is not None
    return owners[of] == record.job_id
