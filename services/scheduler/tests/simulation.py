"""Replicas of the scheduler among nodes and owners, on a network that a test may make bad, under a virtual clock.

Nodes and owners are small models. A node grants what is truly free, and repeats its answer to a slot that it knows; its
words to owners (and back) go by a channel that loses nothing. It reserves what is free for bundles of groups, and hears
of their records, which the world keeps, by such a channel, too. An owner keeps a queue of tasks for each key, asks for
as many leases as it could use, and gives back what it cannot. Everything else may be lost, late, doubled and out of
order.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from shoal_core.protocol.effects import Answered, Ask, Effect, Event, Publish, Reply, Request, WakeAt
from shoal_core.protocol.errors import DeclaredDeadError, RequestTimeoutError, ShoalError
from shoal_core.protocol.groups import (
    BundlesPrepared,
    CommitGroup,
    GroupChanged,
    GroupDemand,
    GroupRecord,
    GroupState,
    PrepareBundles,
    ReturnBundles,
)
from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId, ProcessId, ServiceId, SlotId
from shoal_core.protocol.messages import (
    Demand,
    DemandEntry,
    DemandNotice,
    Done,
    GetPending,
    JobTerms,
    LeaseAnswer,
    LeaseRequest,
    LeaseSummary,
    Message,
    NodeAnnouncement,
    NodeDied,
    PendingList,
    RecallLeases,
    SchedulerPresence,
)
from shoal_core.protocol.placement import DEFAULT, Strategy
from shoal_core.protocol.resources import Resources, add, fits, subtract
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.core import Begin, Scheduler

CPU = 10_000
SUBJECTS = Subjects("test")
ENDLESS = 10**9
NO_TERMS = JobTerms()


def job_id(number: int) -> JobId:
    """Return the id of a test's ``number``-th job."""
    return JobId(f"{number:08x}")


def cpus(count: float) -> Resources:
    """Return an amount of CPUs."""
    return {"CPU": round(count * CPU)}


