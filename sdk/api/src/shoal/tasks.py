"""The tasks of a cluster as rows, and as a timeline: what waits, what runs, and what has ended lately.

Read-only: an observer may ask. Nothing is collected beforehand: processes remember the last tasks that they have run,
and are asked by their nodes. So there is no more than the last thousand of each process (``runtime.recent``), and two
thousand of each node; what a process had run that was killed before its job ended is gone with it. A driver without a
node is asked by nobody: what waits there is not told.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shoal.asking import ask_nodes
from shoal.rows import Row, count
from shoal_core.bus import Bus
from shoal_core.protocol.ids import TaskNumber, told_task_id
from shoal_core.protocol.messages import NodeDescription
from shoal_core.protocol.resources import to_amounts
from shoal_core.protocol.scheduling import MOST_LISTED_TASKS, ListTasks, NodeTasks, TaskDescription
from shoal_core.protocol.scheduling import TaskState as Standing
from shoal_core.protocol.subjects import Subjects

DRIVER_TASK = "f" * 32
"""What the id of a driver's own task begins with; its job's id follows."""
NORMAL, METHOD, CREATION = "NORMAL_TASK", "ACTOR_TASK", "ACTOR_CREATION_TASK"

ERROR_TYPES = {
    "task": "TASK_EXECUTION_EXCEPTION",
    "task_cancelled": "TASK_CANCELLED",
    "task_killed": "TASK_CANCELLED",
    "worker_crashed": "WORKER_DIED",
    "runtime_env": "RUNTIME_ENV_SETUP_FAILED",
    "task_group_removed": "TASK_PLACEMENT_GROUP_REMOVED",
    "actor_group_removed": "ACTOR_PLACEMENT_GROUP_REMOVED",
    "task_unschedulable": "TASK_UNSCHEDULABLE_ERROR",
    "actor_unschedulable": "ACTOR_UNSCHEDULABLE_ERROR",
}
"""Ray's names for errors by their codes; those of others are their codes in capitals."""


class TaskState(Row):
    """One attempt to run a task, or a call of an actor, or to make an actor.

    ``state`` is PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, SUBMITTED_TO_WORKER, RUNNING, FINISHED or FAILED, ``type``
    NORMAL_TASK, ACTOR_TASK or ACTOR_CREATION_TASK; the id of a task that makes an actor is the actor's. Where it was
    not begun (yet) there is no ``node_id``, ``worker_id``, ``worker_pid`` and ``start_time_ms``. Times are in
    milliseconds. ``error_type`` is in Ray's words, ``error_message`` the line of its text that says most.
    ``func_or_class_name`` is what it calls, whatever ``name`` it was given. ``parent_task_id`` is of the task that
    submitted it; where the driver did, it is all f but for the job's id. ``creation_time_ms`` is when it was submitted,
    also where it was tried again, ``events`` are when it was, when it began and when it ended. ``required_resources``
    of a call are none: they are its actor's.
    """

    task_id: str
    attempt_number: int
    name: str
    state: str
    job_id: str
    actor_id: str | None
    type: str
    func_or_class_name: str
    parent_task_id: str | None
    node_id: str | None
    worker_id: str | None
    worker_pid: int | None
    error_type: str | None
    error_message: str | None
    creation_time_ms: int | None
    start_time_ms: int | None
    end_time_ms: int | None
    language: str
    required_resources: dict[str, float]
    placement_group_id: str | None
    events: list[dict[str, Any]]


async def list_tasks(bus: Bus, subjects: Subjects, timeout_seconds: float) -> tuple[list[TaskState], str]:
    """Return a row for each attempt, those that have not ended first, then the newest; and who is silent, in words."""
    known, silent = await _ask(bus, subjects, timeout_seconds)
    return [_row(node, task) for node, task in known], silent


async def read_timeline(bus: Bus, subjects: Subjects, timeout_seconds: float) -> tuple[list[dict[str, Any]], str]:
    """Return what has run as rows of Chrome's trace format, oldest first; and who is silent, in words."""
    known, silent = await _ask(bus, subjects, timeout_seconds)
    ran = [(node, task) for node, task in known if task.began_at and task.state is not Standing.RUNNING]
    ran.sort(key=lambda one: one[1].began_at)
    return [*_names(ran), *(_bar(node, task) for node, task in ran)], silent


def summarize(rows: list[TaskState]) -> dict[str, Any]:
    """Return how many tasks of each function are in which state."""
    names = sorted({(row.func_or_class_name, row.type) for row in rows})
    summary = {}
    for name, kind in names:
        mine = [row for row in rows if (row.func_or_class_name, row.type) == (name, kind)]
        summary[name] = {"func_or_class_name": name, "type": kind, "state_counts": count(mine, "state")}
    kinds = count(rows, "type")
    return {
        "cluster": {
            "summary": summary,
            "total_tasks": kinds.get(NORMAL, 0),
            "total_actor_tasks": kinds.get(METHOD, 0),
            "total_actor_scheduled": kinds.get(CREATION, 0),
            "summary_by": "func_name",
        }
    }


