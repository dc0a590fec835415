"""The core of the durable tier: several replicas on one stream, crashes between any two effects, answers that get lost.

A world keeps the stream's keys and what the replicas asked for and was not done yet. Chance decides what is done next,
and whether its answer arrives. What a replica that crashed had sent may still be done.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from zlib_ng.zlib_ng import crc32

from shoal_core.protocol.effects import (
    Answered,
    Ask,
    Changed,
    Conflict,
    Connected,
    Effect,
    Event,
    Load,
    Loaded,
    Reply,
    Request,
    Start,
    Store,
    Stored,
    StoreRefused,
    WakeAt,
)
from shoal_core.protocol.errors import (
    AlreadyExistsError,
    DeclaredDeadError,
    DisconnectedError,
    InvalidRequestError,
    JetStreamError,
    NotFoundError,
    ObjectStoreFullError,
    RequestRefusedError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.ids import JobId, ProcessId
from shoal_core.protocol.messages import Done, Echo, GetJob, JobConfig, JobFinished, JobRecord, JobState, Message
from shoal_core.protocol.storage import (
    CHUNK_BYTES,
    DurableChunk,
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurableManifest,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
    DurableUpload,
)
from shoal_objectstore.core import (
    MOST_REQUESTS,
    SWEEP_SECONDS,
    SWEEPS_AT_ONCE,
    TICK_SECONDS,
    TOMBSTONE_SECONDS,
    Begin,
    DurableTier,
    Listed,
    ListPlaces,
)
from shoal_objectstore.holdings import Quotas
from shoal_objectstore.manifests import ABANDONED_SECONDS, decode, manifest_key
from shoal_objectstore.operations import ChunkRead, ChunksCounted, CountChunks, Purge, Purged, ReadChunk
from shoal_objectstore.service import places_by_object

Fate = Literal["done", "answer lost", "lost"]
Answer = Message | ShoalError
LOST = DisconnectedError("the connection broke while a request was in flight")
REPLICAS = 3
CONTENTS: dict[str, list[bytes]] = {
    "short": [b"one"],
    "long": [b"first", b"second", b"third"],
    "empty": [b""],
}


Digests = tuple[int, ...]


def digests(chunks: list[bytes]) -> Digests:
    return tuple(map(crc32, chunks))


BY_DIGESTS = {digests(chunks): chunks for chunks in CONTENTS.values()}
JOBS = {"a": JobId("00000001"), "b": JobId("00000002")}


def put(object_id: str, chunks: list[bytes], holder: str = "one", keep_seconds: float | None = None) -> DurablePut:
    return DurablePut(
        object_id=object_id,
        size_bytes=sum(map(len, chunks)),
        digests=list(digests(chunks)),
        job_id=JOBS.get(object_id, JobId("")),
        holder=holder,
        keep_seconds=keep_seconds,
    )


def upload(
    object_id: str, chunks: list[bytes], holder: str = "one", keep_seconds: float | None = None
) -> list[Message]:
    parts = [DurablePutChunk(object_id=object_id, index=index, data=data) for index, data in enumerate(chunks)]
    return [put(object_id, chunks, holder, keep_seconds), *parts, DurableSeal(object_id=object_id)]


def object_of(message: Message) -> str:
    return str(message.object_id)  # type: ignore[attr-defined]


@dataclass(eq=False)
class Call:
    """A request that was sent to one replica; ``answer`` gets what came of it, None if nothing ever will."""

    message: Message
    replica: int
    began_at: int
    answer: Callable[[Answer | None], None]
    open: bool = True
    readable: set[Digests] = field(default_factory=set)
    holder: str = ""


@dataclass(eq=False)
class Pending:
    """An effect that was not performed yet. ``call`` is what it serves; ``core`` is None where the asker crashed."""

    effect: Effect
    core: DurableTier | None
    call: Call | None
    uncertain: bool = False


class World:
    """The stream, its replicas, and all that is under way between them."""

    def __init__(self, replicas: int = REPLICAS) -> None:
        self.now = 1000.0
        self.step = 0
        self.keys: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.pending: list[Pending] = []
        self.calls: list[Call] = []
        self.tokens: dict[tuple[DurableTier, int], Call] = {}
        self.ended_jobs: set[JobId] = set()
        self.cores: list[DurableTier] = []
        self.lags = False
        self.unheard: dict[DurableTier, list[Changed]] = defaultdict(list)
        self.cores = [self.begin() for _ in range(replicas)]

    def begin(self) -> DurableTier:
        core = DurableTier("ask")
        for key, (value, revision) in self.keys.items():
            if key.endswith(".manifest"):
                core.handle(Changed(key, value or None, revision), self.now)
        self.take(core, core.handle(Begin(), self.now), None)
        return core

    # ---------------------------------------------------------------------------- askers

    def ask(self, message: Message, replica: int, answer: Callable[[Answer | None], None]) -> Call:
        core = self.cores[replica]
        call = Call(message, replica, self.step, answer)
        self.calls.append(call)
        self.note_readable(object_of(message))
        token = len(self.tokens) + 1
        self.tokens[core, token] = call
        self.take(core, core.handle(Request(message, token), self.now), call)
        return call

    def run(self, message: Message, replica: int = 0) -> Answer | None:
        """Ask, perform everything, and return the answer."""
        answers: list[Answer | None] = []
        self.ask(message, replica, answers.append)
        self.settle()
        [answer] = answers
        return answer

    def end(self, call: Call, answer: Answer | None) -> None:
        if call.open:
            call.open = False
            call.answer(answer)

    def under_way(self, kind: type[Message], object_id: str) -> list[Call]:
        """Return the calls of a kind that may still change something: also of replicas that crashed."""
        serving = {pending.call for pending in self.pending}
        return [
            call
            for call in self.calls
            if isinstance(call.message, kind) and object_of(call.message) == object_id
            if call.open or call in serving
        ]

    # ---------------------------------------------------------------------------- replicas

    def take(self, core: DurableTier, effects: list[Effect], call: Call | None) -> None:
        stores = [effect for effect in effects if isinstance(effect, Store)]
        assert not stores or effects == stores, "nothing waits behind a store, so the order of effects is free"
        self.pending += [Pending(effect, core, call) for effect in effects if not isinstance(effect, WakeAt)]

    def crash(self, replica: int) -> None:
        """Lose a replica and all it knew; what it had sent to the stream may still arrive there."""
        core = self.cores[replica]
        for pending in [pending for pending in self.pending if pending.core is core]:
            pending.core = None
            sent = pending.effect
            if not (isinstance(sent, Store) or (isinstance(sent, Start) and isinstance(sent.command, Purge))):
                self.pending.remove(pending)
        self.cores[replica] = self.begin()
        for call in [call for (asked, _), call in self.tokens.items() if asked is core]:
            self.end(call, None)

    def tick(self, replica: int) -> None:
        core = self.cores[replica]
        effects = core.tick(self.now)
        assert WakeAt(self.now + TICK_SECONDS) in effects
        self.take(core, effects, None)

    # ---------------------------------------------------------------------------- the stream

    def settle(self) -> None:
        """Perform everything in order until nothing is under way."""
        while self.pending:
            self.perform(self.pending[0], "done")

    def perform(self, pending: Pending, fate: Fate) -> None:
        self.step += 1
        self.pending.remove(pending)
        outcome: object
        match pending.effect:
            case Store() as store:
                outcome = self.store(pending, store, fate)
            case Load(key, context, _):
                value, revision = self.keys.get(key, (None, 0))
                outcome = Loaded(key, value, revision, context) if fate == "done" else None
            case Start(ReadChunk() as command):
                data = self.keys.get(f"{command.place}.{command.index}", (None, 0))[0]
                outcome = ChunkRead(command, data if fate == "done" else LOST)
            case Start(CountChunks() as command):
                count = sum(key.rpartition(".")[0] == command.place for key in self.keys)
                outcome = ChunksCounted(command, count if fate == "done" else LOST)
            case Ask(_, GetJob(job_id=job), context):
                outcome = Answered(context, self.job(job) if fate == "done" else LOST)
            case Start(Purge() as command):
                if fate != "lost":
                    self.purge(command)
                outcome = Purged(command, None if fate == "done" else LOST)
            case Start(ListPlaces()):
                names = [key.removesuffix(".manifest") for key in self.keys if key.endswith(".manifest")]
                names += [key.rpartition(".")[0] for key in self.keys if not key.endswith(".manifest")]
                outcome = Listed(places_by_object(dict.fromkeys(names)) if fate == "done" else {})
            case Reply(token, answer):
                assert pending.core is not None
                self.end(self.tokens[pending.core, token], answer if fate == "done" else None)
                return
            case _:
                raise AssertionError(f"the durable tier asked for {pending.effect!r}")
        if pending.core is None:
            return
        if outcome is None:
            self.pending.append(pending)
        else:
            self.take(pending.core, pending.core.handle(outcome, self.now), pending.call)

    def job(self, job: JobId) -> Answer:
        """Answer as the control store does; jobs that ended long ago it has forgotten."""
        if job in self.ended_jobs:
            return NotFoundError("long ended")
        return JobRecord(
            job_id=job,
            driver=ProcessId(""),
            hostname="",
            machine_id="",
            pid=1,
            entrypoint="",
            config=JobConfig(namespace=""),
            state=JobState.RUNNING,
            started_at=0.0,
        )

    def store(self, pending: Pending, store: Store, fate: Fate) -> Stored | Conflict | None:
        """Do what ``see_store_through`` does, one step at a time; None: it goes on."""
        value, revision = self.keys.get(store.key, (None, 0))
        if pending.uncertain and revision != store.revision:
            if value is not None and value == store.value:
                return Stored(store.key, value, revision, store.context)
            return Conflict(store.key, value, revision, store.context)
        if fate != "lost" and revision == store.revision:
            self.write(store)
            if fate == "done":
                return Stored(store.key, store.value, self.revision, store.context)
        elif fate == "done":
            return Conflict(store.key, value, revision, store.context)
        pending.uncertain = True
        return None

    def write(self, store: Store) -> None:
        assert store.value is not None, "a marker of a deletion would stay for ever"
        self.revision += 1
        self.keys[store.key] = (store.value, self.revision)
        if store.key.endswith(".manifest"):
            for core in self.cores:
                self.unheard[core].append(Changed(store.key, store.value or None, self.revision))
            if not self.lags:
                self.hear()
        self.note_readable(store.key.partition(".")[0])

    def is_empty_soon(self) -> bool:
        """Tell whether nothing is left once tombstones have gone."""
        self.now += TOMBSTONE_SECONDS
        for replica in range(len(self.cores)):
            self.tick(replica)
        self.settle()
        return not self.keys

    def hear(self) -> None:
        """Tell all replicas what they have not been told yet."""
        for core in self.cores:
            for changed in self.unheard.pop(core, []):
                core.handle(changed, self.now)
            core.holdings.sanity_check()

    def purge(self, command: Purge) -> None:
        """Delete keys; nobody is told of a change of theirs any more."""
        limit = self.revision if command.revision is None else command.revision
        prefix = f"{command.place}."
        for core, unheard in self.unheard.items():
            self.unheard[core] = [
                changed for changed in unheard if not changed.key.startswith(prefix) or changed.revision > limit
            ]
        self.keys = {key: held for key, held in self.keys.items() if not key.startswith(prefix) or held[1] > limit}

    def note_readable(self, object_id: str) -> None:
        """Let whoever reads now see what is sealed now."""
        value, revision = self.keys.get(manifest_key(object_id), (None, 0))
        manifest = decode(value, revision)
        if manifest is not None and manifest.sealed:
            for call in self.calls:
                if call.open and object_of(call.message) == object_id:
                    call.readable.add(tuple(manifest.digests))

    def look(self, object_id: str) -> list[bytes] | None:
        """Return what a reader would get who is alone; None: nothing."""
        alone = World(1)
        alone.keys = self.keys
        described = alone.run(DurableGet(object_id=object_id))
        if isinstance(described, NotFoundError):
            return None
        assert isinstance(described, DurableManifest)
        chunks = [
            alone.run(DurableGetChunk(object_id=object_id, index=index)) for index in range(len(described.digests))
        ]
        return [chunk.data for chunk in chunks if isinstance(chunk, DurableChunk)]


# ------------------------------------------------------------------------------------ under chance


class Script:
    """An asker that sends requests one after the other, each again (to any replica) until it is answered."""

    def __init__(self, chaos: Chaos, messages: Iterator[Message], holder: str = "") -> None:
        self.chaos = chaos
        self.holder = holder
        self.messages = messages
        self.next()

    def next(self) -> None:
        message = next(self.messages, None)
        if message is not None:
            self.send(message)

    def send(self, message: Message) -> None:
        self.chaos.invoked(message)
        call = self.chaos.world.ask(message, self.chaos.random.randrange(REPLICAS), lambda answer: answered(answer))
        call.holder = self.holder

        def answered(answer: Answer | None) -> None:
            if answer is None or isinstance(answer, DisconnectedError):
                self.send(message)
            else:
                self.chaos.answered(call, answer)
                if not isinstance(answer, ShoalError):
                    self.next()


class Chaos(RuleBasedStateMachine):
    """The promises of the core, held against everything that can go wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.random = random.Random(0)
        self.promised: dict[tuple[str, str], list[bytes]] = {}
        self.removed: set[str] = set()
        self.deletes_ended: dict[str, int] = {}
        self.puts_ended: dict[str, int] = {}

    # ---------------------------------------------------------------------------- what askers do

    objects = st.sampled_from(["a", "b"])

    holders = st.sampled_from(["one", "two"])

    @rule(object_id=objects, contents=st.sampled_from(sorted(CONTENTS)), holder=holders)
    def upload(self, object_id: str, contents: str, holder: str) -> None:
        Script(self, iter(upload(object_id, CONTENTS[contents], holder)), holder)

    @rule(object_id=objects)
    def upload_wrong_bytes(self, object_id: str) -> None:
        right = CONTENTS["long"]
        wrong = DurablePutChunk(object_id=object_id, index=1, data=b"SECOND")
        messages = upload(object_id, right)
        Script(self, iter([messages[0], wrong, messages[1], messages[3], messages[4]]), "one")

    @rule(object_id=objects)
    def upload_without_an_end(self, object_id: str) -> None:
        Script(self, iter(upload(object_id, CONTENTS["long"])[:2]))

    @rule(object_id=objects)
    def seal(self, object_id: str) -> None:
        Script(self, iter([DurableSeal(object_id=object_id)]))

    @rule(object_id=objects, index=st.integers(0, 2))
    def read(self, object_id: str, index: int) -> None:
        Script(self, iter([DurableGet(object_id=object_id), DurableGetChunk(object_id=object_id, index=index)]))
        Script(self, iter([DurableGetChunk(object_id=object_id, index=index)]))

    @rule(object_id=objects, holder=st.sampled_from(["one", "two", ""]))
    def delete(self, object_id: str, holder: str) -> None:
        Script(self, iter([DurableDelete(object_id=object_id, holder=holder)]))

    @rule(object_id=objects, heard_by=st.sets(st.integers(0, REPLICAS - 1)))
    def a_job_ends(self, object_id: str, heard_by: set[int]) -> None:
        world, job = self.world, JOBS[object_id]
        world.ended_jobs.add(job)
        self.forget(object_id, "")
        finished = JobFinished(job_id=job, driver=ProcessId(""), state=JobState.SUCCEEDED, message="")
        for replica in heard_by:
            core = world.cores[replica]
            world.take(core, core.handle(Event(finished, "gcs"), world.now), None)

    # ---------------------------------------------------------------------------- what happens to them

    @rule(seed=st.integers(0, 2**32), steps=st.integers(1, 30), trouble=st.sampled_from([0.0, 0.1, 0.5]))
    def work(self, seed: int, steps: int, trouble: float) -> None:
        self.random = random.Random(seed)
        for _ in range(steps):
            if not self.world.pending:
                break
            fates: list[Fate] = ["answer lost", "lost"]
            fate = self.random.choice(fates) if self.random.random() < trouble else "done"
            self.perform(self.random.choice(self.world.pending), fate)

    @rule(replica=st.integers(0, REPLICAS - 1))
    def crash(self, replica: int) -> None:
        self.world.crash(replica)

    @rule(lags=st.booleans())
    def watch(self, lags: bool) -> None:
        """Let replicas be behind with what they are told, or catch up."""
        self.world.lags = lags
        if not lags:
            self.world.hear()

    @rule(replica=st.integers(0, REPLICAS - 1), seconds=st.sampled_from([0.0, 1.0, ABANDONED_SECONDS + 1]))
    def sweep(self, replica: int, seconds: float) -> None:
        if seconds:
            self.world.hear()
        self.world.now += seconds
        self.world.tick(replica)

    def perform(self, pending: Pending, fate: Fate) -> None:
        call = pending.call
        self.world.perform(pending, fate)
        if call is None:
            return
        object_id = object_of(call.message)
        for kind, ended in ((DurableDelete, self.deletes_ended), (DurablePut, self.puts_ended)):
            if isinstance(call.message, kind):
                ended[object_id] = self.world.step

    # ---------------------------------------------------------------------------- what is promised

    def forget(self, object_id: str, holder: str) -> None:
        """Promise nothing of what these holders hold."""
        for kept in [kept for kept in self.promised if kept[0] == object_id and kept[1].startswith(holder)]:
            del self.promised[kept]

    def invoked(self, message: Message) -> None:
        """Take back the promises that a request may undo."""
        if isinstance(message, DurableDelete):
            self.forget(message.object_id, message.holder)
        elif isinstance(message, DurablePut):
            self.removed.discard(message.object_id)

    def answered(self, call: Call, answer: Answer) -> None:
        object_id = object_of(call.message)
        running = JOBS[object_id] not in self.world.ended_jobs
        match call.message, answer:
            case DurablePut(), DurableUpload(sealed=True):
                if call.holder and running and self.undisturbed(call, DurableDelete, self.deletes_ended):
                    self.promised[object_id, call.holder] = BY_DIGESTS[tuple(call.message.digests)]
            case DurableDelete(holder=""), Done():
                if self.undisturbed(call, DurablePut, self.puts_ended):
                    self.removed.add(object_id)
            case DurableSeal(), Done():
                holds = decode(*self.world.keys.get(manifest_key(object_id), (None, 0)))
                undisturbed = running and self.undisturbed(call, DurableDelete, self.deletes_ended)
                if call.holder and undisturbed and holds is not None and call.holder in holds.holders:
                    self.promised[object_id, call.holder] = BY_DIGESTS[tuple(holds.digests)]
            case DurableGet(), DurableManifest():
                assert tuple(answer.digests) in call.readable, "only what is sealed is readable"
                assert answer.size_bytes == sum(map(len, BY_DIGESTS[tuple(answer.digests)]))
            case DurableGetChunk(index=index), DurableChunk():
                possible = [BY_DIGESTS[known] for known in call.readable]
                assert answer.data in [chunks[index] for chunks in possible if index < len(chunks)]

    def undisturbed(self, call: Call, kind: type[Message], ended: dict[str, int]) -> bool:
        """Tell whether no request of a kind was under way at any time from the call to its answer."""
        object_id = object_of(call.message)
        return not self.world.under_way(kind, object_id) and ended.get(object_id, 0) <= call.began_at

    @invariant()
    def promises_are_kept(self) -> None:
        for (object_id, _), contents in self.promised.items():
            assert self.world.look(object_id) == contents
        for object_id in self.removed:
            assert self.world.look(object_id) is None

    def teardown(self) -> None:
        self.world.settle()
        self.promises_are_kept()
        assert not [call for call in self.world.calls if call.open], "every request was answered"
        assert not any(core.under_way for core in self.world.cores)
        self.watch(lags=False)
        for _ in range(3):  # the first asks which jobs have ended, the second finds what that left, and then it goes
            self.world.now += ABANDONED_SECONDS + 1
            self.world.tick(0)
            self.world.settle()
        self.promises_are_kept()
        expected = set()
        for object_id in ("a", "b"):
            manifest = decode(*self.world.keys.get(manifest_key(object_id), (None, 0)))
            if manifest is not None:
                assert manifest.sealed, "an upload that nobody ends is swept"
                assert manifest.holders, "what nobody holds is removed"
                assert manifest.job_id not in self.world.ended_jobs, "what is of a job that has ended is removed"
                expected |= {manifest_key(object_id), *(f"{manifest.place}.{n}" for n in range(len(manifest.digests)))}
        assert set(self.world.keys) == expected, "nothing else is left"
        there = {key.removesuffix(".manifest") for key in expected if key.endswith(".manifest")}
        for core in self.world.cores:
            assert {*core.holdings._objects} == there, "every replica knows what there is"


