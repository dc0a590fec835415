"""Where spans go: OpenTelemetry's SDK with an OTLP exporter, set up once by a process that runs a service alone.

Nothing of it is imported while tracing is off (see ``bus.tracing``). The exporter is an optional package; without it
spans are made and dropped, and a log line says so.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from shoal_core.bus.tracing import ENABLED

logger = logging.getLogger("shoal.service")

EXPORTER_MODULE = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


@contextmanager
def set_up_tracing(service: str, identity: str, enabled: bool = ENABLED) -> Iterator[None]:
    """Send this process's spans to where ``OTEL_EXPORTER_OTLP_ENDPOINT`` points; flushed on leaving."""
    if not enabled:
        yield
        return
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({"service.name": f"shoal-{service}", "service.instance.id": identity})
    )
    try:
        exporter = importlib.import_module(EXPORTER_MODULE).OTLPSpanExporter()
    except ImportError:
        logger.warning(
            "tracing is on, but no exporter is installed: pip install opentelemetry-exporter-otlp-proto-http"
        )
    else:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()
