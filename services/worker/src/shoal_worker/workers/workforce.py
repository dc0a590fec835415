"""Leases joined to worker processes: granting, finding a process for each lease, and ending both in the right order.

The rules that hold here:

- A lease is told to its owner (``LeaseGranted``) and to its process (``LeaseAssigned``) together, once a process that
  is up serves it; resources are reserved from the moment of the grant.
- A process serves one lease at a time and one job in its life, and only leases of the same GPUs, or of none, and of
  the same runtime environment.
- Whoever executes for an owner that is gone is killed; the resources are free when the process has been reaped.
- Before the node's memory runs out, a process is killed (see ``pressure``); its lease's owner is told so.
- A lease ends exactly once: by its owner's return, or with its process.
- An actor's lease is claimed before it waits for a process (see ``actors``), and ends with the incarnation.
"""

from __future__ import annotations

from collections.abc import Iterable

from shoal_core.protocol.effects import Effect, Send, Start
from shoal_core.protocol.ids import ActorId, JobId, LeaseId, ProcessId, SlotId
from shoal_core.protocol.placement import in_words
from shoal_core.protocol.records import (
    ActorAssigned,
    ActorDismissed,
    LeaseAssigned,
    LeaseGranted,
    LeaseRecalled,
    ProcessUnneeded,
    ReportTasks,
    WorkerLost,
)
from shoal_core.protocol.resources import GPU, to_amounts
from shoal_core.protocol.scheduling import MOST_LISTED_TASKS, LeaseRequest, RecallLeases
from shoal_core.protocol.wire import encode
from shoal_worker.actors import ActorTable, Hosted, Phase, Verdict
from shoal_worker.gpus import why_impossible
from shoal_worker.inputs import KillProcess, KillSoon, ProcessEnded, RouteOutput, StartProcess
from shoal_worker.leases import Lease, LeaseTable
from shoal_worker.workers.pressure import LEAVE_SECONDS, MemoryShort, choose, why_killed
from shoal_worker.workers.processes import ProcessState, ProcessTable, WorkerProcess

GROUP_REMOVED = "its placement group was removed"


