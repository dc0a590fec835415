"""Large values of a driver without a node, where the broker refuses its connection for them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from shoal_core.bus.bulk import BulkAddress
from shoal_core.bus.interface import Bus, Message
from shoal_core.bus.memory import MemoryBroker
from shoal_core.protocol.errors import AuthenticationError
from shoal_core.protocol.ids import ObjectKey
from shoal_core.protocol.messages import NodeDescription, NodeList, NodeRecord, NodeState, SegmentLent
from shoal_core.protocol.records import Stored
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.protocol.wire import encode
from shoal_core.runtime.serialization import Serialized
from shoal_core.runtime.transfers import Transfers
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.runtimes import lone_runtime

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


def a_node() -> NodeRecord:
    description = NodeDescription(
        node_id=NODE,
        hostname="host",
        address="127.0.0.1",
        machine_id="machine",
        pid=1,
        total={},
        shared_memory_path="/nowhere",
        object_store_bytes=1 << 30,
        version="1",
        python_version="3.11",
        started_at=0.0,
    )
    return NodeRecord(description=description, state=NodeState.ALIVE)


async def test_a_refused_credential_ends_what_is_fetched_and_what_is_given(refusing: str) -> None:
    broker, loop = MemoryBroker(), asyncio.get_running_loop()
    async with (
        lone_runtime(LOCAL, broker=broker) as lone,
        broker.connect(role=Role.GCS, identity="gcs", cluster="test") as gcs,
        broker.connect(role=Role.NODE, identity=NODE, cluster="test") as node,
    ):
        gcs.subscribe(SUBJECTS.gcs("list_nodes"), lambda m: _answer(gcs, m, encode(NodeList(nodes=[a_node()]))))
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


def _answer(bus: Bus, asked: Message, data: bytes) -> None:
    bus.publish(asked.reply, data)
