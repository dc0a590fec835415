"""Joining a cluster under the names of Ray's client: every driver of Shoal only dials, so there is no other kind."""

from __future__ import annotations

from typing import Any

from shoal.session import Context, init, shutdown


def connect(conn_str: str, *, namespace: str | None = None, job_config: Any = None, **others: Any) -> Context:
    """Join the cluster at an address, as ``init(conn_str)`` does; other parameters of Ray's client mean nothing."""
    return init(conn_str, namespace=namespace, job_config=job_config)


def disconnect() -> None:
    """Leave the cluster, as ``shutdown()`` does."""
    shutdown()
