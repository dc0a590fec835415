"""Tracing: nothing while it is off; on, one trace from the asker through the service to whom it asks."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any, ClassVar

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shoal_core.bus import tracing
from shoal_core.bus.interface import Message
from shoal_core.bus.memory import MemoryBroker, MemoryBus
from shoal_core.bus.tracing import TRACEPARENT, current_traceparent, handling, message_headers, span
from shoal_core.protocol.effects import Answered, Ask, Effect, Publish, Reply, Request
from shoal_core.protocol.messages import Echo, KvGet, KvValue
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.service import Engine, Route, telemetry
from shoal_core.service.logs import JsonFormatter
from shoal_core.service.telemetry import set_up_tracing
from shoal_core.testing.buses import CLUSTER

SUBJECTS = Subjects(CLUSTER)
FIRST, SECOND = SUBJECTS.gcs("first"), SUBJECTS.gcs("second")
REQUEST = KvGet(namespace="", key="")


class Asks:
    """A core that, asked on one subject, asks the other before it answers, and tells of it."""

    def handle(self, message: Any, now: float) -> list[Effect]:
        match message:
            case Request(KvGet(key="inner"), token):
                return [Reply(token, KvValue(value=b"inner"))]
            case Request(_, token):
                return [
                    Publish(SUBJECTS.event(Role.GCS, "g", "told"), Echo(number=1)),
                    Ask(SECOND, KvGet(namespace="", key="inner"), token),
                ]
            case Answered(token, KvValue() as answer):
                return [Reply(token, answer)]
        return []

    def tick(self, now: float) -> list[Effect]:
        return []


@pytest.fixture
async def asker() -> AsyncIterator[MemoryBus]:
    broker = MemoryBroker()
    async with (
        broker.connect(role=Role.GCS, identity="g", cluster=CLUSTER) as bus,
        broker.connect(role=Role.NODE, identity="n", cluster=CLUSTER) as asker,
        Engine(Asks(), bus, name="gcs", routes=[Route(FIRST, KvGet), Route(SECOND, KvGet)]),
    ):
        yield asker


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Set up the SDK, which a process can do once."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    monkeypatch.setattr(tracing, "ENABLED", True)
    exporter.clear()
    yield exporter
    exporter.clear()


def parent_of(finished: ReadableSpan) -> str:
    assert finished.parent is not None
    return f"{finished.parent.span_id:016x}"


async def test_one_trace_goes_through_a_request_and_what_it_asks(asker: MemoryBus, spans: InMemorySpanExporter) -> None:
    told: list[Message] = []
    asker.subscribe(SUBJECTS.event(Role.GCS, "*", "told"), told.append)
    with span("asking", "CLIENT"):
        traceparent = current_traceparent()
        reply = await asker.request(FIRST, encode(REQUEST), timeout_seconds=5, headers=message_headers())
    by_name = {finished.name: finished for finished in spans.get_finished_spans()}
    assert set(by_name) == {"asking", f"process {FIRST}", f"process {SECOND}"}
    _, trace_id, asking_id, _ = traceparent.split("-")
    assert {f"{finished.context.trace_id:032x}" for finished in by_name.values()} == {trace_id}
    assert parent_of(by_name[f"process {FIRST}"]) == asking_id
    first_id = f"{by_name[f'process {FIRST}'].context.span_id:016x}"
    assert parent_of(by_name[f"process {SECOND}"]) == first_id
    assert by_name[f"process {FIRST}"].kind is trace.SpanKind.CONSUMER
    [event] = told
    assert event.headers is not None
    assert event.headers[TRACEPARENT].split("-")[1:3] == [trace_id, first_id]
    assert reply.headers is not None
    assert reply.headers[TRACEPARENT].split("-")[1] == trace_id


async def test_a_log_line_of_a_span_says_which(spans: InMemorySpanExporter) -> None:
    record = logging.LogRecord("shoal", logging.INFO, "", 0, "text", (), None)
    with span("outer"):
        assert f'"traceparent": "{current_traceparent()}"' in JsonFormatter("gcs", "g").format(record)
    assert "traceparent" not in JsonFormatter("gcs", "g").format(record)


async def test_while_it_is_off_nothing_is_added(asker: MemoryBus, exporter: InMemorySpanExporter) -> None:
    assert not tracing.ENABLED
    exporter.clear()
    with span("asking"):
        assert current_traceparent() == ""
        assert message_headers() is None
        reply = await asker.request(FIRST, encode(REQUEST), timeout_seconds=5, headers=message_headers())
    assert reply.headers is None
    assert span("a") is span("b") is handling("subject", {TRACEPARENT: "x"}), "no object is made for it"
    assert exporter.get_finished_spans() == ()


def test_while_it_is_off_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, shoal_core.service.main, shoal_core.service.engine; "
        "from shoal_core.service.telemetry import set_up_tracing\n"
        "with set_up_tracing('gcs', 'g'): pass\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={})
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        ({"SHOAL_TRACING": "1"}, True),
        ({"SHOAL_TRACING": "off", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
    ],
)
def test_the_environment_turns_it_on(environment: dict[str, str], on: bool) -> None:
    assert tracing.wanted(environment) == on


class Exporter(InMemorySpanExporter):
    """What an installed exporter would be."""

    made: ClassVar[list[Exporter]] = []

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.made.append(self)

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def providers(monkeypatch: pytest.MonkeyPatch) -> list[TracerProvider]:
    """Keep the process's provider, and return those that would have replaced it."""
    providers: list[TracerProvider] = []
    monkeypatch.setattr(trace, "set_tracer_provider", providers.append)
    return providers


def test_spans_are_flushed_to_the_exporter_on_leaving(
    providers: list[TracerProvider], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = type(sys)("exporters")
    module.OTLPSpanExporter = Exporter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "exporters", module)
    monkeypatch.setattr(telemetry, "EXPORTER_MODULE", "exporters")
    with set_up_tracing("gcs", "replica", enabled=True):
        [provider] = providers
        with provider.get_tracer("test").start_as_current_span("work"):
            pass
    [exporter] = Exporter.made
    [work] = exporter.get_finished_spans()
    assert work.name == "work"
    assert work.resource.attributes["service.name"] == "shoal-gcs"
    assert work.resource.attributes["service.instance.id"] == "replica"
    assert exporter.closed


def test_without_an_exporter_a_line_says_what_to_install(
    providers: list[TracerProvider], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "EXPORTER_MODULE", "shoal_core.no_such_exporter")
    with set_up_tracing("gcs", "replica", enabled=True):
        assert len(providers) == 1
    assert "pip install opentelemetry-exporter-otlp-proto-http" in caplog.text
