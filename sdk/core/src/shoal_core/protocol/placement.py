"""What a task or an actor says of where its lease may be placed.

A strategy travels with the demand; a scheduler's policies read it. All of these are values: they do not change, are
equal where they say the same, and serve as parts of keys. What they are called on the wire is their ``kind``.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from shoal_core.protocol.ids import NodeId, PlacementGroupId

ANY_BUNDLE = -1

_VALUE = ConfigDict(extra="forbid")


class Operator(StrEnum):
    """How a condition looks at a label."""

    IN = "in"
    NOT_IN = "not_in"
    EXISTS = "exists"
    DOES_NOT_EXIST = "does_not_exist"


@dataclass(frozen=True, config=_VALUE)
class Condition:
    """What one label of a node has to be like; a node without the label meets NOT_IN."""

    label: str
    operator: Operator
    values: tuple[str, ...] = ()

    def met_by(self, labels: dict[str, str]) -> bool:
        """Tell whether a node with these labels meets the condition."""
        value = labels.get(self.label)
        match self.operator:
            case Operator.IN:
                return value in self.values
            case Operator.NOT_IN:
                return value not in self.values
            case Operator.EXISTS:
                return value is not None
            case Operator.DOES_NOT_EXIST:
                return value is None

    def __str__(self) -> str:
        values = ", ".join(self.values)
        return {
            Operator.IN: f"{self.label} in ({values})" if len(self.values) != 1 else f"{self.label}={values}",
            Operator.NOT_IN: f"{self.label} not in ({values})",
            Operator.EXISTS: f"a label {self.label}",
            Operator.DOES_NOT_EXIST: f"no label {self.label}",
        }[self.operator]


Conditions = tuple[Condition, ...]


def all_met(conditions: Conditions, labels: dict[str, str]) -> bool:
    """Tell whether a node with these labels meets all conditions."""
    return all(condition.met_by(labels) for condition in conditions)


@dataclass(frozen=True, config=_VALUE)
class Default:
    """Pack nodes until they are half full, then spread; prefer the node where large arguments lie."""

    kind: Literal["default"] = field(default="default", kw_only=True)


@dataclass(frozen=True, config=_VALUE)
class Spread:
    """Take the emptiest node."""

    kind: Literal["spread"] = field(default="spread", kw_only=True)


@dataclass(frozen=True, config=_VALUE)
class NodeAffinity:
    """Take this node. Where ``soft``: another one if this one is gone or can never hold it.

    ``spill``: another one also while this one has no room. ``fail``: it fails where this one has no room now.
    """

    node: NodeId
    soft: bool
    spill: bool = False
    fail: bool = False
    kind: Literal["node_affinity"] = field(default="node_affinity", kw_only=True)


@dataclass(frozen=True, config=_VALUE)
class NodeLabels:
    """Take a node that meets ``hard``, preferably one that meets ``soft`` too."""

    hard: Conditions = ()
    soft: Conditions = ()
    kind: Literal["node_labels"] = field(default="node_labels", kw_only=True)


@dataclass(frozen=True, config=_VALUE)
class Selected:
    """Take a node that meets the first selector, or if none can hold it now the next one, and so on.

    Among the nodes of one selector it is as for ``Default``, or as for ``Spread`` where ``spread`` is set.
    """

    selectors: tuple[Conditions, ...]
    spread: bool = False
    kind: Literal["selected"] = field(default="selected", kw_only=True)


@dataclass(frozen=True, config=_VALUE)
class Bundle:
    """Take what a bundle of a placement group has reserved; ``ANY_BUNDLE`` is any of them."""

    group: PlacementGroupId
    index: int = ANY_BUNDLE
    kind: Literal["bundle"] = field(default="bundle", kw_only=True)


Strategy = Annotated[Default | Spread | NodeAffinity | NodeLabels | Selected | Bundle, Field(discriminator="kind")]

DEFAULT = Default()
SPREAD = Spread()


def in_words(strategy: Strategy) -> str:
    """Return what people read of a strategy, as what a lease wants."""
    match strategy:
        case NodeAffinity(node):
            return f"node {node}"
        case NodeLabels(hard):
            return _in_words(hard)
        case Selected(selectors):
            return ", or else ".join(map(_in_words, selectors))
        case Bundle(group, index):
            return f"bundle {index} of placement group {group}" if index >= 0 else f"placement group {group}"
        case _:
            return "any node"


def _in_words(conditions: Conditions) -> str:
    return " and ".join(map(str, conditions)) or "any node"
