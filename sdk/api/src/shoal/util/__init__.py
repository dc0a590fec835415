"""What is built on tasks and actors alone: a pool of actors, and (in ``shoal.util.queue``) a queue."""

from shoal.actor import list_named_actors
from shoal.util import queue
from shoal.util.actor_pool import ActorPool
from shoal.util.node import get_node_ip_address

__all__ = ["ActorPool", "get_node_ip_address", "list_named_actors", "queue"]
