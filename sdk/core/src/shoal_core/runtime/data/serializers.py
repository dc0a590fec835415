"""Serializers that users register for their own classes, where pickle cannot take them or takes them badly.

They count in the process that registers them, for whatever it pickles from then on. The deserializer travels with each
pickle, by cloudpickle, so that the process that reads the value needs to have registered nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

Reduced = tuple[Callable[[Any], Any], tuple[Any]]

registered: dict[type, Callable[[Any], Reduced]] = {}
"""How instances of exactly these classes are reduced; read for every object that is pickled."""

PICKLED_AS_THEY_ARE: frozenset[type] = frozenset(
    {bool, int, float, str, bytes, bytearray, tuple, list, dict, set, frozenset, type(None), type, types.FunctionType}
)
"""What the pickler takes before it asks anybody."""


def register(cls: type, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]) -> None:
    """Reduce instances of exactly ``cls`` to what ``serializer`` makes of them; replaces what was registered before.

    Raises ``TypeError`` for what is no class, cannot be called, or is pickled before anybody is asked.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_serializer() takes a class, got {cls!r} of type {type(cls).__name__}.")
    if cls in PICKLED_AS_THEY_ARE:
        raise TypeError(
            f"Instances of {cls.__name__} are always pickled as they are; register a serializer for a class of your "
            "own (a subclass will do)."
        )
    for name, function in (("serializer", serializer), ("deserializer", deserializer)):
        if not callable(function):
            raise TypeError(f"The {name} of {cls.__qualname__} must be callable, got {function!r}.")

    def reduce(value: Any) -> Reduced:
        return deserializer, (serializer(value),)

    registered[cls] = reduce


def deregister(cls: type) -> None:
    """Pickle instances of ``cls`` as before; does nothing where nothing is registered for it."""
    registered.pop(cls, None)
