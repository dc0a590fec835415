"""Whom to ask for leases back for demand that waits: jobs that hold more than their share, and within a job owners.

A lease is asked back where its job would still hold more than the job that waits will hold with it, so that shares
come to lie within one lease of each other and then stay. Who holds nothing may ask anyone of its priority, and a job of
a higher priority those of lower ones. One lease must be enough to make room.

The head of a job, for which room is kept on a node, has whoever is there asked, for as much as it lacks: it goes before
everybody (``fairness``), and leases that serve endless work end only when they are asked back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shoal_core.protocol.ids import ProcessId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.resources import Resources, add, fits
from shoal_scheduler.cluster import Cluster
from shoal_scheduler.demand import Wanted
from shoal_scheduler.jobs import Job
from shoal_scheduler.policy import NodeView
from shoal_scheduler.waiting import Line

NODES_FOR_ONE_MORE = 16
"""With so many more nodes, one more lease is asked back at a time."""


@dataclass(slots=True)
class Victim:
    """Whom to ask for a lease, and on which node."""

    node: NodeView
    lease: LeaseSummary


class Recall:
    """What is asked back at one time. ``askers`` is how many jobs wait: they share what was asked back before."""

    def __init__(self, cluster: Cluster, askers: int, now: float) -> None:
        self._cluster = cluster
        self._askers = askers
        self._now = now
        self._ranked: list[tuple[tuple[int, float, str], Job]] = []
        """The jobs with leases by their claims, the first to be asked first; empty where they are to be ranked anew."""

    def find_victims(self, line: Line) -> list[Victim]:
        """Return whom to ask for leases for what has its turn in a line, and count them as asked back."""
        job, wanted = line.job, line.turns.first
        if line.is_over_quota:
            return []
        most = min(1 + len(self._cluster.nodes) // NODES_FOR_ONE_MORE, len(line.turns) + len(wanted.open) - 1)
        victims: list[Victim] = []
        search = _Search(line, self._cluster, self._now)
        expected = self._expected(job)
        passed: set[Job] = set()
        while len(victims) < most:
            victim = self._of_rivals(line, expected, search, passed)
            if victim is None:
                break
            self._mark(victim)
            victims.append(victim)
            expected = add(expected, victim.lease.resources)
        return victims or self._within_job(line, search)

    def _of_rivals(self, line: Line, expected: Resources, search: _Search, passed: set[Job]) -> Victim | None:
        """Return a lease of the first job that has one to give; those that have none are ``passed`` over."""
        job, total = line.job, self._cluster.total
        share = job.share(total, add(expected, line.candidates.resources))
        least = (-job.terms.priority, -1.0 if not job.used and not expected else share)
        for claim, rival in self._ranking():
            if claim[:2] <= least:
                break
            if rival is job or rival in passed:
                continue
            victim = search.first(sorted(rival.owners, key=lambda owner: (-rival.owners[owner], owner)))
            if victim is not None:
                return victim
            passed.add(rival)
        return None

    def _within_job(self, line: Line, search: _Search) -> list[Victim]:
        """Ask for a lease of another owner of the same job that holds more."""
        job, wanted = line.job, line.turns.first
        own = job.owners.get(wanted.owner, 0)
        richer = [owner for owner, held in job.owners.items() if owner != wanted.owner and (held > own + 1 or not own)]
        victim = search.first(sorted(richer, key=lambda owner: (-job.owners[owner], owner)))
        if victim is None:
            return []
        self._mark(victim)
        return [victim]

    def clear(self, wanted: Wanted, node: NodeView) -> list[Victim]:
        """Return which leases to ask for on a node where room is kept, and count them as asked back."""
        victims: list[Victim] = []
        resources = wanted.entry.resources
        while True:
            free = node.free
            for lease in node.leases:
                if lease.recalled:
                    free = add(free, {name: units * lease.recalled for name, units in lease.resources.items()})
            lacking = [name for name, units in resources.items() if free.get(name, 0) < units]
            helpful = [
                lease
                for lease in node.leases
                if lease.count > lease.blocked + lease.recalled and any(lease.resources.get(name) for name in lacking)
            ]
            if not helpful:
                return victims
            victims.append(Victim(node, max(helpful, key=self._claim_of_lease)))
            self._mark(victims[-1])

    def _mark(self, victim: Victim) -> None:
        self._cluster.mark_recalled(victim.node, victim.lease)
        self._ranked = []

    def _ranking(self) -> list[tuple[tuple[int, float, str], Job]]:
        if not self._ranked:
            claims = [(self._claim(job), job) for job in self._cluster.jobs if job.owners]
            self._ranked = sorted(claims, key=lambda ranked: ranked[0], reverse=True)
        return self._ranked

    def _claim(self, job: Job) -> tuple[int, float, str]:
        """Return by what jobs are ordered, the first to be asked having the highest."""
        return -job.terms.priority, job.lasting_share(self._cluster.total), job.job_id

    def _claim_of_lease(self, lease: LeaseSummary) -> tuple[int, float, str, ProcessId]:
        return (*self._claim(self._cluster.jobs.get(lease.job_id)), lease.owner)

    def _expected(self, job: Job) -> Resources:
        """Return the part of all that was asked back which the job may expect."""
        going: Resources = {}
        for other in self._cluster.jobs:
            if other is not job and other.going:
                going = add(going, other.going)
        return {name: part for name, units in going.items() if (part := units // max(1, self._askers))}


class _Search:
    """Looks for a lease whose return helps one line."""

    def __init__(self, line: Line, cluster: Cluster, now: float) -> None:
        self._candidates = line.candidates
        self._cluster = cluster
        self._now = now

    def first(self, owners: Iterable[ProcessId]) -> Victim | None:
        """Return the first lease of the first of these owners that has one."""
        return next((victim for owner in owners for victim in self._of(owner)), None)

    def _of(self, owner: ProcessId) -> Iterator[Victim]:
        for place in self._cluster.places.get(owner, ()):
            node = self._cluster.find(place)
            if node is not None and place in self._candidates and node.avoid_until <= self._now:
                for lease in node.leases:
                    runs = lease.owner == owner and lease.count > lease.blocked + lease.recalled
                    if runs and self._helps(node, lease):
                        yield Victim(node, lease)

    def _helps(self, node: NodeView, lease: LeaseSummary) -> bool:
        """Tell whether the return of one lease makes room."""
        resources = self._candidates.resources
        return not fits(resources, node.free) and fits(resources, add(node.free, lease.resources))
