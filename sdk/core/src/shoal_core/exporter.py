"""Spans sent over HTTP: by the client of OpenTelemetry's exporter, as bytes that are made here (``otlp``).

So all that its variables say of endpoint, headers, certificates, compression and time holds, and it tries again when it
always did. The client is no part of what OpenTelemetry promises: an exporter that has none is used as it is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from shoal_core.otlp import encode
from shoal_core.recorder import OwnSpan, Telling

COUNTS_ITSELF = "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED"
"""Where this is set, the exporter counts what it sends, and so has to do it itself."""


class QuickExporter(SpanExporter):
    """Sends what it encodes by the client of another exporter; of our own spans, too (see ``recorder``)."""

    def __init__(self, exporter: SpanExporter, client: Any) -> None:
        self._exporter = exporter
        self._client = client

    def export(self, spans: Sequence[ReadableSpan | OwnSpan]) -> SpanExportResult:
        """Send spans, and wait until the collector has them or there is no hope."""
        return SpanExportResult.SUCCESS if self._client.export(encode(spans)).success else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Send nothing any more."""
        self._exporter.shutdown()


def quick(exporter: SpanExporter) -> SpanExporter:
    """Return what sends all spans by an exporter over HTTP, at less cost than it would itself where that is known."""
    client = getattr(exporter, "_client", None)
    if not hasattr(client, "export") or COUNTS_ITSELF in os.environ:
        return Telling(exporter)
    return QuickExporter(exporter, client)
