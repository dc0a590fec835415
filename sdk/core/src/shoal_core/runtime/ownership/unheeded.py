"""Errors that nobody asks for: of tasks whose references were dropped before anybody read what became of them.

They are told in the log of the process that submitted the task, as Ray does. A program that calls and forgets would
not learn of them otherwise.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence

from shoal_core.protocol.ids import TaskNumber, object_key
from shoal_core.protocol.records import Failed, Value
from shoal_core.runtime.ownership.objects import ObjectState, ObjectTable
from shoal_core.runtime.tasks.submission import WORKER_CRASHED

TOLD = ("task", WORKER_CRASHED)
"""The codes of the errors that are told: not what befell an actor, or what was cancelled, since that was wanted."""
PAUSE_SECONDS = 10.0
"""The same error is told again after that time."""
MOST_REMEMBERED = 1000
IGNORED = os.environ.get("SHOAL_IGNORE_UNHANDLED_ERRORS", "0") != "0"

logger = logging.getLogger("shoal")


class Unheeded:
    """Tells what nobody asked for (I/O thread only)."""

    def __init__(self, table: ObjectTable) -> None:
        self._table = table
        self._told: dict[str, float] = {}

    def failed(self, number: TaskNumber, values: Sequence[Value], failure: Failed) -> None:
        """A task has failed: the first of its errors that are left speaks for all; if none is, nobody will ask."""
        owned = self._table.owned
        keys = (object_key(number, index) for index, value in enumerate(values, 1) if type(value) is Failed)
        left = [state for key in keys if (state := owned.get(key)) is not None]
        for state in left[1:]:
            state.heeded = True
        if not left:
            self._tell(failure)

    def forgotten(self, state: ObjectState, failure: Failed) -> None:
        """Nobody refers any more to an object of this process in whose place there is an error."""
        if not state.heeded:
            self._tell(failure)

    def _tell(self, failure: Failed) -> None:
        if IGNORED or failure.code not in TOLD:
            return
        now = time.monotonic()
        what = failure.text.rpartition("\n")[2]
        before = self._told.get(what)
        if before is not None and now - before < PAUSE_SECONDS:
            return
        if len(self._told) >= MOST_REMEMBERED:
            self._told.clear()
        self._told[what] = now
        logger.error("Unhandled error (suppress with SHOAL_IGNORE_UNHANDLED_ERRORS=1): %s", failure.text)
