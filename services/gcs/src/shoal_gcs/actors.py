"""What the control store does about actors by itself: states demand for those that wait, ends those whose time is over.

All of it is level-triggered: once a second each replica looks at what the records say. Most of it is also done at once,
when the replica itself has changed a record or hears of a death.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from shoal_core.protocol.actors import (
    MOST_METHODS_BYTES,
    MOST_SPEC_BYTES,
    ActorEnded,
    ActorList,
    ActorRecord,
    ActorStarted,
    ActorState,
    ActorSummary,
    ClaimActor,
    CreateActor,
    FindActor,
    GetActor,
    KillActor,
    ListActors,
    NodeActors,
    OpenActorJob,
    ReleaseActor,
    changed,
)
from shoal_core.protocol.effects import Effect, Publish, Reply, Start
from shoal_core.protocol.errors import InvalidRequestError
from shoal_core.protocol.groups import GroupState
from shoal_core.protocol.ids import ActorId, JobId, NodeId, PlacementGroupId, ProcessId, ServiceId, SlotId, node_of
from shoal_core.protocol.messages import NO_TERMS, JobRecord, JobState, Message, NodeState
from shoal_core.protocol.placement import Bundle, NodeAffinity
from shoal_core.protocol.resources import fits, to_amounts
from shoal_core.protocol.scheduling import ActorStart, Demand, DemandEntry
from shoal_core.protocol.subjects import Subjects
from shoal_gcs.actor_operations import (
    ACTOR_GROUP_REMOVED,
    ACTOR_UNSCHEDULABLE,
    ChangeActor,
    Claim,
    Ended,
    EndJobWithoutActor,
    FindName,
    ForgetActor,
    Kill,
    MakeActor,
    OpenJobOfActor,
    PurgeSpec,
    ReadActor,
    Started,
)
from shoal_gcs.operations import EndJob, Operation
from shoal_gcs.records import NAME_BYTES, actor_key, job_key
from shoal_gcs.state import State

NAMING_SECONDS = 3.0
"""So long a replica that died may have left an actor without a decision about its name."""
UNKNOWN_NODE_SECONDS, UNKNOWN_GROUP_SECONDS = 3.0, 10.0
"""So long this replica may not have heard of a node that has just joined, or of a group that was just asked for."""
KEEP_DEAD_SECONDS = 600.0
"""So long it can be asked how an actor died."""
ORPHAN_SECONDS = 60.0
"""So long a job may be open for a detached actor that is not created."""
LISTED = 1000
LISTED_REASON_CHARACTERS = 200
MOST_REASON_CHARACTERS = 1000
MOST_REMEMBERED = 10_000


class Actors:
    """One replica's part in the life of actors."""

    def __init__(self, state: State, subjects: Subjects, identity: ServiceId) -> None:
        self._state = state
        self._subjects = subjects
        self._identity = identity
        self._dead_processes: dict[ProcessId, None] = {}

    # -------------------------------------------------------------------------------- what is asked

    def operation(self, message: Message, token: int, now: float) -> Operation | list[Effect] | None:
        """Return the operation that a request about actors asks for, or at once its answer; None for other requests."""
        match message:
            case CreateActor():
                _check(message)
                return MakeActor(token, message, now)
            case OpenActorJob():
                return OpenJobOfActor(token, message, now)
            case GetActor():
                return ReadActor(token, message.actor_id)
            case FindActor():
                _check_name(message.namespace, message.name)
                return FindName(token, message.namespace, message.name)
            case ListActors():
                return [Reply(token, self._list(message))]
            case KillActor():
                return ChangeActor(token, message.actor_id, Kill(message.reason, message.no_restart), now)
            case ReleaseActor():
                return ChangeActor(token, message.actor_id, Kill(message.reason, graceful=True), now)
            case ClaimActor():
                return Claim(token, message.actor_id, message.incarnation, message.node_id)
            case ActorStarted():
                started = Started(
                    message.incarnation, message.node_id, message.process_id, message.pid, message.repr_name
                )
                return ChangeActor(token, message.actor_id, started, now)
            case ActorEnded():
                ended = Ended(message.incarnation, message.node_id, message.reason, message.error, message.final)
                return ChangeActor(token, message.actor_id, ended, now)
        return None

    def _list(self, request: ListActors) -> ActorList:
        wanted = [
            held.value
            for held in self._state.actors.values()
            if held.value.state is not ActorState.NAMING
            and (request.namespace is None or held.value.description.namespace == request.namespace)
            and not (request.named_only and (held.value.state is ActorState.DEAD or not held.value.description.name))
        ]
        wanted.sort(key=lambda record: (record.state is not ActorState.DEAD, record.created_at))
        listed = sorted(wanted[-LISTED:], key=lambda record: (record.created_at, record.description.actor_id))
        return ActorList(actors=[*map(_summary, listed)])

    # -------------------------------------------------------------------------------- what is told

    def told(self, actor: ActorId, now: float) -> list[Effect]:
        """Tell that this replica has changed a record, and state what it wants where that may have changed."""
        held = self._state.actors.get(actor)
        if held is None or held.value.state is ActorState.NAMING:
            return []
        record = held.value
        subject = self._subjects.actor_changed(self._identity, actor)
        effects: list[Effect] = [Publish(subject, changed(record))]
        if record.state is not ActorState.ALIVE:  # that it has a place was stated when it was claimed
            effects.append(self._demand(record, now))
        if record.state is ActorState.DEAD:
            effects.append(Start(PurgeSpec(actor)))
        return effects

    def told_again(self, hosted: NodeActors) -> list[Effect]:
        """Tell a node of the incarnations it hosts that the records do not name any more."""
        effects: list[Effect] = []
        for actor in hosted.actors:
            held = self._state.actors.get(actor.actor_id)
            if held is not None and _is_over(held.value, actor.incarnation, hosted.node_id):
                subject = self._subjects.actor_changed(self._identity, actor.actor_id)
                effects.append(Publish(subject, changed(held.value)))
        return effects

    def _demand(self, record: ActorRecord, now: float) -> Publish:
        """State what an actor wants: a place for its incarnation, or, since it has one or needs none, nothing."""
        about = record.description
        entries = []
        if _wants_place(record):
            slot = _slot(about.actor_id, record.incarnation)
            start = ActorStart(actor_id=about.actor_id, incarnation=record.incarnation, owner=about.owner)
            entry = DemandEntry(
                key=slot,
                name=about.class_name,
                resources=about.placement,
                strategy=about.strategy,
                environment=about.environment,
                priority=about.priority,
                wanted=1,
                slots=[slot],
                actor=start,
                trace=about.trace,
            )
            entries.append(entry)
        owner = ProcessId(about.actor_id)
        job = self._state.jobs.get(about.job_id)
        demand = Demand(
            owner=owner,
            job_id=about.job_id,
            version=int(now * 1000),
            entries=entries,
            terms=NO_TERMS if job is None else job.value.record.config.terms,
        )
        return Publish(self._subjects.demand(owner), demand)

    # -------------------------------------------------------------------------------- what is due

    def demands(self, now: float) -> list[Effect]:
        """Repeat the demand of all incarnations that want a place."""
        records = (self._state.actors[actor].value for actor in sorted(self._state.living_actors))
        return [self._demand(record, now) for record in records if _wants_place(record)]

    def due(self, now: float) -> Iterator[tuple[str, Operation]]:
        """Yield what has to be done because of what the records say, each with the key that it changes."""
        for actor in sorted(self._state.living_actors):
            record = self._state.actors[actor].value
            operation = self._due(record, now)
            if operation is not None:
                yield actor_key(actor), operation
        for job in self._state.running_jobs():
            yield from self._end_of_own_job(job, now)
        for actor, held in self._state.actors.items():
            ended_at = held.value.ended_at
            if ended_at is not None and now - ended_at > KEEP_DEAD_SECONDS:
                yield actor_key(actor), ForgetActor(None, actor)

    def owner_died(self, process: ProcessId, now: float) -> Iterator[tuple[str, Operation]]:
        """Yield the ends of the actors that go with a process that has died.

        Its death is remembered: what it asked for last may be recorded, or heard of here, only later.
        """
        self._dead_processes[process] = None
        if len(self._dead_processes) > MOST_REMEMBERED:
            del self._dead_processes[next(iter(self._dead_processes))]
        for actor in sorted(self._state.living_actors):
            about = self._state.actors[actor].value.description
            if about.owner == process and not about.detached:
                yield actor_key(actor), ChangeActor(None, actor, Kill("its owner has died"), now)

    def end_with_group(self, group: PlacementGroupId, now: float) -> Iterator[tuple[str, Operation]]:
        """Yield the ends of the actors that are bound to a placement group, if that was removed."""
        for actor in sorted(self._state.actors_in_groups.get(group, ())):
            if reason := self._why_not_in_group(self._state.actors[actor].value, now):
                yield actor_key(actor), ChangeActor(None, actor, Kill(reason, code=ACTOR_GROUP_REMOVED), now)

    def _due(self, record: ActorRecord, now: float) -> Operation | None:
        about = record.description
        actor = about.actor_id
        job = self._state.jobs.get(about.job_id)
        if job is not None and job.value.record.state is not JobState.RUNNING:
            return ChangeActor(None, actor, Kill("its job has ended"), now)
        if not about.detached and about.owner in self._dead_processes:
            return ChangeActor(None, actor, Kill("its owner has died"), now)
        if not about.detached and self._is_dead(node_of(about.owner)):
            return ChangeActor(None, actor, Kill("its owner has died with its node"), now)
        if record.node_id is not None and self._is_dead(record.node_id):
            reason = f"its node {record.node_id} has died"
            return ChangeActor(None, actor, Ended(record.incarnation, record.node_id, reason), now)
        if reason := self._why_not_in_group(record, now):
            return ChangeActor(None, actor, Kill(reason, code=ACTOR_GROUP_REMOVED), now)
        if _wants_place(record) and (reason := self._why_never(record, now)):
            return ChangeActor(None, actor, Kill(reason, code=ACTOR_UNSCHEDULABLE), now)
        if record.state is ActorState.NAMING and now - record.created_at > NAMING_SECONDS:
            return MakeActor(None, CreateActor(description=about, spec=b""), now)
        return None

    def _why_never(self, record: ActorRecord, now: float) -> str:
        """Return why an actor that may live on one node alone can never live there; empty where it could."""
        about = record.description
        strategy = about.strategy
        if not isinstance(strategy, NodeAffinity) or strategy.soft:
            return ""
        held = self._state.nodes.get(strategy.node)
        if held is None:
            unknown = now - record.created_at > UNKNOWN_NODE_SECONDS
            return f"the node {strategy.node} that it is bound to is not in the cluster" if unknown else ""
        node = held.value.record
        if node.state is NodeState.DEAD:
            return f"the node {strategy.node} that it is bound to is dead ({node.death_reason})"
        if not fits(about.placement, node.description.total):
            wanted, there = to_amounts(about.placement), to_amounts(node.description.total)
            return f"it needs {wanted}, and the node {strategy.node} that it is bound to has {there}"
        return ""

    def _why_not_in_group(self, record: ActorRecord, now: float) -> str:
        """Return why an actor that is bound to a placement group cannot live any more; empty where it can."""
        strategy = record.description.strategy
        if not isinstance(strategy, Bundle):
            return ""
        held = self._state.groups.get(strategy.group)
        if held is None:
            unknown = now - record.created_at > UNKNOWN_GROUP_SECONDS
            return f"there is no placement group {strategy.group} (any more)" if unknown else ""
        if held.value.state is GroupState.REMOVED:
            return f"its placement group {strategy.group} was removed ({held.value.reason})"
        return ""

    def _end_of_own_job(self, job: JobId, now: float) -> Iterator[tuple[str, Operation]]:
        """Yield the end of a detached actor's job, when the actor is dead or was never created."""
        record = self._state.jobs[job].value.record
        if record.actor is None:
            return
        held = self._state.actors.get(record.actor)
        if held is None and now - record.started_at > ORPHAN_SECONDS:
            yield job_key(job), EndJobWithoutActor(None, job, record.actor, now)
        elif held is not None and held.value.state is ActorState.DEAD:
            yield job_key(job), _end_with_actor(record, held.value, now)

    def _is_dead(self, node: NodeId) -> bool:
        held = self._state.nodes.get(node)
        return held is not None and held.value.record.state is NodeState.DEAD


