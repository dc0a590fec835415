"""Why something waits, from what the scheduler itself decides by, in words and as data.

What is asked about is the name of a function or of an actor's class, the name of an actor, or the id of a task, of an
actor, of a placement group, of a job or of a process.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from shoal.status import Target
from shoal_core.bus import Bus, connect
from shoal_core.bus.requests import ask
from shoal_core.protocol.actors import ActorList, ActorState, ActorSummary, ListActors
from shoal_core.protocol.errors import BusError, NotFoundError, ServiceError
from shoal_core.protocol.ids import NO_NODE, ProcessId, node_of
from shoal_core.protocol.resources import to_amounts
from shoal_core.protocol.scheduling import (
    ExplainTask,
    GetPending,
    JobStanding,
    PendingDemand,
    PendingList,
    PendingTurn,
    TaskStanding,
    TaskState,
)
from shoal_core.protocol.subjects import Subjects

PROCESS_CHARS = 24
TASK_CHARS = 40


@dataclass(frozen=True)
class Reasons:
    """What is known of a thing: the actors that it may be, and the demand that waits.

    ``count`` is how much waits; the longest-waiting part of it is in ``pending``. Of a task, ``task`` is what its owner
    says of it: None where the owner could not be asked, for the reason in ``silence``.
    """

    about: str
    actors: list[ActorSummary]
    pending: list[PendingDemand]
    count: int
    task: TaskStanding | None = None
    silence: str = ""

    @property
    def are_known(self) -> bool:
        """Whether there is anything to say."""
        return bool(self.actors or self.pending or self.task or self.silence)

    def to_json(self) -> dict[str, Any]:
        """Return them as ``shoal why --format json`` shows them; amounts are those that users give."""
        return {
            "about": self.about,
            "actors": [actor.model_dump(mode="json") for actor in self.actors],
            "count": self.count,
            "pending": [_to_json(item) | {"text": list(words(item))} for item in self.pending],
            "task": None if self.task is None else _task_to_json(self.task),
        }


def _task_to_json(task: TaskStanding) -> dict[str, Any]:
    return task.model_dump(mode="json") | {"text": list(task_words(task))}


def _to_json(item: PendingDemand) -> dict[str, Any]:
    row = item.model_dump(mode="json") | {"resources": to_amounts(item.resources)}
    if item.turn is not None:
        nearest = [{"node_id": near.node_id, "lacking": to_amounts(near.lacking)} for near in item.turn.nearest]
        row["turn"] = row["turn"] | {"nearest": nearest}
    return row


async def read_reasons(target: Target, about: str, timeout_seconds: float = 5.0) -> Reasons:
    """Connect to a cluster and ask it why something waits; raises as ``read_status`` does."""
    async with connect(
        target.address,
        role=target.role,
        identity=f"why-{secrets.token_hex(4)}",
        cluster=target.cluster,
        credentials=target.credentials,
        tls=target.tls,
        timeout_seconds=timeout_seconds,
    ) as bus:
        return await ask_why(bus, Subjects(target.cluster), about, timeout_seconds)


async def ask_why(bus: Bus, subjects: Subjects, about: str, timeout_seconds: float) -> Reasons:
    """Ask a scheduler why something waits, and the control store whether it is an actor that does not."""
    if len(about) == TASK_CHARS and _is_hex(about):
        return await _ask_about_task(bus, subjects, about, timeout_seconds)
    listed = await ask(bus, subjects.gcs("list_actors"), ListActors(), timeout_seconds)
    assert isinstance(listed, ActorList)
    actors = [actor for actor in listed.actors if about in (actor.actor_id, actor.name)]
    pending: list[PendingDemand] = []
    count = 0
    names: list[str] = [actor.actor_id for actor in actors]
    for name in names or [about]:
        answer = await _ask_pending(bus, subjects, name, timeout_seconds)
        pending += answer.pending
        count += answer.count
    return Reasons(about, actors, pending, count)


async def _ask_about_task(bus: Bus, subjects: Subjects, task_id: str, timeout_seconds: float) -> Reasons:
    """Ask a task's owner how far it is, and then whoever knows more of what it waits for.

    Where the owner cannot be asked, all that it waits for is shown: a scheduler knows what owners want, not for what.
    """
    owner, number = ProcessId(task_id[:PROCESS_CHARS]), int(task_id[PROCESS_CHARS:], 16)
    request = ExplainTask(owner=owner, task=number, timeout_seconds=min(timeout_seconds, 60) / 2)
    try:
        if node_of(owner) == NO_NODE:
            raise NotFoundError("its owner is a driver without a node")
        task = await ask(bus, subjects.node(node_of(owner), "task"), request, timeout_seconds)
    except (BusError, ServiceError, NotFoundError) as error:
        answer = await _ask_pending(bus, subjects, owner, timeout_seconds)
        return Reasons(task_id, [], answer.pending, answer.count, silence=str(error))
    assert isinstance(task, TaskStanding)
    if task.actor and task.state is not TaskState.PENDING_ARGS_AVAIL:
        called = await ask_why(bus, subjects, task.actor, timeout_seconds)
        return Reasons(task_id, called.actors, called.pending, called.count, task)
    pending: list[PendingDemand] = []
    if task.state is TaskState.PENDING_NODE_ASSIGNMENT:
        answer = await _ask_pending(bus, subjects, owner, timeout_seconds)
        pending = [item for item in answer.pending if item.key == task.key and item.owner == owner]
    return Reasons(task_id, [], pending, len(pending), task)


async def _ask_pending(bus: Bus, subjects: Subjects, about: str, timeout_seconds: float) -> PendingList:
    answer = await ask(bus, subjects.scheduler("pending"), GetPending(about=about), timeout_seconds)
    assert isinstance(answer, PendingList)
    return answer


def _is_hex(text: str) -> bool:
    return all(char in "0123456789abcdef" for char in text)


# ------------------------------------------------------------------------------- in words


def about_actor(actor: ActorSummary) -> str:
    """Return what has become of an actor."""
    name = f"Actor {actor.name or actor.class_name} ({actor.actor_id})"
    if actor.state is ActorState.DEAD:
        return f"{name} is dead: {actor.death_reason}."
    where = f" on node {actor.node_id}" if actor.node_id else ""
    return f"{name} is {actor.state.value}{where}."


def task_words(task: TaskStanding) -> Iterator[str]:
    """Yield how far a task is, by its owner's word."""
    match task.state:
        case TaskState.NIL:
            yield "Its owner knows no such task that has not ended."
        case TaskState.PENDING_ARGS_AVAIL:
            named = ", ".join(f"{missing} (of task {missing[:TASK_CHARS]})" for missing in task.missing)
            more = f" and {task.missing_count - len(task.missing)} more" * (task.missing_count > len(task.missing))
            yield f"It waits for {task.missing_count} of its arguments: {named}{more}."
        case TaskState.PENDING_NODE_ASSIGNMENT:
            leases = "is 1 worker process" if task.leases == 1 else f"are {task.leases} worker processes"
            yield f"It is number {task.before + 1} in its owner's queue, for which there {leases} now."
        case TaskState.SUBMITTED_TO_WORKER if task.actor:
            yield f"It is a call of actor {task.actor}."
        case TaskState.SUBMITTED_TO_WORKER:
            behind = f"it waits there behind {task.before} other{'s' * (task.before > 1)}" if task.before else "it runs"
            yield f"It was sent to process {task.process}: {behind}."


