"""What the control store is asked to do about actors, as operations like the others (see ``operations``).

How a record may change is a table of ``Change``s: each looks at the record and says what follows it, or why nothing
does. A change that speaks of an incarnation or a claim that the cache does not know yet has the record read first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from shoal_core.protocol.actors import (
    ActorClaim,
    ActorDeath,
    ActorRecord,
    ActorState,
    CreateActor,
    OpenActorJob,
)
from shoal_core.protocol.effects import Effect, Load, Start, Store, Stored, StoreRefused
from shoal_core.protocol.errors import (
    ActorAlreadyExistsError,
    DeclaredDeadError,
    NotFoundError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import ActorId, JobId, NodeId, ProcessId
from shoal_core.protocol.messages import Done, JobState, Message, NodeState, RegisterJob
from shoal_gcs.operations import EndJob, OpenJob, Operation, Outcome
from shoal_gcs.records import FUNCTIONS, actor_key, job_key, name_key, spec_key
from shoal_gcs.state import State

NAME_TAKEN = "its name was taken"
ACTOR_DIED, ACTOR_UNSCHEDULABLE, ACTOR_GROUP_REMOVED = "actor_died", "actor_unschedulable", "actor_group_removed"
"""What callers of a dead actor get, by its code on the wire."""


@dataclass(frozen=True, slots=True)
class PurgeSpec:
    """Command: delete what a dead actor was made from."""

    actor_id: ActorId


class Detour(Operation):
    """An operation that reads and writes other keys, too, on its way to the one that it was begun for."""

    @property
    @abstractmethod
    def begun_for(self) -> str:
        """The key that it is about."""


def encode_actor(record: ActorRecord) -> bytes:
    """Return a record as the store keeps it."""
    return record.__pydantic_serializer__.to_json(record)


# ------------------------------------------------------------------------------------ how records change


class Change(ABC):
    """One way in which an actor's record changes; a frozen dataclass, so that it can be tried again."""

    @abstractmethod
    def next(self, record: ActorRecord, now: float) -> ActorRecord | ShoalError | None:
        """Return the record that follows, None where it is as it should be, or why it cannot be done."""

    def is_ahead(self, record: ActorRecord) -> bool:
        """Tell whether this may speak of something that came after ``record``."""
        return False

    def aimed(self, record: ActorRecord) -> Change:
        """Return what this means for good, now that the record is known: tried again, it means the same."""
        return self

    def answer(self, record: ActorRecord) -> Message:
        """Return what is answered when it is done."""
        return Done()


def dead(
    record: ActorRecord, reason: str, now: float, error: bytes = b"", *, graceful: bool = False, code: str = ACTOR_DIED
) -> ActorRecord:
    """Return the record of the actor's death."""
    about = record.description.model_copy(update={"methods": b""})
    return record.model_copy(
        update={
            "description": about,
            "state": ActorState.DEAD,
            "process_id": None,
            "ended_at": now,
            "graceful": graceful,
            "death": ActorDeath(reason=reason, error=error, code=code),
        }
    )


def ended(record: ActorRecord, reason: str, now: float) -> ActorRecord:
    """Return what follows the end of an incarnation that nobody wanted to end: the next one, if there may be one."""
    about = record.description
    if about.max_restarts >= 0 and record.incarnation >= about.max_restarts:
        often = f", after {record.incarnation} restart{'s' * (record.incarnation != 1)}" if record.incarnation else ""
        return dead(record, f"{reason}{often}", now)
    return record.model_copy(
        update={
            "state": ActorState.RESTARTING,
            "incarnation": record.incarnation + 1,
            "node_id": None,
            "process_id": None,
            "pid": 0,
        }
    )


