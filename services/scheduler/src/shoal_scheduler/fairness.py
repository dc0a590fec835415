"""Whose turn it is, and who should give back: functions over what all owners hold and want.

Slots are placed one by one. The next one belongs, in this order, to

1. demand that got nothing for ``PATIENCE_SECONDS``: whoever waits longest, so that nobody waits for ever;
2. the deepest demand, since whoever is deeper holds up those above;
3. the owner that holds the fewest leases: the equal share comes about by itself, whoever came first;
4. whoever was served longest ago, and then by id.

Impatient demand that fits nowhere also keeps room: as much of the nearest node as it needs counts as used for all that
come after it, deeper demand excepted (perhaps it is what those who hold the node wait for). Otherwise small demand
would take all that comes free, and large demand would wait for ever. Room is kept only every other
``KEEP_SECONDS``, since what is in the way may last for ever itself.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.ids import NodeId, ProcessId, SlotId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.placement import Bundle, Strategy
from shoal_core.protocol.resources import Resources, add, fits
from shoal_scheduler.demand import Wanted
from shoal_scheduler.policy import Groups, NodeView, able, choose, nearest

PATIENCE_SECONDS = 2.0
KEEP_SECONDS = 30.0

Holdings = Counter[ProcessId]
"""How many leases each owner uses or is about to get; those that wait in get do not count."""

_Shape = tuple[tuple[tuple[str, int], ...], Strategy]
Rank = tuple[int, float, int, int, float, str, int]


@dataclass(slots=True)
class Placement:
    """Slots of one demand that one node is to be asked for; the node's view counts them as used already."""

    node: NodeView
    wanted: Wanted
    slots: list[SlotId] = field(default_factory=list)


@dataclass(slots=True)
class Unmet:
    """Demand that fits nowhere now, and the node on which room is kept for it, if any is."""

    wanted: Wanted
    kept: NodeView | None


@dataclass(slots=True)
class Victim:
    """Whom to ask for a lease, and on which node."""

    node: NodeView
    lease: LeaseSummary


@dataclass(order=True, slots=True)
class _Turn:
    rank: Rank
    wanted: Wanted = field(compare=False)
    slots: list[SlotId] = field(compare=False)
    placed: int = field(default=0, compare=False)


def holdings(nodes: Iterable[NodeView]) -> Holdings:
    """Count what the nodes announced."""
    held: Holdings = Counter()
    for node in nodes:
        for view in (node, *node.bundles.values()):
            for lease in view.leases:
                held[lease.owner] += lease.count - lease.blocked
    return held


def plan(
    waiting: Iterable[tuple[Wanted, list[SlotId]]], nodes: Sequence[NodeView], held: Holdings, now: float
) -> tuple[list[Placement], list[Unmet]]:
    """Return which slots to ask which nodes for, and what fits nowhere. ``held`` counts what is placed."""
    plan_round = _Round(nodes, held, now)
    plan_round.run([_Turn(_rank(wanted, 0, held, now), wanted, slots) for wanted, slots in waiting])
    return list(plan_round.placements.values()), plan_round.unmet


