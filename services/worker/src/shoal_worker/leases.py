"""The leases of a node and the resources behind them: who holds what, and what is free.

A lease's life::

    granted ── a process takes it ──► active ── returned, or its owner is gone, or its process is ──► ended
       │                              │    ▲
       │                     blocked (its CPU is back) or not
       └── returned, or its owner is gone: ended

``free`` is what was not promised. It goes below zero only where a blocked lease took its CPU back: unblocking never
waits. A slot that was granted once is known as long as its owner lives (the newest ``MOST_SLOTS`` of them), so that a
repeated request repeats the answer and makes no second lease.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.ids import JobId, LeaseId, ProcessId, SlotId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.resources import CPU, GPU, Resources, add, fits, subtract
from shoal_worker.gpus import GpuShare, GpuTable

MOST_SLOTS = 4096


@dataclass(slots=True)
class Lease:
    """A promise of resources and of one worker process to an owner. ``process`` is None until one is there.

    ``over``: the owner has nothing to do with it any more; it ends when its process has been reaped, and not before,
    since a dying process still uses what was promised to it.
    """

    number: LeaseId
    owner: ProcessId
    job: JobId
    key: int
    slot: SlotId
    resources: Resources
    gpus: tuple[GpuShare, ...]
    process: ProcessId | None = None
    blocked: bool = False
    recalled: bool = False
    over: bool = False

    @property
    def cpu(self) -> Resources:
        """The part that the lease gives back while it is blocked."""
        units = self.resources.get(CPU, 0)
        return {CPU: units} if units else {}

    @property
    def held(self) -> Resources:
        """What the lease keeps from others now."""
        return subtract(self.resources, self.cpu) if self.blocked else self.resources


@dataclass(slots=True)
class _Owner:
    leases: dict[LeaseId, Lease] = field(default_factory=dict)
    slots: dict[SlotId, None] = field(default_factory=dict)
    dead: bool = False


class LeaseTable:
    """All leases of one node. Numbers of leases rise and are never used again."""

    def __init__(self, total: Resources, gpu_names: Sequence[str] = ()) -> None:
        self.total = total
        self.free: Resources = dict(total)
        self.gpus = GpuTable(gpu_names)
        self._leases: dict[LeaseId, Lease] = {}
        self._owners: dict[ProcessId, _Owner] = {}
        self._last = 0

    def __iter__(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def __len__(self) -> int:
        return len(self._leases)

    def get(self, number: LeaseId) -> Lease | None:
        """Return a lease that has not ended."""
        return self._leases.get(number)

    def knows(self, owner: ProcessId, slot: SlotId) -> bool:
        """Tell whether this slot was granted, whatever became of its lease."""
        return owner in self._owners and slot in self._owners[owner].slots

    def owners(self) -> list[ProcessId]:
        """Return the owners that hold leases or have slots on record."""
        return list(self._owners)

    def of_owner(self, owner: ProcessId) -> list[Lease]:
        """Return an owner's leases, oldest first."""
        return list(self._owners[owner].leases.values()) if owner in self._owners else []

    def grant(self, owner: ProcessId, job: JobId, key: int, slot: SlotId, resources: Resources) -> Lease | None:
        """Reserve resources for a slot that is not known yet; None where they are not free."""
        if not fits(resources, self.free):
            return None
        shares = self.gpus.allocate(resources.get(GPU, 0))
        if shares is None:
            return None
        self._last += 1
        lease = Lease(LeaseId(self._last), owner, job, key, slot, resources, shares)
        self.free = subtract(self.free, resources)
        self._leases[lease.number] = lease
        record = self._owners.setdefault(owner, _Owner())
        record.leases[lease.number] = lease
        record.slots[slot] = None
        if len(record.slots) > MOST_SLOTS:
            del record.slots[next(iter(record.slots))]
        return lease

    def block(self, lease: Lease) -> bool:
        """Give the lease's CPU to others while its task waits; tell whether that changed anything."""
        changed = not lease.blocked
        if changed:
            lease.blocked = True
            self.free = add(self.free, lease.cpu)
        return changed

    def unblock(self, lease: Lease) -> bool:
        """Take the lease's CPU again, at once, even where it is not free; tell whether that changed anything."""
        changed = lease.blocked
        if changed:
            lease.blocked = False
            self.free = subtract(self.free, lease.cpu)
        return changed

    def end(self, lease: Lease) -> None:
        """End a lease: its resources are free. KeyError if it had ended before."""
        del self._leases[lease.number]
        del self._owners[lease.owner].leases[lease.number]
        if self._owners[lease.owner].dead:
            self.forget(lease.owner)
        self.free = add(self.free, lease.held)
        self.gpus.release(lease.gpus)

    def forget(self, owner: ProcessId) -> None:
        """An owner is dead: drop what is known of it, as soon as its leases have ended."""
        record = self._owners.get(owner)
        if record is not None:
            record.dead = True
            if not record.leases:
                del self._owners[owner]

    def recall(self, owner: ProcessId, resources: Resources, count: int) -> list[Lease]:
        """Mark up to ``count`` of an owner's newest leases of these resources as asked back, and return them."""
        chosen: list[Lease] = []
        for lease in reversed(self.of_owner(owner)):
            if len(chosen) == count:
                break
            running = lease.process is not None and not (lease.recalled or lease.blocked or lease.over)
            if running and lease.resources == resources:
                lease.recalled = True
                chosen.append(lease)
        return chosen

    def summaries(self) -> list[LeaseSummary]:
        """Return how many leases each owner holds, by resources."""
        groups: dict[tuple[ProcessId, tuple[tuple[str, int], ...]], list[Lease]] = {}
        for lease in self._leases.values():
            groups.setdefault((lease.owner, tuple(sorted(lease.resources.items()))), []).append(lease)
        return [
            LeaseSummary(
                owner=owner,
                job_id=leases[0].job,
                resources=dict(resources),
                count=len(leases),
                blocked=sum(lease.blocked for lease in leases),
                recalled=sum((lease.recalled or lease.over) and not lease.blocked for lease in leases),
            )
            for (owner, resources), leases in groups.items()
        ]
