"""Actors: what the control store records of them, and what is said about them.

The control store is the authority on which actors exist; nodes host them; calls go straight from the caller to the
actor's process over their channel, and no service is on that path.

An actor's life::

                      claim             started
    PENDING_CREATION ──────► (claimed) ────────► ALIVE ── ended ──► RESTARTING ── claim, started ──► ALIVE …
           │                     │                 │                    │
           └─────────────────────┴─────────────────┴────────────────────┴── killed, released, out of restarts,
                                                                            its job or owner gone ──► DEAD, for ever

1. **Create.** The creator draws the actor's id and asks for it (``CreateActor``). The record is stored before anything
   else. Where the actor has a name, the record is stored as ``NAMING``; then the name's key is taken by
   compare-and-set, which decides who wins; then the record becomes ``PENDING_CREATION``. A name whose holder is DEAD
   (or was never recorded) is free: it is taken over by compare-and-set on its holder.
2. **Place.** A replica of the control store states demand for one lease in the actor's name (``Demand`` whose owner is
   the actor's id, with ``ActorStart``), repeated every second until the incarnation is claimed. A scheduler asks a node
   for the lease as for any other; the lease is granted on what the actor needs to be placed.
3. **Claim.** Before the node gives it to a process it asks the control store for that incarnation (``ClaimActor``). The
   record names at most one node for each incarnation, and only that node gets the answer (``ActorClaim``), however
   often it asks; it starts the incarnation once. From then on its lease holds what the actor needs to run.
4. **Start.** A worker process makes the instance. When it is made, the node says so (``ActorStarted``), and ALIVE is
   stored before the address of the process is published. When ``__init__`` raises, or the process dies, the node says
   that (``ActorEnded``).
5. **Restart.** An incarnation that ended without being told to is followed by the next one, as often as
   ``max_restarts`` says. So is one whose node died.
6. **End.** DEAD is never undone. Whoever hosts an incarnation that the record does not name any more ends it.

Changes are told by ``ActorChanged`` events, which are hints: callers that wait read the record again, nodes tell every
second or two whom they host (``NodeActors``) and are told again.

A handle holds a reference to the actor's *creation object*, which its owner, the creator, makes with it. So handles are
counted by the counting of references, and when the last one is gone the owner releases the actor (``ReleaseActor``).
Detached actors are not counted; each has a job of its own, which ends with it.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from shoal_core.protocol.ids import ActorId, JobId, NodeId, ObjectKey, ProcessId
from shoal_core.protocol.messages import JobConfig, Message
from shoal_core.protocol.placement import DEFAULT, Strategy
from shoal_core.protocol.resources import Resources

MOST_CODE_BYTES = 16 * 1024
"""A class whose pickle is larger is fetched, since what an actor is made of is stored for each one."""
MOST_SPEC_BYTES = 256 * 1024 + MOST_CODE_BYTES
"""So that a class that goes along takes no room from the arguments."""
MOST_METHODS_BYTES = 128 * 1024
MOST_ERROR_BYTES = 64 * 1024
MOST_REPR_CHARACTERS = 1000


class ActorState(StrEnum):
    """How far an actor is in its life; DEAD is never undone. NAMING is seen by the control store alone."""

    NAMING = "NAMING"
    PENDING_CREATION = "PENDING_CREATION"
    ALIVE = "ALIVE"
    RESTARTING = "RESTARTING"
    DEAD = "DEAD"


class ActorDescription(Message):
    """What its creator says of an actor; it never changes."""

    actor_id: ActorId
    job_id: JobId = Field(description="The job it belongs to: its creator's, or its own where it is detached.")
    owner: ProcessId = Field(description="Its creator; an actor that is not detached ends with it.")
    owner_key: ObjectKey = Field(description="The owner's key of the creation object.")
    class_name: str
    name: str = Field(default="", description="Unique in its namespace; empty: it has none.")
    namespace: str = ""
    detached: bool = False
    placement: Resources = Field(description="What must be free where it is placed.")
    resources: Resources = Field(description="What it holds while it lives.")
    strategy: Strategy = DEFAULT
    environment: str = Field(default="", description="The digest of the runtime environment; empty: none.")
    priority: int = Field(default=0, description="See `DemandEntry`.")
    max_restarts: int = Field(default=0, description="How often it is started again; -1: without end.")
    methods: bytes = Field(default=b"", description="What a handle needs to know of the class; opaque to services.")
    trace: str = Field(default="", description="What its making belongs to (see ``traces``).")
    parent: str = Field(default="", description="The id of the task that asked for it; empty: the driver.")


class ActorDeath(Message):
    """Why an actor is dead."""

    reason: str
    error: bytes = Field(default=b"", description="The pickled exception of ``__init__``; opaque to services.")
    code: str = Field(default="actor_died", description="The wire code of the error that its callers get.")


class ActorRecord(Message):
    """What the control store knows of an actor.

    ``node_id`` is the node that claimed the current incarnation, None while none has. ``process_id`` is where it is
    called, there exactly while it is ALIVE.
    """

    description: ActorDescription
    state: ActorState
    incarnation: int = Field(default=0, description="Rises by one with each restart.")
    node_id: NodeId | None = None
    process_id: ProcessId | None = None
    pid: int = 0
    repr_name: str = Field(default="", description="What the class's own `__repr__` returned; empty: it has none.")
    created_at: float
    ended_at: float | None = None
    graceful: bool = Field(default=False, description="DEAD: the process may end in its own time.")
    death: ActorDeath | None = None


class OpenActorJob(Message):
    """Open the job of a detached actor, with the configuration of its creator's (verb ``open_actor_job``).

    A job whose actor is not created within some time, or is DEAD, ends.
    """

    actor_id: ActorId
    creator_job: JobId


class CreateActor(Message):
    """Ask for an actor (verb ``create_actor``); the answer is its record.

    The same request again finds its own work. Where the name is taken the answer is ``ActorAlreadyExistsError``, or
    with ``get_if_exists`` the record of the actor that has it.
    """

    description: ActorDescription
    spec: bytes = Field(description="What its process needs to make it; opaque to services.")
    get_if_exists: bool = False


class GetActor(Message):
    """Ask for an actor's record by its id (verb ``get_actor``)."""

    actor_id: ActorId


