"""Where a lease should go: functions over a snapshot of the nodes. Ties break by id."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import LeaseSummary
from shoal_core.protocol.resources import Resources, fits, from_units

HALF_FULL = 0.5
SPREAD = "SPREAD"


@dataclass
class NodeView:
    """What a scheduler believes of a node: what it last announced, less what was asked of it since."""

    node_id: NodeId
    total: Resources
    free: Resources
    labels: dict[str, str] = field(default_factory=dict)
    draining: bool = False
    leases: list[LeaseSummary] = field(default_factory=list)
    sequence: int = 0
    heard_at: float = 0.0
    avoid_until: float = 0.0

    def take(self, resources: Resources) -> None:
        """Count resources as used."""
        for name, units in resources.items():
            self.free[name] = self.free.get(name, 0) - units

    def utilisation(self, resources: Resources) -> float:
        """Return how full the node would be with ``resources`` on it, by its fullest wanted resource (0 to 1)."""
        shares = [
            1 - (self.free.get(name, 0) - units) / self.total[name]
            for name, units in resources.items()
            if self.total.get(name)
        ]
        return max(shares, default=0.0)


def choose(resources: Resources, strategy: str, nodes: Iterable[NodeView], now: float) -> NodeView | None:
    """Return the node that should grant a lease, or None if it fits nowhere now.

    DEFAULT packs: the fullest node that stays at most half full, else the emptiest. SPREAD takes the emptiest.
    """
    fitting = [n for n in nodes if not n.draining and n.avoid_until <= now and fits(resources, n.free)]
    if not fitting:
        return None
    ranked = [(node.utilisation(resources), node.node_id, node) for node in fitting]
    if strategy != SPREAD:
        below = [entry for entry in ranked if entry[0] <= HALF_FULL]
        if below:
            return max(below, key=lambda entry: (entry[0], entry[1]))[2]
    return min(ranked)[2]


def is_feasible(resources: Resources, nodes: Iterable[NodeView]) -> bool:
    """Tell whether any node could ever hold these resources."""
    return any(fits(resources, node.total) for node in nodes)


def explain(resources: Resources, nodes: Iterable[NodeView]) -> str:
    """Say in words why a request does not fit anywhere now."""
    nodes = list(nodes)
    if not nodes:
        return "no node is alive"
    if not is_feasible(resources, nodes):
        nearest = min(nodes, key=lambda node: (len(_lacking(resources, node.total)), node.node_id))
        lacking = ", ".join(
            f"{name} {from_units(resources[name]):g} (it has {from_units(nearest.total.get(name, 0)):g})"
            for name in _lacking(resources, nearest.total)
        )
        return f"no node can ever run it; the nearest, node {nearest.node_id}, lacks {lacking}"
    able = [node for node in nodes if fits(resources, node.total)]
    short = sorted({name for node in able for name in _lacking(resources, node.free)})
    if not short:
        return "it fits; the node is being asked"
    used = ", ".join(
        f"{name}: {from_units(sum(n.total.get(name, 0) - n.free.get(name, 0) for n in able)):g} of "
        f"{from_units(sum(n.total.get(name, 0) for n in able)):g} in use"
        for name in short
    )
    return f"waits for {' and '.join(short)} on {len(able)} node{'s' * (len(able) > 1)} that could run it ({used})"


def _lacking(resources: Resources, have: Resources) -> list[str]:
    return [name for name, units in resources.items() if have.get(name, 0) < units]
