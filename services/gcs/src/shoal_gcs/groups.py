"""What the control store does about placement groups by itself: states the demand of those that wait, ends those whose
job is over, has bundles of dead nodes placed again.

All of it is level-triggered: once a second each replica looks at what the records say. Most of it is also done at once,
when the replica itself has changed a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from shoal_core.protocol.effects import Effect, Publish, Reply, StoreRefused
from shoal_core.protocol.errors import InvalidRequestError
from shoal_core.protocol.groups import (
    MOST_BUNDLES,
    MOST_DESCRIPTION_BYTES,
    AbandonGroup,
    CommitGroup,
    CreateGroup,
    FindGroup,
    GetGroup,
    GroupChanged,
    GroupDemand,
    GroupDescription,
    GroupList,
    GroupRecord,
    GroupState,
    ListGroups,
    RemoveGroup,
    changed,
)
from shoal_core.protocol.ids import NodeId, PlacementGroupId, ServiceId, creator_of
from shoal_core.protocol.messages import NO_TERMS, BundleSummary, JobState, Message, NodeAnnouncement, NodeState
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_gcs.actor_operations import NAME_TAKEN
from shoal_gcs.actors import NAMING_SECONDS
from shoal_gcs.group_operations import (
    Abandon,
    ChangeGroup,
    Commit,
    FindGroupName,
    ForgetGroup,
    LookForGroup,
    Lose,
    MakeGroup,
    ReadGroup,
    Remove,
    shown,
)
from shoal_gcs.operations import Operation
from shoal_gcs.records import GROUP_PREFIX, LIST_BYTES, NAME_BYTES, group_key
from shoal_gcs.state import State

KEEP_REMOVED_SECONDS = 600.0
"""So long it can be asked why a group was removed, if there were not too many since."""
MOST_REMOVED = 10_000
MOST_REMOVED_IN_HASTE = 20_000
"""So many are kept while more are removed: to forget one is a write, as to make one is."""
FORGOTTEN_AT_LEISURE = 1_000
"""So many are forgotten a second when none are removed."""
LONG_GONE = "it was removed"
UNWRITTEN_SECONDS = 0.25
"""So long a group may be placed first; then it is recorded as one that waits."""


class Groups:
    """One replica's part in the life of placement groups."""

    def __init__(self, state: State, subjects: Subjects, identity: ServiceId) -> None:
        self._state = state
        self._subjects = subjects
        self._identity = identity
        self._disagree: set[tuple[PlacementGroupId, NodeId]] = set()
        self._disagreed: set[tuple[PlacementGroupId, NodeId]] = set()
        self._placed_first: dict[PlacementGroupId, MakeGroup] = {}
        self._newest_removed: PlacementGroupId | None = None

    # -------------------------------------------------------------------------------- what is asked

    def operation(self, message: Message, token: int, now: float) -> Operation | list[Effect] | None:
        """Return the operation that a request about groups asks for, or at once its answer; None for others."""
        match message:
            case CreateGroup():
                _check(message.description)
                make = MakeGroup(token, message.description, now)
                return self._place_first(make) if message.placed_first else make
            case GetGroup():
                return ReadGroup(token, message.group_id)
            case FindGroup():
                _check_name(message.namespace, message.name)
                return FindGroupName(token, message.namespace, message.name)
            case ListGroups():
                return [Reply(token, self._list())]
            case RemoveGroup():
                return ChangeGroup(token, message.group_id, Remove(message.reason), now)
            case CommitGroup():
                nodes = tuple(sorted(message.nodes.items()))
                return ChangeGroup(token, message.group_id, Commit(message.attempt, nodes), now)
            case AbandonGroup():
                return ChangeGroup(token, message.group_id, Abandon(message.attempt, message.job_id), now)
        return None

    def _list(self) -> GroupList:
        """Return all groups that live, and of the others the newest, as far as they fit into one answer."""
        known = self._state.groups.values()
        records = [held for held in known if held.value.reason != NAME_TAKEN and not held.value.is_blank]
        records.sort(key=lambda held: (held.value.ended_at is not None, -(held.value.ended_at or 0.0)))
        room = LIST_BYTES
        listed: list[GroupRecord] = []
        for held in records:
            room -= held.size_bytes
            if room < 0 and listed:
                break
            listed.append(shown(held.value))
        return GroupList(groups=sorted(listed, key=lambda record: (record.created_at, record.description.group_id)))

    # -------------------------------------------------------------------------------- what is placed first

    def _place_first(self, make: MakeGroup) -> Operation | list[Effect]:
        """State the demand of a new group of which nothing is stored yet; one that must be stored before is made."""
        about, state = make.description, self._state
        job = state.jobs.get(about.job_id)
        ended = job is not None and job.value.record.state is not JobState.RUNNING
        if ended or about.name or about.detached or state.group(about.group_id) is not None:
            return make
        self._placed_first[about.group_id] = make
        record = state.unwritten[about.group_id] = make.first_record()
        return self._demand(record, replica=self._identity)

    def overdue(self, now: float) -> list[Effect]:
        """Record those groups as waiting that were to be placed first, and have no places yet."""
        effects: list[Effect] = []
        for group, make in list(self._placed_first.items()):
            if now - make.now >= UNWRITTEN_SECONDS:
                effects += make.attempt(self._state)
                self._forget_unwritten(group)
        return effects

    def written(self, key: str) -> list[Effect]:
        """Answer the creator of a group that was to be placed first, if there is a record of it now."""
        group = PlacementGroupId(key.removeprefix(GROUP_PREFIX))
        make = self._placed_first.get(group)
        if make is None or group not in self._state.groups:
            return []
        self._forget_unwritten(group)
        return make.attempt(self._state)

    def refused(self, refusal: StoreRefused) -> list[Effect]:
        """The store will never take the first write of a group."""
        group = PlacementGroupId(refusal.key.removeprefix(GROUP_PREFIX))
        make = self._placed_first.get(group)
        self._forget_unwritten(group)
        return [] if make is None else make.refused(refusal)

    def _forget_unwritten(self, group: PlacementGroupId) -> None:
        self._placed_first.pop(group, None)
        self._state.unwritten.pop(group, None)

    # -------------------------------------------------------------------------------- what is told

    def told(self, group: PlacementGroupId, now: float) -> list[Effect]:
        """Tell that this replica has changed a record, and state what has no place."""
        held = self._state.groups.get(group)
        if held is None or held.value.state is GroupState.NAMING:
            return []
        record = held.value
        new = record.state is GroupState.PENDING and not record.attempt  # its creator has the answer to its request
        return [*(() if new else (self._changed(changed(record)),)), *self._demand(record)]

    def told_again(self, announcement: NodeAnnouncement) -> list[Effect]:
        """Tell a node what the records say of bundles that it has, where it has not known that for a tick or two."""
        effects: list[Effect] = []
        node = announcement.node_id
        for bundle in announcement.bundles:
            group = bundle.group_id
            held = self._state.groups.get(group)
            if held is None and not bundle.committed:
                continue  # its group may not be recorded yet; the node will ask
            if (group, node) in self._disagree or (held is not None and _agree(held.value, bundle, node)):
                continue
            self._disagree.add((group, node))
            if (group, node) not in self._disagreed:
                continue  # what it has to know may be on its way
            if held is None:
                effects += LookForGroup(None, group, self._changed(_long_gone(group))).attempt(self._state)
            else:
                effects.append(self._changed(changed(held.value)))
        return effects

    def _changed(self, message: GroupChanged) -> Publish:
        return Publish(self._subjects.groups_changed(self._identity, creator_of(message.group_id)), message)

    def _demand(self, record: GroupRecord, replica: str = "") -> list[Effect]:
        """State which bundles have no place, if any; ``replica`` is who alone knows of the group, if not all do."""
        if not record.missing:
            return []
        job = self._state.jobs.get(record.description.job_id)
        demand = GroupDemand(
            description=record.description,
            attempt=record.attempt,
            nodes=record.nodes,
            created_at=record.created_at,
            terms=NO_TERMS if job is None else job.value.record.config.terms,
            replica=replica,
        )
        return [Publish(self._subjects.event(Role.GCS, self._identity, "group_demand"), demand)]

    # -------------------------------------------------------------------------------- what is due

    def demands(self) -> list[Effect]:
        """Repeat the demand of all groups that wait."""
        self._disagreed, self._disagree = self._disagree, set()
        waiting = sorted(self._state.living_groups)
        return [effect for group in waiting for effect in self._demand(self._state.groups[group].value)]

    def due(self, now: float) -> Iterator[tuple[str, Operation]]:
        """Yield what has to be done because of what the records say, each with the key that it changes."""
        dead = {node for node, held in self._state.nodes.items() if held.value.record.state is NodeState.DEAD}
        for group in sorted(self._state.living_groups):
            operation = self._due(self._state.groups[group].value, dead, now)
            if operation is not None:
                yield group_key(group), operation
        for group in self._forgettable(now):
            yield group_key(group), ForgetGroup(None, group)

    def _forgettable(self, now: float) -> Iterator[PlacementGroupId]:
        """Yield the removed groups that are to be forgotten now; those that can wait do until no more are removed."""
        removed = self._state.removed_groups
        newest = next(reversed(removed), None)
        is_quiet, self._newest_removed = newest == self._newest_removed, newest
        most = max(len(removed) - MOST_REMOVED_IN_HASTE, FORGOTTEN_AT_LEISURE if is_quiet else 0)
        for number, group in enumerate(islice(removed, most)):
            ended_at = self._state.groups[group].value.ended_at or 0.0
            if len(removed) - number <= MOST_REMOVED and now - ended_at <= KEEP_REMOVED_SECONDS:
                break
            yield group

    def _due(self, record: GroupRecord, dead: set[NodeId], now: float) -> Operation | None:
        about = record.description
        job = self._state.jobs.get(about.job_id)
        if not about.detached and job is not None and job.value.record.state is not JobState.RUNNING:
            return ChangeGroup(None, about.group_id, Remove("its job has ended"), now)
        if lost := dead.intersection(record.nodes):
            return ChangeGroup(None, about.group_id, Lose(frozenset(lost)), now)
        if record.state is GroupState.NAMING and now - record.created_at > NAMING_SECONDS:
            return MakeGroup(None, about, now)
        return None


