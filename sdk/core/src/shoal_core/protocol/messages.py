"""The control plane's messages: pydantic models, JSON on the wire, so that ``nats sub`` shows what happens.

Which verb of which subject carries which of them, and what answers it, is in ``verbs``; every answer may instead be a
``Refusal``. Those about actors are in ``actors``, those about placement
groups in ``groups``. Amounts of resources are in ten-thousandths (see ``resources``),
times in seconds since the epoch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from shoal_core.protocol.ids import (
    ActorId,
    FunctionId,
    JobId,
    NodeId,
    ObjectKey,
    PlacementGroupId,
    ProcessId,
    SlotId,
)
from shoal_core.protocol.placement import DEFAULT, Bundle, Strategy
from shoal_core.protocol.resources import Resources

PROTOCOL_VERSION = 2
MOST_LISTED_OBJECTS = 1000
MOST_LISTED_TASKS = 2000
MOST_PENDING = 500
"""How many demands that wait one answer tells."""
MOST_NAMED = 5
MOST_PINS = 1000
"""How many segments one request pins."""
PLACE = "A file in the node's shared-memory folder; with `+` and an offset where the file is one that segments share."
CHUNK_BYTES = 1024 * 1024 - 4096
"""Of a durable object: with its headers, a chunk is one message of the broker's usual ``max_payload``."""
PUT_HOLDER = "put"
"""Who holds a durable object because it was put as one."""
NODE_HOLDER = "node:"
"""What the names of the nodes begin with that hold a durable object because they have spilled it."""


class Message(BaseModel):
    """What all control messages share: they do not change, and they refuse fields they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    bulk_field: ClassVar[str] = ""
    """The field of bytes that travels as it is, behind the JSON of all others (see ``wire``); "": none."""

    packs: ClassVar[bool] = False
    """Whether many of them that go to one subject in one turn of a loop travel as one packet (see ``wire``)."""


class Refusal(Message):
    """The answer to a request that could not be carried out."""

    code: str = Field(description="The wire code of an error class of `protocol.errors`.")
    detail: str = Field(description="What was wrong, where, why, and what to do.")


class Done(Message):
    """The answer to a request that asked for nothing but to be carried out."""


# ---------------------------------------------------------------------------------------- the cluster


class GetCluster(Message):
    """Ask what cluster this is; the first request of every connection (verb ``cluster``)."""

    version: str = Field(description="The asker's version of Shoal.")
    protocol: int = PROTOCOL_VERSION


class ClusterInfo(Message):
    """What cluster this is."""

    cluster: str
    version: str
    protocol: int
    session: str = Field(description="Drawn once for the life of the cluster's store.")


# ---------------------------------------------------------------------------------------- nodes


class NodeState(StrEnum):
    """A node's state; DEAD is never undone."""

    ALIVE = "ALIVE"
    DEAD = "DEAD"


class NodeDescription(Message):
    """What a node says of itself when it joins (verb ``register_node``, audience node)."""

    node_id: NodeId
    hostname: str
    address: str = Field(description="The address users see as NodeManagerAddress; nothing listens there.")
    machine_id: str = Field(description="Same for processes that share a kernel and a pid namespace.")
    pid: int
    total: Resources
    labels: dict[str, str] = {}
    shared_memory_path: str = Field(description="The folder of the node's segments; a probe file lies in it.")
    object_store_bytes: int
    version: str
    python_version: str
    started_at: float
    is_head: bool = False
    name: str = Field(default="", description="What users see as NodeName; the hostname where it is empty.")


class NodeRecord(Message):
    """What the control store knows of a node."""

    description: NodeDescription
    state: NodeState
    death_reason: str = ""
    ended_at: float | None = None


class GetNode(Message):
    """Ask for one node's record (verb ``get_node``)."""

    node_id: NodeId


class ListNodes(Message):
    """Ask for all nodes, dead ones too (verb ``list_nodes``)."""


class NodeList(Message):
    """All nodes, oldest first; of many dead ones only the newest."""

    nodes: list[NodeRecord]


