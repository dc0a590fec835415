"""Actors over several replicas of the control store, through every order of requests, lost answers, crashes and deaths.

At each change of the store: a record takes only the steps that its life allows; an incarnation is claimed by one node,
ALIVE only there, and followed by at most ``max_restarts`` others; DEAD is never undone; a name's key goes from one
actor to the next only when the first is dead, and names every actor with that name that has begun to live. At each
answer: it is true. After the faults have stopped: nothing is left undecided, what wants a place has one, whatever
belongs to the dead is dead, and what was dead for long has left nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from services.gcs.tests.builders import description, job_request
from services.gcs.tests.linearizability import KeyOperation, is_linearizable
from services.gcs.tests.simulation import Asked, Replica, Running, SimulatedStore, Step, World, announcement
from services.gcs.tests.test_replicas import CHOICES, REPLICAS, Replicas
from shoal_core.protocol.actors import (
    ActorChanged,
    ActorClaim,
    ActorDescription,
    ActorEnded,
    ActorRecord,
    ActorStarted,
    ActorState,
    ClaimActor,
    CreateActor,
    FindActor,
    GetActor,
    HostedActor,
    KillActor,
    NodeActors,
    OpenActorJob,
    ReleaseActor,
)
from shoal_core.protocol.effects import Publish, Start, Store
from shoal_core.protocol.errors import (
    ActorAlreadyExistsError,
    DeclaredDeadError,
    NotFoundError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import ActorId, JobId, NodeId, ObjectKey, ProcessId, actor_id, node_of
from shoal_core.protocol.messages import (
    Done,
    DriverAlive,
    FinishJob,
    JobRecord,
    JobState,
    Message,
    NodeState,
    ProcessDied,
    RetireNode,
)
from shoal_core.protocol.placement import DEFAULT, Strategy
from shoal_core.protocol.scheduling import ActorStart, Demand
from shoal_core.testing.builders import node_id, process_id
from shoal_gcs.actor_operations import NAME_TAKEN, PurgeSpec
from shoal_gcs.actors import KEEP_DEAD_SECONDS, NAMING_SECONDS, ORPHAN_SECONDS
from shoal_gcs.records import job_id, name_key, spec_prefix

DRIVERS = [process_id(1, node=8), process_id(2, node=8)]
WORKERS = [process_id(1, node=1), process_id(1, node=2)]
OWNERS = [*DRIVERS, *WORKERS]
NODES = [node_id(number) for number in (1, 2, 3)]
WAITING = (ActorState.PENDING_CREATION, ActorState.RESTARTING)
Incarnation = tuple[ActorId, int]


def about(
    actor: ActorId,
    owner: ProcessId,
    *,
    name: str = "",
    detached: bool = False,
    max_restarts: int = 0,
    job: JobId | None = None,
    strategy: Strategy = DEFAULT,
) -> ActorDescription:
    """Return what a creator says of its actor."""
    return ActorDescription(
        actor_id=actor,
        job_id=job or job_id(1 + OWNERS.index(owner) % 2),
        owner=owner,
        owner_key=ObjectKey(0),
        class_name="Counter",
        name=name,
        detached=detached,
        placement={"CPU": 10_000},
        resources={},
        strategy=strategy,
        max_restarts=max_restarts,
        methods=b"methods",
    )


# ------------------------------------------------------------------------------------ what records may become


def check_step(old: ActorRecord | None, new: ActorRecord | None) -> None:
    """Hold a change of an actor's record to what its life allows."""
    if new is None:
        assert old is not None
        assert old.state is ActorState.DEAD, "only the dead are forgotten"
    elif old is None:
        begins = ActorState.NAMING if new.description.name else ActorState.PENDING_CREATION
        assert (new.state, new.incarnation, new.node_id, new.process_id) == (begins, 0, None, None)
    else:
        assert old.state is not ActorState.DEAD, "DEAD is never undone"
        if new.state is ActorState.DEAD:
            assert new.incarnation == old.incarnation
            assert (new.process_id, new.death is None, new.ended_at is None) == (None, False, False)
            return
        assert new.description == old.description
        if new.incarnation != old.incarnation:
            assert new.incarnation == old.incarnation + 1
            assert new.description.max_restarts < 0 or new.incarnation <= new.description.max_restarts
            assert (new.state, new.node_id, new.process_id) == (ActorState.RESTARTING, None, None)
            assert old.node_id is not None, "an incarnation that nobody has needs no other after it"
        elif new.node_id != old.node_id:
            assert old.node_id is None, "an incarnation is claimed once"
            assert old.state is new.state
            assert new.state in WAITING
        elif new.state is ActorState.ALIVE:
            assert old.state in WAITING
            assert new.node_id is not None
            assert new.process_id is not None
        else:
            assert (old.state, new.state) == (ActorState.NAMING, ActorState.PENDING_CREATION)


