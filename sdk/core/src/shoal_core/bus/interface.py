"""What a bus is: one connection to a broker, on which subjects carry messages between processes.

Three implementations behave alike and pass one suite of tests: ``fast`` (nats-py with its read and write path
replaced), ``stock`` (nats-py as it comes) and ``memory`` (an in-memory twin for tests).

A bus belongs to one event loop and is used on its thread only. It delivers at most once: what is published while the
connection is down is dropped, counted, and said so by the return value; nothing is sent later that was asked for
before. Whoever needs more builds it on top (see ``protocol.channel``).

Callbacks are plain functions and only enqueue. They are called in the order in which the broker sent the messages, on
the loop's thread. An exception that leaves one is a bug of the callback: it is reported, and the subscription lives on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from shoal_core.protocol.errors import (
    AuthenticationError,
    BusError,
    DisconnectedError,
    NoRespondersError,
    PayloadTooLargeError,
    PermissionViolationError,
    RequestTimeoutError,
    ShoalError,
)
from shoal_core.protocol.subjects import all_inboxes

if TYPE_CHECKING:
    from shoal_core.bus.keyvalue import KeyValue

logger = logging.getLogger("shoal.bus")

WRITE_BUFFER_BYTES = 64 * 1024 * 1024
CANCEL_AGAIN_SECONDS = 0.5
STATUS_HEADER = "Status"
DESCRIPTION_HEADER = "Description"
NO_RESPONDERS_STATUS = "503"
CONTROL_STATUS = "100"
FORBIDDEN_PUBLISH = re.compile(r'permissions violation for publish to "([^"]*)"', re.IGNORECASE)

ErrorListener = Callable[[BaseException], None]
ConnectionListener = Callable[[bool], None]


class Message(msgspec.Struct, gc=False):
    """What arrives on a subject. ``reply`` is where an answer goes ("" if none is wanted)."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None = None


Callback = Callable[[Message], None]
Settled = Callable[[Message | BusError], None]
"""Takes the answer to a request, or the error that came instead."""


class Subscription(ABC):
    """Interest in a subject; it outlives reconnects until it is ended."""

    @abstractmethod
    def unsubscribe(self) -> None:
        """End the interest at once: no callback is called any more. Does nothing the second time."""


def log_error(error: BaseException) -> None:
    """Log an error that nobody listens for."""
    logger.error("%s: %s", type(error).__name__, error, exc_info=error)


