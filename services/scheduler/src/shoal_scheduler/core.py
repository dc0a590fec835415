"""The scheduler: it plans, nodes decide.

Any number of replicas hear all demand and all announcements. For each demand a rendezvous hash over the living replicas
says who acts first; the others act on what its owner repeats about a second later. A plan is optimistic: what was asked
of a node counts as used until it answers. A node that refuses costs one round trip and nothing else, so replicas need
not agree; an owner that is granted a slot twice gives one lease back.

When demand waits that would fit if a lease came back, its owner's competitors are asked for leases, beginning with who
holds most beyond an equal share: so that an owner with endless work shares with one that has just begun (``fairness``).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

from shoal_core.protocol.effects import Answered, Ask, Connected, Effect, Event, Publish, Reply, Request, WakeAt
from shoal_core.protocol.groups import GroupChanged, GroupDemand
from shoal_core.protocol.ids import NodeId, ProcessId, ServiceId, SlotId
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
    ProcessDied,
    RecallLeases,
    SchedulerPresence,
)
from shoal_core.protocol.placement import Bundle, NodeAffinity
from shoal_core.protocol.subjects import Role, Subjects
from shoal_scheduler.answers import pending_list, resource_view
from shoal_scheduler.counts import Counts
from shoal_scheduler.demand import DemandTable, Wanted
from shoal_scheduler.fairness import Holdings, Placement, Unmet, find_victim, holdings, plan
from shoal_scheduler.groups import CommitAsk, GroupTable, PrepareAsk
from shoal_scheduler.policy import NodeView, able, explain

PRESENCE_SECONDS = 1.0
SILENT_SECONDS = 3.0
ASK_AGAIN_SECONDS = 2.0
AVOID_SECONDS = 0.5
RECALL_SECONDS = 0.02
NOTICE_SECONDS = 1.0
SETTLE_SECONDS = 2.0
NO_NODES_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LeaseAsk:
    """What a ``LeaseRequest`` under way is about; ``number`` is its own, and rises."""

    number: int
    node: NodeId
    bundle: Bundle | None
    owner: ProcessId
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
        self.nodes: dict[NodeId, NodeView] = {}
        self.demand = DemandTable()
        self.groups = GroupTable(subjects, identity)
        self.asks: dict[int, LeaseAsk] = {}
        self.counts = Counts()
        self._subjects = subjects
        self._identity = identity
        self._replicas: dict[str, float] = {identity: math.inf}
        self._last_ask = 0
        self._connected = True
        self._hears_since = -math.inf
        self._presence_at = -math.inf
        self._wake_at = math.inf

    # ------------------------------------------------------------------------------- inputs

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input and return what is to be done."""
        effects: list[Effect] = []
        match message:
            case Event(Demand() as demand, source):
                # Whoever may speak for an owner is for the broker to say, by the subject.
                if demand.owner != source:
                    return []
                self.demand.update(demand, now)
            case Event(NodeAnnouncement() as announcement):
                self._announced(announcement, now)
            case Event(SchedulerPresence(scheduler=scheduler)):
                if scheduler != self._identity:
                    self._replicas[scheduler] = now
                return []
            case Event(GroupDemand() as stated):
                effects = self.groups.stated(stated, self.nodes, now)
            case Event(GroupChanged() as news):
                return self.groups.changed(news, self.nodes)
            case Event(NodeDied(node_id=node)):
                effects = self._node_died(node, now)
            case Event(ProcessDied(process_id=process)):
                self.demand.drop_owner(process)
            case Event(JobFinished() as finished):
                self.demand.drop_job(finished.job_id)
                self.demand.drop_owner(finished.driver)
            case Answered(LeaseAsk() as ask, answer):
                self._answered(ask, answer, now)
            case Answered(PrepareAsk() | CommitAsk() as ask, answer):
                effects = self.groups.answered(ask, answer, self.nodes, now)
                if not self.groups.has_plans_to_make():
                    return effects
            case Request(GetPending(), token):
                return [Reply(token, pending_list(self.demand, self.groups, self.nodes.values(), now))]
            case Request(GetResources(), token):
                return [Reply(token, resource_view(self.nodes.values()))]
            case Begin():
                self._hears_since = now
                return self.tick(now)
            case Connected(connected):
                self._connection_changed(connected, now)
                return self.tick(now)
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
            effects.append(Publish(subject, SchedulerPresence(scheduler=self._identity)))
            if self._connected:
                self._replicas = {r: at for r, at in self._replicas.items() if now - at < SILENT_SECONDS}
                self.nodes = {n: view for n, view in self.nodes.items() if now - view.heard_at < SILENT_SECONDS}
                self.demand.forget_silent(now)
                effects += self.groups.forget_silent(self.nodes, now)
                if now >= self._settled_at():
                    effects += self.groups.notices(self.nodes.values(), self._acts_first, now - NOTICE_SECONDS)
        for ask in list(self.asks.values()):
            if now - ask.asked_at < ASK_AGAIN_SECONDS:
                break
            self._unanswered(ask, now)
        return [*effects, *self._plan(now)]

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

    def _announced(self, announcement: NodeAnnouncement, now: float) -> None:
        node = self.nodes.get(announcement.node_id)
        if node is None:
            node = NodeView(announcement.node_id, announcement.total, {})
            self.nodes[announcement.node_id] = node
        elif announcement.sequence <= node.sequence:
            return
        node.total = announcement.total
        node.labels = announcement.labels
        node.draining = announcement.draining
        node.learn_bundles(announcement.bundles, announcement.leases)
        node.actors = announcement.actors
        node.sequence = announcement.sequence
        node.heard_at = now
        node.learn(announcement.free)

    def _node_died(self, node: NodeId, now: float) -> list[Effect]:
        self.nodes.pop(node, None)
        self.demand.drop_node(node)
        for ask in [ask for ask in self.asks.values() if ask.node == node]:
            self._settle(ask)
            self._reopen(ask, ask.slots, now)
        return self.groups.node_died(node, self.nodes, now)

    def _answered(self, ask: LeaseAsk, answer: Any, now: float) -> None:
        """Take in what a node answered; of an ask that was given up before, only what it granted counts."""
        if not isinstance(answer, LeaseAnswer):
            if ask.number in self.asks:
                self._unanswered(ask, now)
            return
        self.counts.answer_seconds.observe(now - ask.asked_at)
        self._settle(ask)
        node, view = self.nodes.get(ask.node), self._view(ask)
        if node is not None and view is not None and answer.sequence >= node.sequence:
            view.learn(answer.free)
        self._reopen(ask, answer.refused, now)
        wanted = self.demand.find(ask.owner, ask.key)
        if wanted is None:
            return
        if answer.refused:
            able = all(answer.free.get(name, 0) >= units for name, units in ask.resources)
            self.counts.refusals["able" if able else "conflict"] += len(answer.refused)
            if able:
                wanted.avoid[ask.node] = now + AVOID_SECONDS
        self.demand.met(wanted, answer.granted, ask.node, now)

    def _unanswered(self, ask: LeaseAsk, now: float) -> None:
        """Leave the node alone for a moment, and ask again: perhaps another one."""
        self.counts.refusals["silent"] += len(ask.slots)
        self._settle(ask)
        self._reopen(ask, ask.slots, now)
        view = self._view(ask)
        if view is not None:
            view.avoid_until = now + AVOID_SECONDS

    def _view(self, ask: LeaseAsk) -> NodeView | None:
        """Return what is believed of the node, or the bundle, that was asked."""
        node = self.nodes.get(ask.node)
        return None if node is None else node.view(ask.bundle)

    def _settle(self, ask: LeaseAsk) -> None:
        """An ask is over: what it would have taken counts no more."""
        self.asks.pop(ask.number, None)
        view = self._view(ask)
        if view is not None and view.asked.pop(ask.number, None) is not None:
            view.take(dict(ask.resources), -len(ask.slots))

    def _reopen(self, ask: LeaseAsk, slots: tuple[SlotId, ...] | list[SlotId], now: float) -> None:
        wanted = self.demand.find(ask.owner, ask.key)
        if wanted is not None:
            wanted.reopen(slots, ask.number, now)

    # ------------------------------------------------------------------------------- decisions

    def _plan(self, now: float) -> list[Effect]:
        """Ask nodes for all that fits; see to what does not; say when to look again."""
        self._wake_at = self._presence_at
        effects: list[Effect] = []
        if self._connected:
            nodes = list(self.nodes.values())
            effects += self.groups.plan(nodes, self._acts_first, now)
            self._wake(self.groups.wake_at)
            held = self._holdings()
            waiting = [(wanted, slots) for wanted in self.demand if (slots := self._slots_for_us(wanted))]
            placements, unmet = plan(waiting, nodes, held, now)
            effects += [self._ask(placement, now) for placement in placements]
            rivals = len({*(owner for owner, count in held.items() if count > 0), *self.demand.owners()})
            for demand in unmet:
                effects += self._see_to(demand, held, rivals, now)
            self.groups.release_room()
        if self.asks:
            self._wake(next(iter(self.asks.values())).asked_at + ASK_AGAIN_SECONDS)
        return [*effects, WakeAt(self._wake_at)]

    def _wake(self, at: float) -> None:
        self._wake_at = min(self._wake_at, at)

    def _holdings(self) -> Holdings:
        """Count what each owner holds, and what is being asked for it."""
        held = holdings(self.nodes.values())
        for ask in self.asks.values():
            held[ask.owner] += len(ask.slots)
        return held

    def _slots_for_us(self, wanted: Wanted) -> list[SlotId]:
        """Return the open slots that this replica should place: all where it is first, else those that need help."""
        return list(wanted.open) if self._is_first(wanted) else wanted.overdue()

    def _is_first(self, wanted: Wanted) -> bool:
        """Tell whether this replica is the one to act on a demand."""
        return len(self._replicas) == 1 or self._acts_first(f"{wanted.owner}/{wanted.entry.key}")

    def _acts_first(self, name: str) -> bool:
        """Tell whether this replica is the one to act on what has this name."""
        hashed = {replica: hashlib.blake2b(f"{name}/{replica}".encode(), digest_size=8) for replica in self._replicas}
        return max(hashed, key=lambda replica: (hashed[replica].digest(), replica)) == self._identity

    def _ask(self, placement: Placement, now: float) -> Effect:
        """Ask a node for leases."""
        node, wanted, slots = placement.node, placement.wanted, placement.slots
        self._last_ask += 1
        self.counts.decisions += len(slots)
        resources = wanted.entry.resources
        ask = LeaseAsk(
            self._last_ask,
            node.node_id,
            node.bundle,
            wanted.owner,
            wanted.entry.key,
            tuple(slots),
            tuple(resources.items()),
            now,
        )
        self.asks[ask.number] = ask
        node.asked[ask.number] = {name: units * len(slots) for name, units in resources.items()}
        for slot in slots:
            del wanted.open[slot]
            wanted.asked[slot] = ask.number
        request = LeaseRequest(
            scheduler=self._identity,
            owner=wanted.owner,
            job_id=wanted.job_id,
            key=wanted.entry.key,
            slots=slots,
            resources=resources,
            actor=wanted.entry.actor,
            bundle=node.bundle,
        )
        return Ask(self._subjects.node_from_scheduler(node.node_id, "lease"), request, ask, ASK_AGAIN_SECONDS)

    def _see_to(self, unmet: Unmet, held: Holdings, rivals: int, now: float) -> list[Effect]:
        """Do what can be done for demand that fits nowhere now: say so if it never will, else ask for leases back."""
        wanted = unmet.wanted
        nodes = able(wanted.entry.resources, wanted.entry.strategy, self.nodes.values())
        if not nodes and isinstance(wanted.entry.strategy, Bundle) and not self._has_place(wanted.entry.strategy):
            return []  # its group waits, and its owner is told of that
        if not nodes or (isinstance(wanted.entry.strategy, NodeAffinity) and wanted.entry.strategy.fail):
            return self._notice(wanted, now)
        self._wake_when_avoided_no_more(wanted, now)
        recall_at = max(wanted.served_at, wanted.recalled_at) + RECALL_SECONDS
        if now < recall_at:
            self._wake(recall_at)
            return []
        victim = find_victim(unmet, nodes, held, rivals, now)
        if victim is None:
            return []
        wanted.recalled_at = now
        self.counts.recalls += 1
        self._wake(now + RECALL_SECONDS)
        victim.node.mark_recalled(victim.lease)
        lease = victim.lease
        request = RecallLeases(owner=lease.owner, resources=lease.resources, count=1, bundle=victim.node.bundle)
        subject = self._subjects.node_from_scheduler(victim.node.node_id, "recall")
        return [Ask(subject, request, RecallAsk(victim.node.node_id))]

    def _wake_when_avoided_no_more(self, wanted: Wanted, now: float) -> None:
        wanted.avoid = {node: until for node, until in wanted.avoid.items() if until > now}
        for until in (*wanted.avoid.values(), *(node.avoid_until for node in self.nodes.values())):
            if until > now:
                self._wake(until)

    def _has_place(self, bundle: Bundle) -> bool:
        """Tell whether a placement group has all its bundles, as far as this replica can tell."""
        seen = any(held.group == bundle.group for node in self.nodes.values() for held in node.bundles)
        return seen and bundle.group not in self.groups

    def _settled_at(self) -> float:
        """Return from when on what was not heard of is not there."""
        return self._hears_since + (SETTLE_SECONDS if self.nodes else NO_NODES_SECONDS)

    def _notice(self, wanted: Wanted, now: float) -> list[Effect]:
        """Tell the owner, once, that nothing in the cluster can meet its demand."""
        if wanted.noticed or not self._is_first(wanted):
            return []
        notice_at = max(wanted.since + NOTICE_SECONDS, self._settled_at())
        if now < notice_at:
            self._wake(notice_at)
            return []
        wanted.noticed = True
        entry = wanted.entry
        why = explain(entry.resources, entry.strategy, self.nodes.values())
        if entry.actor is not None:
            told, text = entry.actor.owner, f"Actor {entry.name} waits: {why}. It is placed when such a node joins."
        else:
            told = wanted.owner
            text = f"{entry.wanted} task(s) of {entry.name}() wait: {why}. They stay queued until such a node joins."
        actor = None if entry.actor is None else entry.actor.actor_id
        notice = DemandNotice(key=entry.key, name=entry.name, text=text, why=why, actor=actor)
        return [Publish(self._subjects.notice(self._identity, told), notice)]
