"""What worker processes leave behind: processes that they have started end with them.

A worker process leads a process group of its own. In that is all that it starts, and what these start, unless they ask
for a session of their own (``start_new_session=True``). When the worker process has ended, however that came, the
others are asked to end (SIGTERM); who has not done so ``GRACE_SECONDS`` later is killed, and sooner where the node
ends. As long as a group has members its number is nobody else's; that it has none any more is seen ``LOOK_SECONDS``
later at most.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

GRACE_SECONDS = 5.0
LOOK_SECONDS = 0.1
LAST_SECONDS = 1.0
"""So long they have when the node ends, and once more to die when they are killed."""


class Remnants:
    """The groups of worker processes that have ended, as far as somebody is left in them."""

    def __init__(self) -> None:
        self._kill_at: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._kill_at)

    def ended(self, group: int, now: float) -> bool:
        """The worker process that led a group has ended; tell whether somebody is left in it."""
        if not _send(group, signal.SIGTERM):
            return False
        self._kill_at[group] = now + GRACE_SECONDS
        return True

    def look(self, now: float) -> list[int]:
        """Forget those that have ended, and kill and forget those whose time is over; return which."""
        over = [group for group, kill_at in self._kill_at.items() if now >= kill_at or not _send(group, 0)]
        for group in over:
            if now >= self._kill_at.pop(group):  # where nobody reaps orphans, their group stays for ever
                _send(group, signal.SIGKILL)
        return over


def end(groups: Iterable[int]) -> None:
    """End what is left of groups whose worker processes have ended, and return when it has."""
    left = _living({group for group in groups if _send(group, signal.SIGTERM)})
    kill_at = time.monotonic() + LAST_SECONDS
    while left and (now := time.monotonic()) < kill_at + LAST_SECONDS:
        if now >= kill_at:
            for group in left:
                _send(group, signal.SIGKILL)
        time.sleep(0.01)
        left = _living(left)


def _living(groups: set[int]) -> set[int]:
    """Return the groups in which somebody lives: the worker processes themselves may not have been reaped yet."""
    living = set()
    for process in Path("/proc").glob("[0-9]*/stat") if groups else ():
        with contextlib.suppress(OSError):
            state, _, group = process.read_text().rpartition(")")[2].split()[:3]
            if state not in "ZX" and int(group) in groups:
                living.add(int(group))
    return living


def _send(group: int, number: int) -> bool:
    """Send a signal to all of a group; tell whether there is anybody in it who can be reached."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