Chaos.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_promises_are_kept_whatever_happens = Chaos.TestCase


# ------------------------------------------------------------------------------------ one thing at a time


def stored_world(object_id: str = "a", contents: str = "long") -> World:
    """Return a world of one replica where an object is sealed."""
    world = World(1)
    for message in upload(object_id, CONTENTS[contents]):
        assert not isinstance(world.run(message), ShoalError)
    return world


def test_a_delete_leaves_nothing() -> None:
    world = stored_world()
    assert world.look("a") == CONTENTS["long"]
    assert world.run(DurableDelete(object_id="a")) == Done()
    assert [*world.keys] == ["a.manifest"], "the tombstone stays until all replicas have seen it"
    assert world.run(DurableDelete(object_id="a")) == Done()
    assert world.is_empty_soon()
    assert world.run(DurableDelete(object_id="a")) == Done()
    assert isinstance(world.run(DurableGet(object_id="a")), NotFoundError)


def test_a_replica_that_is_behind_hears_of_a_delete_all_the_same() -> None:
    world = stored_world()
    world.lags = True
    world.run(DurableDelete(object_id="a"))
    assert len(world.cores[0].holdings) == 1
    world.hear()
    assert len(world.cores[0].holdings) == 0
    assert world.is_empty_soon()


def test_a_purge_that_comes_late_spares_what_was_put_since() -> None:
    world = stored_world()
    world.ask(DurableDelete(object_id="a"), 0, lambda answer: None)
    world.perform(world.pending[0], "done")  # the manifest is read
    world.perform(world.pending[0], "done")  # the tombstone is written
    [purge] = world.pending
    world.pending.clear()
    for message in upload("a", CONTENTS["short"]):
        assert not isinstance(world.run(message), ShoalError)
    world.pending.append(purge)
    world.settle()
    assert world.look("a") == CONTENTS["short"]
    assert len(world.keys) == 2


