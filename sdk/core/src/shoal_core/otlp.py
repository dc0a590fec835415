"""Spans as OTLP has them: the bytes of an ``ExportTraceServiceRequest``, written field by field.

They decode to what OpenTelemetry's own encoder makes, which builds an object for every field first and takes three
times as long: most of what it cost to record a task. The format is stable, and the numbers of the fields are those of
opentelemetry-proto (``trace/v1/trace.proto``, ``common/v1/common.proto``). A tag is a field's number times eight, plus
how its value lies there: 0 a varint, 1 eight bytes, 2 a length and as many bytes, 5 four bytes.
"""

from __future__ import annotations

import struct
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind

KNOWN, REMOTE = 0x100, 0x200
"""Flags of a span: that it is known whether its parent is of another process, and that it is."""
SMALL = tuple(bytes((number,)) if number < 128 else bytes((number & 127 | 128, number >> 7)) for number in range(1024))
"""Numbers as varints: among them are nearly all sizes, too."""
MOST_KEPT_CHARACTERS = 32
"""The bytes of longer texts are not kept for the spans to come: ids of tasks are longer, and do not come again."""
NOTHING_MORE = b"\x7a\x00"
"""Of a span in which nothing happened and of which it is not said how it went, which is an empty status."""
AT_ONCE = 64
PAUSE_SECONDS = 0.0001
LOWER_HALF = (1 << 64) - 1
INT64 = range(-(1 << 63), 1 << 63)

T = TypeVar("T")

_eight = struct.Struct("<BQ").pack
_two_eights = struct.Struct("<BQBQ").pack
_two_ids = struct.Struct(">HQQHQ").pack
_id_above = struct.Struct(">HQ").pack
_double = struct.Struct("<Bd").pack
FLAGS, FLAGS_BELOW_ANOTHER_PROCESS = (struct.pack("<HI", 0x0185, flags) for flags in (KNOWN, KNOWN | REMOTE))


class Encodes(Protocol):
    """A span that says itself how it is told."""

    @property
    def resource(self) -> Resource:
        """What is said of its process."""
        ...

    @property
    def instrumentation_scope(self) -> InstrumentationScope:
        """Who made it."""
        ...

    def as_bytes(self) -> bytes:
        """Return the span as OTLP has it; nothing where it is not to be told."""
        ...


def encode(spans: Sequence[ReadableSpan | Encodes]) -> bytes:
    """Return the request that tells a collector of some spans, by process and by who made them."""
    groups: defaultdict[tuple[int, int], list[ReadableSpan | Encodes]] = defaultdict(list)
    for span in spans:
        groups[id(span.resource), id(span.instrumentation_scope)].append(span)
    by_resource: dict[int, list[list[ReadableSpan | Encodes]]] = {}
    for (resource, _), group in groups.items():
        by_resource.setdefault(resource, []).append(group)
    return b"".join(_field(b"\x0a", _resource_spans(of_process)) for of_process in by_resource.values())


def patiently(items: Sequence[T]) -> Iterator[T]:
    """Go through many things in a thread that nobody waits for, and let others have the interpreter in between.

    They would get it in the end, but each time only after five milliseconds, in which all that a process does stands
    still. To let go of it is not enough: it is taken again before another thread is awake.
    """
    for number, item in enumerate(items, 1):
        yield item
        if not number % AT_ONCE:
            time.sleep(PAUSE_SECONDS)


def _resource_spans(groups: Sequence[Sequence[ReadableSpan | Encodes]]) -> bytes:
    resource = groups[0][0].resource
    scopes = b"".join(_field(b"\x12", _scope_spans(group)) for group in groups)
    return _field(b"\x0a", _resource(resource)) + scopes + _text(b"\x1a", resource.schema_url)


def _resource(resource: Resource) -> bytes:
    return _attributes(b"\x0a", resource.attributes)


def _scope_spans(spans: Sequence[ReadableSpan | Encodes]) -> bytes:
    scope = spans[0].instrumentation_scope
    about = _field(b"\x0a", b"" if scope is None else _scope(scope))
    url = b"" if scope is None else _text(b"\x1a", scope.schema_url)
    told = [_field(b"\x12", data) for span in patiently(spans) if (data := _span(span))]
    return about + b"".join(told) + url


def _scope(scope: InstrumentationScope) -> bytes:
    return _text(b"\x0a", scope.name) + _text(b"\x12", scope.version) + _attributes(b"\x1a", scope.attributes)


def _span(span: ReadableSpan | Encodes) -> bytes:
    return full_span(span) if isinstance(span, ReadableSpan) else span.as_bytes()


