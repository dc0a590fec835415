"""Where a lease should go: functions over a snapshot of the nodes. Ties break by id.

A strategy says in two steps where a lease goes. ``able`` returns the nodes that could ever hold it, in *groups*: first
come those that are preferred, and the nodes of one group are asked only where no node of the groups before has room.
``choose`` takes one of the first group in which there is room: the node where large arguments lie, else by how full the
nodes are. What no group names is never asked, so a hard constraint cannot be broken by what comes later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import BundleSummary, LeaseSummary
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
from shoal_core.protocol.resources import GPU, Resources, fits, from_units

HALF_FULL = 0.5
NOWHERE: Mapping[NodeId, float] = {}
NO_BYTES: Mapping[NodeId, int] = {}


@dataclass
class NodeView:
    """What a scheduler believes of a node: what it last announced or answered, less what is asked of it.

    ``asked`` holds, by the number of the ask, what a request under way would take; no answer is out of date about it
    for long, since each ask is settled when its own answer comes.

    A bundle of a placement group, out of which leases may come, is a view of its own, in ``bundles`` of its node;
    ``bundle`` says which one it is.
    """

    node_id: NodeId
    total: Resources
    free: Resources
    labels: dict[str, str] = field(default_factory=dict)
    draining: bool = False
    leases: list[LeaseSummary] = field(default_factory=list)
    actors: int = 0
    asked: dict[int, Resources] = field(default_factory=dict)
    sequence: int = 0
    heard_at: float = 0.0
    avoid_until: float = 0.0
    bundle: Bundle | None = None
    bundles: dict[Bundle, NodeView] = field(default_factory=dict)

    def take(self, resources: Resources, times: int = 1) -> None:
        """Count resources as used (``times`` -1: as free again)."""
        for name, units in resources.items():
            self.free[name] = self.free.get(name, 0) - units * times

    def learn(self, free: Resources) -> None:
        """Take in what the node says is free; it does not know yet of what is on its way to it."""
        self.free = dict(free)
        for resources in self.asked.values():
            self.take(resources)

    def learn_bundles(self, bundles: Iterable[BundleSummary], leases: Sequence[LeaseSummary]) -> None:
        """Take in which bundles the node has, and which of its leases are out of which."""
        before, self.bundles = self.bundles, {}
        for summary in bundles:
            bundle = Bundle(summary.group_id, summary.index)
            if summary.committed:
                view = before.get(bundle) or NodeView(self.node_id, summary.total, {}, bundle=bundle)
                view.draining = self.draining
                view.leases = [lease for lease in leases if lease.bundle == bundle]
                view.learn(summary.free)
                self.bundles[bundle] = view
        self.leases = [lease for lease in leases if lease.bundle is None]

    def view(self, bundle: Bundle | None) -> NodeView | None:
        """Return the view of a bundle, or the node's own."""
        return self if bundle is None else self.bundles.get(bundle)

    def mark_recalled(self, lease: LeaseSummary, count: int = 1) -> None:
        """Count more of these leases as asked back, until the node says so itself."""
        marked = lease.model_copy(update={"recalled": lease.recalled + count})
        self.leases = [marked if other is lease else other for other in self.leases]

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


def able(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView]) -> Groups:
    """Return the nodes that stay and could ever hold a lease where its strategy allows it, preferred ones first."""
    if isinstance(strategy, Bundle):
        nodes = [view for node in nodes for bundle, view in node.bundles.items() if _is_meant(bundle, strategy)]
    fitting = [node for node in nodes if not node.draining and fits(resources, node.total)]
    match strategy:
        case Default() | Spread() | Bundle():
            groups = [fitting]
        case NodeAffinity(node=wanted):
            there = [node for node in fitting if node.node_id == wanted]
            elsewhere = [node for node in fitting if node.node_id != wanted]
            # A soft wish waits for its node while that lives, unless told to spill.
            groups = [there, elsewhere if strategy.soft and (strategy.spill or not there) else []]
        case NodeLabels(hard, soft):
            met = [node for node in fitting if all_met(hard, node.labels)]
            liked = [node for node in met if all_met(soft, node.labels)] if soft else []
            groups = [liked, _without(met, liked)]
        case Selected(selectors):
            groups = []
            for selector in selectors:
                group = [node for node in fitting if all_met(selector, node.labels)]
                groups.append(_without(group, [node for before in groups for node in before]))
    return [group for group in groups if group]


def _is_meant(bundle: Bundle, wish: Bundle) -> bool:
    return bundle.group == wish.group and wish.index in (bundle.index, ANY_BUNDLE)


