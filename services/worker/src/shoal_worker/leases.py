"""The leases of a node and the resources behind them: who holds what, and what is free.

A lease's life::

    granted ── a process takes it ──► active ── returned, or its owner is gone, or its process is ──► ended
       │                              │    ▲
       │                     blocked (its CPU is back) or not
       └── returned, or its owner is gone: ended

``free`` is what was not promised. It goes below zero only where a blocked lease took its CPU back: unblocking never
waits. What a bundle of a placement group reserves was promised to it, and is a pool of its own, out of which leases are
granted as they are out of the node's. A slot that was granted once is known as long as its owner lives (the newest
``MOST_SLOTS`` of them), so that a repeated request repeats the answer and makes no second lease.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.ids import JobId, LeaseId, ProcessId, SlotId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import CPU, GPU, UNIT, Resources, add, fits, subtract
from shoal_worker.gpus import GpuShare, GpuTable

MOST_SLOTS = 4096


class Pool:
    """Resources that leases are granted out of: the node's, or those that a bundle has reserved, once it is open."""

    def __init__(self, total: Resources, gpu_names: Sequence[str]) -> None:
        self.total = total
        self.free: Resources = dict(total)
        self.gpus = GpuTable(gpu_names)
        self.open = True

    @classmethod
    def of_bundle(cls, total: Resources, gpu_names: Sequence[str], shares: Sequence[GpuShare]) -> Pool:
        """Return what a bundle has reserved; it has none of the devices but these."""
        pool = cls(total, gpu_names)
        pool.gpus.free = [0] * len(gpu_names)
        pool.gpus.release(shares)
        pool.open = False
        return pool

    def take(self, resources: Resources) -> tuple[GpuShare, ...] | None:
        """Take resources, and say which GPUs they are; None where they are not free."""
        if not fits(resources, self.free):
            return None
        shares = self.gpus.allocate(resources.get(GPU, 0))
        if shares is not None:
            self.free = subtract(self.free, resources)
        return shares

    def put_back(self, resources: Resources, shares: Sequence[GpuShare]) -> None:
        """Put back what was taken."""
        self.free = add(self.free, resources)
        self.gpus.release(shares)


