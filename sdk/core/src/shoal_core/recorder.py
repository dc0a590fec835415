"""Spans of our own, handed to the exporters when they have ended, without being open to anybody before.

Most of our spans are of that kind: of a submission, of a wait in a queue, of what a task's process does around the
user's code. The SDK's way, a span whose beginning is told and that anybody may change, costs three times as much, for
what nobody can see of such a span: nobody else can sample, change or limit it where the provider is ours, with the
SDK's usual samplers and limits, and only our exporters listen. Anywhere else there is no recorder (``telemetry``), and
the SDK's way is taken (``bus.spans.begin``); so it is always for the span in which the user's code runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AnyValue

from shoal_core.protocol.traces import Attributes

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
SAMPLED_AT_RANDOM = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)
UNSET = Status(StatusCode.UNSET)


def is_usual(environment: Mapping[str, str]) -> bool:
    """Tell whether the SDK would record all that hangs below what is recorded, as it is, by its own variables."""
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    return (not sampler or sampler.startswith("parentbased_") or sampler == "always_on") and not any(
        name.startswith("OTEL_") and name.endswith("_LIMIT") for name in environment
    )


class Recorder:
    """Hands the spans of one provider and one scope to its processors (any thread)."""

    def __init__(
        self,
        resource: Resource,
        scope: InstrumentationScope,
        ids: IdGenerator,
        processors: Sequence[SpanProcessor],
    ) -> None:
        self._resource = resource
        self._scope = scope
        self._ids = ids
        self._processors = processors

    def begin(
        self,
        name: str,
        kind: SpanKind,
        context: Context | None,
        attributes: Attributes,
        began_ns: int,
        links: Sequence[Link],
    ) -> Span:
        """Begin a span below the one in ``context`` (None: the one that is open here); it is recorded if that is."""
        parent: SpanContext | None = api.get_current_span(context).get_span_context()
        if parent is None or not parent.is_valid:
            made = SpanContext(self._ids.generate_trace_id(), self._ids.generate_span_id(), False, SAMPLED_AT_RANDOM)
            parent = None
        elif not parent.trace_flags & TraceFlags.SAMPLED:
            return NonRecordingSpan(parent)
        else:
            flags = SAMPLED_AT_RANDOM if parent.trace_flags.random_trace_id else SAMPLED
            made = SpanContext(parent.trace_id, self._ids.generate_span_id(), False, flags, parent.trace_state)
        return OwnSpan(self, name, kind, made, parent, attributes, began_ns, links)

    def ended(self, span: OwnSpan) -> None:
        """Hand over a span that ends now."""
        told = ReadableSpan(
            span.name,
            span.get_span_context(),
            span.parent,
            self._resource,
            span.attributes,
            span.events,
            span.links,
            span.kind,
            status=span.status,
            start_time=span.began_ns,
            end_time=time.time_ns(),
            instrumentation_scope=self._scope,
        )
        for processor in self._processors:
            processor.on_end(told)


class OwnSpan(NonRecordingSpan):
    """A span that only those who began it know, in one thread; they end it once."""

    def __init__(
        self,
        recorder: Recorder,
        name: str,
        kind: SpanKind,
        context: SpanContext,
        parent: SpanContext | None,
        attributes: Attributes,
        began_ns: int,
        links: Sequence[Link],
    ) -> None:
        super().__init__(context)
        self._recorder = recorder
        self.name = name
        self.kind = kind
        self.parent = parent
        self.attributes: dict[str, AnyValue] = dict(attributes)
        self.began_ns = began_ns
        self.links = links
        self.events: list[Event] = []
        self.status = UNSET

    def is_recording(self) -> bool:
        """Tell that what is said of it is kept."""
        return True

    def set_attribute(self, key: str, value: AnyValue) -> None:
        """Say one thing of it."""
        self.attributes[key] = value

    def add_event(
        self, name: str, attributes: Mapping[str, AnyValue] | None = None, timestamp: int | None = None
    ) -> None:
        """Say what happened in it."""
        self.events.append(Event(name, attributes, timestamp))

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Say how it went."""
        self.status = status if isinstance(status, Status) else Status(status, description)

    def end(self, end_time: int | None = None) -> None:
        """Have it sent: it ends now."""
        self._recorder.ended(self)
