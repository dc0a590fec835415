"""Joining a broker: dialling, proving who we are, and saying clearly why it did not work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

from shoal_core.bus.credentials import MISTRUST_ADVICE, Credentials, TlsFiles, is_mistrust, redacted
from shoal_core.bus.interface import Bus, ErrorListener, is_refusal
from shoal_core.protocol.errors import (
    AuthenticationError,
    ClusterUnreachableError,
)
from shoal_core.protocol.subjects import Role, Subjects

if TYPE_CHECKING:
    from nats.aio.client import Client

    from shoal_core.bus.fast import FastBus
    from shoal_core.bus.stock import StockBus

ATTEMPT_SECONDS = 2.0
PAUSE_SECONDS = 0.05
PING_SECONDS = 2.0

ErrorCallback = Callable[[Exception], Awaitable[None]]


SCHEMES = ("nats", "tls", "ws", "wss")


@asynccontextmanager
async def connect(
    address: str,
    *,
    role: Role,
    identity: str,
    cluster: str,
    credentials: Credentials | None = None,
    tls: TlsFiles | None = None,
    timeout_seconds: float = 5,
    implementation: Literal["fast", "stock"] = "fast",
    on_error: ErrorListener | None = None,
) -> AsyncIterator[Bus]:
    """Join the broker at ``address``; leaving the block writes what was published and closes the connection.

    ``address`` is ``nats://host:port``, several of them separated by commas, with ``user:password@`` or ``token@`` in
    front of the host if wanted; ``tls://`` insists on TLS, ``ws://`` goes by the stock implementation. Once joined, it
    reconnects for ever (20 ms to 1 s between attempts). ``on_error`` is called with what no caller waits for: a subject
    that the broker refused, a callback that raised.

    Raises ``ValueError`` for another kind of address, ``AuthenticationError`` as soon as the broker refuses the
    credential, and ``ClusterUnreachableError`` when nobody answered for ``timeout_seconds``.
    """
    inbox = Subjects(cluster).inbox(role, identity)
    options = _options(address, identity, credentials, tls)
    bus = _make(address, implementation, identity, inbox, on_error)
    try:
        await bus.open(options, address, timeout_seconds)
        yield bus
    finally:
        await bus.close()


def _make(
    address: str, implementation: str, identity: str, inbox: str, on_error: ErrorListener | None
) -> FastBus | StockBus:
    """Return a bus that is not connected yet; nats-py is imported only here, since that takes a while."""
    if implementation == "stock" or address.startswith(("ws://", "wss://")):
        from shoal_core.bus.stock import StockBus

        return StockBus(identity, inbox, on_error)
    from shoal_core.bus.fast import FastBus

    return FastBus(identity, inbox, on_error)


def servers_in(address: str) -> list[str]:
    """Return the servers that an address names; ``ValueError`` where one is of another kind than a broker's."""
    servers = [part.strip() for part in address.split(",") if part.strip()]
    for server in servers:
        scheme, separator, _ = server.partition("://")
        if separator and scheme not in SCHEMES:
            raise ValueError(
                f"{redacted(server)} is no address of a broker: it begins with one of "
                f"{', '.join(f'{one}://' for one in SCHEMES)}. (A driver needs no client of another kind: it dials "
                "out to the broker, from wherever it is.)"
            )
    return servers


def _options(address: str, identity: str, credentials: Credentials | None, tls: TlsFiles | None) -> dict[str, Any]:
    """Return the arguments of nats-py's ``connect`` that both implementations share."""
    servers = servers_in(address)
    options: dict[str, Any] = {
        "servers": servers,
        "name": identity,
        "connect_timeout": ATTEMPT_SECONDS,
        "reconnect_time_wait": PAUSE_SECONDS,
        "max_reconnect_attempts": -1,
        "ping_interval": PING_SECONDS,
        "max_outstanding_pings": 2,
    }
    options.update(_proof(credentials or _in_address(servers)))
    if tls is not None or any(server.startswith(("tls://", "wss://")) for server in servers):
        options["tls"] = (tls or TlsFiles()).context()
    return options


def _in_address(servers: list[str]) -> Credentials:
    """Return the credentials that stand in an address, so that servers found later are given them too."""
    for server in servers:
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        if parts.username and parts.password is not None:
            return Credentials(user=unquote(parts.username), password=unquote(parts.password))
        if parts.username:
            return Credentials(token=unquote(parts.username))
    return Credentials()


def _proof(credentials: Credentials) -> dict[str, Any]:
    """Return the arguments of nats-py's ``connect`` that carry the credentials."""
    if credentials.creds_file is not None:
        return {"user_credentials": credentials.creds_file}
    if credentials.token is not None:
        return {"token": credentials.token}
    return {"user": credentials.user, "password": credentials.password}


async def dial(
    client: Client, options: dict[str, Any], address: str, timeout_seconds: float, failed: ErrorCallback
) -> None:
    """Connect nats-py's client, or raise one of our errors; ``failed`` is nats-py's error callback from then on."""
    where = redacted(address)
    failures: list[Exception] = []
    refusal: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
    dialled = False

    async def on_failure(error: Exception) -> None:
        if dialled:
            await failed(error)
        elif (is_refusal(str(error)) or is_mistrust(error)) and not refusal.done():
            refusal.set_result(error)
        else:
            failures.append(error)

    attempt = asyncio.ensure_future(client.connect(error_cb=on_failure, **options))
    try:
        waiting: set[asyncio.Future[Any]] = {attempt, refusal}
        await asyncio.wait(waiting, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not attempt.done():
            attempt.cancel()
            await asyncio.wait({attempt})
    if refusal.done() and is_mistrust(refusal.result()):
        raise AuthenticationError(
            f"this process and the broker at {where} do not trust each other's certificates ({refusal.result()}). "
            f"{MISTRUST_ADVICE}"
        )
    if refusal.done():
        raise AuthenticationError(
            f"the broker at {where} refused the credential ({refusal.result()}); "
            "check SHOAL_TOKEN, the credentials file or the user in the address"
        )
    if attempt.cancelled():
        last = f"; the last attempt: {failures[-1] or type(failures[-1]).__name__}" if failures else ""
        raise ClusterUnreachableError(
            f"nobody answered at {where} within {timeout_seconds:g} s ({len(failures)} attempts failed{last}); "
            "is the address right, and does the cluster run?"
        )
    try:
        attempt.result()
    except Exception as error:
        raise ClusterUnreachableError(f"cannot join the broker at {where}: {error or type(error).__name__}") from error
    dialled = True
