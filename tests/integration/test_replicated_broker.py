"""The durable tier on three servers that keep three copies, on file or in memory: it outlives any one of them."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from zlib_ng.zlib_ng import crc32

from shoal_core.bus import Bus, connect
from shoal_core.bus.broker import find_server, free_port
from shoal_core.bus.credentials import Credentials
from shoal_core.bus.jetstream import JetStream
from shoal_core.bus.requests import ask
from shoal_core.bus.server_configuration import lasting_configuration
from shoal_core.protocol.errors import BusError, JetStreamError, JetStreamUnavailableError
from shoal_core.protocol.ids import JobId, new_process_id
from shoal_core.protocol.storage import (
    DurableChunk,
    DurableGet,
    DurableGetChunk,
    DurableManifest,
    DurablePut,
    DurablePutChunk,
    DurableSeal,
)
from shoal_core.protocol.subjects import Role, Subjects
from shoal_objectstore.service import ObjectStoreSettings, serve

CLUSTER = "replicated"
SUBJECTS = Subjects(CLUSTER)
SERVERS = 3
SECONDS = 40.0
ROLES = {role: Credentials(user=role, password=f"{role}-secret") for role in Role}


@dataclass
class Server:
    """One of the brokers that form a cluster."""

    name: str
    port: int
    route: int
    process: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def servers(folder: Path) -> Iterator[list[Server]]:
    """Run three servers that know each other."""
    them = [Server(f"server{index}", free_port(), free_port()) for index in range(SERVERS)]
    routes = json.dumps([f"nats://127.0.0.1:{one.route}" for one in them])
    try:
        for one in them:
            configuration = folder / f"{one.name}.conf"
            configuration.touch(mode=0o600)
            configuration.write_text(
                f'{lasting_configuration(CLUSTER, ROLES)}\ncluster {{\n  name: "c"\n'
                f'  listen: "127.0.0.1:{one.route}"\n  routes: {routes}\n}}\n'
            )
            command = [find_server(), "-c", str(configuration), "-a", "127.0.0.1", "-p", str(one.port)]
            command += ["-n", one.name, "-sd", str(folder / one.name), "-l", str(folder / f"{one.name}.log")]
            one.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        yield them
    finally:
        for one in them:
            one.kill()


@asynccontextmanager
async def joined(them: list[Server], role: Role, identity: str) -> AsyncIterator[Bus]:
    address = ",".join(f"nats://127.0.0.1:{one.port}" for one in them)
    async with connect(address, role=role, identity=identity, cluster=CLUSTER, credentials=ROLES[role]) as bus:
        yield bus


async def state_of(bus: Bus, stream: str) -> dict[str, Any]:
    """Return what JetStream says of a stream."""
    return await JetStream(bus).call(f"STREAM.INFO.{stream}", {})


async def agree(bus: Bus) -> None:
    """Return when the servers have agreed on who leads them: only then one answers what asks for a stream."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                await JetStream(bus).call(f"STREAM.INFO.{SUBJECTS.object_stream()}", {}, timeout_seconds=0.5)
            except JetStreamError as error:
                if error.code == 404:
                    return
            except (BusError, JetStreamUnavailableError):
                pass
            await asyncio.sleep(0.1)


async def upload(bus: Bus, object_id: str, chunks: list[bytes]) -> None:
    put = DurablePut(
        object_id=object_id, size_bytes=sum(map(len, chunks)), digests=list(map(crc32, chunks)), job_id=JobId("")
    )
    await ask(bus, SUBJECTS.objectstore("put"), put, SECONDS)
    for index, chunk in enumerate(chunks):
        part = DurablePutChunk(object_id=object_id, index=index, data=chunk)
        await ask(bus, SUBJECTS.objectstore("put_chunk"), part, SECONDS)
    await ask(bus, SUBJECTS.objectstore("seal"), DurableSeal(object_id=object_id), SECONDS)


async def download(bus: Bus, object_id: str) -> list[bytes]:
    manifest = await ask(bus, SUBJECTS.objectstore("get"), DurableGet(object_id=object_id), SECONDS)
    assert isinstance(manifest, DurableManifest)
    chunks = []
    for index in range(len(manifest.digests)):
        request = DurableGetChunk(object_id=object_id, index=index)
        part = await ask(bus, SUBJECTS.objectstore("get_chunk"), request, SECONDS)
        assert isinstance(part, DurableChunk)
        chunks.append(part.data)
    return chunks


@pytest.mark.parametrize("storage", ["file", "memory"])
async def test_what_is_durable_survives_the_server_that_leads(
    storage: Literal["file", "memory"], tmp_path: Path
) -> None:
    settings = ObjectStoreSettings(cluster=CLUSTER, replicas=3, durable_storage=storage)
    chunks = [bytes([number]) * 500_000 for number in range(4)]
    async with AsyncExitStack() as stack:
        them = stack.enter_context(servers(tmp_path))
        tier = await stack.enter_async_context(joined(them, Role.OBJECTSTORE, "tier"))
        await agree(tier)
        await stack.enter_async_context(serve(tier, settings))
        bus = await stack.enter_async_context(joined(them, Role.PROCESS, new_process_id()))
        await upload(bus, "before", chunks)
        info = await state_of(tier, SUBJECTS.object_stream())
        assert info["config"]["num_replicas"] == 3
        assert info["config"]["storage"] == storage
        assert len(info["cluster"]["replicas"]) == 2
        (leader,) = (one for one in them if one.name == info["cluster"]["leader"])
        leader.kill()
        assert await download(bus, "before") == chunks
        await upload(bus, "after", chunks[:2])
        assert await download(bus, "after") == chunks[:2]
