"""What a cluster looks like from outside: its nodes, what is used of them, and what waits and why.

Read-only: it asks the control store and a scheduler and hears the nodes' announcements, with the role of an observer.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from shoal_core import __version__
from shoal_core.bus import Bus, Credentials, Message, TlsFiles, connect
from shoal_core.bus.credentials import redacted
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import GetCluster, ListNodes, NodeAnnouncement, NodeList, NodeRecord, NodeState
from shoal_core.protocol.resources import Resources, from_units, subtract, to_amounts
from shoal_core.protocol.scheduling import GetPending, PendingDemand, PendingList
from shoal_core.protocol.subjects import Role, Subjects

HEARING_SECONDS = 2.5
"""How long to wait for the nodes, which announce themselves each second."""


@dataclass(frozen=True)
class Target:
    """A cluster and how to prove ourselves to its broker."""

    address: str
    cluster: str
    credentials: Credentials | None = None
    tls: TlsFiles | None = None

    @property
    def role(self) -> Role:
        """The role of the credential: the embedded broker's users are named after theirs."""
        user = self.credentials.user if self.credentials else None
        return Role(user) if user in set(Role) else Role.OBSERVER


@dataclass(frozen=True)
class NodeStatus:
    """A node as the control store has it, and what it last announced (``None``: nothing heard of it)."""

    record: NodeRecord
    announcement: NodeAnnouncement | None

    @property
    def used(self) -> Resources | None:
        """What is leased; ``None`` where nothing was heard."""
        return None if self.announcement is None else subtract(self.announcement.total, self.announcement.free)

    def to_json(self) -> dict[str, Any]:
        """Return the node as ``shoal status --format json`` shows it."""
        description = self.record.description
        return {
            "node_id": description.node_id,
            "hostname": description.hostname,
            "state": self.record.state.value,
            "death_reason": self.record.death_reason,
            "total": to_amounts(description.total),
            "used": None if self.used is None else to_amounts(self.used),
            "worker_processes": None if self.announcement is None else self.announcement.worker_processes,
            "draining": self.announcement is not None and self.announcement.draining,
            "labels": description.labels,
        }


@dataclass(frozen=True)
class ClusterStatus:
    """All of a cluster at one moment."""

    address: str
    cluster: str
    nodes: list[NodeStatus]
    pending: list[PendingDemand]

    def alive(self) -> list[NodeStatus]:
        """The nodes that live."""
        return [node for node in self.nodes if node.record.state is NodeState.ALIVE]

    def totals(self) -> dict[str, tuple[float, float]]:
        """Return used and total of every resource over all nodes that live."""
        sums: dict[str, tuple[int, int]] = {}
        for node in self.alive():
            for name, units in node.record.description.total.items():
                used, total = sums.get(name, (0, 0))
                sums[name] = (used + (node.used or {}).get(name, 0), total + units)
        return {name: (from_units(used), from_units(total)) for name, (used, total) in sorted(sums.items())}

    def to_json(self) -> dict[str, Any]:
        """Return the status as ``shoal status --format json`` shows it."""
        return {
            "address": redacted(self.address),
            "cluster": self.cluster,
            "nodes": [node.to_json() for node in self.nodes],
            "resources": {name: {"used": used, "total": total} for name, (used, total) in self.totals().items()},
            "pending": [
                item.model_dump(mode="json") | {"resources": to_amounts(item.resources)} for item in self.pending
            ],
        }


async def read_status(target: Target, timeout_seconds: float = 5.0) -> ClusterStatus:
    """Ask a cluster how it is.

    Raises ``ClusterUnreachableError`` and ``AuthenticationError`` from joining, ``NoRespondersError`` where the broker
    runs but a service does not.
    """
    async with connect(
        target.address,
        role=target.role,
        identity=f"status-{secrets.token_hex(4)}",
        cluster=target.cluster,
        credentials=target.credentials,
        tls=target.tls,
        timeout_seconds=timeout_seconds,
    ) as bus:
        return await observe(bus, target, timeout_seconds)


async def observe(bus: Bus, target: Target, timeout_seconds: float) -> ClusterStatus:
    """Ask the control store, a scheduler and the nodes over a connection."""
    subjects = Subjects(target.cluster)
    ears = _Ears(bus, subjects)
    await ask(bus, subjects.gcs("cluster"), GetCluster(version=__version__), timeout_seconds)
    nodes = await ask(bus, subjects.gcs("list_nodes"), ListNodes(), timeout_seconds)
    pending = await ask(bus, subjects.scheduler("pending"), GetPending(), timeout_seconds)
    assert isinstance(nodes, NodeList)
    assert isinstance(pending, PendingList)
    alive = {record.description.node_id for record in nodes.nodes if record.state is NodeState.ALIVE}
    heard = await ears.hear(alive)
    statuses = [NodeStatus(record, heard.get(record.description.node_id)) for record in nodes.nodes]
    return ClusterStatus(target.address, target.cluster, statuses, pending.pending)


class _Ears:
    """Hears what nodes announce, from its making on."""

    def __init__(self, bus: Bus, subjects: Subjects) -> None:
        self._heard: dict[NodeId, NodeAnnouncement] = {}
        self._changed = asyncio.Event()
        bus.subscribe(subjects.event(Role.NODE, "*", "announce"), self._hear)

    def _hear(self, message: Message) -> None:
        announcement = NodeAnnouncement.model_validate_json(message.data)
        self._heard[announcement.node_id] = announcement
        self._changed.set()

    async def hear(self, nodes: set[NodeId]) -> dict[NodeId, NodeAnnouncement]:
        """Return the announcements of these nodes, as far as they come in time."""
        try:
            async with asyncio.timeout(HEARING_SECONDS):
                while not nodes <= self._heard.keys():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass  # a node that is silent is shown as such
        return self._heard
