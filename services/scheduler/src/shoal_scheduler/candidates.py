"""The nodes that could hold leases of one shape, kept in order: which of them should grant the next. Ties break by id.

A *shape* is what a lease asks of a node: resources and a strategy. Its candidates are the nodes that are ``able``
(``policy``), group by group, each group in order of how full its nodes would be. A node that changes is put in its new
place, and nothing else is looked at again: so a choice takes about as long among a thousand nodes as among ten.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Mapping
from itertools import groupby

from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.placement import Spread, Strategy
from shoal_core.protocol.resources import GPU, Resources, fits
from shoal_scheduler.jobs import Amounts, amounts_of
from shoal_scheduler.ordering import Key, Ordering
from shoal_scheduler.policy import NodeView, PlaceId, preference, spreads, waits_for_first

HALF_FULL = 0.5
NOWHERE: Mapping[NodeId, float] = {}
NO_BYTES: Mapping[NodeId, int] = {}

Shape = tuple[Amounts, Strategy]
_Part = tuple[int, bool, int]
"""The group, whether its nodes are left to who needs GPUs, and how many replicas pack there before this one."""


def shape_of(resources: Resources, strategy: Strategy) -> Shape:
    """Return what a lease asks of a node, as a value that can be looked up."""
    return amounts_of(resources), strategy


class Candidates:
    """The nodes for one shape, or the bundles. ``seen`` is how far the changes of nodes have been followed.

    Each node's key is: whether it lacks room now, how full it would be, how many leases and actors it has, its place.
    """

    __slots__ = (
        "_leaves_gpus",
        "_nearest",
        "_orderings",
        "_packs",
        "_places",
        "resources",
        "seen",
        "shape",
        "strategy",
    )

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        amounts, self.strategy = shape
        self.resources: Resources = dict(amounts)
        self.seen = 0
        self._leaves_gpus = GPU not in self.resources and not isinstance(self.strategy, Spread)
        self._packs = bool(self.resources) and not spreads(self.strategy)
        self._orderings: dict[_Part, Ordering[NodeView]] = {}
        self._places: dict[PlaceId, _Part] = {}
        self._nearest: tuple[Key | None] | None = None
        """The first key of all that may be taken now, if it has been looked for since a node changed."""

    def __len__(self) -> int:
        """How many nodes could ever hold a lease."""
        return len(self._places)

    def __iter__(self) -> Iterator[NodeView]:
        """Yield the places that may be taken now, group by group, those that lack the least first."""
        return (node for _, ordering in self._allowed() for node in ordering)

    def __contains__(self, node: PlaceId) -> bool:
        return node in self._places

    def strangers(self, nodes: Container[PlaceId]) -> list[PlaceId]:
        """Return the candidates that are not among the nodes."""
        return [node_id for node_id in self._places if node_id not in nodes]

    def update(self, node_id: PlaceId, node: NodeView | None) -> None:
        """Put a node where it belongs now; None: there is no such node any more."""
        self._nearest = None
        group = None if node is None else preference(self.resources, self.strategy, node)
        before = self._places.get(node_id)
        if node is None or group is None:
            if before is not None:
                del self._places[node_id]
                self._leave(before, node_id)
            return
        place = (group, self._leaves_gpus and GPU in node.total, node.turn if self._packs else 0)
        if before is not None and before != place:
            self._leave(before, node_id)
        self._places[node_id] = place
        ordering = self._orderings.get(place)
        if ordering is None:
            ordering = self._orderings[place] = Ordering()
            self._orderings = dict(sorted(self._orderings.items()))
        resources = self.resources
        lacks = not fits(resources, node.free)
        ordering.put(node_id, (lacks, node.utilisation(resources), node.load, node_id), node)

    def _leave(self, place: _Part, node: PlaceId) -> None:
        ordering = self._orderings[place]
        ordering.discard(node)
        if not ordering:
            del self._orderings[place]

    def _allowed(self) -> Iterator[tuple[int, Ordering[NodeView]]]:
        """Yield the nodes group by group, in each those without GPUs first where GPUs are left to others."""
        only_first = waits_for_first(self.strategy) and any(group == 0 for group, _, _ in self._orderings)
        for (group, _, _), ordering in self._orderings.items():
            if group == 0 or not only_first:
                yield group, ordering

    @property
    def have_room(self) -> bool:
        """Whether the lease fits anywhere now."""
        nearest = self._nearest_key()
        return nearest is not None and not nearest[0]

    def choose(
        self, now: float, *, near: Mapping[NodeId, int] = NO_BYTES, avoid: Mapping[NodeId, float] = NOWHERE
    ) -> NodeView | None:
        """Return which node should grant a lease, or None if it fits nowhere now.

        That is one of the first group in which there is room: the node where large arguments lie, else by how full
        they are. ``near`` says how many bytes of the arguments lie on which node, ``avoid`` until when not to ask one.
        """
        looked_at: set[int] = set()
        allowed = {group for group, _ in self._allowed()}
        for (group, _), parts in groupby(self._orderings.items(), lambda part: part[0][:2]):
            if group not in allowed:
                continue
            if near and group not in looked_at:
                looked_at.add(group)
                node = self._nearest_to_arguments(group, now, near, avoid)
                if node is not None:
                    return node
            node = self._by_fullness([ordering for _, ordering in parts], now, avoid)
            if node is not None:
                return node
        return None

    def _nearest_to_arguments(
        self, group: int, now: float, near: Mapping[NodeId, int], avoid: Mapping[NodeId, float]
    ) -> NodeView | None:
        for node_id in sorted(near, key=lambda node_id: (-near[node_id], node_id)):
            place = self._places.get(node_id)
            if place is not None and place[0] == group and near[node_id]:
                node = self._orderings[place].find(node_id)
                if fits(self.resources, node.free) and not _is_avoided(node, now, avoid):
                    return node
        return None

    def _by_fullness(
        self, orderings: list[Ordering[NodeView]], now: float, avoid: Mapping[NodeId, float]
    ) -> NodeView | None:
        """Return one of the nodes that have room: those where it is this replica's turn first, then the others.

        To pack is to take the fullest node that stays at most half full, else the emptiest; to spread is to take the
        emptiest. Of equally full ones the one with the most leases is packed further, the one with the fewest is taken
        to spread: what needs no resources goes where the fewest leases are.
        """
        for ordering in orderings if self._packs else ():
            node = _fullest_below_half(ordering, now, avoid)
            if node is not None:
                return node
        for ordering in orderings:
            node = _emptiest(ordering, now, avoid)
            if node is not None:
                return node
        return None

    def nearest(self) -> NodeView | None:
        """Return the node of which the least must come free."""
        nearest = self._nearest_key()
        return None if nearest is None else self._orderings[self._places[nearest[3]]].first

    def _nearest_key(self) -> Key | None:
        """Return the smallest key, which has room if any has; many lines ask for it between two changes."""
        if self._nearest is None:
            self._nearest = (min((ordering.keys[0] for _, ordering in self._allowed()), default=None),)
        return self._nearest[0]


def _fullest_below_half(ordering: Ordering[NodeView], now: float, avoid: Mapping[NodeId, float]) -> NodeView | None:
    keys = ordering.keys
    end = bisect_right(keys, (False, HALF_FULL, math.inf))
    while end:
        start = bisect_left(keys, keys[end - 1][:3])
        for key in keys[start:end]:
            if not _is_avoided(ordering[key], now, avoid):
                return ordering[key]
        end = start
    return None


def _emptiest(ordering: Ordering[NodeView], now: float, avoid: Mapping[NodeId, float]) -> NodeView | None:
    for key in ordering.keys:
        if key[0]:
            return None
        if not _is_avoided(ordering[key], now, avoid):
            return ordering[key]
    return None


def _is_avoided(node: NodeView, now: float, avoid: Mapping[NodeId, float]) -> bool:
    return node.avoid_until > now or (bool(avoid) and avoid.get(node.node_id, now) > now)