def test_a_sweep_spares_an_upload_that_was_opened_after_it_looked() -> None:
    world = World(1)
    world.keys["a.7.0"] = (b"left", 9)
    world.revision = 9
    world.settle()
    world.now += SWEEP_SECONDS
    world.tick(0)
    world.perform(world.pending[0], "done")  # the places are listed
    world.perform(world.pending[0], "done")  # there is no manifest
    [purge] = world.pending
    world.pending.clear()
    for message in upload("a", CONTENTS["long"]):
        assert not isinstance(world.run(message), ShoalError)
    world.pending.append(purge)
    world.settle()
    assert world.look("a") == CONTENTS["long"]
    assert "a.7.0" not in world.keys


def test_other_bytes_of_a_chunk_are_refused() -> None:
    world = World(1)
    messages = upload("a", CONTENTS["long"])
    assert world.run(messages[0]) == DurableUpload(place="a.1", sealed=False)
    assert world.run(messages[1]) == Done()
    assert world.run(messages[1]) == Done(), "the same bytes are the same request"
    other = world.run(DurablePutChunk(object_id="a", index=0, data=b"FIRST"))
    assert isinstance(other, InvalidRequestError)
    assert "chunk 0 of object a" in str(other)


def test_an_object_is_not_sealed_before_it_is_whole() -> None:
    world = World(1)
    messages = upload("a", CONTENTS["long"])
    for message in messages[:2]:
        world.run(message)
    refusal = world.run(messages[-1])
    assert isinstance(refusal, NotFoundError)
    assert "1 of its 3 chunks" in str(refusal)
    assert world.look("a") is None
    for message in messages[2:]:
        assert world.run(message) == Done()
    assert world.look("a") == CONTENTS["long"]


