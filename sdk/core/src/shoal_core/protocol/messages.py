"""The control plane's messages: pydantic models, JSON on the wire, so that ``nats sub`` shows what happens.

Which verb of which subject carries which of them, and what answers it, is in ``verbs``; every answer may instead be a
``Refusal``. Those about actors are in ``actors``. Amounts of resources are in ten-thousandths (see ``resources``),
times in seconds since the epoch.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field

from shoal_core.protocol.ids import ActorId, FunctionId, JobId, NodeId, ProcessId, SlotId
from shoal_core.protocol.placement import DEFAULT, Strategy
from shoal_core.protocol.resources import Resources

PROTOCOL_VERSION = 1
MOST_READ_BYTES = 512 * 1024


class Message(BaseModel):
    """What all control messages share: they do not change, and they refuse fields they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")


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


class LeaseSummary(Message):
    """How many leases one owner holds on a node, by scheduling key."""

    owner: ProcessId
    job_id: JobId
    resources: Resources
    count: int
    blocked: int = Field(default=0, description="Of these, how many wait in get and gave their CPU back.")
    recalled: int = Field(default=0, description="Of those not blocked, how many the owner was asked to give back.")


class NodeAnnouncement(Message):
    """A node's state, published every second and soon after it changed (event ``announce``)."""

    node_id: NodeId
    sequence: int = Field(description="Rises by one with each announcement of this node.")
    total: Resources
    free: Resources = Field(description="May be negative where unblocked workers overdraw.")
    labels: dict[str, str] = {}
    draining: bool = False
    leases: list[LeaseSummary] = []
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


class JobConfig(Message):
    """What a driver's worker processes need to know of it."""

    namespace: str
    sys_path: list[str] = []
    working_directory: str = ""
    environment: dict[str, str] = {}
    metadata: dict[str, str] = {}
    log_to_driver: bool = True
    priority: int = 0


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
    near: dict[NodeId, int] = Field(default={}, description="Bytes of large arguments, by the node where they lie.")
    wanted: int = Field(description="How many tasks wait; 0 withdraws the demand.")
    slots: list[SlotId] = Field(description="Ids of the leases asked for and not yet granted.")
    depth: int = Field(default=0, description="How deep the owner is nested; deeper demand goes first.")
    actor: ActorStart | None = Field(default=None, description="The one slot is for this incarnation of an actor.")


class Demand(Message):
    """All that an owner wants; each version replaces the one before, and it is repeated (``scheduler.demand``)."""

    owner: ProcessId
    job_id: JobId
    version: int
    entries: list[DemandEntry]


class LeaseRequest(Message):
    """A scheduler asks a node to grant leases to an owner (verb ``lease``)."""

    scheduler: str
    owner: ProcessId
    job_id: JobId
    key: int
    slots: list[SlotId]
    resources: Resources
    actor: ActorStart | None = None


class LeaseAnswer(Message):
    """Which slots a node granted. A node repeats its answer to a slot that it knows."""

    node_id: NodeId
    granted: list[SlotId]
    refused: list[SlotId]
    reason: str = ""
    free: Resources
    sequence: int = Field(description="Of the node's announcements: this answer is newer than that one.")


class RecallLeases(Message):
    """A scheduler asks a node to ask an owner for leases back, since others wait (verb ``recall``)."""

    owner: ProcessId
    resources: Resources
    count: int


class DemandNotice(Message):
    """What a scheduler tells an owner once about demand that no node can meet (event ``notice.<owner>``)."""

    key: int
    name: str
    text: str
    why: str = Field(default="", description="The reason in ``text``, alone.")
    actor: ActorId | None = Field(default=None, description="It is the demand of an actor that the owner created.")


class SchedulerPresence(Message):
    """A scheduler's sign of life, every second (event ``presence`` of role scheduler)."""

    scheduler: str


class GetPending(Message):
    """Ask a scheduler what waits (verb ``pending``)."""


class PendingDemand(Message):
    """Demand that waits, and why."""

    owner: ProcessId
    job_id: JobId
    name: str
    resources: Resources
    wanted: int
    waiting_seconds: float
    why: str
    feasible: bool


class PendingList(Message):
    """All demand that waits, longest first."""

    pending: list[PendingDemand]


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

    segment: str = Field(description="The file's name in the node's shared-memory folder.")
    capacity_bytes: int


class PinSegment(Message):
    """Ask the node to keep a segment while this process maps it (verb ``pin``)."""

    process: ProcessId
    segment: str
    serial: int = Field(
        description="Rises with each pin this process asks for, from 1. A repeated or late request can so be told "
        "from a new one: `SegmentUnpinned` with this serial ends this pin, even if a copy of the request comes later."
    )


class SegmentRead(Message):
    """Ask a node for bytes of a segment (verb ``read``); the answer is the bare bytes.

    Where they cannot be read, the answer is a ``Refusal`` that carries the header ``wire.REFUSAL_HEADER``.
    """

    segment: str
    offset: int = Field(ge=0)
    length: int = Field(ge=1, le=MOST_READ_BYTES)


class DurablePut(Message):
    """Open the upload of a durable object (verb ``put`` of the objectstore)."""

    object_id: str
    size_bytes: int
    chunks: int
    digest: str = Field(description="crc32 of the whole, 8 hex digits.")


class DurablePutChunk(Message):
    """Upload one chunk, at most 512 KiB (verb ``put_chunk``)."""

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
    """What a durable object consists of."""

    object_id: str
    size_bytes: int
    chunks: int
    digest: str


class DurableGetChunk(Message):
    """Ask for one chunk (verb ``get_chunk``)."""

    object_id: str
    index: int


class DurableChunk(Message):
    """One chunk of a durable object."""

    data: bytes


class DurableDelete(Message):
    """Remove a durable object (verb ``delete``)."""

    object_id: str


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
