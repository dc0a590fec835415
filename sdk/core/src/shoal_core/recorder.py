"""Spans of our own, which are put together where they are sent: in the exporters' thread, all of a batch at once.

So are all that Shoal makes. Few tasks are recorded of many, and what is done for one where it runs is done with a cold
cache, at two to three times the cost: so there is only noted what there is to tell, and when. An id is drawn when
somebody asks for it.

Nothing of that can be seen: nobody else can sample, change or limit such a span where the provider is ours, with the
SDK's usual samplers and limits, and only our exporters listen. Anywhere else there is no recorder (``telemetry``), and
the SDK's way is taken (``bus.spans.begin``). The user's code finds a span that takes all that one of the SDK's takes;
only to read what was said of it is not offered, as OpenTelemetry's API does not.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.util import BoundedList
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AnyValue

from shoal_core.bus.spans import NOT_RECORDED, About, NamedSpan, OfMany, OfTask, all_said, class_name, links_of
from shoal_core.otlp import NOTHING_MORE, full_span, head, patiently, span_attributes, span_name
from shoal_core.protocol.traces import Attributes, trace_named

SAMPLED = TraceFlags(TraceFlags.SAMPLED)
SAMPLED_AT_RANDOM = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)
UNSET = Status(StatusCode.UNSET)
MOST = 128
"""So many attributes, and so many events, the SDK keeps of a span where nobody says otherwise."""
logger = logging.getLogger("shoal.telemetry")


def is_usual(environment: Mapping[str, str]) -> bool:
    """Tell whether the SDK would record all that hangs below what is recorded, as it is, by its own variables."""
    sampler = environment.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    return (not sampler or sampler.startswith("parentbased_") or sampler == "always_on") and not any(
        name.startswith("OTEL_") and name.endswith("_LIMIT") for name in environment
    )


class Recorder:
    """Hands the spans of one provider and one scope to its processors (any thread).

    What exports for these has to be ``Telling``.
    """

    def __init__(
        self,
        resource: Resource,
        scope: InstrumentationScope,
        ids: IdGenerator,
        processors: Sequence[SpanProcessor],
    ) -> None:
        self.resource = resource
        self.scope = scope
        self._ids = ids
        self.processors = processors

    def begin(
        self,
        name: str,
        kind: str,
        above: Span,
        about: About,
        began_ns: int,
        links: Sequence[str],
    ) -> Span:
        """Begin a span below another one; it is recorded if that is, or if nothing is really there.

        ``about`` tells what there is to say of it, if need be once that is asked for; ``links`` are traces.
        """
        if type(above) is OwnSpan or type(above) is NamedSpan:
            return OwnSpan(self, name, kind, None, above, about, began_ns, links)
        parent = above.get_span_context()
        if not parent.is_valid:
            root = SpanContext(self._ids.generate_trace_id(), self._ids.generate_span_id(), False, SAMPLED_AT_RANDOM)
            return OwnSpan(self, name, kind, root, None, about, began_ns, links)
        if not parent.trace_flags & TraceFlags.SAMPLED:
            return NonRecordingSpan(parent)
        return OwnSpan(self, name, kind, None, above, about, began_ns, links)

    def root(self, trace_id: int, name: str, kind: str, about: About, began_ns: int) -> str:
        """Record a span that ends now and with which a trace begins; return the trace of what hangs below it."""
        named = SpanContext(trace_id, self._ids.generate_span_id(), False, SAMPLED_AT_RANDOM)
        OwnSpan(self, name, kind, named, None, about, began_ns, ()).end()
        return trace_named(trace_id, named.span_id, SAMPLED_AT_RANDOM, "")

    def named_below(self, parent: SpanContext) -> SpanContext:
        """Return how a new span is named; what hangs below what is not recorded is not either."""
        if parent is NOT_RECORDED:
            return parent
        trace_id, _, _, flags, state, _ = parent
        flags = SAMPLED_AT_RANDOM if flags & TraceFlags.RANDOM_TRACE_ID else SAMPLED
        return SpanContext(trace_id, self._ids.generate_span_id(), False, flags, state)


class OwnSpan(NonRecordingSpan):
    """A span, with all that code which finds it open may do to it (any thread)."""

    context = SpanContext(1, 1, False, SAMPLED)
    """All that a processor looks at: that it is recorded."""

    def __init__(
        self,
        recorder: Recorder,
        name: str,
        kind: str,
        named: SpanContext | None,
        above: Span | None,
        about: About,
        began_ns: int,
        links: Sequence[str],
    ) -> None:
        self._recorder = recorder
        self._name = name
        self._kind = kind
        self._named = named
        self._above = above
        self._about = about
        self._began_ns = began_ns
        self._ended_ns = 0
        self._links = links
        self._said: Said | None = None

    def get_span_context(self) -> SpanContext:
        """Return how it is named."""
        if self._named is None:
            assert self._above is not None
            above = self._above.get_span_context()
            with _lock:
                self._named = self._named or self._recorder.named_below(above)
        return self._named

    @property
    def resource(self) -> Resource:
        """What is said of the process."""
        return self._recorder.resource

    @property
    def instrumentation_scope(self) -> InstrumentationScope:
        """Who made it: Shoal."""
        return self._recorder.scope

    def is_recording(self) -> bool:
        """Tell whether what is said of it is kept: until it ends."""
        return not self._ended_ns

    def set_attribute(self, key: str, value: AnyValue) -> None:
        """Say one thing of it."""
        self.set_attributes({key: value})

    def set_attributes(self, attributes: Mapping[str, AnyValue]) -> None:
        """Say some things of it."""
        if self._goes_on("set_attribute"):
            said = self._what_is_said().attributes
            for key, value in attributes.items():
                said[key] = value

    def add_event(
        self, name: str, attributes: Mapping[str, AnyValue] | None = None, timestamp: int | None = None
    ) -> None:
        """Say what happened in it."""
        if self._goes_on("add_event"):
            self._what_is_said().events.append(Event(name, BoundedAttributes(MOST, attributes), timestamp))

    def record_exception(
        self,
        exception: BaseException,
        attributes: Mapping[str, AnyValue] | None = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Say that an exception happened in it."""
        about: dict[str, AnyValue] = {
            "exception.type": class_name(type(exception)),
            "exception.message": str(exception),
            "exception.stacktrace": "".join(traceback.format_exception(exception)),
            "exception.escaped": str(escaped),
        }
        self.add_event("exception", {**about, **(attributes or {})}, timestamp)

    def add_link(self, context: SpanContext, attributes: Mapping[str, AnyValue] | None = None) -> None:
        """Say that it has to do with another one."""
        if self._goes_on("add_link") and (context.is_valid or attributes or context.trace_state):
            self._what_is_said().links.append(Link(context, BoundedAttributes(MOST, attributes)))

    def update_name(self, name: str) -> None:
        """Call it something else."""
        if self._goes_on("update_name"):
            self._name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Say how it went; that it went well is the last word."""
        new = status if isinstance(status, Status) else Status(status, description)
        if self._goes_on("set_status") and new.status_code is not StatusCode.UNSET:
            said = self._what_is_said()
            if said.status.status_code is not StatusCode.OK:
                said.status = new

    def end(self, end_time: int | None = None) -> None:
        """Have it sent: it ends now."""
        if not self._ended_ns:
            self._ended_ns = end_time or time.time_ns()
            for processor in self._recorder.processors:
                processor.on_end(self)  # type: ignore[arg-type]  # it looks at the context, and hands on the span
        else:
            self._warn_that_it_has_ended("end")

    def as_bytes(self) -> bytes:
        """Return the span as OTLP has it; nothing where what it hangs below turns out not to be recorded."""
        if self._said is not None or self._links:
            told = self.told()
            return b"" if told is None else full_span(told)
        named, above = self._named or self.get_span_context(), self._above
        if named is NOT_RECORDED:
            return b""
        parent = None if above is None else above.get_span_context()
        return head(named, parent, self._began_ns, self._ended_ns) + _usual(self._name, self._kind, self._about)

    def told(self) -> ReadableSpan | None:
        """Return the span as exporters know it; None where what it hangs below turns out not to be recorded."""
        named = self.get_span_context()
        if named is NOT_RECORDED:
            return None
        said = self._said
        return ReadableSpan(
            self._name,
            named,
            self._parent(),
            self._recorder.resource,
            all_said(self._kind, self._about) if said is None else said.attributes,
            () if said is None else said.events,
            links_of(self._links) if said is None else [*links_of(self._links), *said.links],
            SpanKind[self._kind],
            status=UNSET if said is None else said.status,
            start_time=self._began_ns,
            end_time=self._ended_ns,
            instrumentation_scope=self._recorder.scope,
        )

    def _parent(self) -> SpanContext | None:
        return None if self._above is None else self._above.get_span_context()

    def _goes_on(self, what: str) -> bool:
        if self._ended_ns:
            self._warn_that_it_has_ended(what)
        return not self._ended_ns

    def _warn_that_it_has_ended(self, what: str) -> None:
        logger.warning("%s was called on the span %r, which has ended", what, self._name)

    def _what_is_said(self) -> Said:
        if self._said is None:
            about = all_said(self._kind, self._about)
            with _lock:
                self._said = self._said or Said(about)
        return self._said


def _usual(name: str, kind: str, about: About) -> bytes:
    """Return what is said of a span in which nothing happened, and of which it is not said how it went."""
    if type(about) is OfTask:
        task_id = about.task_id()
        return task_id.encode().join(_around_ids(name, kind, len(task_id), about.say, about.common))
    if type(about) is OfMany:
        return _of_many(name, kind, about.say, about.common)
    return span_name(name, kind) + span_attributes(all_said(kind, about)) + NOTHING_MORE


@lru_cache(maxsize=1_000)
def _of_many(name: str, kind: str, say: Callable[..., Attributes], common: tuple[Hashable, ...]) -> bytes:
    return _usual(name, kind, say(*common))


@lru_cache(maxsize=1_000)
def _around_ids(
    name: str, kind: str, length: int, say: Callable[..., Attributes], common: tuple[Hashable, ...]
) -> list[bytes]:
    """Return what is said of many tasks: the parts between which there is the id of each, which has this length."""
    anybody = "\0" * length
    return _usual(name, kind, say(anybody, *common)).split(anybody.encode())


class Said:
    """What is said of a span whose beginning said some things already, within the SDK's usual limits."""

    def __init__(self, attributes: Attributes) -> None:
        self.attributes = BoundedAttributes(MOST, attributes, immutable=False)
        self.events: Any = BoundedList(MOST)
        self.links: list[Link] = []
        self.status = UNSET


class Telling(SpanExporter):
    """Has another exporter send spans, those of our own too."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan | OwnSpan]) -> SpanExportResult:
        """Send spans, and wait until the collector has them or there is no hope."""
        told = [span.told() if isinstance(span, OwnSpan) else span for span in patiently(spans)]
        return self._exporter.export([span for span in told if span is not None])

    def shutdown(self) -> None:
        """Send nothing any more."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what is still here."""
        return self._exporter.force_flush(timeout_millis)


_lock = threading.Lock()
"""Held where something of a span is made that was asked for first; one for all, since it takes a moment."""
