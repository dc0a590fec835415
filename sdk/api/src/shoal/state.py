"""What the cluster consists of: nodes and resources."""

from __future__ import annotations

from typing import Any

from shoal.session import runtime
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import NodeId
from shoal_core.protocol.messages import (
    GetNode,
    GetResources,
    ListNodes,
    NodeList,
    NodeRecord,
    NodeState,
    ResourceView,
)
from shoal_core.protocol.resources import add, to_amounts

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


def _nodes() -> NodeList:
    current = runtime()
    answer = current.call(
        ask(current.bus, current.subjects.gcs("list_nodes"), ListNodes(), timeout_seconds=REQUEST_SECONDS)
    )
    assert isinstance(answer, NodeList)
    return answer
