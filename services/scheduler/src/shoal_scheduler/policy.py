"""Where a lease may go: functions over a snapshot of the nodes.

A strategy puts the nodes that could ever hold a lease in *groups*: first come those that are preferred, and the nodes
of one group are asked only where no node of the groups before has room. What no group names is never asked, so a hard
constraint cannot be broken by what comes later. Which node of a group is asked is for ``candidates``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal_core.protocol.ids import NodeId, PlacementGroupId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.placement import (
    ANY_BUNDLE,
    Bundle,
    Default,
    NodeAffinity,
    NodeLabels,
    Selected,
    Spread,
    Strategy,
    all_met,
    in_words,
)
from shoal_core.protocol.resources import Resources, add, fits, from_units, subtract

PlaceId = str
"""A node, or a bundle on a node."""


def place_of(node: NodeId, bundle: Bundle | None) -> PlaceId:
    """Return the place that is a node itself, or a bundle there."""
    return node if bundle is None else place_in_group(node, bundle.group, bundle.index)


def place_in_group(node: NodeId, group: PlacementGroupId, index: int) -> PlaceId:
    """Return the place that is a bundle of a group on a node."""
    return f"{node}/{group}/{index}"


@dataclass
class NodeView:
    """What a scheduler believes of a node: what it last announced or answered, less what is asked of it.

    ``asked`` holds, by the number of the ask, what a request under way would take, and ``promised`` what all of them
    would; no answer is out of date about it for long, since each ask is settled when its own answer comes. ``lasting``
    is what cannot be asked back: what actors hold and bundles reserve; ``kept`` is what is kept for groups that wait.
    What changes where a lease should go is noted in ``journal``, where there is one: by the methods here, and by
    ``touch`` for what is set from outside.

    ``turn``: so many replicas pack here before this one. It is different for each of them, so that they do not all take
    the same node: not those that each takes first, nor those that it goes to when these are full.

    A bundle of a placement group, out of which leases may come as out of a node, is a view of its own; ``bundle`` says
    which one it is.
    """

    node_id: NodeId
    total: Resources
    free: Resources
    labels: dict[str, str] = field(default_factory=dict)
    draining: bool = False
    leases: list[LeaseSummary] = field(default_factory=list)
    actors: int = 0
    turn: int = 0
    lasting: Resources = field(default_factory=dict)
    asked: dict[int, Resources] = field(default_factory=dict)
    promised: Resources = field(default_factory=dict)
    kept: Resources = field(default_factory=dict)
    sequence: int = 0
    heard_at: float = 0.0
    avoid_until: float = 0.0
    journal: list[PlaceId] | None = None
    bundle: Bundle | None = None
    place: PlaceId = field(init=False)
    """What tells this from all other places that leases can come out of."""

    def __post_init__(self) -> None:
        self.place = place_of(self.node_id, self.bundle)

    def touch(self) -> None:
        """Note that the node has changed."""
        if self.journal is not None:
            self.journal.append(self.place)

    def take(self, resources: Resources, times: int = 1) -> None:
        """Count resources as used (``times`` -1: as free again)."""
        for name, units in resources.items():
            self.free[name] = self.free.get(name, 0) - units * times
        self.touch()

    def learn(self, free: Resources) -> None:
        """Take in what the node says is free; it does not know yet of what is on its way to it."""
        self.free = dict(free)
        self.take(self.promised)
        self.take(self.kept)

    def is_idle_with(self, free: Resources, draining: bool) -> bool:
        """Tell whether nothing is out or on its way, and all this is known: mostly so of a bundle."""
        return self.free == free and self.draining == draining and not (self.leases or self.promised or self.kept)

    def promise(self, number: int, resources: Resources) -> None:
        """Note what a request under way would take, which is counted as used already."""
        self.asked[number] = resources
        self.promised = add(self.promised, resources)
        self.touch()

    def settle(self, number: int) -> None:
        """A request is over: what it would have taken counts no more."""
        resources = self.asked.pop(number, None)
        if resources is not None:
            self.promised = subtract(self.promised, resources)
            self.take(resources, -1)

    def keep(self, resources: Resources, times: int = 1) -> None:
        """Count resources as used until they are not kept any more (``times`` -1), whatever the node says is free."""
        self.kept = add(self.kept, {name: units * times for name, units in resources.items()})
        self.take(resources, times)

    @property
    def load(self) -> int:
        """How many leases and actors the node has, or is being asked for."""
        return sum(lease.count for lease in self.leases) + self.actors + len(self.asked)

    def utilisation(self, resources: Resources) -> float:
        """Return how full the node would be with ``resources`` on it, by its fullest wanted resource (1: full)."""
        fullest = 0.0
        for name, units in resources.items():
            if total := self.total.get(name):
                fullest = max(fullest, 1 - (self.free.get(name, 0) - units) / total)
        return fullest


Groups = list[list[NodeView]]


def preference(resources: Resources, strategy: Strategy, node: NodeView) -> int | None:
    """Return to which group a node belongs for a lease: 0 is the most preferred; None where it can never go there."""
    if node.draining or not fits(resources, node.total) or (node.bundle is None) is isinstance(strategy, Bundle):
        return None
    match strategy:
        case Default() | Spread():
            return 0
        case NodeAffinity(node=wanted, soft=soft):
            return 0 if node.node_id == wanted else 1 if soft else None
        case NodeLabels(hard, soft_labels):
            if not all_met(hard, node.labels):
                return None
            return 0 if all_met(soft_labels, node.labels) else 1
        case Selected(selectors):
            return next((i for i, selector in enumerate(selectors) if all_met(selector, node.labels)), None)
        case Bundle(group, index):
            assert node.bundle is not None
            return 0 if node.bundle.group == group and index in (node.bundle.index, ANY_BUNDLE) else None


def waits_for_first(strategy: Strategy) -> bool:
    """Tell whether nodes of later groups are no choice while the first group has any: a soft wish for a node."""
    return isinstance(strategy, NodeAffinity) and not strategy.spill


def able(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView]) -> Groups:
    """Return the nodes that stay and could ever hold a lease where its strategy allows it, preferred ones first."""
    groups: dict[int, list[NodeView]] = {}
    for node in nodes:
        group = preference(resources, strategy, node)
        if group is not None:
            groups.setdefault(group, []).append(node)
    if 0 in groups and waits_for_first(strategy):
        return [groups[0]]
    return [groups[group] for group in sorted(groups)]


def spreads(strategy: Strategy) -> bool:
    """Tell whether leases go to the emptiest node, and are not packed."""
    return isinstance(strategy, Spread) or (isinstance(strategy, Selected) and strategy.spread)


def is_feasible(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView]) -> bool:
    """Tell whether any node that stays could ever hold these resources where the strategy allows it."""
    return bool(able(resources, strategy, nodes))


# ------------------------------------------------------------------------------- in words


def explain(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView]) -> str:
    """Say in words why a request does not fit anywhere now."""
    alive = list(nodes)  # their bundles among them
    staying = [node for node in alive if not node.draining]
    if not staying:
        return "all nodes are about to leave" if alive else "no node is alive"
    candidates = [node for group in able(resources, strategy, staying) for node in group]
    if not candidates:
        return _explain_infeasible(resources, strategy, staying)
    if any(fits(resources, node.free) for node in candidates):
        return "it fits; a node is being asked"
    short = sorted({name for node in candidates for name in lacking(resources, node.free)})
    used = ", ".join(
        f"{name}: {from_units(sum(n.total.get(name, 0) - n.free.get(name, 0) for n in candidates)):g} of "
        f"{from_units(sum(n.total.get(name, 0) for n in candidates)):g} in use"
        for name in short
    )
    plural = "s" * (len(candidates) > 1)
    return f"waits for {' and '.join(short)} on {len(candidates)} node{plural} that could run it ({used})"


def _explain_infeasible(resources: Resources, strategy: Strategy, nodes: list[NodeView]) -> str:
    """Say what is wrong with the nearest node: of those that the strategy allows, if there are any, else of all."""
    allowed = [node for group in able({}, strategy, nodes) for node in group]
    if isinstance(strategy, Bundle) and not allowed:
        return f"it waits until {in_words(strategy)} has a place"
    near = min(
        allowed or (node for node in nodes if node.bundle is None),
        key=lambda node: (len(lacking(resources, node.total)), node.node_id),
    )
    lacks = ", ".join(
        f"{name} {from_units(resources[name]):g} (it has {from_units(near.total.get(name, 0)):g})"
        for name in lacking(resources, near.total)
    )
    if isinstance(strategy, Bundle):
        return f"{in_words(strategy)} can never hold it: the nearest, on node {near.node_id}, lacks {lacks}"
    if allowed:
        return f"no node can ever run it; the nearest, node {near.node_id}, lacks {lacks}"
    wish = in_words(strategy)
    if isinstance(strategy, NodeAffinity):
        return f"it wants {wish}, which is not in the cluster or is about to leave"
    labels = ", ".join(f"{name}={value}" for name, value in sorted(near.labels.items())) or "no labels"
    also = f" and lacks {lacks}" if lacks else ""
    return f"no node can ever run it: it wants {wish}; the nearest, node {near.node_id}, has {labels}{also}"


def lacking(resources: Resources, have: Resources) -> list[str]:
    """Return of which resources there is less than wanted."""
    return [name for name, units in resources.items() if have.get(name, 0) < units]
