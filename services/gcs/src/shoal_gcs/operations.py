"""What the control store is asked to do, as operations that are tried until there is nothing left to write.

``attempt`` looks at the cache and either answers or asks for one compare-and-set; the outcome, which the cache has
taken in before, comes to ``settled``, which as a rule attempts anew. So a lost race, a write of a dead replica and a
request that was sent twice all end the same way: it finds what it wanted, or what forbids it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

from shoal_core.protocol.effects import Conflict, Effect, Load, Loaded, Reply, Store, Stored, StoreRefused
from shoal_core.protocol.errors import AlreadyExistsError, DeclaredDeadError, NotFoundError, ServiceError, ShoalError
from shoal_core.protocol.ids import JobId, NodeId
from shoal_core.protocol.messages import (
    ClusterInfo,
    Done,
    FunctionPart,
    GetFunctionPart,
    JobRecord,
    JobState,
    KvAdded,
    KvDeleted,
    KvPut,
    KvValue,
    Message,
    NodeDescription,
    NodeRecord,
    NodeState,
    RegisterJob,
)
from shoal_gcs.records import (
    CLUSTER_KEY,
    FUNCTIONS,
    StoredJob,
    StoredKey,
    StoredNode,
    function_key,
    job_id,
    job_key,
    kv_key,
    node_key,
    split,
)
from shoal_gcs.state import Held, State

Outcome = Stored | Conflict | Loaded


class Operation(ABC):
    """One thing to be done; ``token`` names who asked, None where nobody did."""

    token: int | None

    @abstractmethod
    def attempt(self, state: State) -> list[Effect]:
        """Answer, or ask for the next write or read, whose context is this operation."""

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on after a write or a read, which the cache knows of already."""
        return self.attempt(state)

    def refused(self, refusal: StoreRefused) -> list[Effect]:
        """Tell whoever asked that the store will never take it; what nobody asked for is tried at a later tick."""
        return self.answer(_refusal(refusal))

    def answer(self, message: Message | ShoalError) -> list[Effect]:
        """Return the answer to whoever asked."""
        return [] if self.token is None else [Reply(self.token, message)]


@dataclass(frozen=True, slots=True)
class DescribeCluster(Operation):
    """Tell what cluster this is; the first one ever asked draws its session."""

    token: int | None
    info: ClusterInfo

    def attempt(self, state: State) -> list[Effect]:
        """Answer with the session that the store holds; ``info`` carries the one to propose."""
        if not state.session:
            return [Store(CLUSTER_KEY, self.info.session.encode(), 0, self)]
        return self.answer(self.info.model_copy(update={"session": state.session}))


# ------------------------------------------------------------------------------------ nodes


@dataclass(frozen=True, slots=True)
class RegisterNode(Operation):
    """Let a node join. Its id is an incarnation: one that was declared dead cannot join again."""

    token: int | None
    description: NodeDescription

    def attempt(self, state: State) -> list[Effect]:
        """Make the record, unless there is one."""
        held = state.nodes.get(self.description.node_id)
        if held is None:
            stored = StoredNode(record=NodeRecord(description=self.description, state=NodeState.ALIVE))
            return [Store(node_key(self.description.node_id), encode_record(stored), 0, self)]
        if held.value.record.state is NodeState.DEAD:
            return self.answer(
                DeclaredDeadError(
                    f"node {self.description.node_id} was declared dead ({held.value.record.death_reason}); "
                    "join again under a new id"
                )
            )
        return self.answer(held.value.record)


