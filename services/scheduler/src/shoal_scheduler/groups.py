"""The placement groups that wait, and what one scheduler does about them: plan, have nodes reserve, ask for the commit.

What one scheduler does for a group (``shoal_core.protocol.groups`` has the theory)::

    waiting ── there is room ──► preparing ── all nodes have reserved ──► committing ── the record says so ──► gone
       ▲                             │                                        │
       │                             ├── one has not: the others give back    └── another was quicker: gone, and
       └────── after a moment ───────┘                                            stated anew if it still waits

The commit is asked for until it is answered, and nothing is given back meanwhile: it may have taken effect. A plan that
is given up before is never committed. When plans of several groups are in each other's way, all of them are given up as
far as nodes have refused, and tried again after a pause that is different for each, so that one comes through.

Groups are served by the priority of their job, by their own, then by age; what would take a job beyond a quota waits.
The first of them that does not fit keeps room: what it needs on the nodes where it could be if leases came back counts
as used by it, and those leases are asked back. Room is kept for a time, then for as long not, and so on, as it is for
leases (``fairness``), since what is in the way may last for ever.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from shoal_core.protocol.effects import Ask, Effect, Publish
from shoal_core.protocol.errors import BusError, RequestRefusedError, ShoalError
from shoal_core.protocol.groups import (
    BundlesPrepared,
    CommitGroup,
    GroupChanged,
    GroupDemand,
    GroupState,
    PrepareBundles,
    ReturnBundles,
)
from shoal_core.protocol.ids import NodeId, PlacementGroupId, ServiceId
from shoal_core.protocol.messages import LeaseSummary, Message
from shoal_core.protocol.resources import Resources, add, fits
from shoal_core.protocol.scheduling import DemandNotice, RecallLeases
from shoal_core.protocol.subjects import Subjects
from shoal_scheduler.attempts import CommitAsk, PrepareAsk, ReturnAsk, UnderWay, Unneeded, WaitingGroup
from shoal_scheduler.cluster import Cluster, Granted
from shoal_scheduler.demand import FORGET_SECONDS
from shoal_scheduler.fairness import keeps_room
from shoal_scheduler.gangs import Plan, explain, free_without_leases, is_feasible, place
from shoal_scheduler.ordering import Ordering
from shoal_scheduler.policy import NodeView

PREPARE_SECONDS = 2.0
"""So long nodes have to answer; less than ``DOUBT_SECONDS`` of theirs."""
COMMIT_SECONDS = 2.0
RETURN_SECONDS = 0.5
PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 1.0
AVOID_SECONDS = 0.5
PATIENCE_SECONDS = 0.5
MOST_REMEMBERED = 10_000
LOOK_SECONDS, LOOK_SECONDS_FOR_A_NODE = 0.02, 0.0002
MOST_TRIED = 3
"""So many kinds of groups that do not fit are tried at a time, and one of the others."""

ActsFirst = Callable[[str], bool]
"""Tells of a name whether this scheduler is the one to act on it."""


class GroupTable:
    """All groups that wait, as one scheduler knows them.

    It changes what is believed to be free of nodes, as what is asked of them and what is kept there does. ``wake_at``
    is when to plan again, as far as this table can tell.
    """

    def __init__(self, cluster: Cluster, subjects: Subjects, identity: ServiceId) -> None:
        self.wake_at = math.inf
        self._idle: Ordering[WaitingGroup] = Ordering()
        self._fresh: list[PlacementGroupId] = []
        self._full: set[str] = set()
        self._look_at = self._due_at = math.inf
        self._keepers: dict[PlacementGroupId, list[tuple[NodeView, Resources]]] = {}
        self._first: PlacementGroupId | None = None
        self._cluster = cluster
        self._subjects = subjects
        self._identity = identity
        self._waiting: dict[PlacementGroupId, WaitingGroup] = {}
        self._unsure: dict[PlacementGroupId, float] = {}
        self._over: dict[PlacementGroupId, float] = {}
        self._last_ask = 0
        self._plans = 0

    def __iter__(self) -> Iterator[WaitingGroup]:
        return iter(self._waiting.values())

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, group: object) -> bool:
        return group in self._waiting

    # ------------------------------------------------------------------------------- what is heard

    def stated(self, demand: GroupDemand, now: float) -> list[Effect]:
        """Take in which bundles of a group have no place."""
        group = demand.description.group_id
        self._cluster.jobs.get(demand.description.job_id).terms = demand.terms
        if demand.attempt < self._over.get(group, 0):
            return []  # an old statement that comes late
        known = self._waiting.get(group)
        if known is not None and demand.attempt <= known.demand.attempt:
            known.stated_at, known.replica = now, demand.replica
            if known.is_overdue() and known.under_way is None and not known.ours:
                self._fresh.append(group)
            return []
        effects = [] if known is None else self._drop(known)
        new = self._waiting[group] = WaitingGroup(demand, demand.replica, now, now, now, now)
        self._idle.put(group, new.rank, new)
        self._fresh.append(group)
        if known is not None:
            new.since, new.noticed = known.since, known.noticed
        return effects

    def changed(self, news: GroupChanged) -> list[Effect]:
        """Take in that a record has changed. Where something still waits, its statement is on its way."""
        group = news.group_id
        over = math.inf if news.state is GroupState.REMOVED else news.attempt
        self._note_over(group, over)
        known = self._waiting.get(group)
        is_settled = news.state in (GroupState.CREATED, GroupState.REMOVED)
        if known is None or known.demand.attempt >= over or not is_settled:
            return []
        return self._drop(known)

    def answered(
        self, ask: PrepareAsk | CommitAsk | ReturnAsk, answer: Message | ShoalError, now: float
    ) -> list[Effect]:
        """Take in what a node or the control store has answered."""
        if isinstance(ask, ReturnAsk):
            again = isinstance(answer, BusError) and ask.often > 0 and ask.node in self._cluster.nodes
            return [self._ask_back(replace(ask, often=ask.often - 1))] if again else []
        if isinstance(ask, PrepareAsk):
            self._settle(ask)
            if isinstance(answer, BundlesPrepared):
                node = self._cluster.nodes.get(ask.node)
                if node is not None and answer.sequence >= node.sequence:
                    node.sequence = answer.sequence
                    node.learn(answer.free)
        known = self._waiting.get(ask.group)
        if known is None or known.under_way is None or known.under_way.name != ask.plan:
            return []  # that plan was given up
        if isinstance(ask, PrepareAsk):
            return self._prepared(known, known.under_way, ask, answer, now)
        return self._committed(known, known.under_way, answer, now)

    def _prepared(
        self,
        waiting: WaitingGroup,
        plan: UnderWay,
        ask: PrepareAsk,
        answer: Message | ShoalError,
        now: float,
    ) -> list[Effect]:
        del plan.asked[ask.node]
        if isinstance(answer, BundlesPrepared) and answer.granted:
            needed = plan.needs[ask.node]
            owner = waiting.demand.description.owner
            self._cluster.granted(ask.node, Granted(answer.sequence, waiting.job_id, owner, needed, 1))
            return [] if plan.asked else [self._ask_commit(waiting, plan)]
        node = self._cluster.nodes.get(ask.node)
        if isinstance(answer, BundlesPrepared):
            if fits(plan.needs[ask.node], answer.free):
                waiting.avoid[ask.node] = now + AVOID_SECONDS
        elif node is not None:
            node.avoid_until = now + AVOID_SECONDS
        return self._fail(waiting, now)

    def _committed(
        self, waiting: WaitingGroup, plan: UnderWay, answer: Message | ShoalError, now: float
    ) -> list[Effect]:
        if isinstance(answer, GroupChanged):
            self._note_over(waiting.group, math.inf if answer.state is GroupState.REMOVED else answer.attempt)
        elif not isinstance(answer, RequestRefusedError):
            self._unsure[waiting.group] = now + PAUSE_SECONDS  # it may have been heard: asked again until that is known
            return []
        return self._drop(waiting)

    def node_died(self, node: NodeId, now: float) -> list[Effect]:
        """Give up what needs a node that is dead."""
        effects: list[Effect] = []
        for waiting in self._waiting.values():
            plan = waiting.under_way
            if plan is not None and not plan.committing and node in plan.places.values():
                effects += self._fail(waiting, now)
        return effects

    def forget_silent(self, now: float) -> list[Effect]:
        """Drop what was not stated again."""
        silent = [waiting for waiting in self if now - waiting.stated_at > FORGET_SECONDS]
        return [effect for waiting in silent for effect in self._drop(waiting)]

    def renew(self, now: float) -> None:
        """Give every group a full new period to be stated again, since nothing could be heard for a while."""
        for waiting in self:
            waiting.stated_at = now

    def _note_over(self, group: PlacementGroupId, attempt: float) -> None:
        """Remember which attempts are over, so that an old statement does not begin them anew."""
        self._over[group] = max(attempt, self._over.pop(group, 0))
        if len(self._over) > MOST_REMEMBERED:
            del self._over[next(iter(self._over))]

    # ------------------------------------------------------------------------------- plans

    def has_plans_to_make(self) -> bool:
        """Tell whether there is anything to do for ``plan``."""
        return bool(self._idle or self._unsure)

    def tries_since(self, now: float) -> float | None:
        """Return since when the first of those groups waits that ``plan`` would try now; None: it would try none.

        If it would look at all of them, the room that was kept is free from now on.
        """
        self._fresh = [group for group in self._fresh if group in self._idle]
        if now >= min(self._look_at, self._due_at):
            self._full.clear()
            self._first = None
            for group in [*self._keepers]:
                self._keep_no_more(group)
            return self._idle.first.since if self._idle else None
        return min((self._waiting[group].since for group in self._fresh), default=None)

    def plan(self, acts_first: ActsFirst, now: float) -> list[Effect]:
        """Begin plans for all that fit, and keep room for the first that does not (after ``tries_since``).

        New groups are tried at once, but what did not fit is looked at again only every few hundredths of a second, and
        with many nodes less often, since that may take milliseconds. The room that was kept stays kept meanwhile.
        """
        self.wake_at = math.inf
        effects = self._ask_again(now)
        if now >= min(self._look_at, self._due_at):
            self._look_at = self._due_at = math.inf
            effects += self._try([*self._idle], acts_first, now)
        else:
            fresh = [self._waiting[group] for group in dict.fromkeys(self._fresh)]
            for waiting in fresh:
                self._keep_no_more(waiting.group)
            effects += self._try(sorted(fresh, key=lambda waiting: waiting.rank), acts_first, now)
            self._wake(self._look_at)  # perhaps there is room now that there was not when all were looked at
        self._fresh.clear()
        self._wake(self._due_at)
        return effects

    def _try(self, groups: Sequence[WaitingGroup], acts_first: ActsFirst, now: float) -> list[Effect]:
        """Plan groups, first ones first. Beside the first kinds that do not fit, one of the others is tried in turn."""
        effects: list[Effect] = []
        pause = LOOK_SECONDS + len(self._cluster.nodes) * LOOK_SECONDS_FOR_A_NODE
        stalest = min(groups, key=lambda waiting: waiting.tried_at, default=None)
        for waiting in groups:
            if waiting.retry_at > now:
                self._due_at = min(self._due_at, waiting.retry_at)
                effects += self._wait(waiting, now, ours=True)
                continue
            tried = len(self._full)
            if tried and (waiting.shape in self._full or (tried >= MOST_TRIED and waiting is not stalest)):
                self._look_at = min(self._look_at, now + pause)
                continue
            waiting.over_quota = self._cluster.jobs.get(waiting.job_id).over_quota(waiting.together)
            if waiting.over_quota:
                self._look_at = min(self._look_at, now + pause)
                continue
            waiting.tried_at = now
            ours = waiting.ours = waiting.is_overdue() or acts_first(f"group/{waiting.group}")
            places = place(waiting.demand, self._cluster.nodes.values(), now, avoid=waiting.avoid)
            if places is not None and ours:
                effects += self._begin(waiting, places)
                continue
            self._look_at = min(self._look_at, now + pause)
            if places is not None:
                self._keep(waiting, places)  # another scheduler is about to ask for it
            else:
                effects += self._wait(waiting, now, ours=ours)
                self._full.add(waiting.shape)
        return effects

    def _ask_again(self, now: float) -> list[Effect]:
        """Ask again for the commits of which it is not known whether they were heard."""
        due = [group for group, at in self._unsure.items() if at <= now]
        for at in self._unsure.values():
            self._wake(at)
        effects: list[Effect] = []
        for group in due:
            del self._unsure[group]
            waiting = self._waiting[group]
            assert waiting.under_way is not None
            effects.append(self._ask_commit(waiting, waiting.under_way))
        return effects

    def _begin(self, waiting: WaitingGroup, places: Plan) -> list[Effect]:
        """Ask all nodes of a plan to reserve."""
        self._plans += 1
        name, attempt = f"{self._identity}.{self._plans}", waiting.demand.attempt + 1
        plan = UnderWay(name, attempt, places, _needs(waiting, places))
        waiting.under_way = plan
        self._cluster.jobs.count_others(waiting.job_id, waiting.together, 1)
        self._idle.discard(waiting.group)
        self._keep_no_more(waiting.group)
        nodes = self._cluster.nodes
        bundles = waiting.demand.description.bundles
        effects: list[Effect] = []
        for node, resources in plan.needs.items():
            self._last_ask -= 1
            ask = plan.asked[node] = PrepareAsk(self._last_ask, node, waiting.group, plan.name)
            nodes[node].take(resources)
            nodes[node].promise(ask.number, resources)
            request = PrepareBundles(
                plan=plan.name,
                group_id=waiting.group,
                job_id=waiting.demand.description.job_id,
                attempt=plan.attempt,
                bundles={index: bundles[index] for index, place in places.items() if place == node},
            )
            effects.append(Ask(self._subjects.node_from_scheduler(node, "prepare"), request, ask, PREPARE_SECONDS))
        return effects

    def _ask_commit(self, waiting: WaitingGroup, plan: UnderWay) -> Effect:
        plan.committing = True
        request = CommitGroup(group_id=waiting.group, attempt=plan.attempt, nodes=plan.places)
        subjects, replica, verb = self._subjects, waiting.replica, "commit_group"
        subject = subjects.gcs_replica_from_scheduler(replica, verb) if replica else subjects.gcs_from_scheduler(verb)
        return Ask(subject, request, CommitAsk(waiting.group, plan.name), COMMIT_SECONDS)

    def _fail(self, waiting: WaitingGroup, now: float) -> list[Effect]:
        """Give a plan up, and make another one after a pause that is different for each group."""
        effects = self._end_plan(waiting)
        self._idle.put(waiting.group, waiting.rank, waiting)
        waiting.failures += 1
        seed = f"{self._identity}/{waiting.group}/{waiting.failures}".encode()
        fraction = int.from_bytes(hashlib.blake2b(seed, digest_size=4).digest(), "big") / 2**32
        longest = min(LONGEST_PAUSE_SECONDS, PAUSE_SECONDS * 2 ** min(waiting.failures, 10))
        waiting.retry_at = now + longest * (0.1 + fraction)
        self._due_at = min(self._due_at, waiting.retry_at)
        waiting.avoid = {node: until for node, until in waiting.avoid.items() if until > now}
        return effects

    def _drop(self, waiting: WaitingGroup) -> list[Effect]:
        """Have nothing more to do with a group, until it is stated anew."""
        effects = self._end_plan(waiting)
        del self._waiting[waiting.group]
        self._idle.discard(waiting.group)
        self._keep_no_more(waiting.group)
        return effects

    def _end_plan(self, waiting: WaitingGroup) -> list[Effect]:
        """Have nodes free what they reserved for a plan, unless its commit was asked for: then the record decides."""
        plan = waiting.under_way
        waiting.under_way = None
        if plan is None:
            return []
        self._cluster.jobs.count_others(waiting.job_id, waiting.together, -1)
        for ask in plan.asked.values():
            self._settle(ask)
        if plan.committing:
            self._unsure.pop(waiting.group, None)
            return []
        nodes = sorted(set(plan.places.values()))
        return [self._ask_back(ReturnAsk(node, waiting.group, plan.name)) for node in nodes]

    def _ask_back(self, ask: ReturnAsk) -> Effect:
        request = ReturnBundles(plan=ask.plan, group_id=ask.group)
        return Ask(self._subjects.node_from_scheduler(ask.node, "return_bundles"), request, ask, RETURN_SECONDS)

    def notices(self, acts_first: ActsFirst, before: float) -> list[Effect]:
        """Tell owners, once, of groups that were there ``before`` and that nothing in the cluster can ever hold."""
        effects: list[Effect] = []
        for waiting in self:
            about = waiting.demand.description
            mute = waiting.noticed or waiting.since > before or not acts_first(f"group/{waiting.group}")
            if mute or is_feasible(waiting.demand, self._cluster.nodes.values()):
                continue
            waiting.noticed = True
            name = about.name or about.group_id
            why = explain(waiting.demand, self._cluster.nodes.values())
            text = f"Placement group {name} waits: {why}. It is placed when such nodes join."
            notice = DemandNotice(key=0, name=name, text=text, why=why, group=about.group_id)
            effects.append(Publish(self._subjects.notice(self._identity, about.owner), notice))
        return effects

    def _settle(self, ask: PrepareAsk) -> None:
        """An ask is over: what it would have taken counts no more."""
        node = self._cluster.nodes.get(ask.node)
        if node is not None:
            node.settle(ask.number)

    # ------------------------------------------------------------------------------- keeping room

    def _wait(self, waiting: WaitingGroup, now: float, *, ours: bool) -> list[Effect]:
        """Keep room for a group that has to wait, if it is the first; have leases asked back that are in its way."""
        patient_until = waiting.since + PATIENCE_SECONDS
        if now < patient_until:
            self._due_at = min(self._due_at, patient_until)
            return []
        if self._first is not None or not keeps_room(now - patient_until):
            return []
        # Nodes that are left alone for a moment are asked again soon.
        places = place(waiting.demand, self._cluster.nodes.values(), math.inf, free_without_leases)
        if places is None:
            return []
        self._first = waiting.group
        effects = self._recall(waiting, places) if ours else []
        self._keep(waiting, places)
        return effects

    def _keep(self, waiting: WaitingGroup, places: Plan) -> None:
        """Keep room for a group until all groups are looked at again."""
        kept = self._keepers[waiting.group] = []
        for node_id, resources in _needs(waiting, places).items():
            node = self._cluster.nodes[node_id]
            node.keep(resources)
            kept.append((node, resources))

    def _keep_no_more(self, group: PlacementGroupId) -> None:
        for node, resources in self._keepers.pop(group, ()):
            node.keep(resources, -1)
        if self._first == group:
            self._first = None

    def _recall(self, waiting: WaitingGroup, places: Plan) -> list[Effect]:
        nodes = self._cluster.nodes
        needs = _needs(waiting, places)
        return [effect for node, resources in needs.items() for effect in self._recall_on(nodes[node], resources)]

    def _recall_on(self, node: NodeView, needed: Resources) -> list[Effect]:
        """Ask for as many leases of a node as are needed, from whoever has most of a kind there."""
        coming = dict(node.free)
        for lease in node.leases:
            coming = add(coming, _times(lease.resources, lease.recalled))
        effects: list[Effect] = []
        for lease in sorted(node.leases, key=lambda lease: (-lease.count, lease.owner)):
            count = 0
            while count < lease.count - lease.blocked - lease.recalled and _helps(lease, needed, coming):
                coming = add(coming, lease.resources)
                count += 1
            if count:
                self._cluster.mark_recalled(node, lease, count)
                request = RecallLeases(owner=lease.owner, resources=lease.resources, count=count)
                effects.append(Ask(self._subjects.node_from_scheduler(node.node_id, "recall"), request, Unneeded()))
        return effects

    def _wake(self, at: float) -> None:
        self.wake_at = min(self.wake_at, at)


def _needs(waiting: WaitingGroup, places: Plan) -> dict[NodeId, Resources]:
    """Return what a plan takes of each node."""
    bundles = waiting.demand.description.bundles
    needs: dict[NodeId, Resources] = {}
    for index, node in places.items():
        needs[node] = add(needs.get(node, {}), bundles[index])
    return needs


def _helps(lease: LeaseSummary, needed: Resources, coming: Resources) -> bool:
    """Tell whether the return of a lease brings some of what is missing."""
    return any(lease.resources.get(name) and coming.get(name, 0) < units for name, units in needed.items())


def _times(resources: Resources, count: int) -> Resources:
    return {name: units * count for name, units in resources.items()}
