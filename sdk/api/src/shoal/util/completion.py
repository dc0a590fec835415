"""Results as they come: iterators over what many calls return, in the order in which it becomes ready."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from shoal.actor import ActorMethod
from shoal.objects import get, wait
from shoal.remote_function import RemoteFunction
from shoal_core.runtime.ownership.objects import ObjectRef


def as_completed(
    refs: Sequence[ObjectRef[Any]], *, chunk_size: int = 10, yield_obj_refs: bool = False
) -> Iterator[Any]:
    """Yield the values of references as they become ready, or (``yield_obj_refs``) the references themselves.

    ``chunk_size``: up to so many are read at a time, as far as they are ready. Raises the error of a task when its turn
    comes; ``ValueError`` for a number below 1.
    """
    _check("chunk_size", chunk_size)
    return _completed(iter(()), len(refs), list(refs), chunk_size, yield_obj_refs)


def map_unordered(
    fn: RemoteFunction[Any, Any] | ActorMethod,
    items: Iterable[Any],
    *,
    backpressure_size: int | None = 100,
    chunk_size: int = 10,
    yield_obj_refs: bool = False,
) -> Iterator[Any]:
    """Call ``fn.remote(item)`` for each item, and yield the results as they become ready (see ``as_completed``).

    No more than ``backpressure_size`` calls are under way, and items are taken as there is room; None: all at once.
    Raises ``TypeError`` for what is not remote, and ``ValueError`` for a number below 1.
    """
    if not isinstance(fn, RemoteFunction | ActorMethod):
        raise TypeError(f"fn must be a remote function or a method of an actor, got {fn!r}.")
    _check("chunk_size", chunk_size)
    if backpressure_size is not None:
        _check("backpressure_size", backpressure_size)
    calls: Iterator[ObjectRef[Any]] = (fn.remote(item) for item in items)
    first = list(calls if backpressure_size is None else itertools.islice(calls, backpressure_size))
    return _completed(calls, len(first), first, chunk_size, yield_obj_refs)


def _completed(
    more: Iterator[ObjectRef[Any]], most: int, pending: list[ObjectRef[Any]], chunk_size: int, as_references: bool
) -> Iterator[Any]:
    """Yield what is ready of ``pending``, which is filled up to ``most`` with ``more``."""
    while pending:
        wait(pending, num_returns=1)
        ready, pending = wait(pending, num_returns=min(chunk_size, len(pending)), timeout=0)
        pending += itertools.islice(more, most - len(pending))
        yield from ready if as_references else map(get, ready)


def _check(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")
