"""The line protocol's reader: whatever the pieces in which the bytes come, the same messages leave it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal_core.bus.interface import Callback, Message
from shoal_core.bus.wire import WireProtocol, format_headers, parse_headers


class Recorder:
    """A sink that notes what it is told."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.callbacks: dict[str, Callback] = {"1": self.messages.append}
        self.words: list[Any] = []

    def begin_turn(self) -> None: ...

    def end_turn(self) -> None: ...

    def ping(self) -> None:
        self.words.append("ping")

    def pong(self) -> None:
        self.words.append("pong")

    def info(self, info: dict[str, Any]) -> None:
        self.words.append(info)

    def refused(self, text: str) -> None:
        self.words.append(text)

    def callback_failed(self, error: BaseException) -> None:
        raise error

    def writable(self, writable: bool) -> None:
        self.words.append(writable)

    def lost(self, protocol: WireProtocol, error: Exception | None) -> None:
        self.words.append(("lost", error))


TOKENS = st.text("abcXYZ019_-$", min_size=1, max_size=8)
SUBJECTS = st.lists(TOKENS, min_size=1, max_size=4).map(".".join)
VALUES = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Z", "Cs")), max_size=12)
HEADERS = st.none() | st.dictionaries(TOKENS, VALUES, min_size=1, max_size=3)
MESSAGES = st.builds(Message, SUBJECTS, st.just("") | SUBJECTS, st.binary(max_size=600), HEADERS)


def written(message: Message) -> bytes:
    """Return a message as a broker would write it."""
    reply = f" {message.reply}" if message.reply else ""
    data = message.data
    if message.headers is None:
        return f"MSG {message.subject} 1{reply} {len(data)}\r\n".encode() + data + b"\r\n"
    block = format_headers(message.headers)
    sizes = f"{len(block)} {len(block) + len(data)}"
    return f"HMSG {message.subject} 1{reply} {sizes}\r\n".encode() + block + data + b"\r\n"


@given(st.lists(MESSAGES, max_size=8), st.data())
def test_messages_are_the_same_however_the_bytes_are_cut(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(written(message) + b"PING\r\n" for message in messages)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    recorder = Recorder()
    protocol = WireProtocol(recorder, asyncio.BaseProtocol())
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        if stop > start:
            protocol.data_received(stream[start:stop])
    assert recorder.messages == messages
    assert recorder.words == ["ping"] * len(messages)


def test_a_message_cut_into_single_bytes_is_whole() -> None:
    message = Message("a.b", "c", bytes(range(256)), {"x": "y"})
    recorder = Recorder()
    protocol = WireProtocol(recorder, asyncio.BaseProtocol())
    for byte in written(message):
        protocol.data_received(bytes([byte]))
    assert recorder.messages == [message]


def test_control_lines_reach_the_sink() -> None:
    recorder = Recorder()
    protocol = WireProtocol(recorder, asyncio.BaseProtocol())
    protocol.data_received(b"PONG\r\n+OK\r\nINFO {\"max_payload\": 7}\r\n-ERR 'Permissions Violation'\r\n")
    assert recorder.words == ["pong", {"max_payload": 7}, "Permissions Violation"]


def test_messages_for_nobody_are_passed_over() -> None:
    recorder = Recorder()
    protocol = WireProtocol(recorder, asyncio.BaseProtocol())
    protocol.data_received(b"MSG a 9 2\r\nxx\r\nMSG b 1 2\r\nyy\r\n")
    assert recorder.messages == [Message("b", "", b"yy")]


@pytest.mark.parametrize("nonsense", [b"HELLO\r\n", b"MSG a\r\n", b"MSG a 1 x\r\n", b"INFO {\r\n", b"x" * 70_000])
def test_nonsense_ends_the_connection(nonsense: bytes) -> None:
    recorder = Recorder()
    protocol = WireProtocol(recorder, asyncio.Protocol())
    protocol.data_received(nonsense)
    protocol.connection_lost(None)
    ((word, error),) = recorder.words
    assert word == "lost"
    assert isinstance(error, Exception)


@pytest.mark.parametrize(
    ("block", "headers"),
    [
        (b"NATS/1.0 503\r\n\r\n", {"Status": "503"}),
        (
            b"NATS/1.0 100 Idle Heartbeat\r\nNats-Last-Consumer: 7\r\n\r\n",
            {"Status": "100", "Description": "Idle Heartbeat", "Nats-Last-Consumer": "7"},
        ),
        (b"NATS/1.0\r\na:b\r\nc:  d: e \r\n\r\n", {"a": "b", "c": "d: e"}),
    ],
)
def test_headers_and_status_lines_are_read(block: bytes, headers: dict[str, str]) -> None:
    assert parse_headers(block) == headers


@pytest.mark.parametrize("headers", [{"": "x"}, {"a:b": "x"}, {"a": "x\r\nPUB y 0"}, {"a\n": "x"}])
def test_headers_that_would_break_the_protocol_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="not a header"):
        format_headers(headers)
