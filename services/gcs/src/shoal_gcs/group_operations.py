"""What the control store is asked to do about placement groups, as operations like the others (see ``operations``).

How a record may change is a table of ``GroupChange``s, as for actors. Whatever makes a plan worthless that may be under
way raises the record's attempt, so that a cache that is behind can be told by the number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from shoal_core.protocol.effects import Effect, Load, Publish, Store, Stored
from shoal_core.protocol.errors import (
    DeclaredDeadError,
    NotFoundError,
    PlacementGroupAlreadyExistsError,
    ShoalError,
)
from shoal_core.protocol.groups import GroupDescription, GroupRecord, GroupState, changed
from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId, creator_of
from shoal_core.protocol.messages import Done, JobState, Message
from shoal_gcs.actor_operations import NAME_TAKEN, Detour
from shoal_gcs.operations import Operation, Outcome
from shoal_gcs.records import group_key, group_name_key
from shoal_gcs.state import State

# ------------------------------------------------------------------------------------ how records change


class GroupChange(ABC):
    """One way in which a group's record changes; a frozen dataclass, so that it can be tried again."""

    @abstractmethod
    def next(self, record: GroupRecord, now: float) -> GroupRecord | ShoalError | None:
        """Return the record that follows, None where it is as it should be, or why it cannot be done."""

    def is_ahead(self, record: GroupRecord) -> bool:
        """Tell whether this may speak of something that came after ``record``."""
        return False

    def first(self, group_id: PlacementGroupId, now: float) -> GroupRecord | None:
        """Return the record to begin with where there is none; None: then it cannot be done."""
        return None

    def answer(self, record: GroupRecord) -> Message:
        """Return what is answered when it is done."""
        return record


def removed(record: GroupRecord, reason: str, now: float) -> GroupRecord:
    """Return the record of the group's end."""
    nowhere = [None] * len(record.nodes)
    return record.model_copy(update={"state": GroupState.REMOVED, "nodes": nowhere, "ended_at": now, "reason": reason})


@dataclass(frozen=True, slots=True)
class Commit(GroupChange):
    """The bundles that had no place have one now: all of them."""

    attempt: int
    nodes: tuple[tuple[int, NodeId], ...]

    def answer(self, record: GroupRecord) -> Message:
        """Without the description, which may be large: the answers to a packet of commits are to fit into one."""
        return changed(record)

    def is_ahead(self, record: GroupRecord) -> bool:
        """An earlier attempt is not known to be over, or the name is not known to be won."""
        if record.state is GroupState.REMOVED:
            return False
        return record.state is GroupState.NAMING or record.attempt < self.attempt - 1

    def next(self, record: GroupRecord, now: float) -> GroupRecord | ShoalError | None:
        """Take the nodes in, if this is the attempt that is to be tried."""
        nodes = dict(self.nodes)
        if record.missing and record.attempt == self.attempt - 1 and sorted(nodes) == record.missing:
            placed = [nodes.get(index, node) for index, node in enumerate(record.nodes)]
            return record.model_copy(update={"state": GroupState.CREATED, "attempt": self.attempt, "nodes": placed})
        known = range(len(record.nodes))
        if record.attempt >= self.attempt and all(i in known and record.nodes[i] == node for i, node in self.nodes):
            return None
        return DeclaredDeadError(
            f"attempt {self.attempt} to place bundles {sorted(nodes)} of placement group "
            f"{record.description.group_id} is not wanted any more: the group is {record.state} after attempt "
            f"{record.attempt}"
        )


@dataclass(frozen=True, slots=True)
class Abandon(GroupChange):
    """An attempt ends, unless it has ended; also one that some replica may have begun before there is a record."""

    attempt: int
    job_id: JobId

    def first(self, group_id: PlacementGroupId, now: float) -> GroupRecord | None:
        """Record that it is over, and nothing else: a first write that was to be its commit comes too late now."""
        about = GroupDescription(group_id=group_id, job_id=self.job_id, owner=creator_of(group_id), bundles=[])
        return GroupRecord(description=about, state=GroupState.PENDING, attempt=self.attempt, nodes=[], created_at=now)

    def is_ahead(self, record: GroupRecord) -> bool:
        """An earlier attempt is not known to be over."""
        return record.state is not GroupState.REMOVED and record.attempt < self.attempt - 1

    def next(self, record: GroupRecord, now: float) -> GroupRecord | ShoalError | None:
        """Count it as over."""
        if record.state is GroupState.REMOVED or record.attempt >= self.attempt:
            return None
        return record.model_copy(update={"attempt": self.attempt})


