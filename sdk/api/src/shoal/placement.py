"""The options that say where a task or actor may be placed: their checks, and what they mean together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.placement_groups import PlacementGroup
from shoal.strategies import (
    NodeAffinitySchedulingStrategy,
    NodeLabelSchedulingStrategy,
    PlacementGroupSchedulingStrategy,
    check_in_group,
)
from shoal_core.protocol.labels import parse_selector
from shoal_core.protocol.placement import ANY_BUNDLE, DEFAULT, SPREAD, Bundle, Selected, Strategy
from shoal_core.protocol.records import InGroup
from shoal_core.protocol.resources import CPU

WORDS: dict[str, Strategy] = {"DEFAULT": DEFAULT, "SPREAD": SPREAD}
ANY_GROUP = "default"
"""As the option ``placement_group``: the group of whoever submits, if that captures what it submits."""
_OBJECTS = (NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy, PlacementGroupSchedulingStrategy)


def check_strategy(name: str, value: Any) -> None:
    """Check ``scheduling_strategy``."""
    if isinstance(value, str):
        if value not in WORDS:
            raise ValueError(f"The value of option {name} is {value!r}; it must be one of {tuple(WORDS)} or an object.")
    elif not isinstance(value, _OBJECTS):
        allowed = ", ".join(kind.__name__ for kind in _OBJECTS)
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a str or one of {allowed}.")


def check_selector(name: str, value: Any) -> None:
    """Check ``label_selector``."""
    parse_selector(f"option {name}", value)


def check_fallback(name: str, value: Any) -> None:
    """Check ``fallback_strategy``: a list of ``{"label_selector": {…}}``."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be a list of dicts.")
    for index, item in enumerate(value):
        where = f"option {name}[{index}]"
        if not isinstance(item, Mapping):
            raise TypeError(f"The type of {where} is {type(item).__name__}; it must be a dict.")
        if set(item) != {"label_selector"}:
            raise ValueError(
                f"The value of {where} has the keys {sorted(map(str, item))}; it must have label_selector."
            )
        parse_selector(f"{where}['label_selector']", item["label_selector"])


def check_group(name: str, value: Any) -> None:
    """Check ``placement_group``."""
    if isinstance(value, str):
        if value != ANY_GROUP:
            raise ValueError(f"The value of option {name} is {value!r}; it must be a PlacementGroup or {ANY_GROUP!r}.")
    else:
        check_in_group(value, ANY_BUNDLE, None)


def check_bundle_index(name: str, value: Any) -> None:
    """Check ``placement_group_bundle_index``."""
    check_in_group(None, value, None)


def check_capture(name: str, value: Any) -> None:
    """Check ``placement_group_capture_child_tasks``."""
    check_in_group(None, ANY_BUNDLE, value)


def strategy_of(given: Mapping[str, Any]) -> Strategy:
    """Return what checked options say of the place outside of groups; ``ValueError`` where they do not go together."""
    wanted = given.get("scheduling_strategy", "DEFAULT")
    in_group = isinstance(wanted, PlacementGroupSchedulingStrategy)
    if isinstance(given.get("placement_group"), PlacementGroup):
        if "scheduling_strategy" in given:
            raise ValueError(
                f"placement_group and scheduling_strategy do not go together, got {given['placement_group']!r} and "
                f"{wanted!r}: say in one of them where to go."
            )
        in_group, wanted = True, given["placement_group"]
    strategy = DEFAULT if in_group else WORDS[wanted] if isinstance(wanted, str) else wanted.to_protocol()
    if not given.get("label_selector") and not given.get("fallback_strategy"):
        return strategy
    if in_group or strategy not in (DEFAULT, SPREAD):
        raise ValueError(
            "label_selector and fallback_strategy go with scheduling_strategy='DEFAULT' or 'SPREAD' only, got "
            f"{wanted!r}: say in one of them where to go."
        )
    selectors = [given.get("label_selector", {})]
    selectors += [item["label_selector"] for item in given.get("fallback_strategy", ())]
    return Selected(tuple(parse_selector("label_selector", each) for each in selectors), spread=strategy is SPREAD)


