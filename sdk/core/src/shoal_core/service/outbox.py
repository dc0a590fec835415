"""What an engine has under way: who waits for an answer, what a turn of the loop sends together, which stores run.

Messages that come in crowds are kept until the turn of the loop is over, and then go out in packets, one or a few for
each subject: what many inputs of one turn ask of one service, or tell, costs little more than one of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from shoal_core.protocol.effects import Ask, Conflict, Effect, Publish, Store, Stored, StoreRefused
from shoal_core.service.routes import Served


@dataclass(slots=True)
class PackedAnswers:
    """The answers to the requests of one packet, which go back together; ``missing`` counts those to come."""

    reply: str
    missing: int
    answers: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.answers = [b""] * self.missing


class Asker(msgspec.Struct, frozen=True):
    """Who waits for the answer to a request; ``index`` is its place in the packet that it came in, if in one."""

    reply: str
    served: Served
    began_at: float
    packet: PackedAnswers | None = None
    index: int = 0


@dataclass(slots=True)
class StoreRun:
    """Neighbouring stores of a list of effects, from ``start`` to ``end``; ``over`` is done when all are certain."""

    effects: Sequence[Effect]
    start: int
    end: int
    over: asyncio.Future[None]
    outcomes: dict[int, Stored | Conflict | StoreRefused] = field(default_factory=dict)

    def store(self, index: int) -> Store:
        """Return one of them."""
        store = self.effects[self.start + index]
        assert isinstance(store, Store)
        return store


Send = Callable[[Sequence[Sequence[Ask]], Sequence[Sequence[Publish]]], None]


class Outbox:
    """What is to be sent at the end of this turn of the loop, by its subject (and how long an answer may take)."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._asks: dict[tuple[str, float], list[Ask]] = {}
        self._events: dict[str, list[Publish]] = {}

    def put(self, effect: Ask | Publish) -> None:
        """Have something sent with what else goes to its subject."""
        if not self._asks and not self._events:
            asyncio.get_running_loop().call_soon(self.flush)
        if isinstance(effect, Ask):
            self._asks.setdefault((effect.subject, effect.timeout_seconds), []).append(effect)
        else:
            self._events.setdefault(effect.subject, []).append(effect)

    def close(self) -> None:
        """Send nothing of what is still here."""
        self._asks.clear()
        self._events.clear()

    def flush(self) -> None:
        """Send all of it now."""
        asks, self._asks = self._asks, {}
        events, self._events = self._events, {}
        if asks or events:
            self._send([*asks.values()], [*events.values()])
