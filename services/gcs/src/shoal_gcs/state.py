"""What one replica knows of the store: a cache that its watch, its own writes and its reads keep up.

Knowledge only grows: what comes with an older revision than is known is stale, and ignored. Nothing of nodes and jobs
is ever dropped: an id that was forgotten could be registered again, and jobs are numbered by the records there are. It
amounts to a few kilobytes for each of them that ever was, as much as the store itself keeps. Actors and placement
groups come and go by the thousand; those that were dead for long are deleted, here and in the store.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shoal_core.protocol.actors import ActorRecord, ActorState
from shoal_core.protocol.groups import GroupRecord, GroupState
from shoal_core.protocol.ids import ActorId, JobId, NodeId, PlacementGroupId, ProcessId
from shoal_core.protocol.messages import JobState, NodeState
from shoal_core.protocol.placement import Bundle
from shoal_gcs.drafts import Drafts
from shoal_gcs.records import CLUSTER_KEY, StoredJob, StoredKey, StoredNode, job_id, parse_kv_key
from shoal_gcs.written import Written

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held(Generic[T]):
    """A value, the revision at which the store held it, and its size there."""

    value: T
    revision: int
    size_bytes: int = 0


@dataclass(slots=True)
class State:
    """The cache. ``untold`` are the keys of nodes and jobs whose end is recorded but was not published for certain.

    ``kv`` holds no values, only whether there are any and who wrote them, deleted keys included. ``actors_in_groups``
    are the living actors that are bound to a placement group; ``removed_groups`` come as they were heard of;
    ``unwritten`` ones are known to this replica alone, until there is a record of them.
    """

    session: str = ""
    nodes: dict[NodeId, Held[StoredNode]] = field(default_factory=dict)
    jobs: dict[JobId, Held[StoredJob]] = field(default_factory=dict)
    jobs_by_driver: dict[ProcessId, JobId] = field(default_factory=dict)
    kv: dict[tuple[str, str], Held[StoredKey]] = field(default_factory=dict)
    actors: dict[ActorId, Held[ActorRecord]] = field(default_factory=dict)
    living_actors: set[ActorId] = field(default_factory=set)
    actors_in_groups: dict[PlacementGroupId, set[ActorId]] = field(default_factory=dict)
    groups: dict[PlacementGroupId, Held[GroupRecord]] = field(default_factory=dict)
    unwritten: dict[PlacementGroupId, GroupRecord] = field(default_factory=dict)
    living_groups: set[PlacementGroupId] = field(default_factory=set)
    removed_groups: dict[PlacementGroupId, None] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    untold: set[str] = field(default_factory=set)
    first_free_job: int = 1
    written: Written = field(default_factory=Written)
    drafts: Drafts = field(default_factory=Drafts)

    def remember(self, key: str, value: bytes | None, revision: int) -> None:
        """Take in what the store held at a revision; None where the key is gone, as an actor's or a group's may be."""
        kind, _, name = key.partition(".")
        if value is None:
            self._forget(kind, name, revision)
        if value is None or revision <= self.revisions.get(key, 0):
            return
        self.revisions[key] = revision
        if kind == "kv":
            stored = StoredKey.decode(value)
            exists = None if stored.value is None else b""
            self.kv[parse_kv_key(key)] = Held(StoredKey(stored.writers, exists), revision)
        elif kind == "node":
            node = StoredNode.model_validate_json(value)
            self.nodes[node.record.description.node_id] = Held(node, revision, len(value))
            self._note_end(key, node.record.state is NodeState.DEAD and not node.told)
        elif kind == "job":
            job = StoredJob.model_validate_json(value)
            self._remember_job(Held(job, revision, len(value)))
            self._note_end(key, job.record.state is not JobState.RUNNING and not job.told)
        elif kind == "actor":
            self._remember_actor(Held(ActorRecord.model_validate_json(value), revision, len(value)))
        elif kind == "group":
            self._remember_group(Held(self.drafts.decode(value), revision, len(value)))
        elif key == CLUSTER_KEY:
            self.session = value.decode()

    def _remember_job(self, job: Held[StoredJob]) -> None:
        record = job.value.record
        self.jobs[record.job_id] = job
        self.jobs_by_driver[record.driver] = record.job_id
        while job_id(self.first_free_job) in self.jobs:
            self.first_free_job += 1

    def _remember_actor(self, actor: Held[ActorRecord]) -> None:
        actor_id = actor.value.description.actor_id
        self.actors[actor_id] = actor
        dead = actor.value.state is ActorState.DEAD
        (self.living_actors.discard if dead else self.living_actors.add)(actor_id)
        self._note_group_of(actor.value, living=not dead)

    def _note_group_of(self, actor: ActorRecord, *, living: bool) -> None:
        """Keep the index of those actors that live in a placement group."""
        about = actor.description
        if not isinstance(about.strategy, Bundle):
            return
        group = about.strategy.group
        if living:
            self.actors_in_groups.setdefault(group, set()).add(about.actor_id)
            return
        there = self.actors_in_groups.get(group, set())
        there.discard(about.actor_id)
        if not there:
            self.actors_in_groups.pop(group, None)

    def _remember_group(self, group: Held[GroupRecord]) -> None:
        group_id = group.value.description.group_id
        self.groups[group_id] = group
        if group.value.state is GroupState.REMOVED:
            self.living_groups.discard(group_id)
            self.removed_groups[group_id] = None
        else:
            self.living_groups.add(group_id)

    def group(self, group_id: PlacementGroupId) -> Held[GroupRecord] | None:
        """Return what is known of a group: of one that is not written yet, what its first write goes on from."""
        held = self.groups.get(group_id)
        if held is None and (record := self.unwritten.get(group_id)) is not None:
            return Held(record, 0)
        return held

    def is_gone(self, key: str) -> None:
        """A write found that a key holds nothing, or made it so: what is known of it is older than that."""
        kind, _, name = key.partition(".")
        self._forget(kind, name, self.revisions.get(key, 0))

    def _forget(self, kind: str, name: str, revision: int) -> None:
        """A record has been deleted, at this revision or later (0: it was read before there was one).

        Only what is over for long is deleted, but who hears of it may have missed its end.
        """
        if kind == "actor":
            actor = ActorId(name)
            held = self.actors.get(actor)
            if held is not None and revision >= held.revision:
                del self.actors[actor]
                self.living_actors.discard(actor)
                self._note_group_of(held.value, living=False)
        elif kind == "group":
            group = PlacementGroupId(name)
            known = self.groups.get(group)
            if known is not None and revision >= known.revision:
                del self.groups[group]
                self.living_groups.discard(group)
                self.removed_groups.pop(group, None)

    def _note_end(self, key: str, untold: bool) -> None:
        """Keep the set of those ends that nobody was told of."""
        (self.untold.add if untold else self.untold.discard)(key)

    def live_nodes(self) -> list[NodeId]:
        """Return the nodes that were not declared dead."""
        return [node for node, held in self.nodes.items() if held.value.record.state is NodeState.ALIVE]

    def running_jobs(self) -> list[JobId]:
        """Return the jobs that have not ended."""
        return [job for job, held in self.jobs.items() if held.value.record.state is JobState.RUNNING]

    def driven_jobs(self) -> list[JobId]:
        """Return those that have not ended and have a driver, which gives signs of life."""
        return [job for job in self.running_jobs() if self.jobs[job].value.record.actor is None]