def test_an_object_stays_until_its_last_holder_lets_go() -> None:
    world = stored_world()
    again = world.run(put("a", CONTENTS["long"], "two"))
    assert isinstance(again, DurableUpload)
    assert again.sealed
    assert isinstance(world.run(put("a", CONTENTS["short"], "three")), AlreadyExistsError)
    for holder in ("one", "one", "nobody"):
        assert world.run(DurableDelete(object_id="a", holder=holder)) == Done()
        assert world.look("a") == CONTENTS["long"]
    assert world.run(DurableDelete(object_id="a", holder="two")) == Done()
    assert world.is_empty_soon()


def test_all_holders_whose_names_begin_alike_let_go_together() -> None:
    world = stored_world()
    for holder in ("node:1", "node:2"):
        world.run(put("a", CONTENTS["long"], holder))
    world.run(DurableDelete(object_id="a", holder="node:"))
    assert world.look("a") == CONTENTS["long"]
    world.run(DurableDelete(object_id="a", holder="one"))
    assert world.is_empty_soon()


def test_what_is_held_for_a_time_goes_with_it() -> None:
    world = World(1)
    for message in upload("a", CONTENTS["long"], "one", keep_seconds=10.0):
        assert not isinstance(world.run(message), ShoalError)
    world.run(put("a", CONTENTS["long"], "two", 30.0))
    for seconds, there in ((9.0, True), (2.0, True), (20.0, False)):
        world.now += seconds
        world.tick(0)
        world.settle()
        assert (world.look("a") is not None) == there
    assert world.is_empty_soon()