class FindActor(Message):
    """Ask for the record of the living actor of a name (verb ``find_actor``), verified through the leader."""

    name: str
    namespace: str


class ListActors(Message):
    """Ask for all actors (verb ``list_actors``)."""

    named_only: bool = Field(default=False, description="Only those that live and have a name.")
    namespace: str | None = Field(default=None, description="Only those of this namespace.")


class ActorSummary(Message):
    """One row of ``ActorList``."""

    actor_id: ActorId
    job_id: JobId
    class_name: str
    name: str
    namespace: str
    state: ActorState
    node_id: NodeId | None
    pid: int
    restarts: int
    detached: bool
    death_reason: str = ""


class ActorList(Message):
    """Actors, oldest first; of many dead ones only the newest."""

    actors: list[ActorSummary]


class KillActor(Message):
    """End an actor at once (verb ``kill_actor``); where not ``no_restart``, it is started again if it may be."""

    actor_id: ActorId
    no_restart: bool = True
    reason: str


class ReleaseActor(Message):
    """Its owner counts no handle of an actor any more, or it leaves by itself (verb ``release_actor``)."""

    actor_id: ActorId
    reason: str


class ClaimActor(Message):
    """A node asks for the right to start an incarnation (verb ``claim_actor``, audience node)."""

    actor_id: ActorId
    incarnation: int
    node_id: NodeId


class ActorClaim(Message):
    """The right is the asker's: this is what to start."""

    record: ActorRecord
    spec: bytes
    config: JobConfig | None = Field(default=None, description="The actor's job's, where the answerer has it at hand.")


class ActorStarted(Message):
    """A node says that an incarnation's instance is made (verb ``actor_started``, audience node).

    The answer is the record; ``DeclaredDeadError`` where it does not name this incarnation and node any more.
    """

    actor_id: ActorId
    incarnation: int
    node_id: NodeId
    process_id: ProcessId
    pid: int
    repr_name: str = Field(default="", description="See `ActorRecord`.")


class ActorEnded(Message):
    """A node says that an incarnation has ended (verb ``actor_ended``, audience node); repeated until answered."""

    actor_id: ActorId
    incarnation: int
    node_id: NodeId
    reason: str
    error: bytes = Field(default=b"", description="The pickled exception, where ``__init__`` raised.")
    final: bool = Field(default=False, description="It ended by its own will or its ``__init__`` raised: no restart.")


class ActorChanged(Message):
    """An actor's record has changed (event ``actor.<actor>`` of role gcs); a hint, without what never changes."""

    actor_id: ActorId
    state: ActorState
    incarnation: int
    node_id: NodeId | None
    process_id: ProcessId | None
    graceful: bool
    death: ActorDeath | None


class HostedActor(Message):
    """One incarnation that a node hosts."""

    actor_id: ActorId
    incarnation: int


class NodeActors(Message):
    """Whom a node hosts, told every other second while it hosts any (event ``actors`` of role node).

    For every one that the record does not name any more, the control store tells ``ActorChanged`` again.
    """

    node_id: NodeId
    actors: list[HostedActor]


def changed(record: ActorRecord) -> ActorChanged:
    """Return what is told of a record when it has changed."""
    return ActorChanged(
        actor_id=record.description.actor_id,
        state=record.state,
        incarnation=record.incarnation,
        node_id=record.node_id,
        process_id=record.process_id,
        graceful=record.graceful,
        death=record.death,
    )
