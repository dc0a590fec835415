"""The program of a submitted job: a shell command in a session of its own, and what ends it with its supervisor.

A supervisor may be killed at any moment, and cannot take the program along then. So a *guard* waits beside it, a shell
that reads from a pipe. The pipe ends with the supervisor: then the guard asks the program's process group to end, and
kills what is left of it. When the program has ended the supervisor says so, and the guard kills what the program left
running. Either way it removes the folder with what the program was given.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

READ_BYTES = 64 * 1024
GRACE_SECONDS = 3
"""So long a program may take to end after it was asked to."""
DRAIN_SECONDS = 1.0
"""So long is waited for the last that a program printed, which somebody who left its group may hold open."""
GUARD = f"""
if ! read -r ended; then
  kill -s TERM -- "-$1"
  tries=0
  while kill -s 0 -- "-$1" && [ $tries -lt {GRACE_SECONDS * 10} ]; do sleep 0.1; tries=$((tries + 1)); done
fi
kill -s KILL -- "-$1"
rm -rf -- "$2"
"""


class Entrypoint:
    """A program that runs. ``printed`` is given what it prints, in a thread of its own."""

    def __init__(
        self, command: str, environment: Mapping[str, str], folder: Path, printed: Callable[[bytes], None]
    ) -> None:
        self._process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(self._process.pid), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._printed = printed
        self._reader = threading.Thread(target=self._read, name="shoal-entrypoint", daemon=True)
        self._reader.start()

    def has_ended(self) -> bool:
        """Tell whether the program has ended; it is not reaped, so that its group keeps its number."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program and to what it has started in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def finish(self) -> int:
        """Kill what a program that has ended left running, wait for the last it printed, and return its status."""
        self._guard.communicate(b"ended\n")
        self._reader.join(DRAIN_SECONDS)
        return self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while data := os.read(self._process.stdout.fileno(), READ_BYTES):
            self._printed(data)
