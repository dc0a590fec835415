"""What people and other services may ask a scheduler: what waits and why, and what there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shoal_core.protocol.messages import PendingDemand, PendingList, ResourceView
from shoal_core.protocol.resources import Resources, add
from shoal_scheduler import gangs
from shoal_scheduler.attempts import WaitingGroup
from shoal_scheduler.demand import Wanted
from shoal_scheduler.policy import NodeView, explain, is_feasible


def pending_list(
    demand: Iterable[Wanted], groups: Iterable[WaitingGroup], nodes: Collection[NodeView], now: float
) -> PendingList:
    """Return all demand that waits, longest first, with the reason. The views are those of nodes and of bundles."""
    rows = [
        PendingDemand(
            owner=wanted.owner,
            job_id=wanted.job_id,
            name=wanted.entry.name,
            resources=wanted.entry.resources,
            wanted=wanted.entry.wanted,
            waiting_seconds=max(0.0, now - wanted.since),
            why=explain(wanted.entry.resources, wanted.entry.strategy, nodes),
            feasible=is_feasible(wanted.entry.resources, wanted.entry.strategy, nodes),
        )
        for wanted in demand
    ]
    rows += [_pending_group(waiting, nodes, now) for waiting in groups]
    return PendingList(pending=sorted(rows, key=lambda row: -row.waiting_seconds))


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
