"""The tracing context that travels with messages: W3C ``traceparent`` in headers and in task records.

Off unless ``SHOAL_TRACING=1`` or an OpenTelemetry exporter is configured (``OTEL_EXPORTER_OTLP_ENDPOINT``,
``OTEL_TRACES_EXPORTER``); while it is off nothing of OpenTelemetry is imported, and everything here costs one test of
a constant. The environment is read once, when this module is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

TRACEPARENT = "traceparent"


def wanted(environment: Mapping[str, str]) -> bool:
    """Tell whether an environment asks for tracing."""
    switch = environment.get("SHOAL_TRACING", "").lower()
    if switch:
        return switch not in ("0", "false", "no", "off")
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    return bool(environment.get("OTEL_EXPORTER_OTLP_ENDPOINT") or exporter) and exporter != "none"


ENABLED = wanted(os.environ)
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def current_traceparent() -> str:
    """Return the context of the span that is open here, "" if there is none."""
    if not ENABLED:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(TRACEPARENT, "")


def message_headers(headers: dict[str, str] | None = None) -> dict[str, str] | None:
    """Return headers for a message that goes out now: ``headers``, and the context if there is one."""
    traceparent = current_traceparent()
    return {**(headers or {}), TRACEPARENT: traceparent} if traceparent else headers


def span(name: str, kind: str = "INTERNAL", traceparent: str = "", **attributes: Any) -> AbstractContextManager[Any]:
    """Open a span as a context manager; its parent is ``traceparent``, else the span that is open here.

    ``kind`` is one of OpenTelemetry's: INTERNAL, PRODUCER, CONSUMER, CLIENT, SERVER.
    """
    return _open_span(name, kind, traceparent, attributes) if ENABLED else _NOTHING


def handling(subject: str, headers: Mapping[str, str] | None) -> AbstractContextManager[Any]:
    """Open the span in which a message that arrived is handled."""
    if not ENABLED:
        return _NOTHING
    return span(f"process {subject}", "CONSUMER", (headers or {}).get(TRACEPARENT, ""), **{"messaging.system": "nats"})


@contextmanager
def _open_span(name: str, kind: str, traceparent: str, attributes: Mapping[str, Any]) -> Iterator[Any]:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    parent = TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent}) if traceparent else None
    tracer = trace.get_tracer("shoal")
    with tracer.start_as_current_span(
        name, context=parent, kind=trace.SpanKind[kind], attributes=dict(attributes)
    ) as opened:
        yield opened
