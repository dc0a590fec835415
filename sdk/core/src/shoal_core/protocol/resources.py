"""Amounts of resources, in exact fixed point.

An amount is an integer number of ten-thousandths (``UNIT``), the precision users may ask for, so that
fractions add up exactly. A missing name means zero; ``Resources`` never stores a zero.
"""

from __future__ import annotations

from collections.abc import Mapping

UNIT = 10_000

CPU = "CPU"
GPU = "GPU"
MEMORY = "memory"
OBJECT_STORE_MEMORY = "object_store_memory"

Resources = dict[str, int]


def to_units(amount: float) -> int:
    """Return ``amount`` in ten-thousandths; ``ValueError`` if it is negative or finer than that."""
    units = round(amount * UNIT)
    if units < 0:
        raise ValueError(f"a resource amount must not be negative, got {amount}")
    if abs(units - amount * UNIT) > 1e-6 * max(1.0, abs(amount)) * UNIT:
        raise ValueError(f"a resource amount has at most four decimal places, got {amount}")
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
    return all(free.get(name, 0) >= units for name, units in wanted.items())


def add(left: Resources, right: Resources) -> Resources:
    """Return the sum, name by name, without zeros."""
    total = dict(left)
    for name, units in right.items():
        total[name] = total.get(name, 0) + units
    return {name: units for name, units in total.items() if units}


def subtract(left: Resources, right: Resources) -> Resources:
    """Return ``left - right``, name by name; amounts may become negative (a node in overdraft)."""
    return add(left, {name: -units for name, units in right.items()})
