"""Who has been silent for how long, counted so that only real silence counts.

Time passes in ticks, and a tick counts against the silent only if the watcher's own echo came back through the broker
since the tick before: the echo went out after whatever the others said, so what they said would have come first. A tick
counts at most ``LONGEST_STEP_SECONDS``, however long the watcher itself was stopped, or its clock jumped. After a
reconnect everyone begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable

LONGEST_STEP_SECONDS = 1.5


class Silence:
    """The silence of everyone who is watched, in seconds."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._heard: set[str] = set()
        self._last_tick: float | None = None

    def heard(self, name: str) -> None:
        """Take in a sign of life."""
        self._heard.add(name)

    def reset(self) -> None:
        """Give everyone a full new period."""
        self._seconds.clear()
        self._heard.clear()

    def pass_time(self, now: float, watched: Iterable[str], echoed: bool) -> None:
        """Let the time since the last call count against those of ``watched`` who were not heard in it."""
        step = 0.0 if self._last_tick is None else min(max(0.0, now - self._last_tick), LONGEST_STEP_SECONDS)
        self._last_tick = now
        if echoed:
            # Whoever is seen for the first time begins at zero.
            self._seconds = {
                name: self._seconds[name] + step if name in self._seconds and name not in self._heard else 0.0
                for name in watched
            }
            self._heard.clear()

    def longer_than(self, limit_seconds: float) -> list[str]:
        """Return who has been silent for longer, by name."""
        return sorted(name for name, seconds in self._seconds.items() if seconds > limit_seconds)
