"""Channels over a bus that is cut off and comes back, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from shoal_core.bus.interface import Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.bus.peers import BATCH_BYTES, Peers
from shoal_core.protocol.errors import BadFrameError, BufferFullError, RequestTimeoutError
from shoal_core.protocol.ids import ObjectKey, PeerId
from shoal_core.protocol.records import Borrow, Fetched, Inline, Record
from shoal_core.protocol.subjects import Role, Subjects, parse_channel
from shoal_core.testing import run_virtual
from shoal_core.testing.builders import node_id, process_id

CLUSTER = "test"
SUBJECTS = Subjects(CLUSTER)


class Broker(MemoryBroker):
    """The in-memory broker, which can lose a frame, or let a sender's write buffer be full."""

    def __init__(self) -> None:
        super().__init__()
        self.losses = 0
        self.full = False
        self.frames: Counter[str] = Counter()

    def route(self, destination: str, message: Message) -> bool:
        if self.full:
            raise BufferFullError("full")
        self.frames[parse_channel(destination)[1]] += 1
        if self.losses:
            self.losses -= 1
            return True
        return super().route(destination, message)


class Place:
    """A process with its bus, its peers, and what was delivered to it."""

    def __init__(self, broker: Broker, number: int, role: Role = Role.PROCESS) -> None:
        self.id: PeerId = process_id(number) if role is Role.PROCESS else node_id(number)
        self.errors: list[BaseException] = []
        self.delivered: list[Record] = []
        self.senders: set[PeerId] = set()
        self.batches = 0
        self.broker = broker
        self.bus = broker.connect(role=role, identity=self.id, cluster=CLUSTER, on_error=self.errors.append)
        self.peers = Peers(self.bus, SUBJECTS, role, self.id, self.deliver, asyncio.get_running_loop().time)
        self._arrived = asyncio.Event()

    def deliver(self, peer: PeerId, records: list[Record]) -> None:
        self.batches += 1
        self.senders.add(peer)
        self.delivered += records
        self._arrived.set()

    @property
    def published(self) -> int:
        """How many frames left this place."""
        return self.broker.frames[self.id]

    def cut(self) -> None:
        self.broker.disconnect(self.bus)

    def join(self) -> None:
        self.broker.reconnect(self.bus)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Place]:
        async with self.bus, self.peers:
            yield self
            subscriptions = len(self.bus.subscriptions)
        assert len(self.bus.subscriptions) == subscriptions - 1

    async def wait_for(self, count: int) -> list[Record]:
        """Wait until so many records were delivered."""
        async with asyncio.timeout(60):
            while len(self.delivered) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self.delivered


@asynccontextmanager
async def two_places() -> AsyncIterator[tuple[Place, Place]]:
    broker = Broker()
    async with Place(broker, 1).running() as one, Place(broker, 2).running() as other:
        yield one, other
        assert one.errors == other.errors == []


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
        assert one.published == 1
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
        assert other.published == 1


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
        one.cut()
        send_all(one, other, borrows(5, start=5))
        await asyncio.sleep(10)
        assert len(other.delivered) == 5
        now = asyncio.get_running_loop().time()
        one.join()
        assert await other.wait_for(10) == borrows(10)
        assert asyncio.get_running_loop().time() == now


@virtual
async def test_what_was_lost_in_flight_is_sent_again_at_the_reconnect() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(1))
        await one.peers.flush()
        other.cut()
        send_all(one, other, borrows(4, start=1))
        await asyncio.sleep(0.2)
        now = asyncio.get_running_loop().time()
        other.join()
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
                one.cut()
            if turn % 7 == 4:
                other.cut()
                one.join()
            if turn % 7 == 6:
                other.join()
            await asyncio.sleep(0.01)
        for place in (one, other):
            if not place.bus.connected:
                place.join()
        await one.peers.flush(30)
        await other.peers.flush(30)
        assert one.delivered == other.delivered == borrows(600)


@virtual
async def test_a_lost_frame_is_asked_for_after_a_timeout() -> None:
    async with two_places() as (one, other):
        one.broker.losses = 1
        send_all(one, other, borrows(3))
        assert await other.wait_for(3) == borrows(3)
        assert asyncio.get_running_loop().time() < 1.5
        assert one.peers.statistics().resent_frames == 1


@virtual
async def test_a_full_write_buffer_is_as_good_as_a_loss() -> None:
    async with two_places() as (one, other):
        one.broker.full = True
        send_all(one, other, borrows(3))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        one.broker.full = False
        assert await other.wait_for(3) == borrows(3)
        assert one.peers.statistics().unsent_frames == 1


@virtual
async def test_a_forgotten_peer_gives_back_what_it_may_not_have_received() -> None:
    async with two_places() as (one, other):
        send_all(one, other, borrows(3))
        await one.peers.flush()
        other.cut()
        send_all(one, other, borrows(4, start=3))
        await asyncio.sleep(1)
        send_all(one, other, borrows(2, start=7))
        assert one.peers.known() == [other.id]
        assert one.peers.forget(other.id) == borrows(6, start=3)
        assert one.peers.known() == []
        assert one.peers.forget(other.id) == []
        assert not one.peers.send(other.id, borrows(1)[0])
        other.join()
        send_all(other, one, borrows(1))
        await asyncio.sleep(5)
        assert one.delivered == []
        assert one.peers.unacknowledged() == 0
        assert other.peers.unacknowledged() == 1


@virtual
async def test_flush_ends_when_the_peer_is_forgotten_and_says_who_is_late() -> None:
    async with two_places() as (one, other):
        other.cut()
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
        other.cut()
        send_all(one, other, borrows(1))
        await asyncio.sleep(6)
        assert {peer for peer, _ in suspicions} == {other.id}
        assert len(suspicions) == 3
        other.join()
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
        assert one.published == 0


@virtual
async def test_a_process_cannot_speak_in_the_name_of_a_node() -> None:
    broker = Broker()
    node, forger, victim = Place(broker, 1, Role.NODE), Place(broker, 2), Place(broker, 3)
    async with victim.running(), node.running(), forger.running():
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
        published = one.published, other.published
        await asyncio.sleep(3600)
        assert (one.published, other.published) == published
