"""A cluster of the services' real cores on a bad network, under a virtual clock, for what concerns placement groups.

Control stores, schedulers and nodes speak through a network that loses, doubles, delays and reorders all that it
carries; the store's leader takes writes in the order in which they arrive, and its answers may be lost. Each may
be paused or killed at any time. After every step the invariants are checked:

- a group's record only ever moves as its life allows;
- of a group that is placed every bundle is reserved on a living node that the record names, as its strategy says;
- a node never promises more than it has.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal_core.protocol.effects import (
    Answered,
    Ask,
    Changed,
    Conflict,
    Connected,
    Effect,
    Event,
    Forget,
    Load,
    Loaded,
    Publish,
    Reply,
    Request,
    Start,
    Store,
    Stored,
    WakeAt,
)
from shoal_core.protocol.errors import NotFoundError, RequestTimeoutError, ShoalError
from shoal_core.protocol.groups import (
    CreateGroup,
    GroupChanged,
    GroupDemand,
    GroupDescription,
    GroupRecord,
    GroupState,
    GroupStrategy,
    RemoveGroup,
)
from shoal_core.protocol.ids import JobId, NodeId, PlacementGroupId, ProcessId, ServiceId
from shoal_core.protocol.messages import (
    DriverAlive,
    Echo,
    JobConfig,
    JobFinished,
    Message,
    NodeAnnouncement,
    NodeDescription,
    NodeDied,
    RegisterJob,
)
from shoal_core.protocol.placement import Bundle
from shoal_core.protocol.resources import Resources, to_resources
from shoal_core.protocol.scheduling import SchedulerPresence
from shoal_core.protocol.subjects import Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_gcs.core import Begin as BeginStore
from shoal_gcs.core import ControlStore
from shoal_gcs.records import CONTROL
from shoal_scheduler.core import Begin as BeginScheduler
from shoal_scheduler.core import Scheduler
from shoal_worker.inputs import Leave
from shoal_worker.node import NodeCore

SUBJECTS = Subjects("test")
DRIVER = process_id(1, 0)
JOB = JobId("00000001")
ASK_SECONDS = 1.0


@dataclass
class Network:
    """How messages fare."""

    loss: float = 0.0
    duplication: float = 0.0
    longest_delay: float = 0.003


class Leader:
    """The store: it takes writes one by one, and says what is wrong with them."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[bytes | None, int]] = {}
        self.groups: dict[PlacementGroupId, GroupRecord] = {}
        self._last = 0

    def get(self, key: str) -> tuple[bytes | None, int]:
        """Return what a key holds; a deleted one holds nothing."""
        value, revision = self.held.get(key, (None, 0))
        return (None, 0) if value is None else (value, revision)

    def change(self, store: Store) -> int | None:
        """Change a key if nobody else has."""
        if self.get(store.key)[1] != store.revision:
            return None
        self._last += 1
        self.held[store.key] = (store.value, self._last)
        if store.bucket == CONTROL and store.key.startswith("group."):
            self._check(PlacementGroupId(store.key.removeprefix("group.")), store.value)
        return self._last

    def _check(self, group: PlacementGroupId, value: bytes | None) -> None:
        before = self.groups.get(group)
        if value is None:
            assert before is not None
            assert before.state is GroupState.REMOVED, "only what was removed is forgotten"
            del self.groups[group]
            return
        after = self.groups[group] = GroupRecord.model_validate_json(value)
        if before is None:
            assert after.state is not GroupState.RESCHEDULING
            assert after.attempt == (after.state is GroupState.CREATED) or after.is_blank
            assert after.state is not GroupState.CREATED or None not in after.nodes, "never half a gang"
            return
        assert before.state is not GroupState.REMOVED, "an end is never undone"
        assert after.description == before.description or before.is_blank
        assert after.attempt >= before.attempt, "what is over stays over"
        if after.state is GroupState.CREATED and before.state is not GroupState.CREATED:
            assert after.attempt == before.attempt + 1
            assert None not in after.nodes, "never half a gang"
            stays = [node for node in before.nodes if node is not None]
            assert all(node in after.nodes for node in stays), "what has a place keeps it"
        if after.state is GroupState.RESCHEDULING and before.state is GroupState.CREATED:
            assert None in after.nodes


