"""The in-memory twin of a broker, for tests: the same behaviour as a real one, permissions and JetStream included.

Messages are routed when they are published and delivered in a later turn of the loop, in order. Connections can be cut
and joined again by hand. There is no time in it: it sends no heartbeats.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping

from shoal_core.bus.interface import (
    NO_RESPONDERS_STATUS,
    STATUS_HEADER,
    Bus,
    Callback,
    ErrorListener,
    Message,
    Subscription,
    check_subject,
    logger,
)
from shoal_core.bus.memory_jetstream import MemoryJetStream
from shoal_core.bus.subject_patterns import covers, matches
from shoal_core.bus.wire import format_headers
from shoal_core.protocol.errors import BusClosedError, DisconnectedError, PermissionViolationError
from shoal_core.protocol.subjects import Permissions, Role, Subjects, permissions

VERSION = "2.10.0-memory"
ROUTES = 10_000


class MemorySubscription(Subscription):
    """A subscription of a ``MemoryBus``; ``allowed`` is False where the twin refused it."""

    def __init__(self, bus: MemoryBus, subject: str, queue: str, callback: Callback) -> None:
        self.bus = bus
        self.tokens = subject.split(".")
        self.queue = queue
        self.callback = callback
        self.allowed = True

    def unsubscribe(self) -> None:
        """End the interest at once."""
        self.bus.end_subscription(self)


class MemoryBroker:
    """A broker in this process, for one event loop."""

    def __init__(self, *, max_payload: int = 1024 * 1024, jetstream: bool = True) -> None:
        self.max_payload = max_payload
        self._buses: list[MemoryBus] = []
        self._routes: dict[str, tuple[list[MemorySubscription], dict[str, list[MemorySubscription]]]] = {}
        self._turns: dict[str, int] = {}
        self._deliveries: deque[tuple[MemorySubscription, int, Message]] = deque()
        self._delivery_is_due = False
        self.has_jetstream = jetstream
        self._jetstream = MemoryJetStream(self.route) if jetstream else None

    def connect(self, *, role: Role, identity: str, cluster: str, on_error: ErrorListener | None = None) -> MemoryBus:
        """Return a new connection, with what ``role`` is allowed."""
        bus = MemoryBus(self, identity, Subjects(cluster).inbox(role, identity), permissions(cluster, role), on_error)
        self._buses.append(bus)
        return bus

    def disconnect(self, bus: MemoryBus) -> None:
        """Cut a connection: what was on its way to it is lost."""
        if bus.connected:
            bus.life += 1
            self._routes.clear()
            bus.change(False)

    def reconnect(self, bus: MemoryBus) -> None:
        """Join a connection again."""
        if not bus.connected and not bus.closed:
            bus.connected = True
            self._routes.clear()
            bus.change(True)

    def restart(self) -> None:
        """Cut all connections and join them again; JetStream keeps what it stored, and forgets its consumers."""
        buses = [bus for bus in self._buses if bus.connected]
        for bus in buses:
            self.disconnect(bus)
        if self._jetstream is not None:
            self._jetstream.forget_consumers()
        for bus in buses:
            self.reconnect(bus)

    def remove(self, bus: MemoryBus) -> None:
        """Forget a connection that was closed."""
        self._buses.remove(bus)
        self._routes.clear()

    def subscriptions_changed(self) -> None:
        """Forget who hears what."""
        self._routes.clear()

    def route(self, destination: str, message: Message) -> bool:
        """Queue a message for everyone who hears ``destination``; return whether anyone does.

        That is the message's own subject, but for what a consumer of JetStream delivers.
        """
        everyone, groups = self._heard_by(destination)
        for subscription in everyone:
            self._deliver(subscription, message)
        for queue, members in groups.items():
            turn = self._turns.get(queue, 0)
            self._turns[queue] = turn + 1
            self._deliver(members[turn % len(members)], message)
        stored = self._jetstream is not None and self._jetstream.take(destination, message)
        return bool(everyone or groups or stored)

    def _heard_by(self, subject: str) -> tuple[list[MemorySubscription], dict[str, list[MemorySubscription]]]:
        """Return who hears a subject: those that all do, and the queue groups."""
        route = self._routes.get(subject)
        if route is None:
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            route = self._routes[subject] = ([], {})
            tokens = subject.split(".")
            for bus in self._buses:
                for subscription in bus.subscriptions if bus.connected else ():
                    if not subscription.allowed or not matches(subscription.tokens, tokens):
                        continue
                    if subscription.queue:
                        route[1].setdefault(subscription.queue, []).append(subscription)
                    else:
                        route[0].append(subscription)
        return route

    def _deliver(self, subscription: MemorySubscription, message: Message) -> None:
        self._deliveries.append((subscription, subscription.bus.life, message))
        if not self._delivery_is_due:
            self._delivery_is_due = True
            asyncio.get_running_loop().call_soon(self._deliver_all)

    def _deliver_all(self) -> None:
        """Call the callbacks for what was published up to now; what they publish comes in a later turn."""
        self._delivery_is_due = False
        deliveries, self._deliveries = self._deliveries, deque()
        for subscription, life, message in deliveries:
            subscription.bus.deliver(subscription, life, message)


class MemoryBus(Bus):
    """A connection to a ``MemoryBroker``."""

    hears_control_messages = False

    def __init__(
        self,
        broker: MemoryBroker,
        identity: str,
        inbox: str,
        allowed: Permissions,
        on_error: ErrorListener | None,
    ) -> None:
        super().__init__(identity, inbox, on_error)
        self.max_payload = broker.max_payload
        self.server_version = VERSION
        self.has_jetstream = broker.has_jetstream
        self.connected = True
        self.closed = False
        self.life = 0
        self.subscriptions: dict[MemorySubscription, None] = {}
        self._broker = broker
        self._may_publish = [pattern.split(".") for pattern in allowed.publish]
        self._may_subscribe = [pattern.split(".") for pattern in allowed.subscribe]
        self._publish_checks: dict[str, bool] = {}
        self._reply_subscription = self.subscribe(f"{self.inbox}.*", self._answer)

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bool:
        """Route a message (see ``Bus.publish``)."""
        if self.closed:
            raise BusClosedError(f"cannot publish to {subject!r}: this process closed the connection")
        if not self.connected:
            self.dropped_messages += 1
            return False
        check_subject(subject)
        size = len(data) + (len(format_headers(dict(headers))) if headers else 0)
        if size > self.max_payload:
            raise self._refuse_large(subject, size)
        if not self._is_allowed(subject):
            self._forbidden(subject, PermissionViolationError(f"{self.identity} may not publish to {subject!r}"))
            return True
        message = Message(subject, reply, data, dict(headers) if headers else None)
        if not self._broker.route(subject, message) and reply:
            self._broker.route(reply, Message(reply, "", b"", {STATUS_HEADER: NO_RESPONDERS_STATUS}))
        return True

    def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Hear a subject (see ``Bus.subscribe``)."""
        if self.closed:
            raise BusClosedError(f"cannot subscribe to {subject!r}: this process closed the connection")
        check_subject(subject)
        subscription = MemorySubscription(self, subject, queue, callback)
        if not any(covers(allowed, subscription.tokens) for allowed in self._may_subscribe):
            subscription.allowed = False
            self._report(PermissionViolationError(f"{self.identity} may not subscribe to {subject!r}"))
        self.subscriptions[subscription] = None
        self._broker.subscriptions_changed()
        return subscription

    def end_subscription(self, subscription: MemorySubscription) -> None:
        """Forget a subscription."""
        self.subscriptions.pop(subscription, None)
        self._broker.subscriptions_changed()

    async def flush(self, timeout_seconds: float = 5) -> None:
        """Wait until what was published up to now, and what the callbacks answered at once, is delivered."""
        if not self.connected:
            raise DisconnectedError("cannot flush: the connection to the broker is down")
        life = self.life
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if life != self.life:
            raise DisconnectedError("the connection to the broker broke during a flush")

    async def drain(self) -> None:
        """End all subscriptions, once what is on its way is delivered (see ``Bus.drain``)."""
        if self.connected:
            await self.flush()
        for subscription in list(self.subscriptions):
            if subscription is not self._reply_subscription:
                subscription.unsubscribe()

    async def close(self) -> None:
        """End the connection for good."""
        if self.closed:
            return
        self.closed = True
        self.life += 1
        if self.connected:
            self.change(False)
        self._broker.remove(self)
        await self._end_tasks()

    async def __aenter__(self) -> MemoryBus:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def change(self, connected: bool) -> None:
        """Note that the connection was cut or joined again."""
        self._connection_changed(connected)

    def deliver(self, subscription: MemorySubscription, life: int, message: Message) -> None:
        """Call a callback, unless the connection was cut or the interest ended meanwhile."""
        if life != self.life or subscription not in self.subscriptions:
            return
        try:
            subscription.callback(message)
        except (Exception, asyncio.CancelledError) as error:
            logger.error("a callback of %s raised", self.identity, exc_info=error)
            self._report(error)

    def _is_allowed(self, subject: str) -> bool:
        """Tell whether this connection may publish to a subject."""
        known = self._publish_checks.get(subject)
        if known is None:
            if len(self._publish_checks) >= ROUTES:
                self._publish_checks.clear()
            tokens = subject.split(".")
            known = any(matches(allowed, tokens) for allowed in self._may_publish)
            self._publish_checks[subject] = known
        return known
