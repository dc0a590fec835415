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
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import PeerId
from shoal_core.protocol.messages import Message
from shoal_core.protocol.records import Record
from shoal_core.protocol.traces import Spanned


@dataclass(frozen=True, slots=True)
class Request:
    """A control message that wants an answer; ``token`` names the asker to ``Reply``."""

    message: Message
    token: int


@dataclass(frozen=True, slots=True)
class Event:
    """A control message that wants no answer."""

    message: Message
    source: str


@dataclass(frozen=True, slots=True)
class Received:
    """Records that a channel delivered, in order."""

    peer: PeerId
    records: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer a request, with a message or an error."""

    token: int
    message: Message | ShoalError


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish a control message."""

    subject: str
    message: Message


@dataclass(frozen=True, slots=True)
class Ask:
    """Send a request; its answer comes back as ``Answered`` with the same ``context``. ``span`` lasts until then."""

    subject: str
    message: Message
    context: Any
    timeout_seconds: float = 2.0
    span: Spanned | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to an ``Ask``, or the error that came instead."""

    context: Any
    answer: Message | ShoalError


@dataclass(frozen=True, slots=True)
class Send:
    """Send a record on the channel to a peer."""

    peer: PeerId
    record: Record


@dataclass(frozen=True, slots=True)
class Forget:
    """End the channel to a peer that is dead."""

    peer: PeerId


@dataclass(frozen=True, slots=True)
class Store:
    """Write a key by compare-and-set: ``revision`` is what the core last saw, 0 for a key that must be new.

    ``value`` None deletes. The outcome comes back as ``Stored`` or ``Conflict`` with the same ``context``. A store
    whose answer was lost is resolved by reading the key, so a value should be one that nobody else would write.
    """

    key: str
    value: bytes | None
    revision: int
    context: Any = None
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """A ``Store`` took effect; ``revision`` is the new one (0 after a deletion)."""

    key: str
    value: bytes | None
    revision: int
    context: Any
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """A ``Store`` came too late: this is what the key holds now (None and 0: nothing)."""

    key: str
    value: bytes | None
    revision: int
    context: Any
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class StoreRefused:
    """A ``Store`` that the bucket will never take: it is full, or the value too large. Nothing was changed."""

    key: str
    error: ShoalError
    context: Any
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """Read a key through the leader of its bucket; it comes back as ``Loaded`` with the same ``context``."""

    key: str
    context: Any = None
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a key held when it was read (None and 0: nothing)."""

    key: str
    value: bytes | None
    revision: int
    context: Any
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Changed:
    """A watched bucket says that a key has changed; None: it was deleted. Changes of a key come in order."""

    key: str
    value: bytes | None
    revision: int
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Connected:
    """The connection to the broker was lost, or is back: whatever was told in between was not heard."""

    connected: bool


@dataclass(frozen=True, slots=True)
class Start:
    """Have the service do something of its own, described by ``command`` (a frozen dataclass of that service)."""

    command: Any


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call ``tick`` at this time (the core's clock); an earlier one replaces a later one."""

    at: float


Effect = Reply | Publish | Ask | Send | Forget | Store | Load | Start | WakeAt
Input = Request | Event | Received | Answered | Stored | Conflict | StoreRefused | Loaded | Changed | Connected
