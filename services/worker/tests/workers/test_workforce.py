"""What the table of processes promises, and leases joined to processes."""

from __future__ import annotations

import pytest

from shoal_core.protocol.effects import Effect, Send, Start
from shoal_core.protocol.ids import JobId, LeaseId, ProcessId, SlotId
from shoal_core.protocol.records import (
    LeaseAssigned,
    LeaseGranted,
    LeaseRecalled,
    ProcessUnneeded,
    ReportTasks,
    WorkerLost,
)
from shoal_core.protocol.resources import Resources, to_resources
from shoal_core.protocol.scheduling import MOST_LISTED_TASKS, LeaseRequest, RecallLeases
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_worker.actors import ActorTable
from shoal_worker.inputs import KillProcess, KillSoon, ProcessEnded, RouteOutput, StartProcess
from shoal_worker.leases import LeaseTable
from shoal_worker.workers.pressure import LEAVE_SECONDS, Memory, MemoryShort
from shoal_worker.workers.processes import (
    FIRST_BACKOFF_SECONDS,
    IDLE_SECONDS,
    LONGEST_BACKOFF_SECONDS,
    MOST_ENVIRONMENTS,
    MOST_STARTING,
    START_SECONDS,
    ProcessState,
    ProcessTable,
    WorkerProcess,
)
from shoal_worker.workers.workforce import Workforce

NODE = node_id(1)
OWNER, OTHER = process_id(1, node=2), process_id(2, node=2)
JOB, OTHER_JOB = JobId("00000001"), JobId("00000002")
ONE_CPU = to_resources({"CPU": 1})


# ------------------------------------------------------------------------------- processes


def up(table: ProcessTable, now: float = 0.0, job: JobId | None = None, environment: str = "") -> WorkerProcess:
    """Have an idle process, which has served a job if one is named."""
    process = table.start(now)
    assert table.ready(process.process_id, now)
    if job is not None:
        table.lease(process, job, LeaseId(1), now, environment=environment)
        table.release(process, now)
    table.sanity_check()
    return process


def test_ids_of_processes_are_new_and_name_their_node() -> None:
    table = ProcessTable(NODE, 0)
    ids = [table.start(0).process_id for _ in range(3)]
    assert len(set(ids)) == 3
    assert all(len(process) == 24 and process.startswith(NODE) for process in ids)


def test_as_many_start_as_leases_wait_and_as_are_to_be_kept_ready() -> None:
    table = ProcessTable(NODE, prestart=2)
    assert table.to_start(0, 0, 0) == 2
    assert table.to_start(5, 0, 0) == 5
    assert table.to_start(100, 0, 0) == MOST_STARTING
    table.start(0)
    assert table.to_start(1, 0, 0) == 1, "one is on its way to who waits, and one more is kept ready"
    assert table.to_start(3, 0, 0) == 2
    up(table)
    assert table.to_start(0, 0, 0) == 0
    for _ in range(MOST_STARTING):
        table.start(0)
    assert table.to_start(100, 0, 0) == 0


def test_one_starts_for_an_actor_that_is_being_claimed_unless_one_idles() -> None:
    table = ProcessTable(NODE, 0)
    assert table.to_start(0, 3, 0) == 3
    up(table)
    assert table.to_start(0, 3, 0) == 2
    assert table.to_start(1, 3, 0) == 3, "who waits has not found the one that idles fit"


def test_starts_that_fail_make_the_next_ones_wait_longer_and_longer() -> None:
    table = ProcessTable(NODE, 0)
    now, pauses = 0.0, []
    for _ in range(10):
        table.remove(table.start(now).process_id, now)
        pauses.append(table.start_after - now)
        assert table.to_start(1, 0, now) == 0
        now = table.start_after
        assert table.to_start(1, 0, now) == 1
    assert pauses[:3] == pytest.approx([FIRST_BACKOFF_SECONDS, 2 * FIRST_BACKOFF_SECONDS, 4 * FIRST_BACKOFF_SECONDS])
    assert pauses[-1] == pytest.approx(LONGEST_BACKOFF_SECONDS)
    up(table, now)
    table.remove(table.start(now).process_id, now)
    assert table.start_after - now == pytest.approx(FIRST_BACKOFF_SECONDS), "one that came up ends the row"


def test_only_a_process_that_is_starting_becomes_ready_and_only_once() -> None:
    table = ProcessTable(NODE, 0)
    process = up(table)
    assert not table.ready(process.process_id, 1)
    assert not table.ready(process_id(99), 1)
    killed = table.start(0)
    table.kill(killed, "", 0)
    assert not table.ready(killed.process_id, 1)
    assert table.idle_count == 1


