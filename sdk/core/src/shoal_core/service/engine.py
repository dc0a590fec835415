"""The one engine: it brings a service's core its inputs, and performs the effects that the core asks for.

The core is called on the event loop, one input at a time, in the turn in which the input arrived; it never waits. What
takes time (stores, loads, questions to others, a service's own starts) runs beside it, and comes back as an input.

::

    bus ──decode──► core.handle(input, now) ──► effects ──► bus, peers, stores, perform_start
                          ▲                                          │
                          └── Stored, Conflict, Loaded, Answered ◄───┘

What comes in crowds (``Message.packs``) is handled one by one, but what the core asks and tells of it is kept to the
end of the turn and sent in packets (see ``outbox``). A store takes no task of its own: only one that fails does.

A core that raises, or asks for what cannot be done, is wrong: the asker is told so, and the engine stops by raising in
the task that entered it, to be started again by whoever runs it. Bad input from outside is refused and never gets so
far.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from shoal_core.bus.interface import Bus, Subscription
from shoal_core.bus.interface import Message as BusMessage
from shoal_core.bus.keyvalue import Deleted, Entry, KeyValue
from shoal_core.bus.peers import Peers
from shoal_core.bus.tracing import asking, handling, message_headers
from shoal_core.bus.watch import Watch
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
    Received,
    Reply,
    Request,
    Send,
    Start,
    Store,
    Stored,
    StoreRefused,
    WakeAt,
)
from shoal_core.protocol.errors import BufferFullError, ServiceError, ShoalError
from shoal_core.protocol.ids import PeerId
from shoal_core.protocol.messages import Message
from shoal_core.protocol.metrics import MESSAGES_DROPPED
from shoal_core.protocol.records import Record
from shoal_core.protocol.verbs import REPLIES
from shoal_core.protocol.wire import decode, decode_packet, decode_replies, decode_reply, encode, pack, packets
from shoal_core.service.discovery import Discovery
from shoal_core.service.metrics import Metrics
from shoal_core.service.outbox import Asker, Outbox, PackedAnswers, StoreRun
from shoal_core.service.routes import Route, Served, wildcard_position
from shoal_core.service.stores import perform_load, see_store_through
from shoal_core.service.vitals import Vitals

logger = logging.getLogger("shoal.service")

WAITING_REQUESTS = 10_000
DRAIN_SECONDS = 2.0


class Core(Protocol):
    """What decides (see ``protocol.effects``). ``message`` is an ``Input``, or an input of the service's own."""

    def handle(self, message: Any, now: float) -> list[Effect]:
        """Take in one input and return what is to be done."""

    def tick(self, now: float) -> list[Effect]:
        """Do what was to be done at this time."""


Deliver = Callable[[PeerId, list[Record]], None]
PerformStart = Callable[[Any], Awaitable[None] | None]


