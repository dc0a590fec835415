"""Where spans go: the provider of a process, by OpenTelemetry's own variables; sending that holds nobody up."""

from __future__ import annotations

import asyncio
import atexit
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cloudpickle
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from shoal_core import telemetry
from shoal_core.bus import spans
from shoal_core.bus.spans import RootSampling
from shoal_core.protocol.traces import ID_LIMIT
from shoal_core.telemetry import MOST_SPANS, exporters_wanted, exporting, resource_attributes, set_up


class Exporter(InMemorySpanExporter):
    """What an installed exporter would be; ``stuck`` where nobody answers it."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.stuck: threading.Event | None = None

    def shutdown(self) -> None:
        self.closed = True
        if self.stuck is not None:
            self.stuck.wait()


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exporter]:
    """Keep the process's own provider, and have what would replace it send here."""
    exporter = Exporter()
    module = type(sys)("exporters")
    module.OTLPSpanExporter = lambda: exporter  # type: ignore[attr-defined]
    monkeypatch.setattr(telemetry, "exporter_module", lambda protocol: module)
    monkeypatch.setattr(telemetry, "_telemetry", None)
    monkeypatch.setattr(atexit, "register", lambda work: None)
    monkeypatch.setattr(spans, "sampling", None)
    monkeypatch.setattr(spans, "recorder", None)
    monkeypatch.setattr(trace, "set_tracer_provider", made.append)
    yield exporter
    made.clear()


made: list[TracerProvider] = []


def test_spans_are_sent_on_leaving(exporter: Exporter) -> None:
    with exporting("gcs", "replica", "cluster", enabled=True):
        [provider] = made
        with provider.get_tracer("test").start_as_current_span("work"):
            pass
    [work] = exporter.get_finished_spans()
    assert work.name == "work"
    assert work.resource.attributes["service.name"] == "shoal-gcs"
    assert work.resource.attributes["service.instance.id"] == "replica"
    assert work.resource.attributes["shoal.cluster"] == "cluster"
    assert exporter.closed


def test_a_process_has_one_provider(exporter: Exporter) -> None:
    assert set_up("driver", "first", "cluster")
    assert not set_up("driver", "second", "cluster")
    assert len(made) == 1
    telemetry.end()


def test_a_provider_of_the_users_own_is_left_alone(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "get_tracer_provider", TracerProvider)
    assert not set_up("driver", "d", "cluster")
    assert made == []
    assert spans.sampling is None


def test_a_collector_that_does_not_answer_holds_up_nobody(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "SECONDS", 0.05)
    exporter.stuck = threading.Event()
    set_up("driver", "d", "cluster")
    began = time.monotonic()
    telemetry.end()
    assert time.monotonic() - began < 5, "it would wait for ever"
    exporter.stuck.set()


def test_who_has_waited_in_vain_does_not_wait_again(exporter: Exporter) -> None:
    released = threading.Event()
    orders: list[str] = []

    class Provider(TracerProvider):
        def force_flush(self, timeout_millis: int = 0) -> bool:
            orders.append("flush")
            return released.wait()

        def shutdown(self) -> None:
            orders.append("end")

    sending = telemetry.Telemetry(Provider(shutdown_on_exit=False))
    sending.flush(0.01)
    began = time.monotonic()
    sending.flush(0.0)
    sending.end(1000.0)
    assert time.monotonic() - began < 50
    assert orders == ["flush"], "nor does what it asks for pile up"
    released.set()
    sending._last.wait()
    sending.end(1000.0)
    assert orders == ["flush", "end"]


async def test_spans_are_sent_when_a_process_is_quiet_and_not_between_two_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(telemetry, "IDLE_SECONDS", 1.0)
    loop, now, looks, sent = asyncio.get_running_loop(), [10.0], deque[tuple[float, Callable[[], None]]](), []
    busy = False

    def call_later(seconds: float, work: Callable[[], None]) -> object:
        looks.append((seconds, work))
        return object()

    monkeypatch.setattr(loop, "call_later", call_later)
    quiet = telemetry.Quiet(lambda: busy, lambda: sent.append(now[0]), lambda: now[0])

    def look(at: float) -> None:
        _, work = looks.popleft()
        now[0] = at
        work()

    quiet.worked()
    now[0] = 10.75
    quiet.worked()
    look(11.0)
    assert not sent, "it has worked a quarter of a second ago"
    assert [seconds for seconds, _ in looks] == [0.75]
    busy = True
    look(11.75)
    assert not sent
    assert not looks, "the end of what runs leads here again"
    busy = False
    quiet.worked()
    look(12.75)
    assert sent == [12.75]
    assert not looks


