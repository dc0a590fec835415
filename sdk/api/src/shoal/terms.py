"""What a program may claim beside others: the parameters of ``init`` that say so, and the error for each wrong one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from shoal_core.protocol.messages import JobTerms
from shoal_core.protocol.resources import to_units

HEAVIEST = 1000.0
PRIORITIES = range(-1000, 1001)


def check_priority(name: str, value: Any) -> None:
    """Check a priority, of a program or of work in it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"The type of option {name} is {type(value).__name__}; it must be an int.")
    if value not in PRIORITIES:
        raise ValueError(f"The value of option {name} is {value}; it must be between -1000 and 1000.")


def terms_of(priority: Any, weight: Any, quotas: Any) -> JobTerms:
    """Return a job's terms, checked: ``TypeError`` for a wrong type, ``ValueError`` for an impossible value."""
    check_priority("priority", priority)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a number, got {type(weight).__name__}.")
    if not (math.isfinite(weight) and 1 / HEAVIEST <= weight <= HEAVIEST):
        raise ValueError(f"weight must be between {1 / HEAVIEST:g} and {HEAVIEST:g}, got {weight}.")
    return JobTerms(priority=priority, weight=float(weight), quotas={} if quotas is None else _units(quotas))


def _units(quotas: Any) -> dict[str, int]:
    if not isinstance(quotas, Mapping):
        raise TypeError(f"quotas must be a dict of resource names to amounts, got {type(quotas).__name__}.")
    units = {}
    for name, amount in quotas.items():
        if not isinstance(name, str):
            raise TypeError(f"quotas must be a dict of resource names to amounts, got the name {name!r}.")
        if isinstance(amount, bool) or not isinstance(amount, (int, float)):
            raise TypeError(f"quotas[{name!r}] must be a number, got {type(amount).__name__}.")
        try:
            units[name] = to_units(amount)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"quotas[{name!r}] is wrong: {error}.") from None
    return units
