"""How a node comes by its template process.

The first one is forked from the process of the service itself, before that has begun anything else: it shares the
memory of what both have imported, and is warm at once. Later there are threads and an event loop, which a fork would
copy in the middle of whatever they do, so another one is a new interpreter, that imports everything again.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shoal_core.machine import environment_for_copies
from shoal_worker.workers.template import serve_forked, warm_up

TEMPLATE = (sys.executable, "-m", "shoal_worker.workers.template")


class Process(Protocol):
    """A child process."""

    def kill(self) -> None:
        """End it, if it has not ended."""

    def wait(self) -> int:
        """Wait for its end; return its exit status, less than 0 for a signal."""


@dataclass(frozen=True)
class Launched:
    """A template and our end of the socket over which it speaks."""

    process: Process
    socket: socket.socket


class _Forked:
    """A child that is a copy of this process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._status: int | None = None

    def kill(self) -> None:
        """End it, if it has not been waited for."""
        if self._status is None:
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status


_prepared: list[Launched] = []


def prepare() -> None:
    """Fork the template that the next node service of this process takes; for the main thread, before all else.

    Does nothing in a process that has more threads, where forking is not safe.
    """
    if threading.active_count() > 1:
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    warm_up()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        serve_forked(theirs, parent)
    gc.unfreeze()
    theirs.close()
    _prepared.append(Launched(_Forked(pid), ours))


def launch(command: Sequence[str] = TEMPLATE) -> Launched:
    """Return the template that was prepared, or start one by its command; ``OSError`` where that fails."""
    if command is TEMPLATE and _prepared:
        return _prepared.pop()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        try:
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment_for_copies(os.environ),
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
    return Launched(process, ours)
