"""Spans that we make ourselves are those that the SDK would have made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Span, SpanContext, Status, StatusCode

from shoal_core import __version__, telemetry
from shoal_core.bus import spans
from shoal_core.protocol.errors import TaskError
from shoal_core.protocol.traces import Attributes
from shoal_core.recorder import Recorder, Telling, is_usual

PARENT = f"00-{7:032x}-{8:016x}-03 vendor=says"
LINKS = [f"00-{1:032x}-{2:016x}-01", "no trace"]
ABOUT: Attributes = {"shoal.task.attempt": 0, "messaging.message.id": "x", "share": 0.5, "faas.coldstart": True}


def as_told(span: ReadableSpan) -> dict[str, Any]:
    """Return all that an exporter could see of a span but for what is new in each."""
    context = span.context
    assert context is not None
    return {
        "name": span.name,
        "parent": span.parent,
        "trace": (context.trace_id if span.parent else 0, context.trace_flags, context.trace_state, context.is_remote),
        "kind": span.kind,
        "attributes": dict(span.attributes or {}),
        "events": list(span.events),
        "links": [(link.context, dict(link.attributes or {})) for link in span.links],
        "status": (span.status.status_code, span.status.description),
        "began": span.start_time,
        "resource": span.resource,
        "scope": span.instrumentation_scope,
        "dropped": (span.dropped_attributes, span.dropped_events, span.dropped_links),
    }


@dataclass
class Ways:
    """What the SDK's tracer and our recorder both send to."""

    exporter: InMemorySpanExporter
    recorder: Recorder


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ways]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "test"}), shutdown_on_exit=False)
    processor = SimpleSpanProcessor(Telling(exporter))
    provider.add_span_processor(processor)
    monkeypatch.setattr(spans, "tracer", provider.get_tracer("shoal", __version__))
    scope = InstrumentationScope("shoal", __version__)
    yield Ways(exporter, Recorder(provider.resource, scope, RandomIdGenerator(), [processor]))
    provider.shutdown()


class Queue(SpanProcessor):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


@pytest.mark.parametrize("kind", ["INTERNAL", "PRODUCER", "CLIENT"])
@pytest.mark.parametrize("trace_above", ["", PARENT])
@pytest.mark.parametrize("failure", [None, ("worker_crashed", "it was killed " * 200)])
def test_both_ways_lead_to_the_same_span(
    monkeypatch: pytest.MonkeyPatch, ways: Ways, kind: str, trace_above: str, failure: tuple[str, str] | None
) -> None:
    above = spans.named(trace_above) if trace_above else trace.INVALID_SPAN
    for way in (None, ways.recorder):
        monkeypatch.setattr(spans, "recorder", way)
        made = spans.record("work", kind, above, ABOUT, 5, failure, LINKS)
        assert ways.exporter.get_finished_spans()[-1].context == made.get_span_context()
    by_the_sdk, by_us = ways.exporter.get_finished_spans()
    assert as_told(by_us) == as_told(by_the_sdk)
    assert by_us.context is not None
    assert by_us.context.span_id not in (0, by_the_sdk.context.span_id)
    assert (by_us.end_time or 0) > 5


def test_below_what_is_not_recorded_nothing_is() -> None:
    exporter = InMemorySpanExporter()
    scope = InstrumentationScope("shoal")
    recorder = Recorder(Resource({}), scope, RandomIdGenerator(), [SimpleSpanProcessor(Telling(exporter))])
    for above in (spans.UNRECORDED_SPAN, spans.named("-"), spans.named("00-no-trace")):
        span = recorder.begin("work", "INTERNAL", above, dict, 5, [])
        recorder.begin("below", "INTERNAL", span, dict, 5, []).end()
        span.end()
    assert not exporter.get_finished_spans()


