"""Where spans go: OpenTelemetry's SDK with its exporters, set up once by each process: services, drivers, workers.

Nothing of it is imported while tracing is off (see ``bus.tracing``). All that OpenTelemetry's own variables say holds:
``OTEL_SERVICE_NAME``, ``OTEL_RESOURCE_ATTRIBUTES``, ``OTEL_TRACES_SAMPLER``, ``OTEL_TRACES_EXPORTER`` and
``OTEL_EXPORTER_OTLP_*``. A provider that the program has set before is left alone, and used.

Sending never holds up a process for long: it happens beside, and is waited for at most ``SECONDS``. Its threads do not
come along through a fork, so a worker process sets its own provider up after it was forked.
"""

from __future__ import annotations

import asyncio
import atexit
import copyreg
import importlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shoal_core import __version__
from shoal_core.bus.tracing import ENABLED
from shoal_core.protocol.traces import sampling_bound

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, Tracer, TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger("shoal.telemetry")

SECONDS = 2.0
"""So long a process waits at its end for its spans to be sent."""
IDLE_SECONDS = 0.1
"""A worker process without work for so long has its spans sent: before its lease goes back, or it may be killed."""
SENT_SECONDS = 0.25
"""So long after the end of a task its worker process has sent the spans, if it is idle and the collector is there."""
MOST_SPANS = 1024
"""So many go in one request; OpenTelemetry's own number is half of that."""
HTTP = "http/protobuf"
PACKAGES = {
    HTTP: "opentelemetry-exporter-otlp-proto-http",
    "grpc": "opentelemetry-exporter-otlp-proto-grpc",
}


class Telemetry:
    """This process's provider, and the thread that has it send when it is told to.

    The thread is there from the start, since none can be started while the interpreter ends. It does one thing at a
    time: what is asked for while it is stuck with a collector that does not answer is left undone.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._orders: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        self._last = threading.Event()
        self._last.set()
        self._stuck = False
        self._pid = os.getpid()
        threading.Thread(target=self._serve, name="shoal-telemetry", daemon=True).start()

    def _serve(self) -> None:
        while True:
            work, done = self._orders.get()
            try:
                work()
            except Exception:
                logger.exception("spans could not be sent")
            done.set()

    def flush(self, wait_seconds: float) -> None:
        """Have what was not sent yet be sent; wait for that so long."""
        self._order(self._provider.force_flush, wait_seconds)

    def end(self, wait_seconds: float) -> None:
        """Have what was not sent yet be sent, and nothing any more afterwards; wait for that so long."""
        self._order(self._provider.shutdown, wait_seconds)

    def _order(self, work: Callable[[], object], wait_seconds: float) -> None:
        if self._pid != os.getpid():
            return  # a copy of the process, made by a fork, which has not got the thread
        deadline = time.monotonic() + wait_seconds
        if not self._last.wait(0 if self._stuck else wait_seconds):
            return
        self._last = threading.Event()
        self._orders.put((work, self._last))
        done = self._last.wait(max(0.0, deadline - time.monotonic()))
        self._stuck = wait_seconds > 0 and not done


class Quiet:
    """Has spans be sent once a process has had no work for ``IDLE_SECONDS`` (on its loop).

    In the moment between two batches of work there may be none, too, but sending a few spans costs as much as sending
    hundreds. Those of a process that works without a break go by the exporter's own batches.
    """

    def __init__(
        self, is_busy: Callable[[], bool], send: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._is_busy = is_busy
        self._send = send
        self._clock = clock
        self._worked_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def worked(self) -> None:
        """Work that may have made spans has ended now."""
        self._worked_at = self._clock()
        if self._timer is None:
            self._look_in(IDLE_SECONDS)

    def _look_in(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._is_busy():
            return  # the end of what runs leads here again
        left_seconds = self._worked_at + IDLE_SECONDS - self._clock()
        if left_seconds > 0:
            self._look_in(left_seconds)
        else:
            self._send()


_telemetry: Telemetry | None = None


def set_up(name: str, identity: str, cluster: str, attributes: Mapping[str, str] | None = None) -> bool:
    """Send this process's spans to where the environment says; tell whether this set it up now.

    ``name`` is what the process is called where the environment does not say; ``attributes`` say more of it.
    """
    global _telemetry
    from opentelemetry import trace
    from opentelemetry.sdk.trace import Tracer

    copyreg.pickle(Tracer, _reduce_tracer)
    if _telemetry is not None or not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return False
    about = {"service.name": f"shoal-{name}", "service.instance.id": identity, "shoal.cluster": cluster}
    provider = _new_provider({**about, **(attributes or {})})
    _telemetry = Telemetry(provider)
    trace.set_tracer_provider(provider)
    atexit.register(end)
    return True


def _reduce_tracer(tracer: Tracer) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Have a tracer that a task refers to travel by its name: where the task runs, it is that process's own."""
    from opentelemetry import trace

    about = tracer.instrumentation_info
    return trace.get_tracer, (about.name, about.version, None, about.schema_url)


