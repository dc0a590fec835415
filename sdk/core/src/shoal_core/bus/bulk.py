"""A connection to the broker for bulk data: a socket and a thread of its own, payloads straight from and into memory.

What goes over the ordinary connection stays quick while gigabytes pass here. One thread runs ``BulkConnection.run``: it
connects (the same address, TLS and credentials as the ordinary connection), reads the NATS protocol, reads each payload
straight into the memory its handler names, and writes payloads straight from memory, without a copy in Python. The
socket never blocks the thread, so a side that sends still reads. After a loss it connects again, for ever, with
back-off.

The handler is called in that thread only. All queues are bounded by it: it is asked for more to write only while less
than ``MOST_QUEUED_BYTES`` waits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import select
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

from zlib_ng.zlib_ng import crc32

from shoal_core import __version__
from shoal_core.bus.backoff import Backoff
from shoal_core.bus.credentials import MISTRUST_ADVICE, Credentials, TlsFiles, is_mistrust, redacted
from shoal_core.bus.interface import is_refusal
from shoal_core.bus.wire import WireProtocolError
from shoal_core.protocol.errors import AuthenticationError

CONNECT_SECONDS = 5.0
PING_SECONDS = 5.0
MOST_QUEUED_BYTES = 1024 * 1024
MOST_VIEWS = 64
BUFFER_BYTES = 64 * 1024
PIECE_BYTES = 256 * 1024
"""So much of a payload is read at once: few enough that its checksum is taken before it leaves the processor's cache,
which takes a tenth as long.
"""
LONGEST_WAIT_SECONDS = PING_SECONDS
LOW_WATER_BYTES = 1024 * 1024
"""In the middle of a payload the thread is not woken for less: of a chunk it would else be told eight times."""
DEFAULT_PORT = 4222

logger = logging.getLogger("shoal.bus")


@dataclass(frozen=True)
class BulkAddress:
    """Where to connect, and as whom; as for ``connection.connect``, but for WebSocket, which has no bulk connection."""

    address: str
    name: str
    credentials: Credentials | None = None
    tls: TlsFiles | None = None


class Header(NamedTuple):
    """What stands before a payload: its subject, our number of the subscription, its label (the reply subject)."""

    subject: str
    subscription: int
    label: str
    size_bytes: int


class Handler(Protocol):
    """Who uses a bulk connection."""

    def connected(self) -> None:
        """The connection is there, without any subscription."""

    def disconnected(self) -> None:
        """The connection is gone."""

    def refused(self, error: AuthenticationError) -> None:
        """The broker refused the credential or one side the other's certificate; it is tried again all the same."""

    def turn(self) -> float:
        """Do what is due, before every wait of the thread; return for how many seconds nothing will be."""

    def more(self) -> None:
        """Publish what there is, while little waits to be written."""

    def memory(self, header: Header) -> memoryview:
        """Return where a payload is to be written, as many bytes as it has."""

    def arrived(self, header: Header, data: memoryview, checksum: int) -> None:
        """A payload is there, in the memory that ``memory`` returned for it, and this is its crc32."""