class RetireNode(Message):
    """A node says that it leaves in order (verb ``retire_node``, audience node)."""

    node_id: NodeId
    reason: str


class DrainNode(Message):
    """Who runs a node has it grant nothing any more and ask its leases back (verb ``drain``, audience node).

    It is drained when it announces that it is draining, and that it has no leases and no actors.
    """


class LeaseSummary(Message):
    """How many leases one owner holds on a node, or in one bundle there, by scheduling key."""

    owner: ProcessId
    job_id: JobId
    resources: Resources
    count: int
    blocked: int = Field(default=0, description="Of these, how many wait in get and gave their CPU back.")
    recalled: int = Field(default=0, description="Of those not blocked, how many the owner was asked to give back.")
    bundle: Bundle | None = Field(default=None, description="The bundle of a placement group that they are out of.")


class BundleSummary(Message):
    """A bundle of a placement group that a node has reserved."""

    group_id: PlacementGroupId
    index: int
    job_id: JobId = Field(description="The group's, which so holds them.")
    total: Resources
    free: Resources = Field(description="Of that, what no lease holds.")
    committed: bool = Field(description="The group's record names this node: leases may come out of the bundle.")


class NodeAnnouncement(Message):
    """A node's state, published every second and soon after it changed (event ``announce``)."""

    node_id: NodeId
    sequence: int = Field(description="Rises with each announcement of this node, and each answer to a scheduler.")
    total: Resources
    free: Resources = Field(description="Without what bundles reserve. May be negative where workers overdraw.")
    labels: dict[str, str] = {}
    draining: bool = False
    leases: list[LeaseSummary] = []
    held_by_actors: dict[JobId, Resources] = Field(default={}, description="Beside the leases, by the actors' jobs.")
    bundles: list[BundleSummary] = []
    worker_processes: int = 0
    actors: int = Field(default=0, description="Actors that are or are about to be there; many hold no resources.")


class Echo(Message):
    """A control store's message to itself, every second: it comes back while the broker is reached (event ``echo``)."""

    number: int


class NodeDied(Message):
    """The control store declared a node dead (event ``node_died`` of role gcs)."""

    node_id: NodeId
    reason: str


class ProcessDied(Message):
    """A node saw one of its processes end (event ``process_died`` of role node)."""

    sequence: int = Field(description="Rises by one with each death told by this node; a gap means: re-read.")
    process_id: ProcessId
    reason: str


class GetProcesses(Message):
    """Ask a node which processes live there (verb ``processes``)."""


class ProcessList(Message):
    """The processes that live on a node, and the sequence of its last death event."""

    sequence: int
    processes: list[ProcessId]


# ---------------------------------------------------------------------------------------- jobs


class JobState(StrEnum):
    """A job's state; the two ends are never undone."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class JobTerms(Message):
    """What a job may claim beside other jobs."""

    priority: int = Field(default=0, description="Jobs of a higher one go first, as long as the others do not starve.")
    weight: float = Field(default=1.0, gt=0, description="Of its share: twice the weight, twice the share.")
    quotas: Resources = Field(default={}, description="At most so much of these it holds at any time.")


NO_TERMS = JobTerms()


class LogEncoding(StrEnum):
    """How log lines are written."""

    TEXT = "TEXT"
    JSON = "JSON"


class LogSettings(Message):
    """How a job's processes write what Python's ``logging`` is told."""

    encoding: LogEncoding
    level: str
    attributes: list[str] = Field(default=[], description="Of a record, beside those that are always written.")


class JobConfig(Message):
    """What a driver's worker processes need to know of it."""

    namespace: str
    sys_path: list[str] = []
    working_directory: str = ""
    runtime_env: str = Field(default="", description="The driver's runtime environment as JSON, for people to read.")
    metadata: dict[str, str] = {}
    log_to_driver: bool = True
    logging: LogSettings | None = Field(default=None, description="None: the processes' logging is left as it is.")
    terms: JobTerms = NO_TERMS


class RegisterJob(Message):
    """A driver opens its job (verb ``register_job``)."""

    driver: ProcessId
    hostname: str
    machine_id: str
    pid: int
    entrypoint: str
    version: str
    python_version: str
    config: JobConfig


