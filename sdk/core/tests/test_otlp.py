"""Spans as bytes: what they decode to is what OpenTelemetry's own encoder makes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN, Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.span import TraceState

from shoal_core import exporter, otlp, telemetry
from shoal_core.bus.spans import OfMany, OfTask, named
from shoal_core.exporter import QuickExporter, quick
from shoal_core.otlp import encode
from shoal_core.protocol.ids import ProcessId, TaskNumber
from shoal_core.protocol.traces import Attributes
from shoal_core.recorder import Recorder, Telling

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
numbers = st.integers(-(1 << 63), (1 << 63) - 1)
scalars = st.one_of(texts, st.booleans(), numbers, st.floats(allow_nan=False), st.binary(max_size=200))
values = st.recursive(
    st.none() | scalars,
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(texts, parts, max_size=3),
    max_leaves=6,
)
attributes = st.dictionaries(texts, values, max_size=5)
times = st.integers(0, (1 << 64) - 1)
states = st.sampled_from([TraceState(), TraceState([("vendor", "says"), ("other", "too")])])
contexts = st.builds(
    SpanContext,
    st.integers(1, (1 << 128) - 1),
    st.integers(1, (1 << 64) - 1),
    st.booleans(),
    st.just(TraceFlags(1)),
    states,
)
resources = st.builds(Resource, st.dictionaries(texts.filter(bool), texts | numbers, max_size=3), texts)
scopes = st.none() | st.builds(InstrumentationScope, texts, texts, texts, attributes)
statuses = st.sampled_from([Status(), Status(StatusCode.OK), Status(StatusCode.ERROR, "it was killed")])


@st.composite
def several(draw: st.DrawFn) -> list[ReadableSpan]:
    """Draw spans of a process or two, made by whoever."""
    of = draw(st.lists(resources, min_size=1, max_size=2)), draw(st.lists(scopes, min_size=1, max_size=2))
    spans = st.builds(
        ReadableSpan,
        texts,
        contexts,
        parent=st.none() | contexts,
        resource=st.sampled_from(of[0]),
        attributes=attributes,
        events=st.lists(st.builds(Event, texts, attributes, times), max_size=2),
        links=st.lists(st.builds(_link, contexts, attributes), max_size=2),
        kind=st.sampled_from(SpanKind),
        status=statuses,
        start_time=times,
        end_time=times,
        instrumentation_scope=st.sampled_from(of[1]),
    )
    return draw(st.lists(spans, min_size=1, max_size=4))


def _link(context: SpanContext, about: Mapping[str, Any]) -> Link:
    return Link(SpanContext(context.trace_id, context.span_id, context.is_remote, context.trace_flags), about)


def told(data: bytes) -> dict[str, dict[str, list[str]]]:
    """Return all that a request says, by process and by who made the spans, whatever their order."""
    request = ExportTraceServiceRequest.FromString(data)
    groups: dict[str, dict[str, list[str]]] = {}
    for process in request.resource_spans:
        made = groups.setdefault(f"{process.resource}{process.schema_url}", {})
        for group in process.scope_spans:
            made.setdefault(f"{group.scope}{group.schema_url}", []).extend(map(str, group.spans))
    return {process: {scope: sorted(spans) for scope, spans in made.items()} for process, made in groups.items()}


@given(several())
def test_a_collector_is_told_what_opentelemetrys_own_encoder_tells(spans: list[ReadableSpan]) -> None:
    assert told(encode(spans)) == told(encode_spans(spans).SerializeToString())


class Kept(SpanProcessor):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


TRACES = [f"00-{1:032x}-{2:016x}-01", f"00-{3:032x}-{4:016x}-03", "no trace"]


@given(
    st.sampled_from(["", f"00-{5:032x}-{6:016x}-03 vendor=says", *TRACES]),
    texts,
    st.sampled_from(["INTERNAL", "PRODUCER", "CONSUMER", "CLIENT"]),
    st.dictionaries(texts.filter(bool), texts | st.booleans() | numbers, max_size=5),
    st.lists(st.sampled_from(TRACES), max_size=3),
    st.booleans(),
)
def test_a_span_of_our_own_is_told_as_if_it_were_the_sdks(
    above: str, name: str, kind: str, about: Attributes, links: list[str], more: bool
) -> None:
    kept = Kept()
    recorder = Recorder(Resource({"service.name": "test"}), InstrumentationScope("shoal"), RandomIdGenerator(), [kept])
    span = recorder.begin(name, kind, named(above) if above else INVALID_SPAN, lambda: about, 5, links)
    below = recorder.begin("below", "INTERNAL", span, dict, 6, [])
    if more:
        span.add_event("event", {"number": 1})
        span.set_status(StatusCode.ERROR, "it failed")
    below.end()
    span.end()
    as_the_sdk_has_them = [one for one in (span.told() for span in kept.spans) if one is not None]
    assert len(as_the_sdk_has_them) == (0 if above == "no trace" else 2)
    if as_the_sdk_has_them:
        assert told(encode(kept.spans)) == told(encode_spans(as_the_sdk_has_them).SerializeToString())
    else:
        assert all(not span.as_bytes() for span in kept.spans)


def _about_task(task_id: str, about: tuple[tuple[str, str | int], ...]) -> Attributes:
    return {"messaging.message.id": task_id, **dict(about), "faas.invocation_id": task_id}


@given(
    st.lists(st.tuples(texts.filter(bool), texts | numbers), max_size=3), st.lists(st.integers(0, 1 << 40), min_size=1)
)
def test_what_many_spans_have_in_common_is_told_of_each_with_its_tasks_own_id(
    common: list[tuple[str, str | int]], tasks: list[int]
) -> None:
    kept = Kept()
    recorder = Recorder(Resource({"service.name": "test"}), InstrumentationScope("shoal"), RandomIdGenerator(), [kept])
    for task in tasks:
        about = OfTask(_about_task, TaskNumber(task), ProcessId("ab" * 12), (tuple(common),))
        recorder.begin("work", "CONSUMER", named(TRACES[0]), about, 5, []).end()
        recorder.begin("wait", "INTERNAL", named(TRACES[0]), OfMany(_about_task, ("any", tuple(common))), 5, []).end()
    as_the_sdk_has_them = [span.told() for span in kept.spans]
    assert told(encode(kept.spans)) == told(encode_spans(as_the_sdk_has_them).SerializeToString())


def test_what_was_dropped_by_limits_is_told() -> None:
    kept = InMemorySpanExporter()
    limits = SpanLimits(max_span_attributes=1, max_events=1, max_links=1, max_event_attributes=1, max_link_attributes=1)
    provider = TracerProvider(span_limits=limits, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(kept))
    context = SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1))
    about = {"a": 1, "b": 2, "c": 3}
    span = provider.get_tracer("test").start_span("work", attributes=about, links=[Link(context, about)] * 4)
    for _ in range(5):
        span.add_event("event", about)
    span.end()
    spans = kept.get_finished_spans()
    assert told(encode(spans)) == told(encode_spans(spans).SerializeToString())


@pytest.mark.parametrize("value", [1 << 64, {1, 2}])
def test_what_otlp_has_no_number_for_is_told_in_words(value: object) -> None:
    span = ReadableSpan("work", SpanContext(1, 2, False), attributes={"odd": value})  # type: ignore[dict-item]
    request = ExportTraceServiceRequest.FromString(encode([span]))
    [pair] = request.resource_spans[0].scope_spans[0].spans[0].attributes
    assert pair.value.string_value == str(value)


def test_text_that_is_no_unicode_costs_no_span() -> None:
    span = ReadableSpan("work\udc80", SpanContext(1, 2, False), attributes={})
    request = ExportTraceServiceRequest.FromString(encode([span]))
    assert request.resource_spans[0].scope_spans[0].spans[0].name == "work?"


def test_the_exporter_that_is_installed_has_what_sends_our_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    [made] = telemetry._exporters({})
    assert isinstance(made, QuickExporter)
    made.shutdown()


def test_an_exporter_that_cannot_send_bytes_or_counts_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(quick(InMemorySpanExporter()), Telling)
    monkeypatch.setenv(exporter.COUNTS_ITSELF, "true")
    counting: SpanExporter = OTLPSpanExporter("http://127.0.0.1:1")
    assert isinstance(quick(counting), Telling)
    counting.shutdown()


def test_many_spans_are_gone_through_with_pauses_in_which_other_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert list(otlp.patiently(range(3 * otlp.AT_ONCE + 1))) == list(range(3 * otlp.AT_ONCE + 1))
    assert len(pauses) == 3
