"""The stock bus: nats-py through its public interface only. Slower; the fall-back where ``fast`` does not fit.

It is used for WebSocket addresses, and it is what remains when a new version of nats-py changes the private names that
``fast`` needs. Publishing is queued here, in order, and one task hands it to nats-py.

Where it differs: messages keep their order within a subscription only, JetStream's heartbeats stay inside nats-py, and
what nats-py has taken but not written when the connection breaks is sent after the reconnect.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription

from shoal_core.bus.backoff import Backoff
from shoal_core.bus.connection import dial
from shoal_core.bus.interface import (
    WRITE_BUFFER_BYTES,
    Bus,
    Callback,
    ErrorListener,
    Message,
    Subscription,
    check_subject,
    logger,
)
from shoal_core.protocol.errors import (
    BufferFullError,
    BusClosedError,
    ConnectionFailedError,
    DisconnectedError,
    RequestTimeoutError,
)

Operation = Callable[[], Awaitable[None]]
OPERATION_BYTES = 64
CLOSE_SECONDS = 2.0


class StockSubscription(Subscription):
    """A subscription of a ``StockBus``; ``inner`` is nats-py's, of the present client."""

    def __init__(self, bus: StockBus, subject: str, queue: str, callback: Callback) -> None:
        self.subject = subject
        self.queue = queue
        self.callback = callback
        self.ended = False
        self.inner: NatsSubscription | None = None
        self._bus = bus

    def unsubscribe(self) -> None:
        """End the interest at once."""
        if not self.ended:
            self.ended = True
            self._bus.end_subscription(self)

    async def arrived(self, message: Msg) -> None:
        """Hand a message of nats-py to the callback."""
        if self.ended:
            return
        try:
            self.callback(Message(message.subject, message.reply, message.data, message.headers))
        except (Exception, asyncio.CancelledError) as error:
            self._bus.callback_failed(error)


