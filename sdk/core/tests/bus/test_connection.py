"""Joining a broker: what works, and what is said when it does not."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal

import pytest

from shoal_core.bus.backoff import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, STEADY_SECONDS, Backoff
from shoal_core.bus.broker import EmbeddedBroker, free_port, launch_broker
from shoal_core.bus.bulk import BulkAddress, BulkConnection, Header
from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import Credentials, redacted
from shoal_core.protocol.errors import AuthenticationError, BufferFullError, ClusterUnreachableError
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.testing.buses import CLUSTER, until

IMPLEMENTATIONS = ("fast", "stock")
Kind = Literal["fast", "stock"]


@pytest.fixture
async def broker() -> AsyncIterator[EmbeddedBroker]:
    async with launch_broker(CLUSTER) as broker:
        yield broker


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_a_wrong_credential_is_said_to_be_one(broker: EmbeddedBroker, implementation: Kind) -> None:
    wrong = Credentials(user=Role.GCS, password="wrong")
    with pytest.raises(AuthenticationError, match=rf"127\.0\.0\.1:{broker.port} refused the credential") as error:
        async with connect(
            broker.address,
            role=Role.GCS,
            identity="x",
            cluster=CLUSTER,
            credentials=wrong,
            timeout_seconds=1000,
            implementation=implementation,
        ):
            raise AssertionError("it let us in")
    assert "wrong" not in str(error.value)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_nobody_there_is_said_with_address_and_time(implementation: Kind) -> None:
    port = free_port()
    with pytest.raises(ClusterUnreachableError, match=rf"nobody answered at nats://127\.0\.0\.1:{port} within 0\.2 s"):
        async with connect(
            f"nats://user:secret@127.0.0.1:{port}",
            role=Role.GCS,
            identity="x",
            cluster=CLUSTER,
            timeout_seconds=0.2,
            implementation=implementation,
        ):
            raise AssertionError("somebody was there")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_somebody_who_never_speaks_is_nobody(implementation: Kind) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"nats://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ClusterUnreachableError, match="nobody answered"):
            async with connect(
                address,
                role=Role.GCS,
                identity="x",
                cluster=CLUSTER,
                timeout_seconds=0.2,
                implementation=implementation,
            ):
                raise AssertionError("somebody spoke")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
async def test_one_of_several_addresses_is_enough(broker: EmbeddedBroker, implementation: Kind) -> None:
    proof = broker.credentials[Role.GCS]
    reachable = f"nats://{proof.user}:{proof.password}@127.0.0.1:{broker.port}"
    async with connect(
        f"nats://127.0.0.1:{free_port()}, {reachable}",
        role=Role.GCS,
        identity="x",
        cluster=CLUSTER,
        implementation=implementation,
    ) as bus:
        await bus.flush()
        assert bus.server_version.startswith("2.")
        assert bus.max_payload == 1024 * 1024


async def test_a_client_may_come_before_its_broker() -> None:
    port = free_port()
    address = f"nats://nobody:known@127.0.0.1:{port}"

    async def join() -> None:
        async with connect(address, role=Role.GCS, identity="x", cluster=CLUSTER, timeout_seconds=30):
            raise AssertionError("it let us in")

    attempt = asyncio.ensure_future(join())
    async with launch_broker(CLUSTER, port=port):
        # That it refuses us shows that we waited for it.
        with pytest.raises(AuthenticationError):
            await attempt


async def test_a_broker_that_does_not_read_fills_a_bounded_buffer() -> None:
    may_end = asyncio.Event()

    async def silent_broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": "2.10.0", "max_payload": 1024 * 1024, "headers": True}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while b"PING" not in await reader.readline():
            pass
        writer.write(b"PONG\r\n")
        await may_end.wait()
        writer.close()

    server = await asyncio.start_server(silent_broker, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    subject = Subjects(CLUSTER).gcs("verb")
    async with connect(f"nats://127.0.0.1:{port}", role=Role.GCS, identity="x", cluster=CLUSTER) as bus:
        published = 0

        async def publish_forever() -> None:
            nonlocal published
            while True:
                bus.publish(subject, bytes(1024 * 1024))
                published += 1
                await asyncio.sleep(0)

        with pytest.raises(BufferFullError, match="does not read"):
            await publish_forever()
        assert 63 <= published <= 100
        may_end.set()
        await until(lambda: not bus.connected)
        assert bus.publish(subject, b"") is False
        server.close()
        await server.wait_closed()


async def test_a_turn_ends_with_what_waits_for_its_end_although_some_of_that_raises(broker: EmbeddedBroker) -> None:
    errors: list[BaseException] = []
    done: list[str] = []

    def fail() -> None:
        raise LookupError("a bug")

    async with connect(
        broker.address,
        role=Role.GCS,
        identity="x",
        cluster=CLUSTER,
        credentials=broker.credentials[Role.GCS],
        on_error=errors.append,
    ) as bus:
        bus.begin_turn()
        bus.at_end_of_turn(fail)
        bus.at_end_of_turn(lambda: done.append("end"))
        assert not done
        bus.end_turn()
        assert done == ["end"]  # at once: the loop has not turned
        assert [type(error) for error in errors] == [LookupError]


async def test_connections_that_a_proxy_takes_for_a_broker_that_is_away_are_closed() -> None:
    taken: list[asyncio.StreamWriter] = []
    joined = asyncio.Event()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(writer)
        if len(taken) == 1:
            writer.write(b'INFO {"server_id": "x", "version": "2.10.0", "headers": true}\r\n')
            while b"PING" not in await reader.readline():
                pass
            writer.write(b"PONG\r\n")
            await joined.wait()
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    address = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with connect(address, role=Role.GCS, identity="x", cluster=CLUSTER):
        joined.set()
        await until(lambda: len(taken) > 3)
    server.close()
    await server.wait_closed()
    gc.collect()  # what is left unclosed warns, and a warning is an error


async def test_a_broker_without_tls_gets_no_credential_from_who_insists_on_it() -> None:
    heard: list[bytes] = []

    async def plain_broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id": "x", "version": "2.10.0", "auth_required": true}\r\n')
        heard.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(plain_broker, "127.0.0.1", 0)
    address = f"tls://user:secret@127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(ClusterUnreachableError, match="TLS"):
        async with connect(address, role=Role.GCS, identity="x", cluster=CLUSTER, timeout_seconds=0.3):
            raise AssertionError("it went on without TLS")
    server.close()
    await server.wait_closed()
    await until(lambda: bool(heard))
    assert set(heard) == {b""}


def test_attempts_come_at_once_and_then_more_and_more_slowly() -> None:
    backoff = Backoff()
    pauses = [backoff.pause_seconds() for _ in range(12)]
    assert pauses[0] == 0
    assert 0.01 <= pauses[1] <= 0.02
    assert all(LONGEST_PAUSE_SECONDS / 2 <= pause <= LONGEST_PAUSE_SECONDS for pause in pauses[8:])


class Idle:
    """Whoever has a bulk connection and nothing to move."""

    def connected(self) -> None:
        pass

    def disconnected(self) -> None:
        pass

    def refused(self, error: AuthenticationError) -> None:
        raise AssertionError(error)

    def turn(self) -> float:
        return 60.0

    def more(self) -> None:
        pass

    def memory(self, header: Header) -> memoryview:
        raise AssertionError(header)

    def arrived(self, header: Header, data: memoryview, checksum: int) -> None:
        raise AssertionError(header)


def test_only_a_connection_that_has_lasted_begins_that_anew() -> None:
    now = 100.0
    backoff = Backoff(lambda: now)
    pauses = []
    for _ in range(9):
        pauses.append(backoff.pause_seconds())
        backoff.connected()
        now += STEADY_SECONDS / 2
    assert pauses[0] == 0
    assert pauses[8] >= LONGEST_PAUSE_SECONDS / 2, "it was cut at once each time"
    now += STEADY_SECONDS / 2
    assert backoff.pause_seconds() == 0
    now += 10 * STEADY_SECONDS
    assert backoff.pause_seconds() > 0, "this attempt has failed"


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, None])
async def test_a_broker_that_cuts_every_connection_is_dialled_more_and_more_slowly(implementation: Kind | None) -> None:
    taken: list[float] = []
    cut: list[float] = []

    async def hasty_broker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.append(asyncio.get_running_loop().time())
        writer.write(b'INFO {"server_id": "x", "version": "2.10.0", "headers": true, "max_payload": 1048576}\r\n')
        await reader.readuntil(b"PING\r\n")
        writer.write(b"PONG\r\n")
        await asyncio.sleep(FIRST_PAUSE_SECONDS / 2)  # the handshake is over by then
        writer.close()
        cut.append(asyncio.get_running_loop().time())

    async with await asyncio.start_server(hasty_broker, "127.0.0.1", 0) as server:
        address = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        if implementation is None:
            connection = BulkConnection(BulkAddress(address, "x"))
            serving = asyncio.create_task(asyncio.to_thread(connection.run, Idle()))
            await until(lambda: len(taken) >= 7)
            connection.close()
            await serving
            connection.discard()
        else:
            async with connect(address, role=Role.GCS, identity="x", cluster=CLUSTER, implementation=implementation):
                await until(lambda: len(taken) >= 7)
        await until(lambda: len(cut) == len(taken))
    assert taken[6] - taken[0] >= sum(FIRST_PAUSE_SECONDS / 2 * 2**doublings for doublings in range(5))


def test_credentials_are_kept_in_a_private_file(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    for credentials in (Credentials(user="a", password="b"), Credentials(token="t")):
        credentials.to_file(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert Credentials.from_file(path) == credentials
    assert "b" not in repr(Credentials(user="a", password="b")).replace("Credentials", "")
    path.write_text("-----BEGIN NATS USER JWT-----\nx\n")
    assert Credentials.from_file(path) == Credentials(creds_file=str(path))


@pytest.mark.parametrize(
    "wrong",
    [
        "",
        "nonsense",
        "[1]",
        "null",
        '{"unknown": "x"}',
        "{}",
        '{"user": "a"}',
        '{"password": "b"}',
        '{"user": "a", "password": ""}',
        '{"token": 5}',
        '{"token": null}',
    ],
)
def test_a_file_that_proves_nothing_is_told_what_belongs_in_it(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(wrong)
    with pytest.raises(ValueError, match=r"credentials\.json holds no credentials: .*user and password, or token"):
        Credentials.from_file(path)


def test_addresses_are_shown_without_what_is_secret() -> None:
    assert redacted("nats://user:p@ss@host:1, token@other:2") == "nats://host:1,nats://other:2"
