"""Which GPUs a lease gets: exact shares of numbered devices, decided by a table.

An amount below one is a share of a single device; from one upwards it must be whole and takes whole devices. A share
goes to the device that is fullest and still has room, so that whole devices stay whole; ties go to the lowest index.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shoal_core.protocol.resources import UNIT, from_units


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator; ``name`` is what shows it to a process, ``model`` is what ``accelerator_type`` calls it."""

    name: str
    uuid: str
    model: str


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A part of one device, in ten-thousandths of it."""

    index: int
    units: int


class GpuTable:
    """The devices of a node and what is free of each, in ten-thousandths."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.free = [UNIT] * len(self.names)

    def allocate(self, units: int) -> tuple[GpuShare, ...] | None:
        """Take ``units`` out of the table and say from which devices; None where no devices have that much."""
        if why_impossible(units):
            return None
        shares = self._whole(units // UNIT) if units >= UNIT else self._part(units)
        if shares is not None:
            for share in shares:
                self.free[share.index] -= share.units
        return shares

    def release(self, shares: Sequence[GpuShare]) -> None:
        """Put back what ``allocate`` returned."""
        for share in shares:
            self.free[share.index] += share.units

    def names_of(self, shares: Sequence[GpuShare]) -> list[str]:
        """Return the names of the devices that shares are of."""
        return [self.names[share.index] for share in shares]

    def _whole(self, count: int) -> tuple[GpuShare, ...] | None:
        unused = [index for index, free in enumerate(self.free) if free == UNIT]
        return tuple(GpuShare(index, UNIT) for index in unused[:count]) if len(unused) >= count else None

    def _part(self, units: int) -> tuple[GpuShare, ...] | None:
        if not units:
            return ()
        roomy = [(free, index) for index, free in enumerate(self.free) if free >= units]
        return (GpuShare(min(roomy)[1], units),) if roomy else None


@dataclass(frozen=True, slots=True)
class Gpus:
    """The GPUs that a node offers: how many, by which names they are given out, and of which models they are."""

    amount: float
    names: tuple[str, ...]
    models: tuple[str, ...]

    @classmethod
    def of(cls, found: Sequence[Device], wanted: float | None, visible: Sequence[str] | None = None) -> Gpus:
        """Return what a node offers that found these devices, and was told to offer so many (None: all of them).

        It may be told of more than are found: those have numbers and nothing behind them, as tests want it, or where
        its environment shows it devices by these names, them.
        """
        amount = float(len(found)) if wanted is None else wanted
        count = math.ceil(amount)
        offered = found[:count]
        if count <= len(found):
            names = [device.name for device in offered]
        else:
            names = [str(index) for index in range(count)] if visible is None else list(visible)
        return cls(amount, tuple(names[:count]), tuple(sorted({device.model for device in offered if device.model})))


def why_impossible(units: int) -> str:
    """Return why no node could ever give this amount of GPUs; empty where one could."""
    if units > UNIT and units % UNIT:
        return f"more than one GPU must be a whole number, got {from_units(units)}"
    return ""