class ActorStore(SimulatedStore):
    """A store whose actors and names are held to their rules; ``actors`` and ``holders`` are what it holds of them."""

    def __init__(self) -> None:
        super().__init__()
        self.actors: dict[ActorId, ActorRecord] = {}
        self.holders: dict[str, ActorId] = {}
        self.recorded: set[ActorId] = set()

    def change(self, store: Store) -> int | None:
        """Change a key; see that every living actor has its name."""
        revision = super().change(store)
        if revision is not None and not store.bucket:
            kind, _, name = store.key.partition(".")
            if kind == "actor":
                if store.value is None:
                    del self.actors[ActorId(name)]
                else:
                    self.actors[ActorId(name)] = ActorRecord.model_validate_json(store.value)
                    self.recorded.add(ActorId(name))
            elif kind == "name":
                self.holders.pop(store.key, None)
                if store.value is not None:
                    self.holders[store.key] = ActorId(store.value.decode())
            for actor, record in self.actors.items():
                if record.description.name and record.state not in (ActorState.NAMING, ActorState.DEAD):
                    key = name_key(record.description.namespace, record.description.name)
                    assert self.holders.get(key) == actor, "whoever lives under a name holds it"
        return revision

    def specs(self) -> set[ActorId]:
        """Return the actors for which it is kept what they are made from."""
        return {ActorId(key.split(".")[1]) for key in self.functions() if key.startswith("spec.")}

    def lives(self, actor: ActorId) -> bool:
        """Tell whether there is an actor and it is not DEAD."""
        return actor in self.actors and self.actors[actor].state is not ActorState.DEAD

    def _check(self, key: str, before: bytes | None, after: bytes | None) -> None:
        if key.startswith("actor."):
            old, new = (value and ActorRecord.model_validate_json(value) for value in (before, after))
            check_step(old or None, new or None)
        elif key.startswith("name."):
            assert before is None or not self.lives(ActorId(before.decode())), "a name is taken from the dead only"
        else:
            super()._check(key, before, after)


# ------------------------------------------------------------------------------------ the world


class ActorReplica(Replica):
    """A replica that also deletes what actors were made from."""

    def __init__(self, world: World, number: int) -> None:
        self.spec_purges: list[ActorId] = []
        super().__init__(world, number)

    def steps(self) -> list[Step]:
        """Return what can happen next here."""
        return [*super().steps(), *(lambda actor=actor: self._purge_spec(actor) for actor in self.spec_purges)]

    def _perform_next(self, running: Running) -> None:
        effect = running.effects[running.position]
        if not (isinstance(effect, Start) and isinstance(effect.command, PurgeSpec)):
            super()._perform_next(running)
            return
        self.spec_purges.append(effect.command.actor_id)
        running.position += 1
        if running.position == len(running.effects):
            self.running.remove(running)

    def _purge_spec(self, actor: ActorId) -> None:
        self.spec_purges.remove(actor)
        self.world.store.purge(spec_prefix(actor))


@dataclass(eq=False)
class Life:
    """One incarnation as a node knows it; ``saying`` is what it says until it is answered."""

    owner: ProcessId
    phase: Literal["claiming", "claimed", "alive", "over"] = "claiming"
    saying: Message | None = None
    asked: list[Asked] = field(default_factory=list)


