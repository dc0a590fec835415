"""The catalogue of metrics: every one that Shoal shows of itself, with its labels and the services that show it.

No other module spells a name. ``docs/metrics.md`` is made from it; dashboards and alerts are checked against it.
"""

from __future__ import annotations

from shoal_core.protocol.measures import LONG_SECONDS_BOUNDS, SECONDS_BOUNDS, Kind, Metric

PREFIX = "shoal_"
GCS, SCHEDULER, OBJECTSTORE, WORKER = "gcs", "scheduler", "objectstore", "worker"
ALL = (GCS, SCHEDULER, OBJECTSTORE, WORKER)

CATALOGUE: dict[str, Metric] = {}
"""All metrics by their full names, in the order of the documentation."""


def _metric(name: str, kind: Kind, services: tuple[str, ...], text: str, labels: tuple[str, ...]) -> Metric:
    bounds = () if kind is not Kind.HISTOGRAM else SECONDS_BOUNDS
    metric = Metric(f"{PREFIX}{name}", kind, text, labels, bounds, services)
    CATALOGUE[metric.name] = metric
    return metric


def _counter(name: str, services: tuple[str, ...], text: str, *labels: str) -> Metric:
    return _metric(f"{name}_total", Kind.COUNTER, services, text, labels)


def _gauge(name: str, services: tuple[str, ...], text: str, *labels: str) -> Metric:
    return _metric(name, Kind.GAUGE, services, text, labels)


def _histogram(name: str, services: tuple[str, ...], text: str, *labels: str) -> Metric:
    return _metric(name, Kind.HISTOGRAM, services, text, labels)


def _long_histogram(name: str, services: tuple[str, ...], text: str, *labels: str) -> Metric:
    metric = Metric(f"{PREFIX}{name}", Kind.HISTOGRAM, text, labels, LONG_SECONDS_BOUNDS, services)
    CATALOGUE[metric.name] = metric
    return metric


# ----------------------------------------------------------------------------------- every service

BUILD_INFO = _gauge("build_info", ALL, "Always 1; the labels say what runs.", "service", "version", "python_version")
EVENT_LOOP_LAG = _histogram("event_loop_lag_seconds", ALL, "How late the event loop came to a timer, once a second.")
BROKER_CONNECTED = _gauge("broker_connected", ALL, "1 while the service is connected to the broker, else 0.")
BROKER_RECONNECTS = _counter("broker_reconnects", ALL, "How often the connection to the broker was lost and came back.")
BROKER_ROUND_TRIP = _histogram(
    "broker_round_trip_seconds", ALL, "From this service to the broker and back, measured every 5 seconds."
)
MESSAGES_RECEIVED = _counter("messages_received", ALL, "Requests and events that arrived.", "endpoint")
REQUESTS_REFUSED = _counter("requests_refused", ALL, "Requests answered with an error, and bad events.", "endpoint")
REQUEST_SECONDS = _histogram("request_seconds", ALL, "From a request to its answer.", "endpoint")
MESSAGES_DROPPED = _counter("messages_dropped", ALL, "Messages that could not be sent.")

# ----------------------------------------------------------------------------------- gcs

NODES = _gauge("nodes", (GCS,), "Nodes by state; those that are DEAD stay on record.", "state")
JOBS = _gauge("jobs", (GCS,), "Jobs by state; those that have ended stay on record.", "state")
ACTORS = _gauge("actors", (GCS,), "Actors by state; the dead are forgotten after ten minutes.", "state")
ACTOR_RESTARTS = _counter("actor_restarts", (GCS,), "Incarnations of actors that ended and are followed by another.")
ACTOR_DEATHS = _counter("actor_deaths", (GCS,), "Actors that ended for good.", "cause")
PLACEMENT_GROUPS = _gauge("placement_groups", (GCS,), "Placement groups by state; removed ones are forgotten.", "state")
NODE_DEATHS = _counter("node_deaths", (GCS,), "Nodes that were declared dead, or left.", "cause")

# ----------------------------------------------------------------------------------- scheduler