class JobRecord(Message):
    """What the control store knows of a job. That of a detached actor has no driver: it ends with ``actor``."""

    job_id: JobId
    driver: ProcessId
    actor: ActorId | None = None
    hostname: str
    machine_id: str
    pid: int
    entrypoint: str
    config: JobConfig
    state: JobState
    started_at: float
    ended_at: float | None = None
    message: str = ""


class FinishJob(Message):
    """A driver ends its job, or a node saw the driver die (verb ``finish_job``)."""

    job_id: JobId
    state: JobState
    message: str = ""


class JobFinished(Message):
    """A job has ended; what belonged to it goes (event ``job_finished`` of role gcs)."""

    job_id: JobId
    driver: ProcessId
    state: JobState
    message: str


class GetJob(Message):
    """Ask for one job (verb ``get_job``)."""

    job_id: JobId


class ListJobs(Message):
    """Ask for all jobs (verb ``list_jobs``)."""


class JobList(Message):
    """All jobs, oldest first; of many that ended only the newest."""

    jobs: list[JobRecord]


class DriverAlive(Message):
    """A driver's sign of life, every second (event ``alive`` of role process)."""

    job_id: JobId
    driver: ProcessId


class AttachDriver(Message):
    """A driver on a node's machine asks it to watch its pid (verb ``attach_driver`` of the node)."""

    driver: ProcessId
    job_id: JobId
    machine_id: str
    pid: int


# ---------------------------------------------------------------------------------------- functions


class PutFunctionPart(Message):
    """Store one part of an exported function, at most 512 KiB (verb ``put_function``)."""

    job_id: JobId
    function_id: FunctionId
    part: int
    parts: int
    data: bytes


class GetFunctionPart(Message):
    """Ask for one part of an exported function (verb ``get_function``)."""

    job_id: JobId
    function_id: FunctionId
    part: int


class FunctionPart(Message):
    """One part of an exported function."""

    parts: int
    data: bytes


# ---------------------------------------------------------------------------------------- internal KV


class KvPut(Message):
    """Set a key of the internal key-value store (verb ``kv_put``)."""

    namespace: str
    key: str
    value: bytes
    overwrite: bool = True


class KvAdded(Message):
    """Whether the key was new."""

    added: bool


class KvGet(Message):
    """Ask for a key (verb ``kv_get``)."""

    namespace: str
    key: str


class KvValue(Message):
    """The value of a key, if it has one."""

    value: bytes | None


class KvDelete(Message):
    """Remove a key, or all keys that begin with it (verb ``kv_delete``)."""

    namespace: str
    key: str
    prefix: bool = False


class KvDeleted(Message):
    """How many keys were removed."""

    count: int


class KvKeys(Message):
    """Ask for the keys that begin with a prefix (verb ``kv_keys``)."""

    namespace: str
    prefix: str = ""


class KvKeyList(Message):
    """The keys, sorted."""

    keys: list[str]


# ---------------------------------------------------------------------------------------- leases


class ActorStart(Message):
    """An incarnation of an actor that wants a place; see ``actors`` for what follows."""

    actor_id: ActorId
    incarnation: int
    owner: ProcessId = Field(description="Who is told if no node can ever meet the demand.")


class DemandEntry(Message):
    """What an owner wants for one scheduling key."""

    key: int = Field(description="The owner's own number of the scheduling key.")
    name: str = Field(description="The function most recently queued under this key, for people to read.")
    resources: Resources
    strategy: Strategy = DEFAULT
    environment: str = Field(default="", description="The digest of the runtime environment; empty: none.")
    near: dict[NodeId, int] = Field(default={}, description="Bytes of large arguments, by the node where they lie.")
    wanted: int = Field(description="How many tasks wait; 0 withdraws the demand.")
    slots: list[SlotId] = Field(description="Ids of the leases asked for and not yet granted.")
    depth: int = Field(default=0, description="How deep the owner is nested; deeper demand of a job goes first.")
    priority: int = Field(default=0, description="Demand of a higher one goes before other demand of the same job.")
    actor: ActorStart | None = Field(default=None, description="The one slot is for this incarnation of an actor.")
    trace: str = Field(default="", description="That of a task that waits for the slots (see ``traces``).")