class _Round:
    """One round of placing; what it keeps room for is counted as free again at its end."""

    def __init__(self, nodes: Sequence[NodeView], held: Holdings, now: float) -> None:
        self.placements: dict[tuple[NodeId, Bundle | None, ProcessId, int], Placement] = {}
        self.unmet: list[Unmet] = []
        self._nodes = nodes
        self._held = held
        self._now = now
        self._kept: list[tuple[Wanted, NodeView]] = []
        self._full: set[tuple[int, _Shape]] = set()
        self._able: dict[_Shape, Groups] = {}

    def run(self, turns: list[_Turn]) -> None:
        """Place until nothing more fits."""
        heapq.heapify(turns)
        while turns:
            turn = heapq.heappop(turns)
            rank = _rank(turn.wanted, turn.placed, self._held, self._now)
            if rank > turn.rank:  # its owner has got something meanwhile
                turn.rank = rank
                heapq.heappush(turns, turn)
            elif self._place(turn) and turn.slots:
                heapq.heappush(turns, turn)
        for wanted, node in self._kept:
            node.take(wanted.entry.resources, -1)

    def _place(self, turn: _Turn) -> bool:
        """Place one slot, if it fits."""
        wanted = turn.wanted
        node = self._choose(wanted)
        if node is None:
            self.unmet.append(Unmet(wanted, self._keep(turn)))
            return False
        node.take(wanted.entry.resources)
        place = (node.node_id, node.bundle, wanted.owner, wanted.entry.key)
        self.placements.setdefault(place, Placement(node, wanted)).slots.append(turn.slots.pop(0))
        turn.placed += 1
        self._held[wanted.owner] += 1
        return True

    def _choose(self, wanted: Wanted) -> NodeView | None:
        """Return a node for one slot; what did not fit once is not tried again in this round."""
        entry = wanted.entry
        shape = (entry.depth, _shape(wanted))
        if shape in self._full:
            return None
        passed = [(other, node) for other, node in self._kept if other.entry.depth < entry.depth]
        for other, node in passed:
            node.take(other.entry.resources, -1)
        groups = self.able(wanted)
        chosen = choose(entry.resources, entry.strategy, groups, self._now, near=entry.near, avoid=wanted.avoid)
        for other, node in passed:
            node.take(other.entry.resources)
        if chosen is None and not any(until > self._now for until in wanted.avoid.values()):
            self._full.add(shape)
        return chosen

    def able(self, wanted: Wanted) -> Groups:
        """Return the nodes that could ever hold what is wanted; that does not change while a round goes on."""
        shape = _shape(wanted)
        groups = self._able.get(shape)
        if groups is None:
            groups = self._able[shape] = able(wanted.entry.resources, wanted.entry.strategy, self._nodes)
        return groups

    def _keep(self, turn: _Turn) -> NodeView | None:
        """Keep room for demand that has waited for long."""
        wanted = turn.wanted
        waited = self._now - wanted.served_at - PATIENCE_SECONDS
        if turn.placed or wanted.asked or waited < 0 or waited // KEEP_SECONDS % 2:
            return None
        node = nearest(wanted.entry.resources, self.able(wanted))
        if node is not None:
            node.take(wanted.entry.resources)
            self._kept.append((wanted, node))
        return node


def _shape(wanted: Wanted) -> _Shape:
    return tuple(sorted(wanted.entry.resources.items())), wanted.entry.strategy


def _rank(wanted: Wanted, placed: int, held: Holdings, now: float) -> Rank:
    """Return a demand's place in the order of turns; it only rises while a round goes on."""
    identity = (wanted.owner, wanted.entry.key)
    if not placed and not wanted.asked and now - wanted.served_at >= PATIENCE_SECONDS:
        return (0, wanted.served_at, 0, 0, 0.0, *identity)
    return (1, -wanted.entry.depth, held[wanted.owner], placed, wanted.served_at, *identity)


def find_victim(unmet: Unmet, nodes: Groups, held: Holdings, rivals: int, now: float) -> Victim | None:
    """Return whom to ask for a lease for demand that waits: of those with more than an equal share, who holds most.

    ``nodes`` are those that could ever hold it. An owner that holds nothing may ask anyone. ``rivals`` are the owners
    that hold or want something. One lease must be enough to make room, but where room is kept.
    """
    wanted = unmet.wanted
    share = max(1.0, held.total() / max(1, rivals))
    own = held[wanted.owner]
    if own + 1 > share:
        return None
    candidates = [
        (held[lease.owner], lease.owner, node.node_id, Victim(node, lease))
        for group in nodes
        for node in group
        if node.avoid_until <= now
        for lease in node.leases
        if lease.owner != wanted.owner
        and lease.count - lease.blocked - lease.recalled > 0
        and (held[lease.owner] > share or own == 0)
        and _helps(lease.resources, wanted.entry.resources, node, node is unmet.kept)
    ]
    return max(candidates, key=lambda candidate: candidate[:3])[3] if candidates else None


def _helps(returned: Resources, resources: Resources, node: NodeView, kept: bool) -> bool:
    """Tell whether the return of one lease makes room, or, where room is kept, more of what is missing there."""
    if fits(resources, node.free):
        return False
    if fits(resources, add(node.free, returned)):
        return True
    return kept and any(returned.get(name) and node.free.get(name, 0) < units for name, units in resources.items())
