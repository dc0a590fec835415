"""A small OTLP receiver: what a collector is told over HTTP, as spans that tests can look at."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

WAIT_SECONDS = 40.0
LOOK_SECONDS = 0.5
"""How often is looked whether it is enough although nothing came: whoever was to send may have ended."""


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it arrived; ``scope`` is who made it, ``resource`` the attributes of its process."""

    scope: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    began_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, Any]
    events: tuple[str, ...]
    links: tuple[str, ...]
    resource: dict[str, Any]


@dataclass
class Receiver:
    """What has arrived until now; ``headers`` are those of the last request."""

    endpoint: str
    spans: list[ReceivedSpan] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    _arrived: threading.Condition = field(default_factory=threading.Condition)

    def take(self, body: bytes, headers: dict[str, str]) -> None:
        """Take in one request."""
        with self._arrived:
            self.spans += read_spans(ExportTraceServiceRequest.FromString(body))
            self.headers = headers
            self._arrived.notify_all()

    def wait_for(self, enough: Callable[[list[ReceivedSpan]], bool]) -> list[ReceivedSpan]:
        """Return what has arrived as soon as it is enough; ``AssertionError`` if that takes too long."""
        deadline = time.monotonic() + WAIT_SECONDS
        with self._arrived:
            while not enough(self.spans):
                left_seconds = deadline - time.monotonic()
                assert left_seconds > 0, f"only these spans have come: {sorted(span.name for span in self.spans)}"
                self._arrived.wait(min(LOOK_SECONDS, left_seconds))
            return list(self.spans)


def read_spans(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    """Yield the spans of a request."""
    for group in request.resource_spans:
        resource = _attributes(group.resource.attributes)
        for scope in group.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    scope=scope.scope.name,
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    kind=span.kind,
                    began_ns=span.start_time_unix_nano,
                    ended_ns=span.end_time_unix_nano,
                    failed=span.status.code == span.status.STATUS_CODE_ERROR,
                    attributes=_attributes(span.attributes),
                    events=tuple(event.name for event in span.events),
                    links=tuple(link.span_id.hex() for link in span.links),
                    resource=resource,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}


@contextlib.contextmanager
def receiving() -> Iterator[Receiver]:
    """Serve OTLP over HTTP on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.take(body, {name.lower(): value for name, value in self.headers.items()})
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
