"""The segments that nobody maps, by what their going would cost, and least recently used first.

Whoever wants room looks here, rather than at all segments of the node: of small ones there are ten thousands.
"""

from __future__ import annotations

import heapq
from enum import Enum

LEAST_STALE = 64


class Cost(Enum):
    """What it takes to have the file of an idle segment go."""

    COPY = "nothing: its home has the object"
    DURABLE = "nothing: the durable tier has the object"
    SPILLING = "to wait, for it is being spilled"
    SPILL = "to spill it"


class IdleQueue:
    """Segments of one cost. ``total_bytes`` is what their files take."""

    def __init__(self) -> None:
        self.total_bytes = 0
        self._members: dict[str, tuple[int, int]] = {}
        self._heap: list[tuple[int, str]] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def put(self, name: str, used: int, size_bytes: int) -> None:
        """Add a segment; or say anew when it was used, which rises with each use of any."""
        known = self._members.get(name)
        if known is not None:
            self.total_bytes -= known[1]
        self._members[name] = (used, size_bytes)
        self.total_bytes += size_bytes
        if known is None or known[0] != used:
            heapq.heappush(self._heap, (used, name))
        if len(self._heap) > 2 * len(self._members) + LEAST_STALE:
            self._heap = [(when, member) for member, (when, _) in self._members.items()]
            heapq.heapify(self._heap)

    def remove(self, name: str) -> None:
        """Take a segment out, if it is there."""
        known = self._members.pop(name, None)
        if known is not None:
            self.total_bytes -= known[1]

    def first(self) -> str | None:
        """Return the segment that was used the longest ago."""
        while self._heap:
            used, name = self._heap[0]
            known = self._members.get(name)
            if known is not None and known[0] == used:
                return name
            heapq.heappop(self._heap)
        return None
