"""Distributed Python with Ray Core's programming model, over NATS.

::

    import shoal

    @shoal.remote
    def square(x: int) -> int:
        return x * x

    print(shoal.get([square.remote(i) for i in range(10)]))

The first use joins a cluster, or starts one that ends with this process (see ``init``). ``import shoal as ray`` runs a
Ray Core program.
"""

from shoal import actor, cloudpickle, exceptions, job_config, runtime_context, runtime_env, util
from shoal.actor import get_actor, kill, method
from shoal.decorator import remote
from shoal.generators import DynamicObjectRefGenerator
from shoal.logging_config import LoggingConfig
from shoal.objects import cancel, get, put, wait
from shoal.remote_function import RemoteFunction
from shoal.runtime_context import get_gpu_ids, get_runtime_context
from shoal.session import Context, init, is_initialized, shutdown
from shoal.state import available_resources, cluster_resources, nodes, timeline
from shoal_core import __version__
from shoal_core.runtime.ownership.identities import ActorID, JobID, NodeID, PlacementGroupID, TaskID, WorkerID
from shoal_core.runtime.ownership.objects import ObjectRef
from shoal_core.runtime.ownership.streams import ObjectRefGenerator

ObjectID = ObjectRef
__commit__ = ""
"""The commit that this was built from; empty, since builds do not record it."""

__all__ = [
    "ActorID",
    "Context",
    "DynamicObjectRefGenerator",
    "JobID",
    "LoggingConfig",
    "NodeID",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "PlacementGroupID",
    "RemoteFunction",
    "TaskID",
    "WorkerID",
    "__commit__",
    "__version__",
    "actor",
    "available_resources",
    "cancel",
    "cloudpickle",
    "cluster_resources",
    "exceptions",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "job_config",
    "kill",
    "method",
    "nodes",
    "put",
    "remote",
    "runtime_context",
    "runtime_env",
    "shutdown",
    "timeline",
    "util",
    "wait",
]
