"""Whether a history of one key's operations could have happened one at a time (after Wing, Gong and Lowe)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class KeyOperation:
    """An operation, when it was begun and ended, and what it returned (None: it never ended).

    ``result`` is the value that was read (b"" for none), or whether the key was added or deleted.
    """

    kind: Literal["put", "add", "get", "delete"]
    value: bytes
    began_at: int
    ended_at: int | None
    result: bytes | bool | None

    def apply(self, state: bytes) -> tuple[bytes | bool, bytes]:
        """Return the result and the state after it, where b"" is a key that holds nothing."""
        match self.kind:
            case "put":
                return state == b"", self.value
            case "add":
                return state == b"", state or self.value
            case "delete":
                return state != b"", b""
        return state, state


def is_linearizable(history: Sequence[KeyOperation]) -> bool:
    """Tell whether there is an order of the operations that fits their times and their results."""
    seen: set[tuple[frozenset[int], bytes]] = set()
    stack: list[tuple[frozenset[int], bytes]] = [(frozenset(range(len(history))), b"")]
    while stack:
        left, state = stack.pop()
        if (left, state) in seen:
            continue
        seen.add((left, state))
        if all(history[index].ended_at is None for index in left):
            return True
        first_end = min(end for index in left if (end := history[index].ended_at) is not None)
        for index in left:
            operation = history[index]
            result, after = operation.apply(state)
            if operation.began_at <= first_end and operation.result in (None, result):
                stack.append((left - {index}, after))
    return False