class BulkConnection:
    """A bulk connection. ``run`` is for its thread, ``wake`` and ``close`` for any; all else for the handler."""

    def __init__(self, where: BulkAddress) -> None:
        self._where = where
        self._servers = [part.strip() for part in where.address.split(",") if part.strip()]
        self._backoff = Backoff()
        self._awake, self._waker = socket.socketpair()
        self._awake.setblocking(False)
        self._waker.setblocking(False)
        self._closed = False
        self._socket: socket.socket | None = None
        self._dialling: socket.socket | None = None
        self._out: deque[memoryview] = deque()
        self._out_bytes = 0
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._begin = self._end = 0
        self._header: Header | None = None
        self._body = memoryview(b"")
        self._filled = 0
        self._checksum = 0
        self._low_water = 1
        self._heard_at = 0.0
        self._asked_at = 0.0

    # ------------------------------------------------------------------------------- any thread

    def wake(self) -> None:
        """Have the thread take its next turn now."""
        with contextlib.suppress(BlockingIOError):  # then it is about to wake anyway
            self._waker.send(b"\0")

    def close(self) -> None:
        """Have ``run`` return soon."""
        self._closed = True
        self.wake()
        if (dialling := self._dialling) is not None:
            with contextlib.suppress(OSError):  # it ended meanwhile
                dialling.shutdown(socket.SHUT_RDWR)

    def discard(self) -> None:
        """Give back what ``wake`` needs; the last call of all, when ``run`` has returned or never began."""
        self._awake.close()
        self._waker.close()

    # ------------------------------------------------------------------------------- the handler

    def subscribe(self, subscription: int, subject: str, most: int = 0) -> None:
        """Subscribe under a new number; ``most``: the broker ends it after so many messages (0: never)."""
        self._write(f"SUB {subject} {subscription}\r\n".encode())
        if most:
            self.limit(subscription, most)

    def limit(self, subscription: int, most: int) -> None:
        """Have the broker end a subscription after ``most`` messages in all; 0: now."""
        self._write(f"UNSUB {subscription} {most}\r\n".encode() if most else f"UNSUB {subscription}\r\n".encode())

    def publish(self, subject: str, data: bytes | memoryview, label: str = "") -> None:
        """Publish a payload, whose memory must not change before it is written, with a label for whoever gets it."""
        head = f"PUB {subject} {label} {len(data)}\r\n" if label else f"PUB {subject} {len(data)}\r\n"
        self._write(head.encode())
        self._write(data)
        self._write(b"\r\n")

    def _write(self, data: bytes | memoryview) -> None:
        if self._socket is not None and len(data):
            self._out.append(memoryview(data))
            self._out_bytes += len(data)

    # ------------------------------------------------------------------------------- its thread

    def run(self, handler: Handler) -> None:
        """Serve until ``close``."""
        while not self._closed:
            try:
                self._connect()
            except AuthenticationError as error:
                handler.refused(error)
                self._pause(handler)
                continue
            except (OSError, ValueError, EOFError, WireProtocolError) as error:
                if is_mistrust(error):
                    handler.refused(self._mistrust(error))
                logger.info("no bulk connection to %s: %s", redacted(self._where.address), error)
                self._pause(handler)
                continue
            self._backoff.connected()
            try:
                handler.connected()
                self._serve(handler)
            except (OSError, EOFError, WireProtocolError) as error:
                logger.info("the bulk connection to %s was lost: %s", redacted(self._where.address), error)
            finally:
                self._disconnect()
                handler.disconnected()
            self._pause(handler)

    def _pause(self, handler: Handler) -> None:
        """Wait before the next attempt; what is due meanwhile is done."""
        until = time.monotonic() + self._backoff.pause_seconds()
        while not self._closed and (left := until - time.monotonic()) > 0:
            select.select([self._awake], [], [], min(left, handler.turn()))
            self._drain_waker()

    def _drain_waker(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._awake.recv(4096):
                pass

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._out.clear()
        self._out_bytes = 0
        self._header = None
        self._body = memoryview(b"")
        self._filled = 0

    # ------------------------------------------------------------------------------- the handshake

    def _connect(self) -> None:
        server = self._servers[self._backoff.attempts % len(self._servers)]
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        if parts.scheme not in ("nats", "tls") or parts.hostname is None:
            raise ValueError(f"a bulk connection needs an address nats://host:port or tls://host:port, not {server}")
        plain = socket.create_connection((parts.hostname, parts.port or DEFAULT_PORT), CONNECT_SECONDS)
        self._dialling = connected = plain
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            info = self._read_info(plain)
            connected = self._secured(plain, parts.scheme == "tls", info, parts.hostname)
            connected.sendall(self._introduction(info, parts.username, parts.password))
            self._begin = self._end = 0
            self._await_pong(connected)
        except BaseException:
            connected.close()
            raise
        finally:
            self._dialling = None
        connected.setblocking(False)
        self._socket = connected
        self._low_water = 1
        self._heard_at = time.monotonic()

    def _read_info(self, plain: socket.socket) -> dict[str, Any]:
        """Read the one line before TLS begins, and not a byte more."""
        line = b""
        while not line.endswith(b"\r\n"):
            byte = plain.recv(1)
            if not byte or len(line) > BUFFER_BYTES:
                raise EOFError("the broker said nothing")
            line += byte
        if not line.startswith(b"INFO "):
            raise ValueError(f"no NATS broker: {line[:32]!r}")
        info: dict[str, Any] = json.loads(line[5:])
        return info

    def _secured(self, plain: socket.socket, insist: bool, info: dict[str, Any], host: str) -> socket.socket:
        tls = self._where.tls
        if not info.get("tls_required"):
            if tls is None and not insist:
                return plain
            raise ValueError("TLS was asked for, but the broker does not offer it")
        return (tls or TlsFiles()).context().wrap_socket(plain, server_hostname=host)

    def _introduction(self, info: dict[str, Any], user: str | None, password: str | None) -> bytes:
        credentials = self._where.credentials
        if credentials is None and user and password is not None:
            credentials = Credentials(user=unquote(user), password=unquote(password))
        elif credentials is None and user:
            credentials = Credentials(token=unquote(user))
        options: dict[str, Any] = {
            "verbose": False,
            "pedantic": False,
            "lang": "python-shoal-bulk",
            "version": __version__,
            "protocol": 1,
            "name": self._where.name,
            **_proof(credentials or Credentials(), info),
        }
        return b"CONNECT " + json.dumps(options).encode() + b"\r\nPING\r\n"

    def _await_pong(self, connected: socket.socket) -> None:
        """Read until the broker has taken us in; it says nothing but control lines before."""
        while True:
            while (line := self._take_line()) is not None:
                if line == b"PONG":
                    return
                if line.startswith(b"-ERR"):
                    self._raise_refusal(line.decode(errors="replace"))
            count = connected.recv_into(self._room())
            if not count:
                raise EOFError("the broker closed the connection during the handshake")
            self._end += count

    def _raise_refusal(self, text: str) -> None:
        if is_refusal(text):
            raise AuthenticationError(
                f"the broker at {redacted(self._where.address)} refuses the credential of {self._where.name} on the "
                f"connection for large objects ({text}), so none can be moved. Check SHOAL_TOKEN, the credentials file "
                "or the user in the address, and whether that user was removed or its credential rotated"
            )
        raise ValueError(f"the broker refused: {text}")

    def _mistrust(self, error: Exception) -> AuthenticationError:
        return AuthenticationError(
            f"{self._where.name} and the broker at {redacted(self._where.address)} do not trust each other's "
            f"certificates on the connection for large objects ({error}), so none can be moved. {MISTRUST_ADVICE}"
        )

    # ------------------------------------------------------------------------------- reading and writing

    def _serve(self, handler: Handler) -> None:
        """Read and write until the connection is lost (raises) or closed."""
        connection = self._socket
        assert connection is not None
        secured = connection if isinstance(connection, ssl.SSLSocket) else None
        ours, awake = connection.fileno(), self._awake.fileno()
        poll = select.poll()
        poll.register(awake, select.POLLIN)
        poll.register(ours, select.POLLIN)
        self._parse(handler)
        while not self._closed:
            if self._out_bytes < MOST_QUEUED_BYTES:
                handler.more()
            wrote_all = bool(self._out) and self._send(connection)
            self._keep_alive()
            wait_seconds = handler.turn()
            if wrote_all or (secured is not None and secured.pending()):
                wait_seconds = 0.0
            if secured is None:
                self._expect(connection)
            poll.modify(ours, select.POLLIN | select.POLLOUT if self._out else select.POLLIN)
            events = dict(poll.poll(1000 * max(0.0, min(wait_seconds, LONGEST_WAIT_SECONDS))))
            if awake in events:
                self._drain_waker()
            if not events or events.get(ours, 0) & ~select.POLLOUT or (secured is not None and secured.pending()):
                self._receive(connection, handler)

    def _expect(self, connection: socket.socket) -> None:
        """Have the system wake the thread only when much of what is still to come of a payload is there."""
        low_water = min(max(1, len(self._body) - self._filled), LOW_WATER_BYTES)
        if low_water != self._low_water:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
            self._low_water = low_water

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if now - max(self._heard_at, self._asked_at) > PING_SECONDS:
            if self._asked_at > self._heard_at + PING_SECONDS:
                raise EOFError("the broker does not answer")
            self._asked_at = now
            self._write(b"PING\r\n")

    def _send(self, connection: socket.socket) -> bool:
        """Write what the socket takes; tell whether that was all."""
        while self._out:
            try:
                if isinstance(connection, ssl.SSLSocket):
                    sent = connection.send(self._out[0])
                else:
                    sent = connection.sendmsg(list(islice(self._out, MOST_VIEWS)))
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            self._out_bytes -= sent
            while sent:
                first = self._out.popleft()
                if sent < len(first):
                    self._out.appendleft(first[sent:])
                    break
                sent -= len(first)
        return True

    def _receive(self, connection: socket.socket, handler: Handler) -> None:
        """Take what the socket has: the rest of a payload, piece by piece, with what follows, or else one buffer."""
        try:
            while (left := len(self._body) - self._filled) > PIECE_BYTES:
                self._fill(self._came(connection.recv_into(self._body[self._filled : self._filled + PIECE_BYTES])))
            if not left:
                count = self._came(connection.recv_into(self._room()))
                self._end += count
            elif isinstance(connection, ssl.SSLSocket):
                self._fill(self._came(connection.recv_into(self._body[self._filled :])))
            else:
                count = self._came(connection.recvmsg_into([self._body[self._filled :], self._buffer])[0])
                self._fill(min(count, left))
                self._begin, self._end = 0, max(0, count - left)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return
        self._parse(handler)

    def _came(self, count: int) -> int:
        """Return how much a read has brought; it is nothing where the broker has closed the connection."""
        if not count:
            raise EOFError("the broker closed the connection")
        self._heard_at = time.monotonic()
        return count

    def _fill(self, count: int) -> None:
        """Count in what has come of a payload, into its memory."""
        filled = self._filled + count
        self._checksum = crc32(self._body[self._filled : filled], self._checksum)
        self._filled = filled

    def _room(self) -> memoryview:
        """Return the free end of the buffer, after what is in it was moved to the front."""
        if self._begin:
            held = self._end - self._begin
            self._buffer[:held] = bytes(self._buffer[self._begin : self._end])
            self._begin, self._end = 0, held
        if self._end == BUFFER_BYTES:
            raise WireProtocolError(f"the broker sent a line of over {BUFFER_BYTES} bytes")
        return self._buffer[self._end :]

    def _parse(self, handler: Handler) -> None:
        """Deliver all that is whole in the buffer, and begin what is not."""
        while True:
            if self._header is not None:
                if not self._take_body():
                    return
                header, body, self._header, self._body = self._header, self._body, None, memoryview(b"")
                self._filled = 0
                handler.arrived(header, body, self._checksum)
                continue
            line = self._take_line()
            if line is None:
                return
            if line.startswith(b"MSG "):
                self._begin_body(line, handler)
            else:
                self._control(line)

    def _begin_body(self, line: bytes, handler: Handler) -> None:
        words = line.decode().split(" ")
        header = Header(words[1], int(words[2]), words[3] if len(words) == 5 else "", int(words[-1]))
        self._body = handler.memory(header)
        if len(self._body) != header.size_bytes:
            raise WireProtocolError(f"{len(self._body)} bytes of memory for a message of {header.size_bytes}")
        self._header, self._filled, self._checksum = header, 0, 0

    def _take_body(self) -> bool:
        """Move what the buffer has of the payload into its memory; tell whether all of it is there, and its end."""
        count = min(len(self._body) - self._filled, self._end - self._begin)
        if count:
            self._body[self._filled : self._filled + count] = self._buffer[self._begin : self._begin + count]
            self._fill(count)
            self._begin += count
        if self._filled < len(self._body) or self._end - self._begin < 2:
            return False
        self._begin += 2
        return True

    def _take_line(self) -> bytes | None:
        held = bytes(self._buffer[self._begin : min(self._end, self._begin + 512)])
        end = held.find(b"\r\n")
        if end < 0 and self._end - self._begin > len(held):
            held = bytes(self._buffer[self._begin : self._end])
            end = held.find(b"\r\n")
        if end < 0:
            return None
        self._begin += end + 2
        return held[:end]

    def _control(self, line: bytes) -> None:
        if line == b"PING":
            self._write(b"PONG\r\n")
        elif line.startswith(b"-ERR"):
            text = line.decode(errors="replace")
            logger.error("the broker refused on the bulk connection: %s", text)
            if "permissions violation" not in text.lower():
                raise WireProtocolError(text)
        elif not line.startswith((b"PONG", b"+OK", b"INFO ")):
            raise WireProtocolError(f"an unknown operation: {line[:32]!r}")


def _proof(credentials: Credentials, info: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of CONNECT that say who we are."""
    if credentials.creds_file is not None:
        return _signed(Path(credentials.creds_file), info)
    if credentials.token is not None:
        return {"auth_token": credentials.token}
    if credentials.user is not None:
        return {"user": credentials.user, "pass": credentials.password}
    return {}


def _signed(creds_file: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Return the JWT of a ``.creds`` file, and the broker's nonce signed with its seed."""
    import base64

    import nkeys

    words = [part.strip() for part in creds_file.read_text().split("------") if part.strip()]
    token, seed = (next(w for w in words[words.index(name) + 1 :] if w) for name in _CREDS_PARTS)
    pair = nkeys.from_seed(seed.encode())
    signature = base64.urlsafe_b64encode(pair.sign(info.get("nonce", "").encode())).rstrip(b"=")
    return {"jwt": token, "sig": signature.decode()}


_CREDS_PARTS = ("BEGIN NATS USER JWT", "BEGIN USER NKEY SEED")