def finished(object_id: str) -> Event:
    return Event(JobFinished(job_id=JOBS[object_id], driver=ProcessId(""), state=JobState.SUCCEEDED, message=""), "gcs")


def test_the_end_of_a_job_removes_its_objects_and_refuses_new_ones() -> None:
    world = stored_world()
    for message in upload("b", CONTENTS["short"]):
        world.run(message)
    world.take(world.cores[0], world.cores[0].handle(finished("a"), world.now), None)
    world.settle()
    assert world.look("a") is None
    assert world.look("b") == CONTENTS["short"]
    refusal = world.run(put("a", CONTENTS["long"]))
    assert isinstance(refusal, DeclaredDeadError)
    assert JOBS["a"] in str(refusal)


def test_a_replica_that_was_away_asks_whether_jobs_have_ended() -> None:
    for how in (Connected(True), None):
        world = stored_world()
        world.ended_jobs.add(JOBS["a"])
        if how is None:
            world.crash(0)
        else:
            world.take(world.cores[0], world.cores[0].handle(how, world.now), None)
        world.tick(0)
        world.settle()
        assert world.is_empty_soon()


def test_an_object_that_passes_a_bound_is_refused_and_says_who_holds_what() -> None:
    for quotas, text in (
        (Quotas(total_bytes=20), f"16 of 20 bytes are in use (job {JOBS['a']} holds 16)"),
        (Quotas(job_bytes=20), f"job {JOBS['a']} holds 16 of the 20 bytes"),
    ):
        world = stored_world()
        core = world.cores[0]
        core.holdings.quotas = quotas
        other = put("c", CONTENTS["long"]).model_copy(update={"job_id": JOBS["a"]})
        refusal = world.run(other)
        assert isinstance(refusal, ObjectStoreFullError)
        assert text in str(refusal)
        assert isinstance(world.run(put("a", CONTENTS["long"], "two")), DurableUpload), "it takes no more room"
        world.run(DurableDelete(object_id="a"))
        assert isinstance(world.run(other), DurableUpload)


