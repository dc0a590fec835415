"""The control store's decisions: what exists, what should go, who is told.

Replicas are equal, and any number may run. Each keeps a cache of the store by watching it, answers from it what cannot
have changed, reads the rest through the store's leader, and changes the store by compare-and-set only. (Lists come from
the cache: they may lack what another replica wrote a moment ago.) What one of them
began and did not finish (a record says that a node is dead, but nobody was told) every other finishes: once a second
each looks at what the records say, not at what happened.

Deaths and ends are told by events, which may be lost; whoever still speaks as or for a dead one is told again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from shoal_core.protocol.actors import NodeActors
from shoal_core.protocol.effects import (
    Changed,
    Conflict,
    Connected,
    Effect,
    Event,
    Loaded,
    Publish,
    Reply,
    Request,
    Start,
    Store,
    Stored,
    StoreRefused,
    WakeAt,
)
from shoal_core.protocol.errors import (
    InvalidRequestError,
    NotFoundError,
    ShoalError,
    VersionMismatchError,
)
from shoal_core.protocol.ids import ActorId, JobId, NodeId, PlacementGroupId, ServiceId
from shoal_core.protocol.messages import (
    PROTOCOL_VERSION,
    ClusterInfo,
    DriverAlive,
    Echo,
    FinishJob,
    GetCluster,
    GetFunctionPart,
    GetJob,
    GetNode,
    JobFinished,
    JobList,
    JobRecord,
    JobState,
    KvDelete,
    KvGet,
    KvKeyList,
    KvKeys,
    KvPut,
    ListJobs,
    ListNodes,
    Message,
    NodeAnnouncement,
    NodeDescription,
    NodeDied,
    NodeList,
    NodeRecord,
    NodeState,
    ProcessDied,
    PutFunctionPart,
    RegisterJob,
    RetireNode,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_gcs.actor_operations import Detour
from shoal_gcs.actors import Actors
from shoal_gcs.counts import Counts
from shoal_gcs.groups import Groups
from shoal_gcs.operations import (
    BuryNode,
    DeleteKeys,
    DescribeCluster,
    EndJob,
    GetKey,
    MarkTold,
    OpenJob,
    Operation,
    PutKey,
    ReadJob,
    ReadNode,
    ReadPart,
    RegisterNode,
    WritePart,
    encode_record,
)
from shoal_gcs.records import (
    ACTOR_PREFIX,
    CONTROL,
    GROUP_PREFIX,
    LIST_BYTES,
    NAME_BYTES,
    PART_BYTES,
    StoredJob,
    StoredKey,
    StoredNode,
    function_key,
    function_prefix,
    job_key,
    join,
    kv_key,
    node_key,
)
from shoal_gcs.silence import Silence
from shoal_gcs.state import Held, State

TICK_SECONDS = 1.0
NODE_SILENCE_SECONDS = 5.0
DRIVER_SILENCE_SECONDS = 10.0
PATIENCE_TICKS = 2
"""For how many ticks a replica leaves an end that nobody was told of to the replica that wrote it."""

R = TypeVar("R", StoredNode, StoredJob)


@dataclass(frozen=True, slots=True)
class Begin:
    """Input: the replica begins."""


@dataclass(frozen=True, slots=True)
class PurgeFunctions:
    """Command: delete all functions of a job that ended; ``Purged`` comes back."""

    job_id: JobId


@dataclass(frozen=True, slots=True)
class Purged:
    """Input: the functions of a job are gone."""

    job_id: JobId


class ControlStore:
    """One replica's core. ``session`` is what it proposes for a cluster that has none yet."""

    def __init__(self, subjects: Subjects, identity: ServiceId, session: str, version: str) -> None:
        self.state = State()
        self.counts = Counts()
        self._subjects = subjects
        self._identity = identity
        self._session = session
        self._version = version
        self._actors = Actors(self.state, subjects, identity)
        self._groups = Groups(self.state, subjects, identity)
        self._nodes_silent = Silence()
        self._drivers_silent = Silence()
        self._echo_sent = 0
        self._echo_heard = 0
        self._writes = 0
        self._under_way: set[str] = set()
        self._untold: dict[str, int] = {}
        self._told_again: set[str] = set()

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input."""
        match message:
            case Request():
                return self._request(message, now)
            case Event():
                return self._event(message.message, message.source, now)
            case Stored() | Conflict() | Loaded():
                return self._settled(message, now)
            case StoreRefused():
                return self._store_refused(message)
            case Changed():
                self.state.remember(message.key, message.value, message.revision)
                return self._groups.written(message.key) if message.key.startswith(GROUP_PREFIX) else []
            case Connected():
                self._nodes_silent.reset()
                self._drivers_silent.reset()
                return []
            case Purged():
                self.state.written.forget_all(function_prefix(message.job_id))
                return self._mark_job_told(message.job_id)
            case Begin():
                return [*DescribeCluster(None, self._info()).attempt(self.state), WakeAt(now)]
        raise TypeError(f"not an input of the control store: {message!r}")

    def tick(self, now: float) -> list[Effect]:
        """Once a second: send the echo, declare the silent dead, finish what others left."""
        echoed = self._echo_sent > 0 and self._echo_heard == self._echo_sent
        self._told_again.clear()
        wanted = [
            *self._bury_silent_nodes(now, echoed),
            *self._end_silent_jobs(now, echoed),
            # What is published without a connection is lost, and must not be noted as told.
            *(self._finish_for_others() if echoed else ()),
            *self._all_by_themselves(self._actors.due(now)),
            *self._all_by_themselves(self._groups.due(now)),
            *self._actors.demands(now),
            *self._groups.demands(),
            *self._groups.overdue(now),
        ]
        self._echo_sent += 1
        echo = Publish(self._subjects.event(Role.GCS, self._identity, "echo"), Echo(number=self._echo_sent))
        # Stores go last: nothing here depends on them, and one that conflicts must not hold up the rest.
        told = [effect for effect in wanted if not isinstance(effect, Store)]
        stores = [effect for effect in wanted if isinstance(effect, Store)]
        return [WakeAt(now + TICK_SECONDS), echo, *told, *stores]

    # -------------------------------------------------------------------------------- silence and ends

    def _bury_silent_nodes(self, now: float, echoed: bool) -> list[Effect]:
        self._nodes_silent.pass_time(now, self.state.live_nodes(), echoed)
        reason = f"nothing was heard of the node for {NODE_SILENCE_SECONDS:g} s"
        effects: list[Effect] = []
        for node in self._nodes_silent.longer_than(NODE_SILENCE_SECONDS):
            effects += self._by_itself(node_key(NodeId(node)), BuryNode(None, NodeId(node), reason, now))
        return effects

    def _end_silent_jobs(self, now: float, echoed: bool) -> list[Effect]:
        self._drivers_silent.pass_time(now, self.state.driven_jobs(), echoed)
        reason = f"nothing was heard of the driver for {DRIVER_SILENCE_SECONDS:g} s"
        effects: list[Effect] = []
        for job in self._drivers_silent.longer_than(DRIVER_SILENCE_SECONDS):
            operation = EndJob(None, JobId(job), JobState.FAILED, reason, now)
            effects += self._by_itself(job_key(JobId(job)), operation)
        return effects

    def _by_itself(self, key: str, operation: Operation) -> list[Effect]:
        """Begin what nobody asked for, unless it is under way already."""
        if key in self._under_way:
            return []
        effects = operation.attempt(self.state)
        if effects:
            self._under_way.add(key)
        return effects

    def _all_by_themselves(self, due: Iterable[tuple[str, Operation]]) -> list[Effect]:
        """Begin a number of operations, each of which changes the key beside it."""
        return [effect for key, operation in list(due) for effect in self._by_itself(key, operation)]

    def _finish_for_others(self) -> list[Effect]:
        """Tell of the ends that the records say nobody was told of, after some patience."""
        effects: list[Effect] = []
        self._untold = {key: self._untold.get(key, 0) + 1 for key in self.state.untold}
        for key in sorted(key for key, ticks in self._untold.items() if ticks > PATIENCE_TICKS):
            self._untold[key] = 0
            kind, _, name = key.partition(".")
            effects += self._tell_node(NodeId(name)) if kind == "node" else self._tell_job(JobId(name))
        return effects

    def _tell_node(self, node: NodeId) -> list[Effect]:
        """Publish a death, then note that it was published."""
        held = self.state.nodes[node]
        if held.value.told:
            return [self._node_died(node)]
        value = encode_record(held.value.model_copy(update={"told": True}))
        return [
            self._node_died(node),
            *self._by_itself(node_key(node), MarkTold(None, node_key(node), value, held.revision)),
        ]

    def _tell_job(self, job: JobId) -> list[Effect]:
        """Publish a job's end and have its functions deleted; only then is it noted."""
        return [self._job_finished(job), Start(PurgeFunctions(job))]

    def _mark_job_told(self, job: JobId) -> list[Effect]:
        held = self.state.jobs[job]
        if held.value.told:
            return []
        value = encode_record(held.value.model_copy(update={"told": True}))
        return self._by_itself(job_key(job), MarkTold(None, job_key(job), value, held.revision))

    def _node_died(self, node: NodeId) -> Publish:
        reason = self.state.nodes[node].value.record.death_reason
        return Publish(self._event_subject("node_died"), NodeDied(node_id=node, reason=reason))

    def _job_finished(self, job: JobId) -> Publish:
        record = self.state.jobs[job].value.record
        return Publish(
            self._event_subject("job_finished"),
            JobFinished(job_id=job, driver=record.driver, state=record.state, message=record.message),
        )

    def _event_subject(self, kind: str) -> str:
        return self._subjects.event(Role.GCS, self._identity, kind)

    # -------------------------------------------------------------------------------- signs of life

    def _event(self, event: Message, source: str, now: float) -> list[Effect]:
        match event:
            case NodeAnnouncement():
                return self._announced(event)
            case NodeActors():
                return self._actors.told_again(event)
            case ProcessDied():
                return self._all_by_themselves(self._actors.owner_died(event.process_id, now))
            case DriverAlive():
                self._drivers_silent.heard(event.job_id)
                return self._tell_again([event.job_id])
            case Echo() if source == self._identity:
                self._echo_heard = event.number
        return []

    def _announced(self, announcement: NodeAnnouncement) -> list[Effect]:
        """Take in a node's sign of life. One that is dead, or that serves jobs that ended, is told so again."""
        node = announcement.node_id
        self._nodes_silent.heard(node)
        effects = self._tell_again([lease.job_id for lease in announcement.leases])
        effects += self._groups.told_again(announcement)
        held = self.state.nodes.get(node)
        if held is not None and held.value.record.state is NodeState.DEAD and node not in self._told_again:
            self._told_again.add(node)
            effects.append(self._node_died(node))
        return effects

    def _tell_again(self, jobs: Iterable[JobId]) -> list[Effect]:
        """Publish the ends of those jobs that have ended, each at most once a tick."""
        effects: list[Effect] = []
        for job in jobs:
            held = self.state.jobs.get(job)
            if held is None or held.value.record.state is JobState.RUNNING or job in self._told_again:
                continue
            self._told_again.add(job)
            effects.append(self._job_finished(job))
        return effects

    # -------------------------------------------------------------------------------- requests

    def _settled(self, outcome: Stored | Conflict | Loaded, now: float) -> list[Effect]:
        """Take in the outcome of a write or a read, and go on with the operation it belongs to."""
        operation: Operation = outcome.context
        if outcome.bucket == CONTROL:
            self.state.remember(outcome.key, outcome.value, outcome.revision)
            if outcome.value is None and not isinstance(outcome, Loaded):
                self.state.is_gone(outcome.key)
        else:
            self.state.written.remember(outcome.key, outcome.value)
        self._no_more_under_way(operation, outcome.key)
        effects = operation.settled(self.state, outcome)
        if outcome.key.startswith(GROUP_PREFIX):
            effects += self._groups.written(outcome.key)
            effects.sort(key=lambda effect: isinstance(effect, Store))  # an answer to one waits for no write of another
        if isinstance(outcome, Stored):
            match operation:
                case BuryNode():
                    self.counts.node_deaths["silent" if operation.token is None else "left"] += 1
                    effects += self._tell_node(operation.node_id)
                case EndJob():
                    effects += self._tell_job(operation.job_id)
            if outcome.bucket == CONTROL and outcome.value is not None:
                told, stores = self._told(outcome, now)
                effects = [*told, *effects, *stores]  # telling waits for no write that follows, nor does an answer
        return effects

    def _told(self, outcome: Stored, now: float) -> tuple[list[Effect], list[Effect]]:
        """Tell of the record of an actor or a group that this replica has changed; and return what follows from it."""
        key = outcome.key
        if key.startswith(ACTOR_PREFIX):
            actor = ActorId(key.removeprefix(ACTOR_PREFIX))
            if (held := self.state.actors.get(actor)) is not None and held.revision == outcome.revision:
                self.counts.wrote(held.value)
            return self._actors.told(actor, now), []
        if not key.startswith(GROUP_PREFIX):
            return [], []
        group = PlacementGroupId(key.removeprefix(GROUP_PREFIX))
        ends = self._all_by_themselves(self._actors.end_with_group(group, now))
        return self._groups.told(group, now), ends

    def _store_refused(self, refusal: StoreRefused) -> list[Effect]:
        """Tell whoever asked; what nobody asked for is tried again at a later tick."""
        operation: Operation = refusal.context
        self._no_more_under_way(operation, refusal.key)
        first = self._groups.refused(refusal) if refusal.key.startswith(GROUP_PREFIX) else []
        return [*operation.refused(refusal), *first]

    def _no_more_under_way(self, operation: Operation, key: str) -> None:
        """A write or read of something that nobody asked for is settled: from now on it may be begun anew."""
        if operation.token is None:
            self._under_way.discard(operation.begun_for if isinstance(operation, Detour) else key)

    def _request(self, request: Request, now: float) -> list[Effect]:
        """Begin what is asked for, or refuse it."""
        try:
            operation = self._operation(request, now)
            return operation if isinstance(operation, list) else operation.attempt(self.state)
        except ShoalError as error:
            return [Reply(request.token, error)]

    def _operation(self, request: Request, now: float) -> Operation | list[Effect]:
        """Return the operation a request asks for, or at once the answer."""
        token, message = request.token, request.message
        if (about_actors := self._actors.operation(message, token, now)) is not None:
            return about_actors
        if (about_groups := self._groups.operation(message, token, now)) is not None:
            return about_groups
        match message:
            case GetCluster():
                self._check_version(message)
                return DescribeCluster(token, self._info())
            case NodeDescription():
                return RegisterNode(token, message)
            case RetireNode():
                return BuryNode(token, message.node_id, message.reason, now)
            case GetNode():
                return ReadNode(token, message.node_id)
            case ListNodes():
                return [Reply(token, NodeList(nodes=_listed_nodes(self.state.nodes.values())))]
            case RegisterJob():
                return OpenJob(token, message, now)
            case FinishJob():
                if message.state is JobState.RUNNING:
                    raise InvalidRequestError(f"job {message.job_id} cannot end as RUNNING: say SUCCEEDED or FAILED")
                return EndJob(token, message.job_id, message.state, message.message, now, message.exit_code)
            case GetJob():
                return ReadJob(token, message.job_id)
            case ListJobs():
                return [Reply(token, JobList(jobs=_listed_jobs(self.state.jobs.values())))]
        return self._data_operation(token, message)

    def _data_operation(self, token: int, message: Message) -> Operation | list[Effect]:
        """Return the operation that concerns functions or the internal key-value store."""
        match message:
            case PutFunctionPart():
                _check_part(message)
                self._check_running(message.job_id)
                key = function_key(message.job_id, message.function_id, message.part)
                return WritePart(token, message.job_id, key, join(str(message.parts), message.data))
            case GetFunctionPart():
                return ReadPart(token, message)
            case KvPut():
                return self._put_key(token, message)
            case KvGet():
                _check_name(message.namespace, message.key)
                return GetKey(token, message.namespace, message.key)
            case KvDelete():
                _check_name(message.namespace, message.key)
                keys = self._keys(message.namespace, message.key) if message.prefix else [message.key]
                return DeleteKeys(token, frozenset(kv_key(message.namespace, key) for key in keys), self._next_writer())
            case KvKeys():
                return [Reply(token, KvKeyList(keys=self._keys(message.namespace, message.prefix)))]
        raise InvalidRequestError(f"the control store does not know the request {type(message).__name__}")

    def _put_key(self, token: int, message: KvPut) -> Operation:
        _check_name(message.namespace, message.key)
        _check_size(f"the value of key {message.key!r}", message.value)
        base = self.state.kv.get((message.namespace, message.key))
        if base is None or not (message.overwrite or base.value.value is None):
            # Whether there is such a key now is for the store to say: it takes a write at revision 0 only if not.
            base = Held(StoredKey(), 0)
        return PutKey(token, message, self._next_writer(), base)

    def _next_writer(self) -> str:
        """Name a request that changes keys."""
        self._writes += 1
        return f"{self._identity}:{self._writes}"

    def _keys(self, namespace: str, prefix: str) -> list[str]:
        """Return a namespace's keys, as far as the cache knows them."""
        return sorted(
            key
            for (space, key), held in self.state.kv.items()
            if space == namespace and key.startswith(prefix) and held.value.value is not None
        )

    def _check_running(self, job: JobId) -> None:
        """Refuse functions for a job that ended: they would never be deleted."""
        held = self.state.jobs.get(job)
        if held is not None and held.value.record.state is not JobState.RUNNING:
            raise NotFoundError(f"job {job} has ended ({held.value.record.state})")

    def _check_version(self, message: GetCluster) -> None:
        if message.protocol != PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"this SDK is version {message.version} and speaks protocol {message.protocol}; the cluster "
                f"{self._subjects.cluster!r} runs version {self._version} and speaks protocol {PROTOCOL_VERSION}: "
                "install the same version on both sides"
            )

    def _info(self) -> ClusterInfo:
        return ClusterInfo(
            cluster=self._subjects.cluster, version=self._version, protocol=PROTOCOL_VERSION, session=self._session
        )


