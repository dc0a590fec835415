"""What programs use beside the core: a pool of actors, a queue (``shoal.util.queue``), and where things are placed
(``shoal.util.scheduling_strategies``)."""

from shoal.actor import list_named_actors
from shoal.util import queue, scheduling_strategies
from shoal.util.actor_pool import ActorPool
from shoal.util.node import get_node_ip_address

__all__ = ["ActorPool", "get_node_ip_address", "list_named_actors", "queue", "scheduling_strategies"]
