"""What a service's core asks the outside world to do. Cores decide; ``service.engine`` performs, in this order.

A core is a plain object with two methods, neither of which waits, reads a clock or draws a random number::

    handle(message, now) -> list[Effect]      # something arrived
    tick(now) -> list[Effect]                 # a time it asked for with WakeAt has come

``message`` is one of the core's inputs: a control message wrapped in ``Request`` or ``Event``, records wrapped in
``Received``, the outcome of an ``Ask`` (``Answered``), a ``Load`` (``Loaded``) or a ``Store`` (``Stored``,
``Conflict`` or ``StoreRefused``), what a watched bucket says (``Changed``), ``Connected``, or an input of the service's
own.

A list of effects is performed in its order. Where a ``Store`` stands in it, what follows waits until the store has
taken effect, and is dropped if it did not: the core then hears why and decides anew. (A run of neighbouring
``Store`` effects goes out together.) Other inputs may be handled while a list waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import PeerId
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import Record
from shoal_core.protocol.traces import Spanned


class Request(msgspec.Struct, frozen=True):
    """A control message that wants an answer; ``token`` names the asker to ``Reply``."""

    message: Message
    token: int


class Event(msgspec.Struct, frozen=True):
    """A control message that wants no answer."""

    message: Message
    source: str


class Received(msgspec.Struct, frozen=True):
    """Records that a channel delivered, in order."""

    peer: PeerId
    records: Sequence[Record]


class Reply(msgspec.Struct, frozen=True):
    """Answer a request, with a message or an error."""

    token: int
    message: Message | ShoalError


class Publish(msgspec.Struct, frozen=True):
    """Publish a control message."""

    subject: str
    message: Message


class Ask(msgspec.Struct, frozen=True):
    """Send a request; its answer comes back as ``Answered`` with the same ``context``. ``span`` lasts until then."""

    subject: str
    message: Message
    context: Any
    timeout_seconds: float = 2.0
    span: Spanned | None = None


class Answered(msgspec.Struct, frozen=True):
    """The answer to an ``Ask``, or the error that came instead."""

    context: Any
    answer: Message | ShoalError


class Send(msgspec.Struct, frozen=True):
    """Send a record on the channel to a peer."""

    peer: PeerId
    record: Record


class Forget(msgspec.Struct, frozen=True):
    """End the channel to a peer that is dead."""

    peer: PeerId


class Store(msgspec.Struct, frozen=True):
    """Write a key by compare-and-set: ``revision`` is what the core last saw, 0 for a key that must be new.

    ``value`` None deletes. The outcome comes back as ``Stored`` or ``Conflict`` with the same ``context``. A store
    whose answer was lost is resolved by reading the key, so a value should be one that nobody else would write.
    """

    key: str
    value: bytes | None
    revision: int
    context: Any = None
    bucket: str = ""


class Stored(msgspec.Struct, frozen=True):
    """A ``Store`` took effect; ``revision`` is the new one (0 after a deletion)."""

    key: str
    value: bytes | None
    revision: int
    context: Any
    bucket: str = ""


class Conflict(msgspec.Struct, frozen=True):
    """A ``Store`` came too late: this is what the key holds now (None and 0: nothing)."""

    key: str
    value: bytes | None
    revision: int
    context: Any
    bucket: str = ""


class StoreRefused(msgspec.Struct, frozen=True):
    """A ``Store`` that the bucket will never take: it is full, or the value too large. Nothing was changed."""

    key: str
    error: ShoalError
    context: Any
    bucket: str = ""


class Load(msgspec.Struct, frozen=True):
    """Read a key through the leader of its bucket; it comes back as ``Loaded`` with the same ``context``."""

    key: str
    context: Any = None
    bucket: str = ""


class Loaded(msgspec.Struct, frozen=True):
    """What a key held when it was read (None and 0: nothing)."""

    key: str
    value: bytes | None
    revision: int
    context: Any
    bucket: str = ""


class Changed(msgspec.Struct, frozen=True):
    """A watched bucket says that a key has changed; None: it was deleted. Changes of a key come in order."""

    key: str
    value: bytes | None
    revision: int
    bucket: str = ""


class Connected(msgspec.Struct, frozen=True):
    """The connection to the broker was lost, or is back: whatever was told in between was not heard."""

    connected: bool


class Start(msgspec.Struct, frozen=True):
    """Have the service do something of its own, described by ``command`` (a frozen dataclass of that service)."""

    command: Any


class WakeAt(msgspec.Struct, frozen=True):
    """Call ``tick`` at this time (the core's clock); an earlier one replaces a later one."""

    at: float


Effect = Reply | Publish | Ask | Send | Forget | Store | Load | Start | WakeAt
Input = Request | Event | Received | Answered | Stored | Conflict | StoreRefused | Loaded | Changed | Connected