@pytest.mark.parametrize("object_id", ["*", ">", "a.b", "a b", "", "x" * 129, "a\n"])
def test_an_id_that_could_mean_other_objects_is_refused_by_every_request(object_id: str) -> None:
    world = stored_world()
    reads = [DurableGet(object_id=object_id), DurableGetChunk(object_id=object_id, index=0)]
    for message in [*upload(object_id, [b""]), *reads, DurableDelete(object_id=object_id)]:
        refusal = world.run(message)
        assert isinstance(refusal, InvalidRequestError)
        assert "object_id" in str(refusal)
    assert world.look("a") == CONTENTS["long"]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (DurablePut(object_id="b", size_bytes=0, digests=[]), "do not make 0 chunks"),
        (DurablePut(object_id="b", size_bytes=-1, digests=[0]), "-1 bytes do not make 1 chunks"),
        (DurablePut(object_id="b", size_bytes=CHUNK_BYTES + 1, digests=[0]), "do not make 1 chunks"),
        (DurablePutChunk(object_id="a", index=3, data=b""), "not 3"),
        (DurablePutChunk(object_id="a", index=-1, data=b""), "not -1"),
        (DurablePutChunk(object_id="a", index=0, data=bytes(CHUNK_BYTES + 1)), "at most 1044480 bytes"),
        (DurableGetChunk(object_id="a", index=3), "not 3"),
    ],
)
def test_a_wrong_request_is_refused(message: Message, text: str) -> None:
    refusal = stored_world().run(message)
    assert isinstance(refusal, RequestRefusedError)
    assert text in str(refusal)


