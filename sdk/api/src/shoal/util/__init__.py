"""What is built on tasks and actors alone (a pool of actors, a queue), and what helps to use them.

Where things are placed is said with ``shoal.util.scheduling_strategies``.
"""

from shoal.actor import list_named_actors
from shoal.util import accelerators, check_serialize, metrics, queue, scheduling_strategies, state
from shoal.util.actor_pool import ActorPool
from shoal.util.check_serialize import inspect_serializability
from shoal.util.node import get_node_ip_address
from shoal.util.once import disable_log_once_globally, enable_periodic_logging, log_once
from shoal.util.serialization import deregister_serializer, register_serializer

__all__ = [
    "ActorPool",
    "accelerators",
    "check_serialize",
    "deregister_serializer",
    "disable_log_once_globally",
    "enable_periodic_logging",
    "get_node_ip_address",
    "inspect_serializability",
    "list_named_actors",
    "log_once",
    "metrics",
    "queue",
    "register_serializer",
    "scheduling_strategies",
    "state",
]
