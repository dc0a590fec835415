"""Nodes, demand and messages with everything filled in, so that a test states only what it is about."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from services.scheduler.tests.simulation import cpus, job_id
from shoal_core.protocol.effects import Effect, WakeAt
from shoal_core.protocol.groups import GroupDemand, GroupDescription, GroupStrategy
from shoal_core.protocol.ids import NodeId, PlacementGroupId, SlotId
from shoal_core.protocol.messages import NO_TERMS, JobTerms, LeaseSummary, NodeAnnouncement
from shoal_core.protocol.placement import DEFAULT, Conditions, Strategy
from shoal_core.protocol.resources import Resources
from shoal_core.protocol.scheduling import Demand, DemandEntry
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.candidates import Candidates, shape_of
from shoal_scheduler.cluster import Cluster
from shoal_scheduler.core import Scheduler
from shoal_scheduler.demand import Wanted
from shoal_scheduler.policy import NodeView


def view(
    number: int,
    total: Resources,
    free: Resources | None = None,
    *,
    draining: bool = False,
    leases: Sequence[LeaseSummary] = (),
    labels: Mapping[str, str] | None = None,
) -> NodeView:
    """Return what a scheduler believes of a node."""
    return NodeView(
        node_id(number),
        total,
        dict(total if free is None else free),
        dict(labels or {}),
        draining=draining,
        leases=list(leases),
    )


def clustered(nodes: Iterable[NodeView]) -> Cluster:
    """Return a cluster of nodes."""
    cluster = Cluster()
    for node in nodes:
        cluster.add(node)
    return cluster


def among(nodes: Iterable[NodeView], resources: Resources, strategy: Strategy = DEFAULT) -> Candidates:
    """Return which of the nodes could hold a lease."""
    return clustered(nodes).candidates(shape_of(resources, strategy))


def summary(
    owner: int,
    count: int,
    resources: Resources | None = None,
    *,
    blocked: int = 0,
    recalled: int = 0,
    job: int = 0,
) -> LeaseSummary:
    """Return what a node says of one owner's leases; its job has its number if none is named."""
    return LeaseSummary(
        owner=process_id(owner, 0),
        job_id=job_id(job or owner),
        resources=resources or cpus(1),
        count=count,
        blocked=blocked,
        recalled=recalled,
    )


def entry(
    slots: Sequence[int],
    resources: Resources | None = None,
    *,
    key: int = 0,
    depth: int = 0,
    priority: int = 0,
    wanted: int | None = None,
) -> DemandEntry:
    """Return what an owner wants for one key."""
    return DemandEntry(
        key=key,
        name=f"f{key}",
        resources=cpus(1) if resources is None else resources,
        wanted=len(slots) if wanted is None else wanted,
        slots=[SlotId(slot) for slot in slots],
        depth=depth,
        priority=priority,
    )


def demand(owner: int, version: int, *entries: DemandEntry) -> Demand:
    """Return all that an owner wants; its job has its number."""
    return Demand(owner=process_id(owner, 0), job_id=job_id(owner), version=version, entries=list(entries))


def waiting(
    owner: int,
    slots: Sequence[int],
    resources: Resources | None = None,
    *,
    served_at: float = 0.0,
    depth: int = 0,
    priority: int = 0,
    job: int = 0,
) -> Wanted:
    """Return open demand as a scheduler keeps it."""
    stated = entry(slots, resources, depth=depth, priority=priority)
    wanted = Wanted(process_id(owner, 0), job_id(job or owner), stated, served_at, served_at, served_at)
    wanted.open = dict.fromkeys(stated.slots, served_at)
    return wanted


def announced(
    number: int,
    sequence: int,
    total: Resources,
    free: Resources | None = None,
    leases: Sequence[LeaseSummary] = (),
) -> NodeAnnouncement:
    """Return a node's announcement."""
    return NodeAnnouncement(
        node_id=NodeId(node_id(number)),
        sequence=sequence,
        total=total,
        free=total if free is None else free,
        leases=list(leases),
    )


def group_demand(
    bundles: Sequence[Resources],
    strategy: GroupStrategy = GroupStrategy.PACK,
    *,
    number: int = 1,
    attempt: int = 0,
    there: Sequence[int | None] = (),
    selectors: Sequence[Conditions] = (),
    target: int | None = None,
    priority: int = 0,
    created_at: float = 0.0,
    terms: JobTerms = NO_TERMS,
) -> GroupDemand:
    """Return what is stated of the ``number``-th group; ``there`` are the numbers of the nodes where bundles lie."""
    about = GroupDescription(
        group_id=PlacementGroupId(f"{number:032x}"),
        job_id=job_id(1),
        owner=process_id(1, 0),
        bundles=list(bundles),
        strategy=strategy,
        selectors=list(selectors),
        soft_target=None if target is None else node_id(target),
        priority=priority,
    )
    nodes = [None if node is None else node_id(node) for node in there or [None] * len(bundles)]
    return GroupDemand(description=about, attempt=attempt, nodes=nodes, created_at=created_at, terms=terms)


def performed(core: Scheduler, effects: list[Effect], now: float) -> list[Effect]:
    """Return effects, and those of the ticks that they want at once."""
    while any(isinstance(effect, WakeAt) and effect.at == now for effect in effects):
        effects = [*(effect for effect in effects if not isinstance(effect, WakeAt)), *core.tick(now)]
    return [effect for effect in effects if not isinstance(effect, WakeAt)]
