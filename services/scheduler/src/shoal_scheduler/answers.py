"""What people and other services may ask a scheduler: what waits and why, and what there is."""

from __future__ import annotations

from collections.abc import Iterable

from shoal_core.protocol.resources import Resources, add
from shoal_core.protocol.scheduling import MOST_PENDING, GetPending, PendingDemand, PendingList, ResourceView
from shoal_scheduler import gangs
from shoal_scheduler.attempts import WaitingGroup
from shoal_scheduler.candidates import Shape
from shoal_scheduler.cluster import Cluster
from shoal_scheduler.demand import Wanted
from shoal_scheduler.policy import NodeView, explain, is_feasible
from shoal_scheduler.turns import turn_of
from shoal_scheduler.waiting import Waiting


def pending_list(
    request: GetPending,
    demand: Iterable[Wanted],
    groups: Iterable[WaitingGroup],
    cluster: Cluster,
    waiting: Waiting,
    now: float,
) -> PendingList:
    """Return what waits of what is asked about, longest first, with the reason."""
    wanted_rows = [wanted for wanted in demand if not request.about or request.about in _names(wanted)]
    group_rows = [group for group in groups if not request.about or request.about in _group_names(group)]
    rows: list[Wanted | WaitingGroup] = [*wanted_rows, *group_rows]
    rows.sort(key=lambda row: row.since)
    reasons = _Reasons(cluster, waiting, now)
    return PendingList(pending=[reasons.row(row) for row in rows[:MOST_PENDING]], count=len(rows))


def _names(wanted: Wanted) -> tuple[str, ...]:
    actor = wanted.entry.actor
    return (wanted.entry.name, wanted.job_id, wanted.owner, "" if actor is None else actor.actor_id)


def _group_names(waiting: WaitingGroup) -> tuple[str, ...]:
    about = waiting.demand.description
    return (about.name, about.job_id, about.owner, about.group_id)


class _Reasons:
    """Makes the rows of an answer, and looks at each shape once."""

    def __init__(self, cluster: Cluster, waiting: Waiting, now: float) -> None:
        self._cluster = cluster
        self._waiting = waiting
        self._now = now
        self._views = cluster.views()
        self._known: dict[Shape, tuple[str, bool]] = {}

    def row(self, waiting: Wanted | WaitingGroup) -> PendingDemand:
        """Return one row."""
        if isinstance(waiting, WaitingGroup):
            return _pending_group(waiting, self._views, self._now)
        entry = waiting.entry
        why, feasible = self._explained(waiting)
        return PendingDemand(
            owner=waiting.owner,
            key=entry.key,
            job_id=waiting.job_id,
            name=entry.name,
            resources=entry.resources,
            wanted=entry.wanted,
            waiting_seconds=max(0.0, self._now - waiting.since),
            why=why,
            feasible=feasible,
            actor=None if entry.actor is None else entry.actor.actor_id,
            turn=turn_of(waiting, self._cluster, self._waiting, self._now),
        )

    def _explained(self, wanted: Wanted) -> tuple[str, bool]:
        known = self._known.get(wanted.shape)
        if known is None:
            entry = wanted.entry
            known = (
                explain(entry.resources, entry.strategy, self._views),
                is_feasible(entry.resources, entry.strategy, self._views),
            )
            self._known[wanted.shape] = known
        return known


def _pending_group(waiting: WaitingGroup, nodes: Iterable[NodeView], now: float) -> PendingDemand:
    demand, about = waiting.demand, waiting.demand.description
    nodes = [node for node in nodes if node.bundle is None]
    missing = gangs.missing_bundles(demand)
    together: Resources = {}
    for bundle in missing:
        together = add(together, bundle)
    return PendingDemand(
        owner=about.owner,
        job_id=about.job_id,
        name=f"placement group {about.name or about.group_id}",
        group=about.group_id,
        resources=together,
        wanted=len(missing),
        waiting_seconds=max(0.0, now - waiting.since),
        why=_beyond(waiting.over_quota) or gangs.explain(demand, nodes),
        feasible=gangs.is_feasible(demand, nodes),
    )


def _beyond(resources: list[str]) -> str:
    return f"its job would hold more than its quota of {' and '.join(resources)}" if resources else ""


def resource_view(nodes: Iterable[NodeView]) -> ResourceView:
    """Return the sum over all nodes that announce themselves."""
    total: Resources = {}
    free: Resources = {}
    for node in nodes:
        total, free = add(total, node.total), add(free, add(node.free, node.kept))
    return ResourceView(total=total, free=free)