@dataclass(frozen=True, slots=True)
class Lose(GroupChange):
    """Nodes are dead: their bundles have no place."""

    nodes: frozenset[NodeId]

    def next(self, record: GroupRecord, now: float) -> GroupRecord | ShoalError | None:
        """Have them placed again; a plan that is under way does not know of them."""
        if record.state is GroupState.REMOVED or not self.nodes.intersection(record.nodes):
            return None
        left = [None if node in self.nodes else node for node in record.nodes]
        return record.model_copy(
            update={"state": GroupState.RESCHEDULING, "attempt": record.attempt + 1, "nodes": left}
        )


@dataclass(frozen=True, slots=True)
class Remove(GroupChange):
    """The group ends."""

    reason: str

    def next(self, record: GroupRecord, now: float) -> GroupRecord | ShoalError | None:
        """End it, unless it has ended."""
        return None if record.state is GroupState.REMOVED else removed(record, self.reason, now)

    def answer(self, record: GroupRecord) -> Message:
        """Nothing to tell."""
        return Done()


@dataclass(frozen=True, slots=True)
class ChangeGroup(Operation):
    """Change a record by compare-and-set, until the change has nothing more to say."""

    token: int | None
    group_id: PlacementGroupId
    change: GroupChange
    now: float
    read: bool = False

    def attempt(self, state: State) -> list[Effect]:
        """Write what follows; where the cache may be behind, read first."""
        held = state.group(self.group_id)
        if held is None or self.change.is_ahead(held.value):
            if not self.read:
                return [Load(group_key(self.group_id), replace(self, read=True))]
            if held is None:
                return self._begin(state)
        following = self.change.next(held.value, self.now)
        if isinstance(following, ShoalError):
            return self.answer(following)
        if following is None:
            return self.answer(self.change.answer(held.value))
        return [Store(group_key(self.group_id), state.drafts.encode(following), held.revision, self)]

    def _begin(self, state: State) -> list[Effect]:
        first = self.change.first(self.group_id, self.now)
        if first is None:
            return self.answer(NotFoundError(f"there is no placement group {self.group_id}"))
        return [Store(group_key(self.group_id), state.drafts.encode(first), 0, self)]


# ------------------------------------------------------------------------------------ making and forgetting