class Engine:
    """A core at work on a bus. Entering it means that the service hears; leaving drains it.

    ``name`` is the service's (``gcs``), ``bus.identity`` that of this replica. ``perform_start`` carries out the core's
    ``Start`` commands: a plain callback, or one that returns a coroutine, which then runs beside the core. ``stores``
    are the buckets by the core's names for them; those in ``watched`` are watched, and known in full on entering.
    ``peers`` makes the channels, given where to deliver. ``first`` are inputs for the core before all others.
    """

    def __init__(
        self,
        core: Core,
        bus: Bus,
        *,
        name: str,
        routes: Sequence[Route] = (),
        perform_start: PerformStart | None = None,
        stores: Mapping[str, KeyValue] | None = None,
        watched: Sequence[str] = (),
        peers: Callable[[Deliver], Peers] | None = None,
        first: Sequence[Any] = (),
        clock: Callable[[], float] = time.time,
        metrics: Metrics | None = None,
    ) -> None:
        self.core = core
        self.bus = bus
        self.name = name
        self.metrics = metrics or Metrics()
        self.peers: Peers | None = None
        self.draining = False
        self._routes = routes
        self._perform_start = perform_start
        self._stores = stores or {}
        self._watched = watched
        self._make_peers = peers
        self._first = first
        self._clock = clock
        self._entered = False
        self._askers: dict[int, Asker] = {}
        self._last_token = 0
        self._wake_at: float | None = None
        self._wake_timer: asyncio.TimerHandle | None = None
        self._subscriptions: list[Subscription] = []
        self._watches: list[Watch] = []
        self._work: set[asyncio.Future[None]] = set()
        self._outbox = Outbox(self._send_packets)
        self._dropped = self.metrics.counter(MESSAGES_DROPPED)
        self._vitals = Vitals(bus, name, self.metrics)

    @property
    def ready(self) -> bool:
        """Whether this replica serves: it was entered, is connected, and does not drain."""
        return self._entered and not self.draining and self.bus.connected

    # -------------------------------------------------------------------------------- lifespan

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._guards = [
            self._group.create_task(self._raise_failure()),
            self._group.create_task(self._vitals.keep_looking()),
        ]
        try:
            await self._open()
        except BaseException as error:
            await self.__aexit__(type(error), error, error.__traceback__)
            raise
        return self

    async def _open(self) -> None:
        """Learn what the stores hold, then begin to hear."""
        self._end_listening = self.bus.on_connection(self._on_connection)
        for bucket in self._watched:
            watch = await self._stores[bucket].watch(self._watcher(bucket))
            self._watches.append(watch)
            await watch.caught_up()
        if self._make_peers is not None:
            self.peers = await self._make_peers(self._deliver).__aenter__()
        for message in self._first:
            self.inject(message)
        self._discovery = Discovery(self.bus, self.name)
        self._subscriptions.extend(self._discovery.open())
        for route in self._routes:
            self._subscribe(route)
        await self.bus.flush()
        self._entered = True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.draining = True
        for subscription in self._subscriptions:
            subscription.unsubscribe()
        try:
            if kind is None and self.bus.connected:
                await self._finish_work()
        except BaseException as caught:
            kind, error, trace = type(caught), caught, caught.__traceback__
            raise
        finally:
            await self._end(kind, error, trace)

    async def _end(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of everything; raise what a task of the engine failed with, if one did."""
        cancelled = isinstance(error, asyncio.CancelledError)
        if self._wake_timer is not None:
            self._wake_timer.cancel()
        for watch in self._watches:
            watch.stop()
        self._end_listening()
        self._outbox.close()
        try:
            if self.peers is not None:
                await self.peers.__aexit__(kind, error, trace)
        finally:
            for task in (*self._guards, *self._work):
                task.cancel()
            # Only a cancellation concerns the group (it may be its own); other errors pass it by unwrapped.
            await self._group.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))

    async def _finish_work(self) -> None:
        """Wait a while for what is under way, so that whoever asked gets an answer."""
        await self.bus.flush()
        deadline = self._loop.time() + DRAIN_SECONDS
        while self._work and self._loop.time() < deadline:
            await asyncio.wait(self._work, timeout=deadline - self._loop.time())
        await self.bus.flush()

    async def _raise_failure(self) -> None:
        """Wait for the failure that stops the engine."""
        await self._failure

    def _fail(self, error: BaseException) -> None:
        """Stop the engine: the task that entered it is cancelled, and leaving raises ``error``."""
        if not self._failure.done():
            self._failure.set_exception(error)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the core; if it raises, the engine stops."""
        task = self._group.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    # -------------------------------------------------------------------------------- inputs

    def inject(self, message: Any) -> None:
        """Give the core an input of the service's own (a process ended, …). On the loop's thread."""
        if self._failure.done():
            return
        try:
            self._perform(self.core.handle(message, self._clock()))
        except Exception as error:
            self._fail(error)
            if isinstance(message, Request) and message.token in self._askers:
                self._reply(Reply(message.token, ServiceError(f"{self.name} failed: {error!r}; it will be restarted")))

    def _tick(self) -> None:
        """Wake the core."""
        self._wake_at = self._wake_timer = None
        try:
            self._perform(self.core.tick(self._clock()))
        except Exception as error:
            self._fail(error)

    def _deliver(self, peer: PeerId, records: list[Record]) -> None:
        self.inject(Received(peer, records))

    def _on_connection(self, connected: bool) -> None:
        self._vitals.connection_changed(connected)
        self.inject(Connected(connected))

    def _watcher(self, bucket: str) -> Callable[[Entry | Deleted], None]:
        """Return the callback of a bucket's watch."""

        def changed(entry: Entry | Deleted) -> None:
            value = entry.value if isinstance(entry, Entry) else None
            self.inject(Changed(entry.key, value, entry.revision, bucket))

        return changed

    def _subscribe(self, route: Route) -> None:
        """Hear a route."""
        served = Served(self.metrics, route)
        self._discovery.endpoints.append(served)
        callback: Callable[[BusMessage], None]
        if route.kind == "request":

            def callback(message: BusMessage) -> None:
                self._on_request(route, served, message)
        else:
            position = wildcard_position(route.subject)

            def callback(message: BusMessage) -> None:
                self._on_event(route, served, position, message)

        self._subscriptions.append(self.bus.subscribe(route.subject, callback, queue=route.queue))

    def _on_request(self, route: Route, served: Served, message: BusMessage) -> None:
        served.requests.add()
        try:
            if len(self._askers) >= WAITING_REQUESTS:
                raise ServiceError(f"{self.name} is busy: {WAITING_REQUESTS} requests wait; ask again later")
            requests = _decoded(route.model, message.data)
        except ShoalError as error:
            self._refuse(message.reply, served, error)
            return
        began_at = self._loop.time()
        packet = PackedAnswers(message.reply, len(requests)) if len(requests) > 1 else None
        with handling(route.subject, served.endpoint, message.headers):
            for index, request in enumerate(requests):
                self._last_token += 1
                self._askers[self._last_token] = Asker(message.reply, served, began_at, packet, index)
                self.inject(Request(request, self._last_token))

    def _on_event(self, route: Route, served: Served, position: int | None, message: BusMessage) -> None:
        served.requests.add()
        try:
            events = _decoded(route.model, message.data)
        except ShoalError as error:
            served.fail(error)
            logger.warning("an event on %s was dropped: %s", message.subject, error)
            return
        source = message.subject.split(".")[position] if position is not None else ""
        for event in events:
            self.inject(Event(event, source))

    # -------------------------------------------------------------------------------- effects

    def _perform(self, effects: Sequence[Effect], start: int = 0) -> None:
        """Perform effects in order; at the first ``Store`` the rest waits for its outcome."""
        for position in range(start, len(effects)):
            effect = effects[position]
            match effect:
                case Reply():
                    self._reply(effect)
                case Publish():
                    if effect.message.packs:
                        self._outbox.put(effect)
                    else:
                        self._publish(effect.subject, encode(effect.message))
                case Ask():
                    if effect.message.packs and effect.span is None:
                        self._outbox.put(effect)
                    else:
                        self._spawn(self._ask(effect))
                case Send():
                    self._channels().send(effect.peer, effect.record)
                case Forget():
                    self._channels().forget(effect.peer)
                case Store():
                    self._store(effects, position)
                    return
                case Load():
                    self._spawn(self._load(effect))
                case Start():
                    self._start(effect)
                case WakeAt():
                    self._wake(effect.at)

    def _store(self, effects: Sequence[Effect], start: int) -> None:
        """Perform a run of stores together, and then, if all took effect, what stands behind them."""
        end = start
        while end < len(effects) and isinstance(effects[end], Store):
            end += 1
        run = StoreRun(effects, start, end, self._loop.create_future())
        self._work.add(run.over)
        for index in range(end - start):
            self._begin_store(run, index)

    def _begin_store(self, run: StoreRun, index: int) -> None:
        """Write without a task; only what does not succeed at once is seen through by one."""
        store = run.store(index)

        def settled(outcome: int | Exception) -> None:
            if run.over.done():
                return  # the engine has ended
            if isinstance(outcome, Exception):
                self._spawn(self._see_store_through(run, index, outcome))
            else:
                revision = 0 if store.value is None else outcome
                self._stored(run, index, Stored(store.key, store.value, revision, store.context, store.bucket))

        try:
            self._stores[store.bucket].begin(store.key, store.value, settled, revision=store.revision)
        except ShoalError as error:
            self._spawn(self._see_store_through(run, index, error))

    async def _see_store_through(self, run: StoreRun, index: int, failure: Exception) -> None:
        store = run.store(index)
        self._stored(run, index, await see_store_through(self._stores[store.bucket], store, failure))

    def _stored(self, run: StoreRun, index: int, outcome: Stored | Conflict | StoreRefused) -> None:
        """One of a run of stores is certain; with the last of them the core is told of all."""
        run.outcomes[index] = outcome
        if len(run.outcomes) < run.end - run.start:
            return
        run.over.set_result(None)
        self._work.discard(run.over)
        outcomes = [run.outcomes[index] for index in range(run.end - run.start)]
        for outcome in outcomes:
            self.inject(outcome)
        if run.end < len(run.effects) and all(isinstance(outcome, Stored) for outcome in outcomes):
            self._perform(run.effects, run.end)

    async def _load(self, effect: Load) -> None:
        entry = await perform_load(self._stores[effect.bucket], effect.key)
        value, revision = (entry.value, entry.revision) if entry is not None else (None, 0)
        self.inject(Loaded(effect.key, value, revision, effect.context, effect.bucket))

    async def _ask(self, effect: Ask) -> None:
        """Ask another service once; whatever comes of it goes to the core."""
        answer: Message | ShoalError
        try:
            with asking(effect.span, self._clock()):
                reply = await self.bus.request(
                    effect.subject,
                    encode(effect.message),
                    timeout_seconds=effect.timeout_seconds,
                    headers=message_headers(),
                )
                answer = decode_reply(REPLIES[type(effect.message)], reply.data)
        except ShoalError as error:
            answer = error
        self.inject(Answered(effect.context, answer))

    def _send_packets(self, asks: Sequence[Sequence[Ask]], events: Sequence[Sequence[Publish]]) -> None:
        """Send what a turn has put out; each group is what goes to one subject."""
        for group in asks:
            position = 0
            for count, packet in packets(ask.message for ask in group):
                self._spawn(self._ask_packed(group[position : position + count], packet))
                position += count
        for told in events:
            for _, packet in packets(effect.message for effect in told):
                self._publish(told[0].subject, packet)

    async def _ask_packed(self, asks: Sequence[Ask], packet: bytes) -> None:
        """Ask many things of one service at once; whatever comes of each goes to the core."""
        answers: Sequence[Message | ShoalError]
        first = asks[0]
        try:
            reply = await self.bus.request(
                first.subject, packet, timeout_seconds=first.timeout_seconds, headers=message_headers()
            )
            answers = decode_replies(REPLIES[type(first.message)], reply.data, len(asks))
        except ShoalError as error:
            answers = [error] * len(asks)
        for ask, answer in zip(asks, answers, strict=True):
            self.inject(Answered(ask.context, answer))

    def _start(self, effect: Start) -> None:
        if self._perform_start is None:
            raise TypeError(f"{self.name} starts nothing, but its core asked for {effect.command!r}")
        work = self._perform_start(effect.command)
        if work is not None:
            self._spawn(_completion(work))

    def _wake(self, at: float) -> None:
        """Arrange the next tick, unless an earlier one is arranged."""
        if self._wake_at is not None and self._wake_at <= at:
            return
        if self._wake_timer is not None:
            self._wake_timer.cancel()
        self._wake_at = at
        self._wake_timer = self._loop.call_later(max(0.0, at - self._clock()), self._tick)

    def _channels(self) -> Peers:
        if self.peers is None:
            raise TypeError(f"{self.name} has no channels, but its core asked to send on one")
        return self.peers

    def _reply(self, effect: Reply) -> None:
        """Answer whoever asked; a second answer to the same is a bug of the core."""
        asker = self._askers.pop(effect.token)
        asker.served.seconds.observe(self._loop.time() - asker.began_at)
        if asker.packet is not None:
            self._answer_packed(asker, asker.packet, effect.message)
            return
        if isinstance(effect.message, ShoalError):
            self._refuse(asker.reply, asker.served, effect.message)
            return
        self._answer(asker.reply, asker.served, encode(effect.message))

    def _answer_packed(self, asker: Asker, packet: PackedAnswers, message: Message | ShoalError) -> None:
        """Keep an answer until all that were asked for in one packet are there."""
        if isinstance(message, ShoalError):
            asker.served.fail(message)
        packet.answers[asker.index] = encode(message)
        packet.missing -= 1
        if not packet.missing:
            self._answer(asker.reply, asker.served, pack(packet.answers))

    def _answer(self, reply: str, served: Served, data: bytes) -> None:
        if len(data) > self.bus.max_payload:
            self._refuse(reply, served, ServiceError(f"the answer has {len(data)} bytes, more than the broker takes"))
        else:
            self._respond(reply, data)

    def _refuse(self, reply: str, served: Served, error: ShoalError) -> None:
        """Answer with an error."""
        served.fail(error)
        self._respond(reply, encode(error))

    def _respond(self, reply: str, data: bytes) -> None:
        """Send an answer, if one is wanted."""
        if reply:
            self._say(self.bus.answer, reply, data)

    def _publish(self, subject: str, data: bytes) -> None:
        self._say(self.bus.publish, subject, data)

    def _say(self, publish: Callable[..., bool], subject: str, data: bytes) -> None:
        """Publish once; what cannot be sent is counted, since whoever waits for it asks again."""
        try:
            taken = publish(subject, data, headers=message_headers())
        except BufferFullError:
            taken = False
        if not taken:
            self._dropped.add()


def _decoded(model: type[Message], data: bytes) -> list[Message]:
    """Return the messages that arrived in one, which are many only where they come in crowds."""
    return decode_packet(model, data) if model.packs else [decode(model, data)]


async def _completion(work: Awaitable[None]) -> None:
    """Wait for anything awaitable."""
    await work