@dataclass(frozen=True, slots=True)
class Kill(Change):
    """The actor ends, for good or to be started again.

    In the second case it is one ``incarnation`` that ends: the one that the leader knew when it was asked for. Else a
    write that took effect, and was written over before the answer was known, would end the next one as well.
    """

    reason: str
    no_restart: bool = True
    graceful: bool = False
    incarnation: int | None = None
    code: str = ACTOR_DIED

    def is_ahead(self, record: ActorRecord) -> bool:
        """Which incarnation is to end must not be told by a cache that may be behind."""
        return not self.no_restart and self.incarnation is None and record.state is not ActorState.DEAD

    def aimed(self, record: ActorRecord) -> Change:
        """Choose the incarnation."""
        return replace(self, incarnation=record.incarnation) if self.is_ahead(record) else self

    def next(self, record: ActorRecord, now: float) -> ActorRecord | ShoalError | None:
        """End whatever lives; an incarnation that has not been claimed needs no restart."""
        if record.state is ActorState.DEAD:
            return None
        if self.no_restart:
            return dead(record, self.reason, now, graceful=self.graceful, code=self.code)
        if record.node_id is None or record.incarnation != self.incarnation:
            return None
        return ended(record, self.reason, now)


@dataclass(frozen=True, slots=True)
class _OfIncarnation(Change):
    """What a node says of an incarnation that it claimed."""

    incarnation: int
    node_id: NodeId

    def is_ahead(self, record: ActorRecord) -> bool:
        """The incarnation, or the claim, is not known yet."""
        if record.state is ActorState.DEAD:
            return False
        return (record.incarnation, record.node_id is not None) < (self.incarnation, True)

    def concerns(self, record: ActorRecord) -> bool:
        """Tell whether the record names this incarnation on this node."""
        return (record.incarnation, record.node_id) == (self.incarnation, self.node_id)


@dataclass(frozen=True, slots=True)
class Started(_OfIncarnation):
    """The instance is made: the actor can be called at ``process_id``."""

    process_id: ProcessId
    pid: int
    repr_name: str = ""

    def next(self, record: ActorRecord, now: float) -> ActorRecord | ShoalError | None:
        """Make it ALIVE, if it is still wanted."""
        if record.state is ActorState.DEAD or not self.concerns(record):
            return DeclaredDeadError(
                f"incarnation {self.incarnation} of actor {record.description.actor_id} on node {self.node_id} is not "
                f"wanted any more: the actor is {record.state} in incarnation {record.incarnation}"
            )
        if record.state is ActorState.ALIVE:
            return None
        made = {"process_id": self.process_id, "pid": self.pid, "repr_name": self.repr_name}
        return record.model_copy(update={"state": ActorState.ALIVE, **made})

    def answer(self, record: ActorRecord) -> Message:
        """The record."""
        return record


@dataclass(frozen=True, slots=True)
class Ended(_OfIncarnation):
    """The incarnation is over; ``final``: by its own will, or since ``__init__`` raised ``error``."""

    reason: str
    error: bytes = b""
    final: bool = False

    def next(self, record: ActorRecord, now: float) -> ActorRecord | ShoalError | None:
        """Go on to the next incarnation, or to the end."""
        if record.state is ActorState.DEAD or not self.concerns(record):
            return None
        if self.final:
            return dead(record, self.reason, now, self.error)
        return ended(record, self.reason, now)


@dataclass(frozen=True, slots=True)
class ChangeActor(Operation):
    """Change a record by compare-and-set, until the change has nothing more to say."""

    token: int | None
    actor_id: ActorId
    change: Change
    now: float
    read: bool = False

    def attempt(self, state: State) -> list[Effect]:
        """Write what follows; where the cache may be behind, read first."""
        held = state.actors.get(self.actor_id)
        if held is None or self.change.is_ahead(held.value):
            if not self.read:
                return [Load(actor_key(self.actor_id), replace(self, read=True))]
            if held is None:
                return self.answer(NotFoundError(f"there is no actor {self.actor_id}"))
        change = self.change.aimed(held.value)
        following = change.next(held.value, self.now)
        if isinstance(following, ShoalError):
            return self.answer(following)
        if following is None:
            return self.answer(change.answer(held.value))
        again = replace(self, change=change)
        return [Store(actor_key(self.actor_id), encode_actor(following), held.revision, again)]