class StockBus(Bus):
    """A bus on nats-py's own client; made by ``connection.connect``."""

    hears_control_messages = False

    def __init__(self, identity: str, inbox: str, on_error: ErrorListener | None) -> None:
        super().__init__(identity, inbox, on_error)
        self._client = Client()
        self._backoff = Backoff()
        self._options: dict[str, Any] = {}
        self._address = ""
        self._timeout_seconds = 0.0
        self._closed = False
        self._subscriptions: dict[int, StockSubscription] = {}
        self._operations: deque[tuple[Operation, int, bool]] = deque()
        self._queued_bytes = 0
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._reply_subscription = self.subscribe(f"{self.inbox}.*", self._answer)

    async def open(self, options: dict[str, Any], address: str, timeout_seconds: float) -> None:
        """Connect for the first time (see ``connection.connect``)."""
        self._options = {
            **options,
            "reconnect_to_server_handler": self._backoff.choose,
            "disconnected_cb": self._disconnected,
            "reconnected_cb": self._reconnected,
            "closed_cb": self._client_closed,
        }
        self._address = address
        self._timeout_seconds = timeout_seconds
        await self._dial()
        self.spawn(self._carry_out())

    async def close(self) -> None:
        """Send what waits, and end the connection for good."""
        if self.connected:
            try:
                await self.flush(CLOSE_SECONDS)
            except (DisconnectedError, RequestTimeoutError) as error:
                logger.warning("the broker did not take what was left to write: %s", error)
        self._closed = True
        await self._client.close()
        if self.connected:
            self._connection_changed(False)
        await self._end_tasks()

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bool:
        """Queue a message for nats-py (see ``Bus.publish``)."""
        if self._closed:
            raise BusClosedError(f"cannot publish to {subject!r}: this process closed the connection")
        if not self.connected:
            self.dropped_messages += 1
            return False
        check_subject(subject)
        size = len(data)
        if size > self.max_payload:
            raise self._refuse_large(subject, size)
        if self._queued_bytes + size > WRITE_BUFFER_BYTES:
            raise BufferFullError(
                f"{self._queued_bytes} bytes wait to be written to the broker, which does not read as fast as this "
                f"process writes; a message of {size} bytes on {subject!r} was refused"
            )
        fields = dict(headers) if headers else None

        async def send() -> None:
            if self._client.is_connected:
                await self._client.publish(subject, data, reply=reply, headers=fields)
            else:
                self.dropped_messages += 1

        self._queue(send, size + OPERATION_BYTES, droppable=True)
        return True

    def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Queue a subscription for nats-py (see ``Bus.subscribe``)."""
        if self._closed:
            raise BusClosedError(f"cannot subscribe to {subject!r}: this process closed the connection")
        check_subject(subject)
        subscription = StockSubscription(self, subject, queue, callback)
        self._subscriptions[id(subscription)] = subscription
        if self.connected:
            self._queue(lambda: self._begin(subscription), OPERATION_BYTES, droppable=False)
        return subscription

    def end_subscription(self, subscription: StockSubscription) -> None:
        """Forget a subscription and tell nats-py, behind what was published before."""
        self._subscriptions.pop(id(subscription), None)

        async def end() -> None:
            if subscription.inner is not None and not self._client.is_closed:
                await subscription.inner.unsubscribe()

        if not self._closed:
            self._queue(end, OPERATION_BYTES, droppable=False)

    async def flush(self, timeout_seconds: float = 5) -> None:
        """Wait for everything to be handed over, and for a PING to come back (see ``Bus.flush``)."""
        if not self.connected:
            raise DisconnectedError("cannot flush: the connection to the broker is down")
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()
                await self._client.flush(max(1, round(timeout_seconds)))
                await self._delivered()
        except (TimeoutError, nats_errors.Error, asyncio.CancelledError) as error:
            if not self.connected:
                raise DisconnectedError("the connection to the broker broke during a flush") from None
            if isinstance(error, asyncio.CancelledError):
                raise
            raise RequestTimeoutError(f"the broker did not answer a PING within {timeout_seconds:g} s") from None

    async def _delivered(self) -> None:
        """Let nats-py's tasks hand over what has arrived; it tells nobody when they have."""
        while any(s.inner is not None and s.inner.pending_msgs for s in self._subscriptions.values()):  # noqa: ASYNC110
            await asyncio.sleep(0)

    async def drain(self) -> None:
        """End all subscriptions, deliver what is on its way, send what was published (see ``Bus.drain``)."""
        if not self.connected:
            for subscription in list(self._subscriptions.values()):
                if subscription is not self._reply_subscription:
                    subscription.unsubscribe()
            return
        await self.flush()
        for key, subscription in list(self._subscriptions.items()):
            if subscription is not self._reply_subscription and subscription.inner is not None:
                await subscription.inner.drain()  # type: ignore[no-untyped-call]
                del self._subscriptions[key]
        await self.flush()

    def callback_failed(self, error: BaseException) -> None:
        """Report a callback that raised."""
        logger.error("a callback of %s raised", self.identity, exc_info=error)
        self._report(error)

    # -- inside

    def _queue(self, operation: Operation, size_bytes: int, droppable: bool) -> None:
        self._operations.append((operation, size_bytes, droppable))
        self._queued_bytes += size_bytes
        self._work.set()
        self._idle.clear()

    async def _carry_out(self) -> None:
        """Hand queued operations to nats-py, in order, as long as the bus lives."""
        while True:
            await self._work.wait()
            while self._operations:
                operation, size_bytes, droppable = self._operations.popleft()
                self._queued_bytes -= size_bytes
                try:
                    await operation()
                except nats_errors.Error as error:
                    # The connection broke between queueing and sending: the message is lost, as it may be.
                    logger.debug("not sent: %s", error)
                    self.dropped_messages += droppable
            self._work.clear()
            self._idle.set()

    async def _begin(self, subscription: StockSubscription) -> None:
        """Have nats-py subscribe, unless it was ended meanwhile."""
        if not subscription.ended:
            subscription.inner = await self._client.subscribe(
                subscription.subject, queue=subscription.queue, cb=subscription.arrived
            )

    async def _dial(self) -> None:
        """Connect nats-py's client and subscribe to everything on it."""
        await dial(self._client, self._options, self._address, self._timeout_seconds, self._client_failed)
        self._note_server()
        for subscription in list(self._subscriptions.values()):
            await self._begin(subscription)
        self.connected = True

    def _note_server(self) -> None:
        """Remember what the broker says of itself."""
        version = self._client.connected_server_version
        self.server_version = f"{version.major}.{version.minor}.{version.patch}"
        self.max_payload = self._client.max_payload
        # nats-py shows this nowhere in public; should the private name change one day, nothing worse than a slower
        # error comes of it.
        info = getattr(self._client, "_server_info", {"jetstream": True})
        self.has_jetstream = bool(info.get("jetstream", False))
        self._backoff.connected()

    async def _disconnected(self) -> None:
        """The connection is gone: drop what waits to be published, fail what is in flight."""
        if self._closed or not self.connected:
            return
        kept = [operation for operation in self._operations if not operation[2]]
        self.dropped_messages += len(self._operations) - len(kept)
        self._operations = deque(kept)
        self._queued_bytes = sum(size_bytes for _, size_bytes, _ in kept)
        self._connection_changed(False)

    async def _reconnected(self) -> None:
        """A broker was found again, and nats-py has sent the subscriptions."""
        self._note_server()
        known = list(self._subscriptions.values())
        for subscription in known:
            if subscription.inner is None:
                await self._begin(subscription)
        self._connection_changed(True)

    async def _client_closed(self) -> None:
        """nats-py gave up (it does so on some errors of the broker): begin anew with another client."""
        if not self._closed and self._options:
            self.spawn(self._begin_anew())

    async def _begin_anew(self) -> None:
        """Dial with a fresh client until a broker is found."""
        while True:
            self._client = Client()
            await asyncio.sleep(self._backoff.pause_seconds())
            try:
                await self._dial()
            except ConnectionFailedError as error:
                self._report(error)
                continue
            self._connection_changed(True)
            return

    async def _client_failed(self, error: Exception) -> None:
        """Report what nats-py complains of; failed attempts to reconnect are normal."""
        if isinstance(error, nats_errors.SlowConsumerError):
            self._report(error)
        elif type(error) is nats_errors.Error:
            self._complain(str(error))
        else:
            logger.info("%s cannot reach the broker: %s", self.identity, error or type(error).__name__)