def full_span(span: ReadableSpan) -> bytes:
    """Return a span as OTLP has it, with all that may be said of one."""
    context, status = span.context, span.status
    assert context is not None
    parts = (
        head(context, span.parent, span.start_time or 0, span.end_time or 0),
        span_name(span.name, span.kind.name),
        span_attributes(span.attributes),
        _count(b"\x50", span.dropped_attributes),
        b"".join([_field(b"\x5a", _event(event)) for event in span.events]),
        _count(b"\x60", span.dropped_events),
        b"".join([_field(b"\x6a", _link(link)) for link in span.links]),
        _count(b"\x70", span.dropped_links),
        _field(b"\x7a", _text(b"\x12", status.description) + _count(b"\x18", status.status_code.value)),
    )
    return b"".join(parts)


def head(context: SpanContext, parent: SpanContext | None, began_ns: int, ended_ns: int) -> bytes:
    """Return the fields that are new in each span: how it is named, what it hangs below, and when it was."""
    ids, times = _ids(context), _two_eights(0x39, began_ns, 0x41, ended_ns)
    if parent is None:
        return ids + times + FLAGS
    _, span_id, is_remote, _, _, _ = parent
    return b"".join((ids, _id_above(0x2208, span_id), times, FLAGS_BELOW_ANOTHER_PROCESS if is_remote else FLAGS))


def span_attributes(attributes: Mapping[str, Any] | None) -> bytes:
    """Return what is said of a span as it lies there."""
    return _attributes(b"\x4a", attributes)


def span_name(name: str, kind: str) -> bytes:
    """Return what a span is called, and of which kind it is."""
    return _text(b"\x2a", name) + b"\x30" + SMALL[SpanKind[kind].value + 1]


def _ids(context: SpanContext) -> bytes:
    """Return the fields that name a span; a link has them by the same numbers."""
    trace_id, span_id, _, _, state, _ = context
    ids = _two_ids(0x0A10, trace_id >> 64, trace_id & LOWER_HALF, 0x1208, span_id)
    return ids + _text(b"\x1a", state.to_header()) if state else ids


def _event(event: Event) -> bytes:
    said = _eight(0x09, event.timestamp) + _text(b"\x12", event.name) + _attributes(b"\x1a", event.attributes)
    return said + _count(b"\x20", event.dropped_attributes)


def _link(link: Link) -> bytes:
    said = _ids(link.context) + _attributes(b"\x22", link.attributes)
    flags = KNOWN | REMOTE if link.context.is_remote else KNOWN
    return said + _count(b"\x28", link.dropped_attributes) + struct.pack("<BI", 0x35, flags)


# ------------------------------------------------------------------------------------ attributes


def _attributes(tag: bytes, attributes: Mapping[str, Any] | None) -> bytes:
    if not attributes:
        return b""
    return b"".join([tag + _pair_of(key, value) for key, value in attributes.items()])


def _pair_of(key: str, value: Any) -> bytes:
    usual = len(value) <= MOST_KEPT_CHARACTERS if type(value) is str else type(value) in (int, bool)
    return _usual_pair(key, value) if usual else _pair(key, value)


def _pair(key: str, value: Any) -> bytes:
    pair = _field(b"\x0a", _utf8(key)) + _field(b"\x12", _value(value))
    return _varint(len(pair)) + pair


_usual_pair = lru_cache(maxsize=1_000, typed=True)(_pair)
"""Most attributes of most spans are those of the spans before."""


def _value(value: Any) -> bytes:
    """Return an ``AnyValue``; what OTLP has no number for is told in words."""
    if isinstance(value, str):
        return _field(b"\x0a", _utf8(value))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int) and value in INT64:
        return b"\x18" + _varint(value % (1 << 64))
    if isinstance(value, float):
        return _double(0x21, value)
    if isinstance(value, bytes):
        return _field(b"\x3a", value)
    if isinstance(value, Sequence):
        return _field(b"\x2a", b"".join([_field(b"\x0a", _value(item)) for item in value]))
    if isinstance(value, Mapping):
        return _field(b"\x32", _attributes(b"\x0a", {str(key): item for key, item in value.items()}))
    return b"" if value is None else _field(b"\x0a", _utf8(str(value)))


# ------------------------------------------------------------------------------------ fields


def _field(tag: bytes, data: bytes) -> bytes:
    size_bytes = len(data)
    return tag + (SMALL[size_bytes] if size_bytes < len(SMALL) else _varint(size_bytes)) + data


def _text(tag: bytes, text: str | None) -> bytes:
    return _field(tag, _utf8(text)) if text else b""


def _utf8(text: str) -> bytes:
    return text.encode(errors="replace")


def _count(tag: bytes, count: int) -> bytes:
    return tag + _varint(count) if count else b""


def _varint(number: int) -> bytes:
    if number < len(SMALL):
        return SMALL[number]
    data = bytearray()
    while number >= 128:
        data.append(number & 127 | 128)
        number >>= 7
    data.append(number)
    return bytes(data)
