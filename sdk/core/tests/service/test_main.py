"""A service as a process of its own: exit codes, signals, draining, logs, health."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from shoal_core.bus import Bus
from shoal_core.bus.broker import EmbeddedBroker, free_port, launch_broker
from shoal_core.bus.connection import connect
from shoal_core.bus.requests import ask
from shoal_core.protocol.ids import new_process_id
from shoal_core.protocol.messages import KvGet, KvValue
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.testing.buses import CLUSTER

PROGRAM = """
import asyncio, sys
from contextlib import asynccontextmanager
from shoal_core.protocol.effects import Reply, Request, Start
from shoal_core.protocol.messages import KvGet, KvValue
from shoal_core.protocol.subjects import Role, Subjects
from shoal_core.service import Engine, Route
from shoal_core.service.main import Service, run
from shoal_core.service.settings import ServiceSettings

class Core:
    def handle(self, message, now):
        match message:
            case Request(KvGet(key="fail")):
                raise ZeroDivisionError("by zero")
            case Request(KvGet(key="slow"), token):
                return [Start(token)]
            case Request(_, token) | ("done", token):
                return [Reply(token, KvValue(value=b"answer"))]
        return []

    def tick(self, now):
        return []

@asynccontextmanager
async def serve(bus, settings):
    await bus.key_value(Subjects(settings.cluster).control_bucket())

    async def slow(token):
        print("begun", flush=True)
        while not engine.draining:
            await asyncio.sleep(0.001)
        engine.inject(("done", token))

    routes = [Route(Subjects(settings.cluster).gcs("kv_get"), KvGet)]
    engine = Engine(Core(), bus, name="gcs", routes=routes, perform_start=slow)
    async with engine:
        print("serving", flush=True)
        yield engine
    print("left", flush=True)

sys.exit(run(Service("gcs", Role.GCS, ServiceSettings, serve)))
"""
SUBJECT = Subjects(CLUSTER).gcs("kv_get")


@asynccontextmanager
async def started(*arguments: str) -> AsyncIterator[Process]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SHOAL_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, "--cluster", CLUSTER, *arguments, stdout=PIPE, stderr=PIPE, env=environment
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def said(process: Process) -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    return (await process.stdout.readline()).decode().strip()


async def ended(process: Process) -> tuple[int, str, str]:
    """Return the exit code and what was still printed, after the process has ended by itself."""
    out, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), errors.decode()


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Place:
    """A broker, and how a service finds it."""

    def __init__(self, broker: EmbeddedBroker, credentials: Path) -> None:
        self.broker = broker
        self.flags = ("--address", broker.address, "--credentials", str(credentials))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with launch_broker(CLUSTER) as broker:
        yield Place(broker, credentials_file(broker, tmp_path))


def credentials_file(broker: EmbeddedBroker, folder: Path) -> Path:
    proof = broker.credentials[Role.GCS]
    file = folder / "credentials.json"
    file.write_text(json.dumps({"user": proof.user, "password": proof.password}))
    return file


@asynccontextmanager
async def asker(broker: EmbeddedBroker) -> AsyncIterator[Bus]:
    async with connect(
        broker.address,
        role=Role.PROCESS,
        identity=new_process_id(),
        cluster=CLUSTER,
        credentials=broker.credentials[Role.PROCESS],
    ) as bus:
        yield bus


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_service_that_is_told_to_end_answers_what_it_was_asked_and_exits_with_0(
    place: Place, number: signal.Signals
) -> None:
    async with started(*place.flags) as process, asker(place.broker) as bus:
        assert await said(process) == "serving"
        assert await ask(bus, SUBJECT, KvGet(namespace="", key="k")) == KvValue(value=b"answer")
        asked = asyncio.ensure_future(ask(bus, SUBJECT, KvGet(namespace="", key="slow"), attempts=1))
        assert await said(process) == "begun"
        process.send_signal(number)
        assert await asked == KvValue(value=b"answer")
        code, out, errors = await ended(process)
        assert (code, out) == (0, "left\n")
        assert [line["message"] for line in lines(errors)][-2:] == ["told to end: draining", "ended"]


async def test_a_service_that_fails_exits_with_1_and_says_why(place: Place) -> None:
    async with started(*place.flags, "--identity", "replica-7") as process, asker(place.broker) as bus:
        assert await said(process) == "serving"
        bus.publish(SUBJECT, b'{"namespace":"","key":"fail"}')
        code, out, errors = await ended(process)
        assert (code, out) == (1, "")
        failed = lines(errors)[-1]
        assert (failed["level"], failed["service"], failed["id"]) == ("error", "gcs", "replica-7")
        assert failed["message"] == "gcs failed"
        assert "ZeroDivisionError: by zero" in failed["exception"]


async def test_wrong_settings_exit_with_2_and_are_named() -> None:
    async with started("--http-port", "x") as process:
        code, out, errors = await ended(process)
        assert (code, out) == (2, "")
        assert errors.startswith("shoal-gcs: --http-port (or SHOAL_HTTP_PORT): ")
        assert len(errors.splitlines()) == 1
    async with started("--credentials", "/no/such/file") as process:
        code, _, errors = await ended(process)
        assert code == 2
        assert "/no/such/file" in errors


async def test_a_broker_that_is_not_there_exits_with_3() -> None:
    address = f"nats://user:secret@127.0.0.1:{free_port()}"
    async with started("--address", address, "--connect-seconds", "0.2") as process:
        code, out, errors = await ended(process)
        assert (code, out) == (3, "")
        assert "nobody answered" in lines(errors)[-1]["message"]
        assert "secret" not in errors


async def test_a_broker_that_refuses_the_credential_exits_with_3(place: Place) -> None:
    async with started("--address", place.broker.address, "--token", "wr0ng") as process:
        code, _, errors = await ended(process)
        assert code == 3
        assert "refused the credential" in lines(errors)[-1]["message"]
        assert "wr0ng" not in errors


async def test_a_broker_without_jetstream_exits_with_3(tmp_path: Path) -> None:
    async with launch_broker(CLUSTER, jetstream=False) as broker:
        file = credentials_file(broker, tmp_path)
        async with started("--address", broker.address, "--credentials", str(file)) as process:
            code, _, errors = await ended(process)
            assert code == 3
            assert "no JetStream" in lines(errors)[-1]["message"]


async def test_health_is_served_while_the_service_runs(place: Place) -> None:
    port = free_port()
    async with started(*place.flags, "--http-port", str(port)) as process:
        assert await said(process) == "serving"
        assert await status_of(port, "/healthz") == 200
        # The engine serves a moment before the program knows of it.
        while await status_of(port, "/readyz") != 200:
            pass
        assert await status_of(port, "/metrics") == 200
        process.terminate()
        assert (await ended(process))[0] == 0
    with pytest.raises(ConnectionRefusedError):
        await status_of(port, "/healthz")


async def status_of(port: int, path: str) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\n\r\n".encode())
    answer = await reader.read()
    writer.close()
    return int(answer.split()[1])


async def test_text_logs_are_for_people(place: Place) -> None:
    async with started(*place.flags, "--log-format", "text") as process:
        assert await said(process) == "serving"
        process.terminate()
        code, _, errors = await ended(process)
        assert code == 0
        assert f"INFO    shoal.service serving cluster {CLUSTER} at" in errors
