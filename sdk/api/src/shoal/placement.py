"""The options that say where a task or actor may be placed: their checks, and what they mean together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.strategies import NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy
from shoal_core.protocol.labels import parse_selector
from shoal_core.protocol.placement import DEFAULT, SPREAD, Selected, Strategy

WORDS: dict[str, Strategy] = {"DEFAULT": DEFAULT, "SPREAD": SPREAD}
_OBJECTS = (NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy)


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


def strategy_of(given: Mapping[str, Any]) -> Strategy:
    """Return what checked options say of the place; ``ValueError`` where they do not go together."""
    wanted = given.get("scheduling_strategy", "DEFAULT")
    strategy = WORDS[wanted] if isinstance(wanted, str) else wanted.to_protocol()
    if "label_selector" not in given and not given.get("fallback_strategy"):
        return strategy
    if strategy not in (DEFAULT, SPREAD):
        raise ValueError(
            "label_selector and fallback_strategy go with scheduling_strategy='DEFAULT' or 'SPREAD' only, got "
            f"{wanted!r}: say in one of them where to go."
        )
    selectors = [given.get("label_selector", {})]
    selectors += [item["label_selector"] for item in given.get("fallback_strategy", ())]
    return Selected(tuple(parse_selector("label_selector", each) for each in selectors), spread=strategy is SPREAD)
