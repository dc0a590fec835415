"""What the commands of ``shoal`` share: the flags that name a cluster, how one is reached by them, how to print."""

from __future__ import annotations

import functools
import inspect
import json
import secrets
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Concatenate, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from shoal.cluster import read_current
from shoal.status import Target
from shoal_core.bus import Bus, connect
from shoal_core.bus.connection import servers_in
from shoal_core.bus.credentials import Credentials, TlsFiles

P = ParamSpec("P")

out = Console(highlight=False, soft_wrap=True)


class Format(StrEnum):
    """How to print."""

    TABLE = "table"
    JSON = "json"


Address = Annotated[
    str | None, typer.Option(envvar="SHOAL_ADDRESS", help="nats://host:port; else the cluster that `shoal up` started.")
]
CredentialFile = Annotated[
    Path | None, typer.Option(envvar="SHOAL_CREDENTIALS", exists=True, help="The credential file.")
]
Token = Annotated[str | None, typer.Option(envvar="SHOAL_TOKEN", help="A token, instead of a file.")]
AuthorityFile = Annotated[
    Path | None, typer.Option(envvar="SHOAL_CA_FILE", exists=True, help="Who signed the broker's certificate.")
]
ClusterName = Annotated[str, typer.Option(envvar="SHOAL_CLUSTER", help="The cluster's name.")]
Output = Annotated[Format, typer.Option("--format", help="A table for people, or JSON.")]


def end_incomplete(missing: str) -> NoReturn:
    """End a command whose answer is not whole, with status 1; say on stderr what is missing."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]{escape(missing)}[/]")
    raise typer.Exit(1)


def json_object(flag: str, text: str | None) -> dict[str, Any]:
    """Return the object a flag holds; a wrong one is an error that names the flag."""
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(
            f"{flag} is not JSON ({error}), got {text!r}; for example: '{{\"name\": 1}}'"
        ) from None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{flag} must be a JSON object such as '{{\"name\": 1}}', got {text!r}")
    return value


def _proof(credentials: Path | None, token: str | None) -> Credentials | None:
    if credentials is None:
        return Credentials(token=token) if token else None
    try:
        return Credentials.from_file(credentials)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def on_cluster(*, observes: bool = True) -> Callable[[Callable[Concatenate[Target, P], None]], Callable[P, None]]:
    """Give a command the flags that name a cluster, behind its own, and that cluster as its first argument."""
    flags = [*inspect.signature(_target, eval_str=True).parameters.values()][1:]

    def with_flags(command: Callable[Concatenate[Target, P], None]) -> Callable[P, None]:
        @functools.wraps(command)
        def reaching(*args: P.args, **kwargs: P.kwargs) -> None:
            named: dict[str, Any] = {flag.name: kwargs.pop(flag.name) for flag in flags}
            command(_target(observes, **named), *args, **kwargs)

        signature = inspect.signature(command, eval_str=True)
        parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in [*signature.parameters.values(), *flags][1:]]
        reaching.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        reaching.__annotations__ = {one.name: one.annotation for one in parameters}
        return reaching

    return with_flags


def _target(
    observes: bool,
    address: Address = None,
    credentials: CredentialFile = None,
    token: Token = None,
    ca_file: AuthorityFile = None,
    cluster: ClusterName = "default",
) -> Target:
    """Return the cluster that the flags name; of the one that `shoal up` started, as who only ``observes`` or not."""
    if address is None:
        return _local_target(observes)
    try:
        servers_in(address)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--address") from None
    return Target(address, cluster, _proof(credentials, token), TlsFiles(ca_file=str(ca_file)) if ca_file else None)


def _local_target(observes: bool) -> Target:
    running = read_current()
    if running is None:
        out.print("No cluster that `shoal up` started runs here. Start one, or say which: --address nats://host:port")
        raise typer.Exit(3)
    observer = Path(running.credentials_path).with_name("observer.json")
    path = observer if observes and observer.exists() else Path(running.credentials_path)
    return Target(running.address, running.cluster, Credentials.from_file(path))


def connected(target: Target, timeout_seconds: float) -> AbstractAsyncContextManager[Bus]:
    """Connect to a cluster, to ask it something."""
    return connect(
        target.address,
        role=target.role,
        identity=f"list-{secrets.token_hex(4)}",
        cluster=target.cluster,
        credentials=target.credentials,
        tls=target.tls,
        timeout_seconds=timeout_seconds,
    )
