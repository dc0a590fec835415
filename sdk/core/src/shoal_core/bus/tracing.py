"""Whether this process traces, and the traces of the messages that it sends and gets.

Off unless an OpenTelemetry exporter is configured (``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_TRACES_EXPORTER``) or
``SHOAL_TRACING=1``; ``OTEL_SDK_DISABLED=true`` turns it off in any case. While it is off nothing of OpenTelemetry is
imported, and everything here costs one test of a constant. The environment is read once, when this module is imported.

What is done while it is on is in ``spans``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from shoal_core.protocol.traces import Spanned, headers_of, is_recorded, trace_of

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NO = ("0", "false", "no", "off")


def wanted(environment: Mapping[str, str]) -> bool:
    """Tell whether an environment asks for tracing."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    switch = environment.get("SHOAL_TRACING", "").lower()
    if switch:
        return switch not in _NO
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    return any(environment.get(name) for name in (*_ENDPOINTS, "OTEL_TRACES_EXPORTER")) and exporter != "none"


ENABLED = wanted(os.environ)
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def current_trace() -> str:
    """Return the trace of what happens here now (see ``protocol.traces``)."""
    if not ENABLED:
        return ""
    from shoal_core.bus import spans

    return spans.current_trace()


def message_headers(headers: dict[str, str] | None = None) -> dict[str, str] | None:
    """Return headers for a message that goes out now: ``headers``, and those of the trace if it is recorded."""
    if not ENABLED:
        return headers
    traced = headers_of(current_trace())
    return {**(headers or {}), **traced} if traced else headers


def handling(subject: str, verb: str, headers: Mapping[str, str] | None) -> AbstractContextManager[Any]:
    """Open the span in which a request that arrived is handled, if it belongs to a trace that is recorded."""
    if not ENABLED or not is_recorded(trace := trace_of(headers)):
        return _NOTHING
    from shoal_core.bus import spans

    about = {"messaging.operation.name": "process", "messaging.operation.type": "process"}
    return spans.opened(f"process {verb}", "CONSUMER", trace, about | {"messaging.destination.name": subject})


def asking(span: Spanned | None, now: float) -> AbstractContextManager[Any]:
    """Open the span of what a core asks for (``now``, by its clock), if it is part of a trace that is recorded."""
    if not ENABLED or span is None or not is_recorded(span.trace):
        return _NOTHING
    from shoal_core.bus import spans

    began_ns = time.time_ns() - int((now - span.began_at) * 1e9)
    return spans.opened(span.name, "INTERNAL", span.trace, span.attributes, began_ns)
