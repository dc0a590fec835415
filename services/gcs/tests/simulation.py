"""Replicas of the control store around a simulated store, with every delay, loss and crash under a test's control.

What can happen next is a list of steps; whoever runs the simulation picks. A step performs one effect of one replica,
moves one store or load a stage further, or delivers one event or one change of a watched key. A replica's lists of
effects go on as the engine performs them: at a store the rest waits for its outcome, and is dropped after a conflict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal_core.protocol.effects import (
    Changed,
    Conflict,
    Effect,
    Event,
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
from shoal_core.protocol.errors import ShoalError
from shoal_core.protocol.ids import JobId, NodeId, ServiceId
from shoal_core.protocol.messages import Echo, JobFinished, JobState, Message, NodeAnnouncement, NodeDied, NodeState
from shoal_core.protocol.subjects import Subjects
from shoal_gcs.core import Begin, ControlStore, Purged, PurgeFunctions
from shoal_gcs.records import CLUSTER_KEY, CONTROL, FUNCTIONS, StoredJob, StoredNode, function_prefix, job_id

Name = tuple[str, str]
Step = Callable[[], None]
Fate = Literal["answered", "lost", "lost answer", "late"]
NOTHING: tuple[bytes | None, int] = (None, 0)


class SimulatedStore:
    """The buckets: each change is a compare-and-set at the leader, and must be one that the records allow."""

    def __init__(self) -> None:
        self.held: dict[Name, tuple[bytes | None, int]] = {}
        self.changes: list[tuple[Name, bytes | None, int]] = []
        self._last = 0

    def get(self, name: Name) -> tuple[bytes | None, int]:
        """Return what a key holds; a deleted one holds nothing."""
        value, revision = self.held.get(name, NOTHING)
        return NOTHING if value is None else (value, revision)

    def change(self, store: Store) -> int | None:
        """Change a key if nobody else has; return the new revision."""
        name = (store.bucket, store.key)
        if self.get(name)[1] != store.revision:
            return None
        if store.bucket == CONTROL:
            self._check(store.key, self.get(name)[0], store.value)
        self._last += 1
        self.held[name] = (store.value, self._last)
        self.changes.append((name, store.value, self._last))
        return self._last

    def purge(self, prefix: str) -> None:
        """Delete functions and leave no trace."""
        for name in [name for name in self.held if name[0] == FUNCTIONS and name[1].startswith(prefix)]:
            del self.held[name]

    def nodes(self) -> dict[str, StoredNode]:
        """Return the records of all nodes, by key."""
        return {key: StoredNode.model_validate_json(value) for key, value in self._control("node.")}

    def jobs(self) -> dict[str, StoredJob]:
        """Return the records of all jobs, by key."""
        return {key: StoredJob.model_validate_json(value) for key, value in self._control("job.")}

    def functions(self) -> list[str]:
        """Return the keys of all parts of functions."""
        return [key for (bucket, key), (value, _) in self.held.items() if bucket == FUNCTIONS and value is not None]

    def _control(self, prefix: str) -> list[tuple[str, bytes]]:
        return [
            (key, value)
            for (bucket, key), (value, _) in self.held.items()
            if bucket == CONTROL and key.startswith(prefix) and value is not None
        ]

    def _check(self, key: str, before: bytes | None, after: bytes | None) -> None:
        """Hold a change to what records may become."""
        assert after is not None, "nothing is ever deleted"
        if key == CLUSTER_KEY:
            assert before is None, "the session is drawn once"
        elif key.startswith("node."):
            new = StoredNode.model_validate_json(after)
            if before is None:
                assert new.record.state is NodeState.ALIVE
                return
            old = StoredNode.model_validate_json(before)
            assert new.record.description == old.record.description
            assert new.record.state is NodeState.DEAD, "a change of a node's record is its death, or comes after it"
            assert old.record.state is NodeState.ALIVE or (new.record == old.record and new.told)
        elif key.startswith("job."):
            job = StoredJob.model_validate_json(after)
            if before is None:
                assert key == f"job.{job_id(len(self.jobs()) + 1)}", "jobs are numbered without gaps"
                assert job.record.driver not in {other.record.driver for other in self.jobs().values()}
                return
            opened = StoredJob.model_validate_json(before)
            assert job.record.state is not JobState.RUNNING
            assert opened.record.state is JobState.RUNNING or (job.record == opened.record and job.told)


@dataclass(eq=False)
class StoreWork:
    """A store under way, as ``service.stores`` carries it out."""

    store: Store
    uncertain: bool = False
    conflicted: bool = False
    outcome: Stored | Conflict | None = None

    def settle(self, value: bytes | None, revision: int, *, stored: bool) -> None:
        kind = Stored if stored else Conflict
        self.outcome = kind(self.store.key, value, revision, self.store.context, self.store.bucket)


@dataclass(eq=False)
class LoadWork:
    """A read under way."""

    load: Load
    outcome: Loaded | None = None


@dataclass(eq=False)
class Running:
    """A list of effects that is being performed; ``stores`` are those that the rest waits for."""

    effects: Sequence[Effect]
    position: int = 0
    stores: list[StoreWork] = field(default_factory=list)


@dataclass(eq=False)
class Asked:
    """A request: where it went, when it was sent and answered (by the world's count of steps), and the answer."""

    message: Message
    replica: Replica
    sent_at: int
    answer: Message | ShoalError | None = None
    answered_at: int | None = None


class Replica:
    """One replica: its core, and all that is under way to and from it."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.identity = ServiceId(f"replica-{number}")
        self.core = ControlStore(world.subjects, self.identity, f"session-{number}", "0.1.0")
        self.running: list[Running] = []
        self.loads: list[LoadWork] = []
        self.purges: list[PurgeFunctions] = []
        self.events: deque[Event] = deque()
        self.changes: dict[str, deque[Changed]] = {}
        self.requests: dict[int, Asked] = {}
        for (bucket, key), (value, revision) in world.store.held.items():
            if bucket == CONTROL:
                self.handle(Changed(key, value, revision))
        self.handle(Begin())

    def handle(self, message: Any) -> None:
        """Give the core an input."""
        self.begin(self.core.handle(message, self.world.now))

    def tick(self) -> None:
        """Let the core's time come."""
        self.begin(self.core.tick(self.world.now))

    def begin(self, effects: Sequence[Effect]) -> None:
        if effects:
            self.running.append(Running(effects))

    def steps(self) -> list[Step]:
        """Return what can happen next here."""
        steps: list[Step] = []
        for running in self.running:
            if not running.stores:
                steps.append(lambda running=running: self._perform_next(running))  # type: ignore[misc]
            elif all(work.outcome is not None for work in running.stores):
                steps.append(lambda running=running: self._stores_are_settled(running))  # type: ignore[misc]
            for work in running.stores:
                steps += self._store_steps(work)
        for load in self.loads:
            steps.append(lambda load=load: self._move_load(load))  # type: ignore[misc]
        for purge in self.purges:
            steps.append(lambda purge=purge: self._purge(purge))  # type: ignore[misc]
        for key in self.changes:
            steps.append(lambda key=key: self._deliver_change(key, skip=False))  # type: ignore[misc]
            steps.append(lambda key=key: self._deliver_change(key, skip=True))  # type: ignore[misc]
        if self.events:
            steps.append(lambda: self.handle(self.events.popleft()))
        return steps

    def _perform_next(self, running: Running) -> None:
        effect = running.effects[running.position]
        if isinstance(effect, Store):
            # A run of neighbours goes out together.
            while running.position < len(running.effects):
                store = running.effects[running.position]
                if not isinstance(store, Store):
                    break
                running.stores.append(StoreWork(store))
                running.position += 1
            return
        running.position += 1
        if running.position == len(running.effects):
            self.running.remove(running)
        match effect:
            case Reply():
                self.world.answered(self.requests.pop(effect.token), effect.message)
            case Publish():
                self.world.published(effect, self)
            case Load():
                self.loads.append(LoadWork(effect))
            case Start(command=PurgeFunctions() as command):
                self.purges.append(command)
            case WakeAt():
                pass
            case _:
                raise AssertionError(effect)

    def _stores_are_settled(self, running: Running) -> None:
        outcomes = [work.outcome for work in running.stores]
        running.stores = []
        if running.position == len(running.effects) or not all(isinstance(outcome, Stored) for outcome in outcomes):
            self.running.remove(running)
        for outcome in outcomes:
            self.handle(outcome)

    def _store_steps(self, work: StoreWork) -> list[Step]:
        if work.outcome is not None:
            return []
        if work.uncertain:
            return [lambda: self._resolve(work)]
        if work.conflicted:
            return [lambda: self._conflict(work)]
        fates: tuple[Fate, ...] = ("answered", "answered", "answered", "lost", "lost answer", "late")
        return [lambda fate=fate: self.attempt(work, fate) for fate in fates]  # type: ignore[misc]

    def attempt(self, work: StoreWork, fate: Fate) -> None:
        """Send a store to the leader."""
        store = work.store
        if fate in ("lost", "late"):
            work.uncertain = True
            # A purge leaves no trace that could refuse a part which is still on its way; such parts are not modelled.
            if fate == "late" and store.bucket == CONTROL:
                self.world.late.append(store)
            return
        revision = self.world.store.change(store)
        if fate == "lost answer":
            work.uncertain = True
        elif revision is None:
            work.conflicted = True
        else:
            work.settle(store.value, revision if store.value is not None else 0, stored=True)

    def _conflict(self, work: StoreWork) -> None:
        """What holds the key now is read after the conflict, not with it."""
        work.settle(*self.world.store.get((work.store.bucket, work.store.key)), stored=False)

    def _resolve(self, work: StoreWork) -> None:
        store = work.store
        value, revision = self.world.store.get((store.bucket, store.key))
        if revision != store.revision:
            work.settle(value, revision, stored=value == store.value)
            return
        stored = self.world.store.change(store)
        if stored is not None:
            work.settle(store.value, stored if store.value is not None else 0, stored=True)

    def _move_load(self, work: LoadWork) -> None:
        load = work.load
        if work.outcome is None:
            work.outcome = Loaded(load.key, *self.world.store.get((load.bucket, load.key)), load.context, load.bucket)
            return
        self.loads.remove(work)
        self.handle(work.outcome)

    def _purge(self, command: PurgeFunctions) -> None:
        self.purges.remove(command)
        self.world.store.purge(function_prefix(command.job_id))
        self.handle(Purged(command.job_id))

    def _deliver_change(self, key: str, *, skip: bool) -> None:
        """Deliver a key's next change, or only its last."""
        changes = self.changes[key]
        change = changes.pop() if skip else changes.popleft()
        if skip or not changes:
            del self.changes[key]
        self.handle(change)


class World:
    """The store, the replicas and whoever asks them."""

    def __init__(self) -> None:
        self.subjects = Subjects("test")
        self.store = SimulatedStore()
        self.now = 0.0
        self.replicas: list[Replica] = []
        self.late: list[Store] = []
        self.asked: list[Asked] = []
        self.died: set[NodeId] = set()
        self.finished: set[JobId] = set()
        self.count = 0
        self._started = 0
        self._tokens = 0
        self._told = 0

    def start(self) -> Replica:
        """Start a replica with an identity of its own."""
        self._started += 1
        replica = Replica(self, self._started)
        self.replicas.append(replica)
        return replica

    def crash(self, replica: Replica) -> None:
        """End a replica at once; what it has sent may still arrive."""
        self.replicas.remove(replica)
        for running in replica.running:
            self.late += [work.store for work in running.stores if work.outcome is None]

    def ask(self, replica: Replica, message: Message) -> Asked:
        """Send a request to a replica."""
        self._tokens += 1
        self.count += 1
        asked = Asked(message, replica, self.count)
        self.asked.append(asked)
        replica.requests[self._tokens] = asked
        replica.handle(Request(message, self._tokens))
        return asked

    def settled(self, replica: Replica, message: Message) -> Message | ShoalError:
        """Send a request and let everything happen that has to; return the answer."""
        asked = self.ask(replica, message)
        self.run()
        assert asked.answer is not None
        return asked.answer

    def steps(self) -> list[Step]:
        """Return all that can happen next."""
        steps = [step for replica in self.replicas for step in replica.steps()]
        for store in self.late:
            steps.append(lambda store=store: self._arrive(store))  # type: ignore[misc]
        return steps

    def take(self, choice: int) -> None:
        """Let one of the things happen that can."""
        steps = self.steps()
        if steps:
            self.count += 1
            steps[choice % len(steps)]()
            self._tell_watches()

    def step_of(self, replica: Replica) -> None:
        """Let the first thing happen that can at one replica."""
        steps = replica.steps()
        if steps:
            self.count += 1
            steps[0]()
            self._tell_watches()

    def run(self) -> None:
        """Let everything happen that can, first things first."""
        self._tell_watches()
        while self.steps():
            self.take(0)

    def second(self, talkers: Sequence[NodeId] = ()) -> None:
        """Let a second pass: nodes announce themselves, replicas tick, and all is delivered."""
        self.now += 1.0
        for node in talkers:
            self.broadcast(announcement(node), node)
        self.run()
        for replica in self.replicas:
            replica.tick()
        self.run()

    def broadcast(self, message: Message, source: str) -> None:
        """Tell every replica of an event."""
        for replica in self.replicas:
            replica.events.append(Event(message, source))

    def published(self, effect: Publish, replica: Replica) -> None:
        match effect.message:
            case Echo():
                self.broadcast(effect.message, replica.identity)
            case NodeDied(node_id=node):
                assert self.store.nodes()[f"node.{node}"].record.state is NodeState.DEAD
                self.died.add(node)
            case JobFinished(job_id=job):
                assert self.store.jobs()[f"job.{job}"].record.state is not JobState.RUNNING
                self.finished.add(job)
            case _:
                raise AssertionError(effect)

    def answered(self, asked: Asked, answer: Message | ShoalError) -> None:
        self.count += 1
        asked.answer, asked.answered_at = answer, self.count

    def _arrive(self, store: Store) -> None:
        self.late.remove(store)
        self.store.change(store)

    def _tell_watches(self) -> None:
        for (bucket, key), value, revision in self.store.changes[self._told :]:
            for replica in self.replicas if bucket == CONTROL else ():
                if replica.core.state.revisions.get(key, 0) < revision:
                    replica.changes.setdefault(key, deque()).append(Changed(key, value, revision))
        self._told = len(self.store.changes)


def announcement(node: NodeId, sequence: int = 1) -> NodeAnnouncement:
    """Return a node's sign of life."""
    return NodeAnnouncement(node_id=node, sequence=sequence, total={}, free={})