@dataclass(frozen=True, slots=True)
class BuryNode(Operation):
    """Declare a node dead: one compare-and-set ALIVE → DEAD, never undone."""

    token: int | None
    node_id: NodeId
    reason: str
    now: float

    def attempt(self, state: State) -> list[Effect]:
        """Write the death, unless it is written."""
        held = state.nodes.get(self.node_id)
        if held is None:
            return [Load(node_key(self.node_id), self)]
        record = held.value.record
        if record.state is NodeState.DEAD:
            return self.answer(Done())
        dead = record.model_copy(
            update={"state": NodeState.DEAD, "death_reason": self.reason, "ended_at": self.now},
        )
        return [Store(node_key(self.node_id), encode_record(StoredNode(record=dead)), held.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on, unless there is no such node."""
        if self.node_id not in state.nodes:
            return self.answer(NotFoundError(f"there is no node {self.node_id}"))
        return self.attempt(state)


@dataclass(frozen=True, slots=True)
class ReadNode(Operation):
    """Answer with a node's record. Only a death is known for good; all else is read through the leader."""

    token: int | None
    node_id: NodeId

    def attempt(self, state: State) -> list[Effect]:
        """Answer, or read."""
        held = state.nodes.get(self.node_id)
        if held is not None and held.value.record.state is NodeState.DEAD:
            return self.answer(held.value.record)
        return [Load(node_key(self.node_id), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what was read."""
        held = state.nodes.get(self.node_id)
        return self.answer(held.value.record if held else NotFoundError(f"there is no node {self.node_id}"))


# ------------------------------------------------------------------------------------ jobs


@dataclass(frozen=True, slots=True)
class OpenJob(Operation):
    """Give a driver its job: the first number that is free.

    Job records are made without gaps and never deleted, and each attempt goes for the first number this replica knows
    nothing of. So before it takes a free one it has met, by a conflict, every job that another replica opened, and
    finds out if one of them is this very driver's.
    """

    token: int | None
    request: RegisterJob
    now: float

    def attempt(self, state: State) -> list[Effect]:
        """Answer with the driver's job, or try to make it."""
        known = state.jobs_by_driver.get(self.request.driver)
        if known is not None:
            return self.answer(state.jobs[known].value.record)
        request = self.request
        record = JobRecord(
            job_id=job_id(state.first_free_job),
            driver=request.driver,
            actor=request.actor,
            submission_id=request.submission_id,
            hostname=request.hostname,
            machine_id=request.machine_id,
            pid=request.pid,
            entrypoint=request.entrypoint,
            config=request.config,
            state=JobState.RUNNING,
            started_at=self.now,
        )
        return [Store(job_key(record.job_id), encode_record(StoredJob(record=record)), 0, self)]


@dataclass(frozen=True, slots=True)
class EndJob(Operation):
    """End a job: one compare-and-set out of RUNNING, never undone."""

    token: int | None
    job_id: JobId
    state: JobState
    message: str
    now: float
    exit_code: int | None = None

    def attempt(self, state: State) -> list[Effect]:
        """Write the end, unless it is written."""
        held = state.jobs.get(self.job_id)
        if held is None:
            return [Load(job_key(self.job_id), self)]
        record = held.value.record
        if record.state is not JobState.RUNNING:
            return self.answer(Done())
        end = {"state": self.state, "message": self.message, "ended_at": self.now, "exit_code": self.exit_code}
        ended = record.model_copy(update=end)
        return [Store(job_key(self.job_id), encode_record(StoredJob(record=ended)), held.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on, unless there is no such job."""
        if self.job_id not in state.jobs:
            return self.answer(NotFoundError(f"there is no job {self.job_id}"))
        return self.attempt(state)


@dataclass(frozen=True, slots=True)
class ReadJob(Operation):
    """Answer with a job's record. Only an end is known for good; all else is read through the leader."""

    token: int | None
    job_id: JobId

    def attempt(self, state: State) -> list[Effect]:
        """Answer, or read."""
        held = state.jobs.get(self.job_id)
        if held is not None and held.value.record.state is not JobState.RUNNING:
            return self.answer(held.value.record)
        return [Load(job_key(self.job_id), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what was read."""
        held = state.jobs.get(self.job_id)
        return self.answer(held.value.record if held else NotFoundError(f"there is no job {self.job_id}"))


@dataclass(frozen=True, slots=True)
class MarkTold(Operation):
    """Note that an end was published, so that no replica does it again. Whoever came before did the same."""

    token: int | None
    key: str
    value: bytes
    revision: int

    def attempt(self, state: State) -> list[Effect]:
        """Write the mark."""
        return [Store(self.key, self.value, self.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Leave it at that: the record's only further change is this mark."""
        return []


# ------------------------------------------------------------------------------------ functions


@dataclass(frozen=True, slots=True)
class WritePart(Operation):
    """Keep one part of a function; the same part again is no error.

    Nothing is written for a job that does not exist. The functions of a job are deleted after its end was recorded. So
    a part of which a look at the job through the leader, after the write, says that the job runs is deleted with the
    rest; any other came too late, and is taken back. Both rest on what is never undone: that there is such a job, and
    that it has ended.
    """

    token: int | None
    job_id: JobId
    key: str
    value: bytes
    revision: int = 0

    def attempt(self, state: State) -> list[Effect]:
        """Write it, once the job is known."""
        if self.job_id not in state.jobs:
            return [Load(job_key(self.job_id), self)]
        return [Store(self.key, self.value, 0, self, FUNCTIONS)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Look whether the job still runs after the write; if so, answer, else take the part back."""
        if outcome.bucket == FUNCTIONS:
            return self._written(outcome)
        held = state.jobs.get(self.job_id)
        if held is None:
            return self._no_such_job()
        if not self.revision:
            return self.attempt(state)
        if held.value.record.state is JobState.RUNNING:
            return self.answer(Done())
        return [Store(self.key, None, self.revision, self, FUNCTIONS)]

    def _written(self, outcome: Outcome) -> list[Effect]:
        if outcome.value is None:
            return self._no_such_job()
        if outcome.value != self.value:
            return self.answer(AlreadyExistsError(f"{self.key} is kept already, with another content"))
        return [Load(job_key(self.job_id), replace(self, revision=outcome.revision))]

    def _no_such_job(self) -> list[Effect]:
        return self.answer(NotFoundError(f"there is no job {self.job_id} that runs"))


@dataclass(frozen=True, slots=True)
class ReadPart(Operation):
    """Answer with one part of a function."""

    token: int | None
    request: GetFunctionPart

    def attempt(self, state: State) -> list[Effect]:
        """Answer, or read it."""
        request = self.request
        key = function_key(request.job_id, request.function_id, request.part)
        known = state.written.get(key)
        return [Load(key, self, FUNCTIONS)] if known is None else self._found(known)

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what was read."""
        if outcome.value is None:
            request = self.request
            return self.answer(
                NotFoundError(f"job {request.job_id} has no function {request.function_id} with a part {request.part}")
            )
        return self._found(outcome.value)

    def _found(self, value: bytes) -> list[Effect]:
        parts, data = split(value)
        return self.answer(FunctionPart(parts=int(parts), data=data))


# ------------------------------------------------------------------------------------ internal KV


@dataclass(frozen=True, slots=True)
class PutKey(Operation):
    """Set a key. ``writer`` names this very request; ``base`` is what it writes over."""

    token: int | None
    request: KvPut
    writer: str
    base: Held[StoredKey]

    def attempt(self, state: State) -> list[Effect]:
        """Write it over what was seen last."""
        key = kv_key(self.request.namespace, self.request.key)
        stored = self.base.value.changed(self.writer, self.request.value)
        return [Store(key, stored.encode(), self.base.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer, or try over what is there now."""
        now = StoredKey.decode(outcome.value)
        if isinstance(outcome, Stored) or self.writer in now.writers:
            return self.answer(KvAdded(added=self.base.value.value is None))
        if now.value is not None and not self.request.overwrite:
            return self.answer(KvAdded(added=False))
        return replace(self, base=Held(now, outcome.revision)).attempt(state)


@dataclass(frozen=True, slots=True)
class GetKey(Operation):
    """Answer with a key's value, read through the leader."""

    token: int | None
    namespace: str
    key: str

    def attempt(self, state: State) -> list[Effect]:
        """Read it."""
        return [Load(kv_key(self.namespace, self.key), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what was read."""
        return self.answer(KvValue(value=StoredKey.decode(outcome.value).value))


@dataclass(frozen=True, slots=True)
class DeleteKeys(Operation):
    """Delete keys, each by its own compare-and-set; there is one answer, when all are settled."""

    token: int | None
    keys: frozenset[str]
    writer: str
    progress: Deletion = field(default_factory=lambda: Deletion())

    def attempt(self, state: State) -> list[Effect]:
        """Read all of them: what the cache knows of them may be old."""
        if not self.keys:
            return self.answer(KvDeleted(count=0))
        self.progress.waiting.update(self.keys)
        return [Load(key, self) for key in sorted(self.keys)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Delete what was read; try again where it changed."""
        now = StoredKey.decode(outcome.value)
        deleted = isinstance(outcome, Stored) or self.writer in now.writers
        if now.value is not None and not deleted:
            return [Store(outcome.key, now.changed(self.writer, None).encode(), outcome.revision, self)]
        self.progress.count += deleted
        return self._done_with(outcome.key)

    def refused(self, refusal: StoreRefused) -> list[Effect]:
        """Leave the key, see the others through, and answer that it failed."""
        self.progress.error = _refusal(refusal)
        return self._done_with(refusal.key)

    def _done_with(self, key: str) -> list[Effect]:
        progress = self.progress
        progress.waiting.discard(key)
        return [] if progress.waiting else self.answer(progress.error or KvDeleted(count=progress.count))


@dataclass(slots=True)
class Deletion:
    """How far a ``DeleteKeys`` has come."""

    waiting: set[str] = field(default_factory=set)
    count: int = 0
    error: ServiceError | None = None


def _refusal(refusal: StoreRefused) -> ServiceError:
    return ServiceError(f"the control store cannot write: {refusal.error}")


def encode_record(record: StoredNode | StoredJob) -> bytes:
    """Return a record as the store keeps it."""
    return record.__pydantic_serializer__.to_json(record)
