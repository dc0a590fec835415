"""Draining nodes before they end: they take nothing new, and what runs on them may finish.

It needs the credential of role ``node``. What a node still has when it ends is run again elsewhere, as after any end.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.status import Target
from shoal_core.bus import Message, connect
from shoal_core.bus.requests import ask
from shoal_core.machine import machine_id
from shoal_core.protocol.errors import NotFoundError, PermissionViolationError
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import DrainNode, ListNodes, NodeAnnouncement, NodeList, NodeState
from shoal_core.protocol.subjects import Role, Subjects

REQUEST_SECONDS = 10.0


@dataclass(frozen=True)
class Remainder:
    """What a node had when it was last heard of."""

    leases: int
    actors: int


async def drain(target: Target, nodes: Sequence[str], deadline_seconds: float) -> dict[NodeId, Remainder]:
    """Drain nodes (none named: those of this machine, or container) and wait until they are empty.

    Returns what the nodes have left that are not empty after ``deadline_seconds``.
    Raises ``NotFoundError`` for a node that does not live, and ``ConnectionFailedError`` where the cluster cannot be
    joined, ``PermissionViolationError`` for a credential that is not that of nodes.
    """
    refusals: list[BaseException] = []
    async with connect(
        target.address,
        role=Role.NODE,
        identity=f"drain-{secrets.token_hex(4)}",
        cluster=target.cluster,
        credentials=target.credentials,
        tls=target.tls,
        on_error=refusals.append,
    ) as bus:
        await bus.flush()
        if any(isinstance(refusal, PermissionViolationError) for refusal in refusals):
            raise PermissionViolationError(
                "to drain nodes takes the credential of role node, and this is another's: name that file with "
                "--credentials or SHOAL_CREDENTIALS (`shoal security init` makes it as node.json)"
            )
        subjects = Subjects(target.cluster)
        listed = await ask(bus, subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=REQUEST_SECONDS)
        assert isinstance(listed, NodeList)
        alive = {one.description.node_id: one.description for one in listed.nodes if one.state is NodeState.ALIVE}
        chosen = [NodeId(node) for node in nodes]
        if not chosen:
            chosen = [node for node, description in alive.items() if description.machine_id == machine_id()]
        unknown = [node for node in chosen if node not in alive]
        if unknown or not chosen:
            what = f"no node {', '.join(unknown)}" if unknown else "no node of this machine"
            raise NotFoundError(f"{what} is alive; those that are: {', '.join(alive) or 'none'} (see `shoal status`)")
        watch = _Watch(chosen)
        bus.subscribe(subjects.event(Role.NODE, "*", "announce"), watch.hear)
        await bus.flush()
        for node in chosen:
            await ask(bus, subjects.node_from_node(node, "drain"), DrainNode(), timeout_seconds=REQUEST_SECONDS)
        return await watch.wait(deadline_seconds)


class _Watch:
    """Hears what draining nodes announce, until they have nothing left."""

    def __init__(self, nodes: Sequence[NodeId]) -> None:
        self._left: dict[NodeId, Remainder | None] = dict.fromkeys(nodes)
        self._empty = asyncio.Event()

    def hear(self, message: Message) -> None:
        announcement = NodeAnnouncement.model_validate_json(message.data)
        if announcement.node_id not in self._left or not announcement.draining:
            return
        leases = sum(lease.count for lease in announcement.leases)
        self._left[announcement.node_id] = Remainder(leases, announcement.actors)
        if not leases and not announcement.actors:
            del self._left[announcement.node_id]
        if not self._left:
            self._empty.set()

    async def wait(self, seconds: float) -> dict[NodeId, Remainder]:
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
        except TimeoutError:
            pass  # what is left is told
        return {node: left or Remainder(0, 0) for node, left in self._left.items()}
