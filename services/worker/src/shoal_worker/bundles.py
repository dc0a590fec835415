"""The bundles of placement groups that a node has reserved: kept until the group's record is known not to want them.

A bundle's life on its node::

                                    the record names this node for it
    reserved, for plans of schedulers ─────────────────────────────────► committed: leases come out of it
        │                                                                    │
        └── the attempts of all those plans are over, or they were           └── the group was removed: what it has
            given up, and the record does not name this node: free               not lent is free, its leases go

A node never gives back by itself what a commit could still count on. If it hears nothing for ``DOUBT_SECONDS``, it has
the control store end the attempt (``AbandonGroup``), and says so again until it is answered; the answer is the record.
Several plans may want the same bundle here, since schedulers do not know of each other: it is reserved once for all.

What an event or an answer says of a record may be old. It still means what it says: that attempts up to the record's
are over, that a node which is named stays named as long as it lives, and that a group that was removed stays so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from shoal_core.protocol.effects import Answered, Ask, Effect
from shoal_core.protocol.errors import NotFoundError
from shoal_core.protocol.groups import (
    AbandonGroup,
    GroupChanged,
    GroupRecord,
    GroupState,
    PrepareBundles,
    ReturnBundles,
)
from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId
from shoal_core.protocol.messages import BundleSummary
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import to_amounts
from shoal_core.protocol.subjects import Subjects
from shoal_worker.leases import Lease, LeaseTable

DOUBT_SECONDS = 4.0
"""Longer than a scheduler waits for the nodes' answers before it asks for a commit, or gives up."""
REPEAT_SECONDS = 1.0
MOST_REMOVED = 10_000


@dataclass(slots=True)
class Reserved:
    """A bundle that is reserved here. ``plans`` maps those that count on it to their attempt, and when it was asked.

    ``told`` is what was announced of it last: with many bundles, most announcements tell the same of most of them.
    """

    bundle: Bundle
    job_id: JobId
    plans: dict[str, tuple[int, float]] = field(default_factory=dict)
    committed: bool = False
    told: BundleSummary | None = None


@dataclass(frozen=True, slots=True)
class AboutGroup:
    """The context of a question to the control store about a placement group."""

    group_id: PlacementGroupId


