"""The configuration file of the embedded broker: a user for each role, permissions, JetStream; loopback only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from shoal_core.bus.credentials import Credentials
from shoal_core.protocol.subjects import Role, permissions


def server_configuration(
    cluster: str,
    port: int,
    credentials: Mapping[Role, Credentials],
    store_dir: Path,
    max_payload: int,
    sync_always: bool,
) -> str:
    """Return the text of a nats-server configuration; it holds the passwords, so its file must be private."""
    users = ",\n    ".join(_user(cluster, role, proof) for role, proof in credentials.items())
    return f"""\
server_name: {json.dumps(f"shoal-{cluster}-embedded")}
listen: "127.0.0.1:{port}"
max_payload: {max_payload}
ping_interval: "5s"
ping_max: 2
jetstream {{
  store_dir: {json.dumps(str(store_dir))}
  sync_interval: {"always" if sync_always else '"2m"'}
}}
authorization {{
  users: [
    {users}
  ]
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
