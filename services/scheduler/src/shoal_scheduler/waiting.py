"""What waits for leases, in the order in which it has its turn: lines of demand, by job and by what they ask of a node.

A *line* holds the demand of one job that asks the same of a node and has the same priority and depth. In it whoever
holds the fewest leases comes first, then who has been asked for the least, then who was served longest ago. So what has
its turn next is found among the heads of lines, however much waits behind them.

Where there is room enough, replicas share the demand. Where there is not, one replica, the *leader*, places all that
comes from then on: what comes free would else go to whoever is quickest, and not to whose turn it is, and be asked for
by all of them at once. Each sees by what waits and what is free which resources are *contended*, and tells the others.

Nodes are looked at once for all lines that ask the same of them. Where very different things are waited for it is done
for some of them at a time, in turn; most of the others can be told without it to fit nowhere (``Cluster.ceiling``).

A job's *head* is the demand of it that has waited longest without a single lease, if that is longer than
``PATIENCE_SECONDS`` and no other head of the job was served within that time. There is one head a job, and it goes
before everything else: so nobody waits for ever, and yet a job cannot get more than its share by having much that
waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

from shoal_core.protocol.ids import ProcessId, SlotId
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import Resources
from shoal_scheduler.candidates import Candidates
from shoal_scheduler.cluster import MOST_SHAPES, Cluster
from shoal_scheduler.demand import HELP_SECONDS, Wanted
from shoal_scheduler.jobs import Job
from shoal_scheduler.ordering import Ordering

PATIENCE_SECONDS = 2.0
"""Demand that got nothing for so long has waited too long."""

CALM_SECONDS = 1.0
"""Where nothing had to wait for so long, there is enough for everybody."""

ATTENDED, LOOKED_AT = 1000, 3000
"""Of many lines so many are attended to at a time, and nodes are looked at for so many different things; each divided
by how many nodes there are.
"""

HEARD_SECONDS = 0.5
"""What another replica has found counts for so much longer, since it says so only every second."""

LATE_SECONDS = 0.01
"""By so much two replicas may hear of the same thing at different times."""

NEVER = (-math.inf, -math.inf)

Urgency = tuple[int, int]


class Stage(IntEnum):
    """Whose demand is, where nothing is contended.

    OURS: this replica's, which is the first to act on it. FRESH: another one's, which has had no time yet. OVERDUE:
    another one's whose owner has repeated it, so that it should have been placed.
    """

    OURS = 0
    FRESH = 1
    OVERDUE = 2


def stage_of(wanted: Wanted) -> Stage:
    """Return whose demand is."""
    if wanted.ours:
        return Stage.OURS
    return Stage.OVERDUE if wanted.is_overdue else Stage.FRESH


@dataclass(eq=False)
class Line:
    """Demand that waits, ``size`` of it. ``turns`` is by whose turn it is (what is left out in a round is missing there
    until its end), ``ages`` by who waits longest of those that have nothing.

    ``untold`` is what this replica would have to tell the owners of, if no node can ever hold it.
    """

    job: Job
    candidates: Candidates
    urgency: Urgency
    stage: Stage = Stage.OURS
    size: int = 0
    turns: Ordering[Wanted] = field(default_factory=Ordering)
    ages: Ordering[Wanted] = field(default_factory=Ordering)
    untold: dict[tuple[ProcessId, int], Wanted] = field(default_factory=dict)
    served_at: float = 0.0
    recalled_at: float = 0.0

    @property
    def is_over_quota(self) -> bool:
        """Whether one more lease would take the job beyond a quota. What is out of a bundle it holds already."""
        if isinstance(self.candidates.strategy, Bundle):
            return False
        return bool(self.job.over_quota(self.candidates.resources))


@dataclass(frozen=True, slots=True)
class Head:
    """The demand of a job that goes before everything else, and since when it does."""

    since: float
    wanted: Wanted
    line: Line

    def order(self) -> tuple[float, float, ProcessId, int]:
        """Return the head's place among others: who has been one for longest comes first."""
        return (self.since, self.wanted.served_at, *self.wanted.name)


def urgency_of(wanted: Wanted) -> Urgency:
    """Return a demand's place among those of its job: by priority, then by depth, since the deeper holds up others."""
    return -wanted.entry.priority, -wanted.entry.depth


