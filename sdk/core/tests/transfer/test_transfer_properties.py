"""Every history of transfers: one source, several pullers, a broker that holds credit, and all that can go wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from zlib_ng.zlib_ng import crc32

from shoal_core.protocol.ids import PeerId
from shoal_core.testing.builders import node_id
from shoal_core.transfer.pulling import ASK_SECONDS, SILENT_SECONDS, Effect, Ended, Extend, Listen, Pulling
from shoal_core.transfer.records import Record, Tell, Whole
from shoal_core.transfer.sending import FORGET_SECONDS, STALL_SECONDS, Chunk, Sending

SOURCE = node_id(1)
PULLERS: list[PeerId] = [node_id(2), node_id(3), node_id(4)]
CHUNK = 4
WINDOW_CHUNKS = 3
STREAM = "o1"


@dataclass
class Subscription:
    """What the broker knows of a subscription: that of a pull, under a number of its own."""

    pull: str
    number: int
    most: int
    delivered: int = 0


@dataclass
class Side:
    """A puller: its core, its memory, and what is on its way to it, in order."""

    core: Pulling = field(default_factory=lambda: Pulling(CHUNK * WINDOW_CHUNKS))
    memory: bytearray = field(default_factory=bytearray)
    subscription: Subscription | None = None
    coming: deque[tuple[Subscription, Chunk, bytes] | Record] = field(default_factory=deque)
    connected: bool = True
    pulls: int = 0
    asked: int = 0
    ended: list[Ended] = field(default_factory=list)
    received: set[int] = field(default_factory=set)

    @property
    def pull(self) -> str:
        """The name of the last pull; what comes of those before is dropped, as it comes by their subscriptions."""
        return f"c{self.pulls}"

    @property
    def in_flight(self) -> int:
        return sum(isinstance(one, tuple) and one[0].pull == self.pull for one in self.coming)


class World:
    """A source and its pullers around a broker."""

    def __init__(self, size: int) -> None:
        self.data = bytes((7 * i + i // 251) % 256 for i in range(size))
        self.now = 100.0
        self.sending = Sending(lambda name, index: crc32(self.chunk(index)))
        self.sending.offer(STREAM, size, CHUNK)
        self.sides = {peer: Side() for peer in PULLERS}
        self.to_source: deque[tuple[PeerId, Record]] = deque()
        self.source_connected = True
        self.published = 0
        for side in self.sides.values():
            side.core.connected(self.now)

    def chunk(self, index: int) -> bytes:
        return self.data[index * CHUNK : (index + 1) * CHUNK]

    # -------------------------------------------------------------------------- effects

    def perform(self, peer: PeerId, effects: list[Effect]) -> None:
        side = self.sides[peer]
        for effect in effects:
            match effect:
                case Ended():
                    side.ended.append(effect)
                    side.subscription = None
                case _ if not side.connected:
                    continue
                case Tell(to, record):
                    assert to == SOURCE
                    if self.source_connected:
                        self.to_source.append((peer, record))
                case Listen(name, number, most):
                    side.subscription = Subscription(name, number, most)
                    side.asked += 1
                case Extend(_, number, most):
                    if side.subscription is not None and side.subscription.number == number:
                        side.subscription.most = most

    def tell(self, effects: list[Tell]) -> None:
        for effect in effects:
            if self.source_connected and self.sides[effect.peer].connected:
                self.sides[effect.peer].coming.append(effect.record)

    # -------------------------------------------------------------------------- what happens

    def begin(self, peer: PeerId) -> None:
        side = self.sides[peer]
        if len(side.core):
            return
        side.pulls += 1
        side.asked = 0
        side.memory = bytearray(len(self.data))
        side.received = set()
        self.perform(peer, side.core.pull(side.pull, SOURCE, STREAM, len(self.data), CHUNK, self.now))

    def publish(self) -> bool:
        if not self.source_connected:
            return False
        chunk = self.sending.next_chunk(self.now)
        if chunk is None:
            return False
        self.published += 1
        for side in self.sides.values():
            one = side.subscription
            if one is not None and side.connected:
                one.delivered += 1
                side.coming.append((one, chunk, self.chunk(chunk.index)))
                if one.delivered >= one.most:
                    side.subscription = None
        return True

    def hear(self) -> bool:
        if not self.to_source:
            return False
        peer, record = self.to_source.popleft()
        self.tell(self.sending.heard(peer, record, self.now))
        return True

    def receive(self, peer: PeerId, spoiled: bool = False) -> bool:
        side = self.sides[peer]
        if not side.coming:
            return False
        one = side.coming.popleft()
        if not isinstance(one, tuple):
            self.perform(peer, side.core.heard(SOURCE, one, self.now))
            return True
        subscription, chunk, data = one
        name = subscription.pull
        if spoiled:
            data = bytes(byte ^ 1 for byte in data)
        place = side.core.place(name, chunk.index, len(data))
        checksum = None
        if place is not None:
            side.memory[place[0] : place[1]] = data
            assert chunk.index not in side.received, "what is there is not written again"
            if crc32(data) == chunk.checksum:
                checksum = chunk.checksum
                side.received.add(chunk.index)
        self.perform(peer, side.core.arrived(name, subscription.number, chunk.index, checksum, self.now))
        return True

    def cut(self, peer: PeerId) -> None:
        side = self.sides[peer]
        if side.connected:
            side.connected = False
            side.coming.clear()
            side.subscription = None
            side.core.disconnected()

    def join(self, peer: PeerId) -> None:
        side = self.sides[peer]
        if not side.connected:
            side.connected = True
            self.perform(peer, side.core.connected(self.now))

    def cut_source(self) -> None:
        if self.source_connected:
            self.source_connected = False
            self.to_source.clear()
            self.sending.disconnected()

    def join_source(self) -> None:
        if not self.source_connected:
            self.source_connected = True
            self.tell(self.sending.connected())

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for peer, side in self.sides.items():
            self.perform(peer, side.core.tick(self.now))

    def check(self) -> None:
        self.sending.sanity_check()
        for side in self.sides.values():
            side.core.sanity_check()
            # One chunk more for each time it had to ask again: it cannot know that nothing is on its way.
            assert side.in_flight <= 2 * WINDOW_CHUNKS + side.asked, "credit is never exceeded"
            for ended in side.ended:
                if not ended.code and ended.name == side.pull:
                    assert bytes(side.memory) == self.data, "who has it all has the right bytes"

    def settle(self, seconds: float) -> None:
        """Let everything that is connected come to its end, with everything that is said heard."""
        self.join_source()
        for peer in PULLERS:
            self.join(peer)
        until = self.now + seconds
        while self.now < until:
            moved = True
            while moved:
                # Whatever can be published is, before anybody receives: the worst for credit.
                moved = self.hear() or self.publish() or any(self.receive(peer) for peer in PULLERS)
                self.check()
            if not any(len(side.core) for side in self.sides.values()):
                return
            self.pass_time(ASK_SECONDS / 2)


which = st.sampled_from(PULLERS)


class Transfers(RuleBasedStateMachine):
    """Any history."""

    @initialize(size=st.integers(1, 20 * CHUNK))
    def start(self, size: int) -> None:
        self.world = World(size)

    @rule(peer=which)
    def a_puller_begins(self, peer: PeerId) -> None:
        self.world.begin(peer)

    @rule(peer=which)
    def a_puller_gives_up(self, peer: PeerId) -> None:
        side = self.world.sides[peer]
        self.world.perform(peer, side.core.cancel(side.pull))

    @rule(count=st.integers(1, 8))
    def chunks_are_published(self, count: int) -> None:
        for _ in range(count):
            self.world.publish()

    @rule(count=st.integers(1, 4))
    def the_source_hears(self, count: int) -> None:
        for _ in range(count):
            self.world.hear()

    @rule(peer=which, count=st.integers(1, 6))
    def a_puller_receives(self, peer: PeerId, count: int) -> None:
        for _ in range(count):
            self.world.receive(peer)

    @rule(peer=which)
    def a_chunk_is_spoiled(self, peer: PeerId) -> None:
        self.world.receive(peer, spoiled=True)

    @rule(place=st.integers(0, 50))
    def what_is_said_to_the_source_is_lost(self, place: int) -> None:
        if self.world.to_source:
            del self.world.to_source[place % len(self.world.to_source)]

    @rule(place=st.integers(0, 50))
    def what_is_said_to_the_source_comes_twice(self, place: int) -> None:
        said = self.world.to_source
        if said:
            said.append(said[place % len(said)])

    @rule(place=st.integers(0, 50))
    def what_is_said_to_the_source_is_late(self, place: int) -> None:
        said = self.world.to_source
        if said:
            one = said[place % len(said)]
            del said[place % len(said)]
            said.append(one)

    @rule(peer=which, place=st.integers(0, 50))
    def what_comes_to_a_puller_is_lost(self, peer: PeerId, place: int) -> None:
        coming = self.world.sides[peer].coming
        if coming:
            del coming[place % len(coming)]

    @rule(peer=which, place=st.integers(0, 50))
    def what_comes_to_a_puller_comes_twice(self, peer: PeerId, place: int) -> None:
        coming = self.world.sides[peer].coming
        said = [one for one in coming if not isinstance(one, tuple)]
        if said:
            coming.append(said[place % len(said)])

    @rule(peer=which)
    def a_connection_is_lost(self, peer: PeerId) -> None:
        self.world.cut(peer)

    @rule(peer=which)
    def a_credential_is_refused(self, peer: PeerId) -> None:
        self.world.cut(peer)
        side = self.world.sides[peer]
        self.world.perform(peer, side.core.refused("the credential was withdrawn"))
        assert len(side.core) == 0

    @rule(peer=which)
    def a_connection_comes_back(self, peer: PeerId) -> None:
        self.world.join(peer)

    @rule()
    def the_source_loses_its_connection(self) -> None:
        self.world.cut_source()

    @rule()
    def the_source_is_connected_again(self) -> None:
        self.world.join_source()

    @rule()
    def the_object_goes(self) -> None:
        self.world.tell(self.world.sending.withdraw(STREAM, "it was freed"))

    @rule(seconds=st.sampled_from([0.1, STALL_SECONDS, ASK_SECONDS, 3 * ASK_SECONDS]))
    def time_passes(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @invariant()
    def it_is_sane(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        began = {peer: side.pulls for peer, side in world.sides.items()}
        world.settle(10 * SILENT_SECONDS)
        for peer, side in world.sides.items():
            assert len(side.core) == 0, "no pull hangs"
            assert len(side.ended) == began[peer], "each pull ends once"
            assert side.subscription is None, "nothing remains"
        world.now += FORGET_SECONDS
        world.publish()
        assert world.sending.under_way() == 0, "who is gone is forgotten"


TestTransfers = Transfers.TestCase
TestTransfers.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def pull_all(world: World, peers: list[PeerId]) -> None:
    for peer in peers:
        world.begin(peer)
    world.settle(60)
    for peer in peers:
        assert [ended.code for ended in world.sides[peer].ended] == [""]


def test_those_who_pull_together_share_every_chunk_and_wait_for_no_timer() -> None:
    world = World(40 * CHUNK)
    pull_all(world, PULLERS)
    assert world.published == 40
    assert world.now == 100.0
    assert [side.asked for side in world.sides.values()] == [1, 1, 1]


def test_the_source_keeps_to_the_window_by_itself() -> None:
    world = World(40 * CHUNK)
    world.begin(PULLERS[0])
    while world.hear() or world.publish():
        assert world.sides[PULLERS[0]].in_flight <= WINDOW_CHUNKS
    assert world.sides[PULLERS[0]].in_flight == WINDOW_CHUNKS


def test_who_joins_late_gets_what_it_missed_and_nothing_twice() -> None:
    world = World(40 * CHUNK)
    first, second, _ = PULLERS
    world.begin(first)
    while len(world.sides[first].received) < 25:
        assert world.hear() or world.receive(first) or world.publish()
    world.begin(second)
    world.settle(60)
    assert [world.sides[peer].ended[0].code for peer in (first, second)] == ["", ""]
    assert 40 < world.published <= 40 + 25 + WINDOW_CHUNKS


def test_a_puller_that_stops_holds_the_others_up_only_for_a_moment() -> None:
    world = World(40 * CHUNK)
    slow, quick, _ = PULLERS
    world.begin(slow)
    world.begin(quick)
    while len(world.sides[quick].core):
        if not (world.hear() or world.receive(quick) or world.publish()):
            world.now += STALL_SECONDS / 2
        assert world.now < 100 + 2 * STALL_SECONDS
    assert world.sides[slow].in_flight <= 2 * WINDOW_CHUNKS
    world.settle(60)
    assert [ended.code for ended in world.sides[slow].ended] == [""]


@pytest.mark.parametrize("whose", ["puller", "source"])
def test_after_a_reconnect_what_is_there_is_not_sent_again(whose: str) -> None:
    world = World(40 * CHUNK)
    (peer, *_) = PULLERS
    world.begin(peer)
    while len(world.sides[peer].received) < 20:
        assert world.hear() or world.receive(peer) or world.publish()
    before, had = world.published, len(world.sides[peer].received)
    (world.cut if whose == "puller" else lambda _: world.cut_source())(peer)
    while world.receive(peer):
        had = len(world.sides[peer].received)
    world.settle(60)
    assert world.sides[peer].ended[0].code == ""
    assert world.published - before == 40 - had


def test_an_object_that_goes_ends_its_pulls_with_an_error() -> None:
    world = World(40 * CHUNK)
    world.begin(PULLERS[0])
    for _ in range(9):
        world.hear() or world.publish() or world.receive(PULLERS[0])
    world.tell(world.sending.withdraw(STREAM, "it was freed"))
    world.settle(5)
    assert [(ended.code, ended.text) for ended in world.sides[PULLERS[0]].ended] == [("not_found", "it was freed")]


def test_a_source_that_is_silent_is_given_up() -> None:
    world = World(40 * CHUNK)
    world.begin(PULLERS[0])
    for _ in range(int(SILENT_SECONDS) + 1):
        world.to_source.clear()
        world.pass_time(1.0)
    assert [ended.code for ended in world.sides[PULLERS[0]].ended] == ["object_fetch_timed_out"]


def test_what_arrived_but_is_not_the_whole_is_pulled_again_and_given_up_at_last() -> None:
    world = World(4 * CHUNK)
    world.sending.offer("other", len(world.data), CHUNK)
    side = world.sides[PULLERS[0]]
    world.begin(PULLERS[0])
    wrong = 0
    while len(side.core):
        side.received.clear()
        if not (world.hear() or world.receive(PULLERS[0]) or world.publish()):
            world.pass_time(ASK_SECONDS)
        for place, one in enumerate(side.coming):
            if isinstance(one, Whole) and one.digest != 1:
                side.coming[place] = Whole(one.pull, 1)
                wrong += 1
    assert [ended.code for ended in side.ended] == ["object_fetch_timed_out"]
    assert wrong >= 2