class ActorWorld(World):
    """Replicas, and the nodes that are asked to host."""

    def __init__(self) -> None:
        super().__init__()
        self.store: ActorStore = ActorStore()
        self.crashed = False
        self.demands: dict[ActorId, Demand] = {}
        self.news: list[ActorChanged] = []
        self.before: dict[int, ActorRecord | None] = {}
        self.claims: dict[Incarnation, NodeId] = {}
        self.drivers: dict[JobId, ProcessId] = {}
        self.hosts: dict[NodeId, dict[Incarnation, Life]] = {node: {} for node in NODES}
        self.dead_owners: set[ProcessId] = set()

    def start(self) -> Replica:
        """Start a replica with an identity of its own."""
        self._started += 1
        replica = ActorReplica(self, self._started)
        self.replicas.append(replica)
        return replica

    def crash(self, replica: Replica) -> None:
        """End a replica at once."""
        self.crashed = True
        super().crash(replica)

    def ask(self, replica: Replica, message: Message) -> Asked:
        """Send a request; remember what was true then."""
        token = self._tokens + 1
        actor = getattr(message, "actor_id", None)
        self.before[token] = None if actor is None else self.store.actors.get(actor)
        return super().ask(replica, message)

    def second(self, talkers: Sequence[NodeId] = ()) -> None:
        """Let a second pass in which everyone gives signs of life."""
        self.speak()
        super().second(talkers)

    def speak(self) -> None:
        """Have nodes and drivers give signs of life, and nodes tell whom they host."""
        for node in NODES:
            self.broadcast(announcement(node), node)
        for job, driver in self.drivers.items():
            self.broadcast(DriverAlive(job_id=job, driver=driver), driver)
        for node, lives in self.hosts.items():
            hosted = [HostedActor(actor_id=a, incarnation=i) for (a, i), life in lives.items() if life.phase != "over"]
            self.broadcast(NodeActors(node_id=node, actors=hosted), node)

    def published(self, effect: Publish, replica: Replica) -> None:
        """Hear what the control store says of actors; it must be something that was stored before."""
        match effect.message:
            case Demand() as demand:
                self.demands[ActorId(demand.owner)] = demand
            case ActorChanged() as news:
                record = self.store.actors.get(news.actor_id)
                assert news.state is not ActorState.NAMING
                assert record is None or news.incarnation <= record.incarnation
                assert record is None or news.state is not ActorState.DEAD or record.state is ActorState.DEAD
                self.news.append(news)
            case _:
                super().published(effect, replica)

    def answered(self, asked: Asked, answer: Message | ShoalError) -> None:
        """Take in an answer; it must be true."""
        before = self.before[self.asked.index(asked) + 1]
        check_answer(self, asked.message, answer, before)
        super().answered(asked, answer)

    def is_dead(self, node: NodeId) -> bool:
        """Tell whether a node was declared dead."""
        stored = self.store.nodes().get(f"node.{node}")
        return stored is not None and stored.record.state is NodeState.DEAD

    def has_ended(self, job: JobId) -> bool:
        """Tell whether a job has ended."""
        return self.store.jobs()[f"job.{job}"].record.state is not JobState.RUNNING

    def wanted(self) -> list[tuple[ActorStart, Demand]]:
        """Return the incarnations that a place is wanted for, as far as it was said last."""
        return [(start, d) for d in self.demands.values() for entry in d.entries if (start := entry.actor)]


def check_answer(world: ActorWorld, asked: Message, answer: Message | ShoalError, before: ActorRecord | None) -> None:
    """Hold an answer to the store; ``before`` is the actor's record when it was asked for."""
    actors = world.store.actors
    assert not isinstance(answer, ServiceError) or isinstance(asked, ClaimActor)
    if isinstance(answer, ActorRecord):
        assert answer.state is not ActorState.NAMING, "only the control store sees that a name is not decided"
    match asked, answer:
        case CreateActor(description=mine), ActorRecord() as record:
            if record.description.actor_id == mine.actor_id:
                assert record.death is None or record.death.reason != NAME_TAKEN
            else:
                assert asked.get_if_exists
                assert record.description.name == mine.name
                assert record.state is not ActorState.DEAD
        case CreateActor(description=mine), ActorAlreadyExistsError():
            record = actors[mine.actor_id]
            assert record.death is not None
            assert record.death.reason == NAME_TAKEN, "who is refused will never live"
        case CreateActor(description=mine), NotFoundError():
            assert world.has_ended(mine.job_id)
        case FindActor(name=name), ActorRecord() as record:
            assert record.description.name == name
            assert record.state is not ActorState.DEAD
        case ClaimActor() as claim, ActorClaim() as given:
            incarnation = (claim.actor_id, claim.incarnation)
            assert (given.record.incarnation, given.record.node_id) == (claim.incarnation, claim.node_id)
            assert given.spec == spec(claim.actor_id)
            assert world.claims.setdefault(incarnation, claim.node_id) == claim.node_id, "one node has it"
        case ClaimActor() as claim, DeclaredDeadError():
            now = actors.get(claim.actor_id)
            if now is not None and now.state in WAITING and now.incarnation == claim.incarnation:
                refused_for_good = now.node_id not in (None, claim.node_id) or world.is_dead(claim.node_id)
                assert refused_for_good, "who is refused does not ask again"
        case ActorStarted() as started, DeclaredDeadError():
            now = actors.get(started.actor_id)
            gone = now is None or now.state is ActorState.DEAD or now.incarnation > started.incarnation
            assert gone
        case ActorStarted() as started, ActorRecord() as record:
            assert record.state is ActorState.ALIVE
            assert record.process_id == started.process_id
        case ActorEnded() as ended, Done():
            now = actors.get(ended.actor_id)
            assert now is None or now.state is ActorState.DEAD or now.incarnation > ended.incarnation
        case ((KillActor() | ReleaseActor()), Done()):
            now = actors.get(asked.actor_id)
            if isinstance(asked, ReleaseActor) or asked.no_restart:
                assert now is None or now.state is ActorState.DEAD
            elif before is not None and before.node_id is not None and now is not None:
                assert now.state is ActorState.DEAD or now.incarnation > before.incarnation


