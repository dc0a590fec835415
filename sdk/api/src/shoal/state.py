"""What the cluster consists of, nodes and resources, and what has run on it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, overload

from shoal.session import runtime
from shoal.tasks import read_timeline
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import GetNode, ListNodes, NodeList, NodeRecord, NodeState
from shoal_core.protocol.resources import add, to_amounts
from shoal_core.protocol.scheduling import GetResources, ResourceView

REQUEST_SECONDS = 10.0


def nodes() -> list[dict[str, Any]]:
    """Return a dict for each node, dead ones too: ``NodeID``, ``Alive``, ``Resources``, ``Labels``, ``NodeName``, …"""
    return [
        {
            "NodeID": record.description.node_id,
            "Alive": record.state is NodeState.ALIVE,
            "NodeName": record.description.name or record.description.hostname,
            "NodeManagerAddress": record.description.address,
            "NodeManagerHostname": record.description.hostname,
            "Resources": to_amounts(record.description.total) if record.state is NodeState.ALIVE else {},
            "Labels": dict(record.description.labels),
            "DeathReason": record.death_reason,
            "alive": record.state is NodeState.ALIVE,
        }
        for record in _nodes().nodes
    ]


def labels_of(node: NodeId) -> dict[str, str]:
    """Return the labels of a node, which never change."""
    current = runtime()
    request = GetNode(node_id=node)
    record = current.call(ask(current.bus, current.subjects.gcs("get_node"), request, timeout_seconds=REQUEST_SECONDS))
    assert isinstance(record, NodeRecord)
    return dict(record.description.labels)


def cluster_resources() -> dict[str, float]:
    """Return the resources of all living nodes together."""
    total: dict[str, int] = {}
    for record in _nodes().nodes:
        if record.state is NodeState.ALIVE:
            total = add(total, record.description.total)
    return to_amounts(total)


def available_resources() -> dict[str, float]:
    """Return what of the cluster's resources nobody uses, as the schedulers see it (some milliseconds old)."""
    current = runtime()
    subject = current.subjects.scheduler("resources")
    view = current.call(ask(current.bus, subject, GetResources(), timeout_seconds=REQUEST_SECONDS))
    assert isinstance(view, ResourceView)
    return {name: amount for name, amount in to_amounts(view.free).items() if amount > 0}


@overload
def timeline(filename: None = None) -> list[dict[str, Any]]: ...
@overload
def timeline(filename: str | os.PathLike[str]) -> None: ...
def timeline(filename: str | os.PathLike[str] | None = None) -> list[dict[str, Any]] | None:
    """Return what has run lately as rows of Chrome's trace format, or write them to a file as JSON.

    Perfetto (ui.perfetto.dev) and ``chrome://tracing`` draw it: a bar for each task and call of an actor, a line for
    each worker process, times in microseconds. There are the last 1,000 tasks of each process, 2,000 of each node; what
    a process had run that was killed is missing. Raises ``OSError`` where the file cannot be written.
    """
    current = runtime()
    rows, _ = current.call(read_timeline(current.bus, current.subjects, REQUEST_SECONDS))
    if filename is None:
        return rows
    Path(filename).write_text(json.dumps(rows))
    return None


def _nodes() -> NodeList:
    current = runtime()
    answer = current.call(
        ask(current.bus, current.subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=REQUEST_SECONDS)
    )
    assert isinstance(answer, NodeList)
    return answer
