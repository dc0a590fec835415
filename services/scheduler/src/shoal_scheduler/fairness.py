"""Whose turn it is: jobs share the cluster, and within a job its owners share.

Slots are placed one by one. The next one belongs, in this order, to

1. the head of a job (``waiting``): what has waited too long goes first, one demand a job;
2. the job of the highest priority;
3. the job with the smallest share (``jobs``): fair shares come about by themselves, whoever came first;
4. within the job, the demand of the highest priority, then the deepest;
5. the owner that holds the fewest leases; whoever was served longest ago; and then by id.

What would take its job beyond a quota has no turn.

A head that fits nowhere also keeps room: as much of the nearest node as it needs counts as used for all that come
after it, deeper demand excepted (perhaps it is what those who hold the node wait for), and as held by its job.
Otherwise small demand would take all that comes free, and large demand would wait for ever. Room is kept for
``KEEP_SECONDS``, then for as long not, since what is in the way may last for ever itself; then for twice that time, and
so on: so that once room is kept for as long as leases last, however long that is.

Placement groups go before all of this (``groups``), but not before heads that wait since before the oldest of them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal_core.protocol.ids import ProcessId, SlotId
from shoal_core.protocol.resources import fits
from shoal_scheduler.candidates import Candidates
from shoal_scheduler.cluster import Cluster
from shoal_scheduler.demand import Wanted
from shoal_scheduler.jobs import Job
from shoal_scheduler.policy import NodeView, PlaceId
from shoal_scheduler.waiting import LOOKED_AT, Head, Line, Waiting

KEEP_SECONDS = 30.0
LOOK_SECONDS = 0.01

PLACED = 0
"""In place of the number of an ask: a slot for which one is about to be made."""

Rank = tuple[int, float, float, str]


@dataclass(slots=True)
class Placement:
    """Slots of one demand that one node is to be asked for; they count as used and held already."""

    node: NodeView
    wanted: Wanted
    slots: list[SlotId] = field(default_factory=list)


def keeps_room(waited: float) -> bool:
    """Tell whether a head keeps room that has been one for so long."""
    if waited < 0:
        return False
    doubled = 1 << int(math.log2(waited / (2 * KEEP_SECONDS) + 1))
    return waited - 2 * KEEP_SECONDS * (doubled - 1) < KEEP_SECONDS * doubled


def rank(job: Job, cluster: Cluster) -> Rank:
    """Return a job's place in the order of turns; it only rises while a round goes on."""
    return (-job.terms.priority, job.share(cluster.total), job.served_at, job.job_id)


def plan(cluster: Cluster, waiting: Waiting, now: float) -> list[Placement]:
    """Return which slots to ask which nodes for: all that fits.

    Where very different things wait (``Waiting.are_many``), nodes are looked at for some of them, in turn, and for the
    others next time: ``Waiting.look_at`` says when that is to be.
    """
    ceiling = cluster.ceiling() if waiting.are_many else None
    fitting: list[Candidates] = []
    left = math.inf if ceiling is None else waiting.most_at_a_time(LOOKED_AT)
    waiting.look_at = math.inf
    for candidates in waiting.candidates():
        if ceiling is not None and not fits(candidates.resources, ceiling):
            if len(candidates):
                waiting.contention.note(candidates.resources, ceiling, now)
            continue
        if not left:
            waiting.look_at = now + LOOK_SECONDS
            break
        left -= 1
        cluster.follow(candidates)
        if candidates.have_room:
            fitting.append(candidates)
        elif (node := candidates.nearest()) is not None:
            waiting.contention.note(candidates.resources, node.free, now)
        if ceiling is not None:
            waiting.was_looked_at(candidates)
    if not fitting:
        return []
    return _Round(cluster, waiting, now, waiting.candidates() if ceiling is None else fitting).run()


def place_heads(
    cluster: Cluster, waiting: Waiting, before: float, now: float
) -> tuple[list[Placement], list[tuple[Wanted, NodeView]]]:
    """Return which slots of heads to ask for that wait since ``before`` this, and for which of them room is kept where.

    Whoever asks frees that room again (``free_room``).
    """
    heads = [head for head in waiting.heads(now) if head.wanted.served_at < before]
    for head in heads:
        cluster.follow(head.line.candidates)
    placing = _Round(cluster, waiting, now, [])
    for head in heads:
        placing.place_head(head)
    return list(placing.placements.values()), placing.kept


def free_room(cluster: Cluster, kept: list[tuple[Wanted, NodeView]]) -> None:
    """Count the room that was kept as free again."""
    for wanted, node in kept:
        node.take(wanted.entry.resources, -1)
        cluster.jobs.count(wanted.job_id, wanted.owner, wanted.entry.resources, -1)


