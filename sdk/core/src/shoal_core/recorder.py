"""Spans that have ended by the time they are told of, handed to the exporters without being begun first.

Most of our own spans are of that kind: of a submission, of a wait in a queue. The SDK's way, a span that is begun, is
open to everybody and then ends, costs five times as much, for what nobody can see of such a span: nobody else can
sample, change or limit it where the provider is ours, with the SDK's usual samplers and limits, and only our exporters
listen. Anywhere else there is no recorder (``telemetry``), and the SDK's way is taken (``bus.spans.record``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from opentelemetry import trace as api
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

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

    def record(
        self,
        name: str,
        kind: SpanKind,
        context: Context | None,
        attributes: Attributes,
        began_ns: int,
        description: str | None,
        links: Sequence[Link],
    ) -> SpanContext:
        """Record a span that ends now, below the one in ``context``; with a ``description`` it has failed."""
        parent: SpanContext | None = api.get_current_span(context).get_span_context()
        if parent is None or not parent.is_valid:
            made = SpanContext(self._ids.generate_trace_id(), self._ids.generate_span_id(), False, SAMPLED_AT_RANDOM)
            parent = None
        else:
            flags = SAMPLED_AT_RANDOM if parent.trace_flags.random_trace_id else SAMPLED
            made = SpanContext(parent.trace_id, self._ids.generate_span_id(), False, flags, parent.trace_state)
        span = ReadableSpan(
            name,
            made,
            parent,
            self._resource,
            attributes,
            links=links,
            kind=kind,
            status=UNSET if description is None else Status(StatusCode.ERROR, description),
            start_time=began_ns,
            end_time=time.time_ns(),
            instrumentation_scope=self._scope,
        )
        for processor in self._processors:
            processor.on_end(span)
        return made
