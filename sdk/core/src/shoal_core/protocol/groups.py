"""Placement groups: what the control store records of them, and what is said about them.

A placement group reserves its *bundles* of resources on nodes, all of them or none. Only its record decides; a
scheduler plans, nodes reserve, and what they have reserved becomes the group's by one compare-and-set.

A group's life::

              commit                node died                        commit
    PENDING ──────────► CREATED ───────────────► RESCHEDULING ──────────────► CREATED …
       │                   │                          │
       └───────────────────┴──────────────────────────┴── removed, or its job has ended ──► REMOVED, for ever

1. **Create.** The creator draws the group's id and asks for it (``CreateGroup``). A group with a name is stored as
   ``NAMING`` first; the name's key, taken by compare-and-set, decides who wins (as for actors). A group without one
   may be *placed first*: the replica that was asked keeps it in memory and states its demand; the first write of the
   record, which may only be where there is none, is then the commit of attempt 1. That spares one of three writes. If
   there is no commit in a moment, the record is stored as ``PENDING``. Either way the creator has no answer before,
   and asks again without one: if the replica dies, another begins anew.
2. **Plan.** While bundles of a group have no place, a replica of the control store states that (``GroupDemand``), at
   once and every second. A scheduler chooses a node for each of them and asks those nodes to reserve
   (``PrepareBundles``). A plan belongs to an *attempt*: the one that follows the record's ``attempt``.
3. **Commit.** When all nodes have reserved, the scheduler asks for the commit (``CommitGroup``): the record takes the
   nodes in if its attempt is still the one before. Where one node refuses, the scheduler, which then never asks for
   the commit of this plan, has the others give back what they have reserved (``ReturnBundles``). While a group is only
   in one replica's memory, that is the one to ask (``GroupDemand.replica``).
4. **In doubt.** A node that has reserved keeps it until it knows. If it hears nothing it asks (``AbandonGroup``):
   either the record names it already, or the attempt is over from now on and can never be committed, so that the node
   may give its part back. Where there is no record the attempt ends by a *blank* one, which nobody but the creator's
   request fills in. A bundle is used only after the record was seen to name the node for it.
5. **Loss.** When a node dies, its bundles have no place (RESCHEDULING) and are planned again; the others stay.
6. **End.** REMOVED is never undone. Nodes kill what runs in the bundles and give them back; actors that are bound to
   the group die, for good.

Changes are told by ``GroupChanged`` events, which are hints: whoever waits reads the record again. There is one subject
for all groups of a creator, whom a group's id names. Nodes say with every announcement which bundles they have, and are
told again where the record does not name them any more. What is said of many groups at a time travels in packets.

A group ends with its job, unless it is detached: that one ends only when it is removed.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from pydantic import Field

from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId, ProcessId
from shoal_core.protocol.messages import NO_TERMS, JobTerms, Message
from shoal_core.protocol.placement import Conditions
from shoal_core.protocol.resources import Resources

MOST_BUNDLES = 4096
MOST_DESCRIPTION_BYTES = 256 * 1024


class GroupStrategy(StrEnum):
    """How the bundles lie: PACK on few nodes, SPREAD on many, if possible; STRICT_PACK on one, STRICT_SPREAD apart."""

    PACK = "PACK"
    SPREAD = "SPREAD"
    STRICT_PACK = "STRICT_PACK"
    STRICT_SPREAD = "STRICT_SPREAD"


class GroupState(StrEnum):
    """How far a group is in its life; REMOVED is never undone. NAMING is seen by the control store alone."""

    NAMING = "NAMING"
    PENDING = "PENDING"
    CREATED = "CREATED"
    RESCHEDULING = "RESCHEDULING"
    REMOVED = "REMOVED"


class GroupDescription(Message):
    """What its creator says of a group; it never changes."""

    group_id: PlacementGroupId
    job_id: JobId = Field(description="Its creator's; a group that is not detached ends with it.")
    owner: ProcessId = Field(description="Its creator, who is told if the group can never be placed.")
    name: str = Field(default="", description="Unique in its namespace; empty: it has none.")
    namespace: str = ""
    detached: bool = False
    bundles: list[Resources]
    strategy: GroupStrategy = GroupStrategy.PACK
    selectors: list[Conditions] = Field(default=[], description="What the node of each bundle must meet; or empty.")
    soft_target: NodeId | None = Field(default=None, description="STRICT_PACK: the node to take if it has room.")
    priority: int = 0


class GroupRecord(Message):
    """What the control store knows of a group. ``nodes`` says where each bundle is reserved for it, None: nowhere."""

    description: GroupDescription
    state: GroupState
    attempt: int = Field(default=0, description="The last attempt to place bundles that is over, well or badly.")
    nodes: list[NodeId | None]
    created_at: float
    ended_at: float | None = None
    reason: str = Field(default="", description="REMOVED: why.")

    @property
    def missing(self) -> list[int]:
        """The bundles that want a place."""
        waits = self.state in (GroupState.PENDING, GroupState.RESCHEDULING)
        return [index for index, node in enumerate(self.nodes) if node is None] if waits else []

    @property
    def is_blank(self) -> bool:
        """Whether only that attempts are over is recorded, and not yet what the group is."""
        return not self.description.bundles


class CreateGroup(Message):
    """Ask for a group (verb ``create_group``); the answer is what may change of its record.

    The same request again finds its own work. Where the name is taken the answer is
    ``PlacementGroupAlreadyExistsError``.
    """

    packs: ClassVar[bool] = True

    description: GroupDescription
    placed_first: bool = Field(
        default=False, description="Its bundles may be placed before it is recorded; the answer comes a moment later."
    )


class GetGroup(Message):
    """Ask for a group's record by its id (verb ``get_group``)."""

    group_id: PlacementGroupId


