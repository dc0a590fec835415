"""The control plane's messages about what is to run: leases, demand and why it waits, and single tasks.

See ``messages`` for what all messages share.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from shoal_core.protocol.ids import ActorId, JobId, NodeId, PlacementGroupId, ProcessId, SlotId
from shoal_core.protocol.messages import NO_TERMS, JobTerms, Message
from shoal_core.protocol.placement import DEFAULT, Bundle, Strategy
from shoal_core.protocol.resources import Resources

MOST_LISTED_TASKS = 2000
MOST_PENDING = 500
"""How many demands that wait one answer tells."""
MOST_NAMED = 5


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
    ended_at: float = Field(default=0.0, description="0: it has not ended.")
    code: str = Field(default="", description="Of its error.")
    text: str = Field(default="", description="The line of its error's text that says most.")
    function: str = Field(default="", description="The name of what it calls, where its own is another.")
    created_at: float = Field(default=0.0, description="When it was submitted.")
    parent: str = Field(default="", description="The id of the task that submitted it; empty: the driver.")
    resources: Resources = Field(default={}, description="What its lease holds; a call of an actor has none.")
    group: str = Field(default="", description="The placement group it is in.")


class NodeTasks(Message):
    """The tasks of a node's processes: those that run, those that ended last, and those that wait."""

    node_id: NodeId
    tasks: list[TaskDescription]
    silent: list[ProcessId] = Field(description="Processes that did not answer in time.")
