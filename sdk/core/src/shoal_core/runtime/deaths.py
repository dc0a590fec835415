"""Which processes are dead, from events that may get lost, as a pure core.

A node numbers the deaths it tells of. Whoever misses one sees the gap at the next, or suspects something when a channel
gets no answer, and asks the node for the list of its processes; those it knows that are not in the list are dead.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal_core.protocol.ids import NodeId, ProcessId, node_of


class Deaths:
    """What one process has heard of the deaths of others."""

    def __init__(self) -> None:
        self._sequences: dict[NodeId, int] = {}

    def heard(self, process: ProcessId, sequence: int) -> bool:
        """Note a death; return whether one before it was missed, so that the node must be asked."""
        node = node_of(process)
        known = self._sequences.get(node)
        self._sequences[node] = max(sequence, known or 0)
        return known is not None and sequence > known + 1

    def compare(
        self, node: NodeId, sequence: int, alive: Iterable[ProcessId], known: Iterable[ProcessId]
    ) -> list[ProcessId]:
        """Take a node's list; return those of the ``known`` processes that are dead."""
        self._sequences[node] = max(sequence, self._sequences.get(node, 0))
        living = set(alive)
        return [process for process in known if node_of(process) == node and process not in living]

    def forget(self, node: NodeId) -> None:
        """Drop what is known of a dead node."""
        self._sequences.pop(node, None)