def choose(
    resources: Resources,
    strategy: Strategy,
    groups: Groups,
    now: float,
    *,
    near: Mapping[NodeId, int] = NO_BYTES,
    avoid: Mapping[NodeId, float] = NOWHERE,
) -> NodeView | None:
    """Return which of the nodes that are ``able`` should grant a lease, or None if it fits nowhere now.

    ``near`` says how many bytes of the arguments lie on which node, ``avoid`` until when not to ask one.
    """
    for group in groups:
        fitting = [node for node in group if node.avoid_until <= now and fits(resources, node.free)]
        if avoid:
            fitting = [node for node in fitting if avoid.get(node.node_id, now) <= now]
        if fitting:
            return _nearest_to_arguments(fitting, near) or _by_fullness(resources, strategy, fitting)
    return None


def _nearest_to_arguments(nodes: list[NodeView], near: Mapping[NodeId, int]) -> NodeView | None:
    holding = [node for node in nodes if near.get(node.node_id)] if near else []
    return min(holding, key=lambda node: (-near[node.node_id], node.node_id), default=None)


def _by_fullness(resources: Resources, strategy: Strategy, nodes: list[NodeView]) -> NodeView:
    """Return one of the nodes that have room.

    To pack is to take the fullest node that stays at most half full, else the emptiest; to spread is to take the
    emptiest. What needs no resources goes where the fewest leases are. Nodes with GPUs are left to those who need them,
    as long as there are others.
    """
    if GPU not in resources and not isinstance(strategy, Spread):
        nodes = [node for node in nodes if GPU not in node.total] or nodes
    ranked = [(node.utilisation(resources), node) for node in nodes]
    if resources and not _spreads(strategy):
        below = [full for full, _ in ranked if full <= HALF_FULL]
        if below:
            fullest = max(below)
            equal = [node for full, node in ranked if full == fullest]
            return min(equal, key=lambda node: (-node.load, node.node_id))
    emptiest = min(full for full, _ in ranked)
    return min((node for full, node in ranked if full == emptiest), key=lambda node: (node.load, node.node_id))


def _spreads(strategy: Strategy) -> bool:
    return isinstance(strategy, Spread) or (isinstance(strategy, Selected) and strategy.spread)


def _without(nodes: list[NodeView], others: Sequence[NodeView]) -> list[NodeView]:
    taken = {node.node_id for node in others}
    return [node for node in nodes if node.node_id not in taken]


def is_feasible(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView]) -> bool:
    """Tell whether any node that stays could ever hold these resources where the strategy allows it."""
    return bool(able(resources, strategy, nodes))


def nearest(resources: Resources, groups: Groups) -> NodeView | None:
    """Return, of the nodes that are ``able``, the one of which the least must come free."""
    nodes = [node for group in groups for node in group]
    return min(nodes, key=lambda node: (node.utilisation(resources), node.node_id), default=None)


# ------------------------------------------------------------------------------- in words


def explain(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView]) -> str:
    """Say in words why a request does not fit anywhere now."""
    alive = list(nodes)
    staying = [node for node in alive if not node.draining]
    if not staying:
        return "all nodes are about to leave" if alive else "no node is alive"
    candidates = [node for group in able(resources, strategy, staying) for node in group]
    if not candidates:
        return _explain_infeasible(resources, strategy, staying)
    if any(fits(resources, node.free) for node in candidates):
        return "it fits; a node is being asked"
    short = sorted({name for node in candidates for name in _lacking(resources, node.free)})
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
    near = min(allowed or nodes, key=lambda node: (len(_lacking(resources, node.total)), node.node_id))
    lacking = ", ".join(
        f"{name} {from_units(resources[name]):g} (it has {from_units(near.total.get(name, 0)):g})"
        for name in _lacking(resources, near.total)
    )
    if isinstance(strategy, Bundle):
        return f"{in_words(strategy)} can never hold it: the nearest, on node {near.node_id}, lacks {lacking}"
    if allowed:
        return f"no node can ever run it; the nearest, node {near.node_id}, lacks {lacking}"
    wish = in_words(strategy)
    if isinstance(strategy, NodeAffinity):
        return f"it wants {wish}, which is not in the cluster or is about to leave"
    labels = ", ".join(f"{name}={value}" for name, value in sorted(near.labels.items())) or "no labels"
    also = f" and lacks {lacking}" if lacking else ""
    return f"no node can ever run it: it wants {wish}; the nearest, node {near.node_id}, has {labels}{also}"


def _lacking(resources: Resources, have: Resources) -> list[str]:
    return [name for name, units in resources.items() if have.get(name, 0) < units]
