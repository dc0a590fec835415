"""JetStream's twin in memory: as much of its API as this package speaks, with the same answers and errors."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shoal_core.bus.interface import DESCRIPTION_HEADER, STATUS_HEADER, Message
from shoal_core.bus.jetstream import API, EXPECTED_REVISION_HEADER, NAME_IN_USE, NOT_FOUND, WRONG_LAST_SEQUENCE
from shoal_core.bus.subject_patterns import matches
from shoal_core.bus.wire import format_headers

Answer = dict[str, Any]
Handler = Callable[[list[str], Answer], Answer]
STREAM_NOT_FOUND = 10059
MESSAGE_NOT_FOUND = 10037


@dataclass(frozen=True, slots=True)
class Stored:
    """A message in a stream."""

    sequence: int
    subject: str
    data: bytes
    headers: Mapping[str, str]


@dataclass
class Consumer:
    """A push consumer: where it delivers, and how many messages it has."""

    name: str
    deliver_subject: str
    filter: list[str]
    delivered: int = 0


@dataclass
class Stream:
    """A stream: its configuration, its messages by subject, and who consumes it."""

    configuration: Answer
    last_sequence: int = 0
    messages: dict[str, list[Stored]] = field(default_factory=dict)
    consumers: dict[str, Consumer] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The stream's name."""
        return str(self.configuration["name"])

    def holds(self, subject: list[str]) -> bool:
        """Tell whether messages on a subject are stored here."""
        return any(matches(pattern.split("."), subject) for pattern in self.configuration.get("subjects", []))

    def in_order(self) -> list[Stored]:
        """Return all messages by sequence."""
        return sorted(itertools.chain.from_iterable(self.messages.values()), key=lambda stored: stored.sequence)


class ApiError(Exception):
    """An error of the API: its code, its own code and its text."""


