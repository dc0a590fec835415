"""The one behaviour of every bus: fast, stock and the in-memory twin."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from shoal_core.bus.interface import Bus, Message
from shoal_core.protocol.errors import (
    BusClosedError,
    DisconnectedError,
    NoRespondersError,
    PayloadTooLargeError,
    PermissionViolationError,
    RequestTimeoutError,
)
from shoal_core.protocol.ids import ProcessId
from shoal_core.protocol.subjects import GCS_QUEUE, Role, Subjects
from shoal_core.testing.buses import CLUSTER, IMPLEMENTATIONS, BusHarness, Implementation, bus_harness, until

SUBJECTS = Subjects(CLUSTER)
VERB = SUBJECTS.gcs("echo")


@pytest.fixture(params=IMPLEMENTATIONS)
async def harness(request: pytest.FixtureRequest) -> AsyncIterator[BusHarness]:
    implementation: Implementation = request.param
    async with bus_harness(implementation) as harness:
        yield harness


def echo(bus: Bus) -> None:
    """Have a bus answer what it is asked with the question."""
    bus.subscribe(VERB, lambda message: assert_taken(bus.publish(message.reply, message.data)), queue=GCS_QUEUE)


def assert_taken(taken: bool) -> None:
    assert taken


async def test_messages_arrive_in_order_and_whole(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    received: list[Message] = []
    service.subscribe(SUBJECTS.gcs("*"), received.append)
    await service.flush()
    payloads = [b"", b"\r\n", b"MSG a 1 2\r\nxx\r\n", bytes(range(256)) * 2000, *(b"%d" % n for n in range(2000))]
    for payload in payloads:
        assert asker.publish(VERB, payload, reply="answer.here")
    await until(lambda: len(received) == len(payloads))
    assert [message.data for message in received] == payloads
    assert {message.subject for message in received} == {VERB}
    assert {message.reply for message in received} == {"answer.here"}
    assert {message.headers is None for message in received} == {True}


async def test_headers_travel(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    received: list[Message] = []
    service.subscribe(VERB, received.append)
    await service.flush()
    headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "name": "Zoë: a, b"}
    asker.publish(VERB, b"data", headers=headers)
    await until(lambda: bool(received))
    assert received[0].headers == headers
    assert received[0].data == b"data"


async def test_every_subscriber_hears_but_only_one_of_a_queue(harness: BusHarness) -> None:
    one, two = await harness.join(Role.GCS, "one"), await harness.join(Role.GCS, "two")
    asker = await harness.join(Role.PROCESS, "asker")
    in_queue: list[bytes] = []
    everyone: list[bytes] = []
    for bus in (one, two):
        bus.subscribe(VERB, lambda message: in_queue.append(message.data), queue=GCS_QUEUE)
        bus.subscribe(VERB, lambda message: everyone.append(message.data))
        await bus.flush()
    sent = [b"%d" % number for number in range(100)]
    for data in sent:
        asker.publish(VERB, data)
    await until(lambda: len(everyone) == 200 and len(in_queue) == 100)
    assert sorted(in_queue) == sorted(sent)


async def test_what_was_unsubscribed_is_not_called(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "service")
    ended: list[Message] = []
    lasting: list[Message] = []
    subscription = bus.subscribe(VERB, ended.append)
    bus.subscribe(VERB, lasting.append)
    bus.publish(VERB, b"first")
    await until(lambda: len(ended) == len(lasting) == 1)
    bus.publish(VERB, b"second")
    subscription.unsubscribe()
    subscription.unsubscribe()
    await until(lambda: len(lasting) == 2)
    assert len(ended) == 1


async def test_requests_are_answered(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    echo(service)
    await service.flush()
    questions = [b"%d" % number for number in range(200)]
    answers = await asyncio.gather(*(asker.request(VERB, data, timeout_seconds=10) for data in questions))
    assert [answer.data for answer in answers] == questions


async def test_nobody_who_listens_is_told_at_once(harness: BusHarness) -> None:
    asker = await harness.join(Role.PROCESS, "asker")
    with pytest.raises(NoRespondersError, match="echo"):
        await asker.request(VERB, b"", timeout_seconds=1000)


async def test_an_answer_that_does_not_come_is_a_timeout(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    service.subscribe(VERB, lambda message: None)
    await service.flush()
    with pytest.raises(RequestTimeoutError, match=r"echo.*0\.01 s"):
        await asker.request(VERB, b"", timeout_seconds=0.01)


async def test_a_request_in_flight_fails_when_the_connection_breaks(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    received: list[Message] = []
    service.subscribe(VERB, received.append)
    await service.flush()
    question = asyncio.ensure_future(asker.request(VERB, b"", timeout_seconds=1000))
    await until(lambda: bool(received))
    await harness.restart()
    with pytest.raises(DisconnectedError, match="may or may not"):
        await question


async def test_subscriptions_live_on_after_a_restart(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    echo(service)
    ended = service.subscribe(SUBJECTS.gcs("ended"), lambda message: None)
    await service.flush()
    ended.unsubscribe()
    for _ in range(2):
        await harness.restart()
        await service.flush()
        assert (await asker.request(VERB, b"again", timeout_seconds=10)).data == b"again"
        with pytest.raises(NoRespondersError):
            await asker.request(SUBJECTS.gcs("ended"), b"", timeout_seconds=10)


async def test_what_is_published_while_down_is_dropped_and_said_so(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    taken: list[bool] = []
    received: list[bytes] = []

    def use_while_down(connected: bool) -> None:
        if not connected:
            service.subscribe(VERB, lambda message: received.append(message.data))
            taken.append(service.publish(VERB, b"while down"))

    service.on_connection(use_while_down)
    await harness.restart()
    await service.flush()
    service.publish(VERB, b"after")
    await until(lambda: b"after" in received)
    assert taken == [False]
    assert received == [b"after"]
    assert service.dropped_messages == 1


async def test_listeners_hear_of_both_changes_until_they_end_it(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "service")
    changes: list[bool] = []
    end = bus.on_connection(changes.append)
    assert bus.connected
    await harness.restart()
    assert changes == [False, True]
    end()
    await harness.restart()
    assert changes == [False, True]


async def test_a_callback_that_raises_is_reported_and_lives_on(harness: BusHarness) -> None:
    errors: list[BaseException] = []
    bus = await harness.join(Role.GCS, "service", errors.append)
    received: list[bytes] = []

    def callback(message: Message) -> None:
        received.append(message.data)
        if message.data == b"cancel":
            raise asyncio.CancelledError
        if message.data == b"raise":
            raise LookupError("a bug")

    bus.subscribe(VERB, callback)
    sent = [b"raise", b"fine", b"cancel", b"fine too"]
    for data in sent:
        bus.publish(VERB, data)
    await until(lambda: len(received) == len(sent))
    assert received == sent
    assert [type(error) for error in errors] == [LookupError, asyncio.CancelledError]


async def test_what_waits_for_the_end_of_a_turn_is_done_once(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "service")
    received: list[bytes] = []
    bus.subscribe(VERB, lambda message: received.append(message.data))

    def publish() -> None:
        bus.publish(VERB, b"at the end")

    bus.begin_turn()
    bus.at_end_of_turn(publish)
    bus.at_end_of_turn(lambda: bus.at_end_of_turn(publish))
    bus.publish(VERB, b"in the turn")
    bus.end_turn()
    bus.at_end_of_turn(publish)
    await until(lambda: len(received) == 4)
    assert received == [b"in the turn", *[b"at the end"] * 3]


async def test_what_is_too_large_or_malformed_is_refused_where_it_is_published(harness: BusHarness) -> None:
    bus = await harness.join(Role.GCS, "service")
    received: list[int] = []
    bus.subscribe(VERB, lambda message: received.append(len(message.data)))
    with pytest.raises(PayloadTooLargeError, match=f"{bus.max_payload + 1} bytes"):
        bus.publish(VERB, bytes(bus.max_payload + 1))
    for subject in ("", "two words", "line\r\nPUB x 0"):
        with pytest.raises(ValueError, match="not a subject"):
            bus.publish(subject, b"")
        with pytest.raises(ValueError, match="not a subject"):
            bus.subscribe(subject, lambda message: None)
    bus.publish(VERB, bytes(bus.max_payload))
    await until(lambda: received == [bus.max_payload])


async def test_a_forbidden_subject_is_reported_and_nothing_arrives(harness: BusHarness) -> None:
    errors: list[BaseException] = []
    service = await harness.join(Role.GCS, "service")
    process = await harness.join(Role.PROCESS, "process", errors.append)
    received: list[Message] = []
    service.subscribe(SUBJECTS.gcs_from_node(">"), received.append)
    await service.flush()
    process.publish(SUBJECTS.gcs_from_node("register"), b"")
    process.subscribe(SUBJECTS.inbox(Role.GCS, "*"), received.append)
    await process.flush()
    await until(lambda: len(errors) == 2)
    assert [type(error) for error in errors] == [PermissionViolationError] * 2
    await service.flush()
    assert received == []


async def test_a_forbidden_request_fails_at_once(harness: BusHarness) -> None:
    errors: list[BaseException] = []
    process = await harness.join(Role.PROCESS, "process", errors.append)
    with pytest.raises(PermissionViolationError, match="register"):
        await process.request(SUBJECTS.gcs_from_node("register"), b"", timeout_seconds=1000)
    assert len(errors) == 1


async def test_draining_delivers_what_is_on_its_way_and_ends_the_subscriptions(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    asker = await harness.join(Role.PROCESS, "asker")
    received: list[Message] = []
    service.subscribe(VERB, received.append)
    await service.flush()
    for _ in range(100):
        asker.publish(VERB, b"x")
    await asker.flush()
    await service.drain()
    assert len(received) == 100
    with pytest.raises(NoRespondersError):
        await asker.request(VERB, b"", timeout_seconds=10)
    with pytest.raises(NoRespondersError):
        await service.request(VERB, b"", timeout_seconds=10)


async def test_inboxes_of_two_connections_of_one_identity_do_not_mix(harness: BusHarness) -> None:
    service = await harness.join(Role.GCS, "service")
    one, two = await harness.join(Role.PROCESS, "same"), await harness.join(Role.PROCESS, "same")
    echo(service)
    await service.flush()
    answers = await asyncio.gather(
        *(bus.request(VERB, data, timeout_seconds=10) for _ in range(20) for bus, data in ((one, b"1"), (two, b"2")))
    )
    assert [answer.data for answer in answers] == [b"1", b"2"] * 20
    assert one.inbox != two.inbox
    assert one.inbox.startswith(SUBJECTS.inbox(Role.PROCESS, "same"))


async def test_events_reach_everyone(harness: BusHarness) -> None:
    node = await harness.join(Role.NODE, "node")
    process = await harness.join(Role.PROCESS, "process")
    received: list[str] = []
    process.subscribe(SUBJECTS.event(Role.NODE, "*", "announce"), lambda message: received.append(message.subject))
    process.subscribe(SUBJECTS.channels_to(ProcessId("p")), lambda message: received.append(message.subject))
    await process.flush()
    node.publish(SUBJECTS.event(Role.NODE, "n", "announce"), b"")
    node.publish(SUBJECTS.channel(ProcessId("p"), Role.NODE, ProcessId("n")), b"")
    await until(lambda: len(received) == 2)
    assert received[0] == SUBJECTS.event(Role.NODE, "n", "announce")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_a_closed_bus_says_so(implementation: Implementation) -> None:
    async with bus_harness(implementation) as harness:
        bus = await harness.join(Role.GCS, "service")
    assert not bus.connected
    with pytest.raises(BusClosedError):
        bus.publish(VERB, b"")
    with pytest.raises(BusClosedError):
        bus.subscribe(VERB, lambda message: None)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_closing_ends_what_was_spawned_though_it_overhears_a_cancellation(implementation: Implementation) -> None:
    heard = 0

    async def stubborn() -> None:
        nonlocal heard
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                heard += 1
                if heard == 2:
                    raise

    async with bus_harness(implementation) as harness:
        bus = await harness.join(Role.PROCESS, "process")
        bus.spawn(stubborn())
        await asyncio.sleep(0)
    assert heard == 2
