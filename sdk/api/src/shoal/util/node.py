"""Where this process runs."""

from __future__ import annotations

from shoal.session import runtime
from shoal.state import nodes


def get_node_ip_address() -> str:
    """Return the address of the node that this process belongs to; loopback where it belongs to none."""
    own = runtime().node
    return next((str(node["NodeManagerAddress"]) for node in nodes() if node["NodeID"] == own), "127.0.0.1")
