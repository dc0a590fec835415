"""Tracing as it is while it is on, for the tests that look at spans."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.context import Context, attach, detach
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from shoal_core import __version__
from shoal_core.bus import spans, tracing
from shoal_core.recorder import Recorder, Telling


@pytest.fixture(params=["by the SDK", "by ourselves"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Turn tracing on where messages are sent and handled, and return what is recorded, either way."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    processor = SimpleSpanProcessor(Telling(exporter))
    provider.add_span_processor(processor)
    if request.param == "by ourselves":
        scope = InstrumentationScope("shoal", __version__)
        own = Recorder(provider.resource, scope, RandomIdGenerator(), [processor])
        monkeypatch.setattr(spans, "recorder", own)
    monkeypatch.setattr(spans, "tracer", provider.get_tracer("shoal"))
    monkeypatch.setattr(tracing, "ENABLED", True)
    token = attach(Context())
    yield exporter
    detach(token)
    provider.shutdown()
