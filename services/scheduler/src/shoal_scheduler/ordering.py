"""Things kept in order while their keys change: what makes a decision take less time than a look at everything.

A key is a tuple that ends with something of its own, so that no two are equal and ties break in the same way
everywhere. Finding takes logarithmic time; putting moves memory, which for thousands of keys is a microsecond.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Key = tuple[Any, ...]


class Ordering(Generic[T]):
    """Items by name, in the order of their keys."""

    __slots__ = ("_items", "_key_of", "keys")

    def __init__(self) -> None:
        self.keys: list[Key] = []
        self._items: dict[Key, T] = {}
        self._key_of: dict[Hashable, Key] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._key_of

    def __iter__(self) -> Iterator[T]:
        """Yield the items, first ones first."""
        return (self._items[key] for key in self.keys)

    def __getitem__(self, key: Key) -> T:
        return self._items[key]

    def find(self, name: Hashable) -> T:
        """Return an item by its name; KeyError if it is not there."""
        return self._items[self._key_of[name]]

    def position(self, name: Hashable) -> int:
        """Return how many items come before one; KeyError if it is not there."""
        return bisect_left(self.keys, self._key_of[name])

    @property
    def first(self) -> T:
        """The item with the smallest key; IndexError if there is none."""
        return self._items[self.keys[0]]

    def put(self, name: Hashable, key: Key, item: T) -> None:
        """Put an item in its place, from wherever it was before."""
        before = self._key_of.get(name)
        if before == key:
            self._items[key] = item
            return
        if before is not None:
            self._remove(before)
        self._key_of[name] = key
        self._items[key] = item
        insort(self.keys, key)

    def discard(self, name: Hashable) -> None:
        """Take an item out, if it is there."""
        key = self._key_of.pop(name, None)
        if key is not None:
            self._remove(key)

    def _remove(self, key: Key) -> None:
        del self._items[key]
        del self.keys[bisect_left(self.keys, key)]