class Demand(Message):
    """All that an owner wants; each version replaces the one before, and it is repeated (``scheduler.demand``)."""

    owner: ProcessId
    job_id: JobId
    version: int
    entries: list[DemandEntry]
    terms: JobTerms = Field(default=NO_TERMS, description="The job's.")


class LeaseRequest(Message):
    """A scheduler asks a node to grant leases to an owner (verb ``lease``)."""

    scheduler: str
    owner: ProcessId
    job_id: JobId
    key: int
    slots: list[SlotId]
    resources: Resources
    environment: str = ""
    actor: ActorStart | None = None
    bundle: Bundle | None = Field(default=None, description="Grant them out of this bundle, which is on the node.")


class LeaseAnswer(Message):
    """Which slots a node granted. A node repeats its answer to a slot that it knows."""

    node_id: NodeId
    granted: list[SlotId]
    refused: list[SlotId]
    reason: str = ""
    free: Resources = Field(description="On the node, or in the bundle that was asked for.")
    sequence: int = Field(description="As in the node's announcements: what has a lower one is older than this.")


class RecallLeases(Message):
    """A scheduler asks a node to ask an owner for leases back, since others wait (verb ``recall``)."""

    owner: ProcessId
    resources: Resources
    count: int
    bundle: Bundle | None = Field(default=None, description="Those out of this bundle; None: those out of none.")


class DemandNotice(Message):
    """What a scheduler tells an owner once about demand that no node can meet (event ``notice.<owner>``)."""

    key: int
    name: str
    text: str
    why: str = Field(default="", description="The reason in ``text``, alone.")
    actor: ActorId | None = Field(default=None, description="It is the demand of an actor that the owner created.")
    group: PlacementGroupId | None = Field(default=None, description="It is that of a group that the owner created.")


class SchedulerPresence(Message):
    """A scheduler's sign of life, every second, and when it finds that there is too little of something (event
    ``presence`` of role scheduler).
    """

    scheduler: str
    contended: list[str] = Field(default=[], description="The resources of which it found too little lately.")


class GetPending(Message):
    """Ask a scheduler what waits (verb ``pending``)."""

    about: str = Field(default="", description="Only what has this name, job, owner, actor or group; empty: anything.")


class NodeShortage(Message):
    """What a node lacks that could ever hold a lease."""

    node_id: NodeId
    lacking: Resources


class JobStanding(Message):
    """What a job may claim and holds: its dominant share, of 1 for all there is, divided by its weight."""

    job_id: JobId
    priority: int
    weight: float
    share: float


class PendingTurn(Message):
    """When demand has its turn: what decides is in this order."""

    goes_first_seconds: float | None = Field(
        default=None, description="For so long it has gone before everything, since it had waited too long; else None."
    )
    kept_on: NodeId | None = Field(default=None, description="The node on which room is kept for it now.")
    over_quota: list[str] = Field(default=[], description="Of these its job would hold more than it may.")
    job: JobStanding
    jobs_before: list[JobStanding] = Field(description="Jobs that wait and go before; at most MOST_NAMED of them.")
    job_count: int = Field(description="How many jobs go before.")
    priority: int = Field(description="Within its job.")
    before_in_job: int = Field(description="How many demands of its job go before.")
    nearest: list[NodeShortage] = Field(description="The nodes that lack the least; at most MOST_NAMED of them.")


class PendingDemand(Message):
    """Demand that waits, and why. ``key`` is its owner's for it; -1 for a placement group."""

    owner: ProcessId
    key: int = -1
    job_id: JobId
    name: str
    resources: Resources
    wanted: int
    waiting_seconds: float
    why: str
    feasible: bool
    actor: ActorId | None = None
    group: str = Field(default="", description="The placement group that waits; empty: it is none.")
    turn: PendingTurn | None = Field(default=None, description="None where it is asked for now, or can never be.")


