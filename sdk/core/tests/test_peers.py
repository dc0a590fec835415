"""Channels over a bus that is cut off and comes back, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from shoal_core.bus.interface import Bus, Callback, Message, Subscription
from shoal_core.bus.peers import BATCH_BYTES, Peers
from shoal_core.protocol.errors import BadFrameError, BufferFullError, RequestTimeoutError
from shoal_core.protocol.ids import ObjectKey, PeerId
from shoal_core.protocol.records import Borrow, Fetched, Inline, Record
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.testing import run_virtual
from shoal_core.testing.builders import node_id, process_id

CLUSTER = "test"
SUBJECTS = Subjects(CLUSTER)


class Wire:
    """Joins buses of one test; each message can be refused by ``fails``."""

    def __init__(self) -> None:
        self.buses: list[WireBus] = []
        self.fails: Callable[[str, bytes], bool] = lambda subject, data: False


class WireSubscription(Subscription):
    def __init__(self, bus: WireBus, prefix: str) -> None:
        self.bus = bus
        self.prefix = prefix

    def unsubscribe(self) -> None:
        self.bus.callbacks.pop(self.prefix, None)


class WireBus(Bus):
    """As much of a bus as channels use."""

    def __init__(self, wire: Wire, identity: str, on_error: Callable[[BaseException], None]) -> None:
        super().__init__(identity, f"inbox.{identity}", on_error)
        self.callbacks: dict[str, Callback] = {}
        self.wire = wire
        self.connected = True
        self.published = 0
        self.full = False
        wire.buses.append(self)

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> bool:
        if not self.connected:
            return False
        if self.full:
            raise BufferFullError("full")
        if len(data) > self.max_payload:
            raise self._refuse_large(subject, len(data))
        self.published += 1
        if not self.wire.fails(subject, data):
            self._loop.call_soon(self._carry, Message(subject, reply, data))
        return True

    def _carry(self, message: Message) -> None:
        for bus in self.wire.buses:
            for prefix, callback in list(bus.callbacks.items()):
                if message.subject.startswith(prefix) and bus.connected:
                    try:
                        callback(message)
                    except Exception as error:
                        bus._report(error)

    def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        prefix = subject.removesuffix("*.*")
        self.callbacks[prefix] = callback
        return WireSubscription(self, prefix)

    async def flush(self, timeout_seconds: float = 5) -> None:
        await asyncio.sleep(0)

    async def drain(self) -> None:
        await asyncio.sleep(0)

    def change(self, connected: bool) -> None:
        """Cut the connection, or bring it back."""
        self._connection_changed(connected)


class Place:
    """A process with its bus, its peers, and what was delivered to it."""

    def __init__(self, wire: Wire, number: int, role: Role = Role.PROCESS) -> None:
        self.id: PeerId = process_id(number) if role is Role.PROCESS else node_id(number)
        self.errors: list[BaseException] = []
        self.delivered: list[Record] = []
        self.senders: set[PeerId] = set()
        self.batches = 0
        self.bus = WireBus(wire, self.id, self.errors.append)
        self.peers = Peers(self.bus, SUBJECTS, role, self.id, self.deliver, asyncio.get_running_loop().time)
        self._arrived = asyncio.Event()

    def deliver(self, peer: PeerId, records: list[Record]) -> None:
        self.batches += 1
        self.senders.add(peer)
        self.delivered += records
        self._arrived.set()

    async def wait_for(self, count: int) -> list[Record]:
        """Wait until so many records were delivered."""
        async with asyncio.timeout(60):
            while len(self.delivered) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self.delivered


@asynccontextmanager
async def two_places() -> AsyncIterator[tuple[Place, Place]]:
    wire = Wire()
    async with AsyncExitStack() as stack:
        one, other = Place(wire, 1), Place(wire, 2)
        for place in (one, other):
            await stack.enter_async_context(place.peers)
        yield one, other
        assert one.errors == other.errors == []
    assert one.bus.callbacks == {}


def borrows(count: int, start: int = 0) -> list[Record]:
    return [Borrow(ObjectKey(number)) for number in range(start, start + count)]


def send_all(place: Place, to: Place, batch: list[Record]) -> None:
    for record in batch:
        assert place.peers.send(to.id, record)


Test = Callable[[], Coroutine[Any, Any, None]]


def virtual(test: Test) -> Callable[[], None]:
    """Run an async test in virtual time."""

    def run() -> None:
        run_virtual(test())

    run.__name__ = test.__name__
    return run


@virtual
async def test_records_of_one_turn_leave_as_one_message() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(100))
        assert await other.wait_for(100) == borrows(100)
        assert one.bus.published == 1
        assert other.batches == 1
        assert other.senders == {one.id}


@virtual
async def test_an_answer_carries_the_acknowledgement() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(1))
        await other.wait_for(1)
        send_all(other, one, borrows(1))
        await one.wait_for(1)
        assert one.peers.unacknowledged() == 0
        assert other.bus.published == 1


@virtual
async def test_flush_waits_for_a_round_trip_and_not_for_the_delay() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(10))
        await one.peers.flush()
        assert asyncio.get_running_loop().time() == 0
        assert one.peers.unacknowledged() == 0
        assert other.delivered == borrows(10)


@virtual
async def test_large_batches_are_split_by_bytes() -> None:
    async with two_places() as (one, other):
        values: list[Record] = [Fetched(ObjectKey(n), Inline(bytes(100_000))) for n in range(40)]
        send_all(one, other, values)
        assert await other.wait_for(40) == values
        assert other.batches > 40 * 100_000 // BATCH_BYTES


@virtual
async def test_a_record_above_max_payload_travels_in_pieces() -> None:
    async with two_places() as (one, other):
        huge = Fetched(ObjectKey(1), Inline(bytes(range(256)) * 20_000))
        send_all(one, other, [huge, *borrows(1)])
        assert await other.wait_for(2) == [huge, *borrows(1)]
        await one.peers.flush()


@virtual
async def test_what_is_sent_while_cut_off_leaves_at_the_reconnect() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(5))
        await other.wait_for(5)
        one.bus.change(False)
        send_all(one, other, borrows(5, start=5))
        await asyncio.sleep(10)
        assert len(other.delivered) == 5
        now = asyncio.get_running_loop().time()
        one.bus.change(True)
        assert await other.wait_for(10) == borrows(10)
        assert asyncio.get_running_loop().time() == now


@virtual
async def test_what_was_lost_in_flight_is_sent_again_at_the_reconnect() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(1))
        await one.peers.flush()
        other.bus.change(False)
        send_all(one, other, borrows(4, start=1))
        await asyncio.sleep(0.2)
        now = asyncio.get_running_loop().time()
        other.bus.change(True)
        send_all(other, one, borrows(1))
        assert await other.wait_for(5) == borrows(5)
        assert await one.wait_for(1) == borrows(1)
        assert asyncio.get_running_loop().time() == now


@virtual
async def test_a_restart_of_the_broker_costs_a_pause_and_no_record() -> None:
    async with two_places() as (one, other):
        for turn in range(60):
            send_all(one, other, borrows(10, start=10 * turn))
            send_all(other, one, borrows(10, start=10 * turn))
            if turn % 7 == 3:
                one.bus.change(False)
            if turn % 7 == 4:
                other.bus.change(False)
                one.bus.change(True)
            if turn % 7 == 6:
                other.bus.change(True)
            await asyncio.sleep(0.01)
        for place in (one, other):
            if not place.bus.connected:
                place.bus.change(True)
        await one.peers.flush(30)
        await other.peers.flush(30)
        assert one.delivered == other.delivered == borrows(600)


@virtual
async def test_a_lost_frame_is_asked_for_after_a_timeout() -> None:
    async with two_places() as (one, other):
        losses = iter([True])
        one.bus.wire.fails = lambda subject, data: next(losses, False)
        send_all(one, other, borrows(3))
        assert await other.wait_for(3) == borrows(3)
        assert asyncio.get_running_loop().time() < 1.5
        assert one.peers.statistics().resent_frames == 1


@virtual
async def test_a_full_write_buffer_is_as_good_as_a_loss() -> None:
    async with two_places() as (one, other):
        one.bus.full = True
        send_all(one, other, borrows(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one.bus.full = False
        assert await other.wait_for(3) == borrows(3)
        assert one.peers.statistics().unsent_frames == 1


@virtual
async def test_a_forgotten_peer_gives_back_what_it_may_not_have_received() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(3))
        await one.peers.flush()
        other.bus.change(False)
        send_all(one, other, borrows(4, start=3))
        await asyncio.sleep(1)
        send_all(one, other, borrows(2, start=7))
        assert one.peers.forget(other.id) == borrows(6, start=3)
        assert one.peers.forget(other.id) == []
        assert not one.peers.send(other.id, borrows(1)[0])
        other.bus.change(True)
        send_all(other, one, borrows(1))
        await asyncio.sleep(5)
        assert one.delivered == []
        assert one.peers.unacknowledged() == 0
        assert other.peers.unacknowledged() == 1


@virtual
async def test_flush_ends_when_the_peer_is_forgotten_and_says_who_is_late() -> None:
    async with two_places() as (one, other):
        other.bus.change(False)
        send_all(one, other, borrows(1))
        with pytest.raises(RequestTimeoutError, match=other.id):
            await one.peers.flush(1.0)
        async with asyncio.TaskGroup() as group:
            group.create_task(one.peers.flush(60))
            await asyncio.sleep(1)
            one.peers.forget(other.id)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0)


@virtual
async def test_silence_is_told_and_told_again() -> None:
    async with two_places() as (one, other):
        suspicions: list[tuple[PeerId, float]] = []
        one.peers.on_silence(lambda peer, seconds: suspicions.append((peer, seconds)))
        send_all(one, other, borrows(1))
        await one.peers.flush()
        await asyncio.sleep(10)
        assert suspicions == []
        other.bus.change(False)
        send_all(one, other, borrows(1))
        await asyncio.sleep(6)
        assert {peer for peer, _ in suspicions} == {other.id}
        assert len(suspicions) == 3
        other.bus.change(True)
        await asyncio.sleep(6)
        assert len(suspicions) == 3
        assert len(other.delivered) == 2


@virtual
async def test_records_to_oneself_arrive_on_the_next_turn() -> None:
    async with two_places() as (one, _):
        send_all(one, one, borrows(3))
        assert one.delivered == []
        assert one.peers.unacknowledged() == 3
        await one.peers.flush()
        assert one.delivered == borrows(3)
        assert one.bus.published == 0


@virtual
async def test_a_process_cannot_speak_in_the_name_of_a_node() -> None:
    wire = Wire()
    node, forger, victim = Place(wire, 1, Role.NODE), Place(wire, 2), Place(wire, 3)
    async with victim.peers, node.peers, forger.peers:
        node.peers.send(victim.id, borrows(1)[0])
        await node.peers.flush()
        assert victim.senders == {node.id}
        forger.bus.publish(SUBJECTS.channel(victim.id, Role.PROCESS, node.id), b"anything")
        await asyncio.sleep(1)
    assert [type(error) for error in victim.errors] == [BadFrameError]
    assert len(victim.delivered) == 1


@virtual
async def test_an_idle_pair_says_nothing_and_sets_no_timer() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(1))
        await one.peers.flush()
        published = one.bus.published, other.bus.published
        await asyncio.sleep(3600)
        assert (one.bus.published, other.bus.published) == published
