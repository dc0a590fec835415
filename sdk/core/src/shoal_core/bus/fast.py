"""The fast bus: nats-py dials, shakes hands and finds servers again; everything else happens here.

After each handshake the transport's protocol is swapped for ``WireProtocol`` (see ``wire``), and nats-py's reading and
flushing tasks are ended before they began. What is published in one turn of the loop is joined and written once. While
the socket does not take more (``pause_writing``) it waits here, up to ``WRITE_BUFFER_BYTES``.

This leans on private names of nats-py 2.16; a contract test lists and holds them, and ``stock`` does without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from nats import errors as nats_errors
from nats.aio.client import Client
from nats.aio.transport import TcpTransport

from shoal_core.bus.backoff import LONGEST_PAUSE_SECONDS, Backoff
from shoal_core.bus.connection import dial
from shoal_core.bus.interface import (
    WRITE_BUFFER_BYTES,
    Bus,
    Callback,
    ErrorListener,
    Subscription,
    check_subject,
    is_refusal,
    logger,
)
from shoal_core.bus.wire import WireProtocol, WireProtocolError, format_headers
from shoal_core.protocol.errors import (
    BufferFullError,
    BusClosedError,
    DisconnectedError,
    RequestTimeoutError,
)

SOCKET_BUFFER_BYTES = 4 * 1024 * 1024
JOIN_BYTES = 256 * 1024
CLOSE_SECONDS = 2.0


class FastClient(Client):
    """nats-py's client, with its reading and writing taken over by a ``FastBus``."""

    def __init__(self, bus: FastBus) -> None:
        super().__init__()
        self._bus = bus

    async def _process_connect_init(self) -> None:
        """Shake hands; where that fails, cut the connection, which nats-py does not where it reconnects.

        Where the broker refuses the credential nats-py closes it, but waits for nothing, and by TLS that takes a while.
        """
        try:
            await self.shake_hands()
        except BaseException:
            # A proxy before a broker that is away takes a connection at each attempt.
            if isinstance(self._transport, TcpTransport) and self._transport._io_writer is not None:
                self._transport._io_writer.transport.abort()
            raise

    async def shake_hands(self) -> None:
        """Do what nats-py does at first, then hand the connection to the bus."""
        await super()._process_connect_init()
        # Their first step has not run yet: nobody has read a byte past the handshake.
        for task in (self._reading_task, self._flusher_task):
            if task is not None:
                task.cancel()
        self._reading_task = self._flusher_task = None
        try:
            self.hand_over()
        except Exception:
            if self._ping_interval_task is not None:
                self._ping_interval_task.cancel()
            raise

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Take what the broker says of itself; go no further without TLS where TLS was asked for."""
        if initial_connection and "tls" in self.options and not info.get("tls_required"):
            raise nats_errors.Error("nats: TLS was asked for, but the broker does not offer it")
        await super()._process_info(info, initial_connection)

    def hand_over(self) -> None:
        """Swap the protocol on the transport, and give the bus what has arrived meanwhile."""
        if self._status != Client.CONNECTED or not isinstance(self._transport, TcpTransport):
            raise nats_errors.Error("nats: the broker closed the connection during the handshake")
        reader, writer = self._transport._io_reader, self._transport._io_writer
        if reader is None or writer is None:
            raise nats_errors.Error("nats: the transport has no stream")
        leftover = bytes(reader._buffer)  # type: ignore[attr-defined]
        reader._buffer.clear()  # type: ignore[attr-defined]
        if reader.at_eof() or writer.transport.is_closing():
            raise ConnectionResetError("the broker closed the connection during the handshake")
        transport = writer.transport
        protocol = WireProtocol(self._bus, transport.get_protocol())
        protocol.transport = transport
        transport.set_write_buffer_limits(high=SOCKET_BUFFER_BYTES)
        transport.set_protocol(protocol)
        self._bus.opened(protocol, transport, self._server_info)
        if leftover:
            protocol.data_received(leftover)

    async def _process_op_err(self, e: Exception) -> None:
        """Give up the connection at once: closing in good order would wait for a broker that may never read again."""
        self._bus.abort()
        await super()._process_op_err(e)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """Send a PING behind everything that was published before it."""
        self._bus.send_ping(future or asyncio.get_running_loop().create_future())

    async def _attempt_reconnect(self) -> None:
        """Find a broker again, whatever goes wrong on the way; only closing ends this."""
        while not self.is_closed:
            try:
                await super()._attempt_reconnect()
                return
            except Exception as error:
                self._bus.report(error)
                await asyncio.sleep(LONGEST_PAUSE_SECONDS)


class FastSubscription(Subscription):
    """A subscription of a ``FastBus``."""

    __slots__ = ("_bus", "_sid", "line")

    def __init__(self, bus: FastBus, sid: str, line: bytes) -> None:
        self._bus = bus
        self._sid = sid
        self.line = line

    def unsubscribe(self) -> None:
        """End the interest at once."""
        self._bus.end_subscription(self._sid)


class FastBus(Bus):
    """A bus on a ``FastClient``; made by ``connection.connect``."""

    def __init__(self, identity: str, inbox: str, on_error: ErrorListener | None) -> None:
        super().__init__(identity, inbox, on_error)
        self.client = FastClient(self)
        self.backoff = Backoff()
        self.callbacks: dict[str, Callback] = {}
        self._subscriptions: dict[str, FastSubscription] = {}
        self._sid_count = 0
        self._closed = False
        self._transport: asyncio.WriteTransport | None = None
        self._protocol: WireProtocol | None = None
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._writable = True
        self._write_is_due = False
        self._in_turn = False
        self._ending: list[Callable[[], None]] = []
        self._pings: list[asyncio.Future[bool]] = []
        self._was_connected = False
        self._last_refusal = ""
        self._reply_subscription = self.subscribe(f"{self.inbox}.*", self._answer)

    # -- what users call

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bool:
        """Send a message without waiting (see ``Bus.publish``)."""
        if not self.connected:
            return self._drop(subject)
        if " " in subject or not subject.isprintable() or not subject:
            check_subject(subject)
        size = len(data)
        if headers:
            block = format_headers(dict(headers))
            size += len(block)
            head = f"HPUB {subject} {reply} {len(block)} {size}\r\n".encode() + block
        elif reply:
            head = f"PUB {subject} {reply} {size}\r\n".encode()
        else:
            head = f"PUB {subject} {size}\r\n".encode()
        if size > self.max_payload:
            raise self._refuse_large(subject, size)
        out_bytes = self._out_bytes + size + len(head)
        if out_bytes > WRITE_BUFFER_BYTES:
            raise BufferFullError(
                f"{self._out_bytes} bytes wait to be written to the broker, which does not read as fast as this "
                f"process writes; a message of {size} bytes on {subject!r} was refused"
            )
        self._out_bytes = out_bytes
        self._out += (head, data, b"\r\n")
        if not self._write_is_due:
            self._write_is_due = True
            self._loop.call_soon(self._write)
        return True

    def begin_turn(self) -> None:
        """Write what is published from now on when the turn ends (see ``Bus.begin_turn``)."""
        self._in_turn = True
        self._write_is_due = True

    def end_turn(self) -> None:
        """Call those who waited for the end of the turn, and write what was published (see ``Bus.end_turn``)."""
        while self._ending:
            ending, self._ending = self._ending, []
            for callback in ending:
                try:
                    callback()
                except Exception as error:
                    self.callback_failed(error)
        self._in_turn = False
        self._write()

    def at_end_of_turn(self, callback: Callable[[], None]) -> None:
        """Call back when the turn ends (see ``Bus.at_end_of_turn``)."""
        if self._in_turn:
            self._ending.append(callback)
        else:
            self._loop.call_soon(callback)

    def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Have ``callback`` called with every message on ``subject`` (see ``Bus.subscribe``)."""
        if self._closed:
            raise BusClosedError(f"cannot subscribe to {subject!r}: this process closed the connection")
        check_subject(subject)
        if queue:
            check_subject(queue)
        self._sid_count += 1
        sid = str(self._sid_count)
        line = f"SUB {subject} {queue} {sid}\r\n".encode() if queue else f"SUB {subject} {sid}\r\n".encode()
        subscription = FastSubscription(self, sid, line)
        self._subscriptions[sid] = subscription
        self.callbacks[sid] = callback
        self._send(line)
        return subscription

    def end_subscription(self, sid: str) -> None:
        """Forget a subscription and tell the broker."""
        if self._subscriptions.pop(sid, None) is not None:
            del self.callbacks[sid]
            self._send(f"UNSUB {sid}\r\n".encode())

    async def flush(self, timeout_seconds: float = 5) -> None:
        """Wait for a PING to come back (see ``Bus.flush``)."""
        if not self.connected:
            raise DisconnectedError("cannot flush: the connection to the broker is down")
        pong: asyncio.Future[bool] = self._loop.create_future()
        self.send_ping(pong)
        try:
            async with asyncio.timeout(timeout_seconds):
                arrived = await pong
        except TimeoutError:
            raise RequestTimeoutError(f"the broker did not answer a PING within {timeout_seconds:g} s") from None
        if not arrived:
            raise DisconnectedError("the connection to the broker broke during a flush")

    async def drain(self) -> None:
        """End all subscriptions, deliver what is on its way, send what was published (see ``Bus.drain``)."""
        for sid, subscription in list(self._subscriptions.items()):
            if subscription is not self._reply_subscription:
                # The callback stays until the PONG: what the broker sent before it saw the UNSUB is still delivered.
                self._send(f"UNSUB {sid}\r\n".encode())
                del self._subscriptions[sid]
        try:
            if self.connected:
                await self.flush()
        finally:
            for sid in [sid for sid in self.callbacks if sid not in self._subscriptions]:
                del self.callbacks[sid]

    async def open(self, options: dict[str, Any], address: str, timeout_seconds: float) -> None:
        """Connect for the first time (see ``connection.connect``)."""

        async def failed(error: Exception) -> None:
            self.dial_failed(error)

        handler = self.backoff.choose
        await dial(self.client, {**options, "reconnect_to_server_handler": handler}, address, timeout_seconds, failed)

    async def close(self) -> None:
        """Write what waits, and end the connection for good."""
        self._write()
        self._closed = True
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.client.close()
        except TimeoutError:
            logger.warning("the broker did not take what was left to write within %g s", CLOSE_SECONDS)
        finally:
            self.abort()
            self._gone(connected_before=self.connected)
            await self._end_tasks()

    # -- what the client and the wire call

    def opened(self, protocol: WireProtocol, transport: asyncio.WriteTransport, info: dict[str, Any]) -> None:
        """Take over a connection after its handshake: send the subscriptions again, then tell the listeners."""
        self._protocol = protocol
        self._transport = transport
        self._writable = True
        self._write_is_due = False
        self.backoff.connected()
        self._last_refusal = ""
        self.info(info)
        self.connected = True
        transport.write(b"".join(subscription.line for subscription in self._subscriptions.values()))
        if self._was_connected:
            self._connection_changed(True)
        self._was_connected = True

    def lost(self, protocol: WireProtocol, error: Exception | None) -> None:
        """The connection is gone: fail what is in flight, and have nats-py find a broker again."""
        if protocol is not self._protocol or self._closed:
            return
        if isinstance(error, WireProtocolError | ValueError | IndexError):
            self._report(error)
        self._gone(connected_before=self.connected)
        # Runs when nats-py itself closed the transport too (a stale connection): then it does nothing.
        self.spawn(self.client._process_op_err(error or nats_errors.UnexpectedEOF()))

    def abort(self) -> None:
        """Cut the connection; ``lost`` is called in a later turn of the loop."""
        if self._transport is not None:
            self._transport.abort()

    def ping(self) -> None:
        """Answer the broker's PING."""
        self._send(b"PONG\r\n")

    def send_ping(self, future: asyncio.Future[bool]) -> None:
        """Send a PING; ``future`` gets True at its PONG and False at a disconnect."""
        if self.connected:
            self._pings.append(future)
            self._send(b"PING\r\n")
        elif not future.done():
            future.set_result(False)

    def pong(self) -> None:
        """Settle the oldest PING."""
        self.client._pings_outstanding = 0
        if self._pings:
            future = self._pings.pop(0)
            if not future.done():
                future.set_result(True)

    def info(self, info: dict[str, Any]) -> None:
        """Note what the broker tells of itself; new servers of its cluster are dialled too, later."""
        self.max_payload = info.get("max_payload", self.max_payload)
        self.server_version = info.get("version", self.server_version)
        self.has_jetstream = bool(info.get("jetstream", False))
        if self.connected:
            self.spawn(self.client._process_info(info))

    def refused(self, text: str) -> None:
        """Report an error the broker sent; where it is fatal the broker closes the connection itself."""
        self._complain(text)

    def callback_failed(self, error: BaseException) -> None:
        """Report a callback that raised."""
        logger.error("a callback of %s raised", self.identity, exc_info=error)
        self._report(error)

    def writable(self, writable: bool) -> None:
        """The socket takes no more for now, or again."""
        self._writable = writable
        if writable:
            self._write()

    def report(self, error: BaseException) -> None:
        """Report an error that no caller waits for."""
        self._report(error)

    def dial_failed(self, error: Exception) -> None:
        """Note an attempt to reconnect that failed; a refused credential is reported, once."""
        text = str(error)
        if text == self._last_refusal:
            return
        self._last_refusal = text
        if is_refusal(text):
            self._complain(text)
        else:
            logger.info("%s cannot reach the broker: %s", self.identity, text or type(error).__name__)

    # -- inside

    def _drop(self, subject: str) -> bool:
        """Count a message that was published while the connection is down."""
        if self._closed:
            raise BusClosedError(f"cannot publish to {subject!r}: this process closed the connection")
        self.dropped_messages += 1
        return False

    def _send(self, line: bytes) -> None:
        """Queue a line of the protocol behind what was published; while down it is not needed: see ``opened``."""
        if self.connected:
            self._out.append(line)
            self._out_bytes += len(line)
            if not self._write_is_due:
                self._write_is_due = True
                self._loop.call_soon(self._write)

    def _write(self) -> None:
        """Write everything that waits, in one call."""
        # Unwritable, the write stays due: the loop is not woken for each publish, ``writable`` writes.
        if not self._writable:
            return
        self._write_is_due = False
        if self._out and self._transport is not None:
            if self._out_bytes <= JOIN_BYTES:
                self._transport.write(b"".join(self._out))
            else:
                self._transport.writelines(self._out)
            self._out = []
            self._out_bytes = 0

    def _gone(self, connected_before: bool) -> None:
        """Drop what belonged to a connection that is no more, and fail what waits for it."""
        self._protocol = None
        self._transport = None
        self._out = []
        self._out_bytes = 0
        self._write_is_due = False
        pings, self._pings = self._pings, []
        for future in pings:
            if not future.done():
                future.set_result(False)
        if connected_before:
            self._connection_changed(False)
