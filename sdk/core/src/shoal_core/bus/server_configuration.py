"""The configuration file of the embedded broker: a user for each role, permissions, JetStream; loopback only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal_core.bus.credentials import Credentials
from shoal_core.protocol.subjects import Role, permissions


@dataclass(frozen=True)
class ServerSettings:
    """What kind of broker is wanted.

    ``sync_always`` writes through to the disk before each acknowledgement; otherwise JetStream does so every two
    minutes, and what it acknowledged survives the death of the server but not of the machine.
    """

    cluster: str
    store_dir: Path
    max_payload: int
    jetstream: bool
    sync_always: bool


def server_configuration(
    settings: ServerSettings, name: str, port: int, credentials: Mapping[Role, Credentials]
) -> str:
    """Return the text of a nats-server configuration; it holds the passwords, so its file must be private."""
    users = ",\n    ".join(_user(settings.cluster, role, proof) for role, proof in credentials.items())
    return f"""\
server_name: {json.dumps(name)}
listen: "127.0.0.1:{port}"
max_payload: {settings.max_payload}
ping_interval: "10s"
ping_max: 3
authorization {{
  users: [
    {users}
  ]
}}
{_jetstream(settings) if settings.jetstream else ""}"""


def _jetstream(settings: ServerSettings) -> str:
    """Return the part about JetStream."""
    return f"""\
jetstream {{
  store_dir: {json.dumps(str(settings.store_dir))}
  sync_interval: {"always" if settings.sync_always else '"2m"'}
}}
"""


def _user(cluster: str, role: Role, credentials: Credentials) -> str:
    """Return one user with what it may publish and hear."""
    allowed = permissions(cluster, role)
    return (
        f"{{user: {json.dumps(credentials.user)}, password: {json.dumps(credentials.password)}, permissions: "
        f"{{publish: {{allow: {_patterns(allowed.publish)}}}, subscribe: {{allow: {_patterns(allowed.subscribe)}}}}}}}"
    )


def _patterns(patterns: Iterable[str]) -> str:
    return json.dumps(list(patterns))
