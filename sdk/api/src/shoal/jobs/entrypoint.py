"""The program of a submitted job: a shell command in a session of its own, and what ends it with its supervisor.

A supervisor may be killed at any moment, and cannot take the program along then. So a *guard* waits beside it: a shell
that reads from a pipe, which ends with the supervisor, or when that wants the program to end. Then the guard asks the
program's process group to end, kills what is left of it after a while, and removes the folder with what the program was
given.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

READ_BYTES = 64 * 1024
LOOK_SECONDS = 0.05
GRACE_SECONDS = 3
"""So long a program may take to end after it was asked to."""
DRAIN_SECONDS = 1.0
"""So long is waited for the last that a program printed, which somebody who left its group may hold open."""
GUARD = f"""
read -r group
while read -r nothing; do :; done
tries=0
test -n "$group" && kill -s TERM -- "-$group"
while test -n "$group" && kill -s 0 -- "-$group"; do
  test $tries -lt {GRACE_SECONDS * 10} || kill -s KILL -- "-$group"
  tries=$((tries + 1))
  sleep 0.1
done
rm -rf -- "$1"
"""


class Entrypoint:
    """A program that runs. ``printed`` is given what it prints, in a thread of its own.

    ``folder`` is removed at its end. Raises ``OSError`` where it cannot be started.
    """

    def __init__(
        self, command: str, environment: Mapping[str, str], folder: Path, printed: Callable[[bytes], None]
    ) -> None:
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, "guard", str(folder)],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._guard.stdin is not None
        self._pipe = self._guard.stdin
        try:
            self._process = subprocess.Popen(
                command,
                shell=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError:
            self._pipe.close()
            self._guard.wait()
            raise
        self._pipe.write(b"%d\n" % self._process.pid)
        self._pipe.flush()
        self._printed = printed
        self._reader = threading.Thread(target=self._read, name="shoal-entrypoint", daemon=True)
        self._reader.start()

    def has_ended(self) -> bool:
        """Tell whether the command has ended; what it started may still run."""
        return self._process.poll() is not None

    def end(self) -> int:
        """Have all that runs end, wait for that and for the last it printed, and return the command's status."""
        self._pipe.close()
        while self._guard.poll() is None:
            self._process.poll()  # else its group would not be seen to be empty
            time.sleep(LOOK_SECONDS)
        self._reader.join(DRAIN_SECONDS)
        return self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            while data := os.read(stream.fileno(), READ_BYTES):
                self._printed(data)