class PendingList(Message):
    """What waits, longest first; at most MOST_PENDING."""

    pending: list[PendingDemand]
    count: int = Field(default=0, description="How many there are altogether.")


class TaskState(StrEnum):
    """How far a task is, in Ray's words; NIL: its owner knows no such task (any more).

    Of those that run or have ended, whoever runs them tells.
    """

    NIL = "NIL"
    PENDING_ARGS_AVAIL = "PENDING_ARGS_AVAIL"
    PENDING_NODE_ASSIGNMENT = "PENDING_NODE_ASSIGNMENT"
    SUBMITTED_TO_WORKER = "SUBMITTED_TO_WORKER"
    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


class ExplainTask(Message):
    """Ask the node of a task's owner how far the task is (verb ``task``); the answer is the owner's own."""

    owner: ProcessId
    task: int = Field(description="Its number there.")
    timeout_seconds: float = Field(gt=0, le=60, description="An owner that has not answered by then is silent.")


class TaskStanding(Message):
    """What a task's owner knows of it."""

    state: TaskState
    name: str = Field(default="", description="Its function's.")
    key: int = Field(default=-1, description="PENDING_NODE_ASSIGNMENT: of the demand that it is part of.")
    before: int = Field(
        default=0,
        description="So many tasks of its owner come first: in the same queue, or at the process it was sent to.",
    )
    leases: int = Field(default=0, description="So many worker processes its owner has now for that queue.")
    process: str = Field(default="", description="SUBMITTED_TO_WORKER: the process it was sent to.")
    actor: str = Field(default="", description="It is a call of this actor.")
    missing: list[str] = Field(default=[], description="The arguments it waits for, by id; at most MOST_NAMED of them.")
    missing_count: int = Field(default=0, description="How many arguments it waits for.")


class GetResources(Message):
    """Ask a scheduler for its view of the cluster's resources (verb ``resources``)."""


class ResourceView(Message):
    """The resources of all living nodes: all there are, and what nobody uses."""

    total: Resources
    free: Resources


# ---------------------------------------------------------------------------------------- shared memory


class AllocateSegment(Message):
    """Ask the node for a segment to write one object into (verb ``allocate``).

    The same request again, as after a lost answer, is answered with the same segment while that is not sealed.
    """

    process: ProcessId
    size_bytes: int
    serial: int = Field(description="Of this process's requests, another number for each.")


class SegmentGranted(Message):
    """The file to write; it is pinned for the asker until it seals, frees or dies."""

    segment: str
    place: str = Field(description=PLACE)
    capacity_bytes: int


class PinSegment(Message):
    """Ask one's own node to keep a segment while this process maps it (verb ``pin``).

    Where the segment is another node's, the node first pulls a copy of it, once for all who ask.
    """

    process: ProcessId
    segment: str = Field(description="The segment's name on the node where the object lies, its home.")
    serial: int = Field(
        description="Rises with each pin this process asks for, from 1. A repeated or late request can so be told "
        "from a new one: `SegmentUnpinned` with this serial ends this pin, even if a copy of the request comes later."
    )
    home: NodeId = Field(
        default=NodeId(""), description="The node where the object lies; the one that is asked if empty."
    )
    size_bytes: int = Field(default=0, ge=0, description="How long the object is; needed where its home is elsewhere.")


class PinSegments(Message):
    """Ask the node to keep many segments of its own, as far as that can be done at once (verb ``pin_many``)."""

    process: ProcessId
    pins: dict[str, int] = Field(description="Segments, each with a serial as in `PinSegment`.", max_length=MOST_PINS)


class SegmentsPinned(Message):
    """Which of the segments are pinned; the others are to be asked for one by one, which says what is wrong."""

    places: dict[str, str] = Field(description=f"By the names of the segments. {PLACE}")


class SegmentPinned(Message):
    """The segment is kept; it can be mapped."""

    segment: str = Field(description="Its name on the node that was asked.")
    place: str = Field(description=PLACE)