class Workforce:
    """The leases and processes of one node. What is to be done is left in ``effects``; ``changed`` asks to announce."""

    def __init__(self, leases: LeaseTable, processes: ProcessTable, actors: ActorTable) -> None:
        self.leases = leases
        self.processes = processes
        self.actors = actors
        self.effects: list[Effect] = []
        self.changed = True
        self.draining = False
        self._waiting: dict[LeaseId, Lease] = {}

    @property
    def waiting(self) -> int:
        """How many leases have no process yet."""
        return len(self._waiting)

    # ------------------------------------------------------------------------------- what schedulers ask

    def grant(self, request: LeaseRequest, now: float) -> tuple[list[SlotId], list[SlotId], str]:
        """Grant what can be granted; return the granted slots, the refused ones, and why those.

        While the node drains, only the slots that were granted before are.
        """
        granted: list[SlotId] = []
        refused: list[SlotId] = []
        obstacle = "the node is leaving" * self.draining
        if any(units < 0 for units in request.resources.values()):
            obstacle = f"an amount of {to_amounts(request.resources)} is negative"
        if request.bundle is not None and not self.leases.has_open(request.bundle):
            obstacle = obstacle or f"the node has no {in_words(request.bundle)}"
        reason = obstacle = obstacle or why_impossible(request.resources.get(GPU, 0))
        for slot in request.slots:
            start = request.actor
            if self.leases.knows(request.owner, slot) if start is None else self.actors.knows(start):
                granted.append(slot)
                continue
            lease = None
            if not refused and not obstacle:
                lease = self.leases.grant(
                    request.owner,
                    request.job_id,
                    request.key,
                    slot,
                    request.resources,
                    actor=start is not None,
                    bundle=request.bundle,
                )
            if lease is None:
                refused.append(slot)
                reason = reason or f"only {to_amounts(self.leases.free_in(request.bundle))} is free"
                continue
            lease.environment = request.environment
            granted.append(slot)
            self.changed = True
            if start is None:
                self._waiting[lease.number] = lease
            else:
                self.actors.granted(start, lease.number, now)
        self.staff(now)
        return granted, refused, reason if refused else ""

    def recall(self, request: RecallLeases) -> None:
        """Ask an owner for leases back."""
        for lease in self.leases.recall(request.owner, request.resources, request.count, request.bundle):
            self.effects.append(Send(lease.owner, LeaseRecalled(lease.number)))
            self.changed = True

    def drain(self) -> None:
        """Grant nothing from now on, and ask for all leases back: they end when what runs on them has."""
        self.draining = self.changed = True
        for lease in self.leases:
            self._recall_to_drain(lease)

    def _recall_to_drain(self, lease: Lease) -> None:
        """Ask for a lease back that its owner knows of, also where its task waits for others."""
        if lease.process is not None and not (lease.actor or lease.recalled or lease.over):
            lease.recalled = True
            self.effects.append(Send(lease.owner, LeaseRecalled(lease.number)))

    # ------------------------------------------------------------------------------- what owners and workers say

    def returned(self, owner: ProcessId, number: LeaseId, kill: bool, now: float, *, spent: bool = False) -> None:
        """An owner needs a lease no more; where ``kill``, its process ends with it, where ``spent``, by itself."""
        lease = self.leases.get(number)
        if lease is None or lease.owner != owner or lease.over or lease.actor:
            return
        process = self._process_of(lease)
        if process is None:
            self._end_waiting(lease)
        elif kill:
            self._kill(process, "its owner gave it back to be replaced", now, after_last_word=True)
        else:
            self._end(lease)
            (self.processes.leave if spent else self.processes.release)(process, now)
        self.staff(now)

    def blocked(self, worker: ProcessId, number: LeaseId, blocked: bool) -> None:
        """The task on a lease waits in get or wait, or goes on."""
        lease = self.leases.get(number)
        if lease is None or lease.process != worker or lease.over:
            return
        if self.leases.block(lease) if blocked else self.leases.unblock(lease):
            self.changed = True

    def ready(self, worker: ProcessId, now: float) -> None:
        """A worker process is up."""
        if self.processes.ready(worker, now):
            self.staff(now)

    # ------------------------------------------------------------------------------- ends

    def process_ended(self, ended: ProcessEnded, now: float) -> WorkerProcess | None:
        """A worker process was reaped: tell its lease's owner, and free what it held. None if it was not known."""
        process = self.processes.remove(ended.process_id, now, in_order=ended.in_order)
        if process is None:
            return None
        lease = None if process.lease is None else self.leases.get(process.lease)
        if lease is not None:
            reason = process.kill_reason or ended.reason
            if (hosted := self.actors.find(lease.number)) is not None:
                self.actors.over(hosted, reason, now)
            elif (not lease.over or process.out_of_memory) and lease.owner != process.process_id:
                begun = ended.begun if ended.begun_lease == lease.number else 0
                lost = WorkerLost(lease.number, begun, reason, out_of_memory=process.out_of_memory)
                self.effects.append(Send(lease.owner, lost))
            self._end(lease)
        return process

    def relieve(self, short: MemoryShort, now: float) -> None:
        """Memory runs out: end the process whose end helps most, unless one is ending already."""
        if any(process.out_of_memory for process in self.processes):
            return
        actors: list[ProcessId] = []
        tasks: list[ProcessId] = []
        idle: list[ProcessId] = []
        leaving: list[ProcessId] = []
        for process in self.processes:
            lease = None if process.lease is None else self.leases.get(process.lease)
            if process.state is ProcessState.LEASED and lease is not None:
                (actors if lease.actor else tasks).append(process.process_id)
            elif process.state is ProcessState.IDLE:
                idle.append(process.process_id)
            elif process.state is ProcessState.LEAVING and now < process.since + LEAVE_SECONDS:
                leaving.append(process.process_id)
        if choose(short, leaving) is not None:
            return
        chosen = self.processes.get(choose(short, idle, tasks, actors) or ProcessId(""))
        if chosen is None:
            return
        if chosen.state is ProcessState.IDLE:
            self.processes.leave(chosen, now)
            self.effects.append(Send(chosen.process_id, ProcessUnneeded()))
        else:
            chosen.out_of_memory = True
            self._kill(chosen, why_killed(short, chosen.process_id), now)

    def owner_died(self, owner: ProcessId, now: float) -> None:
        """An owner is gone: its leases go, and the processes that execute for it."""
        for lease in self.leases.of_owner(owner):
            self._abandon(lease, "the owner of its task is gone", now, after_last_word=True)
        self.leases.forget(owner)

    def job_ended(self, job: JobId, now: float) -> None:
        """A job is over: its leases and its processes go."""
        for lease in [lease for lease in self.leases if lease.job == job]:
            self._abandon(lease, "its job has ended", now, after_last_word=True)
        self.leases.forget_job(job)
        for process in self.processes:
            if process.job == job:
                self._kill(process, "its job has ended", now, after_last_word=True)

    def group_removed(self, leases: Iterable[Lease], now: float) -> None:
        """A placement group was removed: the leases out of its bundles go, and their owners are told.

        Those of actors go when the control store has ended the actors.
        """
        for lease in leases:
            if lease.actor or lease.over:
                continue
            if lease.process is not None:
                self.effects.append(Send(lease.owner, WorkerLost(lease.number, 0, GROUP_REMOVED, group_removed=True)))
            self._abandon(lease, GROUP_REMOVED, now)
        self.staff(now)

    # ------------------------------------------------------------------------------- staffing

    def staff(self, now: float) -> None:
        """Give idle processes to waiting leases, oldest first, and start those that are missing, or will be soon."""
        for lease in list(self._waiting.values()):
            if not self.processes.idle_count:
                break
            process = self.processes.take(lease.job, self._gpus_of(lease), lease.environment)
            if process is not None:
                self._assign(lease, process, now)
        for _ in range(self.processes.to_start(len(self._waiting), self.actors.claiming, now)):
            self.effects.append(Start(StartProcess(self.processes.start(now).process_id)))

    def tend(self, now: float) -> None:
        """Dismiss processes that idle for too long, kill those that never came up, start what is missing."""
        for process in self.processes.dismiss_idle(now):
            self.effects.append(Send(process.process_id, ProcessUnneeded()))
        for process in self.processes.overdue(now):
            self._kill(process, "it did not come up in time", now)
        self.staff(now)

    def _assign(self, lease: Lease, process: WorkerProcess, now: float) -> None:
        del self._waiting[lease.number]
        lease.process = process.process_id
        if process.job is None or lease.actor:
            actor = ActorId(lease.owner) if lease.actor else None
            self.effects.append(Start(RouteOutput(process.process_id, lease.job, actor)))
        gpus = self._gpus_of(lease)
        self.processes.lease(process, lease.job, lease.number, now, gpus, lease.environment)
        assigned = LeaseAssigned(
            lease.number, lease.owner, lease.job, lease.resources, list(gpus), environment=lease.environment
        )
        if lease.actor:
            self._assign_actor(lease, process, assigned)
            return
        self.effects.append(Send(process.process_id, assigned))
        self.effects.append(Send(lease.owner, LeaseGranted(lease.number, lease.key, lease.slot, process.process_id)))
        if self.draining:
            self._recall_to_drain(lease)

    def _gpus_of(self, lease: Lease) -> tuple[str, ...]:
        return tuple(self.leases.gpus.names_of(lease.gpus))

    def _process_of(self, lease: Lease) -> WorkerProcess | None:
        return None if lease.process is None else self.processes.get(lease.process)

    def _abandon(self, lease: Lease, reason: str, now: float, *, after_last_word: bool = False) -> None:
        process = self._process_of(lease)
        if (hosted := self.actors.find(lease.number)) is not None:
            self.end_actor(hosted, reason, now, after_last_word=after_last_word)
        elif process is None:
            self._end_waiting(lease)
        else:
            self._kill(process, reason, now, after_last_word=after_last_word)

    def last_word(self, worker: ProcessId) -> None:
        """A process has said what it has run: kill it if it was only to say that."""
        process = self.processes.get(worker)
        if process is not None and process.state is ProcessState.KILLED:
            self.effects.append(Start(KillProcess(worker)))

    def _kill(self, process: WorkerProcess, reason: str, now: float, *, after_last_word: bool = False) -> None:
        """Kill a process; the lease it serves is over for its owner, and ends when the process was reaped.

        ``after_last_word``: it has a moment to tell what it has run.
        """
        lease = None if process.lease is None else self.leases.get(process.lease)
        if lease is not None:
            lease.over = True
            self.changed = True
        if not self.processes.kill(process, reason, now):
            return
        if after_last_word:
            most = max(1, MOST_LISTED_TASKS // len(self.processes))
            self.effects += [Send(process.process_id, ReportTasks(0, most)), Start(KillSoon(process.process_id))]
        else:
            self.effects.append(Start(KillProcess(process.process_id)))

    def _end_waiting(self, lease: Lease) -> None:
        del self._waiting[lease.number]
        self._end(lease)

    def _end(self, lease: Lease) -> None:
        self.leases.end(lease)
        self.changed = True

    # ------------------------------------------------------------------------------- actors

    def judge(self, hosted: Hosted, verdict: Verdict, reason: str, now: float) -> None:
        """Do what was decided about an incarnation of an actor."""
        lease = self.leases.get(hosted.lease)
        if verdict is Verdict.RELEASE:
            self.actors.gone(hosted)
            if lease is not None and hosted.phase is not Phase.OVER:
                self._end(lease)
        elif verdict is Verdict.START:
            assert lease is not None
            assert hosted.record is not None
            self.leases.resize(lease, hosted.record.description.resources)
            self._waiting[lease.number] = lease
            self.changed = True
        elif verdict is Verdict.DISMISS:
            process = self._process(lease)
            if process.state is not ProcessState.KILLED:
                self.effects.append(Send(process.process_id, ActorDismissed(hosted.actor, reason)))
                self.actor_left(hosted, reason, now)
        elif verdict is Verdict.KILL:
            self.end_actor(hosted, reason, now)
        self.staff(now)

    def made_by(self, worker: ProcessId, actor: ActorId, incarnation: int) -> Hosted | None:
        """Return the incarnation that a process is making or has made, if it is this process that does."""
        hosted = self.actors.of_process(actor, incarnation)
        lease = None if hosted is None else self.leases.get(hosted.lease)
        return hosted if lease is not None and lease.process == worker else None

    def end_actor(
        self, hosted: Hosted, reason: str, now: float, *, final: bool = False, after_last_word: bool = False
    ) -> None:
        """End an incarnation at once, however far it is; ``final``: and no other is to follow."""
        hosted.final = hosted.final or final
        lease = self.leases.get(hosted.lease)
        assert lease is not None
        process = self._process_of(lease)
        if process is not None:
            self._kill(process, reason, now, after_last_word=after_last_word)  # reported when it has been reaped
            return
        self.actors.over(hosted, reason, now)
        self._waiting.pop(lease.number, None)
        self._end(lease)

    def actor_left(self, hosted: Hosted, reason: str, now: float, error: bytes = b"") -> None:
        """An incarnation has ended in good order; its process goes when nobody refers to its objects."""
        lease = self.leases.get(hosted.lease)
        process = self._process(lease)
        assert lease is not None
        if lease.over:
            return  # it is being killed: reported when it has been reaped
        self.actors.over(hosted, reason, now, error, final=True)
        self._end(lease)
        self.processes.leave(process, now)
        self.staff(now)

    def _process(self, lease: Lease | None) -> WorkerProcess:
        process = None if lease is None else self._process_of(lease)
        assert process is not None
        return process

    def _assign_actor(self, lease: Lease, process: WorkerProcess, assigned: LeaseAssigned) -> None:
        hosted = self.actors.find(lease.number)
        assert hosted is not None
        assert hosted.record is not None
        self.actors.assigned(hosted)
        if hosted.config is not None:
            assigned.config = encode(hosted.config)
        about = hosted.record.description
        record = ActorAssigned(
            assigned,
            hosted.actor,
            hosted.incarnation,
            about.class_name,
            about.detached,
            encode(hosted.record),
            hosted.spec,
        )
        self.effects.append(Send(process.process_id, record))

    # ------------------------------------------------------------------------------- invariants

    def sanity_check(self) -> None:
        """State the invariants."""
        self.leases.sanity_check()
        self.processes.sanity_check()
        served = {lease.process: lease for lease in self.leases if lease.process is not None}
        claiming = {hosted.lease for hosted in self.actors if hosted.phase is Phase.CLAIMING}
        assert len(served) + self.waiting + len(claiming) == len(self.leases), "a lease waits, or has a process"
        assert {*self._waiting, *claiming} == {lease.number for lease in self.leases if lease.process is None}
        assert not any(lease.over for lease in self._waiting.values())
        for process in self.processes:
            lease = served.pop(process.process_id, None)
            assert process.lease == (None if lease is None else lease.number), "both sides agree who serves whom"
            if lease is not None:
                assert process.job == lease.job
                assert lease.over == (process.state is ProcessState.KILLED), "whose lease is over is being killed"
        assert not served, "every lease that was given a process still has it"