class Contention:
    """Of which resources there was not enough for what waited, not long ago, and since when.

    What one replica finds the others hear of, so that the leader takes what the first one leaves to it.
    """

    def __init__(self) -> None:
        self._spans: dict[str, tuple[float, float]] = {}
        self._found_at: dict[str, float] = {}

    def note(self, resources: Resources, free: Resources, now: float) -> None:
        """Note that what waits has no room where so much is free: on the nearest node, or at most on any."""
        for name, units in resources.items():
            if free.get(name, 0) < units:
                self._found_at[name] = now
                self._extend(name, now, now)

    def found(self, now: float) -> list[str]:
        """Return what this replica itself has found to be contended."""
        return [name for name, at in self._found_at.items() if now - at < CALM_SECONDS]

    def heard(self, names: Iterable[str], now: float) -> None:
        """Another replica has found these to be contended."""
        for name in names:
            self._extend(name, now, now + HEARD_SECONDS)

    def _extend(self, name: str, now: float, until: float) -> None:
        since, at = self._spans.get(name, (now, now))
        self._spans[name] = (since if now - at < CALM_SECONDS else now, max(at, until))

    def began_at(self, resources: Resources, now: float) -> float | None:
        """Return since when any of these is contended; None if none of them is."""
        began_at: float | None = None
        for name in resources:
            since, at = self._spans.get(name, NEVER)
            if now - at < CALM_SECONDS and (began_at is None or since < began_at):
                began_at = since
        return began_at

    def over_at(self, now: float) -> float | None:
        """Return when the next of what is contended will have been calm for long enough; None: nothing is contended."""
        return min((at + CALM_SECONDS for _, at in self._spans.values() if now - at < CALM_SECONDS), default=None)


