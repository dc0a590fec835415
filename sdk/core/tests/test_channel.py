"""The channel under everything a network can do: loss, doubles, disorder, cuts, and the end of either side."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal_core.protocol.channel import (
    ACK_BYTES,
    ACK_DELAY_SECONDS,
    ASK,
    DATA,
    HEADER,
    LOST,
    PROBE_LIMIT_SECONDS,
    PROBE_SECONDS,
    RETURNED,
    Budget,
    Channel,
)
from shoal_core.protocol.errors import BadFrameError, ChannelError
from shoal_core.testing import BadNetwork, Fate

A, B = "a", "b"
OTHER = {A: B, B: A}
PIECE_BYTES = 64


def flags_of(frame: bytes) -> int:
    return int(HEADER.unpack_from(frame)[3])


def payloads_in(frames: list[bytes]) -> list[bytes]:
    return [frame[HEADER.size :] for frame in frames if flags_of(frame) & DATA]


class Ends:
    """Two ends, what each was given to send, and what each has received."""

    def __init__(self, piece_bytes: int = PIECE_BYTES, total_bytes: int = 400, minimum_bytes: int = 100) -> None:
        self.now = 0.0
        self.budgets = {side: Budget(total_bytes, minimum_bytes) for side in (A, B)}
        self.channels = {side: Channel(self.budgets[side], piece_bytes=piece_bytes) for side in (A, B)}
        self.sent: dict[str, list[bytes]] = {A: [], B: []}
        self.received: dict[str, list[bytes]] = {A: [], B: []}

    def send(self, side: str, size: int = 10) -> None:
        payload = f"{side}{len(self.sent[side])}:".encode().ljust(size, b".")
        self.sent[side].append(payload)
        self.channels[side].send(payload)

    def frames(self, side: str) -> list[bytes]:
        """Take the frames of a side, and hold it to its window at every one of them."""
        channel = self.channels[side]
        frames = channel.frames(self.now)
        in_flight = channel.in_flight_bytes
        largest = max((len(payload) for payload in payloads_in(frames)), default=0)
        if largest:
            assert in_flight <= max(channel.window_bytes, largest)
        assert not channel.urgent, "frames gives everything at once"
        return frames

    def take(self, side: str, frame: bytes) -> None:
        payload = self.channels[side].receive(frame, self.now)
        if payload is not None:
            self.received[side].append(bytes(payload))

    def settle(self, limit: int = 500) -> None:
        """Carry everything over a network without faults until nothing moves, letting time pass in between."""
        for _ in range(limit):
            moved = False
            for side in (A, B):
                for frame in self.frames(side):
                    moved = True
                    self.take(OTHER[side], frame)
            if not moved:
                if all(channel.last_number == channel.acknowledged for channel in self.channels.values()):
                    if not any(channel.owing for channel in self.channels.values()):
                        return
                    self.now += ACK_DELAY_SECONDS
                else:
                    self.now += PROBE_LIMIT_SECONDS
                for channel in self.channels.values():
                    channel.tick(self.now)
        raise AssertionError("the two ends never came to rest")

    def check(self) -> None:
        for side in (A, B):
            self.channels[side].sanity_check()
            sent = self.sent[OTHER[side]]
            assert self.received[side] == sent[: len(self.received[side])], "each once and in order"

    def check_all_received(self) -> None:
        for side in (A, B):
            assert self.received[side] == self.sent[OTHER[side]]
            assert self.channels[side].in_flight_bytes == 0


class ChannelMachine(RuleBasedStateMachine):
    """Every schedule of sends, losses, doubles, disorder, reconnects, time and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = Ends()
        self.under_way: dict[str, list[bytes]] = {A: [], B: []}  # by the side they go to
        self.dead: str | None = None

    sides = st.sampled_from([A, B])

    def pump(self, side: str) -> None:
        if side != self.dead:
            self.under_way[OTHER[side]] += self.ends.frames(side)

    @precondition(lambda self: self.dead is None)
    @rule(side=sides, size=st.sampled_from([8, 30, 64, 150, 500]), count=st.integers(1, 4), pump=st.booleans())
    def send(self, side: str, size: int, count: int, pump: bool) -> None:
        for _ in range(count):
            self.ends.send(side, size)
        if pump:
            self.pump(side)

    @rule(side=sides, position=st.sampled_from([0, 0, 0, 1, 3, 9]), twice=st.booleans(), pump=st.booleans())
    def deliver(self, side: str, position: int, twice: bool, pump: bool) -> None:
        queue = self.under_way[side]
        if not queue:
            return
        index = min(position, len(queue) - 1)
        frame = queue[index] if twice else queue.pop(index)
        if side != self.dead:
            self.ends.take(side, frame)
            if pump:
                self.pump(side)

    @rule(side=sides)
    def deliver_all(self, side: str) -> None:
        queue, self.under_way[side] = self.under_way[side], []
        for frame in queue:
            if side != self.dead:
                self.ends.take(side, frame)
        self.pump(side)

    @rule(side=sides, position=st.integers(0, 9), count=st.integers(1, 5))
    def drop(self, side: str, position: int, count: int) -> None:
        del self.under_way[side][position : position + count]

    @rule(seconds=st.sampled_from([0.001, ACK_DELAY_SECONDS, 0.3, PROBE_SECONDS, 6.0]))
    def pass_time(self, seconds: float) -> None:
        self.ends.now += seconds
        for side in (A, B):
            if side != self.dead:
                self.ends.channels[side].tick(self.ends.now)
                self.pump(side)

    @precondition(lambda self: self.dead is None)
    @rule(side=sides, cuts=st.booleans())
    def reconnect(self, side: str, cuts: bool) -> None:
        if cuts:
            self.under_way[A].clear()
            self.under_way[B].clear()
        self.ends.channels[side].returned(self.ends.now)
        self.pump(side)

    @precondition(lambda self: self.dead is None)
    @rule(side=sides)
    def die(self, side: str) -> None:
        """One incarnation ends; the other is told, and hears late frames afterwards."""
        survivor = OTHER[side]
        unknown = self.ends.channels[survivor].end()
        sent = self.ends.sent[survivor]
        certain = len(sent) - len(unknown)
        assert unknown == sent[certain:], "what comes back is a whole tail, in order"
        assert len(self.ends.received[side]) >= certain, "what does not come back was received"
        self.dead = side

    @invariant()
    def each_once_in_order(self) -> None:
        self.ends.check()

    @invariant()
    def nothing_after_the_end(self) -> None:
        if self.dead is not None:
            survivor = self.ends.channels[OTHER[self.dead]]
            assert survivor.end() == []
            assert survivor.frames(self.ends.now) == []

    def teardown(self) -> None:
        if self.dead is None:
            self.ends.settle()
            self.ends.check()
            self.ends.check_all_received()


ChannelMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)
TestChannelMachine = ChannelMachine.TestCase


@pytest.mark.parametrize("seed", range(8))
def test_a_long_talk_over_a_very_bad_network(seed: int) -> None:
    ends = Ends()
    network = BadNetwork[bytes](seed, Fate(drop=0.2, duplicate=0.2, reorder=0.2))

    def take(_source: str, target: str, frame: bytes) -> None:
        ends.take(target, frame)

    for step in range(400):
        side = network.random.choice([A, B])
        ends.send(side, network.random.randrange(5, 200))
        if step % 50 == 20:
            network.partition(A, B)
        if step % 50 == 30:
            network.heal(A, B)
        ends.now += 0.05
        for place in (A, B):
            ends.channels[place].tick(ends.now)
            for frame in ends.frames(place):
                network.send(place, OTHER[place], frame)
        for _ in range(network.random.randrange(8)):
            network.deliver_one(take)
        ends.check()
    network.fate = Fate()
    network.deliver_all(take)
    ends.settle()
    ends.check_all_received()


def test_acknowledgements_ride_on_data() -> None:
    ends = Ends()
    ends.send(A)
    [frame] = ends.frames(A)
    ends.take(B, frame)
    assert not ends.channels[B].urgent
    ends.send(B)
    [answer] = ends.frames(B)
    ends.take(A, answer)
    assert ends.channels[A].acknowledged == 1
    ends.channels[B].tick(ends.now + ACK_DELAY_SECONDS)
    assert not ends.channels[B].urgent, "what was acknowledged is not acknowledged again"


def test_an_acknowledgement_without_data_goes_after_the_delay() -> None:
    ends = Ends()
    ends.send(A)
    ends.take(B, ends.frames(A)[0])
    ends.channels[B].tick(ACK_DELAY_SECONDS / 2)
    assert ends.frames(B) == []
    ends.channels[B].tick(ACK_DELAY_SECONDS)
    [pure] = ends.frames(B)
    assert flags_of(pure) == 0
    assert len(pure) == HEADER.size


def test_many_bytes_are_acknowledged_without_delay() -> None:
    ends = Ends(piece_bytes=1 << 20, total_bytes=1 << 24, minimum_bytes=1 << 15)
    ends.send(A, ACK_BYTES)
    ends.take(B, ends.frames(A)[0])
    assert len(ends.frames(B)) == 1


def test_a_gap_is_told_at_once_and_only_once() -> None:
    ends = Ends()
    for _ in range(4):
        ends.send(A)
    lost, *others = ends.frames(A)
    for frame in others:
        ends.take(B, frame)
    [answer] = ends.frames(B)
    assert flags_of(answer) == LOST
    ends.take(A, answer)
    again = ends.frames(A)
    assert payloads_in(again) == payloads_in([lost, *others])
    assert ends.channels[A].statistics.resent == 4
    ends.take(A, answer)
    assert ends.frames(A) == [], "a second news of the same gap starts nothing"


