"""The control plane's messages: pydantic models, JSON on the wire, so that ``nats sub`` shows what happens.

Which verb of which subject carries which of them, and what answers it, is in ``verbs``; every answer may instead be a
``Refusal``. Here is what all share, and what is about the cluster, its nodes and jobs; what is to run is in
``scheduling``, actors are in ``actors``, placement groups in ``groups``, objects in ``storage``. Amounts of resources
are in ten-thousandths (see ``resources``), times in seconds since the epoch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from shoal_core.protocol.ids import ActorId, FunctionId, JobId, NodeId, PlacementGroupId, ProcessId
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import Resources

PROTOCOL_VERSION = 2


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
    """A job's state; the three ends are never undone. STOPPED is one that was submitted, and that somebody ended."""

    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"


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
    """A driver opens its job, or whoever submits one that of its supervisor (verb ``register_job``).

    The second has no driver, but an ``actor`` that is created afterwards (see ``OpenActorJob``).
    """

    driver: ProcessId
    actor: ActorId | None = None
    submission_id: str = Field(default="", description="Of a submitted job; `actor` is its supervisor.")
    hostname: str
    machine_id: str
    pid: int
    entrypoint: str
    version: str
    python_version: str
    config: JobConfig


class JobRecord(Message):
    """What the control store knows of a job. That of a detached actor has no driver: it ends with ``actor``.

    So does a submitted one, whose ``actor`` is its supervisor, and FAILED where that did not end it before.
    """

    job_id: JobId
    driver: ProcessId
    actor: ActorId | None = None
    submission_id: str = ""
    hostname: str
    machine_id: str
    pid: int
    entrypoint: str
    config: JobConfig
    state: JobState
    started_at: float
    ended_at: float | None = None
    message: str = ""
    exit_code: int | None = None


class FinishJob(Message):
    """A driver ends its job, or a supervisor a submitted one, or a node saw the driver die (verb ``finish_job``)."""

    job_id: JobId
    state: JobState
    message: str = ""
    exit_code: int | None = Field(default=None, description="The status of a submitted job's program.")


class StopJob(Message):
    """Somebody wants a submitted job stopped, and has noted so (event ``stop.<job>`` of role process); a hint."""

    job_id: JobId


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
