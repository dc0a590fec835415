"""What is built on tasks and actors alone (a pool of actors, a queue), and what helps to use them.

Where things are placed is said with ``shoal.util.scheduling_strategies``; ``placement_group``, a function that is also
the name of a module, reserves resources for many of them.
"""

from shoal.actor import list_named_actors
from shoal.util import accelerators, check_serialize, metrics, queue, scheduling_strategies, state
from shoal.util.actor_pool import ActorPool
from shoal.util.check_serialize import inspect_serializability
from shoal.util.completion import as_completed, map_unordered
from shoal.util.debug import disable_log_once_globally, enable_periodic_logging, log_once
from shoal.util.joining import connect, disconnect
from shoal.util.node import get_node_ip_address
from shoal.util.placement_group import (
    get_current_placement_group,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from shoal.util.serialization import deregister_serializer, register_serializer

__all__ = [
    "ActorPool",
    "accelerators",
    "as_completed",
    "check_serialize",
    "connect",
    "deregister_serializer",
    "disable_log_once_globally",
    "disconnect",
    "enable_periodic_logging",
    "get_current_placement_group",
    "get_node_ip_address",
    "get_placement_group",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "map_unordered",
    "metrics",
    "placement_group",
    "placement_group_table",
    "queue",
    "register_serializer",
    "remove_placement_group",
    "scheduling_strategies",
    "state",
]