@dataclass
class Network:
    """How messages fare."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.002


@dataclass(eq=False)
class Lease:
    """A lease, at its node and at its owner."""

    node: NodeModel
    owner: OwnerModel
    key: int
    slot: SlotId
    resources: Resources
    recalled: bool = False
    over: bool = False


class NodeModel:
    """A node that grants what is free."""

    def __init__(self, world: World, number: int, total: Resources) -> None:
        self.world = world
        self.node_id = node_id(number)
        self.total = total
        self.free = dict(total)
        self.leases: list[Lease] = []
        self.granted: set[tuple[ProcessId, SlotId]] = set()
        self.reserved: dict[tuple[PlacementGroupId, int], tuple[Resources, set[str]]] = {}
        self.askers: dict[tuple[ProcessId, SlotId], set[str]] = {}
        self.alive = True
        self.draining = False
        self._sequence = 0
        self._announce_is_due = False
        self._announce_every_second()

    def answer(self, request: Message) -> Message:
        """Answer what a scheduler asks."""
        match request:
            case LeaseRequest():
                return self.lease(request)
            case RecallLeases():
                return self.recall(request)
            case PrepareBundles():
                return self.prepare(request)
            case ReturnBundles():
                return self.return_bundles(request)
        raise AssertionError(request)

    def lease(self, request: LeaseRequest) -> LeaseAnswer:
        """Grant what fits; repeat the answer to what was granted before."""
        granted: list[SlotId] = []
        owner = self.world.owners[request.owner]
        for slot in request.slots:
            self.askers.setdefault((request.owner, slot), set()).add(request.scheduler)
            known = (request.owner, slot) in self.granted
            if not known and fits(request.resources, self.free):
                lease = Lease(self, owner, request.key, slot, request.resources)
                self.leases.append(lease)
                self.granted.add((request.owner, slot))
                self.free = subtract(self.free, request.resources)
                self.world.channel(lambda lease=lease: owner.has_been_granted(lease))  # type: ignore[misc]
                known = True
            if known:
                granted.append(slot)
        self._check()
        self._announce_soon()
        refused = [slot for slot in request.slots if slot not in granted]
        return LeaseAnswer(
            node_id=self.node_id, granted=granted, refused=refused, free=self.free, sequence=self._sequence
        )

    def recall(self, request: RecallLeases) -> Done:
        """Ask an owner for its newest leases back."""
        candidates = [
            lease
            for lease in reversed(self.leases)
            if lease.owner.owner == request.owner and lease.resources == request.resources and not lease.recalled
        ]
        for lease in candidates[: request.count]:
            lease.recalled = True
            self.world.channel(lambda lease=lease: lease.owner.has_been_recalled(lease))  # type: ignore[misc]
        self._announce_soon()
        return Done()

    def has_been_returned(self, lease: Lease) -> None:
        """Take a lease back."""
        if self.alive:
            self.leases.remove(lease)
            self.free = add(self.free, lease.resources)
            self._check()
            self._announce_soon()

    def prepare(self, request: PrepareBundles) -> BundlesPrepared:
        """Reserve bundles, all or none; what is reserved already is so once for all plans."""
        new = {index: r for index, r in request.bundles.items() if (request.group_id, index) not in self.reserved}
        together: Resources = {}
        for resources in new.values():
            together = add(together, resources)
        granted = fits(together, self.free)
        if granted:
            self.free = subtract(self.free, together)
            for index, resources in request.bundles.items():
                self.reserved.setdefault((request.group_id, index), (resources, set()))[1].add(request.plan)
        self._check()
        self._announce_soon()
        return BundlesPrepared(node_id=self.node_id, granted=granted, free=self.free, sequence=self._sequence)

    def return_bundles(self, request: ReturnBundles) -> Done:
        """Give back what only this plan wanted."""
        for (group, index), (_, plans) in list(self.reserved.items()):
            if group == request.group_id:
                plans.discard(request.plan)
                if not plans:
                    self._free_bundle(group, index)
        return Done()

    def record_changed(self, record: GroupRecord) -> None:
        """Keep the bundles for which the record names this node, and no others of the group."""
        group = record.description.group_id
        for other, index in list(self.reserved):
            if other == group and record.nodes[index] != self.node_id:
                self._free_bundle(group, index)

    def _free_bundle(self, group: PlacementGroupId, index: int) -> None:
        self.free = add(self.free, self.reserved.pop((group, index))[0])
        self._check()
        self._announce_soon()

    def die(self) -> None:
        """End with all leases; their owners get their tasks back."""
        self.alive = False
        for lease in self.leases:
            self.world.channel(lambda lease=lease: lease.owner.has_lost(lease))  # type: ignore[misc]
        self.leases = []

    def _check(self) -> None:
        used: Resources = {}
        for lease in self.leases:
            used = add(used, lease.resources)
        for resources, _ in self.reserved.values():
            used = add(used, resources)
        assert fits(used, self.total), "a node never promises more than it has"
        assert add(used, self.free) == add(self.total, {})

    def _announce_soon(self) -> None:
        if not self._announce_is_due:
            self._announce_is_due = True
            self.world.after(0.02, self._announce)

    def _announce_every_second(self) -> None:
        if self.alive:
            self._announce()
            self.world.after(1.0, self._announce_every_second)

    def _announce(self) -> None:
        self._announce_is_due = False
        if not self.alive:
            return
        self._sequence += 1
        groups: dict[tuple[ProcessId, tuple[tuple[str, int], ...]], list[Lease]] = {}
        for lease in self.leases:
            groups.setdefault((lease.owner.owner, tuple(lease.resources.items())), []).append(lease)
        announcement = NodeAnnouncement(
            node_id=self.node_id,
            sequence=self._sequence,
            total=self.total,
            free=self.free,
            draining=self.draining,
            leases=[
                LeaseSummary(
                    owner=owner,
                    job_id=leases[0].owner.job_id,
                    resources=dict(resources),
                    count=len(leases),
                    recalled=sum(lease.recalled for lease in leases),
                )
                for (owner, resources), leases in groups.items()
            ],
        )
        self.world.broadcast(announcement, self.node_id)


@dataclass(eq=False)
class Queue:
    """The tasks of one scheduling key."""

    key: int
    resources: Resources
    waiting: int
    seconds: float
    depth: int = 0
    strategy: Strategy = DEFAULT
    most_slots: int = 64
    slots: list[SlotId] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    first_lease_at: float | None = None


class OwnerModel:
    """An owner that repeats what it wants, and gives back what it does not."""

    def __init__(self, world: World, number: int, queues: list[Queue], job: int, terms: JobTerms) -> None:
        self.world = world
        self.owner = process_id(number, 0)
        self.job_id = job_id(job)
        self.terms = terms
        self.queues = {queue.key: queue for queue in queues}
        self.surplus = 0
        self._version = 0
        self._slots = 0
        self._stated: list[tuple[int, list[SlotId]]] = []
        self._state_is_due = False
        self._repeat()

    @property
    def leases(self) -> int:
        """How many leases it holds."""
        return sum(len(queue.leases) for queue in self.queues.values())

    @property
    def unfinished(self) -> int:
        """How many tasks wait or run."""
        return sum(queue.waiting + len(queue.leases) for queue in self.queues.values())

    def has_been_granted(self, lease: Lease) -> None:
        """Use a lease, or give it back at once."""
        queue = self.queues[lease.key]
        if lease.slot not in queue.slots:
            self.surplus += 1
            self._give_back(lease)
            return
        queue.slots.remove(lease.slot)
        queue.leases.append(lease)
        if queue.first_lease_at is None:
            queue.first_lease_at = self.world.now
        self._next_task(queue, lease)

    def has_been_recalled(self, lease: Lease) -> None:
        """Others wait: the lease goes back after the task that runs."""
        lease.recalled = True

    def has_lost(self, lease: Lease) -> None:
        """A lease's node died: its task is queued again."""
        queue = self.queues[lease.key]
        lease.over = True
        if lease in queue.leases:
            queue.leases.remove(lease)
            queue.waiting += 1
        self._want(queue)

    def _next_task(self, queue: Queue, lease: Lease) -> None:
        if lease.over:
            return
        if not queue.waiting or lease.recalled:
            queue.leases.remove(lease)
            self._give_back(lease)
        else:
            queue.waiting -= 1
            self.world.after(queue.seconds, lambda: self._next_task(queue, lease))
        self._want(queue)

    def _give_back(self, lease: Lease) -> None:
        lease.over = True
        self.world.channel(lambda: lease.node.has_been_returned(lease))

    def _want(self, queue: Queue) -> None:
        missing = min(queue.waiting, queue.most_slots)
        while len(queue.slots) < missing:
            self._slots += 1
            queue.slots.append(SlotId(self._slots))
        if not queue.waiting:
            queue.slots.clear()
        if not self._state_is_due and self._to_state() != self._stated:
            self._state_is_due = True
            self.world.after(0.001, self._state)

    def _to_state(self) -> list[tuple[int, list[SlotId]]]:
        return [(queue.key, list(queue.slots)) for queue in self.queues.values() if queue.slots]

    def _state(self) -> None:
        self._state_is_due = False
        self._stated = self._to_state()
        self._version += 1
        entries = [
            DemandEntry(
                key=queue.key,
                name=f"f{queue.key}",
                resources=queue.resources,
                strategy=queue.strategy,
                wanted=queue.waiting,
                slots=list(queue.slots),
                depth=queue.depth,
            )
            for queue in self.queues.values()
            if queue.slots
        ]
        demand = Demand(owner=self.owner, job_id=self.job_id, version=self._version, entries=entries, terms=self.terms)
        self.world.broadcast(demand, self.owner)

    def _repeat(self) -> None:
        for queue in self.queues.values():
            self._want(queue)
        if any(queue.slots for queue in self.queues.values()):
            self._state()
        self.world.after(1.0, self._repeat)


