"""Functions and classes on their way to workers: pickled once, uploaded once in each job."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from shoal_core.protocol.ids import FunctionId, JobId
from shoal_core.runtime.runtime import Runtime
from shoal_core.runtime.tasks.functions import Definition, Exported, export

Known = tuple[JobId, FunctionId]


class Export:
    """The pickle of a function or class, made at its first use, so that what it refers to may be defined after it.

    One that was exported before it was itself sent here is ``known`` under its id in that job, and is not pickled
    again; in another job (a detached actor has one of its own) it is.
    """

    def __init__(self, function: Callable[..., Any], max_calls: int = 0, known: Known | None = None) -> None:
        self.known = known
        self._definition = Definition(function, max_calls)
        self._exported: Exported | None = None

    def to(self, runtime: Runtime, job: JobId) -> FunctionId:
        """Have the workers of a job know it and return its id; ``TypeError`` names what cannot be pickled."""
        if self._exported is None and self.known is not None and self.known[0] == job:
            return self.known[1]
        if self._exported is None:
            self._exported = export(self._definition)
        runtime.export(job, self._exported)
        self.known = (job, self._exported.function_id)
        return self._exported.function_id

    def carried(self, most_bytes: int) -> bytes:
        """Return the pickle, to go along where it is used; nothing where it was not made here, or is larger."""
        if self._exported is None or len(self._exported.data) > most_bytes:
            return b""
        return self._exported.data
