"""What a node shows of itself: resources, leases, processes, objects, and what moves between nodes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from shoal_core.protocol import metrics as names
from shoal_core.protocol.measures import Labels, labels
from shoal_core.protocol.resources import Resources, from_units, is_of_one_node, subtract
from shoal_core.service.metrics import Metrics
from shoal_core.transfer.mover import Mover
from shoal_worker.leases import Lease, LeaseTable
from shoal_worker.node import NodeCore
from shoal_worker.objects.segments import Segment, SegmentState, SegmentTable
from shoal_worker.workers.processes import ProcessState

LEASE_STATES = ("starting", "running", "blocked")
TIERS = ("memory", "copy", "spilled")


def count(metrics: Metrics, core: NodeCore, mover: Mover) -> None:
    """Have a node's numbers read."""
    leases, processes = core.leases, core.processes
    metrics.read(names.RESOURCE_CAPACITY, lambda: by_resource(leases.total, leases.total))
    metrics.read(names.RESOURCE_USED, lambda: by_resource(leases.total, subtract(leases.total, leases.free)))
    metrics.read(names.LEASES, lambda: by_lease_state(leases))
    metrics.read(
        names.WORKER_PROCESSES,
        lambda: _by_label("state", (state.value for state in ProcessState), (p.state.value for p in processes)),
    )
    metrics.read(names.WORKER_PROCESS_STARTS, lambda: processes.started)
    metrics.read(
        names.WORKER_PROCESS_ENDS, lambda: {labels(cause=cause): n for cause, n in processes.ended_by_cause.items()}
    )
    metrics.read(names.DRIVERS, lambda: len(core.drivers))
    metrics.read(names.HOSTED_ACTORS, lambda: len(core.actors))
    metrics.read(names.BUNDLES, lambda: len(core.bundles))
    metrics.read(names.METRIC_SERIES, lambda: core.reported.series)
    metrics.read(names.METRIC_SERIES_DROPPED, lambda: core.reported.dropped)
    metrics.tell(core.reported.families)
    _count_objects(metrics, core)
    _count_transfers(metrics, core, mover)


def _count_objects(metrics: Metrics, core: NodeCore) -> None:
    store, segments, counts = core.store, core.segments, core.store.counts
    metrics.read(names.OBJECTS, lambda: objects_by_tier(segments))
    metrics.read(names.OBJECT_BYTES, lambda: bytes_by_tier(segments))
    metrics.read(names.OBJECT_STORE_CAPACITY, lambda: segments.capacity_bytes)
    metrics.read(names.OBJECT_STORE_USED, lambda: segments.used_bytes)
    metrics.read(names.OBJECT_STORE_WAITING, lambda: len(store.waiting))
    metrics.read(names.SPILLED_OBJECTS, lambda: counts.spilled)
    metrics.read(names.SPILLED_BYTES, lambda: counts.spilled_bytes)
    metrics.read(names.RESTORED_OBJECTS, lambda: counts.returned)
    metrics.read(names.RESTORED_BYTES, lambda: counts.returned_bytes)
    metrics.read(names.SPILLS_REFUSED, lambda: counts.refused)


def _count_transfers(metrics: Metrics, core: NodeCore, mover: Mover) -> None:
    moved = mover.moved
    metrics.read(names.TRANSFER_PULLS, core.memory.copies.under_way)
    metrics.read(names.TRANSFER_LOANS, lambda: len(core.memory.loans))
    metrics.read(names.TRANSFER_SENT, lambda: moved.sent_bytes)
    metrics.read(names.TRANSFER_RECEIVED, lambda: moved.received_bytes)


def by_resource(total: Resources, amounts: Resources) -> dict[Labels, float]:
    """Return amounts of all that a node offers, but for the names of single nodes, of which there is no end."""
    return {labels(resource=name): from_units(amounts.get(name, 0)) for name in total if not is_of_one_node(name)}


def by_lease_state(leases: LeaseTable) -> dict[Labels, float]:
    """Count leases by what they do."""
    return _by_label("state", LEASE_STATES, map(_state_of, leases))


def _state_of(lease: Lease) -> str:
    if lease.process is None:
        return "starting"
    return "blocked" if lease.blocked else "running"


def objects_by_tier(segments: SegmentTable) -> dict[Labels, float]:
    """Count the objects of a node by where they lie."""
    return _by_label("tier", TIERS, (tier for segment in segments if (tier := _tier(segment)) is not None))


def bytes_by_tier(segments: SegmentTable) -> dict[Labels, float]:
    """Sum the sizes of the objects of a node by where they lie."""
    sums = dict.fromkeys(TIERS, 0.0)
    for segment in segments:
        if (tier := _tier(segment)) is not None:
            sums[tier] += segment.size_bytes
    return {labels(tier=tier): size for tier, size in sums.items()}


def _tier(segment: Segment) -> str | None:
    """Return where a segment's object lies; None where there is none (any more)."""
    if segment.state in (SegmentState.SPILLED, SegmentState.RETURNING):
        return "spilled"
    if segment.state in (SegmentState.WRITING, SegmentState.SEALED):
        return "copy" if segment.is_copy else "memory"
    return None


def _by_label(label: str, values: Iterable[str], seen: Iterable[str]) -> dict[Labels, float]:
    """Count how often each value was seen, those included that were not."""
    counted = Counter(seen)
    return {labels(**{label: value}): float(counted[value]) for value in values}
