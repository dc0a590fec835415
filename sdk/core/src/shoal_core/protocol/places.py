"""Where a segment's bytes lie in the folder of its node: in a file of its own, or in a part of one that many share."""

from __future__ import annotations


def part_of(file: str, offset: int) -> str:
    """Return the place of a segment that lies in a shared file, from this byte on."""
    return f"{file}+{offset}"


def is_part(place: str) -> bool:
    """Tell whether a place is in a file that others share."""
    return "+" in place


def located(place: str) -> tuple[str, int]:
    """Return the name of the file, and the first byte in it."""
    file, _, offset = place.partition("+")
    return file, int(offset or 0)