def preload() -> None:
    """Import all that ``set_up`` imports, for those who will do that after they were forked.

    An exporter over HTTP imports its client only when it is made, so one is made; one of gRPC would not survive a fork.
    """
    for name in (
        "concurrent.futures.thread",
        "opentelemetry.sdk.trace.export",
        "shoal_core.bus.spans",
        "shoal_core.exporter",
        "shoal_core.recorder",
    ):
        importlib.import_module(name)
    for name in exporters_wanted(os.environ):
        module = exporter_module(name)
        if module is not None and name == HTTP:
            module.OTLPSpanExporter().shutdown()


@contextmanager
def exporting(name: str, identity: str, cluster: str, enabled: bool = ENABLED) -> Iterator[None]:
    """Have what ``set_up`` does done while this is open; what was not sent by then is sent on leaving."""
    mine = enabled and set_up(name, identity, cluster)
    try:
        yield
    finally:
        if mine:
            end()


def flush(wait_seconds: float = 0.0) -> None:
    """Have what was not sent yet be sent, beside; wait for that so long."""
    if _telemetry is not None:
        _telemetry.flush(wait_seconds)


def end() -> None:
    """Send what was not sent yet, and nothing any more afterwards; takes at most ``SECONDS``."""
    if _telemetry is not None:
        _telemetry.end(SECONDS)


def _new_provider(attributes: Mapping[str, str]) -> TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    from shoal_core.bus import spans
    from shoal_core.recorder import Recorder, is_usual

    sampling = spans.sampling = spans.RootSampling(sampling_bound(os.environ))

    class ChosenIds(RandomIdGenerator):
        """Begins a trace under the id for which it was decided to record it."""

        def generate_trace_id(self) -> int:
            return sampling.take() or super().generate_trace_id()

    class Provider(TracerProvider):
        """Has all spans go the SDK's way as soon as somebody else listens to them."""

        def add_span_processor(self, span_processor: SpanProcessor) -> None:
            spans.recorder = None
            super().add_span_processor(span_processor)

    ids = ChosenIds()
    provider = Provider(
        resource=Resource.create(resource_attributes(attributes, os.environ)),
        id_generator=ids,
        shutdown_on_exit=False,
    )
    processors = [_processor(exporter, os.environ) for exporter in _exporters(os.environ)]
    for processor in processors:
        provider.add_span_processor(processor)
    if is_usual(os.environ):
        spans.recorder = Recorder(provider.resource, InstrumentationScope("shoal", __version__), ids, processors)
    return provider


def _processor(exporter: SpanExporter, environment: Mapping[str, str]) -> SpanProcessor:
    """Return what gathers spans for an exporter, many for each request over HTTP unless the environment says how many.

    A request costs as much as some hundred spans. Over gRPC it may not have more than 4 MiB.
    """
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from shoal_core.exporter import QuickExporter

    is_said = any(name in environment for name in ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_BSP_MAX_QUEUE_SIZE"))
    most = MOST_SPANS if isinstance(exporter, QuickExporter) and not is_said else None
    return BatchSpanProcessor(exporter, max_export_batch_size=most)


def resource_attributes(attributes: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str | int]:
    """Return what is said of this process, but for what the environment says itself, which has precedence."""
    said = {entry.partition("=")[0].strip() for entry in environment.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")}
    if environment.get("OTEL_SERVICE_NAME"):
        said.add("service.name")
    own: dict[str, str | int] = {
        "service.version": __version__,
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
        **attributes,
    }
    return {key: value for key, value in own.items() if key not in said}


def exporters_wanted(environment: Mapping[str, str]) -> list[str]:
    """Return which exporters the environment names: ``console``, and of OTLP the protocol."""
    named = [name.strip() for name in environment.get("OTEL_TRACES_EXPORTER", "").split(",") if name.strip()]
    protocol = (
        environment.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environment.get("OTEL_EXPORTER_OTLP_PROTOCOL") or HTTP
    )
    return [protocol if name == "otlp" else name for name in named or ["otlp"] if name != "none"]


def _exporters(environment: Mapping[str, str]) -> Iterator[SpanExporter]:
    from shoal_core.recorder import Telling

    for name in exporters_wanted(environment):
        if name == "console":
            yield Telling(importlib.import_module("opentelemetry.sdk.trace.export").ConsoleSpanExporter())
        elif name not in PACKAGES:
            logger.warning("tracing is on, but %r is no exporter: there are otlp and console, by %s", name, [*PACKAGES])
        elif (module := exporter_module(name)) is None:
            logger.warning("tracing is on, but no exporter for %s is installed: pip install %s", name, PACKAGES[name])
        elif name == HTTP:
            yield importlib.import_module("shoal_core.exporter").quick(module.OTLPSpanExporter())
        else:
            yield Telling(module.OTLPSpanExporter())


def exporter_module(protocol: str) -> Any:
    """Return the module of the exporter for a protocol of OTLP; None where it is not installed."""
    kind = protocol.partition("/")[0]
    try:
        return importlib.import_module(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter")
    except ImportError:
        return None
