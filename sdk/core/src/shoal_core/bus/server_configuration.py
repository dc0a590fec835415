"""Configuration files of nats-server: a user for each role, its permissions, JetStream.

That of the embedded broker listens on loopback only; that of a broker of one's own says nothing of addresses and
folders, which its command line gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shoal_core.bus.credentials import Credentials
from shoal_core.protocol.subjects import Role, permissions

LASTING_MAX_PAYLOAD = 1024 * 1024


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
    return f"""\
server_name: {json.dumps(name)}
listen: "127.0.0.1:{port}"
max_payload: {settings.max_payload}
{_common(settings.cluster, credentials)}\
{_jetstream(settings) if settings.jetstream else ""}"""


def lasting_configuration(cluster: str, credentials: Mapping[Role, Credentials]) -> str:
    """Return what a broker of one's own needs to know of a cluster; it holds the passwords, so keep its file private.

    Where the server listens, where JetStream keeps its files and which certificate it has is said on its command line.
    Every write reaches the disk before it is acknowledged.
    """
    return f"""\
max_payload: {LASTING_MAX_PAYLOAD}
{_common(cluster, credentials)}\
jetstream {{
  sync_interval: always
}}
"""


def _common(cluster: str, credentials: Mapping[Role, Credentials]) -> str:
    """Return the part about connections and users."""
    users = ",\n    ".join(_user(cluster, role, proof) for role, proof in credentials.items())
    return f"""\
ping_interval: "10s"
ping_max: 3
authorization {{
  users: [
    {users}
  ]
}}
"""


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
