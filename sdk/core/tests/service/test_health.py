"""Health and metrics over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.effects import Effect, Reply, Request
from shoal_core.protocol.messages import KvGet, KvValue
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.service import Engine, Route, health
from shoal_core.service.health import Served, serve_health
from shoal_core.testing.buses import CLUSTER

HOST = "127.0.0.1"
SUBJECT = Subjects(CLUSTER).gcs("kv_get")


class Answers:
    """A core that answers everything."""

    def handle(self, message: object, now: float) -> list[Effect]:
        return [Reply(message.token, KvValue(value=None))] if isinstance(message, Request) else []

    def tick(self, now: float) -> list[Effect]:
        return []


async def exchange(port: int, sent: bytes) -> bytes:
    """Send bytes and return all that comes back before the connection is closed."""
    reader, writer = await asyncio.open_connection(HOST, port)
    writer.write(sent)
    await writer.drain()
    received = await reader.read()
    writer.close()
    return received


async def get(port: int, path: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    head, _, body = (await exchange(port, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(
        b"\r\n\r\n"
    )
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


class Subject:
    """What is served: nothing before it has begun."""

    def __init__(self) -> None:
        self.served: Served | None = None


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[int, Subject]]:
    subject = Subject()
    async with serve_health(HOST, 0, lambda: subject.served) as port:
        yield port, subject


async def test_a_service_is_ready_only_while_it_serves() -> None:
    broker = MemoryBroker()
    async with serving() as (port, subject), broker.connect(role=Role.GCS, identity="g", cluster=CLUSTER) as bus:

        async def statuses() -> list[int]:
            return [(await get(port, path))[0] for path in ("/healthz", "/readyz", "/metrics")]

        assert await statuses() == [200, 503, 200], "it starts"
        engine = subject.served = Engine(Answers(), bus, name="gcs")
        assert await statuses() == [200, 503, 200], "it is not entered"
        async with engine:
            assert await statuses() == [200, 200, 200]
            broker.disconnect(bus)
            assert await statuses() == [200, 503, 200], "it is cut off"
            broker.reconnect(bus)
            assert await statuses() == [200, 200, 200]
            engine.draining = True
            assert await statuses() == [200, 503, 200], "it drains"
        assert await statuses() == [200, 503, 200], "it has ended"


async def test_metrics_are_what_prometheus_reads() -> None:
    broker = MemoryBroker()
    async with (
        serving() as (port, subject),
        broker.connect(role=Role.GCS, identity="g", cluster=CLUSTER) as bus,
        broker.connect(role=Role.NODE, identity="n", cluster=CLUSTER) as asker,
        Engine(Answers(), bus, name="gcs", routes=[Route(SUBJECT, KvGet)]) as engine,
    ):
        subject.served = engine
        await asker.request(SUBJECT, encode(KvGet(namespace="", key="")), timeout_seconds=5)
        await asker.request(SUBJECT, b"wrong", timeout_seconds=5)
        status, headers, body = await get(port, "/metrics")
        assert (status, headers["Content-Type"]) == (200, "text/plain; version=0.0.4; charset=utf-8")
        samples = {
            sample.name: sample.value
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
            if sample.labels.get("endpoint", "kv_get") == "kv_get"
        }
        assert samples["shoal_messages_received_total"] == 2
        assert samples["shoal_requests_refused_total"] == 1
        assert samples["shoal_request_seconds_count"] == 1
        assert samples["shoal_messages_dropped_total"] == 0


async def test_a_head_request_gets_no_body_and_a_query_is_ignored() -> None:
    async with serving() as (port, _):
        status, headers, body = await get(port, "/healthz", "HEAD")
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 0
        assert (await get(port, "/healthz?verbose=1"))[0] == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /healthz HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 405),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", 405),
        (b"\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 405),
        (b"GET\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\xff\xfe\r\n\r\n", 405),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"x" * (32 * 1024) + b"\r\n\r\n", 404),
    ],
)
async def test_what_is_no_proper_request_is_answered_as_such(sent: bytes, status: int) -> None:
    async with serving() as (port, _):
        received = await exchange(port, sent)
        assert received.startswith(f"HTTP/1.1 {status} ".encode())
        assert b"\r\nConnection: close\r\n" in received
        assert (await get(port, "/healthz"))[0] == 200, "the next one is served"


async def test_a_connection_that_says_half_a_request_and_goes_is_let_go() -> None:
    async with serving() as (port, _):
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(b"GET /heal")
        writer.write_eof()
        assert await reader.read() == b""
        writer.close()
        assert (await get(port, "/healthz"))[0] == 200


async def test_a_connection_that_says_nothing_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "REQUEST_SECONDS", 0.01)
    async with serving() as (port, _):
        assert await exchange(port, b"") == b""