# ------------------------------------------------------------------------------------ asking

Known = tuple[NodeDescription, TaskDescription]


async def _ask(bus: Bus, subjects: Subjects, timeout_seconds: float) -> tuple[list[Known], str]:
    def request(patience_seconds: float) -> ListTasks:
        return ListTasks(most=MOST_LISTED_TASKS, timeout_seconds=patience_seconds)

    asked = await ask_nodes(bus, subjects, "tasks", request, NodeTasks, timeout_seconds)
    known = [(node, task) for node, answer in asked.answers for task in answer.tasks]
    silent = [f"node {node}" for node in asked.silent]
    silent += [f"process {process}" for _, answer in asked.answers for process in answer.silent]
    return _once(known), ", ".join(silent)


def _once(known: Iterable[Known]) -> list[Known]:
    """Return what is known best of each attempt: who has run it knows more than who runs it, and he than its owner."""
    best: dict[tuple[str, int, int, str], Known] = {}
    for one in known:
        task = one[1]
        key = (task.owner, task.number, task.attempt, "" if task.number else task.actor)
        if key not in best or _certainty(task) > _certainty(best[key][1]):
            best[key] = one
    return sorted(best.values(), key=lambda one: (_has_ended(one[1]), -one[1].began_at))


def _has_ended(task: TaskDescription) -> bool:
    return task.state in (Standing.FINISHED, Standing.FAILED)


def _certainty(task: TaskDescription) -> tuple[bool, bool]:
    return _has_ended(task), task.began_at > 0


# ------------------------------------------------------------------------------------ rows


def _row(node: NodeDescription, task: TaskDescription) -> TaskState:
    begun = task.began_at > 0
    created, began, ended = map(_milliseconds, (task.created_at, task.began_at, task.ended_at))
    moments = (Standing.PENDING_ARGS_AVAIL, created), (Standing.RUNNING, began), (task.state, ended)
    failed = task.state is Standing.FAILED
    return TaskState(
        {
            "task_id": _id(task),
            "attempt_number": task.attempt,
            "name": task.name,
            "state": task.state.value,
            "job_id": task.job_id,
            "actor_id": task.actor or None,
            "type": _type(task),
            "func_or_class_name": task.function or task.name,
            "parent_task_id": task.parent or DRIVER_TASK + task.job_id,
            "node_id": node.node_id if begun else None,
            "worker_id": task.process_id if begun else None,
            "worker_pid": task.pid if begun else None,
            "error_type": ERROR_TYPES.get(task.code, task.code.upper()) if failed else None,
            "error_message": task.text if failed else None,
            "creation_time_ms": created,
            "start_time_ms": began,
            "end_time_ms": ended,
            "language": "PYTHON",
            "required_resources": to_amounts(task.resources),
            "placement_group_id": task.group or None,
            "events": [{"state": state.value, "created_ms": at} for state, at in moments if at is not None],
        }
    )


def _milliseconds(seconds: float) -> int | None:
    return int(seconds * 1000) or None


def _id(task: TaskDescription) -> str:
    try:
        return told_task_id(task.owner if task.number else task.actor, TaskNumber(task.number))
    except (ValueError, OverflowError):
        return ""


def _type(task: TaskDescription) -> str:
    if not task.number:
        return CREATION
    return METHOD if task.actor else NORMAL


# ------------------------------------------------------------------------------------ the timeline


def _bar(node: NodeDescription, task: TaskDescription) -> dict[str, Any]:
    """Return one task as a bar; times are in microseconds."""
    return {
        "cat": "task",
        "name": task.name,
        "ph": "X",
        "ts": task.began_at * 1e6,
        "dur": max(0.0, task.ended_at - task.began_at) * 1e6,
        "pid": node.node_id,
        "tid": f"worker:{task.process_id}",
        "cname": "terrible" if task.state is Standing.FAILED else "generic_work",
        "args": {
            "task_id": _id(task),
            "attempt": task.attempt,
            "job_id": task.job_id,
            "actor_id": task.actor or None,
            "state": task.state.value,
            "error": task.text or None,
        },
    }


def _names(ran: list[Known]) -> list[dict[str, Any]]:
    """Return the rows that name the nodes (processes, in the format's words) and their workers (threads)."""
    names: dict[tuple[str, str], dict[str, Any]] = {}
    for node, task in ran:
        title = f"Node {node.name or node.hostname} ({node.address})"
        names[node.node_id, ""] = {"ph": "M", "name": "process_name", "pid": node.node_id, "args": {"name": title}}
        worker = f"worker:{task.process_id}"
        about = {"name": f"worker {task.pid}"}
        names[node.node_id, worker] = {
            "ph": "M",
            "name": "thread_name",
            "pid": node.node_id,
            "tid": worker,
            "args": about,
        }
    return list(names.values())
