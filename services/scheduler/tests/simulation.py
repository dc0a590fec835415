"""Replicas of the scheduler among nodes and owners, on a network that a test may make bad, under a virtual clock.

Nodes have the table of leases of real ones: they grant what is truly free, reserve it for bundles of groups, and repeat
their answer to a slot that they know; their words to owners (and back), and to them of the records of groups, which the
world keeps, go by a channel that loses nothing. An owner is a small model: it keeps a queue of tasks for each key, asks
for as many leases as it could use, and gives back what it cannot. Everything else may be lost, late, doubled and out of
order. ``bench/simulate.py`` has the same world do large workloads.
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
    GroupDemand,
    GroupRecord,
    GroupState,
    PrepareBundles,
    ReturnBundles,
    changed,
)
from shoal_core.protocol.ids import ActorId, JobId, LeaseId, NodeId, PlacementGroupId, ProcessId, ServiceId, SlotId
from shoal_core.protocol.messages import NO_TERMS, Done, JobTerms, Message, NodeAnnouncement, NodeDied
from shoal_core.protocol.placement import DEFAULT, Bundle, Strategy
from shoal_core.protocol.resources import UNIT, Resources
from shoal_core.protocol.scheduling import (
    ActorStart,
    Demand,
    DemandEntry,
    DemandNotice,
    GetPending,
    LeaseAnswer,
    LeaseRequest,
    PendingList,
    RecallLeases,
    SchedulerPresence,
)
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_scheduler.core import Begin, Scheduler
from shoal_scheduler.fairness import KEEP_SECONDS
from shoal_scheduler.waiting import PATIENCE_SECONDS
from shoal_worker.leases import Lease as NodeLease
from shoal_worker.leases import LeaseTable

WORKER = ProcessId("worker")
DOUBT_SECONDS = 4.0
"""After so long a node has the attempt ended of a plan of which it hears nothing."""
SUBJECTS = Subjects("test")
ENDLESS = 10**9


def job_id(number: int) -> JobId:
    """Return the id of a test's ``number``-th job."""
    return JobId(f"{number:08x}")


def cpus(count: float) -> Resources:
    """Return an amount of CPUs."""
    return {"CPU": round(count * UNIT)}


def longest_wait(seconds: float, jobs: int) -> float:
    """Return how long a job is without any lease at most, where none lasts for ``seconds`` after it was asked back.

    It has waited too long after PATIENCE_SECONDS (twice, if it has just been served for that reason). Then room is kept
    for it. Within one time of keeping, all leases that were there end, and each other job that has waited for longer is
    served once: that takes ``turns``. If the times of keeping are shorter than that at first, they are doubled until
    one is long enough; with the times between them, it ends within six times of what it needed (``keeps_room``).
    """
    turns = (jobs + 1) * (seconds + 1.0)
    return 2 * PATIENCE_SECONDS + (turns if turns <= KEEP_SECONDS else 6 * turns)


