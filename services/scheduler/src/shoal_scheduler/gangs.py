"""Where the bundles of a placement group should go, all at once: functions over a snapshot of the nodes.

Bundles that ask for the same are of one *shape*, and so many of a shape fit on a node; that makes 64 bundles over a
thousand nodes a matter of counting. The shapes that the fewest nodes could hold are placed first, of those the largest.

========================  ==============================================================================================
strategy                  which nodes
========================  ==============================================================================================
PACK                      again and again the node that holds most of what is left; if that ends in a corner, each
                          bundle on the fullest node that has room
SPREAD                    for each bundle the node with the fewest bundles of the group, of those the emptiest
STRICT_PACK               one node for all: the soft target if it has room, else the fullest that has
STRICT_SPREAD             a node for each: the emptiest ones; where that ends in a corner, bundles are moved until each
                          has one (a maximum matching), so that it fails only where it is impossible
========================  ==============================================================================================

What is free is a parameter: with all that nodes have, the same functions tell what could ever be placed, and with what
leases could give back, where room should be kept. Nodes with GPUs are left to those who need them, as long as there are
others. Ties break by id.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.groups import GroupDemand, GroupStrategy
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.placement import Conditions, all_met
from shoal_core.protocol.resources import GPU, Resources, add, fits, from_units, subtract, to_amounts
from shoal_scheduler.candidates import NOWHERE
from shoal_scheduler.policy import NodeView, lacking

Plan = dict[int, NodeId]
FreeOf = Callable[[NodeView], Resources]


def missing_bundles(demand: GroupDemand) -> list[Resources]:
    """Return the bundles that have no place."""
    return [bundle for bundle, node in zip(demand.description.bundles, demand.nodes, strict=True) if node is None]


def free_now(node: NodeView) -> Resources:
    """Return what is free on a node."""
    return node.free


def free_at_best(node: NodeView) -> Resources:
    """Return all that a node has."""
    return node.total


def free_without_leases(node: NodeView) -> Resources:
    """Return what would be free if all leases but those of actors came back, and what is asked for were not granted."""
    return subtract(node.total, node.lasting)


@dataclass(slots=True)
class _Shape:
    """Bundles that ask for the same, and which of the group's they are."""

    resources: Resources
    conditions: Conditions
    indices: list[int] = field(default_factory=list)
    rooms: list[_Room] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Room:
    """A node, and what of it is left while a plan is made. ``bundles`` counts those of the group that lie there."""

    node: NodeView
    free: Resources
    bundles: int = 0

    def take(self, resources: Resources, times: int = 1) -> None:
        self.free = dict(self.free)
        for name, units in resources.items():
            self.free[name] = self.free.get(name, 0) - units * times
        self.bundles += times

    def holds(self, resources: Resources, most: int) -> int:
        """Return how many times this much fits here, up to ``most``."""
        for name, units in resources.items():
            most = min(most, self.free.get(name, 0) // units)
        return max(most, 0)

    def fullness(self, resources: Resources) -> float:
        """Return how full the node is, by the fullest of these resources (1: full)."""
        fullest = 0.0
        for name in resources:
            if total := self.node.total.get(name):
                fullest = max(fullest, 1 - self.free.get(name, 0) / total)
        return fullest


@dataclass(order=True, slots=True)
class _Candidate:
    """A node to be filled next: the rank of its kind, how many bundles it holds (negative), then what breaks ties."""

    kind: tuple[bool, bool]
    minus_count: int
    ties: tuple[float, NodeId]
    room: _Room = field(compare=False)


def place(
    demand: GroupDemand,
    nodes: Iterable[NodeView],
    now: float,
    free_of: FreeOf = free_now,
    avoid: Mapping[NodeId, float] = NOWHERE,
) -> Plan | None:
    """Return a node for each bundle that has none, or None where they do not fit all at once.

    ``avoid`` says until when not to ask a node.
    """
    about = demand.description
    held = Counter(node for node in demand.nodes if node is not None)
    usable = [
        _Room(node, free_of(node), held[node.node_id])
        for node in nodes
        if not node.draining and node.avoid_until <= now and avoid.get(node.node_id, now) <= now
    ]
    shapes = _shapes(demand)
    alone = about.strategy is GroupStrategy.PACK and len(demand.nodes) == 1  # one bundle lies on one node in any case
    if alone or about.strategy is GroupStrategy.STRICT_PACK:
        return _on_one(shapes, usable, held, about.soft_target)
    for shape in shapes:
        shape.rooms = [room for room in usable if _could_hold(room, shape)]
    if not all(shape.rooms for shape in shapes):
        return None
    shapes.sort(key=lambda shape: (len(shape.rooms), -sum(shape.resources.values()), shape.indices))
    match about.strategy:
        case GroupStrategy.STRICT_SPREAD:
            return _apart(shapes, held)
        case GroupStrategy.SPREAD:
            return _spread(shapes)
        case GroupStrategy.PACK:
            return _packed(shapes, usable, held) or _one_by_one(shapes)


def _shapes(demand: GroupDemand) -> list[_Shape]:
    about = demand.description
    shapes: dict[tuple[tuple[tuple[str, int], ...], Conditions], _Shape] = {}
    for index, node in enumerate(demand.nodes):
        if node is None:
            conditions = about.selectors[index] if about.selectors else ()
            resources = about.bundles[index]
            key = (tuple(sorted(resources.items())), conditions)
            shapes.setdefault(key, _Shape(resources, conditions)).indices.append(index)
    return list(shapes.values())


def _could_hold(room: _Room, shape: _Shape) -> bool:
    return fits(shape.resources, room.free) and all_met(shape.conditions, room.node.labels)


# ------------------------------------------------------------------------------- the strategies


def _on_one(
    shapes: Sequence[_Shape], usable: Sequence[_Room], held: Mapping[NodeId, int], target: NodeId | None
) -> Plan | None:
    """Place all bundles on one node; if some lie on one, on that one."""
    together = _together(shapes)
    able = [
        room
        for room in usable
        if (not held or room.node.node_id in held)
        and fits(together, room.free)
        and all(all_met(shape.conditions, room.node.labels) for shape in shapes)
    ]
    if not able:
        return None
    liked = [room for room in able if room.node.node_id == target] or able
    chosen = min(
        liked, key=lambda room: (_is_kept(together, room), -room.fullness(together), room.node.node_id)
    ).node.node_id
    return {index: chosen for shape in shapes for index in shape.indices}


def _together(shapes: Iterable[_Shape]) -> Resources:
    together: Resources = {}
    for shape in shapes:
        together = add(together, {name: units * len(shape.indices) for name, units in shape.resources.items()})
    return together


def _is_kept(resources: Resources, room: _Room) -> bool:
    """Tell whether a node is kept for those who need its GPUs."""
    return GPU in room.node.total and GPU not in resources


def _packed(shapes: Sequence[_Shape], usable: Sequence[_Room], held: Mapping[NodeId, int]) -> Plan | None:
    """Fill one node after the other, each time the one that holds most of what is left.

    What a node holds of it only shrinks, so the counts of before are bounds, and few have to be made again.
    """
    together = _together(shapes)
    left = {id(shape): list(shape.indices) for shape in shapes}
    plan: Plan = {}
    heap = [
        _Candidate(
            (room.node.node_id not in held, _is_kept(together, room)),
            -count,
            (-room.fullness(together), room.node.node_id),
            room,
        )
        for room in usable
        if (count := sum(times for _, times in _filling(room, shapes, left)))
    ]
    heapq.heapify(heap)
    while heap and any(left.values()):
        best = heapq.heappop(heap)
        filling = _filling(best.room, shapes, left)
        count = sum(times for _, times in filling)
        if count < -best.minus_count:
            if count:
                best.minus_count = -count
                heapq.heappush(heap, best)
            continue
        for shape, times in filling:
            for _ in range(times):
                plan[left[id(shape)].pop(0)] = best.room.node.node_id
    return None if any(left.values()) else plan


def _filling(room: _Room, shapes: Sequence[_Shape], left: Mapping[int, list[int]]) -> list[tuple[_Shape, int]]:
    """Return how many bundles of each shape fit on a node together, the hardest shapes first."""
    filling: list[tuple[_Shape, int]] = []
    rest = _Room(room.node, room.free)
    for shape in shapes:
        most = len(left[id(shape)])
        if most and all_met(shape.conditions, room.node.labels) and (times := rest.holds(shape.resources, most)):
            filling.append((shape, times))
            if shape is not shapes[-1]:
                rest.take(shape.resources, times)
    return filling


def _one_by_one(shapes: Sequence[_Shape]) -> Plan | None:
    """Place the hardest bundles first, each on the fullest node that has room."""
    plan: Plan = {}
    for shape in shapes:
        for index in shape.indices:
            roomy = [room for room in shape.rooms if fits(shape.resources, room.free)]
            if not roomy:
                return None
            chosen = min(roomy, key=lambda room: (-room.fullness(shape.resources), room.node.node_id))
            chosen.take(shape.resources)
            plan[index] = chosen.node.node_id
    return plan


def _spread(shapes: Sequence[_Shape]) -> Plan | None:
    """Place each bundle where the fewest of the group lie, then on the emptiest node."""
    plan: Plan = {}
    for shape in shapes:
        heap = [
            (room.bundles, _is_kept(shape.resources, room), room.fullness(shape.resources), number)
            for number, room in enumerate(shape.rooms)
            if fits(shape.resources, room.free)
        ]
        heapq.heapify(heap)
        for index in shape.indices:
            if not heap:
                return None
            _, kept, _, number = heap[0]
            room = shape.rooms[number]
            room.take(shape.resources)
            plan[index] = room.node.node_id
            if fits(shape.resources, room.free):
                heapq.heapreplace(heap, (room.bundles, kept, room.fullness(shape.resources), number))
            else:
                heapq.heappop(heap)
    return plan


def _apart(shapes: Sequence[_Shape], held: Mapping[NodeId, int]) -> Plan | None:
    """Find a node of its own for each bundle: those who come later move those before, if they can lie elsewhere."""
    wishes: dict[int, Sequence[NodeId]] = {}
    for shape in shapes:
        ranked = [
            (_is_kept(shape.resources, room), room.fullness(shape.resources), room.node.node_id)
            for room in shape.rooms
            if room.node.node_id not in held
        ]
        liked = tuple(node for _, _, node in sorted(ranked))
        wishes.update(dict.fromkeys(shape.indices, liked))
    taken: dict[NodeId, int] = {}
    for index in wishes:
        if not _settle(index, wishes, taken):
            return None
    return {index: node for node, index in taken.items()}


def _settle(newcomer: int, wishes: Mapping[int, Sequence[NodeId]], taken: dict[NodeId, int]) -> bool:
    """Give a bundle a node: a free one, else by the shortest chain of bundles that move on to another."""
    came_from: dict[NodeId, int] = {}
    queue = [newcomer]
    for index in queue:
        for node in wishes[index]:
            if node in came_from:
                continue
            came_from[node] = index
            if node not in taken:
                _move(node, came_from, taken)
                return True
            queue.append(taken[node])
    return False


def _move(node: NodeId, came_from: Mapping[NodeId, int], taken: dict[NodeId, int]) -> None:
    """Have each bundle of a chain take the node that it reached, the one before taking what it leaves."""
    before = {index: held for held, index in taken.items()}
    while True:
        index = came_from[node]
        taken[node] = index
        if index not in before:
            return
        node = before[index]


# ------------------------------------------------------------------------------- in words


def is_feasible(demand: GroupDemand, nodes: Iterable[NodeView]) -> bool:
    """Tell whether all bundles that have no node could ever be placed on the nodes that stay."""
    return place(demand, nodes, math.inf, free_at_best) is not None


def explain(demand: GroupDemand, nodes: Iterable[NodeView]) -> str:
    """Say in words why a group waits."""
    alive = list(nodes)
    staying = [node for node in alive if not node.draining]
    if not staying:
        return "all nodes are about to leave" if alive else "no node is alive"
    if not is_feasible(demand, staying):
        return _explain_infeasible(demand, staying)
    if place(demand, staying, math.inf) is not None:
        return "it fits; its nodes are being asked"
    names = sorted(_together(_shapes(demand)))
    used = ", ".join(
        f"{name}: {from_units(sum(node.total.get(name, 0) - node.free.get(name, 0) for node in staying)):g} of "
        f"{from_units(sum(node.total.get(name, 0) for node in staying)):g} in use"
        for name in names
    )
    return f"waits until there is room for {_in_words(demand)} at once ({used})"


def _in_words(demand: GroupDemand) -> str:
    count = demand.nodes.count(None)
    also = "" if count == len(demand.nodes) else f" of its {len(demand.nodes)}"
    return f"{count}{also} bundle{'s' * (bool(also) or count != 1)} ({demand.description.strategy})"


def _explain_infeasible(demand: GroupDemand, nodes: Sequence[NodeView]) -> str:
    shapes = _shapes(demand)
    for shape in shapes:
        met = [node for node in nodes if all_met(shape.conditions, node.labels)]
        where = "that its label selector allows " * bool(shape.conditions)
        what = f"bundle {shape.indices[0]} ({_amounts(shape.resources)})"
        if not met:
            wish = " and ".join(map(str, shape.conditions))
            return f"no node can ever hold {what}: none meets its label selector ({wish})"
        if not any(fits(shape.resources, node.total) for node in met):
            near = min(met, key=lambda node: (len(lacking(shape.resources, node.total)), node.node_id))
            has = _amounts({name: near.total.get(name, 0) for name in lacking(shape.resources, near.total)})
            return f"no node {where}can ever hold {what}; the nearest, node {near.node_id}, has {has}"
    strategy = demand.description.strategy
    if strategy is GroupStrategy.STRICT_PACK:
        return f"no node can ever hold {_in_words(demand)} together ({_amounts(_together(shapes))})"
    able = {
        node.node_id
        for node in nodes
        for shape in shapes
        if fits(shape.resources, node.total) and all_met(shape.conditions, node.labels)
    }
    if strategy is GroupStrategy.STRICT_SPREAD:
        free = len(able - set(demand.nodes))
        return f"{_in_words(demand)} need a node each, and there are {free} that could hold one"
    return f"all nodes together can never hold {_in_words(demand)} ({_amounts(_together(shapes))})"


def _amounts(resources: Resources) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in to_amounts(resources).items()) or "nothing"
