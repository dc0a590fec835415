"""The rows of tasks: of what several processes tell of one, the best; and the same as a timeline."""

from __future__ import annotations

import json
from typing import Any

from shoal.rows import columns_of
from shoal.tasks import TaskState, list_tasks, read_timeline, summarize
from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.ids import JobId, ProcessId, TaskNumber, task_id_bytes
from shoal_core.protocol.messages import NodeList
from shoal_core.protocol.scheduling import NodeTasks, TaskDescription
from shoal_core.protocol.scheduling import TaskState as Standing
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.testing.builders import node_id, node_record, process_id

SUBJECTS = Subjects("test")
NODE, SILENT = node_id(1), node_id(2)
OWNER, WORKER, QUIET = process_id(1), process_id(2), process_id(3)
JOB = JobId("00000001")


def told(by: ProcessId, number: int, state: str, attempt: int = 0, **fields: Any) -> TaskDescription:
    about: dict[str, Any] = {"process_id": by, "pid": 42, "job_id": JOB, "owner": OWNER, "name": "f"}
    return TaskDescription(number=number, attempt=attempt, state=Standing(state), **(about | fields))


def id_of(number: int) -> str:
    return task_id_bytes(OWNER, TaskNumber(number)).hex()


async def asked(*tasks: TaskDescription) -> tuple[list[TaskState], list[dict[str, Any]], str]:
    """Return the rows and the timeline of a cluster of which one node tells this, and who is silent."""
    broker = MemoryBroker()

    def answer(bus: Bus, asked: Message, message: Any) -> None:
        bus.publish(asked.reply, encode(message))

    async with (
        broker.connect(role=Role.GCS, identity="gcs", cluster="test") as gcs,
        broker.connect(role=Role.NODE, identity=NODE, cluster="test") as node,
        broker.connect(role=Role.OBSERVER, identity="looks", cluster="test") as bus,
    ):
        nodes = NodeList(nodes=[node_record(NODE), node_record(SILENT)])
        gcs.subscribe(SUBJECTS.gcs("list_nodes"), lambda message: answer(gcs, message, nodes))
        known = NodeTasks(node_id=NODE, tasks=list(tasks), silent=[QUIET])
        node.subscribe(SUBJECTS.node(NODE, "tasks"), lambda message: answer(node, message, known))
        rows, silent = await list_tasks(bus, SUBJECTS, 1.0)
        timeline, as_silent = await read_timeline(bus, SUBJECTS, 1.0)
        assert silent == as_silent
        return rows, timeline, silent


async def test_who_ran_a_task_knows_best_and_each_attempt_is_a_row() -> None:
    held: dict[str, Any] = {"resources": {"CPU": 5000}, "group": "d" * 32}
    rows, _, silent = await asked(
        told(OWNER, 1, "SUBMITTED_TO_WORKER"),
        told(WORKER, 1, "RUNNING", began_at=5.0),
        told(OWNER, 2, "SUBMITTED_TO_WORKER"),
        told(WORKER, 2, "FINISHED", began_at=2.0, ended_at=2.5, created_at=1.5, function="g", parent="e" * 40, **held),
        told(WORKER, 3, "FAILED", began_at=1.0, ended_at=1.1, code="task", text="no good"),
        told(OWNER, 3, "FAILED", attempt=1, code="worker_crashed", text="it died", created_at=1.0, ended_at=3.0),
        told(OWNER, 4, "PENDING_ARGS_AVAIL"),
    )
    assert silent == f"node {SILENT}, process {QUIET}"
    assert [(row.task_id, row.attempt_number, row.state) for row in rows] == [
        (id_of(1), 0, "RUNNING"),
        (id_of(4), 0, "PENDING_ARGS_AVAIL"),
        (id_of(2), 0, "FINISHED"),
        (id_of(3), 0, "FAILED"),
        (id_of(3), 1, "FAILED"),
    ]
    assert all(list(row) == columns_of(TaskState) for row in rows)
    running, waiting, finished, raised, crashed = rows
    assert (running.worker_id, running.start_time_ms, running.end_time_ms) == (WORKER, 5000, None)
    assert (waiting.worker_id, waiting.node_id, waiting.worker_pid, waiting.start_time_ms) == (None,) * 4
    assert (finished.node_id, finished.worker_pid, finished.end_time_ms, finished.error_type) == (NODE, 42, 2500, None)
    assert (raised.error_type, raised.error_message) == ("TASK_EXECUTION_EXCEPTION", "no good")
    assert (crashed.error_type, crashed.worker_id) == ("WORKER_DIED", None)
    assert (crashed.creation_time_ms, crashed.start_time_ms, crashed.end_time_ms) == (1000, None, 3000)
    assert (finished.func_or_class_name, finished.creation_time_ms, finished.language) == ("g", 1500, "PYTHON")
    assert (finished.parent_task_id, waiting.parent_task_id) == ("e" * 40, "f" * 32 + JOB)
    assert (finished.required_resources, finished.placement_group_id) == ({"CPU": 0.5}, "d" * 32)
    assert finished.events == [
        {"state": "PENDING_ARGS_AVAIL", "created_ms": 1500},
        {"state": "RUNNING", "created_ms": 2000},
        {"state": "FINISHED", "created_ms": 2500},
    ]