@dataclass
class Network:
    """How messages fare."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.002


@dataclass(eq=False)
class Lease:
    """A lease as its owner has it; ``at_node`` is the same as the node has it."""

    node: NodeModel
    owner: OwnerModel
    key: int
    slot: SlotId
    at_node: NodeLease
    recalled: bool = False
    over: bool = False


class NodeModel:
    """A node: the leases of a real one, whose processes are there at once."""

    def __init__(self, world: World, number: int, total: Resources) -> None:
        self.world = world
        self.node_id = node_id(number)
        self.table = LeaseTable(total, [f"GPU {index}" for index in range(total.get("GPU", 0) // UNIT)])
        self.leases: dict[LeaseId, Lease] = {}
        self.plans: dict[Bundle, dict[str, int]] = {}
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
        self.world.asked(request)
        granted: list[SlotId] = []
        owner = self.world.owners[request.owner]
        for slot in request.slots:
            if self.table.knows(request.owner, slot) or self._grant(owner, slot, request):
                granted.append(slot)
        self._announce_soon()
        refused = [slot for slot in request.slots if slot not in granted]
        self._sequence += 1
        return LeaseAnswer(
            node_id=self.node_id, granted=granted, refused=refused, free=self.table.free, sequence=self._sequence
        )

    def _grant(self, owner: OwnerModel, slot: SlotId, request: LeaseRequest) -> bool:
        at_node = self.table.grant(
            request.owner, request.job_id, request.key, slot, request.resources, actor=request.actor is not None
        )
        if at_node is None:
            return False
        at_node.process = WORKER
        lease = self.leases[at_node.number] = Lease(self, owner, request.key, slot, at_node)
        self.world.channel(lambda: owner.has_been_granted(lease))
        return True

    def recall(self, request: RecallLeases) -> Done:
        """Ask an owner for its newest leases back."""
        for at_node in self.table.recall(request.owner, request.resources, request.count):
            lease = self.leases[at_node.number]
            self.world.channel(lambda lease=lease: lease.owner.has_been_recalled(lease))  # type: ignore[misc]
        self._announce_soon()
        return Done()

    def has_been_returned(self, lease: Lease) -> None:
        """Take a lease back."""
        if self.alive:
            del self.leases[lease.at_node.number]
            self.table.end(lease.at_node)
            self._announce_soon()

    def prepare(self, request: PrepareBundles) -> BundlesPrepared:
        """Reserve bundles, all or none; what is reserved already is so once for all plans."""
        reserved: list[Bundle] = []
        bundles = {Bundle(request.group_id, index): resources for index, resources in request.bundles.items()}
        for bundle, resources in bundles.items():
            if bundle not in self.plans and self.table.reserve(bundle, resources):
                reserved.append(bundle)
                self.plans[bundle] = {}
        granted = all(bundle in self.plans for bundle in bundles)
        for bundle in bundles if granted else ():
            self.plans[bundle][request.plan] = request.attempt
            self.world.after(DOUBT_SECONDS, lambda bundle=bundle: self._doubt(bundle, request.attempt))  # type: ignore[misc]
        for bundle in () if granted else reserved:
            self._free_bundle(bundle)
        self._announce_soon()
        self._sequence += 1
        return BundlesPrepared(node_id=self.node_id, granted=granted, free=self.table.free, sequence=self._sequence)

    def return_bundles(self, request: ReturnBundles) -> Done:
        """Give back what only this plan wanted."""
        for bundle, plans in list(self.plans.items()):
            if bundle.group == request.group_id:
                plans.pop(request.plan, None)
                if not plans:
                    self._free_bundle(bundle)
        return Done()

    def record_changed(self, record: GroupRecord) -> None:
        """Keep the bundles for which the record names this node, and those for plans whose attempts are not over."""
        group = record.description.group_id
        unnamed = [b for b in self.plans if b.group == group and record.nodes[b.index] != self.node_id]
        for bundle in unnamed:
            if record.state is not GroupState.PENDING or max(self.plans[bundle].values()) <= record.attempt:
                self._free_bundle(bundle)

    def _doubt(self, bundle: Bundle, attempt: int) -> None:
        """Nothing was heard of a plan for long: its attempt is to end."""
        if self.alive and bundle in self.plans:
            self.record_changed(self.world.abandon(bundle.group, attempt))

    def _free_bundle(self, bundle: Bundle) -> None:
        del self.plans[bundle]
        self.table.release(bundle)
        self._announce_soon()

    def die(self) -> None:
        """End with all leases; their owners get their tasks back."""
        self.alive = False
        for lease in self.leases.values():
            self.world.channel(lambda lease=lease: lease.owner.has_lost(lease))  # type: ignore[misc]
        self.leases = {}

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
        if self._sequence % self.world.check_every == 0:
            self.table.sanity_check()
        announcement = NodeAnnouncement(
            node_id=self.node_id,
            sequence=self._sequence,
            total=self.table.total,
            free=self.table.free,
            draining=self.draining,
            leases=self.table.summaries(),
            held_by_actors=self.table.held_by_actors(),
        )
        self.world.broadcast(announcement, self.node_id)


@dataclass(eq=False)
class Queue:
    """The tasks of one scheduling key. ``seconds`` is how long each takes, or draws how long the next one does.

    An actor is a queue with one task that is its life. ``slots`` maps the leases asked for to when they were.
    """

    key: int
    resources: Resources
    waiting: int
    seconds: float | Callable[[], float]
    depth: int = 0
    strategy: Strategy = DEFAULT
    most_slots: int = 64
    priority: int = 0
    is_actor: bool = False
    slots: dict[SlotId, float] = field(default_factory=dict)
    leases: list[Lease] = field(default_factory=list)
    first_lease_at: float | None = None

    def length(self) -> float:
        """Return how long the next task takes."""
        return self.seconds if isinstance(self.seconds, float | int) else self.seconds()


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
        self._stated = False
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
        asked_at = queue.slots.pop(lease.slot, None)
        if asked_at is None:
            self.surplus += 1
            self._give_back(lease)
            return
        self.world.waited(self, queue, self.world.now - asked_at)
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
            self.world.after(queue.length(), lambda: self._next_task(queue, lease))
        self._want(queue)

    def _give_back(self, lease: Lease) -> None:
        lease.over = True
        self.world.channel(lambda: lease.node.has_been_returned(lease))

    def add(self, key: int, tasks: int) -> None:
        """Queue more tasks."""
        self.queues[key].waiting += tasks
        self._want(self.queues[key])

    def _want(self, queue: Queue) -> None:
        missing = min(queue.waiting, queue.most_slots)
        if len(queue.slots) < missing or (queue.slots and not queue.waiting):
            self._state_soon()
        while len(queue.slots) < missing:
            self._slots += 1
            queue.slots[SlotId(self._slots)] = self.world.now
        if not queue.waiting:
            queue.slots.clear()

    def _state_soon(self) -> None:
        if not self._state_is_due:
            self._state_is_due = True
            self.world.after(0.001, self._state)

    def _state(self) -> None:
        self._state_is_due = False
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
                priority=queue.priority,
                actor=ActorStart(actor_id=ActorId(self.owner), incarnation=1, owner=self.owner)
                if queue.is_actor
                else None,
            )
            for queue in self.queues.values()
            if queue.slots
        ]
        self._stated = bool(entries)
        demand = Demand(owner=self.owner, job_id=self.job_id, version=self._version, entries=entries, terms=self.terms)
        self.world.broadcast(demand, self.owner)

    def _repeat(self) -> None:
        for queue in self.queues.values():
            self._want(queue)
        if self._stated or any(queue.slots for queue in self.queues.values()):
            self._state()
        self.world.after(1.0, self._repeat)


class Replica:
    """One scheduler, when it wants to be woken, and how long it has been deciding by the world's timer."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.identity = ServiceId(f"scheduler-{number}")
        self.core = Scheduler(SUBJECTS, self.identity)
        self.alive = True
        self.seconds = 0.0
        self._wake_at: float | None = None

    def handle(self, message: object) -> None:
        """Give the core an input."""
        if self.alive:
            began_at = self.world.timer()
            effects = self.core.handle(message, self.world.now)
            self.seconds += self.world.timer() - began_at
            self._perform(effects)

    def pending(self) -> PendingList:
        """Ask what waits."""
        (reply,) = self.core.handle(Request(GetPending(), 0), self.world.now)
        assert isinstance(reply, Reply)
        assert isinstance(reply.message, PendingList)
        return reply.message

    def _tick(self, at: float) -> None:
        if self.alive and self._wake_at == at:
            self._wake_at = None
            began_at = self.world.timer()
            effects = self.core.tick(self.world.now)
            self.seconds += self.world.timer() - began_at
            self._perform(effects)

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
        node = self.world.node_at(ask.subject)
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
        self.check_every = 1
        """So many announcements of a node apart its table of leases is checked."""
        self.timer: Callable[[], float] = lambda: 0.0
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

    def node_at(self, subject: str) -> NodeModel | None:
        """Return the node that is asked on a subject; None: no node is."""
        return next((self.nodes[int(part, 16) - 1] for part in subject.split(".") if len(part) == 16), None)

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
                description=record.description,
                attempt=record.attempt,
                nodes=record.nodes,
                created_at=record.created_at,
            )
            self.broadcast(demand, "gcs")
            self.after(1.0, lambda: self._state_group(group))

    def commit(self, request: Message) -> Message | ShoalError:
        """Record where a group lies, if that is not recorded yet."""
        assert isinstance(request, CommitGroup)
        record = self.groups[request.group_id]
        nodes: list[NodeId | None] = [node for _, node in sorted(request.nodes.items())]
        if record.missing and request.attempt > record.attempt:
            created = {"state": GroupState.CREATED, "attempt": request.attempt, "nodes": nodes}
            self._record(record.model_copy(update=created))
        elif record.nodes != nodes:
            return DeclaredDeadError("it lies elsewhere, or was removed")
        return changed(self.groups[request.group_id])

    def abandon(self, group: PlacementGroupId, attempt: int) -> GroupRecord:
        """End an attempt, if the group was not created meanwhile; return the record."""
        record = self.groups[group]
        if record.missing and attempt > record.attempt:
            self.groups[group] = record = record.model_copy(update={"attempt": attempt})
        return record

    def remove_group(self, group: PlacementGroupId) -> None:
        """End a group."""
        record = self.groups[group]
        nowhere = [None] * len(record.nodes)
        self._record(record.model_copy(update={"state": GroupState.REMOVED, "nodes": nowhere}))

    def _record(self, record: GroupRecord) -> None:
        group = record.description.group_id
        self.groups[group] = record
        self.group_changed(record)
        for node in self.nodes:
            if any(bundle.group == group for bundle in node.plans):
                self.channel(lambda node=node: node.record_changed(record))  # type: ignore[misc]
        self.broadcast(changed(record), "gcs")

    def group_changed(self, record: GroupRecord) -> None:
        """Hear that a group was created or removed."""

    def asked(self, request: LeaseRequest) -> None:
        """Hear what a node is asked for."""

    def waited(self, owner: OwnerModel, queue: Queue, seconds: float) -> None:
        """Hear how long a lease took from being asked for to being used."""

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