def spec(actor: ActorId) -> bytes:
    """Return what an actor is made from."""
    return f"spec of {actor}".encode()


# ------------------------------------------------------------------------------------ whole lives


@dataclass(eq=False)
class Creator:
    """A process that creates an actor: a detached one's job first."""

    request: CreateActor
    opened: list[Asked] = field(default_factory=list)
    created: list[Asked] = field(default_factory=list)

    @property
    def about(self) -> ActorDescription:
        return self.request.description

    def next(self) -> tuple[Message, list[Asked]]:
        """Return what it asks now, and where the question is to be kept."""
        if not self.about.detached:
            return self.request, self.created
        opened = first_answer(self.opened)
        if not isinstance(opened, JobRecord):
            return OpenActorJob(actor_id=self.about.actor_id, creator_job=job_id(1)), self.opened
        own = self.about.model_copy(update={"job_id": opened.job_id})
        return self.request.model_copy(update={"description": own}), self.created


def first_answer(asked: Sequence[Asked]) -> Message | ShoalError | None:
    return next((one.answer for one in asked if one.answer is not None), None)


class Lives(Replicas):
    """Creators, nodes that host, kills, releases, and deaths of all kinds."""

    world: ActorWorld

    def __init__(self) -> None:
        super().__init__()
        self.world = ActorWorld()
        self.world.start()
        self.world.start()
        self.creators: list[Creator] = []

    @initialize()
    def begin_with_nodes_and_jobs(self) -> None:
        for number in (1, 2, 3):
            self.world.settled(self.replica(0), description(number))
        for number, driver in enumerate(DRIVERS, 1):
            request = job_request(1).model_copy(update={"driver": driver})
            self.world.settled(self.replica(0), request)
            self.world.drivers[job_id(number)] = driver

    # -------------------------------------------------------------------------------- creators

    @rule(
        replica=REPLICAS,
        owner=st.sampled_from(OWNERS),
        name=st.sampled_from(["", "a", "a", "b"]),
        detached=st.booleans(),
        max_restarts=st.sampled_from([0, 1, -1]),
        get_if_exists=st.booleans(),
        choices=CHOICES,
    )
    def create(
        self,
        replica: int,
        owner: ProcessId,
        name: str,
        detached: bool,
        max_restarts: int,
        get_if_exists: bool,
        choices: list[int],
    ) -> None:
        if owner in self.world.dead_owners:
            return
        actor = actor_id(owner, len(self.creators))
        mine = about(actor, owner, name=name, detached=detached, max_restarts=max_restarts)
        request = CreateActor(description=mine, spec=spec(actor), get_if_exists=get_if_exists and bool(name))
        self.creators.append(Creator(request))
        self.creator_goes_on(-1, replica, choices)

    @precondition(lambda self: self.creators)
    @rule(which=st.integers(-2, 5), replica=REPLICAS, choices=CHOICES)
    def creator_goes_on(self, which: int, replica: int, choices: list[int]) -> None:
        """Ask for the next thing, or for the same thing again, also when the actor is dead."""
        creator = self.creators[which % len(self.creators)]
        if creator.about.owner not in self.world.dead_owners:
            message, kept = creator.next()
            kept.append(self.world.ask(self.replica(replica), message))
            self.go_on(choices)

    def actor(self, which: int) -> ActorId:
        return self.creators[which % len(self.creators)].about.actor_id

    @precondition(lambda self: self.creators)
    @rule(which=st.integers(0, 5), replica=REPLICAS, no_restart=st.booleans(), choices=CHOICES)
    def kill(self, which: int, replica: int, no_restart: bool, choices: list[int]) -> None:
        self.ask(replica, KillActor(actor_id=self.actor(which), no_restart=no_restart, reason="killed"), choices)

    @precondition(lambda self: self.creators)
    @rule(which=st.integers(0, 5), replica=REPLICAS, choices=CHOICES)
    def release(self, which: int, replica: int, choices: list[int]) -> None:
        self.ask(replica, ReleaseActor(actor_id=self.actor(which), reason="released"), choices)

    @precondition(lambda self: self.creators)
    @rule(which=st.integers(0, 5), replica=REPLICAS, name=st.sampled_from(["", "a", "b"]), choices=CHOICES)
    def look(self, which: int, replica: int, name: str, choices: list[int]) -> None:
        find = FindActor(name=name, namespace="")
        self.ask(replica, find if name else GetActor(actor_id=self.actor(which)), choices)

    # -------------------------------------------------------------------------------- nodes

    @precondition(lambda self: self.world.demands)
    @rule(which=st.integers(0, 5), node=st.sampled_from(NODES), replica=REPLICAS, choices=CHOICES)
    def node_claims(self, which: int, node: NodeId, replica: int, choices: list[int]) -> None:
        if wanted := self.world.wanted():
            self.claim(node, wanted[which % len(wanted)][0], replica)
            self.go_on(choices)

    def claim(self, node: NodeId, start: ActorStart, replica: int) -> None:
        incarnation = (start.actor_id, start.incarnation)
        if incarnation not in self.world.hosts[node]:
            life = self.world.hosts[node][incarnation] = Life(start.owner)
            claim = ClaimActor(actor_id=start.actor_id, incarnation=start.incarnation, node_id=node)
            self.say(life, claim, replica)

    def say(self, life: Life, message: Message, replica: int) -> None:
        life.saying, life.asked = message, []
        life.asked.append(self.world.ask(self.replica(replica), message))

    def lives(self, *phases: str) -> Iterator[tuple[NodeId, Incarnation, Life]]:
        for node, hosted in self.world.hosts.items():
            for incarnation, life in list(hosted.items()):
                if life.phase in phases:
                    yield node, incarnation, life

    @rule(which=st.integers(0, 5), replica=REPLICAS, choices=CHOICES)
    def instance_is_made(self, which: int, replica: int, choices: list[int]) -> None:
        if claimed := list(self.lives("claimed")):
            self.made(*claimed[which % len(claimed)], replica)
            self.go_on(choices)

    def made(self, node: NodeId, incarnation: Incarnation, life: Life, replica: int) -> None:
        life.phase = "alive"
        process = ProcessId(f"{node}{len(self.world.hosts[node]):08x}")
        started = ActorStarted(
            actor_id=incarnation[0], incarnation=incarnation[1], node_id=node, process_id=process, pid=1
        )
        self.say(life, started, replica)

    @rule(which=st.integers(0, 5), replica=REPLICAS, final=st.booleans(), choices=CHOICES)
    def incarnation_ends(self, which: int, replica: int, final: bool, choices: list[int]) -> None:
        if here := list(self.lives("claimed", "alive")):
            self.end(*here[which % len(here)], replica, final=final)
            self.go_on(choices)

    def end(self, node: NodeId, incarnation: Incarnation, life: Life, replica: int, *, final: bool = False) -> None:
        life.phase = "over"
        actor, number = incarnation
        ended = ActorEnded(actor_id=actor, incarnation=number, node_id=node, reason="it ended", final=final)
        self.say(life, ended, replica)

    @rule(which=st.integers(0, 9), replica=REPLICAS, choices=CHOICES)
    def node_repeats(self, which: int, replica: int, choices: list[int]) -> None:
        if saying := [life for *_, life in self.lives("claiming", "claimed", "alive", "over") if life.saying]:
            self.repeat(saying[which % len(saying)], replica)
            self.go_on(choices)

    def repeat(self, life: Life, replica: int) -> None:
        assert life.saying is not None
        life.asked.append(self.world.ask(self.replica(replica), life.saying))

    @rule(which=st.integers(0, 9))
    def nodes_hear_of_a_change(self, which: int) -> None:
        """It may be old."""
        if self.world.news:
            self.hear(self.world.news[-1 - which % len(self.world.news)])

    def hear(self, news: ActorChanged) -> None:
        for node, (actor, number), life in self.lives("claimed", "alive"):
            other = news.incarnation == number and news.node_id not in (None, node)
            over = news.state is ActorState.DEAD or news.incarnation > number or other
            if actor == news.actor_id and over:
                self.end(node, (actor, number), life, 0)

    @invariant()
    def nodes_take_in_answers(self) -> None:
        for node, incarnation, life in self.lives("claiming", "alive", "over"):
            answer = first_answer(life.asked)
            if life.saying is None or answer is None:
                continue
            if isinstance(answer, ServiceError):
                life.asked = [one for one in life.asked if one.answer is None]
                continue
            life.saying = None
            if life.phase == "claiming":
                life.phase = "claimed" if isinstance(answer, ActorClaim) else "over"
            elif life.phase == "alive" and isinstance(answer, ShoalError):
                self.end(node, incarnation, life, 0)

    # -------------------------------------------------------------------------------- deaths and time

    @rule(owner=st.sampled_from(WORKERS))
    def owner_dies(self, owner: ProcessId) -> None:
        self.world.dead_owners.add(owner)
        self.world.broadcast(ProcessDied(sequence=1, process_id=owner, reason=""), node_of(owner))

    @rule(node=st.sampled_from(NODES[1:]), replica=REPLICAS, choices=CHOICES)
    def node_is_declared_dead(self, node: NodeId, replica: int, choices: list[int]) -> None:
        """It does not know, and may go on."""
        self.world.dead_owners.update(owner for owner in OWNERS if node_of(owner) == node)
        self.ask(replica, RetireNode(node_id=node, reason="told to"), choices)

    @rule(job=st.sampled_from([1, 2]), replica=REPLICAS, choices=CHOICES)
    def job_ends(self, job: int, replica: int, choices: list[int]) -> None:
        self.world.drivers.pop(job_id(job), None)
        self.ask(replica, FinishJob(job_id=job_id(job), state=JobState.SUCCEEDED), choices)

    @rule(replica=REPLICAS, seconds=st.sampled_from([1.0, NAMING_SECONDS + 1]), choices=CHOICES)
    def tick(self, replica: int, seconds: float, choices: list[int]) -> None:
        self.world.now += seconds
        self.world.speak()
        self.replica(replica).tick()
        self.go_on(choices)

    # -------------------------------------------------------------------------------- quiescence

    def teardown(self) -> None:
        if self.world.asked:
            self.settle_everything()

    def settle_everything(self) -> None:
        world = self.world
        for job in (job_id(1), job_id(2)):
            if job not in world.drivers and not world.has_ended(job):
                world.settled(self.replica(0), FinishJob(job_id=job, state=JobState.FAILED))
        self.pass_seconds(6)
        self.check_all_is_decided()
        world.now += ORPHAN_SECONDS
        self.pass_seconds(6)
        self.check_own_jobs()
        for job in list(world.drivers):
            world.settled(self.replica(0), FinishJob(job_id=job, state=JobState.SUCCEEDED))
        for actor in list(world.store.actors):
            if world.store.lives(actor):
                world.settled(self.replica(0), KillActor(actor_id=actor, reason="the end"))
        self.pass_seconds(3)
        assert not any(map(world.store.lives, world.store.actors))
        world.now += KEEP_DEAD_SECONDS + 1
        self.pass_seconds(3)
        self.check_all_is_forgotten()

    def pass_seconds(self, seconds: int) -> None:
        """Let time pass in which everyone repeats what was not answered, and nodes host what they can."""
        world = self.world
        for _ in range(seconds):
            world.run()
            for creator in self.creators:
                message, kept = creator.next()
                if creator.about.owner not in world.dead_owners and first_answer(kept) is None:
                    kept.append(world.ask(self.replica(0), message))
            for node in [node for node in NODES if world.is_dead(node)]:
                world.hosts[node].clear()  # it has left
            world.demands.clear()
            world.second()
            self.nodes_take_in_answers()
            for news in world.news:
                self.hear(news)
            for number, (start, _) in enumerate(world.wanted()):
                living = [node for node in NODES if not world.is_dead(node)]
                self.claim(living[number % len(living)], start, 0)
            for *_, life in self.lives("claiming", "claimed", "alive", "over"):
                if life.saying is not None:
                    self.repeat(life, 0)
            world.run()
            self.nodes_take_in_answers()
            for node, incarnation, life in self.lives("claimed", "alive"):
                detached = world.store.actors[incarnation[0]].description.detached
                if life.owner in world.dead_owners and not detached:
                    self.end(node, incarnation, life, 0, final=True)
                elif life.phase == "claimed":
                    self.made(node, incarnation, life, 0)
            world.run()
            self.nodes_take_in_answers()

    def check_all_is_decided(self) -> None:
        world = self.world
        hosted = {incarnation: node for node, incarnation, _ in self.lives("alive")}
        for actor, record in world.store.actors.items():
            assert record.state in (ActorState.DEAD, ActorState.ALIVE), "who wants a place has one"
            if record.state is ActorState.ALIVE:
                assert hosted.pop((actor, record.incarnation)) == record.node_id
                assert record.node_id is not None
                assert not world.is_dead(record.node_id)
                assert not world.has_ended(record.description.job_id)
                assert record.description.detached or record.description.owner not in world.dead_owners
        assert not hosted, "nobody hosts what the record does not name"
        assert all(life.saying is None for *_, life in self.lives("claiming", "claimed", "alive", "over"))
        specs = world.store.specs()
        assert {actor for actor in world.store.actors if world.store.lives(actor)} <= specs
        assert world.crashed or not any(actor in specs and not world.store.lives(actor) for actor in world.store.actors)
        for replica in world.replicas:
            held = {actor: held.value for actor, held in replica.core.state.actors.items()}
            assert held == world.store.actors
            assert replica.core.state.living_actors == set(filter(world.store.lives, held))
            assert not replica.requests, "everything that a living replica was asked is answered"

    def check_own_jobs(self) -> None:
        for job in self.world.store.jobs().values():
            if job.record.actor is not None:
                running = job.record.state is JobState.RUNNING
                assert running == self.world.store.lives(job.record.actor), "its own job ends with a detached actor"

    def check_all_is_forgotten(self) -> None:
        world = self.world
        assert not world.store.actors
        assert not world.store.holders
        assert world.crashed or not world.store.specs()
        assert not world.store.specs() & world.store.recorded, "what has no record, since a replica crashed, may stay"
        for replica in world.replicas:
            assert not replica.core.state.actors
            assert not replica.core.state.living_actors


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(40))
def test_long_histories_of_few_actors(seed: int) -> None:
    """Walk at random, deaths being rarer than work; hypothesis finds small cases, this finds crowded ones."""
    random = Random(seed)
    machine = Lives()
    machine.begin_with_nodes_and_jobs()

    def which() -> int:
        return random.randrange(1000)

    def choices() -> list[int]:
        return [which() for _ in range(random.choice([0, 3, 10, 40]))]

    def create() -> None:
        owner, name = random.choice(OWNERS), random.choice(["", "a", "a", "b"])
        most = random.choice([0, 1, 3, -1])
        machine.create(which(), owner, name, chance(0.3), most, chance(0.5), choices())

    def chance(probability: float) -> bool:
        return random.random() < probability

    def crash() -> None:
        if len(machine.world.replicas) > 1:
            machine.crash_somewhere(which(), random.randrange(12))

    def start() -> None:
        if len(machine.world.replicas) < 3:
            machine.start()

    create()
    actions: dict[Callable[[], None], float] = {
        create: 1,
        lambda: machine.creator_goes_on(which() % 8 - 2, which(), choices()): 3,
        lambda: machine.kill(which(), which(), chance(0.3), choices()): 1.5,
        lambda: machine.release(which(), which(), choices()): 0.3,
        lambda: machine.look(which(), which(), random.choice(["", "a", "b"]), choices()): 2,
        lambda: machine.node_claims(which(), random.choice(NODES), which(), choices()): 6,
        lambda: machine.instance_is_made(which(), which(), choices()): 5,
        lambda: machine.incarnation_ends(which(), which(), chance(0.2), choices()): 2,
        lambda: machine.node_repeats(which(), which(), choices()): 4,
        lambda: machine.nodes_hear_of_a_change(which()): 1,
        lambda: machine.owner_dies(random.choice(WORKERS)): 0.1,
        lambda: machine.node_is_declared_dead(random.choice(NODES[1:]), which(), choices()): 0.1,
        lambda: machine.job_ends(random.choice([1, 2]), which(), choices()): 0.05,
        lambda: machine.tick(which(), random.choice([1.0, NAMING_SECONDS + 1]), choices()): 1,
        lambda: machine.go_on(choices()): 3,
        crash: 0.5,
        start: 1,
    }
    for action in random.choices([*actions], [*actions.values()], k=150):
        action()
        machine.nodes_take_in_answers()
    machine.settle_everything()