def _listed_nodes(nodes: Iterable[Held[StoredNode]]) -> list[NodeRecord]:
    """Return the records of all living nodes and of the dead as far as they fit, oldest first."""
    newest_first = sorted(nodes, key=lambda held: -(held.value.record.ended_at or math.inf))
    listed = [held.value.record for held in _that_fit(newest_first)]
    return sorted(listed, key=lambda record: (record.description.started_at, record.description.node_id))


def _listed_jobs(jobs: Iterable[Held[StoredJob]]) -> list[JobRecord]:
    """Return the records of all running jobs and of the ended as far as they fit, oldest first."""
    newest_first = sorted(jobs, key=lambda held: -(held.value.record.ended_at or math.inf))
    return sorted((held.value.record for held in _that_fit(newest_first)), key=lambda record: record.job_id)


def _that_fit(newest_first: Iterable[Held[R]]) -> Iterable[Held[R]]:
    """Return what fits into one answer, and in any case all that has not ended."""
    room = LIST_BYTES
    for held in newest_first:
        room -= held.size_bytes
        if room >= 0 or held.value.record.ended_at is None:
            yield held


def _check_name(namespace: str, key: str) -> None:
    """Refuse names that would make too long a subject."""
    if len(namespace.encode()) + len(key.encode()) > NAME_BYTES:
        raise InvalidRequestError(f"a namespace and key have at most {NAME_BYTES} bytes together, got {key[:80]!r}…")


def _check_size(what: str, data: bytes) -> None:
    """Refuse what would not fit into a message."""
    if len(data) > PART_BYTES:
        raise InvalidRequestError(f"{what} has {len(data)} bytes, and at most {PART_BYTES} are kept")


def _check_part(message: PutFunctionPart) -> None:
    """Refuse a part that cannot be one."""
    _check_size(f"part {message.part} of function {message.function_id}", message.data)
    if not 0 <= message.part < message.parts:
        raise InvalidRequestError(f"there is no part {message.part} of {message.parts}; parts count from 0")
