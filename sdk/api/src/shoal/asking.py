"""Asking all nodes of a cluster the same thing at once; nobody is waited for longer than the asker says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from shoal_core.bus import Bus
from shoal_core.bus.requests import ask
from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import ListNodes, Message, NodeDescription, NodeList, NodeState
from shoal_core.protocol.subjects import Subjects

SPARE_SECONDS = 0.5
"""How much sooner than the asker a node stops waiting for its processes, so that its answer comes in time."""
MOST_SECONDS = 60.0

Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True)
class Asked(Generic[Answer]):
    """What all nodes that live answered, and why those did not that did not."""

    answers: list[tuple[NodeDescription, Answer]]
    silent: dict[NodeId, str]


async def ask_nodes(
    bus: Bus,
    subjects: Subjects,
    verb: str,
    request: Callable[[float], Message],
    kind: type[Answer],
    timeout_seconds: float,
) -> Asked[Answer]:
    """Ask all living nodes; raises only where there is no gcs.

    ``request`` returns what is asked, given for how many seconds a node may wait for its processes.
    """
    nodes = await ask(bus, subjects.gcs("list_nodes"), ListNodes(), timeout_seconds)
    assert isinstance(nodes, NodeList)
    patience = min(MOST_SECONDS, max(timeout_seconds / 2, timeout_seconds - SPARE_SECONDS))

    async def ask_one(node: NodeId) -> Message | ShoalError:
        try:
            return await ask(bus, subjects.node(node, verb), request(patience), timeout_seconds, attempts=1)
        except ShoalError as error:
            return error

    alive = [record.description for record in nodes.nodes if record.state is NodeState.ALIVE]
    answers: list[tuple[NodeDescription, Answer]] = []
    silent: dict[NodeId, str] = {}
    for node, answer in zip(alive, await asyncio.gather(*(ask_one(one.node_id) for one in alive)), strict=True):
        if isinstance(answer, kind):
            answers.append((node, answer))
        else:
            silent[node.node_id] = str(answer)
    return Asked(answers, silent)