@dataclass(eq=False)
class Member:
    """One service: its core, and when it wants to be woken."""

    world: World
    identity: str
    core: Any
    alive: bool = True
    wake_at: float | None = None
    changes_at: float = 0.0
    paused_until: float = 0.0
    tokens: dict[int, Callable[[Message | ShoalError], None]] = field(default_factory=dict)

    def handle(self, message: object) -> None:
        """Give the core an input, once it is not paused."""
        if self.pauses(lambda: self.handle(message)):
            return
        if self.alive:
            self.perform(self.core.handle(message, self.world.now))

    def pauses(self, action: Callable[[], None]) -> bool:
        """Tell whether this is paused, and so does something only later."""
        left_seconds = self.paused_until - self.world.now
        if left_seconds > 0:
            self.world.after(left_seconds, action)
        return left_seconds > 0

    def request(self, message: Message, answer: Callable[[Message | ShoalError], None]) -> None:
        """Give the core a request, and say where its answer goes."""
        if self.alive:
            token = self.world.number()
            self.tokens[token] = answer
            self.handle(Request(message, token))

    def perform(self, effects: Sequence[Effect], start: int = 0) -> None:
        """Do what the engine does: at a store the rest waits for its outcome, and is dropped after a conflict."""
        for position in range(start, len(effects)):
            effect = effects[position]
            match effect:
                case Store():
                    self._store(effects, position)
                    return
                case WakeAt(at):
                    self._wake(at)
                case Reply(token, message):
                    self.tokens.pop(token)(message)
                case Publish(_, message):
                    self.world.publish(self.identity, message)
                case Ask():
                    self.world.ask(self, effect)
                case Load():
                    self._load(effect)
                case Start(command=Leave()):
                    self.world.kill(self)
                case Start() | Forget():
                    pass
                case _:
                    raise AssertionError(effect)

    def _wake(self, at: float) -> None:
        at = max(at, self.world.now)
        if self.wake_at is None or at < self.wake_at:
            self.wake_at = at
            self.world.after(at - self.world.now, lambda: self._tick(at))

    def _tick(self, at: float) -> None:
        if self.pauses(lambda: self._tick(at)):
            return
        if self.alive and self.wake_at == at:
            self.wake_at = None
            self.perform(self.core.tick(self.world.now))

    def _store(self, effects: Sequence[Effect], position: int) -> None:
        """Write neighbours together; where the leader's answer is lost, what it holds is read."""
        end = position
        outcomes: dict[int, Stored | Conflict] = {}
        while end < len(effects) and isinstance(effects[end], Store):
            end += 1
        for index in range(position, end):
            store = effects[index]
            assert isinstance(store, Store)
            self._write(store, lambda outcome, index=index: settle(index, outcome))  # type: ignore[misc]

        def settle(index: int, outcome: Stored | Conflict) -> None:
            outcomes[index] = outcome
            if len(outcomes) == end - position and self.alive:
                for number in sorted(outcomes):
                    self.handle(outcomes[number])
                if all(isinstance(outcome, Stored) for outcome in outcomes.values()):
                    self.perform(effects, end)

    def _write(self, store: Store, settle: Callable[[Stored | Conflict], None]) -> None:
        world = self.world

        def at_leader() -> None:
            revision = world.leader.change(store)
            if revision is not None:
                world.tell_watches(store.key, store.value, revision)
            if revision is None or world.random.random() < world.network.loss:
                world.after(world.delay(), read_again)
            else:
                held = revision if store.value is not None else 0
                stored = Stored(store.key, store.value, held, store.context, store.bucket)
                world.after(world.delay(), lambda: settle(stored))

        def read_again() -> None:
            value, revision = world.leader.get(store.key)
            kind = Stored if revision != store.revision and value == store.value else Conflict
            settle(kind(store.key, value, revision, store.context, store.bucket))

        world.after(world.delay(), at_leader)

    def _load(self, load: Load) -> None:
        def at_leader() -> None:
            value, revision = self.world.leader.get(load.key)
            loaded = Loaded(load.key, value, revision, load.context, load.bucket)
            self.world.after(self.world.delay(), lambda: self.handle(loaded))

        self.world.after(self.world.delay(), at_leader)