class MemoryJetStream:
    """The streams of a ``MemoryBroker``; ``send`` delivers a message to whoever hears a subject."""

    def __init__(self, send: Callable[[str, Message], bool]) -> None:
        self._send = send
        self._streams: dict[str, Stream] = {}
        self._names = itertools.count(1)
        self._handlers: dict[tuple[str, ...], Handler] = {
            ("STREAM", "CREATE"): self._create_stream,
            ("STREAM", "INFO"): self._stream_info,
            ("STREAM", "DELETE"): self._delete_stream,
            ("STREAM", "PURGE"): self._purge,
            ("STREAM", "MSG", "GET"): self._get_message,
            ("CONSUMER", "CREATE"): self._create_consumer,
            ("CONSUMER", "DELETE"): self._delete_consumer,
        }

    def forget_consumers(self) -> None:
        """Drop the ephemeral consumers, as a restart does."""
        for stream in self._streams.values():
            stream.consumers.clear()

    def take(self, destination: str, message: Message) -> bool:
        """Answer a call of the API, or store a message; return whether it was either."""
        if destination != message.subject:
            return False  # a delivery of a consumer: it keeps the subject under which the message was stored
        if message.subject.startswith(f"{API}."):
            self._answer(message)
            return True
        tokens = message.subject.split(".")
        stream = next((stream for stream in self._streams.values() if stream.holds(tokens)), None)
        if stream is None:
            return False
        try:
            answer = self._store(stream, message)
        except ApiError as error:
            answer = _error(error)
        if message.reply:
            self._send(message.reply, Message(message.reply, "", json.dumps(answer).encode()))
        return True

    def _answer(self, message: Message) -> None:
        """Carry out a call of the API."""
        tokens = message.subject.split(".")[2:]
        body = json.loads(message.data) if message.data else {}
        if tokens[:2] == ["DIRECT", "GET"]:
            self._send(message.reply, self._get_direct(message.reply, tokens[2:], body))
            return
        words = 3 if tokens[:2] == ["STREAM", "MSG"] else 2
        handler = self._handlers.get(tuple(tokens[:words]))
        try:
            if handler is None:
                raise ApiError(400, 10025, f"the twin does not know {message.subject}")
            answer = handler(tokens[words:], body)
        except ApiError as error:
            answer = _error(error)
        if message.reply:
            self._send(message.reply, Message(message.reply, "", json.dumps(answer).encode()))

    def _stream(self, names: list[str]) -> Stream:
        stream = self._streams.get(names[0])
        if stream is None:
            raise ApiError(NOT_FOUND, STREAM_NOT_FOUND, "stream not found")
        return stream

    def _create_stream(self, names: list[str], body: Answer) -> Answer:
        stream = self._streams.setdefault(names[0], Stream(body))
        if stream.configuration != body:
            raise ApiError(400, NAME_IN_USE, "stream name already in use with a different configuration")
        return self._stream_info(names, {})

    def _stream_info(self, names: list[str], body: Answer) -> Answer:
        stream = self._stream(names)
        stored = stream.in_order()
        size_bytes = sum(len(message.data) for message in stored)
        state: Answer = {"messages": len(stored), "last_seq": stream.last_sequence, "bytes": size_bytes}
        if "subjects_filter" in body:
            pattern = body["subjects_filter"].split(".")
            found = sorted(subject for subject in stream.messages if matches(pattern, subject.split(".")))
            page = found[body.get("offset", 0) :]
            state["subjects"] = {subject: len(stream.messages[subject]) for subject in page}
            return {"config": stream.configuration, "state": state, "total": len(found)}
        return {"config": stream.configuration, "state": state}

    def _delete_stream(self, names: list[str], body: Answer) -> Answer:
        del self._streams[self._stream(names).name]
        return {"success": True}

    def _purge(self, names: list[str], body: Answer) -> Answer:
        stream = self._stream(names)
        pattern = body.get("filter", ">").split(".")
        below = body.get("seq", stream.last_sequence + 1)
        purged = 0
        for subject in [subject for subject in stream.messages if matches(pattern, subject.split("."))]:
            kept = [stored for stored in stream.messages[subject] if stored.sequence >= below]
            purged += len(stream.messages[subject]) - len(kept)
            if kept:
                stream.messages[subject] = kept
            else:
                del stream.messages[subject]
        return {"success": True, "purged": purged}

    def _find(self, stream: Stream, query: Answer) -> Stored:
        """Return the message that a query names: the last on a subject, or the one with a sequence."""
        if "last_by_subj" in query:
            found = stream.messages.get(query["last_by_subj"], [])[-1:]
        else:
            found = [stored for stored in stream.in_order() if stored.sequence == query.get("seq")]
        if not found:
            raise ApiError(NOT_FOUND, MESSAGE_NOT_FOUND, "no message found")
        return found[0]

    def _get_message(self, names: list[str], body: Answer) -> Answer:
        found = self._find(self._stream(names), body)
        message: Answer = {
            "subject": found.subject,
            "seq": found.sequence,
            "data": base64.b64encode(found.data).decode(),
        }
        if found.headers:
            message["hdrs"] = base64.b64encode(format_headers(dict(found.headers))).decode()
        return {"message": message}

    def _get_direct(self, reply: str, names: list[str], body: Answer) -> Message:
        """Return the answer of the direct API: the message itself, what it is in headers."""
        query = {"last_by_subj": ".".join(names[1:])} if len(names) > 1 else body
        try:
            found = self._find(self._stream(names), query)
        except ApiError as error:
            code, _, text = error.args
            return Message(reply, "", b"", {STATUS_HEADER: str(code), DESCRIPTION_HEADER: text})
        headers = {"Nats-Stream": names[0], "Nats-Subject": found.subject, "Nats-Sequence": str(found.sequence)}
        return Message(reply, "", found.data, {**found.headers, **headers})

    def _store(self, stream: Stream, message: Message) -> Answer:
        """Store a message, if the expectation it carries holds; pass it to the consumers."""
        headers = dict(message.headers or {})
        stored = stream.messages.get(message.subject, [])
        last = stored[-1].sequence if stored else 0
        expected = headers.get(EXPECTED_REVISION_HEADER)
        if expected is not None and int(expected) != last:
            raise ApiError(400, WRONG_LAST_SEQUENCE[0], f"wrong last sequence: {last}")
        stream.last_sequence += 1
        new = Stored(stream.last_sequence, message.subject, message.data, headers)
        keep = stream.configuration.get("max_msgs_per_subject", -1)
        stored = [*stored, new]
        stream.messages[message.subject] = stored[-keep:] if keep > 0 else stored
        for consumer in list(stream.consumers.values()):
            self._push(stream, consumer, new, 0)
        return {"stream": stream.name, "seq": new.sequence}

    def _create_consumer(self, names: list[str], body: Answer) -> Answer:
        stream = self._stream(names)
        wanted = body["config"]
        name = f"memory{next(self._names)}"
        consumer = Consumer(name, wanted["deliver_subject"], wanted.get("filter_subject", ">").split("."))
        stream.consumers[name] = consumer
        last = [stored for stored in stream.in_order() if stored is stream.messages[stored.subject][-1]]
        backlog = [stored for stored in last if matches(consumer.filter, stored.subject.split("."))]
        for position, stored in enumerate(backlog, 1):
            self._push(stream, consumer, stored, len(backlog) - position)
        return {"name": name, "num_pending": 0, "delivered": {"consumer_seq": consumer.delivered}}

    def _delete_consumer(self, names: list[str], body: Answer) -> Answer:
        self._stream(names).consumers.pop(names[1], None)
        return {"success": True}

    def _push(self, stream: Stream, consumer: Consumer, stored: Stored, pending: int) -> None:
        """Deliver a message to a consumer; one that nobody hears is dropped."""
        if not matches(consumer.filter, stored.subject.split(".")):
            return
        consumer.delivered += 1
        reply = f"$JS.ACK.{stream.name}.{consumer.name}.1.{stored.sequence}.{consumer.delivered}.0.{pending}"
        message = Message(stored.subject, reply, stored.data, dict(stored.headers) or None)
        if not self._send(consumer.deliver_subject, message):
            stream.consumers.pop(consumer.name, None)


def _error(error: ApiError) -> Answer:
    code, error_code, text = error.args
    return {"error": {"code": code, "err_code": error_code, "description": text}}
