"""Whom to ask for leases back for demand that waits: jobs that hold more than their share, and within a job owners.

A lease is asked back where its job would still hold more than the job that waits will hold with it, so that shares
come to lie within one lease of each other and then stay. Who holds nothing may ask anyone. Jobs of a lower priority are
asked before; jobs of a higher one only by the head of a job that holds nothing. One lease must be enough to make room,
but where room is kept.
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


def find_victims(
    line: Line, wanted: Wanted, cluster: Cluster, askers: int, now: float, *, kept: NodeView | None, is_head: bool
) -> list[Victim]:
    """Return whom to ask for leases for a line of which ``wanted`` comes first, and count them as asked back.

    ``askers`` is how many jobs wait: they share what was asked back before. Where room is kept, it is on ``kept``.
    """
    job = line.job
    resources = wanted.entry.resources
    if line.is_over_quota:
        return []
    most = min(1 + len(cluster.nodes) // NODES_FOR_ONE_MORE, len(line.turns) + len(wanted.open) - 1)
    victims: list[Victim] = []
    search = _Search(line, resources, cluster, kept, now)
    expected = _expected(job, cluster, askers)
    rivals = [rival for rival in cluster.jobs if rival is not job and rival.owners]
    while rivals and len(victims) < most:
        after = job.share(cluster.total, add(expected, resources))
        has_nothing = not job.used and not expected
        rival = max(rivals, key=lambda rival: _claim(rival, cluster.total))
        victim = None
        if _may_ask(job, rival, after, has_nothing, is_head, cluster.total):
            victim = search.first(sorted(rival.owners, key=lambda owner: (-rival.owners[owner], owner)))
        if victim is None:
            rivals.remove(rival)
            continue
        cluster.mark_recalled(victim.node, victim.lease)
        victims.append(victim)
        expected = add(expected, victim.lease.resources)
    if not victims:
        own = job.owners.get(wanted.owner, 0)
        richer = [owner for owner, held in job.owners.items() if owner != wanted.owner and (held > own + 1 or not own)]
        victim = search.first(sorted(richer, key=lambda owner: (-job.owners[owner], owner)))
        if victim is not None:
            cluster.mark_recalled(victim.node, victim.lease)
            victims.append(victim)
    return victims


def _claim(job: Job, total: Resources) -> tuple[int, float, str]:
    """Return by what jobs are ordered, the first to be asked having the highest."""
    return -job.terms.priority, job.lasting_share(total), job.job_id


def _may_ask(job: Job, rival: Job, after: float, has_nothing: bool, is_head: bool, total: Resources) -> bool:
    if rival.terms.priority != job.terms.priority:
        return rival.terms.priority < job.terms.priority or (is_head and has_nothing)
    return has_nothing or rival.lasting_share(total) > after


def _expected(job: Job, cluster: Cluster, askers: int) -> Resources:
    """Return the part of all that was asked back which the job may expect."""
    going: Resources = {}
    for other in cluster.jobs:
        if other is not job and other.going:
            going = add(going, other.going)
    return {name: part for name, units in going.items() if (part := units // max(1, askers))}


class _Search:
    """Looks for a lease whose return helps one line."""

    def __init__(self, line: Line, resources: Resources, cluster: Cluster, kept: NodeView | None, now: float) -> None:
        self._line = line
        self._resources = resources
        self._cluster = cluster
        self._kept = kept
        self._now = now

    def first(self, owners: Iterable[ProcessId]) -> Victim | None:
        """Return the first lease of the first of these owners that has one."""
        return next((victim for owner in owners for victim in self._of(owner)), None)

    def _of(self, owner: ProcessId) -> Iterator[Victim]:
        for place in self._cluster.places.get(owner, ()):
            node = self._cluster.find(place)
            if node is not None and place in self._line.candidates and node.avoid_until <= self._now:
                for lease in node.leases:
                    if (
                        lease.owner == owner
                        and lease.count > lease.blocked + lease.recalled
                        and self._helps(node, lease)
                    ):
                        yield Victim(node, lease)

    def _helps(self, node: NodeView, lease: LeaseSummary) -> bool:
        """Tell whether the return of one lease makes room, or, where room is kept, more of what is missing there."""
        resources = self._resources
        if fits(resources, node.free):
            return False
        if fits(resources, add(node.free, lease.resources)):
            return True
        return node is self._kept and any(
            lease.resources.get(name) and node.free.get(name, 0) < units for name, units in resources.items()
        )