class Waiting:
    """All lines."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.leads = True
        """Whether this replica is the leader."""
        self.contention = Contention()
        self.look_at = math.inf
        """When to look at those of many lines that were not looked at last time."""
        self._lines: dict[tuple[Candidates, Job, Urgency, Stage], Line] = {}
        self._by_job: dict[Job, dict[Line, None]] = {}
        self._by_candidates: dict[Candidates, dict[Line, None]] = {}
        self._line_of: dict[tuple[ProcessId, int], Line] = {}
        self._of: dict[ProcessId, dict[int, Wanted]] = {}
        self._due: dict[Job, float] = {}
        self._under_way: dict[Job, Wanted] = {}

    def __iter__(self) -> Iterator[Line]:
        return iter(self._lines.values())

    def __len__(self) -> int:
        return len(self._lines)

    def candidates(self) -> list[Candidates]:
        """Return the nodes for each thing that is waited for, however many lines wait for it."""
        return list(self._by_candidates)

    def lines_for(self, candidates: Candidates) -> Iterable[Line]:
        """Return the lines that wait for the same, if there are any left."""
        return self._by_candidates.get(candidates, ())

    def jobs(self) -> list[Job]:
        """Return the jobs that have demand that waits."""
        return list(self._by_job)

    def line_of(self, wanted: Wanted) -> Line | None:
        """Return the line in which a demand waits, if it waits to be asked for."""
        return self._line_of.get(wanted.name)

    def before_in_job(self, wanted: Wanted, line: Line) -> int:
        """Return how many demands of its job go before one that stands in a line."""
        more_urgent = sum(len(other.turns) for other in self._by_job[line.job] if other.urgency < line.urgency)
        return more_urgent + line.turns.position(wanted.name)

    @property
    def are_many(self) -> bool:
        """Whether so many different things are waited for that nodes cannot be looked at for all of them each time."""
        return len(self._by_candidates) > MOST_SHAPES

    def was_looked_at(self, candidates: Candidates) -> None:
        """Have candidates come last when some are looked at."""
        self._by_candidates[candidates] = self._by_candidates.pop(candidates)

    def most_at_a_time(self, places: int) -> int:
        """Return how many of many to do something with that takes a look at each node, at so many places in all."""
        return max(1, places // max(1, len(self._cluster.nodes)))

    def to_attend(self) -> list[Line]:
        """Return the lines to attend to now: all, or where they are many some of them, in turn."""
        if len(self._lines) <= MOST_SHAPES:
            return [*self._lines.values()]
        attended = [*islice(self._lines.items(), self.most_at_a_time(ATTENDED))]
        for key, _ in attended:
            self._lines[key] = self._lines.pop(key)
        return [line for _, line in attended]

    def count_jobs(self) -> int:
        """Return how many jobs have demand that waits."""
        return len(self._by_job)

    def recount(self, owner: ProcessId, now: float) -> None:
        """The number of an owner's leases has changed: what it wants gets the place that it has now."""
        for wanted in list(self._of.get(owner, {}).values()):
            self.put(wanted, now)

    def put(self, wanted: Wanted, now: float) -> None:
        """Give a demand the place that it has now; none, if there is nothing of it to be placed."""
        job = self._cluster.jobs.get(wanted.job_id)
        line = self._line_of.get(wanted.name)
        if wanted.served_at > wanted.served_before:
            self._note_service(wanted, job, now)
        if line is not None:
            moved = line.candidates.shape != wanted.shape or line.urgency != urgency_of(wanted)
            moved = moved or line.stage != stage_of(wanted)
            if not wanted.open or moved:
                self._take_out(wanted, line)
                line = None
        if not wanted.open:
            return
        if line is None:
            line = self._line_of[wanted.name] = self._line_for(wanted, job)
            line.size += 1
            self._of.setdefault(wanted.owner, {})[wanted.entry.key] = wanted
        name = wanted.name
        line.turns.put(name, (job.owners.get(wanted.owner, 0), len(wanted.asked), wanted.served_at, *name), wanted)
        has_leases = (wanted.owner, wanted.shape[0]) in job.held
        if wanted.has_leases and not has_leases:
            wanted.idle_since = now
        wanted.has_leases = has_leases
        if wanted.asked or has_leases:
            line.ages.discard(name)
        else:
            line.ages.put(name, (max(wanted.served_at, wanted.idle_since), *name), wanted)
        if wanted.ours and not wanted.noticed:
            line.untold[name] = wanted
        else:
            line.untold.pop(name, None)
        self._due[job] = -math.inf

    def _note_service(self, wanted: Wanted, job: Job, now: float) -> None:
        job.served_at = now
        if wanted.served_at - wanted.served_before >= PATIENCE_SECONDS:
            job.precedence_at = now
        wanted.served_before = wanted.served_at
        line = self._line_of.get(wanted.name)
        if line is not None:
            line.served_at = now

    def _line_for(self, wanted: Wanted, job: Job) -> Line:
        candidates = self._cluster.candidates(wanted.shape, follow=not self.are_many)
        key = (candidates, job, urgency_of(wanted), stage_of(wanted))
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = Line(job, candidates, key[2], key[3], served_at=wanted.served_at)
            self._by_job.setdefault(job, {})[line] = None
            self._by_candidates.setdefault(candidates, {})[line] = None
        return line

    def _take_out(self, wanted: Wanted, line: Line) -> None:
        del self._line_of[wanted.name]
        of_owner = self._of[wanted.owner]
        del of_owner[wanted.entry.key]
        if not of_owner:
            del self._of[wanted.owner]
        line.turns.discard(wanted.name)
        line.ages.discard(wanted.name)
        line.untold.pop(wanted.name, None)
        self._due[line.job] = -math.inf
        line.size -= 1
        if not line.size:
            del self._lines[(line.candidates, line.job, line.urgency, line.stage)]
            del self._by_job[line.job][line]
            if not self._by_job[line.job]:
                del self._by_job[line.job], self._due[line.job]
            del self._by_candidates[line.candidates][line]
            if not self._by_candidates[line.candidates]:
                del self._by_candidates[line.candidates]

    # ------------------------------------------------------------------------------- whose it is

    def stages_to_place(self, candidates: Candidates, now: float) -> tuple[Stage, ...]:
        """Return whose demand this replica should place on these nodes, where there is room."""
        began_at = self.contention.began_at(candidates.resources, now)
        if began_at is None:
            return Stage.OURS, Stage.OVERDUE
        if self.leads:
            return tuple(Stage)
        return (Stage.OURS,) if now - HELP_SECONDS < began_at + LATE_SECONDS else ()

    def may_place(self, line: Line, stages: tuple[Stage, ...]) -> bool:
        """Tell whether this replica should place what is in a line, where ``stages_to_place`` are these."""
        return self.leads if line.job.terms.quotas else line.stage in stages

    def next_slot(self, line: Line, wanted: Wanted, now: float) -> SlotId | None:
        """Return the slot of a demand that this replica may place next.

        What is heard of while it is contended is the leader's; what was there before stays with its first replica,
        until it is overdue.
        """
        if wanted.rests_until > now:
            return None
        began_at = self.contention.began_at(line.candidates.resources, now)
        if line.stage is Stage.OURS:
            if self.leads or began_at is None:
                return next(iter(wanted.open), None)
            return wanted.old_slot(now - HELP_SECONDS, began_at + LATE_SECONDS)
        return wanted.next_slot(math.inf if began_at is None else began_at - LATE_SECONDS)

    # ------------------------------------------------------------------------------- heads

    def heads(self, now: float) -> list[Head]:
        """Return the heads of all jobs that have one, longest-waiting first; they are the leader's to place."""
        found: list[Head] = []
        for job, due in self._due.items():
            if due > now:
                continue
            under_way = self._under_way.get(job)
            if under_way is not None:
                if under_way.asked:
                    continue
                del self._under_way[job]
            head = self.head_of(job)
            if head is None or head.since > now:
                self._due[job] = head.since if head is not None else -math.inf
            else:
                found.append(head)
        return sorted(found, key=Head.order)

    def head_of(self, job: Job) -> Head | None:
        """Return the demand of a job that is its head, or will be if it goes on waiting."""
        heads = [
            Head(max(line.ages.keys[0][0], job.precedence_at) + PATIENCE_SECONDS, line.ages.first, line)
            for line in self._by_job[job]
            if line.ages and len(line.candidates) and line.stage is not Stage.FRESH and not line.is_over_quota
        ]
        return min(heads, key=Head.order, default=None)

    def begun(self, head: Head) -> None:
        """A node is asked for a head: until it has answered, its job has no other."""
        self._under_way[head.line.job] = head.wanted
