"""Amounts of resources, in exact fixed point.

An amount is an integer number of ten-thousandths (``UNIT``), so that fractions add up exactly. What users ask for
beyond that is cut off: three times ``1/3`` fit into one. A missing name means zero; ``Resources`` never stores a zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

UNIT = 10_000

CPU = "CPU"
GPU = "GPU"
MEMORY = "memory"
OBJECT_STORE_MEMORY = "object_store_memory"

Resources = dict[str, int]

ROUNDING_STEPS = 8
"""By so many of the steps that floats have there (or at one, below that) a computed amount may miss what was meant."""


def to_units(amount: float) -> int:
    """Return ``amount`` in ten-thousandths, cut off; ``ValueError`` if it is negative, less than one, or not finite."""
    exact = amount * UNIT
    if isinstance(exact, float) and not math.isfinite(exact):
        raise ValueError(f"a resource amount must be a finite number, got {amount}")
    units = round(exact)
    if units != exact and abs(units - exact) > ROUNDING_STEPS * math.ulp(max(exact, UNIT)):
        units = math.floor(exact)
        if not units:
            raise ValueError(f"a resource amount must be 0 or at least 0.0001, got {amount}")
    if units < 0:
        raise ValueError(f"a resource amount must not be negative, got {amount}")
    return units


def from_units(units: int) -> float:
    """Return the amount users see for ``units`` ten-thousandths."""
    return units / UNIT


def to_resources(amounts: Mapping[str, float]) -> Resources:
    """Return user amounts as exact resources, without zeros."""
    return {name: units for name, amount in amounts.items() if (units := to_units(amount))}


def to_amounts(resources: Resources) -> dict[str, float]:
    """Return resources as the amounts users see."""
    return {name: from_units(units) for name, units in resources.items()}


def fits(wanted: Resources, free: Resources) -> bool:
    """Tell whether ``wanted`` can be taken out of ``free``."""
    for name, units in wanted.items():  # noqa: SIM110 - asked of every node for every lease; a generator takes longer
        if free.get(name, 0) < units:
            return False
    return True


def add(left: Resources, right: Resources) -> Resources:
    """Return the sum, name by name, without zeros."""
    total = dict(left)
    for name, units in right.items():
        total[name] = total.get(name, 0) + units
    return {name: units for name, units in total.items() if units} if 0 in total.values() else total


def subtract(left: Resources, right: Resources) -> Resources:
    """Return ``left - right``, name by name; amounts may become negative (a node in overdraft)."""
    return add(left, {name: -units for name, units in right.items()})


def is_of_one_node(name: str) -> bool:
    """Tell whether a resource stands for one node (``node:<address>``), so that there are as many of them as nodes."""
    return name.startswith("node:")
