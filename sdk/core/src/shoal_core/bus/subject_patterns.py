"""Which subjects a pattern means: ``*`` stands for one token, a final ``>`` for one or more."""

from __future__ import annotations

from collections.abc import Sequence


def matches(pattern: Sequence[str], subject: Sequence[str]) -> bool:
    """Tell whether a subject is among those a pattern means; both as tokens."""
    for position, token in enumerate(pattern):
        if token == ">":
            return len(subject) > position
        if position >= len(subject) or (token != "*" and token != subject[position]):
            return False
    return len(pattern) == len(subject)


def covers(allowed: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether every subject that ``pattern`` means is also meant by ``allowed``; both as tokens."""
    for position, token in enumerate(allowed):
        if token == ">":
            return len(pattern) > position
        if position >= len(pattern) or pattern[position] == ">":
            return False
        if token != "*" and token != pattern[position]:
            return False
    return len(allowed) == len(pattern)