class Bus(ABC):
    """One connection to a broker.

    ``identity`` names this end in the cluster and ``inbox`` is the prefix of subjects of this one connection.
    ``has_jetstream`` is what the server at the other end says of itself; in a cluster of brokers another one may have
    JetStream all the same. ``dropped_messages`` counts what was published while the connection was down.
    """

    identity: str
    inbox: str
    max_payload: int
    connected: bool
    server_version: str
    has_jetstream: bool
    dropped_messages: int

    hears_control_messages = True
    """Whether JetStream's heartbeats and flow control reach the callbacks of a subscription."""

    def __init__(self, identity: str, inbox: str, on_error: ErrorListener | None) -> None:
        self.identity = identity
        # Two connections of one identity must not get each other's answers.
        self.inbox = f"{inbox}.{secrets.token_hex(4)}"
        self.max_payload = 1024 * 1024
        self.connected = False
        self.server_version = ""
        self.has_jetstream = True
        self.dropped_messages = 0
        self._on_error = on_error or log_error
        self._loop = asyncio.get_running_loop()
        self._connection_listeners: dict[int, ConnectionListener] = {}
        self._listener_count = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests: dict[str, tuple[Settled, str, asyncio.TimerHandle]] = {}
        self._request_count = 0
        self._all_inboxes = all_inboxes(inbox)
        self._reply_prefix = f"{self.inbox}."
        self._reply_prefix_length = len(self._reply_prefix)

    @abstractmethod
    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bool:
        """Send a message without waiting; return whether it was taken (not: whether it arrived).

        What is published in one turn of the loop leaves in one write, in order. While the connection is down the
        message is dropped and False returned. Raises ``PayloadTooLargeError``, ``BufferFullError`` (64 MiB wait to be
        written) and ``BusClosedError``.
        """

    def answer(self, reply: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> bool:
        """Publish an answer to whoever asked, as ``publish`` does; False where ``reply`` is no inbox of the cluster.

        Who asks chooses ``reply``, and must not have anything said by our permissions that its own do not allow.
        """
        return reply.startswith(self._all_inboxes) and self.publish(reply, data, headers=headers)

    def begin_turn(self) -> None:  # noqa: B027 - a bus may have no use for it
        """Have what is published until ``end_turn`` wait for that, and not for a turn of the loop of its own.

        Nothing may be awaited in between. Both come of themselves around what one read of the socket brings.
        """

    def end_turn(self) -> None:  # noqa: B027
        """Do what waits for the end of the turn, then write what was published."""

    def at_end_of_turn(self, callback: Callable[[], None]) -> None:
        """Call back once, when the turn ends; outside of one soon, as the loop's ``call_soon`` does."""
        self._loop.call_soon(callback)

    @abstractmethod
    def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Have ``callback`` called with every message on ``subject`` (``*`` one token, ``>`` the rest).

        Of all subscriptions with the same ``queue`` name only one gets each message. Takes effect in the order of the
        publishes of this connection; ``flush`` to know that the broker has it.
        """

    @abstractmethod
    async def flush(self, timeout_seconds: float = 5) -> None:
        """Wait until the broker has processed everything sent so far, and its answers to that were delivered.

        Raises ``DisconnectedError`` and ``RequestTimeoutError``.
        """

    @abstractmethod
    async def drain(self) -> None:
        """End all subscriptions and wait until what was on its way is delivered and everything published is sent.

        Answers to requests still arrive, and one may still publish. A connection that is down has nothing to drain.
        """

    async def request(
        self, subject: str, data: bytes, *, timeout_seconds: float, headers: Mapping[str, str] | None = None
    ) -> Message:
        """Send a message and wait for its answer.

        Raises ``NoRespondersError`` at once when nobody listens, ``DisconnectedError`` at once when the connection is
        or goes down (the request may or may not have been carried out), ``PermissionViolationError`` when the broker
        forbids the subject, and ``RequestTimeoutError``.
        """
        future: asyncio.Future[Message] = self._loop.create_future()
        token = self.call(subject, data, partial(_settle, future), timeout_seconds=timeout_seconds, headers=headers)
        try:
            return await future
        finally:
            self._settled(token)

    def call(
        self,
        subject: str,
        data: bytes,
        settled: Settled,
        *,
        timeout_seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Send a request without waiting; ``settled`` is called once, with its answer or with an error of ``request``.

        Raises, and calls nothing, where the request cannot be sent. Returns the request's name on this connection.
        """
        self._request_count += 1
        token = str(self._request_count)
        timer = self._loop.call_later(timeout_seconds, self._expire, token, timeout_seconds)
        self._requests[token] = settled, subject, timer
        try:
            if not self.publish(subject, data, reply=self._reply_prefix + token, headers=headers):
                raise DisconnectedError(f"cannot ask {subject!r}: the connection to the broker is down")
        except BaseException:
            self._settled(token)
            raise
        return token

    async def key_value(self, bucket: str, *, create: bool = True, memory: bool = False, replicas: int = 1) -> KeyValue:
        """Open a bucket of the broker's key-value store, making it first if ``create`` is set and it does not exist.

        Raises ``JetStreamUnavailableError`` where the broker runs without JetStream.
        """
        from shoal_core.bus.keyvalue import open_bucket

        return await open_bucket(self, bucket, create=create, memory=memory, replicas=replicas)

    def on_connection(self, listener: ConnectionListener) -> Callable[[], None]:
        """Have ``listener`` called with False at a disconnect and with True after a reconnect.

        At True the subscriptions were already sent again. Returns a function that ends this.
        """
        self._listener_count += 1
        number = self._listener_count
        self._connection_listeners[number] = listener

        def end() -> None:
            self._connection_listeners.pop(number, None)

        return end

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a coroutine of this package beside the bus, until the bus closes; what it raises is reported."""
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._report(error)

    async def _end_tasks(self) -> None:
        """Cancel what was spawned and wait for its end.

        Again and again, since nats-py's own waiting (``asyncio.wait_for`` of Python 3.11) may swallow a cancellation.
        """
        tasks = self._tasks - {asyncio.current_task()}
        while tasks:
            for task in tasks:
                task.cancel()
            _, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_SECONDS)

    def _answer(self, message: Message) -> None:
        """Hand an answer to whoever waits for it; a late one is dropped."""
        waiting = self._settled(message.subject[self._reply_prefix_length :])
        if waiting is None:
            return
        settled, subject, _ = waiting
        headers = message.headers
        if headers is not None and not message.data and headers.get(STATUS_HEADER) == NO_RESPONDERS_STATUS:
            settled(NoRespondersError(f"nobody listens on {subject!r}"))
        else:
            settled(message)

    def _settled(self, token: str) -> tuple[Settled, str, asyncio.TimerHandle] | None:
        """A request waits no more: return what was known of it, if it has waited."""
        waiting = self._requests.pop(token, None)
        if waiting is not None:
            waiting[2].cancel()
        return waiting

    def _expire(self, token: str, timeout_seconds: float) -> None:
        """Fail a request whose time is over."""
        settled, subject, _ = self._requests.pop(token)
        settled(RequestTimeoutError(f"no answer on {subject!r} within {timeout_seconds:g} s"))

    def _fail_requests(self, tokens: Iterable[str], kind: type[BusError], text: str) -> None:
        """Fail requests that nobody will answer, each with an error of its own."""
        for token in list(tokens):
            waiting = self._settled(token)
            if waiting is not None:
                try:
                    waiting[0](kind(text))
                except Exception as failure:
                    self._report(failure)

    def _connection_changed(self, connected: bool) -> None:
        """Note the connection's state; at a loss fail all requests in flight; tell the listeners."""
        self.connected = connected
        if not connected:
            text = (
                "the connection to the broker broke while a request was in flight; it may or may not have been carried "
                "out"
            )
            self._fail_requests(self._requests, DisconnectedError, text)
        for listener in list(self._connection_listeners.values()):
            try:
                listener(connected)
            except Exception as error:
                self._report(error)

    def _forbidden(self, subject: str, error: PermissionViolationError) -> None:
        """Report a publish that the broker forbade; requests on the subject fail at once, nobody will answer them."""
        asking = [token for token, (_, asked, _) in self._requests.items() if asked == subject]
        self._fail_requests(asking, PermissionViolationError, str(error))
        self._report(error)

    def _refuse_large(self, subject: str, size_bytes: int) -> PayloadTooLargeError:
        """Return the error for a message that the broker would not take."""
        return PayloadTooLargeError(
            f"a message of {size_bytes} bytes on {subject!r} is over the broker's max_payload of {self.max_payload} "
            "bytes; send it in parts"
        )

    def _complain(self, text: str) -> None:
        """Take an error that the broker sent outside any request."""
        error = complaint(self.identity, text)
        forbidden = FORBIDDEN_PUBLISH.search(text)
        if isinstance(error, PermissionViolationError) and forbidden is not None:
            self._forbidden(forbidden[1], error)
        else:
            self._report(error)

    def _report(self, error: BaseException) -> None:
        """Tell the owner of the bus of an error that no caller waits for; without one it is logged."""
        try:
            self._on_error(error)
        except Exception as second:
            log_error(error)
            log_error(second)


def _settle(future: asyncio.Future[Message], answer: Message | BusError) -> None:
    """Give whoever awaits a request its answer, or raise the error there."""
    if future.done():
        return
    if isinstance(answer, Message):
        future.set_result(answer)
    else:
        future.set_exception(answer)


def is_refusal(text: str) -> bool:
    """Tell whether an error of the broker means that it refused the credential."""
    return "authorization" in text.lower() or "authentication" in text.lower()


def complaint(identity: str, text: str) -> ShoalError:
    """Return what an error that the broker sent outside any request means."""
    if "permissions violation" in text.lower():
        return PermissionViolationError(f"the broker does not allow {identity} to do that: {text}")
    if is_refusal(text):
        return AuthenticationError(f"the broker refuses the credential of {identity}: {text}")
    return BusError(f"the broker complained to {identity}: {text}")


def check_subject(subject: str) -> None:
    """Refuse a subject that would break the line protocol: empty, with blanks or control characters."""
    if not subject or " " in subject or not subject.isprintable():
        raise ValueError(f"not a subject: {subject!r} (empty, or with blanks or control characters)")