class BundleTable:
    """All bundles of one node; their amounts are kept in the table of leases. What is to be asked is in ``effects``."""

    def __init__(self, node_id: NodeId, subjects: Subjects, leases: LeaseTable) -> None:
        self.effects: list[Effect] = []
        self._node_id = node_id
        self._subjects = subjects
        self._leases = leases
        self._groups: dict[PlacementGroupId, dict[int, Reserved]] = {}
        self._removed: dict[PlacementGroupId, None] = {}
        self._asked_at: dict[PlacementGroupId, float] = {}

    def __iter__(self) -> Iterator[Reserved]:
        for bundles in self._groups.values():
            yield from bundles.values()

    def __len__(self) -> int:
        return self._leases.count_reserved()

    # ------------------------------------------------------------------------------- what schedulers ask

    def prepare(self, request: PrepareBundles, now: float) -> str:
        """Reserve bundles for a plan, all or none; return why not, empty where they are reserved."""
        group = request.group_id
        if group in self._removed:
            return f"placement group {group} was removed"
        mine = self._groups.get(group, {})
        new = [Bundle(group, index) for index in request.bundles if index not in mine]
        for number, bundle in enumerate(new):
            if not self._leases.reserve(bundle, request.bundles[bundle.index]):
                for done in new[:number]:
                    self._leases.release(done)
                return f"bundle {bundle.index} does not fit: only {to_amounts(self._leases.free)} is free"
        if new:
            mine = self._groups.setdefault(group, mine)
            mine.update((bundle.index, Reserved(bundle, request.job_id)) for bundle in new)
        for index in request.bundles:
            mine[index].plans[request.plan] = (request.attempt, now)
        return ""

    def give_back(self, request: ReturnBundles) -> bool:
        """A scheduler will not ask for the commit of a plan; tell whether anything is free now."""
        freed = False
        for reserved in list(self._groups.get(request.group_id, {}).values()):
            if reserved.plans.pop(request.plan, None) is not None:
                freed = self._release_if_unwanted(reserved) or freed
        return freed

    # ------------------------------------------------------------------------------- what is heard of records

    def changed(self, news: GroupChanged) -> list[Lease] | None:
        """Take in what is said of a record: return the leases that must end; None where nothing changed here."""
        return self._learn(news.group_id, news.state, news.attempt, news.nodes)

    def answered(self, answered: Answered) -> list[Lease] | None:
        """Take in the answer to a question; what was not answered is asked again in time."""
        group: PlacementGroupId = answered.context.group_id
        answer = answered.answer
        if isinstance(answer, GroupRecord):
            return self._learn(group, answer.state, answer.attempt, answer.nodes)
        if isinstance(answer, NotFoundError):
            return self._learn(group, GroupState.REMOVED, 0, [])
        return None

    def _learn(
        self, group: PlacementGroupId, state: GroupState, attempt: int, nodes: Sequence[NodeId | None]
    ) -> list[Lease] | None:
        if state is GroupState.REMOVED:
            self._removed[group] = None
            if len(self._removed) > MOST_REMOVED:
                del self._removed[next(iter(self._removed))]
        bundles = list(self._groups.get(group, {}).values())
        leases: list[Lease] = []
        moved = False
        for reserved in bundles:
            index = reserved.bundle.index
            if state is GroupState.REMOVED:
                leases += self._release(reserved)
                moved = True
            elif index < len(nodes) and nodes[index] == self._node_id:
                moved = moved or not reserved.committed
                reserved.committed = True
                reserved.plans.clear()
                self._leases.open(reserved.bundle)
            else:
                asked = reserved.plans.items()
                reserved.plans = {plan: (tried, at) for plan, (tried, at) in asked if tried > attempt}
                moved = self._release_if_unwanted(reserved) or moved
        return leases if moved else None

    def _release_if_unwanted(self, reserved: Reserved) -> bool:
        if reserved.committed or reserved.plans:
            return False
        self._release(reserved)
        return True

    def _release(self, reserved: Reserved) -> list[Lease]:
        bundles = self._groups[reserved.bundle.group]
        del bundles[reserved.bundle.index]
        if not bundles:
            del self._groups[reserved.bundle.group]
            self._asked_at.pop(reserved.bundle.group, None)
        return self._leases.release(reserved.bundle)

    # ------------------------------------------------------------------------------- time

    def tick(self, now: float) -> None:
        """Ask about those groups of which nothing was heard for long."""
        for group, bundles in self._groups.items():
            old = [
                (attempt, reserved.job_id)
                for reserved in bundles.values()
                if not reserved.committed
                for attempt, at in reserved.plans.values()
                if now - at >= DOUBT_SECONDS
            ]
            if old and now - self._asked_at.get(group, float("-inf")) >= REPEAT_SECONDS:
                self._asked_at[group] = now
                subject = self._subjects.gcs_from_node("abandon_group")
                attempt, job_id = max(old)
                message = AbandonGroup(group_id=group, job_id=job_id, attempt=attempt)
                self.effects.append(Ask(subject, message, AboutGroup(group)))

    def summaries(self) -> list[BundleSummary]:
        """Return what is announced of all bundles."""
        return list(map(self._summary, self))

    def _summary(self, reserved: Reserved) -> BundleSummary:
        pool, told = self._leases.pool(reserved.bundle), reserved.told
        if told is None or told.committed is not reserved.committed or told.free != pool.free:
            told = reserved.told = BundleSummary(
                group_id=reserved.bundle.group,
                index=reserved.bundle.index,
                job_id=reserved.job_id,
                total=pool.total,
                free=pool.free,
                committed=reserved.committed,
            )
        return told

    def sanity_check(self) -> None:
        """State the invariants."""
        assert {reserved.bundle for reserved in self} == self._leases.reserved(), "what is reserved is accounted for"
        for group, bundles in self._groups.items():
            assert bundles, "no group is kept without a bundle"
            assert group not in self._removed, "nothing is kept for a group that was removed"
        for reserved in self:
            assert reserved.committed or reserved.plans, "what nobody wants is free"
            assert self._leases.pool(reserved.bundle).open == reserved.committed