def test_a_span_says_in_time_how_it_is_named_and_stays_so() -> None:
    exporter = InMemorySpanExporter()
    scope = InstrumentationScope("shoal")
    recorder = Recorder(Resource({}), scope, RandomIdGenerator(), [SimpleSpanProcessor(Telling(exporter))])
    above = recorder.begin("above", "CONSUMER", spans.named(PARENT), dict, 5, [])
    for asked_first in (True, False):
        below = recorder.begin("below", "INTERNAL", above, dict, 6, [])
        named = below.get_span_context() if asked_first else None
        below.end()
        told = exporter.get_finished_spans()[-1]
        assert told.parent == above.get_span_context()
        assert told.context == below.get_span_context()
        assert named in (None, told.context)
    above.end()
    assert exporter.get_finished_spans()[-1].context == above.get_span_context()


def test_what_there_is_to_say_is_put_together_when_it_is_sent() -> None:
    exporter = InMemorySpanExporter()
    asked: list[str] = []

    def about() -> Attributes:
        asked.append("now")
        return ABOUT

    listener = Queue()
    recorder = Recorder(Resource({}), InstrumentationScope("shoal"), RandomIdGenerator(), [listener])
    recorder.begin("work", "INTERNAL", spans.named(PARENT), about, 5, []).end()
    assert not asked
    Telling(exporter).export(listener.spans)
    assert [dict(span.attributes or {}) for span in exporter.get_finished_spans()] == [dict(ABOUT)]


def test_who_listens_beside_our_exporters_hears_of_all_spans_from_their_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spans, "sampling", None)
    monkeypatch.setattr(spans, "recorder", None)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    provider = telemetry._new_provider({})
    assert spans.recorder is not None
    provider.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    assert spans.recorder is None
    assert not isinstance(trace.get_tracer_provider(), type(provider)), "this process has kept its own"


@pytest.mark.parametrize(
    ("environment", "usual"),
    [
        ({}, True),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"}, True),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, True),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, False),
        ({"OTEL_TRACES_SAMPLER": "of_the_users_own"}, False),
        ({"OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT": "5"}, False),
        ({"OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "100"}, False),
    ],
)
def test_what_may_change_a_span_takes_the_sdks_way(environment: dict[str, str], usual: bool) -> None:
    assert is_usual(environment) == usual


def say(span: Span) -> None:
    """Do to a span what a user's code may do to one that it finds open."""
    span.set_attribute("one", 1)
    span.set_attributes({"two": [1, 2], "shoal.task.attempt": 7, "": "no key", "object": cast("str", object())})
    for number in range(200):
        span.set_attribute(f"many.{number}", number)
        span.add_event(f"event {number}", {"number": number}, number)
    span.record_exception(ValueError("no"), {"exception.escaped": "maybe", "more": True}, 5)
    span.record_exception(TaskError("f", "no traceback", ValueError("no")), timestamp=6)
    span.add_link(SpanContext(5, 6, is_remote=False), {"why": "because"})
    span.add_link(SpanContext(0, 0, is_remote=False))
    span.update_name("another name")
    span.set_status(Status(StatusCode.ERROR, "it failed"))
    span.set_status(StatusCode.UNSET)
    span.set_status(StatusCode.OK)
    span.set_status(StatusCode.ERROR, "too late")
    assert span.is_recording()
    span.end(77)
    assert not span.is_recording()
    span.set_attribute("late", 1)
    span.update_name("late")
    span.add_event("late")
    span.end(78)


def test_what_the_users_code_says_of_the_span_in_which_it_runs_is_kept_as_the_sdk_keeps_it(
    monkeypatch: pytest.MonkeyPatch, ways: Ways
) -> None:
    for way in (None, ways.recorder):
        monkeypatch.setattr(spans, "recorder", way)
        say(spans.begin("work", "INTERNAL", spans.named(PARENT), ABOUT, 5, LINKS))
    by_the_sdk, by_us = map(as_told, ways.exporter.get_finished_spans())
    for told in (by_the_sdk, by_us):
        told["events"] = [(event.name, dict(event.attributes or {}), event.timestamp) for event in told["events"]]
    assert {what for what in by_us if by_us[what] != by_the_sdk[what]} == set()
