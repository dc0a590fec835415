"""What the current task or driver may ask about itself."""

from __future__ import annotations

import tempfile
from typing import Any

from shoal.handle import ActorHandle, own_handle
from shoal.runtime_env.runtime_env import RuntimeEnv, restored
from shoal.session import runtime
from shoal.state import labels_of
from shoal_core import __version__
from shoal_core.protocol.ids import NO_NODE, task_id_bytes
from shoal_core.protocol.messages import ClusterInfo, GetCluster
from shoal_core.protocol.records import LeaseAssigned
from shoal_core.protocol.resources import to_amounts
from shoal_core.runtime.environments import to_text
from shoal_core.runtime.ownership.identities import ActorID, JobID, NodeID, TaskID, WorkerID
from shoal_core.runtime.worker.work import Running, current


class RuntimeContext:
    """Where this code runs, and on whose behalf. Ids are lower-case hex."""

    def get_job_id(self) -> str:
        """Return the id of the job."""
        return runtime().job

    def get_node_id(self) -> str:
        """Return the id of the node; zeros for a driver that has none."""
        return runtime().node

    def get_worker_id(self) -> str:
        """Return the id of this process."""
        return runtime().local

    def get_task_id(self) -> str | None:
        """Return the id of the task that runs; None in a driver."""
        running = _running()
        return None if running is None else task_id_bytes(running.owner, running.task.number).hex()

    def get_task_name(self) -> str | None:
        """Return the name of the task that runs; None in a driver."""
        running = _running()
        return None if running is None else running.task.name

    def get_task_function_name(self) -> str | None:
        """Return the name of the function that runs; None in a driver."""
        running = _running()
        if running is None:
            return None
        if (hosting := runtime().hosting) is not None:
            return f"{hosting.assigned.class_name}.{running.task.function}"
        return runtime().function(running.task.function).function.__qualname__

    def get_actor_id(self) -> str | None:
        """Return the id of the actor whose process this is; None elsewhere."""
        hosting = runtime().hosting
        return None if hosting is None else hosting.assigned.actor

    def get_actor_name(self) -> str | None:
        """Return the name of the actor whose process this is, "" if it has none; None elsewhere."""
        hosting = runtime().hosting
        return None if hosting is None else hosting.record.description.name

    def is_canceled(self) -> bool:
        """Return whether the task or call that runs was cancelled; whoever sees it should come to an end."""
        running = _running()
        return running is not None and running.accepted is not None and running.accepted.cancelled

    def get_attempt_number(self) -> int:
        """Return how many times this task was tried before; 0 in a driver."""
        running = _running()
        return 0 if running is None else running.task.attempt

    def get_assigned_resources(self) -> dict[str, float]:
        """Return the resources that the task or actor holds; empty in a driver."""
        lease = _lease()
        return {} if lease is None else to_amounts(lease.resources)

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        """Return the accelerators that the task or actor may use, by kind, as their driver names them."""
        return {"GPU": [str(gpu) for gpu in get_gpu_ids()]}

    def get_node_labels(self) -> dict[str, str]:
        """Return the labels of the node of this process; none for a driver that has no node."""
        current = runtime()
        return {} if current.node == NO_NODE else labels_of(current.node)

    def get_placement_group_id(self) -> str | None:
        """Return the id of the placement group that this task or actor is in; None where it is in none."""
        inside = runtime().in_group
        return None if inside is None else inside.group

    @property
    def should_capture_child_tasks_in_placement_group(self) -> bool:
        """Whether what is submitted here is placed in the placement group that this is in."""
        inside = runtime().in_group
        return inside is not None and inside.captures

    def get_session_name(self) -> str:
        """Return what the cluster was named by chance when its control store was new."""
        info = runtime().ask_gcs("cluster", GetCluster(version=__version__))
        assert isinstance(info, ClusterInfo)
        return info.session

    def get_temp_dir(self) -> str:
        """Return the folder for files that nobody needs for long, on this machine."""
        return tempfile.gettempdir()

    def get_runtime_env_string(self) -> str:
        """Return the runtime environment as JSON."""
        return to_text(runtime().environment)

    @property
    def runtime_env(self) -> RuntimeEnv:
        """The runtime environment of this process, which is that of what it submits; folders are names of packages."""
        return restored(dict(runtime().environment))

    @property
    def current_actor(self) -> ActorHandle[Any]:
        """A handle of the actor whose process this is, which does not keep it alive; ``RuntimeError`` elsewhere."""
        hosting = runtime().hosting
        if hosting is None:
            raise RuntimeError("There is no current actor: this code does not run in an actor.")
        return own_handle(hosting.record)

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether the actor whose process this is was restarted."""
        hosting = runtime().hosting
        return hosting is not None and hosting.restarted

    @property
    def namespace(self) -> str:
        """The namespace of the job."""
        return runtime().namespace

    @property
    def gcs_address(self) -> str:
        """The address of the cluster's broker."""
        return runtime().address

    @property
    def job_id(self) -> JobID:
        """The id of the job (``get_job_id()`` has its digits)."""
        return JobID(self.get_job_id())

    @property
    def node_id(self) -> NodeID:
        """The id of the node."""
        return NodeID(self.get_node_id())

    @property
    def worker_id(self) -> WorkerID:
        """The id of this process."""
        return WorkerID(self.get_worker_id())

    @property
    def task_id(self) -> TaskID | None:
        """The id of the task that runs; None in a driver."""
        return None if (task := self.get_task_id()) is None else TaskID(task)

    @property
    def actor_id(self) -> ActorID | None:
        """The id of the actor whose process this is; None elsewhere."""
        return None if (actor := self.get_actor_id()) is None else ActorID(actor)

    def get_resource_ids(self) -> dict[str, list[str]]:
        """Return what ``get_accelerator_ids`` does (a name that older Ray programs use)."""
        return self.get_accelerator_ids()

    def get(self) -> dict[str, Any]:
        """Return the ids as a dict."""
        ids: dict[str, Any] = {"job_id": self.job_id, "node_id": self.node_id, "namespace": self.namespace}
        if (task := self.task_id) is not None:
            ids["task_id"] = task
        if (actor := self.actor_id) is not None:
            ids["actor_id"] = actor
        return ids


def get_runtime_context() -> RuntimeContext:
    """Return what the current task or driver may ask about itself; joins a cluster first if need be."""
    runtime()
    return RuntimeContext()


def get_gpu_ids() -> list[int] | list[str]:
    """Return the GPUs that the current task or actor may use; none in a driver."""
    lease = _lease()
    if lease is None:
        return []
    gpus = lease.gpus
    return [int(gpu) for gpu in gpus] if all(gpu.isdigit() for gpu in gpus) else list(gpus)


def _running() -> Running | None:
    return current.get()


def _lease() -> LeaseAssigned | None:
    if (hosting := runtime().hosting) is not None:
        return hosting.lease
    running = _running()
    return None if running is None else running.lease