def test_a_job_gets_the_process_of_its_own_that_idles_shortest_and_never_one_of_another() -> None:
    table = ProcessTable(NODE, 0)
    up(table, 0, OTHER_JOB)
    assert table.take(JOB) is None
    fresh = up(table)
    assert table.take(JOB) is fresh
    up(table, 1, JOB)
    latest = up(table, 2, JOB)
    up(table)
    assert table.take(JOB) is latest


def test_processes_of_jobs_that_idled_too_long_are_dismissed_beyond_those_kept_ready() -> None:
    table = ProcessTable(NODE, prestart=1)
    fresh = up(table)
    old = [up(table, 0, JOB), up(table, 1, JOB)]
    young = up(table, 2, JOB)
    assert table.dismiss_idle(IDLE_SECONDS - 1) == []
    assert table.dismiss_idle(IDLE_SECONDS + 1) == old
    assert [process.state for process in old] == [ProcessState.LEAVING] * 2
    assert table.dismiss_idle(IDLE_SECONDS + 5) == [young]
    assert table.dismiss_idle(10 * IDLE_SECONDS) == []
    assert fresh.state is ProcessState.IDLE
    assert table.take(JOB) is fresh
    table.sanity_check()


def test_processes_stay_in_their_environment_and_few_are_kept() -> None:
    table = ProcessTable(NODE, prestart=1)
    plain = up(table, 0, JOB)
    named = [up(table, number, JOB, f"environment {number}") for number in range(MOST_ENVIRONMENTS + 2)]
    assert table.take(JOB) is plain
    assert table.take(JOB, environment="environment 3") is named[3]
    assert table.take(JOB, environment="another") is None
    assert table.take(OTHER_JOB, environment="environment 3") is None
    again = up(table, 20, JOB, "environment 0")
    assert table.dismiss_idle(20) == [named[1], named[2]], "those that were used last are kept"
    assert again.state is named[0].state is plain.state is ProcessState.IDLE
    assert table.dismiss_idle(21) == []
    table.sanity_check()


def test_a_process_that_does_not_come_up_is_overdue() -> None:
    table = ProcessTable(NODE, 0)
    process = table.start(0)
    up(table)
    assert table.overdue(START_SECONDS - 1) == []
    assert table.overdue(START_SECONDS) == [process]


def test_a_process_is_killed_once_and_is_gone_when_it_was_reaped() -> None:
    table = ProcessTable(NODE, 0)
    process = up(table)
    assert table.kill(process, "why", 1)
    assert not table.kill(process, "again", 2)
    assert (process.kill_reason, process.since, table.idle_count) == ("why", 1, 0)
    assert table.remove(process.process_id, 3) is process
    assert table.remove(process.process_id, 3) is None
    assert table.start_after == 0.0, "a kill is not a failed start"


# ------------------------------------------------------------------------------- both