# ------------------------------------------------------------------------------------ making


@dataclass(frozen=True, slots=True)
class MakeActor(Detour):
    """Record an actor, and have it win its name, or find out who has it.

    ``holder`` is the actor that was found to have the name, at ``name_revision``; its record tells whether it lives.
    ``winner`` is the record of a living one: ours dies, then the winner is the answer, or the reason of the refusal.

    What it is made from is written first, without a look at the leader. A request that comes again may so write it once
    more when the actor is dead, and has it deleted once more.
    """

    token: int | None
    request: CreateActor
    now: float
    holder: ActorId | None = None
    name_revision: int = 0
    winner: ActorRecord | None = None

    @property
    def begun_for(self) -> str:
        """The actor's record."""
        return actor_key(self.request.description.actor_id)

    def attempt(self, state: State) -> list[Effect]:
        """Do the next step: what it is made from, the record, the name, and that it may start."""
        about = self.request.description
        held = state.actors.get(about.actor_id)
        if held is None:
            if self.token is None:
                return []  # deleted meanwhile; only its creator knows what it was made from
            job = state.jobs.get(about.job_id)
            if job is not None and job.value.record.state is not JobState.RUNNING:
                return self.answer(NotFoundError(f"job {about.job_id} has ended ({job.value.record.state})"))
            return [Store(spec_key(about.actor_id), self.request.spec, 0, self, FUNCTIONS)]
        record = held.value
        if record.state is ActorState.NAMING:
            if self.winner is not None:
                lost = dead(record, NAME_TAKEN, self.now)
                return [Store(actor_key(about.actor_id), encode_actor(lost), held.revision, self)]
            return [Store(self._name_key(), about.actor_id.encode(), self.name_revision, self)]
        if record.state is not ActorState.DEAD:
            return self.answer(record)
        came_late = record.death is not None and record.death.reason == NAME_TAKEN
        return [Start(PurgeSpec(about.actor_id)), *(self._lost(state) if came_late else self.answer(record))]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on from what was written or read."""
        about = self.request.description
        key = actor_key(about.actor_id)
        if outcome.bucket == FUNCTIONS:
            begins = ActorState.NAMING if about.name else ActorState.PENDING_CREATION
            record = ActorRecord(description=about, state=begins, created_at=self.now)
            return [Store(key, encode_actor(record), 0, self)]
        if about.name and outcome.key == self._name_key():
            return self._name_settled(state, outcome)
        if self.holder is not None and outcome.key == actor_key(self.holder):
            holder = _living(state, self.holder, outcome)
            if holder is None:
                return [Store(self._name_key(), about.actor_id.encode(), self.name_revision, self)]
            return replace(self, winner=holder).attempt(state)
        return self.attempt(state)

    def _name_settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """The name is ours, or we look who has it."""
        about = self.request.description
        if outcome.value is None:
            return replace(self, name_revision=0).attempt(state)
        holder = ActorId(outcome.value.decode())
        if holder != about.actor_id:
            found = replace(self, holder=holder, name_revision=outcome.revision)
            return [Load(actor_key(holder), found)]
        held = state.actors.get(about.actor_id)
        if held is None or held.value.state is not ActorState.NAMING:
            return self.attempt(state)
        named = held.value.model_copy(update={"state": ActorState.PENDING_CREATION})
        return [Store(actor_key(about.actor_id), encode_actor(named), held.revision, self)]

    def _lost(self, state: State) -> list[Effect]:
        """Answer with the winner, or refuse. Where another replica met the winner, look who has the name now."""
        about, winner = self.request.description, self.winner
        if winner is not None and self.request.get_if_exists:
            return self.answer(shown(winner))
        taken = ActorAlreadyExistsError(
            f"The name {about.name!r} is already taken in namespace {about.namespace!r}"
            + (f" by actor {winner.description.actor_id} ({winner.description.class_name})." if winner else ".")
            + " Use get_actor() to get it, or get_if_exists=True, or another name."
        )
        if not self.request.get_if_exists:
            return self.answer(taken)
        return FindName(self.token, about.namespace, about.name, otherwise=taken).attempt(state)

    def _name_key(self) -> str:
        about = self.request.description
        return name_key(about.namespace, about.name)


@dataclass(frozen=True, slots=True)
class OpenJobOfActor(Operation):
    """Open the job of a detached actor, configured like its creator's."""

    token: int | None
    request: OpenActorJob
    now: float
    read: bool = False

    def attempt(self, state: State) -> list[Effect]:
        """Read the creator's job, then open one."""
        creator = state.jobs.get(self.request.creator_job)
        if creator is None:
            if self.read:
                return self.answer(NotFoundError(f"there is no job {self.request.creator_job}"))
            return [Load(job_key(self.request.creator_job), replace(self, read=True))]
        record = creator.value.record
        job = RegisterJob(
            driver=ProcessId(self.request.actor_id),
            actor=self.request.actor_id,
            hostname=record.hostname,
            machine_id=record.machine_id,
            pid=0,
            entrypoint=f"detached actor {self.request.actor_id} of: {record.entrypoint}",
            version="",
            python_version="",
            config=record.config,
        )
        return OpenJob(self.token, job, self.now).attempt(state)


