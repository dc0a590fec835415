"""The Grafana dashboards, built in code: ``python -m observability.dashboards`` writes ``grafana/dashboards/*.json``.

A test fails where the files differ from what this writes, where a query names a metric that the catalogue does not
have, and where a query returns nothing from a Prometheus that has scraped a cluster at work.
"""

from __future__ import annotations

from pathlib import Path

from observability.panels import WINDOW, Board, Graph, Section, graph, number, quantiles, rate, render

FOLDER = Path(__file__).parent / "grafana" / "dashboards"

OVERVIEW = Board(
    "shoal-overview",
    "Shoal: overview",
    "Whether the cluster is well, and what it does.",
    (
        Section(
            "Now",
            (
                number("Nodes", "Nodes that are alive.", 'max(shoal_nodes{state="ALIVE"})'),
                number("Jobs", "Jobs that run.", 'max(shoal_jobs{state="RUNNING"})'),
                number("Actors", "Actors that are alive.", 'max(shoal_actors{state="ALIVE"})'),
                number("Tasks pending", "Tasks that have not ended.", "sum(shoal_tasks_pending)"),
                number("Tasks per second", "All that end.", "sum(shoal:tasks_finished:rate5m)", "ops"),
                number("Failures", "Of those that end.", "shoal:task_failures:ratio_rate5m", "percentunit"),
            ),
        ),
        Section(
            "Tasks",
            (
                graph(
                    "Tasks by outcome",
                    "Tasks and actor calls that end, as their owners count them.",
                    rate("shoal_tasks_finished_total", "outcome"),
                    unit="ops",
                    stacked=True,
                ),
                graph(
                    "Tasks by function",
                    "The ten functions that run most often.",
                    (f"topk(10, {rate('shoal_tasks_finished_total', 'function')[0]})", "{{function}}"),
                    unit="ops",
                ),
                graph(
                    "Time in the queue",
                    "From when arguments are ready to when the task is sent to a worker process.",
                    *quantiles("shoal_task_queue_seconds"),
                    unit="s",
                ),
                graph("Time to run", "In the worker process.", *quantiles("shoal_task_run_seconds"), unit="s"),
                graph(
                    "Retries", "Attempts followed by another.", rate("shoal_task_retries_total", "reason"), unit="ops"
                ),
                graph("Pending tasks", "By the node of their owners.", ("shoal_tasks_pending", "{{instance}}")),
            ),
        ),
        Section(
            "Cluster",
            (
                graph(
                    "Resources in use",
                    "Of what all nodes offer.",
                    ("shoal:resource_used:ratio", "{{resource}}"),
                    unit="percentunit",
                ),
                graph("Nodes", "As the control store has them.", ("max by (state) (shoal_nodes)", "{{state}}")),
                graph("Actors", "By state.", ("max by (state) (shoal_actors)", "{{state}}"), stacked=True),
                graph(
                    "Restarts and deaths of actors",
                    "Per second.",
                    (f"sum(rate(shoal_actor_restarts_total[{WINDOW}]))", "restarts"),
                    (f"sum by (cause) (rate(shoal_actor_deaths_total[{WINDOW}]))", "{{cause}}"),
                    unit="ops",
                ),
            ),
        ),
        Section(
            "Services",
            (
                graph("Replicas", "That Prometheus can scrape.", ("sum by (job) (up)", "{{job}}")),
                graph(
                    "Lag of event loops",
                    "The 99th percentile over five minutes.",
                    ("shoal:event_loop_lag_seconds:p99_5m", "{{job}} {{instance}}"),
                    unit="s",
                ),
                graph(
                    "Memory",
                    "Of each service.",
                    ("process_resident_memory_bytes", "{{job}} {{instance}}"),
                    unit="bytes",
                ),
                graph(
                    "CPU",
                    "Of each service, in CPUs.",
                    (f"rate(process_cpu_seconds_total[{WINDOW}])", "{{job}} {{instance}}"),
                ),
                graph(
                    "Versions",
                    "How many services run which version.",
                    ("sum by (service, version) (shoal_build_info)", "{{service}} {{version}}"),
                ),
                graph(
                    "Series of users",
                    "Those of shoal.util.metrics that nodes keep, and those they had no room for, per second.",
                    ("shoal_metric_series", "{{instance}}"),
                    (f"rate(shoal_metric_series_dropped_total[{WINDOW}])", "dropped {{instance}}"),
                ),
            ),
        ),
    ),
)

