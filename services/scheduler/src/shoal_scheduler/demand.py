"""Who wants how many leases of what: the open demand of all owners, as one scheduler knows it.

A slot's life, in the eyes of one scheduler::

    open ── a node is asked ──► asked ── granted ──► granted: not asked for again, though the owner may list it still
     ▲                            │                     │
     └── refused, or unanswered ──┴── its node died, or the owner lists it after GRANTED_SECONDS ──► open

The owner's own statements are the truth: what it does not list any more is gone, wherever it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.ids import JobId, NodeId, ProcessId, SlotId, node_of
from shoal_core.protocol.scheduling import Demand, DemandEntry
from shoal_scheduler.candidates import Shape, shape_of

FORGET_SECONDS = 10.0
"""Owners repeat unmet demand every second; what was not repeated for so long is no longer wanted."""

GRANTED_SECONDS = 5.0
"""A grant reaches its owner only when its worker process has started. So long, an owner may list a granted slot."""

HELP_SECONDS = 0.9
"""Others help where an owner repeats a slot after this; a little less than the second between two statements."""

REST_SECONDS, LONGEST_REST_SECONDS = 0.012, 0.1
"""Where others were quicker one waits so long, and twice as long each time: else one would ask one full node after the
other, since nodes tell of what they have granted only every hundredth of a second.
"""


@dataclass
class Wanted:
    """The open demand of one owner for one scheduling key.

    ``open`` maps slots to the time they became open (again), ``asked`` to the number of the ask under way, ``heard``
    all of them to when they were first heard of. Of the last answers ``conflicts`` were refusals since others were
    quicker, for which it rests until ``rests_until``. ``served_at`` is when a slot was last granted or withdrawn, at
    first when the demand was first heard. ``avoid`` names nodes that refused although they have the room, and until
    when not to ask them again. ``ours``: this replica is the first to act on it. ``has_leases``: its owner holds leases
    like those wanted, else it has held none since ``idle_since``, if it ever did. ``served_before`` is what
    ``served_at`` was when the demand last took its place among what waits.
    """

    owner: ProcessId
    job_id: JobId
    entry: DemandEntry
    since: float
    served_at: float
    stated_at: float
    open: dict[SlotId, float] = field(default_factory=dict)
    asked: dict[SlotId, int] = field(default_factory=dict)
    heard: dict[SlotId, float] = field(default_factory=dict)
    conflicts: int = 0
    rests_until: float = -math.inf
    avoid: dict[NodeId, float] = field(default_factory=dict)
    noticed: bool = False
    has_leases: bool = False
    idle_since: float = 0.0
    ours: bool = True
    shape: Shape = field(init=False)
    served_before: float = field(init=False)

    def __post_init__(self) -> None:
        self.shape = shape_of(self.entry.resources, self.entry.strategy)
        self.served_before = self.served_at

    @property
    def name(self) -> tuple[ProcessId, int]:
        """What identifies it."""
        return self.owner, self.entry.key

    def next_slot(self, opened_after: float) -> SlotId | None:
        """Return the first open slot that is overdue, or was opened after some time."""
        overdue = self.stated_at - HELP_SECONDS
        return next((slot for slot, at in self.open.items() if at <= overdue or at >= opened_after), None)

    def old_slot(self, after: float, before: float) -> SlotId | None:
        """Return the first open slot that was first heard of between two times."""
        return next((slot for slot in self.open if after < self.heard.get(slot, before) < before), None)

    @property
    def is_overdue(self) -> bool:
        """Whether the owner has repeated a slot: whoever should have asked for it has not."""
        return self.stated_at - min(self.open.values(), default=self.stated_at) >= HELP_SECONDS

    def rest(self, now: float) -> float:
        """Others were quicker: ask for nothing until nodes have told of that; return until when."""
        self.rests_until = now + min(LONGEST_REST_SECONDS, REST_SECONDS * 2.0**self.conflicts)
        self.conflicts = min(self.conflicts + 1, 10)
        return self.rests_until

    def unmet(self) -> int:
        """Return how many leases are asked for and not granted."""
        return len(self.open) + len(self.asked)

    def reopen(self, slots: Sequence[SlotId], number: int, now: float) -> None:
        """Open slots again that ask ``number`` did not get."""
        for slot in slots:
            if self.asked.get(slot) == number:
                del self.asked[slot]
                self.open[slot] = now


@dataclass
class _Owner:
    version: int = 0
    stated_at: float = 0.0
    wanted: dict[int, Wanted] = field(default_factory=dict)
    granted: dict[SlotId, tuple[NodeId, float]] = field(default_factory=dict)


class DemandTable:
    """All demand; each version of an owner's demand replaces the one before."""

    def __init__(self) -> None:
        self._owners: dict[ProcessId, _Owner] = {}

    def __iter__(self) -> Iterator[Wanted]:
        for record in self._owners.values():
            yield from record.wanted.values()

    def __len__(self) -> int:
        return sum(len(record.wanted) for record in self._owners.values())

    def find(self, owner: ProcessId, key: int) -> Wanted | None:
        """Return one owner's demand for one key."""
        record = self._owners.get(owner)
        return record.wanted.get(key) if record is not None else None

    def known(self) -> list[ProcessId]:
        """Return the owners that are remembered, also those that want nothing now."""
        return list(self._owners)

    def update(self, demand: Demand, now: float) -> list[Wanted]:
        """Take in an owner's demand, unless a newer version is known; return all that it wanted or wants."""
        record = self._owners.setdefault(demand.owner, _Owner())
        if demand.version <= record.version:
            return []
        record.version = demand.version
        record.stated_at = now
        listed = {slot for entry in demand.entries for slot in entry.slots}
        record.granted = {
            slot: (node, at)
            for slot, (node, at) in record.granted.items()
            if slot in listed and now - at < GRANTED_SECONDS
        }
        before, record.wanted = record.wanted, {}
        for entry in demand.entries:
            wanted = before.get(entry.key) or Wanted(demand.owner, demand.job_id, entry, now, now, now)
            _restate(wanted, entry, record, now)
            if wanted.unmet():
                record.wanted[entry.key] = wanted
        gone = [wanted for key, wanted in before.items() if key not in record.wanted]
        for wanted in gone:
            wanted.served_at = now
            wanted.open.clear()
            wanted.asked.clear()
        return [*record.wanted.values(), *gone]

    def met(self, wanted: Wanted, slots: Sequence[SlotId], node: NodeId, now: float) -> None:
        """Close slots that a node granted."""
        record = self._owners[wanted.owner]
        for slot in slots:
            wanted.asked.pop(slot, None)
            wanted.open.pop(slot, None)
            record.granted[slot] = (node, now)
            wanted.served_at = now
        if not wanted.unmet():
            record.wanted.pop(wanted.entry.key, None)

    def drop_owner(self, owner: ProcessId) -> list[Wanted]:
        """Forget an owner that is dead; return what it wanted."""
        record = self._owners.pop(owner, None)
        dropped = list(record.wanted.values()) if record is not None else []
        for wanted in dropped:
            wanted.open.clear()
            wanted.asked.clear()
        return dropped

    def drop_job(self, job: JobId) -> list[Wanted]:
        """Forget the owners of a job that has ended; return what they wanted."""
        owners = {wanted.owner for wanted in self if wanted.job_id == job}
        return [wanted for owner in owners for wanted in self.drop_owner(owner)]

    def drop_node(self, node: NodeId) -> list[Wanted]:
        """Forget the owners on a node that is dead, and what it granted to others; return what they wanted."""
        dropped: list[Wanted] = []
        for owner, record in list(self._owners.items()):
            if node_of(owner) == node:
                dropped += self.drop_owner(owner)
            else:
                record.granted = {slot: grant for slot, grant in record.granted.items() if grant[0] != node}
        return dropped

    def forget_silent(self, now: float) -> list[Wanted]:
        """Drop what was not repeated, and return it."""
        silent = [owner for owner, record in self._owners.items() if now - record.stated_at > FORGET_SECONDS]
        return [wanted for owner in silent for wanted in self.drop_owner(owner)]

    def renew(self, now: float) -> None:
        """Give every owner a full new period to repeat itself, since nobody could be heard for a while."""
        for record in self._owners.values():
            record.stated_at = now


def _restate(wanted: Wanted, entry: DemandEntry, record: _Owner, now: float) -> None:
    """Bring one key up to the owner's newest statement."""
    slots = dict.fromkeys(entry.slots if entry.wanted else ())
    before = {*wanted.open, *wanted.asked}
    asked = {slot: number for slot, number in wanted.asked.items() if slot in slots}
    if len(asked) < len(wanted.asked) or any(slot not in slots for slot in wanted.open):
        wanted.served_at = now
    wanted.entry = entry
    shape = shape_of(entry.resources, entry.strategy)
    if shape != wanted.shape:
        wanted.shape = shape
    wanted.stated_at = now
    wanted.open = {
        slot: wanted.open.get(slot, now) for slot in slots if slot not in asked and slot not in record.granted
    }
    wanted.asked = asked
    wanted.heard = {slot: wanted.heard.get(slot, now) for slot in slots}
    if before.isdisjoint(slots):
        wanted.noticed = False  # what it was told of is over: this is new
        wanted.since = now