def words(item: PendingDemand) -> Iterator[str]:
    """Yield why something waits, sentence by sentence."""
    yield f"{item.why[:1].upper()}{item.why[1:]}."
    turn = item.turn
    if turn is None:
        return
    for near in turn.nearest:
        lacking = ", ".join(f"{name} {amount:g}" for name, amount in to_amounts(near.lacking).items())
        yield f"Node {near.node_id} lacks {lacking}."
    if turn.over_quota:
        yield f"Job {item.job_id} holds as much {' and '.join(turn.over_quota)} as its quota allows."
    elif turn.goes_first_seconds is not None:
        kept = f"; room is kept for it on node {turn.kept_on}" if turn.kept_on else ""
        yield f"It has waited too long, and has gone before everything else for {turn.goes_first_seconds:.0f} s{kept}."
    else:
        yield from _order(turn)


def _order(turn: PendingTurn) -> Iterator[str]:
    """Yield behind whom it is."""
    if turn.job_count:
        named = ", ".join(_standing(job, turn.job) for job in turn.jobs_before)
        more = f" and {turn.job_count - len(turn.jobs_before)} more" if turn.job_count > len(turn.jobs_before) else ""
        yield (
            f"Its job {turn.job.job_id} (priority {turn.job.priority}, {_share(turn.job)}) goes after "
            f"{turn.job_count} other{'s' * (turn.job_count > 1)}: {named}{more}."
        )
    if turn.before_in_job:
        yield f"In its job {turn.before_in_job} go before it: of a higher priority, deeper, or of who holds less."
    if not turn.job_count and not turn.before_in_job:
        yield "It is next: nothing that waits goes before it."


def _standing(job: JobStanding, own: JobStanding) -> str:
    why = f"priority {job.priority}" if job.priority != own.priority else _share(job)
    return f"{job.job_id} ({why})"


def _share(job: JobStanding) -> str:
    weight = f" for its weight of {job.weight:g}" if job.weight != 1 else ""
    return f"holds {job.share:.1%}{weight}"
