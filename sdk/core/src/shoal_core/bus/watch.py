"""Watching a bucket: all keys in bulk, then every change, through reconnects and restarts of the broker.

The stream is read by an ephemeral push consumer of the last message of each key. It is made anew (a new
*generation*, with a subject of its own, so that strays of the old one are told apart) whenever something may have been
missed: after a reconnect, on a gap in the consumer's numbers, and when its heartbeats stay away. A generation first
brings every key that exists; a key that was known and is not among them was deleted meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from shoal_core.bus.interface import CONTROL_STATUS, STATUS_HEADER, Message, Subscription, logger
from shoal_core.bus.jetstream import API, CALL_SECONDS, until_answered
from shoal_core.bus.keyvalue import Deleted, Entry, WatchCallback
from shoal_core.protocol.errors import BusError, ConnectionFailedError

if TYPE_CHECKING:
    from shoal_core.bus.keyvalue import JetStreamKeyValue

HEARTBEAT_SECONDS = 2.0
SILENCE_SECONDS = 6.0
SILENCE_WITHOUT_HEARTBEATS_SECONDS = 30.0
RETRY_SECONDS = 0.2
NANOSECONDS = 1_000_000_000


class Watch(ABC):
    """A bucket being watched."""

    @abstractmethod
    async def caught_up(self) -> None:
        """Wait until the callback has been called with every key that existed when the watch began."""

    @abstractmethod
    def stop(self) -> None:
        """End the watch: the callback is not called any more. Does nothing the second time."""


class JetStreamWatch(Watch):
    """A watch on a real broker; made by ``KeyValue.watch``."""

    def __init__(self, key_value: JetStreamKeyValue, callback: WatchCallback) -> None:
        self._key_value = key_value
        self._bus = key_value.jetstream.bus
        self._callback = callback
        self._known: dict[str, int] = {}
        self._unseen: set[str] | None = set()
        self._caught_up = asyncio.Event()
        self._stale = asyncio.Event()
        self._generation = 0
        self._consumer = ""
        self._consumer_sequence = 0
        self._heard_at = time.monotonic()
        self._subscription: Subscription | None = None
        self._task: asyncio.Task[None] | None = None
        self._end_listening = self._bus.on_connection(self._connection_changed)
        key_value.watches.add(self)

    async def begin(self) -> None:
        """Start the first generation; what goes wrong with it is raised to the caller."""
        try:
            await until_answered(self._start_generation)
        except BaseException:
            self.stop()
            raise
        self._task = self._bus.spawn(self._keep())

    async def caught_up(self) -> None:
        """Wait until the first generation has brought every key."""
        await self._caught_up.wait()

    def stop(self) -> None:
        """End the watch and its consumer."""
        self._key_value.watches.discard(self)
        self._end_listening()
        self._end_generation()
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _keep(self) -> None:
        """Start a new generation whenever something may have been missed."""
        hears = self._bus.hears_control_messages
        longest_seconds = SILENCE_SECONDS if hears else SILENCE_WITHOUT_HEARTBEATS_SECONDS
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self._stale.wait()
            silent_seconds = time.monotonic() - self._heard_at
            if not self._stale.is_set() and silent_seconds < longest_seconds:
                continue
            self._stale.clear()
            if not self._bus.connected:
                continue
            try:
                await self._start_generation()
            except (BusError, ConnectionFailedError) as error:
                logger.info("cannot watch %s yet: %s", self._key_value.bucket, error)
                self._stale.set()
                await asyncio.sleep(RETRY_SECONDS)

    async def _start_generation(self, timeout_seconds: float = CALL_SECONDS) -> None:
        """Make a consumer; from here on only its messages count."""
        self._end_generation()
        self._generation += 1
        generation = self._generation
        self._consumer_sequence = 0
        self._unseen = set(self._known)
        self._heard_at = time.monotonic()
        subject = f"{self._bus.inbox}.watch.{id(self):x}.{generation}"
        self._subscription = self._bus.subscribe(subject, lambda message: self._arrived(generation, message))
        answer = await self._key_value.jetstream.call(
            f"CONSUMER.CREATE.{self._key_value.stream}",
            {"stream_name": self._key_value.stream, "config": self._configuration(subject)},
            timeout_seconds,
        )
        self._consumer = answer["name"]
        nothing_sent = answer["num_pending"] == 0 and answer["delivered"]["consumer_seq"] == 0
        if nothing_sent and self._consumer_sequence == 0 and generation == self._generation:
            self._finish_bulk()

    def _configuration(self, subject: str) -> dict[str, Any]:
        """Return what to tell the broker of the consumer that delivers to ``subject``."""
        configuration: dict[str, Any] = {
            "deliver_subject": subject,
            "deliver_policy": "last_per_subject",
            "filter_subject": f"{self._key_value.prefix}{self._key_value.watched}",
            "ack_policy": "none",
            "max_deliver": 1,
            "mem_storage": True,
            "num_replicas": 1,
        }
        if self._bus.hears_control_messages:
            configuration |= {"flow_control": True, "idle_heartbeat": int(HEARTBEAT_SECONDS * NANOSECONDS)}
        return configuration

    def _end_generation(self) -> None:
        """Stop hearing the present consumer and have the broker drop it."""
        self._generation += 1
        if self._subscription is not None:
            self._subscription.unsubscribe()
            self._subscription = None
        if self._consumer and self._bus.connected:
            self._bus.publish(f"{API}.CONSUMER.DELETE.{self._key_value.stream}.{self._consumer}", b"")
        self._consumer = ""

    def _connection_changed(self, connected: bool) -> None:
        if connected:
            self._stale.set()

    def _arrived(self, generation: int, message: Message) -> None:
        """Take a message of the consumer: a key, or a word of its own."""
        if generation != self._generation:
            return
        self._heard_at = time.monotonic()
        headers = message.headers
        if headers is not None and headers.get(STATUS_HEADER) == CONTROL_STATUS:
            self._take_control(message, headers)
            return
        stream_sequence, consumer_sequence, pending = _numbers(message.reply)
        if consumer_sequence != self._consumer_sequence + 1:
            self._stale.set()
            return
        self._consumer_sequence = consumer_sequence
        deleted = self._key_value.is_gone(headers or {}, message.data)
        try:
            self._take(message.subject[len(self._key_value.prefix) :], message.data, stream_sequence, deleted)
        finally:
            if pending == 0 and self._unseen is not None:
                self._finish_bulk()

    def _take_control(self, message: Message, headers: dict[str, str]) -> None:
        """Answer flow control; on a heartbeat check that nothing was missed."""
        if message.reply:
            self._bus.publish(message.reply, b"")
            return
        if "Nats-Consumer-Stalled" in headers:
            self._bus.publish(headers["Nats-Consumer-Stalled"], b"")
        elif int(headers.get("Nats-Last-Consumer", "0")) != self._consumer_sequence:
            self._stale.set()
        elif self._unseen is not None:
            # Heartbeats are sent when nothing is left to send.
            self._finish_bulk()

    def wrote(self, key: str, revision: int) -> None:
        """Whoever watches has changed a key, and knows it: it is not told again."""
        if revision > self._known.get(key, 0):
            self._known[key] = revision

    def _take(self, key: str, value: bytes, revision: int, deleted: bool) -> None:
        """Pass on a key's state unless it was known already."""
        if self._unseen is not None and not deleted:
            self._unseen.discard(key)
        known = self._known.get(key, 0)
        if revision <= known:
            return
        if not deleted:
            self._known[key] = revision
            self._callback(Entry(key, value, revision))
            return
        self._known.pop(key, None)
        if self._unseen is not None:
            self._unseen.discard(key)
        if known or self._caught_up.is_set():
            self._callback(Deleted(key, revision))

    def _finish_bulk(self) -> None:
        """Every key that exists was seen: what was known before and not seen now is gone."""
        unseen, self._unseen = self._unseen, None
        for key in sorted(unseen or ()):
            self._callback(Deleted(key, self._known.pop(key)))
        self._caught_up.set()


def _numbers(reply: str) -> tuple[int, int, int]:
    """Return stream sequence, consumer sequence and number of messages still to come (``$JS.ACK...``, ADR-15)."""
    tokens = reply.split(".")
    first = 5 if len(tokens) == 9 else 7
    return int(tokens[first]), int(tokens[first + 1]), int(tokens[first + 3])
