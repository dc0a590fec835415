"""Saying something once, as programs do that would say the same for each of many tasks: ``if log_once("slow"): …``."""

from __future__ import annotations

import time

PERIOD_SECONDS = 60.0


class _Said:
    """What was said, and when nothing of it counts any more."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.silent = False
        self.period_seconds: float | None = None
        self.since = time.monotonic()


_said = _Said()


def log_once(key: str) -> bool:
    """Tell whether this is the first call with ``key`` in this process, or in this minute where that is periodic."""
    if _said.silent:
        return False
    now = time.monotonic()
    if _said.period_seconds is not None and now - _said.since > _said.period_seconds:
        _said.keys.clear()
        _said.since = now
    if key in _said.keys:
        return False
    _said.keys.add(key)  # as many as the program has texts
    return True


def disable_log_once_globally() -> None:
    """Have ``log_once`` return False for every key from now on."""
    _said.silent = True


def enable_periodic_logging() -> None:
    """Have ``log_once`` return True again, for each key once in ``PERIOD_SECONDS``."""
    _said.silent = False
    _said.period_seconds = PERIOD_SECONDS
