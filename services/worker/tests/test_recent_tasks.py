"""Which tasks a node tells of: what its processes say, and what those left that have gone."""

from __future__ import annotations

from typing import Any

from shoal_core.protocol.effects import Reply, Send
from shoal_core.protocol.ids import ActorId, JobId, ProcessId, TaskNumber
from shoal_core.protocol.records import KnownTask, ObjectsReported, ReportTasks, TasksReported
from shoal_core.protocol.scheduling import ListTasks, NodeTasks
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.inquiries import Inquiries
from shoal_worker.objects.holdings import DRIVER, WORKER
from shoal_worker.recent_tasks import MOST_LEFT, RecentTasks

NODE, OWNER, WORKS, GONE = node_id(1), process_id(1), process_id(2), process_id(3)
JOB = JobId("00000001")


def task(number: int, state: str, began_at: float = 0.0, owner: ProcessId = OWNER, **fields: Any) -> KnownTask:
    return KnownTask(owner, TaskNumber(number), 0, "f", state, ActorId(""), began_at, **fields)


def asked(recent: RecentTasks, most: int, reports: dict[ProcessId, list[KnownTask]]) -> NodeTasks:
    """Ask, have these processes answer, and return what the node makes of it."""
    inquiries = Inquiries(NODE)
    processes = dict.fromkeys(reports, WORKER) | {OWNER: DRIVER}
    inquiries.open(recent, ListTasks(most=most, timeout_seconds=5), 7, processes, 0.0)
    questions = [effect.record for effect in inquiries.effects if isinstance(effect, Send)]
    assert questions == [ReportTasks(1, most)] * len(processes)
    inquiries.reported(OWNER, ObjectsReported(1, 1, JOB, 0, 0, []), 0.0)  # the answer to another question
    for process, tasks in reports.items():
        inquiries.reported(process, TasksReported(1, 42, JOB, tasks), 0.0)
    inquiries.tick(5.0)
    (answer,) = (effect.message for effect in inquiries.effects if isinstance(effect, Reply))
    assert isinstance(answer, NodeTasks)
    assert answer == NodeTasks.model_validate_json(answer.model_dump_json()), "it travels"
    return answer


def numbers(answer: NodeTasks) -> list[int]:
    return [one.number for one in answer.tasks]


def test_processes_are_asked_and_who_ran_what_is_told() -> None:
    about: dict[str, Any] = {
        "function": "g",
        "parent": "e" * 40,
        "group": "d" * 32,
        "resources": {"CPU": 5000},
        "created_at": 9.0,
    }
    ran = task(5, "FAILED", 10.0, ended_at=10.5, code="task", text="no good", **about)
    answer = asked(RecentTasks(NODE), 100, {WORKS: [ran], OWNER: [task(6, "PENDING_ARGS_AVAIL", owner=ProcessId(""))]})
    failed, waiting = answer.tasks
    assert (failed.process_id, failed.pid, failed.job_id, failed.owner) == (WORKS, 42, JOB, OWNER)
    assert (failed.began_at, failed.ended_at, failed.code, failed.text) == (10.0, 10.5, "task", "no good")
    assert about.items() <= failed.model_dump().items()
    assert (waiting.process_id, waiting.owner) == (OWNER, OWNER), "what is its own"
    assert answer.silent == []


def test_who_says_nothing_is_named_and_nonsense_is_no_task() -> None:
    answer = asked(RecentTasks(NODE), 100, {WORKS: [task(1, "ASLEEP"), task(2, "RUNNING", 1.0)]})
    assert (numbers(answer), answer.silent) == ([2], [OWNER])


def test_where_there_are_too_many_what_waits_and_what_has_ended_share_the_room() -> None:
    running = [task(number, "RUNNING", 1.0) for number in range(1, 3)]
    ended = [task(number, "FINISHED", float(number)) for number in range(100, 120)]
    waiting = [task(number, "SUBMITTED_TO_WORKER") for number in range(200, 220)]
    answer = asked(RecentTasks(NODE), 10, {WORKS: waiting + ended + running})
    assert numbers(answer) == [1, 2, 119, 118, 117, 116, *range(200, 204)], "the newest of those that ended"
    few = asked(RecentTasks(NODE), 10, {WORKS: ended + running + waiting[:1]})
    assert numbers(few) == [1, 2, *range(119, 112, -1), 200]
    assert numbers(asked(RecentTasks(NODE), 0, {WORKS: ended})) == []


def test_what_a_process_has_run_that_left_is_told_until_there_is_too_much() -> None:
    recent = RecentTasks(NODE)
    other = JobId("00000002")
    recent.left(GONE, TasksReported(0, 43, JOB, [task(2, "FINISHED", 2.0), task(1, "FINISHED", 1.0)]))
    recent.left(GONE, TasksReported(0, 43, other, [task(3, "FINISHED", 3.0)]))
    answer = asked(recent, 100, {WORKS: [task(4, "FINISHED", 4.0)]})
    assert numbers(answer) == [4, 3, 2, 1]
    assert (answer.tasks[1].process_id, answer.tasks[1].pid) == (GONE, 43)
    for start in range(0, 2 * MOST_LEFT, 500):
        ran = [task(start + number, "FINISHED", start + number) for number in range(500, 0, -1)]
        recent.left(GONE, TasksReported(0, 43, JOB, ran))
    assert len(recent) == MOST_LEFT
    assert numbers(asked(recent, 1, {})) == [2 * MOST_LEFT], "the oldest are forgotten"


def test_an_answer_is_no_larger_than_a_message_of_the_broker_whatever_is_told() -> None:
    names = ["f" * 100, "\u4e16" * 100, '"' * 100, "\x01" * 100]
    at = 1795914580.1234567
    about: dict[str, Any] = {"created_at": at, "ended_at": at, "parent": "e" * 40, "group": "d" * 32, "function": "g"}
    about |= {"code": "task", "text": "\n" * 100, "resources": {"CPU": 10_000, '"' * 50: 10_000}}
    tasks = [
        KnownTask(OWNER, TaskNumber(number), 0, names[number % 4], "FAILED", ActorId("a" * 32), at, **about)
        for number in range(1, 2001)
    ]
    answer = asked(RecentTasks(NODE), 2000, {WORKS: tasks})
    assert 500_000 < len(answer.model_dump_json().encode()) < 1_000_000
    times: dict[str, Any] = {"created_at": at, "ended_at": at, "resources": {"CPU": 10_000}}
    few = asked(RecentTasks(NODE), 2000, {WORKS: [task(number, "FINISHED", at, **times) for number in range(1, 2001)]})
    assert len(few.tasks) == 2000
    assert len(few.model_dump_json().encode()) < 1_000_000