def _end_with_actor(job: JobRecord, actor: ActorRecord, now: float) -> EndJob:
    """Return the end of the job of an actor that is dead. A submitted one its supervisor would have ended itself."""
    if not job.submission_id:
        return EndJob(None, job.job_id, JobState.SUCCEEDED, "its actor is dead", now)
    reason = actor.death.reason[:MOST_REASON_CHARACTERS] if actor.death is not None else "nobody knows why"
    return EndJob(None, job.job_id, JobState.FAILED, f"its supervisor has died: {reason}", now)


def _wants_place(record: ActorRecord) -> bool:
    return record.state in (ActorState.PENDING_CREATION, ActorState.RESTARTING) and record.node_id is None


def _is_over(record: ActorRecord, incarnation: int, node: NodeId) -> bool:
    if record.state is ActorState.DEAD or record.incarnation > incarnation:
        return True
    return record.incarnation == incarnation and record.node_id not in (None, node)


def _check(request: CreateActor) -> None:
    """Refuse what could not be kept, or would upset the node that it is placed on."""
    about = request.description
    _check_name(about.namespace, about.name)
    if len(request.spec) > MOST_SPEC_BYTES or len(about.methods) > MOST_METHODS_BYTES:
        raise InvalidRequestError(
            f"actor {about.actor_id} is made from {len(request.spec)} bytes, and its methods are told in "
            f"{len(about.methods)}; at most {MOST_SPEC_BYTES} and {MOST_METHODS_BYTES} are kept"
        )
    if about.max_restarts < -1:
        raise InvalidRequestError(f"max_restarts is {about.max_restarts}; it is -1 (without end), 0 or more")
    for name in {**about.placement, **about.resources}:
        placed, held = about.placement.get(name, 0), about.resources.get(name, 0)
        if not 0 <= held <= placed:
            raise InvalidRequestError(
                f"actor {about.actor_id} is placed by {placed} units of {name} and cannot hold {held}: an amount is "
                "not negative, and what an actor holds is part of what it is placed by"
            )


def _check_name(namespace: str, name: str) -> None:
    """Refuse names that would make too long a key."""
    if len(namespace.encode()) + len(name.encode()) > NAME_BYTES:
        raise InvalidRequestError(
            f"an actor's namespace and name have at most {NAME_BYTES} bytes together, got {name[:80]!r}…"
        )


def _slot(actor: ActorId, incarnation: int) -> SlotId:
    """Return the slot of an incarnation, which all replicas name alike (51 bits, that JSON keeps exact anywhere)."""
    digest = hashlib.blake2b(f"{actor}/{incarnation}".encode(), digest_size=8).digest()
    return SlotId(int.from_bytes(digest, "big") >> 13)


def _summary(record: ActorRecord) -> ActorSummary:
    about = record.description
    return ActorSummary(
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
        death_reason=record.death.reason[:LISTED_REASON_CHARACTERS] if record.death is not None else "",
    )
