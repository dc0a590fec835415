"""What this process waits for from nodes: it ends when the node dies, and a node that says nothing is looked after."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Coroutine
from typing import Any, TypeVar

from shoal_core.protocol.errors import NodeDiedError
from shoal_core.protocol.ids import NodeId

T = TypeVar("T")

SUSPECT_SECONDS = 1.0
"""A node that takes longer: somebody looks whether it is dead, and looks again each time."""


class NodeWatch:
    """Who waits for which node (I/O thread only); ``dead`` are the nodes that are known to be dead."""

    def __init__(self, dead: Container[str]) -> None:
        self.suspect: Callable[[NodeId], None] = _nobody_looks
        """Has somebody look whether a node is dead that does not answer."""
        self._dead = dead
        self._waiting: dict[NodeId, set[asyncio.Task[Any]]] = {}

    async def unless_dead(self, node: NodeId, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Return what ``work`` returns; raises ``NodeDiedError`` where the node is dead, or dies meanwhile."""
        task = asyncio.current_task()
        assert task is not None
        if node in self._dead:
            raise _died(node)
        waiting = self._waiting.setdefault(node, set())
        waiting.add(task)
        suspicion = asyncio.get_running_loop().call_later(SUSPECT_SECONDS, self._look, task, node)
        try:
            return await work()
        except asyncio.CancelledError:
            if node not in self._dead or task.uncancel():
                raise
            raise _died(node) from None
        finally:
            suspicion.cancel()
            waiting.discard(task)
            if not waiting:
                self._waiting.pop(node, None)

    def node_died(self, node: NodeId) -> None:
        """End what waits for a node that is dead."""
        for task in self._waiting.pop(node, ()):
            task.cancel()

    def _look(self, task: asyncio.Task[Any], node: NodeId) -> None:
        if task in self._waiting.get(node, ()):
            self.suspect(node)
            asyncio.get_running_loop().call_later(SUSPECT_SECONDS, self._look, task, node)


def _died(node: NodeId) -> NodeDiedError:
    return NodeDiedError(f"node {node} has died")


def _nobody_looks(node: NodeId) -> None:
    """Nobody can tell yet whether a node is dead."""