class Replica:
    """One scheduler, and when it wants to be woken."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.identity = ServiceId(f"scheduler-{number}")
        self.core = Scheduler(SUBJECTS, self.identity)
        self.alive = True
        self._wake_at: float | None = None

    def handle(self, message: object) -> None:
        """Give the core an input."""
        if self.alive:
            self._perform(self.core.handle(message, self.world.now))

    def pending(self) -> PendingList:
        """Ask what waits."""
        (reply,) = self.core.handle(Request(GetPending(), 0), self.world.now)
        assert isinstance(reply, Reply)
        assert isinstance(reply.message, PendingList)
        return reply.message

    def _tick(self, at: float) -> None:
        if self.alive and self._wake_at == at:
            self._wake_at = None
            self._perform(self.core.tick(self.world.now))

    def _perform(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case WakeAt(at):
                    at = max(at, self.world.now)
                    if self._wake_at is None or at < self._wake_at:
                        self._wake_at = at
                        self.world.after(at - self.world.now, lambda at=at: self._tick(at))  # type: ignore[misc]
                case Publish(_, SchedulerPresence() as presence):
                    self.world.broadcast(presence, self.identity)
                case Publish(_, DemandNotice() as notice):
                    self.world.notices.append((self.identity, effect.subject.rsplit(".", 1)[1], notice))
                case Ask():
                    self._ask(effect)
                case _:
                    raise AssertionError(effect)

    def _ask(self, ask: Ask) -> None:
        """Ask a node, or for a commit; the first answer counts, or that none came in time."""
        node = next((node for node in self.world.nodes if f".{node.node_id}." in ask.subject), None)
        answered: list[bool] = []

        def settle(answer: Message | ShoalError) -> None:
            if not answered:
                answered.append(True)
                self.handle(Answered(ask.context, answer))

        def arrive() -> None:
            if node is None or node.alive:
                answer = self.world.commit(ask.message) if node is None else node.answer(ask.message)
                self.world.send(lambda: settle(answer))

        self.world.send(arrive)
        self.world.after(ask.timeout_seconds, lambda: settle(RequestTimeoutError("no answer")))


class World:
    """The clock, the network, and everyone on it."""

    def __init__(self, seed: int = 0, replicas: int = 1) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.network = Network()
        self.nodes: list[NodeModel] = []
        self.owners: dict[ProcessId, OwnerModel] = {}
        self.replicas: list[Replica] = []
        self.notices: list[tuple[str, str, DemandNotice]] = []
        self.groups: dict[PlacementGroupId, GroupRecord] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._started = 0
        for _ in range(replicas):
            self.start()

    def start(self) -> Replica:
        """Start a scheduler."""
        self._started += 1
        replica = Replica(self, self._started)
        self.replicas.append(replica)
        replica.handle(Begin())
        return replica

    def kill(self, replica: Replica) -> None:
        """End a scheduler at once."""
        replica.alive = False
        self.replicas.remove(replica)

    def add_node(self, total: Resources) -> NodeModel:
        """Start a node."""
        node = NodeModel(self, len(self.nodes) + 1, total)
        self.nodes.append(node)
        return node

    def kill_node(self, node: NodeModel) -> None:
        """End a node; the control store notices after a while."""
        node.die()
        self.after(1.0, lambda: self.broadcast(NodeDied(node_id=node.node_id, reason="killed"), "gcs"))

    def add_owner(self, *queues: Queue, job: int = 0, terms: JobTerms = NO_TERMS) -> OwnerModel:
        """Start an owner, of a job of its own if none is named."""
        number = len(self.owners) + 1
        owner = OwnerModel(self, number, list(queues), job or number, terms)
        self.owners[owner.owner] = owner
        return owner

    def add_group(self, demand: GroupDemand) -> PlacementGroupId:
        """Have a group wait; it is stated every second until it is created."""
        group = demand.description.group_id
        self.groups[group] = GroupRecord(
            description=demand.description, state=GroupState.PENDING, nodes=demand.nodes, created_at=self.now
        )
        self._state_group(group)
        return group

    def _state_group(self, group: PlacementGroupId) -> None:
        record = self.groups[group]
        if record.missing:
            demand = GroupDemand(
                description=record.description, attempt=0, nodes=record.nodes, created_at=record.created_at
            )
            self.broadcast(demand, "gcs")
            self.after(1.0, lambda: self._state_group(group))

    def commit(self, request: Message) -> Message | ShoalError:
        """Record where a group lies, if that is not recorded yet."""
        assert isinstance(request, CommitGroup)
        record = self.groups[request.group_id]
        nodes: list[NodeId | None] = [node for _, node in sorted(request.nodes.items())]
        if record.missing:
            self._record(record.model_copy(update={"state": GroupState.CREATED, "attempt": 1, "nodes": nodes}))
        elif record.nodes != nodes:
            return DeclaredDeadError("it lies elsewhere, or was removed")
        return self.groups[request.group_id]

    def remove_group(self, group: PlacementGroupId) -> None:
        """End a group."""
        record = self.groups[group]
        nowhere = [None] * len(record.nodes)
        self._record(record.model_copy(update={"state": GroupState.REMOVED, "nodes": nowhere}))

    def _record(self, record: GroupRecord) -> None:
        group = record.description.group_id
        self.groups[group] = record
        for node in self.nodes:
            self.channel(lambda node=node: node.record_changed(record))  # type: ignore[misc]
        self.broadcast(
            GroupChanged(group_id=group, state=record.state, attempt=record.attempt, nodes=record.nodes), "gcs"
        )

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen later."""
        self._count += 1
        heapq.heappush(self._events, (self.now + max(0.0, seconds), self._count, action))

    def send(self, action: Callable[[], None]) -> None:
        """Send something over the network as it is."""
        if self.random.random() < self.network.loss:
            return
        for _ in range(1 + (self.random.random() < self.network.duplication)):
            self.after(self.random.uniform(0.0001, self.network.longest_delay), action)

    def channel(self, action: Callable[[], None]) -> None:
        """Send something that is not lost."""
        self.after(0.001, action)

    def broadcast(self, message: Message, source: str) -> None:
        """Tell every scheduler of an event."""
        for replica in self.replicas:
            self.send(lambda replica=replica: replica.handle(Event(message, source)))  # type: ignore[misc]

    def run(self, seconds: float) -> None:
        """Let time pass."""
        self.run_until(lambda: False, seconds)

    def run_until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Let time pass until a condition holds; return whether it came to hold in time."""
        end = self.now + seconds
        while not condition():
            if not self._events or self._events[0][0] > end:
                self.now = end
                return condition()
            self.now, _, action = heapq.heappop(self._events)
            action()
        return True

    def is_quiet(self) -> bool:
        """Tell whether no task is left, no lease is out, and no scheduler remembers any."""
        return (
            not any(owner.unfinished for owner in self.owners.values())
            and not any(node.leases for node in self.nodes if node.alive)
            and not any(replica.core.asks or len(replica.core.demand) for replica in self.replicas)
        )