async def test_of_what_kind_tasks_are_and_how_many_of_each() -> None:
    actor, other = "a" * 32, "b" * 32
    rows, _, _ = await asked(
        told(WORKER, 0, "FINISHED", owner="", actor=actor, name="C.__init__", began_at=1.0),
        told(WORKER, 0, "FAILED", owner="", actor=other, name="C.__init__", began_at=1.0, code="actor_died"),
        told(WORKER, 1, "FINISHED", actor=actor, name="C.m", began_at=2.0),
        told(WORKER, 2, "FINISHED", began_at=3.0),
        told(WORKER, 3, "RUNNING", began_at=3.0),
    )
    made = [row for row in rows if row.type == "ACTOR_CREATION_TASK"]
    assert {(row.task_id, row.error_type) for row in made} == {(actor, None), (other, "ACTOR_DIED")}
    (call,) = (row for row in rows if row.type == "ACTOR_TASK")
    assert call.actor_id == actor
    summary = summarize(rows)["cluster"]
    assert (summary["total_tasks"], summary["total_actor_tasks"], summary["total_actor_scheduled"]) == (2, 1, 2)
    assert summary["summary"]["f"] == {
        "func_or_class_name": "f",
        "type": "NORMAL_TASK",
        "state_counts": {"RUNNING": 1, "FINISHED": 1},
    }


async def test_the_timeline_has_a_bar_for_each_task_that_ran_and_names_for_their_lines() -> None:
    _, timeline, _ = await asked(
        told(WORKER, 2, "FAILED", began_at=2.0, ended_at=2.5, text="no good"),
        told(WORKER, 1, "FINISHED", began_at=1.0, ended_at=1.25),
        told(WORKER, 3, "RUNNING", began_at=3.0),
        told(OWNER, 4, "FAILED", code="task_cancelled"),
    )
    assert json.loads(json.dumps(timeline)) == timeline
    node, worker, *bars = timeline
    assert (node["ph"], node["name"], node["pid"]) == ("M", "process_name", NODE)
    assert (worker["name"], worker["pid"], worker["tid"]) == ("thread_name", NODE, f"worker:{WORKER}")
    assert [(bar["ph"], bar["ts"], bar["dur"], bar["args"]["state"]) for bar in bars] == [
        ("X", 1e6, 0.25e6, "FINISHED"),
        ("X", 2e6, 0.5e6, "FAILED"),
    ]
    assert all((bar["pid"], bar["tid"]) == (NODE, f"worker:{WORKER}") for bar in bars)
    assert (bars[1]["args"]["task_id"], bars[1]["args"]["error"]) == (id_of(2), "no good")
