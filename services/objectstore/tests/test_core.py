"""The core of the durable tier: several replicas on one stream, crashes between any two effects, answers that get lost.

A world keeps the stream's keys and what the replicas asked for and was not done yet. Chance decides what is done next,
and whether its answer arrives. What a replica that crashed had sent may still be done.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal_core.protocol.effects import (
    Conflict,
    Connected,
    Effect,
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
    DisconnectedError,
    InvalidRequestError,
    JetStreamError,
    NotFoundError,
    ObjectStoreFullError,
    RequestRefusedError,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.messages import (
    Done,
    DurableChunk,
    DurableDelete,
    DurableGet,
    DurableGetChunk,
    DurableManifest,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
    Echo,
    Message,
)
from shoal_objectstore.core import MOST_REQUESTS, SWEEP_SECONDS, Begin, DurableTier, Listed, ListPlaces
from shoal_objectstore.manifests import ABANDONED_SECONDS, CHUNK_BYTES, decode, manifest_key
from shoal_objectstore.operations import ChunkRead, Purge, Purged, ReadChunk
from shoal_objectstore.service import places_by_object

Fate = Literal["done", "answer lost", "lost"]
Answer = Message | ShoalError
LOST = DisconnectedError("the connection broke while a request was in flight")
REPLICAS = 3
CONTENTS = {
    "short": [b"one"],
    "long": [b"first", b"second", b"third"],
    "empty": [b""],
}


def digest(chunks: list[bytes]) -> str:
    return f"{zlib.crc32(b''.join(chunks)):08x}"


BY_DIGEST = {digest(chunks): chunks for chunks in CONTENTS.values()}


def put(object_id: str, chunks: list[bytes]) -> DurablePut:
    size_bytes = sum(map(len, chunks))
    return DurablePut(object_id=object_id, size_bytes=size_bytes, chunks=len(chunks), digest=digest(chunks))


def upload(object_id: str, chunks: list[bytes]) -> list[Message]:
    parts = [DurablePutChunk(object_id=object_id, index=index, data=data) for index, data in enumerate(chunks)]
    return [put(object_id, chunks), *parts, DurableSeal(object_id=object_id)]


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
    readable: set[str] = field(default_factory=set)


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
        self.cores = [self.begin() for _ in range(replicas)]

    def begin(self) -> DurableTier:
        core = DurableTier()
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
        assert WakeAt(self.now + SWEEP_SECONDS) in effects
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

    def store(self, pending: Pending, store: Store, fate: Fate) -> Stored | Conflict | None:
        """Do what ``perform_store`` does, one step at a time; None: it goes on."""
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
        self.note_readable(store.key.partition(".")[0])

    def purge(self, command: Purge) -> None:
        limit = self.revision if command.revision is None else command.revision
        prefix = f"{command.place}."
        self.keys = {key: held for key, held in self.keys.items() if not key.startswith(prefix) or held[1] > limit}

    def note_readable(self, object_id: str) -> None:
        """Let whoever reads now see what is sealed now."""
        value, revision = self.keys.get(manifest_key(object_id), (None, 0))
        manifest = decode(value, revision)
        if manifest is not None and manifest.sealed:
            for call in self.calls:
                if call.open and object_of(call.message) == object_id:
                    call.readable.add(manifest.digest)

    def look(self, object_id: str) -> list[bytes] | None:
        """Return what a reader would get who is alone; None: nothing."""
        alone = World(1)
        alone.keys = self.keys
        described = alone.run(DurableGet(object_id=object_id))
        if isinstance(described, NotFoundError):
            return None
        assert isinstance(described, DurableManifest)
        chunks = [alone.run(DurableGetChunk(object_id=object_id, index=index)) for index in range(described.chunks)]
        return [chunk.data for chunk in chunks if isinstance(chunk, DurableChunk)]


# ------------------------------------------------------------------------------------ under chance


class Script:
    """An asker that sends requests one after the other, each again (to any replica) until it is answered."""

    def __init__(self, chaos: Chaos, messages: Iterator[Message]) -> None:
        self.chaos = chaos
        self.messages = messages
        self.next()

    def next(self) -> None:
        message = next(self.messages, None)
        if message is not None:
            self.send(message)

    def send(self, message: Message) -> None:
        self.chaos.invoked(message)
        call = self.chaos.world.ask(message, self.chaos.random.randrange(REPLICAS), lambda answer: answered(answer))

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
        self.promised: dict[str, list[bytes] | None] = {}
        self.deletes_ended: dict[str, int] = {}
        self.puts_ended: dict[str, int] = {}

    # ---------------------------------------------------------------------------- what askers do

    objects = st.sampled_from(["a", "b"])

    @rule(object_id=objects, contents=st.sampled_from(sorted(CONTENTS)))
    def upload(self, object_id: str, contents: str) -> None:
        Script(self, iter(upload(object_id, CONTENTS[contents])))

    @rule(object_id=objects)
    def upload_wrong_bytes(self, object_id: str) -> None:
        right = CONTENTS["long"]
        wrong = DurablePutChunk(object_id=object_id, index=1, data=b"SECOND")
        messages = upload(object_id, right)
        Script(self, iter([messages[0], wrong, messages[1], messages[3], messages[4]]))

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

    @rule(object_id=objects)
    def delete(self, object_id: str) -> None:
        Script(self, iter([DurableDelete(object_id=object_id)]))

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

    @rule(replica=st.integers(0, REPLICAS - 1), seconds=st.sampled_from([0.0, 1.0, ABANDONED_SECONDS + 1]))
    def sweep(self, replica: int, seconds: float) -> None:
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

    def invoked(self, message: Message) -> None:
        """Take back the promises that a request may undo."""
        object_id = object_of(message)
        holds = self.promised.get(object_id, ()) is not None
        if isinstance(message, DurableDelete) or (isinstance(message, DurablePut) and not holds):
            self.promised.pop(object_id, None)

    def answered(self, call: Call, answer: Answer) -> None:
        object_id = object_of(call.message)
        match call.message, answer:
            case DurableSeal(), DurableManifest():
                if self.undisturbed(call, DurableDelete, self.deletes_ended):
                    self.promised[object_id] = BY_DIGEST[answer.digest]
            case DurableDelete(), Done():
                if self.undisturbed(call, DurablePut, self.puts_ended):
                    self.promised[object_id] = None
            case DurableGet(), DurableManifest():
                assert answer.digest in call.readable, "only what is sealed is readable"
                assert (answer.size_bytes, answer.chunks) == (
                    sum(map(len, BY_DIGEST[answer.digest])),
                    len(BY_DIGEST[answer.digest]),
                )
            case DurableGetChunk(index=index), DurableChunk():
                possible = [BY_DIGEST[known] for known in call.readable]
                assert answer.data in [chunks[index] for chunks in possible if index < len(chunks)]

    def undisturbed(self, call: Call, kind: type[Message], ended: dict[str, int]) -> bool:
        """Tell whether no request of a kind was under way at any time from the call to its answer."""
        object_id = object_of(call.message)
        return not self.world.under_way(kind, object_id) and ended.get(object_id, 0) <= call.began_at

    @invariant()
    def promises_are_kept(self) -> None:
        for object_id, contents in self.promised.items():
            assert self.world.look(object_id) == contents

    def teardown(self) -> None:
        self.world.settle()
        self.promises_are_kept()
        assert not [call for call in self.world.calls if call.open], "every request was answered"
        assert not any(core.under_way for core in self.world.cores)
        self.world.now += ABANDONED_SECONDS + 1
        self.world.tick(0)
        self.world.settle()
        self.promises_are_kept()
        expected = set()
        for object_id in ("a", "b"):
            manifest = decode(*self.world.keys.get(manifest_key(object_id), (None, 0)))
            if manifest is not None:
                assert manifest.sealed, "an upload that nobody ends is swept"
                expected |= {manifest_key(object_id), *(f"{manifest.place}.{n}" for n in range(manifest.chunks))}
        assert set(self.world.keys) == expected, "nothing else is left"


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
    assert world.keys == {}
    assert world.run(DurableDelete(object_id="a")) == Done()
    assert isinstance(world.run(DurableGet(object_id="a")), NotFoundError)


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
    for message in messages[:2]:
        assert world.run(message) == Done()
    assert world.run(messages[1]) == Done(), "the same bytes are the same request"
    other = world.run(DurablePutChunk(object_id="a", index=0, data=b"FIRST"))
    assert isinstance(other, AlreadyExistsError)
    assert "chunk 0 of object a" in str(other)


def test_a_wrong_digest_is_refused_until_the_object_was_deleted() -> None:
    world = World(1)
    messages = upload("a", CONTENTS["short"])
    world.run(messages[0])
    world.run(DurablePutChunk(object_id="a", index=0, data=b"two"))
    refusal = world.run(messages[2])
    assert isinstance(refusal, ServiceError)
    assert "digest" in str(refusal)
    assert world.look("a") is None
    world.run(DurableDelete(object_id="a"))
    for message in messages:
        assert not isinstance(world.run(message), ShoalError)
    assert world.look("a") == CONTENTS["short"]


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
        (DurablePut(object_id="b", size_bytes=0, chunks=0, digest=""), "at least one chunk"),
        (DurablePut(object_id="b", size_bytes=-1, chunks=1, digest=""), "negative"),
        (DurablePutChunk(object_id="a", index=3, data=b""), "not 3"),
        (DurablePutChunk(object_id="a", index=-1, data=b""), "not -1"),
        (DurablePutChunk(object_id="a", index=0, data=bytes(CHUNK_BYTES + 1)), "at most 524288 bytes"),
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
    world.tick(0)
    while world.pending:
        effect = world.pending[0].effect
        of_b = isinstance(effect, Start) and isinstance(effect.command, Purge) and effect.command.place == "b.7"
        world.perform(world.pending[0], "lost" if of_b else "done")
    assert set(world.keys) == {"b.7.0"}
    world.tick(0)
    world.settle()
    assert world.keys == {}


def test_one_sweep_follows_the_other_only_when_it_is_over() -> None:
    world = World(1)
    world.settle()
    for name in ("a", "b", "c"):
        world.keys[f"{name}.7.0"] = (b"left", 1)
    world.revision = 1
    world.tick(0)
    world.perform(world.pending[0], "done")
    assert len(world.pending) == 1, "objects are swept one after the other"
    world.tick(0)
    assert [pending.effect for pending in world.pending if isinstance(pending.effect, Start)] == []
    world.settle()
    assert world.keys == {}


def test_a_replica_counts_what_it_did() -> None:
    world = stored_world()
    world.look("a")
    counts = world.cores[0].counts
    assert (counts.opened, counts.sealed, counts.written_bytes) == (1, 1, len(b"firstsecondthird"))
    assert counts.read_bytes == len(b"firstsecondthird"), "what the seal read"
    world.run(DurableDelete(object_id="a"))
    world.run(put("b", [b"x"]))
    world.now += ABANDONED_SECONDS + 1
    world.tick(0)
    world.settle()
    assert (counts.deleted, counts.swept) == (1, 1)
    assert world.keys == {}


def test_a_lost_connection_asks_for_nothing() -> None:
    core = DurableTier()
    assert core.handle(Connected(False), 0.0) == core.handle(Connected(True), 0.0) == []


def test_an_unknown_input_is_an_error() -> None:
    with pytest.raises(TypeError, match="not an input"):
        DurableTier().handle(object(), 0.0)
