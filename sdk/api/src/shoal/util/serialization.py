"""Serializers of users' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from shoal_core.runtime.data import serializers

T = TypeVar("T")
S = TypeVar("S")


def register_serializer(cls: type[T], *, serializer: Callable[[T], S], deserializer: Callable[[S], T]) -> None:
    """Have instances of exactly ``cls`` pickled as what ``serializer`` makes of them, and remade by ``deserializer``.

    This counts for what *this process* pickles from now on: arguments, results, items, exceptions, functions. The
    deserializer travels with each value, so that readers need to have registered nothing; a task that returns such
    objects registers in its own process. A second call replaces the first. Raises ``TypeError`` for what is no class
    or cannot be called, and for built-in classes such as ``list`` that are always pickled as they are.
    """
    serializers.register(cls, serializer, deserializer)


def deregister_serializer(cls: type) -> None:
    """Pickle instances of ``cls`` as before; does nothing where no serializer is registered for it."""
    serializers.deregister(cls)
