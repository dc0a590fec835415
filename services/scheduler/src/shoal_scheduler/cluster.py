"""All nodes as one scheduler sees them, who holds what there, and which could hold what.

Everything here is kept up to date as nodes announce themselves, are asked and answer; nothing is counted anew for a
decision. What a node has granted counts as held until it has announced it itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import zip_longest

from shoal_core.protocol.ids import JobId, NodeId, ProcessId
from shoal_core.protocol.messages import LeaseSummary, NodeAnnouncement
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import Resources, add
from shoal_scheduler.candidates import Candidates, Shape
from shoal_scheduler.jobs import JobTable, claims
from shoal_scheduler.policy import NodeView, PlaceId, place_in_group, place_of

MOST_SHAPES = 128
"""So many shapes are kept in order; the one that was not asked for the longest time is forgotten first."""


@dataclass(frozen=True, slots=True)
class Granted:
    """Leases that a node has granted and not yet announced; ``sequence`` is of the announcement before."""

    sequence: int
    job_id: JobId
    owner: ProcessId
    resources: Resources
    count: int


@dataclass
class _Told:
    """What is counted of a node beside its leases; ``sequence`` is of its last announcement."""

    sequence: int = 0
    granted: list[Granted] = field(default_factory=list)
    held_otherwise: dict[JobId, Resources] = field(default_factory=dict)
    bundles: dict[PlaceId, NodeView] = field(default_factory=dict)


class Cluster:
    """The nodes, the jobs that hold something there, and the candidates for each shape."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, NodeView] = {}
        self.bundles: dict[PlaceId, NodeView] = {}
        self.jobs = JobTable()
        self.places: dict[ProcessId, dict[PlaceId, None]] = {}
        """On which nodes, and out of which bundles, an owner has leases that could be asked back."""
        self._told: dict[NodeId, _Told] = {}
        self._total: Resources = {}
        self._claims: Resources = {}
        self._journal: list[PlaceId] = []
        self._trimmed = 0
        self._candidates: dict[Shape, Candidates] = {}
        self._ceiling: Resources = {}
        self._ceiling_at = -1

    @property
    def total(self) -> Resources:
        """What all nodes have of everything of which shares are counted."""
        return self._claims

    # ------------------------------------------------------------------------------- nodes

    def announced(self, announcement: NodeAnnouncement, now: float) -> None:
        """Take in what a node says of itself, unless something newer is known."""
        node = self.nodes.get(announcement.node_id)
        if node is None:
            node = NodeView(announcement.node_id, {}, {})
            self.add(node)
        elif announcement.sequence <= node.sequence:
            node.heard_at = now
            return
        if announcement.total != node.total:
            self._count_total(node.total, -1)
            node.total = announcement.total
            self._count_total(node.total, 1)
        self._count_held(node, announcement)
        node.labels = announcement.labels
        node.draining = announcement.draining
        node.actors = announcement.actors
        node.sequence = self._told[node.node_id].sequence = announcement.sequence
        node.heard_at = now
        node.learn(announcement.free)
        self._learn_bundles(node, announcement)

    def find(self, place: PlaceId) -> NodeView | None:
        """Return the view of a node, or of a bundle."""
        return self.bundles.get(place) or self.nodes.get(NodeId(place))

    def views(self) -> list[NodeView]:
        """Return the views of all nodes and of all bundles."""
        return [*self.nodes.values(), *self.bundles.values()]

    def _learn_bundles(self, node: NodeView, announcement: NodeAnnouncement | None) -> None:
        """Take in which bundles a node has out of which leases may come, and which of its leases are out of which."""
        told = self._told[node.node_id]
        before, told.bundles = told.bundles, {}
        by_place: dict[PlaceId, list[LeaseSummary]] = {}
        for lease in announcement.leases if announcement is not None else ():
            if lease.bundle is not None:
                by_place.setdefault(place_of(node.node_id, lease.bundle), []).append(lease)
        for summary in announcement.bundles if announcement is not None else ():
            if summary.committed:
                place = place_in_group(node.node_id, summary.group_id, summary.index)
                view = before.pop(place, None)
                leases = by_place.get(place, [])
                is_known = view is not None and not leases and view.is_idle_with(summary.free, node.draining)
                if view is None:
                    bundle = Bundle(summary.group_id, summary.index)
                    view = NodeView(node.node_id, summary.total, {}, bundle=bundle, journal=self._journal)
                if not is_known:
                    view.draining = node.draining
                    self._count_leases(view, leases)
                    view.learn(summary.free)
                self.bundles[place] = told.bundles[place] = view
        for place, view in before.items():
            self._count_leases(view, [])
            del self.bundles[place]
            view.touch()
            view.journal = None

    def add(self, node: NodeView) -> None:
        """Take in a node and what it holds."""
        node.journal = self._journal
        self.nodes[node.node_id] = node
        self._told[node.node_id] = _Told()
        self._count_total(node.total, 1)
        leases, node.leases = node.leases, []
        self._count_leases(node, leases)
        node.touch()

    def remove(self, node_id: NodeId) -> None:
        """Forget a node and all that is held there."""
        node = self.nodes.pop(node_id, None)
        if node is None:
            return
        self._count_held(node, None)
        self._learn_bundles(node, None)
        self._count_total(node.total, -1)
        del self._told[node_id]
        node.touch()
        node.journal = None

    def _count_total(self, total: Resources, sign: int) -> None:
        for name, units in total.items():
            self._total[name] = self._total.get(name, 0) + sign * units
        self._claims = claims(self._total)

    def _count_held(self, node: NodeView, announcement: NodeAnnouncement | None) -> None:
        """Count what a node announces now, and no more what it announced before."""
        told = self._told[node.node_id]
        held_otherwise = _held_otherwise(announcement) if announcement is not None else {}
        if told.held_otherwise != held_otherwise:
            for job_id, resources in told.held_otherwise.items():
                self.jobs.count_others(job_id, resources, -1)
            node.lasting = {}
            for job_id, resources in held_otherwise.items():
                self.jobs.count_others(job_id, resources, 1)
                node.lasting = add(node.lasting, resources)
            told.held_otherwise = held_otherwise
        kept: list[Granted] = []
        for granted in told.granted:
            if announcement is not None and granted.sequence >= announcement.sequence:
                kept.append(granted)
            else:
                self.jobs.count(granted.job_id, granted.owner, granted.resources, -granted.count)
        told.granted = kept
        leases = announcement.leases if announcement is not None else []
        self._count_leases(node, [lease for lease in leases if lease.bundle is None])

    def _count_leases(self, node: NodeView, leases: list[LeaseSummary]) -> None:
        """Count the leases of a node or bundle; mostly they are as they were, in the same order."""
        if not leases and not node.leases:
            return  # so it is with most bundles
        for before, after in zip_longest(node.leases, leases):
            if before == after:
                continue
            if before is not None:
                self.jobs.count_summary(before, -1)
            if after is not None:
                self.jobs.count_summary(after, 1)
        were, are = _recallable(node.leases), _recallable(leases)
        node.leases = leases
        for owner in are - were:
            self.places.setdefault(owner, {})[node.place] = None
        for owner in were - are:
            del self.places[owner][node.place]
            if not self.places[owner]:
                del self.places[owner]

    # ------------------------------------------------------------------------------- asks

    def settle(
        self, number: int, place: PlaceId, job_id: JobId, owner: ProcessId, resources: Resources, count: int
    ) -> None:
        """An ask is over: what it would have taken counts no more."""
        self.jobs.count(job_id, owner, resources, -count)
        node = self.find(place)
        if node is not None:
            node.settle(number)

    def granted(self, node_id: NodeId, leases: Granted) -> None:
        """Count what a node has granted, until it says so itself."""
        node = self.nodes.get(node_id)
        if node is not None and self._told[node_id].sequence <= leases.sequence and leases.count:
            self.jobs.count(leases.job_id, leases.owner, leases.resources, leases.count)
            self._told[node_id].granted.append(leases)

    def mark_recalled(self, node: NodeView, lease: LeaseSummary, count: int = 1) -> None:
        """Count more of these leases as asked back, until the node says so itself."""
        marked = lease.model_copy(update={"recalled": lease.recalled + count})
        self._count_leases(node, [marked if other is lease else other for other in node.leases])

    # ------------------------------------------------------------------------------- candidates

    def candidates(self, shape: Shape, *, follow: bool = True) -> Candidates:
        """Return the nodes for a shape, in order as they are now; as they were last where they are not ``follow``ed."""
        found = self._candidates.pop(shape, None)
        if found is None:
            found = Candidates(shape)
            found.seen = -1
            if len(self._candidates) >= MOST_SHAPES:
                del self._candidates[next(iter(self._candidates))]
        self._candidates[shape] = found
        if follow:
            self.follow(found)
        return found

    def ceiling(self) -> Resources:
        """Return the most that any node or bundle has free of each resource: what asks for more fits nowhere.

        Where many different things wait, this tells of most of them without looking at a node.
        """
        now = self._trimmed + len(self._journal)
        if now != self._ceiling_at:
            self._ceiling_at, self._ceiling = now, {}
            for view in (*self.nodes.values(), *self.bundles.values()):
                for name, units in view.free.items():
                    if units > self._ceiling.get(name, 0):
                        self._ceiling[name] = units
        return self._ceiling

    def follow(self, candidates: Candidates) -> None:
        """Bring candidates up to date with the nodes that have changed."""
        start = candidates.seen - self._trimmed
        if start < 0:
            views = {view.place: view for view in self.views()}
            for place, view in views.items():
                candidates.update(place, view)
            for place in candidates.strangers(views):
                candidates.update(place, None)
        elif start < len(self._journal):
            for place in dict.fromkeys(self._journal[start:]):
                candidates.update(place, self.find(place))
        candidates.seen = self._trimmed + len(self._journal)
        most = 4 * (len(self.nodes) + len(self.bundles)) + 1024
        if len(self._journal) > most:
            self._trimmed += most // 2
            del self._journal[: most // 2]


def _held_otherwise(announcement: NodeAnnouncement) -> dict[JobId, Resources]:
    """Return what each job holds on a node beside leases: what its actors hold, and what its bundles reserve."""
    held = {job_id: dict(resources) for job_id, resources in announcement.held_by_actors.items()}
    for bundle in announcement.bundles:  # there may be thousands, so that nothing is made for each of them
        together = held.setdefault(bundle.job_id, {})
        for name, units in bundle.total.items():
            together[name] = together.get(name, 0) + units
    return held


def _recallable(leases: list[LeaseSummary]) -> set[ProcessId]:
    """Return whose leases could be asked back."""
    return {lease.owner for lease in leases if lease.count > lease.blocked + lease.recalled}
