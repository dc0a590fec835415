"""The engine: a core's inputs and effects over the in-memory bus."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shoal_core.bus.interface import Message
from shoal_core.bus.jetstream import WRONG_LAST_SEQUENCE, Acknowledged
from shoal_core.bus.keyvalue import Entry, KeyValue, WatchCallback, conflict
from shoal_core.bus.memory import MemoryBroker, MemoryBus
from shoal_core.bus.watch import Watch
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
    Publish,
    Reply,
    Request,
    Send,
    Start,
    Store,
    Stored,
    WakeAt,
)
from shoal_core.protocol.errors import (
    InvalidRequestError,
    JetStreamError,
    NoRespondersError,
    NotFoundError,
    RevisionConflict,
    ServiceError,
    ShoalError,
)
from shoal_core.protocol.groups import GroupChanged, GroupState, RemoveGroup
from shoal_core.protocol.ids import PlacementGroupId, new_process_id
from shoal_core.protocol.messages import Done, Echo, KvAdded, KvGet, KvPut, KvValue
from shoal_core.protocol.records import WorkerReady
from shoal_core.protocol.subjects import GCS_QUEUE, Role, Subjects
from shoal_core.protocol.wire import decode_packet, decode_replies, decode_reply, encode, pack, packets
from shoal_core.service import Engine, Route
from shoal_core.service import engine as engine_module
from shoal_core.testing import run_virtual
from shoal_core.testing.buses import CLUSTER, until

SUBJECTS = Subjects(CLUSTER)
GET = SUBJECTS.gcs("kv_get")
PUT = SUBJECTS.gcs("kv_put")
ROUTES = (
    Route(GET, KvGet, GCS_QUEUE),
    Route(PUT, KvPut, GCS_QUEUE),
    Route(SUBJECTS.event(Role.GCS, "*", "echo"), Echo, kind="event"),
)
Decide = Callable[[Any], list[Effect]]


class ScriptedCore:
    """A core that does what a test says, and remembers what it heard."""

    def __init__(self, decide: Decide, tick: Callable[[float], list[Effect]] | None = None) -> None:
        self.heard: list[Any] = []
        self.ticks: list[float] = []
        self._decide = decide
        self._tick = tick or (lambda now: [])

    def handle(self, message: Any, now: float) -> list[Effect]:
        self.heard.append(message)
        return self._decide(message)

    def tick(self, now: float) -> list[Effect]:
        self.ticks.append(now)
        return self._tick(now)

    def heard_of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


class World:
    """A broker, the bus of the engine, and that of an asker."""

    def __init__(self, broker: MemoryBroker, service: MemoryBus, asker: MemoryBus) -> None:
        self.broker = broker
        self.service = service
        self.asker = asker

    def engine(self, core: ScriptedCore, **options: Any) -> Engine:
        return Engine(core, self.service, name="gcs", routes=options.pop("routes", ROUTES), **options)

    async def ask(self, subject: str = GET, data: bytes = encode(KvGet(namespace="n", key="k"))) -> KvValue:
        return decode_reply(KvValue, (await self.asker.request(subject, data, timeout_seconds=5)).data)

    def listen(self, *subjects: str) -> list[str]:
        """Return a list that gets the last token of the subject of each message that the asker hears."""
        heard: list[str] = []
        for subject in subjects:
            self.asker.subscribe(subject, lambda message: heard.append(message.subject.rsplit(".", 1)[1]))
        return heard


@asynccontextmanager
async def joined(*, max_payload: int = 1024 * 1024) -> AsyncIterator[World]:
    broker = MemoryBroker(max_payload=max_payload)
    async with (
        broker.connect(role=Role.GCS, identity="replica", cluster=CLUSTER) as service,
        broker.connect(role=Role.PROCESS, identity=new_process_id(), cluster=CLUSTER) as asker,
    ):
        yield World(broker, service, asker)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with joined() as world:
        yield world


class SlowBucket(KeyValue):
    """A bucket whose writes and reads wait until they are let go."""

    bucket = "slow"

    def __init__(self, taken: Mapping[str, bytes] | None = None) -> None:
        self.begun: list[str] = []
        self.gate = asyncio.Event()
        self.values = dict(taken or {})
        self.tasks: list[asyncio.Future[None]] = []

    async def get(self, key: str) -> Entry | None:
        self.begun.append(key)
        await self.gate.wait()
        return Entry(key, self.values[key], 1) if key in self.values else None

    async def put(self, key: str, value: bytes, *, revision: int) -> int:
        self.begun.append(key)
        await self.gate.wait()
        if key in self.values:
            raise conflict(self.bucket, key, revision, Entry(key, self.values[key], 1))
        self.values[key] = value
        return 7

    def begin(self, key: str, value: bytes | None, settled: Acknowledged, *, revision: int) -> None:
        assert value is not None
        wanted = value

        async def put() -> None:
            try:
                settled(await self.put(key, wanted, revision=revision))
            except RevisionConflict:
                settled(JetStreamError("wrong last sequence", 400, WRONG_LAST_SEQUENCE[0]))

        self.tasks.append(asyncio.ensure_future(put()))

    async def delete(self, key: str, *, revision: int) -> None:
        raise NotImplementedError

    async def purge(self, prefix: str) -> int:
        raise NotImplementedError

    async def watch(self, callback: WatchCallback) -> Watch:
        raise ConnectionResetError("no watch today")


def answering(value: bytes = b"v") -> Decide:
    return lambda message: [Reply(message.token, KvValue(value=value))] if isinstance(message, Request) else []


def event(kind: str) -> Publish:
    return Publish(SUBJECTS.event(Role.GCS, "replica", kind), Echo(number=1))


# ------------------------------------------------------------------------------------ effects


async def test_effects_happen_in_their_order(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        if not isinstance(message, Request):
            return []
        return [event("one"), Reply(message.token, KvValue(value=None)), event("two")]

    async with world.engine(ScriptedCore(decide)):
        reply = f"{world.asker.inbox}.manual.answer"
        heard = world.listen(SUBJECTS.event(Role.GCS, "*", "*"), reply)
        world.asker.publish(GET, encode(KvGet(namespace="n", key="k")), reply=reply)
        await until(lambda: len(heard) == 3)
        assert heard == ["one", "answer", "two"]


async def test_an_answer_goes_to_an_inbox_only(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        return [Reply(message.token, KvValue(value=None))] if isinstance(message, Request) else []

    elsewhere = SUBJECTS.event(Role.GCS, "replica", "forged")
    async with world.engine(ScriptedCore(decide)):
        heard = world.listen(elsewhere)
        for data in (encode(KvGet(namespace="n", key="k")), b"not a request"):
            world.asker.publish(GET, data, reply=elsewhere)
        assert await world.ask() == KvValue(value=None)
        await world.asker.flush()
        assert heard == []


async def test_what_comes_in_crowds_is_asked_told_and_answered_in_packets(world: World) -> None:
    remove, changes = SUBJECTS.gcs("remove_group"), SUBJECTS.groups_changed("replica", "creator")
    requests = [RemoveGroup(group_id=PlacementGroupId(f"{number:032x}"), reason="told to") for number in range(3)]

    def decide(message: Any) -> list[Effect]:
        match message:
            case Request(RemoveGroup() as request):
                gone = GroupChanged(group_id=request.group_id, state=GroupState.REMOVED, attempt=0, nodes=[])
                return [Ask(remove, request, message.token), Publish(changes, gone)]
            case Answered(token, answer):
                return [Reply(token, answer)]
        return []

    async with world.engine(ScriptedCore(decide), routes=[Route(GET, RemoveGroup, GCS_QUEUE)]):
        asked: list[Message] = []
        told: list[Message] = []

        def answer(message: Message) -> None:
            asked.append(message)
            answers: list[Done | ShoalError] = [Done(), NotFoundError("there is none"), Done()]
            world.service.publish(message.reply, pack([encode(answer) for answer in answers]))

        world.service.subscribe(remove, answer)
        world.asker.subscribe(changes, told.append)
        await world.asker.flush()
        ((_, packet),) = packets(requests)
        reply = await world.asker.request(GET, packet, timeout_seconds=5)
        first, second, third = decode_replies(Done, reply.data, 3)
        assert (first, third) == (Done(), Done())
        assert isinstance(second, NotFoundError)
        assert [decode_packet(RemoveGroup, message.data) for message in asked] == [requests]
        assert [len(decode_packet(GroupChanged, message.data)) for message in told] == [3]


async def test_a_packet_that_is_lost_is_lost_for_each_of_its_requests(world: World) -> None:
    requests = [RemoveGroup(group_id=PlacementGroupId(f"{number:032x}"), reason="told to") for number in range(2)]

    def decide(message: Any) -> list[Effect]:
        return [Ask(SUBJECTS.gcs("remove_group"), r, i) for i, r in enumerate(requests)] if message == "go" else []

    core = ScriptedCore(decide)
    async with world.engine(core) as engine:
        engine.inject("go")
        await until(lambda: len(core.heard_of(Answered)) == 2)
        assert [(told.context, type(told.answer)) for told in core.heard_of(Answered)] == [
            (0, NoRespondersError),
            (1, NoRespondersError),
        ]


async def test_what_follows_a_store_waits_for_it_while_other_inputs_are_handled(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        match message:
            case Request(KvPut(), token):
                return [event("before"), Store("key", b"value", 0, "context"), Reply(token, KvAdded(added=True))]
            case Request(KvGet(), token):
                return [Reply(token, KvValue(value=b"other"))]
        return []

    core, bucket = ScriptedCore(decide), SlowBucket()
    async with world.engine(core, stores={"": bucket}):
        heard = world.listen(SUBJECTS.event(Role.GCS, "*", "*"))
        put = encode(KvPut(namespace="n", key="k", value=b"v"))
        asked = asyncio.ensure_future(world.asker.request(PUT, put, timeout_seconds=5))
        await until(lambda: bucket.begun == ["key"])
        assert heard == ["before"]
        assert await world.ask() == KvValue(value=b"other")
        assert not asked.done()
        assert core.heard_of(Stored) == []
        bucket.gate.set()
        assert decode_reply(KvAdded, (await asked).data) == KvAdded(added=True)
        assert core.heard_of(Stored) == [Stored("key", b"value", 7, "context")]


async def test_a_conflict_drops_what_follows_and_the_core_decides_anew(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        match message:
            case Request():
                return [
                    Store("key", b"value", 0, message.token),
                    Reply(message.token, KvValue(value=b"won")),
                    event("x"),
                ]
            case Conflict():
                return [Reply(message.context, KvValue(value=message.value))]
        return []

    core, bucket = ScriptedCore(decide), SlowBucket({"key": b"theirs"})
    bucket.gate.set()
    async with world.engine(core, stores={"": bucket}):
        heard = world.listen(SUBJECTS.event(Role.GCS, "*", "*"))
        assert await world.ask() == KvValue(value=b"theirs")
        await world.asker.flush()
        assert heard == []
        assert core.heard_of(Conflict) == [Conflict("key", b"theirs", 1, 1)]


@pytest.mark.parametrize("conflicts", [False, True])
async def test_neighbouring_stores_go_together_and_what_follows_needs_all(world: World, conflicts: bool) -> None:
    def decide(message: Any) -> list[Effect]:
        if not isinstance(message, Request):
            return []
        stores = [Store(key, b"value", 0) for key in ("a", "b")]
        return [*stores, Reply(message.token, KvValue(value=None)), Store("c", b"value", 0), event("last")]

    core, bucket = ScriptedCore(decide), SlowBucket({"b": b"theirs"} if conflicts else {})
    async with world.engine(core, stores={"": bucket}):
        heard = world.listen(SUBJECTS.event(Role.GCS, "*", "*"))
        asked = asyncio.ensure_future(world.ask())
        await until(lambda: len(bucket.begun) == 2)
        assert bucket.begun == ["a", "b"]
        bucket.gate.set()
        await until(lambda: len(core.heard_of(Stored) + core.heard_of(Conflict)) == (2 if conflicts else 3))
        if conflicts:
            await world.asker.flush()
            assert not asked.done()
            assert bucket.begun == ["a", "b", "b"], "what was refused is looked into, and nothing else is begun"
            assert heard == []
            asked.cancel()
        else:
            assert await asked == KvValue(value=None)
            await until(lambda: heard == ["last"])
            assert [stored.key for stored in core.heard_of(Stored)] == ["a", "b", "c"]


async def test_a_load_comes_back_and_holds_up_nothing(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        match message:
            case Request():
                return [Load("there", 1), Load("not", 2), Reply(message.token, KvValue(value=None))]
        return []

    core, bucket = ScriptedCore(decide), SlowBucket({"there": b"x"})
    async with world.engine(core, stores={"": bucket}):
        await world.ask()
        assert core.heard_of(Loaded) == []
        bucket.gate.set()
        await until(lambda: len(core.heard_of(Loaded)) == 2)
        assert core.heard_of(Loaded) == [Loaded("there", b"x", 1, 1), Loaded("not", None, 0, 2)]


async def test_the_answer_to_a_question_or_the_error_in_its_place_comes_back(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        match message:
            case "ask":
                question = KvGet(namespace="", key="")
                return [Ask(SUBJECTS.scheduler("x"), question, 1), Ask(GET, question, 2), Ask(PUT, question, 3)]
            case Request(KvGet()):
                return [Reply(message.token, KvValue(value=b"own"))]
        return []

    core = ScriptedCore(decide)
    async with world.engine(core) as engine:
        engine.inject("ask")
        await until(lambda: len(core.heard_of(Answered)) == 3)
        answers = {answered.context: answered.answer for answered in core.heard_of(Answered)}
        assert isinstance(answers[1], NoRespondersError)
        assert answers[2] == KvValue(value=b"own")
        assert isinstance(answers[3], InvalidRequestError)


async def test_a_start_is_performed_by_the_service(world: World) -> None:
    core = ScriptedCore(lambda message: [Start("plain"), Start("slow")] if message == "go" else [])
    done: list[str] = []

    def perform(command: str) -> Awaitable[None] | None:
        if command == "plain":
            done.append(command)
            return None
        return later(command)

    async def later(command: str) -> None:
        await asyncio.sleep(0)
        done.append(command)

    async with world.engine(core, perform_start=perform) as engine:
        engine.inject("go")
        assert done == ["plain"]
        await until(lambda: done == ["plain", "slow"])


def test_an_earlier_wake_replaces_a_later_one() -> None:
    async def main() -> tuple[list[float], float]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        wakes = {5.0: [6.5, 6.0], 6.0: []}
        core = ScriptedCore(
            lambda message: [WakeAt(began + at) for at in (10, 5, 7)] if message == "first" else [],
            lambda now: [WakeAt(began + at) for at in wakes.get(round(now - began, 3), [])],
        )
        async with joined() as world, world.engine(core, first=["first"], clock=loop.time):
            await asyncio.sleep(100)
        return core.ticks, began

    ticks, began = run_virtual(main())
    assert [round(tick - began, 3) for tick in ticks] == [5.0, 6.0]


def test_a_wake_in_the_past_comes_at_once() -> None:
    async def main() -> list[float]:
        core = ScriptedCore(lambda message: [WakeAt(-5.0)] if message == "first" else [])
        async with joined() as world, world.engine(core, first=["first"], clock=asyncio.get_running_loop().time):
            await until(lambda: bool(core.ticks))
        return core.ticks

    assert run_virtual(main())


# ------------------------------------------------------------------------------------ inputs


@pytest.mark.parametrize(
    ("data", "text"),
    [(b'{"namespace":"n"}', "key: Field required"), (b"\x00", "message: Invalid JSON"), (b"", "message: ")],
)
async def test_a_wrong_request_is_refused_by_its_field_and_never_reaches_the_core(
    world: World, data: bytes, text: str
) -> None:
    core = ScriptedCore(answering())
    async with world.engine(core):
        with pytest.raises(InvalidRequestError, match=text):
            await world.ask(data=data)
        assert core.heard == []
        assert await world.ask() == KvValue(value=b"v")


async def test_an_event_names_its_source_and_a_wrong_one_is_dropped(world: World) -> None:
    core = ScriptedCore(lambda message: [])
    async with world.engine(core) as engine:
        subject = SUBJECTS.event(Role.GCS, "someone", "echo")
        world.service.publish(subject, b"{}")
        world.service.publish(subject, encode(Echo(number=3)))
        await until(lambda: bool(core.heard))
        assert core.heard == [Event(Echo(number=3), "someone")]
        assert b'requests_refused_total{endpoint="echo"} 1.0' in engine.metrics.exposition()


async def test_the_connections_changes_are_told(world: World) -> None:
    core = ScriptedCore(lambda message: [])
    async with world.engine(core) as engine:
        assert engine.ready
        world.broker.disconnect(world.service)
        assert not engine.ready
        world.broker.reconnect(world.service)
        assert engine.ready
        assert core.heard == [Connected(False), Connected(True)]


async def test_a_watched_bucket_is_known_in_full_before_the_first_input_and_the_first_request(world: World) -> None:
    bucket = await world.service.key_value(SUBJECTS.control_bucket())
    revisions = {key: await bucket.put(key, key.encode(), revision=0) for key in ("a", "b", "c")}
    core = ScriptedCore(answering())
    asked = asyncio.ensure_future(ask_until_somebody_listens(world))
    async with world.engine(core, stores={"": bucket}, watched=[""], first=["first"]):
        assert await asked == KvValue(value=b"v")
        known = [Changed(key, key.encode(), revision) for key, revision in revisions.items()]
        assert core.heard[:4] == [*known, "first"]
        assert isinstance(core.heard[4], Request)
        await bucket.delete("b", revision=revisions["b"])
        await until(lambda: len(core.heard_of(Changed)) == 4)
        assert (core.heard[-1].key, core.heard[-1].value) == ("b", None)


async def ask_until_somebody_listens(world: World) -> KvValue:
    while True:
        try:
            return await world.ask()
        except NoRespondersError:
            continue


async def test_so_many_requests_wait_at_most(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "WAITING_REQUESTS", 2)
    tokens: list[int] = []

    def decide(message: Any) -> list[Effect]:
        match message:
            case Request():
                tokens.append(message.token)
                return []
        return [Reply(token, KvValue(value=b"late")) for token in tokens]

    async with world.engine(ScriptedCore(decide)) as engine:
        waiting = [asyncio.ensure_future(world.ask()) for _ in range(2)]
        await until(lambda: len(tokens) == 2)
        with pytest.raises(ServiceError, match="busy: 2 requests wait"):
            await world.ask()
        engine.inject("answer")
        assert await asyncio.gather(*waiting) == [KvValue(value=b"late")] * 2
        tokens.clear()
        again = asyncio.ensure_future(world.ask())
        await until(lambda: len(tokens) == 1)
        engine.inject("answer")
        await again


async def test_an_answer_that_the_broker_would_not_take_becomes_an_error() -> None:
    async with joined(max_payload=500) as world, world.engine(ScriptedCore(answering(bytes(1000)))):
        with pytest.raises(ServiceError, match=r"the answer has \d+ bytes"):
            await world.ask()


async def test_what_is_published_while_cut_off_is_counted_as_dropped(world: World) -> None:
    core = ScriptedCore(lambda message: [event("lost")] if message == "tell" else [])
    async with world.engine(core) as engine:
        world.broker.disconnect(world.service)
        engine.inject("tell")
        assert b"shoal_messages_dropped_total 1.0" in engine.metrics.exposition()
        world.broker.reconnect(world.service)


# ------------------------------------------------------------------------------------ failures


async def test_a_core_that_raises_stops_the_engine_and_tells_the_asker(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        if isinstance(message, Request):
            raise ZeroDivisionError("by zero")
        return []

    asked: asyncio.Future[KvValue] | None = None
    with pytest.RaisesGroup(ZeroDivisionError):
        async with world.engine(ScriptedCore(decide)):
            asked = asyncio.ensure_future(world.ask())
            await asyncio.Event().wait()
    assert asked is not None
    with pytest.raises(ServiceError, match=r"gcs failed: ZeroDivisionError\('by zero'\); it will be restarted"):
        await asked
    with pytest.raises(NoRespondersError):
        await world.ask()


def _raise(*_: Any) -> Any:
    raise ZeroDivisionError


async def _raise_later(*_: Any) -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError


@pytest.mark.parametrize("perform", [_raise, _raise_later])
async def test_a_start_that_raises_stops_the_engine(world: World, perform: Any) -> None:
    core = ScriptedCore(lambda message: [Start("it")] if message == "go" else [])
    with pytest.RaisesGroup(ZeroDivisionError):
        async with world.engine(core, perform_start=perform) as engine:
            engine.inject("go")
            await asyncio.Event().wait()


async def test_a_tick_that_raises_stops_the_engine(world: World) -> None:
    core = ScriptedCore(lambda message: [WakeAt(0.0)], _raise)
    with pytest.RaisesGroup(ZeroDivisionError):
        async with world.engine(core, first=["first"]):
            await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("effects", "error"),
    [
        ([Start("it")], TypeError),
        ([Send(new_process_id(), WorkerReady(1))], TypeError),
        ([Reply(99, KvValue(value=None))], KeyError),
    ],
)
async def test_an_effect_that_cannot_be_performed_stops_the_engine(
    world: World, effects: list[Effect], error: type[Exception]
) -> None:
    asked: asyncio.Future[KvValue] | None = None
    core = ScriptedCore(lambda message: effects if isinstance(message, Request) else [])
    with pytest.RaisesGroup(error):
        async with world.engine(core):
            asked = asyncio.ensure_future(world.ask())
            await asyncio.Event().wait()
    assert asked is not None
    with pytest.raises(ServiceError, match="it will be restarted"):
        await asked


async def test_an_input_after_the_failure_is_not_handled(world: World) -> None:
    def decide(message: Any) -> list[Effect]:
        if message == "bad":
            raise ZeroDivisionError
        return []

    core = ScriptedCore(decide)
    with pytest.RaisesGroup(ZeroDivisionError):
        async with world.engine(core) as engine:
            engine.inject("bad")
            engine.inject("more")
            await asyncio.Event().wait()
    assert core.heard == ["bad"]


async def test_what_fails_while_the_engine_drains_is_told(world: World) -> None:
    started = asyncio.Event()

    async def perform(_command: Any) -> None:
        await started.wait()
        raise ZeroDivisionError

    core = ScriptedCore(lambda message: [Start("it")] if message == "go" else [])
    with pytest.RaisesGroup(ZeroDivisionError):
        async with world.engine(core, perform_start=perform) as engine:
            engine.inject("go")
            asyncio.get_running_loop().call_soon(started.set)
    assert not engine.ready


async def test_an_engine_that_cannot_open_leaves_nothing(world: World) -> None:
    engine = world.engine(ScriptedCore(answering()), stores={"": SlowBucket()}, watched=[""])
    with pytest.raises(ConnectionResetError, match="no watch today"):
        async with engine:
            raise AssertionError("it was not entered")
    assert not engine.ready
    with pytest.raises(NoRespondersError):
        await world.ask()


async def test_an_error_of_whoever_entered_it_passes_unchanged(world: World) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with world.engine(ScriptedCore(answering())):
            raise KeyError("mine")


# ------------------------------------------------------------------------------------ leaving


def slow_core(gate: asyncio.Event) -> tuple[ScriptedCore, Callable[[Callable[[], Engine]], Callable[[int], Any]]]:
    """Return a core that answers what was asked once a gate is open."""

    def decide(message: Any) -> list[Effect]:
        match message:
            case Request():
                return [Start(message.token)]
            case int():
                return [Reply(message, KvValue(value=b"in the end"))]
        return []

    def performer(engine: Callable[[], Engine]) -> Callable[[int], Any]:
        async def perform(token: int) -> None:
            await gate.wait()
            engine().inject(token)

        return perform

    return ScriptedCore(decide), performer


async def test_leaving_waits_for_what_is_under_way_and_takes_nothing_new(world: World) -> None:
    gate = asyncio.Event()
    core, performer = slow_core(gate)
    engine = world.engine(core, perform_start=performer(lambda: engine))

    async def leave() -> KvValue:
        async with engine:
            asked = asyncio.ensure_future(world.ask())
            await until(lambda: bool(core.heard_of(Request)))
        return await asked

    left = asyncio.ensure_future(leave())
    await until(lambda: engine.draining)
    assert not engine.ready
    with pytest.raises(NoRespondersError):
        await world.ask()
    assert not left.done()
    gate.set()
    assert await left == KvValue(value=b"in the end")


def test_leaving_does_not_wait_for_ever() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        async with joined() as world:
            core, performer = slow_core(asyncio.Event())
            engine = world.engine(core, perform_start=performer(lambda: engine))
            async with engine:
                asked = asyncio.ensure_future(world.ask())
                await until(lambda: bool(core.heard_of(Request)))
                began = loop.time()
            took = loop.time() - began
            asked.cancel()
        return took

    assert run_virtual(main()) == pytest.approx(engine_module.DRAIN_SECONDS)


async def test_leaving_while_cut_off_waits_for_nothing(world: World) -> None:
    core, performer = slow_core(asyncio.Event())
    engine = world.engine(core, perform_start=performer(lambda: engine))
    asked: asyncio.Future[KvValue] | None = None
    async with engine:
        asked = asyncio.ensure_future(world.ask())
        await until(lambda: bool(core.heard_of(Request)))
        world.broker.disconnect(world.service)
    assert not asked.done()
    asked.cancel()
    world.broker.reconnect(world.service)


async def test_replicas_share_requests_by_their_queue_group(world: World) -> None:
    cores = [ScriptedCore(answering()) for _ in range(2)]
    async with (
        world.broker.connect(role=Role.GCS, identity="other", cluster=CLUSTER) as other,
        world.engine(cores[0]),
        Engine(cores[1], other, name="gcs", routes=ROUTES),
    ):
        for _ in range(10):
            await world.ask()
    assert [len(core.heard_of(Request)) for core in cores] == [5, 5]
