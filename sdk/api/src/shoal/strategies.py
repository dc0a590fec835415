"""Where tasks and actors may be placed: what the option ``scheduling_strategy`` takes beside two words.

Programs import them from ``shoal.util.scheduling_strategies``. Each class raises ``TypeError`` or ``ValueError`` where
it is made of something wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.placement_groups import PlacementGroup
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.labels import check_key, check_value
from shoal_core.protocol.placement import (
    ANY_BUNDLE,
    Condition,
    Conditions,
    NodeAffinity,
    NodeLabels,
    Operator,
    Strategy,
)


class NodeAffinitySchedulingStrategy:
    """Run on one node, as long as it lives and could ever hold the task or actor.

    Where it does not, a hard affinity fails with ``TaskUnschedulableError`` or ``ActorUnschedulableError``, and one
    that is ``soft`` goes to another node. ``_spill_on_unavailable``: a soft one goes to another node also while this
    one has no room. ``_fail_on_unavailable``: it fails also while this one has no room.
    """

    def __init__(
        self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False
    ) -> None:
        text = node_id if isinstance(node_id, str) else _hex(node_id)
        if not text or set(text) - set("0123456789abcdef"):
            raise ValueError(f"node_id must be the lower-case hex of a node's id, got {node_id!r}.")
        for name, value in (
            ("soft", soft),
            ("_spill_on_unavailable", _spill_on_unavailable),
            ("_fail_on_unavailable", _fail_on_unavailable),
        ):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}.")
        if _spill_on_unavailable and not soft:
            raise ValueError("_spill_on_unavailable needs soft=True: a hard affinity never goes elsewhere.")
        if _fail_on_unavailable and soft:
            raise ValueError("_fail_on_unavailable needs soft=False: a soft affinity does not fail.")
        self.node_id = text
        self.soft = soft
        self._spill_on_unavailable = _spill_on_unavailable
        self._fail_on_unavailable = _fail_on_unavailable

    def to_protocol(self) -> Strategy:
        """Return it as it travels."""
        return NodeAffinity(NodeId(self.node_id), self.soft, self._spill_on_unavailable, self._fail_on_unavailable)

    def __repr__(self) -> str:
        return f"NodeAffinitySchedulingStrategy({self.node_id!r}, soft={self.soft})"


class _Match:
    """What one label of a node has to be like."""

    operator: Operator

    def __init__(self) -> None:
        self.values: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.values == self.values

    def __hash__(self) -> int:
        return hash((type(self), self.values))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.values))})"


class _OfValues(_Match):
    """A match that lists values."""

    def __init__(self, *values: str) -> None:
        name = type(self).__name__
        if not values:
            raise ValueError(f"{name}() needs at least one value: {name}('a', 'b').")
        for value in values:
            if not isinstance(value, str):
                raise TypeError(f"The values of {name}() must be of type str, got {value!r}.")
            check_value(value)
        self.values = values


class In(_OfValues):
    """The node has the label, with one of these values."""

    operator = Operator.IN


class NotIn(_OfValues):
    """The node has not the label, or with another value."""

    operator = Operator.NOT_IN


class Exists(_Match):
    """The node has the label."""

    operator = Operator.EXISTS


class DoesNotExist(_Match):
    """The node has not the label."""

    operator = Operator.DOES_NOT_EXIST


class NodeLabelSchedulingStrategy:
    """Run on a node whose labels meet ``hard``, preferably one that meets ``soft`` too.

    Both are dicts of label keys to ``In``, ``NotIn``, ``Exists`` and ``DoesNotExist``; not both may be empty. While no
    node meets ``hard`` the task or actor waits.
    """

    def __init__(self, hard: Mapping[str, _Match] | None, *, soft: Mapping[str, _Match] | None = None) -> None:
        self.hard = _checked("hard", hard)
        self.soft = _checked("soft", soft)
        if not self.hard and not self.soft:
            raise ValueError("hard and soft cannot both be empty; leave the strategy out instead.")

    def to_protocol(self) -> Strategy:
        """Return it as it travels."""
        return NodeLabels(_conditions(self.hard), _conditions(self.soft))

    def __repr__(self) -> str:
        return f"NodeLabelSchedulingStrategy({self.hard!r}, soft={self.soft!r})"


class PlacementGroupSchedulingStrategy:
    """Run in a bundle of a placement group: the one of this index (from 0), or with -1 any that has room.

    ``placement_group_capture_child_tasks``: what the task or actor submits is placed in the group too, unless it says
    otherwise; None: if that is so where this is submitted. ``placement_group=None`` is how a child says otherwise.
    """

    def __init__(
        self,
        placement_group: PlacementGroup | None,
        placement_group_bundle_index: int = ANY_BUNDLE,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        check_in_group(placement_group, placement_group_bundle_index, placement_group_capture_child_tasks)
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks

    def __repr__(self) -> str:
        return (
            f"PlacementGroupSchedulingStrategy({self.placement_group!r}, {self.placement_group_bundle_index}, "
            f"{self.placement_group_capture_child_tasks})"
        )


def check_in_group(group: Any, index: Any, captures: Any) -> None:
    """Check what is said of a placement group, without asking for its bundles; None stands for not said."""
    if group is not None and not isinstance(group, PlacementGroup):
        raise TypeError(f"placement_group must be a PlacementGroup or None, got {type(group).__name__}.")
    if isinstance(index, bool) or not isinstance(index, int):
        raise TypeError(f"placement_group_bundle_index must be an int, got {type(index).__name__}.")
    if index < ANY_BUNDLE:
        raise ValueError(f"placement_group_bundle_index must be at least -1, which is any bundle, got {index}.")
    if captures is not None and not isinstance(captures, bool):
        raise TypeError(f"placement_group_capture_child_tasks must be a bool, got {type(captures).__name__}.")


SchedulingStrategyT = (
    str | NodeAffinitySchedulingStrategy | NodeLabelSchedulingStrategy | PlacementGroupSchedulingStrategy | None
)
"""What the option ``scheduling_strategy`` takes."""


def _hex(node_id: Any) -> str:
    try:
        return str(node_id.hex())
    except AttributeError:
        raise TypeError(f"node_id must be a str, got {type(node_id).__name__}.") from None


def _checked(name: str, expressions: Any) -> dict[str, _Match]:
    if expressions is None:
        return {}
    if not isinstance(expressions, Mapping):
        raise TypeError(f"{name} must be a dict of label keys to expressions, got {type(expressions).__name__}.")
    for key, match in expressions.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} must have keys of type str, got {key!r}.")
        check_key(key)
        if not isinstance(match, In | NotIn | Exists | DoesNotExist):
            raise ValueError(f"{name}[{key!r}] must be In, NotIn, Exists or DoesNotExist, got {match!r}.")
    return dict(expressions)


def _conditions(expressions: Mapping[str, _Match]) -> Conditions:
    return tuple(Condition(key, match.operator, match.values) for key, match in expressions.items())