class LendSegment(Message):
    """Ask the home of a segment to keep it for a puller, and to send its chunks (verb ``lend``).

    The puller is a node, or a driver without one. It says ``SegmentUnpinned`` with this serial when it has ended. A
    node that has pulled a copy is told ``SegmentFreed`` when the object goes, unless it says ``CopyDropped`` before.
    """

    puller: NodeId | ProcessId
    segment: str
    size_bytes: int = Field(ge=1)
    serial: int = Field(description="Of this puller's requests, another number for each.")
    job_id: JobId = Field(default=JobId(""), description="The puller's job, if it is a driver: its end ends the loan.")


class SegmentLent(Message):
    """The segment's chunks can be pulled."""

    chunk_bytes: int = Field(description="The size of all chunks but the last.")


class TakeObject(Message):
    """A driver without a node asks one to pull an object from it into a new segment (verb ``take``).

    The answer comes when the object is there; it is the driver's then. Asked again, it is answered with the same.
    """

    process: ProcessId
    job_id: JobId
    stream: str = Field(description="The driver's name for the object, under which it offers its chunks.")
    size_bytes: int = Field(ge=1)
    chunk_bytes: int = Field(ge=1)
    object_id: str = Field(description="Its durable id, under which it can be spilled: 48 hex digits.")
    serial: int = Field(description="Of this process's requests, another number for each.")


class ListObjects(Message):
    """Ask a node which objects its processes hold and what its shared memory is used for (verb ``objects``)."""

    most: int = Field(ge=0, le=MOST_LISTED_OBJECTS, description="So many of the largest objects are described.")
    timeout_seconds: float = Field(gt=0, le=60, description="A process that has not answered by then is silent.")


class StoreUse(Message):
    """What a node's shared memory is used for."""

    capacity_bytes: int
    used_bytes: int = Field(description="Of objects that are kept or being written.")
    pinned_bytes: int = Field(description="Of these, what processes have mapped at this moment.")
    warm_bytes: int = Field(description="Of freed objects, kept for the next ones.")
    segments: int


class ProcessHoldings(Message):
    """What one process knows altogether."""

    process_id: ProcessId
    pid: int
    kind: str = Field(description="WORKER or DRIVER.")
    job_id: JobId
    objects: int
    inline_bytes: int = Field(description="Of small values, in the process's own memory.")


class ObjectHolding(Message):
    """One object as one process holds it."""

    process_id: ProcessId
    object_id: str = Field(description="48 hex digits; empty where only a mapping is left, of an object that is gone.")
    owner: str = Field(description="The process that owns it; may be empty like `object_id`.")
    size_bytes: int = Field(description="-1: not known (yet, or here).")
    status: str = Field(description="Of the task that makes it: PENDING_…, SUBMITTED_TO_WORKER, FINISHED, FAILED, NIL.")
    reasons: list[str] = Field(description="Why the process holds it: LOCAL_REFERENCE and so on, most telling first.")
    borrowers: int = Field(default=0, description="How many other processes its owner counts as holders.")
    node: str = Field(default="", description="The node in whose shared memory it lies; empty: inline, or nowhere yet.")
    segment: str = ""


class NodeObjects(Message):
    """Who holds what on a node, the largest first."""

    node_id: NodeId
    store: StoreUse
    processes: list[ProcessHoldings]
    objects: list[ObjectHolding]
    silent: list[ProcessId] = Field(description="Processes that did not answer in time.")


class ListTasks(Message):
    """Ask a node which tasks its processes own, run and have run lately (verb ``tasks``)."""

    most: int = Field(ge=0, le=MOST_LISTED_TASKS, description="So many are described.")
    timeout_seconds: float = Field(gt=0, le=60, description="A process that has not answered by then is silent.")


class TaskDescription(Message):
    """One task, as one process knows it: one that it owns, or one that it runs or has run."""

    process_id: ProcessId
    pid: int
    job_id: JobId
    owner: str = Field(description="Empty: the making of an actor.")
    number: int = Field(description="Its number at its owner.")
    attempt: int = Field(description="From 0; of the making of an actor, its incarnation.")
    name: str
    state: TaskState
    actor: str = Field(default="", description="The actor whose method it calls, or that it makes.")
    began_at: float = Field(default=0.0, description="Seconds since the epoch; 0: this process has not begun it.")
    seconds: float = Field(default=0.0, description="How long it ran.")
    code: str = Field(default="", description="Of its error.")
    text: str = Field(default="", description="The line of its error's text that says most.")