@dataclass(frozen=True, slots=True)
class EndJobWithoutActor(Detour):
    """End the job of a detached actor that was never created: so says the leader, since a cache may be behind."""

    token: int | None
    job_id: JobId
    actor_id: ActorId
    now: float

    @property
    def begun_for(self) -> str:
        """The job's record."""
        return job_key(self.job_id)

    def attempt(self, state: State) -> list[Effect]:
        """Look for the actor."""
        return [Load(actor_key(self.actor_id), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """End the job if there is none."""
        if outcome.value is not None or self.actor_id in state.actors:
            return []
        return EndJob(self.token, self.job_id, JobState.FAILED, "its actor was never created", self.now).attempt(state)


@dataclass(frozen=True, slots=True)
class ForgetActor(Detour):
    """Delete what is left of an actor that was dead for long: the name's key, if it still has it, then the record.

    What it was made from goes, too, if whoever wrote its death did not come to that.
    """

    token: int | None
    actor_id: ActorId
    name_is_free: bool = False

    @property
    def begun_for(self) -> str:
        """The actor's record."""
        return actor_key(self.actor_id)

    def attempt(self, state: State) -> list[Effect]:
        """Look at the name, then delete the record."""
        held = state.actors.get(self.actor_id)
        if held is None:
            return []
        about = held.value.description
        if about.name and not self.name_is_free:
            return [Load(name_key(about.namespace, about.name), self)]
        return [Start(PurgeSpec(self.actor_id)), Store(actor_key(self.actor_id), None, held.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on with the record once the name is free, or another's."""
        if outcome.key == actor_key(self.actor_id):
            return []
        if outcome.value is not None and outcome.value.decode() == self.actor_id and not isinstance(outcome, Stored):
            return [Store(outcome.key, None, outcome.revision, self)]
        return replace(self, name_is_free=True).attempt(state)


# ------------------------------------------------------------------------------------ claiming


@dataclass(frozen=True, slots=True)
class Claim(Operation):
    """Give the right to start an incarnation to the first node that asks for it, and to no other."""

    token: int | None
    actor_id: ActorId
    incarnation: int
    node_id: NodeId
    read: bool = False

    def attempt(self, state: State) -> list[Effect]:
        """Write the claim, or answer it. A refusal is for good, so it must not come from a cache that is behind."""
        held = state.actors.get(self.actor_id)
        if held is None or held.value.incarnation < self.incarnation or held.value.state is ActorState.NAMING:
            if not self.read:
                return [Load(actor_key(self.actor_id), replace(self, read=True))]
            return self._refuse("the record does not know it")
        record = held.value
        node = state.nodes.get(self.node_id)
        if record.state is ActorState.DEAD or record.incarnation > self.incarnation:
            return self._refuse(f"the actor is {record.state} in incarnation {record.incarnation}")
        if record.node_id == self.node_id:
            spec = state.written.get(spec_key(self.actor_id))
            return (
                [Load(spec_key(self.actor_id), self, FUNCTIONS)] if spec is None else self._granted(state, record, spec)
            )
        if record.node_id is not None:
            return self._refuse(f"node {record.node_id} has claimed it")
        if node is not None and node.value.record.state is NodeState.DEAD:
            return self._refuse("the node was declared dead")
        claimed = record.model_copy(update={"node_id": self.node_id})
        return [Store(actor_key(self.actor_id), encode_actor(claimed), held.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what the actor is made from, once the claim is written."""
        if outcome.bucket != FUNCTIONS:
            return self.attempt(state)
        held = state.actors.get(self.actor_id)
        if held is None or (held.value.incarnation, held.value.node_id) != (self.incarnation, self.node_id):
            return self.attempt(state)
        if outcome.value is None:
            return self.answer(ServiceError(f"what actor {self.actor_id} is made from is not there (yet); ask again"))
        return self._granted(state, held.value, outcome.value)

    def _granted(self, state: State, record: ActorRecord, spec: bytes) -> list[Effect]:
        """Answer with what the actor is made from, and what its process needs to know of the job, if that is known."""
        job = state.jobs.get(record.description.job_id)
        config = None if job is None else job.value.record.config
        return self.answer(ActorClaim(record=record, spec=spec, config=config))

    def refused(self, refusal: StoreRefused) -> list[Effect]:
        """The store takes no more; the node asks again."""
        return self.answer(ServiceError(f"the control store cannot write: {refusal.error}"))

    def _refuse(self, why: str) -> list[Effect]:
        return self.answer(
            DeclaredDeadError(f"incarnation {self.incarnation} of actor {self.actor_id} is not to be started: {why}")
        )


# ------------------------------------------------------------------------------------ reading


def shown(record: ActorRecord) -> ActorRecord:
    """Return a record as others may see it: while its name is decided, it has not begun to live."""
    if record.state is not ActorState.NAMING:
        return record
    return record.model_copy(update={"state": ActorState.PENDING_CREATION})


def _living(state: State, actor: ActorId, read: Outcome) -> ActorRecord | None:
    """Return the record of an actor that has just been read, if it is there and not DEAD."""
    held = state.actors.get(actor)
    if held is None or read.value is None or held.value.state is ActorState.DEAD:
        return None
    return held.value


@dataclass(frozen=True, slots=True)
class ReadActor(Operation):
    """Answer with a record. Only a death is known for good; all else is read through the leader."""

    token: int | None
    actor_id: ActorId

    def attempt(self, state: State) -> list[Effect]:
        """Answer, or read."""
        held = state.actors.get(self.actor_id)
        if held is not None and held.value.state is ActorState.DEAD:
            return self.answer(held.value)
        return [Load(actor_key(self.actor_id), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what was read."""
        held = state.actors.get(self.actor_id)
        return self.answer(shown(held.value) if held else NotFoundError(f"there is no actor {self.actor_id}"))


@dataclass(frozen=True, slots=True)
class FindName(Operation):
    """Answer with the living actor of a name: the name's key first, then its holder's record, both by the leader."""

    token: int | None
    namespace: str
    name: str
    holder: ActorId | None = None
    otherwise: ShoalError | None = None

    def attempt(self, state: State) -> list[Effect]:
        """Read the name's key."""
        return [Load(name_key(self.namespace, self.name), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Read the holder's record, then answer."""
        if self.holder is None:
            if outcome.value is None:
                return self._nobody()
            holder = ActorId(outcome.value.decode())
            return [Load(actor_key(holder), replace(self, holder=holder))]
        holder_record = _living(state, self.holder, outcome)
        return self._nobody() if holder_record is None else self.answer(shown(holder_record))

    def _nobody(self) -> list[Effect]:
        nobody = NotFoundError(f"no living actor has the name {self.name!r} in {self.namespace!r}")
        return self.answer(self.otherwise or nobody)