def test_an_acknowledgement_that_comes_after_a_resend_began_ends_it() -> None:
    ends = Ends()
    for _ in range(3):
        ends.send(A)
    first, second, third = ends.frames(A)
    ends.take(B, second)
    [lost] = ends.frames(B)
    for frame in (first, second, third):
        ends.take(B, frame)
    ends.channels[B].tick(ACK_DELAY_SECONDS)
    [acknowledgement] = ends.frames(B)
    ends.take(A, lost)
    ends.take(A, acknowledgement)
    assert ends.frames(A) == []
    ends.send(A)
    ends.settle()
    ends.check_all_received()


def test_a_slow_receiver_is_asked_and_not_sent_copies() -> None:
    ends = Ends()
    for _ in range(5):
        ends.send(A)
    frames = ends.frames(A)
    asked_at = []
    for tenth in range(1, 200):
        ends.now = tenth / 10
        ends.channels[A].tick(ends.now)
        for frame in ends.frames(A):
            assert flags_of(frame) == ASK
            frames.append(frame)
            asked_at.append(ends.now)
    assert asked_at == [1.0, 2.0, 4.0, 8.0, 13.0, 18.0]
    for frame in frames:
        ends.take(B, frame)
    ends.settle()
    ends.check_all_received()
    assert ends.channels[A].statistics.resent == 0


def test_a_reconnect_finds_what_was_lost_both_ways() -> None:
    ends = Ends()
    for side in (A, B):
        ends.send(side)
        ends.frames(side)  # lost
    ends.channels[A].returned(ends.now)
    [hello] = ends.frames(A)
    assert flags_of(hello) == ASK | RETURNED
    ends.take(B, hello)
    before = ends.now
    for _ in range(3):
        for side in (B, A):
            for frame in ends.frames(side):
                ends.take(OTHER[side], frame)
    assert ends.now == before
    ends.check()
    assert ends.received == {A: ends.sent[B], B: ends.sent[A]}


def test_a_blocked_sender_asks_rather_than_waits() -> None:
    ends = Ends()
    for _ in range(3):
        ends.send(A, 60)
    frames = ends.frames(A)
    assert len(payloads_in(frames)) == 1
    assert flags_of(frames[-1]) == ASK
    for frame in frames:
        ends.take(B, frame)
    assert ends.channels[B].urgent


def test_a_payload_larger_than_the_window_goes_alone() -> None:
    ends = Ends(piece_bytes=10_000)
    ends.send(A, 5_000)
    ends.send(A, 5_000)
    assert len(payloads_in(ends.frames(A))) == 1
    ends.settle()
    ends.check_all_received()


def test_pieces_of_a_payload_come_back_as_the_whole() -> None:
    ends = Ends(total_bytes=10_000, minimum_bytes=10_000)
    ends.send(A, 200)
    first, *_ = ends.frames(A)
    ends.take(B, first)
    ends.channels[B].tick(1.0)
    for frame in ends.frames(B):
        ends.take(A, frame)
    assert ends.channels[A].acknowledged == 1
    assert ends.channels[A].end() == ends.sent[A]


def test_silence_counts_only_while_something_waits() -> None:
    ends = Ends()
    ends.now = 100.0
    assert ends.channels[A].silent_seconds(ends.now) == 0
    ends.send(A)
    frames = ends.frames(A)
    assert ends.channels[A].silent_seconds(104.0) == 4.0
    for frame in frames:
        ends.take(B, frame)
    ends.settle()
    assert ends.channels[A].silent_seconds(ends.now + 50) == 0


def test_a_budget_is_shared_out_with_a_minimum_each() -> None:
    budget = Budget(total_bytes=1000, minimum_bytes=300)
    first = Channel(budget)
    assert budget.share_bytes == 1000
    second = Channel(budget)
    assert budget.share_bytes == 500
    others = [Channel(budget) for _ in range(5)]
    assert budget.share_bytes == 300
    for channel in (second, *others, second):
        channel.end()
    assert budget.share_bytes == 1000
    first.end()
    assert budget.share_bytes == 1000


def test_frames_that_nobody_would_send_are_refused_and_change_nothing() -> None:
    ends = Ends()
    ends.send(A)
    ends.frames(A)
    with pytest.raises(BadFrameError, match="shorter than its header"):
        ends.take(A, b"short")
    with pytest.raises(BadFrameError, match="acknowledged number 2, but only 1"):
        ends.take(A, HEADER.pack(0, 2, 100, 0))
    ends.check()
    ends.settle()
    ends.check_all_received()


def test_nothing_can_be_sent_after_the_end() -> None:
    ends = Ends()
    ends.channels[A].end()
    with pytest.raises(ChannelError, match="has ended"):
        ends.send(A)
