"""Who holds which object of a cluster, how large, where and why: all nodes are asked, who ask their processes.

Read-only: an observer may ask. Nobody is waited for longer than the asker says; who did not answer is named.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from shoal.asking import ask_nodes
from shoal.status import Target
from shoal_core.bus import Bus, connect
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import NO_NODE, NodeId, ProcessId, node_of
from shoal_core.protocol.messages import JobList, JobRecord, JobState, ListJobs, NodeDescription
from shoal_core.protocol.storage import MOST_LISTED_OBJECTS, ListObjects, NodeObjects, ObjectHolding
from shoal_core.protocol.subjects import Subjects


@dataclass(frozen=True)
class NodeMemory:
    """What one node answered."""

    description: NodeDescription
    objects: NodeObjects

    def to_json(self) -> dict[str, Any]:
        """Return what is known of the node altogether."""
        return {
            "node_id": self.description.node_id,
            "hostname": self.description.hostname,
            "store": self.objects.store.model_dump(),
            "processes": [process.model_dump() for process in self.objects.processes],
        }


@dataclass(frozen=True)
class ClusterMemory:
    """What all nodes answered, and who did not answer: nodes with the reason, processes, drivers that no node knows."""

    nodes: list[NodeMemory]
    silent_nodes: dict[NodeId, str]
    silent_processes: list[ProcessId]
    unreached_drivers: list[ProcessId]

    @property
    def is_complete(self) -> bool:
        """Whether everybody has answered."""
        return not (self.silent_nodes or self.silent_processes or self.unreached_drivers)

    def missing(self) -> str:
        """Say who has not answered, in one line for each; empty where everybody has."""
        lines = [f"node {node} did not answer: {reason}" for node, reason in self.silent_nodes.items()]
        lines += [f"process {process} did not answer its node in time" for process in self.silent_processes]
        lines += [f"driver {driver} belongs to no node, so nobody asked it" for driver in self.unreached_drivers]
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each object and process that holds it, the largest first."""
        rows = [_row(node, holding) for node in self.nodes for holding in node.objects.objects]
        return sorted(rows, key=lambda row: (-row["object_size"], row["object_id"], row["pid"]))

    def counted(self) -> int:
        """Return how many objects all processes know together; one that several know counts for each."""
        return sum(process.objects for node in self.nodes for process in node.objects.processes)

    def to_json(self) -> dict[str, Any]:
        """Return everything, as ``shoal memory --format json`` shows it."""
        return {
            "nodes": [node.to_json() for node in self.nodes],
            "objects": self.rows(),
            "total_objects": self.counted(),
            "silent_nodes": self.silent_nodes,
            "silent_processes": self.silent_processes,
            "unreached_drivers": self.unreached_drivers,
        }


def _row(node: NodeMemory, holding: ObjectHolding) -> dict[str, Any]:
    """Return one row: Ray's columns first, then ours."""
    process = next((one for one in node.objects.processes if one.process_id == holding.process_id), None)
    return {
        "object_id": holding.object_id,
        "object_size": holding.size_bytes,
        "task_status": holding.status,
        "reference_type": holding.reasons[0] if holding.reasons else "UNKNOWN_STATUS",
        "call_site": "disabled",
        "type": "WORKER" if process is None else process.kind,
        "pid": 0 if process is None else process.pid,
        "ip": node.description.address,
        "reasons": holding.reasons,
        "borrowers": holding.borrowers,
        "location": f"node {holding.node}" if holding.node else "inline" if holding.size_bytes >= 0 else "",
        "process_id": holding.process_id,
        "owner_id": holding.owner,
        "node_id": node.description.node_id,
    }


async def read_memory(target: Target, most: int, timeout_seconds: float) -> ClusterMemory:
    """Connect to a cluster and ask it who holds what."""
    async with connect(
        target.address,
        role=target.role,
        identity=f"memory-{secrets.token_hex(4)}",
        cluster=target.cluster,
        credentials=target.credentials,
        tls=target.tls,
        timeout_seconds=timeout_seconds,
    ) as bus:
        return await ask_all(bus, Subjects(target.cluster), most, timeout_seconds)


async def ask_all(bus: Bus, subjects: Subjects, most: int, timeout_seconds: float) -> ClusterMemory:
    """Ask all living nodes for their ``most`` largest objects each, at once; raises only where there is no gcs."""

    def request(patience_seconds: float) -> ListObjects:
        return ListObjects(most=min(most, MOST_LISTED_OBJECTS), timeout_seconds=patience_seconds)

    jobs = await ask(bus, subjects.gcs("list_jobs"), ListJobs(), timeout_seconds)
    assert isinstance(jobs, JobList)
    asked = await ask_nodes(bus, subjects, "objects", request, NodeObjects, timeout_seconds)
    heard = [NodeMemory(node, answer) for node, answer in asked.answers]
    quiet = [process for node in heard for process in node.objects.silent]
    return ClusterMemory(heard, asked.silent, quiet, _without_node(jobs.jobs))


def _without_node(jobs: list[JobRecord]) -> list[ProcessId]:
    """Return the drivers that live, and that belong to no node that could ask them."""
    return [
        job.driver
        for job in jobs
        if job.state is JobState.RUNNING and job.actor is None and node_of(job.driver) == NO_NODE
    ]
