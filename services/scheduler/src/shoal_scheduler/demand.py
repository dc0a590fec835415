"""Who wants how many leases of what: the open demand of all owners, as one scheduler knows it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from shoal_core.protocol.ids import JobId, ProcessId, SlotId
from shoal_core.protocol.messages import Demand, DemandEntry

FORGET_SECONDS = 10.0
"""Owners repeat unmet demand every second; what was not repeated for so long is no longer wanted."""


@dataclass
class Wanted:
    """The open demand of one owner for one scheduling key. ``asked`` maps slots to the time a node was asked."""

    owner: ProcessId
    job_id: JobId
    entry: DemandEntry
    since: float
    repeated_at: float
    open: dict[SlotId, float] = field(default_factory=dict)
    asked: dict[SlotId, float] = field(default_factory=dict)
    noticed: bool = False
    recalled_at: float = 0.0

    def unmet(self) -> int:
        """Return how many leases are asked for and not granted."""
        return len(self.open) + len(self.asked)


class DemandTable:
    """All demand; each version of an owner's demand replaces the one before."""

    def __init__(self) -> None:
        self._wanted: dict[ProcessId, dict[int, Wanted]] = {}
        self._versions: dict[ProcessId, int] = {}

    def __iter__(self) -> Iterator[Wanted]:
        for entries in self._wanted.values():
            yield from entries.values()

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._wanted.values())

    def find(self, owner: ProcessId, key: int) -> Wanted | None:
        """Return one owner's demand for one key."""
        return self._wanted.get(owner, {}).get(key)

    def update(self, demand: Demand, now: float) -> None:
        """Take in an owner's demand, unless a newer version is known."""
        if demand.version <= self._versions.get(demand.owner, 0):
            return
        self._versions[demand.owner] = demand.version
        before = self._wanted.pop(demand.owner, {})
        after = {}
        for entry in demand.entries:
            wanted = before.get(entry.key)
            if wanted is None:
                wanted = Wanted(demand.owner, demand.job_id, entry, now, now)
            wanted.entry = entry
            wanted.repeated_at = now
            asked = {slot: at for slot, at in wanted.asked.items() if slot in set(entry.slots)}
            wanted.open = {slot: wanted.open.get(slot, now) for slot in entry.slots if slot not in asked}
            wanted.asked = asked
            if wanted.unmet():
                after[entry.key] = wanted
        if after:
            self._wanted[demand.owner] = after

    def met(self, wanted: Wanted, slots: list[SlotId]) -> None:
        """Close slots that a node granted."""
        for slot in slots:
            wanted.asked.pop(slot, None)
            wanted.open.pop(slot, None)
        if not wanted.unmet():
            entries = self._wanted.get(wanted.owner, {})
            entries.pop(wanted.entry.key, None)
            if not entries:
                self._wanted.pop(wanted.owner, None)

    def drop_owner(self, owner: ProcessId) -> None:
        """Forget an owner that is dead."""
        self._wanted.pop(owner, None)
        self._versions.pop(owner, None)

    def owners(self) -> list[ProcessId]:
        """Return the owners that want something."""
        return list(self._wanted)

    def forget_silent(self, now: float) -> None:
        """Drop what was not repeated."""
        for wanted in list(self):
            if now - wanted.repeated_at > FORGET_SECONDS:
                self.drop_owner(wanted.owner)
