"""Durable objects that processes of this node ask for: each is found, given a segment, and filled in.

::

    asked ── FindDurable ──► found ── CreateFile ──► made ── FillFile ──► filled: sealed, the asker's
               │                      │                      │
               └── not there          └── no room            └── could not be read: the asker is told, nothing is kept

A request is known by its asker and serial, and answered alike however often it comes. What a process was answered is
forgotten with the process, and of each process only the newest answers are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal_core.protocol.ids import JobId, ProcessId
from shoal_core.protocol.storage import ObjectRestored, RestoreObject

MOST_ANSWERED = 64


@dataclass(eq=False, slots=True)
class Restoration:
    """One request, and who waits for its answer; ``segment`` is "" until there is room for the object."""

    request: RestoreObject
    job: JobId | None
    tokens: list[int]
    segment: str = ""
    size_bytes: int = 0
    answer: ObjectRestored | None = None


@dataclass(slots=True)
class Restorations:
    """The requests of all processes."""

    _by_asker: dict[ProcessId, dict[int, Restoration]] = field(default_factory=dict)
    _by_segment: dict[str, Restoration] = field(default_factory=dict)

    def find(self, request: RestoreObject) -> Restoration | None:
        """Return the restoration that this request asked for before."""
        return self._by_asker.get(request.process, {}).get(request.serial)

    def begin(self, request: RestoreObject, job: JobId | None, token: int) -> Restoration:
        """Note a new request."""
        restoration = Restoration(request, job, [token])
        asked = self._by_asker.setdefault(request.process, {})
        asked[request.serial] = restoration
        answered = [serial for serial, known in asked.items() if known.answer is not None]
        for serial in answered[:-MOST_ANSWERED]:
            del asked[serial]
        return restoration

    def give_segment(self, restoration: Restoration, segment: str) -> None:
        """There is room for the object."""
        restoration.segment = segment
        self._by_segment[segment] = restoration

    def of_segment(self, name: str) -> Restoration | None:
        """Return what a segment is being filled for."""
        return self._by_segment.get(name)

    def succeed(self, restoration: Restoration) -> ObjectRestored:
        """The object is there; return the answer."""
        del self._by_segment[restoration.segment]
        restoration.answer = ObjectRestored(segment=restoration.segment, size_bytes=restoration.size_bytes)
        return restoration.answer

    def fail(self, restoration: Restoration) -> None:
        """The object cannot be had; the next request asks anew."""
        self._by_segment.pop(restoration.segment, None)
        self._by_asker.get(restoration.request.process, {}).pop(restoration.request.serial, None)

    def process_died(self, process: ProcessId) -> None:
        """Forget what a process asked for; what is being filled for it still ends."""
        self._by_asker.pop(process, None)