def _agree(record: GroupRecord, bundle: BundleSummary, node: NodeId) -> bool:
    """Tell whether a node knows as much of a bundle that it has as the record says."""
    named = 0 <= bundle.index < len(record.nodes) and record.nodes[bundle.index] == node
    return record.state is not GroupState.REMOVED and bundle.committed == named


def _long_gone(group: PlacementGroupId) -> GroupChanged:
    """Return what is told of a group of which there is no record any more."""
    return GroupChanged(group_id=group, state=GroupState.REMOVED, attempt=0, nodes=[], reason=LONG_GONE)


def _check(about: GroupDescription) -> None:
    """Refuse what could not be kept, or never be placed."""
    _check_name(about.namespace, about.name)
    group = f"placement group {about.group_id}"
    if not 0 < len(about.bundles) <= MOST_BUNDLES:
        raise InvalidRequestError(f"{group} has {len(about.bundles)} bundles; a group has 1 to {MOST_BUNDLES}")
    for index, bundle in enumerate(about.bundles):
        if not bundle or min(bundle.values()) <= 0:
            raise InvalidRequestError(f"bundle {index} of {group} must be of some resource, and of none less than 0")
    if about.selectors and len(about.selectors) != len(about.bundles):
        raise InvalidRequestError(
            f"{group} has {len(about.selectors)} label selectors for {len(about.bundles)} bundles; it has one for each "
            "bundle, or none"
        )
    size_bytes = len(encode(about))
    if size_bytes > MOST_DESCRIPTION_BYTES:
        raise InvalidRequestError(
            f"{group} is described in {size_bytes} bytes; at most {MOST_DESCRIPTION_BYTES} are kept"
        )


def _check_name(namespace: str, name: str) -> None:
    """Refuse names that would make too long a key."""
    if len(namespace.encode()) + len(name.encode()) > NAME_BYTES:
        raise InvalidRequestError(
            f"a placement group's namespace and name have at most {NAME_BYTES} bytes together, got {name[:80]!r}…"
        )
