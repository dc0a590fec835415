"""The NATS line protocol, read as it arrives from the socket: no stream, no task, no queue between socket and callback.

``data_received`` takes all messages that one read of the socket brought, calls their callbacks in order, and then lets
the bus write what these published. A payload is copied once, out of the read buffer. A message that spans several reads
is put together once, when all of it is there.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

from shoal_core.bus.interface import DESCRIPTION_HEADER, STATUS_HEADER, Callback, Message

MAX_CONTROL_LINE_BYTES = 64 * 1024


class Sink(Protocol):
    """Where what was read goes."""

    callbacks: dict[str, Callback]

    def begin_turn(self) -> None:
        """Messages are about to be delivered."""

    def end_turn(self) -> None:
        """All messages of one read of the socket were delivered."""

    def ping(self) -> None:
        """The broker wants a PONG."""

    def pong(self) -> None:
        """The broker answered a PING."""

    def info(self, info: dict[str, Any]) -> None:
        """The broker told something new about itself."""

    def refused(self, text: str) -> None:
        """The broker sent an error."""

    def callback_failed(self, error: BaseException) -> None:
        """A callback raised."""

    def writable(self, writable: bool) -> None:
        """The socket's buffer is full (False) or has room again (True)."""

    def lost(self, protocol: WireProtocol, error: Exception | None) -> None:
        """The connection is gone."""


class WireProtocolError(Exception):
    """The peer does not speak the NATS protocol."""


class WireProtocol(asyncio.Protocol):
    """Reads one connection, from after the handshake to its end.

    ``previous`` is the protocol that did the handshake; it is told of the end too, since somebody may wait there.
    """

    def __init__(self, sink: Sink, previous: asyncio.BaseProtocol) -> None:
        self._sink = sink
        self._callbacks = sink.callbacks
        self._previous = previous
        self._parts: list[bytes] = []
        self._parts_bytes = 0
        self._needed_bytes = 0
        self.transport: asyncio.WriteTransport | None = None
        self.failure: Exception | None = None

    def data_received(self, data: bytes) -> None:
        """Take what one read of the socket brought."""
        if self._parts:
            self._parts.append(data)
            self._parts_bytes += len(data)
            if self._parts_bytes < self._needed_bytes:
                return
            data = b"".join(self._parts)
            self._parts.clear()
        self._sink.begin_turn()
        try:
            position = self._parse(data)
        except (ValueError, IndexError, WireProtocolError) as error:
            self._fail(error)
            return
        finally:
            self._sink.end_turn()
        if position < len(data):
            rest = data[position:] if position else data
            self._parts.append(rest)
            self._parts_bytes = len(rest)

    def _parse(self, data: bytes) -> int:
        """Deliver every whole message in ``data``; return where the first that is not whole begins.

        ``_needed_bytes`` then says how many bytes from there on are needed before it is worth looking again.
        """
        # One loop without a call a message: this is where the whole rate of a process is decided.
        callbacks = self._callbacks
        find = data.find
        position = 0
        end = len(data)
        while position < end:
            line_end = find(b"\r\n", position)
            if line_end < 0:
                if end - position > MAX_CONTROL_LINE_BYTES:
                    raise WireProtocolError(f"a line of over {MAX_CONTROL_LINE_BYTES} bytes")
                self._needed_bytes = end - position + 1
                return position
            first = data[position]
            if first == 77:  # M: MSG <subject> <sid> [reply] <size>
                words = data[position + 4 : line_end].decode().split(" ")
                start = line_end + 2
                stop = start + int(words[-1])
                if stop + 2 > end:
                    self._needed_bytes = stop + 2 - position
                    return position
                callback = callbacks.get(words[1])
                if callback is not None:
                    try:
                        callback(Message(words[0], words[2] if len(words) == 4 else "", data[start:stop]))
                    except (Exception, asyncio.CancelledError) as error:
                        self._sink.callback_failed(error)
                position = stop + 2
            elif first == 72:  # H: HMSG <subject> <sid> [reply] <size of headers> <size of all>
                words = data[position + 5 : line_end].decode().split(" ")
                start = line_end + 2
                stop = start + int(words[-1])
                if stop + 2 > end:
                    self._needed_bytes = stop + 2 - position
                    return position
                callback = callbacks.get(words[1])
                if callback is not None:
                    body = start + int(words[-2])
                    headers = parse_headers(data[start:body])
                    try:
                        callback(Message(words[0], words[2] if len(words) == 5 else "", data[body:stop], headers))
                    except (Exception, asyncio.CancelledError) as error:
                        self._sink.callback_failed(error)
                position = stop + 2
            else:
                self._control(data[position:line_end])
                position = line_end + 2
        return position

    def _control(self, line: bytes) -> None:
        """Take a line that is no message."""
        word, _, rest = line.partition(b" ")
        match word.upper():
            case b"PING":
                self._sink.ping()
            case b"PONG":
                self._sink.pong()
            case b"+OK":
                pass
            case b"INFO":
                self._sink.info(json.loads(rest))
            case b"-ERR":
                self._sink.refused(rest.decode(errors="replace").strip(" '"))
            case _:
                raise WireProtocolError(f"an unknown operation: {line[:32]!r}")

    def _fail(self, error: Exception) -> None:
        """Give up a connection whose bytes make no sense."""
        self.failure = error
        if self.transport is not None:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Note that the socket's buffer is full."""
        self._sink.writable(False)

    def resume_writing(self) -> None:
        """Note that the socket's buffer has room again."""
        self._sink.writable(True)

    def eof_received(self) -> bool:
        """Close our side too when the broker closes its own."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the bus, and whoever waits on the handshake's protocol, that the connection is gone."""
        self._previous.connection_lost(exc)
        self._sink.lost(self, self.failure or exc)


def parse_headers(block: bytes) -> dict[str, str]:
    """Return the headers of a message; a status line becomes the headers ``Status`` and ``Description``."""
    lines = block.decode(errors="replace").split("\r\n")
    headers = {}
    status = lines[0][8:].strip()  # after "NATS/1.0"
    if status:
        code, _, description = status.partition(" ")
        headers[STATUS_HEADER] = code
        if description:
            headers[DESCRIPTION_HEADER] = description.strip()
    for line in lines[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers[name.strip()] = value.strip()
    return headers


def format_headers(headers: dict[str, str]) -> bytes:
    """Return headers as they stand before a payload; ``ValueError`` for one that would break the protocol."""
    lines = ["NATS/1.0\r\n"]
    for name, value in headers.items():
        if not name or ":" in name or not name.isprintable() or "\r" in value or "\n" in value:
            raise ValueError(f"not a header: {name!r}: {value!r}")
        lines.append(f"{name}: {value}\r\n")
    lines.append("\r\n")
    return "".join(lines).encode()