SCHEDULER = Board(
    "shoal-scheduler",
    "Shoal: scheduler, gangs and GPUs",
    "What waits and why, who is asked, and what the GPUs do.",
    (
        Section(
            "Waiting",
            (
                number("Pending leases", "Wanted and not granted.", "max(shoal_pending_leases)"),
                number("Impossible", "No node could ever grant these.", "max(shoal_pending_infeasible_leases)"),
                number("Oldest", "How long it has been waiting.", "max(shoal_pending_seconds)", "s"),
                number("Nodes", "That schedulers hear.", "min(shoal_scheduler_nodes)"),
                number("Replicas", "That schedulers know of each other.", "min(shoal_scheduler_replicas)"),
                number("Worker processes", "That are alive.", "sum(shoal_worker_processes)"),
            ),
        ),
        Section(
            "Demand and decisions",
            (
                graph(
                    "Pending resources",
                    "What the pending leases ask for; autoscaling follows this.",
                    ('shoal:pending_resources:max{resource!="memory"}', "{{resource}}"),
                ),
                graph(
                    "Pending memory",
                    "Likewise.",
                    ('shoal:pending_resources:max{resource="memory"}', "memory"),
                    unit="bytes",
                ),
                graph(
                    "Decisions",
                    "Leases that nodes are asked for, and asked back from their owners.",
                    (f"sum(rate(shoal_scheduler_decisions_total[{WINDOW}]))", "asked for"),
                    (f"sum(rate(shoal_scheduler_recalls_total[{WINDOW}]))", "asked back"),
                    unit="ops",
                ),
                graph(
                    "Refusals",
                    "Leases that the chosen node did not grant.",
                    rate("shoal_scheduler_refusals_total", "reason"),
                    unit="ops",
                ),
                graph(
                    "Answers of nodes",
                    "From asking to the answer.",
                    *quantiles("shoal_scheduler_answer_seconds"),
                    unit="s",
                ),
                graph("Oldest demand", "As each replica sees it.", ("shoal_pending_seconds", "{{instance}}"), unit="s"),
            ),
        ),
        Section(
            "Nodes",
            (
                graph("Leases", "Of all nodes.", ("sum by (state) (shoal_leases)", "{{state}}"), stacked=True),
                graph(
                    "Worker processes",
                    "Of all nodes.",
                    ("sum by (state) (shoal_worker_processes)", "{{state}}"),
                    stacked=True,
                ),
                graph(
                    "Worker processes come and go",
                    "Per second, ends by cause.",
                    (f"sum(rate(shoal_worker_process_starts_total[{WINDOW}]))", "started"),
                    (f"sum by (cause) (rate(shoal_worker_process_ends_total[{WINDOW}]))", "{{cause}}"),
                    unit="ops",
                ),
                graph(
                    "CPUs",
                    "Promised to leases, by node.",
                    ('shoal_resource_used{resource="CPU"}', "used {{instance}}"),
                    ('shoal_resource_capacity{resource="CPU"}', "of {{instance}}"),
                ),
                graph("Hosted actors", "By node.", ("shoal_hosted_actors", "{{instance}}"), stacked=True),
                graph("Drivers", "That are attached, by node.", ("shoal_drivers", "{{instance}}"), stacked=True),
            ),
        ),
        Section(
            "Gangs",
            (
                graph(
                    "Placement groups",
                    "By state, as the control store has them.",
                    ("max by (state) (shoal_placement_groups)", "{{state}}"),
                    stacked=True,
                ),
                graph(
                    "Waiting and placed",
                    "Groups that have bundles without a node, and bundles that nodes have reserved resources for.",
                    ("max(shoal_pending_placement_groups)", "groups that wait"),
                    ("sum(shoal_bundles)", "bundles placed"),
                ),
            ),
        ),
        Section(
            "GPUs",
            (
                graph(
                    "Busy",
                    "Of the time.",
                    ("shoal_gpu_utilization_ratio", "{{instance}} {{index}}"),
                    unit="percentunit",
                ),
                graph(
                    "Leased",
                    "Of each device.",
                    ("shoal_gpu_leased_ratio", "{{instance}} {{index}}"),
                    unit="percentunit",
                ),
                graph(
                    "Memory in use",
                    "Of each device.",
                    ("shoal_gpu_memory_used_bytes / shoal_gpu_memory_bytes", "{{instance}} {{index}}"),
                    unit="percentunit",
                ),
                graph(
                    "Power",
                    "Of each device.",
                    (f"rate(shoal_gpu_energy_joules_total[{WINDOW}])", "{{instance}} {{index}}"),
                    unit="watt",
                ),
            ),
        ),
    ),
)