SCHEDULER_NODES = _gauge("scheduler_nodes", (SCHEDULER,), "Nodes that announce themselves to this replica.")
SCHEDULER_REPLICAS = _gauge("scheduler_replicas", (SCHEDULER,), "Replicas that this one knows to live, itself too.")
PENDING_LEASES = _gauge(
    "pending_leases", (SCHEDULER,), "Leases that are wanted and not granted. All replicas hear all: take the maximum."
)
PENDING_INFEASIBLE = _gauge("pending_infeasible_leases", (SCHEDULER,), "Those of them that no node could ever grant.")
PENDING_RESOURCES = _gauge(
    "pending_resources",
    (SCHEDULER,),
    "What pending leases and bundles without a place ask for, memory in bytes; without leases that wait for a bundle.",
    "resource",
)
PENDING_SECONDS = _gauge("pending_seconds", (SCHEDULER,), "How long the oldest demand has been waiting.")
PENDING_GROUPS = _gauge("pending_placement_groups", (SCHEDULER,), "Placement groups that have bundles without a node.")
SCHEDULER_DECISIONS = _counter("scheduler_decisions", (SCHEDULER,), "Leases for which a node was chosen and asked.")
SCHEDULER_REFUSALS = _counter(
    "scheduler_refusals",
    (SCHEDULER,),
    "Leases that the chosen node did not grant: a conflict, since its resources were taken meanwhile; able, though it "
    "has the resources; or silent.",
    "reason",
)
SCHEDULER_RECALLS = _counter("scheduler_recalls", (SCHEDULER,), "Leases that were asked back, for others to have.")
SCHEDULER_ANSWER = _histogram("scheduler_answer_seconds", (SCHEDULER,), "From asking a node for leases to its answer.")

# ----------------------------------------------------------------------------------- worker: what a node has

RESOURCE_CAPACITY = _gauge("resource_capacity", (WORKER,), "What the node offers; memory in bytes.", "resource")
RESOURCE_USED = _gauge(
    "resource_used", (WORKER,), "What is promised to leases and bundles; above the capacity in overdraft.", "resource"
)
LEASES = _gauge("leases", (WORKER,), "Leases by state: starting, running, blocked.", "state")
WORKER_PROCESSES = _gauge("worker_processes", (WORKER,), "Worker processes by state.", "state")
WORKER_PROCESS_STARTS = _counter("worker_process_starts", (WORKER,), "Worker processes that were started.")
WORKER_PROCESS_ENDS = _counter(
    "worker_process_ends",
    (WORKER,),
    "Worker processes that ended, by cause: left, killed by the node, out_of_memory, died.",
    "cause",
)
DRIVERS = _gauge("drivers", (WORKER,), "Drivers that are attached to the node.")
HOSTED_ACTORS = _gauge("hosted_actors", (WORKER,), "Actors whose process is on the node.")
BUNDLES = _gauge("bundles", (WORKER,), "Bundles of placement groups for which the node has reserved resources.")
GPU_LEASED = _gauge("gpu_leased_ratio", (WORKER,), "How much of a GPU is leased (1: all).", "index", "uuid")
GPU_UTILIZATION = _gauge("gpu_utilization_ratio", (WORKER,), "How busy a GPU is (1: always).", "index", "uuid")
GPU_MEMORY_USED = _gauge("gpu_memory_used_bytes", (WORKER,), "Memory of a GPU in use.", "index", "uuid")
GPU_MEMORY = _gauge("gpu_memory_bytes", (WORKER,), "Memory of a GPU.", "index", "uuid")
GPU_ENERGY = _counter("gpu_energy_joules", (WORKER,), "Energy a GPU took since its driver was loaded.", "index", "uuid")

# ---------------------------------------------------------------------------------- worker: tasks, told by their owners

