"""Ids as programs hold them: what ``NodeID``, ``ActorID`` and the others of Ray's names are.

Each is the hex text of the id, as it travels (see ``protocol.ids``), with what Ray's ids can be asked: ``hex()``,
``binary()``, ``is_nil()``; made by ``nil()``, ``from_random()``, ``from_hex(...)`` or of the bytes themselves. All bits
of the nil id are set.
"""

from __future__ import annotations

import secrets
from typing import Any, ClassVar, Self


class BaseID(str):
    """What all ids share. ``SIZE`` is how many bytes one has; ``ValueError`` for more or fewer."""

    __slots__ = ()

    SIZE: ClassVar[int]

    def __new__(cls, id: bytes | str) -> Self:
        """Make an id of its bytes or of its hex digits."""
        if not isinstance(id, bytes | str):
            raise TypeError(f"{cls.__name__} is made of bytes or of hex digits, got {type(id).__name__}.")
        try:
            data = bytes.fromhex(id) if isinstance(id, str) else id
        except ValueError:
            raise ValueError(f"{cls.__name__} is made of hex digits, got {id!r}.") from None
        if len(data) != cls.SIZE:
            raise ValueError(f"{cls.__name__} has {cls.SIZE} bytes, got {len(data)}.")
        return super().__new__(cls, data.hex())

    @classmethod
    def from_hex(cls, hex_id: str) -> Self:
        """Make an id of its hex digits."""
        return cls(hex_id)

    @classmethod
    def from_binary(cls, id: bytes) -> Self:
        """Make an id of its bytes."""
        return cls(id)

    @classmethod
    def from_random(cls) -> Self:
        """Draw an id, which names nothing."""
        return cls(secrets.token_bytes(cls.SIZE))

    @classmethod
    def nil(cls) -> Self:
        """Return the id of nothing."""
        return cls(b"\xff" * cls.SIZE)

    @classmethod
    def size(cls) -> int:
        """Return how many bytes an id has."""
        return cls.SIZE

    def is_nil(self) -> bool:
        """Tell whether this is the id of nothing."""
        return self == "ff" * self.SIZE

    def hex(self) -> str:
        """Return the id as hex digits."""
        return str(self)

    def binary(self) -> bytes:
        """Return the id as bytes."""
        return bytes.fromhex(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),)


class JobID(BaseID):
    """The id of a job: a number that rises."""

    __slots__ = ()
    SIZE = 4

    @classmethod
    def from_int(cls, number: int) -> Self:
        """Return the id of the ``number``-th job of a cluster."""
        return cls(number.to_bytes(cls.SIZE, "big"))


class NodeID(BaseID):
    """The id of a node."""

    __slots__ = ()
    SIZE = 8


class WorkerID(BaseID):
    """The id of a process: a driver or a worker process."""

    __slots__ = ()
    SIZE = 12


class ActorID(BaseID):
    """The id of an actor."""

    __slots__ = ()
    SIZE = 16


class PlacementGroupID(BaseID):
    """The id of a placement group."""

    __slots__ = ()
    SIZE = 16


class TaskID(BaseID):
    """The id of a task."""

    __slots__ = ()
    SIZE = 20