OBJECTS = Board(
    "shoal-objects",
    "Shoal: objects and broker",
    "Where objects lie, how they move, and how the broker answers.",
    (
        Section(
            "Now",
            (
                number("Objects", "On all nodes.", 'sum(shoal_objects{tier=~"memory|spilled"})'),
                number("In memory", "Bytes, on all nodes.", 'sum(shoal_object_bytes{tier="memory"})', "bytes"),
                number("Spilled", "Bytes, of all nodes.", 'sum(shoal_object_bytes{tier="spilled"})', "bytes"),
                number("Durable", "Bytes, spilled ones too.", 'max(shoal_object_bytes{tier="durable"})', "bytes"),
                number(
                    "Fullest node", "Of its memory for objects.", "max(shoal:object_store_used:ratio)", "percentunit"
                ),
                number("Waiting for room", "Requests, on all nodes.", "sum(shoal_object_store_waiting)"),
            ),
        ),
        Section(
            "Objects",
            (
                graph(
                    "Bytes by tier",
                    "Replicas of the objectstore know the same: the largest counts.",
                    ('sum by (tier) (shoal_object_bytes{job="worker"})', "{{tier}}"),
                    ('max by (tier) (shoal_object_bytes{job="objectstore"})', "{{tier}}"),
                    unit="bytes",
                ),
                graph(
                    "Memory for objects in use",
                    "By node.",
                    ("shoal:object_store_used:ratio", "{{instance}}"),
                    unit="percentunit",
                ),
                graph(
                    "Spilled and restored",
                    "Bytes per second.",
                    (f"sum(rate(shoal_spilled_bytes_total[{WINDOW}]))", "spilled"),
                    (f"sum(rate(shoal_restored_bytes_total[{WINDOW}]))", "restored"),
                    unit="Bps",
                ),
                graph(
                    "Objects spilled and restored",
                    "Per second, and what the durable tier refused.",
                    (f"sum(rate(shoal_spilled_objects_total[{WINDOW}]))", "spilled"),
                    (f"sum(rate(shoal_restored_objects_total[{WINDOW}]))", "restored"),
                    (f"sum(rate(shoal_spills_refused_total[{WINDOW}]))", "refused"),
                    unit="ops",
                ),
                graph(
                    "Transfers",
                    "Between nodes, by node; what many pull is sent once.",
                    (f"rate(shoal_transfer_sent_bytes_total[{WINDOW}])", "sent {{instance}}"),
                    (f"rate(shoal_transfer_received_bytes_total[{WINDOW}])", "received {{instance}}"),
                    unit="Bps",
                ),
                graph(
                    "Transfers under way",
                    "By node.",
                    ("shoal_transfer_pulls", "pulled by {{instance}}"),
                    ("shoal_transfer_loans", "lent by {{instance}}"),
                ),
                graph(
                    "Waiting for arguments",
                    "Of tasks with large ones.",
                    *quantiles("shoal_task_fetch_seconds"),
                    unit="s",
                ),
                graph("Objects", "By tier.", ("sum by (tier) (shoal_objects)", "{{tier}}")),
            ),
        ),
        Section(
            "Durable tier",
            (
                graph(
                    "Bytes written and read",
                    "Per second.",
                    (f"sum(rate(shoal_durable_written_bytes_total[{WINDOW}]))", "written"),
                    (f"sum(rate(shoal_durable_read_bytes_total[{WINDOW}]))", "read"),
                    unit="Bps",
                ),
                graph(
                    "Objects",
                    "Per second.",
                    (f"sum(rate(shoal_durable_objects_opened_total[{WINDOW}]))", "opened"),
                    (f"sum(rate(shoal_durable_objects_sealed_total[{WINDOW}]))", "sealed"),
                    (f"sum(rate(shoal_durable_objects_deleted_total[{WINDOW}]))", "deleted"),
                    (f"sum(rate(shoal_durable_objects_swept_total[{WINDOW}]))", "swept"),
                    unit="ops",
                ),
                graph("Requests under way", "By replica.", ("shoal_durable_requests", "{{instance}}")),
                graph("Jobs", "That have durable objects.", ("max(shoal_durable_jobs)", "jobs")),
            ),
        ),
        Section(
            "Broker",
            (
                graph(
                    "Connections",
                    "1 for each service that is connected.",
                    ("shoal_broker_connected", "{{job}} {{instance}}"),
                ),
                graph(
                    "There and back",
                    "From services to the broker.",
                    *quantiles("shoal_broker_round_trip_seconds"),
                    unit="s",
                ),
                graph(
                    "Reconnects",
                    "In the last minutes, by service.",
                    ("sum by (job) (increase(shoal_broker_reconnects_total[10m]))", "{{job}}"),
                ),
                graph(
                    "Messages",
                    "Requests and events that services handle.",
                    (
                        f"topk(10, sum by (job, endpoint) (rate(shoal_messages_received_total[{WINDOW}])))",
                        "{{job}} {{endpoint}}",
                    ),
                    unit="ops",
                ),
                graph(
                    "Slowest requests",
                    "The 99th percentile over five minutes.",
                    ("topk(10, shoal:request_seconds:p99_5m)", "{{job}} {{endpoint}}"),
                    unit="s",
                ),
                graph(
                    "Refused and dropped",
                    "Requests answered with an error, and messages that could not be sent.",
                    (f"sum by (job) (rate(shoal_requests_refused_total[{WINDOW}]))", "refused by {{job}}"),
                    (f"sum by (job) (rate(shoal_messages_dropped_total[{WINDOW}]))", "dropped by {{job}}"),
                    unit="ops",
                ),
            ),
        ),
    ),
)

BOARDS = (OVERVIEW, SCHEDULER, OBJECTS)


def queries() -> list[tuple[str, str]]:
    """Return every query of every panel, with the names of its dashboard and its panel."""
    return [
        (f"{board.uid}: {section.title}: {panel.title}", query.expression)
        for board in BOARDS
        for section in board.sections
        for panel in section.panels
        for query in (panel.queries if isinstance(panel, Graph) else (panel.query,))
    ]


def main() -> None:
    """Write all dashboards."""
    for board in BOARDS:
        path = FOLDER / f"{board.uid}.json"
        path.write_text(render(board))
        print(path)


if __name__ == "__main__":
    main()