TASKS_FINISHED = _counter(
    "tasks_finished",
    (WORKER,),
    "Tasks and actor calls that ended, counted by their owner: ok, failed (they raised), cancelled, or lost with a "
    "worker process, node or object. Of an owner's functions the first 100 have names here, others are (other).",
    "function",
    "outcome",
)
TASK_RETRIES = _counter(
    "task_retries", (WORKER,), "Attempts that were followed by another, by reason: raised, or lost.", "reason"
)
TASKS_PENDING = _gauge("tasks_pending", (WORKER,), "Tasks and actor calls that were submitted and have not ended.")
TASK_QUEUE_SECONDS = _long_histogram(
    "task_queue_seconds", (WORKER,), "From when a task's arguments are ready to when it is sent to a worker process."
)
TASK_RUN_SECONDS = _long_histogram("task_run_seconds", (WORKER,), "How long tasks and actor calls took to run.")
TASK_FETCH_SECONDS = _long_histogram(
    "task_fetch_seconds", (WORKER,), "How long tasks with large arguments waited for them in the worker process."
)
METRIC_SERIES = _gauge("metric_series", (WORKER,), "Series of shoal.util.metrics that the node keeps.")
METRIC_SERIES_DROPPED = _counter(
    "metric_series_dropped", (WORKER,), "Series of shoal.util.metrics that a process or the node had no room for."
)

# ----------------------------------------------------------------------------------- objects

OBJECTS = _gauge(
    "objects",
    (WORKER, OBJECTSTORE),
    "Objects by tier: memory, copy and spilled of a node, durable of the objectstore (a spilled one is there as well).",
    "tier",
)
OBJECT_BYTES = _gauge("object_bytes", (WORKER, OBJECTSTORE), "Bytes of those objects.", "tier")
OBJECT_STORE_CAPACITY = _gauge("object_store_capacity_bytes", (WORKER,), "Shared memory for objects on the node.")
OBJECT_STORE_USED = _gauge("object_store_used_bytes", (WORKER,), "Shared memory in use, warm files included.")
OBJECT_STORE_WAITING = _gauge("object_store_waiting", (WORKER,), "Requests that wait for room.")
SPILLED_OBJECTS = _counter("spilled_objects", (WORKER,), "Objects that were spilled.")
SPILLED_BYTES = _counter("spilled_bytes", (WORKER,), "Bytes that were spilled.")
RESTORED_OBJECTS = _counter("restored_objects", (WORKER,), "Spilled objects that came back.")
RESTORED_BYTES = _counter("restored_bytes", (WORKER,), "Spilled bytes that came back.")
SPILLS_REFUSED = _counter("spills_refused", (WORKER,), "Spills that the durable tier refused.")
TRANSFER_PULLS = _gauge("transfer_pulls", (WORKER,), "Objects that are being pulled to the node.")
TRANSFER_LOANS = _gauge("transfer_loans", (WORKER,), "Segments that are lent to pullers.")
TRANSFER_SENT = _counter("transfer_sent_bytes", (WORKER,), "Bytes of chunks sent, once for all who pull.")
TRANSFER_RECEIVED = _counter("transfer_received_bytes", (WORKER,), "Bytes of chunks received.")
DURABLE_JOBS = _gauge("durable_jobs", (OBJECTSTORE,), "Jobs that have durable objects.")
DURABLE_REQUESTS = _gauge("durable_requests", (OBJECTSTORE,), "Requests to the durable tier that are under way.")
DURABLE_OPENED = _counter("durable_objects_opened", (OBJECTSTORE,), "Uploads that were opened.")
DURABLE_SEALED = _counter("durable_objects_sealed", (OBJECTSTORE,), "Objects that became readable.")
DURABLE_DELETED = _counter("durable_objects_deleted", (OBJECTSTORE,), "Objects that were deleted.")
DURABLE_SWEPT = _counter(
    "durable_objects_swept", (OBJECTSTORE,), "Objects that were looked at and removed, or released."
)
DURABLE_WRITTEN = _counter("durable_written_bytes", (OBJECTSTORE,), "Bytes of chunks that were stored.")
DURABLE_READ = _counter("durable_read_bytes", (OBJECTSTORE,), "Bytes of chunks that were read.")
