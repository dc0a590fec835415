"""Generators whose items come all at once (``num_returns="dynamic"``), beside those that stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from shoal.session import runtime
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.worker.work import current as current_task
from shoal_core.runtime.worker.work import is_retryable

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


def collect_method(instance: Any, name: str, *args: Any, **kwargs: Any) -> DynamicObjectRefGenerator[Any]:
    """Put all that a method of an actor yields and return the references (in its process)."""
    return collected(getattr(instance, name))(*args, **kwargs)


def collected(function: Callable[..., Iterable[T]]) -> Callable[..., DynamicObjectRefGenerator[T]]:
    """Return a function that puts all that ``function`` yields and returns the references."""

    @functools.wraps(function)
    def collect(*args: Any, **kwargs: Any) -> DynamicObjectRefGenerator[T]:
        return DynamicObjectRefGenerator(_put_all(iter(function(*args, **kwargs))))

    return collect


def _put_all(items: Iterator[T]) -> list[ObjectRef[T]]:
    """Put items as they come and return the references.

    An exception stands in the place of one more, as in Ray, unless the task is to be tried again after it.
    """
    current, refs = runtime(), []
    try:
        for item in items:
            refs.append(current.put(item))
    except Exception as error:
        running = current_task.get()
        assert running is not None
        if is_retryable(running.task, error):
            raise
        refs.append(current.put_failure(running.label, error))
    return refs