@dataclass(slots=True)
class Lease:
    """A promise of resources and of one worker process to an owner. ``process`` is None until one is there.

    ``over``: the owner has nothing to do with it any more; it ends when its process has been reaped, and not before,
    since a dying process still uses what was promised to it. ``actor``: it is an actor, whose id stands for the owner;
    nobody returns it, and it is never asked back. ``bundle``: it is out of a bundle of a placement group.
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
    actor: bool = False
    bundle: Bundle | None = None
    environment: str = ""

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
    job: JobId
    leases: dict[LeaseId, Lease] = field(default_factory=dict)
    slots: dict[SlotId, None] = field(default_factory=dict)
    dead: bool = False


class LeaseTable:
    """All leases of one node. Numbers of leases rise and are never used again."""

    def __init__(self, total: Resources, gpu_names: Sequence[str] = ()) -> None:
        self._node = Pool(total, gpu_names)
        self._bundles: dict[Bundle, Pool] = {}
        self._leases: dict[LeaseId, Lease] = {}
        self._owners: dict[ProcessId, _Owner] = {}
        self._last = 0

    @property
    def total(self) -> Resources:
        """All that the node has."""
        return self._node.total

    @property
    def free(self) -> Resources:
        """What was promised neither to leases nor to bundles."""
        return self._node.free

    @property
    def gpus(self) -> GpuTable:
        """The devices, and what of each was promised to nobody."""
        return self._node.gpus

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

    def jobs(self) -> set[JobId]:
        """Return the jobs of all owners on record, and of all leases."""
        return {*(owner.job for owner in self._owners.values()), *(lease.job for lease in self)}

    def of_owner(self, owner: ProcessId) -> list[Lease]:
        """Return an owner's leases, oldest first."""
        return list(self._owners[owner].leases.values()) if owner in self._owners else []

    # ------------------------------------------------------------------------------- bundles

    def reserve(self, bundle: Bundle, resources: Resources) -> bool:
        """Reserve resources for a bundle, which is not open yet; tell whether they were free."""
        shares = self._node.take(resources)
        if shares is not None:
            self._bundles[bundle] = Pool.of_bundle(resources, self.gpus.names, shares)
        return shares is not None

    def open(self, bundle: Bundle) -> None:
        """From now on leases may be granted out of a bundle."""
        self._bundles[bundle].open = True

    def has_open(self, bundle: Bundle) -> bool:
        """Tell whether leases may be granted out of a bundle."""
        return bundle in self._bundles and self._bundles[bundle].open

    def free_in(self, bundle: Bundle | None) -> Resources:
        """Return what is free on the node, or in a bundle; nothing where that is not reserved here."""
        if bundle is None:
            return self._node.free
        return self._bundles[bundle].free if bundle in self._bundles else {}

    def release(self, bundle: Bundle) -> list[Lease]:
        """A bundle is no more: what it has not lent is free. Return its leases, which hold the rest until they end."""
        pool = self._bundles.pop(bundle)
        leases = [lease for lease in self if lease.bundle == bundle]
        for lease in leases:
            lease.bundle = None
        self._node.free = add(self._node.free, pool.free)
        for index, units in enumerate(pool.gpus.free):
            self._node.gpus.free[index] += units
        return leases

    def reserved(self) -> set[Bundle]:
        """Return the bundles for which something is reserved."""
        return set(self._bundles)

    def count_reserved(self) -> int:
        """Return for how many bundles something is reserved."""
        return len(self._bundles)

    def pool(self, bundle: Bundle | None) -> Pool:
        """Return the node's resources, or those of a bundle; KeyError where it is not reserved here."""
        return self._node if bundle is None else self._bundles[bundle]

    # ------------------------------------------------------------------------------- leases

    def grant(
        self,
        owner: ProcessId,
        job: JobId,
        key: int,
        slot: SlotId,
        resources: Resources,
        *,
        actor: bool = False,
        bundle: Bundle | None = None,
    ) -> Lease | None:
        """Reserve resources for a slot that is not known yet; None where they are not free."""
        shares = self.pool(bundle).take(resources)
        if shares is None:
            return None
        self._last += 1
        lease = Lease(LeaseId(self._last), owner, job, key, slot, resources, shares, actor=actor, bundle=bundle)
        self._leases[lease.number] = lease
        if actor:
            return lease
        record = self._owners.setdefault(owner, _Owner(job))
        record.leases[lease.number] = lease
        record.slots[slot] = None
        if len(record.slots) > MOST_SLOTS:
            del record.slots[next(iter(record.slots))]
        return lease

    def resize(self, lease: Lease, resources: Resources) -> None:
        """Have a lease hold other amounts of what it has: what an actor needs to live, not what it needs to be placed.

        GPUs stay as they were granted.
        """
        kept = {**resources, GPU: lease.resources[GPU]} if lease.resources.get(GPU) else dict(resources)
        pool = self.pool(lease.bundle)
        pool.free = subtract(add(pool.free, lease.held), kept)
        lease.resources = kept

    def block(self, lease: Lease) -> bool:
        """Give the lease's CPU to others while its task waits; tell whether that changed anything."""
        changed = not lease.blocked
        if changed:
            lease.blocked = True
            pool = self.pool(lease.bundle)
            pool.free = add(pool.free, lease.cpu)
        return changed

    def unblock(self, lease: Lease) -> bool:
        """Take the lease's CPU again, at once, even where it is not free; tell whether that changed anything."""
        changed = lease.blocked
        if changed:
            lease.blocked = False
            pool = self.pool(lease.bundle)
            pool.free = subtract(pool.free, lease.cpu)
        return changed

    def end(self, lease: Lease) -> None:
        """End a lease: its resources are free. KeyError if it had ended before."""
        del self._leases[lease.number]
        if not lease.actor:
            del self._owners[lease.owner].leases[lease.number]
            if self._owners[lease.owner].dead:
                self.forget(lease.owner)
        self.pool(lease.bundle).put_back(lease.held, lease.gpus)

    def forget(self, owner: ProcessId) -> None:
        """An owner is dead: drop what is known of it, as soon as its leases have ended."""
        record = self._owners.get(owner)
        if record is not None:
            record.dead = True
            if not record.leases:
                del self._owners[owner]

    def forget_job(self, job: JobId) -> None:
        """A job has ended: forget its owners."""
        for owner in [owner for owner, record in self._owners.items() if record.job == job]:
            self.forget(owner)

    def recall(self, owner: ProcessId, resources: Resources, count: int, bundle: Bundle | None = None) -> list[Lease]:
        """Mark up to ``count`` of an owner's newest leases of these resources as asked back, and return them.

        They are those out of the ``bundle``, or those out of none.
        """
        chosen: list[Lease] = []
        for lease in reversed(self.of_owner(owner)):
            if len(chosen) == count:
                break
            running = lease.process is not None and not (lease.recalled or lease.blocked or lease.over)
            if running and lease.resources == resources and lease.bundle == bundle:
                lease.recalled = True
                chosen.append(lease)
        return chosen

    def summaries(self) -> list[LeaseSummary]:
        """Return how many leases each owner holds, by resources; those of actors do not count as held by anyone."""
        groups: dict[tuple[ProcessId, Bundle | None, tuple[tuple[str, int], ...]], list[Lease]] = {}
        for lease in self._leases.values():
            if lease.actor:
                continue
            groups.setdefault((lease.owner, lease.bundle, tuple(sorted(lease.resources.items()))), []).append(lease)
        return [
            LeaseSummary(
                owner=owner,
                job_id=leases[0].job,
                resources=dict(resources),
                count=len(leases),
                blocked=sum(lease.blocked for lease in leases),
                recalled=sum((lease.recalled or lease.over) and not lease.blocked for lease in leases),
                bundle=bundle,
            )
            for (owner, bundle, resources), leases in groups.items()
        ]

    def held_by_actors(self) -> dict[JobId, Resources]:
        """Return what actors hold, by their jobs; those that hold nothing are left out."""
        held: dict[JobId, Resources] = {}
        for lease in self._leases.values():
            if lease.actor and lease.held:
                held[lease.job] = add(held.get(lease.job, {}), lease.held)
        return held

    def sanity_check(self) -> None:
        """State the invariants."""
        whole = {name: units for name, units in self.total.items() if units}
        self._check_pool(
            self._node, [lease for lease in self if lease.bundle is None], whole, [*self._bundles.values()]
        )
        for bundle, pool in self._bundles.items():
            self._check_pool(pool, [lease for lease in self if lease.bundle == bundle], pool.total, [])
        devices = [UNIT] * len(self.gpus.names)
        for lease in self:
            assert sum(share.units for share in lease.gpus) == lease.resources.get(GPU, 0), "a lease has its GPUs"
            for share in lease.gpus:
                devices[share.index] -= share.units
        pools = [self._node, *self._bundles.values()]
        assert devices == [sum(pool.gpus.free[index] for pool in pools) for index in range(len(devices))]
        assert all(0 <= units <= UNIT for pool in pools for units in pool.gpus.free), "no device is promised twice"
        owned = {lease.number for record in self._owners.values() for lease in record.leases.values()}
        assert owned == {lease.number for lease in self if not lease.actor}
        assert all(record.leases for record in self._owners.values() if record.dead), "the dead are forgotten"

    @staticmethod
    def _check_pool(pool: Pool, leases: Sequence[Lease], free: Resources, bundles: Sequence[Pool]) -> None:
        for bundle in bundles:
            free = subtract(free, bundle.total)
        for lease in leases:
            free = subtract(free, lease.held)
        assert {name: units for name, units in pool.free.items() if units} == free, "what is free and held is all"
        assert all(units >= 0 for name, units in free.items() if name != CPU), "only CPUs are overdrawn"
        assert pool.open or not leases, "no lease comes out of a bundle that is not open"
