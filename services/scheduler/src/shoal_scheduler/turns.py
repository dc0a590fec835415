"""Why demand waits, from what decides: whose turn is before, what a quota forbids, which nodes lack what."""

from __future__ import annotations

from itertools import islice

from shoal_core.protocol.resources import Resources
from shoal_core.protocol.scheduling import MOST_NAMED, JobStanding, NodeShortage, PendingTurn
from shoal_scheduler.cluster import Cluster
from shoal_scheduler.demand import Wanted
from shoal_scheduler.fairness import keeps_room, rank
from shoal_scheduler.jobs import Job
from shoal_scheduler.waiting import Waiting


def turn_of(wanted: Wanted, cluster: Cluster, waiting: Waiting, now: float) -> PendingTurn | None:
    """Return what is before a demand; None where it does not wait for its turn."""
    line = waiting.line_of(wanted)
    if line is None or not len(line.candidates):
        return None
    cluster.follow(line.candidates)
    own = rank(line.job, cluster)
    before = sorted(row for job in waiting.jobs() if (row := (rank(job, cluster), job))[0] < own)
    head = waiting.head_of(line.job)
    goes_first = head is not None and head.wanted is wanted and now >= head.since
    kept = line.candidates.nearest() if goes_first and head is not None and keeps_room(now - head.since) else None
    return PendingTurn(
        goes_first_seconds=now - head.since if goes_first and head is not None else None,
        kept_on=None if kept is None else kept.node_id,
        over_quota=line.job.over_quota(line.candidates.resources) if line.is_over_quota else [],
        job=_standing(line.job, cluster),
        jobs_before=[_standing(job, cluster) for _, job in before[:MOST_NAMED]],
        job_count=len(before),
        priority=wanted.entry.priority,
        before_in_job=waiting.before_in_job(wanted, line),
        nearest=[
            NodeShortage(node_id=node.node_id, lacking=lacking)
            for node in islice(line.candidates, MOST_NAMED)
            if (lacking := _lacking(line.candidates.resources, node.free))
        ],
    )


def _standing(job: Job, cluster: Cluster) -> JobStanding:
    terms = job.terms
    share = job.share(cluster.total)
    return JobStanding(job_id=job.job_id, priority=terms.priority, weight=terms.weight, share=share)


def _lacking(resources: Resources, free: Resources) -> Resources:
    return {name: units - free.get(name, 0) for name, units in resources.items() if free.get(name, 0) < units}