def test_what_is_refused_is_refused_before_anything_is_read() -> None:
    core = DurableTier()
    [reply] = core.handle(Request(Echo(number=1), 1), 0.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, InvalidRequestError)


def test_a_chunk_that_finds_no_room_is_refused_as_such() -> None:
    core = DurableTier()
    [load] = core.handle(Request(put("a", [b"x"]), 1), 0.0)
    assert isinstance(load, Load)
    [store] = core.handle(Loaded(load.key, None, 0, load.context), 0.0)
    assert isinstance(store, Store)
    full = JetStreamError("maximum bytes exceeded", 503, 10077)
    [reply] = core.handle(StoreRefused(store.key, full, store.context), 0.0)
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, ObjectStoreFullError)
    assert "maximum bytes exceeded" in str(reply.message)


def test_so_many_requests_are_under_way_at_most() -> None:
    world = World(1)
    world.settle()
    refusals: list[Answer | None] = []
    for _ in range(MOST_REQUESTS):
        world.ask(DurableGet(object_id="a"), 0, lambda answer: None)
    world.ask(DurableGet(object_id="a"), 0, refusals.append)
    world.settle()
    [refusal] = refusals
    assert isinstance(refusal, ServiceError)
    assert "busy" in str(refusal)
    assert isinstance(world.run(DurableGet(object_id="a")), NotFoundError), "there is room again"


