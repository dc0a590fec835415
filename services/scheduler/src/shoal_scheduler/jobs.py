"""What jobs may claim and what they hold, kept up to date as leases come and go.

A job's *share* is its dominant one: of the resource of which it holds the largest part of the cluster, that part,
divided by the job's weight (dominant resource fairness, Ghodsi and others, 2011). Leases that wait in get hold
everything but their CPU; a lease that is asked back is *going*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from shoal_core.protocol.ids import JobId, ProcessId
from shoal_core.protocol.messages import NO_TERMS, JobTerms, LeaseSummary
from shoal_core.protocol.resources import CPU, Resources

K = TypeVar("K")
Amounts = tuple[tuple[str, int], ...]
SYSTEM_RESOURCES = ("node:", "accelerator_type:")
"""Resources whose names begin so say where something is; a part of them is no claim on the cluster."""


def amounts_of(resources: Resources) -> Amounts:
    """Return resources as a value that can be looked up."""
    return tuple(sorted(resources.items()))


@dataclass(eq=False)
class Job:
    """One job. ``owners`` counts the leases of its owners that do not wait in get, ``held`` those of each shape.

    ``precedence_at`` is when a demand of it was last served that had waited too long, ``served_at`` when any was.
    """

    job_id: JobId
    terms: JobTerms = NO_TERMS
    used: Resources = field(default_factory=dict)
    going: Resources = field(default_factory=dict)
    owners: dict[ProcessId, int] = field(default_factory=dict)
    held: dict[tuple[ProcessId, Amounts], int] = field(default_factory=dict)
    precedence_at: float = float("-inf")
    served_at: float = 0.0

    def share(self, total: Resources, more: Resources | None = None) -> float:
        """Return the job's share, as it were with ``more`` resources."""
        largest = 0.0
        for name, units in self.used.items():
            if more is not None:
                units += more.get(name, 0)
            if name in total and units > largest * total[name]:
                largest = units / total[name]
        for name, units in (more or {}).items():
            if name in total and name not in self.used and units > largest * total[name]:
                largest = units / total[name]
        return largest / self.terms.weight

    def lasting_share(self, total: Resources) -> float:
        """Return the job's share as it will be when all that was asked back has come back."""
        return self.share(total, {name: -units for name, units in self.going.items()})

    def over_quota(self, more: Resources) -> list[str]:
        """Return of which resources the job would hold more than it may."""
        quotas = self.terms.quotas
        if not quotas:
            return []
        return [name for name in more if name in quotas and self.used.get(name, 0) + more[name] > quotas[name]]


class JobTable:
    """All jobs that want or hold anything."""

    def __init__(self) -> None:
        self._jobs: dict[JobId, Job] = {}
        self.recounted: set[ProcessId] = set()
        """Owners whose count of leases has changed; whoever has looked at them empties it."""

    def __iter__(self) -> Iterator[Job]:
        return iter(self._jobs.values())

    def get(self, job_id: JobId) -> Job:
        """Return a job, a new one where it was not known."""
        job = self._jobs.get(job_id)
        if job is None:
            job = self._jobs[job_id] = Job(job_id)
        return job

    def leases_of(self, job_id: JobId, owner: ProcessId) -> int:
        """Return how many leases an owner uses or is about to get."""
        job = self._jobs.get(job_id)
        return job.owners.get(owner, 0) if job is not None else 0

    def count(self, job_id: JobId, owner: ProcessId, resources: Resources, times: int) -> None:
        """Count leases of an owner as held (``times`` below 0: as held no more)."""
        job = self.get(job_id)
        _add(job.used, resources, times)
        self._count_leases(job, owner, resources, times)

    def count_summary(self, lease: LeaseSummary, sign: int) -> None:
        """Count what a node says of an owner's leases (``sign`` -1: what it said before).

        What leases hold that are out of a bundle, its job holds already.
        """
        job = self.get(lease.job_id)
        running = lease.count - lease.blocked
        self._count_leases(job, lease.owner, lease.resources, sign * running)
        if lease.bundle is not None:
            return
        _add(job.used, lease.resources, sign * running)
        if lease.blocked:
            kept = {name: units for name, units in lease.resources.items() if name != CPU}
            _add(job.used, kept, sign * lease.blocked)
        if lease.recalled:
            _add(job.going, lease.resources, sign * lease.recalled)

    def _count_leases(self, job: Job, owner: ProcessId, resources: Resources, times: int) -> None:
        _add(job.owners, {owner: 1}, times)
        _add(job.held, {(owner, amounts_of(resources)): 1}, times)
        self.recounted.add(owner)

    def count_others(self, job_id: JobId, resources: Resources, sign: int) -> None:
        """Count what a job's actors hold, or its bundles reserve, on a node."""
        _add(self.get(job_id).used, resources, sign)

    def forget_idle(self, wanting: set[JobId]) -> None:
        """Forget the jobs that hold nothing and want nothing."""
        self._jobs = {job_id: job for job_id, job in self._jobs.items() if job.used or job.owners or job_id in wanting}


def claims(total: Resources) -> Resources:
    """Return the part of the cluster's resources of which shares are counted."""
    return {name: units for name, units in total.items() if units > 0 and not name.startswith(SYSTEM_RESOURCES)}


def _add(counts: dict[K, int], more: dict[K, int], times: int) -> None:
    """Add to counts, which never store a zero."""
    for name, units in more.items():
        count = counts.get(name, 0) + units * times
        if count:
            counts[name] = count
        else:
            counts.pop(name, None)
