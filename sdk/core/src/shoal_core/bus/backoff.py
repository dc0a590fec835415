"""How long a connection that was lost waits before each attempt to come back."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nats.aio.client import Server

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
DOUBLINGS = 10
STEADY_SECONDS = 1.0


class Backoff:
    """Nothing before the first attempt, then 20 ms, doubling to 1 s; with jitter, so that not all return at once.

    ``attempts`` counts those since a connection was lost that had lasted for ``STEADY_SECONDS``: a broker that lets one
    in and cuts the connection at once is not dialled again and again without a pause.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.attempts = 0
        self._clock = clock
        self._connected_at = float("inf")

    def connected(self) -> None:
        """An attempt has succeeded."""
        self._connected_at = self._clock()

    def choose(self, servers: list[Server], info: dict[str, Any]) -> tuple[Server | None, float]:
        """Return which server to dial next, in turn, and after how many seconds (nats-py's reconnect handler)."""
        pause = self.pause_seconds()
        return servers[(self.attempts - 1) % len(servers)], pause

    def pause_seconds(self) -> float:
        """Count an attempt, and return how long to wait before it."""
        if self._clock() - self._connected_at >= STEADY_SECONDS:
            self.attempts = 0
        self._connected_at = float("inf")
        attempt = self.attempts
        self.attempts += 1
        if not attempt:
            return 0.0
        longest: float = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, DOUBLINGS))
        return random.uniform(0.5, 1.0) * longest
