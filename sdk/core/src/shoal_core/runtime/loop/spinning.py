"""Looking for a moment whether something has come, before the system is told to put the thread to sleep.

To wake a thread takes the system longer than many a task takes to run, since a processor that has nothing to do goes to
sleep as well. So who waits for what mostly comes at once looks for it, and gives way to whoever else needs the
processor, or the interpreter. That costs little: where it was in vain a few times, it is tried only now and then.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

MOST_IN_VAIN = 4
TRIED_EACH = 16
"""After ``MOST_IN_VAIN`` waits in a row that were long, so many are taken for long ones before one is tried again."""


class Spin:
    """Waits of one kind, which are taken for long ones at first: a process that starts has better things to do.

    Threads may share it; that they count over each other does no harm.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._in_vain = MOST_IN_VAIN

    def until(self, ready: Callable[[], bool]) -> bool:
        """Look whether something has come, unless that is likely to be in vain; tell whether it has."""
        if self._in_vain < MOST_IN_VAIN or self._in_vain % TRIED_EACH == 0:
            clock, give_way = time.perf_counter, os.sched_yield
            end = clock() + self._seconds
            while clock() < end:
                if ready():
                    self._in_vain = 0
                    return True
                give_way()
        self._in_vain += 1
        return False