class Force(Workforce):
    """Leases and processes of a node of two CPUs and two GPUs."""

    def __init__(self, prestart: int = 0) -> None:
        leases = LeaseTable(to_resources({"CPU": 2, "GPU": 2}), ["4", "5"])
        super().__init__(leases, ProcessTable(NODE, prestart), ActorTable(NODE, Subjects("test")))

    def ask(
        self,
        *slots: int,
        owner: ProcessId = OWNER,
        job: JobId = JOB,
        resources: Resources = ONE_CPU,
        now: float = 0.0,
    ) -> tuple[list[int], list[int], str]:
        request = LeaseRequest(
            scheduler="s",
            owner=owner,
            job_id=job,
            key=7,
            slots=[SlotId(slot) for slot in slots],
            resources=resources,
        )
        granted, refused, reason = self.grant(request, now)
        self.sanity_check()
        return [*granted], [*refused], reason

    def taken(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        self.sanity_check()
        return effects

    def served(
        self, slot: int, owner: ProcessId = OWNER, job: JobId = JOB, resources: Resources = ONE_CPU
    ) -> tuple[LeaseId, ProcessId]:
        """Grant a lease and bring up its process."""
        self.taken()
        assert self.ask(slot, owner=owner, job=job, resources=resources)[0] == [slot]
        for process in list(self.processes):
            self.ready(process.process_id, 0)
        records = [effect.record for effect in self.taken() if isinstance(effect, Send) and effect.peer == owner]
        (granted,) = [record for record in records if isinstance(record, LeaseGranted)]
        return granted.lease, granted.worker


def test_a_lease_is_told_to_both_ends_once_its_process_is_up() -> None:
    force = Force()
    assert force.ask(1, resources=to_resources({"CPU": 1, "GPU": 1})) == ([1], [], "")
    (start,) = force.taken()
    assert isinstance(start, Start)
    assert isinstance(start.command, StartProcess)
    process = start.command.process_id
    force.ready(process, 1)
    resources = to_resources({"CPU": 1, "GPU": 1})
    assert force.taken() == [
        Start(RouteOutput(process, JOB)),
        Send(process, LeaseAssigned(LeaseId(1), OWNER, JOB, resources, ["4"])),
        Send(OWNER, LeaseGranted(LeaseId(1), 7, SlotId(1), process)),
    ]
    force.ready(process, 2)
    assert force.taken() == []


def test_a_repeated_request_repeats_its_answer_and_makes_no_second_lease() -> None:
    force = Force()
    force.ask(1, 2)
    assert force.ask(2, 1) == ([2, 1], [], "")
    granted, refused, reason = force.ask(1, 3)
    assert (granted, refused) == ([1], [3])
    assert "free" in reason
    force.returned(OWNER, LeaseId(1), False, 0)
    assert force.ask(1) == ([1], [], ""), "also when its lease has ended"
    assert len(force.leases) == 1


def test_a_node_that_drains_refuses_what_is_new_and_repeats_what_was_granted() -> None:
    force = Force()
    force.ask(1)
    force.drain()
    assert force.ask(1, 2) == ([1], [2], "the node is leaving")


def test_what_no_node_could_give_is_refused_with_the_reason() -> None:
    force = Force()
    granted, refused, reason = force.ask(1, resources=to_resources({"GPU": 1.5}))
    assert (granted, refused) == ([], [1])
    assert "whole number" in reason
    granted, refused, reason = force.ask(1, resources={"CPU": -10_000})
    assert (granted, refused) == ([], [1])
    assert "negative" in reason
    assert force.leases.free == force.leases.total


def test_an_idle_process_serves_the_next_lease_of_its_job_at_once() -> None:
    force = Force()
    lease, process = force.served(1)
    force.returned(OWNER, lease, False, 1)
    force.ask(2)
    assert [effect.peer for effect in force.taken() if isinstance(effect, Send)] == [process, OWNER]


def test_a_spent_process_serves_no_further_lease_and_is_left_to_end_by_itself() -> None:
    force = Force()
    lease, process = force.served(1)
    force.returned(OWNER, lease, False, 1, spent=True)
    assert force.leases.free == force.leases.total
    force.ask(2)
    assert process not in [effect.peer for effect in force.taken() if isinstance(effect, Send)]
    assert force.processes.get(process) is not None


def test_only_the_owner_returns_a_lease_and_only_once() -> None:
    force = Force()
    lease, process = force.served(1)
    force.returned(OTHER, lease, True, 0)
    assert force.leases.get(lease) is not None
    force.returned(OWNER, lease, False, 0)
    force.served(2)
    force.returned(OWNER, lease, True, 0)
    assert force.taken() == []
    assert len(force.leases) == 1
    assert force.processes.get(process) is not None


def test_a_lease_returned_with_kill_keeps_its_resources_until_the_process_was_reaped() -> None:
    force = Force()
    lease, process = force.served(1)
    force.returned(OWNER, lease, True, 0)
    assert force.taken() == [Send(process, ReportTasks(0, MOST_LISTED_TASKS)), Start(KillSoon(process))]
    assert force.leases.free["CPU"] == 10_000
    assert force.process_ended(ProcessEnded(process, "killed"), 1) is not None
    assert force.taken() == [], "its owner gave it back, and has lost nothing"
    assert force.leases.free == force.leases.total


def test_a_lease_that_waits_for_a_process_can_be_returned() -> None:
    force = Force()
    force.ask(1)
    force.returned(OWNER, LeaseId(1), False, 0)
    assert force.waiting == 0
    assert force.leases.free == force.leases.total


def test_the_owner_hears_of_the_death_of_its_worker_and_how_far_it_had_come() -> None:
    force = Force()
    lease, process = force.served(1)
    force.process_ended(ProcessEnded(process, "it crashed", lease, 12), 0)
    assert force.taken() == [Send(OWNER, WorkerLost(lease, 12, "it crashed"))]
    lease, process = force.served(2)
    force.process_ended(ProcessEnded(process, "it crashed", lease - 1, 12), 0)
    assert force.taken() == [Send(OWNER, WorkerLost(lease, 0, "it crashed"))], "what it began was of another lease"
    assert force.process_ended(ProcessEnded(process, "it crashed", lease, 1), 0) is None


def short(**held: int) -> MemoryShort:
    return MemoryShort(Memory(97, 100), 0.95, {ProcessId(process): size for process, size in held.items()})


def test_before_memory_runs_out_one_process_at_a_time_is_killed_and_its_owner_hears_why() -> None:
    force = Force()
    (lease, process), (_, other) = force.served(1), force.served(2)
    force.relieve(short(**{process: 30, other: 20}), 0)
    assert force.taken() == [Start(KillProcess(process))]
    force.relieve(short(**{process: 30, other: 20}), 1)
    assert force.taken() == [], "the first one has not been reaped"
    force.process_ended(ProcessEnded(process, "killed by signal 9", lease, 12), 2)
    [lost] = [effect.record for effect in force.taken() if isinstance(effect, Send)]
    assert isinstance(lost, WorkerLost)
    assert (lost.lease, lost.begun, lost.out_of_memory) == (lease, 12, True)
    assert "memory ran out" in lost.reason
    force.relieve(short(**{other: 20}), 3)
    assert force.taken() == [Start(KillProcess(other))]


def test_before_memory_runs_out_processes_that_idle_are_asked_to_leave_before_any_is_killed() -> None:
    force = Force()
    (_, busy), (lease, spare) = force.served(1), force.served(2)
    force.returned(OWNER, lease, False, 0)
    held = short(**{busy: 60, spare: 30})
    force.relieve(held, 1)
    assert force.taken() == [Send(spare, ProcessUnneeded())]
    force.relieve(held, 1 + LEAVE_SECONDS - 0.1)
    assert force.taken() == [], "it may be about to leave"
    force.relieve(held, 1 + LEAVE_SECONDS)
    assert force.taken() == [Start(KillProcess(busy))], "its objects are still needed"


def test_a_process_that_idles_and_holds_little_stays() -> None:
    force = Force()
    (_, busy), (lease, spare) = force.served(1), force.served(2)
    force.returned(OWNER, lease, False, 0)
    force.relieve(short(**{busy: 60, spare: 1}), 1)
    assert force.taken() == [Start(KillProcess(busy))]


def test_memory_that_nobody_here_holds_ends_nobody() -> None:
    force = Force()
    _, process = force.served(1)
    up(force.processes)
    force.relieve(short(**{process: 1}), 0)
    assert force.taken() == []


def test_a_process_that_owns_its_own_lease_is_told_nothing_after_its_death() -> None:
    force = Force()
    lease, process = force.served(1)
    force.returned(OWNER, lease, False, 0)
    own, same = force.served(1, owner=process)
    assert same == process
    force.process_ended(ProcessEnded(process, "it crashed", own, 1), 0)
    assert force.taken() == []


def test_those_who_execute_for_a_dead_owner_are_killed_and_nothing_is_told_to_it() -> None:
    force = Force()
    lease, process = force.served(1)
    force.ask(2)
    force.taken()
    force.owner_died(OWNER, 0)
    assert force.taken() == [Send(process, ReportTasks(0, MOST_LISTED_TASKS // 2)), Start(KillSoon(process))]
    assert (len(force.leases), force.waiting) == (1, 0)
    force.process_ended(ProcessEnded(process, "killed", lease, 1), 1)
    assert force.taken() == []
    assert force.leases.owners() == []


def test_the_end_of_a_job_kills_its_processes_idle_ones_too_and_no_others() -> None:
    force = Force()
    lease, idle = force.served(1)
    force.returned(OWNER, lease, False, 0)
    other_lease, other = force.served(1, owner=OTHER, job=OTHER_JOB)
    force.last_word(idle)
    force.job_ended(JOB, 0)
    assert force.taken() == [Send(idle, ReportTasks(0, MOST_LISTED_TASKS // 2)), Start(KillSoon(idle))]
    force.last_word(idle)
    assert force.taken() == [Start(KillProcess(idle))], "it has said what it has run"
    assert force.leases.owners() == [OTHER]
    assert force.leases.get(other_lease) is not None
    assert force.processes.get(other) is not None


def test_a_waiting_lease_gets_the_next_process_when_its_own_does_not_come_up() -> None:
    force = Force()
    force.ask(1)
    (first,) = force.processes
    force.process_ended(ProcessEnded(first.process_id, "it could not start"), 0)
    force.staff(0)
    assert [type(effect.command) for effect in force.taken() if isinstance(effect, Start)] == [StartProcess]
    force.tend(FIRST_BACKOFF_SECONDS)
    (start,) = force.taken()
    assert isinstance(start, Start)
    assert isinstance(start.command, StartProcess)
    force.ready(start.command.process_id, 1)
    assert force.waiting == 0


def test_a_process_that_hangs_at_its_start_is_killed_and_replaced() -> None:
    force = Force()
    force.ask(1)
    (hanging,) = force.processes
    force.taken()
    force.tend(START_SECONDS)
    kill, start = force.taken()
    assert kill == Start(KillProcess(hanging.process_id))
    assert isinstance(start, Start)
    assert isinstance(start.command, StartProcess)


def test_idle_processes_are_let_go_in_order() -> None:
    force = Force()
    lease, process = force.served(1)
    force.returned(OWNER, lease, False, 0)
    force.taken()
    force.tend(IDLE_SECONDS)
    assert force.taken() == [Send(process, ProcessUnneeded())]
    force.ask(2)
    assert not any(isinstance(effect, Send) for effect in force.taken()), "who leaves is not leased"


def test_only_the_worker_of_a_lease_says_that_it_waits() -> None:
    force = Force()
    lease, process = force.served(1)
    force.blocked(process_id(99), lease, True)
    assert force.leases.free["CPU"] == 10_000
    force.blocked(process, lease, True)
    assert force.leases.free["CPU"] == 20_000
    force.blocked(process, lease, False)
    assert force.leases.free["CPU"] == 10_000


def test_a_recall_is_told_to_the_owner() -> None:
    force = Force()
    lease, _ = force.served(1)
    force.recall(RecallLeases(owner=OWNER, resources=ONE_CPU, count=3))
    force.recall(RecallLeases(owner=OWNER, resources=ONE_CPU, count=3))
    assert force.taken() == [Send(OWNER, LeaseRecalled(lease))]


def test_a_node_that_drains_asks_for_all_leases_back_once() -> None:
    force = Force()
    running, _ = force.served(1)
    blocked, process = force.served(2)
    force.blocked(process, blocked, True)
    force.recall(RecallLeases(owner=OWNER, resources=ONE_CPU, count=1))
    assert force.taken() == [Send(OWNER, LeaseRecalled(running))]
    force.drain()
    assert force.taken() == [Send(OWNER, LeaseRecalled(blocked))]
    force.drain()
    assert force.taken() == []


def test_a_lease_that_waits_for_a_process_when_the_node_drains_is_asked_back_when_it_has_one() -> None:
    force = Force()
    force.ask(1)
    force.drain()
    (process,) = force.processes
    force.ready(process.process_id, 1)
    told = [effect.record for effect in force.taken() if isinstance(effect, Send) and effect.peer == OWNER]
    assert [type(record) for record in told] == [LeaseGranted, LeaseRecalled]


# ------------------------------------------------------------------------------- GPUs


def test_a_process_serves_only_leases_of_the_gpus_that_it_has_seen() -> None:
    force = Force()
    gpu, half = to_resources({"GPU": 1}), to_resources({"GPU": 0.5})
    first, process = force.served(1, resources=gpu)
    force.returned(OWNER, first, kill=False, now=1)
    none, other = force.served(2)
    assert other != process, "without GPUs, CUDA must see none"
    again, same = force.served(3, resources=half)
    assert same == process, "the same GPU"
    second, third = force.served(4, resources=gpu)
    assert third not in (process, other), "another GPU"
    for lease in (none, again, second):
        force.returned(OWNER, lease, kill=False, now=2)
    assert force.served(5)[1] == other, "what was shown none is taken where none is wanted"
    assert force.leases.gpus.free == [10_000, 10_000]


def test_the_gpus_of_an_owner_that_died_come_back_when_its_process_is_reaped() -> None:
    force = Force()
    _, process = force.served(1, resources=to_resources({"GPU": 1}))
    force.owner_died(OWNER, 1)
    assert force.leases.gpus.free == [0, 10_000], "a dying process still uses them"
    force.process_ended(ProcessEnded(process, "killed by signal 9"), 2)
    assert force.leases.gpus.free == [10_000, 10_000]


def test_the_gpus_of_a_process_that_was_killed_come_back_when_it_is_reaped() -> None:
    force = Force()
    _, process = force.served(1, resources=to_resources({"GPU": 2}))
    assert force.ask(2, resources=to_resources({"GPU": 0.5}))[0] == []
    force.process_ended(ProcessEnded(process, "killed by signal 9"), 1)
    assert force.leases.gpus.free == [10_000, 10_000]
    assert force.ask(3, resources=to_resources({"GPU": 2}))[0] == [3]
