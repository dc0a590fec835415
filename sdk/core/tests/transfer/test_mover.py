"""Movers on a real broker: bytes from memory to memory, and what becomes of it when something ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import queue
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from shoal_core.bus.broker import EmbeddedBroker, find_server, free_port, launch_broker
from shoal_core.bus.bulk import PIECE_BYTES, BulkAddress
from shoal_core.bus.connection import connect
from shoal_core.bus.credentials import Credentials, TlsFiles
from shoal_core.protocol.errors import AuthenticationError
from shoal_core.protocol.ids import PeerId
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.testing.builders import node_id, process_id
from shoal_core.testing.buses import until
from shoal_core.transfer import records
from shoal_core.transfer.mover import Cancel, Mover, Offer, Pull, Withdraw
from shoal_core.transfer.pulling import Ended

SUBJECTS = Subjects("c")
MIB = 1 << 20
CHUNK = 2 * PIECE_BYTES + 100 * 1024  # what is read in one piece, in several, and with what follows
SECONDS = 40.0
TLS = Path(__file__).parent / "tls"


class Side:
    """A mover and what it was told to tell."""

    def __init__(self, local: PeerId, role: Role, where: BulkAddress) -> None:
        self.local = local
        self.ended: queue.Queue[Ended] = queue.Queue()
        self.mover = Mover(where, SUBJECTS, role, local, self.ended.put)

    def offer(self, name: str, memory: Path | bytes, size_bytes: int) -> None:
        whole = memory if isinstance(memory, Path) else memoryview(memory)
        self.mover.order(Offer(name, whole, size_bytes, CHUNK))

    def pull(self, source: Side, stream: str, size_bytes: int, memory: Path | None = None) -> bytearray:
        target = bytearray(size_bytes if memory is None else 0)
        whole = memoryview(target) if memory is None else memory
        self.mover.order(Pull(f"copy of {stream}", source.local, stream, size_bytes, CHUNK, whole))
        return target

    async def end(self) -> Ended:
        return await asyncio.to_thread(self.ended.get, timeout=SECONDS)


Join = Callable[[PeerId], Side]


@contextlib.asynccontextmanager
async def joined(address: Callable[[Role, str], BulkAddress]) -> AsyncIterator[Join]:
    sides: list[Side] = []

    def join(local: PeerId) -> Side:
        role = Role.NODE if len(local) == 16 else Role.PROCESS
        sides.append(Side(local, role, address(role, local)))
        return sides[-1]

    try:
        yield join
    finally:
        for side in sides:
            side.mover.close()


@pytest.fixture
async def broker() -> AsyncIterator[EmbeddedBroker]:
    async with launch_broker("c") as one:
        yield one


@pytest.fixture
async def join(broker: EmbeddedBroker) -> AsyncIterator[Join]:
    async with joined(lambda role, name: BulkAddress(broker.address, name, broker.credentials[role])) as one:
        yield one


async def test_bytes_go_from_file_to_file_and_from_and_to_a_process_without_a_node(join: Join, tmp_path: Path) -> None:
    data = os.urandom(5 * MIB + 4321)
    (tmp_path / "o1").write_bytes(data)
    (tmp_path / "o2").write_bytes(bytes(len(data)))
    home, away, driver = join(node_id(1)), join(node_id(2)), join(process_id(3, node=0))
    home.offer("o1", tmp_path / "o1", len(data))
    away.pull(home, "o1", len(data), tmp_path / "o2")
    assert await away.end() == Ended("copy of o1")
    assert (tmp_path / "o2").read_bytes() == data
    there = driver.pull(home, "o1", len(data))
    assert (await driver.end()).code == ""
    assert bytes(there) == data
    driver.offer("p1", data, len(data))
    back = away.pull(driver, "p1", len(data))
    assert (await away.end()).code == ""
    assert bytes(back) == data
    assert home.mover.moved.sent_bytes == 2 * len(data)
    assert away.mover.moved.received_bytes == 2 * len(data)


async def test_what_lies_in_a_part_of_a_file_is_pulled_from_there(join: Join, tmp_path: Path) -> None:
    data = os.urandom(CHUNK + 4321)
    (tmp_path / "s1").write_bytes(bytes(8192) + data + bytes(5000))
    home, away = join(node_id(1)), join(node_id(2))
    home.mover.order(Offer("o1", tmp_path / "s1", len(data), CHUNK, 8192))
    there = away.pull(home, "o1", len(data))
    assert (await away.end()).code == ""
    assert bytes(there) == data


async def test_files_stay_mapped_for_the_next_objects_in_them_and_not_for_long(join: Join, tmp_path: Path) -> None:
    first, second, path = os.urandom(2 * MIB), os.urandom(2 * MIB - 4321), str(tmp_path)
    (tmp_path / "o1").write_bytes(first)
    (tmp_path / "o2").write_bytes(bytes(len(first)))
    home, away = join(node_id(1)), join(node_id(2))
    home.offer("o1", tmp_path / "o1", len(first))
    away.pull(home, "o1", len(first), tmp_path / "o2")
    assert (await away.end()).code == ""
    home.mover.order(Withdraw("o1", "freed"))
    (tmp_path / "o1").write_bytes(second + first[len(second) :])
    for before, after in (("o1", "o3"), ("o2", "o4")):
        os.rename(tmp_path / before, tmp_path / after)
    assert mapped(path) == {"o3", "o4"}
    home.offer("o3", tmp_path / "o3", len(second))
    away.pull(home, "o3", len(second), tmp_path / "o4")
    assert (await away.end()).code == ""
    assert (tmp_path / "o4").read_bytes() == second + first[len(second) :]
    home.mover.order(Withdraw("o3", "freed"))
    away.pull(home, "o3", len(second), tmp_path / "o4")
    assert (await away.end()).code == "not_found"
    await until(lambda: not mapped(path))


def mapped(folder: str) -> set[str]:
    """Return the files of a folder that this process maps."""
    paths = [mapping.path for mapping in psutil.Process().memory_maps(grouped=False)]
    return {path.removeprefix(f"{folder}/") for path in paths if path.startswith(folder)}


@pytest.mark.parametrize("size", [1, CHUNK - 1, CHUNK, CHUNK + 1])
async def test_any_size_arrives(join: Join, size: int) -> None:
    data = os.urandom(size)
    home, away = join(node_id(1)), join(node_id(2))
    home.offer("o1", data, size)
    there = away.pull(home, "o1", size)
    assert (await away.end()).code == ""
    assert bytes(there) == data


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK + PIECE_BYTES, 3 * CHUNK - 1])
async def test_a_chunk_whose_bytes_are_not_those_that_were_summed_is_asked_for_again(join: Join, place: int) -> None:
    data = bytearray(os.urandom(3 * CHUNK))
    home, away = join(node_id(1)), join(node_id(2))
    home.mover.order(Offer("o1", memoryview(data), len(data), CHUNK))
    away.pull(home, "o1", len(data))
    assert (await away.end()).code == "", "by now the source knows the checksums"
    data[place] ^= 1
    there = away.pull(home, "o1", len(data))
    await until(lambda: away.mover.moved.received_bytes >= 2 * len(data))
    assert away.ended.empty()
    data[place] ^= 1
    assert (await away.end()).code == ""
    assert bytes(there) == data
    assert away.mover.moved.received_bytes < 3 * len(data), "the chunks that were good did not come again"


async def test_those_who_pull_at_once_share_the_chunks(join: Join) -> None:
    data = os.urandom(32 * MIB)
    home, others = join(node_id(1)), [join(node_id(number)) for number in (2, 3, 4)]
    home.offer("o1", data, len(data))
    targets = [other.pull(home, "o1", len(data)) for other in others]
    assert [(await other.end()).code for other in others] == 3 * [""]
    assert all(bytes(target) == data for target in targets)
    assert home.mover.moved.sent_bytes < 2 * len(data)


async def test_a_killed_broker_costs_a_pause_and_what_is_there_is_not_sent_again(
    join: Join, broker: EmbeddedBroker
) -> None:
    data = os.urandom(64 * MIB)
    home, away = join(node_id(1)), join(node_id(2))
    home.offer("o1", data, len(data))
    there = away.pull(home, "o1", len(data))
    await until(lambda: away.mover.moved.received_bytes >= len(data) // 4)
    os.kill(broker.pid, signal.SIGKILL)
    assert (await away.end()).code == ""
    assert bytes(there) == data
    assert home.mover.moved.sent_bytes < 2 * len(data)


async def test_what_is_not_offered_or_withdrawn_ends_with_an_error(join: Join) -> None:
    data = os.urandom(64 * MIB)
    home, away = join(node_id(1)), join(node_id(2))
    home.offer("o1", data, len(data))
    away.pull(home, "o2", 10)
    assert (await away.end()).code == "not_found"
    away.pull(home, "o1", len(data))
    await until(lambda: away.mover.moved.received_bytes > 0)
    home.mover.order(Withdraw("o1", "it was freed"))
    assert await away.end() == Ended("copy of o1", "not_found", "it was freed")
    away.pull(home, "o1", len(data))
    away.mover.order(Cancel("copy of o1"))
    assert (await away.end()).code in ("cancelled", "not_found")


async def test_what_was_offered_before_a_puller_asked_is_found_however_the_thread_was_held_up(
    join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, away = join(node_id(1)), join(node_id(2))
    home.offer("warm-up", b"x", 1)
    away.pull(home, "warm-up", 1)
    assert (await away.end()).code == ""
    monkeypatch.setattr(home.mover, "turn", lambda: 0.01)  # as if there was no turn between the offer and the question
    data = os.urandom(CHUNK)
    home.offer("o1", data, len(data))
    there = away.pull(home, "o1", len(data))
    assert (await away.end()).code == ""
    assert bytes(there) == data


async def test_a_file_that_cannot_be_mapped_is_told(join: Join, tmp_path: Path) -> None:
    home, away = join(node_id(1)), join(node_id(2))
    away.pull(home, "o1", 10, tmp_path / "missing")
    assert (await away.end()).code == "object_store_full"


async def test_user_code_cannot_speak_for_a_node(join: Join, broker: EmbeddedBroker) -> None:
    data = os.urandom(CHUNK)
    home, away = join(node_id(1)), join(node_id(2))
    home.offer("o1", data, len(data))
    there = away.pull(home, "o1", len(data))
    assert (await away.end()).code == ""
    forged = away.pull(home, "o3", len(data))
    async with connect(
        broker.address,
        role=Role.PROCESS,
        identity="x",
        cluster="c",
        credentials=broker.credentials[Role.PROCESS],
    ) as bus:
        for _ in range(3):
            bus.publish(
                SUBJECTS.transfer(away.local, Role.PROCESS, home.local), records.encode(records.Gone(2, "forged"))
            )
            bus.publish(SUBJECTS.chunks(Role.NODE, home.local, "o3"), bytes(CHUNK), reply="0.0")
            await bus.flush()
    ended = await away.end()
    assert ended.text != "forged"
    assert ended.code == "not_found"
    assert bytes(there) == data
    assert bytes(forged) == bytes(CHUNK)


async def test_a_refused_credential_ends_every_pull_and_says_what_to_do(broker: EmbeddedBroker) -> None:
    def wrong(role: Role, name: str) -> BulkAddress:
        return BulkAddress(broker.address, name, Credentials(user="nobody", password="guessed"))

    async with joined(wrong) as join:
        home, away = join(node_id(1)), join(node_id(2))
        away.pull(home, "o1", CHUNK)
        away.pull(home, "o2", CHUNK)
        ended = [await away.end(), await away.end()]
        away.pull(home, "o3", CHUNK)
        ended.append(await away.end())
        for one in ended:
            assert one.code == "authentication"
            assert f"refuses the credential of {node_id(2)}" in one.text
            assert "credentials file" in one.text
            assert "guessed" not in one.text


async def test_nothing_is_left_of_a_mover_that_was_closed(broker: EmbeddedBroker) -> None:
    def left() -> tuple[int, int]:
        gc.collect()  # what tests before left for it, descriptors among it
        # But for the threads in which this test waits: one more begins where the last was not idle again in time.
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]
        return len(threads), psutil.Process().num_fds()

    def where(role: Role, name: str) -> BulkAddress:
        return BulkAddress(broker.address, name, broker.credentials[role])

    async def once() -> None:
        async with joined(where) as join:
            home, away, _unused = join(node_id(1)), join(node_id(2)), join(node_id(3))
            home.offer("o1", bytes(CHUNK), CHUNK)
            away.pull(home, "o1", CHUNK)
            assert (await away.end()).code == ""
            home.pull(away, "missing", CHUNK)

    await once()
    before = left()
    for _ in range(3):
        await once()
    assert left() == before


async def test_a_broker_that_is_not_there_is_waited_for_and_closing_waits_for_nothing() -> None:
    where = BulkAddress(f"nats://127.0.0.1:{free_port()}", "x")
    async with joined(lambda role, name: where) as join:
        home, away = join(node_id(1)), join(node_id(2))
        home.offer("o1", bytes(CHUNK), CHUNK)
        away.pull(home, "o1", CHUNK)
        await asyncio.sleep(0)
    assert away.ended.empty()


@contextlib.asynccontextmanager
async def tls_broker(folder: Path, wants: str = "") -> AsyncIterator[str]:
    """Run a broker with TLS; ``wants`` says what else it wants of those who come."""
    port = free_port()
    configuration = folder / "broker.conf"
    configuration.write_text(
        f'listen: "127.0.0.1:{port}"\nauthorization {{token: secret}}\n'
        f'tls {{cert_file: "{TLS / "certificate.pem"}", key_file: "{TLS / "key.pem"}", {wants}}}\n'
    )
    process = await asyncio.create_subprocess_exec(
        find_server(), "--config", str(configuration), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        yield f"tls://localhost:{port}"
    finally:
        process.kill()
        await process.wait()


async def test_over_tls_with_a_token(tmp_path: Path) -> None:
    data = os.urandom(5 * MIB + 4321)
    files = TlsFiles(ca_file=str(TLS / "certificate.pem"))
    async with tls_broker(tmp_path) as address:
        where = BulkAddress(address, "x", Credentials(token="secret"), files)
        async with joined(lambda role, name: where) as join:
            home, away = join(node_id(1)), join(node_id(2))
            home.offer("o1", data, len(data))
            there = away.pull(home, "o1", len(data))
            assert (await away.end()).code == ""
            assert bytes(there) == data


@pytest.mark.parametrize(
    ("files", "wants"),
    [
        pytest.param(TlsFiles(), "", id="the broker's"),
        pytest.param(
            TlsFiles(ca_file=str(TLS / "certificate.pem")),
            f'ca_file: "{TLS / "certificate.pem"}", verify: true',
            id="ours, of which there is none",
        ),
    ],
)
async def test_a_certificate_that_is_not_trusted_ends_every_pull_and_says_what_to_do(
    tmp_path: Path, files: TlsFiles, wants: str
) -> None:
    async with tls_broker(tmp_path, wants) as address:
        where = BulkAddress(address, "x", Credentials(token="secret"), files)
        async with joined(lambda role, name: where) as join:
            home, away = join(node_id(1)), join(node_id(2))
            away.pull(home, "o1", CHUNK)
            ended = await away.end()
        joining = connect(
            address, role=Role.PROCESS, identity="x", cluster="c", credentials=where.credentials, tls=where.tls
        )
        with pytest.raises(AuthenticationError, match="SHOAL_CA_FILE"):
            async with joining:
                pass
    assert ended.code == "authentication"
    assert "certificate" in ended.text
    assert "SHOAL_CA_FILE" in ended.text


async def test_no_credential_goes_to_a_broker_without_tls_where_tls_was_asked_for() -> None:
    def greet(server: socket.socket) -> bytes:
        """Greet the first who comes, and return all that it says."""
        with server:
            connection, _ = server.accept()
        with connection:
            connection.sendall(b'INFO {"server_id":"x","max_payload":1048576}\r\n')
            heard = b""
            while part := connection.recv(4096):
                heard += part
            return heard

    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(SECONDS)
    where = BulkAddress(f"tls://127.0.0.1:{server.getsockname()[1]}", "x", Credentials(token="secret"))
    async with joined(lambda role, name: where) as join:
        join(node_id(1)).offer("o1", bytes(10), 10)
        assert b"secret" not in await asyncio.to_thread(greet, server)