# ------------------------------------------------------------------------------------ in placement groups


@dataclass(frozen=True, slots=True)
class GroupWish:
    """What options say of a placement group.

    ``group`` is None where they name none: then it is that of whoever submits, if that ``captures``. ``captures`` is
    None where they do not say whether what they are for does so in turn.
    """

    group: PlacementGroup | None
    bundle_index: int
    captures: bool | None


def group_wish(options: Mapping[str, Any]) -> GroupWish | None:
    """Return what checked options say of a placement group; None where they keep out of all, whoever submits."""
    strategy = options.get("scheduling_strategy")
    if isinstance(strategy, PlacementGroupSchedulingStrategy):
        group: PlacementGroup | str | None = strategy.placement_group
        index, captures = strategy.placement_group_bundle_index, strategy.placement_group_capture_child_tasks
    else:
        group = options.get("placement_group", ANY_GROUP)
        given = options.get("placement_group_bundle_index")
        index = ANY_BUNDLE if given is None else given
        captures = options.get("placement_group_capture_child_tasks")
    if isinstance(group, PlacementGroup) and not group.is_empty:
        return GroupWish(group, index, captures)
    chosen = any(options.get(name) for name in ("scheduling_strategy", "label_selector", "fallback_strategy"))
    if group == ANY_GROUP and not chosen:
        return GroupWish(None, index, captures)
    _check_no_bundle(index)
    return None


def place(
    wish: GroupWish | None,
    inside: InGroup | None,
    what: str,
    resources: Mapping[str, float],
    placement: Mapping[str, float] | None = None,
) -> tuple[Bundle, InGroup] | None:
    """Return where in which placement group a task or an actor goes; None where it goes into none.

    ``inside`` is where whoever submits runs. ``what`` is the name of the task or actor, and ``placement`` what an actor
    needs to be made. Raises ``ValueError`` where there is no such bundle, or none that could ever hold it.
    """
    if wish is None:
        return None
    captures = inside is not None and inside.captures if wish.captures is None else wish.captures
    group = wish.group
    if group is None and captures and inside is not None:
        group = PlacementGroup(inside.group)
    if group is None:
        _check_no_bundle(wish.bundle_index)
        return None
    _check_bundle(group, wish.bundle_index, what, resources, placement or resources)
    group_id = group.to_protocol()
    return Bundle(group_id, wish.bundle_index), InGroup(group_id, captures)


def _check_no_bundle(index: int) -> None:
    if index != ANY_BUNDLE:
        raise ValueError("If placement group is not set, the value of bundle index must be -1.")


def _check_bundle(
    group: PlacementGroup, index: int, what: str, resources: Mapping[str, float], placement: Mapping[str, float]
) -> None:
    """Raise where the bundle that is meant is not there, or cannot hold what is to go there."""
    bundles = group.bundle_specs
    if index >= len(bundles):
        raise ValueError(
            f"placement group bundle index {index} is invalid. Valid placement group indexes: 0-{len(bundles) - 1}"
        )
    meant = bundles if index == ANY_BUNDLE else [bundles[index]]
    which = f"any bundles for the placement group, {bundles}" if index == ANY_BUNDLE else f"bundle {index}, {meant[0]}"
    if not _fits_in_one(resources, meant):
        raise ValueError(
            f"Cannot schedule {what} with the placement group because the resource request {dict(resources)} cannot "
            f"fit into {which}."
        )
    if not _fits_in_one(placement, meant):
        raise ValueError(
            f"Cannot schedule {what} with the placement group because the actor requires {placement.get(CPU, 0):g} CPU "
            f"for creation, but it cannot fit into {which}. Consider creating a placement group with CPU resources."
        )


def _fits_in_one(wanted: Mapping[str, float], bundles: list[dict[str, float]]) -> bool:
    return any(all(bundle.get(name, 0) >= amount for name, amount in wanted.items()) for bundle in bundles)
