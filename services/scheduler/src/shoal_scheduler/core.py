"""The scheduler: it plans, nodes decide.

Any number of replicas hear all demand and all announcements. For each demand a rendezvous hash over the living replicas
says who acts first; the others act on what is still unmet a second later. A plan is optimistic: what was asked of a node
counts as used until it answers or announces. A node that refuses costs one round trip and nothing else, so replicas
need not agree.

When demand waits that would fit if a lease came back, its owner's competitors are asked for leases, beginning with who
holds most beyond an equal share: so that an owner with endless work shares with one that has just begun.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.effects import Answered, Ask, Connected, Effect, Event, Publish, Reply, Request, WakeAt
from shoal_core.protocol.ids import NodeId, ProcessId, ServiceId, SlotId, node_of
from shoal_core.protocol.messages import (
    Demand,
    DemandNotice,
    GetPending,
    GetResources,
    JobFinished,
    LeaseAnswer,
    LeaseRequest,
    NodeAnnouncement,
    NodeDied,
    PendingDemand,
    PendingList,
    ProcessDied,
    RecallLeases,
    ResourceView,
    SchedulerPresence,
)
from shoal_core.protocol.resources import Resources, add, fits
from shoal_core.protocol.subjects import Role, Subjects
from shoal_scheduler.demand import DemandTable, Wanted
from shoal_scheduler.policy import NodeView, choose, explain, is_feasible

PRESENCE_SECONDS = 1.0
SILENT_SECONDS = 3.0
HELP_SECONDS = 1.0
ASK_AGAIN_SECONDS = 2.0
AVOID_SECONDS = 0.5
RECALL_SECONDS = 0.02
NOTICE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """What a ``LeaseRequest`` under way was about."""

    node: NodeId
    owner: ProcessId
    key: int
    slots: tuple[SlotId, ...]


@dataclass(frozen=True, slots=True)
class RecallAsk:
    """A ``RecallLeases`` under way; nothing depends on its answer."""

    node: NodeId


class Begin:
    """The first input."""


class Scheduler:
    """The core of one replica."""

    def __init__(self, subjects: Subjects, identity: ServiceId) -> None:
        self.nodes: dict[NodeId, NodeView] = {}
        self.demand = DemandTable()
        self.decisions = 0
        self.refusals = 0
        self._subjects = subjects
        self._identity = identity
        self._replicas: dict[str, float] = {identity: math.inf}
        self._presence_at = 0.0

    # ------------------------------------------------------------------------------- inputs

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input and return what is to be done."""
        match message:
            case Event(Demand() as demand):
                self.demand.update(demand, now)
            case Event(NodeAnnouncement() as announcement):
                self._announced(announcement, now)
            case Event(SchedulerPresence(scheduler=scheduler)):
                if scheduler != self._identity:
                    self._replicas[scheduler] = now
                return []
            case Event(NodeDied(node_id=node)):
                self.nodes.pop(node, None)
                for owner in self.demand.owners():
                    if node_of(owner) == node:
                        self.demand.drop_owner(owner)
            case Event(ProcessDied(process_id=process)):
                self.demand.drop_owner(process)
            case Event(JobFinished(job_id=job)):
                for owner in {wanted.owner for wanted in self.demand if wanted.job_id == job}:
                    self.demand.drop_owner(owner)
            case Answered(LeaseAsk() as ask, answer):
                self._answered(ask, answer, now)
            case Request(GetPending(), token):
                return [Reply(token, PendingList(pending=self._pending(now)))]
            case Request(GetResources(), token):
                return [Reply(token, self._resources())]
            case Begin() | Connected():
                return self.tick(now)
            case _:
                return []
        return self._plan(now)

    def tick(self, now: float) -> list[Effect]:
        """Say that this replica lives, forget what is silent, ask again where an answer is overdue."""
        effects: list[Effect] = []
        if now >= self._presence_at:
            self._presence_at = now + PRESENCE_SECONDS
            subject = self._subjects.event(Role.SCHEDULER, self._identity, "presence")
            effects.append(Publish(subject, SchedulerPresence(scheduler=self._identity)))
            self._replicas = {r: at for r, at in self._replicas.items() if now - at < SILENT_SECONDS}
            self.nodes = {n: view for n, view in self.nodes.items() if now - view.heard_at < SILENT_SECONDS}
            self.demand.forget_silent(now)
        for wanted in self.demand:
            for slot, asked_at in list(wanted.asked.items()):
                if now - asked_at >= ASK_AGAIN_SECONDS:
                    del wanted.asked[slot]
                    wanted.open[slot] = asked_at
        return [*effects, *self._plan(now)]

    def _announced(self, announcement: NodeAnnouncement, now: float) -> None:
        node = self.nodes.get(announcement.node_id)
        if node is None:
            node = NodeView(announcement.node_id, announcement.total, {})
            self.nodes[announcement.node_id] = node
        elif announcement.sequence <= node.sequence:
            return
        node.total = announcement.total
        node.free = dict(announcement.free)
        node.labels = announcement.labels
        node.draining = announcement.draining
        node.leases = announcement.leases
        node.sequence = announcement.sequence
        node.heard_at = now

    def _answered(self, ask: LeaseAsk, answer: Any, now: float) -> None:
        node = self.nodes.get(ask.node)
        wanted = self.demand.find(ask.owner, ask.key)
        refused: list[SlotId] = list(ask.slots)
        if isinstance(answer, LeaseAnswer):
            refused = answer.refused
            self.refusals += len(refused)
            if node is not None and answer.sequence >= node.sequence:
                node.free = dict(answer.free)
            if wanted is not None:
                self.demand.met(wanted, answer.granted)
        elif node is not None:
            node.avoid_until = now + AVOID_SECONDS
        if wanted is not None:
            for slot in refused:
                if slot in wanted.asked:
                    del wanted.asked[slot]
                    wanted.open[slot] = now

    # ------------------------------------------------------------------------------- decisions

    def _plan(self, now: float) -> list[Effect]:
        """Ask nodes for all that fits, one slot for each in turn; see to what does not."""
        asks: dict[tuple[NodeId, ProcessId, int], tuple[Wanted, list[SlotId]]] = {}
        waiting = sorted(
            (wanted for wanted in self.demand if wanted.open and self._is_ours(wanted, now)),
            key=lambda wanted: (-wanted.entry.depth, wanted.since, wanted.owner, wanted.entry.key),
        )
        unmet: list[Wanted] = []
        depths = sorted({wanted.entry.depth for wanted in waiting}, reverse=True)
        for depth in depths:
            turn = [wanted for wanted in waiting if wanted.entry.depth == depth]
            while turn:
                turn = [wanted for wanted in turn if self._place(wanted, asks, unmet, now)]
        effects: list[Effect] = [self._ask(node, wanted, slots) for (node, _, _), (wanted, slots) in asks.items()]
        for wanted in unmet:
            effects += self._see_to(wanted, now)
        effects.append(WakeAt(min(self._presence_at, now + RECALL_SECONDS) if unmet else self._presence_at))
        return effects

    def _is_ours(self, wanted: Wanted, now: float) -> bool:
        """Tell whether this replica should act: it is first by the hash, or the first has not helped for a while."""
        if len(self._replicas) == 1:
            return True
        name = f"{wanted.owner}/{wanted.entry.key}/"
        first = max(self._replicas, key=lambda replica: (zlib.crc32((name + replica).encode()), replica))
        return first == self._identity or now - min(wanted.open.values()) >= HELP_SECONDS

    def _place(
        self,
        wanted: Wanted,
        asks: dict[tuple[NodeId, ProcessId, int], tuple[Wanted, list[SlotId]]],
        unmet: list[Wanted],
        now: float,
    ) -> bool:
        """Plan one slot; return whether to go on with this demand."""
        node = choose(wanted.entry.resources, wanted.entry.strategy, self.nodes.values(), now)
        if node is None:
            unmet.append(wanted)
            return False
        slot = next(iter(wanted.open))
        del wanted.open[slot]
        wanted.asked[slot] = now
        node.take(wanted.entry.resources)
        asks.setdefault((node.node_id, wanted.owner, wanted.entry.key), (wanted, []))[1].append(slot)
        self.decisions += 1
        return bool(wanted.open)

    def _ask(self, node: NodeId, wanted: Wanted, slots: list[SlotId]) -> Effect:
        request = LeaseRequest(
            scheduler=self._identity,
            owner=wanted.owner,
            job_id=wanted.job_id,
            key=wanted.entry.key,
            slots=slots,
            resources=wanted.entry.resources,
        )
        context = LeaseAsk(node, wanted.owner, wanted.entry.key, tuple(slots))
        return Ask(self._subjects.node_from_scheduler(node, "lease"), request, context, ASK_AGAIN_SECONDS)

    def _see_to(self, wanted: Wanted, now: float) -> list[Effect]:
        """Do what can be done for demand that fits nowhere now: say so if it never will, else ask for leases back."""
        if not is_feasible(wanted.entry.resources, self.nodes.values()):
            return self._notice(wanted, now)
        if now - wanted.since < RECALL_SECONDS or now - wanted.recalled_at < RECALL_SECONDS:
            return []
        victim = self._victim(wanted)
        if victim is None:
            return []
        wanted.recalled_at = now
        node, owner, resources = victim
        request = RecallLeases(owner=owner, resources=resources, count=1)
        return [Ask(self._subjects.node_from_scheduler(node, "recall"), request, RecallAsk(node))]

    def _victim(self, wanted: Wanted) -> tuple[NodeId, ProcessId, Resources] | None:
        """Return whom to ask for a lease: of those with more than an equal share, the one that holds most."""
        held: dict[ProcessId, int] = {}
        for node in self.nodes.values():
            for lease in node.leases:
                held[lease.owner] = held.get(lease.owner, 0) + lease.count - lease.blocked
        rivals = {owner for owner, count in held.items() if count > 0} | set(self.demand.owners())
        share = max(1.0, sum(held.values()) / max(1, len(rivals)))
        own = held.get(wanted.owner, 0)
        candidates = []
        for node in self.nodes.values():
            for lease in node.leases:
                left = lease.count - lease.blocked - lease.recalled
                if lease.owner == wanted.owner or left <= 0 or own + 1 > share:
                    continue
                beyond = held[lease.owner] > share or own == 0
                if beyond and fits(wanted.entry.resources, add(node.free, lease.resources)):
                    candidates.append((held[lease.owner], lease.owner, node.node_id, lease.resources))
        if not candidates:
            return None
        _, owner, node_id, resources = max(candidates, key=lambda candidate: candidate[:3])
        return node_id, owner, resources

    def _notice(self, wanted: Wanted, now: float) -> list[Effect]:
        """Tell the owner, once, that nothing in the cluster can meet its demand."""
        if wanted.noticed or now - wanted.since < NOTICE_SECONDS:
            return []
        wanted.noticed = True
        entry = wanted.entry
        why = explain(entry.resources, self.nodes.values())
        text = f"{entry.wanted} task(s) of {entry.name}() wait: {why}. They stay queued until such a node joins."
        notice = DemandNotice(key=entry.key, name=entry.name, text=text)
        return [Publish(self._subjects.notice(self._identity, wanted.owner), notice)]

    # ------------------------------------------------------------------------------- answers

    def _pending(self, now: float) -> list[PendingDemand]:
        nodes = list(self.nodes.values())
        rows = [
            PendingDemand(
                owner=wanted.owner,
                job_id=wanted.job_id,
                name=wanted.entry.name,
                resources=wanted.entry.resources,
                wanted=wanted.entry.wanted,
                waiting_seconds=now - wanted.since,
                why=explain(wanted.entry.resources, nodes),
                feasible=is_feasible(wanted.entry.resources, nodes),
            )
            for wanted in self.demand
        ]
        return sorted(rows, key=lambda row: -row.waiting_seconds)

    def _resources(self) -> ResourceView:
        total: Resources = {}
        free: Resources = {}
        for node in self.nodes.values():
            total, free = add(total, node.total), add(free, node.free)
        return ResourceView(total=total, free=free)