def test_sweeping_goes_on_after_an_object_that_could_not_be_swept() -> None:
    world = World(1)
    world.settle()
    for revision, name in enumerate(["a", "b", "c"], 1):
        world.keys[f"{name}.7.0"] = (b"left", revision)
    world.revision = 3
    world.now += SWEEP_SECONDS
    world.tick(0)
    while world.pending:
        effect = world.pending[0].effect
        of_b = isinstance(effect, Start) and isinstance(effect.command, Purge) and effect.command.place == "b.7"
        world.perform(world.pending[0], "lost" if of_b else "done")
    assert set(world.keys) == {"b.7.0"}
    world.now += SWEEP_SECONDS
    world.tick(0)
    world.settle()
    assert world.keys == {}


def test_a_sweep_begins_only_when_the_one_before_is_over() -> None:
    world = World(1)
    world.settle()
    for number in range(2 * SWEEPS_AT_ONCE):
        world.keys[f"o{number}.7.0"] = (b"left", 1)
    world.revision = 1
    world.now += SWEEP_SECONDS
    world.tick(0)
    world.perform(world.pending[0], "done")
    assert len(world.pending) == SWEEPS_AT_ONCE, "a few objects are swept at a time"
    world.now += SWEEP_SECONDS
    world.tick(0)
    assert [pending.effect for pending in world.pending if isinstance(pending.effect, Start)] == []
    world.settle()
    assert world.keys == {}


def test_a_replica_counts_what_it_did() -> None:
    world = stored_world()
    world.look("a")
    counts = world.cores[0].counts
    assert (counts.opened, counts.sealed, counts.written_bytes) == (1, 1, len(b"firstsecondthird"))
    assert counts.read_bytes == 0, "it was read through another replica"
    world.run(DurableDelete(object_id="a"))
    world.run(put("b", [b"x"]))
    assert (len(world.cores[0].holdings), world.cores[0].holdings.total_bytes) == (1, 1)
    world.now += ABANDONED_SECONDS + 1
    world.tick(0)
    world.settle()
    assert (counts.deleted, counts.swept) == (1, 1)
    assert world.is_empty_soon()


def test_a_lost_connection_asks_for_nothing() -> None:
    core = DurableTier()
    assert core.handle(Connected(False), 0.0) == core.handle(Connected(True), 0.0) == []


def test_an_unknown_input_is_an_error() -> None:
    with pytest.raises(TypeError, match="not an input"):
        DurableTier().handle(object(), 0.0)
