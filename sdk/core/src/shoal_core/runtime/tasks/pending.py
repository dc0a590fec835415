"""How many calls of an actor one handle may have under way."""

from __future__ import annotations

import threading


class PendingCounter:
    """How many calls of one handle have not ended, held below its ``max_pending_calls`` (any thread)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._count = 0
        self._lock = threading.Lock()

    def rise(self) -> bool:
        """Count one more call; False, and not counted, if there are too many."""
        with self._lock:
            if self._count >= self.most:
                return False
            self._count += 1
            return True

    def fall(self) -> None:
        """Count one call less."""
        with self._lock:
            self._count -= 1