class World:
    """The clock, the network, the store's leader, and everyone around it."""

    def __init__(self, seed: int, *, stores: int = 2, schedulers: int = 2, nodes: Sequence[int] = (4, 4)) -> None:
        self.now = 100.0
        self.random = random.Random(seed)
        self.network = Network()
        self.leader = Leader()
        self.stores: list[Member] = []
        self.schedulers: list[Member] = []
        self.nodes: dict[NodeId, Member] = {}
        self.created = 0
        self.unwanted: set[PlacementGroupId] = set()
        self.driver_lives = True
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._nodes_started = 0
        for _ in range(stores):
            self.start_store()
        for _ in range(schedulers):
            self.start_scheduler()
        self.request(self._open_job())
        self._live()
        for cpus in nodes:
            self.start_node(cpus)
        self.run(1.5)

    def number(self) -> int:
        """Draw the next number."""
        self._count += 1
        return self._count

    # ------------------------------------------------------------------------------- who lives

    def start_store(self) -> None:
        """Start a control store."""
        identity = ServiceId(f"store-{self.number()}")
        store = Member(self, identity, ControlStore(SUBJECTS, identity, "session", "0.1.0"))
        self.stores.append(store)
        for key, (value, revision) in self.leader.held.items():
            store.handle(Changed(key, value, revision))
        store.handle(BeginStore())

    def start_scheduler(self) -> None:
        """Start a scheduler."""
        identity = ServiceId(f"scheduler-{self.number()}")
        scheduler = Member(self, identity, Scheduler(SUBJECTS, identity))
        self.schedulers.append(scheduler)
        scheduler.handle(BeginScheduler())

    def start_node(self, cpus: int) -> None:
        """Start a node, which joins as soon as it is heard."""
        self._nodes_started += 1
        about = NodeDescription(
            node_id=node_id(self._nodes_started),
            hostname="host",
            address="127.0.0.1",
            machine_id="machine",
            pid=1,
            total=to_resources({"CPU": cpus}),
            shared_memory_path="/nowhere",
            object_store_bytes=1,
            version="0.1.0",
            python_version="3.11",
            started_at=self.now,
        )
        node = Member(self, about.node_id, NodeCore(about, SUBJECTS))
        self.nodes[about.node_id] = node
        self.request(about, lambda: node.handle(Connected(True)))

    def kill(self, member: Member) -> None:
        """End a service at once; what it has sent may still arrive."""
        member.alive = False
        for members in (self.stores, self.schedulers):
            if member in members:
                members.remove(member)

    def living_nodes(self) -> list[Member]:
        """Return the nodes that were not killed."""
        return [node for node in self.nodes.values() if node.alive]

    # ------------------------------------------------------------------------------- what is wanted

    @staticmethod
    def _open_job() -> RegisterJob:
        return RegisterJob(
            driver=DRIVER,
            hostname="host",
            machine_id="machine",
            pid=1,
            entrypoint="program.py",
            version="0.1.0",
            python_version="3.11",
            config=JobConfig(namespace="n"),
        )

    def _live(self) -> None:
        """The driver gives signs of life, so that its job goes on."""
        if self.driver_lives:
            self.publish(DRIVER, DriverAlive(job_id=JOB, driver=DRIVER))
        self.after(1.0, self._live)

    def create(self, strategy: GroupStrategy, cpus: Sequence[int], name: str = "") -> PlacementGroupId:
        """Ask for a group until that is answered."""
        about = self.describe(strategy, cpus, name)
        self.request(CreateGroup(description=about, placed_first=not name))
        return about.group_id

    def describe(self, strategy: GroupStrategy, cpus: Sequence[int], name: str = "") -> GroupDescription:
        """Return what the driver says of its next group."""
        self.created += 1
        return GroupDescription(
            group_id=PlacementGroupId(f"{DRIVER}{self.created:08x}"),
            job_id=JOB,
            owner=ProcessId(DRIVER),
            name=name,
            bundles=[to_resources({"CPU": amount}) for amount in cpus],
            strategy=strategy,
        )

    def remove(self, group: PlacementGroupId) -> None:
        """Ask for a group's end until that is answered."""
        self.unwanted.add(group)
        self.request(RemoveGroup(group_id=group, reason="told to"))

    def request(self, message: Message, then: Callable[[], None] = lambda: None) -> None:
        """Ask the control store something until it has done it; what is asked for too early is not found yet."""
        done: list[bool] = []

        def once() -> None:
            if not done:
                self.to_store(message, answered)
                self.after(ASK_SECONDS, once)

        def answered(answer: Message | ShoalError) -> None:
            if not done and not isinstance(answer, RequestTimeoutError | NotFoundError):
                done.append(True)
                then()

        once()

    def state(self, group: PlacementGroupId) -> GroupState | None:
        """Return a group's state, None while there is no record of it."""
        record = self.leader.groups.get(group)
        return None if record is None else record.state

    # ------------------------------------------------------------------------------- the network

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have something happen later."""
        heapq.heappush(self._events, (self.now + max(0.0, seconds), self.number(), action))

    def delay(self) -> float:
        """Draw how long a message takes."""
        return self.random.uniform(0.0001, self.network.longest_delay)

    def send(self, action: Callable[[], None]) -> None:
        """Send something over the network as it is."""
        if self.random.random() < self.network.loss:
            return
        for _ in range(1 + (self.random.random() < self.network.duplication)):
            self.after(self.delay(), action)

    def to_store(self, message: Message, answer: Callable[[Message | ShoalError], None], only: str = "") -> None:
        """Send a request to one of the control stores; to ``only`` one, where it is named."""
        stores = [store for store in self.stores if only in ("", store.identity)]
        if stores:
            store = self.random.choice(stores)
            self.send(lambda: store.request(message, lambda reply: self.send(lambda: answer(reply))))

    def ask(self, asker: Member, ask: Ask) -> None:
        """Carry a request; the first answer counts, or that none came in time."""
        answered: list[bool] = []

        def settle(answer: Message | ShoalError) -> None:
            if not answered:
                answered.append(True)
                asker.handle(Answered(ask.context, answer))

        tokens = ask.subject.split(".")
        if tokens[2] == "gcs":
            only = tokens[4] if tokens[3] == "replica" else ""
            self.to_store(ask.message, settle, only)
        elif (node := self.nodes.get(NodeId(tokens[3]))) is not None:
            self.send(lambda: node.request(ask.message, lambda reply: self.send(lambda: settle(reply))))
        self.after(ask.timeout_seconds, lambda: settle(RequestTimeoutError("no answer")))

    def publish(self, source: str, message: Message) -> None:
        """Carry an event to everyone who listens to its kind."""
        nodes, stores, schedulers = self.living_nodes(), self.stores, self.schedulers
        match message:
            case NodeAnnouncement():
                hearers = [*stores, *schedulers]
            case DriverAlive():
                hearers = stores
            case GroupDemand() | SchedulerPresence():
                hearers = schedulers
            case GroupChanged() | NodeDied() | JobFinished():
                hearers = [*nodes, *schedulers]
            case Echo():
                hearers = [store for store in stores if store.identity == source]
            case _:
                hearers = []
        for hearer in hearers:
            self.send(lambda hearer=hearer: hearer.handle(Event(message, source)))  # type: ignore[misc]

    def tell_watches(self, key: str, value: bytes | None, revision: int) -> None:
        """Tell each control store of a change, in order."""
        for store in self.stores:
            store.changes_at = max(store.changes_at, self.now + self.delay())
            change = Changed(key, value, revision)
            self.after(store.changes_at - self.now, lambda store=store, change=change: store.handle(change))  # type: ignore[misc]

    # ------------------------------------------------------------------------------- time

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
            self.check()
        return True

    def reserved(self) -> int:
        """Return how many bundles are reserved on living nodes."""
        return sum(len(node.core.bundles) for node in self.living_nodes())

    def check(self) -> None:
        """State the invariants."""
        for node in self.living_nodes():
            node.core.leases.sanity_check()
            node.core.bundles.sanity_check()
        for record in self.leader.groups.values():
            self._check_group(record)

    def _check_group(self, record: GroupRecord) -> None:
        about = record.description
        placed = [node for node in record.nodes if node is not None]
        for index, identity in enumerate(record.nodes):
            node = None if identity is None else self.nodes[identity]
            if node is not None and node.alive:
                total: Resources = node.core.leases.pool(Bundle(about.group_id, index)).total
                assert total == about.bundles[index], "what the record says is there is there"
        if about.strategy is GroupStrategy.STRICT_SPREAD:
            assert len(set(placed)) == len(placed)
        if about.strategy is GroupStrategy.STRICT_PACK:
            assert len(set(placed)) <= 1
