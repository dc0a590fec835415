"""Large values of a driver without a node, where something is in the way."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from shoal_core.bus.broker import launch_broker
from shoal_core.bus.bulk import BulkAddress
from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import AuthenticationError, ObjectFetchTimedOutError
from shoal_core.protocol.ids import ObjectKey
from shoal_core.protocol.messages import NodeList
from shoal_core.protocol.records import Stored
from shoal_core.protocol.storage import LendSegment, SegmentLent
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import decode, encode
from shoal_core.runtime.data.serialization import Serialized
from shoal_core.runtime.data.transfers import Transfers
from shoal_core.testing.builders import node_id, node_record, process_id
from shoal_core.testing.runtimes import lone_runtime
from shoal_core.transfer.mover import Mover, Offer
from shoal_core.transfer.pulling import Ended

NODE = node_id(1)
LOCAL = process_id(1, node=0)
SUBJECTS = Subjects("test")


@pytest.fixture
def refusing() -> Iterator[str]:
    """Run a broker that refuses whoever comes; yield its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b'INFO {"server_id":"x","max_payload":1048576}\r\n')
                    connection.recv(4096)
                    connection.sendall(b"-ERR 'Authorization Violation'\r\n")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"nats://127.0.0.1:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


async def test_a_refused_credential_ends_what_is_fetched_and_what_is_given(refusing: str) -> None:
    broker, loop = MemoryBroker(), asyncio.get_running_loop()
    async with (
        lone_runtime(LOCAL, broker=broker) as lone,
        broker.connect(role=Role.GCS, identity="gcs", cluster="test") as gcs,
        broker.connect(role=Role.NODE, identity=NODE, cluster="test") as node,
    ):
        gcs.subscribe(
            SUBJECTS.gcs("list_nodes"), lambda m: _answer(gcs, m, encode(NodeList(nodes=[node_record(NODE)])))
        )
        lent = encode(SegmentLent(chunk_bytes=1000))
        node.subscribe(SUBJECTS.node_from_process(NODE, "lend"), lambda m: _answer(node, m, lent))
        node.subscribe(SUBJECTS.node_from_process(NODE, "take"), lambda m: None)
        runtime = lone.runtime

        def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
            return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

        transfers = Transfers(runtime.bus, SUBJECTS, LOCAL, BulkAddress(refusing, "the driver"), runtime.reactor, call)
        try:
            for _ in range(2):
                with pytest.raises(AuthenticationError, match="refuses the credential of the driver"):
                    await transfers.fetch(Stored(NODE, "o1", 5000))
                with pytest.raises(AuthenticationError, match="refuses the credential of the driver"):
                    await asyncio.to_thread(transfers.give, Serialized(b"x" * 5000), LOCAL, ObjectKey(1))
        finally:
            await asyncio.to_thread(transfers.close)


@pytest.mark.parametrize("offered_at", [2, 99])
async def test_what_its_home_lends_is_not_taken_for_lost_where_it_is_not_offered_yet(offered_at: int) -> None:
    data, asked, nothing = os.urandom(5000), 0, list[Ended]()
    memory, loop = MemoryBroker(), asyncio.get_running_loop()
    async with (
        launch_broker("test") as broker,
        lone_runtime(LOCAL, broker=memory) as lone,
        memory.connect(role=Role.NODE, identity=NODE, cluster="test") as node,
    ):

        def at(role: Role, name: str) -> BulkAddress:
            return BulkAddress(broker.address, name, broker.credentials[role])

        def lend(message: Message) -> None:
            nonlocal asked
            asked += 1
            assert decode(LendSegment, message.data).segment == "o1"
            if asked == offered_at:
                home.order(Offer("o1", memoryview(data), len(data), 1000))
            _answer(node, message, encode(SegmentLent(chunk_bytes=1000)))

        node.subscribe(SUBJECTS.node_from_process(NODE, "lend"), lend)
        home = Mover(at(Role.NODE, NODE), SUBJECTS, Role.NODE, NODE, nothing.append)
        home.order(Offer("another", memoryview(data), len(data), 1000))
        runtime = lone.runtime
        transfers = Transfers(
            runtime.bus, SUBJECTS, LOCAL, at(Role.PROCESS, LOCAL), runtime.reactor, loop.run_until_complete
        )
        try:
            if offered_at == 2:
                assert bytes(await transfers.fetch(Stored(NODE, "o1", len(data)))) == data
            else:
                with pytest.raises(ObjectFetchTimedOutError, match="o1 is not offered by its source, 3 times"):
                    await transfers.fetch(Stored(NODE, "o1", len(data)))
        finally:
            await asyncio.to_thread(transfers.close)
            await asyncio.to_thread(home.close)


def _answer(bus: Bus, asked: Message, data: bytes) -> None:
    bus.publish(asked.reply, data)
