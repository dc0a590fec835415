"""How the integration tests wait: for conditions and results, and never without an end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil

import shoal

SECONDS = 40.0
"""No wait of these tests is longer."""


def until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Wait until a condition holds; ``what`` it is, for whoever reads that it did not."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def get(refs: Any) -> Any:
    """Return the values of references, or fail."""
    return shoal.get(refs, timeout=SECONDS)


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
