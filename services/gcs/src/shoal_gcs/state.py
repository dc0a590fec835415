"""What one replica knows of the store: a cache that its watch, its own writes and its reads keep up.

Knowledge only grows: what comes with an older revision than is known is stale, and ignored. The revisions of deleted
keys stay known, so that a late answer cannot bring them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.messages import JobState, NodeState
from shoal_gcs.records import CLUSTER_KEY, StoredJob, StoredNode, job_id, parse_kv_key

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held(Generic[T]):
    """A value and the revision at which the store held it."""

    value: T
    revision: int


@dataclass(slots=True)
class State:
    """The cache. ``untold`` are the keys of nodes and jobs whose end is recorded but was not published for certain."""

    session: str = ""
    nodes: dict[NodeId, Held[StoredNode]] = field(default_factory=dict)
    jobs: dict[JobId, Held[StoredJob]] = field(default_factory=dict)
    jobs_by_driver: dict[ProcessId, JobId] = field(default_factory=dict)
    kv: dict[tuple[str, str], int] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    untold: set[str] = field(default_factory=set)
    first_free_job: int = 1

    def remember(self, key: str, value: bytes | None, revision: int) -> None:
        """Take in what the store held at a revision (a deletion: None and the revision of its marker)."""
        if revision <= self.revisions.get(key, 0):
            return
        self.revisions[key] = revision
        kind = key.partition(".")[0]
        if kind == "kv":
            self._remember_kv(parse_kv_key(key), value, revision)
        elif value is None:
            return
        elif kind == "node":
            node = StoredNode.model_validate_json(value)
            self.nodes[node.record.description.node_id] = Held(node, revision)
            self._note_end(key, node.record.state is NodeState.DEAD and not node.told)
        elif kind == "job":
            job = StoredJob.model_validate_json(value)
            self._remember_job(job, revision)
            self._note_end(key, job.record.state is not JobState.RUNNING and not job.told)
        elif key == CLUSTER_KEY:
            self.session = value.decode()

    def forget_kv(self, namespace: str, key: str) -> None:
        """Take in that this replica deleted a key at the revision it knew."""
        self.kv.pop((namespace, key), None)

    def _remember_kv(self, name: tuple[str, str], value: bytes | None, revision: int) -> None:
        if value is None:
            self.kv.pop(name, None)
        else:
            self.kv[name] = revision

    def _remember_job(self, job: StoredJob, revision: int) -> None:
        self.jobs[job.record.job_id] = Held(job, revision)
        self.jobs_by_driver[job.record.driver] = job.record.job_id
        while job_id(self.first_free_job) in self.jobs:
            self.first_free_job += 1

    def _note_end(self, key: str, untold: bool) -> None:
        """Keep the set of those ends that nobody was told of."""
        (self.untold.add if untold else self.untold.discard)(key)

    def live_nodes(self) -> list[NodeId]:
        """Return the nodes that were not declared dead."""
        return [node for node, held in self.nodes.items() if held.value.record.state is NodeState.ALIVE]

    def running_jobs(self) -> list[JobId]:
        """Return the jobs that have not ended."""
        return [job for job, held in self.jobs.items() if held.value.record.state is JobState.RUNNING]
