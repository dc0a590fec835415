"""Generators whose items come all at once (``num_returns="dynamic"``), beside those that stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from shoal.session import runtime
from shoal_core.runtime.ownership.objects import ObjectRef

T = TypeVar("T")


class DynamicObjectRefGenerator(Generic[T]):
    """The references to what a task with ``num_returns="dynamic"`` yielded: iterable, with a length, may be pickled."""

    def __init__(self, refs: list[ObjectRef[T]]) -> None:
        self._refs = refs

    def __iter__(self) -> Iterator[ObjectRef[T]]:
        while self._refs:
            yield self._refs.pop(0)

    def __len__(self) -> int:
        return len(self._refs)

    def __repr__(self) -> str:
        return f"DynamicObjectRefGenerator({len(self)} references)"


def collected(function: Callable[..., Iterable[T]]) -> Callable[..., DynamicObjectRefGenerator[T]]:
    """Return a function that puts all that ``function`` yields and returns the references."""

    @functools.wraps(function)
    def collect(*args: Any, **kwargs: Any) -> DynamicObjectRefGenerator[T]:
        return DynamicObjectRefGenerator([runtime().put(item) for item in function(*args, **kwargs)])

    return collect