class _Round:
    """One round of placing what waits for some candidates; what it keeps room for counts as free again at its end."""

    def __init__(self, cluster: Cluster, waiting: Waiting, now: float, candidates: list[Candidates]) -> None:
        self._cluster = cluster
        self._waiting = waiting
        self._candidates = candidates
        self._now = now
        self.placements: dict[tuple[PlaceId, ProcessId, int], Placement] = {}
        self.kept: list[tuple[Wanted, NodeView]] = []
        self._kept_depth = math.inf
        """The depth of the least deep demand for which room is kept."""
        self._skipped: list[Wanted] = []

    def run(self) -> list[Placement]:
        """Place until nothing more fits."""
        for head in self._waiting.heads(self._now) if self._waiting.leads else ():
            self.place_head(head)
            if not any(True for candidates in self._candidates for _ in self._fitting(candidates)):
                break
        self._take_turns()
        free_room(self._cluster, self.kept)
        for wanted in self._skipped:
            self._waiting.put(wanted, self._now)
        return list(self.placements.values())

    def place_head(self, head: Head) -> None:
        """Place one slot of a head; if it fits nowhere, or is for the leader to place, keep room for it."""
        wanted, line = head.wanted, head.line
        if self._waiting.leads and self._place(wanted, line):
            self._waiting.begun(head)
            return
        node = None if self._waiting.leads else self._choose(wanted, line)
        if node is None and keeps_room(self._now - head.since):
            node = line.candidates.nearest()
        if node is not None:
            node.take(wanted.entry.resources)
            self._cluster.jobs.count(wanted.job_id, wanted.owner, wanted.entry.resources, 1)
            self.kept.append((wanted, node))
            self._kept_depth = min(self._kept_depth, wanted.entry.depth)

    def _take_turns(self) -> None:
        lines: dict[Job, list[Line]] = {}
        waiting = self._waiting
        for candidates in self._candidates:
            stages = waiting.stages_to_place(candidates, self._now)
            if not (stages or waiting.leads):
                continue
            for line in self._fitting(candidates):
                if line.turns and waiting.may_place(line, stages):
                    lines.setdefault(line.job, []).append(line)
        turns = [(rank(job, self._cluster), job) for job in lines]
        heapq.heapify(turns)
        while turns:
            before, job = turns[0]
            now = rank(job, self._cluster)
            if now == before and not self._take_turn(lines[job]):
                heapq.heappop(turns)
                continue
            heapq.heapreplace(turns, (rank(job, self._cluster), job))

    def _take_turn(self, lines: list[Line]) -> bool:
        """Place one slot of a job, if any of its lines has one that fits; those that have not are left out."""
        while lines:
            line = min(lines, key=lambda line: (line.urgency, line.turns.keys[0]))
            if not self._may_fit(line):
                lines.remove(line)
                continue
            wanted = line.turns.first
            allowed = not line.is_over_quota
            placed = allowed and self._place(wanted, line)
            if not line.turns or not (placed or (allowed and self._skip(wanted, line))):
                lines.remove(line)
            if placed:
                return True
        return False

    def _skip(self, wanted: Wanted, line: Line) -> bool:
        """Leave out a demand that cannot be placed though others of its line may be; tell whether there are others."""
        left_alone = wanted.rests_until > self._now or any(until > self._now for until in wanted.avoid.values())
        if not left_alone and self._waiting.next_slot(line, wanted, self._now) is not None:
            return False
        line.turns.discard(wanted.name)
        self._skipped.append(wanted)
        return bool(line.turns)

    def _place(self, wanted: Wanted, line: Line) -> bool:
        """Place one slot, if it fits."""
        slot = self._waiting.next_slot(line, wanted, self._now)
        if slot is None:
            return False
        node = self._choose(wanted, line)
        if node is None:
            return False
        resources = wanted.entry.resources
        node.take(resources)
        del wanted.open[slot]
        wanted.asked[slot] = PLACED
        place = (node.place, *wanted.name)
        self.placements.setdefault(place, Placement(node, wanted)).slots.append(slot)
        self._cluster.jobs.count(wanted.job_id, wanted.owner, resources, 1)
        self._waiting.recount(wanted.owner, self._now)
        return True

    def _choose(self, wanted: Wanted, line: Line) -> NodeView | None:
        """Return a node for one slot; deeper demand may also have what is kept for less deep."""
        entry = wanted.entry
        passed = [(other, node) for other, node in self.kept if other.entry.depth < entry.depth]
        for other, node in passed:
            node.take(other.entry.resources, -1)
        self._cluster.follow(line.candidates)
        chosen = line.candidates.choose(self._now, near=entry.near, avoid=wanted.avoid)
        for other, node in passed:
            node.take(other.entry.resources)
        return chosen

    def _fitting(self, candidates: Candidates) -> Iterable[Line]:
        """Return the lines for which there may be room on some of these nodes."""
        self._cluster.follow(candidates)
        lines = self._waiting.lines_for(candidates)
        return lines if candidates.have_room else filter(self._may_pass, lines)

    def _may_fit(self, line: Line) -> bool:
        """Tell whether there may be room for a line: what is free, or what is kept and may be passed."""
        self._cluster.follow(line.candidates)
        return line.candidates.have_room or self._may_pass(line)

    def _may_pass(self, line: Line) -> bool:
        return self._kept_depth < -line.urgency[1]