def test_the_trace_that_was_drawn_is_the_one_that_begins(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.01")
    set_up("driver", "d", "cluster")
    [provider] = made
    assert spans.sampling is not None
    tracer = provider.get_tracer("test")
    for _ in range(20):
        spans.sampling.choose()
        assert tracer.start_span("submit f").is_recording(), "our own decision is the sampler's"
    assert spans.sampling.take() == 0, "an id is for one trace"
    telemetry.end()


class Client:
    """What the exporter over HTTP sends by."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def export(self, data: bytes) -> Sent:
        [process] = ExportTraceServiceRequest.FromString(data).resource_spans
        self.sizes.append(sum(len(group.spans) for group in process.scope_spans))
        return Sent()


@dataclass
class Sent:
    success: bool = True


@pytest.mark.parametrize(("said", "most"), [({}, MOST_SPANS), ({"OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "700"}, 700)])
def test_a_request_has_many_spans_unless_it_is_said_how_many(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, said: dict[str, str], most: int
) -> None:
    client = Client()
    monkeypatch.setattr(exporter, "_client", client, raising=False)
    for name, value in {"OTEL_BSP_SCHEDULE_DELAY": "60000", **said}.items():
        monkeypatch.setenv(name, value)
    set_up("driver", "d", "cluster")
    [provider] = made
    tracer = provider.get_tracer("test")
    for _ in range(most + 1):
        tracer.start_span("work").end()
    telemetry.end()
    assert client.sizes == [most, 1]


@pytest.mark.parametrize(("bound", "drawn"), [(0, False), (ID_LIMIT, True)])
def test_all_or_none(monkeypatch: pytest.MonkeyPatch, bound: int, drawn: bool) -> None:
    monkeypatch.setattr(spans, "sampling", RootSampling(bound))
    assert {spans.is_wanted() for _ in range(100)} == {drawn}


def test_the_id_of_what_is_recorded_is_one_that_any_sampler_would_record(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = RootSampling(ID_LIMIT // 4)
    monkeypatch.setattr(spans, "sampling", sampling)
    assert 150 < sum(spans.is_wanted() for _ in range(1000)) < 350
    drawn = []
    for _ in range(100):
        sampling.choose()
        drawn.append(sampling.take())
    assert all(0 < trace_id % ID_LIMIT < ID_LIMIT // 4 for trace_id in drawn)
    assert len(set(drawn)) == len(drawn)


def test_a_tracer_travels_by_its_name(exporter: Exporter) -> None:
    set_up("driver", "d", "cluster")
    [provider] = made
    tracer = provider.get_tracer("the user's", "1.2")
    travelled: Any = pickle.loads(cloudpickle.dumps(tracer))
    assert isinstance(travelled, trace.Tracer)
    assert travelled is not tracer
    telemetry.end()


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, ["http/protobuf"]),
        ({"OTEL_TRACES_EXPORTER": "otlp, console"}, ["http/protobuf", "console"]),
        ({"OTEL_TRACES_EXPORTER": "none"}, []),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["grpc"]),
        (
            {"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"},
            ["http/protobuf"],
        ),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, ["zipkin"]),
    ],
)
def test_the_environment_names_the_exporters(environment: dict[str, str], names: list[str]) -> None:
    assert exporters_wanted(environment) == names


def test_what_the_environment_says_of_the_process_holds() -> None:
    own = {"service.name": "shoal-gcs", "service.instance.id": "g"}
    assert resource_attributes(own, {}).items() >= own.items()
    assert "service.name" not in resource_attributes(own, {"OTEL_SERVICE_NAME": "mine"})
    said = resource_attributes(own, {"OTEL_RESOURCE_ATTRIBUTES": "service.name=mine, service.instance.id=7"})
    assert not said.keys() & own.keys()


def test_without_an_exporter_a_line_says_what_to_install(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "exporter_module", lambda protocol: None)
    with exporting("gcs", "replica", "cluster", enabled=True):
        assert len(made) == 1
    assert "pip install opentelemetry-exporter-otlp-proto-http" in caplog.text


def test_an_exporter_that_there_is_not_is_named(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with exporting("gcs", "replica", "cluster", enabled=True):
        pass
    assert "'zipkin' is no exporter" in caplog.text


def test_who_was_forked_imports_nothing_any_more() -> None:
    code = (
        "import sys\n"
        "from shoal_core import telemetry\n"
        "telemetry.preload()\n"
        "before = set(sys.modules)\n"
        "telemetry.set_up('process', 'p', 'cluster')\n"
        "print(sorted(set(sys.modules) - before))\n"
    )
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_a_copy_of_a_process_sends_nothing_at_its_end() -> None:
    code = (
        "import os\n"
        "from shoal_core import telemetry\n"
        "telemetry.set_up('driver', 'd', 'cluster')\n"
        "if os.fork() == 0:\n"
        "    telemetry.SECONDS = 1000.0\n"
        "    raise SystemExit\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    environment = {"OTEL_TRACES_EXPORTER": "console"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, env=environment)
    assert done.stdout.strip() == "0", done.stderr