# ------------------------------------------------------------------------------------ names as registers


@dataclass(frozen=True)
class NameOperation(KeyOperation):
    """An operation on a name: ``add`` creates the actor ``value``, ``delete`` kills it, ``get`` finds who has it."""

    def apply(self, state: bytes) -> tuple[bytes | bool, bytes]:
        """Return the result and the holder after it; who asked for whoever there is gets the holder."""
        match self.kind:
            case "add":
                return (state or self.value) if isinstance(self.result, bytes) else state == b"", state or self.value
            case "delete":
                return True, b"" if state == self.value else state
        return state, state


def name_history(asked: Sequence[Asked], name: str) -> list[KeyOperation]:
    """Return what was done to one name; a create that was sent several times is one operation."""
    creates: dict[ActorId, list[Asked]] = {}
    operations: list[KeyOperation] = []
    for one in asked:
        match one.message:
            case CreateActor(description=mine) if mine.name == name:
                creates.setdefault(mine.actor_id, []).append(one)
            case FindActor(name=wanted) if wanted == name:
                found = one.answer.description.actor_id.encode() if isinstance(one.answer, ActorRecord) else b""
                operations.append(NameOperation("get", b"", one.sent_at, one.answered_at, found))
            case KillActor(actor_id=actor) if actor in creates:
                result = None if isinstance(one.answer, NotFoundError) else True
                operations.append(NameOperation("delete", actor.encode(), one.sent_at, one.answered_at, result))
    for actor, attempts in creates.items():
        answered = [one for one in attempts if one.answered_at is not None]
        first = min(answered, key=lambda one: one.answered_at or 0, default=None)
        began_at = min(one.sent_at for one in attempts)
        value = actor.encode()
        if first is None or first.answer is None:
            operations.append(NameOperation("add", value, began_at, None, None))
            continue
        result_: bytes | bool = False
        if isinstance(first.answer, ActorRecord):
            winner = first.answer.description.actor_id.encode()
            result_ = winner if any(wants_any(one) for one in attempts) else True
        operations.append(NameOperation("add", value, began_at, first.answered_at, result_))
    return operations


