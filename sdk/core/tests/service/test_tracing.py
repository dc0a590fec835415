"""Tracing: nothing while it is off; on, one trace from the asker through the service to whom it asks."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from shoal_core.bus import tracing
from shoal_core.bus.interface import Message
from shoal_core.bus.memory import MemoryBroker, MemoryBus
from shoal_core.bus.spans import UNRECORDED_CONTEXT, opened
from shoal_core.bus.tracing import asking, current_trace, handling, message_headers
from shoal_core.protocol.effects import Answered, Ask, Effect, Publish, Reply, Request
from shoal_core.protocol.messages import Echo, KvGet, KvValue
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.traces import TRACEPARENT, UNRECORDED, Attributes, Spanned, parse, trace_of
from shoal_core.protocol.wire import encode
from shoal_core.service import Engine, Route
from shoal_core.service.logs import JsonFormatter
from shoal_core.testing.buses import CLUSTER

SUBJECTS = Subjects(CLUSTER)
FIRST, SECOND = SUBJECTS.gcs("first"), SUBJECTS.gcs("second")
REQUEST = KvGet(namespace="", key="")


@dataclass(frozen=True)
class Begin:
    """Have a core begin to ask."""

    trace: str


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


def by_name(recorded: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {finished.name: finished for finished in recorded.get_finished_spans()}


def parent_of(finished: ReadableSpan) -> int:
    assert finished.parent is not None
    return finished.parent.span_id


async def test_one_trace_goes_through_a_request_and_what_it_asks(
    asker: MemoryBus, recorded: InMemorySpanExporter
) -> None:
    told: list[Message] = []
    asker.subscribe(SUBJECTS.event(Role.GCS, "*", "told"), told.append)
    with opened("asking", "CLIENT", "", {}) as outer:
        reply = await asker.request(FIRST, encode(REQUEST), timeout_seconds=5, headers=message_headers())
    made = by_name(recorded)
    assert set(made) == {"asking", "process first", "process second"}
    trace_id = outer.get_span_context().trace_id
    assert {finished.context.trace_id for finished in made.values()} == {trace_id}
    assert parent_of(made["process first"]) == outer.get_span_context().span_id
    assert parent_of(made["process second"]) == made["process first"].context.span_id
    assert made["process first"].kind is SpanKind.CONSUMER
    [event] = told
    parent, answered = parse(trace_of(event.headers)), parse(trace_of(reply.headers))
    assert parent is not None
    assert (parent.trace_id, parent.span_id) == (trace_id, made["process first"].context.span_id)
    assert answered is not None
    assert answered.trace_id == trace_id


async def test_a_core_names_the_span_of_what_it_asks_for(recorded: InMemorySpanExporter) -> None:
    class Plans(Asks):
        def handle(self, message: Any, now: float) -> list[Effect]:
            if isinstance(message, Begin):
                about: Attributes = {"shoal.node.id": "n"}
                inner = KvGet(namespace="", key="inner")
                return [Ask(SECOND, inner, None, span=Spanned("schedule f", message.trace, now - 1.5, about))]
            if isinstance(message, Answered):
                answered.set()
                return []
            return super().handle(message, now)

    answered = asyncio.Event()
    broker = MemoryBroker()
    with opened("submit f", "PRODUCER", "", {}) as submitted:
        trace = current_trace()
    async with (
        broker.connect(role=Role.GCS, identity="g", cluster=CLUSTER) as bus,
        Engine(Plans(), bus, name="gcs", routes=[Route(SECOND, KvGet)], first=[Begin(trace)], clock=time.monotonic),
    ):
        await asyncio.wait_for(answered.wait(), 5)
    made = by_name(recorded)
    assert parent_of(made["schedule f"]) == submitted.get_span_context().span_id
    assert parent_of(made["process second"]) == made["schedule f"].context.span_id
    assert made["schedule f"].attributes == {"shoal.node.id": "n"}
    began, ended = made["schedule f"].start_time, made["schedule f"].end_time
    assert began is not None
    assert ended is not None
    assert ended - began >= 1.5e9, "it began when the core says, by whatever clock"


async def test_an_error_that_leaves_is_noted(recorded: InMemorySpanExporter) -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("it says nothing")

    with pytest.raises(Silent), opened("work", "INTERNAL", "", {}):
        raise Silent
    work = by_name(recorded)["work"]
    assert work.status.status_code is StatusCode.ERROR
    assert work.attributes is not None
    assert str(work.attributes["error.type"]).endswith("Silent")
    assert work.status.description == "<str() raised RuntimeError>"
    assert [event.name for event in work.events] == ["exception"]


async def test_what_is_not_recorded_costs_no_span(asker: MemoryBus, recorded: InMemorySpanExporter) -> None:
    token = attach(UNRECORDED_CONTEXT)
    assert current_trace() == UNRECORDED
    assert message_headers({"other": "header"}) == {"other": "header"}
    reply = await asker.request(FIRST, encode(REQUEST), timeout_seconds=5, headers=message_headers())
    detach(token)
    assert reply.headers is None
    await asker.request(FIRST, encode(REQUEST), timeout_seconds=5)
    assert recorded.get_finished_spans() == (), "nor does what nobody traces"


async def test_a_log_line_of_a_span_says_which(recorded: InMemorySpanExporter) -> None:
    record = logging.LogRecord("shoal", logging.INFO, "", 0, "text", (), None)
    with opened("outer", "INTERNAL", "", {}):
        assert f'"traceparent": "{current_trace()}"' in JsonFormatter("gcs", "g").format(record)
    assert "traceparent" not in JsonFormatter("gcs", "g").format(record)


async def test_while_it_is_off_nothing_is_added(asker: MemoryBus) -> None:
    assert not tracing.ENABLED
    with opened("asking", "CLIENT", "", {}):
        assert current_trace() == ""
        assert message_headers() is None
        reply = await asker.request(FIRST, encode(REQUEST), timeout_seconds=5, headers=message_headers())
    assert reply.headers is None
    trace = {TRACEPARENT: f"00-{1:032x}-{1:016x}-01"}
    assert handling("subject", "verb", trace) is asking(None, 0.0), "no object is made for it"


def test_while_it_is_off_nothing_of_it_is_imported() -> None:
    code = (
        "import sys, shoal_core.service.main, shoal_core.service.engine, shoal_core.runtime.worker.process\n"
        "from shoal_core.telemetry import exporting\n"
        "with exporting('gcs', 'g', 'cluster'): pass\n"
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
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector/v1/traces"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector", "OTEL_SDK_DISABLED": "true"}, False),
        ({"SHOAL_TRACING": "1", "OTEL_SDK_DISABLED": "TRUE"}, False),
    ],
)
def test_the_environment_turns_it_on(environment: dict[str, str], on: bool) -> None:
    assert tracing.wanted(environment) == on