class NodeTasks(Message):
    """The tasks of a node's processes: those that run, those that ended last, and those that wait."""

    node_id: NodeId
    tasks: list[TaskDescription]
    silent: list[ProcessId] = Field(description="Processes that did not answer in time.")


class PersistSegment(Message):
    """Ask the node to copy what the asker has written into a segment to the durable tier (verb ``persist``).

    To be asked before the segment is sealed; the answer comes when the durable tier has sealed its copy.
    """

    process: ProcessId
    segment: str
    key: ObjectKey = Field(description="The asker's key of the object: the durable id is made of both.")
    keep_seconds: float | None = Field(default=None, gt=0, description="See `DurablePut`.")


class RestoreObject(Message):
    """Ask the node to fetch a durable object into a new segment that the asker owns (verb ``restore``).

    The segment is sealed, as if the object had been put there. The same request again, as after a lost answer, is
    answered with the same segment. ``NotFoundError`` where the durable tier has no such object.
    """

    process: ProcessId
    object_id: str = Field(description="The durable id: the object's id, 48 hex digits.")
    serial: int = Field(description="Of this process's restorations, another number for each.")
    absent_seconds: float = Field(default=10.0, gt=0, description="How long to wait for any objectstore service.")


class ObjectRestored(Message):
    """The segment that holds the object now; the asker frees it."""

    segment: str
    size_bytes: int


class DurablePut(Message):
    """Open the upload of a durable object, or hold one that is there with the same contents (verb ``put``).

    An object stays as long as anybody holds it, and its job runs. The objectstore is who is asked.
    """

    object_id: str
    size_bytes: int
    digests: list[int] = Field(description="crc32 of each chunk, in order. All but the last have CHUNK_BYTES.")
    job_id: JobId = Field(default=JobId(""), description="The object goes with this job; empty: with none.")
    holder: str = Field(default=PUT_HOLDER, description="Who holds the object; see `DurableDelete`.")
    keep_seconds: float | None = Field(default=None, gt=0, description="The holder holds it no longer than this.")


class DurableUpload(Message):
    """Where the chunks are to be written: a node does so itself, a process by ``put_chunk``."""

    place: str = Field(description="The upload's name: what follows the prefix in the subjects of its chunks.")
    sealed: bool = Field(description="The object is there already: nothing is to be uploaded.")


class DurablePutChunk(Message):
    """Upload one chunk (verb ``put_chunk``); refused where it is not the one that was announced."""

    bulk_field: ClassVar[str] = "data"

    object_id: str
    index: int
    data: bytes


class DurableSeal(Message):
    """End the upload of a durable object: all its chunks are there (verb ``seal``)."""

    object_id: str


class DurableGet(Message):
    """Ask for a durable object's manifest (verb ``get``)."""

    object_id: str


class DurableManifest(Message):
    """What a durable object consists of, and where its chunks lie."""

    object_id: str
    size_bytes: int
    digests: list[int]
    place: str


class DurableGetChunk(Message):
    """Ask for one chunk (verb ``get_chunk``)."""

    object_id: str
    index: int


class DurableChunk(Message):
    """One chunk of a durable object."""

    bulk_field: ClassVar[str] = "data"

    data: bytes


class DurableDelete(Message):
    """Hold a durable object no more; it goes with its last holder (verb ``delete``)."""

    object_id: str
    holder: str = Field(default="", description="Whose names begin with this, hold it no more; empty: nobody does.")


# ---------------------------------------------------------------------------------------- output of workers


class LogLines(Message):
    """Whole lines that one worker process printed (subject ``log``)."""

    node_id: NodeId
    job_id: JobId
    process_id: ProcessId
    pid: int
    stream: str = Field(description="stdout or stderr.")
    name: str = Field(default="", description="What the process was running, for people; may be empty.")
    lines: list[str]