@dataclass(frozen=True, slots=True)
class MakeGroup(Detour):
    """Record a group, and have it win its name, or find out who has it.

    ``holder`` is the group that was found to have the name, at ``name_revision``; ``lost``: it is not removed.
    """

    token: int | None
    description: GroupDescription
    now: float
    holder: PlacementGroupId | None = None
    name_revision: int = 0
    lost: bool = False

    @property
    def begun_for(self) -> str:
        """The group's record."""
        return group_key(self.description.group_id)

    def attempt(self, state: State) -> list[Effect]:
        """Do the next step: the record, the name, and that it may be placed."""
        about = self.description
        held = state.groups.get(about.group_id)
        if held is None:
            return self._begin(state)
        record = held.value
        if record.is_blank and record.state is GroupState.PENDING:
            filled = record.model_copy(update={"description": about, "nodes": [None] * len(about.bundles)})
            return [Store(self.begun_for, state.drafts.encode(filled), held.revision, self)]
        if record.state is GroupState.NAMING:
            if self.lost:
                gone = state.drafts.encode(removed(record, NAME_TAKEN, self.now))
                return [Store(self.begun_for, gone, held.revision, self)]
            return [Store(self._name_key(), about.group_id.encode(), self.name_revision, self)]
        if record.state is GroupState.REMOVED and record.reason == NAME_TAKEN:
            return self.answer(
                PlacementGroupAlreadyExistsError(
                    f"The name {about.name!r} is already taken in namespace {about.namespace!r} by a placement group. "
                    "Use get_placement_group() to get it, or remove it first, or choose another name."
                )
            )
        return self.answer(changed(record))

    def _begin(self, state: State) -> list[Effect]:
        about = self.description
        if self.token is None:
            return []  # deleted meanwhile
        job = state.jobs.get(about.job_id)
        if job is not None and job.value.record.state is not JobState.RUNNING:
            return self.answer(NotFoundError(f"job {about.job_id} has ended ({job.value.record.state})"))
        return [Store(self.begun_for, state.drafts.encode(self.first_record()), 0, self)]

    def first_record(self) -> GroupRecord:
        """Return the record that a group's life begins with."""
        about = self.description
        begins = GroupState.NAMING if about.name else GroupState.PENDING
        return GroupRecord(description=about, state=begins, nodes=[None] * len(about.bundles), created_at=self.now)

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on from what was written or read."""
        about = self.description
        if about.name and outcome.key == self._name_key():
            return self._name_settled(state, outcome)
        if self.holder is not None and outcome.key == group_key(self.holder):
            if not _lives(state, self.holder, outcome):
                return [Store(self._name_key(), about.group_id.encode(), self.name_revision, self)]
            return replace(self, lost=True).attempt(state)
        return self.attempt(state)

    def _name_settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """The name is ours, or we look who has it."""
        about = self.description
        if outcome.value is None:
            return replace(self, name_revision=0).attempt(state)
        holder = PlacementGroupId(outcome.value.decode())
        if holder != about.group_id:
            return [Load(group_key(holder), replace(self, holder=holder, name_revision=outcome.revision))]
        held = state.groups.get(about.group_id)
        if held is None or held.value.state is not GroupState.NAMING:
            return self.attempt(state)
        named = held.value.model_copy(update={"state": GroupState.PENDING})
        return [Store(self.begun_for, state.drafts.encode(named), held.revision, self)]

    def _name_key(self) -> str:
        return group_name_key(self.description.namespace, self.description.name)


@dataclass(frozen=True, slots=True)
class ForgetGroup(Detour):
    """Delete what is left of a group that was removed: the name's key, if it still has it, then the record."""

    token: int | None
    group_id: PlacementGroupId
    name_is_free: bool = False

    @property
    def begun_for(self) -> str:
        """The group's record."""
        return group_key(self.group_id)

    def attempt(self, state: State) -> list[Effect]:
        """Look at the name, then delete the record."""
        held = state.groups.get(self.group_id)
        if held is None:
            return []
        about = held.value.description
        if about.name and not self.name_is_free:
            return [Load(group_name_key(about.namespace, about.name), self)]
        return [Store(self.begun_for, None, held.revision, self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Go on with the record once the name is free, or another's."""
        if outcome.key == self.begun_for:
            return []
        if outcome.value is not None and outcome.value.decode() == self.group_id and not isinstance(outcome, Stored):
            return [Store(outcome.key, None, outcome.revision, self)]
        return replace(self, name_is_free=True).attempt(state)


# ------------------------------------------------------------------------------------ reading


def shown(record: GroupRecord) -> GroupRecord:
    """Return a record as others may see it: while its name is decided, it has not begun to live."""
    if record.state is not GroupState.NAMING:
        return record
    return record.model_copy(update={"state": GroupState.PENDING})


def _lives(state: State, group: PlacementGroupId, read: Outcome) -> bool:
    """Tell whether a group that has just been read is there and not REMOVED."""
    held = state.groups.get(group)
    return held is not None and read.value is not None and held.value.state is not GroupState.REMOVED


@dataclass(frozen=True, slots=True)
class ReadGroup(Operation):
    """Answer with a record. Only an end is known for good; all else is read through the leader."""

    token: int | None
    group_id: PlacementGroupId

    def attempt(self, state: State) -> list[Effect]:
        """Answer, or read."""
        held = state.groups.get(self.group_id)
        if held is not None and held.value.state is GroupState.REMOVED:
            return self.answer(held.value)
        return [Load(group_key(self.group_id), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Answer with what was read."""
        held = state.groups.get(self.group_id)
        nobody = NotFoundError(f"there is no placement group {self.group_id}")
        return self.answer(nobody if held is None else shown(held.value))


@dataclass(frozen=True, slots=True)
class FindGroupName(Operation):
    """Answer with the group of a name: the name's key first, then its holder's record, both by the leader."""

    token: int | None
    namespace: str
    name: str
    holder: PlacementGroupId | None = None

    def attempt(self, state: State) -> list[Effect]:
        """Read the name's key."""
        return [Load(group_name_key(self.namespace, self.name), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Read the holder's record, then answer."""
        nobody = NotFoundError(f"no placement group has the name {self.name!r} in {self.namespace!r}")
        if self.holder is None:
            if outcome.value is None:
                return self.answer(nobody)
            holder = PlacementGroupId(outcome.value.decode())
            return [Load(group_key(holder), replace(self, holder=holder))]
        lives = _lives(state, self.holder, outcome)
        return self.answer(shown(state.groups[self.holder].value) if lives else nobody)


@dataclass(frozen=True, slots=True)
class LookForGroup(Operation):
    """See whether the leader knows a group that a node has bundles of; if not, tell ``news``."""

    token: int | None
    group_id: PlacementGroupId
    news: Publish

    def attempt(self, state: State) -> list[Effect]:
        """Read its record."""
        return [Load(group_key(self.group_id), self)]

    def settled(self, state: State, outcome: Outcome) -> list[Effect]:
        """Tell that there is none."""
        return [self.news] if outcome.value is None else []
