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


def find_victims(line: Line, cluster: Cluster, askers: int, now: float) -> list[Victim]:
    """Return whom to ask for leases for what has its turn in a line, and count them as asked back.

    ``askers`` is how many jobs wait: they share what was asked back before.
    """
    job, wanted = line.job, line.turns.first
    resources = line.candidates.resources
    if line.is_over_quota:
        return []
    most = min(1 + len(cluster.nodes) // NODES_FOR_ONE_MORE, len(line.turns) + len(wanted.open) - 1)
    victims: list[Victim] = []
    search = _Search(line, cluster, now)
    expected = _expected(job, cluster, askers)
    rivals = [rival for rival in cluster.jobs if rival is not job and rival.owners]
    while rivals and len(victims) < most:
        rival = max(rivals, key=lambda rival: _claim(rival, cluster.total))
        victim = None
        if _may_ask(job, rival, resources, expected, cluster.total):
            victim = search.first(sorted(rival.owners, key=lambda owner: (-rival.owners[owner], owner)))
        if victim is None:
            rivals.remove(rival)
            continue
        cluster.mark_recalled(victim.node, victim.lease)
        victims.append(victim)
        expected = add(expected, victim.lease.resources)
    return victims or _within_job(line, cluster, search)


def _within_job(line: Line, cluster: Cluster, search: _Search) -> list[Victim]:
    """Ask for a lease of another owner of the same job that holds more."""
    job, wanted = line.job, line.turns.first
    own = job.owners.get(wanted.owner, 0)
    richer = [owner for owner, held in job.owners.items() if owner != wanted.owner and (held > own + 1 or not own)]
    victim = search.first(sorted(richer, key=lambda owner: (-job.owners[owner], owner)))
    if victim is None:
        return []
    cluster.mark_recalled(victim.node, victim.lease)
    return [victim]


def clear(wanted: Wanted, node: NodeView, cluster: Cluster) -> list[Victim]:
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
        lease = max(helpful, key=lambda lease: (*_claim(cluster.jobs.get(lease.job_id), cluster.total), lease.owner))
        cluster.mark_recalled(node, lease)
        victims.append(Victim(node, lease))


def _claim(job: Job, total: Resources) -> tuple[int, float, str]:
    """Return by what jobs are ordered, the first to be asked having the highest."""
    return -job.terms.priority, job.lasting_share(total), job.job_id


def _may_ask(job: Job, rival: Job, resources: Resources, expected: Resources, total: Resources) -> bool:
    if rival.terms.priority != job.terms.priority:
        return rival.terms.priority < job.terms.priority
    has_nothing = not job.used and not expected
    return has_nothing or rival.lasting_share(total) > job.share(total, add(expected, resources))


def _expected(job: Job, cluster: Cluster, askers: int) -> Resources:
    """Return the part of all that was asked back which the job may expect."""
    going: Resources = {}
    for other in cluster.jobs:
        if other is not job and other.going:
            going = add(going, other.going)
    return {name: part for name, units in going.items() if (part := units // max(1, askers))}


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
