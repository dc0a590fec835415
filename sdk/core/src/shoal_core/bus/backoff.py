"""How long a connection that was lost waits before each attempt to come back."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nats.aio.client import Server

FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
DOUBLINGS = 10


class Backoff:
    """Nothing before the first attempt, then 20 ms, doubling to 1 s; with jitter, so that not all return at once.

    ``attempts`` counts those since the connection was lost; it is set back to 0 by whoever succeeds.
    """

    def __init__(self) -> None:
        self.attempts = 0

    def choose(self, servers: list[Server], info: dict[str, Any]) -> tuple[Server | None, float]:
        """Return which server to dial next, in turn, and after how many seconds (nats-py's reconnect handler)."""
        attempt = self.attempts
        return servers[attempt % len(servers)], self.pause_seconds()

    def pause_seconds(self) -> float:
        """Count an attempt, and return how long to wait before it."""
        attempt = self.attempts
        self.attempts += 1
        if not attempt:
            return 0.0
        longest: float = min(LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempt - 1, DOUBLINGS))
        return random.uniform(0.5, 1.0) * longest
