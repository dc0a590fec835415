"""What one scheduler knows of a placement group that waits, and of the plan for it that is being carried out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from shoal_core.protocol.groups import GroupDemand
from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId
from shoal_core.protocol.resources import Resources, add
from shoal_scheduler.demand import HELP_SECONDS
from shoal_scheduler.gangs import Plan, missing_bundles

MOST_RETURNS = 3
"""So often a node is told that a plan was given up; after that it finds out by itself."""


@dataclass(frozen=True, slots=True)
class PrepareAsk:
    """The context of a ``PrepareBundles``; ``number`` is below zero, so that no lease's ask has the same."""

    number: int
    node: NodeId
    group: PlacementGroupId
    plan: str


@dataclass(frozen=True, slots=True)
class CommitAsk:
    """The context of a ``CommitGroup``."""

    group: PlacementGroupId
    plan: str


@dataclass(frozen=True, slots=True)
class ReturnAsk:
    """The context of a ``ReturnBundles``; ``often`` is how often it is asked again if it is not answered."""

    node: NodeId
    group: PlacementGroupId
    plan: str
    often: int = MOST_RETURNS


@dataclass(frozen=True, slots=True)
class Unneeded:
    """The context of what is asked of a node and of whose answer nothing depends."""


@dataclass(slots=True)
class UnderWay:
    """A plan that is being carried out. ``needs`` is what it takes of each node, ``asked`` are the asks not answered.

    ``committing``: its commit was asked for, and from then on nothing may be given back.
    """

    name: str
    attempt: int
    places: Plan
    needs: dict[NodeId, Resources]
    asked: dict[NodeId, PrepareAsk] = field(default_factory=dict)
    committing: bool = False


@dataclass(slots=True)
class WaitingGroup:
    """A group that has bundles without a place.

    ``replica`` is the control store to ask for the commit, empty: any. ``since`` is when this was first heard,
    ``opened_at`` when the attempt that is to be made was. ``retry_at`` is when to plan (again), ``tried_at`` when that
    was last in vain, and ``ours`` tells whether it was this scheduler's to plan then; ``avoid`` says until when not to
    ask nodes that refused although they seemed to have the room. Its job would hold more than it may of the resources
    in ``over_quota``. ``together`` is what its bundles ask for that have no place, ``rank`` its place in the order of
    turns, the same for all schedulers.
    """

    demand: GroupDemand
    replica: str
    since: float
    opened_at: float
    stated_at: float
    retry_at: float
    tried_at: float = -math.inf
    under_way: UnderWay | None = None
    failures: int = 0
    avoid: dict[NodeId, float] = field(default_factory=dict)
    noticed: bool = False
    ours: bool = False
    over_quota: list[str] = field(default_factory=list)
    rank: tuple[int, int, float, PlacementGroupId] = field(init=False)
    together: Resources = field(init=False)
    _shape: str = ""

    def __post_init__(self) -> None:
        about = self.demand.description
        self.rank = (-self.demand.terms.priority, -about.priority, self.demand.created_at, about.group_id)
        self.together = {}
        for bundle in missing_bundles(self.demand):
            self.together = add(self.together, bundle)

    @property
    def job_id(self) -> JobId:
        """The group's job."""
        return self.demand.description.job_id

    @property
    def shape(self) -> str:
        """What it asks for: of two groups of one shape, the one fits where the other fits."""
        if not self._shape:
            about = self.demand.description
            self._shape = repr((about.bundles, about.selectors, about.strategy, about.soft_target, self.demand.nodes))
        return self._shape

    @property
    def group(self) -> PlacementGroupId:
        """The group's id."""
        return self.demand.description.group_id

    def is_overdue(self) -> bool:
        """Tell whether the control store has stated it again: whoever should have planned it has not."""
        return self.stated_at - self.opened_at >= HELP_SECONDS
