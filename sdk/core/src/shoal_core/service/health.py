"""Health and metrics over HTTP: ``/healthz``, ``/readyz``, ``/metrics``. A few lines of HTTP/1.1, and no more.

``/healthz`` tells only that the event loop turns (a broker that is away must not restart every service); ``/readyz``
answers 503 until the service serves, while it is cut off from the broker, and when it drains.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Protocol

from shoal_core.service.metrics import CONTENT_TYPE, Metrics

REQUEST_SECONDS = 5.0
REQUEST_BYTES = 16 * 1024
PLAIN = "text/plain; charset=utf-8"


class Served(Protocol):
    """What is asked for its health: an ``Engine`` is one."""

    @property
    def ready(self) -> bool:
        """Whether it serves now."""

    @property
    def metrics(self) -> Metrics:
        """What it counts."""


Answer = tuple[HTTPStatus, str, bytes]


@asynccontextmanager
async def serve_health(host: str, port: int, served: Callable[[], Served | None]) -> AsyncIterator[int]:
    """Serve health and metrics of what ``served`` returns (None: it is still starting); yields the port (0: any)."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            await _serve_one(reader, writer, served())
        writer.close()

    server = await asyncio.start_server(answer, host, port, limit=REQUEST_BYTES)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def _serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, served: Served | None) -> None:
    """Read one request and answer it; the connection is closed after it."""
    async with asyncio.timeout(REQUEST_SECONDS):
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            head = b"GET /too-large HTTP/1.1"
        method, _, rest = head.decode("latin-1").partition(" ")
        status, kind, body = _answer(method, rest.partition(" ")[0].partition("?")[0], served)
        lines = (
            f"HTTP/1.1 {status.value} {status.phrase}",
            f"Content-Type: {kind}",
            f"Content-Length: {len(body)}",
            "Connection: close",
        )
        writer.write("\r\n".join((*lines, "", "")).encode() + (b"" if method == "HEAD" else body))
        await writer.drain()


def _answer(method: str, path: str, served: Served | None) -> Answer:
    """Return the status, the kind and the body of an answer."""
    if method not in ("GET", "HEAD"):
        return HTTPStatus.METHOD_NOT_ALLOWED, PLAIN, b"only GET and HEAD\n"
    if path == "/healthz":
        return HTTPStatus.OK, PLAIN, b"the event loop turns\n"
    if path == "/readyz":
        if served is not None and served.ready:
            return HTTPStatus.OK, PLAIN, b"ready\n"
        return HTTPStatus.SERVICE_UNAVAILABLE, PLAIN, b"starting, draining, or cut off from the broker\n"
    if path == "/metrics":
        return HTTPStatus.OK, CONTENT_TYPE, served.metrics.exposition(process=True) if served is not None else b""
    return HTTPStatus.NOT_FOUND, PLAIN, b"there are /healthz, /readyz and /metrics\n"
