"""How the integration tests wait: for conditions and results, and never without an end; and where they listen."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import shoal
from shoal_core.bus.broker import free_port

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


def has_stopped(pid: int) -> bool:
    """Tell whether all threads of a process stand still, which is a while after the signal where others run."""
    threads = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return set(threads) == {"T"}


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def first_of_free_ports(count: int) -> int:
    """Return the first of so many ports in a row that nobody listens on."""
    while True:
        first = free_port()
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