class FindGroup(Message):
    """Ask for the record of the group that has a name (verb ``find_group``), verified through the leader."""

    name: str
    namespace: str


class ListGroups(Message):
    """Ask for all groups (verb ``list_groups``)."""


class GroupList(Message):
    """Groups, oldest first; of many that were removed only the newest."""

    groups: list[GroupRecord]


class RemoveGroup(Message):
    """End a group (verb ``remove_group``); to end it again is no error."""

    packs: ClassVar[bool] = True

    group_id: PlacementGroupId
    reason: str


class CommitGroup(Message):
    """Nodes have reserved all bundles that had no place (verb ``commit_group``, audience scheduler).

    The answer is what may change of the record, which names them; ``DeclaredDeadError`` where this attempt can never
    be committed.
    """

    packs: ClassVar[bool] = True

    group_id: PlacementGroupId
    attempt: int
    nodes: dict[int, NodeId] = Field(description="By bundle.")


class AbandonGroup(Message):
    """A node in doubt has an attempt end, unless it was committed (verb ``abandon_group``, audience node).

    The answer is the record: the node keeps the bundles for which it is named there, and no others of this attempt.
    """

    group_id: PlacementGroupId
    job_id: JobId
    attempt: int


class GroupChanged(Message):
    """A group's record has changed (event ``group.<creator>`` of role gcs); a hint, without what never changes."""

    packs: ClassVar[bool] = True

    group_id: PlacementGroupId
    state: GroupState
    attempt: int
    nodes: list[NodeId | None]
    reason: str = ""


class GroupDemand(Message):
    """Bundles of a group have no place (event ``group_demand`` of role gcs), repeated every second."""

    packs: ClassVar[bool] = True

    description: GroupDescription
    attempt: int = Field(description="The record's: the next one is to be tried.")
    nodes: list[NodeId | None] = Field(description="Where its bundles lie; None for those that are to be placed.")
    created_at: float
    terms: JobTerms = Field(default=NO_TERMS, description="The job's.")
    replica: str = Field(default="", description="The control store that alone knows of it yet; empty: all do.")


class PrepareBundles(Message):
    """A scheduler asks a node to reserve bundles of a group (verb ``prepare``), all of them or none."""

    packs: ClassVar[bool] = True

    plan: str = Field(description="Drawn for this plan; no other has the same.")
    group_id: PlacementGroupId
    job_id: JobId
    attempt: int
    bundles: dict[int, Resources] = Field(description="By their index in the group.")


class BundlesPrepared(Message):
    """Whether a node has reserved what it was asked for."""

    node_id: NodeId
    granted: bool
    reason: str = ""
    free: Resources
    sequence: int = Field(description="As in the node's announcements: what has a lower one is older than this.")


class ReturnBundles(Message):
    """A scheduler gives a plan up: what a node reserved for it is free (verb ``return_bundles``)."""

    packs: ClassVar[bool] = True

    plan: str
    group_id: PlacementGroupId


def changed(record: GroupRecord) -> GroupChanged:
    """Return what is told of a record when it has changed."""
    return GroupChanged(
        group_id=record.description.group_id,
        state=record.state,
        attempt=record.attempt,
        nodes=record.nodes,
        reason=record.reason,
    )
