"""Why something waits, as people read it."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from shoal.cli.reasons import print_reasons
from shoal.reasons import Reasons, task_words, words
from shoal_core.protocol.actors import ActorState, ActorSummary
from shoal_core.protocol.ids import ActorId, JobId, NodeId, ProcessId
from shoal_core.protocol.scheduling import (
    JobStanding,
    NodeShortage,
    PendingDemand,
    PendingTurn,
    TaskStanding,
    TaskState,
)

ONE, TWO = JobId("00000001"), JobId("00000002")
NODE = NodeId("a" * 16)


def standing(job: JobId, share: float = 0.25, priority: int = 0, weight: float = 1.0) -> JobStanding:
    return JobStanding(job_id=job, priority=priority, weight=weight, share=share)


def turn(**fields: Any) -> PendingTurn:
    nothing = {
        "job": standing(ONE),
        "jobs_before": [],
        "job_count": 0,
        "priority": 0,
        "before_in_job": 0,
        "nearest": [],
    }
    return PendingTurn(**{**nothing, **fields})


def waits(turn: PendingTurn | None, **fields: Any) -> PendingDemand:
    about = {
        "owner": ProcessId("p" * 24),
        "job_id": ONE,
        "name": "train",
        "resources": {"CPU": 20_000},
        "wanted": 3,
        "waiting_seconds": 12.4,
        "why": "waits for CPU on 2 nodes that could run it (CPU: 8 of 8 in use)",
        "feasible": True,
    }
    return PendingDemand(**{**about, "turn": turn, **fields})


def said(turn: PendingTurn | None) -> list[str]:
    return list(words(waits(turn)))[1:]


def printed(reasons: Reasons) -> str:
    out = io.StringIO()
    print_reasons(reasons, Console(file=out, width=200, highlight=False, soft_wrap=True))
    return out.getvalue()


def test_the_words_say_for_what_where_and_behind_whom() -> None:
    assert next(words(waits(None))) == "Waits for CPU on 2 nodes that could run it (CPU: 8 of 8 in use)."
    assert said(None) == []
    assert said(turn(nearest=[NodeShortage(node_id=NODE, lacking={"CPU": 5_000})])) == [
        f"Node {NODE} lacks CPU 0.5.",
        "It is next: nothing that waits goes before it.",
    ]
    assert said(turn(over_quota=["CPU"])) == ["Job 00000001 holds as much CPU as its quota allows."]
    assert said(turn(goes_first_seconds=4.2, kept_on=NODE)) == [
        f"It has waited too long, and has gone before everything else for 4 s; room is kept for it on node {NODE}."
    ]
    before = [standing(TWO, priority=1), standing(JobId("00000003"), 0.125, weight=2.0)]
    assert said(turn(jobs_before=before, job_count=7, before_in_job=2)) == [
        "Its job 00000001 (priority 0, holds 25.0%) goes after 7 others: 00000002 (priority 1), "
        "00000003 (holds 12.5% for its weight of 2) and 5 more.",
        "In its job 2 go before it: of a higher priority, deeper, or of who holds less.",
    ]


def test_what_is_printed_and_what_programs_get() -> None:
    reasons = Reasons("train", [], [waits(turn())], 4)
    assert printed(reasons).splitlines() == [
        f"3 × train (job 00000001, owner {'p' * 24}): waits 12 s for CPU 2",
        "  Waits for CPU on 2 nodes that could run it (CPU: 8 of 8 in use).",
        "  It is next: nothing that waits goes before it.",
        "3 more wait, for less long.",
    ]
    row = reasons.to_json()["pending"][0]
    assert (row["resources"], row["text"]) == ({"CPU": 2.0}, list(words(waits(turn()))))
    assert printed(Reasons("none", [], [], 0)) == "Nothing that is called none waits.\n"


def test_an_actor_that_does_not_wait_is_told_of() -> None:
    actor = ActorSummary(
        actor_id=ActorId("b" * 32),
        job_id=ONE,
        class_name="Counter",
        name="",
        namespace="",
        state=ActorState.ALIVE,
        node_id=NODE,
        pid=1,
        restarts=0,
        detached=False,
    )
    assert printed(Reasons("Counter", [actor], [], 0)) == f"Actor Counter ({'b' * 32}) is ALIVE on node {NODE}.\n"


def test_of_a_task_its_owner_says_how_far_it_is() -> None:
    def said(state: TaskState, **fields: Any) -> str:
        (sentence,) = task_words(TaskStanding(state=state, **fields))
        return sentence

    assert said(TaskState.NIL) == "Its owner knows no such task that has not ended."
    missing = "c" * 48
    assert said(TaskState.PENDING_ARGS_AVAIL, missing=[missing], missing_count=2) == (
        f"It waits for 2 of its arguments: {missing} (of task {'c' * 40}) and 1 more."
    )
    assert said(TaskState.PENDING_NODE_ASSIGNMENT, before=3, leases=1) == (
        "It is number 4 in its owner's queue, for which there is 1 worker process now."
    )
    assert said(TaskState.SUBMITTED_TO_WORKER, process="w") == "It was sent to process w: it runs."
    assert said(TaskState.SUBMITTED_TO_WORKER, process="w", before=2) == (
        "It was sent to process w: it waits there behind 2 others."
    )
    assert said(TaskState.SUBMITTED_TO_WORKER, actor="a") == "It is a call of actor a."


def test_a_task_is_printed_with_what_the_scheduler_says_of_its_demand() -> None:
    task = TaskStanding(state=TaskState.PENDING_NODE_ASSIGNMENT, name="train", key=0, before=1)
    reasons = Reasons("t", [], [waits(turn())], 1, task)
    assert printed(reasons).splitlines()[:3] == [
        "Task train",
        "  It is number 2 in its owner's queue, for which there are 0 worker processes now.",
        f"3 × train (job 00000001, owner {'p' * 24}): waits 12 s for CPU 2",
    ]
    assert reasons.to_json()["task"]["before"] == 1
    silent = Reasons("t", [], [waits(turn())], 1, silence="it is gone")
    assert printed(silent).startswith("The task's owner cannot be asked (it is gone). This is all that waits of it:")
    assert printed(Reasons("t", [], [], 0, TaskStanding(state=TaskState.NIL))).splitlines() == [
        "Task t",
        "  Its owner knows no such task that has not ended.",
    ]
