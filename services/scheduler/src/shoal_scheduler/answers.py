"""What people and other services may ask a scheduler: what waits and why, and what there is."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from shoal_core.protocol.messages import PendingDemand, PendingList, ResourceView
from shoal_core.protocol.resources import Resources, add
from shoal_scheduler.demand import Wanted
from shoal_scheduler.policy import NodeView, explain, is_feasible


def pending_list(demand: Iterable[Wanted], nodes: Collection[NodeView], now: float) -> PendingList:
    """Return all demand that waits, longest first, with the reason."""
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
    return PendingList(pending=sorted(rows, key=lambda row: -row.waiting_seconds))


def resource_view(nodes: Iterable[NodeView]) -> ResourceView:
    """Return the sum over all nodes that announce themselves."""
    total: Resources = {}
    free: Resources = {}
    for node in nodes:
        total, free = add(total, node.total), add(free, node.free)
    return ResourceView(total=total, free=free)