def wants_any(asked: Asked) -> bool:
    return isinstance(asked.message, CreateActor) and asked.message.get_if_exists


class Names(Replicas):
    """Creators that race for two names, and whoever finds and kills the winners."""

    world: ActorWorld

    def __init__(self) -> None:
        super().__init__()
        self.world = ActorWorld()
        self.world.start()
        self.world.start()
        self.requests: list[CreateActor] = []

    @rule(replica=REPLICAS, name=st.sampled_from(["a", "a", "b"]), get_if_exists=st.booleans(), choices=CHOICES)
    def create(self, replica: int, name: str, get_if_exists: bool, choices: list[int]) -> None:
        actor = actor_id(DRIVERS[0], len(self.requests))
        mine = about(actor, DRIVERS[0], name=name)
        self.requests.append(CreateActor(description=mine, spec=spec(actor), get_if_exists=get_if_exists))
        self.ask(replica, self.requests[-1], choices)

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 5), replica=REPLICAS, choices=CHOICES)
    def create_again(self, which: int, replica: int, choices: list[int]) -> None:
        self.ask(replica, self.requests[which % len(self.requests)], choices)

    @rule(replica=REPLICAS, name=st.sampled_from(["a", "a", "b"]), choices=CHOICES)
    def find(self, replica: int, name: str, choices: list[int]) -> None:
        self.ask(replica, FindActor(name=name, namespace=""), choices)

    @rule(which=st.integers(0, 5), replica=REPLICAS, no_restart=st.booleans(), choices=CHOICES)
    def kill_whom_someone_found(self, which: int, replica: int, no_restart: bool, choices: list[int]) -> None:
        known = [one.answer for one in self.world.asked if isinstance(one.answer, ActorRecord)]
        if known:
            actor = known[-1 - which % len(known)].description.actor_id
            self.ask(replica, KillActor(actor_id=actor, reason="killed"), choices)

    @rule(replica=REPLICAS, seconds=st.sampled_from([1.0, NAMING_SECONDS + 1]), choices=CHOICES)
    def tick(self, replica: int, seconds: float, choices: list[int]) -> None:
        self.world.now += seconds
        self.replica(replica).tick()
        self.go_on(choices)

    def teardown(self) -> None:
        self.world.run()
        for _ in range(6):
            self.world.second()
        assert not any(record.state is ActorState.NAMING for record in self.world.store.actors.values())
        for name in "ab":
            holders = {self.found(replica, name) for replica in self.world.replicas}
            assert len(holders) == 1, "all replicas say the same"
            assert is_linearizable(name_history(self.world.asked, name))

    def found(self, replica: Replica, name: str) -> ActorId | None:
        answer = self.world.settled(replica, FindActor(name=name, namespace=""))
        return answer.description.actor_id if isinstance(answer, ActorRecord) else None


TestNames = Names.TestCase
TestNames.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
