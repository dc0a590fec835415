"""The scheduler: it plans, nodes decide.

Any number of replicas hear all demand and all announcements. For each demand a rendezvous hash over the living replicas
says who acts first; the others act on what its owner repeats about a second later. A plan is optimistic: what was asked
of a node counts as used until it answers. A node that refuses costs one round trip and nothing else, so replicas need
not agree; an owner that is granted a slot twice gives one lease back.

What is known of the nodes is kept in order (``cluster``, ``candidates``), and so is what waits (``waiting``): an input
changes a few places in them, and decisions are made at their heads (``fairness``). When demand waits that would fit if
a lease came back, leases are asked back, beginning with the job that holds most (``recall``).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.effects import Answered, Ask, Connected, Effect, Event, Publish, Reply, Request, WakeAt
from shoal_core.protocol.groups import GroupChanged, GroupDemand
from shoal_core.protocol.ids import JobId, NodeId, ProcessId, ServiceId, SlotId
from shoal_core.protocol.messages import JobFinished, Message, NodeAnnouncement, NodeDied, ProcessDied
from shoal_core.protocol.placement import Bundle, NodeAffinity
from shoal_core.protocol.resources import fits
from shoal_core.protocol.scheduling import (
    Demand,
    DemandNotice,
    GetPending,
    GetResources,
    LeaseAnswer,
    LeaseRequest,
    RecallLeases,
    SchedulerPresence,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.traces import Attributes, Spanned
from shoal_scheduler.answers import pending_list, resource_view
from shoal_scheduler.attempts import CommitAsk, PrepareAsk, ReturnAsk
from shoal_scheduler.cluster import Cluster, Granted
from shoal_scheduler.counts import Counts
from shoal_scheduler.demand import DemandTable, Wanted
from shoal_scheduler.fairness import Placement, free_room, keeps_room, place_heads, plan
from shoal_scheduler.groups import GroupTable
from shoal_scheduler.policy import NodeView, PlaceId, explain
from shoal_scheduler.recall import Recall
from shoal_scheduler.waiting import Head, Line, Waiting

PRESENCE_SECONDS = 1.0
TELL_SECONDS = 0.001
SILENT_SECONDS = 3.0
ASK_AGAIN_SECONDS = 2.0
AVOID_SECONDS = 0.5
RECALL_SECONDS = 0.02
PLAN_SECONDS_FOR_A_NODE = 5e-6
"""What nodes announce is planned with so much later at most: of a thousand of them many speak in that time."""

NOTICE_SECONDS = 1.0
SETTLE_SECONDS = 2.0
NO_NODES_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """What a ``LeaseRequest`` under way is about; ``number`` is its own, and rises."""

    number: int
    node: NodeId
    place: PlaceId
    owner: ProcessId
    job_id: JobId
    key: int
    slots: tuple[SlotId, ...]
    resources: tuple[tuple[str, int], ...]
    asked_at: float


@dataclass(frozen=True, slots=True)
class RecallAsk:
    """A ``RecallLeases`` under way; nothing depends on its answer."""

    node: NodeId


class Begin:
    """The first input."""


class Scheduler:
    """The core of one replica."""

    def __init__(self, subjects: Subjects, identity: ServiceId) -> None:
        self.cluster = Cluster()
        self.demand = DemandTable()
        self.waiting = Waiting(self.cluster)
        self.groups = GroupTable(self.cluster, subjects, identity)
        self.asks: dict[int, LeaseAsk] = {}
        self.counts = Counts()
        self._subjects = subjects
        self._identity = identity
        self._replicas: dict[str, float] = {identity: math.inf}
        self._last_ask = 0
        self._connected = True
        self._hears_since = -math.inf
        self._presence_at = -math.inf
        self._planned_at = -math.inf
        self._told: list[str] = []
        """What the others were last told to be contended."""
        self._attended_at = -math.inf
        self._wakes: list[float] = []
        """When what is left alone for a moment, or told later, is due: a heap."""

    @property
    def nodes(self) -> Mapping[NodeId, NodeView]:
        """What is believed of the nodes."""
        return self.cluster.nodes

    # ------------------------------------------------------------------------------- inputs

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input and return what is to be done."""
        match message:
            case Event():
                return self._heard(message.message, message.source, now)
            case Answered(LeaseAsk() as ask, answer):
                self._answered(ask, answer, now)
                return self._plan(now)
            case Answered(PrepareAsk() | CommitAsk() | ReturnAsk() as ask, answer):
                effects = self.groups.answered(ask, answer, now)
                return [*effects, WakeAt(now)] if self.groups.has_plans_to_make() else effects
            case Request(GetPending() as request, token):
                listed = pending_list(request, self.demand, self.groups, self.cluster, self.waiting, now)
                return [Reply(token, listed)]
            case Request(GetResources(), token):
                return [Reply(token, resource_view(self.nodes.values()))]
            case Begin():
                self._hears_since = now
                return self.tick(now)
            case Connected(connected):
                self._connection_changed(connected, now)
                return self.tick(now)
        return []

    def _heard(self, event: Message, source: str, now: float) -> list[Effect]:
        """Take in an event; those that come in crowds first."""
        effects: list[Effect] = []
        match event:
            case GroupChanged():
                return self.groups.changed(event)
            case GroupDemand():
                return [*self.groups.stated(event, now), WakeAt(now)]  # many come at a time, and are planned at once
            case Demand():
                # Whoever may speak for an owner is for the broker to say, by the subject.
                if event.owner != source:
                    return []
                self._stated(event, now)
            case NodeAnnouncement():
                is_new = event.node_id not in self.nodes
                self.cluster.announced(event, now)
                if is_new:
                    self._settle_in(self.nodes[event.node_id])
                plan_at = self._planned_at + PLAN_SECONDS_FOR_A_NODE * len(self.nodes)
                if now < plan_at:
                    return [WakeAt(plan_at)]
            case SchedulerPresence():
                self._heard_of(event.scheduler, now)
                if event.scheduler != self._identity:
                    self.waiting.contention.heard(event.contended, now)
                return []
            case NodeDied():
                self._node_died(event.node_id, now)
                effects = self.groups.node_died(event.node_id, now)
            case ProcessDied():
                self._requeue(self.demand.drop_owner(event.process_id), now)
            case JobFinished():
                self._requeue(self.demand.drop_job(event.job_id), now)
                self._requeue(self.demand.drop_owner(event.driver), now)
            case _:
                return []
        return [*effects, *self._plan(now)]

    @property
    def replicas(self) -> int:
        """How many replicas this one knows to live, itself among them."""
        return len(self._replicas)

    def tick(self, now: float) -> list[Effect]:
        """Say that this replica lives, forget what is silent, ask again where an answer is overdue."""
        effects: list[Effect] = []
        if now >= self._presence_at:
            self._presence_at = now + PRESENCE_SECONDS
            subject = self._subjects.event(Role.SCHEDULER, self._identity, "presence")
            self._told = self.waiting.contention.found(now)
            effects.append(Publish(subject, SchedulerPresence(scheduler=self._identity, contended=self._told)))
            if self._connected:
                self._forget_silent(now)
                effects += self.groups.forget_silent(now)
            if now >= self._settled_at():
                effects += self.groups.notices(self._acts_first, now - NOTICE_SECONDS)
        for ask in list(self.asks.values()):
            if now - ask.asked_at < ASK_AGAIN_SECONDS:
                break
            self._unanswered(ask, now)
        return [*effects, *self._plan(now)]

    def _forget_silent(self, now: float) -> None:
        living = {replica: at for replica, at in self._replicas.items() if now - at < SILENT_SECONDS}
        if len(living) < len(self._replicas):
            self._replicas = living
            self._share_out(now)
        for node in [node for node in self.nodes.values() if now - node.heard_at >= SILENT_SECONDS]:
            self.cluster.remove(node.node_id)
        self._requeue(self.demand.forget_silent(now), now)
        self.cluster.jobs.forget_idle({waiting.job_id for waiting in (*self.demand, *self.groups)})

    def _connection_changed(self, connected: bool, now: float) -> None:
        """While nothing can be heard, silence means nothing; afterwards everyone has a full new period."""
        self._connected = connected
        if connected:
            self._hears_since = now
            self._presence_at = now
            self._replicas = {replica: max(at, now) for replica, at in self._replicas.items()}
            self.demand.renew(now)
            self.groups.renew(now)
            for node in self.nodes.values():
                node.heard_at = now

    def _heard_of(self, scheduler: str, now: float) -> None:
        if scheduler == self._identity:
            return
        is_new = scheduler not in self._replicas
        self._replicas[scheduler] = now
        if is_new:
            self._share_out(now)

    def _stated(self, demand: Demand, now: float) -> None:
        job = self.cluster.jobs.get(demand.job_id)
        if job.terms != demand.terms:
            job.terms = demand.terms
        changed = self.demand.update(demand, now)
        for wanted in changed:
            wanted.ours = self._acts_first(f"{wanted.owner}/{wanted.entry.key}/")
        self._requeue(changed, now)

    def _node_died(self, node: NodeId, now: float) -> None:
        self.cluster.remove(node)
        self._requeue(self.demand.drop_node(node), now)
        for ask in [ask for ask in self.asks.values() if ask.node == node]:
            self._settle(ask)
            self._reopen(ask, ask.slots, now)

    def _answered(self, ask: LeaseAsk, answer: Any, now: float) -> None:
        """Take in what a node answered; of an ask that was given up before, only what it granted counts."""
        if not isinstance(answer, LeaseAnswer):
            if ask.number in self.asks:
                self._unanswered(ask, now)
            return
        self.counts.answer_seconds.observe(now - ask.asked_at)
        self._settle(ask)
        resources = dict(ask.resources)
        self.cluster.granted(ask.node, Granted(answer.sequence, ask.job_id, ask.owner, resources, len(answer.granted)))
        node, view = self.nodes.get(ask.node), self.cluster.find(ask.place)
        if node is not None and view is not None and answer.sequence >= node.sequence:
            node.sequence = answer.sequence
            view.learn(answer.free)
        self._reopen(ask, answer.refused, now)
        wanted = self.demand.find(ask.owner, ask.key)
        if wanted is None:
            return
        if answer.refused:
            able = fits(resources, answer.free)
            self.counts.refusals["able" if able else "conflict"] += len(answer.refused)
            if able:
                wanted.avoid[ask.node] = now + AVOID_SECONDS
                heapq.heappush(self._wakes, now + AVOID_SECONDS)
            else:
                heapq.heappush(self._wakes, wanted.rest(now))
        else:
            wanted.conflicts = 0
        self.demand.met(wanted, answer.granted, ask.node, now)
        self.waiting.put(wanted, now)

    def _unanswered(self, ask: LeaseAsk, now: float) -> None:
        """Leave the node alone for a moment, and ask again: perhaps another one."""
        self.counts.refusals["silent"] += len(ask.slots)
        self._settle(ask)
        self._reopen(ask, ask.slots, now)
        view = self.cluster.find(ask.place)
        if view is not None:
            view.avoid_until = now + AVOID_SECONDS
            heapq.heappush(self._wakes, view.avoid_until)

    def _settle(self, ask: LeaseAsk) -> None:
        """An ask is over: what it would have taken counts no more."""
        if self.asks.pop(ask.number, None) is not None:
            self.cluster.settle(ask.number, ask.place, ask.job_id, ask.owner, dict(ask.resources), len(ask.slots))

    def _reopen(self, ask: LeaseAsk, slots: tuple[SlotId, ...] | list[SlotId], now: float) -> None:
        wanted = self.demand.find(ask.owner, ask.key)
        if wanted is not None:
            wanted.reopen(slots, ask.number, now)
            self.waiting.put(wanted, now)

    # ------------------------------------------------------------------------------- who acts

    def _share_out(self, now: float) -> None:
        """See anew which demand is this replica's to place, since the replicas have changed."""
        self.waiting.leads = self._acts_first("")
        for node in self.nodes.values():
            self._settle_in(node)
        everything = list(self.demand)
        for wanted in everything:
            wanted.ours = self._acts_first(f"{wanted.owner}/{wanted.entry.key}/")
        self._requeue(everything, now)

    def _settle_in(self, node: NodeView) -> None:
        """See when it is this replica's turn to pack a node."""
        turn = self._turn_of(f"node/{node.node_id}")
        if turn != node.turn:
            node.turn = turn
            node.touch()

    def _acts_first(self, name: str) -> bool:
        """Tell whether this replica is the one to act on what has this name."""
        return self._turn_of(name) == 0

    def _turn_of(self, name: str) -> int:
        """Return how many replicas come before this one for what has this name: another number for each of them."""
        if len(self._replicas) == 1:
            return 0
        mine = _weight(name, self._identity)
        return sum(_weight(name, replica) > mine for replica in self._replicas)

    def _requeue(self, changed: Iterable[Wanted], now: float) -> None:
        for wanted in changed:
            self.waiting.put(wanted, now)

    # ------------------------------------------------------------------------------- decisions

    def _plan(self, now: float) -> list[Effect]:
        """Ask nodes for all that fits; see to what does not; say when to look again."""
        self._planned_at = now
        while self._wakes and self._wakes[0] <= now:
            heapq.heappop(self._wakes)
        effects: list[Effect] = []
        wake_at = self._presence_at
        for owner in self.cluster.jobs.recounted:
            self.waiting.recount(owner, now)
        if self._connected:
            effects += self._plan_groups(now)
            wake_at = min(wake_at, self.groups.wake_at)
            effects += [self._ask(placement, now) for placement in plan(self.cluster, self.waiting, now)]
            wake_at = min(wake_at, self.waiting.look_at)
            self.cluster.jobs.recounted.clear()  # what was placed has its new place already
            if len(self._replicas) > 1 and not set(self.waiting.contention.found(now)).issubset(self._told):
                self._presence_at = min(self._presence_at, now + TELL_SECONDS)
                wake_at = min(wake_at, self._presence_at)
            if len(self.waiting):
                if now >= self._attended_at + RECALL_SECONDS:
                    self._attended_at = now
                    effects += self._attend(now)
                else:
                    wake_at = min(wake_at, self._attended_at + RECALL_SECONDS)
        if self.asks:
            wake_at = min(wake_at, next(iter(self.asks.values())).asked_at + ASK_AGAIN_SECONDS)
        if self._wakes:
            wake_at = min(wake_at, self._wakes[0])
        return [*effects, WakeAt(wake_at)]

    def _plan_groups(self, now: float) -> list[Effect]:
        """Ask nodes to reserve for groups; what has waited for longer than any of them has its turn before."""
        before = self.groups.tries_since(now)
        if before is None:
            return self.groups.plan(self._acts_first, now)
        placements, kept = place_heads(self.cluster, self.waiting, before, now)
        effects = [self._ask(placement, now) for placement in placements]
        effects += self.groups.plan(self._acts_first, now)
        free_room(self.cluster, kept)
        return effects

    def _wake(self, at: float) -> None:
        if not self._wakes or at < self._wakes[0]:
            heapq.heappush(self._wakes, at)

    def _ask(self, placement: Placement, now: float) -> Effect:
        """Ask a node for leases."""
        node, wanted, slots = placement.node, placement.wanted, placement.slots
        entry = wanted.entry
        self._last_ask += 1
        self.counts.decisions += len(slots)
        amounts = tuple(entry.resources.items())
        ask = LeaseAsk(
            self._last_ask,
            node.node_id,
            node.place,
            wanted.owner,
            wanted.job_id,
            entry.key,
            tuple(slots),
            amounts,
            now,
        )
        self.asks[ask.number] = ask
        node.promise(ask.number, {name: units * len(slots) for name, units in amounts})
        wanted.asked.update(dict.fromkeys(slots, ask.number))
        request = LeaseRequest(
            scheduler=self._identity,
            owner=wanted.owner,
            job_id=wanted.job_id,
            key=entry.key,
            slots=slots,
            resources=entry.resources,
            environment=entry.environment,
            actor=entry.actor,
            bundle=node.bundle,
        )
        subject = self._subjects.node_from_scheduler(node.node_id, "lease")
        return Ask(subject, request, ask, ASK_AGAIN_SECONDS, _span(wanted, node.node_id, len(slots), now))

    def _attend(self, now: float) -> list[Effect]:
        """Do what can be done for demand that fits nowhere now: say so if it never will, else ask for leases back."""
        effects: list[Effect] = []
        calm_at = self.waiting.contention.over_at(now)
        if calm_at is not None and not self.waiting.leads:
            self._wake(calm_at)
        heads = {head.line: head for head in self.waiting.heads(now)} if self.waiting.leads else {}
        recall = Recall(self.cluster, self.waiting.count_jobs(), now)
        for line in self.waiting.to_attend():
            self.cluster.follow(line.candidates)  # what was kept while others had their turn is free again
            strategy = line.candidates.strategy
            if line.candidates.have_room:
                continue
            if not len(line.candidates) or (isinstance(strategy, NodeAffinity) and strategy.fail):
                if isinstance(strategy, Bundle) and not self._has_place(strategy):
                    continue  # its group waits, and its owner is told of that
                for wanted in list(line.untold.values()):
                    effects += self._notice(wanted, line, now)
            else:
                effects += self._recall(line, heads.get(line), recall, now)
        return effects

    def _recall(self, line: Line, head: Head | None, recall: Recall, now: float) -> list[Effect]:
        """Ask for leases back for a line, unless some have just come."""
        if not self.waiting.leads:
            return []
        recall_at = max(line.served_at, line.recalled_at) + RECALL_SECONDS
        if now < recall_at:
            self._wake(recall_at)
            return []
        kept = line.candidates.nearest() if head is not None and keeps_room(now - head.since) else None
        if head is not None and kept is not None:
            victims = recall.clear(head.wanted, kept)
        else:
            victims = recall.find_victims(line)
        if not victims:
            return []
        line.recalled_at = now
        self.counts.recalls += len(victims)
        self._wake(now + RECALL_SECONDS)
        return [
            Ask(
                self._subjects.node_from_scheduler(victim.node.node_id, "recall"),
                RecallLeases(
                    owner=victim.lease.owner, resources=victim.lease.resources, count=1, bundle=victim.node.bundle
                ),
                RecallAsk(victim.node.node_id),
            )
            for victim in victims
        ]

    def _has_place(self, wish: Bundle) -> bool:
        """Tell whether a placement group has all its bundles, as far as this replica can tell."""
        seen = any(
            view.bundle is not None and view.bundle.group == wish.group for view in self.cluster.bundles.values()
        )
        return seen and wish.group not in self.groups

    def _settled_at(self) -> float:
        """Return from when on what was not heard of is not there."""
        return self._hears_since + (SETTLE_SECONDS if self.nodes else NO_NODES_SECONDS)

    def _notice(self, wanted: Wanted, line: Line, now: float) -> list[Effect]:
        """Tell the owner, once, that nothing in the cluster can meet its demand."""
        notice_at = max(wanted.since + NOTICE_SECONDS, self._settled_at())
        if now < notice_at:
            self._wake(notice_at)
            return []
        wanted.noticed = True
        del line.untold[wanted.name]
        entry = wanted.entry
        why = explain(entry.resources, entry.strategy, self.cluster.views())
        if entry.actor is not None:
            told, text = entry.actor.owner, f"Actor {entry.name} waits: {why}. It is placed when such a node joins."
        else:
            told = wanted.owner
            text = f"{entry.wanted} task(s) of {entry.name}() wait: {why}. They stay queued until such a node joins."
        actor = None if entry.actor is None else entry.actor.actor_id
        notice = DemandNotice(key=entry.key, name=entry.name, text=text, why=why, actor=actor)
        return [Publish(self._subjects.notice(self._identity, told), notice)]


def _weight(name: str, replica: str) -> tuple[bytes, str]:
    """Return what rendezvous hashing compares of replicas."""
    return hashlib.blake2b((name + replica).encode(), digest_size=8).digest(), replica


def _span(wanted: Wanted, node: NodeId, slots: int, now: float) -> Spanned | None:
    """Return the span of asking a node for leases, from when they were wanted, if somebody who waits is traced."""
    entry = wanted.entry
    if not entry.trace:
        return None
    about: Attributes = {
        "shoal.node.id": node,
        "shoal.lease.slots": slots,
        "shoal.lease.wanted": entry.wanted,
        "shoal.queue.seconds": round(now - wanted.since, 6),
    }
    return Spanned(f"schedule {entry.name}", entry.trace, wanted.since, about)
