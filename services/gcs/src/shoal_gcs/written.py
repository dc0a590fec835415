"""What is written once, and read by many: parts of functions, and what actors are made from.

A key of this kind holds one value or none, never another. So a replica may answer from what it has seen, as long as it
forgets what it hears to be deleted; and what it has not heard of yet does no harm, since nobody asks for what belongs
to a job or an actor that has ended.
"""

from __future__ import annotations

MOST_BYTES = 32 * 1024 * 1024


class Written:
    """The values that were written or read last, up to ``most_bytes`` of them."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.size_bytes = 0
        self._most_bytes = most_bytes
        self._values: dict[str, bytes] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> bytes | None:
        """Return the value of a key, if it is known."""
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value  # the newest now
        return value

    def remember(self, key: str, value: bytes | None) -> None:
        """Take in what a key was seen to hold; None: it holds nothing any more, or not yet."""
        self.forget(key)
        if value is None:
            return
        self._values[key] = value
        self.size_bytes += len(value)
        while self.size_bytes > self._most_bytes:
            self.forget(next(iter(self._values)))

    def forget(self, key: str) -> None:
        """Forget one key."""
        self.size_bytes -= len(self._values.pop(key, b""))

    def forget_all(self, prefix: str) -> None:
        """Forget all keys that begin with ``prefix``."""
        for key in [key for key in self._values if key.startswith(prefix)]:
            self.forget(key)
