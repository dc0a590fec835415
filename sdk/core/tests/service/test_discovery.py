"""The NATS service protocol: what `nats micro` asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from shoal_core.bus.interface import Message
from shoal_core.bus.memory import MemoryBroker, MemoryBus
from shoal_core.protocol.effects import Effect, Reply, Request
from shoal_core.protocol.errors import NoRespondersError, NotFoundError
from shoal_core.protocol.messages import KvGet, KvValue
from shoal_core.protocol.subjects import GCS_QUEUE, Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.service import Engine, Route
from shoal_core.testing.buses import CLUSTER, until

SUBJECT = Subjects(CLUSTER).gcs("kv_get")
REPLICAS = ("one", "two")


class Answers:
    """A core that answers keys, and refuses the key "no"."""

    def handle(self, message: object, now: float) -> list[Effect]:
        if not isinstance(message, Request):
            return []
        refused = message.message == KvGet(namespace="", key="no")
        return [Reply(message.token, NotFoundError("no such key") if refused else KvValue(value=None))]

    def tick(self, now: float) -> list[Effect]:
        return []


class World:
    """Two replicas, and somebody who looks for them."""

    def __init__(self, observer: MemoryBus) -> None:
        self.observer = observer

    async def answers(self, subject: str, count: int) -> dict[str, dict[str, Any]]:
        """Return what each replica answers, by its id."""
        heard: list[Message] = []
        reply = f"{self.observer.inbox}.all.{subject.replace('.', '-')}"
        subscription = self.observer.subscribe(reply, heard.append)
        self.observer.publish(subject, b"", reply=reply)
        await until(lambda: len(heard) >= count)
        await self.observer.flush()
        subscription.unsubscribe()
        assert len(heard) == count
        return {answer["id"]: answer for answer in (json.loads(message.data) for message in heard)}


@pytest.fixture
async def world() -> AsyncIterator[World]:
    broker = MemoryBroker()
    async with AsyncExitStack() as stack:
        for name in REPLICAS:
            bus = await stack.enter_async_context(broker.connect(role=Role.GCS, identity=name, cluster=CLUSTER))
            routes = [Route(SUBJECT, KvGet, GCS_QUEUE)]
            await stack.enter_async_context(Engine(Answers(), bus, name="gcs", routes=routes))
        observer = broker.connect(role=Role.OBSERVER, identity="observer", cluster=CLUSTER)
        yield World(await stack.enter_async_context(observer))


@pytest.mark.parametrize("verb", ["PING", "INFO", "STATS"])
async def test_replicas_answer_everyone_their_name_and_their_id(world: World, verb: str) -> None:
    for subject, answering in (
        (f"$SRV.{verb}", {"one", "two"}),
        (f"$SRV.{verb}.shoal-gcs", {"one", "two"}),
        (f"$SRV.{verb}.shoal-gcs.two", {"two"}),
    ):
        answers = await world.answers(subject, len(answering))
        assert set(answers) == answering
        for answer in answers.values():
            assert answer["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
            assert answer["name"] == "shoal-gcs"
            assert answer["version"]
            assert answer["metadata"] == {}
    with pytest.raises(NoRespondersError):
        await world.observer.request(f"$SRV.{verb}.shoal-scheduler", b"", timeout_seconds=5)


async def test_info_names_the_endpoints(world: World) -> None:
    answers = await world.answers("$SRV.INFO.shoal-gcs.one", 1)
    [endpoint] = answers["one"]["endpoints"]
    assert endpoint == {"name": "kv_get", "subject": SUBJECT, "queue_group": GCS_QUEUE, "metadata": {}}
    assert answers["one"]["description"]


async def test_stats_count_requests_errors_and_their_time(world: World) -> None:
    for key in ("yes", "no", "yes", "no"):
        await world.observer.request(SUBJECT, encode(KvGet(namespace="", key=key)), timeout_seconds=5)
    answers = await world.answers("$SRV.STATS", 2)
    endpoints = [answer["endpoints"][0] for answer in answers.values()]
    assert sum(endpoint["num_requests"] for endpoint in endpoints) == 4
    assert sum(endpoint["num_errors"] for endpoint in endpoints) == 2
    assert "NotFoundError: no such key" in [endpoint["last_error"] for endpoint in endpoints]
    for endpoint in endpoints:
        assert endpoint["average_processing_time"] == pytest.approx(endpoint["processing_time"] / 2, abs=1)
    assert all(answer["started"].endswith("Z") for answer in answers.values())


async def test_a_question_without_a_reply_subject_is_ignored(world: World) -> None:
    world.observer.publish("$SRV.PING", b"")
    await asyncio.wait_for(world.observer.flush(), 5)
    assert set(await world.answers("$SRV.PING", 2)) == set(REPLICAS)


async def test_a_question_is_answered_to_an_inbox_only(world: World) -> None:
    heard: list[Message] = []
    elsewhere = Subjects(CLUSTER).event(Role.GCS, "one", "forged")
    world.observer.subscribe(elsewhere, heard.append)
    world.observer.publish("$SRV.PING", b"", reply=elsewhere)
    assert set(await world.answers("$SRV.PING", 2)) == set(REPLICAS)
    assert heard == []
