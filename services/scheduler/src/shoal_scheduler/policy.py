"""Where a lease should go: functions over a snapshot of the nodes. Ties break by id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.placement import Spread, Strategy
from shoal_core.protocol.resources import Resources, fits, from_units

HALF_FULL = 0.5


@dataclass
class NodeView:
    """What a scheduler believes of a node: what it last announced or answered, less what is asked of it.

    ``asked`` holds, by the number of the ask, what a request under way would take; no answer is out of date about it
    for long, since each ask is settled when its own answer comes.
    """

    node_id: NodeId
    total: Resources
    free: Resources
    labels: dict[str, str] = field(default_factory=dict)
    draining: bool = False
    leases: list[LeaseSummary] = field(default_factory=list)
    asked: dict[int, Resources] = field(default_factory=dict)
    sequence: int = 0
    heard_at: float = 0.0
    avoid_until: float = 0.0

    def take(self, resources: Resources, times: int = 1) -> None:
        """Count resources as used (``times`` -1: as free again)."""
        for name, units in resources.items():
            self.free[name] = self.free.get(name, 0) - units * times

    def learn(self, free: Resources) -> None:
        """Take in what the node says is free; it does not know yet of what is on its way to it."""
        self.free = dict(free)
        for resources in self.asked.values():
            self.take(resources)

    def mark_recalled(self, lease: LeaseSummary) -> None:
        """Count one more of these leases as asked back, until the node says so itself."""
        marked = lease.model_copy(update={"recalled": lease.recalled + 1})
        self.leases = [marked if other is lease else other for other in self.leases]

    @property
    def load(self) -> int:
        """How many leases the node has granted or is being asked for."""
        return sum(lease.count for lease in self.leases) + len(self.asked)

    def utilisation(self, resources: Resources) -> float:
        """Return how full the node would be with ``resources`` on it, by its fullest wanted resource (1: full)."""
        shares = [
            1 - (self.free.get(name, 0) - units) / self.total[name]
            for name, units in resources.items()
            if self.total.get(name)
        ]
        return max(shares, default=0.0)


def choose(resources: Resources, strategy: Strategy, nodes: Iterable[NodeView], now: float) -> NodeView | None:
    """Return the node that should grant a lease, or None if it fits nowhere now.

    DEFAULT packs: the fullest node that stays at most half full, else the emptiest. SPREAD takes the emptiest. What
    needs no resources goes where the fewest leases are.
    """
    fitting = [n for n in nodes if not n.draining and n.avoid_until <= now and fits(resources, n.free)]
    if not fitting:
        return None
    ranked = [(node.utilisation(resources), node.load, node.node_id, node) for node in fitting]
    if not isinstance(strategy, Spread) and resources:
        below = [entry for entry in ranked if entry[0] <= HALF_FULL]
        if below:
            return max(below, key=lambda entry: entry[:3])[3]
    return min(ranked, key=lambda entry: entry[:3])[3]


def is_feasible(resources: Resources, nodes: Iterable[NodeView]) -> bool:
    """Tell whether any node that stays could ever hold these resources."""
    return any(not node.draining and fits(resources, node.total) for node in nodes)


def nearest(resources: Resources, nodes: Iterable[NodeView]) -> NodeView | None:
    """Return, of the nodes that could ever hold these resources, the one of which the least must come free."""
    able = [node for node in nodes if not node.draining and fits(resources, node.total)]
    return min(able, key=lambda node: (node.utilisation(resources), node.node_id), default=None)


def explain(resources: Resources, nodes: Iterable[NodeView]) -> str:
    """Say in words why a request does not fit anywhere now."""
    alive = list(nodes)
    staying = [node for node in alive if not node.draining]
    if not staying:
        return "all nodes are about to leave" if alive else "no node is alive"
    able = [node for node in staying if fits(resources, node.total)]
    if not able:
        return _explain_infeasible(resources, staying)
    if any(fits(resources, node.free) for node in able):
        return "it fits; a node is being asked"
    short = sorted({name for node in able for name in _lacking(resources, node.free)})
    used = ", ".join(
        f"{name}: {from_units(sum(n.total.get(name, 0) - n.free.get(name, 0) for n in able)):g} of "
        f"{from_units(sum(n.total.get(name, 0) for n in able)):g} in use"
        for name in short
    )
    return f"waits for {' and '.join(short)} on {len(able)} node{'s' * (len(able) > 1)} that could run it ({used})"


def _explain_infeasible(resources: Resources, nodes: list[NodeView]) -> str:
    near = min(nodes, key=lambda node: (len(_lacking(resources, node.total)), node.node_id))
    lacking = ", ".join(
        f"{name} {from_units(resources[name]):g} (it has {from_units(near.total.get(name, 0)):g})"
        for name in _lacking(resources, near.total)
    )
    return f"no node can ever run it; the nearest, node {near.node_id}, lacks {lacking}"


def _lacking(resources: Resources, have: Resources) -> list[str]:
    return [name for name, units in resources.items() if have.get(name, 0) < units]
