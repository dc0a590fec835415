"""A network that does what networks do: seeded, so that every run of a seed is the same run."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

M = TypeVar("M")


@dataclass(frozen=True)
class Fate:
    """How likely each misfortune is, for a message, from 0 to 1."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0


class BadNetwork(Generic[M]):
    """Carries messages between named places, one queue for each direction of each pair.

    Messages wait in their queue until they are delivered; nothing moves by itself. ``fate`` may be changed at any time.
    """

    def __init__(self, seed: int, fate: Fate | None = None) -> None:
        self.random = random.Random(seed)
        self.fate = fate or Fate()
        self._queues: dict[tuple[str, str], deque[M]] = {}
        self._cut: set[frozenset[str]] = set()
        self.dropped = 0
        self.delivered = 0

    def send(self, source: str, target: str, message: M) -> None:
        """Put a message on its way; it may be lost, doubled or overtaken here."""
        if frozenset((source, target)) in self._cut or self.random.random() < self.fate.drop:
            self.dropped += 1
            return
        queue = self._queues.setdefault((source, target), deque())
        for _ in range(2 if self.random.random() < self.fate.duplicate else 1):
            if queue and self.random.random() < self.fate.reorder:
                queue.insert(self.random.randrange(len(queue)), message)
            else:
                queue.append(message)

    def partition(self, one: str, other: str) -> None:
        """Lose all that is under way between two places, and all that they send from now on."""
        self._cut.add(frozenset((one, other)))
        for pair in ((one, other), (other, one)):
            self.dropped += len(self._queues.pop(pair, ()))

    def heal(self, one: str, other: str) -> None:
        """Undo ``partition``."""
        self._cut.discard(frozenset((one, other)))

    def lose(self, place: str) -> None:
        """Lose all that is under way to or from a place, once."""
        for pair in [pair for pair in self._queues if place in pair]:
            self.dropped += len(self._queues.pop(pair))

    @property
    def under_way(self) -> int:
        """How many messages wait to be delivered."""
        return sum(len(queue) for queue in self._queues.values())

    def deliver_one(self, take: Callable[[str, str, M], None]) -> bool:
        """Deliver the next message of some queue, as ``take(source, target, message)``; False if there is none."""
        pairs = sorted(pair for pair, queue in self._queues.items() if queue)
        if not pairs:
            return False
        source, target = self.random.choice(pairs)
        message = self._queues[source, target].popleft()
        self.delivered += 1
        take(source, target, message)
        return True

    def deliver_all(self, take: Callable[[str, str, M], None], *, limit: int = 1_000_000) -> int:
        """Deliver until nothing is under way, what is sent meanwhile included; return how many.

        Raises ``RuntimeError`` above ``limit``: the places will never stop talking.
        """
        count = 0
        while self.deliver_one(take):
            count += 1
            if count > limit:
                raise RuntimeError(f"more than {limit} messages were delivered and more are under way: a storm")
        return count
